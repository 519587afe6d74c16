"""Our side of a comparison: the package itself, built from its config and driven by its own loop."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from dash_exp.build import build
from dash_exp.cell import keep_freed_memory
from dash_exp.compose import compose
from dash_exp.config import Config
from dash_exp.loop import Hooks, train
from dash_exp.record import Recorder, Row
from dash_exp.validation import check

ARMS = {
    ("advantage", True): "dash", ("advantage", False): "no_kl",
    ("none", True): "no_gf", ("none", False): "pg",
}  # fmt: skip
"""The arm for a filter, with and without KL; they differ in nothing else."""


def config_of(filter_name: str, beta: float, threads: int) -> Config:
    """The default cell with this filter and beta."""
    arm = ARMS[filter_name, beta > 0]
    config = compose([f"algorithm={arm}", f"algorithm.beta={beta}", f"cluster.threads={threads}"])
    faults = check(config)
    if faults:
        raise SystemExit("\n".join(map(str, faults)))
    return config


class Ours:
    """Takes steps one at a time, each as `python -m dash_exp` would: `loop.train` with a plan that ends
    after that step, a real recorder in `folder`, no evaluation and no checkpoint."""

    def __init__(self, config: Config, cache: Path, folder: Path):
        keep_freed_memory()
        self.machine = build(config, cache, lambda text: None)
        self.done = 0
        self._last: Row = {}
        self._stack = ExitStack()
        self._stack.callback(self.machine.close)
        folder.mkdir(parents=True)
        self.recorder = self._stack.enter_context(Recorder(folder))
        self._hooks = Hooks(
            evaluate=lambda step: None, checkpoint=lambda step: None,
            progress=self._remember, stop_signal=lambda: None,
        )  # fmt: skip

    def _remember(self, row: Row) -> None:
        self._last = row

    def step(self) -> Row:
        """Train one step; the row that it left in steps.jsonl, with its ledger."""
        plan = replace(self.machine.plan, steps=self.done + 1)
        train(plan, self.machine.parts, self._hooks, self.recorder, done=self.done, spent_s=0.0)
        self.done += 1
        return self._last

    def close(self) -> None:
        self._stack.close()
