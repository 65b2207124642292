"""Sides of Kronecker products that are kept in pieces, against dense matrices with zeros off the pieces."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor

from natgrad.linalg import block_diagonal as sides
from natgrad.linalg import kronecker
from natgrad.linalg import packed as triangles

Close = Callable[[Tensor, Tensor, float], None]


def psd(d: int, stack: tuple[int, ...] = ()) -> Tensor:
    root = torch.randn(*stack, d, d, dtype=torch.float64)
    m = root @ root.mT
    return (m + m.mT) / 2


def kept(m: Tensor, longest: int) -> Tensor:
    """A dense side as it is kept."""
    p = sides.rows_of_pieces(m.shape[-1], longest)
    if p == 1:
        return m.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    return sides.side_of([m[..., a:b, a:b] for a, b in sides.spans(p, m.shape[-1])])


LONGEST = (1, 2, 3, 4, 5, 7, 9)  # of sides of length 7: also what does not divide it


@pytest.mark.parametrize("stack", [(), (2,)], ids=str)
@pytest.mark.parametrize("longest", LONGEST)
def test_a_side_in_pieces_is_its_masked_matrix(longest: int, stack: tuple[int, ...], close: Close) -> None:
    m, x = psd(7, stack), torch.randn(*stack, 4, 7, dtype=torch.float64)
    dense, side = m * oracle.mask(7, longest), kept(m, longest)
    close(sides.dense_of(side), dense, 0)
    close(sides.times(x, side), x @ dense, 1e-14)
    close(sides.left_times(side, x.mT), dense @ x.mT, 1e-14)
    close(sides.diagonal_of(side), dense.diagonal(dim1=-2, dim2=-1), 0)
    close(sides.trace_of(side), dense.diagonal(dim1=-2, dim2=-1).sum(-1), 1e-15)
    eye = torch.eye(7, dtype=torch.float64)
    mean = dense.diagonal(dim1=-2, dim2=-1).mean()
    expected = torch.linalg.inv(dense / mean + 0.3 * eye)
    close(sides.dense_of(kronecker.relative_inverse(side, 0.09)), expected, 1e-12)
    values, q = kronecker.eigen_of(side)
    q = torch.eye(7, dtype=torch.float64).expand_as(dense) if q is None else sides.dense_of(q)
    close((q * values[..., None, :]) @ q.mT, dense, 1e-13)


@pytest.mark.parametrize("longest", [2, 3, 4, 9])
def test_what_is_not_symmetric_keeps_its_form(longest: int, close: Close) -> None:
    a, b = (torch.randn(2, 7, 7, dtype=torch.float64) for _ in range(2))
    full = oracle.mask(7, longest)
    close(sides.dense_of(sides.transposed(kept(a, longest))), (a * full).mT, 0)
    close(sides.dense_of(sides.across(kept(a, longest), kept(b, longest))), (a * full).mT @ (b * full), 1e-14)


@pytest.mark.parametrize("stack", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("longest", LONGEST[1:])
def test_triangles_hold_every_number_once(longest: int, stack: tuple[int, ...]) -> None:
    side = kept(psd(7, stack), longest)
    flat = triangles.triangles(side)
    per = sum((b - a) * (b - a + 1) // 2 for a, b in sides.spans(*side.shape[-2:]))
    assert flat.numel() == per * torch.Size(stack).numel()
    assert torch.equal(triangles.side_of_triangles(flat, tuple(side.shape)), side)


def test_pieces_are_few_and_even() -> None:
    for d in range(1, 40):
        for longest in range(1, 45):
            p = sides.rows_of_pieces(d, longest)
            widths = [b - a for a, b in sides.spans(p, d)]
            assert sum(widths) == d
            assert max(widths) == widths[0] == p <= longest
            assert len(widths) <= -(-d // longest)  # fewer only where a last one would be empty
    assert sides.rows_of_pieces(769, 768) == 385


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_pieces_are_inverted_too(dtype: torch.dtype) -> None:
    """Beyond 200 rows float32 takes another way where the processor favours it."""
    side = kept(psd(700, (1,)).to(dtype), 300)
    dense, eye = sides.dense_of(side).double(), torch.eye(700, dtype=torch.float64)
    expected = torch.linalg.inv(dense / sides.trace_of(dense) * 700 + 0.5 * eye)
    found = sides.dense_of(kronecker.relative_inverse(side, 0.25)).double()
    assert oracle.relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 1e-12)
