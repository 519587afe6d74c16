"""`launch.jsonl` in a cell's folder: what launchers and schedulers did with the cell. Torch-free.

Written by many processes, so each row is one append. Kinds, all with `time` (seconds since the epoch):

    queued   job, sweep             handed to a scheduler; `job` is SLURM's id (`12_3`)
    start    host, pid, job, sweep  a process was started for it (`job`: null on this machine)
    end      exit, failure_class    that process ended; `failure_class` is null after success
    requeue  reason, job            queued anew: `timeout`, `preemption`, `node`, `requeued` (by a person), or
                                    the class of a failure, where the ranks of a cell must start together
    cancel                          a person asked for its end
    retry                           a person asked for another start: budgets count anew
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from dash_exp.record.folder import Row, read_rows

NAME = "launch.jsonl"


def note(folder: Path, kind: str, **facts: object) -> None:
    """Append one row, in one write."""
    line = json.dumps({"time": round(time.time(), 3), "kind": kind, **facts}) + "\n"
    descriptor = os.open(folder / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(folder: Path) -> list[Row]:
    """All rows, oldest first; none where nothing was launched."""
    return read_rows(folder / NAME).rows


def since_retry(rows: Iterable[Row]) -> list[Row]:
    """The rows since a person last asked for another start."""
    kept: list[Row] = []
    for row in rows:
        kept = [] if row["kind"] == "retry" else [*kept, row]
    return kept
