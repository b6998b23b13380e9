"""Networks that TensorRT really refuses, and what the user is told: node, layer, reason, recipe line."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from s2d_deploy import load_target
from s2d_deploy.errors import ArtifactError, RecipeError, UnsupportedError

dialect = import_module("s2d_deploy.export._trt_dialect")
files = import_module("s2d_deploy.export._trt_files")
options = import_module("s2d_deploy.export._trt_options")
package = import_module("s2d_deploy.runtimes._trt_package")
refusals = import_module("s2d_deploy.export._trt_refusals")
TARGET = load_target("tensorrt")
needs_tensorrt = pytest.mark.skipif(not package.installed(), reason=f"TensorRT is not installed ({package.INSTALL})")
K = 64

Nodes = tuple[list[onnx.NodeProto], dict[str, np.ndarray]]


def network(tail: Callable[[str], Nodes] | None = None, opset: int = 21, axis: int = 1) -> onnx.ModelProto:
    """x [batch, 16, K] -> W8A8 product `fc` -> whatever `tail` makes of its output."""
    stored = {
        "fc.input.scale": np.float32(0.05),
        "fc.weight.codes": np.ones((K, K), np.int8),
        "fc.weight.scale": np.full(K, 0.1, np.float32),
        "fc.weight.zero": np.zeros(K, np.int8),
        "zero": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "fc.input.scale", "zero"], ["codes"], name="fc.input.quantize"),
        helper.make_node(
            "DequantizeLinear", ["codes", "fc.input.scale", "zero"], ["values"], name="fc.input.dequantize"
        ),
        helper.make_node(
            "DequantizeLinear",
            ["fc.weight.codes", "fc.weight.scale", "fc.weight.zero"],
            ["weight"],
            name="fc.weight.dequantize",
            axis=axis,
        ),
        helper.make_node("MatMul", ["values", "weight"], ["y"], name="fc"),
    ]
    for key, value in (("s2d.op", "fc"), ("s2d.declared", "W8A8"), ("s2d.macs", "65536")):
        nodes[-1].metadata_props.add(key=key, value=value)
    output = "y"
    if tail is not None:
        more, constants = tail("y")
        nodes += more
        stored |= constants
        output = more[-1].output[0]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16, K])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, None, None])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model.metadata_props.add(key="s2d.precision", value="w8a8")
    return model


def refused(folder: Path, model: onnx.ModelProto, **chosen: object) -> str:
    onnx.save_model(model, folder / "network.onnx")
    with pytest.raises((UnsupportedError, RecipeError)) as caught:
        TARGET.build(
            folder / "network.onnx",
            folder / "out",
            precision="w8a8",
            options={"compute_capabilities": ["8.6"], **chosen},
            progress=lambda _: None,
        )
    return str(caught.value)


def operator(kind: str, *shape: int, **attributes: object) -> Callable[[str], Nodes]:
    """`kind` behind the product, with a constant of ones of `shape` where one is given."""

    def tail(value: str) -> Nodes:
        constants = {"constant": np.ones(shape, np.float32)} if shape else {}
        return [helper.make_node(kind, [value, *constants], ["z"], name="tail.node", **attributes)], constants

    return tail


def reshape(*sizes: int) -> Callable[[str], Nodes]:
    def tail(value: str) -> Nodes:
        return [helper.make_node("Reshape", [value, "sizes"], ["z"], name="tail.node")], {"sizes": np.array(sizes)}

    return tail


@needs_tensorrt
@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (operator("Det"), "ONNX node 'tail.node' (Det), layer 'fc': TensorRT has no operator Det."),
        (operator("NonZero"), "ONNX node 'tail.node' (NonZero), layer 'fc': TensorRT has no operator NonZero."),
        (
            operator("MatMul", 5, 4),
            "(MatMul), layer 'fc': tail.node: last dimension of input0 = 64 and second to last dimension of input1 = 5 "
            "but must match. Fix: change the model's code around 'fc', keep the layer float with "
            "quantize.overrides: {'fc': fp32}",
        ),
        (
            operator("Conv", 4, 2, 3),
            "ONNX node 'tail.node' (Conv), layer 'fc': Kernel weight dimension failed to broadcast to input.",
        ),
        (operator("Cast", to=TensorProto.STRING), "(Cast), layer 'fc': Unsupported data type for the Cast operator."),
        (
            reshape(2, 16, K),
            "TensorRT's builder refuses ONNX node 'tail.node' (Reshape), layer 'fc'. Found: kOPT values for profile 0 "
            "violate shape constraints: IShuffleLayer tail.node: reshaping failed for tensor: y reshape would change "
            "volume 8192 to 2048. Fix: the model fixes a size that the profile changes",
        ),
    ],
    ids=["operator", "plugin", "shapes", "kernel", "type", "fixed batch"],
)
def test_a_refused_network_names_node_layer_reason_and_remedy(tmp_path: Path, tail: object, words: str) -> None:
    text = refused(tmp_path, network(tail))
    assert words in text
    assert "/_src/" not in text
    assert "Error Code" not in text


@needs_tensorrt
def test_too_little_workspace_says_which_option(tmp_path: Path) -> None:
    model = network(operator("MatMul", 64, 1 << 14))
    text = refused(tmp_path, model, workspace_mb=1, batch=[1, 512, 4096])
    assert "Fix: raise targets[tensorrt].options.workspace_mb, or leave it out." in text


@needs_tensorrt
@pytest.mark.parametrize("kind", ["missing", "text", "library"])
def test_a_plugin_that_does_not_load_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "plugin.so"
    words = {"missing": "no such file", "text": "file too short", "library": "it registers no plugin"}[kind]
    if kind == "text":
        path.write_text("x")
    if kind == "library":
        import _ctypes

        path = Path(_ctypes.__file__)
    text = refused(tmp_path, network(), plugins=[str(path)])
    assert f"targets[tensorrt].options.plugins: {path} does not load." in text
    assert words in text


@pytest.mark.parametrize("opset", [20, 25])
def test_another_opset_is_refused(tmp_path: Path, opset: int) -> None:
    with pytest.raises(ArtifactError, match=rf"opset {opset}\. Expected: 21 to 24"):
        files.require_opset(network(opset=opset), tmp_path / "network.onnx")


def test_scales_along_the_sum_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"fc\.weight\.dequantize: scales along axis 0 of fc's weight, which is"):
        dialect.to_dialect(network(axis=0))


def test_options_for_paths_are_checked() -> None:
    with pytest.raises(RecipeError) as caught:
        options.Options.parse({"plugins": "one.so", "timing_cache": 3, "compute": "fp8", "attention": True})
    for key in ("plugins: bad value. Expected: a list of paths", "timing_cache: bad value", "compute", "attention"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (kMIN is odd. In check at /_src/b.cpp:12)",
            "kMIN is odd",
        ),
        ('convert(a, &b) && "Unsupported thing!"', "Unsupported thing"),
        ("Assertion failed: (a == b): Sizes differ.", "Sizes differ"),
        ("", "no reason given"),
    ],
)
def test_what_is_kept_of_tensorrts_words(text: str, reason: str) -> None:
    assert refusals.reason_of(text) == reason


def test_a_short_name_is_not_found_inside_another_word() -> None:
    model = network()
    model.graph.node[-1].name = "k"
    assert refusals.mentioned(model, "kOPT values violate k") is None
    assert refusals.mentioned(model, "at fc.input.quantize: no").name == "fc.input.quantize"
    assert refusals.mentioned(model, "IMatrixMultiplyLayer k: no").name == "k"
