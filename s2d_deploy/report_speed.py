"""What the report says of speed beyond latency: throughput over batch sizes, cold start, memory, and the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from s2d_deploy import report_format as fmt
from s2d_deploy import svg
from s2d_deploy.markup import Markup, tag
from s2d_deploy.plots import Labelled, colour, figure
from s2d_deploy.report_tables import Column, cell, num, table


def roofline(results: Labelled) -> Markup | None:
    """Share of each measured latency that the machine's ceilings explain."""
    rows = [(label, r, r.roofline) for label, r in results if r.roofline and r.roofline.share is not None]
    if not rows:
        return None
    values = [100 * (roof.share or 0) for _, _, roof in rows]
    notes = [f"{fmt.percent(roof.share, 0)}, {roof.bound or ''}" for _, _, roof in rows]
    plot = svg.Rows(
        [label for label, _, _ in rows], values, "% of what this machine can do at best", zero=True, notes=notes
    )
    for i, (label, result, roof) in enumerate(rows):
        y = plot.y(i)
        title = (
            f"{label}: cannot be faster than {fmt.milliseconds(roof.floor_ms)} here, bound by {roof.bound}; "
            f"{fmt.percent(roof.share)} of that speed"
        )
        plot.add(
            svg.line(plot.scale(0), y, plot.scale(values[i]), y, f"whisker {colour(result.precision)}"),
            svg.mark(plot.scale(values[i]), y, "dot", colour(result.precision), title, r=5),
        )
    note = (
        "The least time that the multiply-accumulates take on registers, or the weights to be read from memory, "
        "over the measured median."
    )
    return figure("Share of the roofline", plot.render("Share of the roofline by target and precision"), note=note)


def throughput(results: Labelled) -> Markup | None:
    """Samples a second against the batch size, a line for each result."""
    rows = [(label, r, [t for t in r.throughput if t.samples_per_second and t.batch]) for label, r in results]
    rows = [row for row in rows if row[2]]
    if not rows:
        return None
    width, left, bottom = 580.0, 62.0, 286.0
    batches = [float(t.batch or 1) for _, _, series in rows for t in series]
    rates = [t.samples_per_second or 0.0 for _, _, series in rows for t in series]
    x = svg.spanning(batches, left + 6, width - 20, log=max(batches) > 8 * min(batches))
    y = svg.spanning(rates, bottom - 8, 14, log=max(rates) > 12 * min(rates), zero=True)
    marks = [
        *(svg.line(x(b), 8, x(b), bottom, "grid") for b in sorted(set(batches))),
        *(svg.text(x(b), bottom + 13, fmt.trimmed(b), "tick", "middle") for b in sorted(set(batches))),
        *(svg.line(left, y(v), width - 14, y(v), "grid") for v in y.ticks()),
        *(svg.text(left - 6, y(v), fmt.trimmed(v), "tick", "end") for v in y.ticks()),
        svg.text((left + width) / 2, bottom + 32, "batch size", "caption", "middle"),
    ]
    shapes = ("dot", "square", "diamond", "triangle")
    targets = list(dict.fromkeys(r.target for _, r, _ in rows))
    for label, r, series in rows:
        places = [(x(float(t.batch or 1)), y(t.samples_per_second or 0.0)) for t in series]
        marks += [svg.line(*a, *b, "link") for a, b in pairwise(places)]
        for (across, up), t in zip(places, series, strict=True):
            title = f"{label}: batch {t.batch}, {fmt.number(t.samples_per_second)} samples/s"
            shape = shapes[targets.index(r.target) % len(shapes)]
            marks.append(svg.mark(across, up, shape, colour(r.precision), title, r=5))
    precisions = list(dict.fromkeys(r.precision for _, r, _ in rows))
    key = svg.legend(
        *((shapes[i % len(shapes)], "p-neutral hollow", target) for i, target in enumerate(targets)),
        *(("dot", colour(p), p) for p in precisions),
    )
    return figure(
        "Throughput over batch sizes",
        svg.canvas(width, bottom + 44, "Samples a second against batch size", *marks),
        note="Samples a second. Higher is better.",
        key=key,
    )


def resources_table(results: Labelled) -> Markup | None:
    """Cold start, memory and the roofline in numbers."""
    shown = [(label, r) for label, r in results if r.footprint or r.roofline]
    if not shown:
        return None
    columns = [
        Column("Result"),
        Column("Import", True, "loading the runtime's libraries"),
        Column("Open", True, "loading the artifact"),
        Column("First run", True, "the first inference"),
        Column("Memory", True, "most resident memory beyond Python and the runtime"),
        Column("Process", True, "most resident memory of the process"),
        Column("Floor", True, "the least time that this machine can take"),
        Column("Of roofline", True, "floor over median latency"),
        Column("Bound by"),
    ]

    rows = []
    for label, r in shown:
        f, roof = r.footprint, r.roofline
        times = (f.import_ms, f.open_ms, f.first_run_ms) if f else (None, None, None)
        sizes = (f.memory_bytes, f.process_bytes) if f else (None, None)
        floor, share = (roof.floor_ms, roof.share) if roof else (None, None)
        rows.append(
            tag(
                "tr",
                cell(label, head=True),
                *(num(fmt.milliseconds(v), v) for v in times),
                *(num(fmt.size(v), v) for v in sizes),
                num(fmt.milliseconds(floor), floor),
                num(fmt.percent(share), share),
                cell(roof.bound if roof else None),
            )
        )
    return table("resources", "Cold start, memory, roofline", columns, rows)


def placement_table(results: Labelled) -> Markup | None:
    """What a measured placement left in float, and why: exceptions from the declared precision that were asked for."""
    placed = [
        (label, found)
        for label, r in results
        if isinstance(found := (r.model_extra or {}).get("placement"), Mapping) and found
    ]
    if not placed:
        return None
    columns = [
        Column("Result"),
        Column("Kept in float", True, "ops that were faster in float than in any integer form"),
        Column("Forms", True, "integer forms of ops in use"),
        Column("Margin", True, "how much faster a form must be to be taken"),
        Column("Why"),
        Column("Ops in float"),
    ]
    rows = []
    for label, found in placed:
        kept = found.get("kept_float")
        kept = kept if isinstance(kept, list) else []
        forms, margin = (v if isinstance(v := found.get(k), int | float) else None for k in ("forms", "margin"))
        rows.append(
            tag(
                "tr",
                cell(label, head=True),
                num(fmt.count(len(kept)), len(kept)),
                num(fmt.trimmed(forms), forms),
                num(fmt.percent(margin), margin),
                cell(fmt.anything(found.get("why")), class_="prose"),
                cell(fmt.anything(kept) if kept else "none", class_="prose"),
            )
        )
    return table("placement", "What the measured placement left in float", columns, rows)


def kernels_table(results: Labelled) -> Markup | None:
    """Share of the multiply-accumulates by the kernel that executes them, and the instruction where it was seen."""
    rows = []
    for label, r in results:
        ops = [op for op in (r.audit.ops if r.audit else []) if op.macs]
        total = sum(op.macs or 0 for op in ops)
        kinds: dict[tuple[str, str, str], int] = {}
        for op in ops:
            key = (op.kernel or "", op.instruction or "", op.precision or "")
            kinds[key] = kinds.get(key, 0) + (op.macs or 0)
        for (kernel, instruction, precision), macs in sorted(kinds.items(), key=lambda item: -item[1]):
            share = macs / total
            rows.append(
                tag(
                    "tr",
                    cell(label, head=True),
                    cell(kernel),
                    cell(instruction),
                    cell(precision),
                    num(fmt.percent(share), share),
                    num(fmt.count(macs), macs),
                )
            )
    if not rows:
        return None
    columns = [
        Column("Result"),
        Column("Kernel"),
        Column("Instruction", False, "read from the compiled code, where it was looked at"),
        Column("Executed"),
        Column("Share", True, "of the multiply-accumulates"),
        Column("MACs", True, "of one sample"),
    ]
    return table("kernels", "Multiply-accumulates by kernel", columns, rows)
