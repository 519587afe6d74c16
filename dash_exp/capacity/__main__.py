"""Predict the time of a step, and the best split of GPUs, from measured curves:

    python -m dash_exp.capacity curves=<json> [key=value ...]
    python -m dash_exp.capacity cell=<folder>[,<folder> ...] [key=value ...]

`curves` is a file that `python -m benchmarks --rows curves --json <file>` wrote; `cell` the folder of a
finished cell whose record is read instead (several, with other batches, make a better curve). What is not
given is as it was measured.

  servers, learners   devices that sample, that learn         prompts, group  the batch
  tokens              the longest completion; the measured lengths are scaled to it
  equal=true          every completion is as long as that
  kept                share of the groups that the filter keeps
  streaming, waves    learn while sampling goes on, requested in so many parts
  call                prompts sampled and learned from at a time (0: all)
  max_sequences, micro_batch_tokens                           as in the config
  gpus                list every split of so many devices into servers and learners

No model is loaded. Assumptions: docs/capacity.md. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from dash_exp.capacity.curves import Measured, read_cells, read_curves
from dash_exp.capacity.model import Curves, Prediction, Setting, best_waves, predict, splits, wave_choices
from dash_exp.errors import ExitCode, Fault, UserError, nearest, run_command

SOURCES = ("curves", "cell")
INTEGERS = (*(f.name for f in fields(Setting) if str(f.type).startswith("int")), "gpus")
SWITCHES = {"true": True, "false": False}
KEYS = (*SOURCES, *(f.name for f in fields(Setting)), "gpus")
SHOWN = 8
"""Splits that are listed; the JSON line has all of them."""


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The command's key=value. Raises UserError with every fault."""
    faults: list[Fault] = []
    values: dict[str, Any] = {}
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals:
            faults.append(Fault(text, "is not key=value", "see python -m dash_exp.capacity --help"))
        elif key not in KEYS:
            faults.append(Fault(key, "there is no such key", nearest(key, KEYS)))
        else:
            try:
                values[key] = _value(key, value)
            except ValueError as error:
                faults.append(Fault(key, f"got {value!r}, must be {error}"))
    sources = [key for key in SOURCES if key in values]
    if len(sources) != 1 and not any(f.where in SOURCES for f in faults):
        got = "both curves= and cell=" if sources else "neither curves= nor cell="
        faults.append(Fault("curves", f"got {got}, one is needed", "curves=<json>, or cell=<folder>"))
    if "gpus" in values and (both := [k for k in ("servers", "learners") if k in values]):
        what = f"got {' and '.join(both)} beside it"
        faults.append(Fault("gpus", what, "leave them out: gpus tries every split"))
    if len(values.get("curves", ())) > 1:
        faults.append(Fault("curves", f"got {len(values['curves'])} files, one is needed"))
    if faults:
        raise UserError(faults)
    return values


def _value(key: str, text: str) -> Any:
    """The value of a key. Raises ValueError with what it must be."""
    if key in SOURCES:
        if not (places := [Path(one).expanduser() for one in text.split(",") if one]):
            raise ValueError("a path")
        return places
    if key in INTEGERS:
        least = 0 if key == "call" else 1
        if not text.isascii() or not text.isdecimal() or int(text) < least:
            raise ValueError(f"a whole number, {least} or more")
        return int(text)
    if key == "kept":
        with suppress(ValueError):
            if 0 <= (share := float(text)) <= 1:
                return share
        raise ValueError("a share between 0 and 1")
    if text.lower() not in SWITCHES:
        raise ValueError("true or false")
    return SWITCHES[text.lower()]


def setting_of(values: dict[str, Any], measured: Setting) -> Setting:
    """What was measured, changed to what was asked for. Raises UserError where the two do not fit."""
    changes = {key: value for key, value in values.items() if key not in (*SOURCES, "gpus")}
    if changes.get("call") == 0:
        changes["call"] = None
    setting = replace(measured, **changes)
    if (call := changes.get("call")) and setting.prompts % call:
        raise UserError(Fault("call", f"got {call}, which does not divide prompts={setting.prompts}"))
    return setting


def notes_of(curves: Curves, setting: Setting, prediction: Prediction) -> list[str]:
    """Where the prediction goes beyond what was measured."""
    notes = []
    largest = curves.decode.points[-1][0]  # a mean: where lengths differ, the most is some times that
    if prediction.sequences > 3 * largest:
        notes.append(f"a server decodes up to {prediction.sequences} sequences; measured: {largest:.0f}")
    if setting.tokens > 1.5 * curves.cap and not setting.equal:
        notes.append(f"lengths are scaled from at most {curves.cap} tokens to {setting.tokens}")
    if setting.learners > 1 and curves.reduce_s == 0:
        notes.append("summing gradients over learners was not measured: it counts as 0 s")
    return notes


def format_setting(setting: Setting) -> str:
    waves = "one wave" if setting.waves == 1 else f"{setting.waves} waves"
    how = f"streaming in {waves}" if setting.streaming else "synchronous"
    at_a_time = "" if setting.call is None else f", {setting.call} prompts at a time"
    devices = f"servers {setting.servers}, learners {setting.learners}"
    batch = f"{setting.prompts} prompts x {setting.group}, {setting.tokens} tokens, kept {setting.kept:.2f}"
    return f"{devices}, {batch},\n  {how}{at_a_time}"


def prediction_table(p: Prediction) -> list[str]:
    """Where the seconds of a step go."""
    rows = [
        ("sampling", p.sampling_s),
        ("backpropagation", p.backprop_s),
        ("both at once", 0.0 - round(p.hidden_s, 6)),
        ("reduction", p.reduce_s),
        ("optimizer", p.optimizer_s),
        ("sync", p.sync_s),
        ("everything else", p.other_s),
        ("step", p.step_s),
    ]
    lines = [f"  {name:<20} {seconds:>10.3f} s  {seconds / p.step_s:>6.1%}" for name, seconds in rows]
    return [*lines, f"  {'sampled':<20} {p.tokens_per_s:>10.0f} tokens/s"]


def wave_table(curves: Curves, setting: Setting, best: int) -> list[str]:
    lines = ["", f"  {'waves':>5} {'sampling s':>12} {'step s':>10}"]
    for waves in wave_choices(setting.prompts):
        p = predict(curves, replace(setting, waves=waves))
        mark = "  <- sampler.waves" if waves == best else ""
        lines.append(f"  {waves:>5} {p.sampling_s:>12.3f} {p.step_s:>10.3f}{mark}")
    return lines


def split_table(found: Sequence[tuple[Setting, Prediction]]) -> list[str]:
    head = f"{'servers':>9} {'learners':>8} {'waves':>5} {'sampling s':>11} {'backprop s':>11} {'step s':>9}"
    lines = ["", head]
    for s, p in found[:SHOWN]:
        times = f"{p.sampling_s:>11.3f} {p.backprop_s:>11.3f} {p.step_s:>9.3f}"
        lines.append(f"  {s.servers:>7} {s.learners:>8} {s.waves:>5} {times}")
    return [*lines, f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else lines


def run(arguments: Sequence[str]) -> int:
    values = parse(arguments)
    source = next(key for key in SOURCES if key in values)
    places: list[Path] = values[source]
    measured: Measured = read_cells(places) if source == "cell" else read_curves(places[0])
    curves, setting = measured.curves, setting_of(values, measured.setting)
    found = splits(curves, setting, values["gpus"]) if "gpus" in values else []
    if found:
        setting = found[0][0]
    prediction = predict(curves, setting)
    best, at_best = best_waves(curves, setting)
    print(f"from {', '.join(map(str, places))}\n\n  {format_setting(setting)}\n")
    print("\n".join(prediction_table(prediction)))
    if found:
        print("\n".join(split_table(found)))
    elif setting.streaming:
        print("\n".join(wave_table(curves, setting, best)))
    for note in (*measured.notes, *notes_of(curves, setting, prediction)):
        print(f"note: {note}")
    listed = [
        {"servers": s.servers, "learners": s.learners, "waves": s.waves, "step_s": round(p.step_s, 6)}
        for s, p in found
    ]
    summary = {
        "setting": asdict(setting),
        **{name: round(value, 6) for name, value in asdict(prediction).items()},
        "tokens_per_s": round(prediction.tokens_per_s, 3),
        "recommended_waves": best,
        "step_s_at_recommended_waves": round(at_best.step_s, 6),
        "splits": listed,
    }
    print(f"\n{json.dumps(summary)}")
    return ExitCode.OK


def main(arguments: Sequence[str]) -> int:
    return run_command(run, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
