"""The Hessian metric against torch.func.hessian, and Lanczos against eigh."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

import natgrad as ng
from natgrad.function_space.hessian import lanczos, tridiagonal

torch.set_num_threads(1)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 1, dtype=torch.float64)
    params = {n: p.detach() for n, p in net.named_parameters()}
    rows = hessian(lambda p: (functional_call(net, p, (x,)) - y).square().mean())(params)
    full = torch.cat([torch.cat([rows[a][b].reshape(params[a].numel(), -1) for b in params], 1) for a in params])
    return net, (lambda: (net(x) - y).square().mean()), full, (x, y)


def test_products_dense_and_solves(problem):
    net, loss_fn, full, _ = problem
    h = ng.Hessian(loss_fn, net)
    torch.testing.assert_close(h.dense(), full)
    v = h.flat_to_vector(torch.linspace(-1, 1, 21, dtype=torch.float64))
    torch.testing.assert_close(h.vector_to_flat(h.flat(v)), full @ h.vector_to_flat(v))
    torch.testing.assert_close(h.inner(v, v), h.vector_to_flat(v) @ full @ h.vector_to_flat(v))
    torch.testing.assert_close(h.trace(), full.trace())
    damping = 1.0 - float(torch.linalg.eigvalsh(full)[0])
    shifted = full + damping * torch.eye(21, dtype=torch.float64)
    torch.testing.assert_close(h.vector_to_flat(h.sharp(v, damping)), torch.linalg.solve(shifted, h.vector_to_flat(v)))
    torch.testing.assert_close(h.logdet(damping), torch.logdet(shifted))


def test_conjugate_gradients_serve_many_parameters(problem, monkeypatch):
    net, loss_fn, full, _ = problem
    monkeypatch.setattr("natgrad.function_space.hessian.DENSE_PARAMETERS", 0)
    h = ng.Hessian(loss_fn, net)
    v = h.flat_to_vector(torch.linspace(-1, 1, 21, dtype=torch.float64))
    damping = 1.0 - float(torch.linalg.eigvalsh(full)[0])
    expected = torch.linalg.solve(full + damping * torch.eye(21, dtype=torch.float64), h.vector_to_flat(v))
    torch.testing.assert_close(h.vector_to_flat(h.sharp(v, damping)), expected, rtol=1e-6, atol=1e-8)
    eigenvalue, vectors = torch.linalg.eigh(full)
    with pytest.raises(ValueError, match="not positive definite"):
        h.sharp(h.flat_to_vector(vectors[:, 0]), 1e-9)
    assert float(eigenvalue[0]) < 0


def test_an_indefinite_hessian_refuses_what_it_cannot_do(problem):
    net, loss_fn, full, _ = problem
    assert float(torch.linalg.eigvalsh(full)[0]) < -1e-3
    h = ng.Hessian(loss_fn, net)
    for verb in (h.logdet, h.sample, lambda damping: h.sharp(dict(net.named_parameters()), damping)):
        with pytest.raises(ValueError, match=r"not positive definite \(smallest eigenvalue -.*larger damping"):
            verb(1e-6)


def test_lanczos_against_eigh(problem):
    net, loss_fn, full, _ = problem
    h = ng.Hessian(loss_fn, net)
    eigenvalues = torch.linalg.eigvalsh(full)
    nodes, weights = h.spectrum(steps=21, probes=1)
    torch.testing.assert_close(nodes, eigenvalues, rtol=1e-8, atol=1e-8)
    assert float(weights.sum()) == pytest.approx(1)
    nodes, weights = h.spectrum(steps=21, probes=400)
    assert float((weights * nodes).sum()) == pytest.approx(float(full.trace()) / 21, rel=0.1)
    values, vectors = h.top(4)
    expected = eigenvalues[eigenvalues.abs().argsort(descending=True)[:4]]
    torch.testing.assert_close(values, expected)
    for value, vector in zip(values, vectors):
        torch.testing.assert_close(
            h.vector_to_flat(h.flat(vector)), value * h.vector_to_flat(vector), rtol=1e-6, atol=1e-8
        )


def test_lanczos_stops_at_an_invariant_space():
    matrix = torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    diagonal, off, basis = lanczos(matrix.mv, torch.ones(4, dtype=torch.float64), 4)
    assert basis.shape == (4, 2)
    torch.testing.assert_close(
        torch.linalg.eigvalsh(tridiagonal(diagonal, off)), torch.tensor([1.0, 3.0], dtype=torch.float64)
    )


def test_newton_steps_on_a_batch():
    net = nn.Linear(2, 1).double()
    h = ng.Hessian(lambda batch: (net(batch[0]) - batch[1]).square().mean(), net)
    opt = ng.NaturalGradient(h, damping=1e-12)
    x = torch.randn(8, 2, dtype=torch.float64)
    batch = (x, x @ torch.tensor([[1.0], [2.0]], dtype=torch.float64) + 3)
    opt.step(batch)
    assert float(opt.step(batch)) < 1e-18  # quadratic: one step


def test_linear_losses_and_unused_parameters():
    w, spare = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(2).double())
    assert float(ng.Hessian(lambda: w.sum(), [w]).dense().norm()) == 0
    h = ng.Hessian(lambda: (w**3).sum(), {"w": w, "spare": spare}).dense()
    torch.testing.assert_close(h.diagonal(), torch.tensor([6.0, 6, 6, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda w: ng.Hessian(3, [w]), TypeError, "must be a callable"),
        (lambda w: ng.Hessian(lambda a, b: a, [w]), TypeError, r"got a function of \['a', 'b'\]"),
        (lambda w: ng.Hessian(lambda: w * 2, [w]).dense(), ValueError, r"scalar tensor, got \(3,\)"),
        (
            lambda w: ng.Hessian(lambda: torch.ones(()), [w]).dense(),
            ValueError,
            "does not depend on the parameters",
        ),
        (lambda w: ng.Hessian(lambda: (w * math.nan).sum(), [w]).dense(), ValueError, "the loss is nan"),
        (lambda w: ng.Hessian(lambda batch: w.sum(), [w]).dense(), RuntimeError, "has seen none"),
        (
            lambda w: ng.Hessian(lambda: (w**2).sum(), [w]).top(9),
            ValueError,
            "between 1 and the 3 parameters, got 9",
        ),
        (lambda w: ng.Hessian(lambda: (w**2).sum(), [w]).gradient(), RuntimeError, "has seen no batch yet"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make(nn.Parameter(torch.ones(3)))
