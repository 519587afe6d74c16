"""How every figure looks: a colour, dash and marker per arm everywhere, readable in print and by the
colour-blind; variants of one arm are shades of its colour, in the order of what varies."""

from __future__ import annotations

import colorsys
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from dash_exp.text import printable

from .variants import Variant

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
OTHER_COLOURS = ("#117733", "#AA4499", "#882255", "#999933", "#44AA99", "#332288", "#CC6677", "#661100")
"""Of arms that are not the paper's, by their names."""
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
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
OTHER_MARKS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "p", "h")
PHASE_COLOURS = {
    "sampling": "#56B4E9",
    "gradient": "#D55E00",
    "verdicts": "#F0E442",
    "sync": "#009E73",
    "other": "#BBBBBB",
}
PHASE_HATCHES = {"sampling": "", "gradient": "//", "verdicts": "..", "sync": "xx", "other": "--"}


def colour_of(variant: Variant) -> str:
    """The arm's colour; for several variants of it, from light to dark in their order."""
    own = OTHER_COLOURS[zlib.crc32(variant.arm.encode()) % len(OTHER_COLOURS)]
    colour = COLOURS.get(variant.arm, own)
    if variant.places == 1:
        return colour
    hue, _, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    lightness = 0.68 - 0.46 * variant.place / (variant.places - 1)
    return to_hex(colorsys.hls_to_rgb(hue, lightness, saturation))


def line_of(variant: Variant) -> dict[str, Any]:
    """Colour and dashes of a variant."""
    dashes = DASHES[variant.place % len(DASHES)] if variant.places > 1 else LINES.get(variant.arm, "-")
    return {"color": colour_of(variant), "linestyle": dashes}


def mark_of(variant: Variant) -> str:
    if variant.places > 1:
        return OTHER_MARKS[variant.place % len(OTHER_MARKS)]
    return MARKS.get(variant.arm, OTHER_MARKS[zlib.crc32(variant.arm.encode()) % len(OTHER_MARKS)])


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


def _take_literally(made: Figure) -> None:
    """Names come from records: dollars in them are no formulas, and control characters are left out. Numbers
    at axes are written when they are drawn."""
    for text in made.findobj(Text):
        if isinstance(text, Text) and text.get_text() and "mathdefault" not in text.get_text():
            text.set_parse_math(False)
            text.set_text(printable(text.get_text()))


def png(made: Figure) -> bytes:
    """Without dates or names of programs, so that equal data give equal bytes."""
    stream = io.BytesIO()
    _take_literally(made)
    made.savefig(stream, format="png", dpi=200, metadata={"Software": None})
    return stream.getvalue()


def pdf(made: Figure) -> bytes:
    stream = io.BytesIO()
    _take_literally(made)
    made.savefig(stream, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return stream.getvalue()
