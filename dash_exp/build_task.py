"""From config to questions: prompts, held-out sets, and who judges the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dash_exp.config import Config, DatasetConfig
from dash_exp.errors import Fault, UserError
from dash_exp.evaluation import EvalSet, Judge
from dash_exp.sampling.protocol import Decoding
from dash_exp.tasks.examples import ExampleSet, arithmetic, read_hub, read_jsonl
from dash_exp.tasks.prompts import PromptSet, make_prompts
from dash_exp.verifiers.frontends import InlineVerifier, PooledMathVerifier
from dash_exp.verifiers.integer import judge_integer
from dash_exp.verifiers.pool import VerifierPool


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked and judged: the training prompts and the held-out sets. `judges`: by the name of a
    prompt's task (a mixture has several)."""

    prompts: PromptSet
    decoding: Decoding
    judges: Mapping[str, Judge]
    sets: tuple[EvalSet, ...]


def load_examples(one: DatasetConfig) -> ExampleSet:
    """The examples of a dataset whose path has been resolved."""
    if one.kind == "arithmetic":
        return arithmetic(one.split)
    if one.path:
        return read_jsonl(Path(one.path), one.name, one.fields, one.answer_after)
    if one.hub:
        return read_hub(
            one.name, one.hub, one.hub_config, one.hub_split or one.split, one.fields, one.answer_after
        )
    raise UserError(
        Fault("dataset.path", f"{one.name!r} names no file and no hub dataset", "set dataset.path=<file>")
    )


def stop_ids(tokenizer: Any, stops: list[str]) -> tuple[int, ...]:
    """The end token and each stop text, which must be a single token."""
    ids = [tokenizer.eos_token_id]
    for text in stops:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        if len(tokens) != 1:
            raise UserError(
                Fault("dataset.stop", f"{text!r} is {len(tokens)} tokens of this tokenizer, not one",
                      "choose a text that is one token, or dataset.stop=[]")
            )  # fmt: skip
        ids.append(tokens[0])
    return tuple(dict.fromkeys(ids))


class Judges:
    """Verifiers by name; those that need worker processes share one pool, started on first use."""

    def __init__(self, workers: int, timeout_s: float, memory_mb: int):
        self._settings = {"workers": workers, "timeout_s": timeout_s, "memory_mb": memory_mb}
        self._pool: VerifierPool | None = None

    def get(self, verifier: str, extraction: str) -> Judge:
        if verifier == "integer":
            return InlineVerifier(judge_integer, "integer")
        if self._pool is None:
            self._pool = VerifierPool(**self._settings)  # type: ignore[arg-type]
        return PooledMathVerifier(self._pool, extraction)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def build_task(config: Config, tokenizer: Any, positions: int, judges: Judges) -> Task:
    """Prompts and judges. Reads the data; UserError for whatever is wrong with them."""
    faults: list[Fault] = []

    def prompts_of(one: DatasetConfig, limit: int | None) -> PromptSet | None:
        room = positions - (one.max_new_tokens or config.sampler.max_new_tokens)
        try:
            return make_prompts(
                load_examples(one), partial(_tokenize, tokenizer, config.model.add_bos),
                template=one.template, max_prompt_tokens=one.max_prompt_tokens,
                model_limit=room, limit=limit if limit is not None else one.limit,
            )  # fmt: skip
        except UserError as error:
            faults.extend(error.faults)
            return None

    def decoding(one: DatasetConfig, temperature: float) -> Decoding:
        length = one.max_new_tokens or config.sampler.max_new_tokens
        return Decoding(length, temperature, stop_ids(tokenizer, one.stop))

    train = prompts_of(config.dataset, config.dataset.limit)
    sets = []
    wanted = config.evaluation.before or config.evaluation.after or config.evaluation.every
    for label, one in config.evaluation.sets.items() if wanted else ():
        held_out = prompts_of(one, config.evaluation.limit)
        if held_out is not None:
            sets.append(
                EvalSet(
                    label,
                    held_out,
                    judges.get(one.verifier, one.extraction),
                    decoding(one, config.evaluation.temperature),
                    config.evaluation.samples,
                    f"{one.verifier}/{one.extraction}",
                )
            )
    if faults or train is None:
        raise UserError(faults)
    judge = judges.get(config.dataset.verifier, config.dataset.extraction)
    judged = {config.dataset.name: judge}
    return Task(train, decoding(config.dataset, config.sampler.temperature), judged, tuple(sets))


def _tokenize(tokenizer: Any, add_bos: bool, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=add_bos).input_ids
    return ids


def note_prompts(task: Task, note: Callable[[str], None]) -> None:
    for label, prompts in [("training", task.prompts), *((s.label, s.prompts) for s in task.sets)]:
        dropped = f", {prompts.dropped} too long and dropped" if prompts.dropped else ""
        note(f"{label}: {len(prompts.prompts)} prompts of {prompts.name}{dropped}")
