"""Signals of a scheduler, which reach every process of a job at once, and again by way of parents."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dash_exp import signals
from dash_exp.cell.__main__ import run_config
from dash_exp.config.compose import compose
from dash_exp.record.folder import read_final, read_json, read_rows
from dash_exp.signals import SCHEDULERS, Interrupted, Stop, block_signals
from tests.conftest import REPOSITORY
from tests.test_run import SMALL


@pytest.mark.parametrize("number", SCHEDULERS)
def test_an_echo_is_the_same_request(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop()
    stop.deferred = True
    stop(number, None)
    stop(number, None)
    assert stop.received == number
    monkeypatch.setattr(signals, "ECHO_S", 0.0)
    with pytest.raises(Interrupted):
        stop(number, None)


def test_an_echo_while_it_ends_changes_nothing() -> None:
    stop = Stop()
    with pytest.raises(Interrupted):  # nothing to wait for: at once
        stop(signal.SIGTERM, None)
    stop(signal.SIGTERM, None)  # it is ending already


def test_another_signal_and_a_second_ctrl_c_mean_at_once() -> None:
    for first, second in [(signal.SIGUSR2, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)]:
        stop = Stop()
        stop.deferred = True
        stop(first, None)
        with pytest.raises(Interrupted) as caught:
            stop(second, None)
        assert caught.value.number == second


def test_helpers_do_not_hear_them() -> None:
    code = "import time; print('up', flush=True); time.sleep(30)"
    with block_signals(*SCHEDULERS):
        helper = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    cell = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for process in (helper, cell):
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        for number in SCHEDULERS:
            process.send_signal(number)
    assert cell.wait(10) < 0  # started as before
    time.sleep(0.2)
    assert helper.poll() is None
    helper.kill()
    helper.wait()
    for process in (helper, cell):
        assert process.stdout is not None
        process.stdout.close()


def test_what_breaks_after_a_signal_is_the_signals_doing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that the same signal ended, say, while the step that needed it was let to end."""
    from dash_exp.record import checkpoint

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("the engine has died")

    monkeypatch.setattr(checkpoint, "save", die)
    assert run_config(compose([*SMALL, f"run.dir={tmp_path}"])) == 143
    (folder,) = (tmp_path / "cells").iterdir()
    status = read_json(folder / "status.json")
    assert (status["state"], status["failure"]) == ("interrupted", "SIGTERM")
    assert "the engine has died" in (folder / "log.txt").read_text()
    monkeypatch.undo()
    assert run_config(compose([*SMALL, f"run.dir={tmp_path}"])) == 0


@pytest.mark.long
@pytest.mark.parametrize("number", SCHEDULERS)
def test_a_signal_to_every_process_of_a_cell_ends_its_step_and_saves(tmp_path: Path, number: int) -> None:
    config = [
        *SMALL,
        "run.progress=plain",
        f"run.dir={tmp_path}",
        "algorithm.steps=400",
        "dataset.verifier=math",
        "dataset.extraction=last_number",
        "checkpoint.every=0",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "dash_exp", *config],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=with_default_signals,
    )
    deadline = time.monotonic() + 120
    while not any(len(read_rows(f).rows) > 1 for f in tmp_path.glob("cells/*/steps.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert len(helpers) >= 2  # of the verifier
    for one in [*helpers, psutil.Process(process.pid)]:
        one.send_signal(number)
    process.send_signal(number)  # from a parent that hands it on
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    (folder,) = (tmp_path / "cells").iterdir()
    status = read_json(folder / "status.json")
    assert (status["state"], status["failure"]) == ("interrupted", signal.Signals(number).name)
    assert (folder / "checkpoints" / f"step-{status['step']:06d}").exists()
    assert len(read_final(folder, "steps")) == status["step"] >= 2
    outcomes = {row["outcome"] for row in read_final(folder, "samples")}
    assert not outcomes & {"crashed", "verifier_error"}
    assert not [row for row in read_rows(folder / "events.jsonl").rows if row["kind"] == "fault"]


def with_default_signals() -> None:
    """In a child: the tests themselves may run where SIGHUP or SIGINT is ignored, as under nohup."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


HUNG_UP = """
import os, signal, time
from dash_exp.signals import Stop, handling
stop = Stop()
stop.deferred = True
with handling(stop):
    print("up", flush=True)
    while stop.received is None:
        time.sleep(0.01)
    print("x" * 100_000, flush=True)
os._exit(128 + stop.received)
"""


def test_a_closed_terminal_ends_a_step_and_what_is_printed_then_is_lost() -> None:
    ours, theirs = os.openpty()
    command = ["setsid", "--ctty", "--wait", sys.executable, "-c", HUNG_UP]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=REPOSITORY, preexec_fn=with_default_signals
    )
    os.close(theirs)
    assert os.read(ours, 100).startswith(b"up")
    os.close(ours)
    assert process.wait(20) == 128 + signal.SIGHUP


def test_ctrl_c_during_imports_prints_nothing() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "dash_exp.cell", "nothing"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=with_default_signals
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "dash_exp.text" in line:
            process.send_signal(signal.SIGINT)
            break
    assert "Traceback" not in process.stderr.read() and process.wait(20) == 128 + signal.SIGINT
    process.stderr.close()
