"""The order of prompts, mixtures, and what becomes a prompt at all."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.errors import UserError
from dash_exp.tasks.examples import Example, ExampleSet
from dash_exp.tasks.prompts import PromptSet, make_prompts, mixture, prompts_at, requests
from dash_exp.types import Prompt


def batch(prompts: PromptSet, seed: int, step: int, size: int) -> list[Prompt]:
    """The prompts of a step, from 1."""
    return prompts_at(prompts, seed, (step - 1) * size, size)


def prompt_set(count: int, name: str = "t") -> PromptSet:
    prompts = tuple(Prompt(f"{name}{i}", name, "", (1,), "") for i in range(count))
    return PromptSet(name, prompts, 0, f"hash of {name}")


def test_every_prompt_once_an_epoch_and_batches_depend_only_on_the_step() -> None:
    prompts = prompt_set(10)
    asked = [p.id for step in range(1, 6) for p in batch(prompts, 0, step, 4)]
    assert sorted(asked[:10]) == sorted(asked[10:]) == sorted(p.id for p in prompts.prompts)
    assert asked[:10] != asked[10:]
    assert [p.id for p in batch(prompts, 0, 3, 4)] == asked[8:12]
    assert [p.id for p in batch(prompts, 1, 3, 4)] != asked[8:12]


def test_the_order_of_one_dataset_is_pinned() -> None:
    """Recorded before there were mixtures: cells of that time are continued with the same prompts."""
    prompts = prompt_set(10)
    assert [p.id for p in batch(prompts, 0, 1, 4)] == PINNED_FIRST
    many = prompt_set(1000)
    order = ",".join(p.id for step in range(1, 80) for p in batch(many, 7, step, 16))
    assert hashlib.sha256(order.encode()).hexdigest()[:16] == PINNED_HASH


PINNED_FIRST = ["t1", "t9", "t4", "t3"]
PINNED_HASH = "38464eb2df03e2df"


def test_every_sample_has_its_own_seed() -> None:
    prompts = [prompt_set(1).prompts[0]] * 3  # the same prompt three times in one batch
    asked = requests(prompts, 0, "sample", 1, 8)
    seeds = [s for r in asked for s in r.seeds]
    assert len(set(seeds)) == 24
    later = requests(prompts, 0, "sample", 2, 8)
    assert not {s for r in later for s in r.seeds} & set(seeds)


# --- mixtures ----------------------------------------------------------------------------------


def test_a_single_part_is_itself() -> None:
    alone = prompt_set(10)
    assert mixture([(alone, 3.0)]) is alone


def test_a_mixture_holds_all_its_parts() -> None:
    mixed = mixture([(prompt_set(10, "a"), 3.0), (prompt_set(5, "b"), 1.0)])
    assert (mixed.name, len(mixed.prompts), mixed.weights) == ("a+b", 15, (("a", 3.0), ("b", 1.0)))
    other = mixture([(prompt_set(10, "a"), 3.0), (prompt_set(5, "c"), 1.0)])
    assert mixed.content_hash != other.content_hash


@given(
    weights=st.lists(st.floats(0.05, 10), min_size=2, max_size=4),
    seed=st.integers(0, 50),
    first=st.integers(1, 200),
    size=st.integers(1, 64),
)
def test_every_stretch_has_the_parts_in_proportion(
    weights: list[float], seed: int, first: int, size: int
) -> None:
    parts = [(prompt_set(50, name), w) for name, w in zip("abcd", weights, strict=False)]
    mixed = mixture(parts)
    asked = [p.task for step in range(first, first + 4) for p in batch(mixed, seed, step, size)]
    found = Counter(asked)
    for part, weight in parts:
        # any piece of the unit interval gets its length's share of a golden-ratio sequence, off by a
        # few places at most however long the sequence is
        assert abs(found[part.name] - len(asked) * weight / sum(weights)) < 4


def test_three_to_one_in_every_batch() -> None:
    mixed = mixture([(prompt_set(100, "a"), 3.0), (prompt_set(20, "b"), 1.0)])
    for step in range(1, 100):
        assert 11 <= Counter(p.task for p in batch(mixed, 0, step, 16))["a"] <= 13


def test_each_part_of_a_mixture_keeps_its_own_order() -> None:
    a, b = prompt_set(30, "a"), prompt_set(7, "b")
    mixed = mixture([(a, 2.0), (b, 1.0)])
    asked = [p for step in range(1, 31) for p in batch(mixed, 5, step, 8)]
    for part in (a, b):
        own = [p.id for p in asked if p.task == part.name]
        assert own == [p.id for p in batch(part, 5, 1, len(own))]


def test_a_mixture_depends_only_on_seed_and_step() -> None:
    mixed = mixture([(prompt_set(30, "a"), 2.0), (prompt_set(7, "b"), 1.0)])
    whole = [batch(mixed, 3, step, 8) for step in range(1, 20)]
    assert [batch(mixed, 3, step, 8) for step in range(12, 20)] == whole[11:]  # as after a resume
    turns = {tuple(p.task for p in batch(mixed, seed, 1, 8)) for seed in range(8)}
    assert len(turns) > 1  # the seed moves the parts' turns too


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    mixed = mixture([(prompt_set(30, "a"), 2.0), (prompt_set(7, "b"), 1.0)])
    by_8 = [p for step in range(1, 13) for p in batch(mixed, 3, step, 8)]
    by_6 = [p for step in range(1, 17) for p in batch(mixed, 3, step, 6)]
    assert by_8 == by_6


# --- what becomes a prompt ---------------------------------------------------------------------


def test_long_prompts_are_dropped_and_counted_or_refused() -> None:
    examples = ExampleSet("f", tuple(Example(f"{n}", "x" * n, "1") for n in (2, 5, 9)), "")

    def made(**limits: int) -> PromptSet:
        return make_prompts(
            examples, lambda e: e.problem, lambda texts: [[7] * len(t) for t in texts], **limits
        )

    kept = made(max_prompt_tokens=5, model_limit=100)
    assert [len(p.token_ids) for p in kept.prompts] == [2, 5] and kept.dropped == 1
    assert [p.id for p in made(max_prompt_tokens=9, model_limit=100, limit=2).prompts] == ["2", "5"]
    with pytest.raises(UserError, match="longer than the 4 tokens"):
        made(max_prompt_tokens=10, model_limit=4)
    with pytest.raises(UserError, match="all 3 prompts"):
        made(max_prompt_tokens=1, model_limit=100)
    with pytest.raises(UserError, match="1 prompts have no tokens"):
        make_prompts(
            ExampleSet("f", (Example("empty", "", "1"),), ""),
            lambda e: e.problem,
            lambda texts: [[] for _ in texts],
            max_prompt_tokens=5,
            model_limit=5,
        )


def test_the_hash_covers_all_that_is_shown_or_judged() -> None:
    base = Example("1", "p", "a", "s", "t")
    changed = [
        Example("2", "p", "a", "s", "t"),
        Example("1", "q", "a", "s", "t"),
        Example("1", "p", "b", "s", "t"),
        Example("1", "p", "a", "z", "t"),
        Example("1", "p", "a", "s", "u"),
    ]
    hashes = {ExampleSet("x", (one,), "").content_hash for one in (base, *changed)}
    assert len(hashes) == 6
