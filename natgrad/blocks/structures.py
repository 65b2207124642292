"""The structures of a block by name, and blocks as JSON: what they are over, without their statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from natgrad.blocks.base import Block
from natgrad.blocks.dense import DenseBlock, LayerBlock
from natgrad.blocks.diagonal import DiagonalBlock
from natgrad.blocks.eigenvalue import EigenvalueBlock
from natgrad.blocks.kronecker import InputBlock, KroneckerBlock
from natgrad.capture.layers import Layer
from natgrad.capture.layouts import LAYOUTS
from natgrad.capture.parameters import ParameterSlice

CLASSES: tuple[type[Block], ...] = (DenseBlock, LayerBlock, DiagonalBlock, KroneckerBlock, EigenvalueBlock, InputBlock)
STRUCTURES = {c.structure: c for c in CLASSES}


def block_to_json(block: Block) -> dict[str, Any]:
    return {
        "structure": block.structure,
        "sharing": block.sharing,
        "max_factor_dim": block.max_factor_dim,
        "trains": block.trains,
        "layers": [layer_to_json(layer) for layer in block.layers],
    }


def block_from_json(data: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Block:
    """Return an empty block. `shapes`: of the parameters.

    Raises:
        ValueError: its structure is none; other errors where more of it is none.
    """
    if data["structure"] not in STRUCTURES:
        raise ValueError(f"structure {data['structure']!r}; there are {', '.join(STRUCTURES)}")
    layers = [layer_from_json(d, shapes) for d in data["layers"]]
    return STRUCTURES[data["structure"]](layers, data["sharing"], data["max_factor_dim"], data["trains"])


def layer_to_json(layer: Layer) -> dict[str, Any]:
    return {
        "op": layer.op,
        "layout": [type(layer.layout).__name__, dict(vars(layer.layout))],
        "weight": None if layer.weight is None else [layer.weight.name, layer.weight.ranges],
        "biases": [[b.name, b.ranges] for b in layer.biases],
        "one_hot": layer.one_hot,
        "swapped": layer.swapped,
        "fan_in": layer.fan_in,
    }


def layer_from_json(data: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Layer:
    name, fields = data["layout"]
    layout = LAYOUTS[name](**{k: tuples(v) for k, v in fields.items()})
    weight = None if data["weight"] is None else piece(data["weight"])
    rest = {k: data[k] for k in ("one_hot", "swapped", "fan_in")}
    return Layer(data["op"], layout, weight, [piece(b) for b in data["biases"]], shapes, **rest)


def piece(data: Sequence[Any]) -> ParameterSlice:
    return ParameterSlice(data[0], tuples(data[1]))


def tuples(value: Any) -> Any:
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value
