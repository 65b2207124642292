"""Whose row it is: models whose rows do not lie in the order of the data, against oracles of one datum at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import natgrad as ng
from natgrad.fisher.likelihoods.classification import CrossEntropy
from natgrad.fisher.owners import MIXED, SILENT, Data, owners
from tests import layer_oracle

CE = nn.CrossEntropyLoss()


class Graphs(nn.Module):
    """Nodes of all graphs in one tensor, summed by graph."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, owner: Tensor, n: int) -> Tensor:
        h = self.node(x).tanh()
        return self.head(h.new_zeros(n, 4).index_add(0, owner, h))


class Messages(Graphs):
    """Nodes hear their neighbours before they are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(4, 4)

    def forward(self, x: Tensor, owner: Tensor, n: int) -> Tensor:
        h = self.node(x).tanh()
        near = (owner[:, None] == owner[None, :]).to(h)
        h = self.message(near @ h).tanh()
        return self.head(h.new_zeros(n, 4).index_add(0, owner, h))


class Routed(nn.Module):
    """Two experts, each on the rows whose first feature says so."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 4)
        for k, expert in enumerate(self.experts):
            rows = (x[:, 0] > 0).long().eq(k).nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(x[rows]).tanh())
        return self.head(out)


class TimeFirst(nn.Module):
    """A recurrent net on (time, data, features); the head before or after the last step is picked."""

    def __init__(self, kind: type[nn.Module], late: bool) -> None:
        super().__init__()
        self.net, self.head, self.late = kind(3, 4), nn.Linear(4, 3), late

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)[0]
        return self.head(h[-1]) if self.late else self.head(h)[-1]


class TimeFirstRows(nn.Module):
    """Attention over time, and a loss for each step: rows in the order (time, data)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 1)
        self.into, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return self.head(h + self.mix(h, h, h)[0]).flatten(0, 1)


class Turned(nn.Module):
    """Data first; loss rows in the order (positions, data)."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.into(x).tanh()).transpose(0, 1).flatten(0, 1)


class Packed(nn.Module):
    """Sequences of unlike length, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.net(packed)[0], batch_first=True)
        return self.head(h.sum(1))


class Table(nn.Module):
    """The first argument is no batch: a matrix between features."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, table: Tensor, x: Tensor) -> Tensor:
        return self.head((self.into(x) @ table).tanh())


@dataclass
class Example:
    name: str
    model: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    one: Callable[[tuple[Any, ...], int], tuple[Any, ...]]  # the arguments of datum n alone
    rows: Callable[[int], Any]  # which labels belong to datum n
    data: int
    labels: int

    def __str__(self) -> str:
        return self.name


def graphs(name: str, kind: type[nn.Module], sizes: list[int]) -> Example:
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Example(
        f"{name} {sizes}",
        kind,
        lambda: (torch.randn(len(owner), 3), owner, len(sizes)),
        lambda a, n: (a[0][owner == n], owner[owner == n] * 0, 1),
        lambda n: slice(n, n + 1),
        len(sizes),
        len(sizes),
    )


def time_first(kind: type[nn.Module], late: bool, steps: int, data: int) -> Example:
    return Example(
        f"{kind.__name__} {'late' if late else 'early'} {steps}x{data}",
        lambda: TimeFirst(kind, late),
        lambda: (torch.randn(steps, data, 3),),
        lambda a, n: (a[0][:, n : n + 1],),
        lambda n: slice(n, n + 1),
        data,
        data,
    )


def step_rows(data: int, steps: int) -> Callable[[int], Tensor]:
    return lambda n: torch.arange(data * steps).reshape(steps, data)[:, n]


EXAMPLES = [
    *(graphs("graphs", Graphs, s) for s in ([1, 2, 3], [3, 2, 1], [2, 2, 2], [3, 1, 1, 3], [4, 0, 2], [1, 1, 1, 1])),
    *(graphs("messages", Messages, s) for s in ([1, 2, 3], [3, 1, 2], [1, 4, 1, 2])),
    Example(
        "routed", Routed, lambda: (torch.randn(7, 3),), lambda a, n: (a[0][n : n + 1],), lambda n: slice(n, n + 1), 7, 7
    ),
    *(time_first(k, late, *s) for k in (nn.GRU, nn.LSTM) for late in (True, False) for s in ((4, 8), (4, 4), (8, 4))),
    time_first(nn.RNN, True, 2, 6),
    *(
        Example(
            f"time first rows {t}x{n}",
            TimeFirstRows,
            lambda t=t, n=n: (torch.randn(t, n, 3),),
            lambda a, i: (a[0][:, i : i + 1],),
            step_rows(n, t),
            n,
            n * t,
        )
        for t, n in ((3, 4), (4, 3), (4, 4), (2, 6))
    ),
    *(
        Example(
            f"turned {n}x{t}",
            Turned,
            lambda t=t, n=n: (torch.randn(n, t, 3),),
            lambda a, i: (a[0][i : i + 1],),
            step_rows(n, t),
            n,
            n * t,
        )
        for n, t in ((3, 4), (4, 3), (4, 4), (1, 3))
    ),
    Example(
        "packed",
        Packed,
        lambda: (torch.randn(4, 5, 3), torch.tensor([2, 5, 1, 3])),
        lambda a, n: (a[0][n : n + 1], a[1][n : n + 1]),
        lambda n: slice(n, n + 1),
        4,
        4,
    ),
    Example(
        "table",
        Table,
        lambda: (torch.randn(4, 4), torch.randn(8, 4)),
        lambda a, n: (a[0], a[1][n : n + 1]),
        lambda n: slice(n, n + 1),
        8,
        8,
    ),
]


def jacobian(model: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """(output, its Jacobian in all parameters)"""
    out = model(*args)
    return out.detach(), layer_oracle.jacobian(out, list(model.parameters()))


def gauss_newton(model: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    return layer_oracle.gauss_newton(model, CE, args, y)


def empirical(example: Example, model: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    total: Any = 0
    for n in range(example.data):
        loss = CE(model(*example.one(args, n)), y[example.rows(n)])
        g = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        flat = torch.cat(
            [torch.zeros_like(p).flatten() if t is None else t.flatten() for t, p in zip(g, model.parameters())]
        )
        total = total + torch.outer(flat, flat)
    return total / example.data


def made(example: Example) -> tuple[nn.Module, tuple[Any, ...], Tensor]:
    torch.manual_seed(5)
    model = example.model().double()
    args = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in example.args())
    return model, args, torch.randint(3, (example.labels,))


def compared(metric: ng.Fisher, expected: Tensor) -> None:
    """The structure's part of the matrix."""
    found = metric.dense()
    kept = torch.ones_like(found) if metric.structure == "dense" else (found != 0).to(found)
    if metric.structure == "diagonal":
        kept = torch.eye(len(found), dtype=found.dtype)
    assert float(kept.sum()) > 0
    assert float((found - kept * expected).norm()) <= 1e-10 * float((kept * expected).norm())


@pytest.mark.parametrize("structure", ["dense", "block", "diagonal"])
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_the_exact_metric_is_the_gauss_newton_matrix(example: Example, structure: str) -> None:
    model, args, y = made(example)
    metric = ng.Fisher(model, CE, kind="exact", structure=structure)
    metric.update(args, y)
    compared(metric, gauss_newton(model, args, y))


@pytest.mark.parametrize("structure", ["dense", "block", "diagonal"])
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_the_empirical_metric_takes_one_outer_product_a_datum(example: Example, structure: str) -> None:
    model, args, y = made(example)
    metric = ng.Fisher(model, CE, kind="empirical", structure=structure)
    metric.update(args, y)
    assert metric.seen == example.data
    compared(metric, empirical(example, model, args, y))


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_the_sampled_metric_takes_apart_the_same_rows(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    """With cotangents that are given, it is the sum of outer products over independent parts of them."""
    model, args, y = made(example)
    fixed = torch.randn(example.labels, 3, generator=torch.Generator().manual_seed(1)).double()
    monkeypatch.setattr(CrossEntropy, "draw", lambda self, outputs, targets, generator: (fixed.view_as(outputs[0]),))
    metric = ng.Fisher(model, CE, kind="sampled", structure="dense")
    metric.update(args, y)
    _, jac = jacobian(model, args)
    rows = (fixed[:, :, None] * jac.view(example.labels, 3, -1)).sum(1)  # gradient of each loss term
    labels = torch.arange(example.labels)
    by_datum = torch.stack([rows[labels[example.rows(n)]].sum(0) for n in range(example.data)])
    candidates = [(r.mT @ r) / example.labels for r in (rows, by_datum)]  # finer where loss rows share no layer row
    errors = [float((metric.dense() - c).norm() / c.norm()) for c in candidates]
    assert min(errors) <= 1e-10, errors


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("structure", ["dense", "ekfac", "kfac"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_order_of_graphs_moves_no_metric(
    kind: str, structure: str, sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, order = [1, 4, 2, 3], [2, 0, 3, 1]
    torch.manual_seed(0)
    model = Graphs().double()
    nodes = [torch.randn(s, 3).double() for s in sizes]
    labels, fixed = torch.tensor([0, 2, 1, 1]), torch.randn(4, 3).double()
    found = []
    for chosen in (range(4), order):
        at = list(chosen)
        monkeypatch.setattr(CrossEntropy, "draw", lambda self, o, t, g, at=at: (fixed[at],))
        x = torch.cat([nodes[n] for n in at])
        owner = torch.repeat_interleave(torch.arange(4), torch.tensor([sizes[n] for n in at]))
        metric = ng.Fisher(model, CE, kind=kind, structure=structure, sharing=sharing)
        metric.update((x, owner, 4), labels[at])
        found.append(metric.dense())
    assert torch.allclose(*found, rtol=1e-9, atol=1e-13)


def test_reduce_takes_means_and_sums_over_the_nodes_of_a_graph() -> None:
    torch.manual_seed(0)
    sizes = [1, 4, 2]
    model = Graphs().double()
    x = torch.randn(sum(sizes), 3).double()
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    y = torch.tensor([0, 2, 1])
    metric = ng.Fisher(model, CE, kind="empirical", sharing="reduce")
    metric.update((x, owner, 3), y)
    u, v = metric.factors("node.weight")
    expected_u, expected_v = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    for n in range(len(sizes)):
        loss = CE(model(x[owner == n], owner[owner == n] * 0, 1), y[n : n + 1])
        (g,) = torch.autograd.grad(loss, [model.node.bias])
        mean = torch.cat([x[owner == n].mean(0), torch.ones(1).double()])
        expected_u += torch.outer(g, g) / 3
        expected_v += torch.outer(mean, mean) / 3
    assert torch.allclose(u, expected_u, rtol=1e-9)
    assert torch.allclose(v, expected_v, rtol=1e-9)


class Gate(nn.Module):
    """Data mix through a gate that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.g = nn.Linear(3, 4), nn.Linear(4, 3), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.b(h + self.g * h.mean(0))


@pytest.mark.parametrize("structure", ["dense", "block"])
def test_a_gate_that_opens_between_two_batches_is_noticed(structure: str) -> None:
    torch.manual_seed(0)
    model, x, y = Gate().double(), torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 1, 0])
    metric = ng.Fisher(model, CE, kind="exact", structure=structure)
    for gate in (0.0, 1.0, 0.0):
        with torch.no_grad():
            model.g.fill_(gate)
        metric.reset()
        metric.update(x, y)
        compared(metric, gauss_newton(model, (x,), y))


def test_a_leak_that_is_small_is_heard() -> None:
    torch.manual_seed(0)
    model, x, y = Gate().double(), torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 1, 0])
    with torch.no_grad():
        model.g.fill_(1e-6)
    metric = ng.Fisher(model, CE, kind="exact", structure="dense")
    metric.update(x, y)
    compared(metric, gauss_newton(model, (x,), y))


def test_two_passes_before_their_losses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    criterion = nn.CrossEntropyLoss()
    xs = [torch.randn(n, 3).double() for n in (4, 8)]
    ys = [torch.randint(3, (n,)) for n in (4, 8)]
    expected: Any = 0
    for x, y in zip(torch.cat(xs), torch.cat(ys)):
        g = torch.autograd.grad(CE(model(x[None]), y[None]), list(model.parameters()))
        flat = torch.cat([t.flatten() for t in g])
        expected = expected + torch.outer(flat, flat) / 12
    metric = ng.Fisher(model, criterion, kind="empirical", structure="dense")
    opt = ng.NaturalGradient(metric)
    outputs = [model(x) for x in xs]
    losses = [criterion(o, y) for o, y in zip(outputs, ys)]
    (losses[0] + losses[1]).backward()
    opt.step()
    assert torch.allclose(metric.dense(), expected, rtol=1e-9, atol=1e-14)


def test_one_loss_over_two_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    criterion = nn.CrossEntropyLoss()
    xs, y = [torch.randn(n, 3).double() for n in (4, 8)], torch.randint(3, (12,))
    metric = ng.Fisher(model, criterion, kind="empirical", structure="dense")
    opt = ng.NaturalGradient(metric)
    criterion(torch.cat([model(x) for x in xs]), y).backward()
    once = ng.Fisher(model, CE, kind="empirical", structure="dense")
    once.update(torch.cat(xs), y)
    opt.step()
    assert torch.allclose(metric.dense(), once.dense(), rtol=1e-9, atol=1e-14)


class Flattened(nn.Module):
    """Every layer sees (data · positions) rows, out of the order of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.into(x.transpose(0, 1).reshape(-1, 3)).tanh())


def test_rows_that_nothing_tells_apart_are_refused_by_the_empirical_kind() -> None:
    model, x, y = Flattened(), torch.randn(4, 3, 3), torch.randint(3, (12,))
    metric = ng.Fisher(model, CE, kind="empirical")
    with pytest.raises(ValueError, match="12 rows of the output may be 4 data of 3 positions or 12 data"):
        metric.update(x, y)
    assert metric.seen == 0
    exact = ng.Fisher(model.double(), CE, kind="exact", structure="dense")
    exact.update(x.double(), y)
    compared(exact, gauss_newton(model, (x.double(),), y))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 64, 65, 600])
def test_owners_are_read_in_a_few_passes(count: int) -> None:
    torch.manual_seed(0)
    own = torch.randint(count, (2 * count,))
    weights = torch.rand(2 * count).double() + 0.5
    weights[0] = 0
    passes = []

    def backward(v: tuple[Tensor, ...]) -> list[Tensor | None]:
        passes.append(1)
        mixed = v[0][:1] + 1e-9 * v[0][-1:]
        return [torch.cat([v[0][own] * weights[:, None], mixed])]

    view = ((2 * count + 1,), lambda g: g[:, None])
    (found,) = owners((torch.randn(count, 2).double(),), backward, [view], Data(count), 1)
    assert found is not None
    assert found[0] == SILENT
    assert torch.equal(found[1:-1], own[1:])
    assert found[-1] == (0 if count == 1 else MIXED)
    digits = next(d for d in range(1, 9) if 8**d >= count)
    assert len(passes) == 1 + digits <= max(2, (count - 1).bit_length())


class Edges(nn.Module):
    """A graph net whose first argument is the list of edges."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, edges: Tensor, x: Tensor) -> Tensor:
        h = self.node(x).tanh()
        return self.head(h.index_add(0, edges[1], h[edges[0]]))


class Pairs(nn.Module):
    """Links between rows."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.head = nn.Linear(3, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        h = self.node(x).tanh()
        return self.head(torch.cat([h[pairs[:, 0]], h[pairs[:, 1]]], 1))


MIXING = {
    "edges": (
        Edges,
        lambda: (torch.tensor([[0, 1, 2, 0, 3, 4, 5, 3], [1, 2, 0, 2, 4, 5, 3, 5]]), torch.randn(6, 3)),
        6,
    ),
    "links": (Pairs, lambda: (torch.randn(8, 3), torch.tensor([[0, 1], [1, 2], [2, 0], [3, 4], [4, 5], [5, 3]])), 6),
    "many links": (Pairs, lambda: (torch.randn(4, 3), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]] * 2)), 8),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("structure", ["dense", "block", "diagonal"])
def test_rows_that_hear_each_other_are_a_datum_each(name: str, structure: str) -> None:
    kind, make, count = MIXING[name]
    torch.manual_seed(1)
    model = kind().double()
    args = tuple(a.double() if a.is_floating_point() else a for a in make())
    y = torch.arange(count) % 3
    expected = layer_oracle.empirical(model, CE, args, y, count)
    metric = ng.Fisher(model, CE, kind="empirical", structure=structure)
    metric.update(args, y)
    compared(metric, expected)


class TwoHeads(nn.Module):
    """One head is pooled; the other has a row for each position, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.p, self.q = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.into(x).tanh()
        return {"p": self.p(h.mean(1)), "q": self.q(h).transpose(0, 1).flatten(0, 1)}


def test_heads_with_rows_in_another_order() -> None:
    torch.manual_seed(0)
    model, x = TwoHeads().double(), torch.randn(4, 3, 3).double()
    y = {"p": torch.arange(4) % 2, "q": torch.arange(12) % 2}
    params = list(model.parameters())
    expected: Any = 0
    for n in range(4):
        out = model(x[n : n + 1])
        loss = CE(out["p"], y["p"][n : n + 1]) + CE(out["q"], y["q"].view(3, 4)[:, n])
        flat = torch.cat([t.flatten() for t in torch.autograd.grad(loss, params)])
        expected = expected + torch.outer(flat, flat) / 4
    heads = {"p": nn.CrossEntropyLoss(), "q": nn.CrossEntropyLoss()}
    metric = ng.Fisher(model, heads, kind="empirical", structure="dense")
    metric.update(x, y)
    compared(metric, expected)


class Blurred(nn.Module):
    """A layer on flattened rows, which then mix over time and data, before a head that takes each row by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x.flatten(0, 1)).unflatten(0, x.shape[:2]).tanh()
        return self.head(h.cumsum(0) + h.mean(1, keepdim=True)).transpose(0, 1).flatten(0, 1)


def test_layers_after_data_mix_tell_nothing() -> None:
    with pytest.raises(ValueError, match="no layer tells which"):
        ng.Fisher(Blurred().double(), CE, kind="empirical").update(torch.randn(3, 4, 3).double(), torch.arange(12) % 3)


class Siamese(nn.Module):
    """Two inputs, whose rows stand one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([self.head(self.into(t).tanh()).flatten(0, 1) for t in (a, b)])


def test_positions_are_no_data_where_they_do_not_mix() -> None:
    model, a, b = Siamese().double(), torch.randn(4, 3, 3).double(), torch.randn(4, 3, 3).double()
    with pytest.raises(ValueError, match="no layer tells which"):
        ng.Fisher(model, CE, kind="empirical").update((a, b), torch.arange(24) % 3)
