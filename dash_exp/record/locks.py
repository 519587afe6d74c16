"""Locks of the record, and which process of this machine holds them.

The process that runs a cell holds the lock in its folder. The kernel releases it when that process dies, and
programs that it starts do not inherit it. Who holds it is read from the kernel's table: taking the lock to
find out could make a cell that starts at this moment find it busy.
"""

from __future__ import annotations

import fcntl
import os
import platform
import signal
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TABLE = Path("/proc/locks")
HERE = platform.node()
"""This machine's name, as records have it."""
STARTING_TRIES, STARTING_S = 20, 0.005
"""For a process whose command line is empty: briefly while it starts, always for the kernel's own."""


def take_lock(path: Path, wait: bool = False) -> int:
    """Lock a file and return its descriptor; closing it releases the lock. Raises BlockingIOError, unless it
    is to `wait`, while another process holds the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@dataclass(frozen=True, slots=True)
class Locks:
    """Who holds which lock on this machine: device and inode of the file to process ids. `known`: whether the
    system has such a table."""

    holders: dict[tuple[int, int, int], tuple[int, ...]]
    known: bool = True

    @classmethod
    def now(cls) -> Locks:
        """The locks at this moment."""
        found: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        try:
            lines = TABLE.read_text(encoding="ascii").splitlines()
        except OSError:
            return cls({}, known=False)
        for line in lines:
            fields = line.split()  # "1: FLOCK ADVISORY WRITE 812 fe:00:2483200 0 EOF"; "->": only waits
            if len(fields) > 5 and fields[1] == "FLOCK":
                major, minor, inode = fields[5].split(":")
                found[int(major, 16), int(minor, 16), int(inode)].append(int(fields[4]))
        return cls({place: tuple(pids) for place, pids in found.items()})

    def holder(self, path: Path) -> int | None:
        """The live process that holds a lock on this file, if one does."""
        try:
            facts = path.stat()
        except OSError:
            return None
        place = (os.major(facts.st_dev), os.minor(facts.st_dev), facts.st_ino)
        if place in self.holders:
            return next(filter(is_alive, self.holders[place]), None)
        # Stacked file systems show programs another device than the kernel's table.
        same = [pids for (_, _, inode), pids in self.holders.items() if inode == facts.st_ino]
        return next((pid for pids in same for pid in pids if _has_open(pid, facts)), None)


def _has_open(pid: int, file: os.stat_result) -> bool:
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.path.samestat(os.stat(entry.path), file):
                    return True
    return False


def is_alive(pid: int) -> bool:
    """Whether there is a process of this id that is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError, IndexError):
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
        return after_name.split()[0] != "Z"
    return True


def runs(pid: int, word: str) -> bool:
    """Whether a live process has this word in its command line: ids are reused."""
    for _ in range(STARTING_TRIES):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return not TABLE.exists() and is_alive(pid)
        if command or not is_alive(pid):
            return word.encode() in command
        time.sleep(STARTING_S)  # it has just been started
    return False


def ask_to_end(pid: int, word: str) -> bool:
    """Send SIGTERM to a process, if it is still the one whose command line has this word."""
    try:
        handle = os.pidfd_open(pid)
    except (OSError, AttributeError):  # gone; or a system without such handles
        if hasattr(os, "pidfd_open") or not runs(pid, word):
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            return True
        return False
    try:  # the handle stays with this process, so the id cannot be reused between the check and the signal
        if not runs(pid, word):
            return False
        signal.pidfd_send_signal(handle, signal.SIGTERM)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True
