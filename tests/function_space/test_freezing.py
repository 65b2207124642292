"""Freezing and thawing in mid-training: frozen parameters have no part in ĝ and df, and no rule moves them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import natgrad as ng
from natgrad.operators import laplacian
from natgrad.optim.line_search import GridSearch

torch.set_num_threads(1)
F64 = torch.float64
X = torch.linspace(0, 1, 7, dtype=F64)[:, None]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def parameter(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=F64))


def gauss_newton(solver: str = "auto") -> tuple[Any, Any]:
    k = parameter(0.5)
    terms = {"pde": lambda u, x, f: k * laplacian(u, x) + f, "data": lambda u, x: u(x) - x}
    return ng.GaussNewton(net(), terms, solver=solver, params={"k": k}), {"pde": (X, X[:, 0]), "data": X}


def energy(solver: str = "auto") -> tuple[Any, Any]:
    k = parameter(0.5)
    density = {"e": lambda u, du, x, f: 0.5 * (1 + k**2) * du @ du + 0.25 * u**4 - f * u}
    return ng.Energy(net(), density, solver=solver, params={"k": k}), {
        "e": (X, torch.full((7,), 1 / 7, dtype=F64), X[:, 0])
    }


class Psi(nn.Module):
    def __init__(self, k: Tensor) -> None:
        super().__init__()
        self.net, self.read = net(), lambda: k

    def forward(self, s: Tensor) -> Tensor:
        return torch.tanh(self.net(s)) * self.read()


def quantum(solver: str = "auto") -> tuple[Any, Any]:
    k = parameter(0.5)
    return ng.QuantumGeometry(Psi(k), solver=solver, params={"k": k}), {"states": X, "local_energy": X[:, 0] ** 2}


def total(solver: str = "auto") -> tuple[Any, Any]:
    first, batch = gauss_newton(solver)
    second = ng.GaussNewton(
        first.residuals.model, first.residuals.terms, {"data": 3.0}, solver=solver, params=first.scope.entries
    )
    return first + 0.5 * second, batch


METRICS = {f.__name__: f for f in (gauss_newton, energy, quantum, total)}
RULES = {
    "grid search": GridSearch,
    "levenberg marquardt": ng.LevenbergMarquardt,
    "spring": lambda: ng.Spring(momentum=0.9),
    "spring, radius": lambda: ng.Spring(momentum=0.9, radius=0.1),
    "trust region": ng.TrustRegion,
    "fixed, momentum": lambda: ng.FixedStep(lr=0.01, momentum=0.9),
    "kl trust region": ng.KLTrustRegion,
    "grafted": ng.Grafted,
    "normalised": ng.NormalisedStep,
}


def chosen(metric: Any) -> list[str]:
    """A whole layer, a bias of another, and the loose parameter."""
    return [n for n in metric.names if n.endswith(("2.weight", "2.bias", "4.bias")) or n == "k"]


def values(metric: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in metric.parameters.items()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", METRICS)
def test_frozen_parameters_stay_and_thawed_ones_move(kind: str, rule: str) -> None:
    if kind == "quantum" and rule in ("grid search", "levenberg marquardt"):
        pytest.skip("the loss of a quantum state is not known at trial points")
    metric, batch = METRICS[kind]()
    opt = ng.NaturalGradient(metric, step=RULES[rule](), weight_decay=1e-3)
    for _ in range(3):
        opt.step(batch)
    frozen = chosen(metric)
    for n in frozen:
        metric.parameters[n].requires_grad_(False)
    before = values(metric)
    for _ in range(3):
        opt.step(batch)
        after = values(metric)
        assert all(torch.equal(after[n], before[n]) for n in frozen)
    assert all(not torch.equal(after[n], before[n]) for n in metric.names if n not in frozen)
    for n in frozen:
        metric.parameters[n].requires_grad_(True)
    for _ in range(3):
        opt.step(batch)
    moved = values(metric)
    assert [n for n in metric.names if torch.equal(moved[n], before[n])] == []


@pytest.mark.parametrize("solver", ["dense", "kernel", "cg"])
@pytest.mark.parametrize("kind", METRICS)
def test_what_stays_is_the_metric_of_the_others(kind: str, solver: str) -> None:
    """Every verb, against the matrix before freezing with the frozen rows and columns at zero."""
    metric, batch = METRICS[kind](solver)
    metric.observe(batch)
    whole, df = metric.dense(), metric.vector_to_flat(metric.gradient())
    frozen = chosen(metric)
    for n in frozen:
        metric.parameters[n].requires_grad_(False)
    metric.observe(batch)
    at = torch.cat([torch.full((p.numel(),), float(n not in frozen), dtype=F64) for n, p in metric.parameters.items()])
    expected, flat = whole * at[:, None] * at, metric.vector_to_flat
    if kind == "energy":  # where k itself is an entry of z, the positive part of F_zz is another without it
        expected = metric.dense()
        assert float((expected * (1 - at)).abs().max()) == 0
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(metric.dense(), expected, **close)
    torch.testing.assert_close(flat(metric.gradient()), df * at, **close)
    v = torch.cos(torch.arange(len(at)).double())
    torch.testing.assert_close(flat(metric.flat(metric.flat_to_vector(v))), expected @ v, **close)
    torch.testing.assert_close(flat(metric.diagonal()), expected.diagonal(), **close)
    shifted = expected + 0.1 * torch.eye(len(at), dtype=F64)
    torch.testing.assert_close(
        flat(metric.sharp(metric.flat_to_vector(v), 0.1)), torch.linalg.solve(shifted, v), **close
    )
    torch.testing.assert_close(flat(metric.direction(0.1)), torch.linalg.solve(shifted, df * at), **close)
    prior = flat(metric.direction(0.1, metric.flat_to_vector(v)))
    torch.testing.assert_close(prior, torch.linalg.solve(shifted, (df + 0.1 * v) * at), **close)
    if solver != "cg":
        torch.testing.assert_close(metric.logdet(0.1), torch.logdet(shifted), **close)
    draws = [metric.sample(0.1, torch.Generator().manual_seed(s)) for s in (0, 0, 1)] if solver != "cg" else []
    for n in frozen if draws else []:
        assert torch.equal(draws[0][n], draws[1][n])
        assert not torch.equal(draws[0][n], draws[2][n])
    for n in frozen:
        metric.parameters[n].requires_grad_(True)
    metric.observe(batch)
    torch.testing.assert_close(metric.dense(), whole, **close)


def test_frozen_draws_have_the_variance_of_the_damping() -> None:
    metric, batch = gauss_newton("dense")
    metric.parameters["2.weight"].requires_grad_(False)
    metric.observe(batch)
    g = torch.Generator().manual_seed(0)
    drawn = torch.cat([metric.sample(0.25, g)["2.weight"].flatten() for _ in range(200)])
    assert float(drawn.square().mean()) == pytest.approx(4.0, rel=0.1)


def test_a_network_may_be_frozen_whole_while_a_coefficient_is_trained() -> None:
    """k of k u″ + f = 0 by least squares; the term without k is constant then and no error."""
    metric, batch = gauss_newton()
    model = metric.residuals.model
    model.requires_grad_(False)
    params = dict(model.named_parameters())
    u = lambda x: functional_call(model, params, (x,))[0]  # noqa: E731
    bend = vmap(lambda x: torch.func.hessian(u)(x).trace())(X)
    opt = ng.NaturalGradient(metric)
    before = values(metric)
    for _ in range(3):
        opt.step(batch)
    after = values(metric)
    assert float(after["k"]) == pytest.approx(float(-(bend @ X[:, 0]) / (bend @ bend)), rel=1e-6)
    assert all(torch.equal(after[n], before[n]) for n in before if n != "k")


def test_what_was_frozen_when_the_metric_was_made_is_thawed_as_with_any_optimizer() -> None:
    for made in (gauss_newton, total):
        metric, batch = made()
        model = net()
        first, k = model[0], parameter(0.5)
        first.requires_grad_(False)
        k.requires_grad_(False)
        terms = {"pde": lambda u, x, f, k=k: k * laplacian(u, x) + f, "data": lambda u, x: u(x) - x}
        one = ng.GaussNewton(model, terms, params={"k": k})
        metric = one if made is gauss_newton else one + ng.GaussNewton(model, terms, params={"k": k})
        opt = ng.NaturalGradient(metric)
        assert "0.weight" not in metric.names
        assert "k" not in metric.names
        opt.step(batch)
        first.requires_grad_(True)
        k.requires_grad_(True)
        with pytest.raises(ValueError, match=r"reads '\w+.*', which requires grad but was frozen.*add_param_group"):
            opt.step(batch)
        opt.add_param_group({"params": [*first.parameters(), k]})
        assert metric.names == [*(n for n, _ in model.named_parameters()), "k"]
        before = values(metric)
        for _ in range(3):
            opt.step(batch)
        assert not any(torch.equal(p, before[n]) for n, p in metric.parameters.items())


def test_a_parameter_that_would_never_move_is_refused() -> None:
    metric, batch = gauss_newton()
    opt = ng.NaturalGradient(metric)
    with pytest.raises(ValueError, match=r"of shape \(2,\) is neither its model's nor in params"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(opt.param_groups) == 1
    opt.step(batch)


def test_the_hessian_of_what_is_not_frozen() -> None:
    model = net()
    hessian = ng.Hessian(lambda batch: (model(batch) - batch).square().mean(), model)
    opt = ng.NaturalGradient(hessian, lr=0.1, damping=10.0)
    opt.step(X)
    hessian.observe(X)
    whole, df = hessian.dense(), hessian.vector_to_flat(hessian.gradient())
    model[2].requires_grad_(False)
    at = torch.cat([torch.full((p.numel(),), float(p.requires_grad), dtype=F64) for p in model.parameters()])
    hessian.observe(X)
    torch.testing.assert_close(hessian.dense(), whole * at[:, None] * at)
    torch.testing.assert_close(hessian.vector_to_flat(hessian.gradient()), df * at)
    before = values(hessian)
    opt.step(X)
    after = values(hessian)
    assert [n for n in before if torch.equal(before[n], after[n])] == ["2.weight", "2.bias"]
    model[2].requires_grad_(True)
    opt.step(X)
    assert not any(torch.equal(p, after[n]) for n, p in hessian.parameters.items())


def test_all_frozen_is_said() -> None:
    metric, batch = gauss_newton()
    for p in metric.parameters.values():
        p.requires_grad_(False)
    with pytest.raises(RuntimeError, match="all parameters of this GaussNewton are frozen"):
        ng.NaturalGradient(metric).step(batch)
