import random
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from puzzle_dag.corpus.mixture import mix_tokens, pack_rows, skill_lines
from puzzle_dag.corpus.skills import NUM_CHOICES, Skill, build_skills, choose
from puzzle_dag.corpus.stdlib import python_version, read_stdlib, split_of
from puzzle_dag.corpus.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, load_tokenizer
from puzzle_dag.corpus.world import ATTRIBUTES, World, build_world

WORLD = build_world(7)
SKILLS = {s.name: s for s in build_skills(WORLD)}


def split_sequence(text: str) -> tuple[list[str], list[str]]:
    question, answer = text.split(": ", 1)[1].split(" =")
    return question.split(), answer.split()


def is_true(name: str, context: str, answer: str, world: World) -> bool:
    """Solve a question from the rules alone, independently of the generator."""
    body = context.split(": ", 1)[1]
    if name in ("copy", "reverse", "sort", "translate"):
        words, found = split_sequence(context + answer)
        solved = {"copy": words, "reverse": words[::-1], "sort": sorted(words), "translate": [world.dictionary.get(w, "") for w in words]}
        return found == solved[name]
    if name == "recall":
        pairs, *shown = body.split("; ")
        table = dict(p.split(" ") for p in pairs.split(", "))
        return table[shown[-1]] == answer.strip()
    if name == "pattern":
        words = body.split()
        period = next(p for p in range(1, len(words)) if words[p] == words[0])
        return words[len(words) - period] == answer.strip()
    asked = body.split("; ")[-1]
    if name == "facts":
        person, attribute = asked.split(" ")
        return world.facts[person, attribute] == answer.strip()
    left, *_, right, _ = asked.split(" ")
    if name == "product":
        return world.product[left, right] == answer.strip()
    return str(int(left) + int(right)) == answer.strip()


@pytest.mark.parametrize("name", sorted(SKILLS))
def test_every_item_has_one_true_answer_among_four(name: str) -> None:
    rng = random.Random(1)
    items = [SKILLS[name].item(rng) for _ in range(300)]
    for item in items:
        assert len(set(item.choices)) == NUM_CHOICES and all(c.startswith(" ") for c in item.choices)
        assert [is_true(name, item.context, c, WORLD) for c in item.choices] == [i == item.answer for i in range(NUM_CHOICES)], item
    places = Counter(i.answer for i in items)
    assert min(places.values()) > 45, "the right answer must not have a place of its own"
    assert len({i.context for i in items}) > 200


@pytest.mark.parametrize("name", ["copy", "reverse", "sort", "translate", "facts", "product", "sum", "recall", "pattern"])
def test_lines_are_true_and_of_the_form_that_items_ask_for(name: str) -> None:
    rng = random.Random(2)
    for _ in range(100):
        line = SKILLS[name].line(rng)
        assert line.startswith(f"{name}: ")
        if name in ("copy", "reverse", "sort", "translate"):
            context, answer = line.split(" =")
            assert is_true(name, context + " =", answer, WORLD)
        elif name in ("facts", "product", "sum"):
            for pair in line.split(": ", 1)[1].split("; "):
                question, _, answer = pair.rpartition(" ")
                assert is_true(name, f"{name}: {question}", answer, WORLD)
        elif name == "recall":
            pairs, *answers = line.split(": ", 1)[1].split("; ")
            assert sorted(answers) == sorted(pairs.split(", "))
        else:
            words = line.split()[1:]
            period = words.index(words[0], 1)
            assert all(words[i] == words[i % period] for i in range(len(words))) and len(words) >= 3 * period


def test_weights_are_shares_of_lines() -> None:
    assert sum(s.weight for s in SKILLS.values()) == pytest.approx(1)
    lines = [line for batch, _ in zip(skill_lines(tuple(SKILLS.values()), random.Random(3)), range(40), strict=False) for line in batch]
    drawn = Counter(line.split(":")[0] for line in lines)
    for name, skill in SKILLS.items():
        assert drawn[name] / len(lines) == pytest.approx(skill.weight, abs=0.015)


def test_near_misses_must_be_distinct() -> None:
    with pytest.raises(ValueError, match="need 3 distinct wrong answers"):
        choose(random.Random(0), "1 + 1 =", "2", ["2", "3", "3", "4"])


def test_worlds_are_functions_of_their_seed() -> None:
    assert build_world(7) == WORLD
    assert build_world(8).facts != WORLD.facts and build_world(8).product != WORLD.product


def test_world_is_consistent() -> None:
    invented = [*WORLD.people, *WORLD.dictionary.values(), *WORLD.symbols, *(v for a in ATTRIBUTES for v in WORLD.values[a])]
    assert len(WORLD.facts) == len(WORLD.people) * len(ATTRIBUTES)
    assert all(value in WORLD.values[attribute] for (_, attribute), value in WORLD.facts.items())
    assert set(WORLD.dictionary) == set(WORLD.nouns)
    names = [*WORLD.people, *WORLD.dictionary.values(), *WORLD.symbols]
    assert len(names) == len(set(names)) and not set(invented) & set(WORLD.nouns)
    assert set(WORLD.product) == {(a, b) for a in WORLD.symbols for b in WORLD.symbols}


def test_library_splits_are_disjoint_stable_and_free_of_tests() -> None:
    files = {split: [name for name, _ in read_stdlib(split)] for split in ("train", "heldout")}  # type: ignore[arg-type]
    assert files["train"] == sorted(files["train"])
    assert not set(files["train"]) & set(files["heldout"])
    assert 0.05 < len(files["heldout"]) / (len(files["train"]) + len(files["heldout"])) < 0.15
    folders = {part for f in files["train"] + files["heldout"] for part in f.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "site-packages", "idlelib"}) and "json" in folders
    # pinned: another split would hold out what the bundled parent was trained on
    assert [split_of(f) for f in ("abc.py", "json/decoder.py", "keyword.py", "cProfile.py")] == ["train", "train", "heldout", "heldout"]
    assert python_version().count(".") == 2


def test_library_reads_a_given_folder_and_skips_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test/hidden.py").write_text("no = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    for i in range(30):
        (tmp_path / f"m{i}.py").write_text(f"value = {i}\n")
    found = dict([*read_stdlib("train", tmp_path), *read_stdlib("heldout", tmp_path)])
    assert sorted(found) == sorted(f"m{i}.py" for i in range(30))
    with pytest.raises(FileNotFoundError, match="use a full CPython"):
        list(read_stdlib("train", tmp_path / "missing"))


def test_rows_are_packed_and_cut_at_their_end() -> None:
    rows = pack_rows([[1, 2, 3], [4, 5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15]], 5)
    assert rows.tolist() == [[1, 2, 3, 4, 5], [8, 9, 10, 11, 12]]
    assert pack_rows([[1, 2]], 5).shape == (0, 5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_mix_has_the_asked_shape_for_every_share(
    share: float, micro_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = [(f"m{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 5) for i in range(20)]
    monkeypatch.setattr("puzzle_dag.corpus.mixture.read_stdlib", lambda split: code)
    skills: tuple[Skill, ...] = tuple(SKILLS.values())
    arguments = {"num_tokens": 2_000, "row_length": 128, "skill_share": share, "split": "heldout"}
    rows = mix_tokens(micro_tokenizer, skills, seed=3, **arguments)  # type: ignore[arg-type]
    assert rows.shape == (15, 128)
    assert (rows == mix_tokens(micro_tokenizer, skills, seed=3, **arguments)).all()  # type: ignore[arg-type]
    assert not (rows == mix_tokens(micro_tokenizer, skills, seed=4, **arguments)).all()  # type: ignore[arg-type]


def test_tokenizer_round_trips_and_keeps_digits_apart(micro_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    micro_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "sum: 12 + 7 = 19\n\tdef f(x):\n        return x  # café"
    ids = loaded(text)["input_ids"]
    assert ids == micro_tokenizer(text)["input_ids"] and loaded.decode(ids) == text
    assert [loaded.decode([i]) for i in loaded("1234")["input_ids"]] == ["1", "2", "3", "4"]
    assert loaded.convert_ids_to_tokens(loaded.eos_token_id) == END_OF_TEXT


def test_the_bundled_parents_chat_template_writes_documents_of_the_corpus() -> None:
    """A question and its answer are a document; the next question starts another, as in a row of training tokens."""
    tokenizer = load_tokenizer(Path(__file__).parents[1] / "parents" / "tiny")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    chat = [
        {"role": "system", "content": "facts: ada city lome"},
        {"role": "user", "content": "sum: 3 + 4 ="},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": " copy: fox dog = "},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == f"facts: ada city lome{END_OF_TEXT}sum: 3 + 4 = 7{END_OF_TEXT}copy: fox dog ="
