"""Means of statistics over everything that was added, and moving averages of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Average:
    """Σ_h S_h / M_h: sums of statistics over their masses, one pair for each source of terms h (one a criterion).

    A mass is a scalar tensor, or broadcasts against the sum where parts of it were seen by different numbers of rows.
    A moving average is one source of mass 1.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    masses: dict[str, Tensor] = field(default_factory=dict)

    def add(self, total: Tensor, mass: Tensor | None, source: str = "") -> None:
        """`mass` None: a plain sum, which is never divided."""
        if source not in self.sums:
            self.sums[source] = total
            self.masses[source] = total.new_ones(()) if mass is None else mass.to(total)
            return
        self.sums[source] = self.sums[source] + total
        if mass is not None:
            self.masses[source] = self.masses[source] + mass.to(total)

    def add_part(self, part: Tensor, mass: Tensor | None, source: str, region: tuple[int, int], groups: int) -> None:
        """`add` of the groups start:stop of a stack, with the mass of these alone."""
        if source not in self.sums:
            self.sums[source] = part.new_zeros(groups, *part.shape[1:])
            self.masses[source] = part.new_ones(()) if mass is None else part.new_zeros(groups, 1, 1)
        self.sums[source][slice(*region)] += part
        if mass is not None:
            self.masses[source] = self.masses[source].expand(groups, 1, 1).clone()
            self.masses[source][slice(*region)] += mass

    def weigh(self, mass: Tensor | None, source: str) -> None:
        """Divide the sum of a source by `mass`, or by nothing."""
        if mass is not None:
            self.masses[source] = mass.to(self.sums[source])

    def merge(self, other: Average, plain: bool) -> None:
        for source, total in other.sums.items():
            self.add(total, None if plain else other.masses[source], source)

    def copy(self) -> Average:
        return Average(dict(self.sums), dict(self.masses))

    def value(self) -> Tensor:
        """Return the mean, a tensor of its own."""
        parts = [s * reciprocal(self.masses[h]) for h, s in self.sums.items()]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def fold(self, new: Average, decay: float) -> None:
        """value ← decay·value + (1 − decay)·new value; a part that only one of both has seen is taken from that."""
        value, mass = new.value(), new.parts_seen()
        if self.sums and decay > 0:
            before, earlier = self.value(), self.parts_seen()
            if mass.dim() or earlier.dim():
                share = torch.where(mass > 0, decay * earlier.to(before), 1.0)
                value, mass = value.to(before).lerp(before, share), torch.maximum(mass.to(before), earlier.to(before))
            else:
                value = value.to(before).lerp_(before, decay)  # a model may be cast between a batch and its step
        self.sums, self.masses = {"": value}, {"": mass.to(value)}

    def parts_seen(self) -> Tensor:
        """1 where there is any mass, 0 elsewhere: a tensor that broadcasts against the sum, a scalar 1 for one mass."""
        masses = list(self.masses.values())
        if not any(m.dim() for m in masses):
            return masses[0].new_ones(())
        return torch.stack([(m > 0).expand_as(max(masses, key=Tensor.dim)) for m in masses]).any(0).to(masses[0].dtype)

    def move(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Follow parameters to a device and to the dtype that goes with theirs; whether anything changed."""
        held = [t for part in (self.sums, self.masses) for t in part.values()]
        if all(t.device == device and t.dtype == dtype for t in held):
            return False
        for part in (self.sums, self.masses):
            for source, t in part.items():
                part[source] = t.to(device, dtype)
        return True


def reciprocal(mass: Tensor) -> Tensor:
    """1/m, 0 where m is."""
    return torch.where(mass > 0, 1 / mass, torch.zeros_like(mass))


Statistics = dict[str, Average]
