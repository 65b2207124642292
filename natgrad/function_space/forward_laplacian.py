"""The jet of a value under forward Laplacian: a tensor-like object whose operations carry derivatives along.

A jet is (z, ∂₁z, …, ∂_d z, Σᵢ wᵢ ∂ᵢ²z). `RULES` says how each operation of torch maps jets; an operation that is
not there raises `NoRule`. `natgrad.function_space.operators` starts and reads jets.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional as F


def pushed(u: Callable[..., Any], x: Tensor, v: Tensor) -> tuple[Any, Any]:
    """u(x) and its derivative along v."""
    return jvp(u, (x,), (v,))  # type: ignore[return-value]


class NoRule(Exception):
    """An operation the forward Laplacian has no rule for; the caller takes nested modes."""


class Jet:
    """(z, ∂₁z … ∂_d z, Σ wᵢ∂ᵢ²z) stacked along a new first axis: `data` has shape (d + 2, *z.shape)."""

    def __init__(self, data: Tensor, weights: Tensor) -> None:
        self.data, self.weights = data, weights

    shape = property(lambda self: self.data.shape[1:])
    ndim = property(lambda self: self.data.ndim - 1)
    dtype = property(lambda self: self.data.dtype)
    device = property(lambda self: self.data.device)

    def like(self, data: Tensor) -> Jet:
        return Jet(data, self.weights)

    def square_sum(self, first: Tensor, other: Tensor) -> Tensor:
        """Σ wᵢ ∂ᵢa ∂ᵢb"""
        return torch.einsum("d,d...->...", self.weights, first * other)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rule = RULES.get(func)
        if rule is None:
            raise NoRule(getattr(func, "__name__", str(func)))
        return rule(func, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name, None)
        if name.startswith("__") or not callable(method):
            raise NoRule(name)
        return lambda *args, **kwargs: Jet.__torch_function__(method, (), (self, *args), kwargs)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Jet:
        inner = index if isinstance(index, tuple) else (index,)
        whole = (slice(None), *inner)
        return self.like(self.data[whole])

    def __add__(self, other: Any) -> Jet:
        return _add(None, self, other)

    def __radd__(self, other: Any) -> Jet:
        return _add(None, self, other)

    def __sub__(self, other: Any) -> Jet:
        return _add(None, self, -other)

    def __rsub__(self, other: Any) -> Jet:
        return _add(None, -self, other)

    def __neg__(self) -> Jet:
        return self.like(-self.data)

    def __mul__(self, other: Any) -> Jet:
        return _multiply(None, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Jet:
        return _multiply(None, self, 1 / other)

    def __rtruediv__(self, other: Any) -> Jet:
        return _multiply(None, _elementwise(torch.reciprocal, self), other)

    def __pow__(self, exponent: Any) -> Jet:
        return _elementwise(torch.pow, self, exponent)

    def __matmul__(self, other: Any) -> Jet:
        return _matmul(torch.matmul, self, other)

    def __rmatmul__(self, other: Any) -> Jet:
        return _matmul(torch.matmul, other, self)


def _add(func: Any, a: Any, b: Any, *, alpha: float = 1) -> Jet:
    if isinstance(a, Jet) and isinstance(b, Jet):
        return a.like(a.data + alpha * b.data) if a.ndim == b.ndim else _broadcast_add(a, b, alpha)
    jet, constant = (a, alpha * b) if isinstance(a, Jet) else (b.like(alpha * b.data), a)
    value = jet.data[:1] + constant  # a constant moves the value alone
    rest = jet.data[1:]
    return jet.like(
        torch.cat([value, rest.expand(-1, *value.shape[1:]) if rest.ndim == value.ndim else _no("broadcast")])
    )


def _broadcast_add(a: Jet, b: Jet, alpha: float) -> Jet:
    ndim = max(a.ndim, b.ndim)

    def lift(z: Tensor) -> Tensor:
        return z.reshape(z.shape[0], *(1,) * (ndim + 1 - z.ndim), *z.shape[1:])

    return a.like(lift(a.data) + alpha * lift(b.data))


def _subtract(func: Any, a: Any, b: Any, *, alpha: float = 1) -> Jet:
    return _add(func, a, b, alpha=-alpha)


def _multiply(func: Any, a: Any, b: Any) -> Jet:
    if not isinstance(a, Jet):
        a, b = b, a
    if not isinstance(b, Jet):
        if isinstance(b, Tensor) and b.ndim > a.ndim:
            _no("broadcast")
        return a.like(a.data * b)
    if a.ndim != b.ndim:
        _no("broadcast")
    x, y = a.data, b.data
    value, first = x[:1] * y[:1], x[1:-1] * y[:1] + x[:1] * y[1:-1]
    second = x[-1:] * y[:1] + x[:1] * y[-1:] + 2 * a.square_sum(x[1:-1], y[1:-1])[None]
    return a.like(torch.cat([value, first, second]))


def _divide(func: Any, a: Any, b: Any) -> Jet:
    return _multiply(None, a, _elementwise(torch.reciprocal, b) if isinstance(b, Jet) else 1 / b)


def _linear(func: Any, x: Any, weight: Tensor, bias: Tensor | None = None) -> Jet:
    if isinstance(weight, Jet):
        _no("linear with a weight that depends on x")
    out = F.linear(x.data, weight)
    return x.like(out if bias is None else torch.cat([out[:1] + bias, out[1:]]))


def _matmul(func: Any, a: Any, b: Any) -> Jet:
    if isinstance(a, Jet) and isinstance(b, Jet):
        _no("product of two matrices that depend on x")
    if isinstance(b, Jet):
        if b.ndim != 1 or a.ndim != 2:
            _no("matmul")
        return b.like(b.data @ a.mT)
    if a.ndim != 1 and not (a.ndim == 2 and b.ndim == 2):
        _no("matmul")
    return a.like(a.data @ b)


def _elementwise(func: Any, z: Jet, *args: Any, **kwargs: Any) -> Jet:
    """f(z) with f′ and f″ from forward mode, so that any elementwise function of one jet is covered."""
    if any(isinstance(a, Jet) for a in args):
        _no(getattr(func, "__name__", "function"))
    kwargs.pop("inplace", None)
    value, first, lap = z.data[0], z.data[1:-1], z.data[-1]
    if func in TANH:
        f0 = torch.tanh(value)
        f1 = 1 - f0 * f0
        f2 = -2 * f0 * f1
    elif func in SIN:
        f0, f1 = torch.sin(value), torch.cos(value)
        f2 = -f0
    else:
        one = torch.ones_like(value)
        (f0, f1), (_, f2) = pushed(lambda y: pushed(lambda s: func(s, *args, **kwargs), y, one), value, one)
    return z.like(torch.cat([f0[None], f1 * first, (f1 * lap + f2 * z.square_sum(first, first))[None]]))


def _piecewise_linear(func: Any, z: Jet, *args: Any, **kwargs: Any) -> Jet:
    warnings.warn(
        f"{func.__name__} has no second derivative: the Laplacian of such a network is zero almost everywhere "
        "and the residual cannot see the PDE; take tanh, sin, SiLU, GELU or softplus",
        stacklevel=2,
    )
    return _elementwise(func, z, *args, **kwargs)


def _along_features(func: Any, z: Jet, *args: Any, **kwargs: Any) -> Jet:
    """Linear maps that act alike on each component, on an axis counted from the end (or moved past the jet axis)."""
    axes = args[0] if args else kwargs.get("dim")
    rest = {k: v for k, v in kwargs.items() if k != "dim"}
    axes = tuple(range(z.ndim)) if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)
    return z.like(func(z.data, tuple(a + 1 if a >= 0 else a for a in axes), *args[1:], **rest))


def _axis(func: Any, z: Jet, dim: int) -> Jet:
    return z.like(func(z.data, dim + 1 if dim >= 0 else dim))


def _squeeze(func: Any, z: Jet, dim: int | None = None) -> Jet:
    return z.like(z.data.reshape(-1, *[s for s in z.shape if s != 1])) if dim is None else _axis(torch.squeeze, z, dim)


def _reshape(func: Any, z: Jet, *shape: Any) -> Jet:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return z.like(z.data.reshape(z.data.shape[0], *sizes))


def _flatten(func: Any, z: Jet, *_: Any) -> Jet:
    return z.like(z.data.flatten(1))


def _join(func: Any, parts: Sequence[Any], dim: int = 0) -> Jet:
    jet = next(p for p in parts if isinstance(p, Jet))
    data = [
        p.data if isinstance(p, Jet) else torch.cat([p[None], p.new_zeros(jet.data.shape[0] - 1, *p.shape)])
        for p in parts
    ]
    return jet.like(func(data, dim + 1 if dim >= 0 else dim))


def _negative(func: Any, z: Jet) -> Jet:
    return -z


def _square(func: Any, z: Jet) -> Jet:
    return _multiply(None, z, z)


def _dropout(func: Any, z: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    if training:
        _no("dropout in training mode")
    return z


def _no(what: str) -> Any:
    raise NoRule(what)


TANH = {torch.tanh, Tensor.tanh, F.tanh}
SIN = {torch.sin, Tensor.sin}
_SMOOTH = (
    "cos",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "sigmoid",
    "sinh",
    "cosh",
    "atan",
    "asinh",
    "erf",
    "log1p",
    "expm1",
    "pow",
)
RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys([*TANH, *SIN], _elementwise),
    **dict.fromkeys([getattr(torch, n) for n in _SMOOTH] + [getattr(Tensor, n) for n in _SMOOTH], _elementwise),
    **dict.fromkeys(
        [
            F.silu,
            F.gelu,
            F.softplus,
            F.elu,
            F.celu,
            F.mish,
            F.sigmoid,
            F.logsigmoid,
            F.tanhshrink,
            F.softsign,
        ],
        _elementwise,
    ),
    **dict.fromkeys(
        [
            F.relu,
            torch.relu,
            Tensor.relu,
            F.leaky_relu,
            F.relu6,
            F.hardtanh,
            torch.abs,
            Tensor.abs,
            F.hardswish,
        ],
        _piecewise_linear,
    ),
    **dict.fromkeys([torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__], _add),
    **dict.fromkeys([torch.sub, Tensor.sub, Tensor.__sub__], _subtract),
    **dict.fromkeys([torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__], _multiply),
    **dict.fromkeys([torch.div, Tensor.div, Tensor.__truediv__], _divide),
    Tensor.__rsub__: lambda func, a, b: _add(None, -a, b),
    **dict.fromkeys([torch.square, Tensor.square], _square),
    **dict.fromkeys([torch.neg, Tensor.neg, Tensor.__neg__], _negative),
    F.linear: _linear,
    **dict.fromkeys([torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mv, torch.mm], _matmul),
    **dict.fromkeys([torch.sum, Tensor.sum, torch.mean, Tensor.mean], _along_features),
    **dict.fromkeys([torch.unsqueeze, Tensor.unsqueeze], lambda func, z, dim: _axis(torch.unsqueeze, z, dim)),
    **dict.fromkeys([torch.squeeze, Tensor.squeeze], _squeeze),
    **dict.fromkeys([torch.reshape, Tensor.reshape, Tensor.view], _reshape),
    **dict.fromkeys([torch.flatten, Tensor.flatten], _flatten),
    **dict.fromkeys([torch.cat, torch.stack, torch.hstack], _join),
    F.dropout: _dropout,
}
del RULES[torch.hstack]  # its axis rule differs from cat's
