"""The step rule that searches along a direction, trying points through `Metric.loss_at`: `GridSearch`.

Rules that rely on the quadratic model instead are in files of their own, as `natgrad.optim.levenberg_marquardt`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.function_space.units import by_diagonal, in_units, scaled
from natgrad.metric.metric import Metric, Vector
from natgrad.optim.step_rule import Options, StepContext, StepRule, one_value

# how the damping follows the length of the steps: factor, grow at this share of η or less, fall at this share or more
FIXED = (10.0, 2**-8, 2**-3)
FRESH = (10.0, 2**-3, 1.0)
OF_DAMPING = 0.5  # share of a full step's quadratic model above which the damping is what keeps it short
STRIDE = 4  # halvings tried at a time where many are needed, as in a first step at tiny damping


class SearchRule(StepRule):
    """What these rules share: one η, μ and λ for all parameters."""

    on_ranks = False  # a rank's own loss is in the search

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
    down the loss along the grid. Where no length lowers the loss, the damping grows (for this step alone); where none
    of that helps, the parameters stay, and ``info["accepted"]`` is False.

    The damping grows where steps get short and falls again, down to the given one, where they get long. On a fixed
    batch it grows tenfold at η/256 or less and falls at η/8 or more: short steps are normal there. Where the batch
    changes from step to step, a step must be good for other points than it was made from, and the damping grows at η/8
    or less and falls at η.

    Where there are more residuals than parameters and a step of full length is kept short by the smallest λ itself,
    λ‖v‖² > ½ ⟨−df, v⟩, some parameter has units in which λ is not small. From there until steps get short λ is relative
    to the diagonal, v = −(ĝ + λ diag ĝ)⁻¹df.

    Args:
        damping: the smallest λ, absolute.
        halvings: the smallest length is η 2^−halvings.
        geodesic: follow the metric's second-order path where it has one.
        adapt: whether the damping follows the length.
    """

    damping_meaning = (
        "absolute: (ĝ + λI)⁻¹; grows from the given one where steps are short; relative to the diagonal where "
        "info['relative']"
    )

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
        self._relative = False  # whether the damping is relative to the diagonal

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Vector:
        options = context.options
        lr, _, damping = self.options(options)
        damping = damping * self._growth
        start = metric.loss_at({})
        for attempt in range(5):
            found = self._search(metric, damping * 100**attempt, lr, start)
            if found is not None:
                step, loss, path, length, of_damping = found
                relative = self._relative
                if self.adapt:
                    self._follow(length / lr, metric)
                    if self._growth > 1:
                        self._relative = False
                    elif length == lr and of_damping > OF_DAMPING and dense(metric):
                        self._relative = True
                self.note(
                    metric,
                    damping=damping * 100**attempt,
                    relative=relative,
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
    ) -> tuple[Vector, float, str, float, float] | None:
        """The best step, its loss, path and length, and the damping's share of the quadratic model of a full one."""
        units = by_diagonal(metric.diagonal()) if self._relative else None
        local = metric if units is None else in_units(metric, units)
        v = {n: -d for n, d in local.direction(damping).items()}
        a = local.acceleration(v, damping) if self.geodesic else None
        of_damping = damping * float(dot(v, v)) / (float(local.inner(v, v)) + damping * float(dot(v, v)) or 1.0)
        if units is not None:
            v, a = scaled(v, units), None if a is None else scaled(a, units)
        paths: dict[str, Vector | None] = {"straight": None} if a is None else {"straight": None, "curved": a}
        best: tuple[Vector, float, str, float, float] | None = None
        for path, a in paths.items():

            def after(k: int, a: Vector | None = a) -> float:
                return finite_loss(metric, along(v, a, lr * 0.5**k))

            k, loss = lowest(after, self._last[path], self.halvings, start)
            if loss < (start if best is None else best[1]):
                best = (along(v, a, lr * 0.5**k), loss, path, lr * 0.5**k, of_damping)
            if loss < start:
                self._last[path] = k
        return best

    def state_dict(self) -> dict[str, Any]:
        return {
            "last": dict(self._last),
            "growth": self._growth,
            "fresh": self._fresh,
            "relative": self._relative,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last, self._growth, self._fresh = dict(state["last"]), state["growth"], state["fresh"]
        self._relative = state["relative"]


# pieces -------------------------------------------------------------------------------------------------------


def dense(metric: Metric) -> bool:
    """Whether the last solve was in the space of parameters, which are no more than the residuals then."""
    return getattr(metric, "chosen", "").startswith("dense")


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

    k, stride = first, 1
    while at(k) >= start and k < last:
        k, stride = min(k + stride, last), min(2 * stride, STRIDE)
    while k > 0 and at(k - 1) < at(k):
        k -= 1
    while k < last and at(k + 1) < at(k):
        k += 1
    return k, at(k)


def dot(u: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> Tensor:
    """⟨u, v⟩ over the names they share."""
    return torch.stack([(u[n] * v[n]).sum() for n in u if n in v]).sum()
