"""Metrics whose Kronecker sides are kept in pieces, against dense matrices with zeros off the pieces."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import batches, classifier, distance, train, weights

import natgrad as ng
from natgrad.blocks.kronecker import size_text
from natgrad.linalg import block_diagonal as sides
from tests import oracle

Close = Callable[[Tensor, Tensor, float], None]


class Net(nn.Module):
    """A convolution, in groups or not, and two linear layers; no side is a multiple of the pieces below."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(2, 10, 2, groups=groups)  # sides (10, 9), or two of (5, 5)
        self.hidden, self.head = nn.Linear(10, 7), nn.Linear(7, 5)  # (7, 11) and (5, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).tanh().mean((2, 3))
        return self.head(self.hidden(h).tanh())


SIZES = (9, 21)  # of batches: together more data than the longest side
CRITERION = nn.MSELoss()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(n, 2, 3, 3, dtype=torch.float64, generator=generator),
            torch.randn(n, 5, dtype=torch.float64, generator=generator),
        )
        for n in SIZES
    ]


def metric_of(structure: Any, max_factor_dim: Any, groups: int = 1, one_batch: bool = False) -> ng.Fisher:
    metric = ng.Fisher(
        Net(groups).double(), CRITERION, kind="exact", structure=structure, max_factor_dim=max_factor_dim
    )
    for x, y in [oracle.together(data())] if one_batch else data():
        metric.update(x, y)
    return metric


def expected(structure: str, max_factor_dim: int | None, groups: int = 1) -> Tensor:
    """The metric, dense, from torch alone: factors by loops, zeros off their pieces, and `torch.kron`."""
    model = Net(groups).double()
    theta = oracle.flatten(oracle.trainable(model))
    whole = oracle.gauss_newton(model, CRITERION, data())
    out = torch.zeros_like(whole)
    at = 0
    for layer in model.children():
        u, v = oracle.kfac_factors(model, layer, CRITERION, data(), sum(SIZES) * 5.0)
        bias, weight = layer.bias.numel(), layer.weight.numel()
        for k in range(len(u)):
            out_d, in_d = u.shape[-1], v.shape[-1]
            # positions in θ of the entries of X (d_out, d_in), whose last column is the bias
            first = at + torch.arange(weight).reshape(len(u), out_d, in_d - 1)[k]
            last = at + weight + torch.arange(bias).reshape(len(u), out_d, 1)[k]
            where = torch.cat([first, last], dim=1).flatten()
            masked_u, masked_v = u[k] * oracle.mask(out_d, max_factor_dim), v[k] * oracle.mask(in_d, max_factor_dim)
            if structure == "input":
                mean = u.diagonal(dim1=-2, dim2=-1)[k].mean()
                masked_u = torch.eye(out_d, dtype=torch.float64) * mean
            block = torch.kron(masked_u, masked_v)
            if structure == "ekfac":
                q = torch.kron(torch.linalg.eigh(masked_u)[1], torch.linalg.eigh(masked_v)[1])
                block = (q * (q.mT @ whole[where[:, None], where] @ q).diagonal()) @ q.mT
            out[where[:, None], where] = block
        at += weight + bias
    assert at == len(theta)
    return out


CASES = [("kfac", 1), ("kfac", 2), ("input", 1), ("ekfac", 1)]


@pytest.mark.parametrize(("structure", "groups"), CASES)
@pytest.mark.parametrize("max_factor_dim", [None, 1, 3, 4, 6, 10])
def test_the_metric_is_the_masked_product(
    structure: str, groups: int, max_factor_dim: int | None, close: Close
) -> None:
    metric = metric_of(structure, max_factor_dim, groups, one_batch=structure == "ekfac")
    dense = expected(structure, max_factor_dim, groups)
    close(metric.dense(), dense, 1e-9)
    v = {n: torch.randn(p.shape, dtype=torch.float64) for n, p in metric.parameters.items()}
    w = {n: torch.randn(p.shape, dtype=torch.float64) for n, p in metric.parameters.items()}
    flat_v, flat_w = metric.vector_to_flat(v), metric.vector_to_flat(w)
    eye = torch.eye(len(dense), dtype=torch.float64)
    close(metric.vector_to_flat(metric.flat(v)), dense @ flat_v, 1e-9)
    close(metric.inner(v, w).reshape(1), (flat_v @ dense @ flat_w).reshape(1), 1e-8)
    for damping in (1e-3, 0.1):
        close(metric.vector_to_flat(metric.sharp(v, damping)), torch.linalg.solve(dense + damping * eye, flat_v), 1e-8)
        close(metric.logdet(damping), torch.logdet(dense + damping * eye), 1e-9)
    close(metric.vector_to_flat(metric.diagonal()), dense.diagonal(), 1e-9)
    close(metric.trace(), dense.trace(), 1e-10)


def test_eigenvalues_follow_a_basis_that_moves(close: Close) -> None:
    """After a second batch: Q (R∘R s₁ + s₂) Qᵀ, s the diagonals of the batches' own blocks, R = Qᵀ Q₁."""
    model, name = Net().double(), "hidden"
    metric = metric_of("ekfac", 4)  # two batches
    at = sum(p.numel() for p in model.conv.parameters())
    weight = at + torch.arange(70).reshape(7, 10)
    where = torch.cat([weight, at + 70 + torch.arange(7)[:, None]], dim=1).flatten()

    def basis(batches: oracle.Batches) -> Tensor:
        u, v = oracle.kfac_factors(model, model.get_submodule(name), CRITERION, batches, 1.0)
        return torch.kron(*(torch.linalg.eigh(m[0] * oracle.mask(m.shape[-1], 4))[1] for m in (u, v)))

    def diagonal(batch: tuple[Tensor, Tensor], q: Tensor) -> Tensor:
        block = oracle.gauss_newton(model, CRITERION, [batch])[where[:, None], where]
        return (q.mT @ block @ q).diagonal() * len(batch[0]) / sum(SIZES)

    first, second = data()
    before, q = basis([first]), basis([first, second])
    values = (q.mT @ before).square() @ diagonal(first, before) + diagonal(second, q)
    close(metric.dense()[where[:, None], where], (q * values) @ q.mT, 1e-9)


@pytest.mark.parametrize("structure", ["kfac", "input", "ekfac"])
def test_samples_have_the_inverse_as_covariance(structure: str, close: Close) -> None:
    """The root that `sample` applies to noise, found column by column, times its transpose."""
    metric = metric_of(structure, 4, one_batch=True)
    for block in metric.blocks:
        index = torch.eye(block.dimension, dtype=torch.float64).reshape(-1, *block.shape)
        root = block.sample(index, 0.1).reshape(len(index), -1)
        dense = block.flat(index).reshape(len(index), -1)
        close(root @ root.mT, torch.linalg.inv(dense + 0.1 * torch.eye(len(dense)).double()), 1e-9)


def test_factors_are_matrices_with_zeros(close: Close, monkeypatch: pytest.MonkeyPatch) -> None:
    split, whole = metric_of("kfac", 4), metric_of("kfac", None)
    for name in ("conv.weight", "hidden.weight", "head.bias"):
        for found, full in zip(split.factors(name), whole.factors(name)):
            close(found, full * oracle.mask(len(full), 4), 1e-14)
    sizes = {n: split.coverage()[f"{n}.weight"].sizes for n in ("conv", "hidden", "head")}
    assert sizes == {"conv": "(2·4² + 2²) ⊗ 3·3²", "hidden": "(4² + 3²) ⊗ (2·4² + 3²)", "head": "(3² + 2²) ⊗ 2·4²"}
    monkeypatch.setattr("natgrad.fisher.block_metric.FULL_FACTOR_DIM", 8)  # longer ones are shown as they are kept
    u, v = split.factors("hidden.weight")
    assert (u.shape, v.shape) == ((7, 7), (4, 11))
    assert metric_of("kfac", 1).factors("hidden.weight")[1].shape == (11,)


def test_limits_by_name() -> None:
    found = metric_of("kfac", {"conv.*": 4, "head.*": 1}).coverage()
    sizes = {n: found[f"{n}.weight"].sizes for n in ("conv", "hidden", "head")}
    assert sizes == {"conv": "(2·4² + 2²) ⊗ 3·3²", "hidden": "7² ⊗ 11²", "head": "diag 5 ⊗ diag 8"}
    assert metric_of("kfac", {"conv.*": None, "*": 4}).coverage()["conv.weight"].sizes == "10² ⊗ 9²"


def test_a_state_of_another_format_is_refused() -> None:
    state = metric_of("kfac", 4).state_dict()
    about = {**json.loads(state["about"]), "format": 4}
    again = ng.Fisher(Net().double(), CRITERION, kind="exact", max_factor_dim=4)
    with pytest.raises(ValueError, match="has format 4; this version of natgrad reads format 14"):
        again.load_state_dict({**state, "about": json.dumps(about)})


def test_a_limit_that_no_side_reaches_changes_nothing() -> None:
    assert torch.equal(metric_of("kfac", 11).dense(), metric_of("kfac", None).dense())


def test_a_limit_rules_over_the_diagonal_of_long_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natgrad.blocks.kronecker.FULL_FACTOR_DIM", 6)
    assert metric_of("kfac", None).coverage()["hidden.weight"].sizes == "diag 7 ⊗ diag 11"
    assert metric_of("kfac", 11).coverage()["hidden.weight"].sizes == "7² ⊗ 11²"


def table() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(15, 3)).double()
    return model, torch.randint(0, 7, (30, 3)), torch.randn(30, 3, dtype=torch.float64)


def test_the_side_of_a_table_stays_diagonal() -> None:
    """Its rows are unit vectors."""
    model, x, y = table()
    for structure in ("kfac", "ekfac", "input"):
        found = ng.Fisher(model, CRITERION, kind="exact", structure=structure, max_factor_dim=3)
        found.update(x, y)
        assert "⊗ diag 7" in found.coverage()["0.weight"].sizes


def test_a_table_averaged_over_positions_goes_in_pieces(close: Close) -> None:
    model, x, y = table()
    options: dict[str, Any] = {"kind": "exact", "sharing": "reduce"}
    split, whole = (ng.Fisher(model, CRITERION, structure="kfac", max_factor_dim=m, **options) for m in (3, None))
    turned = ng.Fisher(model, CRITERION, structure="ekfac", max_factor_dim=3, **options)
    for metric in (split, whole, turned):
        metric.update(x, y)
    for found, full in zip(split.factors("0.weight"), whole.factors("0.weight")):
        close(found, full * oracle.mask(len(full), 3), 1e-14)
    assert turned.coverage()["0.weight"].sizes == "(3² + 2²) ⊗ (2·3² + 1²) + 5·7"
    # in any basis the eigenvalues are the diagonal of the block
    blocks = oracle.block_diagonal(oracle.gauss_newton(model, CRITERION, [(x, y)]), model)
    close(turned.trace(), blocks.trace(), 1e-12)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1).tanh())


def test_tied_weights_in_pieces(close: Close) -> None:
    ids, y = torch.randint(0, 7, (20, 2)), torch.randint(0, 7, (20,))
    split, whole = (
        ng.Fisher(Tied().double(), nn.CrossEntropyLoss(), kind="exact", max_factor_dim=m) for m in (3, None)
    )
    for metric in (split, whole):
        metric.update(ids, y)
    for found, full in zip(split.factors("embed.weight"), whole.factors("embed.weight")):
        close(found, full * oracle.mask(len(full), 3), 1e-14)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "input"])
def test_a_damped_step_is_that_of_the_masked_factors(structure: str, close: Close) -> None:
    """The relative damping of the default rule: √λ beside the mean eigenvalue of a whole side, not of a piece."""
    metric = metric_of(structure, 4)
    for block in metric.blocks:
        x = torch.randn(block.shape, dtype=torch.float64)
        found = block.relative_inverse(0.09).apply(x)
        shared = block.relative_inverse(0.09, [job.compute() for job in block.factor_jobs(0.09)]).apply(x)
        if structure == "ekfac":
            dense = block.flat(torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)).reshape(x.numel(), -1)
            mean = dense.trace() / len(dense)
            expected = torch.linalg.solve(dense / mean + 0.09 * torch.eye(len(dense)).double(), x.flatten())
            close(found.flatten(), expected, 1e-9)
        else:
            u, v = (sides.dense_of(s)[0] for s in (block.u, block.v))
            scales = torch.ones(len(v)).double() * v.diagonal()[:-1].mean()
            scales[-1] = v[-1, -1]  # a bias by itself
            size = v.trace() / len(v)
            u = u / (u.trace() / len(u)) + 0.3 * torch.eye(len(u)).double()
            v = (v + 0.3 * torch.diag(scales)) / size
            close(found[0], torch.linalg.inv(u) @ x[0] @ torch.linalg.inv(v), 1e-12)
        close(shared, found, 1e-14)


def test_every_piece_is_a_job_of_its_own() -> None:
    (conv, hidden, head) = metric_of("kfac", 4).blocks
    costs = [[job.cost for job in b.factor_jobs(0.1)] for b in (conv, hidden, head)]
    assert costs == [[64, 64, 8, 27, 27, 27], [64, 27, 64, 64, 27], [27, 8, 64, 64]]


def test_sizes_are_said_as_they_are_kept() -> None:
    assert [size_text(9, 9), size_text(1, 9), size_text(3, 9), size_text(4, 9), size_text(1, 1)] == [
        "9²",
        "diag 9",
        "3·3²",
        "(2·4² + 1²)",
        "1",
    ]


# states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "input"])
def test_files_give_the_metric_back(structure: str, tmp_path: Path) -> None:
    metric = metric_of(structure, 4)
    metric.save(tmp_path / "metric.safetensors")
    again = ng.Fisher(Net().double(), CRITERION, kind="exact", structure=structure, max_factor_dim=4)
    again.load(tmp_path / "metric.safetensors")
    assert torch.equal(again.dense(), metric.dense())
    x, y = data()[0]
    for m in (metric, again):
        m.update(x, y)
    assert torch.equal(again.dense(), metric.dense())
    for other in (None, 3):
        stranger = ng.Fisher(Net().double(), CRITERION, kind="exact", structure=structure, max_factor_dim=other)
        with pytest.raises(ValueError, match=rf"the max_factor_dim of conv.weight is {other} here and 4 in the state"):
            stranger.load(tmp_path / "metric.safetensors")


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "input"])
def test_spectra_are_read_from_files(structure: str, tmp_path: Path, close: Close) -> None:
    from natgrad.cli.inspect.spectra import load

    metric = metric_of(structure, 4)
    metric.save(tmp_path / "metric.safetensors")
    for spectrum in load(tmp_path / "metric.safetensors", 0.1, relative=False).spectra:
        (block,) = [b for b in metric.blocks if spectrum.name in b.names]
        dense = block.flat(torch.eye(block.dimension).double().reshape(-1, *block.shape))
        values = torch.linalg.eigvalsh(dense.reshape(block.dimension, -1)).flip(0)
        close(spectrum.values, values.clamp(min=0), 1e-10)
    relative = load(tmp_path / "metric.safetensors", 0.1, relative=True)
    assert all(torch.isfinite(s.damped).all() for s in relative.spectra)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "input"])
@pytest.mark.parametrize("stop", [3, 13])
def test_resume_continues_bit_for_bit(structure: str, stop: int) -> None:
    def build() -> tuple[nn.Module, ng.NaturalGradient]:
        model = classifier()
        metric = ng.Fisher(model, nn.CrossEntropyLoss(), structure=structure, max_factor_dim=4)  # draws labels
        return model, ng.NaturalGradient(metric)

    steps = list(batches(40))
    model, opt = build()
    train(model, opt, steps[:stop])
    assert any(not sides.is_whole(b.v) and not sides.is_diagonal(b.v) for b in opt.metric.blocks)
    state = copy.deepcopy((model.state_dict(), opt.state_dict()))
    straight = train(model, opt, steps[stop:])
    again, other = build()
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    assert train(again, other, steps[stop:]) == straight
    assert distance(weights(again), weights(model)) == 0


@pytest.mark.parametrize("given", [0, -3, 2.5, "512", True, torch.tensor(4), {"head.*": 0}])
def test_a_limit_that_is_no_number_of_rows_is_refused(given: Any) -> None:
    with pytest.raises(
        ValueError, match=r"max_factor_dim must be a whole number of at least 1 .*, None, or .*, got"
    ) as said:
        ng.Fisher(Net(), CRITERION, max_factor_dim=given)
    assert repr(given["head.*"] if isinstance(given, dict) else given) in str(said.value)


def test_a_pattern_without_a_parameter_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"max_factor_dim: no trainable parameter matches 'tail.\*'; there are \['conv.weight'"
    ):
        ng.Fisher(Net(), CRITERION, max_factor_dim={"tail.*": 2})


# while an optimizer drives --------------------------------------------------------------------------------------


def driven(max_factor_dim: int | None = None, structure: str = "kfac") -> tuple[nn.Module, ng.NaturalGradient]:
    model = classifier()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure=structure, max_factor_dim=max_factor_dim)
    return model, ng.NaturalGradient(metric)


def test_long_sides_are_cut_while_an_optimizer_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by `max_factor_dim`, where the user gave none; a metric by itself keeps them whole."""
    monkeypatch.setattr("natgrad.blocks.kronecker.TRAINING_FACTOR_DIM", 3)
    data = list(batches(5))
    (found, opt), (expected, limited), (whole, unlimited) = driven(), driven(3), driven(4096)
    for model, o in ((found, opt), (expected, limited), (whole, unlimited)):
        train(model, o, data)
    assert distance(weights(found), weights(expected)) == 0
    assert distance(weights(found), weights(whole)) > 1e-3
    alone = ng.Fisher(whole, nn.CrossEntropyLoss(), kind="exact")
    alone.update(*data[0])
    sizes = [[row.sizes for row in m.coverage().rows] for m in (opt.metric, limited.metric, unlimited.metric, alone)]
    assert sizes[0] == sizes[1]
    assert sizes[2] == sizes[3] != sizes[0]
    assert "longer than 3 is kept as blocks" in str(opt.metric.coverage())


def test_what_was_cut_in_training_is_loaded_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a metric that no optimizer drives, too."""
    monkeypatch.setattr("natgrad.blocks.kronecker.TRAINING_FACTOR_DIM", 3)
    model, opt = driven()
    train(model, opt, list(batches(3)))
    opt.metric.save(tmp_path / "metric.safetensors")
    alone = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact")
    alone.load(tmp_path / "metric.safetensors")
    assert torch.equal(alone.dense(), opt.metric.dense())


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "input"])
def test_training_goes_on_with_what_was_cut(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natgrad.blocks.kronecker.TRAINING_FACTOR_DIM", 3)
    data = list(batches(8))
    (model, opt), (again, resumed) = (driven(structure=structure) for _ in range(2))
    train(model, opt, data[:4])
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (again, resumed)):
        train(m, o, data[4:])
    assert distance(weights(model), weights(again)) == 0


def test_nothing_is_said_of_blocks_where_no_side_is_cut() -> None:
    model, opt = driven()
    train(model, opt, list(batches(1)))
    assert "kept as blocks" not in str(opt.metric.coverage())
