"""The interface of samplers, and the settings of vLLM's engines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dash_exp.types import Decoding, Group, Request


class Sampler(Protocol):
    """An engine that samples completions from the current policy.

    `stream` yields each group once, when its last completion is done, in any order; an engine that runs
    beside the caller may yield None in between, so that the caller can do other work. Weights change only in
    `load_weights`, so all groups of a step come from one policy.
    """

    policy_version: int

    def stream(
        self, requests: Sequence[Request], decoding: Decoding, at_once: int | None = None
    ) -> Iterator[Group | None]:
        """`at_once`: at most the completions of this many groups are in flight at a time; an engine that
        decodes only while the caller waits ignores it and takes as many as fit."""
        ...

    def load_weights(self, version: int) -> None:
        """Load the learner's current weights, which get this version number."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a vLLM engine is started with, in this process or in a server. `vocabulary`: ids from there on
    only pad the output matrix and are never drawn. `kv_cache_bytes`: of the cache on a GPU; None: what is
    left of the utilization."""

    model: str
    vocabulary: int
    max_model_len: int
    max_sequences: int
    dtype: str
    enforce_eager: bool = False
    kv_cache_gb: float = 1.0
    gpu_memory_utilization: float | None = None
    kv_cache_bytes: int | None = None


def sampling_parameters(decoding: Decoding, seed: int) -> dict[str, Any]:
    """vLLM's parameters of one completion, by their names there."""
    return {
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "seed": seed,
        "logprobs": 0,
        "stop_token_ids": list(decoding.stop_ids),
        "ignore_eos": True,  # only the stop tokens above end a completion
        "detokenize": False,
    }


def arrived(stream: Iterator[Group | None]) -> Iterator[Group]:
    """The groups of a stream, for a caller without other work."""
    return (group for group in stream if group is not None)


def groups_at_once(prompts: int, waves: int, servers: int) -> int | None:
    """The `at_once` of a batch that is requested in waves: the groups of one wave, but at least one for each
    server, so that none idles. None: all at once."""
    return max(math.ceil(prompts / waves), servers) if waves > 1 else None
