"""Verbs that take one vector, made to take stacks of them, ``{name: (k, *shape)}``; and one number, made to take more.

`natgrad.metric.metric.Metric` does this to the verbs of its subclasses, so that a metric need not think of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def stack_size(v: Any, parameters: Mapping[str, Tensor]) -> int | None:
    """Return k of a stack; None of a single vector, and of what is neither."""
    if not isinstance(v, Mapping) or set(v) != set(parameters):
        return None
    sizes = {
        t.shape[0]
        for n, p in parameters.items()
        if isinstance(t := v[n], Tensor) and t.dim() == p.dim() + 1 and t.shape[1:] == p.shape
    }
    fits = all(isinstance(t, Tensor) and t.dim() == parameters[n].dim() + 1 for n, t in v.items())
    return sizes.pop() if fits and len(sizes) == 1 else None


def one_by_one(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A verb of one vector, applied to each of a stack."""

    @wraps(verb)
    def each(self: Any, v: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if (k := stack_size(v, self.parameters)) is None:
            return verb(self, v, *args, **kwargs)
        v = self.check(v, "the stack")
        if k == 0:
            return {n: t.clone() for n, t in v.items()}
        found = [verb(self, {n: t[i] for n, t in v.items()}, *args, **kwargs) for i in range(k)]
        return {n: torch.stack([f[n] for f in found]) for n in v}

    return each


def plain_damping(verb: Callable[..., Any], otherwise: Callable[..., Any], place: int) -> Callable[..., Any]:
    """A verb of one number as damping, with another in its place where gradients go through it or names have their own.

    `place`: of the damping among the arguments.
    """

    @wraps(verb)
    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs["damping"] if "damping" in kwargs else args[place] if len(args) > place else 1.0
        plain = not isinstance(given, Mapping) and not (isinstance(given, Tensor) and given.requires_grad)
        return (verb if plain else otherwise)(self, *args, **kwargs)

    return either


def all_with_all(df: Mapping[str, Tensor], v: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """⟨df, v⟩ of a covector and a vector, a scalar tensor; of stacks of k and l (k, l), of one stack (k,)."""
    stacks = [stack_size(x, parameters) is not None for x in (df, v)]
    if not any(stacks):
        return torch.stack([(df[n] * v[n]).sum() for n in parameters]).sum()
    left, right = (
        [(x[n] if s else x[n][None]).reshape(-1 if not s else len(x[n]), p.numel()) for n, p in parameters.items()]
        for x, s in zip((df, v), stacks)
    )
    total = torch.stack([a @ b.mT for a, b in zip(left, right)]).sum(0)
    return total if all(stacks) else total.flatten()


def each_with_each(df: Mapping[str, Tensor], v: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """⟨df, v⟩ of a covector and a vector, or (k,) of the pairs of two stacks of k."""
    if (k := stack_size(v, parameters)) is None:
        return all_with_all(df, v, parameters)
    return torch.stack([(df[n] * v[n]).reshape(k, p.numel()).sum(1) for n, p in parameters.items()]).sum(0)
