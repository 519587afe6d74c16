"""Records written as a run writes them, without a run; and what a database of MLflow holds."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dash_exp.record.folder import Recorder, write_json
from dash_exp.record.identity import freeze

NAME = "dash-tiny-digits-s0-0a1b2c3d"
CONFIG = {
    "seed": 0,
    "algorithm": {"name": "dash", "steps": 3, "filters": ["advantage"], "mini_batch": None},
    "model": {"name": "tiny", "random": {"layers": 2}},
    "dataset": {"name": "digits", "stop": [], "split": "train"},
}
RESOURCES = {"gpus": 0, "cpus": 1, "memory_gb": 1, "minutes": 1}
BORN = 1_700_000_000.0
"""When the first attempt of a record began, in seconds since the epoch; the second one 1,000 s later."""


def begin(root: Path, name: str = NAME, config: Mapping[str, Any] = CONFIG) -> Path:
    """A frozen cell."""
    folder = root / "cells" / name
    freeze(dict(config), folder)
    return folder


def attempt(recorder: Recorder) -> None:
    """What a run writes before its first step."""
    number = recorder.attempt
    known = json.loads(text) if (text := _text(recorder.folder / "provenance.json")) else {"attempts": []}
    here = {
        "attempt": number,
        "started": BORN + 1000 * (number - 1),
        "host": "node7",
        "hardware": {"cpu": "c"},
    }
    facts = {
        "code_hash": "c0de",
        "commit": "abc123",
        "hardware": {"cpu": "c", "gpus": ["H100"]},
        "requeues": number - 1,
        "packages": {"torch": "2.13"},
    }
    attempts = [*known["attempts"], here]
    write_json(recorder.folder / "provenance.json", {**facts, "attempts": attempts})
    recorder.status("running", 0)


def step(recorder: Recorder, number: int, reward: float | None, **more: float) -> None:
    """A step that took one second: its work ended `number` seconds after its attempt began."""
    end = BORN + 1000 * (recorder.attempt - 1) + number
    recorder.event("sample", end - 1, end - 0.5, step=number, worker="sampler", group=0)
    recorder.event("backprop", end - 0.5, end, step=number, worker="learner", groups=[0])
    recorder.append("steps", [{"step": number, "reward/mean": reward, "updates": 1, **more}])
    recorder.status("running", number)


def evaluation(recorder: Recorder, number: int, sets: Mapping[str, float], at: float) -> None:
    """Sets evaluated one after the other, ten seconds each, from `at` seconds after the attempt's begin."""
    for place, (name, value) in enumerate(sets.items()):
        start = BORN + 1000 * (recorder.attempt - 1) + at + 10 * place
        recorder.event("evaluate", start, start + 10, step=number, worker="main", cached=False)
        rows = [
            {"step": number, "dataset": name, "metric": "accuracy", "value": value, "n": 8, "low": 0.1},
            {"step": number, "dataset": name, "metric": "pass@16", "n": 0},
        ]
        recorder.append("evals", rows)


def finished(root: Path, name: str = NAME, rewards: Sequence[float] = (0.25, 0.5, 0.75)) -> Path:
    """The record of a finished run with an evaluation before and after."""
    folder = begin(root, name)
    with Recorder(folder) as recorder:
        attempt(recorder)
        evaluation(recorder, 0, {"sums": 0.125}, at=-20)
        for number, reward in enumerate(rewards, start=1):
            step(recorder, number, reward)
        evaluation(recorder, len(rewards), {"sums": 0.5}, at=100)
        recorder.status("finished", len(rewards), reason="planned")
    return folder


def set_status(folder: Path, **changes: object) -> None:
    write_json(folder / "status.json", {**json.loads(_text(folder / "status.json")), **changes})


def sweep(root: Path, name: str, cells: Sequence[str], created: float, claim: str | None = None) -> Path:
    """A sweep's folder."""
    folder = root / "sweeps" / name
    folder.mkdir(parents=True)
    value = {
        "format": 1,
        "name": name,
        "created": created,
        "about": {"claim": claim} if claim else {},
        "actions": [],
        "cells": [
            {"id": one[-8:], "folder": one, "overrides": [], "resources": RESOURCES, "needs": []}
            for one in cells
        ],
        "waiting": [],
    }
    write_json(folder / "manifest.json", value)
    return folder


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


class Database:
    """A file of MLflow's, read without MLflow."""

    def __init__(self, path: Path):
        self.path = path

    def ask(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.path, timeout=30)
        try:
            return connection.execute(query, values).fetchall()
        finally:
            connection.close()

    def change(self, command: str, *values: object) -> None:
        connection = sqlite3.connect(self.path, timeout=30)
        try:
            connection.execute(command, values)
            connection.commit()
        finally:
            connection.close()

    def everything(self) -> list[str]:
        connection = sqlite3.connect(self.path, timeout=30)
        try:
            return sorted(connection.iterdump())
        finally:
            connection.close()

    def runs(self) -> list[tuple[Any, ...]]:
        """Name, status, start and end in ms."""
        return self.ask("select name, status, start_time, end_time from runs order by start_time, name")

    def metrics(self, name: str = NAME) -> set[tuple[str, int, int, float]]:
        """Name, step, time in ms and value of all that the runs of this name hold."""
        query = "select key, step, timestamp, value from metrics join runs using (run_uuid) where name = ?"
        rows = self.ask(query, name)
        assert len(set(rows)) == len(rows)
        return set(rows)

    def words(self, table: str, name: str = NAME) -> dict[str, str]:
        """Tags or params of the runs of this name."""
        query = f"select key, value from {table} join runs using (run_uuid) where runs.name = ?"
        return dict(self.ask(query, name))


def counting(metrics: set[tuple[str, int, int, float]]) -> dict[tuple[str, int], float]:
    """What counts of a run's values: for each name and step, the one with the latest time."""
    ordered = sorted(metrics, key=lambda one: one[2])
    return {(key, number): value for key, number, _, value in ordered}
