"""Fake SLURM commands on PATH, and cells of a sweep to submit to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from dash_exp.config.compose import compose
from dash_exp.config.schema import ClusterConfig
from dash_exp.record import manifest
from dash_exp.record.identity import make_cell
from dash_exp.record.manifest import Entry, Manifest, Plan, PlannedCell, Resources
from tests.test_run import SMALL

ACTIONS = ("run.progress=plain", "cluster.threads=1")
SMALL_JOB = Resources(gpus=0, cpus=1, memory_gb=1, minutes=60)


class FakeSlurm:
    """The folder of a fake cluster."""

    def __init__(self, home: Path):
        self.home = home
        self.settings: dict[str, Any] = {
            "sinfo": ["main*|1-00:00:00|2|8|16000|gpu:2|a100,fast", "debug|30:00|1|4|8000|(null)|(null)"],
            "config": {"MaxArraySize": "1001", "AccountingStorageEnforce": "none"},
        }
        self.set()

    def set(self, **settings: Any) -> None:
        self.settings |= settings
        (self.home / "settings.json").write_text(json.dumps(self.settings))

    def jobs(self) -> dict[str, dict[str, Any]]:
        path = self.home / "jobs.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def change(self, job: str, **facts: Any) -> None:
        known, new = self.jobs(), {"script": "", "reason": "None", "nodes": "", "restarts": 0}
        known[job] = {**new, **known.get(job, {}), **facts}
        (self.home / "jobs.json").write_text(json.dumps(known))

    def calls(self, command: str) -> list[str]:
        path = self.home / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.split()[0] == command]


@cache
def _slurm() -> ClusterConfig:
    return compose(["model=tiny", "cluster=slurm"]).cluster


def cluster_of(**settings: Any) -> ClusterConfig:
    """`cluster=slurm` with these settings."""
    return replace(_slurm(), **settings)


def made_up(
    count: int, resources: Resources = SMALL_JOB, arm: str = "dash", first: int = 0, **more: Any
) -> list[Entry]:
    """Entries of cells that will not run."""
    ids = [f"{first + n:07d}a" for n in range(count)]
    return [
        Entry(one, f"{arm}-tiny-arithmetic-s{n}-{one}", (f"seed={n}",), resources, more.get("needs", ()))
        for n, one in enumerate(ids)
    ]


def write_sweep(
    root: Path, variants: Sequence[Sequence[str]], *, name: str = "trial", resources: Sequence[Resources] = ()
) -> Manifest:
    """A sweep of tiny cells as it is frozen on disk, without the planner."""
    cells = []
    for place, overrides in enumerate(variants):
        cell = make_cell(compose([*SMALL, f"run.dir={root}", *overrides]), root / "cache")
        own = resources[place] if resources else SMALL_JOB
        cells.append(PlannedCell(cell, tuple(overrides), own))
    return manifest.write(Plan(name, tuple(cells), actions=ACTIONS), root)


def write_made_up(root: Path, entries: Sequence[Entry], name: str = "trial") -> Manifest:
    """A sweep in memory, whose cells have folders and nothing in them."""
    for entry in entries:
        (root / "cells" / entry.folder).mkdir(parents=True, exist_ok=True)
    folder = root / "sweeps" / name
    folder.mkdir(parents=True, exist_ok=True)
    return Manifest(name, folder, root, tuple(entries), (), (), {}, 0.0)
