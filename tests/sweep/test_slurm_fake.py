"""SLURM's answers are read, and sweeps submitted, with fake commands on PATH."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dash_exp.errors import UserError
from dash_exp.record import journal
from dash_exp.record.folder import lock, write_json
from dash_exp.record.identity import Cell
from dash_exp.record.manifest import Manifest, Plan, PlannedCell, Resources
from dash_exp.sweep.dispatch import LaunchRequest, refusals, renew_budgets
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.slurm import submit as slurm
from dash_exp.sweep.slurm.queue import JobState
from tests.sweep.slurm_helpers import SMALL_JOB, FakeSlurm, cluster_of, made_up, write_made_up

pytest_plugins = ["tests.sweep.slurm_fixtures"]


def rows_of(manifest: Manifest, entry: slurm.Entry, kind: str = "queued") -> list[str]:
    return [str(r["job"]) for r in journal.read(manifest.cell(entry)) if r["kind"] == kind]


# What squeue and sacct report ------------------------------------------------------------------------


def test_states_of_jobs_come_from_one_squeue_and_one_sacct(fake_slurm: FakeSlurm) -> None:
    fake_slurm.change("7_0", state="RUNNING", nodes="n1")
    fake_slurm.change("7_1", state="PENDING", reason="Dependency")
    fake_slurm.change("8", state="COMPLETING")
    fake_slurm.change("9", state="TIMEOUT", reason="TimeLimit")
    fake_slurm.change("10", state="x", accounted="CANCELLED by 1000", exit="0:15", forgotten=True, nodes="n2")
    fake_slurm.change("11", state="x", accounted="FAILED", exit="3:0", forgotten=True)
    found = queue.jobs(["7_0", "7_1", "8", "9", "10", "11", "12", "nonsense; rm"])
    assert found == {
        "7_0": JobState("running", "RUNNING", None, None, "n1"),
        "7_1": JobState("queued", "PENDING", "Dependency"),
        "8": JobState("completing", "COMPLETING"),
        "9": JobState("ended", "TIMEOUT", "TimeLimit"),
        "10": JobState("ended", "CANCELLED", None, 143, "n2"),
        "11": JobState("ended", "FAILED", None, 3),
        "12": JobState("ended"),  # nobody knows it any more
    }
    (squeue,), (sacct,) = fake_slurm.calls("squeue"), fake_slurm.calls("sacct")
    assert "--jobs=1,7,8,9,10,11,12" in squeue.split()  # entire arrays, and never a single id
    assert "--jobs=10,11,12" in sacct.split()
    assert queue.active(["7_0", "7_1", "8", "9", "12"]) == {"7_0", "7_1", "8"}


def test_accounting_that_is_late_or_off_is_no_error(fake_slurm: FakeSlurm) -> None:
    fake_slurm.change("5", state="x", accounted="RUNNING", forgotten=True)
    assert queue.jobs(["5"]) == {"5": JobState("ended")}  # the controller knows better
    fake_slurm.set(silent=["sacct"])
    assert queue.jobs(["5", "6"]) == {"5": JobState("ended"), "6": JobState("ended")}


def test_a_controller_that_is_down_leaves_jobs_unknown(fake_slurm: FakeSlurm) -> None:
    fake_slurm.change("5", state="x", accounted="COMPLETED", exit="0:0")
    fake_slurm.set(silent=["squeue"])
    assert queue.jobs(["5", "6"]) == {"5": JobState("ended", "COMPLETED", None, 0), "6": JobState("unknown")}
    assert queue.active(["5"]) is None
    fake_slurm.set(silent=["squeue", "sacct", "scancel"])
    assert queue.jobs(["5"]) == {"5": JobState("unknown")}
    assert not queue.cancel(["5"])


def test_without_slurm_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue.jobs(["5"]) == {"5": JobState("unknown")}
    assert not queue.cancel(["5"])


def test_a_command_that_hangs_is_given_up(fake_slurm: FakeSlurm) -> None:
    (fake_slurm.home / "bin" / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    assert queue.run(["squeue"], timeout_s=0.2) is None
    assert queue.SILENCE.timeout_s() == queue.AGAIN_S  # the next commands do not wait as long


def test_tasks_that_never_ran_share_a_line(fake_slurm: FakeSlurm) -> None:
    """Of the array 5 task 0 has run; the others were taken back, which squeue reports for their array."""
    fake_slurm.change("5_0", state="FAILED")
    fake_slurm.change("5", state="CANCELLED", reason="JobArrayTaskLimit")
    fake_slurm.change("6_[0,2-3%1]", state="x", accounted="CANCELLED by 0", forgotten=True)
    found = queue.jobs(["5_0", "5_2", "6_0", "6_1", "6_3"])
    assert [state.word for state in found.values()] == ["FAILED", "CANCELLED", "CANCELLED", None, "CANCELLED"]
    assert queue.tasks_in("6_[0,2-4%1]") == ["6_0", "6_2", "6_3", "6_4"]
    assert queue.tasks_in("6_3.batch") == []


def test_cancel_takes_queued_jobs_back_and_asks_running_ones(fake_slurm: FakeSlurm) -> None:
    for job, state in (("7_0", "RUNNING"), ("7_1", "RUNNING"), ("8", "PENDING"), ("9", "RUNNING")):
        fake_slurm.change(job, state=state)
    assert queue.cancel(["7_0", "7_0", "8", "99"])
    assert [f"{j['state']} {j.get('signal')}" for j in fake_slurm.jobs().values()] == [
        "RUNNING TERM",
        "RUNNING None",
        "CANCELLED None",
        "RUNNING None",
    ]
    assert queue.cancel(["7_0", "9"], now=True)
    assert fake_slurm.calls("scancel")[-1] == "scancel --quiet 7_0 9"
    states = [job["state"] for job in fake_slurm.jobs().values()]
    assert states == ["CANCELLED", "RUNNING", "CANCELLED", "CANCELLED"]


# What is submitted --------------------------------------------------------------------------------


def test_a_sweep_is_queued_once(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    entries = [*made_up(3), *made_up(1, replace(SMALL_JOB, gpus=1), first=10)]
    sweep = write_made_up(tmp_path, entries)
    assert slurm.submit(sweep, entries, cluster_of()) == ["101_0", "101_1", "101_2", "102"]
    assert [rows_of(sweep, entry) for entry in entries] == [["101_0"], ["101_1"], ["101_2"], ["102"]]
    assert slurm.submit(sweep, entries, cluster_of()) == []
    fake_slurm.change("101_1", state="FAILED")
    assert slurm.submit(sweep, entries, cluster_of()) == ["103"]
    assert rows_of(sweep, entries[1]) == ["101_1", "103"]


def test_the_script_is_what_a_dry_run_shows(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    cluster = cluster_of(
        account="lab",
        partition="main",
        qos="high",
        constraint="a100",
        max_parallel=2,
        setup=["module load cuda", "ulimit -n 4096"],
        warning_s=300,
    )
    entries = made_up(3, Resources(gpus=2, cpus=6, memory_gb=10, minutes=90))
    plan = Plan(
        "trial",
        tuple(
            PlannedCell(
                Cell(e.id, e.folder.removesuffix(f"-{e.id}"), {}, ""), e.overrides, e.resources, e.needs
            )
            for e in entries
        ),
    )
    (shown,) = slurm.sbatch_text(plan, tmp_path, cluster)
    assert not (tmp_path / "sweeps").exists()
    slurm.submit(write_made_up(tmp_path, entries), entries, cluster)
    text = fake_slurm.jobs()["101_0"]["script"]
    assert text == shown
    flags = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert flags >= {
        "--array=0-2%2",
        "--account=lab",
        "--partition=main",
        "--qos=high",
        "--constraint=a100",
        "--requeue",
        "--time=90",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--cpus-per-task=6",
        "--gpus-per-node=2",
        "--mem=10GB",
        "--signal=USR2@300",
        "--open-mode=append",
        "--job-name=trial-dash-tiny",
        f"--output={tmp_path}/sweeps/trial/jobs/%A_%a_0_log.out",
    }
    assert not any(flag.startswith(("--wckey", "--error", "--dependency")) for flag in flags)
    assert text.index("module load cuda\nulimit -n 4096\n") < text.index("srun --unbuffered")
    assert "--cpus-per-task=6 --kill-on-bad-exit=0" in text


def test_arrays_are_cut_at_the_largest_size(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.set(config={"MaxArraySize": "4"})
    entries = made_up(9)
    assert slurm.submit(write_made_up(tmp_path, entries), entries, cluster_of()) == [
        *(f"101_{n}" for n in range(4)),
        *(f"102_{n}" for n in range(4)),
        "103",
    ]


def test_a_cell_waits_for_the_jobs_of_its_needs(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    """One need is in this launch, one was queued by another sweep, one is finished, one nobody runs."""
    here, other, done, nobody = (made_up(1, first=n)[0] for n in (1, 2, 3, 4))
    write_made_up(tmp_path, [other], "another")
    journal.note(tmp_path / "cells" / other.folder, "queued", job="50_1", sweep="another")
    fake_slurm.change("50_1", state="RUNNING")
    waiting = made_up(1, first=10, needs=(here.id, other.id, done.id))[0]
    stuck = made_up(1, first=20, needs=(nobody.id,))[0]
    after_stuck = made_up(1, first=30, needs=(stuck.id,))[0]
    entries = [after_stuck, stuck, waiting, here]
    sweep = write_made_up(tmp_path, [*entries, done, nobody])
    write_json(sweep.cell(done) / "status.json", {"state": "finished"})
    assert slurm.submit(sweep, entries, cluster_of()) == ["101", "102"]
    assert rows_of(sweep, here) == ["101"] and rows_of(sweep, waiting) == ["102"]
    assert "#SBATCH --dependency=afterany:101:50_1\n" in fake_slurm.jobs()["102"]["script"]
    assert rows_of(sweep, stuck) == rows_of(sweep, after_stuck) == []


def test_what_is_finished_or_runs_here_is_not_queued(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    entries = made_up(3)
    sweep = write_made_up(tmp_path, entries)
    write_json(sweep.cell(entries[0]) / "status.json", {"state": "finished"})
    descriptor = lock(sweep.cell(entries[1]))
    assert slurm.submit(sweep, entries, cluster_of()) == ["101"]
    assert rows_of(sweep, entries[2]) == ["101"]
    os.close(descriptor)


def test_what_a_finished_cell_once_asked_for_is_not_checked(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    small, huge = made_up(2)
    sweep = write_made_up(tmp_path, [small, huge])
    asking = replace(huge.resources, memory_gb=10_000)
    cells = [
        PlannedCell(Cell(e.id, e.folder.removesuffix(f"-{e.id}"), {}, ""), (), r)
        for e, r in ((small, small.resources), (huge, asking))
    ]
    request = LaunchRequest(Plan(sweep.name, tuple(cells)), tmp_path, cluster_of())
    (fault,) = refusals(request)
    assert "10000 GB" in str(fault) or "10,000 GB" in str(fault)
    write_json(sweep.cell(huge) / "status.json", {"state": "finished"})
    assert refusals(request) == []
    assert len(refusals(replace(request, force=True))) == 1


def test_a_launch_gives_no_new_budget_to_what_runs_elsewhere(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    running, failed = made_up(2)
    sweep = write_made_up(tmp_path, [running, failed])
    (job,) = slurm.submit(sweep, [running], cluster_of())
    for entry in (running, failed):
        journal.note(sweep.cell(entry), "end", exit=1, failure_class="unknown", step=0)
    journal.note(sweep.cell(running), "start", host="another", pid=1, job=job)
    fake_slurm.change(job, state="RUNNING")
    status = {"state": "failed", "attempt": 1, "step": 0, "heartbeat": 0}
    write_json(sweep.cell(failed) / "status.json", status)
    renew_budgets(sweep, [running, failed])
    assert [kind_of_last(sweep, entry) for entry in (running, failed)] == ["start", "retry"]


def kind_of_last(manifest: Manifest, entry: slurm.Entry) -> str:
    return str(journal.read(manifest.cell(entry))[-1]["kind"])


def test_two_launches_at_once_queue_every_cell_once(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    entries = made_up(6)
    sweeps = [write_made_up(tmp_path, entries, name) for name in ("one", "two", "three")]
    launches = [
        threading.Thread(target=slurm.submit, args=(sweep, entries, cluster_of())) for sweep in sweeps
    ]
    for launch in launches:
        launch.start()
    for launch in launches:
        launch.join()
    assert len(fake_slurm.calls("sbatch")) == 1
    assert all(len(rows_of(sweeps[0], entry)) == 1 for entry in entries)


def test_a_refusal_in_the_middle_keeps_what_was_queued(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.set(config={"MaxArraySize": "2"}, most_submissions=2)
    entries = made_up(5)
    sweep = write_made_up(tmp_path, entries)
    with pytest.raises(UserError, match=r"4 of 5 jobs were queued.*\n.*QOSMaxSubmitJobPerUserLimit"):
        slurm.submit(sweep, entries, cluster_of())
    fake_slurm.set(most_submissions=100)
    assert slurm.submit(sweep, entries, cluster_of()) == ["103"]


def test_nothing_is_queued_while_slurm_does_not_answer(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.set(silent=["squeue"])
    entries = made_up(1)
    with pytest.raises(UserError, match="SLURM does not answer"):
        slurm.submit(write_made_up(tmp_path, entries), entries, cluster_of())
    assert fake_slurm.calls("sbatch") == []


def test_a_launch_from_within_a_job_does_not_inherit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_CONF", "/there")
    with slurm.outside_a_job():
        assert "SLURM_MEM_PER_CPU" not in os.environ and os.environ["SLURM_CONF"] == "/there"
    assert os.environ["SLURM_MEM_PER_CPU"] == "100"
    monkeypatch.delenv("SLURM_JOB_ID")
    with slurm.outside_a_job():
        assert os.environ["SLURM_MEM_PER_CPU"] == "100"
