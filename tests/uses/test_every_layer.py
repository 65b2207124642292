"""Every use on every op of the list, and on tied weights, against dense linear algebra."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracle_of_uses import F64
from torch import Tensor, nn

import natgrad as ng
from tests.layer_oracle import call, relative
from tests.op_cases import CASES, Case, N, criteria, ids

BOUND, DAMPING = 1e-8, 0.05


class Tied(nn.Module):
    """A table that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(6, 3), nn.Linear(3, 3), nn.Linear(3, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.table(x).tanh()).mean(1))[:, :3]


LAYERS = [*CASES, Case("tied", Tied, ids(N, 2))]
each = pytest.mark.parametrize("case", LAYERS, ids=lambda c: c.name)


def metric_of(case: Case, seed: int, structure: Any) -> ng.Fisher:
    torch.manual_seed(seed)
    model, x = case.model().double(), case.x()
    loss, y = criteria()["cross-entropy"]
    with torch.no_grad():
        assert call(model, x).shape[-1] == 3
    found = ng.Fisher(model, loss, kind="exact", structure=structure)
    found.update(x, y)
    return found


def flat(metric: ng.Fisher, vector: Any) -> Tensor:
    return torch.cat([vector[n].detach().flatten() for n in metric.names])


def quarters(name: str, w: Tensor) -> Tensor:
    return (w * 4).round() / 4


@each
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_each_use(case: Case, structure: str) -> None:
    first, second = metric_of(case, 0, structure), metric_of(case, 1, structure)
    dense, theta = first.dense(), flat(first, first.parameters)
    eye = torch.eye(len(theta), dtype=F64)
    damped = dense + DAMPING * eye
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = {n: (p + torch.randn_like(p)).detach().requires_grad_() for n, p in first.parameters.items()}
        penalty = ng.anchor(first).penalty(moved)
        slope = flat(first, dict(zip(moved, torch.autograd.grad(penalty, [*moved.values()]))))
        assert relative(slope, dense @ (flat(first, moved) - theta)) < BOUND

        masks, found = ng.prune(first, 0.4, DAMPING)
        keep = flat(first, masks)
        assert int((~keep).sum()) == round(0.4 * len(theta))
        saliency = theta.square() / torch.linalg.inv(damped).diagonal()
        assert float(saliency[~keep].max()) <= float(saliency[keep].min()) * (1 + 1e-9)
        expected = torch.zeros_like(theta)
        expected[keep] = torch.linalg.solve(damped[keep][:, keep], (damped @ theta)[keep])
        assert relative(flat(first, found), expected) < BOUND

        rounded = ng.round_weights(first, quarters, damping=DAMPING)
        assert all(torch.equal(quarters(n, t), t) and t.shape == first.parameters[n].shape for n, t in rounded.items())

        parts = [(m.seen * m.dense(), flat(m, m.parameters)) for m in (first, second)]
        total = parts[0][0] + parts[1][0]
        pull = 0.01 * total.trace() / len(total) * eye
        expected = torch.linalg.solve(
            total + pull, sum(((a + pull / 2) @ t for a, t in parts), torch.zeros_like(theta))
        )
        models = {n: (m.model.state_dict(), m) for n, m in (("a", first), ("b", second))}
        state = ng.merge(models, 0.01, structure=None)
        assert relative(flat(first, state), expected) < BOUND
        first.model.load_state_dict(state)
        ng.merge(models)  # "input"
        size = torch.linalg.eigvalsh(dense).clamp(min=0)
        assert abs(float(ng.effective_dimension(first, DAMPING)) - float((size / (size + DAMPING)).sum())) < 1e-9


class Odd(nn.Module):
    """A layer, and a parameter whose use no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(5, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * torch.sin(self.w)


def odd(seed: int) -> ng.Fisher:
    torch.manual_seed(seed)
    found = ng.Fisher(Odd().double(), nn.CrossEntropyLoss(), kind="exact")
    found.update(torch.randn(6, 5, dtype=F64), torch.randint(3, (6,)))
    found.collection.blocks = [b for b in found.blocks if b.names != ["w"]]  # as of one that is too large for its own
    return found


class Spare(nn.Module):
    """A layer, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def test_what_is_not_used_is_left_and_not_worth_a_word() -> None:
    torch.manual_seed(0)
    metric = ng.Fisher(Spare().double(), nn.CrossEntropyLoss(), kind="exact")
    metric.update(torch.randn(6, 5, dtype=F64), torch.randint(3, (6,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks, found = ng.prune(metric, 0.5)
        ng.anchor(metric).penalty().backward()
        rounded = ng.round_weights(metric, quarters)
    assert int(sum((~m).sum() for m in masks.values())) == 9
    assert bool(masks["b.weight"].all())
    assert torch.equal(found["b.weight"], metric.parameters["b.weight"])
    assert torch.equal(rounded["b.weight"], quarters("", metric.parameters["b.weight"]).detach())


def test_parameters_without_curvature_are_named_by_each_use() -> None:
    first, second = odd(0), odd(1)
    w = first.parameters["w"].detach()
    with pytest.warns(UserWarning, match=r"no curvature of 'w' \(no op rule covers its use .*: nothing holds it near"):
        ng.anchor(first)
    with pytest.warns(UserWarning, match=r"no curvature of 'w' .*: it is kept whole"):
        masks, pruned = ng.prune(first, 0.5)
    assert bool(masks["w"].all())
    assert torch.equal(pruned["w"], w)
    assert int(sum((~m).sum() for m in masks.values())) == 9  # of the 18 entries of the layer
    with pytest.warns(UserWarning, match=r"no curvature of 'w' .*: it is rounded entry by entry"):
        rounded = ng.round_weights(first, quarters)
    assert torch.equal(rounded["w"], quarters("w", w))
    models = {n: (m.model.state_dict(), m) for n, m in (("a", first), ("b", second))}
    with pytest.warns(UserWarning, match=r"no curvature of 'w' .*: it becomes the mean"):
        state = ng.merge(models)
    assert torch.allclose(state["w"], (w + second.parameters["w"].detach()) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"no curvature of \['w'\]; give a damping"):
            ng.merge(models, 0.0)
    found = ng.nearest(first, first.parameters, {"w": torch.tensor([True, False, True])}, 0.1)
    assert found["w"].tolist() == [float(w[0]), 0.0, float(w[2])]
