"""Metrics ĝ = JᵀJ on functions, pulled back to the parameters of a network.

A metric on functions measures the change J v that a change v of the parameters makes in what the network is *for*:
the residuals of a PDE (`natgrad.GaussNewton`), the fields of a variational problem (`natgrad.Energy`), the wave
function (`natgrad.QuantumGeometry`). All have the form ĝ = JᵀJ with rows J of shape (N, P), and share the solvers of
`natgrad.function_space.solvers` and `natgrad.function_space.conjugate_gradient`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from natgrad.function_space.conjugate_gradient import ConjugateGradient
from natgrad.function_space.jacobian import JacobianOperator
from natgrad.function_space.solvers import Dense, Kernel, Solver, choose
from natgrad.linalg.cholesky import ensure_fits
from natgrad.metric.metric import Metric, Vector

log = logging.getLogger("natgrad")
SOLVERS: dict[str, type[Solver]] = {
    "dense": Dense,
    "kernel": Kernel,
    "cg": ConjugateGradient,
}
DIFFERENCE = 0.1  # h of the central difference along the velocity (Transtrum & Sethna 2012, section 5)


class JacobianMetric(Metric):
    """ĝ = JᵀJ, linearised by `observe` at the parameters of that moment.

    A subclass sets `rows` (and `root`, c with df = Jᵀc, where the gradient has that form) in `observe`.

    Args:
        parameters: ``{name: parameter}``.
        solver: "auto", "dense", "kernel" or "cg".

    Raises:
        ValueError: no such solver.
    """

    solvers: tuple[str, ...] = ("auto", *SOLVERS)
    default_step = "grid search"

    def __init__(self, parameters: Mapping[str, Tensor], solver: str = "auto") -> None:
        super().__init__(parameters)
        if solver not in self.solvers:
            raise ValueError(f"solver must be one of {', '.join(map(repr, self.solvers))}, got {solver!r}")
        self.solver = solver
        self.chosen = ""  # which solver serves the last batch, and why
        self.resampled: bool | None = None  # whether the last batch held other tensors than the one before it
        self.point: Vector = {}  # the parameters at which the metric is linearised
        self.rows: JacobianOperator | None = None
        self.root: Tensor | None = None
        self.loss: Tensor | None = None  # of the last batch
        self._factor: tuple[float, Solver] | None = None

    # the two verbs -------------------------------------------------------------------------------------

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        rows = self.linearised()
        return self.flat_to_vector(rows.vjp(rows.jvp(self.vector_to_flat(self.check(v, "v")))))

    def sharp(self, df: Mapping[str, Tensor], damping: float) -> Vector:
        return self.flat_to_vector(self.factor(damping).sharp(self.vector_to_flat(self.check(df, "df"))))

    def factor(self, damping: float) -> Solver:
        """The solver with its factors at this damping; made once for one observation and damping."""
        damping = self.check_damping(damping)
        held = self._factor
        if held is not None and held[0] == damping:
            return held[1]
        self._factor = None  # frees the old one first
        solver = None if held is None else held[1].damped(damping)
        del held
        self._factor = (damping, solver or self._make_solver(damping))
        return self._factor[1]

    def _make_solver(self, damping: float) -> Solver:
        return SOLVERS[self.pick()](self.linearised(), damping)

    def pick(self) -> str:
        """The solver in force; `chosen` says why."""
        rows = self.linearised()
        name, why = (self.solver, "asked for") if self.solver != "auto" else choose(rows)
        if self.chosen != (said := f"{name}: {why}"):
            self.chosen = said
            log.info("%s solves with %s", type(self).__name__, said)
        return name

    def linearised(self) -> JacobianOperator:
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
        """N(0, (ĝ + λI)⁻¹) by solving with a perturbed right-hand side.

        x = (ĝ + λI)⁻¹(Jᵀw + √λ z), w and z standard normal.
        """
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
        """Geodesic acceleration a = −(ĝ + λI)⁻¹Jᵀ r_vv.

        See Transtrum & Sethna 2012, https://arxiv.org/abs/1201.5885, section 5.

        r_vv is the second derivative of what the rows measure along the velocity, by a central difference.
        """
        self.linearised()
        with torch.no_grad():
            ahead, behind = (
                self._values_at(self.moved({n: s * DIFFERENCE * v for n, v in velocity.items()})) for s in (1, -1)
            )
            if ahead.numel() == 0:
                return None
            bend = (ahead - 2 * self._values_here() + behind) / DIFFERENCE**2
        return self.flat_to_vector(-self.factor(damping).pull(bend)) if bool(torch.isfinite(bend).all()) else None

    def divergence(self, increments: Mapping[str, Tensor]) -> Tensor | None:
        """½ ‖r(θ + Δ) − r(θ)‖², r what the rows measure."""
        if not self.point:
            return None
        with torch.no_grad():
            moved = self._values_at(self.moved(increments))
            return (moved - self._values_here()).square().sum() / 2 if moved.numel() else None

    def _values_at(self, params: Vector) -> Tensor:
        """What the rows measure, (N,), such that J is its derivative; empty where the metric does not know it."""
        return next(iter(params.values())).new_empty(0)

    def _values_here(self) -> Tensor:
        """The same at the parameters at which the metric is linearised."""
        return self._values_at(self.point)

    def moved(self, increments: Mapping[str, Tensor]) -> Vector:
        """The parameters at which the metric is linearised, plus increments."""
        return {n: p + increments[n] if n in increments else p for n, p in self.point.items()}

    def stack(self, parts: Sequence[tuple[float, Metric]]) -> Metric | None:
        roots = [(c, m) for c, m in parts if isinstance(m, JacobianMetric)]
        if len(roots) != len(parts):
            return None
        out = JacobianMetric(self.parameters, self.solver)
        out.rows = JacobianOperator.stack([(c, m.linearised()) for c, m in roots])
        if all(m.root is not None for _, m in roots):
            out.root = torch.cat([c**0.5 * m.root for c, m in roots if m.root is not None])
        return out

    def _take_point(self) -> None:
        self.point = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.rows = self.root = self._factor = None
