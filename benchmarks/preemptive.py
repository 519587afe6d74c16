"""DASH against our own GRPO as it was run historically, with the same learning rate, batch, updates, beta and
seeds: how much of an update's time do one large sampling call and the filter save?

The paper's 83 % compares two programs. Here both arms are the same program, so what is left is the schedule
(`sampler.prompts_per_call`) and the filter; "no filter, one call" separates the two. The curve is over
prompts per call and the length of completions. A vanishing learning rate keeps all sides at the same weights,
so they sample the same tokens; the kept share is the base model's.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ours import STILL, Ours, asked, composed
from benchmarks.report import Line, Options, print_lines, print_table
from benchmarks.turns import alternate, median

LENGTHS, CALLS = (6, 32, 64), (1, 4)
"""Most tokens of a completion (6: sums, which end by themselves; else they go on), prompts per call."""
PAPER = 0.83
ONE_CALL = "no filter, one call"


def measure(options: Options) -> dict[str, Any]:
    lines, details = [], []
    for tokens in (4,) if options.quick else LENGTHS:
        found = compare(options, tokens)
        details.append({"tokens": tokens, **found})
        dash = found["seconds"]["dash"]
        for side, seconds in found["seconds"].items():
            if side == "dash":
                continue
            lines.append(
                asdict(
                    Line(
                        f"DASH, up to {tokens} tokens, kept {found['kept']:.2f}",
                        side,
                        dash,
                        seconds,
                        "s an update",
                        1 - dash / seconds,
                        "curve; paper 0.83" if side != ONE_CALL else "",
                    )
                )
            )
    print_lines("DASH against GRPO (ratio: share of the update's time that is saved)", lines)
    return {"lines": lines, "paper": PAPER, "curve": details}


def compare(options: Options, tokens: int) -> dict[str, Any]:
    """Seconds of an update, by side."""
    more = ["dataset.stop=[]"] if tokens > 6 else []
    overrides = asked(options, STILL, f"sampler.max_new_tokens={tokens}", *more)
    calls = (1,) if options.quick else CALLS
    with tempfile.TemporaryDirectory() as scratch:
        arms = [
            Ours(
                composed([f"algorithm={arm}", *overrides], options.threads), options.cache, Path(scratch, arm)
            )
            for arm in ("dash", "grpo")
        ]
        dash, grpo = arms
        prompts = dash.built.plan.prompts_per_step
        try:
            sides: dict[str, Any] = {"dash": lambda number: dash.step(number)}
            for call in calls:
                plan = grpo.plan(prompts_per_call=call)
                sides[f"GRPO, {call} prompts a call"] = lambda n, plan=plan: grpo.step(n, plan)
            one_call = grpo.plan(prompts_per_call=prompts)
            sides[ONE_CALL] = lambda number: grpo.step(number, one_call)
            found = alternate(sides, options.rounds)
        finally:
            for arm in arms:
                arm.close()
    phases = ("sample", "verify", "logprob", "backprop", "optimizer", "other")
    rows = [
        [s, *(f"{median(r, f'time/{p}_s'):.2f}" for p in phases), f"{median(r, 'tokens/sampled'):.0f}"]
        for s, r in found.items()
    ]
    print_table(f"Up to {tokens} tokens: seconds of an update (median)", ["", *phases, "tokens"], rows)
    return {
        "seconds": {side: median(steps, "time/step_s") for side, steps in found.items()},
        "kept": median(found["dash"], "filter/kept_share"),
        "steps": found,
    }
