"""A side of a Kronecker product: a symmetric matrix, or what is kept of it along the diagonal.

A side of length d that is kept in pieces of p rows is the tensor (…, p, d) of their columns, next to each other; the
last piece may be smaller, with zeros below it:

    ⎡A    ⎤
    ⎢  B  ⎥   →   [A B C]
    ⎣    C⎦

With p = d that is the whole matrix, with p = 1 its diagonal. Inverses and eigenvectors of a side have the same form.
Functions take stacks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of_pieces(d: int, longest: int) -> int:
    """p, for the fewest pieces of at most `longest` rows, as even as they come.

    >>> rows_of_pieces(10, 4), rows_of_pieces(9, 8), rows_of_pieces(9, 9)
    (4, 5, 9)
    """
    pieces = max(1, -(-d // longest))
    return max(1, -(-d // pieces))


def spans(p: int, d: int) -> list[tuple[int, int]]:
    """Where each piece starts and stops.

    >>> spans(4, 10)
    [(0, 4), (4, 8), (8, 10)]
    """
    return [(start, min(start + p, d)) for start in range(0, d, p)]


def pieces_of(side: Tensor) -> list[Tensor]:
    """Views (…, w, w)."""
    return [side[..., : stop - start, start:stop] for start, stop in spans(*side.shape[-2:])]


def side_of(pieces: Sequence[Tensor]) -> Tensor:
    """(…, p, d) from pieces (…, w, w), none larger than the first."""
    if len(pieces) == 1:
        return pieces[0]
    p = pieces[0].shape[-2]
    return torch.cat([torch.nn.functional.pad(m, (0, 0, 0, p - m.shape[-2])) for m in pieces], dim=-1)


def is_diagonal(side: Tensor) -> bool:
    return side.shape[-2] == 1


def is_whole(side: Tensor) -> bool:
    return side.shape[-2] == side.shape[-1]


def left_times(side: Tensor, x: Tensor) -> Tensor:
    """M X, x (…, d, n)"""
    if is_diagonal(side):
        return side.mT * x
    if is_whole(side):
        return side @ x
    parts = zip(pieces_of(side), spans(*side.shape[-2:]))
    return torch.cat([m @ x[..., start:stop, :] for m, (start, stop) in parts], dim=-2)


def times(x: Tensor, side: Tensor) -> Tensor:
    """X M, x (…, n, d)"""
    if is_diagonal(side):
        return x * side
    if is_whole(side):
        return x @ side
    parts = zip(pieces_of(side), spans(*side.shape[-2:]))
    return torch.cat([x[..., start:stop] @ m for m, (start, stop) in parts], dim=-1)


def both_times(u: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """U X V, which is (U ⊗ V) vec(X) as a matrix; x (…, groups, d_out, d_in)"""
    return times(left_times(u, x), v)


def transposed(side: Tensor) -> Tensor:
    """Mᵀ, of eigenvectors: a side itself is symmetric."""
    return side if is_diagonal(side) else side_of([m.mT for m in pieces_of(side)])


def across(a: Tensor, b: Tensor) -> Tensor:
    """Aᵀ B of two that are kept in the same pieces."""
    return side_of([m.mT @ n for m, n in zip(pieces_of(a), pieces_of(b))])


def diagonal_of(side: Tensor) -> Tensor:
    """(…, d)"""
    p, d = side.shape[-2:]
    if p == d:
        return side.diagonal(dim1=-2, dim2=-1)
    column = torch.arange(d, device=side.device)
    return side[..., column % p, column]


def trace_of(side: Tensor) -> Tensor:
    """(…,)"""
    return diagonal_of(side).sum(-1)


def dense_of(side: Tensor) -> Tensor:
    """(…, d, d), with zeros where nothing is kept."""
    if is_diagonal(side):
        return torch.diag_embed(diagonal_of(side))
    if is_whole(side):
        return side
    p, d = side.shape[-2:]
    out = side.new_zeros(*side.shape[:-2], d, d)
    for m, (start, stop) in zip(pieces_of(side), spans(p, d)):
        out[..., start:stop, start:stop] = m
    return out
