"""From config to questions: prompts, held-out sets, and who judges the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dash_exp.config.schema import Config, DatasetConfig
from dash_exp.config.schema import parts_of as parts_of
from dash_exp.errors import Fault, UserError
from dash_exp.evaluation.metrics import EvalSet
from dash_exp.tasks.examples import ExampleSet
from dash_exp.tasks.generated import arithmetic, functions
from dash_exp.tasks.gym import gym_examples
from dash_exp.tasks.prompts import PromptSet, make_prompts, mixture
from dash_exp.tasks.rows import Layout
from dash_exp.tasks.sources import read_hub, read_jsonl
from dash_exp.tasks.templates import CHATS, Chat, Style, renderer
from dash_exp.types import Decoding
from dash_exp.verifiers.judges import (
    InlineVerifier,
    PooledCodeVerifier,
    PooledGymVerifier,
    PooledMathVerifier,
)
from dash_exp.verifiers.math.integer import judge_integer
from dash_exp.verifiers.pool import VerifierPool
from dash_exp.verifiers.types import Judge


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked and judged: the training prompts and the held-out sets. `judges`: by the name of a
    prompt's task (a mixture has several). `warnings`: what the judges want known."""

    prompts: PromptSet
    decoding: Decoding
    judges: Mapping[str, Judge]
    sets: tuple[EvalSet, ...]
    warnings: tuple[str, ...] = ()


def load_examples(one: DatasetConfig) -> ExampleSet:
    """The examples of a dataset whose path has been resolved."""
    if one.kind == "arithmetic":
        return replace(arithmetic(one.split), name=one.name)
    if one.kind == "functions":
        return replace(functions(one.split), name=one.name)
    if one.kind == "reasoning_gym":
        assert one.task is not None and one.size is not None
        return gym_examples(
            one.name,
            one.task,
            one.task_options,
            split=one.split,
            size=one.size,
            extraction=one.extraction,
        )
    if one.path:
        return read_jsonl(Path(one.path), one.name, layout(one))
    if one.hub:
        return read_hub(one.name, one.hub, one.hub_config, one.hub_split or one.split, layout(one))
    raise UserError(Fault("path", f"{one.name!r} names no file and no hub dataset", "set it to a file"))


def layout(one: DatasetConfig) -> Layout:
    """How the rows of a dataset are read."""
    return Layout(
        fields=one.fields,
        code=one.verifier == "code",
        answer_after=one.answer_after,
        solution_drop=one.solution_drop,
        id_prefix=one.id_prefix,
        id_range=(one.id_range[0], one.id_range[1]) if one.id_range else None,
        tests_call=one.tests_call,
        timeouts=one.timeouts,
    )


def stop_ids(tokenizer: Any, stops: list[str]) -> tuple[int, ...]:
    """The end token and each stop text, which must be a single token."""
    ids = [tokenizer.eos_token_id]
    for text in stops:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        if len(tokens) != 1:
            raise UserError(
                Fault(
                    "stop",
                    f"{text!r} is {len(tokens)} tokens of this tokenizer, not one",
                    "choose a text that is one token, or []",
                )
            )
        ids.append(tokens[0])
    return tuple(dict.fromkeys(ids))


class Judges:
    """Verifiers by name, each made on first use. Extractions of maths share a pool. `warnings`: what the
    ones in use want known, such as a sandbox that the system lacks."""

    def __init__(self, workers: int, timeout_s: float, memory_mb: int):
        self.workers, self.timeout_s, self.memory_mb = workers, timeout_s, memory_mb
        self._made: dict[tuple[str, str], Judge] = {}
        self._pool: VerifierPool | None = None

    def get(self, verifier: str, extraction: str) -> Judge:
        """Raises UserError where programs cannot be confined at all."""
        key = (verifier, extraction)
        if key not in self._made:
            try:
                self._made[key] = self._make(verifier, extraction)
            except RuntimeError as error:
                raise UserError(Fault("verifier", f"{verifier} cannot be used here: {error}")) from error
        return self._made[key]

    def limits(self, verifier: str) -> str:
        """What may turn a verdict into a timeout or a crash."""
        return "" if verifier == "integer" else f"{self.timeout_s:g} s, {self.memory_mb} MB"

    @property
    def warnings(self) -> tuple[str, ...]:
        found = [warning for made in self._made.values() for warning in getattr(made, "warnings", ())]
        return tuple(dict.fromkeys(found))

    def _make(self, verifier: str, extraction: str) -> Judge:
        if verifier == "integer":
            return InlineVerifier(judge_integer, "integer")
        if verifier == "code":
            return PooledCodeVerifier(self.workers, self.timeout_s, self.memory_mb)
        if verifier == "reasoning_gym":
            return PooledGymVerifier(self.workers, self.timeout_s, self.memory_mb, extraction)
        if self._pool is None:
            self._pool = VerifierPool(self.workers, self.timeout_s, self.memory_mb)
        return PooledMathVerifier(self._pool, extraction)

    def close(self) -> None:
        for made in self._made.values():
            made.close()


def build_task(config: Config, tokenizer: Any, positions: int, judges: Judges) -> Task:
    """Prompts and judges. Reads the data; UserError for whatever is wrong with them."""
    ask = Questions(config, tokenizer, positions, judges)
    data, faults = config.dataset, list[Fault]()
    train = _collecting(faults, ask.training)
    wanted = config.evaluation.before or config.evaluation.after or config.evaluation.every
    sets = _collecting(faults, ask.held_out) if wanted else ()
    if faults or train is None or sets is None:
        raise UserError(faults)
    judged = {one.name: judges.get(one.verifier, one.extraction) for one in parts_of(data).values()}
    decoding = ask.decoding(data, config.sampler.temperature)
    return Task(train, decoding, judged, sets, judges.warnings)


@dataclass(frozen=True, slots=True)
class Questions:
    """Turns the datasets of a config into prompts for one model, and says how they are decoded and
    judged. `positions`: tokens that the model can take."""

    config: Config
    tokenizer: Any
    positions: int
    judges: Judges

    def training(self) -> PromptSet:
        """The prompts of the dataset and of what is mixed into it. Raises UserError with all faults."""
        faults: list[Fault] = []
        parts = []
        for place, one in parts_of(self.config.dataset).items():
            made = _collecting(faults, partial(self.prompts, one, one.limit, place))
            parts += [(made, one.weight)] if made is not None else []
        if faults:
            raise UserError(faults)
        return mixture(parts)

    def prompts(self, one: DatasetConfig, limit: int | None, place: str = "dataset") -> PromptSet:
        """The prompts of one dataset, whose key is `place`."""
        add_bos = self.config.model.add_bos and one.template not in CHATS  # a chat has its own
        shots = [(shot["problem"], shot["solution"]) for shot in one.shots]
        with placed(place):
            return make_prompts(
                load_examples(one),
                renderer(one.template, Style(shots, chat_form(self.tokenizer))),
                partial(tokenize, self.tokenizer, add_bos),
                max_prompt_tokens=one.max_prompt_tokens,
                model_limit=self.positions - self._length(one),
                limit=limit if limit is not None else one.limit,
            )

    def decoding(
        self, one: DatasetConfig, temperature: float, top_p: float = 1.0, place: str = "dataset"
    ) -> Decoding:
        with placed(place):
            return Decoding(self._length(one), temperature, stop_ids(self.tokenizer, one.stop), top_p)

    def held_out(self) -> tuple[EvalSet, ...]:
        """The sets to evaluate on. Raises UserError with the faults of all of them."""
        faults: list[Fault] = []
        sets = [
            _collecting(faults, lambda label=label, one=one: self._held_out(label, one))  # type: ignore[misc]
            for label, one in self.config.evaluation.sets.items()
        ]
        if faults:
            raise UserError(faults)
        return tuple(one for one in sets if one is not None)

    def _held_out(self, label: str, one: DatasetConfig) -> EvalSet:
        asked, place = self.config.evaluation, f"evaluation.sets.{label}"
        return EvalSet(
            label,
            self.prompts(replace(one, template=asked.template or one.template), asked.limit, place),
            self.judges.get(one.verifier, one.extraction),
            self.decoding(one, asked.temperature, asked.top_p, place),
            asked.samples,
            f"{one.verifier}/{one.extraction}/{self.judges.limits(one.verifier)}",
            tuple(asked.k),
        )

    def _length(self, one: DatasetConfig) -> int:
        return one.max_new_tokens or self.config.sampler.max_new_tokens


Made = TypeVar("Made")


def _collecting(faults: list[Fault], make: Callable[[], Made]) -> Made | None:
    """What `make` gives, or None after adding its faults."""
    try:
        return make()
    except UserError as error:
        faults.extend(error.faults)
        return None


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Faults raised inside name a key of a dataset; outside it is the key of the config."""
    known = {one.name for one in fields(DatasetConfig)}
    try:
        yield
    except UserError as error:
        named = [replace(f, where=f"{place}.{f.where}") if f.where in known else f for f in error.faults]
        raise UserError(named, error.consequence) from error


def chat_form(tokenizer: Any) -> Chat | None:
    """A user's message in the tokenizer's chat form, as text; None where it has no such form."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def form(message: str) -> str:
        turns = [{"role": "user", "content": message}]
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text

    return form


def tokenize(tokenizer: Any, add_bos: bool, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=add_bos).input_ids
    return ids


def note_prompts(task: Task, note: Callable[[str], None]) -> None:
    for label, prompts in [("training", task.prompts), *((s.label, s.prompts) for s in task.sets)]:
        dropped = f", {prompts.dropped} too long and dropped" if prompts.dropped else ""
        note(f"{label}: {len(prompts.prompts)} prompts of {prompts.name}{dropped}")
    for warning in task.warnings:
        note(f"note: {warning}")
