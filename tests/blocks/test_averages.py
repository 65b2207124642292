"""How an optimizer's moving averages are kept, and the numbers that come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import F64, batches, distance, train, weights

import natgrad as ng


class Grouped(nn.Module):
    """A grouped convolution, a linear layer longer than `max_factor_dim` = 4, and a norm."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.norm, self.out = nn.Conv1d(2, 4, 2, groups=2), nn.LayerNorm(12), nn.Linear(12, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x[:, None].expand(-1, 2, -1)).tanh().flatten(1)))


def metric_of(model: nn.Module, **options: Any) -> ng.Fisher:
    return ng.Fisher(model, nn.CrossEntropyLoss(), **{"kind": "exact", "max_factor_dim": 4, **options})


@pytest.mark.parametrize("structure", ["kfac", "input", "block", "dense", "ekfac"])
def test_a_moving_average_is_that_of_the_batches(structure: str) -> None:
    """It is what folding the matrices of each batch's own metric gives."""
    model = Grouped()
    metric = metric_of(model, structure=structure)
    opt = ng.NaturalGradient(metric, lr=0.0, momentum=0.0, weight_decay=0.0, refresh=1)
    expected: dict[str, Tensor] = {}
    for i, batch in enumerate(batches(6)):
        fresh = metric_of(model, structure=structure)
        fresh.update(*batch)
        decay = min(0.85, 1 - 1 / (i + 1))
        for block in fresh.blocks:
            for key in block.statistics:
                if key in ("U", "V", "matrix"):
                    name, value = f"{block.names}{key}", block.value(key)
                    expected[name] = value if i == 0 else expected[name] * decay + value * (1 - decay)
        train(model, opt, [batch])
    held = {f"{b.names}{k}": b.statistics[k] for b in metric.blocks for k in b.statistics if k in ("U", "V", "matrix")}
    assert held.keys() == expected.keys()
    for name, average in held.items():
        value = average.value()
        assert float((value - expected[name]).abs().max()) <= 1e-14 * float(value.abs().max()), name


def test_what_is_computed_with_is_let_go_of_after_a_step() -> None:
    model = Grouped()
    opt = ng.NaturalGradient(metric_of(model))
    train(model, opt, batches(3))
    held = {k for b in opt.metric.blocks for k in b._cache}  # type: ignore[attr-defined]
    assert not [k for k in held if k.startswith("value of")]
    opt.metric.factors("out.weight")  # type: ignore[attr-defined]
    assert [k for b in opt.metric.blocks for k in b._cache if k.startswith("value of")]  # type: ignore[attr-defined]


def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, ng.NaturalGradient]:
        model = Grouped(torch.float32)
        return model, ng.NaturalGradient(metric_of(model, kind="sampled"))

    data = list(batches(30, dtype=torch.float32))
    model, opt = build()
    train(model, opt, data[:13])
    torch.save([model.state_dict(), opt.state_dict()], tmp_path / "checkpoint.pt")
    straight = train(model, opt, data[13:])
    again, other = build()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    assert train(again, other, data[13:]) == straight
    assert distance(weights(model), weights(again)) == 0


def test_a_file_of_a_driven_metric_loads_into_one_that_no_optimizer_drives(tmp_path: Path) -> None:
    model = Grouped(torch.float32)
    opt = ng.NaturalGradient(metric_of(model))
    train(model, opt, batches(9, dtype=torch.float32))
    opt.metric.save(tmp_path / "metric.safetensors")  # type: ignore[attr-defined]
    alone = metric_of(model)
    alone.load(tmp_path / "metric.safetensors")
    assert torch.equal(alone.dense(), opt.metric.dense())
    before = alone.dense()
    alone.update(*next(batches(1, dtype=torch.float32)))  # what was an average is a sum of mass 1 now
    assert torch.isfinite(alone.dense()).all()
    assert not torch.equal(alone.dense(), before)


def test_averages_follow_a_model_that_is_cast() -> None:
    model = Grouped(torch.float32)
    opt = ng.NaturalGradient(metric_of(model))
    train(model, opt, batches(3, dtype=torch.float32))
    model.double()
    train(model, opt, batches(3))
    for block in opt.metric.blocks:  # type: ignore[attr-defined]
        for key in block.statistics:
            assert block.value(key).dtype == F64
            assert block.statistics[key].sums[""].dtype == F64


def test_factors_that_were_shown_stay_as_they_were() -> None:
    """What a user has in hand does not move with the average."""
    model = Grouped()
    opt = ng.NaturalGradient(metric_of(model), refresh=1)
    train(model, opt, batches(3))
    found = opt.metric.factors("out.weight")  # type: ignore[attr-defined]
    shown = [t.clone() for t in found]
    train(model, opt, batches(3))
    assert all(torch.equal(a, b) for a, b in zip(shown, found))


def test_a_model_may_be_cast_between_a_batch_and_its_step() -> None:
    model = Grouped(torch.float32)
    opt = ng.NaturalGradient(metric_of(model), refresh=1)
    train(model, opt, batches(3, dtype=torch.float32))
    x, y = next(batches(1, dtype=torch.float32))
    opt.zero_grad()
    opt.metric.criterion(model(x), y).backward()  # type: ignore[attr-defined]
    model.double()
    opt.step()
    for block in opt.metric.blocks:  # type: ignore[union-attr]
        assert all(block.value(key).dtype == F64 for key in block.statistics)
