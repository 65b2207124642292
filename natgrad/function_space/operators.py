"""Differential operators of a network at one point, by forward Laplacian.

A term of a PDE sees the network as a function u of one point x, shape (d,). The operators here differentiate it in
forward mode: next to every intermediate value z they carry its jet

    (z, ∂₁z, …, ∂_d z, Σᵢ wᵢ ∂ᵢ²z)

through the network (forward Laplacian: Li et al. 2023, https://arxiv.org/abs/2307.08214; it is the Taylor mode of
second order with the second coefficients collapsed to their sum). A linear layer maps each component; an
elementwise function f maps ∂ᵢz to f′(z) ∂ᵢz and Σ wᵢ∂ᵢ²z to f′(z) Σ wᵢ∂ᵢ²z + f″(z) Σ wᵢ(∂ᵢz)². One pass costs d + 2
evaluations, where nested forward mode takes 4d. Where an operation has no rule here the whole network is
differentiated by forward over reverse mode: slower, same numbers.

Everything composes with ``torch.func`` transforms (vmap over points, derivatives with respect to parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vmap

from natgrad.function_space.forward_laplacian import Jet, NoRule, pushed

Field = Callable[[Tensor], Tensor]


class Derivatives(NamedTuple):
    """A field at one point: value (…), gradient (d, …), and Σᵢ wᵢ ∂ᵢ² (…)."""

    value: Tensor
    gradient: Tensor
    laplacian: Tensor


def derivatives(u: Field, x: Tensor, weights: Tensor | Sequence[float] | None = None) -> Derivatives:
    """u, ∇u and Σᵢ wᵢ ∂ᵢ²u at one point, in one pass.

    Args:
        u: the field, a function of one point of shape (d,).
        x: the point, shape (d,).
        weights: wᵢ, shape (d,); None is the Laplacian. ``[0, 1]`` is ∂²/∂x₂² alone.

    Raises:
        ValueError: `x` is not one point, or the weights do not fit it.
        TypeError: `x` is not floating point.
    """
    check_point(x)
    d = x.shape[0]
    w = x.new_ones(d) if weights is None else torch.as_tensor(weights, dtype=x.dtype, device=x.device)
    if w.shape != (d,):
        raise ValueError(f"weights must have one entry a coordinate, shape ({d},), got {tuple(w.shape)}")
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    try:
        out = u(Jet(torch.cat([x[None], eye, torch.zeros_like(x)[None]]), w))  # type: ignore[arg-type]
    except NoRule:
        return _nested(u, x, w)
    if not isinstance(out, Jet):  # u does not depend on x through tensor operations
        return Derivatives(out, out.new_zeros(d, *out.shape), torch.zeros_like(out))
    return Derivatives(out.data[0], out.data[1:-1], out.data[-1])


def laplacian(u: Field, x: Tensor, weights: Tensor | Sequence[float] | None = None) -> Tensor:
    """Δu = Σᵢ wᵢ ∂ᵢ²u at one point x of shape (d,), with the shape of u(x). See `derivatives`."""
    return derivatives(u, x, weights).laplacian


def gradient(u: Field, x: Tensor) -> Tensor:
    """∇u at one point x of shape (d,): (d,) for a scalar field, (d, …) in general."""
    check_point(x)
    eye = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
    return vmap(lambda v: pushed(u, x, v)[1])(eye)


def value_and_gradient(u: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """u (…) and ∇u (d, …) at one point x of shape (d,), in one pass."""
    check_point(x)
    eye = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
    value, slope = vmap(lambda v: pushed(u, x, v), out_dims=(0, 0))(eye)
    return value[0], slope


def divergence(u: Field, x: Tensor) -> Tensor:
    """∇·u of a vector field u: (d,) → (d,) at one point, a scalar.

    Raises:
        ValueError: the field does not have one component a coordinate.
    """
    jacobian = gradient(u, x)  # (coordinate, component)
    if jacobian.shape != (x.shape[0], x.shape[0]):
        raise ValueError(
            f"divergence needs a field with one component a coordinate: at x of shape {tuple(x.shape)} "
            f"it must return shape ({x.shape[0]},), got {tuple(jacobian.shape[1:])}"
        )
    return jacobian.diagonal().sum()


def time_derivative(u: Field, x: Tensor, axis: int = 0) -> Tensor:
    """∂u/∂t at one point whose coordinate `axis` is time (the first, unless said otherwise), with the shape of u(x)."""
    check_point(x)
    direction = torch.zeros_like(x)
    direction[axis] = 1
    return jvp(u, (x,), (direction,))[1]


def check_point(x: Tensor) -> None:
    """One floating-point point of shape (d,).

    Raises:
        ValueError: wrong shape.
        TypeError: not floating point.
    """
    if x.ndim != 1:
        raise ValueError(
            f"operators take one point of shape (d,), got shape {tuple(x.shape)}; the batch is mapped over by the "
            "metric (or torch.func.vmap)"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"operators differentiate with respect to the point, which must be floating point, got {x.dtype}; cast it "
            "with .double()"
        )


def _nested(u: Field, x: Tensor, w: Tensor) -> Derivatives:
    """Forward over reverse mode: forward mode twice is wrong for some fused kernels of torch 2.13 (layer_norm)."""
    slope = jacrev(u)(x)  # (…, d)
    second = torch.diagonal(jacfwd(jacrev(u))(x), dim1=-2, dim2=-1)  # (…, d)
    return Derivatives(u(x), slope.movedim(-1, 0), second @ w)
