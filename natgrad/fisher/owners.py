"""Which rows of a layer belong to which datum.

Cotangents of different data may share one backward pass if every row of every layer depends on one datum alone. Its
gradient then belongs to that datum. The rows are asked: a random cotangent v is backpropagated, then once for each
digit of the number of a datum, with v of datum n multiplied by cₖ where that digit of n is k:

    g = Jᵀ v,    g′ = Jᵀ (c ∘ v),    c ∈ {0, 1, 2, 4, … 64}.

A row of datum n has g′ = c g; the factors are powers of two, so that this holds to the last bit. A row where it holds
for no c depends on several data. N data take 1 + ⌈log₈ N⌉ backward passes. Nothing is kept for the next batch: which
rows are whose may change with the data (graphs, routing) and with the parameters (a gate that was zero).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, prod

import torch
from torch import Tensor

from natgrad.capture.rows import row_table
from natgrad.capture.views import INNER, Place, data_first
from natgrad.linalg.tree import Tensors, describe

Backward = Callable[[Tensors], list["Tensor | None"]]  # cotangent of the outputs → gradients at the noted calls
Leading = tuple[tuple[int, ...], Callable[[Tensor], Tensor]]  # sizes of the leading dimensions; gradient → rows

BASE = 8  # of the digits: more would take fewer passes, but the largest factor, 2**(BASE - 2), hides small leaks
UNSHOWN = (2**31, 0)  # after every call that may show the data
SILENT, MIXED = -1, -2  # in place of a datum: no gradient reaches the row; it depends on several data


@dataclass(frozen=True)
class Data:
    """How the data of a batch lie along the first dimension of its outputs."""

    count: int
    inner: bool = False  # rows in the order (positions, data), not (data, positions)
    shape: tuple[int, ...] = ()  # first dimensions of the input whose last counts data; none where rows are data

    def of_rows(self, rows: int) -> Tensor:
        """Return the number of the datum of each row, (rows,)."""
        n = torch.arange(rows)
        return n % self.count if self.inner else n // max(1, rows // self.count)

    def scaled(self, t: Tensor, factors: Tensor) -> Tensor:
        """Return `t` with the rows of datum n multiplied by factors[n].

        Raises:
            ValueError: the first dimension of `t` is not a multiple of the number of data.
        """
        if self.count == 1:
            return t * factors.to(t).reshape(())
        if t.dim() == 0 or t.shape[0] % self.count:
            raise ValueError(f"{describe(t)} has no dimension of {self.count} data in front")
        factors = factors.to(t)[self.of_rows(t.shape[0]).to(t.device)]
        return t * factors.reshape(-1, *[1] * (t.dim() - 1))

    def only(self, t: Tensor, n: int) -> Tensor:
        """Return `t` with the rows of all data but n set to zero."""
        one = torch.zeros(self.count)
        one[n] = 1
        return self.scaled(t, one)

    def slots(self, terms: Tensor, count: int, rows: int) -> Tensor:
        """Return numbers of loss terms within their datum. `terms`: numbers of terms, of `count` in `rows` rows."""
        if not self.inner:
            return terms % max(1, -(-count // self.count))
        in_row = count // rows
        return terms // in_row // self.count * in_row + terms % in_row


def likely_data(outputs: Tensors, passes: Sequence[Sequence[tuple[int, ...]]]) -> list[Data]:
    """Return how the data may lie, most likely first.

    Data are the first dimension of the input, or the second where time is first. The outputs may have flattened either
    with positions. Where the first dimension does not divide the rows of the outputs, each row may be a datum.

    Args:
        outputs: what the loss takes.
        passes: of each forward pass, the dimensions of the tensors it received that may count data or positions.
    """
    rows = gcd(*(o.shape[0] for o in outputs if o.dim()))
    given = [[s for s in shapes if s] for shapes in passes]
    first = [s[0] for shapes in given for s in shapes]
    if (first and max(first) == 1) or rows <= 1:
        return [Data(1)]  # a batch of one
    leading = [shapes[0][0] for shapes in given if shapes] or [0]
    if rows in (sum(leading), *first, *(s[1] for shapes in given for s in shapes if len(s) > 1)):
        several = any(o.dim() and o.shape[0] > rows for o in outputs)  # of heads: some have flattened positions
        return [Data(rows, inner, (rows,)) for inner in (False, True)] if several else [Data(rows)]
    # of further inputs only those that the rows are the data and positions of, or all positions but one, as of text
    inputs = [s for shapes in given for s in shapes[1:] if len(s) > 1 and rows in (s[0] * s[1], s[0] * (s[1] - 1))]
    inputs = [*(shapes[0] for shapes in given if shapes), *inputs]
    prefixes = dict.fromkeys([*(s[:1] for s in inputs), *(s[:2] for s in inputs if len(s) > 1)])
    flattened = [
        Data(before[-1], inner, before)
        for before in prefixes
        if 1 < before[-1] < rows and rows % before[-1] == 0
        for inner in (False, True)
    ]
    return flattened if any(d.count == leading[0] for d in flattened) else [*flattened, Data(rows)]


def whose(
    outputs: Tensors,
    backward: Backward,
    views: Sequence[Leading],
    likely: Sequence[Data],
    most: int,
    by_size: bool,
    ends: tuple[Backward, Sequence[Leading]] | None,
) -> tuple[Data, list[Place] | None]:
    """Return how the data lie in the outputs, and where those of each call are; None there if the data mix.

    Args:
        outputs: what the loss takes, detached.
        backward: from a cotangent of the outputs to gradients at the calls.
        views: of the calls.
        likely: from `likely_data`.
        most: the most data that a rank has, where all ranks make every backward pass together.
        by_size: data that mix are told by the only dimension of their number.
        ends: what the forward pass returned, as calls; given where data are to be told from positions, and not only
            apart.

    Raises:
        ValueError: `ends` is given, and nothing tells data from positions.
    """
    tried: list[tuple[tuple[int, int], Data, list[Place] | None]] = []
    for data in likely:
        if data.count == 1:
            return data, [0] * len(views)
        found = owners(outputs, backward, views, data, most)
        where = places(found, views, data)
        if where is None and by_size:
            fits = [axes_that_fit(sizes, data.count) for sizes, _ in views]
            where = [f[0] for f in fits] if all(len(f) == 1 for f in fits) else None
        nearest = shown(found, views, data)
        if len(likely) == 1 or nearest == (0, 0):
            return data, where
        tried.append((nearest, data, where))
    rows = outputs[0].shape[0]
    nearest, data, where = min(tried, key=lambda t: t[0])
    if nearest != UNSHOWN and nearest[1] == 1:  # time comes first only if it mixes: else the first dimension is data
        own = owners(outputs, backward, views, Data(rows), most)[nearest[0]]
        nearest = nearest if own is not None and bool((own == MIXED).any()) else UNSHOWN
    if nearest != UNSHOWN:
        return data, where
    if ends is None:
        return min(tried, key=lambda t: t[2] is None)[1:]
    for _, data, where in tried:
        nearest = shown(owners(outputs, ends[0], ends[1], data, most), ends[1], data)
        if nearest != UNSHOWN and nearest[1] == 0:
            return data, where
    count = likely[0].count
    raise ValueError(
        f"kind='empirical' takes one outer product a datum, but {rows} rows of the output may be {count} data of "
        f"{rows // count} positions or {rows} data, and no layer tells which. Give the criterion outputs with the data "
        "alone in front, for nn.CrossEntropyLoss (data, classes, positions), or take kind='sampled' or 'exact'"
    )


def owners(
    outputs: Tensors, backward: Backward, views: Sequence[Leading], data: Data, most: int
) -> list[Tensor | None]:
    """Return for each call the datum of each of its rows, or `SILENT` or `MIXED`; None where no gradient comes.

    Args:
        outputs: what the loss takes, detached.
        backward: from a cotangent of the outputs to gradients at the calls.
        views: of the calls.
        data: how the data lie in the outputs.
        most: the most data that a rank has, where all ranks make every backward pass together.
    """
    generator = torch.Generator().manual_seed(data.count)
    probe = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    whole = [rows_of(g, view) for g, view in zip(backward(tuple(probe)), views)]
    found = [None if g is None else torch.zeros(len(g), dtype=torch.long, device=g.device) for g in whole]
    factors = torch.tensor([0.0, *(2.0**k for k in range(BASE - 1))])
    place = 1
    while place < max(data.count, most, 2):
        digits = torch.arange(data.count) // place % BASE
        scaled = backward(tuple(data.scaled(t, factors[digits]) for t in probe))
        for i, (g, view) in enumerate(zip(scaled, views)):
            before, known = whole[i], found[i]
            if before is not None and known is not None:
                read = digits_read(before, rows_of(g, view), factors.to(before))
                found[i] = torch.where((known < 0) | (read < 0), torch.minimum(known, read), known + place * read)
        place *= BASE
    return [None if own is None else own.where(own < data.count, own.new_tensor(MIXED)) for own in found]


def rows_of(g: Tensor | None, view: Leading) -> Tensor | None:
    """Return the gradient of a call as one row for each place in its leading dimensions, in float32 or float64."""
    if g is None:
        return None
    sizes, rows = view
    g = g if g.dtype == torch.float64 else g.float()
    return rows(g).reshape(prod(sizes), -1)


def digits_read(g: Tensor, scaled: Tensor | None, factors: Tensor) -> Tensor:
    """Return for each row which of the factors `scaled` is of `g`, or `SILENT` or `MIXED`."""
    if g.numel() == 0:
        return g.new_full((len(g),), SILENT, dtype=torch.long)
    scaled = torch.zeros_like(g) if scaled is None else scaled
    size, most = g.abs().amax(1), scaled.abs().amax(1)
    at = g.abs().argmax(1, keepdim=True)
    ratio = (scaled.gather(1, at) / g.gather(1, at)).squeeze(1).nan_to_num(0, 0, 0)
    digit = (ratio.clamp(min=0.25).log2().round() + 1).clamp(0, len(factors) - 1).long()
    factor = factors[digit]
    eps = torch.finfo(g.dtype).eps
    off = (scaled - factor[:, None] * g).abs().amax(1)
    # equal to the last bit where sums are taken in the same order; some bits are left to devices where they are not
    digit = digit.where(off <= 8 * eps * factor.clamp(min=1) * size, digit.new_tensor(MIXED))
    # what is lost beside the other rows of the call says nothing of anyone
    nothing = (most == 0) & (size == 0) | (digit == MIXED) & (
        torch.maximum(size, most / factors[-1]) <= eps * size.max()
    )
    return digit.where(~nothing, digit.new_tensor(SILENT))


def places(found: Sequence[Tensor | None], views: Sequence[Leading], data: Data) -> list[Place] | None:
    """Return for each call where its data are: a dimension, or row numbers of each datum; None if rows are mixed."""
    if any(own is not None and bool((own == MIXED).any()) for own in found):
        return None
    return [0 if own is None else place_of(own, sizes, data.count) for own, (sizes, _) in zip(found, views)]


def place_of(own: Tensor, sizes: tuple[int, ...], data: int) -> Place:
    """Return a dimension along which every row that is heard lies at its datum, else the row numbers of each datum."""
    return next(
        (axis for axis in axes_that_fit(sizes, data) if lies_along(own, sizes, axis, data)), row_table(own, data)
    )


def axes_that_fit(sizes: tuple[int, ...], data: int) -> list[int]:
    """Leading dimensions that may count data by their size: the first may hold several rows a datum."""
    several = bool(sizes) and sizes[0] > data and sizes[0] % data == 0
    exact = [i for i, n in enumerate(sizes) if n == data]
    return [*([0] if several else []), *exact, *([INNER] if several else [])]


def lies_along(own: Tensor, sizes: tuple[int, ...], axis: int, data: int) -> bool:
    ordered = data_first(own.reshape(sizes), axis, data).reshape(data, -1)
    numbers = torch.arange(data, device=own.device)[:, None]
    return bool(((ordered == numbers) | (ordered == SILENT)).all())


def shown(found: Sequence[Tensor | None], views: Sequence[Leading], data: Data) -> tuple[int, int]:
    """Return the first call that shows the data of an input, and which of its dimensions: (call, dimension).

    Its dimensions begin as those of the input, and each entry along the last of these belongs to one datum. That tells
    data from positions, as both may divide the rows of the outputs. `UNSHOWN` where there is none before data mix.
    """
    axis = len(data.shape) - 1
    for i, (own, (sizes, _)) in enumerate(zip(found, views)):
        if own is None or bool((own == SILENT).all()):
            continue
        if axis < 0 or bool((own == MIXED).any()):
            return UNSHOWN
        if sizes[: axis + 1] == data.shape:
            entries = own.reshape(sizes).movedim(axis, 0).reshape(data.count, -1)
            whose = entries.amax(1)  # silent rows are negative
            same = (entries == whose[:, None]) | (entries == SILENT)
            return (i, axis) if bool(same.all()) and len(whose.unique()) == data.count else UNSHOWN
    return UNSHOWN
