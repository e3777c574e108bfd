"""Analytic costs: against values worked out by hand, growing with what must grow, and labelled."""

import shutil
from pathlib import Path
from typing import get_args

import pytest

from puzzle_dag import cli
from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.config import Target
from puzzle_dag.costs.accelerators import ACCELERATORS
from puzzle_dag.costs.roofline import LAUNCH_S, MESSAGE_S, STEP_S, RooflineError, estimate_table
from puzzle_dag.costs.table import CostTable
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig

PARENT = Block.parse("kv8/w14336")
ATTENTIONS = [Attention.parse(n) for n in ("kv8", "kv4", "kv2", "kv1", "linear", "noop")]
FFNS = [FFN.parse(n) for n in ("w14336", "w7168", "w1536", "linear", "noop")]
LAUNCH = LAUNCH_S["compiled"]


def make_target(**changes) -> Target:
    fields = {
        "version": 1, "name": "made-up", "hardware": "h100", "mode": "compiled",
        "input_length": 1024, "output_length": 3, "batch_sizes": (1, 8, 64),
    }  # fmt: skip
    return Target(**{**fields, **changes})


def make_shape(**changes) -> PuzzleDagConfig:
    """Llama-3.1-8B."""
    fields = {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 4, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    }  # fmt: skip
    return PuzzleDagConfig(**{**fields, **changes})


def estimate(target: Target, shape: PuzzleDagConfig | None = None):
    return estimate_table(shape or make_shape(), PARENT, target, ATTENTIONS, FFNS)


def test_decode_of_an_ffn_by_hand():
    """Batch 1, two steps, bound by memory: gate and up 4096 x 28672, down 14336 x 4096, two bytes each, at 3.35 TB/s."""
    weights = 2 * (4096 * 28_672 + 14_336 * 4096)
    activations = 2 * (4096 + 28_672 + 14_336 + 4096) + 2 * 3 * 14_336 + 2 * 4 * 4096
    expected = 2 * ((weights + activations) / 3.35e12 + 4 * LAUNCH)
    assert estimate(make_target()).row("ffn", "w14336", 1, "decode").seconds == pytest.approx(expected, rel=1e-12)


def test_prefill_of_an_ffn_by_hand():
    """Batch 8, 8,192 tokens in one step: both maps are bound by arithmetic, norm and product by memory."""
    flops = 2 * 8192 * 3 * 4096 * 14_336
    traffic = 2 * 8192 * (4 * 4096 + 3 * 14_336)
    expected = flops / 989.4e12 + traffic / 3.35e12 + 4 * LAUNCH
    assert estimate(make_target()).row("ffn", "w14336", 8, "prefill").seconds == pytest.approx(expected, rel=1e-12)


def test_decode_of_attention_reads_the_cache():
    """Batch 64: the steps see 1,025 and 1,026 keys of 2 x 8 heads x 128, two bytes each; the core is bound by memory."""
    table = estimate(make_target())
    norm, rotary = 2 * 4 * 64 * 4096, 2 * 2 * 64 * (4096 + 2048)
    maps = 2 * (4096 * 6144 + 4096 * 4096) + 2 * 64 * (4096 + 6144 + 4096 + 4096)
    cores = [2 * 2 * 64 * 4096 + 2 * 2 * 64 * keys * 1024 for keys in (1025, 1026)]
    expected = (2 * (norm + rotary + maps) + sum(cores)) / 3.35e12 + 2 * 5 * LAUNCH
    assert table.row("attention", "kv8", 64, "decode").seconds == pytest.approx(expected, rel=1e-12)


def test_the_engines_own_share_by_hand():
    table = estimate(make_target())
    head = 2 * 4096 * 128_256 + 2 * (4096 + 128_256)
    expected = 2 * (STEP_S + 3 * LAUNCH + (2 * 2 * 4096 + 2 * 4 * 4096 + head) / 3.35e12)
    assert table.constant_seconds(1, "decode") == pytest.approx(expected, rel=1e-12)
    assert table.constant_seconds(64, "prefill") > 4 * STEP_S  # 65,536 tokens are four steps of 16,384


def test_tensor_parallel_halves_the_weights_and_pays_for_the_exchange():
    one, two = estimate(make_target()), estimate(make_target(tensor_parallel_size=2))
    traffic = 2 * (4096 * 14_336 + 7168 * 4096) + 2 * (4096 + 14_336 + 7168 + 4096) + 2 * 3 * 7168 + 2 * 4 * 4096
    expected = 2 * (traffic / 3.35e12 + 4 * LAUNCH + 2 * 0.5 * 2 * 4096 / 450e9 + MESSAGE_S)
    assert two.row("ffn", "w14336", 1, "decode").seconds == pytest.approx(expected, rel=1e-12)
    assert two.seconds((PARENT,) * 4, 64, "prefill") < one.seconds((PARENT,) * 4, 64, "prefill")
    # kv1 can't be spread: each of the two keeps it whole, and half the query heads
    cached = estimate(make_target(tensor_parallel_size=8)).row("attention", "kv1", 64, "decode").seconds
    assert cached > one.row("attention", "kv1", 64, "decode").seconds / 8


@pytest.mark.parametrize("hardware", list(ACCELERATORS))
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_more_costs_more(hardware, phase):
    table = estimate(make_target(hardware=hardware))
    for batch in (1, 8, 64):
        for place, names in (("attention", ("noop", "linear", "kv1", "kv2", "kv4", "kv8")), ("ffn", ("noop", "w1536", "w7168", "w14336"))):
            seconds = [table.row(place, name, batch, phase).seconds for name in names]
            assert seconds == sorted(seconds) and len(set(seconds)) == len(seconds)
    for place, name in [("attention", a.name) for a in ATTENTIONS[:-1]] + [("ffn", f.name) for f in FFNS[:-1]] + [("constant", "engine")]:
        seconds = [table.row(place, name, batch, phase).seconds for batch in (1, 8, 64)]
        assert seconds == sorted(seconds) and len(set(seconds)) == 3


def test_precision_and_bandwidth_count():
    plain, fp8 = estimate(make_target()), estimate(make_target(quantization="fp8", kv_cache_dtype="fp8"))
    for phase in ("prefill", "decode"):
        assert 0.45 < fp8.row("ffn", "w14336", 8, phase).seconds / plain.row("ffn", "w14336", 8, phase).seconds < 0.7
    h200 = estimate(make_target(hardware="h200"))
    ratio = h200.row("ffn", "w14336", 1, "decode").seconds / plain.row("ffn", "w14336", 1, "decode").seconds
    assert 3.35 / 4.8 < ratio < 0.75
    eager = estimate(make_target(mode="eager"))
    assert eager.row("ffn", "w14336", 1, "decode").seconds > plain.row("ffn", "w14336", 1, "decode").seconds


def test_a_window_caps_what_decode_reads():
    whole = estimate(make_target())
    windowed = estimate(make_target(), make_shape(sliding_window=256))
    assert windowed.row("attention", "kv8", 64, "decode").seconds < whole.row("attention", "kv8", 64, "decode").seconds
    mixed = make_shape(sliding_window=256, layer_types=["full_attention", "sliding_attention"] * 2)
    assert estimate(make_target(), mixed).row("attention", "kv8", 64, "decode") == whole.row("attention", "kv8", 64, "decode")


def test_every_row_says_that_it_is_analytic():
    table = estimate(make_target())
    assert table.source == "analytic" == table.to_piece_costs(make_shape()).source
    for row in table.rows:
        assert row.source == ("by construction" if row.variant == "noop" else "analytic")
        assert row.hardware == "NVIDIA H100 SXM5 80 GB" and row.engine_version.startswith("roofline")
        assert row.seconds == 0 if row.variant == "noop" else row.seconds > 0


def test_an_analytic_table_survives_its_file(tmp_path):
    table = estimate(make_target())
    table.write(tmp_path / "t.parquet")
    assert CostTable.read(tmp_path / "t.parquet") == table and CostTable.read(tmp_path / "t.parquet").source == "analytic"


@pytest.mark.parametrize("hardware", get_args(Target.model_fields["hardware"].annotation))
def test_every_accelerators_peaks_say_where_they_are_published(hardware):
    if hardware == "local-cpu":
        assert hardware not in ACCELERATORS
        return
    accelerator = ACCELERATORS[hardware]
    assert accelerator.name.startswith("NVIDIA") and min(accelerator.flops_per_s.values()) > 0
    # The bandwidth, on which decode hangs, stands in the words.
    assert (
        f"{accelerator.bytes_per_s / 1e12:g} TB/s" in accelerator.source
        or f"{accelerator.bytes_per_s / 1e9:,.0f} GB/s" in accelerator.source
    )


def test_the_command_estimates_and_says_that_nothing_was_measured(tmp_path, micro_parent_folder, capsys):
    shutil.copytree(Path(__file__).parents[1] / "conf", tmp_path / "conf")
    shutil.copytree(micro_parent_folder, tmp_path / "parents" / "micro")
    gpu = tmp_path / "conf" / "targets" / "gpu.yaml"
    gpu.write_text((tmp_path / "conf" / "targets" / "micro-eager.yaml").read_text().replace("local-cpu", "h200"))
    command = ["--root", str(tmp_path), "estimate", "--profile", "micro", "--out", str(tmp_path / "t.parquet"), "--target"]
    assert cli.main([*command, "gpu"]) == 0
    told = capsys.readouterr().out
    assert "NVIDIA H200 SXM5 141 GB; nothing was measured" in told and "peaks: NVIDIA H200 data sheet, SXM: 4.8 TB/s" in told
    assert CostTable.read(tmp_path / "t.parquet").source == "analytic"
    assert cli.main([*command, "micro-eager"]) == 2
    assert "no peaks are published here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardware": "local-cpu"}, "field `hardware` is 'local-cpu'.*use one of h100, h200, rtx4090"),
        ({"tensor_parallel_size": 5}, "field `tensor_parallel_size` is 5.*32 attention heads; use a divisor"),
    ],
)
def test_what_has_no_estimate_is_refused(changes, message):
    with pytest.raises(RooflineError, match=message):
        estimate(make_target(**changes))
