"""One suite for every runtime in the registry: what a target builds and a session computes, shows and admits.

The measure is the simulation for codes and outputs, and `s2d_deploy.integer` for accumulators.

Tolerance of float outputs. A dot product of K terms is off by at most K * eps relative to the sum of magnitudes
(Higham, Accuracy and Stability, section 3.1). Here K <= 64, and about 26 contractions follow each other, with
LayerNorms that keep values near 1: 26 * 64 * 2**-23 = 2e-4. A quantizer in between absorbs such a difference, or flips
a code where the value lies within it of a rounding boundary; then everything after that code differs by whole steps.
So codes come first: outputs are compared where no code flipped, and a flip is accepted only next to a boundary.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from s2d_deploy.errors import ArtifactError, DataError, RuntimeUnavailable, UnsupportedError
from s2d_deploy.integer import integer_conv2d, integer_matmul
from s2d_deploy.qgraph import attributes, contractions, load_model
from s2d_deploy.registry import RUNTIMES, TARGETS, load_runtime, load_target

PRECISIONS = ("fp32", "w8a8", "w4a16", "w4a8", "w4a4")
INTEGER = ("w8a8", "w4a8", "w4a4")
CASES = [("vit", p) for p in PRECISIONS] + [("bert", p) for p in ("fp32", "w8a8", "w4a4")]
TOLERANCE = 26 * 64 * 2.0**-23
# What a target must be told to build these models quickly; any other target is built with its defaults.
OPTIONS = {"tensorrt": {"compute_capabilities": ["8.6"], "batch": [1, 3, 4]}}
DYNAMIC = {
    ("tensorrt", "bert"): {"dimensions": {"sequence": [1, 7, 16]}},
    ("tvm", "bert"): {"shapes": {"sequence": 7}},
}
# Targets that build for one sequence length; they must refuse another one in words.
FIXED_SEQUENCE = {"tvm"}

every_case = pytest.mark.parametrize(("model", "precision"), CASES, ids=[f"{m}-{p}" for m, p in CASES])
every_integer_case = pytest.mark.parametrize(
    ("model", "precision"), [c for c in CASES if c[1] in INTEGER], ids=[f"{m}-{p}" for m, p in CASES if p in INTEGER]
)


@pytest.fixture(scope="session", params=sorted(RUNTIMES))
def runtime(request):
    return load_runtime(request.param)


@pytest.fixture(scope="session")
def artifact(exported, tmp_path_factory):
    """``artifact(runtime, model, precision)``, built once; skips where the compiler is not installed."""

    @cache
    def build(name, model, precision):
        folder = tmp_path_factory.mktemp(f"{name}-{model}-{precision}")
        target = load_target(name)
        said = []
        try:
            dialect = target.dialect(exported(model, precision).path, folder / "dialect", precision=precision)
            options = OPTIONS.get(name, {}) | DYNAMIC.get((name, model), {})
            return target.build(dialect, folder / "built", precision=precision, options=options, progress=said.append)
        except (RuntimeUnavailable, UnsupportedError) as error:
            return error

    def get(runtime, model, precision):
        result = build(runtime.name, model, precision)
        if isinstance(result, RuntimeUnavailable):
            # A compiler that is missing is a reason to skip; one that is there and refuses is a fault.
            if runtime.available() is None and shutil.which("c++"):
                raise result
            pytest.skip(str(result))
        if isinstance(result, UnsupportedError):
            assert runtime.rung(precision) is None, f"rung says {runtime.rung(precision)!r}, but: {result}"
            pytest.skip(str(result))
        return result

    return get


@pytest.fixture(scope="session")
def session(artifact):
    """``session(runtime, model, precision)``, opened once; skips where the runtime cannot run here."""
    opened = {}

    def get(runtime, model, precision):
        reason = runtime.available()
        if reason is not None:
            pytest.skip(reason)
        key = runtime.name, model, precision
        if key not in opened:
            context = runtime.open(artifact(*(runtime, *key[1:])), threads=1)
            opened[key] = context, context.__enter__()
        return opened[key][1]

    yield get
    for context, _ in opened.values():
        context.__exit__(None, None, None)


def tolerance(expected):
    return TOLERANCE * max(1.0, float(np.abs(expected).max()))


def flips(expected, found):
    """Sites with differing codes, in execution order."""
    return [site for site in expected if not np.array_equal(expected[site], found[site].astype(np.int32))]


def differing(expected, found):
    return sum(int(np.sum(expected[s] != found[s].astype(np.int32))) for s in expected)


# ---- what a runtime says about itself


def test_a_runtime_and_a_target_stand_under_every_name():
    assert set(RUNTIMES) == set(TARGETS)


def test_it_says_what_it_is(runtime):
    assert runtime.name in RUNTIMES
    assert load_target(runtime.name).name == runtime.name
    reason = runtime.available()
    assert reason is None or len(reason) > 10
    assert isinstance(runtime.version(), str)
    assert reason is not None or runtime.version()
    assert isinstance(runtime.device(), str)
    for precision in PRECISIONS:
        assert runtime.rung(precision) in ("native", "emulated", "weight-only", "dequantized", "float", None)
    assert runtime.rung("fp32") == "float"


# ---- what a target builds


@every_case
def test_an_artifact_describes_itself(runtime, artifact, model, precision):
    built = artifact(runtime, model, precision)
    assert (built.target, built.precision) == (runtime.name, precision)
    for name in built.files.values():
        assert Path(name).name == name
        assert (built.folder / name).is_file()
    assert built.size_bytes == sum((built.folder / name).stat().st_size for name in set(built.files.values())) > 0


# ---- what a session computes


@every_case
def test_codes_and_outputs_are_the_simulation_s(runtime, session, exported, model, precision):
    s, x = session(runtime, model, precision), exported(model, precision)
    codes = s.codes(x.feeds)
    flipped = []
    if codes or not x.codes:
        assert set(codes) == set(x.codes)
        for site, found in codes.items():
            assert found.dtype.name in ("int8", "uint8")
            assert found.shape == x.codes[site].shape
        flipped = flips(x.codes, codes)
    if flipped:
        first = flipped[0]
        changed = codes[first].astype(np.int32) != x.codes[first]
        distance = np.abs(np.abs(x.scaled[first] - np.trunc(x.scaled[first])) - 0.5)[changed]
        scale = float(x.plan.sites[first].scale)
        assert np.abs(codes[first].astype(np.int32) - x.codes[first]).max() == 1, f"{first}: not a flip but a fault"
        magnitude = max(1.0, float(np.abs(x.scaled[first]).max()) * scale)
        assert distance.max() <= TOLERANCE * magnitude / scale, f"{first}: flipped away from a boundary"
        assert differing(x.codes, codes) < 0.01 * sum(c.size for c in x.codes.values())
    outputs = s.run(x.feeds)
    assert set(outputs) == set(x.outputs)
    for name, expected in x.outputs.items():
        assert outputs[name].dtype == np.float32
        assert outputs[name].shape == expected.shape
        if not flipped:
            np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=tolerance(expected))


@every_integer_case
def test_accumulators_are_exact(runtime, session, exported, model, precision):
    s, x = session(runtime, model, precision), exported(model, precision)
    operations = [c for c in contractions(load_model(x.path)) if c.integer]
    assert {c.name for c in operations} == set(x.plan.ops)
    rng = np.random.default_rng(0)
    for c in operations:
        real = [x.codes[_site(x, c, i)].astype(o.zero_point.dtype) for i, o in _activations(c)]
        # The ends of the grid only: sums as large as they get, where kernels that saturate pairs of them are caught.
        grids = [x.plan.sites[_site(x, c, i)].grid for i, _ in _activations(c)]
        ends = [rng.choice([g.qmin, g.qmax], size=r.shape).astype(r.dtype) for g, r in zip(grids, real, strict=True)]
        for operands in (real, ends):
            found = s.accumulate(c.name, *operands)
            expected = _exact(c, operands)
            assert found.dtype == np.int32, c.name
            assert found.shape == expected.shape, c.name
            assert int(np.sum(found != expected)) == 0, c.name


def _activations(c):
    return [(i, o) for i, o in enumerate((c.left, c.right)) if o.stored is None]


def _site(x, c, i):
    return x.plan.ops[c.name].sites[i][0]


def _exact(c, operands):
    lhs, rhs = operands if len(operands) == 2 else (operands[0], c.right.stored)
    if c.node.op_type == "MatMul":
        return integer_matmul(lhs, rhs, c.left.zero_point, c.right.zero_point)
    a = attributes(c.node)
    return integer_conv2d(
        lhs,
        rhs,
        c.left.zero_point,
        c.right.zero_point,
        stride=a.get("strides", (1, 1)),
        padding=a.get("pads", (0, 0, 0, 0)),
        dilation=a.get("dilations", (1, 1)),
        groups=a.get("group", 1),
    )


@pytest.mark.parametrize("precision", ["fp32", "w4a16"])
def test_a_float_op_has_no_accumulator(runtime, session, exported, precision):
    s, x = session(runtime, "vit", precision), exported("vit", precision)
    op = next(o for o in x.plan.ops.values() if o.kind == "linear")
    with pytest.raises(UnsupportedError, match=op.name):
        s.accumulate(op.name, np.zeros((1, 17, op.k), np.int8))


@every_case
def test_the_same_feeds_give_the_same_bits(runtime, session, exported, model, precision):
    s, x = session(runtime, model, precision), exported(model, precision)
    first, second = s.run(x.feeds), s.run(x.feeds)
    for name in first:
        assert first[name].tobytes() == second[name].tobytes()


@every_case
def test_a_sample_does_not_depend_on_its_batch(runtime, session, exported, model, precision):
    s, x = session(runtime, model, precision), exported(model, precision)
    whole, codes = s.run(x.feeds), s.codes(x.feeds)
    for i in range(3):
        row = {n: a[i : i + 1] for n, a in x.feeds.items()}
        alone = s.run(row)
        own = s.codes(row)
        assert set(own) == set(codes)
        # Another batch may take another kernel, whose sums differ in the last bit and may flip a code.
        flipped = sum(int(np.sum(own[site] != codes[site][i : i + 1])) for site in own)
        assert flipped < max(1, 0.01 * sum(c.size for c in own.values()))
        for name, value in alone.items():
            assert value.shape == (1, *whole[name].shape[1:])
            if not flipped:
                np.testing.assert_allclose(value, whole[name][i : i + 1], rtol=0, atol=tolerance(whole[name]))


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_the_sequence_may_be_shorter(runtime, session, exported, precision):
    s, x = session(runtime, "bert", precision), exported("bert", precision)
    feeds = {n: a[:2, :5].copy() for n, a in x.feeds.items()}
    if runtime.name in FIXED_SEQUENCE:
        with pytest.raises(DataError, match=r"input_ids.*Expected: .*7.*Found: .*5"):
            s.run(feeds)
        return
    found, expected = s.run(feeds), x.simulate(feeds)
    for name in expected:
        assert found[name].shape == expected[name].shape
        if precision == "fp32":
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance(expected[name]))
        else:  # a code may flip: the step of a W8A8 network of this size is below 1 % of its outputs' spread
            assert np.sqrt(np.mean((found[name] - expected[name]) ** 2)) < 0.01 * expected[name].std()


# ---- what a session admits


@every_case
def test_the_audit_covers_the_plan_and_sums_to_one(runtime, session, exported, model, precision):
    s, x = session(runtime, model, precision), exported(model, precision)
    audit = s.audit()
    assert sorted(op.name for op in audit.ops) == sorted(x.plan.ops)
    for op in audit.ops:
        assert op.macs == x.plan.ops[op.name].macs > 0
        assert op.declared == x.plan.declared(op.name)
        assert op.kernel
    assert sum(audit.executed.values()) == pytest.approx(1.0, abs=1e-9)
    assert audit.evidence
    assert audit.rung == runtime.rung(precision)
    if precision == "fp32":
        assert set(audit.executed) == {"float32"}


@every_integer_case
def test_what_is_declared_is_executed(runtime, session, exported, model, precision):
    audit = session(runtime, model, precision).audit()
    assert [op.name for op in audit.mismatches()] == []
    assert audit.rung in ("native", "emulated")


# ---- what it refuses


def _bad_feeds(feeds):
    name = next(iter(feeds))
    array = feeds[name]
    other = np.float64 if array.dtype.kind == "f" else np.int32
    yield "missing", {n: a for n, a in feeds.items() if n != name}, name
    yield "unknown", {**feeds, "surplus": array}, "surplus"
    yield "dtype", {**feeds, name: array.astype(other)}, name
    yield "rank", {**feeds, name: array[0]}, name
    if array.ndim == 4:
        yield "shape", {**feeds, name: np.zeros((3, 1, 9, 8), array.dtype)}, name


@pytest.mark.parametrize("method", ["run", "codes"])
@pytest.mark.parametrize("model", ["vit", "bert"])
def test_wrong_feeds_are_named(runtime, session, exported, model, method):
    s, x = session(runtime, model, "w8a8"), exported(model, "w8a8")
    if method == "codes" and not s.codes(x.feeds):
        pytest.skip(f"{runtime.name} shows no codes")
    for kind, feeds, text in _bad_feeds(x.feeds):
        with pytest.raises(DataError) as caught:
            getattr(s, method)(feeds)
        assert text in str(caught.value), kind
        assert "Expected:" in str(caught.value), kind
        assert "Found:" in str(caught.value), kind


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "missing"])
def test_a_damaged_artifact_is_refused(runtime, artifact, tmp_path, damage):
    reason = runtime.available()
    if reason is not None:
        pytest.skip(reason)
    built = artifact(runtime, "vit", "w8a8")
    for role, name in built.files.items():
        folder = tmp_path / role
        shutil.copytree(built.folder, folder)
        path = folder / name
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(
                {"truncated": whole[: len(whole) // 2], "foreign": b"not an artifact\n" * 99, "empty": b""}[damage]
            )
        with pytest.raises(ArtifactError) as caught, runtime.open(replace(built, folder=folder), threads=1):
            pass
        assert name in str(caught.value), role


def test_a_closed_session_says_so(runtime, artifact, exported):
    reason = runtime.available()
    if reason is not None:
        pytest.skip(reason)
    feeds = exported("vit", "w8a8").feeds
    with runtime.open(artifact(runtime, "vit", "w8a8"), threads=1) as s:
        s.run(feeds)
    s.close()  # closing twice is no error
    with pytest.raises(ArtifactError, match="closed"):
        s.run(feeds)
