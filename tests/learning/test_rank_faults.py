"""Ranks of a learner that fail, die, fall silent or have no device: who is named, and that nobody is left."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from dash_exp.errors import UserError
from dash_exp.learning.distributed.launch import WorkerProcess, start_workers
from dash_exp.learning.distributed.learner import DistributedLearner
from dash_exp.learning.learner import device_of
from tests.learning.test_learner import objective
from tests.learning.test_parallel import spec_of


@pytest.mark.long
def test_a_fault_of_another_rank_is_told_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    """And what fails there otherwise is told with the end of the rank's log."""
    spec = spec_of(tiny_folder, objective())
    made = start_workers(2, 30.0, tmp_path)
    try:
        learner = DistributedLearner(spec, made)
        with pytest.raises(UserError, match=r"rank 1 failed: AttributeError.*nonsense") as caught:
            made.call("nonsense", [None, None], lambda: None)
        assert "Traceback" in (tmp_path / "rank-1.log").read_text()
        assert "rank-1.log" in str(caught.value)
        assert learner.width == 2
    finally:
        made.close()


@pytest.mark.parametrize(
    ("ranks", "number", "says"),
    [
        (3, signal.SIGKILL, "rank 2 was killed by SIGKILL"),
        pytest.param(2, signal.SIGSTOP, "rank 1 did not answer", marks=pytest.mark.long),
    ],
    ids=["dies", "stops"],
)
def test_a_rank_that_others_wait_for_in_a_sum_is_named(
    tiny_folder: Path, tmp_path: Path, ranks: int, number: int, says: str
) -> None:
    made = start_workers(ranks, 2.0, tmp_path)
    try:
        learner = DistributedLearner(spec_of(tiny_folder, objective()), made)
        os.kill(made.workers[ranks - 1].process.pid, number)
        began = time.monotonic()
        with pytest.raises(UserError, match=says):
            learner.update(1.0)
        assert time.monotonic() - began < 10
    finally:
        made.close()
    assert all(worker.exit_reason() is not None for worker in made.workers.values())


def test_a_rank_ends_with_its_standard_input_whatever_it_waits_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = {"rank": 1, "size": 2, "port": silent.getsockname()[1], "timeout_s": 60}
        process = WorkerProcess(settings, tmp_path)
        assert process.exit_reason() is None
        process.stop(15)
    assert process.exit_reason() == "ended with exit code 1"


def test_devices_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("auto") == device_of("cuda") == torch.device("cuda")
    assert device_of("auto", 1) == torch.device("cuda:1")
    assert device_of("cuda:0", 1) == torch.device("cuda:0")
    assert device_of("cpu", 1) == torch.device("cpu")
    with pytest.raises(UserError, match="there are 2 GPUs here"):
        device_of("auto", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # all that the scheduler shows this rank
    assert device_of("cuda", 3) == torch.device("cuda:0")
