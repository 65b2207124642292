"""What an optimizer asks of a metric, beside the two verbs that make one.

Every answer here is that of a metric which has nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Vector = dict[str, Tensor]


class Driver(Protocol):
    """The optimizer that steps along a metric."""

    steps: int
    refresh: int
    rule: Any

    @property
    def refresh_due(self) -> bool: ...

    @property
    def schedule(self) -> Mapping[str, Any]: ...


class Trained:
    """What a metric does while a model is trained along it."""

    strategy: Any = None  # how ranks share the metric, a `natgrad.distributed.strategy.Strategy`; None on one process
    default_step = "fixed"  # the step rule where the user names none, by its name in `natgrad.optim.registry`
    step_options: Mapping[str, float] = {}  # and what it is made with

    copies_with_model = False  # whether a deep copy watches the copied model
    labels = 0  # in a batch, one a datum and position, over all ranks; 0 where that is not known

    @property
    def blocks(self) -> list[Any] | None:
        """The blocks of curvature that are kept layer by layer; None where the metric is not made of blocks."""
        return None

    @property
    def gradient_scale(self) -> float | None:
        """What `backward` leaves of the gradient of the loss that the metric is the curvature of; None where the metric
        is not that, so that ĝ⁻¹df has no length of its own.
        """
        return 1.0

    @property
    def nat(self) -> Tensor | None:
        """How much of the loss one nat is, a scalar tensor; None where that is not known."""
        return None

    @property
    def needs_refresh(self) -> bool:
        """Whether the optimizer must have seen statistics before its first step."""
        return False

    @property
    def driver(self) -> Any:
        """The optimizer that steps along this metric, where only one can; None where any may."""
        return None

    def drive(self, driver: Driver) -> None:
        """Called once by the optimizer that will step along this metric."""

    def check_parameters(self) -> None:
        """Called by the optimizer from time to time.

        Raises:
            RuntimeError: the model's parameters are others by now than the metric's.
        """

    @property
    def why_no_statistics(self) -> str:
        """Why a step cannot be taken, where `needs_refresh` and nothing has come."""
        return (
            "no forward pass of the metric's model was seen before this step, so there is no metric to descend by. "
            "Call the model itself (`model(x)`, not a submodule or model.forward; where it is compiled, give the "
            "compiled model to Fisher), with grad enabled, in the thread that steps, and backpropagate its loss"
        )

    def expect(self, due: bool) -> None:
        """Told by the optimizer, after each step, whether the next forward passes are to refresh the metric."""

    def advance(self, decay: float) -> bool:
        """Called by the optimizer once a step, before it asks for a direction; whether the metric changed.

        `decay` is the weight of the past in a moving average of statistics.
        """
        return False

    def agree(self, fine: Tensor) -> Tensor:
        """Whether a step is fine on every rank that shares this metric. Called where a refresh is due."""
        return fine

    def divergence(self, increments: Mapping[str, Tensor]) -> Tensor | None:
        """Return how far increments move the predictions on the batch of this step, a scalar tensor: the KL divergence
        between those before and after, ½ g(Δ, Δ) for small Δ. None where the metric does not know predictions.
        """
        return None

    def discard_pending(self) -> None:
        """Drop statistics gathered since the last `advance`."""

    def without_curvature(self) -> set[str]:
        """Names of parameters on which the metric is not defined; the optimizer trains them by an Adam-like rule."""
        return set()

    def include(self, parameter: Tensor) -> str | None:
        """Take in a parameter that was frozen when the metric was made; its name, or None if it is foreign."""
        return None

    @property
    def info(self) -> dict[str, Any]:
        """Counters for ``opt.info``."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Statistics to continue from: tensors, strings and numbers only. Empty where the metric keeps none."""
        return {}

    def prepared(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Return what takes over a state, which has been read and checked from end to end by then: an optimizer calls
        it once everything else that it loads has been checked as well.

        Raises:
            ValueError: the state is of another metric, or no whole one. Nothing has changed.
        """
        return lambda: self.load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over `state_dict`.

        Raises:
            ValueError: the state is of another metric.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the state given has the keys {list(state)}")


class Backpropagable(torch.autograd.Function):
    """A loss whose backward pass brings a gradient that is known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, df: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.df = df
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return (None, None, *(slope * g for g in ctx.df))


class OwnGradient:
    """What a metric does that makes its own gradient: ``opt.step(batch)`` calls `observe`, then reads `gradient`."""

    parameters: dict[str, Tensor]

    @property
    def observed_here(self) -> bool | None:
        """Whether a batch was observed at the parameters as they are now; None for a metric that steps by the gradient
        which ``loss.backward()`` left."""
        return None

    def training_loss(self, batch: Any) -> Tensor:
        """Observe a batch and return the loss as a trainer wants it: ``backward()`` leaves df in ``.grad``.

        The step after it, ``opt.step()`` or ``opt.step(closure)``, is the one of ``opt.step(batch)``.

        Raises:
            TypeError: the metric takes its gradient from ``loss.backward()``.
        """
        loss = self.observe(batch).detach()
        df = self.gradient()
        live = {n: p for n, p in self.parameters.items() if p.requires_grad}
        return Backpropagable.apply(loss, [df[n] for n in live], *live.values())

    def observe(self, batch: Any) -> Tensor:
        """Linearise the loss at the current parameters on a batch and return the loss (for metrics that make their own
        gradient).

        Raises:
            TypeError: the metric takes its gradient from ``loss.backward()``.
        """
        raise TypeError(
            f"{type(self).__name__} takes its gradient from loss.backward(); call opt.step() without a batch. "
            "Metrics that make their own gradient are GaussNewton, Energy and QuantumGeometry"
        )

    def gradient(self) -> Vector:
        """df of the last observed batch."""
        raise TypeError(f"{type(self).__name__} takes its gradient from loss.backward()")

    def sharp(self, df: Mapping[str, Tensor], damping: float) -> Vector:
        """(ĝ + damping·I)⁻¹ df"""
        raise NotImplementedError(f"{type(self).__name__} does not define sharp")

    def direction(self, damping: float, prior: Mapping[str, Tensor] | None = None) -> Vector:
        """(ĝ + damping·I)⁻¹ (df + damping·prior) of the last observed batch, in the metric's best conditioned way."""
        df = self.gradient()
        return self.sharp(df if prior is None else {n: g + damping * prior[n] for n, g in df.items()}, damping)

    def loss_at(self, increments: Mapping[str, Tensor]) -> float:
        """The loss of the last observed batch at θ + increments, for step rules that try points.

        Raises:
            TypeError: the metric does not know the loss.
        """
        raise TypeError(
            f"{type(self).__name__} cannot evaluate the loss at trial points, which this step rule needs; "
            "GaussNewton and Energy can. Take step=FixedStep() or TrustRegion()"
        )

    def acceleration(self, velocity: Mapping[str, Tensor], damping: float) -> Vector | None:
        """a of the path θ + αv + ½α²a (geodesic acceleration), None where the metric has none."""
        return None
