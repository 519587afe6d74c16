"""Sweeps of cells that were run by hand: real folders, manifests, journals, locks and processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dash_exp.record import manifest as manifests
from dash_exp.record.folder import Recorder, write_json
from dash_exp.record.identity import Cell
from dash_exp.record.manifest import Manifest, Plan, PlannedCell, Resources, Traces, Waiting
from dash_exp.sweep.__main__ import main
from dash_exp.sweep.status import read_sweep
from tests.conftest import REPOSITORY

Capture = pytest.CaptureFixture[str]
SMALL = Resources(gpus=0, cpus=2, memory_gb=8, minutes=60)
FROZEN: dict[str, Any] = {
    "seed": 0,
    "model": {"name": "tiny"},
    "algorithm": {"name": "dash", "steps": 20, "epochs": None, "prompts_per_step": 4, "group_size": 8},
    "sampler": {"name": "hf", "max_new_tokens": 6, "streaming": True, "servers": 1, "colocated": False},
    "dataset": {"name": "arithmetic", "mix": {}, "limit": None},
    "learner": {"ranks": 1, "device": "auto", "precision": "bf16_mixed", "preflight": False},
    "evaluation": {
        "name": "none",
        "before": True,
        "after": True,
        "every": 0,
        "samples": 1,
        "limit": None,
        "sets": {},
    },
    "budget": {"seconds": None, "match": None},
}
"""What is looked at of a frozen config; the names and the nesting are those of a real one."""

HOLDER = """
import signal, sys, time
from pathlib import Path
from dash_exp.record.folder import Recorder
from dash_exp.signals import Interrupted, Stop, handling
step = int(sys.argv[2])
try:
    with handling(Stop()), Recorder(Path(sys.argv[1])) as recorder:
        recorder.status("running", step)
        print("running", flush=True)
        try:
            time.sleep(60)
        except Interrupted:
            recorder.status("interrupted", step, failure="SIGTERM")
            raise
except Interrupted as reason:
    sys.exit(128 + reason.number)
"""
"""A process that holds a cell as `python -m dash_exp.cell` does, without a model."""


def cell_of(arm: str, seed: int, number: int, needs: Sequence[str] = (), **algorithm: Any) -> PlannedCell:
    frozen = {**FROZEN, "seed": seed, "algorithm": {**FROZEN["algorithm"], "name": arm, **algorithm}}
    name = f"{arm}-tiny-arithmetic-s{seed}"
    cell = Cell(f"{number:07x}c", name, frozen, f"{number:07x}c" + "0" * 56)
    return PlannedCell(cell, (f"algorithm={arm}", f"seed={seed}", "model=tiny"), SMALL, tuple(needs))


def sweep_of(
    root: Path,
    cells: Sequence[PlannedCell],
    name: str = "demo",
    waiting: Sequence[Path] = (),
    about: dict[str, object] | None = None,
) -> Manifest:
    later = tuple(Waiting(("algorithm=sft_m",), Traces(path, ("model=tiny",))) for path in waiting)
    return manifests.write(Plan(name, tuple(cells), later, 0, (), about), root)


def steps_rows(count: int, seconds: float = 2.0, reward: float = 0.5, first: int = 1) -> list[dict[str, Any]]:
    return [
        {"step": n, "time/step_s": seconds, "reward/mean": reward, "pad": "x" * 1200}
        for n in range(first, first + count)
    ]


def ran(folder: Path, state: str, step: int, code: str = "now", **more: Any) -> None:
    """A cell that a process ran and left: its steps, its status, its provenance."""
    with Recorder(folder) as recorder:
        recorder.append("steps", steps_rows(step))
        recorder.log("last line")
        write_json(
            folder / "provenance.json",
            {
                "code_hash": code,
                "hardware": {"gpus": []},
                "attempts": [{"attempt": 1, "started": time.time() - 360.0}],
            },
        )
        recorder.status(state, step, **more)


def rewrite(folder: Path, **more: Any) -> None:
    """Change a status, as another machine or an earlier time would have written it."""
    path = folder / "status.json"
    write_json(path, {**json.loads(path.read_text()), **more})


@contextmanager
def running(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that prints `running` once it is, and is killed at the end of this context; its command line
    looks like a cell's."""
    command = [sys.executable, "-c", script, *map(str, arguments), "dash_exp.cell"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def held_by_a_process(folder: Path, step: int = 3) -> AbstractContextManager[subprocess.Popen[str]]:
    """A process that runs the cell, until it is signalled."""
    return running(HOLDER, folder, step)


def command(*words: object) -> int:
    return main([str(word) for word in words])


def refused(capsys: Capture, *words: object) -> str:
    assert command(*words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def states(manifest: Manifest) -> list[str]:
    return [one.cell.state for one in read_sweep(manifest).cells]


def write_yaml(tmp_path: Path, **axes: list[Any]) -> Path:
    path = tmp_path / "tried.yaml"
    path.write_text(
        json.dumps(
            {
                "claim": "It works.",
                "question": "Does it?",
                "feeds": ["table_tried"],
                "seeds": [0, 1],
                "overrides": {"model": "tiny", "debug": "fast", "evaluation": "none", "cluster.threads": 1},
                "grid": axes,
            }
        )
    )
    return path
