"""Gradients that the user takes beside training: attacks, saliency maps, penalties. They leave no trace.

Each loop runs once as users write it, and once with these gradients taken from a twin that nothing watches. Weights and
metric are the same to rounding, and what was drawn too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn import functional as F
from training_cases import batches, classifier, distance, weights

import natgrad as ng

KINDS = ("sampled", "exact", "empirical")
STRUCTURES = ("kfac", "ekfac", "block", "diagonal", "dense")
((X, Y),) = batches(1, size=12)


class Run:
    """A model in training. `aside`: what gradients beside training are taken from, the model itself or its twin."""

    def __init__(self, aside: bool, weighted: bool, kind: str, structure: str) -> None:
        self.model = classifier()
        self.loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=X.dtype) if weighted else None)
        self.opt = ng.NaturalGradient(ng.Fisher(self.model, self.loss, kind=kind, structure=structure))
        self.aside: Callable[[Tensor], Tensor] = self.apart if aside else self.model
        self.aside_loss: Callable[[Tensor, Tensor], Tensor] = self.plain if aside else self.loss
        self.twin = classifier()

    def apart(self, x: Tensor) -> Tensor:
        return functional_call(self.twin, dict(self.model.named_parameters()), (x,))

    def plain(self, f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y, weight=self.loss.weight)

    def train(self, x: Tensor) -> None:
        self.loss(self.model(x), Y).backward()


def saliency(run: Run) -> None:
    x = X.clone().requires_grad_()
    grad(run.aside_loss(run.aside(x), Y), x)
    run.train(X)


def saliency_of_scores(run: Run) -> None:
    x = X.clone().requires_grad_()
    grad(run.aside(x)[:, 0].sum(), x)
    run.train(X)


def saliency_by_backward(run: Run) -> None:
    x = X.clone().requires_grad_()
    run.aside_loss(run.aside(x), Y).backward(inputs=[x])
    run.train(X)


def saliency_by_a_function(run: Run) -> None:
    x = X.clone().requires_grad_()
    grad(run.plain(run.aside(x), Y), x)
    run.train(X)


def attack_cleared(run: Run) -> None:
    """FGSM as many write it: a backward pass to all, then gradients cleared."""
    x = X.clone().requires_grad_()
    run.aside_loss(run.aside(x), Y).backward()
    assert x.grad is not None
    run.opt.zero_grad()
    run.train((x + 0.1 * x.grad.sign()).detach())


def attacked(run: Run, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    x = X
    for _ in range(12):  # more than the forward passes that wait for their loss
        x = x.detach().requires_grad_()
        (g,) = grad(loss(run.aside(x), Y), x)
        x = x + 0.02 * g.sign()
    return x.detach()


def attack(run: Run) -> None:
    run.train(attacked(run, run.aside_loss))


def attack_by_a_function(run: Run) -> None:
    run.train(attacked(run, run.plain))


def attack_between_micro_batches(run: Run) -> None:
    run.train(X)
    run.train(attacked(run, run.aside_loss))
    run.train(attacked(run, run.plain))


def attack_in_evaluation(run: Run) -> None:
    run.model.eval()
    for p in run.model.parameters():
        p.requires_grad_(False)
    x = attacked(run, run.aside_loss)
    for p in run.model.parameters():
        p.requires_grad_(True)
    run.model.train()
    run.train(x)


def penalty_of_the_loss(run: Run) -> None:
    loss = run.loss(run.model(X), Y)
    x = X.clone().requires_grad_()
    (g,) = grad(run.aside_loss(run.aside(x), Y), x, create_graph=True)
    (loss + 0.1 * g.square().sum()).backward()


def penalty_elsewhere(run: Run) -> None:
    loss = run.loss(run.model(X), Y)
    x = (X + 0.3).requires_grad_()
    (g,) = grad(run.aside(x).sum(), x, create_graph=True)
    (loss + 0.1 * (g.norm(dim=1) - 1).square().mean()).backward()


def norms_of_gradients(run: Run) -> None:
    """The gradient in the parameters of another batch, to be looked at."""
    found = grad(run.aside_loss(run.aside(X + 0.5), Y), list(run.model.parameters()))
    assert all(g.isfinite().all() for g in found)
    run.train(X)


def norms_of_gradients_after(run: Run) -> None:
    run.train(X)
    grad(run.aside_loss(run.aside(X + 0.5), Y), list(run.model.parameters()))


LOOPS = (
    saliency,
    saliency_of_scores,
    saliency_by_backward,
    saliency_by_a_function,
    attack_cleared,
    attack,
    attack_by_a_function,
    attack_between_micro_batches,
    attack_in_evaluation,
    penalty_of_the_loss,
    penalty_elsewhere,
    norms_of_gradients,
    norms_of_gradients_after,
)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_beside_training_leave_no_trace(loop: Callable[[Run], None], weighted: bool) -> None:
    for kind, structure in itertools.product(KINDS, STRUCTURES):
        runs = []
        for aside in (False, True):
            run = Run(aside, weighted, kind, structure)
            for _ in range(3):
                run.opt.zero_grad()
                loop(run)
                run.opt.step()
            runs.append(run)
        a, b = runs
        assert a.opt.metric.seen == b.opt.metric.seen
        assert distance(weights(a.model), weights(b.model)) < 1e-12, (kind, structure)
        assert float((a.opt.metric.dense() - b.opt.metric.dense()).norm() / b.opt.metric.dense().norm()) < 1e-12


def penalty_of_one_pass(run: Run, x: Tensor, aside: bool) -> None:
    """The loss and its own penalty, of one forward pass."""
    loss = run.loss(run.model(x), Y)
    inner = run.plain(run.apart(x), Y) if aside else loss
    (g,) = grad(inner, x, create_graph=True)
    (loss + 0.1 * g.square().sum()).backward()


def attack_of_one_pass(run: Run, x: Tensor, aside: bool) -> None:
    loss = run.loss(run.model(x), Y)
    grad(run.plain(run.apart(x), Y) if aside else loss, x, retain_graph=True)
    loss.backward()


def scores_of_one_pass(run: Run, x: Tensor, aside: bool) -> None:
    f = run.model(x)
    grad((run.apart(x) if aside else f)[:, 0].sum(), x, retain_graph=True)
    run.loss(f, Y).backward()


def gradients_written_by_hand(run: Run, x: Tensor, aside: bool) -> None:
    """What torch.autograd.grad returns is what is trained on where it is written to ``.grad``."""
    if aside:
        run.train(x)
        return
    parameters = list(run.model.parameters())
    for p, g in zip(parameters, grad(run.loss(run.model(x), Y), parameters)):
        p.grad = g


@pytest.mark.parametrize(
    "loop", [penalty_of_one_pass, attack_of_one_pass, scores_of_one_pass, gradients_written_by_hand]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_forward_pass_that_is_used_twice_counts_once(loop: Callable[..., None], weighted: bool) -> None:
    for kind, structure in itertools.product(KINDS, STRUCTURES):
        runs = []
        for aside in (False, True):
            run = Run(False, weighted, kind, structure)
            for _ in range(3):
                run.opt.zero_grad()
                loop(run, X.clone().requires_grad_(), aside)
                run.opt.step()
            runs.append(run)
        a, b = runs
        assert a.opt.metric.seen == b.opt.metric.seen
        assert distance(weights(a.model), weights(b.model)) < 1e-12, (kind, structure)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_term_beside_the_criterion_asks_for_no_labels(kind: str, weighted: bool) -> None:
    """Consistency between two outputs, as of TRADES and VAT, is backpropagated with the loss."""
    run = Run(False, weighted, kind, "kfac")
    losses = []
    for _ in range(30):
        run.opt.zero_grad()
        f = run.model(X)
        loss = run.loss(f, Y)
        other = run.model(X + 0.1 * torch.ones_like(X)).log_softmax(1)
        (loss + 0.3 * F.kl_div(other, f.softmax(1), reduction="batchmean")).backward()
        run.opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "dense"])
def test_two_sets_of_labels_for_one_output_count_once(reduction, structure):
    """As in mixup: the metric is that of the criterion at this output."""
    found = []
    for mixed in (True, False):
        torch.manual_seed(0)
        model, criterion = (
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
            nn.CrossEntropyLoss(reduction=reduction),
        )
        metric = ng.Fisher(model, criterion, kind="exact", structure=structure)
        opt = ng.NaturalGradient(metric)
        x, y = torch.randn(8, 3), torch.arange(8) % 3
        z = model(x)
        loss = 0.7 * criterion(z, y) + 0.3 * criterion(z, y.flip(0)) if mixed else criterion(z, y)
        loss.backward()
        opt.step()
        found.append((metric.dense(), metric.seen, metric.labels))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-7)
    assert found[0][1:] == found[1][1:] == (8, 8)
