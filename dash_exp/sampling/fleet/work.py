"""What is asked of servers: groups on their way, and the batch that they belong to. Torch-free."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dash_exp.sampling.fleet.answers import Answer
from dash_exp.sampling.fleet.delivery import Delivery
from dash_exp.types import Decoding, Request


@dataclass(eq=False, slots=True)
class Owed:
    """One group on its way: the request, its completions so far, how many servers were asked for it, the last
    of them since `start`, and when completions ended."""

    request: Request
    answers: list[Answer | None]
    work: float
    start: float = 0.0
    asked: int = 0
    ends: dict[int, float] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        return [i for i, answer in enumerate(self.answers) if answer is None]


@dataclass(eq=False)
class Batch:
    """What is being sampled now. `label`: what servers call the weights of `version`."""

    decoding: Decoding
    version: int
    label: str
    delivery: Delivery
    queue: deque[Owed]
    limit: int | None
    """As many completions as this many groups have are on their way at once, over all servers."""
