"""`python -m dash_exp.sweep`, as typed: what it prints, what it refuses, whom it asks to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dash_exp.launch import journal
from dash_exp.launch.cancel import cancel
from dash_exp.launch.manifest import Manifest
from dash_exp.launch.status import watch
from dash_exp.launch.watching import logs_command
from dash_exp.record import read_json
from dash_exp.sweep import COMMANDS, main, parser_of
from tests.conftest import REPOSITORY
from tests.launch.slurm_helpers import FakeSlurm
from tests.launch.sweep_fixtures import cell_of, held_by_a_process, ran, sweep_of

pytest_plugins = ["tests.launch.slurm_fixtures"]
Capture = pytest.CaptureFixture[str]

STUBBORN = """
import signal, sys, time
from pathlib import Path
from dash_exp.record import Recorder
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(time.time()))
with Recorder(Path(sys.argv[1])) as recorder:
    recorder.status("running", 3)
    print("running", flush=True)
    until = time.time() + 60
    while time.time() < until and not (asked and time.time() > asked[0] + 1.2):
        time.sleep(0.05)
    recorder.status("interrupted", 3, failure="SIGTERM")
print(len(asked), flush=True)
"""
"""A cell whose step goes on for a second, and that counts how often it is asked to end."""


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


def command(*words: object) -> int:
    return main([str(word) for word in words])


def refused(capsys: Capture, *words: object) -> str:
    assert command(*words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


@contextmanager
def stubborn(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, str(folder), "dash_exp.cell"], cwd=REPOSITORY,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ids(manifest: Manifest) -> set[str]:
    return {entry.id for entry in manifest.entries}


def states(manifest: Manifest) -> list[str]:
    return [one.cell.state for one in watch(manifest).cells]


def write_yaml(tmp_path: Path, **axes: list[Any]) -> Path:
    path = tmp_path / "tried.yaml"
    path.write_text(json.dumps({
        "claim": "It works.", "question": "Does it?", "feeds": ["table_tried"], "seeds": [0, 1],
        "overrides": {"model": "tiny", "debug": "fast", "evaluation": "none", "cluster.threads": 1},
        "grid": axes,
    }))  # fmt: skip
    return path


def test_help_names_every_command(capsys: Capture) -> None:
    assert command("--help") == 0
    text = capsys.readouterr().out
    assert all(f"dash_exp.sweep {name} " in text for name in COMMANDS)
    assert max(map(len, text.splitlines())) <= 80
    assert command() == 2
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            parser_of(name).parse_args(["--help"])
        assert end.value.code == 0


def test_what_the_user_can_mend_is_told_with_exit_code_2(root: Path, capsys: Capture) -> None:
    sweep_of(root, [cell_of("dash", 0, 1)], name="mine")
    where = f"run.dir={root}"
    assert "did you mean 'status'" in refused(capsys, "statsu", "mine")
    assert "did you mean 'mine'" in refused(capsys, "status", "mien", where)
    assert "which one?" in refused(capsys, "cancel", where)
    assert "required: sweep" in refused(capsys, "plan")
    assert "unrecognized arguments: --waits" in refused(capsys, "launch", "demo", "--waits")
    assert "of which sweep?" in refused(capsys, "status", where, "--failed")
    assert "selects none of the 1 cells" in refused(capsys, "logs", "mine", "seed=7", where)
    assert "selects none of the 1 cells" in refused(capsys, "cancel", "mine", "grpo*", where)
    assert "goes without --watch" in refused(capsys, "status", "mine", where, "--json", "--watch")
    assert "has not been launched" in refused(capsys, "status", "demo", where)
    assert "must be a whole number from 1 on" in refused(capsys, "plan", "demo", where, "-n", 0)
    assert "cells are frozen" in refused(capsys, "launch", "mine", where, "algorithm=grpo")


def test_a_plan_has_all_faults_at_once_and_writes_nothing(tmp_path: Path, capsys: Capture) -> None:
    path = write_yaml(tmp_path, algorithm=["dash", "dahs"])
    where = f"run.dir={tmp_path / 'outputs'}"
    told = refused(capsys, "plan", path, where, "learner.lrr=1")
    assert "2 problems" in told and "did you mean 'dash'" in told and "learner.lrr" in told
    assert refused(capsys, "launch", path, where, "learner.lrr=1") == told
    assert not (tmp_path / "outputs").exists()


def test_plan_shows_what_would_run(tmp_path: Path, capsys: Capture) -> None:
    path = write_yaml(tmp_path, algorithm=["dash", "grpo"], **{"algorithm.steps": [3, 3.0]})
    where = f"run.dir={tmp_path / 'outputs'}"
    path.write_text(path.read_text().replace("3.0", "5"))
    assert command("plan", path, where, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["claim"], plan["feeds"]) == ("It works.", ["table_tried"])
    assert len(plan["cells"]) == 8 and {cell["state"] for cell in plan["cells"]} == {"new"}
    assert all(cell["folder"].endswith(cell["id"]) for cell in plan["cells"])
    assert all(cell["gpu_hours_left"] is None for cell in plan["cells"])
    assert command("plan", path, where, "algorithm=dash", "seed=4") == 0
    text = capsys.readouterr().out
    assert "2 cells: 2 new" in text and "0 GPU, 1 CPU" in text
    assert max(map(len, text.splitlines())) <= 80
    assert not (tmp_path / "outputs").exists()


def test_two_sweeps_under_one_name_are_refused_before_anything_starts(
    tmp_path: Path, capsys: Capture
) -> None:
    path = write_yaml(tmp_path, algorithm=["dash"])
    root = tmp_path / "outputs"
    manifest = sweep_of(root, [cell_of("dash", 0, 1)], name="tried")
    told = refused(capsys, "launch", path, f"run.dir={root}")
    assert "is another sweep: 1 of its 1 cells are not in this one" in told
    assert sorted(file.name for file in manifest.folder.iterdir() if file.name[0] != ".") == ["manifest.json"]
    assert len(list((root / "cells").iterdir())) == 1


def test_a_broken_manifest_hides_no_other_sweep(root: Path, capsys: Capture) -> None:
    sweep_of(root, [cell_of("dash", 0, 1)], name="mine")
    broken = sweep_of(root, [cell_of("dash", 0, 1)], name="torn").folder / "manifest.json"
    broken.write_text(broken.read_text()[:100])
    assert command("status", f"run.dir={root}") == 0
    told = capsys.readouterr()
    assert "mine" in told.out and "torn: holds no manifest.json" in told.err
    assert "torn: holds no manifest.json" in refused_after(capsys, "list", f"run.dir={root}")


def refused_after(capsys: Capture, *words: object) -> str:
    """As `refused`, after something was shown."""
    assert command(*words) == 2
    return capsys.readouterr().err


def test_list_tells_claims_and_how_far_each_is(root: Path, capsys: Capture) -> None:
    manifest = sweep_of(root, [cell_of("dash", 0, 1), cell_of("dash", 1, 2)], name="mine")
    ran(manifest.cell(manifest.entries[0]), "finished", 20)
    assert command("list", "--json", f"run.dir={root}") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["mine"]["counts"] == {"pending": 1, "finished": 1}
    assert rows["demo"]["combinations"] == 6 and rows["demo"]["counts"] is None
    assert rows["demo"]["feeds"] and rows["demo"]["claim"].endswith(".")
    assert "did you mean 'demo'" in refused(capsys, "list", "dmo", f"run.dir={root}")
    assert command("list", "demo*", "mine", f"run.dir={root}") == 0
    text = capsys.readouterr().out
    assert "here 2 cells: 1 pending, 1 finished" in text and "\nkl\n" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_status_of_one_sweep_of_some_cells_and_of_all(root: Path, capsys: Capture) -> None:
    manifest = sweep_of(root, [cell_of("dash", 0, 1), cell_of("grpo", 0, 2)], name="mine")
    ran(manifest.cell(manifest.entries[1]), "failed", 4, failure="boom")
    where = f"run.dir={root}"
    assert command("status", where) == 0
    assert "mine      2        0       0      1    - 1 pending" in capsys.readouterr().out
    assert command("status", "mine", where, "--json") == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["counts"] == {"pending": 1, "failed": 1}
    assert [cell["state"] for cell in seen["cells"]] == ["pending", "failed"]
    assert command("status", manifest.folder, "--cell", "algorithm=grpo", "--json") == 0
    assert [c["failure"] for c in json.loads(capsys.readouterr().out)["cells"]] == ["boom"]
    assert command("status", where, "mine", "--failed") == 0
    text = capsys.readouterr().out
    assert "grpo (0000002c), failed: unknown: boom" in text and "| " in text


def test_logs_show_the_end_and_follow(root: Path, capsys: Capture) -> None:
    manifest = sweep_of(root, [cell_of("dash", 0, 1), cell_of("grpo", 0, 2)], name="mine")
    folder = manifest.cell(manifest.entries[0])
    output = folder / "output.txt"
    output.write_text("".join(f"line {n}\n" for n in range(100)))
    where = f"run.dir={root}"
    assert command("logs", "mine", where, "--lines", 2) == 0
    text = capsys.readouterr().out
    assert "line 98\nline 99\n" in text and "line 97" not in text
    assert "dash (0000001c), pending" in text and "grpo" not in text
    assert command("logs", "mine", "algorithm=grpo", where) == 0
    assert "nothing was said yet" in capsys.readouterr().out
    with held_by_a_process(folder) as process:
        args = parser_of("logs").parse_intermixed_args(["mine", "algorithm=dash", where, "-f"])
        follower = threading.Thread(target=logs_command, args=(args,))
        follower.start()
        time.sleep(0.5)
        with output.open("a") as stream:
            stream.write("said later\n")
        time.sleep(1.5)
        process.terminate()
        process.wait()
    follower.join(timeout=20)
    assert not follower.is_alive()
    assert "said later\n" in capsys.readouterr().out


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
        "finished", "failed", "cancelled", "cancelled",
    ]  # fmt: skip
    assert read_json(folders[2] / "status.json")["step"] == 3
    assert command("cancel", "mine", f"run.dir={root}") == 0
    assert "nothing to cancel: 2 cancelled, 1 failed, 1 finished" in capsys.readouterr().out
    assert [len(journal.read(folder)) for folder in folders] == [0, 0, 1, 1]


def test_cancel_twice_at_once_asks_once(root: Path) -> None:
    manifest = sweep_of(root, [cell_of("dash", 0, 1)], name="mine")
    with stubborn(manifest.cell(manifest.entries[0])) as process:

        def run() -> None:
            cancel(manifest, ids(manifest), whole=False, patience_s=0.5)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert watch(manifest).cells[0].cell.state == "running"
        for thread in threads:
            thread.join()
        cancel(manifest, ids(manifest), whole=True, patience_s=20)
        assert process.stdout is not None and process.stdout.readline() == "1\n"
    assert states(manifest) == ["cancelled"]


def test_cancel_now_asks_again(root: Path) -> None:
    manifest = sweep_of(root, [cell_of("dash", 0, 1)], name="mine")
    with stubborn(manifest.cell(manifest.entries[0])) as process:
        assert cancel(manifest, ids(manifest), whole=False, patience_s=0.1).ending
        cancel(manifest, ids(manifest), whole=False, again=True, patience_s=20)
        assert process.stdout is not None and process.stdout.readline() == "2\n"


def test_a_cell_that_ends_after_the_command_is_shown_cancelled(root: Path) -> None:
    manifest = sweep_of(root, [cell_of("dash", 0, 1)], name="mine")
    folder = manifest.cell(manifest.entries[0])
    with stubborn(folder) as process:
        done = cancel(manifest, ids(manifest), whole=False, patience_s=0.1)
        assert [one.entry.id for one in done.ending] == ["0000001c"]
        assert watch(manifest).cells[0].cell.note == "asked to end"
        process.wait(timeout=20)
    assert read_json(folder / "status.json")["state"] == "interrupted"  # its own last word
    assert states(manifest) == ["cancelled"]
    journal.note(folder, "retry")
    assert states(manifest) == ["interrupted"]


def test_a_whole_sweep_leaves_alone_what_another_sweep_runs(root: Path) -> None:
    cells = [cell_of("dash", 0, 1), cell_of("grpo", 0, 2)]
    mine, other = sweep_of(root, cells, name="mine"), sweep_of(root, cells[:1], name="other")
    shared = mine.cell(mine.entries[0])
    with held_by_a_process(shared) as process:
        journal.note(shared, "start", host="here", pid=process.pid, job=None, sweep="other")
        done = cancel(mine, ids(mine), whole=True, patience_s=0.1)
        assert [(one.entry.id, why) for one, why in done.left] == [("0000001c", "run by the sweep other")]
        assert [one.entry.id for one in done.ended] == ["0000002c"]
        assert process.poll() is None and states(other) == ["running"]
        cancel(mine, {"0000001c"}, whole=False, patience_s=20)  # by name, it is meant
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
        cancel(manifest, ids(manifest), whole=True, patience_s=0.0)
    assert fake_slurm.calls("scancel")[1:] == ["scancel --quiet --signal=TERM 12_0"]  # asked once
    assert states(manifest) == ["running", "running", "cancelled"]
    assert watch(manifest).cells[0].cell.note == "asked to end"
    cancel(manifest, ids(manifest), whole=True, again=True, patience_s=5.0)
    assert fake_slurm.calls("scancel")[2:] == ["scancel --quiet 12_0"]
    assert states(manifest) == ["cancelled"] * 3


def test_a_job_that_waits_is_shown_with_its_reason(
    root: Path, fake_slurm: FakeSlurm, capsys: Capture
) -> None:
    manifest = sweep_of(root, [cell_of("dash", seed, seed) for seed in range(2)], name="mine")
    for number, entry in enumerate(manifest.entries):
        journal.note(manifest.cell(entry), "queued", job=f"12_{number}", sweep="mine")
    fake_slurm.change("12_0", state="PENDING", reason="QOSMaxJobsPerUserLimit")
    fake_slurm.change("12_1", state="CANCELLED")
    assert command("status", "mine", f"run.dir={root}") == 0
    text = capsys.readouterr().out
    assert "QOSMaxJobsPerUserLimit" in text and "job 12_0" in text and "1 cancelled" in text
    fake_slurm.set(silent=["squeue", "sacct"])
    assert states(manifest) == ["queued", "queued"]


def test_nothing_to_retry_starts_nothing(root: Path, capsys: Capture) -> None:
    manifest = sweep_of(root, [cell_of("dash", 0, 1), cell_of("grpo", 0, 2)], name="mine")
    ran(manifest.cell(manifest.entries[0]), "finished", 20)
    assert command("retry", "mine", "--failed", f"run.dir={root}") == 0
    assert capsys.readouterr().out == "0 of 2 cells start anew; the others: 1 finished, 1 pending\n"
    assert not (manifest.folder / "controller.json").exists()


def test_the_command_needs_no_torch(root: Path) -> None:
    sweep_of(root, [cell_of("dash", 0, 1)], name="mine")
    code = (
        "import sys; from dash_exp.sweep import main\n"
        f"assert main(['status', 'mine', 'run.dir={root}']) == 0\n"
        f"assert main(['list', 'run.dir={root}']) == 0\n"
        f"assert main(['plan', 'mine', 'run.dir={root}']) == 0\n"
        "sys.exit(str({'torch', 'transformers', 'vllm'} & set(sys.modules)).replace('set()', '') or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(root: Path) -> None:
    sweep_of(root, [cell_of("dash", seed, seed) for seed in range(150)], name="mine")
    done = subprocess.run(
        f"{sys.executable} -m dash_exp.sweep status mine run.dir={root} --json | head -1", shell=True,
        cwd=REPOSITORY, capture_output=True, text=True, check=False, env={**os.environ},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("{\n", "")
