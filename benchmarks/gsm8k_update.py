"""A full update on GSM8K prompts, ours and TRL's in turn: 16 x 4 completions of 128 new tokens.

Rewards are set, the same on both sides: in all groups they differ (nothing to filter), or in exactly half of
them (the filter drops the others before any forward pass).
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import Options, need
from benchmarks.whole_update import line_of, show_updates, take_turns

MICRO_BATCH = 16
CASES = (("none", 1.0, 4.0), ("advantage", 0.5, 6.0))
"""The filter, the share of groups whose rewards differ, and how many times faster the goal is."""


def measure(options: Options) -> dict[str, Any]:
    need("trl", options)
    from benchmarks.ours import config_of, gsm8k

    rows, lines = [], []
    size = 2 if options.quick else MICRO_BATCH
    for name, share, goal in CASES:
        config = config_of(name, 0.0, options.threads, gsm8k(options))
        with tempfile.TemporaryDirectory() as scratch:
            row = take_turns(
                config,
                options.cache,
                Path(scratch),
                updates=options.rounds,
                micro_batch=size,
                attention="sdpa",
                share=share,
            )
        assert abs(row["ours"]["kept_share"] - share) < 1e-9, "the filter kept something else"
        rows.append(row)
        work = f"full update, GSM8K, filter={name}"
        lines.append(asdict(line_of(row, work, size, goal, options)))
    show_updates(rows)
    return {"lines": lines, "updates": rows}
