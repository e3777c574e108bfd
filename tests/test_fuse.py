"""Fused FFNs against the parallel form from its formula, the divergence from the sequential form, and the paper's dependency matrix."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_model import _norm, plain_logits
from torch import Tensor

from puzzle_dag import cli
from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.children.dependency import largest_dependency, measure_dependency, propose_runs
from puzzle_dag.children.divergence import measure_divergence
from puzzle_dag.children.fuse import (
    UnfusableRunError,
    find_runs,
    fuse_architecture,
    fuse_checkpoint,
    fuse_model,
    list_fused_layers,
)
from puzzle_dag.model.checkpoint import architecture_of, load_checkpoint, save_checkpoint
from puzzle_dag.model.fused_ffn import stack_ffns
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM

MakeChild = Callable[..., PuzzleDagForCausalLM]
# A run (layers 1 to 4) that starts under an attention and holds a layer of nothing; a second run (6, 7); a linear FFN.
_NAMES = ("noop/w64", "kv4/w128", "noop/noop", "noop/w32", "noop/w64", "kv2/linear", "noop/w48", "noop/w64")
_RUNS = [range(1, 5), range(6, 8)]


def parse(*names: str) -> Architecture:
    return tuple(Block.parse(name) for name in names)


def random_rows(model: PuzzleDagForCausalLM, *shape: int) -> Tensor:
    return torch.randint(1, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def swiglu(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The FFN of the formula on its normed input [tokens, hidden], in x's dtype."""
    normed = _norm(x, state["post_attention_layernorm.weight"], 1e-6)
    gate, up = (normed @ state[f"mlp.{n}_proj.weight"].T + state.get(f"mlp.{n}_proj.bias", 0) for n in ("gate", "up"))
    return (gate * gate.sigmoid() * up) @ state["mlp.down_proj.weight"].T + state.get("mlp.down_proj.bias", 0)


@pytest.mark.parametrize("biased", [False, True])
def test_one_wide_ffn_is_the_sum_of_all_in_float64(biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states = []
    for width in (24, 8, 40):
        state = {"post_attention_layernorm.weight": 1 + 0.3 * draw(16), "mlp.down_proj.weight": draw(16, width)}
        state |= {f"mlp.{n}_proj.weight": draw(width, 16) for n in ("gate", "up")}
        if biased:
            state |= {"mlp.gate_proj.bias": draw(width), "mlp.up_proj.bias": draw(width), "mlp.down_proj.bias": draw(16)}
        states.append(state)
    x = draw(10, 16)
    fused = stack_ffns(states)
    assert fused["mlp.gate_proj.weight"].shape == (72, 16) and fused["mlp.down_proj.weight"].shape == (16, 72)
    assert torch.equal(fused["post_attention_layernorm.weight"], torch.ones(16, dtype=torch.float64))
    torch.testing.assert_close(swiglu(x, fused), sum(swiglu(x, state) for state in states), rtol=1e-12, atol=1e-12)


def side_by_side(model: PuzzleDagForCausalLM, fused_layers: list[tuple[int, ...]], rows: Tensor) -> Tensor:
    """Return the logits of `model` in which every FFN of a run reads what the run's first FFN reads."""
    entering: dict[int, Tensor] = {}
    handles = []
    for first, *others in fused_layers:
        layer = model.model.layers[first]

        def keep(_: Any, inputs: tuple[Tensor, ...], first: int = first) -> None:
            entering[first] = inputs[0]

        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(keep))
        for index in others:
            layer = model.model.layers[index]

            def swap(_: Any, inputs: tuple[Tensor, ...], first: int = first) -> tuple[Tensor, ...]:
                return (entering[first], *inputs[1:])

            handles.append(layer.post_attention_layernorm.register_forward_pre_hook(swap))
    with torch.no_grad():
        logits: Tensor = model(rows).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_fused_model_computes_the_parallel_form(family: str, make_child: MakeChild) -> None:
    model = make_child(family, *_NAMES)
    rows = random_rows(model, 2, 20)
    fused = fuse_model(model, _RUNS)
    names = [block.name for block in architecture_of(fused.config)]
    assert names == ["noop/w64", "kv4/w224", "noop/noop", "noop/noop", "noop/noop", "kv2/linear", "noop/w112", "noop/noop"]
    assert fused.config.intermediate_size == 128  # the parent's; layer 1 is wider
    with torch.no_grad():
        got = fused(rows).logits
        sequential = model(rows).logits
    torch.testing.assert_close(got, side_by_side(model, [(1, 3, 4), (6, 7)], rows), atol=2e-5, rtol=0)
    assert (got - sequential).abs().max() > 1e-3  # which is another function than one after the other
    expected = plain_logits(rows[0], fused.state_dict(), json.loads(fused.config.to_json_string()))
    torch.testing.assert_close(got[0].double(), expected, atol=2e-5, rtol=0)


def test_fused_checkpoint_is_an_ordinary_child(make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path) -> None:
    model = make_child("qwen3", *_NAMES)
    rows = random_rows(model, 4, 20)
    save_checkpoint(model, micro_tokenizer, tmp_path / "child")
    before, after = fuse_checkpoint(tmp_path / "child", [_RUNS[0]], tmp_path / "fused")
    loaded = load_checkpoint(tmp_path / "fused")
    with torch.no_grad():
        assert torch.equal(before(rows).logits, model(rows).logits)
        assert torch.equal(loaded(rows).logits, after(rows).logits)
    cost = measure_divergence(before, loaded, rows)
    assert 1e-6 < cost.kl.mean < 1.0
    prompt = rows[:1, :9]
    cached = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    plain = prompt
    with torch.no_grad():
        for _ in range(6):
            plain = torch.cat([plain, loaded(plain, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, plain)


def test_what_can_stand_side_by_side() -> None:
    assert find_runs(parse(*_NAMES)) == tuple(_RUNS)
    assert find_runs(parse("kv4/w8", "kv4/w8", "linear/w8", "noop/linear", "noop/w8")) == ()
    assert list_fused_layers(parse("kv4/noop", "noop/w8", "noop/noop", "noop/w8"), range(4)) == (1, 3)
    assert fuse_architecture(parse("kv4/w8", "noop/w16"), [range(2)]) == parse("kv4/w24", "noop/noop")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([range(1, 9)], "layers 1-8 don't exist; the model has 0 to 7"),
        ([range(3, 7)], r"layer 5 has attention \(kv2\) after the FFN of layer 4; end the run at layer 4 or start it at layer 5"),
        ([range(5, 8)], "the FFN of layer 5 is a linear map"),
        ([range(2, 4)], "layers 2-3 hold 1 FFNs"),
        ([range(1, 4), range(3, 5)], "layer 3 is in another run"),
    ],
)
def test_a_run_that_cannot_be_fused_names_its_layer(runs: list[range], message: str) -> None:
    with pytest.raises(UnfusableRunError, match=message):
        fuse_architecture(parse(*_NAMES), runs)


def test_dependency_is_that_of_models_without_one_ffn(make_child: MakeChild) -> None:
    """Against the contributions read off the boundaries of models rebuilt with the FFN left out."""
    names = ("kv4/w128", "noop/w32", "noop/linear", "noop/w64")
    model = make_child("llama", *names)
    rows = random_rows(model, 3, 12)
    dependency = measure_dependency(model, rows, rows_per_batch=2)

    def contributions(without: int | None) -> dict[int, Tensor]:
        kept = [n if i != without else n.split("/")[0] + "/noop" for i, n in enumerate(names)]
        other = make_child("llama", *kept)
        other.load_state_dict({n: t for n, t in model.state_dict().items() if n in other.state_dict()})
        with torch.no_grad():
            states = other(rows, output_hidden_states=True).hidden_states
        return {j: states[j + 1] - states[j] for j in range(1, 4)}  # layers without attention: all they add is their FFN's

    whole = contributions(None)
    for i in range(4):
        dropped = contributions(i)
        for j in range(1, 4):
            expected = float((1 - torch.cosine_similarity(whole[j], dropped[j], dim=-1)).mean()) if j > i else 0.0
            assert float(dependency[i, j]) == pytest.approx(expected, abs=2e-5)
    assert float(dependency[0, 1]) > 1e-3
    assert not dependency.tril().any()


def test_proposed_runs_keep_below_the_bound() -> None:
    architecture = parse("noop/w8", "noop/w8", "noop/noop", "noop/w8", "noop/w8", "kv1/w8", "noop/w8")
    dependency = torch.zeros(7, 7)
    dependency[0, 3], dependency[3, 4], dependency[5, 6] = 0.5, 0.02, 0.3
    assert propose_runs(architecture, dependency, 0.1) == (range(2), range(3, 5))
    assert propose_runs(architecture, dependency, 0.4) == (range(2), range(3, 5), range(5, 7))
    assert propose_runs(architecture, dependency, 0.5) == (range(5), range(5, 7))
    assert largest_dependency(dependency, (0, 1, 3)) == 0.5
    with pytest.raises(ValueError, match="2 layers"):
        propose_runs(architecture[:2], dependency, 0.1)


def test_command(make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(make_child("llama", *_NAMES), micro_tokenizer, tmp_path / "child")
    child, out, text = str(tmp_path / "child"), str(tmp_path / "fused"), tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    measure = ["--text", str(text), "--num-rows", "3", "--row-length", "16"]

    assert cli.main(["fuse", child, *measure, "--max-dependency", "2"]) == 0
    said = capsys.readouterr().out
    assert "layers 1-4: largest dependency" in said and "layers 6-7: largest" in said
    assert said.rstrip().endswith("dependency at most 2: --layers 1-4 --layers 6-7")

    assert cli.main(["fuse", child, "--layers", "1-4", "--layers", "6-7", "--out", out, *measure]) == 0
    said = capsys.readouterr().out
    assert "layers 1, 3, 4: FFNs of 128 + 32 + 64 channels are one of 224, in layer 1" in said
    assert (match := re.search(r"KL from the child as it was: (\S+) ± \S+ nats a token.*48 tokens", said)) and float(match[1]) > 0

    for arguments, message in [
        (["--layers", "1-4", "--out", out], "exists; name a folder that doesn't"),
        (["--layers", "4-5", "--out", f"{out}2"], "layer 5 has attention"),
        (["--layers", "1-4"], "--out: not given"),
        (["--out", f"{out}2"], "--layers: not given"),
        (["--text", str(text), "--row-length", "100000"], "less than one row of 100000"),
    ]:
        assert cli.main(["fuse", child, *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["fuse", child, "--layers", "4-1", "--out", f"{out}2"])
    assert "'4-1' is not FIRST-LAST" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child", "fused", "text.txt"]
