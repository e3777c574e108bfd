"""Load curves and speculation as assets: there only where the profile asks, resumable, and in the tables like all else.

Real assets, a real Dagster instance, DuckDB; only engines and servers are arithmetic, which have tests of their own.
"""

import html
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
import query_page
from micro_project import Project, make_project
from ticking_engine import TickingEngine

from assets.children import CHECKPOINT
from assets.definitions import build_definitions
from assets.online import ALTERNATIVES
from assets.plan import CORE, OPT_IN, make_plan
from puzzle_dag.model.chat_template import CHAT_TEMPLATE_FILE
from puzzle_dag.serving import curve, speculate
from puzzle_dag.serving.load import LoadFailedError, LoadPoint

SCENARIO = "micro-small"
SETTINGS = {"load_curve": {"concurrencies": [1, 2], "rounds": 2, "turns": 3}, "speculation": {"batch_sizes": [1, 2], "output_length": 8}}


class Online:
    """Takes the place of the servers and of the draft engines."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.loads: list[tuple[str, int, int]] = []
        self.engines: list[bool] = []
        self.breaks_at: tuple[str, int, int] | None = None
        self.refusal: str | None = None
        patch.setattr(curve, "serve", self.serve)
        patch.setattr(curve, "put_under_load", self.load)
        patch.setattr(speculate, "_run", self.run)

    @contextmanager
    def serve(self, folder: Path, name: str, *_: Any, **__: Any) -> Iterator[str]:
        assert (folder / "config.json").is_file()
        yield name

    def load(
        self, server: str, _: Path, __: Any, concurrencies: Any, *, seed: int, on_point: Callable[[LoadPoint], None], **___: Any
    ) -> None:
        for c in concurrencies:
            if (server, seed, c) == self.breaks_at:
                raise LoadFailedError("the server ended\n--- end of server.log ---")
            self.loads.append((server, seed, c))
            rate = 100.0 * c * (1 if server == "parent" else 2)
            latencies = dict.fromkeys((f"{n}_{s}_s" for n in ("ttft", "tpot", "latency") for s in ("median", "p99")), 0.5)
            on_point(
                LoadPoint(
                    concurrency=c,
                    num_requests=2 * c,
                    duration_s=1.0,
                    requests_per_s=2.0 * c,
                    throughput_tokens_per_s=rate,
                    output_tokens_per_s=rate / 5,
                    **latencies,
                )
            )

    def run(self, jobs: Any, *_: Any) -> list[dict[str, Any]]:
        self.engines += [bool(j["draft"]) for j in jobs]
        if self.refusal:
            return [{}, {"error": self.refusal}]
        times = {
            str(b): {"total_s": [1.0], "tokens": [[5]], "num_drafts": 4, "num_draft_tokens": 12, "num_accepted_tokens": 6} for b in (1, 2)
        }
        return [{"times": times} for _ in jobs]


@pytest.fixture(scope="module")
def online() -> Iterator[Online]:
    with pytest.MonkeyPatch.context() as patch:
        TickingEngine().install(patch)
        yield Online(patch)


@pytest.fixture(scope="module")
def project(micro_parent_folder: Path, tmp_path_factory: pytest.TempPathFactory, online: Online) -> Project:
    """The micro profile with one scenario, refreshed while one load breaks."""
    made = make_project(tmp_path_factory.mktemp("online"), micro_parent_folder)
    made.edit(made.profile_file, scenarios=[SCENARIO], **SETTINGS)
    online.breaks_at = (SCENARIO, 2, 2)
    record = made.refresh()
    assert [str(o.item) for o in record.of("failed")] == [f"load_curve[{SCENARIO}]"]
    assert "LoadFailedError: the server ended" in record.of("failed")[0].reasons[0]
    return made


def read_page(project: Project) -> str:
    return html.unescape((project.workspace.var / "reports" / f"{SCENARIO}.html").read_text())


def test_an_interrupted_curve_goes_on_and_reaches_the_tables(project: Project, online: Online) -> None:
    places = list(itertools.product((0, 1, 2), ("parent", SCENARIO), (1, 2)))
    assert [(t, m, c) for m, t, c in online.loads] == places[:-1]  # the second attempt measured nothing again
    online.breaks_at, online.loads = None, []
    record = project.refresh()
    assert record.ok and online.loads == [(SCENARIO, 2, 2)]
    assert {i.partition("[")[0] for i in record.ran} == {"load_curve", "frontier", "tables"}
    assert project.rows("SELECT model, concurrency, speedup, source FROM load_curve ORDER BY ALL") == [
        (SCENARIO, 1, 2.0, "measured"),
        (SCENARIO, 2, 2.0, "measured"),
        ("parent", 1, None, "measured"),
        ("parent", 2, None, "measured"),
    ]
    # The micro target's costs are of batch 2.
    levels = project.workspace.shelf.value("load_curve", SCENARIO)["curve"]["levels"]
    assert [x["predicted_ttft_s"] is None for x in levels] == [True, False, True, False]
    assert project.rows("SELECT batch, acceptance_rate, tokens_per_step FROM speculation ORDER BY ALL") == [(1, 0.5, 2.5), (2, 0.5, 2.5)]
    page = read_page(project)
    assert "/checkpoint --host 127.0.0.1 --dtype float32 --kv-cache-memory-bytes 1G --enforce-eager" in page
    assert "Under load" in page and "2.000 (2.000 to 2.000)" in page and "draft model" in page and "50.0%" in page
    assert project.refresh().ran == []


def test_the_page_of_queries_tells_of_both_tables(project: Project) -> None:
    told, words = query_page.read_page(query_page.PAGE.read_text())
    found = query_page.complete(query_page.read_database(project.workspace.database), told)
    assert {name: told.get(name) for name in OPT_IN} == {name: found[name] for name in OPT_IN}
    assert not [place for place, said in words.items() if place[0] in OPT_IN and said in ("", query_page.UNKNOWN)]


def test_an_engine_that_can_not_draft_says_so_in_the_record(project: Project, online: Online) -> None:
    online.refusal, online.engines = "NotImplementedError: no drafts on abacuses", []
    project.edit(project.profile_file, speculation={"batch_sizes": [1], "output_length": 8})
    try:
        record = project.refresh()
    finally:
        online.refusal = None
    assert record.ok and {i.partition("[")[0] for i in record.ran} == {"speculation", "frontier", "tables"}
    assert online.engines == [False, True] * 3
    report = project.workspace.shelf.value("speculation", SCENARIO)["report"]
    assert report["unsupported"] == "NotImplementedError: no drafts on abacuses" and report["batches"] == []
    with project.instance() as instance:
        latest = instance.get_latest_materialization_event(make_plan(project.root, project.profile).key("speculation"))
    metadata = latest.asset_materialization.metadata  # type: ignore[union-attr]
    assert metadata["what_would_work"].value == ALTERNATIVES and "abacuses" in metadata["unsupported"].value
    page = read_page(project)
    assert "no drafts on abacuses" in page and ALTERNATIVES in page and "50.0%" not in page and "Under load" in page
    with pytest.raises(duckdb.CatalogException):
        project.rows("SELECT * FROM speculation")  # numbers of a former measurement would pass for this one's


def test_another_chat_template_reaches_the_children_and_nothing_else(project: Project, online: Online) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (project.root / "parents" / "micro" / CHAT_TEMPLATE_FILE).write_text(template)
    online.loads, online.engines = [], []
    record = project.refresh()
    assert {i.partition("[")[0] for i in record.ran} == {"child", "uptrained_child"} and not online.loads and not online.engines
    for asset in ("child", "uptrained_child"):
        folder = project.workspace.store.folder(asset, project.workspace.shelf.value(asset, SCENARIO)["key"]) / CHECKPOINT
        assert (folder / CHAT_TEMPLATE_FILE).read_text() == template
    assert project.refresh().ran == []


def test_what_takes_minutes_is_only_there_where_it_is_asked_for(project: Project) -> None:
    def names(**fields: Any) -> set[str]:
        plan = make_plan(project.root, project.profile)
        profile = plan.profile.model_copy(update=fields)
        graph = build_definitions(type(plan)(plan.root, profile, plan.shape, plan.partitions)).resolve_asset_graph()
        return {key.path[-1] for key in graph.get_all_asset_keys()}

    assert names() == {*CORE, *OPT_IN} and names(load_curve=None, speculation=None) == CORE
    assert names(speculation=None) == {*CORE, *OPT_IN} - {"speculation"}


def test_what_takes_minutes_is_measured_of_the_scenarios_that_are_named(project: Project, online: Online) -> None:
    """And saying which is no other measurement: what there is stays fresh."""
    project.edit(project.profile_file, scenarios=[SCENARIO, "micro-light"], load_curve__scenarios=[SCENARIO])
    record = project.refresh(dry=True)
    states = {str(o.item): o.state for o in record.outcomes if o.item.asset in OPT_IN}
    assert states == {f"load_curve[{SCENARIO}]": "fresh", f"speculation[{SCENARIO}]": "fresh", "speculation[micro-light]": "stale"}
