"""Tables of which rows are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.capture.layouts import linear_layout
from natgrad.capture.ops.base import OpUse, Own, op_rule
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
