"""The process beside a run: it sends what grows, hears no scheduler, and ends when its run has, however."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from dash_exp.config.environment import is_installed
from dash_exp.config.schema import changed
from dash_exp.config.tracking import MirrorPlace
from dash_exp.mirror import follow as mirror_follow
from dash_exp.mirror.follow import Follower, SyncTimer
from dash_exp.mirror.sync import record_points
from dash_exp.record.folder import Recorder, read_final, read_json
from tests.conftest import REPOSITORY
from tests.mirror_fixtures import BORN, NAME, Database, attempt, begin, counting, step
from tests.mirror_writer import config_of

pytestmark = pytest.mark.skipif(not is_installed("mlflow"), reason="mlflow is not installed")
MS = round(BORN * 1000)


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def until(true: Callable[[], object], what: str, limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.1)


def values_in(database: Database) -> int:
    with suppress(Exception):  # there is no file yet, or no table
        return len(database.metrics())
    return 0


def expected(folder: Path) -> set[tuple[str, int, int, float]]:
    """All that a record holds, as a database would."""
    return {(k, p.step, p.time_ms, v) for p in record_points(folder) for k, v in p.values.items()}


@pytest.mark.long
def test_it_sends_while_the_run_goes_on_and_hears_no_scheduler(tmp_path: Path) -> None:
    folder, notes = begin(tmp_path), list[str]()
    database = Database(tmp_path / "mlflow.db")
    with Follower(folder, config_of(tmp_path), notes.append) as follower, Recorder(folder) as recorder:
        follower.start(recorder.attempt)
        process = follower.process
        assert process is not None
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            os.kill(process.pid, number)  # at its very beginning
        attempt(recorder)
        step(recorder, 1, 0.25)
        until(lambda: values_in(database) == 2, "the first step")
        assert database.runs()[0][:2] == (NAME, "RUNNING")
        assert psutil.Process(process.pid).nice() == 19
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            os.kill(process.pid, number)
        step(recorder, 2, 0.5)
        until(lambda: values_in(database) == 4, "the second step")
        step(recorder, 3, 0.75)
        recorder.status("finished", 3, reason="planned")
    assert process.returncode == 0 and notes == []
    assert database.metrics() == expected(folder) and len(expected(folder)) == 6
    assert database.runs()[0][:3] == (NAME, "FINISHED", MS)
    assert not (folder / "log.txt").exists()  # nothing went wrong


def test_nothing_is_started_where_nothing_is_tracked(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config = changed(config, {"tracking.mlflow": False})
    with Follower(begin(tmp_path), config, pytest.fail) as follower:
        follower.start(1)
        assert follower.process is None


def test_a_server_that_hangs_holds_nobody_up_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_follow, "END_S", 1.0)
    folder, notes = begin(tmp_path), list[str]()
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes calls and never answers
        config = config_of(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with Follower(folder, config, notes.append) as follower, Recorder(folder) as recorder:
            follower.start(recorder.attempt)
            attempt(recorder)
            recorder.status("finished", 0)
        assert time.monotonic() - start < 3
        assert follower.process is not None and follower.process.poll() is None  # left to itself
        follower.process.kill()
        follower.process.wait()
    assert "has not got everything yet" in notes[0]
    assert "has not got everything yet" in (folder / "log.txt").read_text()


def test_that_it_cannot_be_started_is_said_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no_python"))
    folder, notes = begin(tmp_path), list[str]()
    with Follower(folder, config_of(tmp_path), notes.append) as follower:
        follower.start(1)
    assert "mirror: could not be started" in notes[0] and notes[0] in (folder / "log.txt").read_text()


def test_one_that_was_left_behind_gives_way_to_a_later_run(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    for _ in range(2):
        with Recorder(folder) as recorder:
            recorder.status("running", 0)
    nowhere = MirrorPlace("http://127.0.0.1:9", "dash_exp")
    with ExitStack() as held:  # attempt 2 has a process of its own; this one's input ends at once
        assert SyncTimer(folder, [nowhere], 1, held).run(1.0) == 0
        behind = SyncTimer(folder, [nowhere], 2, held)
        folder.rename(tmp_path / "archived")
        begin(tmp_path)
        assert behind.run(1.0) == 0


# --- minutes ---


def writer(root: Path, name: str, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.mirror_writer", str(root), name, *map(str, more)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def followers_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--follow" in words and str(folder) in words:
            found.append(process)
    return found


@pytest.mark.long
def test_a_killed_run_leaves_a_whole_mirror_and_no_process(tmp_path: Path) -> None:
    process = writer(tmp_path, NAME, 0, 0, 0)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    folder, database = tmp_path / "cells" / NAME, Database(tmp_path / "mlflow.db")
    until(lambda: values_in(database) == 2, "the first step")
    assert len(followers_of(folder)) == 1
    process.kill()
    process.wait()
    process.stdout.close()
    until(lambda: not followers_of(folder), "its follower's end")
    assert read_json(folder / "status.json")["state"] == "running"  # nobody could say more
    assert database.runs()[0][:2] == (NAME, "KILLED")


@pytest.mark.long
def test_twelve_at_once_lose_nothing(tmp_path: Path) -> None:
    """They create the schema and the experiment together, too."""
    names = [f"dash-tiny-digits-s{seed}-0000000{seed:x}" for seed in range(12)]
    processes = [writer(tmp_path, name, 120, 0.1, 40) for name in names]
    for process in processes:
        process.communicate(timeout=500)
        assert process.returncode == 0
    database = Database(tmp_path / "mlflow.db")
    for name in names:
        folder = tmp_path / "cells" / name
        until(lambda folder=folder: not followers_of(folder), "its follower's end", 200)  # type: ignore[misc]
        assert (folder / "mirror.log").read_text().endswith("complete\n")
        assert database.metrics(name) == expected(folder)
        assert len(expected(folder)) == 2 + 119 * 42
        assert database.words("tags", name)["dash_exp.cell"] == name
    assert sorted(run[:2] for run in database.runs()) == [(name, "FINISHED") for name in sorted(names)]
    assert database.ask("select count(distinct experiment_id) from runs") == [(1,)]


@contextmanager
def mlflow_server(file: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's own server, on a database; killed at the end."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{file}",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with (file.parent / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=file.parent, start_new_session=True)
    try:
        until(lambda: answers(port), "the server's start", 180)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def command(*words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", *words]
    return subprocess.Popen(line, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
def test_a_server_that_dies_stops_no_training_and_a_rebuild_makes_the_mirror_whole(tmp_path: Path) -> None:
    port, file, root = free_port(), tmp_path / "server.db", tmp_path / "outputs"
    uri, database = f"tracking.uri=http://127.0.0.1:{port}", Database(file)
    with mlflow_server(file, port):
        run = command(
            "dash_exp",
            "model=tiny",
            "debug=fast",
            "algorithm.steps=100000",
            "cluster.threads=1",
            "checkpoint.every=0",
            f"run.dir={root}",
            "run.progress=plain",
            "tracking=mlflow",
            "tracking.every_s=0.5",
            uri,
        )
        until(lambda: database.ask("select max(step) from metrics")[0][0], "a mirrored step")
    (folder,) = (root / "cells").iterdir()  # the server is dead
    before = len(read_final(folder, "steps"))
    until(lambda: "training goes on" in (folder / "log.txt").read_text(), "a word about the server")
    until(lambda: len(read_final(folder, "steps")) > before + 20, "twenty more steps")
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=90)
    assert run.returncode == 128 + signal.SIGTERM, output
    for follower in followers_of(folder):  # it would try for two minutes
        follower.kill()
        follower.wait(10)
    assert database.runs()[0][1] == "RUNNING"  # as the server was told last
    assert len(database.metrics(folder.name)) < len(expected(folder))
    with mlflow_server(file, port):
        rebuild = command("dash_exp.mirror", str(folder), uri)
        assert rebuild.wait(120) == 0, rebuild.communicate()[0]
        assert "brought up to date" in rebuild.communicate()[0]
        assert database.metrics(folder.name) == expected(folder)
        assert [run[:2] for run in database.runs()] == [(folder.name, "KILLED")]
        whole = database.everything()
        again = command("dash_exp.mirror", str(folder), uri)
        assert "1 unchanged" in again.communicate(timeout=120)[0]
        assert database.everything() == whole
    assert counting(database.metrics(folder.name))["updates/total", before] == before
