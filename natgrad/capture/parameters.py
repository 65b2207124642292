"""Which parameter, or which piece of one, a tensor is: itself, a cast, a slice, a transpose, or a reshaped region."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.layouts import Dims, element_layout
from natgrad.capture.views import DimsView, IndexView, LinearForm

# graph nodes that hand a parameter on unchanged: a weight behind them is still that parameter, or a view of it
CASTS = {"Alias", "ToCopy", "ToDtype", "To"}
VIEWS = {
    "AsStrided",
    "Chunk",
    "Permute",
    "ReshapeAlias",
    "Select",
    "Slice",
    "Split",
    "SplitWithSizes",
    "Squeeze",
    "T",
    "Transpose",
    "Unbind",
    "Unsqueeze",
    "UnsafeView",
    "View",
}


@dataclass(frozen=True)
class ParameterSlice:
    """A parameter, or a slice ``[start:stop]`` of its first dimension (packed projections)."""

    name: str
    rows: tuple[int, int] | None = None

    def of(self, tensors: Mapping[str, Tensor], batch_dims: int = 0) -> Tensor:
        t = tensors[self.name]
        return t if self.rows is None else t.narrow(batch_dims, self.rows[0], self.rows[1] - self.rows[0])

    def __str__(self) -> str:
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


def leaf_behind(w: Tensor) -> tuple[Tensor | None, bool]:
    """The leaf that `w` is a view or a cast of, and whether there are views on the way."""
    node, viewed = w.grad_fn, False
    if node is None:
        return w, False
    while not hasattr(node, "variable"):
        kind = re.sub(r"Backward\d*$", "", node.name())
        parents = [n for n, _ in node.next_functions if n is not None]
        if len(parents) != 1 or not (kind in CASTS or kind in VIEWS):
            return None, False
        viewed = viewed or kind in VIEWS
        node = parents[0]
    return node.variable, viewed


def find(w: Any, names: Mapping[int, str]) -> tuple[str, Tensor, bool] | None:
    """(name, parameter, viewed) of the parameter of interest behind a tensor."""
    if not isinstance(w, Tensor):
        return None
    if not w.requires_grad:  # frozen after the metric was made: its layer keeps its shape
        return (names[id(w)], w, False) if id(w) in names else None
    p, viewed = leaf_behind(w)
    name = None if p is None else names.get(id(p))
    return None if p is None or name is None else (name, p, viewed)


def slice_of(w: Any, names: Mapping[int, str]) -> ParameterSlice | None:
    """The piece that `w` is, in the order of the parameter's own dimensions."""
    found = find(w, names)
    if found is None:
        return None
    name, p, viewed = found
    if w is p or (w.shape == p.shape and (same_place(w, p) or not viewed)):
        return ParameterSlice(name)
    row = p[0].numel() if p.dim() and p.shape[0] else 0
    if row and same_storage(w, p) and w.shape[1:] == p.shape[1:] and w.stride() == p.stride():
        start, odd = divmod(int(w.storage_offset() - p.storage_offset()), row)
        return None if odd else ParameterSlice(name, (start, start + w.shape[0]))
    return None


def weight_slice(w: Any, view: LinearForm, names: Mapping[int, str]) -> tuple[ParameterSlice, LinearForm] | None:
    """The piece that a weight is, and the view of the call in the layout of that piece."""
    found = find(w, names)
    if found is None:
        return None
    name, p, _ = found
    layout = view.layout
    if isinstance(view, DimsView) and isinstance(layout, Dims) and not layout.out and not layout.into:
        return element_piece(w, name, p, view)
    if (piece := slice_of(w, names)) is not None:
        return piece, view
    if w.dim() == 2 and isinstance(layout, Dims) and isinstance(view, (DimsView, IndexView)):
        if (piece := slice_of(w.T, names)) is None:
            return None

        def swap(dims: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(1 - d for d in dims)

        swapped = Dims(layout.shape[::-1], swap(layout.group), swap(layout.out), swap(layout.into))
        return piece, dataclasses.replace(view, layout=swapped)
    return None


def element_piece(w: Tensor, name: str, p: Tensor, view: DimsView) -> tuple[ParameterSlice, LinearForm] | None:
    """A scale or offset may be any contiguous region of a parameter, reshaped: the call uses those elements."""
    layout = element_layout(tuple(p.shape))
    if w is p or (w.shape == p.shape and not same_storage(w, p)):
        return ParameterSlice(name), dataclasses.replace(view, layout=layout)
    if not (same_storage(w, p) and w.is_contiguous() and p.is_contiguous()):
        return None
    start = int(w.storage_offset() - p.storage_offset())
    region = None if w.numel() == p.numel() else (start, start + w.numel())
    return ParameterSlice(name), dataclasses.replace(view, layout=layout, region=region)


def overlap(a: ParameterSlice, b: ParameterSlice) -> bool:
    if a.rows is None or b.rows is None:
        return True
    return a.rows[0] < b.rows[1] and b.rows[0] < a.rows[1]


def same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def same_place(a: Tensor, b: Tensor) -> bool:
    return same_storage(a, b) and a.storage_offset() == b.storage_offset() and a.stride() == b.stride()


def is_parameter_like(w: Any, names: Mapping[int, str]) -> bool:
    return isinstance(w, Tensor) and w.requires_grad and torch.is_grad_enabled() and find(w, names) is not None
