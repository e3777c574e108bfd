"""The probe plan: larger sets plan all probes of smaller ones, and the models always tell the unknowns apart."""

import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.costs.probes import (
    _plan_mixture,
    count_unlike,
    count_variants,
    list_unknowns,
    name_architecture,
    plan_probes,
    probe_config,
    serving_config,
)
from puzzle_dag.model.checkpoint import architecture_of
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig

PARENT = Block.parse("kv8/w768")
ATTENTIONS = tuple(Attention.parse(n) for n in ("kv8", "kv4", "kv2", "kv1", "linear", "noop"))
FFNS = tuple(FFN.parse(n) for n in ("w768", "w576", "w384", "w192", "w96", "linear", "noop"))

attention_sets = st.sets(st.sampled_from(ATTENTIONS))
ffn_sets = st.sets(st.sampled_from(FFNS))


def keys(attentions: set[Attention], ffns: set[FFN], num_layers: int = 6, probes_per_variant: int = 1) -> set[tuple[str, ...]]:
    probes = plan_probes(PARENT, attentions, ffns, num_layers=num_layers, probes_per_variant=probes_per_variant)
    return {name_architecture(p.architecture) for p in probes}


@settings(max_examples=60, deadline=None)
@given(attention_sets, ffn_sets, attention_sets, ffn_sets, st.integers(1, 40), st.integers(1, 3))
def test_larger_set_plans_every_probe_of_the_smaller(a1, f1, a2, f2, num_layers, rounds):
    assert keys(a1, f1, num_layers, rounds) <= keys(a1 | a2, f1 | f2, num_layers, rounds)


def test_one_new_width_adds_only_its_own_probes():
    before = keys(set(ATTENTIONS), set(FFNS[:3]))
    after = keys(set(ATTENTIONS), set(FFNS[:4]))
    added = after - before
    assert len(added) == 1
    assert all(any("w192" in block for block in blocks) for blocks in added)


def test_more_probes_a_variant_keep_the_first():
    assert keys(set(ATTENTIONS), set(FFNS), 12, 1) < keys(set(ATTENTIONS), set(FFNS), 12, 3)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 6, 32, 80])
@pytest.mark.parametrize("num_variants", [0, 1, 4])
def test_models_tell_all_unknowns_and_the_constant_apart(num_layers, num_variants):
    probes = plan_probes(PARENT, ATTENTIONS[: 1 + num_variants], FFNS[: 1 + num_variants], num_layers=num_layers)
    architectures = [p.architecture for p in probes]
    counts = count_variants(architectures, list_unknowns(architectures))
    full = np.hstack([counts, np.ones((len(counts), 1))])
    assert np.linalg.matrix_rank(full) == full.shape[1] == 2 + 2 * num_variants + 1
    assert np.linalg.cond(full / np.linalg.norm(full, axis=0)) < 60


def mixtures(attentions, ffns, num_layers=6, count=4):
    probes = plan_probes(PARENT, attentions, ffns, num_layers=num_layers, mixtures=count)
    return [p.architecture for p in probes if p.name.startswith("mixture/")]


@pytest.mark.parametrize(("num_layers", "depth"), [(2, 4), (6, 6), (80, 16)])
def test_mixtures_are_of_unlike_layers_at_the_depth_of_children(num_layers, depth):
    planned = mixtures(ATTENTIONS, FFNS, num_layers)
    assert len(set(planned)) == 4 and {len(a) for a in planned} == {depth}
    assert all(a[0].attention == PARENT.attention for a in planned), "the engine needs real attention"
    assert (count_unlike(planned, PARENT) >= 2).all()
    assert mixtures(reversed(ATTENTIONS), reversed(FFNS), num_layers) == planned, "the order in which variants are named is no matter"


@settings(max_examples=60, deadline=None)
@given(attention_sets, ffn_sets, st.sampled_from(FFNS))
def test_a_new_variant_changes_only_the_places_of_mixtures_that_it_takes(attentions, ffns, new):
    before, after = (dict(enumerate(_drawn_mixtures(attentions, s))) for s in (ffns, ffns | {new}))
    for index, architecture in before.items():
        for old_block, new_block in zip(architecture, after[index], strict=True):
            assert new_block.attention == old_block.attention
            assert new_block.ffn in (old_block.ffn, new)


def _drawn_mixtures(attentions, ffns):
    """Mixtures, those included that plan_probes leaves out because they came out too much alike."""
    return [_plan_mixture(PARENT, attentions, ffns, 6, index).architecture for index in range(4)]


def test_every_variant_is_as_likely_anywhere():
    drawn = [_plan_mixture(PARENT, ATTENTIONS, FFNS, 16, index).architecture for index in range(300)]
    for place, variants in (("attention", ATTENTIONS), ("ffn", FFNS)):
        counts = collections.Counter(getattr(block, place) for architecture in drawn for block in architecture[1:])
        expected = 300 * 15 / len(variants)
        assert all(abs(counts[v] - expected) < 6 * expected**0.5 for v in variants), counts


def test_a_space_without_two_variants_has_no_mixture():
    assert mixtures([Attention("noop")], [FFN("noop"), FFN.parse("w384")]) == []


def test_fused_ffns_stand_in_no_mixture():
    assert all(b.ffn.name != "w1536" for a in mixtures(ATTENTIONS, [*FFNS, FFN.parse("w1536")]) for b in a)


def test_unlike_pieces_match_a_count_by_hand():
    blocks = ["kv8/w768", "kv4/w768", "kv4/noop", "noop/linear", "kv8/w768"]
    alike = tuple(Block.parse(b) for b in (*blocks[:3], "noop/w768"))
    assert count_unlike([tuple(map(Block.parse, blocks)), alike, (PARENT,) * 3], PARENT).tolist() == [3, 0, 0]


def test_noops_alone_add_no_probe():
    assert keys({Attention("noop")}, {FFN("noop")}) == keys(set(), set())


def test_every_probe_has_real_attention_and_two_depths_occur():
    probes = plan_probes(PARENT, ATTENTIONS, FFNS, num_layers=6)
    assert all(any(b.attention.kind == "gqa" for b in p.architecture) for p in probes)
    assert len({len(p.architecture) for p in probes}) >= 2
    assert max(len(p.architecture) for p in probes) == 12
    assert len({p.name for p in probes}) == len(probes) == 4 + 4 + 5


def test_counts_match_a_count_by_hand():
    architecture = tuple(Block.parse(b) for b in ("kv8/w768", "kv8/noop", "linear/linear", "noop/w96"))
    unknowns = list_unknowns([architecture])
    assert unknowns == (("attention", "kv8"), ("attention", "linear"), ("ffn", "linear"), ("ffn", "w768"), ("ffn", "w96"))
    assert count_variants([architecture], unknowns).tolist() == [[2, 1, 1, 1, 1]]


def test_configuration_of_a_probe_has_its_depth_and_blocks():
    kinds = ["full_attention", "sliding_attention"]
    shape = PuzzleDagConfig(
        hidden_size=64, intermediate_size=768, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, head_dim=32,
        vocab_size=600, sliding_window=8, layer_types=kinds,
    )  # fmt: skip
    for probe in plan_probes(PARENT, ATTENTIONS, FFNS, num_layers=5):
        config = probe_config(shape, probe.architecture)
        assert architecture_of(config) == probe.architecture
        assert config.layer_types == list(itertools.islice(itertools.cycle(kinds), len(probe.architecture)))
        written = json.loads(json.dumps(serving_config(shape, probe.architecture)))
        assert written["architectures"] == ["PuzzleDagForCausalLM"] and written["model_type"] == "puzzle_dag"
        assert architecture_of(PuzzleDagConfig(**{k: v for k, v in written.items() if k != "model_type"})) == probe.architecture
