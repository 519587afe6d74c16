"""Peak memory of one learner update on long completions with a large vocabulary.

    python -m benchmarks.memory [--beta 0 0.04] [--micro-batch-tokens N] [--logit-chunk N] [--json FILE]

A randomly initialised Llama of SmolLM2-135M's shape with 150,000 tokens, its tied embeddings
trainable, is updated by the learner itself on 16 groups of 4 completions of 512 tokens. Each setting
runs in a fresh process. What is measured is the largest resident memory (VmHWM) while all
micro-batches are accumulated and the update is made, less the resident memory (VmRSS) before the model
was built; a small update goes before it, so that the optimizer's moments exist throughout. It is
compared with the bytes that an update cannot do without: weights, fp32 master weights, gradients and
moments (and, with KL, the reference model).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import describe, machine, print_table, write

if TYPE_CHECKING:
    from torch import Tensor

    from dash_exp.learning.learner import Learner
    from dash_exp.learning.packing import MicroBatch, Packer
    from dash_exp.types import AdvantagedGroup

GOAL = 1.5
"""Peak over the bytes that must be held."""
MB = 1e6
PROC = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Setting:
    """One measurement: the work, and how the learner cuts it."""

    beta: float
    micro_batch_tokens: int
    logit_chunk: int
    gradient_checkpointing: bool
    tune_malloc: bool
    groups: int
    group_size: int
    prompt_tokens: int
    tokens: int
    vocabulary: int
    threads: int

    @property
    def whole_batch_logits(self) -> int:
        """Bytes of fp32 logits for every token of the batch at once, which are never held."""
        return self.groups * self.group_size * self.tokens * self.vocabulary * 4


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the largest so far) of this process, in bytes. (ru_maxrss would begin
    with that of the process that started this one.)"""
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def forget_peak() -> bool:
    """Let VmHWM begin again from now. False where the system does not allow it."""
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors; a tied one counts once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def held(learner: Learner) -> dict[str, int]:
    """What an update cannot do without, in bytes."""
    states = learner.optimizer.state.values()
    parts = {
        "model": bytes_of(learner.model.parameters()),
        "master weights": bytes_of(learner.masters.values()),
        "gradients": bytes_of(learner.gradients.values()),
        "optimizer": bytes_of(value for state in states for value in state.values()),
    }
    if learner.reference is not None:
        parts["reference model"] = bytes_of(learner.reference.parameters())
    return parts


def save_random_model(folder: Path, vocabulary: int) -> None:
    """An untrained Llama of SmolLM2-135M's shape, as a folder that the package loads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def load_learner(setting: Setting, folder: Path) -> Learner:
    """A learner as any run makes it, from a config."""
    import torch

    from dash_exp.config.compose import compose
    from dash_exp.learning import learner
    from dash_exp.train.build import make_plan, make_spec

    config = compose(
        [
            f"algorithm.beta={setting.beta}",
            "learner.precision=bf16_mixed",
            "learner.freeze_embeddings=false",
            f"learner.logit_chunk={setting.logit_chunk}",
            f"learner.gradient_checkpointing={str(setting.gradient_checkpointing).lower()}",
        ]
    )
    plan = make_plan(config, prompts=1)
    spec = make_spec(config, plan, folder, setting.vocabulary)
    return learner.load_learner(spec, torch.device("cpu"))


def make_group(position: int, size: int, setting: Setting) -> AdvantagedGroup:
    """A group of random tokens, every completion kept."""
    from dash_exp.types import AdvantagedGroup, Completion, Group, Prompt, Score, ScoredGroup

    draw = random.Random(position)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(setting.vocabulary) for _ in range(count))

    prompt = Prompt(f"p{position}", "random", "", ids(setting.prompt_tokens), "")
    completions = tuple(
        Completion(ids(setting.tokens), (-11.9,) * setting.tokens, "", "length", 0) for _ in range(size)
    )
    scores = tuple(Score(float(i % 2), "correct" if i % 2 else "wrong") for i in range(size))
    advantages = tuple(1.0 if i % 2 else -1.0 for i in range(size))
    group = Group(position, prompt, completions)
    return AdvantagedGroup(ScoredGroup(group, scores), advantages, (True,) * size)


def micro_batches(packer: Packer, groups: Iterable[AdvantagedGroup]) -> Iterator[MicroBatch]:
    for group in groups:
        yield from packer.add(group)
    yield from packer.flush()


def one_update(
    learner: Learner, packer: Packer, groups: Iterable[AdvantagedGroup], denominator: float
) -> int:
    """What train/loop.py does with a batch: micro-batches as they fill, then the update. Their number."""
    count = 0
    for ready in micro_batches(packer, groups):
        learner.accumulate(ready, learner.reference_logprobs(ready))
        count += 1
    learner.update(denominator)
    return count


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """Build, warm up, then the update whose peak counts. Runs in a process of its own."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  code is not the update's memory

    import dash_exp.train.build  # noqa: F401
    from dash_exp.learning.packing import Packer
    from dash_exp.signals import tune_malloc

    if setting.tune_malloc:
        tune_malloc()
    torch.set_num_threads(setting.threads)
    before = resident("VmRSS")
    learner = load_learner(setting, folder)
    packer = Packer(setting.micro_batch_tokens, "constant", keep_for_kl=False)
    one_update(learner, packer, [make_group(-1, 1, setting)], setting.tokens)
    building = resident("VmHWM") - before
    alone, after = forget_peak(), resident("VmRSS") - before
    completions = setting.groups * setting.group_size
    batch = (make_group(i, setting.group_size, setting) for i in range(setting.groups))
    start = time.perf_counter()
    count = one_update(learner, packer, batch, completions * setting.tokens)
    seconds = time.perf_counter() - start
    parts = held(learner)
    peak, needed = resident("VmHWM") - before, sum(parts.values())
    return {
        "setting": dataclasses.asdict(setting),
        "bytes": parts,
        "needed": needed,
        "peak": peak,
        "ratio": peak / needed,
        "baseline": before,
        "building_peak": building,
        "before_update": after,
        "peak_is_of_update_alone": alone,
        "whole_batch_logits": setting.whole_batch_logits,
        "micro_batches": count,
        "seconds": seconds,
    }


def in_fresh_process(setting: Setting, folder: Path) -> dict[str, Any]:
    """`measure` in a new process, whose memory nothing else has touched."""
    text = json.dumps(dataclasses.asdict(setting))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--child", text, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"the measurement ended with code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(results: list[dict[str, Any]]) -> None:
    """A table of the ratios, and one of what is counted."""
    columns = [
        "beta",
        "micro-batch tokens",
        "logit chunk",
        "checkpointing",
        "must be held MB",
        "peak MB",
        "ratio",
        "goal",
        "seconds",
    ]
    rows = []
    for r in results:
        s = r["setting"]
        rows.append(
            [
                f"{s['beta']:g}",
                str(s["micro_batch_tokens"]),
                str(s["logit_chunk"]),
                "yes" if s["gradient_checkpointing"] else "no",
                f"{r['needed'] / MB:,.0f}",
                f"{r['peak'] / MB:,.0f}",
                f"{r['ratio']:.2f}",
                f"{'within' if r['ratio'] <= GOAL else 'over'} {GOAL}",
                f"{r['seconds']:.0f}",
            ]
        )
    print_table("Peak memory of an update over what must be held", columns, rows)
    parts = sorted({name for r in results for name in r["bytes"]})
    rows = [
        [f"{r['setting']['beta']:g}", *(f"{r['bytes'].get(p, 0) / MB:,.0f}" for p in parts)] for r in results
    ]
    print_table("What must be held, MB", ["beta", *parts], rows)
    logits = results[0]["whole_batch_logits"]
    print(f"logits of the batch would be {logits / MB:,.0f} MB; they never exist")
    if not all(r["peak_is_of_update_alone"] for r in results):
        print("the peak includes building the model: the system does not let it be forgotten")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0]
    )
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("--beta", type=float, nargs="+", default=[0.0, 0.04])
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--logit-chunk", type=int, default=128)
    parser.add_argument("--gradient-checkpointing", action=on_off, default=False)
    parser.add_argument("--tune-malloc", action=on_off, default=True, help="as real runs do")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="of each completion")
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.child:
        text, folder = args.child
        print(json.dumps(measure(Setting(**json.loads(text)), Path(folder))))
        return
    facts = machine(args.threads)
    print(describe(facts))
    names = {f.name for f in dataclasses.fields(Setting)} - {"beta"}
    shared = {name: value for name, value in vars(args).items() if name in names}
    with tempfile.TemporaryDirectory() as name:
        save_random_model(Path(name), args.vocabulary)
        results = [in_fresh_process(Setting(beta=beta, **shared), Path(name)) for beta in args.beta]
    show(results)
    write(args.json, {"benchmark": "memory", "machine": facts, "goal": GOAL, "results": results})


if __name__ == "__main__":
    main()
