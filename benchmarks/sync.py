"""Weights to a sampler: bytes moved and seconds, against copying as many bytes at this machine's speed.

`vllm_servers`: written into shared memory, summed, loaded by the server, which sums them again: every byte is
moved twice. Checksums are listed separately: the sender's is timed, and the server's taken to be as long (the
same sum of the same bytes). `vllm`: passed within the process, moved once, with no checksum.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ours import Ours, asked, config_of
from benchmarks.report import Options, at_most, need_vllm, print_lines, print_table
from benchmarks.turns import alternate, seconds, spread

GOAL = 5.0
MOVES = {"vllm": 1, "vllm_servers": 2}
"""How often every byte is moved."""


def measure(options: Options) -> dict[str, Any]:
    need_vllm(options)
    lines, details = [], {}
    for engine, moves in MOVES.items():
        found = details[engine] = syncs(options, engine)
        moved, copied = found["seconds"]["median"], moves * found["copy"]["median"]
        lines.append(
            asdict(
                at_most(
                    GOAL,
                    moved / copied,
                    options,
                    work=f"weight sync, {engine}, {moves} x {found['bytes'] / 1e6:.0f} MB",
                    against="bytes moved / bandwidth of a copy",
                    ours=moved,
                    rival=copied,
                    unit="s",
                )
            )
        )
    print_lines("Weight sync, checksums apart", lines)
    names = ["write", "checksum", "load", "server checksum (as the sender's)", "in all"]
    rows = [
        [engine, *(f"{found['parts'].get(n, 0.0):.3f}" for n in names)] for engine, found in details.items()
    ]
    print_table("Its parts, s (median)", ["sampler", *names], rows)
    return {"lines": lines, "syncs": details}


def syncs(options: Options, engine: str) -> dict[str, Any]:
    """Seconds of a sync without checksums, its parts, and of a plain copy, in turn."""
    import statistics

    overrides = asked(options, f"sampler={engine}", "sampler.streaming=false")
    config = config_of("none", 0.0, options.threads, overrides)
    with tempfile.TemporaryDirectory() as scratch, Ours(config, options.cache, Path(scratch)) as ours:
        sampler: Any = ours.built.parts.sampler
        ours.step()
        named = list(sampler.weights())
        size = sum(tensor.nbytes for _, tensor in named)
        copies = [(tensor.clone(), tensor) for _, tensor in named]
        version = 1

        def sync(number: int) -> dict[str, float]:
            nonlocal version
            version += 1
            total = seconds(lambda: sampler.load_weights(version))
            parts = dict(getattr(sampler, "sync_seconds", {}))
            again = parts.get("checksum", 0.0)
            if parts:
                parts["server checksum (as the sender's)"] = again
            return {**parts, "in all": total, "apart": total - 2 * again}

        def copy(number: int) -> float:
            return seconds(lambda: [into.copy_(from_) for into, from_ in copies])

        found = alternate({"sync": sync, "copy": copy}, options.rounds)
    rows: list[dict[str, float]] = found["sync"]  # type: ignore[assignment]
    copied: list[float] = found["copy"]  # type: ignore[assignment]
    return {
        "bytes": size,
        "seconds": spread([r["apart"] for r in rows]),
        "copy": spread(copied),
        "bandwidth_bytes_per_s": size / statistics.median(copied),
        "parts": {name: statistics.median(r[name] for r in rows) for name in rows[0] if name != "apart"},
    }
