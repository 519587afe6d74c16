"""Records mirrored to a real SQLite file of MLflow's, which is then read without MLflow."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dash_exp.config.environment import is_installed
from dash_exp.config.tracking import MirrorPlace
from dash_exp.mirror import __main__ as mirror
from dash_exp.mirror.mlflow import MLflowStore
from dash_exp.mirror.store import StoreError
from dash_exp.mirror.sync import BusyError, CellSync, cell_lock, prepare_sweep
from dash_exp.record.folder import Recorder, read_final, read_json, write_json
from tests.mirror_fixtures import (
    BORN,
    CONFIG,
    NAME,
    Database,
    attempt,
    begin,
    counting,
    finished,
    set_status,
    step,
    sweep,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # MLflow's own, of the libraries it uses
    pytest.mark.skipif(not is_installed("mlflow"), reason="mlflow is not installed"),
]
MS = round(BORN * 1000)
OTHER = "grpo-tiny-digits-s1-99ffee00"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's schema and our experiment: creating it takes seconds, so it is copied."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MLflowStore(MirrorPlace(f"sqlite:///{file}", "dash_exp"))
    return file


@pytest.fixture
def root(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An outputs folder with an empty database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def database(root: Path) -> Database:
    return Database(root / "mlflow.db")


def store_in(root: Path) -> MLflowStore:
    return MLflowStore(MirrorPlace(f"sqlite:///{root / 'mlflow.db'}", "dash_exp"))


def sync(folder: Path, ended: int | None = None) -> int | None:
    return CellSync(folder, store_in(folder.parents[1])).sync(ended)


EXPECTED = {
    ("eval/sums/accuracy", 0, MS - 10_000, 0.125),
    ("eval/sums/accuracy/n", 0, MS - 10_000, 8.0),
    ("eval/sums/accuracy/low", 0, MS - 10_000, 0.1),
    ("eval/sums/pass_at_16/n", 0, MS - 10_000, 0.0),
    ("reward/mean", 1, MS + 1000, 0.25),
    ("updates", 1, MS + 1000, 1.0),
    ("reward/mean", 2, MS + 2000, 0.5),
    ("updates", 2, MS + 2000, 1.0),
    ("reward/mean", 3, MS + 3000, 0.75),
    ("updates", 3, MS + 3000, 1.0),
    ("eval/sums/accuracy", 3, MS + 110_000, 0.5),
    ("eval/sums/accuracy/n", 3, MS + 110_000, 8.0),
    ("eval/sums/accuracy/low", 3, MS + 110_000, 0.1),
    ("eval/sums/pass_at_16/n", 3, MS + 110_000, 0.0),
}
"""All of the record that `finished` writes."""


def test_everything_arrives_and_a_second_time_changes_nothing(root: Path, database: Database) -> None:
    folder = finished(root)
    set_status(folder, heartbeat=BORN + 500)
    assert sync(folder) == len(EXPECTED)
    assert database.metrics() == EXPECTED
    assert database.runs() == [(NAME, "FINISHED", MS, MS + 500_000)]
    params, tags = database.words("params"), database.words("tags")
    assert params["algorithm.name"] == "dash" and params["algorithm.mini_batch"] == "null"
    assert tags["dash_exp.state"] == "finished" and tags["dash_exp.attempts"] == "1"
    before = database.everything()
    assert sync(folder) is None
    assert database.everything() == before
    database.change("delete from tags where key = 'dash_exp.mirrored'")
    assert sync(folder) == 0  # it asks what is there, value by value
    assert database.everything() == before


def test_what_was_lost_is_sent_again_and_nothing_else(root: Path, database: Database) -> None:
    folder = finished(root)
    sync(folder)
    database.change("delete from metrics where step = 2 or key = 'eval/sums/accuracy'")
    database.change("delete from tags where key = 'dash_exp.mirrored'")
    assert sync(folder) == 4
    assert database.metrics() == EXPECTED


def test_a_run_is_followed_through_attempts_and_equals_one_built_later(
    root: Path, database: Database, empty: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Step 3 is redone by the second attempt: both values are there, the later one counts."""
    folder = begin(root)
    with Recorder(folder) as recorder:
        following = CellSync(folder, store_in(root))
        following.sync()  # nothing is known yet
        assert database.runs() == []
        attempt(recorder)
        for number in (1, 2):
            step(recorder, number, 0.1 * number)
        following.sync()
        step(recorder, 3, 0.3)
        following.sync()
        following.sync()
        assert len(database.metrics()) == 6
        assert database.runs()[0][1] == "RUNNING"
    set_status(folder, state="interrupted", failure="SIGTERM")
    following.sync(ended=1)
    assert database.runs()[0][1] == "KILLED" and database.words("tags")["dash_exp.failure"] == "SIGTERM"
    with Recorder(folder) as recorder:
        following = CellSync(folder, store_in(root))
        attempt(recorder)
        step(recorder, 3, 0.35)
        following.sync()
        assert database.runs()[0][1] == "RUNNING"
        assert "dash_exp.failure" not in database.words("tags")
        recorder.status("finished", 3, reason="planned")
    following.sync(ended=2)
    ((name, status, start, _),) = database.runs()
    assert (name, status, start) == (NAME, "FINISHED", MS)
    threes = {
        (time, value)
        for key, number, time, value in database.metrics()
        if (key, number) == ("reward/mean", 3)
    }
    assert threes == {(MS + 3000, 0.3), (MS + 1_003_000, 0.35)}
    latest = "select value from latest_metrics where key = 'reward/mean'"
    assert database.ask(latest) == [(0.35,)]  # what MLflow shows

    later = tmp_path_factory.mktemp("later") / "mlflow.db"
    shutil.copy(empty, later)
    CellSync(folder, MLflowStore(MirrorPlace(f"sqlite:///{later}", "dash_exp"))).sync()
    rebuilt = Database(later)
    assert counting(rebuilt.metrics()) == counting(database.metrics())
    assert len(rebuilt.metrics()) == 6 and len(database.metrics()) == 8
    for table in ("params", "tags"):
        assert rebuilt.words(table) == database.words(table)
    assert [run[:3] for run in rebuilt.runs()] == [run[:3] for run in database.runs()]
    before = database.everything()
    assert sync(folder) is None and database.everything() == before


def test_a_parameter_that_differs_is_kept_and_named(root: Path, database: Database) -> None:
    folder = finished(root)
    sync(folder)
    database.change("update params set value = 'sgd' where key = 'algorithm.name'")
    database.change("delete from tags where key = 'dash_exp.mirrored'")
    assert sync(folder) == 0
    assert database.words("params")["algorithm.name"] == "sgd"
    assert database.words("tags")["dash_exp.params_differ"] == "algorithm.name"


def test_a_long_parameter_is_cut_visibly(root: Path, database: Database) -> None:
    folder = begin(root, config={**CONFIG, "shots": "y" * 7000})
    with Recorder(folder) as recorder:
        attempt(recorder)
        recorder.status("failed", 0, failure="RuntimeError: " + "x" * 9000)
    sync(folder)
    shots = database.words("params")["shots"]
    assert len(shots) == 6000 and "[cut: 7000 characters" in shots
    assert "[cut: 9014 characters" in database.words("tags")["dash_exp.failure"]
    assert database.runs()[0][1] == "FAILED"


def test_a_record_begun_anew_is_another_run(root: Path, database: Database) -> None:
    folder = finished(root)
    sync(folder)
    shutil.rmtree(folder)
    folder = begin(root)
    with Recorder(folder) as recorder:
        recorder.status("failed", 0, failure="no model")  # before it could say when it began
    sync(folder)
    assert len(database.runs()) == 2
    with Recorder(folder) as recorder:
        attempt(recorder)  # of attempt 2, so the record begins 1,000 s later
        step(recorder, 1, 0.5)
        recorder.status("finished", 1)
    sync(folder)
    assert [run[1] for run in database.runs()] == ["FINISHED", "FINISHED"]
    assert database.metrics() == EXPECTED | {
        ("reward/mean", 1, MS + 1_001_000, 0.5),
        ("updates", 1, MS + 1_001_000, 1.0),
    }


def test_sweeps_are_parents_with_the_status_of_their_cells(root: Path, database: Database) -> None:
    folder, waiting = finished(root), begin(root, OTHER)
    assert sync(folder) == len(EXPECTED)  # before it belonged to any
    sweep(root, "table_1", [NAME, OTHER], created=BORN - 50, claim="DASH is faster")
    sweep(root, "figure_3", [NAME], created=BORN - 20)
    following = CellSync(folder, store_in(root))
    assert following.sync() == 0  # no value is sent, but what is told of it has changed
    following.sync_sweeps()
    statuses = {run[0]: run[1] for run in database.runs()}
    assert statuses == {NAME: "FINISHED", "table_1": "SCHEDULED", "figure_3": "FINISHED"}
    ((parent,),) = database.ask("select run_uuid from runs where name = 'table_1'")
    tags = database.words("tags")
    assert tags["mlflow.parentRunId"] == parent and tags["dash_exp.sweeps"] == "table_1, figure_3"
    assert database.words("tags", "table_1")["dash_exp.claim"] == "DASH is faster"
    with Recorder(waiting) as recorder:
        attempt(recorder)
        recorder.status("failed", 0, failure="bad luck")
    assert mirror.main([str(root)]) == 0
    statuses = {run[0]: run[1] for run in database.runs()}
    assert statuses == {NAME: "FINISHED", OTHER: "FAILED", "table_1": "FAILED", "figure_3": "FINISHED"}
    assert database.words("tags", OTHER)["mlflow.parentRunId"] == parent


def test_a_sweep_is_prepared_once(root: Path, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{database.path}"
    prepare_sweep(MirrorPlace(uri, "dash_exp"), "table_1")
    prepare_sweep(MirrorPlace(uri, "dash_exp"), "table_1")
    prepare_sweep(MirrorPlace(uri, "another"), "table_1")
    assert [run[:2] for run in database.runs()] == [("table_1", "RUNNING")] * 2
    assert capsys.readouterr() == ("", "")


def test_one_process_mirrors_a_cell_at_a_time(root: Path) -> None:
    folder = finished(root)
    place, elsewhere = store_in(root).place, MirrorPlace("http://host", "dash_exp")
    with cell_lock(folder, place):
        with pytest.raises(BusyError), cell_lock(folder, place):
            pass
        with cell_lock(folder, elsewhere):
            pass
    with cell_lock(folder, place):
        pass


def test_a_deleted_experiment_is_told(root: Path, database: Database) -> None:
    database.change("update experiments set lifecycle_stage = 'deleted' where name = 'dash_exp'")
    with pytest.raises(StoreError, match="'dash_exp' is deleted"):
        store_in(root)


# --- the command ---


def test_the_command_says_what_it_did(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(root)
    begin(root, OTHER)
    assert mirror.main([str(root)]) == 0
    first = capsys.readouterr().out
    assert re.search(rf"  {NAME} +FINISHED +14 values", first)
    assert "2 cells: 1 brought up to date (14 values), 1 not started" in first
    assert mirror.main([str(root / "cells"), f"{root / 'cells' / NAME}"]) == 0
    second = capsys.readouterr().out
    assert "2 cells: 1 unchanged, 1 not started" in second and NAME not in second
    short = [line for line in (first + second).splitlines() if "sqlite" not in line]
    assert all(len(line) <= 80 for line in short)


def test_cells_that_are_being_followed_are_left_alone(
    root: Path, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(root)
    with cell_lock(folder, store_in(root).place):
        assert mirror.main([str(folder)]) == 0
    assert "1 followed by their runs" in capsys.readouterr().out
    assert database.runs() == []


def test_a_damaged_cell_is_named_and_the_others_mirrored(
    root: Path, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(root)
    damaged, odd = finished(root, OTHER), finished(root, "pg-tiny-digits-s0-77aa77aa")
    (damaged / "config.yaml").write_text("[")
    with (odd / "steps.jsonl").open("a") as stream:
        stream.write('{"attempt": 1}\n')
    assert mirror.main([str(root)]) == 2
    error = capsys.readouterr().err
    assert "2 problems, the others were mirrored" in error and OTHER in error and "77aa77aa" in error
    assert "steps.jsonl line 4 has no step" in error
    assert sorted(run[0] for run in database.runs()) == sorted([NAME, odd.name])  # but for its damaged line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["python -m dash_exp.mirror <folders>"]),
        (["nowhere", "tests"], ["2 problems", "nowhere: is no folder", "tests: holds no cell"]),
        (["CELLS", "tracking.url=x"], ["tracking.url", "did you mean 'tracking.uri'?"]),
        (["CELLS", "tracking.uri=./mlruns"], ["tracking.uri: ./mlruns is a folder", "sqlite:////"]),
        (["CELLS", "tracking.uri=http://a:pw@host"], ["holds a user, a password", "http://***@host"]),
    ],
)
def test_wrong_arguments(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    finished(root)
    assert mirror.main([text.replace("CELLS", str(root)) for text in arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address, with a password, of a server that is not there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield f"http://me:geheim@127.0.0.1:{taken.getsockname()[1]}"


def test_a_server_that_is_not_there(
    root: Path, nobody: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    assert mirror.main([str(root)]) == 2
    said = capsys.readouterr()
    assert "MLFLOW_TRACKING_URI: http://***@127.0.0.1:" in said.err and "cannot be used" in said.err
    prepare_sweep(MirrorPlace(nobody, "dash_exp"), "table_1")  # stops nobody
    said_later = capsys.readouterr()
    assert "is not available yet" in said_later.err
    assert "geheim" not in said.err + said.out + said_later.err + said_later.out


def test_a_cell_that_mlflow_refuses_is_named_and_the_others_mirrored(
    root: Path, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(root)
    old = finished(root, OTHER)
    database.change(
        "create trigger refuse before insert on params when new.value = 'refused' "
        "begin select raise(abort, 'not this'); end"
    )
    with (old / "config.yaml").open("a") as stream:
        stream.write("recipe: refused\n")
    assert mirror.main([str(root)]) == 2
    error = capsys.readouterr().err
    assert OTHER in error and "was refused by MLflow" in error and "1 problem, the others" in error
    assert database.metrics() == EXPECTED


def test_a_sweep_says_what_came_out_and_holds_its_report(
    root: Path, database: Database, tmp_path: Path
) -> None:
    """Means by arm in the sweep's run; the data sets of a cell as inputs, its newest checkpoint by place."""
    folder = finished(root)
    (folder / "checkpoints" / "step-000003").mkdir(parents=True)
    provenance = read_json(folder / "provenance.json")
    write_json(
        folder / "provenance.json", {**provenance, "datasets": {"training": "a" * 64, "digits": "b" * 64}}
    )
    sweep(root, "mine", [NAME], BORN)
    report = tmp_path / "report"
    assert mirror.main([str(root / "sweeps/mine"), f"report={report}"]) == 2, "it is not made yet"
    report.mkdir()
    (report / "report.html").write_text("<p>found</p>")
    for _ in range(2):
        assert mirror.main([str(root / "sweeps/mine"), f"report={report}"]) == 0
    held = {(name, value) for name, _, _, value in database.metrics("mine")}
    rows = [row for row in read_final(folder, "evals") if row["metric"] == "accuracy"]
    last = {row["dataset"]: row["value"] for row in rows}
    assert last
    assert {("cells/finished", 1.0), *((f"accuracy/{k}/dash", v) for k, v in last.items())} <= held
    assert database.ask("select name, digest from datasets order by name") == [
        ("digits", "a" * 36),
        ("digits", "b" * 36),
    ]
    assert len(database.ask("select * from inputs")) == 2
    assert database.words("tags")["dash_exp.checkpoint"].endswith("step-000003")
    [(place,)] = database.ask("select artifact_uri from runs where name = 'mine'")
    assert Path(place, "report", "report.html").read_text() == "<p>found</p>"
