"""Layers called on some of the rows, or on none; experts whose matrices are one parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.capture.tape import CaptureError
from tests.cases import KINDS
from tests.layer_oracle import empirical, gauss_newton, relative
from tests.op_cases import Act, p

EXACT = 1e-9
EXPERTS, D = 3, 4
STRUCTURES = ("dense", "block", "diagonal", "kfac", "ekfac", "input")


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def expert_of(x):
    return (10 * x[:, 0].abs()).long() % EXPERTS


def fisher(model, x, y, loss=None, **options):
    metric = ng.Fisher(model, loss or nn.CrossEntropyLoss(), **{"kind": "exact", **options})
    metric.update(x, y)
    return metric


# no rows ---------------------------------------------------------------------------------------------------------


def lists(make):
    return nn.ModuleList([make() for _ in range(EXPERTS)])


def routed(call, **parts):
    """Rows go to an expert each; `empty` says whether one without rows is called. The last never gets any."""

    def run(m, x):
        k = expert_of(x).clamp(max=EXPERTS - 2)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            rows = (k == e).nonzero().squeeze(1)
            if m.empty or len(rows):
                out = out.index_add(0, rows, call(m, x[rows], e))
        return m.head(out.tanh())

    return lambda: Act(run, head=nn.Linear(D, 3), empty=True, **{n: part() for n, part in parts.items()}).double()


EMPTY = {
    "linear": routed(lambda m, x, e: m.e[e](x), e=lambda: lists(lambda: nn.Linear(D, D))),
    "two linear": routed(
        lambda m, x, e: m.e[e](x), e=lambda: lists(lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D)))
    ),
    "bilinear": routed(lambda m, x, e: m.e[e](x, x), e=lambda: lists(lambda: nn.Bilinear(D, D, D))),
    "convolution": routed(
        lambda m, x, e: m.e[e](x[:, None])[:, 0], e=lambda: lists(lambda: nn.Conv1d(1, 1, 3, padding=1))
    ),
    "transposed convolution": routed(
        lambda m, x, e: m.e[e](x[:, None])[:, 0, :D], e=lambda: lists(lambda: nn.ConvTranspose1d(1, 1, 2))
    ),
    "embedding": routed(lambda m, x, e: m.e[e]((x[:, 1] > 0).long()), e=lambda: lists(lambda: nn.Embedding(2, D))),
    "bag": routed(lambda m, x, e: m.e[e]((x > 0).long()), e=lambda: lists(lambda: nn.EmbeddingBag(2, D, mode="sum"))),
    "layer norm": routed(lambda m, x, e: m.e[e](x), e=lambda: lists(lambda: nn.LayerNorm(D))),
    "group norm": routed(lambda m, x, e: m.e[e](x), e=lambda: lists(lambda: nn.GroupNorm(2, D))),
    "attention": routed(
        lambda m, x, e: m.e[e](x[:, None], x[:, None], x[:, None])[0][:, 0],
        e=lambda: lists(lambda: nn.MultiheadAttention(D, 2, batch_first=True)),
    ),
    "gru": routed(lambda m, x, e: m.e[e](x[:, None])[0][:, 0], e=lambda: lists(lambda: nn.GRU(D, D, batch_first=True))),
    "scale and offset": routed(lambda m, x, e: x * m.s[e] + m.b[e], s=lambda: p(EXPERTS, D), b=lambda: p(EXPERTS, D)),
    "product": routed(lambda m, x, e: x @ m.w[e], w=lambda: p(EXPERTS, D, D)),
    "no rule": routed(lambda m, x, e: torch.addcmul(x, m.e[e].s, x), e=lambda: lists(lambda: Act(None, s=p(D)))),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_call_on_no_rows_adds_nothing(name):
    model, x, y = EMPTY[name](), data(7, D), torch.arange(7) % 3
    skips = copy.deepcopy(model)
    skips.empty = False
    for kind in KINDS:
        for structure in STRUCTURES:
            found, same = (fisher(m, x, y, kind=kind, structure=structure) for m in (model, skips))
            assert torch.equal(found.dense(), same.dense()), (kind, structure)
    assert (
        relative(fisher(model, x, y, structure="dense").dense(), gauss_newton(model, nn.CrossEntropyLoss(), x, y))
        < EXACT
    )


def trained(model, structure, kind, steps=10):
    """The weights after steps on batches of 8, 7 and 6 data."""
    loss = nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, loss, kind=kind, structure=structure), refresh=2)
    generator = torch.Generator().manual_seed(5)
    for t in range(steps):
        n = 8 - t % 3
        x = torch.randn(n, D, dtype=torch.float64, generator=generator)
        opt.zero_grad(
            set_to_none=False
        )  # an expert that is not called has a gradient, of zero, like one called in vain
        for q in model.parameters():
            q.grad = torch.zeros_like(q) if q.grad is None else q.grad
        loss(model(x), torch.arange(n) % 3).backward()
        opt.step()
    return [q.detach() for q in model.parameters()], opt.metric


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "convolution", "gru", "scale and offset", "product"])
def test_training_with_calls_on_no_rows_is_training_without_them(name, kind):
    for structure in ("kfac", "ekfac", "block", "diagonal", "dense"):
        model = EMPTY[name]()
        skips = copy.deepcopy(model)
        skips.empty = False
        found, same = (trained(m, structure, kind)[0] for m in (model, skips))
        assert all(torch.equal(a, b) for a, b in zip(found, same)), structure


# any number of rows ----------------------------------------------------------------------------------------------


def some(m, x):
    """A scale and an offset on the rows that a mask picks."""
    mask = x[:, 0] > 0
    h = (m.first(x)[mask] * m.s + m.b).tanh()
    return m.head(torch.zeros_like(x).index_put((mask.nonzero().squeeze(1),), h))


ROWS = {
    "masked": lambda: Act(some, first=nn.Linear(D, D), s=p(D), b=p(D), head=nn.Linear(D, 3)),
    "scalar": lambda: Act(
        lambda m, x: m.head(m.s * m.first(x)[1:].cumsum(0).sum(0) + m.b * x),
        first=nn.Linear(D, D),
        s=p(),
        b=p(),
        head=nn.Linear(D, 3),
    ),
    "repeated": lambda: Act(
        lambda m, x: m.head((torch.cat([x, x[:1]]).matmul(m.w)[:-1] * m.s).tanh()),
        w=p(D, D),
        s=p(1, D),
        head=nn.Linear(D, 3),
    ),
    "stack of one": lambda: Act(
        lambda m, x: m.head((x[:, None] @ m.w).squeeze(1).tanh()), w=p(1, D, D), head=nn.Linear(D, 3)
    ),
    "einsum over ones": lambda: Act(
        lambda m, x: m.head(torch.einsum("ni,nio->no", x, m.w.expand(len(x), -1, -1) if len(x) > 9 else m.w).tanh()),
        w=p(1, D, D),
        head=nn.Linear(D, 3),
    ),
}


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "dense"])
@pytest.mark.parametrize("name", ["masked", "repeated", "stack of one"])
def test_coverage_does_not_depend_on_the_number_of_rows(name, structure):
    torch.manual_seed(1)
    for sizes in ((7, 7), (8, 7), (4, 1, 5), (1, 6), (12, 3)):
        model, loss = ROWS[name]().double(), nn.CrossEntropyLoss()
        metric = ng.Fisher(model, loss, structure=structure)
        opt = ng.NaturalGradient(metric, refresh=1)
        for n in sizes:
            x = data(n, D)
            x[:, 0] = 1  # at least the last
            x[1:, 0] = data(n - 1)
            opt.zero_grad()
            loss(model(x), torch.arange(n) % 3).backward()
            opt.step()
        assert all(row.block == structure and not row.why for row in metric.coverage()), str(metric.coverage())


@pytest.mark.parametrize("n", [1, 2, 5, 7])
@pytest.mark.parametrize("name", ROWS)
def test_any_number_of_rows_meets_the_oracle(name, n):
    model, x, y, loss = ROWS[name]().double(), data(n, D), torch.arange(n) % 3, nn.CrossEntropyLoss()
    expected = gauss_newton(model, loss, x, y)
    assert relative(fisher(model, x, y, structure="dense").dense(), expected) < EXACT
    assert relative(fisher(model, x, y, structure="diagonal").dense().diagonal(), expected.diagonal()) < EXACT


# experts in one parameter ------------------------------------------------------------------------------------------


def grouped(m, x):
    k, order = expert_of(x).sort()
    ends = torch.bincount(k, minlength=EXPERTS).cumsum(0).to(torch.int32)
    out = F.grouped_mm(x[order].float(), m.w.float(), offs=ends).double()
    return torch.zeros_like(out).index_copy(0, order, out)


def each(call):
    """Σ over experts of what `call(m, rows, expert)` makes of the rows that are theirs."""

    def run(m, x):
        k, out = expert_of(x), torch.zeros_like(x)
        for e in range(EXPERTS):
            rows = (k == e).nonzero().squeeze(1)
            out = out.index_add(0, rows, call(m, x[rows], e))
        return out

    return run


def top_two(x):
    return torch.stack([expert_of(x), (expert_of(x) + 1) % EXPERTS], 1)


PATHS = {
    "select": each(lambda m, x, e: x @ m.w[e]),
    "select by a tensor": each(lambda m, x, e: x @ m.w[torch.tensor(e)]),
    "select, transposed": each(lambda m, x, e: x @ m.w[e].T),
    "linear": each(lambda m, x, e: F.linear(x, m.w[e])),
    "linear with a bias": each(lambda m, x, e: F.linear(x, m.w[e], m.b[e])),
    "addmm": each(lambda m, x, e: torch.addmm(m.b[e], x, m.w[e])),
    "plus a bias": each(lambda m, x, e: x @ m.w[e] + m.b[e]),
    "unbind": each(lambda m, x, e: x @ m.w.unbind()[e]),
    "chunk": each(lambda m, x, e: x @ m.w.chunk(EXPERTS)[e].squeeze(0)),
    "chunk, batched": each(lambda m, x, e: torch.bmm(x[None], m.w.chunk(EXPERTS)[e])[0]),
    "split of a transpose": each(lambda m, x, e: x @ m.w.mT.split(1)[e][0]),
    "einsum of one": each(lambda m, x, e: torch.einsum("ni,io->no", x, m.w[e])),
    "experts second": each(lambda m, x, e: x @ m.w[:, e]),
    "experts last": each(lambda m, x, e: x @ m.w[..., e]),
    "bmm": lambda m, x: torch.bmm(x.expand(EXPERTS, -1, -1), m.w).sum(0),
    "baddbmm": lambda m, x: torch.baddbmm(m.b[:, None], x.expand(EXPERTS, -1, -1), m.w).sum(0),
    "matmul": lambda m, x: (x @ m.w).sum(0),
    "einsum": lambda m, x: torch.einsum("eni,eio->eno", x.expand(EXPERTS, -1, -1), m.w).sum(0),
    "einsum, rows first": lambda m, x: torch.einsum("nei,eio->neo", x[:, None].expand(-1, EXPERTS, -1), m.w).sum(1),
    "picked": lambda m, x: torch.bmm(x[:, None], m.w[expert_of(x)])[:, 0] + m.b[expert_of(x)],
    "picked, left": lambda m, x: (m.w[expert_of(x)] @ x[..., None])[..., 0].mul_(m.b[expert_of(x)]),
    "picked by index_select": lambda m, x: torch.einsum(
        "ni,nio->no", x, m.w.index_select(0, expert_of(x) - EXPERTS + EXPERTS)
    ),
    "picked twice": lambda m, x: torch.einsum("ni,nkio->nko", x, m.w[top_two(x)]).sum(1),
}
USES_BIAS = {"linear with a bias", "addmm", "plus a bias", "baddbmm", "picked", "picked, left"}
AXIS = {"experts second": 1, "experts last": 2}  # of the experts in w, where it is not 0


def expert_model(name):
    shape = [D, D]
    shape.insert(AXIS.get(name, 0), EXPERTS)
    parts = {"b": p(EXPERTS, D)} if name in USES_BIAS else {}
    return Act(lambda m, x: m.head(PATHS[name](m, x)), w=p(*shape), head=nn.Linear(D, 2), **parts).double()


def blocks_of_experts(model, name, matrix):
    """The part of a matrix over (w, …) that each expert's entries of w have."""
    index = torch.arange(model.w.numel()).view_as(model.w).movedim(AXIS.get(name, 0), 0).flatten(1)
    return [matrix[i[:, None], i] for i in index]


@pytest.mark.parametrize("name", PATHS)
def test_experts_meet_the_oracle_in_every_kind_and_structure(name):
    model = expert_model(name)
    x, y, loss = data(7, D), data(7, 2), nn.MSELoss()
    full = gauss_newton(model, loss, x, y)
    for structure in ("dense", "diagonal", "block", "ekfac", "kfac"):
        metric = fisher(model, x, y, loss, structure=structure)
        assert all(not row.why for row in metric.coverage()), str(metric.coverage())
        if structure == "dense":
            assert relative(metric.dense(), full) < EXACT
        if structure == "diagonal":
            assert relative(metric.dense().diagonal(), full.diagonal()) < EXACT
        if structure == "ekfac":
            assert torch.isclose(metric.trace(), full.trace(), rtol=1e-9)
    metric = fisher(model, x, y, loss, structure="dense", kind="empirical")
    assert relative(metric.dense(), empirical(model, loss, x, y, 7)) < EXACT


ONE_ROUTE = [n for n in PATHS if "twice" not in n and n != "picked, left"]


@pytest.mark.parametrize("driven", [False, True], ids=["update", "training"])
@pytest.mark.parametrize("name", ONE_ROUTE)
def test_each_expert_has_its_own_kronecker_block(name, driven):
    """Linear experts and a squared loss: K-FAC is exact for the rows of each."""
    model = expert_model(name)
    x, y, loss = data(7, D), data(7, 2), nn.MSELoss()
    expected = blocks_of_experts(model, name, gauss_newton(model, loss, x, y))
    for structure in ("kfac", "ekfac"):
        if driven:
            net = copy.deepcopy(model)
            metric = ng.Fisher(net, loss, kind="exact", structure=structure)
            opt = ng.NaturalGradient(metric)
            loss(net(x), y).backward()
            metric.advance(0.0)
            del opt
        else:
            metric = fisher(model, x, y, loss, structure=structure)
        assert f"× {EXPERTS}" in metric.coverage()["w"].sizes
        found = blocks_of_experts(model, name, metric.dense())
        assert all(relative(a, b) < EXACT for a, b in zip(found, expected))


def test_grouped_mm_is_the_product_of_each_group():
    model = Act(lambda m, x: m.head(grouped(m, x)), w=p(EXPERTS, D, D), head=nn.Linear(D, 2)).double()
    plain = Act(lambda m, x: m.head(each(lambda m, x, e: x @ m.w[e])(m, x)), w=model.w, head=model.head)
    x, y, loss = data(7, D), data(7, 2), nn.MSELoss()
    for structure in ("dense", "kfac", "ekfac", "diagonal"):
        found, same = (fisher(m, x, y, loss, structure=structure) for m in (model, plain))
        assert found.coverage()["w"].op == "grouped_mm"
        assert relative(found.dense(), same.dense()) < 1e-6  # single precision inside


def test_the_two_ways_of_an_expert_share_a_block():
    """Batched products in one batch, one expert at a time in the next."""

    def run(m, x):
        if len(x) > 5:
            return m.head(torch.bmm(x[:, None], m.w[expert_of(x)])[:, 0])
        return m.head(PATHS["select"](m, x))

    model = Act(run, w=p(EXPERTS, D, D), head=nn.Linear(D, 2)).double()
    x, y, loss = data(9, D), data(9, 2), nn.MSELoss()
    parts = ng.Fisher(model, loss, kind="exact", structure="kfac")
    parts.update(x[:6], y[:6])
    parts.update(x[6:], y[6:])
    same = fisher(model, x, y, loss, structure="kfac")
    assert relative(parts.dense(), same.dense()) < EXACT


def test_pieces_of_an_expert_have_blocks_of_their_own():
    model = Act(
        lambda m, x: m.head(each(lambda m, x, e: (x @ m.w[e].chunk(2, 1)[0]) * (x @ m.w[e, :, D:]))(m, x)),
        w=p(EXPERTS, D, 2 * D),
        head=nn.Linear(D, 2),
    ).double()
    x, y, loss = data(7, D), data(7, 2), nn.MSELoss()
    assert relative(fisher(model, x, y, loss, structure="dense").dense(), gauss_newton(model, loss, x, y)) < EXACT
    row = fisher(model, x, y, loss, structure="kfac").coverage()["w"]
    assert row.sizes == f"{D}² ⊗ {D}² × {EXPERTS}, {D}² ⊗ {D}² × {EXPERTS}"
    assert trained(model_with(model, 3), "kfac", "sampled")[1].coverage()["w"].why == ""


def model_with(model, classes):
    model.head = nn.Linear(D, classes).double()
    return model


def test_rows_of_a_table_picked_by_index_are_an_embedding():
    model = Act(
        lambda m, x: m.head(F.linear(m.t[expert_of(x) - EXPERTS], m.v) * x),
        t=p(EXPERTS, D),
        v=p(D, D),
        head=nn.Linear(D, 2),
    ).double()
    x, y, loss = data(7, D), data(7, 2), nn.MSELoss()
    assert relative(fisher(model, x, y, loss, structure="dense").dense(), gauss_newton(model, loss, x, y)) < EXACT
    kfac = fisher(model, x, y, loss, structure="kfac")
    assert kfac.coverage()["t"].sizes == f"{D}² ⊗ diag {EXPERTS}"


def test_an_expert_without_rows_keeps_its_input_factor():
    """U is a mean over the data, of which none is this expert's; V is a mean over its own rows, and there are none."""
    model, loss = expert_model("select"), nn.MSELoss()
    metric = ng.Fisher(model, loss, kind="exact")
    opt = ng.NaturalGradient(metric)
    x = data(9, D)
    seen = x[expert_of(x) != 2]
    for part in (x, seen[1:]):
        loss(model(part), torch.zeros(len(part), 2).double()).backward()
        before = [f.clone() for f in metric.factors("w")] if metric.seen else None
        metric.advance(0.75)
    u, v = metric.factors("w")
    assert torch.equal(v[2], before[1][2])
    assert torch.allclose(u[2], 0.75 * before[0][2])
    assert not torch.equal(v[:2], before[1][:2])
    model = copy.deepcopy(model)
    fresh = ng.Fisher(model, loss, kind="exact")
    opt = ng.NaturalGradient(fresh)
    for part in (seen, x):  # first seen late
        loss(model(part), torch.zeros(len(part), 2).double()).backward()
        fresh.advance(0.75)
    rows = x[expert_of(x) == 2]
    assert torch.allclose(fresh.factors("w")[1][2], rows.mT @ rows / len(rows))
    del opt


def test_a_state_with_experts_goes_on_bit_for_bit(tmp_path):
    model, loss = expert_model("plus a bias"), nn.MSELoss()
    x, y = data(9, D), data(9, 2)
    metric = fisher(model, x, y, loss, structure="kfac")
    metric.save(tmp_path / "metric.safetensors")
    again = ng.Fisher(model, loss, kind="exact", structure="kfac")
    again.load(tmp_path / "metric.safetensors")
    for m in (metric, again):
        m.update(x[:4], y[:4])
    assert torch.equal(metric.dense(), again.dense())


REPEATED = {
    "expand": lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)),
    "expand, transposed": lambda m, x: torch.bmm(x, m.w[None].expand(len(x), D, D).mT),
    "repeat": lambda m, x: torch.bmm(m.w.repeat(len(x), 1, 1), x),
    "with an offset": lambda m, x: torch.baddbmm(x, x, m.w.expand(len(x), -1, -1)) + m.b.expand(len(x), -1, -1),
    "einsum": lambda m, x: torch.einsum("nti,nio->nto", x, m.w.expand(len(x), D, D)),
}


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("name", REPEATED)
def test_a_matrix_repeated_for_each_datum_is_one_matrix(name, n):
    parts = {"b": p(1, D)} if name == "with an offset" else {}
    model = Act(
        lambda m, x: m.head(REPEATED[name](m, x).tanh().flatten(1)), w=p(D, D), head=nn.Linear(D * D, 2), **parts
    )
    model.double()
    x, y, loss = data(n, D, D), data(n, 2), nn.MSELoss()
    assert relative(fisher(model, x, y, loss, structure="dense").dense(), gauss_newton(model, loss, x, y)) < EXACT
    found = fisher(model, x, y, loss, structure="kfac")
    assert found.coverage()["w"].sizes == f"{D}² ⊗ {D}²"
    assert all(not row.why for row in found.coverage())


def test_a_sum_over_picked_experts_inside_of_the_product_is_named():
    model = Act(
        lambda m, x: m.head(torch.einsum("nki,nkoi->no", x[:, None].expand(-1, 2, -1), m.w[top_two(x)])),
        w=p(EXPERTS, D, D),
        head=nn.Linear(D, 2),
    ).double()
    x, y, loss = data(7, D), data(7, 2), nn.MSELoss()
    metric = fisher(model, x, y, loss, structure="dense")
    assert "no op rule" in metric.coverage()["w"].why
    assert relative(metric.dense(), gauss_newton(model, loss, x, y)) < EXACT


def test_experts_used_as_matrices_and_as_one_are_refused_by_name():
    model = Act(
        lambda m, x: m.head(PATHS["select"](m, x) * m.w.norm()), w=p(EXPERTS, D, D), head=nn.Linear(D, 2)
    ).double()
    with pytest.raises(CaptureError, match="'w'"):
        fisher(model, data(7, D), data(7, 2), nn.MSELoss())
