"""The commands of `python -m dash_exp.sweep`. Each returns an exit code. Torch-free."""

from __future__ import annotations

import fnmatch
from argparse import Namespace
from collections.abc import Sequence

from dash_exp.errors import ExitCode, Fault, UserError, nearest
from dash_exp.record import journal
from dash_exp.sweep.lookup import select
from dash_exp.sweep.status import SweepCell, read_sweep
from dash_exp.sweep.watch import (
    ROOT,
    chosen_of,
    logs_command,
    needed,
    out,
    root_of,
    say,
    say_json,
    status_command,
)
from dash_exp.text import format_seconds

__all__ = [
    "cancel_command",
    "launch_command",
    "list_command",
    "logs_command",
    "plan_command",
    "retry_command",
    "status_command",
]


def list_command(args: Namespace) -> int:
    from dash_exp.sweep.listing import listing, views

    patterns = [word for word in args.words if not word.startswith(ROOT)]
    rows, faults = listing(root_of(args.words))
    names = [row.name for row in rows]
    absent = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if absent:
        raise UserError([Fault(one, "names no sweep", nearest(one, names)) for one in absent])
    if patterns:
        rows = [row for row in rows if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)]
    if args.json:
        say_json([row.as_json() for row in rows])
    else:
        out(*views(rows))
    if faults:
        raise UserError(faults, "the other sweeps are listed")
    return ExitCode.OK


def plan_command(args: Namespace) -> int:
    from dash_exp.sweep.planning import order_of, scripts
    from dash_exp.sweep.preview import preview
    from dash_exp.sweep.report import plan_view

    order = order_of(args.sweep, args.overrides, root_of(args.overrides), args.n_jobs)
    texts, faults = scripts(order)
    made = preview(order.plan, order.root, texts)
    if args.json:
        say_json({**made.as_json(), "refused": [str(fault) for fault in faults]})
    else:
        out(plan_view(made))
        for number, text in enumerate(texts, 1):
            say(f"\nscript {number} of {len(texts)}:\n\n{text.strip()}")
        say("\nNothing was written, started or queued.")
    if faults:
        raise UserError(faults, "launching it would be refused")
    return ExitCode.OK


def launch_command(args: Namespace) -> int:
    from dash_exp.sweep.planning import order_of, start

    overrides = [*args.overrides, *(["run.force=true"] if args.force else [])]
    return start(order_of(args.sweep, overrides, root_of(overrides), args.n_jobs), args.wait)


def retry_command(args: Namespace) -> int:
    manifest, patterns = needed(args)
    wanted = ("failed",) if args.failed else ("failed", "interrupted", "cancelled")
    chosen = chosen_of(read_sweep(manifest), patterns)
    ready = [one for one in chosen if one.cell.state in wanted]
    others = [one for one in chosen if one not in ready]
    left = f"; the others: {_states(others)}" if others else ""
    say(f"{len(ready)} of {len(chosen)} cells start anew{left}")
    if not ready:
        return ExitCode.OK
    from dash_exp.sweep.planning import again, start

    for one in ready:  # budgets of retries count anew
        journal.note(one.cell.folder, "retry")
    return start(again(manifest, [one.entry.folder for one in ready], args.n_jobs), args.wait)


def _states(cells: Sequence[SweepCell]) -> str:
    states = sorted(one.cell.state for one in cells)
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def cancel_command(args: Namespace) -> int:
    from dash_exp.sweep.dispatch import cancel

    manifest, patterns = needed(args)
    chosen = select(manifest.entries, patterns)
    done = cancel(manifest, {entry.id for entry in chosen}, entire=not patterns, again=args.now)
    for one in done.ending:
        pace = f"a step takes {format_seconds(one.cell.step_s)}" if one.cell.step_s else "it has no step yet"
        say(f"{one.label} ({one.entry.id}) was asked to end and will, after its step; {pace}")
    for one, why in done.skipped:
        say(f"{one.label} ({one.entry.id}) is skipped: {why}; name it to cancel it as well")
    if not (done.ended or done.ending or done.skipped):
        found = [one for one in read_sweep(manifest).cells if one.entry in chosen]
        say(f"nothing to cancel: {_states(found)}")
        return ExitCode.OK
    open_text = f", {len(done.ending)} ending" if done.ending else ""
    say(f"{len(done.ended)} of {len(chosen)} cells cancelled{open_text}; launch or retry goes on with them")
    return ExitCode.OK
