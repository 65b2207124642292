"""Metrics on functions, pulled back to the parameters of a network.

A metric on functions measures the change J v that a change v of the parameters makes in what the network is *for*:
the residuals of a PDE (`GaussNewton`, "energy natural gradient", Müller & Zeinhofer 2023,
https://arxiv.org/abs/2302.13163), the fields of a variational problem (`natgrad.Energy`), the wave function
(`natgrad.QuantumGeometry`). All have the form ĝ = JᵀJ with rows J of shape (N, P), and share the solvers of
`natgrad.solvers`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from natgrad.metric import Metric, Vector, named
from natgrad.residuals import Batch, Residuals, Term
from natgrad.solvers import ConjugateGradient, Dense, Kernel, Rows, Solver, choose, ensure_fits
from natgrad.taylor_kfac import Kronecker, KroneckerTerms

if TYPE_CHECKING:
    from natgrad.steps import StepRule

log = logging.getLogger("natgrad")
SOLVERS: dict[str, Callable[[Rows, float], Solver]] = {
    "dense": Dense,
    "kernel": Kernel,
    "cg": ConjugateGradient,
}
KFAC_DAMPING = 1e-6  # where the approximation ends, smaller damping follows its errors
DIFFERENCE = 0.1  # h of the central difference along the velocity (Transtrum & Sethna 2012, section 5)


class RootMetric(Metric):
    """ĝ = JᵀJ, linearised by `observe` at the parameters of that moment.

    A subclass sets `rows` (and `root`, c with df = Jᵀc, where the gradient has that form) in `observe`.

    Args:
        parameters: ``{name: parameter}``.
        solver: "auto", "dense", "kernel" or "cg".

    Raises:
        ValueError: no such solver.
    """

    solvers: tuple[str, ...] = ("auto", *SOLVERS)

    def __init__(self, parameters: Mapping[str, Tensor], solver: str = "auto") -> None:
        super().__init__(parameters)
        if solver not in self.solvers:
            raise ValueError(f"solver must be one of {', '.join(map(repr, self.solvers))}, got {solver!r}")
        self.solver = solver
        self.chosen = ""  # which solver serves the last batch, and why
        self.resampled: bool | None = (
            None  # whether the last batch held other tensors than the one before; None for the first
        )
        self.point: Vector = {}  # the parameters at which the metric is linearised
        self.rows: Rows | None = None
        self.root: Tensor | None = None
        self.loss: Tensor | None = None  # of the last batch
        self._factor: tuple[float, Solver] | None = None

    # the two verbs -------------------------------------------------------------------------------------

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        return self.exact_flat(v)

    def exact_flat(self, v: Mapping[str, Tensor]) -> Vector:
        """JᵀJ v, also where `flat` is an approximation of it."""
        rows = self.linearised()
        return self.flat_to_vector(rows.vjp(rows.jvp(self.vector_to_flat(self.check(v, "v")))))

    def sharp(self, df: Mapping[str, Tensor], damping: float) -> Vector:
        return self.flat_to_vector(self.factor(damping).sharp(self.vector_to_flat(self.check(df, "df"))))

    def factor(self, damping: float) -> Solver:
        """The solver with its factors at this damping; made once for one observation and damping."""
        damping = self.check_damping(damping)
        if self._factor is None or self._factor[0] != damping:
            self._factor = None  # frees the old one first
            self._factor = (damping, self._make_solver(damping))
        return self._factor[1]

    def _make_solver(self, damping: float) -> Solver:
        return SOLVERS[self.pick()](self.linearised(), damping)

    def pick(self) -> str:
        """The solver in force; `chosen` says why."""
        rows = self.linearised()
        name, why = (self.solver, "asked for") if self.solver != "auto" else choose(rows, self._kronecker_covers())
        if self.chosen != (said := f"{name}: {why}"):
            self.chosen = said
            log.info("%s solves with %s", type(self).__name__, said)
        return name

    def _kronecker_covers(self) -> bool:
        return False

    def linearised(self) -> Rows:
        """The rows of the last observed batch."""
        if self.rows is None:
            raise RuntimeError(
                f"{type(self).__name__} has seen no batch yet: call observe(batch), or opt.step(batch), first"
            )
        return self.rows

    # what follows from J -------------------------------------------------------------------------------

    def dense(self) -> Tensor:
        rows = self.linearised()
        ensure_fits(
            rows.parameters**2 * rows.like.element_size(),
            f"the dense {rows.parameters}×{rows.parameters} metric",
            "flat(v) for products",
            rows.like,
        )
        out = rows.like.new_zeros(rows.parameters, rows.parameters)
        for chunk in rows.chunks():
            out.addmm_(chunk.mT, chunk)
        return out

    def diagonal(self) -> Vector:
        rows = self.linearised()
        return self.flat_to_vector(torch.stack([chunk.square().sum(0) for chunk in rows.chunks()]).sum(0))

    def logdet(self, damping: float) -> Tensor:
        return self.factor(damping).logdet()

    def sample(self, damping: float, generator: torch.Generator | None = None) -> Vector:
        """N(0, (ĝ + λI)⁻¹) by solving with a perturbed right-hand side: x = (ĝ + λI)⁻¹(Jᵀw + √λ z), w and z standard "
        "normal."""
        rows = self.linearised()

        def normal(n: int) -> Tensor:
            return torch.randn(n, dtype=rows.like.dtype, device=rows.like.device, generator=generator)

        noise = rows.vjp(normal(rows.count)) + math.sqrt(damping) * normal(rows.parameters)
        return self.flat_to_vector(self.factor(damping).sharp(noise))

    # what the optimizer asks for -----------------------------------------------------------------------

    def gradient(self) -> Vector:
        rows = self.linearised()
        if self.root is None:
            raise NotImplementedError(f"{type(self).__name__} does not define gradient")
        return self.flat_to_vector(rows.vjp(self.root))

    def direction(self, damping: float, prior: Mapping[str, Tensor] | None = None) -> Vector:
        rows = self.linearised()
        if self.root is None:
            return super().direction(damping, prior)
        if prior is None:
            return self.flat_to_vector(self.factor(damping).pull(self.root))
        before = self.vector_to_flat(prior)  # (JᵀJ + λ)⁻¹(Jᵀc + λp) = p + (JᵀJ + λ)⁻¹Jᵀ(c − Jp)
        return self.flat_to_vector(before + self.factor(damping).pull(self.root - rows.jvp(before)))

    def acceleration(self, velocity: Mapping[str, Tensor], damping: float) -> Vector | None:
        """Geodesic acceleration a = −(ĝ + λI)⁻¹Jᵀ r_vv (Transtrum & Sethna 2012, https://arxiv.org/abs/1201.5885,
        section 5).

        r_vv is the second derivative of what the rows measure along the velocity, by a central difference.
        """
        self.linearised()
        with torch.no_grad():
            shifts = [
                self._values_at(self.moved({n: s * DIFFERENCE * v for n, v in velocity.items()})) for s in (1, 0, -1)
            ]
        if shifts[0].numel() == 0:
            return None
        bend = (shifts[0] - 2 * shifts[1] + shifts[2]) / DIFFERENCE**2
        return self.flat_to_vector(-self.factor(damping).pull(bend)) if bool(torch.isfinite(bend).all()) else None

    def _values_at(self, params: Vector) -> Tensor:
        """What the rows measure, (N,), such that J is its derivative; empty where the metric does not know it."""
        return next(iter(params.values())).new_empty(0)

    def moved(self, increments: Mapping[str, Tensor]) -> Vector:
        """The parameters at which the metric is linearised, plus increments."""
        return {n: p + increments[n] if n in increments else p for n, p in self.point.items()}

    def default_step(self) -> StepRule:
        from natgrad.searches import GridSearch

        return GridSearch()

    def _take_point(self) -> None:
        self.point = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.rows = self.root = self._factor = None


class GaussNewton(RootMetric):
    """ĝ = JᵀJ of the stacked weighted residuals of a physics-informed loss Σ_terms weight · ½ mean ‖r‖².

    Args:
        model: the network; called with one point of shape (d,).
        terms: ``{name: f}``, ``f(u, x, *data) → residual(s)`` at ONE point: u the network as a function of one point, x
            the
            point (d,), data what the batch holds beside the points. Returns () or (components,).
        weights: ``{name: weight}``; 1 for a term not named.
        solver: "auto" | "dense" | "kernel" | "cg" | "kfac". With "kfac" the metric *is* the Kronecker-factored
            approximation.
        chunk: points differentiated at once; None bounds the memory by itself.

    Example::

        u_xx = lambda u, x, f: natgrad.operators.laplacian(u, x) + f
        metric = GaussNewton(net, {"interior": u_xx, "boundary": lambda u, x, g: u(x) - g})
        opt = NaturalGradient(metric)
        loss = opt.step({"interior": (X, f), "boundary": (Xb, g)})

    Raises:
        TypeError, ValueError: the terms, weights or solver are not as above; at `observe`, the batch does not fit, a
            residual ignores the parameters or is not finite (names the term and the points).
        MemoryError: a matrix of the solver will not fit; says the bytes and the solver to take.
    """

    solvers = ("auto", *SOLVERS, "kfac")

    def __init__(
        self,
        model: nn.Module,
        terms: Mapping[str, Term],
        weights: Mapping[str, float] | None = None,
        solver: str = "auto",
        chunk: int | None = None,
    ) -> None:
        super().__init__(named(model), solver)
        self.residuals = Residuals(model, terms, weights, chunk)
        self._kronecker: KroneckerTerms | None = None

    # with "kfac" the metric is the Kronecker-factored matrix ----------------------------------------------

    def _factored(self) -> bool:
        return self.pick() == "kfac"

    def _kronecker_terms(self) -> KroneckerTerms:
        if self._kronecker is None:
            self._kronecker = KroneckerTerms(self.residuals, self.point)
        return self._kronecker

    def _make_solver(self, damping: float) -> Solver:
        return (
            Kronecker(self._kronecker_terms(), self.linearised(), damping)
            if self._factored()
            else super()._make_solver(damping)
        )

    def _kronecker_covers(self) -> bool:
        """Whether every parameter belongs to a linear layer."""
        linear = {id(p) for m in self.residuals.model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
        return all(id(p) in linear for p in self.parameters.values())

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        if not self._factored():
            return super().flat(v)
        return self.flat_to_vector(self._kronecker_terms().product(self.vector_to_flat(self.check(v, "v"))))

    def dense(self) -> Tensor:
        return Metric.dense(self) if self._factored() else super().dense()

    def diagonal(self) -> Vector:
        return Metric.diagonal(self) if self._factored() else super().diagonal()

    def logdet(self, damping: float) -> Tensor:
        return Metric.logdet(self, damping) if self._factored() else super().logdet(damping)

    def sample(self, damping: float, generator: torch.Generator | None = None) -> Vector:
        return Metric.sample(self, damping, generator) if self._factored() else super().sample(damping, generator)

    def direction(self, damping: float, prior: Mapping[str, Tensor] | None = None) -> Vector:
        return Metric.direction(self, damping, prior) if self._factored() else super().direction(damping, prior)

    def acceleration(self, velocity: Mapping[str, Tensor], damping: float) -> Vector | None:
        return None if self._factored() else super().acceleration(velocity, damping)

    def default_step(self) -> StepRule:
        from natgrad.searches import GridSearch

        return GridSearch(damping=KFAC_DAMPING) if self.solver == "kfac" else GridSearch()

    # ------------------------------------------------------------------------------------------------------

    def observe(self, batch: Batch) -> Tensor:
        """Linearise at the current parameters on ``{term: points}`` or ``{term: (points, *data)}``; returns the "
        "loss."""
        self._take_point()
        self._kronecker = None
        res, at, before = self.residuals, self.point, self.residuals.batch
        res.bind(batch, at)
        self.resampled = any(a is not b for n in before for a, b in zip(before[n], res.batch[n])) if before else None
        with torch.no_grad():
            self.root = res.values(at)
        res.check_finite(self.root)
        self.rows = Rows(
            res.rows,
            sum(p.numel() for p in at.values()),
            lambda: res.jacobian(at),
            lambda v: res.jvp(at, self.flat_to_vector(v)),
            lambda c: self.vector_to_flat(res.vjp(at, c)),
            self.root,
        )
        self.loss = 0.5 * (self.root @ self.root)
        return self.loss

    def loss_at(self, increments: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            return float(self.residuals.loss(self.moved(increments)))

    def _values_at(self, params: Vector) -> Tensor:
        return self.residuals.values(params)
