"""Learnable scalars: temperatures, gates that start at zero, logit scales, slopes, of shape () and (1,)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from oracle import empirical, gauss_newton
from torch import Tensor, nn
from torch.nn import functional as F
from training_cases import batches, finite, train, weights

import natgrad as ng

KINDS = ("sampled", "exact", "empirical")
STRUCTURES = ("kfac", "ekfac", "input", "block", "diagonal", "dense")


class Net(nn.Module):
    """4-5-3 with scalars of one shape; `run` says what they do."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor], shape: tuple[int, ...], starts: tuple[float, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.run = nn.Linear(4, 5), nn.Linear(5, 3), run
        self.s = nn.ParameterList(nn.Parameter(torch.full(shape, start)) for start in starts)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def both(m: Net, x: Tensor) -> Tensor:
    return m.head(m.first(x).tanh())


RUNS: dict[str, tuple[Callable[[Net, Tensor], Tensor], tuple[float, ...]]] = {
    "temperature": (lambda m, x: both(m, x) * m.s[0], (1.3,)),
    "division": (lambda m, x: both(m, x) / m.s[0], (1.3,)),
    "logit scale": (lambda m, x: F.normalize(both(m, x), dim=-1) * m.s[0].exp(), (1.0,)),
    "offset": (lambda m, x: both(m, x - m.s[0]), (0.2,)),
    "gates at zero": (lambda m, x: m.head((y := m.first(x)) + m.s[0] * y.tanh() + m.s[1] * y.sin()), (0.0, 0.0)),
    "used twice": (lambda m, x: m.head((m.first(x) * m.s[0]).tanh()) * m.s[0], (0.7,)),
    "slope": (lambda m, x: m.head(torch.tanh(m.s[0] * m.first(x)) + m.s[1]), (1.0, 0.1)),
    "in front": (lambda m, x: both(m, m.s[0] * x), (0.9,)),
}
CASES = [(n, shape) for n in RUNS for shape in ((), (1,))]


def make(name: str, shape: tuple[int, ...]) -> Net:
    run, starts = RUNS[name]
    return Net(run, shape, starts)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_every_setting_takes_steps(name: str, shape: tuple[int, ...]) -> None:
    for kind, structure in itertools.product(KINDS, STRUCTURES):
        model = make(name, shape)
        before = weights(model)
        opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss(), kind=kind, structure=structure))
        losses = train(model, opt, batches(20))
        assert finite(model)
        assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
        assert sum(losses[-4:]) < sum(losses[:4]), (kind, structure)


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_step_is_that_of_the_dense_oracle(name: str, shape: tuple[int, ...], kind: str) -> None:
    """θ ← θ − η (G + λI)⁻¹ ∇L over all parameters, in blocks, and on the diagonal."""
    lr, damping = 0.1, 1e-2
    ((x, y),) = batches(1)
    for structure in ("dense", "block", "diagonal"):
        model, loss = make(name, shape), nn.CrossEntropyLoss()
        g = (gauss_newton if kind == "exact" else empirical)(model, loss, [(x, y)])
        metric = ng.Fisher(model, loss, kind=kind, structure=structure)
        opt = ng.NaturalGradient(metric, step=ng.FixedStep(lr=lr, damping=damping))
        before = weights(model)
        loss(model(x), y).backward()
        df = torch.cat([p.grad.flatten() for p in model.parameters()])
        names = [n for n, p in model.named_parameters() for _ in range(p.numel())]
        bare = {"s.0"} if name in ("division", "logit scale") else set()  # used by no op with a rule: Adam's
        keep = torch.tensor([n not in bare for n in names])
        owner = [n if n.startswith("s.") else n.rpartition(".")[0] for n in names]
        if structure != "dense":
            groups = owner if structure == "block" else range(len(names))
            g = g * torch.tensor([[a == b for b in groups] for a in groups])
        eye = torch.eye(int(keep.sum()), dtype=g.dtype)
        step = torch.linalg.solve(g[keep][:, keep] + damping * eye, df[keep])
        opt.step()
        moved = torch.cat([(before[n] - p.detach()).flatten() for n, p in model.named_parameters()])[keep]
        assert metric.without_curvature() == bare
        assert float((moved - lr * step).norm() / (lr * step).norm()) < 1e-10, structure


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scalar_of_two_modules_has_one_block(shape: tuple[int, ...]) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = make("temperature", shape), make("slope", shape)
            self.b.s[0] = self.a.s[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    loss = nn.CrossEntropyLoss()
    ((x, y),) = batches(1)
    expected = gauss_newton(Tied(), loss, [(x, y)])
    metric = ng.Fisher(Tied(), loss, kind="exact", structure="dense")
    metric.update(x, y)
    assert float((metric.dense() - expected).norm() / expected.norm()) < 1e-12
    for kind, structure in itertools.product(KINDS, STRUCTURES):
        model = Tied()
        opt = ng.NaturalGradient(ng.Fisher(model, loss, kind=kind, structure=structure))
        train(model, opt, batches(4))
        assert finite(model)
        assert sum("s.0" in n for b in opt.metric.blocks for n in b.names) == 1


@pytest.mark.parametrize("rule", [ng.FixedStep, ng.Grafted, ng.KLTrustRegion])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_rule_and_precision_takes_a_scalar(rule: type[ng.FixedStep], dtype: torch.dtype) -> None:
    model = make("temperature", ()).to(dtype)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()), step=rule())
    before = weights(model)
    train(model, opt, batches(6, dtype=dtype))
    assert finite(model)
    if dtype == torch.float32:  # a step of Adam's length is below half an ulp in bfloat16
        assert not torch.equal(before["s.0"], model.s[0])
    assert model.s[0].shape == ()
