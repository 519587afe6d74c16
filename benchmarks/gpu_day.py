"""Everything that a first day on a GPU must show, in one table.

    python -m benchmarks.gpu_day                    # at most 10 minutes, without vLLM
    python -m benchmarks.gpu_day --vllm             # at most 20
    python -m benchmarks.gpu_day --rehearse         # the same script on CPU, with tiny sizes

A row that fails says why, and the others go on. The learner's rows use random weights in the shape of
`--model`; runs use SmolLM2-135M, which comes as a package.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.gpu_static import SHAPES, learner_of, model_of
from dash_exp.capacity.memory import GIB, activation_bytes, shape_of
from dash_exp.learning.learner import Learner
from dash_exp.learning.packing import MicroBatch, Packer
from dash_exp.record.folder import read_final, read_json
from dash_exp.types import AdvantagedGroup, Completion, Group, Prompt, Score, ScoredGroup

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}
"""Of dense bf16 products, as the makers state them; by a part of the GPU's name."""
CELL = (
    "dataset=chain",
    "algorithm.steps=6",
    "algorithm.prompts_per_step=8",
    "run.progress=none",
    "evaluation=none",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """`model`: of gpu_static.SHAPES; `tokens`: of a micro-batch; `lengths`: of completions, by case; `cell`:
    overrides of every run."""

    device: torch.device
    model: str
    tokens: int
    lengths: Mapping[str, Sequence[int]]
    cell: Sequence[str]
    deadline: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    found: str
    verdict: str


def verdict(good: bool) -> str:
    return "ok" if good else "FAILED"


def groups_of(lengths: Sequence[int], prompt: int, tokens: int) -> list[AdvantagedGroup]:
    """Groups of four completions of random tokens, whose lengths cycle, for about so many input tokens."""
    draw, made, used = random.Random(0), list[AdvantagedGroup](), 0
    while used < tokens:
        own = [lengths[(4 * len(made) + i) % len(lengths)] for i in range(4)]
        ids = [tuple(draw.randrange(3, 4096) for _ in range(n)) for n in (prompt, *own)]
        completions = tuple(Completion(one, (-8.0,) * len(one), "", "stop", 0) for one in ids[1:])
        group = Group(len(made), Prompt(f"p{len(made)}", "random", "", ids[0], ""), completions)
        scored = ScoredGroup(group, (Score(0.0, "wrong"),) * 4)
        made.append(AdvantagedGroup(scored, (1.0, -1.0, 0.5, -0.5), (True,) * 4))
        used += prompt + sum(own)
    return made


def micro_batches(groups: Sequence[AdvantagedGroup], tokens: int) -> list[MicroBatch]:
    packer = Packer(tokens, "constant", keep_for_kl=False)
    return [ready for group in groups for ready in packer.add(group)] + list(packer.flush())


def random_learner(setting: Setting) -> Learner:
    """Random weights; no KL term, so that only the policy is counted."""
    torch.manual_seed(0)
    return learner_of(model_of(setting.model, setting.device), beta=0.0, temperature=1.0)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def layouts(setting: Setting) -> Row:
    """Gradients of every layout of attention, against the one by group."""
    groups = groups_of([5, 9, 33, 64], 40, 400)
    found: dict[str, Tensor] = {}
    for rows in ("group", "completion", "auto"):
        learner = random_learner(setting)
        for batch in micro_batches(groups, 4096):
            learner.accumulate(replace(batch, rows=rows))
        parts = [g.flatten().cpu() for name, g in learner.gradients.items() if "layers.0." in name]
        found[rows] = torch.cat(parts)
    norm = float(found["group"].norm())
    off = {
        rows: float((one - found["group"]).norm()) / norm for rows, one in found.items() if rows != "group"
    }
    shown = ", ".join(f"{rows} {value:.1e}" for rows, value in off.items())
    return Row(
        "attention layouts agree",
        f"relative difference: {shown}",
        "ok" if max(off.values()) < 0.02 else "FAILED",
    )


def throughput(setting: Setting) -> list[Row]:
    """Tokens per second of forward and backward, with the share of the GPU's peak, and the peak of memory."""
    learner, rows = random_learner(setting), []
    count = sum(m.numel() for m in learner.masters.values())
    shape = shape_of({"shape": {**SHAPES[setting.model], "vocabulary": learner.model.config.vocab_size}})
    assert shape is not None
    for name, lengths in setting.lengths.items():
        batches = micro_batches(groups_of(lengths, 128, 3 * setting.tokens), setting.tokens)
        learner.accumulate(batches[0])
        wait_for(setting.device)
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(setting.device)
        rates = []
        for batch in batches:
            start = time.perf_counter()
            learner.accumulate(batch)
            wait_for(setting.device)
            rates.append(batch.tokens / (time.perf_counter() - start))
        rate = median(rates)
        peak = next((v for part, v in PEAK_FLOPS.items() if part in _gpu_name(setting)), None)
        # forward, backward and the forward that checkpointing repeats
        mfu = f", {8 * count * rate / peak:.0%} of the peak" if peak else ""
        rows.append(Row(f"learner, {name} tokens", f"{rate:,.0f} tokens/s{mfu}", "measured"))
    if setting.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(setting.device)
        planned = 10 * count + activation_bytes(
            shape, setting.tokens, 1024, True, True
        )  # without moments yet
        off = used / planned - 1
        text = f"{used / GIB:.1f} GiB, planned {planned / GIB:.1f} ({off:+.0%})"
        rows.append(Row("peak against the planner", text, verdict(abs(off) <= 0.1)))
    return rows


def _gpu_name(setting: Setting) -> str:
    return torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "CPU"


def run(root: Path, *overrides: str, kill_after: int | None = None) -> Path:
    """Run a cell in a process of its own; its folder. `kill_after`: kill it once so many steps are recorded.
    Raises RuntimeError with the end of its output."""
    command = [sys.executable, "-m", "dash_exp", f"run.dir={root}", *overrides]
    with (root / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None:
            rows = [len(path.read_bytes().splitlines()) for path in root.glob("cells/*/steps.jsonl")]
            if kill_after is not None and rows and max(rows) >= kill_after:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.2)
        output.seek(0)
        if process.returncode and kill_after is None:
            raise RuntimeError(output.read()[-400:])
    (folder,) = root.glob("cells/*")
    return folder


def arms(setting: Setting, *overrides: str) -> Row:
    """Seconds per step of preemptive DASH and of GRPO a prompt at a time, without their first step."""
    seconds = {}
    for arm in ("dash", "grpo"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = run(Path(scratch), *setting.cell, f"algorithm={arm}", *overrides)
            seconds[arm] = median([r["time/step_s"] for r in read_final(folder, "steps")][1:])
    shown = ", ".join(f"{arm} {value:.2f} s a step" for arm, value in seconds.items())
    ratio = seconds["grpo"] / seconds["dash"]
    return Row("preemptive against historical", f"{shown}: {ratio:.1f}x", verdict(ratio > 1))


def graphs(setting: Setting) -> Row:
    """Sampling by vLLM with CUDA graphs and without."""
    rates = {}
    for eager in (True, False):
        with tempfile.TemporaryDirectory() as scratch:
            more = ("sampler=vllm", f"sampler.enforce_eager={str(eager).lower()}")
            rows = read_final(run(Path(scratch), *setting.cell, *more), "steps")[1:]
            rates[eager] = median(r["tokens/sampled"] / r["time/sample_s"] for r in rows)
    text = f"{rates[True]:,.0f} eager, {rates[False]:,.0f} with graphs: {rates[False] / rates[True]:.1f}x"
    return Row("vLLM tokens/s", text, "measured")


def colocated(setting: Setting) -> Row:
    """A server that sleeps on the learner's GPU."""
    with tempfile.TemporaryDirectory() as scratch:
        more = ("sampler=vllm_servers", "sampler.colocated=true")
        rows = read_final(run(Path(scratch), *setting.cell, *more), "steps")
    gap = max(r.get("policy/logprob_gap", 0.0) for r in rows)
    return Row(
        "colocated server",
        f"{len(rows)} steps, largest log-prob gap {gap:.3f}",
        "ok" if gap < 0.05 else "FAILED",
    )


def resume(setting: Setting) -> Row:
    """Killed after a step, and started again."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        more = (*setting.cell, "checkpoint.every=1")
        run(root, *more, kill_after=2)
        folder = run(root, *more)
        status = read_json(folder / "status.json")
    text = f"{status['state']} after step {status['step']} in attempt {status['attempt']}"
    return Row(
        "killed and resumed",
        text,
        "ok" if (status["state"], status["attempt"]) == ("finished", 2) else "FAILED",
    )


def rows_of(setting: Setting, vllm: bool) -> list[Row]:
    """The table. A row that fails or has no time left says so."""
    work: list[tuple[str, Callable[[Setting], Row | list[Row]]]] = [
        ("attention layouts agree", layouts),
        ("learner", throughput),
        ("preemptive against historical", arms),
        ("killed and resumed", resume),
    ]
    if vllm:
        work += [("vLLM tokens/s", graphs), ("colocated server", colocated)]
    made: list[Row] = []
    for name, measure in work:
        print(f"... {name}", file=sys.stderr, flush=True)
        if time.monotonic() > setting.deadline:
            made.append(Row(name, "no time left", "skipped"))
            continue
        try:
            found = measure(setting)
        except Exception as error:  # noqa: BLE001  whatever fails on a new machine is what this is for
            reason = " ".join(str(error).split())[-200:]
            found = Row(name, f"{type(error).__name__}: {reason}", "FAILED")
        made += found if isinstance(found, list) else [found]
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return made


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day")
    parser.add_argument(
        "--model", default="0.5b", choices=list(SHAPES), help="shape of the learner's rows (0.5b)"
    )
    parser.add_argument("--vllm", action="store_true", help="also the rows that need vLLM")
    parser.add_argument("--rehearse", action="store_true", help="on CPU, with tiny sizes")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU here; --rehearse runs the same on CPU", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * (20 if options.vllm else 10)
    if options.rehearse:
        SHAPES["tiny"] = {"hidden": 64, "inner": 128, "layers": 2, "heads": 4, "kv_heads": 2, "tied": True}  # type: ignore[index]
        lengths = {"32": [32], "mixed": [4, 9, 64, 17]}
        cell = ("model=tiny", "debug=fast", "algorithm.steps=4", "run.progress=none", "evaluation=none")
        setting = Setting(torch.device("cpu"), "tiny", 1024, lengths, cell, deadline)
    else:
        mixed = [64, 128, 256, 1024, 96, 200, 512, 2048]
        lengths = {"512": [512], "2,048": [2048], "mixed": mixed}
        setting = Setting(torch.device("cuda", 0), options.model, 16_384, lengths, CELL, deadline)
    made = rows_of(setting, options.vllm)
    width = max(len(row.what) for row in made)
    print(f"{_gpu_name(setting)}, torch {torch.__version__}")
    for row in made:
        print(f"{row.what:{width}}  {row.verdict:8}  {row.found}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in made], indent=1) + "\n")
    return int(any(row.verdict == "FAILED" for row in made))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
