"""What every vLLM engine is started with, in this process or in a server: arguments, a mask of padding ids,
and on CPU a prompt that is computed once for its group and an executor that sleeps while it waits.

Imports vLLM, so its environment variables must be set before. vLLM finds the classes here by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from dash_exp.sampling.protocol import EngineSettings

CPU_BATCHED_TOKENS = 4096
CPU_BLOCK_TOKENS = 32
"""The smallest cache block of vLLM's attention on CPU; copying a block costs in proportion to its size."""
POLL_MS = 2
"""Polling at this rate took 3 % of a core (a Xeon that had other work too)."""


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of vLLM's engine, by their names in its Python interface."""
    arguments = {
        "model": settings.model,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_sequences,
        "enforce_eager": settings.enforce_eager or not torch.cuda.is_available(),
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "load_format": "safetensors",
        "logits_processors": [f"{__name__}:{MaskPadding.__name__}"],
        "additional_config": {"dash_vocabulary": settings.vocabulary},
    }
    if not torch.cuda.is_available():
        return {**arguments, **unsplit_prompts(settings.max_model_len), **shared_prompts()}
    if settings.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.kv_cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = settings.kv_cache_bytes
    return arguments


def unsplit_prompts(max_model_len: int) -> dict[str, Any]:
    """Arguments for CPU: prompts are never split. vLLM 0.32 crashes there on a part of a prompt whose request
    has a seed ("CPU Generator does not use offset")."""
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, max_model_len)}


def shared_prompts() -> dict[str, Any]:
    """Arguments that select `SharedPrompts`, for CPU; on a GPU blocks are small and prompts cheap."""
    connector = {
        "kv_connector": SharedPrompts.__name__,
        "kv_connector_module_path": __name__,
        "kv_role": "kv_both",
    }
    return {"block_size": CPU_BLOCK_TOKENS, "kv_transfer_config": connector}


class MaskPadding(LogitsProcessor, LogitsProcessorV2):  # type: ignore[misc,unused-ignore]
    """Never draws ids that only pad the output matrix. Serves both of vLLM's model runners, on CPU and on
    GPU, which ask for different base classes."""

    def __init__(self, vllm_config: Any, *more: Any):
        self.vocabulary = int(vllm_config.additional_config["dash_vocabulary"])

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        logits[:, self.vocabulary :] = float("-inf")
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """The same for every request."""


class SleepingExecutor(MultiprocExecutor):  # type: ignore[misc,unused-ignore]
    """Waits for the workers' results without busy polling.

    vLLM's executor polls its queue for up to a second, longer than a token takes, so one core is always busy;
    on CPU the learner needs that core. This one sleeps until it is woken, for at most POLL_MS: vLLM drops the
    wake-up message where results follow each other fast. vLLM 0.32 has no option for it, so this sets
    attributes of its queues.
    """

    def _post_init_executor(self) -> None:
        super()._post_init_executor()
        for queue in self.response_mqs:
            condition = queue._spin_condition
            condition.busy_loop_s = 0.0
            condition.wait = partial(_wait, condition.wait)


def _wait(wait: Callable[[int], None], timeout_ms: int | None = None) -> None:
    wait(POLL_MS if timeout_ms is None else min(timeout_ms, POLL_MS))


def executor_arguments() -> dict[str, Any]:
    """Engine arguments that select the executor of servers."""
    if torch.cuda.is_available():
        return {}
    return {"distributed_executor_backend": f"{__name__}.{SleepingExecutor.__name__}"}


@dataclass
class Copies(KVConnectorMetadata):  # type: ignore[misc,unused-ignore]
    """Blocks that are copied before a step: `sources[i]` to `targets[i]`."""

    sources: list[int]
    targets: list[int]


class SharedPrompts(KVConnectorBase_V1):  # type: ignore[misc,unused-ignore]
    """A connector for vLLM's cache with which the prompt of a group is computed once.

    vLLM shares full cache blocks between requests, and on CPU a block has at least 32 tokens, so each
    completion of a group would compute the rest of the prompt again, and a short prompt entirely. Here the
    first request of a prompt computes it; the others wait for that step, copy its blocks, and compute only
    the prompt's last token, from which their first token is drawn.

    vLLM creates two instances: one beside the scheduler decides, one beside the model copies.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        self._block = int(vllm_config.cache_config.block_size)
        self._one_kind = len(kv_cache_config.kv_cache_groups) == 1
        self._holders: dict[tuple[int, ...], dict[str, Request]] = {}
        self._begun: set[str] = set()  # in the step that is being planned: their blocks are still empty
        self._caches: list[torch.Tensor] = []
        self._copies = Copies([], [])

    # --- beside the scheduler ---

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens can be copied; None: another request is about to compute this prompt."""
        running = self._running(request) if self._one_kind else []
        if any(map(self._has_prompt, running)):
            return max(0, _shared(request) - num_computed_tokens), False
        if any(r.max_tokens > 1 for r in running):  # else it is gone, with its blocks, by the next step
            return None, False
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            assert self._kv_cache_manager is not None
            holder = next(filter(self._has_prompt, self._running(request)))
            (theirs,) = self._kv_cache_manager.get_block_ids(holder.request_id)
            (own,) = blocks.get_block_ids()
            upto = _shared(request)
            wanted = slice((upto - num_external_tokens) // self._block, -(-upto // self._block))
            self._copies.sources += theirs[wanted]
            self._copies.targets += own[wanted]
        self._holders.setdefault(_prompt(request), {})[request.request_id] = request
        self._begun.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Copies:
        self._begun.clear()
        copies, self._copies = self._copies, Copies([], [])
        return copies

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, None]:
        holders = self._holders.get(_prompt(request), {})
        holders.pop(request.request_id, None)
        if not holders:
            self._holders.pop(_prompt(request), None)
        return False, None

    def _running(self, request: Request) -> list[Request]:
        """Other requests with this prompt that hold blocks (a preempted one holds none)."""
        holders = self._holders.get(_prompt(request), {}).values()
        return [r for r in holders if r is not request and r.status == RequestStatus.RUNNING]

    def _has_prompt(self, request: Request) -> bool:
        """Whether its prompt was computed in an earlier step. One that restarts after preemption counts its
        prompt as computed already, but its blocks are filled only right before the step."""
        done = request.num_computed_tokens >= request.num_prompt_tokens
        return bool(done and request.request_id not in self._begun)

    # --- beside the model ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._caches = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        copies = self._get_connector_metadata()
        assert isinstance(copies, Copies)
        if copies.sources:
            sources, targets = torch.tensor(copies.sources), torch.tensor(copies.targets)
            for cache in self._caches:
                cache[targets] = cache[sources]

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything is loaded before the first layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved elsewhere."""

    def wait_for_save(self) -> None:
        """Nothing is saved elsewhere."""


def _prompt(request: Request) -> tuple[int, ...]:
    return tuple(request.prompt_token_ids or ())


def _shared(request: Request) -> int:
    """How many of its tokens may be copied: the prompt, except the last token of all."""
    return int(min(request.num_prompt_tokens, request.num_tokens - 1))
