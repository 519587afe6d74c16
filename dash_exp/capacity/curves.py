"""Reads the curves of the capacity model: from a file of the benchmarks, or from records of finished
cells."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from dash_exp.capacity.model import Curves, Decode, Lengths, Setting, of_two, sample
from dash_exp.errors import Fault, UserError
from dash_exp.record.folder import Row, read_final, read_rows
from dash_exp.record.ledger import union_s

UNIT = Decode(((1.0, 1.0),))
"""A decode step takes 1: times count decode steps."""
NUMBERS = ("learner_tokens_per_s", "prefill_tokens_per_s", "prompt_tokens", "cap")
SECONDS = ("optimizer_s", "sync_s", "reduce_s", "other_s")


@dataclass(frozen=True, slots=True)
class Measured:
    """Curves, the setting that they were measured with, and notes for the reader."""

    curves: Curves
    setting: Setting
    notes: tuple[str, ...] = ()


def read_curves(path: Path) -> Measured:
    """A file that `python -m benchmarks --rows curves --json` (or `capacity`) wrote, or its part `curves`:

        {"decode": [[sequences, tokens/s of one server], ...], "prefill_tokens_per_s": ..., "cap": ...,
         "learner_tokens_per_s": ..., "lengths": [[tokens, ...], ...], "prompt_tokens": ...,
         "optimizer_s": ..., "sync_s": ..., "reduce_s": ..., "other_s": ..., "setting": {"prompts": ...}}

    Raises UserError with everything that is wrong with it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(Fault("curves", f"cannot read {path}: {error.strerror}")) from error
    except ValueError as error:
        raise UserError(Fault("curves", f"{path} is not JSON: {error}")) from error
    rows = found.get("rows", {}) if isinstance(found, dict) else {}
    for place in (found, *(rows.get(name) for name in ("curves", "capacity"))):
        if isinstance(place, dict) and "curves" in place:
            return curves_of(place["curves"])
    return curves_of(found)


def curves_of(found: Any) -> Measured:
    """Curves from their JSON. Raises UserError with every fault."""
    if not isinstance(found, dict) or "decode" not in found:
        hint = "make one: python -m benchmarks --rows curves --json <file>"
        raise UserError(Fault("curves", "there are no curves in the file", hint))
    if faults := [Fault(f"curves.{name}", what) for name, what in _faults(found)]:
        raise UserError(faults)
    curves = Curves(
        decode=Decode.of_rates([(float(n), float(rate)) for n, rate in found["decode"]]),
        lengths=tuple(tuple(map(int, group)) for group in found["lengths"]),
        prefill_tokens_per_s=float(found.get("prefill_tokens_per_s") or math.inf),
        learner_tokens_per_s=float(found["learner_tokens_per_s"]),
        cap=int(found["cap"]),
        prompt_tokens=round(found["prompt_tokens"]),
        **{name: float(found.get(name) or 0.0) for name in SECONDS},
    )
    names = {field.name for field in fields(Setting)}
    given = {name: value for name, value in found.get("setting", {}).items() if name in names}
    return Measured(curves, replace(Setting(tokens=curves.cap), **given), tuple(found.get("notes", ())))


def _faults(found: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Names of what is wrong, and why."""
    decode, lengths, cap = found["decode"], found.get("lengths"), found.get("cap")
    if not _are_lists(decode) or any(len(pair) != 2 or not all(map(_positive, pair)) for pair in decode):
        yield "decode", "must be a list of [sequences, tokens per second], all above 0"
    elif len({n for n, _ in decode}) < len(decode):
        yield "decode", "names a number of sequences twice"
    if not _are_lists(lengths) or not all(_positive(n) for group in lengths or () for n in group):
        yield "lengths", "must be a list of groups, each a list of tokens above 0"
    elif _positive(cap) and max(n for group in lengths or () for n in group) > cap:
        yield "cap", f"got {cap}, but a length is above it"
    for name in NUMBERS:
        optional = name == "prefill_tokens_per_s" and found.get(name) is None
        if not optional and not _positive(found.get(name)):
            yield name, f"got {found.get(name)!r}, must be a number above 0"
    for name in SECONDS:
        value = found.get(name)
        if value is not None and not (_is_number(value) and value >= 0):
            yield name, f"got {value!r}, must be seconds, 0 or more"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


def _are_lists(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, list) and one for one in value)


def read_cells(folders: Sequence[Path]) -> Measured:
    """Curves from the records of cells that differ only in their batch: each gives one point of the decode
    curve, at its mean number of sequences. Everything else comes from the first one."""
    faults: list[Fault] = []
    cells: list[_Cell] = []
    for folder in folders:
        try:
            cells.append(_Cell.read(folder))
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(faults)
    points: dict[float, float] = {}
    for cell in cells:
        points.setdefault(*cell.decode_point())
    first = cells[0]
    one = "one cell gives one point of the decode curve: other numbers of sequences are a guess"
    curves = Curves(
        decode=Decode.of_rates(list(points.items())),
        prefill_tokens_per_s=math.inf,
        learner_tokens_per_s=first.learner_rate(),
        lengths=tuple(group for row in first.steps for group in first.groups[row["step"]]),
        cap=first.setting.tokens,
        prompt_tokens=first.prompt_tokens(),
        **first.seconds(),
    )
    return Measured(curves, first.setting, (one,) if len(points) == 1 else ())


@dataclass(frozen=True)
class _Cell:
    """A record: the steps that count (not the first, which is slower than the others)."""

    setting: Setting
    steps: list[Row]
    groups: dict[int, Lengths]
    sampled_s: dict[int, float]

    @classmethod
    def read(cls, folder: Path) -> _Cell:
        """Raises UserError where a record cannot be used."""
        try:
            frozen = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            setting = _setting_of(frozen)
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            what = f"{folder} is not a cell: {type(error).__name__} {error}"
            raise UserError(Fault("cell", what, "name its folder")) from error
        steps = [r for r in read_final(folder, "steps") if r["step"] > 1 and r.get("tokens/computed")]
        if not steps or "completions/shown" in steps[0]:
            what = f"{folder} has no second step with something sampled and learned from"
            raise UserError(Fault("cell", what, "let it run for a few steps, or use curves=<file>"))
        setting = replace(
            setting,
            kept=statistics.fmean(r["filter/kept_share"] for r in steps),
            waves=int(steps[-1].get("sampler/waves", setting.waves)),
        )
        groups: dict[int, dict[str, list[int]]] = {int(r["step"]): {} for r in steps}
        for row in read_final(folder, "samples"):
            if row["step"] in groups:
                groups[row["step"]].setdefault(str(row["prompt"]), []).append(int(row["tokens"]))
        if frozen["sampler"]["name"] == "vllm_servers":
            seconds = _sampled_seconds(read_rows(folder / "events.jsonl").rows)
        else:
            seconds = {int(r["step"]): float(r["time/sample_s"]) for r in steps}
        lengths = {n: tuple(tuple(g) for g in found.values()) for n, found in groups.items()}
        return cls(setting, [r for r in steps if seconds.get(r["step"])], lengths, seconds)

    def decode_point(self) -> tuple[float, float]:
        """Mean sequences of a server, and its tokens per second."""
        s, ticks, tokens, seconds = self.setting, 0.0, 0, 0.0
        for row in self.steps:
            lengths = self.groups[row["step"]]
            size = s.call or len(lengths)
            own = replace(s, waves=int(row.get("sampler/waves", s.waves)))
            for first in range(0, len(lengths), size):
                ticks += sample(lengths[first : first + size], UNIT, 0.0, own).seconds
            tokens += sum(map(sum, lengths))
            seconds += self.sampled_s[row["step"]]
        return tokens / ticks / s.servers, tokens / seconds / s.servers

    def learner_rate(self) -> float:
        spent: float = sum(r["time/backprop_s"] + r["time/logprob_s"] for r in self.steps)
        return float(sum(r["tokens/computed"] for r in self.steps)) / spent / self.setting.learners

    def prompt_tokens(self) -> int:
        """What was computed besides completions, by kept group."""
        names = ("completions/forwarded", "tokens/forwarded", "tokens/computed")
        kept, tokens, computed = (int(sum(r[name] for r in self.steps)) for name in names)
        return max(1, round((computed - (tokens - kept)) / (kept / self.setting.group)))

    def seconds(self) -> dict[str, float]:
        def median(*names: str) -> float:
            return float(statistics.median(sum(r[f"time/{n}_s"] for n in names) for r in self.steps))

        reduced = statistics.median(float(r.get("time/reduce_s", 0.0)) for r in self.steps)
        return {
            "optimizer_s": max(0.0, median("optimizer") - reduced),
            "reduce_s": of_two(reduced, self.setting.learners),
            "sync_s": median("sync"),
            "other_s": median("verify", "other"),
        }


def _setting_of(frozen: Mapping[str, Any]) -> Setting:
    a, s, opt = frozen["algorithm"], frozen["sampler"], frozen["learner"]
    apart, named = s["name"] == "vllm_servers", frozen.get("cluster", {}).get("server_urls") or ()
    one_update = a.get("passes", 1) == 1 and a.get("mini_batch") is None
    return Setting(
        servers=(len(named) or s["servers"]) if apart else 1,
        learners=opt.get("ranks") or 1,
        prompts=a["prompts_per_step"],
        group=a["group_size"],
        waves=(s["waves"] or 1) if apart else 1,
        tokens=s["max_new_tokens"],
        streaming=bool(apart and s["streaming"] and not s.get("colocated") and one_update),
        call=s["prompts_per_call"] if s["schedule"] == "per_microbatch" else None,
        max_sequences=s["max_sequences"],
        micro_batch_tokens=opt["micro_batch_tokens"],
    )


def _sampled_seconds(events: Sequence[Row]) -> dict[int, float]:
    """Seconds in which anything was being sampled, by step."""
    spans: dict[int, list[tuple[float, float]]] = {}
    for row in events:
        if row.get("kind") == "sample":
            spans.setdefault(int(row["step"]), []).append((float(row["start"]), float(row["end"])))
    return {step: union_s(found) for step, found in spans.items()}
