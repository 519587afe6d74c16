"""What vLLM is given, in this process or in a server's: imported once its environment is set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2


class MaskPadding(LogitsProcessor, LogitsProcessorV2):  # type: ignore[misc,unused-ignore]
    """Ids from the tokenizer's length on are rows that only pad the output matrix: never drawn. For both of
    vLLM's model runners, the first (CPU) and the second (GPUs), which ask for classes of their own."""

    def __init__(self, vllm_config: Any, *more: Any):
        self.vocabulary = int(vllm_config.additional_config["dash_vocabulary"])

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        logits[:, self.vocabulary :] = float("-inf")
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """The same for every request."""


def repack_output(model: Any) -> None:
    """On CPU vLLM multiplies with a packed copy of the output matrix. One that is tied to the embedding
    comes under the embedding's name, and reloading leaves its packed copy as it was (vLLM 0.32)."""
    head = model.lm_head
    head.quant_method.process_weights_after_loading(head)


def scheduling(max_model_len: int) -> dict[str, Any]:
    """Engine arguments about the cutting of prompts. On CPU vLLM 0.32 crashes where it reads a part of a
    prompt whose request has a seed ("CPU Generator does not use offset"), so there it reads whole ones."""
    if torch.cuda.is_available():
        return {}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, max_model_len)}


CPU_BATCHED_TOKENS = 4096
