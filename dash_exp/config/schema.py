"""Every setting of a run, one dataclass per config group. Values live in `conf/`, types here.

Hydra fills `Config` (see `conf/config.yaml`), `OmegaConf.to_object` turns it into these classes, and
`train/build.py` passes plain arguments on: no other module reads the config. Checks across fields are in
`config/checks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """Where the weights come from; exactly one of `path`, `package`, `hub`, `random` is used, in that
    order, so `model.path=` wins over what an option names."""

    name: str = MISSING
    path: str | None = None
    """A local Hugging Face folder (config.json, safetensors, tokenizer)."""
    package: str | None = None
    """A Python package that carries a GGUF file, named in `package_file`."""
    package_file: str | None = None
    hub: str | None = None
    """A model hub name, with `revision` (a commit, for a result that can be repeated)."""
    revision: str | None = None
    random: dict[str, int] = field(default_factory=dict)
    """Sizes of a randomly initialised Llama over single characters, for tests; empty: not used."""
    add_bos: bool = False
    """Let the tokenizer put its begin token before a prompt."""
    memory_gb: float = 8.0
    """Of a machine's memory that a run of this size needs; what a cluster is asked for."""
    hours: float = 1.0
    """Which a run of this size may take; what a cluster is asked for."""


@dataclass
class AlgorithmConfig:
    """An arm: what the update is. Sizes (`steps` to `group_size`) come from the recipe."""

    name: str = MISSING
    steps: int | None = MISSING
    """Sampled (or shown) batches; null: as many as `epochs` make."""
    epochs: float | None = None
    """How often every prompt (or demonstration) comes, where `steps` is null."""
    prompts_per_step: int = MISSING
    group_size: int = MISSING
    source: str = MISSING
    """Where completions come from: `sampler` (the policy itself), `solutions` (the dataset's worked
    ones: SFT-H), `traces` (`dataset.traces`: SFT-M)."""
    baseline: str = MISSING
    scale: str = MISSING
    surrogate: str = MISSING
    clip_low: float = MISSING
    clip_high: float = MISSING
    beta: float = MISSING
    beta_schedule: str = MISSING
    """`constant`, or `linear`: to 0 over the planned steps."""
    kl: str = MISSING
    aggregation: str = MISSING
    passes: int = MISSING
    """How often the sampled batch is gone through: 1, or K for PPO-Multi."""
    mini_batch: int | None = MISSING
    """Completions of one update, cut in prompt order before filtering (PPO-Mini); null: the batch."""
    schedule: str = MISSING
    """How the arm samples: `preemptive` or `per_microbatch`."""
    filters: list[str] = MISSING
    """Filters that fit the arm's definition; any other is a config error."""


@dataclass
class SamplerConfig:
    """How completions are sampled."""

    name: str = MISSING
    max_new_tokens: int = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    top_k: int = MISSING
    schedule: str = MISSING
    prompts_per_call: int = MISSING
    """Prompts sampled at a time when the schedule is `per_microbatch`."""
    streaming: bool = MISSING
    """Backpropagate finished groups while others are still being sampled (one-update arms)."""
    max_sequences: int = MISSING
    """Completions decoded at once; more wait. Bounds the memory of the cache."""
    dtype: str = MISSING
    """vLLM only: `bfloat16` or `float32`. The `hf` sampler shares the learner's weights."""
    kv_cache_gb: float = MISSING
    """vLLM on CPU only: memory of the cache (of each server)."""
    gpu_memory_utilization: float = MISSING
    """vLLM on a GPU only: share of its memory."""
    enforce_eager: bool = MISSING
    """vLLM only: no CUDA graphs."""
    servers: int = MISSING
    """`vllm_servers` only: H, how many the run starts, one GPU each, or on this machine's processors."""
    server_threads: int | None = None
    """`vllm_servers` on CPU: processors of each; null: half of what there is while the learner works
    beside them, else all of it."""
    colocated: bool = MISSING
    """`vllm_servers`: on the learner's own GPUs; they sleep while it learns, so nothing overlaps."""
    waves: int = MISSING
    """`vllm_servers` while streaming: in how many parts a batch is requested, so that groups finish at
    different times and learning overlaps with sampling."""
    restarts: int = MISSING
    """`vllm_servers`: how often servers may be started again, in all."""
    stall_s: float = MISSING
    """`vllm_servers`: one that owes tokens and gives none for so long is taken for dead."""


@dataclass
class FilterConfig:
    """Which completions are dropped before any forward pass."""

    name: str = MISSING
    threshold: float = MISSING
    """`advantage`: keep what is further from its group's mean reward than this, in standard deviations of
    the group, whatever the arm scales advantages by."""
    kl: str = MISSING
    """`drop`: dropped completions owe no KL term (counted); `keep`: they are forwarded for it."""
    denominator: str = MISSING
    """`all`: divide by every completion sampled; `kept`: by the kept ones only."""


@dataclass
class DatasetConfig:
    """Where prompts come from and how an answer is judged."""

    name: str = MISSING
    kind: str = MISSING
    """`jsonl` (a file or the hub), or generated: `arithmetic`, `functions`, `reasoning_gym`."""
    path: str | None = None
    """One JSON-lines file; wins over `file` and `hub`."""
    file: str | None = None
    """A file name below `paths.data`."""
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str | None = None
    fields: dict[str, list[str]] = field(default_factory=dict)
    """Our field to the names a source may use; the first present wins, and a field left out goes by its
    own name. All: `id`, `problem`, `solution`. Maths: `answer`. Code: `tests`, `test_list`,
    `test_imports`, `entry_point`."""
    answer_after: str | None = None
    """The gold answer is what follows the last occurrence of this mark in the answer field."""
    solution_drop: str | None = None
    """What is left out of worked solutions: a regular expression."""
    id_prefix: str = ""
    """An id that lacks it becomes this and its number, so that a file and the hub name a row alike."""
    id_range: list[int] = field(default_factory=list)
    """First and last number, inclusive, at the end of the ids that are used; empty: all."""
    tests_call: str | None = None
    """Code: put after the tests where the source leaves it out, with `{entry_point}` filled in."""
    timeouts: dict[str, float] = field(default_factory=dict)
    """Code: seconds for the tests of single ids, where `verifier.timeout_s` is too short."""
    task: str | None = None
    """`reasoning_gym`: which of its tasks."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """`reasoning_gym`: settings of that task."""
    size: int | None = None
    """`reasoning_gym`: how many different questions."""
    traces: str | None = None
    """`algorithm=sft_m`: the file that `python -m dash_exp.traces` wrote for this dataset."""
    weight: float = 1.0
    """Share of the training prompts, relative to the other datasets of a mixture."""
    mix: dict[str, DatasetConfig] = field(default_factory=dict)
    """Datasets mixed into this one, each with its own weight, template and verifier."""
    split: str = MISSING
    """`train` or `test`; generated datasets make disjoint ones."""
    limit: int | None = None
    """Use the first so many prompts (after the order of the file)."""
    template: str = MISSING
    """Names of `tasks/templates.py`."""
    shots: list[dict[str, str]] = field(default_factory=list)
    """`template: few_shot`: worked examples, each with `problem` and `solution`."""
    stop: list[str] = field(default_factory=list)
    """A completion ends after one of these; each must be a single token."""
    verifier: str = MISSING
    extraction: str = MISSING
    max_prompt_tokens: int = MISSING
    completion_tokens: int = MISSING
    """Room for a short answer to this set; what `recipe=small` samples at most."""
    max_new_tokens: int | None = None
    """When evaluating on this set; null: as in training."""


@dataclass
class RecipeConfig:
    """Sizes, lengths, learning rate and schedule; the values it sets are in the other groups."""

    name: str = MISSING
    sft_steps: int | None = MISSING
    sft_epochs: float | None = MISSING
    sft_batch: int = MISSING
    sft_lr: float = MISSING
    """Steps or epochs, examples per step and learning rate of the supervised arms at this size."""


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen weights (Hu et al. 2021), by peft."""

    rank: int = 0
    """0: off, all weights are trained."""
    alpha: float = 32.0
    """The adapters' product is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=list)
    """Names of the linear layers that get adapters; empty: all but the output layer."""


@dataclass
class LearnerConfig:
    """The optimizer, its precision, and how a batch is cut (which never changes the result)."""

    lr: float = MISSING
    schedule: str = MISSING
    warmup_share: float = MISSING
    """Share of the planned updates over which the learning rate rises, rounded up to whole updates."""
    weight_decay: float = MISSING
    beta1: float = MISSING
    beta2: float = MISSING
    eps: float = MISSING
    max_grad_norm: float = MISSING
    precision: str = MISSING
    """`bf16_mixed`: fp32 master weights, bf16 compute. `fp32`. `bf16`: pure, for comparison."""
    freeze_embeddings: bool = MISSING
    lora: LoraConfig = field(default_factory=LoraConfig)
    micro_batch_tokens: int = MISSING
    logit_chunk: int = MISSING
    """Rows of logits held at once: memory = chunk x V x 4 bytes, several times."""
    gradient_checkpointing: bool = MISSING
    preflight: bool = MISSING
    """First try the largest micro-batch of the longest samples: does it fit into memory?"""
    deterministic: bool = MISSING
    """Micro-batches in prompt order, whatever the order in which groups finish."""
    device: str = MISSING
    ranks: int = MISSING
    """H', how many processes learn, one device each; changes the result by rounding only."""
    sharding: str = "none"
    """`fsdp`: every rank holds a part of weights, gradients and optimizer only; `none`: all of them."""
    timeout_s: float = MISSING
    """With several ranks: one that does not answer for so long has failed, and so has the run."""


@dataclass
class EvaluationConfig:
    """When and on what the model is evaluated. `sets` maps a label to a dataset."""

    name: str = MISSING
    before: bool = MISSING
    after: bool = MISSING
    every: int = MISSING
    """Steps between evaluations; 0: only before and after."""
    samples: int = MISSING
    """Completions per prompt; 1 with temperature 0 is greedy accuracy."""
    temperature: float = MISSING
    top_p: float = MISSING
    k: list[int] = field(default_factory=list)
    """pass@k for these k; no value where k > samples."""
    template: str | None = None
    """One template for every set, as the supervised arms want it; null: each set's own."""
    limit: int | None = None
    """Use the first so many prompts of each set."""
    sets: dict[str, DatasetConfig] = field(default_factory=dict)


@dataclass
class CheckpointConfig:
    """When a resumable checkpoint is written, and how many are kept."""

    every: int = MISSING
    keep: int = MISSING


@dataclass
class VerifierConfig:
    """The pool of worker processes that judge answers."""

    workers: int = MISSING
    timeout_s: float = MISSING
    memory_mb: int = MISSING


@dataclass
class TrackingConfig:
    """A mirror of the records, for people who look at many runs; never what a run depends on."""

    name: str = MISSING
    """`none`, or `mlflow`."""
    uri: str | None = None
    """null: the variable MLFLOW_TRACKING_URI, else a SQLite file below `run.dir`."""
    experiment: str = "dash_exp"
    """MLflow's experiment."""
    every_s: float = 30.0
    """Seconds between two batches of a running cell."""


@dataclass
class ClusterConfig:
    """Where cells run, and what each may use there."""

    name: str = MISSING
    """`local`, or `slurm`."""
    threads: int | None = None
    """CPU threads of a run; null: all that this process may use (of a sweep: an equal part)."""
    server_urls: list[str] = field(default_factory=list)
    """`sampler=vllm_servers`: use these, that run already (docs/engine.md), instead of starting some. Their
    key is in the variable DASH_SERVER_KEY."""
    transfer: str = "auto"
    """How weights get to servers: `shared` (memory of this machine), `file` (in `weights_dir`), `nccl`
    (from GPU to GPU), `ipc` (within a GPU that both share); `auto`: what fits."""
    weights_dir: str | None = None
    """A folder that the machines of learner and servers both see, under the same path, for weights on
    their way; `auto` uses it where it is set."""
    gpus: int | None = None
    """Of a cell; null: one each for its learners and its servers (0 where `learner.device=cpu`)."""
    gpus_per_node: int = MISSING
    cpus: int | None = None
    """Of a cell; null: `cpus_per_gpu` for each of its GPUs, at least that many."""
    cpus_per_gpu: int = MISSING
    memory_gb: float | None = None
    """Of a cell and node; null: the model's."""
    hours: float | None = None
    """After which a cell is ended, to go on in a new job; null: the model's."""
    cells_per_gpu: int = MISSING
    """Small cells that share a GPU (or, without any, a job) at the same time."""
    max_parallel: int | None = None
    """Jobs of a sweep that run at the same time; null: as many as the cluster lets."""
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: list[str] = field(default_factory=list)
    """Shell lines before a cell is started, e.g. `module load cuda`."""
    warning_s: int = MISSING
    """Seconds before a job's time limit at which its cell is asked to save and end."""
    requeues: int = MISSING
    """How often a cell may be queued anew after a time limit, a preemption or a lost node."""
    retries: dict[str, int] = field(default_factory=dict)
    """How often a cell is started again after a failure of each class (docs/sweeps.md), counted anew
    whenever it has got further."""


@dataclass
class BudgetConfig:
    seconds: float | None = None
    """Stop training after so many seconds of training time, between updates; null: no limit."""
    match: str | None = None
    """Instead: the training time of a finished partner, named by its cell id, or by the overrides
    that make it from this cell (`algorithm=dash`), which become its id."""


@dataclass
class RunConfig:
    """Actions and places. Never part of a cell's identity."""

    dir: str = MISSING
    force: bool = MISSING
    progress: str = MISSING
    """`auto`: live on a terminal, plain lines elsewhere; `plain`; `none`."""
    partner: str | None = None
    """The command that makes the partner of `budget.match`; set by the program, to be shown."""
    sweep: str | None = None
    """With -m: the sweep's name; null: made from what is varied."""


@dataclass
class PathsConfig:
    data: str | None = None
    """Folder that holds dataset files by name; default: the variable DASH_DATA."""


@dataclass
class Config:
    """One cell, and how to run it."""

    seed: int = MISSING
    hardware: str | None = None
    """A name for the kind of machine, where a cell's result is a time: cells of different hardware are
    different cells. Set by sweeps that compare times."""
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
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


def dataset_places(config: Config) -> dict[str, DatasetConfig]:
    """The datasets of a run by the key that holds them: what it trains on, then what it is evaluated on."""
    return {**parts_of(config.dataset), **evaluation_places(config)}


def parts_of(data: DatasetConfig) -> dict[str, DatasetConfig]:
    """The training datasets: the dataset itself, then what is mixed in, by label, so that the order in
    which a config names them changes nothing."""
    return {"dataset": data, **{f"dataset.mix.{label}": data.mix[label] for label in sorted(data.mix)}}


def evaluation_places(config: Config) -> dict[str, DatasetConfig]:
    return {f"evaluation.sets.{label}": data for label, data in config.evaluation.sets.items()}


ACTIONS = ("run", "tracking", "cluster", "paths")
"""Groups that cannot change a result: left out of a cell's identity and of its frozen file."""


def to_config(composed: Any) -> Config:
    """The typed config of a composed Hydra config, every interpolation resolved.

    Raises omegaconf errors for a missing or ill-typed value.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
    assert isinstance(config, Config)
    return config
