"""Waves chosen from steps of a simulated world: `served.py` samples, a learner takes what is finished."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from dash_exp.capacity.model import Setting
from dash_exp.capacity.wave_choice import WaveChoice
from dash_exp.config.compose import compose
from dash_exp.sampling.fleet.waves import groups_at_once
from dash_exp.train.build import make_choice, make_plan
from dash_exp.types import AdvantagedGroup, Group, Origin, Score, ScoredGroup
from tests.served import served

PROMPTS, SIZE, PROMPT_TOKENS = 16, 8, 20


class World:
    """Steps of a run. `a`, `b`: of a decode step; `rate`: of the learner, input tokens a second; `slower`:
    what makes both sides slower in so many waves, unknown to the model."""

    def __init__(self, a: float, b: float, rate: float, slower: Callable[[int], float] = lambda waves: 1.0):
        self.a, self.b, self.rate, self.slower = a, b, rate, slower

    def step(self, waves: int, seed: int, most: int = 64) -> tuple[list[AdvantagedGroup], dict[str, float]]:
        chance = random.Random(seed)
        lengths = [[chance.randint(2, most) for _ in range(SIZE)] for _ in range(PROMPTS)]
        at_once = (groups_at_once(PROMPTS, waves, 1) or PROMPTS) * SIZE
        groups = served(lengths, lambda n: self.a + self.b * n, 0.0, at_once=at_once)
        tokens = [PROMPT_TOKENS + sum(own) - SIZE for own in lengths]
        free = learning = 0.0
        for end, count in sorted((g.origin.end - 1e9, tokens[g.position]) for g in groups if g.origin):
            free = max(free, end) + count / self.rate
            learning += count / self.rate
        free *= self.slower(waves)
        row = {
            "completions/forwarded": 128,
            "completions/sampled": 128,
            "tokens/computed": sum(tokens),
            "time/backprop_s": learning,
            "time/logprob_s": 0.0,
            "time/verify_s": 0.0,
            "time/sample_s": free - learning,
        }
        return [weighed(g) for g in groups], row

    def both_s(self, waves: int, most: int = 64) -> float:
        """Mean of steps."""
        rows = [self.step(waves, seed, most)[1] for seed in range(10)]
        return sum(r["time/sample_s"] + r["time/backprop_s"] for r in rows) / len(rows)


def weighed(group: Group) -> AdvantagedGroup:
    count = len(group.completions)
    scored = ScoredGroup(group, (Score(1.0, "correct"),) * count)
    return AdvantagedGroup(scored, (1.0,) * count, (True,) * count)


def choice() -> WaveChoice:
    return WaveChoice(
        Setting(prompts=PROMPTS, group=SIZE, tokens=64, streaming=True, micro_batch_tokens=4096)
    )


def taken(world: World, steps: int) -> list[int]:
    chooses, waves = choice(), []
    for seed in range(steps):
        waves.append(chooses.waves)
        chooses.note(*world.step(chooses.waves, seed))
    return waves


WORLDS = {
    "sampling_is_all": World(0.05, 0.0, 1e9),
    "learning_is_all": World(0.0001, 0.0, 100.0),
    "even_and_batching_pays": World(0.05, 0.001, 700.0),
    "even_and_batching_does_not": World(0.001, 0.003, 300.0),
    "many_hinder": World(0.001, 0.003, 300.0, lambda waves: 1.0 + 0.1 * waves),
    "few_hinder": World(0.05, 0.001, 700.0, lambda waves: 1.0 + 0.5 / waves),
}


@pytest.mark.parametrize("name", WORLDS)
def test_what_is_chosen_is_hardly_slower_than_the_best(name: str) -> None:
    world = WORLDS[name]
    waves = taken(world, 12)
    assert waves[:3] == [4, 1, 4]
    truly = {w: world.both_s(w) for w in (1, 2, 4, 8, 16)}
    assert truly[waves[-1]] <= 1.04 * min(truly.values()), (waves, truly)


def test_the_worlds_differ_in_what_is_best() -> None:
    """Else a constant would do."""
    best = {
        name: min((1, 2, 4, 8, 16), key=lambda w, of=world: of.both_s(w)) for name, world in WORLDS.items()
    }
    assert best["sampling_is_all"] == 1
    assert best["even_and_batching_does_not"] > 4
    assert len(set(best.values())) > 2


def test_after_eight_steps_only_every_eighth_changes_it() -> None:
    """A world that turns round at the ninth step is noticed at the sixteenth."""
    chooses, waves = choice(), []
    for n in range(1, 33):
        name = "sampling_is_all" if n < 9 else "even_and_batching_does_not"
        waves.append(chooses.waves)
        chooses.note(*WORLDS[name].step(chooses.waves, n))
    assert len(set(waves[8:16])) == 1
    assert waves[-1] > 1


@pytest.mark.parametrize("name", ["even_and_batching_pays", "even_and_batching_does_not", "many_hinder"])
@pytest.mark.parametrize("lengths", [(400, 12), (12, 400)])
def test_it_follows_when_completions_become_shorter_or_longer(name: str, lengths: tuple[int, int]) -> None:
    world, chooses = WORLDS[name], choice()
    for n in range(1, 61):
        chooses.note(*world.step(chooses.waves, n, lengths[n > 20]))
    truly = {w: world.both_s(w, lengths[1]) for w in (1, 2, 4, 8, 16)}
    assert truly[chooses.waves] <= 1.04 * min(truly.values()), (chooses.waves, truly)


def test_a_number_that_is_new_is_looked_at_at_once() -> None:
    """However many steps it is to the next eighth."""
    chooses = choice()
    for n in range(1, 9):
        chooses.note(*WORLDS["even_and_batching_pays"].step(chooses.waves, n))
    tried = set(chooses._ratios)
    chooses.waves = next(w for w in chooses.choices if w not in tried)
    chooses.note(*WORLDS["even_and_batching_pays"].step(chooses.waves, 9))
    assert set(chooses._ratios) > tried


def test_steps_that_tell_nothing_are_passed_over() -> None:
    chooses = choice()
    chooses.note(*WORLDS["sampling_is_all"].step(4, 0))
    groups, row = WORLDS["sampling_is_all"].step(chooses.waves, 1)
    chooses.note(groups, {**row, "tokens/computed": 0})
    lost = groups[0].group
    assert lost.origin is not None
    again = Origin("server-0", lost.origin.start, lost.origin.end)
    chooses.note([weighed(Group(0, lost.prompt, lost.completions, again)), *groups[1:]], row)
    assert chooses.waves == 1
    chooses.note(groups, row)
    assert chooses.waves == 4


@pytest.mark.parametrize(
    ("overrides", "waves", "chosen"),
    [
        ((), 4, True),
        (("sampler.waves=2",), 2, False),
        (("learner.deterministic=true",), 4, False),
        (("sampler.streaming=false",), None, False),
        (("sampler.colocated=true",), None, False),
        (("algorithm=ppo_multi",), None, False),
        (("sampler=hf",), None, False),
    ],
)
def test_who_chooses(overrides: tuple[str, ...], waves: int | None, chosen: bool) -> None:
    """Nobody where a number is given, where nothing may depend on the clock, where nothing overlaps."""
    config = compose(["model=tiny", "sampler=vllm_servers", "sampler.servers=2", *overrides])
    plan = make_plan(config, 64)
    assert plan.waves == waves
    assert plan.streaming == (config.sampler.streaming and not config.sampler.colocated)
    choice = make_choice(config, plan, 3)
    assert (choice is not None) == chosen
    if choice is not None:
        assert (choice.setting.servers, choice.setting.learners, choice.setting.call) == (2, 3, None)
        assert choice.choices == [1, 2, 4, 8, 16]


def test_one_prompt_at_a_time_leaves_nothing_to_choose() -> None:
    alone = WaveChoice(Setting(prompts=PROMPTS, group=SIZE, call=1, streaming=True))
    assert alone.waves == 1
    alone.note(*WORLDS["sampling_is_all"].step(1, 0))
    assert alone.waves == 1
    assert WaveChoice(Setting(prompts=3, group=2)).waves == 3
