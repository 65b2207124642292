"""Differential operators by forward Laplacian, against nested torch.func transforms."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn import functional as F

from natgrad.function_space.forward_laplacian import Expansion, Jet, NoRule
from natgrad.function_space.operators import eye
from natgrad.operators import (
    derivatives,
    divergence,
    gradient,
    laplacian,
    time_derivative,
    value_and_gradient,
)

torch.set_num_threads(1)
X = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64)
W = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)

FIELDS = {
    "products": lambda x: x[0] * x[1] ** 3 + (x * x).sum() / (2 + x[2]) - 3 / (2 - x[0]),
    "functions": lambda x: (
        torch.exp(x[0]) * torch.sin(x[1]) + torch.cos(x[2] * x[0]) + torch.log(2 + x[1]) + torch.sqrt(1.5 + x[0])
    ),
    "methods": lambda x: (x.sin() + x.tanh().square()).mean() - x.exp().sum() + x.unsqueeze(0).squeeze(0)[1],
    "matrix": lambda x: torch.tanh(W @ x).sum() + (x @ W.mT).square().sum(),
    "shapes": lambda x: (
        torch.cat([x, x * 2, torch.ones(1, dtype=x.dtype)]).reshape(7, 1).flatten().square().sum()
        + torch.stack([x, x.sin()]).sum()
    ),
    "activations": lambda x: (F.silu(x) + F.gelu(x) + F.softplus(x) + torch.sigmoid(x) + F.elu(x + 2)).sum(),
    "more activations": lambda x: (
        F.mish(x) + F.logsigmoid(x) + F.celu(x) + F.tanhshrink(x) + F.softsign(x) + torch.erf(x) + torch.atan(x)
    ).sum(),
    "reversed": lambda x: (1 - x[0]) * (2.0 + x[1]) - (-x[2]) + torch.ones(3, dtype=x.dtype).sum() * x[0],
    "distance": lambda x: x[0] * (1 - x[0]) * torch.tanh(F.linear(x, W, torch.ones(4, dtype=x.dtype))).sum(),
    "no rule": lambda x: torch.linalg.vector_norm(x) ** 3,
}


@pytest.mark.parametrize("name", FIELDS)
def test_derivatives_against_nested_reverse_mode(name):
    u = FIELDS[name]
    out = derivatives(u, X)
    torch.testing.assert_close(out.value, u(X))
    torch.testing.assert_close(out.gradient, grad(u)(X))
    torch.testing.assert_close(out.laplacian, hessian(u)(X).diagonal().sum())
    weights = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(laplacian(u, X, weights), weights @ hessian(u)(X).diagonal())
    torch.testing.assert_close(gradient(u, X), grad(u)(X))


def networks():
    torch.manual_seed(0)
    yield nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5), nn.SiLU(), nn.Linear(5, 1)).double()
    yield nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 2)).double()  # LayerNorm has no rule
    yield nn.Sequential(nn.Linear(3, 6), nn.Softplus(), nn.Dropout(), nn.Linear(6, 1)).double().eval()


@pytest.mark.parametrize("net", list(networks()))
def test_networks_mapped_and_differentiated_by_parameters(net):
    params = {n: p.detach() for n, p in net.named_parameters()}
    points = torch.rand(5, 3, dtype=torch.float64)

    def ours(p, x):
        return laplacian(lambda y: functional_call(net, p, (y,)), x).sum()

    def theirs(p, x):
        return hessian(lambda y: functional_call(net, p, (y,)).sum())(x).diagonal().sum()

    torch.testing.assert_close(vmap(ours, (None, 0))(params, points), vmap(theirs, (None, 0))(params, points))
    got, expected = (vmap(jacrev(f), (None, 0))(params, points) for f in (ours, theirs))
    for name in params:
        torch.testing.assert_close(got[name], expected[name])


def test_vector_fields():
    def v(x):
        return torch.stack([x[0] * x[1], torch.sin(x[1]), x[2] ** 2])

    torch.testing.assert_close(divergence(v, X), jacrev(v)(X).trace())
    torch.testing.assert_close(time_derivative(v, X), jacrev(v)(X)[:, 0])
    torch.testing.assert_close(time_derivative(v, X, axis=2), jacrev(v)(X)[:, 2])
    value, slope = value_and_gradient(v, X)
    torch.testing.assert_close(value, v(X))
    torch.testing.assert_close(slope, jacrev(v)(X).mT)
    torch.testing.assert_close(
        laplacian(v, X), torch.stack([hessian(lambda x, i=i: v(x)[i])(X).trace() for i in range(3)])
    )
    with pytest.raises(ValueError, match=r"one component a coordinate.*must return shape \(3,\), got \(2,\)"):
        divergence(lambda x: x[:2], X)


def test_harmonic_and_known_solutions():
    assert float(laplacian(lambda x: x[0] ** 2 - x[1] ** 2, X)) == pytest.approx(0, abs=1e-14)
    assert float(laplacian(lambda x: torch.ones((), dtype=x.dtype), X)) == 0  # constant field


def jet_of(x):
    parts = [x[None], eye(x), torch.zeros_like(x)[None]]
    return Jet(torch.cat(parts), Expansion(torch.ones_like(x)))


@pytest.mark.parametrize("name", FIELDS)
def test_reverse_mode_is_taken_only_where_there_is_no_rule(name):
    if name == "no rule":
        with pytest.raises(NoRule):
            FIELDS[name](jet_of(X))
    else:
        assert isinstance(FIELDS[name](jet_of(X)), Jet)


def test_jets_of_two_passes_do_not_mix():
    with pytest.raises(NoRule):
        jet_of(X) * jet_of(X)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.Hardtanh()])
def test_piecewise_linear_networks_warn(activation):
    net = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 1)).double()
    with pytest.warns(UserWarning, match="zero almost everywhere"):
        assert float(laplacian(net, X).detach()) == 0
    with pytest.warns(UserWarning, match="zero almost everywhere"):
        laplacian(lambda x: net(x) + torch.linalg.vector_norm(x), X)  # in reverse mode as well
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(net, X)  # first derivatives are fine


def test_weights_that_are_learnt_keep_their_derivatives():
    k = torch.tensor(0.5, dtype=torch.float64)
    u = FIELDS["functions"]
    got = grad(lambda k: laplacian(u, X, [0.0, k, 2 * k]))(k)
    torch.testing.assert_close(got, hessian(u)(X).diagonal() @ torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))


def test_a_field_must_return_one_tensor():
    for operator in (laplacian, gradient, time_derivative):
        with pytest.raises(TypeError, match="returns one floating-point tensor, got tuple"):
            operator(lambda x: (x, x), X)
        with pytest.raises(TypeError, match=r"got a tensor of torch\.int64"):
            operator(lambda x: torch.arange(3), X)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.rand(4, 3), ValueError, r"one point of shape \(d,\), got shape \(4, 3\)"),
        (torch.tensor([1, 2, 3]), TypeError, "floating point, got torch.int64"),
    ],
)
def test_points_are_checked(x, error, words):
    for operator in (laplacian, gradient, time_derivative, divergence):
        with pytest.raises(error, match=words):
            operator(lambda y: y.sum(), x)


def test_weights_are_checked():
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(2,\)"):
        laplacian(FIELDS["products"], X, [1.0, 2.0])
