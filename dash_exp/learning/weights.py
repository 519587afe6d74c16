"""The tensors of a policy on this rank: what computes, what the optimizer moves, sums of gradients; and
low-rank adapters (LoRA, Hu et al. 2021, section 4.1), by peft.

With adapters y = W x + (alpha / rank) B A x, W frozen, A random and B zero at the start. What is saved or
sent to a sampler is W + (alpha / rank) B A, so the folder's format stays that of the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dash_exp.errors import Fault, UserError
from dash_exp.learning.logprobs import Scorer
from dash_exp.learning.settings import Adapters
from dash_exp.modeling.source import computing_type

BUCKET = 1 << 24
"""Numbers reduced at once: enough to use the wire, few beside the gradients themselves."""


class Weights:
    """The complete tensors (distributed/sharding.py has a part of each). In mixed precision every trainable
    tensor has an fp32 master and the model holds its rounded copy; with `fp32` and `bf16` the model's own are
    the masters. `gradients`: fp32 sums; those of tensors not in `has_gradient` are meaningless."""

    sharded = False

    def __init__(self, policy: Scorer, precision: str):
        self.model, self.mixed = policy.model, precision.endswith("_mixed")
        self.device: torch.device = next(self.model.parameters()).device
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            full = parameter.data.float()
            parameter.data = full.to(computing_type(precision))
            if parameter.requires_grad:
                self.masters[name] = full.clone() if self.mixed else parameter
        self._register_hooks()

    def _register_hooks(self) -> None:
        """Let each backward add its gradients to the fp32 sums at once, and free them."""
        self.gradients = {name: torch.zeros_like(m, dtype=torch.float32) for name, m in self.masters.items()}
        self.has_gradient: set[str] = set()

        def to_sum(name: str) -> Any:
            def add(parameter: Tensor) -> None:
                assert parameter.grad is not None
                gradient = self._local(parameter.grad)
                if name in self.has_gradient:
                    self.gradients[name] += gradient
                else:
                    self.gradients[name].copy_(gradient)
                    self.has_gradient.add(name)
                parameter.grad = None

            return add

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(to_sum(name))

    def _local(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the model that this rank holds."""
        return tensor

    def attach_reference(self, reference: Scorer) -> None:
        """Hold the model that the KL term refers to in the same way as the policy."""

    # --- an update ---

    def all_reduce_gradients(self, all_reduce: Callable[[Tensor], None]) -> None:
        """Sum the gradients over all ranks; `all_reduce` sums one tensor, in place. A tensor without
        a gradient on any rank stays as it is; one with a gradient on another rank only counts as 0 here."""
        names = list(self.masters)
        used = torch.tensor([name in self.has_gradient for name in names], dtype=torch.float32)
        used = used.to(self.device)
        all_reduce(used)
        wanted = [name for name, count in zip(names, used.tolist(), strict=True) if count > 0]
        for name in wanted:
            if name not in self.has_gradient:
                self.gradients[name].zero_()
        in_buckets([self.gradients[name] for name in wanted], all_reduce)
        self.has_gradient = set(wanted)

    def norm(self) -> float:
        """The norm of all gradient sums together; those without a gradient become 0."""
        for name, gradient in self.gradients.items():
            if name not in self.has_gradient:
                gradient.zero_()
        return float(torch.stack([torch.linalg.vector_norm(g) for g in self.gradients.values()]).norm())

    def copy_masters(self) -> None:
        """The masters have moved: compute with their new values."""
        if self.mixed:
            for name, parameter in self.model.named_parameters():
                if name in self.masters:
                    parameter.data.copy_(self.masters[name])

    # --- to and from checkpoints and samplers ---

    def names(self) -> list[str]:
        """The name of every tensor, trained or frozen (a tied one comes once)."""
        return [name for name, _ in self.model.named_parameters()]

    def shape(self, name: str) -> torch.Size:
        """The shape of the complete tensor."""
        return self.model.get_parameter(name).shape

    def exact(self, name: str) -> Tensor:
        """A tensor in the highest precision that this rank has."""
        return self.masters.get(name, self.model.get_parameter(name)).detach()

    def gather(self, name: str, local: Tensor) -> Tensor:
        """The complete tensor, of which this rank has the part `local`; shaped like `name`."""
        return local

    def part(self, name: str, full: Tensor) -> Tensor:
        """This rank's part of a complete tensor."""
        return full

    def load(self, name: str, full: Tensor) -> None:
        """Overwrite a tensor."""
        self.model.get_parameter(name).data.copy_(full)
        if name in self.masters:
            self.masters[name].copy_(full)

    def iter_weights(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The weights that the policy computes with, by name, adapters merged."""
        if any(".lora_" in name for name in self.masters):
            yield from merged_weights(self.model)
            return
        for name, parameter in self.model.named_parameters():
            if names is None or name in names:
                yield name, parameter.detach()


def in_buckets(tensors: Sequence[Tensor], apply: Callable[[Tensor], None], size: int = BUCKET) -> None:
    """Let `apply` change the tensors in place, several at a time, laid end to end in flat copies of up to
    `size` numbers (a larger tensor by itself, not copied)."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > size:
            _apply_flat(bucket, apply)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _apply_flat(bucket, apply)


def _apply_flat(tensors: Sequence[Tensor], apply: Callable[[Tensor], None]) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        apply(tensors[0].view(-1))
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    apply(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


# --- adapters ---


def add_adapters(model: Any, setting: Adapters) -> None:
    """Put adapters into the model, in place, and freeze everything else. Raises UserError where a target
    names no layer, or one that can have no adapter."""
    from peft import LoraConfig, inject_adapter_in_model

    _check_targets(model, setting.targets)
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
            hint = "name linear layers such as q_proj, v_proj, or leave it empty for all"
            fault = Fault("learner.lora.targets", str(error).splitlines()[0], hint)
            raise UserError(fault) from error


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """Raises UserError for adapters on the output layer, which the log-probabilities would not see, and on
    embeddings, which cannot be merged."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        named = any(name == target or name.endswith(f".{target}") for target in targets)
        if named and (module is head or not isinstance(module, torch.nn.Linear)):
            hint = "name linear layers inside the model, such as q_proj, or leave it empty for all"
            raise UserError(Fault("learner.lora.targets", f"{name} can have no adapter", hint))


def adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every adapted layer by its name in the base model."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@contextmanager
def adapters_disabled(model: Any) -> Iterator[None]:
    """Compute with the base model meanwhile: the KL term's reference needs no copy of it."""
    for _, layer in adapted_layers(model):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in adapted_layers(model):
            layer.enable_adapters(True)


def merged_weights(model: Any, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights of an equal model without adapters, by the base model's names; merged in fp32, then in
    `dtype` (None: each in its own)."""
    adapted = {f"{name}.weight": layer for name, layer in adapted_layers(model)}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        value = parameter.detach()
        if plain in adapted:
            value = _merge(adapted[plain], value).to(value.dtype if dtype is None else dtype)
        yield plain, value if dtype is None else value.to(dtype)


def _merge(layer: Any, weight: Tensor) -> Tensor:
    """W + (alpha / rank) B A in fp32."""
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight.detach().float(), layer.lora_B[name].weight.detach().float()
    return weight.float() + layer.scaling[name] * (up @ down)
