"""Every config key, declared once: type, allowed values or range, and one line of meaning.

Values live in `conf/`. Hydra fills `Config` from there (see `conf/config.yaml`), `config/checks.py` checks it
against what is declared here, and the command line's help and `docs/config.md` are made from it. A config is
not changed after it was composed: `changed` makes a copy.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING, OmegaConf

from dash_exp.plugins import find, is_reference, load_rows

BASELINES = ("group_mean", "leave_one_out", "batch_mean", "best_of_others")
SCALES = ("std", "none", "batch_std", "mean")
STD_EPSILON = 1e-4
"""Added to a group's standard deviation before dividing by it."""
SURROGATES = ("policy_gradient", "clipped", "clipped_sequence", "clipped_weight")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
KL_ESTIMATORS = ("k2", "k3")
NO_K1 = (
    "as a term of the loss, k1's expected gradient is 0: it would regularise nothing; k2's is what k1 gives "
    "as a penalty on the reward"
)
AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
SCHEDULES = ("preemptive", "per_microbatch")
LR_SCHEDULES = ("linear", "constant")
SOURCES = ("sampler", "solutions", "traces")
DEVICES = ("auto", "cpu", "cuda", "cuda:0")
FIRST_FILTERS = ("none", "advantage", "zero_variance")
FILTERS = (*FIRST_FILTERS, "random", "positive", "top_k", "max_variance", "variance_top_p", "dynamic")
KINDS = ("jsonl", "arithmetic", "chain", "chain_far", "digits", "functions", "reasoning_gym")
CHATS = ("chat", "chat_boxed")
TEMPLATES = ("bare", "problem_solution", "docstring", "few_shot", "answer_tag", *CHATS)
VERIFIERS = ("math", "math_verify", "integer", "code", "reasoning_gym")
MATH_EXTRACTIONS = ("boxed", "boxed_or_last", "last_number", "hash", "whole")
EXTRACTIONS = (*MATH_EXTRACTIONS, "first_integer", "program", "last_block", "answer_tag")
SANDBOXES = ("auto", "bwrap", "limits")
BUDGET_UNITS = ("seconds", "tokens", "backpropagated", "updates")
TRANSFERS = ("auto", "shared", "file", "nccl", "ipc")


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of finite numbers; `open_low` and `open_high` leave its ends out."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and value != math.inf

    def __str__(self) -> str:
        low = f"{'more than' if self.open_low else 'at least'} {plain(self.low)}"
        if self.high == math.inf:
            return low
        return f"{low} and {'less than' if self.open_high else 'at most'} {plain(self.high)}"


def plain(value: float) -> str:
    """A number in a message; of an enormous one only how many digits it has."""
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else f"a number of {len(str(abs(value)))} digits"
    return f"{value:g}"


NATURAL = Range(0)
COUNT = Range(1)
POSITIVE = Range(0, open_low=True)
INSIDE_UNIT = Range(0, 1, open_low=True, open_high=True)
SHARE = Range(0, 1, open_low=True)
BELOW_ONE = Range(0, 1, open_high=True)
# Upper bounds: far above any sensible value, and below what would hang a machine.
SEED = Range(0, 2**63 - 1)
SECONDS = Range(0, 10**7, open_low=True)
HOURS = Range(0, 8784, open_low=True)
MEMORY_GB = Range(0, 10**6, open_low=True)
STEPS, SOME_STEPS = Range(0, 10**8), Range(1, 10**8)
PROMPTS = Range(1, 10**5)
COMPLETIONS = Range(1, 10**6)
TOKENS = Range(1, 2**24)
THREADS = Range(1, 1024)
GPUS = Range(0, 65_536)
RELATED = None
"""In place of a range: what is allowed depends on other keys, see `config/checks.py`."""


@dataclass(frozen=True, slots=True)
class Key:
    """What is declared of a key beside its type. `related`: what is allowed depends on other keys, see
    `config/checks.py`. `refused`: a name that people try, and why it is not allowed. `example`: a value for
    the list of common keys in the command line's help. `plugin`: the kind of function that it may name
    instead (`dash_exp/plugins/`)."""

    meaning: str
    allowed: tuple[str, ...] = ()
    pattern: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    range: Range | None = None
    related: bool = False
    example: str | None = None
    plugin: str = ""


def _declare(key: Key, default: Any) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"key": key})
    return field(default=default, metadata={"key": key})


def setting(meaning: str, default: Any = MISSING, example: str | None = None) -> Any:
    """A text, a flag, a list or a mapping."""
    return _declare(Key(meaning, example=example), default)


def choice(*allowed: str, meaning: str, default: Any = MISSING, **more: Any) -> Any:
    """One name of several, or a list of them. `more`: of `Key`."""
    return _declare(Key(meaning, allowed, **more), default)


def number(range: Range | None, meaning: str, default: Any = MISSING, example: str | None = None) -> Any:
    """A number in a range, or a list or mapping of them."""
    return _declare(Key(meaning, range=range, related=range is None, example=example), default)


class Constant:
    """A dataclass whose fields are set once. (OmegaConf cannot fill mappings of frozen dataclasses.)"""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise AttributeError(f"{name}: a config is never assigned to, `changed` makes a copy")
        super().__setattr__(name, value)


@dataclass
class ModelConfig(Constant):
    """Where the weights come from: the first that is set of `path`, `package`, `hub` and `random`."""

    name: str = setting("the model's name, part of the cell's")
    path: str | None = setting("a local Hugging Face folder", None, example="my_model")
    package: str | None = setting("a Python package that carries a GGUF file", None)
    package_file: str | None = setting("the GGUF file in `package`", None)
    hub: str | None = setting("a name on the model hub", None)
    revision: str | None = setting("a commit of `hub`, so that a result can be repeated", None)
    random: dict[str, int] = number(RELATED, "sizes of a random Llama over single characters, for tests", {})
    shape: dict[str, Any] = setting("sizes, to plan memory with before the model is there", {})
    add_bos: bool = setting("put the tokenizer's begin token before a prompt", False)
    memory_gb: float = number(MEMORY_GB, "memory that a run needs, requested from a cluster", 8.0)
    hours: float = number(HOURS, "time that a run needs, requested from a cluster", 1.0)


@dataclass
class AlgorithmConfig(Constant):
    """An arm: how one update is computed. Its sizes (`steps` to `group_size`) come from the recipe."""

    name: str = setting("the arm's name, part of the cell's")
    steps: int | None = number(STEPS, "batches; null: as many as `epochs` make", example="30")
    epochs: float | None = number(
        Range(0, 10**6, open_low=True), "how often every prompt is used, where `steps` is null", None
    )
    prompts_per_step: int = number(PROMPTS, "prompts of a batch", example="16")
    group_size: int = number(RELATED, "completions of a prompt", example="8")
    source: str = choice(*SOURCES, meaning="completions: sampled, the dataset's (SFT-H), a teacher's (SFT-M)")
    baseline: str = choice(*BASELINES, meaning="what is subtracted from a reward", plugin="advantage")
    scale: str = choice(*SCALES, meaning="what the difference is divided by")
    pass_k: int = number(RELATED, "k of `baseline: best_of_others`", 2)
    surrogate: str = choice(
        *SURROGATES, meaning="-A log pi, or PPO's, GSPO's or CISPO's clip of the ratio", plugin="surrogate"
    )
    clip_low: float = number(SHARE, "the ratio is clipped at 1 - this; 1: not from below")
    clip_high: float = number(POSITIVE, "the ratio is clipped at 1 + this")
    beta: float = number(NATURAL, "weight of the KL term; 0: no reference model")
    beta_schedule: str = choice("constant", "linear", meaning="linear: to 0 over the planned steps")
    kl: str = choice(*KL_ESTIMATORS, meaning="estimator of the KL term", refused={"k1": NO_K1})
    entropy: float = number(NATURAL, "weight of the entropy bonus", 0.0)
    entropy_schedule: str = choice(
        "constant", "linear", meaning="linear: to 0 over the planned steps", default="constant"
    )
    overlong_share: float = number(
        Range(0, 1), "last part of `max_new_tokens` in which the reward falls by 1; 0: none", 0.0
    )
    mask_truncated: bool = setting("do not learn from completions that were cut", False)
    aggregation: str = choice(*AGGREGATIONS, meaning="what sums over tokens are divided by (docs/arms.md)")
    passes: int = number(Range(1, 1000), "updates over the full batch: 1, or K for PPO-Multi")
    mini_batch: int | None = number(COMPLETIONS, "completions of one update (PPO-Mini); null: the batch")
    schedule: str = choice(*SCHEDULES, meaning="all prompts of a batch at once, or some after the others")
    filters: list[str] = choice(*FILTERS, meaning="filters that fit the arm's definition; empty: all")


@dataclass
class SamplerConfig(Constant):
    """How completions are sampled."""

    name: str = choice("hf", "vllm", "vllm_servers", meaning="the engine")
    max_new_tokens: int = number(TOKENS, "longest completion", example="6")
    temperature: float = number(POSITIVE, "divides the logits", example="1.0")
    top_p: float = number(RELATED, "must be 1 in training")
    top_k: int = number(RELATED, "must be 0 in training")
    schedule: str = choice(*SCHEDULES, meaning="must be the arm's")
    prompts_per_call: int = number(PROMPTS, "prompts sampled at a time with `schedule: per_microbatch`")
    streaming: bool = setting("backpropagate finished groups while others are sampled (one-update arms)")
    max_sequences: int = number(COMPLETIONS, "completions decoded at once; bounds the memory of the KV cache")
    dtype: str = choice(
        "bfloat16", "float16", "float32", meaning="vLLM only; `hf` shares the learner's weights"
    )
    kv_cache_gb: float = number(MEMORY_GB, "vLLM on CPU: memory of the KV cache (of each server)")
    gpu_memory_utilization: float | None = number(
        SHARE, "vLLM on a GPU: share of its memory; null: what the learner leaves, at most what is needed"
    )
    enforce_eager: bool = setting("vLLM on a GPU: no CUDA graphs, which sample faster after a longer start")
    servers: int = number(THREADS, "`vllm_servers`: servers to start, one GPU each, or on the CPU")
    server_threads: int | None = number(THREADS, "on CPU; null: half of all while streaming, else all", None)
    colocated: bool = setting("servers share the learner's GPUs and sleep while it learns")
    waves: int = number(Range(1, 10_000), "while streaming: parts a batch is requested in (docs/engine.md)")
    restarts: int = number(Range(0, 10_000), "restarts of servers, in all")
    stall_s: float = number(SECONDS, "a server that returns no pending token for so long has failed")


@dataclass
class FilterConfig(Constant):
    """Which completions are dropped before any forward pass."""

    name: str = choice(*FILTERS, meaning="the filter; an arm says which fit it", plugin="filter")
    threshold: float = number(NATURAL, "keep |advantage| above this, in std of the group", example="0.1")
    share: float | None = number(SHARE, "what is kept; of what, says `docs/arms.md`", None)
    signal: str = choice(
        "outcome",
        "reward",
        meaning="what it looks at: the verifier's score, or also what is added to it",
        default="outcome",
    )
    kl: str = choice("drop", "keep", meaning="keep: dropped completions are forwarded for the KL term")
    denominator: str = choice("all", "kept", meaning="divide by all completions sampled, or by the kept ones")
    refill: int = number(Range(0, 100), "rounds of fresh prompts at most that replace what is dropped", 0)


@dataclass
class SelectionConfig(Constant):
    """Which prompts are asked, by what earlier groups of theirs taught."""

    name: str = choice("none", "greso", meaning="greso: skip what was all right or all wrong", default="none")
    explore: float = number(Range(0, 1), "first probability of asking such a prompt again", 0.5)
    adjust: float = number(Range(0, 1), "by how much it moves after a step", 0.01)
    easy_share: float = number(Range(0, 1), "groups all right that it moves towards", 0.0833)
    hard_share: float = number(Range(0, 1), "groups all wrong that it moves towards", 0.1667)


@dataclass
class CorrectionConfig(Constant):
    """Weights against the gap between sampler and learner (`policy/logprob_gap`)."""

    name: str = choice(*CORRECTIONS, meaning="what bounds the ratio of their probabilities", default="none")
    floor: float = number(BELOW_ONE, "least ratio; 0: none", 0.0)
    cap: float = number(Range(1, open_low=True), "largest ratio", 2.0)


@dataclass
class DatasetConfig(Constant):
    """Where prompts come from, and how an answer is judged."""

    name: str = setting("the dataset's name, part of the cell's")
    kind: str = choice(*KINDS, meaning="jsonl: a file or the hub; the others are generated", plugin="loader")
    path: str | None = setting("a JSON-lines file of your own (problem, answer)", None, "my.jsonl")
    file: str | None = setting("a file name below `paths.data`; wins over `hub`", None)
    hub: str | None = setting("a dataset on the hub", None)
    hub_config: str | None = setting("its configuration there", None)
    hub_split: str | None = setting("its split there", None)
    revision: str | None = setting("a tag or commit of the hub's dataset; null: the newest", None)
    streaming: bool = setting("fetch only the first `limit` rows from the hub", False)
    test_path: str | None = setting("your held-out file: the run is evaluated on it", None, "my_test.jsonl")
    test_split: str | None = setting("the same for a split on the hub, or of a loader", None)
    fields: dict[str, list[str]] = setting("our field to its names in a source (docs/datasets.md)", {})
    answer_after: str | None = setting("the answer follows the last of these marks", None)
    solution_drop: str | None = setting("regular expression: removed from worked solutions", None)
    id_prefix: str = setting("put before ids that are plain numbers", "")
    id_range: list[int] = number(RELATED, "first and last number at the end of the ids used; empty: all", [])
    tests_call: str | None = setting("code: appended to tests that lack it", None)
    timeouts: dict[str, float] = number(SECONDS, "code: seconds of processor time for single ids", {})
    task: str | None = setting("`reasoning_gym`: the name of the task", None)
    task_options: dict[str, Any] = setting("settings of a `reasoning_gym` task, or a loader's `options`", {})
    size: int | None = number(Range(1, 10**7), "`reasoning_gym`: different questions", None)
    traces: str | None = setting("`sft_m`: the file that `dash_exp.traces` wrote", None)
    weight: float = number(POSITIVE, "share of the training prompts in a mixture", 1.0)
    mix: dict[str, DatasetConfig] = setting("datasets mixed into this one, by a label", {})
    split: str = choice("train", "test", meaning="generated datasets make disjoint ones")
    limit: int | None = number(COUNT, "use the first so many prompts", None)
    template: str = choice(
        *TEMPLATES, meaning="how a problem becomes a prompt (`tasks/templates.py`)", plugin="template"
    )
    system: str | None = setting("chats: a system prompt, also of held-out sets that have none", None)
    chat_arguments: dict[str, Any] = setting(
        "chats: arguments of the model's chat template, in the same way", {}
    )
    shots: list[dict[str, str]] = setting("`few_shot`: worked examples, each with problem and solution", [])
    stop: list[str] = setting("a completion ends after one of these; each is a single token", [])
    verifier: str = choice(
        *VERIFIERS, meaning="what judges an answer; which fit depends on `kind`", plugin="reward"
    )
    rewards: list[str] = choice(meaning="added to its score in training", default=[], plugin="reward")
    reward_weights: list[float] = number(
        Range(-(10**6), 10**6), "a weight for each of `rewards`; empty: all 1", []
    )
    extraction: str = choice(*EXTRACTIONS, meaning="what is judged; depends on `verifier`", related=True)
    max_prompt_tokens: int = number(TOKENS, "longer prompts are left out")
    completion_tokens: int = number(TOKENS, "room for a short answer: what `recipe=small` samples at most")
    max_new_tokens: int | None = number(TOKENS, "when evaluating on this set; null: as in training", None)


@dataclass
class RecipeConfig(Constant):
    """Sizes of the supervised arms; a recipe's other values go into the other groups."""

    name: str = setting("the recipe's name")
    sft_steps: int | None = number(STEPS, "steps of the supervised arms; null: `sft_epochs`")
    sft_epochs: float | None = number(Range(0, 10**6, open_low=True), "epochs of the supervised arms")
    sft_batch: int = number(PROMPTS, "demonstrations per step")
    sft_lr: float = number(POSITIVE, "learning rate of the supervised arms")


@dataclass
class LoraConfig(Constant):
    """Low-rank adapters beside frozen weights (Hu et al. 2021), by peft."""

    rank: int = number(Range(0, 65_536), "train adapters instead of all weights; 0: off", 0, example="16")
    alpha: float = number(POSITIVE, "the adapters' product is scaled by alpha / rank", 32.0)
    targets: list[str] = setting("linear layers with adapters; empty: all but the output layer", [])


@dataclass
class LearnerConfig(Constant):
    """The optimizer, its precision, and how a batch is cut (which never changes the result)."""

    lr: float = number(POSITIVE, "learning rate", example="3e-5")
    schedule: str = choice(*LR_SCHEDULES, meaning="linear: to 0 over the planned updates")
    warmup_share: float = number(BELOW_ONE, "share of the updates over which the rate rises")
    weight_decay: float = number(NATURAL, "AdamW's")
    beta1: float = number(BELOW_ONE, "AdamW's")
    beta2: float = number(BELOW_ONE, "AdamW's")
    eps: float = number(POSITIVE, "AdamW's")
    max_grad_norm: float = number(POSITIVE, "global norm at which the divided gradient is clipped")
    precision: str = choice(
        "bf16_mixed",
        "fp16_mixed",
        "fp32",
        "bf16",
        meaning="mixed: fp32 master weights, 16 bits compute (fp16: the loss is scaled)",
    )
    freeze_embeddings: bool = setting("do not train the embeddings")
    lora: LoraConfig = field(default_factory=LoraConfig)
    micro_batch_tokens: int = number(Range(1, 10**9), "what fits one pass; never changes the result")
    logit_chunk: int = number(Range(1, 10**9), "rows of logits held at once")
    gradient_checkpointing: bool = setting("recompute activations instead of storing them")
    preflight: bool = setting("first try the largest micro-batch of the longest samples: does it fit?")
    deterministic: bool = setting("micro-batches in prompt order, not in the order in which groups finish")
    device: str = choice(*DEVICES, meaning="auto: cuda where there is one, else cpu", pattern=r"cuda:\d+")
    ranks: int = number(THREADS, "data-parallel processes, one device each")
    sharding: str = choice("none", "fsdp", meaning="fsdp: weights in parts", default="none")
    timeout_s: float = number(SECONDS, "a rank that does not answer for so long has failed")


@dataclass
class EvaluationConfig(Constant):
    """When and on what the model is evaluated."""

    name: str = setting("the evaluation's name")
    before: bool = setting("evaluate the base model", True)
    after: bool = setting("evaluate at the end", True)
    every: int = number(STEPS, "steps between evaluations; 0: only before and after", 0)
    samples: int = number(PROMPTS, "completions of an evaluated prompt", 1, "8")
    temperature: float = number(NATURAL, "0: greedy", 0.0)
    top_p: float = number(SHARE, "share of the probability that is sampled from", 1.0)
    k: list[int] = number(PROMPTS, "pass@k for these k; no value where k > samples", [], example="[1,8]")
    template: str | None = choice(
        *TEMPLATES, meaning="of every set; null: each set's own", default=None, plugin="template"
    )
    limit: int | None = number(COUNT, "use the first so many prompts of each set", None)
    sets: dict[str, DatasetConfig] = setting("a label to a dataset", {})


@dataclass
class CheckpointConfig(Constant):
    """When a resumable checkpoint is written, and how many are kept."""

    every: int = number(STEPS, "steps between two; 0: only when interrupted and at the end")
    minutes: float | None = number(
        Range(0, 10**6, open_low=True), "and after so many minutes without one; null: never", None
    )
    keep: int = number(SOME_STEPS, "checkpoints kept while running")
    push_to: str | None = setting(
        "the hub's `owner/name`, or `owner`: where the last one goes with a model card", None
    )


@dataclass
class VerifierConfig(Constant):
    """The pool of worker processes that judge answers."""

    workers: int = number(Range(1, 512), "worker processes")
    timeout_s: float = number(SECONDS, "per verdict, from its start; for programs: of processor time")
    memory_mb: int = number(Range(512, 10**7), "memory of a worker")
    sandbox: str = choice(*SANDBOXES, meaning="of programs (docs/verdicts.md)", default="auto")


@dataclass
class TrackingConfig(Constant):
    """A mirror of the records, for people who look at many runs. No run depends on it."""

    mlflow: bool = setting("mirror to MLflow", False)
    wandb: bool = setting("mirror to Weights & Biases; offline without its key", False)
    tensorboard: bool = setting("write event files for TensorBoard", False)
    uri: str | None = setting("of MLflow; null: MLFLOW_TRACKING_URI, else a SQLite file in run.dir", None)
    experiment: str = setting("MLflow's experiment, or the project of W&B", "dash_exp")
    every_s: float = number(SECONDS, "seconds between two batches of a running cell", 30.0)


@dataclass
class ClusterConfig(Constant):
    """Where cells run, and what each may use there."""

    name: str = choice("local", "slurm", meaning="this machine, or a SLURM cluster")
    threads: int | None = number(THREADS, "CPU threads of a run; null: all (in a sweep: an equal part)", None)
    server_urls: list[str] = setting("running vLLM servers to use; their key: DASH_SERVER_KEY", [])
    transfer: str = choice(*TRANSFERS, meaning="weights to servers; auto: what fits", default="auto")
    weights_dir: str | None = setting("a folder that learner and servers see, for weights", None)
    gpus: int | None = number(GPUS, "of a cell; null: one for each learner and server", None)
    gpus_per_node: int = number(THREADS, "GPUs of a node")
    cpus: int | None = number(Range(1, 65_536), "of a cell; null: `cpus_per_gpu` for each GPU", None)
    cpus_per_gpu: int = number(THREADS, "CPUs for each GPU, and the least that a cell gets")
    memory_gb: float | None = number(MEMORY_GB, "memory of a cell on a node; null: the model's", None)
    hours: float | None = number(HOURS, "a cell's time limit for one job; null: the model's", None)
    cells_per_gpu: int = number(THREADS, "small cells that share a GPU")
    gpu_gb: float | None = number(
        MEMORY_GB, "memory of a GPU, as its name says; null: this machine's, 80 on a cluster", None
    )
    max_parallel: int | None = number(
        PROMPTS, "jobs of a sweep at the same time; null: no limit of ours", None
    )
    account: str | None = setting("SLURM's account", None)
    partition: str | None = setting("SLURM's partition", None)
    qos: str | None = setting("SLURM's quality of service", None)
    constraint: str | None = setting("SLURM's constraint", None)
    setup: list[str] = setting("shell lines before a cell is started, e.g. `module load cuda`", [])
    sbatch: dict[str, Any] = setting("SLURM's other options, by their long names: `{reservation: x}`", {})
    warning_s: int = number(Range(1, 65_535), "seconds before a time limit at which a cell saves and stops")
    requeues: int = number(Range(0, 10_000), "requeues after a time limit, a preemption or a lost node")
    retries: dict[str, int] = number(
        Range(0, 10_000), "restarts after a failure of each class (docs/sweeps.md)", {}
    )


@dataclass
class BudgetConfig(Constant):
    """When training stops before its last step."""

    seconds: float | None = number(
        Range(0, 10**9, open_low=True), "stop after so much training time", None, "3600"
    )
    match: str | None = setting("train as long as the same cell with another arm", None, "dash")
    unit: str = choice(*BUDGET_UNITS, meaning="what `match` makes equal", default="seconds")


@dataclass
class RunConfig(Constant):
    """Actions and places. Never part of a cell's identity."""

    dir: str = setting("where records go", example="outputs")
    force: bool = setting("archive the record of this cell and start anew", example="true")
    progress: str = choice("auto", "plain", "none", meaning="auto: live on a terminal, plain lines elsewhere")
    partner: str | None = setting("the partner's command; set by the program, to be shown", None)
    command: str | None = setting("this run's command; set by the program, to be shown", None)
    sweep: str | None = setting("with -m: the sweep's name; null: made from what is varied", None)
    profile: int = number(STEPS, "steps of this attempt, after its first, that torch's profiler traces", 0)
    until_step: int | None = number(SOME_STEPS, "pause after this step; the next start goes on", None, "10")


@dataclass
class PathsConfig(Constant):
    """Folders of this machine."""

    data: str | None = setting("a folder of dataset files (default: DASH_DATA)", None, "data")


@dataclass
class Config(Constant):
    """One cell, and how to run it."""

    seed: int = number(SEED, "every random choice of the run", example="0")
    hardware: str | None = setting("kind of machine, where the result is a time; set by sweeps", None)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    run: RunConfig = field(default_factory=RunConfig)


ACTIONS = ("run", "tracking", "cluster", "paths")
"""Groups that cannot change a result: left out of a cell's identity and of its frozen file."""
PUSH_TO = "checkpoint.push_to"
"""A key of another group that cannot either."""


def is_action(key: str) -> bool:
    """Whether a key cannot change a result."""
    return key.partition(".")[0] in ACTIONS or key == PUSH_TO


def without_actions(config: Config) -> dict[str, Any]:
    """A config as plain values, without what cannot change a result."""
    plain = {key: value for key, value in dataclasses.asdict(config).items() if key not in ACTIONS}
    del plain["checkpoint"]["push_to"]
    return plain


def dataset_places(config: Config) -> dict[str, DatasetConfig]:
    """The datasets of a run by the key that holds them: what it trains on, then what it is evaluated on."""
    return {**parts_of(config.dataset), **evaluation_places(config)}


def parts_of(data: DatasetConfig) -> dict[str, DatasetConfig]:
    """The training datasets: the dataset itself, then what is mixed in, by label, so that the order in
    which a config names them changes nothing."""
    return {"dataset": data, **{f"dataset.mix.{label}": data.mix[label] for label in sorted(data.mix)}}


def evaluation_places(config: Config) -> dict[str, DatasetConfig]:
    return {f"evaluation.sets.{label}": data for label, data in config.evaluation.sets.items()}


def own_functions(config: Config) -> Iterator[tuple[str, str, str | list[str]]]:
    """Every key that names functions of the user's own, their kind, and its value."""
    places = {**{f"{place}.": one for place, one in dataset_places(config).items()}, "": config}
    places.pop("dataset.")
    for prefix, part in places.items():
        for where, key, value in declared(part, prefix):
            if key.plugin and any(map(is_reference, value if isinstance(value, list) else [value])):
                yield where, key.plugin, value


def own_rows(data: DatasetConfig) -> tuple[str, ...]:
    """The rows of a loader of the user's own, as JSON."""
    options = json.dumps(data.task_options, sort_keys=True)
    return load_rows(str(find(data.kind, "kind")), data.hub_split or data.split, options)


def with_references(config: Config, change: Callable[[str], str]) -> Config:
    """A copy in which every reference to a function of the user's own is changed."""

    def changed_value(value: str | list[str]) -> str | list[str]:
        return change(value) if isinstance(value, str) else [change(one) for one in value]

    found = {where: changed_value(value) for where, _, value in own_functions(config)}
    made = changed(config, found)
    assert isinstance(made, Config)
    return made


def declared(part: Any, prefix: str = "") -> Iterator[tuple[str, Key, Any]]:
    """Every key of a config or group, what is declared of it, and its value. Not those inside mappings."""
    for one in fields(part):
        value = getattr(part, one.name)
        if dataclasses.is_dataclass(value):
            yield from declared(value, f"{prefix}{one.name}.")
        elif "key" in one.metadata:
            yield f"{prefix}{one.name}", one.metadata["key"], value


def changed(part: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a config, group or mapping with other values, by dotted key. Shares what does not change."""
    for key, value in values.items():
        name, _, rest = key.partition(".")
        old = part.get(name) if isinstance(part, dict) else getattr(part, name)
        new = changed(old, {rest: value}) if rest else value
        part = {**part, name: new} if isinstance(part, dict) else dataclasses.replace(part, **{name: new})
    return part


def to_config(composed: Any) -> Config:
    """The typed config of a composed Hydra config, every interpolation resolved.

    Raises omegaconf errors for a missing or ill-typed value.
    """
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
    assert isinstance(config, Config)
    return config
