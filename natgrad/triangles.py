"""Symmetric matrices as half of their numbers.

A matrix of n rows becomes the n (n + 1) / 2 numbers of LAPACK's rectangular full packed format (Gustavson et al. 2010,
ACM Transactions on Mathematical Software 37(2), 18), here by rows and for the lower triangle: the first half of the
columns, A₁₁ above A₂₁, with A₂₂ᵀ in the place of what is above their diagonal, so that everything is a copy of
rectangles and a mask:

    ⎡a . . .⎤       ⎡c d⎤
    ⎢b e . .⎥   →   ⎢a h⎥        (c d / . h being A₂₂ᵀ)
    ⎢f g c .⎥       ⎢b e⎥
    ⎣i j d h⎦       ⎢f g⎥
                    ⎣i j⎦

Small matrices are opened by a table of places, which is kept for every size and a fraction of the time.

A side (`natgrad.sides`) becomes the numbers of its pieces, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from natgrad.sides import pieces_of, spans

LOOKED_UP = 200  # rows up to which there is a table: n² integers of four bytes
_places: dict[tuple[int, torch.device], Tensor] = {}


def triangles(side: Tensor) -> Tensor:
    """Half of the numbers of a side (…, p, d), flat."""
    parts = [halved(m).flatten() for m in pieces_of(side)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def side_of_triangles(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The side of this shape that `triangles` gave."""
    p, d = shape[-2:]
    if p == d:
        return opened(flat.view(*shape[:-2], -1), d)
    out = flat.new_empty(shape) if d % p == 0 else flat.new_zeros(shape)  # below a shorter last piece there are zeros
    for m, part in zip(pieces_of(out), flat.split(lengths(shape))):
        m.copy_(opened(part.view(*shape[:-2], -1), m.shape[-1]))
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


def opened(numbers: Tensor, n: int) -> Tensor:
    """The matrices (…, n, n) that `halved` gave (…, n (n + 1) / 2)."""
    if n > LOOKED_UP:
        return unfolded(numbers, n)
    key = n, numbers.device
    if key not in _places:
        places = unfolded(torch.arange(numbers.shape[-1], dtype=torch.int32), n)
        _places[key] = places.flatten().to(numbers.device)
    return numbers.index_select(-1, _places[key]).view(*numbers.shape[:-1], n, n)


def unfolded(numbers: Tensor, n: int) -> Tensor:
    half, lower = (n + 1) // 2, n % 2 == 0
    box = numbers.view(*numbers.shape[:-1], n + lower, half)
    first = box[..., lower : lower + half, :].tril()
    second = box[..., : n - half, 1 - lower :].triu()
    m = numbers.new_empty(*numbers.shape[:-1], n, n)
    m[..., half:, :half] = box[..., lower + half :, :]
    m[..., :half, half:] = m[..., half:, :half].mT
    m[..., :half, :half] = first.add_(first.tril(-1).mT)
    m[..., half:, half:] = second.add_(second.triu(1).mT)
    return m
