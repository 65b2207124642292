"""Functions that torch differentiates wrongly in some mode: mended, against torch where it is right.

Torch is right in first and second derivatives by reverse mode at one point. Third derivatives are compared with
differences of those.
"""

import pytest
import torch
from torch import nn
from torch.func import jacfwd, jacrev, vmap
from torch.nn import functional as F

import natgrad as ng
from natgrad.function_space.forward_laplacian import RULES
from natgrad.function_space.reverse_mode import Mending
from natgrad.operators import laplacian

torch.set_num_threads(1)
D = torch.float64
generator = torch.Generator().manual_seed(0)
A, B, V = (torch.randn(*s, generator=generator, dtype=D) for s in ((4, 4, 3), (4, 4), (4,)))
POINTS = torch.randn(3, 3, generator=generator, dtype=D)


def mat(x):
    return torch.tanh(A @ x) + B + 3 * torch.eye(4, dtype=D)


def sides(x):
    return V[:, None] * x[0] + mat(x)[:, :2] * x[1].sin()


def spd(x):
    return mat(x) @ mat(x).mT


FUNCTIONS = {
    "det": lambda x: torch.linalg.det(mat(x)),
    "det of a method": lambda x: -mat(x)[[1, 0, 2, 3]].det(),
    "slogdet": lambda x: torch.linalg.slogdet(mat(x)).logabsdet,
    "logdet": lambda x: torch.logdet(spd(x)),
    "solve": lambda x: torch.linalg.solve(mat(x), V),
    "solve with sides that move": lambda x: torch.linalg.solve(mat(x), sides(x)),
    "solve of a batch": lambda x: torch.linalg.solve(torch.stack([mat(x), spd(x)]), torch.stack([V, V * x[0]])),
    "solve from the right": lambda x: torch.linalg.solve(mat(x), sides(x).mT, left=False),
    "lu_solve": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(mat(x)), sides(x)),
    "lu_solve, adjoint": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(mat(x)), sides(x), adjoint=True),
    "lu_solve, right": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(mat(x)), sides(x).mT, left=False),
    "tensorsolve": lambda x: torch.linalg.tensorsolve(mat(x).reshape(2, 2, 4), (V * x[0]).reshape(2, 2)),
    "cholesky inverse": lambda x: torch.cholesky_inverse(torch.linalg.cholesky(spd(x))),
    "upper cholesky inverse": lambda x: torch.cholesky_inverse(torch.linalg.cholesky(spd(x), upper=True), upper=True),
    "layer norm": lambda x: F.layer_norm(mat(x), (4,), V, V.sin()),
    "layer norm of two axes": lambda x: F.layer_norm(mat(x), (4, 4)),
    "instance norm": lambda x: F.instance_norm(mat(x)[None], weight=V, bias=V.sin()),
    "batch norm": lambda x: F.batch_norm(mat(x), None, None, V, training=True),
}


def close(got, expected, bound=1e-9):
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= bound * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_mode_mapped_and_not(name):
    plain = FUNCTIONS[name]
    f = Mending(plain)
    value, first, second = (torch.stack([d(x) for x in POINTS]) for d in (plain, jacrev(plain), jacrev(jacrev(plain))))
    close(vmap(f)(POINTS), value)
    for mode in (jacrev, jacfwd):
        close(vmap(mode(f))(POINTS), first)
        for over in (jacrev, jacfwd):
            close(vmap(over(mode(f)))(POINTS), second)
    close(jacfwd(jacfwd(f))(POINTS[0]), second[0])
    with torch.no_grad():  # torch takes another way there
        close(vmap(jacrev(f))(POINTS), first)
        close(vmap(jacrev(jacrev(f)))(POINTS), second)
    h = 1e-5
    ends = [
        torch.stack([jacrev(jacrev(plain))(POINTS[0] + s * h * e) for e in torch.eye(3, dtype=D)], -1) for s in (1, -1)
    ]
    close(vmap(jacrev(jacrev(jacrev(f))))(POINTS)[0], (ends[0] - ends[1]) / (2 * h), 1e-6)


def test_values_and_errors_are_those_of_torch():
    m = torch.stack([B, B[[1, 0, 2, 3]], torch.eye(4, dtype=D)])
    for f in (torch.linalg.det, torch.linalg.slogdet, torch.logdet, torch.inverse):
        for got, expected in zip(Mending(f)(m), f(m)):
            torch.testing.assert_close(got, expected, equal_nan=True)
    singular = torch.zeros(2, 2, dtype=D)
    assert float(Mending(torch.linalg.det)(singular)) == 0
    assert Mending(torch.linalg.slogdet)(singular) == torch.linalg.slogdet(singular)
    with pytest.raises(RuntimeError, match=r"singular|zero"):
        Mending(torch.linalg.solve)(singular, singular[0])
    with pytest.raises(ValueError, match=r"over \(3,\) of a tensor of shape \(2, 4\)"):
        Mending(F.layer_norm)(torch.ones(2, 4), (3,))


def test_determinants_vanish_smoothly():
    """det of [[x, y], [x, y²]] at y = 1 is singular, its second derivatives are not zero."""

    def det(x):
        return torch.linalg.det(torch.stack([x[:2], torch.stack([x[0], x[1] ** 2])]))

    x = torch.tensor([0.5, 1.0], dtype=D)  # x y² − x y
    expected = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=D)
    close(vmap(jacrev(jacrev(Mending(det))))(x[None])[0], expected)
    close(ng.operators.laplacian(det, x), expected.trace())
    close(ng.operators.gradient(det, x), torch.tensor([0.0, 0.5], dtype=D))


def test_distances_have_a_second_derivative():
    def u(x):
        return torch.cdist(x[None], POINTS)[0].exp() @ V[:3]

    def plain(x):
        return (x - POINTS).square().sum(1).sqrt().exp() @ V[:3]

    x = torch.tensor([0.3, 0.1, -0.2], dtype=D)
    close(ng.operators.laplacian(u, x), jacrev(jacrev(plain))(x).trace())
    close(vmap(jacrev(Mending(u)))(x[None])[0], jacrev(plain)(x))


@pytest.mark.parametrize("name", ["det", "solve", "layer norm"])
def test_any_transform_in_a_term_of_a_metric(name):
    """A term may differentiate u by torch.func itself."""
    net = torch.nn.Linear(3, 3).double()

    def through(modes, f):
        return lambda u, x: modes[1](modes[0](lambda y: f(u(y)).sum()))(x).trace()

    plain = through((jacrev, jacrev), FUNCTIONS[name])
    params = {n: p.detach() for n, p in net.named_parameters()}

    def residual(p, x):
        return plain(lambda y: torch.func.functional_call(net, p, (y,)), x)

    root = torch.stack([residual(params, x) for x in POINTS]) / 3**0.5
    for modes in ((jacrev, jacfwd), (jacfwd, jacfwd), (jacfwd, jacrev)):
        metric = ng.GaussNewton(net, {"inside": through(modes, FUNCTIONS[name])})
        metric.observe({"inside": POINTS})
        close(metric.root, root)
        h, n = 1e-5, "bias"
        ends = [metric.residuals.loss({**params, n: params[n] + s * h * torch.eye(3, dtype=D)[0]}) for s in (1, -1)]
        assert float(metric.gradient()[n][0]) == pytest.approx(float((ends[0] - ends[1]) / (2 * h)), rel=1e-6)


@pytest.mark.parametrize("name", ["det", "slogdet", "solve", "cholesky inverse"])
def test_a_wave_function_of_determinants(name):
    """The metric of a quantum state, against derivatives at one state at a time."""

    class Wave(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = torch.nn.Linear(3, 3).double()

        def forward(self, x):
            return FUNCTIONS[name](self.inside(x)).sum()

    torch.manual_seed(0)
    wave, weights = Wave(), torch.tensor([0.2, 0.5, 0.3], dtype=D)
    params = {n: p.detach() for n, p in wave.named_parameters()}
    slopes = [jacrev(lambda p, x=x: torch.func.functional_call(wave, p, (x,)))(params) for x in POINTS]
    rows = torch.stack([torch.cat([s[n].reshape(-1) for n in params]) for s in slopes])
    local = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    metric = ng.QuantumGeometry(wave)
    metric.observe({"states": POINTS, "weights": weights, "local_energy": local})
    centred = rows - weights @ rows
    close(metric.dense(), centred.mT @ (weights[:, None] * centred))
    close(metric.vector_to_flat(metric.gradient()), 2 * centred.mT @ (weights * (local - weights @ local)))


def test_tensors_may_be_given_by_torchs_names() -> None:
    a, b = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    lu, pivots = torch.linalg.lu_factor(a)
    for named, expected in (
        (lambda: torch.linalg.solve(A=a, B=b), torch.linalg.solve(a, b)),
        (lambda: torch.linalg.solve(a, B=b), torch.linalg.solve(a, b)),
        (lambda: torch.linalg.det(A=a), torch.linalg.det(a)),
        (lambda: torch.linalg.slogdet(A=a)[1], torch.linalg.slogdet(a)[1]),
        (lambda: torch.logdet(input=a @ a.mT), torch.logdet(a @ a.mT)),
        (lambda: torch.linalg.lu_solve(LU=lu, pivots=pivots, B=b), torch.linalg.lu_solve(lu, pivots, b)),
    ):
        torch.testing.assert_close(Mending(named)(), expected)


def test_a_norm_by_running_statistics_has_no_jet(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so at once, where calling itself would go through the whole stack first."""
    calls = []
    rule = RULES[F.batch_norm]
    monkeypatch.setitem(RULES, F.batch_norm, lambda *a, **k: (calls.append(1), rule(*a, **k))[1])
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double().eval()
    x = torch.rand(2, dtype=torch.float64)
    found = laplacian(lambda y: net(y[None])[0, 0], x)
    torch.testing.assert_close(found, torch.func.hessian(lambda y: net(y[None])[0, 0])(x).trace())
    assert len(calls) <= 1
