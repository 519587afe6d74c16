"""vLLM's executor on CPU, waiting without burning a processor. Named in the server's arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

MOST_MS = 2
"""Looking so often took 3 % of a processor (a core of a Xeon that had other work too)."""


def patient() -> dict[str, Any]:
    """Engine arguments, by vLLM's names."""
    if torch.cuda.is_available():
        return {}
    return {"distributed_executor_backend": f"{__name__}.{PatientExecutor.__name__}"}


class PatientExecutor(MultiprocExecutor):  # type: ignore[misc,unused-ignore]
    """The engine's process asks the one with the model for a token of each sequence and waits. vLLM's looks
    for the answer without a pause for up to a second, longer than a token takes, so a processor is always
    busy: on a GPU machine nobody misses it, here it is the learner's. This one sleeps until it is woken, but
    not for long: the message that wakes it may be dropped where answers follow each other fast, which nobody
    notices who never sleeps. vLLM has no setting for it (0.32), so this sets the queues' own."""

    def _post_init_executor(self) -> None:
        super()._post_init_executor()
        for queue in self.response_mqs:
            condition = queue._spin_condition
            condition.busy_loop_s = 0.0
            condition.wait = partial(nap, condition.wait)


def nap(wait: Callable[[int], None], timeout_ms: int | None = None) -> None:
    """Wait to be woken, or until it is time to look."""
    wait(MOST_MS if timeout_ms is None else min(timeout_ms, MOST_MS))
