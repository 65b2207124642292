"""How large a direction and the weights are, in one measure for layers of any shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.base import Block, JointBlock
from natgrad.blocks.kronecker import KroneckerBlock

VECTOR_SHARE = 0.12  # update size of biases, norms and parameters without curvature, as a share of η


def sizes_of(blocks: Sequence[Block], directions: Sequence[Tensor], norms: Tensor) -> Tensor:
    """Return size(d) of each block, (blocks,): rms(d) √(fan_in + 1), over all layers of a block.

    A bias counts by what it does to the layer's output, as an input of the size of the others would: inputs in
    thousands must not leave all of a step to the bias.
    """
    out = norms * norms.new_tensor([update_unit(b.layers[0]) / d.numel() ** 0.5 for b, d in zip(blocks, directions)])
    kron = [(i, b, b.own_columns) for i, b in enumerate(blocks) if isinstance(b, KroneckerBlock) and b.own_columns]
    if kron:
        biases = torch.stack(torch._foreach_norm([directions[i][..., -k:] for i, _, k in kron]))
        weight = torch.stack([b.bias_scale().to(norms) for _, b, _ in kron])  # of a squared bias beside the inputs'
        where = [i for i, _, _ in kron]
        whole = norms[where].square()
        kept = ((whole + (weight - 1) * biases.square()) / whole).clamp(min=0).sqrt().nan_to_num(0, 0, 0)
        out[where] = out[where] * kept
    for i, (b, d) in enumerate(zip(blocks, directions)):
        if len(b.layers) > 1:
            out[i] = joint_size(b, d)
    return out


def joint_size(block: Block, d: Tensor) -> Tensor:
    assert isinstance(block, JointBlock)
    squares = [
        part.square().sum() * update_unit(layer) ** 2 for part, layer in zip(d.split(block.widths), block.layers)
    ]
    return (torch.stack(squares).sum() / d.numel()).sqrt()


def natural_sizes(blocks: Sequence[Block], tables: bool = False) -> dict[str, float]:
    """Return W₀ of every matrix of the blocks, by name: the rms that PyTorch's layers start with.

    `tables`: with embeddings, of which a row that is not in the batch has no gradient to answer a decay.
    """
    return {
        layer.weight.name: (3 * (layer.fan_in + 1)) ** -0.5
        for block in blocks
        for layer in block.layers
        if layer.weight is not None and not layer.layout.elementwise and (tables or not layer.one_hot)
    }


def update_unit(layer: Any) -> float:
    """An update of rms η / unit is a natural size for this layer."""
    if layer.weight is None or layer.layout.elementwise:
        return 1 / VECTOR_SHARE
    return (layer.fan_in + 1) ** 0.5
