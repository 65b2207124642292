"""GaussNewton, Energy, combinations: against dense torch.func oracles in float64."""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

import natgrad as ng
from natgrad.function_space.jacobian import JacobianOperator, gram
from natgrad.function_space.jacobian_metric import JacobianMetric
from natgrad.function_space.solvers import Dense, Kernel, free_bytes
from natgrad.operators import laplacian

torch.set_num_threads(1)


def tanh_net(*widths, seed=0):
    torch.manual_seed(seed)
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b)] + [nn.Tanh()] * (i < len(widths) - 2)
    return nn.Sequential(*layers).double()


TERMS = {"interior": lambda u, x, f: laplacian(u, x) + f, "boundary": lambda u, x: u(x)}
WEIGHTS = {"boundary": 3.0}


def batch(n=9, m=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(n, 2, generator=g, dtype=torch.float64)
    return {
        "interior": (points, points.sum(1)),
        "boundary": torch.rand(m, 2, generator=g, dtype=torch.float64),
    }


def oracle(net, data):
    """(r, J) stacked and scaled, with nested reverse mode instead of the forward Laplacian."""
    params = {n: p.detach() for n, p in net.named_parameters()}
    x, f = data["interior"]
    xb = data["boundary"]

    def residuals(p):
        def u(y):
            return functional_call(net, p, (y,))[0]

        inside = vmap(lambda y, s: torch.trace(torch.func.hessian(u)(y)) + s)(x, f)
        return torch.cat([inside / math.sqrt(len(x)), math.sqrt(3.0 / len(xb)) * vmap(u)(xb)])

    jac = jacrev(residuals)(params)
    r = residuals(params)
    return r, torch.cat([jac[n].reshape(len(r), -1) for n in params], dim=1)


def metric_of(net, data, **options):
    metric = ng.GaussNewton(net, TERMS, WEIGHTS, **options)
    loss = metric.observe(data)
    return metric, loss


@pytest.fixture
def problem():
    net = tanh_net(2, 6, 4, 1)
    data = batch()
    return net, data, *oracle(net, data)


def test_loss_gradient_and_metric_are_those_of_the_stacked_residuals(problem):
    net, data, r, jac = problem
    metric, loss = metric_of(net, data)
    torch.testing.assert_close(loss, 0.5 * r @ r)
    torch.testing.assert_close(metric.vector_to_flat(metric.gradient()), jac.mT @ r)
    torch.testing.assert_close(metric.dense(), jac.mT @ jac)
    torch.testing.assert_close(metric.vector_to_flat(metric.diagonal()), (jac.mT @ jac).diagonal())
    torch.testing.assert_close(metric.trace(), (jac**2).sum())
    v = metric.flat_to_vector(torch.linspace(-1, 1, jac.shape[1], dtype=torch.float64))
    torch.testing.assert_close(metric.vector_to_flat(metric.flat(v)), jac.mT @ (jac @ metric.vector_to_flat(v)))
    assert metric.loss_at({}) == pytest.approx(float(loss), rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"solver": s} for s in ("dense", "kernel", "cg")]
    + [{"solver": "dense", "chunk": 2}, {"solver": "kernel", "chunk": 3}],
)
@pytest.mark.parametrize("relative", [1.0, 1e-2, 1e-4])
def test_solvers_agree_with_a_dense_solve(problem, options, relative):
    net, data, r, jac = problem
    metric, _ = metric_of(net, data, **options)
    full = jac.mT @ jac
    damping = relative * float(torch.linalg.matrix_norm(full, 2))
    shifted = full + damping * torch.eye(len(full), dtype=torch.float64)
    for got, right in (
        (metric.direction(damping), jac.mT @ r),
        (
            metric.sharp(metric.flat_to_vector(torch.cos(torch.arange(len(full)).double())), damping),
            torch.cos(torch.arange(len(full)).double()),
        ),
    ):
        expected = torch.linalg.solve(shifted, right)
        assert float((metric.vector_to_flat(got) - expected).norm() / expected.norm()) < 1e-8


@pytest.mark.parametrize("solver", ["dense", "kernel"])
def test_logdet_and_sample(problem, solver):
    net, data, _, jac = problem
    metric, _ = metric_of(net, data, solver=solver)
    metric.rows = JacobianOperator.of(jac)  # the same rows, quicker to draw with
    shifted = jac.mT @ jac + 0.5 * torch.eye(jac.shape[1], dtype=torch.float64)
    torch.testing.assert_close(metric.logdet(0.5), torch.logdet(shifted))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([metric.vector_to_flat(metric.sample(0.5, generator)) for _ in range(3000)])
    covariance = draws.mT @ draws / len(draws)
    inverse = torch.linalg.inv(shifted)
    assert float((covariance - inverse).norm() / inverse.norm()) < 0.2
    whitened = torch.linalg.cholesky(shifted).mT @ draws.mT  # standard normal
    assert float(whitened.square().mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("solver", ["kernel", "dense"])
def test_tiny_damping_leaves_no_more_residual_than_least_squares(solver):
    net, data = tanh_net(2, 16, 16, 1), batch(60, 20)
    r, jac = oracle(net, data)
    damping = 1e-10
    metric, _ = metric_of(net, data, solver=solver)
    delta = metric.vector_to_flat(metric.direction(damping))
    stacked = torch.cat([jac, math.sqrt(damping) * torch.eye(jac.shape[1], dtype=torch.float64)])
    target = torch.cat([r, torch.zeros(jac.shape[1], dtype=torch.float64)])
    best = torch.linalg.lstsq(stacked, target[:, None], driver="gelsd").solution[:, 0]
    left, floor = (stacked @ delta - target).norm(), (stacked @ best - target).norm()
    assert float(left) <= float(floor) * (1 + 1e-6)
    cancelled = metric.vector_to_flat(
        ng.Metric.direction(metric, damping)
    )  # sharp(gradient): what the kernel form avoids
    assert float((stacked @ cancelled - target).norm()) >= float(left) * (1 - 1e-9)


def test_taylor_slopes_of_gradient_and_metric(problem):
    """f(θ + tv) − f − t df(v) = O(t²); minus ½t²(g(v, v) + rᵀr_vv) it is O(t³)."""
    net, data, r, _ = problem
    metric, loss = metric_of(net, data)
    g = torch.Generator().manual_seed(3)
    v = {n: torch.randn(p.shape, generator=g, dtype=torch.float64) for n, p in metric.parameters.items()}
    first = sum(float((metric.gradient()[n] * v[n]).sum()) for n in v)
    params = metric.point

    def along(t):
        return metric.residuals.values({n: p + t * v[n] for n, p in params.items()})

    bend = torch.func.jacfwd(torch.func.jacfwd(along))(torch.zeros((), dtype=torch.float64))
    second = float(metric.inner(v, v)) + float(r @ bend)
    ts = [2.0**-k for k in range(5, 9)]
    at = [metric.loss_at({n: t * x for n, x in v.items()}) - float(loss) for t in ts]
    linear = [abs(a - t * first) for a, t in zip(at, ts)]
    quadratic = [abs(a - t * first - 0.5 * t * t * second) for a, t in zip(at, ts)]
    for errors, slope in ((linear, 2), (quadratic, 3)):
        assert math.log2(errors[-2] / errors[-1]) == pytest.approx(slope, abs=0.15)


def test_acceleration_is_the_geodesic_one(problem):
    net, data, _, jac = problem
    metric, _ = metric_of(net, data, solver="dense")
    v = {n: 0.01 * torch.ones_like(p) for n, p in metric.parameters.items()}

    def along(t):
        return metric.residuals.values({n: p + t * v[n] for n, p in metric.point.items()})

    bend = torch.func.jacfwd(torch.func.jacfwd(along))(torch.zeros((), dtype=torch.float64))
    shifted = jac.mT @ jac + 0.1 * torch.eye(jac.shape[1], dtype=torch.float64)
    expected = -torch.linalg.solve(shifted, jac.mT @ bend)
    got = metric.vector_to_flat(metric.acceleration(v, 0.1))
    assert float((got - expected).norm() / expected.norm()) < 1e-4  # of the difference along v


def test_several_components_weigh_by_point(problem):
    net = tanh_net(2, 5, 3)
    x = torch.rand(7, 2, dtype=torch.float64)
    metric = ng.GaussNewton(net, {"fit": lambda u, x: u(x) - 1})
    loss = metric.observe({"fit": x})
    torch.testing.assert_close(loss, 0.5 * (net(x) - 1).square().sum(1).mean().detach())
    jac = jacrev(lambda p: vmap(lambda y: functional_call(net, p, (y,)))(x).reshape(-1))(
        {n: p.detach() for n, p in net.named_parameters()}
    )
    jac = torch.cat([j.reshape(21, -1) for j in jac.values()], dim=1) / math.sqrt(7)
    torch.testing.assert_close(metric.dense(), jac.mT @ jac)


def test_auto_says_which_solver_and_why():
    few, many = metric_of(tanh_net(2, 6, 4, 1), batch())[0], metric_of(tanh_net(2, 3, 1), batch(40, 20))[0]
    assert few.pick() == "kernel"
    assert few.chosen == "kernel: 14 rows are fewer than 51 parameters"
    assert many.pick() == "dense"
    assert "13 parameters" in many.chosen


def test_observe_twice_forgets_the_first_batch_and_frozen_parameters_stay():
    net = tanh_net(2, 6, 4, 1)
    net[0].bias.requires_grad_(False)
    metric, _ = metric_of(net, batch(seed=5))
    metric.direction(1e-3)
    metric.observe(batch())
    fresh, _ = metric_of(net, batch())
    torch.testing.assert_close(metric.direction(1e-3), fresh.direction(1e-3))
    assert "0.bias" not in metric.names
    assert metric.resampled
    same = batch()
    metric.observe(same)
    metric.observe(same)
    assert not metric.resampled


def test_the_optimizer_converges_on_a_small_poisson_problem():
    net = tanh_net(2, 16, 1, seed=1)
    x = torch.rand(80, 2, dtype=torch.float64)
    data = {
        "interior": (x, 2 * math.pi**2 * torch.sin(math.pi * x).prod(1)),
        "boundary": torch.tensor(
            [[0.0, t / 9] for t in range(10)]
            + [[1.0, t / 9] for t in range(10)]
            + [[t / 9, 0.0] for t in range(10)]
            + [[t / 9, 1.0] for t in range(10)],
            dtype=torch.float64,
        ),
    }
    metric = ng.GaussNewton(net, TERMS)
    opt = ng.NaturalGradient(metric)
    losses = [float(opt.step(data)) for _ in range(70)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 1e-4 * losses[0]
    assert opt.info["solver"].startswith("dense")


# Kronecker blocks ---------------------------------------------------------------------------------------------


def test_conjugate_gradients_name_the_solver_that_has_a_determinant(problem):
    net, data, _, _ = problem
    metric, _ = metric_of(net, data, solver="cg")
    with pytest.raises(NotImplementedError, match=r'no determinant; take solver="kernel" \(14 rows, 51 parameters\)'):
        metric.logdet(0.1)
    metric, _ = metric_of(tanh_net(2, 3, 1), batch(40, 20), solver="cg")
    with pytest.raises(NotImplementedError, match=r'take solver="dense" \(13 parameters, 60 rows\)'):
        metric.logdet(0.1)


# Energy -------------------------------------------------------------------------------------------------------


def ritz(n=30):
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    w = torch.full_like(x, 2 / (n - 1))
    w[[0, -1]] /= 2
    return {"interior": (x[:, None], w, torch.cos(x))}


DENSITY = {"interior": lambda u, du, x, f: 0.5 * du @ du + 0.25 * u**4 - f * u}


def test_energy_metric_is_the_second_variation():
    net, data = tanh_net(1, 7, 1), ritz()
    metric = ng.Energy(net, DENSITY)
    energy = metric.observe(data)
    params = {n: p.detach() for n, p in net.named_parameters()}
    x, w, f = data["interior"]

    def u(p, y):
        return functional_call(net, p, (y,))[0]

    def slope(p, y):
        return torch.func.grad(u, argnums=1)(p, y)[0]

    def flat(jac):
        return torch.cat([jac[n].reshape(len(x), -1) for n in params], dim=1)

    du = flat(vmap(jacrev(u), (None, 0))(params, x))  # ∂u/∂θ
    ds = flat(vmap(jacrev(slope), (None, 0))(params, x))  # ∂u′/∂θ
    value = vmap(u, (None, 0))(params, x)
    expected = ds.mT @ (w[:, None] * ds) + du.mT @ (w[:, None] * 3 * value[:, None] ** 2 * du)
    torch.testing.assert_close(metric.dense(), expected)

    def total(p):
        return (
            w
            * (
                0.5 * vmap(slope, (None, 0))(p, x) ** 2
                + 0.25 * vmap(u, (None, 0))(p, x) ** 4
                - f * vmap(u, (None, 0))(p, x)
            )
        ).sum()

    torch.testing.assert_close(energy, total(params))
    torch.testing.assert_close(metric.gradient(), torch.func.grad(total)(params))
    for solver in ("dense", "kernel", "cg"):
        other = ng.Energy(net, DENSITY, solver=solver, chunk=7)
        other.observe(data)
        shifted = expected + 1e-2 * torch.eye(len(expected), dtype=torch.float64)
        torch.testing.assert_close(
            other.vector_to_flat(other.direction(1e-2)),
            torch.linalg.solve(shifted, metric.vector_to_flat(metric.gradient())),
            rtol=1e-7,
            atol=1e-9,
        )


def test_energy_of_several_outputs_and_a_quadratic_form():
    net = tanh_net(2, 5, 3)
    x = torch.rand(8, 2, dtype=torch.float64)
    w = torch.full((8,), 1 / 8, dtype=torch.float64)
    metric = ng.Energy(net, {"fit": lambda u, du, x: 0.5 * (u @ u) + 0.0 * du.sum()})
    metric.observe({"fit": (x, w)})
    gauss = ng.GaussNewton(net, {"fit": lambda u, x: u(x)})
    gauss.observe({"fit": x})
    torch.testing.assert_close(metric.dense(), gauss.dense())


def test_energy_converges():
    net = tanh_net(1, 12, 1, seed=1)
    data = ritz(200)
    opt = ng.NaturalGradient(ng.Energy(net, DENSITY))
    energies = [float(opt.step(data)) for _ in range(25)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(energies))
    assert energies[-2] - energies[-1] < 1e-6


@pytest.mark.parametrize(
    ("densities", "data", "error", "words"),
    [
        ({"interior": lambda u, du, x, f: torch.cat([du, du])}, ritz(), ValueError, "must return a scalar"),
        ({"interior": lambda u, du, x, f: f}, ritz(), ValueError, "does not depend on u"),
        ({"interior": lambda u, du, x, f: u / 0}, ritz(), ValueError, "not finite at 30 of 30"),
        (DENSITY, {"interior": ritz()["interior"][0]}, ValueError, "quadrature weights"),
        ({}, ritz(), TypeError, "densities must be a dict"),
    ],
)
def test_energy_names_what_is_wrong(densities, data, error, words):
    with pytest.raises(error, match=words):
        ng.Energy(tanh_net(1, 4, 1), densities).observe(data)


# sums ---------------------------------------------------------------------------------------------------------


def test_sums_are_metrics_in_the_kernel_form_too():
    net = tanh_net(2, 6, 4, 1)
    first, second = (
        ng.GaussNewton(net, TERMS, solver="kernel"),
        ng.GaussNewton(net, TERMS, WEIGHTS, solver="kernel"),
    )
    total = first + 0.5 * second
    loss = total.observe(batch())
    expected = first.dense() + 0.5 * second.dense()
    torch.testing.assert_close(total.dense(), expected)
    torch.testing.assert_close(loss, first.loss + 0.5 * second.loss)
    shifted = expected + 1e-2 * torch.eye(len(expected), dtype=torch.float64)
    df = total.vector_to_flat(total.gradient())
    torch.testing.assert_close(
        total.vector_to_flat(total.direction(1e-2)), torch.linalg.solve(shifted, df), rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(
        total.vector_to_flat(total.sharp(total.gradient(), 1e-2)),
        torch.linalg.solve(shifted, df),
        rtol=1e-8,
        atol=1e-10,
    )
    torch.testing.assert_close(total.logdet(1e-2), torch.logdet(shifted))
    torch.testing.assert_close(total.vector_to_flat(total.diagonal()), expected.diagonal())
    before = float(loss)
    opt = ng.NaturalGradient(total)
    opt.step(batch())
    assert float(total.observe(batch())) < before


def test_sum_with_a_metric_without_rows():
    net = tanh_net(2, 3, 1)
    gauss = ng.GaussNewton(net, TERMS)
    gauss.observe(batch())
    total = gauss + 0.25 * ng.Euclidean(net)
    torch.testing.assert_close(
        total.sharp(gauss.gradient(), 0.75), gauss.sharp(gauss.gradient(), 1.0), rtol=1e-7, atol=1e-10
    )
    with pytest.raises(ValueError, match="positive number, got -1"):
        -1.0 * gauss
    with pytest.raises(TypeError, match="metrics add to metrics"):
        gauss + 3
    with pytest.raises(ValueError, match="same parameters"):
        gauss + ng.Euclidean(tanh_net(2, 3, 1))


# bad input ----------------------------------------------------------------------------------------------------

X = torch.rand(6, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("term", "data", "error", "words"),
    [
        (
            lambda u, x: u(x).reshape(1, 1),
            X,
            ValueError,
            r"returned shape \(1, 1\); at ONE point a residual has shape \(\) or",
        ),
        (lambda u, x: 3.0, X, TypeError, "must return the residual at one point"),
        (lambda u, x: x.sum(), X, ValueError, "'interior' does not depend on the parameters"),
        (lambda u, x: u(x).detach(), X, ValueError, "does not depend on the parameters"),
        (
            lambda u, x: u(x) / torch.where(x[0] > X[:, 0].median(), 0.0, 1.0),
            X,
            ValueError,
            r"'interior': the residual is not finite at 3 of 6 points: point \d at \[0\.",
        ),
        (
            lambda u, x: u(x),
            torch.randint(0, 2, (6, 2)),
            TypeError,
            r"int64; points are differentiated.*\.to\(torch.float64\)",
        ),
        (lambda u, x: u(x), X.float(), TypeError, "float32 but the parameters are torch.float64"),
        (
            lambda u, x, f: u(x),
            (X, X[:3, 0]),
            ValueError,
            r"same positive number of points everywhere, got \[6, 3\]",
        ),
        (lambda u, x: u(x), X[:0], ValueError, "positive number of points"),
        (lambda u, x: u(x), [1.0, 2.0], TypeError, "must hold tensors"),
    ],
)
def test_bad_terms_and_batches_are_named(term, data, error, words):
    net = tanh_net(2, 4, 1)
    before = {n: p.clone() for n, p in net.named_parameters()}
    opt = ng.NaturalGradient(ng.GaussNewton(net, {"interior": term}))
    with pytest.raises(error, match=words):
        opt.step({"interior": data})
    assert all(torch.equal(before[n], p) for n, p in net.named_parameters())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda net: ng.GaussNewton(net, {}), TypeError, "terms must be a dict"),
        (lambda net: ng.GaussNewton(net, TERMS, {"rand": 1.0}), ValueError, r"do not exist: \['rand'\]"),
        (lambda net: ng.GaussNewton(net, TERMS, {"boundary": -1.0}), ValueError, "non-negative"),
        (
            lambda net: ng.GaussNewton(net, TERMS, solver="qr"),
            ValueError,
            "solver must be one of 'auto', 'dense'",
        ),
        (lambda net: ng.GaussNewton(net, TERMS, chunk=0), ValueError, "at least 1"),
        (
            lambda net: ng.GaussNewton(net, TERMS).observe({"interior": X}),
            ValueError,
            r"missing \['boundary'\]",
        ),
        (lambda net: ng.GaussNewton(net, TERMS).observe(X), TypeError, "a batch is a dict"),
        (lambda net: ng.GaussNewton(net, TERMS).dense(), RuntimeError, "has seen no batch yet"),
        (
            lambda net: metric_of(net, batch())[0].sharp(metric_of(net, batch())[0].gradient(), 0.0),
            ValueError,
            "damping must be a positive",
        ),
    ],
)
def test_construction_errors(make, error, words):
    with pytest.raises(error, match=words):
        make(tanh_net(2, 4, 1))


def test_matrices_that_do_not_fit_are_refused_with_their_bytes(monkeypatch):
    net = tanh_net(2, 6, 4, 1)
    metric, _ = metric_of(net, batch(), solver="dense")
    monkeypatch.setattr("natgrad.linalg.cholesky.free_bytes", lambda device: 10_000)
    with pytest.raises(MemoryError, match=r'51×51 factor .* needs 41,616 bytes .* take solver="cg"'):
        metric.direction(1e-3)
    metric, _ = metric_of(net, batch(40, 20), solver="kernel")
    with pytest.raises(MemoryError, match=r'60×60 kernel matrix needs 57,600 bytes .* take solver="dense"'):
        metric.direction(1e-3)
    with pytest.raises(MemoryError, match="51×51 metric"):
        _dense_with(metric, monkeypatch)
    assert free_bytes(torch.device("cpu")) > 0


def _dense_with(metric, monkeypatch):
    monkeypatch.setattr("natgrad.linalg.cholesky.free_bytes", lambda device: 1_000)
    return metric.dense()


def test_relu_laplacian_warns():
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    metric = ng.GaussNewton(net, TERMS)
    with pytest.warns(UserWarning, match="no second derivative"):
        metric.observe(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric.observe(batch())


def test_rows_stack_and_gram():
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    rows = JacobianOperator.stack([(1.0, JacobianOperator.of(a)), (0.25, JacobianOperator.of(b))])
    full = torch.cat([a, 0.5 * b])
    torch.testing.assert_close(rows.matrix(), full)
    torch.testing.assert_close(rows.jvp(torch.ones(3).double()), full.sum(1))
    torch.testing.assert_close(rows.vjp(torch.ones(9).double()), full.sum(0))
    torch.testing.assert_close(gram(full), full @ full.mT)
    metric = JacobianMetric({"w": nn.Parameter(torch.zeros(3, dtype=torch.float64))})
    metric.rows = rows
    torch.testing.assert_close(metric.dense(), full.mT @ full)


@pytest.mark.parametrize("solver", [Dense, Kernel])
def test_a_factor_takes_another_damping_without_the_rows(solver):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 9, dtype=torch.float64, generator=generator)
    c, passes = torch.randn(6, dtype=torch.float64, generator=generator), []

    def chunks():
        passes.append(None)
        return iter([matrix])

    rows = JacobianOperator(6, 9, chunks, matrix.mv, matrix.mT.mv, matrix)
    first = solver(rows, 1e-3)
    again = first.damped(1e-1)
    assert len(passes) == 1
    torch.testing.assert_close(again.pull(c), solver(JacobianOperator.of(matrix), 1e-1).pull(c), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first.pull(c), solver(JacobianOperator.of(matrix), 1e-3).pull(c), rtol=1e-10, atol=1e-12)
    metric = JacobianMetric({"w": nn.Parameter(torch.zeros(9, dtype=torch.float64))}, solver.__name__.lower())
    metric.rows = JacobianOperator.of(matrix)
    for damping in (1e-3, 1e-1, 1e-2):  # more, and less again
        torch.testing.assert_close(
            metric.factor(damping).pull(c), solver(JacobianOperator.of(matrix), damping).pull(c), rtol=1e-10, atol=1e-12
        )
