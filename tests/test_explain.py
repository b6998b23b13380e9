"""Planted faults must be found, located and named; sound artifacts must not be flagged. `benchmarks/fault_injection.py`
plants many more."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2d_deploy.accumulator_faults import classify_accumulators
from s2d_deploy.consistency import agrees, self_consistency
from s2d_deploy.error_budget import make_budget
from s2d_deploy.explain import FAULT, IDENTICAL, ROUNDING, Explainer
from s2d_deploy.forced import Forced, reached_by
from s2d_deploy.gap import chain, split_gap
from s2d_deploy.models import forward
from s2d_deploy.parity_words import words
from s2d_deploy.probing import op_values, probe_values, quantizer_sources
from s2d_deploy.reproducer import write_reproducer
from s2d_deploy.simulation import recorded_codes
from s2d_deploy.verification import examine, verdict
from s2d_deploy.verify import end_to_end_codes

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
_faults: Any = import_module("_faults")
OUTPUT = _faults.OUTPUT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explain")


@pytest.fixture(scope="module")
def vit(folder: Path) -> Any:
    torch.set_num_threads(1)
    return _faults.tiny("vit", "w8a8", folder / "vit")


@pytest.fixture(scope="module")
def bert(folder: Path) -> Any:
    torch.set_num_threads(1)
    return _faults.tiny("bert", "w4a4", folder / "bert")


def explained(case: Any, fault: str, target: str, place: Path, seed: int = 3) -> Any:
    if target == "ort":
        pytest.importorskip("onnxruntime")
    artifact, truth = _faults.plant(fault, case, target, place, seed)
    with _faults.opened(artifact) as session:
        explainer = Explainer(session, case.simulated, case.plan, case.batch, OUTPUT, case.sources)
        return explainer.explain(), truth, explainer


@pytest.mark.parametrize(
    "fault", [name for name in _faults.PLANTS if name not in ("nothing", "half-away-at-the-input")]
)
def test_a_planted_fault_is_found_at_its_layer_under_its_name(fault: str, vit: Any, bert: Any, tmp_path: Path) -> None:
    # Both models and both runtimes get their share; benchmarks/fault_injection.py plants everything everywhere.
    even = list(_faults.PLANTS).index(fault) % 2 == 0 or fault == "saturated-in-the-kernel"
    found, truth, _ = explained(vit if even else bert, fault, "ort" if even else "reference", tmp_path)
    assert found.findings, truth
    first = found.findings[0]
    assert first.cause in truth.causes, (truth, first)
    assert truth.layers & {first.layer, *first.also}, (truth, first)
    assert found.verdict == FAULT


@pytest.mark.parametrize("target", ["ort", "reference"])
def test_a_sound_artifact_is_not_flagged(target: str, vit: Any, bert: Any, tmp_path: Path) -> None:
    for case in (vit, bert):
        found, _, _ = explained(case, "nothing", target, tmp_path / case.kind)
        assert found.findings == []
        assert found.verdict in (IDENTICAL, ROUNDING)
        assert found.probed > 10
        assert found.refused == 0
        assert found.taps_changed in (None, [])  # showing the codes changes no fusion


def test_two_faults_are_both_found(vit: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    edit = _faults.Edit(vit, np.random.default_rng(0))
    first, second = "layers.0.attention.v_proj", "layers.2.mlp.fc1"
    for op, factor in ((first, 1.5), (second, 0.7)):
        dq = edit.weight(op)
        dq.input[1] = edit.constant((edit.array(dq.input[1]) * factor).astype(np.float32))
    artifact = _faults.build(edit.model, vit, "ort", tmp_path)
    with _faults.opened(artifact) as session:
        found = Explainer(session, vit.simulated, vit.plan, vit.batch, OUTPUT, vit.sources).explain()
    assert [(f.cause, f.layer) for f in found.findings] == [("wrong-scale", first), ("wrong-scale", second)]
    assert "1.5" in found.findings[0].detail


def test_the_reproducer_runs_without_this_project(vit: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    values = op_values_of(vit, tmp_path)
    for fault, ends in (("transposed", 1), ("half-away", 1), ("dequantized", 0)):  # the last computes the same numbers
        artifact, truth = _faults.plant(fault, vit, "ort", tmp_path / fault, 1)
        with _faults.opened(artifact) as session:
            explainer = Explainer(session, vit.simulated, vit.plan, vit.batch, OUTPUT, vit.sources)
            found = explainer.explain()
            place = write_reproducer(tmp_path / fault / "shown", explainer, found.findings[0], values)
        assert {p.name for p in place.iterdir()} == {"layer.onnx", "inputs.npz", "result.npz", "run.py", "README.txt"}
        assert "s2d_deploy" not in (place / "run.py").read_text()
        assert len((place / "run.py").read_text().splitlines()) <= 20
        done = subprocess.run([sys.executable, "run.py"], cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == ends, done.stdout + done.stderr
        assert "values differ" in done.stdout
        assert found.findings[0].layer in (place / "README.txt").read_text()
        assert truth.causes >= {found.findings[0].cause}


def op_values_of(case: Any, folder: Path) -> Any:
    import onnx

    folder.mkdir(exist_ok=True)
    onnx.save_model(case.common, folder / "pristine.onnx")
    return op_values(folder / "pristine.onnx")


def test_parts_of_the_gap_add_up(vit: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    artifact, _ = _faults.plant("scale-of-weight", vit, "ort", tmp_path, 3)
    with _faults.opened(artifact) as session, torch.no_grad():
        explainer = Explainer(session, vit.simulated, vit.plan, vit.batch, OUTPUT, vit.sources)
        findings = explainer.explain().findings
        plain, simulated = (forward(m, vit.batch, OUTPUT).numpy() for m in (vit.module, vit.simulated))
        shown = session.run({n: t.numpy() for n, t in vit.batch.items()})[OUTPUT]
        steps = chain(explainer, findings, [vit.batch], plain, simulated, shown)
    gap = split_gap(steps, lambda y: float(np.abs(y).mean()))
    assert [p.name for p in gap.parts] == [
        "quantization",
        "wrong scale or saturation",
        "rounding at boundaries",
        "float operators",
    ]
    assert sum(p.share or 0.0 for p in gap.parts) == pytest.approx(1.0, abs=1e-9)
    assert sum(p.metric or 0.0 for p in gap.parts) == pytest.approx(gap.metric, abs=1e-6)
    wrong, last = gap.parts[1], gap.parts[-1]
    assert wrong.share is not None
    assert wrong.share > 0.5
    assert last.relative_power < 1e-9  # nothing is left unexplained


def test_the_budget_predicts_what_is_seen(vit: Any, bert: Any) -> None:
    for case, near in ((vit, 2.0), (bert, 4.0)):  # dB; at four bits errors are no longer small
        budget = make_budget(case.module, case.simulated, case.plan, [case.batch], OUTPUT)
        rows = [r for r in budget.layers if r.predicted_snr_db is not None and r.seen_snr_db is not None]
        assert len(rows) > 20
        assert max(abs(r.predicted_snr_db - r.seen_snr_db) for r in rows) < near
        first = rows[0]
        assert first.isolated_snr_db == pytest.approx(first.seen_snr_db, abs=0.1)  # nothing lies before it
        assert 0.0 < budget.flips < 1.0
        assert budget.allowed_codes(4) >= budget.moved
        assert budget.allowed_codes(400) > budget.allowed_codes(4)


def test_a_runtime_that_depends_on_its_batch_is_told(vit: Any, tmp_path: Path) -> None:
    artifact, _ = _faults.plant("nothing", vit, "reference", tmp_path, 0)
    feeds = {n: t.numpy() for n, t in vit.batch.items()}
    with _faults.opened(artifact) as session:
        found = self_consistency(session, feeds, OUTPUT, second=session)
        assert agrees(found)
        assert {a.what for a in found} >= {"run again", "batches of 1", "in reverse order", "second build"}

        class Neighbours:
            """A session whose first sample leaks into the others."""

            def run(self, given: Any) -> Any:
                shown = session.run(given)[OUTPUT]
                return {OUTPUT: shown + 0.01 * shown[:1]}

            def codes(self, given: Any) -> Any:
                return session.codes(given)

        assert not agrees(self_consistency(Neighbours(), feeds, OUTPUT))  # type: ignore[arg-type]


def test_verify_says_it_in_words(vit: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import onnx

    artifact, truth = _faults.plant("zero-of-kernel", vit, "ort", tmp_path, 3)
    onnx.save_model(vit.common, tmp_path / "pristine.onnx")

    def load(index: Any) -> Any:
        return {n: t[list(index)] for n, t in vit.batch.items()}

    with _faults.opened(artifact) as session, torch.no_grad():
        outputs = {
            "float": forward(vit.module, vit.batch, OUTPUT).numpy(),
            "simulated": forward(vit.simulated, vit.batch, OUTPUT).numpy(),
            "runtime": session.run({n: t.numpy() for n, t in vit.batch.items()})[OUTPUT],
        }
        counts = end_to_end_codes(session, vit.simulated, [vit.batch])
        found = examine(
            session,
            vit.module,
            vit.simulated,
            vit.plan,
            tmp_path / "pristine.onnx",
            load,
            outputs,
            OUTPUT,
            tmp_path,
            counts=counts,
            samples=4,
            batch_size=4,
        )
    assert "unexamined" not in found
    assert found["verdict"] == "fail"
    assert (tmp_path / found["explanation"]["reproducer"] / "run.py").is_file()
    text = "\n".join(words(found))
    (layer,) = truth.layers
    assert text.startswith(f"parity: FAULT; first in {layer}")
    assert "wrong-zero-point" in text
    assert "python run.py" in text
    assert "what rounding may move here" in text
    assert verdict({}) == "undecided"


def test_forced_in_fp32_is_the_simulation_bit_for_bit(vit: Any, bert: Any) -> None:
    for case in (vit, bert):
        with torch.no_grad():
            forced = Forced(case.simulated, case.plan, torch.float32).run(case.batch, OUTPUT)
            assert forced is not None
            assert torch.equal(forced, forward(case.simulated, case.batch, OUTPUT))


def test_reach_ends_at_sites(vit: Any) -> None:
    with recorded_codes(vit.simulated) as codes:
        vit.simulated(**vit.batch)
    forced = Forced(vit.simulated, vit.plan)
    reach = reached_by(forced, vit.batch, OUTPUT, {n: c.numpy() for n, c in codes.items()})
    assert reach["layers.1.attention.probs"] == {"layers.1.attention.scores"}
    assert reach["layers.0.mlp.fc1.input"] == {"embeddings.patch_embeddings.projection", "layers.0.attention.o_proj"}
    assert reach["embeddings.patch_embeddings.projection.input"] == set()


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 6)])
def test_accumulators_are_named(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    rng = np.random.default_rng(0)
    x, w = rng.integers(-100, 100, (m, k)), rng.integers(-100, 100, (k, n))
    want = x @ w
    swapped = x @ (w.T if k == n else w.T.reshape(k, n))
    cases = {
        "wrong-zero-point": (x - 2) @ w,
        "saturation": np.clip(want, -5000, 5000),
        "swapped-axis": swapped,
        "wrong-weights": x @ rng.integers(-100, 100, (k, n)),
    }
    for cause, got in cases.items():
        found = classify_accumulators(want.astype(np.int32), got.astype(np.int32), x, w)
        assert found.cause == cause
        assert found.exact == (cause != "wrong-weights")


def test_probe_values_hold_exact_ties(vit: Any) -> None:
    for site in vit.plan.sites.values():
        if site.role == "weight":
            continue
        x = probe_values(site)
        quotients = x / np.float32(float(site.scale))
        ties = quotients[np.abs(quotients - np.floor(quotients) - 0.5) == 0]
        assert len(np.unique(ties)) > 200


def test_sources_are_the_values_in_front(vit: Any, folder: Path) -> None:
    sources = quantizer_sources(folder / "vit" / "model.onnx")
    assert sources["embeddings.patch_embeddings.projection.input"][0] == "pixel_values"
    assert set(sources) == {n for n, s in vit.plan.sites.items() if s.role != "weight"}
