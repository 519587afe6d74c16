"""Checkpoints: Hugging Face folders with the state to resume beside the weights.

    checkpoints/step-000010/        config.json, model.safetensors (fp32 masters), tokenizer: loads as is
    checkpoints/step-000010/resume/ optimizer.safetensors, state.json
    checkpoints/step-000010/checksums.json   SHA-256 of every file; written last

A checkpoint is built beside its place and renamed, so half of one is never seen; a damaged one is
found by its checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from dash_exp.errors import as_disk_errors
from dash_exp.record.folder import read_json, write_json

MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
CHECKSUMS = "checksums.json"
RESUME = "resume"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a later process needs to resume: weights and optimizer moments by name, counters (step, updates),
    the step's row of the record, and what the chooser of prompts remembers. Seeds are functions of the
    step."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Damage:
    folder: Path
    reason: str


def folder_of(cell: Path, step: int) -> Path:
    return cell / "checkpoints" / f"step-{step:06d}"


def existing(cell: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((cell / "checkpoints").glob("step-*"), reverse=True)


def save(cell: Path, step: int, snapshot: Snapshot, model_folder: Path) -> Path:
    """Write a checkpoint of this step. OSError (a full disk, say) leaves earlier ones as they were."""
    target = folder_of(cell, step)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(".saving-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix=".saving-", dir=target.parent))
    os.chmod(fresh, 0o755)
    try:
        for pattern in MODEL_FILES:
            for file in model_folder.glob(pattern):
                if not file.name.endswith(".index.json") and file.name != CHECKSUMS:
                    shutil.copyfile(file, fresh / file.name)
        _save_tensors(snapshot.weights, fresh / "model.safetensors")
        (fresh / RESUME).mkdir()
        _save_tensors(snapshot.optimizer, fresh / RESUME / "optimizer.safetensors")
        write_json(fresh / RESUME / "state.json", dict(snapshot.state))
        write_json(fresh / CHECKSUMS, checksums(fresh))
        if target.exists():  # of an earlier attempt at this step: at every moment one of the two exists
            target.rename(target.with_name(f".saving-old-{target.name}"))
        os.rename(fresh, target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(target.with_name(f".saving-old-{target.name}"), ignore_errors=True)
    return target


class Saver:
    """Writes the checkpoints of a cell beside training, one at a time: each from a copy in host memory, by a
    thread, which then deletes the oldest. `keep`: how many stay. `note`: gets the step and when its writing
    began and ended."""

    def __init__(self, cell: Path, model: Path, keep: int, note: Callable[[int, float, float], None]):
        self.cell, self.model, self.keep, self.note = cell, model, keep, note
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[tuple[int, float, float]] | None = None

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Begin to write; weights may change as soon as this returns. Raises like `wait`."""
        self.wait()
        self._writing = self._pool.submit(self._write, step, on_host(snapshot))

    def wait(self) -> None:
        """Return once everything is written. Raises what went wrong since the last call."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.note(*writing.result())

    def _write(self, step: int, snapshot: Snapshot) -> tuple[int, float, float]:
        start = time.time()
        save(self.cell, step, snapshot, self.model)
        prune(self.cell, self.keep)
        return step, start, time.time()


def on_host(snapshot: Snapshot) -> Snapshot:
    """A copy in host memory, in pinned pages where the tensors are on a GPU."""
    tensors = [*snapshot.weights.values(), *snapshot.optimizer.values()]
    gpus = {t.device for t in tensors if t.is_cuda}

    def copy(tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return host.copy_(tensor.detach(), non_blocking=True)

    weights, optimizer = (
        {name: copy(tensor) for name, tensor in part.items()}
        for part in (snapshot.weights, snapshot.optimizer)
    )
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    return replace(snapshot, weights=weights, optimizer=optimizer)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    with as_disk_errors(path):
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but the checksums themselves."""
    sums = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != CHECKSUMS:
            with file.open("rb") as stream:
                sums[str(file.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def damage(folder: Path) -> str | None:
    """Why a checkpoint is damaged, or None."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    actual = checksums(folder)
    for name, value in expected.items():
        if name not in actual:
            return f"{name} is missing"
        if actual[name] != value:
            return f"{name} has changed since it was written"
    return None


def latest(cell: Path) -> tuple[Snapshot | None, list[Damage]]:
    """The newest undamaged checkpoint with state to resume, and those newer ones that are damaged."""
    damaged: list[Damage] = []
    for folder in existing(cell):
        reason = damage(folder)
        if reason is None and not (folder / RESUME / "state.json").exists():
            reason = "its state to resume is missing"
        if reason is None:
            return load(folder), damaged
        damaged.append(Damage(folder, reason))
    return None, damaged


def load(folder: Path) -> Snapshot:
    return Snapshot(
        load_file(folder / "model.safetensors"),
        load_file(folder / RESUME / "optimizer.safetensors"),
        json.loads((folder / RESUME / "state.json").read_text()),
    )


def prune(cell: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for folder in existing(cell)[keep:]:
        shutil.rmtree(folder)


def finalise(cell: Path) -> None:
    """A finished cell needs no state to resume: keep the newest checkpoint's weights only. May be
    stopped anywhere and repeated."""
    prune(cell, keep=1)
    for folder in existing(cell):
        if (folder / RESUME).exists():
            sums = {k: v for k, v in read_json(folder / CHECKSUMS).items() if not k.startswith(RESUME)}
            write_json(folder / CHECKSUMS, sums)
            shutil.rmtree(folder / RESUME)


def checksum(tensor: Tensor) -> str:
    """Type, shape and a 128-bit hash (XXH3) of a tensor's bits. It guards against accidents, not against
    malice, and costs no more than reading the tensor once."""
    data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    size = "x".join(map(str, tensor.shape))
    return f"{xxhash.xxh3_128_hexdigest(data)}-{str(tensor.dtype).removeprefix('torch.')}-{size}"


PART = 1 << 22
"""Numbers of a tensor that a fingerprint takes at a time."""


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Type, shape and a 64-bit hash of each tensor's bits, the same on every device. Computed where the
    tensors are and read once for all: no tensor is copied to the host."""
    if not tensors:
        return {}
    places = min(PART, max(1, *(t.numel() for t in tensors.values())))
    found = []
    factors = {d: _odd(torch.arange(places, device=d)) for d in {t.device for t in tensors.values()}}
    for tensor in tensors.values():
        odd = factors[tensor.device]
        flat = tensor.detach().contiguous().view(-1)
        bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize])
        sums = [(part * odd[: len(part)]).sum() for part in bits.split(PART)]
        total = torch.stack(sums) if sums else odd[:0]
        found.append((total * odd[: len(total)]).sum())
    device = found[0].device
    values = torch.stack([value.to(device) for value in found]).tolist()
    return {
        name: f"{value % 2**64:016x}-{str(t.dtype).removeprefix('torch.')}-{'x'.join(map(str, t.shape))}"
        for (name, t), value in zip(tensors.items(), values, strict=True)
    }


def _odd(numbers: Tensor) -> Tensor:
    """An odd 64-bit factor for each place, by two rounds of multiply and shift (modulo 2^64)."""
    mixed = (numbers + 1) * (0x9E3779B97F4A7C15 - 2**64)
    mixed = (mixed ^ (mixed >> 29)) * (0xBF58476D1CE4E5B9 - 2**64)
    return mixed ^ (mixed >> 32) | 1
