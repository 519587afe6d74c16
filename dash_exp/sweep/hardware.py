"""What machine this is, or which one is asked for: for cells whose result is a time. Torch-free."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from pathlib import Path

from dash_exp.config.schema import Config

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")


def hardware_label(config: Config) -> str:
    """A name for the kind of machine that a cell of this config runs on: SLURM's partition and constraint,
    as given; here the first GPU, or the processor and how many of its cores the cell has."""
    cluster = config.cluster
    if cluster.name == "slurm":
        return slug("-".join(part for part in (cluster.partition, cluster.constraint) if part) or "slurm")
    gpus = gpus_here()
    if gpus and config.learner.device != "cpu":
        return slug(gpus[0])
    return f"{slug(processor())}-{cluster.threads or cores_here()}cores"


def slug(text: str) -> str:
    """Text as one word that needs no quotes."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text).strip("_.+-") or "unnamed"


def cores_here() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as the kernel has it, else the architecture's."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in named if name), platform.machine())


@functools.cache
def gpus_here() -> tuple[str, ...]:
    """Names of the GPUs that a run here would see; none where nvidia-smi is missing or says nothing."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    names = tuple(line.strip() for line in done.stdout.splitlines() if line.strip())
    if done.returncode != 0:
        return ()
    return names if visible is None else names[: len([one for one in visible.split(",") if one.strip()])]
