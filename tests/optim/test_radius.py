"""KLTrustRegion keeps its radius, by divergences of `torch.distributions` between predictions before and after."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.nn import functional as F

import natgrad as ng
from natgrad.cli.problems.ising import prepare
from natgrad.fisher.likelihoods.registry import likelihood_of

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
F64 = torch.float64
RADIUS = 1e-3
torch.set_num_threads(1)


def net(inputs: int = 4, outputs: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def normal(f: Tensor) -> td.Distribution:
    return td.Independent(td.Normal(f[..., :2], F.softplus(f[..., 2:]) + 1e-2), 1)


def mixture(f: Tensor) -> td.Distribution:
    return td.MixtureSameFamily(td.Categorical(logits=f[..., :2]), td.Normal(f[..., 2:4], torch.ones(2, dtype=F64)))


G = torch.Generator().manual_seed(1)
X = torch.randn(48, 4, generator=G, dtype=F64)
REAL, LABELS = torch.randn(48, 3, generator=G, dtype=F64), torch.randint(3, (48,), generator=G)
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=F64)

# criterion, targets, KL of a mean over data from output to output
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "cross-entropy": (
        nn.CrossEntropyLoss,
        LABELS,
        lambda f, g, y: td.kl_divergence(td.Categorical(logits=f), td.Categorical(logits=g)).mean(),
    ),
    "cross-entropy, summed": (
        lambda: nn.CrossEntropyLoss(reduction="sum"),
        LABELS,
        lambda f, g, y: td.kl_divergence(td.Categorical(logits=f), td.Categorical(logits=g)).sum(),
    ),
    "class weights": (
        lambda: nn.CrossEntropyLoss(weight=WEIGHT),
        LABELS,
        lambda f, g, y: (
            (WEIGHT[y] * td.kl_divergence(td.Categorical(logits=f), td.Categorical(logits=g))).sum() / WEIGHT[y].sum()
        ),
    ),
    "squared": (
        nn.MSELoss,
        REAL,
        lambda f, g, y: td.kl_divergence(td.Normal(f, 0.5**0.5), td.Normal(g, 0.5**0.5)).mean(),
    ),
    "binary": (
        nn.BCEWithLogitsLoss,
        (REAL > 0).double(),
        lambda f, g, y: td.kl_divergence(td.Bernoulli(logits=f), td.Bernoulli(logits=g)).mean(),
    ),
    "counts": (
        nn.PoissonNLLLoss,
        REAL.exp().round(),
        lambda f, g, y: td.kl_divergence(td.Poisson(f.exp()), td.Poisson(g.exp())).mean(),
    ),
    "absolute": (
        nn.L1Loss,
        REAL,
        lambda f, g, y: td.kl_divergence(td.Laplace(f, 1.0), td.Laplace(g, 1.0)).mean(),
    ),
    "normal": (
        lambda: ng.Likelihood(lambda f: td.Independent(td.Normal(f[:, :1], f[:, 1:2].exp()), 1)),
        REAL[:, :1],
        lambda f, g, y: td.kl_divergence(
            td.Normal(f[:, :1], f[:, 1:2].exp()), td.Normal(g[:, :1], g[:, 1:2].exp())
        ).mean(),
    ),
    "any loss": (
        lambda: ng.Loss(lambda f, y: F.cross_entropy(f, y, reduction="none")),
        LABELS,
        lambda f, g, y: td.kl_divergence(td.Categorical(logits=f), td.Categorical(logits=g)).mean(),
    ),
}


def worst(
    opt: ng.NaturalGradient,
    model: nn.Module,
    y: Tensor,
    kl: Callable[[Tensor, Tensor, Tensor], Tensor],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    steps: int = 25,
) -> float:
    """The largest divergence of a step on its batch."""
    found = []
    for i in range(steps):
        rows = slice(i % 3, None, 3)
        with torch.no_grad():
            before = model(X[rows])
        opt.zero_grad()
        loss_of(X[rows], y[rows]).backward()
        opt.step()
        with torch.no_grad():
            found.append(float(kl(before, model(X[rows]), y[rows])))
        assert found[-1] == pytest.approx(opt.info["kl"], rel=1e-6, abs=1e-12)
    return max(found)


@pytest.mark.parametrize("case", CASES)
def test_the_radius_holds_for_every_likelihood(case: str) -> None:
    criterion, y, kl = CASES[case]
    model, loss = net(), criterion()
    kind = "sampled" if case == "absolute" else "exact"
    metric = ng.Fisher(model, loss, kind=kind, structure="dense")
    opt = ng.NaturalGradient(metric, step=ng.KLTrustRegion(lr=3.0, radius=RADIUS), refresh=5)
    found = worst(opt, model, y, kl, lambda x, y: loss(model(x), y))
    assert 0.3 * RADIUS < found <= RADIUS * (1 + 1e-9)


@pytest.mark.parametrize("structure", ["dense", "block", "diagonal", "kfac", "ekfac", "input"])
@pytest.mark.parametrize(("refresh", "momentum", "decay"), [(1, 0.0, 0.0), (20, 0.9, 0.0), (20, 0.99, 0.5)])
def test_the_radius_holds_in_every_structure(structure: str, refresh: int, momentum: float, decay: float) -> None:
    criterion, y, kl = CASES["cross-entropy"]
    model, loss = net(), criterion()
    metric = ng.Fisher(model, loss, kind="exact", structure=structure)
    rule = ng.KLTrustRegion(lr=1.0, momentum=momentum, radius=RADIUS, damping=1e-6)
    opt = ng.NaturalGradient(metric, step=rule, refresh=refresh, weight_decay=decay)
    assert worst(opt, model, y, kl, lambda x, y: loss(model(x), y)) <= RADIUS * (1 + 1e-9)


def test_directions_that_the_metric_does_not_see_are_bounded() -> None:
    """An input that is zero at the refresh and large afterwards: the metric is zero along its weights."""
    model, loss = nn.Linear(2, 2).double(), nn.CrossEntropyLoss()
    metric = ng.Fisher(model, loss, kind="exact", structure="dense")
    opt = ng.NaturalGradient(metric, step=ng.KLTrustRegion(lr=10.0, radius=RADIUS), refresh=20)
    y = torch.tensor([0, 1, 0])
    for i in range(12):
        x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 0.0]], dtype=F64)
        if not opt.refresh_due:
            x[:, 1] = torch.tensor([100.0, -50.0, 30.0 + i])
        with torch.no_grad():
            before = model(x)
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step()
        with torch.no_grad():
            moved = CASES["cross-entropy"][2](before, model(x), y)
        assert float(moved) <= RADIUS * (1 + 1e-9)


LOOPS: dict[str, Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]] = {
    "functional": lambda m, c, x, y: F.cross_entropy(m(x), y),
    "flattened": lambda m, c, x, y: c(m(x.reshape(2, -1, 4)).flatten(0, 1), y),
    "shifted": lambda m, c, x, y: c(m(x.reshape(2, -1, 4))[:, 1:].reshape(-1, 3), y.reshape(2, -1)[:, 1:].reshape(-1)),
    "scaled": lambda m, c, x, y: c(m(x) / 0.3, y),
    "two passes": lambda m, c, x, y: c(torch.cat([m(x[::2]), m(x[1::2])]), torch.cat([y[::2], y[1::2]])),
    "micro-batches": lambda m, c, x, y: (c(m(x[:8]), y[:8]) + c(m(x[8:]), y[8:])) / 2,
    "a look between": lambda m, c, x, y: (c(m(x), y), m(2 * x))[0],
}


@pytest.mark.parametrize("loop", LOOPS)
def test_what_the_loop_does_with_the_output_counts(loop: str) -> None:
    model, loss = net(), nn.CrossEntropyLoss()
    y = LABELS[:16]

    def outputs() -> Tensor:
        with torch.no_grad():
            f = model(X[:16])
        if loop == "shifted":
            return f.reshape(2, 8, 3)[:, 1:].reshape(-1, 3)
        return f / 0.3 if loop == "scaled" else f

    opt = ng.NaturalGradient(ng.Fisher(model, loss), step=ng.KLTrustRegion(lr=3.0, radius=RADIUS))
    for _ in range(6):
        before = outputs()
        opt.zero_grad()
        LOOPS[loop](model, loss, X[:16], y).backward()
        opt.step()
        moved = td.kl_divergence(td.Categorical(logits=before), td.Categorical(logits=outputs())).mean()
        assert float(moved) == pytest.approx(opt.info["kl"], rel=1e-8)
        assert 0.1 * RADIUS < float(moved) <= RADIUS * (1 + 1e-9)


def test_a_loop_that_bends_the_output_has_to_say_how() -> None:
    model, loss = net(), nn.NLLLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, loss), step=ng.KLTrustRegion())
    loss(model(X).log_softmax(1), LABELS).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"no linear function of what the model returns.*output="):
        opt.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    metric = ng.Fisher(model, loss, output=lambda f: f.log_softmax(1))
    opt = ng.NaturalGradient(metric, step=ng.KLTrustRegion(lr=3.0))
    found = worst(opt, model, LABELS, CASES["cross-entropy"][2], lambda x, y: loss(model(x).log_softmax(1), y), 4)
    assert 0.1 * RADIUS < found <= RADIUS


def test_dropout_drops_the_same_units_before_and_after() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.Linear(32, 3)).double()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()), step=ng.KLTrustRegion(lr=1e-9, momentum=0.0))
    loss = opt.metric.criterion(model(X), LABELS)
    loss.backward()
    buffers, state = {n: b.clone() for n, b in model.named_buffers()}, torch.get_rng_state()
    opt.step()
    assert opt.info["kl"] < 1e-12
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_a_step_without_a_batch_is_refused() -> None:
    model = net()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()), step=ng.KLTrustRegion())
    opt.metric.criterion(model(X), LABELS).backward()
    opt.step()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="no forward pass of the metric's model was backpropagated"):
        opt.step()


def test_heads_add_by_their_weights() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 8).double(), nn.Linear(8, 3).double(), nn.Linear(8, 3).double()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.body(x).tanh()
            return {"a": self.a(h), "b": self.b(h)}

    model, loss = Heads(), {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}
    metric = ng.Fisher(model, loss, weights={"b": 0.1}, kind="exact", structure="dense")
    opt = ng.NaturalGradient(metric, step=ng.KLTrustRegion(lr=5.0, radius=RADIUS))
    for _ in range(5):
        with torch.no_grad():
            before = model(X)
        opt.zero_grad()
        out = model(X)
        (loss["a"](out["a"], LABELS) + 0.1 * loss["b"](out["b"], REAL)).backward()
        opt.step()
        with torch.no_grad():
            after = model(X)
        moved = CASES["cross-entropy"][2](before["a"], after["a"], LABELS)
        moved = moved + 0.1 * CASES["squared"][2](before["b"], after["b"], REAL)
        assert float(moved) == pytest.approx(opt.info["kl"], rel=1e-8)
        assert 0.1 * RADIUS < float(moved) <= RADIUS


# divergences of criteria, against torch.distributions ----------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "output", "kl"),
    [
        (nn.NLLLoss(), lambda f: f.log_softmax(1), lambda f: td.Categorical(logits=f)),
        (nn.BCELoss(), lambda f: f.sigmoid(), lambda f: td.Bernoulli(f)),
        (nn.PoissonNLLLoss(log_input=False, eps=0.0), lambda f: f.exp(), lambda f: td.Poisson(f)),
        (nn.KLDivLoss(reduction="batchmean"), lambda f: f.log_softmax(1), lambda f: td.Categorical(logits=f)),
        (ng.Likelihood(normal), lambda f: f @ torch.ones(3, 4, dtype=F64) + f[:, :1], normal),
    ],
)
def test_divergences_are_those_of_the_distributions(criterion: nn.Module, output: Any, kl: Any) -> None:
    f, g = output(REAL), output(REAL + 0.3 * REAL.flip(0))
    y = F.softmax(REAL, 1) if isinstance(criterion, nn.KLDivLoss) else None
    found = likelihood_of(criterion).divergence(f, g, y)
    torch.testing.assert_close(found, td.kl_divergence(kl(f), kl(g)).sum())


def test_a_variance_of_its_own_counts() -> None:
    f, g = (REAL[:, :1], REAL[:, 1:2].exp()), (REAL[:, 1:2], REAL[:, 2:].exp())
    found = likelihood_of(nn.GaussianNLLLoss()).divergence(f, g, None)
    normals = [td.Normal(m, v.sqrt()) for m, v in (f, g)]
    torch.testing.assert_close(found, td.kl_divergence(*normals).sum())


def test_a_distribution_without_a_closed_form_is_sampled() -> None:
    torch.manual_seed(0)
    f = torch.randn(400, 4, dtype=F64)
    g = f + 0.1 * torch.randn(400, 4, dtype=F64)
    found = likelihood_of(ng.Likelihood(mixture)).divergence(f, g, None)
    x = torch.linspace(-12, 12, 4001, dtype=F64)[:, None]  # ∫ p log p/q by the trapezoid rule
    p, q = mixture(f).log_prob(x), mixture(g).log_prob(x)
    torch.testing.assert_close(found, torch.trapezoid(p.exp() * (p - q), x, dim=0).sum(), rtol=0.05, atol=0)


# metrics on functions -------------------------------------------------------------------------------------------


def test_residuals_change_by_no_more_than_the_radius() -> None:
    model = net(2, 1)
    x = torch.rand(30, 2, generator=G, dtype=F64)

    def residual(u: Any, x: Tensor) -> Tensor:
        return ng.operators.laplacian(u, x) + 5 * u(x) ** 2 - 3

    def residuals() -> Tensor:
        return torch.stack([residual(model_at, p) for p in x]).detach().flatten() / len(x) ** 0.5

    def model_at(p: Tensor) -> Tensor:
        return model(p)

    metric = ng.GaussNewton(model, {"pde": residual})
    opt = ng.NaturalGradient(metric, step=ng.KLTrustRegion(lr=1.0, radius=RADIUS))
    losses = []
    for _ in range(20):
        before = residuals()
        losses.append(float(opt.step({"pde": x})))
        moved = float((residuals() - before).square().sum()) / 2
        assert moved == pytest.approx(opt.info["kl"], rel=1e-6)
        assert moved <= RADIUS * (1 + 1e-9)
    assert max(losses) < 1.5 * losses[0]


def test_quantum_states_keep_their_fidelity() -> None:
    setting = prepare((4, 5), 1)
    first = setting.error()
    opt = ng.NaturalGradient(setting.metric("auto"), step=ng.KLTrustRegion(0.1, momentum=0.0, radius=RADIUS))
    for step in range(15):
        batch = setting.batch(step)
        with torch.no_grad():
            before = setting.model(batch["states"]).exp()
            opt.step(batch)
            after = setting.model(batch["states"]).exp()
        fidelity = (before @ after) ** 2 / (before @ before) / (after @ after)
        assert -0.5 * float(fidelity.log()) == pytest.approx(opt.info["kl"], rel=1e-6, abs=1e-13)
        assert opt.info["kl"] <= RADIUS * (1 + 1e-9)
    assert setting.error() < 0.9 * first


def test_energies_and_sums_are_bounded_too() -> None:
    model = net(1, 1)
    x = torch.linspace(-1, 1, 40, dtype=F64)[:, None]
    w = torch.full((40,), 0.05, dtype=F64)
    density = {"in": lambda u, du, x: 0.5 * du @ du + 0.25 * u**4 - torch.cos(3 * x[0]) * u}
    metrics = [ng.Energy(model, density), ng.Energy(model, density) + 0.5 * ng.Energy(model, density)]
    for metric, _ in itertools.product(metrics, range(4)):
        opt = ng.NaturalGradient(metric, step=ng.KLTrustRegion(lr=3.0, radius=RADIUS, momentum=0.0))
        before = [p.detach().clone() for p in model.parameters()]
        opt.step({"in": (x, w)})
        assert 0.1 * RADIUS < opt.info["kl"] <= RADIUS
        assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before))
    plain = ng.NaturalGradient(ng.Euclidean(model), step=ng.KLTrustRegion(lr=3.0, radius=RADIUS))
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().sum().backward()
    plain.step()
    moved = sum(float((p.detach() - b).square().sum()) for p, b in zip(model.parameters(), before)) / 2
    assert moved == pytest.approx(plain.info["kl"], rel=1e-9)
    assert moved <= RADIUS
