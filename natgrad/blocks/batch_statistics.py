"""What one batch says of every block, before it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.average import Statistics
from natgrad.blocks.base import Block

Streams = list[tuple[torch.Generator, Tensor]]  # random generators and their states


@dataclass
class BatchStatistics:
    """What one output says of every block; counts once the loss is backpropagated."""

    statistics: list[tuple[Block, Statistics]]
    data: int
    masses: dict[str, Tensor] = field(default_factory=dict)  # of the loss terms, by head; none for a sum
    remote_blocks: list[Block] = field(default_factory=list)  # whose statistics other ranks own
    nats: Tensor | None = None  # (Σ m u, Σ m) of `CriterionLikelihood.nats`, over all loss terms
    labels: int = 0  # one a datum and position
    output: tuple[Any, ...] = ()  # which output of which forward pass it is of
    start: Streams = field(default_factory=list)  # where its random numbers begin
    streams: Streams = field(default_factory=list)  # and where they end

    def sums(self) -> list[Tensor]:
        return [s for _, new in self.statistics for average in new.values() for s in average.sums.values()]

    @property
    def finite(self) -> bool:
        """Whether no statistic holds NaN or Inf."""
        sums = self.sums()
        return not sums or bool(torch.isfinite(torch.stack(torch._foreach_norm(sums))).all())


def merge(blocks: Sequence[Block], batches: Sequence[BatchStatistics], plain: bool) -> BatchStatistics:
    """Return several batches as one. `plain`: sums are never divided."""
    statistics: list[tuple[Block, Statistics]] = []
    masses: dict[str, Tensor] = {}
    for block in blocks:
        parts = [new for batch in batches for held, new in batch.statistics if held is block]
        if parts:
            statistics.append((block, block.merged(parts, plain)))
    for batch in batches:
        for source, mass in batch.masses.items():
            masses[source] = masses[source] + mass if source in masses else mass
    for block, new in statistics if len(batches) > 1 else ():
        for key, average in new.items():
            for source in average.sums.keys() & masses.keys() if not block.is_mean(key) else ():
                average.weigh(masses[source], source)  # a block's gradient is zero in batches that do not know it
    nats = [batch.nats for batch in batches if batch.nats is not None]
    return BatchStatistics(
        statistics,
        sum(batch.data for batch in batches),
        masses,
        nats=torch.stack(nats).sum(0) if nats else None,
        labels=sum(batch.labels for batch in batches),
    )


def each_output_once(batches: Sequence[BatchStatistics], plain: bool) -> list[BatchStatistics]:
    """Return batches where several of one output, as of two sets of labels that are mixed, count as one together.

    The metric is the criterion's and not that of its multiples, so they are averaged. `plain`: sums are never divided.
    """
    times = Counter(batch.output for batch in batches if batch.output)
    found, seen = [], set()
    for batch in batches:
        if (k := times.get(batch.output, 1)) > 1:
            first = batch.output not in seen
            seen.add(batch.output)
            batch = replace(
                batch,
                statistics=[(b, shared_out(b, new, k)) for b, new in batch.statistics] if plain else batch.statistics,
                nats=batch.nats / k if plain and batch.nats is not None else batch.nats,
                data=batch.data if first else 0,
                labels=batch.labels if first else 0,
            )
        found.append(batch)
    return found


def shared_out(block: Block, statistics: Statistics, times: int) -> Statistics:
    """Statistics divided by a number, but for what is a mean."""
    found = {}
    for key, average in statistics.items():
        found[key] = average
        if not block.is_mean(key):
            found[key] = average.copy()
            found[key].sums = {h: s / times for h, s in average.sums.items()}
    return found


def go_on(streams: Streams) -> None:
    """Let random generators go on from these states."""
    for generator, state in streams:
        generator.set_state(state)
