"""What a sampler is asked for, and what it must do. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dash_exp.types import Group, Prompt


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are drawn. Temperature 0 is greedy. `stop_ids` end a completion and belong to it.
    `top_p` below 1 is for evaluation and traces only: a training arm never cuts the distribution. The
    log-probabilities of completions are then those of the cut distribution, renormalised."""

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    top_p: float = 1.0

    @property
    def scale(self) -> float:
        """What logits are divided by; 1 when greedy, so that log-probabilities stay defined."""
        return self.temperature if self.temperature > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be answered `len(seeds)` times; `position` is its place in the step's batch."""

    position: int
    prompt: Prompt
    seeds: tuple[int, ...]


class Sampler(Protocol):
    """An engine that samples completions from the current policy.

    `stream` yields each group once, when its last completion is done, in any order; an engine that works
    beside the caller may yield None between them, so that the caller can look after something else. Weights
    change only in `load_weights`, so all groups of a step come from one policy.
    """

    policy_version: int

    def stream(
        self, requests: Sequence[Request], decoding: Decoding, at_once: int | None = None
    ) -> Iterator[Group | None]:
        """`at_once`: at most as many completions as this many groups have are on their way at the same time;
        an engine that decodes only while the caller waits for it takes as many as fit."""
        ...

    def load_weights(self, version: int) -> None:
        """Take the learner's current weights; they get this version number."""
        ...

    def close(self) -> None: ...


def arrived(stream: Iterator[Group | None]) -> Iterator[Group]:
    """The groups of a stream, for a caller that has nothing else to do."""
    return (group for group in stream if group is not None)
