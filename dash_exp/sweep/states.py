"""The state of one cell, derived from its record, the processes of this machine and SLURM's queue.

status.json holds what the last run recorded. A run that was killed recorded "running" and cannot correct
that, so the state also depends on whether its process still exists: on this machine by the lock it holds,
under SLURM by the queue, elsewhere by the age of its heartbeat.
"""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dash_exp.record import journal
from dash_exp.record.folder import Row, last_attempts, read_json
from dash_exp.record.journal import BY_SCHEDULER
from dash_exp.record.locks import HERE, Locks, is_alive, runs
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.slurm.queue import JobState
from dash_exp.text import end_of, format_seconds

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SHOWN = ("running", "queued", "pending", "blocked", "interrupted", "failed", "cancelled", "finished")
ACTIVE = ("running", "queued")
LOST = ("preemption", "timeout", "node")
"""Failure classes that are not the cell's fault: its machine was taken away."""
NOTHING_DONE = (0, 3)
"""Exit codes of a process that recorded nothing: the cell was finished already, or is blocked."""
QUIET_S, QUIET_STEPS, QUIET_BEFORE_STEPS_S = 900.0, 10, 3600.0
"""A run on another machine, which cannot be queried from here, counts as dead if its heartbeat is older than
QUIET_STEPS of its own steps, at least QUIET_S; before its first step, while it builds and evaluates,
QUIET_BEFORE_STEPS_S."""

RECENT_STEPS, RECENT_REWARDS = 10, 5
STEP_BYTES = 24_000
"""More than ten rows of steps.jsonl."""
STEPS = re.compile(r"^algorithm:\n(?:  .*\n)*?  steps: (\d+)$", re.MULTILINE)
SECONDS = re.compile(r"^budget:\n(?:  .*\n)*?  seconds: ([\d.e+-]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class CellState:
    """A cell as it is now. `step_s`: seconds per step, the median of the last ten; `reward`: mean of the last
    five; `eta_s`: seconds until a running cell has trained; `heartbeat_s`: age of its last status. None: not
    known."""

    folder: Path
    state: str
    note: str = ""
    attempt: int = 0
    step: int = 0
    steps: int | None = None
    reward: float | None = None
    step_s: float | None = None
    eta_s: float | None = None
    heartbeat_s: float | None = None
    host: str | None = None
    pid: int | None = None
    job: str | None = None
    failure: str | None = None
    failure_class: str | None = None
    stale: bool = False

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about a cell's last run: its status and journal and, once they were looked up, its
    process on this machine (`pid`), what SLURM reports about its newest job (`job`), its pace, and the time
    `now`."""

    folder: Path
    status: Row
    rows: Sequence[Row] = field(default_factory=list)
    pid: int | None = None
    job: JobState | None = None
    step_s: float | None = None
    now: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        return cls(folder, read_json(folder / "status.json"), journal.read(folder))

    def last(self, *kinds: str) -> Row:
        """The newest row of these kinds; {} without one."""
        return next((row for row in reversed(self.rows) if row["kind"] in kinds), {})

    def time_of(self, *kinds: str) -> float:
        """When the newest row of these kinds was written; 0 without one."""
        return max((float(row["time"]) for row in self.rows if row["kind"] in kinds), default=0.0)

    @property
    def recorded(self) -> str:
        """The state that status.json holds."""
        return str(self.status.get("state", "pending"))

    @property
    def heartbeat(self) -> float:
        return float(self.status.get("heartbeat", 0.0))

    @property
    def end(self) -> Row:
        """The row of the last end, unless a start followed it."""
        last = self.last("start", "end")
        return last if last.get("kind") == "end" else {}

    @property
    def open_start(self) -> Row:
        """The last start, unless its end is written."""
        return self.last("start") if self.time_of("start") > self.time_of("end") else {}

    @property
    def job_id(self) -> str | None:
        """SLURM's id of the cell's job; None if it was last started without one."""
        job = self.last("queued", "start", "requeue").get("job")
        return str(job) if job else None

    @property
    def host(self) -> str | None:
        """Where it ran last."""
        start, host = self.last("start"), self.status.get("host")
        newer = host is None or float(start.get("time", 0)) > self.heartbeat
        return (start.get("host") or host) if newer else str(host)

    @property
    def is_here(self) -> bool:
        return self.host in (None, HERE)

    @property
    def silent_s(self) -> float | None:
        """Seconds since its run recorded anything, or was started."""
        heartbeat = self.heartbeat if self.status.get("attempt", 0) else 0.0
        newest = max(heartbeat, self.last("start").get("time", 0.0))
        return max(0.0, self.now - newest) if newest else None

    @property
    def recorded_nothing(self) -> bool:
        """Whether the last start is newer than the status."""
        return self.time_of("start") > self.heartbeat

    @property
    def asked_to_end(self) -> bool:
        return self.time_of("cancel") > self.time_of("start", "queued", "requeue", "retry")

    @property
    def was_cancelled(self) -> bool:
        by_slurm = self.job is not None and self.job.word == "CANCELLED"
        return self.asked_to_end or (by_slurm and self.time_of("queued", "start") > self.time_of("retry"))

    def process(self, locks: Locks) -> int | None:
        """The process on this machine that runs the cell, or is about to."""
        holder = locks.holder(self.folder / ".lock")
        if holder is not None:
            return holder
        status = self.status if self.recorded == "running" else {}
        if not locks.known and status.get("host") == HERE and is_alive(int(status.get("pid", 0))):
            return int(status["pid"])
        pid, host = self.open_start.get("pid"), self.open_start.get("host")
        return pid if host == HERE and isinstance(pid, int) and runs(pid, self.folder.name) else None


def derive_state(seen: Evidence) -> CellState:
    """The state of a cell and why. A live process, or a job in the queue, overrides what is recorded."""

    def found(state: str, note: str = "", failure: str | None = None, kind: str | None = None) -> CellState:
        return CellState(seen.folder, state, note, failure=failure, failure_class=kind)

    recorded, reason = seen.recorded, str(seen.status.get("reason") or "")
    if recorded == "finished":
        return found("finished", reason)
    active = _active(seen)
    if active is not None:
        return found(*active)
    if recorded == "running" or seen.recorded_nothing:
        return found(*_died(seen))
    failure, kind = seen.status.get("failure"), seen.end.get("failure_class")
    if recorded in ("failed", "cancelled") and seen.time_of("retry", "queued") > seen.heartbeat:
        return found("pending", f"{recorded} before" + (f": {failure}" if failure else ""))
    if recorded == "failed":
        return found("failed", "", failure, kind)
    if recorded == "cancelled" or seen.was_cancelled:
        return found("cancelled")
    return found(recorded, reason, failure, kind)


def _active(seen: Evidence) -> tuple[str, str] | None:
    """`running` or `queued`, and a note; None if the cell is neither."""
    asked = "asked to end" if seen.asked_to_end else ""
    if seen.pid is not None:
        return "running", asked
    job = seen.job.state if seen.job else "unknown"
    if seen.job and job == "queued":
        return "queued", seen.job.reason or ""
    submitted = seen.time_of("queued", "requeue")
    ended = bool(seen.end) and seen.time_of("end") >= submitted
    if job in ("running", "completing") and not ended:  # else the job has noted its end
        return "running", asked or ("" if seen.recorded == "running" else "starting")
    if job != "unknown" or ended:
        return None
    if not seen.is_here and (seen.recorded == "running" or seen.recorded_nothing):  # cannot be queried
        limit_s = QUIET_BEFORE_STEPS_S if seen.step_s is None else max(QUIET_S, QUIET_STEPS * seen.step_s)
        silent_s = seen.silent_s or 0.0
        if silent_s <= limit_s:
            return "running", f"on {seen.host}, last seen {format_seconds(silent_s)} ago"
    if submitted > seen.time_of("start", "cancel", "retry"):
        return "queued", "squeue does not answer here"
    return None


def _died(seen: Evidence) -> tuple[str, str, str | None, str | None]:
    """State, note, failure and its class after a run that recorded no end: killed, or refused before it took
    the cell's lock."""
    code, kind = seen.end.get("exit"), seen.end.get("failure_class")
    if seen.end and code in NOTHING_DONE:
        return seen.recorded.replace("running", "interrupted"), "", None, None
    if seen.was_cancelled:
        return "cancelled", "", None, None
    if seen.end:
        state = "interrupted" if kind in LOST or kind is None else "failed"
        return state, "", f"ended with exit code {code}", kind
    word = seen.job.word if seen.job else None
    kind = BY_SCHEDULER.get(word or "")
    where = "" if seen.is_here else f" on {seen.host}"
    age = "" if seen.silent_s is None else f", last seen {format_seconds(seen.silent_s)} ago"
    note = f"job {seen.job_id}: {word}" if kind else f"exited{where} without recording a status{age}"
    return "failed" if kind == "out_of_memory" else "interrupted", note, None, kind


def state_of(folder: Path, now: float, jobs: Mapping[str, JobState] | None = None) -> CellState:
    """The state of one cell; see `states_of`."""
    return states_of([folder], now, jobs=jobs)[0]


def states_of(
    folders: Iterable[Path],
    now: float,
    *,
    jobs: Mapping[str, JobState] | None = None,
    code: str | None = None,
) -> list[CellState]:
    """The states of many cells, in their order. `jobs`: what SLURM reports about their jobs; None: SLURM is
    asked, once for all of them. `code`: the code's hash, to mark finished cells of other code as stale."""
    seen = [Evidence.read(folder) for folder in folders]
    if jobs is None:
        jobs = queue.jobs(one.job_id for one in seen if one.job_id and one.recorded != "finished")
    # Locks after statuses: a run that recorded "running" and holds no lock now has ended since.
    locks = Locks.now()
    pids = [one.process(locks) for one in seen]
    running = [n for n, one in enumerate(seen) if one.recorded == "running" or one.open_start]
    doubtful = [n for n in running if pids[n] is None]
    if doubtful:  # it may have recorded its end meanwhile; and the kernel's table is not read atomically
        seen = [Evidence.read(one.folder) if n in doubtful else one for n, one in enumerate(seen)]
        locks = Locks.now()
        pids = [one.process(locks) if n in doubtful else pids[n] for n, one in enumerate(seen)]
    found = [replace(one, pid=pid, now=now) for one, pid in zip(seen, pids, strict=True)]
    return [_with_progress(one, jobs, code) for one in found]


def _with_progress(seen: Evidence, jobs: Mapping[str, JobState], code: str | None) -> CellState:
    status, folder = seen.status, seen.folder
    attempt, step = int(status.get("attempt", 0)), int(status.get("step", 0))
    rows = recent_steps(folder) if attempt else []
    step_s, steps = median_of(rows, "time/step_s"), steps_of(status, folder)
    rewards = [float(row["reward/mean"]) for row in rows[-RECENT_REWARDS:] if "reward/mean" in row]
    state = derive_state(replace(seen, step_s=step_s, job=jobs.get(seen.job_id or "")))
    return replace(
        state,
        attempt=attempt,
        step=step,
        steps=steps,
        reward=statistics.fmean(rewards) if rewards else None,
        step_s=step_s,
        eta_s=_remaining_s(folder, step, steps, step_s) if state.state == "running" else None,
        heartbeat_s=max(0.0, seen.now - seen.heartbeat) if attempt else None,
        host=seen.host,
        pid=seen.pid,
        job=seen.job_id,
        stale=code is not None and state.state == "finished" and is_stale(folder, code),
    )


def recent_steps(folder: Path) -> list[Row]:
    """The last ten steps that count: a resumed run repeats some of the steps before it."""
    read = last_rows(folder / "steps.jsonl", 2 * RECENT_STEPS)
    rows = [row for row in read if "step" in row and "attempt" in row]
    return last_attempts(row for row in rows if row["step"] <= rows[-1]["step"])[-RECENT_STEPS:]


def median_of(rows: Iterable[Row], key: str) -> float | None:
    values = [float(row[key]) for row in rows if key in row]
    return statistics.median(values) if values else None


def steps_of(status: Row, folder: Path) -> int | None:
    """How many steps a cell plans, by its run, else by its config; None while it only counts epochs."""
    if isinstance(status.get("steps"), int):
        return int(status["steps"])
    found = _in_config(folder, STEPS)
    return int(found) if found else None


def _remaining_s(folder: Path, step: int, steps: int | None, step_s: float | None) -> float | None:
    """Seconds of training that remain, at the pace of the last steps; a budget may end it earlier."""
    if steps is None or step_s is None:
        return None
    remaining = step_s * max(0, steps - step)
    given = (read_json(folder / "provenance.json").get("budget") or {}).get("seconds")
    budget = given if given is not None else _in_config(folder, SECONDS)
    return remaining if budget is None else max(0.0, min(remaining, float(budget) - step_s * step))


def _in_config(folder: Path, pattern: re.Pattern[str]) -> str | None:
    """A number from a frozen config. Parsing the yaml of a thousand cells would take too long."""
    with suppress(OSError):
        found = pattern.search((folder / "config.yaml").read_text(encoding="utf-8"))
        return found.group(1) if found else None
    return None


@functools.lru_cache(maxsize=256)
def frozen_values(folder: Path) -> dict[str, Any]:
    """A cell's frozen config as plain values, read once: it never changes. Raises OSError and YAMLError."""
    loaded: dict[str, Any] = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), LOADER)
    return loaded


def recorded_state(folder: Path) -> str:
    """The state that a cell's status.json holds."""
    return str(read_json(folder / "status.json").get("state", "pending"))


def names_by_id(cells: Path) -> dict[str, str]:
    """Names of all cells' folders in `cells`, by id."""
    try:
        names = os.listdir(cells)
    except OSError:
        return {}
    return {name.rpartition("-")[2]: name for name in names if "-" in name}


def folder_of(cells: Path, cell_id: str) -> Path | None:
    """The folder in `cells` of the cell with this id, if it exists."""
    return next(iter(sorted(cells.glob(f"*-{cell_id}"))), None)


def open_need(cells: Path, need: str) -> str | None:
    """The name and recorded state of a needed cell; None if it is finished."""
    folder = folder_of(cells, need)
    if folder is None:
        return f"{need} (missing)"
    state = recorded_state(folder)
    return None if state == "finished" else f"{folder.name} ({state})"


def is_stale(folder: Path, code: str) -> bool:
    """Whether a record was made by other code."""
    return read_json(folder / "provenance.json").get("code_hash") != code


def last_rows(path: Path, count: int, size: int = STEP_BYTES) -> list[Row]:
    """The last complete rows of a JSON-lines file, oldest first."""
    rows: list[Row] = []
    for line in reversed(end_of(path, size).splitlines()):
        with suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
        if len(rows) == count:
            break
    return rows[::-1]
