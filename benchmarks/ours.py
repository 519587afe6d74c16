"""Our side of a comparison: the package itself, built from its config and driven by its own loop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import Options, Skipped
from dash_exp.config.checks import check
from dash_exp.config.compose import compose
from dash_exp.config.schema import Config
from dash_exp.modeling.source import load_tokenizer
from dash_exp.record.folder import Recorder, Row
from dash_exp.record.identity import resolve_paths
from dash_exp.record.ledger import Ledger
from dash_exp.record.metrics import sample_rows, step_row
from dash_exp.signals import tune_malloc
from dash_exp.tasks.prompts import PromptSet
from dash_exp.tasks.selection import Chooser
from dash_exp.train.build import build
from dash_exp.train.loop import StepContext, train_step
from dash_exp.train.parts import Plan

ARMS = {
    ("advantage", True): "dash",
    ("advantage", False): "no_kl",
    ("none", True): "no_gf",
    ("none", False): "pg",
}
"""The arm for a filter, with and without KL; they differ in nothing else."""
QUICK = ("model=tiny", "algorithm.prompts_per_step=2", "algorithm.group_size=2", "sampler.max_new_tokens=4")
"""For a smoke check: anything that a row sets comes before."""
STILL = "learner.lr=1e-12"
"""So small that weights stay as they are: every side, and every round, samples the same."""


def config_of(filter_name: str, beta: float, threads: int | None, more: Sequence[str] = ()) -> Config:
    """The default cell with this filter and beta, and what else was asked for. `threads` None: as many as
    a run takes by itself."""
    arm = ARMS[filter_name, beta > 0]
    return composed([f"algorithm={arm}", f"algorithm.beta={beta}", *more], threads)


def composed(overrides: Sequence[str], threads: int | None) -> Config:
    """A config that can be started; later overrides win over earlier ones."""
    wanted = {text.partition("=")[0]: text for text in overrides}
    config = compose([*wanted.values(), f"cluster.threads={threads or 'null'}"])
    faults = check(config)
    if faults:
        raise SystemExit("\n".join(map(str, faults)))
    return resolve_paths(config)


def asked(options: Options, *overrides: str) -> list[str]:
    """A row's own overrides, made tiny for a quick run, and those of the command line."""
    return ["evaluation=none", *overrides, *(QUICK if options.quick else ()), *options.override]


def gsm8k(options: Options) -> list[str]:
    """GSM8K prompts, from the folder that DASH_DATA names: 16 x 4 completions of 128 new tokens. Raises
    Skipped where they are not there."""
    file = Path(os.environ.get("DASH_DATA", "")).expanduser().resolve() / "gsm8k_train.jsonl"
    if not file.is_file():
        raise Skipped("no gsm8k_train.jsonl: set DASH_DATA to the folder that holds it")
    return asked(
        options,
        "dataset=gsm8k",
        f"dataset.path='{file}'",
        "algorithm.prompts_per_step=16",
        "algorithm.group_size=4",
        "sampler.max_new_tokens=128",
    )


def tell_fault(kind: str, start: float, end: float, **more: Any) -> None:
    """Of a server that was lost or started again: a step in which that happened is no measurement."""
    print(f"note: {kind} within a measurement, {end - start:.1f} s: {more}", flush=True)


class Ours:
    """Takes steps one at a time, as `python -m dash_exp` does: what it builds, its `train_step`, its
    ledger and a record of its own in `folder`; no evaluation and no checkpoint."""

    def __init__(self, config: Config, cache: Path, folder: Path):
        tune_malloc()
        self.config = config
        self.built = build(config, cache, lambda text: None, folder / "servers", tell_fault)
        self.ledger = Ledger()
        self.done = 0
        self._stack = ExitStack()
        self._stack.callback(self.built.close)
        folder.mkdir(parents=True, exist_ok=True)
        self.recorder = self._stack.enter_context(Recorder(folder))

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def change(self, **parts: Any) -> None:
        """Put other parts in, for all steps to come."""
        self.built = replace(self.built, parts=replace(self.built.parts, **parts))

    def ask(self, prompts: PromptSet) -> None:
        """Draw the prompts of all steps to come from these."""
        self.change(chooser=Chooser(prompts, self.config.seed, self.config.selection))

    @property
    def vocabulary(self) -> int:
        """Tokens of the model's tokenizer."""
        return len(load_tokenizer(self.built.source.folder))

    def plan(self, **changes: Any) -> Plan:
        """The plan with something else in it."""
        return replace(self.built.plan, **changes)

    def step(self, number: int | None = None, plan: Plan | None = None) -> Row:
        """Train one step: the next, or that of this number (its prompts and seeds), by this plan, or by
        the run's. Its row of the record, and the lengths that were sampled."""
        self.done = self.done + 1 if number is None else number
        parts = self.built.parts
        self.ledger.close_step()  # the time between two steps belongs to neither
        plan = plan or self.built.plan
        parts.chooser.place = (self.done - 1) * plan.prompts_per_step
        facts = train_step(StepContext(plan, parts, self.ledger, self.recorder, self.done))
        self.recorder.append("samples", sample_rows(self.done, facts.groups))
        overlap = self.ledger.overlap_s()
        row = step_row(self.done, facts, *self.ledger.close_step(), overlap)
        return {**row, "lengths": [[len(c.token_ids) for c in g.group.completions] for g in facts.groups]}

    def close(self) -> None:
        self._stack.close()
