"""The curves that `python -m dash_exp.capacity` predicts from (docs/capacity.md), on the device at hand.

By default sampler and learner as in the streaming row: one vLLM server on one core, the learner on another;
without vLLM the `hf` sampler. `--override` chooses others: `--override sampler=hf algorithm.group_size=4`.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours import STILL, Ours, asked, config_of
from benchmarks.report import Options, Skipped, need_vllm, print_table
from benchmarks.streaming import WORK, places
from benchmarks.turns import WARM_UP, median, seconds
from dash_exp.config.schema import Config
from dash_exp.learning.distributed.launch import start_workers
from dash_exp.learning.distributed.learner import DistributedLearner
from dash_exp.learning.packing import empty_micro_batch
from dash_exp.record.folder import Row
from dash_exp.sampling.protocol import arrived
from dash_exp.tasks.prompts import prompts_at, requests
from dash_exp.train.build import make_spec, thread_count
from dash_exp.types import Request

LEAST_DECODE = 0.1
"""Share of a measured batch that is decoding at least: prompts are timed apart, and there is noise."""


def measure(options: Options) -> dict[str, Any]:
    config = config_of("none", 0.0, *place_of(options))
    with tempfile.TemporaryDirectory() as scratch:
        with Ours(config, options.cache, Path(scratch)) as ours:
            curves = measured(ours, options.rounds)
        curves["reduce_s"] = reduction(config, ours, Path(scratch), options.rounds)
        if curves["reduce_s"] is None:
            curves["notes"] = ["the sum of gradients over learners was not measured: it counts as 0"]
    rows = [[f"{n:.1f}", f"{rate:.1f}", f"{n / rate * 1e3:.1f}"] for n, rate in curves["decode"]]
    print_table("Decoding", ["sequences", "tokens/s", "ms a step"], rows)
    names = ["learner_tokens_per_s", "prefill_tokens_per_s", "optimizer_s", "sync_s", "other_s", "reduce_s"]
    rows = [[name, "not measured" if curves[name] is None else f"{curves[name]:.4g}"] for name in names]
    print_table("The rest", ["", ""], rows)
    return {"lines": [], "curves": curves}


def reduction(config: Config, ours: Ours, folder: Path, rounds: int) -> float | None:
    """Seconds of adding the gradients of two learners of this model on this machine, every tensor's, whatever
    they were computed from. None where there are GPUs, but not two."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        return None
    threads = max(1, thread_count(config.cluster.threads) // 2)
    spec = make_spec(config, ours.built.plan, ours.built.source.folder, ours.vocabulary, threads)
    coordinator = start_workers(2, config.learner.timeout_s, folder / "ranks")
    try:
        learner = DistributedLearner(spec, coordinator, 0)
        times = []
        for _ in range(rounds + WARM_UP):
            learner.accumulate((empty_micro_batch(), empty_micro_batch()), [None, None])
            learner.update(1.0)
            times.append(learner.take_sums()["update/reduce_s"])
    finally:
        coordinator.close()
    return statistics.median(times[WARM_UP:])


def place_of(options: Options) -> tuple[int | None, list[str]]:
    """Threads, and overrides: apart where there is vLLM (but not for a smoke check, which would wait for a
    server), else one after the other."""
    try:
        need_vllm(options)
        if options.quick or any(text.startswith("sampler=") for text in options.override):
            raise Skipped("another sampler is wanted")
        return None, asked(options, *WORK, *places())
    except Skipped:
        return options.threads, asked(options, "dataset.stop=['3','7']", "sampler.max_new_tokens=64", STILL)


def measured(ours: Ours, rounds: int) -> dict[str, Any]:
    """All curves of what `ours` was built with, and that setting."""
    collected = Collector(ours)
    for number in range(1, rounds + WARM_UP + 1):
        collected.round(number)
    return collected.curves()


class Collector:
    """Measures every point of every curve once a round, so that all meet the same machine. The first
    round is not counted."""

    def __init__(self, ours: Ours):
        self.ours, self.asker = ours, _Asker(ours)
        plan, s = ours.built.plan, ours.config.sampler
        self.counts = counts(min(plan.prompts_per_step * plan.group_size, s.max_sequences * s.servers))
        self.decoded: dict[int, list[tuple[float, int, int, int]]] = {n: [] for n in self.counts}
        self.prefilled: list[float] = []
        self.steps: list[Row] = []

    def round(self, number: int) -> None:
        in_turn = self.ours.plan(streaming=False, waves=None)
        decoded = {n: self.asker.decode(n) for n in self.counts}
        prefilled, step = self.asker.prefill_rate(), self.ours.step(number, in_turn)
        if number > WARM_UP:
            for n, one in decoded.items():
                self.decoded[n].append(one)
            self.prefilled.append(prefilled)
            self.steps.append(step)

    def setting(self) -> dict[str, Any]:
        """What was measured, in the capacity model's words."""
        plan, s = self.ours.built.plan, self.ours.config.sampler
        apart = s.name == "vllm_servers"
        return {
            "prompts": plan.prompts_per_step,
            "group": plan.group_size,
            "waves": plan.waves or 1,
            "streaming": bool(apart and plan.streaming),
            "max_sequences": s.max_sequences,
            "micro_batch_tokens": self.ours.config.learner.micro_batch_tokens,
        }

    def curves(self) -> dict[str, Any]:
        prefill, prompt = statistics.median(self.prefilled), self.asker.prompt_tokens()
        points = [self._point(n, prompt / prefill) for n in self.counts]
        steps = self.steps
        learned = [r["tokens/computed"] / (r["time/backprop_s"] + r["time/logprob_s"]) for r in steps]
        return {
            "sampler": self.ours.config.sampler.name,
            "decode": sorted(points),
            "prefill_tokens_per_s": prefill,
            "prompt_tokens": prompt,
            "learner_tokens_per_s": statistics.median(learned),
            "lengths": [group for r in steps for group in r["lengths"]],
            "cap": self.ours.built.parts.decoding.max_new_tokens,
            "optimizer_s": median(steps, "time/optimizer_s"),
            "sync_s": median(steps, "time/sync_s"),
            "other_s": median(steps, "time/other_s", "time/verify_s"),
            "setting": self.setting(),
        }

    def _point(self, wanted: int, prefill_s: float) -> list[float]:
        """Mean sequences of a server that was asked for so many at once, and its tokens per second. All
        begin together, so there are as many decode steps as the longest has tokens. Prompts are timed
        apart. Rounds have other lengths: tokens, steps and seconds are medians of their own."""
        servers = self.ours.config.sampler.servers
        rows = []
        for elapsed, prompts, tokens, longest in self.decoded[wanted]:
            decoding = max(LEAST_DECODE * elapsed, elapsed - prompts * prefill_s / servers)
            rows.append((tokens / servers / longest, tokens / servers / decoding))
        return [round(statistics.median(n for n, _ in rows), 3), statistics.median(r for _, r in rows)]


def counts(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest."""
    return sorted({*(2**k for k in range(largest.bit_length()) if 2**k < largest), largest})


class _Asker:
    """Runs only the sampler, each time with other prompts, so that no prefix is cached."""

    def __init__(self, ours: Ours):
        self.parts, self.plan = ours.built.parts, ours.built.plan
        self.servers = ours.config.sampler.servers
        self._asked = 0

    def some(self, prompts: int, each: int) -> list[Request]:
        self._asked += prompts
        taken = prompts_at(self.parts.chooser.prompts, self.plan.seed, 0, self._asked)[-prompts:]
        return requests(taken, self.plan.seed, "curves", self._asked, each)

    def time(self, asked: list[Request], tokens: int | None = None) -> tuple[float, list[int]]:
        """Seconds, and how long the completions became."""
        decoding = self.parts.decoding
        if tokens is not None:
            decoding = replace(decoding, max_new_tokens=tokens)
        groups: list[Any] = []
        elapsed = seconds(lambda: groups.extend(arrived(self.parts.sampler.stream(asked, decoding))))
        return elapsed, [len(c.token_ids) for group in groups for c in group.completions]

    def prompt_tokens(self) -> float:
        return statistics.fmean(len(p.token_ids) for p in self.parts.chooser.prompts.prompts[:1000])

    def prefill_rate(self) -> float:
        """Prompt tokens per second of one server."""
        asked = self.some(self.plan.prompts_per_step, 1)
        elapsed, _ = self.time(asked, 1)
        return sum(len(r.prompt.token_ids) for r in asked) / elapsed / self.servers

    def decode(self, wanted: int) -> tuple[float, int, int, int]:
        """Of `wanted` sequences at once: seconds, prompts, tokens, and those of the longest."""
        size = min(wanted, self.plan.group_size)
        prompts = max(1, wanted // size)
        elapsed, lengths = self.time(self.some(prompts, size))
        return elapsed, prompts, sum(lengths), max(lengths)
