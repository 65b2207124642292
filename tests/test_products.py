"""Products by either library, and the inverse that is made of them, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from natgrad import products
from natgrad.kronecker import LEAF, FactorisationError, inverse_by_quarters, relative_inverse
from natgrad.products import product


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def laid_out(m: Tensor, way: str) -> Tensor:
    """`m` in another memory layout."""
    if way == "columns":
        return m.mT.contiguous().mT
    return torch.cat([m, m], -1)[..., : m.shape[-1]] if way == "cut out" else m.contiguous()


@pytest.mark.parametrize("right", ["rows", "columns", "cut out"])
@pytest.mark.parametrize("left", ["rows", "columns", "cut out"])
@pytest.mark.parametrize("sizes", [(3, 4, 5), (210, 180, 160), (1, 2000, 1500)], ids=str)
@pytest.mark.parametrize("stack", [(), (1,), (2,)], ids=str)
def test_a_product_is_the_product(stack: tuple[int, ...], sizes: tuple[int, int, int], left: str, right: str) -> None:
    m, k, n = sizes
    a, b = laid_out(torch.randn(*stack, m, k), left), laid_out(torch.randn(*stack, k, n), right)
    found = product(a, b)
    assert found.shape == (*stack, m, n)
    assert error(found, a.double() @ b.double()) < 1e-6


@pytest.mark.parametrize("wide", [True, False])
def test_the_inverse_of_a_large_factor(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WIDE", wide and products.WIDE)
    size = 2 * LEAF + 31
    basis = torch.linalg.qr(torch.randn(size, size).double())[0]
    m = (basis * torch.logspace(0, -6, size).double()) @ basis.mT
    expected = torch.linalg.inv(m / m.trace() * size + 0.1**0.5 * torch.eye(size).double())
    found = relative_inverse(m.float()[None], 0.1)
    assert found.shape == (1, size, size)
    assert error(found[0], expected) < 1e-5
    assert error(inverse_by_quarters(torch.linalg.inv(expected).float()), expected) < 1e-5


def test_a_matrix_that_is_not_positive_definite_has_no_inverse_by_quarters() -> None:
    m = torch.eye(2 * LEAF + 1)
    for at in (0, -1):
        bad = m.clone()
        bad[at, at] = -1
        assert inverse_by_quarters(bad) is None


def test_a_large_factor_that_is_not_finite_is_refused() -> None:
    for at in ((0, 0), (-1, -1), (-1, 0)):
        m = torch.eye(2 * LEAF + 1)[None]
        m[0][at] = torch.nan
        with pytest.raises(FactorisationError, match="NaN or Inf"):
            relative_inverse(m, 0.1)
