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
from natgrad.metric.metric import Vector, named


class GaussNewton(JacobianMetric):
    """ĝ = JᵀJ of the stacked weighted residuals of a physics-informed loss Σ_terms weight · ½ mean ‖r‖².

    Args:
        model: the network; called with one point of shape (d,).
        terms: ``{name: f}``, ``f(u, x, *data) → residual(s)`` at ONE point: u the network as a function of one point,
            x the point (d,), data what the batch holds beside the points. Returns () or (components,).
        weights: ``{name: weight}``; 1 for a term not named.
        solver: "auto" | "dense" | "kernel" | "cg"; see `natgrad.function_space.solvers`.
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
        self._by_layer = True  # until the residuals turn out to depend on more than linear layers

    def observe(self, batch: Batch) -> Tensor:
        """Linearise at the current parameters on ``{term: points}`` or ``{term: (points, *data)}``; returns the
        loss."""
        self._take_point()
        res, at, before = self.residuals, self.point, self.residuals.batch
        res.bind(batch, at)
        self.resampled = any(a is not b for n in before for a, b in zip(before[n], res.batch[n])) if before else None
        self.root, self.rows = self._linearise_by_layer() or self._linearise()
        self.loss = 0.5 * (self.root @ self.root)
        return self.loss

    def _linearise_by_layer(self) -> tuple[Tensor, JacobianOperator] | None:
        """Residuals and rows by the factors of linear layers; None where that will not do."""
        if not self._by_layer:
            return None
        try:
            return layer_rows(self.residuals, self.point)
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
            return res.jvp(at, self.flat_to_vector(v))

        def vjp(c: Tensor) -> Tensor:
            return self.vector_to_flat(res.vjp(at, c))

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
