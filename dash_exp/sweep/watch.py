"""Looking at sweeps that were launched: `status` and `logs`, and what all commands share. Torch-free."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from dash_exp.errors import Fault, UserError, print_error
from dash_exp.record.manifest import Manifest
from dash_exp.sweep import lookup
from dash_exp.sweep.lookup import LIST_HINT, Target, find, launched, select
from dash_exp.sweep.report import status_view, sweep_lines
from dash_exp.sweep.status import OPEN, SweepState, Watched, is_moving, watch, watch_all
from dash_exp.sweep.tails import Follower, last_lines
from dash_exp.text import format_path

OK = 0
ROOT = "run.dir="
FOLLOW_S = 1.0


def out(*parts: RenderableType) -> None:
    """Print. Where no terminal shows it, lines end with their last letter."""
    to = Console(highlight=False)
    if to.is_terminal:
        to.print(*parts, sep="\n")
        return
    with to.capture() as caught:
        to.print(*parts, sep="\n")
    print("\n".join(line.rstrip() for line in caught.get().splitlines()), flush=True)


def say(text: str) -> None:
    print(text, flush=True)


def say_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str), flush=True)


def root_of(words: Sequence[str]) -> Path:
    """Where outputs lie: the last `run.dir=`, else the default."""
    given = [word.removeprefix(ROOT) for word in words if word.startswith(ROOT)]
    return Path(given[-1]) if given else lookup.default_root()


def named(args: Namespace) -> tuple[Target | None, list[str], Path]:
    """The sweep that a command is about, if one is named, its patterns, and where outputs lie."""
    words = [word for word in (args.sweep, *args.words) if word is not None]
    root = root_of(words)
    patterns = [word for word in words if not word.startswith(ROOT)]
    return (find(patterns[0], root) if patterns else None), patterns[1:], root


def needed(args: Namespace) -> tuple[Manifest, list[str]]:
    """A sweep that was launched, and patterns."""
    target, patterns, _ = named(args)
    if target is None:
        raise UserError(Fault("sweep", "which one?", LIST_HINT), "nothing was changed")
    return target.manifest(), patterns


def chosen_of(state: SweepState, patterns: Sequence[str]) -> list[Watched]:
    wanted = {entry.id for entry in select([one.entry for one in state.cells], patterns)}
    return [one for one in state.cells if one.entry.id in wanted]


@dataclass(frozen=True, slots=True)
class Look:
    """What `status` saw: sweeps, and of a single one the cells that were asked for."""

    states: list[SweepState]
    chosen: list[Watched] | None = None
    long: bool = False
    place: str = ""

    def picture(self) -> RenderableType:
        if self.chosen is not None:
            return status_view(self.states[0], self.chosen, self.long)
        return sweep_lines(self.states) if self.states else Text(f"no sweep was launched in {self.place}")

    def as_json(self) -> list[dict[str, Any]] | dict[str, Any]:
        if self.chosen is None:
            return [{k: v for k, v in one.as_json().items() if k != "cells"} for one in self.states]
        return {**self.states[0].as_json(), "cells": [one.as_json() for one in self.chosen]}


def look_at_all(root: Path) -> Look:
    there, faults = launched(root)
    for fault in faults:
        print_error(str(fault))
    return Look(watch_all(there), place=format_path(root))


def look_at_one(target: Target, patterns: Sequence[str], failed: bool, long: bool) -> Look:
    state = watch(target.manifest())
    chosen = chosen_of(state, patterns)
    return Look([state], [one for one in chosen if not failed or one.cell.state == "failed"], long)


def status_command(args: Namespace) -> int:
    target, patterns, root = named(args)
    if args.json and args.watch:
        raise UserError(Fault("--json", "goes without --watch", "leave one of them out"))
    if target is None and (args.cell or args.failed):
        raise UserError(Fault("--cell, --failed", "of which sweep?", LIST_HINT))
    long = bool(args.cell or args.failed)
    look = (
        partial(look_at_one, target, [*patterns, *args.cell], args.failed, long)
        if target
        else partial(look_at_all, root)
    )
    if args.watch:
        return watch_on(look, args.watch)
    seen = look()
    if args.json:
        say_json(seen.as_json())
    else:
        out(seen.picture())
    return OK


def watch_on(look: Callable[[], Look], every_s: float) -> int:
    """Show it again and again until nothing is open any more, or Ctrl-C."""
    console = Console(highlight=False)
    seen = look()
    if not console.is_terminal:
        while True:
            out(seen.picture())
            if not _open(seen):
                return OK
            time.sleep(every_s)
            seen = look()
    with Live(seen.picture(), console=console, auto_refresh=False, vertical_overflow="crop") as view:
        while _open(seen):
            time.sleep(every_s)
            seen = look()
            view.update(seen.picture(), refresh=True)
    return OK


def _open(seen: Look) -> bool:
    return any(state.counts.get(kind) for state in seen.states for kind in OPEN)


def logs_command(args: Namespace) -> int:
    """The end of what each cell's process printed, else of its log."""
    manifest, patterns = needed(args)
    state = watch(manifest)
    chosen = chosen_of(state, patterns)
    followers = {}
    for one in chosen:
        path = _said(one)
        followers[one.entry.id] = Follower(path, path.stat().st_size if path.exists() else 0)
        lines = last_lines(path, args.lines)
        if lines or len(chosen) == 1:
            say(f"== {one.label} ({one.entry.id}), {one.cell.state}: {format_path(path)}")
            say("\n".join(lines) if lines else "nothing was said yet")
    if args.follow:
        _follow(manifest, followers)
    return OK


def _follow(manifest: Manifest, followers: dict[str, Follower]) -> None:
    """Print what cells say from now on, until nothing more is to come."""
    while True:
        state = watch(manifest)
        chosen = [one for one in state.cells if one.entry.id in followers]
        for one in chosen:
            if followers[one.entry.id].path != _said(one):  # its first process has begun to print
                followers[one.entry.id] = Follower(_said(one))
            for line in followers[one.entry.id].more():
                say(f"{one.label}: {line}" if len(chosen) > 1 else line)
        if not is_moving(state) or all(one.cell.state not in OPEN for one in chosen):
            return
        time.sleep(FOLLOW_S)


def _said(one: Watched) -> Path:
    output = one.cell.folder / "output.txt"
    return output if output.exists() and output.stat().st_size else one.cell.folder / "log.txt"
