"""A full update of ours and of TRL's in turn, on the same work. See README.md for what is equal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Line, Options, at_least, print_table
from benchmarks.turns import WARM_UP, spread
from dash_exp.config.schema import Config

PHASES = ("sample", "verify", "logprob", "backprop", "optimizer", "sync", "other")


def take_turns(
    config: Config,
    cache: Path,
    scratch: Path,
    *,
    updates: int,
    micro_batch: int,
    attention: str,
    share: float | None = None,
) -> dict[str, Any]:
    """Both sides built once, then an update of one after an update of the other. `share`: of the groups
    whose rewards differ, if rewards are set and not earned; else answers are integers."""
    from benchmarks import agreement
    from benchmarks.ours import Ours
    from benchmarks.peer import Rewards, Seen, Turns, integer_rewards, make_trainer
    from benchmarks.rewards import SetJudge, SetRewards, marked
    from dash_exp.tasks.prompts import prompts_at
    from dash_exp.verifiers.judges import InlineJudge, judge_integer

    ours = Ours(config, cache, scratch / "ours")
    plan, count = ours.built.plan, updates + WARM_UP
    rewards: Rewards = integer_rewards
    if share is not None:
        prompts = ours.built.parts.chooser.prompts
        ours.ask(marked(prompts, plan.seed, count, plan.prompts_per_step, share))
        ours.change(judges={prompts.name: SetJudge(plan.group_size)})
        rewards = SetRewards(plan.group_size)
    rows: list[dict[str, Any]] = []
    seen, turns = Seen(rewards), Turns(lambda: rows.append(ours.step()))
    parts = ours.built.parts
    per_step = plan.prompts_per_step
    asked = prompts_at(parts.chooser.prompts, plan.seed, 0, count * per_step)
    trainer = make_trainer(
        config,
        ours.built.source.folder,
        scratch / "trl",
        asked,
        parts.decoding.stop_ids,
        seen,
        turns,
        micro_batch,
        attention,
    )
    checks = agreement.before(ours, asked, trainer.processing_class, rewards)
    checks |= agreement.listed_texts() if share is None else {}
    print(", ".join(f"{n} {what}" for what, n in checks.items()), flush=True)
    trainer.train()
    judge = InlineJudge(judge_integer) if share is None else SetJudge(plan.group_size)
    checks |= agreement.after(seen, judge)
    ours.close()
    return {
        "beta": config.algorithm.beta,
        "filter": config.filter.name,
        "checks": checks,
        "ours": our_numbers(rows[WARM_UP:]),
        "trl": peer_numbers(turns.seconds[WARM_UP:], seen.batches[WARM_UP:]),
    }


def our_numbers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """From the rows of our record."""
    return {
        "seconds": spread([r["time/step_s"] for r in rows]),
        "phases": {p: statistics.median(r[f"time/{p}_s"] for r in rows) for p in PHASES},
        "reward": statistics.mean(r["reward/mean"] for r in rows),
        "tokens": statistics.mean(r["tokens/sampled"] for r in rows),
        "kept_share": statistics.mean(r["filter/kept_share"] for r in rows),
    }


def peer_numbers(seconds: Sequence[float], batches: Sequence[Any]) -> dict[str, Any]:
    """From its timed updates and what its reward function was shown."""
    return {
        "seconds": spread(seconds),
        "reward": statistics.mean(reward for rows in batches for _, _, reward, _ in rows),
        "tokens": statistics.mean(sum(length for *_, length in rows) for rows in batches),
    }


def line_of(row: dict[str, Any], work: str, micro_batch: int, goal: float, options: Options) -> Line:
    """One comparison: how many times faster."""
    ours, theirs = row["ours"]["seconds"]["median"], row["trl"]["seconds"]["median"]
    kept = row["ours"]["kept_share"]
    return at_least(
        goal,
        theirs / ours,
        options,
        work=f"{work}, kept {kept:.2f}",
        against=f"TRL, micro-batch {micro_batch}",
        ours=ours,
        rival=theirs,
        unit="s an update",
    )


def show_updates(rows: Sequence[dict[str, Any]]) -> None:
    def cells(seconds: dict[str, Any]) -> list[str]:
        return [f"{seconds['median']:.2f}", f"{seconds['min']:.2f} .. {seconds['max']:.2f}"]

    table = []
    for row in rows:
        ours, trl = row["ours"], row["trl"]
        ratio = trl["seconds"]["median"] / ours["seconds"]["median"]
        table.append(
            [
                f"{row['beta']:g}",
                *cells(ours["seconds"]),
                *cells(trl["seconds"]),
                f"{ratio:.1f}x",
                f"{ours['tokens']:.0f} / {trl['tokens']:.0f}",
                f"{ours['reward']:.2f} / {trl['reward']:.2f}",
            ]
        )
    columns = [
        "beta",
        "ours s",
        "min .. max",
        "TRL s",
        "min .. max",
        "TRL / ours",
        "tokens ours / TRL",
        "reward ours / TRL",
    ]
    print_table("Seconds per update (median)", columns, table)
    phases = [
        [
            f"{row['beta']:g}",
            *(f"{row['ours']['phases'][p]:.3f}" for p in PHASES),
            f"{row['ours']['kept_share']:.2f}",
        ]
        for row in rows
    ]
    print_table("Ours by phase, s (median)", ["beta", *PHASES, "kept share"], phases)
