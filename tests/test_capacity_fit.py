"""The speed of servers, found again from when their completions ended."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_exp.capacity.fit import _left, by_server, fit_speed, prefill_rate, undisturbed
from dash_exp.capacity.sampling import sample
from dash_exp.types import Group, Origin
from tests.served import served


def lengths(seed: int, groups: int = 16, size: int = 8, most: int = 64) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randint(2, most) for _ in range(size)] for _ in range(groups)]


def steps(a: float, b: float) -> Callable[[int], float]:
    return lambda n: a + b * n


@given(
    st.integers(0, 1000),
    st.floats(0.001, 0.2),
    st.floats(0.0, 0.01),
    st.floats(0.0, 0.5),
    st.sampled_from([8, 32, 128]),
)
@settings(max_examples=25, deadline=None)
def test_what_a_server_takes_is_found_again(
    seed: int, a: float, b: float, prompt_s: float, at_once: int
) -> None:
    """Decode steps with few and with many, told from prompts; times are known to a tenth of a microsecond."""
    found = fit_speed(by_server(served(lengths(seed), steps(a, b), prompt_s, at_once=at_once)))
    for n in (1, at_once):
        assert found.decode.seconds(n) == pytest.approx(a + b * n, rel=0.01, abs=1e-4)
    assert found.prefill_s * 20 == pytest.approx(prompt_s, rel=0.01, abs=1e-3)
    rate = prefill_rate(found)
    assert rate == math.inf if found.prefill_s == 0 else rate * found.prefill_s == pytest.approx(1)


@pytest.mark.parametrize("prompt_s", [0.0, 0.3])
def test_equal_lengths_are_predicted_although_no_end_tells_steps_from_prompts(prompt_s: float) -> None:
    """What batches in one and in four waves leave open does not matter to either."""
    equal = ((10,) * 8,) * 16
    batches = {w: served(equal, steps(0.05, 0.002), prompt_s, at_once=w * 8) for w in (16, 4)}
    found = fit_speed([one for groups in batches.values() for one in by_server(groups)])
    for at_once, groups in batches.items():
        done = sample(
            equal, found.decode, found.prefill_s * 20, servers=1, max_sequences=256, at_once=at_once
        )
        assert done.seconds == pytest.approx(max(g.origin.end for g in groups if g.origin) - 1e9, rel=0.01)


def test_each_server_has_company_of_its_own() -> None:
    """Two servers with 64 sequences each are not one with 128."""
    own = lengths(3)
    both = [
        g
        for n in (0, 1)
        for g in served(own[n::2], steps(0.04, 0.002), 0.0, at_once=64, worker=f"server-{n}")
    ]
    assert fit_speed(by_server(both)).decode.seconds(64) == pytest.approx(0.168, rel=1e-3)


def test_what_is_all_prompts_still_has_decode_steps() -> None:
    found = fit_speed(by_server(served([[1] * 4] * 4, steps(0.0, 0.0), 0.5, at_once=4)))
    assert found.decode.seconds(4) > 0
    assert prefill_rate(replace(found, prefill_s=0.0)) == math.inf


def broken(group: Group, **changes: object) -> Group:
    assert group.origin is not None
    return replace(group, origin=replace(group.origin, **changes))  # type: ignore[arg-type]


def test_a_server_that_was_idle_in_between_was_not_slow() -> None:
    """A prompt at a time: the learner works before the next call, for seconds or for an hour."""
    calls = [
        served(lengths(n, groups=4), steps(0.003, 0.0004), 0.0, at_once=32, start=1e9 + 3000.0 * n)
        for n in range(4)
    ]
    found = fit_speed(by_server([group for call in calls for group in call]))
    assert found.decode.seconds(1) == pytest.approx(0.0034, rel=0.01)
    assert found.decode.seconds(32) == pytest.approx(0.0158, rel=0.01)


def test_a_disturbed_batch_is_not_fitted() -> None:
    groups = served(lengths(0, groups=2), steps(0.1, 0.0), 0.0, at_once=128)
    assert undisturbed(groups)
    origin = groups[0].origin
    assert isinstance(origin, Origin)
    early = broken(groups[0], ends=(origin.start - 1, *origin.ends[1:]))
    for bad in (early, broken(groups[0], ends=()), replace(groups[0], origin=None)):
        assert not undisturbed([bad, groups[1]])
        with pytest.raises(ValueError, match="ends are not known"):
            by_server([bad, groups[1]])
    assert not undisturbed([])


@given(st.lists(st.tuples(st.floats(0.01, 5.0), st.floats(0.0, 5.0)), min_size=1, max_size=12))
def test_time_left_is_that_of_a_queue(pairs: list[tuple[float, float]]) -> None:
    """Written the slow way: what does not fit into a span is carried into the next."""
    carried, expected = 0.0, []
    for span, taken in pairs:
        carried += taken
        done = min(span, carried)
        carried -= done
        expected.append(span - done)
    found = _left(np.array([s for s, _ in pairs]), np.array([t for _, t in pairs]))
    assert found == pytest.approx(expected, abs=1e-9)
