"""NaturalGradient: plain descent is SGD, steps that are not finite are skipped, the average has no start value."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from cases import STRUCTURES, mlp
from torch import Tensor, nn

import natgrad as ng
from natgrad.blocks.base import Block
from natgrad.fisher.likelihoods.registry import likelihood_of
from natgrad.optim.block_state import BlockState
from natgrad.optim.fixed import FixedStep
from natgrad.optim.optimizer import AVERAGE_LIMIT
from natgrad.optim.registry import rule_of
from natgrad.optim.step_arithmetic import bound, lengths

Close = Callable[[Tensor, Tensor, float], None]

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3).sin()
Y = torch.tensor([0, 2, 1, 2, 0, 1, 1, 0])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(opt: Any, model: nn.Module, steps: int) -> list[float]:
    criterion = getattr(getattr(opt, "metric", None), "criterion", nn.CrossEntropyLoss())
    losses = []
    for i in range(steps):
        model.zero_grad()  # not the optimizer's, which would forget statistics too
        loss = criterion(model(X + 0.1 * i), Y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


# Euclidean --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lr", [0.3, 0.0123])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("maximize", [False, True])
def test_euclidean_is_sgd_bit_for_bit(dtype: torch.dtype, lr: float, momentum: float, maximize: bool) -> None:
    model, twin = mlp(hidden=37).to(dtype), mlp(hidden=37).to(dtype)
    ours = ng.NaturalGradient(ng.Euclidean(model), lr=lr, momentum=momentum, maximize=maximize)
    theirs = torch.optim.SGD(twin.parameters(), lr=lr, momentum=momentum, maximize=maximize)
    x = X.to(dtype)
    for i in range(20):
        for m, opt in ((model, ours), (twin, theirs)):
            opt.zero_grad()
            nn.functional.cross_entropy(m(x + 0.1 * i), Y).backward()
            opt.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_weight_decay_is_decoupled(close: Close) -> None:
    """θ ← (1 − η w) θ − η d: SGD's for no momentum; with momentum SGD's decay goes through the buffer, ours not."""
    model, twin = mlp(), mlp()
    train(ng.NaturalGradient(ng.Euclidean(model), lr=0.2, weight_decay=0.1), model, 10)
    train(torch.optim.SGD(twin.parameters(), lr=0.2, weight_decay=0.1), twin, 10)
    close(flat(model), flat(twin), 1e-14)
    model, before = mlp(), flat(mlp())
    opt = ng.NaturalGradient(ng.Euclidean(model), lr=0.2, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    close(flat(model), before * (1 - 0.02) ** 3, 1e-14)


def test_closure_scheduler_and_groups(close: Close) -> None:
    model, twin = mlp(), mlp()
    ours = ng.NaturalGradient(
        ng.Euclidean(model), lr=0.2, momentum=0.5, groups=[{"params": "2.*", "lr": 0.05, "momentum": 0.0}]
    )
    theirs = torch.optim.SGD(
        [{"params": twin[0].parameters()}, {"params": twin[2].parameters(), "lr": 0.05, "momentum": 0.0}],
        lr=0.2,
        momentum=0.5,
    )
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (ours, theirs)]
    for _ in range(5):
        losses = []
        for m, opt in ((model, ours), (twin, theirs)):

            def closure(m: nn.Module = m, opt: Any = opt) -> Tensor:
                opt.zero_grad()
                loss = nn.functional.cross_entropy(m(X), Y)
                loss.backward()
                return loss

            losses.append(opt.step(closure))
        assert torch.equal(*losses)
        for s in schedules:
            s.step()
    close(flat(model), flat(twin), 1e-15)


# the metric's own steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["dense", "block", "kfac"])
def test_one_undamped_step_solves_a_linear_regression(structure: str, close: Close) -> None:
    torch.manual_seed(3)
    model, criterion = nn.Linear(3, 2).double(), nn.MSELoss()
    x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    rule = FixedStep(lr=1.0, damping=1e-13)
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind="exact", structure=structure), step=rule)
    criterion(model(x), y).backward()
    opt.step()
    a = torch.cat([x, torch.ones(20, 1).double()], 1)
    best = torch.linalg.lstsq(a, y).solution
    close(torch.cat([model.weight.detach().T, model.bias.detach()[None]]), best, 1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_fixed_step_is_sharp_of_the_gradient(structure: str, close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(
        ng.Fisher(model, criterion, kind="exact", structure=structure), step=FixedStep(), lr=0.3, damping=0.05
    )
    before = flat(model)
    metric = ng.Fisher(model, criterion, kind="exact", structure=structure)
    metric.update(X, Y)
    criterion(model(X), Y).backward()
    expected = metric.sharp({n: p.grad for n, p in model.named_parameters()}, 0.05)
    opt.step()
    close(flat(model) - before, -0.3 * metric.vector_to_flat(expected), 1e-11)
    assert "absolute" in opt.info["damping_meaning"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_precondition_serves_another_optimizer(structure: str, close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = ng.Fisher(model, criterion, kind="exact", structure=structure)
    metric.update(X, Y)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion(model(X), Y).backward()
    expected = metric.sharp({n: p.grad.clone() for n, p in model.named_parameters()}, 0.2)
    before = flat(model)
    metric.precondition_(0.2)
    opt.step()
    close(flat(model) - before, -0.1 * metric.vector_to_flat(expected), 1e-12)
    model[0].bias.grad = None  # a parameter without a gradient stays so
    metric.precondition_(0.2)
    assert model[0].bias.grad is None


# averages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_moving_average_is_bias_corrected(structure: str, close: Close) -> None:
    """Weights 1; 1/2, 1/2; … and then an exponential average: they sum to 1, and no start value is among them."""
    model, criterion = mlp(), nn.CrossEntropyLoss()
    metric = ng.Fisher(model, criterion, kind="exact", structure=structure)
    opt = ng.NaturalGradient(metric, lr=0.0, refresh=1)
    expected: dict[str, list[Tensor]] = {}
    for i in range(12):
        x = X * (1 + 0.3 * i)
        opt.zero_grad()
        criterion(model(x), Y).backward()
        opt.step()
        assert opt.info["refreshes"] == i + 1
        fresh = ng.Fisher(model, criterion, kind="exact", structure=structure)
        fresh.update(x, Y)
        decay = min(AVERAGE_LIMIT, 1 - 1 / (i + 1))
        for name in metric.names:
            new = list(fresh.factors(name)) if structure == "kfac" else [fresh.dense()]
            old = expected.get(name, [torch.zeros_like(t) for t in new])
            expected[name] = [decay * o + (1 - decay) * n for o, n in zip(old, new)]
            found = list(metric.factors(name)) if structure == "kfac" else [metric.dense()]
            for f, e in zip(found, expected[name]):
                close(f, e, 1e-12)
    assert AVERAGE_LIMIT < 1 - 1 / 12  # both regimes were seen


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_are_one_batch(structure: str, reduction: str, close: Close) -> None:
    models = [mlp(), mlp()]
    parts = [[slice(0, 8)], [slice(0, 1), slice(1, 4), slice(4, 8)]]
    for model, slices in zip(models, parts):
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind="exact", structure=structure))
        for _ in range(6):
            opt.zero_grad()
            for s in slices:
                share = len(Y[s]) / len(Y) if reduction == "mean" else 1.0
                (share * criterion(model(X[s]), Y[s])).backward()
            opt.step()
    close(flat(models[1]), flat(models[0]), 1e-9)


# steps that are not finite -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "input", "loss"])
@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
def test_a_step_that_is_not_finite_is_skipped(kind: str, where: str, bad: float) -> None:
    model, twin, criterion = mlp(), mlp(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind=kind), refresh=1)
    plain = ng.NaturalGradient(ng.Fisher(twin, nn.CrossEntropyLoss(), kind=kind), refresh=1)
    train(opt, model, 3)
    train(plain, twin, 3)
    before = flat(model)

    def broken() -> None:
        model.zero_grad()
        x = 3 * X
        if where == "input":
            x[0, 0] = float("nan")
        loss = criterion(model(x), Y)
        (loss * bad if where == "loss" else loss).backward()
        if where == "gradient":
            model[0].weight.grad[0, 0] = bad
        opt.step()

    with pytest.warns(UserWarning, match="gradient holds NaN or Inf: the step is skipped"):
        broken()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        broken()  # said once
    assert torch.equal(flat(model), before)
    assert opt.info["skipped"] == 2
    assert opt.info["steps"] == 3
    if kind != "sampled":  # the stream of drawn labels has moved on
        assert train(opt, model, 5) == train(plain, twin, 5)
        assert torch.equal(flat(model), flat(twin))
    assert bool(torch.isfinite(flat(model)).all())


def test_the_first_step_may_be_bad() -> None:
    model = mlp()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()))
    nn.functional.cross_entropy(model(X * float("nan")), Y).backward()
    with pytest.warns(UserWarning, match="skipped"):
        opt.step()
    losses = train(opt, model, 20)
    assert losses[-1] < losses[0]


def test_a_gradient_whose_norm_overflows_is_skipped_too() -> None:
    """Its momentum would hold every later step back."""
    model = mlp().float()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.MSELoss()))
    places = []
    for i in range(8):
        opt.zero_grad()
        out = model(X.float())
        (nn.functional.mse_loss(out, torch.zeros_like(out)) * (1e25 if i == 2 else 1.0)).backward()
        with pytest.warns(UserWarning, match="skipped") if i == 2 else contextlib.nullcontext():
            opt.step()
        places.append(flat(model).clone())
    assert bool(torch.isfinite(flat(model)).all())
    assert opt.info["skipped"] == 1
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(places[3:]))  # it still learns


def test_without_any_gradient_nothing_happens() -> None:
    model = mlp()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()))
    before = flat(model)
    with pytest.warns(UserWarning, match="did nothing"):
        opt.step()
    assert torch.equal(flat(model), before)
    assert opt.info["steps"] == 0


# going on ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_checkpoint_goes_on_bit_for_bit(structure: str, tmp_path: Any) -> None:
    model = mlp()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss(), structure=structure))
    train(opt, model, 7)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    twin = mlp()
    again = ng.NaturalGradient(ng.Fisher(twin, nn.CrossEntropyLoss(), structure=structure))
    twin.load_state_dict(state["model"])
    again.load_state_dict(state["opt"])
    assert train(opt, model, 15) == train(again, twin, 15)
    assert torch.equal(flat(model), flat(twin))
    assert again.info["steps"] == 22


def test_a_state_of_something_else_is_refused() -> None:
    model = mlp()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()))
    train(opt, model, 2)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"no NaturalGradient state.*'natgrad'"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    other = ng.NaturalGradient(ng.Fisher(mlp(), nn.CrossEntropyLoss()), step=FixedStep())
    with pytest.raises(ValueError, match="step rule FixedStep, this optimizer has NormalisedStep"):
        opt.load_state_dict(other.state_dict())
    wider = mlp(hidden=5)
    other = ng.NaturalGradient(ng.Fisher(wider, nn.CrossEntropyLoss()))
    train(other, wider, 1)
    with pytest.raises(ValueError, match=r"0.weight has shape \(4, 3\) here and \(5, 3\)"):
        opt.load_state_dict(other.state_dict())
    assert str(opt.state_dict()) == str(before)


def test_info_says_what_happened() -> None:
    model = mlp()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()))
    train(opt, model, 5)
    info = opt.info
    assert info["steps"] == 5
    assert info["skipped"] == 0
    assert info["refreshes"] >= 1
    assert 0 < info["share_of_time"] < 1
    assert "relative" in info["damping_meaning"]
    for key in ("damping", "step_length", "predicted_nats", "refreshed"):
        assert key in info


# training ------------------------------------------------------------------------------------------------------------


def digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().data[:600], dtype=torch.float32) / 16


def autoencoder() -> nn.Module:
    torch.manual_seed(0)
    widths = (64, 32, 8, 32, 64)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def fit(opt: Any, model: nn.Module, criterion: nn.Module, data: Tensor, steps: int) -> float:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = data[torch.randint(len(data), (200,), generator=generator)]
        opt.zero_grad()
        criterion(model(x), x).backward()
        opt.step()
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(data), data))


def test_no_option_set_beats_adam_on_the_digits() -> None:
    data, criterion, steps = digits(), nn.MSELoss(), 40
    rivals = []
    for lr in (1e-3, 3e-3, 1e-2, 3e-2):
        model = autoencoder()
        rivals.append(fit(torch.optim.Adam(model.parameters(), lr=lr), model, criterion, data, steps))
    model = autoencoder()
    ours = fit(ng.NaturalGradient(ng.Fisher(model, criterion)), model, criterion, data, steps)
    assert ours < 0.8 * min(rivals), (ours, rivals)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_every_structure_and_kind_descends(structure: str, kind: str) -> None:
    model, criterion = mlp(hidden=8), nn.CrossEntropyLoss()
    # without decay: eight data with labels at random are fitted by large weights alone
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind=kind, structure=structure), weight_decay=0.0)
    for _ in range(120):
        opt.zero_grad()
        loss = criterion(model(X), Y)
        loss.backward()
        opt.step()
    assert float(loss.detach()) < 0.6 * float(nn.functional.cross_entropy(mlp(hidden=8)(X), Y).detach())


def test_the_direction_is_the_metric_of_the_data_trained_on(close: Close) -> None:
    """With one refresh and lr tiny: Δ ∝ ((U/t + √λ)⁻¹ ⊗ (V/t + √λ)⁻¹) df, by hand."""
    model, criterion = nn.Linear(3, 2, bias=False).double(), nn.MSELoss()
    y = torch.randn(8, 2).double()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind="exact"), lr=1e-2, damping=0.04, weight_decay=0.0)
    before = model.weight.detach().clone()
    r = before.square().mean().sqrt() * 12**0.5  # over 1 / √(3 (fan_in + 1))
    criterion(model(X), y).backward()
    g = model.weight.grad.clone()
    opt.step()
    v = X.mT @ X / 8
    u = torch.eye(2).double()  # 2I/16 per datum and element, over its own mean eigenvalue
    left, right = u + 0.2 * torch.eye(2).double(), 3 * v / v.trace() + 0.2 * torch.eye(3).double()
    direction = torch.linalg.inv(left) @ g @ torch.linalg.inv(right)
    size = direction.square().mean().sqrt() * 2.0  # √(fan_in + 1)
    close(model.weight.detach() - before, -1e-2 * r * direction / size, 1e-9)
    assert oracle.relative_error(g, direction) > 0.05


def test_steps_follow_the_formula_of_the_rule(close: Close) -> None:
    """All of it, 60 steps by hand in units of a thousandth: the first agree and grow with the weights, some are bounded
    by their predictions, later ones turn back and are half a Newton step.
    """
    model, criterion = nn.Linear(3, 2, bias=False).double(), nn.MSELoss()
    y = 1e3 * (X @ torch.randn(3, 2).double() + 0.1 * torch.randn(8, 2).double())
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind="exact"), weight_decay=0.1, refresh=1)
    metric = torch.linalg.inv(3 * (X.mT @ X) / (X.mT @ X).trace() + 0.1**0.5 * torch.eye(3).double())
    metric /= 1 + 0.1**0.5  # the inverse of U, a multiple of I
    theta, v, coherence, age, r = model.weight.detach().clone(), torch.zeros(2, 3).double(), 0.0, 0.0, 0.0
    s = float(X.square().mean())  # U = 2/16 · 8 I, V = XᵀX/8
    natural = 12**-0.5  # 1 / √(3 (fan_in + 1))
    seen: dict[str, list[bool]] = {"newton": [], "bounded": [], "turned": [], "grown": []}
    for t in range(60):
        residual = X @ theta.mT - y
        g = 2 / 16 * residual.mT @ X  # of the mean squared error
        d = g @ metric
        now = float(theta.norm()) / 6**0.5 / natural
        grown = max(r, now if coherence > 0.5 else min(now, 1.0))
        seen["grown"].append(t > 0 and grown > r)
        r = now if t == 0 else grown
        cosine = -float((d * v).sum() / (d.norm() * v.norm())) if v.norm() > 0 else 0.0
        coherence += (cosine - coherence) / (5 + 0.1 * age)
        size = float(d.norm()) / 6**0.5 * 2
        lengths = 0.1 * r / size, 0.5 / s
        alpha = math.exp(3 * coherence) * min(lengths)
        slope = float((g * d).sum()) / (2 * float(residual.square().mean()))
        alpha = min(alpha, 0.5 / slope)
        nats = 0.5 * alpha**2 * s * slope
        factor = min(1.0, (0.2 / nats) ** 0.5)
        alpha *= factor
        delta, c = -alpha * d, 3 / (3 + age)
        v = v + 0.9 * delta
        theta, v = theta + 0.1 * delta + c * v - 0.1 * min(0.1, 0.5 * size / s / r) ** 2 / 0.1 * theta, (1 - c) * v
        age = age / 2 if coherence < -0.3 else age + 1
        for key, is_so in (("newton", lengths[1] < lengths[0]), ("bounded", factor < 1), ("turned", coherence < -0.3)):
            seen[key].append(is_so)
        opt.zero_grad()
        criterion(model(X), y).backward()
        opt.step()
        close(model.weight.detach(), theta, 1e-7)
        assert opt.info["predicted_nats"] == pytest.approx(nats, rel=1e-4)
    assert all(any(said) and not all(said) for said in seen.values()), seen


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "input", "dense", "diagonal"])
def test_excess_is_what_the_relative_inverse_has_too_much(structure: str, close: Close) -> None:
    """Without damping, relative_inverse = s · inverse, in every structure."""
    model = nn.Linear(3, 2).double()
    metric = ng.Fisher(model, nn.MSELoss(reduction="sum"), kind="empirical", structure=structure)
    metric.update(torch.randn(40, 3).double(), torch.randn(40, 2).double() * 5)
    (block,) = metric.blocks
    g = torch.randn(block.pack({n: p.detach() for n, p in model.named_parameters()}).shape).double()
    close(block.relative_inverse(1e-26).apply(g), block.newton_scale() * block.inverse(1e-24).apply(g), 1e-8)


def test_the_empirical_kind_has_no_newton_step() -> None:
    """It is as large as the residuals squared: with targets far off its steps would be as much too short."""
    first = []
    for scale in (1.0, 1e4):
        torch.manual_seed(0)
        model, criterion = nn.Linear(3, 2).double(), nn.MSELoss()
        opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind="empirical"), lr=0.01)
        before = flat(model)
        criterion(model(X), scale * torch.ones(8, 2).double()).backward()
        opt.step()
        first.append(float((flat(model) - before).norm()))
        assert opt.info["at_newton_step"] == 0
        assert opt.info["predicted_nats"] is None
    assert first[1] == pytest.approx(first[0], rel=0.2)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "input", "dense", "diagonal"])
def test_no_curvature_has_no_newton_step(structure: str) -> None:
    model = nn.Linear(3, 2).double()
    metric = ng.Fisher(model, nn.MSELoss(), kind="empirical", structure=structure)
    metric.update(X, model(X).detach())  # no residual, no gradient
    (block,) = metric.blocks
    assert float(block.newton_scale()) == 0


def state_and_block() -> tuple[BlockState, Block]:
    metric = ng.Fisher(nn.Linear(3, 2).double(), nn.MSELoss())
    metric.update(X, X[:, :2])
    return BlockState(torch.zeros(1, 2, 4).double(), torch.zeros(()), torch.zeros(())), metric.blocks[0]


@pytest.mark.parametrize(("value", "taken"), [(2.0, 2.0), (math.inf, 0.0), (math.nan, 0.0)])
def test_an_excess_that_is_not_finite_counts_as_none(
    monkeypatch: pytest.MonkeyPatch, value: float, taken: float
) -> None:
    state, block = state_and_block()
    monkeypatch.setattr(block, "newton_scale", lambda: torch.tensor(value))
    assert float(state.rescale(block)) == taken


def test_the_scale_of_the_newton_step_rises_at_once_and_falls_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    state, block = state_and_block()
    values = iter([2.0, 0.0, 1.0, 5.0, 4.9, math.nan])
    monkeypatch.setattr(block, "newton_scale", lambda: torch.tensor(next(values)).double())
    found = [float(state.rescale(block)) for _ in range(6)]
    assert found == pytest.approx([2.0, 2 * 0.97, 2 * 0.97**2, 5.0, 4.9, 4.9 * 0.97])
    assert float(BlockState(**state.state_dict()).newton_scale) == found[-1]


def test_scales_are_taken_once_a_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    rescale = BlockState.rescale
    monkeypatch.setattr(BlockState, "rescale", lambda self, block: taken.append(block) or rescale(self, block))
    for kind, per in (("sampled", 2), ("empirical", 0)):  # which has no Newton step
        taken.clear()
        model, criterion = mlp(hidden=8), nn.MSELoss()
        opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind=kind))
        for _ in range(9):
            opt.zero_grad()
            criterion(model(X), torch.zeros(len(X), 3).double()).backward()
            opt.step()
        assert len(taken) == per * opt.refreshes


def test_info_says_how_many_blocks_are_at_their_newton_step() -> None:
    model, criterion = nn.Linear(3, 2).double(), nn.MSELoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion), weight_decay=0.0)
    seen = []
    for _ in range(60):
        opt.zero_grad()
        criterion(model(X), X[:, :2]).backward()
        opt.step()
        seen.append(opt.info["at_newton_step"])
    assert (seen[0], seen[-1]) == (0, 1)


@pytest.mark.parametrize(("decay", "bound"), [(0.0, 1e-10), (None, 1e-6)])
def test_data_that_can_be_fitted_are_fitted_to_the_last_point(decay: float | None, bound: float) -> None:
    """Minibatches, no schedule: steps of a set length alone end at a loss of about 1e-3 here. The default decay
    vanishes with the gradients, and slows them down.
    """
    torch.manual_seed(0)
    x, y = torch.randn(24, 4).double(), torch.randn(24, 1).double()
    model, criterion = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1)).double(), nn.MSELoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion), weight_decay=decay)
    for i in range(3000):
        opt.zero_grad()
        rows = torch.arange(8) + 8 * (i % 3)
        criterion(model(x[rows]), y[rows]).backward()
        opt.step()
    assert float(criterion(model(x), y).detach()) < bound


def test_weight_decay_is_the_rules_own_unless_it_is_given() -> None:
    class Decaying(FixedStep):
        weight_decay = 0.3

    metric = ng.Fisher(mlp(hidden=8), nn.MSELoss())
    own = rule_of(metric).weight_decay
    assert own > 0
    for step, given, expected in ((None, None, own), (Decaying(), None, 0.3), (Decaying(), 0.0, 0.0), (None, 0.1, 0.1)):
        opt = ng.NaturalGradient(metric, step=step, weight_decay=given, groups=[{"params": "*.bias"}])
        assert [g["weight_decay"] for g in opt.param_groups] == [expected] * 2


def one_step(model: nn.Module, decay: float, factor: float = 1.0) -> ng.NaturalGradient:
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact"), weight_decay=decay)
    (factor * opt.metric.criterion(model(X), Y)).backward()
    opt.step()
    return opt


def test_the_decay_of_a_matrix_is_a_share_of_the_way_it_goes(close: Close) -> None:
    """The first step goes η r / size(d), a tenth of the weights' natural size; biases and norms do not decay."""
    ends, start = [], nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    for decay in (0.0, 0.25):
        model = copy.deepcopy(start)
        one_step(model, decay)
        ends.append(dict(model.named_parameters()))
    for name, p in start.named_parameters():
        share = 0.25 * 0.1 if p.dim() == 2 else 0.0
        close(ends[1][name].detach(), ends[0][name].detach() - share * p.detach(), 1e-12)


def test_nothing_decays_where_gradients_vanish() -> None:
    model = mlp(hidden=8)
    before = flat(model)
    one_step(model, 0.5, factor=0.0)
    assert torch.equal(flat(model), before)


def test_an_embedding_does_not_decay() -> None:
    """A row that is not in the batch has no gradient that would answer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).double()
    before = model[0].weight.detach().clone()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()), weight_decay=0.5)
    opt.metric.criterion(model(torch.tensor([0, 1, 1, 0])), torch.tensor([0, 1, 1, 0])).backward()
    opt.step()
    moved = (model[0].weight.detach() - before).abs().sum(1) > 0
    assert moved.tolist() == [True, True, False, False, False]


def test_a_rate_of_another_optimizer_is_warned_of_once() -> None:
    metric = ng.Fisher(mlp(hidden=8), nn.MSELoss())
    with pytest.warns(
        UserWarning, match=r"lr=0\.001 is far below .*default 0\.1.*share of the weights' own size"
    ) as seen:
        ng.NaturalGradient(metric, lr=1e-3)
    assert len(seen) == 1
    assert "test_optimizer" in seen[0].filename
    ng.NaturalGradient(metric, lr=0.025)
    ng.NaturalGradient(metric, lr=0.0)
    ng.NaturalGradient(metric, lr=1e-3, step=FixedStep())
    opt = ng.NaturalGradient(metric)
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=9, cycle_momentum=False)  # sets a lower rate


def test_the_bound_on_predictions_does_not_depend_on_units_or_reduction(close: Close) -> None:
    """Targets and loss in other units, a sum for a mean: the same steps, of a model that can take them over."""
    y = X @ torch.randn(3, 2).double() + torch.randn(8, 2).double()
    ends, nats = [], []
    for update_unit, reduction in ((1.0, "mean"), (1e3, "mean"), (1.0, "sum")):
        torch.manual_seed(1)
        model, criterion = nn.Linear(3, 2, bias=False).double(), nn.MSELoss(reduction=reduction)
        with torch.no_grad():
            model.weight.mul_(update_unit)
        opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind="exact"))
        for _ in range(40):
            opt.zero_grad()
            criterion(model(X), update_unit * y).backward()
            opt.step()
        ends.append(flat(model) / update_unit)
        nats.append(opt.info["predicted_nats"])
    for end, found in zip(ends[1:], nats[1:]):
        close(end, ends[0], 1e-9)
        assert found == pytest.approx(nats[0], rel=1e-6)


@pytest.mark.parametrize("batch", [None, 16])
def test_a_regression_ends_at_its_solution(batch: int | None) -> None:
    """A mean that lags behind its steps made them overshoot without end."""
    torch.manual_seed(0)
    x = torch.randn(200, 5).double() * torch.logspace(0, -1, 5).double()
    y = x @ torch.randn(5, 1).double()
    model, criterion = nn.Linear(5, 1).double(), nn.MSELoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion))
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        rows = slice(None) if batch is None else torch.randint(200, (batch,), generator=generator)
        opt.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        opt.step()
    assert float(criterion(model(x), y).detach()) < 1e-10


@pytest.mark.parametrize("update_unit", [1e3, 1e-3])
@pytest.mark.parametrize("what", ["inputs", "targets", "both"])
def test_a_regression_in_raw_units_ends_at_its_solution(what: str, update_unit: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 5).double()
    y = x @ torch.randn(5, 1).double() + 1.0
    x, y = (t * update_unit if what in (name, "both") else t for name, t in (("inputs", x), ("targets", y)))
    model, criterion = nn.Linear(5, 1).double(), nn.MSELoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion))
    for _ in range(600):
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
    assert float(criterion(model(x), y).detach()) < 1e-10 * float(y.square().mean())


@pytest.mark.parametrize("classes", [1, 3])
def test_a_classifier_that_starts_far_off_gets_there(classes: int) -> None:
    """Inputs in thousands: logits of hundreds at the start, far worse than knowing nothing."""
    torch.manual_seed(0)
    x = torch.randn(300, 5).double()
    f = 0.7 * x @ torch.randn(5, classes).double()
    model = nn.Linear(5, classes).double()
    criterion: nn.Module = nn.BCEWithLogitsLoss()
    y = torch.bernoulli(f.sigmoid())
    if classes > 1:
        criterion, y = nn.CrossEntropyLoss(), torch.multinomial(f.softmax(1), 1)[:, 0]
    twin = copy.deepcopy(model)
    lbfgs = torch.optim.LBFGS(twin.parameters(), max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = criterion(twin(x), y)
        loss.backward()
        return loss

    lbfgs.step(closure)
    best = float(criterion(twin(x), y).detach())
    opt = ng.NaturalGradient(ng.Fisher(model, criterion))
    for _ in range(600):
        opt.zero_grad()
        criterion(model(1e3 * x), y).backward()
        opt.step()
    assert float(criterion(model(1e3 * x), y).detach()) == pytest.approx(best, abs=1e-4)


def test_the_bounds_take_what_is_not_finite() -> None:
    one, zero, inf = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(math.inf)
    assert float(bound(one, one)) == pytest.approx(0.2**0.5)
    assert float(bound(inf, one)) == 0  # no step rather than one without bound
    for nats, nat in ((zero, one), (one / 100, one), (one, zero), (one, one * math.nan)):
        assert float(bound(nats, nat)) == 1


def test_no_block_promises_more_than_half_a_nat() -> None:
    """α ⟨g, d⟩ ≤ ½ nat block by block: one that the metric has not seen holds no other back."""
    n, one = 4, torch.ones(4)
    d = [torch.ones(1)] * n
    g = [torch.tensor([s]) for s in (1.0, 100.0, -1.0, math.inf)]
    like = {"coherence": 0 * one, "ages": one, "norms": one, "sizes": one, "rates": one / 10, "weights": one}
    for nat in (1.0, 3.0):
        found = lengths(d, g, [torch.zeros(1)] * n, **like, newton_scale=one / 100, nat=torch.tensor(nat))
        assert found.alpha.tolist() == pytest.approx([0.1, 0.005 * nat, 0.1, 0.0])
    for free in (None, torch.tensor(0.0), torch.tensor(math.nan)):
        found = lengths(d, g, [torch.zeros(1)] * n, **like, newton_scale=one / 100, nat=free)
        assert found.alpha.tolist() == pytest.approx([0.1] * n)


@pytest.mark.parametrize(("rows", "share"), [(8, 1.0), (64, 1.0), (512, 0.25)])
def test_the_decay_is_less_where_a_batch_has_many_labels(rows: int, share: float, close: Close) -> None:
    """The same data over and over: mean gradient and metric are the same, and 128 / M of the decay is left."""
    moved = []
    for decay in (0.0, 0.25):
        torch.manual_seed(0)
        model, criterion = nn.Linear(3, 2).double(), nn.MSELoss()
        before = model.weight.detach().clone()
        x = X.repeat(rows // 8, 1)
        opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind="exact"), weight_decay=decay)
        criterion(model(x), x[:, :2]).backward()
        opt.step()
        assert opt.metric.labels == rows
        moved.append(model.weight.detach())
    close(moved[1] - moved[0], -share * 0.25 * 0.1 * before, 1e-9)


def test_labels_are_rows_of_the_output() -> None:
    for criterion, shape, labels in (
        (nn.CrossEntropyLoss(), (6, 4), 6),
        (nn.CrossEntropyLoss(), (6, 4, 5), 30),
        (nn.CrossEntropyLoss(), (4,), 1),
        (nn.MSELoss(), (6, 4), 6),
        (nn.MSELoss(), (6, 5, 4), 30),
        (nn.MSELoss(), (6,), 6),
        (nn.BCEWithLogitsLoss(), (6, 1), 6),
    ):
        assert likelihood_of(criterion).labels((torch.zeros(shape),)) == labels
