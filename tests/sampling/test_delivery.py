"""The store: every expected group once, what failed is told last."""

from __future__ import annotations

import threading
import time

import pytest

from dash_exp.sampling.fleet.delivery import Delivery
from dash_exp.types import Completion, Group, Prompt


def group(position: int) -> Group:
    completion = Completion((1,), (-0.1,), "", "stop", 0)
    return Group(position, Prompt(f"p{position}", "t", "", (3,), ""), (completion,))


def test_each_expected_group_is_delivered_once() -> None:
    store = Delivery([0, 1, 2])
    assert store.put(group(1)) and store.put(group(0))
    assert not store.put(group(1))  # a server thought dead has answered after all
    assert not store.put(group(7))  # of another batch
    assert (store.held, store.missing) == (2, frozenset({2}))
    assert [store.take(0).position for _ in range(2)] == [1, 0]  # type: ignore[union-attr]
    assert store.take(0) is None
    assert not store.put(group(0))  # nor after it was taken


def test_a_failure_is_told_after_what_came_before_it() -> None:
    store = Delivery([0, 1])
    store.put(group(0))
    store.fail(RuntimeError("all gone"))
    assert store.take(0) is not None
    with pytest.raises(RuntimeError, match="all gone"):
        store.take(0)


def test_whoever_waits_is_woken_at_once() -> None:
    store = Delivery([0])
    threading.Timer(0.05, store.put, [group(0)]).start()
    start = time.monotonic()
    assert store.take(10) is not None
    assert time.monotonic() - start < 5
