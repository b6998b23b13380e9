"""What an artifact needs to be used without this project: a manifest of its own, and an example that loads it.

The manifest (``manifest.json``) names files with sizes and SHA-256, inputs and outputs with types and shapes, options,
versions, and what the artifact was made from. The example (``example.py``) imports the runtime and NumPy, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from s2d_deploy import __version__
from s2d_deploy.files import sha256_file, write_json
from s2d_deploy.qgraph import initializers, metadata
from s2d_deploy.session import Artifact

MANIFEST, EXAMPLE = "manifest.json", "example.py"
_OPEN = {"sequence": 16}  # an open dimension of the example, by name; 1 for any other

_ORT = '''"""Loads {file} with onnxruntime and NumPy; s2d-deploy is not needed."""
from pathlib import Path

import numpy as np
import onnxruntime

model = Path(__file__).with_name("{file}")
session = onnxruntime.InferenceSession(str(model), providers={providers})
feeds = {{{feeds}}}
for output, value in zip(session.get_outputs(), session.run(None, feeds)):
    print(output.name, value.shape, value.dtype)
'''
_ONNX = '''"""Computes {file} with onnx and NumPy, by ONNX's reference (slow); s2d-deploy is not needed."""
from pathlib import Path

import numpy as np
from onnx.reference import ReferenceEvaluator

session = ReferenceEvaluator(str(Path(__file__).with_name("{file}")))
feeds = {{{feeds}}}
for name, value in zip(session.output_names, session.run(None, feeds)):
    print(name, value.shape, value.dtype)
'''


def write_manifest(artifact: Artifact, model: onnx.ModelProto, source: Mapping[str, Any]) -> Path:
    """``manifest.json`` beside an artifact.

    Args:
        artifact: as built.
        model: its graph, for inputs, outputs and metadata.
        source: what it was made from.
    """
    path = artifact.folder / MANIFEST
    document = {
        "schema_version": 1,
        "kind": "s2d-deploy artifact",
        "target": artifact.target,
        "precision": artifact.precision,
        "files": [
            {"role": role, "name": name, "size_bytes": (file := artifact.folder / name).stat().st_size,
             "sha256": sha256_file(file)}
            for role, name in sorted(artifact.files.items())
        ],
        "inputs": {value.name: _described(value) for value in _inputs(model)},
        "outputs": {value.name: _described(value) for value in model.graph.output},
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "info": artifact.info,
        "source": {**source, "plan_sha256": metadata(model).get("s2d.plan_sha256")},
        "versions": {"s2d-deploy": __version__, "onnx": onnx.__version__},
    }  # fmt: skip
    write_json(path, document)
    return path


def write_example(path: Path, model: onnx.ModelProto, *, file: str, providers: list[str] | None = None) -> Path:
    """A short script at `path` that runs `file`, which lies beside it.

    Args:
        path: of the script.
        model: the graph of `file`.
        file: name of the ONNX file.
        providers: full names of execution providers, for ONNX Runtime; None: ONNX's own reference.
    """
    feeds = ", ".join(f'"{value.name}": {_filled(value)}' for value in _inputs(model))
    text = _ONNX if providers is None else _ORT
    shown = "[" + ", ".join(f'"{name}"' for name in providers or []) + "]"
    path.write_text(text.format(file=file, feeds=feeds, providers=shown), encoding="utf-8")
    return path


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    stored = initializers(model)
    return [value for value in model.graph.input if value.name not in stored]


def _described(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    return {
        "dtype": TensorProto.DataType.Name(kind.elem_type).lower(),
        "shape": [d.dim_param or d.dim_value for d in kind.shape.dim],
    }


def _filled(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    sizes = [d.dim_value or _OPEN.get(d.dim_param, 1) for d in kind.shape.dim]
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    make = "ones" if dtype.kind == "b" or (dtype.kind in "iu" and "mask" in value.name.lower()) else "zeros"
    return f'np.{make}({tuple(sizes)}, "{dtype.name}")'
