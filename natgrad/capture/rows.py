"""Rows of a layer's inputs and gradients, (data, positions, groups, d): as tensors, or as indices of one-hot rows.

The input of an embedding is a one-hot row for each token. Kept as an index its second moment is a diagonal of counts,
and per-datum gradients are index sums; a row of the size of the vocabulary is never formed unless a full factor is
asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.linalg.block_diagonal import is_whole, pieces_of, side_of, spans


@dataclass
class OneHot:
    """Rows Σ_b scale[…, b] · e_{index[…, b]} of one group; scale 0 where there is no entry (padding)."""

    index: Tensor  # (data, positions, bag)
    scale: Tensor  # (data, positions, bag)
    size: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.index.shape[:2], 1, self.size))

    def alive(self) -> Tensor:
        """Rows with any entry, (data, positions)."""
        return (self.scale != 0).any(-1)

    def dense(self) -> Tensor:
        rows = self.scale.new_zeros(*self.index.shape[:2], self.size)
        return rows.scatter_add(-1, self.index, self.scale).unsqueeze(2)

    def narrow(self, start: int, length: int) -> OneHot:
        return OneHot(self.index.narrow(0, start, length), self.scale.narrow(0, start, length), self.size)

    def reshape(self, data: int) -> OneHot:
        bag = self.index.shape[-1]
        return OneHot(self.index.reshape(data, -1, bag), self.scale.reshape(data, -1, bag), self.size)

    def mean_position(self, counts: Tensor | None) -> OneHot:
        """The mean over positions, as one row a datum."""
        n, p, _ = self.index.shape
        scale = self.scale.reshape(n, 1, -1)
        return OneHot(self.index.reshape(n, 1, -1), scale / (p if counts is None else counts[:, None, None]), self.size)


Rows = Tensor | OneHot


def regroup(rows: Rows, data: int | None) -> Rows:
    """(rows, positions, …) → (data, rows/data · positions, …); None leaves the rows as they are."""
    if data is None or rows.shape[0] == data:
        return rows
    return rows.reshape(data) if isinstance(rows, OneHot) else rows.reshape(data, -1, *rows.shape[2:])


def gathered(rows: Rows, table: Tensor) -> Rows:
    """Rows of each datum by their numbers, data and positions counted together: `table` (data, positions), filled up
    with numbers one past the last, which give rows of zeros.
    """
    if isinstance(rows, OneHot):
        return OneHot(at_rows(rows.index, table), at_rows(rows.scale, table), rows.size)
    return at_rows(rows, table)


def at_rows(t: Tensor, table: Tensor) -> Tensor:
    t = t.flatten(0, 1)
    return torch.cat([t, t.new_zeros(1, *t.shape[1:])])[table]


def mean_position(rows: Rows, counts: Tensor | None = None) -> Rows:
    """The mean over the positions of a datum. `counts` (data,): how many it has, where zeros fill up the rest."""
    if isinstance(rows, OneHot):
        return rows.mean_position(counts)
    return rows.mean(1, keepdim=True) if counts is None else rows.sum(1, keepdim=True) / counts[:, None, None, None]


def summed_positions(rows: Rows) -> Rows:
    """The sum over the positions of a datum."""
    return rows.sum(1, keepdim=True) if isinstance(rows, Tensor) else rows.dense().sum(1, keepdim=True)


def narrow(rows: Rows, start: int, length: int) -> Rows:
    """The rows of a range of data."""
    return rows.narrow(start, length) if isinstance(rows, OneHot) else rows.narrow(0, start, length)


def count(rows: Rows) -> Tensor:
    """How many rows there are, a scalar tensor."""
    if isinstance(rows, OneHot):
        return rows.alive().sum().to(rows.scale)
    return rows.new_tensor(float(rows.shape[0] * rows.shape[1]))


def second_moment(rows: Rows, kept: int) -> Tensor:
    """Σ r rᵀ as a side in pieces of `kept` rows, (groups, kept, d): d for all of it, 1 for its diagonal."""
    if isinstance(rows, OneHot):
        if kept == 1 and rows.index.shape[-1] == 1:
            counts = rows.scale.new_zeros(rows.size)
            return counts.index_add(0, rows.index.flatten(), rows.scale.flatten().square())[None, None]
        rows = rows.dense()
    if kept == 1:
        return rows.square().sum((0, 1)).unsqueeze(1)
    if kept == rows.shape[3]:
        return gram(rows)
    return side_of([gram(rows[..., start:stop]) for start, stop in spans(kept, rows.shape[3])])


def gram(rows: Tensor) -> Tensor:
    """Σ r rᵀ, (groups, d, d)"""
    if rows.shape[2] == 1:  # gemm is faster than a batch of one
        flat = rows.reshape(-1, rows.shape[3])
        return (flat.mT @ flat)[None]
    stacked = rows.permute(2, 0, 1, 3).reshape(rows.shape[2], -1, rows.shape[3])
    return stacked.mT @ stacked


def outer(left: Rows, right: Rows) -> Tensor:
    """Σ_p left_p right_pᵀ of each datum, (data, groups, d_left, d_right)."""
    if isinstance(right, OneHot):
        return scatter_outer(left.dense() if isinstance(left, OneHot) else left, right).mT
    if isinstance(left, OneHot):
        return scatter_outer(right, left)
    if right.shape[1] == 1:
        return left[:, 0, :, :, None] * right[:, 0, :, None, :]
    return torch.einsum("npgo,npgi->ngoi", left, right)


def squared(rows: Rows) -> Rows:
    """Rows entry by entry squared."""
    if isinstance(rows, OneHot):
        single = rows.index.shape[-1] == 1
        return OneHot(rows.index, rows.scale.square(), rows.size) if single else rows.dense().square()
    return rows.square()


def outer_sum(left: Rows, right: Rows) -> Tensor:
    """Σ left rightᵀ over all rows, (groups, d_left, d_right)."""
    if isinstance(right, OneHot):
        return outer_sum(right, left.dense() if isinstance(left, OneHot) else left).mT
    if isinstance(left, OneHot):
        rows = (right.squeeze(2).unsqueeze(2) * left.scale[..., None]).flatten(0, 2)
        return rows.new_zeros(left.size, rows.shape[-1]).index_add(0, left.index.flatten(), rows)[None]
    return torch.einsum("npgo,npgi->goi", left, right)


def scatter_outer(dense: Tensor, hot: OneHot) -> Tensor:
    """Σ_p hot_p dense_pᵀ of each datum, (data, 1, size, d)."""
    n = hot.index.shape[0]
    d = dense.shape[-1]
    rows = (dense.unsqueeze(2) * hot.scale[..., None, None]).reshape(-1, d)  # (data · positions · bag, d)
    start = torch.arange(n, device=hot.index.device)[:, None, None] * hot.size
    out = rows.new_zeros(n * hot.size, d).index_add(0, (hot.index + start).flatten(), rows)
    return out.reshape(n, 1, hot.size, d)


def project(rows: Rows, basis: Tensor | None) -> Rows:
    """Rows in another basis: r ↦ Qᵀ r, Q kept in pieces as the side that it is of; None is the identity."""
    if basis is None:
        return rows
    if isinstance(rows, OneHot):
        if is_whole(basis):
            return (basis[0][rows.index] * rows.scale[..., None]).sum(2).unsqueeze(2)
        rows = rows.dense()
    parts = zip(pieces_of(basis), spans(*basis.shape[-2:]))
    turned = [torch.einsum("npgd,gde->npge", rows[..., start:stop], q) for q, (start, stop) in parts]
    return turned[0] if len(turned) == 1 else torch.cat(turned, dim=-1)


def with_columns(rows: Rows, values: Sequence[float]) -> Rows:
    """Rows with one more entry for each value."""
    if not values:
        return rows
    if isinstance(rows, OneHot):
        rows = rows.dense()
    extra = rows.new_tensor(list(values)).expand(*rows.shape[:-1], len(values))
    return torch.cat([rows, extra], dim=-1)


def of_data(rows: Rows, chosen: Tensor) -> Rows:
    """The rows of these data."""
    if isinstance(rows, OneHot):
        return OneHot(rows.index[chosen], rows.scale[chosen], rows.size)
    return rows[chosen]


def thinned(rows: Rows, keep: Tensor) -> Rows:
    """The rows of these numbers, data and positions counted together, as data of one position."""
    if isinstance(rows, OneHot):
        bag = rows.index.shape[-1]
        return OneHot(rows.index.reshape(-1, 1, bag)[keep], rows.scale.reshape(-1, 1, bag)[keep], rows.size)
    return rows.reshape(-1, 1, *rows.shape[2:])[keep]


def row_table(own: Tensor, data: int) -> Tensor:
    """Return the row numbers of each datum, (data, most rows of one), filled up with the number of all rows.

    `own` (rows,): the datum of each; negative for rows of none.
    """
    heard = (own >= 0).nonzero().squeeze(1)
    whose, order = own[heard].sort(stable=True)
    counts = whose.bincount(minlength=data)
    column = torch.arange(len(whose), device=own.device) - (counts.cumsum(0) - counts)[whose]
    found = own.new_full((data, int(counts.max())), len(own))
    found[whose, column] = heard[order]
    return found


def with_positions(table: Tensor, rows: int, positions: int) -> Tensor:
    """Row numbers of each datum where each of `rows` rows is as many of `positions`: patches of a convolution."""
    each = positions // max(1, rows)
    if each <= 1:
        return table
    numbers = table[..., None] * each + torch.arange(each, device=table.device)
    return numbers.clamp(max=positions).flatten(1)
