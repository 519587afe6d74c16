"""What the small files of a model's folder say, and what is wrong with them: config.json,
generation_config.json, the index and the headers of its weights. No weights are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dash_exp import jsonl
from dash_exp.errors import Fault, UserError, nearest

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": 2**30,
}
"""Whole numbers of a config.json from 1 up to these."""
POSITIVE = ("rms_norm_eps", "layer_norm_eps", "rope_theta")
FULL_ATTENTION = ("full_attention", "attention")
LAYER_LISTS = ("layer_types", "layers_block_type", "block_types", "attention_types")
RECURRENT = ("conv_L_cache", "linear_num_key_heads", "mamba_d_state", "mamba_d_conv", "ssm_cfg", "state_size")
"""Settings of convolution, DeltaNet and Mamba layers."""
HOW_TO_LOAD = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
FLOATS = ("F64", "F32", "F16", "BF16")
WHERE = "model.path"
FULL_ONLY = "samples are packed for full attention in every layer; others would leak into each other"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; empty where there is none. Raises UserError for anything else."""
    try:
        value = jsonl.parse(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise UserError(Fault(WHERE, f"{path} is not UTF-8 text")) from error
    except OSError as error:
        raise UserError(Fault(WHERE, f"{path} cannot be read: {error.strerror}")) from error
    except ValueError as error:
        raise UserError(Fault(WHERE, f"{path} {error}")) from error
    if not isinstance(value, dict):
        raise UserError(Fault(WHERE, f"{path}: expected an object, got {type(value).__name__}"))
    return value


def model_faults(folder: Path) -> list[Fault]:
    """Every fault that can be seen without loading the model."""
    found: list[Fault] = []
    for check in (_config_faults, _end_faults, _weight_faults):
        try:
            found += check(folder)
        except UserError as error:
            found += error.faults
    return list(dict.fromkeys(found))


def _config_faults(folder: Path) -> Iterator[Fault]:
    config = read_object(folder / "config.json")
    if isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}
    if isinstance(config.get("rope_parameters"), dict):
        config = {**config["rope_parameters"], **config}
    if not isinstance(kind := config.get("model_type"), str):
        yield Fault(WHERE, f"config.json, model_type: expected a name, got {kind!r}", "e.g. llama or qwen2")
    wrong = [name for name, most in SIZES.items() if not _is_size(config.get(name, 1), most)]
    for name in wrong:
        what = (
            f"config.json, {name}: got {config[name]!r:.60}, must be a whole number from 1 to {SIZES[name]}"
        )
        yield Fault(WHERE, what)
    for name in POSITIVE:
        value = config.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            yield Fault(WHERE, f"config.json, {name}: got {value!r:.60}, must be a number above 0")
    if not wrong:
        yield from _head_faults(config)
    yield from _layer_faults(config)
    if config.get("quantization_config"):
        yield Fault(
            WHERE,
            "config.json, quantization_config: the weights are quantised",
            "choose a folder with bf16, fp16 or fp32 weights",
        )


def _is_size(value: object, most: int) -> bool:
    return value is None or (type(value) is int and 1 <= value <= most)


def _head_faults(config: Mapping[str, Any]) -> Iterator[Fault]:
    hidden, heads, shared, size = (
        config.get(name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if hidden and heads and not size and hidden % heads:
        yield Fault(
            WHERE,
            f"config.json, hidden_size: got {hidden}, must be a multiple of num_attention_heads={heads}",
        )
    if heads and shared and heads % shared:
        yield Fault(
            WHERE, f"config.json, num_key_value_heads: got {shared}, must divide num_attention_heads={heads}"
        )


def _layer_faults(config: Mapping[str, Any]) -> Iterator[Fault]:
    for name in LAYER_LISTS:
        listed = config.get(name)
        if isinstance(listed, list) and (other := [x for x in listed if x not in FULL_ATTENTION]):
            yield Fault(WHERE, f"config.json, {name}: the model has layers of {other[0]!r}", FULL_ONLY)
            return
    if found := [name for name in RECURRENT if config.get(name) is not None]:
        yield Fault(WHERE, f"config.json, {found[0]}: the model has layers without attention", FULL_ONLY)
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        yield Fault(WHERE, f"config.json, sliding_window: got {config['sliding_window']}", FULL_ONLY)


# --- end tokens ---


def end_ids(folder: Path) -> tuple[int, ...]:
    """Every end token that generation_config.json names; where it names none, those of config.json. Raises
    UserError where they are not token ids."""
    for name in ("generation_config.json", "config.json"):
        given = read_object(folder / name).get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(one) is int and one >= 0 for one in ids):
            what = f"{folder / name}, eos_token_id: got {given!r:.80}, must be token ids"
            raise UserError(Fault(WHERE, what, "e.g. 2 or [2, 7]"))
        if ids:
            return tuple(ids)
    return ()


def _end_faults(folder: Path) -> Iterator[Fault]:
    size, ids = read_object(folder / "config.json").get("vocab_size"), end_ids(folder)
    if type(size) is int and (outside := [one for one in ids if one >= size]):
        yield end_outside(folder, outside[0], size)


def end_outside(folder: Path, token: int, size: int) -> Fault:
    what = f"the end token {token} is none of the {size} tokens of the vocabulary"
    return Fault(WHERE, f"{folder / 'generation_config.json'}, eos_token_id: {what}")


# --- weights ---


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights, as transformers chooses them. Raises UserError for
    an index that names anything else than files of this folder."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        what = f"{folder} has neither {SINGLE} nor {INDEX}"
        others = [name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        pickled = f"{others[0]} is a pickle, which can run any program: convert it" if others else ""
        raise UserError(Fault(WHERE, what, pickled or nearest(SINGLE, os.listdir(folder))))
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise UserError(Fault(WHERE, f"{index}, weight_map: expected the file of each tensor"))
    names = sorted(set(named.values()))
    if odd := [name for name in names if not _is_own(folder, name)]:
        raise UserError([Fault(WHERE, f"{index} names {n!r}, which is no file of this folder") for n in odd])
    return [folder / name for name in names]


def _is_own(folder: Path, name: str) -> bool:
    return name.endswith(".safetensors") and name == os.path.basename(name) and (folder / name).is_file()


def config_hash(folder: Path) -> str:
    """Equal for folders whose weights mean the same model; what only says how to load it is left out."""
    config = {k: v for k, v in read_object(folder / "config.json").items() if k not in HOW_TO_LOAD}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a folder's weights."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="numpy") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def _weight_faults(folder: Path) -> Iterator[Fault]:
    """Integer weights, and files that are no safetensors."""
    from safetensors import SafetensorError, safe_open

    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            yield Fault(WHERE, f"{path} is damaged: {' '.join(str(error).split())}")
            continue
        odd = [name for name, kind in kinds.items() if kind not in FLOATS and name.endswith(".weight")]
        if odd:
            what = f"{path} has {len(odd)} integer weights, e.g. {odd[0]} ({kinds[odd[0]]})"
            yield Fault(WHERE, what, "choose a folder with bf16, fp16 or fp32 weights")
