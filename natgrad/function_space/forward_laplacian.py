"""The jet of a value under forward Laplacian: a tensor-like object whose operations carry derivatives along.

A jet holds components (z, ∂₁z, …, ∂_k z, Σᵢ wᵢ ∂ᵢ²z), the last one where second derivatives are asked for. `RULES` says
how operations of torch map jets (`natgrad.function_space.jet_rules`, `natgrad.function_space.composed`). Whatever else
is done to a jet raises, `NoRule` or what Python has for it, and the caller takes reverse mode: a jet is never wrong
about an operation that it does not know. `natgrad.function_space.operators` starts and reads jets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

RULES: dict[Any, Callable[..., Any]] = {}


class NoRule(Exception):
    """An operation the forward Laplacian has no rule for; the caller takes reverse mode."""


def _check_recorded() -> None:
    """Under no_grad u holds what it computes constant, or has a backward of its own (`torch.autograd.Function`).

    Raises:
        NoRule: it does.
    """
    if not torch.is_grad_enabled():
        raise NoRule("an operation under no_grad")


def _check_one_pass(values: Sequence[Any], seen: list[Expansion]) -> None:
    """Jets of two passes, as where an operator stands in another, do not mix.

    Raises:
        NoRule: they do.
    """
    for value in values:
        if type(value) is Jet:
            if seen and value.expansion is not seen[0]:
                raise NoRule("jets of two passes")
            seen.append(value.expansion)
        elif type(value) in (tuple, list):
            _check_one_pass(value, seen)


class Expansion:
    """What the jets of one pass share.

    Attributes:
        weights: wᵢ, shape (k,), of the second derivatives; None for first derivatives alone.
        kinks: names of operations without a second derivative that the pass has met.
    """

    def __init__(self, weights: Tensor | None) -> None:
        self.weights, self.kinks = weights, list[str]()


class Jet:
    """(z, ∂₁z … ∂_k z, Σ wᵢ∂ᵢ²z) stacked along a new first axis: `components` has shape (k + 2, *z.shape)."""

    __array_ufunc__ = None  # NumPy's scalars leave arithmetic to the jet

    def __init__(self, components: Tensor, expansion: Expansion) -> None:
        self.components, self.expansion = components, expansion

    shape = property(lambda self: self.components.shape[1:])
    ndim = property(lambda self: self.components.ndim - 1)
    dtype = property(lambda self: self.components.dtype)
    device = property(lambda self: self.components.device)
    value = property(lambda self: self.components[0])
    T = property(lambda self: linear_map(lambda t: t.T, self))
    mT = property(lambda self: linear_map(lambda t: t.mT, self))

    @property
    def first(self) -> Tensor:
        """∂₁z … ∂_k z"""
        return self.components[1:] if self.expansion.weights is None else self.components[1:-1]

    def like(self, components: Tensor) -> Jet:
        """A jet of the same pass.

        Raises:
            NoRule: the dtype is another, as after ``z.float()``.
        """
        if components.dtype != self.components.dtype:
            raise NoRule(f"a change to {components.dtype}")
        return Jet(components, self.expansion)

    def of(self, value: Tensor, first: Tensor, second: Callable[[], Tensor]) -> Jet:
        """The jet of these parts; `second` is asked for where second derivatives are."""
        ends = [] if self.expansion.weights is None else [second()[None]]
        return self.like(torch.cat([value[None], first, *ends]))

    def weighted(self, products: Tensor) -> Tensor:
        """Σ wᵢ over the first axis."""
        return torch.einsum("k,k...->...", self.expansion.weights, products)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rule = RULES.get(func)
        if rule is None:
            raise NoRule(getattr(func, "__name__", str(func)))
        _check_recorded()
        _check_one_pass((*args, *kwargs.values()) if kwargs else args, [])
        return rule(func, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name, None)
        if name.startswith("__"):
            raise AttributeError(name)
        if not callable(method):
            raise NoRule(name)
        return lambda *args, **kwargs: Jet.__torch_function__(method, (), (self, *args), kwargs)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Jet:
        inner = index if type(index) is tuple else (index,)
        _check_recorded()
        if all(i is None or i is Ellipsis or type(i) in (int, slice) for i in inner):
            whole = (slice(None), *inner)
            return self.like(self.components[whole])
        return linear_map(lambda t: t[index], self)

    __hash__ = object.__hash__


def _operator(func: Any, swapped: bool = False) -> Callable[..., Any]:
    def method(self: Jet, *other: Any) -> Any:
        return Jet.__torch_function__(func, (), (*other, self) if swapped else (self, *other))

    return method


def _refused(self: Jet, *_: Any) -> Any:
    """In-place changes, of which views of the same tensor would have to know, and what asks for a number."""
    raise NoRule("an operation in place, or a jet as a number")


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    _function = {"truediv": torch.div}.get(_name) or getattr(torch, _name)
    setattr(Jet, f"__{_name}__", _operator(_function))
    setattr(Jet, f"__r{_name}__", _operator(_function, swapped=True))
    setattr(Jet, f"__i{_name}__", _refused)
for _name in ("neg", "abs", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Jet, f"__{_name}__", _operator(getattr(torch, _name)))
for _name in ("setitem", "bool", "float", "int", "index", "contains"):
    setattr(Jet, f"__{_name}__", _refused)


def linear_map(func: Any, z: Any, *args: Any, **kwargs: Any) -> Any:
    """Linear in the first argument; of others that are jets (as in view_as) the value counts."""
    if type(z) is not Jet:
        return constant(func, z, *args, **kwargs)
    args, kwargs = tree_map(lambda a: a.value if type(a) is Jet else a, (args, kwargs))
    return tree_map(z.like, vmap(lambda t: func(t, *args, **kwargs))(z.components))


def constant(func: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tree_map(lambda a: a.value if type(a) is Jet else a, (args, kwargs))
    return func(*args, **kwargs)
