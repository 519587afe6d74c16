"""Demonstrations: given completions for supervised arms, from worked solutions or a teacher's traces."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dash_exp.errors import Fault, UserError
from dash_exp.tasks.prompts import PromptSet
from dash_exp.types import Completion, Prompt

Key = tuple[str, str]
"""A prompt's task and id."""
MAX_FAULTS = 20


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """A prompt for each completion that is shown, and the completions by prompt id. `too_long`: how many
    were dropped because they have more tokens than a completion may have."""

    prompts: PromptSet
    completions: Mapping[str, Completion]
    too_long: int


def demonstrate(
    prompts: PromptSet, texts: Mapping[Key, Sequence[str]],
    tokenize: Callable[[list[str]], list[list[int]]], *, stop_ids: Sequence[int], max_tokens: int,
) -> Demonstrations:  # fmt: skip
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
    if not kept:
        raise UserError(
            Fault("dataset", f"{prompts.name} has no demonstration of at most {max_tokens} tokens",
                  f"{too_long} are longer; raise sampler.max_new_tokens, or choose another dataset")
        )  # fmt: skip
    return Demonstrations(replace(prompts, prompts=tuple(kept)), completions, too_long)


def read_traces(path: Path) -> dict[str, list[str]]:
    """The texts of a traces file by the id of their example: JSON lines with `id` and `solution`.

    Raises UserError naming file and line of every faulty line (the first 20).
    """
    texts: dict[str, list[str]] = {}
    faults: list[Fault] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Fault("dataset.traces", f"{path} cannot be read: {error}")) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            name, text = row["id"], row["solution"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            faults.append(Fault(where, f"is no trace: {error!r}", 'expected {"id": ..., "solution": ...}'))
            continue
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            faults.append(Fault(where, "id and solution must be text, and not empty"))
            continue
        texts.setdefault(name, []).append(text)
    if not faults and not texts:
        faults.append(Fault(str(path), "holds no traces", "the teacher solved nothing?"))
    if faults:
        raise UserError(faults[:MAX_FAULTS])
    return texts
