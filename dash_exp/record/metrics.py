"""Rows of the record, from what a step did. An absent value is left out, never 0."""

from __future__ import annotations

import math
import resource
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dash_exp.record.folder import Row, finite, read_final
from dash_exp.record.reading import read_rows
from dash_exp.types import AdvantagedGroup, Completion, Score


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """Everything that a step's row is computed from. `sums`: the learner's sums over forwarded tokens;
    `updates`: one entry (grad_norm, lr, skipped) per update of this batch; `updates_total`: updates since the
    start, skipped ones included; `waves`: in which the batch was sampled, where something was learned
    meanwhile; `more`: further numbers under their record keys."""

    groups: tuple[AdvantagedGroup, ...]
    updates: tuple[Any, ...]
    sums: Mapping[str, float]
    updates_total: int
    waves: int | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    def samples(self) -> Iterator[tuple[Completion, Score, float, bool]]:
        for g in self.groups:
            yield from zip(g.group.completions, g.scored.scores, g.advantages, g.kept, strict=True)


def mean(values: Iterable[float]) -> float | None:
    """The mean of the finite values (a verdict that could not be reached is NaN), or None."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def objective(folder: Path) -> float | None:
    """What a search may maximise: a cell's last accuracy on its first evaluation set, else its mean reward
    over the last ten steps; None where there is neither."""
    evals = [row for row in read_final(folder, "evals") if row["metric"] == "accuracy"]
    last = [row.get("value") for row in evals if row["dataset"] == evals[0]["dataset"]][-1:]
    if last and last[0] is not None:
        return float(last[0])
    rewards = [row.get("reward/mean") for row in read_final(folder, "steps")[-10:]]
    return mean(reward for reward in rewards if reward is not None)


def batch_values(facts: BatchFacts) -> Row:
    """Reward, length, advantage, filter and outcome shares of the sampled batch; of a batch of
    demonstrations only its size, since nobody sampled, judged or dropped anything."""
    rows = list(facts.samples())
    lengths = [len(c.token_ids) for c, _, _, _ in rows]
    if all(s.outcome == "shown" for _, s, _, _ in rows):
        return {
            "length/mean_tokens": mean(lengths),
            "length/max_tokens": max(lengths),
            "completions/shown": len(rows),
            "completions/sampled": 0,
            "tokens/shown": sum(lengths),
            "tokens/sampled": 0,
        }
    kept = [(c, a) for c, _, a, k in rows if k]
    outcomes = Counter(s.outcome for _, s, _, _ in rows)
    constant = [is_constant(g.seen or [s.value for s in g.scored.scores]) for g in facts.groups]
    parts = sorted({name for _, s, _, _ in rows for name in s.parts})
    shaped = [r for g in facts.groups if is_shaped(g) for r in g.rewards]
    masked = [c for g in facts.groups for c, m in zip(g.group.completions, g.masked, strict=False) if m]
    by_mask = {"completions": len(masked), "tokens": sum(len(c.token_ids) for c in masked)}
    penalties = [p for g in facts.groups for p in g.penalties]
    return {
        "reward/mean": mean([s.value for _, s, _, _ in rows]),
        **{f"outcome/{name}": count for name, count in sorted(outcomes.items())},
        "length/mean_tokens": mean(lengths),
        "length/max_tokens": max(lengths),
        "length/truncated_share": mean([c.finish_reason == "length" for c, _, _, _ in rows]),
        "advantage/mean_abs": mean([abs(a) for _, _, a, _ in rows]),
        "advantage/kept_mean_abs": mean([abs(a) for _, a in kept]),
        "filter/kept_share": len(kept) / len(rows),
        "filter/zero_variance_share": mean(constant),
        "completions/sampled": len(rows),
        "completions/dropped_by_filter": len(rows) - len(kept) - by_mask["completions"],
        "tokens/sampled": sum(lengths),
        "tokens/kept": sum(len(c.token_ids) for c, _ in kept),
        "tokens/dropped_by_filter": sum(lengths) - sum(len(c.token_ids) for c, _ in kept) - by_mask["tokens"],
        **({"reward/shaped_mean": mean(shaped)} if shaped else {}),
        **{f"reward/{name}": mean([s.parts[name] for _, s, _, _ in rows if s.parts]) for name in parts},
        **({"reward/overlong_penalty": mean(penalties)} if penalties else {}),
        **({f"{k}/dropped_by_truncation": n for k, n in by_mask.items()} if facts.groups[0].masked else {}),
    }


def is_constant(values: Sequence[float]) -> bool:
    """Whether a group has nothing to compare: its finite values are equal."""
    finite = [v for v in values if math.isfinite(v)]
    return not finite or max(finite) == min(finite)


def is_shaped(group: AdvantagedGroup) -> bool:
    """Whether its rewards may be other than the verifier's scores."""
    return bool(group.penalties) or any(s.parts or s.added for s in group.scored.scores)


def learner_values(facts: BatchFacts) -> Row:
    """What the learner saw: per-token means, and the updates. Entropy, log-probability and its gap to
    the sampler's are those at the sampling weights; ratio and clipping those of the later updates on the
    batch, where an arm has any; KL that of every update."""
    sums = facts.sums
    last = facts.updates[-1]
    done = [u for u in facts.updates if not u.skipped]

    def total(name: str) -> int:
        return int(sums.get(f"first/{name}", 0) + sums.get(f"later/{name}", 0))

    def forwarded(name: str) -> int:
        return total(name) + int(sums.get(f"scored/{name}", 0))

    def at_sampling_weights(name: str) -> float:
        """Of the first forward of each completion, before any update on this batch."""
        both = [sums.get(f"{which}/{name}", 0.0) for which in ("first", "scored")]
        return sum(both) / (sums.get("first/tokens", 0.0) + sums.get("scored/tokens", 0.0))

    row: Row = {
        "updates": len(done),
        "updates/skipped": len(facts.updates) - len(done),
        "updates/nonfinite": sum(not u.finite for u in facts.updates),
        "updates/total": facts.updates_total,
        "optimizer/grad_norm": mean([u.grad_norm for u in done]),
        "optimizer/lr": last.lr,
        "completions/forwarded": forwarded("completions"),
        "tokens/forwarded": forwarded("tokens"),
        "tokens/backpropagated": total("tokens"),
        "tokens/computed": total("computed"),
    }
    if learned := total("tokens"):
        row["policy/entropy_nats"] = at_sampling_weights("entropy")
        row["policy/logprob_gap"] = at_sampling_weights("gap")
        row["policy/logprob_mean"] = at_sampling_weights("logprob")
        which = "later" if "later/tokens" in sums else "first"
        row["policy/clip_share"] = sums[f"{which}/clipped"] / sums[f"{which}/tokens"]
        row["policy/ratio_mean"] = sums[f"{which}/ratio"] / sums[f"{which}/tokens"]
        if "first/correction" in sums or "later/correction" in sums:
            both = sums.get("first/correction", 0.0) + sums.get("later/correction", 0.0)
            row["correction/weight_mean"] = both / learned
        if "first/kl" in sums or "later/kl" in sums:
            row["kl/mean"] = (sums.get("first/kl", 0.0) + sums.get("later/kl", 0.0)) / learned
            row["kl/beta"] = last.beta
    if "update/reduce_s" in sums:  # of several ranks; part of the optimizer's time
        row["time/reduce_s"] = round(sums["update/reduce_s"], 6)
    if "gpu_peak_mb" in sums:
        row["memory/gpu_peak_mb"] = sums["gpu_peak_mb"]
    return row


def time_values(facts: BatchFacts, wall: float, seconds: Mapping[str, float], overlap: float) -> Row:
    """The ledger of a step. `overlap`: seconds in which others worked while the main process did too."""
    tokens = sum(len(c.token_ids) for c, _, _, _ in facts.samples())
    return {
        "time/step_s": round(wall, 6),
        **{f"time/{name}_s": round(value, 6) for name, value in seconds.items()},
        "time/overlap_s": round(overlap, 6),
        "time/tokens_per_s": round(tokens / wall, 3),
        "memory/peak_mb": peak_memory_mb(),
    }


def step_row(step: int, facts: BatchFacts, wall: float, seconds: Mapping[str, float], overlap: float) -> Row:
    """One row of steps.jsonl."""
    times = time_values(facts, wall, seconds, overlap)
    waves = {} if facts.waves is None else {"sampler/waves": facts.waves}
    return finite(
        {"step": step, **batch_values(facts), **learner_values(facts), **waves, **facts.more, **times}
    )


def sample_rows(step: int, groups: Sequence[AdvantagedGroup]) -> list[Row]:
    """One row of samples.jsonl per completion."""
    return [
        {
            "step": step,
            "prompt": g.group.prompt.id,
            "index": index,
            "tokens": len(c.token_ids),
            "finish": c.finish_reason,
            "reward": score.value,
            **({"shaped": g.rewards[index], "parts": dict(score.parts)} if is_shaped(g) else {}),
            "outcome": score.outcome,
            **({"detail": score.detail} if score.outcome == "verifier_error" else {}),
            "advantage": advantage,
            "kept": kept,
            "text": c.text,
        }
        for g in groups
        for index, (c, score, advantage, kept) in enumerate(
            zip(g.group.completions, g.scored.scores, g.advantages, g.kept, strict=True)
        )
    ]


def peak_memory_mb() -> float:
    """Peak resident memory of this process since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)


def judged_prompts(folder: Path, dataset: str, step: int) -> tuple[list[Row], int]:
    """Of a cell's evaluation of a set at a step, by its last attempt: each prompt with at least one verdict,
    its mean `score`, and how many of `n` samples were `correct`. Also how many rows could not
    be used."""
    read = read_rows(folder / "eval_samples.jsonl")
    rows = [r for r in read.rows if r["dataset"] == dataset and r["step"] == step]
    odd = sum(len(r["scores"]) != len(r["outcomes"]) for r in rows)
    rows = [r for r in rows if len(r["scores"]) == len(r["outcomes"])]
    newest = max((r["attempt"] for r in rows), default=0)
    found: list[Row] = []
    for row in (r for r in rows if r["attempt"] == newest):
        judged = [(s, o) for s, o in zip(row["scores"], row["outcomes"], strict=True) if s is not None]
        if judged:
            correct = sum(outcome == "correct" for _, outcome in judged)
            score = sum(s for s, _ in judged) / len(judged)
            found.append({"prompt": row["prompt"], "score": score, "correct": correct, "n": len(judged)})
    return found, read.torn + odd
