"""The probe "conditioning": how stretched out the loss is in each layer's weights, and where it loses directions."""

import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import BadInput, NothingMeasured
from corollary.evidence import Coverage, Finding, Measurement, Need, Range, Subject, probe
from corollary.geometry.affine import as_graph, local_rows, sample_size
from corollary.geometry.conditioning_pictures import bands_figure, skips_figure
from corollary.geometry.frozen import downstream, single_output
from corollary.geometry.layer_operator import weight_layers
from corollary.geometry.patterns import smooth_nodes
from corollary.geometry.perturbation import RIEDI
from corollary.geometry.singular_values import (
    ConditioningReport,
    ResidualBlock,
    condition_numbers,
    conditioning_report,
    identity_skips,
    local_singular_values,
    numeric_rank,
    refusal,
    residual_blocks,
)
from corollary.geometry.skips import SkipComparison, other_sums, skip_comparison, skip_sums, trunk, without_skips
from corollary.graph import Graph, Node

SAMPLES = 64
LARGEST = 3
"""How many singular values are found from products, of a layer whose map is too large or too slow to form."""
PRODUCTS = 240
"""Products that those take at most, as a rule."""
TRIAL_ROWS, TRIAL_SAMPLES = 16, 8
"""Rows and samples that are carried backward to see how long one row of one sample takes."""
DECOMPOSED_PER_SECOND = 1e10
"""Operations of a singular value decomposition that one busy core does in a second."""
SINGLE_PRECISION = 6.92
"""log10 of 1 / eps in float32."""


@probe(
    "conditioning",
    room="geometry",
    title="Conditioning of the local maps",
    question="In which layers is the loss stretched out, or flat in some directions of the weights?",
    needs=Need.PROGRAM,
    data="inputs",
    sources=(RIEDI,),
)
def conditioning_probe(subject: Subject) -> Finding:
    """Condition number, rank and largest singular value of the map from each layer's output to the network's."""
    x = subject.sample(SAMPLES)[0].double()
    graph = as_graph(subject.graph, x, dtype=torch.float64)
    output = single_output(graph)
    layers = {name: node for name, node in weight_layers(graph).items() if output in downstream(graph, [node])}
    own = [name for name, node in layers.items() if node is output]
    inner = {name: node for name, node in layers.items() if node is not output}
    if not inner:
        raise NothingMeasured("no layer has another one after it: the map from the last layer's output is the identity")
    row_seconds = _row_seconds(graph, x, output, inner)
    blocks_due = bool(skip_sums(graph))
    n = _affordable(len(x), output, inner, row_seconds, (0.25 if blocks_due else 0.5) * subject.budget.remaining())
    report = conditioning_report(graph, x[:n], layers=list(inner)) if n else ConditioningReport({}, _too_slow(inner))
    top = _largest(graph, x[:1], report, row_seconds, subject)
    coverage = _coverage(report, top, own, layers)
    if not coverage.measured:
        raise NothingMeasured(f"conditioning: {coverage}")
    measurements = [*_of_maps(report, coverage), *_of_largest(report, top, coverage)]
    notes = [f"Local maps at {n or 1} of {len(x)} samples drawn, in float64."]
    if top:
        notes.append(
            f"Of {', '.join(top)} only the {LARGEST} largest singular values were found, from products at one sample: "
            "the smallest cannot be had from products, and is not reported."
        )
    figures = []
    plain = ConditioningReport({}, {})
    if blocks_due:
        plain = conditioning_report(without_skips(graph)[0], x[:n], layers=list(report.values)) if n else plain
        found = _skips(graph, x, row_seconds, subject)
        measurements += found.measurements
        notes += found.notes
        figures += found.figures
    if smooth := smooth_nodes(graph):
        notes.append(f"{smooth[0].op} is smooth: the maps are of first order, and the loss is quadratic only nearby.")
    return Finding(tuple(measurements), (bands_figure(report, top, plain), *figures), tuple(notes))


def _skips(graph: Graph, x: Tensor, row_seconds: float, subject: Subject) -> Finding:
    """What the skip connections do: each block by itself, and all of them at once with and without."""
    sums, others = skip_sums(graph), other_sums(graph)
    samples = _block_samples(graph, len(x), row_seconds, 0.4 * subject.budget.remaining())
    blocks = residual_blocks(graph, x[:samples]) if samples else ()
    notes = [f"Residual blocks: {len(blocks)} of {len(identity_skips(graph))} decomposed (samples: {samples})."]
    compared, n = _compared(graph, x, row_seconds, 0.7 * subject.budget.remaining())
    if compared is None:
        notes.append("The network without its skip connections was not decomposed: too large, or too slow.")
        return Finding(tuple(_of_blocks(blocks)), (skips_figure(None, blocks),) if blocks else (), tuple(notes))
    kept = f" {len(others)} sums of two other values stay as they are (shortcuts with weights)." if others else ""
    notes.append(
        f"Without skip connections: the same weights at the same {n} samples, with zero in the place of the value that "
        f"each of the {len(sums)} residual sums skips, and the activation patterns that follow from it. The network "
        f"was not trained like this: it shows what the skips do, not what a plain network would have learned.{kept}"
    )
    measurements = (*_of_blocks(blocks), *_of_comparison(compared))
    return Finding(measurements, (skips_figure(compared, blocks),), tuple(notes))


def _compared(graph: Graph, x: Tensor, row_seconds: float, seconds: float) -> tuple[SkipComparison | None, int]:
    """The map through all blocks, or on to the output where that is all that can be afforded; and at how many samples.

    The output has fewer entries than the last block, as a rule, so that its map is formed sooner.
    """
    for to_output in (False, True):
        start, end = trunk(graph, to_output=to_output)
        m, d = sample_size(end), sample_size(start)
        n = min(len(x), int(seconds / (2 * (m * row_seconds + _decomposition_seconds(m, d)))))
        if n and not refusal(graph, start, end):
            return skip_comparison(graph, x[:n], to_output=to_output), n
    return None, 0


def _coverage(
    report: ConditioningReport, top: Mapping[str, Tensor], own: list[str], layers: Mapping[str, Node]
) -> Coverage:
    skipped = dict.fromkeys(own, "it is the output: its map is the identity")
    skipped |= {name: reason for name, reason in report.skipped.items() if name not in top}
    return Coverage(len(report.values) + len(top), len(layers), "layers", skipped)


# ------------------------------------------------------------------------------------------- what the budget allows


def _row_seconds(graph: Graph, x: Tensor, output: Node, layers: Mapping[str, Node]) -> float:
    """Seconds to carry one row of one sample back through the network, measured on a few."""
    rows, n = range(min(TRIAL_ROWS, sample_size(output))), min(TRIAL_SAMPLES, len(x))
    local_rows(graph, x[:1], output, list(layers.values()), rows)  # the first walk sets things up
    start = time.perf_counter()
    local_rows(graph, x[:n], output, list(layers.values()), rows)
    return (time.perf_counter() - start) / (len(rows) * n)


def _affordable(count: int, output: Node, layers: Mapping[str, Node], row_seconds: float, seconds: float) -> int:
    """For how many of the samples all maps can be formed and decomposed in about so many seconds."""
    m = sample_size(output)
    each = m * row_seconds + sum(_decomposition_seconds(m, sample_size(node)) for node in layers.values())
    return min(count, int(seconds / each))


def _decomposition_seconds(m: int, d: int) -> float:
    return 8.0 * min(m, d) ** 2 * max(m, d) / DECOMPOSED_PER_SECOND


def _too_slow(layers: Mapping[str, Node]) -> dict[str, str]:
    return dict.fromkeys(layers, "too slow for the time given")


def _largest(
    graph: Graph, x: Tensor, report: ConditioningReport, row_seconds: float, subject: Subject
) -> dict[str, Tensor]:
    """The largest singular values of layers that were not decomposed, as far as the budget goes."""
    found: dict[str, Tensor] = {}
    for name in report.skipped:
        if PRODUCTS * row_seconds > 0.5 * subject.budget.remaining():
            break
        try:
            found[name] = local_singular_values(graph, x, at=name, k=LARGEST, method="krylov")[0]
        except BadInput:  # fewer values than asked for, or no convergence: the layer stays among the skipped
            continue
    return found


def _block_samples(graph: Graph, count: int, row_seconds: float, seconds: float) -> int:
    """For how many of the samples the residual blocks can be decomposed in about so many seconds."""
    widths = [sample_size(skip) for _, skip, _ in identity_skips(graph)]
    each = sum(width * row_seconds + 2 * _decomposition_seconds(width, width) for width in widths)
    return min(count, int(seconds / each)) if widths else 0


# ---------------------------------------------------------------------------------------------- what is reported


def _of_maps(report: ConditioningReport, coverage: Coverage) -> list[Measurement]:
    if not report.values:
        return []
    table = report.table()
    effective = np.array(table["log10_effective_condition"])
    worst = int(effective.argmax())
    ranks, full = np.array(table["rank"]), np.array(table["singular_values"])
    losing = [name for name, rank, size in zip(report.values, ranks, full, strict=True) if rank < size]
    return [
        Measurement(
            "condition number, worst layer",
            float(effective[worst]),
            f"In the weights of {table['layer'][worst]!r} the squared loss is stretched the most: largest over "
            "smallest nonzero singular value of the map from there to the output, median over samples.",
            unit="(log10)",
            reference=Range(high=SINGLE_PRECISION, text="above it float32 cannot tell the flat directions from none"),
            coverage=coverage,
            headline=True,
        ),
        Measurement(
            "layers that lose directions",
            len(losing),
            "Layers from which fewer directions reach the output than their map has, at the median sample "
            f"({', '.join(losing) or 'none'}): there the condition number is infinite, and the one above ignores them.",
            unit=f"of {len(full)}",
            coverage=coverage,
        ),
        Measurement(
            "lowest share of directions kept",
            float((ranks / full).min()),
            "Numeric rank of a layer's map (singular values above 1e-12 of the largest) over its shorter side, lowest "
            "over the layers, median over samples.",
            coverage=coverage,
        ),
    ]


def _of_largest(report: ConditioningReport, top: Mapping[str, Tensor], coverage: Coverage) -> list[Measurement]:
    largest = {name: float(s[:, 0].median()) for name, s in report.values.items()}
    largest |= {name: float(values[0]) for name, values in top.items()}
    name = max(largest, key=lambda layer: largest[layer])
    return [
        Measurement(
            "largest singular value",
            largest[name],
            f"A unit step in the output of {name!r} moves the network's output by up to this much, the most of all "
            "layers (median over samples); the curvature in its weights grows with the square.",
            coverage=coverage,
        )
    ]


def _of_blocks(blocks: tuple[ResidualBlock, ...]) -> list[Measurement]:
    if not blocks:
        return []
    held = [block for block in blocks if bool(block.bound.isfinite().all())]
    worst = max(blocks, key=lambda block: float(block.condition.median()))
    return [
        Measurement(
            "residual blocks with a small branch",
            len(held),
            "Blocks z + branch(z) whose branch has norm q below 1 at every sample: their condition number is at most "
            "(1 + q) / (1 - q), however the block was trained.",
            unit=f"of {len(blocks)}",
        ),
        Measurement(
            "condition number, worst residual block",
            float(worst.condition.median()),
            f"Largest over smallest singular value of the block that ends in {worst.name!r}, median over samples.",
        ),
    ]


def _of_comparison(compared: SkipComparison) -> list[Measurement]:
    found = []
    middle = compared.with_skips.shape[1] // 2
    for name, s, how in (
        ("with skips", compared.with_skips, "with the skip connections"),
        ("skips removed", compared.without_skips, "with the same weights and zero in the place of each skipped value"),
    ):
        spread = condition_numbers(s[:, : middle + 1]).log10().median()
        found += [
            Measurement(
                f"spread through the blocks, {name}",
                float(spread),
                f"Largest over middle singular value of the map through all residual blocks to {compared.end}, "
                f"{how}, median over samples: how unevenly the upper half of the directions is passed on; infinite "
                "where fewer are.",
                unit="(log10)",
            ),
            Measurement(
                f"directions through the blocks, {name}",
                float(numeric_rank(s).double().median() / s.shape[1]),
                f"Share of the directions that reach {compared.end} {how} (singular values above 1e-12 of the "
                "largest), median over samples.",
            ),
        ]
    return found
