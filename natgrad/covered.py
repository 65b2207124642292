"""What a Fisher metric holds of each of its parameters, for its coverage table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from natgrad import curvature, kronecker_blocks
from natgrad.coverage import Coverage, CoverageRow
from natgrad.curvature import PER_DATUM

if TYPE_CHECKING:
    from natgrad.fisher import Fisher


def coverage_of(metric: Fisher) -> Coverage:
    return Coverage(tuple(row_of(metric, n) for n in metric.parameters), "; ".join(notes_of(metric)))


def notes_of(metric: Fisher) -> list[str]:
    """How data are subsampled and what is kept of large sides."""
    notes = []
    if metric.curvature.max_positions is not None:
        notes.append(f"at most {metric.curvature.max_positions} rows of a call enter a Kronecker factor")
    elif metric.curvature.trains and metric.kind == "sampled":
        notes.append(
            f"while an optimizer trains, at most {curvature.TRAINING_ROWS} rows of a call enter a Kronecker factor, or "
            "as many as its larger side has"
        )
    if any(isinstance(b, kronecker_blocks.KroneckerBlock) and b.cut_in_training for b in metric.blocks):
        limit = kronecker_blocks.TRAINING_SIDE
        notes.append(f"while an optimizer trains, a side longer than {limit} is kept as blocks")
    return notes


def row_of(metric: Fisher, name: str) -> CoverageRow:
    shape = tuple(metric.parameters[name].shape)
    held = [(b, layer) for b in metric.blocks for layer in b.layers if name in layer.names]
    use = metric.curvature.uncovered.get(name)
    if held:
        blocks = list(dict.fromkeys(b for b, _ in held))
        memory = sum(b.memory() for b in blocks)
        ops = ", ".join(dict.fromkeys(layer.op for _, layer in held))
        why = f"no op rule covers its use (reached through {use.used_by})" if use and ops == PER_DATUM else ""
        sizes = ", ".join(b.sizes() for b in blocks if b.known)
        return CoverageRow(name, shape, ops, blocks[0].structure, sizes, memory, why)
    if use is not None:
        why = f"no op rule covers its use (reached through {use.used_by}); optimizers train it by an Adam-like rule"
        return CoverageRow(name, shape, "", "no curvature", "", 0, why)
    why = "no forward pass has used it yet" if not metric.seen else "unused"
    return CoverageRow(name, shape, "", "not seen", "", 0, why)
