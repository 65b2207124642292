"""Influence against dense linear algebra, and against leaving data out and solving again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import op_cases
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

import natgrad as ng
from natgrad.fisher.product import ExactProduct
from natgrad.metric.metric import Metric

Close = Callable[[Tensor, Tensor, float], None]
F64 = torch.float64
STRUCTURES = ("dense", "block", "diagonal", "kfac", "ekfac", "input")


def net(out: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out)).double()


def classes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=g, dtype=F64), torch.randint(3, (count,), generator=g)


def gradients(model: nn.Module, loss: Callable[[Any, Any], Tensor], x: Any, y: Tensor) -> Tensor:
    """∇ of the loss of each datum alone, (data, P)."""
    params = oracle.trainable(model)
    found = []
    for n in range(len(y)):
        one = tuple(t[n : n + 1] for t in x) if isinstance(x, tuple) else (x[n : n + 1],)
        g = jacrev(lambda p, n=n, one=one: loss(functional_call(model, p, one), y[n : n + 1]))(params)
        found.append(oracle.flatten(g))
    return torch.stack(found)


def by_solving(metric: ng.Fisher, dm: Tensor, dl: Tensor, damping: float, mass: float) -> Tensor:
    dense = metric.dense()
    return dm @ torch.linalg.solve(dense + damping * torch.eye(len(dense), dtype=F64), dl.mT) / mass


def fitted(structure: str, criterion: nn.Module, kind: str = "exact", out: int = 3) -> ng.Fisher:
    metric = ng.Fisher(net(out), criterion, kind=kind, structure=structure)
    x, y = classes(12)
    metric.update(x[:7], y[:7])
    metric.update(x[7:], y[7:])
    return metric


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["exact", "empirical", "sampled"])
def test_scores_are_those_of_the_dense_matrix(structure: str, kind: str, close: Close) -> None:
    criterion = nn.CrossEntropyLoss()
    metric, (x, y), (qx, qy) = fitted(structure, criterion, kind), classes(12), classes(5, 1)
    expected = by_solving(
        metric, gradients(metric.model, criterion, qx, qy), gradients(metric.model, criterion, x, y), 0.1, 12
    )
    for chunk in (None, 2):
        found = ng.influence(
            metric, [(qx[:3], qy[:3]), (qx[3:], qy[3:])], [(x[:5], y[:5]), (x[5:], y[5:])], 0.1, chunk=chunk
        )
        close(found, expected, 1e-8)
    values, indices = ng.influence(metric, (qx, qy), [(x[:5], y[:5]), (x[5:], y[5:])], 0.1, top=4)
    close(values, expected.topk(4).values, 1e-8)
    assert torch.equal(indices, expected.topk(4).indices)
    own = gradients(metric.model, criterion, x, y)
    close(ng.self_influence(metric, (x, y), 0.1), by_solving(metric, own, own, 0.1, 12).diagonal(), 1e-8)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_pairs_of_covectors(structure: str, close: Close) -> None:
    metric = fitted(structure, nn.CrossEntropyLoss())
    g = torch.Generator().manual_seed(0)
    a, b = ({n: torch.randn(k, *p.shape, generator=g, dtype=F64) for n, p in metric.parameters.items()} for k in (2, 3))
    rows = [torch.cat([t.flatten(1) for t in v.values()], 1) for v in (a, b)]
    close(ng.pair(metric, a, b, 0.2), by_solving(metric, *rows, 0.2, 1), 1e-8)
    one = {n: t[0] for n, t in b.items()}
    close(ng.pair(metric, a, one, 0.2), by_solving(metric, *rows, 0.2, 1)[:, 0], 1e-8)
    close(ng.pair(metric, one, one, 0.2), by_solving(metric, rows[1], rows[1], 0.2, 1)[0, 0], 1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_ridge_regression_without_a_datum(reduction: str, outputs: int, close: Close) -> None:
    """θ with datum n counted 1 − t times solves a linear system; the score is the slope of the measurement in t."""
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(15, 3, generator=g, dtype=F64), torch.randn(15, outputs, generator=g, dtype=F64)
    qx, qy = torch.randn(4, 3, generator=g, dtype=F64), torch.randn(4, outputs, generator=g, dtype=F64)
    mass = 15 * outputs if reduction == "mean" else 1
    ridge = 0.3  # of the sum: Σ (y − xw)² + ridge/2 |w|²
    model = nn.Linear(3, outputs, bias=False).double()

    def solve(rows: Tensor, keep: Tensor) -> Tensor:
        return torch.linalg.solve(
            2 * rows.mT @ (keep[:, None] * rows) + ridge * torch.eye(3, dtype=F64), 2 * rows.mT @ (keep[:, None] * y)
        )

    with torch.no_grad():
        model.weight.copy_(solve(x, torch.ones(15, dtype=F64)).mT)
    metric = ng.Fisher(model, nn.MSELoss(reduction=reduction), kind="exact", structure="dense").fit([(x, y)], False)

    def measured(weights: Tensor) -> Tensor:
        return (qx @ weights).sum(1)

    def slope(n: int) -> Tensor:
        keep = torch.ones(15, dtype=F64)
        keep[n] = 0
        return jacrev(lambda t: measured(solve(x, 1 - t * (1 - keep))))(torch.zeros((), dtype=F64))

    found = ng.influence(metric, (qx, qy), (x, y), ridge / mass, measure=lambda out, _: out.sum(-1))
    close(found, torch.stack([slope(n) for n in range(15)], 1), 1e-8)
    # and the sign of the loss itself
    keep = torch.ones(15, dtype=F64)
    keep[2] = 1 - 1e-6
    reduce = torch.mean if reduction == "mean" else torch.sum
    change = reduce((qx @ solve(x, keep) - qy).square(), 1) - reduce((qx @ model.weight.detach().mT - qy).square(), 1)
    scores = ng.influence(metric, (qx, qy), (x, y), ridge / mass)
    close(scores[:, 2], change * 1e6, 1e-4)


def test_weights_and_ignored_labels_count_as_in_the_loss(close: Close) -> None:
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=F64)
    x, y = classes(12)
    y[3] = -100
    for kind in ("exact", "empirical"):
        mean, total = (
            ng.Fisher(net(), nn.CrossEntropyLoss(weight=weight, reduction=r), kind=kind, structure="dense").fit(
                [(x, y)], False
            )
            for r in ("mean", "sum")
        )
        mass = float(weight[y[y >= 0]].sum())
        own = gradients(mean.model, nn.CrossEntropyLoss(weight=weight, reduction="sum"), x, y)
        alone = gradients(mean.model, nn.CrossEntropyLoss(weight=weight), x, y).nan_to_num()
        close(ng.influence(mean, (x, y), (x, y), 0.1), by_solving(mean, alone, own, 0.1, mass), 1e-8)
        close(ng.influence(total, (x, y), (x, y), 0.1), by_solving(total, own, own, 0.1, 1), 1e-8)
        assert not bool(ng.influence(mean, (x, y), (x, y), 0.1)[:, 3].any())


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum")])
def test_products_with_the_exact_matrix(criterion: nn.Module, close: Close) -> None:
    x, y = classes(12)
    y = y if isinstance(criterion, nn.CrossEntropyLoss) else torch.rand(12, 3, dtype=F64)
    metric = ng.Fisher(net(), criterion, structure="kfac").fit([(x, y)], False)
    v = {n: torch.randn(2, *p.shape, dtype=F64) for n, p in metric.parameters.items()}
    found = ExactProduct(metric, lambda: [(x[:5], y[:5]), (x[5:], y[5:])])(v)
    rows = [torch.cat([t.flatten(1) for t in w.values()], 1) for w in (v, found)]
    close(rows[1], rows[0] @ oracle.gauss_newton(metric.model, criterion, [(x, y)]), 1e-9)


def test_refinement_ends_at_the_exact_matrix(close: Close) -> None:
    x, y = classes(12)
    criterion = nn.CrossEntropyLoss()
    metric = fitted("ekfac", criterion)
    exact = oracle.gauss_newton(metric.model, criterion, [(x, y)])
    own = gradients(metric.model, criterion, x, y)
    expected = own @ torch.linalg.solve(exact + 0.05 * torch.eye(len(exact), dtype=F64), own.mT) / 12
    distance = [
        float((ng.influence(metric, (x, y), (x, y), 0.05, refine=k) - expected).norm() / expected.norm())
        for k in (0, 3, 40)
    ]
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 1e-8


CASES = {c.name: c for c in op_cases.CASES}


@pytest.mark.parametrize("name", CASES)
def test_all_ops_of_the_list(name: str, close: Close) -> None:
    """Every kind of layer that a metric covers: gradients of each datum, and of those alone that the model mixes."""
    case = CASES[name]
    torch.manual_seed(0)
    model, x = case.model().double(), case.x()
    with torch.no_grad():
        out = model(*x) if isinstance(x, tuple) else model(x)
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != op_cases.N:
        pytest.skip("its output is no row a datum")
    y = torch.randn(out.shape, dtype=F64)
    metric = ng.Fisher(model, nn.MSELoss(), kind="exact", structure="kfac")
    metric.update(x, y)
    params = list(metric.parameters.values())
    value = model(*x) if isinstance(x, tuple) else model(x)
    flat = [torch.autograd.grad(v, params, retain_graph=True, allow_unused=True) for v in value.flatten()]
    each = [torch.cat([(torch.zeros_like(p) if t is None else t).flatten() for t, p in zip(g, params)]) for g in flat]
    rows = torch.stack(each).reshape(*out.shape, -1)
    own = torch.einsum("no,nop->np", 2 * (out - y) / out.shape[1], rows)
    close(ng.influence(metric, (x, y), (x, y), 0.3), by_solving(metric, own, own, 0.3, len(out)), 1e-8)
    close(ng.self_influence(metric, (x, y), 0.3), by_solving(metric, own, own, 0.3, len(out)).diagonal(), 1e-8)


class Text(nn.Module):
    """Next-token logits of a causal model, classes last."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.table, self.head, self.flat = nn.Embedding(7, 4), nn.Linear(4, 7), flat

    def forward(self, ids: Tensor) -> Tensor:
        out = self.head(self.table(ids).cumsum(1).tanh())
        return out.flatten(0, 1) if self.flat else out.movedim(-1, 1)


@pytest.mark.parametrize("flat", [False, True])
def test_scores_by_token_are_those_of_each_position(flat: bool, close: Close) -> None:
    torch.manual_seed(0)
    model = Text(flat).double()
    ids, y = torch.randint(7, (5, 6)), torch.randint(7, (5, 6))
    labels = y.flatten() if flat else y
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact").fit([(ids, labels)], False)
    found = ng.influence(metric, (ids, labels), (ids, labels), 0.1, by="token")
    assert found.shape == (5, 5, 6)
    close(found.sum(-1), ng.influence(metric, (ids, labels), (ids, labels), 0.1), 1e-10)
    params = oracle.trainable(model)

    def losses(p: dict[str, Tensor]) -> Tensor:
        out = functional_call(model, p, (ids,))
        out = out if flat else out.movedim(1, -1).flatten(0, 1)
        return nn.functional.cross_entropy(out, y.flatten(), reduction="none").reshape(5, 6)

    jac = torch.cat([j.reshape(5, 6, -1) for j in jacrev(losses)(params).values()], -1)
    expected = by_solving(metric, jac.mean(1), jac.reshape(30, -1), 0.1, 30).reshape(5, 5, 6)
    close(found, expected, 1e-8)


class Graphs(nn.Module):
    """Nodes of all graphs in one tensor, summed by graph."""

    def __init__(self, mix: float = 0.0) -> None:
        super().__init__()
        self.lower, self.head, self.mix = nn.Linear(3, 4), nn.Linear(4, 3), mix

    def forward(self, x: Tensor, owner: Tensor) -> Tensor:
        h = x.new_zeros(int(owner.max()) + 1, 4).index_add(0, owner, self.lower(x).tanh())
        return self.head(h + self.mix * h.mean(0))


@pytest.mark.parametrize("mix", [0.0, 0.5])
@pytest.mark.parametrize("structure", ["kfac", "dense"])
def test_rows_of_many_sizes_and_data_that_mix(mix: float, structure: str, close: Close) -> None:
    torch.manual_seed(0)
    model, owner = Graphs(mix).double(), torch.tensor([2, 0, 1, 2, 2, 1])
    x, y = torch.randn(6, 3, dtype=F64), torch.tensor([0, 2, 1])
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure=structure)
    metric.update((x, owner), y)
    losses = nn.functional.cross_entropy(model(x, owner), y, reduction="none")
    grads = [torch.autograd.grad(loss, list(metric.parameters.values()), retain_graph=True) for loss in losses]
    own = torch.stack([torch.cat([t.flatten() for t in g]) for g in grads])
    batch = [((x, owner), y)]
    close(ng.influence(metric, batch, batch, 0.2), by_solving(metric, own, own, 0.2, 3), 1e-8)
    close(ng.self_influence(metric, batch, 0.2), by_solving(metric, own, own, 0.2, 3).diagonal(), 1e-8)
    close(ng.influence(metric, batch, batch, 0.2, by="token").sum(-1), by_solving(metric, own, own, 0.2, 3), 1e-8)


def test_heads_with_weights_count_as_in_the_loss(close: Close) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = self.net(x)
            return {"class": out[:, :3], "value": out[:, 3:]}

    x, y = classes(12)
    value = torch.randn(12, 1, dtype=F64)
    for kind in ("exact", "empirical"):
        metric = ng.Fisher(
            model := Two(),
            {"class": nn.CrossEntropyLoss(), "value": nn.MSELoss()},
            kind=kind,
            structure="dense",
            weights={"value": 0.3},
        )
        metric.update(x, {"class": y, "value": value})
        out = model(x)
        losses = (
            nn.functional.cross_entropy(out["class"], y, reduction="none") + 0.3 * (out["value"] - value)[:, 0] ** 2
        )
        grads = [torch.autograd.grad(loss, list(metric.parameters.values()), retain_graph=True) for loss in losses]
        own = torch.stack([torch.cat([t.flatten() for t in g]) for g in grads])
        batch = [(x, {"class": y, "value": value})]
        close(ng.influence(metric, batch, batch, 0.2), by_solving(metric, own, own, 0.2, 12), 1e-8)
        close(ng.self_influence(metric, batch, 0.2), by_solving(metric, own, own, 0.2, 12).diagonal(), 1e-8)


def test_what_the_metric_cannot_follow_is_refused_by_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.tied = net(), False

        def forward(self, x: Tensor) -> Tensor:
            first = self.net[0]
            assert isinstance(first, nn.Linear)
            return self.net(x) + (first.weight.exp().sum() if self.tied else 0)

    x, y = classes(6)
    model = Twice()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact").fit([(x, y)], False)
    model.tied = True
    before = metric.coverage()
    with pytest.raises(ng.CaptureError, match=r"net\.0\.weight"):
        ng.influence(metric, (x, y), (x, y))
    assert metric.coverage() == before


def test_loaders_datasets_dicts_and_files(tmp_path: Path, close: Close) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, points: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(points)}

    x, y = classes(12)
    model = Named()
    options: dict[str, Any] = {"kind": "exact", "output": lambda out: out["logits"], "targets": lambda given: None}
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), **options).fit([({"points": x}, y)], False)
    expected = ng.influence(metric, [({"points": x}, y)], [({"points": x}, y)], 0.1)
    metric.save(tmp_path / "metric.safetensors")
    again = ng.Fisher(model, nn.CrossEntropyLoss(), **options)
    again.load(tmp_path / "metric.safetensors")
    close(ng.influence(again, [({"points": x}, y)], [({"points": x}, y)], 0.1, progress=True), expected, 1e-12)
    data = TensorDataset(x, y)
    for given in (data, DataLoader(data, batch_size=5)):
        close(ng.influence(again, given, given, 0.1), expected, 1e-12)
    before = again.coverage()
    ng.influence(again, data, data)
    ng.influence(again, data, data, refine=2)
    assert again.coverage() == before
    assert all(p.grad is None for p in model.parameters())


def test_bad_input_is_answered_and_nothing_is_lost() -> None:
    x, y = classes(6)
    criterion = nn.CrossEntropyLoss()
    metric = ng.Fisher(net(), criterion, kind="exact")
    with pytest.raises(RuntimeError, match="has seen no data yet"):
        ng.influence(metric, (x, y), (x, y))
    metric.update(x, y)
    dense = metric.dense()
    with pytest.raises(TypeError, match="the metric of a model and its data"):
        ng.influence(ng.Euclidean(net()), (x, y), (x, y))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damping must be a positive finite number"):
        ng.influence(metric, (x, y), (x, y), 0.0)
    with pytest.raises(ValueError, match="needs the labels"):
        ng.influence(metric, [x], (x, y))
    with pytest.raises(TypeError, match="queries takes a loader"):
        ng.influence(metric, x, (x, y))
    with pytest.raises(ValueError, match="shuffles"):
        ng.influence(metric, (x, y), DataLoader(TensorDataset(x, y), shuffle=True))
    with pytest.raises(ValueError, match="data is empty"):
        ng.influence(metric, (x, y), [])
    with pytest.raises(ValueError, match="it is an iterator"):
        ng.influence(metric, (x, y), iter([(x, y)]), chunk=2)
    with pytest.raises(ValueError, match="unknown by 'word'"):
        ng.influence(metric, (x, y), (x, y), by="word")
    for wrong in ({"top": 0}, {"refine": -1}, {"chunk": 1.5}):
        with pytest.raises(ValueError, match="must be a whole number"):
            ng.influence(metric, (x, y), (x, y), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by='datum'"):
        ng.influence(metric, (x, y), (x, y), by="token", top=2)
    with pytest.raises(ValueError, match="one number a query"):
        ng.influence(metric, (x, y), (x, y), measure=lambda out, _: out)
    with pytest.raises(ValueError, match="does not depend on the output"):
        ng.influence(metric, (x, y), (x, y), measure=lambda out, _: out.detach().sum(1))
    with pytest.raises(ValueError, match=r"the metric's model cannot take a tensor of shape \(6, 5\)"):
        ng.influence(metric, (torch.randn(6, 5, dtype=F64), y), (x, y))
    with pytest.raises(ValueError, match=r"cannot take a tensor .* torch\.float32"):
        ng.influence(metric, (x.float(), y), (x, y))
    driven = ng.Fisher(net(), criterion)
    opt = ng.NaturalGradient(driven)
    criterion(driven.model(x), y).backward()
    opt.step()
    with pytest.raises(RuntimeError, match="an optimizer drives this metric"):
        ng.influence(driven, (x, y), (x, y))
    with pytest.raises(TypeError, match="pair takes a metric"):
        ng.pair(net(), {}, {}, 1.0)  # type: ignore[arg-type]
    assert isinstance(metric, Metric)
    assert torch.equal(metric.dense(), dense)
