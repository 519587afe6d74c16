"""Demonstrations: given completions for supervised arms, from worked solutions or a teacher's traces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dash_exp.errors import Fault, UserError
from dash_exp.tasks.prompts import PromptSet, Tokenize
from dash_exp.types import Completion, Prompt

Key = tuple[str, str]
"""A prompt's task and id."""


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """A prompt for each completion that is shown, and the completions by prompt id. `too_long`: how many
    were dropped because they have more tokens than a completion may have; `unmatched`: how many belong to
    no prompt (unknown, or dropped for its own length)."""

    prompts: PromptSet
    completions: Mapping[str, Completion]
    too_long: int
    unmatched: int

    def summary(self) -> str:
        dropped = f"{self.too_long} too long and dropped, {self.unmatched} without a prompt"
        return f"{len(self.completions)} for {self.prompts.name}, {dropped}"


def demonstrate(
    prompts: PromptSet,
    texts: Mapping[Key, Sequence[str]],
    tokenize: Tokenize,
    *,
    stop_ids: Sequence[int],
    max_tokens: int,
) -> Demonstrations:
    """Put texts behind their prompts. A completion ends like a sampled one: with a stop token of its own,
    or with the end token, `stop_ids[0]`. Several texts of a prompt become prompts of their own.

    Raises UserError when nothing is left.
    """
    pairs = [(p, n, text) for p in prompts.prompts for n, text in enumerate(texts.get((p.task, p.id), ()))]
    kept: list[Prompt] = []
    completions: dict[str, Completion] = {}
    too_long = 0
    ids_of_all = tokenize([text for _, _, text in pairs]) if pairs else []
    for (prompt, number, text), tokens in zip(pairs, ids_of_all, strict=True):
        ids = tokens if tokens and tokens[-1] in stop_ids else [*tokens, stop_ids[0]]
        if len(ids) > max_tokens:
            too_long += 1
            continue
        name = f"{prompt.task}/{prompt.id}#{number}"
        kept.append(replace(prompt, id=name))
        unknown = (math.nan,) * len(ids)  # nobody sampled them
        completions[name] = Completion(tuple(ids), unknown, text, "stop", 0)
    given = sum(map(len, texts.values()))
    if not kept:
        raise UserError(_nothing(prompts.name, given, too_long, max_tokens))
    unmatched = given - len(kept) - too_long
    return Demonstrations(replace(prompts, prompts=tuple(kept)), completions, too_long, unmatched)


def _nothing(name: str, given: int, too_long: int, max_tokens: int) -> Fault:
    if not given:
        what = f"{name} has no worked solutions to learn from"
        return Fault("dataset", what, "name their field, dataset.fields.solution=[...], or use sft_m")
    if not too_long:
        what = f"none of the {given} demonstrations belongs to a prompt of {name}"
        return Fault("dataset", what, "their ids must be those of the dataset that they were made from")
    what = f"{name} has no demonstration of at most {max_tokens} tokens"
    return Fault("dataset", what, f"{too_long} are longer; raise sampler.max_new_tokens")
