"""Spectra of the blocks of a saved metric, with no model at hand.

Of a block with eigenvalues λ_i, damped to δ_i, are computed

- the condition λ_max / λ_min over the eigenvalues that are not numerically zero;
- the effective rank (Σ λ)² / Σ λ²: d for a multiple of the identity, 1 for one direction;
- the cosine between direction and gradient to expect of a gradient drawn from N(0, F), E ⟨g, ĝ⁻¹g⟩ / √(E‖g‖² E‖ĝ⁻¹g‖²)
  = Σ λ/δ / √(Σ λ · Σ λ/δ²). It is 1 where damping drowns the spectrum: natural gradient descent is then plain gradient
  descent with another learning rate.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.base import Block
from natgrad.blocks.kronecker import KroneckerBlock
from natgrad.fisher import state as metric_file
from natgrad.linalg.kronecker import damped_eigenvalues, eigen_of

ZERO = 1e-7  # of the largest eigenvalue: what float32 statistics cannot tell from zero


@dataclass(frozen=True)
class Spectrum:
    """One block: eigenvalues in descending order and what damping makes of them, (d,) each."""

    names: tuple[str, ...]
    structure: str
    sizes: str
    memory: int
    values: Tensor
    damped: Tensor

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def condition(self) -> float:
        kept = self.values[self.values > ZERO * self.values[0]]
        return float(kept[0] / kept[-1]) if len(kept) else float("nan")

    @property
    def null(self) -> int:
        """Eigenvalues that are numerically zero."""
        return int((self.values <= ZERO * self.values[0]).sum())

    @property
    def effective_rank(self) -> float:
        total = float(self.values.sum())
        return total**2 / float(self.values.square().sum()) if total else 0.0

    @property
    def cosine(self) -> float:
        inverse = 1 / self.damped
        size = (self.values.sum() * (self.values * inverse.square()).sum()).sqrt()
        return float((self.values * inverse).sum() / size) if float(size) else float("nan")

    @property
    def damped_share(self) -> float:
        """The share of eigenvalues below what damping adds to them."""
        return float((self.values < self.damped / 2).double().mean())


@dataclass(frozen=True)
class SavedMetric:
    """A metric file: what it says of itself, and its spectra."""

    about: dict[str, Any]
    spectra: list[Spectrum]

    @property
    def parameters(self) -> dict[str, list[int]]:
        return self.about["parameters"]

    @property
    def uncovered(self) -> list[str]:
        """Parameters without a block."""
        held = {n for s in self.spectra for n in s.names}
        return [n for n in self.parameters if n not in held]


def load(path: str | os.PathLike[str], damping: float, relative: bool) -> SavedMetric:
    """Read a metric file.

    Args:
        damping: λ.
        relative: relative to the mean eigenvalue, and split between the factors of a Kronecker block, as the default
            step rule has it; else absolute.

    Raises:
        FileNotFoundError, ValueError: as `natgrad.fisher.state.load` and `opened`.
    """
    about, state = metric_file.opened(metric_file.load(path))
    shapes = {n: torch.Size(s) for n, s in about["parameters"].items()}
    blocks = metric_file.blocks_from(about, state["tensors"], shapes, torch.device("cpu"))
    return SavedMetric(about, [spectrum(b, damping, relative) for b in blocks if b.statistics])


def spectrum(block: Block, damping: float, relative: bool) -> Spectrum:
    values = block.eigenvalues().double().clamp(min=0)
    if not relative:
        damped = values + damping
    elif "U" in block.statistics and "V" in block.statistics:
        # in units of the spectrum
        sides = [block.value(k).double() for k in ("U", "V")]
        u, v = (eigen_of(side)[0] for side in sides)
        own = block.own_columns if isinstance(block, KroneckerBlock) else 0
        du, dv = (damped_eigenvalues(side, damping, k) for side, k in zip(sides, (0, own)))
        values = (u[..., :, None] * v[..., None, :]).flatten()
        damped = (du[..., :, None] * dv[..., None, :]).flatten()
    else:
        damped = values + damping * values.mean()
    order = values.argsort(descending=True)
    tiny = torch.finfo(torch.float64).tiny
    return Spectrum(
        tuple(block.names),
        block.structure,
        block.sizes(),
        block.memory(),
        values[order],
        damped[order].clamp(min=tiny),  # a block that is zero
    )
