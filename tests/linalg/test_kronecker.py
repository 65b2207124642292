"""Kronecker algebra and the ladder of factorisations: singular, indefinite, not converging, not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from natgrad.linalg import kronecker as kr
from natgrad.linalg.block_diagonal import both_times

Close = Callable[[Tensor, Tensor, float], None]


def psd(d: int, rank: int | None = None, stack: tuple[int, ...] = ()) -> Tensor:
    root = torch.randn(*stack, d, rank or d).double()
    return root @ root.mT


def test_the_convention(close: Close) -> None:
    u, v, x = psd(3), psd(4), torch.randn(3, 4).double()
    close(torch.kron(u, v) @ x.flatten(), both_times(u, x, v).flatten(), 1e-13)


@pytest.mark.parametrize("stack", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("rank", [5, 2])
def test_inverse_of_regular_and_singular_stacks(stack: tuple[int, ...], rank: int, close: Close) -> None:
    m = psd(5, rank, stack)
    for damping in (1e-5, 1e-2, 10.0):
        expected = torch.linalg.inv(m + damping * torch.eye(5).double())
        close(kr.damped_inverse(m, damping), expected, 1e-8)


def test_a_damping_for_each_matrix_of_a_stack(close: Close) -> None:
    m, damping = psd(3, None, (2,)), torch.tensor([0.1, 2.0]).double()
    expected = torch.linalg.inv(m + damping[:, None, None] * torch.eye(3).double())
    close(kr.damped_inverse(m, damping), expected, 1e-12)


def test_rounding_below_zero_is_taken_as_zero(close: Close) -> None:
    """An indefinite matrix (rounding in a low-rank factor): its negative eigenvalues count as zero, damped."""
    q = torch.linalg.qr(torch.randn(4, 4).double())[0]
    values = torch.tensor([2.0, 1.0, 0.0, -1e-3]).double()
    m = (q * values) @ q.mT
    expected = (q / (values.clamp(min=0) + 1e-6)) @ q.mT
    inverse = kr.damped_inverse(m, 1e-6)
    close(inverse, expected, 1e-8)
    assert float(torch.linalg.eigvalsh(inverse)[0]) > 0  # still a descent direction
    assert float(kr.safe_eigh(m)[0][0]) == 0


def test_asymmetric_rounding_is_symmetrised(close: Close) -> None:
    m = psd(4)
    skew = torch.randn(4, 4).double() * 1e-9
    close(kr.damped_inverse(m + skew - skew.mT, 0.1), kr.damped_inverse(m, 0.1), 1e-12)


def test_zero_matrices(close: Close) -> None:
    zero, eye = torch.zeros(3, 3).double(), torch.eye(3).double()
    close(kr.damped_inverse(zero, 0.5), 2 * eye, 1e-15)
    gu, gv = kr.relative_inverse(zero, 0.25), kr.relative_inverse(psd(2), 0.25)
    close(gu, 2 * eye, 1e-15)  # a factor of zero stays at its damping
    assert bool(torch.isfinite(gv).all())


def test_factored_damping_is_relative_to_the_mean_eigenvalue(close: Close) -> None:
    u, v, lam = psd(3), psd(4), 0.09
    gu, gv = kr.relative_inverse(u, lam), kr.relative_inverse(v, lam)
    close(gu, torch.linalg.inv(3 * u / u.trace() + 0.3 * torch.eye(3).double()), 1e-12)
    close(gv, torch.linalg.inv(4 * v / v.trace() + 0.3 * torch.eye(4).double()), 1e-12)
    close(kr.relative_inverse(7 * u, lam), gu, 1e-12)
    close(kr.relative_inverse(0.01 * v, lam), gv, 1e-12)


def test_eigh_reconstructs(close: Close) -> None:
    m = psd(6, 3, (2,))
    values, vectors = kr.safe_eigh(m)
    close((vectors * values[..., None, :]) @ vectors.mT, m, 1e-13)
    assert float(values.min()) >= 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_said(bad: float) -> None:
    m = psd(3)
    m[1, 1] = bad
    for attempt in (lambda: kr.safe_eigh(m), lambda: kr.damped_inverse(m, 0.1)):
        with pytest.raises(kr.FactorisationError, match=r"shape \(3, 3\) holds NaN or Inf"):
            attempt()


def failing(times: int, real: Any) -> Any:
    """`real`, but it raises for the first so many calls."""
    calls = {"count": 0}

    def eigh(m: Tensor) -> Any:
        calls["count"] += 1
        if calls["count"] <= times:
            raise torch.linalg.LinAlgError("did not converge")
        return real(m)

    return eigh


def test_eigh_that_does_not_converge_is_jittered(monkeypatch: pytest.MonkeyPatch, close: Close) -> None:
    m = psd(4)
    expected = torch.linalg.eigvalsh(m)
    monkeypatch.setattr(torch.linalg, "eigh", failing(1, torch.linalg.eigh))
    close(kr.safe_eigh(m)[0], expected, 1e-6)


def test_eigh_that_does_not_converge_in_float32_goes_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    m = psd(4).float()
    expected = torch.linalg.eigvalsh(m)
    monkeypatch.setattr(torch.linalg, "eigh", failing(kr.TRIES, torch.linalg.eigh))
    with pytest.warns(UserWarning, match="did not converge in torch.float32; taken in float64"):
        values, vectors = kr.safe_eigh(m)
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.allclose(values, expected, rtol=1e-4)


def test_eigh_that_never_converges_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", failing(100, torch.linalg.eigh))
    with (
        pytest.warns(UserWarning, match="did not converge"),
        pytest.raises(kr.FactorisationError, match="does not converge"),
    ):
        kr.safe_eigh(psd(3))


def test_float32_at_the_edge_of_its_range() -> None:
    """A factor whose condition is beyond float32: the ladder still gives a finite, positive inverse."""
    m = torch.outer(torch.arange(1.0, 40.0), torch.arange(1.0, 40.0)) * 1e6
    inverse = kr.damped_inverse(m, 1e-6)
    assert bool(torch.isfinite(inverse).all())
    values = torch.linalg.eigvalsh(inverse.double())
    assert float(values[0]) > -1e-7 * float(values[-1])
