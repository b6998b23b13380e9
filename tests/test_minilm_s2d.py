"""The MiniLM benchmark: its split, its summaries and verdicts by hand, and one real run on an encoder made here."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from s2d_deploy.errors import DataError

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
bench, plots = import_module("minilm_s2d"), import_module("_minilm_plots")

LINES = [f"word{i} word{(i * i) % 7} word{i // 3}" for i in range(60)]
LAYER = "encoder.layer.0.output.dense"


def test_held_out_sentences_are_the_same_for_every_seed_and_seen_by_none() -> None:
    calibration, train, held_out = bench.split([*LINES, *LINES], 20, 10, seed=0)
    assert (len(calibration), len(train), len(held_out)) == (10, 30, 20)
    assert sorted(calibration + train + held_out) == sorted(LINES)  # each once, although each was given twice
    other = bench.split(LINES, 20, 10, seed=1)
    assert other[2] == held_out
    assert set(other[0]) != set(calibration)
    assert bench.split(LINES, 20, 10, seed=0) == (calibration, train, held_out)
    with pytest.raises(DataError, match=r"too few sentences.*at least 61 different ones.*Found: 60.*--held-out"):
        bench.split([*LINES, *LINES], 41, 10, seed=0)


def test_padding_that_all_sentences_share_is_cut_off() -> None:
    batch = {
        "input_ids": torch.arange(12).reshape(2, 6),
        "attention_mask": torch.tensor([[1] * 3 + [0] * 3, [1] * 4 + [0] * 2]),
    }
    cut = bench.trimmed(batch)
    assert cut["input_ids"].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert cut["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def measured(seed: int, cosine: float, after: float, w4a4: float = 0.6) -> dict[str, Any]:
    state = {"sigma_max": 8.0, "max_abs_activation": 200.0, "singular_values": [8.0, 2.0, 1.0]}
    pressed = {"sigma_max": 8.0 * after, "max_abs_activation": 100.0 * after, "singular_values": [8 * after, 2.0, 1.0]}
    values = {"cosine": cosine, "neighbour": 95.0, "neighbour5": 94.0}
    return {
        "settings": {"seed": seed},
        "float": values,
        "quantized": {"w4a4/mse": {**values, "cosine": w4a4}},
        "layers": {LAYER: {"before": state, "after": pressed}},
    }


def test_a_summary_is_the_mean_and_the_ends_of_the_seeds() -> None:
    found = bench.summary([measured(0, 0.99, 0.4, 0.5), measured(1, 1.0, 0.6, 0.8)])
    assert found["seeds"] == [0, 1]
    assert found["float"]["cosine"] == {"mean": pytest.approx(0.995), "min": 0.99, "max": 1.0}
    assert found["quantized"]["w4a4/mse"]["cosine"] == {"mean": pytest.approx(0.65), "min": 0.5, "max": 0.8}
    assert found["sigma_max_ratio"][LAYER] == {"mean": pytest.approx(0.5), "min": 0.4, "max": pytest.approx(0.6)}
    assert found["max_abs_ratio"][LAYER]["mean"] == pytest.approx(0.25)


def test_a_layer_that_one_seed_does_not_flag_is_left_out() -> None:
    other = measured(1, 1.0, 0.5)
    other["layers"] = {}
    assert bench.summary([measured(0, 1.0, 0.5), other])["max_abs_ratio"] == {}


@pytest.mark.parametrize(
    ("cosine", "after", "verdicts"),
    [
        (0.996, 0.5, ["pass", "pass", "pass", "pass"]),
        (0.996, 0.6, ["pass", "fail", "pass", "pass"]),  # |output| is halved already, s_max is not
        (0.994, 0.4, ["pass", "pass", "fail", "pass"]),
    ],
)
def test_the_s2d_arm_is_judged(cosine: float, after: float, verdicts: list[str]) -> None:
    arms = {"s2d": bench.summary([measured(0, cosine, after)])}
    assert [figure.verdict for figure in bench.figures_of(arms)] == verdicts


def test_without_a_flagged_layer_nothing_is_promised() -> None:
    run = measured(0, 1.0, 1.0)
    run["layers"] = {}
    figures = bench.figures_of({"s2d": bench.summary([run])})
    assert [figure.verdict for figure in figures] == ["undecided", "undecided", "pass", "pass"]
    assert figures[0].note == "no layer is flagged"
    assert bench.figures_of({"control": bench.summary([run])}) == []


def test_tables_show_mean_and_ends() -> None:
    arms = {"original": bench.summary([measured(0, 1.0, 1.0)]), "s2d": bench.summary([measured(0, 0.5, 0.25)])}
    assert bench.show(arms, "cosine", 2).splitlines()[-1].split("  ")[0] == "s2d"
    assert "0.50 [0.50, 0.50]" in bench.show(arms, "cosine", 2)
    assert bench.show_layers(arms).splitlines()[2:] == [f"s2d  {LAYER}   0.25          0.12"]


def test_plots_show_every_arm_and_precision(tmp_path: Path) -> None:
    runs = {
        "original": [measured(0, 1.0, 1.0)],
        "control": [measured(0, 0.9995, 1.0)],
        "s2d": [measured(0, 0.997, 0.4), measured(1, 0.998, 0.5)],
    }
    arms = {name: bench.summary(found) for name, found in runs.items()}
    written = plots.write(arms, runs, tmp_path / "2026-01-01-x")
    assert [path.name.removeprefix("2026-01-01-x-") for path in written] == [
        "cosine.svg", "neighbour.svg", "layers.svg", "spectra.svg"
    ]  # fmt: skip
    for path in written:
        text = path.read_text()
        assert ElementTree.fromstring(text).tag.endswith("svg")  # noqa: S314 - written above
        assert ">s2d</text>" in text
    assert "s2d, w4a4, mse: 0.6 [0.6, 0.6]" in written[0].read_text()
    assert f"s2d, {LAYER}: 0.450 [0.400, 0.500]" in written[2].read_text()
    for found in runs.values():
        for run in found:
            run["layers"] = {}
    arms = {name: bench.summary(found) for name, found in runs.items()}
    assert len(plots.write(arms, runs, tmp_path / "y")) == 2


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with one dominant triplet, planted where MiniLM has its own, and its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for line in LINES for word in line.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words) + 5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    model = BertModel(config)
    layer = model.get_submodule(LAYER)
    with torch.no_grad():
        model.get_submodule("encoder.layer.0.intermediate.dense").bias.fill_(1.0)
        u, v = torch.nn.functional.one_hot(torch.tensor(3), 16).float(), torch.full((32,), 32**-0.5)
        layer.weight.add_(4.0 * torch.outer(u, v))
    model.save_pretrained(folder)
    (folder / "corpus.txt").write_text("\n".join(LINES))
    return folder


def test_a_real_run_keeps_its_results_and_uses_them_again(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model", str(encoder), "--data", str(encoder / "corpus.txt"), "--work", str(tmp_path / "work"),
        "--results", str(tmp_path / "results"), "--arms", "original", "control", "s2d", "--held-out", "20",
        "--calibration", "10", "--length", "8", "--steps", "6", "--batch", "5", "--lr", "1e-2", "--factor", "3",
        "--warmup", "1", "--refresh", "2", "--k-max", "1", "--precisions", "w8a8", "w4a4", "--methods", "mse",
    ]  # fmt: skip
    code = bench.main([*arguments, "--seeds", "0", "1"])
    text = capsys.readouterr().out
    assert code in (0, 1), text
    path = next((tmp_path / "results").glob("*-minilm-s2d.json"))
    document = json.loads(path.read_text())
    assert code == (0 if document["verdict"] == "pass" else 1)
    data = document["data"]
    assert {name: arm["seeds"] for name, arm in data["arms"].items()} == {n: [0, 1] for n in data["runs"]}
    assert list(data["runs"]) == ["original", "control", "s2d"]
    original, control, pressed = (data["runs"][name][0] for name in ("original", "control", "s2d"))
    assert original["float"]["cosine"] == pytest.approx(1, abs=1e-12)
    assert original["float"]["neighbour"] == 100.0
    assert original["quantized"]["w4a4/mse"]["cosine"] < original["quantized"]["w8a8/mse"]["cosine"] < 1
    assert control["facts"]["method"] == "distill"
    assert pressed["facts"]["method"] == "distill+s2d-decoupled"
    assert len(pressed["facts"]["losses"]) == 6
    ratios = {name: bench.ratios(run, "sigma_max")[LAYER] for name, run in (("control", control), ("s2d", pressed))}
    assert ratios["s2d"] < 0.8 < ratios["control"]
    assert len(list((tmp_path / "results").glob("*.svg"))) == 4
    assert str(tmp_path) not in path.read_text()
    assert str(encoder) not in path.read_text()

    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").iterdir()}
    assert len(times) == 6
    bench.main([*arguments, "--seeds", "0", "--factor", "4"])
    text = capsys.readouterr().out
    assert re.findall(r"^(\w+), seed 0: kept$", text, re.M) == ["original", "control"]
    changed = {file.name for file, when in times.items() if file.stat().st_mtime_ns != when}
    assert changed == {"s2d-seed0.json"}
