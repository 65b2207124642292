"""The coverage table: what the metric holds of each parameter, and why not more."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


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
        table = Table(box=None, pad_edge=False)
        for title in ("parameter", "shape", "op", "block", "sizes", "memory", "why"):
            table.add_column(title, justify="right" if title == "memory" else "left", overflow="fold")
        for row in self:
            table.add_row(
                row.parameter,
                "×".join(map(str, row.shape)) or "scalar",
                row.op,
                row.block,
                row.sizes,
                readable(row.memory),
                row.why,
            )
        out = io.StringIO()
        Console(file=out, width=160, color_system=None).print(table)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
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
