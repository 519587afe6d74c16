"""The direction of imports, and what must stay importable without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "dash_exp"

LAYERS = [
    {
        "types",
        "errors",
        "seeding",
        "statistics",
        "config",
        "hashing",
        "cells",
        "ledger",
        "signals",
        "process",
    },
    {
        "tasks",
        "verifiers",
        "sampling.protocol",
        "sampling.waves",
        "learning.advantages",
        "learning.filters",
        "learning.losses",
        "learning.schedules",
        "record",
        "validation",
        "preconditions",
        "provenance",
        "override_faults",
        "own_settings",
        "dataset_faults",
        "server_faults",
        "capacity_model",
        "capacity_sampling",
        "capacity_fit",
        "wave_choice",
        "partners",
        "compose",
        "metrics",
        "terminal",
        "limits",
        "learning.world",
        "checksums",
        "mirror_place",
        "launch.jobs",
        "launch.journal",
        "launch.manifest",
        "launch.processes",
    },
    {
        "mirror",
        "mirror_beside",
        "mirror_cell",
        "mirror_facts",
        "mirror_follow",
        "mirror_points",
        "mirror_store",
        "mirror_sweeps",
    },
    {"modeling", "learning.logprobs"},
    {"checkpoint", "learning", "sampling", "evaluation", "trace_file", "trace_settings", "subject"},
    {"plan"},
    {"updates"},
    {"loop"},
    {"budget"},
    {"build_task"},
    {"build_servers"},
    {"build", "judge"},
    {"attempt", "inference", "rank"},
    {"cell"},
    {"launch"},
    {"__main__", "evaluate", "traces", "serve", "capacity", "capacity_curves", "sweep"},
]
"""A module imports from its own layer and from earlier ones. The longest matching name counts."""

TORCH_FREE = [
    "types",
    "errors",
    "seeding",
    "statistics",
    "config",
    "limits",
    "hashing",
    "cells",
    "ledger",
    "record",
    "metrics",
    "terminal",
    "validation",
    "preconditions",
    "provenance",
    "compose",
    "override_faults",
    "tasks.prompts",
    "tasks.examples",
    "verifiers.pool",
    "tasks.sources",
    "tasks.rows",
    "tasks.generated",
    "tasks.gym",
    "dataset_faults",
    "verifiers.frontends",
    "sampling.protocol",
    "sampling.fleet",
    "sampling.placement",
    "learning.advantages",
    "learning.filters",
    "learning.schedules",
    "learning.world",
    "__main__",
    "evaluation",
    "cell",
    "signals",
    "process",
    "rank",
    "learning.rank_process",
    "learning.watch",
    "budget",
    "partners",
    "judge",
    "evaluate",
    "traces",
    "serve",
    "trace_file",
    "trace_settings",
    "subject",
    "capacity",
    "capacity_curves",
    "capacity_fit",
    "capacity_model",
    "capacity_sampling",
    "wave_choice",
    "sweep",
    "mirror",
    "mirror_beside",
    "mirror_follow",
    *(f"launch.{file.stem}" for file in (PACKAGE / "launch").glob("[a-z]*.py")),
]
ONE_PLACE = {
    "vllm": "sampling/vllm_",
    "peft": "learning/adapters.py",
    "reasoning_gym": "tasks/gym.py",
    "submitit": "launch/slurm",
    "mlflow": "mirror/mlflow.py",
}


def modules() -> dict[str, Path]:
    """Every module of the package, by its name below `dash_exp`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return {name: path for name, path in found.items() if name}


def layer_of(name: str) -> int:
    best, layer = -1, None
    for number, names in enumerate(LAYERS):
        for known in names:
            if (name == known or name.startswith(f"{known}.")) and len(known) > best:
                best, layer = len(known), number
    assert layer is not None, f"{name} is in no layer of tests/test_imports.py"
    return layer


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_one_way(name: str) -> None:
    known = modules()
    for full in imported(known[name]):
        if not full.startswith("dash_exp."):
            continue
        target = full.removeprefix("dash_exp.")
        while target and target not in known:
            target = target.rpartition(".")[0]
        if target and not (name == "__main__" and target == "__main__"):
            assert layer_of(target) <= layer_of(name), f"{name} imports {target}"


def test_each_heavy_library_is_imported_in_one_place() -> None:
    for library, place in ONE_PLACE.items():
        users = {
            str(path.relative_to(PACKAGE))
            for path in modules().values()
            if any(n == library or n.startswith(f"{library}.") for n in imported(path))
        }
        assert users and all(user.startswith(place) for user in users), users


def test_torch_free_modules_import_no_torch() -> None:
    names = ", ".join(f"dash_exp.{n}" for n in TORCH_FREE)
    heavy = "{'torch', 'transformers', 'vllm'}"
    code = f"import sys; import {names}; sys.exit(str({heavy} & set(sys.modules)).replace('set()', '') or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
