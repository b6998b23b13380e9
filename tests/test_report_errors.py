"""The report's section on where the error comes from."""

from __future__ import annotations

from report_sample import sample_report

from s2d_deploy.report import validate
from s2d_deploy.report_errors import section
from s2d_deploy.report_html import to_html


def layer(op: str, share: float, snr: float | None = 20.0) -> dict[str, object]:
    return {
        "op": op,
        "declared": "W4A4",
        "isolated_snr_db": snr,
        "isolated_cosine": 0.99,
        "accumulated_snr_db": 11.26,
        "accumulated_cosine": 0.97,
        "output_error": share / 10,
        "share": share,
    }


def with_errors(layers: list[dict[str, object]]) -> dict[str, object]:
    entry = {"precision": "w4a4", "output_snr_db": 10.0, "output_error": 0.1, "additivity": 1.25, "samples": 16}
    return sample_report() | {"errors": [entry | {"layers": layers}]}


def test_the_page_shows_the_worst_layers_and_all_of_them_in_numbers():
    layers = [layer(f"block.{i}.<fc>", 0.3 / (i + 1)) for i in range(15)]
    page = to_html(validate(with_errors(layers)))
    assert 'href="#errors"' in page
    assert "Error by layer, w4a4" in page
    assert "the 12 worst of 15 layers" in page
    assert "sum of single errors 1.25 of the whole" in page
    assert page.count("block.14.&lt;fc&gt;") >= 1  # in the table, escaped
    assert "11.3 dB" in page
    assert 'data-v="0.3"' in page  # sorted by the number, not by its text


def test_nothing_different_is_said_so():
    page = to_html(validate(with_errors([layer("a", 0.0, None), layer("b", 1.0)])))
    assert "exact" in page


def test_a_report_without_analysis_has_no_such_section():
    report = validate(sample_report())
    assert section(report.errors) is None
    assert "Where the error comes from" not in to_html(report)
