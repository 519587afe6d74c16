"""From starting `python -m dash_exp` to its first step, in fresh processes with a warm model cache."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = {"start-up": ("evaluation=none",), "start-up, base model evaluated first": ()}
"""Without evaluation it is only the start-up. As typed, the default cell first evaluates the base model
on the held-out set, unless the cache knows the result; here it does not."""


def first_row(root: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Wait for the first complete line of the cell's steps.jsonl."""
    while True:
        for path in root.glob("cells/*/steps.jsonl"):
            line, newline, _ = path.read_text(encoding="utf-8").partition("\n")
            if newline:
                row: dict[str, Any] = json.loads(line)
                return row
        if process.poll() is not None:
            raise SystemExit(f"dash_exp ended with code {process.returncode} before its first step")
        time.sleep(0.01)


def once(models: Path, overrides: tuple[str, ...], threads: int) -> float:
    """Seconds until the first step began, in an empty run folder that shares the model folders."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "cache").mkdir()
        (root / "cache" / "models").symlink_to(models.resolve())
        command = [
            sys.executable,
            "-m",
            "dash_exp",
            f"run.dir={root}",
            f"cluster.threads={threads}",
            "algorithm.steps=1",
            "evaluation.after=false",
            "run.progress=none",
            *overrides,
        ]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            row = first_row(root, process)
            elapsed = time.perf_counter() - start
        finally:
            process.terminate()
            process.wait()
    return elapsed - float(row["time/step_s"])


def measure(models: Path, repeats: int, threads: int) -> dict[str, list[float]]:
    """Seconds of every repeat, by case. The first start of all only warms the file cache."""
    once(models, ("evaluation=none",), threads)
    return {
        label: [once(models, overrides, threads) for _ in range(repeats)]
        for label, overrides in CASES.items()
    }
