"""Evaluation: the training sampler's own code asks held-out prompts; intervals are over prompts.

A prompt asked n times has one value, its mean verdict; accuracy is the mean of these values (greedy
accuracy for n = 1, avg@n beyond). pass@k is estimated per prompt from all n samples, so the samples of a
prompt never count as independent observations. docs/evaluation.md says more.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from dash_exp import PACKAGE
from dash_exp.record.folder import Row, read_json, write_json
from dash_exp.record.identity import package_version
from dash_exp.sampling.protocol import Sampler, arrived
from dash_exp.statistics.shares import bootstrap_interval, pass_at_k, wilson_interval
from dash_exp.tasks.prompts import PromptSet, requests
from dash_exp.types import Decoding, Group, Score
from dash_exp.verifiers.types import Facts, Judge

UNRELIABLE = ("timeout", "crashed", "verifier_error")
"""Outcomes that may be the machine's fault."""
SAMPLING_CODE = ("sampling", "modeling", "evaluation/metrics.py", "seeding.py", "tasks/prompts.py")
"""What of the package decides which tokens an untrained model answers with, beside the prompts."""
OWN_JUDGE = "own/"
"""How `EvalSet.judging` begins for a verifier of the user's own."""
JUDGES = "verifiers"
"""The package with the code of judges: its own modules serve all verifiers, its packages those named here."""
JUDGING_PACKAGES = {"math": ("math",), "code": ("code",), "reasoning_gym": ("code",)}
JUDGING_LIBRARIES = {
    "math": ("math-verify", "sympy", "latex2sympy2_extended"),
    "math_verify": ("math-verify", "sympy", "latex2sympy2_extended"),
    "code": ("numpy",),
    "reasoning_gym": ("reasoning-gym",),
}


@dataclass(frozen=True, slots=True)
class EvalSet:
    """One held-out set, and how it is asked and judged. `judging` names verifier and extraction; pass@k
    is reported for each of `k`."""

    label: str
    prompts: PromptSet
    judge: Judge
    decoding: Decoding
    samples: int
    judging: str
    k: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Rows for evals.jsonl (metric, value, n, low, high) and for eval_samples.jsonl (per prompt)."""

    metrics: tuple[Row, ...]
    prompts: tuple[Row, ...]


def evaluate(one: EvalSet, sampler: Sampler, run_seed: int) -> EvalResult:
    """Ask every prompt `samples` times and judge. The same seeds at every evaluation of a run."""
    asked = requests(one.prompts.prompts, run_seed, f"evaluate/{one.label}", 0, one.samples)
    waiting: list[tuple[Group, list[Future[Score]]]] = []
    for group in arrived(sampler.stream(asked, one.decoding)):
        futures = [
            one.judge.submit(c.text, group.prompt.answer, Facts.of(group.prompt, c))
            for c in group.completions
        ]
        waiting.append((group, futures))
    waiting.sort(key=lambda pair: pair[0].position)
    verdicts = [(group, [_verdict(one, future.result()) for future in fs]) for group, fs in waiting]
    rows = tuple(_prompt_row(one.label, group, scores) for group, scores in verdicts)
    return EvalResult(tuple(summarise(one.label, rows, one.k)), rows)


def _verdict(one: EvalSet, score: Score) -> Score:
    """The score that counts. A verifier of the user's own may score by any number: its outcome counts."""
    own = one.judging.startswith(OWN_JUDGE) and math.isfinite(score.value)
    return replace(score, value=float(score.outcome == "correct")) if own else score


def _prompt_row(label: str, group: Group, scores: Sequence[Score]) -> Row:
    return {
        "dataset": label,
        "prompt": group.prompt.id,
        "scores": [s.value if math.isfinite(s.value) else None for s in scores],
        "outcomes": [s.outcome for s in scores],
        "tokens": [len(c.token_ids) for c in group.completions],
        "truncated": [c.finish_reason == "length" for c in group.completions],
    }


def summarise(label: str, rows: Sequence[Row], k: Sequence[int] = ()) -> list[Row]:
    """Accuracy and pass@k with 95 % intervals over prompts, mean length in tokens, the share of truncated
    completions, and how many verdicts failed.

    A verdict that could not be reached (None) counts for nothing, neither right nor wrong. `n` is the
    number of prompts a value comes from: for accuracy those with at least one verdict, for pass@k those
    with at least k. Where there are none the row has no value.
    """
    judged = [[x for x in r["scores"] if x is not None] for r in rows]
    lengths = [t for r in rows for t in r["tokens"]]
    cut = [t for r in rows for t in r["truncated"]]
    plain = {
        "length/mean_tokens": sum(lengths) / len(lengths),
        "length/truncated_share": sum(cut) / len(cut),
        "verdicts/failed": sum(o in UNRELIABLE for r in rows for o in r["outcomes"]),
    }
    metrics = [
        _over_prompts("accuracy", [sum(scores) / len(scores) for scores in judged if scores]),
        *(_over_prompts(f"pass@{size}", _pass_values(rows, size)) for size in k),
        *({"metric": name, "value": value, "n": len(rows)} for name, value in plain.items()),
    ]
    return [{"dataset": label, **m} for m in metrics]


def _pass_values(rows: Sequence[Row], k: int) -> list[float]:
    """pass@k of each prompt that has at least k verdicts; `correct` alone passes, whatever fraction of
    the reward another answer was given."""
    counts = []
    for row in rows:
        pairs = zip(row["scores"], row["outcomes"], strict=True)
        outcomes = [outcome for value, outcome in pairs if value is not None]
        counts.append((len(outcomes), outcomes.count("correct")))
    return [pass_at_k(n, correct, k) for n, correct in counts if n >= k]


def _over_prompts(metric: str, values: Sequence[float]) -> Row:
    """The mean over prompts with its interval: Wilson's where every prompt is right or wrong (which the
    bootstrap would give no width when all are), else by resampling prompts."""
    n = len(values)
    if n == 0:
        return {"metric": metric, "n": 0}
    binary = set(values) <= {0.0, 1.0}
    low, high = wilson_interval(round(sum(values)), n) if binary else bootstrap_interval(values)
    if low == high:  # all alike, and no share: resampling cannot say how sure that is
        low = high = math.nan
    ends = {"low": low, "high": high} if math.isfinite(low) else {}
    return {"metric": metric, "value": sum(values) / n, "n": n, **ends}


def cached(
    key: Mapping[str, Any], folder: Path, compute: Callable[[], EvalResult], run: str = "this run"
) -> tuple[EvalResult, str]:
    """The result stored under this key, computed once even when several processes ask at a time. One
    with verdicts that a busy machine may have spoilt is not stored; where programs are judged, a
    timeout or a crash is the program's own doing, and most results hold some.

    `run` names who asks. Returns the result and the name of the run that computed it, "" if it was this one.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{digest}.json"
    with FileLock(folder / f"{digest}.lock"):
        stored = read_json(path)
        if stored.get("key") == dict(key):
            known = EvalResult(tuple(stored["metrics"]), tuple(stored["prompts"]))
            return known, str(stored.get("run", "an earlier run"))
        result = compute()
        spoilt = ("verifier_error",) if str(key.get("judging", "")).startswith("code/") else UNRELIABLE
        if not any(o in spoilt for row in result.prompts for o in row["outcomes"]):
            write_json(path, {"key": dict(key), "run": run, **asdict(result)})
        return result, ""


def shared(
    one: EvalSet,
    key: Mapping[str, Any],
    folder: Path,
    compute: Callable[[], EvalResult],
    run: str = "this run",
) -> tuple[EvalResult, str]:
    """`cached`, for a set that another cell may have stored under another label, or with other k: what
    is shared is the verdicts, and they are summed up here."""
    stored, known_from = cached(key, folder, compute, run)
    rows = tuple({**row, "dataset": one.label} for row in stored.prompts)
    return EvalResult(tuple(summarise(one.label, rows, one.k)), rows), known_from


def base_key(one: EvalSet, weights: str, engine: Mapping[str, Any], run_seed: int) -> dict[str, Any]:
    """What the verdicts on an untrained model depend on. Greedy answers do not depend on a seed; sampled
    ones do, and on the set's label, which is part of their seeds. The hash of the prompts' tokens stands
    for template and tokenizer."""
    greedy = one.decoding.temperature == 0
    return {
        "weights": weights,
        "engine": dict(engine),
        "code": code_hash(SAMPLING_CODE),
        "data": one.prompts.content_hash,
        "prompts": hashlib.sha256(
            repr([(p.id, p.token_ids) for p in one.prompts.prompts]).encode()
        ).hexdigest(),
        "decoding": {
            "max_new_tokens": one.decoding.max_new_tokens,
            "temperature": one.decoding.temperature,
            "top_p": one.decoding.top_p,
            "stop_ids": list(one.decoding.stop_ids),
        },
        "samples": one.samples,
        "judging": f"{one.judging}/{one.judge.version}",
        "judging_code": judging_code(one.judging.partition("/")[0]),
        "seed": None if greedy else [run_seed, one.label],
    }


def judging_code(verifier: str) -> dict[str, str | None]:
    """The code that can run to judge: a hash of ours, and the versions of libraries."""
    own = [JUDGES, *(f"{JUDGES}/{name}" for name in JUDGING_PACKAGES.get(verifier, ()))]
    files = [str(f.relative_to(PACKAGE)) for place in own for f in sorted((PACKAGE / place).glob("*.py"))]
    libraries = JUDGING_LIBRARIES.get(verifier, ())
    return {"own": code_hash(files), **{name: package_version(name) for name in libraries}}


def code_hash(parts: Sequence[str]) -> str:
    """SHA-256 over files and folders of the package: a result of other code is not shared."""
    digest = hashlib.sha256()
    for part in parts:
        place = PACKAGE / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(PACKAGE)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()
