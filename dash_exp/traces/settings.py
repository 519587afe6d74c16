"""The settings of `python -m dash_exp.traces`, and a command line made into them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dash_exp.config.checks import check, declared_faults, is_below
from dash_exp.config.compose import compose, find_faults
from dash_exp.config.overrides import own_settings, split_off
from dash_exp.config.schema import (
    COMPLETIONS,
    COUNT,
    NATURAL,
    PROMPTS,
    SHARE,
    TOKENS,
    Config,
    changed,
    number,
    setting,
)
from dash_exp.errors import Fault, UserError
from dash_exp.record.identity import model_name

TEACHER = "qwen7b_instruct"
USED = (
    "dataset",
    "model",
    "sampler",
    "verifier",
    "cluster",
    "paths",
    "run",
    "seed",
    "learner.device",
    "learner.precision",
    "config",
)
"""Keys whose faults matter here: nothing is trained or evaluated."""


@dataclass
class TracesConfig:
    """How a teacher is sampled; the paper's values for SFT-M. Keys of the command line: `traces.samples`
    and so on."""

    samples: int = number(PROMPTS, "completions per prompt", 10)
    temperature: float = number(NATURAL, "0: greedy", 0.7)
    top_p: float = number(SHARE, "share of the probability that is sampled from", 0.95)
    max_new_tokens: int = number(TOKENS, "longest completion", 1024)
    out: str | None = setting("the file; null: `<run.dir>/traces/<dataset>-<model>.jsonl`", None)
    limit: int | None = number(COUNT, "use the first so many prompts of the dataset", None)
    chunk: int = number(COMPLETIONS, "prompts requested at a time: the most that a kill can lose", 256)


@dataclass(frozen=True, slots=True)
class Command:
    """A command line that can be started."""

    config: Config
    traces: TracesConfig

    @property
    def out(self) -> Path:
        if self.traces.out:
            return Path(self.traces.out).expanduser()
        name = f"{self.config.dataset.name}-{model_name(asdict(self.config.model))}.jsonl"
        return Path(self.config.run.dir, "traces", name)


def parse(arguments: Sequence[str]) -> Command:
    """Raises UserError with every fault of a command line."""
    command, faults = _read(arguments)
    config, traces = command.config, command.traces
    faults += [fault for fault in check(config) if is_below(fault.where, USED)]
    if config.dataset.mix:
        faults.append(Fault("dataset.mix", "traces are sampled for one dataset at a time"))
    if config.sampler.name == "hf" and traces.samples > config.sampler.max_sequences:
        what = f"got {config.sampler.max_sequences}, less than traces.samples={traces.samples}"
        faults.append(Fault("sampler.max_sequences", what, "a group is sampled together: raise it"))
    if faults:
        raise UserError(faults)
    lengths = {"sampler.max_new_tokens": traces.max_new_tokens, "dataset.max_new_tokens": None}
    return Command(changed(config, lengths), traces)


def out_of(arguments: Sequence[str]) -> Path:
    """The file that a command line would write, whether or not it could be started here.

    Raises UserError where it cannot be read.
    """
    command, faults = _read(arguments)
    if faults:
        raise UserError(faults)
    return command.out


def _read(arguments: Sequence[str]) -> tuple[Command, list[Fault]]:
    """A command, and what is wrong with its own keys. Raises UserError where it cannot be composed."""
    own, rest = split_off("traces", arguments)
    traces, faults = settings_of(own)
    written = {text.partition("=")[0] for text in rest}
    defaults = [f"model={TEACHER}", "evaluation=none"]
    overrides = [*(d for d in defaults if d.partition("=")[0] not in written), *rest]
    found = find_faults(overrides, checked=False)
    if found:
        raise UserError(faults + found)
    sampled = {"algorithm.source": "sampler"}  # the dataset's `traces` are what is made here
    return Command(changed(compose(overrides), sampled), traces), faults


def settings_of(texts: Sequence[str]) -> tuple[TracesConfig, list[Fault]]:
    """The settings of these `name=value`, and what is wrong with them."""
    made, faults = own_settings(TracesConfig, "traces", texts)
    return made, faults + list(_setting_faults(made))


def _setting_faults(made: TracesConfig) -> Iterator[Fault]:
    yield from declared_faults(made, "traces.")
    if made.temperature == 0 and made.samples > 1:
        what = f"got {made.samples} with traces.temperature=0: they would all be equal"
        yield Fault("traces.samples", what, "set traces.samples=1, or a temperature above 0")
    if made.temperature == 0 and made.top_p < 1:
        what = f"got {made.top_p:g} with traces.temperature=0: greedy decoding draws nothing"
        yield Fault("traces.top_p", what, "set traces.top_p=1, or a temperature above 0")
