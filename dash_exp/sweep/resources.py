"""What a cell asks a machine or a cluster for, from its `cluster` and `model` options. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dash_exp.config.schema import Config
from dash_exp.errors import Fault
from dash_exp.record.jobs import Resources
from dash_exp.sweep.hardware import cores_here, gpus_here


def devices(config: Config) -> tuple[int, int]:
    """GPUs of the learners, and of the servers beside them, where every one has its own."""
    if config.learner.device == "cpu":
        learners = 0
    else:  # cuda:0 puts all ranks on one
        learners = 1 if ":" in config.learner.device else config.learner.ranks
    sampler = config.sampler
    own = sampler.name == "vllm_servers" and not sampler.colocated and not config.cluster.server_urls
    return learners, sampler.servers if own and learners else 0


def resources_of(config: Config) -> Resources:
    """GPUs one each for learners and servers, unless `cluster.gpus` says otherwise; memory and hours the
    model's, unless `cluster` says otherwise. A machine without GPUs, asked for none in particular, gives
    none. Only learners beside a sampler of their own process spread over nodes."""
    cluster, model = config.cluster, config.model
    gpus = sum(devices(config)) if cluster.gpus is None else cluster.gpus
    cpus = cluster.cpus or cluster.cpus_per_gpu * max(1, gpus)
    nodes = 1
    if cluster.name == "local":
        if cluster.gpus is None and not gpus_here():
            gpus = 0
        cpus = cluster.cpus or cluster.threads or min(cpus, cores_here())
    elif spreads(config, gpus):
        nodes = math.ceil(gpus / cluster.gpus_per_node)
    return Resources(
        gpus=gpus,
        cpus=cpus,
        memory_gb=math.ceil(cluster.memory_gb or model.memory_gb),
        minutes=math.ceil(60 * (cluster.hours or model.hours)),
        nodes=nodes,
        tasks=config.learner.ranks if nodes > 1 else 1,
    )


def spreads(config: Config, gpus: int) -> bool:
    """Whether a cell of so many GPUs takes several nodes: learners can, servers are where the run is."""
    return gpus > config.cluster.gpus_per_node and config.sampler.name != "vllm_servers"


def resource_faults(config: Config) -> Iterator[Fault]:
    """What no machine of this kind can give. Whether a cluster has it is asked there (slurm.py)."""
    cluster, asked = config.cluster, resources_of(config)
    learners, servers = devices(config)
    needed, per_node = learners + servers, cluster.gpus_per_node
    told = f"{learners} for its learners" + (f" and {servers} for its servers" if servers else "")
    fewer = "lower learner.ranks or sampler.servers"
    if cluster.gpus and cluster.gpus < needed:
        what = f"got {cluster.gpus}, but the cell needs {needed} GPUs: {told}"
        yield Fault("cluster.gpus", what, f"leave it out, or {fewer}")
    if cluster.name == "local":
        here = len(gpus_here())
        if asked.gpus > here:
            what = f"the cell needs {asked.gpus} GPUs, this machine has {here}"
            yield Fault("cluster.gpus", what, f"choose cluster=slurm, or {fewer}")
    elif asked.gpus > per_node and not spreads(config, asked.gpus):
        what = f"got {per_node}, but the cell needs {asked.gpus} GPUs on one node: {told}"
        yield Fault("cluster.gpus_per_node", what, f"raise it, or {fewer}")
    elif config.learner.ranks % asked.nodes or asked.gpus % asked.nodes:
        what = f"{asked.nodes} nodes of {per_node} GPUs cannot share {config.learner.ranks} learners evenly"
        yield Fault("learner.ranks", what, f"choose a multiple of {per_node}")
