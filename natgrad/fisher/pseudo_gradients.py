"""Which cotangents to backpropagate for a kind of Fisher matrix, and which rows of a layer belong to which datum.

Every kind is a set of cotangents v on the outputs, F = (1/m) Σ_v Jᵀ v vᵀ J:

- exact      a root of the output Fisher matrix of every loss term;
- sampled    the score of a label drawn from the model for every loss term, independent across terms;
- empirical  the gradient of the observed loss of every datum.

Cotangents of different data may share one backward pass if the data do not mix inside the model: then the rows of each
layer that belong to datum n hold the gradient of datum n alone. `data_axes` tests this, by backpropagating a random
cotangent that is zero outside a random half of the data. Where data mix (graph nets, batch statistics) or sit in
another order, every datum, or for the exact kind every term, gets a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from natgrad._tree import Tensors, describe
from natgrad.capture.views import INNER, data_first
from natgrad.fisher.likelihoods.base import Reading

MAX_PASSES = 10_000  # backward passes an update may take before it is refused

Backward = Callable[[Tensors], list["Tensor | None"]]  # cotangent of the outputs → gradients at the noted calls


def cotangents(
    reading: Reading,
    outputs: Tensors,
    output: object,
    targets: object,
    kind: str,
    samples: int,
    data: int,
    apart: bool,
    generator: torch.Generator,
) -> Iterator[Tensors]:
    """The cotangents, one backward pass each. With `apart`, every pass belongs to one datum (exact: one term).

    Raises:
        ValueError: there would be more than `MAX_PASSES`.
    """
    if kind == "exact":
        yield from exact_cotangents(reading, outputs, targets, data, apart)
        return
    if apart and data * samples > MAX_PASSES:
        raise ValueError(
            f"the data mix inside the model, so each of {data} data needs a backward pass of its own "
            f'(limit {MAX_PASSES}); pass fewer data an update, or use structure="kfac"'
        )
    for _ in range(1 if kind == "empirical" else samples):
        if kind == "empirical":
            v = reading.observed(outputs, output, targets, data)
        else:
            v = reading.draw(outputs, targets, generator)
            v = v if samples == 1 else tuple(t * samples**-0.5 for t in v)
        if not apart:
            yield v
            continue
        for n in range(data):
            keep = torch.zeros(data, dtype=torch.bool, device=v[0].device)
            keep[n] = True
            yield tuple(of_data(t, keep) for t in v)


def exact_cotangents(reading: Reading, outputs: Tensors, targets: object, data: int, apart: bool) -> Iterator[Tensors]:
    roots = reading.roots(outputs, targets)
    passes = sum(r.term_count if apart else -(-r.term_count // data) for r in roots)
    if passes > MAX_PASSES:
        why = (
            "the data mix inside the model, so every loss term needs its own"
            if apart
            else "one for each output of a datum"
        )
        raise ValueError(
            f'kind="exact" would take {passes} backward passes ({why}; limit {MAX_PASSES}); use kind="sampled"'
        )
    for root in roots:
        slots = root.term_count if apart else -(-root.term_count // data)
        for slot in range(slots):
            yield root.pull(outputs, partial(in_slot, slot=slot, slots=slots))


def in_slot(terms: Tensor, slot: int, slots: int) -> Tensor:
    return terms % slots == slot


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
