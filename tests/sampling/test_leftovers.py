"""What killed servers leave is removed by the next run, and nothing else is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from dash_exp.sampling.fleet import leftovers

HOLDER = """
import _multiprocessing, os, sys, time
from multiprocessing import resource_tracker, shared_memory
memory = shared_memory.SharedMemory(create=True, size=64)
resource_tracker.unregister(memory._name, "shared_memory")
name = f"/dash-test-{os.getpid()}"
semaphore = _multiprocessing.SemLock(1, 1, 1, name, False)
print("/dev/shm/" + memory._name.lstrip("/"), "/dev/shm/sem." + name[1:], flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with TemporaryDirectory() as short:  # a socket's path may have 107 characters
        monkeypatch.setattr(leftovers, "folder", lambda: Path(short))
        yield Path(short)


def test_a_killed_servers_shared_memory_and_sockets_are_removed_once_it_is_dead(place: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert holder.stdout is not None
    held, sockets = list(map(Path, holder.stdout.readline().split())), leftovers.socket_folder()
    assert sockets is not None
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(sockets / "one"))
    note = leftovers.Note(holder.pid, sockets)
    note.write()
    leftovers.sweep()
    assert all(p.exists() for p in (*held, sockets / "one"))  # it lives
    os.killpg(holder.pid, signal.SIGKILL)
    holder.wait()
    assert len(held) == 2 and all(path.exists() for path in held)
    while any(leftovers.members(holder.pid)):  # a killed child may take a moment
        time.sleep(0.01)
    leftovers.sweep()
    assert not any(path.exists() for path in held) and list(place.iterdir()) == []


def test_nothing_is_removed_that_is_not_provably_of_a_dead_server(place: Path, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    dead.wait()
    kept = tmp_path / "sockets-kept"
    kept.mkdir()
    other = Path(f"/dev/shm/dash-test-{os.getpid()}")
    other.touch()
    try:
        files = {str(other): 1, str(kept / "file"): 2, "/dev/shm/absent": 3}
        (place / f"{dead.pid}-1.json").write_text(
            json.dumps({"machine": leftovers.machine(), "files": files, "sockets": str(kept)})
        )
        (place / "notes-mine.json").write_text("{")
        (place / f"{dead.pid}-2.json").write_text(json.dumps({"machine": "another", "files": {}}))
        leftovers.sweep()
        assert other.exists() and kept.exists() and (place / "notes-mine.json").exists()
        assert not (place / f"{dead.pid}-1.json").exists() and (place / f"{dead.pid}-2.json").exists()
    finally:
        other.unlink()
