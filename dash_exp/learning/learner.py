"""The learner: accumulates unnormalised gradient sums in fp32, then divides once and updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dash_exp.errors import Fault, UserError
from dash_exp.learning import losses
from dash_exp.learning.adapters import add_adapters, disabled, plain_weights
from dash_exp.learning.agreement import facts_of, take_state
from dash_exp.learning.packing import MicroBatch, Packed, nothing, pack
from dash_exp.learning.schedules import kl_coefficient, learning_rate
from dash_exp.learning.scorer import Scorer, frozen_copy
from dash_exp.learning.settings import BatchSums, Objective, Optimization, UpdateStats
from dash_exp.learning.weights import Weights
from dash_exp.record.checkpoint import Snapshot


class Learner:
    """Owns the policy: what `weights` holds of it moves by the sums of its gradients."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        setting: Optimization,
        *,
        vocabulary: int,
        logit_chunk: int,
        gradient_checkpointing: bool = False,
        hold: Callable[[Scorer, str], Weights] = Weights,
    ):
        """`hold`: what is to keep the policy's tensors."""
        self.objective, self.setting = objective, setting
        self.model = model.eval()  # dropout is never on: two scorings of a sample are identical
        refuse_dropout(model)
        if setting.adapters is not None:
            add_adapters(model, setting.adapters)
        elif setting.freeze_embeddings:
            model.get_input_embeddings().weight.requires_grad_(False)
            model.get_output_embeddings().weight.requires_grad_(False)
        scorer = partial(Scorer, temperature=objective.temperature, vocabulary=vocabulary, chunk=logit_chunk)
        self.reference: Scorer | None = None
        if objective.beta > 0 and setting.adapters is None:  # else the base lies beneath the adapters
            dtype = torch.float32 if setting.precision == "fp32" else torch.bfloat16
            self.reference = scorer(frozen_copy(model, dtype))
        if gradient_checkpointing:
            model.train()  # transformers checkpoints in training mode only
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.policy = scorer(model)
        self.weights = hold(self.policy, setting.precision)
        if self.reference is not None:
            self.weights.guard(self.reference)
        self.masters, self.gradients = self.weights.masters, self.weights.gradients
        for master in self.masters.values():
            master.grad = None
        self.optimizer = torch.optim.AdamW(
            list(self.masters.values()),
            lr=setting.lr,
            betas=setting.betas,
            eps=setting.eps,
            weight_decay=setting.weight_decay,
            fused=True,
        )
        self.updates = 0
        self.sums = BatchSums()
        self._laid_out: tuple[MicroBatch, Packed] | None = None

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def _pack(self, batch: MicroBatch) -> Packed:
        """Lay it out on the device; the last one is kept, since the reference's forward comes before."""
        if self._laid_out is None or self._laid_out[0] is not batch:
            self._laid_out = (batch, pack(batch, self.device))
        return self._laid_out[1]

    @property
    def beta(self) -> float:
        """The KL coefficient of the update that is being accumulated."""
        goal = self.objective
        total = max(1, self.setting.total_updates)
        return kl_coefficient(self.updates, beta=goal.beta, schedule=goal.beta_schedule, total=total)

    @property
    def lr(self) -> float:
        """The learning rate of the update that is being accumulated."""
        plan = self.setting
        return learning_rate(
            self.updates,
            lr=plan.lr,
            schedule=plan.schedule,
            warmup_share=plan.warmup_share,
            total=plan.total_updates,
        )

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities [C] of the current policy, without gradient."""
        packed = self._pack(batch)
        logprobs, entropy = self.policy(packed)
        self.sums.add(
            "scored",
            entropy=float(entropy.sum()),
            logprob=float(logprobs.sum()),
            gap=float((logprobs - packed.sampler_logprobs).abs().sum()),
            tokens=len(packed.targets),
            completions=len(batch.lengths),
        )
        return logprobs

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> Tensor | None:
        """Log-probabilities [C] of the initial model; None where the objective has no KL term."""
        if self.objective.beta == 0:
            return None
        found: Tensor
        if self.reference is not None:
            found = self.reference(self._pack(batch))[0]
            return found
        with disabled(self.model):
            found = self.policy(self._pack(batch))[0]
            return found

    def accumulate(
        self, batch: MicroBatch, reference: Tensor | None = None, old: Tensor | None = None
    ) -> Tensor:
        """Forward and backward one micro-batch, adding to the gradient sums.

        `reference` [C] is what `reference_logprobs` gave. `old` [C] are the log-probabilities at the
        sampling weights; None where the current weights are those (the first update of a batch), whose
        own detached values then serve. Returns the log-probabilities [C], detached.
        """
        goal = self.objective
        packed = self._pack(batch)
        logprobs, entropy = self.policy(packed)
        detached = logprobs.detach()
        before = detached if old is None else old.to(detached.device)
        low, high = goal.clip_low, goal.clip_high
        if goal.surrogate == "clipped":
            loss = losses.clipped_ratio(logprobs, before, packed.advantages, low, high)
        else:
            loss = losses.policy_gradient(logprobs, packed.advantages)
        which = "first" if old is None else "later"
        if goal.beta > 0:
            assert reference is not None, "an objective with KL needs the reference's log-probabilities"
            penalty = losses.kl_penalty(logprobs, reference.to(detached.device), goal.kl)
            loss = loss + self.beta * penalty
            self.sums.add(which, kl=float(penalty.detach().sum()))
        (loss * packed.weights).sum().backward()
        self.sums.add(
            which,
            entropy=float(entropy.sum()),
            logprob=float(detached.sum()),
            clipped=float(losses.clip_share(detached, before, packed.advantages, low, high).sum()),
            ratio=float(torch.exp(detached - before).sum()),
            gap=float((detached - packed.sampler_logprobs).abs().sum()),
            tokens=len(packed.targets),
            completions=len(batch.lengths),
            computed=len(packed.input_ids),
        )
        return detached

    @torch.no_grad()
    def accompany(self, what: str) -> None:
        """An empty micro-batch: one token of weight 0, which adds nothing. With sharded weights a rank that
        has nothing to compute takes part in the others' `accumulate`, `score` or `reference` this way."""
        packed = pack(nothing(), self.device)
        if what == "reference":
            assert self.reference is not None
            self.reference(packed)
            return
        with torch.set_grad_enabled(what == "accumulate"):
            logprobs = self.policy(packed)[0]
            if what == "accumulate":
                (0.0 * logprobs).sum().backward()

    @torch.no_grad()
    def update(self, denominator: float) -> UpdateStats:
        """Divide the sums once, clip by global norm, move the weights, clear the sums.

        Where nothing was accumulated (every completion dropped), or nothing is counted, nothing moves,
        not even by momentum or weight decay; the update still counts for the schedule.
        """
        lr, beta, touched = self.lr, self.beta, self.weights.touched
        self.updates += 1
        self._laid_out = None
        if not touched or denominator == 0:
            touched.clear()
            return UpdateStats(0.0, lr, beta, skipped=True)
        norm = self.weights.norm() / denominator
        touched.clear()
        if not math.isfinite(norm):
            return UpdateStats(norm, lr, beta, skipped=True, finite=False)
        scale = min(1.0, self.setting.max_grad_norm / (norm + 1e-6)) / denominator
        for name, master in self.masters.items():
            self.gradients[name] *= scale
            master.grad = self.gradients[name].to(master.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for master in self.masters.values():
            master.grad = None
        self.weights.follow()
        return UpdateStats(norm, lr, beta, skipped=False)

    def discard(self) -> None:
        """Forget what was accumulated, gradients and metrics alike."""
        self.weights.touched.clear()
        self.sums = BatchSums()
        self._laid_out = None

    def snapshot(self, step: int, *, moments: bool = True, row: Mapping[str, Any] | None = None) -> Snapshot:
        """Whole weights (fp32, adapters merged), optimizer moments and counters, not copied: save before the
        next update. `row` is what the record will say of this step. Sharded: by all ranks at once, for
        rank 0."""
        held, kept = self.weights, dict[str, Tensor]()
        if self.setting.adapters is not None:
            weights = dict(plain_weights(self.model, torch.float32))
            # merged weights cannot be taken apart again, so the adapters are kept beside them
            kept = {f"master/{name}": master.detach() for name, master in self.masters.items()}
        else:
            weights = {name: held.saved(name, held.exact(name)).float() for name in held.names()}
        for name, master in self.masters.items() if moments else ():
            for key, value in self.optimizer.state.get(master, {}).items():
                kept[f"{key}/{name}"] = value if key == "step" else held.saved(name, value)
        return Snapshot(weights, kept, {"step": step, "updates": self.updates, "row": row or {}})

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of the same model and settings."""
        take_state(self, facts_of(snapshot), snapshot, lambda tensor: None)

    def take_sums(self) -> dict[str, float]:
        """The sums since the last call, and start again from nothing."""
        sums, self.sums = self.sums.values, BatchSums()
        if self.device.type == "cuda":
            sums["gpu_peak_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
        return sums


def refuse_dropout(model: Any) -> None:
    """Raise UserError if the model would drop anything out while training."""
    for name, module in model.named_modules():
        rate = getattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else 0.0
        rate = max(rate, float(getattr(module, "attention_dropout", 0.0) or 0.0))
        if rate > 0:
            raise UserError(Fault("model", f"{name} has dropout {rate}", "set it to 0 in its config.json"))
