"""Anchors: value, gradient and Hessian of the penalty, and of sums of penalties, against dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from oracle_of_uses import F64, STRUCTURES, data, fisher, flat, net, noise, values
from torch import Tensor, nn

import natgrad as ng
from natgrad.blocks.base import Block

Close = Callable[[Tensor, Tensor, float], None]
CLOSED = ("dense", "block", "diagonal", "input")  # under sums


def hessian(near: ng.Anchor, metric: ng.Fisher) -> Tensor:
    theta = flat(metric, noise(metric))
    return oracle.hessian(lambda t: near.penalty(metric.flat_to_vector(t)))(theta)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_value_gradient_and_hessian(structure: str, close: Close) -> None:
    metric = fisher(structure)
    near, start, dense = ng.anchor(metric), flat(metric, values(metric)), metric.dense()
    assert float(near.penalty().detach()) == 0
    with torch.no_grad():
        for n, p in metric.parameters.items():
            p += noise(metric)[n]
    moved = flat(metric, values(metric)) - start
    penalty = near.penalty()
    close(penalty.detach(), moved @ dense @ moved / 2, 1e-12)
    penalty.backward()
    close(torch.cat([p.grad.flatten() for p in metric.parameters.values()]), dense @ moved, 1e-12)
    close(hessian(near, metric), dense, 1e-10)


def test_it_is_the_metric_of_then_and_there() -> None:
    metric = fisher()
    elsewhere = noise(metric)
    near = ng.anchor(metric, elsewhere)
    before = near.penalty().detach()
    for t in elsewhere.values():
        t.zero_()
    metric.update(*data(7, 3))
    assert torch.equal(near.penalty().detach(), before)
    assert float(near.penalty(noise(metric)).detach()) == 0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_sum_has_value_and_gradient_of_both_at_the_newer_point(structure: str, close: Close) -> None:
    a, b = fisher(structure, 0), fisher(structure, 1, 31)
    first, second = ng.anchor(a), ng.anchor(b, noise(b, 5))
    total = first + second
    for scale, exact in ((0.0, True), (1.0, structure in CLOSED)):
        theta = {n: (t + scale * noise(b, 7)[n]).requires_grad_() for n, t in noise(b, 5).items()}
        parts, whole = first.penalty(theta) + second.penalty(theta), total.penalty(theta)
        grads = [torch.cat([g.flatten() for g in torch.autograd.grad(p, [*theta.values()])]) for p in (parts, whole)]
        if exact:
            close(whole.detach(), parts.detach(), 1e-11)
            close(grads[1], grads[0], 1e-11)
    if structure in CLOSED:
        close(hessian(total, a), a.dense() + b.dense(), 1e-11)


def test_kfac_sums_to_the_nearest_product(close: Close) -> None:
    """The best rank one approximation of the rearranged sum, by a full SVD (Van Loan & Pitsianis)."""
    a, b = fisher("kfac", 0), fisher("kfac", 1, 31)
    found = hessian(ng.anchor(a) + 3.0 * ng.anchor(b), a)
    for name, index in (("0.weight", slice(0, 24)), ("2.weight", slice(24, None))):
        (u1, v1), (u2, v2) = a.factors(name), b.factors(name)
        total = torch.kron(u1, v1) + 3 * torch.kron(u2, v2)
        m, n = len(u1), len(v1)
        rearranged = total.reshape(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)
        left, s, right = torch.linalg.svd(rearranged)
        nearest = s[0] * torch.kron(left[:, 0].reshape(m, m), right[0].reshape(n, n))
        order = layer_order(m, n)  # weight, then bias, as the metric lays them out
        close(found[index, index], nearest[order][:, order], 1e-10)
        assert float(torch.linalg.eigvalsh(found[index, index])[0]) > -1e-12


def layer_order(out: int, into: int) -> Tensor:
    grid = torch.arange(out * into).reshape(out, into)
    return torch.cat([grid[:, :-1].flatten(), grid[:, -1]])


def test_ekfac_sums_to_the_diagonal_in_the_new_basis(close: Close) -> None:
    a, b = fisher("ekfac", 0), fisher("ekfac", 1, 31)
    found, total = hessian(ng.anchor(a) + ng.anchor(b), a), a.dense() + b.dense()
    close(found.trace(), total.trace(), 1e-12)
    for index in (slice(0, 24), slice(24, None)):
        _, q = torch.linalg.eigh(found[index, index])
        close((q.mT @ found[index, index] @ q).diagonal(), (q.mT @ total[index, index] @ q).diagonal(), 1e-6)


def test_many_tasks_cost_as_much_as_one() -> None:
    near = ng.anchor(fisher("kfac", 0))
    total = near
    for seed in range(1, 5):
        total = total + ng.anchor(fisher("kfac", seed))
    sizes = [sum(b.memory() for b in n.metric.ready) for n in (near, total)]
    assert sizes[0] == sizes[1]


def test_multiples_and_moves(close: Close) -> None:
    metric = fisher("ekfac")
    near = ng.anchor(metric, noise(metric))
    close((2.5 * near).penalty().detach(), 2.5 * near.penalty().detach(), 1e-12)
    total = 0.5 * (near + near)
    close(total.penalty().detach(), near.penalty().detach(), 1e-12)
    there = total.at()
    assert float(there.penalty().detach()) == 0
    close(hessian(there, metric), metric.dense(), 1e-8)


def test_online_laplace_is_the_posterior_of_a_regression(close: Close) -> None:
    """In a linear regression the penalty of the first data is their likelihood, so training with it ends where training
    on both does.
    """
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=g, dtype=F64), torch.randn(30, 2, generator=g, dtype=F64)
    model, loss = nn.Linear(4, 2).double(), nn.MSELoss(reduction="sum")

    def solve(parts: list[tuple[Tensor, Tensor]], near: ng.Anchor | None) -> None:
        optimizer = torch.optim.LBFGS(model.parameters(), tolerance_grad=1e-13, tolerance_change=0, max_iter=200)

        def closure() -> Tensor:
            optimizer.zero_grad()
            total = sum((loss(model(a), b) for a, b in parts), torch.zeros((), dtype=F64))
            total = total if near is None else total + near.penalty()
            total.backward()
            return total

        optimizer.step(closure)

    near = None
    for part in ((x[:9], y[:9]), (x[9:20], y[9:20]), (x[20:], y[20:])):
        solve([part], near)
        metric = ng.Fisher(model, loss, kind="exact", structure="dense")
        metric.update(*part)
        near = ng.anchor(metric) if near is None else (near + ng.anchor(metric)).at()
    a = torch.cat([x, torch.ones(30, 1, dtype=F64)], 1)
    expected = torch.linalg.lstsq(a, y).solution.mT
    close(torch.cat([model.weight, model.bias[:, None]], 1).detach(), expected, 1e-7)


def test_of_a_file(tmp_path: Path, close: Close) -> None:
    metric = fisher("ekfac")
    metric.save(tmp_path / "metric.safetensors")
    point = noise(metric)
    near, again = ng.anchor(metric, point), ng.anchor(tmp_path / "metric.safetensors", point)
    close(again.penalty(dict(metric.model.named_parameters())).detach(), near.penalty().detach(), 1e-14)
    with pytest.raises(ValueError, match="does not know the model"):
        again.penalty()
    with pytest.raises(ValueError, match="give anchor theta="):
        ng.anchor(tmp_path / "metric.safetensors")


def test_it_does_nothing_to_autocast_and_half() -> None:
    metric = fisher()
    near = ng.anchor(metric, noise(metric))
    expected = near.penalty().detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(near.penalty().detach(), expected)


def test_what_does_not_fit() -> None:
    metric = fisher()
    near = ng.anchor(metric)
    with pytest.raises(RuntimeError, match="seen no data"):
        ng.anchor(ng.Fisher(net(), nn.CrossEntropyLoss()))
    with pytest.raises(TypeError, match=r"takes an ng\.Fisher"):
        ng.anchor(ng.Euclidean(net()))
    with pytest.raises(ValueError, match=r"lacks the parameters \['2\.bias'\]"):
        ng.anchor(metric, {n: t for n, t in values(metric).items() if n != "2.bias"})
    with pytest.raises(ValueError, match="finite real numbers"):
        ng.anchor(metric, {**values(metric), "2.bias": torch.full((3,), torch.nan, dtype=F64)})
    with pytest.raises(ValueError, match=r"theta lacks the parameters"):
        near.penalty({})
    for factor in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive number"):
            _ = factor * near
    with pytest.raises(TypeError, match="anchors add to anchors"):
        _ = near + 1.0
    other = ng.Fisher(nn.Linear(5, 4).double(), nn.MSELoss())
    other.update(torch.randn(3, 5, dtype=F64), torch.randn(3, 4, dtype=F64))
    with pytest.raises(ValueError, match=r"different layouts: .*lacks"):
        _ = near + ng.anchor(other)
    with pytest.raises(ValueError, match="structure 'kfac' and 'diagonal'"):
        _ = near + ng.anchor(fisher("diagonal"))


def test_parameters_that_were_replaced_are_noticed() -> None:
    metric = fisher()
    near = ng.anchor(metric)
    metric.model[0].weight = nn.Parameter(torch.zeros(4, 5, dtype=F64))
    with pytest.raises(RuntimeError, match="replaced"):
        near.penalty()


class Odd(nn.Module):
    """A layer, and a large parameter whose use no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(5, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * torch.sin(self.w)


def test_parameters_without_curvature_are_named() -> None:
    metric = ng.Fisher(Odd().double(), nn.CrossEntropyLoss(), kind="exact")
    metric.update(*data(6))
    metric.collection.blocks = [b for b in metric.blocks if b.names != ["w"]]
    with pytest.warns(UserWarning, match=r"'w' .*nothing holds it near"):
        near = ng.anchor(metric)
    assert torch.autograd.grad(near.penalty(), [metric.parameters["w"]], allow_unused=True) == (None,)


def test_blocks_follow_the_parameters_wherever_the_centre_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics from a file are on the CPU, whatever device the centre is given on."""
    moved: list[str] = []
    move = Block.move
    monkeypatch.setattr(
        Block, "move", lambda self, device, dtype: (moved.append(self.key), move(self, device, dtype))[1]
    )
    model = nn.Linear(3, 2).double()
    metric = ng.Fisher(model, nn.MSELoss(), kind="exact")
    metric.update(torch.randn(5, 3).double())
    near = ng.anchor(metric)
    moved.clear()
    near.penalty()
    assert moved == [b.key for b in near.metric.ready]
    moved.clear()
    _ = near + ng.anchor(metric)
    assert set(moved) == {b.key for b in near.metric.ready}
