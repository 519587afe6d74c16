"""A bare `vllm.LLM` in a process of its own, which generates on request.

    python -m benchmarks.bare_vllm    (settings and questions as one line of JSON on standard input)

Then each further line makes it empty its prefix cache and answer all questions once; it replies with one
line of JSON: seconds, tokens, and the tokens themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any, TextIO


class BareVLLM:
    """The process, seen from ours."""

    def __init__(self, settings: dict[str, Any]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bare_vllm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._say(json.dumps(settings))
        self._hear()  # that it is ready

    def _say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"bare vLLM ended with code {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def generate(self) -> dict[str, Any]:
        self._say("go")
        return self._hear()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def answer(settings: dict[str, Any], out: TextIO) -> None:
    """Load the model as vLLM's own documentation does, then serve."""
    import torch

    torch.set_num_threads(settings["threads"])
    import vllm

    llm = vllm.LLM(**settings["engine"])
    torch.set_num_threads(settings["threads"])
    prompts = [{"prompt_token_ids": ids} for ids, _ in settings["questions"]]
    params = [vllm.SamplingParams(seed=seed, **settings["sampling"]) for _, seed in settings["questions"]]
    print(json.dumps({"ready": True}), file=out, flush=True)
    for _ in sys.stdin:
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        ids = [list(one.outputs[0].token_ids) for one in outputs]
        reply = {"seconds": elapsed, "tokens": sum(map(len, ids)), "ids": ids}
        print(json.dumps(reply), file=out, flush=True)


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is not an answer
    answer(json.loads(sys.stdin.readline()), out)


if __name__ == "__main__":
    main()
