"""What killed servers leave behind: shared memory and semaphores in /dev/shm, sockets. Each server has a note
in a folder of ours that says which process it is and which files it holds; a later run removes what dead ones
left."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dash_exp.record.folder import read_json, write_json

SHARED_MEMORY = "/dev/shm/"
END_WAIT_S = 2.0
SOCKET_CHARS = 53
"""The longest folder in which a socket of vLLM's has a path of at most 107 characters."""


def folder() -> Path:
    """Where the notes lie, readable by this user only."""
    place = Path(tempfile.gettempdir(), f"dash-exp-{os.getuid()}")
    place.mkdir(mode=0o700, exist_ok=True)
    return place if place.lstat().st_uid == os.getuid() else Path(tempfile.mkdtemp(prefix="dash-exp-"))


def socket_folder() -> Path | None:
    """A new folder for a server's sockets; None where its path would be too long for them."""
    with suppress(OSError):
        if len(str(folder())) <= SOCKET_CHARS:
            return Path(tempfile.mkdtemp(prefix="sockets-", dir=folder()))
    return None


def started(pid: int) -> str | None:
    """When a process was started, in the system's ticks, which no later process of its id shares; None if it
    has ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None


def machine() -> str:
    """Where a process id means the same: this boot of this machine or container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return "unknown"


def members(session: int) -> Iterator[int]:
    """The processes of a session that live."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError):
                if os.getsid(int(name)) == session and started(int(name)) is not None:
                    yield int(name)


def held_files(session: int) -> dict[str, int]:
    """Files in shared memory that the processes of a session have mapped, but for weights, which have a lock:
    inode by path. A semaphore is mapped under the name it was made with, and then renamed."""
    inodes = set[int]()
    for pid in members(session):
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            inodes |= {int(line.split()[4]) for line in lines if f" {SHARED_MEMORY}" in line}
    with suppress(OSError), os.scandir(SHARED_MEMORY) as entries:
        return {
            e.path: e.inode() for e in entries if e.inode() in inodes and e.is_file(follow_symlinks=False)
        }
    return {}


class Note:
    """The note of one server, by its process id (it leads a session of its own)."""

    def __init__(self, pid: int, sockets: Path | None):
        self.pid, self.sockets = pid, sockets
        self.path = folder() / f"{pid}-{started(pid)}.json"
        self.files: dict[str, int] = {}
        self.write()

    def write(self) -> None:
        """Note what it holds now."""
        self.files |= held_files(self.pid)
        with suppress(OSError):
            sockets = str(self.sockets or "")
            write_json(self.path, {"machine": machine(), "files": self.files, "sockets": sockets})

    def clear(self) -> None:
        """It has ended: remove what it left, once its children have ended too."""
        deadline = time.monotonic() + END_WAIT_S
        while any(members(self.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        clear(self.path)


def clear(note: Path) -> None:
    """Remove what a note names, if its process and that one's children have ended."""
    pid, _, ticks = note.stem.partition("-")
    known = read_json(note)
    if known.get("machine") != machine() or not pid.isdecimal():
        return
    if started(int(pid)) == ticks or any(members(int(pid))):
        return
    for path, inode in known.get("files", {}).items():
        with suppress(OSError):
            facts = os.lstat(path)
            if facts.st_ino == inode and facts.st_uid == os.getuid() and path.startswith(SHARED_MEMORY):
                os.unlink(path)
    sockets = Path(str(known.get("sockets", "")))
    if sockets.parent == note.parent and sockets.name.startswith("sockets-"):
        shutil.rmtree(sockets, ignore_errors=True)
    note.unlink(missing_ok=True)


def sweep() -> None:
    """Remove what the servers of killed runs left."""
    with suppress(OSError):
        for note in folder().glob("*-*.json"):
            clear(note)
