"""Copies of models, metrics and optimizers: they go on bit for bit, or are refused with the way to do it."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from training_cases import Scaled, batches, classifier, same, train, weights

import natgrad as ng

DATA = list(batches(14))
KINDS = ("sampled", "exact", "empirical")
STRUCTURES = ("kfac", "ekfac", "input", "block", "diagonal", "dense")


def torch_saved(held: Any) -> Any:
    file = io.BytesIO()
    torch.save(held, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DEEP: dict[str, Callable[[nn.Module, Any], tuple[nn.Module, Any]]] = {
    "a pair": lambda m, o: copy.deepcopy((m, o)),
    "the other way round": lambda m, o: copy.deepcopy([o, m])[::-1],
    "a dictionary": lambda m, o: tuple(copy.deepcopy({"model": m, "opt": o}).values()),
    "the optimizer": lambda m, o: (twin := copy.deepcopy(o)) and (twin.metric.model, twin),
    "metric and optimizer": lambda m, o: (twin := copy.deepcopy((o.metric, o))) and (twin[0].model, twin[1]),
}


@pytest.mark.parametrize("how", DEEP)
@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_goes_on_bit_for_bit_and_apart(how: str, kind: str) -> None:
    for structure, stop in itertools.product(STRUCTURES, (0, 1, 5)):
        model, loss = Scaled(), nn.CrossEntropyLoss()
        opt = ng.NaturalGradient(ng.Fisher(model, loss, kind=kind, structure=structure), average=0.9)
        train(model, opt, DATA[:stop])
        before = weights(model)
        twin, its = DEEP[how](model, opt)
        assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
        theirs = train(twin, its, DATA[stop:], loss)  # by the criterion that the loop knows
        assert same(weights(model), before), "the copy moved what it was made of"
        ours = train(model, opt, DATA[stop:], loss)
        assert theirs == ours
        assert same(weights(model), weights(twin))
        assert same(opt.state_dict(), its.state_dict()), structure


@pytest.mark.parametrize("rule", [ng.FixedStep, ng.Grafted, ng.KLTrustRegion])
def test_rules_groups_and_foreign_parameters_are_copied(rule: type[ng.FixedStep]) -> None:
    model, loss = classifier(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, loss), step=rule(), groups=[{"params": "2.*", "lr": 0.01}])
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    train(model, opt, DATA[:3])
    twin, its = copy.deepcopy((model, opt))
    foreign = [its.param_groups[-1]["params"][0], opt.param_groups[-1]["params"][0]]
    assert foreign[0] is not foreign[1]
    assert train(twin, its, DATA[3:]) == train(model, opt, DATA[3:])
    assert same(opt.state_dict(), its.state_dict())


def test_a_scheduler_is_copied_with_its_optimizer() -> None:
    model = classifier()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()))
    scheduler = CosineAnnealingLR(opt, 20)
    runs = [(model, opt, scheduler)]
    for x, y in DATA[:3]:
        train(model, opt, [(x, y)])
        scheduler.step()
    runs.append(copy.deepcopy(runs[0]))
    found = []
    for m, o, s in runs:
        for batch in DATA[3:]:
            train(m, o, [batch])
            s.step()
        found.append((weights(m), o.param_groups[0]["lr"]))
    assert same(*found)


def test_heads_and_a_criterion_inside_the_model_are_copied() -> None:
    class Owning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = classifier(), nn.CrossEntropyLoss()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.criterion(self.net(x), y)

    model = Owning()
    opt = ng.NaturalGradient(ng.Fisher(model, model.criterion, kind="empirical"))
    pairs = [(model, opt), copy.deepcopy((model, opt))]
    for m, o in pairs:
        assert o.metric.criterion is m.criterion
        for x, y in DATA:
            o.zero_grad()
            m(x, y).backward()
            o.step()
    assert same(weights(pairs[0][0]), weights(pairs[1][0]))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_copy_of_a_metric_holds_statistics_of_its_own(structure: str) -> None:
    model, loss = classifier(), nn.CrossEntropyLoss()
    metric = ng.Fisher(model, loss, structure=structure)
    metric.update(*DATA[0])
    twin = copy.deepcopy(metric)
    assert twin.model is not model
    before = metric.dense()
    assert torch.equal(twin.dense(), before)
    twin.update(*DATA[1])
    assert torch.equal(metric.dense(), before)
    metric.update(*DATA[1])
    assert torch.equal(metric.dense(), twin.dense())
    opt = ng.NaturalGradient(twin)
    train(twin.model, opt, DATA[2:4])
    assert opt.refreshes == 2


@pytest.mark.parametrize("what", ["optimizer", "metric", "pair"])
@pytest.mark.parametrize("how", [copy.copy, pickle.dumps, torch_saved], ids=["copy", "pickle", "torch.save"])
def test_pickles_and_shallow_copies_are_refused_at_once(what: str, how: Callable[[Any], Any]) -> None:
    model = classifier()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()))
    train(model, opt, DATA[:2])
    held = {"optimizer": opt, "metric": opt.metric, "pair": (model, opt)}[what]
    if what == "pair" and how is copy.copy:
        assert copy.copy(held) == held  # a tuple of the same two
        return
    with pytest.raises(TypeError, match=r"cannot be pickled.*Save its state_dict\(\).*copy.deepcopy\(\(model, opt\)\)"):
        how(held)
    train(model, opt, DATA[2:4])
    assert opt.steps == 4


def test_an_optimizer_by_functions_of_the_user_is_not_copied() -> None:
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    opt = ng.NaturalGradient(ng.GaussNewton(net, {"value": lambda u, x: u(x) - x}))
    with pytest.raises(TypeError, match=r"GaussNewton cannot be copied.*load opt.state_dict\(\)"):
        copy.deepcopy((net, opt))


def test_accelerate_copies_what_it_has_prepared() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        model, loss = classifier(torch.float32), nn.CrossEntropyLoss()
        model, opt = accelerator.prepare(model, ng.NaturalGradient(ng.Fisher(model, loss)))
        pairs = [(model, opt), copy.deepcopy((model, opt))]
        for m, o in pairs:
            for x, y in batches(6, dtype=torch.float32):
                o.zero_grad()
                accelerator.backward(loss(m(x), y))
                o.step()
            assert o.optimizer.steps == 6
        assert same(weights(pairs[0][0]), weights(pairs[1][0]))
        with pytest.raises(TypeError, match=r"cannot be pickled"):
            pickle.dumps(opt)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
