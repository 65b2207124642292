"""The weight penalty of the default step, and what the loss is of the criterion."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import mlp
from torch import Tensor, nn
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


def test_slices_of_one_parameter_share_the_geometric_mean_of_their_blocks(close: Close) -> None:
    """Projections of queries, keys and values lie in one matrix; λ̄ of each is tr F / P of its rows in the dense F."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.MultiheadAttention(4, 2, bias=False, batch_first=True).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x.sin(), x.cos(), need_weights=False)[0]

    model, x = Attention(), torch.randn(5, 3, 4, dtype=torch.float64)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.MSELoss(), kind="exact"))
    for _ in range(2):
        opt.zero_grad()
        opt.metric.criterion(model(x), x.flip(1)).backward()
        opt.step()
    names = [n for n, _ in model.named_parameters()]
    assert names == opt.metric.names == ["inner.in_proj_weight", "inner.out_proj.weight"]
    diagonal = opt.metric.dense().diagonal()
    means = [diagonal[16 * i : 16 * i + 16].mean() for i in range(3)]
    assert max(means) > 2 * min(means)
    expected = PENALTY * torch.stack(means).log().mean().exp()
    close(torch.tensor(opt.rule.penalties[names[0]], dtype=torch.float64), expected, 1e-12)
    expected = PENALTY * diagonal[48:].mean()
    close(torch.tensor(opt.rule.penalties[names[1]], dtype=torch.float64), expected, 1e-12)


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
    df = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    found = opt.rule.with_penalty(opt.metric.parameters, df, opt._options())
    touched = {n for n, g in found.items() if not torch.equal(g, df[n])}
    assert touched == {"2.weight"}


def test_what_has_no_gradient_of_the_loss_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is dead, or a step that is masked on a device: no penalty moves it, and its share is as before."""
    model = mlp(hidden=5)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.MSELoss()), lr=20.0, momentum=0.0)
    steps(opt, model, 9)
    assert opt.rule.penalties
    before = {n: float(s) for n, s in opt.rule.share_of.items()}
    assert max(before.values()) < 1
    weights = [p.detach().clone() for p in model.parameters()]
    opt.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))
    assert {n: float(s) for n, s in opt.rule.share_of.items()} == before
    monkeypatch.setattr("natgrad.optimizer.free_to_read", lambda t: False)
    steps(opt, model, 1)
    before = {n: float(s) for n, s in opt.rule.share_of.items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    opt.step()
    assert {n: float(s) for n, s in opt.rule.share_of.items()} == before


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


def factor_of(loss: Callable[[Tensor, nn.Module], Tensor], **options: object) -> float:
    """`Fisher.loss_scale` after a step on loss(output, criterion)."""
    model = mlp(hidden=5)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.MSELoss(), **options))  # type: ignore[arg-type]
    loss(model(X), opt.metric.criterion).backward()
    opt.step()
    assert opt.info["loss_scale"] == opt.metric.loss_scale
    return opt.metric.loss_scale


def in_place(out: Tensor, criterion: nn.Module) -> Tensor:
    loss = criterion(out, Y)
    loss /= 4
    return loss


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda out, c: 65536.0 * c(out, Y), 1.0),  # GradScaler's, which is gone again before the step
        (lambda out, c: -0.25 * c(out, Y), 0.25),
        (in_place, 0.25),
        (lambda out, c: 0.5 * c(out, Y) + 0.3 * out.square().sum(), 0.5),  # something else of the same output
        (lambda out, c: 0.07 * c(out, Y) + 0.03 * c(out, -Y), 0.1),  # two labels, whose means add up
        (lambda out, c: 0.3 * (out - Y).square().mean(), 1.0),  # the criterion is not called
        (lambda out, c: c(out, Y) - c(out, Y).detach() + out.sum(), 1.0),
        (lambda out, c: c(out, Y) * torch.nan, 1.0),
    ],
)
def test_what_the_loss_is_of_the_criterion(loss: Callable[..., Tensor], expected: float) -> None:
    if expected == 1.0 and loss(torch.zeros(8, 3), nn.MSELoss()).isnan():
        with pytest.warns(UserWarning, match="NaN or Inf"):
            assert factor_of(loss) == 1.0
        return
    assert factor_of(loss) == pytest.approx(expected, rel=1e-6)


def test_heads_and_criteria_inside_a_model_under_autocast_have_a_factor_too() -> None:
    model = mlp(hidden=5)
    opt = ng.NaturalGradient(ng.Fisher(model, {"a": nn.MSELoss()}, output=lambda out: {"a": out}))
    (0.01 * opt.metric.criterion["a"](model(X), Y)).backward()
    opt.step()
    assert opt.metric.loss_scale == pytest.approx(0.01)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = mlp(hidden=5).float(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0]))

        def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                out = self.net(x)
                return self.criterion(out, labels), out

    whole = Whole()
    opt = ng.NaturalGradient(ng.Fisher(whole, whole.criterion, output=lambda found: found[1]))
    for _ in range(3):
        opt.zero_grad()
        (0.5 * whole(X.float(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))[0]).backward()
        opt.step()
    assert opt.metric.loss_scale == pytest.approx(0.5)


def test_the_criterion_is_called_once_by_its_hooks() -> None:
    model, criterion = classifier(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion))
    seen: list[str] = []
    criterion.register_forward_hook(lambda *_: seen.append("criterion"))
    criterion(model(torch.randn(6, 4).double()), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    opt.step()
    assert seen == ["criterion"]
