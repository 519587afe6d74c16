"""From config to a fleet of vLLM servers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dash_exp.config.checks import is_loopback
from dash_exp.config.schema import Config
from dash_exp.errors import Fault, UserError
from dash_exp.learning.distributed.member import device_of
from dash_exp.learning.distributed.world import local_ranks
from dash_exp.sampling.fleet.fleet import FleetSettings
from dash_exp.sampling.fleet.member import (
    KEY_VARIABLE,
    Launch,
    Member,
    Needs,
    RestartPolicy,
    ServerSettings,
)
from dash_exp.sampling.fleet.sampler import Processors, ServerSampler, gpus, processors
from dash_exp.sampling.transfer import Transfer
from dash_exp.sampling.transfer.path import FileWeights, PathTransfer, SharedWeights

Named = Iterable[tuple[str, Tensor]]


def overlapped(config: Config) -> bool:
    """Whether the learner works while groups are still being sampled: one-update arms with servers on
    devices of their own."""
    a, s = config.algorithm, config.sampler
    one_update = a.passes == 1 and a.mini_batch is None and a.source == "sampler"
    return s.name == "vllm_servers" and s.streaming and not s.colocated and one_update


def split(config: Config) -> Processors:
    """Processors of servers and learner, on a machine without GPUs."""
    s = config.sampler
    available = sorted(os.sched_getaffinity(0))
    return processors(available, s.servers, s.server_threads, overlapped(config))


def make_servers(
    config: Config,
    model: Path,
    *,
    vocabulary: int,
    longest: int,
    decode: Callable[[Sequence[int]], str],
    weights: Callable[[], Named],
    folder: Path,
    event: Callable[..., None],
    release: Callable[[], None] | None = None,
) -> ServerSampler:
    """Start the servers, or reach those that are named, and wait until all answer. `longest`: tokens of the
    longest prompt with its completion; `folder`: for their logs; `release`: of a learner's memory on its
    GPUs, None where nothing learns."""
    s, named = config.sampler, bool(config.cluster.server_urls)
    key = os.environ.get(KEY_VARIABLE, "") if named else secrets.token_urlsafe(32)
    if not key:
        raise UserError(
            Fault(
                KEY_VARIABLE,
                "is not set, but cluster.server_urls names servers",
                "set it to the key they were started with",
            )
        )
    transfer = make_transfer(config)
    sampler = ServerSampler(
        make_members(config, model, vocabulary, longest, transfer.engine, release is not None),
        or_of_folder(weights, model),
        transfer,
        FleetSettings(
            vocabulary=vocabulary,
            max_sequences=s.max_sequences,
            decode=decode,
            launch=Launch(key, folder),
            policy=RestartPolicy(s.restarts, stall_s=s.stall_s),
            in_order=config.learner.deterministic,
            colocated=s.colocated,
            tag=f"-{secrets.token_hex(4)}" if named else "",
        ),
        event,
        release or (lambda: None),
    )
    if named:  # whatever a run before this one has left in them
        try:
            sampler.load_weights(0)
        except BaseException:
            sampler.close()
            raise
    return sampler


def make_transfer(config: Config) -> Transfer:
    """The way weights take to the servers of this config."""
    local = local_ranks(config.learner.ranks, os.environ)
    device = device_of(config.learner.device, 0 if local > 1 else None)
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
    local = local_ranks(config.learner.ranks, os.environ)
    device = device_of(config.learner.device, 0 if local > 1 else None)
    if device.type != "cuda":
        return ()
    if local == 1 or ":" in config.learner.device:  # which puts all ranks on one
        return (device.index or 0,)
    return tuple(range(min(local, torch.cuda.device_count())))


def make_members(
    config: Config, model: Path, vocabulary: int, longest: int, engine: str, learns: bool
) -> list[Member]:
    """The servers, not started yet. `learns`: something besides them needs GPUs."""
    s, urls, count = config.sampler, config.cluster.server_urls, torch.cuda.device_count()
    if urls:
        needs = Needs(vocabulary, longest, s.dtype, engine)
        return [Member(f"server-{n}", None, url, needs) for n, url in enumerate(urls)]
    plain = server_settings(config, model, vocabulary, longest, engine)
    if count:
        taken = learner_gpus(config) if learns else ()
        settings = [replace(plain, gpu=gpu) for gpu in gpus(count, s.servers, taken, s.colocated)]
    else:
        settings = [replace(plain, cores=cores) for cores in split(config).servers]
    return [Member(f"server-{n}", one) for n, one in enumerate(settings)]


def server_settings(
    config: Config, model: Path, vocabulary: int, longest: int, engine: str
) -> ServerSettings:
    """Of a server anywhere."""
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
        gpu_memory_utilization=s.gpu_memory_utilization if torch.cuda.device_count() else None,
    )


def or_of_folder(weights: Callable[[], Named], model: Path) -> Callable[[], Named]:
    """The learner's weights; those of the model's folder where nothing learns."""

    def named() -> Iterator[tuple[str, Tensor]]:
        count = 0
        for count, pair in enumerate(weights(), 1):  # noqa: B007
            yield pair
        if count == 0:
            yield from weights_in(model)

    return named


def weights_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files, by name."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)


def transfer_of(config: Config, gpus: int, learner_on_gpu: bool) -> str:
    """The way that `cluster.transfer=auto` takes. `gpus`: of this machine."""
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
