"""From config to parts: the only file that names concrete classes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dash_exp.config import Config, DatasetConfig
from dash_exp.errors import Fault, UserError
from dash_exp.evaluation import EvalSet, Judge
from dash_exp.learning.advantages import group_advantages
from dash_exp.learning.filters import make_filter
from dash_exp.learning.learner import Learner, Objective, Optimization
from dash_exp.learning.packing import Packer
from dash_exp.loop import Parts, Plan
from dash_exp.modeling.attention import ATTENTION
from dash_exp.modeling.source import ModelSource, load_model, load_tokenizer, locate, position_limit
from dash_exp.sampling.hf import HFSampler
from dash_exp.sampling.protocol import Decoding, Sampler
from dash_exp.tasks.examples import ExampleSet, arithmetic, read_hub, read_jsonl
from dash_exp.tasks.prompts import PromptSet, make_prompts
from dash_exp.verifiers.frontends import InlineVerifier, PooledMathVerifier
from dash_exp.verifiers.integer import judge_integer
from dash_exp.verifiers.pool import VerifierPool


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked and judged: the training prompts and the held-out sets."""

    prompts: PromptSet
    decoding: Decoding
    judge: Judge
    sets: tuple[EvalSet, ...]


@dataclass(frozen=True, slots=True)
class Machine:
    """Parts of a run that outlive a step, and how to let go of them."""

    plan: Plan
    parts: Parts
    sets: tuple[EvalSet, ...]
    source: ModelSource
    close: Callable[[], None]


def device_of(name: str) -> torch.device:
    if name != "auto":
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                Fault("learner.device", f"got {name!r}, but there are {torch.cuda.device_count()} GPUs here",
                      "set learner.device=cpu or auto")
            )  # fmt: skip
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def thread_count(wanted: int | None) -> int:
    return wanted or len(os.sched_getaffinity(0))


def load_examples(one: DatasetConfig) -> ExampleSet:
    """The examples of a dataset whose path has been resolved."""
    if one.kind == "arithmetic":
        return arithmetic(one.split)
    if one.path:
        return read_jsonl(Path(one.path), one.name, one.fields, one.answer_after)
    if one.hub:
        return read_hub(
            one.name, one.hub, one.hub_config, one.hub_split or one.split, one.fields, one.answer_after
        )
    raise UserError(
        Fault("dataset.path", f"{one.name!r} names no file and no hub dataset", "set dataset.path=<file>")
    )


def stop_ids(tokenizer: Any, stops: list[str]) -> tuple[int, ...]:
    """The end token and each stop text, which must be a single token."""
    ids = [tokenizer.eos_token_id]
    for text in stops:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        if len(tokens) != 1:
            raise UserError(
                Fault("dataset.stop", f"{text!r} is {len(tokens)} tokens of this tokenizer, not one",
                      "choose a text that is one token, or dataset.stop=[]")
            )  # fmt: skip
        ids.append(tokens[0])
    return tuple(dict.fromkeys(ids))


class Judges:
    """Verifiers by name; those that need worker processes share one pool, started on first use."""

    def __init__(self, workers: int, timeout_s: float, memory_mb: int):
        self._settings = {"workers": workers, "timeout_s": timeout_s, "memory_mb": memory_mb}
        self._pool: VerifierPool | None = None

    def get(self, verifier: str, extraction: str) -> Judge:
        if verifier == "integer":
            return InlineVerifier(judge_integer, "integer")
        if self._pool is None:
            self._pool = VerifierPool(**self._settings)  # type: ignore[arg-type]
        return PooledMathVerifier(self._pool, extraction)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def build_task(config: Config, tokenizer: Any, positions: int, judges: Judges) -> Task:
    """Prompts and judges. Reads the data; UserError for whatever is wrong with them."""
    faults: list[Fault] = []

    def prompts_of(one: DatasetConfig, limit: int | None) -> PromptSet | None:
        room = positions - (one.max_new_tokens or config.sampler.max_new_tokens)
        try:
            return make_prompts(
                load_examples(one), partial(_tokenize, tokenizer, config.model.add_bos),
                template=one.template, max_prompt_tokens=one.max_prompt_tokens,
                model_limit=room, limit=limit if limit is not None else one.limit,
            )  # fmt: skip
        except UserError as error:
            faults.extend(error.faults)
            return None

    def decoding(one: DatasetConfig, temperature: float) -> Decoding:
        length = one.max_new_tokens or config.sampler.max_new_tokens
        return Decoding(length, temperature, stop_ids(tokenizer, one.stop))

    train = prompts_of(config.dataset, config.dataset.limit)
    sets = []
    wanted = config.evaluation.before or config.evaluation.after or config.evaluation.every
    for label, one in config.evaluation.sets.items() if wanted else ():
        held_out = prompts_of(one, config.evaluation.limit)
        if held_out is not None:
            sets.append(
                EvalSet(
                    label,
                    held_out,
                    judges.get(one.verifier, one.extraction),
                    decoding(one, config.evaluation.temperature),
                    config.evaluation.samples,
                    f"{one.verifier}/{one.extraction}",
                )
            )
    if faults or train is None:
        raise UserError(faults)
    judge = judges.get(config.dataset.verifier, config.dataset.extraction)
    return Task(train, decoding(config.dataset, config.sampler.temperature), judge, tuple(sets))


def _tokenize(tokenizer: Any, add_bos: bool, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=add_bos).input_ids
    return ids


def make_plan(config: Config) -> Plan:
    a, s = config.algorithm, config.sampler
    return Plan(
        seed=config.seed,
        steps=a.steps,
        prompts_per_step=a.prompts_per_step,
        group_size=a.group_size,
        prompts_per_call=a.prompts_per_step if s.schedule == "preemptive" else s.prompts_per_call,
        streaming=s.streaming,
        in_prompt_order=config.learner.deterministic,
        passes=a.passes,
        aggregation=a.aggregation,
        denominator=config.filter.denominator,
        evaluate_every=config.evaluation.every,
        checkpoint_every=config.checkpoint.every,
        budget_s=config.budget.seconds,
    )


def find_model(config: Config, cache: Path) -> ModelSource:
    m = config.model
    return locate(
        name=m.name, path=m.path, package=m.package, package_file=m.package_file,
        hub=m.hub, revision=m.revision, random=m.random, cache=cache,
    )  # fmt: skip


def make_learner(config: Config, folder: Path, vocabulary: int, device: torch.device) -> Learner:
    a, opt = config.algorithm, config.learner
    model = load_model(folder, torch.float32, ATTENTION).to(device)
    return Learner(
        model,
        Objective(a.surrogate, a.clip_low, a.clip_high, a.beta, a.kl, config.sampler.temperature),
        Optimization(
            lr=opt.lr, schedule=opt.schedule, warmup_share=opt.warmup_share,
            total_updates=a.steps * a.passes, weight_decay=opt.weight_decay,
            betas=(opt.beta1, opt.beta2), eps=opt.eps, max_grad_norm=opt.max_grad_norm,
            precision=opt.precision, freeze_embeddings=opt.freeze_embeddings,
        ),
        vocabulary=vocabulary, logit_chunk=opt.logit_chunk,
        gradient_checkpointing=opt.gradient_checkpointing,
    )  # fmt: skip


def make_sampler(
    config: Config, learner: Learner, folder: Path, tokenizer: Any, vocabulary: int, longest: int
) -> Sampler:
    s = config.sampler
    if s.name == "vllm":
        from dash_exp.sampling.vllm_engine import VLLMSampler

        return VLLMSampler(
            folder, learner.compute_weights, vocabulary=vocabulary, max_model_len=longest,
            max_sequences=s.max_sequences, dtype=s.dtype, kv_cache_gb=s.kv_cache_gb,
            gpu_memory_utilization=s.gpu_memory_utilization, enforce_eager=s.enforce_eager,
        )  # fmt: skip
    return HFSampler(
        learner.model, partial(tokenizer.decode, skip_special_tokens=True),
        vocabulary=vocabulary, max_sequences=s.max_sequences,
    )  # fmt: skip


def build(config: Config, cache: Path, note: Callable[[str], None]) -> Machine:
    """Everything a run needs, cheap checks first: data and tokenizer are read before any weights."""
    device = device_of(config.learner.device)
    torch.set_num_threads(thread_count(config.cluster.threads))
    judges = Judges(config.verifier.workers, config.verifier.timeout_s, config.verifier.memory_mb)
    try:
        source = find_model(config, cache)
        tokenizer = load_tokenizer(source.folder)
        task = build_task(config, tokenizer, position_limit(source.folder), judges)
        note_prompts(task, note)
        vocabulary = len(tokenizer)
        learner = make_learner(config, source.folder, vocabulary, device)
        asked = [(task.prompts, task.decoding), *((s.prompts, s.decoding) for s in task.sets)]
        longest = max(len(p.token_ids) + d.max_new_tokens for ps, d in asked for p in ps.prompts)
        sampler = make_sampler(config, learner, source.folder, tokenizer, vocabulary, longest)
    except BaseException:
        judges.close()
        raise
    a, f = config.algorithm, config.filter
    parts = Parts(
        prompts=task.prompts, sampler=sampler, decoding=task.decoding, judge=task.judge,
        advantages=partial(group_advantages, baseline=a.baseline, scale=a.scale),
        keep=make_filter(f.name, f.threshold),
        packer=Packer(
            config.learner.micro_batch_tokens, a.aggregation,
            keep_for_kl=f.kl == "keep" and a.beta > 0, device=device,
        ),
        learner=learner,
    )  # fmt: skip

    def close() -> None:
        sampler.close()
        judges.close()

    return Machine(make_plan(config), parts, task.sets, source, close)


def note_prompts(task: Task, note: Callable[[str], None]) -> None:
    for label, prompts in [("training", task.prompts), *((s.label, s.prompts) for s in task.sets)]:
        dropped = f", {prompts.dropped} too long and dropped" if prompts.dropped else ""
        note(f"{label}: {len(prompts.prompts)} prompts of {prompts.name}{dropped}")


def engine_facts(config: Config) -> Mapping[str, Any]:
    """What of the sampler can change a greedy answer: which program, and its precision."""
    s, opt = config.sampler, config.learner
    precision = s.dtype if s.name == "vllm" else re.sub("_mixed", "", opt.precision)
    return {
        "sampler": s.name,
        "precision": precision,
        "device": str(device_of(opt.device)),
        "max_sequences": s.max_sequences,
    }
