"""Sampling through `sampler=vllm` against a bare `vllm.LLM.generate`: the same prompts, one request per
completion with the same seed and its log-probabilities. The bare engine has a process of its own; the two
take turns, and each forgets its prefixes before."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import Options, at_least, need_vllm, print_lines
from benchmarks.turns import alternate, seconds, spread

GOAL = 0.97


def measure(options: Options) -> dict[str, Any]:
    need_vllm(options)
    from benchmarks.bare_vllm import BareVLLM
    from benchmarks.ours import Ours, config_of
    from dash_exp.tasks.prompts import prompts_at, requests

    config = config_of("none", 0.0, options.threads, work(options))
    with tempfile.TemporaryDirectory() as scratch, Ours(config, options.cache, Path(scratch)) as ours:
        parts, plan = ours.built.parts, ours.built.plan
        chosen = prompts_at(parts.chooser.prompts, plan.seed, 0, plan.prompts_per_step)
        calls = requests(chosen, plan.seed, "sample", 1, plan.group_size)
        sampler: Any = parts.sampler
        bare = BareVLLM(settings_of(ours, calls, options.threads))

        def through_ours(number: int) -> dict[str, Any]:
            sampler.llm.reset_prefix_cache()
            groups: list[Any] = []
            elapsed = seconds(lambda: groups.extend(sampler.stream(calls, parts.decoding)))
            groups.sort(key=lambda group: group.position)
            ids = [list(c.token_ids) for group in groups for c in group.completions]
            return {"seconds": elapsed, "tokens": sum(map(len, ids)), "ids": ids}

        try:
            sides = {"ours": through_ours, "bare": lambda number: bare.generate()}
            found = alternate(sides, options.rounds)
        finally:
            bare.close()
    rates = {name: spread([r["tokens"] / r["seconds"] for r in rows]) for name, rows in found.items()}
    same = [a == b for a, b in zip(found["ours"][0]["ids"], found["bare"][0]["ids"], strict=True)]
    ours_rate, bare_rate = rates["ours"]["median"], rates["bare"]["median"]
    line = at_least(
        GOAL,
        ours_rate / bare_rate,
        options,
        work=f"sampling, {config.dataset.name}, {len(calls)} x {plan.group_size} "
        f"of {parts.decoding.max_new_tokens} tokens",
        against="bare vllm.LLM.generate",
        ours=ours_rate,
        rival=bare_rate,
        unit="tokens/s",
    )
    lines = [asdict(line)]
    print_lines("Sampling", lines)
    share = sum(same) / len(same)
    print(f"{share:.0%} of the completions have the same tokens on both sides")
    return {"lines": lines, "tokens_per_s": rates, "same_completions": share}


def work(options: Options) -> list[str]:
    """GSM8K prompts where they are, else sums that go on and on."""
    from benchmarks.ours import asked, gsm8k
    from benchmarks.report import Skipped

    try:
        chosen = gsm8k(options)
    except Skipped:
        chosen = asked(options, "dataset.stop=[]", "sampler.max_new_tokens=64")
    import torch

    share = ["sampler.gpu_memory_utilization=0.35"] if torch.cuda.is_available() else []
    return ["sampler=vllm", *share, *chosen]


def settings_of(ours: Any, calls: Any, threads: int) -> dict[str, Any]:
    """What the bare engine is given: the settings that shape its work, and no processor of ours."""
    import torch

    from dash_exp.sampling.vllm.engine import unsplit_prompts

    s, decoding = ours.config.sampler, ours.built.parts.decoding
    longest = ours.built.parts.sampler.llm.llm_engine.model_config.max_model_len
    on_gpu = torch.cuda.is_available()
    more = {"gpu_memory_utilization": s.gpu_memory_utilization} if on_gpu else unsplit_prompts(longest)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "both engines run within their process"
    return {
        "threads": threads,
        "engine": {
            "model": str(ours.built.source.folder),
            "dtype": s.dtype,
            "max_model_len": longest,
            "max_num_seqs": s.max_sequences,
            "enforce_eager": s.enforce_eager or not on_gpu,
            "seed": 0,
            "enable_prefix_caching": True,
            "generation_config": "vllm",
            "disable_log_stats": True,
            **more,
        },
        "sampling": {
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "logprobs": 0,
            "stop_token_ids": list(decoding.stop_ids),
        },
        "questions": [(list(call.prompt.token_ids), seed) for call in calls for seed in call.seeds],
    }
