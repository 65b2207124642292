"""The nearest point of a subspace, and the dimension that data determine.

Of θ' with θ' = 0 off a set K the nearest to θ in A = ĝ + λI is

    θ'_K = θ_K + A_KK⁻¹ A_KD θ_D,    D the rest,

the compensation of optimal brain surgeon (Hassibi & Stork 1993, NIPS 5, eq. 5) for all of D at once. Blocks of layers
are solved one by one in float64: small and dense ones by Cholesky, others by conjugate gradients, preconditioned by
(A⁻¹)_KK.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from natgrad.blocks.base import Block
from natgrad.blocks.dense import LayerBlock
from natgrad.blocks.sums import copied, device_of
from natgrad.fisher.frozen import FrozenMetric, Source, frozen
from natgrad.linalg.cholesky import damped_cholesky
from natgrad.linalg.krylov import CG_TOLERANCE, conjugate_gradient
from natgrad.metric.damping import Damping, Resolved
from natgrad.metric.metric import DENSE_PARAMETERS
from natgrad.uses.arguments import Point, per_parameter, point

LIMIT = 5000  # iterations of a solve; where they do not do, a warning says how far it came


def nearest(
    metric: Source, theta: Mapping[str, Tensor], keep: Mapping[str, Tensor], damping: Damping
) -> dict[str, Tensor]:
    """Return argmin ‖θ' − θ‖ in ĝ + λI over θ' that are zero off `keep`: {name: tensor}, each of its own dtype.

    Args:
        metric: an `ng.Fisher`, or the path of its file.
        theta: θ, {name: tensor}; may hold more than the metric's parameters.
        keep: {name: bool mask}; a parameter that is not named is kept whole.
        damping: λ, absolute, or {name pattern: λ}.

    Raises:
        RuntimeError: the metric has seen no data.
        ValueError: damping, point or masks do not fit, or the masks keep nothing.
        TypeError, FileNotFoundError: the metric is none.
    """
    held = frozen(metric, "nearest")
    given = held.dampings(damping)
    masks = per_parameter(held, keep, "keep", torch.bool)
    if masks and not any(bool(m.any()) for m in masks.values()):
        raise ValueError(f"keep keeps nothing: every entry of {list(masks)} is False, so that all of it would be zero")
    return projected(held, point(held, theta, "theta"), masks, given)


def projected(metric: FrozenMetric, theta: Point, keep: Mapping[str, Tensor], damping: Resolved) -> Point:
    """`nearest` of what has been checked."""
    exact = {n: t.double() for n, t in theta.items()}
    device = metric.device
    where = {n: keep[n] if n in keep else torch.ones(t.shape, dtype=torch.bool) for n, t in theta.items()}
    found = {n: (t * where[n].to(t.device)).to(device) for n, t in exact.items()}  # where the metric is zero
    for block in metric.ready:
        x, mask = (block.pack({n: of[n].to(device) for n in block.names}) for of in (exact, where))
        if not bool(mask.all()):
            block.unpack(x * mask + compensation(block, metric, x, mask, damping), found)
    return {n: t.to(theta[n]) for n, t in found.items()}


def compensation(block: Block, metric: FrozenMetric, x: Tensor, mask: Tensor, given: Resolved) -> Tensor:
    """Return A_KK⁻¹ A_KD x_D, zero off K. `mask`: of K, in the coordinates of the block, as x."""
    exact = copied(block, metric.shapes, torch.float64)
    damping = exact.damping_of(given, metric.parameters)
    right = (exact.flat(x * ~mask) * mask).flatten()
    kept = mask.flatten()
    if isinstance(exact, LayerBlock) or exact.dimension <= DENSE_PARAMETERS:
        matrix = matrix_of(exact) + torch.diag(right.new_zeros(x.shape).add(damping).flatten())
        solution = torch.zeros_like(right)
        solution[kept] = torch.cholesky_solve(right[kept, None], damped_cholesky(matrix[kept][:, kept], 0.0))[:, 0]
        return solution.reshape(x.shape)
    inverse = exact.inverse(damping)

    def product(v: Tensor) -> Tensor:
        v = v.reshape(x.shape)
        return ((exact.flat(v) + damping * v) * mask).flatten()

    def precondition(v: Tensor) -> Tensor:
        return (inverse.apply(v.reshape(x.shape)) * mask).flatten()

    solution, _ = conjugate_gradient(product, right, precondition, tolerance_of(block), LIMIT)
    return solution.reshape(x.shape)


def tolerance_of(block: Block) -> float:
    """Of the residual: more digits than the statistics have say nothing."""
    return max(CG_TOLERANCE, torch.finfo(block.dtype).eps)


def matrix_of(block: Block) -> Tensor:
    """Return a block as a matrix (P, P) over its flattened coordinates."""
    if isinstance(block, LayerBlock):
        return block.matrix
    eye = torch.eye(block.dimension, dtype=block.dtype, device=device_of(block)).reshape(-1, *block.shape)
    return block.flat(eye).reshape(block.dimension, -1)


def effective_dimension(metric: Source, damping: float) -> Tensor:
    """Return tr ĝ (ĝ + λI)⁻¹ = Σ s / (s + λ) over the eigenvalues s: how many directions the data determine against a
    prior of precision λ, a scalar tensor.

    MacKay 1992, Neural Computation 4(3), "Bayesian interpolation", eq. 4.9, calls it γ.

    Args:
        metric: an `ng.Fisher`, or the path of its file.
        damping: λ, absolute.

    Raises:
        RuntimeError: the metric has seen no data.
        ValueError: the damping is not positive and finite.
        TypeError, FileNotFoundError: the metric is none.
    """
    held = frozen(metric, "effective_dimension")
    damping = held.check_damping(damping)
    parts = [b.eigenvalues().clamp(min=0) for b in held.ready]
    return torch.stack([(s / (s + damping)).sum() for s in parts]).sum()
