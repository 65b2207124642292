"""`torch.compile` of the model, before or after the metric is attached: refreshes run eagerly, all else one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import batches, classifier, distance, natural, train, weights

import natgrad as ng

COUNT = 30


class Calls:
    """A backend that runs graphs as they are and counts the calls of each."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def __call__(self, module: torch.fx.GraphModule, examples: Any) -> Any:
        number = len(self.graphs)
        self.graphs.append(0)

        def run(*args: Any) -> Any:
            self.graphs[number] += 1
            return module.forward(*args)

        return run


class Own(nn.Module):
    """A forward method of the user's, as opposed to one of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("make", [Own, classifier])
@pytest.mark.parametrize("order", ["before", "after", "in place"])
def test_watched_steps_run_eagerly_and_all_others_one_graph(order: str, make: Any) -> None:
    plain = make()
    other = natural(plain)
    train(plain, other, batches(COUNT))
    calls = Calls()
    model = make()
    opt = natural(model) if order == "before" else None
    compiled: Any = model
    if order == "in place":
        model.compile(backend=calls)
    else:
        compiled = torch.compile(model, backend=calls)
    if opt is None:
        opt = natural(compiled)
    ordinary = 0
    for batch in batches(COUNT):
        due, before = opt.refresh_due, sum(calls.graphs)
        train(compiled, opt, [batch])
        ran = sum(calls.graphs) - before
        assert ran <= 1 if due else ran == 1
        ordinary += not due
    assert opt.metric.names == [n for n, _ in model.named_parameters()]
    assert opt.refreshes == other.refreshes == COUNT - ordinary
    assert max(calls.graphs) >= ordinary - 1  # one graph for them all; a second where the first was cut at a hook
    assert distance(weights(model), weights(plain)) < 1e-12


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_inductor() -> None:
    plain, model = classifier(torch.float32), classifier(torch.float32)
    train(plain, natural(plain), batches(12, dtype=torch.float32))
    compiled: Any = torch.compile(model)
    train(compiled, natural(compiled), batches(12, dtype=torch.float32))
    assert distance(weights(model), weights(plain)) < 1e-4


def test_a_compiled_step_is_the_step() -> None:
    """The update reads and writes state that a graph cannot hold: it runs as it is."""
    plain, model = classifier(), classifier()
    train(plain, natural(plain), batches(12))
    opt = natural(model)
    step = torch.compile(opt.step, backend="eager")
    for x, y in batches(12):
        opt.zero_grad()
        opt.metric.criterion(model(x), y).backward()
        step()
    assert distance(weights(model), weights(plain)) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_a_region_compiled_inside_the_model() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = nn.Linear(4, 4).double(), torch.compile(classifier(), backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.first(x))

    model = Outer()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()))
    losses = train(model, opt, batches(20))  # a watched pass runs eagerly, the region too
    assert opt.refreshes >= 5
    assert losses[-1] < losses[0]
    assert "rest.0.weight" in opt.metric.names


def test_two_metrics_of_one_model_leave_the_compiler_as_it_was() -> None:
    calls = Calls()
    model = classifier()
    compiled: Any = torch.compile(model, backend=calls)
    one, two = natural(compiled, refresh=5), natural(compiled)
    for x, y in batches(COUNT):
        one.zero_grad()
        due, before = one.refresh_due or two.refresh_due, sum(calls.graphs)
        one.metric.criterion(compiled(x), y).backward()
        one.step()
        two.step()
        assert sum(calls.graphs) == before + (not due)
    assert one.refreshes > two.refreshes
