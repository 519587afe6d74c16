"""Weights into vLLM's model: by its own reload, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from dash_exp.sampling.vllm_parts import repack_output


class Loader:
    """Loads whole sets of weights into one model."""

    def __init__(self, model: Any, model_config: Any):
        self.model, self.model_config = model, model_config

    def load(self, named: Mapping[str, Tensor]) -> None:
        """Raises ValueError where a parameter gets no weights."""
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(named.items())
        finalize_layerwise_reload(self.model, self.model_config)
        repack_output(self.model)
        names = {name for name, _ in self.model.named_parameters()}
        if missing := sorted(names - (loaded or set())):
            raise ValueError(f"no weights came for {missing}")
