"""Sweeps, named by a yaml, by a name below <run.dir>/sweeps, or a folder:

  python -m dash_exp.sweep list               what each asks, how far it is
  python -m dash_exp.sweep plan <sweep>       a dry run: cells, hours, scripts
  python -m dash_exp.sweep launch <sweep>     start it or go on; returns at once
  python -m dash_exp.sweep status [<sweep>]   what its cells are doing
  python -m dash_exp.sweep logs <sweep>       the end of what its cells said
  python -m dash_exp.sweep retry <sweep>      let failed cells start anew
  python -m dash_exp.sweep cancel <sweep>     let cells end, to go on later

plan and launch take overrides of the sweep's own (cluster=slurm seed=0,1), the
others patterns, which select cells: an override (algorithm=dash), a part of a
folder's name, or either with wildcards; each further one narrows the choice.
run.dir=<folder> looks elsewhere than in outputs/. `<command> --help` lists
flags (--json, --watch, --wait, --failed). Everything may be repeated, and run
twice at once. More in docs/sweeps.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from dash_exp.errors import ExitCode, Fault, UserError, nearest, run_command

COMMANDS = {
    "list": "what each sweep asks, and how far it is here",
    "plan": "a dry run that tells everything and writes nothing",
    "launch": "start a sweep, or go on with it; returns at once",
    "status": "what its cells are doing; of all sweeps without a name",
    "logs": "the end of what its cells said",
    "retry": "let cells that failed, were cancelled or interrupted start anew",
    "cancel": "let cells end after their step; they can go on later",
}


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints come as all others do."""

    def error(self, message: str) -> NoReturn:
        raise UserError(Fault(self.prog, message, f"{self.prog} --help"))


def parser_of(command: str) -> Parser:
    parser = Parser(
        prog=f"python -m dash_exp.sweep {command}", description=COMMANDS[command], allow_abbrev=False
    )
    add = parser.add_argument
    if command == "status":
        add("sweep", nargs="?", help="yaml, name or folder; all sweeps without one")
    elif command != "list":
        add("sweep", help="yaml, name or folder")
    if command == "list":
        add("words", nargs="*", metavar="NAME", help="some of them, also with wildcards; or run.dir=<folder>")
    elif command in ("plan", "launch"):
        add("overrides", nargs="*", metavar="key=value", help="on top of the sweep's own, e.g. cluster=slurm")
    else:
        add("words", nargs="*", metavar="PATTERN", help="cells it is about; or run.dir=<folder>")
    if command in ("list", "plan", "status"):
        add("--json", action="store_true", help="for programs")
    if command in ("status", "retry"):
        add("--failed", action="store_true", help="only cells that failed")
    if command in ("launch", "retry"):
        add("--wait", action="store_true", help="follow it; exit code 1 if a cell failed")
    if command in ("plan", "launch", "retry"):
        add("-n", "--n-jobs", type=int, metavar="N", help="cells at once on this machine")
    _add_own(parser, command)
    return parser


def _add_own(parser: Parser, command: str) -> None:
    """What only one command has."""
    add = parser.add_argument
    if command == "launch":
        add("--force", action="store_true", help="archive what is recorded, and start anew")
    if command == "status":
        add(
            "--cell",
            action="append",
            default=[],
            metavar="PATTERN",
            help="these, with the end of their output",
        )
        add("--watch", nargs="?", type=float, const=2.0, metavar="SECONDS", help="show it again and again")
    if command == "logs":
        add("-f", "--follow", action="store_true", help="go on with what is said from now on")
        add("--lines", type=int, default=20, metavar="N", help="of each cell (20)")
    if command == "cancel":
        add("--now", action="store_true", help="ask cells again that were asked before: they end in mid-step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0; 1, a cell failed; 2, the user can fix it."""
    return run_command(run, sys.argv[1:] if arguments is None else arguments)


def run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.rstrip())
        return ExitCode.OK if words else ExitCode.USER_ERROR
    if words[0] not in COMMANDS:
        raise UserError(Fault(words[0], "is no command", nearest(words[0], COMMANDS)))
    args = parser_of(words[0]).parse_intermixed_args(words[1:])
    from dash_exp.sweep import commands

    return int(getattr(commands, f"{words[0]}_command")(args))


if __name__ == "__main__":
    sys.exit(main())
