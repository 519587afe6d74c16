"""Micro-batches: groups laid end to end in one row of tokens, each prompt once per group.

The input holds, per group, the prompt and every forwarded completion except its last token (nothing is
predicted from it). Short groups share what all their prompts begin with, too. The hidden state of a prompt's
last token predicts the first token of all its completions. How a batch is cut into micro-batches never
changes the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from dash_exp.learning.losses import token_weight
from dash_exp.modeling.attention import (
    AttentionContext,
    Block,
    CompletionRows,
    GroupRows,
    VarlenRows,
    additive_mask,
    shared_tokens,
)
from dash_exp.types import AdvantagedGroup, Completion, Group, Prompt, Score, ScoredGroup

GROUP_ROW_CELLS = 1 << 18
"""Cells (rows x length^2) up to which complete groups share an attention row; longer ones go by
completion."""

PLAIN_CELLS = 1 << 18
"""Cells (rows x length x keys) up to which plain attention beats torch's kernel on CPU."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some completions of one group that are forwarded together."""

    source: AdvantagedGroup
    indices: tuple[int, ...]

    @property
    def tokens(self) -> int:
        group = self.source.group
        completion_tokens = sum(len(group.completions[i].token_ids) - 1 for i in self.indices)
        return len(group.prompt.token_ids) + completion_tokens


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What fits one forward and backward, not yet laid out: light enough to be sent to another rank.
    `rows`: how attention is laid out, `group`, `completion`, `varlen` or `auto`; the result is the same."""

    pieces: tuple[Piece, ...]
    aggregation: str
    rows: str = "auto"

    @property
    def tokens(self) -> int:
        """Input tokens."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each completion, in order."""
        return tuple(len(p.source.group.completions[i].token_ids) for p in self.pieces for i in p.indices)

    @property
    def positions(self) -> tuple[int, ...]:
        """The groups' places in the step's batch."""
        return tuple(piece.source.group.position for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Packed:
    """A micro-batch as tensors. T input tokens, C predicted completion tokens.

    `logit_index` [C]: input token whose hidden state predicts `targets` [C]. `advantages`, `weights`
    and `sampler_logprobs` [C] fp32 are aligned to `targets`. A completion that is forwarded for its KL
    term only has advantage 0. `lengths` [N]: tokens of each completion, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    context: AttentionContext
    logit_index: Tensor
    targets: Tensor
    advantages: Tensor
    weights: Tensor
    sampler_logprobs: Tensor
    lengths: Tensor


def pieces_of(group: AdvantagedGroup, max_tokens: int, keep_for_kl: bool) -> Iterator[Piece]:
    """The forwarded completions of a group, cut so that each piece fits `max_tokens`."""
    masked = group.masked or (False,) * len(group.kept)
    wanted = tuple(i for i, kept in enumerate(group.kept) if kept or (keep_for_kl and not masked[i]))
    return cut(Piece(group, wanted), max_tokens)


def cut(piece: Piece, max_tokens: int) -> Iterator[Piece]:
    """The same completions in pieces that fit `max_tokens` (a single one that does not fit is a piece of
    its own)."""
    group = piece.source.group
    taken: list[int] = []
    room = max_tokens - len(group.prompt.token_ids)
    for i in piece.indices:
        tokens = len(group.completions[i].token_ids) - 1
        if taken and tokens > room:
            yield Piece(piece.source, tuple(taken))
            taken, room = [], max_tokens - len(group.prompt.token_ids)
        taken.append(i)
        room -= tokens
    if taken:
        yield Piece(piece.source, tuple(taken))


class Packer:
    """Turns groups, as they arrive, into micro-batches of at most `max_tokens` input tokens."""

    def __init__(self, max_tokens: int, aggregation: str, keep_for_kl: bool):
        self.max_tokens = max_tokens
        self.aggregation = aggregation
        self.keep_for_kl = keep_for_kl
        self._pending: list[Piece] = []
        self._tokens = 0

    def add(self, group: AdvantagedGroup) -> Iterator[MicroBatch]:
        """Take a group; yield every micro-batch that this completes."""
        for piece in pieces_of(group, self.max_tokens, self.keep_for_kl):
            if self._pending and self._tokens + piece.tokens > self.max_tokens:
                yield from self.flush()
            self._pending.append(piece)
            self._tokens += piece.tokens

    def flush(self) -> Iterator[MicroBatch]:
        """Yield the pending micro-batch, if there is one."""
        if self._pending:
            yield MicroBatch(tuple(self._pending), self.aggregation)
        self._pending, self._tokens = [], 0


def empty_micro_batch() -> MicroBatch:
    """One token after one token, to be given weight 0."""
    completion = Completion((0,), (0.0,), "", "length", 0)
    group = Group(0, Prompt("nothing", "", "", (0,), ""), (completion,))
    source = AdvantagedGroup(ScoredGroup(group, (Score(0.0, "wrong"),)), (0.0,), (False,))
    return MicroBatch((Piece(source, (0,)),), "constant")


def largest_micro_batch(
    prompt_tokens: int, completion_tokens: int, group_size: int, packer: Packer
) -> MicroBatch:
    """The largest micro-batch that can occur: groups in which everything has its greatest length, and shorter
    completions that fill what is left of the packer's tokens."""
    group = _longest_group(prompt_tokens, [completion_tokens] * group_size)
    found: MicroBatch | None = None
    while found is None:  # one group more until the next has no room
        found = next(packer.add(group), None)
    for _ in packer.flush():
        pass
    room = packer.max_tokens - found.tokens - prompt_tokens
    lengths: list[int] = []
    while room > 0 and len(lengths) < group_size:
        lengths.append(min(completion_tokens, room + 1))
        room -= lengths[-1] - 1
    rest = pieces_of(_longest_group(prompt_tokens, lengths), packer.max_tokens, False) if lengths else ()
    return replace(found, pieces=(*found.pieces, *rest))


def _longest_group(prompt_tokens: int, lengths: Sequence[int]) -> AdvantagedGroup:
    prompt = Prompt("longest", "preflight", "", (0,) * prompt_tokens, "")
    completions = tuple(Completion((0,) * n, (0.0,) * n, "", "length", 0) for n in lengths)
    scored = ScoredGroup(Group(0, prompt, completions), (Score(0.0, "wrong"),) * len(lengths))
    return AdvantagedGroup(scored, (1.0,) * len(lengths), (True,) * len(lengths))


def pack(batch: MicroBatch, device: torch.device | str = "cpu", varlen: bool = False) -> Packed:
    """Lay a micro-batch out. `varlen`: whether the device has that attention, so that `auto` means it."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, int, list[tuple[int, int]]]] = []
    index: list[int] = []
    targets: list[int] = []
    rows = rows_of(batch, varlen)
    shared = shared_tokens([p.source.group.prompt.token_ids for p in batch.pieces]) if rows == "group" else 0
    for piece in batch.pieces:
        prompt = piece.source.group.prompt.token_ids
        start = len(ids)
        known = shared if ids else 0  # the first group's
        ids += prompt[known:]
        positions += range(known, len(prompt))
        stop = len(ids)
        owns: list[tuple[int, int]] = []
        for i in piece.indices:
            tokens = piece.source.group.completions[i].token_ids
            begin = len(ids)
            ids += tokens[:-1]
            positions += range(len(prompt), len(prompt) + len(tokens) - 1)
            owns.append((begin, len(ids)))
            index += [stop - 1, *range(begin, len(ids))]
            targets += tokens
        spans.append((start, stop, owns))
    samples = [(p, i) for p in batch.pieces for i in p.indices]
    completions = [p.source.group.completions[i] for p, i in samples]
    lengths = batch.lengths
    repeats = torch.tensor(lengths)

    here = partial(to_device, device=device)

    def per_token(values: list[float]) -> Tensor:
        return here(torch.tensor(values, dtype=torch.float32).repeat_interleave(repeats))

    kept = [p.source.advantages[i] if p.source.kept[i] else 0.0 for p, i in samples]
    return Packed(
        input_ids=here(ids),
        position_ids=here(positions),
        context=_attention(spans, shared, device, rows),
        logit_index=here(index),
        targets=here(targets),
        advantages=per_token(kept),
        weights=per_token([token_weight(length, batch.aggregation) for length in lengths]),
        sampler_logprobs=here(list(chain.from_iterable(c.logprobs for c in completions))),
        lengths=here(repeats),
    )


def to_device(values: list[Any] | Tensor, device: torch.device | str) -> Tensor:
    """A copy there that is not waited for."""
    tensor = torch.as_tensor(values)
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


Row = tuple[int, int, int]
"""First and last+1 input token of a prompt or completion, and the number of its prompt."""

Spans = list[tuple[int, int, list[tuple[int, int]]]]
"""Per piece: first and last+1 input token of the prompt, and of each completion."""


def rows_of(batch: MicroBatch, varlen: bool) -> str:
    """How attention is laid out."""
    if batch.rows != "auto":
        return batch.rows
    longest = max(piece.tokens for piece in batch.pieces)
    fits = len(batch.pieces) * longest**2 <= GROUP_ROW_CELLS
    return "varlen" if varlen else "group" if fits else "completion"


def _attention(spans: Spans, shared: int, device: torch.device | str, rows: str) -> AttentionContext:
    if rows == "varlen":
        return _varlen_rows(spans, device)
    if rows == "group":
        return _group_rows(spans, shared, device)
    return _completion_rows(spans, device)


def _varlen_rows(spans: Spans, device: torch.device | str) -> VarlenRows:
    sequences = [  # first and last+1 input token of what comes before, and of a sequence itself
        row
        for start, stop, owns in spans
        for row in ((start, start, start, stop), *((start, stop, *own) for own in owns))
        if row[2] < row[3]
    ]
    keys = [torch.arange(*part) for a, b, c, d in sequences for part in ((a, b), (c, d))]
    sizes = [(d - c, b - a + d - c) for a, b, c, d in sequences]
    ends = torch.tensor([[0, *accumulate(one)] for one in zip(*sizes, strict=True)], dtype=torch.int32)
    longest = max(queries for queries, _ in sizes), max(keys for _, keys in sizes)
    index, queries, all_keys = (to_device(t, device) for t in (torch.cat(keys), *ends))
    return VarlenRows(index, queries, all_keys, longest)


def _group_rows(spans: Spans, shared: int, device: torch.device | str) -> GroupRows:
    ends = [owns[-1][1] if owns else stop for _, stop, owns in spans]
    # where a row's own tokens begin: behind what it shares with the first
    befores = [0, *(shared for _ in spans[1:])]
    longest = max(before + end - span[0] for before, end, span in zip(befores, ends, spans, strict=True))
    index = torch.arange(shared).repeat(len(spans), 1)
    index = torch.nn.functional.pad(index, (0, longest - shared))
    inverse = torch.empty(ends[-1], dtype=torch.long)
    segment = torch.full((len(spans), longest), -1)  # 0: prompt, n: n-th completion, -1: filler
    for row, (before, end, (start, stop, owns)) in enumerate(zip(befores, ends, spans, strict=True)):
        index[row, before : before + end - start] = torch.arange(start, end)
        inverse[start:end] = row * longest + before + torch.arange(end - start)
        segment[row, : before + stop - start] = 0
        for number, (begin, finish) in enumerate(owns, 1):
            segment[row, before + begin - start : before + finish - start] = number
    earlier = torch.ones(longest, longest, dtype=torch.bool).tril()
    same = segment[:, :, None] == segment[:, None, :]
    prompt_key = (segment == 0)[:, None, :]
    visible = earlier & (same | (prompt_key & (segment >= 0)[:, :, None]))
    bias = additive_mask(visible[:, None]).to(device)
    return GroupRows(index.to(device), inverse.to(device), bias, shared)


def _completion_rows(spans: Spans, device: torch.device | str) -> CompletionRows:
    prompts: list[Row] = [(start, stop, row) for row, (start, stop, _) in enumerate(spans)]
    owns: list[Row] = [(begin, end, row) for row, (_, _, all_) in enumerate(spans) for begin, end in all_]
    sizes = torch.tensor([stop - start for start, stop, _ in spans])
    before = torch.arange(int(sizes.max())) < sizes[:, None]  # [prompts, Lp]
    cells: list[Tensor] = []
    blocks: list[Block] = []
    inverse, count = torch.empty(max(end for _, end, _ in (*prompts, *owns)), dtype=torch.long), 0
    for part in [prompts, *_similar(owns)]:
        length = max(1, max(end - begin for begin, end, _ in part))
        index = torch.zeros(len(part), length, dtype=torch.long)
        for row, (begin, end, _) in enumerate(part):
            index[row, : end - begin] = torch.arange(begin, end)
            inverse[begin:end] = count + row * length + torch.arange(end - begin)
        cells.append(index.reshape(-1))
        count += index.numel()
        # filler comes last in a row: causal order hides it
        visible = torch.ones(length, length, dtype=torch.bool).tril().expand(len(part), -1, -1)
        group = None if not blocks else torch.tensor([row for _, _, row in part])
        if group is not None:
            visible = torch.cat([before[group][:, None].expand(-1, length, -1), visible], dim=2)
            group = group.to(device)
        blocks.append(Block(group, _mask(visible[:, None], device)))
    return CompletionRows(tuple(blocks), torch.cat(cells).to(device), inverse.to(device))


def _mask(visible: Tensor, device: torch.device | str) -> Tensor:
    """A mask for torch's kernels, or for plain attention where that is faster: on CPU, where theirs has a
    slow backward, while there are few weights to keep."""
    if torch.device(device).type == "cpu" and visible.numel() <= PLAIN_CELLS:
        return additive_mask(visible)
    return visible.to(device)


def _similar(owns: Sequence[Row]) -> Iterator[list[Row]]:
    """Longest first; each part holds what is at least half as long as its first."""
    part: list[Row] = []
    for row in sorted(owns, key=lambda row: row[0] - row[1]):
        if part and 2 * (row[1] - row[0]) < part[0][1] - part[0][0]:
            yield part
            part = []
        part.append(row)
    if part:
        yield part
