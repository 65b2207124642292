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
from typing import Any

import torch
from torch import Tensor

from natgrad.function_space.conjugate_gradient import ConjugateGradient
from natgrad.function_space.jacobian import JacobianOperator
from natgrad.function_space.scope import Scope
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

    J has columns for the parameters that required grad then. On those that were frozen ĝ and df are zero.

    Args:
        parameters: ``{name: parameter}``, or a `Scope` with them and those that are frozen.
        solver: "auto", "dense", "kernel" or "cg".

    Raises:
        ValueError: no such solver.
    """

    solvers: tuple[str, ...] = ("auto", *SOLVERS)
    default_step = "grid search"

    def __init__(self, parameters: Mapping[str, Tensor] | Scope, solver: str = "auto") -> None:
        self.scope = parameters if isinstance(parameters, Scope) else None
        super().__init__(parameters.trainable() if isinstance(parameters, Scope) else parameters)
        if solver not in self.solvers:
            raise ValueError(f"solver must be one of {', '.join(map(repr, self.solvers))}, got {solver!r}")
        self.solver = solver
        self.chosen = ""  # which solver serves the last batch, and why
        self.resampled: bool | None = None  # whether the last batch held other tensors than the one before it
        # the parameters at which the metric is linearised, without those that are frozen
        self.point: Vector = {n: p.detach() for n, p in self.parameters.items()}
        self.rows: JacobianOperator | None = None
        self.root: Tensor | None = None
        self.loss: Tensor | None = None  # of the last batch
        self._factor: tuple[float, Solver] | None = None
        self._versions: dict[str, Any] = {}

    # the two verbs -------------------------------------------------------------------------------------

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        rows = self.linearised()
        return self.tangent(rows.vjp(rows.jvp(self.columns(self.check(v, "v")))))

    def sharp(self, df: Mapping[str, Tensor], damping: float) -> Vector:
        df = self.check(df, "df")
        found = self.factor(damping).sharp(self.columns(df))
        return self.tangent(found, {n: df[n] / damping for n in self.frozen()})

    # vectors over the columns of J ---------------------------------------------------------------------

    def frozen(self) -> list[str]:
        """Names of the parameters for which J has no columns."""
        return [n for n in self.parameters if n not in self.point]

    def columns(self, v: Mapping[str, Tensor]) -> Tensor:
        """{name: tensor} → (P,), P the columns of J."""
        return torch.cat([v[n].reshape(-1) for n in self.point])

    def split(self, flat: Tensor) -> Vector:
        """(P,) → {name: tensor} of the parameters that have columns."""
        parts = flat.split([p.numel() for p in self.point.values()])
        return {n: part.reshape(p.shape) for (n, p), part in zip(self.point.items(), parts)}

    def tangent(self, flat: Tensor, rest: Mapping[str, Tensor] | None = None) -> Vector:
        """(P,) → {name: tensor} of all parameters; those without columns are zero, or as in `rest`."""
        found = {**self.split(flat), **(rest or {})}
        return {n: found[n] if n in found else torch.zeros_like(p) for n, p in self.parameters.items()}

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
        rows, size = self.linearised(), sum(p.numel() for p in self.parameters.values())
        ensure_fits(
            size**2 * rows.like.element_size(), f"the dense {size}×{size} metric", "flat(v) for products", rows.like
        )
        out = rows.like.new_zeros(rows.parameters, rows.parameters)
        for chunk in rows.chunks():
            out.addmm_(chunk.mT, chunk)
        if size == rows.parameters:
            return out
        at = torch.cat([torch.full((p.numel(),), n in self.point) for n, p in self.parameters.items()])
        where = at.nonzero()[:, 0].to(out.device)
        whole = out.new_zeros(size, size)
        whole[where[:, None], where] = out
        return whole

    def diagonal(self) -> Vector:
        rows = self.linearised()
        return self.tangent(torch.stack([chunk.square().sum(0) for chunk in rows.chunks()]).sum(0))

    def logdet(self, damping: float) -> Tensor:
        frozen = sum(self.parameters[n].numel() for n in self.frozen())
        return self.factor(damping).logdet() + frozen * math.log(damping)

    def sample(self, damping: float, generator: torch.Generator | None = None) -> Vector:
        """N(0, (ĝ + λI)⁻¹) by solving with a perturbed right-hand side.

        x = (ĝ + λI)⁻¹(Jᵀw + √λ z), w and z standard normal.
        """
        rows = self.linearised()

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=rows.like.dtype, device=rows.like.device, generator=generator)

        noise = rows.vjp(normal(rows.count)) + math.sqrt(damping) * normal(rows.parameters)
        drawn = self.factor(damping).sharp(noise)
        return self.tangent(drawn, {n: normal(*self.parameters[n].shape) / math.sqrt(damping) for n in self.frozen()})

    # what the optimizer asks for -----------------------------------------------------------------------

    def gradient(self) -> Vector:
        rows = self.linearised()
        if self.root is None:
            raise NotImplementedError(f"{type(self).__name__} does not define gradient")
        return self.tangent(rows.vjp(self.root))

    def direction(self, damping: float, prior: Mapping[str, Tensor] | None = None) -> Vector:
        rows = self.linearised()
        if self.root is None:
            if prior is not None:  # frozen parameters stay
                prior = {n: p if n in self.point else torch.zeros_like(p) for n, p in prior.items()}
            return super().direction(damping, prior)
        if prior is None:
            return self.tangent(self.factor(damping).pull(self.root))
        before = self.columns(prior)  # (JᵀJ + λ)⁻¹(Jᵀc + λp) = p + (JᵀJ + λ)⁻¹Jᵀ(c − Jp)
        return self.tangent(before + self.factor(damping).pull(self.root - rows.jvp(before)))

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
        return self.tangent(-self.factor(damping).pull(bend)) if bool(torch.isfinite(bend).all()) else None

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
        if any(m.point.keys() != self.point.keys() for _, m in roots):
            raise RuntimeError("parameters were frozen or thawed between the observations of a sum: observe again")
        out = JacobianMetric(self.parameters, self.solver)
        out.point = self.point
        out.rows = JacobianOperator.stack([(c, m.linearised()) for c, m in roots])
        if all(m.root is not None for _, m in roots):
            out.root = torch.cat([c**0.5 * m.root for c, m in roots if m.root is not None])
        return out

    # parameters as they are now ------------------------------------------------------------------------

    def include(self, parameter: Tensor) -> str | None:
        """Take in a parameter that was frozen when the metric was made; its name.

        Raises:
            ValueError: the parameter belongs neither to the model nor to `params`.
        """
        name = None if self.scope is None else self.scope.name_of(parameter)
        if self.scope is None or name is None:
            raise ValueError(
                f"{type(self).__name__} makes its own gradient, and a parameter of shape {tuple(parameter.shape)} is "
                "neither its model's nor in params: it would never move. Make the metric with params={name: parameter}"
            )
        taken = {n: p for n, p in self.scope.everything.items() if n in self.parameters or n == name}
        self.parameters.clear()  # in place: a sum holds this dictionary too
        self.parameters.update(taken)
        return name

    @property
    def observed_here(self) -> bool | None:
        return self.rows is not None and self._versions == versions(self.parameters)

    def _take_point(self) -> None:
        """Linearise here from now on.

        Raises:
            RuntimeError: all parameters are frozen.
            TypeError: parameters differ in dtype or device.
        """
        self.point = {n: p.detach().clone() for n, p in self.parameters.items() if p.requires_grad}
        self.rows = self.root = self._factor = None
        self._versions = versions(self.parameters)
        if not self.point:
            raise RuntimeError(f"all parameters of this {type(self).__name__} are frozen: {self.names}")
        kinds = {(p.dtype, p.device): n for n, p in self.point.items()}
        if len(kinds) > 1:
            said = ", ".join(f"{n!r} is {dtype} on {device}" for (dtype, device), n in kinds.items())
            raise TypeError(f"parameters of one metric must share dtype and device: {said}")


def versions(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """What changes with the values of parameters, and with freezing."""
    return {n: (p._version, p.data_ptr(), p.requires_grad) for n, p in parameters.items()}
