"""What a run needs of the hub: whether it is there, before anything waits for a connection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from dash_exp.config.overrides import first_line
from dash_exp.config.schema import DatasetConfig, ModelConfig
from dash_exp.errors import Fault, UserError

TIMEOUT_S = 5
HINTS = {
    "model": "set model.path=<folder with its config.json, safetensors and tokenizer>",
    "dataset": "set {place}.path=<file>.jsonl, or DASH_DATA to a folder with the known files",
}


def refuse_unreachable(model: ModelConfig, data: Mapping[str, DatasetConfig]) -> None:
    """Raises UserError that names the model and every dataset which is neither here nor can be fetched.
    `data`: what will be read, by the key that holds it."""
    absent = [needed for needed in _needed(model, data) if not _is_cached(model, *needed[1:])]
    if absent and (reason := _why_unreachable()):
        what = f"is not on this machine, and the hub cannot be reached ({reason})"
        hints = {place: HINTS[kind].format(place=place.removesuffix(".hub")) for place, kind, _ in absent}
        raise UserError([Fault(place, f"{name!r} {what}", hints[place]) for place, _, name in absent])


def _needed(model: ModelConfig, data: Mapping[str, DatasetConfig]) -> Iterator[tuple[str, str, str]]:
    """The key, the kind and the name of everything that comes from the hub."""
    if model.hub and not model.path and not model.package:
        yield "model.hub", "model", model.hub
    for place, one in data.items():
        if one.kind == "jsonl" and one.hub and not one.path and not Path(one.hub).is_dir():
            yield f"{place}.hub", "dataset", one.hub


def _is_cached(model: ModelConfig, kind: str, name: str) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    if kind == "model":
        return isinstance(try_to_load_from_cache(name, "config.json", revision=model.revision), str)
    import datasets

    prepared = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    downloaded = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    return prepared.is_dir() or downloaded.is_dir()


def _why_unreachable() -> str:
    """Why the hub does not answer; empty if it does."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=TIMEOUT_S).close()
    except HTTPError:
        return ""  # an answer
    except URLError as error:
        return first_line(error.reason)
    except OSError as error:
        return first_line(error)
    return ""
