"""Seconds per update of the default cell, ours and TRL's in turn, on the same work.

    python -m benchmarks.default_cell [--updates 5] [--micro-batch 16] [--beta 0 0.04] [--startup]

See README.md for what is equal on both sides and what is not.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import Options, describe, machine, need, print_table, write
from benchmarks.turns import spread
from benchmarks.whole_update import line_of, show_updates, take_turns

GOAL, MICRO_BATCH = 10.0, 16


def measure(options: Options) -> dict[str, Any]:
    """The row of `python -m benchmarks`: both values of beta, TRL's best micro-batch."""
    need("trl", options)
    from benchmarks.ours import asked, config_of

    rows, lines = [], []
    size = 2 if options.quick else MICRO_BATCH
    for beta in (0.0,) if options.quick else (0.0, 0.04):
        config = config_of("advantage", beta, options.threads, asked(options))
        with tempfile.TemporaryDirectory() as scratch:
            row = take_turns(
                config,
                options.cache,
                Path(scratch),
                updates=options.rounds,
                micro_batch=size,
                attention="sdpa",
            )
        rows.append(row)
        work = f"full update, default work, beta {beta:g}"
        lines.append(asdict(line_of(row, work, size, GOAL, options)))
    show_updates(rows)
    return {"lines": lines, "updates": rows}


def start_up(args: argparse.Namespace) -> dict[str, Any]:
    """Start-up to first step; the model folder is made before the clock runs."""
    from benchmarks import startup
    from benchmarks.ours import config_of
    from dash_exp.modeling.source import locate

    config = config_of(args.filter, 0.04, args.threads)
    models = locate(config.model, Path(config.run.dir) / "cache").folder.parent
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
    parser.add_argument("--micro-batch", type=int, default=MICRO_BATCH, help="completions, TRL only")
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
        from benchmarks.ours import config_of

        config = config_of(args.filter, beta, args.threads, args.override)
        print(f"beta {beta:g}")
        with tempfile.TemporaryDirectory() as scratch:
            result["rows"].append(
                take_turns(
                    config,
                    Path(config.run.dir) / "cache",
                    Path(scratch),
                    updates=args.updates,
                    micro_batch=args.micro_batch,
                    attention=args.peer_attention,
                )
            )
    if result["rows"]:
        show_updates(result["rows"])
    write(args.json, result)


if __name__ == "__main__":
    main()
