"""The loss of a closure at other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from natgrad.fisher.hooks import unwatched


class Trial:
    """Calls a closure at θ + Δ, and leaves parameters and gradients as they were, whatever ends it.

    Args:
        closure: as given to ``opt.step``.
        parameters: {name: parameter}.
    """

    def __init__(self, closure: Callable[[], Any], parameters: Mapping[str, Tensor]) -> None:
        self._closure, self._parameters = closure, parameters

    def __call__(self, increments: Mapping[str, Tensor]) -> float:
        with self._moved(increments), unwatched(), torch.enable_grad():
            return value_of(self._closure())

    @contextmanager
    def _moved(self, increments: Mapping[str, Tensor]) -> Iterator[None]:
        values = {n: self._parameters[n].detach().clone() for n in increments}
        gradients = {n: p.grad for n, p in self._parameters.items()}
        try:
            for p in self._parameters.values():
                p.grad = None  # so that no closure writes into those that the step is made from
            with torch.no_grad():
                for n, t in increments.items():
                    self._parameters[n].add_(t)
            yield
        finally:
            with torch.no_grad():
                for n, value in values.items():
                    self._parameters[n].copy_(value)
            for n, p in self._parameters.items():
                p.grad = gradients[n]


def value_of(loss: Any) -> float:
    """What a closure returned, as a number.

    Raises:
        TypeError: it is none.
    """
    try:
        return float(loss.detach() if isinstance(loss, Tensor) else loss)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"the closure has to return the loss, a scalar, got {loss!r}") from error
