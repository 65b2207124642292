"""Step rules that look before they leap: line searches, adaptive damping, quadratic models, momentum, trust regions.

All serve any metric whose `direction` is known (metrics that make their own gradient) or any df through `sharp`.
Those that try points need `Metric.loss_at`.

| rule | step | needs the loss |
|---|---|---|
| `GridSearch` | the best of η 2⁻ᵏ along the path θ + αv + ½α²a | yes |
| `Armijo` | the first of η 2⁻ᵏ with sufficient decrease | yes |
| `LevenbergMarquardt` | η = 1, damping by the gain ratio | yes |
| `QuadraticModel` | length and momentum that minimise the 2×2 quadratic model | no |
| `Spring` | SPRING momentum: damping pulls to the last step instead of to zero | no |
| `TrustRegion` | fixed η, no longer than a radius in the metric's norm | no |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.metric import Metric, Vector
from natgrad.steps import Options, StepRule, one_value

# how the damping follows the length of the steps: factor, grow at this share of η or less, fall at this share or more
FIXED = (10.0, 2**-8, 2**-3)
FRESH = (10.0, 2**-3, 1.0)
ROUNDING = 1e-12  # relative decreases of the loss below this say nothing about the model


class SearchRule(StepRule):
    """What the rules below share: one η, μ and λ for all parameters, and the descent direction."""

    def options(self, options: Mapping[str, Options]) -> tuple[float, float, float]:
        """η, μ, λ

        Raises:
            ValueError: they differ between parameter groups, or the loss is to be maximised.
        """
        values = options.values()
        if any(o.maximize for o in values):
            raise ValueError(f"{type(self).__name__} lowers the loss: negate the loss instead of maximize=True")
        return (
            one_value({o.lr for o in values}, "lr"),
            one_value({o.momentum for o in values}, "momentum"),
            one_value({o.damping for o in values}, "damping"),
        )

    def note(self, metric: Metric, **info: Any) -> None:
        chosen = getattr(metric, "chosen", "")  # metrics with several solvers say which one served
        self.info = {**info, "solver": chosen} if chosen else info


class GridSearch(SearchRule):
    """Δθ = αv + ½α²a with the best α among η 2⁻ᵏ, v = −(ĝ + λI)⁻¹df, a the metric's geodesic acceleration.

    The straight path a = 0 is searched too, and the better one taken. A search starts at the last length and climbs
    down
    the loss along the grid. Where no length lowers the loss, the damping grows (for this step alone); where none of
    that helps, the parameters stay, and ``info["accepted"]`` is False.

    The damping grows where steps get short and falls again, down to the given one, where they get long. On a fixed
    batch it grows tenfold at η/256 or less and falls at η/8 or more: short steps are normal there. Where the batch
    changes from step to step, a step must be good for other points than it was made from, and the damping grows at η/8
    or less and falls at η.

    Args:
        damping: the smallest λ, absolute.
        halvings: the smallest length is η 2^−halvings.
        geodesic: follow the metric's second-order path where it has one.
        adapt: whether the damping follows the length.
    """

    damping_meaning = "absolute: (ĝ + λI)⁻¹; grows from the given one where steps are short"

    def __init__(
        self,
        lr: float = 1.0,
        damping: float = 1e-10,
        halvings: int = 30,
        geodesic: bool = True,
        adapt: bool = True,
    ) -> None:
        super().__init__()
        self.lr, self.damping = lr, damping
        self.halvings, self.geodesic, self.adapt = halvings, geodesic, adapt
        self._last = {"straight": 0, "curved": 0}
        self._growth = 1.0  # of the damping
        self._fresh = False  # whether the batch changes from step to step

    def update(self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]) -> Vector:
        lr, _, damping = self.options(options)
        damping = damping * self._growth
        start = metric.loss_at({})
        for attempt in range(5):
            found = self._search(metric, damping * 100**attempt, lr, start)
            if found is not None:
                step, loss, path, length = found
                if self.adapt:
                    self._follow(length / lr, metric)
                self.note(
                    metric,
                    damping=damping * 100**attempt,
                    length=length,
                    path=path,
                    loss=start,
                    loss_after=loss,
                    accepted=True,
                )
                return step
        self.note(metric, damping=damping, length=0.0, path="none", loss=start, loss_after=start, accepted=False)
        return {n: torch.zeros_like(p) for n, p in metric.parameters.items()}

    def _follow(self, share: float, metric: Metric) -> None:
        if (fresh := getattr(metric, "resampled", None)) is not None:
            self._fresh = fresh
        factor, short, long = FRESH if self._fresh else FIXED
        if share <= short:
            self._growth *= factor
        elif share >= long:
            self._growth = max(self._growth / factor, 1.0)

    def _search(
        self, metric: Metric, damping: float, lr: float, start: float
    ) -> tuple[Vector, float, str, float] | None:
        v = {n: -d for n, d in metric.direction(damping).items()}
        paths: dict[str, Vector | None] = {"straight": None}
        if self.geodesic and (a := metric.acceleration(v, damping)) is not None:
            paths["curved"] = a
        best: tuple[Vector, float, str, float] | None = None
        for path, a in paths.items():

            def after(k: int, a: Vector | None = a) -> float:
                return finite_loss(metric, along(v, a, lr * 0.5**k))

            k, loss = lowest(after, self._last[path], self.halvings, start)
            if loss < (start if best is None else best[1]):
                best = (along(v, a, lr * 0.5**k), loss, path, lr * 0.5**k)
            if loss < start:
                self._last[path] = k
        return best

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last), "growth": self._growth, "fresh": self._fresh}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last, self._growth, self._fresh = dict(state["last"]), state["growth"], state["fresh"]


class Armijo(SearchRule):
    """The first length η 2⁻ᵏ with f(θ + Δ) ≤ f(θ) + c ⟨df, Δ⟩ along −(ĝ + λI)⁻¹df (Nocedal & Wright, eq. 3.4).

    Args:
        decrease: c.
    """

    def __init__(self, lr: float = 1.0, damping: float = 1e-10, decrease: float = 1e-4, halvings: int = 30) -> None:
        super().__init__()
        self.lr, self.damping, self.decrease, self.halvings = lr, damping, decrease, halvings

    def update(self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]) -> Vector:
        lr, _, damping = self.options(options)
        v = {n: -d for n, d in metric.direction(damping).items()}
        start, slope = metric.loss_at({}), float(dot(df, v))
        for k in range(self.halvings + 1):
            length = lr * 0.5**k
            if (loss := finite_loss(metric, along(v, None, length))) <= start + self.decrease * length * slope:
                self.note(metric, damping=damping, length=length, loss=start, loss_after=loss, accepted=True)
                return along(v, None, length)
        self.note(metric, damping=damping, length=0.0, loss=start, loss_after=start, accepted=False)
        return along(v, None, 0.0)


class LevenbergMarquardt(SearchRule):
    """Full steps with a damping that follows the gain ratio ρ = (actual decrease) / (decrease of the quadratic model).

    λ falls by `factor` where ρ > 0.75 and grows by it where ρ < 0.25; a step with ρ ≤ 0 is not taken but tried again
    with more damping, `tries` times (Nocedal & Wright, section 10.3).
    """

    damping_meaning = "absolute: (ĝ + λI)⁻¹, λ adapted by the gain ratio from the given start"

    def __init__(
        self,
        lr: float = 1.0,
        damping: float = 1e-3,
        factor: float = 3.0,
        tries: int = 12,
        smallest: float = 1e-14,
    ) -> None:
        super().__init__()
        self.lr, self.damping = lr, damping
        self.factor, self.tries, self.smallest = factor, tries, smallest
        self._damping: float | None = None

    def update(self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]) -> Vector:
        lr, _, first = self.options(options)
        damping = first if self._damping is None else self._damping
        start = metric.loss_at({})
        for attempt in range(self.tries + 1):
            step = {n: -lr * d for n, d in metric.direction(damping).items()}
            predicted = -float(dot(df, step)) - 0.5 * float(metric.inner(step, step))
            loss = finite_loss(metric, step)
            ratio = (start - loss) / predicted if predicted > 0 else -math.inf
            if ratio > 0.75:
                self._damping = max(damping / self.factor, self.smallest)
            elif ratio < 0.25:
                self._damping = damping = damping * self.factor
            else:
                self._damping = damping
            if ratio > 0:
                self.note(
                    metric,
                    damping=self._damping,
                    ratio=ratio,
                    tries=attempt,
                    loss=start,
                    loss_after=loss,
                    accepted=True,
                )
                return step
        self.note(
            metric,
            damping=self._damping,
            ratio=ratio,
            tries=self.tries,
            loss=start,
            loss_after=start,
            accepted=False,
        )
        return {n: torch.zeros_like(p) for n, p in metric.parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"damping": self._damping}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._damping = state["damping"]


class QuadraticModel(SearchRule):
    """Δθ = αd + βδ, d = −(ĝ + λI)⁻¹df and δ the last step, with α and β that minimise ⟨df, Δ⟩ + ½⟨(ĝ + λI)Δ, Δ⟩.

    Products with the metric are exact (Martens & Grosse 2015, section 7, https://arxiv.org/abs/1503.05671). The model
    is trusted in full, so this is for large or fixed batches. η scales the step.
    """

    def __init__(self, lr: float = 1.0, damping: float = 1e-3) -> None:
        super().__init__()
        self.lr, self.damping = lr, damping
        self._last: Vector = {}

    def update(self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]) -> Vector:
        lr, _, damping = self.options(options)
        basis = [{n: -d for n, d in descent(metric, df, damping).items()}]
        if self._last:
            basis.append(self._last)
        product = getattr(metric, "exact_flat", metric.flat)  # a direction may be approximate, its length need not be
        lowered = [product(b) for b in basis]
        model = torch.stack(
            [torch.stack([dot(f, b) + damping * dot(a, b) for b in basis]) for f, a in zip(lowered, basis)]
        )
        slope = torch.stack([dot(df, b) for b in basis])
        weights = -(torch.linalg.pinv((model + model.mT) / 2, hermitian=True) @ slope)  # singular where δ ∥ d
        step = {n: lr * sum_vectors(weights, [b[n] for b in basis]) for n in metric.parameters}
        self._last = step
        predicted = float(slope @ weights + 0.5 * weights @ (model @ weights))
        self.note(
            metric,
            damping=damping,
            length=float(weights[0]),
            momentum=float(weights[1:].sum()),
            predicted=predicted,
        )
        return step

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = dict(state["last"])


class Spring(SearchRule):
    """SPRING: φ = argmin ½⟨ĝφ, φ⟩ − ⟨df, φ⟩ + ½λ‖φ − μφ_last‖², Δθ = −ηφ (Goldshlager, Abrahamsen & Lin 2024,
    https://arxiv.org/abs/2401.10190).

    Primal form φ = (ĝ + λI)⁻¹(df + λμφ_last); metrics with rows take φ = μφ_last + Jᵀ(JJᵀ + λI)⁻¹(c − μJφ_last).

    Args:
        momentum: μ.
        radius: the longest ‖Δθ‖ (Euclidean); None is unbounded.
    """

    def __init__(
        self, lr: float = 0.1, momentum: float = 0.95, damping: float = 1e-3, radius: float | None = None
    ) -> None:
        super().__init__()
        self.lr, self.momentum, self.damping, self.radius = lr, momentum, damping, radius
        self._last: Vector = {}

    def update(self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]) -> Vector:
        lr, mu, damping = self.options(options)
        prior = {n: mu * p for n, p in self._last.items()} or None
        self._last = metric.direction(damping, prior)
        length = lr
        if self.radius is not None:
            length = min(lr, self.radius / max(float(dot(self._last, self._last).sqrt()), 1e-300))
        self.note(metric, damping=damping, length=length)
        return {n: -length * p for n, p in self._last.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = dict(state["last"])


class TrustRegion(SearchRule):
    """Δθ = −η (ĝ + λI)⁻¹df, shortened to ‖Δ‖ ≤ radius in the norm of ĝ + εI, with a radius that follows the loss.

    At tiny λ the direction is long where ĝ is nearly singular, and neither its length nor its sense can be trusted
    there; ε bounds it. The gain ratio ρ = (decrease seen at the next observation) / (decrease of the quadratic model)
    doubles the radius where ρ > 0.75 and the
    bound was met, up to the given one, and quarters it where ρ < 0.25; a step that raised the loss by more than the
    model promised to lower it (ρ < −1) is undone. Where the metric does not know the loss the radius stays.

    Args:
        radius: the largest ‖Δ‖.
        floor: ε.
    """

    def __init__(self, lr: float = 0.1, damping: float = 1e-3, radius: float = 0.1, floor: float = 1e-2) -> None:
        super().__init__()
        self.lr, self.damping, self.radius, self.floor = lr, damping, radius, floor
        self._radius = radius
        self._last: Vector = {}
        self._promise: tuple[float, float, bool] | None = (
            None  # loss before the last step, predicted decrease, bound met
        )

    def update(self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]) -> Vector:
        lr, _, damping = self.options(options)
        loss = getattr(metric, "loss", None)
        ratio = self._follow(loss)
        if ratio is not None and ratio < -1:
            undo = {n: -d for n, d in self._last.items()}
            self._promise = None
            self.note(metric, damping=damping, length=0.0, radius=self._radius, ratio=ratio, undone=True)
            return undo
        direction = descent(metric, df, damping)
        lowered = metric.flat(direction)
        square, plain, slope = dot(lowered, direction), dot(direction, direction), dot(df, direction)
        norm = math.sqrt(max(float(square + max(damping, self.floor) * plain), 0.0))
        if not math.isfinite(norm):
            raise ValueError(
                f"the direction is not finite at damping {damping:g}; take a larger damping or look at the batch for "
                "inf and NaN"
            )
        length = min(lr, self._radius / max(norm, 1e-300))
        predicted = length * float(slope) - 0.5 * length**2 * float(square)
        self._last = {n: -length * d for n, d in direction.items()}
        self._promise = None if loss is None else (float(loss), predicted, length < lr)
        self.note(
            metric,
            damping=damping,
            length=length,
            norm=norm * length,
            radius=self._radius,
            ratio=ratio,
            undone=False,
        )
        return dict(self._last)

    def _follow(self, loss: Tensor | None) -> float | None:
        """The gain ratio of the last step, after the radius has followed it."""
        if loss is None or self._promise is None:
            return None
        before, predicted, bounded = self._promise
        if predicted <= ROUNDING * abs(before):
            return None
        ratio = (before - float(loss)) / predicted
        if ratio < 0.25:
            self._radius = self._radius / 4
        elif ratio > 0.75 and bounded:
            self._radius = min(2 * self._radius, self.radius)
        return ratio

    def state_dict(self) -> dict[str, Any]:
        return {"radius": self._radius, "last": dict(self._last), "promise": self._promise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._radius, self._last = state["radius"], dict(state["last"])
        self._promise = None if state["promise"] is None else tuple(state["promise"])


# pieces -------------------------------------------------------------------------------------------------------


def descent(metric: Metric, df: Mapping[str, Tensor], damping: float) -> Vector:
    """(ĝ + λI)⁻¹df: by the metric's own well-conditioned way where it made df, by `sharp` where loss.backward() did."""
    if type(metric).gradient is not Metric.gradient:
        return metric.direction(damping)
    return metric.sharp({n: df.get(n, torch.zeros_like(p)) for n, p in metric.parameters.items()}, damping)


def along(v: Vector, a: Vector | None, length: float) -> Vector:
    """αv + ½α²a"""
    if a is None:
        return {n: length * t for n, t in v.items()}
    return {n: length * t + 0.5 * length**2 * a[n] for n, t in v.items()}


def finite_loss(metric: Metric, step: Vector) -> float:
    """The loss after a step; +∞ where it is not a number, so that a search turns away from it."""
    loss = metric.loss_at(step)
    return loss if math.isfinite(loss) else math.inf


def lowest(f: Callable[[int], float], first: int, last: int, start: float) -> tuple[int, float]:
    """A local minimum of f over 0 … last, searched from `first`: towards shorter steps while f is not below `start`."""
    seen: dict[int, float] = {}

    def at(k: int) -> float:
        if k not in seen:
            seen[k] = f(k)
        return seen[k]

    k = first
    while at(k) >= start and k < last:
        k += 1
    while k > 0 and at(k - 1) < at(k):
        k -= 1
    while k < last and at(k + 1) < at(k):
        k += 1
    return k, at(k)


def dot(u: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> Tensor:
    """⟨u, v⟩ over the names they share."""
    return torch.stack([(u[n] * v[n]).sum() for n in u if n in v]).sum()


def sum_vectors(weights: Tensor, tensors: list[Tensor]) -> Tensor:
    return torch.einsum("k,k...->...", weights, torch.stack(tensors))
