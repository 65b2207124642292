"""From noted calls to layers and to the rows their blocks read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from natgrad.blocks import Layer, Use
from natgrad.capture import Call, CaptureError, Piece
from natgrad.ops import with_bias_columns


class Layers:
    """The layers found so far: calls that use the same weight, in the same matrix form, share one."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = shapes
        self.found: dict[Piece, Layer] = {}

    def learn(self, calls: Iterable[Call]) -> list[Layer]:
        """Layers that these calls are the first to use.

        Raises:
            CaptureError: a parameter is used in two ways that do not fit one block.
        """
        fresh: dict[Piece, Layer] = {}
        for call in calls:
            key = call.weight or call.bias
            assert key is not None
            layer = self.found.get(key) or fresh.get(key)
            if layer is None:
                layer = fresh[key] = Layer(call.op, call.view, call.weight, [], self.shapes)
            if layer.view != call.view:
                raise CaptureError(
                    f"parameter {key} is used by {layer.op} and by {call.op}, in two matrix forms that share no block; "
                    "leave it out with `params=`"
                )
            if call.bias is not None and call.bias not in layer.biases:
                if key in self.found:
                    raise CaptureError(
                        f"parameter {call.bias} was not used beside {key} when the metric first saw it, and is now; "
                        "make a new metric"
                    )
                if call.bias != key or call.weight is not None or not layer.biases:
                    layer.biases.append(call.bias)
        self._refuse_shared_pieces(fresh)
        self.found.update(fresh)
        return list(fresh.values())

    def _refuse_shared_pieces(self, fresh: Mapping[Piece, Layer]) -> None:
        owner: dict[str, list[tuple[Piece, Layer]]] = {}
        for layer in (*self.found.values(), *fresh.values()):
            for piece in layer.pieces:
                for other, held in owner.get(piece.name, []):
                    if held is not layer and overlap(piece, other):
                        raise CaptureError(
                            f"parameter {piece} is shared by the layers of {held.key} and {layer.key}, which "
                            f"share no block; "
                            "leave it out with `params=`"
                        )
                owner.setdefault(piece.name, []).append((piece, layer))

    def of(self, call: Call) -> Layer:
        key = call.weight or call.bias
        assert key is not None
        return self.found[key]

    def captured_names(self) -> set[str]:
        return {p.name for layer in self.found.values() for p in layer.pieces}


def overlap(a: Piece, b: Piece) -> bool:
    if a.rows is None or b.rows is None:
        return True
    return a.rows[0] < b.rows[1] and b.rows[0] < a.rows[1]


def canonical_input(call: Call, layer: Layer, dtype: torch.dtype) -> Tensor:
    """(rows, positions, groups, d_in), with the bias columns of the layer."""
    x = call.x
    a = call.view.inputs(x if x.dtype == dtype or not x.is_floating_point() else x.to(dtype))
    if layer.weight is None:
        a = a[..., :0]
    return with_bias_columns(a, [b == call.bias for b in layer.biases])


def regroup(t: Tensor, data: int | None) -> Tensor:
    """(rows, positions, …) → (data, rows/data · positions, …); None leaves the rows as they are."""
    return t if data is None or t.shape[0] == data else t.reshape(data, -1, *t.shape[2:])


def uses_of(
    calls: Sequence[Call], inputs: Sequence[Tensor], grads: Sequence[Tensor | None], data: int | None
) -> list[Use | None]:
    """Canonical inputs and gradients of the calls that the cotangent reached."""
    found: list[Use | None] = []
    for call, a, g in zip(calls, inputs, grads):
        if g is None:
            found.append(None)
            continue
        rows = call.view.outputs(g if g.dtype == a.dtype else g.to(a.dtype))
        found.append(Use(regroup(a, data), regroup(rows, data)))
    return found
