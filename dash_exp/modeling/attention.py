"""Attention over groups that share their prompt, plugged into transformers' decoders with plain causal
attention (Llama, Qwen2 and their like).

Everything but attention works token by token, so tokens of a micro-batch lie in one row
[1, T] without padding. Only attention needs to know which token sees which; it asks a *context*, which the
forward call passes down as `context=`:

`GroupRows`        training: one row per group, a prompt followed by all its completions; a
                   completion sees the prompt and itself. The prompt is computed once per group.
`CompletionRows`   training, long completions: one row per completion, whose keys are the prompt's
                   followed by its own; avoids the square of the group's length. Rows of similar
                   length attend together.
`VarlenRows`       training on a GPU in half precision: no rows, masks or padding
`DecodeCache`      sampling: prefill once per prompt, then one token per completion at a time.

Shapes inside: q [1, Hq, T, D], k and v [1, Hkv, T, D], as transformers passes them; returned
[1, T, Hq, D]. Softmax in fp32.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

ATTENTION = "dash_grouped"


class AttentionContext(Protocol):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...


def _dispatch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls for each layer; `context` is what the model was called with."""
    context, scale = kwargs.get("context"), kwargs.get("scaling")
    if context is None:
        raise ValueError("this model was prepared for packed groups: call it with context=")
    if any(kwargs.get(name) is not None for name in ("sliding_window", "softcap", "s_aux")):
        raise ValueError("packed groups know plain attention only: no sliding window, softcap or sink")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return context.attend(module.layer_idx, query, key, value, scale), None


AttentionInterface.register(ATTENTION, _dispatch)


class _Take(torch.autograd.Function):
    """`x[index]` along the first axis, where each row of x is taken at most once (besides filler rows whose
    gradient is 0); but the first `shared` rows of x come first in each of `rows` equal parts of the index.
    Its backward is another gather: scatter-add is far slower on CPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, rows: int = 1, shared: int = 0
    ) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.rows, ctx.shared = rows, shared
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        out = grads[0].index_select(0, inverse)
        if ctx.shared:
            out[: ctx.shared] = grads[0].view(ctx.rows, -1, out.shape[1])[:, : ctx.shared].sum(0)
        return out, None, None, None, None


class _Attend(torch.autograd.Function):
    """Softmax attention that keeps nothing but its weights, in the type of the values, for its backward.
    Shapes as in `attend_rows`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        rows, heads, length, dim = q.shape
        kv_heads, seen = k.shape[1:3]
        stacked = q.reshape(rows, kv_heads, heads // kv_heads * length, dim)
        scores = torch.matmul(stacked, k.transpose(-1, -2)).view(rows, heads, length, seen)
        weights = torch.softmax(torch.add(bias, scores, alpha=scale), dim=-1).to(v.dtype)
        weights = weights.view(rows, kv_heads, -1, seen)
        mixed = torch.matmul(weights, v)
        ctx.save_for_backward(stacked, k, v, weights, mixed)
        ctx.scale = scale
        return mixed.view(rows, heads, length, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stacked, k, v, weights, mixed = ctx.saved_tensors
        upstream = grads[0].reshape(mixed.shape)
        # what a row's weights have in common: sum_j w_j dw_j = dO . O
        shared = (upstream.float() * mixed).sum(-1, keepdim=True)
        inner = torch.matmul(upstream, v.transpose(-1, -2)).sub_(shared).mul_(weights)
        grad_q = torch.matmul(inner, k).mul_(ctx.scale).view(grads[0].shape)
        grad_k = torch.matmul(inner.transpose(-1, -2), stacked).mul_(ctx.scale)
        return grad_q, grad_k, torch.matmul(weights.transpose(-1, -2), upstream), None, None


def attend_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Plain attention with an additive mask and shared key heads.

    q [R, Hq, Lq, D], k and v [R, Hkv, Lk, D], bias [R, 1, Lq, Lk] fp32 -> [R, Hq, Lq, D].
    Query heads of one key head are stacked as rows, so keys are never repeated.
    """
    mixed: Tensor = _Attend.apply(q, k, v, bias, scale)
    return mixed


def additive_mask(visible: Tensor) -> Tensor:
    """True where a query sees a key -> 0, else a large negative number (never -inf: a row that
    sees nothing, a filler, must not become NaN)."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -1e30)


@dataclass(frozen=True)
class GroupRows:
    """One padded row per group. `index` [R, L]: flat token of each cell (0 for filler);
    `inverse` [T]: cell of each flat token; `bias` [R, 1, L, L]. `shared`: how many tokens all groups begin
    with; they are the first group's."""

    index: Tensor
    inverse: Tensor
    bias: Tensor
    shared: int = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows, length = self.index.shape
        flat = self.index.reshape(-1)

        def cells(x: Tensor) -> Tensor:  # [1, H, T, D] -> [R, H, L, D]
            heads, tokens, dim = x.shape[1:]
            packed = x[0].transpose(0, 1).reshape(tokens, heads * dim)
            taken = _Take.apply(packed, flat, self.inverse, rows, self.shared)
            return taken.view(rows, length, heads, dim).transpose(1, 2)

        mixed = attend_rows(cells(q), cells(k), cells(v), self.bias, scale)
        back = mixed.transpose(1, 2).reshape(rows * length, -1)
        return _scatter_back(back, flat, self.inverse).view(1, -1, q.shape[1], q.shape[3])


def causal_rows(rows: int, length: int, device: torch.device) -> GroupRows:
    """Samples of equal length, each in a row of its own."""
    index = torch.arange(rows * length, device=device).view(rows, length)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return GroupRows(index, index.flatten(), additive_mask(causal.expand(rows, 1, -1, -1)))


@torch.no_grad()
def packing_fault(model: Any) -> str | None:
    """Why packed samples are not computed as each would be by itself, tried on three short ones; None where
    they are. Raises what the model raises where it cannot be called so."""
    length, device = 6, model.get_input_embeddings().weight.device
    head = model.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(head.shape[0], (3, length), generator=generator).to(device)

    def call(compute: Any, ids: Tensor) -> Any:
        places = torch.arange(length, device=device).repeat(len(ids))
        context = causal_rows(len(ids), length, device)
        return compute(
            input_ids=ids.flatten()[None], position_ids=places[None], context=context, use_cache=False
        )

    first, other = (
        call(model.get_decoder(), samples[[n, 2]]).last_hidden_state[0, length:].float() for n in (0, 1)
    )
    if not float((first - other).abs().max()) <= 5e-5 * float(first.std()):  # rounding is below 1e-6
        return "samples that are packed together change each other: a layer is without full attention"
    logits = call(model, samples[2:]).logits[0].float()
    if not float((first @ head.t().float() - logits).abs().max()) <= 1e-3 * float(logits.std()) + 1e-6:
        return "logits are not the output matrix times the last hidden state"
    return None


class _ScatterBack(torch.autograd.Function):
    """Cells [R*L, F] back to flat tokens [T, F]; the gradient of cells that no token comes from is 0."""

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
class Block:
    """Rows of similar length. `group` [R]: the prompt that comes before a row's own cells; None: these are
    the prompts. `mask` [R, 1, L, keys]: where a cell sees a key; bool for torch's own kernels, fp32 to be
    added for `attend_rows`."""

    group: Tensor | None
    mask: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.mask.shape[2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.mask.dtype != torch.bool:
            return attend_rows(q, k, v, self.mask, scale)
        if q.is_cuda:  # kernels that take a mask there know no shared key heads
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, scale=scale, enable_gqa=True
        )


@dataclass(frozen=True)
class CompletionRows:
    """One row per prompt, then one per completion, in blocks of similar length, so that a long one does not
    pad the others; the first block holds the prompts. `index` [cells]: flat token of each cell (0 for
    filler); `inverse` [T]: cell of each flat token."""

    blocks: tuple[Block, ...]
    index: Tensor
    inverse: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads, tokens, dim = q.shape[1:]
        shapes = [block.shape for block in self.blocks]

        def rows(x: Tensor) -> list[Tensor]:  # [1, H, T, D] -> [R, H, L, D] for each block
            packed = x[0].transpose(0, 1).reshape(tokens, -1)
            parts = _Take.apply(packed, self.index, self.inverse).split([r * n for r, n in shapes])
            return [
                part.view(r, n, x.shape[1], dim).transpose(1, 2)
                for part, (r, n) in zip(parts, shapes, strict=True)
            ]

        outs, keys, values = [], rows(k), rows(v)
        for block, query, key, value in zip(self.blocks, rows(q), keys, values, strict=True):
            if block.group is not None:
                key = torch.cat([keys[0].index_select(0, block.group), key], dim=2)
                value = torch.cat([values[0].index_select(0, block.group), value], dim=2)
            outs.append(block.attend(query, key, value, scale).transpose(1, 2).reshape(-1, heads * dim))
        return _scatter_back(torch.cat(outs), self.index, self.inverse).view(1, tokens, heads, dim)


@dataclass(frozen=True)
class VarlenRows:
    """Without mask or padding, by torch's flash attention for sequences of different lengths: one sequence
    per prompt and per completion, in the order of the input. The keys of a completion are its prompt's, then
    its own; causal order, aligned at the end, lets it see all of the prompt. `keys` [K]: flat token of each
    key; `query_ends`, `key_ends` [S + 1] int32: where sequences end; `longest`: of queries and of keys."""

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        query, *own = (x[0].transpose(0, 1) for x in (q, k, v))  # [1, H, T, D] -> [T, H, D]
        key, value = (x.index_select(0, self.keys) for x in own)
        return varlen_attention(query.contiguous(), key, value, self, scale)[None]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, rows: VarlenRows, scale: float) -> Tensor:
    """q [T, Hq, D], k and v [K, Hkv, D] -> [T, Hq, D]. The names of torch's arguments changed between its
    versions 2.10 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    more: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        more["enable_gqa"] = k.shape[1] != q.shape[1]
    elif k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    found = varlen_attn(q, k, v, rows.query_ends, rows.key_ends, *rows.longest, scale=scale, **more)
    assert isinstance(found, Tensor)
    return found


def varlen_fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention for sequences of different lengths runs there: on GPUs since Ampere, in
    half precision. On the meta device it is taken to."""
    if device.type == "meta":
        return dtype in (torch.bfloat16, torch.float16)
    half = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return (
        half
        and find_spec("torch.nn.attention.varlen") is not None
        and (torch.cuda.get_device_capability(device) >= (8, 0))
    )


def shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """With how many equal tokens all of several prompts begin (a template, worked examples); the last of each
    is never among them, since its hidden state predicts its completions."""
    if len(prompts) < 2:
        return 0
    equal = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in equal), min(map(len, prompts)) - 1)


class DecodeCache:
    """Keys and values of a batch being sampled. Prompts are right-aligned in `width` columns, so
    every row writes its next token in the same column.

    First a `prefill` over the flat tokens of P prompts, then `expand` to N rows (one per
    completion), then one `step` per token; `keep` drops finished rows.
    """

    def __init__(self, index: Tensor, present: Tensor, layers: int, extra: int, shared: int = 0):
        """index [P, W]: flat token of each column (0 for filler); present [P, W] bool. `shared`: how many
        tokens all prompts begin with; they are the first prompt's."""
        self.index, self.present = index, present
        self.width = index.shape[1]
        self.columns = self.width + extra
        self.keys: list[Tensor] = [torch.empty(0)] * layers
        self.values: list[Tensor] = [torch.empty(0)] * layers
        self.column = -1
        causal = torch.ones(self.width, self.width, dtype=torch.bool, device=index.device).tril()
        self.bias = additive_mask((causal[None] & present[:, None, :])[:, None])
        own = present & (present.cumsum(dim=1) > shared)
        own[0] = present[0]
        self.inverse = torch.nonzero(own.reshape(-1)).squeeze(1)

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

    def expand(self, repeats: int) -> None:
        """Repeat each prompt's row `repeats` times, with room for the new tokens."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            self.keys[layer] = self._with_room(keys, repeats)
            self.values[layer] = self._with_room(values, repeats)
        seen = torch.ones(len(self.present), self.columns, dtype=torch.bool, device=self.index.device)
        seen[:, : self.width] = self.present
        self.bias = additive_mask(seen.repeat_interleave(repeats, 0)[:, None, None])
        self.column = self.width - 1

    def _with_room(self, cached: Tensor, repeats: int) -> Tensor:
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
