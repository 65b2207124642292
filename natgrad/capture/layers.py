"""From noted calls to layers, and to the rows their blocks read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.layouts import Layout
from natgrad.capture.parameters import ParameterSlice, overlap
from natgrad.capture.rows import (
    OneHot,
    Rows,
    gathered,
    mean_position,
    narrow,
    outer,
    outer_sum,
    project,
    regroup,
    row_table,
    squared,
    summed_positions,
    with_columns,
    with_positions,
)
from natgrad.capture.tape import CaptureError, LayerCall
from natgrad.capture.views import GradientView, IndexView, Place, canonical, made_dense, owners_at

Turn = tuple["Tensor | None", "Tensor | None"]


@dataclass
class Layer:
    """A weight and its biases, or one of them, as a stack of matrices (groups, d_out, d_in), a column a bias."""

    op: str
    layout: Layout
    weight: ParameterSlice | None
    biases: list[ParameterSlice]
    shapes: Mapping[str, torch.Size]
    one_hot: bool = False  # every input row is a unit vector
    swapped: bool = False  # there are calls in the transposed layout too
    fan_in: int = 1  # inputs that are not zero at once

    @property
    def pieces(self) -> list[ParameterSlice]:
        return [p for p in (self.weight, *self.biases) if p is not None]

    @property
    def names(self) -> set[str]:
        return {p.name for p in self.pieces}

    @property
    def key(self) -> ParameterSlice:
        return self.pieces[0]

    @property
    def matrix_shape(self) -> torch.Size:
        """(groups, d_out, d_in)"""
        first = self._slice(self.key, {n: torch.empty(self.shapes[n], device="meta") for n in self.names})
        if self.weight is None:
            return torch.Size((self.layout.groups, first.numel() // self.layout.groups, len(self.biases)))
        groups, out, into = self.layout.matrix(first).shape
        return torch.Size((groups, out, into + len(self.biases)))

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """{name: (…, *shape)} → (…, groups, d_out, d_in)"""
        columns = [self.layout.bias(self._slice(b, tensors), len(self.shapes[b.name])) for b in self.biases]
        if self.weight is not None:
            columns.insert(0, self.layout.matrix(self._slice(self.weight, tensors)))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def unpack(self, m: Tensor, into: Mapping[str, Tensor]) -> None:
        """(…, groups, d_out, d_in) → written into {name: (…, *shape)}"""
        width = m.shape[-1] - len(self.biases)
        if self.weight is not None:
            target = self._slice(self.weight, into)
            target.copy_(self.layout.weight(m[..., :width]).reshape(target.shape))
        for i, b in enumerate(self.biases):
            target = self._slice(b, into)
            target.copy_(m[..., width + i].reshape(target.shape))

    def views(self, m: Tensor) -> dict[str, Tensor]:
        """(…, groups, d_out, d_in) → {name: (…, *shape)} without a copy where the layout allows it."""
        width = m.shape[-1] - len(self.biases)
        out = {} if self.weight is None else {self.weight.name: self.layout.weight(m[..., :width])}
        for i, b in enumerate(self.biases):
            out[b.name] = m[..., width + i].flatten(-2)
        return {n: t.reshape(t.shape[: m.dim() - 3] + self.shapes[n]) for n, t in out.items()}

    def _slice(self, piece: ParameterSlice, tensors: Mapping[str, Tensor]) -> Tensor:
        return piece.of(tensors, tensors[piece.name].dim() - len(self.shapes[piece.name]))


@dataclass
class LayerIO:
    """One call of a layer as rows, with the gradient of one cotangent. The gradient of a datum is Σ_p left_p right_pᵀ.

    ``left`` are the output gradients and ``right`` the inputs; where the call has the transposed layout (`swapped`),
    ``left`` are the inputs and ``right`` the gradients. Inputs are made when they are asked for: unfolded patches are
    large, and most passes of K-FAC need gradients alone.
    """

    gradients: Tensor  # (data, positions, groups, d), or in any order where there is a `table`
    make_inputs: Callable[[Tensor | None], Rows]  # of all data, or of those chosen
    swapped: bool = False
    region: tuple[int, int] | None = None  # groups that the rows are of; None for all
    first: bool = True  # the inputs of this call have not been counted yet
    by_datum: bool = False  # whether `make_inputs` can be asked for some of the data
    table: Tensor | None = None  # row numbers of each datum, as `gathered` takes them
    kept: dict[str, Any] = field(default_factory=dict)  # by passes that have the inputs in common
    _inputs: Rows | None = None

    @property
    def data(self) -> int:
        return len(self.gradients if self.table is None else self.table)

    @property
    def inputs(self) -> Rows:
        """(data, positions, groups, d), bias columns included"""
        if self._inputs is None:
            self._inputs = self.make_inputs(None)
        return self._inputs

    @property
    def left(self) -> Rows:
        return self.inputs if self.swapped else self.gradients

    @property
    def right(self) -> Rows:
        return self.gradients if self.swapped else self.inputs

    def per_example_gradients(self, start: int, length: int, turn: Turn | None = None) -> Tensor:
        """Gradients of a range of data (data, groups of the region, d_out, d_in), in the bases of `turn` if given."""
        if self.table is None:
            left, right = narrow(self.left, start, length), narrow(self.right, start, length)
        else:
            part = self.table[start : start + length]
            left, right = gathered(self.left, part), gathered(self.right, part)
        if turn is not None:
            bases = [q if q is None or self.region is None else q[slice(*self.region)] for q in turn]
            left, right = project(left, bases[0]), project(right, bases[1])
        return outer(left, right)

    @property
    def one_row(self) -> bool:
        """Whether each datum has one row, of all groups."""
        return self.table is None and self.region is None and self.gradients.shape[1] == 1

    def sum_of_squares(self, turn: Turn | None = None) -> Tensor:
        """Σ_n G_n∘G_n (groups, d_out, d_in) of data of one row, G_n = g_n a_nᵀ: that is Σ_n (g_n∘g_n)(a_n∘a_n)ᵀ."""
        left, right = turn or (None, None)
        mine, of_inputs = (right, left) if self.swapped else (left, right)
        gradients, inputs = squared(project(self.gradients, mine)), self._squared_inputs(of_inputs)
        return outer_sum(inputs, gradients) if self.swapped else outer_sum(gradients, inputs)

    def _squared_inputs(self, basis: Tensor | None) -> Rows:
        held = self.kept.get("squared inputs")
        if held is None or held[0] is not basis:
            held = self.kept["squared inputs"] = (basis, squared(project(self.inputs, basis)))
        found: Rows = held[1]
        return found

    def summed_gradients(self) -> Rows:
        """Gradients summed over the positions of each datum, (data, 1, groups, d)."""
        return summed_positions(self.gradients if self.table is None else gathered(self.gradients, self.table))

    def mean_inputs(self) -> Rows:
        """The mean input of each datum that has any, (data, 1, groups, d)."""
        if self.table is None:
            return mean_position(self.inputs)
        counts = (self.table < self.gradients.shape[0] * self.gradients.shape[1]).sum(1)
        return mean_position(gathered(self.inputs, self.table[counts > 0]), counts[counts > 0])


def sum_of_squared_gradients(calls: Sequence[LayerIO], groups: int, most: int, turn: Turn | None = None) -> Tensor:
    """Return Σ_n G_n∘G_n (groups, d_out, d_in), G_n the gradient of datum n summed over positions and calls.

    Args:
        calls: of one layer, at least one.
        groups: of the layer.
        most: data whose gradients are formed at once, where a datum has several rows.
        turn: bases of the gradients' rows and columns.
    """
    if len(calls) == 1 and calls[0].one_row:
        return calls[0].sum_of_squares(turn)
    data = calls[0].data
    starts = range(0, max(1, data), most)
    chunks = [summed_gradients(calls, groups, i, min(most, data - i), turn).square().sum(0) for i in starts]
    return chunks[0] if len(chunks) == 1 else torch.stack(chunks).sum(0)


def summed_gradients(uses: Sequence[LayerIO], groups: int, start: int, length: int, turn: Turn | None = None) -> Tensor:
    """Gradients of a range of data over all calls of a layer, (data, groups, d_out, d_in)."""
    total: Tensor | None = None
    for use in uses:
        part = use.per_example_gradients(start, length, turn)
        if use.region is not None:
            if total is None:
                total = part.new_zeros(length, groups, *part.shape[2:])
            total[:, slice(*use.region)] += part
        else:
            total = part if total is None else total + part
    assert total is not None
    return total


class Layers:
    """The layers found so far: calls that use the same weight, in the same layout or its transpose, share one."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = shapes
        self.found: dict[ParameterSlice, Layer] = {}

    def learn(self, calls: Sequence[LayerCall]) -> tuple[list[Layer], list[LayerCall]]:
        """Layers that these calls are the first to use; and the calls, those apart whose bias no layer can hold.

        Raises:
            CaptureError: a parameter is used in two ways that do not fit one block.
        """
        fresh: dict[ParameterSlice, Layer] = {}
        sorted_calls: list[LayerCall] = []
        for call in calls:
            sorted_calls += self._place(call, fresh)
        self._check_shared_pieces(fresh)
        self.found.update(fresh)
        return list(fresh.values()), sorted_calls

    def _place(self, call: LayerCall, fresh: dict[ParameterSlice, Layer]) -> list[LayerCall]:
        key = key_of(call)
        layer = self.found.get(key) or fresh.get(key)
        layout = call.view.layout
        if layer is None:
            biases = [call.bias] if call.bias is not None and call.weight is None else []
            layer = fresh[key] = Layer(call.op, layout, call.weight, biases, self.shapes, call.view.one_hot)
        same = layer.layout == layout or call.weight is None
        if not same and layer.layout.transposed() != layout:
            raise CaptureError(
                f"parameter {key} is used by {layer.op} and by {call.op}, in two matrix forms that share no block; "
                "leave it out with `params=`"
            )
        layer.one_hot = layer.one_hot and same and call.view.one_hot
        layer.swapped = layer.swapped or not same
        layer.fan_in = max(layer.fan_in, call.view.fan_in or fan_in_of(call, layer))
        if call.bias is None or call.bias in layer.biases:
            return [call]
        if same and key not in self.found:
            layer.biases.append(call.bias)
            return [call]
        # the bias would be a row, or a column that came late: it gets a layer of its own
        return [replace(call, bias=None), *self._place(replace(call, weight=None), fresh)]

    def _check_shared_pieces(self, fresh: Mapping[ParameterSlice, Layer]) -> None:
        owner: dict[str, list[tuple[ParameterSlice, Layer]]] = {}
        for layer in (*self.found.values(), *fresh.values()):
            for piece in layer.pieces:
                for other, held in owner.get(piece.name, []):
                    if held is not layer and overlap(piece, other):
                        raise CaptureError(
                            f"parameter {piece} is shared by the layers of {held.key} and {layer.key}, which "
                            "share no block; leave it out with `params=`"
                        )
                owner.setdefault(piece.name, []).append((piece, layer))

    def of(self, call: LayerCall) -> Layer:
        return self.found[key_of(call)]

    def captured_names(self) -> set[str]:
        return {p.name for layer in self.found.values() for p in layer.pieces}


def key_of(call: LayerCall) -> ParameterSlice:
    key = call.weight or call.bias
    assert key is not None
    return key


def fan_in_of(call: LayerCall, layer: Layer) -> int:
    width = layer.matrix_shape[-1] - len(layer.biases) if call.weight is not None else 1
    return layer.matrix_shape[-2] if layer.layout != call.view.layout and call.weight is not None else width


def uses_of(
    call: LayerCall, layer: Layer, g: Tensor, place: Place, data: int, aligned: int | None, dtype: torch.dtype
) -> list[LayerIO]:
    """Rows of one call. A call whose rows go through one group each counts as one call of every group that is used.

    Args:
        call: the call.
        layer: its layer.
        g: the gradient of its output.
        place: where its data are.
        data: how many there are.
        aligned: regroup rows into so many data; None leaves them as they are.
        dtype: of the rows.
    """
    swapped = call.weight is not None and layer.layout != call.view.layout
    if call.view.routes is not None:
        return routed_uses(call, layer, g, place, data, swapped, aligned, dtype)
    x = call.x[: g.shape[0]] if isinstance(call.view, GradientView) else call.x
    table = place if isinstance(place, Tensor) and aligned is not None else None
    axis, aligned = (0, None) if isinstance(place, Tensor) else (place, aligned)

    def inputs(keep: Tensor | None) -> Rows:
        some = x if keep is None else call.view.take(x, keep)
        a = with_biases(canonical(call.view.input_rows(made_dense(some), dtype), axis, data), call, layer, swapped)
        return a if keep is not None else regroup(a, aligned)

    gradients = regroup(canonical(call.view.gradient_rows(g.to(dtype)), axis, data), aligned)
    if swapped:
        gradients = with_columns(gradients, [0.0] * len(layer.biases))
    assert isinstance(gradients, Tensor)
    if table is not None:
        table = with_positions(table, prod(call.view.leading(x)), gradients.shape[0] * gradients.shape[1])
    use = LayerIO(gradients, inputs, swapped, call.view.region, table=table)
    use.kept = call.kept
    use.by_datum = axis == 0 and gradients.shape[0] == next(iter(call.view.leading(x)), 0)
    if isinstance(call.view, IndexView) and isinstance(use.inputs, OneHot):
        use.gradients = gradients * use.inputs.alive()[..., None, None]  # a padded index passes no gradient on
    return [use]


def with_biases(a: Rows, call: LayerCall, layer: Layer, swapped: bool) -> Rows:
    """Input rows with a 1 for the biases of the call."""
    if layer.weight is None and isinstance(a, Tensor):
        a = a[..., :0]
    return a if swapped else with_columns(a, [float(b == call.bias) for b in layer.biases])


def routed_uses(
    call: LayerCall,
    layer: Layer,
    g: Tensor,
    place: Place,
    data: int,
    swapped: bool,
    aligned: int | None,
    dtype: torch.dtype,
) -> list[LayerIO]:
    """One for each group that rows go to; of a datum several rows may, or none."""
    assert call.view.routes is not None
    routes = call.view.routes.flatten()
    alone = len(call.view.routes) == len(routes)  # whether every entry of the first dimension is one row
    gradients = call.view.gradient_rows(g.to(dtype)).flatten(end_dim=-3)  # (rows, groups of a route, d)
    own = None if aligned in (None, 1) else owners_at(place, call.view.leading(call.x), data).to(routes.device)
    each, found = gradients.shape[1], []
    for k in routes.unique().tolist():
        if k < 0:  # nowhere
            continue
        rows = (routes == k).nonzero().squeeze(1)

        def inputs(keep: Tensor | None, rows: Tensor = rows) -> Rows:
            some = rows if keep is None else rows[keep]
            x = call.view.take(call.x, some) if alone else call.x  # those of other groups are left where they are
            a = call.view.input_rows(made_dense(x), dtype)
            assert isinstance(a, Tensor)
            a = a.flatten(end_dim=-3) if alone else a.flatten(end_dim=-3)[some]
            a = with_biases(a[:, None], call, layer, swapped)
            return a if own is not None else regroup(a, aligned)

        mine: Rows = gradients[rows][:, None]
        mine = mine if own is not None else regroup(mine, aligned)
        if swapped:
            mine = with_columns(mine, [0.0] * len(layer.biases))
        assert isinstance(mine, Tensor)
        table = None if own is None else row_table(own[rows], data)
        region = (k * each, (k + 1) * each)
        found.append(LayerIO(mine, inputs, swapped, region, by_datum=aligned is None or own is not None, table=table))
    return found
