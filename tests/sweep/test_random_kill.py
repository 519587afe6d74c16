"""SIGKILL at random moments, to cells and to what starts them: nothing is lost, nothing is done twice."""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dash_exp.record import journal
from dash_exp.record.folder import differences, read_final, read_json, read_rows
from tests.conftest import REPOSITORY
from tests.sweep.test_multirun import STAND_IN, TINY
from tests.test_run import SMALL

SWEEP = ["hydra.launcher.n_jobs=2", "cluster.retries.node=1000", "run.sweep=killed"]
CONTROLLER_SHARE = 0.2
KILLS, STEPS = 40, 80
"""A cell has so many steps that the kills come before its end."""
KEYS = {
    "steps": ("step",),
    "samples": ("step", "prompt", "index"),
    "evals": ("step", "dataset", "metric", "k"),
    "eval_samples": ("step", "dataset", "prompt", "index"),
}
"""Keys that identify a row of an attempt."""


class Killer:
    """Starts a sweep again and again, and kills what belongs to it at random moments."""

    def __init__(self, root: Path, overrides: Sequence[str], path: str, rng: random.Random):
        self.root, self.rng = root, rng
        self.command = [sys.executable, "-m", "dash_exp", "-m", *SWEEP, f"run.dir={root}", *overrides]
        self.environment = {**os.environ, "PYTHONPATH": path}
        self.killed: Counter[str] = Counter()
        self.controller = self.launch()

    def launch(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command,
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def cells(self) -> list[psutil.Process]:
        """Processes that run cells of this sweep, whichever process started them."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                if "dash_exp.cell" in words and any(word.startswith(str(self.root)) for word in words):
                    found.append(process)
        return found

    def strike(self, longest_s: float) -> None:
        """Kill the controller, or some of the running cells, at a random moment."""
        if self.controller.poll() is not None:
            self.controller = self.launch()
        if self.rng.random() < CONTROLLER_SHARE:
            time.sleep(self.rng.uniform(0, longest_s))
            self.controller.kill()
            self.controller.wait()
            self.killed["controller"] += 1
            self.controller = self.launch()
            return
        deadline = time.monotonic() + self.rng.uniform(0, longest_s)
        while time.monotonic() < deadline or not self.cells():
            if self.controller.poll() is not None:
                return
            time.sleep(0.02)
        victims = self.cells()
        for victim in self.rng.sample(victims, self.rng.randint(min(1, len(victims)), len(victims))):
            with suppress(psutil.Error):
                victim.send_signal(signal.SIGKILL)
                self.killed["cell"] += 1

    def finish(self, timeout_s: float) -> int:
        """Wait for the end of the sweep, undisturbed."""
        if self.controller.poll() is None:
            return self.controller.wait(timeout_s)
        self.controller = self.launch()
        return self.controller.wait(timeout_s)


def folders(root: Path) -> dict[str, Path]:
    return {folder.name: folder for folder in (root / "cells").iterdir()}


def doubled(folder: Path, calm: Path) -> list[str]:
    """Rows that one attempt wrote more often than an undisturbed one (a step may hold a prompt twice, where
    one pass over the prompts ends and the next begins)."""
    found = []
    for name, keys in KEYS.items():
        usual = Counter(key for key, _ in _written(calm, name, keys))
        counted = Counter(_written(folder, name, keys))
        found += [f"{name} {key} in attempt {n}" for (key, n), count in counted.items() if count > usual[key]]
    return found


def _written(folder: Path, name: str, keys: Sequence[str]) -> list[tuple[str, int]]:
    rows = read_rows(folder / f"{name}.jsonl").rows
    return [(str([row.get(key) for key in keys]), int(row["attempt"])) for row in rows]


def check_ends(root: Path) -> None:
    """Every cell is finished, and no process is left over."""
    for folder in folders(root).values():
        status = read_json(folder / "status.json")
        assert status["state"] == "finished", (folder, status)
        assert not list(folder.glob("checkpoints/*/resume"))
    assert not (root / "sweeps" / "killed" / "controller.json").exists()


@pytest.mark.long
def test_killed_many_times_each_cell_is_finished_once(tmp_path: Path) -> None:
    """With a stand-in for training, so that a kill costs a tenth of a second."""
    rng = random.Random(5)
    os.environ["PLAY_0"] = os.environ["PLAY_1"] = os.environ["PLAY_2"] = '[{"wait": 0.6}]'
    try:
        killer = Killer(tmp_path / "out", [*TINY, "seed=0,1,2"], STAND_IN, rng)
    finally:
        for seed in range(3):
            del os.environ[f"PLAY_{seed}"]
    for _ in range(8):
        killer.strike(0.8)
    assert killer.finish(60) == 0
    check_ends(tmp_path / "out")
    for folder in folders(tmp_path / "out").values():
        rows = read_rows(folder / "seen.jsonl").rows  # several, if one was killed before it recorded its end
        assert all(first["ended"] <= second["begun"] for first, second in itertools.pairwise(rows))
        assert rows[-1]["ended"] <= read_json(folder / "status.json")["heartbeat"]


@pytest.mark.long
def test_kills_leave_the_records_of_an_undisturbed_sweep(tmp_path: Path) -> None:
    """Real cells, killed while they start, evaluate, train, save and end; the seed is printed on failure."""
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 100_000))
    print(f"KILL_SEED={seed}")
    settings = [*SMALL, f"algorithm.steps={STEPS}", "algorithm=dash,pg", "seed=0,1", "algorithm.group_size=4"]
    calm = Killer(tmp_path / "calm", settings, str(REPOSITORY), random.Random(0))
    assert calm.finish(600) == 0
    longest_s = 0.6 * statistics.median(map(start_s, folders(tmp_path / "calm").values()))
    killed: Counter[str] = Counter()
    attempts = 0
    rng = random.Random(seed)
    while killed.total() < KILLS:  # usually one round
        root = tmp_path / f"killed-{killed.total()}"
        killer = Killer(root, settings, str(REPOSITORY), rng)
        while killed.total() + killer.killed.total() < KILLS and not is_finished(root):
            killer.strike(longest_s)
        assert killer.finish(600) == 0
        killed += killer.killed
        attempts += check_records(tmp_path / "calm", root)
    print(killed, attempts)
    assert killed["controller"] >= 2 and killed["cell"] >= KILLS // 2
    assert attempts > 8  # many of the kills hit a cell that had begun to record


def start_s(folder: Path) -> float:
    """From the start of a cell's process to its first work, in seconds."""
    began = journal.read(folder)[0]["time"]
    return float(read_rows(folder / "events.jsonl").rows[0]["start"] - began)


def is_finished(root: Path) -> bool:
    states = [read_json(folder / "status.json").get("state") for folder in root.glob("cells/*")]
    return len(states) == 4 and set(states) == {"finished"}


def check_records(calm: Path, root: Path) -> int:
    """Compare a sweep that was killed with one that was not. Returns how many attempts it took."""
    check_ends(root)
    expected, found = folders(calm), folders(root)
    assert expected.keys() == found.keys() and len(expected) == 4
    for name, folder in found.items():
        assert differences(expected[name], folder) == []
        assert [row["step"] for row in read_final(folder, "steps")] == list(range(1, STEPS + 1))
        assert doubled(folder, expected[name]) == []
        attempts = [row["attempt"] for row in read_json(folder / "provenance.json")["attempts"]]
        assert attempts == sorted(set(attempts))
    return sum(int(read_json(folder / "status.json")["attempt"]) for folder in found.values())
