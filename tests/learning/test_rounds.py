"""Rounds: every completion once, nobody works longer than need be, one rank as it always was."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.learning.packing import MicroBatch, Packer, empty_micro_batch, pack, pieces_of
from dash_exp.learning.rounds import Round, Rounds, balanced, length
from dash_exp.types import AdvantagedGroup
from tests.conftest import make_groups


def rounds_of(groups: list[AdvantagedGroup], max_tokens: int, width: int) -> list[Round]:
    rounds = Rounds(Packer(max_tokens, "constant", keep_for_kl=False), width)
    return [one for g in groups for one in rounds.add(g)] + list(rounds.flush())


def packed(groups: list[AdvantagedGroup], max_tokens: int) -> list[MicroBatch]:
    packer = Packer(max_tokens, "constant", keep_for_kl=False)
    return [b for g in groups for b in packer.add(g)] + list(packer.flush())


def completions(batches: list[MicroBatch]) -> Counter[tuple[int, int]]:
    return Counter((p.source.group.position, i) for b in batches for p in b.pieces for i in p.indices)


LENGTHS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=8)


@given(
    lengths=LENGTHS,
    prompt=st.integers(1, 40),
    width=st.integers(1, 5),
    most=st.integers(1, 90),
    kept=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_kept_completion_once_in_micro_batches_that_fit(
    lengths: list[list[int]], prompt: int, width: int, most: int, kept: float
) -> None:
    groups = make_groups(lengths, [prompt] * len(lengths), kept=kept)
    made = rounds_of(groups, most, width)
    expected = [(g.group.position, i) for g in groups for i, k in enumerate(g.kept) if k]
    assert completions([b for one in made for b in one]) == Counter(expected)
    for one in made:
        assert 1 <= len(one) <= width
        for batch in one:
            assert batch.tokens <= most or len(batch.lengths) == 1
            assert list(batch.positions) == sorted(batch.positions)


@given(lengths=LENGTHS, most=st.integers(1, 90))
def test_one_rank_takes_the_packers_micro_batches_in_order(lengths: list[list[int]], most: int) -> None:
    groups = make_groups(lengths, [5] * len(lengths))
    expected = [(batch,) for batch in packed(groups, most)]
    assert rounds_of(groups, most, 1) == expected
    assert balanced(packed(groups, most), 1, most) == expected


@given(lengths=LENGTHS, width=st.integers(1, 5), most=st.integers(1, 90))
def test_a_batch_known_whole_takes_no_longer_than_in_order(
    lengths: list[list[int]], width: int, most: int
) -> None:
    ready = packed(make_groups(lengths, [5] * len(lengths)), most)
    in_order = [tuple(ready[i : i + width]) for i in range(0, len(ready), width)]
    assert length(balanced(ready, width, most)) <= length(in_order)


def test_groups_are_distributed_longest_first() -> None:
    """Prompts of 1 token: a group of one completion of n tokens costs n. 9 | 7 + 2 rather than 9 + 7 | 2."""
    groups = make_groups([[9], [7], [2]], [1, 1, 1])
    (one,) = rounds_of(groups, 20, 2)
    assert [batch.tokens for batch in one] == [9, 9]


def test_two_rounds_where_one_would_be_too_large() -> None:
    """20 tokens for 2 ranks of 10, but 8 + 3 do not fit: 8 | 6, then 3 | 3 (in order: 3 | 8, then 9)."""
    made = balanced(packed(make_groups([[3], [8], [3], [6]], [1] * 4), 10), 2, 10)
    assert [[batch.tokens for batch in one] for one in made] == [[8, 6], [3, 3]]


def test_a_single_group_is_cut_where_that_is_shorter() -> None:
    """4 completions of 10 tokens after a prompt of 2: 2 + 4 x 9 = 38 at once, 2 + 2 x 9 = 20 in halves."""
    (one,) = rounds_of(make_groups([[10] * 4], [2]), 100, 2)
    assert [batch.tokens for batch in one] == [20, 20]


def test_a_full_round_does_not_wait_for_the_flush() -> None:
    rounds = Rounds(Packer(10, "constant", keep_for_kl=False), 2)
    made = [list(rounds.add(g)) for g in make_groups([[8], [8], [8], [8]], [2] * 4)]
    assert [len(m) for m in made] == [0, 0, 1, 0]  # a micro-batch is complete once the next piece comes
    assert [len(one) for one in rounds.flush()] == [2]


@pytest.mark.parametrize("width", [1, 2])
def test_what_is_held_goes_out_in_a_gap(width: int) -> None:
    """Once."""
    rounds = Rounds(Packer(100, "constant", keep_for_kl=False), width)
    groups = make_groups([[8], [6]], [2, 2])
    assert [one for g in groups for one in rounds.add(g)] == []
    (made,) = rounds.flush()
    assert completions(list(made)) == Counter({(0, 0): 1, (1, 0): 1})
    assert len(made) == width
    assert list(rounds.flush()) == []


@pytest.mark.parametrize("width", [1, 2, 3])
def test_nothing_kept_makes_no_round(width: int) -> None:
    groups = make_groups([[3, 4]], [2], kept=0.0)
    assert list(pieces_of(groups[0], 10, keep_for_kl=False)) == []
    assert rounds_of(groups, 10, width) == []


def test_an_empty_micro_batch_is_one_token_without_weight() -> None:
    packed = pack(empty_micro_batch())
    assert packed.input_ids.tolist() == [0] and len(packed.targets) == 1
    assert packed.advantages.tolist() == [0.0]
