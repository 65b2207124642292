"""Natural policy gradients with a bound on the KL divergence and a line search: TRPO."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from natgrad.metric.metric import Metric, Vector
from natgrad.optim.fixed import AlongGradient
from natgrad.optim.kl_trust_region import seen_by
from natgrad.optim.line_search import dot
from natgrad.optim.step_rule import Increments, StepContext, one_value

BINDS = (0.95, 1.0)  # of the radius: a divergence in between is at it
SEARCHES = 25  # of the length that brings it there; three or four do where it grows by the square
CHANGE = (0.1, 4.0)  # of the length from one search to the next


class NaturalPolicyGradient(AlongGradient):
    """Δθ = −ν (ĝ + λI)⁻¹df with D(Δθ) = r, shortened until the surrogate falls (Schulman et al. 2015,
    https://arxiv.org/abs/1502.05477, appendix C).

    D is the KL divergence between the policies before and after in the mean over the batch, measured, not
    predicted: KL(π_old ‖ π_new) of any criterion that `natgrad.Fisher` takes, as ``ng.Likelihood(Categorical)``. Along
    the direction the length is found where 0.95 r ≤ D ≤ r. Where the surrogate is not below that of the policy
    before, the length is multiplied by `shrink`, at most `backtracks` times; after that the policy stays, and
    ``info["accepted"]`` is False.

    The surrogate is what the closure of ``opt.step(closure)`` returns. It clears the gradients, runs the model on the
    batch, computes the loss to be lowered (−mean of advantage times likelihood ratio), calls ``backward`` and
    returns the loss. It is called once at the parameters as they are, and once for each length that is tried. The
    metric is refreshed at every step, unless `refresh=` says otherwise.

    Args:
        radius: r.
        damping: λ, absolute.
        backtracks: lengths that are tried after the first one.
        shrink: from one to the next.
        lr: η, a share of the length that is found.

    Raises:
        ValueError: an argument out of range; in training, a group that maximises or decays its weights.
        TypeError: in training, a step without a closure, or a metric that knows no predictions.
    """

    on_ranks = False  # a rank's own surrogate is in the search
    verifies = True
    refresh = 1

    def __init__(
        self,
        radius: float = 0.01,
        damping: float = 1e-3,
        backtracks: int = 10,
        shrink: float = 0.8,
        lr: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < radius < math.inf:
            raise ValueError(f"radius must be positive, a KL divergence that a step may cause, got {radius!r}")
        if not 0 < shrink < 1 or backtracks < 0:
            raise ValueError(
                f"shrink must be between 0 and 1 and backtracks at least 0, got {shrink!r} and {backtracks!r}"
            )
        self.lr, self.damping, self.radius = lr, damping, radius
        self.backtracks, self.shrink = backtracks, shrink

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Increments:
        options = context.options
        if context.trial is None or context.loss is None:
            raise TypeError(
                "NaturalPolicyGradient searches along the surrogate: call opt.step(closure) with a closure that "
                "clears the gradients, computes the surrogate loss, calls backward() on it and returns it"
            )
        if any(o.maximize or o.weight_decay for o in options.values()):
            raise ValueError(
                "NaturalPolicyGradient lowers the surrogate and nothing else: negate the loss instead of "
                "maximize=True, and put a penalty into it instead of weight_decay"
            )
        damping = one_value({o.damping for o in options.values()}, "damping")
        d = self._descent.direction(metric, df, options)
        rate = max(o.lr for o in options.values())
        way = {n: t * -(options[n].lr / (rate or 1.0)) for n, t in d.items()}
        start, slope = context.loss, -float(dot(df, way))
        length, divergence = 0.0, 0.0
        if rate and slope > 0 and math.isfinite(slope):
            length, divergence = self._to_radius(metric, way, float(seen_by(metric, way, damping)))
        length *= rate
        after, tries = start, 0
        while length:
            after = context.trial({n: t * length for n, t in way.items()})
            if after < start:  # not where it is NaN
                break
            tries += 1
            length = length * self.shrink if tries <= self.backtracks else 0.0
        if not length:
            divergence, after = 0.0, start
        elif tries or rate != 1:
            divergence = measured(metric, way, length)
        self.info.update(
            damping=damping,
            step_length=length,
            kl=divergence,
            loss=start,
            loss_after=after,
            tries=tries,
            accepted=length > 0,
        )
        return {n: t * length for n, t in way.items()}

    def _to_radius(self, metric: Metric, way: Vector, predicted: float) -> tuple[float, float]:
        """The length with a divergence at the radius and that divergence; the longest one seen below it if none is."""
        length = math.sqrt(self.radius / predicted) if 0 < predicted < math.inf else 1.0
        least, most = (share * self.radius for share in BINDS)
        best, beyond = (0.0, 0.0), math.inf  # the longest length that is not beyond the radius, the shortest that is
        for _ in range(SEARCHES):
            found = measured(metric, way, length)
            if found <= most:
                best = max(best, (length, found))
            else:
                beyond = min(beyond, length)
            if least <= found <= most:
                break
            share = math.sqrt((least + most) / 2 / found) if found > 0 else math.inf
            length *= min(max(share, CHANGE[0]), CHANGE[1])  # D grows by the square, near 0
            if not best[0] < length < beyond:
                length = math.sqrt(best[0] * beyond) if best[0] else beyond * CHANGE[0]
        return best


def measured(metric: Metric, way: Mapping[str, Tensor], length: float) -> float:
    """D at a length; ∞ where it is no number.

    Raises:
        TypeError: the metric does not know it.
    """
    found = metric.divergence({n: t * length for n, t in way.items() if n in metric.parameters})
    if found is None:
        raise TypeError(
            f"{type(metric).__name__} does not know predictions, so that the KL divergence of a step cannot be "
            "measured; take ng.Fisher(policy, ng.Likelihood(…))"
        )
    value = float(torch.as_tensor(found))
    return math.inf if math.isnan(value) else value
