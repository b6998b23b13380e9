"""Costs of single ops: cut out, measured on a runtime, written, and solved for; and files that must be refused."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from onnx.reference import ReferenceEvaluator

sys.path.insert(0, str(Path(__file__).parent))
from command_line import TINY
from planted import vit

from s2d_deploy.cli import main
from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError
from s2d_deploy.one_op import one_op, signature
from s2d_deploy.op_costs import operand_shapes
from s2d_deploy.plan import Plan
from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.registry import load_exporter
from s2d_deploy.simulation import simulate

IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
OUTPUT = "last_hidden_state"


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("precision", ["fp32", "w4a4", "w6a6", "w4a16"])
def test_an_op_alone_computes_what_its_layer_does(precision: str, granularity: str, tmp_path: Path):
    model = vit(layers=1)
    ops = discover(model, IMAGES, OUTPUT)
    config = QuantizeConfig(activation_granularity=granularity, block_size=16)
    context = Context(lambda: [IMAGES], OUTPUT, config)
    done = run_passes(model, ops, precision, parse_steps([]), context)
    proto = load_exporter()(done.model, done.plan, IMAGES, [OUTPUT], tmp_path / "m.onnx", dynamic={})
    shapes = operand_shapes(done.model, ops, IMAGES)
    simulated = simulate(done.model, done.plan).eval()
    generator = np.random.default_rng(0)
    for name, op in ops.items():
        part = one_op(proto, name, shapes[name])
        feeds = {
            n: generator.standard_normal(s).astype(np.float32)
            for n, s in zip(("left", "right"), shapes[name], strict=False)
        }
        assert [i.name for i in part.graph.input] == list(feeds)
        found = ReferenceEvaluator(part).run(None, feeds)[0]
        if op.kind in ("linear", "conv"):
            with torch.no_grad():
                wanted = simulated.get_submodule(name)(torch.from_numpy(feeds["left"])).numpy()
            assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
        else:
            assert found.shape == (*shapes[name][0][:-1], shapes[name][1][-1])
    same = [signature(one_op(proto, f"layers.0.attention.{p}_proj", shapes["layers.0.attention.q_proj"])) for p in "qk"]
    assert same[0] == same[1]
    assert same[0] != signature(one_op(proto, "layers.0.mlp.fc1", shapes["layers.0.mlp.fc1"]))


def test_an_op_that_is_not_there(tmp_path: Path):
    model = vit(layers=1)
    plan = Plan("fp32", discover(model, IMAGES, OUTPUT))
    proto = load_exporter()(model, plan, IMAGES, [OUTPUT], tmp_path / "m.onnx", dynamic={})
    with pytest.raises(ModelError, match=r"op 'no.such' is not in the exported graph"):
        one_op(proto, "no.such", [(1, 2)])


def recipe(path: Path, **quantize) -> Path:
    document = copy.deepcopy(TINY)
    document["model"]["config"]["num_hidden_layers"] = quantize.pop("layers", 1)
    document["train"], document["condition"] = {"epochs": 1}, {"method": "none"}
    document["targets"] = ["ort"]
    document["quantize"] = {"precisions": ["w8a8", "w4a4"], "error_samples": 0} | quantize
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("costs")
    plain = recipe(folder / "plain.yaml")
    costs = folder / "costs.json"
    assert main(["bench", str(plain), "-o", str(folder / "run"), "--per-op", str(costs), "-q"]) == 0
    return costs


def test_what_is_written(measured: Path):
    document = json.loads(measured.read_text())
    assert (document["target"], document["unit"], document["batch"], document["threads"]) == ("ort", "ms", 1, 1)
    assert document["host"]["cpu"]
    assert "classifier" in document["costs"]
    for op, row in document["costs"].items():
        assert set(row) == {"fp32", "w8a8", "w4a4"}, op
        assert all(0 < ms < 1000 for ms in row.values())
    for row in document["measured"]:
        assert row["executed"] == ("float32" if row["precision"] == "fp32" else "int8"), row
        assert row["count"] >= 1  # a busy machine has no time for more
        assert row["spread"] >= 0
        for op in row["ops"]:
            assert document["costs"][op][row["precision"]] == row["median_ms"]
    attention = "vit.layers.0.attention"
    together = next(row["ops"] for row in document["measured"] if f"{attention}.q_proj" in row["ops"])
    assert together == [f"{attention}.{p}_proj" for p in "qkvo"]  # one shape is measured once


def quantized(folder: Path, measured: Path, **options) -> int:
    mixed = {"candidates": ["w8a8", "w4a4", "fp32"], "costs": str(measured), "samples": 2} | options
    path = recipe(folder / "mixed.yaml", precisions=["w8a8"], passes=[{"mixed": mixed}])
    return main(["quantize", str(path), "-o", str(folder / "run"), "-q", "--update"])


def test_the_budget_is_solved_in_milliseconds(measured: Path, tmp_path: Path):
    costs = json.loads(measured.read_text())["costs"]
    cheapest, dearest = (sum(pick(row.values()) for row in costs.values()) for pick in (min, max))
    budget = (cheapest + dearest) / 2
    assert quantized(tmp_path, measured, budget=budget, costs_target="ort") == 0
    told = Plan.load(tmp_path / "run" / "quantize" / "w8a8").info["mixed"]
    assert told["unit"] == "ms"
    assert (told["costs"]["target"], told["costs"]["threads"]) == ("ort", 1)
    assert told["used"] == pytest.approx(sum(costs[op][p] for op, p in told["assignment"].items()))
    assert told["used"] <= budget * (1 + 1e-9)
    errors = {(r["op"], r["precision"]): r["error"] for r in told["sensitivity"] if r["part"] == "both"}
    for op, chosen in told["assignment"].items():  # no op could change to a better precision within the budget
        for other, cost in costs[op].items():
            if errors.get((op, other), 0.0) < errors.get((op, chosen), 0.0):
                assert told["used"] - costs[op][chosen] + cost > budget, (op, chosen, other)

    # Other figures in the same file are another stage, not a finished one.
    changed = json.loads(measured.read_text())
    for row in changed["costs"].values():
        row |= {"w8a8": 1.0, "w4a4": 1.0, "fp32": 0.0}
    other = tmp_path / "costs.json"
    other.write_text(json.dumps(changed))
    assert quantized(tmp_path, other, budget=0.5) == 0
    other.write_text(json.dumps(json.loads(measured.read_text())))
    assert quantized(tmp_path, other, budget=budget) == 0
    again = Plan.load(tmp_path / "run" / "quantize" / "w8a8").info["mixed"]
    assert again["assignment"] == told["assignment"]


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"model": "0" * 64}, {}, r"costs of another model\..*Expected: \w+.*Found: 0000"),
        ({"target": "tvm"}, {"costs_target": "ort"}, r"costs of another target\. Expected: ort\. Found: tvm\."),
        ({"cpu": "Z80"}, {}, r"costs of another cpu\..*Found: Z80\..*mixed.other_host: true"),
        ({"version": 9}, {}, r"costs of another version"),
        ({"costs": {}}, {}, r"no cost for .* at w8a8.*and \d+ more.*s2d-deploy bench RECIPE --per-op"),
        ({"kind": "else"}, {"costs_target": "ort"}, r"not a costs file"),
        ({"host": None}, {}, r"not a costs file\. Expected: JSON .*bench RECIPE --per-op FILE"),
    ],
)
def test_a_file_of_something_else_is_refused(measured, change, options, words, tmp_path: Path, capsys):
    document = json.loads(measured.read_text())
    cpu = change.get("cpu")
    document = document | {k: v for k, v in change.items() if k != "cpu"}
    if cpu:
        document["host"]["cpu"] = cpu
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(document))
    assert quantized(tmp_path, path, budget=1.0, **options) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(words, error), error
    if cpu:
        assert quantized(tmp_path, path, budget=100.0, other_host=True) == 0


def test_a_costs_file_of_a_smaller_model_is_refused(measured: Path, tmp_path: Path, capsys):
    mixed = {"candidates": ["w8a8", "w4a4"], "costs": str(measured), "budget": 1.0}
    path = recipe(tmp_path / "mixed.yaml", layers=2, precisions=["w8a8"], passes=[{"mixed": mixed}])
    assert main(["quantize", str(path), "-o", str(tmp_path / "run"), "-q"]) == 2
    assert "costs of another model" in capsys.readouterr().err


def test_the_flag_says_what_it_needs(tmp_path: Path, capsys):
    path = recipe(tmp_path / "plain.yaml")
    arguments = ["bench", str(path), "-o", str(tmp_path / "run"), "-q", "--per-op"]
    assert main([*arguments, str(tmp_path / "none" / "costs.json")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "c.json"), "--target", "ort", "--target", "reference"]) == 2
    assert "--per-op measures one target. Found: ort, reference" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "c.json"), "--target", "reference"]) != 0
    assert "latency is not measured on the target 'reference'" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()
