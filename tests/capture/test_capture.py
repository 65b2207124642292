"""What capture leaves untouched, where it draws, what it drops, and what it costs."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from cases import KINDS, STRUCTURES, mlp
from torch import Tensor, nn

import natgrad as ng
from natgrad.capture import tape as capture
from natgrad.fisher import estimator

Close = Callable[[Tensor, Tensor, float], None]

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
Y = torch.tensor([0, 2, 1, 2])


class Always:
    """A driver that wants statistics of every forward pass."""

    refresh_due, rule = True, ng.NormalisedStep()


def driven(model: nn.Module, criterion: nn.Module, **options: Any) -> ng.Fisher:
    metric = ng.Fisher(model, criterion, **options)
    metric.driver_kept_alive = Always()
    metric.drive(metric.driver_kept_alive)
    return metric


def dense_of(model: nn.Module, criterion: nn.Module, x: Tensor = X, y: Any = Y, **options: Any) -> Tensor:
    twin = ng.Fisher(copy.deepcopy(model), criterion, structure="dense", **options)
    twin.update(x, y)
    return twin.dense()


# nothing of the user's changes ----------------------------------------------------------------------------------


class Busy(nn.Module):
    """Dropout, a buffer that counts, batch norm in eval mode and an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 3)
        self.dropout, self.relu = nn.Dropout(0.3), nn.ReLU(inplace=True)
        self.register_buffer("count", torch.zeros(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.second(self.dropout(self.relu(self.first(x))))


def run(watched: bool, kind: str, structure: str, functional: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    model, criterion = Busy(), nn.CrossEntropyLoss()
    metric = driven(model, criterion, kind=kind, structure=structure, targets=lambda _: Y) if watched else None
    torch.manual_seed(7)
    for _ in range(2):  # accumulated
        out = model(X)
        loss = nn.functional.cross_entropy(out, Y) if functional else criterion(out, Y)
        loss.backward()
    if metric is not None:
        assert metric.advance(0.0)
        assert metric.seen == 8
    return [p.grad for p in model.parameters()], torch.get_rng_state(), model.count


@pytest.mark.parametrize("functional", [False, True], ids=["module", "functional"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_random_state_are_bit_identical(kind: str, structure: str, functional: bool) -> None:
    (plain, rng, count), (watched, rng2, count2) = (run(w, kind, structure, functional) for w in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched))
    assert torch.equal(rng, rng2)
    assert torch.equal(count, count2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_update_leaves_everything_as_it_was(kind: str, training: bool) -> None:
    model = Busy().train(training)
    model.second.eval()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    rng, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind=kind)
    metric.update(X, Y)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())
    assert not torch.is_inference_mode_enabled()
    with torch.no_grad():
        metric.update(X, Y)
        assert not torch.is_grad_enabled()


def test_batch_norm_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"batch normalisation in training mode \('1' .*model.eval\(\)"):
        ng.Fisher(model, nn.CrossEntropyLoss(), kind="empirical", params=["0.*", "2.*"]).update(X, Y)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


# cost -----------------------------------------------------------------------------------------------------------


def test_ordinary_steps_open_no_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, walked = [], []
    real_open, real_walk = capture.Tape.open, estimator.coverage_walk
    monkeypatch.setattr(capture.Tape, "open", lambda *a: (opened.append(1), real_open(*a))[1])
    monkeypatch.setattr(estimator, "coverage_walk", lambda *a: (walked.append(1), real_walk(*a))[1])
    model, criterion = mlp(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion))
    refreshed = 0
    for _ in range(60):
        opt.zero_grad()
        due = opt.refresh_due
        loss = criterion(model(X), Y)
        loss.backward()
        opt.step()
        refreshed += opt.info["refreshed"]
        assert opt.info["refreshed"] == due
    assert len(opened) == len(walked) == refreshed == opt.info["refreshes"] < 30


def test_forward_without_grad_is_not_watched() -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = driven(model, criterion)
    with torch.no_grad():
        criterion(model(X), Y)
    model.eval()
    with torch.inference_mode():
        model(X)
    assert metric._watcher.here.tapes == []
    assert not metric.advance(0.0)


# where it draws --------------------------------------------------------------------------------------------------


WEIGHT = torch.tensor([0.3, 1.7, 0.9]).double()


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_training_sees_what_update_sees(kind: str, structure: str, close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=0, label_smoothing=0.1)
    metric = driven(model, criterion, kind=kind, structure=structure)
    criterion(model(X), Y).backward()
    assert metric.advance(0.0)
    twin = ng.Fisher(model, criterion, kind=kind, structure=structure)
    twin.update(X, Y)
    close(metric.dense(), twin.dense(), 1e-13)


@pytest.mark.parametrize("call", ["functional", "other-module", "by-hand"])
def test_without_the_criterion_module_it_draws_at_the_output(call: str, close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = driven(model, criterion, kind="exact", structure="dense")
    losses = {
        "functional": nn.functional.cross_entropy,
        "other-module": nn.CrossEntropyLoss(),
        "by-hand": lambda out, y: -out.log_softmax(1)[torch.arange(4), y].mean(),
    }
    losses[call](model(X), Y).backward()
    assert metric.advance(0.0)
    close(metric.dense(), dense_of(model, criterion, kind="exact"), 1e-13)


def test_output_and_targets_for_a_functional_loss(close: Close) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"logits": self.body(batch["x"])}

    model, criterion = Rows(), nn.CrossEntropyLoss(weight=WEIGHT)
    metric = driven(
        model,
        criterion,
        kind="exact",
        structure="dense",
        output=lambda out: out["logits"],
        targets=lambda batch: batch["y"],
    )
    nn.functional.cross_entropy(model({"x": X, "y": Y})["logits"], Y, weight=WEIGHT).backward()
    assert metric.advance(0.0)
    close(metric.dense(), dense_of(model.body, criterion, kind="exact"), 1e-13)


class WithLoss(nn.Module):
    """The loss is computed inside the model, as language models do."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.body, self.criterion = mlp(), criterion

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.body(x)
        return self.criterion(out, y), out


def test_a_criterion_module_inside_the_model(close: Close) -> None:
    criterion = nn.CrossEntropyLoss(weight=WEIGHT)
    model = WithLoss(criterion)
    metric = driven(model, criterion, kind="empirical", structure="dense")
    loss, _ = model(X, Y)
    loss.backward()
    assert metric.advance(0.0)
    close(metric.dense(), dense_of(model.body, criterion, kind="empirical"), 1e-13)


def test_reshaped_outputs_are_seen_as_the_criterion_sees_them(close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss(ignore_index=1)
    x, y = torch.randn(3, 2, 3).double(), torch.randint(3, (3, 2))
    metric = driven(model, criterion, kind="exact", structure="dense")
    criterion(model(x).reshape(-1, 3), y.reshape(-1)).backward()
    assert metric.advance(0.0)
    expected = oracle.gauss_newton(model, criterion, [(x, y.reshape(-1))], lambda out: out.reshape(-1, 3))
    close(metric.dense(), expected, 1e-10)


def pair(out: Tensor) -> tuple[Tensor, Tensor]:
    return out[:, 0], out[:, 1].exp()


CALLS: dict[str, tuple[nn.Module, Callable[[Any, Tensor], Tensor], Tensor, Callable[[Tensor], Any]]] = {
    "keywords": (nn.CrossEntropyLoss(), lambda c, o: c(target=Y, input=o), Y, lambda o: o),
    "variance": (nn.GaussianNLLLoss(), lambda c, o: c(pair(o)[0], X[:, 0], pair(o)[1]), X[:, 0], pair),
    "fixed-variance": (
        nn.GaussianNLLLoss(),
        lambda c, o: c(o, X, torch.full((4, 1), 0.5).double()),
        X,
        lambda o: (o, torch.full((4, 1), 0.5).double()),
    ),
    "variance-number": (nn.GaussianNLLLoss(), lambda c, o: c(o, X, 0.5), X, lambda o: (o, 0.5)),
    "variance-keyword": (nn.GaussianNLLLoss(), lambda c, o: c(o, X, var=0.5), X, lambda o: (o, 0.5)),
    "likelihood": (
        ng.Likelihood(lambda f: torch.distributions.Normal(*f)),
        lambda c, o: c(pair(o), X[:, 0]),
        X[:, 0],
        pair,
    ),
}


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_ways_to_call_the_criterion(call: Any, kind: str, close: Close) -> None:
    criterion, loss, labels, output = call
    model = mlp()
    metric = driven(model, criterion, kind=kind, structure="dense")
    loss(criterion, model(X)).backward()
    assert metric.advance(0.0)
    close(metric.dense(), dense_of(model, criterion, X, labels, kind=kind, output=output), 1e-12)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.body(a + scale * b)


def test_inputs_as_tuple_and_dict(close: Close) -> None:
    model, criterion = Two(), nn.CrossEntropyLoss()
    expected = dense_of(model.body, criterion, X + 2 * X, kind="exact")
    for inputs in ((X, X, 2.0), {"a": X, "b": X, "scale": 2.0}):
        metric = ng.Fisher(model, criterion, kind="exact", structure="dense")
        metric.update(inputs)
        close(metric.dense(), expected, 1e-13)
    metric = ng.Fisher(
        model, criterion, kind="empirical", structure="dense", targets=lambda given: (given["b"][:, 0] > 0).long()
    )
    metric.update({"a": X, "b": X, "scale": 2.0})
    close(metric.dense(), dense_of(model.body, criterion, 3 * X, (X[:, 0] > 0).long(), kind="empirical"), 1e-13)


def test_scaled_losses_give_the_same_metric(close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = driven(model, criterion, kind="empirical", structure="dense")
    (1000 * criterion(model(X), Y) + sum(p.square().sum() for p in model.parameters())).backward()
    assert metric.advance(0.0)
    close(metric.dense(), dense_of(model, criterion, kind="empirical"), 1e-13)


def test_two_forward_passes_before_one_loss(close: Close) -> None:
    """Siamese use: one criterion call over both outputs."""
    model, criterion = mlp(), nn.MSELoss()
    metric = driven(model, criterion, kind="exact", structure="dense")
    a, b = model(X), model(X + 1)
    criterion(torch.cat([a, b]), torch.zeros(8, 3).double()).backward()
    assert metric.advance(0.0)
    both = torch.cat([X, X + 1])
    expected = oracle.gauss_newton(model, criterion, [(both, torch.zeros(8, 3).double())])
    close(metric.dense(), expected, 1e-10)


def test_accumulated_micro_batches_are_one_batch(close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss(weight=WEIGHT)
    metric = driven(model, criterion, kind="exact", structure="dense")
    for part in (slice(0, 1), slice(1, 4)):
        criterion(model(X[part]), Y[part]).backward()
    assert metric.advance(0.0)
    close(metric.dense(), dense_of(model, criterion, kind="exact"), 1e-13)


def test_in_place_activations_and_a_layer_called_twice(close: Close) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.a, self.b, self.relu = nn.Linear(3, 3).double(), nn.Linear(3, 3).double(), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.relu(self.a(self.relu(self.a(x)))))

    model = Twice()
    expected = oracle.gauss_newton(model, nn.CrossEntropyLoss(), [(X, Y)])
    close(dense_of(model, nn.CrossEntropyLoss(), kind="exact"), expected, 1e-10)
    metric = driven(model, nn.CrossEntropyLoss(), kind="exact", structure="block")
    nn.functional.cross_entropy(model(X), Y).backward()
    metric.advance(0.0)
    close(metric.dense(), oracle.block_diagonal(expected, model), 1e-10)


def test_tied_and_functionally_used_weights(close: Close) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(6)
            self.a = nn.Linear(3, 3, bias=False).double()
            self.b = nn.Linear(3, 3, bias=False).double()
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.b(self.a(x).tanh()), self.a.weight)

    model = Tied()
    expected = oracle.gauss_newton(model, nn.CrossEntropyLoss(), [(X, Y)])
    close(dense_of(model, nn.CrossEntropyLoss(), kind="exact"), expected, 1e-10)


class Matmul(nn.Module):
    """One parameter that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.w = nn.Parameter(torch.randn(4, 3).double())
        self.fc = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x @ (2 * self.w).T).tanh())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_parameter_without_a_rule_gets_a_block_from_per_datum_gradients(structure: str, close: Close) -> None:
    model, criterion = Matmul(), nn.CrossEntropyLoss()
    metric = ng.Fisher(model, criterion, kind="exact", structure=structure)
    metric.update(X[:1], Y[:1])
    metric.update(X[1:], Y[1:])
    expected = oracle.gauss_newton(model, criterion, [(X, Y)])[:12, :12]
    found = metric.dense()[:12, :12]
    close(found, torch.diag(expected.diagonal()) if structure == "diagonal" else expected, 1e-10)
    row = metric.coverage()["w"]
    assert "no op rule covers" in row.why


def test_a_parameter_without_a_rule_is_trained_and_listed() -> None:
    model, criterion = Matmul(), nn.CrossEntropyLoss()
    metric = ng.Fisher(model, criterion)
    opt = ng.NaturalGradient(metric)
    before = model.w.detach().clone()
    criterion(model(X), Y).backward()
    opt.step()
    assert not torch.equal(model.w, before)
    row = metric.coverage()["w"]
    assert row.block == "no curvature"
    assert "Adam" in row.why
    assert "no curvature" in str(metric.coverage())


# what it drops ---------------------------------------------------------------------------------------------------


def test_forwards_never_backpropagated_are_dropped(close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = driven(model, criterion, kind="exact", structure="dense")
    criterion(model(X * 5), Y)  # logged only
    model(X * 7)
    criterion(model(X), Y).backward()
    assert metric.advance(0.0)
    assert metric.seen == 4
    close(metric.dense(), dense_of(model, criterion, kind="exact"), 1e-13)
    criterion(model(X * 5), Y)
    assert not metric.advance(0.5)


def test_statistics_without_a_step_are_dropped(close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = driven(model, criterion, kind="exact", structure="dense")
    criterion(model(X * 5), Y).backward()
    metric.discard_pending()  # what zero_grad and a skipped step do
    criterion(model(X), Y).backward()
    assert metric.advance(0.0)
    close(metric.dense(), dense_of(model, criterion, kind="exact"), 1e-13)


def test_an_exception_in_forward_is_survived() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fail = mlp(), True

        def forward(self, x: Tensor) -> Tensor:
            out = self.body(x)
            if self.fail:
                raise RuntimeError("out of luck")
            return out

    model, criterion = Sometimes(), nn.CrossEntropyLoss()
    metric = driven(model, criterion, kind="exact", structure="dense")
    with pytest.raises(RuntimeError, match="out of luck"):
        model(X)
    assert torch.overrides._get_current_function_mode() is None
    model.fail = False
    criterion(model(X), Y).backward()
    assert metric.advance(0.0)
    assert metric.seen == 4


@pytest.mark.filterwarnings("ignore:the metric is the curvature of CrossEntropyLoss")
def test_no_graph_is_kept_alive() -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = driven(model, criterion)
    gc.collect()
    gc.disable()
    try:
        for call in (criterion, nn.functional.cross_entropy, lambda out, _: out.sum()):
            out = model(X)
            kept = weakref.ref(out)
            graph = weakref.ref(out.grad_fn.metadata.setdefault("here", Marker()))
            call(out, Y).backward()
            del out
            assert kept() is None
            assert graph() is None
            assert metric.advance(0.0)
    finally:
        gc.enable()


class Marker:
    """Lives as long as the graph node whose metadata hold it."""


def test_copies_and_pickles_of_a_watched_model() -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = driven(model, criterion)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        criterion(twin(X), Y).backward()
        assert not metric.advance(0.0)
    buffer = io.BytesIO()
    torch.save(model, buffer)


def test_a_metric_that_is_gone_watches_nothing() -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = driven(model, criterion)
    assert model._forward_hooks
    gone = weakref.ref(metric)
    del metric
    gc.collect()
    assert gone() is None
    assert not {**model._forward_hooks, **model._forward_pre_hooks, **criterion._forward_hooks}
    criterion(model(X), Y).backward()


def test_hooks_of_the_user_that_rewrite_the_output_are_seen(close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = driven(model, criterion, kind="exact", structure="dense")
    model.register_forward_hook(lambda _, __, out: 2 * out)
    nn.functional.cross_entropy(model(X), Y).backward()
    assert metric.advance(0.0)
    expected = oracle.gauss_newton(model, criterion, [(X, Y)])
    close(metric.dense(), expected, 1e-10)


def test_a_second_metric_of_a_watched_model_is_apart(close: Close) -> None:
    """Its update is no training: the first metric must not count it, nor be disturbed before its own loss comes."""
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = driven(model, criterion, kind="exact", structure="dense")
    out = model(X)
    second = ng.Fisher(model, criterion, kind="exact", structure="dense")
    second.update(X * 3, Y)
    nn.functional.cross_entropy(out, Y).backward()
    assert metric.advance(0.0)
    assert metric.seen == second.seen == 4
    close(metric.dense(), dense_of(model, criterion, kind="exact"), 1e-13)
    close(second.dense(), dense_of(model, criterion, X * 3, kind="exact"), 1e-13)


def test_functional_transforms_are_left_alone() -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = driven(model, criterion)
    params = {n: p.detach() for n, p in model.named_parameters()}
    torch.func.grad(lambda p: criterion(torch.func.functional_call(model, p, (X,)), Y))(params)
    assert not metric.advance(0.0)
