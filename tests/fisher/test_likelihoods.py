"""Every likelihood against quadrature: E[∇log p ∇log pᵀ] as a sum over nodes, exact and sampled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from cases import mlp
from torch import Tensor, nn
from torch import distributions as td

import natgrad as ng
from natgrad.fisher.likelihoods.closed_forms import CLOSED_FORMS

Close = Callable[[Tensor, Tensor, float], None]
Nodes = tuple[Tensor, Tensor]

LOWER = torch.tensor([[1.2, 0.0, 0.0], [0.3, 0.8, 0.0], [-0.4, 0.2, 1.5]], dtype=torch.float64)


@dataclass(frozen=True)
class Family:
    """A distribution of the model's output, and a quadrature over its labels for one datum (output of shape (K,))."""

    name: str
    family: type
    of: Callable[[Tensor], td.Distribution]
    nodes: Callable[[Any], Nodes]
    outputs: int
    elements: int = 1  # of the batch shape, a datum

    def __str__(self) -> str:
        return self.name


def labels(count: int) -> Callable[[td.Distribution], Nodes]:
    """0 … count − 1, for discrete families (their tails beyond are below rounding)."""

    def nodes(d: td.Distribution) -> Nodes:
        y = torch.arange(count, dtype=torch.float64)
        return y, d.log_prob(y).exp()

    return nodes


def one_hot(d: td.Distribution) -> Nodes:
    return torch.eye(3, dtype=torch.float64), d.probs


def on_the_line(to_support: Callable[[Tensor], Tensor]) -> Callable[[td.Distribution], Nodes]:
    """y = to_support(t) with the trapezoid rule in t."""

    def nodes(d: td.Distribution) -> Nodes:
        t, w = oracle.trapezoid(reach=30.0)
        y = to_support(t)
        slope = torch.autograd.functional.jvp(to_support, t, torch.ones_like(t))[1]
        keep = (slope > 1e-30) & (y < 1) if to_support is torch.sigmoid else slope > 1e-30
        return y[keep], (w * slope)[keep] * d.log_prob(y[keep]).exp()

    return nodes


def simplex(d: td.Distribution) -> Nodes:
    t, w = oracle.trapezoid(300, 20.0)
    a, b = (g.flatten() for g in torch.meshgrid(t, t, indexing="ij"))
    y = torch.stack([a, b, torch.zeros_like(a)], -1).softmax(-1)
    weight = w[0] ** 2 * y.prod(-1) * d.log_prob(y).exp()  # the Jacobian of softmax without its last entry is Π y
    return y, weight


def laplace(d: td.Laplace) -> Nodes:
    z, w = oracle.laguerre(1 / d.scale)
    return torch.cat([d.loc + z, d.loc - z]), torch.cat([w, w]) / 2


def plane(d: td.Distribution) -> Nodes:
    z, w = oracle.hermite(torch.tensor(0.0), torch.tensor(1.0), 12)
    grid = torch.stack([g.flatten() for g in torch.meshgrid(z, z, z, indexing="ij")], -1)
    weight = (w[:, None, None] * w[:, None] * w).flatten()
    return d.loc + grid @ LOWER.mT, weight


def normal_nodes(d: td.Normal) -> Nodes:
    return oracle.hermite(d.loc, d.scale)


def log_normal_nodes(d: td.LogNormal) -> Nodes:
    z, w = oracle.hermite(d.loc, d.scale)
    return z.exp(), w


def two(f: Tensor) -> tuple[Tensor, Tensor]:
    return f[..., 0], f[..., 1]


FAMILIES = [
    Family("bernoulli-logits", td.Bernoulli, lambda f: td.Bernoulli(logits=f[..., 0]), labels(2), 1),
    Family("bernoulli-probs", td.Bernoulli, lambda f: td.Bernoulli(f[..., 0].sigmoid()), labels(2), 1),
    Family(
        "beta",
        td.Beta,
        lambda f: td.Beta(*(t.exp() + 1 for t in two(f))),
        on_the_line(torch.sigmoid),
        2,
    ),
    Family("binomial", td.Binomial, lambda f: td.Binomial(4, logits=f[..., 0]), labels(5), 1),
    Family("categorical", td.Categorical, lambda f: td.Categorical(logits=f), labels(3), 3),
    Family("categorical-probs", td.Categorical, lambda f: td.Categorical(f.sigmoid() + 0.1), labels(3), 3),
    Family("dirichlet", td.Dirichlet, lambda f: td.Dirichlet(f.exp() + 1.5), simplex, 3),
    Family(
        "exponential",
        td.Exponential,
        lambda f: td.Exponential(f[..., 0].exp()),
        lambda d: oracle.laguerre(d.rate),
        1,
    ),
    Family("gamma", td.Gamma, lambda f: td.Gamma(*(t.exp() + 1 for t in two(f))), on_the_line(torch.exp), 2),
    Family("geometric-logits", td.Geometric, lambda f: td.Geometric(logits=f[..., 0]), labels(600), 1),
    Family("geometric-probs", td.Geometric, lambda f: td.Geometric(f[..., 0].sigmoid()), labels(600), 1),
    Family("laplace", td.Laplace, lambda f: td.Laplace(f[..., 0], f[..., 1].exp()), laplace, 2),
    Family("log-normal", td.LogNormal, lambda f: td.LogNormal(f[..., 0], f[..., 1].exp()), log_normal_nodes, 2),
    Family(
        "multivariate-normal",
        td.MultivariateNormal,
        lambda f: td.MultivariateNormal(f, scale_tril=LOWER),
        plane,
        3,
    ),
    Family("normal", td.Normal, lambda f: td.Normal(f[..., 0], f[..., 1].exp()), normal_nodes, 2),
    Family("normal-fixed", td.Normal, lambda f: td.Normal(f[..., 0], 0.7), normal_nodes, 1),
    Family("one-hot", td.OneHotCategorical, lambda f: td.OneHotCategorical(logits=f), one_hot, 3),
    Family("poisson", td.Poisson, lambda f: td.Poisson(f[..., 0].exp()), labels(60), 1),
]


def quadrature(family: Family, model: nn.Module, x: Tensor, reduction: str) -> Tensor:
    def outer(f: Tensor, _: int) -> Tensor:
        with torch.no_grad():
            y, weights = family.nodes(family.of(f[0]))
        assert abs(float(weights.sum()) - 1) < 1e-10  # the quadrature holds the whole of the distribution
        return oracle.expected_outer(lambda z: family.of(z).log_prob(y), f[0].detach(), weights)

    return oracle.fisher(model, outer, [x], len(x) if reduction == "mean" else 1)


def test_the_list_holds_every_closed_form() -> None:
    assert {f.family for f in FAMILIES} == set(CLOSED_FORMS)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_closed_forms_are_expectations(family: Family, reduction: str, close: Close) -> None:
    model, x = mlp(family.outputs), torch.randn(3, 3).double()
    expected = quadrature(family, model, x, reduction)
    metric = ng.Fisher(model, ng.Likelihood(family.of, reduction=reduction), kind="exact", structure="dense")
    metric.update(x[:1])
    metric.update(x[1:])
    close(metric.dense(), expected, 1e-9)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.family is not td.Laplace], ids=str)  # its KL has |·|
def test_the_metric_is_the_second_derivative_of_the_kl(family: Family, close: Close) -> None:
    model, x = mlp(family.outputs, hidden=2), torch.randn(3, 3).double()
    theta, f = oracle.as_function(model)
    fixed = family.of(f(theta, x).detach())

    def kl(t: Tensor) -> Tensor:
        return td.kl_divergence(fixed, family.of(f(t, x))).mean()

    metric = ng.Fisher(model, ng.Likelihood(family.of), kind="exact", structure="dense")
    metric.update(x)
    close(metric.dense(), oracle.hessian(kl)(theta), 1e-10)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_sampled_likelihoods_are_unbiased(family: Family) -> None:
    model, x = mlp(family.outputs, hidden=2), torch.randn(3, 3).double()
    exact = ng.Fisher(model, ng.Likelihood(family.of), kind="exact", structure="dense")
    exact.update(x)
    assert_unbiased(ng.Fisher(model, ng.Likelihood(family.of), structure="dense", samples=4), exact.dense(), x, None)


def assert_unbiased(metric: ng.Fisher, expected: Tensor, x: Tensor, y: Tensor | None, count: int = 60) -> None:
    draws = []
    for _ in range(count):
        metric.reset()
        metric.update(x, y)
        draws.append(metric.dense())
    found = torch.stack(draws)
    spread = found.std(0)
    live = spread > 1e-9 * spread.max()
    z = (found.mean(0) - expected)[live] / spread[live] * count**0.5
    assert float(z.square().mean()) < 4.0, float(z.square().mean())
    if bool((~live).any()):
        assert float((found.mean(0) - expected)[~live].abs().max()) <= 1e-9


def test_independent_and_elementwise_batches(close: Close) -> None:
    """A batch shape (N, 2) has 2N terms under "mean"; `Independent` makes one of both."""
    model, x = mlp(2), torch.randn(4, 3).double()
    plain = ng.Likelihood(lambda f: td.Normal(f, 0.5))
    joined = ng.Likelihood(lambda f: td.Independent(td.Normal(f, 0.5), 1))
    y = torch.randn(4, 2).double()
    assert torch.allclose(2 * plain(model(x), y), joined(model(x), y))
    dense = []
    for criterion in (plain, joined):
        metric = ng.Fisher(model, criterion, kind="exact", structure="dense")
        metric.update(x)
        dense.append(metric.dense())
    # a normal with variance σ² is half a squared error over σ²
    expected = oracle.gauss_newton(model, nn.MSELoss(), [(x, y)]) / (2 * 0.25)
    close(dense[0], expected, 1e-10)
    close(dense[1], 2 * expected, 1e-10)


class MeanAndScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.body(x)
        return out[:, 0], out[:, 1].exp()


def test_outputs_that_are_the_parameters_themselves(close: Close) -> None:
    """Normal(*output): what the root lives on is an output itself, but only one of two."""
    model, x = MeanAndScale(), torch.randn(4, 3).double()
    pairs = ng.Fisher(model, ng.Likelihood(lambda f: td.Normal(*f)), kind="exact", structure="dense")
    pairs.update(x)
    joined = ng.Likelihood(lambda f: td.Normal(f[:, 0], f[:, 1].exp()))
    plain = ng.Fisher(model.body, joined, kind="exact", structure="dense")
    plain.update(x)
    close(pairs.dense(), plain.dense(), 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_likelihood(reduction: str, close: Close) -> None:
    model, criterion = mlp(2), ng.Likelihood(lambda f: td.Gamma(f[..., 0].exp(), f[..., 1].exp()), reduction)
    data = [(torch.randn(n, 3).double(), torch.rand(n).double() + 0.1) for n in (3, 1, 4)]
    metric = ng.Fisher(model, criterion, kind="empirical", structure="dense")
    metric.fit(data, progress=False)
    close(metric.dense(), oracle.empirical(model, criterion, data), 1e-10)


def test_a_likelihood_is_a_loss() -> None:
    f, y = torch.randn(5).double(), torch.randn(5).double()
    assert torch.allclose(ng.Likelihood(lambda f: td.Normal(f, 1.0), "sum")(f, y), -td.Normal(f, 1.0).log_prob(y).sum())


def test_other_families_are_sampled_and_refused_exactly() -> None:
    model, x = mlp(1), torch.randn(3, 3).double()
    criterion = ng.Likelihood(lambda f: td.StudentT(5.0, f[..., 0]))
    with pytest.raises(ValueError, match=r"no closed form for StudentT; use kind=\"sampled\".*Bernoulli, Beta"):
        ng.Fisher(model, criterion, kind="exact").update(x)
    # E[score²] in the location is (ν + 1)/(ν + 3)
    expected = oracle.gauss_newton(model, nn.MSELoss(), [(x, torch.zeros(3, 1).double())]) / 2 * 6 / 8
    assert_unbiased(ng.Fisher(model, criterion, structure="dense", samples=4), expected, x, None)


def test_a_predicted_covariance_is_sampled_and_refused_exactly() -> None:
    model, x = mlp(2), torch.randn(3, 3).double()
    criterion = ng.Likelihood(lambda f: td.MultivariateNormal(f, torch.diag_embed(f.exp())))
    with pytest.raises(ValueError, match='fixed covariance; for a predicted one use kind="sampled"'):
        ng.Fisher(model, criterion, kind="exact").update(x)
    ng.Fisher(model, criterion, kind="sampled").update(x)


# nn criteria that are no Gauss–Newton matrices ------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"weight": [0.3, 1.7, 0.9]}, {"ignore_index": 1}], ids=str)
def test_nll_is_cross_entropy_after_log_softmax(options: dict[str, Any], reduction: str, close: Close) -> None:
    options = {k: torch.tensor(v).double() if k == "weight" else v for k, v in options.items()}
    logits, model = mlp(), mlp(last=nn.LogSoftmax(1))
    data = [(torch.randn(n, 3).double(), torch.randint(3, (n,))) for n in (3, 4)]
    expected = oracle.gauss_newton(logits, nn.CrossEntropyLoss(reduction=reduction, **options), data)
    criterion = nn.NLLLoss(reduction=reduction, **options)
    for structure in ("dense", "block", "diagonal"):
        metric = ng.Fisher(model, criterion, kind="exact", structure=structure).fit(data, progress=False)
        close(metric.diagonal()["0.weight"], expected.diagonal()[:12].view(4, 3), 1e-10)
        if structure == "dense":
            close(metric.dense(), expected, 1e-10)
    labelled = ng.Fisher(model, criterion, kind="empirical", structure="dense").fit(data, progress=False)
    close(labelled.dense(), oracle.empirical(model, criterion, data), 1e-10)
    if reduction == "mean":
        sampled = ng.Fisher(model, criterion, structure="dense", samples=4)
        one = oracle.gauss_newton(logits, nn.CrossEntropyLoss(**options), data[1:])
        assert_unbiased(sampled, one, *data[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_poisson_with_a_rate_as_output(reduction: str, close: Close) -> None:
    log_rate, model = mlp(2), mlp(2, last=Exponential())
    x, y = torch.randn(4, 3).double(), torch.randint(4, (4, 2)).double()
    expected = oracle.gauss_newton(log_rate, nn.PoissonNLLLoss(reduction=reduction), [(x, y)])
    criterion = nn.PoissonNLLLoss(log_input=False, eps=1e-12, reduction=reduction)
    metric = ng.Fisher(model, criterion, kind="exact", structure="dense")
    metric.update(x)
    close(metric.dense(), expected, 1e-10)
    if reduction == "mean":
        assert_unbiased(ng.Fisher(model, criterion, structure="dense", samples=4), expected, x, None)


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class MeanAndVariance(nn.Module):
    """(mean (N, 3), variance): of each element, one of a datum, (N, 1) or (N,), or fixed."""

    def __init__(self, variance: str) -> None:
        super().__init__()
        self.body, self.variance = mlp(6), variance

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        mean, raw = self.body(x).chunk(2, dim=-1)
        if self.variance == "fixed":
            return mean, torch.full_like(mean, 0.6)
        return mean, {"each": raw, "row": raw[:, :1], "flat": raw[:, 0]}[self.variance].exp()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("variance", ["each", "row", "flat", "fixed"])
def test_gaussian_with_predicted_or_fixed_variance(variance: str, reduction: str, close: Close) -> None:
    model, x = MeanAndVariance(variance), torch.randn(4, 3).double()
    criterion = nn.GaussianNLLLoss(reduction=reduction)

    def outer(f: tuple[Tensor, Tensor], _: int) -> Tensor:
        mean, var = f[0][0], f[1].reshape(-1).expand(3)
        total = torch.zeros(3 + f[1].numel(), 3 + f[1].numel()).double()
        for i in range(3):
            z = torch.stack([mean[i], var[i]]).detach()
            y, w = oracle.hermite(z[0], z[1].sqrt())
            local = oracle.expected_outer(lambda t, y=y: td.Normal(t[:, 0], t[:, 1].sqrt()).log_prob(y), z, w)
            where = torch.tensor([i, 3 + (i if f[1].numel() == 3 else 0)])
            total[where[:, None], where] += local
        return total

    expected = oracle.fisher(model, outer, [x], 12 if reduction == "mean" else 1)
    metric = ng.Fisher(model, criterion, kind="exact", structure="dense")
    metric.update(x[:1])
    metric.update(x[1:])
    close(metric.dense(), expected, 1e-9)
    if reduction == "mean":
        assert_unbiased(ng.Fisher(model, criterion, structure="dense", samples=4), expected, x, None)
    y = torch.randn(4, 3).double()
    labelled = ng.Fisher(model, criterion, kind="empirical", structure="dense")
    labelled.update(x, y)
    adapted = AsPair(criterion)
    close(labelled.dense(), oracle.empirical(model, adapted, [(x, y)]), 1e-10)


class AsPair(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion, self.reduction = criterion, criterion.reduction

    def forward(self, output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return self.criterion(output[0], target, output[1])


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_single_datum_without_a_batch_dimension(kind: str, close: Close) -> None:
    model, x, y = mlp(), torch.randn(3).double(), torch.tensor(1)
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind=kind, structure="dense")
    metric.update(x, y)
    batch = [(x[None], y[None])]
    expected = {"exact": oracle.gauss_newton, "empirical": oracle.empirical}[kind]
    close(metric.dense(), expected(model, nn.CrossEntropyLoss(), batch), 1e-10)


def test_criteria_are_left_as_they_are() -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())
    before = copy.deepcopy(criterion.__dict__)
    for kind in ("exact", "sampled", "empirical"):
        ng.Fisher(mlp(), criterion, kind=kind).update(torch.randn(2, 3).double(), torch.tensor([0, 1]))
    assert criterion.reduction == before["reduction"]
    assert torch.equal(criterion.weight, before["_buffers"]["weight"])
