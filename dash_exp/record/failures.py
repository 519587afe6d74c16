"""Why a cell's process ended, as one of a few classes, and whether another start makes sense. Torch-free.

    out_of_memory  of a GPU or of the machine: it would happen again
    timeout        ended at its job's time limit, or warned of it
    preemption     somebody else asked it to end: a scheduler, or a signal that no launcher of ours sent
    node           the machine: lost, its disk or GPU broken, or the process killed (SIGKILL) unexplained
    nccl           ranks of the learner lost each other
    nan            a loss or gradient was no number: it would happen again
    config         what the user has to mend (exit code 2)
    verifier       every verdict of a step failed
    unknown        anything else: an exception, a crash

A process that was killed without a word counts as `node`, since that is what it looks like when a machine
goes away; where the kernel is known to have killed for memory, whoever watched it says so in the output.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping

from dash_exp.errors import ExitCode
from dash_exp.record import journal
from dash_exp.record.folder import Row

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
    signal.SIGXCPU: "timeout",
    signal.SIGKILL: "node",
}
KERNEL_KILLED = "killed by the kernel: the machine was out of memory"
"""Written after a process's output where the kernel's count of such kills has grown meanwhile."""

BY_TEXT = (
    (
        "out_of_memory",
        r"OutOfMemoryError|[Oo]ut of memory|MemoryError|does not fit into memory|oom-kill"
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
"""What was said to a class; the first that matches counts (a rank that ran out of memory is no matter of
communication)."""


def classify(exit_code: int, status: Row, output_tail: str, scheduler_state: str | None = None) -> str:
    """The class of an end that was no success. `exit_code`: negative, or 128 + n, for signal n. `status`:
    what the process recorded last, {} where it recorded nothing. `output_tail`: the end of what it said.

    What the scheduler knows counts first, then what the cell recorded, then its output, then the code.
    """
    words = (scheduler_state or "").split()  # "CANCELLED by 1000"
    known = BY_SCHEDULER.get(words[0].rstrip("+")) if words else None
    if known:
        return known
    number = signal_of(exit_code)
    if number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):  # asked to end, and so it did
        return BY_SIGNAL[number]
    said = str(status.get("failure") or "")
    for text in (said, output_tail):
        for name, pattern in BY_TEXT:
            if re.search(pattern, text):
                return name
    if exit_code == ExitCode.USER_ERROR:
        return "config"
    return BY_SIGNAL.get(number, "unknown") if number else "unknown"


def signal_of(exit_code: int) -> signal.Signals | None:
    """The signal that an exit code tells of."""
    number = -exit_code if exit_code < 0 else exit_code - ExitCode.SIGNALLED
    try:
        return signal.Signals(number)
    except ValueError:
        return None


def may_retry(failure_class: str, rows: Iterable[Row], retries: Mapping[str, int]) -> bool:
    """Whether a cell that has just failed so, with the row of this end written, may be started again.

    Counted are the failures of this class since a person last asked for a start, and since the cell last
    got further: a run of weeks may lose its machine every day.
    """
    ends = [row for row in journal.since_retry(rows) if row["kind"] == "end" and row.get("failure_class")]
    return _standing_still(ends).count(failure_class) <= retries.get(failure_class, 0)


def _standing_still(ends: list[Row]) -> list[str]:
    """Classes of the failures after which the cell got no further, the last one included."""
    found: list[str] = []
    furthest = -1
    for row in ends:
        step = int(row.get("step", 0))
        found = [*found, row["failure_class"]] if step <= furthest else [row["failure_class"]]
        furthest = max(furthest, step)
    return found
