"""Op rules: every covered op is a stack of linear maps.

A rule says of one call of an op which tensors are its weight and bias, what its input is, and by which `View` input and
output gradient become rows,

    out[n, p, k, :] = W[k] @ a[n, p, k, :].

A linear layer has one group k, a grouped convolution its groups, and an elementwise scale or offset as many groups as
elements with d_out = d_in = 1. A bias is one more column of W whose input is 1 (the homogeneous coordinate). The
gradient of datum n is Σ_p g[n, p, k, :] a[n, p, k, :]ᵀ, whatever the op.

A new op is one function and one entry in `RULES`. A rule is called with `own` (whether a tensor is a parameter of the
metric, or a slice, cast or transpose of one), the op's output and its arguments; it returns None where the call is
not of the form. A use that no rule describes is found by the coverage walk of `natgrad.capture.tape`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.capture.layouts import ConvLayout, Dims, TransposedConvLayout, element_layout, linear_layout
from natgrad.capture.views import ConvView, DimsView, IndexView, View

Own = Callable[[Any], bool]


@dataclass
class Parsed:
    """What a rule says of one call."""

    weight: Tensor | None
    bias: Tensor | None
    x: Tensor
    view: View
    others: Sequence[Any] = ()  # further arguments that the output's graph leads to
    needs_data: bool = False  # the call counts only where a dimension besides the parameter's own may count data


Rule = Callable[..., "Parsed | None"]


# matrix products -------------------------------------------------------------------------------------------


def linear(own: Own, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Parsed:
    lead, last = tuple(range(input.dim() - 1)), (input.dim() - 1,)
    if weight.dim() == 1:
        view = DimsView(Dims(tuple(weight.shape), (), (), (0,)), lead, (), last, lead, (), ())
    else:
        view = DimsView(linear_layout(tuple(weight.shape)), lead, (), last, lead, (), last)
    return Parsed(weight, bias, input, view)


def contraction(x: Tensor, w: Tensor, out: Tensor, xs: Sequence[Any], ws: Sequence[Any], os: Sequence[Any]) -> Any:
    """einsum over one label a dimension; None where it is no stack of linear maps."""
    if any(len(set(labels)) != len(labels) for labels in (xs, ws, os)):
        return None
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
    if any(x.shape[xs.index(s)] != w.shape[ws.index(s)] for s in (*group, *into)):
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
    return Parsed(w, None, x, view, needs_data=True)


def matmul(own: Own, out: Tensor, a: Tensor, b: Tensor) -> Parsed | None:
    if own(a) == own(b):
        return None
    batch = [f"batch{i}" for i in range(max(a.dim(), b.dim()) - 2)]
    left = labels_of(a, batch, ["row", "inner"] if a.dim() > 1 else ["inner"], "left")
    right = labels_of(b, batch, ["inner", "column"] if b.dim() > 1 else ["inner"], "right")
    ends = (["row"] if a.dim() > 1 else []) + (["column"] if b.dim() > 1 else [])
    both = batch + ends
    return contraction(b, a, out, right, left, both) if own(a) else contraction(a, b, out, left, right, both)


def labels_of(t: Tensor, batch: list[str], ends: list[str], side: str) -> list[str]:
    """Labels of one operand of matmul; a batch dimension of size 1 is its own, since it is broadcast."""
    mine = batch[len(batch) - (t.dim() - 2) :] if t.dim() > 2 else []
    return [f"{side}{s}" if t.shape[d] == 1 else s for d, s in enumerate(mine)] + ends


def einsum(own: Own, out: Tensor, equation: Any, *operands: Any) -> Parsed | None:
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
    return contraction(operands[1 - i], operands[i], out, spelled[1 - i], spelled[i], result)


def spell(side: str, here: int, width: int) -> list[str]:
    """ "…ij" → ["…0", "…1", "i", "j"], the dimensions of the ellipsis counted from the right."""
    before, dots, after = side.partition("...")
    return [*before, *([f"…{width - here + i}" for i in range(here)] if dots else []), *after]


def addmm(own: Own, out: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    parsed = matmul(own, out, mat1, mat2)
    if parsed is None or alpha != 1 or beta != 1:
        return None
    if own(input):
        if not own(mat2) or input.shape != out.shape[-1:] or mat2.dim() != 2:
            return None
        parsed.bias = input
    else:
        parsed.others = (input,)
    parsed.needs_data = False
    return parsed


def bilinear(own: Own, out: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Any = None) -> Parsed:
    """x1ᵀ W[o] x2: linear in the outer product of the inputs."""
    x = input1.detach().unsqueeze(-1) * input2.detach().unsqueeze(-2)
    n = input1.dim() - 1
    lead = tuple(range(n))
    view = DimsView(Dims(tuple(weight.shape), (), (0,), (1, 2)), lead, (), (n, n + 1), lead, (), (n,))
    return Parsed(weight, bias, x, view, (input1, input2))


# convolutions ----------------------------------------------------------------------------------------------


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
) -> Parsed:
    kernel = tuple(weight.shape[2:])
    dilation = spread(dilation, len(kernel))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in spread(0 if padding == "valid" else padding, len(kernel)))
    view = ConvView(ConvLayout(groups, kernel), kernel, spread(stride, len(kernel)), pads, dilation)
    return Parsed(weight, bias, input, view)


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
) -> Parsed:
    """A convolution, with the kernel flipped, of the input with stride − 1 zeros between its entries."""
    kernel = tuple(weight.shape[2:])
    dims = len(kernel)
    stride, padding, extra, dilation = (spread(v, dims) for v in (stride, padding, output_padding, dilation))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    pads = tuple((r - p, r - p + e) for r, p, e in zip(reach, padding, extra))
    layout = TransposedConvLayout(groups, kernel, weight.shape[0] // groups)
    return Parsed(weight, bias, input, ConvView(layout, kernel, (1,) * dims, pads, dilation, stride))


def spread(value: Any, dims: int) -> tuple[int, ...]:
    """An int or a sequence → one int a dimension."""
    if isinstance(value, int):
        return (value,) * dims
    value = tuple(int(v) for v in value)
    return value * dims if len(value) == 1 else value


# tables ----------------------------------------------------------------------------------------------------


def embedding(
    own: Own,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Parsed:
    size = weight.shape[0]
    padding = None if padding_idx is None else padding_idx % size
    return Parsed(weight, None, input, IndexView(linear_layout(tuple(weight.shape), flipped=True), size, padding))


def embedding_bag(
    own: Own,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: Any = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Parsed | None:
    """Sums and means of table rows; the maximum is not linear in the table."""
    if mode == "max":
        return None
    size = weight.shape[0]
    index, scale = bags(input, offsets, per_sample_weights, include_last_offset)
    if padding_idx is not None:
        scale = scale * (index != padding_idx % size)
    if mode == "mean":
        scale = scale / (scale != 0).sum(1, keepdim=True).clamp(min=1)
    x = torch.stack([index.to(torch.float64), scale], dim=-1)  # (bags, longest, 2)
    view = IndexView(linear_layout(tuple(weight.shape), flipped=True), size, None, bags=True)
    return Parsed(weight, None, x, view, (per_sample_weights,))


def bags(input: Tensor, offsets: Tensor | None, weights: Tensor | None, closed: bool) -> tuple[Tensor, Tensor]:
    """Indices and scales (bags, longest), zero where a bag is shorter."""
    if input.dim() == 2:
        ones = torch.ones(input.shape, dtype=torch.float64, device=input.device)
        return input, ones if weights is None else weights.detach().to(ones)
    assert offsets is not None
    ends = offsets[1:] if closed else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
    starts = offsets[:-1] if closed else offsets
    longest = max(int((ends - starts).max()), 1)
    place = starts[:, None] + torch.arange(longest, device=input.device)
    inside = place < ends[:, None]
    place = place.clamp(max=max(len(input) - 1, 0))
    scale = inside.to(torch.float64)
    if weights is not None:
        scale = scale * weights.detach()[place].to(scale)
    return input[place] * inside, scale


# scales and offsets ----------------------------------------------------------------------------------------


def elements(w: Tensor, shape: Sequence[int], start: int | None = None) -> DimsView:
    """The view of an op in which element w[i] acts on the entries of a tensor of `shape` beside it.

    ``start``: the dimension of the tensor that the first dimension of w stands at; None aligns the last ones.
    """
    start = len(shape) - w.dim() if start is None else start
    spanned = tuple(start + d for d in range(w.dim()) if w.shape[d] != 1)
    free = tuple(d for d in range(len(shape)) if d not in spanned)
    return DimsView(element_layout(tuple(w.shape)), free, spanned, (), free, spanned, ())


def scaled(w: Tensor, x: Tensor, out: Tensor) -> Parsed | None:
    """out = w ⊙ x + …, with w broadcast to the output."""
    if w.dim() > out.dim() or any(a != b and a != 1 for a, b in zip(reversed(w.shape), reversed(out.shape))):
        return None
    return Parsed(w, None, x.detach().expand(out.shape), elements(w, out.shape), needs_data=True)


def mul(own: Own, out: Tensor, input: Any, other: Any) -> Parsed | None:
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)) or own(input) == own(other):
        return None
    w, x = (input, other) if own(input) else (other, input)
    parsed = scaled(w, x, out)
    if parsed is not None:
        parsed.others = (x,)
    return parsed


def add(own: Own, out: Tensor, input: Any, other: Any, *, alpha: Any = 1) -> Parsed | None:
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)) or own(input) == own(other):
        return None
    w, rest, factor = (input, other, 1) if own(input) else (other, input, alpha)
    parsed = scaled(w, torch.full((), float(factor), dtype=w.dtype, device=w.device), out)
    if parsed is not None:
        parsed.others = (rest,)
    return parsed


def sub(own: Own, out: Tensor, input: Any, other: Any, *, alpha: Any = 1) -> Parsed | None:
    return add(own, out, input, other, alpha=-alpha)


def broadcast(own: Own, out: Tensor, input: Tensor, *sizes: Any, **_: Any) -> Parsed | None:
    """A parameter repeated: an offset to zero."""
    return scaled(input, torch.ones((), dtype=input.dtype, device=input.device), out) if own(input) else None


def prelu(own: Own, out: Tensor, input: Tensor, weight: Tensor) -> Parsed:
    x = input.detach().clamp(max=0)
    view = (
        elements(weight, input.shape, min(1, input.dim() - 1)) if weight.numel() > 1 else elements(weight, input.shape)
    )
    return Parsed(weight, None, x, view, (input,))


# norms: the affine part acts on the normalised input ---------------------------------------------------------


def affine(input: Tensor, normed: Tensor, weight: Any, bias: Any, start: int) -> Parsed | None:
    like = weight if weight is not None else bias
    if like is None:
        return None
    return Parsed(weight, bias, normed, elements(like, input.shape, start), (input,))


def layer_norm(
    own: Own, out: Tensor, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    normed = F.layer_norm(input.detach(), normalized_shape, None, None, eps)
    return affine(input, normed, weight, bias, input.dim() - len(normalized_shape))


def rms_norm(
    own: Own, out: Tensor, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    normed = F.rms_norm(input.detach(), normalized_shape, None, eps)
    return affine(input, normed, weight, None, input.dim() - len(normalized_shape))


def group_norm(
    own: Own, out: Tensor, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    return affine(input, F.group_norm(input.detach(), num_groups, None, None, eps), weight, bias, 1)


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


RULES: dict[Any, Rule] = {
    F.linear: linear,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.mm: matmul,
    torch.Tensor.mm: matmul,
    torch.bmm: matmul,
    torch.Tensor.bmm: matmul,
    torch.mv: matmul,
    torch.Tensor.mv: matmul,
    torch.einsum: einsum,
    torch.addmm: addmm,
    torch.Tensor.addmm: addmm,
    torch.baddbmm: addmm,
    torch.Tensor.baddbmm: addmm,
    F.bilinear: bilinear,
    F.conv1d: conv,
    F.conv2d: conv,
    F.conv3d: conv,
    F.conv_transpose1d: conv_transpose,
    F.conv_transpose2d: conv_transpose,
    F.conv_transpose3d: conv_transpose,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.prelu: prelu,
    torch.mul: mul,
    torch.Tensor.mul: mul,
    torch.Tensor.mul_: mul,
    torch.add: add,
    torch.Tensor.add: add,
    torch.Tensor.add_: add,
    torch.sub: sub,
    torch.Tensor.sub: sub,
    torch.Tensor.sub_: sub,
    torch.Tensor.expand: broadcast,
    torch.Tensor.expand_as: broadcast,
    torch.broadcast_to: broadcast,
    torch.Tensor.broadcast_to: broadcast,
    torch.Tensor.repeat: broadcast,
}

# ops that overwrite their first argument: it is kept as it was before
IN_PLACE = (torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.sub_)


def op_name(func: Any) -> str:
    return getattr(func, "__name__", str(func)).strip("_")
