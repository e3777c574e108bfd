"""The pictures of the frontier, from made-up results: which points they hold, what stands beside them, and whose costs they rest on."""

from typing import Any

import pytest

from assets import reports
from assets.facts import frontier_points, ratio_points
from assets.predicted import predicted_pictures
from assets.reports import frontier_pictures
from puzzle_dag.report import pictures
from puzzle_dag.report.pictures import FrontierPoint

PARENT = FrontierPoint("parent", 1.0, 1.0, "parent")


def result(scenario: str, **changes: Any) -> dict[str, Any]:
    row = {"scenario": scenario, "target": "cpu-chat", "batch": 8, "measured_speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6}
    ratios = {"measured_memory_ratio": 0.6, "measured_latency_ratio": 0.7, "retention": 0.9, "retention_stderr": 0.02}
    return {**row, **ratios, **changes}


def ungraded(scenario: str) -> dict[str, Any]:
    return result(scenario, retention=None, retention_stderr=None)


def test_the_parent_and_every_graded_child_are_on_the_measured_frontier() -> None:
    rows = [result("fast"), ungraded("new"), result("small", measured_speedup=1.2, speedup_low=1.1, speedup_high=1.4, retention=0.95)]
    rows.append(result("parent was not served", measured_speedup=None, speedup_low=None, speedup_high=None))
    fast, small = (
        FrontierPoint("fast", 1.5, 0.9, "child", pytest.approx(0.1), 0.02),
        FrontierPoint("small", 1.2, 0.95, "child", pytest.approx(0.15), 0.02),
    )
    assert frontier_points(rows) == [PARENT, fast, small]
    assert frontier_points([ungraded("new")]) == [PARENT] == ratio_points([], "measured_memory_ratio")


@pytest.mark.parametrize(("ratio", "value"), [("measured_memory_ratio", 0.6), ("measured_latency_ratio", 0.7)])
def test_the_parent_and_every_graded_child_are_on_the_frontiers_of_ratios(ratio: str, value: float) -> None:
    rows = [result("fast"), ungraded("new"), result("small", **{ratio: 0.4}), result("unserved", **{ratio: None})]
    fast, small = (FrontierPoint(name, x, 0.9, "child", 0.0, 0.02) for name, x in (("fast", value), ("small", 0.4)))
    assert ratio_points(rows, ratio) == [PARENT, fast, small]


def test_children_of_other_targets_and_batch_sizes_say_so_beside_the_point() -> None:
    def names(*rows: dict[str, Any]) -> list[str]:
        found = [p.name for p in frontier_points(rows)[1:]]
        assert found == [p.name for p in ratio_points(rows, "measured_memory_ratio")[1:]]
        return found

    assert names(result("a"), result("b")) == ["a", "b"]
    assert names(result("a"), result("b", batch=32)) == ["a (batch 8)", "b (batch 32)"]
    assert names(result("a"), result("b", target="cpu-prefill")) == ["a (cpu-chat)", "b (cpu-prefill)"]
    both = names(result("a"), result("b", batch=32), result("c", target="cpu-prefill"))
    assert both == ["a (cpu-chat, batch 8)", "b (cpu-chat, batch 32)", "c (cpu-prefill, batch 8)"]
    # What isn't drawn makes no difference.
    assert names(result("a"), {**ungraded("b"), "target": "cpu-prefill"}) == ["a"]


def test_the_measured_pictures_say_what_one_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[str], str]] = []

    def draw(points: list[FrontierPoint], *, x: str, y: str) -> bytes:
        drawn.append(([p.name for p in points], x))
        return b""

    monkeypatch.setattr(reports, "frontier", draw)
    frontier_pictures([result("fast")])
    assert [names for names, _ in drawn] == [["parent", "fast"]] * 3
    assert all("parent at the same target and batch size = 1" in x for _, x in drawn)


def predicted(kind: str, scenario: str | None = None, **changes: Any) -> dict[str, Any]:
    row = {"target": "gpu", "quantity": "latency_s", "kind": kind, "scenario": scenario, "ratio": 0.8, "kl": 0.1, "batch": 8}
    return {**row, "costs": "analytic", **changes}


def test_the_predicted_picture_tells_children_from_what_was_searched_and_names_its_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[FrontierPoint]] = {}

    def draw(points: list[FrontierPoint], *, title: str, **_: Any) -> bytes:
        drawn[title] = points
        return b"png"

    monkeypatch.setattr(pictures, "frontier", draw)
    rows = [
        predicted("curve"),
        predicted("parent", ratio=1.0, kl=0.0),
        predicted("scenario", "fast", kl=0.3),
        predicted("searched", "fast"),
    ]
    found = predicted_pictures([*rows, predicted("parent", target="cpu", costs="measured")])
    points = {(p.kind, p.name, p.y) for p in drawn["gpu: analytic costs"]}
    assert points == {
        ("solution", "curve", 0.1),
        ("parent", "parent", 0.0),
        ("child", "fast", 0.3),
        ("searched", "fast as first found", 0.1),
    }
    assert len(drawn["cpu: measured costs"]) == 1
    captions = {name: picture.caption for name, picture in found.items()}
    assert captions["gpu_latency_s"] == "gpu latency s, predicted from analytic costs"
    assert captions["cpu_latency_s"] == "cpu latency s, predicted from measured costs"
