"""Records mirrored to MLflow, into one SQLite file: what runs that write together lose, and what it costs.

    python -m benchmarks.mirroring [--processes 12] [--steps 300] [--json outputs/bench/mirroring.json]

Each of the processes writes the record of a run (as many values a step as a run writes, ten steps a second,
no training) and is followed as a run is; together they find no file, and create schema and experiment. Then
every value of every record is looked for in the file, without MLflow. A mirror of all of them is built anew
from the folders, and once more. The cost of following is that of one follower: its processor time and largest
resident size, Python and MLflow included.
"""

from __future__ import annotations

import argparse
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import describe, machine, print_table, write
from dash_exp.config.schema import Config, TrackingConfig, changed
from dash_exp.mirror.follow import Follower
from dash_exp.mirror.sync import record_points
from dash_exp.record.folder import Recorder, write_json
from dash_exp.record.identity import freeze

VALUES = 50
"""Numbers in a row of steps.jsonl."""
STEP_S, EVERY_S = 0.1, 2.0
MOST_S = 900.0


def record(root: Path, name: str, steps: int) -> dict[str, float]:
    """A run that learns nothing, and its follower. Returns what following cost and took: seconds of processor
    time, MB of memory, and seconds from the end of the run to that of its follower."""
    folder, config = root / "cells" / name, Config()
    config = changed(config, {"run.dir": str(root), "tracking": TrackingConfig(mlflow=True, every_s=EVERY_S)})
    freeze({"seed": 0, "algorithm": {f"setting_{n}": n for n in range(150)}}, folder)
    with Follower(folder, config, lambda text: None) as follower, Recorder(folder) as recorder:
        follower.start(recorder.attempt)
        attempt = {"attempt": 1, "started": time.time(), "host": "here"}
        write_json(folder / "provenance.json", {"attempts": [attempt]})
        for step in range(1, steps + 1):
            now = time.time()
            recorder.event("backprop", now - STEP_S, now, step=step, worker="learner", groups=[0])
            recorder.append(
                "steps", [{"step": step, **{f"quantity/n{n}": step + n / 7 for n in range(VALUES)}}]
            )
            recorder.status("running", step)
            time.sleep(STEP_S)
        recorder.status("finished", steps, reason="planned")
        ended = time.monotonic()
    if follower.process is not None:
        follower.process.wait(MOST_S)  # on a busy machine a run stops waiting for it after a while
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "processor_s": used.ru_utime + used.ru_stime,
        "memory_mb": used.ru_maxrss / 1024,
        "behind_s": time.monotonic() - ended,
    }


def together(root: Path, names: list[str], steps: int) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.mirroring", "--record", str(root), "--steps", str(steps)]
    outs = [root / f"{name}.txt" for name in names]
    processes = []
    for name, out in zip(names, outs, strict=True):
        with out.open("w") as stream:
            processes.append(subprocess.Popen([*command, "--name", name], stdout=stream))
    for process in processes:
        if process.wait() != 0:
            raise SystemExit(f"a run ended with code {process.returncode}")
    keys = ("processor_s", "memory_mb", "behind_s")
    return [dict(zip(keys, map(float, out.read_text().split()), strict=True)) for out in outs]


def lost(root: Path, names: list[str]) -> tuple[int, int]:
    """How many values the records hold, and how many of them the file does not (or twice)."""
    connection = sqlite3.connect(root / "mlflow.db")
    query = "select key, step, timestamp, value from metrics join runs using (run_uuid) where name = ?"
    count = missing = 0
    for name in names:
        held = connection.execute(query, (name,)).fetchall()
        wanted = [
            (k, p.step, p.time_ms, v)
            for p in record_points(root / "cells" / name)
            for k, v in p.values.items()
        ]
        count += len(wanted)
        missing += len(set(wanted) - set(held)) + abs(len(held) - len(wanted))
    (runs,) = connection.execute("select count(*) from runs").fetchone()
    connection.close()
    return count, missing + abs(runs - len(names))


def rebuild(root: Path, file: Path) -> float:
    command = [sys.executable, "-m", "dash_exp.mirror", str(root), f"tracking.uri=sqlite:///{file}"]
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure(processes: int, steps: int) -> dict[str, Any]:
    names = [f"dash-tiny-digits-s{n}-0000abc{n:x}" for n in range(processes)]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        costs = together(root, names, steps)
        count, missing = lost(root, names)
        new_s, same_s = rebuild(root, root / "again.db"), rebuild(root, root / "again.db")
        size = (root / "mlflow.db").stat().st_size
    return {
        "processes": processes,
        "steps": steps,
        "values": count,
        "lost": missing,
        "behind_s": max(cost["behind_s"] for cost in costs),
        "processor_s": max(cost["processor_s"] for cost in costs),
        "memory_mb": max(cost["memory_mb"] for cost in costs),
        "rebuild_s": new_s,
        "unchanged_s": same_s,
        "bytes_a_value": size / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.record is not None:
        print(*record(given.record, given.name, given.steps).values())
        return
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    facts = machine(1)
    found = measure(given.processes, given.steps)
    rows = [
        [f"values of {found['processes']} runs at once", f"{found['values']:,}", ""],
        ["of these lost or doubled", f"{found['lost']}", "met" if found["lost"] == 0 else "NOT met"],
        ["from the end of a run to a complete mirror, at most", f"{found['behind_s']:.1f} s", ""],
        ["processor time of a follower, at most", f"{found['processor_s']:.1f} s", ""],
        ["memory of a follower, at most", f"{found['memory_mb']:.0f} MB", ""],
        ["a mirror of all, built anew", f"{found['rebuild_s']:.1f} s", ""],
        ["the same, nothing to do", f"{found['unchanged_s']:.1f} s", ""],
    ]
    print(describe(facts))
    print_table("Mirroring into one SQLite file", ["what", "measured", "goal: none lost"], rows)
    write(given.json, {"machine": facts, **found})


if __name__ == "__main__":
    main()
