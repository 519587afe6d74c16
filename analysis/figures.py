"""The paper's figures. Each function takes records and variants and returns `Picture`s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import quantities, style
from .estimates import Estimate
from .load import Records
from .table import file_name, scaled
from .tables import MODEL_NAMES
from .variants import Variant

SMOOTH = 5
"""Steps of the moving mean that curves are drawn with."""
KL_ARMS = ("dash", "no_kl")
PAPER_BARS = {"GRPO": (32.4, 6.5), "DASH": (4.2, 2.4)}
"""Figure 1 of the paper: hours of inference and of gradients, Qwen2.5-0.5B on MATH."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure with its title and caption. `cells`: what it was drawn from."""

    id: str
    title: str
    caption: str
    drawn: Figure
    cells: tuple[str, ...]

    @property
    def file_name(self) -> str:
        return file_name(self.id)

    def _repr_png_(self) -> bytes:
        """Shown as a picture in a notebook."""
        return style.png(self.drawn)


def time_bars(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    """Figure 1: training time by phase, a bar per arm, the paper's beside them. One picture per model, data
    and kind of machine: times of different hardware are never side by side."""
    made = []
    for model, data in places_of(variants):
        mine = trained(variants, model, data)
        for machine in sorted({m for v in mine for m in _machines(records, v)}):
            rows = [v for v in mine if _machines(records, v) == (machine,)]
            if len(rows) >= 2:
                made.append(_bars(records, rows, model, data, machine))
    return made


def time_unit(largest: float) -> tuple[str, float]:
    """A unit in which the largest time, in seconds, is a number of at least two, and its seconds."""
    return next(
        ((u, s) for u, s in (("hours", 3600.0), ("minutes", 60.0)) if largest >= 2 * s), ("seconds", 1.0)
    )


def _machines(records: Records, variant: Variant) -> tuple[str, ...]:
    return quantities.hardware_of(records, quantities.finished(records, variant))


def _bars(records: Records, rows: Sequence[Variant], model: str, data: str, machine: str) -> Picture:
    means = {v.label: phase_seconds(records, v) for v in rows}
    largest = max(sum(m.values()) for m in means.values())
    unit, size = time_unit(largest)
    drawn, (left, right) = style.figure(2, height=0.7 + 0.2 * max(5, len(rows)), widths=[2, 1])
    shown = [p for p in quantities.PARTS if any(m[p] > 0.005 * largest for m in means.values())]
    times = [scaled(quantities.time_of(records, v), 1 / size) for v in rows]
    _stack(left, {label: [m[p] / size for p in shown] for label, m in means.items()}, shown, times)
    left.set_xlabel(f"training time ({unit})")
    left.set_title(f"{MODEL_NAMES.get(model, model)}, {data}")
    paper = {label: [*bars] for label, bars in PAPER_BARS.items()}
    _stack(right, paper, ["sampling", "gradient"])
    right.set_xlabel("training time (hours)")
    right.set_title("the paper: Qwen2.5-0.5B, MATH")
    legend_of_all(drawn, [left])
    cells = tuple(c for v in rows for c in quantities.finished(records, v))
    seeds = ", ".join(f"{v.label} {len(quantities.finished(records, v))}" for v in rows)
    return Picture(
        f"figure1-{model}-{data}" + ("" if machine else "-unknown"),
        "Figure 1. Training time by phase",
        f"Mean over seeds ({seeds}), on {machine}. Gradient: forward, backward and optimizer; evaluation and "
        "checkpoints are left out. Lines: 95 % interval of the sum over seeds. Right: the paper's own bars.",
        drawn,
        cells,
    )


def phase_seconds(records: Records, variant: Variant) -> dict[str, float]:
    """Mean seconds per run in each part of quantities.PARTS."""
    cells = quantities.finished(records, variant)
    rows = records.steps[records.steps["cell"].isin(cells)]
    return {
        name: float(rows[[f"time/{p}_s" for p in phases]].to_numpy().sum()) / len(cells)
        for name, phases in quantities.PARTS.items()
    }


def _stack(
    axis: Axes, bars: dict[str, list[float]], names: Sequence[str], sums: Sequence[Estimate] = ()
) -> None:
    """Horizontal stacked bars, first on top, the sum with its interval written at the end."""
    labels = list(bars)
    starts = np.zeros(len(labels))
    for place, name in enumerate(names):
        widths = np.array([bars[label][place] for label in labels])
        axis.barh(
            labels,
            widths,
            left=starts,
            label=name,
            color=style.PHASE_COLOURS[name],
            height=0.7,
            hatch=style.PHASE_HATCHES[name],
            edgecolor="white",
            linewidth=0.4,
        )
        starts += widths
    for place, total in enumerate(starts):
        end = float(total)
        if sums and sums[place].has_interval:
            low, end = sums[place].low, sums[place].high
            axis.errorbar(
                total, place, xerr=[[total - low], [end - total]], color="black", elinewidth=0.8, capsize=2
            )
        axis.text(end, place, f" {total:.1f}", va="center", fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.grid(axis="y", visible=False)


def filter_effect(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    """Figure 3: DASH and No-GF: mean |A| of what is learned from, forward and backward time, reward."""
    made = []
    for model, data in places_of(variants):
        rows = _of(variants, model, data, ("dash", "no_gf"))
        if len({v.arm for v in rows}) < 2:
            continue
        drawn, axes = style.figure(3)
        draw_curves(records, axes[0], rows, _learned_advantage, "mean |A| of what is learned from")
        draw_curves(records, axes[1], rows, _gradient_seconds, "forward + backward (s / step)")
        draw_curves(records, axes[2], rows, metric_curve("reward/mean"), "sampled reward")
        legend_of_all(drawn, axes)
        made.append(
            Picture(
                f"figure3-{model}-{data}",
                "Figure 3. What the filter does",
                band_of(records, rows),
                drawn,
                cells_of(rows),
            )
        )
    return made


def reuse(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    """Figure 4: reward against hours, and against updates, tokens and completions, for arms with one and
    with several updates per batch."""
    made = []
    for model, data in places_of(variants):
        rows = _of(variants, model, data, ("dash", "ppo_multi", "ppo_mini"))
        if len({v.arm for v in rows}) < 2:
            continue
        drawn, axes = style.figure(2, 2)
        unit, size = time_unit(max(h.max() for h in (quantities.seconds(records, c) for c in cells_of(rows))))
        scales = {
            f"training time ({unit})": None,
            "updates": "updates",
            "sampled tokens": "tokens/sampled",
            "completions": "completions/sampled",
        }
        for axis, (label, metric) in zip(axes, scales.items(), strict=True):
            draw_against(records, axis, rows, metric, size)
            axis.set_xlabel(label)
            axis.set_ylabel("sampled reward")
        legend_of_all(drawn, axes)
        made.append(
            Picture(
                f"figure4-{model}-{data}",
                "Figure 4. Reward against what it cost",
                f"One thin line per seed, moving mean of {SMOOTH} steps. {_counts(records, rows)}",
                drawn,
                cells_of(rows),
            )
        )
    return made


def without_kl(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    """Figure 6: reward and generation length with and without KL, a row per model."""
    made = []
    for data in dict.fromkeys(v.data for v in variants):
        models = [m for m, d in places_of(variants) if d == data and len(_arms(variants, m, d, KL_ARMS)) == 2]
        if not models:
            continue
        drawn, axes = style.figure(2, len(models))
        rows = [v for m in models for v in _of(variants, m, data, KL_ARMS)]
        for place, model in enumerate(models):
            own = [v for v in rows if v.model == model]
            reward, length = axes[2 * place], axes[2 * place + 1]
            draw_curves(records, reward, own, metric_curve("reward/mean"), "sampled reward")
            draw_curves(
                records, length, own, metric_curve("length/mean_tokens"), "generation length (tokens)"
            )
            reward.set_title(MODEL_NAMES.get(model, model), loc="left")
        legend_of_all(drawn, axes)
        made.append(
            Picture(
                f"figure6-{data}",
                "Figure 6. With and without KL regularisation",
                band_of(records, rows),
                drawn,
                cells_of(rows),
            )
        )
    return made


Curve = Callable[[Records, Sequence[str]], pd.DataFrame]


def metric_curve(name: str) -> Curve:
    return lambda records, cells: quantities.curve(records, cells, name)


def _learned_advantage(records: Records, cells: Sequence[str]) -> pd.DataFrame:
    kept = quantities.curve(records, cells, "advantage/kept_mean_abs")
    return kept if len(kept) else quantities.curve(records, cells, "advantage/mean_abs")


def _gradient_seconds(records: Records, cells: Sequence[str]) -> pd.DataFrame:
    return quantities.curve(records, cells, "time/backprop_s") + quantities.curve(
        records, cells, "time/logprob_s"
    )


def draw_curves(records: Records, axis: Axes, rows: Sequence[Variant], curve: Curve, label: str) -> None:
    """A smoothed mean per variant by step, with the range of its seeds and each seed thin behind."""
    for variant in rows:
        table = curve(records, variant.cells)
        if table.empty:
            continue
        table = table.dropna()  # steps that every seed has reached: the mean is always of all of them
        smooth = table.rolling(SMOOTH, min_periods=1, center=True).mean()
        axis.plot(smooth.index, smooth.mean(axis=1), label=variant.label, **style.line_of(variant))
        if smooth.shape[1] > 1:
            axis.plot(smooth.index, smooth, linewidth=0.4, alpha=0.5, color=style.colour_of(variant))
            axis.fill_between(
                smooth.index,
                smooth.min(axis=1),
                smooth.max(axis=1),
                alpha=0.18,
                linewidth=0,
                color=style.colour_of(variant),
            )
    axis.set_xlabel("step")
    axis.set_ylabel(label)


def draw_against(
    records: Records, axis: Axes, rows: Sequence[Variant], metric: str | None, size: float
) -> None:
    """Reward of each run against a running total (None: training time, in units of `size` seconds)."""
    for variant in rows:
        for place, cell in enumerate(variant.cells):
            steps = quantities.steps_of(records, cell).set_index("step")
            if "reward/mean" not in steps:
                continue
            x = quantities.seconds(records, cell) / size if metric is None else steps[metric].cumsum()
            y = steps["reward/mean"].rolling(SMOOTH, min_periods=1).mean()
            axis.plot(
                x,
                y,
                label=variant.label if place == 0 else None,
                alpha=0.8,
                linewidth=1.1,
                **style.line_of(variant),
            )


def places_of(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((v.model, v.data) for v in variants))


def trained(variants: Sequence[Variant], model: str, data: str) -> list[Variant]:
    """The variants of a model and dataset, without the base model."""
    return [v for v in variants if (v.model, v.data) == (model, data) and v.arm != "base"]


def _of(variants: Sequence[Variant], model: str, data: str, arms: Sequence[str]) -> list[Variant]:
    return [v for v in variants if v.model == model and v.data == data and v.arm in arms]


def _arms(variants: Sequence[Variant], model: str, data: str, arms: Sequence[str]) -> set[str]:
    return {v.arm for v in _of(variants, model, data, arms)}


def cells_of(rows: Sequence[Variant]) -> tuple[str, ...]:
    return tuple(c for v in rows for c in v.cells)


def _counts(records: Records, rows: Sequence[Variant]) -> str:
    parts = []
    for variant in rows:
        done = len(quantities.finished(records, variant))
        rest = f", {len(variant.cells) - done} unfinished" if done < len(variant.cells) else ""
        parts.append(f"{variant.label} {len(variant.cells)}{rest}")
    return f"Seeds: {'; '.join(parts)}."


def band_of(records: Records, rows: Sequence[Variant]) -> str:
    several = any(len(v.cells) > 1 for v in rows)
    band = " Band: the range of the seeds." if several else ""
    mean = f"Mean over seeds, moving mean of {SMOOTH} steps, as far as all seeds go."
    return f"{mean}{band} {_counts(records, rows)}"


def legend_of_all(drawn: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all axes, each label once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    drawn.legend(handles=list(found.values()), labels=list(found), loc="outside upper center", ncols=6)
