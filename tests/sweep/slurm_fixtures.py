"""Two clusters for tests: fake SLURM commands on PATH, and a real SLURM on this machine."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dash_exp.sweep.slurm import queue
from tests.sweep.real_slurm import LARGEST_ARRAY, SCRIPTS, Cluster
from tests.sweep.slurm_helpers import FakeSlurm

FAKE = Path(__file__).parent / "fake_slurm" / "fake.py"
SCHEDULER = "batch_sched_delay=0,bf_interval=1,sched_interval=1"
"""Schedule every second."""
COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol", "sinfo", "sacctmgr")


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A cluster that answers, accepts jobs and never starts one."""
    home = tmp_path / "slurm"
    (home / "bin").mkdir(parents=True)
    for name in COMMANDS:
        script = home / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{FAKE}" {name} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(home))
    monkeypatch.setattr(queue, "SILENCE", queue.Silence())
    return FakeSlurm(home)


@pytest.fixture(scope="session")
def real_cluster() -> Iterator[Cluster]:
    if not (SCRIPTS / "start").is_file():
        pytest.skip(f"no real SLURM: there is no {SCRIPTS / 'start'}")
    if os.geteuid() != 0:
        pytest.skip("no real SLURM: starting one needs root")
    cluster = Cluster()
    try:
        cluster.start()
    except subprocess.CalledProcessError:
        pytest.skip("no real SLURM: it does not start here (see its output)")
    cluster.configure(MaxArraySize=str(LARGEST_ARRAY), KillWait="30", SchedulerParameters=SCHEDULER)
    yield cluster
    cluster.stop()
