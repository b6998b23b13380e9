"""Plans on disk: what comes back, what is refused, and what a digest means."""

from __future__ import annotations

import json

import pytest
import torch

from s2d_deploy.errors import ArtifactError, PlanError
from s2d_deploy.grid import Grid, PerAxis, PerBlock
from s2d_deploy.plan import Op, Plan, Site, sites_of

OPS = {
    "fc": Op("fc", "linear", 4, 3, 12),
    "attn.scores": Op("attn.scores", "scores", 4, 5, 100),
    "attn.context": Op("attn.context", "context", 5, 4, 100),
    "head": Op("head", "linear", 3, 2, 6),
}


def site(name, op, role, grid, shape=()):
    return Site(name, op, role, grid, torch.full(shape, 0.25), torch.zeros(shape, dtype=torch.int32), "absmax")


def plan():
    p = Plan("w4a8", dict(OPS), info={"samples": 3})
    p.add(site("fc.input", "fc", "input", Grid(8)))
    p.add(site("fc.weight", "fc", "weight", Grid(4, granularity=PerAxis(0)), (3,)))
    p.add(site("attn.query", "attn.scores", "query", Grid(8)))
    p.add(site("attn.key", "attn.scores", "key", Grid(8)))
    p.add(site("head.weight", "head", "weight", Grid(4, granularity=PerBlock(1, 3)), (2, 1)))
    return p


def test_operands_by_kind():
    assert OPS["fc"].sites == (("fc.input", "input"), ("fc.weight", "weight"))
    assert OPS["attn.scores"].sites == (("attn.query", "query"), ("attn.key", "key"))
    assert OPS["attn.context"].sites == (("attn.probs", "probs"), ("attn.value", "value"))


def test_declared_precisions():
    p = plan()
    assert {name: p.declared(name) for name in OPS} == {
        "fc": "W4A8",
        "attn.scores": "W8A8",
        "attn.context": "float",
        "head": "W4A16",
    }


def test_it_comes_back_from_disk(tmp_path):
    p = plan()
    p.save(tmp_path)
    q = Plan.load(tmp_path)
    assert (q.precision, q.ops, q.info, list(q.sites)) == (p.precision, p.ops, p.info, list(p.sites))
    for name, s in p.sites.items():
        t = q.sites[name]
        assert (t.name, t.op, t.role, t.grid, t.source) == (s.name, s.op, s.role, s.grid, s.source)
        assert torch.equal(t.scale, s.scale)
        assert torch.equal(t.zero_point, s.zero_point)
        assert (t.scale.dtype, t.zero_point.dtype) == (torch.float32, torch.int32)
    assert q.digest() == p.digest()


def test_a_plan_without_sites_comes_back(tmp_path):
    Plan("fp32", dict(OPS)).save(tmp_path)
    assert Plan.load(tmp_path).sites == {}


def test_a_view_of_a_tensor_can_be_saved(tmp_path):
    p = Plan("w8a8", dict(OPS))
    base = torch.arange(1.0, 7.0).reshape(3, 2)
    zeros = torch.zeros(3, dtype=torch.int32)
    p.add(Site("fc.weight", "fc", "weight", Grid(8, granularity=PerAxis(0)), base[:, 1], zeros, "mse"))
    p.save(tmp_path)
    assert Plan.load(tmp_path).sites["fc.weight"].scale.tolist() == [2.0, 4.0, 6.0]


def test_the_digest_sees_every_change():
    digests = {plan().digest()}
    for change in (
        lambda p: p.sites["fc.input"].scale.mul_(1.0000001),
        lambda p: p.sites["fc.weight"].zero_point.__setitem__(1, 1),
        lambda p: p.sites.pop("attn.key"),
        lambda p: p.info.update(samples=4),
    ):
        p = plan()
        change(p)
        digests.add(p.digest())
    assert len(digests) == 5
    assert plan().digest() in digests


def test_sites_of_ops_in_order():
    p = plan()
    assert [s.name for s in sites_of(p, OPS.values())] == [
        "fc.input",
        "fc.weight",
        "attn.query",
        "attn.key",
        "head.weight",
    ]
    assert [s.name for s in sites_of(p, [OPS["head"]])] == ["head.weight"]


def test_a_site_twice_or_of_no_op():
    p = plan()
    with pytest.raises(PlanError, match=r"site 'fc.input' is quantized twice\. Found: by absmax\."):
        p.add(site("fc.input", "fc", "input", Grid(8)))
    with pytest.raises(PlanError, match=r"site 'x.input' belongs to no op\. Found: op 'x'\."):
        p.add(site("x.input", "x", "input", Grid(8)))


def _edit(folder, change):
    document = json.loads((folder / "plan.json").read_text())
    change(document)
    (folder / "plan.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: (f / "plan.json").unlink(), "plan.json: no such file"),
        (lambda f: (f / "plan.safetensors").unlink(), "plan.json: not a quantization plan"),
        (lambda f: (f / "plan.json").write_text('{"plan_'), "plan.json: truncated, or not JSON"),
        (lambda f: (f / "plan.json").write_text("[]"), "plan.json: not one of ours. Expected: a JSON object."),
        (lambda f: _edit(f, lambda d: d.update(plan_version=99)), "unknown plan version. Expected: 1. Found: 99."),
        (lambda f: _edit(f, lambda d: d["ops"].pop(0)), "belongs to no op"),
        (lambda f: _edit(f, lambda d: d["sites"][0]["grid"].update(bits=77)), "Grid.bits is out of range"),
        (lambda f: _edit(f, lambda d: d["sites"][0].pop("role")), "plan.json: not a quantization plan"),
        (
            lambda f: (f / "plan.safetensors").write_bytes((f / "plan.safetensors").read_bytes()[:-9]),
            "plan.safetensors: not the tensors that plan.json describes. Expected: sha256 ",
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, text):
    plan().save(tmp_path)
    damage(tmp_path)
    with pytest.raises((ArtifactError, PlanError)) as caught:
        Plan.load(tmp_path)
    assert text in str(caught.value)
