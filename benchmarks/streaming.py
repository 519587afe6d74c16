"""Streaming with sampler and learner apart, against the ideal max(S, B) + min(S, B) / W for W waves.

One vLLM server on one core (or GPU), the learner on another. Lengths are skewed: the prompts are sums, and a
completion ends at the first 3 or 7, else after 64 tokens. The same prompts, seeds and (with a vanishing
learning rate) weights are sampled in every turn: streaming in 1, 2 and 4 waves;
and one after the other, the full batch at once, which gives S and B. Optimizer and sync are stated
apart.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ours import STILL, Ours, asked, config_of
from benchmarks.report import Options, Skipped, at_most, need_vllm, print_lines, print_table
from benchmarks.turns import alternate, median, spread
from dash_exp.record.folder import Row

GOAL = 1.10
WAVES = (1, 2, 4)
WORK = (
    "sampler=vllm_servers",
    "sampler.servers=1",
    "learner.deterministic=false",
    "dataset.stop=['3','7']",
    "sampler.max_new_tokens=64",
    STILL,
)
ON_CPU = ("sampler.server_threads=1",)


def measure(options: Options) -> dict[str, Any]:
    need_vllm(options)
    config = config_of("none", 0.0, None, asked(options, *WORK, *places()))
    with tempfile.TemporaryDirectory() as scratch, Ours(config, options.cache, Path(scratch)) as ours:
        plans = {name_of(w): ours.plan(streaming=True, waves=w) for w in WAVES}
        plans["in turn"] = ours.plan(streaming=False, waves=None)
        sides = {name: partial(ours.step, plan=plan) for name, plan in plans.items()}
        ours.step(1)
        found = alternate(sides, options.rounds)
    ratios = {name: against_the_limit(found, name) for name in map(name_of, WAVES)}
    lines = [
        asdict(
            at_most(
                GOAL,
                one["ratio"]["median"],
                options,
                work=f"{name}, lengths {lengths_of(found['in turn'])}",
                against="max(S, B) + min(S, B) / W",
                ours=one["ours"]["median"],
                rival=one["limit"]["median"],
                unit="s",
            )
        )
        for name, one in ratios.items()
    ]
    print_lines("Streaming", lines)
    show(found)
    return {"lines": lines, "ratios": ratios, "steps": found}


def name_of(waves: int) -> str:
    return f"streaming, W = {waves}"


def against_the_limit(found: dict[str, list[Row]], name: str) -> dict[str, dict[str, Any]]:
    """Of streaming steps, without optimizer and sync, against what S and B of the same round allow."""
    pairs = list(zip(found[name], found["in turn"], strict=True))
    ours = [s["time/step_s"] - s["time/optimizer_s"] - s["time/sync_s"] for s, _ in pairs]
    limits = [ideal(t["time/sample_s"], learning(t), s["sampler/waves"]) for s, t in pairs]
    ratios = [b / limit for b, limit in zip(ours, limits, strict=True)]
    return {"ours": spread(ours), "limit": spread(limits), "ratio": spread(ratios)}


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
    names = [
        ("time/step_s",),
        ("time/sample_s",),
        ("time/backprop_s", "time/logprob_s"),
        ("time/overlap_s",),
        ("time/optimizer_s",),
        ("time/sync_s",),
    ]
    rows = [
        [side, *(f"{median(steps, *keys):.2f}" for keys in names), f"{median(steps, 'tokens/sampled'):.0f}"]
        for side, steps in found.items()
    ]
    print_table("Seconds of a step (median)", columns, rows)
