"""From config to a fleet of vLLM servers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dash_exp.capacity import memory
from dash_exp.config.checks import is_loopback
from dash_exp.config.environment import KEY_VARIABLE
from dash_exp.config.model_files import config_hash, weight_files
from dash_exp.config.schema import Config
from dash_exp.errors import Fault, UserError
from dash_exp.learning.settings import local_ranks
from dash_exp.sampling.fleet import leftovers
from dash_exp.sampling.fleet.fleet import FleetSettings
from dash_exp.sampling.fleet.member import Launch, Member, Needs, RestartPolicy, ServerSettings
from dash_exp.sampling.fleet.sampler import Processors, ServerSampler, gpus, processors
from dash_exp.sampling.transfer import Transfer
from dash_exp.sampling.transfer.path import FileWeights, PathTransfer, SharedWeights
from dash_exp.train.build import learner_device, with_folder
from dash_exp.train.parts import Policy, overlapped

OWN_GPU = 0.9
"""Share of a GPU that a server has to itself."""


def split(config: Config) -> Processors:
    """Processors of servers and learner, on a machine without GPUs."""
    s = config.sampler
    available = sorted(os.sched_getaffinity(0))
    return processors(available, s.servers, s.server_threads, overlapped(config))


def make_servers(
    config: Config, policy: Policy, logs: Path, event: Callable[..., None] = lambda *what, **more: None
) -> ServerSampler:
    """Start the servers, or connect to those that are named, and wait until all answer."""
    s, named = config.sampler, bool(config.cluster.server_urls)
    key = os.environ.get(KEY_VARIABLE, "") if named else secrets.token_urlsafe(32)
    leftovers.sweep()
    transfer = make_transfer(config)
    sampler = ServerSampler(
        make_members(config, policy, transfer.engine),
        policy.weights or partial(folder_weights, policy.folder),
        transfer,
        FleetSettings(
            vocabulary=policy.vocabulary,
            max_sequences=s.max_sequences,
            decode=policy.decode,
            launch=Launch(key, logs),
            policy=RestartPolicy(s.restarts, stall_s=s.stall_s),
            in_order=config.learner.deterministic,
            colocated=s.colocated,
            tag=f"-{secrets.token_hex(4)}" if named else "",
        ),
        event,
        policy.release or (lambda: None),
    )
    if named:  # they may still hold the weights of an earlier run
        try:
            sampler.load_weights(0)
        except BaseException:
            sampler.close()
            raise
    return sampler


def make_transfer(config: Config) -> Transfer:
    """How weights reach the servers of this config."""
    device = learner_device(config)
    kind = transfer_of(config, torch.cuda.device_count(), device.type == "cuda")
    dtype = getattr(torch, config.sampler.dtype)
    if kind == "shared":
        return PathTransfer(SharedWeights(dtype))
    if kind == "file":
        assert config.cluster.weights_dir is not None
        place = Path(config.cluster.weights_dir).expanduser()
        try:
            return PathTransfer(FileWeights(place, dtype))
        except OSError as error:
            raise UserError(Fault("cluster.weights_dir", f"cannot be used: {error}")) from error
    from dash_exp.sampling.transfer.device import (
        BroadcastTransfer,
        HandleTransfer,
        Staged,
        connector,
        exporter,
    )

    if device.type != "cuda":
        raise UserError(Fault("cluster.transfer", f"{kind} is between GPUs, but the learner has none"))
    gpu = torch.device("cuda", device.index or 0)
    staged = Staged(dtype, gpu)
    if kind == "nccl":
        return BroadcastTransfer(staged, connector(gpu))
    return HandleTransfer(staged, exporter(gpu))


def learner_gpus(config: Config) -> tuple[int, ...]:
    """The GPUs here that the learner's ranks use."""
    local, device = local_ranks(config.learner.ranks, os.environ), learner_device(config)
    if device.type != "cuda":
        return ()
    if local == 1 or ":" in config.learner.device:  # which puts all ranks on one
        return (device.index or 0,)
    return tuple(range(min(local, torch.cuda.device_count())))


def make_members(config: Config, policy: Policy, engine: str) -> list[Member]:
    """The servers, not started yet. `engine`: how they receive weights."""
    s, urls, count = config.sampler, config.cluster.server_urls, torch.cuda.device_count()
    if urls:
        needs = Needs(config_hash(policy.folder), policy.vocabulary, policy.longest, s.dtype, engine)
        return [Member(f"server-{n}", None, url, needs) for n, url in enumerate(urls)]
    plain = server_settings(config, policy.folder, policy.vocabulary, policy.longest, engine)
    if count:
        taken = learner_gpus(config) if policy.release is not None else ()
        settings = [replace(plain, gpu=gpu) for gpu in gpus(count, s.servers, taken, s.colocated)]
    else:
        settings = [replace(plain, cores=cores) for cores in split(config).servers]
    return [Member(f"server-{n}", server) for n, server in enumerate(settings)]


def server_settings(
    config: Config, model: Path, vocabulary: int, longest: int, engine: str
) -> ServerSettings:
    """The settings of a server on any device."""
    s = config.sampler
    return ServerSettings(
        model=str(model.resolve()),
        vocabulary=vocabulary,
        max_model_len=longest,
        max_sequences=s.max_sequences,
        dtype=s.dtype,
        enforce_eager=s.enforce_eager,
        transfer=engine,
        sleep=s.colocated,
        kv_cache_gb=s.kv_cache_gb,
        gpu_memory_utilization=server_share(config, model),
    )


def server_share(config: Config, model: Path) -> float | None:
    """A server's share of its GPU: nearly all; of one that it shares with a learner, what that leaves while
    its activations are not there, since the server sleeps meanwhile. None without GPUs."""
    if config.sampler.gpu_memory_utilization is not None or not torch.cuda.device_count():
        return config.sampler.gpu_memory_utilization if torch.cuda.device_count() else None
    if not config.sampler.colocated:
        return OWN_GPU
    needed = memory.demand(with_folder(config, model))
    assert needed is not None, "the model's folder has a config.json"
    total = int(torch.cuda.get_device_properties(0).total_memory)
    return (needed.engine + needed.cache(total)) / total


def folder_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's weights, by name: what servers get where nothing learns."""
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)


def transfer_of(config: Config, gpus: int, learner_on_gpu: bool) -> str:
    """The kind of transfer; resolves `cluster.transfer=auto`. `gpus`: of this machine."""
    c, s = config.cluster, config.sampler
    if c.transfer != "auto":
        return c.transfer
    if c.weights_dir or any(not is_loopback(url) for url in c.server_urls):
        return "file"
    if c.server_urls or not gpus or not learner_on_gpu:
        return "shared"
    if s.colocated:
        return "ipc" if s.servers == 1 else "shared"  # the others are on other ranks' GPUs
    return "nccl"
