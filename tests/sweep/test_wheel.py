"""What is installed from a wheel has its options, its sweeps and its launcher, wherever it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.long


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


def test_a_wheel_has_options_sweeps_and_launcher(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import dash_exp; print(dash_exp.__file__)")
    assert where.startswith(str(installed))
    assert run(installed, tmp_path, "-m", "dash_exp", "--info", "plugins").count("\t\tDashLauncher\n") == 1
    listed = run(installed, tmp_path, "-m", "dash_exp.sweep", "list")
    assert {path.stem for path in (REPOSITORY / "sweeps").glob("*.yaml")} <= set(listed.split())


def test_a_sweep_runs_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    small = ["model=tiny", "debug=fast", "evaluation=none", "cluster.threads=1"]
    output = run(installed, tmp_path, "-m", "dash_exp", "-m", *small, "algorithm=dash,pg")
    assert "2 cells: 2 finished" in output
