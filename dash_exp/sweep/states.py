"""The states of many cells at once, with their progress; `record.state` decides what they are."""

from __future__ import annotations

import functools
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dash_exp.errors import UserError
from dash_exp.record.folder import read_json
from dash_exp.record.locks import Locks
from dash_exp.record.reading import REPAIR, Damage, Row, read_bytes, read_config, summary
from dash_exp.record.state import Evidence, derive_state, median_of, recent_steps
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.slurm.queue import JobState

SHOWN = ("running", "queued", "pending", "blocked", "interrupted", "failed", "cancelled", "finished")
ACTIVE = ("running", "queued")
RECENT_REWARDS = 5
STEPS = re.compile(r"^algorithm:\n(?:  .*\n)*?  steps: (\d+|null)$", re.MULTILINE)
LOOKS = (
    STEPS,
    *(re.compile(rf"^{group}:\n(?:  .*\n)*?  name: \S", re.MULTILINE) for group in ("model", "dataset")),
    re.compile(r"^seed: -?\d{1,15}$", re.MULTILINE),
)
"""What a frozen config has, wherever it stands."""
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
    damage: str = ""
    """What is damaged in the record, by file."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


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
    rows, damage = recent_steps(folder)
    step_s, steps = median_of(rows, "time/step_s"), steps_of(status, folder)
    rewards = [float(row["reward/mean"]) for row in rows[-RECENT_REWARDS:] if "reward/mean" in row]
    derived = derive_state(replace(seen, step_s=step_s, job=jobs.get(seen.job_id or "")))
    is_running = derived.state == "running"
    return CellState(
        folder,
        **derived._asdict(),
        attempt=attempt,
        step=step,
        steps=steps,
        reward=statistics.fmean(rewards) if rewards else None,
        step_s=step_s,
        eta_s=_remaining_s(folder, step, steps, step_s) if is_running else None,
        heartbeat_s=max(0.0, seen.now - seen.heartbeat) if attempt else None,
        host=seen.host,
        pid=seen.pid,
        job=seen.job_id,
        stale=code is not None and derived.state == "finished" and is_stale(folder, code),
        damage=summary([*config_damage(folder), *seen.damage, *(() if is_running else damage)]),
    )


def steps_of(status: Row, folder: Path) -> int | None:
    """How many steps a cell plans, by its run, else by its config; None while it only counts epochs."""
    if isinstance(status.get("steps"), int):
        return int(status["steps"])
    found = _in_config(folder, STEPS)
    return int(found) if found and found.isdigit() else None


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
    with suppress(OSError, ValueError):
        found = pattern.search((folder / "config.yaml").read_text(encoding="utf-8"))
        return found.group(1) if found else None
    return None


@functools.lru_cache(maxsize=256)
def frozen_values(folder: Path) -> Row:
    """A cell's frozen config as plain values, read once: it never changes. Raises UserError."""
    read = read_config(folder)
    if read.damage:
        raise UserError([one.fault(REPAIR) for one in read.damage])
    return read.value


def config_damage(folder: Path) -> tuple[Damage, ...]:
    """What is damaged in a frozen config. Only one that does not look like one is parsed: that takes long."""
    try:
        text = (read_bytes(folder / "config.yaml") or b"").decode("utf-8")
    except ValueError:
        text = ""
    return (
        () if text.endswith("\n") and all(one.search(text) for one in LOOKS) else read_config(folder).damage
    )


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
