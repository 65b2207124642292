"""Quantum geometry against covariances written out, and the Ising chain."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

import natgrad as ng
from benchmarks.sampled_ising import error
from natgrad.cli.problems.ising import Boltzmann, all_states, exact_probability, local_energy, prepare
from natgrad.optim.trust_region import TrustRegion

torch.set_num_threads(1)


class ComplexPsi(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, s):
        out = self.net(s)
        return torch.complex(out[..., 0], out[..., 1])


def covariances(model, states, weights, local):
    params = {n: p.detach() for n, p in model.named_parameters()}

    def part(f):
        return jacrev(lambda p: vmap(lambda s: f(functional_call(model, p, (s,)).reshape(())))(states))(params)

    def stack(jac):
        return torch.cat([j.reshape(len(states), -1) for j in jac.values()], dim=1)

    complex_psi = model(states).is_complex()
    o = (
        torch.complex(stack(part(lambda z: z.real)), stack(part(lambda z: z.imag)))
        if complex_psi
        else stack(part(lambda z: z)).to(torch.complex128)
    )
    centred = o - (weights[:, None] * o).sum(0)
    e = local - (weights * local).sum()
    return (centred.conj().mT @ (weights[:, None] * centred)).real, 2 * (
        centred.conj().mT @ (weights * e).to(o.dtype)
    ).real


@pytest.mark.parametrize("kind", ["complex", "real"])
@pytest.mark.parametrize("solver", ["dense", "kernel", "cg"])
def test_metric_gradient_and_solves(kind, solver):
    torch.manual_seed(0)
    model = (
        ComplexPsi().double()
        if kind == "complex"
        else nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    )
    states = all_states(4)
    weights = torch.rand(16, dtype=torch.float64)
    weights = weights / weights.sum()
    local = torch.randn(16, dtype=torch.complex128 if kind == "complex" else torch.float64)
    g, de = covariances(model, states, weights, local)
    metric = ng.QuantumGeometry(model, solver=solver, chunk=5)
    energy = metric.observe({"states": states, "weights": 3 * weights, "local_energy": local})
    torch.testing.assert_close(energy, (weights * local).sum().real)
    torch.testing.assert_close(metric.dense(), g)
    torch.testing.assert_close(metric.vector_to_flat(metric.gradient()), de)
    expected = torch.linalg.solve(g + 1e-2 * torch.eye(len(g), dtype=torch.float64), de)
    torch.testing.assert_close(metric.vector_to_flat(metric.direction(1e-2)), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        metric.vector_to_flat(metric.sharp(metric.gradient(), 1e-2)), expected, rtol=1e-7, atol=1e-9
    )


def test_gradient_is_that_of_the_energy():
    """dE = 2 Re Cov(O*, E_loc) against differentiating ⟨ψ|H|ψ⟩/⟨ψ|ψ⟩ directly."""
    torch.manual_seed(1)
    model, states = Boltzmann(4, 3).double(), all_states(4)

    def energy(params):
        psi = functional_call(model, params, (states,)).exp()
        bits = torch.arange(16)
        h_psi = -(states * states.roll(-1, 1)).sum(1) * psi - torch.stack([psi[bits ^ (1 << i)] for i in range(4)]).sum(
            0
        )
        return (psi @ h_psi) / (psi @ psi)

    params = {n: p.detach() for n, p in model.named_parameters()}
    log_psi = model(states).detach()
    metric = ng.QuantumGeometry(model)
    value = metric.observe(
        {
            "states": states,
            "weights": (2 * log_psi).exp(),
            "local_energy": local_energy(model, states, log_psi).detach(),
        }
    )
    torch.testing.assert_close(value, energy(params))
    torch.testing.assert_close(metric.gradient(), torch.func.grad(energy)(params))


def test_sampled_states_need_no_weights():
    model, states = Boltzmann(4, 3).double(), all_states(4)
    local = torch.arange(16.0, dtype=torch.float64)
    a, b = ng.QuantumGeometry(model), ng.QuantumGeometry(model)
    a.observe({"states": states, "local_energy": local})
    b.observe({"states": states, "local_energy": local, "weights": torch.ones(16)})
    torch.testing.assert_close(a.dense(), b.dense())


def test_exact_ground_state():
    p = exact_probability(all_states(6))
    assert float(p.sum()) == pytest.approx(1)
    assert float(p[0]) == pytest.approx(float(p[-1]))  # spin-flip symmetry


def test_ising_chain_reaches_the_ground_state():
    setting = prepare((6, 6), 1)
    opt = ng.NaturalGradient(setting.metric("auto"))
    for step in range(60):
        opt.step(setting.batch(step))
    assert setting.error() < 1e-5


@pytest.mark.parametrize("damping", [1e-4, 1e-8, 1e-12])
def test_small_damping_neither_diverges_nor_gives_nan(damping):
    setting = prepare((6, 6), 1)
    opt = ng.NaturalGradient(setting.metric("auto"), step=TrustRegion(damping=damping))
    first = setting.error()
    energies = [float(opt.step(setting.batch(step))) for step in range(100)]
    assert all(math.isfinite(e) for e in energies)
    assert max(energies) < energies[0] + 0.1 * abs(energies[0])
    assert setting.error() < 0.1 * first


@pytest.mark.parametrize("sites", [6, 8])
def test_samples_do_not_freeze_the_radius(sites):
    """The energies of two batches differ by their draws as well."""
    assert error(sites, 0, None) < 5e-4
    rule = TrustRegion()
    error(sites, 1, rule, samples=30, steps=60)
    assert rule.state_dict()["radius"] == rule.radius


def test_the_sampling_variance_is_that_of_a_mean():
    """Against the scatter of many batches."""
    setting, states = prepare((4, 4), 1), all_states(4)
    metric, generator = setting.metric("auto"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        p = torch.softmax(2 * setting.model(states), 0)
        local = local_energy(setting.model, states, setting.model(states))
    means, variances = [], []
    for _ in range(400):
        drawn = torch.multinomial(p, 50, True, generator=generator)
        means.append(metric.observe({"states": states[drawn], "local_energy": local[drawn]}))
        variances.append(metric.sampling_variance)
    exact = ((p * local.square()).sum() - (p * local).sum().square()) / 50
    assert float(torch.stack(variances).mean()) == pytest.approx(float(exact), rel=0.05)
    assert float(torch.stack(means).var()) == pytest.approx(float(exact), rel=0.25)


def test_a_sum_over_all_states_has_no_sampling_error():
    """It shrinks the radius as soon as a step fails."""
    setting = prepare((4, 4), 1)
    metric = setting.metric("auto")
    for step in range(3):
        metric.observe(setting.batch(step))
        assert float(metric.sampling_variance) == 0
    rule = TrustRegion(lr=1.0, damping=1e-12, radius=30.0, floor=1e-9)
    opt = ng.NaturalGradient(setting.metric("auto"), step=rule)
    for step in range(10):
        opt.step(setting.batch(step))
    assert rule.state_dict()["radius"] < 30


STATES = all_states(3)


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ({"states": STATES}, TypeError, r"got \['states'\]"),
        (STATES, TypeError, "got Tensor"),
        (
            {"states": STATES, "local_energy": torch.zeros(7)},
            ValueError,
            r"local_energy must have shape \(8,\)",
        ),
        (
            {"states": STATES, "local_energy": torch.full((8,), math.nan)},
            ValueError,
            "local_energy is not finite at 8 of 8 states",
        ),
        (
            {"states": STATES, "local_energy": torch.zeros(8), "weights": -torch.ones(8)},
            ValueError,
            "non-negative",
        ),
        (
            {"states": STATES.long(), "local_energy": torch.zeros(8)},
            TypeError,
            r"does not take torch.int64 states; cast them with .to\(torch.float64\)",
        ),
    ],
)
def test_bad_batches(batch, error, words):
    with pytest.raises(error, match=words):
        ng.QuantumGeometry(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()).observe(batch)


def test_log_psi_must_be_a_scalar():
    with pytest.raises(ValueError, match=r"scalar for one state, got \(2,\)"):
        ng.QuantumGeometry(nn.Linear(3, 2).double()).observe({"states": STATES, "local_energy": torch.zeros(8)})
