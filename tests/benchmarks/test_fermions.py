"""Ground states of electrons: their energies, and that the gradient is that of the energy."""

import pytest
import torch

import natgrad as ng
from benchmarks import fermions

torch.set_num_threads(1)


@pytest.mark.parametrize(("name", "steps"), [("hydrogen", 80), ("trap", 40), ("hooke", 30)])
def test_the_defaults_reach_the_exact_energy(name, steps):
    energy, reached, _ = fermions.solve(name, steps)
    assert abs(energy / fermions.ROWS[name].exact - 1) <= fermions.BAR
    assert reached < steps


@pytest.mark.parametrize("name", fermions.ROWS)
def test_the_gradient_is_that_of_the_energy(name):
    """Against differences of the energy, to the error of the quadrature."""
    row = fermions.ROWS[name]
    torch.manual_seed(0)
    log_psi = row.network().double()
    states, logs = row.points()

    def energy():
        local, values = fermions.local_energy(log_psi, row, states)
        weights = torch.softmax(2 * values + logs, 0)
        return weights @ local, local, weights

    _, local, weights = energy()
    metric = ng.QuantumGeometry(log_psi)
    metric.observe({"states": states, "weights": weights, "local_energy": local})
    generator = torch.Generator().manual_seed(0)
    way = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in log_psi.named_parameters()}
    expected, ends = sum((metric.gradient()[n] * way[n]).sum() for n in way), []
    for sign in (1, -2):
        with torch.no_grad():
            for n, p in log_psi.named_parameters():
                p.add_(sign * 1e-5 * way[n])
        ends.append(energy()[0])
    assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float(expected), rel=1e-3)
