"""Weights left for other processes on this machine: safetensors files in shared memory, filled in place."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "dash-weights-"


class SharedWeights:
    """Two files in turn, so that a server that is still reading the older one can finish. New files cost
    more than the copy itself (the system clears every page), so each is made once and then filled."""

    arrival_s = 0.0

    def __init__(self, dtype: torch.dtype):
        """`dtype`: what the tensors are turned into on the way."""
        place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        remove_left_behind(place)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        self._lock = locked(self.folder)
        self.dtype = dtype
        self._views: dict[Path, dict[str, Tensor]] = {}
        self._turn = 0

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[Path, dict[str, Tensor]]:
        """Copy the weights into the next file. Returns it, and its tensors by name."""
        path = self.folder / f"weights-{self._turn}.safetensors"
        self._turn = 1 - self._turn
        if path not in self._views:
            named = {name: tensor.detach().to(self.dtype).cpu().contiguous() for name, tensor in weights}
            save_file(named, path)
            self._views[path] = mapped(path)
            return path, self._views[path]
        views = self._views[path]
        filled = 0
        for name, tensor in weights:
            views[name].copy_(tensor.detach())
            filled += 1
        assert filled == len(views), f"{filled} tensors where {len(views)} were left before"
        return path, views

    def close(self) -> None:
        self._views.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class SharedReader:
    """The other side: each file in shared memory is mapped once and stays so, since mapping it anew means a
    page fault for every page. Files elsewhere are read anew (another machine may take them away)."""

    def __init__(self, place: Path = SHARED_MEMORY):
        self.place = place.resolve()
        self._mapped: dict[Path, tuple[int, dict[str, Tensor]]] = {}

    def read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a safetensors file by name; valid until the writer fills that file again."""
        path = path.resolve()
        if not path.is_relative_to(self.place):
            elsewhere: dict[str, Tensor] = load_file(path)
            return elsewhere
        inode = path.stat().st_ino
        if self._mapped.get(path, (None,))[0] != inode:
            self._mapped = {p: kept for p, kept in self._mapped.items() if p != path and p.exists()}
            self._mapped[path] = (inode, mapped(path))
        return self._mapped[path][1]

    def close(self) -> None:
        self._mapped.clear()


def locked(folder: Path) -> int | None:
    """The lock of a folder, held until it is closed or this process ends; None if somebody holds it."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def remove_left_behind(place: Path, older_than_s: float = 60.0) -> None:
    """Folders of runs that were killed: nobody holds their lock any more."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # of another user, or gone meanwhile
            if time.time() - folder.stat().st_mtime < older_than_s:
                continue
            if (lock := locked(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, sharing its memory: writing to them writes the file."""
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    start = 8 + int.from_bytes(memory[:8], "little")
    header = json.loads(memory[8:start])
    header.pop("__metadata__", None)
    views = {}
    for name, entry in header.items():
        dtype = TYPES[entry["dtype"]]
        first, last = entry["data_offsets"]
        flat = torch.frombuffer(
            memory, dtype=dtype, count=(last - first) // dtype.itemsize, offset=start + first
        )
        views[name] = flat.view(entry["shape"])
    return views


TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
