"""The learner: accumulates unnormalised gradient sums in fp32, then divides once and updates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dash_exp.checkpoint import Snapshot
from dash_exp.errors import Fault, UserError
from dash_exp.learning import losses
from dash_exp.learning.adapters import add_adapters, disabled, plain_weights
from dash_exp.learning.agreement import in_buckets
from dash_exp.learning.logprobs import token_logprobs
from dash_exp.learning.packing import MicroBatch, Packed, pack
from dash_exp.learning.schedules import kl_coefficient, learning_rate
from dash_exp.learning.settings import BatchSums, Objective, Optimization, UpdateStats


class Learner:
    """Owns the policy. `model` computes (bf16 or fp32); `masters` are what the optimizer moves.

    With `bf16_mixed` every trainable tensor has an fp32 master and the model holds its rounded copy;
    with `fp32` and `bf16` the model's own tensors are the masters.
    """

    def __init__(
        self, model: Any, objective: Objective, setting: Optimization, *,
        vocabulary: int, logit_chunk: int, gradient_checkpointing: bool = False,
    ):  # fmt: skip
        self.objective, self.setting = objective, setting
        self.vocabulary, self.logit_chunk = vocabulary, logit_chunk
        self.model = model.eval()  # dropout is never on: two scorings of a sample are identical
        self.head: Tensor = model.get_output_embeddings().weight
        if setting.adapters is not None:
            add_adapters(model, setting.adapters)
        elif setting.freeze_embeddings:
            model.get_input_embeddings().weight.requires_grad_(False)
            self.head.requires_grad_(False)
        self.masters: dict[str, Tensor] = {}
        self._prepare_precision()
        self.gradients = {name: torch.zeros_like(m, dtype=torch.float32) for name, m in self.masters.items()}
        self._touched: set[str] = set()
        self._hook()
        if gradient_checkpointing:
            model.train()  # transformers checkpoints in training mode only; dropout is refused below
            model.gradient_checkpointing_enable({"use_reentrant": False})
        refuse_dropout(model)
        copied = objective.beta > 0 and setting.adapters is None  # else the base lies beneath the adapters
        self.reference = copy.deepcopy(model).requires_grad_(False).eval() if copied else None
        for master in self.masters.values():
            master.grad = None
        self.optimizer = torch.optim.AdamW(
            list(self.masters.values()), lr=setting.lr, betas=setting.betas, eps=setting.eps,
            weight_decay=setting.weight_decay, fused=True,
        )  # fmt: skip
        self.updates = 0
        self.sums = BatchSums()
        self._laid_out: tuple[MicroBatch, Packed] | None = None

    def _prepare_precision(self) -> None:
        for name, parameter in self.model.named_parameters():
            full = parameter.data.float()
            if self.setting.precision != "fp32":
                parameter.data = full.to(torch.bfloat16)
            if parameter.requires_grad:
                mixed = self.setting.precision == "bf16_mixed"
                self.masters[name] = full.clone() if mixed else parameter

    def _hook(self) -> None:
        """Each backward's gradient goes to the fp32 sum at once and is freed."""

        def to_sum(name: str) -> Any:
            def add(parameter: Tensor) -> None:
                assert parameter.grad is not None
                if name in self._touched:
                    self.gradients[name] += parameter.grad
                else:
                    self.gradients[name].copy_(parameter.grad)
                    self._touched.add(name)
                parameter.grad = None

            return add

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(to_sum(name))

    def _pack(self, batch: MicroBatch) -> Packed:
        """Lay it out on the device; the last one is kept, since the reference's forward comes before."""
        if self._laid_out is None or self._laid_out[0] is not batch:
            self._laid_out = (batch, pack(batch, self.head.device))
        return self._laid_out[1]

    def _score(self, model: Any, batch: Packed) -> tuple[Tensor, Tensor]:
        hidden = model.get_decoder()(
            input_ids=batch.input_ids[None], position_ids=batch.position_ids[None],
            context=batch.context, use_cache=False,
        ).last_hidden_state[0]  # fmt: skip
        return token_logprobs(
            hidden.index_select(0, batch.logit_index), model.get_output_embeddings().weight,
            batch.targets, temperature=self.objective.temperature, vocabulary=self.vocabulary,
            chunk=self.logit_chunk,
        )  # fmt: skip

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
            self.updates, lr=plan.lr, schedule=plan.schedule, warmup_share=plan.warmup_share,
            total=plan.total_updates,
        )  # fmt: skip

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities [C] of the current policy, without gradient."""
        packed = self._pack(batch)
        logprobs, entropy = self._score(self.model, packed)
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
        if self.reference is not None:
            return self._score(self.reference, self._pack(batch))[0]
        with disabled(self.model):
            return self._score(self.model, self._pack(batch))[0]

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
        logprobs, entropy = self._score(self.model, packed)
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
    def sum_gradients(self, total: Callable[[Tensor], None]) -> None:
        """Add the gradient sums of other ranks to these; `total` sums a tensor over all ranks, in place.
        A tensor that no rank touched stays untouched; one that another touched counts as 0 here."""
        names = list(self.masters)
        touched = torch.tensor([name in self._touched for name in names], dtype=torch.float32)
        touched = touched.to(self.head.device)
        total(touched)
        wanted = [name for name, count in zip(names, touched.tolist(), strict=True) if count > 0]
        for name in wanted:
            if name not in self._touched:
                self.gradients[name].zero_()
        in_buckets([self.gradients[name] for name in wanted], total)
        self._touched = set(wanted)

    @torch.no_grad()
    def update(self, denominator: float) -> UpdateStats:
        """Divide the sums once, clip by global norm, move the weights, clear the sums.

        Where nothing was accumulated (every completion dropped), or nothing is counted, nothing moves,
        not even by momentum or weight decay; the update still counts for the schedule.
        """
        lr, beta = self.lr, self.beta
        self.updates += 1
        self._laid_out = None
        if not self._touched or denominator == 0:
            self._touched.clear()
            return UpdateStats(0.0, lr, beta, skipped=True)
        gradients = [self.gradients[name] for name in self.masters]
        for name, gradient in self.gradients.items():
            if name not in self._touched:
                gradient.zero_()
        norm = float(torch.stack([torch.linalg.vector_norm(g) for g in gradients]).norm()) / denominator
        if not math.isfinite(norm):
            self._touched.clear()
            return UpdateStats(norm, lr, beta, skipped=True, finite=False)
        scale = min(1.0, self.setting.max_grad_norm / (norm + 1e-6)) / denominator
        for master, gradient in zip(self.masters.values(), gradients, strict=True):
            gradient *= scale
            master.grad = gradient.to(master.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for master in self.masters.values():
            master.grad = None
        self._copy_masters()
        self._touched.clear()
        return UpdateStats(norm, lr, beta, skipped=False)

    def discard(self) -> None:
        """Forget what was accumulated, gradients and metrics alike."""
        self._touched.clear()
        self.sums = BatchSums()
        self._laid_out = None

    def _copy_masters(self) -> None:
        if self.setting.precision == "bf16_mixed":
            for name, parameter in self.model.named_parameters():
                if name in self.masters:
                    parameter.data.copy_(self.masters[name])

    def compute_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights the policy computes with, by name, for a sampler that holds its own."""
        if self.setting.adapters is not None:
            yield from plain_weights(self.model)
            return
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def snapshot(
        self, step: int, *, moments: bool = True, row: Mapping[str, Any] | None = None
    ) -> Snapshot:  # fmt: skip
        """Weights (fp32, adapters merged), optimizer moments and counters, not copied: save before the
        next update. `row` is what the record will say of this step."""
        kept: dict[str, Tensor] = {}
        if self.setting.adapters is not None:
            weights = dict(plain_weights(self.model, torch.float32))
            # merged weights cannot be taken apart again, so the adapters are kept beside them
            kept = {f"master/{name}": master.detach() for name, master in self.masters.items()}
        else:
            weights = {
                name: self.masters.get(name, parameter).detach().float()
                for name, parameter in self.model.named_parameters()  # a tied tensor comes once
            }
        for name, master in self.masters.items() if moments else ():
            for key, value in self.optimizer.state.get(master, {}).items():
                kept[f"{key}/{name}"] = value
        return Snapshot(weights, kept, {"step": step, "updates": self.updates, "row": row or {}})

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of the same model and settings."""
        for name, parameter in self.model.named_parameters():
            value = snapshot.optimizer.get(f"master/{name}", snapshot.weights.get(name))
            if value is None:  # frozen beneath an adapter, so as it was loaded
                continue
            parameter.data.copy_(value)
            if name in self.masters:
                self.masters[name].copy_(value)
        for name, master in self.masters.items():
            keys = ("exp_avg", "exp_avg_sq", "step")
            if f"step/{name}" in snapshot.optimizer:
                state = {k: snapshot.optimizer[f"{k}/{name}"] for k in keys}
                state["exp_avg"] = state["exp_avg"].to(master)
                state["exp_avg_sq"] = state["exp_avg_sq"].to(master)
                state["step"] = state["step"].to(master.device, torch.float32)
                self.optimizer.state[master] = state
        self.updates = int(snapshot.state["updates"])

    def take_sums(self) -> dict[str, float]:
        """The sums since the last call, and start again from nothing."""
        sums, self.sums = self.sums.values, BatchSums()
        if self.head.is_cuda:
            sums["gpu_peak_mb"] = torch.cuda.max_memory_allocated(self.head.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.head.device)
        return sums


def refuse_dropout(model: Any) -> None:
    """Raise UserError if the model would drop anything out while training."""
    for name, module in model.named_modules():
        rate = getattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else 0.0
        rate = max(rate, float(getattr(module, "attention_dropout", 0.0) or 0.0))
        if rate > 0:
            raise UserError(Fault("model", f"{name} has dropout {rate}", "set it to 0 in its config.json"))
