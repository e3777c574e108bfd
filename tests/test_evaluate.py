import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from puzzle_dag.architecture import Block
from puzzle_dag.children.evaluate import TaskResult, evaluate_checkpoint, evaluate_model
from puzzle_dag.children.shared_context import SharedContextLM
from puzzle_dag.children.tasks import UnknownTaskError, skill_items, write_tasks
from puzzle_dag.config import AccuracySettings, BundledCorpus, ParentSource
from puzzle_dag.corpus.tokens import read_stdlib_for
from puzzle_dag.model.checkpoint import child_config, save_checkpoint
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import Parent, load_parent
from puzzle_dag.pretrain.bars import grade_items

TASKS = ("skill_recall", "skill_sum", "skill_translate", "stdlib_cloze", "stdlib_perplexity")


@pytest.fixture(scope="module")
def parent(micro_parent_folder: Path) -> Parent:
    return load_parent(ParentSource(path=str(micro_parent_folder)), Path("/"))


@pytest.fixture(scope="module")
def results(parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], TaskResult]:
    settings = AccuracySettings(tasks=TASKS, num_items=40, batch_size=16)
    folder = tmp_path_factory.mktemp("tasks")
    found = evaluate_model(parent.model, parent.tokenizer, TASKS, settings, BundledCorpus(kind="bundled"), folder)
    return {(r.task, r.metric): r for r in found}


def instances(requests: list[tuple[str, str]]) -> list[Instance]:
    return [Instance(request_type="loglikelihood", doc={}, arguments=r, idx=i) for i, r in enumerate(requests)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_shared_contexts_give_the_log_likelihoods_of_lm_evals_own_model(family: str, family_parent_folder: dict[str, Path]) -> None:
    loaded = load_parent(ParentSource(path=str(family_parent_folder[family])), Path("/"))
    requests = [
        ("sum: 12 + 7 =", " 19"),
        ("sum: 12 + 7 =", " 1"),
        ("sum: 12 + 7 =", " 205"),
        ("copy: ant bee fox =", " ant bee fox"),
        ("copy: ant bee fox =", " ant fox bee"),
        ("recall: a b, c d; c", " d"),
        ("recall: a b, c d; c", " b"),
        ("x", " y"),
    ]
    ours = SharedContextLM(loaded.model, loaded.tokenizer, batch_size=3).loglikelihood(instances(requests))
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1).loglikelihood(instances(requests), disable_tqdm=True)
    for (mine, my_greedy), (reference, greedy) in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(reference, abs=2e-4)
        assert my_greedy == greedy


def test_shared_contexts_are_right_with_places_left_out(parent: Parent) -> None:
    torch.manual_seed(1)
    blocks = (Block.parse("noop/w64"), Block.parse("kv2/linear"))
    child = PuzzleDagForCausalLM(child_config(parent.config, blocks)).eval()
    requests = [("sort: c a b =", " a b c"), ("sort: c a b =", " b c a"), ("sort: d c =", " c d")]
    ours = SharedContextLM(child, parent.tokenizer, batch_size=8).loglikelihood(instances(requests))
    theirs = HFLM(pretrained=child, tokenizer=parent.tokenizer, batch_size=1).loglikelihood(instances(requests), disable_tqdm=True)
    assert [a for a, _ in ours] == pytest.approx([a for a, _ in theirs], abs=2e-4)


def test_accuracy_is_that_of_an_independent_grader(parent: Parent, results: dict[tuple[str, str], TaskResult]) -> None:
    for name in ("skill_recall", "skill_sum", "skill_translate"):
        result = results[name, "acc"]
        assert result.value == pytest.approx(grade_items(parent.model, parent.tokenizer, skill_items(name, 40, 7, 0)))
        assert result.num_items == len(result.per_item) == 40
        assert set(result.per_item) <= {0.0, 1.0}
        assert result.chance == 0.25


@torch.no_grad()
def test_perplexity_is_the_mean_cross_entropy_of_each_document(
    parent: Parent, results: dict[tuple[str, str], TaskResult], tmp_path: Path
) -> None:
    write_tasks(["stdlib_perplexity"], tmp_path, num_items=1, world_seed=7)
    texts = [json.loads(line)["text"] for line in (tmp_path / "stdlib_perplexity.jsonl").read_text().splitlines()]
    result = results["stdlib_perplexity", "nats_per_token"]
    assert result.num_items == len(texts) and result.chance is None
    for text, nats in list(zip(texts, result.per_item, strict=True))[:5]:
        ids = parent.tokenizer(text)["input_ids"]
        window = parent.config.max_position_embeddings
        rows = torch.tensor([[parent.tokenizer.bos_token_id, *ids]])
        if rows.shape[1] > window:
            continue
        logits = parent.model(input_ids=rows).logits[0, :-1]
        assert nats == pytest.approx(float(torch.nn.functional.cross_entropy(logits, rows[0, 1:])), abs=1e-3)
    bits = results["stdlib_perplexity", "bits_per_byte"]
    total_nats = sum(x * n for x, n in zip(result.per_item, result.weights or [], strict=True))
    assert bits.value == pytest.approx(total_nats / sum(len(t.encode()) for t in texts) / 0.6931471805599453)


def test_checkpoint_is_graded_without_a_network(parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("local tasks must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    save_checkpoint(parent.model, parent.tokenizer, tmp_path / "child")
    settings = AccuracySettings(tasks=("skill_recall",), num_items=20)
    told: list[tuple[int, int, str]] = []
    arguments = (tmp_path / "child", settings.tasks, settings, BundledCorpus(kind="bundled"), tmp_path / "tasks")
    (first,) = evaluate_checkpoint(*arguments, progress=lambda *now: told.append(now))
    (again,) = evaluate_checkpoint(*arguments)
    assert first == again
    assert told[-1] == (80, 80, "choices")
    (other,) = evaluate_checkpoint(*arguments, seed=1)
    assert other.num_items == 20


def test_items_are_the_same_everywhere_and_differ_by_seed(tmp_path: Path) -> None:
    first = write_tasks(TASKS, tmp_path / "a", num_items=30, world_seed=7)
    second = write_tasks(TASKS, tmp_path / "elsewhere", num_items=30, world_seed=7)
    assert first.digest == second.digest
    assert first.digest != write_tasks(TASKS, tmp_path / "a", num_items=30, world_seed=7, seed=1).digest
    assert first.digest != write_tasks(TASKS, tmp_path / "a", num_items=30, world_seed=8).digest


def test_cloze_items_are_sound_and_come_from_files_for_grading_only(tmp_path: Path) -> None:
    write_tasks(["stdlib_cloze"], tmp_path, num_items=500, world_seed=7)
    items = [json.loads(line) for line in (tmp_path / "stdlib_cloze.jsonl").read_text().splitlines()]
    texts = [text for _, text in read_stdlib_for("grade")]
    assert len(items) == 500
    assert len({(i["context"], i["choices"][i["answer"]]) for i in items}) == 500
    for item in items:
        right = item["choices"][item["answer"]]
        assert len(set(item["choices"])) == 4
        assert all(choice.removeprefix(" ") in item["context"] for choice in item["choices"])
        assert len({choice[0] == " " for choice in item["choices"]}) == 1
        assert any(item["context"] + right in text for text in texts)
    # nothing but the answer itself gives it away: neither its place among the choices nor its length
    places = [sum(i["answer"] == k for i in items) for k in range(4)]
    assert min(places) > 90
    shortest = sum(len(i["choices"][i["answer"]]) == min(map(len, i["choices"])) for i in items) / 500
    assert shortest < 0.6


def test_unknown_skill_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UnknownTaskError, match=r"'skill_cook' is unknown.*skill_copy.*stdlib_cloze"):
        write_tasks(["skill_cook"], tmp_path, num_items=5, world_seed=7)


def test_a_task_can_have_more_items_than_the_others(tmp_path: Path) -> None:
    write_tasks(["skill_copy", "stdlib_cloze"], tmp_path, num_items=20, task_items={"stdlib_cloze": 4500}, world_seed=7)
    counts = {name: len((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("skill_copy", "stdlib_cloze")}
    assert counts == {"skill_copy": 20, "stdlib_cloze": 4500}


@pytest.mark.parametrize("name", ["hellaswag", "stdlib_cloze"])  # not ours; not asked for
def test_items_of_a_task_that_is_not_graded_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"task_items names '{name}'.*skill_copy"):
        AccuracySettings(tasks=("skill_copy", "hellaswag"), task_items={name: 10})


def test_too_many_cloze_items_say_how_many_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1000000 asked, the held-out library gives \d+ cloze items"):
        write_tasks(["stdlib_cloze"], tmp_path, num_items=1_000_000, world_seed=7)


def test_groups_pool_the_items_of_their_tasks(monkeypatch: pytest.MonkeyPatch, parent: Parent, tmp_path: Path) -> None:
    """Hub tasks can't run here; what is done with their results can."""

    def sample(acc: float, num_choices: int) -> dict[str, Any]:
        return {"metrics": ["acc"], "filter": "none", "acc": acc, "arguments": [("c", "x")] * num_choices}

    found: dict[str, Any] = {
        "group_subtasks": {"mmlu": ["mmlu_a", "mmlu_b"]},
        "samples": {
            "mmlu_a": [sample(1.0, 4), sample(0.0, 4)],
            "mmlu_b": [sample(1.0, 4)],
            "winogrande": [sample(1.0, 2)] * 2,
            "gsm8k": [
                {"metrics": ["exact_match"], "filter": f, "exact_match": v, "arguments": [("q", {})]}
                for f, v in (("strict-match", 0.0), ("flexible-extract", 1.0), ("strict-match", 1.0))
            ],
        },
    }
    stub: Callable[..., Any] = lambda *_, **__: found  # noqa: E731
    monkeypatch.setattr("puzzle_dag.children.evaluate._run_lm_eval", stub)
    names = ("mmlu", "winogrande", "gsm8k")
    settings = AccuracySettings(tasks=names)
    mmlu, winogrande, gsm8k = evaluate_model(parent.model, parent.tokenizer, names, settings, BundledCorpus(kind="bundled"), tmp_path)
    assert (mmlu.value, mmlu.num_items, mmlu.chance) == (pytest.approx(2 / 3), 3, 0.25)
    assert winogrande.chance == 0.5
    assert (gsm8k.value, gsm8k.num_items, gsm8k.chance) == (0.5, 2, 0.0)
