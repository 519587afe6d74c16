"""Classes of failures from what a process left behind, and how often a class may come again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dash_exp.record import journal
from dash_exp.record.folder import Row, lock, read_json, write_json
from dash_exp.record.journal import (
    CLASSES,
    KERNEL_KILLED,
    classify,
    is_cancelled,
    may_retry,
    note_end,
    set_state,
)

LOST_RANK = "dash_exp: 1 problem, what was recorded is kept\n  learner.ranks: rank 1 was killed by SIGKILL"
NO_VERDICT = "dash_exp: 1 problem\n  verifier: every verdict of step 3 failed: no worker"
TIGHT = "learner.micro_batch_tokens: a micro-batch of the longest samples (9 tokens) does not fit into memory"


@pytest.mark.parametrize(
    ("code", "failure", "output", "scheduler", "expected"),
    [
        (1, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "", None, "out_of_memory"),
        (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory", "", None, "out_of_memory"),
        (2, TIGHT, "", None, "out_of_memory"),
        (-9, None, f"loading\n{KERNEL_KILLED}", None, "out_of_memory"),
        (1, None, "slurmstepd: error: Detected 1 oom-kill event(s)", None, "out_of_memory"),
        (2, "learner.ranks: rank 1 failed: OutOfMemoryError: CUDA out of memory", "", None, "out_of_memory"),
        (0, None, "", "OUT_OF_MEMORY", "out_of_memory"),
        (143, "SIGTERM", "", "TIMEOUT", "timeout"),
        (128 + signal.SIGUSR2, "SIGUSR2", "", None, "timeout"),
        (-15, None, "", None, "preemption"),
        (143, "SIGTERM", "", "PREEMPTED", "preemption"),
        (1, None, "", "NODE_FAIL", "node"),
        (-9, None, "step 3", None, "node"),
        (137, None, "", "FAILED", "node"),
        (1, "OSError: [Errno 116] Stale file handle: 'x'", "", None, "node"),
        (2, "sampler.restarts: every server is lost: server-0 at http://n1:8000: no token", "", None, "node"),
        (2, LOST_RANK, "", None, "nccl"),
        (1, "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp", "", None, "nccl"),
        (-6, None, "[Rank 1] Watchdog caught collective operation timeout", None, "nccl"),
        (1, "FloatingPointError: the gradient of step 4 is infinite or not a number", "", None, "nan"),
        (2, "dash_exp: 1 problem\n  data.jsonl:3: not valid JSON", "", None, "config"),
        (2, None, "", None, "config"),
        (2, NO_VERDICT, "", None, "verifier"),
        (1, "KeyError: 'x'", "NCCL version 2.27.5+cuda12.9", None, "unknown"),
        (1, "KeyError: 'x'", "warning: a gradient was infinite or not a number", "FAILED", "unknown"),
        (-11, None, "", "CANCELLED by 1000", "unknown"),
    ],
)
def test_classes(code: int, failure: str | None, output: str, scheduler: str | None, expected: str) -> None:
    assert classify(code, {"failure": failure} if failure else {}, output, scheduler) == expected
    assert expected in CLASSES


def ends(*pairs: tuple[str, int]) -> list[Row]:
    return [
        {"time": n, "kind": "end", "exit": 1, "failure_class": kind, "step": step}
        for n, (kind, step) in enumerate(pairs)
    ]


def test_a_class_may_come_as_often_as_its_budget_says() -> None:
    budget = {"node": 2, "nan": 0}
    assert may_retry("node", ends(("node", 0)), budget)
    assert may_retry("node", ends(("node", 0), ("node", 0)), budget)
    assert not may_retry("node", ends(("node", 0), ("node", 0), ("node", 0)), budget)
    assert not may_retry("nan", ends(("nan", 0)), budget)
    assert not may_retry("verifier", ends(("verifier", 0)), budget)  # not named: never
    assert may_retry("node", ends(("node", 0), ("nccl", 0), ("node", 0)), budget)  # each has its own


def test_budgets_count_anew_when_the_cell_got_further() -> None:
    budget = {"node": 1}
    assert may_retry("node", ends(("node", 2), ("node", 3), ("node", 9)), budget)
    assert not may_retry("node", ends(("node", 2), ("node", 3), ("node", 3)), budget)
    # further means further than ever: from a checkpoint at 2 to where it failed before is no progress
    assert not may_retry("node", ends(("node", 3), ("node", 2)), budget)
    assert not may_retry("node", ends(("node", 3), ("node", 2), ("node", 3)), budget)


def test_budgets_count_anew_when_a_person_asks() -> None:
    rows = [*ends(("unknown", 1), ("unknown", 1)), {"time": 9, "kind": "retry"}, *ends(("unknown", 1))]
    assert may_retry("unknown", rows, {"unknown": 1})
    assert not may_retry("unknown", [*rows, *ends(("unknown", 1))], {"unknown": 1})


def test_ends_that_are_no_failures_do_not_count() -> None:
    rows = [{"time": 0, "kind": "end", "exit": 143, "failure_class": None, "step": 0}, *ends(("node", 0))]
    assert may_retry("node", rows, {"node": 1})


def test_who_asked_last_decides_whether_a_cell_is_cancelled() -> None:
    def rows(*kinds: str) -> list[Row]:
        return [{"time": n, "kind": kind} for n, kind in enumerate(kinds)]

    assert not is_cancelled([])
    assert is_cancelled(rows("start", "cancel", "end"))
    assert not is_cancelled(rows("cancel", "retry", "start"))
    assert not is_cancelled(rows("cancel", "queued"))
    assert is_cancelled(rows("cancel", "retry", "cancel", "end"))


def test_a_state_is_written_only_where_nobody_says_it_better(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"state": "running", "attempt": 3, "step": 5, "heartbeat": 1.0})
    assert set_state(tmp_path, "failed", failure="killed by SIGKILL")
    status = read_json(tmp_path / "status.json")
    assert (status["state"], status["attempt"], status["step"]) == ("failed", 3, 5)
    assert status["failure"] == "killed by SIGKILL" and status["heartbeat"] > 1
    held = lock(tmp_path)
    assert not set_state(tmp_path, "cancelled")
    import os

    os.close(held)
    assert set_state(tmp_path, "blocked", reason="waits") and set_state(tmp_path, "cancelled")
    assert "reason" not in read_json(tmp_path / "status.json")
    write_json(tmp_path / "status.json", {"state": "finished"})
    assert not set_state(tmp_path, "cancelled")


def test_an_end_is_noted_with_the_step_that_was_reached(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"state": "failed", "step": 7})
    note_end(tmp_path, 1, "nan")
    (row,) = journal.read(tmp_path)
    assert (row["kind"], row["exit"], row["failure_class"], row["step"]) == ("end", 1, "nan", 7)
