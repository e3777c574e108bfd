"""Progress lines: how many, when, and what they say."""

import logging

import pytest

from puzzle_dag import progress
from puzzle_dag.progress import ProgressLog, silent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_a_line_every_few_seconds_with_rate_and_time_left(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tell = ProgressLog("library L03", every_s=5.0)
    tell(0, 1000, "tokens")
    for second in range(1, 11):
        clock[0] = 100.0 + second
        tell(second * 100, 1000, "tokens")
    assert [record.getMessage() for record in caplog.records] == [
        "library L03: 500/1000 tokens, 100.0 tokens/s, 5 s left",
        "library L03: 1000/1000 tokens, 100.0 tokens/s, 0 s left",
    ]


def test_a_second_run_starts_anew(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tell = ProgressLog("scores")
    tell(0, 4, "pairs")
    clock[0] += 2
    tell(4, 4, "pairs")
    clock[0] += 100
    tell(0, 10, "pairs")
    clock[0] += 10
    tell(5, 10, "pairs")
    assert caplog.records[-1].getMessage() == "scores: 5/10 pairs, 0.5 pairs/s, 10 s left"


def test_one_call_that_is_all_gives_no_rate(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ProgressLog("parent")(3, 3, "rows")
    assert caplog.records[-1].getMessage() == "parent: 3/3 rows"
    silent(3, 3, "rows")
    assert len(caplog.records) == 1
