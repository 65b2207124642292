"""Damping of every form: one number, or one for each parameter; numbers, or tensors that gradients go through.

(ĝ + D)⁻¹ has D = λI, or the diagonal matrix of the numbers that the parameters' names are given. Patterns are those of
`fnmatch`, and the first that matches a name counts.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

Number = float | Tensor  # a scalar tensor where gradients are to go through it
Damping = Number | Mapping[str, Number]  # by name pattern
Resolved = Number | dict[str, Number]  # by name
ADDED = " (it is added to every eigenvalue of the metric)"


def number_of(value: Any, zero: bool, what: str = "damping", why: str = ADDED) -> Number:
    """Return a number, or the scalar tensor where it requires grad.

    Raises:
        ValueError: it is not positive and finite. `zero`: whether it may be zero.
    """
    plain = math.nan
    if isinstance(value, Tensor) and value.numel() == 1:
        plain = float(value.detach())
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        plain = float(value)
    if not math.isfinite(plain) or plain < 0 or (plain == 0 and not zero):
        raise ValueError(f"{what} must be a positive finite number{why}, got {value!r}")
    return value.reshape(()) if isinstance(value, Tensor) and value.requires_grad else plain


def resolved(damping: Any, names: Iterable[str], zero: bool, what: str = "damping", why: str = ADDED) -> Resolved:
    """Return the damping as one number, or by name where names have different ones.

    Raises:
        ValueError: a damping that is not positive and finite, a pattern that matches no name, or a name without one.
    """
    if not isinstance(damping, Mapping):
        return number_of(damping, zero, what, why)
    names = list(names)
    given = {pattern: number_of(value, zero, what, why) for pattern, value in damping.items()}
    for pattern in given:
        if not any(fnmatch.fnmatchcase(n, pattern) for n in names):
            raise ValueError(f"{what}: no parameter matches {pattern!r}; there are {names}")
    found: dict[str, Number] = {}
    for name in names:
        first = next((p for p in given if fnmatch.fnmatchcase(name, p)), None)
        if first is None:
            raise ValueError(f"{what}: no pattern of {list(given)} matches {name!r}; add '*' for all others")
        found[name] = given[first]
    return together(found.values(), found)


def together(values: Iterable[Number], otherwise: Mapping[str, Number]) -> Resolved:
    """Return the one number that all values are; the mapping where they differ."""
    first, *rest = values
    if all(v is first or (isinstance(v, float) and isinstance(first, float) and v == first) for v in rest):
        return first
    return dict(otherwise)


def per_name(damping: Resolved, name: str) -> Number:
    """The damping of one parameter."""
    return damping[name] if isinstance(damping, dict) else damping


def full(damping: Resolved, parameters: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """The damping of every entry of every parameter, in the dtype and on the device of `like`; views of one number."""
    found = {n: torch.as_tensor(per_name(damping, n), dtype=like.dtype, device=like.device) for n in parameters}
    return {n: d.expand(parameters[n].shape) for n, d in found.items()}


def same(a: Number, b: Number) -> bool:
    """Whether two dampings are equal, and no gradient goes through them."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        plain = not (a.requires_grad or b.requires_grad)
        return plain and a.shape == b.shape and bool(cast(Tensor, a == b).all())
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
