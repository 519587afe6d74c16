"""What the learner will do on a GPU, counted without one: its real code on the meta device, in the shapes of
Qwen2.5 0.5B to 3B and Llama 3.1 8B.

    python -m benchmarks.gpu_static [--models 0.5b,3b] [--json file]

For a micro-batch of 16,384 tokens with checkpointing, KL and moments beside it: peak bytes by part, host
synchronisations, operations that mix devices, bytes of attention masks, and kernels started.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from dash_exp.learning.learner import Learner
from dash_exp.learning.packing import MicroBatch, Packer, largest_micro_batch
from dash_exp.learning.settings import Forward, Objective, Optimization
from dash_exp.modeling.attention import ATTENTION

GIB = 2**30
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "0.5b": {"hidden": 896, "inner": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "tied": True},
    "1.5b": {"hidden": 1536, "inner": 8960, "layers": 28, "heads": 12, "kv_heads": 2, "tied": True},
    "3b": {"hidden": 2048, "inner": 11008, "layers": 36, "heads": 16, "kv_heads": 2, "tied": True},
    "8b": {"hidden": 4096, "inner": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "tied": False},
}
VOCABULARY = {"8b": 128_256}
QWEN_VOCABULARY = 151_936
SYNCS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2")


class Watch(TorchDispatchMode):
    """Counts what happens to tensors of the meta device while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.kernels = self.mixes = 0
        self.syncs: Counter[str] = Counter()
        self._seen: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if tensor.device.type != "meta" or key in self._seen:
            return

        def freed(_: Any) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = any(x.device.type == "meta" for x in given)
        name = str(func).rpartition(".")[0]
        if here and name in SYNCS:
            self.syncs[name] += 1
            if name == "aten._local_scalar_dense":
                return 1.0
        if here and name == "aten._to_copy" and str(kwargs.get("device")) == "cpu":
            self.syncs["copy to the host"] += 1
        if here and any(x.device.type == "cpu" and x.ndim > 0 for x in given) and name != "aten.copy_":
            self.mixes += 1
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.device.type == "meta"]
        if here and made and not func.is_view:
            self.kernels += 1
        for tensor in made:
            self.hold(tensor)
        return result


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one micro-batch: forward of policy and reference, backward. Bytes as GiB."""

    model: str
    tokens: int
    parameters: int
    state_gib: float
    reference_gib: float
    activations_gib: float
    peak_gib: float
    mask_bytes: int
    syncs: Mapping[str, int]
    mixes: int
    kernels: int


def model_of(name: str, device: str | torch.device = "meta") -> Any:
    """A model of this shape, as `load_model` would make it; without weights on the meta device."""
    shape, size = SHAPES[name], VOCABULARY.get(name, QWEN_VOCABULARY)
    config = AutoConfig.for_model(
        "llama" if name == "8b" else "qwen2",
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=size,
        tie_word_embeddings=shape["tied"],
        max_position_embeddings=32_768,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=torch.float32)


def learner_of(model: Any, beta: float, temperature: float = 0.9) -> Learner:
    """A learner of the paper's recipe: DASH with this beta, checkpointing, logits in chunks of 1,024."""
    goal = Objective("policy_gradient", 0.2, 0.2, beta, "constant", "k3", temperature)
    moves = Optimization(
        lr=3e-6,
        schedule="linear",
        warmup_share=0.0,
        total_updates=562,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        max_grad_norm=1.0,
        precision="bf16_mixed",
        freeze_embeddings=False,
    )
    return Learner(model, goal, moves, Forward(model.config.vocab_size, 1024, True))


def batch_of(tokens: int, prompt: int = 256, completion: int = 1792) -> MicroBatch:
    """A full micro-batch of groups of four."""
    return largest_micro_batch(prompt, completion, 4, Packer(tokens, "constant", keep_for_kl=False))


def mask_bytes(context: Any) -> int:
    """Bytes of the attention masks of a layout."""
    blocks = getattr(context, "blocks", ())
    masks = [getattr(context, "bias", None), *(block.mask for block in blocks)]
    return sum(m.nbytes for m in masks if m is not None)


def count(name: str, tokens: int = 16_384) -> Counts:
    watch = Watch()
    with watch:
        model = model_of(name)
        for parameter in model.parameters():
            watch.hold(parameter)
        learner = learner_of(model, beta=0.04)
        moments = [torch.empty_like(m) for m in learner.masters.values() for _ in range(2)]
        gc.collect()
        state = watch.live
        held = sum(p.nbytes for p in learner.reference.parameters()) if learner.reference else 0
        batch = batch_of(tokens)
        learner.accumulate(batch, learner.reference_logprobs(batch))  # allocates what stays, such as sums
        gc.collect()
        watch.peak, watch.kernels, watch.mixes = watch.live, 0, 0
        watch.syncs.clear()
        learner._laid_out = None
        learner.accumulate(batch, learner.reference_logprobs(batch))
        assert learner._laid_out is not None
        context = learner._laid_out[1].context
        del moments
    return Counts(
        model=name,
        tokens=batch.tokens,
        parameters=sum(m.numel() for m in learner.masters.values()),
        state_gib=round((state - held) / GIB, 2),
        reference_gib=round(held / GIB, 2),
        activations_gib=round((watch.peak - state) / GIB, 2),
        peak_gib=round(watch.peak / GIB, 2),
        mask_bytes=mask_bytes(context),
        syncs=dict(watch.syncs),
        mixes=watch.mixes,
        kernels=watch.kernels,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static")
    parser.add_argument("--models", default=",".join(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--json", type=Path, help="also write the counts there")
    options = parser.parse_args(arguments)
    found = [count(name) for name in options.models.split(",")]
    print("model  tokens  state  reference  activations   peak GiB  mask bytes  syncs  mixes  kernels")
    for one in found:
        print(
            f"{one.model:5} {one.tokens:7,} {one.state_gib:6.1f} {one.reference_gib:10.1f} "
            f"{one.activations_gib:12.1f} {one.peak_gib:10.1f} {one.mask_bytes:11,} "
            f"{sum(one.syncs.values()):6} {one.mixes:6} {one.kernels:8,}"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
