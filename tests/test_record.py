"""The record: attempts, torn lines, atomic files, comparison; the ledger; statistics; seeds."""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_exp.record import checkpoint
from dash_exp.record.folder import (
    CellBusy,
    Recorder,
    differences,
    finite,
    last_attempts,
    read_json,
    read_rows,
    write_json,
)
from dash_exp.record.ledger import PHASES, Ledger, RunningClock, Times
from dash_exp.seeding import permutation, seed_for, uniforms
from dash_exp.statistics.shares import bootstrap_interval, pass_at_k, wilson_interval
from tests.conftest import REPOSITORY


def test_rows_of_the_last_attempt_of_each_step() -> None:
    rows = [
        {"step": 1, "attempt": 1, "v": "a"},
        {"step": 2, "attempt": 1, "v": "old"},
        {"step": 2, "attempt": 1, "v": "old2"},
        {"step": 2, "attempt": 3, "v": "new"},
        {"step": 3, "attempt": 3, "v": "b"},
        {"step": 3, "attempt": 3, "v": "c"},
    ]
    assert [r["v"] for r in last_attempts(rows)] == ["a", "new", "b", "c"]


def test_a_torn_line_is_left_and_counted_and_the_next_row_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1, "attempt": 1}\n{"step": 2, "att')
    with Recorder(tmp_path) as recorder:
        recorder.append("steps", [{"step": 2}])
    found = read_rows(path)
    assert found.torn == 1
    assert [r["step"] for r in found.rows] == [1, 2]
    assert "torn" in (tmp_path / "log.txt").read_text()


def test_attempts_count_up_and_one_process_holds_a_cell(tmp_path: Path) -> None:
    with Recorder(tmp_path) as first:
        first.status("running", 0)
        with pytest.raises(CellBusy), Recorder(tmp_path):
            pass
    with Recorder(tmp_path) as second:
        assert second.attempt == 2


def test_absent_values_are_left_out(tmp_path: Path) -> None:
    assert finite({"a": None, "b": math.nan, "c": math.inf, "d": 0.0}) == {"d": 0.0}
    with Recorder(tmp_path) as recorder:
        recorder.append("steps", [{"step": 1, "kl/mean": None}])
    assert json.loads((tmp_path / "steps.jsonl").read_text()) == {"attempt": 1, "step": 1}


def test_write_json_never_leaves_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert read_json(path) == {"a": 1}


def test_comparison_ignores_time_and_attempt_only(tmp_path: Path) -> None:
    for name, attempt, seconds, reward in [("a", 1, 1.0, 0.5), ("b", 4, 9.0, 0.5), ("c", 1, 1.0, 0.6)]:
        (tmp_path / name).mkdir()
        row = {"step": 1, "attempt": attempt, "time/step_s": seconds, "reward/mean": reward}
        (tmp_path / name / "steps.jsonl").write_text(json.dumps(row) + "\n")
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert differences(tmp_path / "a", tmp_path / "c") == ["steps[0] reward/mean: 0.5 against 0.6"]


def test_ledger_is_exclusive_and_sums_to_the_wall() -> None:
    """A clock that counts 1, 2, 3, ...: every call costs one second."""
    ticks = itertools.count(1)
    ledger = Ledger(lambda: float(next(ticks)))  # opens at 1
    with ledger.phase("sample"), ledger.phase("verify"):  # other 1 (1-2), sample 1 (2-3)
        pass  # verify 1 (3-4), then sample 1 (4-5)
    wall, seconds = ledger.close_step()  # other 1 (5-6)
    assert wall == 5.0 == sum(seconds.values())
    assert {k: v for k, v in seconds.items() if v} == {"sample": 2.0, "verify": 1.0, "other": 2.0}
    assert set(seconds) == set(PHASES)


def test_ledger_counts_waiting_for_an_iterator_only() -> None:
    ticks = itertools.count(1)
    ledger = Ledger(lambda: float(next(ticks)))
    items = list(ledger.waiting("sample", iter("ab")))
    _, seconds = ledger.close_step()
    assert items == ["a", "b"] and seconds["sample"] == 3.0  # two items and the end


def brute_force_pass_at_k(n: int, correct: int, k: int) -> float:
    draws = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
    return sum(any(d) for d in draws) / len(draws)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_against_every_subset(n: int) -> None:
    for correct in range(n + 1):
        for k in range(1, n + 1):
            expected = brute_force_pass_at_k(n, correct, k)
            assert pass_at_k(n, correct, k) == pytest.approx(expected)
    assert math.isnan(pass_at_k(n, n, n + 1))


def test_pass_at_k_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="correct"):
        pass_at_k(3, 4, 1)


def test_wilson_interval() -> None:
    # Wilson (1927) for 8 of 10: centre (.8 + .19207) / 1.38415, half-width from z = 1.95996
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 5)[0] == 0.0 and wilson_interval(5, 5)[1] == 1.0
    assert all(map(math.isnan, wilson_interval(0, 0)))


def test_bootstrap_interval_covers_about_as_often_as_it_says() -> None:
    hits = 0
    for trial in range(200):
        values = uniforms(seed_for(0, "trial", trial), 50)
        low, high = bootstrap_interval(values, seed=trial, resamples=400)
        hits += low <= 0.5 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert all(map(math.isnan, bootstrap_interval([1.0])))


def test_seeds_depend_on_every_argument_and_nothing_else() -> None:
    places = [
        (0, "sample", 1, "p", 0),
        (1, "sample", 1, "p", 0),
        (0, "order", 1, "p", 0),
        (0, "sample", 2, "p", 0),
        (0, "sample", 1, "q", 0),
        (0, "sample", 1, "p", 1),
        (0, "sample", 11, "p", 0),
        (0, "sample", 1, "1p", 0),
    ]
    seeds = [seed_for(*place) for place in places]  # type: ignore[arg-type]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == seed_for(0, "sample", 1, "p", 0) == 1743606167261203305
    assert all(0 <= s < 2**63 for s in seeds)
    assert sorted(permutation(3, 50).tolist()) == list(range(50))


@pytest.mark.parametrize(
    ("pause", "slept", "worked", "counted"),
    [
        (60.0, 60.0, 0.0, 0.0),  # stopped
        (0.1, 3600.0, 0.0, 0.0),  # asleep with the machine
        (60.0, 60.0, 60.0, 60.0),  # a long call into C that lets no other thread run
        (1.0, 1.0, 0.0, 1.0),  # waiting
    ],
)
def test_a_suspended_process_is_not_charged(
    pause: float, slept: float, worked: float, counted: float
) -> None:
    now = [Times(5.0, 100.0, 0.0)]
    clock = RunningClock(lambda: now[-1])
    ledger = Ledger(clock)
    with ledger.phase("sample"):
        now.append(Times(6.0, 101.0, 1.0))
        clock()
        now.append(Times(6.0 + pause, 101.0 + slept, 1.0 + worked))
    gaps = clock.take_gaps()
    assert [round(end - start) for start, end in gaps] == ([round(slept)] if counted == 0.0 else [])
    wall, seconds = ledger.close_step()
    assert wall == pytest.approx(1.0 + counted) and seconds["sample"] == pytest.approx(1.0 + counted)


STOPPED = """
import time
from dash_exp.record import ledger as module
from dash_exp.record.ledger import Ledger, RunningClock
module.SUSPENDED_S = 0.6
clock = RunningClock()
started = time.perf_counter()
with clock.beating():
    ledger = Ledger(clock)
    print("up", flush=True)
    time.sleep(1.5)
    wall, _ = ledger.close_step()
(gap,) = clock.take_gaps()
print(wall, gap[1] - gap[0], time.perf_counter() - started)
"""


def test_a_stopped_process_notes_the_gap() -> None:
    command = [sys.executable, "-c", STOPPED]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.9)
    process.send_signal(signal.SIGCONT)
    wall, gap, total = map(float, process.communicate(timeout=20)[0].split())
    assert gap > 0.8 and wall < total - 0.6


def test_a_checkpoint_is_written_beside_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a copy, and its error comes with the next one; the one before stays."""
    weight, noted, go = torch.zeros(4), [], threading.Event()
    model = tmp_path / "model"
    model.mkdir()
    save = checkpoint.save

    def late(*given: Any) -> Path:
        assert go.wait(10)
        return save(*given)

    monkeypatch.setattr(checkpoint, "save", late)
    saver = checkpoint.Saver(tmp_path, model, 2, lambda step, *_: noted.append(step))
    saver.save(1, checkpoint.Snapshot({"w": weight}, {"exp_avg/w": weight}, {"step": 1}))
    weight += 1
    assert noted == [] and checkpoint.existing(tmp_path) == []
    go.set()
    saver.wait()
    found, _ = checkpoint.latest(tmp_path)
    assert noted == [1] and found is not None
    assert [*found.weights["w"].tolist(), *found.optimizer["exp_avg/w"].tolist()] == [0.0] * 8

    def full(*_: Any) -> Path:
        raise OSError(28, "no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    saver.save(2, checkpoint.Snapshot({"w": weight}, {}, {"step": 2}))
    with pytest.raises(OSError, match="no space left"):
        saver.save(3, found)
    assert [f.name for f in checkpoint.existing(tmp_path)] == ["step-000001"]
    saver.wait()
