"""What a job does with its cells, signals and restarts: real cells, fake SLURM commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dash_exp.record import journal
from dash_exp.record.folder import Row, read_json, read_rows, write_json
from dash_exp.record.manifest import Manifest
from dash_exp.sweep.pool import Relay
from dash_exp.sweep.slurm import submit as slurm
from dash_exp.sweep.slurm.job import JobPlace, SlurmJob, out_of_time, threads, used_requeues
from dash_exp.sweep.status import read_sweep
from tests.conftest import REPOSITORY
from tests.sweep.slurm_helpers import FakeSlurm, cluster_of, made_up, write_made_up, write_sweep

pytest_plugins = ["tests.sweep.slurm_fixtures"]
RETRIES = {"config": 0, "unknown": 1, "nccl": 2}


def start_task(sweep: Manifest, job: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Start a job as srun would."""
    array, _, task = job.partition("_")
    own = {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": task} if task else {}
    variables = {
        "SLURM_JOB_ID": array,
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_CPUS_PER_TASK": "1",
        "SUBMITIT_EXECUTOR": "slurm",
        **own,
    }
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "submitit.core._submit", str(sweep.folder / "jobs")],
        cwd=REPOSITORY,
        env={**os.environ, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def job_of(sweep: Manifest, **settings: Any) -> SlurmJob:
    cells = tuple(entry.folder for entry in sweep.entries)
    needs = {entry.folder: entry.needs for entry in sweep.entries}
    return SlurmJob(str(sweep.root), sweep.name, cells, needs, **{"retries": RETRIES, **settings})


def ending(job: SlurmJob) -> int:
    """The code a job ends its process with, run in this one."""
    try:
        job()
    except SystemExit as end:
        return int(str(end.code))
    return 0


def kinds(folder: Path) -> list[str]:
    return [row["kind"] for row in journal.read(folder)]


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch, fake_slurm: FakeSlurm) -> FakeSlurm:
    """This process is task 3 of the array 7."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    fake_slurm.change("7_3", state="RUNNING")
    return fake_slurm


@pytest.mark.long
def test_a_warned_cell_saves_is_requeued_and_goes_on(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, [["algorithm.steps=40", "checkpoint.every=0"]])
    (entry,), folder = sweep.entries, sweep.cell(sweep.entries[0])
    assert slurm.submit(sweep, [entry], cluster_of(requeues=1)) == ["101"]
    first = start_task(sweep, "101")
    deadline = time.time() + 60
    while len(read_rows(folder / "steps.jsonl").rows) < 2:
        assert time.time() < deadline and first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGUSR2)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 128 + signal.SIGUSR2, output
    status = read_json(folder / "status.json")
    assert status["state"] == "interrupted" and 2 <= status["step"] < 40
    assert fake_slurm.calls("scontrol")[-1] == "scontrol requeue 101"
    assert kinds(folder) == ["queued", "start", "end", "requeue"]
    assert journal.read(folder)[-1] | {"reason": "timeout", "job": "101"} == journal.read(folder)[-1]

    second = start_task(sweep, "101", restarts=1)
    output = second.communicate(timeout=60)[0]
    assert second.returncode == 0, output
    finished = read_json(folder / "status.json")
    assert finished["state"] == "finished" and finished["attempt"] == 2
    assert f"resuming after step {status['step']}" in (folder / "log.txt").read_text()
    assert kinds(folder) == ["queued", "start", "end", "requeue", "start", "end"]
    assert (tmp_path / "sweeps/trial/jobs/101_0_result.pkl").exists()


def test_a_failed_cell_fails_its_job(in_job: FakeSlurm, tmp_path: Path, capsys: Any) -> None:
    sweep = write_sweep(tmp_path, [[]])
    folder = sweep.cell(sweep.entries[0])
    (folder / "config.yaml").write_text("algorithm: [")
    assert ending(job_of(sweep)) == 1
    start, end = journal.read(folder)
    assert (start["kind"], start["job"], start["sweep"]) == ("start", "7_3", "trial")
    assert (end["kind"], end["exit"], end["failure_class"]) == ("end", 2, "config")
    assert read_json(folder / "status.json")["state"] == "failed"
    assert "is damaged" in capsys.readouterr().out


def test_a_finished_cell_returns_at_once(in_job: FakeSlurm, tmp_path: Path) -> None:
    """Also where its partner has failed since, or its budget is spent."""
    sweep = write_made_up(tmp_path, made_up(1, needs=("beef0000",)))
    folder = sweep.cell(sweep.entries[0])
    (folder / "status.json").write_text('{"state": "finished"}')
    assert job_of(sweep)() == {folder.name: "finished"}
    assert journal.read(folder) == []


def test_a_cell_whose_need_failed_stays_blocked_with_the_reason(in_job: FakeSlurm, tmp_path: Path) -> None:
    need = made_up(1, first=5)[0]
    sweep = write_made_up(tmp_path, [need, *made_up(1, needs=(need.id,))])
    folder = sweep.cell(sweep.entries[1])
    (sweep.cell(need) / "status.json").write_text('{"state": "failed"}')
    job = SlurmJob(str(tmp_path), "trial", (folder.name,), {folder.name: (need.id,)})
    assert ending(job) == 3
    status = read_json(folder / "status.json")
    assert (status["state"], status["reason"]) == ("blocked", f"waits for {need.folder} (failed)")
    assert kinds(folder) == []
    gone = SlurmJob(str(tmp_path), "trial", (folder.name,), {folder.name: ("beef0000",)})
    assert ending(gone) == 3
    assert "beef0000 (missing)" in read_json(folder / "status.json")["reason"]


def test_restarts_that_slurm_made_count(
    in_job: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_made_up(tmp_path, made_up(1))
    folder = sweep.cell(sweep.entries[0])
    (folder / "status.json").write_text('{"state": "running", "step": 4}')
    in_job.change("7_3", accounted="PREEMPTED")  # its own row, then that of the run before
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert ending(job_of(sweep, requeues=1)) == 1
    assert [(row["kind"], row["job"]) for row in journal.read(folder)] == [("requeue", "7_3")] * 2
    status = read_json(folder / "status.json")
    assert (status["state"], status["step"]) == ("interrupted", 4)
    assert "more often than cluster.requeues=1 allows" in status["failure"]


def test_requeues_are_counted_since_a_person_asked_last() -> None:
    rows: list[Row] = [
        {"kind": "queued"},
        {"kind": "requeue", "job": "7_3"},
        {"kind": "requeue", "job": "5"},
        {"kind": "retry"},
        {"kind": "requeue", "job": "7_3"},
        {"kind": "start"},
    ]
    assert used_requeues(rows, JobPlace("7_3", restarts=2)) == 1
    assert used_requeues(rows, JobPlace("7_3", restarts=4)) == 3  # two that nobody has written down yet
    assert used_requeues(rows, JobPlace("8")) == 1
    assert used_requeues([*rows, {"kind": "queued"}], JobPlace("8")) == 0  # launched anew
    assert used_requeues(rows[1:3], JobPlace("8")) == 2


def test_which_cells_are_requeued(in_job: FakeSlurm, tmp_path: Path) -> None:
    """Not a cancelled one, nor one whose budget is spent."""
    entries = made_up(3)
    sweep = write_made_up(tmp_path, entries)
    on, cancelled, spent = (sweep.cell(entry) for entry in entries)
    journal.note(cancelled, "cancel")
    journal.note(spent, "requeue", reason="timeout", job="5")
    job = job_of(sweep, requeues=1)
    job._requeue([cancelled.name, spent.name], "timeout", JobPlace("7_3"))
    assert in_job.calls("scontrol") == []
    assert "as often as cluster.requeues=1 allows" in read_json(spent / "status.json")["failure"]
    job._requeue([on.name, cancelled.name, spent.name], "timeout", JobPlace("7_3"))
    assert in_job.calls("scontrol") == ["scontrol requeue 7_3"]
    assert [kinds(folder) for folder in (on, cancelled, spent)] == [["requeue"], ["cancel"], ["requeue"]]


def test_a_cell_that_never_finishes_a_step_is_not_requeued_for_ever(
    in_job: FakeSlurm, tmp_path: Path
) -> None:
    sweep = write_made_up(tmp_path, made_up(1))
    folder, place = sweep.cell(sweep.entries[0]), JobPlace("7_3")
    job = job_of(sweep, requeues=20)
    for step in (2, 3, 3, 3):  # progress, then two requeues without
        write_json(folder / "status.json", {"state": "interrupted", "step": step})
        job._requeue([folder.name], "timeout", place)
    assert len(in_job.calls("scontrol")) == 3
    status = read_json(folder / "status.json")
    assert status["state"] == "failed" and "no progress in 3 starts" in status["failure"]
    journal.note(folder, "retry")
    job._requeue([folder.name], "timeout", place)  # a person asked for more
    assert len(in_job.calls("scontrol")) == 4


@pytest.mark.parametrize("recorded", ["interrupted", "pending"])
def test_scancel_has_one_name(in_job: FakeSlurm, tmp_path: Path, recorded: str) -> None:
    """SLURM does not say to the job itself that it was cancelled, so the next sweep command records it."""
    sweep = write_made_up(tmp_path, made_up(1))
    folder = sweep.cell(sweep.entries[0])
    write_json(folder / "status.json", {"state": recorded, "step": 3})
    journal.note(folder, "queued", job="7_3", sweep="trial")
    in_job.change("7_3", state="CANCELLED")
    assert read_sweep(sweep).cells[0].cell.state == "cancelled"
    assert read_json(folder / "status.json")["state"] == "cancelled"
    assert read_sweep(sweep).cells[0].cell.state == "cancelled"


def test_the_end_at_a_time_limit_is_recognized(in_job: FakeSlurm) -> None:
    def ended_by(*numbers: int) -> bool:
        relay = Relay()
        relay.numbers += numbers
        return out_of_time(relay, "7_3")

    assert ended_by(signal.SIGUSR2, signal.SIGUSR2)
    assert not ended_by(signal.SIGUSR2, signal.SIGTERM)  # cancelled after the warning
    in_job.change("7_3", state="COMPLETING", reason="TimeLimit")
    assert ended_by(signal.SIGUSR2, signal.SIGTERM) and ended_by(signal.SIGTERM)


def test_a_controller_that_refuses_to_requeue(
    in_job: FakeSlurm, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dash_exp.sweep.slurm.job.PAUSE_S", 0.0)
    in_job.set(silent=["scontrol"])
    sweep = write_made_up(tmp_path, made_up(1))
    job_of(sweep, requeues=1)._requeue([sweep.entries[0].folder], "timeout", JobPlace("7_3"))
    assert kinds(sweep.cell(sweep.entries[0])) == []
    output = capsys.readouterr().out
    assert output.count("Unable to contact slurm controller") == 3 and "launch the sweep again" in output


def test_ranks_on_several_nodes_start_again_together(in_job: FakeSlurm, tmp_path: Path) -> None:
    """A failure that may be retried requeues the job; one that may not ends it."""
    sweep = write_made_up(tmp_path, made_up(1))
    name = sweep.entries[0].folder
    job = job_of(sweep, requeues=5)
    both = JobPlace("7_3", tasks=2)
    journal.note(sweep.cell(sweep.entries[0]), "end", exit=1, failure_class="config", step=0)
    assert job._end({name: "failed"}, both, Relay()) == 1
    assert in_job.calls("scontrol") == []
    journal.note(sweep.cell(sweep.entries[0]), "end", exit=1, failure_class="nccl", step=0)
    assert job._end({name: "failed"}, both, Relay()) == 1
    assert in_job.calls("scontrol") == ["scontrol requeue 7_3"]
    assert journal.read(sweep.cell(sweep.entries[0]))[-1]["reason"] == "nccl"
    assert job._end({name: "failed"}, JobPlace("7_3"), Relay()) == 1  # one task: the pool has retried
    assert len(in_job.calls("scontrol")) == 1


def test_other_ranks_do_nothing_where_rank_0_does_nothing(
    in_job: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_made_up(tmp_path, made_up(1))
    (sweep.cell(sweep.entries[0]) / "status.json").write_text('{"state": "finished"}')
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert job_of(sweep)() == {}


def test_threads_where_a_cluster_does_not_confine_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [threads(4, 1), threads(4, 3), threads(8, 1), threads(None, 1)] == [4, 1, None, None]
