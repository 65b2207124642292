"""Steps of bounded KL divergence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from natgrad.metric.metric import Metric, Vector, sum_of
from natgrad.optim import skips
from natgrad.optim.fixed import AlongGradient
from natgrad.optim.step_rule import Increments, StepContext, one_value

SHORTER = (0.05, 0.9)  # a step that was too long is multiplied by √(r / D), between these
TRIES = 40  # 0.05⁴⁰ is below rounding
BLIND_TRIES = 6  # where reading a value back would wait for the device: then the step is dropped


class KLTrustRegion(AlongGradient):
    """Δθ = −ν (η d + η w θ), the longest of a fixed step that changes the predictions by no more than r.

    The first bound is by the metric, ν ≤ √(r / ½ (g + λI)(Δ, Δ)): λ counts in directions that the metric does not see.
    The second is by the predictions themselves. D(νΔ), the KL divergence between those before and after on the batch of
    this step (`Metric.divergence`), is measured, and ν shortened until D ≤ r. So the radius holds also where the
    metric is old or an approximation, and where momentum or the decay w lead astray. D is computed in float64 at
    the parameters that are written, and is kept to their rounding.

    A step takes two forward passes more to measure D, and one each time that it is shortened. The metric keeps the
    step's batches until then.

    Args:
        lr: η.
        momentum: μ, on the gradient.
        damping: λ, absolute.
        radius: r, the largest KL divergence per datum that a step may cause (a summed loss adds over data, and so does
            its r). For metrics of residuals it is half of the squared change of the residuals. Parameters without
            curvature are shortened with the rest.

    Raises:
        ValueError: the radius is not positive; in training, where the loop computes something between the model's
            output and the criterion that `output=` does not say.
        RuntimeError: in `update`, if no batch was backpropagated.
    """

    decays = True
    verifies = True

    def __init__(self, lr: float = 0.1, momentum: float = 0.9, damping: float = 1e-3, radius: float = 1e-3) -> None:
        super().__init__()
        if not radius > 0:
            raise ValueError(f"radius must be positive, a KL divergence that a step may cause, got {radius!r}")
        self.lr, self.momentum, self.damping, self.radius = lr, momentum, damping, radius

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Increments:
        options = context.options
        d = self._descent.direction(metric, df, options)
        step: Vector = {n: t * -options[n].lr for n, t in d.items()}
        for n, t in step.items():
            if (decay := options[n].lr * options[n].weight_decay) and n in metric.parameters:
                step[n] = t - decay * metric.parameters[n].detach()
        predicted = seen_by(metric, step, one_value({o.damping for o in options.values()}, "damping"))
        shorter = (self.radius / predicted).sqrt().clamp(max=1)  # 1 where the divergence is 0
        shorter, divergence = within(metric, step, self.radius, shorter)
        length = next(iter(options.values())).lr
        self.info.update(step_length=shorter * length, predicted_kl=predicted * shorter.square())
        if divergence is not None:
            self.info["kl"] = divergence
        return {n: t * shorter.to(t.dtype) for n, t in step.items()}


def seen_by(metric: Metric, step: Mapping[str, Tensor], damping: float) -> Tensor:
    """½ (g + λI)(Δ, Δ), a scalar tensor."""
    bare = metric.without_curvature()
    plain = sum_of((t.double() if t.device.type != "mps" else t).square().sum() for t in step.values())
    if len(bare) == len(metric.parameters):
        return damping * plain / 2
    full = {n: step[n] if n in step and n not in bare else torch.zeros_like(p) for n, p in metric.parameters.items()}
    return (metric.inner(full, full).to(plain) + damping * plain) / 2


def within(metric: Metric, step: Mapping[str, Tensor], radius: float, length: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the length, at most the given one, with D(length · step) ≤ radius, and that D; None if it is not known."""

    def at(length: Tensor) -> Tensor | None:
        return metric.divergence({n: t * length.to(t.dtype) for n, t in step.items() if n in metric.parameters})

    divergence = at(length)
    if divergence is None:
        return length, None
    reads = skips.free_to_read(divergence)
    for _ in range(TRIES if reads else BLIND_TRIES):
        over = ~(divergence <= radius)  # NaN is too far
        if reads and not bool(over.numpy()):
            return length, divergence
        least, most = SHORTER
        share = (radius / divergence).sqrt().nan_to_num(least).clamp(least, most)
        length = torch.where(over, length * share, length)
        divergence = at(length)
        assert divergence is not None
    held = divergence <= radius
    return length.where(held, torch.zeros_like(length)), divergence.where(held, torch.zeros_like(divergence))
