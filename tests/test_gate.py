"""Verdicts: each gate at, below and above its limit, and everything that must not pass by silence."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_deploy.errors import ArtifactError, RecipeError
from s2d_deploy.gate import GateLimits, GateVerdict, evaluate, exit_code, overall

NOTHING = GateLimits(accumulators_different=None)


def result(target: str = "ort", precision: str = "w4a4", **more: Any) -> dict[str, Any]:
    base = {
        "target": target,
        "precision": precision,
        "status": "measured",
        "device": "cpu: 2 threads",
        "metric": {"name": "accuracy", "n": 200, "float": 0.98, "simulated": 0.975, "measured": 0.97},
        "parity": {
            "accumulators_checked": 1000,
            "accumulators_different": 0,
            "codes_checked": 10_000,
            "codes_different": 5,
            "top1_flips": 1,
        },
        "audit": {
            "ops": [
                {"name": "fc1", "macs": 60, "declared": "W4A4", "precision": "int8"},
                {"name": "fc2", "macs": 40, "declared": "W4A4", "precision": "int8"},
                {"name": "head", "macs": 10, "declared": "float", "precision": "float32"},
            ]
        },
        "latency_ms": {"p50": 5.0, "threads": 2, "batch": 1, "stable": True, "note": ""},
        "speedup_over_float": 2.0,
        "speedup_ci": [1.9, 2.1],
        "size_bytes": 200,
        "float_size_bytes": 1000,
        "weight_size_bytes": 130,
        "weight_float_size_bytes": 1000,
    }
    return {**base, **more}


def only(rows: list[GateVerdict], name: str) -> GateVerdict:
    (row,) = [r for r in rows if r.name == name]
    return row


CASES = [
    # gate, figure in `result()`, whether a larger figure is worse
    ("accuracy_drop", 0.01, "accuracy 0.98 float, 0.97 measured, n = 200"),
    ("simulation_gap", 0.005, "accuracy 0.975 simulated, 0.97 measured"),
    ("code_flip_share", 0.0005, "5 of 10000 codes differ end to end"),
    ("top1_flip_share", 0.005, "1 of 200 top-1 answers differ"),
    ("latency_ratio", 0.5, "p50 5.000 ms, 95 % interval of the ratio [0.476, 0.526], 2 threads, batch 1"),
    ("size_ratio", 0.2, "artifact: 200 bytes against 1000 in float"),
    ("weight_ratio", 0.13, "quantized weights: 130 bytes against 1000"),
]


@pytest.mark.parametrize(("name", "figure", "evidence"), CASES)
def test_a_limit_passes_at_the_figure_and_fails_below(name, figure, evidence):
    for limit, verdict in ((figure, "pass"), (figure * 1.01, "pass"), (figure * 0.99, "fail")):
        limits = GateLimits(accumulators_different=0, decide_by="point", **{name: limit})
        row = only(evaluate([result()], limits), name)
        assert (row.name, row.target, row.precision, row.limit) == (name, "ort", "w4a4", limit)
        assert row.value == pytest.approx(figure)
        assert row.verdict == verdict
        assert evidence in row.evidence
        assert overall([row]) == verdict
        assert json.loads(json.dumps(row.to_dict()))["verdict"] == verdict


def test_accumulators_must_all_agree_by_default():
    (row,) = evaluate([result()], GateLimits())
    assert (row.name, row.value, row.limit, row.verdict) == ("accumulators_different", 0, 0, "pass")
    parity = {"accumulators_checked": 1000, "accumulators_different": 1}
    (row,) = evaluate([result(parity=parity)], GateLimits())
    assert (row.value, row.verdict) == (1, "fail")
    assert row.evidence == "1 of 1000 teacher-forced int32 accumulators differ"


def test_nothing_checked_is_no_parity():
    parity = {"accumulators_checked": 0, "accumulators_different": 0}
    (row,) = evaluate([result(parity=parity)], GateLimits())
    assert (row.value, row.verdict) == (None, "undecided")
    assert "holds no parity.accumulators_checked above 0" in row.evidence


def test_a_declared_precision_that_did_not_run_fails():
    fallen = result()
    fallen["audit"]["ops"][1]["precision"] = "float32"
    limits = GateLimits(accumulators_different=None, executed=1.0)
    assert only(evaluate([result()], limits), "executed").verdict == "pass"
    row = only(evaluate([fallen], limits), "executed")
    assert row.verdict == "fail"
    assert row.value == pytest.approx(0.6)  # 60 of the 100 declared multiply-accumulates
    assert row.evidence == "1 of 2 declared operations ran as declared; not: fc2 (W4A4 ran as float32)"
    assert only(evaluate([fallen], GateLimits(executed=0.6)), "executed").verdict == "pass"
    undeclared = result(audit={"ops": [{"name": "fc1", "macs": 1, "declared": "float", "precision": "float32"}]})
    assert only(evaluate([undeclared], limits), "executed").verdict == "fail"


def test_executed_shares_serve_where_no_audit_is_there():
    bare = result(audit=None, executed={"int8": 0.9, "float32": 0.1})
    row = only(evaluate([bare], GateLimits(executed=0.95)), "executed")
    assert (row.value, row.verdict) == (pytest.approx(0.9), "fail")
    assert "int8 90.00%, float32 10.00%" in row.evidence


def test_float_activations_and_the_baseline_have_no_integer_gates():
    limits = GateLimits(executed=1.0, code_flip_share=0.0, latency_ratio=1.0, size_ratio=0.5)
    weight_only = evaluate([result(precision="w4a16")], limits)
    assert [r.name for r in weight_only] == ["latency_ratio", "size_ratio"]
    baseline = evaluate([result(precision="fp32"), result(precision="w4a16")], limits)
    assert [r.precision for r in baseline] == ["w4a16", "w4a16"]
    fp4 = {r.name for r in evaluate([result(precision="nvfp4")], limits)}
    assert fp4.isdisjoint({"accumulators_different", "code_flip_share"})


# --- statistics --------------------------------------------------------------------------------------


def paired(lost: int, gained: int, n: int = 1000) -> dict[str, Any]:
    right = n - gained - 10
    first = [1] * right + [0] * gained + [0] * 10
    second = [0] * lost + [1] * (right - lost) + [1] * gained + [0] * 10
    return result(
        metric={
            "name": "accuracy",
            "n": n,
            "float": sum(first) / n,
            "measured": sum(second) / n,
            "per_sample_float": first,
            "per_sample_measured": second,
        }
    )


def test_paired_samples_give_an_interval_and_the_detectable_drop():
    row = only(evaluate([paired(12, 4)], GateLimits(accuracy_drop=0.005)), "accuracy_drop")
    assert row.value == pytest.approx(0.008)
    assert row.verdict == "undecided"
    assert "95 % interval of the drop [0.0002, 0.0173]" in row.evidence
    assert row.interval == pytest.approx((0.0002, 0.0173), abs=5e-5)
    assert "exact McNemar, Tango interval, p = 0.0384); lost 12, gained 4" in row.evidence
    assert f"a true drop of {row.detectable:.4g} fails this gate in 80 % of runs" in row.evidence
    assert f"a model without any drop needs {row.samples_needed} samples to pass it" in row.evidence
    assert 0.012 < row.detectable < 0.02
    assert 5000 < row.samples_needed < 6500


@pytest.mark.parametrize(
    ("lost", "gained", "point", "interval"),
    [(12, 4, "fail", "undecided"), (40, 2, "fail", "fail"), (0, 0, "pass", "pass"), (4, 4, "pass", "undecided")],
)
def test_point_and_interval_decide_differently(lost, gained, point, interval):
    for decide_by, verdict in (("point", point), ("interval", interval)):
        limits = GateLimits(accuracy_drop=0.005, decide_by=decide_by)
        assert only(evaluate([paired(lost, gained)], limits), "accuracy_drop").verdict == verdict


def test_latency_by_interval():
    limits = GateLimits(latency_ratio=0.5, decide_by="interval")
    assert only(evaluate([result()], limits), "latency_ratio").verdict == "undecided"
    assert only(evaluate([result(speedup_ci=[2.05, 2.1])], limits), "latency_ratio").verdict == "pass"
    assert only(evaluate([result(speedup_ci=[1.5, 1.9])], limits), "latency_ratio").verdict == "fail"


def test_per_sample_lists_that_do_not_fit_are_undecided():
    broken = paired(3, 0)
    broken["metric"]["per_sample_float"].pop()
    row = only(evaluate([broken], GateLimits(accuracy_drop=0.5)), "accuracy_drop")
    assert row.verdict == "undecided"
    assert "per-sample results do not fit: paired samples of shapes (999,) and (1000,)" in row.evidence


def test_samples_of_another_run_decide_nothing():
    stale = paired(3, 0)
    stale["metric"]["measured"] -= 0.05
    row = only(evaluate([stale], GateLimits(accuracy_drop=0.5)), "accuracy_drop")
    assert row.verdict == "undecided"
    assert row.evidence.endswith("the samples' own drop is 0.003, not 0.053: they are not those of these figures")


def test_a_metric_where_less_is_better():
    worse = result(metric={"name": "loss", "float": 1.0, "measured": 1.2, "higher_is_better": False})
    row = only(evaluate([worse], GateLimits(accuracy_drop=0.1, decide_by="point")), "accuracy_drop")
    assert (row.value, row.verdict) == (pytest.approx(0.2), "fail")
    losses = [1.0 + i / 50 for i in range(50)]
    for change, verdict in ((0.2, "fail"), (-0.2, "pass")):
        graded = {"per_sample_float": losses, "per_sample_measured": [x * (1 + change) for x in losses]}
        metric = {"name": "loss", "float": 1.49, "measured": 1.49 * (1 + change), "higher_is_better": False} | graded
        row = only(evaluate([result(metric=metric)], GateLimits(accuracy_drop=0.1)), "accuracy_drop")
        assert (row.value, row.verdict) == (pytest.approx(1.49 * change), verdict)
        assert row.interval[0] < row.value < row.interval[1]


def test_an_estimate_without_an_interval_decides_nothing():
    row = only(evaluate([result()], GateLimits(accuracy_drop=0.5)), "accuracy_drop")
    assert (row.value, row.verdict) == (pytest.approx(0.01), "undecided")
    assert row.evidence.endswith("so no interval; an estimate without an interval decides nothing")
    one = result(metric={"float": 0.5, "measured": 0.4, "per_sample_float": [0.5], "per_sample_measured": [0.4]})
    assert only(evaluate([one], GateLimits(accuracy_drop=0.5)), "accuracy_drop").verdict == "undecided"


def test_nan_fails():
    broken = result(metric={"name": "accuracy", "float": 0.9, "measured": float("nan")})
    row = only(evaluate([broken], GateLimits(accuracy_drop=0.5)), "accuracy_drop")
    assert (row.value, row.verdict) == (None, "fail")
    assert "not a finite number" in row.evidence


# --- latency -----------------------------------------------------------------------------------------


def test_an_unstable_latency_is_undecided_whoever_is_unstable():
    noisy = {"p50": 5.0, "stable": False, "note": "spread 30%"}
    row = only(evaluate([result(latency_ms=noisy)], GateLimits(latency_ratio=1.0)), "latency_ratio")
    assert (row.value, row.verdict) == (0.5, "undecided")
    assert "this is not stable: spread 30%" in row.evidence
    rows = evaluate([result(), result(precision="fp32", latency_ms=noisy)], GateLimits(latency_ratio=1.0))
    assert only(rows, "latency_ratio").verdict == "undecided"
    assert "the float baseline is not stable" in only(rows, "latency_ratio").evidence


def test_the_ratio_falls_back_on_the_baselines_median():
    baseline = result(precision="fp32", latency_ms={"p50": 4.0, "stable": True})
    rows = evaluate([result(speedup_over_float=None), baseline], GateLimits(latency_ratio=1.0, decide_by="point"))
    row = only(rows, "latency_ratio")
    assert (row.value, row.verdict) == (1.25, "fail")
    assert "p50 5.000 ms against 4.000 ms in float" in row.evidence


def test_fast_and_wrong_is_no_speed():
    wrong = result(parity={"accumulators_checked": 10, "accumulators_different": 3})
    row = only(evaluate([wrong], GateLimits(latency_ratio=1.0)), "latency_ratio")
    assert row.verdict == "undecided"
    assert row.evidence.startswith(
        "void, because accumulators_different failed: what ran is not the declared model; p50"
    )
    codes = GateLimits(latency_ratio=1.0, code_flip_share=0.0)
    assert "void, because code_flip_share failed" in only(evaluate([result()], codes), "latency_ratio").evidence
    unchecked = result(parity={"top1_flips": 0})
    row = only(evaluate([unchecked], GateLimits(latency_ratio=1.0)), "latency_ratio")
    assert row.verdict == "undecided"
    assert row.evidence.startswith("void, because accumulators_different is undecided: what ran may not be")


def test_a_latency_without_parity_is_void():
    limits = GateLimits(accumulators_different=None, latency_ratio=1.0)
    row = only(evaluate([result()], limits), "latency_ratio")
    assert (row.value, row.verdict) == (0.5, "undecided")
    assert row.evidence.startswith("void, because no parity gate was judged: set one of gates.accumulators_different,")
    # Float activations have no codes to compare: the metric must agree with the simulation's.
    limits = GateLimits(latency_ratio=1.0, simulation_gap=0.01)
    assert only(evaluate([result(precision="w4a16")], limits), "latency_ratio").verdict == "pass"
    gap = GateLimits(latency_ratio=1.0, simulation_gap=0.001)
    assert "void, because simulation_gap failed" in only(evaluate([result()], gap), "latency_ratio").evidence


# --- what is missing ---------------------------------------------------------------------------------


def test_a_required_target_that_was_not_measured_is_undecided():
    built = {"target": "tensorrt", "precision": "w4a4", "status": "built", "reason": "no GPU here"}
    rows = evaluate([result(), built], GateLimits(simulation_gap=0.1), required=["tensorrt", "ort"])
    row = next(r for r in rows if r.target == "tensorrt")
    assert (row.name, row.value, row.limit, row.verdict) == ("measured", 0.0, 1.0, "undecided")
    assert row.evidence == "required, but only built: no GPU here"
    assert [r.verdict for r in rows if r.target == "ort"] == ["pass", "pass", "pass"]
    assert overall(rows) == "undecided"
    assert exit_code(overall(rows)) == 1


def test_what_is_not_required_and_not_measured_has_no_row():
    away = {"target": "tensorrt", "precision": "w4a4", "status": "unavailable", "reason": "not installed"}
    for required in (None, ["ort"]):
        rows = evaluate([result(), away], GateLimits(simulation_gap=0.1), required=required)
        assert {r.target for r in rows} == {"ort"}
        assert overall(rows) == "pass"


def test_a_required_result_that_does_not_exist_is_undecided():
    rows = evaluate([result()], GateLimits(), required=["tvm", "ort/w8a8"])
    missing = [r for r in rows if r.verdict == "undecided"]
    assert [(r.target, r.precision, r.evidence) for r in missing] == [
        ("tvm", "w4a4", "required, but there is no result"),
        ("ort", "w8a8", "required, but there is no result"),
    ]
    nothing = evaluate([], GateLimits(), required=["ort"])
    assert [(r.target, r.precision, r.verdict) for r in nothing] == [("ort", "*", "undecided")]
    listed = evaluate([result()], GateLimits(), required=["ort"], precisions=["w4a4", "w8a8"])
    assert [(r.precision, r.verdict) for r in listed if r.name == "measured"] == [
        ("w4a4", "pass"),
        ("w8a8", "undecided"),
    ]


def test_a_missing_figure_is_undecided_only_where_required():
    bare = result("tvm", latency_ms=None)
    limits = GateLimits(latency_ratio=1.0)
    rows = [r for r in evaluate([result(), bare], limits) if r.name == "latency_ratio"]
    assert [(r.target, r.verdict) for r in rows] == [("ort", "pass"), ("tvm", "undecided")]
    assert "not measured: the result holds no latency_ms.p50" in rows[1].evidence
    rows = evaluate([result(), bare], limits, required=["ort"])
    assert [(r.name, r.target, r.verdict) for r in rows if r.name != "accumulators_different"] == [
        ("measured", "ort", "pass"),
        ("latency_ratio", "ort", "pass"),
    ]


def test_a_limit_never_vanishes():
    rows = evaluate([result(latency_ms=None)], GateLimits(latency_ratio=1.0), required=[])
    row = only(rows, "latency_ratio")
    assert (row.target, row.value, row.verdict) == ("*", None, "undecided")
    assert row.evidence == "no result holds latency_ms.p50 with a float baseline"


def test_built_artifacts_are_judged_by_size_and_audit_only():
    built = result("tensorrt", status="built")
    limits = GateLimits(accuracy_drop=0.0, executed=1.0, size_ratio=0.1, latency_ratio=0.1)
    rows = [r for r in evaluate([built], limits) if r.target == "tensorrt"]
    assert [(r.name, r.verdict) for r in rows] == [("executed", "pass"), ("size_ratio", "fail")]


def test_no_gate_is_no_pass():
    assert overall([]) == "undecided"
    assert evaluate([result()], NOTHING) == []
    assert (exit_code("pass"), exit_code("fail"), exit_code("undecided")) == (0, 1, 1)


def test_fail_outranks_undecided():
    def row(verdict: Any) -> GateVerdict:
        return GateVerdict("x", "ort", "w4a4", 1.0, 1.0, verdict, "")

    assert overall([row("pass"), row("undecided"), row("fail")]) == "fail"
    assert overall([row("pass"), row("undecided")]) == "undecided"


# --- input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"acuracy_drop": 0.1}, "unknown key gates.acuracy_drop. Expected: one of accuracy_drop"),
        ({"acuracy_drop": 0.1}, "Fix: did you mean 'accuracy_drop'?"),
        ({"latency_ratio": -1}, "gates.latency_ratio: -1"),
        ({"executed": 1.5, "size_ratio": "small"}, "gates.executed: 1.5, gates.size_ratio: 'small'"),
        ({"simulation_gap": float("nan")}, "gates.simulation_gap: nan"),
        ({"size_ratio": True}, "gates.size_ratio: True"),
        ({"decide_by": "vote"}, "gates.decide_by: 'vote'"),
    ],
)
def test_wrong_limits(document, words):
    with pytest.raises(RecipeError) as caught:
        GateLimits.from_dict(document)
    assert words in str(caught.value)


def test_limits_from_a_recipe():
    limits = GateLimits.from_dict({"accuracy_drop": 0.005, "accumulators_different": None})
    assert limits.numbers() == {"accuracy_drop": 0.005}


def test_results_without_a_name_and_twins_are_refused():
    with pytest.raises(ArtifactError, match=r"results\[1\]\.precision is not a text\. Found: None"):
        evaluate([result(), {"target": "ort", "status": "measured"}], NOTHING)
    with pytest.raises(ArtifactError, match=r"results\[1\]: ort w4a4 occurs twice"):
        evaluate([result(), result()], NOTHING)


junk = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3) | st.lists(st.integers())
ops = st.lists(junk | st.dictionaries(st.sampled_from(["name", "macs", "declared", "precision"]), junk), max_size=3)
odd_sections = {
    "metric": ("name", "n", "float", "simulated", "measured", "per_sample_float", "per_sample_measured"),
    "parity": ("accumulators_checked", "accumulators_different", "codes_checked", "codes_different", "top1_flips"),
    "latency_ms": ("p50", "stable", "note", "threads"),
    "executed": ("int8", "float32"),
}
odd_results = st.fixed_dictionaries(
    {},
    optional={
        **{k: junk | st.dictionaries(st.sampled_from(v), junk) for k, v in odd_sections.items()},
        "audit": junk | st.fixed_dictionaries({"ops": ops}),
        "speedup_over_float": junk,
        "speedup_ci": junk | st.lists(junk, min_size=2, max_size=2),
        "size_bytes": junk,
        "float_size_bytes": junk,
    },
)


@settings(max_examples=300, deadline=None)
@given(odd_results)
def test_odd_results_give_rows_not_tracebacks_and_stay_unchanged(odd):
    everything = {name: 1.0 for name, _, _ in CASES} | {"executed": 1.0}
    before = copy.deepcopy(odd)
    entry = result(**odd)
    rows = evaluate([entry], GateLimits(**everything))
    assert {r.name for r in rows} == {*everything, "accumulators_different"}
    assert all(r.evidence and r.verdict in ("pass", "fail", "undecided") for r in rows)
    json.dumps([r.to_dict() for r in rows], allow_nan=False)
    assert not [r for r in rows if r.value is None and r.verdict == "pass"]
    assert repr({k: entry[k] for k in odd}) == repr(before)


@pytest.mark.parametrize(
    ("parity", "value", "verdict", "words"),
    [
        ({"verdict": "pass", "explanation": {"findings": []}}, 0, "pass", "nothing but rounding at boundaries"),
        (
            {
                "verdict": "fail",
                "explanation": {"findings": [{"cause": "wrong-scale"}]},
                "consistency": {"agrees": False},
            },
            2,
            "fail",
            "wrong-scale; runs that disagree with each other",
        ),
        ({"verdict": "fail", "explanation": {"verdict": "unexplained"}}, 1, "fail", "differences without a cause"),
        ({"verdict": "fail", "budget": {"within": False}}, 1, "fail", "more differences than the network's tolerances"),
        ({"verdict": "undecided", "unexamined": {"budget": "x"}}, 0, "undecided", "not examined: budget"),
    ],
)
def test_what_verify_found_is_a_gate(parity: dict[str, Any], value: int, verdict: str, words: str) -> None:
    (row,) = evaluate([result(parity=parity)], GateLimits(accumulators_different=None, parity_findings=0))
    assert (row.name, row.value, row.verdict) == ("parity_findings", value, verdict)
    assert words in row.evidence
