"""The comparison on inverse problems: the exact unknown has no error, and both methods start from one loss."""

import math

import pytest
import torch

from benchmarks import inverse

torch.set_num_threads(1)


@pytest.mark.parametrize("name", inverse.PROBLEMS)
def test_both_methods_lower_the_same_loss(name: str) -> None:
    losses = []
    for steps in (lambda s: inverse.natural(s), lambda s: inverse.adam_and_lbfgs(s, 1e9)):
        torch.manual_seed(0)
        setting = inverse.PROBLEMS[name][0]()
        first = float(setting.metric.observe(setting.batch))
        next(steps(setting))
        losses.append((first, float(setting.metric.observe(setting.batch))))
        assert math.isfinite(setting.error())
    assert losses[0][0] == losses[1][0]
    assert all(after < before for before, after in losses)


def test_a_row_has_the_errors_of_both() -> None:
    cells = inverse.row("coefficient", 0.02).strip("|").split("|")
    assert [c.strip() for c in cells[:2]] == ["coefficient", "relative error of k"]
    assert all("–" in c for c in cells[2:4])


def test_the_right_coefficients_have_no_error_and_solve_the_equations() -> None:
    """Kovasznay's flow, put in for the network, leaves nothing of the equations at λ = (1, 0.05)."""
    torch.manual_seed(0)
    setting = inverse.kovasznay()
    k = setting.metric.parameters["coefficients"]
    with torch.no_grad():
        k.copy_(torch.tensor([1.0, inverse.VISCOSITY], dtype=torch.float64))
    assert setting.error() == 0
    a = 0.5 / inverse.VISCOSITY - math.sqrt(0.25 / inverse.VISCOSITY**2 + 4 * math.pi**2)

    def flow(x: torch.Tensor) -> torch.Tensor:
        grown, turned = torch.exp(a * x[0]), 2 * math.pi * x[1]
        down = a / (2 * math.pi) * grown * torch.sin(turned)
        return torch.stack([1 - grown * torch.cos(turned), down, 0.5 * (1 - grown**2)])

    x, y = setting.batch["measured"][0][0], setting.batch["measured"][1][0]
    terms = setting.metric.residuals.terms
    torch.testing.assert_close(terms["measured"](flow, x, y), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(terms["equation"](flow, x), torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)
