"""Inverses of damped curvature, made once and applied to many gradients.

    (U ⊗ V)⁻¹ from the eigenbases of its sides:  Q_U [ (Q_Uᵀ X Q_V) ∘ scale ] Q_Vᵀ
    or from the inverses of the sides:           Ũ X Ṽ

Sides are as in `natgrad.linalg.block_diagonal`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from natgrad.linalg.block_diagonal import both_times, left_times, times, transposed


class Inverse:
    """A factorised (curvature + damping)⁻¹."""

    def apply(self, x: Tensor) -> Tensor:
        """Coordinates (…, *shape) of a covector → coordinates of a tangent vector."""
        raise NotImplementedError


@dataclass
class DenseInverse(Inverse):
    matrix: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.matrix


@dataclass
class DiagonalInverse(Inverse):
    scale: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale


@dataclass
class EigenInverse(Inverse):
    """Q_U [ (Q_Uᵀ X Q_V) ∘ scale ] Q_Vᵀ"""

    scale: Tensor
    qu: Tensor | None
    qv: Tensor | None

    def apply(self, x: Tensor) -> Tensor:
        return out_of_basis(into_basis(x, self.qu, self.qv) * self.scale, self.qu, self.qv)


@dataclass
class KroneckerInverse(Inverse):
    """Ũ X Ṽ of two inverse sides."""

    u: Tensor
    v: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return both_times(self.u, x, self.v).contiguous()  # every rank is to sum its entries in one order


def into_basis(x: Tensor, qu: Tensor | None, qv: Tensor | None) -> Tensor:
    """Q_Uᵀ X Q_V"""
    x = x if qu is None else left_times(transposed(qu), x)
    return x if qv is None else times(x, qv)


def out_of_basis(x: Tensor, qu: Tensor | None, qv: Tensor | None) -> Tensor:
    """Q_U X Q_Vᵀ"""
    x = x if qu is None else left_times(qu, x)
    return x if qv is None else times(x, transposed(qv))


def overlapped(s: Tensor, ru: Tensor | None, rv: Tensor | None) -> Tensor:
    """(R_U∘R_U) S (R_V∘R_V)ᵀ: the diagonal of what has the eigenvalues S, for eigenvectors R."""
    s = s if ru is None else left_times(ru.square(), s)
    return s if rv is None else times(s, transposed(rv.square()))
