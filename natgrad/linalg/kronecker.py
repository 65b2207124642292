"""Kronecker algebra on stacks of matrices, and inverses and eigenbases that do not fail.

The convention, stated once: a layer's parameters are a matrix X of shape (d_out, d_in) and its curvature is U ⊗ V with
U (d_out, d_out) from output gradients and V (d_in, d_in) from inputs. With *row-major* vec, as in ``X.flatten()``,

    (U ⊗ V) vec(X) = vec(U X Vᵀ),      V symmetric: vec(U X V),

so ``torch.kron(U, V) @ X.flatten() == (U @ X @ V).flatten()``. All functions take stacks (…, d, d); where one takes a
side, that may be kept in pieces along its diagonal, see `natgrad.linalg.block_diagonal`.

Factored damping splits λ between the factors (Martens & Grosse 2015, arXiv:1503.05671, §6.3); here it is relative to
the mean eigenvalue of each factor. Exact damping goes through the eigenbases: (U ⊗ V + λI)⁻¹ has the eigenvalues
1/(u_i v_j + λ).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from natgrad.linalg.block_diagonal import diagonal_of, is_diagonal, pieces_of, side_of, spans

JITTER = 1e-7  # first jitter, relative to the mean eigenvalue; grows a hundredfold a try
TRIES = 3


class FactorisationError(RuntimeError):
    """A curvature factor could not be factorised by any means: it holds NaN or Inf."""


def eigen_of(side: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues (…, d) and eigenvectors of a side; None where it is diagonal: the axes themselves."""
    if is_diagonal(side):
        return diagonal_of(side).clamp(min=0), None
    found = [safe_eigh(m) for m in pieces_of(side)]
    return torch.cat([values for values, _ in found], dim=-1), side_of([vectors for _, vectors in found])


def symmetrise(m: Tensor) -> Tensor:
    return (m + m.mT) / 2


def mean_eigenvalue(m: Tensor) -> Tensor:
    """tr M / d of each matrix of a stack, (…,)."""
    return m.diagonal(dim1=-2, dim2=-1).mean(-1)


def safe_eigh(m: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (…, d), not below zero, and eigenvectors (…, d, d) of a positive semi-definite stack.

    The ladder: symmetrise → as it is → jitter on the diagonal → float64.

    Raises:
        FactorisationError: the matrix holds NaN or Inf, or does not converge in float64 either.
    """
    m = finite(symmetrise(m))
    size = mean_eigenvalue(m)[..., None, None]
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    for attempt in range(TRIES):
        try:
            values, vectors = torch.linalg.eigh(
                m if attempt == 0 else m + eye * (size * JITTER * 100.0 ** (attempt - 1))
            )
            return values.clamp(min=0), vectors
        except torch.linalg.LinAlgError:
            continue
    warnings.warn(f"eigh of a {tuple(m.shape)} factor did not converge in {m.dtype}; taken in float64", stacklevel=2)
    try:
        values, vectors = torch.linalg.eigh(m.double())
    except torch.linalg.LinAlgError as error:
        raise FactorisationError(f"eigh of a {tuple(m.shape)} factor does not converge: {error}") from error
    return values.clamp(min=0).to(m.dtype), vectors.to(m.dtype)


def damped_inverse(m: Tensor, damping: Tensor | float) -> Tensor:
    """(M + damping·I)⁻¹ of a positive semi-definite stack, by Cholesky. `damping` broadcasts over the stack.

    The ladder: symmetrise → as it is → float64 eigenvalues, clamped at zero. No jitter: the damping is exact.

    Raises:
        FactorisationError: the matrix holds NaN or Inf.
    """
    m = finite(symmetrise(m))
    damping = torch.as_tensor(damping, dtype=m.dtype, device=m.device)
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    lower, info = torch.linalg.cholesky_ex(m + eye * damping[..., None, None])
    if not bool(info.any()):
        return torch.cholesky_inverse(lower)
    values, vectors = safe_eigh(m.double())
    return ((vectors / (values + damping.double()[..., None])[..., None, :]) @ vectors.mT).to(m.dtype)


def relative_inverse(side: Tensor, damping: float, found: Sequence[Tensor | None] = (), own: int = 0) -> Tensor:
    """Return (U/t_U + √λ T)⁻¹ with t the mean eigenvalue over all groups: one side under relative, factored damping.

    T is I where nothing is said. The last `own` columns are of biases, whose input 1 has other units than the inputs: T
    is the mean of the others for the others, and a bias's own second moment for a bias, over t. So a model of inputs in
    thousands takes the steps of one of inputs near 1.

    A factor that is zero stays at its damping: its inverse is I/√λ. `found`: the pieces that are there already.
    """
    if is_diagonal(side):
        diagonal = diagonal_of(side)
        return 1 / (side * per(diagonal.mean()) + damping**0.5 * damped_by(diagonal, own).reshape(side.shape))
    found = found or [None] * len(pieces_of(side))
    return side_of(
        [damped_inverse(*relative_system(side, i, damping, own)) if m is None else m for i, m in enumerate(found)]
    )


def damped_eigenvalues(side: Tensor, damping: float, own: int = 0) -> Tensor:
    """Return the eigenvalues of U + √λ t_U T, (…, d), in the order of those of `eigen_of`: `relative_inverse`'s own."""
    diagonal = diagonal_of(side)
    added = damping**0.5 * diagonal.mean() * damped_by(diagonal, own)
    if is_diagonal(side):
        return (diagonal + added).clamp(min=0)
    pieces = zip(pieces_of(side), added.split([p.shape[-1] for p in pieces_of(side)], dim=-1))
    return torch.cat([safe_eigh(p + torch.diag_embed(more))[0] for p, more in pieces], dim=-1)


def damped_by(diagonal: Tensor, own: int) -> Tensor:
    """Return the diagonal of T, (…, d), of a side's own; 1 for inputs that are all zero."""
    out = torch.ones_like(diagonal)
    if not own:
        return out
    width = diagonal.shape[-1] - own
    size = diagonal.mean()
    inputs = diagonal[..., :width].mean() * per(size)
    out[..., :width] = torch.where(inputs > 0, inputs, 1.0)
    biases = diagonal[..., width:] * per(size)
    out[..., width:] = torch.where(biases > 0, biases, 1.0)
    return out


def relative_system(side: Tensor, number: int, damping: float, own: int = 0) -> tuple[Tensor, float]:
    """(M, a) with M + aI what is inverted for one piece (…, w, w) of a side that is not diagonal."""
    diagonal = diagonal_of(side)
    start, stop = spans(*side.shape[-2:])[number]
    m = side[..., : stop - start, start:stop] * per(diagonal.mean())  # of the whole: pieces keep their relative sizes
    if own:
        m = m + torch.diag_embed(damping**0.5 * (damped_by(diagonal, own)[..., start:stop] - 1))
    return m, damping**0.5


def negligible(dtype: torch.dtype) -> float:
    """Return what a mean eigenvalue counts as zero below: its reciprocal and its square would leave the dtype's range,
    and the entries that it is the mean of have lost their digits. A classifier that is sure of all labels gets there.
    """
    info = torch.finfo(dtype)
    return info.tiny / info.eps


def per(size: Tensor) -> Tensor:
    """1 / size, a scalar; 0 where that is, see `negligible`."""
    return torch.where(size > negligible(size.dtype), 1 / size, torch.zeros_like(size))


def finite(m: Tensor) -> Tensor:
    if isfinite(float(torch.linalg.vector_norm(m.detach()))):  # one pass; it may overflow where no entry does
        return m
    if not bool(torch.isfinite(m).all()):
        raise FactorisationError(f"a curvature factor of shape {tuple(m.shape)} holds NaN or Inf")
    return m
