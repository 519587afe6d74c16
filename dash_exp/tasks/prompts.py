"""Prompts: examples put into a template and tokenized, and the order in which they are asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dash_exp.errors import Fault, UserError
from dash_exp.sampling.protocol import Request
from dash_exp.seeding import permutation, seed_for
from dash_exp.tasks.examples import ExampleSet
from dash_exp.tasks.templates import TEMPLATES
from dash_exp.types import Prompt

Tokenize = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts ready for a sampler. `dropped`: how many were longer than `max_prompt_tokens`."""

    name: str
    prompts: tuple[Prompt, ...]
    dropped: int
    content_hash: str


def make_prompts(
    examples: ExampleSet, tokenize: Tokenize, *,
    template: str, max_prompt_tokens: int, model_limit: int, limit: int | None = None,
) -> PromptSet:  # fmt: skip
    """Template, tokenize, and drop what is longer than `max_prompt_tokens` (counted).

    `model_limit`: tokens of prompt the model has room for. Raises UserError when the setting admits
    a prompt that the model cannot take, or when nothing is left.
    """
    texts = [TEMPLATES[template](e.problem) for e in examples.examples]
    if limit is not None:
        texts = texts[:limit]
    ids = tokenize(texts)
    empty = [e.id for e, tokens in zip(examples.examples, ids, strict=False) if not tokens]
    if empty:
        raise UserError(Fault("dataset.template", f"{len(empty)} prompts have no tokens, e.g. {empty[0]}"))
    rows, dropped, too_long = [], 0, []
    for example, text, tokens in zip(examples.examples, texts, ids, strict=False):
        if len(tokens) > max_prompt_tokens:
            dropped += 1
        elif len(tokens) > model_limit:
            too_long.append((example.id, len(tokens)))
        else:
            rows.append(Prompt(example.id, examples.name, text, tuple(tokens), example.answer))
    if too_long:
        worst = max(too_long, key=lambda pair: pair[1])
        raise UserError(
            Fault(
                "dataset.max_prompt_tokens",
                f"{len(too_long)} prompts are longer than the {model_limit} tokens this model has "
                f"room for beside the completion (longest: {worst[0]}, {worst[1]} tokens)",
                f"set dataset.max_prompt_tokens={model_limit} to drop them",
            )
        )
    if not rows:
        raise UserError(
            Fault(
                "dataset.max_prompt_tokens",
                f"all {dropped} prompts of {examples.name} are longer than {max_prompt_tokens} tokens",
                "raise it, or look at dataset.template",
            )
        )
    return PromptSet(examples.name, tuple(rows), dropped, examples.content_hash)


def batch(prompts: PromptSet, run_seed: int, step: int, prompts_per_step: int) -> list[Prompt]:
    """The prompts of a step (from 1). Epoch after epoch of shuffled prompts, cut into batches; a
    function of its arguments alone, so nothing has to be saved to resume, and cells of equal seed
    see the same prompts in the same order."""
    count = len(prompts.prompts)
    chosen: list[Prompt] = []
    place = (step - 1) * prompts_per_step
    while len(chosen) < prompts_per_step:
        epoch, offset = divmod(place, count)
        order = permutation(seed_for(run_seed, "order", prompts.name, epoch), count)
        wanted = order[offset : offset + prompts_per_step - len(chosen)]
        chosen += [prompts.prompts[i] for i in wanted]
        place += len(wanted)
    return chosen


def requests(
    prompts: Sequence[Prompt], run_seed: int, purpose: str, step: int, group_size: int
) -> list[Request]:
    """Ask each prompt `group_size` times, each time with a seed of its own."""
    return [
        Request(
            position,
            prompt,
            tuple(
                seed_for(run_seed, purpose, step, position, prompt.id, index) for index in range(group_size)
            ),
        )
        for position, prompt in enumerate(prompts)
    ]
