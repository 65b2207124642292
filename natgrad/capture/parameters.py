"""Which parameter, or which piece of one, a tensor is: itself, a cast, a box of it in any order of its dimensions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    """A parameter, or a box of it: (dimension, start, stop) of every dimension that is not taken whole."""

    name: str
    ranges: tuple[tuple[int, int, int], ...] = ()

    def of(self, tensors: Mapping[str, Tensor], batch_dims: int = 0) -> Tensor:
        t = tensors[self.name]
        for d, start, stop in self.ranges:
            t = t.narrow(batch_dims + d, start, stop - start)
        return t

    def __str__(self) -> str:
        spans = {d: f"{start}:{stop}" for d, start, stop in self.ranges}
        shown = ", ".join(spans.get(d, ":") for d in range(max(spans, default=-1) + 1))
        return f"{self.name}[{shown}]" if spans else self.name


def behind_views(node: Any) -> tuple[Any, bool]:
    """The first node behind views and casts, from this one on, and whether there are views on the way."""
    viewed = False
    while not hasattr(node, "variable"):
        kind = re.sub(r"Backward\d*$", "", node.name())
        parents = [n for n, _ in node.next_functions if n is not None]
        if len(parents) != 1 or not (kind in CASTS or kind in VIEWS):
            break
        viewed = viewed or kind in VIEWS
        node = parents[0]
    return node, viewed


def leaf_behind(w: Tensor) -> tuple[Tensor | None, bool]:
    """The leaf that `w` is a view or a cast of, and whether there are views on the way."""
    if w.grad_fn is None:
        return w, False
    node, viewed = behind_views(w.grad_fn)
    return getattr(node, "variable", None), viewed


def find(w: Any, names: Mapping[int, str]) -> tuple[str, Tensor, bool] | None:
    """(name, parameter, viewed) of the parameter of interest behind a tensor."""
    if not isinstance(w, Tensor):
        return None
    if not w.requires_grad:  # frozen after the metric was made: its layer keeps its shape
        return (names[id(w)], w, False) if id(w) in names else None
    p, viewed = leaf_behind(w)
    name = None if p is None else names.get(id(p))
    return None if p is None or name is None else (name, p, viewed)


@dataclass(frozen=True)
class Box:
    """Where a view lies in a tensor: of each of its dimensions where the view starts, how long it is, and which
    dimension of the view runs over it; None where the view stays at one index.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    dims: tuple[int | None, ...]


def box_of(view: Tensor, whole: Tensor) -> Box | None:
    """The box that a view of the same storage is, by offset and strides; None where it is none, as a reshape."""
    left = int(view.storage_offset() - whole.storage_offset())
    if left < 0 or not view.numel():
        return None
    long = [d for d in range(whole.dim()) if whole.shape[d] > 1]
    starts, lengths = [0] * whole.dim(), [1] * whole.dim()
    dims: list[int | None] = [None] * whole.dim()
    strides = whole.stride()
    for d in sorted(long, key=strides.__getitem__, reverse=True):
        starts[d], left = divmod(left, strides[d]) if strides[d] else (0, left)
    ones = [i for i in range(view.dim()) if view.shape[i] == 1]
    for i in range(view.dim()):
        if i in ones:
            continue
        fits = [d for d in long if dims[d] is None and strides[d] == view.stride(i)]
        if not fits:
            return None
        dims[fits[0]], lengths[fits[0]] = i, view.shape[i]
    for d in range(whole.dim()):
        if whole.shape[d] == 1 and ones:
            dims[d] = ones.pop(0)
    if left or any(a + n > size for a, n, size in zip(starts, lengths, whole.shape)):
        return None
    return Box(tuple(starts), tuple(lengths), tuple(dims))


def origin_of(w: Tensor, p: Tensor, viewed: bool) -> Tensor | None:
    """What `w` is a view of: the parameter, or a cast of it; None where a view was cast."""
    if same_storage(w, p):
        return p
    cast = w._base if viewed else w
    return cast if cast is not None and cast.shape == p.shape and not leaf_behind(cast)[1] else None


def box_in(w: Tensor, p: Tensor, viewed: bool) -> Box | None:
    """The box of a parameter that a view or a cast of it is."""
    if (origin := origin_of(w, p, viewed)) is None:
        return None
    if not viewed:
        return Box((0,) * p.dim(), tuple(p.shape), tuple(range(p.dim())))
    return box_of(w, origin)


def slice_of(w: Any, names: Mapping[int, str]) -> ParameterSlice | None:
    """The piece that `w` is, in the order of the parameter's own dimensions."""
    if (found := find(w, names)) is None:
        return None
    name, p, viewed = found
    if (box := box_in(w, p, viewed)) is None:
        return None
    kept = [d for d in range(p.dim()) if box.dims[d] is not None]
    if [box.dims[d] for d in kept] != list(range(w.dim())) or any(
        p.shape[d] > 1 for d in set(range(p.dim())) - {*kept}
    ):
        return None
    return ParameterSlice(name, ranges_of(box, p, kept))


def ranges_of(box: Box, p: Tensor, dims: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Of these dimensions those that are not taken whole."""
    return tuple((d, box.starts[d], box.starts[d] + box.lengths[d]) for d in dims if box.lengths[d] < p.shape[d])


def weight_slice(w: Any, view: LinearForm, names: Mapping[int, str]) -> tuple[ParameterSlice, LinearForm] | None:
    """The piece that a weight is, and the view of the call in the layout of that piece."""
    if (found := find(w, names)) is None:
        return None
    name, p, viewed = found
    layout = view.layout
    if isinstance(view, DimsView) and isinstance(layout, Dims) and not layout.out and not layout.into:
        return element_piece(w, name, p, viewed, view)
    if not isinstance(layout, Dims):
        return None if (piece := slice_of(w, names)) is None else (piece, view)
    box = box_in(w, p, viewed)
    if box is None or not isinstance(view, (DimsView, IndexView)):
        return None
    return boxed(name, p, box, view, layout)


def boxed(name: str, p: Tensor, box: Box, view: DimsView | IndexView, layout: Dims) -> Any:
    """A call whose weight is a box of a parameter, in the layout of the parameter.

    Dimensions of which the box stays at one index count groups, as that of the experts does where one is picked; the
    call uses some of the groups. Outputs and inputs that are left out make a piece with a block of its own.
    """
    place = {i: d for d, i in enumerate(box.dims) if i is not None}

    def moved(dims: Sequence[int]) -> tuple[int, ...]:
        return tuple(place[i] for i in dims if i in place)  # others have size 1

    picked = tuple(d for d, i in enumerate(box.dims) if i is None)
    group, out, into = (*picked, *moved(layout.group)), moved(layout.out), moved(layout.into)
    piece = ParameterSlice(name, ranges_of(box, p, sorted((*out, *into))))
    shape = tuple(box.lengths[d] if d in out or d in into else p.shape[d] for d in range(p.dim()))
    new = Dims(shape, group, out, into)
    region = region_of(box, p, group)
    if isinstance(view, IndexView):
        return None if group else (piece, dataclasses.replace(view, layout=new))
    if region is None or (view.routes is not None and region != (0, new.groups)):
        return None
    used = None if region == (0, new.groups) else region
    return piece, dataclasses.replace(view, layout=new, region=used)


def region_of(box: Box, p: Tensor, group: Sequence[int]) -> tuple[int, int] | None:
    """The groups that a box takes, counted in the order of the dimensions `group`; None if they do not lie together."""
    start, count = 0, 1
    for d in group:
        if count > 1 and box.lengths[d] < p.shape[d]:
            return None
        start, count = start * p.shape[d] + box.starts[d], count * box.lengths[d]
    return start, start + count


def element_piece(
    w: Tensor, name: str, p: Tensor, viewed: bool, view: DimsView
) -> tuple[ParameterSlice, LinearForm] | None:
    """A scale or offset may be any contiguous region of a parameter, reshaped: the call uses those elements."""
    layout = element_layout(tuple(p.shape))
    if not viewed:
        return ParameterSlice(name), dataclasses.replace(view, layout=layout)
    origin = origin_of(w, p, viewed)
    if origin is None or not (w.is_contiguous() and origin.is_contiguous()):
        return None
    start = int(w.storage_offset() - origin.storage_offset())
    region = None if w.numel() == p.numel() else (start, start + w.numel())
    return ParameterSlice(name), dataclasses.replace(view, layout=layout, region=region)


def overlap(a: ParameterSlice, b: ParameterSlice) -> bool:
    theirs = {d: (start, stop) for d, start, stop in b.ranges}
    return all(d not in theirs or (start < theirs[d][1] and theirs[d][0] < stop) for d, start, stop in a.ranges)


def same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
