"""Training, from prompts to new weights, in one file.

    prompts -> sampler.stream -> Group -> verifier -> ScoredGroup -> advantages, filter -> AdvantagedGroup
            -> rounds of micro-batches -> learner.accumulate ... learner.update -> sampler.load_weights

`train` is the loop, `train_step` one step of it; the rest of the file is what a step calls, in order.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from operator import add

from torch import Tensor

from dash_exp.errors import Fault, UserError
from dash_exp.learning import losses
from dash_exp.learning.advantages import overlong_penalty
from dash_exp.learning.rounds import Round, Rounds, balanced
from dash_exp.learning.settings import UpdateStats
from dash_exp.record.folder import Recorder, timed_event
from dash_exp.record.ledger import SECONDS, Budget, Ledger
from dash_exp.record.metrics import BatchFacts, batch_values, learner_values, sample_rows, step_row
from dash_exp.seeding import seed_for
from dash_exp.tasks.prompts import requests
from dash_exp.train.parts import Ending, Hooks, Parts, Plan
from dash_exp.types import AdvantagedGroup, Completion, Group, Origin, Request, Score, ScoredGroup
from dash_exp.verifiers.types import Facts

LEAST_SHARE = 1 / 8
"""Of completions that are taken to be kept when fresh prompts are counted."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What every stage of a step works with. `out_of_time`: whether the run's time budget is used up."""

    plan: Plan
    parts: Parts
    ledger: Ledger
    recorder: Recorder
    step: int
    out_of_time: Callable[[], bool] = lambda: False


def train(plan: Plan, parts: Parts, hooks: Hooks, recorder: Recorder, *, done: int, spent: float) -> Ending:
    """Run the steps after step `done`, by which `spent` of the budget was used."""
    ledger = Ledger(hooks.clock)
    budget = Budget(plan.budget, spent, ledger, plan.budget_unit)
    if 0 < done < plan.steps and plan.budget is not None and spent >= plan.budget:
        return Ending(done, "budget")
    if is_paused(plan, done):
        return Ending(done, "paused")
    saved_at = hooks.clock()
    for step in range(done + 1, plan.steps + 1):
        with hooks.profiled(step):
            facts = train_step(StepContext(plan, parts, ledger, recorder, step, budget.over))
        check_step(step, facts)
        if budget.unit != SECONDS:
            budget.count({**batch_values(facts), **learner_values(facts)})
        recorder.append("samples", sample_rows(step, facts.groups))
        signal = hooks.stop_signal()
        if signal is None and evaluation_due(plan, step):
            with ledger.phase("evaluate"):
                hooks.evaluate(step)
        note_suspensions(hooks, ledger, recorder, step)
        incomplete = len(facts.updates) < plan.updates_per_batch  # the budget ended between two updates
        out_of_time = incomplete or budget.over()
        due = checkpoint_due(plan, step, hooks.clock() - saved_at)
        if due or out_of_time or signal is not None or is_paused(plan, step):
            with ledger.phase("checkpoint"):
                row = step_row(step, facts, *ledger.so_far(), ledger.overlap_s())
                hooks.checkpoint(step, step == plan.steps, row)
            saved_at = hooks.clock()
        overlap, suspended = ledger.overlap_s(), ledger.suspended_s()
        row = step_row(step, facts, *budget.close_step(), overlap)
        row |= {"time/suspended_s": suspended} if suspended else {}
        recorder.append("steps", [row])
        recorder.status("running", step)
        hooks.progress(row)
        if signal is not None:
            return Ending(step, "signal", signal)
        if incomplete or (out_of_time and step < plan.steps):
            return Ending(step, "budget")
        if is_paused(plan, step):
            return Ending(step, "paused")
    return Ending(plan.steps, "planned")


def note_suspensions(hooks: Hooks, ledger: Ledger, recorder: Recorder, step: int) -> None:
    """Record apart when this process was suspended; the ledger's clock leaves that time out."""
    gaps = hooks.clock.take_gaps()
    ledger.suspended(gaps)
    for start, end in gaps:
        recorder.event("suspended", start, end, step=step, worker="main")


def train_step(ctx: StepContext) -> BatchFacts:
    """Sample one batch, learn from it, and send the new weights to the sampler.

    An arm with one update per batch backpropagates a round of micro-batches as soon as it is full, while
    other groups are still being sampled: gradients add up, and weights change in `update` only, so the step
    stays on-policy. An arm with several updates, or one that compares groups, needs the complete batch first.
    """
    plan, parts = ctx.plan, ctx.parts
    groups: list[AdvantagedGroup] = []
    rounds = Rounds(parts.packer, parts.learner.width)
    one_update = plan.updates_per_batch == 1

    for arriving in arrivals(ctx, groups):
        for group in arriving:
            if group is not None:
                groups.append(group)
            if (
                one_update
            ):  # no group has finished: what is pending becomes a round, so that ranks do not wait
                for ready in rounds.flush() if group is None else rounds.add(group):
                    backpropagate(ctx, ready)
        for ready in rounds.flush():
            backpropagate(ctx, ready)

    if one_update:
        updates = [update(ctx, denominator(ctx, groups))]
    else:
        updates = repeated_updates(ctx, mini_batches(ctx, groups))
    assert len(updates) == plan.updates_per_batch or ctx.out_of_time(), f"{len(updates)} updates"

    if parts.demonstrations is None:  # else nothing is sampled before the next evaluation
        with ctx.ledger.phase("sync"), timed_event(ctx.recorder, "sync", step=ctx.step, worker="learner"):
            parts.sampler.load_weights(ctx.step)
    sums, total = parts.learner.take_sums(), parts.learner.updates
    if parts.demonstrations is None:
        ordered = sorted(groups, key=lambda group: group.group.position)
        parts.chooser.observe([(one.group.prompt, one.scored.scores) for one in ordered])
    more = {**refill_numbers(plan, groups), **parts.chooser.take_numbers()}
    return BatchFacts(tuple(groups), tuple(updates), sums, total, plan.waves, more)


# --- groups: sample, judge, compute advantages, filter ---


def arrivals(
    ctx: StepContext, groups: Sequence[AdvantagedGroup]
) -> Iterator[Iterator[AdvantagedGroup | None]]:
    """The groups of each call as they finish, or in prompt order where the plan asks for it; at the end of
    the call without streaming, of all calls where the plan is `batch_wide`. None: no group has finished yet.
    A supervised arm looks its completions up. `groups`: those that have come so far."""
    plan, shown = ctx.plan, ctx.parts.demonstrations
    for calls in asked(ctx, groups):
        if shown is not None:
            yield from ((demonstrated(request, shown) for request in call) for call in calls)
        elif plan.batch_wide:
            batch = [group for call in calls for group in scored_groups(ctx, call) if group is not None]
            yield iter(compute_advantages(ctx, sorted(batch, key=lambda scored: scored.group.position)))
        else:
            for call in calls:
                scored = scored_groups(ctx, call)
                found = (None if one is None else compute_advantages(ctx, [one])[0] for one in scored)
                yield found if plan.streaming else iter([group for group in found if group is not None])


def asked(ctx: StepContext, groups: Sequence[AdvantagedGroup]) -> Iterator[list[list[Request]]]:
    """The requests of the batch, by call; then, with `filter.refill`, of fresh prompts, until the batch holds
    as many kept completions as it would without a filter. `groups`: those that have come so far."""
    plan, size, first = ctx.plan, ctx.plan.prompts_per_call, 0
    wanted = plan.prompts_per_step
    for _ in range(1 + plan.refill):
        prompts = ctx.parts.chooser.draw(wanted)
        pending = requests(prompts, plan.seed, "sample", ctx.step, plan.group_size, first)
        yield [pending[i : i + size] for i in range(0, len(pending), size)]
        first += wanted
        wanted = prompts_missing(plan, groups)
        if wanted == 0 or ctx.out_of_time():
            return


def prompts_missing(plan: Plan, groups: Sequence[AdvantagedGroup]) -> int:
    """How many prompts are likely to fill the batch, by the share kept so far; at most a batch."""
    kept = sum(sum(group.kept) for group in groups)
    missing = plan.prompts_per_step * plan.group_size - kept
    share = max(kept / sum(len(group.kept) for group in groups), LEAST_SHARE)
    return min(plan.prompts_per_step, max(0, math.ceil(missing / (share * plan.group_size))))


def refill_numbers(plan: Plan, groups: Sequence[AdvantagedGroup]) -> dict[str, float]:
    """What replacing dropped completions has cost, for the record."""
    if not plan.refill:
        return {}
    more = [group.group for group in groups if group.group.position >= plan.prompts_per_step]
    tokens = sum(len(one.token_ids) for group in more for one in group.completions)
    return {"refill/prompts": len(more), "refill/tokens": tokens}


def scored_groups(ctx: StepContext, call: Sequence[Request]) -> Iterator[ScoredGroup | None]:
    """The judged groups of these requests as they finish, or in prompt order."""
    scored = judge(ctx, sample(ctx, call))
    return in_prompt_order(scored, call[0].position) if ctx.plan.in_prompt_order else scored


def sample(ctx: StepContext, call: Sequence[Request]) -> Iterator[Group | None]:
    """Groups as the sampler completes them. None: an engine in another process has completed none yet."""
    start = time.time()
    sampler, ledger = ctx.parts.sampler, ctx.ledger
    version = sampler.policy_version
    stream = sampler.stream(call, ctx.parts.decoding, ctx.plan.groups_at_once)
    for group in ledger.waiting("sample", iter(stream)):
        if group is not None:
            assert all(c.policy_version == version for c in group.completions), "off-policy sample"
            origin = group.origin or Origin("sampler", start, time.time())
            if group.origin is not None:
                ledger.beside(origin.start, origin.end, "sample")
            where = {"step": ctx.step, "worker": origin.worker, "group": group.position}
            ctx.recorder.event("sample", origin.start, origin.end, **where)
        yield group


@dataclass(frozen=True, slots=True)
class PendingVerdicts:
    """A group whose completions are being judged since `start`; `ends`: when verdicts arrived."""

    group: Group
    start: float
    verdicts: Sequence[Future[Score]]
    ends: list[float]

    def done(self) -> bool:
        return all(verdict.done() for verdict in self.verdicts)


def judge(ctx: StepContext, groups: Iterator[Group | None]) -> Iterator[ScoredGroup | None]:
    """Judge groups while others are being sampled. Verdicts are taken in the order in which groups arrived,
    so the speed of a verifier never changes any order. None: nothing has arrived, and nothing is judged."""
    pending: deque[PendingVerdicts] = deque()
    for group in groups:
        if group is not None:
            pending.append(submit(ctx, group))
        idle = group is None
        while pending and pending[0].done():
            yield take_verdicts(ctx, pending.popleft())
            idle = False
        if idle:
            yield None
    while pending:
        yield take_verdicts(ctx, pending.popleft())


def submit(ctx: StepContext, group: Group) -> PendingVerdicts:
    """Start to judge the completions of a group."""
    start, ends = time.time(), list[float]()
    verifier = ctx.parts.judges[group.prompt.task]
    with ctx.ledger.phase("verify"):
        verdicts = [
            verifier.submit(c.text, group.prompt.answer, Facts.of(group.prompt, c)) for c in group.completions
        ]
    for verdict in verdicts:
        verdict.add_done_callback(lambda _: ends.append(time.time()))
    return PendingVerdicts(group, start, verdicts, ends)


def take_verdicts(ctx: StepContext, pending: PendingVerdicts) -> ScoredGroup:
    """Wait for the verdicts of a group."""
    with ctx.ledger.phase("verify"):
        scores = tuple(verdict.result() for verdict in pending.verdicts)
    end = max(pending.ends, default=pending.start)
    ctx.ledger.beside(pending.start, end, "verify")
    where = {"step": ctx.step, "worker": "verifier", "group": pending.group.position}
    ctx.recorder.event("judge", pending.start, end, **where)
    return ScoredGroup(pending.group, scores)


def in_prompt_order(groups: Iterator[ScoredGroup | None], first: int) -> Iterator[ScoredGroup]:
    """Hold groups back until all earlier ones have come. Pauses (None) are dropped: with a deterministic
    learner nothing may depend on time."""
    held: dict[int, ScoredGroup] = {}
    position = first
    for scored in groups:
        if scored is None:
            continue
        held[scored.group.position] = scored
        while position in held:
            yield held.pop(position)
            position += 1
    assert not held, f"groups {sorted(held)} came without an earlier one"


def compute_advantages(ctx: StepContext, batch: Sequence[ScoredGroup]) -> list[AdvantagedGroup]:
    """Advantages, computed once, from rewards, which a dataset or an arm may shape; the filter looks at the
    verdicts unless `filter.signal=reward`."""
    plan, parts, first = ctx.plan, ctx.parts, batch[0].group.position
    verdicts = [[score.value for score in one.scores] for one in batch]
    penalties: list[tuple[float, ...]] = [()] * len(batch)
    masked: list[tuple[bool, ...]] = [()] * len(batch)
    rewards = [[score.value + score.added for score in one.scores] for one in batch]
    if plan.overlong_share > 0:
        limit, share = parts.decoding.max_new_tokens, plan.overlong_share
        lengths = [[len(c.token_ids) for c in one.group.completions] for one in batch]
        penalties = [tuple(overlong_penalty(n, limit, share) for n in own) for own in lengths]
        rewards = [list(map(add, r, p)) for r, p in zip(rewards, penalties, strict=True)]
    seen = rewards if plan.filter_on_reward else verdicts
    kept = parts.filter.keep(seen, seed_for(plan.seed, "filter", ctx.step, first))
    if plan.mask_truncated:
        masked = [tuple(c.finish_reason == "length" for c in one.group.completions) for one in batch]
        kept = [tuple(k and not m for k, m in zip(*g, strict=True)) for g in zip(kept, masked, strict=True)]
    known = [map(tuple, values) for values in (rewards, seen)]
    return list(map(AdvantagedGroup, batch, parts.advantages(rewards), kept, masked, penalties, *known))


def demonstrated(request: Request, demonstrations: Mapping[str, Completion]) -> AdvantagedGroup:
    """A given completion, to be made more likely: policy gradient with advantage 1 is SFT."""
    group = Group(request.position, request.prompt, (demonstrations[request.prompt.id],))
    return AdvantagedGroup(ScoredGroup(group, (Score(math.nan, "shown"),)), (1.0,), (True,))


# --- gradients and updates ---


def backpropagate(
    ctx: StepContext,
    ready: Round,
    references: Sequence[Tensor | None] | None = None,
    old: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Forward and backward of a round of micro-batches; returns their log-probabilities. Unless `references`
    are given, the reference model's forward comes first; it counts as `logprob`."""
    learner = ctx.parts.learner
    if references is None:
        with ctx.ledger.phase("logprob"):
            references = learner.reference_logprobs(ready)
    with ctx.ledger.phase("backprop"):
        results = learner.accumulate(ready, references, old)
    for worker, micro_batch, result in zip(learner.workers, ready, results, strict=False):
        where = {"step": ctx.step, "worker": worker, "groups": micro_batch.positions}
        ctx.recorder.event("backprop", result.start, result.end, **where)
    return [result.logprobs for result in results]


def update(ctx: StepContext, divisor: float) -> UpdateStats:
    """Divide the gradient sums and move the weights."""
    with ctx.ledger.phase("optimizer"):
        return ctx.parts.learner.update(divisor)


def denominator(ctx: StepContext, groups: Sequence[AdvantagedGroup]) -> float:
    """What the gradient sums of these groups are divided by: all of their completions, or the kept ones."""
    lengths = [
        len(completion.token_ids)
        for group in groups
        for completion, kept in zip(group.group.completions, group.kept, strict=True)
        if kept or ctx.plan.denominator == "all"
    ]
    return losses.denominator(lengths, ctx.parts.decoding.max_new_tokens, ctx.plan.aggregation)


@dataclass(slots=True)
class ScoredRound:
    """A round with log-probabilities that are computed once: `old` at the sampling weights, `references` of
    the initial model."""

    round: Round
    old: list[Tensor] | None = None
    references: list[Tensor | None] | None = None


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """What one update sees, and what its gradient is divided by. Filtering may have emptied it."""

    rounds: tuple[ScoredRound, ...]
    divisor: float


def mini_batches(ctx: StepContext, groups: Sequence[AdvantagedGroup]) -> list[MiniBatch]:
    """The batch cut into equal parts in prompt order; dropped completions count for the cut."""
    ordered = sorted(groups, key=lambda group: group.group.position)
    count, packer = ctx.plan.updates_per_batch // ctx.plan.passes, ctx.parts.packer
    edges = [len(ordered) * number // count for number in range(count + 1)]
    minis = []
    for first, end in pairwise(edges):
        part = ordered[first:end]
        packed = [ready for group in part for ready in packer.add(group)] + list(packer.flush())
        rounds = balanced(packed, ctx.parts.learner.width, packer.max_tokens)
        minis.append(MiniBatch(tuple(map(ScoredRound, rounds)), denominator(ctx, part)))
    return minis


def repeated_updates(ctx: StepContext, minis: Sequence[MiniBatch]) -> list[UpdateStats]:
    """One update per mini-batch, `passes` times (PPO); stops early when time is up.

    Old log-probabilities are those at the sampling weights, with the packing of the update itself. The first
    mini-batch runs at the sampling weights; the others are scored before the first update.
    """
    learner = ctx.parts.learner
    with ctx.ledger.phase("logprob"):
        for scored in (scored for mini in minis[1:] for scored in mini.rounds):
            scored.old = learner.logprobs(scored.round)
        for scored in (scored for mini in minis for scored in mini.rounds):
            scored.references = learner.reference_logprobs(scored.round)
    updates: list[UpdateStats] = []
    for mini in list(minis) * ctx.plan.passes:
        for scored in mini.rounds:
            logprobs = backpropagate(ctx, scored.round, scored.references, scored.old)
            if scored.old is None:
                scored.old = logprobs
        updates.append(update(ctx, mini.divisor))
        if ctx.out_of_time():
            break
    return updates


# --- when a step is evaluated, saved, refused ---


def evaluation_due(plan: Plan, step: int) -> bool:
    """Whether a step within the run ends with an evaluation (the last one has its own)."""
    return plan.evaluate_every > 0 and step % plan.evaluate_every == 0 and 0 < step < plan.steps


def checkpoint_due(plan: Plan, step: int, since_s: float) -> bool:
    """Whether a step ends with a checkpoint; the last one is `since_s` seconds old."""
    late = plan.checkpoint_s is not None and since_s >= plan.checkpoint_s
    return step == plan.steps or late or (plan.checkpoint_every > 0 and step % plan.checkpoint_every == 0)


def is_paused(plan: Plan, step: int) -> bool:
    """Whether this attempt ends early after `step`."""
    return plan.pause_after is not None and plan.pause_after <= step < plan.steps


def check_step(step: int, facts: BatchFacts) -> None:
    """Stop where going on would only record nonsense. Raises UserError where no verdict could be reached,
    FloatingPointError where no gradient was finite."""
    scores = [score for _, score, _, _ in facts.samples()]
    if all(s.outcome == "verifier_error" for s in scores):
        what = f"every verdict of step {step} failed: {scores[0].detail}"
        hint = "nothing was learned from it; fix the cause and run the same command"
        raise UserError(Fault("verifier", what, hint), "what was recorded is kept")
    if facts.updates and all(not u.finite for u in facts.updates):
        raise FloatingPointError(f"the gradient of step {step} is infinite or not a number")
