"""Tables for the terminal: what was not measured is a dash, and names are printed as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest

from s2d_deploy.compare import compare_reports
from s2d_deploy.diagnose import LayerDiagnosis, OutlierPlace
from s2d_deploy.tables import DASH, comparison_table, diagnosis_table, gates_table, number, results_table

MEASURED = {
    "target": "ort",
    "precision": "w8a8",
    "status": "measured",
    "reason": None,
    "rung": "native",
    "metric": {"name": "top-1 %", "n": 597, "float": 97.5, "simulated": 97.25, "measured": 97.125},
    "parity": {"accumulators_different": 0, "codes_checked": 2000, "codes_different": 5},
    "latency_ms": {"p50": 1.2345, "stable": False},
    "speedup_over_float": 1.5,
    "size_bytes": 2_097_152,
    "weight_ratio": 0.25,
}
BUILT = {
    "target": "tensorrt",
    "precision": "w8a8",
    "status": "built",
    "reason": "no CUDA device",
    "metric": {"name": "top-1 %", "n": 597, "float": 97.5, "simulated": 97.25, "measured": None},
    "size_bytes": 1024,
}
UNAVAILABLE = {"target": "tvm", "precision": "w4a4", "status": "unavailable", "reason": "not installed"}


def cells(text: str, *start: str) -> list[str]:
    """The cells of the row that begins with `start`."""
    rows = [[c.strip() for c in line.strip("│┃ ").replace("┃", "│").split("│")] for line in text.splitlines()]
    return next(row for row in rows if tuple(row[: len(start)]) == start)


def test_a_measured_row_shows_its_figures() -> None:
    row = cells(results_table([MEASURED]), "ort", "w8a8")
    assert row[2:] == [
        "measured", "native", "97.50", "97.25", "97.12", "0", "5 (0.25 %)", "1.234 ~", "1.50", "2,048", "0.250",
    ]  # fmt: skip


def test_what_was_not_measured_is_a_dash() -> None:
    text = results_table([BUILT, UNAVAILABLE])
    assert cells(text, "tensorrt", "w8a8")[2:] == ["built", DASH, "97.50", "97.25", *[DASH] * 5, "1", DASH]
    assert cells(text, "tvm", "w4a4")[2:] == ["unavailable", *[DASH] * 10]
    assert "  tensorrt w8a8: built: no CUDA device" in text
    assert "  tvm w4a4: unavailable: not installed" in text


def test_reasons_that_are_alike_share_a_line() -> None:
    text = results_table(
        [UNAVAILABLE, UNAVAILABLE | {"precision": "w4a8"}, UNAVAILABLE | {"precision": "w8a8", "reason": "x: y"}]
    )
    assert "  tvm w4a4, w4a8: unavailable: not installed" in text
    assert "  tvm w8a8: unavailable: x: y" in text


def test_every_section_may_be_null_or_absent() -> None:
    for row in (UNAVAILABLE, UNAVAILABLE | {"metric": None, "parity": None, "latency_ms": None, "size_bytes": None}):
        assert cells(results_table([row]), "tvm")[2:] == ["unavailable", *[DASH] * 10]
    assert "results" in results_table([])


def test_zero_is_not_a_dash() -> None:
    row = MEASURED | {
        "parity": {"accumulators_different": 0, "codes_checked": 10, "codes_different": 0},
        "size_bytes": 0,
    }
    found = cells(results_table([row]), "ort")
    assert (found[7], found[8], found[11]) == ("0", "0 (0 %)", "0")


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (None, ".2f", DASH),
        (math.nan, ".2f", DASH),
        (0, ".2f", "0.00"),
        ("native", ".2f", "native"),
        (12345, ",d", "12,345"),
    ],
)
def test_numbers(value: Any, form: str, text: str) -> None:
    assert number(value, form) == text


def gate(**fields: Any) -> dict[str, Any]:
    base = {
        "name": "accuracy_drop",
        "target": "ort",
        "precision": "w4a4",
        "verdict": "pass",
        "value": 0.5,
        "limit": 1.0,
    }
    return base | {"evidence": "97.5 against 98"} | fields


def test_gates_show_evidence_for_what_did_not_pass() -> None:
    text = gates_table(
        [gate(), gate(verdict="fail", value=3.0), gate(target=None, precision=None, verdict="undecided", value=None)]
    )
    assert cells(text, "accuracy_drop", "ort", "w4a4") == ["accuracy_drop", "ort", "w4a4", "pass", "0.5", "1"]
    assert cells(text, "accuracy_drop", DASH, DASH) == ["accuracy_drop", DASH, DASH, "undecided", DASH, "1"]
    assert text.endswith("\n  accuracy_drop ort w4a4: 97.5 against 98\n  accuracy_drop: 97.5 against 98")
    assert "None" not in text
    assert gates_table([]) == "no gates"


def test_many_gates_that_passed_are_counted() -> None:
    assert gates_table([gate()] * 21) == "gates: all 21 passed"
    text = gates_table([gate()] * 21 + [gate(verdict="fail", value=3.0)])
    assert len([line for line in text.splitlines() if "accuracy_drop" in line]) == 2  # the row and its evidence
    assert text.endswith("21 of 22 gates passed")


def test_a_comparison_keeps_counts_whole_and_words_as_they_are() -> None:
    second = MEASURED | {"size_bytes": 2_097_000, "rung": "emulated", "latency_ms": {"p50": 1.0}}
    rows = compare_reports({"results": [MEASURED]}, {"results": [second, UNAVAILABLE]})
    text = comparison_table(rows, "runs/[a]", "runs/[/b] :smile:")
    assert "runs/[a]  |  runs/[/b] :smile:" in text  # no markup
    assert cells(text, "ort", "w8a8", "size bytes")[3:] == ["2,097,152", "2,097,000", "-152"]
    assert cells(text, "ort", "w8a8", "rung")[3:] == ["native", "emulated", DASH]
    assert cells(text, "ort", "w8a8", "p50 ms")[3:] == ["1.234", "1", "-0.2345"]
    assert cells(text, "tvm", "w4a4", "status")[3:] == [DASH, "unavailable", DASH]
    assert comparison_table([], "a", "b")


def test_text_is_plain_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in results_table([MEASURED, BUILT])


def layer(name: str, largest: float, k_target: int) -> LayerDiagnosis:
    return LayerDiagnosis(
        name=name,
        shape=(4, 4),
        pcdr=[0.5, 0.75],
        flagged=k_target > 0,
        k_target=k_target,
        dead=False,
        singular_values=[2.0, 1.0],
        sigma_max=2.0,
        max_abs_activation=largest,
        max_abs_input=1.0,
        kurtosis=3.04,
        kurtosis_input=3.0,
        range_over_std=1.0,
        range_over_std_input=1.0,
        outlier=OutlierPlace(value=largest, channel=0, sample=0, token=None),
    )


def test_a_diagnosis_lists_the_worst_layer_first() -> None:
    text = diagnosis_table([layer("calm[0]", 1.0, 0).to_dict(), layer("wild", 196.0, 2).to_dict()])
    assert text.index("wild") < text.index("calm[0]")
    assert cells(text, "wild") == ["wild", "k = 2", "0.50 0.75", "2.00", "196.00", "3.0"]
    assert cells(text, "calm[0]")[1] == DASH
