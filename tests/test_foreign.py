"""Foreign libraries: brute force on small ones, the three file kinds, and errors that name what is wrong."""

import json
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_dag.search import foreign
from puzzle_dag.search.foreign import read_foreign_library, solve_foreign_library
from puzzle_dag.search.foreign_candidates import ForeignLibraryError
from puzzle_dag.search.program import Outcome

WIDE, NARROW = {"ms": 0.3, "mib": 5}, {"ms": 0.1, "mib": 2}
LIBRARY = {
    "layer_10": {"a": {"stats": WIDE, "metrics": {"kl": 0.0}}, "b": {"stats": NARROW, "metrics": {"kl": 0.5}}},
    "layer_2": {"a": {"stats": WIDE, "metrics": {"kl": 0.0}}, "b": {"stats": NARROW, "metrics": {"kl": 0.2}}},
}

KEYS = {"status", "objective", "bound", "gap", "seconds", "costs", "choices"}
"""Of every answer, as docs/foreign-libraries.md says."""


def total(library: dict[str, dict[str, dict[str, float]]], picks: dict[str, str], metric: str) -> Fraction:
    return sum((Fraction(str(library[layer][variant][metric])) for layer, variant in picks.items()), Fraction(0))


numbers = st.integers(0, 20).map(lambda n: n / 10)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=4),
    numbers,
    numbers,
    st.integers(1, 3),
    st.integers(1, 2),
)
def test_equals_brute_force(rows: list[list[tuple[float, float, float]]], ms: float, size: float, num: int, least: int) -> None:
    """Decimal tenths, so that sums often touch a bound that binary sums would miss by a rounding."""
    library = {str(i): {f"v{k}": dict(zip(("kl", "ms", "size"), v, strict=True)) for k, v in enumerate(row)} for i, row in enumerate(rows)}
    least = min(least, len(rows))
    answer = solve_foreign_library(
        library, minimize="kl", at_most={"ms": ms}, at_least={"size": size}, num_solutions=num, min_different_layers=least, loosen=True
    )
    every = [dict(zip(library, picks, strict=True)) for picks in product(*library.values())]

    def within(most: Fraction, least: Fraction) -> list[dict[str, str]]:
        return [p for p in every if total(library, p, "ms") <= most and total(library, p, "size") >= least]

    left = within(Fraction(str(ms)), Fraction(str(size)))
    if not left:
        assert answer["status"] == "infeasible"
        assert answer["conflicting"]
        assert set(answer) >= KEYS and ("solutions" in answer) == (num > 1)
        return
    answers = [answer] if num == 1 else answer["solutions"]
    own = {entry["constraint"]: entry for entry in answers[0].pop("loosening")}
    for name, bound, sign in (("ms", Fraction(str(ms)), 1), ("size", Fraction(str(size)), -1)):
        totals = [total(library, p, name) for p in every]
        moved = bound + sign * (bound or max(totals) - min(totals)) / 20
        looser = within(moved, Fraction(str(size))) if name == "ms" else within(Fraction(str(ms)), moved)
        best = min(total(library, p, "kl") for p in looser)
        assert own[name]["loosened"] == pytest.approx(float(moved)) and own[name]["value"] == float(best)
        assert own[name]["is_binding"] == (best < total(library, answers[0]["choices"], "kl"))
        assert own[name]["step"].startswith("5 % of its range" if bound == 0 else "5 %")
    for found in answers:
        assert set(found) == KEYS and found["status"] == "optimal"
        assert found["gap"] <= 1e-6
        assert found["objective"] == pytest.approx(float(min(total(library, p, "kl") for p in left)), abs=1e-12)
        assert found["choices"] in left
        assert found["costs"] == {m: float(total(library, found["choices"], m)) for m in ("ms", "size")}
        left = [p for p in left if sum(p[i] != found["choices"][i] for i in p) >= least]
    assert len(answers) == num or not left
    json.dumps(answer, allow_nan=False)


def ways(library: dict[str, dict[str, dict[str, float]]], first: int, num_layers: int) -> Iterator[dict[str, str]]:
    """Every way to cover the layers from `first` on by single layers and runs."""
    if first == num_layers:
        yield {}
    for place, variants in library.items():
        start, _, end = place.partition("-")
        if int(start) == first:
            for variant, rest in product(variants, ways(library, int(end or start) + 1, num_layers)):
                yield {place: variant, **rest}


def layers_of(choices: dict[str, str]) -> dict[int, tuple[str, str]]:
    """Layer -> the place and the variant that cover it."""
    spans = {place: (int(place.split("-")[0]), int(place.split("-")[-1])) for place in choices}
    return {layer: (place, choices[place]) for place, (start, end) in spans.items() for layer in range(start, end + 1)}


three = st.fixed_dictionaries({"kl": numbers, "ms": numbers, "size": numbers})
places = st.lists(st.dictionaries(st.sampled_from("abc"), three, min_size=1), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(places, st.data(), numbers, numbers, st.integers(1, 3), st.integers(1, 2))
def test_runs_equal_brute_force(
    rows: list[dict[str, dict[str, float]]], data: st.DataObject, ms: float, size: float, num: int, least: int
) -> None:
    library = {str(i): row for i, row in enumerate(rows)}
    spans = [f"{i}-{j}" for i in range(len(rows)) for j in range(i + 1, len(rows))]
    for span in data.draw(st.lists(st.sampled_from(spans), unique=True)) if spans else []:
        library[span] = data.draw(st.dictionaries(st.sampled_from(["fused", "dropped"]), three, min_size=1))
    least = min(least, len(rows))
    answer = solve_foreign_library(
        library, minimize="kl", at_most={"ms": ms}, at_least={"size": size}, num_solutions=num, min_different_layers=least
    )
    left = list(ways(library, 0, len(rows)))
    left = [p for p in left if total(library, p, "ms") <= Fraction(str(ms)) and total(library, p, "size") >= Fraction(str(size))]
    if not left:
        assert answer["status"] == "infeasible"
        return
    answers = [answer] if num == 1 else answer["solutions"]
    for found in answers:
        assert found["status"] == "optimal" and found["choices"] in left
        assert found["objective"] == pytest.approx(float(min(total(library, p, "kl") for p in left)), abs=1e-12)
        own = layers_of(found["choices"])
        left = [p for p in left if sum(layers_of(p)[i] != own[i] for i in own) >= least]
    assert len(answers) == num or not left


def test_a_run_competes_with_single_layers_under_any_way_of_writing_it() -> None:
    single = {"parent": {"kl": 0.0, "ms": 2.0}, "noop": {"kl": 0.5, "ms": 0.0}}
    for run in ("layer_2-3", "layer_2-layer_3"):
        library = {f"layer_{i}": single for i in (1, 2, 3)} | {run: {"fused": {"kl": 0.1, "ms": 3.0}}}
        assert solve_foreign_library(library, minimize="kl")["choices"] == dict.fromkeys(("layer_1", "layer_2", "layer_3"), "parent")
        answer = solve_foreign_library(library, minimize="kl", at_most={"ms": 5.0})
        assert answer["choices"] == {"layer_1": "parent", run: "fused"} and answer["costs"] == {"ms": 5.0}


def test_dotted_paths_and_natural_order_of_layers() -> None:
    answer = solve_foreign_library(LIBRARY, minimize="metrics.kl", at_most={"stats.ms": 0.4, "stats.mib": 70})
    assert answer["choices"] == {"layer_2": "b", "layer_10": "a"}
    assert list(answer["choices"]) == ["layer_2", "layer_10"]
    assert answer["costs"] == {"stats.ms": 0.4, "stats.mib": 7.0}
    assert (answer["status"], answer["objective"], answer["bound"], answer["gap"]) == ("optimal", 0.2, 0.2, 0.0)


def test_what_conflicts_is_said_in_the_answer() -> None:
    answer = solve_foreign_library(LIBRARY, minimize="metrics.kl", at_most={"stats.ms": 0.2}, at_least={"stats.mib": 8})
    assert answer["status"] == "infeasible"
    assert sorted(answer["conflicting"]) == ["stats.mib at least 8", "stats.ms at most 0.2"]
    assert answer["nearest"]["stats.ms"]["value"] == pytest.approx(0.6)
    assert answer["nearest"]["stats.mib"]["value"] == 4.0


def test_an_answer_has_all_its_keys_whatever_became_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"objective": None, "bound": None, "gap": None, "costs": {}, "choices": {}}
    answer = solve_foreign_library(LIBRARY, minimize="metrics.kl", at_most={"stats.ms": -1.0})
    assert set(answer) == KEYS | {"conflicting", "nearest"}
    assert {k: answer[k] for k in nothing} == nothing and answer["status"] == "infeasible"
    for status, bound in (("time_limit", 0.25), ("time_limit", float("nan"))):
        monkeypatch.setattr(foreign, "minimise", lambda *_, s=status, b=bound, **__: Outcome(s, bound=b, seconds=600.0))
        answer = solve_foreign_library(LIBRARY, minimize="metrics.kl", num_solutions=2)
        known = None if bound != bound else bound
        assert answer == {**nothing, "status": "time_limit", "bound": known, "seconds": 600.0, "solutions": []}
    json.dumps(answer, allow_nan=False)


def test_of_memory_one_more_gib_is_told_as_well_where_the_bound_is_larger() -> None:
    """Three layers of 3 GiB; each that goes loses 0.5. 8 GiB allow two, 5 % more is 8.4, and one more GiB is the third."""
    library = {str(i): {"full": {"memory_mib": 3072, "kl": 0.0}, "none": {"memory_mib": 0, "kl": 0.5}} for i in range(3)}
    answer = solve_foreign_library(library, minimize="kl", at_most={"memory_mib": 8 * 1024}, loosen=True)
    told = [(x["step"], x["change"], x["gain"], x["is_binding"]) for x in answer["loosening"]]
    assert told == [("1 GiB more", 1024.0, 0.5, True), ("5 % more", pytest.approx(409.6), 0.0, False)]
    answer = solve_foreign_library(library, minimize="kl", at_most={"memory_mib": 1024}, loosen=True)
    assert [x["step"] for x in answer["loosening"]] == ["5 % more"]


def test_json_csv_and_parquet_are_one_library(tmp_path: Path) -> None:
    rows = [
        {"layer": layer, "variant": variant, "metric": f"{group}.{name}", "value": float(value)}
        for layer, variants in LIBRARY.items()
        for variant, groups in variants.items()
        for group, values in groups.items()
        for name, value in values.items()
    ]
    (tmp_path / "l.json").write_text(json.dumps(LIBRARY))
    lines = ["layer,variant,metric,value", *(f"{r['layer']},{r['variant']},{r['metric']},{r['value']}" for r in rows)]
    (tmp_path / "l.csv").write_text("\n".join(lines))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    answers = [
        solve_foreign_library(read_foreign_library(tmp_path / name), minimize="metrics.kl", at_most={"stats.ms": 0.4})
        for name in ("l.json", "l.csv", "l.parquet")
    ]
    for answer in answers:
        del answer["seconds"]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.json", "[]", "no object"),
        ("l.json", "{", "can't be read"),
        ("l.csv", "layer,variant,metric\n1,a,x", "row 1: no 'value'; the columns are layer, variant, metric, value"),
        ("l.csv", "layer,variant,metric,value\n1,a,x,much", "row 1: value 'much' is no number"),
        ("l.txt", "", ".json, .csv or .parquet"),
        ("missing.json", None, "can't be read"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ForeignLibraryError, match=message):
        read_foreign_library(tmp_path / name)


@pytest.mark.parametrize(
    ("library", "arguments", "message"),
    [
        (LIBRARY, {"minimize": "metrics.k"}, r"'layer_2', variant 'a' has no number 'metrics.k'; did you mean 'metrics.kl'\?"),
        (LIBRARY, {"minimize": "metrics.kl", "at_most": {"speed": 1.0}}, "no number 'speed'; it has metrics.kl, stats.mib, stats.ms"),
        ({}, {"minimize": "x"}, "no layers"),
        ({**LIBRARY, "layer_2-11": {"a": WIDE}}, {"minimize": "metrics.kl"}, "reads as a run of layers, but there is no layer 'layer_11'"),
        ({**LIBRARY, "layer_10-2": {"a": WIDE}}, {"minimize": "metrics.kl"}, "run 'layer_10-2' must go from one layer to a later one"),
        ({**LIBRARY, "layer_2-10": {"a": WIDE}}, {"minimize": "metrics.kl"}, "layer 'layer_2-10', variant 'a' has no number"),
        ({"0": {}}, {"minimize": "x"}, "layer '0' has no variants"),
        ({"0": {"a": 3}}, {"minimize": "x"}, "variant 'a': 3 is no mapping"),
        ({"0": {"a": {"x": "fast"}}}, {"minimize": "x"}, "x is 'fast'; it must be a finite number"),
        ({"0": {"a": {"x": float("nan")}}}, {"minimize": "x"}, "x is nan; it must be a finite number"),
        (LIBRARY, {"minimize": "metrics.kl", "num_solutions": 2, "min_different_layers": 3}, "give 1 or more, and 1 to 2"),
    ],
)
def test_bad_libraries_and_names_are_refused(library: dict[str, object], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ForeignLibraryError, match=message):
        solve_foreign_library(library, **arguments)
