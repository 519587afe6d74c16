"""Preflight: one forward and backward at the greatest length and budget, before hours are spent.

The longest sample of a run often comes late; if it does not fit, better to know in the first minute.
"""

from __future__ import annotations

import torch

from dash_exp.errors import Fault, UserError
from dash_exp.learning.learner import Learner
from dash_exp.learning.packing import MicroBatch, Packer
from dash_exp.types import AdvantagedGroup, Completion, Group, Prompt, Score, ScoredGroup


def largest_micro_batch(
    prompt_tokens: int, completion_tokens: int, group_size: int, packer: Packer
) -> MicroBatch:
    """The first full micro-batch of groups in which everything has its greatest length."""
    prompt = Prompt("longest", "preflight", "", (0,) * prompt_tokens, "")
    completion = Completion((0,) * completion_tokens, (0.0,) * completion_tokens, "", "length", 0)
    group = Group(0, prompt, (completion,) * group_size)
    scored = ScoredGroup(group, (Score(0.0, "wrong"),) * group_size)
    longest = AdvantagedGroup(scored, (1.0,) * group_size, (True,) * group_size)
    while True:  # one group more until the budget is full
        for micro_batch in packer.add(longest):
            for _ in packer.flush():
                pass
            return micro_batch


def preflight(learner: Learner, micro_batch: MicroBatch) -> None:
    """Forward and backward beside what the optimizer will need, and forget the gradient. Raises
    UserError when memory runs out."""
    try:
        fresh = not learner.optimizer.state
        moments = [torch.empty_like(m) for m in learner.masters.values() for _ in range(2) if fresh]
        learner.accumulate(micro_batch, learner.reference_logprobs(micro_batch))
        del moments
    except RuntimeError as error:  # torch.OutOfMemoryError, or the CPU allocator's plain one
        if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error):
            raise
        tokens = micro_batch.tokens
        raise UserError(
            Fault(
                "learner.micro_batch_tokens",
                f"a micro-batch of the longest samples ({tokens} tokens) does not fit into memory",
                "lower it, or set learner.gradient_checkpointing=true or a smaller learner.logit_chunk",
            )
        ) from error
    learner.discard()
