"""Backpropagation time by the share of tokens that the filter drops: does it fall in proportion?"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.given import give
from benchmarks.ours import Ours, asked, config_of
from benchmarks.report import Options, at_least, print_lines
from benchmarks.turns import alternate

GOAL = 0.9
KEPT = (1.0, 0.75, 0.5, 0.25)
CASES = ((29, [6]), (93, [128]))
"""Tokens of a prompt, and of its completions."""


def measure(options: Options) -> dict[str, Any]:
    lines, details = [], []
    for prompt, lengths in ((9, [4]),) if options.quick else CASES:
        rows = steps(options, prompt, lengths)
        total, all_s = rows[1.0]["computed"], rows[1.0]["seconds"]
        for share in list(rows)[1:]:
            dropped = 1 - rows[share]["computed"] / total
            saved = 1 - rows[share]["seconds"] / all_s
            lines.append(
                asdict(
                    at_least(
                        GOAL,
                        saved / dropped,
                        options,
                        work=f"backpropagation, {prompt} + {max(lengths)} tokens",
                        against="tokens dropped",
                        ours=saved,
                        rival=dropped,
                        unit="share",
                    )
                )
            )
        details.append({"prompt_tokens": prompt, "lengths": lengths, "rows": list(rows.values())})
    print_lines("Filter: time saved against tokens dropped", lines)
    return {"lines": lines, "steps": details}


def steps(options: Options, prompt: int, lengths: list[int]) -> dict[float, dict[str, Any]]:
    """By kept share: tokens computed, and seconds of backpropagation (reference forward included)."""
    overrides = asked(options, "algorithm.group_size=4", f"sampler.max_new_tokens={max(lengths)}")
    config = config_of("advantage", 0.04, options.threads, overrides)
    with tempfile.TemporaryDirectory() as scratch, Ours(config, options.cache, Path(scratch)) as ours:

        def side(share: float) -> Any:
            def step(number: int) -> dict[str, Any]:
                give(ours, prompt_tokens=prompt, lengths=lengths, share=share)
                return ours.step()

            return step

        shares = (1.0, 0.5) if options.quick else KEPT
        found = alternate({str(share): side(share) for share in shares}, options.rounds)
    made: dict[float, dict[str, Any]] = {}
    for share in shares:
        rows = found[str(share)]
        assert all(abs(r["filter/kept_share"] - share) < 1e-9 for r in rows), "the filter kept something else"
        made[share] = {
            "kept": share,
            "computed": rows[0]["tokens/computed"],
            "seconds": statistics.median(r["time/backprop_s"] + r["time/logprob_s"] for r in rows),
        }
    return made
