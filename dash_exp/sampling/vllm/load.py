"""Weights into vLLM's model: in place where that is known to be all there is to do, else by vLLM's own
reload, layer by layer.

On a CPU vLLM multiplies with packed copies of its matrices, and gives up the plain ones. Its reload makes
them all anew, which costs more than the copying. `InPlace` keeps them: weights are loaded into the same
memory each time, and packed from there. It wants as much memory again as the matrices take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.platforms import current_platform

from dash_exp.sampling.vllm.parts import repack_output
from dash_exp.signals import keep_freed_memory

Named = Iterable[tuple[str, Tensor]]


class Loader:
    """Loads whole sets of weights into one model."""

    def __init__(self, model: Any, model_config: Any):
        self.model, self.model_config = model, model_config
        self.in_place = InPlace(model) if current_platform.is_cpu() and is_plain(model) else None

    def load(self, named: Mapping[str, Tensor]) -> None:
        """Raises ValueError where a parameter gets no weights."""
        load = self.reload if self.in_place is None else self.in_place.load
        loaded = load(named.items())
        names = {name for name, _ in self.model.named_parameters()}
        if missing := sorted(names - loaded):
            raise ValueError(f"no weights came for {missing}")

    def reload(self, named: Named) -> set[str]:
        """As vLLM does it, whatever the model. Returns the names of the parameters that were loaded."""
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(named)
        finalize_layerwise_reload(self.model, self.model_config)
        repack_output(self.model)
        return set(loaded or ())


class InPlace:
    """The plain matrices of a model on CPU, kept beside the packed ones."""

    def __init__(self, model: Any):
        keep_freed_memory()  # the packed copies are made anew each time, in the memory of the last
        self.model = model
        self.kept = [(layer, _plain_weight(layer)) for layer in model.modules() if _is_linear(layer)]

    def load(self, named: Named) -> set[str]:
        """Returns the names of the parameters that were loaded."""
        packed = [layer.weight for layer, _ in self.kept]
        for layer, weight in self.kept:
            layer.weight = weight
        try:
            loaded = self.model.load_weights(named)
            for layer, _ in self.kept:
                layer.quant_method.process_weights_after_loading(layer)
        finally:
            for (layer, _), empty in zip(self.kept, packed, strict=True):
                layer.weight = empty
        repack_output(self.model)
        return set(loaded or ())


def _plain_weight(layer: Any) -> Parameter:
    """A weight as vLLM makes it before it reads any: with its loaders, which know where each part of a fused
    matrix goes."""
    recorded = get_layerwise_info(layer).restore_metadata[0]["weight"]
    weight = materialize_meta_tensor(restore_layer_refs(to_meta_tensor(recorded), layer))
    assert isinstance(weight, Parameter)
    return weight


def _is_linear(layer: Module) -> bool:
    return isinstance(layer, LinearBase)


def is_plain(model: Any) -> bool:
    """Whether nothing depends on the weights but what is known here: unquantised linear layers, embeddings
    and norms, each as vLLM makes them."""
    return all(_is_plain_layer(layer) for layer in model.modules())


def _is_plain_layer(layer: Any) -> bool:
    method = getattr(layer, "quant_method", None)
    if _is_linear(layer):
        usual = type(method) is UnquantizedLinearMethod and not getattr(
            layer, "_cpu_skip_gemm_dispatch", False
        )
        return usual and "weight" in get_layerwise_info(layer).restore_metadata[0]
    if isinstance(layer, VocabParallelEmbedding):
        return type(method) is UnquantizedEmbeddingMethod
    if type(layer) is RMSNorm:
        return True
    return method is None and not list(layer.parameters(recurse=False))
