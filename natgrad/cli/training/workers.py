"""The processes that do one run together: one, or the ranks that ``natgrad train --nproc`` starts.

Each rank takes its part of every batch; the first one watches the clock, evaluates, shows and writes, and tells the
others what they have to know to take the same turns.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Workers:
    """The ranks of the default process group, where there is one; else this process alone."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    @property
    def leads(self) -> bool:
        """Whether this is the process that evaluates, shows and writes."""
        return self.rank == 0

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model as it is to be called in training. Collective."""
        return DistributedDataParallel(model) if self.size > 1 else model

    def part(self, batch: Tensor) -> Tensor:
        """This rank's share of a batch that all ranks hold."""
        return batch if self.size == 1 else batch.chunk(self.size)[self.rank]

    def told(self, *mine: float) -> list[float]:
        """The numbers that the first rank gives, on every rank. Collective."""
        if self.size == 1:
            return list(mine)
        numbers = torch.tensor(mine, dtype=torch.float64)
        dist.broadcast(numbers, 0)
        found: list[float] = numbers.tolist()
        return found
