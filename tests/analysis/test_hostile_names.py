"""Names come from records: they are shown as they are, run nowhere, and are never paths."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.__main__ import main
from analysis.load import load
from analysis.make import make, write
from analysis.report import page
from analysis.variants import variants
from tests.analysis.folders import config, make_cell

MODEL = '../../../out<script>alert(1)</script>"><img src=x onerror=alert(1)>{{7*7}}$\\frac{\x1b[31m'
DATA = "\\input{/etc/passwd}%</style></title><b>[link](javascript:alert(1))"
ARMS = ("dash", '=HYPERLINK("http://x")', "@SUM(1)|[red]a[/nope]")


class Page(HTMLParser):
    """The elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "outputs"
    for number, arm in enumerate(ARMS):
        plain = config(arm, 0, model__name=MODEL, dataset__name=DATA)
        make_cell(root, f"c-{number:08x}", plain, after=(1.0, 0.0))
    return root


@pytest.fixture(scope="module")
def out(outputs: Path) -> Path:
    """A report without pictures, which take long."""
    records = load([outputs])
    made = make(records, pictures=False)
    text = page(records, variants(records), made.tables, [], made.findings, made.problems)
    folder = outputs.parent / "a" / "b" / "report"
    write(replace(made, files={**made.files, "report.html": text.encode()}), folder)
    return folder


def test_no_name_becomes_html(out: Path) -> None:
    pages = [out / "report.html", *(out / "tables").glob("*.html")]
    assert len(pages) > 3
    for path in pages:
        page = Page()
        page.feed(path.read_text())
        tags = {tag for tag, _ in page.seen}
        assert not tags & {"script", "input", "iframe"}
        assert all(key in ("alt", "src") for tag, facts in page.seen if tag == "img" for key in facts)
        assert not any(key.startswith("on") for _, facts in page.seen for key in facts)
        assert "49" not in re.findall(r"out&lt;.{0,90}", path.read_text())
    assert "&lt;script&gt;" in pages[0].read_text()


def test_no_name_is_a_formula_a_command_or_a_link(out: Path) -> None:
    for path in (out / "tables").glob("*.csv"):
        for row in csv.reader(path.read_text().splitlines()):
            texts = [*row[:5], row[-1]]
            assert not any(text.startswith(("=", "@", "+", "-")) for text in texts), texts
    for path in (out / "tables").glob("*.tex"):
        assert "\\input" not in path.read_text() and "$" not in path.read_text().replace("\\$", "")
    for path in (out / "tables").glob("*.md"):
        assert "](javascript" not in path.read_text() and "<script" not in path.read_text().replace("\\<", "")


def written(folder: Path) -> list[str]:
    """What was written beside the records; each must be a plain name below --out."""
    names = [str(path.relative_to(folder)) for path in folder.parent.rglob("*") if path.is_file()]
    assert [name for name in names if not re.fullmatch(r"[\w.+=@-]+(/[\w.+=@-]+)?", name, re.ASCII)] == []
    return names


def test_no_name_is_a_path(out: Path, outputs: Path) -> None:
    assert len(written(out)) > 3
    assert {path.name for path in outputs.parent.iterdir()} == {"outputs", "a"}
    assert [path.name for path in out.parent.iterdir()] == ["report"]


def test_live_shows_names_without_control_characters(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["live", str(outputs), "--once"]) == 0
    assert "@SUM(1)|[red]a[/nope]" in capsys.readouterr().out


@pytest.mark.long
def test_the_command_writes_nothing_elsewhere(outputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "report"
    assert main([str(outputs), "--out", str(folder)]) == 0
    assert any("figure" in name for name in written(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
