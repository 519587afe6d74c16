"""A model that is sampled but not trained: an engine on the weights of one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from dash_exp.config.schema import Config, DatasetConfig
from dash_exp.learning.learner import device_of
from dash_exp.modeling.attention import ATTENTION
from dash_exp.modeling.hub import refuse_unreachable
from dash_exp.modeling.source import ModelSource, TextModel, load_computing, locate, text_model
from dash_exp.record.provenance import hardware
from dash_exp.sampling.protocol import Sampler
from dash_exp.tasks.prompts import PromptSet
from dash_exp.train.build import engine_facts, make_sampler, thread_count
from dash_exp.train.build_tasks import PromptBuilder
from dash_exp.train.parts import Policy
from dash_exp.types import Decoding
from dash_exp.verifiers.judges import Judges

__all__ = ["InferenceModel", "engine_facts", "hardware_facts"]

Workload = Sequence[tuple[PromptSet, Decoding]]


@dataclass
class InferenceModel:
    """A model's folder and tokenizer, judges, and an engine that starts when it is first needed: a result
    from the cache costs no loading of weights. Use as a context manager."""

    config: Config
    source: ModelSource
    text: TextModel
    judges: Judges
    _sampler: Sampler | None = field(default=None, init=False)

    @classmethod
    def of(cls, config: Config, cache: Path, data: Mapping[str, DatasetConfig]) -> Self:
        """Find the model of a config. `data`: the datasets that will be read, by their keys. Raises UserError
        when one of them is not available."""
        torch.set_num_threads(thread_count(config.cluster.threads))
        refuse_unreachable(config.model, data)
        source = locate(config.model, cache)
        judges = Judges(**vars(config.verifier))
        return cls(config, source, text_model(source.folder), judges)

    @property
    def prompt_builder(self) -> PromptBuilder:
        return PromptBuilder(self.config, self.text, self.judges)

    def sampler(self, workload: Workload) -> Sampler:
        """The engine, large enough for all of the workload; the same one when called again."""
        if self._sampler is None:
            longest = max(len(p.token_ids) + d.max_new_tokens for ps, d in workload for p in ps.prompts)
            tokenizer = self.text.tokenizer
            decode = partial(tokenizer.decode, skip_special_tokens=True)
            policy = Policy(self.source.folder, len(tokenizer), decode, longest, self._model)
            self._sampler = make_sampler(self.config, policy, Path(self.config.run.dir) / "servers")
        return self._sampler

    def _model(self) -> Any:
        """Rounded as the learner rounds, so that on CPU a checkpoint answers to the bit as in training."""
        opt = self.config.learner
        return load_computing(self.source.folder, opt.precision, ATTENTION).to(device_of(opt.device))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        closing: list[Callable[[], None]] = [self.judges.close]
        if self._sampler is not None:
            closing.insert(0, self._sampler.close)
        for close in closing:
            close()


def hardware_facts(config: Config) -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return hardware(thread_count(config.cluster.threads), gpus)


def engine_width() -> int:
    """How many sequences vLLM decodes at once in this process unless it is given a number."""
    if not torch.cuda.is_available():
        return 256
    card = torch.cuda.get_device_properties(0)
    return 1024 if card.total_memory >= 70 * 2**30 and "a100" not in card.name.lower() else 256
