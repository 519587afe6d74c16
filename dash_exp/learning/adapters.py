"""Low-rank adapters (LoRA, Hu et al. 2021, section 4.1) inside a model, by peft.

y = W x + (alpha / rank) B A x, with W frozen, A random and B zero at the start. The model's folder
format stays that of the base model: what is saved or sent to a sampler is W + (alpha / rank) B A.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dash_exp.errors import Fault, UserError

BASE = ".base_layer."


@dataclass(frozen=True, slots=True)
class Adapters:
    """Settings of the adapters; `seed` draws A. Empty `targets`: every linear layer but the output."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int


def add_adapters(model: Any, setting: Adapters) -> None:
    """Put adapters into the model, in place; nothing else stays trainable. Raises UserError where a
    target names no layer."""
    from peft import LoraConfig, inject_adapter_in_model

    refuse_layers(model, setting.targets)

    config = LoraConfig(
        r=setting.rank,
        lora_alpha=setting.alpha,  # type: ignore[arg-type]
        target_modules=list(setting.targets) or "all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",  # so that "all-linear" leaves the output layer out
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed % 2**63)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise UserError(
                Fault(
                    "learner.lora.targets",
                    str(error).splitlines()[0],
                    "name linear layers such as q_proj, v_proj, or leave it empty for all",
                )
            ) from error


def refuse_layers(model: Any, targets: Sequence[str]) -> None:
    """Raises UserError for adapters where the log-probabilities would not see them, or no weight could
    be merged: on the output layer and on embeddings."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        named = any(name == target or name.endswith(f".{target}") for target in targets)
        if named and (module is head or not isinstance(module, torch.nn.Linear)):
            raise UserError(
                Fault(
                    "learner.lora.targets",
                    f"{name} can have no adapter",
                    "name linear layers inside the model, such as q_proj, or leave it empty for all",
                )
            )


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every adapted layer by its name in the base model."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """The base model, for as long as this lasts: the KL term's reference needs no copy of it."""
    for _, layer in layers(model):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in layers(model):
            layer.enable_adapters(True)


def plain_weights(model: Any, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights of an equal model without adapters, by the base model's names; merged in fp32, then in
    `dtype` (None: each in its own)."""
    updates = {f"{name}.weight": layer for name, layer in layers(model)}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.replace(BASE, ".")
        value = parameter.detach()
        if plain in updates:
            value = merged(updates[plain], value).to(value.dtype if dtype is None else dtype)
        yield plain, value if dtype is None else value.to(dtype)


def merged(layer: Any, weight: Tensor) -> Tensor:
    """W + (alpha / rank) B A in fp32."""
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight.detach().float(), layer.lora_B[name].weight.detach().float()
    return weight.float() + layer.scaling[name] * (up @ down)
