"""What the mirror reads from a record, worked by hand: times, values, names, parameters, states, sweeps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dash_exp.errors import UserError
from dash_exp.mirror.store import Point
from dash_exp.mirror.sync import (
    allowed_names,
    finite_numbers,
    parameters,
    read_facts,
    record_points,
    shorten,
    sweeps_below,
    sweeps_of,
    worst_status,
)
from dash_exp.record import journal
from dash_exp.record.folder import Recorder
from dash_exp.record.state import state_here
from dash_exp.sweep.states import state_of
from tests.mirror_fixtures import BORN, NAME, attempt, begin, evaluation, finished, set_status, step, sweep

MS = round(BORN * 1000)


def test_points_have_the_times_that_the_events_tell(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    with Recorder(folder) as recorder:
        attempt(recorder)
        evaluation(recorder, 0, {"sums": 0.125, "words": 0.5}, at=-30)
        step(recorder, 1, 0.25)
        step(recorder, 2, 0.5)
        recorder.event("checkpoint", BORN + 2, BORN + 2.75, step=2, worker="main")
        recorder.append("steps", [{"step": 3, "reward/mean": 1.0}])  # its events are lost
    first, second, *steps = sorted(record_points(folder), key=lambda point: point.time_ms)
    values = {
        "eval/sums/accuracy": 0.125,
        "eval/sums/accuracy/n": 8.0,
        "eval/sums/accuracy/low": 0.1,
        "eval/sums/pass_at_16/n": 0.0,
    }
    assert first == Point(0, MS - 20_000, values)
    assert second.time_ms == MS - 10_000 and second.values["eval/words/accuracy"] == 0.5
    assert steps[0] == Point(3, MS, {"reward/mean": 1.0})  # when its attempt began
    assert [(p.step, p.time_ms) for p in steps[1:]] == [(1, MS + 1000), (2, MS + 2750)]


def test_only_what_counts_is_read(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    with Recorder(folder) as recorder:
        attempt(recorder)
        for number in (1, 2, 3, 4):
            step(recorder, number, 0.1 * number)
    with Recorder(folder) as recorder:
        attempt(recorder)
        recorder.append(
            "steps", [{"step": 2, "reward/mean": 9.0}]
        )  # from a checkpoint: worked for by attempt 1
        step(recorder, 3, 0.75)
        recorder.status("finished", 3, reason="budget")
    told = [(p.step, p.time_ms, p.values["reward/mean"]) for p in record_points(folder)]
    assert told == [(1, MS + 1000, 0.1), (2, MS + 2000, 9.0), (3, MS + 1_003_000, 0.75)]


def test_values_are_finite_numbers_and_names_such_as_mlflow_takes() -> None:
    odd = {"a": 1, "b": True, "c": float("nan"), "d": float("inf"), "e": "x", "f": None, "g": 0.0, "h": [1]}
    assert finite_numbers(odd) == {"a": 1.0, "g": 0.0}
    assert allowed_names({"pass@4": 1, "a//b/../c": 2, "time/step_s": 3}) == {
        "pass_at_4": 1,
        "a/b/c": 2,
        "time/step_s": 3,
    }
    both = allowed_names({"x+y": 1, "x*y": 2, "l" * 300: 3})
    assert both["x_y"] == 1 and sorted(both.values()) == [1, 2, 3]
    assert all(len(name) <= 250 for name in both)


def test_parameters_are_dotted_and_long_ones_cut_visibly() -> None:
    given = {"a": {"b": None, "c": [1, "x"], "d": {}, "e": True, "f": ""}, "g": 1e-06, "h": "plain"}
    assert parameters(given) == {
        "a.b": "null",
        "a.c": '[1, "x"]',
        "a.d": "{}",
        "a.e": "true",
        "a.f": '""',
        "g": "1e-06",
        "h": "plain",
    }
    assert shorten("y" * 6000, 6000) == "y" * 6000
    cut = parameters({"shots": "y" * 6001})["shots"]
    assert len(cut) == 6000 and "[cut: 6001 characters, sha256 " in cut[-60:]
    assert cut != parameters({"shots": "y" * 6001 + "z"})["shots"]


def test_what_is_told_of_a_finished_cell(tmp_path: Path) -> None:
    facts = read_facts(finished(tmp_path), ["table_1", "figure_3"])
    assert (facts.status, facts.record, facts.start_ms) == ("FINISHED", str(MS), MS)
    assert facts.params["algorithm.mini_batch"] == "null" and facts.params["model.random.layers"] == "2"
    assert facts.tags["dash_exp.cell"] == NAME and facts.tags["dash_exp.sweeps"] == "table_1, figure_3"
    assert facts.tags["mlflow.source.git.commit"] == "abc123" and facts.tags["dash_exp.gpus"] == "H100"
    assert "dash_exp.failure" not in facts.tags  # there is none


@pytest.mark.parametrize("damage", ["seed: [", "- a list", "\0"])
def test_a_damaged_config_is_a_fault(tmp_path: Path, damage: str) -> None:
    folder = finished(tmp_path)
    (folder / "config.yaml").write_text(damage)
    with pytest.raises(UserError, match="damaged"):
        read_facts(folder)


def test_running_is_said_only_where_it_is_true(tmp_path: Path) -> None:
    """By the same rule as `sweep status`: on this machine by the lock, elsewhere by the heartbeat."""
    folder = begin(tmp_path)

    def state(ended: int | None = None, **changes: object) -> str:
        if changes:
            set_status(folder, **changes)
        shown = state_here(folder, time.time(), ended)
        assert ended is not None or shown == state_of(folder, time.time(), jobs={}).state
        return shown

    assert state() == "pending"
    with Recorder(folder) as recorder:
        recorder.status("running", 1)
        assert (state(), state(ended=1), state(ended=2)) == ("running", "interrupted", "running")
    assert state() == "interrupted"  # nobody holds its lock
    assert state(host="node7") == "running"
    assert state(host="node7", heartbeat=time.time() - 3700) == "interrupted"
    journal.note(folder, "end", exit=1, failure_class="unknown")
    assert state() == "failed"  # the launcher saw its end
    assert state(state="finished") == "finished"


def test_sweeps_of_a_cell_the_one_that_started_it_first(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    sweep(tmp_path, "young", [NAME, "other"], created=30.0)
    sweep(tmp_path, "old", [NAME], created=10.0)
    sweep(tmp_path, "middle", [NAME], created=20.0)
    sweep(tmp_path, "stranger", ["other"], created=5.0)
    (tmp_path / "sweeps" / "broken").mkdir()
    (tmp_path / "sweeps" / "broken" / "manifest.json").write_text("{")
    known = sweeps_below(tmp_path)
    assert [one.name for one in known] == ["stranger", "old", "middle", "young"]
    assert [one.name for one in sweeps_of(folder, known)] == ["old", "middle", "young"]
    journal.note(folder, "start", sweep="young", host="h", pid=1, job=None)
    journal.note(folder, "end", exit=0, failure_class=None)
    assert [one.name for one in sweeps_of(folder, known)] == ["young", "old", "middle"]


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ("finished finished", "FINISHED"),
        ("finished failed", "FAILED"),
        ("running failed", "RUNNING"),
        ("pending finished failed", "SCHEDULED"),
        ("blocked failed", "FAILED"),
        ("blocked", "SCHEDULED"),
        ("finished interrupted", "KILLED"),
        ("failed interrupted", "FAILED"),
        ("cancelled", "KILLED"),
        ("blocked finished", "SCHEDULED"),
        ("blocked finished interrupted", "KILLED"),
        ("", "SCHEDULED"),
    ],
)
def test_the_status_of_a_sweep(states: str, status: str) -> None:
    assert worst_status(states.split()) == status
