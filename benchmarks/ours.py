"""Our side of a comparison: the package itself, built from its config and driven by its own loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from dash_exp.attempt import keep_freed_memory
from dash_exp.build import build
from dash_exp.compose import compose
from dash_exp.config import Config
from dash_exp.ledger import Ledger
from dash_exp.loop import train_step
from dash_exp.metrics import batch_values, sample_rows
from dash_exp.record import Recorder, Row
from dash_exp.validation import check

ARMS = {
    ("advantage", True): "dash", ("advantage", False): "no_kl",
    ("none", True): "no_gf", ("none", False): "pg",
}  # fmt: skip
"""The arm for a filter, with and without KL; they differ in nothing else."""


def config_of(filter_name: str, beta: float, threads: int, more: Sequence[str] = ()) -> Config:
    """The default cell with this filter and beta, and what else was asked for."""
    arm = ARMS[filter_name, beta > 0]
    fixed = [f"algorithm={arm}", f"algorithm.beta={beta}", f"cluster.threads={threads}"]
    config = compose([*fixed, *more])
    faults = check(config)
    if faults:
        raise SystemExit("\n".join(map(str, faults)))
    return config


class Ours:
    """Takes steps one at a time, as `python -m dash_exp` does: what it builds, its `train_step`, its
    ledger and a record of its own in `folder`; no evaluation and no checkpoint."""

    def __init__(self, config: Config, cache: Path, folder: Path):
        keep_freed_memory()
        self.machine = build(config, cache, lambda text: None, folder / "servers", lambda *what, **more: None)
        self.ledger = Ledger()
        self.done = 0
        self._stack = ExitStack()
        self._stack.callback(self.machine.close)
        folder.mkdir(parents=True)
        self.recorder = self._stack.enter_context(Recorder(folder))

    def step(self) -> Row:
        """Train one step. Its wall seconds, its seconds by phase, and what was sampled."""
        plan, parts = self.machine.plan, self.machine.parts
        self.done += 1
        self.ledger.close_step()  # what lay between two steps is nobody's
        facts = train_step(plan, parts, self.ledger, self.recorder, self.done)
        self.recorder.append("samples", sample_rows(self.done, facts.groups))
        wall, seconds = self.ledger.close_step()
        phases = {f"time/{name}_s": value for name, value in seconds.items()}
        return {"time/step_s": wall, **phases, **batch_values(facts)}

    def close(self) -> None:
        self._stack.close()
