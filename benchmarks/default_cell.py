"""Seconds per update of the default cell, ours and TRL's in turn, on the same work.

    python -m benchmarks.default_cell [--updates 5] [--micro-batch 16] [--beta 0 0.04] [--startup]

See README.md for what is equal on both sides and what is not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import describe, machine, print_table, write

PHASES = ("sample", "verify", "logprob", "backprop", "optimizer", "sync", "other")
WARM_UP = 1


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest of what was measured, and all of it."""
    return {
        "median": statistics.median(values), "min": min(values), "max": max(values),
        "all": list(values),
    }  # fmt: skip


def take_turns(args: argparse.Namespace, beta: float, scratch: Path) -> dict[str, Any]:
    """One row: both sides built once, then an update of one after an update of the other."""
    from benchmarks import agreement
    from benchmarks.ours import Ours, config_of
    from benchmarks.peer import Seen, Turns, make_trainer
    from dash_exp.tasks.prompts import batch

    config = config_of(args.filter, beta, args.threads, args.override)
    ours = Ours(config, Path(config.run.dir) / "cache", scratch / "ours")
    rows: list[dict[str, Any]] = []
    seen, turns = Seen(), Turns(lambda: rows.append(ours.step()))
    plan, parts = ours.machine.plan, ours.machine.parts
    steps = range(1, args.updates + WARM_UP + 1)
    prompts = [p for s in steps for p in batch(parts.prompts, plan.seed, s, plan.prompts_per_step)]
    trainer = make_trainer(
        config, ours.machine.source.folder, scratch / "trl", prompts, parts.decoding.stop_ids,
        seen, turns, args.micro_batch, args.peer_attention,
    )  # fmt: skip
    checks = agreement.before(ours, prompts, trainer.processing_class)
    print(f"beta {beta:g}: " + ", ".join(f"{n} {what}" for what, n in checks.items()), flush=True)
    trainer.train()
    checks |= agreement.after(seen)
    ours.close()
    return {
        "beta": beta, "filter": args.filter, "checks": checks,
        "ours": our_numbers(rows[WARM_UP:]),
        "trl": peer_numbers(turns.seconds[WARM_UP:], seen.batches[WARM_UP:]),
    }  # fmt: skip


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


def show_updates(rows: Sequence[dict[str, Any]]) -> None:
    def cells(seconds: dict[str, Any]) -> list[str]:
        return [f"{seconds['median']:.2f}", f"{seconds['min']:.2f} .. {seconds['max']:.2f}"]

    table = []
    for row in rows:
        ours, trl = row["ours"], row["trl"]
        ratio = trl["seconds"]["median"] / ours["seconds"]["median"]
        table.append(
            [f"{row['beta']:g}", *cells(ours["seconds"]), *cells(trl["seconds"]), f"{ratio:.1f}x",
             f"{ours['tokens']:.0f} / {trl['tokens']:.0f}",
             f"{ours['reward']:.2f} / {trl['reward']:.2f}"]
        )  # fmt: skip
    columns = ["beta", "ours s", "min .. max", "TRL s", "min .. max", "TRL / ours",
               "tokens ours / TRL", "reward ours / TRL"]  # fmt: skip
    print_table("Seconds per update (median)", columns, table)
    phases = [
        [f"{row['beta']:g}", *(f"{row['ours']['phases'][p]:.3f}" for p in PHASES),
         f"{row['ours']['kept_share']:.2f}"]
        for row in rows
    ]  # fmt: skip
    print_table("Ours by phase, s (median)", ["beta", *PHASES, "kept share"], phases)


def start_up(args: argparse.Namespace) -> dict[str, Any]:
    """Start-up to first step; the model folder is made before the clock runs."""
    from benchmarks import startup
    from benchmarks.ours import config_of
    from dash_exp.build import find_model

    config = config_of(args.filter, 0.04, args.threads)
    models = find_model(config, Path(config.run.dir) / "cache").folder.parent
    times = startup.measure(models, args.startup_repeats, args.threads)
    measured = {label: spread(values) for label, values in times.items()}
    rows = [
        [label, f"{v['median']:.1f}", f"{v['min']:.1f} .. {v['max']:.1f}"] for label, v in measured.items()
    ]
    print_table("Start of the process to first step, s", ["", "median", "min .. max"], rows)
    return measured


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.default_cell", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--updates", type=int, default=5, help="timed, after one that is not")
    parser.add_argument("--micro-batch", type=int, default=16, help="completions, TRL only")
    parser.add_argument("--beta", type=float, nargs="*", default=[0.0, 0.04])
    parser.add_argument("--filter", choices=["advantage", "none"], default="advantage")
    parser.add_argument("--peer-attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--startup", action="store_true", help="also measure start-up")
    parser.add_argument("--startup-repeats", type=int, default=3)
    parser.add_argument("--override", nargs="*", default=[], help="key=value, for both sides")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    facts = machine(args.threads)
    print(describe(facts), flush=True)
    options = {k: v for k, v in vars(args).items() if k != "json"}
    result: dict[str, Any] = {"benchmark": "default_cell", "machine": facts, "options": options}
    if args.startup:
        result["startup"] = start_up(args)
    result["rows"] = []
    for beta in args.beta:
        with tempfile.TemporaryDirectory() as scratch:
            result["rows"].append(take_turns(args, beta, Path(scratch)))
    if result["rows"]:
        show_updates(result["rows"])
    write(args.json, result)


if __name__ == "__main__":
    main()
