"""`python -m analysis <folders> --out <folder>`: every table and figure that the data allow. From an
installed package, and from any folder: `dash-exp report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dash_exp.errors import UserError, print_error
from dash_exp.text import printable

from . import COMMAND

MADE, INCOMPLETE, USER_ERROR = 0, 1, 2
SHOWN = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 the report was made; 1 with --strict: something is missing or odd, with --check: a table
    does not follow from the data; 2 a user error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["live"]:
            from .live import watch

            return watch(words[1:])
        return build(make_parser().parse_args(words))
    except UserError as error:
        print_error(str(error))
        return USER_ERROR


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Tables and figures from run folders, the paper's values beside them.",
        epilog=f"{COMMAND} live <folder>: a terminal view of a running sweep.",
    )
    parser.add_argument(
        "places",
        nargs="+",
        type=Path,
        metavar="folder",
        help="sweeps (outputs/sweeps/<name>), cells, or a root of outputs",
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="where the report goes (report)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing: do the tables in --out still follow from the data?",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if anything is missing or odd; the report is made"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="folder",
        help="make no report: copy what one is made from, without weights and samples, to publish it",
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a metric of steps.jsonl that is drawn too; may be given again",
    )
    return parser


def build(options: argparse.Namespace) -> int:
    from .keep import keep
    from .load import load
    from .make import differences, make, write

    records = load(options.places, options.out / ".cache" if options.out.is_dir() else None)
    if options.keep:
        size = keep(records, options.keep)
        print(f"{len(records.cells)} cells -> {options.keep}, {size / 1e6:.1f} MB")
        return MADE
    report = make(records, pictures=not options.check, metrics=options.metric)
    if options.check:
        wrong = differences(report, options.out)
        print("\n".join(wrong) or f"{options.out}: every table follows from the data")
        return INCOMPLETE if wrong else MADE
    write(report, options.out)
    figures = sum(name.endswith(".png") for name in report.files)
    print(f"{len(records.cells)} cells -> {len(report.tables)} tables, {figures} figures")
    counts = {
        v: sum(f.verdict == v for f in report.findings) for v in ("supported", "contradicted", "undecided")
    }
    if report.findings:
        print("claims: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    for problem in report.problems[:SHOWN]:
        print(f"  {printable(problem.where)}: {printable(problem.what)}")
    if len(report.problems) > SHOWN:
        print(f"  and {len(report.problems) - SHOWN} more, listed in the report")
    print(f"page: {options.out / 'report.html'}")
    return INCOMPLETE if options.strict and report.problems else MADE


if __name__ == "__main__":
    sys.exit(main())
