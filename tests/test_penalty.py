"""The weight penalty of the default step, and what the loss is of the criterion."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import mlp
from torch import nn
from training_cases import classifier

import natgrad as ng
from natgrad.fisher import PENALTY, PENALTY_IN_DATA

Close = Callable[..., None]
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3).sin()
Y = torch.cos(3 * X)


def steps(opt: ng.NaturalGradient, model: nn.Module, count: int, scale: float = 1.0, parts: int = 1) -> None:
    criterion = opt.metric.criterion
    for i in range(count):
        opt.zero_grad()
        for x, y in zip((X + 0.1 * i).chunk(parts), Y.chunk(parts)):
            (scale * criterion(model(x), y)).backward()
        opt.step()


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "dense", "block", "diagonal", "input"])
def test_weights_are_penalised_in_proportion_to_the_mean_eigenvalue(structure: str, close: Close) -> None:
    """A step with the penalty is a step without it from the gradient df + ρ s λ̄ W, λ̄ = tr F / P of the block of W
    and s the share of its set length that the step before had.
    """
    model = mlp(hidden=5)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.MSELoss(), kind="exact", structure=structure), lr=20.0)
    steps(opt, model, 2)
    assert opt.refreshes == 2
    twin = mlp(hidden=5)
    twin.load_state_dict(model.state_dict())
    metric = ng.Fisher(twin, nn.MSELoss(), kind="exact", structure=structure)
    plain = ng.NaturalGradient(metric, lr=20.0, weight_decay=0.0)
    plain.load_state_dict(copy.deepcopy(opt.state_dict()))
    plain.param_groups[0]["weight_decay"] = 0.0  # it came with the state
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    dense = opt.metric.dense()
    opt.zero_grad()
    nn.functional.mse_loss(model(X), Y).backward()
    plain.zero_grad()
    nn.functional.mse_loss(twin(X), Y).backward()
    at = 0
    shares = opt.rule.shares
    assert float(shares.min()) < 1
    layers = ["0", "2"]
    spans = [sum(p.numel() for n, p in twin.named_parameters() if n.startswith(k)) for k in layers]
    for i, (layer, span) in enumerate(zip(layers, spans)):
        joint = structure == "dense"
        mean = dense.trace() / len(dense) if joint else dense[at : at + span, at : at + span].trace() / span
        share = float(shares[0 if joint else i])
        weight = twin.get_submodule(layer).weight
        weight.grad += PENALTY * share * mean * weight.detach()
        at += span
    opt.step()
    plain.step()
    for n, p in model.named_parameters():
        moved, expected = p.detach() - start[n], dict(twin.named_parameters())[n].detach() - start[n]
        close(moved, expected, 1e-9)


def test_no_penalty_before_data_are_counted_and_less_where_there_are_many() -> None:
    model = mlp(hidden=5)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.MSELoss()))
    steps(opt, model, 1)
    assert opt.metric.penalty == 0
    assert opt.rule.penalties == {}
    steps(opt, model, 1)
    assert opt.metric.penalty == PENALTY  # 64 data at most
    assert set(opt.rule.penalties) == {n for n, p in model.named_parameters() if p.dim() > 1}
    opt.metric.census.pairs *= 1e6
    assert opt.metric.penalty == pytest.approx(PENALTY_IN_DATA / opt.metric.census.size, rel=1e-12)


@pytest.mark.parametrize("options", [{"weight_decay": 0.0}, {"step": ng.FixedStep(lr=0.1)}, {"empirical": True}])
def test_no_penalty_where_a_decay_or_a_rule_is_given_or_the_kind_has_no_scale(options: dict[str, object]) -> None:
    ends = []
    kind = "empirical" if options.pop("empirical", False) else "sampled"
    for strength in (PENALTY, 0.0):
        model = mlp(hidden=5)
        metric = ng.Fisher(model, nn.MSELoss(), kind=kind)
        type(metric).penalty, kept = strength, type(metric).penalty
        try:
            steps(ng.NaturalGradient(metric, **copy.deepcopy(options)), model, 5)  # type: ignore[arg-type]
        finally:
            type(metric).penalty = kept
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


def test_one_group_may_have_a_decay_of_its_own_and_the_others_the_penalty() -> None:
    model = mlp(hidden=5)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.MSELoss()), groups=[{"params": "0.*", "weight_decay": 0.0}])
    steps(opt, model, 2)
    assert set(opt.rule.penalties) == {"0.weight", "2.weight"}
    df = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    found = opt.rule.with_penalty(opt.metric.parameters, df, opt._options())
    touched = {n for n, g in found.items() if bool(g.any())}
    assert touched == {"2.weight"}
    opt.rule.fine = torch.tensor(0.0)  # a step that is masked
    found = opt.rule.with_penalty(opt.metric.parameters, df, opt._options())
    assert not any(bool(g.any()) for g in found.values())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("scale", "parts"), [(0.01, 1), (1e-6, 1), (0.5, 2)])
def test_a_loss_that_is_a_multiple_of_the_criterion_trains_alike(
    reduction: str, scale: float, parts: int, close: Close
) -> None:
    """Steps of a set length do not depend on it; those of the Newton step and the penalty would."""
    ends, limits = [], []
    for c, k in ((scale, parts), (1.0, 1)):
        model = mlp(hidden=5)
        opt = ng.NaturalGradient(ng.Fisher(model, nn.MSELoss(reduction=reduction), kind="exact"))
        steps(opt, model, 40, c, k)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        limits.append(opt.info["at_newton_step"])
    close(ends[0], ends[1], 1e-9)
    assert limits[0] == limits[1] > 0


def test_a_loss_scaled_up_is_taken_as_the_criterion() -> None:
    """As GradScaler scales it, whose factor is gone again before the step; so is what has no gradient at all."""
    model = mlp(hidden=5)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.MSELoss()))
    criterion = opt.metric.criterion
    for factor, expected in ((65536.0, 1.0), (0.25, 0.25), (-0.25, 0.25), (1.0, 1.0)):
        opt._next_refresh = 0
        opt.zero_grad()
        (factor * criterion(model(X), Y)).backward()
        opt.step()
        assert opt.metric.loss_scale == pytest.approx(expected, rel=1e-12)
    opt._next_refresh = 0
    opt.zero_grad()
    out = model(X)
    criterion(out, out.detach()).backward()  # no gradient, so no factor
    opt.step()
    assert opt.metric.loss_scale == 1.0


def test_the_criterion_is_called_once_by_its_hooks() -> None:
    model, criterion = classifier(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion))
    seen: list[str] = []
    criterion.register_forward_hook(lambda *_: seen.append("criterion"))
    criterion(model(torch.randn(6, 4).double()), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    opt.step()
    assert seen == ["criterion"]
