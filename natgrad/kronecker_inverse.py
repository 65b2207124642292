"""Inverses of Kronecker products, and what training keeps of them.

    (U ⊗ V)⁻¹ from the eigenbases of its sides:  Q_U [ (Q_Uᵀ X Q_V) ∘ scale ] Q_Vᵀ
    or from the inverses of the sides:           Ũ X Ṽ

Sides are as in `natgrad.sides`. Of a long one that is applied at every step its triangle is kept (`HeldSide`): to open
it takes a fraction of the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import Tensor

from natgrad.blocks import Inverse
from natgrad.kronecker import kron_apply
from natgrad.sides import left_times, times, transposed
from natgrad.triangles import lengths, side_of_triangles, triangles

LONG = 128  # rows of a piece of an inverse from which on its triangle alone is kept


def into_basis(x: Tensor, qu: Tensor | None, qv: Tensor | None) -> Tensor:
    """Q_Uᵀ X Q_V"""
    x = x if qu is None else left_times(transposed(qu), x)
    return x if qv is None else times(x, qv)


def out_of_basis(x: Tensor, qu: Tensor | None, qv: Tensor | None) -> Tensor:
    """Q_U X Q_Vᵀ"""
    x = x if qu is None else left_times(qu, x)
    return x if qv is None else times(x, transposed(qv))


@dataclass
class EigenInverse(Inverse):
    """Q_U [ (Q_Uᵀ X Q_V) ∘ scale ] Q_Vᵀ"""

    scale: Tensor
    qu: Tensor | None
    qv: Tensor | None

    def apply(self, x: Tensor) -> Tensor:
        return out_of_basis(into_basis(x, self.qu, self.qv) * self.scale, self.qu, self.qv)


class HeldSide(NamedTuple):
    """A side, of a longer one the triangles of its pieces: to open them takes a fraction of the product."""

    numbers: Tensor
    shape: tuple[int, ...] | None = None  # of the side, where `numbers` are its triangles

    @classmethod
    def of(cls, side: Tensor) -> HeldSide:
        return cls(triangles(side), tuple(side.shape)) if side.shape[-2] >= LONG else cls(side)

    def side(self) -> Tensor:
        return self.numbers if self.shape is None else side_of_triangles(self.numbers, self.shape)


@dataclass
class KroneckerInverse(Inverse):
    """Ũ X Ṽ, from what two `HeldSide` hold."""

    u: Tensor
    v: Tensor
    u_shape: tuple[int, ...] | None = None
    v_shape: tuple[int, ...] | None = None

    @classmethod
    def of(cls, u: HeldSide, v: HeldSide) -> KroneckerInverse:
        return cls(u.numbers, v.numbers, u.shape, v.shape)

    def apply(self, x: Tensor) -> Tensor:
        u, v = HeldSide(self.u, self.u_shape).side(), HeldSide(self.v, self.v_shape).side()
        return kron_apply(u, x, v).contiguous()  # every rank is to sum its entries in one order


def numbers_kept(shape: Sequence[int]) -> int:
    """Numbers that training keeps of a side (…, p, d), or of a diagonal: of its average and of its inverse."""
    if len(shape) < 2 or shape[-2] == 1:
        return 2 * prod(shape)
    half = sum(lengths(shape))
    return half + (half if shape[-2] >= LONG else prod(shape))
