"""Differential operators of a network at one point, by forward Laplacian.

A term of a PDE sees the network as a function u of one point x, shape (d,). The operators here differentiate it in
forward mode: next to every intermediate value z they carry its jet

    (z, ∂₁z, …, ∂_d z, Σᵢ wᵢ ∂ᵢ²z)

through the network (forward Laplacian: Li et al. 2023, https://arxiv.org/abs/2307.08214; it is the Taylor mode of
second order with the second coefficients collapsed to their sum). A linear layer maps each component; an
elementwise function f maps ∂ᵢz to f′(z) ∂ᵢz and Σ wᵢ∂ᵢ²z to f′(z) Σ wᵢ∂ᵢ²z + f″(z) Σ wᵢ(∂ᵢz)². One pass costs d + 2
evaluations, where nested forward mode takes 4d. First derivatives are carried in the same way, without the last
component. Where an operation has no rule here the whole network is differentiated by reverse mode, over reverse mode
for second derivatives (`natgrad.function_space.reverse_mode`): slower, same numbers.

Everything composes with ``torch.func`` transforms (vmap over points, derivatives with respect to parameters).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from natgrad.function_space.composed import COMPOSED
from natgrad.function_space.forward_laplacian import RULES, Expansion, Jet, NoRule
from natgrad.function_space.jet_rules import TORCH
from natgrad.function_space.reverse_mode import expanded

Field = Callable[[Tensor], Tensor]
RULES.update({**TORCH, **COMPOSED})


class Derivatives(NamedTuple):
    """A field at one point: value (…), gradient (d, …), and Σᵢ wᵢ ∂ᵢ² (…)."""

    value: Tensor
    gradient: Tensor
    laplacian: Tensor


def derivatives(u: Field, x: Tensor, weights: Tensor | Sequence[float | Tensor] | None = None) -> Derivatives:
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
    out, kinks = _jets(u, x, eye(x), _weights(x, weights)) or _by_reverse_mode(u, x, _weights(x, weights))
    if kinks:
        warnings.warn(
            f"{kinks[0]} has no second derivative: the Laplacian of such a network is zero almost everywhere "
            "and the residual cannot see the PDE; take tanh, sin, SiLU, GELU or softplus",
            stacklevel=2,
        )
    return out


def laplacian(u: Field, x: Tensor, weights: Tensor | Sequence[float | Tensor] | None = None) -> Tensor:
    """Δu = Σᵢ wᵢ ∂ᵢ²u at one point x of shape (d,), with the shape of u(x). See `derivatives`."""
    return derivatives(u, x, weights).laplacian


def gradient(u: Field, x: Tensor) -> Tensor:
    """∇u at one point x of shape (d,): (d,) for a scalar field, (d, …) in general."""
    return value_and_gradient(u, x)[1]


def value_and_gradient(u: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """u (…) and ∇u (d, …) at one point x of shape (d,), in one pass."""
    check_point(x)
    out, _ = _jets(u, x, eye(x), None) or _by_reverse_mode(u, x, None)
    return out.value, out.gradient


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
    direction = eye(x)[axis]
    out, _ = _jets(u, x, direction[None], None) or _by_reverse_mode(u, x, None)
    return out.gradient[0 if len(out.gradient) == 1 else axis]


def check_point(x: Tensor) -> None:
    """One floating-point point of shape (d,).

    Raises:
        ValueError: wrong shape.
        TypeError: not floating point.
    """
    if type(x) is Jet:  # an operator of an operator: the outer one takes reverse mode
        raise NoRule("an operator")
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


def eye(x: Tensor) -> Tensor:
    """The directions of all coordinates, (d, d)."""
    return torch.eye(x.shape[0], dtype=x.dtype, device=x.device)


def _weights(x: Tensor, weights: Tensor | Sequence[float | Tensor] | None) -> Tensor:
    """wᵢ, shape (d,); a sequence may hold tensors, which keep their derivatives."""
    d = x.shape[0]
    if weights is None:
        return x.new_ones(d)
    if not isinstance(weights, Tensor):
        weights = torch.stack([torch.as_tensor(w, dtype=x.dtype, device=x.device) for w in weights])
    if weights.shape != (d,):
        raise ValueError(f"weights must have one entry a coordinate, shape ({d},), got {tuple(weights.shape)}")
    return weights.to(x)


def _jets(u: Field, x: Tensor, directions: Tensor, weights: Tensor | None) -> tuple[Derivatives, list[str]] | None:
    """Derivatives along the directions (k, d), and functions without a second one; None where jets do not pass."""
    parts = [x[None], directions] + ([] if weights is None else [torch.zeros_like(x)[None]])
    expansion = Expansion(weights)
    enabled = torch.is_grad_enabled()
    try:
        with torch.enable_grad():  # so that u's own no_grad can be told apart
            out = u(Jet(torch.cat(parts), expansion))  # type: ignore[arg-type]
    except Exception:  # no rule, or code that wants a tensor: reverse mode raises what is the fault of u
        return None
    if type(out) is Jet and out.expansion is expansion:
        out = out if enabled else out.like(out.components.detach())
        second = out.value if weights is None else out.components[-1]
        return Derivatives(out.value, out.first, second), expansion.kinks if weights is not None else []
    return None


def _by_reverse_mode(u: Field, x: Tensor, weights: Tensor | None) -> tuple[Derivatives, list[str]]:
    parts, kinks = expanded(u, x, 1 if weights is None else 2)
    value, slope = parts[0], parts[1].movedim(-1, 0)
    if weights is None:
        return Derivatives(value, slope, value), []
    second = parts[2].diagonal(dim1=-2, dim2=-1)  # (…, d)
    return Derivatives(value, slope, (second * weights).sum(-1)), kinks
