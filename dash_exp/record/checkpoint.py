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
from collections.abc import Mapping
from dataclasses import dataclass
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
