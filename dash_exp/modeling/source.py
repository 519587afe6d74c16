"""Where weights come from. Every source becomes a Hugging Face folder, which is all that other code sees."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import string
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from dash_exp.config.model_files import end_ids, end_outside, model_faults, read_object
from dash_exp.config.schema import ModelConfig
from dash_exp.errors import Fault, UserError, as_disk_errors
from dash_exp.record.identity import file_hash, package_path


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A folder that transformers and vLLM load, and where it came from."""

    folder: Path
    origin: str


def locate(model: ModelConfig, cache: Path) -> ModelSource:
    """Find or make the folder: `path`, else `package` (a GGUF file, converted once), else `hub`
    (downloaded once), else `random` (made once). Raises UserError when it cannot be had or used."""
    source = _locate(model, cache)
    if faults := model_faults(source.folder):
        raise UserError([replace(f, where="model.path" if model.path else "model") for f in faults])
    return source


def _locate(model: ModelConfig, cache: Path) -> ModelSource:
    name = model.name
    if model.path:
        return ModelSource(Path(model.path).expanduser().resolve(), f"path:{model.path}")
    if model.package and model.package_file:
        gguf = package_path(model.package) / model.package_file
        digest = file_hash(gguf, cache)[:8]
        folder = _make_once(cache / "models" / f"{name}-{digest}", lambda to: convert_gguf(gguf, to))
        return ModelSource(folder, f"package:{model.package}/{model.package_file}")
    if hub := model.hub:
        return ModelSource(_download(hub, model.revision), f"hub:{hub}@{model.revision or 'main'}")
    if random := model.random:
        text = json.dumps(dict(random), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        folder = _make_once(cache / "models" / f"{name}-{digest}", lambda to: make_random(random, to))
        return ModelSource(folder, f"random:{text}")
    raise UserError(
        Fault("model", f"{name!r} names no source", "set model.path=<folder of a Hugging Face model>")
    )


def _make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Build a folder beside its place and rename it, under a lock: nobody sees an incomplete one."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            for leftover in folder.parent.glob(f".making-{folder.name}-*"):
                shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed
            fresh = Path(tempfile.mkdtemp(prefix=f".making-{folder.name}-", dir=folder.parent))
            try:
                with as_disk_errors(folder):
                    make(fresh)
                os.rename(fresh, folder)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into an fp32 Hugging Face folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with quiet:  # its progress bar is of use on a terminal only
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _download(hub: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        what = f"{hub!r} could not be downloaded: {first_line(error)}"
        hint = "offline? set model.path=<folder with its config.json, safetensors and tokenizer>"
        raise UserError(Fault("model.hub", what, hint)) from error


TABLES = ("inv_freq", "attn.bias", "attention.bias", "masked_bias")
"""Ends of names of tables that old checkpoints hold, and that the model makes itself."""
CHARACTERS = "\n" + "".join(c for c in string.printable if c.isprintable())


def make_random(sizes: Mapping[str, int], folder: Path) -> None:
    """A randomly initialised Llama whose tokens are single characters (about 100 of them)."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.get("seed", 0))
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary) + (-len(vocabulary)) % 64,
                hidden_size=sizes["hidden_size"],
                intermediate_size=sizes["intermediate_size"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                num_key_value_heads=sizes["kv_heads"],
                max_position_embeddings=sizes.get("positions", 2048),
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=0,
            )
        )
        model.save_pretrained(folder)


def load_model(folder: Path, dtype: Any, attention: str) -> Any:
    """The causal language model of a folder, with our attention.

    Raises UserError for a folder that is broken, that lacks a tensor or has others, or whose samples cannot
    be packed.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from dash_exp.modeling.attention import ATTENTION, packing_fault

    logging.disable_progress_bar()  # a local folder loads in a moment; downloads keep their bar
    model, facts = _load(
        folder,
        lambda: AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        ),
    )
    if faults := list(_tensor_faults(folder, model, facts)):
        raise UserError(faults)
    if attention == ATTENTION and (what := _load(folder, lambda: packing_fault(model))):
        raise UserError(Fault("model", f"{folder}: {what}", "choose a model like Llama, Qwen2 or Qwen3"))
    return model


def _tensor_faults(folder: Path, model: Any, facts: Mapping[str, Any]) -> Iterator[Fault]:
    """What is wrong with the tensors of a checkpoint. `facts`: transformers' own of how it loaded."""
    if missing := sorted(facts["missing_keys"]):
        yield Fault("model", f"{folder} lacks {len(missing)} tensors, e.g. {missing[0]}", "is it complete?")
    if unused := sorted(name for name in facts["unexpected_keys"] if not name.endswith(TABLES)):
        what = f"{folder} has {len(unused)} tensors that the model does not use, e.g. {unused[0]}"
        yield Fault("model", what, "is its config.json that of another model?")
    broken = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    if broken:
        yield Fault("model", f"{folder} has NaN or infinity in {len(broken)} tensors, e.g. {broken[0]}")


def _is_finite(tensor: Any) -> bool:
    return all(math.isfinite(float(end)) for end in tensor.detach().aminmax())


def load_computing(folder: Path, precision: str, attention: str) -> Any:
    """The model as a learner of this precision computes with it, frozen: rounded from fp32, the parameters
    alone (position tables stay exact)."""
    import torch

    model = load_model(folder, torch.float32, attention).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(computing_type(precision))
    return model


def computing_type(precision: str) -> Any:
    """The torch type in which a learner of this precision (`learner.precision`) computes."""
    import torch

    return {"fp32": torch.float32, "fp16_mixed": torch.float16}.get(precision, torch.bfloat16)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. Raises UserError for a broken one or one without an end token."""
    from transformers import AutoTokenizer

    tokenizer = _load(
        folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    )
    if tokenizer.eos_token_id is None:
        raise UserError(
            Fault("model", f"the tokenizer in {folder} has no end token", "set eos_token in its config")
        )
    return tokenizer


def position_limit(folder: Path) -> int:
    """Tokens that the model of a folder can take, prompt and completion together."""
    from transformers import AutoConfig

    config = _load(folder, lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False))
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        raise UserError(Fault("model", f"{folder}/config.json names no max_position_embeddings"))
    return int(limit)


@dataclass(frozen=True, slots=True)
class TextModel:
    """What prompts and completions depend on. `positions`: tokens that the model takes; `end_ids`: each of
    them ends a completion, the tokenizer's own first."""

    tokenizer: Any
    positions: int
    end_ids: tuple[int, ...]


def text_model(folder: Path) -> TextModel:
    """Read a folder's tokenizer and limits. Raises UserError for a broken one, or an unknown end token."""
    tokenizer = load_tokenizer(folder)
    ends = (tokenizer.eos_token_id, *end_ids(folder))
    if outside := [one for one in ends if one >= len(tokenizer)]:
        raise UserError(end_outside(folder, outside[0], len(tokenizer)))
    size = read_object(folder / "config.json").get("vocab_size")
    if isinstance(size, int) and len(tokenizer) > size:
        what = f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the model only {size}"
        raise UserError(Fault("model", what, "is it the tokenizer of another model?"))
    return TextModel(tokenizer, position_limit(folder), tuple(dict.fromkeys(ends)))


Loaded = TypeVar("Loaded")
LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    TypeError,
    AttributeError,
    ImportError,
    ArithmeticError,
    AssertionError,
)
"""What transformers raises for folders that it cannot use: it validates little itself."""


def _load(folder: Path, load: Callable[[], Loaded]) -> Loaded:
    """The result of `load`; UserError for the ways in which a folder can be broken."""
    from safetensors import SafetensorError

    try:
        return load()
    except (*LOAD_ERRORS, SafetensorError) as error:
        raise UserError(Fault("model", f"{folder} does not load: {first_line(error)}")) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
