"""What a run does, and with which parts: plain values that the loop is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dash_exp.evaluation.metrics import Judge
from dash_exp.learning.distributed.parallel import ParallelLearner
from dash_exp.learning.filters import Filter
from dash_exp.learning.packing import Packer
from dash_exp.record.folder import Row
from dash_exp.sampling.protocol import Sampler, groups_at_once
from dash_exp.tasks.prompts import PromptSet
from dash_exp.types import Completion, Decoding


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does, as plain numbers. `prompts_per_call`: prompts sampled at a time (all of the
    step's in the preemptive schedule). `waves`: parts in which they are asked for over `servers`, so that
    groups finish one after the other and a learner beside the sampler can begin (None: nothing is beside it).
    `prompts_per_update`: a mini-batch, or the whole batch."""

    seed: int
    steps: int
    prompts_per_step: int
    group_size: int
    prompts_per_call: int
    servers: int
    waves: int | None
    streaming: bool
    in_prompt_order: bool
    passes: int
    prompts_per_update: int
    aggregation: str
    denominator: str
    evaluate_every: int
    checkpoint_every: int
    budget_s: float | None

    @property
    def groups_at_once(self) -> int | None:
        """As many completions as this many groups have may be on their way at a time; None: all."""
        return groups_at_once(self.prompts_per_call, self.waves or 1, self.servers)

    @property
    def updates_per_batch(self) -> int:
        """What the arm declares; asserted in every step."""
        return self.passes * (self.prompts_per_step // self.prompts_per_update)


@dataclass(frozen=True, slots=True)
class Parts:
    """The concrete components of a run, chosen in train/build.py. `judges`: by the name of a prompt's task.
    `filter_advantages`: what the filter looks at, in one unit for all arms. `demonstrations`: in a
    supervised arm the completion of each prompt, by its id."""

    prompts: PromptSet
    sampler: Sampler
    decoding: Decoding
    judges: Mapping[str, Judge]
    advantages: Callable[[Sequence[float]], tuple[float, ...]]
    keep: Filter
    packer: Packer
    learner: ParallelLearner
    filter_advantages: Callable[[Sequence[float]], tuple[float, ...]]
    demonstrations: Mapping[str, Completion] | None


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop calls besides: evaluation and checkpoint of a step (whether it is the last
    one, and the step's row so far), progress, and whether a signal asked to stop."""

    evaluate: Callable[[int], None]
    checkpoint: Callable[[int, bool, Row], None]
    progress: Callable[[Row], None]
    stop_signal: Callable[[], int | None]


@dataclass(frozen=True, slots=True)
class Ending:
    """How training ended: after which step, and why (`planned`, `budget`, `signal`)."""

    step: int
    reason: str
    signal: int | None = None
