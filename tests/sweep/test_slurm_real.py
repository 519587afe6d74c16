"""Sweeps of tiny cells on a real SLURM: ends, requeues, kills. Skipped if no SLURM can be started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dash_exp.record import journal
from dash_exp.record.folder import differences, read_json, read_rows
from dash_exp.record.manifest import Entry, Manifest, Resources
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.slurm import submit as slurm
from dash_exp.sweep.slurm.arrays import find_faults
from dash_exp.sweep.status import read_sweep
from tests.conftest import REPOSITORY
from tests.sweep.real_slurm import (
    LARGEST_ARRAY,
    Cluster,
    accounted,
    kinds,
    output_of,
    requeues,
    state,
    steps,
    wait_for,
)
from tests.sweep.slurm_helpers import SMALL_JOB, cluster_of, write_sweep
from tests.test_run import run_here

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("real_cluster")]
pytest_plugins = ["tests.sweep.slurm_fixtures"]

STEPS = 80
SLOW = [f"algorithm.steps={STEPS}", "checkpoint.every=0"]
"""Long enough to be interrupted; saved only when it is."""
QUICK = ["algorithm.steps=2", "evaluation=none"]
WITH_GPU = Resources(gpus=1, cpus=1, memory_gb=1, minutes=60)


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs start where they were submitted, and import the package from there."""
    monkeypatch.chdir(REPOSITORY)


Scenario = Iterator[Callable[[], object]]
"""A test that yields each condition it waits for, so that several of them can wait at the same time."""


def submit(sweep: Manifest, entries: tuple[Entry, ...] | None = None, **settings: object) -> list[str]:
    return slurm.submit(sweep, sweep.entries if entries is None else entries, cluster_of(**settings))


def side_by_side(root: Path, *scenarios: Scenario, timeout_s: float = 400) -> None:
    """Run scenarios, each up to the next condition that is not met yet, until all have ended."""
    waiting = {scenario: next(scenario, None) for scenario in scenarios}

    def all_ended() -> bool:
        for scenario, is_so in list(waiting.items()):
            if is_so is None:
                del waiting[scenario]
            elif is_so():
                waiting[scenario] = next(scenario, None)
        return not waiting

    try:
        wait_for(all_ended, timeout_s, f"{len(scenarios)} scenarios to end", every_s=0.1)
    except AssertionError as error:
        shown = subprocess.run(["squeue", "--states=all"], capture_output=True, text=True, check=False).stdout
        outputs = "\n".join(output_of(folder) for folder in root.glob("**/sweeps/*"))
        raise AssertionError(f"{error}\n{list(waiting)}\n{shown}\n{outputs}") from error


def wait_until(sweep: Manifest, is_so: Callable[[], object]) -> None:
    side_by_side(sweep.root, iter([is_so]), timeout_s=240)


def have_ended(*jobs: str) -> Callable[[], bool]:
    return lambda: queue.active(jobs) == set()


def one_cell(root: Path, *overrides: str, **resources: int) -> tuple[Manifest, Path]:
    sweep = write_sweep(root, [overrides], resources=[replace(SMALL_JOB, **resources)])
    return sweep, sweep.cell(sweep.entries[0])


def attempt(folder: Path) -> int:
    return int(read_json(folder / "status.json")["attempt"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of the slow cell, run here without interruption."""
    return run_here(tmp_path_factory.mktemp("undisturbed"), *SLOW)


def test_profiles_nodes_arrays_and_a_cell_that_fails(tmp_path: Path) -> None:
    """Cut into arrays of three; the failed cell's job is FAILED, and the others of its array finish."""
    arms = [("dash", 7), ("dash", 0), ("grpo", 0), ("dash", 1), ("rloo", 0), ("rloo", 1)]
    variants = [[f"algorithm={arm}", f"seed={seed}", *QUICK] for arm, seed in arms]
    sweep = write_sweep(tmp_path, variants, resources=[*[SMALL_JOB] * 4, WITH_GPU, WITH_GPU])
    broken = sweep.entries[0]
    (sweep.cell(broken) / "config.yaml").write_text("algorithm: [")
    jobs = submit(sweep)
    assert len(jobs) == 6
    arrays = [
        sum(job.startswith(f"{parent}_") for job in jobs)
        for parent in dict.fromkeys(job.partition("_")[0] for job in jobs)
    ]
    assert arrays == [LARGEST_ARRAY, 0, 2]  # the fourth is a job of its own
    command = ["squeue", "-h", "-j", jobs[0].partition("_")[0], "-t", "all", "-o", "%j"]
    named = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert set(named) == {"trial-dash+grpo-tiny"}
    assert submit(sweep) == []  # all of them are queued already
    wait_until(sweep, have_ended(*jobs))
    found = [state(sweep.cell(entry)) for entry in sweep.entries]
    assert found == ["failed", *["finished"] * 5], output_of(sweep.folder)
    assert [accounted(job) for job in jobs] == ["FAILED|1:0", *["COMPLETED|0:0"] * 5]
    assert {accounted(job, "NodeList") for job in jobs} == {"n1", "n2"}
    assert all("gres/gpu=1" in accounted(job, "AllocTRES") for job in jobs[4:])
    ends = [row for row in journal.read(sweep.cell(broken)) if row["kind"] == "end"]
    assert [(row["exit"], row["failure_class"]) for row in ends] == [(2, "config")]
    listed = queue.jobs(jobs)
    assert [listed[job].word for job in jobs] == ["FAILED", *["COMPLETED"] * 5]
    for entry in sweep.entries:  # however fast a job started
        rows = {row["kind"]: row["time"] for row in journal.read(sweep.cell(entry))}
        assert rows["queued"] <= rows["start"] <= rows["end"]
    assert len(submit(sweep)) == 1  # only what is not finished


def hold_up(folder: Path) -> int:
    """Stop a cell until SLURM's next signal wakes it. Returns its process."""
    (start,) = [row for row in journal.read(folder) if row["kind"] == "start"]
    os.kill(start["pid"], signal.SIGSTOP)
    return int(start["pid"])


def test_time_limits(tmp_path: Path, undisturbed: Path) -> None:
    """Two jobs of one minute. One is warned 20 to 50 s after its start, for a cell that would take longer.
    The other runs a cell that is held up again in the step after which it would have ended: SLURM ends it at
    the limit, and its job is requeued all the same."""
    warned, folder = one_cell(tmp_path / "warned", *SLOW, minutes=1)
    long_steps = ["algorithm.steps=12", "algorithm.prompts_per_step=128", "checkpoint.every=2"]
    ended, slow = one_cell(tmp_path / "ended", *long_steps, minutes=1)
    (job,), (other,) = submit(warned, warning_s=10), submit(ended, warning_s=1)
    wait_until(warned, lambda: steps(folder) >= 3)
    hold_up(folder)
    wait_until(ended, lambda: steps(slow) >= 3)
    process, output = hold_up(slow), slow / "output.txt"
    wait_for(lambda: "stopping after" in output.read_text(), 90, "the warning", every_s=0.002)
    os.kill(process, signal.SIGSTOP)
    time.sleep(1)
    assert requeues(slow) == [] and state(slow) == "running"

    wait_until(warned, lambda: state(folder) == "finished" and have_ended(job)())
    reasons = [row["reason"] for row in requeues(folder)]
    assert set(reasons) == {"timeout"}  # a busy machine may need a third minute
    assert accounted(job) == "COMPLETED|0:0"
    assert attempt(folder) == 1 + len(reasons)
    rows = read_rows(folder / "steps.jsonl").rows
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))  # none was lost, none was made twice
    assert differences(undisturbed, folder) == []

    wait_until(ended, lambda: state(slow) == "finished" and have_ended(other)())
    assert {row["reason"] for row in requeues(slow)} == {"timeout"}
    assert "DUE TO TIME LIMIT" in output_of(ended.folder)
    assert "resuming after step " in (slow / "log.txt").read_text()
    assert accounted(other) == "COMPLETED|0:0"


def requeued_by_a_person(root: Path, undisturbed: Path) -> Scenario:
    sweep, folder = one_cell(root, *SLOW)
    (job,) = submit(sweep)
    yield lambda: steps(folder) >= 3
    subprocess.run(["scontrol", "requeue", job], check=True)
    yield lambda: state(folder) == "finished" and have_ended(job)()
    assert [row["reason"] for row in requeues(folder)] == ["requeued"]
    assert attempt(folder) == 2
    assert differences(undisturbed, folder) == []


def warned(root: Path, undisturbed: Path | None, *overrides: str) -> Scenario:
    """SLURM signals every process of a job, verifier workers too, and the job forwards the signal as well."""
    sweep, folder = one_cell(root, *SLOW, *overrides)
    (job,) = submit(sweep)
    yield lambda: steps(folder) >= 3
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    yield lambda: requeues(folder)
    saved = read_json(folder / "status.json")
    assert saved["state"] == "interrupted" and saved["step"] >= 3
    yield lambda: state(folder) == "finished" and have_ended(job)()
    assert f"resuming after step {saved['step']}\n" in (folder / "log.txt").read_text()
    assert not [row for row in read_rows(folder / "events.jsonl").rows if row["kind"] == "fault"]
    assert undisturbed is None or differences(undisturbed, folder) == []


def cancelled(root: Path, undisturbed: Path) -> Scenario:
    """A cell that runs ends after its step, one that waits is taken back; a launch continues both."""
    sweep = write_sweep(root, [SLOW, [*QUICK, "seed=1"]])
    running, waiting = (sweep.cell(entry) for entry in sweep.entries)
    entries = (sweep.entries[0], replace(sweep.entries[1], needs=(sweep.entries[0].id,)))
    jobs = submit(sweep, entries)
    yield lambda: steps(running) >= 3
    assert queue.jobs(jobs)[jobs[1]].reason == "Dependency"
    for folder in (running, waiting):
        journal.note(folder, "cancel")
    assert queue.cancel(jobs)
    yield have_ended(*jobs)
    saved = read_json(running / "status.json")
    assert saved["state"] == "cancelled" and saved["step"] >= 3
    assert state(waiting) == "pending" and "start" not in kinds(waiting)
    assert requeues(running) == []
    for folder in (running, waiting):
        journal.note(folder, "retry")
    yield have_ended(*submit(sweep, entries))
    assert [state(running), state(waiting)] == ["finished", "finished"], output_of(sweep.folder)
    assert f"resuming after step {saved['step']}\n" in (running / "log.txt").read_text()
    assert differences(undisturbed, running) == []


def cancelled_by_scancel(root: Path, undisturbed: Path) -> Scenario:
    sweep, folder = one_cell(root, *SLOW)
    jobs = submit(sweep)
    yield lambda: steps(folder) >= 3
    subprocess.run(["scancel", *jobs], check=True)
    yield have_ended(*jobs)
    assert accounted(jobs[0]).startswith("CANCELLED")
    assert state(folder) == "interrupted" and requeues(folder) == []
    assert read_sweep(sweep).cells[0].cell.state == "cancelled" == state(folder)
    yield have_ended(*submit(sweep))
    assert state(folder) == "finished" and differences(undisturbed, folder) == []


def test_interrupted_cells_go_on(tmp_path: Path, undisturbed: Path) -> None:
    math = ("dataset.verifier=math", "dataset.extraction=boxed_or_last")
    side_by_side(
        tmp_path,
        requeued_by_a_person(tmp_path / "requeued", undisturbed),
        warned(tmp_path / "integer", undisturbed, "dataset.verifier=integer"),
        warned(tmp_path / "math", None, *math),
        cancelled(tmp_path / "cancelled", undisturbed),
        cancelled_by_scancel(tmp_path / "scancel", undisturbed),
    )


def test_ranks_on_two_nodes_go_on_together(tmp_path: Path) -> None:
    two = ["learner.ranks=2", "learner.precision=fp32", *SLOW]
    single = run_here(tmp_path / "single", *two)
    sweep, folder = one_cell(tmp_path, *two, gpus=2, cpus=2, nodes=2, tasks=2)
    # both nodes are this machine, so their names have no address
    (job,) = submit(sweep, setup=["export MASTER_ADDR=127.0.0.1"])
    wait_until(sweep, lambda: steps(folder) >= 3)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_until(sweep, lambda: state(folder) == "finished" and have_ended(job)())
    assert [row["reason"] for row in requeues(folder)] == ["timeout"], output_of(sweep.folder)
    assert accounted(job, "NodeList,State") == "n[1-2]|COMPLETED"
    assert attempt(folder) == 2
    assert differences(single, folder) == []


def test_the_launching_process_is_killed(tmp_path: Path) -> None:
    """Killed when SLURM has taken the second of two arrays and nothing is written about it: the next launch
    queues these cells again, and none runs twice."""
    sweep = write_sweep(tmp_path, [[*QUICK, f"seed={seed}"] for seed in range(LARGEST_ARRAY + 1)])
    deadly = tmp_path / "bin" / "sbatch"
    deadly.parent.mkdir()
    deadly.write_text(
        f'#!/bin/sh\n{shutil.which("sbatch")} "$@"\n'
        f"[ -e {tmp_path}/second ] && kill -9 $PPID\ntouch {tmp_path}/second\n"
    )
    deadly.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from dash_exp.record import manifest\n"
        "from dash_exp.sweep.slurm import submit as slurm\n"
        "from tests.sweep.slurm_helpers import cluster_of\n"
        "sweep = manifest.read(Path(sys.argv[1]))\n"
        "slurm.submit(sweep, sweep.entries, cluster_of())\n"
    )
    path = f"{deadly.parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-c", code, str(sweep.folder)]
    launch = subprocess.run(command, env={**os.environ, "PATH": path}, check=False, timeout=60)
    assert launch.returncode == -signal.SIGKILL
    queued = [kinds(sweep.cell(entry)).count("queued") for entry in sweep.entries]
    assert queued == [*[1] * LARGEST_ARRAY, 0]
    assert len(submit(sweep)) == 1
    jobs = [job for entry in sweep.entries for job in slurm.job_ids(sweep.cell(entry))]
    wait_until(sweep, have_ended(*jobs))
    for entry in sweep.entries:
        folder = sweep.cell(entry)
        assert (state(folder), attempt(folder)) == ("finished", 1), output_of(sweep.folder)


def test_slurms_controller_is_killed_while_a_cell_runs(
    tmp_path: Path, real_cluster: Cluster, undisturbed: Path
) -> None:
    sweep, folder = one_cell(tmp_path, *SLOW)
    (job,) = submit(sweep)
    wait_until(sweep, lambda: steps(folder) >= 3)
    real_cluster.kill_controller()
    assert queue.active([job]) is None
    assert queue.jobs([job])[job].state in ("running", "unknown")
    (fault,) = find_faults(sweep.entries, cluster_of())
    assert "SLURM does not answer" in fault.what
    real_cluster.start()
    wait_until(sweep, have_ended(job))
    assert state(folder) == "finished" and differences(undisturbed, folder) == []
    assert attempt(folder) == 1


def test_needs_run_first_and_small_cells_share_a_job(tmp_path: Path) -> None:
    """Three cells in two jobs, a fourth after the first; a fifth stays blocked, as what it needs fails."""
    variants = [[*QUICK, f"seed={seed}"] for seed in range(5)]
    sweep = write_sweep(tmp_path, variants)
    first, second, broken, after, stuck = sweep.entries
    (sweep.cell(broken) / "config.yaml").write_text("algorithm: [")
    entries = (first, second, broken, replace(after, needs=(first.id,)), replace(stuck, needs=(broken.id,)))
    jobs = submit(sweep, entries, cells_per_gpu=2)
    assert len(jobs) == 4  # {first, second}, {broken}, and one each for the last two
    wait_until(sweep, have_ended(*jobs))
    found = [state(sweep.cell(entry)) for entry in entries]
    assert found == ["finished", "finished", "failed", "finished", "blocked"], output_of(sweep.folder)
    end = journal.read(sweep.cell(first))[-1]["time"]
    assert [r["time"] for r in journal.read(sweep.cell(after)) if r["kind"] == "start"] >= [end]
    assert read_json(sweep.cell(stuck) / "status.json")["reason"].endswith("(failed)")
    assert [accounted(job) for job in jobs[1:]] == ["FAILED|1:0", "COMPLETED|0:0", "FAILED|3:0"]


def test_what_the_cluster_does_not_have(tmp_path: Path) -> None:
    """Two nodes of 2 CPUs, 4000 MB and 2 GPUs."""
    sweep = write_sweep(tmp_path, [QUICK], resources=[Resources(3, 3, 4, 60)])
    found = find_faults(sweep.entries, cluster_of(account="rot", qos="nromal"))
    assert [fault.where.removeprefix("cluster.") for fault in found] == [
        "gpus",
        "cpus",
        "memory_gb",
        "account",
        "qos",
    ]
    assert "did you mean 'root'" in found[3].hint and "did you mean 'normal'" in found[4].hint
    assert [f.where for f in find_faults([], cluster_of(partition="mian"))] == ["cluster.partition"]
    fits = write_sweep(tmp_path / "b", [QUICK], resources=[Resources(4, 4, 3, 60, nodes=2, tasks=4)])
    assert find_faults(fits.entries, cluster_of(account="root", qos="normal", partition="main")) == []


def test_without_accounting(tmp_path: Path, real_cluster: Cluster) -> None:
    """Last, as it changes the cluster: the same sweep, states from squeue and the folders only."""
    real_cluster.configure(AccountingStorageType="accounting_storage/none", AccountingStorageTRES=None)
    sweep = write_sweep(tmp_path, [QUICK, [*QUICK, "seed=1"]])
    (sweep.cell(sweep.entries[1]) / "config.yaml").write_text("algorithm: [")
    assert find_faults(sweep.entries, cluster_of(account="any", qos="any")) == []
    jobs = submit(sweep)
    wait_until(sweep, have_ended(*jobs))
    assert [state(sweep.cell(e)) for e in sweep.entries] == ["finished", "failed"]
    ended = [("ended", word) for word in ("COMPLETED", "FAILED", None)]
    assert [(s.state, s.word) for s in queue.jobs([*jobs, "9999"]).values()] == ended
    assert len(submit(sweep)) == 1
