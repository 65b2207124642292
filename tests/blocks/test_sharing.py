"""Weight sharing, layers called several times, tied weights and parametrizations; where K-FAC and EKFAC are exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import natgrad as ng
from natgrad.capture.tape import CaptureError
from tests.layer_oracle import block_mask, gauss_newton, relative
from tests.op_cases import Act, p

EXACT = 1e-9


def data(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def fisher(model, x, y, loss=None, **options):
    options = {"kind": "exact", **options}
    found = ng.Fisher(model, loss or nn.CrossEntropyLoss(), **options)
    found.update(x, y)
    return found


def errors(model, x, y, loss, groups=None, **options):
    """Errors of K-FAC and EKFAC against the blocks of the dense oracle."""
    expected = gauss_newton(model, loss, x, y) * block_mask(model, groups or {})
    return tuple(
        relative(fisher(model, x, y, loss, structure=s, **options).dense(), expected) for s in ("kfac", "ekfac")
    )


EXACT_CASES = {
    "deep linear, squared": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)),
        lambda: (data(6, 4), data(6, 2), nn.MSELoss()),
        "expand",
    ),
    "deep linear, squared sum": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 2)),
        lambda: (data(6, 4), data(6, 2), nn.MSELoss(reduction="sum")),
        "expand",
    ),
    "one datum, cross-entropy": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda: (data(1, 4), torch.tensor([1]), nn.CrossEntropyLoss()),
        "expand",
    ),
    "identical inputs": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda: (data(1, 4).expand(5, 4).contiguous(), torch.tensor([1, 0, 2, 1, 1]), nn.CrossEntropyLoss()),
        "expand",
    ),
    "positions, a target each": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
        lambda: (data(3, 2, 4, 3), data(3, 2, 4, 2), nn.MSELoss()),
        "expand",
    ),
    "positions, pooled": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), Act(lambda m, x: x.mean((1, 2)))),
        lambda: (data(5, 4, 8, 3), data(5, 2), nn.MSELoss()),
        "reduce",
    ),
    "first convolution, then positions": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1)),
        lambda: (data(3, 2, 4, 4), data(3, 2, 2, 2), nn.MSELoss()),
        "expand",
    ),
    "1x1 convolutions, pooled": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.Conv1d(3, 2, 1), Act(lambda m, x: x.mean(2))),
        lambda: (data(5, 2, 7), data(5, 2), nn.MSELoss()),
        "reduce",
    ),
    "transposed convolution, positions": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3, stride=2, bias=False)),
        lambda: (data(3, 2, 3), data(3, 3, 7), nn.MSELoss()),
        "expand",
    ),
    "embedding, squared": (
        lambda: nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2)),
        lambda: (torch.randint(0, 7, (5, 4)), data(5, 4, 2), nn.MSELoss()),
        "expand",
    ),
}


@pytest.mark.parametrize("name", EXACT_CASES)
def test_kfac_and_ekfac_are_exact(name):
    build, batch, sharing = EXACT_CASES[name]
    model = build().double()
    x, y, loss = batch()
    kfac, ekfac = errors(model, x, y, loss, sharing=sharing)
    assert kfac < EXACT
    assert ekfac < EXACT


def test_several_batches_are_all_the_data_together():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y, loss = data(9, 4), torch.randint(0, 3, (9,)), nn.CrossEntropyLoss()
    for structure in ("block", "kfac", "input", "diagonal"):
        parts = ng.Fisher(model, loss, kind="exact", structure=structure)
        parts.update(x[:2], y[:2])
        parts.update(x[2:], y[2:])
        assert relative(parts.dense(), fisher(model, x, y, loss, structure=structure).dense()) < EXACT


def test_ekfac_of_two_batches_keeps_the_trace_and_nears_the_block():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y, loss = data(40, 4), torch.randint(0, 3, (40,)), nn.CrossEntropyLoss()
    expected = fisher(model, x, y, loss, structure="block").dense()
    parts = ng.Fisher(model, loss, kind="exact", structure="ekfac")
    parts.update(x[:20], y[:20])
    parts.update(x[20:], y[20:])
    assert torch.isclose(parts.trace(), expected.trace())
    kfac = fisher(model, x, y, loss, structure="kfac").dense()
    assert relative(parts.dense(), expected) < relative(kfac, expected)


def test_ekfac_of_exact_batches_is_exact_however_the_basis_moves():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).double()
    x, y, loss = data(12, 4), data(12, 2), nn.MSELoss()
    parts = ng.Fisher(model, loss, kind="exact", structure="ekfac")
    for _ in range(3):
        parts.update(x, y)
    assert relative(parts.dense(), fisher(model, x, y, loss, structure="block").dense()) < EXACT


def test_fit_is_the_same_as_updates(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y, loss = data(8, 4), torch.randint(0, 3, (8,)), nn.CrossEntropyLoss()
    found = fisher(model, x, y, loss, structure="ekfac")
    found.save(tmp_path / "metric.safetensors")
    again = ng.Fisher(model, loss, kind="exact", structure="ekfac")
    again.load(tmp_path / "metric.safetensors")
    assert torch.equal(again.dense(), found.dense())
    found.update(x, y)
    again.update(x, y)
    assert torch.equal(again.dense(), found.dense())


SHARED = {
    "called twice": lambda: Act(
        lambda m, x: m.head(m.a(m.a(x).tanh()).tanh()), a=nn.Linear(4, 4), head=nn.Linear(4, 3)
    ),
    "called twice, biased once": lambda: Act(
        lambda m, x: m.head(F.linear(m.a(x).tanh(), m.a.weight).tanh()), a=nn.Linear(4, 4), head=nn.Linear(4, 3)
    ),
    "called twice, biased second": lambda: Act(
        lambda m, x: m.head(m.a(F.linear(x, m.a.weight).tanh()).tanh()), a=nn.Linear(4, 4), head=nn.Linear(4, 3)
    ),
    "transposed": lambda: Act(
        lambda m, x: m.head(F.linear(m.a(x).tanh(), m.a.weight.T).tanh()), a=nn.Linear(4, 5), head=nn.Linear(4, 3)
    ),
    "siamese": lambda: Act(lambda m, x: m.head(m.a(x).tanh() * m.a(x.cos())), a=nn.Linear(4, 5), head=nn.Linear(5, 3)),
    "rows of one weight": lambda: Act(
        lambda m, x: m.head(F.linear(F.linear(x, m.w[:4]).tanh(), m.w[4:]).tanh()), w=p(9, 4), head=nn.Linear(5, 3)
    ),
    "scale used twice": lambda: Act(lambda m, x: m.head(m.s * (m.s * x).tanh()), s=p(4), head=nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_weights(name):
    model = SHARED[name]().double()
    x, y, loss = data(5, 4), torch.randint(0, 3, (5,)), nn.CrossEntropyLoss()
    expected = gauss_newton(model, loss, x, y)
    assert relative(fisher(model, x, y, loss, structure="dense").dense(), expected) < EXACT
    block = fisher(model, x, y, loss, structure="block")
    ekfac = fisher(model, x, y, loss, structure="ekfac")
    kfac = fisher(model, x, y, loss, structure="kfac")
    assert torch.isclose(ekfac.trace(), expected.trace())
    assert relative(ekfac.dense(), block.dense()) < relative(kfac.dense(), block.dense())


class Tied(nn.Module):
    def __init__(self, vocab: int, transposed: bool, bias: bool, head_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, vocab, bias=bias)
        self.head.weight = self.embed.weight
        self.transposed = transposed

    def forward(self, ids):
        h = self.body(self.embed(ids)).tanh()
        out = h @ self.embed.weight.T if self.transposed else self.head(h)
        return out.flatten(0, 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_tied_embedding_and_head(transposed, bias):
    model = Tied(6, transposed, bias).double()
    if transposed:
        model.head.bias = None
    ids, y, loss = torch.randint(0, 6, (4, 3)), torch.randint(0, 6, (12,)), nn.CrossEntropyLoss()
    expected = gauss_newton(model, loss, ids, y)
    assert relative(fisher(model, ids, y, loss, structure="dense").dense(), expected) < EXACT
    assert relative(fisher(model, ids, y, loss, structure="diagonal").dense().diagonal(), expected.diagonal()) < EXACT
    kfac, ekfac = (fisher(model, ids, y, loss, structure=s) for s in ("kfac", "ekfac"))
    block = fisher(model, ids, y, loss, structure="block").dense()
    assert torch.isclose(ekfac.trace(), expected.trace())
    assert relative(ekfac.dense(), block) < relative(kfac.dense(), block) < 1


def test_large_sides_become_diagonal(monkeypatch):
    monkeypatch.setattr("natgrad.blocks.kronecker.FULL_FACTOR_DIM", 4)
    model = Tied(6, False, False).double()
    ids, y, loss = torch.randint(0, 6, (4, 3)), torch.randint(0, 6, (12,)), nn.CrossEntropyLoss()
    found = fisher(model, ids, y, loss, structure="kfac")
    assert found.coverage()["embed.weight"].sizes == "3² ⊗ diag 6"
    dense = found.dense()
    v = {n: torch.randn_like(t) for n, t in found.parameters.items()}
    solved = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype), found.vector_to_flat(v))
    assert relative(found.vector_to_flat(found.sharp(v, 0.1)), solved) < 1e-8


def test_embedding_never_forms_the_vocabulary_square():
    model = nn.Sequential(nn.Embedding(200_000, 2), nn.Flatten(), nn.Linear(6, 3))
    x, y = torch.randint(0, 200_000, (4, 3)), torch.tensor([0, 1, 2, 0])
    for structure in ("kfac", "ekfac", "input"):
        found = ng.Fisher(model, nn.CrossEntropyLoss(), structure=structure)
        found.update(x, y)
        assert found.coverage()["0.weight"].memory < 10_000_000


@pytest.mark.parametrize("sharing", ["expand", "reduce", {"0.*": "reduce", "*": "expand"}])
def test_sharing_by_pattern(sharing):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), Act(lambda m, x: x.mean(1))).double()
    x, y, loss = data(5, 4, 3), data(5, 2), nn.MSELoss()
    found = fisher(model, x, y, loss, structure="kfac", sharing=sharing)
    v = found.factors("0.weight")[1]
    a = torch.cat([x, torch.ones(5, 4, 1, dtype=x.dtype)], 2)
    rows = a.reshape(-1, 4) if sharing == "expand" else a.mean(1)
    assert torch.allclose(v, rows.T @ rows / len(rows))


LORA = Act(
    lambda m, x: m.head((F.linear(x, m.w) + x @ m.a @ m.b).tanh()),
    w=p(4, 4),
    a=p(4, 2),
    b=p(2, 4),
    head=nn.Linear(4, 3),
)
MERGED = Act(
    lambda m, x: m.head(F.linear(x, m.w + m.a @ m.b).tanh()), w=p(4, 4), a=p(4, 2), b=p(2, 4), head=nn.Linear(4, 3)
)
PARAMETRIZED = {
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)
    ).eval(),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "lora": lambda: LORA,
    "lora merged": lambda: MERGED,
    "masked": lambda: Act(
        lambda m, x: m.head(F.linear(x, m.w * m.w.detach().sign()).tanh()), w=p(4, 4), head=nn.Linear(4, 3)
    ),
    "scaled": lambda: Act(lambda m, x: m.head(F.linear(x, 2 * m.w).tanh()), w=p(4, 4), head=nn.Linear(4, 3)),
    "scalar times weight": lambda: Act(
        lambda m, x: m.head(F.linear(x, m.s * m.w.detach()).tanh()), s=p(), w=p(5, 4), head=nn.Linear(5, 3)
    ),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_parametrizations(name, structure):
    model = PARAMETRIZED[name]().double()
    if name == "scalar times weight":
        model.w.requires_grad_(False)
    x, y, loss = data(5, 4), torch.randint(0, 3, (5,)), nn.CrossEntropyLoss()
    expected = gauss_newton(model, loss, x, y)
    found = fisher(model, x, y, loss, structure=structure).dense()
    if structure == "diagonal":
        found, expected = found.diagonal(), expected.diagonal()
    assert relative(found, expected) < EXACT


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("w", Act(lambda m, x: F.linear(x, m.w) * m.w.norm(), w=p(3, 4))),
        ("w", Act(lambda m, x: F.linear(x, m.w) + m.w.sum(), w=p(3, 4))),
        ("w", Act(lambda m, x: F.linear(x[:, :3], m.w[:, 0]) * F.conv1d(x[:, None], m.w).mean(2), w=p(2, 1, 3))),
    ],
)
def test_uses_that_fit_no_block_are_refused_by_name(name, model):
    with pytest.raises(CaptureError, match=f"'?{name}"):
        fisher(model.double(), data(4, 4), torch.randint(0, 2, (4,)))


def test_a_layer_first_used_late_counts_the_data_before():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x) + self.b(x) if bool(x[0, 0] > 0) else self.a(x)

    model, loss = Switch().double(), nn.MSELoss()
    x1, x2, y = -data(4, 4).abs(), data(6, 4).abs(), data(6, 3)
    for structure in ("dense", "block", "kfac", "ekfac"):
        found = ng.Fisher(model, loss, kind="exact", structure=structure)
        found.update(x1, y[:4])
        found.update(x2, y)
        only = gauss_newton(model.b, loss, x2, y) * 6 / 10
        n = sum(t.numel() for t in model.a.parameters())
        assert relative(found.dense()[n:, n:], only) < EXACT
