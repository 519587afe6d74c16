"""Checks of a composed config, across fields, all at once. Torch-free.

`check` is the whole of it: names out of a fixed list and numbers out of their range (`config/limits.py`),
settings that contradict each other, and files and packages that are not there (`config/environment.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from dash_exp.config.dataset_checks import dataset_faults
from dash_exp.config.environment import TRACES_HINT, Installed, is_installed, missing
from dash_exp.config.limits import (
    ALLOWED,
    COUNT,
    KL_ESTIMATORS,
    RANDOM_SIZES,
    RANGES,
    STD_EPSILON,
    outside,
    range_fault,
    unknown,
)
from dash_exp.config.schema import Config
from dash_exp.config.server_checks import server_faults
from dash_exp.errors import Fault


def check(config: Config, installed: Installed = is_installed) -> list[Fault]:
    """Every fault of a config; none means that it can be started. `installed` says whether a Python
    package can be imported, without importing it."""
    parts: tuple[Callable[[Config], Iterator[Fault]], ...] = (
        _names,
        _numbers,
        dataset_faults,
        _group,
        _sampling,
        _arm,
        _filter,
        _kl_and_passes,
        _supervised,
        _sharding,
        _budget,
        _evaluation,
        _random_model,
        server_faults,
    )
    faults = [fault for part in parts for fault in part(config)]
    return faults + list(missing(config, installed))


def _names(config: Config) -> Iterator[Fault]:
    for key, allowed in ALLOWED.items():
        value = _value(config, key)
        if value not in allowed and not (key == "algorithm.kl" and value == "k1"):
            yield unknown(key, value, allowed)
    device = config.learner.device
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        yield unknown("learner.device", device, ("auto", "cpu", "cuda", "cuda:0"))


def _numbers(config: Config) -> Iterator[Fault]:
    for key, allowed in RANGES.items():
        yield from outside(key, _value(config, key), allowed)


def _group(config: Config) -> Iterator[Fault]:
    size, supervised = config.algorithm.group_size, config.algorithm.source != "sampler"
    if supervised and size != 1:
        yield Fault(
            "algorithm.group_size",
            f"got {size}, must be 1 with algorithm.source={config.algorithm.source}",
            "a demonstration is shown once; algorithm.prompts_per_step sets the batch",
        )
    if size < 2 and not supervised:
        yield Fault(
            "algorithm.group_size",
            f"got {size}, must be at least 2",
            "an advantage compares a completion with others of its prompt: alone it is always 0",
        )


def _sampling(config: Config) -> Iterator[Fault]:
    sampler, prompts = config.sampler, config.algorithm.prompts_per_step
    if config.algorithm.source != "sampler":
        return
    why = (
        "the sampler's log-probabilities would be renormalised over the kept tokens, and would not "
        "be those the learner computes; use sampler.temperature instead"
    )
    if sampler.top_p != 1:
        yield Fault("sampler.top_p", f"got {sampler.top_p:g}, must be 1 in training", why)
    if sampler.top_k != 0:
        yield Fault("sampler.top_k", f"got {sampler.top_k}, must be 0 (off) in training", why)
    call = sampler.prompts_per_call
    if sampler.schedule == "per_microbatch" and call >= 1 and prompts % call:
        divisors = [n for n in range(1, prompts + 1) if prompts % n == 0]
        yield Fault(
            "sampler.prompts_per_call",
            f"got {call}, which does not divide algorithm.prompts_per_step={prompts}",
            f"allowed: {', '.join(map(str, divisors))}",
        )


def _arm(config: Config) -> Iterator[Fault]:
    arm, name = config.algorithm, config.filter.name
    strange = [f for f in arm.filters if f not in ALLOWED["filter.name"]]
    if strange:
        yield unknown("algorithm.filters", strange[0], ALLOWED["filter.name"])
    elif name in ALLOWED["filter.name"] and name not in arm.filters:
        yield Fault(
            "filter",
            f"filter={name} contradicts algorithm={arm.name}, which is defined with "
            f"filter={' or '.join(arm.filters)}",
            f"leave filter out, or choose an arm that is defined with filter={name}",
        )
    if config.sampler.schedule != arm.schedule:
        yield Fault(
            "sampler.schedule",
            f"sampler.schedule={config.sampler.schedule} contradicts algorithm={arm.name}, "
            f"which is defined with {arm.schedule}",
            "leave sampler.schedule out, or choose another arm",
        )


def _filter(config: Config) -> Iterator[Fault]:
    arm, threshold = config.algorithm, config.filter.threshold
    if config.filter.name != "advantage" or arm.group_size < 2:
        return
    largest = largest_deviation(arm.group_size)
    if threshold >= largest:
        yield Fault(
            "filter.threshold",
            f"got {threshold:g}, which drops every completion: with group_size={arm.group_size} and "
            f"rewards of 0 or 1, none is more than {largest:.6g} standard deviations from its group's mean",
            "lower it; 0 drops only advantages that are exactly 0",
        )


def largest_deviation(group_size: int) -> float:
    """The largest distance from the group's mean, in its standard deviations, that rewards of 0 and 1 can
    give: one right answer among wrong ones."""
    std = math.sqrt(1 / group_size)
    return (1 - 1 / group_size) / (std + STD_EPSILON)


def _kl_and_passes(config: Config) -> Iterator[Fault]:
    arm = config.algorithm
    if arm.kl == "k1":
        yield Fault(
            "algorithm.kl",
            f"got 'k1', allowed: {', '.join(KL_ESTIMATORS)}",
            "as a term of the loss, k1's expected gradient is 0: it would regularise nothing; k2's is "
            "what k1 gives as a penalty on the reward",
        )
    if arm.mini_batch is not None and arm.mini_batch >= 1 and arm.group_size >= 1:
        yield from _mini_batch(arm.mini_batch, arm.group_size, arm.prompts_per_step)
    several = {"passes": arm.passes > 1, "mini_batch": (arm.mini_batch or 0) > 0}
    if any(several.values()) and arm.surrogate != "clipped":
        key = next(name for name, found in several.items() if found)
        yield Fault(
            "algorithm.surrogate",
            f"got {arm.surrogate!r}, must be 'clipped' when algorithm.{key}={getattr(arm, key)}",
            "from the second update on the batch is off-policy: only the clipped ratio corrects it",
        )
    if 0 < config.sampler.max_sequences < arm.group_size:
        yield Fault(
            "sampler.max_sequences",
            f"got {config.sampler.max_sequences}, less than algorithm.group_size={arm.group_size}",
            "a group is sampled together: raise it",
        )


def _mini_batch(size: int, group_size: int, prompts: int) -> Iterator[Fault]:
    allowed = [group_size * n for n in range(1, prompts + 1) if prompts % n == 0]
    if size not in allowed:
        yield Fault(
            "algorithm.mini_batch",
            f"got {size}; a mini-batch is whole groups of {group_size}, and the batch of "
            f"{prompts} groups whole mini-batches",
            f"allowed: {', '.join(map(str, allowed))}",
        )


def _supervised(config: Config) -> Iterator[Fault]:
    if config.algorithm.steps is None and config.algorithm.epochs is None:
        yield Fault("algorithm.steps", "got null, and algorithm.epochs is null too", "set one of them")
    if config.algorithm.source == "traces" and config.dataset.mix:
        yield Fault("dataset.mix", "goes with no algorithm.source=traces", "traces are of one dataset")
    if config.algorithm.source == "traces" and not config.dataset.traces:
        yield Fault(
            "dataset.traces", "not set, but algorithm.source=traces learns from that file", TRACES_HINT
        )


def _sharding(config: Config) -> Iterator[Fault]:
    opt = config.learner
    if opt.sharding != "fsdp":
        return
    key = "learner.sharding"
    if opt.ranks == 1:
        yield Fault(
            key,
            "got fsdp, but learner.ranks=1: there is nobody to share the weights with",
            "set learner.ranks to the number of GPUs, or leave it out",
        )
    if opt.precision == "bf16":
        yield Fault(
            key,
            "got fsdp with learner.precision=bf16, whose gradient sums would be rounded",
            "use bf16_mixed or fp32",
        )
    if opt.lora.rank > 0:
        yield Fault(
            key,
            "got fsdp with learner.lora.rank above 0",
            "adapters leave hardly anything to share out: leave learner.sharding out",
        )
    if config.sampler.name == "vllm":
        yield Fault(
            key,
            "got fsdp with sampler=vllm: both want torch's default process group of one process",
            "use sampler=vllm_servers",
        )
    if ":" in opt.device:
        yield Fault(
            key,
            f"got fsdp with learner.device={opt.device}, one device for all ranks",
            "use learner.device=auto",
        )


def _budget(config: Config) -> Iterator[Fault]:
    budget = config.budget
    if budget.seconds is not None and budget.match is not None:
        yield Fault(
            "budget.match",
            f"got {budget.match!r} beside budget.seconds={budget.seconds:g}",
            "a run has one budget: leave one of them out",
        )


def _evaluation(config: Config) -> Iterator[Fault]:
    evaluation = config.evaluation
    if evaluation.samples > 1 and evaluation.temperature == 0:
        yield Fault(
            "evaluation.samples",
            f"got {evaluation.samples} with evaluation.temperature=0: they would all be equal",
            "set evaluation.samples=1, or a temperature above 0",
        )
    if 0 < evaluation.top_p < 1 and evaluation.temperature == 0:
        yield Fault(
            "evaluation.top_p",
            f"got {evaluation.top_p:g} with evaluation.temperature=0: greedy decoding draws nothing",
            "set evaluation.top_p=1, or a temperature above 0",
        )
    for k in evaluation.k:
        yield from outside("evaluation.k", k, COUNT)
    repeated = sorted({k for k in evaluation.k if evaluation.k.count(k) > 1})
    if repeated:
        yield Fault("evaluation.k", f"names {', '.join(map(str, repeated))} more than once")


def _random_model(config: Config) -> Iterator[Fault]:
    model = config.model
    if not model.random or model.path or model.package or model.hub:
        return
    sizes, known = model.random, (*RANDOM_SIZES, "seed")
    yield from (unknown("model.random", name, known) for name in sizes if name not in known)
    absent = [name for name in RANDOM_SIZES if name not in sizes]
    if absent:
        yield Fault("model.random", f"lacks {', '.join(absent)}", f"it has {', '.join(known)}")
    wrong = [name for name in RANDOM_SIZES if name in sizes and sizes[name] < 1]
    yield from (range_fault(f"model.random.{name}", sizes[name], COUNT) for name in wrong)
    if absent or wrong:
        return
    hidden, heads, kv_heads = sizes["hidden_size"], sizes["heads"], sizes["kv_heads"]
    if hidden % (2 * heads):
        yield Fault(
            "model.random.hidden_size",
            f"got {hidden}, must be a multiple of 2 x heads = {2 * heads}",
            "each head's size must be whole and even",
        )
    if heads % kv_heads:
        yield Fault("model.random.kv_heads", f"got {kv_heads}, must divide heads = {heads}")


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
