"""Cells that learn from traces: the teacher is asked first, then they get their ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from dash_exp.record.folder import read_json
from dash_exp.record.manifest import read
from dash_exp.sweep.dispatch import LaunchRequest, launch
from dash_exp.sweep.plan import SweepOptions, make_plan
from dash_exp.sweep.resources import cluster_of
from tests.conftest import REPOSITORY

DIGITS = [
    "model=tiny",
    "dataset=gsm8k",
    f"dataset.path={REPOSITORY / 'tests' / 'digits.jsonl'}",
    "dataset.verifier=integer",
    "dataset.extraction=first_integer",
    "sampler.max_new_tokens=6",
]
CELL = [*DIGITS, "debug=fast", "evaluation=none", "cluster.threads=1"]


@pytest.mark.long
def test_traces_are_made_first_and_their_cells_join_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    root, traces = tmp_path / "out", tmp_path / "traces.jsonl"
    (root / "cache").mkdir(parents=True)
    arms = [("algorithm=dash",), ("algorithm=sft_m", f"dataset.traces={traces}")]
    teacher = (*DIGITS, "cluster.threads=1", "traces.samples=16", f"traces.out={traces}")

    def start(*extra: str, expected: int) -> list[str]:
        said: list[str] = []
        combinations = [(*CELL, *arm, *extra) for arm in arms]
        plan = make_plan("mine", combinations, root=root, options=SweepOptions(traces=[teacher]))
        code = launch(LaunchRequest(plan, root, cluster_of(plan.actions)), log=said.append)
        assert code == expected, said
        return said

    said = start(expected=0)
    assert said[0] == "sweep mine: 1 cell, 1 waiting for traces"
    assert traces.stat().st_size > 0
    manifest = read(root / "sweeps" / "mine")
    assert not manifest.waiting and len(manifest.entries) == 2
    states = {e.folder.split("-")[0]: read_json(manifest.cell(e) / "status.json") for e in manifest.entries}
    assert {name: status["state"] for name, status in states.items()} == {
        "dash": "finished",
        "sft_m": "finished",
    }
    assert start(expected=0)[0] == "sweep mine: 2 cells, 2 finished already"


@pytest.mark.long
def test_a_teacher_that_fails_leaves_its_cells_waiting_and_the_others_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    root, traces = tmp_path / "out", tmp_path / "absent" / "traces.jsonl"
    (root / "cache").mkdir(parents=True)
    (tmp_path / "absent").write_text("a file where a folder should be")
    arms = [("algorithm=dash",), ("algorithm=sft_m", f"dataset.traces={traces}")]
    teacher = (*DIGITS, "cluster.threads=1", f"traces.out={traces}")
    plan = make_plan(
        "mine", [(*CELL, *arm) for arm in arms], root=root, options=SweepOptions(traces=[teacher])
    )
    said: list[str] = []
    assert launch(LaunchRequest(plan, root, cluster_of(plan.actions)), log=said.append) == 1
    assert any("failed with exit code 2; their cells go on waiting" in line for line in said)
    counts = next(line for line in said if line.startswith("2 cells: ")).removeprefix("2 cells: ")
    assert set(counts.split(", ")) == {"1 blocked", "1 finished"}
    assert len(read(root / "sweeps" / "mine").waiting) == 1
