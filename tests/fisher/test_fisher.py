"""The Fisher metric against the dense oracles of `oracle`, and its verbs against linear algebra on `dense`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from cases import GAUSS_NEWTON, KINDS, ONE, PLAIN, REDUCTIONS, STRUCTURES, UNEQUAL, Case, case, mlp
from torch import Tensor, nn

import natgrad as ng

Close = Callable[[Tensor, Tensor, float], None]


def filled(model: nn.Module, criterion: nn.Module, batches: Any, **options: Any) -> ng.Fisher:
    metric = ng.Fisher(model, criterion, **options)
    for x, y in batches:
        metric.update(x, y)
    return metric


def vector_like(metric: ng.Metric, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, dtype=p.dtype, generator=g) for n, p in metric.parameters.items()}


def expected_in(structure: str, matrix: Tensor, model: nn.Module) -> Tensor:
    if structure == "diagonal":
        return torch.diag(matrix.diagonal())
    return oracle.block_diagonal(matrix, model) if structure == "block" else matrix


# exact = the Gauss–Newton matrix -----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [ONE, UNEQUAL], ids=["one", "unequal"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("c", GAUSS_NEWTON, ids=str)
def test_exact_is_the_gauss_newton_matrix(c: Case, reduction: str, sizes: tuple[int, ...], close: Close) -> None:
    model, criterion, batches = c.model(), c.criterion(reduction), c.batches(sizes)
    expected = oracle.gauss_newton(model, criterion, batches, c.output)
    for structure in ("dense", "block", "diagonal"):
        metric = filled(model, criterion, batches, kind="exact", structure=structure, output=c.output)
        close(metric.dense(), expected_in(structure, expected, model), 1e-10)


@pytest.mark.parametrize("sizes", [ONE, UNEQUAL], ids=["one", "unequal"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("c", GAUSS_NEWTON, ids=str)
def test_empirical_is_the_mean_of_outer_products(c: Case, reduction: str, sizes: tuple[int, ...], close: Close) -> None:
    model, criterion, batches = c.model(), c.criterion(reduction), c.batches(sizes)
    expected = oracle.empirical(model, criterion, batches, c.output)
    for structure in ("dense", "block", "diagonal"):
        metric = filled(model, criterion, batches, kind="empirical", structure=structure, output=c.output)
        close(metric.dense(), expected_in(structure, expected, model), 1e-10)


def test_a_batch_of_ignored_labels_alone_adds_nothing(close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss(ignore_index=1)
    (x, y), (x2, _) = case("ce-ignore").batches((4, 3))
    y = torch.tensor([0, 2, 0, 1])
    expected = oracle.gauss_newton(model, criterion, [(x, y)])
    metric = filled(model, criterion, [(x2, torch.ones(3, dtype=torch.long)), (x, y)], kind="exact", structure="dense")
    close(metric.dense(), expected, 1e-10)


# sampled → exact ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", GAUSS_NEWTON, ids=str)
def test_sampled_is_unbiased(c: Case) -> None:
    """z-scores of the mean over independent draws: their mean square is 1 where the mean is exact."""
    model, criterion, batches = c.model(), c.criterion("mean"), c.batches((4,))
    expected = oracle.gauss_newton(model, criterion, batches, c.output)
    metric = ng.Fisher(model, criterion, kind="sampled", structure="dense", output=c.output, samples=2)
    draws = []
    for _ in range(120):
        metric.reset()
        metric.update(*batches[0])
        draws.append(metric.dense())
    found = torch.stack(draws)
    spread = found.std(0)
    live = spread > 1e-9 * spread.max()
    z = (found.mean(0) - expected)[live] / spread[live] * len(draws) ** 0.5
    assert float(z.square().mean()) < 4.0, float(z.square().mean())
    assert float((found.mean(0) - expected)[~live].abs().sum()) <= 1e-9


def test_sampled_approaches_exact_like_one_over_root_samples() -> None:
    c = case("ce")
    model, criterion, batches = c.model(), c.criterion("mean"), c.batches((4,))
    expected = oracle.gauss_newton(model, criterion, batches)
    counts, errors = [1, 4, 16, 64, 256], []
    for samples in counts:
        each = []
        for seed in range(8):
            metric = filled(model, criterion, batches, kind="sampled", structure="dense", samples=samples, seed=seed)
            each.append(float((metric.dense() - expected).square().sum()))
        errors.append((sum(each) / len(each)) ** 0.5)
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert abs(slope + 0.5) < 0.06, slope


def test_seeds_repeat_and_differ() -> None:
    c = case("ce")
    model, criterion, batches = c.model(), c.criterion("mean"), c.batches(UNEQUAL)
    dense = [filled(model, criterion, batches, structure="dense", seed=s).dense() for s in (0, 0, 1)]
    assert torch.equal(dense[0], dense[1])
    assert not torch.allclose(dense[0], dense[2])


# the second derivative of the KL divergence ----------------------------------------------------------------


def test_fisher_is_the_second_derivative_of_the_kl(close: Close) -> None:
    c = case("ce")
    model, (batch,) = c.model(), c.batches((6,))
    theta, f = oracle.as_function(model)
    log_p = f(theta, batch[0]).log_softmax(1).detach()

    def kl(t: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - f(t, batch[0]).log_softmax(1))).sum(1).mean()

    metric = filled(model, nn.CrossEntropyLoss(), [batch], kind="exact", structure="dense")
    close(metric.dense(), oracle.hessian(kl)(theta), 1e-10)
    # and √(2 KL(θ, θ + δ) / δᵀFδ) → 1
    delta = vector_like(metric)
    flat = metric.vector_to_flat(delta)
    ratios = [float((2 * kl(theta + s * flat)).sqrt() / (s * metric.norm(delta))) for s in (1e-2, 1e-3)]
    assert abs(ratios[1] - 1) < 2e-3
    assert abs(ratios[1] - 1) < abs(ratios[0] - 1) / 5


# the formulas as they stand in the introduction ---------------------------------------------------------------


@pytest.mark.parametrize("sizes", [ONE, UNEQUAL], ids=["one", "unequal"])
def test_the_formulas_taken_literally(sizes: tuple[int, ...], close: Close) -> None:
    """Weights only and labelled data: u = ∂ℓ/∂h ∘ φ′(Wx), U = (1/m) Σ u uᵀ, V = (1/m) Σ x xᵀ, B∇ = U⁻¹ ∇ V⁻¹."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    w1, w2 = model[0].weight.detach(), model[2].weight.detach()
    data = [(torch.randn(4 * n, 3).double(), torch.randint(2, (4 * n,))) for n in sizes]
    metric = filled(model, nn.CrossEntropyLoss(), data, kind="empirical", structure="kfac")

    m = sum(len(x) for x, _ in data)
    u1, v1 = torch.zeros(4, 4).double(), torch.zeros(3, 3).double()
    u2, v2 = torch.zeros(2, 2).double(), torch.zeros(4, 4).double()
    for x, y in zip(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])):
        h = torch.tanh(w1 @ x)
        f = w2 @ h
        dl_df = f.softmax(0) - nn.functional.one_hot(y, 2)  # ∂ℓ/∂f, the last layer has no φ
        u = (w2.T @ dl_df) * (1 - h**2)  # ∂ℓ/∂h ∘ φ′(Wx)
        u1, v1 = u1 + torch.outer(u, u) / m, v1 + torch.outer(x, x) / m
        u2, v2 = u2 + torch.outer(dl_df, dl_df) / m, v2 + torch.outer(h, h) / m
    for name, u, v in (("0.weight", u1, v1), ("2.weight", u2, v2)):
        found_u, found_v = metric.factors(name)
        close(found_u, u, 1e-10)
        close(found_v, v, 1e-10)

    # λ → 0 for the first layer, whose U is regular; the second one's is singular (the scores sum to zero)
    df = vector_like(metric)
    expected = torch.linalg.inv(u1) @ df["0.weight"] @ torch.linalg.inv(v1)
    errors = [oracle.relative_error(metric.sharp(df, lam)["0.weight"], expected) for lam in (1e-6, 1e-8, 1e-10)]
    assert errors[2] < errors[1] < errors[0]
    close(metric.sharp(df, 1e-15)["0.weight"], expected, 1e-8)


# K-FAC -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("c", PLAIN, ids=str)
def test_kfac_factors_are_those_of_plain_loops(c: Case, reduction: str, close: Close) -> None:
    model, criterion, batches = c.model(), c.criterion(reduction), c.batches(UNEQUAL)
    metric = filled(model, criterion, batches, kind="exact", structure="kfac")
    mass = total_mass(criterion, batches)
    for name in ("0", "2"):
        u, v = oracle.kfac_factors(model, model.get_submodule(name), criterion, batches, mass)
        found_u, found_v = metric.factors(f"{name}.weight")
        close(found_u, u[0], 1e-10)
        close(found_v, v[0], 1e-10)


def total_mass(criterion: nn.Module, batches: Any) -> float:
    """What the criterion divides by under "mean": read off it, as sum / mean."""
    if criterion.reduction == "sum":
        return 1.0
    _, y = oracle.together(batches)
    z = torch.linspace(-1, 1, len(y) * 3, dtype=torch.float64).view(len(y), 3)
    mean = criterion(z, y)
    criterion.reduction = "sum"
    total = criterion(z, y)
    criterion.reduction = "mean"
    return float(total / mean)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kfac_is_exact_for_deep_linear_nets(reduction: str, close: Close) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)).double()
    data = [(torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in UNEQUAL]
    expected = oracle.block_diagonal(oracle.gauss_newton(model, nn.MSELoss(reduction=reduction), data), model)
    metric = filled(model, nn.MSELoss(reduction=reduction), data, kind="exact", structure="kfac")
    close(metric.dense(), expected, 1e-10)


@pytest.mark.parametrize("c", PLAIN, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kfac_is_exact_for_one_datum(c: Case, reduction: str, close: Close) -> None:
    model, criterion = c.model(), c.criterion(reduction)
    ((x, y),) = c.batches((2,))
    x, y = x[:1], (torch.tensor([2]) if c.name.startswith("ce") else y[:1])
    expected = oracle.block_diagonal(oracle.gauss_newton(model, criterion, [(x, y)]), model)
    metric = filled(model, criterion, [(x, y)], kind="exact", structure="kfac")
    close(metric.dense(), expected, 1e-10)


def test_kfac_is_exact_for_identical_inputs(close: Close) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    x = torch.randn(1, 3).double().expand(5, 3).contiguous()
    data = [(x, torch.tensor([0, 1, 2, 0, 1])), (x[:2], torch.tensor([1, 1]))]
    expected = oracle.block_diagonal(oracle.gauss_newton(model, criterion, data), model)
    close(filled(model, criterion, data, kind="exact", structure="kfac").dense(), expected, 1e-10)


class MeanPooled(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((1, 2))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_weight_sharing_is_exact_in_its_own_case(sharing: str, reduction: str, close: Close) -> None:
    """Linear layers on (N, 4, 8, d): expand for a target at each position, reduce for mean-pooled outputs."""
    torch.manual_seed(6)
    layers = (nn.Linear(3, 3), nn.Linear(3, 2))
    model = (nn.Sequential(*layers) if sharing == "expand" else MeanPooled(*layers)).double()
    data = [
        (torch.randn(n, 4, 8, 3).double(), torch.randn(n, *((4, 8) if sharing == "expand" else ()), 2).double())
        for n in (2, 1, 3)
    ]
    criterion = nn.MSELoss(reduction=reduction)
    expected = oracle.block_diagonal(oracle.gauss_newton(model, criterion, data), model)
    metric = filled(model, criterion, data, kind="exact", structure="kfac", sharing=sharing)
    close(metric.dense(), expected, 1e-10)
    other = filled(
        model,
        criterion,
        data,
        kind="exact",
        structure="kfac",
        sharing={"expand": "reduce", "reduce": "expand"}[sharing],
    )
    assert oracle.relative_error(other.dense(), expected) > 0.01  # the other setting is no exact case


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kfac_is_exact_for_a_first_convolution_and_pointwise_ones(reduction: str, close: Close) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1, bias=False)).double()
    data = [(torch.randn(n, 2, 4, 3).double(), torch.randn(n, 2, 4, 3).double()) for n in (2, 1)]
    criterion = nn.MSELoss(reduction=reduction)
    expected = oracle.block_diagonal(oracle.gauss_newton(model, criterion, data), model)
    close(filled(model, criterion, data, kind="exact", structure="kfac").dense(), expected, 1e-10)


CONVOLUTIONS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "rectangular": {"kernel_size": (2, 3), "padding": (0, 1)},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "stride-pair": {"kernel_size": 2, "stride": (1, 2)},
    "dilation": {"kernel_size": 2, "dilation": 2, "padding": 1},
    "groups": {"kernel_size": 2, "groups": 2},
    "depthwise-all": {"kernel_size": (3, 2), "groups": 4, "stride": (2, 1), "dilation": (1, 2), "padding": (1, 2)},
}


class ConvNet(nn.Module):
    def __init__(self, options: dict[str, Any], bias: bool) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.conv = nn.Conv2d(4, 4, bias=bias, **options)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).tanh().mean((2, 3)))


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_convolutions(options: dict[str, Any], bias: bool, close: Close) -> None:
    model, criterion = ConvNet(options, bias), nn.CrossEntropyLoss()
    data = [(torch.randn(n, 4, 5, 6).double(), torch.randint(3, (n,))) for n in (2, 1)]
    expected = oracle.gauss_newton(model, criterion, data)
    for structure in ("dense", "block", "diagonal"):
        metric = filled(model, criterion, data, kind="exact", structure=structure)
        close(metric.dense(), expected_in(structure, expected, model), 1e-10)
    labelled = filled(model, criterion, data, kind="empirical", structure="dense")
    close(labelled.dense(), oracle.empirical(model, criterion, data), 1e-10)
    for sharing in ("expand", "reduce"):
        metric = filled(model, criterion, data, kind="exact", structure="kfac", sharing=sharing)
        u, v = oracle.kfac_factors(model, model.conv, criterion, data, 3.0, sharing)
        found_u, found_v = metric.factors("conv.weight")
        close(found_u.reshape(u.shape), u, 1e-10)
        close(found_v.reshape(v.shape), v, 1e-10)


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_padding_by_name(padding: Any, close: Close) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, (1, 3), padding=padding), nn.Flatten(-3), nn.LazyLinear(2)).double()
    x = torch.randn(3, 1, 3, 4).double()
    model(x)
    metric = filled(model, nn.MSELoss(), [(x, None)], kind="exact", structure="dense")
    expected = oracle.gauss_newton(model, nn.MSELoss(), [(x, torch.zeros(3, 2).double())])
    close(metric.dense(), expected, 1e-10)


# verbs against the dense matrix -----------------------------------------------------------------------------


VERB_CASES = [pytest.param(s, k, id=f"{s}-{k}") for s, k in itertools.product((*STRUCTURES, "mixed"), KINDS)]


def verb_metric(structure: str, kind: str) -> ng.Fisher:
    c = case("ce-weight-smoothing")
    option: Any = {"0.*": "dense", "2.weight": "kfac"} if structure == "mixed" else structure
    return filled(c.model(), c.criterion("mean"), c.batches(UNEQUAL), kind=kind, structure=option, samples=3)


@pytest.mark.parametrize(("structure", "kind"), VERB_CASES)
@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_sharp_solves_the_damped_dense_system(structure: str, kind: str, damping: float, close: Close) -> None:
    metric = verb_metric(structure, kind)
    df = vector_like(metric)
    dense = metric.dense()
    expected = torch.linalg.solve(dense + damping * torch.eye(len(dense)).double(), metric.vector_to_flat(df))
    close(metric.vector_to_flat(metric.sharp(df, damping)), expected, 1e-8)


@pytest.mark.parametrize(("structure", "kind"), VERB_CASES)
def test_verbs_agree_with_dense(structure: str, kind: str, close: Close) -> None:
    metric = verb_metric(structure, kind)
    dense, u, v = metric.dense(), vector_like(metric, 1), vector_like(metric, 2)
    flat_u, flat_v = metric.vector_to_flat(u), metric.vector_to_flat(v)
    damped = dense + 0.1 * torch.eye(len(dense)).double()
    close(dense, dense.mT, 1e-12)
    assert float(torch.linalg.eigvalsh(dense)[0]) > -1e-12
    close(metric.vector_to_flat(metric.flat(v)), dense @ flat_v, 1e-10)
    close(metric.inner(u, v), flat_u @ dense @ flat_v, 1e-10)
    close(metric.norm(v), (flat_v @ dense @ flat_v).sqrt(), 1e-10)
    close(metric.vector_to_flat(metric.diagonal()), dense.diagonal(), 1e-10)
    close(metric.trace(), dense.trace(), 1e-10)
    close(metric.logdet(0.1), torch.logdet(damped), 1e-10)
    back = metric.sharp({n: metric.flat(v)[n] + 0.1 * v[n] for n in v}, 0.1)
    close(metric.vector_to_flat(back), flat_v, 1e-8)


@pytest.mark.parametrize("structure", [*STRUCTURES, "mixed"])
def test_samples_have_the_covariance_of_the_damped_inverse(structure: str) -> None:
    metric = verb_metric(structure, "exact")
    g = torch.Generator().manual_seed(0)
    count = 4000
    draws = torch.stack([metric.vector_to_flat(metric.sample(0.2, generator=g)) for _ in range(count)])
    dense = metric.dense()
    expected = torch.linalg.inv(dense + 0.2 * torch.eye(len(dense)).double())
    d = expected.diagonal()
    spread = ((d[:, None] * d[None, :] + expected.square()) / count).sqrt()
    z = (draws.mT @ draws / count - expected) / spread
    assert float(z.abs().max()) < 5.5
    assert abs(float(z.square().mean()) - 1) < 0.5
    assert float((draws.mean(0) / (d / count).sqrt()).abs().max()) < 5


def test_samples_follow_the_generator() -> None:
    metric = verb_metric("kfac", "exact")
    before = torch.get_rng_state()
    one, two, three = (metric.sample(0.1, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not all(torch.equal(one[n], three[n]) for n in one)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_damping_is_never_written_into_the_statistics(structure: str) -> None:
    metric = verb_metric(structure, "exact")
    before = metric.dense().clone()
    df = vector_like(metric)
    first = metric.sharp(df, 0.5)
    metric.logdet(3.0)
    metric.sample(2.0)
    metric.sharp(df, 7.0)
    assert torch.equal(metric.dense(), before)
    again = metric.sharp(df, 0.5)
    assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_float64_is_kept(structure: str) -> None:
    metric = verb_metric(structure, "sampled")
    for block in metric.blocks:
        for average in block.statistics.values():
            assert all(t.dtype == torch.float64 for t in (*average.sums.values(), *average.masses.values()))
    for vector in (metric.flat(vector_like(metric)), metric.sharp(vector_like(metric), 0.1), metric.sample(0.1)):
        assert all(t.dtype == torch.float64 for t in vector.values())
    assert metric.trace().dtype == metric.logdet(0.1).dtype == torch.float64


@pytest.mark.parametrize("structure", STRUCTURES)
def test_half_precision_parameters_have_every_verb(structure: str) -> None:
    """Statistics are float32 there; vectors stay in the parameters' dtype."""
    model = mlp().bfloat16()
    metric = filled(model, nn.CrossEntropyLoss(), [(torch.ones(4, 3).bfloat16(), None)], structure=structure)
    v = vector_like(metric)
    for vector in (metric.flat(v), metric.sharp(v, 0.1), metric.sample(0.1), metric.diagonal()):
        assert all(t.dtype == torch.bfloat16 and bool(t.isfinite().all()) for t in vector.values())
    for value in (metric.dense(), metric.trace(), metric.logdet(0.1), metric.norm(v)):
        assert bool(value.isfinite().all())


# scale ------------------------------------------------------------------------------------------------------


SCALE_KINDS = [("exact", s) for s in STRUCTURES] + [("empirical", s) for s in STRUCTURES]


@pytest.mark.parametrize(("kind", "structure"), SCALE_KINDS)
@pytest.mark.parametrize("c", PLAIN, ids=str)
def test_scale_of_repeated_and_split_batches(c: Case, kind: str, structure: str, close: Close) -> None:
    model, ((x, y),) = c.model(), c.batches((6,))
    mean, total = c.criterion("mean"), c.criterion("sum")

    def dense(criterion: nn.Module, batches: Any) -> Tensor:
        return filled(model, criterion, batches, kind=kind, structure=structure).dense()

    one = dense(mean, [(x, y)])
    close(dense(mean, [(x.repeat(2, 1), y.repeat(2, *[1] * (y.dim() - 1)))]), one, 1e-10)
    close(dense(mean, [(x, y), (x, y)]), one, 1e-10)
    close(dense(mean, [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])]), one, 1e-10)
    summed = dense(total, [(x, y)])
    close(dense(total, [(x, y), (x, y)]), 2 * summed, 1e-10)
    close(dense(total, [(x.repeat(2, 1), y.repeat(2, *[1] * (y.dim() - 1)))]), 2 * summed, 1e-10)
    close(dense(total, [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])]), summed, 1e-10)
    if kind == "exact":
        close(summed, one * total_mass(mean, [(x, y)]), 1e-10)
    else:
        if c.name != "ce-weight-ignore-smoothing":  # whose data have masses of their own
            each = float((total(model(x[:1]), y[:1]) / mean(model(x[:1]), y[:1])).detach())  # terms of a datum
            close(summed, one * len(x) * each**2, 1e-10)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_trace_does_not_grow_with_positions(sharing: str, close: Close) -> None:
    """T identical positions and targets are one position: the mean loss is the same function of the parameters."""
    layer = nn.Linear(3, 2).double()
    x = torch.randn(4, 1, 3).double()
    one = filled(layer, nn.MSELoss(), [(x, None)], kind="exact", structure="kfac").dense()
    many = filled(layer, nn.MSELoss(), [(x.repeat(1, 7, 1), None)], kind="exact", structure="kfac").dense()
    close(many, one, 1e-10)


def test_factors_are_means_over_all_data(close: Close) -> None:
    c = case("ce")
    model, criterion, ((x, y),) = c.model(), c.criterion("mean"), c.batches((6,))
    whole = filled(model, criterion, [(x, y)], kind="exact")
    first, second = (filled(model, criterion, [(x[s], y[s])], kind="exact") for s in (slice(0, 2), slice(2, 6)))
    for name in whole.names:
        for total, a, b in zip(whole.factors(name), first.factors(name), second.factors(name)):
            close(total, (2 * a + 4 * b) / 6, 1e-10)


# data that mix or move inside the model -----------------------------------------------------------------------


class Mixing(nn.Module):
    """Data see one another ("mean", "neighbour"), or lie in another order or dimension inside."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.a, self.b, self.how = nn.Linear(3, 4).double(), nn.Linear(4, 3).double(), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "positions-first":  # (N, T, D) → (T, N, D) and back, summed over positions
            return self.b(self.a(x.transpose(0, 1)).tanh()).sum(0)
        h = self.a(x.flip(0) if self.how == "reversed" else x).tanh()
        if self.how == "mean":
            h = h - h.mean(0)
        if self.how == "neighbour":
            h = h + h.roll(1, 0)
        return self.b(h.flip(0) if self.how == "reversed" else h)


@pytest.mark.parametrize("structure", ["dense", "block", "diagonal"])
@pytest.mark.parametrize("how", ["mean", "neighbour", "reversed", "positions-first"])
@pytest.mark.parametrize("c", [case("ce"), case("mse")], ids=str)
def test_data_that_mix_or_move(how: str, structure: str, c: Case, close: Close) -> None:
    model, criterion = Mixing(how), c.criterion("mean")
    ((x, y),) = c.batches((4,))
    if how == "positions-first":
        x = torch.stack([x, x.sin(), x.cos()], 1)
    expected = oracle.gauss_newton(model, criterion, [(x, y)])
    metric = filled(model, criterion, [(x, y)], kind="exact", structure=structure)
    close(metric.dense(), expected_in(structure, expected, model), 1e-10)
    if how in ("reversed", "positions-first"):
        metric = filled(model, criterion, [(x, y)], kind="empirical", structure=structure)
        expected = oracle.empirical(model, criterion, [(x, y)])
        close(metric.dense(), expected_in(structure, expected, model), 1e-10)


# geometry ---------------------------------------------------------------------------------------------------


class Reparametrised(nn.Module):
    """The same functions in other linear coordinates of the first weight: W = A Z B."""

    def __init__(self, weight: Tensor, last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(9)
        rows, columns = weight.shape
        self.a = torch.randn(rows, rows).double() + 3 * torch.eye(rows).double()
        self.b = torch.randn(columns, columns).double() + 3 * torch.eye(columns).double()
        self.z = nn.Parameter(torch.linalg.solve(self.a, weight.detach()) @ torch.linalg.inv(self.b))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last((nn.functional.linear(x @ self.b.T, self.z) @ self.a.T).tanh())


@pytest.mark.parametrize("structure", ["dense", "kfac"])
def test_the_undamped_step_is_the_same_in_other_coordinates(structure: str, close: Close) -> None:
    """The step in function space, J ĝ⁻¹ df, is equal although the parameters' steps differ; for K-FAC too."""
    torch.manual_seed(10)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh(), nn.Linear(2, 2)).double()
    model[2].requires_grad_(False)
    twin = Reparametrised(model[0].weight, model[2])
    x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    close(twin(x).detach(), model(x).detach(), 1e-12)
    moves, steps = [], []
    for m in (model, twin):
        criterion = nn.MSELoss()
        criterion(m(x), y).backward()
        metric = filled(m, criterion, [(x, y)], kind="exact", structure=structure)
        theta, f = oracle.as_function(m)
        steps.append(metric.vector_to_flat(metric.sharp({n: p.grad for n, p in metric.parameters.items()}, 1e-14)))
        moves.append(torch.func.jacrev(f)(theta, x) @ steps[-1])
    close(moves[1], moves[0], 1e-9)
    assert oracle.relative_error(steps[1], steps[0]) > 0.1


# names, order, parameters ------------------------------------------------------------------------------------


class OutOfOrder(nn.Module):
    """Registers layers in another order than it uses them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.last, self.first = nn.Linear(4, 2).double(), nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_names_and_dense_follow_named_parameters(structure: str, close: Close) -> None:
    model, data = OutOfOrder(), [(torch.randn(4, 3).double(), torch.randint(2, (4,)))]
    metric = filled(model, nn.CrossEntropyLoss(), data, kind="exact", structure=structure)
    assert metric.names == [n for n, _ in model.named_parameters()]
    if structure != "kfac":
        expected = expected_in(structure, oracle.gauss_newton(model, nn.CrossEntropyLoss(), data), model)
        close(metric.dense(), expected, 1e-10)


def test_params_selects_by_name_and_pattern(close: Close) -> None:
    c = case("ce")
    model, criterion, batches = c.model(), c.criterion("mean"), c.batches(UNEQUAL)
    whole = oracle.gauss_newton(model, criterion, batches)
    metric = filled(model, criterion, batches, kind="exact", structure="dense", params="2.*")
    assert metric.names == ["2.weight", "2.bias"]
    close(metric.dense(), whole[16:, 16:], 1e-10)
    metric = filled(model, criterion, batches, kind="exact", structure="dense", params=["0.weight", "2.bias"])
    assert metric.names == ["0.weight", "2.bias"]
    keep = torch.tensor([*range(12), *range(28, 31)])
    close(metric.dense(), whole[keep[:, None], keep], 1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_frozen_parameters_are_left_out(structure: str, close: Close) -> None:
    c = case("ce")
    model, criterion, batches = c.model(), c.criterion("mean"), c.batches(UNEQUAL)
    model[0].weight.requires_grad_(False)
    metric = filled(model, criterion, batches, kind="exact", structure=structure)
    assert metric.names == ["0.bias", "2.weight", "2.bias"]
    if structure != "kfac":
        close(metric.dense(), expected_in(structure, oracle.gauss_newton(model, criterion, batches), model), 1e-10)
    df = vector_like(metric)
    dense = metric.dense()
    expected = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense)).double(), metric.vector_to_flat(df))
    close(metric.vector_to_flat(metric.sharp(df, 0.1)), expected, 1e-8)


class Branching(nn.Module):
    """Uses a layer for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.always, self.sometimes, self.never = (nn.Linear(2, 2).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.always(x)
        return self.sometimes(h.tanh()) if len(x) > 2 else h


@pytest.mark.parametrize("order", [(2, 3), (3, 2), (2, 3, 1, 4)], ids=str)
@pytest.mark.parametrize("structure", ["dense", "block", "diagonal"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_layers_used_by_some_batches_only(order: tuple[int, ...], structure: str, reduction: str, close: Close) -> None:
    model, criterion = Branching(), nn.MSELoss(reduction=reduction)
    data = [(torch.randn(n, 2).double(), torch.randn(n, 2).double()) for n in order]
    each = [oracle.gauss_newton(model, nn.MSELoss(reduction="sum"), [b]) for b in data]
    expected = torch.stack(each).sum(0) / (2 * sum(order) if reduction == "mean" else 1)
    metric = filled(model, criterion, data, kind="exact", structure=structure)
    close(metric.dense(), expected_in(structure, expected, model), 1e-10)
    assert metric.coverage()["never.weight"].block == "not seen"
    assert float(metric.diagonal()["never.weight"].abs().max()) == 0


@pytest.mark.parametrize("order", [(2, 3), (3, 2)], ids=str)
def test_kfac_layers_used_by_some_batches_only(order: tuple[int, ...], close: Close) -> None:
    model = Branching()
    data = [(torch.randn(n, 2).double(), torch.randn(n, 2).double()) for n in order]
    metric = filled(model, nn.MSELoss(), data, kind="exact", structure="kfac")
    (x,) = (x for x, _ in data if len(x) == 3)
    h = torch.cat([model.always(x).tanh(), torch.ones(3, 1).double()], 1).detach()
    u, v = metric.factors("sometimes.weight")
    close(u, 2 * 3 * torch.eye(2).double() / (2 * 5), 1e-10)  # Σ over 3 data of H = 2I, over all 5·2 terms
    close(v, h.mT @ h / 3, 1e-10)


def test_reset_forgets(close: Close) -> None:
    c = case("mse")
    for structure in STRUCTURES:
        model, batches = c.model(), c.batches((3, 4))
        metric = filled(model, nn.MSELoss(), batches[:1], kind="exact", structure=structure)
        metric.reset()
        assert metric.seen == 0
        metric.update(*batches[1])
        close(
            metric.dense(), filled(model, nn.MSELoss(), batches[1:], kind="exact", structure=structure).dense(), 1e-12
        )


def test_reset_then_a_batch_that_leaves_a_layer_out(close: Close) -> None:
    for structure in STRUCTURES:
        model = Branching()
        long, short = torch.randn(3, 2).double(), torch.randn(2, 2).double()
        metric = filled(model, nn.MSELoss(), [(long, None)], kind="exact", structure=structure)
        metric.reset()
        metric.update(short)
        close(
            metric.dense(),
            filled(model, nn.MSELoss(), [(short, None)], kind="exact", structure=structure).dense(),
            1e-12,
        )


def test_fit_takes_a_loader(close: Close) -> None:
    c = case("ce")
    model, criterion, batches = c.model(), c.criterion("mean"), c.batches(UNEQUAL)
    metric = ng.Fisher(model, criterion, kind="exact", structure="dense")
    assert metric.fit(batches, progress=False) is metric
    assert metric.seen == sum(UNEQUAL)
    close(metric.dense(), oracle.gauss_newton(model, criterion, batches), 1e-10)
    metric = ng.Fisher(model, criterion, kind="exact", structure="dense").fit(iter(batches), progress=True)
    close(metric.dense(), oracle.gauss_newton(model, criterion, batches), 1e-10)
    inputs_only = ng.Fisher(model, criterion, kind="exact", structure="dense").fit(
        [x for x, _ in batches], progress=False
    )
    close(inputs_only.dense(), oracle.gauss_newton(model, criterion, batches), 1e-10)


# keeping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [*STRUCTURES, "mixed"])
@pytest.mark.parametrize("way", ["state_dict", "torch.save", "file"])
def test_saved_statistics_come_back_and_go_on(structure: str, way: str, tmp_path: Any) -> None:
    c = case("ce-weight-smoothing")
    option: Any = {"0.*": "dense", "2.weight": "kfac"} if structure == "mixed" else structure
    model, criterion, batches = c.model(), c.criterion("mean"), c.batches(UNEQUAL)
    metric = filled(model, criterion, batches[:2], structure=option)
    twin = ng.Fisher(c.model(), criterion, structure=option, seed=5)
    if way == "file":
        metric.save(tmp_path / "metric.safetensors")
        assert [f.name for f in tmp_path.iterdir()] == ["metric.safetensors"]
        twin.load(tmp_path / "metric.safetensors")
    elif way == "torch.save":
        torch.save(metric.state_dict(), tmp_path / "metric.pt")
        twin.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    else:
        twin.load_state_dict(metric.state_dict())
    assert torch.equal(twin.dense(), metric.dense())
    assert twin.seen == metric.seen
    for m in (metric, twin):  # the labels drawn next are the same ones
        m.update(*batches[2])
    assert torch.equal(twin.dense(), metric.dense())
    df = vector_like(metric)
    assert torch.equal(twin.vector_to_flat(twin.sharp(df, 0.1)), metric.vector_to_flat(metric.sharp(df, 0.1)))
    assert str(twin.coverage()) == str(metric.coverage())


def test_a_grouped_convolution_survives_saving(tmp_path: Any) -> None:
    model = ConvNet(CONVOLUTIONS["depthwise-all"], True)
    data = [(torch.randn(2, 4, 5, 6).double(), torch.randint(3, (2,)))]
    metric = filled(model, nn.CrossEntropyLoss(), data, kind="exact")
    metric.save(tmp_path / "m.safetensors")
    twin = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact")
    twin.load(tmp_path / "m.safetensors")
    assert torch.equal(twin.dense(), metric.dense())
    twin.update(*data[0])
    assert torch.allclose(twin.dense(), metric.dense(), rtol=1e-12)


def test_coverage_prints_a_table() -> None:
    c = case("ce")
    metric = filled(c.model(), c.criterion("mean"), c.batches(ONE), structure="kfac")
    text = str(metric.coverage())
    for word in ("0.weight", "0.bias", "linear", "kfac", "4² ⊗ 4²"):
        assert word in text
    assert [row.parameter for row in metric.coverage()] == metric.names
