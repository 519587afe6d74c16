"""Bring the runs of a tracker up to date with the records. Syncing twice changes nothing.

What a run holds is asked of the tracker, value by value, before anything is sent, so nothing is doubled by a
crash, a retry or another process. A resumed run may redo steps: their new values are sent too, with their
later time. For each step the value with the latest time counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dash_exp.config.tracking import MirrorPlace
from dash_exp.errors import Fault, UserError, print_error
from dash_exp.mirror.store import CELL, ENDED, Point, Run, Store, StoreError, open_store
from dash_exp.record import journal, manifest
from dash_exp.record.folder import Row, read_final, read_json, read_rows
from dash_exp.record.manifest import Manifest
from dash_exp.record.reading import Damage, read_config, read_record
from dash_exp.record.state import state_here

FORMAT = 1
"""Raised when the meaning of what is sent changes, so that existing mirrors are synced again."""
LONGEST_PARAMETER, LONGEST_TAG, LONGEST_NAME = 6000, 1000, 250
RECORD, STATE, SWEEP, SWEEPS, CLAIM, DIGEST, DIFFERENT, INPUTS = (
    f"dash_exp.{name}"
    for name in ("record", "state", "sweep", "sweeps", "claim", "mirrored", "params_differ", "inputs")
)
PARENT = "mlflow.parentRunId"
STATUS = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "cancelled": "KILLED",
    "running": "RUNNING",
    "queued": "SCHEDULED",
    "pending": "SCHEDULED",
    "blocked": "SCHEDULED",
}


def record_points(folder: Path) -> list[Point]:
    """Every value of a record that counts (`record.folder.read_final`).

    Rows carry no time. A step's is the end of the last work on it in events.jsonl; an evaluation's is the end
    of its own interval. Without events it is the start of the attempt.
    """
    steps, evals = read_final(folder, "steps"), read_final(folder, "evals")
    events = read_rows(folder / "events.jsonl").rows  # read last: events are written before their rows
    started = _starts(read_json(folder / "provenance.json"))
    work: dict[tuple[int, int], float] = {}
    evaluated: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in events:
        if "step" in row and "attempt" in row:
            key, end = (int(row["attempt"]), int(row["step"])), float(row["end"])
            if row["kind"] == "evaluate":
                evaluated[key].append(end)
            else:
                work[key] = max(end, work.get(key, 0.0))
    points = []
    for row in steps:
        attempt, step = int(row["attempt"]), int(row["step"])
        # a resumed run may have taken the row from its checkpoint: then an earlier attempt did the work
        ends = (work[one, step] for one in range(attempt, 0, -1) if (one, step) in work)
        values = {k: v for k, v in row.items() if k not in ("step", "attempt")}
        points.append(_point(step, next(ends, started.get(attempt, 0.0)), values))
    sets: dict[tuple[int, int], dict[str, Row]] = defaultdict(lambda: defaultdict(dict))
    for row in evals:
        name = f"eval/{row['dataset']}/{row['metric']}"
        values = {name: row.get("value"), **{f"{name}/{k}": row.get(k) for k in ("low", "high", "n")}}
        sets[int(row["attempt"]), int(row["step"])][str(row["dataset"])] |= values
    for (attempt, step), by_set in sets.items():  # sets are evaluated one after the other
        times = evaluated[attempt, step]
        for place, values in enumerate(by_set.values()):
            end = times[place] if place < len(times) else started.get(attempt, 0.0)
            points.append(_point(step, end, values))
    return points


def _starts(provenance: Row) -> dict[int, float]:
    """When each attempt began."""
    return {int(one["attempt"]): float(one["started"]) for one in provenance.get("attempts", [])}


def _point(step: int, seconds: float, values: Mapping[str, Any]) -> Point:
    return Point(step, milliseconds(seconds), allowed_names(finite_numbers(values)))


def finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        k: float(v)
        for k, v in values.items()
        if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
    }


def allowed_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under names that MLflow accepts: letters, digits and `_-. :/`, no empty part of a path, not too
    long. Two names never become one."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        text = re.sub(r"[^\w.\- :/]", "_", name.replace("@", "_at_"))
        text = "/".join(part for part in text.split("/") if part not in ("", ".", "..")) or "_"
        if len(text) > LONGEST_NAME or text in found:
            text = f"{text[: LONGEST_NAME - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        found[text] = value
    return found


def parameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A frozen config as `group.key` and text; a text that is too long for MLflow is cut and says so."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= parameters(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = shorten(_text(value), LONGEST_PARAMETER)
    return found if prefix else allowed_names(found)


def _text(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def shorten(text: str, limit: int) -> str:
    """A text of at most `limit` characters; one that was cut says so, with its hash."""
    if len(text) <= limit:
        return text
    mark = f" ... [cut: {len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}]"
    return text[: limit - len(mark)] + mark


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is sent of a cell besides its points. `record`: when its record began, which tells it from one
    that was archived; empty until a run has started."""

    name: str
    record: str
    status: str
    start_ms: int
    end_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    inputs: tuple[tuple[str, str], ...]


def read_facts(folder: Path, sweeps: Sequence[str] = (), ended: int | None = None) -> Facts:
    """What a cell's folder says now. `sweeps`: those it belongs to; `ended`: an attempt known to have ended.

    Raises UserError if it is not a cell, or its config.yaml cannot be read.
    """
    if not os.path.lexists(folder / "config.yaml"):
        raise UserError(Fault(str(folder), "holds no config.yaml, so it is not a cell"))
    read = read_config(folder)
    if read.damage:
        raise UserError([one.fault() for one in read.damage])
    status, provenance = read_json(folder / "status.json"), read_json(folder / "provenance.json")
    state = state_here(folder, time.time(), ended)
    heartbeat = milliseconds(float(status.get("heartbeat", 0.0)))
    start = min(map(milliseconds, _starts(provenance).values()), default=heartbeat)
    record = str(start) if provenance.get("attempts") else ""
    tags = {CELL: folder.name, RECORD: record, STATE: state, SWEEPS: ", ".join(sweeps)}
    tags = {key: text for key, text in tags.items() if text} | _provenance_tags(status, provenance)
    tags["dash_exp.id"] = folder.name.rpartition("-")[2]
    if saved := max((folder / "checkpoints").glob("step-*"), default=None):
        tags["dash_exp.checkpoint"] = str(saved.resolve())
    name, data = read.value.get("dataset", {}).get("name", "training"), provenance.get("datasets", {})
    inputs = tuple((name if label == "training" else label, digest) for label, digest in data.items())
    return Facts(folder.name, record, STATUS[state], start, heartbeat, parameters(read.value), tags, inputs)


def _provenance_tags(status: Row, provenance: Row) -> dict[str, str]:
    hardware, model = provenance.get("hardware", {}), provenance.get("model", {})
    hosts = dict.fromkeys(str(one.get("host")) for one in provenance.get("attempts", []))
    found = {key: provenance.get(key) for key in ("requeues", "code_hash", "diff_hash", "packages")}
    found |= {"attempts": status.get("attempt"), "reason": status.get("reason")}
    found |= {"failure": status.get("failure"), "model": model.get("origin"), "cpu": hardware.get("cpu")}
    found |= {"weights_hash": model.get("weights_hash"), "gpus": ", ".join(hardware.get("gpus", []))}
    found |= {"hosts": ", ".join(hosts)}
    tags = {f"dash_exp.{key}": value for key, value in found.items()}
    tags |= {"mlflow.source.name": "dash_exp", "mlflow.source.git.commit": provenance.get("commit")}
    given = {key: value for key, value in tags.items() if value not in (None, "", {}, [])}
    return {key: shorten(_text(value), LONGEST_TAG) for key, value in given.items()}


def sweep_status(sweep: Manifest) -> tuple[str, int]:
    """A sweep's status for MLflow, and the last heartbeat of its cells in ms."""
    states, last = [], 0
    for folder in map(sweep.cell, sweep.entries):
        states.append(state_here(folder, time.time()))
        heartbeat = read_json(folder / "status.json").get("heartbeat", 0.0)
        last = max(last, milliseconds(float(heartbeat)))
    return worst_status(states), last


def sweep_summary(sweep: Manifest) -> dict[str, float]:
    """Of the finished cells: how many they are, and by arm the mean over them of each last accuracy. Empty
    until one has finished."""
    found: dict[str, list[float]] = defaultdict(list)
    cells = 0
    for folder in map(sweep.cell, sweep.entries):
        status = read_json(folder / "status.json")
        if status.get("state") != "finished":
            continue
        cells += 1
        arm = read_config(folder).value.get("algorithm", {}).get("name", "")
        for row in read_final(folder, "evals"):
            if row["metric"] == "accuracy" and row["step"] == status.get("step") and "value" in row:
                found[f"accuracy/{row['dataset']}/{arm}"].append(float(row["value"]))
    means = {name: statistics.fmean(values) for name, values in found.items()}
    return {"cells/finished": float(cells), **means} if cells else {}


def worst_status(states: Sequence[str]) -> str:
    """Running, else waiting, else the worst end."""
    order = ("running", "queued", "pending", "failed", "interrupted", "cancelled", "blocked", "finished")
    return STATUS[next((state for state in order if state in states), "pending")]


def sweeps_below(root: Path) -> list[Manifest]:
    """All sweeps of an outputs folder whose manifests can be read, oldest first."""
    return sorted(manifest.read_all(root)[0], key=lambda one: (one.created, one.name))


def record_damage(folder: Path) -> list[Damage]:
    """What was left out of a cell's values because it is damaged."""
    records = [read_record(folder / name).damage for name in ("status.json", "provenance.json")]
    streams = [read_rows(folder / f"{name}.jsonl").damage for name in ("steps", "evals")]
    return [one for damage in (*records, *streams) for one in damage]


def sweeps_of(folder: Path, sweeps: Sequence[Manifest]) -> list[Manifest]:
    """Those that a cell belongs to: in the order in which they started it, then by age."""
    order: dict[str, int] = {}
    for place, row in enumerate(journal.read(folder)):
        if row.get("sweep"):
            order.setdefault(str(row["sweep"]), place)
    mine = [one for one in sweeps if any(entry.folder == folder.name for entry in one.entries)]
    return sorted(mine, key=lambda one: order.get(one.name, math.inf))


def sweep_run(store: Store, name: str, created: float) -> Run:
    """The parent run of a sweep's cells, created if it does not exist."""
    with store.locked():
        found = store.find(SWEEP, name)
        return found[0] if found else store.create(name, milliseconds(created), {SWEEP: name})


def sync_sweep(store: Store, sweep: Manifest) -> None:
    """Give a sweep's run the status of its cells. The lock is held from reading them to writing, so that of
    cells that end at the same time the last one writes the newest status."""
    if not store.has_parents:
        return
    with store.locked():
        run = sweep_run(store, sweep.name, sweep.created)
        if claim := sweep.about.get("claim"):
            store.set_tags(run, {CLAIM: shorten(str(claim), LONGEST_TAG)})
        status, last = sweep_status(sweep)
        if summary := sweep_summary(sweep):
            cells = int(summary["cells/finished"])
            if set(summary) - store.held(run).get((cells, last), set()):
                store.log_points(run, [Point(cells, last, allowed_names(summary))])
        store.set_status(run, status, last)


def prepare_sweep(place: MirrorPlace, name: str) -> None:
    """Create schema, experiment and a sweep's run once, before its cells start. A server that does not answer
    is reported on stderr and ignored: each cell's own process tries again."""
    try:
        sweep_run(open_store(place), name, time.time())
    except StoreError as error:
        print_error(f"mirror: {place.shown} is not available yet: {error}")


class BusyError(Exception):
    """Another process mirrors this cell to the same place."""


@contextmanager
def cell_lock(folder: Path, place: MirrorPlace) -> Iterator[None]:
    """One process at a time mirrors a cell to a place. Raises BusyError. A read-only record has no lock."""
    lock = FileLock(folder / f".mirror-{place.mark}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(f"{folder.name} is being mirrored by another process") from None
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


class CellSync:
    """The run of one cell. `run` is None until it was found or created; a failure makes the next call ask the
    server again."""

    def __init__(self, folder: Path, store: Store, sweeps: Sequence[Manifest] | None = None):
        self.folder, self.store = folder, store
        self.sweeps = sweeps_of(folder, sweeps_below(folder.parent.parent) if sweeps is None else sweeps)
        self.run: Run | None = None
        self._held: dict[tuple[int, int], set[str]] | None = None

    def sync(self, ended: int | None = None) -> int | None:
        """Send what the run lacks: the number of values sent, or None if there was nothing to do. `ended`: an
        attempt known to have ended, whatever its status says. Raises StoreError."""
        facts = read_facts(self.folder, [one.name for one in self.sweeps], ended)
        points = record_points(self.folder)
        sent = [FORMAT, facts.status, facts.start_ms, facts.end_ms, facts.params, facts.tags]
        sent += [[p.step, p.time_ms, p.values] for p in points]
        digest = hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()
        try:
            run = self.run = self.run or self._find_or_create(facts)
            if run is None or (run.tags.get(DIGEST) == digest and run.status == facts.status):
                return None
            count = self._send_points(run, points)
            self._send_facts(run, facts)
            if facts.status in ENDED:
                self.store.set_tags(run, {DIGEST: digest})
        except BaseException:
            self.run = self._held = None
            raise
        return count

    def sync_sweeps(self) -> None:
        for sweep in self.sweeps:
            sync_sweep(self.store, sweep)

    def _find_or_create(self, facts: Facts) -> Run | None:
        """The run of this record, or of this cell before its record began; None for a cell not started."""
        with self.store.locked():
            runs = self.store.find(CELL, facts.name)
            run = next((run for run in runs if run.tags.get(RECORD, "") in ("", facts.record)), None)
            if run is None and (facts.record or facts.status in ENDED):
                run = self.store.create(facts.name, facts.start_ms, facts.tags)
        return run

    def _send_points(self, run: Run, points: Sequence[Point]) -> int:
        if self._held is None:
            self._held = self.store.held(run)
        lacking = []
        for point in points:
            there = self._held.get((point.step, point.time_ms), set())
            if values := {name: value for name, value in point.values.items() if name not in there}:
                lacking.append(replace(point, values=values))
        self.store.log_points(run, lacking)
        for point in lacking:
            self._held.setdefault((point.step, point.time_ms), set()).update(point.values)
        return sum(len(point.values) for point in lacking)

    def _send_facts(self, run: Run, facts: Facts) -> None:
        """MLflow refuses to change a parameter: one that differs stays, and is named in a tag."""
        self.store.log_params(run, {k: text for k, text in facts.params.items() if k not in run.params})
        differ = ", ".join(k for k, text in facts.params.items() if run.params[k] != text)
        tags = {**facts.tags, **({DIFFERENT: shorten(differ, LONGEST_TAG)} if differ else {})}
        if self.store.has_parents and PARENT not in run.tags and self.sweeps:
            first = self.sweeps[0]
            tags[PARENT] = sweep_run(self.store, first.name, first.created).id
        ours = [name for name in run.tags if name.startswith("dash_exp.") and name != DIGEST]
        if facts.inputs and INPUTS not in run.tags:
            self.store.log_inputs(run, facts.inputs)
            tags[INPUTS] = ", ".join(label for label, _ in facts.inputs)
        elif INPUTS in run.tags:
            tags[INPUTS] = run.tags[INPUTS]
        self.store.set_tags(run, tags, drop=[name for name in ours if name not in tags])
        self.store.set_status(run, facts.status, facts.end_ms)
