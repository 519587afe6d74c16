"""A sweep's state: manifest, folders and queue joined; what is printed of it; what a plan would meet."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from benchmarks.status import measure
from dash_exp.errors import UserError
from dash_exp.record import journal, provenance
from dash_exp.record.folder import Recorder
from dash_exp.record.manifest import Plan, Resources, Traces, Waiting
from dash_exp.sweep.preview import hours_by_profile, plan_view, preview, profile
from dash_exp.sweep.report import status_view, sweep_lines
from dash_exp.sweep.request import plan_of
from dash_exp.sweep.states import CellState
from dash_exp.sweep.status import (
    SweepCell,
    find,
    labels,
    matches,
    read_sweep,
    read_sweeps,
    select,
    sweep_eta_s,
)
from dash_exp.text import format_path
from tests.sweep.sweep_fixtures import cell_of, held_by_a_process, ran, rewrite, steps_rows, sweep_of


def text_of(shown: RenderableType, width: int = 80) -> str:
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as caught:
        console.print(shown, crop=False)
    return "\n".join(line.rstrip() for line in caught.get().splitlines())


def test_cells_are_counted_by_what_they_do(tmp_path: Path) -> None:
    cells = [cell_of("dash", seed, seed) for seed in range(5)]
    manifest = sweep_of(tmp_path, cells, waiting=[tmp_path / "traces.jsonl"])
    folders = [manifest.cell(entry) for entry in manifest.entries]
    ran(folders[0], "finished", 20, code=provenance.code_hash(), reason="planned")
    ran(folders[1], "failed", 7, failure="FloatingPointError: no number")
    ran(folders[2], "running", 5)
    with held_by_a_process(folders[3]):
        state = read_sweep(manifest)
    assert state.counts == {
        "running": 1,
        "pending": 1,
        "blocked": 1,
        "interrupted": 1,
        "failed": 1,
        "finished": 1,
    }
    assert [one.cell.state for one in state.cells] == [
        "finished",
        "failed",
        "interrupted",
        "running",
        "pending",
    ]
    assert state.cells[1].cell.failure_class == "nan"  # from its record: no launcher watched it
    assert not state.cells[0].cell.stale
    json.dumps(state.as_json())


def test_a_cell_that_waits_names_the_cells_it_needs(tmp_path: Path) -> None:
    partner, second = cell_of("dash", 0, 1), cell_of("ppo_multi", 0, 2, needs=["0000001c"])
    manifest = sweep_of(tmp_path, [partner, second])
    first = manifest.cell(manifest.entries[0])
    assert read_sweep(manifest).cells[1].cell.note == f"waits for {first.name} (pending)"
    ran(first, "failed", 2)
    seen = read_sweep(manifest).cells[1].cell
    assert (seen.state, seen.note) == ("blocked", f"waits for {first.name} (failed)")
    rewrite(first, state="finished")
    assert read_sweep(manifest).cells[1].cell.state == "pending"
    single = sweep_of(tmp_path, [second], name="other")  # its partner is another sweep's
    assert read_sweep(single).cells[0].cell.state == "pending"
    rewrite(first, state="interrupted")
    assert read_sweep(single).cells[0].cell.note == f"waits for {first.name} (interrupted)"
    absent = sweep_of(tmp_path, [cell_of("ppo_mini", 0, 3, needs=["0000009c"])], name="third")
    assert read_sweep(absent).cells[0].cell.note == "waits for 0000009c (missing)"


def watched(state: str, step: int, steps: int | None, step_s: float | None, eta_s: float | None) -> SweepCell:
    entry = cell_of("dash", 0, 1)
    cell = CellState(Path("x"), state, step=step, steps=steps, step_s=step_s, eta_s=eta_s)
    return SweepCell(entry, "x", cell)  # type: ignore[arg-type]


def test_a_sweep_is_done_when_its_open_cells_are() -> None:
    running = [watched("running", 10, 20, 2.0, 20.0), watched("running", 0, 20, 3.0, 60.0)]
    # Two run: 20 + 60 s are left of them, one waits with 20 steps at the median pace of 2.5 s: 130 s in all,
    # 65 s for two at once, which is more than any of them takes by itself.
    assert sweep_eta_s([*running, watched("pending", 0, 20, None, None)]) == pytest.approx(65.0)
    assert sweep_eta_s(running) == pytest.approx(60.0)
    assert sweep_eta_s([watched("pending", 0, 20, None, None)]) is None  # nothing runs
    assert sweep_eta_s([*running, watched("pending", 0, None, None, None)]) is None  # a length is unknown
    assert sweep_eta_s([*running, watched("finished", 20, 20, 2.0, None)]) == pytest.approx(60.0)


def test_a_cell_of_two_sweeps_is_seen_alike_in_both(tmp_path: Path) -> None:
    cells = [cell_of("dash", 0, 1), cell_of("grpo", 0, 2)]
    both = [sweep_of(tmp_path, cells, "first"), sweep_of(tmp_path, cells[:1], "second")]
    ran(both[0].cell(both[0].entries[0]), "finished", 20)
    first, second = read_sweeps(both)
    assert (first.counts, second.counts) == ({"pending": 1, "finished": 1}, {"finished": 1})


def test_labels_are_distinct_and_leave_out_what_cells_share() -> None:
    sets = [("algorithm=dash", "seed=0", "model=tiny"), ("algorithm=grpo", "seed=0", "model=tiny")]
    assert labels(sets, ["a-1", "b-2"]) == ["dash", "grpo"]
    papers = [("experiment=paper/math_dash", "seed=0"), ("experiment=demo/math_dash", "seed=0")]
    assert labels(papers, ["", ""]) == ["experiment=paper/math_dash", "experiment=demo/math_dash"]
    assert labels([papers[0], ("experiment=paper/math_pg",)], ["", ""]) == ["math_dash seed=0", "math_pg"]
    alike = [("a.x=1", "b.x=2"), ("a.x=2", "b.x=1"), ("b.x=1", "a.x=2", "c=3")]
    assert labels(alike, ["", "", ""]) == ["x=2", "x=1", "x=1 c=3"]
    needed = [("a.x=1", "b.x=2"), ("a.x=2", "b.x=1"), ("a.x=1", "b.x=1")]
    assert labels(needed, ["", "", ""]) == ["x=1 x=2", "x=2 x=1", "x=1 x=1"]
    implied = [("steps=9", "algorithm=dash", "lr=1"), ("steps=9", "algorithm=dash", "lr=2")]
    implied += [("steps=500", "algorithm=sft_h", "lr=1", "budget.match=algorithm=dash lr=1")]
    assert labels(implied, ["", "", ""]) == ["dash lr=1", "dash lr=2", "sft_h lr=1"]
    clash = [("dataset=x", "model=y"), ("dataset=y", "model=x"), ("model=x", "dataset=y", "a.lr=1")]
    assert len(set(labels(clash, ["", "", ""]))) == 3
    assert labels([("algorithm=dash",)], ["dash-tiny-x-s0-0000001c"]) == ["dash"]
    assert labels([("p=1", "seed=0"), ("q=1", "seed=0")], ["", ""]) == ["p=1", "q=1"]
    assert labels([(), ("seed=1",)], ["dash-s0-0000001c", "dash-s1-0000002c"]) == ["dash-s0", "dash-s1"]
    assert labels([], []) == []


def test_patterns_select_by_name_and_override(tmp_path: Path) -> None:
    cells = [
        cell_of(arm, seed, 4 * place + seed) for place, arm in enumerate(("dash", "grpo")) for seed in (1, 10)
    ]
    entries = sweep_of(tmp_path, cells).entries
    assert len(select(entries, [])) == 4
    assert [e.overrides[:2] for e in select(entries, ["seed=1"])] == [
        ("algorithm=dash", "seed=1"),
        ("algorithm=grpo", "seed=1"),
    ]
    assert len(select(entries, ["seed=1*"])) == 4
    assert len(select(entries, ["dash-*", "seed=10"])) == 1
    assert len(select(entries, [entries[2].id])) == 1
    assert not matches(entries[0], "DASH-*")
    with pytest.raises(UserError, match=r"selects none of the 4 cells\n.*did you mean 'algorithm=dash'"):
        select(entries, ["algorithm=dahs"])
    with pytest.raises(UserError, match="2 problems"):
        select(entries, ["nothing*", "nobody"])
    with pytest.raises(UserError, match="no cell is selected by all of these"):
        select(entries, ["seed=1", "seed=10"])


def test_a_sweep_is_found_by_name_folder_and_yaml(tmp_path: Path) -> None:
    manifest = sweep_of(tmp_path, [cell_of("dash", 0, 1)], name="mine")
    assert find("mine", tmp_path).manifest().entries == manifest.entries
    by_folder = find(str(manifest.folder), Path("elsewhere"))
    assert (by_folder.root, by_folder.name) == (tmp_path, "mine")
    with pytest.raises(UserError, match="did you mean 'mine'"):
        find("mien", tmp_path)


def test_the_table_fits_eighty_columns_and_shows_the_failure(tmp_path: Path) -> None:
    arms = ("dash", "ppo_multi", "grpo")
    cells = [cell_of(arm, seed, 10 * place + seed) for place, arm in enumerate(arms) for seed in (0, 1)]
    manifest = sweep_of(tmp_path, cells)
    folders = [manifest.cell(entry) for entry in manifest.entries]
    ran(folders[0], "finished", 20, code="then", reason="planned")
    ran(folders[1], "failed", 7, failure="torch.OutOfMemoryError: CUDA out of memory")
    (folders[1] / "output.txt").write_text("one\ntwo [of brackets]\n")
    ran(folders[3], "blocked", 0, reason="waits")
    state = read_sweep(manifest)
    text = text_of(status_view(state, state.cells, long=False))
    assert max(len(line) for line in text.splitlines() if "python -m" not in line) <= 80
    assert "\n6 cells: 3 pending, 1 blocked, 1 failed, 1 finished\n" in text
    row = next(line for line in text.splitlines() if line.startswith("dash seed=0"))
    assert row.split() == ["dash", "seed=0", "0000000c", "finished", "20/20", "0.500", "2.00", "stale"]
    assert "dash seed=1 (0000001c), failed: out_of_memory: torch.OutOfMemoryError" in text
    assert "| two [of brackets]" in text
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if "python -m" in line]
    start, folder = ["python", "-m", "dash_exp.sweep"], format_path(manifest.folder)
    assert commands == [[*start, "retry", folder, "--failed"], [*start, "launch", folder]]
    assert "3 " in text_of(sweep_lines([state]))


def test_hours_come_from_finished_cells_of_the_same_profile(tmp_path: Path) -> None:
    cells = [cell_of("dash", 0, 1), cell_of("dash", 1, 2), cell_of("dash", 2, 3, steps=40)]
    manifest = sweep_of(tmp_path, cells)
    first, second, longer = (manifest.cell(entry) for entry in manifest.entries)
    ran(first, "finished", 20)  # one attempt, that began 360 s before its heartbeat: 0.1 h
    for start in (0.0, 5000.0):  # two starts of 900 s each: 0.5 h
        journal.note(second, "start", host="x", pid=1, job=None, sweep="demo")
        journal.note(second, "end", exit=0, failure_class=None)
        rows = journal.read(second)
        rows[-2]["time"], rows[-1]["time"] = start, start + 900.0
        (second / journal.NAME).write_text("".join(json.dumps(r) + "\n" for r in rows))
    ran(second, "finished", 20)
    ran(longer, "interrupted", 10)
    names = [cell.folder_name for cell in cells]
    hours = hours_by_profile(tmp_path, names, gpus=False)
    assert hours == {profile(cells[0].cell.frozen): pytest.approx((0.1 + 0.5) / 2, abs=1e-3)}
    assert profile(cells[0].cell.frozen) == profile(cells[1].cell.frozen) != profile(cells[2].cell.frozen)
    assert hours_by_profile(tmp_path, names, gpus=True) == {}
    assert hours_by_profile(tmp_path, ["grpo-tiny-arithmetic-s0-0000001c"], gpus=False) == {}


def test_a_preview_shows_everything_and_writes_nothing(tmp_path: Path) -> None:
    old = sweep_of(tmp_path, [cell_of("dash", 0, 1)], name="old")
    ran(old.cell(old.entries[0]), "finished", 20)
    needing = cell_of("ppo_multi", 0, 3, needs=["0000001c", "0000002c"])
    traces = Traces(tmp_path / "traces.jsonl", ("model=tiny",))
    cells = (cell_of("dash", 0, 1), cell_of("dash", 1, 2), needing)
    plan = Plan("new", cells, (Waiting(("algorithm=sft_m",), traces),), 2, (), {"claim": "It works."})
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    made = preview(plan, tmp_path, ["#!/bin/bash\n#SBATCH --array=0-2"])
    text = text_of(plan_view(made))
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    assert [line.state for line in made.lines] == ["finished", "new", "new"]
    assert made.lines[0].shared == ("old",) and made.lines[0].stale
    assert [line.hours_left for line in made.lines] == [0.0, pytest.approx(0.1, abs=0.01), None]
    assert made.lines[2].note == "after dash seed=1"  # the other one it needs is finished
    assert max(map(len, text.splitlines())) <= 80
    for wanted in (
        "new: It works.",
        "2 duplicates left out",
        "1 shared with other sweeps",
        "also in old",
        "python -m dash_exp.traces model=tiny",
    ):
        assert wanted in text, text
    assert json.loads(json.dumps(made.as_json()))["sbatch"] == ["#!/bin/bash\n#SBATCH --array=0-2"]


def test_gpu_hours_are_those_of_what_is_left(tmp_path: Path) -> None:
    done, half = cell_of("dash", 0, 1), cell_of("dash", 1, 2)
    manifest = sweep_of(tmp_path, [done, half])
    folder, other = (manifest.cell(entry) for entry in manifest.entries)
    ran(folder, "finished", 20)
    facts = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps({**facts, "hardware": {"gpus": ["H100", "H100"]}}))
    ran(other, "interrupted", 10)
    two = Resources(gpus=2, cpus=16, memory_gb=80, minutes=60)
    plan = plan_of(manifest)
    cells = tuple(type(cell)(cell.cell, cell.overrides, two, cell.needs) for cell in plan.cells)
    made = preview(Plan("demo", cells), tmp_path)
    # 0.1 h for 20 steps, of which 10 are left, on 2 GPUs: 0.1 GPU-hours
    assert made.lines[1].gpu_hours == pytest.approx(0.1, abs=0.01)
    assert made.lines[0].gpu_hours == 0.0


def test_a_thousand_cells_are_read_by_their_ends(tmp_path: Path) -> None:
    """No file that grows with the run is read completely: a long record costs nothing."""
    manifest = sweep_of(tmp_path, [cell_of("dash", 0, 1, steps=40_000)])
    folder = manifest.cell(manifest.entries[0])
    with Recorder(folder) as recorder:
        recorder.append("steps", steps_rows(10_000))
        recorder.status("interrupted", 10_000)
    assert (folder / "steps.jsonl").stat().st_size > 10e6
    read_sweep(manifest)
    start = time.perf_counter()
    assert read_sweep(manifest).cells[0].cell.step_s == 2.0
    assert time.perf_counter() - start < 0.2


@pytest.mark.long
def test_the_benchmark_runs_and_counts_right() -> None:
    found = measure(count=10, repeats=1, rows=2)
    assert found["cells"] == 10 and len(found["table_s"]) == 1
