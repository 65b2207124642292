"""Solving and approximating through products with a symmetric positive definite map alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from natgrad.linalg.cholesky import damped_cholesky

CG_TOLERANCE = 1e-12  # of the residual norm, relative to the right-hand side
CG_ITERATIONS = 500  # of a solve with rows; where they do not do, a warning says how far it came


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    precondition: Callable[[Tensor], Tensor] = lambda r: r,
    tolerance: float = CG_TOLERANCE,
    limit: int | None = None,
) -> tuple[Tensor, int]:
    """Solve a positive definite system; returns the solution and the iterations taken. Warns where it stops short.

    Raises:
        ValueError: a direction of non-positive curvature shows that the system is not positive definite.
    """
    limit = max(200, 10 * b.numel()) if limit is None else limit
    x, r = torch.zeros_like(b), b.clone()
    target = tolerance * float(b.norm())
    z = precondition(r)
    p, rz = z, r @ z
    for i in range(limit):
        if float(r.norm()) <= target:
            return x, i
        ap = product(p)
        curvature = p @ ap
        if not float(curvature) > 0:
            if float(curvature) != float(curvature):
                raise ValueError("conjugate gradients met NaN: the metric or the right-hand side is not finite")
            raise ValueError(
                f"the damped metric is not positive definite (curvature {float(curvature):.3g} along a search "
                "direction); take a larger damping"
            )
        alpha = rz / curvature
        x = x + alpha * p
        r = r - alpha * ap
        z = precondition(r)
        rz_new = r @ z
        p, rz = z + (rz_new / rz) * p, rz_new
    reached = float((b - product(x)).norm()) / max(float(b.norm()), 1e-300)
    if reached > 100 * tolerance:
        warnings.warn(
            f"conjugate gradients stopped after {limit} iterations at relative residual {reached:.1e}; a larger "
            'damping or solver="kernel" | "dense" solves exactly',
            stacklevel=2,
        )
    return x, limit


def nystrom(product: Callable[[Tensor], Tensor], size: int, rank: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """U (size, rank) and eigenvalues (rank,), decreasing, of a randomised Nyström approximation of a PSD map."""
    generator = torch.Generator(device=like.device).manual_seed(0)
    test = torch.linalg.qr(torch.randn(size, rank, dtype=like.dtype, device=like.device, generator=generator)).Q
    image = torch.stack([product(v) for v in test.mT], dim=1)
    shift = torch.finfo(like.dtype).eps * float(image.norm()) * math.sqrt(size)
    image = image + shift * test
    inner = test.mT @ image
    lower = damped_cholesky((inner + inner.mT) / 2, 0.0)
    u, s, _ = torch.linalg.svd(torch.linalg.solve_triangular(lower, image.mT, upper=False).mT, full_matrices=False)
    return u, (s * s - shift).clamp(min=0)


def steps_of_conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, precondition: Callable[[Tensor], Tensor], steps: int
) -> Tensor:
    """Some steps towards the solutions of a positive definite system, each row of b (k, P) for itself, from zero.

    A row that has arrived, to rounding, stays where it is (Hestenes & Stiefel 1952, §10, preconditioned).

    Raises:
        ValueError: a direction of non-positive curvature shows that the system is not positive definite.
    """
    x, r = torch.zeros_like(b), b
    z = precondition(r)
    p, rz = z, (r * z).sum(-1)
    target = torch.finfo(b.dtype).eps * b.norm(dim=-1)
    for step in range(steps):
        on = (r.norm(dim=-1) > target) & (rz > 0)
        if not bool(on.any()):
            break
        ap = product(p)
        curvature = (p * ap).sum(-1)
        if bool((on & ~(curvature > 0)).any()):
            raise ValueError(
                "conjugate gradients met a direction without positive curvature: the metric or the gradients are not "
                "finite, or the damping is too small"
            )
        alpha = torch.where(on, rz / curvature, 0.0)[:, None]
        x, r = x + alpha * p, r - alpha * ap
        if step + 1 < steps:
            z = precondition(r)
            new = (r * z).sum(-1)
            p, rz = z + torch.where(on, new / rz, 0.0)[:, None] * p, new
    return x
