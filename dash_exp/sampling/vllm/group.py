"""A group's prompt computed once, on CPU: a connector for vLLM's cache, named in the engine's arguments.

vLLM shares whole blocks of its cache between requests, and on CPU a block has at least 32 tokens, so each
completion of a group would compute the rest of the prompt again, and a short prompt as a whole. Here the
first request of a prompt computes it; the others wait for that step, copy its blocks, and compute the
prompt's last token only, which is what their first token is drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.v1.request import Request, RequestStatus

Prompt = tuple[int, ...]
BLOCK_TOKENS = 32
"""The smallest block that vLLM's attention takes on CPU; a copy costs as much as a block is large."""


def shared_prompts() -> dict[str, Any]:
    """Engine arguments, by vLLM's names. On a GPU blocks are small and prompts cheap: none."""
    if torch.cuda.is_available():
        return {}
    connector = {
        "kv_connector": SharedPrompts.__name__,
        "kv_connector_module_path": __name__,
        "kv_role": "kv_both",
    }
    return {"block_size": BLOCK_TOKENS, "kv_transfer_config": connector}


@dataclass
class Copies(KVConnectorMetadata):  # type: ignore[misc,unused-ignore]
    """Blocks that are copied before a step: `sources[i]` to `targets[i]`."""

    sources: list[int]
    targets: list[int]


class SharedPrompts(KVConnectorBase_V1):  # type: ignore[misc,unused-ignore]
    """Made twice, as vLLM does: one beside the scheduler decides, one beside the model copies."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        self._block = int(vllm_config.cache_config.block_size)
        self._one_kind = len(kv_cache_config.kv_cache_groups) == 1
        self._holders: dict[Prompt, dict[str, Request]] = {}
        self._begun: set[str] = set()  # in the step that is being planned: their blocks hold nothing yet
        self._caches: list[torch.Tensor] = []
        self._copies = Copies([], [])

    # --- beside the scheduler ---

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that can be copied; None: another request of this prompt is about to compute it."""
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
        made, self._copies = self._copies, Copies([], [])
        return made

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, None]:
        holders = self._holders.get(_prompt(request), {})
        holders.pop(request.request_id, None)
        if not holders:
            self._holders.pop(_prompt(request), None)
        return False, None

    def _running(self, request: Request) -> list[Request]:
        """Others with its prompt that have blocks; one that was preempted has none."""
        holders = self._holders.get(_prompt(request), {}).values()
        return [r for r in holders if r is not request and r.status == RequestStatus.RUNNING]

    def _has_prompt(self, request: Request) -> bool:
        """Whether its prompt was computed in an earlier step. One that begins again after it was preempted
        counts its prompt as computed already, but what it is to copy is not there before the step."""
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
        """All is there before the first layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is kept elsewhere."""

    def wait_for_save(self) -> None:
        """Nothing is kept elsewhere."""


def _prompt(request: Request) -> Prompt:
    return tuple(request.prompt_token_ids or ())


def _shared(request: Request) -> int:
    """How many of its tokens it may have from others: the prompt, but never its last token of all."""
    return int(min(request.num_prompt_tokens, request.num_tokens - 1))
