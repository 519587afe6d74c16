"""The training loop: the one file that knows the order of things.

prompts -> sampler.stream -> Group -> verifier -> ScoredGroup -> advantages, filter
        -> AdvantagedGroup -> rounds of micro-batches -> learner.accumulate ... learner.update
        -> sampler.load_weights -> recorder
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial

from dash_exp.errors import Fault, UserError
from dash_exp.learning.rounds import Rounds
from dash_exp.record.folder import Recorder, timed_event
from dash_exp.record.ledger import Budget, Ledger
from dash_exp.record.metrics import BatchFacts, sample_rows, step_row
from dash_exp.tasks.prompts import batch, requests
from dash_exp.train.parts import Ending, Hooks, Parts, Plan
from dash_exp.train.updates import backpropagate, divisor, mini_batches, repeated_updates, update
from dash_exp.types import AdvantagedGroup, Completion, Group, Origin, Request, Score, ScoredGroup


def train(plan: Plan, parts: Parts, hooks: Hooks, recorder: Recorder, *, done: int, spent_s: float) -> Ending:
    """Run the steps after `done`; `spent_s` seconds of training time were used by them."""
    ledger = Ledger()
    budget = Budget(plan.budget_s, spent_s, ledger)
    if 0 < done < plan.steps and plan.budget_s is not None and spent_s >= plan.budget_s:
        return Ending(done, "budget")
    for step in range(done + 1, plan.steps + 1):
        facts = train_step(plan, parts, ledger, recorder, step, budget.over)
        cut = len(facts.updates) < plan.updates_per_batch
        refuse_hopeless(step, facts)
        recorder.append("samples", sample_rows(step, facts.groups))
        signal = hooks.stop_signal()
        if signal is None and evaluation_due(plan, step):
            with ledger.phase("evaluate"):
                hooks.evaluate(step)
        over = cut or budget.over()
        if checkpoint_due(plan, step) or over or signal is not None:
            with ledger.phase("checkpoint"):
                row = step_row(step, facts, *ledger.so_far(), ledger.overlap_s())
                hooks.checkpoint(step, step == plan.steps, row)
        overlap = ledger.overlap_s()
        row = step_row(step, facts, *budget.close_step(), overlap)
        recorder.append("steps", [row])
        recorder.status("running", step)
        hooks.progress(row)
        if signal is not None:
            return Ending(step, "signal", signal)
        if cut or (over and step < plan.steps):
            return Ending(step, "budget")
    return Ending(plan.steps, "planned")


def evaluation_due(plan: Plan, step: int) -> bool:
    """Whether a step within the run ends with an evaluation (the last one has its own)."""
    return plan.evaluate_every > 0 and step % plan.evaluate_every == 0 and 0 < step < plan.steps


def checkpoint_due(plan: Plan, step: int) -> bool:
    every = plan.checkpoint_every
    return step == plan.steps or (every > 0 and step % every == 0)


def refuse_hopeless(step: int, facts: BatchFacts) -> None:
    """Stop where going on would only record nonsense."""
    scores = [score for _, score, _, _ in facts.samples()]
    if all(s.outcome == "verifier_error" for s in scores):
        fault = Fault(
            "verifier",
            f"every verdict of step {step} failed: {scores[0].detail}",
            "nothing was learned from it; mend the cause and run the same command",
        )
        raise UserError(fault, "what was recorded is kept")
    if facts.updates and all(not u.finite for u in facts.updates):
        raise FloatingPointError(f"the gradient of step {step} is infinite or not a number")


def train_step(
    plan: Plan,
    parts: Parts,
    ledger: Ledger,
    recorder: Recorder,
    step: int,
    over: Callable[[], bool] = lambda: False,
) -> BatchFacts:
    """Get one batch, learn from it, and hand the new weights to the sampler. An arm with several updates
    makes no further one when its budget is `over`."""
    chosen = batch(parts.prompts, plan.seed, step, plan.prompts_per_step)
    asked = requests(chosen, plan.seed, "sample", step, plan.group_size)
    groups: list[AdvantagedGroup] = []
    rounds = Rounds(parts.packer, parts.learner.width)
    at_once = plan.updates_per_batch == 1  # then a round is backpropagated as soon as it is full
    for first in range(0, len(asked), plan.prompts_per_call):
        call = asked[first : first + plan.prompts_per_call]
        for group in advantaged_groups(plan, parts, ledger, recorder, step, call):
            if group is not None:
                groups.append(group)
            for ready in rounds.take(group) if at_once else ():
                backpropagate(parts, ledger, recorder, step, ready)
        for ready in rounds.flush():
            backpropagate(parts, ledger, recorder, step, ready)
    if at_once:
        updates = [update(parts, ledger, divisor(plan, parts, groups))]
    else:
        minis = mini_batches(plan, parts, groups)
        updates = repeated_updates(plan, parts, ledger, recorder, step, minis, over)
    declared = plan.updates_per_batch
    assert len(updates) == declared or over(), f"{len(updates)} updates where the arm declares {declared}"
    if parts.demonstrations is None:  # else the sampler is not asked before the next evaluation
        with ledger.phase("sync"), timed_event(recorder, "sync", step=step, worker="learner"):
            parts.sampler.load_weights(step)
    sums, total = parts.learner.take_sums(), parts.learner.updates
    return BatchFacts(tuple(groups), tuple(updates), sums, total, plan.waves)


def advantaged_groups(
    plan: Plan, parts: Parts, ledger: Ledger, recorder: Recorder, step: int, call: list[Request]
) -> Iterator[AdvantagedGroup | None]:
    """Sample, judge and weigh the prompts of one call, group by group as they finish (in prompt order
    if the plan says so; all at the end if it does not stream); None where none is there yet. A supervised
    arm only looks them up."""
    if parts.demonstrations is not None:
        return (demonstrated(request, parts.demonstrations) for request in call)
    groups = sampled_groups(parts, ledger, recorder, step, call, plan.groups_at_once)
    scored = judged_groups(parts, ledger, recorder, step, groups)
    if plan.in_prompt_order:
        scored = in_prompt_order(scored, call[0].position)
    weighed = (weigh(parts, group) if group is not None else None for group in scored)
    return weighed if plan.streaming else iter([group for group in weighed if group is not None])


def sampled_groups(
    parts: Parts,
    ledger: Ledger,
    recorder: Recorder,
    step: int,
    call: list[Request],
    at_once: int | None,
) -> Iterator[Group | None]:
    """Groups as they are sampled; None where a sampler that works beside this process has none yet."""
    start = time.time()
    expected = parts.sampler.policy_version
    stream = parts.sampler.stream(call, parts.decoding, at_once)
    for group in ledger.waiting("sample", iter(stream)):
        if group is not None:
            assert all(c.policy_version == expected for c in group.completions), "off-policy sample"
            origin = group.origin or Origin("sampler", start, time.time())
            if group.origin is not None:
                ledger.beside(origin.start, origin.end, "sample")
            recorder.event(
                "sample", origin.start, origin.end, step=step, worker=origin.worker, group=group.position
            )
        yield group


def judged_groups(
    parts: Parts, ledger: Ledger, recorder: Recorder, step: int, groups: Iterator[Group | None]
) -> Iterator[ScoredGroup | None]:
    """Judge while sampling goes on. Verdicts are taken in the order in which groups came, so how fast
    a verifier is never changes the order of anything. None where nothing has come and nothing is judged."""
    waiting: deque[tuple[Group, float, list[Future[Score]], list[float]]] = deque()

    def take() -> ScoredGroup:
        group, start, futures, ends = waiting.popleft()
        with ledger.phase("verify"):
            scores = tuple(f.result() for f in futures)
        end = max(ends, default=start)
        ledger.beside(start, end, "verify")
        recorder.event("judge", start, end, step=step, worker="verifier", group=group.position)
        return ScoredGroup(group, scores)

    for group in groups:
        if group is not None:
            start, ends, judge = time.time(), list[float](), parts.judges[group.prompt.task]
            with ledger.phase("verify"):
                futures = [judge.submit(c.text, group.prompt.answer) for c in group.completions]
            for future in futures:
                future.add_done_callback(partial(_note_end, ends))
            waiting.append((group, start, futures, ends))
        taken = False
        while waiting and all(f.done() for f in waiting[0][2]):
            yield take()
            taken = True
        if group is None and not taken:
            yield None
    while waiting:
        yield take()


def _note_end(ends: list[float], _: Future[Score]) -> None:
    ends.append(time.time())


def in_prompt_order(groups: Iterator[ScoredGroup | None], first: int) -> Iterator[ScoredGroup]:
    """Hold back groups that finished before an earlier one. That there was none for a while is not told:
    nothing may depend on it."""
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


def weigh(parts: Parts, scored: ScoredGroup) -> AdvantagedGroup:
    """Advantages, computed once, then the filter."""
    rewards = [s.value for s in scored.scores]
    return AdvantagedGroup(scored, parts.advantages(rewards), parts.keep(parts.filter_advantages(rewards)))


def demonstrated(request: Request, demonstrations: Mapping[str, Completion]) -> AdvantagedGroup:
    """A given completion, to be made more likely: policy gradient with advantage 1 is SFT."""
    group = Group(request.position, request.prompt, (demonstrations[request.prompt.id],))
    return AdvantagedGroup(ScoredGroup(group, (Score(math.nan, "shown"),)), (1.0,), (True,))
