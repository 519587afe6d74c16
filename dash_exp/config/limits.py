"""Which values a setting may take: fixed names, and ranges of numbers. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dash_exp.errors import Fault, nearest

BASELINES = ("group_mean", "leave_one_out")
SCALES = ("std", "none")
LR_SCHEDULES = ("linear", "constant")
BETA_SCHEDULES = ("constant", "linear")
TEMPLATES = ("bare", "problem_solution", "docstring", "few_shot", "answer_tag", "chat", "chat_boxed")
EXTRACTIONS = ("boxed", "boxed_or_last", "last_number", "hash", "whole")
STD_EPSILON = 1e-4
"""Added to a group's standard deviation before dividing by it."""
SURROGATES = ("policy_gradient", "clipped")
KL_ESTIMATORS = ("k2", "k3")
AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
SCHEDULES = ("preemptive", "per_microbatch")
SOURCES = ("sampler", "solutions", "traces")

ALLOWED: dict[str, tuple[str, ...]] = {
    "algorithm.source": SOURCES,
    "algorithm.baseline": BASELINES,
    "algorithm.scale": SCALES,
    "algorithm.surrogate": SURROGATES,
    "algorithm.beta_schedule": BETA_SCHEDULES,
    "algorithm.kl": KL_ESTIMATORS,
    "algorithm.aggregation": AGGREGATIONS,
    "algorithm.schedule": SCHEDULES,
    "sampler.name": ("hf", "vllm", "vllm_servers"),
    "sampler.schedule": SCHEDULES,
    "sampler.dtype": ("bfloat16", "float32"),
    "filter.name": ("none", "advantage", "zero_variance"),
    "filter.kl": ("drop", "keep"),
    "filter.denominator": ("all", "kept"),
    "learner.schedule": LR_SCHEDULES,
    "learner.precision": ("bf16_mixed", "fp32", "bf16"),
    "learner.sharding": ("none", "fsdp"),
    "run.progress": ("auto", "plain", "none"),
    "cluster.name": ("local", "slurm"),
    "tracking.name": ("none", "mlflow"),
}
DATASET_ALLOWED: dict[str, tuple[str, ...]] = {
    "kind": ("jsonl", "arithmetic", "functions", "reasoning_gym"),
    "split": ("train", "test"),
    "template": TEMPLATES,
    "verifier": ("math", "integer", "code", "reasoning_gym"),
}
EXTRACTIONS_OF: dict[str, tuple[str, ...]] = {
    "math": EXTRACTIONS,
    "integer": ("first_integer",),
    "code": ("program",),
    "reasoning_gym": ("answer_tag", "boxed_or_last", "whole"),
}
VERIFIERS_OF: dict[str, tuple[str, ...]] = {
    "jsonl": ("math", "integer", "code"),
    "arithmetic": ("integer", "math"),
    "functions": ("code",),
    "reasoning_gym": ("reasoning_gym",),
}
"""Which verifiers understand the gold of a kind of dataset."""


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of finite numbers; `open_low` and `open_high` leave its ends out."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        low = f"{'more than' if self.open_low else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'less than' if self.open_high else 'at most'} {self.high:g}"


NATURAL = Range(0)
COUNT = Range(1)
POSITIVE = Range(0, open_low=True)
INSIDE_UNIT = Range(0, 1, open_low=True, open_high=True)

RANGES: dict[str, Range] = {
    "seed": NATURAL,
    "algorithm.steps": NATURAL,
    "algorithm.mini_batch": COUNT,
    "algorithm.epochs": POSITIVE,
    "recipe.sft_steps": NATURAL,
    "recipe.sft_epochs": POSITIVE,
    "recipe.sft_batch": COUNT,
    "recipe.sft_lr": POSITIVE,
    "algorithm.prompts_per_step": COUNT,
    "algorithm.clip_low": INSIDE_UNIT,
    "algorithm.clip_high": INSIDE_UNIT,
    "algorithm.beta": NATURAL,
    "algorithm.passes": COUNT,
    "sampler.max_new_tokens": COUNT,
    "sampler.temperature": POSITIVE,
    "sampler.prompts_per_call": COUNT,
    "sampler.max_sequences": COUNT,
    "sampler.kv_cache_gb": POSITIVE,
    "sampler.servers": COUNT,
    "sampler.server_threads": COUNT,
    "sampler.waves": COUNT,
    "sampler.restarts": NATURAL,
    "sampler.stall_s": POSITIVE,
    "sampler.gpu_memory_utilization": Range(0, 1, open_low=True),
    "filter.threshold": NATURAL,
    "learner.lr": POSITIVE,
    "learner.warmup_share": Range(0, 1, open_high=True),
    "learner.weight_decay": NATURAL,
    "learner.beta1": Range(0, 1, open_high=True),
    "learner.beta2": Range(0, 1, open_high=True),
    "learner.eps": POSITIVE,
    "learner.max_grad_norm": POSITIVE,
    "learner.lora.rank": NATURAL,
    "learner.lora.alpha": POSITIVE,
    "learner.micro_batch_tokens": COUNT,
    "learner.logit_chunk": COUNT,
    "learner.ranks": COUNT,
    "learner.timeout_s": POSITIVE,
    "model.memory_gb": POSITIVE,
    "model.hours": POSITIVE,
    "tracking.every_s": POSITIVE,
    "cluster.gpus": NATURAL,
    "cluster.gpus_per_node": COUNT,
    "cluster.cpus": COUNT,
    "cluster.cpus_per_gpu": COUNT,
    "cluster.memory_gb": POSITIVE,
    "cluster.hours": POSITIVE,
    "cluster.cells_per_gpu": COUNT,
    "cluster.max_parallel": COUNT,
    "cluster.warning_s": COUNT,
    "cluster.requeues": NATURAL,
    "evaluation.every": NATURAL,
    "evaluation.samples": COUNT,
    "evaluation.temperature": NATURAL,
    "evaluation.top_p": Range(0, 1, open_low=True),
    "evaluation.limit": COUNT,
    "checkpoint.every": NATURAL,
    "checkpoint.keep": COUNT,
    "verifier.workers": COUNT,
    "verifier.timeout_s": POSITIVE,
    "verifier.memory_mb": Range(512),
    "budget.seconds": POSITIVE,
    "cluster.threads": COUNT,
}
DATASET_RANGES: dict[str, Range] = {
    "limit": COUNT,
    "size": COUNT,
    "weight": POSITIVE,
    "max_prompt_tokens": COUNT,
    "completion_tokens": COUNT,
    "max_new_tokens": COUNT,
}
RANDOM_SIZES = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads")


def outside(key: str, value: float | None, allowed: Range) -> Iterator[Fault]:
    """A fault where a number is out of its range; None is no number."""
    if value is not None and not allowed.holds(value):
        yield range_fault(key, value, allowed)


def range_fault(key: str, value: float, allowed: Range) -> Fault:
    return Fault(key, f"got {value:g}, must be {allowed}")


def unknown(key: str, value: object, allowed: tuple[str, ...]) -> Fault:
    return Fault(key, f"got {value!r}", nearest(str(value), allowed))
