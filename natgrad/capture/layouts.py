"""Layouts: how a parameter is a stack of matrices (groups, d_out, d_in), and back.

Two calls that use a parameter in the same layout share a block; a call in the transposed layout (a tied embedding and
head) shares it with the roles of input and output gradient exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from torch import Tensor


class Layout:
    """A parameter ⇄ a stack of matrices. All methods take leading batch dimensions."""

    groups: int
    elementwise = False  # a vector of scales or offsets, not a matrix that mixes inputs

    def matrix(self, w: Tensor) -> Tensor:
        """weight (…, *shape) → (…, groups, d_out, d_in)"""
        raise NotImplementedError

    def weight(self, m: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        raise NotImplementedError

    def bias(self, b: Tensor, dims: int) -> Tensor:
        """bias (…, *its own dims) → column (…, groups, d_out, 1)"""
        return b.reshape(*b.shape[: b.dim() - dims], self.groups, -1, 1)

    def transposed(self) -> Layout | None:
        """The layout in which every matrix is transposed, where there is one."""
        return None


@dataclass(frozen=True)
class Dims(Layout):
    """Each dimension of the parameter counts groups, outputs or inputs."""

    shape: tuple[int, ...]
    group: tuple[int, ...] = ()
    out: tuple[int, ...] = ()
    into: tuple[int, ...] = ()

    @property
    def groups(self) -> int:  # type: ignore[override]
        return prod(self.shape[d] for d in self.group)

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """One group an element, or one column of all elements (`flat`)."""
        return not self.into

    @property
    def order(self) -> tuple[int, ...]:
        return self.group + self.out + self.into

    def matrix(self, w: Tensor) -> Tensor:
        batch = w.dim() - len(self.shape)
        sizes = [prod(self.shape[d] for d in dims) for dims in (self.group, self.out, self.into)]
        w = w.permute([*range(batch), *(batch + d for d in self.order)])
        return w.reshape(*w.shape[:batch], *sizes)

    def weight(self, m: Tensor) -> Tensor:
        batch = m.dim() - 3
        m = m.reshape([*m.shape[:batch], *(self.shape[d] for d in self.order)])
        back = sorted(range(len(self.order)), key=lambda i: self.order[i])
        return m.permute([*range(batch), *(batch + i for i in back)])

    def transposed(self) -> Layout | None:
        return Dims(self.shape, self.group, self.into, self.out)


def linear_layout(shape: tuple[int, ...], flipped: bool = False) -> Dims:
    """(out, in), or (in, out) where flipped."""
    return Dims(shape, (), (1,), (0,)) if flipped else Dims(shape, (), (0,), (1,))


def element_layout(shape: tuple[int, ...]) -> Dims:
    """One group an element, d_out = d_in = 1: U is the diagonal."""
    return Dims(shape, tuple(range(len(shape))))


def flat_layout(shape: tuple[int, ...]) -> Dims:
    """One column, d_out = P and d_in = 1: U is the dense matrix."""
    return Dims(shape, (), tuple(range(len(shape))))


@dataclass(frozen=True)
class ConvLayout(Layout):
    """(out, in / groups, *kernel)"""

    groups: int
    kernel: tuple[int, ...]

    def matrix(self, w: Tensor) -> Tensor:
        batch = w.shape[: -2 - len(self.kernel)]
        return w.reshape(*batch, self.groups, w.shape[len(batch)] // self.groups, -1)

    def weight(self, m: Tensor) -> Tensor:
        return m.reshape(*m.shape[:-3], m.shape[-3] * m.shape[-2], -1, *self.kernel)


@dataclass(frozen=True)
class TransposedConvLayout(Layout):
    """(in, out / groups, *kernel); d_in runs over (in / groups, *kernel)."""

    groups: int
    kernel: tuple[int, ...]
    inputs: int = field(default=0)  # in / groups

    def matrix(self, w: Tensor) -> Tensor:
        batch = w.dim() - 2 - len(self.kernel)
        w = w.reshape(*w.shape[:batch], self.groups, self.inputs, w.shape[batch + 1], -1)  # (…, g, in, out, kernel)
        return w.transpose(-3, -2).flatten(-2)

    def weight(self, m: Tensor) -> Tensor:
        m = m.reshape(*m.shape[:-1], self.inputs, -1).transpose(-3, -2)  # (…, g, in, out, kernel)
        return m.reshape(*m.shape[:-4], self.groups * self.inputs, m.shape[-2], *self.kernel)


LAYOUTS: dict[str, type[Layout]] = {c.__name__: c for c in (Dims, ConvLayout, TransposedConvLayout)}
