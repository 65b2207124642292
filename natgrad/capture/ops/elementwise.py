"""Scales and offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.capture.layouts import element_layout
from natgrad.capture.ops.base import OpUse, Own, Picked, aten, op_rule
from natgrad.capture.views import DimsView


def elements(w: Tensor, shape: Sequence[int], start: int | None = None) -> DimsView:
    """The view of an op in which element w[i] acts on the entries of a tensor of `shape` beside it.

    ``start``: the dimension of the tensor that the first dimension of w stands at; None aligns the last ones.
    """
    start = len(shape) - w.dim() if start is None else start
    spanned = tuple(start + d for d in range(w.dim()) if w.shape[d] != 1)
    free = tuple(d for d in range(len(shape)) if d not in spanned)
    return DimsView(element_layout(tuple(w.shape)), free, spanned, (), free, spanned, ())


def scaled(w: Tensor, x: Tensor, out: Tensor) -> OpUse | None:
    """out = w ⊙ x + …, with w broadcast to the output."""
    if x.layout != torch.strided:  # the gradient of w would be sparse
        return None
    if w.dim() > out.dim() or any(a != b and a != 1 for a, b in zip(reversed(w.shape), reversed(out.shape))):
        return None
    return OpUse(w, None, x.detach().expand(out.shape), elements(w, out.shape), needs_rows=True)


@op_rule(torch.mul, torch.Tensor.mul, torch.Tensor.mul_, aten.mul, aten.mul_)
def mul(own: Own, out: Tensor, input: Any, other: Any) -> OpUse | None:
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)) or own(input) == own(other):
        return None
    w, x = (input, other) if own(input) else (other, input)
    parsed = scaled(w, x, out)
    if parsed is not None:
        parsed.others = (x,)
    return parsed


@op_rule(torch.add, torch.Tensor.add, torch.Tensor.add_, aten.add, aten.add_)
def add(own: Own, out: Tensor, input: Any, other: Any, *, alpha: Any = 1) -> OpUse | None:
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)) or own(input) == own(other):
        return None
    w, rest, factor = (input, other, 1) if own(input) else (other, input, alpha)
    parsed = scaled(w, torch.full((), float(factor), dtype=w.dtype, device=w.device), out)
    if parsed is not None:
        parsed.others = (rest,)
    return parsed


@op_rule(torch.sub, torch.Tensor.sub, torch.Tensor.sub_, aten.sub, aten.sub_)
def sub(own: Own, out: Tensor, input: Any, other: Any, *, alpha: Any = 1) -> OpUse | None:
    return add(own, out, input, other, alpha=-alpha)


@op_rule(
    *(torch.Tensor.expand, torch.Tensor.expand_as, torch.broadcast_to, torch.Tensor.broadcast_to, torch.Tensor.repeat),
    *(aten.expand, aten.expand_as, aten.broadcast_to, aten.repeat),
)
def broadcast(own: Own, out: Tensor, input: Tensor, *sizes: Any, **_: Any) -> OpUse | Picked | None:
    """A parameter repeated: an offset to zero, or a matrix for a product with each of a batch."""
    if not own(input):
        return None
    offset = scaled(input, torch.ones((), dtype=input.dtype, device=input.device), out)
    one = input if input.dim() == 3 else input[None]
    if one.dim() != 3 or out.dim() != 3 or one.shape != (1, *out.shape[1:]):
        return offset
    return Picked(one, torch.zeros(len(out), dtype=torch.long, device=out.device), offset)


@op_rule(F.prelu, aten.prelu, aten._prelu_kernel)
def prelu(own: Own, out: Tensor, input: Tensor, weight: Tensor) -> OpUse:
    x = input.detach().clamp(max=0)
    view = (
        elements(weight, input.shape, min(1, input.dim() - 1)) if weight.numel() > 1 else elements(weight, input.shape)
    )
    return OpUse(weight, None, x, view, (input,))
