"""How long it takes to plan a sweep of a thousand cells, and how much memory: no torch, one process.

    python -m benchmarks.planning [--cells 1000] [--json outputs/bench/planning.json]

Two sweeps: in `seeds` mostly the seed varies, as in most sweeps; in `rates` every cell has another learning
rate, and a third of the cells has a partner. Each is planned in a fresh process, with an empty cache of
hashes. Printed are seconds on the wall, seconds of the processor (for a machine with other work), and peak
memory: the largest resident size, Hydra included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GOAL_S, GOAL_MB = 90.0, 300.0
ARMS = ("dash", "grpo", "no_gf", "no_kl", "pg", "rloo", "dr_grpo", "ppo_multi", "ppo_mini")
MODELS = ("qwen0.5b", "qwen1.5b", "qwen3b")
HEAVY = ("torch", "numpy", "transformers", "vllm", "submitit", "mlflow")


def seeds(cells: int) -> list[tuple[str, ...]]:
    """Nine arms, three models, two rates, and as many seeds as it takes."""
    grid = [
        (f"algorithm={arm}", f"model={model}", f"learner.lr={rate}")
        for arm in ARMS
        for model in MODELS
        for rate in ("1e-6", "3e-6")
    ]
    return [(*grid[n % len(grid)], f"seed={n // len(grid)}") for n in range(cells)]


def rates(cells: int) -> list[tuple[str, ...]]:
    """A learning rate for each triple of cells, of which one has the training time of another."""
    found: list[tuple[str, ...]] = []
    for n in range(-(-cells // 3)):
        own = (f"model={MODELS[n % 3]}", f"learner.lr={1e-6 + n * 1e-9:.4g}", f"algorithm.beta={n % 7 / 100}")
        found += [
            ("algorithm=dash", *own),
            ("algorithm=no_kl", *own[:2], f"seed={n}"),
            ("algorithm=ppo_multi", "budget.match=dash", *own),
        ]
    return found[:cells]


def measure(kind: str, cells: int) -> dict[str, Any]:
    """Plan once, here."""
    from dash_exp.sweep.plan import make_plan

    combinations = {"seeds": seeds, "rates": rates}[kind](cells)
    with tempfile.TemporaryDirectory() as root:
        begin, worked = time.perf_counter(), time.process_time()
        plan = make_plan("bench", combinations, root=Path(root), installed=lambda name: True)
        elapsed, worked = time.perf_counter() - begin, time.process_time() - worked
    return {
        "kind": kind,
        "cells": len(plan.cells),
        "seconds": round(elapsed, 2),
        "processor_s": round(worked, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "heavy": [name for name in HEAVY if name in sys.modules],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    parser.add_argument("--kind", choices=("seeds", "rates"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(measure(args.kind, args.cells)))
        return
    rows = []
    for kind in ("seeds", "rates"):
        command = [sys.executable, "-m", "benchmarks.planning", "--kind", kind, "--cells", str(args.cells)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        row = json.loads(done.stdout)
        met = row["seconds"] < GOAL_S and row["peak_mb"] < GOAL_MB and not row["heavy"]
        rows.append({**row, "goal_s": GOAL_S, "goal_mb": GOAL_MB, "met": met})
        print(
            f"{kind}: {row['cells']} cells planned in {row['seconds']} s (goal {GOAL_S:g}), of which "
            f"{row['processor_s']} of the processor, peak {row['peak_mb']} MB (goal {GOAL_MB:g}), heavy "
            f"imports: {row['heavy'] or 'none'}; "
            f"{'met' if met else 'MISSED'}",
            flush=True,
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
