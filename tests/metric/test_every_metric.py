"""The battery of metrics: every verb of each against its own dense matrix. A new metric is one line in `METRICS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.metric.metric import Metric
from natgrad.optim.registry import RULES

Close = Callable[[Tensor, Tensor, float], None]
F64 = torch.float64
G = torch.Generator


def net(out: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out)).double()


def points(count: int, width: int = 3) -> Tensor:
    return torch.randn(count, width, generator=G().manual_seed(2), dtype=F64)


def fisher(structure: str) -> Metric:
    metric = ng.Fisher(net(), nn.MSELoss(), kind="exact", structure=structure)
    metric.update(points(9))
    return metric


def gauss_newton(solver: str) -> Metric:
    return ng.GaussNewton(net(1), {"fit": lambda u, x, y: u(x) - y}, solver=solver)


def energy(solver: str) -> Metric:
    return ng.Energy(net(1), {"inside": lambda u, du, x: 0.5 * du @ du + 0.25 * u**4}, solver=solver)


def quantum(solver: str) -> Metric:
    return ng.QuantumGeometry(net(1), solver=solver)


def hessian() -> Metric:
    model, x = net(1), points(10)
    return ng.Hessian(lambda: (model(x) - x[:, :1]).square().mean(), model)


class Weighted(Metric):
    """A metric of one's own: ĝ = diag(1, 2, 3, …), by `flat` and `sharp` alone."""

    def _weights(self) -> dict[str, Tensor]:
        size = sum(p.numel() for p in self.parameters.values())
        return self.flat_to_vector(torch.arange(1, size + 1).double())

    def flat(self, v: Any) -> dict[str, Tensor]:
        return {n: t * w for (n, t), w in zip(self.check(v, "v").items(), self._weights().values())}

    def sharp(self, df: Any, damping: float) -> dict[str, Tensor]:
        damping = self.check_damping(damping)
        return {n: t / (w + damping) for (n, t), w in zip(self.check(df, "df").items(), self._weights().values())}


def total() -> Metric:
    model = net(1)
    first, second = (ng.GaussNewton(model, {"fit": lambda u, x, y: u(x) - y}, solver="dense") for _ in range(2))
    return 0.5 * first + 2.0 * second


FIT = {"fit": (points(11), points(11)[:, 0])}
INSIDE = {"inside": (points(8), torch.full((8,), 0.125, dtype=F64))}
STATES = {"states": points(10), "weights": torch.full((10,), 0.1, dtype=F64), "local_energy": points(10)[:, 0]}


class Line(NamedTuple):
    build: Callable[[], Metric]
    semidefinite: bool = True
    determinant: bool = True  # whether there are `logdet` and `sample`
    batch: Any = None  # of a metric that makes its own gradient

    @property
    def own_gradient(self) -> bool:
        return self.batch is not None

    def make(self) -> Metric:
        """The metric, once it has seen data."""
        metric = self.build()
        if self.own_gradient:
            metric.observe(self.batch)
        return metric


METRICS: dict[str, Line] = {
    "euclidean": Line(lambda: ng.Euclidean(net())),
    "one's own": Line(lambda: Weighted(dict(net().named_parameters()))),
    **{f"fisher, {s}": Line(lambda s=s: fisher(s)) for s in ("dense", "block", "diagonal", "kfac", "ekfac", "input")},  # type: ignore[misc]
    **{
        f"{build.__name__}, {s}": Line(lambda s=s, build=build: build(s), determinant=s != "cg", batch=batch)  # type: ignore[misc]
        for build, batch in ((gauss_newton, FIT), (energy, INSIDE), (quantum, STATES))
        for s in ("dense", "kernel", "cg")
    },
    "hessian": Line(hessian, semidefinite=False, batch=()),
    "a multiple": Line(lambda: 3.0 * Weighted(dict(net().named_parameters()))),
    "a sum": Line(lambda: ng.Euclidean(model := net()) + 0.5 * Weighted(dict(model.named_parameters()))),
    "a sum of rows": Line(total, batch=FIT),
}
each = pytest.mark.parametrize("name", METRICS)


def vector(metric: Metric, seed: int = 0) -> dict[str, Tensor]:
    g = G().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g, dtype=F64) for n, p in metric.parameters.items()}


def damping_of(metric: Metric, line: Line) -> float:
    """One for which ĝ + λI is positive definite."""
    return 0.3 if line.semidefinite else 0.3 - float(torch.linalg.eigvalsh(metric.dense())[0])


@each
def test_verbs_are_those_of_the_dense_matrix(name: str, close: Close) -> None:
    line = METRICS[name]
    metric = line.make()
    dense, u, v = metric.dense(), vector(metric, 1), vector(metric, 2)
    flat_u, flat_v = metric.vector_to_flat(u), metric.vector_to_flat(v)
    assert metric.names == [n for n, _ in metric.parameters.items()]
    assert dense.shape == (len(flat_u), len(flat_u))
    close(dense, dense.mT, 1e-10)
    if line.semidefinite:
        assert float(torch.linalg.eigvalsh(dense)[0]) > -1e-10
    close(metric.vector_to_flat(metric.flat(v)), dense @ flat_v, 1e-9)
    close(metric.inner(u, v), flat_u @ dense @ flat_v, 1e-8)
    close(metric.inner(u, v), metric.inner(v, u), 1e-8)
    close(metric.norm(v), (flat_v @ dense @ flat_v).clamp(min=0).sqrt(), 1e-8)
    close(metric.vector_to_flat(metric.diagonal()), dense.diagonal(), 1e-9)
    close(metric.trace(), dense.trace(), 1e-9)


@each
def test_sharp_inverts_the_damped_matrix(name: str, close: Close) -> None:
    line = METRICS[name]
    metric = line.make()
    damping, df = damping_of(metric, line), vector(metric)
    found = metric.vector_to_flat(metric.sharp(df, damping))
    damped = metric.dense() + damping * torch.eye(len(found), dtype=F64)
    close(found, torch.linalg.solve(damped, metric.vector_to_flat(df)), 1e-6)
    lowered = metric.flat(metric.sharp(df, damping))
    close(metric.vector_to_flat(lowered) + damping * found, metric.vector_to_flat(df), 1e-6)


def stack(metric: Metric, count: int, seed: int) -> dict[str, Tensor]:
    g = G().manual_seed(seed)
    return {n: torch.randn(count, *p.shape, generator=g, dtype=F64) for n, p in metric.parameters.items()}


def rows(v: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in v.values()], dim=1)


@each
def test_verbs_take_stacks(name: str, close: Close) -> None:
    line = METRICS[name]
    metric = line.make()
    u, v, damping = stack(metric, 3, 1), stack(metric, 2, 2), damping_of(metric, line)
    dense = metric.dense()
    damped = dense + damping * torch.eye(len(dense), dtype=F64)
    one = {n: t[1] for n, t in v.items()}
    close(rows(metric.flat(u)), rows(u) @ dense, 1e-9)
    close(rows(metric.sharp(u, damping)), torch.linalg.solve(damped, rows(u).mT).mT, 1e-6)
    close(metric.inner(u, v), rows(u) @ dense @ rows(v).mT, 1e-8)
    close(metric.inner(u, one), rows(u) @ dense @ rows(v)[1], 1e-8)
    close(metric.inner(one, u), rows(u) @ dense @ rows(v)[1], 1e-8)
    close(metric.norm(u), (rows(u) @ dense * rows(u)).sum(1).clamp(min=0).sqrt(), 1e-8)
    assert rows(metric.flat(stack(metric, 0, 1))).shape == (0, len(dense))
    first = metric.names[0]
    with pytest.raises(ValueError, match="must be a tensor of shape"):
        metric.flat({**u, first: u[first][:2]})


@each
def test_names_have_dampings_of_their_own(name: str, close: Close) -> None:
    """Weights one, biases another, and gradients through both: of `sharp`, `logdet` and the diagonal of the inverse."""
    line = METRICS[name]
    metric = line.make()
    first, most = metric.names[0], damping_of(metric, line)
    dense, df = metric.dense().detach(), stack(metric, 2, 1)

    def mine(a: Tensor, b: Tensor) -> list[Tensor]:
        given = {first: a, "*": b}
        solved = rows(metric.sharp(df, given))
        return [solved, metric.logdet(given), rows({n: t[None] for n, t in metric.inverse_diagonal(given).items()})[0]]

    def plain(a: Tensor, b: Tensor) -> list[Tensor]:
        d = torch.cat([(a if n == first else b).expand(p.numel()) for n, p in metric.parameters.items()])
        damped = dense + torch.diag(d)
        return [torch.linalg.solve(damped, rows(df).mT).mT, torch.logdet(damped), torch.linalg.inv(damped).diagonal()]

    for given in ((most + 0.4, most), (most, most)):
        leaves = [[torch.tensor(d, dtype=F64, requires_grad=True) for d in given] for _ in range(2)]
        for found, expected in zip(mine(*leaves[0]), plain(*leaves[1])):
            close(found.detach(), expected.detach(), 1e-7)
            weights = torch.randn(found.shape, dtype=F64)
            for a, b in zip(*(torch.autograd.grad((weights * x).sum(), w) for x, w in zip((found, expected), leaves))):
                close(a, b, 1e-6)
    metric.sample({first: most + 0.4, "*": most}, G().manual_seed(0))
    one = torch.tensor(most, dtype=F64, requires_grad=True)  # and one for all
    (slope,) = torch.autograd.grad(metric.logdet(one), one)
    close(slope, torch.linalg.inv(dense + most * torch.eye(len(dense), dtype=F64)).trace(), 1e-8)
    assert bool(torch.autograd.grad(metric.sharp(vector(metric), one)[first].sum(), one)[0].isfinite())
    with pytest.raises(ValueError, match="no parameter matches 'nothing'"):
        metric.logdet({"nothing": 1.0, "*": 1.0})
    with pytest.raises(ValueError, match="no pattern of"):
        metric.logdet({first: 1.0})
    with pytest.raises(ValueError, match="damping must be a positive finite number"):
        metric.logdet({"*": -1.0})


@each
def test_determinant_and_samples(name: str, close: Close) -> None:
    line = METRICS[name]
    metric = line.make()
    damping = damping_of(metric, line)
    if not line.determinant:
        with pytest.raises(NotImplementedError, match="take solver="):
            metric.logdet(damping)
        return
    damped = metric.dense() + damping * torch.eye(len(metric.dense()), dtype=F64)
    close(metric.logdet(damping), torch.logdet(damped), 1e-8)
    g, count = G().manual_seed(0), 400
    draws = torch.stack([metric.vector_to_flat(metric.sample(damping, g)) for _ in range(count)])
    expected = torch.linalg.inv(damped)
    d = expected.diagonal()
    spread = ((d[:, None] * d[None, :] + expected.square()) / count).sqrt()
    assert float(((draws.mT @ draws / count - expected) / spread).abs().max()) < 6
    assert float((draws.mean(0) / (d / count).sqrt()).abs().max()) < 6
    again, other = (metric.vector_to_flat(metric.sample(damping, G().manual_seed(s))) for s in (0, 1))
    assert torch.equal(again, draws[0])
    assert not torch.equal(other, draws[0])


@each
def test_a_metric_moves_nothing(name: str) -> None:
    line = METRICS[name]
    metric = line.make()
    before = {n: p.detach().clone() for n, p in metric.parameters.items()}
    state, damping = torch.get_rng_state(), damping_of(metric, line)
    metric.sharp(metric.flat(vector(metric)), damping)
    metric.trace()
    if line.determinant:
        metric.logdet(damping)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.detach(), before[n]) and p.grad is None for n, p in metric.parameters.items())


@each
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    line = METRICS[name]
    metric = line.make()
    good, first = vector(metric), metric.names[0]
    for call in (metric.flat, lambda v: metric.sharp(v, 1.0)):
        with pytest.raises(ValueError, match=f"missing .'{first}'"):
            call({n: t for n, t in good.items() if n != first})
        with pytest.raises(ValueError, match=r"unknown .'no such'"):
            call({**good, "no such": torch.zeros(1)})
        with pytest.raises(ValueError, match="must be a tensor of shape"):
            call({**good, first: torch.zeros(1, 1, 1)})
        with pytest.raises(TypeError, match="must be a dict"):
            call([*good.values()])  # type: ignore[arg-type]
    for damping in (-1.0, math.nan, math.inf, *(() if metric.positive_definite else (0.0,))):
        with pytest.raises(ValueError, match="damping"):
            metric.sharp(good, damping)


@each
def test_a_state_comes_back(name: str) -> None:
    metric, other = METRICS[name].make(), METRICS[name].make()
    state = metric.state_dict()
    if state and isinstance(other, ng.Fisher):
        other.reset()
    other.load_state_dict(state)
    assert torch.equal(other.dense(), metric.dense())
    with pytest.raises(ValueError, match="state"):
        other.load_state_dict({"of": "another"})
    assert torch.equal(other.dense(), metric.dense())


@each
def test_the_gradient_is_its_own_or_that_of_backward(name: str, close: Close) -> None:
    line = METRICS[name]
    metric = line.make()
    if not line.own_gradient:
        with pytest.raises(TypeError, match=r"takes its gradient from loss.backward\(\)"):
            metric.gradient()
        with pytest.raises(TypeError, match=r"takes its gradient from loss.backward\(\)"):
            metric.observe({"x": torch.zeros(1)})
        return
    df, prior, damping = metric.gradient(), vector(metric, 3), damping_of(metric, line)
    assert {n: t.shape for n, t in df.items()} == {n: p.shape for n, p in metric.parameters.items()}
    flat = metric.vector_to_flat
    close(flat(metric.direction(damping)), flat(metric.sharp(df, damping)), 1e-6)
    pulled = {n: df[n] + damping * prior[n] for n in df}
    close(flat(metric.direction(damping, prior)), flat(metric.sharp(pulled, damping)), 1e-6)


@each
def test_an_optimizer_steps_along_it(name: str) -> None:
    """With the step rule that the metric names, and nothing else said."""
    line = METRICS[name]
    metric = line.make()
    before = {n: p.detach().clone() for n, p in metric.parameters.items()}
    opt = ng.NaturalGradient(metric, damping=None if line.semidefinite else damping_of(metric, line))
    assert type(opt.rule) is RULES[metric.default_step]
    if line.own_gradient:
        opt.step(line.batch)
    else:
        if isinstance(metric, ng.Fisher):
            metric.criterion(metric.model(points(9)), points(9, 2)).backward()
        for p in metric.parameters.values():
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
        opt.step()
    assert all(bool(torch.isfinite(p).all()) for p in metric.parameters.values())
    assert any(not torch.equal(p, before[n]) for n, p in metric.parameters.items())
