"""The pages in a real browser (Chromium, headless): nothing clipped, nothing over another thing, no error.

A copy of the page, with a script that measures it, stands in a frame of the width that is asked for: windows
have a least width. Skipped where no Chromium is installed (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers.run_fixture import write_run
from rlprune.report import html as report

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]
RESULTS = Path(__file__).parents[2] / "docs" / "results"
WIDTHS = (390, 700, 1000, 1400)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
PROBE = """
<script>
const problems = [];
window.addEventListener("error", (event) => problems.push("error: " + event.message));
window.addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) problems.push("the page is wider than the window");
  const seen = (e) => e.getClientRects().length && getComputedStyle(e).visibility !== "hidden";
  for (const e of document.querySelectorAll("body *")) {
    if (!seen(e) || e.closest(".scroll") || e.closest(".tabs > input")) continue;
    const box = e.getBoundingClientRect();
    if (e.matches("input, #tip")) continue;
    const out = box.right > width + 1 || box.left < -1;
    if (out) problems.push("outside: " + e.tagName + " " + (e.textContent || "").slice(0, 40));
  }
  for (const e of document.querySelectorAll("td, th, p, figcaption, summary, label, pre, dd, .count")) {
    const block = seen(e) && !e.closest(".scroll") && getComputedStyle(e).display !== "inline";
    if (block && e.scrollWidth > e.clientWidth + 1)
      problems.push("clipped: " + e.textContent.slice(0, 40));
  }
  for (const picture of document.querySelectorAll("svg")) {
    if (!seen(picture)) continue;
    const words = [...picture.querySelectorAll("text")].map((e) => [e.textContent, e.getBoundingClientRect()]);
    const frame = picture.getBoundingClientRect();
    words.forEach(([text, a], i) => {
      if (a.left < frame.left - 2 || a.right > frame.right + 2) problems.push("outside its picture: " + text);
      for (const [other, b] of words.slice(0, i))
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
          problems.push("over each other: " + text + " | " + other);
    });
  }
  const dark = getComputedStyle(document.body).backgroundColor;
  const table = document.querySelector("table.short");
  let sorted = null;
  if (table) {
    const first = () => table.tBodies[0].rows[0].cells[0].textContent;
    const before = first();
    const head = table.tHead.rows[0].cells[0].querySelector("button");
    head.click(); head.click();
    const names = [...table.tBodies[0].rows].map((row) => row.cells[0].dataset.sort);
    sorted = JSON.stringify(names) === JSON.stringify([...names].sort((a, b) => b.localeCompare(a)));
  }
  const out = parent.document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify({ width, problems, dark, sorted, run: window.harmed || 0 });
  parent.document.body.append(out);
});
</script>
"""


def looked_at(page: Path, width: int, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """What the browser says of a page at a width, after its scripts have run."""
    text = page.read_text(encoding="utf-8")
    policy = re.compile(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>")
    assert policy.search(text)
    inner = policy.sub("", text).replace("<title>", PROBE + "<title>", 1)
    probed = tmp_path / f"probed-{width}.html"
    frame = f'<iframe width="{width}" height="3000" style="border:0" srcdoc="{html.escape(inner)}"></iframe>'
    probed.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frame}", encoding="utf-8")
    done = browse(probed, 1600, tmp_path, "--dump-dom", *flags)
    found = re.search(r'<pre id="found">(.*?)</pre>', done, re.DOTALL)
    assert found, done[-500:]
    return dict(json.loads(html.unescape(found[1])))


def browse(page: Path, width: int, tmp_path: Path, *flags: str) -> str:
    assert BROWSER is not None
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, *FLAGS, profile, f"--window-size={width},3000", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with many groups and long names, and benchmarks of several seeds and budgets and of one seed."""
    folder = tmp_path_factory.mktemp("pages")
    results = write_run(folder / "run", groups=40)
    results["groups"][3]["name"] = "a_module_with_a_name.that_goes_on.and_on.until_it_does_not_fit.conv1"
    results["workload"] |= {"metric": "accuracy", "higher_is_better": True}
    results["budget"]["metric"] = "block_params"  # so that the table has as many columns as it may
    for row in results["rows"]:
        row |= {"block_params": row["cost"] / 200, "bytes": 1_000_000 + row["evaluations"]}
    (folder / "run" / "results.json").write_text(json.dumps(results))
    for name in ("digits", "cifar10_resnet20", "smollm2_135m_gguf"):
        (folder / name).mkdir()
        shutil.copy(RESULTS / f"{name}.json", folder / name / "results.json")
    return {path.name: report.build(path) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "digits", "cifar10_resnet20", "smollm2_135m_gguf"])
def test_nothing_is_clipped_or_over_another_thing(
    name: str, width: int, pages: dict[str, Path], tmp_path: Path
) -> None:
    found = looked_at(pages[name], width, tmp_path)
    assert found["width"] == width
    assert found["problems"] == []
    assert found["sorted"] is True
    assert found["dark"] == "rgb(255, 255, 255)"


def test_the_page_is_dark_where_the_system_is(pages: dict[str, Path], tmp_path: Path) -> None:
    found = looked_at(pages["run"], 1000, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert found["dark"] == "rgb(22, 24, 26)" and found["problems"] == []


def test_a_screenshot_is_taken_of_every_width(pages: dict[str, Path], tmp_path: Path) -> None:
    for width in WIDTHS:
        target = tmp_path / f"{width}.png"
        browse(pages["run"], width, tmp_path, f"--screenshot={target}")
        assert target.stat().st_size > 20_000


def test_it_prints(pages: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "page.pdf"
    browse(pages["run"], 1000, tmp_path, f"--print-to-pdf={target}")
    assert target.read_bytes().startswith(b"%PDF")


def test_names_with_html_in_them_run_nothing(tmp_path: Path) -> None:
    results = write_run(tmp_path / "run")
    evil = "</title></script><script>window.harmed=1</script><img src=x onerror='window.harmed=2'>"
    evil += '"><svg onload=window.harmed=3>'
    results["workload"]["name"] = results["groups"][0]["name"] = evil
    for row in results["rows"]:
        row["method"] += evil
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    (tmp_path / "run" / "config.yaml").write_text(evil)
    found = looked_at(report.build(tmp_path / "run"), 1000, tmp_path)
    assert found["run"] == 0 and not any("error" in problem for problem in found["problems"])
