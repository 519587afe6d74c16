"""From what is known of a cell's run to its state: pure, so that every case can be tried. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dash_exp.record.failures import BY_SCHEDULER
from dash_exp.record.folder import Row
from dash_exp.sweep.slurm.queue import JobState
from dash_exp.text import format_seconds

QUIET_S = 900.0
QUIET_STEPS = 10
QUIET_BEFORE_STEPS_S = 3600.0
"""A run elsewhere that nobody can ask is taken for dead after so long without a word: after so many of
its own steps, and never sooner than that; before its first step it builds and evaluates."""

LOST = ("preemption", "timeout", "node")
"""Failure classes that are no failure of the cell: it was taken its machine."""
BLOCKED_EXIT = 3


@dataclass(frozen=True, slots=True)
class Evidence:
    """What can be known of a cell's last run. `pid`: its process on this machine, `here`: it ran on this
    machine (or nobody knows where); `job`: what the queue says of its newest job, `job_id`."""

    status: Row
    rows: Sequence[Row]
    pid: int | None = None
    here: bool = True
    host: str | None = None
    silent_s: float | None = None
    step_s: float | None = None
    job: JobState | None = None
    job_id: str | None = None

    def time_of(self, *kinds: str) -> float:
        """When the last row of these kinds was written, 0 without one."""
        return max((float(row["time"]) for row in self.rows if row["kind"] in kinds), default=0.0)

    def end(self) -> Row:
        """The row of the last end, if no start has followed it."""
        last = next((row for row in reversed(self.rows) if row["kind"] in ("start", "end")), {})
        return last if last.get("kind") == "end" else {}


@dataclass(frozen=True, slots=True)
class Verdict:
    state: str
    note: str = ""
    failure: str | None = None
    failure_class: str | None = None


def judge(seen: Evidence) -> Verdict:
    """The state of a cell. What a live process or the queue shows wins over what was written."""
    said = str(seen.status.get("state", "pending"))
    if said == "finished":
        return Verdict("finished", str(seen.status.get("reason") or ""))
    active = _active(seen, said)
    if active is not None:
        return active
    if said == "running" or _started_without_a_word(seen):
        return _died(seen)
    failure, kind = seen.status.get("failure"), seen.end().get("failure_class")
    if said in ("failed", "cancelled") and _asked_again(seen):
        return Verdict("pending", f"{said} before" + (f": {failure}" if failure else ""))
    if said == "failed":
        return Verdict("failed", failure=failure, failure_class=kind)
    if said == "cancelled" or _cancelled(seen):
        return Verdict("cancelled")
    return Verdict(said, str(seen.status.get("reason") or ""), failure, kind)


def _active(seen: Evidence, said: str) -> Verdict | None:
    """Running, or waiting in a queue; None where neither is so."""
    asked = "asked to end" if _asked_to_end(seen) else ""
    if seen.pid is not None:
        return Verdict("running", asked)
    job = seen.job.state if seen.job else "unknown"
    if seen.job and job == "queued":
        return Verdict("queued", seen.job.reason or "")
    submitted = seen.time_of("queued", "requeue")
    ended = bool(seen.end()) and seen.time_of("end") >= submitted
    if job in ("running", "completing") and not ended:  # else the job's pool would have seen its end
        return Verdict("running", asked or ("" if said == "running" else "starting"))
    if job != "unknown" or ended:
        return None
    if not seen.here and (said == "running" or _started_without_a_word(seen)):  # nobody to ask
        silent = seen.silent_s or 0.0
        if silent <= quiet_limit_s(seen.step_s):
            return Verdict("running", f"on {seen.host}, heard {format_seconds(silent)} ago")
    if submitted > seen.time_of("start", "cancel", "retry"):
        return Verdict("queued", "squeue does not answer here")
    return None


def quiet_limit_s(step_s: float | None) -> float:
    return QUIET_BEFORE_STEPS_S if step_s is None else max(QUIET_S, QUIET_STEPS * step_s)


def _started_without_a_word(seen: Evidence) -> bool:
    """Whether the last start left no word of its own: its status is older."""
    return seen.time_of("start") > float(seen.status.get("heartbeat", 0.0))


def _asked_to_end(seen: Evidence) -> bool:
    return seen.time_of("cancel") > seen.time_of("start", "queued", "requeue", "retry")


def _asked_again(seen: Evidence) -> bool:
    """Whether a start was asked for after what was written last."""
    return seen.time_of("retry", "queued") > float(seen.status.get("heartbeat", 0.0))


def _cancelled(seen: Evidence) -> bool:
    by_slurm = seen.job is not None and seen.job.word == "CANCELLED"
    return _asked_to_end(seen) or (by_slurm and seen.time_of("queued", "start") > seen.time_of("retry"))


def _died(seen: Evidence) -> Verdict:
    """The last run ended without saying how: killed, or refused before it had the cell's lock."""
    end = seen.end()
    code, kind = end.get("exit"), end.get("failure_class")
    if end and code in (0, BLOCKED_EXIT):  # it did nothing: what was written before still holds
        return Verdict(str(seen.status.get("state", "pending")).replace("running", "interrupted"))
    if _cancelled(seen):
        return Verdict("cancelled")
    word = seen.job.word if seen.job else None
    if not end:
        kind = BY_SCHEDULER.get(word or "")
        where = f" on {seen.host}" if seen.host and not seen.here else ""
        silent = f", silent for {format_seconds(seen.silent_s)}" if seen.silent_s is not None else ""
        note = f"job {seen.job_id}: {word}" if kind else f"died{where} without a word{silent}"
        return Verdict("failed" if kind == "out_of_memory" else "interrupted", note, None, kind)
    state = "interrupted" if kind in LOST or kind is None else "failed"
    return Verdict(state, "", f"ended with exit code {code}", kind)
