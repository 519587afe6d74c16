"""Batched decoding with the learner's own transformers model, in this process.

A prompt is prefilled once for its group; finished rows leave the batch at once; each token takes one
uniform number, drawn per completion, so a completion depends on its seed and not on its neighbours
(up to the rounding of batched matrix products). On CPU the same requests give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dash_exp.modeling.attention import DecodeCache, shared_tokens
from dash_exp.seeding import uniforms
from dash_exp.types import Completion, Decoding, FinishReason, Group, Request

BLOCK = 256
"""Tokens per block of the two-level inverse-CDF draw."""
LIKELY = 256
"""Tokens searched first for the nucleus: enough for nearly all rows, and 18 times faster than sorting all
49,152 of them (one CPU core)."""


def draw(logits: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverting the cumulative distribution, or the best if greedy.

    logits [N, V] fp32, already divided by the temperature; uniform [N] float64 in [0, 1), or None for
    greedy -> token ids [N], log-probabilities [N] fp32. Two levels, blocks then tokens, so only sums
    and one block per row are accumulated in float64.
    """
    rows, size = logits.shape
    top = logits.amax(dim=1, keepdim=True)
    powers = (logits - top).exp_()
    if size % BLOCK:
        powers = torch.nn.functional.pad(powers, (0, BLOCK - size % BLOCK))
    blocks = powers.view(rows, -1, BLOCK)
    sums = blocks.sum(dim=2).double()
    if uniform is None:
        tokens = logits.argmax(dim=1)
    else:
        edges = sums.cumsum(dim=1)
        wanted = uniform * edges[:, -1]
        block = torch.searchsorted(edges, wanted[:, None], right=True).squeeze(1)
        block = _last_with_mass(block, sums)
        before = edges.gather(1, block[:, None]).squeeze(1) - sums.gather(1, block[:, None]).squeeze(1)
        inner = blocks[torch.arange(rows, device=logits.device), block].double()
        place = torch.searchsorted(inner.cumsum(dim=1), (wanted - before)[:, None], right=True).squeeze(1)
        tokens = block * BLOCK + _last_with_mass(place, inner)
    picked = logits.gather(1, tokens[:, None]).squeeze(1)
    return tokens, picked - top.squeeze(1) - sums.sum(dim=1).log().float()


def _last_with_mass(choice: Tensor, mass: Tensor) -> Tensor:
    """Rounding can put a uniform number just past the end, or on an edge whose cell is empty: move to
    the last cell, at or before the choice, that has any mass (else the first that has)."""
    cells = torch.arange(mass.shape[1], device=mass.device)
    allowed = (mass > 0) & (cells <= choice[:, None])
    last = torch.where(allowed, cells, -1).amax(dim=1)
    return torch.where(last >= 0, last, (mass > 0).int().argmax(dim=1))


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Leave each row the smallest set of its most likely tokens that has at least `top_p` of the mass;
    the others become -inf (Holtzman et al. 2020, section 3.1).

    logits [N, V] fp32, already divided by the temperature -> the same, masked. Tokens as likely as the
    last of the set belong to it: with bf16 logits ties are common, and no order among them is better.
    """
    return logits.masked_fill(logits < _least_likely_kept(logits, top_p, LIKELY), float("-inf"))


def _least_likely_kept(logits: Tensor, top_p: float, count: int) -> Tensor:
    """The logit [N, 1] at which the nucleus of each row ends, searched among its `count` largest first."""
    count = min(count, logits.shape[1])
    largest = logits.topk(count, dim=1).values
    shares = (largest - logits.logsumexp(dim=1, keepdim=True)).exp()
    place = (shares.double().cumsum(dim=1) < top_p).sum(dim=1)
    ends = largest.gather(1, place.clamp(max=count - 1)[:, None])
    flat = place == count  # these rows spread their mass over more tokens
    if count < logits.shape[1] and bool(flat.any()):
        ends[flat] = _least_likely_kept(logits[flat], top_p, logits.shape[1])
    return ends


class HFSampler:
    """Samples from `model`, which the learner updates in place: loading weights copies nothing. Where the
    model is a copy, `weights` yields the weights to copy."""

    def __init__(
        self,
        model: Any,
        decode: Callable[[Sequence[int]], str],
        *,
        vocabulary: int,
        max_sequences: int,
        weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
    ):
        """`decode` turns token ids into text; ids from `vocabulary` on are never drawn."""
        self.model, self.decode, self.weights = model, decode, weights
        self.vocabulary, self.max_sequences = vocabulary, max_sequences
        self.policy_version = 0

    def load_weights(self, version: int) -> None:
        for name, tensor in self.weights() if self.weights else ():
            self.model.get_parameter(name).data.copy_(tensor)
        self.policy_version = version

    def close(self) -> None:
        """Nothing to release."""

    def stream(
        self, requests: Sequence[Request], decoding: Decoding, at_once: int | None = None
    ) -> Iterator[Group]:
        wave: list[Request] = []
        for request in requests:
            if len(request.seeds) > self.max_sequences:
                yield self._in_parts(request, decoding)
                continue
            if wave and (len(wave) + 1) * len(request.seeds) > self.max_sequences:
                yield from self._wave(wave, decoding)
                wave = []
            wave.append(request)
        if wave:
            yield from self._wave(wave, decoding)

    def _in_parts(self, request: Request, decoding: Decoding) -> Group:
        """A group of more than `max_sequences` completions, in several waves."""
        completions: list[Completion] = []
        for first in range(0, len(request.seeds), self.max_sequences):
            seeds = request.seeds[first : first + self.max_sequences]
            for group in self._wave([replace(request, seeds=seeds)], decoding):
                completions += group.completions
        return Group(request.position, request.prompt, tuple(completions))

    def _wave(self, wave: list[Request], decoding: Decoding) -> Iterator[Group]:
        """Decode these requests together; yield a group when its last row has ended.

        No-grad is entered per forward, never around a `yield`: the caller backpropagates between two groups,
        and a suspended generator would leave gradients off for it.
        """
        device = self.model.get_input_embeddings().weight.device
        repeats = len(wave[0].seeds)
        cache, logits = self._prefill(wave, decoding, device)
        logits = logits.repeat_interleave(repeats, 0)
        random = self._uniforms(wave, decoding, device)
        tokens: list[list[int]] = [[] for _ in range(len(wave) * repeats)]
        logprobs: list[list[float]] = [[] for _ in tokens]
        running = torch.arange(len(tokens), device=device)
        left = [repeats] * len(wave)
        lengths = torch.tensor([len(r.prompt.token_ids) for r in wave], device=device)
        lengths = lengths.repeat_interleave(repeats)
        for column in range(decoding.max_new_tokens):
            uniform = None if random is None else random[running, column]
            cut = uniform is not None and decoding.top_p < 1
            ids, picked = draw(nucleus(logits, decoding.top_p) if cut else logits, uniform)
            going = []
            rows = zip(running.tolist(), ids.tolist(), picked.tolist(), strict=True)
            for place, (row, token, logprob) in enumerate(rows):
                tokens[row].append(token)
                logprobs[row].append(logprob)
                if token in decoding.stop_ids or column + 1 == decoding.max_new_tokens:
                    number = row // repeats
                    left[number] -= 1
                    if left[number] == 0:
                        own = slice(number * repeats, (number + 1) * repeats)
                        yield self._group(wave[number], tokens[own], logprobs[own], decoding)
                else:
                    going.append(place)
            if not going:
                return
            if len(going) < len(running):
                kept = torch.tensor(going, device=device)
                running, ids = running[kept], ids[kept]
                cache.keep(kept)
            logits = self._next(cache, ids, lengths[running] + column, decoding)

    def _group(
        self, request: Request, tokens: list[list[int]], logprobs: list[list[float]], decoding: Decoding
    ) -> Group:
        def completion(ids: list[int], values: list[float]) -> Completion:
            reason: FinishReason = "stop" if ids[-1] in decoding.stop_ids else "length"
            return Completion(tuple(ids), tuple(values), self.decode(ids), reason, self.policy_version)

        return Group(request.position, request.prompt, tuple(map(completion, tokens, logprobs)))

    def _uniforms(self, wave: list[Request], decoding: Decoding, device: torch.device) -> Tensor | None:
        if decoding.temperature == 0:
            return None
        seeds = [seed for request in wave for seed in request.seeds]
        numbers = np.stack([uniforms(seed, decoding.max_new_tokens) for seed in seeds])
        return torch.from_numpy(numbers).to(device)

    @torch.no_grad()
    def _prefill(
        self, wave: list[Request], decoding: Decoding, device: torch.device
    ) -> tuple[DecodeCache, Tensor]:
        prompts = [r.prompt.token_ids for r in wave]
        width = max(map(len, prompts))
        shared = shared_tokens(prompts)  # computed once
        index = torch.zeros(len(prompts), width, dtype=torch.long)
        present = torch.zeros(len(prompts), width, dtype=torch.bool)
        ends = list(accumulate(len(p) - shared for p in prompts))
        for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
            start = width - len(prompt)
            index[row, start : start + shared] = torch.arange(shared)
            index[row, start + shared :] = shared + torch.arange(end - len(prompt) + shared, end)
            present[row, start:] = True
        layers = self.model.config.num_hidden_layers
        cache = DecodeCache(index.to(device), present.to(device), layers, decoding.max_new_tokens, shared)
        own = [prompts[0], *(p[shared:] for p in prompts[1:])]
        flat = torch.tensor([t for p in own for t in p], device=device)
        places = torch.cat([torch.arange(len(p) - len(o), len(p)) for p, o in zip(prompts, own, strict=True)])
        hidden = self._forward(cache, flat, places.to(device))
        hidden = hidden[torch.tensor(ends, device=device) + (shared - 1)]
        cache.expand(len(wave[0].seeds))
        return cache, self._logits(hidden, decoding)

    @torch.no_grad()
    def _next(self, cache: DecodeCache, ids: Tensor, places: Tensor, decoding: Decoding) -> Tensor:
        cache.step()
        return self._logits(self._forward(cache, ids, places), decoding)

    def _forward(self, cache: DecodeCache, ids: Tensor, places: Tensor) -> Tensor:
        out: Tensor = self.model.get_decoder()(
            input_ids=ids[None], position_ids=places[None], context=cache, use_cache=False
        ).last_hidden_state[0]
        return out

    def _logits(self, hidden: Tensor, decoding: Decoding) -> Tensor:
        head = self.model.get_output_embeddings().weight[: self.vocabulary]
        logits = (hidden @ head.t()).float()
        return logits if decoding.scale == 1.0 else logits.div_(decoding.scale)
