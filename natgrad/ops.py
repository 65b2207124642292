"""Op rules: every covered op is a stack of linear maps.

A rule brings one call of an op with parameters to the canonical form

    out[n, p, k, :] = W[k] @ a[n, p, k, :]        a (data, positions, groups, d_in), out (data, positions, groups,
    d_out)

where W (groups, d_out, d_in) is a view of the weight. A linear layer has one group, a grouped convolution its groups,
and an elementwise scale as many groups as elements with d_out = d_in = 1. A bias is one more column of W whose input
is 1 (the homogeneous coordinate). The gradient of datum n is Σ_p g[n, p, k, :] a[n, p, k, :]ᵀ, whatever the op.

A new op is one function and one entry in `RULES`. Convolutions as products with unfolded patches: Grosse & Martens
2016, arXiv:1602.01407, §3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class View:
    """How the weight of an op is a stack of matrices, and how its input and output gradient become rows of them.

    Equality of views means: the same parameter in the same matrix form (calls that share a block).
    """

    groups: int
    elementwise = False  # a vector of scales or offsets, not a matrix that mixes inputs

    def matrix(self, w: Tensor) -> Tensor:
        """weight (…, *shape) → (…, groups, d_out, d_in)"""
        raise NotImplementedError

    def weight(self, m: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        raise NotImplementedError

    def inputs(self, x: Tensor) -> Tensor:
        """Input of the call → (rows, positions, groups, d_in)"""
        raise NotImplementedError

    def outputs(self, g: Tensor) -> Tensor:
        """Gradient of the call's output → (rows, positions, groups, d_out)"""
        raise NotImplementedError

    def bias(self, b: Tensor) -> Tensor:
        """bias (…, out) → column (…, groups, d_out, 1)"""
        return b.reshape(*b.shape[:-1], self.groups, -1, 1)


@dataclass(frozen=True)
class LinearView(View):
    groups: int = field(default=1, init=False)

    def matrix(self, w: Tensor) -> Tensor:
        return w.unsqueeze(-3)

    def weight(self, m: Tensor) -> Tensor:
        return m.squeeze(-3)

    def inputs(self, x: Tensor) -> Tensor:
        rows = x.shape[0] if x.dim() > 1 else 1
        return x.reshape(rows, -1, 1, x.shape[-1])

    def outputs(self, g: Tensor) -> Tensor:
        return self.inputs(g)


@dataclass(frozen=True)
class ConvView(View):
    """Convolution in any number of spatial dimensions; the weight is (out, in / groups, *kernel)."""

    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = field(compare=False)
    padding: tuple[tuple[int, int], ...] = field(compare=False)  # (before, after) of each dimension
    dilation: tuple[int, ...] = field(compare=False)

    def matrix(self, w: Tensor) -> Tensor:
        batch = w.shape[: -2 - len(self.kernel)]
        return w.reshape(*batch, self.groups, w.shape[len(batch)] // self.groups, -1)

    def weight(self, m: Tensor) -> Tensor:
        return m.reshape(*m.shape[:-3], m.shape[-3] * m.shape[-2], -1, *self.kernel)

    def inputs(self, x: Tensor) -> Tensor:
        space = len(self.kernel)
        x = x if x.dim() == space + 2 else x.unsqueeze(0)
        x = F.pad(x, [side for pair in reversed(self.padding) for side in pair])
        for i, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation)):
            x = x.unfold(2 + i, (k - 1) * d + 1, s)[..., ::d]  # (N, C, *out, k …)
        n, c, out = x.shape[0], x.shape[1], x.shape[2 : 2 + space]
        x = x.reshape(n, self.groups, c // self.groups, *out, *self.kernel)
        order = (0, *range(3, 3 + space), 1, 2, *range(3 + space, 3 + 2 * space))
        return x.permute(order).reshape(n, out.numel(), self.groups, -1)

    def outputs(self, g: Tensor) -> Tensor:
        g = g if g.dim() == len(self.kernel) + 2 else g.unsqueeze(0)
        return g.flatten(2).reshape(g.shape[0], self.groups, g.shape[1] // self.groups, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class FlatView(View):
    """A parameter as one column, d_out = P and d_in = 1: its U is the dense matrix. Input 1, gradients (rows, P)."""

    elementwise = True
    shape: tuple[int, ...]
    groups: int = field(default=1, init=False)

    def matrix(self, w: Tensor) -> Tensor:
        return w.reshape(*w.shape[: w.dim() - len(self.shape)], 1, -1, 1)

    def weight(self, m: Tensor) -> Tensor:
        return m.reshape(*m.shape[:-3], *self.shape)

    def inputs(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1, 1, 1)

    def outputs(self, g: Tensor) -> Tensor:
        return g[:, None, None, :]


@dataclass(frozen=True)
class ElementView(View):
    """A parameter as P groups with d_out = d_in = 1: its U is the diagonal. Input 1, gradients (rows, P)."""

    elementwise = True
    shape: tuple[int, ...]

    @property
    def groups(self) -> int:  # type: ignore[override]
        return torch.Size(self.shape).numel()

    def matrix(self, w: Tensor) -> Tensor:
        return w.reshape(*w.shape[: w.dim() - len(self.shape)], -1, 1, 1)

    def weight(self, m: Tensor) -> Tensor:
        return m.reshape(*m.shape[:-3], *self.shape)

    def inputs(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1, 1, 1).expand(-1, 1, self.groups, 1)

    def outputs(self, g: Tensor) -> Tensor:
        return g[:, None, :, None]


@dataclass
class Parsed:
    """What a rule says of one call: its parameters, its input and its view."""

    weight: Tensor | None
    bias: Tensor | None
    x: Tensor
    view: View
    others: Sequence[Any] = ()  # further arguments that may depend on parameters


Rule = Callable[..., "Parsed | None"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Parsed:
    return Parsed(weight, bias, input, LinearView())


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Parsed:
    kernel = tuple(weight.shape[2:])
    dilation = spread(dilation, len(kernel))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in spread(0 if padding == "valid" else padding, len(kernel)))
    return Parsed(weight, bias, input, ConvView(groups, kernel, spread(stride, len(kernel)), pads, dilation))


def spread(value: Any, dims: int) -> tuple[int, ...]:
    """An int or a sequence → one int a dimension."""
    if isinstance(value, int):
        return (value,) * dims
    value = tuple(int(v) for v in value)
    return value * dims if len(value) == 1 else value


RULES: dict[Any, Rule] = {
    F.linear: linear,
    F.conv1d: conv,
    F.conv2d: conv,
    F.conv3d: conv,
}


VIEWS: dict[str, type[View]] = {v.__name__: v for v in (LinearView, ConvView, FlatView, ElementView)}


def op_name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def with_bias_columns(a: Tensor, ones: Sequence[bool]) -> Tensor:
    """a (rows, positions, groups, d_in) with one more column of 1 or 0 for each bias of the layer."""
    if not ones:
        return a
    extra = a.new_tensor([float(one) for one in ones]).expand(*a.shape[:-1], len(ones))
    return torch.cat([a, extra], dim=-1)
