"""What report.json holds, as types: the one description that writer, readers and renderers share.

Every figure is optional, because a figure exists only where it was measured; extra keys are kept.
What the schema refuses is a document that contradicts itself: a number on a result that never ran, or
a verdict that its own gates deny. It does not check that a number is true; gates and evidence do that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = "1"

Verdict = Literal["pass", "fail", "undecided"]
Status = Literal["measured", "built", "unavailable"]
PRECISIONS = ("fp32", "w8a8", "w4a16", "w4a8", "w4a4")


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Host(_Open):
    """The machine that measured."""

    cpu: str | None = None
    cores: int | None = None
    threads: int | None = None
    features: list[str] = Field(default_factory=list)
    memory_bytes: int | None = None
    os: str | None = None
    gpu: Any = None


class Metric(_Open):
    """One metric on `n` samples: the float model (key ``float``), the fake-quant simulation, the runtime.

    `higher_is_better` is None where the producer did not say; see `report_summary.higher_is_better`.
    """

    name: str | None = None
    n: int | None = None
    float_model: float | None = Field(default=None, alias="float")
    simulated: float | None = None
    measured: float | None = None
    higher_is_better: bool | None = None


class FloatMetric(_Open):
    """The metric of the float model before conditioning."""

    name: str | None = None
    n: int | None = None
    value: float | None = None


class ModelFacts(_Open):
    """The model under test."""

    name: str | None = None
    parameters: int | None = None
    float_metric: FloatMetric | None = None


class LayerState(_Open):
    """One weight, before or after conditioning. `pcdr[k - 1]` is PCDR_k; `singular_values` descend."""

    pcdr: list[float | None] = Field(default_factory=list)
    sigma_max: float | None = None
    max_abs_activation: float | None = None
    kurtosis: float | None = None
    singular_values: list[float | None] = Field(default_factory=list)


class ConditionedLayer(_Open):
    """One layer of the conditioning stage."""

    name: str
    flagged: bool | None = None
    k_target: int | None = None
    before: LayerState | None = None
    after: LayerState | None = None


class Conditioning(_Open):
    """The conditioning stage."""

    method: str | None = None
    application: str | None = None
    seconds: float | None = None
    steps: int | None = None
    note: str | None = None
    losses: list[float | None] = Field(default_factory=list)
    layers: list[ConditionedLayer] = Field(default_factory=list)


class Spread(_Open):
    """The range of one activation, in the activation's own unit."""

    absmax: float | None = None
    p999: float | None = None
    std: float | None = None


class ActivationRange(_Open):
    """The range of one quantized activation site before and after conditioning."""

    site: str
    layer: str | None = None
    before: Spread | None = None
    after: Spread | None = None


class LayerErrorFacts(_Open):
    """One quantized op (`error_analysis.LayerError`); an SNR is None where nothing differs."""

    op: str
    declared: str | None = None
    isolated_snr_db: float | None = None
    isolated_cosine: float | None = None
    accumulated_snr_db: float | None = None
    accumulated_cosine: float | None = None
    output_error: float | None = None
    share: float | None = None


class PrecisionErrors(_Open):
    """Where the error of one precision's simulation comes from (`error_analysis.ErrorAnalysis`), worst layer first."""

    precision: str
    output_snr_db: float | None = None
    output_error: float | None = None
    additivity: float | None = None
    samples: int | None = None
    layers: list[LayerErrorFacts] = Field(default_factory=list)


class Op(_Open):
    """One contraction as the artifact executes it (`session.ExecutedOp`)."""

    name: str
    kernel: str | None = None
    precision: str | None = None
    macs: int | None = None
    declared: str | None = None
    instruction: str | None = None


class AuditFacts(_Open):
    """What the artifact executes (`session.Audit`)."""

    ops: list[Op] = Field(default_factory=list)
    evidence: str | None = None
    notes: list[str] = Field(default_factory=list)


class SiteParity(_Open):
    """Codes of one activation site, end to end."""

    site: str
    checked: int | None = None
    different: int | None = None
    snr_db: float | None = None


class Parity(_Open):
    """Simulation against runtime: accumulators are teacher-forced, the rest is end to end."""

    accumulators_checked: int | None = None
    accumulators_different: int | None = None
    codes_checked: int | None = None
    codes_different: int | None = None
    top1_flips: int | None = None
    snr_db: float | None = None
    max_error: float | None = None
    sites: list[SiteParity] = Field(default_factory=list)
    samples_compared: int | None = None
    verdict: Verdict | None = None
    explanation: dict[str, Any] | None = None
    """`explain.Explanation`: verdict, findings (cause, layer, site, detail, confirmed), sites of the forced pass."""
    consistency: dict[str, Any] | None = None
    """`consistency.Agreement` of the runtime with itself: in other batches, again, from a second build."""
    budget: dict[str, Any] | None = None
    """`error_budget.ErrorBudget`, with the tolerances and what was seen."""
    gap: dict[str, Any] | None = None
    """`gap.Gap`: the way from the float model to the hardware in parts that add up."""
    unexamined: dict[str, str] | None = None
    """Steps of the verification that broke, with the reason."""


class Latency(_Open):
    """Wall-clock milliseconds of one forward pass; every sample is kept."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    min: float | None = None
    max: float | None = None
    samples: list[float | None] = Field(default_factory=list)
    warmup: int | None = None
    threads: int | None = None
    batch: int | None = None
    stable: bool | None = None
    note: str | None = None


class FootprintFacts(_Open):
    """Cold start and memory of one artifact in a process of its own (`footprint.Footprint`)."""

    import_ms: float | None = None
    open_ms: float | None = None
    first_run_ms: float | None = None
    cold_start_ms: float | None = None
    memory_bytes: int | None = None
    process_bytes: int | None = None


class Throughput(_Open):
    """One batch size."""

    batch: int | None = None
    p50_ms: float | None = None
    samples_per_second: float | None = None
    stable: bool | None = None


class RooflineFacts(_Open):
    """How near a median latency comes to what the machine can do (`peak.Roofline`)."""

    floor_ms: float | None = None
    share: float | None = None
    bound: str | None = None


class Result(_Open):
    """One target at one precision."""

    target: str
    precision: str
    status: Status
    runtime: str | None = None
    device: str | None = None
    reason: str | None = None
    rung: str | None = None
    executed: dict[str, float | None] | None = None
    audit: AuditFacts | None = None
    metric: Metric | None = None
    parity: Parity | None = None
    latency_ms: Latency | None = None
    throughput: list[Throughput] = Field(default_factory=list)
    footprint: FootprintFacts | None = None
    roofline: RooflineFacts | None = None
    speedup_over_float: float | None = None
    speedup_ci: list[float | None] | None = None
    size_bytes: int | None = None
    float_size_bytes: int | None = None
    weight_ratio: float | None = None
    weight_size_bytes: int | None = None
    weight_float_size_bytes: int | None = None
    compute_capabilities: list[Any] | None = None

    @model_validator(mode="after")
    def _numbers_only_where_measured(self) -> Result:
        if self.status == "measured":
            return self
        m, p, t = self.metric or Metric(), self.parity or Parity(), self.latency_ms or Latency()
        claims = {
            "metric.measured": m.measured is not None,
            "parity": bool(p.accumulators_checked or p.codes_checked) or p.snr_db is not None,
            "latency_ms": bool(t.samples) or any(v is not None for v in (t.p50, t.p90, t.p99, t.min, t.max)),
            "speedup_over_float": self.speedup_over_float is not None,
            "throughput": bool(self.throughput),
            "footprint": self.footprint is not None,
            "roofline": self.roofline is not None,
        }
        wrong = [name for name, claimed in claims.items() if claimed]
        if wrong:
            raise ValueError(f"{self.target} {self.precision} is {self.status!r}, yet it holds {', '.join(wrong)}")
        return self


class Gate(_Open):
    """One gate. `target` and `precision` are None for a gate over the whole run."""

    name: str
    verdict: Verdict
    target: str | None = None
    precision: str | None = None
    value: Any = None
    limit: Any = None
    evidence: Any = None


class Reproduction(_Open):
    """The command that shows one figure again."""

    figure: str
    command: str | list[str]


class Report(_Open):
    """The whole document."""

    schema_version: Literal["1"]
    results: list[Result]
    verdict: Verdict
    gates: list[Gate] = Field(default_factory=list)
    created: str | None = None
    command: str | list[str] | None = None
    versions: dict[str, str | None] = Field(default_factory=dict)
    host: Host | None = None
    recipe: Any = None
    model: ModelFacts | None = None
    conditioning: Conditioning | None = None
    ranges: list[ActivationRange] | None = None
    errors: list[PrecisionErrors] = Field(default_factory=list)
    reproduce: list[Reproduction] = Field(default_factory=list)
    not_finite: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _verdict_follows_from_gates(self) -> Report:
        expected = overall_verdict([gate.verdict for gate in self.gates])
        if self.gates and self.verdict != expected:
            raise ValueError(f"verdict is {self.verdict!r}, but the gates say {expected!r}")
        return self


def overall_verdict(verdicts: Sequence[str]) -> Verdict:
    """The verdict of a run: the worst of its gates. With no gates nothing was decided."""
    if "fail" in verdicts:
        return "fail"
    return "pass" if verdicts and all(v == "pass" for v in verdicts) else "undecided"
