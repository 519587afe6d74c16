"""Learner tokens per second, packing, filter, attention over shared prompts and gradient sums included,
against a bare forward and backward of as many tokens without padding.

The bare side is transformers' own model with the same bf16 weights and sdpa attention: rows of equal length
(that of a prompt with its mean completion), cross-entropy on as many positions as are learned from. It keeps
no fp32 sums and weighs nothing. Half of the groups are dropped by the filter; only tokens that are
computed count.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.given import give, skewed
from benchmarks.ours import Ours, asked, config_of
from benchmarks.report import Options, at_least, print_lines
from benchmarks.turns import alternate, seconds, spread

GOAL, SHARE = 0.90, 0.5
CASES = ((29, [6]), (93, [128]), (93, skewed(256)))
"""Tokens of a prompt, and lengths of completions to cycle through."""


def measure(options: Options) -> dict[str, Any]:
    lines, details = [], []
    for prompt, lengths in ((9, [4, 2]),) if options.quick else CASES:
        found = compare(options, prompt, lengths)
        ours, bare = found["ours"]["median"], found["bare"]["median"]
        lines.append(
            asdict(
                at_least(
                    GOAL,
                    ours / bare,
                    options,
                    work=f"learner, {found['completions']} x {prompt} + "
                    f"{min(lengths)}..{max(lengths)} tokens, kept {SHARE:g}",
                    against="bare forward + backward",
                    ours=ours,
                    rival=bare,
                    unit="tokens/s",
                )
            )
        )
        details.append({"prompt_tokens": prompt, "lengths": lengths, **found})
    print_lines("Learner", lines)
    return {"lines": lines, "tokens_per_s": details}


def compare(options: Options, prompt: int, lengths: Sequence[int]) -> dict[str, Any]:
    overrides = asked(options, "algorithm.group_size=4", f"sampler.max_new_tokens={max(lengths)}")
    config = config_of("advantage", 0.0, options.threads, overrides)
    with tempfile.TemporaryDirectory() as scratch, Ours(config, options.cache, Path(scratch)) as ours:
        give(ours, prompt_tokens=prompt, lengths=lengths, share=SHARE)
        first = ours.step()
        assert abs(first["filter/kept_share"] - SHARE) < 1e-9, "the filter kept something else"
        tokens, targets = first["tokens/computed"], first["tokens/backpropagated"]
        row_tokens = prompt + round(targets / first["completions/forwarded"])
        bare, bare_tokens = make_bare(ours, tokens, targets, row_tokens, config.learner.micro_batch_tokens)

        def learn(number: int) -> float:
            row = ours.step()
            return float(row["tokens/computed"] / (row["time/backprop_s"] + row["time/logprob_s"]))

        sides = {"ours": learn, "bare": lambda number: bare_tokens / seconds(bare)}
        rates = alternate(sides, options.rounds)
    return {
        "computed": tokens,
        "targets": targets,
        "completions": first["completions/forwarded"],
        "ours": spread(rates["ours"]),
        "bare": spread(rates["bare"]),
    }


def make_bare(
    ours: Ours, tokens: int, targets: int, row_tokens: int, micro_batch: int
) -> tuple[Callable[[], None], int]:
    """One pass over `tokens` tokens in unpadded rows, a micro-batch at a time; and how many they are,
    since rows are complete."""
    import torch

    from dash_exp.learning.learner import device_of
    from dash_exp.modeling.source import load_model

    device = device_of(ours.config.learner.device)
    model = load_model(ours.built.source.folder, torch.bfloat16, "sdpa").to(device)
    head = model.get_output_embeddings()
    for module in (model.get_input_embeddings(), head):
        module.weight.requires_grad_(not ours.config.learner.freeze_embeddings)
    rows = max(1, round(tokens / row_tokens))
    per_pass = max(1, micro_batch // row_tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, ours.vocabulary, (rows, row_tokens), generator=generator).to(device)
    learned = min(row_tokens - 1, max(1, round(targets / rows)))

    def once() -> None:
        for first in range(0, rows, per_pass):
            part = ids[first : first + per_pass]
            hidden = model.get_decoder()(input_ids=part, use_cache=False).last_hidden_state
            logits = head(hidden[:, -learned - 1 : -1].reshape(-1, hidden.shape[-1]).contiguous()).float()
            torch.nn.functional.cross_entropy(logits, part[:, -learned:].reshape(-1)).backward()
        model.zero_grad(set_to_none=True)

    return once, rows * row_tokens
