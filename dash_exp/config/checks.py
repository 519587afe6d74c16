"""What is wrong with a composed config, all at once: values that the schema does not allow, settings that
contradict each other, and files and packages that are not there (`config/environment.py`)."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from dash_exp import plugins
from dash_exp.config.dataset_checks import dataset_faults
from dash_exp.config.environment import TRACES_HINT, Installed, is_installed, missing
from dash_exp.config.held_out import as_typed
from dash_exp.config.schema import (
    COMPLETIONS,
    FILTERS,
    PROMPTS,
    STD_EPSILON,
    Config,
    Key,
    Range,
    dataset_places,
    declared,
    parts_of,
    plain,
)
from dash_exp.errors import Fault, nearest
from dash_exp.plugins import is_reference
from dash_exp.text import hide_credentials

RANDOM_SIZE, MOST_RANDOM_WEIGHTS = Range(1, 65_536), 10**9
RANDOM_SIZES = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
URLS, TRANSFER, WEIGHTS = "cluster.server_urls", "cluster.transfer", "cluster.weights_dir"


def check(config: Config, installed: Installed = is_installed) -> list[Fault]:
    """Every fault of a config; none means that it can be started. `installed` says whether a Python
    package can be imported, without importing it."""
    parts: tuple[Callable[[Config], Iterator[Fault]], ...] = (
        _declared,
        dataset_faults,
        _group,
        _advantages,
        _sampling,
        _arm,
        _filter,
        _updates,
        _supervised,
        _sharding,
        _budget,
        _evaluation,
        _sbatch,
        _random_model,
        server_faults,
    )
    faults = [fault for part in parts for fault in part(config)]
    return as_typed(config, faults + list(missing(config, installed)))


def is_below(key: str, names: Sequence[str]) -> bool:
    """Whether a key is one of these, or lies below one of them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _declared(config: Config) -> Iterator[Fault]:
    """Every value that the schema does not allow, also in datasets inside mappings."""
    yield from declared_faults(config)
    for place, data in dataset_places(config).items():
        if place != "dataset":
            yield from declared_faults(data, f"{place}.")


def declared_faults(part: Any, prefix: str = "") -> Iterator[Fault]:
    """Every value of a config, group or command's settings that is not what its field declares."""
    for where, key, value in declared(part, prefix):
        if key.related or value is None:
            continue
        named = value if isinstance(value, dict) else {"": value}
        for name, inner in named.items():
            for one in inner if isinstance(inner, list) else [inner]:
                yield from _value_faults(f"{where}.{name}" if name else where, key, one)


def _value_faults(where: str, key: Key, value: Any) -> Iterator[Fault]:
    if key.range:
        yield from outside(where, value, key.range)
    if key.plugin and (is_reference(value) or not key.allowed):
        yield from plugins.faults(where, value, key.plugin)
        return
    if not key.allowed or value in key.allowed or (key.pattern and re.fullmatch(key.pattern, value)):
        return
    if value in key.refused:
        yield Fault(where, f"got {value!r}, allowed: {', '.join(key.allowed)}", key.refused[value])
    else:
        fault = unknown(where, value, key.allowed)
        yield replace(fault, hint=f"{fault.hint}, {plugins.ANY_REFERENCE}") if key.plugin else fault


def outside(key: str, value: float, allowed: Range) -> Iterator[Fault]:
    """A fault where a number is out of its range."""
    if not allowed.holds(value):
        yield Fault(key, f"got {plain(value)}, must be {allowed}")


def unknown(key: str, value: object, allowed: tuple[str, ...]) -> Fault:
    return Fault(key, f"got {value!r}", nearest(str(value), allowed))


def _group(config: Config) -> Iterator[Fault]:
    key, size, source = "algorithm.group_size", config.algorithm.group_size, config.algorithm.source
    if source == "sampler" and size < 2:
        hint = "an advantage compares a completion with the others of its prompt; with a single one it is 0"
        yield Fault(key, f"got {size}, must be at least 2", hint)
    batch = size * config.algorithm.prompts_per_step
    if not COMPLETIONS.holds(max(1, batch)):
        what = f"got {plain(size)}: a batch of {plain(batch)} completions, must be {COMPLETIONS}"
        yield Fault(key, what, "lower it, or algorithm.prompts_per_step")
    if source != "sampler" and size != 1:
        hint = "a demonstration is shown once; algorithm.prompts_per_step sets the batch"
        yield Fault(key, f"got {size}, must be 1 with algorithm.source={source}", hint)


def _advantages(config: Config) -> Iterator[Fault]:
    arm, k, size = config.algorithm, config.algorithm.pass_k, config.algorithm.group_size
    if arm.baseline == "best_of_others" and not 2 <= k <= size:
        what = f"got {k}, must be at least 2 and at most algorithm.group_size={size}"
        yield Fault("algorithm.pass_k", what, "for k = 1 use algorithm=rloo")
    if arm.baseline == "batch_mean" and arm.scale in ("std", "mean"):
        what = (
            f"got {arm.scale!r} with algorithm.baseline=batch_mean: in a group of equal rewards it can be 0"
        )
        yield Fault("algorithm.scale", what, "set algorithm.scale=batch_std or none")
    shaped = [key for key, value in shaping(config).items() if value]
    if arm.scale == "mean" and shaped:
        what = f"got {arm.scale!r} with {shaped[0]}, and a mean of shaped rewards can be 0 or less"
        yield Fault("algorithm.scale", what, f"leave {shaped[0]} out, or choose another scale")


def shaping(config: Config) -> dict[str, object]:
    """The keys by which a reward is more than the verifier's score, with their values."""
    keys = {f"{place}.rewards": part.rewards for place, part in parts_of(config.dataset).items()}
    return {"algorithm.overlong_share": config.algorithm.overlong_share, **keys}


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
        what = f"got {call}, which does not divide algorithm.prompts_per_step={prompts}"
        allowed = ", ".join(map(str, divisors(prompts)))
        yield Fault("sampler.prompts_per_call", what, f"allowed: {allowed}")


def divisors(number: int) -> list[int]:
    """None for a number that is out of range anyway."""
    return [n for n in range(1, number + 1) if number % n == 0] if PROMPTS.holds(number) else []


def _arm(config: Config) -> Iterator[Fault]:
    arm, name, schedule = config.algorithm, config.filter.name, config.sampler.schedule
    if name in FILTERS and set(arm.filters) <= set(FILTERS) and arm.filters and name not in arm.filters:
        defined = f"algorithm={arm.name}, which is defined with filter={', '.join(arm.filters)}"
        hint = f"leave filter out, or choose an arm that is defined with filter={name}"
        yield Fault("filter", f"filter={name} contradicts {defined}", hint)
    if schedule != arm.schedule:
        defined = f"algorithm={arm.name}, which is defined with {arm.schedule}"
        hint = "leave sampler.schedule out, or choose another arm"
        yield Fault("sampler.schedule", f"sampler.schedule={schedule} contradicts {defined}", hint)


def _filter(config: Config) -> Iterator[Fault]:
    size, threshold, name = config.algorithm.group_size, config.filter.threshold, config.filter.name
    if name in ("top_k", "max_variance", "variance_top_p") and config.filter.share is None:
        yield Fault("filter.share", f"is not set, but filter={name} keeps that share", "set it, e.g. to 0.5")
    refilling = ("advantage", "zero_variance", "dynamic", "positive", "max_variance")
    if config.filter.refill and name not in refilling:
        what = f"got {config.filter.refill} with filter={name}, which keeps the same share of any batch"
        yield Fault("filter.refill", what, f"leave it out, or choose filter={', '.join(refilling)}")
    matched = name == "random" and config.filter.share is None
    if not (name == "advantage" or matched) or size < 2:
        return
    largest = largest_deviation(size)
    if threshold >= largest:
        what = (
            f"got {threshold:g}, which drops every completion: with group_size={size} and rewards of 0 or 1, "
            f"none is more than {largest:.6g} standard deviations from its group's mean"
        )
        yield Fault("filter.threshold", what, "lower it; 0 drops only advantages that are exactly 0")


def largest_deviation(group_size: int) -> float:
    """The largest distance from the group's mean, in its standard deviations, that rewards of 0 and 1 can
    give: one right answer among wrong ones."""
    std = math.sqrt(1 / group_size)
    return (1 - 1 / group_size) / (std + STD_EPSILON)


def _updates(config: Config) -> Iterator[Fault]:
    arm, size, held = config.algorithm, config.algorithm.mini_batch, config.sampler.max_sequences
    if size is not None and size >= 1 and arm.group_size >= 1:
        prompts = arm.prompts_per_step
        allowed = [arm.group_size * n for n in divisors(prompts)]
        if size not in allowed:
            what = (
                f"got {size}; a mini-batch holds complete groups of {arm.group_size}, and the batch of "
                f"{prompts} groups complete mini-batches"
            )
            yield Fault("algorithm.mini_batch", what, f"allowed: {', '.join(map(str, allowed))}")
    several = {"passes": arm.passes > 1, "mini_batch": (size or 0) > 0}
    if any(several.values()) and arm.surrogate == "policy_gradient":
        key = next(name for name, found in several.items() if found)
        what = f"got {arm.surrogate!r}, must be 'clipped' when algorithm.{key}={getattr(arm, key)}"
        hint = (
            "from the second update on the batch is off-policy: only a ratio corrects it (also clipped_...)"
        )
        yield Fault("algorithm.surrogate", what, hint)
    if 0 < held < arm.group_size:
        what = f"got {held}, less than algorithm.group_size={arm.group_size}"
        yield Fault("sampler.max_sequences", what, "a group is sampled together: raise it")


def _supervised(config: Config) -> Iterator[Fault]:
    arm, data = config.algorithm, config.dataset
    if arm.steps is None and arm.epochs is None:
        yield Fault("algorithm.steps", "got null, and algorithm.epochs is null too", "set one of them")
    if arm.source == "traces" and not data.traces:
        what = "not set, but algorithm.source=traces learns from that file"
        yield Fault("dataset.traces", what, TRACES_HINT)
    if arm.source != "sampler" and config.correction.name != "none":
        what = f"got {config.correction.name!r} with algorithm.source={arm.source}: nothing was sampled"
        yield Fault("correction", what, "leave correction out")
    if arm.source != "sampler" and config.selection.name != "none":
        what = f"got {config.selection.name!r} with algorithm.source={arm.source}: nothing is judged"
        yield Fault("selection", what, "leave selection out")
    if arm.source == "traces" and data.mix:
        hint = "choose algorithm=sft_h, or one dataset"
        yield Fault("dataset.mix", "a mixture has no traces: they are of one dataset", hint)


def _sharding(config: Config) -> Iterator[Fault]:
    learner = config.learner
    if learner.sharding != "fsdp":
        return
    sampler, device = config.sampler.name, learner.device
    group = "both need torch's default process group of one process"
    adapters = "adapters leave hardly anything to share out: leave learner.sharding out"
    rows = (
        (learner.ranks == 1, "learner.ranks=1: no other rank shares the weights", "raise learner.ranks"),
        (learner.precision == "bf16", "learner.precision=bf16: sums are rounded", "use bf16_mixed or fp32"),
        (learner.lora.rank > 0, "learner.lora.rank above 0", adapters),
        (sampler == "vllm", f"sampler=vllm: {group}", "use sampler=vllm_servers"),
        (":" in device, f"learner.device={device}, one device for all ranks", "use learner.device=auto"),
    )
    for wrong, what, hint in rows:
        if wrong:
            yield Fault("learner.sharding", f"got fsdp with {what}", hint)


def _budget(config: Config) -> Iterator[Fault]:
    budget = config.budget
    if budget.seconds is not None and budget.match is not None:
        what = f"got {budget.match!r} beside budget.seconds={budget.seconds:g}"
        yield Fault("budget.match", what, "a run has one budget: leave one of them out")
    if budget.unit != "seconds" and budget.match is None:
        yield Fault("budget.unit", f"got {budget.unit} without budget.match", "set that, or leave this out")
    if budget.unit == "tokens" and config.algorithm.source != "sampler":
        hint = "set it to backpropagated, updates or seconds"
        yield Fault("budget.unit", "got tokens, but a supervised arm samples none", hint)


SET_BY_US = (
    *("job-name", "time", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "account", "partition", "qos"),
    *("constraint", "signal", "dependency", "array", "output", "error", "requeue", "open-mode", "wckey"),
)
"""Options of sbatch that other keys decide."""


def _sbatch(config: Config) -> Iterator[Fault]:
    for name, value in config.cluster.sbatch.items():
        place = f"cluster.sbatch.{name}"
        if not re.fullmatch(r"[a-z][a-z-]*", name):
            yield Fault(
                place, "is not the long name of an option of sbatch", "write it without dashes before"
            )
        elif name in SET_BY_US:
            hint = f"set cluster.{name} instead" if hasattr(config.cluster, name) else "leave it out"
            yield Fault(place, "is set from the cell and from other keys", hint)
        if value is False or not isinstance(value, str | int | float) or not str(value).isprintable():
            yield Fault(place, f"got {value!r}, expected a number, true or a text of one line")


def _evaluation(config: Config) -> Iterator[Fault]:
    evaluation = config.evaluation
    if evaluation.samples > 1 and evaluation.temperature == 0:
        what = f"got {evaluation.samples} with evaluation.temperature=0: they would all be equal"
        yield Fault("evaluation.samples", what, "set evaluation.samples=1, or a temperature above 0")
    if 0 < evaluation.top_p < 1 and evaluation.temperature == 0:
        what = f"got {evaluation.top_p:g} with evaluation.temperature=0: greedy decoding draws nothing"
        yield Fault("evaluation.top_p", what, "set evaluation.top_p=1, or a temperature above 0")
    repeated = sorted({k for k in evaluation.k if evaluation.k.count(k) > 1})
    if repeated:
        yield Fault("evaluation.k", f"names {', '.join(map(str, repeated))} more than once")


def _random_model(config: Config) -> Iterator[Fault]:
    model, sizes, known = config.model, config.model.random, (*RANDOM_SIZES, "seed")
    if not sizes or model.path or model.package or model.hub:
        return
    yield from (unknown("model.random", name, known) for name in sizes if name not in known)
    absent = [name for name in RANDOM_SIZES if name not in sizes]
    if absent:
        yield Fault("model.random", f"lacks {', '.join(absent)}", f"it has {', '.join(known)}")
    wrong = [
        fault
        for name in RANDOM_SIZES
        if name in sizes
        for fault in outside(f"model.random.{name}", sizes[name], RANDOM_SIZE)
    ]
    yield from wrong
    if absent or wrong:
        return
    hidden, heads, kv_heads = sizes["hidden_size"], sizes["heads"], sizes["kv_heads"]
    if hidden % (2 * heads):
        what = f"got {hidden}, must be a multiple of 2 x heads = {2 * heads}"
        yield Fault("model.random.hidden_size", what, "each head's size must be whole and even")
    if heads % kv_heads:
        yield Fault("model.random.kv_heads", f"got {kv_heads}, must divide heads = {heads}")
    weights = sizes["layers"] * hidden * (4 * hidden + 3 * sizes["intermediate_size"])
    if weights > MOST_RANDOM_WEIGHTS:
        what = f"makes a model of {weights / 1e9:.3g} billion weights, at most {MOST_RANDOM_WEIGHTS / 1e9:g}"
        yield Fault("model.random", what, "it is meant for tests: lower hidden_size or layers")


def server_faults(config: Config) -> Iterator[Fault]:
    """What is wrong with the servers and the way weights get to them."""
    c, urls, colocated = config.cluster, config.cluster.server_urls, config.sampler.colocated
    if config.sampler.name != "vllm_servers":
        return
    for url in urls:
        if hide_credentials(url) != url:
            hint = "write http://host:port; the key goes into the variable DASH_SERVER_KEY"
            yield Fault(URLS, f"{hide_credentials(url)} holds a user, password or token", hint)
        elif not _is_address(url):
            yield Fault(URLS, f"{url!r} is not the address of a server", "write http://host:port")
    repeated = sorted({url for url in urls if urls.count(url) > 1})
    if repeated:
        yield Fault(URLS, f"names {', '.join(repeated)} more than once")
    far = [url for url in urls if _is_address(url) and not is_loopback(url)]
    if far and not c.weights_dir and c.transfer in ("auto", "shared"):
        what = f"is not set, but {far[0]} does not share this machine's memory"
        hint = "name a folder that both see; between GPUs also cluster.transfer=nccl"
        yield Fault(WEIGHTS, what, hint)
    elif c.transfer == "file" and not c.weights_dir:
        yield Fault(WEIGHTS, "is not set, but cluster.transfer=file writes weights there")
    if c.transfer in ("nccl", "ipc") and config.learner.device == "cpu":
        yield Fault(TRANSFER, f"{c.transfer} is between GPUs, but learner.device=cpu", "set it to auto")
    if c.transfer == "ipc" and not colocated:
        hint = "set sampler.colocated=true, or cluster.transfer=nccl"
        yield Fault(TRANSFER, "ipc is within the GPU that learner and server share", hint)
    servers = len(urls) or config.sampler.servers
    if c.transfer == "ipc" and colocated and servers != 1:
        what = f"ipc reaches one GPU, but there are {servers} servers"
        yield Fault(TRANSFER, what, "set cluster.transfer=auto")
    if c.transfer == "nccl" and colocated:
        what = "nccl needs a GPU for each side, but sampler.colocated=true"
        yield Fault(TRANSFER, what, "set cluster.transfer=auto")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        plain_address = not (parts.username or parts.password or parts.query or parts.fragment)
        return parts.scheme in ("http", "https") and bool(parts.hostname and parts.port) and plain_address
    except ValueError:  # the port is not a number
        return False


def is_loopback(url: str) -> bool:
    """Whether an address can be reached from this machine only."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
