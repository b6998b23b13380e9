"""Recipes: every offender named at once, and no document that hangs, executes or escapes as another exception."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from s2d_deploy.errors import RecipeError
from s2d_deploy.recipe import Recipe, embedded_recipes, load_recipe, parse_recipe, schema

EMBEDDED = ("digits-vit", "minilm")


def minimal(**sections: Any) -> dict[str, Any]:
    base = {"name": "x", "model": {"config": {"model_type": "vit"}}, "data": {"kind": "digits"}, "train": {}}
    return base | {"targets": ["ort"]} | sections


def refusal(document: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(document)
    return str(caught.value)


def written(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


# ---- schema and embedded recipes ----------------------------------------------------------------------------


def test_the_schema_is_one_and_json() -> None:
    document = schema()
    Draft202012Validator.check_schema(document)
    assert json.loads(json.dumps(document)) == document
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert document["additionalProperties"] is False


def test_the_embedded_recipes_are_those_and_have_descriptions() -> None:
    found = embedded_recipes()
    assert tuple(found) == EMBEDDED
    assert all(found.values())


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_recipes_load_and_satisfy_the_schema(name: str) -> None:
    source = Path(__file__).parents[1] / "s2d_deploy" / "recipes" / f"{name}.yaml"
    validator = Draft202012Validator(schema())
    validator.validate(yaml.safe_load(source.read_text()))
    recipe = load_recipe(name)
    assert recipe.name == name
    validator.validate(recipe.document())
    assert parse_recipe(recipe.document()) == recipe  # the resolved recipe is itself a recipe


def test_the_schema_knows_the_short_form_and_refuses_what_the_loader_refuses() -> None:
    validator = Draft202012Validator(schema())
    assert validator.is_valid(minimal())
    for document in (minimal(targets=["onnxx"]), minimal(quantise={}), minimal(data={"kind": "video"})):
        assert not validator.is_valid(document)
        refusal(document)


# ---- unknown keys and bad values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "path", "suggestion"),
    [
        ({"quantise": {}}, "quantise", "quantize"),
        ({"model": {"config": {"model_type": "vit"}, "outptu": "a"}}, "model.outptu", "output"),
        ({"data": {"kind": "digits", "batchsize": 1}}, "data.batchsize", "batch_size"),
        ({"train": {"epoch": 1}}, "train.epoch", "epochs"),
        ({"condition": {"tua": 1}}, "condition.tua", "tau"),
        ({"quantize": {"precision": []}}, "quantize.precision", "precisions"),
        ({"targets": [{"name": "ort", "option": {}}]}, "targets.0.option", "options"),
        ({"targets": ["tvm", {"name": "ort", "requird": True}]}, "targets.1.requird", "required"),
        ({"verify": {"sample": 1}}, "verify.sample", "samples"),
        ({"bench": {"thread": 1}}, "bench.thread", "threads"),
        ({"gates": {"acuracy_drop": 1}}, "gates.acuracy_drop", "accuracy_drop"),
    ],
)
def test_misspelt_keys_have_a_suggestion(sections: dict[str, Any], path: str, suggestion: str) -> None:
    text = refusal(minimal(**sections))
    assert text.startswith(f"recipe: unknown key {path!r}. Expected: one of ")
    assert text.endswith(f"Fix: did you mean {suggestion!r}?")


@pytest.mark.parametrize("key", ["interval", "float", "function-x", "dict[x]", "integer"])
def test_a_key_is_named_as_it_was_written(key: str) -> None:
    assert f"unknown key 'gates.{key}'" in refusal(minimal(gates={key: 1}))


def test_every_offender_is_reported_at_once() -> None:
    text = refusal(
        {
            "name": "x y",
            "modle": {},
            "data": {"kind": "video", "batch_size": 0, "seed": -1},
            "quantize": {"precisions": ["w8a8", "w9a9"], "overrides": {"*": "int8"}},
            "targets": ["onnx", {"nme": "tvm"}],
            "gates": {"accuracy_drop": "little"},
        }
    )
    lines = text.splitlines()
    assert lines[0] == "recipe: "
    for part in (
        "key 'name'",
        "key 'model' is missing.",
        "unknown key 'modle'",
        "key 'data.kind'",
        "key 'data.batch_size': input should be greater than or equal to 1. Found: 0.",
        "key 'data.seed'",
        "quantize.precisions: unknown precision 'w9a9'",
        "quantize.overrides['*']: unknown precision 'int8'",
        "unknown target 'onnx'",
        "key 'targets.1.name' is missing.",
        "unknown key 'targets.1.nme'",
        "key 'gates.accuracy_drop'",
    ):
        assert sum(part in line for line in lines) == 1, (part, text)
    assert len(lines) == 13


def test_inconsistencies_between_sections_are_reported_at_once() -> None:
    text = refusal({"name": "x", "model": {"pretrained": "a"}, "data": {"kind": "text"}, "train": {}, "targets": []})
    for part in (
        "train: only a model built from model.config is trained from scratch",
        "targets: list at least one, e.g. [ort]",
        "data.path is needed for data.kind = text",
        "condition.objective: text has no labels here; use distill",
    ):
        assert part in text
    assert "add a train section" in refusal({k: v for k, v in minimal().items() if k != "train"})
    assert "targets: listed twice: ort" in refusal(minimal(targets=["ort", "tvm", {"name": "ort"}]))
    assert "give exactly one of config, pretrained, factory; found config, factory" in refusal(
        minimal(model={"config": {}, "factory": "a:b"})
    )
    assert "found none" in refusal(minimal(model={}))


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (
            {"targets": ["orrt"]},
            "unknown target 'orrt'. Expected: one of ort, reference, tensorrt, tvm. Fix: did you mean",
        ),
        ({"targets": "ort"}, "key 'targets'. Expected: a list, e.g. [a, b]. Found: 'ort'."),
        ({"verify": None}, "section 'verify'. Expected: a mapping of keys. Found: nothing."),
        ({"bench": [1]}, "section 'bench'. Expected: a mapping of keys. Found: a list."),
        ({"gates": {"accuracy_drop": {"w9a9": 1}}}, "gates.accuracy_drop: unknown precision 'w9a9'."),
        ({"gates": {"accuracy_drop": {"w8a8": "x"}}}, "key 'gates.accuracy_drop.w8a8': input should be a valid number"),
        ({"gates": {"executed": float("nan")}}, "key 'gates.executed': not a finite number. Found: nan."),
        ({"train": {"learning_rate": float("inf")}}, "key 'train.learning_rate': not a finite number."),
        ({"condition": {"seed": 10**30}}, "key 'condition.seed': input should be less than or equal to 4294967295."),
        ({"quantize": {"precisions": []}}, "key 'quantize.precisions'. Expected: at least one entry. Found: []."),
        ({"quantize": {"percentile": 101}}, "key 'quantize.percentile': input should be less than or equal to 100."),
        ({3: 4}, "recipe: a key is not text. Found: 3."),
        ({"description": b"x"}, "key 'description': not a plain value. Found: a bytes."),
    ],
)
def test_bad_values_are_explained(sections: dict[Any, Any], text: str) -> None:
    found = refusal(minimal() | sections)
    assert text in found
    assert "\n" not in found  # one offender, one line
    for word in ("pydantic", "VerifySection", "BenchSection", "tuple"):
        assert word not in found


def test_the_short_form_of_targets_and_canonical_names() -> None:
    recipe = parse_recipe(minimal(targets=["ort", {"name": "tvm", "required": True}]))
    assert [(t.name, t.required) for t in recipe.targets] == [("ort", False), ("tvm", True)]
    recipe = parse_recipe(
        minimal(
            quantize={"precisions": ["W8A8", "fp32", "w8a8", "float", "w6a6"], "overrides": {"a": "W8A8"}},
            gates={"accuracy_drop": {"W8A8": 1}, "executed": 0.5},
        )
    )
    assert recipe.quantize.precisions == ("w8a8", "w6a6")
    assert recipe.quantize.overrides == {"a": "w8a8"}
    assert recipe.gates.limits_for("w8a8")["accuracy_drop"] == 1
    assert recipe.gates.limits_for("w6a6")["accuracy_drop"] is None
    assert recipe.gates.limits_for("w6a6")["executed"] == 0.5


# ---- files --------------------------------------------------------------------------------------------------

BASE = yaml.safe_dump(minimal())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: [1", "not YAML"),
        ("a: b: c", "not YAML"),
        ("\tx: 1", "not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("", "not a recipe. Expected: a mapping of sections. Found: nothing."),
        ("- a\n- b\n", "not a recipe. Expected: a mapping of sections. Found: a list."),
        ("just words", "not a recipe. Expected: a mapping of sections. Found: a str."),
        (b"\xff\xfe\x00", "cannot be read. Expected: UTF-8 text."),
        ("a\0b", "not YAML"),
        (BASE + "name: y\n", "key 'name' is given twice. Expected: each key once in a section."),
        (BASE + "verify: {samples: 1, samples: 2}\n", "key 'samples' is given twice"),
        (
            BASE + "verify: {samples: 2001-99-01}\n",
            "a value is not what its form promises. Found: month must be in 1..12",
        ),
        (
            BASE + "description: 2001-01-01\n",
            "key 'description': not a plain value. Found: a date. Fix: put it into quotes.",
        ),
        (BASE + "verify: {samples: !!int abc}\n", "a value is not what its form promises"),
        (BASE + "verify: {samples: " + "9" * 6000 + "}\n", "a value is not what its form promises"),
        (BASE + "description: !!binary aGk=\n", "not a plain value. Found: a bytes."),
        (BASE + "verify: !!set {a, b}\n", "not a plain value. Found: a set."),
        (BASE + "? [a, b]\n: c\n", "not YAML"),
        (BASE + "verify: &a {x: *a}\n", "an alias contains itself"),
    ],
)
def test_texts_that_are_no_recipe(tmp_path: Path, text: str | bytes, found: str) -> None:
    source = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert str(caught.value).startswith(source)
    assert found in str(caught.value)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [{marker}]",
        "!!python/object/new:os.mkdir [{marker}]",
        "!!python/name:os.mkdir",
        "!!python/module:antigravity",
        "!anything {{}}",
    ],
)
def test_tags_are_refused_and_never_executed(tmp_path: Path, tag: str) -> None:
    marker = tmp_path / "executed"
    tagged = tag.format(marker=marker)
    with pytest.raises(RecipeError, match=r"not YAML.*could not determine a constructor"):
        load_recipe(written(tmp_path, f"{BASE}description: {tagged}\n"))
    with pytest.raises(RecipeError, match=r"--set .*not YAML.*could not determine a constructor"):
        load_recipe("digits-vit", [f"description={tagged}"])
    assert not marker.exists()


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return "\n".join(lines) + "\n"


def merge_bomb() -> str:
    lines = ["m0: &m0 {k: v}"]
    lines += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (bomb(), "too large to be a recipe. Expected: at most 20000 values once aliases are expanded."),
        (merge_bomb(), "too large to be a recipe"),
        (BASE + "verify: " + "[" * 200_000, "nested too deeply to be a recipe"),
        (BASE + "verify: " + "[" * 60 + "]" * 60, "nested too deeply to be a recipe. Expected: at most 50 levels."),
        (BASE + "verify: " + "{a: " * 5000 + "1" + "}" * 5000, "nested too deeply to be a recipe"),
        (BASE + "verify: [" + "1, " * 30_000 + "]", "too large to be a recipe"),
    ],
)
def test_bombs_and_depth_do_not_hang(tmp_path: Path, text: str, found: str) -> None:
    source = written(tmp_path, text)
    begin = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert found in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.monotonic() - begin < 20  # seconds; expanded, the first bomb has 10^12 values


def test_a_document_nested_in_memory_is_refused_too() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in refusal(minimal(description=deep))


def test_ordinary_aliases_and_merges_work(tmp_path: Path) -> None:
    text = "verify: &v {samples: 3}\nbench: {<<: {batch_size: 4}, threads: 1}\n"
    text += "gates: {accuracy_drop: &g {w8a8: 1}, simulation_gap: *g}\n"
    recipe = load_recipe(written(tmp_path, BASE + text), ["gates.accuracy_drop.w8a8=7"])
    assert (recipe.verify.samples, recipe.bench.batch_size) == (3, 4)
    # A flag changes the place that it names, not what shares an alias with it.
    assert recipe.gates.accuracy_drop == {"w8a8": 7}
    assert recipe.gates.simulation_gap == {"w8a8": 1}


@pytest.mark.parametrize("source", ["no-such-recipe", "", ".", "a\0b", "x" * 5000, "runs/none.yaml"])
def test_a_recipe_that_does_not_exist(source: str) -> None:
    with pytest.raises(RecipeError, match=r"no recipe .*Expected: a YAML file, or one of digits-vit, minilm"):
        load_recipe(source)


def test_a_misspelt_embedded_recipe_has_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="Fix: did you mean 'digits-vit'\\?"):
        load_recipe("digit-vit")


# ---- flags --------------------------------------------------------------------------------------------------


def test_flags_override_the_file_with_yaml_values() -> None:
    recipe = load_recipe(
        "digits-vit",
        [
            "quantize.block_size=16",
            "quantize.precisions=[w4a4]",
            "condition.method=none",
            "bench.min_seconds=1e-2",
            "targets=[ort]",
            "description=a=b",
            " verify.samples = 3",
            'quantize.overrides={"*.fc1": w8a8}',
        ],
    )
    assert recipe.quantize.block_size == 16
    assert recipe.quantize.precisions == ("w4a4",)
    assert recipe.quantize.overrides == {"*.fc1": "w8a8"}
    assert recipe.condition.method == "none"
    assert recipe.bench.min_seconds == 0.01
    assert [t.name for t in recipe.targets] == ["ort"]
    assert recipe.description == "a=b"
    assert recipe.verify.samples == 3
    assert load_recipe("digits-vit").quantize.block_size == 32


def test_flags_fill_a_section_that_is_left_empty(tmp_path: Path) -> None:
    source = written(tmp_path, BASE.replace("train: {}", "train:"))
    train = load_recipe(source, ["train.epochs=3"]).train
    assert train is not None
    assert train.epochs == 3


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("block_size", "--set 'block_size'. Expected: key.path=value. Fix: e.g. --set quantize.block_size=16."),
        ("=3", "--set '=3'. Expected: key.path=value."),
        ("name.x=3", "--set 'name.x=3': 'name' is not a section. Found: a str."),
        ("targets.0.name=ort", "'targets' is not a section. Found: a list."),
        ("quantize.block_size=[1", "--set 'quantize.block_size=[1': not YAML."),
        ("quantize.blok_size=3", "unknown key 'quantize.blok_size'. "),
        ("quantize.block_size=abc", "key 'quantize.block_size': input should be a valid integer"),
        ("gates.executed=.inf", "not a finite number"),
        ("a..b=1", "unknown key 'a'"),
    ],
)
def test_bad_flags_are_explained(flag: str, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits-vit", [flag])
    assert text in str(caught.value)


# ---- anything -----------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["ort", "w8a8", "s2d", "digits", "a:b", "vit"])
)
KEYS = (
    st.sampled_from(
        [*Recipe.model_fields, "config", "kind", "path", "precisions", "accuracy_drop", "executed", "w8a8", "options"]
    )
    | st.text(max_size=6)
    | st.integers()
    | st.floats()
    | st.none()
)
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=25
)


@settings(max_examples=150)
@given(st.dictionaries(KEYS, DOCUMENTS, max_size=6), st.booleans())
def test_any_document_gives_a_recipe_or_a_recipe_error(document: dict[Any, Any], whole: bool) -> None:
    document = minimal() | document if whole else document
    try:
        recipe = parse_recipe(document)
    except RecipeError:
        return
    json.dumps(recipe.document(), allow_nan=False)
    assert parse_recipe(recipe.document()) == recipe


@settings(max_examples=100)
@given(st.sampled_from(list(Recipe.model_fields)), DOCUMENTS, st.text(max_size=30))
def test_any_yaml_text_gives_a_recipe_or_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any, tail: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_text(yaml.safe_dump(minimal(**{key: value})) + tail, encoding="utf-8", errors="surrogatepass")
    for overrides in ([], [tail], [f"{key}={tail}"]):
        try:
            recipe = load_recipe(str(path), overrides)
        except RecipeError:
            continue
        json.dumps(recipe.document(), allow_nan=False)
        assert parse_recipe(recipe.document()) == recipe
