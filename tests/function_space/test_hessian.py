"""The Hessian metric against torch.func.hessian, and Lanczos against eigh."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

import natgrad as ng
from natgrad.linalg.lanczos import lanczos, largest, tridiagonal

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


def test_multiple_eigenvalues_are_found_as_often_as_they_occur():
    p = nn.Parameter(torch.randn(4, dtype=torch.float64))
    pairs = ng.Hessian(lambda: 0.5 * (p**2).sum(), [p]).top(3)
    torch.testing.assert_close(pairs[0], torch.ones(3, dtype=torch.float64))
    assert pairs.multiplicities.tolist() == [3, 3, 3]

    torch.manual_seed(0)
    net, x = nn.Linear(6, 3, bias=False).double(), torch.randn(50, 6, dtype=torch.float64)
    h = ng.Hessian(lambda: net(x).square().mean(), net)  # (2/Nk) XᵀX ⊗ I₃
    once = torch.linalg.eigvalsh(2 / 150 * x.mT @ x).flip(0)
    for k in (1, 3, 5, 18):
        pairs = h.top(k)
        values, vectors = pairs
        torch.testing.assert_close(values, once.repeat_interleave(3)[:k])
        basis = torch.stack([h.vector_to_flat(v) for v in vectors], 1)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(k, dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close(h.dense() @ basis, basis * values, atol=1e-7, rtol=0)
        assert pairs.residuals.shape == (k,)
        assert float(pairs.residuals.max()) <= 2e-8 * float(values[0])
    assert h.top(5).multiplicities.tolist() == [3, 3, 3, 2, 2]


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_of_large_maps_and_of_both_signs(seed):
    """Restarts, clusters, and signs: 400 eigenvalues, ±7 twice, a cluster below."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=torch.float64)).Q
    values = torch.cat([torch.tensor([7.0, -7.0, 7.0, -7.0, 6.99]), torch.linspace(-5, 6, 395)]).double()
    matrix = (q * values) @ q.mT
    start = torch.randn(400, 7, generator=generator, dtype=torch.float64)
    got, vectors, residuals = largest(matrix.mv, start, 5)
    torch.testing.assert_close(got.abs(), torch.tensor([7.0, 7, 7, 7, 6.99], dtype=torch.float64))
    assert int((got > 0).sum()) == 3
    torch.testing.assert_close(residuals, (matrix @ vectors - vectors * got).norm(dim=0), atol=1e-9, rtol=0.1)
    assert float(largest(matrix.mv, start, 1, signed=True)[0]) == pytest.approx(7)
    with pytest.warns(UserWarning, match=r"known to .* only"):
        largest(matrix.mv, start, 5, steps=2)


def test_the_zero_map_and_the_whole_space():
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    assert ng.Hessian(lambda: w.sum(), [w]).top(2)[0].tolist() == [0, 0]
    values, _ = ng.Hessian(lambda: (w**2 * torch.tensor([1.0, -2, 0])).sum(), [w]).top(3)
    torch.testing.assert_close(values, torch.tensor([-4.0, 2, 0], dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_density_says_how_far_it_can_be_trusted(problem):
    net, loss_fn, full, _ = problem
    h, eigenvalues = ng.Hessian(loss_fn, net), torch.linalg.eigvalsh(full)
    density = h.spectrum(steps=6, probes=40)
    nodes, _ = density
    distance = (nodes[:, None] - eigenvalues).abs().min(1).values
    assert bool((distance <= density.residuals + 1e-12).all())
    assert float(h.spectrum(steps=21).residuals.max()) < 1e-8  # all of the space
    within = []
    for seed in range(6):
        density = h.spectrum(steps=21, probes=40, seed=100 * seed)
        share = torch.searchsorted(eigenvalues + 1e-6, density[0]).double() / 21
        off = (density[1].cumsum(0) - share).abs()
        within.append(float((off <= 2 * density.errors + 0.03).double().mean()))
    assert sum(within) / 6 > 0.9  # two standard errors
    assert bool(h.spectrum(probes=1).errors.isnan().all())


def test_attention_has_products():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    h = ng.Hessian(lambda: net(x).square().mean(), net)
    v = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    got, grads, step = h.flat(v), [], 1e-5
    for sign in (1, -2, 1):
        with torch.no_grad():
            for n, p in net.named_parameters():
                p.add_(sign * step * v[n])
        grads.append(torch.autograd.grad(net(x).square().mean(), list(net.parameters())))
    for (n, _), ahead, behind in zip(net.named_parameters(), grads[0], grads[1]):
        torch.testing.assert_close(got[n], (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-7)


def test_parameters_frozen_later_are_left_out(problem):
    net, loss_fn, full, _ = problem
    h = ng.Hessian(lambda batch: loss_fn(), net)
    net[0].weight.requires_grad_(False)
    assert set(h.live()) == {"0.bias", "2.weight", "2.bias"}
    h.observe(None)
    live = torch.arange(21) >= 12
    expected = torch.where(live[:, None] & live, full, 0)
    torch.testing.assert_close(h.dense(), expected)
    v = torch.linspace(-1, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(h.vector_to_flat(h.flat(h.flat_to_vector(v))), expected @ v)
    eigenvalues = torch.linalg.eigvalsh(full[live][:, live])
    torch.testing.assert_close(h.top(9)[0].sort().values, eigenvalues)
    torch.testing.assert_close(h.spectrum(steps=9, probes=1)[0], eigenvalues, rtol=1e-8, atol=1e-8)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    h.indefinite = "absolute"
    ng.NaturalGradient(h, damping=0.1, weight_decay=0.1).step(torch.ones(1))
    for n, p in net.named_parameters():
        assert torch.equal(p, before[n]) == (n == "0.weight")
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of this Hessian is frozen"):
        h.top(1)


def reference(full, indefinite, damping):
    values, vectors = torch.linalg.eigh(full)
    values = values.abs() if indefinite == "absolute" else values - min(0.0, float(values[0]))
    return (vectors * (values + damping)) @ vectors.mT


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("indefinite", ["absolute", "shift"])
def test_an_indefinite_hessian_steps_where_it_is_asked_to(problem, monkeypatch, indefinite, dense):
    net, loss_fn, full, _ = problem
    if not dense:
        monkeypatch.setattr("natgrad.function_space.hessian.DENSE_PARAMETERS", 0)
    assert float(torch.linalg.eigvalsh(full)[0]) < -1e-3
    h = ng.Hessian(loss_fn, net, indefinite=indefinite)
    g = torch.linspace(-1, 1, 21, dtype=torch.float64)
    for damping in (1e-3, 0.5):
        matrix = reference(full, indefinite, damping)
        got = h.vector_to_flat(h.sharp(h.flat_to_vector(g), damping))
        torch.testing.assert_close(got, torch.linalg.solve(matrix, g), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(h.logdet(damping), torch.logdet(matrix))
    draws = torch.stack([h.vector_to_flat(h.sample(0.5, torch.Generator().manual_seed(i))) for i in range(4)])
    assert bool(draws.isfinite().all())
    torch.testing.assert_close(h.dense(), full)  # the metric itself stays as it is
    zero = h.sharp(h.flat_to_vector(torch.zeros_like(g)), 1e-3)
    assert float(h.vector_to_flat(zero).norm()) == 0


def test_saddle_free_steps_leave_a_saddle():
    """f = x² − y² + y⁴/2 from beside the saddle: minima at y = ±1, and a Newton step goes to the saddle."""

    def loss(batch):
        return w[0] ** 2 - w[1] ** 2 + w[1] ** 4 / 2

    for indefinite in ("absolute", "shift"):
        w = nn.Parameter(torch.tensor([0.5, 0.1], dtype=torch.float64))
        opt = ng.NaturalGradient(ng.Hessian(loss, {"w": w}, indefinite=indefinite), damping=1e-2)
        for _ in range(60):
            opt.step(torch.ones(1))
        torch.testing.assert_close(w.detach(), torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-6, rtol=0)
    w = nn.Parameter(torch.tensor([0.5, 0.1], dtype=torch.float64))
    with pytest.raises(ValueError, match="not positive definite"):
        ng.NaturalGradient(ng.Hessian(loss, {"w": w}), damping=1e-2).step(torch.ones(1))


def test_a_krylov_space_too_small_is_said(problem, monkeypatch):
    net, loss_fn, _, _ = problem
    monkeypatch.setattr("natgrad.function_space.hessian.DENSE_PARAMETERS", 0)
    monkeypatch.setattr("natgrad.function_space.hessian.KRYLOV", 3)
    h = ng.Hessian(loss_fn, net, indefinite="absolute")
    with pytest.warns(UserWarning, match="3 products are too few"):
        h.sharp({n: torch.ones_like(p) for n, p in net.named_parameters()}, 1e-4)


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
        (
            lambda w: ng.Hessian(lambda: w.sum(), [w], indefinite="abs"),
            ValueError,
            "'refuse', 'absolute', 'shift', got 'abs'",
        ),
        (lambda w: ng.Hessian(lambda: (w**2).sum(), [w]).top(1, steps=0), ValueError, "at least 1, got 0"),
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
