"""The commands `status` and `logs`, and what all commands of `python -m dash_exp.sweep` share."""

from __future__ import annotations

import json
import os
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

from dash_exp.errors import ExitCode, Fault, UserError, print_error
from dash_exp.record.manifest import Manifest, read_all
from dash_exp.sweep.report import print_parts, status_view, sweep_lines
from dash_exp.sweep.status import (
    LIST_HINT,
    OPEN,
    SweepCell,
    SweepState,
    Target,
    default_root,
    find,
    output_path,
    read_sweep,
    read_sweeps,
    select,
)
from dash_exp.text import format_path, last_lines, printable, shown_lines

ROOT = "run.dir="
FOLLOW_S = 0.5


def say(text: str) -> None:
    print(printable(text), flush=True)


def say_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str), flush=True)


def root_of(words: Sequence[str]) -> Path:
    """The folder of outputs: the last `run.dir=`, else the default."""
    given = [word.removeprefix(ROOT) for word in words if word.startswith(ROOT)]
    if given and not given[-1].strip():
        raise UserError(Fault("run.dir", "is empty", "name a folder, or leave it out: outputs"))
    return Path(given[-1]) if given else default_root()


def named(args: Namespace) -> tuple[Target | None, list[str], Path]:
    """The sweep that was named, if any, the patterns, and the folder of outputs."""
    words = [word for word in (args.sweep, *args.words) if word is not None]
    root = root_of(words)
    patterns = [word for word in words if not word.startswith(ROOT)]
    return (find(patterns[0], root) if patterns else None), patterns[1:], root


def needed(args: Namespace) -> tuple[Manifest, list[str]]:
    """The launched sweep that was named, and the patterns."""
    target, patterns, _ = named(args)
    if target is None:
        raise UserError(Fault("sweep", "which one?", LIST_HINT), "nothing was changed")
    return target.manifest(), patterns


def chosen_of(state: SweepState, patterns: Sequence[str]) -> list[SweepCell]:
    wanted = {entry.id for entry in select([one.entry for one in state.cells], patterns)}
    return [one for one in state.cells if one.entry.id in wanted]


@dataclass(frozen=True, slots=True)
class View:
    """What `status` shows: several sweeps, or the chosen cells of one."""

    states: list[SweepState]
    chosen: list[SweepCell] | None = None
    long: bool = False
    place: str = ""

    def render(self) -> RenderableType:
        if self.chosen is not None:
            return status_view(self.states[0], self.chosen, self.long)
        return sweep_lines(self.states) if self.states else Text(f"no sweep was launched in {self.place}")

    def as_json(self) -> list[dict[str, Any]] | dict[str, Any]:
        if self.chosen is None:
            return [{k: v for k, v in one.as_json().items() if k != "cells"} for one in self.states]
        return {**self.states[0].as_json(), "cells": [one.as_json() for one in self.chosen]}

    @property
    def is_open(self) -> bool:
        return any(state.counts.get(kind) for state in self.states for kind in OPEN)


def view_all(root: Path) -> View:
    manifests, faults = read_all(root)
    for fault in faults:
        print_error(str(fault))
    return View(read_sweeps(manifests), place=format_path(root))


def view_one(target: Target, patterns: Sequence[str], failed: bool, long: bool) -> View:
    state = read_sweep(target.manifest())
    chosen = chosen_of(state, patterns)
    return View([state], [one for one in chosen if not failed or one.cell.state == "failed"], long)


def status_command(args: Namespace) -> int:
    target, patterns, root = named(args)
    if args.json and args.watch:
        raise UserError(Fault("--json", "goes without --watch", "leave one of them out"))
    if target is None and (args.cell or args.failed):
        raise UserError(Fault("--cell, --failed", "of which sweep?", LIST_HINT))
    long = bool(args.cell or args.failed)
    look: Callable[[], View] = partial(view_all, root)
    if target is not None:
        look = partial(view_one, target, [*patterns, *args.cell], args.failed, long)
    if args.watch:
        _watch(look, args.watch)
    elif args.json:
        say_json(look().as_json())
    else:
        print_parts(look().render())
    return ExitCode.OK


def _watch(look: Callable[[], View], every_s: float) -> None:
    """Show it repeatedly until no cell is open any more, or Ctrl-C."""
    console = Console(highlight=False)
    if not console.is_terminal:
        while True:
            view = look()
            print_parts(view.render())
            if not view.is_open:
                return
            time.sleep(every_s)
    view = look()
    with Live(view.render(), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while view.is_open:
            time.sleep(every_s)
            view = look()
            live.update(view.render(), refresh=True)


class Follower:
    """Returns the complete lines that are added to a file after its first `start` bytes."""

    def __init__(self, path: Path, start: int = 0):
        self.path, self._place = path, start

    def more(self) -> list[str]:
        try:
            with self.path.open("rb") as stream:
                self._place = min(self._place, stream.seek(0, os.SEEK_END))
                stream.seek(self._place)
                lines, newline, _ = stream.read().rpartition(b"\n")
        except OSError:
            return []
        self._place += len(lines) + len(newline)
        return shown_lines(lines)


def logs_command(args: Namespace) -> int:
    """Print the end of each cell's output, else of its log; with --follow, what is added from then on."""
    manifest, patterns = needed(args)
    chosen = chosen_of(read_sweep(manifest), patterns)
    followers = {}
    for one in chosen:
        path = output_path(one.cell.folder)
        followers[one.entry.id] = Follower(path, path.stat().st_size if path.exists() else 0)
        lines = last_lines(path, args.lines)
        if lines or len(chosen) == 1:
            say(f"== {one.label} ({one.entry.id}), {one.cell.state}: {format_path(path)}")
            say("\n".join(lines) if lines else "nothing was printed yet")
    if args.follow:
        _follow(manifest, followers)
    return ExitCode.OK


def _follow(manifest: Manifest, followers: dict[str, Follower]) -> None:
    """Print what the cells print from now on, until they have ended."""
    while True:
        state = read_sweep(manifest)
        chosen = [one for one in state.cells if one.entry.id in followers]
        for one in chosen:
            path = output_path(one.cell.folder)
            if followers[one.entry.id].path != path:  # its first process has begun to print
                followers[one.entry.id] = Follower(path)
            for line in followers[one.entry.id].more():
                say(f"{one.label}: {line}" if len(chosen) > 1 else line)
        if not state.is_moving or all(one.cell.state not in OPEN for one in chosen):
            return
        time.sleep(FOLLOW_S)
