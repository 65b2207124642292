"""The coverage table: what the metric holds of each parameter, and why not more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from natgrad.blocks import collection as limits
from natgrad.blocks import kronecker as kronecker_blocks
from natgrad.blocks.collection import BlockCollection
from natgrad.fisher.backward_pass import PER_DATUM


@dataclass(frozen=True)
class CoverageRow:
    """One parameter's row."""

    parameter: str
    shape: tuple[int, ...]
    op: str  # the op that uses it, "" if none was seen
    block: str  # structure of its block; "no curvature" if it has none
    sizes: str  # sizes of the stored matrices
    memory: int  # bytes of the block's statistics (shared by the parameters of the block)
    why: str  # the reason, where the block is not the one asked for


@dataclass(frozen=True)
class Coverage:
    """Rows in the order of the metric's names; ``str()`` prints a table, ``coverage["fc.weight"]`` is one row."""

    rows: tuple[CoverageRow, ...]
    note: str = ""  # how the data were subsampled
    memory: int = 0  # bytes of all statistics, each block counted once

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> CoverageRow:
        if isinstance(key, int):
            return self.rows[key]
        for row in self.rows:
            if row.parameter == key:
                return row
        raise KeyError(f"no parameter {key!r}; there are {[r.parameter for r in self.rows]}")

    def __str__(self) -> str:
        titles = ("parameter", "shape", "op", "block", "sizes", "memory", "why")
        cells = [titles]
        for row in self:
            shape = "×".join(map(str, row.shape)) or "scalar"
            cells.append((row.parameter, shape, row.op, row.block, row.sizes, readable(row.memory), row.why))
        widths = [max(map(len, column)) for column in zip(*cells)]
        right = titles.index("memory")
        lines = [
            "  ".join(c.rjust(w) if i == right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
            for line in cells
        ]
        lines.append(f"in all {readable(self.memory)}: parameters in one block share its memory")
        return "\n".join([*lines, self.note] if self.note else lines)

    def without_curvature(self) -> Iterator[CoverageRow]:
        return (row for row in self if row.block == "no curvature")


def readable(size: int) -> str:
    """Bytes for people."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def coverage_of(parameters: Mapping[str, Tensor], collection: BlockCollection, seen: int) -> Coverage:
    """Return a row for each parameter. `seen`: data counted so far."""
    rows = tuple(row_of(n, tuple(p.shape), collection, seen) for n, p in parameters.items())
    memory = sum(b.memory() for b in collection.blocks)
    return Coverage(rows, "; ".join(notes_of(collection)), memory)


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
        limit = kronecker_blocks.TRAINING_FACTOR_DIM
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
