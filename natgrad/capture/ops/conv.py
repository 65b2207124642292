"""Convolutions and their transposes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from natgrad.capture.layouts import ConvLayout, TransposedConvLayout
from natgrad.capture.ops.base import OpUse, Own, aten, op_rule
from natgrad.capture.views import ConvView


@op_rule(F.conv1d, F.conv2d, F.conv3d, aten.conv1d, aten.conv2d, aten.conv3d)
def conv(
    own: Own,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> OpUse:
    kernel = tuple(weight.shape[2:])
    dilation = spread(dilation, len(kernel))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in spread(0 if padding == "valid" else padding, len(kernel)))
    view = ConvView(ConvLayout(groups, kernel), kernel, spread(stride, len(kernel)), pads, dilation)
    return OpUse(weight, bias, input, view, bias_at=out.dim() - 1 - len(kernel))


@op_rule(
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
)
def conv_transpose(
    own: Own,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> OpUse:
    """A convolution, with the kernel flipped, of the input with stride − 1 zeros between its entries."""
    kernel = tuple(weight.shape[2:])
    dims = len(kernel)
    stride, padding, extra, dilation = (spread(v, dims) for v in (stride, padding, output_padding, dilation))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    pads = tuple((r - p, r - p + e) for r, p, e in zip(reach, padding, extra))
    layout = TransposedConvLayout(groups, kernel, weight.shape[0] // groups)
    view = ConvView(layout, kernel, (1,) * dims, pads, dilation, stride)
    return OpUse(weight, bias, input, view, bias_at=out.dim() - 1 - dims)


@op_rule(aten.convolution, aten._convolution)
def convolution(
    own: Own,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *_: Any,
) -> OpUse:
    """What exported graphs hold in place of both."""
    if transposed:
        return conv_transpose(own, out, input, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(own, out, input, weight, bias, stride, padding, dilation, groups)


def spread(value: Any, dims: int) -> tuple[int, ...]:
    """An int or a sequence → one int a dimension."""
    if isinstance(value, int):
        return (value,) * dims
    value = tuple(int(v) for v in value)
    return value * dims if len(value) == 1 else value
