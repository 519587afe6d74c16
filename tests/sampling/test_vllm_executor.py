"""The executor of servers on CPU sleeps until a worker writes, tested with vLLM's own queues."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for CPU only"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own imports warn
]


@pytest.fixture
def queues() -> Iterator[tuple[Any, Any]]:
    """Where a worker writes, and where the engine reads."""
    from vllm.distributed.device_communicators import shm_broadcast

    writer = shm_broadcast.MessageQueue(1, 1)
    reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=writer.wait_until_ready)
    ready.start()
    reader.wait_until_ready()
    ready.join()
    yield writer, reader
    reader.shutdown()
    writer.shutdown()


def without_polling(reader: Any) -> None:
    from dash_exp.sampling.vllm.engine import SleepingExecutor

    executor = object.__new__(SleepingExecutor)  # without the processes that it would start
    executor.response_mqs = [reader]
    executor._post_init_executor()


def test_a_result_is_seen_without_a_wake_up(queues: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM drops the message where another one is still on its way."""
    writer, reader = queues
    without_polling(reader)
    monkeypatch.setattr(writer._spin_condition, "notify", lambda: None)
    for number in range(3):
        later = threading.Timer(0.05, writer.enqueue, (number,))
        later.start()
        assert reader.dequeue(timeout=2) == number
        later.join()


def test_many_results_at_once_are_all_seen(queues: Any) -> None:
    writer, reader = queues
    without_polling(reader)
    writing = threading.Thread(target=lambda: [writer.enqueue(n) for n in range(3000)])
    writing.start()
    assert [reader.dequeue(timeout=2) for _ in range(3000)] == list(range(3000))
    writing.join()


@pytest.mark.parametrize("ours", [True, False])
def test_the_engine_does_not_spin_for_its_workers(
    ours: bool, queues: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.device_communicators import shm_broadcast

    from dash_exp.sampling.vllm.engine import SleepingExecutor, executor_arguments

    writer, reader = queues
    looked: list[None] = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: looked.append(None))
    if ours:
        without_polling(reader)
    for number in range(3):
        later = threading.Timer(0.1, writer.enqueue, (number,))
        later.start()
        assert reader.dequeue(timeout=10) == number
        later.join()
    assert bool(looked) != ours
    assert executor_arguments()["distributed_executor_backend"].endswith(SleepingExecutor.__name__)
