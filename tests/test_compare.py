"""Two reports side by side."""

from __future__ import annotations

from typing import Any

from s2d_deploy.compare import compare_reports


def result(target: str, precision: str, **fields: Any) -> dict[str, Any]:
    return {"target": target, "precision": precision, "status": "built", **fields}


def figures(
    first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> dict[tuple[str, str, str], tuple[Any, Any, Any]]:
    rows = compare_reports({"results": first}, {"results": second})
    return {(r["target"], r["precision"], r["figure"]): (r["first"], r["second"], r["change"]) for r in rows}


def test_numbers_get_a_change_and_words_do_not() -> None:
    a = result("ort", "w8a8", metric={"measured": 97.0}, size_bytes=1000, rung="native", latency_ms={"p50": 2.0})
    b = result("ort", "w8a8", metric={"measured": 96.5}, size_bytes=900, rung="emulated", latency_ms={"p50": 1.5})
    found = figures([a], [b])
    assert found[("ort", "w8a8", "metric")] == (97.0, 96.5, -0.5)
    assert found[("ort", "w8a8", "size bytes")] == (1000, 900, -100)
    assert found[("ort", "w8a8", "p50 ms")] == (2.0, 1.5, -0.5)
    assert found[("ort", "w8a8", "rung")] == ("native", "emulated", None)
    assert found[("ort", "w8a8", "status")] == ("built", "built", None)


def test_zero_is_a_number_and_a_missing_figure_is_not() -> None:
    a = result("ort", "w4a4", parity={"accumulators_different": 0}, metric=None)
    b = result("ort", "w4a4", parity={"accumulators_different": 3, "codes_different": None}, metric={"measured": None})
    found = figures([a], [b])
    assert found[("ort", "w4a4", "accumulators different")] == (0, 3, 3)
    assert {figure for _, _, figure in found} == {"accumulators different", "status"}


def test_results_that_only_one_report_has_keep_their_place() -> None:
    found = figures([result("ort", "w8a8", size_bytes=5)], [result("tvm", "w8a8", size_bytes=7)])
    assert found[("ort", "w8a8", "size bytes")] == (5, None, None)
    assert found[("tvm", "w8a8", "size bytes")] == (None, 7, None)
    assert list(dict.fromkeys(target for target, _, _ in found)) == ["ort", "tvm"]
    assert figures([], []) == {}
