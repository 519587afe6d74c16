"""What a cell's record holds, as metrics of MLflow, with step and time. Torch-free, imports no MLflow, and
depends on the record alone: read twice, it says the same.

Rows of the record carry no time of their own. A step's is the end of the last interval of work on it in
events.jsonl (all of them are written before its row), an evaluation's the end of its own interval.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dash_exp.record.folder import Row, last_attempts, read_json

LONGEST_NAME = 250
ILLEGAL = re.compile(r"[^\w.\- :/]")


@dataclass(frozen=True, slots=True)
class Point:
    """The values of a step, or of one set's evaluation. `time_ms`: since the epoch."""

    step: int
    time_ms: int
    values: dict[str, float]


class Tail:
    """Rows of a growing JSON-lines file, each given once, when its line is whole."""

    def __init__(self, path: Path):
        self.path = path
        self._offset = 0

    def new(self) -> list[Row]:
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        return list(_rows(data[:whole]))


def _rows(data: bytes) -> Iterator[Row]:
    for line in data.split(b"\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            continue  # torn by a crash
        if isinstance(row, dict):
            yield row


class Times:
    """When rows came to be, in seconds since the epoch, learnt from events."""

    def __init__(self) -> None:
        self._work: dict[tuple[int, int], float] = {}
        self._evaluations: dict[tuple[int, int], list[float]] = defaultdict(list)
        self._sets: dict[tuple[int, int], list[str]] = defaultdict(list)

    def learn(self, events: Iterable[Row]) -> None:
        for row in events:
            if "step" not in row:
                continue
            key, end = (int(row["attempt"]), int(row["step"])), float(row["end"])
            if row["kind"] == "evaluate":
                self._evaluations[key].append(end)
            else:
                self._work[key] = max(end, self._work.get(key, 0.0))

    def of_step(self, attempt: int, step: int) -> float | None:
        """A row that a resumed run took from its checkpoint was worked for by an earlier attempt."""
        found = (self._work.get((one, step)) for one in range(attempt, 0, -1))
        return next((end for end in found if end is not None), None)

    def of_evaluation(self, attempt: int, step: int, dataset: str) -> float | None:
        """Sets are evaluated one after the other, each in an interval of its own."""
        sets = self._sets[attempt, step]
        if dataset not in sets:
            sets.append(dataset)
        ends, place = self._evaluations[attempt, step], sets.index(dataset)
        return ends[place] if place < len(ends) else None


class Reader:
    """A cell's points, each given once, as its record grows."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._steps, self._evals = Tail(folder / "steps.jsonl"), Tail(folder / "evals.jsonl")
        self._events, self._times = Tail(folder / "events.jsonl"), Times()

    def new(self) -> list[Point]:
        """Those that count (record.read_final) among the rows that are new."""
        steps, evals = last_attempts(self._steps.new()), last_attempts(self._evals.new())
        if not steps and not evals:
            return []
        self._times.learn(self._events.new())  # read after the rows: theirs are all there
        status, started = read_json(self.folder / "status.json"), starts(self.folder)
        end = status.get("step", 0) if status.get("state") == "finished" else math.inf
        points = [*self._of_steps(steps, started), *self._of_evaluations(evals, started)]
        return [point for point in points if point.step <= end]

    def _of_steps(self, rows: Sequence[Row], started: Mapping[int, float]) -> Iterator[Point]:
        for row in rows:
            attempt, step = int(row["attempt"]), int(row["step"])
            when = self._times.of_step(attempt, step) or started.get(attempt, 0.0)
            values = {k: v for k, v in row.items() if k not in ("step", "attempt")}
            yield Point(step, milliseconds(when), named(numbers(values)))

    def _of_evaluations(self, rows: Sequence[Row], started: Mapping[int, float]) -> Iterator[Point]:
        together: dict[tuple[int, int, str], dict[str, Any]] = defaultdict(dict)
        for row in rows:
            name = f"eval/{row['dataset']}/{row['metric']}"
            found = {name: row.get("value"), **{f"{name}/{k}": row.get(k) for k in ("low", "high", "n")}}
            together[int(row["attempt"]), int(row["step"]), str(row["dataset"])] |= found
        for (attempt, step, dataset), values in together.items():
            when = self._times.of_evaluation(attempt, step, dataset) or started.get(attempt, 0.0)
            yield Point(step, milliseconds(when), named(numbers(values)))


def starts(folder: Path) -> dict[int, float]:
    """When each attempt began, of those that got as far as to say so."""
    attempts = read_json(folder / "provenance.json").get("attempts", [])
    return {int(one["attempt"]): float(one["started"]) for one in attempts}


def final_points(folder: Path) -> list[Point]:
    return Reader(folder).new()


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among values; a truth value is none."""
    return {
        k: float(v)
        for k, v in values.items()
        if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
    }


def named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under names that MLflow takes: letters, digits and `_-. :/`, no empty part of a path, not too
    long. Two names never become one."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        text = ILLEGAL.sub("_", name.replace("@", "_at_"))
        text = "/".join(part for part in text.split("/") if part not in ("", ".", "..")) or "_"
        if len(text) > LONGEST_NAME or text in found:
            text = f"{text[: LONGEST_NAME - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        found[text] = value
    return found


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
