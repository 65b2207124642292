"""Calls below torch.nn.functional: `torch.ops.aten`, exported graphs, TorchScript."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import natgrad as ng
from tests.layer_oracle import gauss_newton, relative
from tests.op_cases import CASES, Act, p

EXACT = 1e-9
aten = torch.ops.aten


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def fisher(model, x, y, loss, **options):
    metric = ng.Fisher(model, loss, **{"kind": "exact", "structure": "dense", **options})
    metric.update(x, y)
    return metric


def export(model, x, apart=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of weights of recurrent nets, and of itself
        exported = torch.export.export(copy.deepcopy(model), (x,))
        return (exported.run_decompositions() if apart else exported).module()


def same_metric(model, exported, x):
    """Of a model and of its exported form: the same parameters, with the same layers and factors."""
    y, loss = torch.tensor([0, 2, 1, 2]), nn.CrossEntropyLoss()
    for structure in ("dense", "kfac"):
        plain, found = (fisher(m, x, y, loss, structure=structure) for m in (model, exported))
        assert all(not row.why for row in found.coverage()), str(found.coverage())
        v = {n: torch.randn_like(t) for n, t in plain.parameters.items()}
        assert set(found.names) == set(plain.names)
        here, there = plain.flat(v), found.flat({n: v[n] for n in found.names})
        assert all(torch.allclose(here[n], there[n], atol=1e-12) for n in v)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_an_exported_model_has_the_metric_of_the_model(case):
    torch.manual_seed(0)
    model, x = case.model().double(), case.x()
    same_metric(model, export(model, x), x)


# what is left of these, taken apart to the last, is no op with a rule
TAKEN_APART = {
    "bilinear": {"0.b.weight"},
    "instance norm": {"0.1.weight", "0.1.bias"},
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_an_exported_model_that_is_taken_apart_is_right_or_named(case):
    torch.manual_seed(0)
    model, x = case.model().double(), case.x()
    y, loss = torch.tensor([0, 2, 1, 2]), nn.CrossEntropyLoss()
    apart = export(model, x, apart=True)
    found = fisher(apart, x, y, loss)
    bare = {row.parameter for row in found.coverage() if row.why}
    assert bare <= TAKEN_APART.get(case.name, set())
    assert relative(found.dense(), gauss_newton(apart, loss, x, y)) < EXACT


ATEN = {
    "linear": lambda m, x: aten.linear(x, m.w, m.b),
    "linear.default": lambda m, x: aten.linear.default(x, m.w, m.b),
    "addmm": lambda m, x: aten.addmm.default(m.b, x, aten.t(m.w)),
    "mm and add": lambda m, x: aten.add.Tensor(aten.mm(x, aten.permute.default(m.w, [1, 0])), m.b),
    "matmul in place": lambda m, x: aten.add_.Tensor(aten.matmul.default(x, m.w.T), m.b),
    "einsum": lambda m, x: aten.einsum("ni,oi->no", [x, m.w]) * m.b,
    "norm": lambda m, x: aten.native_layer_norm.default(x @ m.w.T, [4], m.b, None, 1e-5)[0],
    "table": lambda m, x: aten.embedding(m.w, (x > 0).long().sum(1) % 4) * x + m.b,
    "index": lambda m, x: aten.index.Tensor(m.w, [(x > 0).long().sum(1) % 4]) * x + m.b,
}


@pytest.mark.parametrize("name", ATEN)
def test_calls_of_aten_are_seen(name):
    model = Act(lambda m, x: m.head(ATEN[name](m, x).tanh()), w=p(4, 4), b=p(4), head=nn.Linear(4, 3)).double()
    x, y, loss = data(6, 4), torch.arange(6) % 3, nn.CrossEntropyLoss()
    for structure in ("dense", "kfac", "ekfac"):
        metric = fisher(model, x, y, loss, structure=structure)
        assert all(not row.why for row in metric.coverage()), str(metric.coverage())
        if structure == "dense":
            assert relative(metric.dense(), gauss_newton(model, loss, x, y)) < EXACT


def test_an_exported_model_trains_as_the_model_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    x, y, loss = torch.randn(20, 3), torch.arange(20) % 2, nn.CrossEntropyLoss()
    exported = export(model, x)
    ends = []
    for net in (model, exported):
        opt = ng.NaturalGradient(ng.Fisher(net, loss))
        for _ in range(15):
            opt.zero_grad()
            value = loss(net(x), y)
            value.backward()
            opt.step()
        ends.append(value.item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


# TorchScript -----------------------------------------------------------------------------------------------------


def scripted(module, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module) if how == "script" else torch.jit.trace(module, (torch.randn(2, 3),))


@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_model_in_torchscript_is_refused(how):
    with pytest.raises(ValueError, match=r"TorchScript.*give the nn.Module that it was made from"):
        ng.Fisher(scripted(nn.Linear(3, 2), how), nn.CrossEntropyLoss())


@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_part_in_torchscript_is_named(how):
    part = scripted(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), how)
    model = Act(lambda m, x: m.head(m.part(x)), part=part, head=nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"'part' is TorchScript.*no curvature") as said:
        metric = ng.Fisher(model, nn.CrossEntropyLoss())
    assert len(said) == 1
    opt = ng.NaturalGradient(metric)
    metric.criterion(model(torch.randn(5, 3)), torch.arange(5) % 2).backward()
    opt.step()
    assert metric.coverage()["part.0.weight"].block == "no curvature"
    assert metric.coverage()["head.weight"].block == "kfac"


# nothing seen ----------------------------------------------------------------------------------------------------


def test_where_no_parameter_has_curvature_it_is_said_once():
    model = Act(lambda m, x: torch.addcmul(x, m.s, x).cumsum(1) + torch.addcmul(x, m.t, x), s=p(3), t=p(3))
    loss = nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, loss), refresh=1)
    x, y = torch.randn(5, 3), torch.arange(5) % 3

    def train():
        for _ in range(3):
            opt.zero_grad()
            loss(model(x), y).backward()
            opt.step()

    with pytest.warns(UserWarning, match=r"no parameter has curvature.*'s' \(reached through .*op_rule") as said:
        train()
    assert len(said) == 1
    assert said[0].filename == __file__
