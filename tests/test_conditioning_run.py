"""``s2d-deploy condition MODEL --data PATH``: what it leaves, what it says, and every way to get it wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch
from command_line import Commands
from PIL import Image
from safetensors.torch import load_file, save_file

from s2d_deploy.conditioning_run import SUBJECTS, Change, _layers, verdict
from s2d_deploy.conditioning_view import points, statement, where
from s2d_deploy.diagnosis_recipe import recipe_document

WORDS = "the quick brown fox jumps over a lazy dog while some cats sleep under old trees".split()  # noqa: SIM905
HIT = "encoder.layer.1.output.dense"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 different texts, in two files."""
    folder = tmp_path_factory.mktemp("data") / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.permutation(WORDS)[:5]) for _ in range(120)]
    (folder / "a.txt").write_text("\n".join(lines[:70]))
    (folder / "b.txt").write_text("\n".join(lines[70:]))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with its tokenizer; the inputs of one layer meet a planted triplet in it."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    model = planted.bert()
    direction = planted.captured_input(model, HIT, planted.texts()[0]).mean(dim=(0, 1))
    planted.rank_one(model.get_submodule(HIT), direction, 20.0)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier of two classes, with its image processor."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("models") / "vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
        initializer_range=0.3,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (9, 8, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def flags(*more: str | Path) -> list[str | Path]:
    return ["--samples", "24", "--set", "data.max_length=8", "--set", "condition.batch_size=16", *more]


# --- what it leaves -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(commands: Commands, bert: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One finished run: 40 steps on 108 texts, so that the data runs out five times."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    arguments = ["condition", bert, "--data", texts, "--out", folder, *flags("--steps", "40")]
    arguments += ["--set", "condition.learning_rate=0.001", "--set", "condition.tau=0.9"]
    result = commands(*arguments)
    assert result.code == 0, result.stderr
    return arguments, folder, result


def test_the_checkpoint_loads_with_transformers_and_has_its_tokenizer(done: Any, bert: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    _, folder, _ = done
    model = AutoModel.from_pretrained(folder / "condition", add_pooling_layer=False)
    encoded = AutoTokenizer.from_pretrained(folder / "condition")(["the lazy dog"], return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**encoded).last_hidden_state).all()
    old = AutoModel.from_pretrained(bert, add_pooling_layer=False)
    assert not torch.equal(model.get_submodule(HIT).weight, old.get_submodule(HIT).weight)


def test_both_diagnoses_and_the_plots_are_there(done: Any) -> None:
    _, folder, result = done
    before, after = (json.loads((folder / s / "diagnose" / "diagnosis.json").read_text()) for s in ("before", "after"))
    first, last = ({d["name"]: d for d in document["layers"]}[HIT] for document in (before, after))
    assert first["flagged"]
    assert last["sigma_max"] < 0.8 * first["sigma_max"]
    assert last["max_abs_activation"] < first["max_abs_activation"]
    plots = folder / "outcome" / "plots"
    files = sorted(str(p.relative_to(plots)) for p in plots.rglob("*.svg"))
    sides = [f"{side}/{name}.svg" for side in ("after", "before") for name in ("pcdr", "sites", "spectra")]
    assert files == sorted(["outcome.svg", "layers.svg", "spectra.svg", *sides])
    for file in files:
        ET.fromstring((plots / file).read_text(encoding="utf-8"))  # noqa: S314 - our own file
    assert HIT in result.stdout
    assert before["forecast"]["sentence"] in result.stdout
    assert str(folder / "condition") in result.stdout


def test_the_figures_are_those_of_the_outputs_on_the_held_out_texts(done: Any) -> None:
    """Cosines of masked means, and a studentized bootstrap, written out again."""
    _, folder, _ = done
    document = json.loads((folder / "outcome" / "outcome.json").read_text())
    assert document["samples"] == {"training": 108, "calibration": 24, "held_out": 12}
    assert document["steps"] == 40
    outputs = {
        (side, p): np.load(folder / side / "quantize" / p / "outputs.npz")["output"].astype(np.float64)
        for side in ("before", "after")
        for p in ("fp32", "w8a8", "w4a4")
    }
    # Five words of known length each: [CLS], 5, [SEP] are real, the eighth token is padding.
    means = {key: x[:, :7].mean(axis=1) for key, x in outputs.items()}
    unit = {key: m / np.linalg.norm(m, axis=1, keepdims=True) for key, m in means.items()}
    reference = unit["before", "fp32"]
    for change in document["changes"]:
        p = change["precision"]
        first, last = (100 * (unit[side, p] * reference).sum(axis=1) for side in ("before", "after"))
        assert change["before"] == pytest.approx(first.mean())
        assert change["after"] == pytest.approx(last.mean())
        gain = last - first
        draws = gain[np.random.default_rng(5).integers(0, 12, (20_000, 12))]
        ratios = (draws.mean(axis=1) - gain.mean()) / (draws.std(axis=1) / np.sqrt(11))
        low, high = gain.mean() - np.quantile(ratios, [0.975, 0.025]) * gain.std(ddof=1) / np.sqrt(12)
        # A mean beyond the most extreme sample was never seen.
        low, high = max(low, gain.min()), min(high, gain.max())
        width = high - low
        assert change["lo"] == pytest.approx(low, abs=0.1 * width)
        assert change["hi"] == pytest.approx(high, abs=0.1 * width)
    assert document["changes"][0]["before"] == pytest.approx(100.0)
    assert [c["precision"] for c in document["changes"]] == ["fp32", "w8a8", "w4a4"]


def test_a_second_time_does_no_work_and_json_is_one_document(done: Any, commands: Commands) -> None:
    arguments, folder, first = done
    result = commands(*arguments, "--json")
    assert result.code == 0, result.stderr
    assert result.done
    assert all(result.done.values())
    assert result.json["checkpoint"] == str(folder / "condition")
    assert result.json["verdict"] in first.stdout
    assert all(Path(path).is_file() for path in [*result.json["plots"], *result.json["diagnoses"]])
    narrowed = commands(*arguments, "--precision", "w4a4")
    assert narrowed.code == 0
    assert "w8a8" not in narrowed.stdout.partition("held-out samples")[2]


def test_a_kill_in_the_middle_of_the_training_changes_nothing(
    commands: Commands, bert: Path, texts: Path, tmp_path: Path
) -> None:
    arguments = ["condition", bert, "--data", texts, *flags("--steps", "100"), "--precision", "fp32"]
    arguments += ["--set", "condition.tau=0.9"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    saved = lambda: list((killed / "training").glob("*.pt"))  # noqa: E731
    result = commands.signalled(signal.SIGKILL, saved, *arguments, "-o", killed)
    assert result.code == -signal.SIGKILL
    assert not (killed / "condition").exists()
    state = torch.load(saved()[0], map_location="cpu", weights_only=True)
    assert 50 <= len(state["losses"]) <= 100
    for folder in (killed, whole):
        again = commands(*arguments, "-o", folder)
        assert again.code == 0, again.stderr
        assert again.done["before/diagnose"] == (folder == killed)
        assert not (folder / "training").exists()
    for name in ("condition/model.safetensors", "condition/conditioning.json", "outcome/outcome.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


# --- images ---------------------------------------------------------------------------------------------------


def test_a_flat_folder_of_images_needs_no_labels(commands: Commands, vit: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    data = pictures(tmp_path / "images", 120)
    (data / "README.txt").write_text("beside the images")
    result = commands("condition", vit, "--data", data, "-o", tmp_path / "out", *flags("--steps", "3", "--json"))
    assert result.code == 0, result.stderr
    assert result.json["samples"] == {"training": 108, "calibration": 24, "held_out": 12}
    assert {c["measure"] for c in result.json["changes"]} == {"top-1 agreement %", "logit cosine x 100"}
    AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "condition")
    kept = json.loads((tmp_path / "out" / "condition" / "preprocessor_config.json").read_text())
    assert kept["image_mean"] == [0.5] * 3


def test_class_folders_are_labels_only_where_they_are_the_models_own(vit: Path, tmp_path: Path) -> None:
    for names, labelled in ((("cat", "dog"), True), (("a", "b", "c"), False), (("dog", "ferret"), False)):
        for splits in ([""], ["train", "test"]):
            data = tmp_path / "-".join([*names, *splits])
            for folder in (data / split / name for split in splits for name in names):
                pictures(folder, 1)
            document = recipe_document(str(vit), str(data), None, 4)
            assert (document["data"]["kind"], document["data"]["labels"]) == ("images", labelled)
            assert document["model"]["task"] == "image-classification"
    assert recipe_document(str(vit), str(data), "embedding", 4)["data"]["labels"] is False


def test_images_that_cannot_be_used_are_named(commands: Commands, vit: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "images", 4)
    (data / "002.png").write_bytes(b"hello")

    def error(model: Path, images: Path) -> str:
        result = commands("condition", model, "--data", images, "-o", tmp_path / "out", *flags("--steps", "2"))
        assert result.code == 2
        assert "Traceback" not in result.stderr
        return " ".join(result.stderr.split())

    assert f"{data / '002.png'}: not a readable image." in error(vit, data)
    (data / "002.png").unlink()
    assert "1 sample(s) are held out, too few to say what conditioning buys." in error(vit, data)
    pictures(data / "inside", 1)
    assert "3 image(s) lie outside of the class folders, the first '000.png'. Expected: CLASS/*" in error(vit, data)
    bare = tmp_path / "bare"
    shutil.copytree(vit, bare)
    (bare / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json, so nothing says how its images are normalized" in error(bare, data)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds nothing that can be read" in error(vit, empty)
    assert "no tokenizer in" in error(vit, Path(__file__).parent.parent / "README.md")


# --- models and numbers ---------------------------------------------------------------------------------------


def spoilt(model: Path, to: Path, change: Any) -> Path:
    shutil.copytree(model, to)
    state = load_file(to / "model.safetensors")
    change(state)
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_no_flagged_layer_is_an_answer(commands: Commands, bert: Path, texts: Path, tmp_path: Path) -> None:
    dead = "encoder.layer.0.intermediate.dense"

    def kill(state: dict[str, torch.Tensor]) -> None:
        state[f"{dead}.weight"] = torch.zeros_like(state[f"{dead}.weight"])

    model = spoilt(bert, tmp_path / "dead", kill)
    arguments = ["condition", model, "--data", texts, "-o", tmp_path / "out", *flags("--steps", "5")]
    result = commands(*arguments, "--set", "condition.tau=1", "--set", "condition.k_max=1")
    assert result.code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "Verdict: S2D bought nothing here, because no layer is flagged: the largest PCDR is 0." in said
    assert "The checkpoint holds the original's weights." in said
    assert "No training step was taken" in said
    behind = "encoder.layer.0.output.dense"  # its input is zero, too
    assert f"Dead in the original, their output is nothing but the bias: {dead}, {behind}." in said
    old, new = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "condition" / "model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert not (tmp_path / "out" / "after").exists()  # one model, looked at once


def test_weights_that_overflow_stop_the_run_and_name_the_layer(
    commands: Commands, bert: Path, texts: Path, tmp_path: Path
) -> None:
    def blow_up(state: dict[str, torch.Tensor]) -> None:
        state["encoder.layer.0.intermediate.dense.weight"].fill_(3e38)

    model = spoilt(bert, tmp_path / "huge", blow_up)
    result = commands("condition", model, "--data", texts, "-o", tmp_path / "out", *flags("--steps", "5"))
    assert result.code == 2
    assert "encoder.layer.0.intermediate.dense" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "condition").exists()


def test_a_loss_that_is_not_finite_leaves_no_checkpoint(
    commands: Commands, bert: Path, texts: Path, tmp_path: Path
) -> None:
    fault = "import s2d_deploy.objectives as o\nreal = o.distillation_loss\n"
    fault += "o.distillation_loss = lambda *a, **k: real(*a, **k) * float('nan')\n"
    arguments = ["condition", bert, "--data", texts, "-o", tmp_path / "out", *flags("--steps", "5")]
    result = commands(*arguments, "--set", "condition.tau=0.9", before=fault)
    assert result.code == 2
    assert "stopped at step 1 of 5: the loss is nan" in result.stderr
    assert not (tmp_path / "out" / "condition").exists()
    assert (tmp_path / "out" / "before" / "diagnose" / "manifest.json").exists()  # the next try goes on from here


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--steps", "-5"), "-5 is not in the range x>=1"),
        (("--set", "condition.learning_rate=-1"), "recipe: key 'condition.learning_rate': input should be greater"),
        (("--set", "condition.learning_rate=50"), "key 'condition.learning_rate': input should be less than or equal"),
        (("--set", "condition.decoupled_factor=1.0e+9"), "key 'condition.decoupled_factor': input should be less"),
        (("--set", "condition.tau=7"), "key 'condition.tau'"),
        (("--set", "condition.stepps=7"), "unknown key 'condition.stepps'"),
        (("--method", "magic"), "key 'condition.method'"),
        (("--objective", "task"), "text has no labels here; use distill"),
        (("--precision", "w9a9"), "unknown precision 'w9a9'"),
        (("--samples", "0"), "0 is not in the range x>=1"),
    ],
)
def test_absurd_numbers_are_refused_before_any_work(
    commands: Commands, bert: Path, texts: Path, tmp_path: Path, more: tuple[str, ...], text: str
) -> None:
    result = commands("condition", bert, "--data", texts, "-o", tmp_path / "out", *more)
    assert result.code == 2
    assert text in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_models_that_are_none(commands: Commands, bert: Path, vit: Path, texts: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(bert, foreign)
    shutil.copy(vit / "model.safetensors", foreign / "model.safetensors")
    cut = tmp_path / "cut"
    shutil.copytree(bert, cut)
    (cut / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:5000])
    for model, text in (
        (foreign, "lacks"),
        (cut, "cannot be loaded"),
        (tmp_path / "none", "no model that can be loaded"),
    ):
        result = commands("condition", model, "--data", texts, "-o", tmp_path / "out", *flags("--steps", "2"))
        assert result.code == 2, result.stderr
        assert text in result.stderr
        assert "Traceback" not in result.stderr
    result = commands("condition", bert, "-o", tmp_path / "out")
    assert f"'{bert}' is a model, not a recipe. Fix: give its data to diagnose or condition: --data PATH." in (
        result.stderr
    )


def test_a_recipe_is_conditioned_as_before_and_flags_override_it(commands: Commands, tmp_path: Path) -> None:
    result = commands("condition", "tiny.yaml", "-o", tmp_path / "out", "--steps", "3", "--method", "control", "--json")
    assert result.code == 0, result.stderr
    assert result.json["stage"] == "condition"
    assert result.json["method"] == "task"
    recipe = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]
    assert (recipe["condition"]["steps"], recipe["condition"]["method"]) == (3, "control")
    assert not (tmp_path / "out" / "outcome").exists()


# --- the sentence ---------------------------------------------------------------------------------------------


def change(precision: str, by: float, lo: float, hi: float, measure: str = "cosine x 100") -> Change:
    return Change(precision, measure, 60.0, 60.0 + by, by, lo, hi, "paired bootstrap")


def layer(*, flagged: bool = True, after: float = 4.0) -> dict[str, Any]:
    return {
        "name": "fc2",
        "flagged_before": flagged,
        "flagged_after": False,
        "k_target": 1,
        "before": {"pcdr": [0.97], "sigma_max": 8.0, "max_abs_activation": 90.0, "kurtosis": 9.0},
        "after": {"pcdr": [0.5], "sigma_max": after, "max_abs_activation": 40.0, "kurtosis": 4.0},
    }


NO: dict[str, Any] = {"helps": False, "reach": 0.02, "shares": {"gain": 1.0}, "sentence": "S2D will not help."}
YES: dict[str, Any] = {"helps": True, "reach": 0.5, "shares": {"triplet": 1.0}, "sentence": "S2D will help."}
FLOAT = change("fp32", -0.4, -0.5, -0.3)
SAME = change("w8a8", 0.001, -0.1, 0.1)


@pytest.mark.parametrize(
    ("changes", "layers", "forecast", "held_out", "said"),
    [
        (
            [FLOAT, SAME, change("w4a4", 2.5, 1.0, 4.0)],
            [layer()],
            YES,
            50,
            "S2D bought +2.50 (+1.00 to +4.00) at W4A4; no difference shows at W8A8: 0.00 (-0.10 to +0.10); the float "
            "model changed by -0.40 (-0.50 to -0.30) (points of cosine x 100; in brackets 95 % intervals, paired, 50 "
            "held-out samples).",
        ),
        (
            [FLOAT, change("w4a4", -2.5, -4.0, -1.0)],
            [layer()],
            NO,
            50,
            "S2D bought nothing here, because the flagged layers make 2% of the 4-bit error at the sites that need "
            "repair; it cost 2.50 (1.00 to 4.00) at W4A4; the float",
        ),
        (
            [FLOAT, change("w4a4", -2.5, -4.0, -1.0)],
            [layer()],
            {**NO, "harm": 0.3, "reach_by_error": 0.33},
            50,
            "because the flagged layers make 2% of the harm that the sites do to the output at 4 bits; it cost",
        ),
        (
            [FLOAT, change("w4a4", 0.5, -1.0, 2.0)],
            [layer(after=7.9)],
            YES,
            50,
            "because the flagged layers were hardly pressed (largest singular value of fc2: 8.00 -> 7.90; give more "
            "--steps), although the forecast said that it will help; no difference shows at W4A4",
        ),
        (
            [change("fp32", -40.0, -50.0, -30.0), change("w4a4", -30.0, -40.0, -20.0)],
            [layer(after=12.0)],
            NO,
            50,
            "the flagged layers were not pressed (largest singular value of fc2: 8.00 -> 12.00)",
        ),
        ([FLOAT, SAME], [layer()], {**NO, "shares": {}}, 50, "S2D bought nothing here; no difference shows at W8A8"),
        (
            [FLOAT, change("w4a4", 0.5, -1.0, 2.0)],
            [layer()],
            {**NO, "shares": {}},
            50,
            "because no quantized site needs repair at 4 bits",
        ),
        (
            [FLOAT, change("w4a4", 2.5, 1.0, 4.0)],
            [layer()],
            YES,
            9,
            "What S2D bought cannot be said from 9 held-out sample(s); 100 samples are the least",
        ),
        (
            [change("fp32", 0, 0, 0), change("w4a4", 0, 0, 0)],
            [layer(flagged=False)],
            NO,
            50,
            "bought nothing here, because no layer is flagged: the largest PCDR is 0.97 (in fc2), below tau = 0.99.",
        ),
    ],
)
def test_the_verdict_says_what_was_measured(
    changes: list[Change], layers: list[dict[str, Any]], forecast: dict[str, Any], held_out: int, said: str
) -> None:
    sentence = verdict("S2D", changes, layers, forecast, 0.99, held_out)
    assert said in sentence
    assert ("bought +" in sentence) == any(c.lo > 0 and held_out >= 10 for c in changes[1:])
    assert ("too much: lower" in sentence) == (changes[0].hi < -5)


def test_one_shot_is_not_told_to_take_steps() -> None:
    subject = SUBJECTS["one-shot"]
    hardly = [change("fp32", -9.0, -10.0, -8.0), change("w4a4", -2.0, -3.0, -1.0)]
    sentence = verdict(subject, hardly, [layer(after=7.9)], NO, 0.9, 50)
    assert sentence.startswith("One-shot conditioning bought nothing here; it cost 2.00 (1.00 to 3.00) at W4A4")
    assert "too much: raise condition.shrink_factor, or leave out shrink and neurons" in sentence
    assert "--steps" not in sentence
    assert "learning_rate" not in sentence
    assert "give more --steps" in verdict("S2D", hardly, [layer(after=7.9)], NO, 0.9, 50)
    same = [change("fp32", 0, 0, 0), change("w4a4", 0, 0, 0)]
    assert verdict(subject, same, [layer(flagged=False)], NO, 0.9, 50) == (
        "One-shot conditioning bought nothing here: every output is as it was. The findings say what it changed."
    )


def test_a_layer_that_something_was_put_around_stays_in_the_table() -> None:
    def looked(name: str, sigma: float, *, flagged: bool) -> dict[str, Any]:
        facts = {"pcdr": [0.97], "sigma_max": sigma, "max_abs_activation": 9.0, "kurtosis": 3.0, "dead": False}
        return {"name": name, "flagged": flagged, "k_target": 1, **facts}

    before = {"layers": [looked("fc1", 8.0, flagged=True), looked("fc2", 2.0, flagged=True)]}
    after = {"layers": [looked("fc1.linear", 4.0, flagged=False), looked("fc2", 1.0, flagged=False)]}
    rows = {row["name"]: row for row in _layers(before, after)}
    assert {name: row["after"]["sigma_max"] for name, row in rows.items()} == {"fc1": 4.0, "fc2": 1.0}
    # Another layer that is really called so does not take its place.
    after["layers"].append(looked("fc2.linear", 77.0, flagged=False))
    assert {row["name"]: row["after"]["sigma_max"] for row in _layers(before, after)} == {"fc1": 4.0, "fc2": 1.0}


def test_where_says_what_transformers_leaves_out() -> None:
    document = {"checkpoint": "out/condition", "diagnoses": ["a", "b"], "results": "out/outcome", "inserted": False}
    assert "Checkpoint: out/condition (transformers: from_pretrained)\n" in where(document)
    text = where({**document, "inserted": True})
    assert "from_pretrained; that is the same float function without the inserted layers, which s2d-deploy puts" in text


def test_only_the_first_measure_is_judged() -> None:
    logits = change("w4a4", 1.0, 0.5, 1.5, "logit cosine x 100")
    top = change("w4a4", -5.0, -20.0, 10.0, "top-1 %")
    sentence = verdict("S2D", [change("fp32", 0, 0, 0, "top-1 %"), top, logits], [layer()], YES, 0.9, 50)
    assert sentence.startswith("S2D bought nothing here")
    assert "(points of top-1;" in sentence
    assert points(-0.001) == points(0.0) == "0.00"
    alone = verdict("S2D", [FLOAT], [layer()], YES, 0.9, 50)
    assert alone.startswith("No quantized precision was asked for; the float model changed by -0.40")


def test_the_statement_holds_both_tables() -> None:
    document = {
        "layers": [layer()],
        "tau": 0.9,
        "flagged": {"before": 1, "after": 0},
        "dead": [],
        "changes": [vars_of(FLOAT), vars_of(change("w4a4", 2.5, 1.0, 4.0))],
        "samples": {"training": 900, "calibration": 128, "held_out": 100},
        "steps": 300,
        "method": "distill+s2d-decoupled",
        "forecast": YES,
        "verdict": "S2D bought it.",
    }
    text = statement(document)
    rows = [re.sub(r"[│\s]+", " ", line).strip() for line in text.splitlines()]
    assert "fc2 k = 1, no more 0.97 -> 0.50 8.00 -> 4.00 90.00 -> 40.00 9.0 -> 4.0" in rows
    assert "w4a4 cosine x 100 60.00 62.50 +2.50 +1.00 to +4.00 paired bootstrap" in rows
    assert "300 steps of distill+s2d-decoupled on 900 samples; ranges from 128 samples; judged on 100 others" in text
    assert text.rstrip().endswith("Verdict: S2D bought it.")


def vars_of(c: Change) -> dict[str, Any]:
    return {name: getattr(c, name) for name in Change.__slots__}
