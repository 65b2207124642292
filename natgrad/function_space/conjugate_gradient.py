"""Solving with a metric given by rows through products alone: preconditioned conjugate gradients.

The preconditioner of `Nystrom` is a randomised low-rank approximation of JᵀJ (Frangella, Tropp, Udell 2021,
https://arxiv.org/abs/2110.02820, algorithms 2.1 and 5.1).
"""

from __future__ import annotations

from torch import Tensor

from natgrad.function_space.jacobian import JacobianOperator
from natgrad.function_space.solvers import Solver
from natgrad.linalg.krylov import CG_ITERATIONS, CG_TOLERANCE, conjugate_gradient, nystrom

NYSTROM_RANK = 100


class Nystrom:
    """r ↦ (ĝ_rank + λI)⁻¹r up to a constant, with a Nyström approximation of ĝ = JᵀJ."""

    def __init__(self, rows: JacobianOperator, damping: float) -> None:
        rank = min(NYSTROM_RANK, rows.count, rows.parameters)
        self.basis, self.values = nystrom(lambda v: rows.vjp(rows.jvp(v)), rows.parameters, rank, rows.like)
        self.scale = (self.values[-1] + damping) / (self.values + damping) - 1

    def __call__(self, r: Tensor) -> Tensor:
        return r + self.basis @ (self.scale * (self.basis.mT @ r))


class ConjugateGradient(Solver):
    """(JᵀJ + λI)⁻¹ by conjugate gradients. Products alone, from a kept J where it is small."""

    def __init__(self, rows: JacobianOperator, damping: float) -> None:
        self.rows, self.damping = rows.kept(), damping
        self.iterations = 0  # of the last solve
        self.precondition = Nystrom(self.rows, damping)

    def product(self, v: Tensor) -> Tensor:
        return self.rows.vjp(self.rows.jvp(v)) + self.damping * v

    def sharp(self, g: Tensor) -> Tensor:
        x, self.iterations = conjugate_gradient(self.product, g, self.precondition, CG_TOLERANCE, CG_ITERATIONS)
        return x

    def logdet(self) -> Tensor:
        n, p = self.rows.count, self.rows.parameters
        raise NotImplementedError(
            "conjugate gradients give no determinant; take "
            + (f'solver="kernel" ({n} rows, {p} parameters)' if n < p else f'solver="dense" ({p} parameters, {n} rows)')
        )
