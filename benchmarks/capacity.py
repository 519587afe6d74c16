"""Is the capacity model right? Curves are measured here, then steps of other settings are predicted and run.

Each setting differs from what was measured in batch, group, filter, length or waves. The goal is 15 %.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.curves import Collector, place_of
from benchmarks.ours import Ours, config_of
from benchmarks.report import Line, Options, print_lines
from benchmarks.turns import WARM_UP, median
from dash_exp.capacity.curves import curves_of
from dash_exp.capacity.model import Curves, Setting, predict, predict_batch
from dash_exp.record.folder import Row

GOAL = 0.15


def measure(options: Options) -> dict[str, Any]:
    config = config_of("none", 0.0, *place_of(options))
    with tempfile.TemporaryDirectory() as scratch, Ours(config, options.cache, Path(scratch)) as ours:
        curves, rows = check(ours, options.rounds)
    lines = [asdict(line_of(row, options)) for row in rows]
    print_lines("Capacity: predicted against real steps", lines)
    return {"lines": lines, "curves": curves, "checks": rows}


def line_of(row: dict[str, Any], options: Options) -> Line:
    ratio = row["predicted"] / row["real"]
    met = None if options.quick else abs(ratio - 1) <= GOAL
    return Line(
        f"step, {row['what']}",
        "the real one",
        row["predicted"],
        row["real"],
        "s",
        ratio,
        f"within {GOAL:.0%}",
        met,
    )


def label(setting: Setting) -> str:
    """What is special about a setting."""
    how = f"{setting.waves} waves" if setting.streaming else "one after the other"
    call = f", {setting.call} prompts a call" if setting.call else ""
    return f"{setting.prompts} x {setting.group}, {how}{call}"


def settings(base: Setting) -> list[Setting]:
    """What is predicted: a quarter and half of the prompts, more completions of fewer prompts, half of
    the length; and, apart, other numbers of waves, and one side after the other."""
    few = max(1, base.prompts // 4)
    found = [
        replace(base, prompts=few),
        replace(base, prompts=max(1, base.prompts // 2)),
        replace(base, prompts=few, group=base.group * 2),
        replace(base, call=few, streaming=False),
    ]
    if base.streaming:
        found += [replace(base, waves=2), replace(base, waves=8), replace(base, streaming=False)]
    return list(dict.fromkeys(found))


def check(ours: Ours, rounds: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The curves, and predicted and real seconds of a step by setting. In each round every point of the
    curves is measured once and every setting run once."""
    collected = Collector(ours)
    cap = ours.built.parts.decoding.max_new_tokens
    others = settings(Setting(tokens=cap, **collected.setting()))
    steps: dict[Setting, list[Row]] = {setting: [] for setting in others}
    for number in range(1, rounds + WARM_UP + 1):
        collected.round(number)
        for setting in others:
            row = real(ours, setting, number)
            if number > WARM_UP:
                steps[setting].append(row)
    curves = collected.curves()
    known = curves_of(curves).curves
    return curves, [row_of(setting, known, steps[setting]) for setting in others]


def row_of(setting: Setting, known: Curves, steps: list[Row]) -> dict[str, Any]:
    """Predicted and real seconds, of the step and of its two sides; and predicted for the very lengths that
    were then sampled, which separates errors of time from errors of length."""
    prediction = predict(known, setting)
    lengths = [tuple(map(tuple, row["lengths"])) for row in steps]
    given = statistics.median(predict_batch(known, setting, some).step_s for some in lengths)
    return {
        "what": label(setting),
        "setting": asdict(setting),
        "predicted": prediction.step_s,
        "real": median(steps, "time/step_s"),
        "predicted_of_these_lengths": given,
        "predicted_backprop_s": prediction.backprop_s,
        "real_backprop_s": median(steps, "time/backprop_s", "time/logprob_s"),
        "predicted_sampling_s": prediction.sampling_s,
        "real_waiting_s": median(steps, "time/sample_s"),
        "predicted_tokens": prediction.tokens,
        "real_tokens": median(steps, "tokens/sampled"),
        "all": [row["time/step_s"] for row in steps],
    }


def real(ours: Ours, setting: Setting, number: int) -> Row:
    """A step with this setting, by the machine that curves were measured on."""
    call = setting.call or setting.prompts
    plan = ours.plan(
        prompts_per_step=setting.prompts,
        prompts_per_update=setting.prompts,
        prompts_per_call=call,
        group_size=setting.group,
        waves=setting.waves if setting.streaming else None,
        servers=setting.servers,
        streaming=setting.streaming or ours.config.sampler.name != "vllm_servers",
    )
    return ours.step(number, plan)
