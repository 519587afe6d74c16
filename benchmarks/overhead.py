"""Everything else in an update: Python, record, bookkeeping. The goal is none; at most 2 % of a step.

The package's own `train`, which also writes the record, its status and the progress of each step; verdicts
are work, not overhead, and evaluation and checkpoints are left out.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ours import Ours, asked, config_of
from benchmarks.report import Options, at_most, print_lines
from benchmarks.turns import WARM_UP, spread

GOAL = 0.02


def measure(options: Options) -> dict[str, Any]:
    from dash_exp.record.folder import read_final
    from dash_exp.train.loop import train
    from dash_exp.train.parts import Hooks

    count = options.rounds + WARM_UP
    config = config_of("advantage", 0.04, options.threads, asked(options, f"algorithm.steps={count}"))
    hooks = Hooks(lambda step: None, lambda step, last, row: None, lambda row: None, lambda: None)
    with tempfile.TemporaryDirectory() as scratch, Ours(config, options.cache, Path(scratch)) as ours:
        plan = ours.plan(checkpoint_every=0, evaluate_every=0)
        train(plan, ours.built.parts, hooks, ours.recorder, done=0, spent=0.0)
        rows = read_final(Path(scratch), "steps")[WARM_UP:]
    shares = [r["time/other_s"] / r["time/step_s"] for r in rows]
    share = statistics.median(shares)
    line = at_most(
        GOAL,
        share,
        options,
        work="everything else in an update, default work",
        against="0",
        ours=statistics.median(r["time/other_s"] for r in rows),
        rival=0.0,
        unit="s (ratio: of the step)",
    )
    lines = [asdict(line)]
    print_lines("Overhead", lines)
    return {"lines": lines, "share": spread(shares), "step_s": spread([r["time/step_s"] for r in rows])}
