"""Solving with a metric given by rows, ĝ = JᵀJ, J of shape (N, P).

Each solver is made from `JacobianOperator` and a damping λ > 0 (factorise once) and has two verbs (apply many times):

- ``sharp(g)`` is (JᵀJ + λI)⁻¹ g for any covector g;
- ``pull(c)`` is (JᵀJ + λI)⁻¹ Jᵀc for a covector given through the rows. At small λ this is far better conditioned:
  the way by Jᵀc and ``sharp`` loses the components of c along small singular values to cancellation.

`Dense` never forms JᵀJ: it triangularises [√λ I; J] by a QR decomposition over chunks of rows, so that RᵀR = JᵀJ + λI
with the condition number of J instead of its square, and applies R by the corrected seminormal equations (Björck
1987, https://doi.org/10.1016/0024-3795(87)90101-7). `Kernel` uses Woodbury's identity, δ = Jᵀ(JJᵀ + λI)⁻¹c, with N×N
matrices. `natgrad.function_space.conjugate_gradient.ConjugateGradient` takes products with J alone.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from natgrad.function_space.jacobian import JacobianOperator, gathered
from natgrad.linalg.cholesky import NOT_FINITE, damped_cholesky, ensure_fits, free_bytes
from natgrad.metric.metric import DENSE_PARAMETERS


class Solver:
    """What a solver does; see the module docstring."""

    rows: JacobianOperator

    def __init__(self, rows: JacobianOperator, damping: float) -> None:
        raise NotImplementedError

    def sharp(self, g: Tensor) -> Tensor:
        raise NotImplementedError

    def pull(self, c: Tensor) -> Tensor:
        return self.sharp(self.rows.vjp(c))

    def logdet(self) -> Tensor:
        """log det(JᵀJ + λI)"""
        raise NotImplementedError

    def damped(self, damping: float) -> Solver | None:
        """The same with another damping, where that costs less than a new one."""
        return None


class Dense(Solver):
    """Triangular factor of JᵀJ + λI in parameter space: O(NP² + P³) once, O(NP + P²) a solve."""

    def __init__(self, rows: JacobianOperator, damping: float) -> None:
        n = rows.parameters
        ensure_fits(
            2 * n * n * rows.like.element_size(),
            f"the dense {n}×{n} factor of the metric",
            'solver="cg"',
            rows.like,
        )
        self.rows, self.damping = rows.kept(), damping
        factor = self._root(damping)
        for chunk in gathered(self.rows.chunks(), n):
            factor = torch.linalg.qr(torch.cat([factor, chunk]), mode="r").R
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(NOT_FINITE)
        self.factor = factor

    def _root(self, damping: float) -> Tensor:
        """√λ I"""
        like = self.rows.like
        return math.sqrt(damping) * torch.eye(self.rows.parameters, dtype=like.dtype, device=like.device)

    def damped(self, damping: float) -> Dense | None:
        """The same with more damping, without going over the rows again: O(P³). None for less."""
        if damping < self.damping:
            return None
        out = copy.copy(self)
        more = torch.cat([self.factor, self._root(damping - self.damping)])
        out.damping, out.factor = damping, torch.linalg.qr(more, mode="r").R
        return out

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


class Kernel(Solver):
    """Woodbury: Cholesky of JJᵀ + λI in the space of residuals: O(N²P + N³) once, O(NP + N²) a solve."""

    REFINEMENTS = 2
    REFINED = 1e-10  # a residual, relative to the right-hand side, that is small enough

    def __init__(self, rows: JacobianOperator, damping: float) -> None:
        n, size = rows.count, rows.like.element_size()
        ensure_fits(
            2 * n * n * size,
            f"the {n}×{n} kernel matrix",
            'solver="dense" or "cg", or fewer points',
            rows.like,
        )
        if rows.gram is None:
            ensure_fits(
                n * rows.parameters * size,
                f"the {n}×{rows.parameters} Jacobian",
                'solver="cg" or fewer points',
                rows.like,
            )
            rows = JacobianOperator.of(rows.matrix())
        self.damping, self.rows = damping, rows
        self.kernel = rows.product()
        self.lower = damped_cholesky(self.kernel, damping)

    def damped(self, damping: float) -> Kernel:
        """The same with another damping: O(N³)."""
        out = copy.copy(self)
        out.damping, out.lower = damping, damped_cholesky(self.kernel, damping)
        return out

    def _solve(self, c: Tensor) -> Tensor:
        """(JJᵀ + λI)⁻¹ c, refined with the residual of the equations themselves; the best iterate is kept."""
        y = torch.cholesky_solve(c[:, None], self.lower)[:, 0]
        residual = c - self.rows.jvp(self.rows.vjp(y)) - self.damping * y
        for _ in range(self.REFINEMENTS):
            if residual.norm() <= self.REFINED * c.norm():
                break
            trial = y + torch.cholesky_solve(residual[:, None], self.lower)[:, 0]
            left = c - self.rows.jvp(self.rows.vjp(trial)) - self.damping * trial
            if not left.norm() < residual.norm():
                break
            y, residual = trial, left
        return y

    def sharp(self, g: Tensor) -> Tensor:
        return (g - self.pull(self.rows.jvp(g))) / self.damping

    def pull(self, c: Tensor) -> Tensor:
        return self.rows.vjp(self._solve(c))

    def logdet(self) -> Tensor:
        n = len(self.lower)
        return 2 * self.lower.diagonal().log().sum() + (self.rows.parameters - n) * math.log(self.damping)


def choose(rows: JacobianOperator) -> tuple[str, str]:
    """The solver `auto` takes, and why."""
    n, p = rows.count, rows.parameters
    if n < p and (2 * n * n + n * p) * rows.like.element_size() < free_bytes(rows.like.device):
        return "kernel", f"{n} rows are fewer than {p} parameters"
    if p <= DENSE_PARAMETERS:
        return "dense", f"{p} parameters are no more than {n} rows, and at most {DENSE_PARAMETERS}"
    return "cg", f"{n} rows and {p} parameters are both too many to factorise"
