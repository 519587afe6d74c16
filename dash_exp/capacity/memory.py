"""Does a cell fit on its GPUs? Bytes of the learner and of vLLM, from the model's sizes and the settings. The
learner's parts are those that `python -m benchmarks.gpu_static` counts (tests compare both)."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dash_exp.errors import Fault

GIB = 2**30
RESERVED = 2 * GIB
"""Of a card: CUDA's context, the libraries' workspaces, and what the allocator cannot use."""
ENGINE_EXTRA = int(1.5 * GIB)
"""Of a vLLM engine beside weights and cache: activations of a prefill, CUDA graphs."""
USABLE = 0.985
"""Of what a card's name says, in GiB: an 80 GB card reports 78.8 to 79.6."""
LEAST_SEQUENCES = 16
"""Completions of full length that the cache must hold; with fewer sampling is too slow to be useful."""
STATE_BYTES = {"bf16_mixed": (2, 16), "fp16_mixed": (2, 16), "fp32": (4, 12), "bf16": (2, 8)}
"""Of a weight, by precision: what computes; and, of a trained one, its master, gradient sum and moments."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder: width of the residual stream and of the MLP, heads, and whether the output matrix
    is the embedding."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def embeddings(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.embeddings + self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of a token, in half precision."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes on a card. `state`: weights, masters, gradient sums, moments; `reference`: of the KL term;
    `activations`: of the largest micro-batch; `engine`: vLLM's weights and what it needs beside its cache.
    `sequence`: of the cache, for a completion of full length; `sequences`: completions asked for at once."""

    state: int
    reference: int
    activations: int
    engine: int
    sequence: int
    sequences: int
    sleeps: bool = False

    @property
    def learner(self) -> int:
        return self.state + self.reference + self.activations

    def cache(self, card: int) -> int:
        """What is left of a card for vLLM's cache, at most what is asked for. An engine that sleeps while the
        learner works does not meet its activations."""
        beside = self.state + self.reference + (0 if self.sleeps else self.activations)
        room = card - RESERVED - beside - self.engine
        return max(0, min(self.sequence * self.sequences, room))

    def fits(self, card: int) -> bool:
        if self.learner + RESERVED > card:
            return False
        return self.cache(card) >= self.sequence * min(LEAST_SEQUENCES, self.sequences)


def shape_of(model: Mapping[str, Any]) -> Shape | None:
    """Of a config's `model`: from its folder's config.json, else the sizes that its preset states; None where
    neither is known."""
    found = dict(model.get("shape") or {})
    if model.get("path"):
        try:
            found = _from_json(json.loads((Path(model["path"]) / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):  # `model_faults` reports it
            return None
    if not found:
        return None
    head_dim = found.get("head_dim") or found["hidden"] // found["heads"]
    return Shape(**{**found, "head_dim": head_dim, "tied": bool(found["tied"])})


def _from_json(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "inner": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim"),
        "vocabulary": config["vocab_size"],
        "tied": config.get("tie_word_embeddings", False),
    }


def activation_bytes(shape: Shape, tokens: int, chunk: int, checkpointing: bool, trained_output: bool) -> int:
    """Of a micro-batch, at the peak: what the layers keep for the backward pass (only their inputs with
    checkpointing), with the logits of a chunk and the gradient of the output matrix."""
    layers = 2 if checkpointing else 22  # bytes of a token and layer: x hidden
    inner = 0 if checkpointing else 8  # x inner; both counted by gpu_static
    kept = tokens * shape.layers * (layers * shape.hidden + inner * shape.inner)
    logits = chunk * shape.vocabulary * (3 * 4 + 2)
    output = shape.vocabulary * shape.hidden * (4 + 2) if trained_output else 0
    return kept + logits + output + 4 * 2 * tokens * shape.hidden


def demand(config: Mapping[str, Any]) -> Demand | None:
    """What a cell needs on the card of its first learner; None where the model's sizes are not known.
    `config`: as plain values."""
    shape = shape_of(config["model"])
    if shape is None:
        return None
    learner, sampler, arm = config["learner"], config["sampler"], config["algorithm"]
    computing, more = STATE_BYTES[learner["precision"]]
    count, adapters = shape.parameters, learner["lora"]["rank"] > 0
    trained = 0 if adapters else count - (shape.embeddings if learner["freeze_embeddings"] else 0)
    shared = learner["ranks"] if learner["sharding"] == "fsdp" else 1
    reference = 0 if adapters or arm["beta"] == 0 else computing * count
    engine_bytes = 4 if sampler["dtype"] == "float32" else 2
    here = sampler["name"] == "vllm" or (sampler["name"] == "vllm_servers" and sampler["colocated"])
    longest = config["dataset"]["max_prompt_tokens"] + sampler["max_new_tokens"]
    sampled = arm["source"] == "sampler"
    return Demand(
        state=(computing * count + more * trained) // shared,
        reference=reference // shared,
        activations=activation_bytes(
            shape,
            learner["micro_batch_tokens"],
            learner["logit_chunk"],
            learner["gradient_checkpointing"],
            trained > 0 and not learner["freeze_embeddings"],
        ),
        engine=engine_bytes * count + ENGINE_EXTRA if here else 0,
        sequence=shape.kv_bytes * longest * engine_bytes // 2 if sampled else 0,
        sequences=sampler["max_sequences"] if here or sampler["name"] == "hf" else 0,
        sleeps=sampler["name"] == "vllm_servers" and sampler["colocated"],
    )


def card_bytes(gigabytes: float, cells: int = 1) -> int:
    """What one of `cells` cells may use of a card of so many GB."""
    return int(gigabytes * GIB * USABLE / cells)


WAYS = (
    "learner.gradient_checkpointing=true",
    "learner.micro_batch_tokens=4096",
    "learner.gradient_checkpointing=true learner.micro_batch_tokens=4096",
    "sampler=vllm_servers sampler.colocated=true",
    "sampler=vllm_servers",
    "learner.precision=bf16",
    "learner.precision=bf16 sampler=vllm_servers",
    "sampler=vllm_servers learner.ranks=2 learner.sharding=fsdp",
    "sampler=vllm_servers learner.ranks=4 learner.sharding=fsdp",
    "sampler=vllm_servers learner.ranks=8 learner.sharding=fsdp",
    "learner.lora.rank=16",
)
"""What makes a cell smaller on its first card. `sampler=vllm_servers` takes a card more for the server."""


def ways_to_fit(config: Mapping[str, Any], card: int) -> list[str]:
    """Those of WAYS with which the cell fits."""
    found = ((way, demand(_with(config, way))) for way in WAYS)
    return [way for way, needed in found if needed is not None and needed.fits(card)]


def _with(config: Mapping[str, Any], overrides: str) -> dict[str, Any]:
    """The config, as plain values, with these overrides."""
    made: dict[str, Any] = copy.deepcopy(dict(config))
    for text in overrides.split():
        key, _, value = text.partition("=")
        *path, last = key.split(".") if "." in key else (key, "name")
        place = made
        for name in path:
            place = place[name]
        place[last] = yaml.safe_load(value)
    return made


def engine_share(needed: Demand, free: int, total: int) -> tuple[int, float]:
    """What vLLM gets of a card on which `free` bytes are left beside the learner's weights: bytes of its
    cache, and its share of `total`. The learner's moments and activations come later, and are kept free."""
    later = needed.activations + needed.state // 2
    room = max(0, free - later - needed.engine - RESERVED // 2)
    cache = min(needed.sequence * needed.sequences, room)
    return cache, math.floor(1000 * (cache + needed.engine) / total) / 1000


def memory_faults(config: Mapping[str, Any], card: int) -> list[Fault]:
    """That a cell does not fit on its GPUs, with what would make it fit; nothing where its sizes are
    unknown."""
    needed = demand(config)
    if needed is None or needed.fits(card):
        return []
    ways = ways_to_fit(config, card)
    what = f"a GPU has {card / GIB:.1f} GiB for the cell, which is too little: {described(needed, card)}"
    hint = f"fits with {', or '.join(ways[:3])}" if ways else "choose a smaller model, or larger GPUs"
    hint += "; cluster.gpu_gb states the memory of a GPU, should this be wrong"
    return [Fault("cluster.gpu_gb", what, hint)]


def described(needed: Demand, card: int) -> str:
    """In words, with GiB."""
    learner = f"learner {needed.learner / GIB:.1f} GiB"
    cache = needed.cache(card)
    if not needed.sequences or not needed.sequence:
        return learner
    at_once = cache // needed.sequence
    engine = f" + vLLM {(needed.engine + cache) / GIB:.1f}" if needed.engine else ""
    asleep = ", asleep while it learns" if needed.sleeps else ""
    full = f"{at_once} of {needed.sequences} completions of full length at once"
    return f"{learner}{engine} of {card / GIB:.1f}{asleep}; cache for {full}"
