"""Metrics without models: of a file, copies of a metric as it is now, and sums of metrics at several parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from natgrad.blocks.base import Block
from natgrad.blocks.sums import copied, device_of, differences, nearest_sum
from natgrad.distributed.strategy import Strategy
from natgrad.fisher import state as metric_file
from natgrad.fisher.block_metric import BlockMetric
from natgrad.fisher.fisher import Fisher
from natgrad.linalg.tree import describe

Source = BlockMetric | str | os.PathLike[str]  # a metric, or the file of one


class FrozenMetric(BlockMetric):
    """The verbs of a metric, without the model: its parameters have names and shapes, and no values.

    Args:
        shapes: of the parameters, by name.
        blocks: its blocks, with their statistics.
        seen: data.
        reduction: of the criterion, "mean" or "sum".
        bare: parameters that have no block, and why.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        blocks: Sequence[Block],
        seen: int,
        reduction: str,
        bare: Mapping[str, str],
    ) -> None:
        held = next((b for b in blocks if b.statistics), None)
        like = torch.zeros(()) if held is None else torch.zeros((), dtype=held.dtype, device=device_of(held))
        super().__init__({n: like.expand(shape) for n, shape in shapes.items()})
        self.shapes = dict(shapes)
        self._blocks, self._driver, self.strategy = list(blocks), None, Strategy()
        self.seen, self.reduction, self.bare = seen, reduction, dict(bare)

    @property
    def blocks(self) -> list[Block]:
        return self._blocks

    @property
    def ready(self) -> list[Block]:
        """The blocks that have statistics.

        Raises:
            RuntimeError: the metric has seen no data.
        """
        return self._ready()

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        return next(iter(self.parameters.values())).device

    @property
    def data(self) -> int:
        """n, for which n ĝ is the curvature of all the data: 1 for a criterion that adds them up already."""
        return self.seen if self.reduction == "mean" else 1

    def copy(self, device: torch.device | None = None) -> FrozenMetric:
        """Return the same with statistics of its own, on a device."""
        blocks = [copied(b, self.shapes) for b in self.ready]
        for block in blocks:
            block.move(device or self.device, block.dtype)
        return self.over(blocks)

    def over(self, blocks: Sequence[Block]) -> FrozenMetric:
        """Return the same with other blocks."""
        return FrozenMetric(self.shapes, blocks, self.seen, self.reduction, self.bare)


def read(path: str | os.PathLike[str]) -> FrozenMetric:
    """Return the metric in a file that `natgrad.Fisher.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no metric, or of another format.
    """
    about, state = metric_file.opened(metric_file.load(path))
    shapes = {n: torch.Size(s) for n, s in about["parameters"].items()}
    blocks = metric_file.blocks_from(about, state["tensors"], shapes, torch.device("cpu"))
    held = {n for b in blocks if b.statistics for n in b.names}
    bare = {n: "its file has no block for it" for n in shapes if n not in held}
    return FrozenMetric(shapes, blocks, about["seen"], about["reduction"], bare)


def frozen(metric: Source, what: str) -> FrozenMetric:
    """Return a metric without its model. It shares the blocks of the metric that is given; `copy` parts them.

    Args:
        metric: a metric made of blocks, or the path of its file.
        what: who asks, for messages.

    Raises:
        TypeError: it is neither.
        RuntimeError: it has seen no data, or is sharded.
        FileNotFoundError, ValueError: as `read`.
    """
    if isinstance(metric, (str, os.PathLike)):
        metric = read(metric)
    if not isinstance(metric, BlockMetric):
        raise TypeError(
            f"{what} takes an ng.Fisher, or the path of a file that its save() wrote, got {describe(metric)}; other "
            "metrics keep no blocks of layers"
        )
    shapes, blocks = {n: p.shape for n, p in metric.parameters.items()}, metric._ready()
    if isinstance(metric, Fisher):
        bare = {row.parameter: row.why for row in metric.coverage().without_curvature()}
        return FrozenMetric(shapes, blocks, metric.seen, metric.likelihood.reduction, bare)
    assert isinstance(metric, FrozenMetric)
    return metric


def block_for_block(metrics: Mapping[str, FrozenMetric], what: str) -> list[list[Block | None]]:
    """Return, for each block that any of the metrics has, that block of every metric; None where one has not seen it.

    Raises:
        ValueError: the metrics are of other parameters, or keep them otherwise; the message names the differences.
    """
    said: list[str] = []
    first_name, first = next(iter(metrics.items()))
    for name, metric in metrics.items():
        said += shape_differences(first_name, first.shapes, name, metric.shapes)
    keys = list(dict.fromkeys(b.key for m in metrics.values() for b in m.ready))
    rows: list[list[Block | None]] = []
    for key in keys:
        row = [next((b for b in m.ready if b.key == key), None) for m in metrics.values()]
        of = [(n, b) for n, b in zip(metrics, row) if b is not None]
        for other, block in of[1:]:
            said += [f"block {key}: {d} ({of[0][0]!r}, {other!r})" for d in differences(of[0][1], block)]
        rows.append(row)
    if not said:  # a bias that only one of them has seen beside its weight
        owners: dict[str, str] = {}
        for metric in metrics.values():
            for block in metric.ready:
                for piece in map(str, block.pieces):
                    if owners.setdefault(piece, block.key) != block.key:
                        said.append(f"{piece} is in the block of {owners[piece]} and in that of {block.key}")
    if said:
        raise ValueError(f"{what}: the metrics have different layouts: " + "; ".join(dict.fromkeys(said)))
    return rows


def shape_differences(
    first: str, mine: Mapping[str, torch.Size], other: str, theirs: Mapping[str, torch.Size]
) -> list[str]:
    said = []
    if lacks := [n for n in mine if n not in theirs]:
        said.append(f"{other!r} lacks {lacks}, which {first!r} has")
    if more := [n for n in theirs if n not in mine]:
        said.append(f"{first!r} lacks {more}, which {other!r} has")
    return said + [
        f"{n} has shape {tuple(mine[n])} in {first!r} and {tuple(theirs[n])} in {other!r}"
        for n in mine
        if n in theirs and mine[n] != theirs[n]
    ]


def summed(parts: Sequence[tuple[float, Block | None]], shapes: Mapping[str, torch.Size]) -> Block:
    """Return Σ cᵢ ĝᵢ over the blocks that there are, the nearest where the structure is not closed under sums."""
    return nearest_sum([(c, b) for c, b in parts if b is not None], shapes)
