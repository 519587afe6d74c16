"""How weights get into vLLM's model: the transfers that a server's worker registers with vLLM, and the
loading itself, in place where that is known to be enough, else by vLLM's own reload.

A server compares each tensor with the learner's checksum before it loads any (transfers between GPUs: as it
loads), and a missing one is an error. On CPU vLLM multiplies with packed copies of its matrices and frees the
plain ones; its reload allocates them all anew, which costs more than the copying. `InPlace` keeps them:
weights are loaded into the same memory each time and packed from there, for as much memory again as the
matrices take.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.platforms import current_platform

from dash_exp.config.model_files import tensor_shapes
from dash_exp.record.checkpoint import checksum, fingerprints
from dash_exp.sampling.transfer import IPC, NCCL, PATH
from dash_exp.sampling.transfer.path import SharedReader
from dash_exp.signals import tune_malloc

Named = Iterable[tuple[str, Tensor]]
Shapes = Mapping[str, tuple[int, ...]]
ANY_SHAPE: Shapes = MappingProxyType({})
POLL_S = 0.1


# --- loading ---


class Loader:
    """Loads complete sets of weights into one model."""

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
        """vLLM's own reload, for any model. Returns the names of the loaded parameters."""
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(named)
        finalize_layerwise_reload(self.model, self.model_config)
        repack_output(self.model)
        return set(loaded or ())


class InPlace:
    """The plain matrices of a model on CPU, kept beside the packed ones."""

    def __init__(self, model: Any):
        tune_malloc()  # the packed copies are allocated anew each time, in the memory of the last ones
        self.model, self.checked = model, False
        self.kept = [
            (layer, _plain_weight(layer)) for layer in model.modules() if isinstance(layer, LinearBase)
        ]

    def load(self, named: Named) -> set[str]:
        """Returns the names of the loaded parameters."""
        packed = [layer.weight for layer, _ in self.kept]
        for layer, weight in self.kept:
            layer.weight = weight
        try:
            sent = dict(named)
            loaded = self.model.load_weights(iter(sent.items()))
            if not self.checked:
                check_loaded(sent, self.model, loaded or ())
                self.checked = True
            for layer, _ in self.kept:
                layer.quant_method.process_weights_after_loading(layer)
        finally:
            for (layer, _), empty in zip(self.kept, packed, strict=True):
                layer.weight = empty
        repack_output(self.model)
        return set(loaded or ())


@torch.no_grad()
def check_loaded(named: Mapping[str, Tensor], model: Any, loaded: Iterable[str]) -> None:
    """Compare what the model holds with what was sent, by sums, since it joins some tensors. Raises
    ValueError where a part was left out, cut or replaced."""
    kept = dict(model.named_parameters())
    tied = model.lm_head.weight is kept.get("model.embed_tokens.weight")
    sent = [tensor for name, tensor in named.items() if not (tied and name == "lm_head.weight")]
    both = (sent, [kept[name] for name in set(kept) & set(loaded)])
    total, own = (sum(float(t.sum(dtype=torch.float64)) for t in some) for some in both)
    size, own_size = (sum(float(t.abs().sum(dtype=torch.float64)) for t in some) for some in both)
    if not max(abs(total - own), abs(size - own_size)) <= 1e-9 * size:
        raise ValueError(f"the model holds numbers of size {own_size:g} where {size:g} was sent")


def repack_output(model: Any) -> None:
    """Pack the output matrix again. Where it is tied to the embedding its weights come under the embedding's
    name, and vLLM 0.32 does not renew its packed copy on CPU."""
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _plain_weight(layer: Any) -> Parameter:
    """A weight as vLLM makes it before it reads any: with its loaders, which know where each part of a fused
    matrix goes."""
    recorded = get_layerwise_info(layer).restore_metadata[0]["weight"]
    weight = materialize_meta_tensor(restore_layer_refs(to_meta_tensor(recorded), layer))
    assert isinstance(weight, Parameter)
    return weight


def is_plain(model: Module) -> bool:
    """Whether only what is known here depends on the weights: unquantised linear layers, embeddings and
    norms, each as vLLM makes them."""
    return all(_is_plain_layer(layer) for layer in model.modules())


def _is_plain_layer(layer: Any) -> bool:
    method = getattr(layer, "quant_method", None)
    if isinstance(layer, LinearBase):
        skipped = getattr(layer, "_cpu_skip_gemm_dispatch", False)
        usual = type(method) is UnquantizedLinearMethod and not skipped
        return usual and "weight" in get_layerwise_info(layer).restore_metadata[0]
    if isinstance(layer, VocabParallelEmbedding):
        return type(method) is UnquantizedEmbeddingMethod
    if type(layer) is RMSNorm:
        return True
    return method is None and not list(layer.parameters(recurse=False))


# --- a server's end of the transfers ---


@dataclass
class PathInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class PathUpdate(WeightTransferUpdateInfo):
    """`path`: a safetensors file that both processes can read. `checksums`: of each of its tensors.
    `arrival_s`: how long to wait until the file is visible here."""

    path: str
    checksums: dict[str, str]
    arrival_s: float = 0.0


class PathReceiver(WeightTransferEngine[PathInit, PathUpdate]):
    """Reads the learner's weights from a file."""

    init_info_cls = PathInit
    update_info_cls = PathUpdate

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self._loader = Loader(self.model, self.model_config)
        self._shapes = tensor_shapes(Path(self.model_config.model))
        self._files = SharedReader()

    def init_transfer_engine(self, init_info: PathInit) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        """`update_weights` does everything."""

    def finish_weight_update(self) -> None:
        """`update_weights` does everything."""

    def shutdown(self) -> None:
        self._files.close()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The base class's would wait for an accelerator even where there is none."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def receive_weights(self, update_info: PathUpdate) -> None:
        """Raises ValueError for a tensor that is missing, unexpected, or not what the learner sent, and
        FileNotFoundError where the file does not appear."""
        named = self._files.read(wait_for_file(Path(update_info.path), update_info.arrival_s))
        expected = dict(update_info.checksums)
        for name, tensor in named.items():
            check(name, tensor, checksum(tensor), expected, self._shapes)
        if expected:
            raise ValueError(f"{sorted(expected)} did not arrive")
        self._loader.load(named)


def wait_for_file(path: Path, timeout_s: float) -> Path:
    """The path, once it exists. Its folders are listed again each time, so that another machine's file is
    seen as soon as the file system shows it."""
    deadline = time.monotonic() + timeout_s
    while not path.exists() and time.monotonic() < deadline:
        for folder in (path.parent.parent, path.parent):
            if folder.is_dir():
                os.listdir(folder)
        time.sleep(POLL_S)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not visible to this server: does it share that folder?")
    return path


def check(
    name: str, tensor: Tensor, found: str, expected: dict[str, str], shapes: Shapes = ANY_SHAPE
) -> None:
    """Remove a received tensor, of checksum `found`, from the expected ones. Raises ValueError where that
    differs, or its shape is not that of the model this server was started with (`shapes`)."""
    if tuple(tensor.shape) != (own := shapes.get(name, tuple(tensor.shape))):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {own} in the model of this server")
    if found != expected.pop(name, None):
        raise ValueError(f"{name} is not what the learner sent")


class CheckedModel:
    """Stands in for the model while vLLM's own transfers load it, and checks each tensor on the way."""

    def __init__(self, model: Any, checksums: Mapping[str, str], shapes: Shapes):
        self.model, self.expected, self.shapes = model, dict(checksums), shapes
        self.loaded: set[str] = set()

    def load_weights(self, weights: Named) -> set[str]:
        """Waits until they are loaded: vLLM 0.32 receives on two streams in turn, and a layer that gets
        weights from both is finished on one of them."""
        named = list(weights)
        for (name, tensor), found in zip(named, fingerprints(dict(named)).values(), strict=True):
            check(name, tensor, found, self.expected, self.shapes)
        loaded = set(self.model.load_weights(iter(named)) or ())
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self.loaded |= loaded
        return loaded


@contextmanager
def checking(
    engine: Any, checksums: Mapping[str, str], required: Iterable[str], shapes: Shapes = ANY_SHAPE
) -> Iterator[None]:
    """Let one of vLLM's transfers load through checks. `required`: parameters of the model, listed while tied
    ones are one; during an update they are separate. Raises ValueError: the model is incomplete then, and the
    learner treats the server as lost."""
    model = engine.model
    engine.model = checked = CheckedModel(model, checksums, shapes)
    try:
        yield
    finally:
        engine.model = model
    if checked.expected:
        raise ValueError(f"{sorted(checked.expected)} did not arrive")
    if missing := sorted(set(required) - checked.loaded):
        raise ValueError(f"no weights came for {missing}")


class _Checking:
    """Mixed into vLLM's transfers between GPUs (which have never been run here)."""

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        model: Any = self.model  # type: ignore[attr-defined]
        self._required = {name for name, _ in model.named_parameters()}
        self._shapes = tensor_shapes(Path(self.model_config.model))  # type: ignore[attr-defined]

    def receive_weights(self, update_info: Any) -> None:
        with checking(self, update_info.checksums, self._required, self._shapes):
            super().receive_weights(update_info)  # type: ignore[misc]


@dataclass
class NCCLUpdate(NCCLWeightTransferUpdateInfo):
    """`checksums`: of each tensor, by name."""

    checksums: dict[str, str] = field(default_factory=dict)


@dataclass
class IPCUpdate(IPCWeightTransferUpdateInfo):
    """`checksums`: of each tensor, by name."""

    checksums: dict[str, str] = field(default_factory=dict)


class NCCLReceiver(_Checking, NCCLWeightTransferEngine):
    """From the learner's GPU to the server's."""

    update_info_cls = NCCLUpdate


class IPCReceiver(_Checking, IPCWeightTransferEngine):
    """Within the GPU that learner and server share."""

    update_info_cls = IPCUpdate


for _name, _receiver in ((PATH, PathReceiver), (NCCL, NCCLReceiver), (IPC, IPCReceiver)):
    WeightTransferEngineFactory.register_engine(_name, _receiver)
