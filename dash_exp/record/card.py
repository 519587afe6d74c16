"""The model card of a trained model: what it was made from, how, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dash_exp.record.folder import Row, read_final, read_json
from dash_exp.record.reading import read_config
from dash_exp.text import format_accuracy

HOME = "https://github.com/dash-exp/dash-exp"
RECIPE = (
    "algorithm.name",
    "filter.name",
    "algorithm.steps",
    "algorithm.prompts_per_step",
    "algorithm.group_size",
    "algorithm.beta",
    "learner.lr",
    "sampler.max_new_tokens",
    "seed",
)
"""What a reader looks for first; the whole config is beside the card."""


def card_of(folder: Path) -> str:
    """The card of a finished cell, from its record."""
    config, provenance = read_config(folder).value, read_json(folder / "provenance.json")
    return card(config, provenance, read_final(folder, "evals"), folder.name)


def card(config: Mapping[str, Any], provenance: Mapping[str, Any], evals: Sequence[Row], name: str) -> str:
    """The card as Markdown with the hub's header. Accuracies carry their 95 % interval over prompts."""
    model, data = config["model"], config["dataset"]
    trained = (
        "supervised fine-tuning" if config["algorithm"]["source"] != "sampler" else "reinforcement learning"
    )
    header = {"library_name": "transformers", "tags": ["dash_exp", config["algorithm"]["name"]]}
    if model.get("hub"):
        header["base_model"] = model["hub"]
    rows = [f"| `{key}` | {_value(config, key)} |" for key in RECIPE]
    origin = provenance.get("model", {}).get("origin", model["name"])
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
            "---",
            "",
            f"# {name}",
            "",
            f"`{origin}` after {trained} on `{data['name']}` with [dash_exp]({HOME}).",
            "",
            "## Results",
            "",
            *_results(evals),
            "",
            "## Recipe",
            "",
            "| setting | value |",
            "|---|---|",
            *rows,
            "",
            f"All settings: `config.yaml`. Code: commit `{provenance.get('commit') or 'unknown'}`. "
            f"Training prompts: SHA-256 `{provenance.get('datasets', {}).get('training', 'unknown')}`.",
            "",
        ]
    )


def _results(evals: Sequence[Row]) -> list[str]:
    rows = [row for row in evals if row["metric"] == "accuracy"]
    if not rows:
        return ["It was not evaluated."]
    lines = ["| set | prompts | before | after |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["dataset"] for row in rows):
        mine = [row for row in rows if row["dataset"] == name]
        before = format_accuracy(mine[0]) if mine[0]["step"] == 0 else "-"
        after = format_accuracy(mine[-1]) if mine[-1]["step"] > 0 else "-"
        lines.append(f"| {name} | {mine[0]['n']} | {before} | {after} |")
    return [*lines, "", "Accuracy with its 95 % interval over prompts, of one run."]


def _value(config: Mapping[str, Any], key: str) -> object:
    group, _, last = key.rpartition(".")
    return config[group][last] if group else config[last]
