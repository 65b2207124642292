"""Views: how the input and the output gradient of one call become rows of a stack of linear maps.

    out[n, p, k, :] = W[k] @ a[n, p, k, :]      a (data, positions, groups, d_in), out (data, positions, groups, d_out)

`LinearForm.input_rows` and `LinearForm.gradient_rows` bring a tensor to (*leading, groups, d); which leading dimension
counts the data is not known from the op alone (a transformer may run on (time, batch, features)), so it is named later
and `canonical` moves it to the front. Convolutions as products with unfolded patches: Grosse & Martens 2016,
arXiv:1602.01407, §3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.capture.layouts import Layout
from natgrad.capture.rows import OneHot, Rows


class LinearForm:
    """One call's way from its tensors to rows."""

    layout: Layout
    one_hot = False  # every input row is a unit vector: its second moment is diagonal
    region: tuple[int, int] | None = None  # the groups that the call uses, which its rows are of; None for all
    routes: Tensor | None = None  # (*leading) where each row goes through one group alone: which

    def leading(self, x: Tensor) -> tuple[int, ...]:
        """Sizes of the dimensions of the call's output that may count data or positions."""
        raise NotImplementedError

    def take(self, x: Tensor, keep: Tensor) -> Tensor:
        """The input with these entries of its first leading dimension."""
        return x.index_select(0, keep)

    def input_rows(self, x: Tensor, dtype: torch.dtype) -> Rows:
        """Input of the call → (*leading, groups, d_in)"""
        raise NotImplementedError

    def gradient_rows(self, g: Tensor) -> Tensor:
        """Gradient of the call's output → (*leading, groups, d_out)"""
        raise NotImplementedError

    @property
    def fan_in(self) -> int | None:
        """Inputs that are not zero at once; None for d_in."""
        return None


def kept_input(x: Tensor) -> Tensor:
    """The input of a call as it is kept: of any sparse layout in coordinates, by which rows can be taken."""
    return x if x.layout == torch.strided else x.to_sparse_coo()


def made_dense(x: Tensor) -> Tensor:
    """A kept input, or some rows of it, as rows are read from."""
    return x if x.layout == torch.strided else x.to_dense()


INNER = -1  # the first leading dimension is (positions · data): attention flattens (time, batch)
Place = int | Tensor  # where a call's data are: a leading dimension, or INNER; else the row numbers of each datum


def data_first(t: Tensor, axis: int, data: int) -> Tensor:
    """(*leading, …) with the dimension that counts data in front."""
    return t.unflatten(0, (-1, data)).movedim(1, 0) if axis == INNER else t.movedim(axis, 0)


def owners_at(place: Place, sizes: tuple[int, ...], data: int) -> Tensor:
    """The datum of each row of (*sizes), data and positions counted together; -1 for rows of none."""
    own = torch.full((prod(sizes),), -1, dtype=torch.long)
    if isinstance(place, Tensor):
        whose = torch.arange(data, device=place.device)[:, None].expand_as(place)
        kept = place < len(own)
        own[place[kept].cpu()] = whose[kept].cpu()
        return own
    ordered = data_first(torch.arange(len(own)).reshape(sizes), place, data).reshape(data, -1)
    own[ordered] = torch.arange(data)[:, None].expand_as(ordered)
    return own


def canonical(t: Rows, axis: int, data: int) -> Rows:
    """(*leading, groups, d) → (data, positions, groups, d)"""
    if isinstance(t, OneHot):  # (*leading, bag)
        return OneHot(flattened(t.index, axis, data, 1), flattened(t.scale, axis, data, 1), t.size)
    return flattened(t, axis, data, 2)


def flattened(t: Tensor, axis: int, data: int, kept: int) -> Tensor:
    if t.dim() == kept:
        return t[None, None]
    t = data_first(t, axis, data)
    return t.reshape(t.shape[0], -1, *t.shape[-kept:])


@dataclass(frozen=True)
class DimsView(LinearForm):
    """An op whose dimensions each count positions, groups, inputs or outputs: linear, matmul, einsum, scales."""

    layout: Layout
    positions: tuple[int, ...]  # dimensions of the input
    group: tuple[int, ...]
    into: tuple[int, ...]
    out_positions: tuple[int, ...]  # dimensions of the output
    out_group: tuple[int, ...]
    out: tuple[int, ...]
    region: tuple[int, int] | None = None
    routes: Tensor | None = field(default=None, compare=False)

    def leading(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[d] for d in self.positions)

    def take(self, x: Tensor, keep: Tensor) -> Tensor:
        return x.index_select(self.positions[0], keep)

    def input_rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return arranged(x.to(dtype), self.positions, self.group, self.into)

    def gradient_rows(self, g: Tensor) -> Tensor:
        return arranged(g, self.out_positions, self.out_group, self.out)


def arranged(t: Tensor, positions: tuple[int, ...], group: tuple[int, ...], last: tuple[int, ...]) -> Tensor:
    sizes = [t.shape[d] for d in positions]
    groups, width = (prod(t.shape[d] for d in dims) for dims in (group, last))
    return t.permute([*positions, *group, *last]).reshape(*sizes, groups, width)


@dataclass(frozen=True)
class ConvView(LinearForm):
    """Convolution in any number of spatial dimensions."""

    layout: Layout
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # (before, after) of each dimension; negative crops
    dilation: tuple[int, ...]
    insert: tuple[int, ...] | None = None  # steps at which inputs are spread out, zeros between (transposed)

    @property
    def space(self) -> int:
        return len(self.kernel)

    def batched(self, t: Tensor) -> Tensor:
        return t if t.dim() == self.space + 2 else t.unsqueeze(0)

    def leading(self, x: Tensor) -> tuple[int, ...]:
        return (self.batched(x).shape[0],)

    def input_rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.batched(x.to(dtype))
        if self.insert is not None:
            x = zeros_between(x, self.insert)
        x = F.pad(x, [side for pair in reversed(self.padding) for side in pair])
        for i, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation)):
            x = x.unfold(2 + i, (k - 1) * d + 1, s)[..., ::d]  # (N, C, *out, k …)
        if self.insert is not None:
            x = x.flip(list(range(2 + self.space, 2 + 2 * self.space)))
        groups = self.layout.groups
        n, c, out = x.shape[0], x.shape[1], x.shape[2 : 2 + self.space]
        x = x.reshape(n, groups, c // groups, *out, *self.kernel)
        order = (0, *range(3, 3 + self.space), 1, 2, *range(3 + self.space, 3 + 2 * self.space))
        return x.permute(order).reshape(n, out.numel(), groups, -1)

    def gradient_rows(self, g: Tensor) -> Tensor:
        g = self.batched(g)
        groups = self.layout.groups
        return g.flatten(2).reshape(g.shape[0], groups, g.shape[1] // groups, -1).permute(0, 3, 1, 2)


def zeros_between(x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """x[n, c, i, …] ↦ y[n, c, step · i, …], zero elsewhere."""
    y = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], steps)))
    where = (slice(None), slice(None), *(slice(None, None, s) for s in steps))
    y[where] = x
    return y


@dataclass(frozen=True)
class IndexView(LinearForm):
    """A table looked up by index. Input: indices, (*leading) or (*leading, bag) with a scale for each."""

    layout: Layout
    size: int
    padding: int | None = None
    bags: bool = False

    @property
    def one_hot(self) -> bool:  # type: ignore[override]
        return not self.bags

    @property
    def fan_in(self) -> int | None:
        return 1

    def leading(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[:1]) if self.bags else tuple(x.shape)

    def input_rows(self, x: Tensor, dtype: torch.dtype) -> Rows:
        if self.bags:  # (rows, bag, 2): index and scale
            return OneHot(x[..., 0].long(), x[..., 1].to(dtype), self.size)
        x = x.long()
        scale = torch.ones(x.shape, dtype=dtype, device=x.device)
        if self.padding is not None:
            scale = scale * (x != self.padding)
        return OneHot(x[..., None], scale[..., None], self.size)

    def gradient_rows(self, g: Tensor) -> Tensor:
        return g.unsqueeze(-2)


@dataclass(frozen=True)
class GradientView(LinearForm):
    """A parameter seen through its per-datum gradients (data, P) alone: flat (dense) or an element a group."""

    layout: Layout

    def leading(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    def input_rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)[:, None, None].expand(-1, self.layout.groups, 1)

    def gradient_rows(self, g: Tensor) -> Tensor:
        return g.reshape(g.shape[0], self.layout.groups, -1)
