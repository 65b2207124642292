"""Tables of which rows are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.capture.layouts import linear_layout
from natgrad.capture.ops.base import OpUse, Own, Picked, aten, op_rule
from natgrad.capture.views import IndexView


@op_rule(F.embedding)
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
) -> OpUse:
    size = weight.shape[0]
    padding = None if padding_idx is None else padding_idx % size
    return OpUse(weight, None, input, IndexView(linear_layout(tuple(weight.shape), flipped=True), size, padding))


@op_rule(F.embedding_bag)
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
) -> OpUse | None:
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
    return OpUse(weight, None, x, view, (per_sample_weights,))


@op_rule(aten.embedding)
def aten_embedding(own: Own, out: Tensor, weight: Tensor, indices: Tensor, padding_idx: int = -1, *_: Any) -> OpUse:
    return embedding(own, out, indices, weight, None if padding_idx < 0 else padding_idx)


@op_rule(aten.embedding_bag, aten._embedding_bag, aten._embedding_bag_forward_only)
def aten_embedding_bag(
    own: Own,
    out: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> OpUse | None:
    padding = None if padding_idx is None or padding_idx < 0 else padding_idx
    return embedding_bag(
        own,
        out,
        indices,
        weight,
        offsets,
        mode=("sum", "mean", "max")[mode],
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding,
    )


@op_rule(torch.Tensor.__getitem__)
def getitem(own: Own, out: Tensor, input: Tensor, index: Any) -> Picked | None:
    """w[ids]: rows of a table, or matrices of a stack."""
    first, *rest = index if isinstance(index, tuple) else (index,)
    if any(r is not ... and r != slice(None) for r in rest if not isinstance(r, Tensor)) or not own(input):
        return None
    if any(isinstance(r, Tensor) for r in rest):
        return None
    first = torch.as_tensor(first, device=input.device) if isinstance(first, list) else first
    return picked(own, input, first)


@op_rule(aten.index)
def index(own: Own, out: Tensor, input: Tensor, indices: Any) -> Picked | None:
    return picked(own, input, indices[0]) if own(input) and all(i is None for i in indices[1:]) else None


@op_rule(torch.index_select, torch.Tensor.index_select, aten.index_select)
def index_select(own: Own, out: Tensor, input: Tensor, dim: int, index: Tensor) -> Picked | None:
    return picked(own, input, index) if own(input) and dim == 0 else None


def picked(own: Own, w: Tensor, ids: Any) -> Picked | None:
    """Entries of the first dimension of `w` by a tensor of numbers."""
    if not isinstance(ids, Tensor) or ids.dtype in (torch.bool, torch.uint8) or not ids.dim() or w.dim() < 2:
        return None
    if w.dim() > 2:
        return Picked(w, ids)
    size = w.shape[0]
    view = IndexView(linear_layout(tuple(w.shape), flipped=True), size)
    return Picked(w, ids, OpUse(w, None, ids % size, view))


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
