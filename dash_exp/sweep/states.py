"""What a cell is doing, as a person should see it. Torch-free.

A cell's status.json says what its last run said last. A run that was killed said "running" and says no
more; so whoever shows a state asks what can be known about the process: here by the lock it holds,
under SLURM by the queue, elsewhere by how long it has been silent.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dash_exp.record import journal
from dash_exp.record.folder import Row, last_attempts, read_json
from dash_exp.record.locks import HERE, Locks, is_alive, runs
from dash_exp.sweep.slurm.queue import JobState
from dash_exp.sweep.tails import last_rows
from dash_exp.sweep.verdict import Evidence, judge

SHOWN = ("running", "queued", "pending", "blocked", "interrupted", "failed", "cancelled", "finished")
ACTIVE = ("running", "queued")
RECENT_STEPS, RECENT_REWARDS = 10, 5
STEPS = re.compile(r"^algorithm:\n(?:  .*\n)*?  steps: (\d+)$", re.MULTILINE)
SECONDS = re.compile(r"^budget:\n(?:  .*\n)*?  seconds: ([\d.e+-]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class CellState:
    """A cell as it is now. `step_s`: seconds per step, the median of the last ten; `reward`: mean of the
    last five; `eta_s`: seconds until a running one has trained; `heartbeat_s`: how long ago its run last
    said something; None: not known. `note`: what a person should know besides."""

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


@dataclass(slots=True)
class Reading:
    """What a cell's folder says of its runs."""

    folder: Path
    status: Row
    rows: list[Row]

    @classmethod
    def of(cls, folder: Path) -> Reading:
        return cls(folder, read_json(folder / "status.json"), journal.read(folder))

    def start(self) -> Row:
        return next((row for row in reversed(self.rows) if row["kind"] == "start"), {})

    def job(self) -> str | None:
        """SLURM's id of the job that has it; None where it was started without one last."""
        kinds = ("queued", "start", "requeue")
        last = next((row for row in reversed(self.rows) if row["kind"] in kinds), {})
        return str(last["job"]) if last.get("job") else None

    def host(self) -> str | None:
        """Where it ran last."""
        start = self.start()
        if start.get("time", 0) > self.status.get("heartbeat", 0) or "host" not in self.status:
            return start.get("host") or self.status.get("host")
        return str(self.status["host"])

    def begun(self) -> Row:
        """The last start, unless its end is written."""
        start = self.start()
        ended = any(row["kind"] == "end" and row["time"] >= start.get("time", 0) for row in self.rows)
        return {} if ended else start

    def says_it_runs(self) -> bool:
        return self.status.get("state") == "running" or bool(self.begun())

    def process(self, locks: Locks) -> int | None:
        """The process on this machine that runs the cell, or is about to."""
        holder = locks.holder(self.folder / ".lock")
        if holder is not None:
            return holder
        said = self.status if self.status.get("state") == "running" else {}
        if not locks.known and said.get("host") == HERE and is_alive(int(said.get("pid", 0))):
            return int(said["pid"])
        start = self.begun()
        here = start.get("host") == HERE and isinstance(start.get("pid"), int)
        return start["pid"] if here and runs(start["pid"], self.folder.name) else None


def state_of(folder: Path, jobs: Mapping[str, JobState], now: float) -> CellState:
    """The state of one cell; `jobs`: what the queue says of its jobs."""
    return states_of([folder], jobs, now)[0]


def asked_about(reading: Reading) -> str | None:
    """The job that the queue is asked about: of what has finished nobody wants to know."""
    return None if reading.status.get("state") == "finished" else reading.job()


def states_of(
    folders: Sequence[Path], jobs: Mapping[str, JobState], now: float, code: str | None = None
) -> list[CellState]:
    """The states of many cells, in their order. `code`: the hash that finished ones are compared with."""
    return states_from([Reading.of(folder) for folder in folders], jobs, now, code)


def states_from(
    readings: Sequence[Reading], jobs: Mapping[str, JobState], now: float, code: str | None = None
) -> list[CellState]:
    """As `states_of`, from what was read already (to learn the jobs' ids)."""
    locks = Locks.now()  # after the statuses: who said "running" and holds no lock now has ended since
    found = [(reading, reading.process(locks)) for reading in readings]
    doubtful = [n for n, (reading, pid) in enumerate(found) if pid is None and reading.says_it_runs()]
    if doubtful:  # the end may have been said meanwhile; and the kernel's table is not read in one piece
        again = {n: Reading.of(readings[n].folder) for n in doubtful}
        locks = Locks.now()
        for n, reading in again.items():
            found[n] = reading, reading.process(locks)
    return [_state(reading, pid, jobs, now, code) for reading, pid in found]


def _state(
    reading: Reading, pid: int | None, jobs: Mapping[str, JobState], now: float, code: str | None
) -> CellState:
    status, folder = reading.status, reading.folder
    rows = recent_steps(folder) if status.get("attempt", 0) else []
    step_s = median_of(rows, "time/step_s")
    step = int(status.get("step", 0))
    job_id = reading.job()
    host = reading.host()
    heartbeat = float(status["heartbeat"]) if status.get("attempt", 0) else None
    word = max(heartbeat or 0.0, float(reading.start().get("time", 0.0)))
    evidence = Evidence(
        status,
        reading.rows,
        pid,
        here=host in (None, HERE),
        host=host,
        step_s=step_s,
        silent_s=max(0.0, now - word) if word else None,
        job=jobs.get(job_id or ""),
        job_id=job_id,
    )
    verdict = judge(evidence)
    steps = steps_of(status, folder)
    return CellState(
        folder,
        verdict.state,
        verdict.note,
        int(status.get("attempt", 0)),
        step,
        steps,
        reward=mean_of(rows[-RECENT_REWARDS:], "reward/mean"),
        step_s=step_s,
        eta_s=left_s(folder, step, steps, step_s) if verdict.state == "running" else None,
        heartbeat_s=None if heartbeat is None else max(0.0, now - heartbeat),
        host=host,
        pid=pid,
        job=job_id,
        failure=verdict.failure,
        failure_class=verdict.failure_class,
        stale=code is not None and verdict.state == "finished" and is_stale(folder, code),
    )


def recent_steps(folder: Path) -> list[Row]:
    """The last ten steps that count: a resumed run makes some of the steps before it anew."""
    read = last_rows(folder / "steps.jsonl", 2 * RECENT_STEPS)
    rows = [row for row in read if "step" in row and "attempt" in row]
    return last_attempts(row for row in rows if row["step"] <= rows[-1]["step"])[-RECENT_STEPS:]


def median_of(rows: Iterable[Row], key: str) -> float | None:
    values = [float(row[key]) for row in rows if key in row]
    return statistics.median(values) if values else None


def mean_of(rows: Iterable[Row], key: str) -> float | None:
    values = [float(row[key]) for row in rows if key in row]
    return statistics.fmean(values) if values else None


def steps_of(status: Row, folder: Path) -> int | None:
    """How many steps a cell plans: as its run says, else as its config does; None while it only counts
    epochs."""
    if isinstance(status.get("steps"), int):
        return int(status["steps"])
    found = _in_config(folder, STEPS)
    return int(found) if found else None


def left_s(folder: Path, step: int, steps: int | None, step_s: float | None) -> float | None:
    """Seconds of training that are left, by the pace of the last steps; a budget may end it earlier."""
    if steps is None or step_s is None:
        return None
    left = step_s * max(0, steps - step)
    given = (read_json(folder / "provenance.json").get("budget") or {}).get("seconds")
    budget = given if given is not None else _in_config(folder, SECONDS)
    return left if budget is None else max(0.0, min(left, float(budget) - step_s * step))


def _in_config(folder: Path, pattern: re.Pattern[str]) -> str | None:
    """A number from a frozen config, without parsing all of it: a thousand are looked at at once."""
    try:
        found = pattern.search((folder / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        return None
    return found.group(1) if found else None


def is_stale(folder: Path, code: str) -> bool:
    """Whether a record was made by other code."""
    return read_json(folder / "provenance.json").get("code_hash") != code
