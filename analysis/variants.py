"""Which cells are runs of one recipe, and what to call it. Nothing is ever averaged across settings that
differ: two cells are of one variant when their frozen configs are equal but for the seed, and the model and
the data they were made from have the same content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dash_exp.record.identity import LATER

from .load import Problem, Records

ARMS = {
    "base": "Base",
    "sft_h": "SFT-H",
    "sft_m": "SFT-M",
    "grpo": "GRPO",
    "no_gf": "No-GF",
    "dash": "DASH",
    "no_kl": "No-KL",
    "ppo_multi": "Multi",
    "ppo_mini": "Mini",
    "pg": "PG",
    "rloo": "RLOO",
    "dr_grpo": "Dr. GRPO",
    "reinforce_pp": "REINFORCE++",
    "maxrl": "MaxRL",
    "pass_at_k": "pass@k",
    "gpg": "GPG",
    "gspo": "GSPO",
    "cispo": "CISPO",
    "dapo": "DAPO",
}
"""The paper's names, in the order of its tables, then those of other arms; a user's own keep theirs."""

OF_THE_ARM = ("config.algorithm.", "config.filter.name", "config.filter.threshold", "config.sampler.schedule")
"""Settings that an arm's name stands for, unless two variants of it differ in them."""
NO_RESULT = ("config.seed", "config.algorithm.filters")
"""Settings that make no other recipe: the seed, and which filters an arm allows."""
PLACES = ("path", "traces")
"""Last part of the keys of files: where they lie does not make another recipe, what they hold does."""
CONTENT = "content."
"""Prefix of the columns with hashes of a cell's model and data."""
TRACES = "config.dataset.traces"
PARTNER = "config.budget.match"
"""Another cell's id, one for each seed: all of them mean `as much as the partner had`, in UNIT."""
UNIT = "config.budget.unit"
SIZES = {
    "config.algorithm.prompts_per_step": "prompts",
    "config.algorithm.group_size": "G",
    "config.sampler.streaming": "streaming",
    "config.filter.threshold": "threshold",
    "config.filter.share": "share",
    "config.algorithm.beta": "beta",
    "config.algorithm.steps": "steps",
    "config.learner.lr": "lr",
    "config.budget.match": "budget",
    "config.filter.name": "filter",
}
"""Short words for what variants often differ in."""


@dataclass(frozen=True, slots=True)
class Variant:
    """Runs of one recipe: `cells` by seed, of one model on one dataset. `label` names it among the others.
    `varied`: short names and values of what distinguishes it from the other variants of its arm, of which it
    is the `place`-th of `places`, in the order of these values."""

    key: str
    arm: str
    model: str
    data: str
    label: str
    cells: tuple[str, ...]
    seeds: tuple[int, ...]
    varied: tuple[tuple[str, str], ...] = ()
    place: int = 0
    places: int = 1


def variants(records: Records) -> list[Variant]:
    """All variants, in the order of the paper's arms, then of labels."""
    settings = _settings(records.cells)
    keys = settings.apply(_digest, axis=1)
    order = {arm: place for place, arm in enumerate(ARMS)}
    found = []
    groups = ["arm", "model", "data"]
    for (arm, model, data), same in records.cells.groupby(groups, sort=False):
        own = keys.loc[same.index]
        same = same.assign(done=same["state"] == "finished")
        varied = _varied(settings.loc[same.index], own)
        name = ARMS.get(str(arm), str(arm))
        for place, key in enumerate(sorted(varied, key=lambda key: _natural(varied[key]))):
            cells = same.loc[own.index[own == key]].sort_values(["seed", "done", "started"])
            cells = cells.drop_duplicates("seed", keep="last")  # `repeated` tells of them
            found.append(
                Variant(
                    key,
                    str(arm),
                    str(model),
                    str(data),
                    _label(name, varied[key]),
                    tuple(cells.index),
                    tuple(int(s) for s in cells["seed"]),
                    varied[key],
                    place,
                    len(varied),
                )
            )
    return sorted(found, key=lambda v: (v.data, v.model, order.get(v.arm, len(order)), v.arm, v.place))


def differences(records: Records, found: Sequence[Variant]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Labels of recipes, and every setting that is not the same in all of them with its values."""
    settings = _settings(records.cells)
    several = len({(v.model, v.data) for v in found}) > 1
    labels = [f"{v.label}, {v.model}, {v.data}" if several else v.label for v in found]
    table = settings.loc[[v.cells[0] for v in found]].map(lambda value: str(value).strip())
    differing = [name for name in table if table[name].nunique() > 1]
    return labels, [(str(name).removeprefix("config."), list(table[name])) for name in differing]


def repeated(records: Records, found: Sequence[Variant]) -> list[Problem]:
    """Cells left out because another has the same recipe and seed (other code, or an older record)."""
    used = {cell for variant in found for cell in variant.cells}
    return [
        Problem(cell, "left out: another cell has the same recipe and seed, finished or later")
        for cell in records.cells.index
        if cell not in used
    ]


def _settings(cells: pd.DataFrame) -> pd.DataFrame:
    """What distinguishes recipes: every setting but the seed, and in place of paths what they hold."""
    columns = [
        name
        for name in cells.columns
        if name.startswith("config.") and name not in NO_RESULT and name.rpartition(".")[2] not in PLACES
    ]
    made = {name: _content(cells, name) for name in cells.columns if name.startswith(CONTENT)}
    if TRACES in cells:
        made[TRACES] = cells[TRACES].map(lambda path: Path(str(path)).name)
    table = pd.concat([cells[columns].astype(object), pd.DataFrame(made, index=cells.index)], axis=1)
    if PARTNER in table:
        unit = table.pop(UNIT) if UNIT in table else pd.Series("seconds", table.index)
        matched = "equal " + unit.fillna("seconds").astype(str)
        table[PARTNER] = matched.where(table[PARTNER] != "null", "none")
    for key, before in LATER.items():
        if (column := f"config.{key}") in table:
            table[column] = table[column].fillna("null" if before is None else before)
    for column in table.columns[table.isna().any()]:
        known = table[column].dropna().map(str).unique()
        if len(known) == 1:  # older records lack the key: what all others have is what it meant
            table[column] = known[0]
    return table


def _content(cells: pd.DataFrame, name: str) -> pd.Series:
    """The content of a file, as `<file name> <hash>`. A cell that has not begun has none: it is taken to be
    what others with the same path and name had, if they agree."""
    path = cells.get(_path_of(name), pd.Series("null", cells.index)).fillna("null").map(str)
    owner = cells["config.model.name"] if name == f"{CONTENT}model" else cells["config.dataset.name"]
    known = (
        cells[name]
        .groupby([path, owner.map(str)])
        .transform(lambda own: own.fillna(own.dropna().iloc[0]) if own.nunique() == 1 else own)
    )
    shown = path.where(path == "null", path.map(lambda text: Path(text).name)).replace("null", "")
    return (shown + " " + known.str[:8]).where(known.notna(), None)


def _path_of(name: str) -> str:
    """The key whose file a content column describes."""
    label = name.removeprefix(CONTENT)
    places = {"model": "config.model.path", "training": "config.dataset.path"}
    return places.get(label, f"config.evaluation.sets.{label}.path")


def _digest(row: pd.Series) -> str:
    """Of settings and contents, whatever the files are called."""
    plain = {k: str(v).rpartition(" ")[2] if str(k).startswith(CONTENT) else str(v) for k, v in row.items()}
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


Varied = tuple[tuple[str, str], ...]


def _varied(settings: pd.DataFrame, keys: pd.Series) -> dict[str, Varied]:
    """For each variant of an arm the settings by which they are told apart, with their values."""
    first = {key: settings.loc[keys.index[keys == key][0]] for key in keys.unique()}
    if len(first) == 1:
        return dict.fromkeys(first, ())
    table = pd.DataFrame(first).T.map(str)
    differing = [column for column in table if table[column].nunique() > 1]
    shown = _enough(table, [c for c in SIZES if c in differing] + [c for c in differing if c not in SIZES])
    return {key: tuple((_short(c), _shown(table, key, c)) for c in shown) for key in first}


def _label(name: str, varied: Varied) -> str:
    return f"{name} ({', '.join(f'{key} {value}' for key, value in varied)})" if varied else name


def _natural(varied: Varied) -> list[tuple[int, float, str]]:
    """Numbers in their order, before words."""
    found = []
    for _, value in varied:
        try:
            found.append((0, float(value), ""))
        except ValueError:
            found.append((1, 0.0, value))
    return found


def _shown(table: pd.DataFrame, key: str, column: str) -> str:
    """The value of a setting; of a file its name, where that is enough to tell the variants apart."""
    value = str(table.loc[key, column])
    if column.startswith(CONTENT):
        names = table[column].map(lambda text: str(text).rpartition(" ")[0])
        distinct = names.nunique() == table[column].nunique() and (names != "").all()
        value = names[key] if distinct else value.strip()
    return value


def _enough(table: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """The first columns that tell all rows apart."""
    chosen: list[str] = []
    for column in columns:
        if len(table[[*chosen, column]].drop_duplicates()) > (
            len(table[chosen].drop_duplicates()) if chosen else 1
        ):
            chosen.append(column)
        if chosen and len(table[chosen].drop_duplicates()) == len(table):
            break
    return chosen


def _short(column: str) -> str:
    if column.startswith(CONTENT):
        label = column.removeprefix(CONTENT)
        return {"model": "model", "training": "data"}.get(label, f"evaluated on {label}")
    return SIZES.get(column, column.removeprefix("config."))
