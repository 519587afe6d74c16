"""`launch.jsonl` in a cell's folder: what launchers and schedulers did with the cell, and how it ended.

Written by many processes, so each row is one append. Kinds, all with `time` (seconds since the epoch):

    queued   job, sweep             handed to a scheduler; `job` is SLURM's id (`12_3`)
    start    host, pid, job, sweep  a process was started for it (`job`: null on this machine)
    end      exit, failure_class    that process ended; `failure_class` is null after success
    requeue  reason, job            queued again: `timeout`, `preemption`, `node`, `requeued` (by a person),
                                    or a failure's class, if the ranks of a cell must start together
    cancel                          a person asked for its end
    retry                           a person asked for another start: retries are counted from here

Classes of failures:

    out_of_memory  of a GPU or of the machine: it would happen again
    timeout        ended at its job's time limit, or after its warning
    preemption     asked to end by a scheduler, or by a signal that no launcher of ours sent
    node           the machine: lost, its disk or GPU broken, or the process killed (SIGKILL) for no known
                   reason, which is what a lost machine looks like
    nccl           ranks of the learner lost each other
    nan            a loss or gradient was not finite: it would happen again
    config         the user has to fix something (exit code 2)
    verifier       every verdict of a step failed
    unknown        anything else: an exception, a crash
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dash_exp.errors import ExitCode
from dash_exp.record.folder import CellBusy, append_line, lock, read_json, write_json
from dash_exp.record.reading import Row, read_record, read_rows
from dash_exp.signals import STOPPING

NAME = "launch.jsonl"
CLASSES = ("out_of_memory", "timeout", "preemption", "node", "nccl", "nan", "config", "verifier", "unknown")
BY_SCHEDULER = {
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "PREEMPTED": "preemption",
    "NODE_FAIL": "node",
    "BOOT_FAIL": "node",
    "OUT_OF_MEMORY": "out_of_memory",
}
"""States of SLURM that explain an end. The others say no more than the exit code."""
BY_SIGNAL = {
    signal.SIGUSR2: "timeout",
    signal.SIGTERM: "preemption",
    signal.SIGINT: "preemption",
    signal.SIGHUP: "preemption",
    signal.SIGQUIT: "preemption",
    signal.SIGXCPU: "timeout",
    signal.SIGKILL: "node",
}
KERNEL_KILLED = "killed by the kernel: the machine was out of memory"
"""Written after a process's output if the kernel's count of such kills has grown meanwhile."""
BY_TEXT = (
    (
        "out_of_memory",
        r"OutOfMemoryError|[Oo]ut of memory|MemoryError|does not fit into memory|oom-kill"
        r"|less than desired GPU memory"
        r"|(can't|[Cc]annot) allocate memory|CUBLAS_STATUS_ALLOC_FAILED",
    ),
    ("nan", r"FloatingPointError"),
    ("verifier", r"every verdict of step \d+ failed"),
    (
        "node",
        r"uncorrectable ECC|fallen off the bus|Stale file handle|Input/output error"
        r"|Transport endpoint is not connected|Bus error|every server is lost",
    ),
    (
        "nccl",
        r"NCCL[^\n]*([Ee]rror|[Tt]imeout|[Tt]imed out|[Aa]bort)|nccl\w*Error|DistBackendError"
        r"|DistNetworkError|Watchdog caught collective"
        r"|learner\.ranks: rank \d+ (was|gave|ended|failed|did not|could not)",
    ),
)
"""Output to class; the first match counts, so a rank that ran out of memory is not a matter of NCCL."""


def note(folder: Path, kind: str, **facts: object) -> None:
    """Append one row, in one write."""
    append_line(folder / NAME, json.dumps({"time": round(time.time(), 3), "kind": kind, **facts}))


def note_end(folder: Path, exit_code: int, failure_class: str | None) -> None:
    """The `end` row, with the step reached: progress resets the count of retries."""
    step = int(read_json(folder / "status.json").get("step", 0))
    note(folder, "end", exit=exit_code, failure_class=failure_class, step=step)


def read(folder: Path) -> list[Row]:
    """All rows, oldest first; none if nothing was launched."""
    return read_rows(folder / NAME).rows


def since_retry(rows: Iterable[Row]) -> list[Row]:
    """The rows since a person last asked for another start."""
    kept: list[Row] = []
    for row in rows:
        kept = [] if row["kind"] == "retry" else [*kept, row]
    return kept


def set_state(folder: Path, state: str, **more: object) -> bool:
    """Record a state that the cell's own process did not: `failed` if it died without recording one,
    `blocked`, or `cancelled`. Returns whether it was written: never while a process runs the cell, and never
    over `finished` or a damaged status."""
    try:
        held = lock(folder)
    except (CellBusy, OSError):
        return False
    try:
        read = read_record(folder / "status.json")
        known = dict(read.value)
        if read.damage and not known:
            return False
        if known.pop("state", None) == "finished":
            return False
        known.pop("reason", None)
        status = {"attempt": 0, "step": 0, **known, "failure": None, **more}
        write_json(folder / "status.json", {**status, "state": state, "heartbeat": time.time()})
    except OSError:
        return False
    finally:
        os.close(held)
    return True


def is_done(folder: Path) -> bool:
    """Whether nothing is left to do for a cell. One that was killed between its last status and its clean-up
    is `finished` but keeps its state to resume, which another start removes."""
    finished = read_json(folder / "status.json").get("state") == "finished"
    return finished and not any(folder.glob("checkpoints/*/resume"))


def is_cancelled(rows: Sequence[Row]) -> bool:
    """Whether a person asked for the cell's end, and nobody has asked for another start since."""
    last = next((r["kind"] for r in reversed(rows) if r["kind"] in ("queued", "retry", "cancel")), None)
    return last == "cancel"


def classify(exit_code: int, status: Row, output_tail: str, scheduler_state: str | None = None) -> str:
    """The class of an end that was no success. `exit_code`: negative, or 128 + n, for signal n. `status`:
    what the process recorded last, {} if nothing. `output_tail`: the end of its output.

    The scheduler's reason counts first, then what the cell recorded, then its output, then the code.
    """
    words = (scheduler_state or "").split()  # "CANCELLED by 1000"
    known = BY_SCHEDULER.get(words[0].rstrip("+")) if words else None
    if known:
        return known
    number = signal_of(exit_code)
    if number in STOPPING:  # asked to end, and so it did
        return BY_SIGNAL[number]
    for text in (str(status.get("failure") or ""), output_tail):
        for name, pattern in BY_TEXT:
            if re.search(pattern, text):
                return name
    if exit_code == ExitCode.USER_ERROR:
        return "config"
    return BY_SIGNAL.get(number, "unknown") if number else "unknown"


def signal_of(exit_code: int) -> signal.Signals | None:
    """The signal that an exit code stands for."""
    number = -exit_code if exit_code < 0 else exit_code - ExitCode.SIGNALLED
    try:
        return signal.Signals(number)
    except ValueError:
        return None


def may_retry(failure_class: str, rows: Iterable[Row], retries: Mapping[str, int]) -> bool:
    """Whether a cell that has just failed like this, its `end` row written, may be started again.

    Failures of this class are counted since a person last asked for a start and since the cell last made
    progress: a run of weeks may lose its machine every day.
    """
    ends = [row for row in since_retry(rows) if row["kind"] == "end" and row.get("failure_class")]
    classes: list[str] = []
    furthest = -1
    for row in ends:
        step = int(row.get("step", 0))
        classes = [*classes, row["failure_class"]] if step <= furthest else [row["failure_class"]]
        furthest = max(furthest, step)
    return classes.count(failure_class) <= retries.get(failure_class, 0)
