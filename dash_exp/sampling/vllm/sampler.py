"""`sampler=vllm`: vLLM in this process, on a GPU or on CPU.

Weights are copied in memory after every update and prefix caches are emptied, so no completion ever mixes
two policies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dash_exp.sampling.protocol import EngineSettings, sampling_parameters
from dash_exp.types import Completion, Decoding, Group, Request

WeightSource = Callable[[], Iterable[tuple[str, Tensor]]]


class VLLMSampler:
    """Completions from an engine that is stepped here, so groups are yielded as they finish.

    Each completion is a request with a seed of its own; the group's prompt is computed once.
    Log-probabilities are those of the distribution drawn from: after the temperature, over the tokenizer's
    vocabulary.
    """

    def __init__(self, settings: EngineSettings, weights: WeightSource):
        threads = torch.get_num_threads()
        _set_environment(settings.kv_cache_gb)
        import vllm
        from vllm.sampling_params import RequestOutputKind

        from dash_exp.sampling.vllm.engine import engine_arguments
        from dash_exp.sampling.vllm.weights import Loader, repack_output

        self._vllm, self._final, self._repack = vllm, RequestOutputKind.FINAL_ONLY, repack_output
        self.llm = vllm.LLM(**engine_arguments(settings), disable_log_stats=True)
        self.engine = self.llm.llm_engine
        self.tokenizer = self.llm.get_tokenizer()
        self.weights = weights
        self.policy_version = 0
        (self._loader,) = self.llm.apply_model(lambda model: Loader(model, self.engine.model_config))
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    def load_weights(self, version: int) -> None:
        """Copy the learner's weights in, and drop every prefix cached with older ones."""
        named = dict(self.weights())
        if self._loader.in_place is None:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named.items())})
            self.llm.apply_model(self._repack)
        else:
            self.llm.apply_model(lambda model: self._loader.load(named))
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests were still running")
        self.policy_version = version

    def close(self) -> None:
        """Shut the engine down."""
        self.engine.engine_core.shutdown()

    def stream(
        self, requests: Sequence[Request], decoding: Decoding, at_once: int | None = None
    ) -> Iterator[Group]:
        pending: dict[int, tuple[Request, list[Completion | None]]] = {}
        for request in requests:
            pending[request.position] = (request, [None] * len(request.seeds))
            self._submit(request, decoding)
        while pending:
            if not self.engine.has_unfinished_requests():
                raise RuntimeError(f"vLLM lost the groups {sorted(pending)}")
            for output in self.engine.step():
                if not output.finished:
                    continue
                position, index = map(int, output.request_id.split("-")[:2])
                request, completions = pending[position]
                completions[index] = self._completion(output.outputs[0], decoding)
                done = [c for c in completions if c is not None]
                if len(done) == len(completions):
                    del pending[position]
                    yield Group(position, request.prompt, tuple(done))

    def _submit(self, request: Request, decoding: Decoding) -> None:
        prompt = {"prompt_token_ids": list(request.prompt.token_ids)}
        (rendered,) = self.engine.renderer.render_cmpl([prompt])
        for index, seed in enumerate(request.seeds):
            parameters = self._vllm.SamplingParams(
                **sampling_parameters(decoding, seed), skip_special_tokens=True, output_kind=self._final
            )
            self.engine.add_request(f"{request.position}-{index}", rendered, parameters)

    def _completion(self, output: Any, decoding: Decoding) -> Completion:
        ids = tuple(output.token_ids)
        entries = zip(output.logprobs, ids, strict=True)
        logprobs = tuple(float(entry[token].logprob) for entry, token in entries)
        stopped = ids[-1] in decoding.stop_ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(ids, logprobs, text, "stop" if stopped else "length", self.policy_version)


def _set_environment(kv_cache_gb: float) -> None:
    """vLLM reads these when it is imported. An explicit choice of the user stays."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(kv_cache_gb))),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }.items():
        os.environ.setdefault(name, value)
