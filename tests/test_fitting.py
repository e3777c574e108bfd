"""Does it fit: tensor parallelism, memory before measuring, and the arithmetic of the KV cache against what an engine reports."""

import dataclasses
from pathlib import Path

import pytest
from transformers import AutoConfig

from puzzle_dag.architecture import FFN, Attention, Block, variant_union
from puzzle_dag.config import Target, read_profile, read_target
from puzzle_dag.costs.fitting import (
    BatchTooLargeError,
    TensorParallelError,
    check_capacity,
    check_memory,
    check_tensor_parallel,
    count_fitting_batch,
)
from puzzle_dag.costs.measure import measure_models, plan_target
from puzzle_dag.costs.memory import NumberTypes, count_kv_bytes_per_token, count_weight_bytes, size_model, size_variant
from puzzle_dag.costs.probes import serving_config
from puzzle_dag.costs.tabulate import Measurement
from puzzle_dag.engine import hardware
from puzzle_dag.engine.hardware import Hardware, HardwareMismatchError, check_hardware
from puzzle_dag.engine.jobs import BatchTimes, EngineResult, EngineSettings, Workload
from puzzle_dag.engine.kv_cache import count_capacity_tokens, count_largest_batch, size_kv_cache
from puzzle_dag.model.families import to_puzzle_dag_config
from puzzle_dag.model.parent import read_parent_shape
from puzzle_dag.preflight import resolve_spaces
from puzzle_dag.store import ArtifactStore

CHECKOUT = Path(__file__).parents[1]
H100_BYTES = 80_000_000_000


def make_target(**changes) -> Target:
    fields = {"version": 1, "name": "t", "hardware": "local-cpu", "input_length": 100, "output_length": 28, "batch_sizes": (1, 8)}
    return Target(**{**fields, **changes})


@pytest.fixture
def shape(micro_parent_folder):
    return to_puzzle_dag_config(AutoConfig.from_pretrained(micro_parent_folder))


def shipped(profile: str):
    settings = read_profile(CHECKOUT / "conf", profile)
    return settings, read_parent_shape(settings.parent, CHECKOUT)


def test_one_gpus_share_adds_up(shape):
    """Split matrices sum up to the whole; what every GPU holds in full is counted on each."""
    for name in ("kv4", "kv2", "linear"):
        whole, share = size_variant(shape, "attention", name), size_variant(shape, "attention", name, 2)
        assert share.matrix_parameters * 2 == whole.matrix_parameters and share.kv_values_per_token * 2 == whole.kv_values_per_token
        assert share.other_parameters == whole.other_parameters == shape.hidden_size
    whole, share = size_variant(shape, "ffn", "w96"), size_variant(shape, "ffn", "w96", 2)
    assert share.matrix_parameters * 2 == whole.matrix_parameters
    table = -(-shape.vocab_size // 2) * shape.hidden_size
    assert size_variant(shape, "constant", "engine", 2).parameters == 2 * table + shape.hidden_size


def test_kv_heads_fewer_than_gpus_are_on_each(shape):
    """4 query heads over 4 GPUs: each holds the one KV head, so four times the heads are kept in all."""
    one, share = size_variant(shape, "attention", "kv1"), size_variant(shape, "attention", "kv1", 4)
    assert share.kv_values_per_token == one.kv_values_per_token == 2 * shape.head_dim
    q_size = shape.num_attention_heads * shape.head_dim // 4
    assert share.matrix_parameters == 2 * shape.hidden_size * (q_size + shape.head_dim)


@pytest.mark.parametrize(
    ("size", "attentions", "ffns", "message"),
    [
        (3, ["kv4"], ["w128"], r"`tensor_parallel_size` is 3, which doesn't divide the parent's 4 attention heads"),
        (4, ["kv4", "kv3"], ["w128"], r"kv3 has 3 KV heads, which 4 GPUs neither share nor repeat"),
        (4, ["kv4", "kv1", "linear"], ["w128", "w66"], r"FFN w66 splits 66 channels.*width_multiple"),
    ],
)
def test_what_does_not_split_is_refused(shape, size, attentions, ffns, message):
    target = make_target(tensor_parallel_size=size)
    with pytest.raises(TensorParallelError, match=message):
        check_tensor_parallel(shape, target, [Attention.parse(a) for a in attentions], [FFN.parse(f) for f in ffns])


@pytest.mark.parametrize("profile", ["llama-3.1-8b-h100", "llama-3.1-70b-h100"])
def test_shipped_gpu_targets_split_and_fit_their_gpus(profile):
    """Every probe of every H100 target: its variants split over the GPUs, and its largest batch fits into 80 GB."""
    settings, shape = shipped(profile)
    parent = Block(Attention("gqa", shape.num_key_value_heads), FFN("swiglu", shape.intermediate_size))
    attentions, ffns = variant_union(resolve_spaces(settings, shape))
    for name in settings.targets:
        target = read_target(CHECKOUT / "conf", name)
        check_tensor_parallel(shape, target, attentions, ffns)
        probes = plan_target(shape, parent, target, attentions, ffns)
        check_memory(shape, [p.architecture for p in probes], target, Hardware("gpu", "NVIDIA H100 80GB HBM3", 0, H100_BYTES, 4))


def test_the_published_parameters_come_out():
    """8.03 and 70.6 thousand million, as the model cards say."""
    for profile, billions in (("llama-3.1-8b-h100", 8.03), ("llama-3.1-70b-h100", 70.55)):
        _, shape = shipped(profile)
        block = Block(Attention("gqa", shape.num_key_value_heads), FFN("swiglu", shape.intermediate_size))
        assert size_model(shape, (block,) * shape.num_hidden_layers).parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_largest_batch_by_hand(shape):
    """One layer with 4 KV heads of 32 in bf16: 512 bytes a token, 65,536 a request of 128 tokens."""
    architecture, target = (Block.parse("kv4/w128"),), make_target()
    weights = count_weight_bytes(size_model(shape, architecture), NumberTypes.of(target))
    assert count_fitting_batch(shape, architecture, target, weights + 8 * 65_536) == 8
    assert count_fitting_batch(shape, architecture, target, weights + 8 * 65_536 - 1) == 7
    assert count_fitting_batch(shape, architecture, target, weights - 1) == 0
    assert count_fitting_batch(shape, architecture, make_target(kv_cache_dtype="fp8"), weights + 8 * 65_536) == 16
    assert count_fitting_batch(shape, (Block.parse("linear/w128"),), target, weights) == 8
    assert count_fitting_batch(shape, architecture, target, weights + 8 * 65_536 + 999, engine_bytes=1000) == 7


def test_a_batch_that_memory_cannot_hold_is_refused_before_anything_runs(shape, tmp_path, monkeypatch):
    architecture, target = (Block.parse("kv4/w128"),) * 2, make_target(batch_sizes=(1, 64))
    weights = count_weight_bytes(size_model(shape, architecture), NumberTypes.of(target))
    small = Hardware("cpu", "a small machine", 1, weights + 20 * 2 * 65_536)
    monkeypatch.setattr("puzzle_dag.costs.measure.detect_hardware", lambda: small)
    monkeypatch.setattr("puzzle_dag.costs.measure.run_engines", lambda *_, **__: pytest.fail("an engine was started"))
    with pytest.raises(BatchTooLargeError, match=r"'t'.*`batch_sizes`: 64 requests of 128 tokens.*a small machine; at most 20 fit"):
        measure_models(shape, [architecture], target, ArtifactStore(tmp_path / "store"))
    with pytest.raises(BatchTooLargeError, match="its weights alone"):
        check_memory(shape, [architecture], target, dataclasses.replace(small, memory_bytes=1000))


def test_more_gpus_than_there_are_is_refused():
    target = make_target(hardware="h100", tensor_parallel_size=4)
    check_hardware(target, Hardware("gpu", "NVIDIA H100", 0, H100_BYTES, 8))
    with pytest.raises(HardwareMismatchError, match=r"`tensor_parallel_size` is 4, but this machine has 2 x NVIDIA H100"):
        check_hardware(target, Hardware("gpu", "NVIDIA H100", 0, H100_BYTES, 2))


def test_memory_of_this_machine_is_known():
    assert 2**28 < hardware.read_memory_bytes() < 2**50
    assert hardware.detect_hardware().memory_bytes > 2**28


def test_the_cache_is_sized_by_each_layers_own_heads(shape):
    workload = Workload(input_length=240, output_length=16, batch_sizes=(4, 16), repeats=2)
    layers = ("kv4/w128", "kv1/noop", "linear/w128", "noop/w128")
    config = serving_config(shape, tuple(Block.parse(n) for n in layers))
    num_tokens = (16 * 3 + 8) * 128
    plain = EngineSettings()
    assert size_kv_cache(config, workload, plain) == num_tokens * 2 * (4 + 1) * 32 * 2
    assert size_kv_cache(config, workload, EngineSettings(tensor_parallel_size=2)) == num_tokens * 2 * (2 + 1) * 32 * 2
    assert size_kv_cache(config, workload, EngineSettings(dtype="float32")) == num_tokens * 2 * (4 + 1) * 32 * 4
    assert size_kv_cache(config, workload, EngineSettings(dtype="float32", kv_cache_dtype="fp8")) == num_tokens * 2 * (4 + 1) * 32
    windows = {**config, "sliding_window": 64, "layer_types": ["sliding_attention"] * 4}
    assert size_kv_cache(windows, workload, plain) == size_kv_cache(config, workload, plain), "all alike, each by its own heads"
    mixed = {**windows, "layer_types": ["full_attention", *["sliding_attention"] * 3]}
    assert size_kv_cache(mixed, workload, plain) == num_tokens * 2 * 4 * 4 * 32 * 2
    assert count_capacity_tokens(27, [128], 128) == 27 * 128 and count_capacity_tokens(48, [128] * 4, 128) == 12 * 128
    assert count_capacity_tokens(48, [128, 256, 512], 128) == 27 * 128, "48 blocks, seven in 512 tokens"
    assert count_capacity_tokens(48, [], 128) == 0
    assert size_kv_cache(serving_config(shape, (Block.parse("linear/w128"),)), workload, plain) > 0


def make_result(**changes) -> EngineResult:
    fields = {
        "name": "p", "times": (BatchTimes(1, (1.0,), (2.0,)),), "weight_bytes": None, "kv_bytes_per_token": 512, "kv_capacity_tokens": 1280,
        "peak_rss_bytes": 10**9, "start_s": 0.0, "engine_version": "vllm 0.1", "hardware": "h", "num_threads": 1,
        "kv_cache_bytes": 10 * 128 * 512 + 100, "kv_block_tokens": 128,
    }  # fmt: skip
    return EngineResult(**{**fields, **changes})


def test_capacity_that_differs_from_the_arithmetic_is_told(shape):
    architecture, target = (Block.parse("kv4/w128"),), make_target(input_length=100, output_length=100)
    (check,) = check_capacity(shape, target, [Measurement(architecture, make_result())])
    assert check.agrees and check.predicted_tokens == 1280 and check.predicted_batch == check.reported_batch == 5
    for changes in ({"kv_capacity_tokens": 640}, {"kv_bytes_per_token": 1024}):
        (check,) = check_capacity(shape, target, [Measurement(architecture, make_result(**changes))])
        assert not check.agrees
    assert check_capacity(shape, target, [Measurement(architecture, make_result(kv_cache_bytes=None))]) == ()
    assert count_largest_batch(1280, 129, 128) == 5


def test_two_gpus_report_the_sum_and_the_check_is_of_one(shape):
    """The engine's bytes a token are summed over its two workers; one KV head is on both."""
    architecture, target = (Block.parse("kv1/w128"),), make_target(tensor_parallel_size=2)
    each = count_kv_bytes_per_token(size_model(shape, architecture, 2), NumberTypes.of(target))
    result = make_result(kv_bytes_per_token=2 * each, kv_cache_bytes=10 * 128 * each)
    (check,) = check_capacity(shape, target, [Measurement(architecture, result)])
    assert each == 2 * 32 * 2 and check.agrees
