"""The nearest point, pruning and the effective dimension, against dense linear algebra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle_of_uses import F64, STRUCTURES, damped, data, fisher, flat, masks, net, noise, values
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import natgrad as ng
from natgrad.uses import projection as solver

Close = Callable[[Tensor, Tensor, float], None]
each = pytest.mark.parametrize("structure", STRUCTURES)


def constrained(matrix: Tensor, theta: Tensor, keep: Tensor) -> Tensor:
    """The minimum of the quadratic by its Lagrange system."""
    p, gone = len(theta), int((~keep).sum())
    rows = torch.eye(p, dtype=F64)[~keep]
    system = torch.cat([torch.cat([matrix, rows.mT], 1), torch.cat([rows, rows.new_zeros(gone, gone)], 1)])
    right = torch.cat([matrix @ theta, rows.new_zeros(gone)])
    return torch.linalg.solve(system, right)[:p]


@each
@pytest.mark.parametrize("iterate", [False, True])
@pytest.mark.parametrize("damping", [1e-4, 1.0])
def test_it_solves_the_constrained_quadratic(
    structure: str, iterate: bool, damping: float, close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    if iterate:
        monkeypatch.setattr(solver, "DENSE_PARAMETERS", 0)
    metric = fisher(structure)
    theta, keep = noise(metric), masks(metric)
    found = ng.nearest(metric, theta, keep, damping)
    expected = constrained(damped(metric, damping), flat(metric, theta), flat(metric, keep))
    close(flat(metric, found), expected, 1e-8)
    assert all(bool((t[~keep[n]] == 0).all()) for n, t in found.items())


def test_damping_by_name(close: Close) -> None:
    metric = fisher("kfac")
    theta, keep, given = noise(metric), masks(metric), {"*.weight": 0.1, "*.bias": 0.02}
    found = ng.nearest(metric, theta, keep, given)
    each = {n: torch.full(p.shape, 0.1 if n.endswith("weight") else 0.02, dtype=F64) for n, p in theta.items()}
    expected = constrained(metric.dense() + flat(metric, each).diag(), flat(metric, theta), flat(metric, keep))
    close(flat(metric, found), expected, 1e-8)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "input"])
@pytest.mark.parametrize("longest", [1, 2])
def test_sides_in_pieces(structure: str, longest: int, close: Close, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (fisher(structure, seed, 20, max_factor_dim=longest) for seed in range(2))
    theta, keep = noise(a), masks(a)
    expected = constrained(damped(a, 0.05), flat(a, theta), flat(a, keep))
    close(flat(a, ng.nearest(a, theta, keep, 0.05)), expected, 1e-8)
    monkeypatch.setattr(solver, "DENSE_PARAMETERS", 0)
    close(flat(a, ng.nearest(a, theta, keep, 0.05)), expected, 1e-8)
    total = (ng.anchor(a) + ng.anchor(b)).penalty({n: p + theta[n] for n, p in b.parameters.items()}).detach()
    assert float(total) > 0
    models = {n: (m.model.state_dict(), m) for n, m in (("a", a), ("b", b))}
    parts = [(20 * m.dense(), flat(m, values(m))) for m in (a, b)]
    both = parts[0][0] + parts[1][0]
    pull = 0.01 * both.trace() / len(both) * torch.eye(len(both), dtype=F64)
    right = sum(((m + pull / 2) @ t for m, t in parts), torch.zeros(len(both), dtype=F64))
    close(flat(a, ng.merge(models, structure=None)), torch.linalg.solve(both + pull, right), 1e-8)


def test_of_a_metric_that_an_optimizer_drives() -> None:
    metric = ng.Fisher(model := net(), loss := nn.CrossEntropyLoss())
    opt = ng.NaturalGradient(metric)
    for seed in range(3):
        x, y = data(16, seed)
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step()
    near, (found, pruned) = ng.anchor(metric), ng.prune(metric, 0.5)
    dense = metric.dense()
    opt.zero_grad()
    (loss(model(data(16, 4)[0]), data(16, 4)[1]) + near.penalty()).backward()
    opt.step()
    step = {n: p.detach() - near.centre[n] for n, p in metric.parameters.items()}
    assert float(near.penalty().detach()) == pytest.approx(float(flat(metric, step) @ dense @ flat(metric, step)) / 2)
    assert all(bool((pruned[n][~m] == 0).all()) for n, m in found.items())


def test_what_is_kept_whole_stays() -> None:
    metric = fisher("kfac")
    theta = noise(metric)
    for keep in ({}, {n: torch.ones(t.shape, dtype=torch.bool) for n, t in theta.items()}):
        found = ng.nearest(metric, theta, keep, 0.1)
        assert all(torch.equal(found[n], theta[n]) for n in theta)
    found = ng.nearest(metric, theta, {"2.bias": torch.tensor([True, False, True])}, 0.1)
    assert torch.equal(found["0.weight"], theta["0.weight"])  # another block
    assert not torch.equal(found["2.weight"], theta["2.weight"])


@each
def test_masks_are_of_the_least_saliencies_and_the_rest_is_the_nearest_point(structure: str, close: Close) -> None:
    metric = fisher(structure)
    theta, damping = flat(metric, values(metric)), 0.02
    found, moved = ng.prune(metric, 0.4, damping)
    saliency = theta.square() / torch.linalg.inv(damped(metric, damping)).diagonal()
    keep = flat(metric, found)
    assert int((~keep).sum()) == round(0.4 * len(theta))
    assert float(saliency[~keep].max()) <= float(saliency[keep].min())
    close(flat(metric, moved), constrained(damped(metric, damping), theta, keep), 1e-8)
    mean = float(metric.dense().trace()) / len(theta)
    again, _ = ng.prune(metric, 0.4)
    same, _ = ng.prune(metric, 0.4, 0.01 * mean)
    assert all(torch.equal(again[n], same[n]) for n in again)


def test_rounds_take_saliencies_anew() -> None:
    metric = fisher("dense")
    theta, damping = flat(metric, values(metric)), 0.02
    matrix, inverse = damped(metric, damping), torch.linalg.inv(damped(metric, damping)).diagonal()
    now, keep = theta, torch.ones_like(theta, dtype=torch.bool)
    for count in (11, 20):  # of 39: a half, by two equal shares
        saliency = torch.where(keep, now.square() / inverse, -1.0)
        keep = torch.ones_like(keep)
        keep[saliency.argsort()[:count]] = False
        now = constrained(matrix, theta, keep)
    found, _ = ng.prune(metric, 20 / 39, damping, rounds=2)
    assert torch.equal(flat(metric, found), keep)


def test_groups_of_a_dimension_and_of_labels() -> None:
    metric = fisher("kfac")
    saliency = values(metric)["0.weight"].square() / metric.inverse_diagonal(0.05)["0.weight"]
    found, moved = ng.prune(metric, 0.5, 0.05, groups={"0.weight": 0})
    assert sorted(found) == sorted(metric.names)
    assert all(bool(m.all()) for n, m in found.items() if n != "0.weight")
    gone = saliency.sum(1).argsort()[:2]
    assert all(bool(found["0.weight"][i].any()) != (i in gone) for i in range(4))
    assert bool((moved["0.weight"][gone] == 0).all())
    # a unit: its row, its bias and the column that reads it
    unit = torch.arange(4)
    labels = {"0.weight": unit[:, None].expand(4, 5), "0.bias": unit, "2.weight": unit.expand(3, 4)}
    found, _ = ng.prune(metric, 0.25, 0.05, groups=labels)
    rows = (~found["0.weight"]).all(1)
    assert int(rows.sum()) == 1
    assert torch.equal(rows, ~found["0.bias"])
    assert torch.equal(rows.expand(3, 4), ~found["2.weight"])
    none = {"0.weight": torch.full((4, 5), -1), "2.bias": 0}
    found, _ = ng.prune(metric, 0.4, groups=none)
    assert bool(found["0.weight"].all())
    assert int((~found["2.bias"]).sum()) == 1


def test_masks_go_into_torch() -> None:
    metric = fisher("kfac")
    found, moved = ng.prune(metric, 0.5)
    model = net()
    model.load_state_dict(moved)
    torch_prune.custom_from_mask(model[0], "weight", found["0.weight"])
    assert torch.equal(model[0].weight.detach(), moved["0.weight"])
    assert torch_prune.is_pruned(model)


@each
def test_effective_dimension(structure: str, close: Close) -> None:
    metric = fisher(structure)
    matrix = metric.dense()
    close(ng.effective_dimension(metric, 0.03), (matrix @ torch.linalg.inv(damped(metric, 0.03))).trace(), 1e-10)


def test_of_a_file_and_in_float32(tmp_path: Path) -> None:
    metric = ng.Fisher(net().float(), nn.CrossEntropyLoss(), kind="exact")
    x, y = data(20)
    metric.update(x.float(), y)
    metric.save(tmp_path / "m")
    theta = values(metric)
    for found in (ng.prune(metric, 0.5)[1], ng.prune(str(tmp_path / "m"), 0.5, theta=theta)[1]):
        assert all(t.dtype == torch.float32 for t in found.values())
    keep, _ = ng.prune(metric, 0.5)
    a, b = (ng.nearest(m, theta, keep, 0.01) for m in (metric, tmp_path / "m"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert torch.equal(ng.effective_dimension(metric, 0.1), ng.effective_dimension(tmp_path / "m", 0.1))
    with pytest.raises(ValueError, match="give prune theta="):
        ng.prune(tmp_path / "m", 0.5)
    with pytest.raises(FileNotFoundError, match="no metric file"):
        ng.prune(tmp_path / "none", 0.5, theta=theta)


def test_nothing_is_moved() -> None:
    metric = fisher("kfac")
    before, state = values(metric), torch.get_rng_state()
    ng.prune(metric, 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(values(metric)[n], before[n]) for n in before)


def test_what_does_not_fit() -> None:
    metric = fisher("kfac")
    theta = noise(metric)
    with pytest.raises(RuntimeError, match="seen no data"):
        ng.nearest(ng.Fisher(net(), nn.CrossEntropyLoss()), theta, {}, 0.1)
    for damping in (0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="damping must be"):
            ng.nearest(metric, theta, {}, damping)
        with pytest.raises(ValueError, match="damping must be"):
            ng.effective_dimension(metric, damping)
    with pytest.raises(ValueError, match="keeps nothing"):
        ng.nearest(metric, theta, {"0.bias": torch.zeros(4, dtype=torch.bool)}, 0.1)
    with pytest.raises(ValueError, match=r"names \['nothing'\], which the metric does not have"):
        ng.nearest(metric, theta, {"nothing": torch.ones(3, dtype=torch.bool)}, 0.1)
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(4), [True] * 4):
        with pytest.raises(ValueError, match=r"keep\['0\.bias'\] must be a tensor of shape \(4,\) and torch\.bool"):
            ng.nearest(metric, theta, {"0.bias": mask}, 0.1)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="must be a dict"):
        ng.nearest(metric, theta, [torch.ones(3)], 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"theta\['0\.bias'\] must be a tensor of shape \(4,\)"):
        ng.nearest(metric, {**theta, "0.bias": torch.zeros(1, 4)}, {}, 0.1)
    for fraction in (-0.1, 1.0, float("nan"), True, "half"):
        with pytest.raises(ValueError, match="fraction must be"):
            ng.prune(metric, fraction)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keeps nothing"):
        ng.prune(metric, 0.999)
    for rounds in (0, 1.5, True):
        with pytest.raises(ValueError, match="rounds must be"):
            ng.prune(metric, 0.5, rounds=rounds)  # type: ignore[arg-type]
    for groups, said in (
        ({"3.*": 0}, "no parameter with curvature matches"),
        ({"0.bias": 1}, "must be a dimension of 0.bias"),
        ({"0.bias": torch.zeros(4)}, "must be whole numbers"),
        ({"0.bias": torch.full((4,), -1)}, "has no group"),
    ):
        with pytest.raises(ValueError, match=said):
            ng.prune(metric, 0.5, groups=groups)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="groups must be a dict"):
        ng.prune(metric, 0.5, groups=0)  # type: ignore[arg-type]
    empty = ng.Fisher(model := net(), nn.MSELoss(), kind="empirical")
    x = data(3)[0]
    empty.update(x, model(x).detach())
    with pytest.raises(ValueError, match="the metric is zero"):
        ng.prune(empty, 0.5)
