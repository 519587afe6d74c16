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
from dash_exp.learning.distributed.watch import Door, knock
from tests.conftest import REPOSITORY

PROGRAM = """
import sys, time
from dash_exp.learning.distributed.watch import knock
held = knock("127.0.0.1", int(sys.argv[1]), 2, 10)
time.sleep(60)
"""


def test_a_rank_is_alive_until_it_is_killed() -> None:
    door = Door()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(door.port)], cwd=REPOSITORY)
    stranger = socket.create_connection(("127.0.0.1", door.port))
    stranger.close()  # a port scanner, say
    held = knock("127.0.0.1", door.port, 1, 10)
    members = door.receive(3, 20)
    assert sorted(members) == [1, 2]
    assert members[1].ending() is members[2].ending() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    while members[2].ending() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "is gone" in str(members[2].ending())
    assert members[1].ending() is None
    held.close()
    members[1].end(5)
    members[2].end(5)


def test_a_rank_that_does_not_come_is_named() -> None:
    door = Door()
    with knock("127.0.0.1", door.port, 2, 10), pytest.raises(UserError, match=r"rank 1, 3 did not come"):
        door.receive(4, 0.3)


def test_waiting_for_the_end_has_an_end() -> None:
    door = Door()
    with knock("127.0.0.1", door.port, 1, 10):
        members = door.receive(2, 5)
        start = time.monotonic()
        members[1].end(0.2)
        assert time.monotonic() - start < 2
