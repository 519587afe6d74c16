"""Processors and GPUs of servers and learner."""

from __future__ import annotations

import pytest

from dash_exp.config.compose import compose
from dash_exp.config.schema import changed
from dash_exp.errors import UserError
from dash_exp.sampling.fleet.member import visible_gpu
from dash_exp.sampling.fleet.sampler import gpus, processors
from dash_exp.train.build_servers import learner_gpus


@pytest.mark.parametrize(
    ("available", "servers", "each", "overlapped", "cores", "learner"),
    [
        ([0, 1], 1, None, True, [(1,)], 1),  # one each
        ([0, 1], 1, None, False, [(0, 1)], 2),  # in turn: both use all
        ([0, 1], 2, None, True, [(1,), (0,)], 1),  # more servers than their half: they share
        (list(range(8)), 2, None, True, [(6, 7), (4, 5)], 4),
        (list(range(8)), 2, 3, True, [(5, 6, 7), (2, 3, 4)], 2),
        (list(range(8)), 3, None, False, [(6, 7), (4, 5), (2, 3)], 8),
        ([2, 5, 9], 1, None, True, [(9,)], 2),  # whatever this process may use
    ],
)
def test_processors(
    available: list[int],
    servers: int,
    each: int | None,
    overlapped: bool,
    cores: list[tuple[int, ...]],
    learner: int,
) -> None:
    split = processors(available, servers, each, overlapped)
    assert (list(split.servers), split.learner) == (cores, learner)


def test_gpus() -> None:
    assert gpus(4, 3, (0,)) == ("1", "2", "3")
    assert gpus(4, 2, (0, 1)) == ("2", "3")
    assert gpus(2, 1, (1,)) == ("0",)  # learner.device=cuda:1
    assert gpus(1, 1, ()) == ("0",)  # a learner on the processors, or none at all
    assert gpus(1, 1, (0,), colocated=True) == ("0",)
    assert gpus(2, 2, (0, 1), colocated=True) == ("0", "1")
    assert gpus(2, 1, (1,), colocated=True) == ("1",)


@pytest.mark.parametrize(
    ("device", "ranks", "count", "taken"),
    [
        ("auto", 1, 4, (0,)),
        ("cuda", 1, 1, (0,)),
        ("cuda:2", 1, 4, (2,)),
        ("cuda:1", 3, 4, (1,)),
        ("auto", 3, 4, (0, 1, 2)),
        ("cpu", 2, 4, ()),
        ("auto", 2, 0, ()),
    ],
)
def test_gpus_of_a_learner(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, count: int, taken: tuple[int, ...]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    config = compose(["model=tiny", "sampler=vllm_servers"])
    config = changed(config, {"learner.device": device, "learner.ranks": ranks})
    assert learner_gpus(config) == taken


def test_too_few_gpus() -> None:
    with pytest.raises(UserError, match=r"got 3, but beside the 1 of the learner there are 1 GPUs here"):
        gpus(2, 3, (0,))
    with pytest.raises(UserError, match=r"share with sampler\.colocated=true"):
        gpus(1, 1, (0,))


@pytest.mark.parametrize(
    ("index", "ours", "seen"),
    [
        (None, None, ""),
        (None, "2,3", ""),
        ("1", None, "1"),
        ("1", "", "1"),
        ("1", "2, 3", "3"),  # a part of the machine's GPUs is ours, and we count from 0
        ("0", "GPU-8c6e1b5a", "GPU-8c6e1b5a"),
    ],
)
def test_a_server_sees_one_of_the_gpus_that_are_ours(index: str | None, ours: str | None, seen: str) -> None:
    assert visible_gpu(index, ours) == seen
