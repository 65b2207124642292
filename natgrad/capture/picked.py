"""What is picked out of a stack by index: ``torch.bmm(x[:, None], w[ids]) + b[ids][:, None]``, an expert for each row.

Picking matrices is no use of the parameter. The product that follows is: each row of its input goes through the matrix
of one group, ``routes``, as rows do in `torch.nn.functional.grouped_mm`. Rows of a matrix are picked as offsets or
scales in the same way; where they serve for anything else they are rows of a table. A matrix repeated for each of a
batch is picked out of a stack of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from natgrad.capture.layouts import Dims
from natgrad.capture.ops.base import OpUse, Picked
from natgrad.capture.parameters import ParameterSlice, behind_views, box_of, same_storage, weight_slice
from natgrad.capture.views import DimsView, LinearForm


def node_behind(t: Tensor) -> Any:
    """The autograd node that made what `t` is a view or a cast of."""
    return None if t.grad_fn is None else behind_views(t.grad_fn)[0]


def picked_slice(
    parsed: OpUse, picked: Picked, names: Mapping[int, str]
) -> tuple[ParameterSlice, LinearForm, Tensor] | None:
    """The piece that was picked from, the view of the call with a route for each row, and its input.

    The input gets a dimension for every one of the index that it lacks.
    """
    w, view = parsed.weight, parsed.view
    assert w is not None
    if not isinstance(view, DimsView) or not isinstance(view.layout, Dims):
        return None
    if picked.source.dim() == 2 and not view.layout.elementwise:
        return None
    made = picked.made
    assert made is not None
    whole = made if same_storage(w, made) else w if w._base is None else w._base  # the last two: of a cast
    shape = (*picked.index.shape, *picked.source.shape[1:])
    if tuple(whole.shape) != shape:
        return None
    box = box_of(w, whole)
    if box is None or box.lengths != shape:
        return None
    layout, count = view.layout, picked.index.dim()
    place = {i: d for d, i in enumerate(box.dims) if i is not None}  # dimensions of w → of what was picked
    x, routes = parsed.x.detach(), picked.index
    along: list[tuple[int, int]] = []  # for each dimension of the index that of the input and that of the output
    group = list(zip((i for i in layout.group if w.shape[i] > 1), view.group, view.out_group))
    out = list(zip(layout.out, view.out))
    for d in range(count):
        if shape[d] == 1:
            continue
        grouped = [(i, here, there) for i, here, there in group if place.get(i) == d]
        outs = [(i, there) for i, there in out if place.get(i) == d]
        if grouped:
            along.append(grouped[0][1:])
            group.remove(grouped[0])
        elif outs:  # every picked matrix takes the same input
            x = x.unsqueeze(-1).expand(*x.shape, shape[d])
            along.append((x.dim() - 1, outs[0][1]))
            out.remove(outs[0])
        else:
            return None

    def moved(dims: Any) -> tuple[int, ...]:
        return tuple(place[i] - count + 1 for i in dims if i in place and place[i] >= count)

    alone = [i for i in layout.group if w.shape[i] == 1]
    positions = (*(here for here, _ in along), *view.positions)
    sizes = [x.shape[d] for d in positions]
    routes = routes.reshape([*sizes[: len(along)], *[1] * len(view.positions)]).expand(sizes)
    routed = dataclasses.replace(
        view,
        layout=Dims(
            tuple(picked.source.shape),
            (0, *moved(i for i, _, _ in group), *moved(alone)),
            moved(i for i, _ in out),
            moved(layout.into),
        ),
        positions=positions,
        group=tuple(here for _, here, _ in group),
        out_positions=(*(there for _, there in along), *view.out_positions),
        out_group=tuple(there for _, _, there in group),
        out=tuple(there for _, there in out),
        routes=routes % len(picked.source) if len(picked.source) > 1 else None,
    )
    held = weight_slice(picked.source, routed, names)
    return None if held is None or held[1].region is not None else (*held, x)
