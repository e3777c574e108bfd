import math

import numpy as np
import pytest

from puzzle_dag.children.evaluate import TaskResultError, make_result
from puzzle_dag.children.retention import UnpairedResultsError, mean_retention, paired_ratio, perplexities, retention


def draw_pair(num_items: int, seed: int) -> tuple[list[float], list[float]]:
    """A parent that is right 90 % of the time and a child that mostly fails where the parent fails."""
    rng = np.random.default_rng(seed)
    parent = (rng.random(num_items) < 0.9).astype(float)
    child = np.where(rng.random(num_items) < 0.93, parent, 1 - parent)
    return child.tolist(), parent.tolist()


def test_standard_error_agrees_with_the_paired_bootstrap() -> None:
    child, parent = draw_pair(500, seed=1)
    c, p = np.array(child), np.array(parent)
    rng = np.random.default_rng(2)
    for offset in (0.0, 0.25):
        found = paired_ratio(child, parent, offset)
        assert found is not None
        draws = rng.integers(0, 500, size=(4000, 500))
        ratios = (c[draws].mean(1) - offset) / (p[draws].mean(1) - offset)
        assert found[0] == pytest.approx((c.mean() - offset) / (p.mean() - offset))
        assert found[1] == pytest.approx(ratios.std(), rel=0.06)


def test_standard_error_covers_the_truth_as_often_as_it_says() -> None:
    truth = (0.9 * 0.93 + 0.1 * 0.07 - 0.25) / (0.9 - 0.25)
    covered = 0
    for seed in range(300):
        found = paired_ratio(*draw_pair(500, seed), 0.25)
        assert found is not None
        covered += abs(found[0] - truth) < 1.96 * found[1]
    assert 0.91 < covered / 300 < 0.985


def test_pairing_makes_the_error_smaller_than_that_of_independent_runs() -> None:
    child, parent = draw_pair(500, seed=3)
    found = paired_ratio(child, parent, 0.25)
    assert found is not None
    c, p = np.array(child), np.array(parent)
    gain = p.mean() - 0.25
    independent = math.sqrt((c.var(ddof=1) + found[0] ** 2 * p.var(ddof=1)) / 500) / gain
    assert found[1] < 0.75 * independent


def test_identical_answers_retain_everything_without_error() -> None:
    _, parent = draw_pair(100, seed=4)
    assert paired_ratio(parent, parent, 0.25) == (1.0, 0.0)


def test_parent_no_better_than_guessing_gives_no_corrected_retention() -> None:
    parent = make_result("skill_sum", "acc", [1.0, 0.0, 0.0, 0.0], chance=0.25)
    child = make_result("skill_sum", "acc", [0.0, 1.0, 0.0, 0.0], chance=0.25)
    (one,) = retention([parent], [child])
    assert one.corrected is None and one.corrected_stderr is None and one.raw == 1.0
    mean = mean_retention([one])
    assert mean.value is None and mean.left_out == ("skill_sum",)


def test_mean_is_over_skills_only_and_propagates_independent_errors() -> None:
    results = []
    for index, name in enumerate(("skill_copy", "skill_sum", "stdlib_cloze")):
        child, parent = draw_pair(200, seed=10 + index)
        results.append((make_result(name, "acc", parent, chance=0.25), make_result(name, "acc", child, chance=0.25)))
    perplexity = make_result("stdlib_perplexity", "bits_per_byte", [2.0, 1.0], chance=None, weights=[3.0, 1.0])
    found = retention([*(p for p, _ in results), perplexity], [*(c for _, c in results), perplexity])
    assert [r.task for r in found] == ["skill_copy", "skill_sum", "stdlib_cloze"]
    mean = mean_retention(found)
    assert mean.num_tasks == 2
    assert mean.value == pytest.approx((found[0].corrected + found[1].corrected) / 2)  # type: ignore[operator]
    assert mean.stderr == pytest.approx(math.hypot(found[0].corrected_stderr, found[1].corrected_stderr) / 2)  # type: ignore[arg-type]


def test_perplexities_are_compared_document_by_document() -> None:
    rng = np.random.default_rng(8)
    weights, parent = rng.integers(50, 400, size=80).astype(float), rng.normal(2.0, 0.3, size=80)
    child = parent + rng.normal(0.1, 0.02, size=80)
    each = [make_result("t", "nats_per_token", x.tolist(), chance=None, weights=weights.tolist()) for x in (parent, child)]
    accuracy = make_result("t", "acc", [1.0, 0.0], chance=0.25)
    (found,) = perplexities([accuracy, each[0]], [accuracy, each[1]])
    means = [(weights * x).sum() / weights.sum() for x in (parent, child)]
    assert (found.task, found.metric, found.num_items) == ("t", "nats_per_token", 80)
    assert [found.parent, found.child, found.difference] == pytest.approx([*means, means[1] - means[0]])
    draws = rng.integers(0, 80, size=(6000, 80))
    bootstrap = (weights[draws] * (child - parent)[draws]).sum(1) / weights[draws].sum(1)
    assert found.difference_stderr == pytest.approx(bootstrap.std(), rel=0.08) and found.difference_stderr < 0.2 * each[0].stderr
    with pytest.raises(UnpairedResultsError, match="child has no nats_per_token"):
        perplexities(each[:1], [accuracy])


def test_results_on_other_items_are_refused() -> None:
    child, parent = draw_pair(50, seed=5)
    with pytest.raises(UnpairedResultsError, match=r"50 items.*40"):
        retention([make_result("t", "acc", parent, chance=0.25)], [make_result("t", "acc", child[:40], chance=0.25)])
    with pytest.raises(UnpairedResultsError, match="child has no acc"):
        retention([make_result("t", "acc", parent, chance=0.25)], [])
    with pytest.raises(UnpairedResultsError, match="task t: the child was asked other items than its parent"):
        retention(*([make_result("t", "acc", answers, chance=0.25, items_digest=d)] for answers, d in ((parent, "a"), (child, "b"))))


def test_weighted_mean_and_its_error_are_those_of_a_ratio_of_sums() -> None:
    rng = np.random.default_rng(6)
    weights = rng.integers(50, 400, size=60).astype(float)
    values = rng.normal(2.0, 0.3, size=60)
    result = make_result("stdlib_perplexity", "nats_per_token", values.tolist(), chance=None, weights=weights.tolist())
    assert result.value == pytest.approx((weights * values).sum() / weights.sum())
    draws = rng.integers(0, 60, size=(6000, 60))
    bootstrap = (weights[draws] * values[draws]).sum(1) / weights[draws].sum(1)
    assert result.stderr == pytest.approx(bootstrap.std(), rel=0.08)
    plain = make_result("t", "acc", [1.0, 0.0, 1.0, 1.0], chance=0.25)
    assert plain.stderr == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)


def test_no_items_is_an_error() -> None:
    with pytest.raises(TaskResultError, match="no items"):
        make_result("t", "acc", [], chance=0.25)
