"""From a batch to updates: backpropagation of rounds of micro-batches, and how arms with several updates
reuse one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dash_exp.learning import losses
from dash_exp.learning.rounds import Round, balanced
from dash_exp.learning.settings import UpdateStats
from dash_exp.record.folder import Recorder
from dash_exp.record.ledger import Ledger
from dash_exp.train.parts import Parts, Plan
from dash_exp.types import AdvantagedGroup


def backpropagate(
    parts: Parts,
    ledger: Ledger,
    recorder: Recorder,
    step: int,
    ready: Round,
    references: Sequence[Tensor | None] | None = None,
    old: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Forward and backward of a round of micro-batches; returns their log-probabilities. The forward of the
    reference model, unless its result is given, is an extra one, so it counts as `logprob`."""
    if references is None:
        with ledger.phase("logprob"):
            references = parts.learner.reference_logprobs(ready)
    with ledger.phase("backprop"):
        done = parts.learner.accumulate(ready, references, old)
    for worker, batch, one in zip(parts.learner.workers, ready, done, strict=False):
        recorder.event("backprop", one.start, one.end, step=step, worker=worker, groups=batch.positions)
    return [one.logprobs for one in done]


def update(parts: Parts, ledger: Ledger, by: float) -> UpdateStats:
    with ledger.phase("optimizer"):
        done: UpdateStats = parts.learner.update(by)
    return done


def divisor(plan: Plan, parts: Parts, groups: Sequence[AdvantagedGroup]) -> float:
    """What the gradient sum of these groups is divided by: all of their completions, or the kept."""
    counted = [
        len(c.token_ids)
        for g in groups
        for c, kept in zip(g.group.completions, g.kept, strict=True)
        if kept or plan.denominator == "all"
    ]
    return losses.denominator(counted, parts.decoding.max_new_tokens, plan.aggregation)


@dataclass(slots=True)
class Scored:
    """A round of an arm with several updates, with log-probabilities that are computed once: `old` at the
    sampling weights, `references` of the initial model."""

    round: Round
    old: list[Tensor] | None = None
    references: list[Tensor | None] | None = None


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """What one update sees, and what its gradient is divided by. Filtering may have emptied it."""

    parts: tuple[Scored, ...]
    divisor: float


def mini_batches(plan: Plan, parts: Parts, groups: Sequence[AdvantagedGroup]) -> list[MiniBatch]:
    """The whole batch cut in prompt order, dropped completions included in the cut."""
    ordered = sorted(groups, key=lambda g: g.group.position)
    size, packer = plan.prompts_per_update, parts.packer
    made = []
    for first in range(0, len(ordered), size):
        own = ordered[first : first + size]
        packed = [ready for group in own for ready in packer.add(group)] + list(packer.flush())
        rounds = balanced(packed, parts.learner.width, packer.max_tokens)
        made.append(MiniBatch(tuple(Scored(one) for one in rounds), divisor(plan, parts, own)))
    return made


def repeated_updates(
    plan: Plan,
    parts: Parts,
    ledger: Ledger,
    recorder: Recorder,
    step: int,
    minis: list[MiniBatch],
    over: Callable[[], bool] = lambda: False,
) -> list[UpdateStats]:
    """One update per mini-batch, `passes` times over. Old log-probabilities are those at the sampling
    weights, with the packing of the update itself: the first mini-batch meets those weights anyway,
    the others are scored before anything moves. Stops after an update when the budget is `over`."""
    with ledger.phase("logprob"):
        for mini in minis[1:]:
            for one in mini.parts:
                one.old = parts.learner.logprobs(one.round)
        for one in (one for mini in minis for one in mini.parts):
            one.references = parts.learner.reference_logprobs(one.round)
    done: list[UpdateStats] = []
    for _ in range(plan.passes):
        for mini in minis:
            for one in mini.parts:
                logprobs = backpropagate(parts, ledger, recorder, step, one.round, one.references, one.old)
                if one.old is None:
                    one.old = logprobs
            done.append(update(parts, ledger, mini.divisor))
            if over():
                return done
    return done
