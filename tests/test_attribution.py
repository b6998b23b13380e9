"""Planted causes are found; shares equal what a changed copy of the model gives; harmless sites stay harmless."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from s2d_deploy.attribution import HARMLESS, NORMAL_BULK, NORMAL_ERROR, SiteAttribution, Without, attribute, forecast
from s2d_deploy.diagnose import diagnose_model
from s2d_deploy.discovery import discover
from s2d_deploy.errors import DataError
from s2d_deploy.grid import Grid
from s2d_deploy.observers import Histogram, activation_parameters
from s2d_deploy.spectral import top_triplets, weight_matrix

sys.path.insert(0, str(Path(__file__).parent))
import planted

FC1, FC2 = "layers.1.mlp.fc1", "layers.1.mlp.fc2"
VALUE = "layers.1.attention.v_proj"


def sites(
    model: nn.Module, batches: list[dict[str, Tensor]], k_target: dict[str, int] | None = None, k_max: int = 3
) -> dict[str, SiteAttribution]:
    ops = discover(model, batches[0], "last_hidden_state")
    return {s.site: s for s in attribute(model, ops, batches, k_target=k_target or {}, k_max=k_max)}


def largest_input(model: nn.Module, name: str, batches: list[dict[str, Tensor]]) -> float:
    return max(float(planted.captured_input(model, name, b).abs().max()) for b in batches)


def without(model: nn.Module, layer: str, k: int) -> nn.Module:
    """A copy without the layer's k leading triplets."""
    other = copy.deepcopy(model)
    weight = other.get_submodule(layer).weight
    with torch.no_grad():
        weight -= top_triplets(weight_matrix(other.get_submodule(layer)), k).product()
    return other


def test_a_planted_gain_is_named() -> None:
    model, batches = planted.vit(), planted.images()
    norm = model.get_submodule("layers.1.layernorm_after")
    with torch.no_grad():
        norm.weight[5] = 40.0
    site = sites(model, batches)[f"{FC1}.input"]
    assert site.verdict == "gain"
    assert site.gain is not None
    assert site.gain.share > 0.8
    assert site.channels[0].index == 5
    assert site.channels[0].gain == pytest.approx(40.0)
    assert site.error > HARMLESS


def test_a_planted_neuron_is_named() -> None:
    model, batches = planted.bert(), planted.texts()
    with torch.no_grad():
        model.get_submodule("encoder.layer.1.intermediate.dense").weight[7] *= 60
    site = sites(model, batches)["encoder.layer.1.output.dense.input"]
    assert site.verdict == "neuron"
    assert site.single is not None
    assert site.single.share > 0.6
    assert site.channels[0].index == 7
    assert site.channels[0].row_norm is not None
    assert site.channels[0].row_norm > 20


def test_a_planted_triplet_is_named_and_s2d_reaches_it_where_it_flags() -> None:
    model = planted.bert()
    name = "encoder.layer.0.attention.self.value"
    with torch.no_grad():
        model.get_submodule("embeddings.position_embeddings").weight.zero_()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 12, (8, 10), generator=generator)
    ids[0, 4] = 63  # one rare token
    batches = [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}]
    tokens = planted.captured_input(model, name, batches[0]).reshape(-1, planted.WIDTH)
    # A direction that the rare token alone has: its outputs are outliers, and one triplet makes them.
    others = torch.cat([tokens[:4], tokens[5:], planted.captured_input(model, name, batches[1]).flatten(0, 1)])
    rare = tokens[4] - others.T @ torch.linalg.lstsq(others.T, tokens[4:5].T, driver="gelsd").solution.flatten()
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    planted.rank_one(layer, rare, 40.0)
    site = sites(model, batches, {name: 1})["encoder.layer.0.attention.self.value"]
    assert site.verdict == "triplet"
    assert site.reach > 0.8
    assert site.flagged is not None
    assert site.flagged.range < 0.5
    # Not flagged: the same cause, but S2D does not reach it.
    assert sites(model, batches)["encoder.layer.0.attention.self.value"].reach == 0.0


@pytest.mark.parametrize("k", [1, 2])
def test_ranges_without_triplets_equal_those_of_a_changed_model(k: int) -> None:
    model, batches = planted.vit(), planted.images()
    found = sites(model, batches, k_max=k)
    # A Linear directly, one behind a GELU, and attention's context: each changes by its own producer alone.
    for layer, site, reader in [
        (FC1, f"{FC2}.input", FC2),
        (VALUE, "layers.1.attention.o_proj.input", "layers.1.attention.o_proj"),
    ]:
        expected = largest_input(without(model, layer, k), reader, batches) / largest_input(model, reader, batches)
        measured = found[site].triplets
        assert measured is not None
        assert measured.range == pytest.approx(expected, rel=1e-4)


def test_a_norm_sees_its_stream_without_the_triplets() -> None:
    model, batches = planted.bert(layers=1), planted.texts()
    layer, reader = "encoder.layer.0.attention.output.dense", "encoder.layer.0.intermediate.dense"
    expected = largest_input(without(model, layer, 3), reader, batches) / largest_input(model, reader, batches)
    measured = sites(model, batches)[f"{reader}.input"].triplets
    assert measured is not None
    assert measured.range == pytest.approx(expected, rel=1e-4)


def test_error_against_an_explicit_search() -> None:
    model, batches = planted.bert(), planted.texts()
    name = "encoder.layer.0.output.dense"
    x = torch.cat([planted.captured_input(model, name, b).reshape(-1, planted.HIDDEN) for b in batches])
    histogram = Histogram()
    histogram.update(x)
    scale = float(activation_parameters(histogram, Grid(4), "mse")[0])
    noise = float((torch.round(x / scale).clamp(-8, 7) * scale - x).square().mean())
    deviation = (x - x.mean(0)).abs().flatten().sort().values
    bulk = float(deviation[: int(0.95 * len(deviation))].square().mean()) / NORMAL_BULK
    assert sites(model, batches)[f"{name}.input"].error == pytest.approx(noise / bulk, rel=0.02)


def test_the_bulk_of_a_normal_distribution_is_its_variance() -> None:
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).abs().sort().values
    assert float(x[: int(0.95 * len(x))].square().mean()) / NORMAL_BULK == pytest.approx(1.0, abs=0.01)


def test_a_normal_distribution_has_the_error_it_is_compared_with() -> None:
    histogram = Histogram()
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    histogram.update(x)
    scale = float(activation_parameters(histogram, Grid(4), "mse")[0])
    error = float((torch.round(x / scale).clamp(-8, 7) * scale - x).square().mean())
    assert error == pytest.approx(NORMAL_ERROR, rel=0.1)


def test_batches_do_not_matter() -> None:
    model, batches = planted.bert(), planted.texts(2)
    whole = [{name: torch.cat([b[name] for b in batches]) for name in batches[0]}]
    one, two = sites(model, batches), sites(model, whole)
    for name, site in one.items():
        assert site.error == pytest.approx(two[name].error, rel=1e-3, abs=1e-6)
        assert site.verdict == two[name].verdict


def test_bad_data() -> None:
    model, batches = planted.bert(), planted.texts(1)
    ops = discover(model, batches[0], "last_hidden_state")
    with pytest.raises(DataError, match=r"can be read only once.*a list"):
        attribute(model, ops, iter(batches), k_target={})
    with pytest.raises(DataError, match="holds no batch"):
        attribute(model, ops, [], k_target={})
    with torch.no_grad():
        model.get_submodule("encoder.layer.0.output.LayerNorm").weight[0] = float("nan")
    with pytest.raises(DataError, match=r"encoder\.layer\.0\.output\.LayerNorm"):
        attribute(model, ops, batches, k_target={})


def site(name: str, error: float, verdict: str, reach: float) -> SiteAttribution:
    flagged = Without(0.5, 0.02, reach) if reach else None
    return SiteAttribution(name, "norm", "m", ("l",), 3.0, error, flagged=flagged, verdict=verdict)  # type: ignore[arg-type]


def test_forecasts() -> None:
    fine = forecast([site("a", 0.02, "none", 0.0)], flagged=3)
    assert fine.helps is False
    assert "no site needs it" in fine.sentence
    reached = forecast([site("a", 0.2, "triplet", 0.9), site("b", 0.02, "none", 0)], flagged=1)
    assert reached.helps is True
    assert reached.reach == pytest.approx(0.9)
    elsewhere = forecast([site("a", 0.2, "neuron", 0.02), site("b", 0.1, "gain", 0)], flagged=5)
    assert elsewhere.helps is False
    assert "the 5 layer(s) that it flags make 1% of the error at the 2 sites" in elsewhere.sentence
    assert "single channels or neurons 68%" in elsewhere.sentence
    unset = forecast([site("a", 0.2, "triplet", 0)], flagged=0)
    assert unset.helps is False
    assert "because it flags no layer" in unset.sentence
    assert "a lower tau" in unset.sentence
    assert forecast([site("a", 0.2, "unknown", 0)], flagged=1).helps is None
    assert forecast([], flagged=0).helps is None


def test_a_whole_diagnosis_is_json_and_a_foreign_model_says_why_not() -> None:
    batches = planted.texts()
    found = diagnose_model(planted.bert(), lambda: batches, output="last_hidden_state", tau=0.9)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {"layers", "sites", "forecast"} == set(document)
    assert len(document["sites"]) == 20

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(x))

    foreign = diagnose_model(Twice(), lambda: [{"x": torch.randn(2, 4)}])
    assert foreign.sites == []
    assert foreign.forecast.helps is None
    assert "runs more than once" in foreign.forecast.sentence
