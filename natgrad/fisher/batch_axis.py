"""Which rows of a layer belong to which datum.

Cotangents of different data may share one backward pass if the data do not mix inside the model: then the rows of each
layer that belong to datum n hold the gradient of datum n alone. `data_axes` tests this, by backpropagating a random
cotangent that is zero outside a random half of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from natgrad._tree import Tensors, describe
from natgrad.capture.views import INNER, data_first

Backward = Callable[[Tensors], list["Tensor | None"]]  # cotangent of the outputs → gradients at the noted calls


def of_data(t: Tensor, keep: Tensor) -> Tensor:
    """`t` with the entries of the data where `keep` (data,) is false set to zero.

    Raises:
        ValueError: the first dimension of `t` is not a multiple of the number of data.
    """
    if t.dim() == 0 or t.shape[0] % len(keep):
        raise ValueError(f"{describe(t)} has no dimension of {len(keep)} data in front")
    return (t.reshape(len(keep), -1) * keep.to(t)[:, None]).reshape(t.shape)


def count_data(outputs: Tensors, from_inputs: int | None) -> int:
    """The number of data: the first dimension of the input where it divides that of every output, else the outputs'."""
    rows = [o.shape[0] for o in outputs if o.dim()] or [1]
    if from_inputs and all(r % from_inputs == 0 for r in rows):
        return from_inputs
    return min(rows)


def data_axes(outputs: Tensors, backward: Backward, views: Sequence[Leading], data: int) -> list[int] | None:
    """For each call, which leading dimension of its rows counts data; None if the data mix inside the model.

    A random cotangent that is zero outside a random half of the data is backpropagated: where the gradient at a call
    stays with that half along a dimension, that dimension counts data.
    """
    if data == 1:
        return [0] * len(views)
    choices = [axes_that_fit(sizes, data) for sizes, _ in views]
    if not all(choices):
        return None
    if any(o.dim() == 0 or o.shape[0] % data for o in outputs):
        return None
    generator = torch.Generator().manual_seed(data)
    keep = torch.rand(data, generator=generator) < 0.5
    keep[int(torch.randint(data, (1,), generator=generator))] = True
    if bool(keep.all()):
        keep[0] = False
    keep = keep.to(outputs[0].device)
    probe = tuple(of_data(torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o), keep) for o in outputs)
    axes = []
    for g, candidates, (_, rows) in zip(backward(probe), choices, views):
        if g is not None:
            size = rows(g).abs()
            candidates = [i for i in candidates if stays(data_first(size, i, data), keep)]
        if not candidates:
            return None
        axes.append(candidates[0])
    return axes


Leading = tuple[tuple[int, ...], Callable[[Tensor], Tensor]]  # sizes of the leading dimensions; gradient → rows


def axes_that_fit(sizes: tuple[int, ...], data: int) -> list[int]:
    """Leading dimensions that may count data by their size: the first may hold several rows a datum."""
    several = bool(sizes) and sizes[0] > data and sizes[0] % data == 0
    exact = [i for i, n in enumerate(sizes) if n == data]
    return [*([0] if several else []), *exact, *([INNER] if several else [])]


def stays(size: Tensor, keep: Tensor) -> bool:
    """Whether |gradient| vanishes for the data that `keep` leaves out."""
    by_datum = size.reshape(len(keep), -1).amax(1)
    leak = torch.where(keep, torch.zeros_like(by_datum), by_datum).max()
    return float(leak) <= 100 * torch.finfo(size.dtype).eps * float(by_datum.max())
