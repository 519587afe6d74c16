"""`python -m dash_exp.sweep status` over many run folders, as typed, Python's start included.

    python -m benchmarks.status [--cells 1000] [--repeats 5] [--json FILE]

The folders are made by the package's own manifest, record and journal: of every ten cells six are finished,
one each runs (its lock held by this process), was killed, failed and is pending. A run has steps.jsonl of the
usual size (1.3 KB a row), a log, provenance, and the rows of its launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import describe, machine, print_table, write
from dash_exp.record import journal, provenance
from dash_exp.record import manifest as manifests
from dash_exp.record.folder import Recorder, lock, write_json
from dash_exp.record.identity import Cell
from dash_exp.record.locks import HERE
from dash_exp.record.manifest import Manifest, Plan, PlannedCell, Resources

GOAL_S, CELLS = 2.0, 1000
ARMS = ("dash", "grpo", "no_gf", "ppo_multi", "ppo_mini")
SIZES = Resources(gpus=1, cpus=8, memory_gb=16, minutes=240)
PHASES = ("sample", "verify", "logprob", "backprop", "optimizer", "sync", "evaluate", "checkpoint", "other")
STATES = ("finished",) * 6 + ("running", "killed", "failed", "pending")


def step_row(step: int) -> dict[str, Any]:
    """As long as a real one."""
    seconds = {f"time/{name}_s": 0.123456 for name in PHASES}
    rest = {f"quantity/number_{n}": 0.12345678901234 for n in range(28)}
    return {"step": step, "reward/mean": 0.7578125, "time/step_s": 2.359647, **seconds, **rest}


def frozen_of(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """As long as a real one, with what `status` looks for at its usual place."""
    settings = {f"setting_{n}": n for n in range(80)}
    return {
        "seed": seed,
        "model": {"name": "qwen0.5b", "path": None},
        "dataset": {"name": "math"},
        "algorithm": {"name": arm, "steps": steps, "epochs": None, **settings},
        "budget": {"seconds": None, "match": None},
    }


def make_sweep(root: Path, count: int, rows: int) -> tuple[Manifest, list[int]]:
    """A sweep of so many cells, and the locks of those that run, which this process must release."""
    cells = [planned(ARMS[n % len(ARMS)], n, 2 * rows) for n in range(count)]
    manifest = manifests.write(Plan("measured", tuple(cells)), root)
    code, held = provenance.code_hash(), []
    for number, entry in enumerate(manifest.entries):
        folder, state = manifest.cell(entry), STATES[number % len(STATES)]
        if state != "pending":
            run_by_hand(folder, state, rows, code)
        if state == "running":
            held.append(lock(folder))
    return manifest, held


def planned(arm: str, seed: int, steps: int) -> PlannedCell:
    digest = f"{seed:07x}c" + "0" * 56
    cell = Cell(digest[:8], f"{arm}-qwen0.5b-math-s{seed}", frozen_of(arm, seed, steps), digest)
    return PlannedCell(cell, (f"algorithm={arm}", f"seed={seed}", "model=qwen0.5b"), SIZES)


def run_by_hand(folder: Path, state: str, rows: int, code: str) -> None:
    journal.note(folder, "start", host=HERE, pid=os.getpid(), job=None, sweep="measured")
    with Recorder(folder) as recorder:
        recorder.append("steps", map(step_row, range(1, rows + 1)))
        for _ in range(20):
            recorder.log("a line of the log, of about the usual length, as it is written now and then")
        attempt = {"attempt": 1, "started": time.time() - 3600, "host": HERE, "code_hash": code}
        write_json(folder / "provenance.json", {"code_hash": code, "attempts": [attempt] * 2})
        ended = {
            "finished": ("finished", {"reason": "planned"}),
            "failed": ("failed", {"failure": "CUDA out of memory"}),
        }
        name, more = ended.get(state, ("running", {}))
        recorder.status(name, rows, steps=2 * rows, **more)
    if state in ended:
        journal.note(
            folder,
            "end",
            exit=0 if state == "finished" else 1,
            failure_class=None if state == "finished" else "out_of_memory",
        )


def seconds_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def counts_of(folder: Path) -> dict[str, int]:
    command = [sys.executable, "-m", "dash_exp.sweep", "status", str(folder), "--json"]
    counts: dict[str, int] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)[
        "counts"
    ]
    return counts


def measure(count: int, repeats: int, rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        manifest, held = make_sweep(Path(scratch), count, rows)
        counts = counts_of(manifest.folder)
        wanted = {
            "running": count // 10,
            "interrupted": count // 10,
            "failed": count // 10,
            "pending": count // 10,
            "finished": 6 * count // 10,
        }
        if counts != wanted:
            raise SystemExit(f"status counts {counts}, there are {wanted}")
        command = [sys.executable, "-m", "dash_exp.sweep", "status", str(manifest.folder)]
        tables = [seconds_of(command) for _ in range(repeats)]
        texts = [seconds_of([*command, "--json"]) for _ in range(repeats)]
        bytes_ = sum(path.stat().st_size for path in Path(scratch).rglob("*") if path.is_file())
        for descriptor in held:
            os.close(descriptor)
    return {
        "cells": count,
        "megabytes": bytes_ / 1e6,
        "table_s": tables,
        "json_s": texts,
        "goal_s": GOAL_S,
        "met": statistics.median(tables) < GOAL_S,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=CELLS, help="a multiple of 10")
    parser.add_argument("--rows", type=int, default=100, help="steps of each run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    facts = machine(1)
    print(describe(facts))
    found = measure(args.cells, args.repeats, args.rows)
    rows = [
        [name, f"{statistics.median(found[key]):.2f}", f"{min(found[key]):.2f}", f"{max(found[key]):.2f}"]
        for name, key in (("table", "table_s"), ("--json", "json_s"))
    ]
    title = f"status over {found['cells']} cells, {found['megabytes']:.0f} MB of records; goal < {GOAL_S:g} s"
    print_table(title, ["output", "median s", "least", "most"], rows)
    write(args.json, {"machine": facts, **found})


if __name__ == "__main__":
    main()
