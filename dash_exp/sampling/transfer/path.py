"""Weights through a safetensors file that learner and servers see: in shared memory, filled in place, or in a
folder of several machines, where each version is a new file."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from dash_exp.record.checkpoint import checksum
from dash_exp.sampling.fleet.client import ServerClient
from dash_exp.sampling.transfer import PATH, Weights

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "dash-weights-"
ARRIVAL_S = 60.0
"""How long a server waits for a file that another machine has written: its view of a folder may be older."""
ABANDONED_S = 60.0
"""Age from which an unlocked folder is taken for a killed run's."""
ABANDONED_SHARED_S = 86_400.0
"""The same between machines, where a lock may not be visible."""
KEPT = 2
"""Versions that are kept, so that a server that is still reading the older one can finish."""
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Writer:
    """Writes weights into a new folder, which is locked while this process lives and removed at the end."""

    arrival_s = 0.0
    """How long a server may have to wait until it sees what was written."""

    def __init__(self, place: Path, dtype: torch.dtype, abandoned_s: float):
        """`dtype`: what tensors are converted to. Raises OSError where `place` cannot be used."""
        remove_abandoned(place, abandoned_s)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        self._lock = lock_folder(self.folder)
        self.dtype = dtype

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[Path, Mapping[str, Tensor]]:
        """Returns the file that holds the weights, and its tensors by name."""
        raise NotImplementedError

    def convert(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        return {name: tensor.detach().to(self.dtype).cpu().contiguous() for name, tensor in weights}

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()


class PathTransfer:
    """Each server gets the file's path and a checksum of every tensor in it."""

    engine = PATH

    def __init__(self, writer: Writer):
        self.writer = writer
        self.seconds: dict[str, float] = {}

    def stage(self, weights: Iterable[tuple[str, Tensor]], version: int, label: str) -> Weights:
        start = time.perf_counter()
        path, tensors = self.writer.write(weights)
        written = time.perf_counter()
        sums = {name: checksum(tensor) for name, tensor in tensors.items()}
        self.seconds = {"write": written - start, "checksum": time.perf_counter() - written}
        update = {"path": str(path), "checksums": sums, "arrival_s": self.writer.arrival_s}
        return Weights(version, label, update)

    async def send(self, client: ServerClient, weights: Weights) -> None:
        await client.load(weights.update, weights.label)

    def disconnect(self, client: ServerClient) -> None:
        """Nothing connects to it."""

    def close(self) -> None:
        self.writer.close()


class SharedWeights(Writer):
    """Two files in shared memory that are written alternately, so that a server that is still reading the
    older one can finish. New files cost more than the copy itself (the system clears every page), so each is
    created once and then filled in place."""

    def __init__(self, dtype: torch.dtype):
        place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        super().__init__(place, dtype, ABANDONED_S)
        self._views: dict[Path, dict[str, Tensor]] = {}
        self._next = 0

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[Path, dict[str, Tensor]]:
        path = self.folder / f"weights-{self._next}.safetensors"
        self._next = 1 - self._next
        if path not in self._views:
            save_file(self.convert(weights), path)
            self._views[path] = map_file(path)
            return path, self._views[path]
        views, filled = self._views[path], 0
        for name, tensor in weights:
            views[name].copy_(tensor.detach())
            filled += 1
        assert filled == len(views), f"{filled} tensors where {len(views)} were written before"
        return path, views

    def close(self) -> None:
        self._views.clear()
        super().close()


class FileWeights(Writer):
    """Files in a folder that several machines see: each version is a new file, written under another name,
    synced to the disk and renamed, so that a server finds a complete one or none."""

    arrival_s = ARRIVAL_S

    def __init__(self, place: Path, dtype: torch.dtype):
        place.mkdir(parents=True, exist_ok=True)
        super().__init__(place.resolve(), dtype, ABANDONED_SHARED_S)
        self._written: list[Path] = []
        self._count = 0

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[Path, Mapping[str, Tensor]]:
        named = self.convert(weights)
        path = self.folder / f"weights-{self._count}.safetensors"
        self._count += 1
        part = path.with_suffix(".part")
        save_file(named, part)
        _sync(part)
        part.replace(path)
        _sync(self.folder)
        self._written.append(path)
        while len(self._written) > KEPT:
            self._written.pop(0).unlink(missing_ok=True)
        return path, named


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class SharedReader:
    """A server's end: each file in shared memory is mapped once and stays mapped, since a new mapping costs a
    page fault for every page. Files elsewhere are read each time (another machine may remove them)."""

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
            self._mapped[path] = (inode, map_file(path))
        return self._mapped[path][1]

    def close(self) -> None:
        self._mapped.clear()


def lock_folder(folder: Path) -> FileLock | None:
    """Lock a folder until `release` or the end of this process; None where another process holds the lock, or
    there are no locks here."""
    lock = FileLock(folder / ".lock", mode=0o600, thread_local=False, blocking=False)
    try:
        lock.acquire()
    except (OSError, NotImplementedError):
        return None
    return lock


def remove_abandoned(place: Path, older_than_s: float = ABANDONED_S) -> None:
    """Remove folders of runs that were killed: no process holds their lock."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # of another user, or removed meanwhile
            if time.time() - folder.stat().st_mtime < older_than_s:
                continue
            if (lock := lock_folder(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()


def map_file(path: Path) -> dict[str, Tensor]:
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
        count = (last - first) // dtype.itemsize
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=start + first)
        views[name] = flat.view(entry["shape"])
    return views
