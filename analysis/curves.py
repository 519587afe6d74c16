"""Figure 5 (pass@k) and figures that the paper does not have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import NullFormatter, ScalarFormatter, StrMethodFormatter

from dash_exp.errors import Fault, UserError, nearest

from . import estimates as est
from . import paper_values, quantities, style
from .figures import (
    SMOOTH,
    Picture,
    band_of,
    cells_of,
    draw_against,
    draw_curves,
    legend_of_all,
    metric_curve,
    places_of,
    time_unit,
    trained,
)
from .load import Records
from .table import scaled
from .tables import MODEL_NAMES, PAPER_DATA, before_training
from .variants import Variant

LENGTH = "length/mean_tokens"
WATCHED = {
    "filter/kept_share": "kept share of completions",
    "policy/logprob_gap": "log-prob gap (nats)",
    "policy/entropy_nats": "entropy (nats / token)",
    "kl/mean": "KL to the first model (nats)",
}


def pass_at_k(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    """Figure 5: pass@k against k on a log axis, with bands over prompts (and seeds), crossings marked."""
    made = []
    for model, data in places_of(variants):
        own = [v for v in variants if (v.model, v.data) == (model, data)]
        for dataset in quantities.eval_sets(records, own):
            picture = _pass_picture(records, own, model, data, dataset)
            if picture is not None:
                made.append(picture)
    return made


def _pass_picture(
    records: Records, own: Sequence[Variant], model: str, data: str, dataset: str
) -> Picture | None:
    found = {v: quantities.scores(records, v, dataset, after=v.arm != "base") for v in own}
    trained = [v for v in own if v.arm != "base"]
    lines = [(v, s) for v, s in found.items() if s.n > 1 and (s.correct_SP >= 0).all()]
    if not any(v.arm == "base" for v, _ in lines) and trained:
        base = before_training(records, trained, dataset)
        if base.n > 1 and (base.correct_SP >= 0).all():
            lines.insert(0, (Variant("", "base", model, data, "Base", base.cells, base.seeds), base))
    if not lines:
        return None
    papers = data in PAPER_DATA and dataset in paper_values.SETS
    drawn, (axis,) = style.figure(height=2.8)
    means: dict[str, tuple[list[int], list[float]]] = {}
    for variant, scores in lines:
        label, arm, colour = variant.label, variant.arm, style.colour_of(variant)
        k = powers(scores.n)
        curve = est.pass_at_k_curve(scores.correct_SP, scores.n, k, trained=arm != "base")
        values = [point.value for point in curve]
        means[label] = (k, values)
        axis.plot(
            k, values, marker=style.mark_of(variant), markersize=3, label=label, **style.line_of(variant)
        )
        axis.fill_between(
            k, [p.low for p in curve], [p.high for p in curve], alpha=0.15, linewidth=0, color=colour
        )
        if paper := paper_values.pass_curve(model, arm) if papers else ():
            axis.plot(*zip(*paper, strict=True), linestyle="none", marker="x", markersize=4, color=colour)
    crossings = _crossings(axis, means)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_xlabel("k (samples)")
    axis.set_ylabel(f"pass@k, {dataset}")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    crosses = (
        " Crosses: the paper's values, read off its plot."
        if papers and paper_values.pass_curve(model, "dash")
        else ""
    )
    n = "; ".join(f"{v.label} {_counted(s)}" for v, s in lines)
    return Picture(
        f"figure5-{model}-{data}-{dataset}",
        f"Figure 5. pass@k, {MODEL_NAMES.get(model, model)}",
        "Unbiased estimate; bands: 95 %, over prompts and, from three runs on, seeds. "
        f"{n}. {crossings}{crosses}",
        drawn,
        tuple(c for _, s in lines for c in s.cells),
    )


def _counted(scores: quantities.Scores) -> str:
    runs = len(scores.cells)
    return f"{runs} seed{'s' if runs != 1 else ''} x {len(scores.prompts)} prompts, n={scores.n}"


def powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n."""
    return [2**i for i in range(n.bit_length()) if 2**i <= n]


def _crossings(axis, means: dict[str, tuple[list[int], list[float]]]) -> str:  # type: ignore[no-untyped-def]
    """Mark where a trained arm's curve meets the base model's. Returns it in words."""
    if "Base" not in means:
        return ""
    found = []
    k_base, base = means["Base"]
    for label, (k, values) in means.items():
        common = [i for i in range(min(len(k), len(k_base))) if k[i] == k_base[i]]
        for place in est.crossing(k[: len(common)], values[: len(common)], base[: len(common)]):
            height = float(np.interp(math.log(place), np.log(k), values))
            axis.plot([place], [height], marker="D", markersize=5, color="none", markeredgecolor="black")
            found.append(f"{label} meets Base at k = {place:.1f}")
    return f"{'; '.join(found)}." if found else "No curve crosses Base."


def phases(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    """Seconds of a step by phase, over the steps of each arm's first run."""
    made = []
    for model, data in places_of(variants):
        own = [v for v in trained(variants, model, data) if v.cells]
        own = [v for v in own if len(quantities.steps_of(records, v.cells[0])) > 1][:9]
        if not own:
            continue
        columns = min(3, len(own))
        drawn, axes = style.figure(columns, math.ceil(len(own) / columns), height=1.6)
        for axis, variant in zip(axes, own, strict=False):
            rows = quantities.steps_of(records, variant.cells[0]).sort_values("step")
            parts = [rows[[f"time/{p}_s" for p in of]].sum(axis=1) for of in quantities.PARTS.values()]
            axis.stackplot(
                rows["step"], parts, labels=list(quantities.PARTS), colors=list(style.PHASE_COLOURS.values())
            )
            axis.set_title(variant.label, loc="left")
            axis.set_xlabel("step")
            axis.set_ylabel("s / step")
        for axis in axes[len(own) :]:
            axis.set_visible(False)
        drawn.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(quantities.PARTS)
        )
        made.append(
            Picture(
                f"phases-{model}-{data}",
                "Where the seconds go",
                "The first run of each arm.",
                drawn,
                tuple(v.cells[0] for v in own),
            )
        )
    return made


def watched(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    """Signs of a run's health: kept share, log-prob gap, entropy, KL."""
    made = []
    for model, data in places_of(variants):
        own = trained(variants, model, data)
        rows = records.steps[records.steps["cell"].isin(cells_of(own))]
        present = {m: w for m, w in WATCHED.items() if m in rows and rows[m].notna().any()}
        if not own or not present:
            continue
        drawn, axes = style.figure(2, math.ceil(len(present) / 2))
        for axis, (metric, words) in zip(axes, present.items(), strict=False):
            draw_curves(records, axis, own, metric_curve(metric), words)
            if metric == "kl/mean" and math.isfinite(axis.dataLim.minposy):
                axis.set_yscale("log")  # one bad update may be a hundred times what is usual
                axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        for axis in axes[len(present) :]:
            axis.set_visible(False)
        legend_of_all(drawn, axes)
        made.append(
            Picture(
                f"watched-{model}-{data}",
                "Kept share, log-prob gap, entropy and KL",
                f"Mean over seeds, moving mean of {SMOOTH} steps; band: the range of the seeds.",
                drawn,
                tuple(c for v in own for c in v.cells),
            )
        )
    return made


def known(records: Records, metrics: Sequence[str]) -> None:
    """Raises UserError for every metric that no step of any cell has."""
    have = [name for name in metrics_of(records) if records.steps[name].notna().any()]
    faults = [
        Fault(f"--metric {name}", "no cell has this metric", nearest(name, have))
        for name in metrics
        if name not in have
    ]
    if faults:
        raise UserError(faults, "nothing was made")


def metrics_of(records: Records) -> list[str]:
    """What can be drawn: numbers by step."""
    numbers = records.steps.select_dtypes("number").columns
    return sorted(name for name in numbers if "/" in str(name))


def asked(records: Records, variants: Sequence[Variant], metrics: Sequence[str]) -> list[Picture]:
    """Metrics that were asked for by name, by step."""
    made = []
    for metric in dict.fromkeys(metrics):
        for model, data in places_of(variants):
            own = trained(variants, model, data)
            rows = [v for v in own if _has(records, v, metric)]
            if not rows:
                continue
            without = [v.label for v in own if v not in rows]
            drawn, (axis,) = style.figure(height=2.8)
            draw_curves(records, axis, rows, metric_curve(metric), metric)
            axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
            band = f"Mean over seeds, moving mean of {SMOOTH} steps; band: the range of the seeds."
            lacking = f" Without it: {', '.join(without)}." if without else ""
            made.append(
                Picture(
                    f"metric-{metric.replace('/', '-')}-{model}-{data}",
                    metric,
                    band + lacking,
                    drawn,
                    cells_of(rows),
                )
            )
    return made


def rewards(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    """Sampled reward of everything that was trained, by step and by training time."""
    made = []
    for model, data in places_of(variants):
        own = [v for v in trained(variants, model, data) if _has(records, v, "reward/mean")]
        if not own:
            continue
        drawn, axes = style.figure(2, height=2.6)
        draw_curves(records, axes[0], own, metric_curve("reward/mean"), "sampled reward")
        unit, size = time_unit(max(quantities.seconds(records, c).max() for c in cells_of(own)))
        draw_against(records, axes[1], own, None, size)
        axes[1].set_xlabel(f"training time ({unit})")
        axes[1].sharey(axes[0])
        legend_of_all(drawn, axes)
        made.append(
            Picture(
                f"reward-{model}-{data}",
                f"Reward while training, {MODEL_NAMES.get(model, model)} on {data}",
                f"Left: {band_of(records, own)} Right: one line per seed.",
                drawn,
                cells_of(own),
            )
        )
    return made


def response(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    """Where variants of an arm differ in one number: accuracy, length and time against it."""
    made = []
    for model, data in places_of(variants):
        own = trained(variants, model, data)
        for arm in dict.fromkeys(v.arm for v in own):
            rows = [v for v in own if v.arm == arm and quantities.finished(records, v)]
            name = _numeric(rows)
            if name is None:
                continue
            panels = _panels(records, rows)
            drawn, axes = style.figure(len(panels), height=2.3)
            for axis, (words, points) in zip(axes, panels.items(), strict=True):
                for variant, point in zip(rows, points, strict=True):
                    axis.errorbar(
                        float(variant.varied[0][1]),
                        point.value,
                        yerr=_arms(point),
                        color=style.colour_of(variant),
                        marker=style.mark_of(variant),
                        markersize=5,
                        elinewidth=0.8,
                    )
                values = [float(v.varied[0][1]) for v in rows]
                axis.plot(values, [p.value for p in points], color="0.7", linewidth=0.8, zorder=0)
                if min(values) > 0 and max(values) >= 8 * min(values):
                    axis.set_xscale("log")
                    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                    axis.xaxis.set_minor_formatter(NullFormatter())
                axis.set_xlabel(name)
                axis.set_ylabel(words)
            n = "; ".join(f"{v.varied[0][1]}: {len(quantities.finished(records, v))}" for v in rows)
            made.append(
                Picture(
                    f"response-{arm}-{model}-{data}",
                    f"What {name} changes, {rows[0].label.partition(' (')[0]}",
                    f"Means over seeds with 95 % intervals. Seeds by {name}: {n}.",
                    drawn,
                    cells_of(rows),
                )
            )
    return made


def _numeric(rows: Sequence[Variant]) -> str | None:
    """The short name of the one number in which these variants differ; None where it is not one number."""
    names = {name for v in rows for name, _ in v.varied}
    if len(rows) < 3 or len(names) != 1 or any(len(v.varied) != 1 for v in rows):
        return None
    try:
        [float(v.varied[0][1]) for v in rows]
    except ValueError:
        return None
    return names.pop()


def _panels(records: Records, rows: Sequence[Variant]) -> dict[str, list[est.Estimate]]:
    """The headline numbers of each variant, by what they are."""
    found = {
        f"accuracy, {dataset}": [est.accuracy(quantities.scores(records, v, dataset).scores_SP) for v in rows]
        for dataset in quantities.eval_sets(records, rows)[:1]
    }
    times = [quantities.time_of(records, v) for v in rows]
    finite = [t.value for t in times if math.isfinite(t.value)]
    if finite:
        unit, size = time_unit(max(finite))
        found[f"training time ({unit})"] = [scaled(time, 1 / size) for time in times]
    lengths = [quantities.curve(records, quantities.finished(records, v), LENGTH) for v in rows]
    if all(len(table) for table in lengths):
        found["late length (tokens)"] = [
            est.over_seeds(table.tail(max(1, len(table) // 4)).mean()) for table in lengths
        ]
    return found


def _has(records: Records, variant: Variant, metric: str) -> bool:
    rows = records.steps[records.steps["cell"].isin(variant.cells)]
    return bool(rows[metric].notna().any())


def accuracy_against_cost(records: Records, variants: Sequence[Variant]) -> list[Picture]:
    """Accuracy after training against training time, a point per arm, on one kind of hardware."""
    made = []
    for model, data in places_of(variants):
        own = trained(variants, model, data)
        machines = {m for v in own for m in quantities.hardware_of(records, quantities.finished(records, v))}
        for dataset in quantities.eval_sets(records, own)[:1] if len(machines) == 1 else ():
            points = [
                (v, quantities.time_of(records, v), quantities.scores(records, v, dataset)) for v in own
            ]
            points = [(v, t, s) for v, t, s in points if math.isfinite(t.value) and s.cells]
            if len(points) < 2:
                continue
            drawn, (axis,) = style.figure(height=2.8)
            unit, size = time_unit(max(t.value for _, t, _ in points))
            for variant, time, scores in points:
                accuracy, at = est.accuracy(scores.scores_SP), scaled(time, 1 / size)
                colour = style.colour_of(variant)
                axis.errorbar(
                    at.value,
                    accuracy.value,
                    xerr=_arms(at),
                    yerr=_arms(accuracy),
                    color=colour,
                    marker=style.mark_of(variant),
                    markersize=5,
                    linestyle="none",
                    elinewidth=0.8,
                    label=variant.label,
                )
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(ScalarFormatter())
            axis.tick_params(axis="x", which="both", length=3, pad=3)
            axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
            axis.set_xlabel(f"training time ({unit})")
            axis.set_ylabel(f"accuracy, {dataset}")
            made.append(
                Picture(
                    f"cost-{model}-{data}",
                    "Accuracy against training time",
                    f"95 % intervals, on {next(iter(machines))}.",
                    drawn,
                    tuple(c for v, _, _ in points for c in v.cells),
                )
            )
    return made


def _arms(point: est.Estimate) -> list[list[float]] | None:
    """Lengths of error bars, below and above."""
    if not point.has_interval:
        return None
    return [[point.value - point.low], [point.high - point.value]]
