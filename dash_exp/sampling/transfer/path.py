"""Weights through a file that both sides see: in shared memory, or in a folder of several machines."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from dash_exp.record.checksums import checksum
from dash_exp.sampling.fleet.client import ServerClient
from dash_exp.sampling.transfer.base import PATH, Weights
from dash_exp.sampling.transfer.shared_weights import PREFIX, locked, remove_left_behind

ARRIVAL_S = 60.0
"""How long a server waits for a file that another machine has written: its view of a folder may be older."""
LEFT_BEHIND_S = 86_400.0
"""Age of a folder that may be a killed run's. Between machines a lock may be unseen, so it is a day."""
KEPT = 2
"""Versions that stay, so that a server that still reads the older one can finish."""


class Writer(Protocol):
    arrival_s: float
    """How long a server may have to wait until it sees what was written."""

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[Path, Mapping[str, Tensor]]: ...

    def close(self) -> None: ...


class PathTransfer:
    """Each server is told the file's path and a checksum of every tensor in it."""

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

    def forget(self, client: ServerClient) -> None:
        """Nothing connects to it."""

    def close(self) -> None:
        self.writer.close()


class FileWeights:
    """Files in a folder that several machines see: each version is a new file, written aside, synced to
    the disk and renamed, so that a server finds a whole one or none."""

    arrival_s = ARRIVAL_S

    def __init__(self, place: Path, dtype: torch.dtype):
        """`dtype`: what the tensors are turned into on the way. Raises OSError for a place of no use."""
        place.mkdir(parents=True, exist_ok=True)
        remove_left_behind(place, LEFT_BEHIND_S)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place.resolve()))
        self._lock = locked(self.folder)
        self.dtype = dtype
        self._written: list[Path] = []
        self._count = 0

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[Path, Mapping[str, Tensor]]:
        named = {name: tensor.detach().to(self.dtype).cpu().contiguous() for name, tensor in weights}
        path = self.folder / f"weights-{self._count}.safetensors"
        self._count += 1
        aside = path.with_suffix(".part")
        save_file(named, aside)
        _sync(aside)
        aside.replace(path)
        _sync(self.folder)
        self._written.append(path)
        while len(self._written) > KEPT:
            self._written.pop(0).unlink(missing_ok=True)
        return path, named

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
