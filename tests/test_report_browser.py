"""The page in a real browser, by real mouse and keys: sorting, filters, tooltips, cards, theme, paper, narrow screens.

Skipped without Chromium. One browser serves all tests (`benchmarks/_browser.py` drives it).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from report_sample import sample_report

from s2d_deploy.report import write_reports

_browser, _report_document = import_module("_browser"), import_module("_report_document")

PROGRAM = _browser.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"none of {', '.join(_browser.NAMES)} is installed")

RESULTS, LAYERS, GATES = "#results-table", "#layers-table", "#gates-table"
TIP = "(() => { const t = document.getElementById('tip'); return t.hidden ? null : t.textContent; })()"
FOCUS = "document.activeElement.textContent.trim()"
# Contrast of every piece of text that is drawn (WCAG 2: (L1 + 0.05) / (L2 + 0.05)); what is below 4.5.
FAINT = """(() => {
const rgb = (c) => {
  const m = c.match(/[0-9.]+/g).map(Number);
  return m.length > 3 && m[3] === 0 ? null : m.slice(0, 3);
};
const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = (e) => rgb(getComputedStyle(e).backgroundColor) ?? behind(e.parentElement);
const faint = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || ["SCRIPT", "STYLE"].includes(e.tagName) || !e.getClientRects().length) continue;
  const style = getComputedStyle(e), inside = e.classList.contains("inside");
  const front = rgb(e.namespaceURI.endsWith("svg") ? style.fill : style.color);
  const ground = inside ? rgb(getComputedStyle(document.querySelector(`rect.${e.classList[1]}`)).fill) : behind(e);
  const [a, b] = [light(front), light(ground)].sort((x, y) => y - x);
  const name = `${e.tagName}.${e.getAttribute("class")} ${e.textContent.slice(0, 20)}`;
  if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(name);
}
return faint; })()"""
# Texts of one plot that lie over each other.
COVERED = """[...document.querySelectorAll("svg.plot")].flatMap((plot) => {
  const texts = [...plot.querySelectorAll("text:not(.inside)")].map((t) => [t.textContent, t.getBBox()]);
  const meet = (a, b, at, size, slack) => a[at] < b[at] + b[size] - slack && b[at] < a[at] + a[size] - slack;
  const hit = (a, b) => meet(a, b, "x", "width", 1) && meet(a, b, "y", "height", 3);
  return texts.flatMap(([s, a], i) =>
    texts.slice(i + 1).filter(([, b]) => hit(a, b)).map(([t]) => `${s} | ${t}`)); })"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with _browser.Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reports(sample_report(), tmp_path_factory.mktemp("report"))[2]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section: errors, budget, explanation, placement, gates with intervals."""
    return write_reports(_report_document.document(blocks=2, width=64, outcomes=50), tmp_path_factory.mktemp("full"))[2]


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Any]:
    """The sample's page as a first-time reader with a light system sees it; it must not have complained when left."""
    browser.media(prefers_color_scheme="light", prefers_reduced_motion="reduce")
    browser.window(1300)
    browser.open(page)
    yield browser
    assert browser.complaints() == []


@pytest.fixture
def opened_full(browser: Any, full: Path) -> Iterator[Any]:
    browser.media(prefers_color_scheme="light", prefers_reduced_motion="reduce")
    browser.window(1300)
    browser.open(full)
    yield browser
    assert browser.complaints() == []


def column(browser: Any, table: str, index: int) -> list[str]:
    """Texts of one column, of the rows that are shown."""
    found: list[str] = browser.value(
        f"[...document.querySelectorAll('{table} tbody tr')].filter((r) => r.checkVisibility())"
        f".map((r) => r.cells[{index}].textContent)"
    )
    return found


def choose(browser: Any, selector: str, value: str) -> None:
    """Choose in a list, as the reader's click on an entry does."""
    browser.value(
        f"(() => {{ const e = document.querySelector({selector!r}); e.value = {value!r};"
        "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true})); })()"
    )


def heading(table: str, index: int) -> str:
    return f"{table} thead th:nth-child({index + 1}) button"


def test_the_page_asks_for_nothing_and_raises_nothing(opened: Any, page: Path) -> None:
    assert opened.requests() == [page.resolve().as_uri()]
    assert opened.value("[...document.querySelectorAll('form, .theme')].every((e) => !e.hidden)")


def test_headings_sort_by_mouse(opened: Any) -> None:
    opened.click(heading(RESULTS, 10))
    slowest = column(opened, RESULTS, 10)
    opened.click(heading(RESULTS, 10))
    fastest = column(opened, RESULTS, 10)
    measured = [float(cell.split()[0]) for cell in slowest if not cell.startswith("–")]
    assert len(measured) == 10
    assert measured == sorted(measured, reverse=True)
    assert [c.startswith("–") for c in slowest] == [False] * 10 + [True] * 5, "missing values come last"
    assert [c.startswith("–") for c in fastest] == [False] * 10 + [True] * 5, "in both orders"
    assert [float(c.split()[0]) for c in fastest[:10]] == sorted(measured)
    assert opened.value(f"document.querySelector('{heading(RESULTS, 10)}').parentElement.ariaSort") == "ascending"
    opened.click(heading(RESULTS, 0))
    assert [re.match("ort|tensorrt|tvm", c)[0] for c in column(opened, RESULTS, 0)] == (  # type: ignore[index]
        ["ort"] * 5 + ["tensorrt"] * 5 + ["tvm"] * 5
    )


def test_headings_sort_and_explain_themselves_by_keyboard(opened: Any) -> None:
    opened.value(f"document.querySelector('{heading(RESULTS, 9)}').focus()")
    opened.press("Tab")
    assert opened.value(FOCUS) == "p50"
    opened.wait(lambda: opened.value(TIP) == "median latency", "the heading's meaning")
    assert opened.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    opened.press("Enter")
    assert opened.value("document.activeElement.parentElement.ariaSort") == "descending"
    opened.press("Escape")
    assert opened.value(TIP) is None
    opened.press("Tab", shift=True)
    assert opened.value(FOCUS) == "Codes ≠"


def test_the_first_tab_skips_to_the_results(opened: Any) -> None:
    opened.press("Tab")
    assert opened.value(FOCUS) == "Skip to the results"
    assert opened.value("document.activeElement.getBoundingClientRect().left") >= 0
    opened.press("Enter")
    assert opened.value("location.hash") == "#results"


def test_filters(opened: Any) -> None:
    choose(opened, "#results [data-key=target]", "tensorrt")
    choose(opened, "#results [data-key=status]", "built")
    assert sorted(column(opened, RESULTS, 1)) == ["fp32", "w4a16", "w4a4", "w8a8"]
    assert opened.value("document.querySelector('#results output').textContent") == "4 of 15 rows"
    choose(opened, "#results [data-key=target]", "")
    choose(opened, "#results [data-key=status]", "")
    assert len(column(opened, RESULTS, 1)) == 15
    choose(opened, "#gates [data-key=verdict]", "fail")
    assert column(opened, GATES, 1) == ["accuracy_drop", "executed_precision"]
    opened.click("#gates [type=search]")
    opened.write("FLOAT32")
    assert column(opened, GATES, 1) == ["executed_precision"]


def test_search_finds_layers_and_their_cards(opened: Any) -> None:
    opened.click("#layers [type=search]")
    opened.write("declared")
    assert column(opened, LAYERS, 0) == ["vit.layers.1.attention.output"]
    fp32 = opened.value(
        "[...document.querySelector('#layers [data-shows]').options].find((o) => o.text === 'ort fp32').value"
    )
    choose(opened, "#layers [data-shows]", fp32)
    assert column(opened, LAYERS, 0) == [], "in this result nothing fell back"
    opened.value("document.querySelector('#layers [type=search]').value = ''")
    opened.click("#layers [type=search]")
    opened.write("LAYERS.3 fc2")
    assert column(opened, LAYERS, 0) == ["vit.layers.3.mlp.fc2"]
    cards = "[...document.querySelectorAll('.layer')].filter((c) => c.checkVisibility()).map((c) => c.innerText.trim())"
    assert [card.splitlines()[0].removeprefix("▸").strip() for card in opened.value(cards)] == ["vit.layers.3.mlp.fc2"]


def test_a_layers_name_opens_its_card_with_everything_known(opened_full: Any) -> None:
    name = "vit.encoder.layer.1.output.dense"
    opened_full.click(f"{LAYERS} tr:has([data-v='{name}']) a")
    opened_full.wait(lambda: opened_full.value("!!document.querySelector('.layer[open]')"), "the card")
    card = "document.querySelector('.layer[open]').innerText"
    text = " ".join(opened_full.value(card).split())
    assert text.removeprefix("▾ ").startswith(name)
    for part in ("fault found", "wrong scale", "PCDR, 1 leading", "input p99.9", "SNR alone", "vpdpbusd", "ort w4a4"):
        assert part in text
    assert opened_full.value("document.querySelector('.layer[open] svg.plot').getBoundingClientRect().height") > 100
    top = opened_full.value("document.querySelector('.layer[open]').getBoundingClientRect().top")
    assert 0 <= top < 900
    # By the keyboard: the card is a native disclosure.
    opened_full.value("document.querySelector('.layer:not([open]) summary').focus()")
    opened_full.press("Enter")
    assert opened_full.value("document.querySelectorAll('.layer[open]').length") == 2


def test_marks_tell_their_value_under_the_mouse(opened: Any) -> None:
    mark = "svg.plot [data-tip]"
    opened.hover(mark)  # where marks lie over each other, the topmost answers
    assert opened.value(TIP) == "ort fp32: measured 0.9833 (±0 to float)"
    assert opened.value("document.querySelectorAll('svg .active').length") == 1
    x, y = opened.middle(mark)
    opened.move(x, y + 10)  # beside the mark is near enough
    assert opened.value(TIP) == "ort fp32: float 0.9833"
    opened.press("Escape")
    assert opened.value(TIP) is None
    opened.hover(mark)
    opened.hover("h1")
    assert opened.value(TIP) is None
    assert opened.value("document.querySelectorAll('svg.plot title').length") == 0


def test_marks_tell_their_value_to_the_keyboard(opened: Any) -> None:
    opened.value("document.querySelector('svg.plot[tabindex]').focus()")
    for key, told in (
        ("ArrowRight", "ort fp32: float 0.9833"),
        ("ArrowRight", "ort fp32: simulated 0.9833"),
        ("ArrowLeft", "ort fp32: float 0.9833"),
        ("ArrowLeft", "tensorrt w4a4: simulated 0.9623"),
    ):
        opened.press(key)
        opened.wait(lambda told=told: opened.value(TIP) == told, told)  # type: ignore[misc]
    opened.press("Tab")
    assert opened.value(TIP) is None
    assert opened.value("document.getElementById('tip').getAttribute('role')") == "status"


def test_the_theme_follows_the_system_until_one_is_chosen(opened: Any, page: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = opened.value(ground)
    opened.media(prefers_color_scheme="dark")
    dark = opened.value(ground)
    assert light != dark
    choose(opened, "#theme", "light")
    assert opened.value(ground) == light
    opened.open(page)
    assert opened.value(ground) == light, "remembered"
    assert opened.value("document.getElementById('theme').value") == "light"
    choose(opened, "#theme", "system")
    assert opened.value(ground) == dark


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out(opened_full: Any, theme: str) -> None:
    opened_full.media(prefers_color_scheme=theme)
    opened_full.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert opened_full.value(FAINT) == []


def test_controls_have_names_and_labels_do_not_cover_each_other(opened_full: Any) -> None:
    opened_full.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    nodes = opened_full.call("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "link", "combobox", "searchbox", "textbox", "form", "region", "image", "table"}
    told = [(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if not n["ignored"]]
    assert {"button", "link", "combobox", "searchbox", "form", "region", "image", "table"} <= {role for role, _ in told}
    assert [role for role, name in told if role in named and not name] == []
    assert opened_full.value(COVERED) == []
    assert opened_full.value("['header', 'nav', 'main'].map((n) => document.querySelectorAll(n).length)") == [1, 1, 1]
    levels = opened_full.value("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels)), "no level of headings is skipped"


def test_commands_are_copied(opened: Any) -> None:
    opened.value(
        "Object.defineProperty(navigator.clipboard, 'writeText', {value: async (t) => { window.copied = t; }})"
    )
    opened.click("#performance [data-copy]")
    opened.wait(lambda: opened.value("window.copied"), "the copy")
    assert opened.value("window.copied") == "s2d-deploy bench 'synthetic recipe.yaml' --output runs/synthetic"
    assert opened.value("document.querySelector('#performance [data-copy]').textContent") == "Copied"


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_window_scrolls_down_only(opened_full: Any, width: int) -> None:
    opened_full.window(width)
    opened_full.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert opened_full.value("document.documentElement.scrollWidth") <= width


def test_paper_holds_everything_and_no_controls(opened_full: Any, tmp_path: Path) -> None:
    opened_full.click("#layers [type=search]")
    opened_full.write("classifier")  # what is filtered away is printed all the same
    opened_full.media("print")
    hidden = "[...document.querySelectorAll('nav, form, .theme, [data-copy]')].every((e) => !e.checkVisibility())"
    assert opened_full.value(hidden)
    assert opened_full.value("getComputedStyle(document.body).colorScheme") == "light"
    layers = _report_document.ops(2)
    assert sorted(column(opened_full, LAYERS, 0)) == sorted(layers)
    opened_full.media()
    opened_full.pdf(tmp_path / "page.pdf")
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed: the printed text is not read")
    command = ["pdftotext", "-layout", str(tmp_path / "page.pdf"), "-"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.count("Isolated cosine") > 1, "a table that was folded, with its headings on each sheet"
    assert "name: vit-base" in printed, "the recipe, folded too"
    assert printed.count("Before and after conditioning") == 0
    assert printed.count("SNR alone") == len(layers), "the card of every layer"
    assert "Copy" not in printed
