"""`python -m dash_exp.sweep`, as typed: what it prints, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dash_exp.record import journal
from dash_exp.record import manifest as manifests
from dash_exp.sweep.__main__ import COMMANDS, parser_of
from dash_exp.sweep.request import plan_of, with_configs
from dash_exp.sweep.watch import logs_command
from tests.conftest import REPOSITORY
from tests.sweep.slurm_helpers import FakeSlurm
from tests.sweep.sweep_fixtures import (
    Capture,
    cell_of,
    command,
    held_by_a_process,
    ran,
    refused,
    states,
    sweep_of,
    write_yaml,
)

pytest_plugins = ["tests.sweep.slurm_fixtures"]
pytestmark = pytest.mark.usefixtures("eighty_columns")


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


def test_user_errors_have_exit_code_2(root: Path, capsys: Capture) -> None:
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
    assert "must be a whole number, at least 1" in refused(capsys, "plan", "demo", where, "-n", 0)
    assert "cells are frozen" in refused(capsys, "launch", "mine", where, "algorithm=grpo")


def test_a_plan_has_all_faults_at_once_and_writes_nothing(tmp_path: Path, capsys: Capture) -> None:
    path = write_yaml(tmp_path, algorithm=["dash", "dahs"])
    where = f"run.dir={tmp_path / 'outputs'}"
    printed = refused(capsys, "plan", path, where, "learner.lrr=1")
    assert "2 problems" in printed and "did you mean 'dash'" in printed and "learner.lrr" in printed
    assert refused(capsys, "launch", path, where, "learner.lrr=1") == printed
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
    printed = refused(capsys, "launch", path, f"run.dir={root}")
    assert "is another sweep: 1 of its 1 cells are not in this one" in printed
    assert sorted(file.name for file in manifest.folder.iterdir() if file.name[0] != ".") == ["manifest.json"]
    assert len(list((root / "cells").iterdir())) == 1


def test_a_launched_sweep_goes_on_with_what_is_frozen(root: Path, capsys: Capture) -> None:
    manifest = sweep_of(root, [cell_of("dash", 0, 1), cell_of("grpo", 0, 2)], name="mine")
    first, second = (manifest.cell(entry) for entry in manifest.entries)
    plan = plan_of(manifest)
    assert [cell.cell.folder(root) for cell in plan.cells] == [first, second]
    again = with_configs(plan, root)  # as after --force: archived, and frozen to the same
    texts = [(folder / "config.yaml").read_text() for folder in (first, second)]
    for folder in (first, second):
        folder.rename(folder.with_name(f"archived-{folder.name}"))
    manifests.write(again, root)
    assert [(folder / "config.yaml").read_text() for folder in (first, second)] == texts
    (second / "config.yaml").unlink()
    assert "has no config.yaml any more" in refused(capsys, "plan", "mine", f"run.dir={root}")
    assert "has no config.yaml any more" in refused(capsys, "launch", "mine", f"run.dir={root}", "--force")


def test_a_broken_manifest_hides_no_other_sweep(root: Path, capsys: Capture) -> None:
    sweep_of(root, [cell_of("dash", 0, 1)], name="mine")
    broken = sweep_of(root, [cell_of("dash", 0, 1)], name="torn").folder / "manifest.json"
    broken.write_text(broken.read_text()[:100])
    assert command("status", f"run.dir={root}") == 0
    printed = capsys.readouterr()
    assert "mine" in printed.out and "torn/manifest.json:" in printed.err and "is damaged" in printed.err
    assert "is damaged" in refused_after(capsys, "list", f"run.dir={root}")


def refused_after(capsys: Capture, *words: object) -> str:
    """As `refused`, after something was shown."""
    assert command(*words) == 2
    return capsys.readouterr().err


def test_list_shows_claims_and_progress(root: Path, capsys: Capture) -> None:
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


def test_logs_show_the_end_and_follow(root: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dash_exp.sweep.watch.FOLLOW_S", 0.1)
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
    assert "nothing was printed yet" in capsys.readouterr().out
    with held_by_a_process(folder) as process:
        args = parser_of("logs").parse_intermixed_args(["mine", "algorithm=dash", where, "-f"])
        follower = threading.Thread(target=logs_command, args=(args,))
        follower.start()
        time.sleep(0.3)
        with output.open("a") as stream:
            stream.write("printed later\n")
        time.sleep(0.5)
        process.terminate()
        process.wait()
    follower.join(timeout=20)
    assert not follower.is_alive()
    assert "printed later\n" in capsys.readouterr().out


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
    assert capsys.readouterr().out == "0 of 2 cells start again; the others: 1 pending, 1 finished\n"
    assert not (manifest.folder / "controller.json").exists()


HEAVY = {"torch", "transformers", "vllm", "mlflow"}


def test_the_command_needs_no_torch(root: Path) -> None:
    sweep_of(root, [cell_of("dash", 0, 1)], name="mine")
    code = (
        "import sys; from dash_exp.sweep.__main__ import main\n"
        f"assert main(['status', 'mine', 'run.dir={root}']) == 0\n"
        f"assert main(['list', 'run.dir={root}']) == 0\n"
        f"assert not {HEAVY | {'numpy'}} & set(sys.modules), 'numpy'\n"
        f"assert main(['plan', 'mine', 'run.dir={root}']) == 0\n"
        f"assert main(['plan', 'demo_minute', 'run.dir={root}']) == 0\n"
        f"sys.exit(str({HEAVY} & set(sys.modules)).replace('set()', '') or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(root: Path) -> None:
    sweep_of(root, [cell_of("dash", seed, seed) for seed in range(150)], name="mine")
    done = subprocess.run(
        f"{sys.executable} -m dash_exp.sweep status mine run.dir={root} --json | head -1",
        shell=True,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert (done.stdout, done.stderr) == ("{\n", "")
