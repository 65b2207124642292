"""Losses that are no likelihood, against the generalised Gauss–Newton matrix by plain autograd."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from tests import layer_oracle

N = 6


def net(*last: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), *last).double()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NUMBERS, CLASSES = 2 * drawn(N, 3), torch.tensor([0, 2, 1, 1, 0, 2])
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def distillation(o: Tensor, t: Tensor) -> Tensor:
    return 4 * F.kl_div((o / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean")


def weighted(o: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    return (F.cross_entropy(o, y[0], reduction="none") * y[1]).sum() / y[1].sum()


def masked(o: Tensor, y: Tensor) -> Tensor:
    kept = y > 0
    return ((o - y).square() * kept).sum() / kept.sum()


def centred(o: Tensor, y: Tensor) -> Tensor:
    """Data are coupled through their mean."""
    return (o - y).square().mean() + (o.mean(0) - y.mean(0)).square().sum()


LOSSES: dict[str, tuple[nn.Module, Any]] = {
    "huber": (nn.HuberLoss(), NUMBERS),
    "huber sum": (nn.HuberLoss(reduction="sum", delta=0.5), NUMBERS),
    "smooth l1": (nn.SmoothL1Loss(beta=0.5), NUMBERS),
    "soft margin": (nn.SoftMarginLoss(), NUMBERS.sign()),
    "multilabel": (nn.MultiLabelSoftMarginLoss(), (NUMBERS > 0).double()),
    "huber function": (ng.Loss(F.huber_loss), NUMBERS),
    "fourth power": (ng.Loss(lambda o, y: (o - y).pow(4)), NUMBERS),
    "fourth power, summed": (ng.Loss(lambda o, y: (o - y).pow(4), reduction="sum"), NUMBERS),
    "log cosh": (ng.Loss(lambda o, y: (o - y).cosh().log().mean()), NUMBERS),
    "distillation": (ng.Loss(distillation), NUMBERS),
    "weighted": (ng.Loss(weighted), (CLASSES, WEIGHTS)),
    "masked": (ng.Loss(masked), NUMBERS),
    "classes, terms": (ng.Loss(lambda o, y: F.cross_entropy(o, y, reduction="none")), CLASSES),
    "within a datum": (ng.Loss(lambda o, y: ((o - y).sum(1) ** 2 + (o - y).pow(4).sum(1)).mean()), NUMBERS),
    "across data": (ng.Loss(centred), NUMBERS),
}
COUPLED, RATIO = {"across data"}, {"weighted", "masked"}


matrix, relative = layer_oracle.gauss_newton, layer_oracle.relative


@pytest.mark.parametrize("name", LOSSES)
def test_exact_is_the_gauss_newton_matrix(name: str) -> None:
    model, x, (loss, y) = net(), drawn(N, 3, seed=3), LOSSES[name]
    metric = ng.Fisher(model, loss, kind="exact", structure="dense")
    metric.update(x, y)
    assert relative(metric.dense(), matrix(model, loss, x, y)) <= 1e-10


@pytest.mark.parametrize("name", LOSSES)
def test_sampled_is_it_in_the_mean(name: str) -> None:
    model, x, (loss, y) = net(), drawn(N, 3, seed=3), LOSSES[name]
    metric = ng.Fisher(model, loss, structure="dense", samples=2000)
    metric.update(x, y)
    assert relative(metric.dense(), matrix(model, loss, x, y)) <= 0.06  # a few times 2000**-0.5


LIKELIHOODS: dict[str, tuple[nn.Module, nn.Module, Any]] = {
    "probabilities": (
        net(nn.Sigmoid()),
        nn.BCELoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)),
        (NUMBERS > 0).double(),
    ),
    "absolute": (net(), nn.L1Loss(), NUMBERS),
    "divergence": (net(nn.LogSoftmax(-1)), nn.KLDivLoss(reduction="batchmean"), NUMBERS.softmax(1)),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_likelihoods_are_the_exact_ones_in_the_mean(name: str) -> None:
    model, loss, y = LIKELIHOODS[name]
    found = []
    for kind, samples in (("exact", 1), ("sampled", 2000)):
        found.append(ng.Fisher(model, loss, kind=kind, structure="dense", samples=samples))
        found[-1].update(drawn(N, 3, seed=3), y)
    assert relative(found[1].dense(), found[0].dense()) <= 0.06


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - COUPLED - RATIO))
def test_empirical_takes_the_loss_of_each_datum(name: str) -> None:
    model, x, (loss, y) = net(), drawn(N, 3, seed=3), LOSSES[name]
    metric = ng.Fisher(model, loss, kind="empirical", structure="dense")
    metric.update(x, y)
    expected = layer_oracle.empirical(model, loss, x, y, N)
    assert relative(metric.dense(), expected) <= 1e-10


def test_empirical_refuses_a_loss_that_couples_data() -> None:
    metric = ng.Fisher(net(), ng.Loss(centred), kind="empirical")
    with pytest.raises(ValueError, match="couples the data of a batch"):
        metric.update(drawn(N, 3), NUMBERS)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3)])
def test_rows_of_images_and_sequences(shape: tuple[int, int]) -> None:
    """Classes in the second or the last dimension; the Hessian falls into blocks of classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6), nn.Unflatten(1, shape)).double()
    x, y = drawn(N, 3), torch.randint(3, (N, 2))
    loss = nn.CrossEntropyLoss()
    generic = ng.Loss(lambda o, y: F.cross_entropy(o if shape[0] == 3 else o.movedim(-1, 1), y))
    found = [ng.Fisher(model, c, kind="exact", structure="dense") for c in (loss, generic)]
    found[1].update(x, y)
    assert relative(found[1].dense(), matrix(model, generic, x, y)) <= 1e-10
    if shape[0] == 3:
        found[0].update(x, y)
        assert relative(found[1].dense(), found[0].dense()) <= 1e-10


class Variational(nn.Module):
    """Two outputs: a mean and a logarithm of a variance."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.spread = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.mean(h), self.spread(h)


def test_a_loss_of_two_outputs() -> None:
    def loss(out: Any, y: Tensor) -> Tensor:
        return ((out[0] - y).square() * 2 + out[1].exp() + (out[0] * 0.1 + out[1]).square()).mean()

    torch.manual_seed(0)
    model, x, y = Variational().double(), drawn(N, 3), drawn(N, 2)
    for kind, bound in (("exact", 1e-10), ("sampled", 0.08)):
        metric = ng.Fisher(model, ng.Loss(loss), kind=kind, structure="dense", samples=2000 if kind == "sampled" else 1)
        metric.update(x, y)
        mean, spread = model(x)
        jac = layer_oracle.jacobian(torch.cat([mean.flatten(), spread.flatten()]), list(model.parameters()))
        z = torch.cat([mean.flatten(), spread.flatten()]).detach()
        h = torch.autograd.functional.hessian(lambda z: loss((z[: 2 * N].view(N, 2), z[2 * N :].view(N, 1)), y), z)
        assert relative(metric.dense(), jac.mT @ h @ jac) <= bound


def test_probabilities_have_the_metric_of_their_logits() -> None:
    x, y = drawn(N, 3), (NUMBERS > 0).double()
    weight = torch.tensor([0.5, 1.0, 2.0]).double()
    found = []
    for model, loss in (
        (net(), nn.BCEWithLogitsLoss(weight=weight)),
        (net(nn.Sigmoid()), nn.BCELoss(weight=weight)),
    ):
        found.append(ng.Fisher(model, loss, kind="exact", structure="dense"))
        found[-1].update(x, y)
    assert relative(found[1].dense(), found[0].dense()) <= 1e-10


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("log_target", [True, False])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_divergence_has_the_metric_of_the_logits(reduction: str, log_target: bool) -> None:
    loss = nn.KLDivLoss(reduction=reduction, log_target=log_target)
    target = NUMBERS.log_softmax(1) if log_target else NUMBERS.softmax(1)
    metric = ng.Fisher(net(nn.LogSoftmax(-1)), loss, kind="exact", structure="dense")
    x = drawn(N, 3)
    metric.update(x, target)
    expected = matrix(net(), lambda z, t: loss(z.log_softmax(-1), t), x, target)
    assert relative(metric.dense(), expected) <= 1e-10


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_divergence_at_several_positions(reduction: str) -> None:
    """Two batches of unlike sizes, as the mass of a position counts there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3))).double()
    x, target, loss = drawn(N, 3), drawn(N, 2, 3, seed=4).softmax(-1), nn.KLDivLoss(reduction=reduction)
    metric = ng.Fisher(nn.Sequential(model, nn.LogSoftmax(-1)), loss, kind="exact", structure="dense")
    for rows in (slice(0, 4), slice(4, N)):
        metric.update(x[rows], target[rows])
    expected = matrix(model, lambda z, t: loss(z.log_softmax(-1), t), x, target)
    assert relative(metric.dense(), expected) <= 1e-10


def test_divergence_of_what_is_no_distribution_is_refused() -> None:
    metric = ng.Fisher(net(), nn.KLDivLoss(reduction="batchmean"))
    with pytest.raises(ValueError, match="return log_softmax"):
        metric.update(drawn(N, 3), NUMBERS.softmax(1))


def test_absolute_errors_are_laplace() -> None:
    x = drawn(N, 3)
    found = []
    for loss in (nn.L1Loss(), ng.Likelihood(lambda f: torch.distributions.Laplace(f, torch.ones_like(f)))):
        found.append(ng.Fisher(net(), loss, kind="exact", structure="dense"))
        found[-1].update(x, NUMBERS)
    assert relative(found[0].dense(), found[1].dense()) <= 1e-10


def test_a_loss_that_is_not_convex_is_refused_with_its_eigenvalue() -> None:
    for kind in ("exact", "sampled"):
        metric = ng.Fisher(net(), ng.Loss(lambda o, y: (o - y).sin().mean()), kind=kind)
        with pytest.raises(ValueError, match=r"has the eigenvalue -0\.\d+"):
            metric.update(drawn(N, 3), NUMBERS)
        assert metric.seen == 0


def test_a_loss_without_curvature_is_said() -> None:
    with pytest.raises(ValueError, match="linear in the outputs"):
        ng.Fisher(net(), ng.Loss(lambda o, y: (o * y).mean())).update(drawn(N, 3), NUMBERS)
    with pytest.warns(UserWarning, match="is zero for all data of a batch"):
        ng.Fisher(net(), ng.Loss(lambda o, y: (o - y).abs().mean())).update(drawn(N, 3), NUMBERS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ng.Loss(3), "takes a callable"),
        (lambda: ng.Loss(nn.HuberLoss), "takes a callable"),
        (lambda: ng.Loss(F.mse_loss, reduction="none"), "reduction"),
        (lambda: ng.Fisher(net(), nn.CTCLoss()), r"ng\.Loss"),
        (lambda: ng.Fisher(net(), nn.MSELoss(), weights={"a": 1.0}), "several heads"),
        (lambda: heads([1.0]), "takes {output key: weight}, got a list"),
        (lambda: heads({"c": 1.0}), "heads that there are not"),
        (lambda: updated(lambda o, y: float(o.detach().sum())), "has to return a tensor.*got a float"),
        (lambda: updated(lambda o, y: (o.sum(), 1)), "has to return a tensor.*got a tuple"),
        (lambda: updated(lambda o, y: None), "has to return a tensor.*got a NoneType"),
        (lambda: updated(lambda o, y: (o.detach() - y).square()), "is not differentiable"),
        (lambda: updated(lambda o, y: (o * 0).sqrt().sum()), "statistics of this batch hold NaN"),
        (lambda: ng.Fisher(net(), nn.HuberLoss()).update(drawn(N, 3), NUMBERS[:, :1]), "the shapes differ"),
        (lambda: heads({"a": -1.0}), "at least 0"),
        (lambda: heads({"a": float("nan")}), "at least 0"),
        (lambda: heads({"a": "much"}), "must be a number"),
    ],
)
def test_bad_input_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def updated(fn: Callable[[Any, Any], Any]) -> None:
    ng.Fisher(net(), ng.Loss(fn)).update(drawn(N, 3), NUMBERS)


def test_a_batch_without_second_derivatives_is_dropped_in_training() -> None:
    """This power has none at zero; the gradient is finite."""
    model, loss = net(), ng.Loss(lambda o, y: (o - y).abs().pow(1.5))
    opt = ng.NaturalGradient(ng.Fisher(model, loss), refresh=1)
    x = drawn(N, 3)
    for step in range(3):
        y = model(x).detach() if step == 1 else NUMBERS
        opt.zero_grad()
        with pytest.warns(UserWarning, match="hold NaN or Inf") if step == 1 else nullcontext():
            loss(model(x), y).backward()
            opt.step()
    assert opt.info["dropped_statistics"] == 1
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


# heads -------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        return {"a": self.a(h), "b": self.b(h)}


def heads(weights: Any, **options: Any) -> ng.Fisher:
    torch.manual_seed(0)
    return ng.Fisher(
        Heads().double(), {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}, weights=weights, structure="dense", **options
    )


@pytest.mark.parametrize(
    "weight", [0.01, torch.tensor(0.01, dtype=torch.float64), lambda: 0.01], ids=["number", "tensor", "callable"]
)
@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_heads_have_weights(kind: str, weight: Any) -> None:
    metric = heads({"b": weight}, kind=kind, samples=2000 if kind == "sampled" else 1)
    x, y = drawn(N, 3), {"a": CLASSES, "b": drawn(N, 1, seed=5)}
    metric.update(x, y)
    model, loss = metric.model, {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}
    params = list(model.parameters())
    expected: Any = 0
    if kind == "empirical":
        for n in range(N):
            out = model(x[n : n + 1])
            value = loss["a"](out["a"], y["a"][n : n + 1]) + 0.01 * loss["b"](out["b"], y["b"][n : n + 1])
            g = layer_oracle.flat(torch.autograd.grad(value, params), params)
            expected = expected + torch.outer(g, g) / N
    else:
        for key, w in (("a", 1.0), ("b", 0.01)):
            out = model(x)[key]
            jac = layer_oracle.jacobian(out, params)
            h = torch.autograd.functional.hessian(
                lambda z, key=key, w=w, out=out: w * loss[key](z.view_as(out), y[key]), out.detach().flatten()
            )
            expected = expected + jac.mT @ h @ jac
    assert relative(metric.dense(), expected) <= (0.06 if kind == "sampled" else 1e-10)


def test_a_weight_is_asked_at_every_refresh() -> None:
    value = [1.0]
    metric = heads({"a": 0.0, "b": lambda: value[0]}, kind="exact")
    x, y = drawn(N, 3), {"a": CLASSES, "b": drawn(N, 1, seed=5)}
    metric.update(x, y)
    once = metric.dense()
    value[0] = 3.0
    metric.reset()
    metric.update(x, y)
    assert relative(metric.dense(), 3 * once) <= 1e-12


# training ----------------------------------------------------------------------------------------------


def trained(
    make: Callable[[nn.Module], torch.optim.Optimizer], model: nn.Module, loss: Any, x: Tensor, y: Tensor
) -> float:
    optimizer, g = make(model), torch.Generator().manual_seed(0)
    for _ in range(150):
        rows = torch.randint(len(x), (64,), generator=g)
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss(model(x), y))


def regression() -> tuple[nn.Module, Any, Tensor, Tensor]:
    """A regression with outliers."""
    x = torch.rand(1000, 5)
    y = (
        (3 * x[:, 0] * x[:, 1]).sin()
        + x[:, 2].square()
        + torch.where(torch.rand(1000) < 0.05, 10.0, 0.05) * torch.randn(1000)
    )
    return nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1)), nn.HuberLoss(delta=0.5), x, y[:, None]


def taught() -> tuple[nn.Module, Any, Tensor, Tensor]:
    """A net that learns the predictions of another."""
    x, teacher = torch.randn(1000, 10), nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 5))
    with torch.no_grad():
        y = 4 * teacher(x)
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 5)), ng.Loss(distillation), x, y


@pytest.mark.parametrize("problem", [regression, taught])
def test_training_is_ahead_of_adamw_at_its_best_rate(problem: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, loss, x, y = problem()
    rivals = []
    for lr in (1e-3, 3e-3, 1e-2):
        twin = copy.deepcopy(model)
        rivals.append(trained(lambda m, lr=lr: torch.optim.AdamW(m.parameters(), lr), twin, loss, x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = trained(lambda m: ng.NaturalGradient(ng.Fisher(m, loss)), model, loss, x, y)
    assert ours < min(rivals)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loss", [nn.HuberLoss, lambda: ng.Loss(F.huber_loss)])
def test_outputs_of_few_digits(dtype: torch.dtype, loss: Callable[[], nn.Module]) -> None:
    model, x, y = net().to(dtype), drawn(N, 3).to(dtype), NUMBERS.to(dtype)
    metric = ng.Fisher(model, loss(), kind="exact", structure="dense")
    metric.update(x, y)
    whole = ng.Fisher(copy.deepcopy(model).float(), loss(), kind="exact", structure="dense")
    whole.update(x.float(), y.float())
    assert relative(metric.dense().float(), whole.dense()) <= 20 * torch.finfo(dtype).eps


def squares_of_means(o: Tensor, _: Tensor) -> Tensor:
    """A loss that couples all data."""
    return 1e-9 * o.mean(0).square().sum()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["kfac", "dense", "ekfac"])
def test_a_head_that_couples_data_leaves_the_others_alone(structure: str, sharing: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.layer(x)
            return {"p": h, "q": h * 1}

    x, y = drawn(8, 3), torch.arange(8) % 2
    options: dict[str, Any] = {"kind": "exact", "structure": structure, "sharing": sharing}
    both = ng.Fisher(Twice().double(), {"p": nn.CrossEntropyLoss(), "q": ng.Loss(squares_of_means)}, **options)
    both.update(x, {"p": y, "q": y})
    alone = ng.Fisher(Twice().double(), nn.CrossEntropyLoss(), output=lambda o: o["p"], **options)
    alone.update(x, y)
    assert relative(both.dense(), alone.dense()) <= 1e-6


class Nest(nn.Module):
    """What the loss takes stands beside what it does not."""

    def __init__(self, extra: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.extra = nn.Linear(3, 3), extra

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.layer(x)
        return {"extra": self.extra * 1.0, "logits": h, "hidden": h.repeat(1, 500)}


@pytest.mark.parametrize(
    "extra", [torch.tensor(1.0), torch.ones(5, 3), torch.ones(7)], ids=["scalar", "table", "vector"]
)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_the_loss_does_not_take_is_left_alone(extra: Tensor, kind: str, reduction: str) -> None:
    loss = ng.Loss(lambda o, t: F.cross_entropy(o["logits"], t, reduction=reduction))
    metric = ng.Fisher(Nest(extra).double(), loss, kind=kind, structure="dense")
    same = ng.Fisher(
        Nest(extra).double(), nn.CrossEntropyLoss(), kind=kind, structure="dense", output=lambda o: o["logits"]
    )
    for n in (6, 2):
        x, y = drawn(n, 3, seed=n), torch.arange(n) % 3
        metric.update(x, y)
        same.update(x, y)
    assert relative(metric.dense(), same.dense()) <= 1e-10


def masked_terms(o: Tensor, t: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(o[t[1]], t[0][t[1]], reduction="none")


@pytest.mark.parametrize("count", [15, 16, 17])
def test_any_number_of_terms(count: int) -> None:
    model, x, y = net(), drawn(8, 3), drawn(8, 3, seed=4)
    mask = (torch.arange(24) < count).view(8, 3)
    loss = ng.Loss(masked_terms)
    metric = ng.Fisher(model, loss, kind="exact", structure="dense")
    metric.update(x, (y, mask))
    assert relative(metric.dense(), matrix(model, loss, x, (y, mask))) <= 1e-10
    with pytest.raises(ValueError, match="those that are masked as zeros"):
        ng.Fisher(model, loss, kind="empirical").update(x, (y, mask))


def test_blocks_of_very_unlike_sizes() -> None:
    """One datum has a large squared loss, and no input by which it would count; the others have classes."""

    def loss(o: Tensor, t: Tensor) -> Tensor:
        return 1e7 * (o[0] - 1).square().sum() + F.cross_entropy(o[1:], t[1:], reduction="sum")

    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 3, bias=False), drawn(8, 3).float(), torch.arange(8) % 3
    x[0] = 0
    found = []
    for criterion, rows in ((ng.Loss(loss, reduction="sum"), x), (nn.CrossEntropyLoss(reduction="sum"), x[1:])):
        found.append(ng.Fisher(model, criterion, kind="exact", structure="dense"))
        found[-1].update(rows, y[len(y) - len(rows) :])
    assert relative(found[0].dense(), found[1].dense()) <= 1e-5
