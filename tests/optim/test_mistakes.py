"""Mistakes of a training loop are said, early and by name; and a classifier that is sure of all labels is none."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_cases import batches, classifier, finite, natural, train

import natgrad as ng

KINDS = ("sampled", "exact", "empirical")
STRUCTURES = ("kfac", "ekfac", "input", "block", "diagonal", "dense")
DATA = list(batches(4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", [20.0, 44.0, 52.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deep", [False, True])
def test_a_classifier_that_is_sure_of_all_labels_keeps_finite_weights(
    kind: str, margin: float, dtype: torch.dtype, deep: bool
) -> None:
    """Its curvature is so small that float32 has no reciprocal of it."""
    x = torch.randn(16, 4).sign().to(dtype)
    y = (x[:, 0] > 0).long()
    for structure in STRUCTURES:
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)) if deep else nn.Sequential(nn.Linear(4, 2))
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
            if deep:
                model[0].weight[:2, 0] = torch.tensor([1.0, -1.0])
                model[2].weight[1, 0] = model[2].weight[0, 1] = margin
            else:
                model[0].weight[:, 0] = torch.tensor([-margin / 2, margin / 2])
        model.to(dtype)
        opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss(), kind=kind, structure=structure))
        train(model, opt, [(x, y)] * 6)
        assert finite(model), structure


def test_a_second_optimizer_of_a_metric_takes_over_and_the_first_is_refused() -> None:
    model = classifier()
    metric = ng.Fisher(model, nn.CrossEntropyLoss())
    first = ng.NaturalGradient(metric)
    second = ng.NaturalGradient(metric)  # nothing is lost before a step
    metric.criterion(model(DATA[0][0]), DATA[0][1]).backward()
    with pytest.raises(RuntimeError, match=r"driven by another NaturalGradient.*groups="):
        first.step()
    second.step()
    with pytest.warns(UserWarning, match="can no longer step"):
        ng.NaturalGradient(metric)


def test_a_squared_loss_under_the_metric_of_a_cross_entropy_is_said_once() -> None:
    model = classifier()
    opt = natural(model)
    x, y = DATA[0]

    def squared(f: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(f, F.one_hot(labels, 3).to(f))

    with pytest.warns(UserWarning, match="curvature of CrossEntropyLoss, but another loss") as said:
        train(model, opt, [(x, y)] * 3, squared)
    assert len(said) == 1


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 2.0, 0.5])}])
def test_a_cross_entropy_as_a_function_is_not_mistaken(options: dict[str, object]) -> None:
    model = classifier(torch.float32)
    opt = natural(model)
    for x, y in batches(3, dtype=torch.float32):
        opt.zero_grad()
        F.cross_entropy(model(x), y, **options).backward()
        opt.step()
    assert opt.refreshes > 0


def test_another_model_than_the_metrics_is_said() -> None:
    model = classifier()
    opt = natural(model)
    x, y = DATA[0]
    F.cross_entropy(copy.deepcopy(model)(x), y).backward()
    with pytest.warns(UserWarning, match=r"did nothing.*a copy of it"):
        opt.step()


def test_a_closure_without_backward_is_refused() -> None:
    model = classifier()
    opt = natural(model)
    x, y = DATA[0]
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\)"):
        opt.step(lambda: F.cross_entropy(model(x), y))
    train(model, opt, DATA[:2])
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\)"):  # gradients of the last step are there
        opt.step(lambda: F.cross_entropy(model(x), y))
    assert opt.steps == 2


def assigned(m: nn.Sequential) -> None:
    m.load_state_dict({n: t.clone() for n, t in m.state_dict().items()}, assign=True)


def registered(m: nn.Sequential) -> None:
    m[0].weight = nn.Parameter(m[0].weight.detach().clone())


def replaced(m: nn.Sequential) -> None:
    m[2] = nn.Linear(6, 3).double()


def wider(m: nn.Sequential) -> None:
    m[2].weight.data, m[2].bias.data = torch.randn(5, 6).double(), torch.zeros(5).double()


@pytest.mark.parametrize(
    ("change", "steps"), [(assigned, 0), (assigned, 2), (registered, 0), (registered, 2), (replaced, 2), (wider, 0)]
)
def test_parameters_that_the_metric_does_not_know_are_said(change: Callable[[nn.Sequential], None], steps: int) -> None:
    model = classifier()
    opt = natural(model)
    train(model, opt, DATA[:steps])
    change(model)
    for p in model.parameters():
        p.grad = None
    with pytest.raises((RuntimeError, ValueError), match=r"replaced in the model|has shape"):
        train(model, opt, DATA[:2] * 2)


def test_values_that_are_written_anew_train_on() -> None:
    model = classifier()
    opt = natural(model)
    train(model, opt, DATA[:2])
    model.load_state_dict(classifier(seed=5).state_dict())
    for p in model.parameters():
        p.data = p.data.clone()
    train(model.to(torch.float32), opt, batches(3, dtype=torch.float32))
    assert opt.steps == 5


def test_an_empty_first_batch_is_said_to_be_empty() -> None:
    for kind, structure in itertools.product(KINDS, STRUCTURES):
        model = classifier()
        opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss(), kind=kind, structure=structure))
        x, y = DATA[0]
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="the batch is empty"):
            train(model, opt, [(x[:0], y[:0])])
        train(model, opt, DATA[:2])
        assert finite(model)


@pytest.mark.parametrize("lr", [1000.0, 1e30])
def test_a_rate_that_would_overshoot_is_refused(lr: float) -> None:
    with pytest.raises(ValueError, match=r"lr · weight_decay must be below 1|lr must be from 0 to 1e\+12"):
        natural(classifier(), lr=lr)
    opt = natural(model := classifier())
    opt.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="lr"):
        train(model, opt, DATA[:1])
    assert finite(model)


def test_what_the_criterion_drew_counts_where_the_gradient_comes_from_elsewhere() -> None:
    """The criterion is called to be looked at; the loss is written out."""
    model = classifier()
    opt = natural(model, kind="empirical")
    for x, y in DATA:
        opt.zero_grad()
        f = model(x)
        opt.metric.criterion(f, y)
        F.cross_entropy(f, y).backward()
        opt.step()
    assert opt.refreshes == 3


def test_a_metric_that_goes_stale_is_said_once() -> None:
    """The loop stops calling the model itself after a while."""
    model, criterion = classifier(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion), refresh=2)

    def steps(run: Any, count: int) -> None:
        for i in range(count):
            x, y = DATA[i % len(DATA)]
            opt.zero_grad()
            criterion(run(x), y).backward()
            opt.step()

    steps(model, 4)
    with pytest.warns(UserWarning, match="fell due and brought nothing.*Call the model itself") as said:
        steps(model.forward, 12)
    assert len(said) == 1


@pytest.mark.parametrize(
    "added",
    [
        lambda z: 1e-3 * z.logsumexp(1).square().mean(),
        lambda z: 1e-2 * z.square().mean(),
        lambda z: 0.0 * z.sum(),
    ],
    ids=["z loss", "size of logits", "nothing"],
)
def test_small_terms_beside_the_loss_are_no_mistake(added: Any) -> None:
    model = classifier()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()), refresh=2)
    x, y = DATA[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):  # until it is sure of all labels, where rounding is left
            opt.zero_grad()
            z = model(x)
            (nn.functional.cross_entropy(z, y) + added(z)).backward()
            opt.step()


def test_a_parameter_that_is_returned_keeps_no_hooks() -> None:
    class Coded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.code = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x) + self.code, self.code

    model, criterion = Coded(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, output=lambda o: o[0]), refresh=1)
    for _ in range(5):
        opt.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 3))[0], torch.arange(8) % 2).backward()
        opt.step()
    assert not model.code._backward_hooks
