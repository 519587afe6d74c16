"""What a run needs of the hub: whether it is there, before anything waits for a connection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from dash_exp.config.overrides import first_line
from dash_exp.config.schema import Config, dataset_places
from dash_exp.errors import Fault, UserError

TIMEOUT_S = 5
HINTS = {
    "model": "set model.path=<folder with its config.json, safetensors and tokenizer>",
    "dataset": "set {place}.path=<file>.jsonl, or DASH_DATA to a folder with the known files",
}


def refuse_unreachable(config: Config) -> None:
    """Raises UserError that names every model and dataset which is neither here nor can be fetched."""
    absent = [needed for needed in _needed(config) if not _is_cached(config, *needed[1:])]
    if absent and (reason := _why_unreachable()):
        what = f"is not on this machine, and the hub cannot be reached ({reason})"
        hints = {place: HINTS[kind].format(place=place.removesuffix(".hub")) for place, kind, _ in absent}
        raise UserError([Fault(place, f"{name!r} {what}", hints[place]) for place, _, name in absent])


def _needed(config: Config) -> Iterator[tuple[str, str, str]]:
    """The key, the kind and the name of everything that comes from the hub."""
    model = config.model
    if model.hub and not model.path and not model.package:
        yield "model.hub", "model", model.hub
    for place, data in dataset_places(config).items():
        if data.kind == "jsonl" and data.hub and not data.path and not Path(data.hub).is_dir():
            yield f"{place}.hub", "dataset", data.hub


def _is_cached(config: Config, kind: str, name: str) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    if kind == "model":
        return isinstance(try_to_load_from_cache(name, "config.json", revision=config.model.revision), str)
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
