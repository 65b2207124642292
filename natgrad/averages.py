"""Means of statistics over everything that was added."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Average:
    """Σ_h S_h / M_h: sums of statistics over their masses, one pair for each source of terms h (one a criterion).

    A mass is a scalar tensor, or broadcasts against the sum where parts of it were seen by different numbers of rows.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    masses: dict[str, Tensor] = field(default_factory=dict)
    settled: bool = False  # one source of mass 1, as a moving average has it

    def add(self, total: Tensor, mass: Tensor | None, source: str = "") -> None:
        """`mass` None: a plain sum, which is never divided."""
        self.settled = False
        if source not in self.sums:
            self.sums[source] = total
            self.masses[source] = total.new_ones(()) if mass is None else mass.to(total)
            return
        self.sums[source] = self.sums[source] + total
        if mass is not None:
            self.masses[source] = self.masses[source] + mass.to(total)

    def weigh(self, mass: Tensor | None, source: str) -> None:
        """Divide the sum of a source by `mass`, or by nothing."""
        if mass is not None:
            self.masses[source] = mass.to(self.sums[source])
            self.settled = False

    def merge(self, other: Average, plain: bool) -> None:
        for source, total in other.sums.items():
            self.add(total, None if plain else other.masses[source], source)

    def copy(self) -> Average:
        return Average(dict(self.sums), dict(self.masses))

    def value(self) -> Tensor:
        if self.settled:
            return self.sums[""]
        parts = [s * reciprocal(self.masses[h]) for h, s in self.sums.items()]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def fold(self, new: Average, decay: float) -> None:
        """value ← decay·value + (1 − decay)·new value."""
        if not self.sums or decay == 0:
            mixed = new.value()
        else:  # in place: factors are large, and allocation slow
            mixed = self.value().mul_(decay)
            for source, total in new.sums.items():
                mass = new.masses[source]
                if mass.dim() == 0 and mass.device.type == "cpu":  # free to read
                    mixed.add_(total, alpha=(1 - decay) / float(mass) if float(mass) > 0 else 0.0)
                else:
                    mixed.addcmul_(total, reciprocal(mass) * (1 - decay))
        self.sums, self.masses, self.settled = {"": mixed}, {"": mixed.new_ones(())}, True


def reciprocal(mass: Tensor) -> Tensor:
    """1/m, 0 where m is."""
    return torch.where(mass > 0, 1 / mass, torch.zeros_like(mass))


Statistics = dict[str, Average]
