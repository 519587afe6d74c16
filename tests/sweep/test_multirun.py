"""`python -m dash_exp -m` and the controllers of sweeps as processes; only training is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dash_exp.errors import UserError
from dash_exp.record import journal
from dash_exp.record.folder import Row, differences, read_json, read_rows
from dash_exp.record.locks import Locks
from dash_exp.record.manifest import read
from dash_exp.sweep import local
from dash_exp.sweep.dispatch import LaunchRequest, launch
from dash_exp.sweep.plan import make_plan
from dash_exp.sweep.resources import cluster_of
from tests.conftest import REPOSITORY

TINY = ["model=tiny", "debug=fast", "cluster.threads=1", "evaluation=none"]
STAND_IN = os.pathsep.join([str(Path(__file__).parent / "stand_in"), str(REPOSITORY)])


class Sweeps:
    """A folder for outputs, and commands that work in it."""

    def __init__(self, root: Path):
        self.root = root

    def start(self, *overrides: str, real: bool = False, **variables: str) -> subprocess.Popen[str]:
        path = str(REPOSITORY) if real else STAND_IN
        return subprocess.Popen(
            [sys.executable, "-m", "dash_exp", "-m", *TINY, f"run.dir={self.root}", *overrides],
            cwd=self.root.parent,
            env={**os.environ, "PYTHONPATH": path, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *overrides: str, real: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*overrides, real=real, **variables)
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def cells(self) -> dict[str, Path]:
        """Folders of cells by what comes before their ids, without the model and dataset."""
        names = sorted((self.root / "cells").iterdir())
        return {f.name.rpartition("-")[0].replace("tiny-digits-", ""): f for f in names}

    def states(self) -> dict[str, str | None]:
        return {name: read_json(folder / "status.json").get("state") for name, folder in self.cells().items()}

    def starts(self) -> dict[str, int]:
        return {name: len(read_rows(f / "seen.jsonl").rows) for name, f in self.cells().items()}

    def sweep(self) -> Path:
        (folder,) = (self.root / "sweeps").iterdir()
        return folder


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    monkeypatch.delenv("DASH_DATA", raising=False)
    return Sweeps(tmp_path / "out")


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def acts(*each: Row) -> str:
    return json.dumps(each)


@pytest.mark.long
def test_a_sweep_run_twice_at_once_and_again_runs_each_cell_once(sweeps: Sweeps) -> None:
    both = [sweeps.start("seed=0,1,2", PLAY_0=acts({"wait": 1})) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sweeps.starts() == {"dash-s0": 1, "dash-s1": 1, "dash-s2": 1}
    assert any("waiting for it to end" in out for out, _ in outputs)
    assert not (sweeps.sweep() / "controller.json").exists()
    again = sweeps.run("seed=0,1,2")
    assert again.returncode == 0
    assert again.stdout.startswith("sweep seed0+1+2-") and "3 cells, 3 finished already" in again.stdout
    assert sweeps.starts() == {"dash-s0": 1, "dash-s1": 1, "dash-s2": 1}
    more = sweeps.run("seed=0,1,2,3", "hydra.launcher.n_jobs=2")  # another sweep; its cells are the same
    assert more.returncode == 0 and "4 cells, 3 finished already" in more.stdout
    assert sweeps.starts() == {"dash-s0": 1, "dash-s1": 1, "dash-s2": 1, "dash-s3": 1}
    manifest = read(sweeps.root / "sweeps" / more.stdout.split()[1].rstrip(":"))
    assert [entry.folder for entry in manifest.entries] == [f.name for f in sweeps.cells().values()]


@pytest.mark.long
def test_a_signal_ends_the_sweep_and_the_same_command_goes_on(sweeps: Sweeps) -> None:
    process = sweeps.start("seed=0,1", PLAY_0=acts({"wait": 30}, {}))
    until(lambda: sweeps.root.exists() and list(sweeps.root.glob("cells/*-s0-*/output.txt")))
    until(lambda: sweeps.states()["dash-s0"] == "running")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, "")
    assert sweeps.states() == {"dash-s0": "interrupted", "dash-s1": "pending"}
    assert "2 cells: 1 pending, 1 interrupted" in out
    assert sweeps.run("seed=0,1").returncode == 0
    assert set(sweeps.states().values()) == {"finished"}


@pytest.mark.long
def test_a_failed_cell_is_started_again_by_the_same_command(sweeps: Sweeps) -> None:
    broken = acts(*[{"failure": "KeyError: 'x'"}] * 2, {})
    first = sweeps.run("seed=0,1", PLAY_0=broken)
    assert first.returncode == 1 and sweeps.states() == {"dash-s0": "failed", "dash-s1": "finished"}
    assert "failed (unknown): KeyError: 'x'; it will be started again" in first.stdout
    assert sweeps.run("seed=0,1", PLAY_0=broken).returncode == 0
    kinds = [row["kind"] for row in journal.read(sweeps.cells()["dash-s0"])]
    assert kinds == ["start", "end", "start", "end", "retry", "start", "end"]


@pytest.mark.long
def test_force_archives_and_runs_anew(sweeps: Sweeps) -> None:
    assert sweeps.run("seed=0,1").returncode == 0
    assert sweeps.run("seed=0,1", "run.force=true").returncode == 0
    assert len(list((sweeps.root / "archive").iterdir())) == 2
    assert sweeps.starts() == {"dash-s0": 1, "dash-s1": 1}
    process = sweeps.start("seed=0,1", "run.force=true", PLAY_0=acts({"wait": 30}))
    until(lambda: len(list((sweeps.root / "archive").iterdir())) == 4)
    until(lambda: sweeps.states().get("dash-s0") == "running")
    busy = sweeps.run("seed=0,1", "run.force=true")
    assert busy.returncode == 2 and "is being run by another process" in busy.stderr
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(list((sweeps.root / "archive").iterdir())) == 4


def test_all_errors_are_reported_at_once_and_nothing_is_written(sweeps: Sweeps) -> None:
    done = sweeps.run("seed=0,1", "hydra.launcher.n_jobs=0", "hydra.launcher.wait=maybe")
    assert (done.returncode, done.stdout) == (2, "")
    assert "2 problems, nothing was started" in done.stderr
    assert "hydra.launcher.n_jobs: got 0" in done.stderr and "hydra.launcher.wait: got 'maybe'" in done.stderr
    with pytest.raises(UserError, match="cannot name a folder"):
        detached(sweeps.root, name="../x")
    with pytest.raises(UserError, match="must be at least 1"):
        detached(sweeps.root, n_jobs=0)
    assert not (sweeps.root / "cells").exists() and not (sweeps.root / "sweeps").exists()


def test_a_sweep_grows_but_never_loses_a_cell(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", STAND_IN)
    assert detached(sweeps.root, seeds=(0, 1), cells=["none"]) == 0
    with pytest.raises(UserError, match="is another sweep: 1 of its 2 cells are not in this one"):
        detached(sweeps.root, seeds=(0, 2), cells=["none"])
    assert detached(sweeps.root, seeds=(0, 1, 2), cells=["none"]) == 0
    assert len(read(sweeps.sweep()).entries) == 3


@pytest.mark.long
def test_the_same_command_with_other_data_is_another_sweep(sweeps: Sweeps, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    words = [
        "seed=0,1",
        "dataset=gsm8k",
        f"dataset.path={data}",
        "dataset.verifier=integer",
        "dataset.extraction=first_integer",
    ]
    for answer in "23":
        data.write_text(json.dumps({"id": "1", "problem": "1+1", "answer": answer}) + "\n")
        assert sweeps.run(*words).returncode == 0
    assert len(list((sweeps.root / "sweeps").iterdir())) == 2
    assert len(list((sweeps.root / "cells").iterdir())) == 4


@pytest.mark.long
def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    try:
        done = Sweeps(place / "out").run("seed=range(0,40)")
        assert done.returncode == 2, done.stdout
        assert "no space left" in done.stderr and "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        done = Sweeps(place / "other").run("seed=0,1")
        assert done.returncode == 2 and "Traceback" not in done.stderr and "run.dir" in done.stderr
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.long
def test_batches_of_hydras_sweeper_are_sweeps_of_their_own(sweeps: Sweeps) -> None:
    done = sweeps.run("seed=0,1,2", "hydra.sweeper.max_batch_size=2", "run.sweep=mine")
    assert done.returncode == 0
    assert sorted(f.name for f in (sweeps.root / "sweeps").iterdir()) == ["mine", "mine-2"]


def detached(
    root: Path,
    *,
    seeds: Sequence[int] = (0, 1),
    name: str = "mine",
    n_jobs: int = 1,
    cells: list[str] | None = None,
    wait: bool = False,
) -> int:
    (root / "cache").mkdir(parents=True, exist_ok=True)
    plan = make_plan(name, [(*TINY, f"seed={seed}") for seed in seeds], root=root)
    request = LaunchRequest(plan, root, cluster_of(plan.actions), n_jobs, cells=cells)
    return launch(request, wait=wait, detached=True, log=lambda text: None)


def controller(sweeps: Sweeps) -> int | None:
    return Locks.now().holder(sweeps.root / "sweeps" / "mine" / local.LOCK)


@pytest.mark.long
def test_a_detached_controller_takes_orders_and_ends(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", STAND_IN)
    monkeypatch.setenv("PLAY_0", acts({"wait": 3, "failure": "KeyError: 'x'"}, {"wait": 30}))
    assert detached(sweeps.root) == 0
    first = controller(sweeps)
    assert first is not None
    assert read_json(sweeps.sweep() / "controller.json")["pid"] == first
    until(lambda: sweeps.states()["dash-s0"] == "running")
    assert detached(sweeps.root, n_jobs=2) == 0  # leaves an order, starts no second controller
    assert controller(sweeps) == first
    order = local.read_order(sweeps.sweep())
    assert order is not None and (order.n_jobs, order.taken) == (2, False)
    until(lambda: read_json(sweeps.cells()["dash-s0"] / "status.json")["attempt"] == 2)
    os.kill(first, signal.SIGTERM)
    until(lambda: controller(sweeps) is None)
    assert sweeps.states() == {"dash-s0": "interrupted", "dash-s1": "finished"}  # what fails goes last
    assert not (sweeps.sweep() / "controller.json").exists()
    assert "ended by SIGTERM" in (sweeps.sweep() / "controller.log").read_text()
    monkeypatch.setenv("PLAY_0", acts({}))
    assert detached(sweeps.root, wait=True) == 0
    assert set(sweeps.states().values()) == {"finished"} and sweeps.starts()["dash-s1"] == 1


def test_only_the_cells_that_were_named_are_run(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", STAND_IN)
    assert detached(sweeps.root, cells=["nothing"]) == 0
    (name,) = (f.name for key, f in sweeps.cells().items() if key == "dash-s1")
    assert detached(sweeps.root, cells=[name], wait=True) == 0
    assert sweeps.starts() == {"dash-s0": 0, "dash-s1": 1}


@pytest.mark.long
def test_the_next_controller_waits_for_the_cells_of_a_killed_one(
    sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", STAND_IN)
    monkeypatch.setenv("PLAY_0", acts({"wait": 3}))
    detached(sweeps.root)
    pid = controller(sweeps)
    assert pid is not None
    until(lambda: sweeps.states()["dash-s0"] == "running")
    os.kill(pid, signal.SIGKILL)
    until(lambda: controller(sweeps) is None)
    assert sweeps.states()["dash-s0"] == "running"  # it goes on by itself
    assert detached(sweeps.root, wait=True) == 0
    assert sweeps.starts() == {"dash-s0": 1, "dash-s1": 1}


def test_a_controller_that_cannot_start_is_reported(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="the sweep's controller could not be started"):
        detached(sweeps.root)


@pytest.mark.long
def test_the_plugin_is_found_from_anywhere_and_hydras_own_launchers_stay(sweeps: Sweeps) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dash_exp", "--info", "plugins"],
        cwd=sweeps.root.parent,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\t\tDashLauncher\n") == done.stdout.count("\t\tBasicLauncher\n") == 1
    done = sweeps.run("seed=0,1", "hydra/launcher=basic")
    assert done.returncode == 0 and not (sweeps.root / "sweeps").exists()
    assert sweeps.starts() == {"dash-s0": 1, "dash-s1": 1}


@pytest.mark.long
def test_real_cells_two_at_once_give_the_records_of_one_after_the_other(sweeps: Sweeps) -> None:
    done = sweeps.run("algorithm=dash,pg", "hydra.launcher.n_jobs=2", real=True)
    assert done.returncode == 0, done.stdout + done.stderr
    single = Sweeps(sweeps.root.with_name("single"))
    assert single.run("algorithm=dash,pg", real=True).returncode == 0
    for name, folder in sweeps.cells().items():
        assert differences(folder, single.cells()[name]) == []


@pytest.mark.long
def test_a_sweeper_that_searches_is_told_what_each_cell_came_to(sweeps: Sweeps) -> None:
    """Their mean reward, since these cells are not evaluated."""
    plugins = os.pathsep.join([str(Path(__file__).parent / "searcher"), str(REPOSITORY)])
    done = sweeps.run("hydra/sweeper=searcher", real=True, PYTHONPATH=plugins)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = list((sweeps.root / "cells").iterdir())
    by_rate = {yaml.safe_load((f / "config.yaml").read_text())["learner"]["lr"]: f for f in folders}
    rewards = [
        statistics.fmean(row["reward/mean"] for row in read_rows(by_rate[rate] / "steps.jsonl").rows)
        for rate in (1e-4, 1e-3)
    ]
    assert f"found {rewards}" in done.stdout


@pytest.mark.long
def test_the_stock_submitit_launcher_keeps_working(sweeps: Sweeps) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = sweeps.run(
        "seed=0,1",
        "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=5",
        f"hydra.launcher.submitit_folder={sweeps.root.parent}/jobs",
        real=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweeps.states() == {"dash-s0": "finished", "dash-s1": "finished"}
