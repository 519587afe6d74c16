"""From config to questions: prompts, held-out sets, and who judges the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dash_exp.config.schema import CHATS, Config, DatasetConfig, parts_of
from dash_exp.errors import Fault, UserError
from dash_exp.evaluation.metrics import OWN_JUDGE, EvalSet
from dash_exp.modeling.source import TextModel
from dash_exp.plugins import is_reference
from dash_exp.tasks.prompts import PromptSet, make_prompts, mixture
from dash_exp.tasks.sources import load_examples, placed
from dash_exp.tasks.templates import Style, chat_form, renderer
from dash_exp.types import Decoding
from dash_exp.verifiers.judges import Judges
from dash_exp.verifiers.types import Judge


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked and judged: the training prompts and the held-out sets. `judges`: by the name of a
    prompt's task (a mixture has several). `warnings`: what the judges report."""

    prompts: PromptSet
    decoding: Decoding
    judges: Mapping[str, Judge]
    sets: tuple[EvalSet, ...]
    warnings: tuple[str, ...] = ()


def build_task(config: Config, model: TextModel, judges: Judges) -> Task:
    """Prompts and judges. Reads the data; UserError with all that is wrong with them."""
    builder = PromptBuilder(config, model, judges)
    data = config.dataset
    wanted = config.evaluation.before or config.evaluation.after or config.evaluation.every
    train, sets = _collect([builder.training, builder.held_out if wanted else tuple])
    judged = {
        part.name: judges.adding(
            judges.get(part.verifier, part.extraction), part.rewards, part.reward_weights
        )
        for part in parts_of(data).values()
    }
    decoding = builder.decoding(data, config.sampler.temperature)
    return Task(train, decoding, judged, sets, judges.warnings)


def stop_ids(model: TextModel, stops: list[str]) -> tuple[int, ...]:
    """The end tokens and each stop text, which must be a single token."""
    ids = list(model.end_ids)
    for text in stops:
        tokens = model.tokenizer(text, add_special_tokens=False).input_ids
        if len(tokens) != 1:
            what = f"{text!r} is {len(tokens)} tokens of this tokenizer, not one"
            raise UserError(Fault("stop", what, "choose a text that is one token, or []"))
        ids.append(tokens[0])
    return tuple(dict.fromkeys(ids))


@dataclass(frozen=True, slots=True)
class PromptBuilder:
    """Turns the datasets of a config into prompts for one model, with how they are decoded and judged.
    Methods raise UserError with all faults of the data."""

    config: Config
    model: TextModel
    judges: Judges

    def training(self) -> PromptSet:
        """The prompts of the dataset and of what is mixed into it."""
        parts = parts_of(self.config.dataset)
        sets = _collect(partial(self.prompts, part, part.limit, place) for place, part in parts.items())
        return mixture([(prompts, part.weight) for prompts, part in zip(sets, parts.values(), strict=True)])

    def held_out(self) -> tuple[EvalSet, ...]:
        """The sets to evaluate on."""
        sets = self.config.evaluation.sets.items()
        return tuple(_collect(partial(self._held_out, label, dataset) for label, dataset in sets))

    def prompts(self, dataset: DatasetConfig, limit: int | None, place: str = "dataset") -> PromptSet:
        """The prompts of one dataset, whose key is `place`."""
        add_bos = self.config.model.add_bos and dataset.template not in CHATS  # a chat has its own
        shots = [(shot["problem"], shot["solution"]) for shot in dataset.shots]
        with placed(place):
            chat = chat_form(self.model.tokenizer, dataset.system, dataset.chat_arguments)
            return make_prompts(
                load_examples(dataset),
                renderer(dataset.template, Style(shots, chat)),
                partial(tokenize, self.model.tokenizer, add_bos),
                max_prompt_tokens=dataset.max_prompt_tokens,
                model_limit=self.model.positions - self._length(dataset),
                limit=limit if limit is not None else dataset.limit,
            )

    def decoding(
        self, dataset: DatasetConfig, temperature: float, top_p: float = 1.0, place: str = "dataset"
    ) -> Decoding:
        with placed(place):
            return Decoding(self._length(dataset), temperature, stop_ids(self.model, dataset.stop), top_p)

    def _held_out(self, label: str, dataset: DatasetConfig) -> EvalSet:
        evaluation, place = self.config.evaluation, f"evaluation.sets.{label}"
        trained = self.config.dataset
        asked = replace(
            dataset,
            template=evaluation.template or dataset.template,
            system=trained.system if dataset.system is None else dataset.system,
            chat_arguments=dataset.chat_arguments or trained.chat_arguments,
        )
        own = is_reference(dataset.verifier)  # the judge's version names it, wherever it lies
        how = OWN_JUDGE if own else f"{dataset.verifier}/{dataset.extraction}/"
        return EvalSet(
            label,
            self.prompts(asked, evaluation.limit, place),
            self.judges.get(dataset.verifier, dataset.extraction),
            self.decoding(dataset, evaluation.temperature, evaluation.top_p, place),
            evaluation.samples,
            f"{how}{self.judges.limits(dataset.verifier)}",
            tuple(evaluation.k),
        )

    def _length(self, dataset: DatasetConfig) -> int:
        return dataset.max_new_tokens or self.config.sampler.max_new_tokens


def _collect(makers: Iterable[Callable[[], Any]]) -> list[Any]:
    """Call all of them. Raises UserError with the faults of all."""
    results, faults = [], list[Fault]()
    for make in makers:
        try:
            results.append(make())
        except UserError as error:
            faults.extend(error.faults)
    if faults:
        raise UserError(faults)
    return results


def tokenize(tokenizer: Any, add_bos: bool, texts: list[str]) -> list[list[int]]:
    bos = getattr(tokenizer, "bos_token", None)  # a template of the user's own may have written it
    with_bos = add_bos and not (bos and texts and texts[0].startswith(bos))
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=with_bos).input_ids
    return ids


def log_prompts(task: Task, log: Callable[[str], None]) -> None:
    for label, prompts in [("training", task.prompts), *((s.label, s.prompts) for s in task.sets)]:
        dropped = f", {prompts.dropped} too long and dropped" if prompts.dropped else ""
        log(f"{label}: {len(prompts.prompts)} prompts of {prompts.name}{dropped}")
    if not task.sets:
        log("evaluation: none (dataset.test_path=<file> names a held-out set of your own)")
    for warning in task.warnings:
        log(f"note: {warning}")
