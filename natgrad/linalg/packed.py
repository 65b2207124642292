"""Symmetric matrices as half of their numbers, for messages between ranks.

A matrix of n rows becomes the n (n + 1) / 2 numbers of its lower triangle, row by row. A side becomes those of its
blocks, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from natgrad.linalg.block_diagonal import pieces_of, side_of, spans


def triangles(side: Tensor) -> Tensor:
    """Return half of the numbers of a side (…, p, d), flat."""
    found = []
    for m in pieces_of(side):
        rows, columns = lower(m.shape[-1], m)
        found.append(m[..., rows, columns].flatten())
    return torch.cat(found)


def side_of_triangles(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the side of this shape that `triangles` gave."""
    pieces = []
    widths = [stop - start for start, stop in spans(shape[-2], shape[-1])]
    for part, w in zip(flat.split([prod(shape[:-2]) * w * (w + 1) // 2 for w in widths]), widths):
        rows, columns = lower(w, flat)
        m = flat.new_empty(*shape[:-2], w, w)
        m[..., rows, columns] = m[..., columns, rows] = part.view(*shape[:-2], -1)
        pieces.append(m)
    return side_of(pieces)


def lower(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of a lower triangle."""
    rows, columns = torch.tril_indices(n, n, device=like.device)
    return rows, columns
