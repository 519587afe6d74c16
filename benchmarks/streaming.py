"""Streaming with sampler and learner apart, against the ideal max(S, B) + min(S, B) / W for W waves.

One vLLM server on one core (or GPU), the learner on another. Lengths are skewed: the prompts are sums, and a
completion ends at the first 3 or 7, else after 64 tokens. The same prompts, seeds and (with a vanishing
learning rate) weights are sampled in every turn: streaming; one after the other, the whole batch at once,
which gives S and B; and one after the other in waves, which tells what waves alone cost. Optimizer and sync
are stated apart.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ours import STILL, Ours, asked, config_of
from benchmarks.report import Options, Skipped, at_most, need_vllm, print_lines, print_table
from benchmarks.turns import alternate, median, spread

GOAL = 1.10
WORK = (
    "sampler=vllm_servers", "sampler.servers=1", "sampler.waves=4", "learner.deterministic=false",
    "dataset.stop=['3','7']", "sampler.max_new_tokens=64", STILL,
)  # fmt: skip
ON_CPU = ("sampler.server_threads=1",)


def measure(options: Options) -> dict[str, Any]:
    need_vllm(options)
    config = config_of("none", 0.0, None, asked(options, *WORK, *places()))
    with tempfile.TemporaryDirectory() as scratch, Ours(config, options.cache, Path(scratch)) as ours:
        at_once = ours.plan(streaming=False, groups_at_once=None)
        in_waves = ours.plan(streaming=False)
        sides = {
            "streaming": lambda number: ours.step(number),
            "in turn": lambda number: ours.step(number, at_once),
            "in turn, in waves": lambda number: ours.step(number, in_waves),
        }
        found = alternate(sides, options.rounds)
    waves = config.sampler.waves
    pairs = list(zip(found["streaming"], found["in turn"], strict=True))
    busy = [s["time/step_s"] - s["time/optimizer_s"] - s["time/sync_s"] for s, _ in pairs]
    limits = [ideal(t["time/sample_s"], learning(t), waves) for _, t in pairs]
    ratios = spread([b / limit for b, limit in zip(busy, limits, strict=True)])
    line = at_most(
        GOAL, ratios["median"], options,
        work=f"streaming, {waves} waves, lengths {lengths_of(found['streaming'])}",
        against="max(S, B) + min(S, B) / W", ours=spread(busy)["median"], rival=spread(limits)["median"],
        unit="s",
    )  # fmt: skip
    lines = [asdict(line)]
    print_lines("Streaming", lines)
    show(found)
    return {"lines": lines, "ratios": ratios, "steps": found}


def places() -> tuple[str, ...]:
    """One core for the server, or a GPU beside the learner's."""
    import torch

    if not torch.cuda.is_available():
        return ON_CPU
    if torch.cuda.device_count() < 2:
        raise Skipped("sampler and learner apart need two GPUs")
    return ()


def ideal(sampling: float, backprop: float, waves: int) -> float:
    return max(sampling, backprop) + min(sampling, backprop) / waves


def learning(row: dict[str, Any]) -> float:
    return float(row["time/backprop_s"] + row["time/logprob_s"])


def lengths_of(rows: list[dict[str, Any]]) -> str:
    """Smallest, mean and largest number of tokens of a completion."""
    every = [n for row in rows for group in row["lengths"] for n in group]
    return f"{min(every)}..{sum(every) / len(every):.0f}..{max(every)}"


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    columns = ["", "step", "waiting for samples", "backpropagation", "overlap", "optimizer", "sync", "tokens"]
    names = [("time/step_s",), ("time/sample_s",), ("time/backprop_s", "time/logprob_s"), ("time/overlap_s",),
             ("time/optimizer_s",), ("time/sync_s",)]  # fmt: skip
    rows = [
        [side, *(f"{median(steps, *keys):.2f}" for keys in names), f"{median(steps, 'tokens/sampled'):.0f}"]
        for side, steps in found.items()
    ]
    print_table("Seconds of a step (median)", columns, rows)
