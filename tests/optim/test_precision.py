"""Mixed and half precision: statistics stay in float32, are free of the loss scale, and go with skipped steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_cases import Scaled, batches, classifier, distance, finite, natural, train, weights

import natgrad as ng


def wide(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))


def scaled_training(
    scale: float, dtype: torch.dtype, count: int, by_model: bool = False
) -> tuple[nn.Module, ng.NaturalGradient, list[float], torch.amp.GradScaler]:
    model = wide()
    opt = natural(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    losses = []
    for x, y in batches(count, dtype=torch.float32):
        (model if by_model else opt).zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = opt.metric.criterion(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(opt)
        scaler.update()
        losses.append(float(loss.detach()))
    return model, opt, losses, scaler


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_nearly_the_metric_of_full_precision(dtype: torch.dtype) -> None:
    found = []
    for enabled in (True, False):
        opt = natural(wide())
        ((x, y),) = batches(1, dtype=torch.float32)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = opt.metric.criterion(opt.metric.model(x), y)
        loss.backward()
        opt.step()
        found.append(opt.metric)
    for n in ("0.weight", "2.weight"):
        for half, full in zip(*(m.factors(n) for m in found)):
            assert half.dtype == torch.float32
            assert float((half - full).norm() / full.norm()) < (3e-2 if dtype == torch.bfloat16 else 3e-3)


def test_a_scaled_loss_does_not_enter_the_statistics() -> None:
    (_, one, *_), (_, two, *_) = (scaled_training(s, torch.float16, 1) for s in (1.0, 1024.0))
    for n in ("0.weight", "2.weight"):
        for a, b in zip(one.metric.factors(n), two.metric.factors(n)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_with_a_grad_scaler(dtype: torch.dtype) -> None:
    _, opt, losses, scaler = scaled_training(1024.0, dtype, 60)
    assert opt.steps == 60
    assert scaler.get_scale() == 1024
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


@pytest.mark.parametrize("by_model", [False, True])
def test_a_step_that_the_scaler_skips_leaves_no_trace(by_model: bool) -> None:
    """A scale of 2²² overflows float16 on the first steps; what follows is as if they had not been."""
    count = 30
    model, opt, _, scaler = scaled_training(2.0**22, torch.float16, count, by_model)
    skipped = count - opt.steps
    assert skipped >= 3
    assert scaler.get_scale() == 2.0 ** (22 - skipped)
    assert opt.metric.info["data_seen"] == 16 * opt.refreshes
    other = wide()
    clean = natural(other)
    for x, y in list(batches(count, dtype=torch.float32))[skipped:]:
        clean.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = clean.metric.criterion(other(x), y)
        (loss * scaler.get_scale()).backward()
        for p in other.parameters():
            p.grad /= scaler.get_scale()
        nn.utils.clip_grad_norm_(other.parameters(), 10.0)
        clean.step()
    assert distance(weights(model), weights(other)) < 1e-6


def test_half_precision_parameters_train_with_factors_in_float32() -> None:
    model = Scaled(torch.bfloat16)
    opt = natural(model, average=0.9)
    losses = train(model, opt, batches(60, dtype=torch.bfloat16))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(f.dtype == torch.float32 for f in opt.metric.factors("first.weight"))
    assert opt.rule.state_dict()["adam"]["gate"]["second"].dtype == torch.float32
    assert opt.state_dict()["natgrad"]["average"]["values"]["gate"].dtype == torch.float32
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("rule", [None, ng.FixedStep, ng.KLTrustRegion, ng.Grafted])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_rule_takes_every_precision(rule: type[ng.FixedStep] | None, dtype: torch.dtype) -> None:
    model = Scaled(dtype)
    train(model, natural(model, step=None if rule is None else rule()), batches(10, dtype=dtype))
    assert finite(model)
    assert all(p.dtype == dtype for p in model.parameters())


def test_double_precision_goes_all_the_way() -> None:
    model = classifier()
    opt = natural(model)
    train(model, opt, batches(2))
    assert all(f.dtype == torch.float64 for f in opt.metric.factors("0.weight"))


@pytest.mark.parametrize("rule", [None, ng.FixedStep, ng.KLTrustRegion])
def test_the_state_follows_a_model_that_is_cast_or_moved(rule: type[ng.FixedStep] | None) -> None:
    """A move between devices takes the same path as the cast that can be tried anywhere."""
    model = classifier(torch.float32)
    opt = natural(model, step=None if rule is None else rule())
    first = train(model, opt, batches(25, dtype=torch.float32))
    model.double()
    losses = train(model, opt, batches(30))
    assert all(f.dtype == torch.float64 for f in opt.metric.factors("0.weight"))
    assert sum(losses[-5:]) < 0.6 * sum(first[:5])


class Mixed(nn.Module):
    """A table, a convolution, norms, a scalar and a parameter without an op rule."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.norm = nn.Embedding(5, 4), nn.Conv1d(4, 4, 3, padding=1), nn.LayerNorm(4)
        self.scale, self.free, self.head = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.conv(self.table(x).mT).mT).tanh().mean(1) * self.scale
        return self.head(h + torch.addcmul(self.free, self.free, self.free))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block", "dense"])
def test_another_default_dtype_changes_nothing(default: torch.dtype, kind: str, structure: str) -> None:
    found = []
    for inside in (torch.float32, default):
        torch.manual_seed(0)
        model, x, y = Mixed(), torch.randint(5, (12, 6)), torch.arange(12) % 3
        criterion = nn.CrossEntropyLoss()
        torch.set_default_dtype(inside)
        try:
            opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind=kind, structure=structure), refresh=2)
            for _ in range(3):
                opt.zero_grad()
                criterion(model(x), y).backward()
                opt.step()
            opt.load_state_dict(opt.state_dict())
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(*found))
