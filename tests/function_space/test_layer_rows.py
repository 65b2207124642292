"""Jacobians kept by linear layer: against differentiation at each point, and what falls back to that."""

import pytest
import torch
from torch import nn
from torch.func import jacrev, jvp

import natgrad as ng
from natgrad.function_space import layer_jacobian as layer_rows
from natgrad.operators import derivatives, laplacian

torch.set_num_threads(1)


def mlp(width=9, bias=True, outputs=1):
    """Wide enough for factors, beside thin layers whose entries are formed."""
    torch.manual_seed(0)
    layers = [nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width, bias=bias), nn.Tanh(), nn.Linear(width, outputs)]
    return nn.Sequential(*layers).double()


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.again, self.last = nn.Linear(2, 24), nn.Linear(24, 24), nn.Linear(24, 1)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.again(torch.tanh(self.again(h)))))


class Scaled(nn.Module):
    """A parameter outside of linear layers."""

    def __init__(self):
        super().__init__()
        self.net, self.weight = mlp(), nn.Parameter(torch.ones(1, 1, dtype=torch.float64))

    def forward(self, x):
        return self.net(x) * self.weight[0]


class Late(nn.Module):
    """One that comes to use a weight past its layer."""

    def __init__(self):
        super().__init__()
        self.net, self.late = mlp(), False

    def forward(self, x):
        return self.net(x) + (self.net[0].weight[:1, 0] if self.late else 0.0)


def burgers(u, x):
    value, (u_t, u_x), u_xx = derivatives(u, x, [0.0, 1.0])
    return u_t + value * u_x - 0.1 * u_xx


def system(u, x):
    value, slope, bend = derivatives(u, x)
    return torch.stack([value[0] * slope[0, 1] - bend[0], value[1] + slope[1, 0] ** 2])


TERMS = {"inside": lambda u, x: laplacian(u, x) + x.sum(), "edge": lambda u, x: u(x)}
SEEN = {
    "poisson": (mlp, TERMS),
    "no bias": (lambda: mlp(bias=False), TERMS),
    "burgers": (mlp, {"inside": burgers, "edge": lambda u, x: u(x) - 1}),
    "two components": (lambda: mlp(outputs=2), {"inside": system, "edge": lambda u, x: u(x)}),
    "two calls of u": (mlp, {"inside": lambda u, x: laplacian(u, x) * u(x), "edge": lambda u, x: u(x) - u(-x)}),
    "a layer called twice": (lambda: Shared().double(), TERMS),
    "thin": (lambda: mlp(2), TERMS),
    "wide": (lambda: mlp(40), TERMS),
    "a layer norm": (lambda: nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Linear(5, 1)).double(), TERMS),
}


def batch(n=70, m=5):
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(n + m, 2, generator=generator, dtype=torch.float64)
    return {"inside": points[:n], "edge": points[n:]}


def observed(model, terms, data=None, **options):
    metric = ng.GaussNewton(model, terms, {"edge": 3.0}, **options)
    metric.observe(batch() if data is None else data)
    return metric


def pointwise(metric):
    """Residuals and J (N, P) by reverse mode at each point."""
    root, rows = metric._linearise()
    return root, rows.matrix()


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize("name", SEEN)
def test_rows_are_those_of_differentiation_at_each_point(name, chunk):
    make, terms = SEEN[name]
    metric = observed(make(), terms, chunk=chunk)
    assert metric._by_layer
    root, matrix = pointwise(metric)
    rows, close = metric.rows, {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(metric.root, root, **close)
    torch.testing.assert_close(rows.matrix(), matrix, **close)
    torch.testing.assert_close(rows.product(), matrix @ matrix.mT, **close)
    v, c = torch.randn(rows.parameters, dtype=torch.float64), torch.randn(rows.count, dtype=torch.float64)
    torch.testing.assert_close(rows.jvp(v), matrix @ v, **close)
    torch.testing.assert_close(rows.vjp(c), matrix.mT @ c, **close)
    assert {len(chunk) for chunk in rows.chunks()} <= ({70, 5, 140, 10} if chunk is None else {13, 5, 10, 12})


@pytest.mark.parametrize("solver", ["dense", "kernel", "cg"])
def test_solvers_take_rows_by_layer(solver):
    metric = observed(mlp(20), TERMS, solver=solver)
    other = ng.GaussNewton(metric.residuals.model, TERMS, {"edge": 3.0}, solver=solver)
    other._by_layer = False
    other.observe(batch())
    for name, d in metric.direction(1e-3).items():
        torch.testing.assert_close(d, other.direction(1e-3)[name], rtol=1e-9, atol=1e-11)


HIDDEN = {
    "a parameter beside layers": (Scaled, TERMS),
    "a transform of u": (mlp, {**TERMS, "inside": lambda u, x: jacrev(u)(x).sum()}),
    "forward mode": (mlp, {**TERMS, "inside": lambda u, x: jvp(u, (x,), (torch.ones_like(x),))[1]}),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_other_residuals_are_differentiated_at_each_point(name):
    make, terms = HIDDEN[name]
    metric = observed(make(), terms)
    assert not metric._by_layer
    root, matrix = pointwise(metric)
    torch.testing.assert_close(metric.root, root)
    torch.testing.assert_close(metric.rows.matrix(), matrix)


def test_a_weight_used_past_its_layer_is_found_out_when_it_is():
    """The check is made at every linearisation, not once: a model may change its mind."""
    net = Late()
    metric = observed(net, TERMS)
    assert metric._by_layer
    net.late = True
    metric.observe(batch())
    assert not metric._by_layer
    torch.testing.assert_close(metric.rows.matrix(), pointwise(metric)[1])


def test_factors_too_large_to_keep_are_not_kept(monkeypatch):
    monkeypatch.setattr(layer_rows, "KEPT_BYTES", 1000)
    metric = observed(mlp(), TERMS)
    assert metric._by_layer
    assert metric.rows.gram is None
    torch.testing.assert_close(metric.rows.matrix(), pointwise(metric)[1])


def test_a_residual_that_is_not_finite_is_named_before_anything_else():
    metric = ng.GaussNewton(mlp(), {"inside": lambda u, x: (u(x) - 100).log(), "edge": lambda u, x: u(x)})
    with pytest.raises(ValueError, match=r"term 'inside'.*not finite"):
        metric.observe(batch())


def test_single_precision():
    metric = observed(mlp(20).float(), TERMS, {n: x.float() for n, x in batch().items()})
    assert metric._by_layer
    torch.testing.assert_close(metric.rows.matrix(), pointwise(metric)[1], rtol=1e-4, atol=1e-5)
