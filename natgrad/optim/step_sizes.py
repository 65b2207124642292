"""How large a direction and the weights are, in one measure for layers of any shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from natgrad.blocks.base import Block
from natgrad.blocks.kronecker import KroneckerBlock
from natgrad.capture.layers import Layer

VECTOR_SHARE = 0.12  # update size of biases, norms and parameters without curvature, as a share of η


class DirectionSizes:
    """size(d) of blocks: rms(d) √(fan_in + 1), over all layers of a block.

    A bias counts by what it does to the layer's output, as an input of the size of the others would: inputs in
    thousands must not leave all of a step to the bias.

    Args:
        blocks: in the order of the directions, with statistics.
        like: a tensor of the dtype and device of the directions.
    """

    def __init__(self, blocks: Sequence[Block], like: Tensor) -> None:
        self._units = like.new_tensor([update_unit(b.layers[0]) / b.dimension**0.5 for b in blocks])
        kron = [(i, b) for i, b in enumerate(blocks) if isinstance(b, KroneckerBlock) and b.own_columns]
        self._biases = [(i, b.own_columns) for i, b in kron]  # places of blocks with biases, and how many these are
        if kron:
            self._where = torch.tensor([i for i, _ in kron], device=like.device)
            self._more = torch.stack([b.bias_scale().to(like) for _, b in kron]) - 1  # than a squared weight counts
        self._joint = {
            i: (b.dimension, [(s.numel(), update_unit(layer) ** 2) for s, layer in zip(b.shapes, b.layers)])
            for i, b in enumerate(blocks)
            if len(b.layers) > 1
        }

    def of(self, directions: Sequence[Tensor], norms: Tensor) -> Tensor:
        """Return size(d) of each, (blocks,). `norms`: ‖d‖."""
        out = norms * self._units
        if self._biases:
            biases = torch.stack(torch._foreach_norm([directions[i][..., -k:] for i, k in self._biases]))
            whole = norms[self._where].square()
            kept = ((whole + self._more * biases.square()) / whole).clamp(min=0).sqrt().nan_to_num(0, 0, 0)
            out[self._where] = out[self._where] * kept
        for i, (dimension, layers) in self._joint.items():
            parts = directions[i].split([width for width, _ in layers])
            squares = [part.square().sum() * unit for part, (_, unit) in zip(parts, layers)]
            out[i] = (torch.stack(squares).sum() / dimension).sqrt()
        return out


class Matrix(NamedTuple):
    """A weight that mixes inputs."""

    name: str
    natural: float  # W₀: the rms that PyTorch's layers start with
    decays: bool  # not a table, of which a row that is not in the batch has no gradient to answer a decay


def matrices_of(block: Block) -> list[Matrix]:
    return [
        Matrix(layer.weight.name, (3 * (layer.fan_in + 1)) ** -0.5, not layer.one_hot)
        for layer in block.layers
        if layer.weight is not None and not layer.layout.elementwise
    ]


def update_unit(layer: Layer) -> float:
    """An update of rms η / unit is a natural size for this layer."""
    if layer.weight is None or layer.layout.elementwise:
        return 1 / VECTOR_SHARE
    return (layer.fan_in + 1) ** 0.5
