"""Pictures, tables, the asset graph and HTML pages: that they show the numbers they were given, and stay small and self-contained."""

import io
import random
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from puzzle_dag.report import pictures
from puzzle_dag.report.canvas import drawn_once
from puzzle_dag.report.graph import draw_graph, implied_edges, place_nodes, rank_nodes
from puzzle_dag.report.html import Picture, Section, Table, data_image, markdown_image, render_page
from puzzle_dag.report.loosened import LoosenedFact
from puzzle_dag.report.online import load_marks
from puzzle_dag.report.scenario import ConstraintFact, ScenarioFacts, ServedFact, TaskFact, render_overview, render_scenario
from puzzle_dag.report.tables import format_bytes, format_quantity, format_seconds, markdown_table, text_table

ATTENTIONS = ("kv8", "kv4", "kv2", "kv1", "linear", "noop")
FFNS = ("w768", "w576", "w384", "w192", "w64", "linear", "noop")
MAX_PNG_BYTES = 60_000


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def count_colour(png: bytes, colour: str) -> int:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels(png) - wanted).sum(-1) < 30).sum())


def random_scores(num_layers: int) -> list[dict[str, float]]:
    rng = random.Random(0)
    return [{f"{a}/{f}": 10 ** rng.uniform(-4, 0.5) for a in ATTENTIONS for f in FFNS} for _ in range(num_layers)]


def test_a_picture_is_drawn_again_only_for_other_numbers():
    drawn = []

    @drawn_once
    def draw(values, *, title=""):
        drawn.append(list(values))
        return f"{title}{drawn[-1]}".encode()

    assert draw([1.0, 2.0]) == draw([1.0, 2.0]) == b"[1.0, 2.0]" and len(drawn) == 1
    assert draw([1.0, 2.0000000000000004]) == b"[1.0, 2.0000000000000004]" and draw([1.0, 2.0], title="t") == b"t[1.0, 2.0]"
    assert draw(iter([3.0])) == b"[3.0]" and draw(iter([4.0])) == b"[4.0]"  # iterators look alike
    assert draw(np.arange(5000.0)) != draw(np.arange(5000.0) + (np.arange(5000) == 2000))  # and so do long arrays
    for number in range(200):
        assert draw([number]) == f"[{number}]".encode()
    assert draw([1.0, 2.0]) == b"[1.0, 2.0]" and drawn.count([1.0, 2.0]) == 3  # the oldest make room


@pytest.mark.parametrize("num_layers", [1, 6, 80])
def test_pictures_of_whole_models_stay_small(num_layers):
    rng = random.Random(1)
    blocks = [f"{rng.choice(ATTENTIONS)}/{rng.choice(FFNS)}" for _ in range(num_layers)]
    for png in (
        pictures.architecture_map(blocks, attentions=ATTENTIONS, ffns=FFNS, parent_block="kv8/w768", title="t"),
        pictures.score_heat_map(random_scores(num_layers), title="t"),
    ):
        assert len(png) < MAX_PNG_BYTES
        assert pixels(png).std() > 5


def test_architecture_map_marks_the_parents_own_variants():
    kept = pictures.architecture_map(["kv8/w768"] * 6, parent_block="kv8/w768")
    changed = pictures.architecture_map(["kv4/w384"] * 6, attentions=["kv8"], ffns=["w768"], parent_block="kv8/w768")
    assert count_colour(kept, "#0969da") < 100 < count_colour(changed, "#0969da")
    assert count_colour(kept, "#1a7f37") < 100 < count_colour(changed, "#1a7f37")


def test_architecture_map_frames_runs():
    blocks = ["kv8/w768", "kv8/w1536", "noop/noop", "noop/noop", "noop/noop", "kv8/w768"]
    bare = pictures.architecture_map(blocks, parent_block="kv8/w768")
    framed = pictures.architecture_map(blocks, parent_block="kv8/w768", runs=["fuse_1-2", "drop_3-4"])
    assert count_colour(bare, "#d4670a") == 0 < count_colour(framed, "#d4670a")
    with pytest.raises(ValueError, match="run 'fuse' not understood"):
        pictures.architecture_map(blocks, runs=["fuse"])


def test_heat_map_shows_worse_blocks_darker():
    even = pictures.score_heat_map([{"kv8/w768": 0.0, "kv4/w768": 1e-3}] * 20, label="x")
    one_bad = pictures.score_heat_map([{"kv8/w768": 0.0, "kv4/w768": 1e-3}] * 19 + [{"kv8/w768": 0.0, "kv4/w768": 1.0}], label="x")
    assert not np.array_equal(pixels(even), pixels(one_bad))


def test_heat_map_survives_zeros_gaps_and_nothing_to_show():
    pictures.score_heat_map([{"kv8/w768": 0.0}, {}])
    pictures.score_heat_map([{"kv8/w768": float("nan"), "kv4/w768": -1e-9}])


def test_retention_below_the_floor_changes_colour():
    above = pictures.retention_bars({"a": (0.97, 0.01)}, floor=0.9)
    below = pictures.retention_bars({"a": (0.85, 0.01)}, floor=0.9)
    assert count_colour(above, "#0969da") > 1000 > count_colour(below, "#0969da")
    assert count_colour(below, "#d4670a") > 1000


def test_curves_bars_and_frontier_stay_small():
    points = [pictures.FrontierPoint("parent", 1, 1, "parent"), pictures.FrontierPoint("c", 1.5, 0.97, x_error=0.03, y_error=0.01)]
    points += [pictures.FrontierPoint("", 1 + i / 10, 1 - i / 50, "solution") for i in range(20)]
    for png in (
        pictures.loss_bars({"attention/kv4": (0.5, 0.01), "ffn/linear": (0.9, 0.0)}),
        pictures.loss_curve({"total": [(i, 1 / (i + 1)) for i in range(500)], "empty": []}),
        pictures.loss_curve({}),
        pictures.frontier(points, x="throughput", y="retention"),
        pictures.frontier(points, x="throughput", y="summed KL", children="children (predicted)", is_loss=True),
    ):
        assert len(png) < MAX_PNG_BYTES


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("latency_s", 0.01234, "12.3 ms"),
        ("throughput_tokens_per_s", 12345.6, "12,346 tokens/s"),
        ("memory_bytes", 17.25 * 2**20, "17.2 MiB"),
        ("kv_bytes_per_token", 6144, "6.0 KiB/token"),
        ("parameters", 8_500_000, "8.50 M"),
        ("parameters", 8.03e9, "8.03 G"),
        ("num_attention_layers", 5, "5"),
        ("kl", float("nan"), "none"),
        ("kl", 0.04012, "0.04012 nats"),
        ("kl + 0.5 hellaswag", 0.25, "0.25"),
        ("latency_s on cpu-chat at batch 8", 0.5, "500 ms"),
    ],
)
def test_quantities_carry_their_units(name, value, text):
    assert format_quantity(name, value) == text


def test_durations_and_bytes_at_the_edges():
    assert [format_seconds(s) for s in (0.00085, 0.5, 4.2, 200, 7500)] == ["850 µs", "500 ms", "4.2 s", "3 min 20 s", "2 h 5 min"]
    assert [format_bytes(b) for b in (0, 1023, 1024, 3 * 2**30)] == ["0 B", "1023 B", "1.0 KiB", "3.0 GiB"]


def test_tables_escape_align_and_refuse_ragged_rows():
    assert markdown_table(("a", "b"), [("x|y", 1)]).splitlines()[2] == "| x\\|y | 1 |"
    lines = text_table(("name", "v"), [("long name", 1), ("s", 22)]).splitlines()
    assert [line.index(v) for line, v in ((lines[2], "1"), (lines[3], "22"))] == [11, 11]
    for render in (markdown_table, text_table):
        with pytest.raises(ValueError, match="cells"):
            render(("a", "b"), [("only one",)])


DIAMOND = {"b": ["a"], "c": ["a"], "d": ["b", "c", "a"], "e": ["d", "late"]}


def test_graph_ranks_follow_the_edges_and_late_sources_stand_by_their_reader():
    ranks = rank_nodes(DIAMOND)
    assert all(ranks[up] < ranks[node] for node, ups in DIAMOND.items() for up in ups)
    assert ranks["late"] == ranks["e"] - 1
    assert implied_edges(DIAMOND) == {("a", "d")}
    places = list(place_nodes(DIAMOND).values())
    for i, (x, y) in enumerate(places):
        assert all(y != other_y or abs(x - other_x) > 0.999 for other_x, other_y in places[:i])


def test_graph_is_valid_svg_with_all_names_and_the_same_each_time():
    svg = draw_graph(DIAMOND, groups={"a": "first"}, partitions={"b": "layer"})
    assert svg == draw_graph(DIAMOND, groups={"a": "first"}, partitions={"b": "layer"})
    texts = {t for e in ET.fromstring(svg).iter() if (t := (e.text or "").strip())}
    assert {"a", "b", "c", "d", "e", "late", "per layer", "first"} <= texts


def test_graph_with_a_cycle_is_refused():
    with pytest.raises(ValueError, match="cycle among a, b"):
        draw_graph({"a": ["b"], "b": ["a"]})


def facts() -> ScenarioFacts:
    return ScenarioFacts(
        name="throughput-1.5x",
        profile="tiny",
        target="cpu-prefill",
        description="half as many <tokens> again",
        constraints=[
            ConstraintFact(name="throughput_tokens_per_s", bound="at least 1.5 x parent", limits=[1500], parent=1000, predicted=1520.4)
        ],
        optimised="kl",
        loosened=[
            LoosenedFact(
                name="memory_bytes", side="at_most", bound=2**30, change=2**29, value=0.0834, gain=0.0401, is_binding=True, step="50 % more"
            ),
            LoosenedFact(name="ttft_s", side="at_most", bound=0.5, change=0.025, value=0.1235, gain=0.0, is_binding=False),
        ],
        solver={"status": "optimal", "objective": 0.1234567891, "gap": 0.0},
        blocks=["kv4/w384", "noop/w768"],
        parent_block="kv8/w768",
        served=[ServedFact(name="throughput_tokens_per_s", parent=1000, child=1490, predicted=1520.4, ratio_low=1.45, ratio_high=1.53)],
        kl={"assembled": 0.5, "uptrained": 0.0912},
        tasks=[TaskFact(task="skill_copy", metric="acc", parent=1.0, child=0.98, retention=0.973, stderr=0.0041)],
        uptrain_curves={"total": [(0, 1.0), (1000, 0.5)]},
        retention_floor=0.9,
        load=[load_level("parent", 4, 1000.0, None), load_level("throughput-1.5x", 4, 1400.0, 1.4)],
        output_length=11,
        speculation={
            "batches": [
                {
                    "batch": 2,
                    "parent_s": 1.0,
                    "speculative_s": 0.8,
                    "speedup": 1.25,
                    "speedup_low": 1.2,
                    "speedup_high": 1.3,
                    "acceptance_rate": 0.625,
                    "tokens_per_step": 3.5,
                    "same_tokens": 1.0,
                }
            ],
            "drafted_at_a_time": 4,
        },
    )


def load_level(model: str, concurrency: int, rate: float, speedup: float | None) -> dict[str, object]:
    seconds = {f"{n}_{s}_s": 0.25 for n in ("ttft", "tpot", "latency") for s in ("median", "p99")}
    predicted = {"predicted_throughput_tokens_per_s": 1.1 * rate, "predicted_ttft_s": 0.1, "predicted_tpot_s": 0.02}
    interval = {"speedup": speedup, "speedup_low": speedup and 0.9 * speedup, "speedup_high": speedup and 1.1 * speedup}
    return {"model": model, "concurrency": concurrency, "throughput_tokens_per_s": rate, **seconds, **predicted, **interval}


def assert_self_contained(page: str) -> None:
    assert not re.search(r"<script|<link|https?://(?!www\.w3\.org)", page)
    assert all(address.startswith("data:image/png;base64,") for address in re.findall(r'<img[^>]*src="([^"]*)"', page))


def test_scenario_page_shows_every_number_and_escapes_text():
    page = render_scenario(facts(), footer="commit abc")
    for shown in ("1,500 tokens/s", "1,520 tokens/s", "0.123457", "1.490 (1.450 to 1.530)", "0.0912", "97.3 ± 0.4 %", "commit abc"):
        assert shown in page
    assert "&lt;tokens&gt;" in page and "<tokens>" not in page
    for shown in (
        "50 % more",
        "512.0 MiB",
        "0.0401 nats",
        "nothing: it does not bind",
        "1.400 (1.260 to 1.540)",
        "1,540 tokens/s",
        "1.250 (1.200",
        "62.5%",
    ):
        assert shown in page
    assert page.count("<img") == 4
    assert_self_contained(page)


def test_scenario_page_leaves_out_what_there_is_not():
    page = render_scenario(ScenarioFacts(name="new", profile="tiny", target="cpu-chat"))
    assert "<h2>" not in page and "<h1>new</h1>" in page


def test_a_child_that_can_not_draft_is_told_of_in_words():
    page = render_scenario(ScenarioFacts(name="n", profile="p", target="t", speculation={"batches": [], "unsupported": "no <drafts>"}))
    assert "can&#x27;t run this child as a draft model: no &lt;drafts&gt;" in page


def test_a_load_curves_prediction_is_the_first_token_and_all_that_follow():
    mark = load_marks([load_level("parent", 4, 1000.0, None)], output_length=11)["parent"][0]
    assert mark.predicted_latency_s == pytest.approx(0.1 + 10 * 0.02) and mark.predicted_throughput_tokens_per_s == 1100.0
    unknown = {**load_level("parent", 4, 1000.0, None), "predicted_tpot_s": None}
    assert load_marks([unknown], output_length=11)["parent"][0].predicted_latency_s is None


def test_overview_page_adds_up_the_stages_and_links_the_scenarios():
    page = render_overview(
        "tiny",
        results=Table(("scenario", "speed-up"), [("throughput-1.5x", "1.49")]),
        stages={"library": 61.0, "scores": 30.0},
        frontiers=[Picture(pictures.frontier([pictures.FrontierPoint("parent", 1, 1, "parent")], x="x", y="y"), "quality against speed")],
        predicted=[Picture(pictures.frontier([pictures.FrontierPoint("parent", 1, 0, "parent")], x="x", y="y", is_loss=True), "foreseen")],
        machine={"matmul": "100 GFLOP/s"},
        pages=[("throughput-1.5x", "throughput-1.5x.html")],
    )
    for shown in ("1 min 31 s", "100 GFLOP/s", "from solutions alone", "foreseen", 'href="throughput-1.5x.html"', "1.49"):
        assert shown in page
    assert_self_contained(page)


def test_pictures_travel_inside_markdown_and_html():
    png = pictures.loss_curve({"a": [(0, 1.0), (1, 0.5)]})
    assert markdown_image(png, "a [b]").startswith("![a (b)](data:image/png;base64,iVBOR")
    page = render_page("t", [Section("s", paragraphs=["<b>"], pictures=[Picture(png, '"q"')])])
    assert data_image(png) in page and "&lt;b&gt;" in page and 'alt="&quot;q&quot;"' in page
