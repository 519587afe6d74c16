"""What a vLLM model computes with, layer by layer, to the bit; as a program: whether loading in place leaves
what vLLM's own reload does. load_probe.py <model folder> <dtype> answers with one line of JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

Named = dict[str, Tensor]


def outputs(model: Any) -> Named:
    """The product of every linear layer, and of the output layer, with fixed numbers, and every parameter
    that is not packed."""
    from vllm.model_executor.layers.linear import LinearBase

    found: Named = {}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, LinearBase) or layer is model.lm_head:
                size = getattr(layer, "input_size", None) or layer.embedding_dim
                generator = torch.Generator().manual_seed(1)
                given = torch.randn(3, size, generator=generator).to(model.lm_head.weight.dtype)
                found[f"{name}()"] = layer.quant_method.apply(layer, given, getattr(layer, "bias", None))
        for name, parameter in model.named_parameters():
            found[name] = parameter.detach().clone()
    return found


def different(one: Named, other: Named) -> list[str]:
    assert one.keys() == other.keys()
    return sorted(name for name in one if not torch.equal(one[name], other[name]))


def perturbed(named: Named, seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + 0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in named.items()
    }


def compare(loader: Any, model: Any, named: Named) -> dict[str, Any]:
    """Load other weights in both ways, in turn, and see what the model computes with afterwards."""
    first, second = perturbed(named, 1), perturbed(named, 2)
    loader.reload(first.items())
    reloaded_first = outputs(model)
    loader.in_place.load(second.items())
    in_place_second = outputs(model)
    loader.reload(second.items())
    reloaded_second = outputs(model)
    loader.in_place.load(first.items())
    in_place_first = outputs(model)
    return {
        "compared": len(reloaded_first),
        "changed": len(different(reloaded_first, reloaded_second)),
        "different": [
            *different(reloaded_first, in_place_first),
            *different(reloaded_second, in_place_second),
        ],
    }


def between_gpus(loader: Any, model: Any, named: Named, vllm_config: Any) -> list[str]:
    """What our versions of vLLM's own transfers leave differently than its reload does. Tensors arrive by
    hand here; everything else is as on a GPU."""
    from vllm.config import WeightTransferConfig

    from dash_exp.record.checkpoint import fingerprints
    from dash_exp.sampling.vllm import weights as receivers

    found: list[str] = []
    for name, seed in ((NCCL, 3), (IPC, 4)):
        own = getattr(receivers, f"{name}Receiver")
        sent = perturbed(named, seed)
        own.__bases__[1].receive_weights = lambda self, info, sent=sent: self.model.load_weights(sent.items())
        made = own(WeightTransferConfig(backend=name.lower()), vllm_config, torch.device("cpu"), model)
        fields = {
            "names": list(sent),
            "dtype_names": ["float32"] * len(sent),
            "shapes": [[1]] * len(sent),
            "checksums": fingerprints(sent),
        }
        if name == IPC:
            fields["ipc_handles"] = [{"gpu": (1,)}] * len(sent)
        for _ in range(2):
            made.start_weight_update()
            made.receive_weights(getattr(receivers, f"{name}Update")(**fields))
            made.finish_weight_update()
        after = outputs(model)
        loader.reload(sent.items())
        # a tied output matrix is packed for CPUs only, and not anew by an update
        found += [n for n in different(outputs(model), after) if not n.startswith("lm_head")]
    return found


NCCL, IPC = "NCCL", "IPC"


def main(folder: str, dtype: str) -> None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    import vllm
    from safetensors.torch import load_file

    from dash_exp.sampling.vllm.weights import Loader

    named = {n: t.to(getattr(torch, dtype)) for n, t in load_file(f"{folder}/model.safetensors").items()}
    llm = vllm.LLM(model=folder, dtype=dtype, max_model_len=32, enforce_eager=True, skip_tokenizer_init=True)
    (loader,) = llm.apply_model(lambda model: Loader(model, llm.llm_engine.model_config))
    (found,) = llm.apply_model(lambda model: compare(loader, model, named))
    config = llm.llm_engine.vllm_config
    (found["between_gpus"],) = llm.apply_model(lambda model: between_gpus(loader, model, named, config))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
