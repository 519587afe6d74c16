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
from dash_exp.learning.distributed.member import device_of
from dash_exp.learning.distributed.parallel import ParallelLearner
from dash_exp.learning.distributed.rank_process import RankProcess
from dash_exp.learning.distributed.ranks import start
from tests.learning.test_learner import objective
from tests.learning.test_parallel import spec_of


def test_a_fault_of_another_rank_is_told_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    """And what fails there otherwise is told with the end of the rank's log."""
    spec = spec_of(tiny_folder, objective())
    made = start(2, 30.0, tmp_path)
    try:
        learner = ParallelLearner.of(spec, made)
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
        pytest.param(2, signal.SIGSTOP, "rank 1 was silent", marks=pytest.mark.long),
    ],
    ids=["dies", "stops"],
)
def test_a_rank_that_others_wait_for_in_a_sum_is_named(
    tiny_folder: Path, tmp_path: Path, ranks: int, number: int, says: str
) -> None:
    made = start(ranks, 2.0, tmp_path)
    try:
        learner = ParallelLearner.of(spec_of(tiny_folder, objective()), made)
        os.kill(made.members[ranks - 1].process.pid, number)
        began = time.monotonic()
        with pytest.raises(UserError, match=says):
            learner.update(1.0)
        assert time.monotonic() - began < 10
    finally:
        made.close()
    assert all(member.ending() is not None for member in made.members.values())


def test_a_rank_ends_with_its_standard_input_whatever_it_waits_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = {"rank": 1, "size": 2, "port": silent.getsockname()[1], "timeout_s": 60}
        process = RankProcess(1, settings, tmp_path)
        assert process.ending() is None
        process.end(15)
    assert process.ending() == "ended with exit code 1"


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
