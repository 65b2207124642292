"""Eigenvalues of a symmetric map through its products alone.

`lanczos` is the three-term recurrence with full reorthogonalisation (Parlett 1998, chapter 13). One start vector sees
each eigenvalue once, however often it occurs; `largest` therefore goes on from a block of them: a block of k meets k
dimensions of every eigenspace, so the k largest eigenvalues are found as often as they occur (Golub & Van Loan 2013,
section 10.3.6).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
SPARE = 2  # start vectors beyond k, so that the k-th eigenvalue converges by the gap to a later one
KEPT = 2  # blocks that a restart keeps of the basis
MOST, LEAST = 10, 40  # blocks of basis, or vectors where these are more, in memory; their images are there as well
ASKED = 10  # steps of `lanczos` between questions whether they are enough
STEPS = 300  # blocks of products, if nothing else is asked for


def lanczos(
    product: Product, start: Tensor, steps: int, enough: Callable[[Tensor, Tensor], bool] = lambda diagonal, off: False
) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal (k,), off-diagonal (k,) and orthonormal basis (P, k) of a symmetric map on a Krylov space.

    The last entry of the off-diagonal leads out of the space, and is 0 where that is invariant. k < steps there, and
    where `enough` says so of the two diagonals; it is asked at every `ASKED` steps.
    """
    basis = start.new_empty(len(start), steps)
    basis[:, 0] = start / start.norm()
    diagonal, off, scale = start.new_zeros(steps), start.new_zeros(steps), 0.0
    for i in range(steps):
        w, q = product(basis[:, i]), basis[:, : i + 1]
        diagonal[i] = basis[:, i] @ w
        for _ in range(2):  # twice is enough (Parlett 1998, section 6.9)
            w = w - q @ (q.mT @ w)
        beta = float(w.norm())
        scale = max(scale, abs(float(diagonal[i])), beta)
        if beta <= 100 * torch.finfo(w.dtype).eps * scale:
            break
        off[i] = beta
        if i + 1 == steps or ((i + 1) % ASKED == 0 and enough(diagonal[: i + 1], off[: i + 1])):
            break
        basis[:, i + 1] = w / beta
    return diagonal[: i + 1], off[: i + 1], basis[:, : i + 1]


def tridiagonal(diagonal: Tensor, off: Tensor) -> Tensor:
    """The symmetric tridiagonal matrix (k, k); of the off-diagonal the first k − 1 entries count."""
    off = off[: len(diagonal) - 1]
    return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)


def largest(
    product: Product,
    start: Tensor,
    k: int,
    steps: int | None = None,
    signed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k eigenvalues largest in magnitude, as often as they occur, eigenvectors (P, k) and residuals (k,).

    Args:
        start: a random block (P, b), b ≥ k.
        steps: the most blocks of products; None is `STEPS`.
        signed: largest in value, not in magnitude.

    Warns where the residuals stay above the tolerance.
    """
    size, blocks = start.shape
    tolerance = torch.finfo(start.dtype).eps ** 0.5  # of ‖Av − θv‖ / max |θ|; the error, of second order, is rounding
    fresh = torch.linalg.qr(start).Q
    basis = image = start[:, :0]
    for _ in range(STEPS if steps is None else steps):
        basis = torch.cat([basis, fresh], dim=1)
        image = torch.cat([image, torch.stack([product(q) for q in fresh.mT], dim=1)], dim=1)
        inner = basis.mT @ image
        values, y = torch.linalg.eigh((inner + inner.mT) / 2)
        order = (values if signed else values.abs()).argsort(descending=True)
        values, y = values[order], y[:, order]
        residual = image @ y[:, :blocks] - (basis @ y[:, :blocks]) * values[:blocks]
        norms, scale = residual.norm(dim=0), float(values.abs().max())
        if bool((norms[:k] <= tolerance * scale).all()) or basis.shape[1] >= size:
            break
        if basis.shape[1] + blocks > max(MOST * blocks, LEAST):
            basis, image = basis @ y[:, : KEPT * blocks], image @ y[:, : KEPT * blocks]
        for _ in range(2):
            residual = residual - basis @ (basis.mT @ residual)
        q = torch.linalg.qr(residual[:, norms > torch.finfo(start.dtype).eps * scale]).Q
        fresh = q[:, : size - basis.shape[1]]
        for _ in range(2):
            fresh = torch.linalg.qr(fresh - basis @ (basis.mT @ fresh)).Q
    if bool((worst := norms[:k].max()) > 10 * tolerance * scale):
        warnings.warn(
            f"an eigenvalue is known to {float(worst):.1e} only, {float(worst) / scale:.1e} of the largest; more steps "
            "bring it closer",
            stacklevel=3,
        )
    return values[:k], basis @ y[:, :k], norms[:k]
