"""Links of the documentation lead somewhere, files that it names exist, and the README's map is complete."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from dash_exp import PACKAGE
from tests.conftest import REPOSITORY

SKIPPED = {".venv", "outputs", "shared", "build", "dist"}
PAGES = sorted(
    path
    for path in REPOSITORY.rglob("*.md")
    if not {
        part for part in path.relative_to(REPOSITORY).parts[:-1] if part in SKIPPED or part.startswith(".")
    }
)
CODE = [
    p for name in ("dash_exp", "analysis", "hydra_plugins") for p in sorted((REPOSITORY / name).rglob("*.py"))
]
LINK = re.compile(r"\]\(([^()\s]+)\)")
SOURCE_FILE = re.compile(r"`((?:conf/|sweeps/)[\w./-]+\.yaml|[\w./-]+\.(?:py|md))(?::(\w+))?`")
PAGE = re.compile(r"\bdocs/\w+\.md\b")
EXAMPLES = {"mine.yaml", "mine_test.yaml"}
"""Files that a reader is asked to write."""


@cache
def repository_files() -> frozenset[str]:
    found = (path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*.*"))
    return frozenset(f"/{path}" for path in found if not SKIPPED & {*path.parts})


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A name may leave out folders in front: `train/loop.py` is `dash_exp/train/loop.py`."""
    assert missing(page.read_text(encoding="utf-8")) == []


def test_files_that_docstrings_and_comments_name_exist() -> None:
    found = {str(path.relative_to(REPOSITORY)): missing(prose(path)) for path in CODE}
    assert {name: files for name, files in found.items() if files} == {}


def test_pages_that_code_and_configs_mention_exist() -> None:
    """Also outside docstrings: the meaning of a config key, an error message, a comment in a yaml file."""
    configs = [*(REPOSITORY / "conf").rglob("*.yaml"), *(REPOSITORY / "sweeps").rglob("*.yaml")]
    mentions = {page for path in (*CODE, *configs) for page in PAGE.findall(path.read_text(encoding="utf-8"))}
    assert mentions
    assert [page for page in sorted(mentions) if not (REPOSITORY / page).is_file()] == []


def missing(text: str) -> list[str]:
    """Files that are not there, and `file.py:name` where the file does not define that name."""
    absent = []
    for name, definition in SOURCE_FILE.findall(text):
        files = [REPOSITORY / file[1:] for file in repository_files() if file.endswith(f"/{name}")]
        defined = re.compile(rf"^ *(?:def|class) {definition}\b", flags=re.M)
        if (Path(name).name not in EXAMPLES and not files) or (
            definition and not any(defined.search(f.read_text(encoding="utf-8")) for f in files)
        ):
            absent.append(f"{name}:{definition}".rstrip(":"))
    return absent


def prose(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    values = (n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr))
    strings = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    return "\n".join([*comments, *strings])


def test_the_readme_maps_every_package_and_is_short() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`dash_exp/([\w.]+)/?`", row)}
    there = {
        path.name for path in PACKAGE.iterdir() if path.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    assert named == there
    assert len(text.splitlines()) <= 120
