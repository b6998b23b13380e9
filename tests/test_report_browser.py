"""The page in a real browser: it sorts, filters, shows tooltips and raises no error. Skipped without Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from report_sample import sample_report

from s2d_deploy.report import write_reports

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")

# Runs after the page's own script; writes what it saw into the document, which --dump-dom prints.
DRIVER = """
const seen = {errors: window.errorsSeen};
const rows = (id) => [...document.querySelectorAll(`#${id}-table tbody tr`)].filter((r) => !r.hidden);
const column = (id, n) => rows(id).map((r) => r.cells[n].textContent);
const press = (id, n) => document.querySelectorAll(`#${id}-table thead th button`)[n].click();
const set = (field, value) => { field.value = value; field.dispatchEvent(new Event("input", {bubbles: true})); };
press("results", 10); seen.slowest = column("results", 10);
press("results", 10); seen.fastest = column("results", 10);
seen.aria = document.querySelectorAll("#results-table thead th")[10].getAttribute("aria-sort");
press("results", 0); seen.targets = column("results", 0);
const filters = document.querySelectorAll("#results form select");
set(filters[0], "tensorrt"); set(filters[2], "built"); seen.built = column("results", 1);
seen.counted = document.querySelector("#results form output").textContent;
set(filters[0], ""); set(filters[2], ""); seen.all = rows("results").length;
const search = document.querySelector("#layers input"), shows = document.querySelector("#layers select");
set(search, "declared"); seen.fallback = column("layers", 0);
set(shows, [...shows.options].find((o) => o.text === "ort fp32").value); seen.fallback_fp32 = rows("layers").length;
set(search, "LAYERS.3 fc2"); seen.found = column("layers", 0);
const mark = document.querySelector("svg.plot [data-tip]"), tip = document.getElementById("tip");
mark.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: 300, clientY: 300}));
seen.tip = tip.hidden ? null : tip.textContent;
document.body.dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
seen.gone = tip.hidden;
const plot = mark.closest("svg");
for (let i = 0; i < 2; i++) plot.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
seen.keyed = tip.textContent;
seen.titles = document.querySelectorAll("svg.plot title").length;
const ground = () => getComputedStyle(document.body).backgroundColor;
const before = ground(); document.getElementById("theme").click();
seen.themed = before !== ground();
// Contrast of every piece of text that is drawn, in both themes (WCAG 2: (L1 + 0.05) / (L2 + 0.05)).
const rgb = (c) => {
  const m = c.match(/[0-9.]+/g).map(Number);
  return m.length > 3 && m[3] === 0 ? null : m.slice(0, 3);
};
const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = (e) => rgb(getComputedStyle(e).backgroundColor) ?? behind(e.parentElement);
seen.faint = [];
for (let theme = 0; theme < 2; theme++) {
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || ["SCRIPT", "STYLE"].includes(e.tagName) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), inside = e.classList.contains("inside");
    const front = rgb(e.namespaceURI.endsWith("svg") ? style.fill : style.color);
    const ground = inside ? rgb(getComputedStyle(document.querySelector(`rect.${e.classList[1]}`)).fill) : behind(e);
    const [a, b] = [light(front), light(ground)].sort((x, y) => y - x);
    const name = `${e.tagName}.${e.getAttribute("class")} ${e.textContent.slice(0, 20)}`;
    if ((a + 0.05) / (b + 0.05) < 4.5) seen.faint.push(name);
  }
  document.getElementById("theme").click();
}
document.body.dataset.seen = JSON.stringify(seen);
"""


def browse(page: Path, profile: Path, *options: str) -> tuple[str, str]:
    """(document after the scripts ran, console messages)."""
    assert BROWSER is not None
    arguments = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"),
        f"--user-data-dir={profile}",
    ]
    command = [BROWSER, *arguments, *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reports(sample_report(), tmp_path_factory.mktemp("report"))[2]


def test_the_page_as_written_raises_nothing(page: Path, tmp_path: Path) -> None:
    document, console = browse(page, tmp_path)
    assert console == ""
    assert '<th scope="col" class="num" title="median latency" aria-sort="none"><button type="button">p50' in document


def test_interaction(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    # The policy forbids any script but the page's own, so the driven copy goes without it.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    catch = "<script>window.errorsSeen = []; addEventListener('error', (e) => errorsSeen.push(e.message));</script>"
    text = text.replace("<style>", f"{catch}<style>", 1).replace("</body>", f"<script>{DRIVER}</script></body>")
    driven = tmp_path / "driven.html"
    driven.write_text(text)
    document, console = browse(driven, tmp_path / "profile")
    assert console == ""
    found = re.search(r'data-seen="([^"]*)"', document)
    assert found, "the driver did not finish"
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    assert seen["errors"] == []

    measured = [float(cell.split()[0]) for cell in seen["slowest"] if not cell.startswith("–")]
    assert len(measured) == 10
    assert measured == sorted(measured, reverse=True)
    assert [c.startswith("–") for c in seen["slowest"]] == [False] * 10 + [True] * 5, "missing values come last"
    assert [c.startswith("–") for c in seen["fastest"]] == [False] * 10 + [True] * 5, "in both orders"
    assert [float(c.split()[0]) for c in seen["fastest"][:10]] == sorted(measured)
    assert seen["aria"] == "ascending"
    assert [next(t for t in ("ort", "tensorrt", "tvm") if c.startswith(t)) for c in seen["targets"]] == (
        ["ort"] * 5 + ["tensorrt"] * 5 + ["tvm"] * 5
    )

    assert sorted(seen["built"]) == ["fp32", "w4a16", "w4a4", "w8a8"]
    assert seen["counted"] == "4 of 15 rows"
    assert seen["all"] == 15
    assert seen["fallback"] == ["vit.layers.1.attention.output"]
    assert seen["fallback_fp32"] == 0
    assert seen["found"] == ["vit.layers.3.mlp.fc2"]
    assert seen["tip"] == "ort fp32: float 0.9833"
    assert seen["gone"] is True
    assert seen["keyed"] == "ort fp32: simulated 0.9833"
    assert seen["titles"] == 0
    assert seen["themed"] is True
    assert seen["faint"] == []
