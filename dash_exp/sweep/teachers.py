"""Traces that cells of a sweep learn from, made before these cells have an id."""

from __future__ import annotations

import sys
from dataclasses import replace

import yaml

from dash_exp.errors import UserError
from dash_exp.record import manifest as manifests
from dash_exp.record.identity import Cell
from dash_exp.record.manifest import Entry, Manifest, PlannedCell, Traces
from dash_exp.signals import run_forwarding
from dash_exp.sweep.pool import Log, Relay
from dash_exp.text import format_path


def make_traces(manifest: Manifest, log: Log, relay: Relay, live: bool) -> Manifest:
    """Sample each teacher that cells wait for, in a process of its own, then plan these cells. Failures are
    logged, and their cells go on waiting. Returns the manifest as it is then."""
    for traces in dict.fromkeys(one.traces for one in manifest.waiting):
        if not traces.path.exists() and relay.first is None:
            _sample(manifest, traces, log, relay, live)
    try:
        return plan_waiting(manifest)
    except UserError as error:
        log(str(error))
        return manifest


def _sample(manifest: Manifest, traces: Traces, log: Log, relay: Relay, live: bool) -> None:
    output = None if live else manifest.folder / f"{traces.path.stem}.txt"
    log(f"making the traces {format_path(traces.path)}" + (f" (see {format_path(output)})" if output else ""))
    progress = [text for text in manifest.actions if text.startswith("run.progress=")]
    command = [sys.executable, "-m", "dash_exp.traces", *traces.arguments, *progress]
    code, signal_number = run_forwarding(command, output)
    if signal_number is not None:
        relay(signal_number, None)
    elif code != 0:
        log(f"the traces {format_path(traces.path)} failed with exit code {code}; their cells go on waiting")


def plan_waiting(manifest: Manifest) -> Manifest:
    """Plan and freeze the cells whose traces exist by now. Raises UserError with all their faults."""
    ready = [one for one in manifest.waiting if one.traces.path.exists()]
    if not ready:
        return manifest
    from dash_exp.sweep.plan import SweepOptions, make_plan  # a controller without traces needs no Hydra

    fresh = make_plan(
        manifest.name,
        [one.overrides for one in ready],
        root=manifest.root,
        actions=manifest.actions,
        options=SweepOptions(times=_are_times(manifest), about=manifest.about),
    )
    known = {entry.id for entry in manifest.entries}
    cells = [*map(planned_cell, manifest.entries), *(cell for cell in fresh.cells if cell.id not in known)]
    still = [one for one in manifest.waiting if one not in ready]
    grown = replace(fresh, cells=tuple(cells), waiting=(*still, *fresh.waiting))
    return manifests.write(grown, manifest.root)


def planned_cell(entry: Entry) -> PlannedCell:
    """A cell of a manifest as one of a plan again; its frozen config is in its folder only."""
    cell = Cell(entry.id, entry.folder.removesuffix(f"-{entry.id}"), {}, "")
    return PlannedCell(cell, entry.overrides, entry.resources, entry.needs)


def _are_times(manifest: Manifest) -> bool:
    """Whether the results of this sweep are times, so that its cells are labelled with a kind of machine."""
    if "times" in manifest.about:
        return bool(manifest.about["times"])
    paths = [manifest.cell(entry) / "config.yaml" for entry in manifest.entries[:1]]
    return any(yaml.safe_load(path.read_text(encoding="utf-8")).get("hardware") for path in paths)
