"""What a cell asks a machine or a cluster for, which machine that is, and the settings of a launch: `run`,
`tracking`, `cluster` and `paths`, which are not part of a cell."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dash_exp.capacity.memory import card_bytes
from dash_exp.config.compose import conf_dir
from dash_exp.config.overrides import quoted
from dash_exp.config.schema import ACTIONS, PUSH_TO, ClusterConfig, Config, TrackingConfig, is_action
from dash_exp.errors import Fault
from dash_exp.record.manifest import Resources
from dash_exp.sweep.spec import Combination, key_of
from dash_exp.sweep.worker import VISIBLE_GPUS, nvidia_smi, threads_each

T = TypeVar("T")
CLUSTER_GPU_GB = 80
"""A cluster's GPUs are taken to have so much memory."""
Settings = Mapping[str, str]
"""Value by dotted key, as text that both Hydra and OmegaConf's dotlists read."""

OF_A_CELL = frozenset(
    f"cluster.{name}" for name in ("gpus", "cpus", "gpus_per_node", "cpus_per_gpu", "memory_gb", "hours")
)
"""What cells of one sweep may ask for differently."""
NOT_REPEATED = frozenset({"run.dir", "run.force", "run.sweep", "run.partner", "run.command"})
"""Settings of a single launch, not of every start."""


# What a cell asks for -----------------------------------------------------------------------------


def devices(config: Config) -> tuple[int, int]:
    """GPUs of the learners, and of servers that have their own."""
    if config.learner.device == "cpu":
        learners = 0
    else:  # cuda:0 puts all ranks on one
        learners = 1 if ":" in config.learner.device else config.learner.ranks
    sampler = config.sampler
    own = sampler.name == "vllm_servers" and not sampler.colocated and not config.cluster.server_urls
    return learners, sampler.servers if own and learners else 0


def resources_of(config: Config) -> Resources:
    """One GPU for each learner and server, memory and hours of the model, unless `cluster` sets others. A
    machine without GPUs gives none, unless `cluster.gpus` asks for some. Only learners whose sampler is in
    their own process can take several nodes."""
    cluster, model = config.cluster, config.model
    gpus = sum(devices(config)) if cluster.gpus is None else cluster.gpus
    cpus = cluster.cpus or cluster.cpus_per_gpu * max(1, gpus)
    nodes = 1
    if cluster.name == "local":
        if cluster.gpus is None and not gpus_here():
            gpus = 0
        cpus = cluster.cpus or cluster.threads or min(cpus, cores_here())
    elif _takes_nodes(config, gpus):
        nodes = math.ceil(gpus / cluster.gpus_per_node)
    return Resources(
        gpus=gpus,
        cpus=cpus,
        memory_gb=math.ceil(cluster.memory_gb or model.memory_gb),
        minutes=math.ceil(60 * (cluster.hours or model.hours)),
        nodes=nodes,
        tasks=config.learner.ranks if nodes > 1 else 1,
    )


def _takes_nodes(config: Config, gpus: int) -> bool:
    """Whether a cell of so many GPUs takes several nodes: servers run on the node of the run."""
    return gpus > config.cluster.gpus_per_node and config.sampler.name != "vllm_servers"


def resource_faults(config: Config) -> Iterator[Fault]:
    """What no machine of this kind can give. Whether a cluster has it is asked there (slurm/arrays.py)."""
    cluster, asked = config.cluster, resources_of(config)
    learners, servers = devices(config)
    needed, per_node = learners + servers, cluster.gpus_per_node
    uses = f"{learners} for its learners" + (f" and {servers} for its servers" if servers else "")
    fewer = "lower learner.ranks or sampler.servers"
    if cluster.gpus and cluster.gpus < needed:
        what = f"got {cluster.gpus}, but the cell needs {needed} GPUs: {uses}"
        yield Fault("cluster.gpus", what, f"leave it out, or {fewer}")
    if cluster.name == "local":
        here = len(gpus_here())
        if asked.gpus > here:
            what = f"the cell needs {asked.gpus} GPUs, this machine has {here}"
            yield Fault("cluster.gpus", what, f"choose cluster=slurm, or {fewer}")
    elif asked.gpus > per_node and not _takes_nodes(config, asked.gpus):
        what = f"got {per_node}, but the cell needs {asked.gpus} GPUs on one node: {uses}"
        yield Fault("cluster.gpus_per_node", what, f"raise it, or {fewer}")
    elif config.learner.ranks % asked.nodes or asked.gpus % asked.nodes:
        what = f"{asked.nodes} nodes of {per_node} GPUs cannot share {config.learner.ranks} learners evenly"
        yield Fault("learner.ranks", what, f"choose a multiple of {per_node}")


def card_of(config: Config) -> int | None:
    """Bytes of a GPU that a cell may use; None where it has none."""
    on_gpu = resources_of(config).gpus and config.learner.device != "cpu"
    return card_of_cluster(config.cluster) if on_gpu else None


def card_of_cluster(cluster: ClusterConfig) -> int | None:
    """Bytes that a cell may use of a GPU of this machine or cluster; None where there is none."""
    if cluster.gpu_gb is None and cluster.name == "local":
        sizes = nvidia_smi("memory.total")
        return int(float(sizes[0].split()[0]) * 2**20 / cluster.cells_per_gpu) if sizes else None
    return card_bytes(cluster.gpu_gb or CLUSTER_GPU_GB, cluster.cells_per_gpu)


# The machine --------------------------------------------------------------------------------------


def hardware_label(config: Config) -> str:
    """A name for the kind of machine that a cell runs on: SLURM's partition and constraint as given; on this
    machine the first GPU, or the processor and how many of its cores the cell has."""
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
    """The kernel's name for the processor, else its architecture."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in names if name), platform.machine())


@functools.cache
def gpus_here() -> tuple[str, ...]:
    """Names of the GPUs that a run here would see; none where nvidia-smi is missing or fails."""
    visible, names = os.environ.get(VISIBLE_GPUS), nvidia_smi("name")
    return names if visible is None else names[: len([one for one in visible.split(",") if one.strip()])]


# Settings of a launch -----------------------------------------------------------------------------


def is_setting(text: str) -> bool:
    """Whether an override sets something of a launch, not of a cell."""
    return is_action(key_of(text))


def split(overrides: Iterable[str]) -> tuple[Combination, Combination]:
    """The overrides of cells, and those of the launch. Hydra's own are left out, except hydra.searchpath."""
    kept = [
        text
        for text in overrides
        if not key_of(text).startswith(("hydra.", "hydra/")) or key_of(text) == "hydra.searchpath"
    ]
    return tuple(t for t in kept if not is_setting(t)), tuple(t for t in kept if is_setting(t))


def settings_of(config: Config) -> Settings:
    """Everything a config sets of a launch and of every start."""
    groups = {group: asdict(getattr(config, group)) for group in ACTIONS}
    groups["checkpoint"] = {"push_to": config.checkpoint.push_to}
    return {key: text for key, text in _leaves(groups, "") if key not in NOT_REPEATED}


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, str) and quoted(value) == value:
            yield f"{prefix}{name}", value
        else:
            yield f"{prefix}{name}", json.dumps(value)


def differing_faults(found: Sequence[Settings]) -> Iterator[Fault]:
    """A sweep has one value for what is not part of its cells, except for what they ask a cluster for."""
    for key in found[0] if found else ():
        values = sorted({one[key] for one in found if key in one})
        if len(values) > 1 and key not in OF_A_CELL:
            hint = "it is no part of a cell, so the cells would be the same: give it one value"
            yield Fault(key, f"has several values: {', '.join(values[:4])}", hint)
    owner, slash, _ = (found[0] if found else {}).get(PUSH_TO, "").partition("/")
    if slash and len(found) > 1:
        what = f"is one repository for {len(found)} cells, and each would replace the one before"
        yield Fault(PUSH_TO, what, f"name its owner alone, and each cell gets its own: {PUSH_TO}={owner}")


def common_actions(found: Sequence[Settings], defaults: Settings) -> Combination:
    """What every cell is started with: values that all cells share and that are not the defaults."""
    return tuple(
        f"{key}={value}"
        for key, value in (found[0].items() if found else ())
        if value != defaults.get(key) and all(one.get(key) == value for one in found)
    )


def cluster_of(actions: Sequence[str]) -> ClusterConfig:
    """The `cluster` settings that a plan's actions make. Raises omegaconf errors for a wrong one."""
    return _group("cluster", "local", ClusterConfig, actions)


def tracking_of(actions: Sequence[str]) -> TrackingConfig:
    return _group("tracking", "none", TrackingConfig, actions)


def _group(name: str, default: str, kind: type[T], actions: Sequence[str]) -> T:
    from omegaconf import OmegaConf

    defaults = yaml.safe_load((conf_dir() / name / f"{default}.yaml").read_text(encoding="utf-8"))
    given = OmegaConf.from_dotlist([text for text in actions if text.startswith(f"{name}.")])
    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), defaults, given.get(name, {})))
    assert isinstance(made, kind)
    return made


def part_of_machine(cluster: ClusterConfig, n_jobs: int) -> tuple[str, ...]:
    """The override that gives each of `n_jobs` cells its share of this machine's processors, unless the user
    has set one. It is planned with, since the label of a machine includes it."""
    if n_jobs <= 1 or cluster.name != "local" or cluster.threads is not None:
        return ()
    return (f"cluster.threads={threads_each(n_jobs)}",)
