"""Symmetric matrices as half of their numbers.

A matrix of n rows becomes the n (n + 1) / 2 numbers of LAPACK's rectangular full packed format (Gustavson et al. 2010,
ACM Transactions on Mathematical Software 37(2), 18), here by rows and for the lower triangle: the first half of the
columns, A₁₁ above A₂₁, with A₂₂ᵀ in the place of what is above their diagonal. Everything is a copy of rectangles and a
mask, with no index to look up:

    ⎡a . . .⎤       ⎡c d⎤
    ⎢b e . .⎥   →   ⎢a h⎥        (c d / . h being A₂₂ᵀ)
    ⎢f g c .⎥       ⎢b e⎥
    ⎣i j d h⎦       ⎢f g⎥
                    ⎣i j⎦

A side (`natgrad.sides`) becomes the numbers of its pieces, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from natgrad.sides import pieces_of, spans


def triangles(side: Tensor) -> Tensor:
    """Half of the numbers of a side (…, p, d), flat."""
    parts = [halved(m).flatten() for m in pieces_of(side)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def side_of_triangles(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The side of this shape that `triangles` gave."""
    p, d = shape[-2:]
    out = flat.new_empty(shape) if d % p == 0 else flat.new_zeros(shape)  # below a shorter last piece there are zeros
    for m, part in zip(pieces_of(out), flat.split(lengths(shape))):
        fill(m, part.view(*shape[:-2], -1))
    return out


def lengths(shape: Sequence[int]) -> list[int]:
    """How many numbers each piece of a side (…, p, d) becomes.

    >>> lengths((4, 10)), lengths((2, 3, 3))
    ([10, 10, 3], [12])
    """
    widths = [stop - start for start, stop in spans(shape[-2], shape[-1])]
    return [prod(shape[:-2]) * w * (w + 1) // 2 for w in widths]


def halved(m: Tensor) -> Tensor:
    """(…, n, n) → (…, n (n + 1) / 2)"""
    n = m.shape[-1]
    half, lower = (n + 1) // 2, n % 2 == 0
    box = m.new_empty(*m.shape[:-2], n + lower, half)
    box[..., lower:, :] = m[..., :half]
    corner = box[..., : n - half, 1 - lower :]
    corner.copy_(corner.tril(-1).add_(m[..., half:, half:].triu()))
    return box.flatten(-2)


def fill(m: Tensor, numbers: Tensor) -> None:
    """Write the matrices (…, n, n) that `halved` gave (…, n (n + 1) / 2)."""
    n = m.shape[-1]
    half, lower = (n + 1) // 2, n % 2 == 0
    box = numbers.view(*numbers.shape[:-1], n + lower, half)
    first = box[..., lower : lower + half, :].tril()
    second = box[..., : n - half, 1 - lower :].triu()
    m[..., half:, :half] = box[..., lower + half :, :]
    m[..., :half, half:] = m[..., half:, :half].mT
    m[..., :half, :half] = first.add_(first.tril(-1).mT)
    m[..., half:, half:] = second.add_(second.triu(1).mT)
