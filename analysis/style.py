"""How every figure looks: a colour and dash per arm everywhere, readable in print and by the colour-blind."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = Path(__file__).parent / "paper.mplstyle"
WIDTH = 6.75
"""Inches: the text width of most two-column papers."""

COLOURS = {
    "dash": "#0072B2",
    "grpo": "#D55E00",
    "no_gf": "#009E73",
    "no_kl": "#CC79A7",
    "ppo_multi": "#E69F00",
    "ppo_mini": "#8C510A",
    "sft_h": "#56B4E9",
    "sft_m": "#542788",
    "base": "#7F7F7F",
    "pg": "#000000",
    "rloo": "#B2182B",
    "dr_grpo": "#666633",
}
"""Okabe and Ito's palette first; further arms in colours that keep their distance in lightness."""
LINES = {
    "dash": "-",
    "grpo": "--",
    "no_gf": "-.",
    "no_kl": (0, (5, 1)),
    "ppo_multi": (0, (3, 1, 1, 1)),
    "ppo_mini": ":",
    "sft_h": "--",
    "sft_m": "-.",
    "base": (0, (1, 1)),
}
MARKS = {
    "dash": "o",
    "grpo": "s",
    "no_gf": "^",
    "no_kl": "v",
    "ppo_multi": "D",
    "ppo_mini": "P",
    "sft_h": "X",
    "sft_m": "*",
    "pg": "<",
    "rloo": ">",
    "dr_grpo": "p",
}
PHASE_COLOURS = {
    "sampling": "#56B4E9",
    "gradient": "#D55E00",
    "verdicts": "#F0E442",
    "sync": "#009E73",
    "other": "#BBBBBB",
}
PHASE_HATCHES = {"sampling": "", "gradient": "//", "verdicts": "..", "sync": "xx", "other": "--"}


def line_of(arm: str) -> dict[str, Any]:
    """Colour and dashes of an arm."""
    return {"color": COLOURS.get(arm, "#333333"), "linestyle": LINES.get(arm, "-")}


@contextmanager
def applied() -> Iterator[None]:
    """Draw within this; a notebook's own settings come back afterwards."""
    with matplotlib.style.context(STYLE):
        yield


def figure(
    columns: int = 1, rows: int = 1, height: float = 2.3, widths: list[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of the text's width, its axes in reading order; `height` of a row in inches."""
    made = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, width_ratios=widths)
    return made, [axis for line in axes for axis in line]


def png(made: Figure) -> bytes:
    """Without dates or names of programs, so that equal data give equal bytes."""
    stream = io.BytesIO()
    made.savefig(stream, format="png", dpi=200, metadata={"Software": None})
    return stream.getvalue()


def pdf(made: Figure) -> bytes:
    stream = io.BytesIO()
    made.savefig(stream, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return stream.getvalue()
