"""Means of statistics over everything that was added, and moving averages of them.

A moving average is kept for a whole training run, so it is kept small: of symmetric matrices the triangles
(`natgrad.triangles`), and in a dtype of its own where one is asked for. What is computed with it is `value`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from natgrad.triangles import side_of_triangles, triangles


@dataclass
class Average:
    """Σ_h S_h / M_h: sums of statistics over their masses, one pair for each source of terms h (one a criterion).

    A mass is a scalar tensor, or broadcasts against the sum where parts of it were seen by different numbers of rows.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    masses: dict[str, Tensor] = field(default_factory=dict)
    settled: bool = False  # one source of mass 1, as a moving average has it
    sides: tuple[int, ...] | None = None  # shape of the sides of which a settled sum holds the triangles
    dtype_of_value: torch.dtype | None = None  # where a settled sum is held in another

    def add(self, total: Tensor, mass: Tensor | None, source: str = "") -> None:
        """`mass` None: a plain sum, which is never divided."""
        self.open()
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
            self.open()
            self.masses[source] = mass.to(self.sums[source])

    def merge(self, other: Average, plain: bool) -> None:
        other = other.copy()
        for source, total in other.sums.items():
            self.add(total, None if plain else other.masses[source], source)

    def copy(self) -> Average:
        """The same sums, none of them in a form of its own."""
        out = replace(self, sums=dict(self.sums), masses=dict(self.masses))
        out.open()
        return out

    def open(self) -> None:
        """Be a sum like any other, to be added to."""
        if self.kept_small:
            self.sums = {"": self.value()}
            self.masses = {"": self.sums[""].new_ones(())}
        self.settled, self.sides, self.dtype_of_value = False, None, None

    @property
    def kept_small(self) -> bool:
        return self.sides is not None or self.dtype_of_value is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of the value."""
        return self.dtype_of_value or next(iter(self.sums.values())).dtype

    def value(self) -> Tensor:
        if self.settled:
            held = self.sums[""].to(self.dtype)
            return held if self.sides is None else side_of_triangles(held, self.sides)
        parts = [s * reciprocal(self.masses[h]) for h, s in self.sums.items()]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def fold(self, new: Average, decay: float, symmetric: bool = False, storage: torch.dtype | None = None) -> None:
        """value ← decay·value + (1 − decay)·new value.

        Args:
            symmetric: the value is a side that is its own transpose, piece by piece.
            storage: the dtype that it is to be held in; None for its own.
        """
        if not self.sums or decay == 0:
            value = new.value()
            sides, dtype = tuple(value.shape), value.dtype
            mixed = triangles(value) if symmetric else value
        else:  # in place: factors are large, and allocation slow
            if not self.settled:
                self._settle(symmetric)
            sides, dtype = self.sides or (), self.dtype
            mixed = self.sums[""].to(dtype).mul_(decay)
            for source, total in new.sums.items():
                mass, share = new.masses[source], 1 - decay
                if mass.dim() == 0 and mass.device.type == "cpu":  # free to read
                    share = share / float(mass) if float(mass) > 0 else 0.0
                else:
                    total = total * reciprocal(mass)
                mixed.add_(triangles(total) if symmetric else total, alpha=share)
        self._hold(mixed, sides if symmetric else None, dtype, storage)

    def _settle(self, symmetric: bool) -> None:
        value = self.value()
        self._hold(triangles(value) if symmetric else value, tuple(value.shape) if symmetric else None, value.dtype)

    def _hold(
        self, mixed: Tensor, sides: tuple[int, ...] | None, dtype: torch.dtype, storage: torch.dtype | None = None
    ) -> None:
        held = mixed if storage is None else mixed.to(storage)
        self.sums, self.masses, self.settled = {"": held}, {"": held.new_ones(())}, True
        self.sides, self.dtype_of_value = sides, None if held.dtype == dtype else dtype

    def move(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Follow parameters to a device and to the dtype that goes with theirs; whether anything changed."""
        there = {t.device for held in (self.sums, self.masses) for t in held.values()} <= {device}
        if there and self.dtype == dtype:
            return False
        if self.kept_small:  # in the form that it has
            held = self.sums[""].to(device)
            self._hold(held.to(dtype) if self.dtype_of_value is None else held, self.sides, dtype)
            return True
        for part in (self.sums, self.masses):
            for source, t in part.items():
                part[source] = t.to(device, dtype)
        return True


def reciprocal(mass: Tensor) -> Tensor:
    """1/m, 0 where m is."""
    return torch.where(mass > 0, 1 / mass, torch.zeros_like(mass))


Statistics = dict[str, Average]
