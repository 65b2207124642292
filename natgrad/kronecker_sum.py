"""Sums of Kronecker products Σ_t B_t ⊗ A_t over the layers of a network: products and inverses.

A sum maps the (out, in + 1) matrix X of a layer to Σ_t B_t X A_t. Its inverse with λI is exact through eigenbases for
one term. Two terms are diagonal in their generalised eigenbasis, but λI is not: with λ split over the factors of the
second term (factored damping) the basis gives an approximate inverse, which preconditions conjugate gradients on the
sum with λI itself (`KroneckerSolver`), or on JᵀJ + λI (`preconditioner`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from natgrad.iterative import conjugate_gradient
from natgrad.jacobian import Rows
from natgrad.metric import Vector
from natgrad.residuals import Residuals
from natgrad.solvers import damped_cholesky
from natgrad.taylor_kfac import TermFactors

TOLERANCE = 1e-10
SHARE = 0.1  # of the trace, added to the damping of the preconditioner of JᵀJ; see docs/decisions.md
Factors = list[tuple[Tensor, Tensor]]  # (A_t, B_t)


class KroneckerSum:
    """Σ_t B_t ⊗ A_t as a map on flat vectors."""

    def __init__(self, residuals: Residuals, params: Vector) -> None:
        self.shapes = {n: p.shape for n, p in params.items()}
        terms = [TermFactors(residuals, name, params).factors for name in residuals.batch]
        self.blocks: dict[tuple[str, str | None], Factors] = {
            layer: [t[layer] for t in terms if layer in t] for layer in dict.fromkeys(k for t in terms for k in t)
        }

    def product(self, v: Tensor) -> Tensor:
        return self.by_layer(v, lambda x, factors: torch.stack([b @ x @ a for a, b in factors]).sum(0))

    def trace(self) -> float:
        return sum(float(a.trace() * b.trace()) for factors in self.blocks.values() for a, b in factors)

    def by_layer(self, v: Tensor, f: Callable[[Tensor, Factors], Tensor]) -> Tensor:
        """f of each layer's (out, in + 1) matrix and factors; zero for parameters that no term depends on."""
        parts = dict(zip(self.shapes, v.split([s.numel() for s in self.shapes.values()])))
        out = {n: torch.zeros_like(p) for n, p in parts.items()}
        for (weight, bias), factors in self.blocks.items():
            w = parts[weight].reshape(self.shapes[weight])
            column = torch.zeros_like(w[:, :1]) if bias is None else parts[bias][:, None]
            y = f(torch.cat([w, column], dim=1), factors)  # (out, in + 1)
            out[weight] = y[:, :-1].reshape(-1)
            if bias is not None:
                out[bias] = y[:, -1]
        return torch.cat(list(out.values()))


class FactoredInverse:
    """g ↦ (Σ_t B_t ⊗ A_t + λI)⁻¹g: exact where every layer has one term and a bias, else with factored damping."""

    def __init__(self, terms: KroneckerSum, damping: float) -> None:
        self.terms, self.damping = terms, damping
        self.bases = {id(factors): simultaneous(factors, damping) for factors in terms.blocks.values()}
        self.exact = all(len(f) == 1 for f in terms.blocks.values()) and all(b is not None for _, b in terms.blocks)
        covered = {n for layer in terms.blocks for n in layer if n is not None}
        self.uncovered = torch.cat(
            [torch.full((s.numel(),), n not in covered, dtype=torch.bool) for n, s in terms.shapes.items()]
        )

    def __call__(self, g: Tensor) -> Tensor:
        return torch.where(self.uncovered.to(g.device), g / self.damping, self.terms.by_layer(g, self._apply))

    def _apply(self, x: Tensor, factors: Factors) -> Tensor:
        u_a, u_b, scale = self.bases[id(factors)]
        return u_b @ ((u_b.mT @ x @ u_a) * scale) @ u_a.mT


class KroneckerSolver:
    """(Σ_t B_t ⊗ A_t + λI)⁻¹ with the verbs of a solver."""

    def __init__(self, terms: KroneckerSum, rows: Rows, damping: float) -> None:
        self.terms, self.rows, self.damping = terms, rows, damping
        self.iterations = 0  # of conjugate gradients in the last solve
        self.inverse = FactoredInverse(terms, damping)

    def sharp(self, g: Tensor) -> Tensor:
        if self.inverse.exact:
            return self.inverse(g)
        x, self.iterations = conjugate_gradient(
            lambda v: self.terms.product(v) + self.damping * v, g, self.inverse, TOLERANCE
        )
        return x

    def pull(self, c: Tensor) -> Tensor:
        return self.sharp(self.rows.vjp(c))

    def logdet(self) -> Tensor:
        raise NotImplementedError  # GaussNewton takes the determinant of the dense matrix


def preconditioner(terms: KroneckerSum, damping: float) -> FactoredInverse:
    """The sum's inverse for conjugate gradients on JᵀJ + λI."""
    return FactoredInverse(terms, damping + SHARE * terms.trace())


def simultaneous(factors: Factors, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """U_A, U_B and s with (Σ B ⊗ A + λI)⁻¹ G ≈ U_B (s ∘ U_Bᵀ G U_A) U_Aᵀ.

    Exact for one term; for the two largest of several, up to how λ is split.
    """
    factors = sorted(factors, key=lambda f: -float(f[0].trace() * f[1].trace()))
    (a1, b1) = factors[0]
    if len(factors) == 1:
        (da, ua), (db, ub) = torch.linalg.eigh(a1), torch.linalg.eigh(b1)
        return ua, ub, 1 / (db.clamp(min=0)[:, None] * da.clamp(min=0) + damping)
    a2, b2 = factors[1]
    balance = math.sqrt(float(a2.diagonal().mean()) / max(float(b2.diagonal().mean()), 1e-300))
    ua, da = generalised(a1, a2, math.sqrt(damping) * balance)
    ub, db = generalised(b1, b2, math.sqrt(damping) / balance)
    return ua, ub, 1 / (db[:, None] * da + 1)


def generalised(m1: Tensor, m2: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """U and d with Uᵀ m1 U = diag(d), Uᵀ (m2 + damping·I) U = I."""
    lower = damped_cholesky(m2, damping)
    half = torch.linalg.solve_triangular(lower, m1, upper=False)
    inner = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    d, q = torch.linalg.eigh((inner + inner.mT) / 2)
    return torch.linalg.solve_triangular(lower.mT, q, upper=True), d.clamp(min=0)
