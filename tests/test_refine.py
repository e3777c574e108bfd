"""Scores in context and the refinement of solutions, against whole children in plain code."""

import math
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_project import CHECKOUT
from score_instances import PARENT_BLOCK, SPACE, Cache, make_parent, make_pieces
from search_instances import PARENT, SECONDS, make_scenario, simple_costs

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.children.assemble import build_child
from puzzle_dag.config import Profile
from puzzle_dag.model.parent import Parent
from puzzle_dag.piece_costs import PieceCost, PieceCosts
from puzzle_dag.search import context as context_module
from puzzle_dag.search import refine as refine_module
from puzzle_dag.search.candidates import Candidates
from puzzle_dag.search.context import Context, measure_in_context, score_in_context
from puzzle_dag.search.divergence import ScoreSums
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.layer_runner import ScoreError
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.refine import Losses, refine_solution
from puzzle_dag.search.score import BlockScore, score_layer
from puzzle_dag.search.solve import solve_candidates, solve_scenario
from puzzle_dag.store import ArtifactStore

NUM_LAYERS = 3
CHILD = tuple(Block.parse(name) for name in ("kv2/w32", "linear/w96", "kv4/noop"))
LIGHT = {"parameters": {"at_most": 0.55, "relative_to": "parent"}}


@pytest.fixture(scope="module", params=["llama", "sliding"])
def parent(request: pytest.FixtureRequest) -> Parent:
    return make_parent(sliding=request.param == "sliding")


@pytest.fixture(scope="module")
def context(parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Context:
    rows = torch.randint(0, 61, (6, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = parent.model.model(input_ids=rows, output_hidden_states=True).hidden_states
    folder = tmp_path_factory.mktemp("library")
    pieces = [make_pieces(parent, layer, folder / str(layer), seed=layer) for layer in range(NUM_LAYERS)]
    return Context(parent, [SPACE] * NUM_LAYERS, pieces, Cache(list(states), rows), "float32")


def plain_losses(context: Context, architecture: Architecture) -> Losses:
    """Assemble the child and compare all its logits with the parent's, in float64."""
    child, tokens = build_child(context.parent, architecture, context.pieces), context.cache.tokens("score")
    with torch.no_grad():
        log_p, log_q = (model(input_ids=tokens).logits.double().log_softmax(-1) for model in (context.parent.model, child))
    loss = torch.nn.functional.nll_loss(log_q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
    differs = (log_p.argmax(-1) != log_q.argmax(-1)).double().mean().item()
    return Losses((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), loss, differs)


def is_close(score: BlockScore, losses: Losses) -> bool:
    found = (score.kl, score.lm_loss, 1 - score.top1_agreement)
    expected = (losses.kl, losses.lm_loss, losses.top1_loss)
    return all(a == pytest.approx(b, rel=2e-4, abs=2e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows_per_batch", [1, 64])
def test_every_exchange_equals_a_whole_child_in_plain_code(context: Context, rows_per_batch: int, tmp_path: Path) -> None:
    own = replace(context, rows_per_batch=rows_per_batch)
    scores = score_in_context(own, CHILD, ArtifactStore(tmp_path))
    assert [[s.block for s in layer] for layer in scores] == [[b.name for b in SPACE.blocks]] * NUM_LAYERS
    for layer, block in product(range(NUM_LAYERS), SPACE.blocks):
        exchanged = (*CHILD[:layer], block, *CHILD[layer + 1 :])
        assert is_close(scores[layer][SPACE.blocks.index(block)], plain_losses(context, exchanged)), (layer, block.name)


def test_a_child_is_measured_as_its_own_blocks_are_scored(context: Context, tmp_path: Path) -> None:
    measured, expected = Losses.of(measure_in_context(context, CHILD)), plain_losses(context, CHILD)
    assert asdict(measured) == pytest.approx(asdict(expected), rel=1e-4)
    nothing = measure_in_context(context, (PARENT_BLOCK,) * NUM_LAYERS).means()
    assert nothing[0] == pytest.approx(0.0, abs=1e-6) and nothing[2] == 1.0
    with pytest.raises(ValueError, match="2 layers given, the parent has 3"):
        measure_in_context(context, CHILD[:2])


def test_in_the_parent_itself_scores_are_those_of_blocks_alone(context: Context, tmp_path: Path) -> None:
    scores = score_in_context(context, (PARENT_BLOCK,) * NUM_LAYERS, ArtifactStore(tmp_path / "a"))
    alone = score_layer(
        context.parent,
        1,
        SPACE,
        context.pieces[1],
        context.cache,
        ArtifactStore(tmp_path / "b"),
        activations_digest="x",
        compute_dtype="float32",
    )
    for found, expected in zip(scores[1], alone, strict=True):
        assert (found.block, found.digest) == (expected.block, expected.digest)
        assert found.kl == pytest.approx(expected.kl, rel=1e-4, abs=1e-6) and found.lm_loss == pytest.approx(expected.lm_loss, rel=1e-5)


def test_a_killed_run_goes_on_with_the_layer_that_is_missing(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real, scored = ArtifactStore(tmp_path), context_module.score_pairs, []

    def dies(parent: Parent, runner: object, layer: int, *args: object, **options: object) -> object:
        if layer == 2 and 2 not in scored:
            scored.append(layer)
            raise KeyboardInterrupt
        scored.append(layer)
        return real(parent, runner, layer, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(context_module, "score_pairs", dies)
    with pytest.raises(KeyboardInterrupt):
        score_in_context(context, CHILD, store)
    whole = score_in_context(context, CHILD, store)
    assert scored == [0, 1, 2, 2] and score_in_context(context, CHILD, store) == whole and len(scored) == 4
    assert score_in_context(context, CHILD, ArtifactStore(tmp_path / "other")) == whole
    score_in_context(context, CHILD, store, rescore=True)
    assert scored[-3:] == [0, 1, 2]


def test_fewer_tokens_are_the_first_ones(context: Context, tmp_path: Path) -> None:
    """As many as the profile says; what was scored on others is kept apart."""
    few, cache, store = replace(context, num_rows=2), context.cache, ArtifactStore(tmp_path)
    whole, part = score_in_context(context, CHILD, store), score_in_context(few, CHILD, store)
    alone = Cache([states[:2] for states in cache.states], cache.tokens("score")[:2])  # type: ignore[attr-defined]
    expected = score_in_context(replace(context, cache=alone), CHILD, ArtifactStore(tmp_path / "other"))
    assert part == expected != whole and part[0][0].num_tokens == 26
    assert measure_in_context(few, CHILD).num_tokens == 26


@pytest.fixture(scope="module")
def costs() -> dict[str, PieceCosts]:
    """Only sizes count here."""
    zero = {1: {"prefill": 1e-3, "decode": 1e-3}}
    attentions, ffns = {"kv4": 16384, "kv2": 12288, "linear": 4096, "noop": 0}, {"w96": 18432, "w32": 6144, "linear": 4096, "noop": 0}
    sizes = {"attention": attentions, "ffn": ffns}
    pieces = {(place, name): PieceCost(n, 2 * n, 0, zero) for place, own in sizes.items() for name, n in own.items()}
    constant = PieceCost(0, 0, 0, zero)
    return {"t": PieceCosts("t", 12, 4, (1,), PieceCosts.same_in_every_layer(pieces, num_layers=NUM_LAYERS), constant, "d")}  # type: ignore[arg-type]


def scores_alone(context: Context, folder: Path) -> list[list[BlockScore]]:
    return score_in_context(context, (PARENT_BLOCK,) * NUM_LAYERS, ArtifactStore(folder))


def misjudged(context: Context, folder: Path) -> list[list[BlockScore]]:
    """Scores that say the opposite of the truth, but for the parent's own blocks."""

    def turned(score: BlockScore) -> BlockScore:
        return replace(score, kl=10.0 - score.kl, lm_loss=20.0 - score.lm_loss, top1_agreement=1.0 - score.top1_agreement)

    return [[s if s.block == PARENT_BLOCK.name else turned(s) for s in layer] for layer in scores_alone(context, folder)]


@pytest.mark.parametrize("objective", ["kl", "lm_loss", {"kl": 1.0, "top1_loss": 0.5}])
def test_a_refined_child_is_as_measured_and_no_single_exchange_betters_it(
    context: Context, costs: dict[str, PieceCosts], objective: object, tmp_path: Path
) -> None:
    """It begins with what scores that say the opposite of the truth lead to."""
    scenario, table = make_scenario(LIGHT, objective={"minimize": objective}), misjudged(context, tmp_path)
    first = solve_scenario(table, costs, scenario, PARENT_BLOCK)
    refined = refine_solution(first, table, costs, scenario, context, ArtifactStore(tmp_path), num_rounds=12)
    parent_loss = plain_losses(context, (PARENT_BLOCK,) * NUM_LAYERS).lm_loss

    def loss(architecture: Architecture) -> float:
        found = plain_losses(context, architecture)
        values = {"kl": found.kl, "lm_loss": found.lm_loss - parent_loss, "top1_loss": found.top1_loss}
        return sum(weight * values[name] for name, weight in scenario.objective.weights.items())

    def num_parameters(architecture: Architecture) -> float:
        return sum(costs["t"].of_block(i, b)[p].parameters for i, b in enumerate(architecture) for p in (0, 1))

    assert all(0 < step.num_changed <= step.radius for step in refined.steps[1:])
    assert refined.losses[0] == pytest.approx(loss(first.architecture), rel=1e-3)
    assert list(refined.losses) == sorted(refined.losses, reverse=True) and len(refined.losses) > 1
    found, best = refined.solution, refined.solution.architecture
    assert refined.losses[-1] == pytest.approx(loss(best), rel=1e-3, abs=1e-5)
    assert [s.blocks for s in refined.steps if s.is_kept][-1] == " ".join(b.name for b in best)
    most = 0.55 * num_parameters((PARENT_BLOCK,) * NUM_LAYERS)
    assert num_parameters(best) <= most
    for layer, block in product(range(NUM_LAYERS), SPACE.blocks):
        other = (*best[:layer], block, *best[layer + 1 :])
        assert num_parameters(other) > most or loss(other) >= loss(best) - 1e-5, (layer, block.name)
    assert best != first.architecture and (found.status, found.bound, found.gap) == ("feasible", None, None)
    assert found.objective == refined.losses[-1] and {b.bound for b in found.batches} == {None}
    assert found.limits[0].value == num_parameters(best) <= (found.limits[0].at_most or 0)
    again = refine_solution(first, table, costs, scenario, context, ArtifactStore(tmp_path), num_rounds=12)
    assert again.steps == refined.steps and again.solution.digest == found.digest
    alone = {(s.layer, s.block): s for layer in table for s in layer}
    if objective == "kl":
        assert [c.score for c in found.choices] == [alone[c.layer, c.block].kl for c in found.choices]


def test_a_child_that_breaks_is_left_behind(
    context: Context, costs: dict[str, PieceCosts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that are not finite, of the child that is tried, are no loss that anything compares with."""
    scenario, table, real = make_scenario(LIGHT), misjudged(context, tmp_path), refine_module.measure_in_context
    first = solve_scenario(table, costs, scenario, PARENT_BLOCK)

    def breaks(of: Context, architecture: Architecture) -> ScoreSums:
        sums = real(of, architecture)
        if architecture not in ((PARENT_BLOCK,) * NUM_LAYERS, first.architecture):
            sums.kl = math.nan
        return sums

    monkeypatch.setattr(refine_module, "measure_in_context", breaks)
    refined = refine_solution(first, table, costs, scenario, context, ArtifactStore(tmp_path), num_rounds=2)
    assert len(refined.steps) > 1 and {step.measured for step in refined.steps[1:]} == {None}
    assert refined.solution.digest == first.digest and "nothing finite measured, not kept" in refined.steps[1].words
    monkeypatch.setattr(refine_module, "measure_in_context", lambda *_: ScoreSums(kl=math.inf, num_tokens=1))
    with pytest.raises(ScoreError, match="the outputs of its child are not finite"):
        refine_solution(first, table, costs, scenario, context, ArtifactStore(tmp_path), num_rounds=2)


def test_scores_of_another_library_are_refused(context: Context, costs: dict[str, PieceCosts], tmp_path: Path) -> None:
    table = scores_alone(context, tmp_path)
    solution = solve_scenario(table, costs, make_scenario(LIGHT), PARENT_BLOCK)
    other = [[replace(s, digest="another") for s in layer] if i == 1 else layer for i, layer in enumerate(table)]
    with pytest.raises(ScoreError, match=r"layer 1: the library's .* changed after it was scored"):
        refine_solution(solution, other, costs, make_scenario(LIGHT), context, ArtifactStore(tmp_path), num_rounds=1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_close_to_another_equals_brute_force(data: st.DataObject) -> None:
    """The best of all that differ from an architecture in so many layers at most."""
    table = [
        [BlockScore(i, name, data.draw(st.integers(0, 9)) / 8, 1.0, 1.0, 1, f"{i}{name}") for name in (PARENT.name, "kv1/w64", "noop/noop")]
        for i in range(3)
    ]
    costs, scenario = {"t": simple_costs(3, seconds=SECONDS)}, make_scenario({"latency_s": {"at_most": 0.8, "relative_to": "parent"}})
    start = tuple(Block.parse(data.draw(st.sampled_from(layer)).block) for layer in table)
    radius, candidates = data.draw(st.integers(1, 3)), Candidates.of(table, PARENT)
    most = 0.8 * (1 + 2 * 3 * 2)  # the constant's second, and one for each place of three layers in each of two phases
    seconds = {name: 2 * (SECONDS.get(a, 0) + SECONDS.get(f, 0)) for name in (s.block for s in table[0]) for a, f in [name.split("/")]}
    allowed = [
        sum(s.kl for s in picks)
        for picks in product(*table)
        if sum(Block.parse(s.block) != b for s, b in zip(picks, start, strict=True)) <= radius
        and 1 + sum(seconds[s.block] for s in picks) <= most + 1e-9
    ]
    if not allowed:
        with pytest.raises(InfeasibleScenarioError):
            solve_candidates(candidates.close_to(start, radius), costs, scenario)
        return
    found = solve_candidates(candidates.close_to(start, radius), costs, scenario)
    assert found.objective == pytest.approx(min(allowed), abs=1e-9)
    assert sum(a != b for a, b in zip(found.architecture, start, strict=True)) <= radius


def test_structure_holds_on_the_way(context: Context, costs: dict[str, PieceCosts], tmp_path: Path) -> None:
    scenario, table = make_scenario(LIGHT, structure={"fixed": {1: "noop/w96"}, "max_distinct": 2}), misjudged(context, tmp_path)
    first = solve_scenario(table, costs, scenario, PARENT_BLOCK)
    refined = refine_solution(first, table, costs, scenario, context, ArtifactStore(tmp_path), num_rounds=4)
    assert len(refined.losses) > 1
    for step in refined.steps:
        names = step.blocks.split()
        assert names[1] == "noop/w96" and len(set(names)) <= 2


def test_no_round_only_measures_the_child(context: Context, costs: dict[str, PieceCosts], tmp_path: Path) -> None:
    table = scores_alone(context, tmp_path)
    first = solve_scenario(table, costs, make_scenario(LIGHT), PARENT_BLOCK)
    refined = refine_solution(first, table, costs, make_scenario(LIGHT), context, ArtifactStore(tmp_path), num_rounds=0)
    assert refined.solution.choices == first.choices and len(refined.steps) == 1
    assert refined.solution.objective == refined.losses[0] == pytest.approx(plain_losses(context, first.architecture).kl, rel=1e-3)


@pytest.mark.parametrize(
    "objective",
    [
        {"maximize": "throughput", "subject_to": {"kl": {"at_most": 1.0}}},
        {"minimize": {"kl": 1.0, "skill_copy": 1.0}},
        {"minimize": "kl", "subject_to": {"lm_loss": {"at_most": 1.0}}},
    ],
)
def test_an_objective_that_is_not_measured_in_context_is_refused(
    context: Context, costs: dict[str, PieceCosts], objective: object, tmp_path: Path
) -> None:
    table = scores_alone(context, tmp_path)
    solution = solve_scenario(table, costs, make_scenario(LIGHT), PARENT_BLOCK)
    scenario = make_scenario(LIGHT, objective=objective)
    with pytest.raises(ScenarioError, match=r"objective: it can't be refined.*take `refinement` out"):
        refine_solution(solution, table, costs, scenario, context, ArtifactStore(tmp_path), num_rounds=1)


@pytest.mark.parametrize("tokens", [8, 100_000])
def test_tokens_that_blocks_were_not_scored_on_are_refused(tokens: int) -> None:
    content = yaml.safe_load((CHECKOUT / "conf" / "profiles" / "micro.yaml").read_text())
    with pytest.raises(ValueError, match=rf"refinement\.tokens is {tokens}; give at least one row .* and at most tokens\.scores"):
        Profile.model_validate({**content, "name": "micro", "refinement": {"tokens": tokens}})
