"""What a run does, and with which parts: plain values that the loop is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dash_exp.config.schema import Config
from dash_exp.learning.advantages import compares_batch
from dash_exp.learning.filters import Filter, make_filter
from dash_exp.learning.packing import Packer
from dash_exp.learning.rounds import RoundLearner
from dash_exp.record.folder import Row
from dash_exp.record.ledger import SECONDS, RunningClock
from dash_exp.sampling.protocol import Sampler, groups_at_once
from dash_exp.tasks.selection import Chooser
from dash_exp.types import Completion, Decoding
from dash_exp.verifiers.types import Judge


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does, as plain numbers. `prompts_per_call`: prompts sampled at a time (all of the
    step's in the preemptive schedule). `waves`: parts in which they are requested from `servers`, so that
    groups finish one after the other and a learner beside the sampler can begin (None: nothing is beside it).
    `batch_wide`: advantages or filter compare the groups of a batch, so the first gradient waits for the last
    group. `prompts_per_update`: a mini-batch, or the complete batch. `refill`: rounds of fresh prompts that
    replace what is dropped. `checkpoint_s`: seconds without a checkpoint after which one is due.
    `pause_after`: the step at which this attempt ends early, to be resumed."""

    seed: int
    steps: int
    prompts_per_step: int
    group_size: int
    prompts_per_call: int
    servers: int
    waves: int | None
    streaming: bool
    in_prompt_order: bool
    batch_wide: bool
    passes: int
    prompts_per_update: int
    aggregation: str
    denominator: str
    refill: int
    overlong_share: float
    mask_truncated: bool
    evaluate_every: int
    checkpoint_every: int
    checkpoint_s: float | None
    budget: float | None
    budget_unit: str = SECONDS
    filter_on_reward: bool = False
    pause_after: int | None = None

    @property
    def groups_at_once(self) -> int | None:
        """At most the completions of this many groups are in flight at a time; None: all."""
        return groups_at_once(self.prompts_per_call, self.waves or 1, self.servers)

    @property
    def updates_per_batch(self) -> int:
        """Optimizer updates per step; asserted in every step."""
        return self.passes * (self.prompts_per_step // self.prompts_per_update)


@dataclass(frozen=True, slots=True)
class Parts:
    """The concrete components of a run, chosen in train/build.py. `chooser`: draws the prompts of each step.
    `judges`: by the name of a prompt's task. `advantages`: from the rewards of groups to those of each.
    `demonstrations`: in a supervised arm the completion of each prompt, by its id."""

    chooser: Chooser
    sampler: Sampler
    decoding: Decoding
    judges: Mapping[str, Judge]
    advantages: Callable[[Sequence[Sequence[float]]], Sequence[tuple[float, ...]]]
    filter: Filter
    packer: Packer
    learner: RoundLearner
    demonstrations: Mapping[str, Completion] | None


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop calls besides: evaluation of a step; its checkpoint (whether it is the last step, and its
    row so far); progress; and which signal asked to stop, if any. `profiled`: traces a step, or does nothing.
    `clock`: of the step's ledger."""

    evaluate: Callable[[int], None]
    checkpoint: Callable[[int, bool, Row], None]
    progress: Callable[[Row], None]
    stop_signal: Callable[[], int | None]
    profiled: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext()
    clock: RunningClock = field(default_factory=RunningClock)


@dataclass(frozen=True, slots=True)
class Ending:
    """How training ended: after which step, and why (`planned`, `budget`, `signal`, `paused`)."""

    step: int
    reason: str
    signal: int | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """The model that is sampled from, as engines need it.

    `vocabulary`: tokens of the tokenizer; `longest`: tokens of the longest prompt with its completion.
    `model` gives a model to an engine in this process (`shared`: the learner's own). `weights`: what an
    engine with weights of its own copies at each sync, and `release` frees memory of a learner on its GPUs;
    both None where nothing learns.
    """

    folder: Path
    vocabulary: int
    decode: Callable[[Sequence[int]], str]
    longest: int
    model: Callable[[], Any]
    weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None
    shared: bool = True
    release: Callable[[], None] | None = None


def overlapped(config: Config) -> bool:
    """Whether the learner works while groups are still being sampled: one-update arms that compare no groups,
    with servers on devices of their own."""
    a, s = config.algorithm, config.sampler
    one_update = a.passes == 1 and a.mini_batch is None and a.source == "sampler"
    early = one_update and not is_batch_wide(config)
    return s.name == "vllm_servers" and s.streaming and not s.colocated and early


def is_batch_wide(config: Config) -> bool:
    """Whether advantages or filter compare the groups of a batch."""
    a, f = config.algorithm, config.filter
    return compares_batch(a.baseline, a.scale) or make_filter(f.name, f.threshold, f.share).batch_wide
