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
  streaming, waves    learn while sampling goes on, asked for in so many parts
  call                prompts sampled and learned from at a time (0: all)
  max_sequences, micro_batch_tokens                           as in the config
  gpus                tell every split of so many devices into servers and learners

No model is loaded, no torch. Assumptions: docs/capacity.md. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dash_exp.capacity.curves import Measured, read_cells, read_curves
from dash_exp.capacity.model import Curves, Prediction, Setting, best_waves, predict, splits, wave_choices
from dash_exp.errors import ExitCode, Fault, UserError, nearest, run_command

SOURCES = ("curves", "cell")
LEAST = {
    "servers": 1,
    "learners": 1,
    "prompts": 1,
    "group": 1,
    "waves": 1,
    "tokens": 1,
    "call": 0,
    "max_sequences": 1,
    "micro_batch_tokens": 1,
    "gpus": 1,
}
"""Whole numbers, with the smallest that makes sense."""
SWITCHES = {"true": True, "false": False}
KEYS = (*SOURCES, *LEAST, "kept", "streaming", "equal")
SHOWN = 8
"""Splits that are listed; the JSON line has all of them."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The command: where curves come from, and what is to be predicted."""

    source: str
    places: tuple[Path, ...]
    changes: dict[str, Any]
    gpus: int | None


def parse(arguments: Sequence[str]) -> Asked:
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
            found = _value(key, value)
            if isinstance(found, Fault):
                faults.append(found)
            else:
                values[key] = found
    sources = [key for key in SOURCES if key in values]
    if len(sources) != 1 and not any(f.where in SOURCES for f in faults):
        got = "both curves= and cell=" if sources else "neither curves= nor cell="
        faults.append(Fault("curves", f"got {got}, one is needed", "curves=<json>, or cell=<folder>"))
    if "gpus" in values and (both := [k for k in ("servers", "learners") if k in values]):
        faults.append(
            Fault("gpus", f"got {' and '.join(both)} beside it", "leave them out: gpus tries every split")
        )
    if faults:
        raise UserError(faults)
    places = tuple(Path(one).expanduser() for one in values.pop(sources[0]))
    gpus = values.pop("gpus", None)
    if values.get("call") == 0:
        values["call"] = None
    return Asked(sources[0], places, values, gpus)


def _value(key: str, text: str) -> Any:
    """The value of a key, or what is wrong with it."""
    if key in SOURCES:
        places = [one for one in text.split(",") if one]
        return places or Fault(key, "got nothing", f"{key}=<path>")
    if key in LEAST:
        if not text.isascii() or not text.isdecimal() or int(text) < LEAST[key]:
            return Fault(key, f"got {text!r}, must be a whole number, {LEAST[key]} or more")
        return int(text)
    if key == "kept":
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        return share if 0 <= share <= 1 else Fault(key, f"got {text!r}, must be a share between 0 and 1")
    if text.lower() not in SWITCHES:
        return Fault(key, f"got {text!r}, must be true or false")
    return SWITCHES[text.lower()]


def setting_of(asked: Asked, measured: Measured) -> Setting:
    """What was measured, with what was asked for. Raises UserError where the two do not fit."""
    setting = replace(measured.setting, **asked.changes)
    if "call" in asked.changes and setting.call is not None and setting.prompts % setting.call:
        raise UserError(Fault("call", f"got {setting.call}, which does not divide prompts={setting.prompts}"))
    return setting


def notes_of(curves: Curves, setting: Setting, prediction: Prediction) -> list[str]:
    """Where the prediction leaves what was measured."""
    notes = []
    largest = curves.decode.points[-1][0]  # a mean: where lengths differ, the most is some times that
    if prediction.sequences > 3 * largest:
        notes.append(f"a server decodes up to {prediction.sequences} sequences; measured: {largest:.0f}")
    if setting.tokens > 1.5 * curves.cap and not setting.equal:
        notes.append(f"lengths are scaled from at most {curves.cap} tokens to {setting.tokens}")
    if setting.learners > 1 and curves.reduce_s == 0:
        notes.append("summing gradients over learners was not measured: it counts as 0 s")
    return notes


def told(setting: Setting) -> str:
    """A setting in a line."""
    waves = "one wave" if setting.waves == 1 else f"{setting.waves} waves"
    how = f"streaming in {waves}" if setting.streaming else "synchronous"
    if setting.call is not None:
        how += f", {setting.call} prompts at a time"
    return (
        f"servers {setting.servers}, learners {setting.learners}, {setting.prompts} prompts x "
        f"{setting.group}, {setting.tokens} tokens, kept {setting.kept:.2f},\n  {how}"
    )


def table(prediction: Prediction) -> list[str]:
    """Where the seconds of a step go."""
    p = prediction
    hidden = round(p.hidden_s, 6)
    rows = [
        ("sampling", p.sampling_s),
        ("backpropagation", p.backprop_s),
        ("both at once", 0.0 - hidden),
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
        lines.append(
            f"  {s.servers:>7} {s.learners:>8} {s.waves:>5} {p.sampling_s:>11.3f} {p.backprop_s:>11.3f} "
            f"{p.step_s:>9.3f}"
        )
    return [*lines, f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else lines


def run(arguments: Sequence[str]) -> int:
    asked = parse(arguments)
    measured = read_cells(asked.places) if asked.source == "cell" else _one_file(asked.places)
    curves, setting = measured.curves, setting_of(asked, measured)
    found: list[tuple[Setting, Prediction]] = []
    if asked.gpus is not None:
        found = splits(curves, setting, asked.gpus)
        setting = found[0][0]
    prediction = predict(curves, setting)
    best, at_best = best_waves(curves, setting)
    print(f"from {', '.join(map(str, asked.places))}\n\n  {told(setting)}\n")
    print("\n".join(table(prediction)))
    if found:
        print("\n".join(split_table(found)))
    elif setting.streaming:
        print("\n".join(wave_table(curves, setting, best)))
    for note in (*measured.notes, *notes_of(curves, setting, prediction)):
        print(f"note: {note}")
    print()
    print(
        json.dumps(
            {
                "setting": asdict(setting),
                **rounded(prediction),
                "recommended_waves": best,
                "step_s_at_recommended_waves": round(at_best.step_s, 6),
                "splits": [
                    {
                        "servers": s.servers,
                        "learners": s.learners,
                        "waves": s.waves,
                        "step_s": round(p.step_s, 6),
                    }
                    for s, p in found
                ],
            }
        )
    )
    return ExitCode.OK


def rounded(prediction: Prediction) -> dict[str, float]:
    values = {f.name: getattr(prediction, f.name) for f in fields(Prediction)}
    return {**{k: round(v, 6) for k, v in values.items()}, "tokens_per_s": round(prediction.tokens_per_s, 3)}


def _one_file(places: Sequence[Path]) -> Measured:
    if len(places) > 1:
        raise UserError(Fault("curves", f"got {len(places)} files, one is needed"))
    return read_curves(places[0])


def main(arguments: Sequence[str]) -> int:
    return run_command(run, arguments, usage=str(__doc__))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
