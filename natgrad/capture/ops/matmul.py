"""Products of matrices, of which one is a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.capture.layouts import Dims, linear_layout
from natgrad.capture.ops.base import OpUse, Own, aten, op_rule
from natgrad.capture.views import DimsView


@op_rule(F.linear, aten.linear)
def linear(own: Own, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> OpUse:
    lead, last = tuple(range(input.dim() - 1)), (input.dim() - 1,)
    if weight.dim() == 1:
        view = DimsView(Dims(tuple(weight.shape), (), (), (0,)), lead, (), last, lead, (), ())
    else:
        view = DimsView(linear_layout(tuple(weight.shape)), lead, (), last, lead, (), last)
    return OpUse(weight, bias, input, view)


def contraction(x: Tensor, w: Tensor, xs: Sequence[Any], ws: Sequence[Any], os: Sequence[Any]) -> OpUse | None:
    """einsum of an input and a parameter over one label a dimension; None where it is no stack of linear maps.

    The labels and the sizes of the parameter alone decide what its dimensions count, not how many rows there are.
    """
    if any(len(set(labels)) != len(labels) for labels in (xs, ws, os)):
        return None
    # broadcast along the output, whatever the size of the input there
    ws = [f"one {d}" if w.shape[d] == 1 and s in xs and s in os else s for d, s in enumerate(ws)]
    group = [s for s in ws if s in xs and s in os]
    into = [s for s in ws if s in xs and s not in os]
    outs = [s for s in ws if s not in xs and s in os]
    positions = [s for s in os if s not in ws]
    alone = [d for d, s in enumerate(ws) if s not in xs and s not in os]
    x_alone = [d for d, s in enumerate(xs) if s not in ws and s not in os]
    if any(w.shape[d] != 1 for d in alone) or any(x.shape[d] != 1 for d in x_alone):
        return None  # summed over alone
    if any(s not in xs for s in positions):
        return None
    for s in group:  # an input that every group takes
        d = list(xs).index(s)
        if x.shape[d] == 1:
            x = x.expand(*x.shape[:d], w.shape[ws.index(s)], *x.shape[d + 1 :])
    if any(x.shape[list(xs).index(s)] != w.shape[ws.index(s)] for s in (*group, *into)):
        return None  # broadcast inside a label

    def dims(labels: Sequence[Any], of: Sequence[Any]) -> tuple[int, ...]:
        return tuple(of.index(s) for s in labels)

    layout = Dims(tuple(w.shape), (*dims(group, ws), *alone), dims(outs, ws), dims(into, ws))
    view = DimsView(
        layout,
        dims(positions, xs),
        dims(group, xs),
        (*dims(into, xs), *x_alone),
        dims(positions, os),
        dims(group, os),
        dims(outs, os),
    )
    return OpUse(w, None, x, view, needs_rows=True)


@op_rule(
    *(torch.matmul, torch.Tensor.matmul, aten.matmul, torch.mm, torch.Tensor.mm, aten.mm, torch.sparse.mm),
    *(torch.bmm, torch.Tensor.bmm, aten.bmm, torch.mv, torch.Tensor.mv, aten.mv),
)
def matmul(own: Own, out: Tensor, a: Tensor, b: Tensor) -> OpUse | None:
    if own(a) == own(b):
        return None
    w, x = (a, b) if own(a) else (b, a)
    if x.dim() < w.dim() and x.dim() > 1:  # every matrix of the stack takes the same input
        x = x[(None,) * (w.dim() - x.dim())]
    a, b = (w, x) if w is a else (x, w)
    batch = [f"batch{i}" for i in range(max(a.dim(), b.dim()) - 2)]
    left = labels_of(a, batch, ["row", "inner"])
    right = labels_of(b, batch, ["inner", "column"])
    ends = (["row"] if a.dim() > 1 else []) + (["column"] if b.dim() > 1 else [])
    both = batch + ends
    return contraction(b, a, right, left, both) if w is a else contraction(a, b, left, right, both)


def labels_of(t: Tensor, batch: list[str], ends: list[str]) -> list[str]:
    """Labels of one operand of matmul."""
    if t.dim() == 1:
        return ["inner"]
    return batch[len(batch) - (t.dim() - 2) :] + ends


@op_rule(torch.einsum, aten.einsum)
def einsum(own: Own, out: Tensor, equation: Any, *operands: Any) -> OpUse | None:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or own(operands[0]) == own(operands[1]):
        return None
    left, arrow, right = equation.replace(" ", "").partition("->")
    sides = left.split(",")
    if not arrow or len(sides) != 2:
        return None
    width = (
        max((t.dim() - len(s.replace("...", ""))) for s, t in zip(sides, operands) if "..." in s)
        if "..." in left
        else 0
    )
    spelled = [spell(s, t.dim() - len(s.replace("...", "")), width) for s, t in zip(sides, operands)]
    result = spell(right, width, width)
    i = int(own(operands[1]))
    return contraction(operands[1 - i], operands[i], spelled[1 - i], spelled[i], result)


def spell(side: str, here: int, width: int) -> list[str]:
    """ "…ij" → ["…0", "…1", "i", "j"], the dimensions of the ellipsis counted from the right."""
    before, dots, after = side.partition("...")
    return [*before, *([f"…{width - here + i}" for i in range(here)] if dots else []), *after]


@op_rule(
    *(torch.addmm, torch.Tensor.addmm, aten.addmm, torch.sparse.addmm),
    *(torch.baddbmm, torch.Tensor.baddbmm, aten.baddbmm),
)
def addmm(own: Own, out: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    parsed = matmul(own, out, mat1, mat2)
    if parsed is None or alpha != 1 or beta != 1:
        return None
    if own(input):
        parsed.bias = input
    else:
        parsed.others = (input,)
    parsed.needs_rows = False
    return parsed


@op_rule(F.bilinear, aten.bilinear)
def bilinear(own: Own, out: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Any = None) -> OpUse:
    """x1ᵀ W[o] x2: linear in the outer product of the inputs."""
    x = input1.detach().unsqueeze(-1) * input2.detach().unsqueeze(-2)
    n = input1.dim() - 1
    lead = tuple(range(n))
    view = DimsView(Dims(tuple(weight.shape), (), (0,), (1, 2)), lead, (), (n, n + 1), lead, (), (n,))
    return OpUse(weight, bias, x, view, (input1, input2))


@op_rule(
    *(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None),
    *(aten._grouped_mm, "transformers::grouped_mm_fallback"),
)
def grouped_mm(
    own: Own, out: Tensor, a: Tensor, b: Tensor, offs: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Any:
    """Rows offs[k − 1] to offs[k] of the input go through matrix k; those past the last go nowhere."""
    if a.dim() != 2 or b.dim() != 3 or own(a) or offs is None or bias is not None:
        return None
    routes = torch.searchsorted(offs.long(), torch.arange(len(a), device=a.device), right=True)
    routes = torch.where(routes < len(b), routes, -1)
    layout = Dims(tuple(b.shape), (0,), (2,), (1,))
    return OpUse(b, None, a, DimsView(layout, (0,), (), (1,), (0,), (), (1,), routes=routes))
