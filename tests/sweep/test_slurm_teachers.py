"""Traces on SLURM: one job makes them, and queues the cells that waited. With fake SLURM commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dash_exp.errors import UserError
from dash_exp.record.manifest import Plan, Traces, Waiting, read
from dash_exp.sweep.dispatch import LaunchRequest, launch
from dash_exp.sweep.plan import SweepOptions, make_plan
from dash_exp.sweep.resources import cluster_of
from dash_exp.sweep.slurm import submit as slurm
from dash_exp.sweep.slurm.job import TeacherJob
from tests.sweep.slurm_helpers import FakeSlurm
from tests.sweep.slurm_helpers import cluster_of as slurm_cluster
from tests.sweep.test_teachers import CELL, DIGITS

pytest_plugins = ["tests.sweep.slurm_fixtures"]
SLURM = (
    "cluster=slurm",
    "cluster.threads=null",
    "cluster.memory_gb=1",
    "cluster.hours=1",
    "cluster.cpus=1",
    "cluster.gpus=0",
)


def plan_of(root: Path, traces: Path) -> Plan:
    arms = [("algorithm=dash",), ("algorithm=sft_m", f"dataset.traces={traces}")]
    (root / "cache").mkdir(parents=True, exist_ok=True)
    command = (*DIGITS, "traces.samples=16", f"traces.out={traces}")
    return make_plan(
        "mine", [(*CELL, *arm, *SLURM) for arm in arms], root=root, options=SweepOptions(traces=[command])
    )


@pytest.mark.long
def test_a_job_makes_them_and_queues_the_cells(
    fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, traces = tmp_path / "out", tmp_path / "traces.jsonl"
    plan = plan_of(root, traces)
    cluster = cluster_of(plan.actions)
    logged: list[str] = []
    assert launch(LaunchRequest(plan, root, cluster), wait=False, log=logged.append) == 0
    assert "traces are made by job 102, which then queues the cells that wait for them" in logged
    scripts = [facts["script"] for facts in fake_slurm.jobs().values()]
    names = [script.split("--job-name=")[1].split()[0] for script in scripts]
    assert names == ["mine-dash-tiny", "mine-traces-tiny"]
    manifest = read(root / "sweeps" / "mine")
    assert slurm.teachers_active(manifest) and slurm.submit_teachers(manifest, cluster) is None
    row = {"id": "1", "problem": "1+1", "solution": "2", "tokens": [5], "index": 0, "finish": "stop"}
    traces.write_text(json.dumps(row) + "\n")  # as the job would
    monkeypatch.setenv("SLURM_JOB_ID", "102")
    assert TeacherJob(str(manifest.folder))() == 0
    grown = read(manifest.folder)
    assert not grown.waiting and [e.folder.split("-")[0] for e in grown.entries] == ["dash", "sft_m"]
    assert set(fake_slurm.jobs()) == {"101", "102", "103"}


def test_what_the_teachers_ask_for_is_checked_first(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    root, path = tmp_path / "out", tmp_path / "traces.jsonl"
    arguments = (*DIGITS, "traces.samples=16", f"traces.out={path}", "cluster.memory_gb=999")
    plan = Plan("mine", (), (Waiting(("algorithm=sft_m",), Traces(path, arguments)),))
    (entry,) = slurm.teacher_entries(plan.waiting)
    assert entry.resources.memory_gb == 999
    with pytest.raises(UserError, match=r"cluster\.memory_gb: asks for 999 GB .* \(for traces-tiny\)"):
        launch(LaunchRequest(plan, root, slurm_cluster()), wait=False)
    assert not (root / "sweeps").exists() and not fake_slurm.jobs()
