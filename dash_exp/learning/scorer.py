"""A model with how it is asked for log-probabilities."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from dash_exp.learning.logprobs import token_logprobs
from dash_exp.learning.packing import Packed


class Scorer(torch.nn.Module):
    """From a micro-batch to the log-probabilities and entropies [C] of its completions. One module, so that
    every weight is used inside one forward: those of a sharded model are whole only there."""

    def __init__(self, model: Any, *, temperature: float, vocabulary: int, chunk: int):
        super().__init__()
        self.model = model
        self.temperature, self.vocabulary, self.chunk = temperature, vocabulary, chunk

    def forward(self, batch: Packed) -> tuple[Tensor, Tensor]:
        hidden = self.model.get_decoder()(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            context=batch.context,
            use_cache=False,
        ).last_hidden_state[0]
        return token_logprobs(
            hidden.index_select(0, batch.logit_index),
            self.model.get_output_embeddings().weight,
            batch.targets,
            temperature=self.temperature,
            vocabulary=self.vocabulary,
            chunk=self.chunk,
        )


def frozen_copy(model: Any, dtype: torch.dtype) -> Any:
    """An equal model that nothing moves, in another type; never held in both."""
    made = {
        id(p): torch.nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo=made).eval()
