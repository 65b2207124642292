"""Steps with and without a batch: closures, `training_loss`, and what is said where the metric has seen nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng

torch.set_num_threads(1)
F64 = torch.float64
X = torch.linspace(0, 1, 7, dtype=F64)[:, None]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def gauss_newton() -> tuple[Any, Any]:
    return ng.GaussNewton(net(), {"fit": lambda u, x, y: u(x) - y}), {"fit": (X, X[:, 0].sin())}


def energy() -> tuple[Any, Any]:
    density = {"e": lambda u, du, x, f: 0.5 * du @ du + 0.25 * u**4 - f * u}
    return ng.Energy(net(), density), {"e": (X, torch.full((7,), 1 / 7, dtype=F64), X[:, 0])}


def quantum() -> tuple[Any, Any]:
    return ng.QuantumGeometry(net()), {"states": X, "local_energy": X[:, 0] ** 2}


def total() -> tuple[Any, Any]:
    first, batch = gauss_newton()
    return first + 0.5 * ng.GaussNewton(first.residuals.model, first.residuals.terms), batch


METRICS = {f.__name__: f for f in (gauss_newton, energy, quantum, total)}
each = pytest.mark.parametrize("kind", METRICS)


def values(metric: Any) -> list[Tensor]:
    return [p.detach().clone() for p in metric.parameters.values()]


def written_out(metric: Any, opt: Any) -> Callable[[], Tensor]:
    """A closure with a loss of its own, as for any optimizer."""

    def closure() -> Tensor:
        opt.zero_grad()
        loss = torch.stack([p.square().sum() for p in metric.parameters.values()]).sum()
        loss.backward()
        return loss

    return closure


@each
def test_a_step_without_a_batch_says_what_to_write(kind: str) -> None:
    """First or after batches; with nothing, with gradients of another loss, in a closure."""
    metric, batch = METRICS[kind]()
    opt = ng.NaturalGradient(metric)
    for _ in range(2):
        before = values(metric)
        for step in (opt.step, lambda: opt.step(written_out(metric, opt)), opt.step, lambda: opt.step(lambda: None)):
            with pytest.raises(
                RuntimeError, match=r"makes its own gradient from a batch.*opt.step\(batch\).*training_l"
            ):
                step()
        assert all(torch.equal(p, q) for p, q in zip(metric.parameters.values(), before))
        opt.zero_grad()
        opt.step(batch)


WAYS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "batch": lambda metric, opt, batch: opt.step(batch),
    "observed before": lambda metric, opt, batch: (metric.observe(batch), opt.step())[0],
    "closure that observes": lambda metric, opt, batch: opt.step(lambda: metric.observe(batch)),
    "closure by name": lambda metric, opt, batch: opt.step(closure=lambda: metric.observe(batch)),
}


def backpropagated(metric: Any, opt: Any, batch: Any) -> Tensor:
    opt.zero_grad()
    loss = metric.training_loss(batch)
    loss.backward()
    opt.step()
    return loss.detach()


def in_a_closure(metric: Any, opt: Any, batch: Any) -> Tensor:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = metric.training_loss(batch)
        loss.backward()
        return loss

    return opt.step(closure).detach()


WAYS |= {"backward before": backpropagated, "backward in a closure": in_a_closure}


@pytest.mark.parametrize("way", WAYS)
@each
def test_every_way_takes_the_same_steps(kind: str, way: str) -> None:
    """Beside batch steps, from the same start; and in turns with them."""
    (one, batch), (two, _) = METRICS[kind](), METRICS[kind]()
    first, second = ng.NaturalGradient(one), ng.NaturalGradient(two)
    for i in range(4):
        expected = first.step(batch)
        got = WAYS[way if i % 2 else "batch"](two, second, batch)
        second.zero_grad()
        assert float(got) == float(expected)
        assert all(torch.equal(p, q) for p, q in zip(values(one), values(two)))


@each
def test_the_training_loss_leaves_df_in_grad(kind: str) -> None:
    metric, batch = METRICS[kind]()
    (2 * metric.training_loss(batch)).backward()
    df = metric.gradient()
    for n, p in metric.parameters.items():
        torch.testing.assert_close(p.grad, 2 * df[n])


@each
def test_gradients_that_are_not_those_of_the_batch_are_refused(kind: str) -> None:
    metric, batch = METRICS[kind]()
    opt = ng.NaturalGradient(metric)
    before = values(metric)
    wrong: list[Callable[[], Any]] = [
        lambda: (metric.training_loss(batch) + next(iter(metric.parameters.values())).square().sum()).backward(),
        lambda: (0.5 * metric.training_loss(batch)).backward(),
        lambda: [metric.training_loss(batch).backward() for _ in range(2)],
        lambda: (metric.training_loss(batch).backward(), nn.utils.clip_grad_norm_(metric.parameters.values(), 1e-6)),
    ]
    for leave in wrong:
        opt.zero_grad()
        leave()
        with pytest.raises(RuntimeError, match=r"are not those of the batch.*clipped or scaled, accumulated"):
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(metric.parameters.values(), before))


@each
def test_a_batch_that_was_observed_elsewhere_is_stale(kind: str) -> None:
    metric, batch = METRICS[kind]()
    opt = ng.NaturalGradient(metric)
    metric.observe(batch)
    with torch.no_grad():
        next(iter(metric.parameters.values())).mul_(1.5)
    with pytest.raises(RuntimeError, match="has observed none since the parameters changed last"):
        opt.step()


def test_metrics_that_take_gradients_from_backward_have_no_training_loss() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"Fisher takes its gradient from loss.backward\(\)"):
        ng.Fisher(model, nn.MSELoss()).training_loss((X, X))
    mixed = gauss_newton()[0]
    both = mixed + ng.Euclidean(mixed.residuals.model)
    with pytest.raises(RuntimeError, match="Sum makes its own gradient from a batch"):
        ng.NaturalGradient(both).step()


def test_a_hessian_has_one_too() -> None:
    model = net()
    hessian = ng.Hessian(lambda batch: (model(batch) - batch).square().mean(), model)
    opt = ng.NaturalGradient(hessian, lr=0.1, damping=10.0)
    other = net()
    straight = ng.NaturalGradient(
        ng.Hessian(lambda batch: (other(batch) - batch).square().mean(), other), lr=0.1, damping=10.0
    )
    for _ in range(3):
        straight.step(X)
        backpropagated(hessian, opt, X)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
