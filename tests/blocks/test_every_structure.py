"""The battery of structures: each × kinds of layer, its verbs against the dense matrix of what it keeps.

Each layer sees one datum at one place: there Kronecker products are exact, so what a structure keeps of the matrix of a
layer is known. A new structure is one line in `KEPT`; a new kind of layer one in `LAYERS`.
"""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.blocks.base import Block
from natgrad.blocks.structures import STRUCTURES, block_from_json, block_to_json

Close = Callable[[Tensor, Tensor, float], None]
Shape = tuple[int, int, int]  # (groups, d_out, d_in)
F64 = torch.float64


def same_group(full: Tensor, shape: Shape) -> Tensor:
    """The blocks of each group."""
    groups, out, into = shape
    return full * torch.kron(torch.eye(groups, dtype=F64), torch.ones(out * into, out * into, dtype=F64))


def inputs_alone(full: Tensor, shape: Shape) -> Tensor:
    """c·I ⊗ V with c the mean of the diagonal of U: the mean of the blocks of each output, group by group."""
    groups, out, into = shape
    blocks = full.reshape(groups, out, into, groups, out, into).diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=2)
    each = blocks.mean(-1).movedim(-1, 0)  # (groups, d_in, d_in)
    return torch.block_diag(*(torch.kron(torch.eye(out, dtype=F64), v) for v in each))


# what a structure keeps of the matrix of a layer: (full matrix, shape) → matrix
KEPT: dict[str, Callable[[Tensor, Shape], Tensor]] = {
    "dense": lambda full, shape: full,
    "block": lambda full, shape: full,
    "diagonal": lambda full, shape: full.diagonal().diag(),
    "kfac": same_group,
    "ekfac": same_group,
    "input": inputs_alone,
}


class Scale(nn.Module):
    """An elementwise scale and an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor([1.0, -2.0, 0.5])), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


# one layer, with the shape of one datum; an integer is the size of a table
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | int]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2), (2, 2, 2)),
    "grouped convolution": (lambda: nn.Conv1d(4, 6, 2, groups=2), (4, 2)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(3, 2, 1), (3, 1)),
    "table": (lambda: nn.Embedding(5, 3), 5),
    "norm": (lambda: nn.LayerNorm(4), (4,)),
    "scale": (Scale, (3,)),
}
EACH = [pytest.param(s, layer, id=f"{s}, {layer}") for s in KEPT for layer in LAYERS]


def data_of(layer: str, count: int) -> tuple[Tensor, Tensor]:
    build, shape = LAYERS[layer]
    g = torch.Generator().manual_seed(5)
    x = (
        torch.randint(shape, (count,), generator=g)
        if isinstance(shape, int)
        else torch.randn(count, *shape, generator=g, dtype=F64)
    )
    with torch.no_grad():
        out = build().double()(x)
    return x, torch.randn(out.shape, generator=g, dtype=F64)


def metric_of(structure: str, layer: str, count: int = 1, kind: str = "empirical") -> ng.Fisher:
    torch.manual_seed(3)
    model = LAYERS[layer][0]().double()
    metric = ng.Fisher(model, nn.MSELoss(), kind=kind, structure=structure)
    if count:
        metric.update(*data_of(layer, count))
    return metric


def each_block(structure: str, layer: str, count: int = 7) -> list[Block]:
    return metric_of(structure, layer, count, "exact").blocks


def matrix_of(block: Block) -> Tensor:
    eye = torch.eye(block.dimension, dtype=F64).reshape(-1, *block.shape)
    return block.flat(eye).reshape(block.dimension, -1)


def damped(block: Block, damping: float) -> Tensor:
    return matrix_of(block) + damping * torch.eye(block.dimension, dtype=F64)


def test_every_structure_has_a_line() -> None:
    assert set(KEPT) == set(STRUCTURES)


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_the_matrix_is_what_is_kept_of_the_dense_one(structure: str, layer: str, close: Close) -> None:
    metric = metric_of(structure, layer)
    full = oracle.empirical(metric.model, nn.MSELoss(), [data_of(layer, 1)])
    assert sorted(n for b in metric.blocks for n in b.names) == sorted(metric.names)
    for block in metric.blocks:
        size = sum(p.numel() for p in metric.parameters.values())
        where = block.pack(metric.flat_to_vector(torch.arange(size))).flatten()
        mine = full[where[:, None], where]
        if len(block.layers) == 1:
            mine = KEPT[structure](mine, tuple(block.shapes[0]))
        close(matrix_of(block), mine, 1e-12)


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_verbs_are_those_of_the_matrix(structure: str, layer: str, close: Close) -> None:
    for block in each_block(structure, layer):
        m, eye = matrix_of(block), torch.eye(block.dimension, dtype=F64)
        batch = eye.reshape(-1, *block.shape)
        close(m, m.mT, 1e-12)
        assert float(torch.linalg.eigvalsh(m)[0]) > -1e-10
        close(block.diagonal().flatten(), m.diagonal(), 1e-11)
        close(block.trace(), m.trace(), 1e-11)
        close(block.logdet(0.2), torch.logdet(damped(block, 0.2)), 1e-10)
        inverse = block.inverse(0.2).apply(batch).reshape(block.dimension, -1)
        close(inverse @ damped(block, 0.2), eye, 1e-9)
        assert block.kept_inverse(0.2) is block.kept_inverse(0.2)
        root = block.sample(batch, 0.2).reshape(block.dimension, -1)
        close(root.mT @ root, inverse, 1e-9)


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_each_parameter_may_have_a_damping_of_its_own(structure: str, layer: str, close: Close) -> None:
    metric = metric_of(structure, layer, 7, "exact")
    given = metric.dampings({metric.names[0]: 0.2, "*": 0.7} if len(metric.names) > 1 else 0.2)
    for block in metric.blocks:
        d, m = block.damping_of(given, metric.parameters), matrix_of(block)
        eye = torch.eye(block.dimension, dtype=F64)
        batch = eye.reshape(-1, *block.shape)
        where = {n: torch.full_like(p, 0.2 if n == metric.names[0] else 0.7) for n, p in metric.parameters.items()}
        damped = m + torch.diag(block.pack(where).flatten())
        inverse = block.inverse(d).apply(batch).reshape(block.dimension, -1)
        close(inverse @ damped, eye, 1e-9)
        close(block.inverse_diagonal(d).flatten(), torch.linalg.inv(damped).diagonal(), 1e-9)
        close(block.logdet(d), torch.logdet(damped), 1e-9)
        root = block.sample(batch, d).reshape(block.dimension, -1)
        close(root.mT @ root, inverse, 1e-9)
        assert block.kept_inverse(d) is block.kept_inverse(d)


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_eigenvalues_are_those_of_the_matrix(structure: str, layer: str, close: Close) -> None:
    metric = metric_of(structure, layer, 7, "exact")
    for block in metric.blocks:
        expected = torch.linalg.eigvalsh(matrix_of(block)).clamp(min=0).flip(0)
        for name in block.names:
            close(metric.eigenvalues(name), expected, 1e-9)
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        metric.eigenvalues("nothing")


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_the_relative_inverse_is_the_plain_one_where_damping_vanishes(structure: str, layer: str, close: Close) -> None:
    """Up to a factor, which `newton_scale` says; and it is put together from parts that were done elsewhere."""
    for block in each_block(structure, layer, count=40):
        x = torch.randn(block.shape, dtype=F64)
        x = block.flat(x)  # of what the matrix reaches
        found, plain = block.relative_inverse(1e-22).apply(x), block.inverse(1e-14).apply(x)
        if float(torch.linalg.eigvalsh(matrix_of(block))[0]) > 1e-8:
            close(found, block.newton_scale() * plain, 1e-5)
        shared = block.relative_inverse(0.1, [job.compute() for job in block.factor_jobs(0.1)])
        close(shared.apply(x), block.relative_inverse(0.1).apply(x), 1e-12)


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_coordinates_go_there_and_back(structure: str, layer: str) -> None:
    metric = metric_of(structure, layer, 2)
    given = {n: torch.randn_like(p) for n, p in metric.parameters.items()}
    back = {n: torch.zeros_like(p) for n, p in metric.parameters.items()}
    for block in metric.blocks:
        x = block.pack(given)
        assert x.shape == block.shape
        assert x.numel() == block.dimension
        block.unpack(x, back)
        named = block.named(x, metric.parameters)
        assert all(torch.equal(named[n], given[n]) for n in block.names)
    assert all(torch.equal(back[n], t) for n, t in given.items())


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_halves_merge_into_the_whole(structure: str, layer: str, close: Close) -> None:
    """Whether batches are added one after the other or their statistics merged first. EKFAC's bases differ on the way,
    so that its trace alone is the same.
    """
    x, y = data_of(layer, 6)
    whole, added, first, second = (metric_of(structure, layer, 0, "exact") for _ in range(4))
    whole.update(x, y)
    for metric, rows in ((added, slice(3)), (added, slice(3, None)), (first, slice(3)), (second, slice(3, None))):
        metric.update(x[rows], y[rows])
    for all_of_it, one_by_one, a, b in zip(whole.blocks, added.blocks, first.blocks, second.blocks):
        merged, a.statistics = a.merged([a.statistics, b.statistics], plain=False), {}
        a.commit(merged, None, plain=False)
        for found in (one_by_one, a):
            close(found.trace(), all_of_it.trace(), 1e-11)
            if structure != "ekfac":
                close(matrix_of(found), matrix_of(all_of_it), 1e-11)


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_a_moving_average_of_the_same_is_the_same(structure: str, layer: str, close: Close) -> None:
    for block, again in zip(each_block(structure, layer), each_block(structure, layer)):
        before, version = matrix_of(block), block.version
        block.commit(again.statistics, decay=0.7, plain=False)
        close(matrix_of(block), before, 1e-10)
        assert block.version > version


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_a_block_comes_back_from_its_state(structure: str, layer: str) -> None:
    metric = metric_of(structure, layer, 5, "exact")
    shapes = {n: p.shape for n, p in metric.parameters.items()}
    for block in metric.blocks:
        again = block_from_json(block_to_json(block), shapes)
        assert type(again) is STRUCTURES[structure]
        assert not again.known
        again.statistics = block.statistics
        assert torch.equal(matrix_of(again), matrix_of(block))
        assert (again.key, again.names, again.sizes()) == (block.key, block.names, block.sizes())
        assert again.sides() == block.sides()
    other = metric_of(structure, layer, 0, "exact")
    other.load_state_dict(metric.state_dict())
    assert torch.equal(other.dense(), metric.dense())


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_what_was_computed_goes_with_the_statistics(structure: str, layer: str) -> None:
    for block in each_block(structure, layer):
        before, inverse = matrix_of(block), block.good_inverse(0.1)
        assert not block.is_stale(0.1)
        assert block.is_stale(0.2)
        for average in block.statistics.values():
            average.sums = {h: 2 * s for h, s in average.sums.items()}
        block.forget()
        assert block.is_stale(0.1)
        assert block.good_inverse(0.1) is not inverse
        if structure != "ekfac":  # whose bases are not sums
            assert not torch.equal(matrix_of(block), before)


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_a_block_follows_a_cast(structure: str, layer: str) -> None:
    for block in each_block(structure, layer):
        before = matrix_of(block)
        block.move(torch.device("cpu"), torch.float32)
        assert block.dtype == torch.float32
        x = torch.randn(block.shape)
        assert block.flat(x).dtype == block.relative_inverse(0.1).apply(x).dtype == torch.float32
        eye = torch.eye(block.dimension).reshape(-1, *block.shape)
        found = block.flat(eye).reshape(block.dimension, -1).double()
        assert float((found - before).norm()) <= 1e-5 * float(before.norm())


@pytest.mark.parametrize(("structure", "layer"), EACH)
def test_no_data_and_no_gradient_give_no_newton_step(structure: str, layer: str) -> None:
    x, _ = data_of(layer, 4)
    metric = metric_of(structure, layer, 0)
    metric.update(x, metric.model(x).detach())  # residuals of zero
    for block in metric.blocks:
        assert float(block.newton_scale()) == 0
        assert bool(torch.isfinite(block.relative_inverse(0.1).apply(torch.ones(block.shape, dtype=F64))).all())
