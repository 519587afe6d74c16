"""What state a cell is in, by its record, the processes of this machine and what SLURM reports of its job:
the one rule, for `sweep` and for trackers.

status.json holds what the last run recorded. A run that was killed recorded "running" and cannot correct
that, so the state also depends on whether its process still exists: on this machine by the lock it holds,
under SLURM by the queue, elsewhere by the age of its heartbeat.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from dash_exp.record import journal
from dash_exp.record.folder import last_attempts
from dash_exp.record.journal import BY_SCHEDULER
from dash_exp.record.locks import HERE, Locks, is_alive, runs
from dash_exp.record.reading import Damage, Row, parse_rows, read_record, read_rows, summary, unusable
from dash_exp.text import end_of, format_seconds

LOST = ("preemption", "timeout", "node")
"""Failure classes that are not the cell's fault: its machine was taken away."""
NOTHING_DONE = (0, 3)
"""Exit codes of a process that recorded nothing: the cell was finished already, or is blocked."""
QUIET_S, QUIET_STEPS, QUIET_BEFORE_STEPS_S = 900.0, 10, 3600.0
"""A run on another machine, which cannot be queried from here, counts as dead if its heartbeat is older than
QUIET_STEPS of its own steps, at least QUIET_S; before its first step, while it builds and evaluates,
QUIET_BEFORE_STEPS_S."""

RECENT_STEPS = 10
STEP_BYTES = 24_000
"""More than ten rows of steps.jsonl."""


class JobReport(Protocol):
    """What SLURM reports of a job: `queued`, `running`, `completing`, `ended` or `unknown`, its own word, and
    why it waits."""

    @property
    def state(self) -> str: ...
    @property
    def word(self) -> str | None: ...
    @property
    def reason(self) -> str | None: ...


class Derived(NamedTuple):
    """A state, a note on it, and of a failure its text and class."""

    state: str
    note: str = ""
    failure: str | None = None
    failure_class: str | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about a cell's last run: its status and journal and, once they were looked up, its
    process on this machine (`pid`), what SLURM reports about its newest job (`job`), its pace, and the time
    `now`."""

    folder: Path
    status: Row
    rows: Sequence[Row] = field(default_factory=list)
    pid: int | None = None
    job: JobReport | None = None
    step_s: float | None = None
    now: float = 0.0
    damage: tuple[Damage, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        status, rows = read_record(folder / "status.json"), read_rows(folder / journal.NAME)
        return cls(folder, status.value, rows.rows, damage=(*status.damage, *rows.damage))

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


def derive_state(seen: Evidence) -> Derived:
    """The state of a cell and why. A live process, or a job in the queue, overrides what is recorded."""

    recorded, reason = seen.recorded, str(seen.status.get("reason") or "")
    if recorded == "finished":
        return Derived("finished", reason)
    active = _active(seen)
    if active is not None:
        return Derived(*active)
    if seen.damage and not seen.status and (seen.folder / "status.json").exists():
        return Derived("failed", "", f"damaged: {summary(seen.damage)}", "config")
    if recorded == "running" or seen.recorded_nothing:
        return _died(seen)
    failure, kind = seen.status.get("failure"), seen.end.get("failure_class")
    if recorded in ("failed", "cancelled") and seen.time_of("retry", "queued") > seen.heartbeat:
        return Derived("pending", f"{recorded} before" + (f": {failure}" if failure else ""))
    if recorded == "failed":
        return Derived("failed", "", failure, kind)
    if recorded == "cancelled" or seen.was_cancelled:
        return Derived("cancelled")
    return Derived(recorded, reason, failure, kind)


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


def _died(seen: Evidence) -> Derived:
    """After a run that recorded no end: killed, or refused before it took
    the cell's lock."""
    code, kind = seen.end.get("exit"), seen.end.get("failure_class")
    if seen.end and code in NOTHING_DONE:
        return Derived(seen.recorded.replace("running", "interrupted"))
    if seen.was_cancelled:
        return Derived("cancelled")
    if seen.end:
        state = "interrupted" if kind in LOST or kind is None else "failed"
        return Derived(state, "", f"ended with exit code {code}", kind)
    word = seen.job.word if seen.job else None
    kind = BY_SCHEDULER.get(word or "")
    where = "" if seen.is_here else f" on {seen.host}"
    age = "" if seen.silent_s is None else f", last seen {format_seconds(seen.silent_s)} ago"
    note = f"job {seen.job_id}: {word}" if kind else f"exited{where} without recording a status{age}"
    return Derived("failed" if kind == "out_of_memory" else "interrupted", note, None, kind)


def state_here(folder: Path, now: float, ended: int | None = None) -> str:
    """A cell's state as far as this machine knows it, without asking SLURM. `ended`: an attempt known to have
    ended, whatever its status says."""
    seen = Evidence.read(folder)
    if ended is not None and seen.recorded == "running" and seen.status.get("attempt") == ended:
        return "interrupted"
    step_s = median_of(recent_steps(folder)[0], "time/step_s")
    return derive_state(replace(seen, pid=seen.process(Locks.now()), step_s=step_s, now=now)).state


def recent_steps(folder: Path) -> tuple[list[Row], tuple[Damage, ...]]:
    """The last ten steps that count, as a resumed run repeats some of the steps before it; and what is
    damaged among the last rows."""
    rows, damage = last_rows(folder / "steps.jsonl", 2 * RECENT_STEPS)
    return last_attempts(row for row in rows if row["step"] <= rows[-1]["step"])[-RECENT_STEPS:], damage


def median_of(rows: Iterable[Row], key: str) -> float | None:
    values = [float(row[key]) for row in rows if key in row]
    return statistics.median(values) if values else None


def last_rows(path: Path, count: int, size: int = STEP_BYTES) -> tuple[list[Row], tuple[Damage, ...]]:
    """The last rows of a JSON-lines file, oldest first, and what is damaged at its end."""
    if damage := unusable(path):
        return [], (damage,)
    data = end_of(path, size)
    from_start = data and len(data) < size and path.stat().st_size == len(data)
    found = parse_rows(path, data, 1 if from_start else None)
    return found.rows[-count:], found.damage
