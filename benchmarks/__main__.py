"""Every row of the engine's benchmarks, each beside its rival or its limit:

    python -m benchmarks [--rows a,b,c] [--quick] [--json FILE] [--repeats 5] [--override key=value ...]

Each row runs in a process of its own. A row that cannot be measured here (its rival is not installed, its
data or devices are not there) says so and is left out. `--quick`: one tiny repetition of each, to see that
all of it runs. See README.md for how each is measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import Options, Skipped, describe, machine, print_lines, write

ROWS = (
    "default_cell",
    "gsm8k_update",
    "sampling",
    "learner",
    "streaming",
    "preemptive",
    "filtering",
    "sync",
    "overhead",
    "curves",
    "capacity",
)
"""Modules of this package with a function `measure(options)`, in the order in which they run."""


def run_row(name: str, options: Options) -> dict[str, Any]:
    """A row in a fresh process: what it measured, or why it did not."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "row.json")
        command = [sys.executable, "-m", "benchmarks", "--child", name, json.dumps(asdict(options)), str(out)]
        done = subprocess.run(command, check=False)
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return found
    return {"lines": [], "failed": f"ended with code {done.returncode}"}


def child(name: str, given: str, out: str) -> None:
    """Measure one row here. Torch is not imported before its environment is what a run's is."""
    from dash_exp.signals import reduce_openmp_spinning

    reduce_openmp_spinning()
    values = json.loads(given)
    lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    options = Options(**lists)
    try:
        found = importlib.import_module(f"benchmarks.{name}").measure(options)
    except Skipped as reason:
        found = {"lines": [], "skipped": str(reason)}
    Path(out).write_text(json.dumps(found, default=str), encoding="utf-8")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="one tiny repetition; no results")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each side; at least 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without", default="", help="packages to be treated as not installed")
    parser.add_argument("--outputs", default="outputs", help="holds the cache of model folders")
    parser.add_argument("--override", nargs="*", default=[], help="key=value, for every config")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main() -> int:
    args = arguments()
    if args.child:
        child(*args.child)
        return 0
    rows = [name for name in args.rows.split(",") if name]
    if unknown := [name for name in rows if name not in ROWS]:
        print(f"no such row: {', '.join(unknown)}; there are: {', '.join(ROWS)}", file=sys.stderr)
        return 2
    options = Options(
        quick=args.quick,
        repeats=args.repeats,
        threads=args.threads,
        outputs=args.outputs,
        without=tuple(filter(None, args.without.split(","))),
        override=tuple(args.override),
    )
    facts = machine(args.threads)
    print(describe(facts), flush=True)
    found: dict[str, Any] = {}
    for name in rows:
        print(f"\n== {name}", flush=True)
        found[name] = run_row(name, options)
        write(args.json, {"machine": facts, "options": asdict(options), "rows": found})
    summary(found, options)
    return 1 if any("failed" in row for row in found.values()) else 0


def summary(found: dict[str, Any], options: Options) -> None:
    """All comparisons in one table, and what was left out."""
    lines = [line for row in found.values() for line in row["lines"]]
    if lines:
        print_lines("A quick run: no results" if options.quick else "All rows", lines)
    for name, row in found.items():
        for why in ("skipped", "failed"):
            if why in row:
                print(f"{name}: {why}, {row[why]}")


if __name__ == "__main__":
    sys.exit(main())
