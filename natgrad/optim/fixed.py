"""Steps of a fixed length along the natural gradient, with momentum as SGD has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.metric.metric import Metric
from natgrad.metric.protocols import Vector
from natgrad.optim.adam import HALF, Adam
from natgrad.optim.step_rule import Increments, Options, ScaledStep, StepContext, StepRule, one_value


class PreconditionedGradient:
    """(ĝ + λI)⁻¹ m with m ← μ m + df: momentum as in ``torch.optim.SGD``, before the metric is applied.

    Parameters without curvature get Adam's direction, at the root mean square of all others, so that one learning rate
    serves both; where nothing has curvature, at `ALONE`.
    """

    ALONE = 0.01  # of lr: Adam's own default rate, 1e-3, at the default lr of 0.1

    def __init__(self) -> None:
        self._buffer: Vector = {}
        self._adam = Adam()
        self._last: dict[str, tuple[Tensor, Tensor]] = {}  # direction and gradient, for `cosines`

    def direction(self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]) -> Vector:
        """A tangent vector over the names of `df`, to be descended along its negative."""
        damping = one_value({o.damping for o in options.values()}, "damping")
        bare = metric.without_curvature()
        full = {n: df.get(n, torch.zeros_like(p)) for n, p in metric.parameters.items()}
        for n, g in full.items():
            mu = options[n].momentum
            if mu:
                full[n] = self._buffer[n] = g.clone() if n not in self._buffer else self._buffer[n].mul_(mu).add_(g)
        raised = metric.sharp(full, damping) if len(bare) < len(full) else {}
        out = {n: raised[n] for n in df if n in raised and n not in bare}
        self._last = {n: (d, full[n]) for n, d in out.items()}
        rest = [n for n in df if n not in out]
        if rest:
            scale: Tensor | float = root_mean_square(out) if out else self.ALONE
            out.update({n: self._adam.direction(n, df[n]) * scale for n in rest})
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": dict(self._buffer), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._buffer = dict(state["buffer"])
        self._adam.load_state_dict(state["adam"])

    def cosines(self) -> dict[str, Tensor]:
        return {n: cosine(d, g) for n, (d, g) in self._last.items()}


class AlongGradient(StepRule):
    """A rule whose only state is that of its `PreconditionedGradient`."""

    def __init__(self) -> None:
        super().__init__()
        self._descent = PreconditionedGradient()

    def cosines(self) -> dict[str, Tensor]:
        return self._descent.cosines()

    def state_dict(self) -> dict[str, Any]:
        return self._descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._descent.load_state_dict(state)


class FixedStep(AlongGradient):
    """Δθ = −η d along the direction of `PreconditionedGradient`."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.0, damping: float = 1e-3) -> None:
        super().__init__()
        self.lr, self.momentum, self.damping = lr, momentum, damping

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Increments:
        d = self._descent.direction(metric, df, context.options)
        return {n: ScaledStep(d[n], -context.options[n].lr) for n in df}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ / ‖a‖‖b‖, a scalar tensor; 0 where one of them is."""
    a, b = a.flatten().double(), b.flatten().double()
    size = a.norm() * b.norm()
    return torch.where(size > 0, (a @ b) / size, torch.zeros_like(size))


def root_mean_square(v: Mapping[str, Tensor]) -> Tensor:
    """Over all entries of a vector, a scalar tensor."""
    norms = torch.stack([t.float() if t.dtype in HALF else t for t in torch._foreach_norm(list(v.values()))])
    return norms.norm() / sum(t.numel() for t in v.values()) ** 0.5
