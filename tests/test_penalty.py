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
from natgrad.fisher import PENALTY

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


def test_the_criterion_is_called_once_by_its_hooks() -> None:
    model, criterion = classifier(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion))
    seen: list[str] = []
    criterion.register_forward_hook(lambda *_: seen.append("criterion"))
    criterion(model(torch.randn(6, 4).double()), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    opt.step()
    assert seen == ["criterion"]
