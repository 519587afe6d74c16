"""Ranks that somebody else started: who comes, who is missing, who has gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from dash_exp.errors import UserError
from dash_exp.learning.distributed.launch import Listener, connect_to_rank_0
from tests.conftest import REPOSITORY

PROGRAM = """
import sys, time
from dash_exp.learning.distributed.launch import connect_to_rank_0
held = connect_to_rank_0("127.0.0.1", int(sys.argv[1]), 2, 10)
time.sleep(60)
"""


def test_a_rank_is_alive_until_it_is_killed() -> None:
    listener = Listener()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(listener.port)], cwd=REPOSITORY)
    scanner = socket.create_connection(("127.0.0.1", listener.port))
    scanner.close()  # not a rank
    held = connect_to_rank_0("127.0.0.1", listener.port, 1, 10)
    workers = listener.accept_workers(3, 20)
    assert sorted(workers) == [1, 2]
    assert workers[1].exit_reason() is workers[2].exit_reason() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    while workers[2].exit_reason() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "is gone" in str(workers[2].exit_reason())
    assert workers[1].exit_reason() is None
    held.close()
    workers[1].stop(5)
    workers[2].stop(5)


def test_a_rank_that_does_not_come_is_named() -> None:
    listener = Listener()
    with (
        connect_to_rank_0("127.0.0.1", listener.port, 2, 10),
        pytest.raises(UserError, match=r"rank 1, 3 did not connect"),
    ):
        listener.accept_workers(4, 0.3)


def test_waiting_for_the_end_has_an_end() -> None:
    listener = Listener()
    with connect_to_rank_0("127.0.0.1", listener.port, 1, 10):
        workers = listener.accept_workers(2, 5)
        start = time.monotonic()
        workers[1].stop(0.2)
        assert time.monotonic() - start < 2
