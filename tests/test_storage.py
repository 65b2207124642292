"""How an optimizer's moving averages and inverses are held: triangles, bfloat16, and the numbers that come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import F64, batches, distance, train, weights

import natgrad as ng
from natgrad import kronecker_inverse
from natgrad.averages import Average
from natgrad.kronecker import relative_inverse
from natgrad.kronecker_inverse import HeldSide, KroneckerInverse
from natgrad.sides import side_of

BF16 = 2.0**-8  # half a unit in the last place, relative


class Grouped(nn.Module):
    """A grouped convolution, a linear layer longer than `max_side` = 4, and a norm."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.norm, self.out = nn.Conv1d(2, 4, 2, groups=2), nn.LayerNorm(12), nn.Linear(12, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x[:, None].expand(-1, 2, -1)).tanh().flatten(1)))


def metric_of(model: nn.Module, **options: Any) -> ng.Fisher:
    return ng.Fisher(model, nn.CrossEntropyLoss(), **{"kind": "exact", "max_side": 4, **options})


@pytest.mark.parametrize("structure", ["kfac", "input", "block", "dense", "ekfac"])
def test_a_moving_average_is_that_of_whole_matrices(structure: str) -> None:
    """Held as triangles and opened, it is what folding the dense matrices of each batch's own metric gives."""
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
        p, d = value.shape[-2:]
        if average.sides is not None:
            rest = d % p
            full = value.numel() // (p * d) * (d // p * p * (p + 1) // 2 + rest * (rest + 1) // 2)
            assert average.sums[""].numel() == full
    triangles = [name for name, a in held.items() if a.sides is not None]
    assert any(len(held[n].sides or ()) > 2 and (held[n].sides or ())[0] == 2 for n in triangles) or structure in (
        "dense",
        "block",
    )
    assert triangles


def test_what_is_computed_with_is_let_go_of_after_a_step() -> None:
    model = Grouped()
    opt = ng.NaturalGradient(metric_of(model))
    train(model, opt, batches(3))
    held = {k for b in opt.metric.blocks for k in b._cache}  # type: ignore[attr-defined]
    assert not [k for k in held if k.startswith("value of")]
    opt.metric.factors("out.weight")  # type: ignore[attr-defined]
    assert [k for b in opt.metric.blocks for k in b._cache if k.startswith("value of")]  # type: ignore[attr-defined]


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
def test_bfloat16_halves_the_averages_and_rounds_them(structure: str) -> None:
    def trained(storage: torch.dtype | None) -> ng.Fisher:
        model = Grouped(torch.float32)
        metric = metric_of(model, structure=structure, storage=storage)
        opt = ng.NaturalGradient(metric, lr=0.0, momentum=0.0, weight_decay=0.0, refresh=1)
        train(model, opt, batches(1, dtype=torch.float32))
        return metric

    whole, half = trained(None), trained(torch.bfloat16)
    for a, b in zip(whole.blocks, half.blocks):
        for key in a.statistics:
            if key.startswith("Q"):  # eigenvectors are no averages, and rounded they would not be orthogonal
                assert b.statistics[key].sums[""].dtype == torch.float32
                continue
            assert b.statistics[key].sums[""].dtype == torch.bfloat16
            assert b.value(key).dtype == torch.float32
            assert torch.allclose(a.value(key), b.value(key), rtol=BF16, atol=1e-30)
        if structure != "ekfac":
            assert b.memory() * 2 == a.memory()


def test_a_bfloat16_average_moves_by_the_rounded_mean() -> None:
    """One entry by hand, in Python's floats."""

    def rounded(x: float) -> float:
        return float(torch.tensor(x).to(torch.bfloat16))

    average, mine = Average(), 0.0
    for i, x in enumerate([1.0, 2.0, 2.003, 5.0, 4.98, 0.1]):
        decay = min(0.85, 1 - 1 / (i + 1))
        average.fold(Average({"": torch.full((2, 2), x)}, {"": torch.ones(())}), decay, True, torch.bfloat16)
        mine = rounded(x if i == 0 else mine * decay + (1 - decay) * x)
        assert torch.equal(average.value(), torch.full((2, 2), mine))
        assert average.sums[""].dtype == torch.bfloat16
    assert average.sums[""].shape == (3,)


@pytest.mark.parametrize("storage", [None, torch.bfloat16, torch.float64], ids=str)
def test_resume_continues_bit_for_bit_in_any_storage(tmp_path: Path, storage: torch.dtype | None) -> None:
    def build() -> tuple[nn.Module, ng.NaturalGradient]:
        model = Grouped(torch.float32)
        return model, ng.NaturalGradient(metric_of(model, kind="sampled", storage=storage))

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


@pytest.mark.parametrize("storage", [None, torch.bfloat16], ids=str)
def test_a_file_of_a_driven_metric_loads_into_one_that_no_optimizer_drives(
    tmp_path: Path, storage: torch.dtype | None
) -> None:
    model = Grouped(torch.float32)
    opt = ng.NaturalGradient(metric_of(model, storage=storage))
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
    for storage in (None, torch.bfloat16):
        model = Grouped(torch.float32)
        opt = ng.NaturalGradient(metric_of(model, storage=storage))
        train(model, opt, batches(3, dtype=torch.float32))
        model.double()
        train(model, opt, batches(3))
        for block in opt.metric.blocks:  # type: ignore[attr-defined]
            for key in block.statistics:
                assert block.value(key).dtype == F64
                assert block.statistics[key].sums[""].dtype == (storage or F64)


def test_training_in_bfloat16_storage_goes_where_it_goes_without() -> None:
    losses = []
    for storage in (None, torch.bfloat16):
        model = Grouped()
        opt = ng.NaturalGradient(metric_of(model, storage=storage))
        losses.append(train(model, opt, batches(60))[-10:])
    assert sum(losses[0]) < 0.7 * 10  # it learns
    assert abs(sum(losses[0]) - sum(losses[1])) < 0.1 * sum(losses[0])


@pytest.mark.parametrize("bad", [torch.float16, torch.int8, "bfloat16"])
def test_a_storage_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"storage must be one of torch.bfloat16.*or None, got"):
        metric_of(Grouped(), storage=bad)


def test_a_long_inverse_is_held_as_its_triangle_and_applied_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    roots = [torch.randn(2, 7, 20, dtype=F64), torch.randn(2, 5, 20, dtype=F64)]
    u, v = (r @ r.mT for r in roots)
    v = side_of([v[:, :3, :3], v[:, 3:, 3:]])  # in pieces
    x = torch.randn(2, 7, 5, dtype=F64)
    sides = relative_inverse(u, 0.1), relative_inverse(v, 0.1)
    assert all(HeldSide.of(s).shape is None for s in sides)
    straight = KroneckerInverse.of(*map(HeldSide.of, sides)).apply(x)
    monkeypatch.setattr(kronecker_inverse, "LONG", 3)
    held = KroneckerInverse.of(*map(HeldSide.of, sides))
    assert (held.u_shape, held.v_shape) == ((2, 7, 7), (2, 3, 5))
    assert (held.u.numel(), held.v.numel()) == (2 * 28, 2 * (6 + 3))
    assert float((held.apply(x) - straight).abs().max()) <= 1e-14 * float(straight.abs().max())
