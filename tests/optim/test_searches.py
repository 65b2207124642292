"""Step rules on problems with known answers."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call

import natgrad as ng
from natgrad.function_space.units import in_units
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.line_search import GridSearch, along, lowest
from natgrad.optim.spring import Spring
from natgrad.optim.step_rule import Options
from natgrad.optim.trust_region import TrustRegion

torch.set_num_threads(1)


class Curve(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))

    def forward(self, x):
        return torch.stack([10 * (self.w[1] - self.w[0] ** 2), 1 - self.w[0]]) + 0 * x.sum()


def rosenbrock():
    """Rosenbrock's function as residuals (10(y − x²), 1 − x): a curved valley, minimum at (1, 1)."""
    net = Curve()
    return (
        net,
        ng.GaussNewton(net, {"r": lambda u, x: u(x)}, solver="dense"),
        {"r": torch.zeros(1, 1, dtype=torch.float64)},
    )


def linear(rows=12, columns=5, seed=0):
    """A linear least-squares problem, on which Gauss–Newton is exact."""
    torch.manual_seed(seed)
    net = nn.Linear(columns, 1, bias=False).double()
    x, y = torch.randn(rows, columns, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    metric = ng.GaussNewton(net, {"fit": lambda u, x, y: u(x) - y}, solver="dense")
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return net, metric, {"fit": (x, y)}, best


@pytest.mark.parametrize("rule", [GridSearch(), LevenbergMarquardt()])
def test_searches_follow_the_valley_downhill(rule):
    net, metric, batch = rosenbrock()
    opt = ng.NaturalGradient(metric, step=rule)
    losses = [float(opt.step(batch)) for _ in range(60)]
    assert all(b <= a for a, b in itertools.pairwise(losses))
    torch.testing.assert_close(net.w.detach(), torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert opt.info["loss_after"] <= opt.info["loss"]


def test_geodesic_acceleration_takes_longer_steps_in_a_curved_valley():
    reached = {}
    for geodesic in (True, False):
        _, metric, batch = rosenbrock()
        opt = ng.NaturalGradient(metric, step=GridSearch(geodesic=geodesic))
        opt.step(batch)
        opt.step(batch)
        reached[geodesic] = opt.info["loss_after"]
    assert reached[True] < reached[False]


def test_grid_search_takes_the_best_length_on_the_grid():
    _, metric, batch = rosenbrock()
    opt = ng.NaturalGradient(metric, step=GridSearch(geodesic=False, adapt=False))
    metric.observe(batch)
    v = {n: -d for n, d in metric.direction(1e-10).items()}
    by_hand = min((metric.loss_at(along(v, None, 0.5**k)), 0.5**k) for k in range(31))
    opt.step(batch)
    assert opt.info["length"] == by_hand[1]
    assert opt.info["loss_after"] == pytest.approx(by_hand[0])


def test_grid_search_keeps_the_parameters_where_nothing_helps():
    net, metric, batch, best = linear()
    with torch.no_grad():
        net.weight.copy_(best[None])
    opt = ng.NaturalGradient(metric)
    opt.step(batch)
    assert float((net.weight.detach()[0] - best).norm()) < 1e-12
    assert opt.info["accepted"] in (True, False)


def test_damping_follows_short_steps_and_state_goes_on():
    rule = GridSearch()
    rule._follow(2**-9, ng.Euclidean(nn.Linear(1, 1)))
    assert rule._growth == 10
    other = GridSearch()
    other.load_state_dict(rule.state_dict())
    assert other._growth == 10
    rule._follow(0.5, ng.Euclidean(nn.Linear(1, 1)))
    assert rule._growth == 1


def test_lowest_searches_both_ways():
    f = {0: 9.0, 1: 4.0, 2: 3.0, 3: 5.0, 4: 6.0}.__getitem__
    assert [lowest(f, first, 4, 10.0) for first in range(5)] == [(2, 3.0)] * 5
    assert lowest(f, 4, 4, 3.5) == (2, 3.0)
    assert lowest(f, 0, 4, 1.0)[1] > 1.0  # nothing below: the caller sees it


def test_levenberg_marquardt_lowers_the_damping_where_the_model_is_right():
    _, metric, batch, _ = linear()
    rule = LevenbergMarquardt(damping=1.0)
    ng.NaturalGradient(metric, step=rule).step(batch)
    assert rule.state_dict()["damping"] == pytest.approx(1 / 3)
    assert rule.info["ratio"] > 0.75


class Exponentials(nn.Module):
    """b₁ exp(−b₂ x) + b₃ with parameters b = units · φ."""

    def __init__(self, units):
        super().__init__()
        self.units = torch.tensor(units, dtype=torch.float64)
        self.phi = nn.Parameter(torch.tensor([1.0, 0.2, 0.5], dtype=torch.float64) / self.units)

    def forward(self, x):
        b = self.units * self.phi
        return b[0] * torch.exp(-b[1] * x[0]) + b[2]


def iterates(rule, units=(1.0, 1.0, 1.0), weight=1.0, scale=1.0, steps=12):
    """b after each step of a fit, the residuals multiplied by `scale` and the loss by `weight`."""
    net = Exponentials(units)
    x = torch.linspace(0, 4, 20, dtype=torch.float64)[:, None]
    y = 3 * torch.exp(-1.3 * x[:, 0]) - 1 + 0.1 * torch.sin(9 * x[:, 0])
    metric = ng.GaussNewton(net, {"fit": lambda u, x, y: scale * (u(x) - y)}, weights={"fit": weight})
    opt = ng.NaturalGradient(metric, step=rule)
    out = []
    for _ in range(steps):
        opt.step({"fit": (x, y)})
        out.append(net.units * net.phi.detach())
    return torch.stack(out)


@pytest.mark.parametrize(
    "other",
    [
        {"units": (2.0**20, 2.0**-30, 8.0)},
        {"units": (1e6, 1e-7, 30.0)},
        {"weight": 1e8},
        {"weight": 1e-8},
        {"scale": 1e-5},
        {"units": (1e-4, 10.0, 1e5), "scale": 1e4},
    ],
)
@pytest.mark.parametrize("geodesic", [True, False])
def test_levenberg_marquardt_has_the_same_iterates_in_other_units(other, geodesic):
    plain = iterates(LevenbergMarquardt(geodesic=geodesic))
    torch.testing.assert_close(iterates(LevenbergMarquardt(geodesic=geodesic), **other), plain, rtol=1e-8, atol=1e-9)


def test_levenberg_marquardt_takes_marquardts_step():
    """(JᵀJ + λ diag JᵀJ) δ = −Jᵀr, written out."""
    net, metric, batch, _ = linear()
    x, y = batch["fit"]
    before = net.weight.detach()[0].clone()
    j, r = x / len(x) ** 0.5, (x @ before - y) / len(x) ** 0.5
    a = j.T @ j
    expected = torch.linalg.solve(a + 0.7 * a.diagonal().diag(), -j.T @ r)
    ng.NaturalGradient(metric, step=LevenbergMarquardt(damping=0.7)).step(batch)
    torch.testing.assert_close(net.weight.detach()[0] - before, expected)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_levenberg_marquardt_stays_sane_on_solved_data(noise):
    net, metric, batch, best = linear()
    batch_x = batch["fit"][0]
    y = batch_x @ best + noise * torch.randn(len(batch_x), dtype=torch.float64)
    best = torch.linalg.lstsq(batch_x, y[:, None]).solution[:, 0]
    rule = LevenbergMarquardt()
    opt = ng.NaturalGradient(metric, step=rule)
    for _ in range(60):
        opt.step({"fit": (batch_x, y)})
        assert 1e-14 <= opt.info["damping"] <= 1
    torch.testing.assert_close(net.weight.detach()[0], best, rtol=1e-7, atol=1e-7)  # √eps: the loss is flat
    with torch.no_grad():
        net.weight.mul_(2)  # it still gets away from where it was solved
    for _ in range(5):
        opt.step({"fit": (batch_x, y)})
    torch.testing.assert_close(net.weight.detach()[0], best, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("options", [{"factor": 1.0}, {"smallest": 0.0}, {"smallest": 2.0}])
def test_levenberg_marquardt_refuses_a_damping_that_cannot_follow(options):
    with pytest.raises(ValueError, match="factor must be above 1"):
        LevenbergMarquardt(**options)


def test_units_of_a_sum_are_those_of_its_parts():
    """A metric without rows of its own solves by its matrix."""
    net, metric, batch, _ = linear()
    both = metric + 0.5 * ng.Euclidean(net)
    metric.observe(batch)
    units = {"weight": torch.tensor([[1.0, 2.0, 0.5, 4.0, 3.0]], dtype=torch.float64)}
    found, s = in_units(both, units), units["weight"][0]
    expected = s[:, None] * (metric.dense() + 0.5 * torch.eye(5, dtype=torch.float64)) * s
    torch.testing.assert_close(found.dense(), expected)
    g = {"weight": torch.randn(1, 5, dtype=torch.float64)}
    solved = torch.linalg.solve(expected + 0.1 * torch.eye(5, dtype=torch.float64), g["weight"][0])
    torch.testing.assert_close(found.sharp(g, 0.1)["weight"][0], solved)
    rows = in_units(metric, units)
    torch.testing.assert_close(rows.dense(), s[:, None] * metric.dense() * s)
    torch.testing.assert_close(rows.gradient()["weight"][0], s * metric.gradient()["weight"][0])


def test_grid_search_is_not_held_back_by_units_in_which_its_damping_is_large():
    units = (1e9, 1.0, 1.0)  # a derivative of 1e9: the others are far below; and one of 1e-7
    at = iterates(GridSearch(), units=(1e-9, 1.0, 1e-9), steps=15)[-1]
    torch.testing.assert_close(at, iterates(GridSearch(), steps=15)[-1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(iterates(GridSearch(), units=units, steps=15)[-1], at, rtol=1e-6, atol=1e-7)


def test_kernel_spring_is_primal_spring():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double() for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    batch = {"fit": (torch.rand(8, 2, dtype=torch.float64), torch.rand(8, dtype=torch.float64))}
    terms = {"fit": lambda u, x, y: u(x) - y}

    class Primal(ng.GaussNewton):
        direction = ng.Metric.direction  # (ĝ + λ)⁻¹(df + λ prior) as it stands

    metrics = [
        ng.GaussNewton(nets[0], terms, solver="kernel"),
        ng.GaussNewton(nets[1], terms, solver="dense"),
        Primal(nets[2], terms, solver="dense"),
    ]
    opts = [ng.NaturalGradient(m, step=Spring(lr=0.5, momentum=0.9, damping=1e-2)) for m in metrics]
    for _ in range(6):
        for opt in opts:
            opt.step(batch)
    for net in nets[1:]:
        for p, q in zip(nets[0].parameters(), net.parameters()):
            assert float((p - q).detach().norm() / p.detach().norm()) < 1e-8


def test_spring_radius_bounds_the_step():
    net, metric, batch, _ = linear()
    before = net.weight.detach().clone()
    ng.NaturalGradient(metric, step=Spring(lr=1.0, radius=1e-3)).step(batch)
    assert float((net.weight - before).detach().norm()) == pytest.approx(1e-3)


def test_trust_region_bounds_the_norm_and_undoes_a_step_that_failed():
    net, metric, batch = rosenbrock()
    rule = TrustRegion(lr=1.0, damping=1e-8, radius=0.5, floor=1e-2)
    opt = ng.NaturalGradient(metric, step=rule)
    before = net.w.detach().clone()
    metric.observe(batch)
    norm = metric.dense() + 1e-2 * torch.eye(2, dtype=torch.float64)
    opt.step(batch)
    delta = net.w.detach() - before
    assert float((delta @ norm @ delta).sqrt()) == pytest.approx(0.5)
    before = net.w.detach().clone()
    rule._last, rule._promise = (
        {"w": torch.tensor([0.5, 0.5], dtype=torch.float64)},
        (-1e9, 1.0, True, 0.0),
    )  # promised far more than came
    opt.step(batch)
    torch.testing.assert_close(net.w.detach(), before - 0.5)
    assert opt.info["undone"]
    assert rule.state_dict()["radius"] < 0.5


def test_rules_serve_metrics_that_take_their_gradient_from_backward():
    net = nn.Linear(3, 1).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    opt = ng.NaturalGradient(ng.Euclidean(net), step=TrustRegion())
    opt.zero_grad()
    before = net(x).square().mean()
    before.backward()
    opt.step()
    assert float(net(x).detach().square().mean()) < float(before.detach())
    opt = ng.NaturalGradient(ng.Euclidean(net), step=GridSearch())
    with pytest.raises(TypeError, match="Euclidean cannot evaluate the loss at trial points"):
        opt.step()


def test_parameter_groups_must_agree():
    _, metric, batch, _ = linear()
    metric.observe(batch)
    with pytest.raises(ValueError, match="one damping"):
        GridSearch().options({"a": Options(1.0, 0.0, 1e-3), "b": Options(1.0, 0.0, 1e-2)})


def test_maximising_is_refused():
    net = nn.Linear(2, 1).double()
    opt = ng.NaturalGradient(ng.Euclidean(net), step=TrustRegion(), maximize=True)
    net(torch.ones(1, 2).double()).sum().backward()
    with pytest.raises(ValueError, match="TrustRegion lowers the loss"):
        opt.step()


def test_functional_call_sees_the_searched_point():
    net, metric, batch = rosenbrock()
    metric.observe(batch)
    step = {"w": torch.tensor([0.1, -0.2], dtype=torch.float64)}
    moved = functional_call(net, {"w": net.w.detach() + step["w"]}, (torch.zeros(1),))
    assert metric.loss_at(step) == pytest.approx(float(0.5 * moved @ moved))
