"""Weights of the terms of a loss, which may change while it is trained.

A weight is a number, a tensor with one entry a point, or a callable that is asked at every step: ``w()``, ``w(r)`` or
``w(r, x, *data)``, whichever it takes, with r (points, components) the residuals before weighting and x, data what the
batch holds of the term. What it returns is held fixed within the step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

Weight = float | Tensor | Callable[..., Any]


class Weights(MutableMapping[str, Weight]):
    """{term: weight}; 1 for terms that none is given for. What is set is checked, and holds from the next step on.

    Raises:
        TypeError: a weight is neither a number, a tensor nor a callable.
        ValueError: it is negative, not finite or has more than one axis, or names no term.
    """

    def __init__(self, terms: Sequence[str], given: Mapping[str, Weight] | None) -> None:
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"weights takes {{term: weight}} for the terms {list(terms)}, got {type(given).__name__}")
        self._held: dict[str, Weight] = dict.fromkeys(terms, 1.0)
        if unknown := [n for n in given or {} if n not in self._held]:
            raise ValueError(f"weights name terms that do not exist: {unknown}; the terms are {list(terms)}")
        self.update(given or {})

    def __getitem__(self, term: str) -> Weight:
        return self._held[term]

    def __setitem__(self, term: str, weight: Weight) -> None:
        if term not in self._held:
            raise ValueError(f"weights name terms that do not exist: [{term!r}]; the terms are {list(self._held)}")
        if not callable(weight):
            check_weight(term, weight, None)
        self._held[term] = weight

    def __delitem__(self, term: str) -> None:
        self[term] = 1.0

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"Weights({self._held})"

    def at(self, term: str, data: Sequence[Tensor], residuals: Callable[[], Tensor]) -> Tensor:
        """The weight of every point, (points,).

        Args:
            data: what the batch holds of the term, points first.
            residuals: gives them before weighting, (points, components); called where the weight asks for them.
        """
        weight = self._held[term]
        if callable(weight):
            count = arguments(weight, 1 + len(data), term)
            weight = weight(*[residuals(), *data][:count]) if count else weight()
        weight = check_weight(term, weight, len(data[0]))
        x = data[0]
        return torch.as_tensor(weight, dtype=x.dtype, device=x.device).detach().expand(len(x))


def arguments(weight: Callable[..., Any], offered: int, term: str) -> int:
    """How many of the positional arguments on offer a callable asks for."""
    try:
        asked = weight.forward if isinstance(weight, nn.Module) else weight  # its __call__ takes anything
        takes = inspect.signature(asked).parameters.values()
    except (TypeError, ValueError):
        return 0
    if any(p.kind is p.VAR_POSITIONAL for p in takes):
        return offered
    needed = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in takes)
    if needed > offered:
        raise TypeError(
            f"the weight of term {term!r} asks for {needed} arguments; there are {offered}: the residuals, the points "
            "and what else the batch holds of the term"
        )
    return needed


def check_weight(term: str, weight: Any, points: int | None) -> float | Tensor:
    """Return a weight that is a number, () or (points,), finite and not negative.

    Raises:
        TypeError, ValueError: it is none; says of which term.
    """
    if isinstance(weight, bool) or not isinstance(weight, (Real, Tensor)):
        raise TypeError(
            f"the weight of term {term!r} must be a number, a tensor of shape (points,), or a callable that returns "
            f"one, got {type(weight).__name__}"
        )
    if not isinstance(weight, Tensor):
        value = float(weight)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"the weight of term {term!r} must be a non-negative number, got {weight}")
        return value
    if weight.ndim > 1 or weight.is_complex() or weight.dtype == torch.bool:
        raise ValueError(
            f"the weight of term {term!r} must be a number or real numbers of shape (points,), got "
            f"{tuple(weight.shape)} of {weight.dtype}"
        )
    if weight.ndim == 1 and points is not None and len(weight) != points:
        raise ValueError(f"the weight of term {term!r} has {len(weight)} entries, its batch has {points} points")
    bad = ~(torch.isfinite(weight) & (weight >= 0)).reshape(-1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"the weight of term {term!r} must be non-negative and finite; {int(bad.sum())} of {bad.numel()} are not: "
            f"entry {first} is {float(weight.reshape(-1)[first])}"
        )
    return weight
