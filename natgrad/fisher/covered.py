"""What a Fisher metric holds of each of its parameters, for its coverage table."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from natgrad.blocks import collection as limits
from natgrad.blocks import kronecker as kronecker_blocks
from natgrad.blocks.collection import BlockCollection
from natgrad.fisher.backward_pass import PER_DATUM
from natgrad.fisher.coverage import Coverage, CoverageRow


def coverage_of(parameters: Mapping[str, Tensor], collection: BlockCollection, seen: int) -> Coverage:
    """Return a row for each parameter. `seen`: data counted so far."""
    rows = tuple(row_of(n, tuple(p.shape), collection, seen) for n, p in parameters.items())
    return Coverage(rows, "; ".join(notes_of(collection)))


def notes_of(collection: BlockCollection) -> list[str]:
    """How data are subsampled and what is kept of large sides."""
    notes = []
    if collection.max_positions is not None:
        notes.append(f"at most {collection.max_positions} rows of a call enter a Kronecker factor")
    elif collection.trains and collection.sampled:
        notes.append(
            f"while an optimizer trains, at most {limits.TRAINING_ROWS} rows of a call enter a Kronecker factor, or "
            "as many as its larger side has"
        )
    if any(isinstance(b, kronecker_blocks.KroneckerBlock) and b.cut_in_training for b in collection.blocks):
        limit = kronecker_blocks.TRAINING_SIDE
        notes.append(f"while an optimizer trains, a side longer than {limit} is kept as blocks")
    return notes


def row_of(name: str, shape: tuple[int, ...], collection: BlockCollection, seen: int) -> CoverageRow:
    held = [(b, layer) for b in collection.blocks for layer in b.layers if name in layer.names]
    use = collection.uncovered.get(name)
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
    why = "no forward pass has used it yet" if not seen else "unused"
    return CoverageRow(name, shape, "", "not seen", "", 0, why)
