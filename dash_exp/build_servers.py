"""From config to a fleet of vLLM servers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dash_exp.config import Config
from dash_exp.errors import Fault, UserError
from dash_exp.learning.world import local_ranks
from dash_exp.sampling.member import Member, Patience
from dash_exp.sampling.placement import Processors, gpus, processors
from dash_exp.sampling.server_process import ServerSettings
from dash_exp.sampling.servers import ServerSampler

KEY_VARIABLE = "DASH_SERVER_KEY"
SHARED = "dash_shared"  # as in sampling/vllm_server.py, which imports vLLM


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
    config: Config, model: Path, *, vocabulary: int, longest: int, decode: Callable[[Sequence[int]], str],
    weights: Callable[[], Iterable[tuple[str, Tensor]]], folder: Path, event: Callable[..., None],
) -> ServerSampler:  # fmt: skip
    """Start the servers, or reach those that are named, and wait until all answer. `longest`: tokens of the
    longest prompt with its completion; `folder`: for their logs."""
    s = config.sampler
    urls = config.cluster.server_urls
    members = [Member(f"server-{n}", None, url) for n, url in enumerate(urls)]
    key = os.environ.get(KEY_VARIABLE, "") if urls else secrets.token_urlsafe(32)
    if urls and not key:
        raise UserError(Fault(KEY_VARIABLE, "is not set, but cluster.server_urls names servers",
                              "set it to the key they were started with"))  # fmt: skip
    if not urls:
        settings = _settings(config, model, vocabulary, longest)
        members = [Member(f"server-{n}", one) for n, one in enumerate(settings)]
    return ServerSampler(
        members, weights, key=key, folder=folder, vocabulary=vocabulary, max_sequences=s.max_sequences,
        dtype=getattr(torch, s.dtype), decode=decode, restarts=s.restarts,
        patience=Patience(stall_s=s.stall_s), in_order=config.learner.deterministic,
        colocated=s.colocated, event=event,
    )  # fmt: skip


def _settings(config: Config, model: Path, vocabulary: int, longest: int) -> list[ServerSettings]:
    s, count = config.sampler, torch.cuda.device_count()
    plain = ServerSettings(
        model=str(model.resolve()),
        vocabulary=vocabulary,
        max_model_len=longest,
        max_sequences=s.max_sequences,
        dtype=s.dtype,
        enforce_eager=s.enforce_eager,
        transfer=SHARED,
        sleep=s.colocated,
        kv_cache_gb=s.kv_cache_gb,
        gpu_memory_utilization=s.gpu_memory_utilization if count else None,
    )
    if count:
        learners = local_ranks(config.learner.ranks, os.environ)
        return [replace(plain, gpu=gpu) for gpu in gpus(count, s.servers, learners, s.colocated)]
    return [replace(plain, cores=cores) for cores in split(config).servers]
