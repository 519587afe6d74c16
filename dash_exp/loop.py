"""The training loop: the one file that knows the order of things.

prompts -> sampler.stream -> Group -> verifier -> ScoredGroup -> advantages, filter
        -> AdvantagedGroup -> micro-batches -> learner.accumulate ... learner.update
        -> sampler.load_weights -> recorder
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dash_exp.errors import Fault, UserError
from dash_exp.evaluation import Judge
from dash_exp.learning import losses
from dash_exp.learning.filters import Filter
from dash_exp.learning.learner import Learner, UpdateStats
from dash_exp.learning.packing import MicroBatch, Packer
from dash_exp.ledger import Ledger
from dash_exp.metrics import BatchFacts, sample_rows, step_row
from dash_exp.record import Recorder, Row, timed_event
from dash_exp.sampling.protocol import Decoding, Request, Sampler
from dash_exp.tasks.prompts import PromptSet, batch, requests
from dash_exp.types import AdvantagedGroup, Group, Score, ScoredGroup


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does, as plain numbers. `prompts_per_call`: prompts sampled at a time (all of the
    step's in the preemptive schedule)."""

    seed: int
    steps: int
    prompts_per_step: int
    group_size: int
    prompts_per_call: int
    streaming: bool
    in_prompt_order: bool
    passes: int
    aggregation: str
    denominator: str
    evaluate_every: int
    checkpoint_every: int
    budget_s: float | None


@dataclass(frozen=True, slots=True)
class Parts:
    """The concrete components of a run, chosen in build.py. `judges`: by the name of a prompt's task."""

    prompts: PromptSet
    sampler: Sampler
    decoding: Decoding
    judges: Mapping[str, Judge]
    advantages: Callable[[Sequence[float]], tuple[float, ...]]
    keep: Filter
    packer: Packer
    learner: Learner


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


def train(
    plan: Plan, parts: Parts, hooks: Hooks, recorder: Recorder, *, done: int, spent_s: float
) -> Ending:  # fmt: skip
    """Run the steps after `done`; `spent_s` seconds of training time were used by them."""
    ledger = Ledger()
    budget = math.inf if plan.budget_s is None else plan.budget_s
    if done and spent_s >= budget:
        return Ending(done, "budget")
    for step in range(done + 1, plan.steps + 1):
        facts = train_step(plan, parts, ledger, recorder, step)
        refuse_hopeless(step, facts)
        recorder.append("samples", sample_rows(step, facts.groups))
        signal = hooks.stop_signal()
        if signal is None and evaluation_due(plan, step):
            with ledger.phase("evaluate"):
                hooks.evaluate(step)
        over = spent_s + training_seconds(*ledger.so_far()) >= budget
        if checkpoint_due(plan, step) or over or signal is not None:
            with ledger.phase("checkpoint"):
                row = step_row(step, facts, *ledger.so_far(), ledger.overlap_s())
                hooks.checkpoint(step, step == plan.steps, row)
        row = step_row(step, facts, *ledger.so_far(), ledger.overlap_s())
        spent_s += training_seconds(*ledger.close_step())
        recorder.append("steps", [row])
        recorder.status("running", step)
        hooks.progress(row)
        if signal is not None:
            return Ending(step, "signal", signal)
        if over and step < plan.steps:
            return Ending(step, "budget")
    return Ending(plan.steps, "planned")


def evaluation_due(plan: Plan, step: int) -> bool:
    """Whether a step within the run ends with an evaluation (the last one has its own)."""
    return plan.evaluate_every > 0 and step % plan.evaluate_every == 0 and 0 < step < plan.steps


def checkpoint_due(plan: Plan, step: int) -> bool:
    every = plan.checkpoint_every
    return step == plan.steps or (every > 0 and step % every == 0)


def training_seconds(wall: float, seconds: Mapping[str, float]) -> float:
    """Seconds that count against a budget: neither evaluation nor checkpoints."""
    return wall - seconds["evaluate"] - seconds["checkpoint"]


def refuse_hopeless(step: int, facts: BatchFacts) -> None:
    """Stop where going on would only record nonsense."""
    scores = [score for _, score, _, _ in facts.samples()]
    if all(s.outcome == "verifier_error" for s in scores):
        fault = Fault("verifier", f"every verdict of step {step} failed: {scores[0].detail}",
                      "nothing was learned from it; mend the cause and run the same command")  # fmt: skip
        raise UserError(fault, "what was recorded is kept")
    if facts.updates and all(not u.finite for u in facts.updates):
        raise FloatingPointError(f"the gradient of step {step} is infinite or not a number")


def train_step(plan: Plan, parts: Parts, ledger: Ledger, recorder: Recorder, step: int) -> BatchFacts:
    """Sample one batch, learn from it, and hand the new weights to the sampler."""
    chosen = batch(parts.prompts, plan.seed, step, plan.prompts_per_step)
    asked = requests(chosen, plan.seed, "sample", step, plan.group_size)
    groups: list[AdvantagedGroup] = []
    batches: list[MicroBatch] = []

    def take(ready: MicroBatch) -> None:
        """One-update arms backpropagate a micro-batch as soon as it is full and forget it; arms with
        several updates wait for the whole batch."""
        if plan.passes > 1:
            batches.append(ready)
        else:
            backpropagate(parts, ledger, recorder, step, ready, None)

    for first in range(0, len(asked), plan.prompts_per_call):
        call = asked[first : first + plan.prompts_per_call]
        for group in advantaged_groups(plan, parts, ledger, recorder, step, call):
            groups.append(group)
            for ready in parts.packer.add(group):
                take(ready)
        for ready in parts.packer.flush():
            take(ready)
    updates = update(plan, parts, ledger, recorder, step, groups, batches)
    with ledger.phase("sync"), timed_event(recorder, "sync", step=step, worker="learner"):
        parts.sampler.load_weights(step)
    sums = parts.learner.take_sums()
    assert len(updates) == plan.passes, f"{len(updates)} updates in a batch of an arm with {plan.passes}"
    return BatchFacts(tuple(groups), tuple(updates), sums, parts.learner.updates)


def advantaged_groups(
    plan: Plan, parts: Parts, ledger: Ledger, recorder: Recorder, step: int, call: list[Request]
) -> Iterator[AdvantagedGroup]:
    """Sample, judge and weigh the prompts of one call, group by group as they finish (in prompt order
    if the plan says so; all at the end if it does not stream)."""
    groups = sampled_groups(parts, ledger, recorder, step, call)
    scored = judged_groups(parts, ledger, recorder, step, groups)
    if plan.in_prompt_order:
        scored = in_prompt_order(scored, call[0].position)
    weighed = (weigh(parts, group) for group in scored)
    return weighed if plan.streaming else iter(list(weighed))


def sampled_groups(
    parts: Parts, ledger: Ledger, recorder: Recorder, step: int, call: list[Request]
) -> Iterator[Group]:
    start = time.time()
    expected = parts.sampler.policy_version
    stream = parts.sampler.stream(call, parts.decoding)
    for group in ledger.waiting("sample", iter(stream)):
        assert all(c.policy_version == expected for c in group.completions), "off-policy sample"
        recorder.event("sample", start, time.time(), step=step, worker="sampler", group=group.position)
        yield group


def judged_groups(
    parts: Parts, ledger: Ledger, recorder: Recorder, step: int, groups: Iterator[Group]
) -> Iterator[ScoredGroup]:
    """Judge while sampling goes on. Verdicts are taken in the order in which groups came, so how fast
    a verifier is never changes the order of anything."""
    waiting: deque[tuple[Group, float, list[Future[Score]], list[float]]] = deque()

    def take() -> ScoredGroup:
        group, start, futures, ends = waiting.popleft()
        with ledger.phase("verify"):
            scores = tuple(f.result() for f in futures)
        end = max(ends, default=start)
        ledger.beside(start, end)
        recorder.event("judge", start, end, step=step, worker="verifier", group=group.position)
        return ScoredGroup(group, scores)

    for group in groups:
        start, ends, judge = time.time(), list[float](), parts.judges[group.prompt.task]
        with ledger.phase("verify"):
            futures = [judge.submit(c.text, group.prompt.answer) for c in group.completions]
        for future in futures:
            future.add_done_callback(partial(_note_end, ends))
        waiting.append((group, start, futures, ends))
        while waiting and all(f.done() for f in waiting[0][2]):
            yield take()
    while waiting:
        yield take()


def _note_end(ends: list[float], _: Future[Score]) -> None:
    ends.append(time.time())


def in_prompt_order(groups: Iterator[ScoredGroup], first: int) -> Iterator[ScoredGroup]:
    """Hold back groups that finished before an earlier one."""
    held: dict[int, ScoredGroup] = {}
    position = first
    for scored in groups:
        held[scored.group.position] = scored
        while position in held:
            yield held.pop(position)
            position += 1
    assert not held, f"groups {sorted(held)} came without an earlier one"


def weigh(parts: Parts, scored: ScoredGroup) -> AdvantagedGroup:
    """Advantages, computed once, then the filter."""
    advantages = parts.advantages([s.value for s in scored.scores])
    return AdvantagedGroup(scored, advantages, parts.keep(advantages))


def backpropagate(
    parts: Parts, ledger: Ledger, recorder: Recorder, step: int,
    ready: MicroBatch, old: Tensor | None,
) -> Tensor:  # fmt: skip
    """Forward and backward of one micro-batch; returns its log-probabilities. The forward of the
    reference model is an extra one, so it counts as `logprob`."""
    with ledger.phase("logprob"):
        reference = parts.learner.reference_logprobs(ready)
    with (
        ledger.phase("backprop"),
        timed_event(recorder, "backprop", step=step, worker="learner", groups=ready.positions),
    ):
        return parts.learner.accumulate(ready, reference, old)


def update(
    plan: Plan, parts: Parts, ledger: Ledger, recorder: Recorder, step: int,
    groups: list[AdvantagedGroup], batches: list[MicroBatch],
) -> list[UpdateStats]:  # fmt: skip
    """The updates of a batch: one, or `passes` over all of it, where the first pass's
    log-probabilities are the old ones of the later passes."""
    counted = [
        len(c.token_ids)
        for g in groups
        for c, kept in zip(g.group.completions, g.kept, strict=True)
        if kept or plan.denominator == "all"
    ]
    divisor = losses.denominator(counted, parts.decoding.max_new_tokens, plan.aggregation)
    done: list[UpdateStats] = []
    old: list[Tensor | None] = [None] * len(batches)
    for number in range(plan.passes):
        for place, ready in enumerate(batches):
            logprobs = backpropagate(parts, ledger, recorder, step, ready, old[place])
            if number == 0:
                old[place] = logprobs
        with ledger.phase("optimizer"):
            done.append(parts.learner.update(divisor))
    return done
