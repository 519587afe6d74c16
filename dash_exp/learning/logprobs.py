"""Log-probabilities of completions: a model's hidden states, then the output layer chunk by chunk, so that
[T, V] never exists for a batch."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dash_exp.learning.packing import Packed

WEIGHT_ROWS = 1 << 14
"""Rows of the output matrix whose gradient is formed at a time: bounds the temporaries."""


class _Output(NamedTuple):
    """How logits are computed: divided by `temperature`, the first `vocabulary` of them, `chunk` rows at
    once. `entropy_gradient`: whether the entropy has one."""

    temperature: float
    vocabulary: int
    chunk: int
    entropy_gradient: bool


class _TokenLogprobs(torch.autograd.Function):
    """See `token_logprobs`. Rows are independent, so with a frozen output matrix the gradient of
    every row's log-probability with respect to its hidden state, (W[y] - sum_v p_v W[v]) / tau, is
    computed while the logits are at hand; backward only scales it. A trainable matrix needs the
    upstream gradient first, so its logits are computed again, chunk by chunk. The entropy H has the
    gradient -p_v (log p_v + H) with respect to logit v."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, output: _Output
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        frozen_output = hidden.requires_grad and not weight.requires_grad
        unit_gradient = torch.empty_like(hidden) if frozen_output else None
        unit_entropy = torch.empty_like(hidden) if frozen_output and output.entropy_gradient else None
        used = weight[: output.vocabulary]
        for start in range(0, len(hidden), output.chunk):
            stop = min(start + output.chunk, len(hidden))
            y = targets[start:stop]
            logits = _logits(hidden[start:stop], used, output.temperature)
            picked = logits.gather(1, y[:, None]).squeeze(1)
            max_logit = logits.amax(dim=1, keepdim=True)
            logits -= max_logit
            exp_logits = logits.exp()
            total = exp_logits.sum(dim=1)
            log_total = total.log()
            logprobs[start:stop] = picked - max_logit.squeeze(1) - log_total
            weighted = torch.linalg.vecdot(exp_logits, logits)
            entropy[start:stop] = log_total - weighted / total
            if unit_entropy is not None:
                slope = _entropy_slope(logits - log_total[:, None], entropy[start:stop])
                unit_entropy[start:stop] = (slope.to(hidden.dtype) @ used).div_(output.temperature)
            if unit_gradient is not None:
                # 1 - p_y has to be formed before rounding: bf16 cannot tell 0.998 from 1
                error = exp_logits.div_(total[:, None])
                error.scatter_add_(1, y[:, None], torch.full_like(error[:, :1], -1.0))
                unit_gradient[start:stop] = (error.to(hidden.dtype) @ used).div_(-output.temperature)
        ctx.save_for_backward(hidden, weight, targets, unit_gradient, unit_entropy)
        ctx.output = output
        if not output.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, unit_gradient, unit_entropy = ctx.saved_tensors
        temperature, vocabulary, chunk, entropy_gradient = ctx.output
        upstream, upstream_entropy = grads
        if unit_gradient is not None:
            gradient = upstream[:, None].to(unit_gradient.dtype) * unit_gradient
            if unit_entropy is not None:
                gradient += upstream_entropy[:, None].to(unit_entropy.dtype) * unit_entropy
            return gradient, None, None, None
        used = weight[:vocabulary]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            log_p = torch.log_softmax(_logits(hidden[part], used, temperature), dim=1)
            grad_logits = log_p.exp().neg_()
            grad_logits.scatter_add_(1, targets[part, None], torch.ones_like(upstream[part, None]))
            grad_logits *= upstream[part, None] / temperature
            if entropy_gradient:
                slope = _entropy_slope(log_p, -torch.linalg.vecdot(log_p.exp(), log_p))
                grad_logits += slope * (upstream_entropy[part, None] / temperature)
            low = grad_logits.to(hidden.dtype)
            grad_hidden[part] = low @ used
            if grad_weight is not None:
                for first in range(0, vocabulary, WEIGHT_ROWS):  # summed over chunks in fp32
                    rows = slice(first, min(first + WEIGHT_ROWS, vocabulary))
                    grad_weight[rows] += low[:, rows].t() @ hidden[part]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _entropy_slope(log_p: Tensor, entropy: Tensor) -> Tensor:
    """The derivative of each row's entropy with respect to its logits; `log_p` [T, V], `entropy` [T]."""
    return -log_p.exp() * (log_p + entropy[:, None])


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    chunk: int = 512,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden W^T / temperature)[target], and the entropy of that distribution in nats.

    hidden [T, H]; weight [V, H], the output matrix; targets [T] int64 -> two fp32 tensors [T]. The
    entropy carries a gradient only with `entropy_gradient`. Ids from `vocabulary` on (rows that pad the
    matrix beyond the tokenizer) have probability 0, as in the samplers. At most `chunk` rows of logits exist
    at once.

    Raises ValueError for shapes that do not fit and for a temperature that is not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{len(hidden)} hidden states but targets {tuple(targets.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    size = weight.shape[0] if vocabulary is None else min(vocabulary, weight.shape[0])
    out: tuple[Tensor, Tensor] = _TokenLogprobs.apply(
        hidden, weight, targets, _Output(temperature, size, chunk, entropy_gradient)
    )
    return out


class Scorer(torch.nn.Module):
    """Computes the log-probabilities and entropies [C] of a micro-batch's completions. One module, so that
    every weight is used inside one forward: those of a sharded model are complete only there."""

    def __init__(
        self, model: Any, *, temperature: float, vocabulary: int, chunk: int, entropy_gradient: bool = False
    ):
        super().__init__()
        self.model = model
        self.temperature, self.vocabulary, self.chunk = temperature, vocabulary, chunk
        self.entropy_gradient = entropy_gradient

    def forward(self, batch: Packed) -> tuple[Tensor, Tensor]:
        hidden = self.model.get_decoder()(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            context=batch.context,
            use_cache=False,
        ).last_hidden_state[0]
        return token_logprobs(
            hidden.index_select(0, batch.logit_index),
            self.model.get_output_embeddings().weight,
            batch.targets,
            temperature=self.temperature,
            vocabulary=self.vocabulary,
            chunk=self.chunk,
            entropy_gradient=self.entropy_gradient,
        )


def frozen_copy(model: Any, dtype: torch.dtype) -> Any:
    """An equal model without gradients, in another type; no tensor is ever held in both at once."""
    copies = {
        id(p): torch.nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo=copies).eval()
