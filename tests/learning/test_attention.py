"""Attention by itself: its hand-written backward, and how completions are laid out in rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dash_exp.learning import packing
from dash_exp.learning.packing import pack
from dash_exp.modeling import attention
from dash_exp.modeling.attention import CompletionRows, VarlenRows, additive_mask, attend_rows
from dash_exp.types import AdvantagedGroup
from tests.conftest import make_groups
from tests.learning.reference import reference_gradient
from tests.learning.test_learner import (
    LENGTHS,
    PROMPTS,
    assert_close,
    learner_gradient,
    learner_of,
    objective,
    whole_groups,
)


def inputs(dtype: torch.dtype, rows: int = 2, queries: int = 5, keys: int = 7) -> list[torch.Tensor]:
    """q [R, 4, Lq, 8], k and v [R, 2, Lk, 8], and a causal bias in which the last query sees every key."""
    generator = torch.Generator().manual_seed(1)

    def draw(heads: int, length: int) -> torch.Tensor:
        # strides as `CompletionRows` has them
        x = torch.randn(rows, length, heads, 8, generator=generator, dtype=torch.float64)
        return x.to(dtype).transpose(1, 2).requires_grad_()

    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(rows, 1, -1, -1)
    return [draw(4, queries), draw(2, keys), draw(2, keys), additive_mask(visible)]


def test_plain_attention_and_its_gradients_equal_torchs() -> None:
    q, k, v, bias = inputs(torch.float64)
    upstream = torch.randn(2, 4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = attend_rows(q, k, v, bias.double(), 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias > -1, scale=0.3, enable_gqa=True
    )
    assert torch.allclose(found, expected, atol=1e-12)
    for name, a, b in zip(
        "qkv",
        torch.autograd.grad(found, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12), name


def test_the_backward_of_plain_attention_is_its_derivative() -> None:
    q, k, v, bias = inputs(torch.float64, rows=1, queries=3, keys=4)
    assert torch.autograd.gradcheck(lambda *x: attend_rows(*x, bias.double(), 0.3), (q, k, v))


def test_in_bf16_gradients_are_exact_to_its_rounding() -> None:
    """bf16 keeps 8 bits; a gradient is a sum of a few rounded products."""
    low = inputs(torch.bfloat16, queries=64, keys=64)
    high = [x.detach().float().requires_grad_() for x in low[:3]]
    upstream = torch.randn(2, 4, 64, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = torch.autograd.grad(attend_rows(*low, 0.35), low[:3], upstream)
    expected = torch.autograd.grad(attend_rows(*high, low[3], 0.35), high, upstream.float())
    for name, a, b in zip("qkv", found, expected, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.01, name


def test_torchs_kernels_give_the_same_gradient(
    tiny: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What long completions, and all on a GPU, go through."""
    monkeypatch.setattr(packing, "PLAIN_CELLS", 0)
    groups = make_groups(LENGTHS, PROMPTS)
    batch = whole_groups(groups, "completion")
    context = pack(batch).context
    assert isinstance(context, CompletionRows)
    assert all(block.mask.dtype == torch.bool for block in context.blocks)
    expected = reference_gradient(plain, plain, groups, objective(), "constant")
    assert_close(learner_gradient(learner_of(tiny, objective()), [batch], groups, "constant"), expected)


@pytest.mark.parametrize(("shared", "own"), [(7, [4, 6, 1]), (5, [1, 1, 1]), (3, [0, 4, 0])])
def test_what_all_prompts_begin_with_is_computed_once(
    tiny: Any, plain: Any, shared: int, own: list[int]
) -> None:
    """A template, say; also where a prompt has nothing else. The last token of each stays its own."""
    groups = make_groups([[3, 1, 5, 2], [2, 6, 1, 1], [1, 4, 3, 2]], [shared + n for n in own])
    first = groups[0].group.prompt.token_ids[:shared]

    def beginning(one: AdvantagedGroup) -> AdvantagedGroup:
        prompt = replace(one.group.prompt, token_ids=first + one.group.prompt.token_ids[shared:])
        return replace(one, scored=replace(one.scored, group=replace(one.group, prompt=prompt)))

    groups = [beginning(one) for one in groups]
    batch = whole_groups(groups, "auto")
    once = min(shared, min(shared + n for n in own) - 1)
    assert len(pack(batch).input_ids) == batch.tokens - 2 * once
    learner = learner_of(tiny, objective())
    apart = [learner.logprobs(whole_groups([one], "auto")) for one in groups]
    assert torch.allclose(learner.logprobs(batch), torch.cat(apart), atol=1e-5)
    expected = reference_gradient(plain, plain, groups, objective(), "constant")
    assert_close(learner_gradient(learner, [batch], groups, "constant"), expected)


def varlen_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: VarlenRows, scale: float
) -> torch.Tensor:
    """What the kernel computes, by its documentation: causal order aligned at the end of each sequence."""
    parts = []
    for number in range(len(rows.query_ends) - 1):
        (a, b), (c, d) = (ends[number : number + 2].tolist() for ends in (rows.query_ends, rows.key_ends))
        assert b - a <= rows.longest[0] and d - c <= rows.longest[1]
        query, key, value = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in (key, value))
        hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
        scores = (query @ key.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        parts.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("lengths", [LENGTHS, [[1, 1, 7, 2], [5, 1, 1, 1], [1, 1, 1, 1], [3, 9, 2, 4]]])
def test_sequences_of_different_lengths_give_the_same_gradient(
    tiny: Any, plain: Any, monkeypatch: pytest.MonkeyPatch, lengths: list[list[int]]
) -> None:
    """What a GPU goes through, with its kernel written out; single-token completions have no input."""
    monkeypatch.setattr(attention, "varlen_attention", varlen_reference)
    groups = make_groups(lengths, PROMPTS)
    batch = whole_groups(groups, "varlen")
    expected = reference_gradient(plain, plain, groups, objective(), "constant")
    assert_close(learner_gradient(learner_of(tiny, objective()), [batch], groups, "constant"), expected)


def test_torchs_own_kernel_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, and with the argument names of an older torch."""
    context = pack(whole_groups(make_groups(LENGTHS, PROMPTS), "varlen"), "meta").context
    assert isinstance(context, VarlenRows)
    tokens = sum(PROMPTS) + sum(n - 1 for own in LENGTHS for n in own)
    q, k, v = (torch.empty(1, heads, tokens, 8, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2))
    assert context.attend(0, q, k, v, 0.3).shape == (1, tokens, 4, 8)
    taken: dict[str, Any] = {}

    def older(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, is_causal: bool, scale: float
    ) -> Any:
        taken.update(causal=is_causal, heads=k.shape[1])
        return q

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", older)
    context.attend(0, q, k, v, 0.3)
    assert taken == {"causal": True, "heads": 4}


def test_a_long_completion_does_not_pad_the_others() -> None:
    lengths = [[2, 3, 4, 65], [9, 12, 20, 33]]
    context = pack(whole_groups(make_groups(lengths, [10, 6]), "completion")).context
    assert isinstance(context, CompletionRows)
    # inputs are one shorter: 64 and 32; 19 and 11; 8; 3 and 2; 1. A row is at least half as long as its block
    assert [block.shape for block in context.blocks] == [(2, 10), (2, 64), (2, 19), (1, 8), (2, 3), (1, 1)]
    assert len(context.index) == 20 + 128 + 38 + 8 + 6 + 1
    tokens = 16 + sum(n - 1 for own in lengths for n in own)
    assert sorted(context.index[context.inverse].tolist()) == list(range(tokens))
