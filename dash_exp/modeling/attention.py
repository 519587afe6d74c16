"""Attention over groups that share their prompt, plugged into transformers' decoders with plain causal
attention (Llama, Qwen2 and their like).

Everything but attention works token by token, so tokens of a whole micro-batch lie in one row
[1, T] without padding. Only attention needs to know who sees whom, and it asks a *context* handed
down the forward call as `context=`:

`GroupRows`        training: one row per group, a prompt followed by all its completions; a
                   completion sees the prompt and itself. The prompt is computed once per group.
`CompletionRows`   training, long completions: one row per completion, whose keys are the prompt's
                   followed by its own; avoids the square of the group's length.
`DecodeCache`      sampling: prefill once per prompt, then one token per completion at a time.

Shapes inside: q [1, Hq, T, D], k and v [1, Hkv, T, D], as transformers hands them over; returned
[1, T, Hq, D]. Softmax in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

ATTENTION = "dash_grouped"


class AttentionContext(Protocol):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...


def _dispatch(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    context: AttentionContext | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    if context is None:
        raise ValueError("this model was prepared for packed groups: call it with context=")
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise ValueError("packed groups know plain attention only: no sliding window, softcap or sink")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return context.attend(module.layer_idx, query, key, value, scale), None


AttentionInterface.register(ATTENTION, _dispatch)


class _Take(torch.autograd.Function):
    """`x[index]` along the first axis, where each row of x is taken at most once (besides filler
    rows whose gradient is 0). Its backward is another gather: scatter-add is far slower on CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def attend_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Plain attention with an additive mask and shared key heads.

    q [R, Hq, Lq, D], k and v [R, Hkv, Lk, D], bias [R, 1, Lq, Lk] fp32 -> [R, Hq, Lq, D].
    Query heads of one key head are stacked as rows, so keys are never repeated.
    """
    rows, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    stacked = q.reshape(rows, kv_heads, heads // kv_heads * length, dim)
    scores = torch.matmul(stacked, k.transpose(-1, -2)).float().mul(scale)
    scores = scores.view(rows, heads, length, -1) + bias
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    mixed = torch.matmul(weights.view(rows, kv_heads, -1, k.shape[2]), v)
    return mixed.view(rows, heads, length, dim)


def additive_mask(visible: Tensor) -> Tensor:
    """True where a query sees a key -> 0, else a large negative number (never -inf: a row that
    sees nothing, a filler, must not become NaN)."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -1e30)


@dataclass(frozen=True)
class GroupRows:
    """One padded row per group. `index` [R, L]: flat token of each cell (0 for filler);
    `inverse` [T]: cell of each flat token; `bias` [R, 1, L, L]."""

    index: Tensor
    inverse: Tensor
    bias: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows, length = self.index.shape
        flat = self.index.reshape(-1)

        def cells(x: Tensor) -> Tensor:  # [1, H, T, D] -> [R, H, L, D]
            heads, tokens, dim = x.shape[1:]
            packed = x[0].transpose(0, 1).reshape(tokens, heads * dim)
            taken = _Take.apply(packed, flat, self.inverse)
            return taken.view(rows, length, heads, dim).transpose(1, 2)

        mixed = attend_rows(cells(q), cells(k), cells(v), self.bias, scale)
        back = mixed.transpose(1, 2).reshape(rows * length, -1)
        return _scatter_back(back, flat, self.inverse).view(1, -1, q.shape[1], q.shape[3])


class _ScatterBack(torch.autograd.Function):
    """Cells [R*L, F] back to flat tokens [T, F]; the gradient of filler cells is 0."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return cells.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        out = grads[0].index_select(0, index)
        filler = torch.ones(len(index), dtype=torch.bool, device=index.device)
        filler[inverse] = False
        return out.masked_fill_(filler[:, None], 0), None, None


def _scatter_back(cells: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    out: Tensor = _ScatterBack.apply(cells, index, inverse)
    return out


@dataclass(frozen=True)
class CompletionRows:
    """One row per prompt and one per completion. Prompt cells `prompt_index` [B, Lp] see earlier
    prompt cells; completion cells `own_index` [N, Lc] see the prompt of their group `group` [N] and
    their own earlier cells. `inverse` [T] points into the prompt cells followed by the own cells."""

    prompt_index: Tensor
    own_index: Tensor
    group: Tensor
    inverse: Tensor
    prompt_visible: Tensor
    own_visible: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads, dim = q.shape[1], q.shape[3]

        def cells(x: Tensor, index: Tensor) -> Tensor:
            return x[0].transpose(0, 1)[index].transpose(1, 2)

        attend = torch.nn.functional.scaled_dot_product_attention
        if q.is_cuda:  # kernels that take a mask there know no shared key heads
            k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
        k_prompt, v_prompt = cells(k, self.prompt_index), cells(v, self.prompt_index)
        out_prompt = attend(
            cells(q, self.prompt_index), k_prompt, v_prompt,
            attn_mask=self.prompt_visible, scale=scale, enable_gqa=True,
        )  # fmt: skip
        keys = torch.cat([k_prompt[self.group], cells(k, self.own_index)], dim=2)
        values = torch.cat([v_prompt[self.group], cells(v, self.own_index)], dim=2)
        out_own = attend(
            cells(q, self.own_index), keys, values,
            attn_mask=self.own_visible, scale=scale, enable_gqa=True,
        )  # fmt: skip
        both = torch.cat([out_prompt.transpose(1, 2).flatten(0, 1), out_own.transpose(1, 2).flatten(0, 1)])
        return both[self.inverse].view(1, -1, heads, dim)


class DecodeCache:
    """Keys and values of a batch being sampled. Prompts are right-aligned in `width` columns, so
    every row writes its next token in the same column.

    First a `prefill` over the flat tokens of P prompts, then `spread` to N rows (one per
    completion), then one `step` per token; `keep` drops finished rows.
    """

    def __init__(self, index: Tensor, present: Tensor, layers: int, extra: int):
        """index [P, W]: flat token of each column (0 for filler); present [P, W] bool."""
        self.index, self.present = index, present
        self.width = index.shape[1]
        self.columns = self.width + extra
        self.keys: list[Tensor] = [torch.empty(0)] * layers
        self.values: list[Tensor] = [torch.empty(0)] * layers
        self.column = -1
        causal = torch.ones(self.width, self.width, dtype=torch.bool, device=index.device).tril()
        self.bias = additive_mask((causal[None] & present[:, None, :])[:, None])
        self.inverse = torch.nonzero(present.reshape(-1)).squeeze(1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.column < 0:
            return self._prefill(layer, q, k, v, scale)
        rows = q.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.column] = k[0].transpose(0, 1)
        values[:, :, self.column] = v[0].transpose(0, 1)
        seen = self.column + 1
        query = q[0].transpose(0, 1).unsqueeze(2)  # [N, Hq, 1, D]
        mixed = attend_rows(query, keys[:, :, :seen], values[:, :, :seen], self.bias[..., :seen], scale)
        return mixed.view(1, rows, q.shape[1], q.shape[3])

    def _prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        def cells(x: Tensor) -> Tensor:
            return x[0].transpose(0, 1)[self.index].transpose(1, 2)

        keys, values = cells(k), cells(v)
        self.keys[layer], self.values[layer] = keys, values
        mixed = attend_rows(cells(q), keys, values, self.bias, scale)
        return mixed.transpose(1, 2).flatten(0, 1)[self.inverse][None]

    def spread(self, repeats: int) -> None:
        """From one row per prompt to `repeats` rows each, with room for the new tokens."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            self.keys[layer] = self._roomy(keys, repeats)
            self.values[layer] = self._roomy(values, repeats)
        seen = torch.ones(len(self.present), self.columns, dtype=torch.bool, device=self.index.device)
        seen[:, : self.width] = self.present
        self.bias = additive_mask(seen.repeat_interleave(repeats, 0)[:, None, None])
        self.column = self.width - 1

    def _roomy(self, cached: Tensor, repeats: int) -> Tensor:
        prompts, heads, width, dim = cached.shape
        out = cached.new_empty(prompts * repeats, heads, self.columns, dim)
        out[:, :, :width] = cached.repeat_interleave(repeats, 0)
        return out

    def step(self) -> None:
        """The next forward writes one column further right."""
        self.column += 1

    def keep(self, rows: Tensor) -> None:
        """Only the named rows stay, in that order."""
        self.keys = [x.index_select(0, rows) for x in self.keys]
        self.values = [x.index_select(0, rows) for x in self.values]
        self.bias = self.bias.index_select(0, rows)
