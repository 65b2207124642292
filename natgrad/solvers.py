"""Solving with a metric given by rows, ĝ = JᵀJ, J of shape (N, P).

Each solver is made from `Rows` and a damping λ > 0 (factorise once) and has two verbs (apply many times):

- ``sharp(g)``    (JᵀJ + λI)⁻¹ g for any covector g;
- ``pull(c)``     (JᵀJ + λI)⁻¹ Jᵀc for a covector given through the rows. At small λ this is far better conditioned: Jᵀc
→ sharp
  loses the components of c along small singular values to cancellation.

`Dense` never forms JᵀJ: it triangularises [√λ I; J] by a QR decomposition over chunks of rows, so that RᵀR = JᵀJ +
λI with the condition number of J instead of its square, and applies R by the corrected seminormal equations (Björck
1987, https://doi.org/10.1016/0024-3795(87)90101-7). `Kernel` uses Woodbury's identity, δ = Jᵀ(JJᵀ + λI)⁻¹c, with
N×N matrices. `ConjugateGradient` only takes products with J; its preconditioner is a randomised Nyström
approximation (Frangella, Tropp, Udell 2021, https://arxiv.org/abs/2110.02820, algorithms 2.1 and 5.1).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

JITTER_TRIES = 6  # each ten times the last
CG_TOLERANCE = 1e-12  # of the residual norm, relative to the right-hand side
NYSTROM_RANK = 100
KEPT_BYTES = 2**29  # a Jacobian up to this size is kept by `Dense` for products; a larger one is passed over in chunks
NOT_FINITE = (
    "the metric is not finite: a Jacobian holds inf or NaN; take shorter steps, or look at the network's values"
)
DENSE_PARAMETERS = 5000  # up to here O(P³) is quicker than iterating


@dataclass
class Rows:
    """The linear map J: products and, for solvers that need entries, chunks of rows.

    Attributes:
        count: N.
        parameters: P.
        chunks: yields (n, P) tensors, together J.
        jvp: (P,) → (N,)
        vjp: (N,) → (P,)
        like: a tensor with the dtype and device of everything.
    """

    count: int
    parameters: int
    chunks: Callable[[], Iterator[Tensor]]
    jvp: Callable[[Tensor], Tensor]
    vjp: Callable[[Tensor], Tensor]
    like: Tensor

    @staticmethod
    def of(matrix: Tensor) -> Rows:
        """The rows of a matrix (N, P) that is already there."""
        return Rows(matrix.shape[0], matrix.shape[1], lambda: iter([matrix]), matrix.mv, matrix.mT.mv, matrix)

    def matrix(self) -> Tensor:
        """J as one tensor (N, P)."""
        parts = list(self.chunks())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def stack(parts: list[tuple[float, Rows]]) -> Rows:
        """Rows of Σ cᵢ JᵢᵀJᵢ: each Jᵢ scaled by √cᵢ, one above the other."""
        roots = [(math.sqrt(c), r) for c, r in parts]
        counts = [r.count for _, r in roots]

        def vjp(c: Tensor) -> Tensor:
            return torch.stack([s * r.vjp(part) for (s, r), part in zip(roots, c.split(counts))]).sum(0)

        return Rows(
            sum(counts),
            roots[0][1].parameters,
            lambda: (s * chunk for s, r in roots for chunk in r.chunks()),
            lambda v: torch.cat([s * r.jvp(v) for s, r in roots]),
            vjp,
            roots[0][1].like,
        )


class Solver(Protocol):
    """What a solver does; see the module docstring."""

    def sharp(self, g: Tensor) -> Tensor: ...

    def pull(self, c: Tensor) -> Tensor: ...

    def logdet(self) -> Tensor: ...


class Dense:
    """Triangular factor of JᵀJ + λI in parameter space: O(NP² + P³) once, O(NP + P²) a solve."""

    def __init__(self, rows: Rows, damping: float) -> None:
        n = rows.parameters
        ensure_fits(
            2 * n * n * rows.like.element_size(),
            f"the dense {n}×{n} factor of the metric",
            'solver="cg" or "kfac"',
            rows.like,
        )
        if rows.count * n * rows.like.element_size() <= KEPT_BYTES:
            rows = Rows.of(rows.matrix())
        self.rows, self.damping = rows, damping
        factor = math.sqrt(damping) * torch.eye(n, dtype=rows.like.dtype, device=rows.like.device)
        for chunk in gathered(rows.chunks(), n):
            factor = torch.linalg.qr(torch.cat([factor, chunk]), mode="r").R
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(NOT_FINITE)
        self.factor = factor

    def _solve(self, g: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self.factor.mT, g[:, None], upper=False)
        return torch.linalg.solve_triangular(self.factor, half, upper=True)[:, 0]

    def sharp(self, g: Tensor) -> Tensor:
        x = self._solve(g)
        return x + self._solve(g - self.rows.vjp(self.rows.jvp(x)) - self.damping * x)

    def pull(self, c: Tensor) -> Tensor:
        x = self._solve(self.rows.vjp(c))
        return x + self._solve(self.rows.vjp(c - self.rows.jvp(x)) - self.damping * x)

    def logdet(self) -> Tensor:
        return 2 * self.factor.diagonal().abs().log().sum()


class Kernel:
    """Woodbury: Cholesky of JJᵀ + λI in the space of residuals: O(N²P + N³) once, O(NP + N²) a solve."""

    REFINEMENTS = 2

    def __init__(self, rows: Rows, damping: float) -> None:
        n, size = rows.count, rows.like.element_size()
        ensure_fits(
            2 * n * n * size,
            f"the {n}×{n} kernel matrix",
            'solver="dense", "cg" or "kfac", or fewer points',
            rows.like,
        )
        ensure_fits(
            n * rows.parameters * size,
            f"the {n}×{rows.parameters} Jacobian",
            'solver="cg" or "kfac", or fewer points',
            rows.like,
        )
        self.damping, self.parameters = damping, rows.parameters
        self.jacobian = rows.matrix()
        self.kernel = gram(self.jacobian)
        self.lower = damped_cholesky(self.kernel, damping)

    def _solve(self, c: Tensor) -> Tensor:
        """(JJᵀ + λI)⁻¹ c, refined with the residual of the equations themselves; the best iterate is kept."""
        y = torch.cholesky_solve(c[:, None], self.lower)[:, 0]
        residual = c - self.jacobian @ (self.jacobian.mT @ y) - self.damping * y
        for _ in range(self.REFINEMENTS):
            trial = y + torch.cholesky_solve(residual[:, None], self.lower)[:, 0]
            left = c - self.jacobian @ (self.jacobian.mT @ trial) - self.damping * trial
            if not left.norm() < residual.norm():
                break
            y, residual = trial, left
        return y

    def sharp(self, g: Tensor) -> Tensor:
        return (g - self.pull(self.jacobian @ g)) / self.damping

    def pull(self, c: Tensor) -> Tensor:
        return self.jacobian.mT @ self._solve(c)

    def logdet(self) -> Tensor:
        n = len(self.lower)
        return 2 * self.lower.diagonal().log().sum() + (self.parameters - n) * math.log(self.damping)


class ConjugateGradient:
    """Conjugate gradients on JᵀJ + λI with products only, preconditioned by a randomised Nyström approximation."""

    def __init__(self, rows: Rows, damping: float, rank: int = NYSTROM_RANK, tolerance: float = CG_TOLERANCE) -> None:
        self.rows, self.damping, self.tolerance = rows, damping, tolerance
        self.iterations = 0  # of the last solve
        self.basis, self.values = nystrom(
            lambda v: rows.vjp(rows.jvp(v)),
            rows.parameters,
            min(rank, rows.count, rows.parameters),
            rows.like,
        )

    def product(self, v: Tensor) -> Tensor:
        return self.rows.vjp(self.rows.jvp(v)) + self.damping * v

    def _precondition(self, r: Tensor) -> Tensor:
        inside = self.basis.mT @ r
        tail = self.values[-1] + self.damping
        return r + self.basis @ ((tail / (self.values + self.damping) - 1) * inside)

    def sharp(self, g: Tensor) -> Tensor:
        x, self.iterations = conjugate_gradient(self.product, g, self._precondition, self.tolerance)
        return x

    def pull(self, c: Tensor) -> Tensor:
        return self.sharp(self.rows.vjp(c))

    def logdet(self) -> Tensor:
        raise NotImplementedError('solver="cg" has no determinant; take solver="dense" or "kernel"')


# pieces -------------------------------------------------------------------------------------------------------


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


def gram(jacobian: Tensor, blocks: int = 8) -> Tensor:
    """JJᵀ, formed below the diagonal only: about half of the work."""
    n = jacobian.shape[0]
    out, step = jacobian.new_zeros(n, n), -(-n // blocks)
    for i in range(0, n, step):
        out[i : i + step, : i + step] = jacobian[i : i + step] @ jacobian[: i + step].mT
    return out.tril() + out.tril(-1).mT


def damped_cholesky(matrix: Tensor, damping: float) -> Tensor:
    """Cholesky factor of matrix + damping·I; where rounding makes that indefinite, a little more damping, then a
    warning.

    Raises:
        ValueError: the matrix is not finite, or is indefinite beyond rounding.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(NOT_FINITE)
    jitter = 0.0
    first = torch.finfo(matrix.dtype).eps * max(float(matrix.diagonal().mean()), 1e-300)
    for attempt in range(JITTER_TRIES + 1):
        damped = matrix.clone()
        damped.diagonal().add_(damping + jitter)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            return lower
        jitter = first * 10**attempt
    raise ValueError(f"matrix + {damping + jitter:.3g}·I is not positive definite; take a larger damping")


def gathered(chunks: Iterator[Tensor], rows: int) -> Iterator[Tensor]:
    """The same rows in chunks of at least `rows`, so that a QR step is worth its while."""
    waiting: list[Tensor] = []
    for chunk in chunks:
        waiting.append(chunk)
        if sum(len(w) for w in waiting) >= rows:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def ensure_fits(needed: int, what: str, instead: str, like: Tensor) -> None:
    """Refuse an allocation that cannot succeed, before it brings the machine down.

    Raises:
        MemoryError: more bytes are needed than are free; says how many and what to take instead.
    """
    free = free_bytes(like.device)
    if needed > free:
        raise MemoryError(
            f"{what} needs {needed:,} bytes ({needed / 2**30:.1f} GiB) and {free:,} are free; take {instead}"
        )


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            return 1024 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose(rows: Rows, kronecker: bool) -> tuple[str, str]:
    """The solver `auto` takes, and why."""
    n, p = rows.count, rows.parameters
    if n < p and (2 * n * n + n * p) * rows.like.element_size() < free_bytes(rows.like.device):
        return "kernel", f"{n} rows are fewer than {p} parameters"
    if p <= DENSE_PARAMETERS:
        return "dense", f"{p} parameters are no more than {n} rows, and at most {DENSE_PARAMETERS}"
    why = f"{n} rows and {p} parameters are both too many to factorise"
    return ("kfac", f"{why}; every layer has a Kronecker rule") if kronecker else ("cg", why)
