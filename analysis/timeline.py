"""Figure 2, drawn from what really happened: one step of a cell, from its events.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dash_exp.record.folder import Row, read_rows

from . import style
from .figures import Picture
from .load import Records
from .variants import Variant

COLOURS = {"sample": "#56B4E9", "judge": "#F0E442", "backprop": "#D55E00", "sync": "#009E73"}
WORDS = {
    "sample": "samples a group",
    "judge": "judges it",
    "backprop": "forward + backward",
    "sync": "weights",
}


def delivery(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    """One step of one cell: of DASH where there is one, and there where most groups were learned from, at
    the most different times."""
    best: tuple[float, str, list[Row]] | None = None
    for variant in [v for v in variants if v.arm == "dash"] or variants:
        for cell in variant.cells[:1]:
            if variant.arm in ("dash", "no_gf", "no_kl", "pg"):
                rows = step_events(Path(str(records.cells.loc[cell, "folder"])))
                spread = _spread(rows)
                if spread > 0 and (best is None or spread > best[0]):
                    best = (spread, cell, rows)
    return [] if best is None else [_drawn(best[1], best[2])]


def step_events(folder: Path) -> list[Row]:
    """The events of the middle step, of its last attempt."""
    read = read_rows(folder / "events.jsonl").rows
    rows = [r for r in read if r["kind"] in COLOURS and {"step", "attempt", "worker"} <= set(r)]
    steps = sorted({r["step"] for r in rows if r["kind"] == "backprop"})
    if not steps:
        return []
    middle = [r for r in rows if r["step"] == steps[len(steps) // 2]]
    newest = max(r["attempt"] for r in middle)
    return [r for r in middle if r["attempt"] == newest]


def _spread(rows: Sequence[Row]) -> float:
    """How much there is to see: how far apart groups were finished, how many were learned from, by how
    many workers they were sampled."""
    ends = [r["end"] for r in rows if r["kind"] == "sample"]
    if len(ends) < 2:
        return 0.0
    length = max(r["end"] for r in rows) - min(r["start"] for r in rows)
    workers = len({r["worker"] for r in rows if r["kind"] == "sample"})
    kept = sum(len(r.get("groups", ())) for r in rows if r["kind"] == "backprop")
    return float(workers * kept * (max(ends) - min(ends)) / length)


def _drawn(cell: str, rows: Sequence[Row]) -> Picture:
    begin = min(r["start"] for r in rows)
    workers = sorted({str(r["worker"]) for r in rows if r["kind"] == "sample"})
    height = 0.6 + 0.075 * sum(r["kind"] == "sample" for r in rows)
    drawn, (axis,) = style.figure(height=min(height + 0.8, 6.0))
    places, top = {}, 0.0
    ticks: list[tuple[float, str]] = []
    for worker in workers:
        own = sorted((r for r in rows if r["kind"] == "sample" and r["worker"] == worker), key=_by_end)
        for row in own:
            _bar(axis, row, begin, top, 0.9)
            places[row["group"]] = top
            top += 1
        ticks.append((top - len(own) / 2 - 0.5, f"{worker}\n({len(own)} groups)"))
        top += 0.8
    judged = {r["group"]: r for r in rows if r["kind"] == "judge"}
    for group, row in judged.items():
        _bar(axis, row, begin, places.get(group, top), 0.9)
    learner = top + 1
    for row in (r for r in rows if r["kind"] in ("backprop", "sync")):
        _bar(axis, row, begin, learner, 2.2)
        for group in row.get("groups", ()):
            ready = judged.get(group, row)["end"] - begin
            axis.plot(
                [ready, row["start"] - begin],
                [places.get(group, learner), learner],
                color="0.6",
                linewidth=0.5,
                zorder=0,
            )
    ticks.append((learner, "learner"))
    axis.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("seconds since the step began")
    _legend(axis)
    busy = sum(r["end"] - r["start"] for r in rows if r["kind"] == "backprop")
    length = max(r["end"] for r in rows) - begin
    dropped = len(places) - len({g for r in rows if r["kind"] == "backprop" for g in r.get("groups", ())})
    return Picture(
        "figure2",
        "Figure 2. Preemptive sampling, as it happened",
        f"Step {rows[0]['step']} of {cell}: each bar is one group; a line leads from its verdict to the "
        f"backpropagation it took part in; groups without a line ({dropped}) were dropped by the filter. The "
        f"learner computed gradients for {busy:.2f} of {length:.2f} s; the rest is waiting, the reference "
        "model's forward pass, and the optimizer.",
        drawn,
        (cell,),
    )


def _by_end(row: Row) -> Any:
    return row["end"], row["group"]


def _bar(axis: Axes, row: Row, begin: float, place: float, height: float) -> None:
    axis.barh(
        place,
        max(row["end"] - row["start"], 1e-4),
        left=row["start"] - begin,
        height=height,
        color=COLOURS[row["kind"]],
        edgecolor="white",
        linewidth=0.3,
    )


def _legend(axis: Axes) -> None:
    for kind, colour in COLOURS.items():
        axis.bar(np.nan, np.nan, color=colour, label=WORDS[kind])
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=4)
