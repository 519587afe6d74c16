"""Streaming changes when work is done, never what is learned: one step, with groups in any order and gaps
between them, gives the weights of the synchronous step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch

from dash_exp.config.compose import compose
from dash_exp.config.schema import SelectionConfig
from dash_exp.learning.advantages import batch_advantages
from dash_exp.learning.filters import make_filter
from dash_exp.learning.learner import Learner
from dash_exp.learning.settings import Forward, Objective
from dash_exp.tasks.prompts import PromptSet
from dash_exp.tasks.selection import Chooser
from dash_exp.train.build import make_plan
from dash_exp.train.loop import judge, train_step
from dash_exp.types import Decoding, Group, Origin, Prompt, Request, Score
from tests.conftest import make_groups
from tests.learning.reference import MAX_NEW, VOCABULARY
from tests.test_updates import LENGTHS, PROMPTS, context, optimization, parts_of, plan_of

BATCH = make_groups(LENGTHS, PROMPTS, seed=2)


class Scripted:
    """A sampler whose groups finish in a given order; where it says None, nothing is there yet."""

    policy_version = 0

    def __init__(self, script: Sequence[int | None]):
        self.script = script
        self.loaded: list[int] = []

    def stream(
        self, requests: Sequence[Request], decoding: Decoding, at_once: int | None = None
    ) -> Iterator[Group | None]:
        groups = {g.group.prompt.id: g.group for g in BATCH}
        for place in self.script:
            if place is None:
                yield None
                continue
            asked = requests[place]
            own = groups[asked.prompt.id]
            yield Group(asked.position, asked.prompt, own.completions, Origin("server-0", 1.0, 2.0))

    def load_weights(self, version: int) -> None:
        self.loaded.append(version)

    def close(self) -> None: ...


def learned(
    model: Any,
    script: Sequence[int | None],
    goal: Objective,
    aggregation: str,
    streaming: bool,
    max_tokens: int,
    in_order: bool = False,
) -> tuple[dict[str, torch.Tensor], dict[str, float], list[list[int]]]:
    """Weights and metric sums after one step, and the groups of each micro-batch."""
    learner = Learner(copy.deepcopy(model), goal, optimization(), Forward(VOCABULARY, 16))
    prompts = tuple(replace(g.group.prompt, answer="x" * n) for n, g in enumerate(BATCH))
    sampler, held = Scripted(script), PromptSet("test", prompts, 0, "hash")
    parts = parts_of(
        learner,
        aggregation,
        max_tokens,
        chooser=Chooser(held, 0, SelectionConfig()),
        sampler=sampler,
        decoding=Decoding(MAX_NEW, 1.0, (1,)),
        judges={"test": Rewards()},
        advantages=partial(batch_advantages, baseline="group_mean", scale="std"),
        filter=make_filter("advantage", 0.1),
    )
    plan = replace(plan_of(1, 4, aggregation), streaming=streaming, in_prompt_order=in_order)
    record = Events()
    facts = train_step(context(plan, parts, record))
    assert sampler.loaded == [1]
    assert sorted(g.group.position for g in facts.groups) == [0, 1, 2, 3]
    return learner.masters, dict(facts.sums), record.backpropagated


class Events:
    """Takes events; remembers which groups were learned from together."""

    def __init__(self) -> None:
        self.backpropagated: list[list[int]] = []

    def event(self, kind: str, start: float, end: float, **more: Any) -> None:
        if kind == "backprop":
            self.backpropagated.append(list(more["groups"]))


class Rewards:
    """Some of a group right and some wrong, but for the first prompt, whose group is all wrong."""

    version = "test"

    def __init__(self) -> None:
        self.count = 0

    def submit(self, text: str, answer: str, facts: object = None) -> Future[Score]:
        self.count += 1
        right = len(answer) > 0 and self.count % 2 == 0
        made: Future[Score] = Future()
        made.set_result(Score(float(right), "correct" if right else "wrong"))
        return made


SCRIPTS: list[list[int | None]] = [[3, 0, 2, 1], [None, 1, None, None, 0, 3, 2, None], [2, 1, 0, 3, None]]


@pytest.mark.parametrize(
    ("script", "aggregation", "beta"),
    [
        (SCRIPTS[0], "constant", 0.04),
        (SCRIPTS[0], "token_mean", 0.0),
        (SCRIPTS[1], "sequence_mean", 0.04),
        (SCRIPTS[1], "constant", 0.0),
        (SCRIPTS[2], "token_mean", 0.04),
    ],
)
def test_the_streamed_step_is_the_synchronous_one(
    tiny: Any, script: list[int | None], aggregation: str, beta: float
) -> None:
    goal = Objective("policy_gradient", 0.2, 0.2, beta, "constant", "k3", 1.0)
    whole, sums, _ = learned(tiny, [0, 1, 2, 3], goal, aggregation, streaming=False, max_tokens=1000)
    parts, own, _ = learned(tiny, script, goal, aggregation, streaming=True, max_tokens=20)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=2e-6)
    before = dict(tiny.named_parameters())
    assert any(not torch.equal(whole[n], before[n]) for n in whole)
    for name in ("first/tokens", "first/completions", "first/logprob"):
        assert own[name] == pytest.approx(sums[name], rel=1e-5)


GAPS: list[tuple[list[int | None], list[list[int]]]] = [
    ([1, 3, None, 0, None, 2], [[1, 3], [0]]),
    ([None, 1, None, None, 3, 0, 2, None], [[1], [0, 3]]),
    ([3, 1, 2, 0], [[0, 1, 3]]),
    ([0, 1, 3, 2, None], [[0, 1, 3]]),
]
"""When which group comes, and what is then learned from together: all fit one micro-batch. Place 2 has the
prompt of whose completions none is kept."""


@pytest.mark.parametrize(("script", "expected"), GAPS)
def test_what_is_held_is_handed_on_where_the_learner_would_wait(
    tiny: Any, script: list[int | None], expected: list[list[int]]
) -> None:
    """The weights are those of one micro-batch, to rounding."""
    goal = Objective("policy_gradient", 0.2, 0.2, 0.04, "constant", "k3", 1.0)
    whole, sums, one = learned(tiny, [0, 1, 2, 3], goal, "constant", streaming=False, max_tokens=1000)
    assert [sorted(groups) for groups in one] == [[0, 1, 3]]
    parts, own, made = learned(tiny, script, goal, "constant", streaming=True, max_tokens=1000)
    assert [sorted(groups) for groups in made] == expected
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=2e-6)
    assert own["first/tokens"] == sums["first/tokens"]


@pytest.mark.parametrize("streaming", [True, False])
def test_gaps_change_nothing_where_the_cut_must_not_depend_on_time(tiny: Any, streaming: bool) -> None:
    """`learner.deterministic=true`, or all sampled first: to the bit what it is without gaps."""
    goal = Objective("policy_gradient", 0.2, 0.2, 0.0, "constant", "k3", 1.0)
    whole, _, cut = learned(
        tiny, [1, 0, 3, 2], goal, "constant", streaming=False, max_tokens=1000, in_order=streaming
    )
    script: list[int | None] = [None, 1, None, 0, None, None, 3, 2, None]
    gaps, _, own = learned(
        tiny, script, goal, "constant", streaming=streaming, max_tokens=1000, in_order=streaming
    )
    assert own == cut and len(cut) == 1
    assert all(torch.equal(whole[name], tensor) for name, tensor in gaps.items())


def test_verdicts_are_looked_after_while_nothing_is_sampled() -> None:
    """A group whose verdicts are there is passed on in a gap, before the next group arrives."""
    seen: list[str] = []
    verdict: Future[Score] = Future()

    class Once:
        version = "test"

        def submit(self, text: str, answer: str, facts: object = None) -> Future[Score]:
            return verdict

    group = Group(0, Prompt("p", "test", "", (1,), ""), BATCH[0].group.completions[:1])

    def groups() -> Iterator[Group | None]:
        yield group
        seen.append("gap without a verdict")
        yield None
        verdict.set_result(Score(1.0, "correct"))
        yield None
        seen.append("the next one")

    parts = cast(Any, type("P", (), {"judges": {"test": Once()}})())
    stream = judge(context(plan_of(1, 4, "constant"), parts), groups())
    seen.extend(f"group {scored.group.position}" if scored else "nothing to do" for scored in stream)
    assert seen == ["gap without a verdict", "nothing to do", "group 0", "the next one"]


@pytest.mark.parametrize(
    ("overrides", "waves"),
    [
        ((), 2),
        (("sampler.waves=4", "learner.deterministic=true"), 4),
        (("sampler.streaming=false",), None),
        (("sampler.colocated=true",), None),
        (("algorithm=ppo_multi",), None),
        (("sampler=hf",), None),
    ],
)
def test_waves_are_those_of_the_config_where_sampling_and_learning_overlap(
    overrides: tuple[str, ...], waves: int | None
) -> None:
    config = compose(["model=tiny", "sampler=vllm_servers", "sampler.servers=2", *overrides])
    plan = make_plan(config, 64)
    assert plan.waves == waves
    assert plan.streaming == (config.sampler.streaming and not config.sampler.colocated)
