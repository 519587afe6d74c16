"""Sweeps, named by a yaml, by a name below <run.dir>/sweeps, or a folder:

  python -m dash_exp.sweep list               what each tests, and its progress
  python -m dash_exp.sweep plan <sweep>       a dry run: cells, hours, scripts
  python -m dash_exp.sweep launch <sweep>     start it or go on; returns at once
  python -m dash_exp.sweep race <sweep>       add seeds until decided; rungs
  python -m dash_exp.sweep status [<sweep>]   what its cells are doing
  python -m dash_exp.sweep logs <sweep>       the end of its cells' output
  python -m dash_exp.sweep retry <sweep>      start failed cells again
  python -m dash_exp.sweep cancel <sweep>     stop its cells, to continue later

plan, launch and race take overrides of the sweep's own (cluster=slurm
seed=0,1), the others patterns, which select cells: an override
(algorithm=dash), a part of a folder's name, or either with wildcards; each
further one narrows the choice.
run.dir=<folder> looks elsewhere than in outputs/. `<command> --help` lists
flags (--json, --watch, --wait, --failed). Everything may be repeated, and run
twice at once. More in docs/sweeps.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import RenderableType
from rich.padding import Padding

from dash_exp.errors import ExitCode, Fault, UserError, nearest, run_command
from dash_exp.record import journal
from dash_exp.record.manifest import read_all
from dash_exp.sweep import spec as specs
from dash_exp.sweep.report import by_state, counts_text, plain, print_parts
from dash_exp.sweep.status import counts_of, read_sweep, read_sweeps, select
from dash_exp.sweep.watch import ROOT, chosen_of, logs_command, needed, root_of, say, say_json, status_command
from dash_exp.text import format_seconds

# The command line ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with the error format of all commands."""

    def error(self, message: str) -> NoReturn:
        raise UserError(Fault(self.prog, message, f"{self.prog} --help"))


def parser_of(command: str) -> Parser:
    what, _ = COMMANDS[command]
    parser = Parser(prog=f"python -m dash_exp.sweep {command}", description=what, allow_abbrev=False)
    add = parser.add_argument
    if command == "status":
        add("sweep", nargs="?", help="yaml, name or folder; all sweeps without one")
    elif command != "list":
        add("sweep", help="yaml, name or folder")
    if command == "list":
        add("words", nargs="*", metavar="NAME", help="only these, wildcards allowed; or run.dir=<folder>")
    elif command in ("plan", "launch", "race"):
        add("overrides", nargs="*", metavar="key=value", help="besides the sweep's own, e.g. cluster=slurm")
    else:
        add("words", nargs="*", metavar="PATTERN", help="only these cells; or run.dir=<folder>")
    if command in ("list", "plan", "status"):
        add("--json", action="store_true", help="for programs")
    if command in ("status", "retry"):
        add("--failed", action="store_true", help="only cells that failed")
    if command in ("launch", "retry"):
        add("--wait", action="store_true", help="follow it; exit code 1 if a cell failed")
    if command in ("plan", "launch", "race", "retry"):
        add("-n", "--n-jobs", type=int, metavar="N", help="cells at once on this machine")
    if command == "launch":
        add("--force", action="store_true", help="archive what is recorded, and start anew")
    if command == "race":
        add("--until", choices=["decided"], help="add seeds (3, 5, 8, 12) to arms that are not decided")
        add("--rungs", metavar="STEPS", help="let all cells advance together to these steps, e.g. 10,30,90")
        add("--halve", metavar="METRIC", help="with --rungs: only the better half goes on after each")
        add("--metric", help="accuracy (of the first evaluation set), another set, reward or time")
        add("--budget-hours", type=float, metavar="H", help="hours of all its cells, added up")
    if command == "status":
        some = "only these, with the end of their output"
        add("--cell", action="append", default=[], metavar="PATTERN", help=some)
        add("--watch", nargs="?", type=float, const=2.0, metavar="SECONDS", help="repeat it")
    if command == "logs":
        add("-f", "--follow", action="store_true", help="also print what cells print from now on")
        add("--lines", type=int, default=20, metavar="N", help="of each cell (20)")
    if command == "cancel":
        add("--now", action="store_true", help="also cells that were asked before: they stop in mid-step")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0; 1, a cell failed; 2, the user can fix it."""
    return run_command(run, sys.argv[1:] if arguments is None else arguments)


def run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.rstrip())
        return ExitCode.OK if words else ExitCode.USER_ERROR
    if words[0] not in COMMANDS:
        raise UserError(Fault(words[0], "is no command", nearest(words[0], COMMANDS)))
    _, command = COMMANDS[words[0]]
    return command(parser_of(words[0]).parse_intermixed_args(words[1:]))


# list ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ListedSweep:
    """A sweep of sweeps/, or one that was launched here. `combinations`: of its file, duplicates included;
    `counts`: its cells by state, None if it was not launched here."""

    name: str
    claim: str
    feeds: tuple[str, ...]
    combinations: int | None
    counts: dict[str, int] | None
    source: str | None

    def view(self) -> list[RenderableType]:
        facts = [f"feeds {', '.join(self.feeds)}"] if self.feeds else []
        if self.combinations is not None:
            facts.append("1 cell" if self.combinations == 1 else f"{self.combinations} cells")
        here = "not launched here" if self.counts is None else f"here {counts_text(self.counts)}"
        body = plain("\n".join([*([self.claim] if self.claim else []), "; ".join([*facts, here])]))
        return [plain(self.name, style="bold"), Padding(body, (0, 0, 0, 2))]


def list_sweeps(root: Path) -> tuple[list[ListedSweep], list[Fault]]:
    """Every sweep, those of sweeps/ first, and what is wrong with their files."""
    manifests, faults = read_all(root)
    states = {state.manifest.name: state for state in read_sweeps(manifests)}
    rows = []
    for name in specs.names():
        try:
            spec = specs.load(name)
            count = len(specs.combinations(spec))
        except UserError as error:
            faults += error.faults
            continue
        counts = states.pop(name).counts if name in states else None
        rows.append(ListedSweep(name, spec.claim, spec.feeds, count, counts, str(spec.source)))
    for name, state in states.items():  # launched ones without a file
        about = state.manifest.about
        claim, feeds, source = about.get("claim") or "by -m", about.get("feeds") or (), about.get("source")
        rows.append(ListedSweep(name, claim, tuple(feeds), None, state.counts, source))
    return rows, faults


def list_command(args: Namespace) -> int:
    patterns = [word for word in args.words if not word.startswith(ROOT)]
    rows, faults = list_sweeps(root_of(args.words))
    names = [row.name for row in rows]
    absent = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if absent:
        raise UserError([Fault(one, "names no sweep", nearest(one, names)) for one in absent])
    if patterns:
        rows = [row for row in rows if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)]
    if args.json:
        say_json([asdict(row) for row in rows])
    else:
        print_parts(*([part for row in rows for part in row.view()] or [plain("no sweeps")]))
    if faults:
        raise UserError(faults, "the other sweeps are listed")
    return ExitCode.OK


# plan, launch, retry, cancel ----------------------------------------------------------------------


def plan_command(args: Namespace) -> int:
    from dash_exp.sweep.dispatch import refusals
    from dash_exp.sweep.preview import plan_view, preview
    from dash_exp.sweep.request import request_of

    request = request_of(args.sweep, args.overrides, root_of(args.overrides), args.n_jobs)
    scripts, faults = [], refusals(request)
    if request.cluster.name == "slurm":
        from dash_exp.sweep.slurm.submit import sbatch_text

        scripts = sbatch_text(request.plan, request.root, request.cluster)
    made = preview(request.plan, request.root, scripts)
    if args.json:
        say_json({**made.as_json(), "refused": [str(fault) for fault in faults]})
    else:
        print_parts(plan_view(made))
        for number, text in enumerate(scripts, 1):
            say(f"\nscript {number} of {len(scripts)}:\n\n{text.strip()}")
        say("\nNothing was written, started or queued.")
    if faults:
        raise UserError(faults, "launching it would be refused")
    return ExitCode.OK


def launch_command(args: Namespace) -> int:
    from dash_exp.sweep.dispatch import launch
    from dash_exp.sweep.request import request_of

    overrides = [*args.overrides, *(["run.force=true"] if args.force else [])]
    request = request_of(args.sweep, overrides, root_of(overrides), args.n_jobs)
    return launch(request, wait=args.wait, detached=True)


def race_command(args: Namespace) -> int:
    from dash_exp.sweep.dispatch import print_line
    from dash_exp.sweep.race.run import race, settings_of
    from dash_exp.sweep.request import request_of

    settings = settings_of(args)
    return race(
        request_of(args.sweep, args.overrides, root_of(args.overrides), args.n_jobs), settings, print_line
    )


def retry_command(args: Namespace) -> int:
    manifest, patterns = needed(args)
    wanted = ("failed",) if args.failed else ("failed", "interrupted", "cancelled")
    chosen = chosen_of(read_sweep(manifest), patterns)
    ready = [one for one in chosen if one.cell.state in wanted]
    others = [one for one in chosen if one not in ready]
    left = f"; the others: {by_state(counts_of(others))}" if others else ""
    say(f"{len(ready)} of {len(chosen)} cells start again{left}")
    if not ready:
        return ExitCode.OK
    from dash_exp.sweep.dispatch import launch
    from dash_exp.sweep.request import request_again

    for one in ready:  # budgets of retries count anew
        with suppress(OSError):  # a damaged journal: `status` names it
            journal.note(one.cell.folder, "retry")
    request = request_again(manifest, [one.entry.folder for one in ready], args.n_jobs)
    return launch(request, wait=args.wait, detached=True)


def cancel_command(args: Namespace) -> int:
    from dash_exp.sweep.dispatch import cancel

    manifest, patterns = needed(args)
    chosen = select(manifest.entries, patterns)
    done = cancel(manifest, {entry.id for entry in chosen}, entire=not patterns, again=args.now)
    for one in done.ending:
        pace = f"a step takes {format_seconds(one.cell.step_s)}" if one.cell.step_s else "it has no step yet"
        say(f"{one.label} ({one.entry.id}) was asked to end and will, after its step; {pace}")
    for one, why in done.skipped:
        say(f"{one.label} ({one.entry.id}) is skipped: {why}")
    if not (done.ended or done.ending or done.skipped):
        found = [one for one in read_sweep(manifest).cells if one.entry in chosen]
        say(f"nothing to cancel: {by_state(counts_of(found))}")
        return ExitCode.OK
    open_text = f", {len(done.ending)} ending" if done.ending else ""
    say(f"{len(done.ended)} of {len(chosen)} cells cancelled{open_text}; launch or retry goes on with them")
    return ExitCode.OK


COMMANDS: dict[str, tuple[str, Callable[[Namespace], int]]] = {
    "list": ("what each sweep tests, and its progress here", list_command),
    "plan": ("a dry run that shows everything and writes nothing", plan_command),
    "launch": ("start or continue a sweep; returns at once", launch_command),
    "race": (
        "add seeds in rounds until each comparison is decided (--until decided), or let cells advance by "
        "--rungs, with --halve only the better half after each. All recipes are compared with the first, or "
        "as `compare` in the sweep's file says. The same command continues a race",
        race_command,
    ),
    "status": ("what its cells are doing; of all sweeps without a name", status_command),
    "logs": ("the end of its cells' output", logs_command),
    "retry": ("start cells again that failed, were cancelled or interrupted", retry_command),
    "cancel": ("stop cells after their step; they can continue later", cancel_command),
}

if __name__ == "__main__":
    sys.exit(main())
