"""What people and CI read: the HTML page, the Markdown, the JUnit file."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from report_sample import LAYERS, sample_report

from s2d_deploy import report_format as fmt
from s2d_deploy.junit import to_junit
from s2d_deploy.markup import Markup, tag
from s2d_deploy.plots import pareto
from s2d_deploy.report import to_json, validate
from s2d_deploy.report_html import to_html
from s2d_deploy.report_markdown import cell, to_markdown
from s2d_deploy.report_reproduce import commands
from s2d_deploy.report_summary import labels

_report_document = import_module("_report_document")

EVIL = "<script>alert('x')</script> \" & | `code` [a](http://e.example) </title></style>\x00\x1b"
VOID = {"meta", "input", "br", "hr", "wbr"}
EMPTY: dict[str, Any] = {"schema_version": "1", "results": [], "verdict": "undecided"}


class Page(HTMLParser):
    """Every element and attribute; insists that each element is closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len({k for k, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, name: str, **attributes: str) -> int:
        return sum(t == name and all(a.get(k) == v for k, v in attributes.items()) for t, a in self.elements)


def html(document: dict[str, Any]) -> str:
    return to_html(validate(to_json(document)))


def markdown(document: dict[str, Any]) -> str:
    return to_markdown(validate(to_json(document)))


def junit(document: dict[str, Any]) -> ET.Element:
    return ET.fromstring(to_junit(validate(to_json(document))).encode())  # noqa: S314 - our own text


def everywhere(value: Any, evil: str) -> Any:
    """`value` with every text replaced, but those that the schema fixes."""
    if isinstance(value, dict):
        kept = ("status", "verdict", "schema_version")
        return {k: v if k in kept else everywhere(v, evil) for k, v in value.items()}
    if isinstance(value, list):
        return [everywhere(v, evil) for v in value]
    return evil if isinstance(value, str) else value


def without(document: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    change(document)
    return document


# ---- HTML


def test_the_page_is_well_formed_and_says_the_verdict_first() -> None:
    page = Page(html(sample_report()))
    assert page.text.index("Fail 4 of 7 gates passed, 2 failed and 1 undecided.") < page.text.index("Results Target")
    assert sum("data-sortable" in a for t, a in page.elements if t == "table") == 7
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for t, a in page.elements if t == "a"]
    assert all(href is not None and href.removeprefix("#") in ids for href in targets)


def test_the_page_needs_nothing_else() -> None:
    text = html(sample_report())
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))
    page = Page(text)
    assert not {t for t, _ in page.elements} & {"link", "img", "iframe", "object", "embed", "base", "video", "audio"}
    assert not [a for _, a in page.elements if {"src", "srcset", "action", "style"} & set(a)]
    assert not [k for _, a in page.elements for k in a if k.startswith("on")]


def test_the_policy_lets_this_one_script_run() -> None:
    text = html(sample_report())
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for t, a in Page(text).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")


def test_text_from_the_document_stays_text() -> None:
    document = everywhere(sample_report(), EVIL)
    document[EVIL] = document["host"][EVIL] = document["versions"][EVIL] = EVIL
    document["results"][0]["executed"] = {EVIL: 1.0}
    text = html(document)
    page, plain = Page(text), Page(html(sample_report()))
    assert text.count("<script") == text.count("</script>") == 1
    assert {t for t, _ in page.elements} <= {t for t, _ in plain.elements}
    assert {k for _, a in page.elements for k in a} <= {k for _, a in plain.elements for k in a}
    # Classes come from our own tables, never from the document.
    assert not [a for _, a in page.elements if "alert" in (a.get("class") or "")]
    assert "alert('x')" in page.text
    assert "\x00" not in text
    assert "\x1b" not in text


def test_numbers_that_are_missing_are_dashes() -> None:
    result = {"target": "tvm", "precision": "w4a4", "status": "unavailable", "reason": "apache-tvm is not installed"}
    page = Page(html({**EMPTY, "results": [result]}))
    assert "apache-tvm is not installed" in page.text
    row = page.text[page.text.index("apache-tvm") :]
    assert row.count(fmt.MISSING) >= 11
    assert page.count("svg") == 0, "a plot of nothing"
    assert "No gate was asked for" in page.text
    assert "The model was not conditioned." in page.text


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(conditioning=None, ranges=None),
        lambda d: d.update(gates=[], verdict="undecided"),
        lambda d: d.update(results=[], model=None, host=None, recipe=None, versions={}, command=None),
        lambda d: [r.pop("audit", None) for r in d["results"]],
        lambda d: [r.update(latency_ms=None) for r in d["results"]],
        lambda d: [r.update(metric=None, executed={}) for r in d["results"]],
        lambda d: d["conditioning"].update(layers=[], losses=[None]),
        lambda d: [layer.update(before=None) for layer in d["conditioning"]["layers"]],
        lambda d: [
            layer["after"].update(pcdr=[None], singular_values=[0.0, None]) for layer in d["conditioning"]["layers"]
        ],
        lambda d: [s.update(before=None, after={"absmax": 0.0}) for s in d["ranges"]],
        lambda d: [
            r["latency_ms"].update(samples=[0.0], p50=0.0, p99=None, min=None)
            for r in d["results"]
            if r.get("latency_ms")
        ],
        lambda d: [
            r["metric"].update(float=None, simulated=0.5, measured=0.5)
            for r in d["results"]
            if r["status"] == "measured"
        ],
        lambda d: [r["metric"].update(float=-1e300, simulated=1e-300) for r in d["results"] if r.get("metric")],
        lambda d: d["results"].extend(d["results"][:3]),
        lambda d: d["recipe"].update(condition={"tau": "high"}),
        lambda d: d.update(recipe=["a", 1]),
    ],
)
def test_documents_with_holes_render(change: Callable[[dict[str, Any]], None]) -> None:
    document = without(sample_report(), change)
    Page(html(document))
    assert markdown(document).startswith("# ")
    assert junit(document).tag == "testsuites"
    assert (
        "nan"
        not in re.sub(r"<script>.*?</script>|<style>.*?</style>", "", html(document), flags=re.DOTALL).lower().split()
    )


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(value=json_like, limit=json_like, evidence=json_like, text=st.text(), recipe=json_like)
def test_any_gate_and_any_text_render(value: Any, limit: Any, evidence: Any, text: str, recipe: Any) -> None:
    gate = {"name": text, "target": text, "value": value, "limit": limit, "evidence": evidence, "verdict": "fail"}
    result = {"target": text, "precision": text, "status": "unavailable", "reason": text}
    document = {**EMPTY, "gates": [gate], "verdict": "fail", "results": [result], "recipe": recipe, "command": text}
    Page(html(document))
    assert len(junit(document).findall(".//failure")) == 1
    table = [line for line in markdown(document).splitlines() if line.startswith("| ❌")]
    assert len(table) == 1
    assert len(re.findall(r"(?<!\\)\|", table[0].replace("\\\\", ""))) == 7


def test_every_layer_has_a_row_and_a_card_and_a_fallback_is_shown() -> None:
    page = Page(html(sample_report()))
    names = [a.get("data-v") for t, a in page.elements if t == "th" and a.get("class") == "path"]
    assert names[: len(LAYERS)] == LAYERS
    cards = [a["id"] for t, a in page.elements if t == "details" and a.get("class") == "layer card"]
    assert cards == [f"layer-{i}" for i in range(len(names))]
    assert "declared W4A4" in page.text
    assert "2 fell back to float" in page.text
    assert page.count("option", value="0") == 1


def test_a_long_reason_stands_once_below_the_table() -> None:
    reason = "no NVIDIA driver on this machine. Found: libcuda.so.1: cannot open shared object file: No such file."
    rows = [{"target": "tensorrt", "precision": p, "status": "unavailable", "reason": reason} for p in ("w8a8", "w4a4")]
    text = Page(html({**EMPTY, "results": rows})).text
    assert text.count("no NVIDIA driver on this machine.") == 3
    assert text.count("libcuda.so.1") == 1
    assert "tensorrt w8a8, tensorrt w4a4 : no NVIDIA driver" in text


def test_a_card_joins_what_is_known_of_a_layer() -> None:
    text = html(_report_document.document(blocks=2, width=64, outcomes=50))
    name = "vit.encoder.layer.1.output.dense"
    card = next(c for c in text.split("<details")[1:] if c.startswith(' id="layer-') and f"Error of {name}" in c)
    shown = Page(f"<details{card[: card.index('</details>')]}</details>").text
    for part in (
        "fault found",
        "wrong scale: the scale is 2 times",
        "PCDR, 3 leading",
        "input std",
        "Share of the final",
    ):
        assert part in shown
    assert shown.count("vpdpbusd") == 3, "one for each integer precision of TVM"
    assert shown.count("built, not run") == 5
    # The products of attention have no weights, but operands: their codes are counted.
    assert "Error of vit.encoder.layer.0.attention.attention.scores" in text


def test_every_newer_key_is_shown() -> None:
    text = Page(html(_report_document.document(blocks=2, width=64, outcomes=50))).text
    for part in (
        "-0.4 to 0.7",  # a gate's interval
        "accuracy_drop against its limit",
        "2596 MHz, load 0.31 → 3.90",
        "What the measured placement left in float",
        "rounding in 1 of 4 runs",
        "The gap in parts",
        "Error by depth, w4a4",
        "50, SHA-256 000000000000",
        "Peak int8 970 GMAC/s",
        "Throughput over batch sizes",
        "s2d-deploy report --check evidence.zip",
        "cd verify/tvm/w4a4/reproducer && python run.py",
        "s2d-deploy bench vit-base.yaml --output runs/vit-base --set calibrate.samples=512",
    ):
        assert part in text, part


@settings(max_examples=40, deadline=None)
@given(junk=json_like)
def test_keys_that_are_no_part_of_the_schema_may_hold_anything(junk: Any) -> None:
    document = sample_report()
    document["data"] = junk
    for result in document["results"]:
        result["placement"] = junk
        for part in ("latency_ms", "roofline"):
            if result.get(part):
                result[part] |= {"conditions": junk, "outliers": junk, "peaks": junk, "gigabytes_per_second": junk}
    for gate in document["gates"]:
        gate |= {"interval": junk, "detectable": junk, "samples_needed": junk}
    assert Page(html(document)).count("table") > 1  # well-formed (see `Page`), and with its tables


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("s2d-deploy run a.yaml", "s2d-deploy bench a.yaml"),
        (["s2d-deploy", "report", "a b.yaml", "-o", "x"], "s2d-deploy bench 'a b.yaml' -o x"),
        ("s2d-deploy gate --set=a=1 digits-vit --baseline b.json --json", "s2d-deploy bench --set=a=1"),
        (
            "/usr/bin/s2d-deploy run a.yaml --target ort --target tvm",
            "s2d-deploy bench a.yaml --target ort --target tvm",
        ),
        ("s2d-deploy run a.yaml --bundle e.zip --quiet", "s2d-deploy bench a.yaml"),
        ("s2d-deploy run a.yaml --unknown 3", None),
        ("s2d-deploy run a.yaml b.yaml", None),
        ("s2d-deploy compare a b", None),
        ("python make.py a.yaml", None),
        ("s2d-deploy run 'open", None),
        ("s2d-deploy run --output", None),
    ],
)
def test_each_figure_has_its_command(command: str | list[str], expected: str | None) -> None:
    found = commands(validate(to_json({**EMPTY, "command": command})))
    if expected is None:
        assert found == {}
    else:
        assert found["performance"][1].startswith(expected.removesuffix(" --set=a=1"))
        assert all(what and line.startswith("s2d-deploy ") for what, line in found.values())


def test_labels_of_the_front_do_not_cover_each_other() -> None:
    document = sample_report()
    plot = next(p for p in html(document).split("<figure") if "Top-1 against latency" in p)
    assert sorted(re.findall(r'class="name"[^>]*>([^<]*)<', plot)) == ["ort fp32", "ort w8a8"]
    other = {**document["results"][0], "metric": {**document["results"][0]["metric"], "name": "top-5"}}
    more = html({**document, "results": [*document["results"], other, {**other, "device": "gpu"}]})
    assert "Top-5 against latency" in more
    assert "Top-1 against latency" in more


def test_a_large_model_stays_small_and_fast() -> None:
    document = sample_report()
    layers = document["conditioning"]["layers"]
    document["conditioning"]["layers"] = [
        {**layers[i % 24], "name": f"vit.encoder.layer.{i}.attention.output.dense"} for i in range(200)
    ]
    for layer in document["conditioning"]["layers"]:
        layer["before"]["singular_values"] = layer["after"]["singular_values"] = [1 / (k + 1) for k in range(768)]
    for result in document["results"]:
        if result.get("latency_ms"):
            result["latency_ms"]["samples"] = [1.0 + k / 1000 for k in range(3000)]
    assert len(html(document).encode()) < 2_000_000


# ---- Markdown


def test_markdown_says_verdict_gates_and_results() -> None:
    text = markdown(sample_report())
    lines = text.splitlines()
    assert lines[0] == "# ❌ s2d-deploy: FAIL · synthetic-vit"
    assert "4 of 7 gates passed, 2 failed and 1 undecided." in lines[2]
    assert r"| ❌ fail | accuracy\_drop | ort w4a4 | 0.021 | 0.01 | 95 % CI 0.014 to 0.028, n = 1,797 |" in lines
    assert "| ort | w8a8 | measured | native | 0.9833 | 0.9823 | 0.9823 | 0 of 4,812,800 | 31 of 1,500,000 | " in text
    assert "| tensorrt | w4a8 | unavailable | – | – | – | – | – | – | – | – | – |" in lines
    assert "- tensorrt w4a8: unavailable, TensorRT refuses 4-bit weights" in text
    assert "(unstable)" in text
    assert "5 of 24 layers flagged" in text
    assert "reproduce: `s2d-deploy run 'synthetic recipe.yaml' --output runs/synthetic`" in text


def test_markdown_tables_are_rectangular() -> None:
    for document in (sample_report(), everywhere(sample_report(), EVIL)):
        blocks: list[list[int]] = [[]]
        for line in markdown(document).splitlines():
            if line.startswith("|"):
                blocks[-1].append(len(re.findall(r"(?<!\\)\|", line)))
            elif blocks[-1]:
                blocks.append([])
        assert all(len(set(block)) == 1 for block in blocks if block)
        assert len([b for b in blocks if b]) == 3


def test_markdown_holds_no_tag_and_no_mention() -> None:
    assert cell("<b> @team a|b *x* #3") == r"&lt;b&gt; @" + "\u2060" + r"team a\|b \*x\* \#3"
    assert "https://" not in cell("see https://e.example")
    assert cell("a\n\n# b\t c") == r"a \# b c"
    assert cell("recall@5") == "recall@5"


# ---- JUnit


def test_junit_counts_and_cases() -> None:
    root = junit(sample_report())
    assert (root.get("tests"), root.get("failures"), root.get("errors"), root.get("skipped")) == ("8", "3", "0", None)
    assert [suite.get("skipped") for suite in root] == ["0", "1"]
    for suite in root:
        cases = suite.findall("testcase")
        assert suite.get("tests") == str(len(cases))
        assert suite.get("failures") == str(len(suite.findall("testcase/failure")))
        assert suite.get("skipped") == str(len(suite.findall("testcase/skipped")))
        assert suite.get("timestamp") == "2026-01-02T03:04:05"
        assert all(case.get("name") and case.get("classname") and case.get("time") == "0" for case in cases)
    keys = [(c.get("classname"), c.get("name")) for c in root.iter("testcase")]
    assert len(keys) == len(set(keys))
    assert [f.get("type") for f in root.iter("failure")] == ["gate", "undecided", "gate"]
    failure = next(root.iter("failure"))
    assert failure.get("message") == "accuracy_drop on ort w4a4: fail, value 0.021, limit 0.01"
    assert failure.text is not None
    assert "evidence: 95 % CI 0.014 to 0.028" in failure.text
    skipped = next(root.iter("skipped"))
    assert skipped.get("message") == "TensorRT refuses 4-bit weights with 8-bit activations at build time"


def test_junit_survives_any_text() -> None:
    root = junit(everywhere(sample_report(), EVIL))
    assert root.get("failures") == "3"
    assert "<script>alert('x')</script>" in str(next(root.iter("failure")).get("message"))
    assert "timestamp" not in root[0].attrib


# ---- Parts


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (fmt.number(None), "–"),
        (fmt.number(float("nan")), "–"),
        (fmt.number(0.98333), "0.9833"),
        (fmt.number(0.00012345), "0.000123"),
        (fmt.number(1234567.0), "1,234,567"),
        (fmt.number(3.2e-7), "3.20e-07"),
        (fmt.trimmed(20.0), "20"),
        (fmt.trimmed(0.0050), "0.005"),
        (fmt.trimmed(100.0), "100"),
        (fmt.signed(0.0), "±0"),
        (fmt.signed(-0.0083), "\N{MINUS SIGN}0.0083"),
        (fmt.signed(1e-6), "+1.0e-06"),
        (fmt.percent(0.0), "0.0 %"),
        (fmt.percent(1e-9), "< 0.1 %"),
        (fmt.percent(0.9712, 0), "97 %"),
        (fmt.ratio(1.4199), "1.42×"),
        (fmt.milliseconds(12.345), "12.3 ms"),
        (fmt.seconds(724.2), "12 min 4 s"),
        (fmt.size(0), "0 B"),
        (fmt.size(22_600_000), "22.6 MB"),
        (fmt.short_count(4_812_800), "4.81 M"),
        (fmt.of(0, 0), "–"),
        (fmt.of(3, 1200), "3 of 1,200"),
        (fmt.anything({"a": [1, None], "b": True}), "a: 1, –, b: yes"),
        (fmt.command_line(["a", "b c"]), "a 'b c'"),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected


def test_markup_escapes_all_but_markup() -> None:
    assert tag("td", "<", Markup("<b>"), None, class_='"', data_v=0.125, hidden=True, title=None) == (
        '<td class="&quot;" data-v="0.12" hidden>&lt;<b></td>'
    )


points = st.lists(st.tuples(st.integers(0, 9).map(float), st.integers(0, 9).map(float)), max_size=12)


@given(points=points, higher=st.booleans())
@settings(max_examples=200)
def test_pareto_front_is_the_set_that_nothing_dominates(points: list[tuple[float, float]], higher: bool) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        value = a[1] >= b[1] if higher else a[1] <= b[1]
        return a != b and a[0] <= b[0] and value

    expected = sorted({p for p in points if not any(beats(q, p) for q in points)})
    assert pareto(points, higher) == expected


def test_equal_results_get_distinct_labels() -> None:
    document = sample_report()
    document["results"] = [copy_of for r in document["results"][:2] for copy_of in (r, {**r, "device": "gpu"}, r)]
    names = labels(validate(document).results)
    assert len(set(names)) == len(names)
