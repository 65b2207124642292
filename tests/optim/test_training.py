"""The optimizer as a `torch.optim.Optimizer`: everything people do with one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from training_cases import Scaled, batches, classifier, distance, natural, train, weights

import natgrad as ng


def run(count: int = 12, model: nn.Module | None = None, **options: Any) -> dict[str, torch.Tensor]:
    model = model or classifier()
    train(model, natural(model, **options), batches(count))
    return weights(model)


# groups ----------------------------------------------------------------------------------------------------


def test_groups_take_options_of_their_own() -> None:
    model = classifier()
    opt = natural(model, groups=[{"params": "2.*", "lr": 0.0}], weight_decay=0.1)
    before = weights(model)
    train(model, opt, batches(3))
    moved = {n: not torch.equal(before[n], p) for n, p in model.named_parameters()}
    assert moved == {"0.weight": True, "0.bias": True, "2.weight": False, "2.bias": False}
    assert [len(g["params"]) for g in opt.param_groups] == [2, 2]


def test_a_layer_split_over_groups_that_differ_in_rate_is_refused_by_name() -> None:
    model = classifier()
    opt = natural(model, groups=[{"params": "*.bias", "lr": 0.01}])
    with pytest.raises(ValueError, match=r"lr in one step for the block of \['0.weight', '0.bias'\]"):
        train(model, opt, batches(1))


def test_weight_decay_is_decoupled_and_spares_the_biases_that_a_group_exempts() -> None:
    model = classifier()
    opt = natural(model, lr=0.02, weight_decay=0.5, groups=[{"params": "*.bias", "weight_decay": 0.0}])
    plain = classifier()
    free = natural(plain, lr=0.02, weight_decay=0.0)
    before = weights(model)
    train(model, opt, batches(1))
    train(plain, free, batches(1))
    for n, p in model.named_parameters():
        pulled = before[n] * 0.02 * 0.5 if n.endswith("weight") else torch.zeros_like(p)
        torch.testing.assert_close(
            p.detach(), dict(plain.named_parameters())[n].detach() - pulled, rtol=1e-12, atol=1e-12
        )


# schedulers ------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.05, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=10),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_sets_the_rate_in_force(name: str) -> None:
    model = classifier()
    opt = natural(model)
    opt.rule.adapt = False
    scheduler = SCHEDULERS[name](opt)
    for batch in batches(6):
        rate = opt.param_groups[0]["lr"]
        train(model, opt, [batch])
        assert opt.info["step_length"] == pytest.approx(rate, rel=1e-6)
        scheduler.step()


@pytest.mark.parametrize("rule", [None, ng.FixedStep, ng.Grafted])
def test_one_cycle_with_its_defaults_moves_the_momentum_too(rule: Any) -> None:
    model = classifier()
    opt = natural(model, step=None if rule is None else rule())
    scheduler = lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
    seen = []
    for batch in batches(9):
        train(model, opt, [batch])
        seen.append(opt.param_groups[0]["momentum"])
        scheduler.step()
    assert (max(seen), min(seen)) == (0.95, 0.85)


def test_reduce_on_plateau() -> None:
    model = classifier()
    opt = natural(model)
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for batch in batches(4):
        train(model, opt, [batch])
        scheduler.step(1.0)
    assert opt.param_groups[0]["lr"] < 0.05 * 0.1**2 * 1.01


def test_a_rate_of_zero_moves_nothing() -> None:
    model = classifier()
    before = weights(model)
    train(model, natural(model, lr=0.0), batches(3))
    assert distance(before, weights(model)) == 0


# closures, hooks, maximize, zero_grad ------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_does_what_the_plain_loop_does(by_name: bool) -> None:
    model = classifier()
    opt = natural(model)
    for x, y in batches(12):

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            opt.zero_grad()
            loss = opt.metric.criterion(model(x), y)
            loss.backward()
            return loss

        loss = opt.step(closure=closure) if by_name else opt.step(closure)
        assert loss.requires_grad
    assert distance(weights(model), run()) == 0


def test_hooks_before_and_after_a_step_fire() -> None:
    model = classifier()
    opt = natural(model)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    train(model, opt, batches(2))
    opt.state_dict()
    assert seen == ["before", "after"] * 2 + ["saved"]


def test_maximize_climbs_where_a_negated_loss_would_descend() -> None:
    model, other = classifier(), classifier()
    up = natural(model, maximize=True)
    criterion = nn.CrossEntropyLoss()
    down = ng.NaturalGradient(ng.Fisher(other, criterion, kind="exact"))
    train(model, up, batches(6))
    for x, y in batches(6):
        down.zero_grad()
        (-criterion(other(x), y)).backward()
        down.step()
    assert distance(weights(model), weights(other)) < 1e-12


def test_gradients_cleared_to_zero_do_as_well_as_to_none() -> None:
    model = classifier()
    opt = natural(model)
    for x, y in batches(12):
        opt.zero_grad(set_to_none=False)
        opt.metric.criterion(model(x), y).backward()
        opt.step()
    assert distance(weights(model), run()) == 0


def test_clearing_through_the_model_does_as_well() -> None:
    model = classifier()
    opt = natural(model)
    for x, y in batches(12):
        model.zero_grad()
        opt.metric.criterion(model(x), y).backward()
        opt.step()
    assert distance(weights(model), run()) == 0


def test_a_step_without_any_gradient_does_nothing() -> None:
    model = classifier()
    opt = natural(model)
    with pytest.warns(UserWarning, match=r"step\(\) did nothing: no parameter of the optimizer has a gradient"):
        opt.step()
    opt.step()  # it is said once
    assert opt.steps == 0


# accumulation, clipping --------------------------------------------------------------------------------------


def test_the_average_advances_once_a_step_over_all_micro_batches() -> None:
    whole, parts = classifier(), classifier()
    one, many = natural(whole), natural(parts)
    for x, y in batches(20, size=12):
        train(whole, one, [(x, y)])
        many.zero_grad()
        for a, b in ((0, 2), (2, 7), (7, 12)):
            (many.metric.criterion(parts(x[a:b]), y[a:b]) * (b - a) / 12).backward()
        many.step()
    assert one.refreshes == many.refreshes
    assert distance(weights(whole), weights(parts)) < 1e-12


def test_statistics_of_a_backward_that_no_step_followed_are_dropped() -> None:
    model = classifier()
    opt = natural(model)
    (x, y), (x2, y2) = batches(2)
    opt.metric.criterion(model(x), y).backward()
    train(model, opt, [(x2, y2)])
    alone = classifier()
    other = natural(alone)
    train(alone, other, [(x2, y2)])
    assert torch.equal(opt.metric.dense(), other.metric.dense())


def test_clipping_scales_the_gradient_that_the_step_sees() -> None:
    clipped, scaled = classifier(), classifier()
    rule = ng.FixedStep(lr=0.1, damping=0.1)
    one = natural(clipped, step=rule)
    two = natural(scaled, step=copy.deepcopy(rule))

    def by_hand(_: int) -> None:
        grads = [p.grad for p in scaled.parameters() if p.grad is not None]
        size = torch.stack([g.norm() for g in grads]).norm()
        for g in grads:
            g.mul_((0.05 / (size + 1e-6)).clamp(max=1))

    train(clipped, one, batches(5), between=lambda _: nn.utils.clip_grad_norm_(clipped.parameters(), 0.05))
    train(scaled, two, batches(5), between=by_hand)
    assert distance(weights(clipped), weights(scaled)) < 1e-12
    assert distance(weights(clipped), run(5, step=ng.FixedStep(lr=0.1, damping=0.1))) > 1e-3


# freezing and thawing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.bias"], ["0.weight", "0.bias"], ["2.weight", "2.bias"]])
def test_frozen_in_mid_training_and_thawed_again(frozen: list[str]) -> None:
    model = classifier()
    opt = natural(model)
    named = dict(model.named_parameters())
    data = list(batches(40))
    train(model, opt, data[:10])
    for n in frozen:
        named[n].requires_grad_(False)
    before = weights(model)
    train(model, opt, data[10:20])
    assert {n for n in named if torch.equal(before[n], named[n])} == set(frozen)
    for n in frozen:
        named[n].requires_grad_(True)
    losses = train(model, opt, data[20:])
    assert all(not torch.equal(before[n], named[n]) for n in named)
    fresh = classifier()
    assert sum(losses[-5:]) < 0.5 * sum(train(fresh, natural(fresh), data[:5]))


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight"])
def test_a_parameter_frozen_from_the_start_is_thawed_into_the_metric(name: str) -> None:
    model = classifier()
    thawed = dict(model.named_parameters())[name]
    thawed.requires_grad_(False)
    opt = natural(model)
    train(model, opt, batches(30))
    assert name not in opt.metric.names
    thawed.requires_grad_(True)
    opt.add_param_group({"params": [thawed]})
    train(model, opt, batches(3))
    assert opt.metric.names == [n for n, _ in model.named_parameters()]
    assert opt.metric.coverage()[name].block == "kfac"
    assert opt.metric.without_curvature() == set()
    whole = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact")
    whole.update(*next(batches(1)))
    assert opt.metric.factors("0.weight")[1].shape == whole.factors("0.weight")[1].shape


def test_a_foreign_parameter_is_trained_without_curvature() -> None:
    model = classifier()
    temperature = nn.Parameter(torch.ones((), dtype=torch.float64))
    for rule in (None, ng.FixedStep(), ng.KLTrustRegion(), ng.Grafted()):
        opt = natural(model, step=rule)
        opt.add_param_group({"params": [temperature]})
        before = temperature.detach().clone()
        for x, y in batches(3):
            opt.zero_grad()
            opt.metric.criterion(model(x) * temperature, y).backward()
            opt.step()
        assert not torch.equal(before, temperature.detach())


# what has no curvature -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [None, ng.FixedStep, ng.KLTrustRegion, ng.Grafted])
def test_parameters_without_a_rule_are_trained_on_a_matching_scale(rule: Any) -> None:
    model = Scaled()
    opt = natural(model, step=None if rule is None else rule())
    before = weights(model)
    losses = train(model, opt, batches(30))
    assert opt.metric.coverage()["gate"].block == "no curvature"
    moved = {n: float((p.detach() - before[n]).square().mean().sqrt()) for n, p in model.named_parameters()}
    assert 0.03 < moved["gate"] / moved["first.weight"] < 30
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.filterwarnings("ignore:no parameter has curvature")
def test_a_model_with_no_covered_parameter_trains() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :3] * self.gate.exp()

    model = Gate()
    opt = natural(model)
    losses = train(model, opt, batches(60))
    assert opt.refreshes > 5
    assert sum(losses[-10:]) < sum(losses[:10])


# averaged weights ----------------------------------------------------------------------------------------------


def test_averaged_weights_are_the_exponential_average_and_leave_training_alone() -> None:
    model = classifier()
    opt = natural(model, average=0.9)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i, batch in enumerate(batches(25), start=1):
        train(model, opt, [batch])
        for n, p in model.named_parameters():
            expected[n].lerp_(p.detach(), max(0.1, 1 / i))
    trained = weights(model)
    with opt.averaged():
        assert distance(weights(model), expected) < 1e-12
    assert distance(weights(model), trained) == 0
    assert distance(trained, run(25)) == 0


def test_averaged_weights_refuse_to_be_trained_and_come_back_after_an_error() -> None:
    model = classifier()
    opt = natural(model, average=0.9)
    train(model, opt, batches(5))
    trained = weights(model)
    with pytest.raises(RuntimeError, match="would train the average"), opt.averaged():
        train(model, opt, batches(1))
    assert distance(weights(model), trained) == 0
    train(model, opt, batches(1))
    with pytest.raises(ValueError, match=r"average=0\.98"), natural(classifier()).averaged():
        pass
    with pytest.raises(ValueError, match="between 0 and 1"):
        natural(model, average=1.0)


# validation with gradients on ------------------------------------------------------------------------------

PLACES = ("before", "after forward", "after criterion", "after backward")


def ends_of_training(place: str, looks: int, structure: str, grad: bool = True, **options: Any) -> dict[str, Any]:
    """Twelve steps of two micro-batches, with looks at other data in one place of each of them."""
    model = Scaled()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), structure={"gate": "diagonal", "*": structure}, **options)
    opt = ng.NaturalGradient(metric)
    others = list(batches(3, size=10, seed=9))
    kept: list[Any] = []  # whoever sums up the losses keeps their graphs

    def look(here: str) -> None:
        if here != place:
            return
        model.eval()
        with torch.set_grad_enabled(grad):
            kept[:] = [metric.criterion(model(x), y) for x, y in (others * looks)[:looks]]
        model.train()

    for x, y in batches(12):
        opt.zero_grad()
        for a, b in zip(x.chunk(2), y.chunk(2)):
            look("before")
            out = model(a)
            look("after forward")
            loss = metric.criterion(out, b)
            look("after criterion")
            loss.backward()
            look("after backward")
        opt.step()
    state = metric.state_dict()
    return {"weights": weights(model), "seen": metric.seen, "masses": metric._masses, **state["tensors"]}


@pytest.mark.parametrize("looks", [1, 11])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("structure", "options"),
    [("kfac", {"max_positions": 5}), ("ekfac", {}), ("dense", {}), ("kfac", {"kind": "exact"})],
    ids=str,
)
def test_a_validation_that_is_not_backpropagated_leaves_no_trace(
    structure: str, options: dict[str, Any], place: str, looks: int
) -> None:
    torch.testing.assert_close(
        ends_of_training(place, looks, structure, **options),
        ends_of_training("nowhere", 0, structure, **options),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("place", PLACES)
def test_nor_does_one_without_gradients(place: str) -> None:
    found, expected = (ends_of_training(p, 2, "kfac", grad=False) for p in (place, "nowhere"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_resumed_run_draws_what_the_other_draws_after_a_validation() -> None:
    model, twin = classifier(), classifier()
    opts = [ng.NaturalGradient(ng.Fisher(m, nn.CrossEntropyLoss())) for m in (model, twin)]
    train(model, opts[0], batches(3))
    opts[0].metric.criterion(model(next(batches(1, seed=9))[0]), torch.zeros(16, dtype=torch.long))
    twin.load_state_dict(model.state_dict())
    opts[1].load_state_dict(opts[0].state_dict())
    for m, opt in zip((model, twin), opts):
        train(m, opt, batches(12, seed=5))
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=0)
