"""How long the analysis takes to read many runs: `python -m benchmarks.loading [--runs 1000 --steps 1000]`.

Makes run folders with rows of 56 numbers, as real ones have, then reads them in a fresh process: seconds and
peak memory, without a cache and with one. Goal: 1,000 runs x 1,000 steps in under 10 s and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

NUMBERS = 56


def make(root: Path, runs: int, steps: int) -> None:
    config = {"algorithm": {"name": "dash", "steps": steps}, "model": {"name": "m"}, "dataset": {"name": "d"}}
    for run in range(runs):
        folder = root / "cells" / f"dash-m-d-s{run}-{run:08x}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "seed": run}))
        (folder / "status.json").write_text(json.dumps({"state": "finished", "step": steps}))
        with (folder / "steps.jsonl").open("w") as stream:
            for step in range(1, steps + 1):
                row = {f"group/number_{i}": (step * 31 + i * 7 + run) / 1009 for i in range(NUMBERS)}
                stream.write(json.dumps({"attempt": 1, "step": step, **row}) + "\n")


def read(root: Path, cache: Path | None) -> None:
    """In a fresh process: load, then print seconds and peak MB."""
    from analysis.load import load

    start = time.perf_counter()
    records = load([root], cache)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": len(records.steps), "seconds": seconds, "peak_mb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(options.read, options.cache)
        return
    root = Path(tempfile.mkdtemp(prefix="loading-"))
    try:
        make(root, options.runs, options.steps)
        size = sum(p.stat().st_size for p in root.rglob("steps.jsonl")) / 2**20
        print(f"{options.runs} runs x {options.steps} steps, {size:.0f} MB")
        for name in ("no cache", "cache, first", "cache, second"):
            extra = [] if name == "no cache" else ["--cache", str(root / "cache")]
            command = [sys.executable, "-m", "benchmarks.loading", "--read", str(root), *extra]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            print(f"{name:<14} {found['seconds']:6.2f} s  {found['peak_mb']:7.0f} MB  {found['rows']} rows")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
