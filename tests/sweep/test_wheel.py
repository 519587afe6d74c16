"""The script `dash-exp`, and what is installed from a wheel: options, sweeps, launcher and analysis."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dash_exp.__main__ import COMMANDS, console
from dash_exp.record.folder import read_rows
from tests.conftest import REPOSITORY

DEMO = REPOSITORY / "analysis" / "data" / "demo"


def test_the_script_runs_the_analysis_and_not_a_module_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "analysis.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dash-exp", "report", "live", str(DEMO), "--once"])
    assert console() == 0
    assert "21 finished" in capsys.readouterr().out


def test_the_script_names_the_nearest_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dash-exp", "swep", "list"])
    assert console() == 2
    assert "did you mean 'sweep'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"report"}))
def test_every_command_of_the_script_is_a_module_that_runs(command: str) -> None:
    places = (f"{command}.py", f"{command}/__main__.py")
    assert any((REPOSITORY / "dash_exp" / place).is_file() for place in places)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel of the files that git knows or would know."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if files.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, files.stdout.split("\0")):
        source, target = REPOSITORY / name, folder / "source" / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    pip = [sys.executable, "-m", "pip"]
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, "wheel", *options, str(folder / "source")], check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def run(installed: Path, folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_a_wheel_has_options_sweeps_and_launcher(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import dash_exp; print(dash_exp.__file__)")
    assert where.startswith(str(installed))
    assert (installed / "dash_exp" / "py.typed").is_file()
    script = str(installed / "bin" / "dash-exp")
    assert run(installed, tmp_path, script, "--info", "plugins").count("\t\tDashLauncher\n") == 1
    listed = run(installed, tmp_path, script, "sweep", "list")
    assert {path.stem for path in (REPOSITORY / "sweeps").glob("*.yaml")} <= set(listed.split())


@pytest.mark.long
def test_a_report_is_made_from_a_wheel_in_any_folder(installed: Path, tmp_path: Path) -> None:
    """The demo data are in the wheel; neither a checkout nor the user's own module is looked at."""
    (tmp_path / "analysis.py").write_text("raise SystemExit('the wrong module')")
    demo = installed / "dash_exp_analysis" / "data" / "demo"
    script = str(installed / "bin" / "dash-exp")
    output = run(installed, tmp_path, script, "report", "live", str(demo), "--once")
    assert "21 finished" in output
    cell = str(next((demo / "cells").glob("dash-*")))
    assert "1 cells ->" in run(installed, tmp_path, script, "report", cell, "--out", "report")
    assert (tmp_path / "report" / "report.html").is_file()
    assert not (installed / "analysis").exists()


@pytest.mark.long
def test_a_sweep_runs_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    small = ["model=tiny", "debug=fast", "evaluation=none", "cluster.threads=1"]
    output = run(installed, tmp_path, "-m", "dash_exp", "-m", *small, "algorithm=dash,pg")
    assert "2 cells: 2 finished" in output


@pytest.mark.long
def test_the_examples_run_from_a_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    for example in (REPOSITORY / "examples").iterdir():
        place = tmp_path / ("sweeps" if example.suffix == ".yaml" else "") / example.name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(example.read_bytes())
    script = str(installed / "bin" / "dash-exp")
    data = ["dataset=own", "dataset.kind=own_dataset:rows", "dataset.verifier=own_reward:score"]
    judged = run(installed, tmp_path, script, "judge", *data)
    assert '"outcomes": {"correct": 44}' in judged and "own_reward:score@" in judged
    own = [
        *data,
        "dataset.template=own_dataset:prompt",
        "dataset.test_split=test",
        "sampler.max_new_tokens=24",
    ]
    own += ["dataset.rewards=[own_reward:brevity,own_reward:starts_with_digit]"]
    own += ["dataset.reward_weights=[0.1,0.5]", "algorithm.surrogate=own_advantage:soft_clip"]
    own += ["filter.name=own_filter:keep_hardest", "filter.share=0.5", "cluster.threads=1"]
    assert "Finished after 2 steps" in run(installed, tmp_path, script, "debug=fast", *own)
    (cell,) = (tmp_path / "outputs" / "cells").iterdir()
    evaluated = [r["dataset"] for r in read_rows(cell / "evals.jsonl").rows if r["metric"] == "accuracy"]
    assert evaluated == ["own", "own"]
    (row, _) = read_rows(cell / "steps.jsonl").rows
    assert row["reward/shaped_mean"] == pytest.approx(
        row["reward/mean"]
        + 0.1 * row["reward/own_reward.brevity"]
        + 0.5 * row["reward/own_reward.starts_with_digit"]
    )
    listed = run(installed, tmp_path, script, "sweep", "list", "own_sweep", "--json")
    assert json.loads(listed)[0]["combinations"] == 2
    launched = run(installed, tmp_path, script, "sweep", "launch", "own_sweep", "--wait", "cluster.threads=1")
    assert "2 finished" in launched
