"""Physics-informed losses as metrics on functions.

`GaussNewton` measures the change J v that a change v of the parameters makes in the residuals of a PDE ("energy natural
gradient", Müller & Zeinhofer 2023, https://arxiv.org/abs/2302.13163). Its algebra is that of
`natgrad.function_space.jacobian_metric.JacobianMetric`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from natgrad.function_space.jacobian import JacobianOperator
from natgrad.function_space.jacobian_metric import JacobianMetric
from natgrad.function_space.layer_jacobian import Unseen, layer_rows
from natgrad.function_space.residuals import Batch, Residuals, Term
from natgrad.function_space.scope import Params, Scope
from natgrad.function_space.weights import Weight, Weights
from natgrad.metric.metric import Vector


class GaussNewton(JacobianMetric):
    """ĝ = JᵀJ of the stacked weighted residuals of a physics-informed loss Σ_terms weight · ½ mean ‖r‖².

    Args:
        model: the network; called with one point of shape (d,).
        terms: ``{name: f}``, ``f(u, x, *data) → residual(s)`` at ONE point: u the network as a function of one point,
            x the point (d,), data what the batch holds beside the points. Returns () or (components,).
        weights: ``{name: weight}``; 1 for a term not named. A number, a tensor with an entry a point, or a callable
            that is asked at every step: ``w()``, ``w(r)`` or ``w(r, x, *data)`` with the residuals r (points,
            components) before weighting; see `natgrad.function_space.weights`.
        solver: "auto" | "dense" | "kernel" | "cg"; see `natgrad.function_space.solvers`.
        chunk: points differentiated at once; None bounds the memory by itself.
        params: what terms read beside the model, ``{name: module or parameter}``: unknown coefficients, a second
            network. All of it is trained. Parameters of the model that a term reads itself need no mention.

    Example::

        u_xx = lambda u, x, f: natgrad.operators.laplacian(u, x) + f
        metric = GaussNewton(net, {"interior": u_xx, "boundary": lambda u, x, g: u(x) - g})
        opt = NaturalGradient(metric)
        loss = opt.step({"interior": (X, f), "boundary": (Xb, g)})

    Raises:
        TypeError, ValueError: the terms, weights, params or solver are not as above; at `observe`, the batch does not
            fit, a residual ignores the parameters, reads one that is not the metric's or is not finite (names the
            term and the points).
        RuntimeError: all parameters are frozen.
        MemoryError: a matrix of the solver will not fit; says the bytes and the solver to take.
    """

    scope: Scope

    def __init__(
        self,
        model: nn.Module,
        terms: Mapping[str, Term],
        weights: Mapping[str, Weight] | None = None,
        solver: str = "auto",
        chunk: int | None = None,
        params: Params | None = None,
    ) -> None:
        scope = Scope(model, params)
        super().__init__(scope, solver)
        self.residuals = Residuals(scope, terms, weights, chunk)
        self._by_layer = True  # until the residuals turn out not to be made of the factors of layers
        self._at_points = False  # whether the last batch was differentiated at each point

    @property
    def weights(self) -> Weights:
        """{term: weight}. Set all, or one by its name, at any time; the next step takes them."""
        return self.residuals.weights

    @weights.setter
    def weights(self, given: Mapping[str, Weight]) -> None:
        self.residuals.weights = Weights(list(self.residuals.terms), given)

    def observe(self, batch: Batch) -> Tensor:
        """Linearise at the current parameters on ``{term: points}`` or ``{term: (points, *data)}``; returns the
        loss."""
        self._take_point()
        res, at, before = self.residuals, self.point, self.residuals.batch
        res.bind(batch, at, self.parameters, again=self._at_points)
        self.resampled = any(a is not b for n in before for a, b in zip(before[n], res.batch[n])) if before else None
        found = self._linearise_by_layer()
        self._at_points = found is None
        self.root, self.rows = found or self._linearise()
        self.loss = 0.5 * (self.root @ self.root)
        return self.loss

    def _linearise_by_layer(self) -> tuple[Tensor, JacobianOperator] | None:
        """Residuals and rows by the factors of linear layers; None where that will not do."""
        if not self._by_layer:
            return None
        try:
            return layer_rows(self.residuals, self.point, self.parameters)
        except Unseen:
            self._by_layer = False
            return None

    def _linearise(self) -> tuple[Tensor, JacobianOperator]:
        """Residuals and rows by differentiation at each point."""
        res, at = self.residuals, self.point
        with torch.no_grad():
            root = res.values(at)
        res.check_finite(root)
        size = sum(p.numel() for p in at.values())

        def jvp(v: Tensor) -> Tensor:
            return res.jvp(at, self.split(v))

        def vjp(c: Tensor) -> Tensor:
            return self.columns(res.vjp(at, c))

        return root, JacobianOperator(res.rows, size, lambda: res.jacobian(at), jvp, vjp, root)

    def loss_at(self, increments: Mapping[str, Tensor]) -> float:
        if not increments and self.loss is not None:
            return float(self.loss)
        with torch.no_grad():
            return float(self.residuals.loss(self.moved(increments)))

    def _values_at(self, params: Vector) -> Tensor:
        return self.residuals.values(params)

    def _values_here(self) -> Tensor:
        return super()._values_here() if self.root is None else self.root
