"""How operations of torch map jets.

Beside sums, products and joins there are four kinds of operations:

- linear in one argument (a view, a sum) or in each (a product of matrices): a derivative moves one argument at a
  time, a second one also two of them, so that Σ wᵢ∂ᵢ²B(a, b) = B(Σ wᵢ∂ᵢ²a, b) + B(a, Σ wᵢ∂ᵢ²b) + 2 Σ wᵢ B(∂ᵢa, ∂ᵢb);
- elementwise: f′(z) ∂ᵢz and f′(z) Σ wᵢ∂ᵢ²z + f″(z) Σ wᵢ(∂ᵢz)²;
- elementwise and piecewise linear: the same, and it is noted that a second derivative is not there to be had;
- constant wherever they are smooth (comparisons, ranks, sizes): the operation on the value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from natgrad.function_space.forward_laplacian import Jet, NoRule, constant, linear_map

# the kinds of operations -------------------------------------------------------------------------------------


def _multilinear(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Linear in each argument that is a jet. Mapped over components, so that axes are as torch counts them."""
    leaves, spec = tree_flatten((args, kwargs))
    jets = {i: leaf for i, leaf in enumerate(leaves) if type(leaf) is Jet}
    one = next(iter(jets.values()))

    def at(mapped: dict[int, Tensor]) -> Any:
        """func of the values, but for those in `mapped`."""
        filled = [mapped.get(i, jets[i].value if i in jets else leaf) for i, leaf in enumerate(leaves)]
        a, k = tree_unflatten(filled, spec)
        return func(*a, **k)

    if len(jets) == 1:
        return one.like(vmap(at)({i: jet.components for i, jet in jets.items()}))
    slopes = torch.stack([vmap(at)({i: jet.components[1:]}) for i, jet in jets.items()]).sum(0)
    pairs = [(i, j) for i in jets for j in jets if i < j]

    def second() -> Tensor:
        both = torch.stack([vmap(at)({i: jets[i].first, j: jets[j].first}) for i, j in pairs]).sum(0)
        return slopes[-1] + 2 * one.weighted(both)

    return one.of(at({}), slopes[: len(one.first)], second)


def _elementwise(func: Any, *args: Any, **kwargs: Any) -> Jet:
    """f of one jet and constants, with f′ and f″ from forward mode, so that any elementwise function is covered."""
    places = [i for i, a in enumerate(args) if type(a) is Jet]
    if len(places) > 1 or any(a is True for a in (*args, *kwargs.values())):  # of two jets, or in place
        raise NoRule(getattr(func, "__name__", "a function"))
    place = places[0]
    z = args[place]
    shapes = [_constant(z, a).shape for a in args if type(a) is not Jet and isinstance(a, Tensor)]
    z = z.like(_lifted(z.components, _broadcast(z.shape, *shapes)))
    f0, f1, f2 = _slopes(lambda s: func(*args[:place], s, *args[place + 1 :], **kwargs), func, z)
    if f0.shape != z.shape:
        raise NoRule("a function that is not elementwise")
    first = z.first
    return z.of(f0, f1 * first, lambda: f1 * z.components[-1] + f2() * z.weighted(first * first))


def _slopes(f: Callable[[Tensor], Tensor], func: Any, z: Jet) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    """f and f′ at the value, and what gives f″."""
    if func in TANH:
        f0 = torch.tanh(z.value)
        f1 = 1 - f0 * f0
        return f0, f1, lambda: -2 * f0 * f1
    if func in SIN:
        f0 = torch.sin(z.value)
        return f0, torch.cos(z.value), lambda: -f0
    one = torch.ones_like(z.value)
    if z.expansion.weights is None:
        f0, f1 = jvp(f, (z.value,), (one,))  # type: ignore[misc]
        return f0, f1, lambda: f1
    (f0, f1), (_, f2) = jvp(lambda y: jvp(f, (y,), (one,)), (z.value,), (one,))  # type: ignore[misc]
    return f0, f1, lambda: f2


def _power(func: Any, base: Any, exponent: Any) -> Jet:
    if isinstance(exponent, Tensor):  # reverse mode over forward mode of it is NaN below zero in torch 2.13
        raise NoRule("a tensor of exponents")
    return _elementwise(func, base, exponent)


def _piecewise_linear(func: Any, *args: Any, **kwargs: Any) -> Jet:
    out = _elementwise(func, *args, **kwargs)
    out.expansion.kinks.append(func.__name__)
    return out


# sums, products and joins --------------------------------------------------------------------------------------


def _constant(jet: Jet, other: Any) -> Any:
    """A constant that meets a jet.

    Raises:
        NoRule: it makes complex numbers or another precision of the result.
    """
    if isinstance(other, Tensor):
        fits = other.dtype == jet.dtype or not (other.is_floating_point() or other.is_complex())
    else:
        fits = isinstance(other, (int, float))
    if not fits:
        raise NoRule(f"a constant of type {other.dtype if isinstance(other, Tensor) else type(other)}")
    return other


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape of tensors of these shapes together. (`torch.broadcast_shapes` takes half a millisecond.)

    Raises:
        NoRule: there is none, as torch will say.
    """
    ndim = max(map(len, shapes))
    sizes = [{*place} - {1} for place in zip(*((1,) * (ndim - len(s)) + tuple(s) for s in shapes))]
    if any(len(found) > 1 for found in sizes):
        raise NoRule(f"shapes {shapes}")
    return tuple(found.pop() if found else 1 for found in sizes)


def _lifted(components: Tensor, shape: Sequence[int]) -> Tensor:
    """Components of a value as those of the value broadcast to `shape`."""
    if components.shape[1:] == tuple(shape):
        return components
    ones = (1,) * (len(shape) - components.ndim + 1)
    return components.reshape(len(components), *ones, *components.shape[1:]).expand(-1, *shape)


def _add(func: Any, a: Any, b: Any, *, alpha: float = 1) -> Jet:
    if type(b) is Jet and type(a) is Jet:
        shape = _broadcast(a.shape, b.shape)
        return a.like(_lifted(a.components, shape) + alpha * _lifted(b.components, shape))
    jet, other = (a, alpha * _constant(a, b)) if type(a) is Jet else (b.like(alpha * b.components), _constant(b, a))
    parts = _lifted(jet.components, _broadcast(jet.shape, getattr(other, "shape", ())))
    return jet.like(torch.cat([parts[:1] + other, parts[1:]]))  # a constant moves the value alone


def _subtract(func: Any, a: Any, b: Any, *, alpha: float = 1) -> Jet:
    return _add(func, a, b, alpha=-alpha)


def _multiply(func: Any, a: Any, b: Any) -> Jet:
    if type(a) is not Jet:
        a, b = b, a
    if type(b) is not Jet:
        shape = _broadcast(a.shape, getattr(_constant(a, b), "shape", ()))
        return a.like(_lifted(a.components, shape) * b)
    shape = _broadcast(a.shape, b.shape)
    a, b = a.like(_lifted(a.components, shape)), b.like(_lifted(b.components, shape))
    x, y, first = a.value, b.value, (a.first, b.first)
    return a.of(
        x * y,
        first[0] * y + x * first[1],
        lambda: a.components[-1] * y + x * b.components[-1] + 2 * a.weighted(first[0] * first[1]),
    )


def _divide(func: Any, a: Any, b: Any) -> Jet:
    if type(b) is Jet:
        return _multiply(func, a, _elementwise(torch.reciprocal, b))
    shape = _broadcast(a.shape, getattr(_constant(a, b), "shape", ()))
    return a.like(_lifted(a.components, shape) / b)


def _square(func: Any, z: Jet) -> Jet:
    return _multiply(func, z, z)


def _linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Jet:
    if type(x) is not Jet or type(weight) is Jet or type(bias) is Jet:
        out = _multilinear(lambda s, w: s @ w.mT, x, weight)
        return out if bias is None else out + bias
    out = F.linear(x.components, weight)
    if bias is not None:  # a constant moves the value alone
        moved = torch.cat([bias[None], bias.new_zeros(len(out) - 1, *bias.shape)])
        out = out + moved.reshape(len(out), *(1,) * (out.ndim - 2), -1)
    return x.like(out)


def _constant_jet(jet: Jet, c: Any) -> Tensor:
    """A constant as components: its derivatives are zero."""
    value = c[None] if isinstance(c, Tensor) else jet.components.new_full((1,), c)
    return torch.cat([value, torch.zeros_like(value).expand(len(jet.components) - 1, *value.shape[1:])])


def _join(func: Any, parts: Any, *args: Any, **kwargs: Any) -> Jet:
    jet = next(p for p in parts if type(p) is Jet)
    rows = [p.components if type(p) is Jet else _constant_jet(jet, p) for p in parts]
    return jet.like(vmap(lambda row: func(row, *args, **kwargs))(rows))


def _where(func: Any, condition: Any, a: Any, b: Any) -> Jet:
    if func is Tensor.where:  # the method of the first choice
        condition, a = a, condition
    jet = a if type(a) is Jet else b
    rows = [p.components if type(p) is Jet else _constant_jet(jet, _constant(jet, p)) for p in (a, b)]
    return jet.like(vmap(lambda s, t: torch.where(condition, s, t))(*rows))


def _masked_fill(func: Any, z: Jet, mask: Tensor, value: Any) -> Jet:
    return _where(torch.where, mask, value, z)


def _dropout(func: Any, z: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    if training:
        raise NoRule("dropout in training mode")
    return z


def _everywhere(names: str) -> list[Any]:
    """The functions and methods of these names."""
    homes = (torch, Tensor, F, torch.special, torch.linalg)
    return [getattr(home, name) for name in names.split() for home in homes if hasattr(home, name)]


TANH, SIN = set(_everywhere("tanh")), set(_everywhere("sin"))
PIECEWISE_LINEAR = frozenset(
    _everywhere(
        "relu leaky_relu relu6 hardtanh abs absolute hardswish hardsigmoid hardshrink softshrink threshold",
    )
)
ELEMENTWISE = _everywhere(
    "tanh sin cos tan asin acos atan sinh cosh asinh acosh atanh arcsin arccos arctan arcsinh arccosh arctanh exp exp2 "
    "expm1 log log2 log10 log1p sqrt rsqrt reciprocal sigmoid expit erf erfc erfinv lgamma sinc silu gelu softplus elu "
    "selu celu mish logsigmoid tanhshrink softsign"
)
LINEAR = _everywhere(
    "sum mean cumsum trace reshape reshape_as view view_as flatten unflatten ravel squeeze unsqueeze transpose permute "
    "movedim moveaxis swapaxes swapdims t expand expand_as broadcast_to repeat tile repeat_interleave flip fliplr "
    "flipud roll rot90 narrow select diagonal diag diag_embed tril triu gather index_select take take_along_dim chunk "
    "split tensor_split unbind unfold contiguous clone to double float type_as neg negative __neg__ positive adjoint"
)
MULTILINEAR = _everywhere(
    "matmul mm mv bmm dot inner outer ger vdot vecdot kron einsum tensordot cross multi_dot chain_matmul trapezoid "
    "__matmul__ __rmatmul__"
)
CONSTANT = _everywhere(
    "lt le gt ge eq ne less less_equal greater greater_equal not_equal __lt__ __le__ __gt__ __ge__ __eq__ __ne__ isnan "
    "isinf isfinite argmax argmin argsort sign sgn floor ceil round trunc detach zeros_like ones_like full_like "
    "new_zeros new_ones new_full new_tensor size dim ndimension numel is_floating_point is_complex allclose equal"
)
TORCH: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(PIECEWISE_LINEAR, _piecewise_linear),
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(LINEAR, linear_map),
    **dict.fromkeys(MULTILINEAR, _multilinear),
    **dict.fromkeys(CONSTANT, constant),
    **dict.fromkeys(_everywhere("add __add__ __radd__"), _add),
    **dict.fromkeys(_everywhere("sub subtract __sub__"), _subtract),
    **dict.fromkeys(_everywhere("rsub __rsub__"), lambda func, a, b: _add(func, b, a, alpha=-1)),
    **dict.fromkeys(_everywhere("mul multiply __mul__ __rmul__"), _multiply),
    **dict.fromkeys(_everywhere("div divide true_divide __truediv__"), _divide),
    **dict.fromkeys(_everywhere("square"), _square),
    **dict.fromkeys(_everywhere("pow __pow__"), _power),
    **dict.fromkeys(_everywhere("cat concat concatenate stack hstack vstack column_stack"), _join),
    **dict.fromkeys(_everywhere("where"), _where),
    **dict.fromkeys(_everywhere("masked_fill"), _masked_fill),
    F.linear: _linear,
    F.dropout: _dropout,
}
