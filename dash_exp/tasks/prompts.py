"""Prompts: examples put into a template and tokenized, and the order in which they are asked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dash_exp.errors import Fault, UserError
from dash_exp.seeding import permutation, seed_for, uniforms
from dash_exp.tasks.examples import Example, ExampleSet
from dash_exp.types import Prompt, Request

Tokenize = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts ready for a sampler. `dropped`: how many were longer than `max_prompt_tokens`. `weights`:
    in a mixture the share of each part, by the task its prompts name; else empty."""

    name: str
    prompts: tuple[Prompt, ...]
    dropped: int
    content_hash: str
    weights: tuple[tuple[str, float], ...] = ()


def make_prompts(
    examples: ExampleSet,
    render: Callable[[Example], str],
    tokenize: Tokenize,
    *,
    max_prompt_tokens: int,
    model_limit: int,
    limit: int | None = None,
) -> PromptSet:
    """Put into the template, tokenize, and drop what is longer than `max_prompt_tokens` (counted).

    `model_limit`: tokens of prompt the model has room for. Raises UserError when the setting admits
    a prompt that the model cannot take, or when nothing is left; its faults name the dataset's key.
    """
    used = examples.examples[:limit]
    texts = [render(e) for e in used]
    ids = tokenize(texts)
    empty = [e.id for e, tokens in zip(used, ids, strict=True) if not tokens]
    if empty:
        raise UserError(Fault("template", f"{len(empty)} prompts have no tokens, e.g. {empty[0]}"))
    rows, dropped, too_long = [], 0, []
    for example, text, tokens in zip(used, texts, ids, strict=True):
        if len(tokens) > max_prompt_tokens:
            dropped += 1
        elif len(tokens) > model_limit:
            too_long.append((example.id, len(tokens)))
        else:
            fields = json.dumps(dict(example.fields), ensure_ascii=False, default=str)
            rows.append(Prompt(example.id, examples.name, text, tuple(tokens), example.answer, fields))
    if too_long:
        worst, most = max(too_long, key=lambda pair: pair[1])
        room = f"the {model_limit} tokens this model has room for beside the completion"
        what = f"{len(too_long)} prompts are longer than {room} (longest: {worst}, {most} tokens)"
        hint = f"set it to {model_limit} to drop them" if model_limit > 0 else "shorten the completion"
        raise UserError(Fault("max_prompt_tokens", what, hint))
    if not rows:
        what = f"all {dropped} prompts of {examples.name} are longer than {max_prompt_tokens} tokens"
        raise UserError(Fault("max_prompt_tokens", what, "raise it, or look at the template"))
    return PromptSet(examples.name, tuple(rows), dropped, examples.content_hash)


def mixture(parts: Sequence[tuple[PromptSet, float]]) -> PromptSet:
    """Prompt sets with their weights as one; a single set is itself. Their names must differ."""
    if len(parts) == 1:
        return parts[0][0]
    sets = [one for one, _ in parts]
    hashes = "".join(f"{one.name}:{one.content_hash}\n" for one in sets)
    return PromptSet(
        "+".join(one.name for one in sets),
        tuple(prompt for one in sets for prompt in one.prompts),
        sum(one.dropped for one in sets),
        hashlib.sha256(hashes.encode()).hexdigest(),
        tuple((one.name, weight) for one, weight in parts),
    )


def prompts_at(prompts: PromptSet, run_seed: int, first: int, count: int) -> list[Prompt]:
    """`count` prompts from place `first` (from 0) of an endless order that depends only on prompts and seed,
    so cells of equal seed see the same prompts in the same order.

    The order is epoch after epoch of shuffled prompts. In a mixture each part has its own such order, and
    `_parts_of` says which part each place takes its prompt from."""
    if not prompts.weights:
        return _in_order(prompts.name, prompts.prompts, run_seed, first, count)
    pools = {name: [p for p in prompts.prompts if p.task == name] for name, _ in prompts.weights}
    weights = [(name, weight) for name, weight in prompts.weights if pools[name]]
    turns = _parts_of(np.arange(first + count), [weight for _, weight in weights], run_seed)
    chosen: dict[int, Prompt] = {}
    for number, (name, _) in enumerate(weights):
        places = np.flatnonzero(turns[first:] == number).tolist()
        before = int((turns[:first] == number).sum())
        own = _in_order(name, pools[name], run_seed, before, len(places))
        chosen.update(zip(places, own, strict=True))
    return [chosen[place] for place in range(count)]


def _in_order(name: str, prompts: Sequence[Prompt], run_seed: int, place: int, wanted: int) -> list[Prompt]:
    """`wanted` prompts from this place of the endless order."""
    count = len(prompts)
    chosen: list[Prompt] = []
    while len(chosen) < wanted:
        epoch, offset = divmod(place, count)
        order = permutation(seed_for(run_seed, "order", name, epoch), count)
        taken = order[offset : offset + wanted - len(chosen)]
        chosen += [prompts[i] for i in taken]
        place += len(taken)
    return chosen


GOLDEN = (math.sqrt(5) - 1) / 2


def _parts_of(places: np.ndarray, weights: Sequence[float], run_seed: int) -> np.ndarray:
    """The part of each place, by number; shape of `places`.

    Place p falls on u_p = (u_0 + p x golden ratio) mod 1, which fills the unit interval as evenly as a
    sequence can; the parts are its pieces, as long as their weights. So every stretch of the order has
    each part in proportion, within one or two prompts.
    """
    start = uniforms(seed_for(run_seed, "mixture"), 1)[0]
    points = (start + places * GOLDEN) % 1.0
    edges = np.cumsum(weights) / np.sum(weights)
    return np.searchsorted(edges[:-1], points, side="right")  # type: ignore[no-any-return]


def requests(
    prompts: Sequence[Prompt], run_seed: int, purpose: str, step: int, group_size: int, first: int = 0
) -> list[Request]:
    """Ask each prompt `group_size` times, each time with a seed of its own. `first`: the position of the
    first request in its batch."""

    def seeds(place: int, prompt: Prompt) -> tuple[int, ...]:
        return tuple(seed_for(run_seed, purpose, step, place, prompt.id, n) for n in range(group_size))

    return [Request(place, prompt, seeds(place, prompt)) for place, prompt in enumerate(prompts, first)]
