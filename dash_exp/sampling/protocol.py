"""What a sampler is asked for, and what it must do. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from dash_exp.types import Decoding, Group, Request


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
