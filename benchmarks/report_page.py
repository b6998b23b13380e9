"""How long the report of a ViT-Base takes to open in a browser, and how large it is.

A document of that size (`_report_document.py`: 98 contractions by 5 precisions by 3 targets, every section filled) is
rendered, and opened again and again in a headless Chromium. The time is the browser's own: from the start of the
navigation until everything is parsed, run and laid out, twice: the load event, and the first frame after it. Printing
is timed, too. Needs Chromium; without it only the size is a figure, and the time is undecided.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _browser
from _common import Figure, Record, at_most, finish, guarded, parser, positive
from _report_document import document

from s2d_deploy.report import to_json, validate
from s2d_deploy.report_html import to_html

LIMIT_SECONDS = 2.0
LIMIT_MEGABYTES = 8.0
# Asked for after the load event: two frames, so that what was laid out has been painted.
_FRAMES = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"
_LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"


def arguments() -> argparse.ArgumentParser:
    """What the script takes."""
    made = parser("report_page.py", "Size of the report of a ViT-Base, and how long it takes to open.")
    made.add_argument("--runs", type=positive, default=7, help="how often the page is opened (default: 7)")
    made.add_argument("--page", type=Path, metavar="FILE", help="keep the page in FILE")
    return made


def measure(page: Path, runs: int) -> dict[str, Any]:
    """Seconds of every opening, in their order; the first has a cold cache and counts like the others."""
    program = _browser.find()
    if program is None:
        return {}
    found: dict[str, Any] = {"load": [], "painted": []}
    with tempfile.TemporaryDirectory() as profile, _browser.Browser(program, Path(profile)) as browser:
        found["browser"] = browser.call("Browser.getVersion")["product"]
        browser.window(1300, 900)
        for _ in range(runs):
            browser.open(page)
            found["painted"].append(browser.value(_FRAMES) / 1e3)
            found["load"].append(browser.value(_LOADED) / 1e3)
            if complaints := browser.complaints():
                found["complaints"] = complaints
        found["elements"] = browser.value("document.getElementsByTagName('*').length")
        started = time.perf_counter()
        printed = Path(profile) / "page.pdf"
        browser.pdf(printed)
        found["print"] = {"seconds": time.perf_counter() - started, "bytes": printed.stat().st_size}
    return found


def main(chosen: argparse.Namespace) -> int:
    """Measure, print, write."""
    record = Record("report-page")
    report = validate(to_json(document()))
    started = time.perf_counter()
    text = to_html(report)
    rendering = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        page = chosen.page or Path(folder) / "report.html"
        page.write_text(text, encoding="utf-8")
        size = page.stat().st_size
        seen = measure(page, chosen.runs)
    slowest = max(seen["painted"]) if seen else None
    about = f"{seen['browser']}, slowest of {chosen.runs}" if seen else "no Chromium is installed"
    middle = statistics.median(seen["painted"]) if seen else None
    figures: list[Figure] = [
        at_most("size of the page, MB", size / 1e6, LIMIT_MEGABYTES),
        at_most("opened and painted, s", slowest, LIMIT_SECONDS, about),
        at_most("complaints of the browser", float(len(seen.get("complaints", []))) if seen else None, 0.0),
    ]
    data = {"bytes": size, "render_seconds": rendering, "median_seconds": middle, **seen}
    return finish(record, chosen.results, figures, data)


if __name__ == "__main__":
    sys.exit(guarded(main, arguments().parse_args()))
