"""`python -m dash_exp [overrides]`: train and evaluate one cell, or a sweep with -m. And the script
`dash-exp`, which does the same, or runs another command: `dash-exp sweep ...`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from dash_exp import PACKAGE
from dash_exp.config.checks import check
from dash_exp.config.compose import VERSION_BASE, conf_dir, find_faults, register
from dash_exp.config.held_out import with_own_evaluation
from dash_exp.config.schema import changed, to_config
from dash_exp.errors import ExitCode, Fault, UserError, nearest, print_error, run_command
from dash_exp.text import format_command

COMMANDS = ("capacity", "cell", "evaluate", "judge", "mirror", "report", "serve", "sweep", "traces")
"""What `dash-exp <command>` runs: `python -m dash_exp.<command>`, and for `report` the analysis."""


class CellFailedError(Exception):
    """A cell of a sweep that one of Hydra's own launchers runs (ours does without this) ended with an exit
    code other than 0. Hydra still runs the other cells."""


def console() -> int:
    """The script `dash-exp`: run the command that the first word names, or train if it names none."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "report":
        return report(sys.argv[2:])
    if command in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"dash_exp.{command}", run_name="__main__", alter_sys=True)
        return 0
    if command.isidentifier():
        print_error(str(UserError(Fault(command, "unknown command", nearest(command, COMMANDS)))))
        return ExitCode.USER_ERROR
    return main()


def report(arguments: list[str]) -> int:
    """Run the analysis. It is loaded from its folder (beside this package; in a checkout it has a shorter
    name), so that a module `analysis` of the user's is never run instead."""
    folders = (PACKAGE.parent / name for name in ("dash_exp_analysis", "analysis"))
    folder = next(path for path in folders if (path / "__main__.py").is_file())
    spec = importlib.util.spec_from_file_location(
        "dash_exp_analysis", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(importlib.import_module("dash_exp_analysis.__main__").main(arguments))


def main() -> int:
    """Run the command line. Returns the exit code: 0, 1 (a cell failed), 2 (the user can fix)."""
    return run_command(run_hydra, sys.argv[1:])


def run_hydra(_: Sequence[str]) -> int:
    """Let Hydra, which reads sys.argv itself, run one cell or a sweep."""
    # Otherwise Hydra prints a cell's failure and its own hints after what the run has printed.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    register()
    register_launcher()
    try:
        args, flags = parse_arguments()
        faults = command_line_faults(args, flags)
        if faults:
            raise UserError(faults)
        hydra.main(str(conf_dir()), "config", VERSION_BASE)(run_job)()
    except CellFailedError:
        return ExitCode.FAILED
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(Fault("config", str(error))) from error
    except OSError as error:  # of Hydra's own files; a cell reports its own
        what = f"cannot write {error.filename}: {error.strerror or error}"
        raise UserError(Fault("run.dir", what, "set run.dir=<folder>")) from error
    return ExitCode.OK


def register_launcher() -> None:
    """Register our launcher with Hydra, whose own search misses it in an editable install."""
    plugins = Plugins.instance()  # searches first, and would load the class a second time
    from hydra_plugins.dash_exp_launcher.launcher import DashLauncher

    plugins.register(DashLauncher)


def parse_arguments() -> tuple[Namespace, list[str]]:
    """Hydra's own flags, and unknown flags. Overrides on both sides of a flag are joined in sys.argv, where
    Hydra would read only the first of them."""
    args, unknown = get_args_parser().parse_known_args()
    flags = [text for text in unknown if text.startswith("-")]
    stray = [text for text in unknown if not text.startswith("-")]
    if stray:
        last = sys.argv.index(args.overrides[-1])
        after = [text for text in sys.argv[last + 1 :] if text not in stray]
        sys.argv[last + 1 :] = [*stray, *after]
        args.overrides += stray
    return args, flags


def is_sweep(args: Namespace) -> bool:
    return bool(args.multirun) or "hydra.mode=MULTIRUN" in args.overrides


def command_line_faults(args: Namespace, flags: list[str]) -> list[Fault]:
    """What is wrong before anything is run. Files and packages may be missing where the config is only
    shown."""
    hint = "settings are written key=value, without dashes; see --help"
    faults = [Fault(flag, "unknown flag", hint) for flag in flags]
    shows = args.cfg is not None or args.info is not None
    if args.multirun and shows:
        faults.append(Fault("-m", "goes with neither --cfg nor --info", "leave one of them out"))
    if args.resolve and args.cfg is None and not args.help:
        faults.append(Fault("--resolve", "goes with --cfg only", "write --cfg job --resolve"))
    if only_hydra_knows(args) or args.help or args.hydra_help or args.shell_completion:
        return faults
    return faults + find_faults(args.overrides, sweep=is_sweep(args), checked=not shows)


def only_hydra_knows(args: Namespace) -> bool:
    """Whether flags make Hydra read configs from elsewhere, so that we cannot compose them beforehand."""
    return bool(args.config_name or args.config_path or args.config_dir or args.experimental_rerun)


def run_job(composed: Any) -> None:
    """Called by Hydra for a single cell, or for each cell of a sweep under a launcher other than ours. Such a
    sweep goes on after a failed cell, and stops after one that a signal ended."""
    try:
        code = run_command(lambda _: run_cell(composed), [])
    except Exception:  # noqa: BLE001  a bug in one cell: print all of it; a sweep goes on
        traceback.print_exc()
        code = ExitCode.FAILED
    if code == ExitCode.OK:
        return
    if code < ExitCode.SIGNALLED and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise CellFailedError(code)
    sys.exit(code)


def run_cell(composed: Any) -> int:
    """Train a composed cell. Checks the config where the command line has not: under another launcher, which
    may run it on another machine, or where only Hydra could compose it."""
    given = HydraConfig.get().overrides
    config = with_own_evaluation(to_config(composed), given.task)
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweeping or only_hydra_knows(parse_arguments()[0]):
        faults = check(config)
        if faults:
            raise UserError(faults)
    from dash_exp.cell.__main__ import run_config
    from dash_exp.learning.settings import rank_from_environment
    from dash_exp.train.budget import resolve_match

    places = [text for text in given.hydra if text.startswith("hydra.searchpath")]
    config, partner = resolve_match(config, [*places, *given.task], Path(config.run.dir) / "cache")
    shown = {"run.partner": format_command("dash_exp", *partner) if partner else None}
    if not sweeping and rank_from_environment(os.environ) is None:
        once = ("run.force", "run.until_step", "run.profile")
        again = [text for text in sys.argv[1:] if text.lstrip("+").partition("=")[0] not in once]
        shown["run.command"] = format_command("dash_exp", *again)
    return run_config(changed(config, shown), apart=sweeping)


if __name__ == "__main__":
    sys.exit(main())
