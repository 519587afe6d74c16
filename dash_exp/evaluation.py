"""Evaluation: the training sampler's own code asks held-out prompts; intervals are over prompts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from dash_exp.record import Row, read_json, write_json
from dash_exp.sampling.protocol import Decoding, Sampler
from dash_exp.statistics import bootstrap_interval, wilson_interval
from dash_exp.tasks.prompts import PromptSet, requests
from dash_exp.types import Group, Score

UNRELIABLE = ("timeout", "crashed", "verifier_error")
"""Outcomes that may be the machine's fault."""


class Judge(Protocol):
    """Submits a completion to a verifier; see `verifiers`."""

    @property
    def version(self) -> str: ...

    def submit(self, text: str, answer: str) -> Future[Score]: ...


@dataclass(frozen=True, slots=True)
class EvalSet:
    """One held-out set, and how it is asked and judged. `judging` names verifier and extraction."""

    label: str
    prompts: PromptSet
    judge: Judge
    decoding: Decoding
    samples: int
    judging: str


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Rows for evals.jsonl (metric, value, n, low, high) and for eval_samples.jsonl (per prompt)."""

    metrics: tuple[Row, ...]
    prompts: tuple[Row, ...]


def evaluate(one: EvalSet, sampler: Sampler, run_seed: int) -> EvalResult:
    """Ask every prompt `samples` times and judge. The same seeds at every evaluation of a run."""
    asked = requests(one.prompts.prompts, run_seed, f"evaluate/{one.label}", 0, one.samples)
    waiting: list[tuple[Group, list[Future[Score]]]] = []
    for group in sampler.stream(asked, one.decoding):
        futures = [one.judge.submit(c.text, group.prompt.answer) for c in group.completions]
        waiting.append((group, futures))
    waiting.sort(key=lambda pair: pair[0].position)
    rows = tuple(_prompt_row(one.label, g, [f.result() for f in fs]) for g, fs in waiting)
    return EvalResult(tuple(summarise(one.label, rows)), rows)


def _prompt_row(label: str, group: Group, scores: Sequence[Score]) -> Row:
    return {
        "dataset": label,
        "prompt": group.prompt.id,
        "scores": [s.value if math.isfinite(s.value) else None for s in scores],
        "outcomes": [s.outcome for s in scores],
        "tokens": [len(c.token_ids) for c in group.completions],
        "truncated": [c.finish_reason == "length" for c in group.completions],
    }


def summarise(label: str, rows: Sequence[Row]) -> list[Row]:
    """Accuracy with a 95 % interval over prompts (Wilson for one sample a prompt, else bootstrap),
    mean length in tokens, and the share of truncated completions. A verdict that failed (None) counts
    for nothing; `n` is the number of prompts with at least one verdict."""
    judged = [[x for x in r["scores"] if x is not None] for r in rows]
    means = [sum(scores) / len(scores) for scores in judged if scores]
    n = len(means)
    value = sum(means) / n if n else None
    single = all(len(scores) <= 1 and set(scores) <= {0.0, 1.0} for scores in judged)
    low, high = wilson_interval(round(sum(means)), n) if single else bootstrap_interval(means)
    lengths = [t for r in rows for t in r["tokens"]]
    cut = [t for r in rows for t in r["truncated"]]
    accuracy = {"metric": "accuracy", "value": value, "n": n}
    if math.isfinite(low):
        accuracy |= {"low": low, "high": high}
    plain = {
        "length/mean_tokens": sum(lengths) / len(lengths),
        "length/truncated_share": sum(cut) / len(cut),
        "verdicts/failed": sum(o in UNRELIABLE for r in rows for o in r["outcomes"]),
    }
    metrics = [accuracy, *({"metric": k, "value": v, "n": len(rows)} for k, v in plain.items())]
    return [{"dataset": label, **m} for m in metrics]


def cached(
    key: Mapping[str, Any], folder: Path, compute: Callable[[], EvalResult]
) -> tuple[EvalResult, bool]:
    """The result stored under this key, computed once even when several processes ask at a time. One
    with verdicts that a busy machine may have spoilt is not stored.

    Returns the result and whether it was already there.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{digest}.json"
    with FileLock(folder / f"{digest}.lock"):
        stored = read_json(path)
        if stored.get("key") == dict(key):
            return EvalResult(tuple(stored["metrics"]), tuple(stored["prompts"])), True
        result = compute()
        if not any(o in UNRELIABLE for row in result.prompts for o in row["outcomes"]):
            write_json(path, {"key": dict(key), **asdict(result)})
        return result, False


def base_key(one: EvalSet, weights: str, engine: Mapping[str, Any], run_seed: int) -> dict[str, Any]:
    """What the result of the untrained model depends on. Greedy results do not depend on a seed."""
    greedy = one.decoding.temperature == 0
    return {
        "weights": weights,
        "engine": dict(engine),
        "data": one.prompts.content_hash,
        "prompts": hashlib.sha256(repr([p.token_ids for p in one.prompts.prompts]).encode()).hexdigest(),
        "decoding": {
            "max_new_tokens": one.decoding.max_new_tokens,
            "temperature": one.decoding.temperature,
            "stop_ids": list(one.decoding.stop_ids),
        },
        "samples": one.samples,
        "judging": f"{one.judging}/{one.judge.version}",
        "seed": None if greedy else run_seed,
    }
