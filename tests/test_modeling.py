"""Children of every kind against a plain float64 forward pass, and generation with a KV cache against generation without one."""

import json
from collections.abc import Callable

import pytest
import torch
from plain_model import plain_logits

from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM

_MIXED = ("noop/w64", "kv4/w128", "linear/noop", "kv2/linear", "noop/noop", "kv1/w32")
_CHILDREN = [
    ("llama", _MIXED),
    ("mistral", _MIXED),
    ("qwen2", _MIXED),
    ("qwen3", _MIXED),
    ("llama", ("noop/w64", "linear/w32")),
    ("qwen3", ("noop/noop", "noop/noop")),
]
MakeChild = Callable[..., PuzzleDagForCausalLM]


def _tokens(model: PuzzleDagForCausalLM, *shape: int) -> torch.Tensor:
    return torch.randint(1, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def _greedy_without_cache(model: PuzzleDagForCausalLM, tokens: torch.Tensor, num_new: int) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(num_new):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize(("family", "names"), _CHILDREN)
def test_logits_are_those_of_the_plain_formulas(family: str, names: tuple[str, ...], make_child: MakeChild) -> None:
    model = make_child(family, *names)
    tokens = _tokens(model, 2, 20)
    config = json.loads(model.config.to_json_string())
    with torch.no_grad():
        got = model(tokens).logits
    for row in range(2):
        expected = plain_logits(tokens[row], model.state_dict(), config)
        assert expected.std() > 0.1
        torch.testing.assert_close(got[row].double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("family", "names"), _CHILDREN)
def test_generation_with_a_cache_equals_generation_without(family: str, names: tuple[str, ...], make_child: MakeChild) -> None:
    model = make_child(family, *names)
    prompt = _tokens(model, 2, 13)
    expected = _greedy_without_cache(model, prompt, 12)
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    # min_new_tokens forbids the end-of-text token, which the loop above may not draw either.
    assert model.config.eos_token_id not in expected[:, 13:]
    assert torch.equal(got, expected)


def test_only_layers_with_attention_keep_keys_and_values(make_child: MakeChild) -> None:
    model = make_child("llama", *_MIXED)
    with torch.no_grad():
        cache = model(_tokens(model, 2, 7), use_cache=True).past_key_values
    assert cache.get_seq_length() == 7
    assert [tuple(layer.keys.shape[1:]) for layer in cache.layers] == [(1, 7, 1), (4, 7, 32), (1, 7, 1), (2, 7, 32), (1, 7, 1), (1, 7, 32)]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_left_padding_does_not_change_what_is_generated(family: str, make_child: MakeChild) -> None:
    model = make_child(family, *_MIXED)
    long, short = _tokens(model, 1, 13), _tokens(model, 1, 9)
    padded = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    got = model.generate(padded, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(got[0], _greedy_without_cache(model, long, 8)[0])
    assert torch.equal(got[1, 4:], _greedy_without_cache(model, short, 8)[0])


def test_a_chunked_prefill_gives_the_logits_of_one_pass(make_child: MakeChild) -> None:
    model = make_child("mistral", *_MIXED)
    tokens = _tokens(model, 2, 20)
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :11], use_cache=True)
        second = model(tokens[:, 11:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, atol=1e-5, rtol=0)


def test_loss_is_the_next_token_cross_entropy(make_child: MakeChild) -> None:
    model = make_child("llama", *_MIXED)
    tokens = _tokens(model, 2, 10)
    with torch.no_grad():
        out = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_hidden_states_are_the_layer_boundaries(make_child: MakeChild) -> None:
    model = make_child("llama", "kv4/w128", "noop/noop", "linear/w32")
    tokens = _tokens(model, 1, 6)
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
        final = model.lm_head(model.model.norm(states[-1]))
        assert torch.equal(final, model(tokens).logits)
    assert len(states) == 4
    assert torch.equal(states[0], model.model.embed_tokens(tokens))
    assert torch.equal(states[1], states[2])
