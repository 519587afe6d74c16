"""A learner by itself: groups of random tokens with set rewards come at once, as if they had been sampled."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from benchmarks.ours import Ours
from benchmarks.rewards import CONSTANT, VARIED, SetJudge, is_varied
from dash_exp.tasks.prompts import PromptSet
from dash_exp.types import Completion, Decoding, Group, Prompt, Request

TASK = "random"


class GivenSampler:
    """Yields a group for each request: random tokens, their lengths cycle through `lengths`."""

    def __init__(self, lengths: Sequence[int], vocabulary: int):
        self.lengths, self.vocabulary = tuple(lengths), vocabulary
        self.policy_version = 0

    def stream(
        self, requests: Sequence[Request], decoding: Decoding, at_once: int | None = None
    ) -> Iterator[Group]:
        number = 0
        for request in requests:
            completions = []
            for seed in request.seeds:
                length = self.lengths[number % len(self.lengths)]
                completions.append(self._completion(seed, length))
                number += 1
            yield Group(request.position, request.prompt, tuple(completions))

    def _completion(self, seed: int, length: int) -> Completion:
        ids = random_tokens(seed, length, self.vocabulary)
        return Completion(ids, (-10.0,) * length, "", "length", self.policy_version)

    def load_weights(self, version: int) -> None:
        self.policy_version = version

    def close(self) -> None:
        """Nothing to release."""


def random_tokens(seed: int, count: int, vocabulary: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(3, vocabulary) for _ in range(count))


def skewed(longest: int) -> list[int]:
    """Lengths with a tail, to cycle through: many short completions and a few as long as possible."""
    return [max(1, round(longest * share)) for share in (0.1, 0.2, 0.3, 0.5, 0.15, 0.25, 0.4, 1.0)]


def give(ours: Ours, *, prompt_tokens: int, lengths: Sequence[int], share: float) -> None:
    """From now on `ours` learns from given groups; in `share` of them rewards differ. The learner, its
    packing and its filter are untouched."""
    plan, vocabulary = ours.built.plan, ours.vocabulary
    prompts = tuple(
        Prompt(
            f"p{n}",
            TASK,
            "",
            random_tokens(-1 - n, prompt_tokens, vocabulary),
            VARIED if is_varied(n, share) else CONSTANT,
        )
        for n in range(plan.prompts_per_step)
    )
    ours.ask(PromptSet(TASK, prompts, 0, TASK))
    ours.change(judges={TASK: SetJudge(plan.group_size)}, sampler=GivenSampler(lengths, vocabulary))
