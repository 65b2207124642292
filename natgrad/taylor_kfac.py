"""Kronecker factors of PDE residuals, through the Taylor coefficients of the differential operator.

Under the forward Laplacian a linear layer maps S = d + 2 components (value, first derivatives, Laplacian) with one
weight, as it maps positions in weight sharing. With a_s the inputs (a one for the bias beside the value) and g_s
the derivatives of the residual with respect to the outputs, the residual's derivative is Σ_s g_s a_sᵀ, and the
expand approximation of its second moment is

    B ⊗ A,    A = Σ_{n,s} a aᵀ / (N S),    B = Σ_{n,s} g gᵀ / N

(Dangel, Müller & Zeinhofer 2024, https://arxiv.org/abs/2405.15603, section 3). Components that the residual does
not depend on are left out of A and S, so one component on a linear network is exact. Blocks of terms add: X ↦ Σ_t
B_t X A_t on the (out, in + 1) matrix of a layer.

(Σ_t B_t X A_t + λX) = G is solved exactly through eigenbases for one term. The sum of two terms is diagonal in
their generalised eigenbasis, but λI is not: there the basis, with λ split over the second term's factors,
preconditions conjugate gradients on the sum with λI itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from natgrad.jet import Jet
from natgrad.metric import Vector
from natgrad.residuals import Residuals, Term
from natgrad.solvers import Rows, conjugate_gradient, damped_cholesky

TOLERANCE = 1e-10
UNSEEN = (
    'solver="kfac" cannot see how the residual of term {!r} depends on {}: it covers linear layers under '
    'natgrad.operators.laplacian and derivatives; take solver="kernel" or "cg" for other layers or derivatives'
)
AGREEMENT = 1e-6  # of Σ g aᵀ with the residual's derivative, relative


class LinearTap(TorchFunctionMode):
    """Notes the input of every linear layer and adds a shift to its output, in the order of use."""

    def __init__(self, names: dict[int, tuple[str, str | None]], shifts: list[Tensor] | None) -> None:
        super().__init__()
        self.names, self.shifts = names, shifts  # id of a weight → names of weight and bias
        self.layers: list[tuple[str, str | None]] = []
        self.inputs: list[Tensor] = []
        self.shapes: list[torch.Size] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.linear or id(args[1]) not in self.names:
            return out
        jet = isinstance(args[0], Jet)
        data, result = (args[0].data, out.data) if jet else (args[0][None], out[None])
        one = torch.zeros_like(data[:, :1])
        one = torch.cat([torch.ones_like(one[:1]), one[1:]])
        self.layers.append(self.names[id(args[1])])
        self.inputs.append(torch.cat([data, one], dim=1))  # (S, in + 1)
        self.shapes.append(result.shape)
        if self.shifts is not None:
            result = result + self.shifts[len(self.layers) - 1]
        return args[0].like(result) if jet else result[0]


class TermFactors:
    """(A, B) of every linear layer for one term, ``{(weight, bias): (A, B)}``."""

    def __init__(self, residuals: Residuals, name: str, params: Vector) -> None:
        data, term = residuals.batch[name], residuals.terms[name]
        weights = {n for n, p in params.items() if p.ndim == 2}
        names = {
            id(params[w]): (w, b if (b := w.removesuffix("weight") + "bias") in params else None)
            for w in weights
            if w.endswith("weight")
        }

        def trace(shifts: list[Tensor] | None, *at: Tensor) -> tuple[Tensor, LinearTap]:
            tap = LinearTap(names, shifts)

            def u(x: Tensor) -> Any:
                with tap:
                    return residuals.field(params)(x)

            return term(u, *at).reshape(-1), tap

        tap = trace(None, *(d[0] for d in data))[1]
        self.layers = tap.layers
        zeros = [params[next(iter(params))].new_zeros(s) for s in tap.shapes]

        def residual(shifts: list[Tensor], *at: Tensor) -> tuple[Tensor, list[Tensor]]:
            r, tap = trace(shifts, *at)
            return r, tap.inputs

        try:
            g, a = vmap(jacrev(residual, has_aux=True), (None, *(0,) * len(data)))(
                zeros, *data
            )  # g (N, k, S, out), a (N, S, in + 1)
        except RuntimeError as error:  # an input of a layer belongs to a transform inside the term and cannot leave it
            raise ValueError(UNSEEN.format(name, list(params))) from error
        self._check_seen(
            name, residuals, params, term, [t[:1] for t in g], [t[:1] for t in a], tuple(d[:1] for d in data)
        )
        weight, n = residuals.weights[name], len(data[0])
        self.factors: dict[tuple[str, str | None], tuple[Tensor, Tensor]] = {}
        for layer in dict.fromkeys(self.layers):
            calls = [i for i, other in enumerate(self.layers) if other == layer]
            active = [
                (g[i].reshape(n, -1, *g[i].shape[2:])[:, :, s], a[i][:, s])
                for i in calls
                for s in range(a[i].shape[1])
                if bool(g[i][:, :, s].any())
            ]
            if not active:
                continue
            left = torch.stack([torch.einsum("nko,nkp->op", gs, gs) for gs, _ in active]).sum(0) * (weight / n)
            right = torch.stack([a_s.mT @ a_s for _, a_s in active]).sum(0) / (n * len(active))
            self.factors[layer] = (right, left)

    def _check_seen(
        self,
        name: str,
        residuals: Residuals,
        params: Vector,
        term: Term,
        g: list[Tensor],
        a: list[Tensor],
        at: tuple[Tensor, ...],
    ) -> None:
        """Σ g aᵀ at one point is the residual's derivative there, unless a derivative went another way than through the
        operators.

        Raises:
            ValueError: it is not.
        """
        seen = {n: torch.zeros_like(p) for n, p in params.items()}
        for layer, gi, ai in zip(self.layers, g, a):
            block = torch.einsum("so,si->oi", gi[0, 0], ai[0])
            weight, bias = layer
            seen[weight] = seen[weight] + block[:, :-1]
            if bias is not None:
                seen[bias] = seen[bias] + block[:, -1]
        true = jacrev(lambda p: term(residuals.field(p), *(d[0] for d in at)).reshape(-1)[0])(params)
        off = [n for n in params if float((seen[n] - true[n]).norm()) > AGREEMENT * float(true[n].norm()) + 1e-300]
        if off:
            raise ValueError(UNSEEN.format(name, off))


class KroneckerTerms:
    """Σ_t B_t ⊗ A_t over layers as a map on flat vectors, and (that + λI)⁻¹. Has the verbs of a solver."""

    def __init__(self, residuals: Residuals, params: Vector) -> None:
        self.shapes = {n: p.shape for n, p in params.items()}
        terms = [TermFactors(residuals, name, params).factors for name in residuals.batch]
        self.blocks = {
            layer: [t[layer] for t in terms if layer in t] for layer in dict.fromkeys(k for t in terms for k in t)
        }

    def product(self, v: Tensor) -> Tensor:
        return self._by_layer(v, lambda x, factors: torch.stack([b @ x @ a for a, b in factors]).sum(0))

    def _by_layer(self, v: Tensor, f: Callable[[Tensor, list[tuple[Tensor, Tensor]]], Tensor]) -> Tensor:
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


class Kronecker:
    """(Σ_t B_t ⊗ A_t + λI)⁻¹ as a solver; see the module docstring."""

    def __init__(self, terms: KroneckerTerms, rows: Rows, damping: float) -> None:
        self.terms, self.rows, self.damping = terms, rows, damping
        self.iterations = 0  # of conjugate gradients in the last solve
        self.bases = {id(factors): simultaneous(factors, damping) for factors in terms.blocks.values()}

    def _precondition(self, g: Tensor) -> Tensor:
        covered = self.terms._by_layer(g, lambda x, factors: self._apply(x, factors))
        return torch.where(self._outside(g), g / self.damping, covered)

    def _apply(self, x: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        u_a, u_b, scale = self.bases[id(factors)]
        return u_b @ ((u_b.mT @ x @ u_a) * scale) @ u_a.mT

    def _outside(self, g: Tensor) -> Tensor:
        """Entries of parameters that no term depends on."""
        covered = {n for layer in self.terms.blocks for n in layer if n is not None}
        return torch.cat(
            [
                torch.full((s.numel(),), n not in covered, dtype=torch.bool, device=g.device)
                for n, s in self.terms.shapes.items()
            ]
        )

    def sharp(self, g: Tensor) -> Tensor:
        if all(len(f) == 1 for f in self.terms.blocks.values()) and all(
            bias is not None for _, bias in self.terms.blocks
        ):
            return self._precondition(g)  # exact
        x, self.iterations = conjugate_gradient(
            lambda v: self.terms.product(v) + self.damping * v, g, self._precondition, TOLERANCE
        )
        return x

    def pull(self, c: Tensor) -> Tensor:
        return self.sharp(self.rows.vjp(c))

    def logdet(self) -> Tensor:
        raise NotImplementedError  # GaussNewton takes the determinant of the dense matrix


def simultaneous(factors: list[tuple[Tensor, Tensor]], damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """U_A, U_B and s with (Σ B ⊗ A + λI)⁻¹ G ≈ U_B (s ∘ U_Bᵀ G U_A) U_Aᵀ: exact for one term, for the two largest of "
    "several up to how λ is split."""
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
