"""A race of real cells on a real SLURM, killed and started again. Skipped if no SLURM can be started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dash_exp.record import manifest as manifests
from dash_exp.record.folder import differences, read_json
from tests.conftest import REPOSITORY
from tests.sweep.real_slurm import output_of, steps, wait_for
from tests.sweep.sweep_fixtures import Capture, command, write_yaml

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("real_cluster")]
pytest_plugins = ["tests.sweep.slurm_fixtures"]


def test_a_race_by_rungs_is_killed_and_goes_on(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two recipes pause at a rung, and the better one goes on; the race itself is killed while they train.
    The record of the finished cell is that of a run without pauses."""
    monkeypatch.chdir(REPOSITORY)
    path, root = write_yaml(tmp_path, **{"learner.lr": [0.001, 0.01]}), tmp_path / "out"
    path.write_text(path.read_text().replace("[0, 1]", "[0]"))
    own = [f"run.dir={root}", "cluster=slurm", "cluster.cpus=1", "cluster.memory_gb=1", "algorithm.steps=4"]
    words = ["race", str(path), "--rungs", "2", "--halve", "reward", *own]
    first = subprocess.Popen([sys.executable, "-m", "dash_exp.sweep", *words], cwd=REPOSITORY)
    wait_for(lambda: any(root.glob("cells/*/steps.jsonl")), 120, "a step")
    first.kill()
    first.wait()
    assert command(*words) == 0, output_of(root / "sweeps" / "tried")
    assert "1 recipes advance to the end" in capsys.readouterr().out
    manifest = manifests.read(root / "sweeps" / "tried")
    folders = {
        read_json(manifest.cell(e) / "status.json")["state"]: manifest.cell(e) for e in manifest.entries
    }
    assert (
        steps(folders["interrupted"]) == 2
        and "paused at step 2" in (folders["interrupted"] / "log.txt").read_text()
    )
    finished = folders["finished"]
    (lr,) = [t for e in manifest.entries if manifest.cell(e) == finished for t in e.overrides if "lr" in t]
    single = [
        sys.executable,
        "-m",
        "dash_exp",
        "model=tiny",
        "debug=fast",
        "evaluation=none",
        "cluster.threads=1",
    ]
    single += [lr, "algorithm.steps=4", "seed=0", f"run.dir={tmp_path / 'single'}", "run.progress=none"]
    subprocess.run(single, cwd=REPOSITORY, check=True, timeout=240)
    assert differences(tmp_path / "single" / "cells" / finished.name, finished) == []
