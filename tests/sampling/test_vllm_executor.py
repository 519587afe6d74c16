"""vLLM's queues as they are: a reader of ours sleeps until something is written."""

from __future__ import annotations

import importlib.util
import threading

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for CPU only"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own imports warn
]


@pytest.mark.parametrize("ours", [True, False])
def test_the_engine_does_not_spin_for_its_workers(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators import shm_broadcast

    from dash_exp.sampling.vllm_executor import PatientExecutor, patient

    looked: list[None] = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: looked.append(None))
    writer = shm_broadcast.MessageQueue(1, 1)
    reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=writer.wait_until_ready)
    ready.start()
    reader.wait_until_ready()
    ready.join()
    if ours:
        executor = object.__new__(PatientExecutor)  # without the processes that it would start
        executor.response_mqs = [reader]
        executor._post_init_executor()
    for number in range(3):
        later = threading.Timer(0.1, writer.enqueue, (number,))
        later.start()
        assert reader.dequeue(timeout=10) == number
        later.join()
    assert bool(looked) != ours
    reader.shutdown()
    writer.shutdown()
    assert patient()["distributed_executor_backend"].endswith(PatientExecutor.__name__)
