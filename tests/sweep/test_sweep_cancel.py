"""`sweep cancel`: which cells are asked to end, how often, what is reported; and a real sweep, killed."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from dash_exp.record import journal
from dash_exp.record import manifest as manifests
from dash_exp.record.folder import read_final, read_json
from dash_exp.record.locks import is_alive
from dash_exp.record.manifest import Manifest
from dash_exp.sweep.dispatch import cancel
from dash_exp.sweep.states import CellState
from dash_exp.sweep.status import read_sweep
from tests.sweep.slurm_helpers import FakeSlurm
from tests.sweep.sweep_fixtures import (
    Capture,
    cell_of,
    command,
    held_by_a_process,
    ran,
    refused,
    running,
    states,
    sweep_of,
    write_yaml,
)

pytest_plugins = ["tests.sweep.slurm_fixtures"]
pytestmark = pytest.mark.usefixtures("eighty_columns")

STUBBORN = """
import signal, sys, time
from pathlib import Path
from dash_exp.record.folder import Recorder
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(time.time()))
with Recorder(Path(sys.argv[1])) as recorder:
    recorder.status("running", 3)
    print("running", flush=True)
    until = time.time() + 60
    while time.time() < until and not (asked and time.time() > asked[0] + 0.6):
        time.sleep(0.05)
    recorder.status("interrupted", 3, failure="SIGTERM")
print(len(asked), flush=True)
"""
"""A cell whose step goes on for half a second, and that counts how often it is asked to end."""


def stubborn(folder: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    return running(STUBBORN, folder)


def ids(manifest: Manifest) -> set[str]:
    return {entry.id for entry in manifest.entries}


def test_cancel_ends_what_runs_and_marks_what_does_not(root: Path, capsys: Capture) -> None:
    manifest = sweep_of(root, [cell_of("dash", seed, seed) for seed in range(4)], name="mine")
    folders = [manifest.cell(entry) for entry in manifest.entries]
    ran(folders[0], "finished", 20)
    ran(folders[1], "failed", 3, failure="boom")
    with held_by_a_process(folders[2]) as process:
        assert command("cancel", "mine", "seed=*", f"run.dir={root}") == 0
        assert process.wait(timeout=20) == 143
    assert "2 of 4 cells cancelled" in capsys.readouterr().out
    assert states(manifest) == ["finished", "failed", "cancelled", "cancelled"]
    assert [read_json(folder / "status.json")["state"] for folder in folders] == [
        "finished",
        "failed",
        "cancelled",
        "cancelled",
    ]
    assert read_json(folders[2] / "status.json")["step"] == 3
    assert command("cancel", "mine", f"run.dir={root}") == 0
    assert "nothing to cancel: 1 failed, 2 cancelled, 1 finished" in capsys.readouterr().out
    assert [len(journal.read(folder)) for folder in folders] == [0, 0, 1, 1]


def test_cancel_twice_at_once_asks_once(root: Path) -> None:
    manifest = sweep_of(root, [cell_of("dash", 0, 1)], name="mine")
    with stubborn(manifest.cell(manifest.entries[0])) as process:

        def run() -> None:
            cancel(manifest, ids(manifest), entire=False, wait_s=0.3)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert read_sweep(manifest).cells[0].cell.state == "running"
        for thread in threads:
            thread.join()
        cancel(manifest, ids(manifest), entire=True, wait_s=20)
        assert process.stdout is not None and process.stdout.readline() == "1\n"
    assert states(manifest) == ["cancelled"]


def test_cancel_now_asks_again(root: Path) -> None:
    manifest = sweep_of(root, [cell_of("dash", 0, 1)], name="mine")
    with stubborn(manifest.cell(manifest.entries[0])) as process:
        assert cancel(manifest, ids(manifest), entire=False, wait_s=0.1).ending
        cancel(manifest, ids(manifest), entire=False, again=True, wait_s=20)
        assert process.stdout is not None and process.stdout.readline() == "2\n"


def test_a_cell_that_ends_after_the_command_is_shown_cancelled(root: Path) -> None:
    manifest = sweep_of(root, [cell_of("dash", 0, 1)], name="mine")
    folder = manifest.cell(manifest.entries[0])
    with stubborn(folder) as process:
        done = cancel(manifest, ids(manifest), entire=False, wait_s=0.1)
        assert [one.entry.id for one in done.ending] == ["0000001c"]
        assert read_sweep(manifest).cells[0].cell.note == "asked to end"
        process.wait(timeout=20)
    assert read_json(folder / "status.json")["state"] == "interrupted"  # its own last word
    assert states(manifest) == ["cancelled"]
    journal.note(folder, "retry")
    assert states(manifest) == ["interrupted"]


def test_cancelling_a_sweep_skips_what_another_sweep_runs(root: Path) -> None:
    cells = [cell_of("dash", 0, 1), cell_of("grpo", 0, 2)]
    mine, other = sweep_of(root, cells, name="mine"), sweep_of(root, cells[:1], name="other")
    shared = mine.cell(mine.entries[0])
    with held_by_a_process(shared) as process:
        journal.note(shared, "start", host="here", pid=process.pid, job=None, sweep="other")
        done = cancel(mine, ids(mine), entire=True, wait_s=0.1)
        assert [(one.entry.id, why) for one, why in done.skipped] == [
            ("0000001c", "run by the sweep other; name it to cancel it as well")
        ]
        assert [one.entry.id for one in done.ended] == ["0000002c"]
        assert process.poll() is None and states(other) == ["running"]
        cancel(mine, {"0000001c"}, entire=False, wait_s=20)  # by name, it is meant
        assert process.poll() is not None
    assert states(other) == ["cancelled"]


def test_cancel_takes_jobs_back_from_slurm(root: Path, fake_slurm: FakeSlurm, capsys: Capture) -> None:
    manifest = sweep_of(root, [cell_of("dash", seed, seed) for seed in range(3)], name="mine")
    for number, entry in enumerate(manifest.entries):
        journal.note(manifest.cell(entry), "queued", job=f"12_{number // 2}", sweep="mine")
    fake_slurm.change("12_0", state="RUNNING")
    fake_slurm.change("12_1", state="PENDING", reason="Priority")
    assert states(manifest) == ["running", "running", "queued"]
    where = f"run.dir={root}"
    assert "is run by the same job" in refused(capsys, "cancel", "mine", "seed=0", where)
    assert fake_slurm.calls("scancel") == []
    assert all(len(journal.read(manifest.cell(e))) == 1 for e in manifest.entries)
    assert command("cancel", "mine", "seed=2", where) == 0
    assert "1 of 1 cells cancelled" in capsys.readouterr().out
    assert fake_slurm.calls("scancel") == ["scancel --quiet 12_1"]
    assert states(manifest) == ["running", "running", "cancelled"]
    fake_slurm.set(silent=["squeue", "sacct"])
    assert "SLURM does not answer" in refused(capsys, "cancel", "mine", where)
    fake_slurm.set(silent=[])
    for _ in range(2):
        cancel(manifest, ids(manifest), entire=True, wait_s=0.0)
    assert fake_slurm.calls("scancel")[1:] == ["scancel --quiet --signal=TERM 12_0"]  # asked once
    assert states(manifest) == ["running", "running", "cancelled"]
    assert read_sweep(manifest).cells[0].cell.note == "asked to end"
    cancel(manifest, ids(manifest), entire=True, again=True, wait_s=5.0)
    assert fake_slurm.calls("scancel")[2:] == ["scancel --quiet 12_0"]
    assert states(manifest) == ["cancelled"] * 3


@pytest.mark.long
def test_a_real_sweep_is_shown_as_it_is_through_kills_and_a_cancel(tmp_path: Path, capsys: Capture) -> None:
    path = write_yaml(tmp_path, algorithm=["dash", "grpo"], **{"algorithm.steps": [40]})
    where = f"run.dir={tmp_path / 'outputs'}"
    assert command("launch", path, where, "-n", 2) == 0
    manifest = manifests.read(tmp_path / "outputs" / "sweeps" / "tried")
    killed = running_past(manifest, step=2)
    assert read_sweep(manifest).controller is not None
    os.kill(int(read_json(manifest.folder / "controller.json")["pid"]), signal.SIGKILL)
    os.kill(killed.pid, signal.SIGKILL)  # type: ignore[arg-type]
    await_death(killed.pid)
    state = read_sweep(manifest)
    assert state.controller is None or not state.controller["alive"]
    shown = next(one.cell for one in state.cells if one.cell.folder == killed.folder)
    assert shown.state == "interrupted" and shown.note.startswith("exited without recording a status")
    capsys.readouterr()
    assert command("launch", "tried", where) == 0  # goes on, with two at once as before
    assert command("launch", "tried", where) == 0  # twice: the first one has it
    assert "already" in capsys.readouterr().out
    asked = running_past(manifest, step=2)
    assert command("cancel", "tried", where) == 0
    settle(manifest)
    assert set(states(manifest)) <= {"finished", "cancelled"} and "cancelled" in states(manifest)
    assert not any(asked.pid == one.cell.pid for one in read_sweep(manifest).cells)
    assert command("retry", "tried", where, "-n", 2, "--wait") == 0
    assert states(manifest) == ["finished"] * 4
    for entry in manifest.entries:
        rows = read_final(manifest.cell(entry), "steps")
        assert [row["step"] for row in rows] == list(range(1, 41))


def running_past(manifest: Manifest, step: int, patience_s: float = 120.0) -> CellState:
    """A cell that runs and has made some steps. Whenever a cell is shown as running, its process exists."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        for one in read_sweep(manifest).cells:
            cell = one.cell
            if cell.state == "running":
                recorded = read_json(cell.folder / "status.json")["state"]
                assert cell.pid is not None and (is_alive(cell.pid) or recorded != "running")
                if cell.step >= step:
                    return cell
        time.sleep(0.1)
    raise AssertionError(f"nothing came so far: {read_sweep(manifest).counts}")


def await_death(pid: int | None) -> None:
    while pid is not None and is_alive(pid):
        time.sleep(0.02)


def settle(manifest: Manifest, patience_s: float = 60.0) -> None:
    until = time.monotonic() + patience_s
    while "running" in states(manifest) and time.monotonic() < until:
        time.sleep(0.2)
