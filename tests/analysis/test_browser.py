"""The page in a real browser: everything loads, nothing is fetched, and it fits a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from analysis.load import load
from analysis.make import make
from tests.analysis.test_report import pair_of_arms

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>
addEventListener('load', () => {
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
  document.title = 'PROBE' + JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    images: document.images.length, fetched: performance.getEntriesByType('resource')
      .filter(e => !e.name.startsWith('data:')).length,
    dangling: [...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.hash)).length,
  });
});
</script>"""


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no chromium to look at the page with")
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_in_a_browser(tmp_path: Path, width: int) -> None:
    text = make(load([pair_of_arms(tmp_path / "pair")])).files["report.html"].decode()
    page = tmp_path / "report.html"
    page.write_text(text.replace("</body>", f"{PROBE}</body>"))
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>PROBE(\{.*?\})</title>", done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen["images"] >= 4 and seen["broken"] == 0
    assert seen["fetched"] == 0 and seen["dangling"] == 0
    assert seen["scroll"] <= seen["inner"], seen
    assert seen["wide"] == []
