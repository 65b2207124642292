"""The affine part of norms, which acts on the normalised input."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from natgrad.capture.ops.base import OpUse, Own, aten, op_rule
from natgrad.capture.ops.elementwise import elements


def affine(input: Tensor, normed: Tensor, weight: Any, bias: Any, start: int) -> OpUse | None:
    like = weight if weight is not None else bias
    if like is None:
        return None
    return OpUse(weight, bias, normed, elements(like, input.shape, start), (input,), bias_at=start)


@op_rule(F.layer_norm, aten.layer_norm, aten.native_layer_norm)
def layer_norm(
    own: Own,
    out: Tensor,
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    normed = F.layer_norm(input.detach(), normalized_shape, None, None, eps)
    return affine(input, normed, weight, bias, input.dim() - len(normalized_shape))


@op_rule(F.rms_norm, aten.rms_norm, aten._fused_rms_norm)
def rms_norm(
    own: Own, out: Tensor, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    normed = F.rms_norm(input.detach(), normalized_shape, None, eps)
    return affine(input, normed, weight, None, input.dim() - len(normalized_shape))


@op_rule(F.group_norm, aten.group_norm)
def group_norm(
    own: Own,
    out: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
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


# the same norms as exported graphs call them, with their arguments in another order


@op_rule(aten.native_group_norm)
def native_group_norm(
    own: Own, out: Tensor, input: Tensor, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float
) -> Any:
    return group_norm(own, out, input, groups, weight, bias, eps)


@op_rule(
    aten.batch_norm, aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_functional
)
def native_batch_norm(
    own: Own,
    out: Tensor,
    input: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Any = None,
    running_var: Any = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    if isinstance(running_mean, bool):  # the overload that keeps no statistics
        running_mean, running_var, training, eps = None, None, running_mean, training
    return batch_norm(own, out, input, running_mean, running_var, weight, bias, training, momentum, eps)


@op_rule(aten._native_batch_norm_legit_no_training)
def batch_norm_in_evaluation(
    own: Own, out: Tensor, input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    return batch_norm(own, out, input, mean, var, weight, bias, False, momentum, eps)


@op_rule(aten.instance_norm)
def native_instance_norm(
    own: Own,
    out: Tensor,
    input: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Any:
    return instance_norm(own, out, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
