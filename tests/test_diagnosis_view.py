"""The table of sites, the plots as files, and recipes made from a model and its data."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from s2d_deploy.cli import main
from s2d_deploy.diagnose import diagnose_model
from s2d_deploy.diagnosis_recipe import as_recipe, recipe_document
from s2d_deploy.diagnosis_view import sites_table, write_plots
from s2d_deploy.errors import DataError, ModelError, StageError
from s2d_deploy.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parent))
import planted

WORDS = "the quick brown fox jumps over a lazy dog while some cats sleep under old trees"


def spoiled() -> dict[str, object]:
    model, batches = planted.bert(), planted.texts()
    with torch.no_grad():
        model.get_submodule("encoder.layer.1.intermediate.dense").weight[7] *= 60
    found = diagnose_model(model, lambda: batches, output="last_hidden_state", tau=0.9)
    return json.loads(json.dumps(found.to_dict()))


def test_the_table_lists_the_worst_site_first_and_counts_the_harmless() -> None:
    document = spoiled()
    text = sites_table(document["sites"])  # type: ignore[arg-type]
    rows = [line for line in text.splitlines() if "encoder" in line]
    errors = [float(row.split("│")[4]) for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert any("encoder.layer.1.output.dense.input" in row and "neuron" in row for row in rows)
    assert f"{20 - len(rows)} of 20 quantized sites need no repair" in text
    total = sum(s["harm"] for s in document["sites"])  # type: ignore[attr-defined, index]
    worst = max(document["sites"], key=lambda s: s["error"])  # type: ignore[call-overload, index]
    assert rows[0].split("│")[5].strip() == f"{worst['harm'] / total:.1%}"
    assert "of the harm to the output." in text
    old = [{k: v for k, v in s.items() if k != "harm"} for s in document["sites"]]  # type: ignore[attr-defined]
    assert "harm to" not in sites_table(old)  # a diagnosis that was stored before harm was measured
    assert sites_table([]) == "0 of 0 quantized sites need no repair at 4 bits.\n"


def test_plots_are_svg_files_that_stand_alone(tmp_path: Path) -> None:
    document = spoiled()
    files = write_plots(document, tmp_path / "plots", tau=0.9)
    assert [f.name for f in files] == ["spectra.svg", "pcdr.svg", "sites.svg"]
    for file in files:
        root = ET.fromstring(file.read_text(encoding="utf-8"))  # noqa: S314 - our own file
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}style") is not None
    assert "tau = 0.9" in files[1].read_text()
    assert "encoder.layer.1.output.dense.input: error" in files[2].read_text()
    assert ", harm " in files[2].read_text()
    assert [f.name for f in write_plots({"layers": document["layers"]}, tmp_path)] == ["spectra.svg", "pcdr.svg"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="choose another --plots folder"):
        write_plots(document, tmp_path / "file" / "in")


def checkpoint(folder: Path) -> Path:
    """A tiny BERT with its tokenizer, as save_pretrained writes it."""
    from transformers import BertTokenizerFast

    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    planted.bert().save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    return folder


def test_a_model_and_its_data_make_a_recipe(tmp_path: Path) -> None:
    model, data = checkpoint(tmp_path / "My Model!"), tmp_path / "texts"
    data.mkdir()
    (data / "a.txt").write_text("one\ntwo\n")
    recipe = load_recipe(as_recipe(str(model), str(data), None, 8))
    assert recipe.name == "My-Model-diagnosis"
    assert (recipe.data.kind, recipe.data.calibration_samples, recipe.model.task) == ("text", 8, "embedding")
    assert as_recipe("digits-vit", None, None, 8) == "digits-vit"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.PNG").write_bytes(b"")
    assert recipe_document("m", str(tmp_path / "images"), "embedding", 4)["data"]["kind"] == "images"
    (tmp_path / "x.npz").write_bytes(b"")
    assert recipe_document("m", str(tmp_path / "x.npz"), "embedding", 4)["data"]["kind"] == "npz"


def test_bad_models_and_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'nowhere' does not exist"):
        recipe_document("m", "nowhere", "embedding", 4)
    with pytest.raises(DataError, match="holds nothing that can be read"):
        recipe_document("m", str(tmp_path), "embedding", 4)
    with pytest.raises(ModelError, match="leave --data out if it is a recipe"):
        recipe_document(str(tmp_path), str(tmp_path), None, 4)


def test_the_command_needs_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = checkpoint(tmp_path / "model"), tmp_path / "texts.txt"
    data.write_text("\n".join(f"{word} {other}" for word in WORDS.split() for other in ("fox", "dog", "cats")))
    output, plots = tmp_path / "run", tmp_path / "plots"
    arguments = ["diagnose", str(model), "--data", str(data), "--samples", "12", "-o", str(output), "-q"]
    arguments += ["--set", "data.max_length=8"]
    assert main([*arguments, "--plots", str(plots)]) == 0
    captured = capsys.readouterr()
    assert "S2D will" in captured.out or "Whether S2D helps" in captured.out
    assert "quantized sites need no repair" in captured.out
    assert str(plots / "sites.svg") in captured.err
    assert main([*arguments, "--json"]) == 0  # the same folder: the finished diagnosis is reused
    document = json.loads(capsys.readouterr().out)
    assert {"layers", "sites", "forecast", "tau"} <= set(document)
    assert main(["diagnose", str(model), "--data", str(tmp_path / "none"), "-q"]) == 2
    assert "does not exist" in capsys.readouterr().err
