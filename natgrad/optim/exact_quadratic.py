"""The quadratic model of the loss over two directions, with exact curvature: for full-batch training.

With g = df, d = −(ĝ + λI)⁻¹ g from the metric and δ the last step, the step is Δ = V w for V = [d, δ] and

    w = −(Vᵀ C V + λ Vᵀ V)⁻¹ Vᵀ g,          C v = Jᵀ H J v,

C the *exact* generalised Gauss–Newton matrix of the loss on the batch (two forward-mode products; Martens & Grosse
2015, arXiv:1503.05671, §6.4 and §7). Length and momentum come out of the model; the approximations of the metric cost
speed, not correctness. λ follows the gain ratio ρ = (L(θ + Δ) − L(θ)) / (Vᵀ g · w + ½ wᵀ Vᵀ C V w): every T steps
λ ← ω^T λ if ρ > ¾, λ ← λ/ω^T if ρ < ¼ (§6.5). On minibatches the reused direction δ is fitted to the noise
of one batch: take another rule there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.fisher.fisher import Fisher
from natgrad.fisher.options import arguments
from natgrad.linalg.tree import describe
from natgrad.metric.metric import Metric, Vector
from natgrad.optim.step_rule import Increments, StepContext, StepRule, one_value

INTERVAL = 5  # T
OMEGA = 19 / 20  # ω; both are the paper's


class ExactQuadratic(StepRule):
    """See the module docstring.

    Args:
        inputs, targets: the full batch that is trained on; inputs as in `Fisher.update`.
        damping: λ to begin with, absolute; one value for all parameter groups, as is lr.
        lr: multiplies the step; 1 is the model's own minimum.

    Raises:
        TypeError: in `update`, if the metric is no `Fisher`, or its model returns more than one tensor.
        ValueError: in `update`, if the optimizer maximises, or its groups differ in lr or damping.
    """

    on_ranks = False  # a rank's own batch is in the products

    def __init__(self, inputs: Any, targets: Any, damping: float = 1.0, lr: float = 1.0) -> None:
        super().__init__()
        self.lr, self.momentum, self.damping = lr, 0.0, damping
        self.inputs, self.targets = inputs, targets
        self._last: Vector = {}  # δ
        self._steps = 0
        self._factor = 1.0  # λ in force over λ of the options
        self._before: tuple[Tensor, Tensor] | None = None  # (loss, change that the model predicted) of the last step

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Increments:
        options = context.options
        if not isinstance(metric, Fisher):
            raise TypeError(
                f"ExactQuadratic takes its products from the model of a Fisher, got {type(metric).__name__}"
            )
        lr = one_value({o.lr for o in options.values()}, "lr")
        if any(o.maximize for o in options.values()):
            raise ValueError("ExactQuadratic minimises a convex model and cannot maximise; negate the loss instead")
        damping = one_value({o.damping for o in options.values()}, "damping")
        bare = metric.without_curvature()
        g = {n: df.get(n, torch.zeros_like(p)) for n, p in metric.parameters.items()}
        around = Linearised(metric, self.inputs, self.targets)
        loss = around.loss
        ratio = None if self._before is None else (loss - self._before[0]) / self._before[1]
        self._adapt(ratio)
        damping *= self._factor
        # where the metric is not defined the model's own curvature still is: the gradient is a direction as good as any
        d = {n: -t if n not in bare else -g[n] for n, t in metric.sharp(g, damping).items()}
        basis = [{n: v[n] if n in df else torch.zeros_like(v[n]) for n in v} for v in (d, self._last) if v]
        curvature = around.curvature(basis)
        gram = torch.stack([torch.stack([dot(a, b) for b in basis]) for a in basis])
        slope = torch.stack([dot(g, v) for v in basis])
        # the pseudo-inverse, for directions that have become one
        w = -(torch.linalg.pinv((curvature + damping * gram).double(), hermitian=True) @ slope.double()).to(slope)
        step = {n: lr * sum((c * v[n] for c, v in zip(w, basis)), torch.zeros_like(g[n])) for n in g}
        predicted = lr * (slope @ w) + lr**2 / 2 * (w @ curvature @ w)
        self._last, self._before = step, (loss, predicted)
        self._steps += 1
        self.info = {
            "damping": damping,
            "step_length": w[0] * lr,
            "momentum": w[1] * lr if len(basis) > 1 else 0.0,
            "predicted_reduction": -predicted,
            "reduction_ratio": ratio,
        }
        return {n: step[n] for n in df if n in step}

    def _adapt(self, ratio: Tensor | None) -> None:
        if ratio is None or self._steps % INTERVAL:
            return
        rho = float(ratio)
        if rho > 0.75:
            self._factor *= OMEGA**INTERVAL
        elif not rho >= 0.25:  # NaN counts as a failure
            self._factor /= OMEGA**INTERVAL

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last), "steps": self._steps, "factor": self._factor, "before": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last, self._steps, self._factor = dict(state["last"]), state["steps"], state["factor"]
        self._before = None if state["before"] is None else tuple(state["before"])


class Linearised:
    """The loss of a batch around the present parameters."""

    def __init__(self, metric: Fisher, inputs: Any, targets: Any) -> None:
        self._metric, self._targets = metric, targets
        self._args, self._kwargs = arguments(inputs)
        self._at = {n: p.detach() for n, p in metric.parameters.items()}
        self._buffers = {n: b.detach().clone() for n, b in metric.module.named_buffers()}
        with torch.random.fork_rng():
            self.loss = self._loss(self._output(self._at))

    def _output(self, parameters: Mapping[str, Tensor]) -> Tensor:
        held = {**self._buffers, **parameters}
        output = torch.func.functional_call(self._metric.module, held, self._args, self._kwargs)
        output = output if self._metric._output is None else self._metric._output(output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"ExactQuadratic takes a model with one output tensor, got {describe(output)}; see `output=`"
            )
        return output

    def _loss(self, output: Tensor) -> Tensor:
        return self._metric.criterion.forward(output, self._targets)  # not a call: hooks of the metric sit on it

    def curvature(self, basis: list[Vector]) -> Tensor:
        """vᵢᵀ C vⱼ for the vectors of a basis, (k, k)."""
        pushed, raised = [], []
        for v in basis:
            with torch.random.fork_rng():
                output, jv = torch.func.jvp(self._output, (self._at,), (v,))  # type: ignore[misc]
            pushed.append(jv)
            raised.append(self._hessian_of_loss(output.detach(), jv))
        return torch.stack([torch.stack([(a * b).sum() for b in raised]) for a in pushed])

    def _hessian_of_loss(self, output: Tensor, v: Tensor) -> Tensor:
        """H v, H the Hessian of the loss with respect to the output: symmetric, so two backward passes give it."""
        with torch.enable_grad():
            leaf = output.requires_grad_()
            (slope,) = torch.autograd.grad(self._loss(leaf), leaf, create_graph=True)
            (found,) = torch.autograd.grad(slope, leaf, v)
        return found


def dot(u: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(u[n] * v[n]).sum() for n in u]).sum()
