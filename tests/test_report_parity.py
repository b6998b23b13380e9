"""The section of report.html that says what a verification found, and its words on the terminal."""

from __future__ import annotations

from typing import Any

from s2d_deploy.parity_words import words
from s2d_deploy.report_parity import section
from s2d_deploy.report_schema import Result
from s2d_deploy.tables import parity_text


def result(**changes: Any) -> dict[str, Any]:
    """A measured result whose parity was explained: a wrong scale in fc1."""
    finding = {
        "cause": "wrong-scale",
        "layer": "fc1<b>",
        "site": "fc2.input",
        "detail": "its result is 1.5 times the plan's",
        "evidence": "the codes behind it",
        "confirmed": True,
        "also": [],
    }
    layers = [
        {"op": f"layer.{i}", "isolated_snr_db": 40.0 + i, "predicted_snr_db": 38.0 - i, "seen_snr_db": 37.5 - i}
        for i in range(4)
    ]
    layers.append({"op": "output", "isolated_snr_db": None, "predicted_snr_db": 30.0, "seen_snr_db": 29.0})
    parity = {
        "explanation": {
            "verdict": "fault",
            "findings": [finding],
            "sites": [],
            "samples": 4,
            "codes_shown": True,
            "taps_changed": [],
            "reproducer": "verify/ort/w8a8/reproducer",
        },
        "consistency": {
            "agrees": True,
            "runs": [{"what": "run again", "identical": True, "codes_different": 0}],
        },
        "budget": {
            "layers": layers,
            "seen_codes": 900,
            "allowed_codes": 300,
            "within": False,
            "compared_samples": 16,
        },
        "gap": {
            "parts": [
                {"name": "quantization", "what": "", "share": 0.25, "relative_power": 1e-3, "metric": -0.5},
                {
                    "name": "wrong scale or saturation",
                    "what": "fc1",
                    "share": 0.75,
                    "relative_power": 3e-3,
                    "metric": -2.0,
                },
            ],
            "relative_power": 4e-3,
            "metric": -2.5,
            "samples": 16,
        },
    } | changes
    return {"target": "ort", "precision": "w8a8", "status": "measured", "parity": parity}


def test_words_begin_with_the_verdict_and_end_with_how_to_see_it_again() -> None:
    lines = words(result()["parity"])
    assert lines[0] == "parity: FAULT; first in fc1<b>"
    assert lines[1].endswith("explains every code")
    assert "  reproduce: cd verify/ort/w8a8/reproducer && python run.py" in lines
    assert any(
        "quantization 25.0%, wrong scale or saturation 75.0%" in line and "-2.50 points" in line for line in lines
    )
    assert any("900, BEYOND what rounding may move here (300 in 16 samples)" in line for line in lines)
    assert parity_text([result()]).splitlines()[1] == "ort w8a8"
    assert parity_text([{"target": "ort", "precision": "fp32", "parity": {}}]) == ""


def test_a_step_that_broke_is_said() -> None:
    assert words({"unexamined": {"gap": "KeyError: x"}}) == ["not examined: gap: KeyError: x"]


def test_the_section_shows_findings_gap_and_budget() -> None:
    checked = Result.model_validate(result())
    html = str(section([("ort w8a8", checked)]))
    assert "FAULT; first in fc1&lt;b&gt;" in html
    assert "fc1<b>" not in html
    assert "Error by depth, w8a8" in html
    assert "layer.3: predicted 35.0 dB" in html
    assert "75.00 %" in html
    assert section([("ort w8a8", Result.model_validate(result(explanation=None)))]) is None
