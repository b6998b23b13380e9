"""benchmarks/ptq_peers.py: its verdicts, what it says of a toolkit that is missing, and a tiny real comparison."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2d_deploy.errors import RuntimeUnavailable
from s2d_deploy.evaluate import Score, outputs, torch_run

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
peers, toolkits, data = map(import_module, ("ptq_peers", "_ptq_toolkits", "_ptq_data"))
Row, Candidate = peers.Row, toolkits.Candidate


def candidate(name: str, ours: bool, counterpart: str | None = None, needs: tuple[str, ...] = ()) -> Any:
    return Candidate(name, "int8", ours, False, "how", lambda _: None, needs, counterpart)


def row(values: list[float], *seconds: float) -> Any:
    score = Score("cosine x 100", float(np.mean(values)), np.asarray(values))
    by_round = dict(enumerate(seconds))
    return Row(by_round, by_round, {"value": score, "neighbours": score}, {"layers": 1, "products": 0})


PAIR = (candidate("mine", True), candidate("theirs", False, "mine"))


def verdicts(mine: Any, theirs: Any) -> list[tuple[str, float | None]]:
    figures = peers.figures_of(PAIR, {"mine": mine, "theirs": theirs}, "embedding")
    assert [f.name for f in figures[2:]] == [
        "int8, mine / theirs: cosine x 100 below the peer",
        "int8, mine / theirs: seconds over the peer's",
    ]
    assert [(f.verdict, f.value) for f in figures[:2]] == [(f.verdict, f.value) for f in figures[2:]]
    return [(f.verdict, f.value) for f in figures[2:]]


def test_better_and_faster_passes_worse_and_slower_fails():
    good, bad = [98.0, 99.0, 98.5, 99.5] * 10, [90.0, 91.0, 90.5, 91.5] * 10
    assert verdicts(row(good, 1.0, 1.1), row(bad, 2.0, 2.2)) == [("pass", -8.0), ("pass", pytest.approx(0.5))]
    assert verdicts(row(bad, 2.0, 2.2), row(good, 1.0, 1.1)) == [("fail", 8.0), ("fail", pytest.approx(2.0))]


def test_what_the_samples_or_rounds_do_not_separate_is_undecided():
    rng = np.random.default_rng(0)
    base = rng.normal(90, 5, 40)
    noisy = base - 0.1 + rng.normal(0, 5, 40) - rng.normal(0, 5, 40)
    noisy += base.mean() - 0.2 - noisy.mean()  # 0.2 below, with a spread of 7
    accuracy, seconds = verdicts(row(list(noisy), 1.0, 3.0), row(list(base), 2.0, 2.0))
    assert accuracy == ("undecided", pytest.approx(0.2))
    assert seconds == ("undecided", pytest.approx(1.0))


def test_what_did_not_run_has_no_number():
    missing = Row(unavailable="RuntimeUnavailable: nncf not installed")
    figures = peers.figures_of(PAIR, {"mine": row([99.0], 1.0), "theirs": missing}, "embedding")
    assert {(f.verdict, f.value) for f in figures} == {("undecided", None)}
    assert figures[2].note == "unavailable: theirs: RuntimeUnavailable: nncf not installed"
    assert missing.document() == {"unavailable": "RuntimeUnavailable: nncf not installed"}
    assert "unavailable" in peers._table(PAIR, {"mine": row([99.0], 1.0), "theirs": missing}, "embedding")


def test_only_recipes_that_are_as_good_and_as_fast_are_named():
    crowd = (*PAIR, candidate("slow", True), candidate("poor", True))
    rows = {"mine": row([99.0], 1.0), "slow": row([99.5], 9.0), "poor": row([80.0], 0.1), "theirs": row([99.0], 1.0)}
    assert peers.beaten_by(crowd[1], crowd, rows) == ["mine"]


def test_the_block_size_divides_every_width():
    assert peers.block_size([384, 1536]) == 128
    assert peers.block_size([64, 256]) == 64
    assert peers.block_size([48, 96]) == 16


def test_counterparts_exist_and_have_the_format_of_their_peer():
    assert len(peers.BY_NAME) == len(peers.CANDIDATES)
    for c in peers.CANDIDATES:
        if not c.ours:
            assert peers.BY_NAME[c.counterpart].ours
            assert peers.BY_NAME[c.counterpart].format == c.format


def test_a_toolkit_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(toolkits, "find_spec", lambda _: None)
    with pytest.raises(RuntimeUnavailable, match=r"nncf and openvino not installed.*'s2d-deploy\[bench\]'"):
        peers.BY_NAME["nncf"].check()
    with pytest.raises(RuntimeUnavailable, match=r"modelopt not installed.*'s2d-deploy\[modelopt\]'"):
        peers.BY_NAME["modelopt-int8"].check()


def test_a_command_names_no_folder(tmp_path: Path):
    words = ["--model", str(tmp_path), "--data", str(tmp_path), "--task", "embedding", "--candidates", "int8", "nncf"]
    command = peers._command(peers.arguments_parser().parse_args(words))
    assert str(tmp_path) not in " ".join(command)
    assert command[-3:] == ["--candidates", "int8", "nncf"]
    again = peers.arguments_parser().parse_args(command[2:])
    assert peers._command(again) == command


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)).eval()
    batches = [{"pixel_values": torch.randn(8, 3, 8, 8)} for _ in range(2)]
    reference = outputs(torch_run(model, "logits"), "logits", batches)
    labels = torch.from_numpy(reference.argmax(axis=-1))
    evidence = data.Evidence("image-classification", model, "logits", batches, batches, None, labels, reference)
    return toolkits.Bench(evidence, tmp_path_factory.mktemp("peers"), 1, 32, 0)


@pytest.mark.parametrize(
    ("names", "package", "layers"),
    [
        (("int8", "int8@ort", "ort-minmax"), "onnxruntime", {(8, 2)}),
        (("int4", "int4@ort", "ort-rtn", "ort-gptq-sym"), "onnxruntime", {(7, 0), (6, 0)}),
        (("modelopt-int8", "modelopt-awq-lite"), "modelopt", {(8, 0), (7, 0)}),
        (("nncf", "nncf-int4"), "nncf", {(8, 1), (7, 0)}),
    ],
)
def test_toolkits_quantize_a_tiny_model(bench: Any, names: tuple[str, ...], package: str, layers: set[Any]):
    pytest.importorskip(package)
    rows = peers.measure([peers.BY_NAME[n] for n in names], bench, 2)
    for name, found in rows.items():
        assert found.unavailable is None, f"{name}: {found.unavailable}"
        assert set(found.seconds) == {0, 1}
        assert min(found.seconds.values()) > 0
        # Random logits lie close together; a wrong wiring agrees by chance, in a third of the samples.
        assert found.scores["agreement"].value >= 60
        assert (found.facts["layers"], found.facts["products"]) in layers
