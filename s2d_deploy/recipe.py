"""Recipes: what a user writes in YAML, checked before any work.

The models below are the schema (`s2d-deploy schema` prints it as JSON schema). Unknown keys are errors with a
suggestion. Flags override the file (``--set quantize.block_size=16``); the resolved recipe is saved with every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from s2d_deploy.errors import RecipeError, message
from s2d_deploy.one_shot_variants import check_variants
from s2d_deploy.precision import BASELINE, STANDARD, parse_precision
from s2d_deploy.registry import TARGET_GROUP, TARGETS, check_target
from s2d_deploy.yaml_text import plain, read_yaml

WeightRangeMethod = Literal["absmax", "percentile", "mse"]
RangeMethod = Literal["absmax", "percentile", "mse", "entropy"]
# Stages derive seeds as seed * 10,007 + epoch, which must fit into the 64 bits of torch's generator.
_MAX_SEED = 2**32 - 1


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelSection(_Section):
    """Where the float model comes from: exactly one of `config`, `pretrained`, `factory`."""

    config: dict[str, Any] | None = Field(
        None, description="build an untrained transformers model: model_type and its fields"
    )
    pretrained: str | None = Field(None, description="a folder written by save_pretrained, or a hub id")
    factory: str | None = Field(None, description="package.module:function that returns a torch.nn.Module")
    factory_arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the factory")
    weights: str | None = Field(None, description="a .safetensors state dict for the factory's model")
    task: Literal["image-classification", "embedding"] = Field(
        "image-classification", description="what the outputs mean"
    )
    output: str | None = Field(
        None, description="output that is exported; default: logits, or last_hidden_state for embedding"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        given = [k for k in ("config", "pretrained", "factory") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of config, pretrained, factory; found {', '.join(given) or 'none'}")
        return self


class DataSection(_Section):
    """Samples for training, calibration and evaluation."""

    kind: Literal["digits", "images", "text", "npz"] = Field(
        description="digits (scikit-learn), image folders, text, npz"
    )
    path: str | None = Field(
        None,
        description="images: a folder, also with class folders, train/ and test/; text: file or folder; npz: file",
    )
    calibration_samples: int = Field(256, ge=1, description="taken from the training split")
    test_samples: int = Field(1000, ge=1, description="at most this many of the test split")
    batch_size: int = Field(32, ge=1)
    max_length: int = Field(64, ge=1, description="text: tokens in a sample, padded")
    tokenizer: str | None = Field(None, description="text: folder or id; default: the model's own")
    image_size: int | None = Field(None, ge=1, description="images: side in pixels; default: the model's")
    channels: Literal[1, 3] | None = Field(None, description="images: default: the model's")
    labels: bool = Field(True, description="images: class folders are the model's labels; false: unlabelled")
    seed: int = Field(0, ge=0, le=_MAX_SEED)


class TrainSection(_Section):
    """Training from scratch, for a model built from `model.config`."""

    epochs: int = Field(30, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(64, ge=1)
    threads: int | None = Field(
        None, ge=1, description="of torch; tiny layers train faster on one. Default: torch's own"
    )
    seed: int = Field(0, ge=0, le=_MAX_SEED)


class ConditionSection(_Section):
    """Selective Spectral Decay (arXiv 2602.14432), or one of the baselines that it is compared with."""

    method: Literal["s2d", "none", "control", "weight-decay", "muon", "one-shot"] = Field(
        "s2d",
        description="none: no training; one-shot: by calibration data alone; else the same steps with S2D, without, "
        "with plain decay, with Muon",
    )
    one_shot: tuple[str, ...] = Field(
        (), description="of method one-shot, in this order: shrink, shrink-next, centre, fold, neurons, insert, bypass"
    )
    shrink_factor: float = Field(0.5, ge=0, le=1, description="one-shot shrinking: what is left of a singular value")
    objective: Literal["task", "distill"] = Field("task", description="task loss, or label-free self-distillation")
    application: Literal["coupled", "decoupled"] = Field(
        "decoupled", description="through the gradient, or AdamW-style"
    )
    steps: int = Field(300, ge=0)
    learning_rate: float = Field(1e-4, gt=0, le=1)
    warmup: int = Field(20, ge=0)
    batch_size: int = Field(32, ge=1)
    n: int = Field(2, ge=1, le=8)
    weight_decay: float = Field(5e-4, ge=0, lt=1, description="lambda of the coupled penalty")
    decoupled_factor: float = Field(10.0, ge=0, le=1e6, description="decoupled: W -= rate * factor * U S^n V^T")
    select: Literal["paper", "sites"] = Field(
        "paper", description="sites: press what makes the outliers at the quantized sites, gains and neurons included"
    )
    tau: float = Field(0.95, gt=0, le=1)
    k_max: int = Field(3, ge=1, le=64)
    refresh_every: int = Field(100, ge=1)
    refresh_drift: float | None = Field(None, gt=0, le=1, description="refresh earlier at this residual")
    refresh_batches: int | None = Field(2, ge=1, description="calibration batches run at a refresh; null: all")
    split: dict[str, int] = Field(
        default_factory=dict, description="layer pattern -> matrices in it, e.g. '*.qkv': 3, or 3 x heads"
    )
    qat: str | None = Field(None, description="fake-quantize the forward pass at this precision, e.g. w4a4")
    qat_steps: Literal["calibrated", "learned"] = Field(
        "calibrated", description="of qat: scales made anew from data now and then, or trained and deployed (LSQ)"
    )
    decay: float = Field(0.1, gt=0, lt=1, description="of method weight-decay, AdamW-style, on all weights")
    accumulate: int = Field(1, ge=1, description="batches in one optimizer step")
    autocast: Literal["no", "bf16"] = Field("no", description="compute in bfloat16 on float32 weights")
    seed: int = Field(0, ge=0, le=_MAX_SEED)

    @field_validator("split")
    @classmethod
    def _whole_parts(cls, split: dict[str, int]) -> dict[str, int]:
        wrong = [pattern for pattern, parts in split.items() if not 1 <= parts <= 4096]
        if wrong:
            raise ValueError(
                message(f"condition.split: {', '.join(wrong)}", expected="1 to 4096 matrices", found=str(split))
            )
        return split

    @model_validator(mode="after")
    def _one_shot_alone(self) -> ConditionSection:
        if self.method == "one-shot":
            check_variants(self.one_shot, "condition.one_shot")
        elif self.one_shot:
            raise ValueError(
                message(
                    f"condition.one_shot is not read by condition.method = {self.method}",
                    fix="set condition.method=one-shot, or remove condition.one_shot",
                )
            )
        if self.qat_steps == "learned" and self.qat is None:
            raise ValueError(
                message(
                    "condition.qat_steps: learned needs a precision to learn for", fix="set condition.qat, e.g. w4a4"
                )
            )
        if self.method == "one-shot" and self.qat is not None:
            raise ValueError(message("condition.qat trains, and one-shot takes no step", fix="leave condition.qat out"))
        return self

    @field_validator("qat")
    @classmethod
    def _known_qat(cls, name: str | None) -> str | None:
        if name is None:
            return None
        precision = parse_precision(name, "condition.qat").name
        if precision == BASELINE:
            raise ValueError(message("condition.qat: fp32 quantizes nothing", fix="leave condition.qat out"))
        return precision

    @model_validator(mode="after")
    def _sites_decoupled(self) -> ConditionSection:
        if self.select == "sites" and (self.application == "coupled" or self.split):
            raise ValueError(
                message(
                    "condition.select: sites is always decoupled and splits no layer",
                    found=f"application={self.application}, split={self.split}",
                    fix="leave application and split out",
                )
            )
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> ConditionSection:
        if self.method not in ("none", "one-shot") and self.steps and self.warmup >= self.steps:
            raise ValueError(
                message(
                    "condition.warmup does not end before the steps do",
                    expected=f"less than condition.steps = {self.steps}",
                    found=str(self.warmup),
                    fix=f"set condition.warmup={self.steps // 10}",
                )
            )
        return self


class QuantizeSection(_Section):
    """Ranges and layers."""

    preset: str | None = Field(None, description="precisions and passes by name; other keys of this section win")
    precisions: tuple[str, ...] = Field(STANDARD, min_length=1)
    passes: tuple[str | dict[str, dict[str, Any] | None], ...] = Field(
        (), description="in this order, e.g. [smoothquant, ranges, {gptq: {act_order: true}}]; [] rounds to nearest"
    )
    weights: WeightRangeMethod = "mse"
    activations: RangeMethod = Field(
        "mse", description="entropy: least KL divergence (Migacz 2017), for symmetric activations"
    )
    percentile: float = Field(99.99, gt=50, le=100)
    padding: Literal["count", "leave_out"] = Field(
        "count", description="whether tokens that attention_mask hides count in activation ranges"
    )
    activation_granularity: Literal["tensor", "token"] = "tensor"
    activation_symmetric: bool = True
    weight_granularity: Literal["auto", "channel", "block"] = Field(
        "auto", description="auto: a scale for each output channel; for each block where only weights are quantized"
    )
    block_size: int = Field(32, ge=2)
    attention: bool = True
    skip: tuple[str, ...] = ()
    overrides: dict[str, str] = Field(default_factory=dict, description="layer pattern -> precision it keeps at least")
    first_last: str | None = Field(
        None, description="the first and the last layer with weights keep at least this precision, e.g. w8a8"
    )
    error_samples: int = Field(16, ge=0, description="test samples of the layer-by-layer error analysis; 0: none")

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        """A preset's keys stand under those that the recipe gives itself."""
        if not isinstance(given, dict) or given.get("preset") is None:
            return given
        from s2d_deploy.ptq.presets import preset

        return {**preset(str(given["preset"])), **given}

    @field_validator("passes")
    @classmethod
    def _known_passes(cls, passes: tuple[Any, ...]) -> tuple[Any, ...]:
        if passes:
            from s2d_deploy.ptq.passes import parse_steps

            parse_steps(passes)
        return passes

    @field_validator("precisions")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Canonical names, each once; the baseline is always run and need not be listed."""
        known = [parse_precision(n, "quantize.precisions").name for n in names]
        return tuple(dict.fromkeys(n for n in known if n != BASELINE))

    @field_validator("first_last")
    @classmethod
    def _known_ends(cls, name: str | None) -> str | None:
        return None if name is None else parse_precision(name, "quantize.first_last").name

    @field_validator("overrides")
    @classmethod
    def _known_overrides(cls, overrides: dict[str, str]) -> dict[str, str]:
        return {k: parse_precision(v, f"quantize.overrides[{k!r}]").name for k, v in overrides.items()}


class TargetSection(_Section):
    """One runtime to build for."""

    name: str
    required: bool = Field(False, description="a runtime or device that is missing here fails the run (exit code 3)")
    options: dict[str, Any] = Field(default_factory=dict, description="see `s2d-deploy build --help`")
    device: str | None = Field(None, description="where tvm runs, if not here: rpc://host:port/key (docs/tvm.md)")

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A run folder made before there was a device holds the same recipe."""
        return {k: v for k, v in handler(self).items() if k != "device" or v is not None}

    @field_validator("name")
    @classmethod
    def _registered(cls, name: str) -> str:
        check_target(name)
        return name


class VerifySection(_Section):
    """Parity between the simulation and the runtime."""

    samples: int = Field(16, ge=1, description="samples for teacher-forced accumulators and code comparison")
    batch_size: int = Field(16, ge=1)


class BenchSection(_Section):
    """Latency."""

    threads: int = Field(2, ge=1)
    batch_size: int = Field(1, ge=1)
    warmup: int = Field(5, ge=0)
    min_samples: int = Field(30, ge=3)
    min_seconds: float = Field(0.5, ge=0)
    max_seconds: float = Field(20.0, gt=0)
    throughput: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="batch sizes to measure throughput at")
    footprint: bool = Field(True, description="measure cold start and memory, in a process for each artifact")
    roofline: bool = Field(True, description="measure the machine's ceilings, and say how near each result comes")


class GateSection(_Section):
    """Limits; a key left out makes no gate. A mapping gives a limit for each precision."""

    accuracy_drop: float | dict[str, float] | None = Field(
        None, description="float minus measured, in points or cosine x 100"
    )
    simulation_gap: float | dict[str, float] | None = Field(
        None, description="|simulated - measured|, in the same unit"
    )
    accumulators_different: int | dict[str, int] | None = Field(0, description="teacher-forced differences")
    parity_findings: int | dict[str, int] | None = Field(
        None, description="faults, inconsistent runs and exceeded tolerances that verify found"
    )
    code_flip_share: float | dict[str, float] | None = Field(None, description="share of codes that differ end to end")
    executed: float | dict[str, float] | None = Field(
        None, description="least share of declared integer MACs that ran on integers"
    )
    top1_flip_share: float | dict[str, float] | None = Field(
        None, description="share of decisions unlike the simulation's"
    )
    latency_ratio: float | dict[str, float] | None = Field(None, description="latency over float's on the same runtime")
    size_ratio: float | dict[str, float] | None = Field(None, description="artifact bytes over the float artifact's")
    weight_ratio: float | dict[str, float] | None = Field(None, description="quantized weights' bytes over FP32 bytes")
    decide_by: Literal["interval", "point"] = Field("interval", description="judge the 95 % interval, or the estimate")

    @field_validator("*")
    @classmethod
    def _known_precisions(cls, value: Any, info: ValidationInfo) -> Any:
        """A limit for a misspelt precision would never be judged."""
        if not isinstance(value, dict):
            return value
        return {parse_precision(k, f"gates.{info.field_name}").name: v for k, v in value.items()}

    def limits_for(self, precision: str) -> dict[str, Any]:
        """The limits that hold for one precision, as `gate.GateLimits` takes them."""
        fields = self.model_dump()
        return {k: v.get(precision) if isinstance(v, dict) else v for k, v in fields.items()}


class Recipe(_Section):
    """A whole run."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: ModelSection
    data: DataSection
    train: TrainSection | None = None
    condition: ConditionSection = ConditionSection()
    quantize: QuantizeSection = QuantizeSection()
    targets: tuple[TargetSection, ...]
    verify: VerifySection = VerifySection()
    bench: BenchSection = BenchSection()
    gates: GateSection = GateSection()

    @field_validator("targets", mode="before")
    @classmethod
    def _short_form(cls, targets: Any) -> Any:
        """``[ort, tvm]`` is short for ``[{name: ort}, {name: tvm}]``."""
        return (
            [{"name": t} if isinstance(t, str) else t for t in targets]
            if isinstance(targets, list | tuple)
            else targets
        )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        wrong = []
        if self.train is not None and self.model.config is None:
            wrong.append("train: only a model built from model.config is trained from scratch")
        if self.model.config is not None and self.train is None:
            wrong.append("model.config builds an untrained model: add a train section")
        names = [t.name for t in self.targets]
        if not names:
            wrong.append("targets: list at least one, e.g. [ort]")
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            wrong.append(f"targets: listed twice: {', '.join(twice)}")
        if self.data.kind != "digits" and self.data.path is None:
            wrong.append(f"data.path is needed for data.kind = {self.data.kind}")
        trained = self.condition.method not in ("none", "one-shot")
        if self.data.kind == "text" and trained and self.condition.objective == "task":
            wrong.append("condition.objective: text has no labels here; use distill")
        if self.condition.qat_steps == "learned" and self.quantize.passes:
            wrong.append(
                "condition.qat_steps: learned scales are deployed as they are, and quantize.passes would change the "
                "weights or scales that they belong to; use one of the two"
            )
        if wrong:
            raise ValueError("\n  ".join(wrong))
        return self

    def document(self) -> dict[str, Any]:
        """The resolved recipe as a JSON document."""
        return self.model_dump(mode="json")


def embedded_recipes() -> dict[str, str]:
    """Names of the recipes that come with the package, with their descriptions."""
    folder = resources.files("s2d_deploy") / "recipes"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            found[entry.name.removesuffix(".yaml")] = str(yaml.safe_load(entry.read_text()).get("description", ""))
    return found


def load_recipe(source: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a path to a YAML file, the name of an embedded recipe, or a document.
        overrides: ``key.path=value`` assignments, values in YAML.

    Raises:
        RecipeError: not found, not YAML, an unknown key (with a suggestion) or a bad value; all offenders at once.
    """
    if isinstance(source, Mapping):
        return _overridden(plain(dict(source), "recipe"), overrides, "recipe")
    path = Path(source)
    if _is_file(path):
        text, origin = _read(path), str(path)
    elif source in embedded_recipes():
        text, origin = (resources.files("s2d_deploy") / "recipes" / f"{source}.yaml").read_text(), source
    else:
        known = list(embedded_recipes())
        close = get_close_matches(source, known, n=1)
        if _is_file(path / "config.json"):
            raise RecipeError(
                message(
                    f"{source!r} is a model, not a recipe", fix="give its data to diagnose or condition: --data PATH"
                )
            )
        raise RecipeError(
            message(
                f"no recipe {source!r}",
                expected=f"a YAML file, or one of {', '.join(known)}",
                fix=f"did you mean {close[0]!r}?" if close else "give the path of a recipe",
            )
        )
    document = read_yaml(text, origin)
    if not isinstance(document, dict):
        raise RecipeError(message(f"{origin}: not a recipe", expected="a mapping of sections", found=_kind(document)))
    return _overridden(document, overrides, origin)


def _overridden(document: dict[str, Any], overrides: Sequence[str], origin: str) -> Recipe:
    for assignment in overrides:
        _assign(document, assignment)
    return parse_recipe(document, origin)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long to be one, a folder that may not be entered
        return False


def _kind(document: Any) -> str:
    return "nothing" if document is None else f"a {type(document).__name__}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(message(f"{path}: cannot be read", found=str(error), expected="UTF-8 text")) from error


def parse_recipe(document: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """A checked recipe from a document.

    Raises:
        RecipeError: every unknown key and bad value, each with its dotted path.
    """
    document = plain(dict(document), origin)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        # A gate's limit is a number or a mapping; pydantic reports a wrong one once for each.
        lines = list(dict.fromkeys(_explain(e) for e in error.errors(include_url=False) if not _other_branch(e)))
        raise RecipeError(f"{origin}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])) from error


def _assign(document: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise RecipeError(
            message(f"--set {assignment!r}", expected="key.path=value", fix="e.g. --set quantize.block_size=16")
        )
    value = read_yaml(text, f"--set {assignment!r}")
    target: Any = document
    *parents, leaf = key.strip().split(".")
    for part in parents:
        if target.get(part) is None:  # absent, or a section that is left empty in the file
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise RecipeError(
                message(f"--set {assignment!r}: {part!r} is not a section", found=f"a {type(target).__name__}")
            )
    target[leaf] = value


def _location(error: Any) -> list[Any]:
    """Where the error is, without pydantic's names for the branches of a gate's union."""
    location = list(error["loc"])
    if location[:1] == ["gates"] and len(location) > 2:
        del location[2]
    return [part for part in location if part != "[key]"]


def _other_branch(error: Any) -> bool:
    """Whether this error belongs to the branch of a gate's union that the user did not mean."""
    location = error["loc"]
    if location[:1] != ("gates",) or len(location) < 3:
        return False
    means_mapping = error["type"] != "dict_type" and (len(location) > 3 or not isinstance(error.get("input"), dict))
    return not means_mapping


def _explain(error: Any) -> str:
    location = _location(error)
    path = ".".join(str(p) for p in location)
    if error["type"] == "extra_forbidden":
        section = _section_at(location[:-1])
        known = sorted(section.model_fields) if section else []
        close = get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        return message(
            f"unknown key {path!r}",
            expected=f"one of {', '.join(known)}" if known else None,
            fix=f"did you mean {close[0]!r}?" if close else "remove it",
        )
    if isinstance((error.get("ctx") or {}).get("error"), Exception):
        text = str(error["ctx"]["error"])
        return text if not path or text.startswith(path.split(".")[0]) else f"{path}: {text}"
    if error["type"] == "missing":
        return message(f"key {path!r} is missing")
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return message(f"section {path!r}", expected="a mapping of keys", found=_kind(error.get("input")))
    if error["type"] == "too_short":
        return message(f"key {path!r}", expected="at least one entry", found=repr(error.get("input"))[:80])
    if error["type"] == "tuple_type":
        return message(f"key {path!r}", expected="a list, e.g. [a, b]", found=repr(error.get("input"))[:80])
    text = error["msg"]
    return message(f"key {path!r}: {text[0].lower()}{text[1:]}", found=repr(error.get("input"))[:80])


def _section_at(location: Sequence[Any]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Recipe
    for part in location:
        if isinstance(part, int):
            section = TargetSection
            continue
        info = section.model_fields.get(str(part)) if section else None
        kinds = [] if info is None else [info.annotation, *getattr(info.annotation, "__args__", ())]
        nested = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        section = nested[0] if nested else None
    return section


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe (draft 2020-12)."""
    document = Recipe.model_json_schema()
    document["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    names = sorted({*TARGETS, *entry_points(group=TARGET_GROUP).names})
    document["$defs"]["TargetSection"]["properties"]["name"]["enum"] = names
    # The short form, which a validator expands before pydantic sees it.
    items = document["properties"]["targets"]["items"]
    document["properties"]["targets"]["items"] = {"anyOf": [{"enum": names}, items]}
    return document
