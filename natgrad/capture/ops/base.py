"""Op rules: every covered op is a stack of linear maps.

A rule says of one call of an op which tensors are its weight and bias, what its input is, and by which `LinearForm`
input and output gradient become rows,

    out[n, p, k, :] = W[k] @ a[n, p, k, :].

A linear layer has one group k, a grouped convolution its groups, and an elementwise scale or offset as many groups as
elements with d_out = d_in = 1. A bias is one more column of W whose input is 1 (the homogeneous coordinate). The
gradient of datum n is Σ_p g[n, p, k, :] a[n, p, k, :]ᵀ, whatever the op.

A new op is one function under ``@op_rule(F.x)``, in a file of this folder or of yours. A rule is called with `own`
(whether a tensor is a parameter of the metric, or a slice, cast or transpose of one), the op's output and its
arguments. It returns None where the call is not of the form. A use that no rule describes is found by the coverage
walk of `natgrad.capture.tape`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from natgrad.capture.views import LinearForm

Own = Callable[[Any], bool]


@dataclass
class OpUse:
    """What a rule says of one call."""

    weight: Tensor | None
    bias: Tensor | None
    x: Tensor
    view: LinearForm
    others: Sequence[Any] = ()  # further arguments that the output's graph leads to
    needs_rows: bool = False  # the call counts only where the output has a dimension besides the parameter's own
    bias_at: int | None = None  # dimension of the output that the first one of the bias stands at; None aligns the last


@dataclass
class Picked:
    """What a rule says of a call that picks out of a stack by index: what is done with it is the use."""

    source: Tensor  # (groups, …)
    index: Tensor
    otherwise: OpUse | None = None  # the use that the call itself is, where what is done with it is none
    made: Tensor | None = None  # what the call returned


Rule = Callable[..., "OpUse | Picked | None"]
OneRule = TypeVar("OneRule", bound=Rule)
RULES: dict[Any, Rule] = {}  # of every covered op, by `known_as`; filled by `op_rule`

# ops that overwrite their first argument: it is kept as it was before
aten = torch.ops.aten
IN_PLACE = {torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.sub_, "aten::mul_", "aten::add_", "aten::sub_"}


def known_as(op: Any) -> Any:
    """What an op is looked up by: a function by itself, one of `torch.ops` by its name, whatever its overload."""
    if isinstance(op, torch._ops.OpOverload):
        op = op.overloadpacket
    return op._qualified_op_name if isinstance(op, torch._ops.OpOverloadPacket) else op


def op_rule(*ops: Any) -> Callable[[OneRule], OneRule]:
    """Let a function be the rule of these torch functions, those of `torch.ops` by themselves or by name, "lib::op".

    Raises:
        ValueError: one of them has a rule already.
    """

    def register(rule: OneRule) -> OneRule:
        for op in map(known_as, ops):
            if op in RULES:
                raise ValueError(f"{op_name(op)} has a rule already, {RULES[op].__name__}")
            RULES[op] = rule
        return rule

    return register


def op_name(func: Any) -> str:
    """Return what an op is called in tables and messages."""
    return getattr(func, "__name__", str(func)).strip("_")
