"""The peer's side of a comparison: TRL's GRPOTrainer, set up to do the same work as a cell of ours.

Its reward function for integers is written the way its users write one, on purpose without our judge: that
both agree is checked, not assumed.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from transformers.utils import logging

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about the vLLM that it would not be used with anyway
    from trl import GRPOConfig, GRPOTrainer

from dash_exp.config.schema import Config
from dash_exp.modeling.source import load_tokenizer
from dash_exp.types import Prompt


def integer_rewards(completions: list[str], answer: list[str], **unused: Any) -> list[float]:
    """1 where the first integer of a completion is the answer, else 0."""
    found = [re.search(r"-?[0-9]+", text) for text in completions]
    return [float(m is not None and int(m[0]) == int(a)) for m, a in zip(found, answer, strict=True)]


class Rewards(Protocol):
    """What a reward function of the trainer's users looks like."""

    def __call__(self, completions: list[str], answer: list[str]) -> list[float]: ...


class Seen:
    """The reward function as the trainer calls it, keeping every batch that it was shown."""

    __name__ = "rewards"

    def __init__(self, rewards: Rewards) -> None:
        self.rewards = rewards
        self.batches: list[list[tuple[str, str, float, int]]] = []

    def __call__(
        self, completions: list[str], answer: list[str], completion_ids: list[list[int]], **rest: Any
    ) -> list[float]:
        rewards = self.rewards(completions, answer)
        lengths = map(len, completion_ids)
        self.batches.append(list(zip(completions, answer, rewards, lengths, strict=True)))
        return rewards


class Turns(TrainerCallback):
    """Times each update of the trainer and lets the other side take its turn in between.

    The other side runs inside `on_step_end`, outside of what is timed, so no threads are needed and
    both meet the same machine in the same minute."""

    def __init__(self, other: Callable[[], None]):
        self.other = other
        self.seconds: list[float] = []
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.seconds.append(time.perf_counter() - self._since)
        self.other()
        self._since = time.perf_counter()


def load_policy(folder: Path, stop_ids: Sequence[int], attention: str) -> Any:
    """fp32 master weights, embeddings frozen as ours are, the same tokens ending a completion."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
    )
    model.get_input_embeddings().weight.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(False)
    model.generation_config.eos_token_id = list(stop_ids)
    return model


def make_arguments(config: Config, folder: Path, updates: int, micro_batch: int) -> GRPOConfig:
    """The same algorithm, as `config` has it, with nothing saved or logged on the way."""
    a, opt = config.algorithm, config.learner
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=updates,
        seed=config.seed,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=a.prompts_per_step * a.group_size // micro_batch,
        num_generations=a.group_size,
        max_completion_length=config.sampler.max_new_tokens,
        temperature=config.sampler.temperature,
        shuffle_dataset=False,
        disable_dropout=True,
        beta=a.beta,
        use_bias_correction_kl=False,
        loss_type="dr_grpo",
        scale_rewards="group",
        epsilon=a.clip_low,
        epsilon_high=a.clip_high,
        optim="adamw_torch_fused",
        learning_rate=opt.lr,
        lr_scheduler_type="constant",
        adam_beta1=opt.beta1,
        adam_beta2=opt.beta2,
        adam_epsilon=opt.eps,
        weight_decay=opt.weight_decay,
        max_grad_norm=opt.max_grad_norm,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def make_trainer(
    config: Config,
    source: Path,
    scratch: Path,
    prompts: Sequence[Prompt],
    stop_ids: Sequence[int],
    seen: Seen,
    turns: Turns,
    micro_batch: int,
    attention: str,
) -> GRPOTrainer:
    """A trainer that will ask these prompts in this order, `prompts_per_step` in each update."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = {"prompt": [p.text for p in prompts], "answer": [p.answer for p in prompts]}
    updates = len(prompts) // config.algorithm.prompts_per_step
    trainer = GRPOTrainer(
        model=load_policy(source, stop_ids, attention),
        reward_funcs=seen,
        args=make_arguments(config, scratch, updates, micro_batch),
        train_dataset=Dataset.from_dict(rows),
        processing_class=load_tokenizer(source),
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
