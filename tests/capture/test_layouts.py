"""Inputs that are not strided tensors: sparse ones give the metric of dense ones, nested ones are refused by name."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import empirical, gauss_newton
from torch import Tensor, nn
from training_cases import weights

import natgrad as ng
from natgrad.capture.tape import CaptureError

KINDS = ("sampled", "exact", "empirical")
STRUCTURES = ("kfac", "ekfac", "input", "block", "diagonal", "dense")


def twice(t: Tensor) -> Tensor:
    """In coordinates, with each entry as two halves."""
    held = t.to_sparse()
    index, values = torch.cat([held.indices()] * 2, 1), torch.cat([held.values() / 2] * 2)
    return torch.sparse_coo_tensor(index, values, t.shape, check_invariants=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coordinates": lambda t: t.to_sparse(),
    "uncoalesced": twice,
    "rows": lambda t: t.to_sparse_csr(),
    "columns": lambda t: t.to_sparse_csc(),
}


class Net(nn.Module):
    def __init__(self, first: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))
        self.head, self.first = nn.Linear(5, 3), first
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(self, x).tanh())


OPS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "linear": lambda m, x: nn.functional.linear(x, m.weight, m.bias),
    "matmul": lambda m, x: x @ m.weight.T + m.bias,
    "addmm": lambda m, x: torch.addmm(m.bias, x, m.weight.T),
    "sparse mm": lambda m, x: torch.sparse.mm(x, m.weight.T) + m.bias,
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch says that its sparse layouts are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta state")
        yield


def data(size: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size, 4, generator=g, dtype=torch.float64)
    return x * (torch.rand(size, 4, generator=g) < 0.5), torch.randint(3, (size,), generator=g)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_a_sparse_input_has_the_metric_of_the_dense_oracle(op: str, layout: str) -> None:
    x, y = data()
    model, loss = Net(OPS[op]), nn.CrossEntropyLoss()
    for kind, oracle in (("exact", gauss_newton), ("empirical", empirical)):
        expected = oracle(model, loss, [(x, y)])
        metric = ng.Fisher(model, loss, kind=kind, structure="dense")
        metric.update(LAYOUTS[layout](x), y)
        assert float((metric.dense() - expected).norm() / expected.norm()) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_training_on_sparse_inputs_is_training_on_dense_ones(op: str, layout: str) -> None:
    for kind, structure in itertools.product(KINDS, STRUCTURES):
        found = []
        for change in (LAYOUTS[layout], lambda t: t):
            model, loss = Net(OPS[op]), nn.CrossEntropyLoss()
            opt = ng.NaturalGradient(ng.Fisher(model, loss, kind=kind, structure=structure))
            x, y = data()
            for _ in range(3):
                opt.zero_grad()
                loss(model(change(x)), y).backward()
                opt.step()
            found.append(weights(model))
        for n, w in found[1].items():
            torch.testing.assert_close(found[0][n], w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_drawn_of_a_large_sparse_batch(layout: str) -> None:
    """A refresh takes some rows of a call with more than 1024 of them: the same ones."""
    x, y = data(1500)
    found = []
    for change in (LAYOUTS[layout], lambda t: t):
        model, loss = Net(OPS["linear"]), nn.CrossEntropyLoss()
        opt = ng.NaturalGradient(ng.Fisher(model, loss))
        loss(model(change(x)), y).backward()
        opt.step()
        found.append(opt.metric.factors("weight"))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_sparse_gradient_is_refused_by_name() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(12, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x * self.scale).to_dense())

    x, y = data()
    model, loss = Scaled(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, loss))
    loss(model(x.float().to_sparse()), y).backward()
    with pytest.raises(ValueError, match="gradient of 'scale' is sparse"):
        opt.step()


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_nested_input_is_refused_by_the_name_of_its_layer(layout: torch.layout) -> None:
    class Pooled(nn.Module):
        def __init__(self, norm: bool) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4) if norm else nn.Identity()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.nested.to_padded_tensor(self.first(self.norm(x)), 0.0).sum(1))

    y = torch.tensor([0, 1, 2])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype")
        x = torch.nested.nested_tensor([torch.randn(n, 4) for n in (2, 3, 1)], layout=layout)
    for kind, structure, norm in itertools.product(KINDS, STRUCTURES, (True, False)):
        model, loss = Pooled(norm), nn.CrossEntropyLoss()
        name = "norm.weight" if norm else "first.weight"
        said = rf"parameter '{name}' is used by \w+ on a nested tensor.*to_padded_tensor"
        metric = ng.Fisher(model, loss, kind=kind, structure=structure)
        with pytest.raises(CaptureError, match=said):
            metric.update(x, y)
        ng.NaturalGradient(metric)
        with pytest.raises(CaptureError, match=said):
            loss(model(x), y)


def test_a_nested_input_trains_what_comes_after_it_is_padded() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(torch.nested.to_padded_tensor(x, 0.0)).tanh().sum(1))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype")
        x = torch.nested.nested_tensor([torch.randn(n, 4) for n in (2, 3, 1)], layout=torch.jagged)
    model, loss = Padded(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, loss))
    before = weights(model)
    loss(model(x), torch.tensor([0, 1, 2])).backward()
    opt.step()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
