"""The affine part of norms, which acts on the normalised input."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from natgrad.capture.ops.base import OpUse, Own, op_rule
from natgrad.capture.ops.elementwise import elements


def affine(input: Tensor, normed: Tensor, weight: Any, bias: Any, start: int) -> OpUse | None:
    like = weight if weight is not None else bias
    if like is None:
        return None
    return OpUse(weight, bias, normed, elements(like, input.shape, start), (input,))


@op_rule(F.layer_norm)
def layer_norm(
    own: Own, out: Tensor, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    normed = F.layer_norm(input.detach(), normalized_shape, None, None, eps)
    return affine(input, normed, weight, bias, input.dim() - len(normalized_shape))


@op_rule(F.rms_norm)
def rms_norm(
    own: Own, out: Tensor, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    normed = F.rms_norm(input.detach(), normalized_shape, None, eps)
    return affine(input, normed, weight, None, input.dim() - len(normalized_shape))


@op_rule(F.group_norm)
def group_norm(
    own: Own, out: Tensor, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    return affine(input, F.group_norm(input.detach(), num_groups, None, None, eps), weight, bias, 1)


@op_rule(F.batch_norm)
def batch_norm(
    own: Own,
    out: Tensor,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    # in training mode without the running statistics, which a second pass would move
    mean, var = (None, None) if training else (running_mean, running_var)
    return affine(input, F.batch_norm(input.detach(), mean, var, None, None, training, 0.0, eps), weight, bias, 1)


@op_rule(F.instance_norm)
def instance_norm(
    own: Own,
    out: Tensor,
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)
    return affine(
        input, F.instance_norm(input.detach(), mean, var, None, None, use_input_stats, 0.0, eps), weight, bias, 1
    )
