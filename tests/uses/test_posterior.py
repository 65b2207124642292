"""The posterior against dense linear algebra, and against regression in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import op_cases
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.func import functional_call, jacrev

import natgrad as ng

Close = Callable[[Tensor, Tensor, float], None]
F64 = torch.float64
STRUCTURES = ("dense", "block", "diagonal", "kfac", "ekfac", "input")
PRIORS: list[Any] = [0.7, {"0.*": 2.0, "*": 0.5}, {"*.bias": 0.2, "*": 3.0}]


def net(out: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out)).double()


def data(count: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=g, dtype=F64), torch.randint(3, (count,), generator=g)


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """(data, outputs, P)"""
    params = oracle.trainable(model)
    jac = jacrev(lambda p: functional_call(model, p, (x,)))(params)
    return torch.cat([t.flatten(2) if t.dim() > 2 else t[..., None] for t in jac.values()], -1)


def precision(model: nn.Module, prior: Any) -> Tensor:
    """The prior of each parameter, (P,)."""
    import fnmatch

    given = prior if isinstance(prior, dict) else {"*": prior}
    found = []
    for name, p in model.named_parameters():
        value = next(v for pattern, v in given.items() if fnmatch.fnmatchcase(name, pattern))
        found.append(torch.as_tensor(value, dtype=F64).expand(p.numel()))
    return torch.cat(found)


def theta(model: nn.Module) -> Tensor:
    return oracle.flatten(oracle.trainable(model))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("prior", PRIORS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_verbs_are_those_of_the_dense_matrix(structure: str, prior: Any, reduction: str, close: Close) -> None:
    (x, y), (qx, _) = data(), data(5, 1)
    model = net()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(reduction=reduction), kind="exact", structure=structure)
    metric.fit([(x[:8], y[:8]), (x[8:], y[8:])], progress=False)
    n, temperature = 20 if reduction == "mean" else 1, 1.7
    post = ng.posterior(metric, prior=prior, temperature=temperature)
    p = precision(model, prior)
    full = n * metric.dense() / temperature + torch.diag(p)
    jac = jacobian(model, qx)
    variance = jac @ torch.linalg.inv(full) @ jac.mT
    close(post.variance(qx), variance, 1e-8)
    close(post.variance(qx, diagonal=True), variance.diagonal(dim1=1, dim2=2), 1e-8)
    spread = (1 + math.pi / 8 * variance.diagonal(dim1=1, dim2=2)).sqrt()
    close(post.predict(qx), (model(qx).detach() / spread).softmax(1), 1e-8)
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum").detach()
    expected = -loss / temperature + 0.5 * (p.log().sum() - torch.logdet(full) - (p * theta(model).square()).sum())
    close(post.evidence([(x[:8], y[:8]), (x[8:], y[8:])]), expected, 1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_of_the_evidence(structure: str, close: Close) -> None:
    x, y = data()
    model = net()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure=structure).fit([(x, y)], False)
    found = []
    for mine in (True, False):
        leaves = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.4, 2.0)]
        prior = {"*.bias": leaves[0], "*": leaves[1]}
        if mine:
            value = ng.posterior(metric, prior=prior).evidence([(x, y)])
        else:
            p = precision(model, prior)
            value = 0.5 * (p.log().sum() - torch.logdet(20 * metric.dense() + torch.diag(p)))
            value = value - 0.5 * (p * theta(model).square()).sum()
        found.append(torch.stack(torch.autograd.grad(value, leaves)))
    close(found[0], found[1], 1e-8)


def test_linear_regression_in_closed_form(close: Close) -> None:
    """The posterior of a linear model with known noise is normal: evidence and predictions are exact."""
    g = torch.Generator().manual_seed(0)
    x, y, sigma, prior = torch.randn(12, 3, generator=g, dtype=F64), torch.randn(12, generator=g, dtype=F64), 0.5, 2.0
    model = nn.Linear(3, 1, bias=False).double()
    covariance = torch.linalg.inv(x.mT @ x / sigma**2 + prior * torch.eye(3, dtype=F64))
    with torch.no_grad():
        model.weight.copy_((covariance @ x.mT @ y / sigma**2)[None])
    criterion = ng.Likelihood(lambda f: td.Normal(f, sigma), reduction="sum")
    metric = ng.Fisher(model, criterion, kind="exact", structure="dense").fit([(x, y[:, None])], False)
    post = ng.posterior(metric, prior=prior)
    marginal = x @ x.mT / prior + sigma**2 * torch.eye(12, dtype=F64)
    expected = td.MultivariateNormal(torch.zeros(12, dtype=F64), marginal).log_prob(y)
    close(post.evidence([(x, y[:, None])]), expected, 1e-10)
    mean, variance = post.predict(x)
    close(mean, model(x).detach(), 1e-12)
    close(variance[:, 0], (x @ covariance * x).sum(1), 1e-10)
    # a mean of the squared error is a normal of variance one half
    mse = ng.Fisher(model, nn.MSELoss(), kind="exact", structure="dense").fit([(x, y[:, None])], False)
    at_half = ng.Likelihood(lambda f: td.Normal(f, 0.5**0.5), reduction="sum")
    other = ng.Fisher(model, at_half, kind="exact", structure="dense").fit([(x, y[:, None])], False)
    close(ng.posterior(mse).evidence([(x, y[:, None])]), ng.posterior(other).evidence([(x, y[:, None])]), 1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_draws_have_the_covariance(structure: str) -> None:
    x, y = data()
    model = net()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure=structure).fit([(x, y)], False)
    post = ng.posterior(metric, prior={"*.bias": 0.5, "*": 2.0})
    draws = post.sample(400, torch.Generator().manual_seed(0))
    rows = torch.cat([t.flatten(1) for t in draws.values()], 1) - theta(model)
    expected = torch.linalg.inv(20 * metric.dense() + torch.diag(precision(model, {"*.bias": 0.5, "*": 2.0})))
    d = expected.diagonal()
    spread = ((d[:, None] * d[None, :] + expected.square()) / 400).sqrt()
    assert float(((rows.mT @ rows / 400 - expected) / spread).abs().max()) < 6
    again = post.sample(400, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(draws.values(), again.values()))


def test_ways_to_predict_agree_where_the_posterior_is_narrow() -> None:
    x, y = data()
    metric = ng.Fisher(net(), nn.CrossEntropyLoss(), kind="exact").fit([(x, y)], False)
    post, plain = ng.posterior(metric, prior=1e5), metric.model(x).softmax(1)
    g = torch.Generator().manual_seed(0)
    for found in (
        post.predict(x),
        post.predict(x, link="mc", generator=g),
        post.predict(x, how="sample", generator=g),
    ):
        assert found.shape == (20, 3)
        assert float((found - plain).detach().abs().max()) < 0.01
    wide = ng.posterior(metric, prior=0.1)
    probit, drawn = wide.predict(x), wide.predict(x, link="mc", samples=2000, generator=g)
    assert float((probit - drawn).abs().max()) < 0.1  # the probit approximation is one
    assert float((drawn - plain).detach().abs().max()) > 0.02


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.table(ids)).mean(1))


class Heteroscedastic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.net(x)
        return out[:, :1], out[:, 1:].exp()


def test_encoder_layers_embeddings_and_predicted_variance(close: Close) -> None:
    torch.manual_seed(0)
    ids, y = torch.randint(6, (7, 5)), torch.randint(3, (7,))
    model = Encoder().double()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact").fit([(ids, y)], False)
    post = ng.posterior(metric)
    value = model(ids)
    rows = [torch.autograd.grad(v, [*metric.parameters.values()], retain_graph=True) for v in value.flatten()]
    jac = torch.stack([torch.cat([t.flatten() for t in r]) for r in rows]).reshape(7, 3, -1)
    full = 7 * metric.dense() + torch.eye(jac.shape[-1], dtype=F64)
    close(post.variance(ids), jac @ torch.linalg.solve(full, jac.mT), 1e-8)
    x, _ = data()
    noisy = ng.Fisher(Heteroscedastic(), nn.GaussianNLLLoss(), kind="exact").fit([(x, x[:, :1])], False)
    mean, variance = ng.posterior(noisy).predict(x)
    assert mean.shape == variance.shape == (20, 1)
    assert bool((variance > 0).all())
    assert math.isfinite(float(ng.posterior(noisy).evidence([(x, x[:, :1])])))
    assert ng.posterior(noisy).tune([(x, x[:, :1])]).held_out([(x, x[:, :1])]) > -10


CASES = {c.name: c for c in op_cases.CASES}


@pytest.mark.parametrize("name", CASES)
def test_variances_for_all_ops_of_the_list(name: str, close: Close) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, x = case.model().double(), case.x()
    out = model(*x) if isinstance(x, tuple) else model(x)
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != op_cases.N:
        pytest.skip("its output is no row a datum")
    metric = ng.Fisher(model, nn.MSELoss(reduction="sum"), kind="exact", structure="ekfac")
    metric.update(x, torch.randn(out.shape, dtype=F64))
    post = ng.posterior(metric, prior=0.4)
    params = list(metric.parameters.values())
    rows = [torch.autograd.grad(v, params, retain_graph=True, allow_unused=True) for v in out.flatten()]
    each = [torch.cat([(torch.zeros_like(p) if t is None else t).flatten() for t, p in zip(r, params)]) for r in rows]
    jac = torch.stack(each).reshape(*out.shape, -1)
    full = metric.dense() + 0.4 * torch.eye(jac.shape[-1], dtype=F64)
    close(post.variance(x), jac @ torch.linalg.solve(full, jac.mT), 1e-8)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "dense"])
def test_the_last_layer_takes_no_backward_pass(structure: str, close: Close, monkeypatch: pytest.MonkeyPatch) -> None:
    from natgrad.fisher.linearised import Linearised

    x, y = data()
    model = net()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure=structure, params="2.*")
    post = ng.posterior(metric.fit([(x, y)], False), prior={"*.bias": 0.3, "*": 1.0})
    whole = jacobian(model, x)[..., -15:]
    full = 20 * metric.dense() + torch.diag(precision(model, {"*.bias": 0.3, "*": 1.0})[-15:])
    monkeypatch.setattr(Linearised, "pull", lambda self, v: pytest.fail("a pass was made"))
    close(post.variance(x), whole @ torch.linalg.solve(full, whole.mT), 1e-8)
    close(post.variance(x, diagonal=True), post.variance(x).diagonal(dim1=1, dim2=2), 1e-10)
    same = ng.posterior(metric, prior=1.0)
    full = 20 * metric.dense() + torch.eye(15, dtype=F64)
    close(same.variance(x), whole @ torch.linalg.solve(full, whole.mT), 1e-8)


def test_the_prior_is_tuned(close: Close) -> None:
    x, noise = data(120)[0], torch.randn(120, dtype=F64, generator=torch.Generator().manual_seed(2))
    y = (x[:, 0] + 0.7 * noise > 0).long() + (x[:, 1] > 1).long()
    x, y, held = x[:60], y[:60], [(x[60:], y[60:])]
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(150):  # more than is good
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact").fit([(x, y)], False)
    post = ng.posterior(metric, prior={"*.bias": 1e6, "*": 1e6})
    before = post.held_out(held)
    assert post.tune(held) is post
    assert post.held_out(held) >= before
    worse = [ng.posterior(metric, prior=f * float(post.prior)).held_out(held) for f in (0.1, 10.0)]  # type: ignore[arg-type]
    assert post.held_out(held) >= max(worse) - 1e-6
    with pytest.warns(UserWarning, match="chosen by the evidence"):
        post.tune()
    assert isinstance(post.prior, dict)
    leaves = [torch.tensor(post.prior[n], dtype=F64, requires_grad=True) for n in ("0.bias", "0.weight")]
    value = ng.posterior(metric, prior={"*.bias": leaves[0], "*": leaves[1]}).evidence([(x, y)])
    for slope, leaf in zip(torch.autograd.grad(value, leaves), leaves):
        assert abs(float((slope * leaf).detach())) < 1e-3  # where the evidence is largest
    assert "prior=" in repr(post)


class LogProbabilities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).log_softmax(1)


@pytest.mark.parametrize("count", [2, 3])
def test_one_likelihood_in_two_forms(count: int, close: Close) -> None:
    """Logits or logarithms of probabilities, a loss or a distribution: evidence and held-out likelihood agree."""
    x, y = data()
    forms: list[tuple[nn.Module, nn.Module, Tensor]] = [
        (net(), nn.CrossEntropyLoss(), y),
        (net(), ng.Likelihood(lambda f: td.Categorical(logits=f)), y),
        (LogProbabilities(), nn.NLLLoss(), y),
    ]
    if count == 2:
        z = (y > 0).double()[:, None]
        forms = [
            (net(1), nn.BCEWithLogitsLoss(), z),
            (net(1), ng.Likelihood(lambda f: td.Bernoulli(logits=f)), z),
        ]
    found = []
    for model, criterion, labels in forms:
        metric = ng.Fisher(model, criterion, kind="exact", structure="dense").fit([(x, labels)], False)
        post = ng.posterior(metric, prior=0.5)
        p = post.predict(x)
        assert isinstance(p, Tensor)
        chosen = p.gather(1, labels[:, None]) if count == 3 else torch.where(labels > 0, p, 1 - p)
        close(torch.tensor(post.held_out([(x, labels)]), dtype=F64), chosen.log().mean().detach(), 1e-10)
        found.append(post.evidence([(x, labels)]))
    for other in found[1:]:
        close(other, found[0], 1e-8)


def test_files_and_bad_input(tmp_path: Path, close: Close) -> None:
    x, y = data()
    model, criterion = net(), nn.CrossEntropyLoss()
    metric = ng.Fisher(model, criterion, kind="exact")
    with pytest.raises(RuntimeError, match="has seen no data yet"):
        ng.posterior(metric)
    metric.fit([(x, y)], False)
    metric.save(tmp_path / "metric.safetensors")
    again = ng.Fisher(model, criterion, kind="exact")
    again.load(tmp_path / "metric.safetensors")
    post = ng.posterior(again)
    close(post.variance(x), ng.posterior(metric).variance(x), 1e-12)
    with pytest.raises(TypeError, match="the metric of a model and its data"):
        ng.posterior(ng.Euclidean(model))  # type: ignore[arg-type]
    for prior in (0.0, -1.0, math.nan, "one"):
        with pytest.raises(ValueError, match="prior must be a positive finite number"):
            ng.posterior(metric, prior=prior)
    with pytest.raises(ValueError, match="prior: no parameter matches 'head'"):
        ng.posterior(metric, prior={"head": 1.0, "*": 1.0})
    with pytest.raises(ValueError, match="temperature"):
        ng.posterior(metric, temperature=0)
    with pytest.raises(ValueError, match="unknown how 'magic'"):
        post.predict(x, how="magic")
    with pytest.raises(ValueError, match="unknown link 'logit'"):
        post.predict(x, link="logit")
    with pytest.raises(ValueError, match="k must be"):
        post.sample(0)
    with pytest.raises(ValueError, match="here are 5"):
        post.evidence([(x[:5], y[:5])])
    with pytest.raises(ValueError, match="needs labels"):
        post.evidence([x])
    huber = ng.Fisher(net(1), nn.HuberLoss(), kind="exact").fit([(x, x[:, :1])], False)
    with pytest.raises(ValueError, match="no noise to predict"):
        ng.posterior(huber).tune([(x, x[:, :1])])
    heads = ng.Fisher(Heads(), {"a": nn.MSELoss(), "b": nn.MSELoss()}, kind="exact")
    heads.update(x, {"a": x[:, :1], "b": x[:, 1:2]})
    with pytest.raises(ValueError, match="several heads"):
        ng.posterior(heads)
    with torch.no_grad():
        model[0].weight += 1  # type: ignore[index,operator]
    with pytest.raises(RuntimeError, match="parameters have changed"):
        post.predict(x)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"a": out[:, :1], "b": out[:, 1:]}
