"""Imports between packages go down only and form no cycle; each heavy library has one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

from dash_exp import PACKAGE
from tests.conftest import REPOSITORY

LEVELS = [
    {"types", "errors", "plugins", "jsonl", "text", "seeding", "statistics", "signals"},
    {"config", "verifiers"},
    {"record"},
    {"modeling", "tasks", "mirror"},
    {"sampling", "learning"},
    {"evaluation", "capacity"},
    {"train"},
    {"cell", "evaluate", "traces", "judge", "serve"},
    {"sweep"},
    {"__main__"},
]
"""A package imports from its own level and from the ones before it."""

NEEDS_TORCH = {
    "learning",
    "modeling",
    "record.checkpoint",
    "sampling.hf",
    "sampling.vllm",
    "sampling.transfer.device",
    "sampling.transfer.path",
    "sampling.fleet.sampler",
    "tasks.demonstrations",
    "train",
}
TORCH_FREE = {
    "learning.advantages",
    "learning.distributed.launch",
    "learning.settings",
    "train.budget",
    "train.display",
    "train.build_tasks",
}
"""Exceptions from `NEEDS_TORCH`. All modules but those named there are imported without torch."""

ONE_PLACE = {
    "vllm": ("sampling/vllm/", "sampling/transfer/device.py"),
    "peft": "learning/weights.py",
    "reasoning_gym": ("tasks/generated.py", "config/environment.py", "verifiers/code/candidate.py"),
    "submitit": "sweep/slurm/",
    "mlflow": "mirror/mlflow.py",
    "wandb": "mirror/local.py",
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its name below `dash_exp`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return {name: path for name, path in found.items() if name}


@cache
def imported(name: str) -> frozenset[str]:
    """Full names of what a module imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def package_of(name: str) -> str:
    return name.partition(".")[0]


def package_imports() -> dict[str, set[str]]:
    """The packages that each package imports from."""
    found: dict[str, set[str]] = {package_of(name): set() for name in modules()}
    for name in modules():
        targets = (full.removeprefix("dash_exp.") for full in imported(name) if full.startswith("dash_exp."))
        found[package_of(name)] |= {package_of(t) for t in targets} & set(found) - {package_of(name)}
    return found


def test_every_package_stands_on_a_level_and_imports_only_downwards() -> None:
    level = {package: number for number, packages in enumerate(LEVELS) for package in packages}
    edges = package_imports()
    assert set(edges) == set(level)
    upwards = {(a, b) for a, targets in edges.items() for b in targets if level[b] > level[a]}
    assert upwards == set()


def test_packages_form_no_cycle() -> None:
    edges = package_imports()
    while leaves := {package for package, targets in edges.items() if not targets & set(edges)}:
        edges = {package: targets for package, targets in edges.items() if package not in leaves}
    assert edges == {}


def test_each_heavy_library_is_imported_in_one_place() -> None:
    for library, places in ONE_PLACE.items():
        users = [
            str(path.relative_to(PACKAGE))
            for name, path in modules().items()
            if any(full == library or full.startswith(f"{library}.") for full in imported(name))
        ]
        assert users and all(user.startswith(places) for user in users), users


def test_modules_import_no_torch_unless_they_need_it() -> None:
    free = [
        f"dash_exp.{name}"
        for name in modules()
        if name in TORCH_FREE or not any(f"{name}.".startswith(f"{heavy}.") for heavy in NEEDS_TORCH)
    ]
    heavy = "{'torch', 'transformers', 'vllm'}"
    code = f"""
import importlib, sys
for name in {free!r}:
    importlib.import_module(name)
    found = {heavy} & set(sys.modules)
    if found: sys.exit(f'{{name}} imports {{found}}')
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
