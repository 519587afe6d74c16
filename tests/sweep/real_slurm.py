"""A real SLURM on this machine for the session's tests: two nodes of two CPUs, small arrays, accounting."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from dash_exp.record import journal
from dash_exp.record.folder import Row, read_json, read_rows
from tests.conftest import REPOSITORY

SCRIPTS = REPOSITORY.parent / "shared" / "slurm"
LARGEST_ARRAY = 3


class Cluster:
    """What `start` has started. `home`: its folder."""

    def __init__(self) -> None:
        self.home = Path("/nowhere")

    def start(self) -> None:
        """Start those of its daemons that do not run."""
        done = subprocess.run([SCRIPTS / "start"], stdout=subprocess.PIPE, text=True, timeout=600, check=True)
        for name, value in re.findall(r"^export (\w+)=(\S+)$", done.stdout, re.MULTILINE):
            os.environ[name] = value
        self.home = Path(os.environ["SLURM_TEST_HOME"])

    def stop(self) -> None:
        subprocess.run([SCRIPTS / "stop"], timeout=120, check=False)
        shutil.rmtree(self.home, ignore_errors=True)
        for name in ("SLURM_TEST_HOME", "SLURM_CONF"):
            os.environ.pop(name, None)

    def kill_controller(self) -> None:
        """Kill slurmctld, as a crash of its machine would."""
        pid = int((self.home / "run" / "slurmctld.pid").read_text())
        os.kill(pid, 9)
        wait_for(lambda: not Path(f"/proc/{pid}/exe").exists(), 10, "slurmctld to die")

    def configure(self, **settings: str | None) -> None:
        """Change its configuration (None: leave a key out), and start the controller anew with it."""
        path = self.home / "slurm.conf"
        lines = [line for line in path.read_text().splitlines() if line.partition("=")[0] not in settings]
        lines += [f"{key}={value}" for key, value in settings.items() if value is not None]
        path.write_text("\n".join([*lines, ""]))
        self.kill_controller()
        self.start()


def wait_for(is_so: Callable[[], object], timeout_s: float, what: str, every_s: float = 0.1) -> None:
    deadline = time.time() + timeout_s
    while not is_so():
        assert time.time() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(every_s)


def state(folder: Path) -> str:
    return str(read_json(folder / "status.json").get("state"))


def steps(folder: Path) -> int:
    return len(read_rows(folder / "steps.jsonl").rows)


def kinds(folder: Path) -> list[str]:
    return [str(row["kind"]) for row in journal.read(folder)]


def requeues(folder: Path) -> list[Row]:
    return [row for row in journal.read(folder) if row["kind"] == "requeue"]


def accounted(job: str, wanted: str = "State,ExitCode", timeout_s: float = 30) -> str:
    """The last run of a job in sacct, once that has ended; sacct lags behind."""
    command = ["sacct", "-nPX", "-j", job, f"--format={wanted},End"]

    def read() -> str:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return text.splitlines()[-1] if text else "|Unknown"

    wait_for(lambda: not read().endswith("Unknown"), timeout_s, f"the end of {job} in sacct")
    return read().rpartition("|")[0]


def output_of(sweep_folder: Path) -> str:
    """Everything that the jobs of a sweep have printed, for the message of a failed test."""
    return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(sweep_folder.glob("jobs/*_log.out")))
