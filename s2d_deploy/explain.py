"""Why a runtime differs from its simulation: where first, what it is, and whether that explains everything.

The evidence is taken in this order, each step using what the ones before it have shown:

1. what the artifact says that it was made from (the plan's digest), and what it executes (the audit);
2. teacher-forced accumulators, op by op: a wrong one is named by `accumulator_faults`;
3. each quantizer alone, where the runtime lets it be run, on exact ties and values between them;
4. one pass of the simulation forced through the runtime's codes (`forced`): the first site whose codes no rounding
   boundary excuses. What lies between the sites before it and itself is tried, hypothesis by hypothesis
   (`quantizer_faults`, `op_faults`, `input_faults`); the one found is built into the pass, and the pass goes on.

So a cause is *confirmed* where the simulation, with it built in, makes all of the runtime's codes. How near to a
boundary counts as rounding is measured, not chosen: it is what FP32 itself does to this network's values, times
`NOISE`. The built graph is never changed, so no fusion is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s2d_deploy.accumulator_faults import AccumulatorFault, classify_accumulators
from s2d_deploy.data import Batch
from s2d_deploy.errors import S2DDeployError, UnsupportedError
from s2d_deploy.fake_quant import FakeQuantizer
from s2d_deploy.forced import Forced, View, reached_by
from s2d_deploy.input_faults import classify_input
from s2d_deploy.op_faults import OUTPUT, Segment, accumulator_unit, classify_op, common_factor, output_target
from s2d_deploy.plan import Op, Plan
from s2d_deploy.probing import Described, QuantizerProbe, TapCheck, probe_values
from s2d_deploy.quantizer_faults import QuantizerFault, classify_quantizer, wrong_codes
from s2d_deploy.session import Array, Session
from s2d_deploy.simulation import recorded_codes, weight_codes
from s2d_deploy.verify import forced_accumulators

NOISE = 8.0  # how many times FP32's own largest error may be what separates a value from a boundary
_FLOOR = 2e-5  # codes; below it a measured noise says more about the sample than about FP32
_AFTER_A_FIT = 0.15  # codes: what a fitted correction may be off by, for everything behind it
_AFTER_A_FACTOR = 0.02  # the same for the output behind a factor that codes enclose
_FAULTS = 4
_FEW = 0.5  # share of ops or quantizers with faults of their own from which on the artifact is another one

ROUNDING, IDENTICAL, FAULT, UNEXPLAINED = "rounding", "identical", "fault", "unexplained"


@dataclass(frozen=True, slots=True)
class Finding:
    """One cause.

    Attributes:
        cause: ``"wrong-scale"``, ``"wrong-zero-point"``, ``"rounding-mode"``, ``"saturation"``, ``"swapped-axis"``,
            ``"wrong-weights"``, ``"wrong-bias"``, ``"fallback"``, ``"stale-artifact"``, ``"preprocessing"``,
            ``"float-operators"``, ``"unknown"``.
        layer: the op; ``"*"`` for the whole artifact, ``"input"`` for what enters the model.
        site: the quantizer, where it is one; else the first site that shows the fault.
        detail: in words.
        evidence: how it was found.
        confirmed: the simulation with this cause built in makes the runtime's codes.
        also: other ops where the same cause would have made the same codes: nothing that this runtime shows tells
            them apart (a product and the quantizer right behind it, in one kernel).
    """

    cause: str
    layer: str
    site: str | None
    detail: str
    evidence: str
    confirmed: bool = False
    also: tuple[str, ...] = ()


@dataclass(slots=True)
class Explanation:
    """What was found.

    Attributes:
        verdict: `IDENTICAL` (no code differs), `ROUNDING` (those that differ lie at boundaries), `FAULT` (a cause is
            named), `UNEXPLAINED`.
        findings: causes, in the order of execution.
        sites: the last forced pass: ``{site, checked, flipped, wrong, away, tolerance}``; `flipped` at boundaries.
        probed: quantizers run alone; `refused`: those that could not be.
        taps_changed: nodes that showing the codes changed; None where the runtime cannot say.
        samples: that were looked at.
        codes_shown: whether the runtime shows codes at all.
        batch: the inputs as the runtime seems to see them, where that is a finding.
    """

    verdict: str = IDENTICAL
    findings: list[Finding] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    probed: int = 0
    refused: int = 0
    taps_changed: list[str] | None = None
    samples: int = 0
    codes_shown: bool = True
    batch: dict[str, Tensor] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the report: ``parity.explanation``."""
        shown = {"verdict", "sites", "probed", "refused", "taps_changed", "samples", "codes_shown"}
        return {k: getattr(self, k) for k in shown} | {"findings": [asdict(f) for f in self.findings]}


class Explainer:
    """Looks into one session.

    Args:
        session: open.
        simulated: from `simulation.simulate`, in eval mode.
        plan: its quantization.
        batch: a few samples.
        output: name of the model's output.
        sources: from `probing.quantizer_sources`; without it no quantizer is run alone.

    Attributes:
        forced: the simulation in FP64 with the causes found so far built in.
        accumulators: op -> cause, for accumulators that differ.
        refused: ops without integers in the artifact.
    """

    def __init__(
        self,
        session: Session,
        simulated: nn.Module,
        plan: Plan,
        batch: Batch,
        output: str,
        sources: Mapping[str, tuple[str, ...]] | None = None,
        on_step: Callable[[str], None] | None = None,
    ) -> None:
        self.session, self.simulated, self.plan, self.output = session, simulated, plan, output
        self.batch: dict[str, Tensor] = dict(batch)
        self.sources = dict(sources or {})
        self._say = on_step or (lambda _text: None)
        self.forced = Forced(simulated, plan)
        self.accumulators: dict[str, AccumulatorFault] = {}
        self.refused: list[str] = []
        self.quantizers: dict[str, QuantizerFault] = {}
        self.sound: set[str] = set()  # quantizers that were run alone, and are right
        self._fitted: list[str] = []
        self.codes: dict[str, Array] = {}
        self.tolerance: dict[str, float] = {}

    def reference_pass(self) -> Forced:
        """The simulation in FP64 without any cause built in."""
        return Forced(self.simulated, self.plan)

    def explain(self) -> Explanation:
        """All steps."""
        with torch.no_grad():
            return self._explain()

    def _explain(self) -> Explanation:
        found = Explanation(samples=len(next(iter(self.batch.values()))))
        feeds = {name: tensor.numpy() for name, tensor in self.batch.items()}
        self._say("codes and output of the runtime")
        self.codes = self.session.codes(feeds)
        self.shown = torch.from_numpy(np.asarray(self.session.run(feeds)[self.output]))
        found.codes_shown = bool(self.codes)
        if isinstance(self.session, TapCheck):
            self._say("does showing codes change what is fused?")
            found.taps_changed = self.session.taps_changed()
        self._say("teacher-forced accumulators")
        self._accumulators()
        self._say("quantizers alone")
        found.probed, found.refused = self._probe()
        stale = self._stale()
        if stale is not None:
            found.findings.append(stale)
        if self.codes:
            self._noise()
            if stale is None:
                self._say("the simulation forced through the runtime's codes")
                self._bisect(found)
                self._other_scales(found)
            else:
                found.sites, _ = self._pass(found)
        elif stale is None:
            self._without_codes(found)
        self._leftovers(found)
        self._judge(found)
        return found

    # ---- evidence -------------------------------------------------------------------------------------------

    def _accumulators(self) -> None:
        with recorded_codes(self.simulated) as codes:
            self.simulated(**self.batch)
        weights = {name: c.numpy() for name, c in weight_codes(self.simulated).items()}
        for op, expected, actual in forced_accumulators(self.session, self.simulated, self.plan, codes):
            if actual is None:
                self.refused.append(op.name)
            elif not np.array_equal(expected, actual):
                self.accumulators[op.name] = self._named(op, expected, actual, codes, weights)

    def _named(
        self, op: Op, expected: Array, actual: Array, codes: Mapping[str, Tensor], weights: Mapping[str, Array]
    ) -> AccumulatorFault:
        (left, _), (right, role) = op.sites
        lhs = codes[left].numpy() - int(self.plan.sites[left].zero_point)
        if op.kind == "conv":
            lhs, rhs, expected, actual = _as_matrices(lhs, weights[right], expected, actual)
            if lhs is None:
                return AccumulatorFault("wrong-weights", "the products are those of other weights", exact=False)
            return classify_accumulators(expected, actual, lhs, rhs)
        if role == "weight":
            return classify_accumulators(expected, actual, lhs, weights[right].T)
        return classify_accumulators(
            expected, actual, lhs, codes[right].numpy() - int(self.plan.sites[right].zero_point)
        )

    def _probe(self) -> tuple[int, int]:
        """Run every static quantizer alone; without that, those that read the model's input, through the model."""
        probed = refused = 0
        for name, site in self.plan.sites.items():
            if site.role == "weight" or site.grid.dynamic or name in self.sound or name in self.quantizers:
                continue
            x = probe_values(site)
            try:
                if name not in self.sources or not isinstance(self.session, QuantizerProbe):
                    raise UnsupportedError(name)
                codes = self.session.quantize(name, self.sources[name], x)
                if codes.shape != x.shape:  # something in between works on whole tensors: no quantizer
                    raise UnsupportedError(name)
            except S2DDeployError:  # cannot be cut out, or what was cut out takes no plain list of values
                given = self._through_the_model(name, x)
                if given is None:
                    refused += 1
                    continue
                x, codes = given
            quantizer = FakeQuantizer.of(site)
            u = torch.from_numpy(x) / site.scale  # FP32, as QuantizeLinear is defined
            theirs = torch.from_numpy(codes.astype(np.float64))
            view = View(name, quantizer, torch.from_numpy(x), u.double(), float(site.zero_point), theirs)
            probed += 1
            group = [name, *self._sharing(name)]
            if torch.equal(view.codes(), theirs):
                self.sound.update(group)
                continue
            fault = classify_quantizer(view, 0.0)
            if fault is not None:
                self.quantizers.update(dict.fromkeys(group, fault))
        return probed, refused

    def _sharing(self, site: str) -> list[str]:
        """Other sites of the same quantizer."""
        source, shown = self.sources.get(site), self.codes.get(site)
        return [
            name
            for name in self.plan.sites
            if name != site
            and (
                (source is not None and self.sources.get(name) == source)
                or (shown is not None and self.codes.get(name) is shown)
            )
        ]

    def _through_the_model(self, site: str, x: Array) -> tuple[Array, Array] | None:
        """Ties fed to a quantizer that reads an input of the model; None for any other quantizer."""
        names = set(self.sources.get(site, ())) & set(self.batch)
        if not names or not self.codes or site not in self.codes:
            return None
        (name,) = names
        tensor = self.batch[name]
        if self.codes[site].shape != tuple(tensor.shape) or not tensor.is_floating_point():
            return None
        fed = np.resize(x, tensor.numel()).astype(np.float32).reshape(tuple(tensor.shape))
        feeds = {n: t.numpy() for n, t in self.batch.items()} | {name: fed}
        return fed, self.session.codes(feeds)[site]

    def _stale(self) -> Finding | None:
        if isinstance(self.session, Described):
            found = self.session.facts().get("s2d.plan_sha256", "")
            if found and found != self.plan.digest():
                return Finding(
                    "stale-artifact",
                    "*",
                    None,
                    f"it was built from the plan {found[:12]}, this one is {self.plan.digest()[:12]}",
                    "the digest in the artifact",
                    confirmed=True,
                )
        stored = [
            op
            for op in self.plan.ops.values()
            if op.kind in ("linear", "conv") and f"{op.name}.weight" in self.plan.sites
        ]
        other = [n for n, fault in self.accumulators.items() if fault.cause == "wrong-weights"]
        if len(stored) > 2 and len(other) > _FEW * len(stored):
            return Finding(
                "stale-artifact",
                "*",
                None,
                f"{len(other)} of {len(stored)} layers multiply other weights",
                "accumulators",
                confirmed=True,
            )
        scales = [n for n, fault in self.quantizers.items() if fault.cause in ("wrong-scale", "wrong-zero-point")]
        if len(self.sound) + len(self.quantizers) > 2 and len(scales) > _FEW * (len(self.sound) + len(self.quantizers)):
            return Finding(
                "stale-artifact",
                "*",
                None,
                f"{len(scales)} quantizers have other scales",
                "quantizers run alone",
                confirmed=True,
            )
        return None

    def _noise(self) -> None:
        """What FP32 does to each site's values: the simulation in FP32 and FP64, both forced through the same codes."""
        single = Forced(self.simulated, self.plan, torch.float32)
        few = {name: tensor[:2] for name, tensor in self.batch.items()}
        codes = {n: c[: 2 * len(c) // len(next(iter(self.batch.values())))] for n, c in self.codes.items()}
        seen: dict[str, Tensor] = {}
        a = single.run(few, self.output, codes, lambda v: seen.__setitem__(v.site, v.u))

        def compare(view: View) -> None:
            noise = float((view.u - seen.pop(view.site)).abs().max())
            self.tolerance[view.site] = min(NOISE * noise + _FLOOR, 0.25)

        b = self.forced.run(few, self.output, codes, compare)
        if a is not None and b is not None:
            unit = max(float(self.shown.std()), 1e-12) / 127.0
            self.tolerance[OUTPUT] = NOISE * float((a - b).abs().max()) / unit + 10 * _FLOOR

    # ---- the forced pass ------------------------------------------------------------------------------------

    def _pass(self, found: Explanation) -> tuple[list[dict[str, Any]], View | None]:
        """Every site of one forced pass, and the first view with wrong codes."""
        rows: list[dict[str, Any]] = []
        first: list[View] = []

        def see(view: View) -> None:
            if view.theirs is None:
                return
            row, wrong = self._row(view)
            rows.append(row)
            if wrong and not first:
                first.append(view)

        result = self.forced.run(found.batch or self.batch, self.output, self.codes, see)
        if result is not None:
            # Behind a factor that was found from codes, the output is off by that factor's last digits.
            corrected = len(self.forced.products) > 0 or len(self.forced.quantizers) > 0
            slack = 3 * self._slack() if self._fitted else _AFTER_A_FACTOR if corrected else 0.0
            target = output_target(result, self.shown, self.tolerance[OUTPUT] + slack)
            off = target.wrong(0.0)
            wrong = int(off.sum())
            wrong = 0 if self._fitted and wrong <= 0.005 * off.numel() else wrong
            rows.append(
                {
                    "site": OUTPUT,
                    "checked": off.numel(),
                    "flipped": 0,
                    "wrong": wrong,
                    "away": float((target.u - target.v).abs().max()),
                    "tolerance": self.tolerance[OUTPUT],
                }
            )
        return rows, first[0] if first else None

    def _row(self, view: View) -> tuple[dict[str, Any], int]:
        fault = self.quantizers.get(view.site) if view.site in self.forced.quantizers else None
        u = view.u if fault is None or fault.factor is None else view.u / fault.factor
        predicted = view.codes() if fault is None else fault.codes(view)
        tolerance = self.tolerance.get(view.site, _FLOOR) + self._slack()
        off = torch.ne(predicted, view.theirs) if view.theirs is not None else torch.zeros_like(u, dtype=torch.bool)
        wrong = wrong_codes(view, tolerance, predicted, u)
        if fault is not None and fault.cause == "rounding-mode":
            wrong = off & ((u - torch.floor(u) - 0.5).abs() > tolerance)
        away = (u - torch.floor(u) - 0.5).abs()[off]
        count = int(wrong.sum())
        # A fit leaves a little: single codes next to where it was made are its own.
        if self._fitted and count <= 0.002 * off.numel():
            count = 0
        return {
            "site": view.site,
            "checked": off.numel(),
            "flipped": int(off.sum()) - count,
            "wrong": count,
            "away": float(away.max()) if away.numel() else 0.0,
            "tolerance": tolerance,
        }, count

    def _slack(self) -> float:
        return _AFTER_A_FIT if self._fitted else 0.0

    def _bisect(self, found: Explanation) -> None:
        for site in [n for n, s in self.plan.sites.items() if s.role != "weight" and n not in self.codes]:
            self.forced.passed.add(site)
            found.findings.append(
                Finding(
                    "fallback",
                    self.plan.sites[site].op,
                    site,
                    "the artifact quantizes nothing here",
                    "codes that it shows",
                )
            )
        for _ in range(_FAULTS):
            found.sites, view = self._pass(found)
            output_wrong = found.sites[-1]["site"] == OUTPUT and found.sites[-1]["wrong"]
            if view is None and not output_wrong:
                found.findings = [_confirmed(f) for f in found.findings]
                return
            site = view.site if view is not None else OUTPUT
            last = found.findings[-1] if found.findings else None
            if last is not None and last.site == site and last.layer in self._fitted:
                return  # a fit that explains most of it, and no second fault in the same place
            if not self._find(found, site, view) and not self._find_with_scales(found, site):
                found.findings.append(self._unknown(found, site, view))
                return

    def _find_with_scales(self, found: Explanation, site: str) -> bool:
        """Two scales at once: the one found before is in its product, too, and this site has another one of its own."""
        for op in self._candidates(found, site):
            left = self.plan.ops[op].sites[0][0]
            fault = self.quantizers.get(left)
            if (
                fault is None
                or fault.factor is None
                or left not in self.forced.quantizers
                or op in self.forced.products
            ):
                continue
            factor = fault.factor
            self.forced.products[op] = lambda _left, _right, product, f=factor: product * f  # type: ignore[misc]
            self._fitted.append(op)
            _, view = self._pass(found)
            if view is None or view.site != site or site in self.sound:
                return True
            own = classify_quantizer(view, self.tolerance.get(site, _FLOOR) + self._slack())
            if own is not None:
                self._add_quantizer(found, site, own, "codes, with the scale found before in its product, too")
                return True
            del self.forced.products[op]
            self._fitted.remove(op)
        return False

    def _other_scales(self, found: Explanation) -> None:
        """Quantizers that cannot be run alone show their scales one behind the other: too many for single faults."""
        scales = {f.site for f in found.findings if f.cause in ("wrong-scale", "wrong-zero-point")}
        if len(scales) > 2 and len(scales) >= len(found.findings) - 1:
            text = (
                f"{len(scales)} places have other scales, the first {found.findings[0].layer}; the search ended there"
            )
            evidence = found.findings[0].evidence
            found.findings = [Finding("stale-artifact", "*", found.findings[0].site, text, evidence)]

    def _candidates(self, found: Explanation, site: str) -> list[str]:
        """Ops between the sites before `site` and itself, the nearest last; refused and suspect ones first."""
        reach = reached_by(self.forced, found.batch or self.batch, self.output, self.codes)
        self._reach = reach
        before: set[str] = set()
        for name, ops in reach.items():
            if name == site:
                break
            before |= ops
        new = [op for op in self.plan.ops if op in reach.get(site, set()) - before]
        if not new:
            new = [op for op in self.plan.ops if op in reach.get(site, set())][-2:]
        return sorted(new, key=lambda op: (op not in self.accumulators, op not in self.refused))

    def _find(self, found: Explanation, site: str, view: View | None) -> bool:
        """Name the fault that `site` shows first, and build it into the pass."""
        candidates = self._candidates(found, site)
        for op in candidates:
            if op in self.accumulators and op not in self.forced.products:
                fault = self.accumulators[op]
                self._use_accumulators(op)
                found.findings.append(Finding(fault.cause, op, site, fault.detail, "teacher-forced accumulators"))
                return True
        if view is not None and site in self.quantizers and site not in self.forced.quantizers:
            alone = self.quantizers[site]
            closer = classify_quantizer(view, self.tolerance.get(site, _FLOOR)) if alone.factor is not None else None
            if closer is not None and closer.factor is not None:
                alone = closer  # the data enclose the factor more closely than the few values of the probe
            self._add_quantizer(found, site, alone, "the quantizer run alone")
            return True
        if view is not None and site not in self.sound and site not in self.forced.quantizers:
            behind = classify_quantizer(view, self.tolerance.get(site, _FLOOR))
            if behind is not None and self._is_quantizer(candidates, site, behind):
                also = () if behind.factor is None else self._same_by_product(found, candidates, site)
                text = "codes behind the values that the simulation has in front of it"
                self._add_quantizer(found, site, behind, text, also)
                return True
        for op in candidates:
            if op in self.forced.products:
                continue
            self._say(f"hypotheses for {op}")
            named = classify_op(self._segment(found, site), op, refused=op in self.refused)
            if named is not None:
                self.forced.products[op] = named.product
                if named.fitted:
                    self._fitted.append(op)
                found.findings.append(
                    Finding(named.cause, op, site, named.detail, "the codes behind it, hypothesis by hypothesis")
                )
                return True
        if found.batch is None and (not self._reach.get(site) or site.endswith(".probs")):
            given = classify_input(self._segment(found, site))
            if given is not None:
                found.batch = given.batch
                self._fitted.append("input")
                found.findings.append(
                    Finding("preprocessing", "input", site, given.detail, "the first codes of the model")
                )
                return True
        return False

    def _is_quantizer(self, candidates: list[str], site: str, fault: QuantizerFault) -> bool:
        """Codes in another order behind a product are the product's; a scale with no product before it, the input's.

        Inputs without floats (token ids) have no scale: then it is the quantizer's all the same.
        """
        if fault.cause == "swapped-axis":
            return not candidates
        floats = any(tensor.is_floating_point() for tensor in self.batch.values())
        return fault.cause != "wrong-scale" or bool(candidates) or bool(self._reach.get(site)) or not floats

    def _same_by_product(self, found: Explanation, candidates: list[str], site: str) -> tuple[str, ...]:
        """Products whose wrong scale would have made the same codes as the quantizer's."""
        segment = self._segment(found, site)
        return tuple(op for op in candidates if common_factor(segment, op) is not None)

    def _segment(self, found: Explanation, site: str) -> Segment:
        tolerance = self.tolerance.get(site, _FLOOR) + self._slack()
        return Segment(self.forced, found.batch or self.batch, self.codes, self.output, self.shown, site, tolerance)

    def _add_quantizer(
        self, found: Explanation, site: str, fault: QuantizerFault, evidence: str, also: tuple[str, ...] = ()
    ) -> None:
        for name in (site, *self._sharing(site)):
            self.quantizers[name] = fault
            self.forced.quantizers[name] = fault.codes
        detail = fault.detail
        if also:
            detail += f" (or the result of {', '.join(also)} is off by its inverse: these codes cannot tell)"
        found.findings.append(Finding(fault.cause, self.plan.sites[site].op, site, detail, evidence, also=also))

    def _use_accumulators(self, op: str) -> None:
        """From now on the op's product is what the runtime's kernel accumulates, times the plan's scales."""
        unit = accumulator_unit(self.forced, op)
        (left, _), (right, role) = self.plan.ops[op].sites
        sites = self.plan.sites

        def codes(name: str, value: Tensor) -> Array:
            site = sites[name]
            dtype = np.int8 if site.grid.signed else np.uint8
            result: Array = (torch.round(value / site.scale.double()) + int(site.zero_point)).numpy().astype(dtype)
            return result

        def product(lhs: Tensor, rhs: Tensor, plan: Tensor) -> Tensor:
            given = None if role == "weight" else codes(right, rhs.detach())
            sums = self.session.accumulate(op, codes(left, lhs.detach()), given)
            return torch.from_numpy(sums.astype(np.float64)).to(plan.dtype) * (1.0 if unit is None else unit)

        self.forced.products[op] = product

    def _unknown(self, found: Explanation, site: str, view: View | None) -> Finding:
        row = next(r for r in found.sites if r["site"] == site)
        share = row["wrong"] / max(row["checked"], 1)
        ops = self._candidates(found, site)
        layer = ops[-1] if ops else (self.plan.sites[site].op if view is not None else OUTPUT)
        largest = (
            float((view.codes() - view.theirs).abs().max()) if view is not None and view.theirs is not None else 0.0
        )
        if view is not None and largest <= 1 and share < 0.05:
            text = f"values in front of {site} differ by more than rounding explains ({share:.2%} of its codes, by one)"
            return Finding("float-operators", layer, site, text, "the forced pass; no hypothesis fits")
        if not self._reach.get(site):
            return Finding(
                "preprocessing", "input", site, "another input, in a way not known here", "no product lies before it"
            )
        return Finding(
            "unknown", layer, site, f"{share:.1%} of its codes are wrong; no hypothesis fits", "the forced pass"
        )

    # ---- the end --------------------------------------------------------------------------------------------

    def _without_codes(self, found: Explanation) -> None:
        """Nothing to force: accumulators, and the output of both simulations beside the runtime's."""
        for op, fault in self.accumulators.items():
            evidence = "teacher-forced accumulators"
            found.findings.append(Finding(fault.cause, op, None, fault.detail, evidence, fault.exact))
        single = Forced(self.simulated, self.plan, torch.float32).run(self.batch, self.output)
        double = self.forced.run(self.batch, self.output)
        if single is None or double is None or any(s.role != "weight" for s in self.plan.sites.values()):
            return  # with quantized activations, flips that nobody shows may move the output by any amount
        unit = max(float(self.shown.std()), 1e-12) / 127.0
        tolerance = NOISE * float((single - double).abs().max()) / unit + 10 * _FLOOR
        wrong = int(output_target(double, self.shown, tolerance).wrong(0.0).sum())
        if wrong and not found.findings:
            share = wrong / self.shown.numel()
            text = f"{share:.1%} of the output is not the simulation's; the runtime shows no codes to look further"
            found.findings.append(Finding("unknown", OUTPUT, None, text, "the output alone"))

    def _leftovers(self, found: Explanation) -> None:
        """What was seen directly, but changed no code of these samples."""
        if any(f.cause == "stale-artifact" for f in found.findings):
            return
        named = {f.layer for f in found.findings}
        for op, fault in self.accumulators.items():
            if op not in named:
                found.findings.append(
                    Finding(fault.cause, op, None, fault.detail, "teacher-forced accumulators", fault.exact)
                )
        done = {s for f in found.findings if f.site for s in (f.site, *self._sharing(f.site))}
        for site, quantizer in self.quantizers.items():
            if site not in done and site not in self.forced.quantizers:
                op = self.plan.sites[site].op
                found.findings.append(
                    Finding(quantizer.cause, op, site, quantizer.detail, "the quantizer run alone", True)
                )
                done |= {site, *self._sharing(site)}
        named = {f.layer for f in found.findings}
        executed = {op.name: op for op in self._audit_mismatches()}
        for op in dict.fromkeys([*self.refused, *executed]):
            if op not in named:
                how = executed.get(op)
                text = (
                    f"runs in {how.precision} ({how.kernel}), declared {how.declared}"
                    if how
                    else "has no integer kernel in the artifact"
                )
                found.findings.append(Finding("fallback", op, None, text, "the audit of the artifact", True))

    def _audit_mismatches(self) -> list[Any]:
        try:
            return self.session.audit().mismatches()
        except S2DDeployError:
            return []

    def _judge(self, found: Explanation) -> None:
        order = {name: i for i, name in enumerate(self.plan.ops)}
        found.findings.sort(key=lambda f: order.get(f.layer, -1))
        if found.findings:
            known = any(f.cause not in ("unknown", "float-operators") for f in found.findings)
            found.verdict = FAULT if known else UNEXPLAINED
        elif any(row["flipped"] for row in found.sites):
            found.verdict = ROUNDING


def _confirmed(finding: Finding) -> Finding:
    return Finding(**(asdict(finding) | {"confirmed": True}))


def _as_matrices(lhs: Array, weight: Array, expected: Array, actual: Array) -> tuple[Any, Any, Any, Any]:
    """A convolution whose kernels tile the image, as a matrix product; Nones for any other."""
    b, c, h, w = lhs.shape
    o, per_group, kh, kw = weight.shape
    if per_group != c or h % kh or w % kw or expected.shape != (b, o, h // kh, w // kw):
        return None, None, expected, actual
    rows = lhs.reshape(b, c, h // kh, kh, w // kw, kw).transpose(0, 2, 4, 1, 3, 5).reshape(b, -1, c * kh * kw)
    return (
        rows,
        weight.reshape(o, -1).T,
        expected.transpose(0, 2, 3, 1).reshape(b, -1, o),
        actual.transpose(0, 2, 3, 1).reshape(b, -1, o),
    )
