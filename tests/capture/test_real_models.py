"""Models as people train them, with random weights: coverage complete, gradients unchanged, a refresh at each step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import natgrad as ng
from natgrad.huggingface import CAUSAL_LM
from tests import layer_oracle
from tests.models import ResNet18, ViT, as_batch, expert_models, graph_classifier, graph_net, language_models

LANGUAGE, EXPERTS = language_models(), expert_models()


def check(model, loss, run, **options):
    """A driven metric covers every parameter and changes no gradient; `run(model)` is forward and loss."""
    plain = copy.deepcopy(model)
    torch.manual_seed(0)
    run(plain, loss).backward()
    metric = ng.Fisher(model, loss, **options)
    opt = ng.NaturalGradient(metric)
    torch.manual_seed(0)
    run(model, loss).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        if q.grad is None:
            assert p.grad is None
        else:
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), name
    opt.step()
    rows = list(metric.coverage())
    assert all(row.block not in ("not seen",) for row in rows), str(metric.coverage())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return metric, rows


def covered(rows):
    assert all(row.block == "kfac" and not row.why for row in rows), [r for r in rows if r.why]


def test_resnet18():
    model = ResNet18(width=4)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    _, rows = check(model, nn.CrossEntropyLoss(), lambda m, loss: loss(m(x), y))
    covered(rows)


def test_vit():
    model = ViT(width=16, depth=2)
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    _, rows = check(model, nn.CrossEntropyLoss(), lambda m, loss: loss(m(x), y))
    covered(rows)


@pytest.mark.parametrize("name", list(LANGUAGE) or ["transformers"])
def test_transformers(name):
    if not LANGUAGE:
        pytest.skip("transformers is not installed (pip install natgrad[models])")
    build, output, targets = LANGUAGE[name]
    model = build().eval()
    batch = as_batch(name)
    # the loss is inside the model
    metric, rows = check(model, nn.CrossEntropyLoss(), lambda m, _: m(**batch).loss, output=output, targets=targets)
    covered(rows)
    assert str(metric.coverage())


def train_experts(model, opt, steps=40):
    """Mean loss over the last five steps of predicting walks through the vocabulary, each at its own pace."""
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        pace = torch.randint(1, 5, (16, 1), generator=generator)
        start = torch.randint(3, 32, (16, 1), generator=generator)
        ids = (start + pace * torch.arange(16)) % 29 + 3
        opt.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return sum(losses[-5:]) / 5


@pytest.mark.parametrize("name", list(EXPERTS) or ["transformers"])
def test_mixtures_of_experts(name):
    """However the experts are called they have the same blocks, and train better than by AdamW."""
    if not EXPERTS:
        pytest.skip("transformers with fused experts is not installed (pip install natgrad[models])")
    ends = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = EXPERTS[name](implementation)
        metric = ng.Fisher(model, nn.CrossEntropyLoss(), **CAUSAL_LM)
        ends[implementation] = train_experts(model, ng.NaturalGradient(metric))
        rows = list(metric.coverage())
        covered(rows)
        assert all(
            row.sizes.endswith("× 4")
            for row in rows
            if row.parameter.endswith(("gate_up_proj", "down_proj")) and len(row.shape) == 3
        )
    rates = (1e-3, 3e-3, 1e-2)
    models = [EXPERTS[name]("eager") for _ in rates]
    adamw = min(train_experts(m, torch.optim.AdamW(m.parameters(), lr)) for m, lr in zip(models, rates))
    print(f"{name}: {ends}, AdamW {adamw:.3f}")
    assert all(end == pytest.approx(ends["eager"], rel=0.02) for end in ends.values())
    assert max(ends.values()) < adamw


@pytest.mark.parametrize("name", ["gcn", "gin"])
def test_graph_nets(name):
    pytest.importorskip("torch_geometric", reason="torch_geometric is not installed (pip install natgrad[models])")
    model, args, y = graph_net(name)
    _, rows = check(model, nn.CrossEntropyLoss(), lambda m, loss: loss(m(*args), y))
    rows = {r.parameter: r for r in rows}
    # GIN's (1 + ε) x is a scale computed from a parameter: no op rule, so an Adam-like rule trains it
    assert [n for n, r in rows.items() if r.why] == (["first.eps"] if name == "gin" else [])


@pytest.mark.parametrize("name", ["gcn", "gin"])
def test_graph_nets_meet_the_oracle(name):
    pytest.importorskip("torch_geometric", reason="torch_geometric is not installed (pip install natgrad[models])")
    from tests.layer_oracle import gauss_newton, relative

    model, args, y = graph_net(name)
    model = model.double()
    args = (args[0].double(), *args[1:])
    loss = nn.CrossEntropyLoss()
    metric = ng.Fisher(model, loss, kind="exact", structure="dense")
    metric.update(args, y)
    assert relative(metric.dense(), gauss_newton(model, loss, args, y)) < 1e-9


@pytest.mark.parametrize("layer", ["encoder", "decoder"])
def test_transformer_layers_meet_the_oracle(layer):
    from tests.layer_oracle import gauss_newton, relative
    from tests.op_cases import Act

    if layer == "encoder":
        model = Act(
            lambda m, x: m.head(m.layer(x, src_key_padding_mask=m.padding).mean(1)),
            layer=nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True),
            head=nn.Linear(4, 3),
        )
    else:
        model = Act(
            lambda m, x: m.head(m.layer(x, x.sin()).mean(0)),
            layer=nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0),
            head=nn.Linear(4, 3),
        )
    model = model.double()
    model.padding = torch.tensor([[False, False, True]] * 3)
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    y, loss = torch.tensor([0, 1, 2]), nn.CrossEntropyLoss()
    metric = ng.Fisher(model, loss, kind="exact", structure="dense")
    metric.update(x, y)
    assert relative(metric.dense(), gauss_newton(model, loss, x, y)) < 1e-9
    assert all(not row.why for row in metric.coverage())


ATTENTION = {
    "packed": {},
    "no bias": {"bias": False},
    "separate": {"kdim": 3, "vdim": 5},
    "bias_k and bias_v": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, batch_first):
    from tests.layer_oracle import gauss_newton, relative
    from tests.op_cases import Act

    options = ATTENTION[name]
    q, k, v = (torch.randn(3, 4, d, dtype=torch.float64) for d in (4, options.get("kdim", 4), options.get("vdim", 4)))
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)

    def run(m, q, k, v):
        out = m.a(q, k, v, attn_mask=mask, need_weights=False)[0]
        return m.head(out.mean(1 if batch_first else 0))

    model = Act(run, a=nn.MultiheadAttention(4, 2, batch_first=batch_first, **options), head=nn.Linear(4, 2)).double()
    args = (q, k, v) if batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))
    fused = model(*args)
    y, loss = torch.tensor([0, 1, 1]), nn.CrossEntropyLoss()
    metric = ng.Fisher(model, loss, kind="exact", structure="dense")
    metric.update(args, y)
    assert relative(metric.dense(), gauss_newton(model, loss, args, y)) < 1e-9
    assert torch.equal(fused, model(*args))
    assert all(not row.why for row in metric.coverage()), str(metric.coverage())


RECURRENT = {
    "lstm": lambda: nn.LSTM(3, 4),
    "lstm deep, both ways, projected": lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
    "lstm batch first, no bias": lambda: nn.LSTM(3, 4, batch_first=True, bias=False),
    "gru deep, both ways": lambda: nn.GRU(3, 4, 2, bidirectional=True, dropout=0.3),
    "rnn relu": lambda: nn.RNN(3, 4, nonlinearity="relu"),
    "rnn tanh": lambda: nn.RNN(3, 4, 2, dropout=0.5),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_nets_decomposed_equal_the_fused_op(name, packed):
    layer = RECURRENT[name]().double()
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    first = layer.batch_first
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, [3, 5, 2], batch_first=True, enforce_sorted=False)
    elif not first:
        x = x.transpose(0, 1)

    def run():
        torch.manual_seed(3)
        out, state = layer(x)
        return out.data if packed else out, state, torch.rand(1)

    fused, state, noise = run()
    grads = torch.autograd.grad(fused.square().sum(), list(layer.parameters()))
    from natgrad.capture.tape import Tape

    tape = Tape({id(p): n for n, p in layer.named_parameters()})
    tape.open((), {})
    try:
        out, again, after = run()
    finally:
        tape.close()
    assert torch.allclose(out, fused, atol=1e-13)
    for a, b in zip(state if isinstance(state, tuple) else (state,), again if isinstance(again, tuple) else (again,)):
        assert torch.allclose(a, b, atol=1e-13)
    assert torch.equal(noise, after)
    mine = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, grads))
    assert {c.weight.name for c in tape.calls} == {n for n in dict(layer.named_parameters()) if n.startswith("weight")}


def test_packed_recurrent_net_meets_the_oracle():
    from tests.layer_oracle import gauss_newton, relative
    from tests.op_cases import Act

    def run(m, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [3, 5, 2], batch_first=True, enforce_sorted=False)
        return m.head(m.r(packed)[1][-1])

    model = Act(run, r=nn.GRU(3, 4, bidirectional=True), head=nn.Linear(4, 2)).double()
    x, y, loss = torch.randn(3, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 1]), nn.CrossEntropyLoss()
    metric = ng.Fisher(model, loss, kind="exact", structure="dense")
    metric.update(x, y)
    assert relative(metric.dense(), gauss_newton(model, loss, x, y)) < 1e-9


def test_a_large_vocabulary_head_is_diagonal_on_its_side():
    model = nn.Sequential(nn.Embedding(5000, 4), nn.Linear(4, 5000))
    model[1].weight = model[0].weight
    loss = nn.CrossEntropyLoss()
    ids = torch.randint(0, 5000, (3, 2))
    metric = ng.Fisher(model, loss, output=lambda z: z.flatten(0, 1))
    metric.update(ids)
    rows = {r.parameter: r for r in metric.coverage()}
    assert rows["0.weight"].sizes == "4² ⊗ diag 5000"
    assert "diag 5000" in rows["1.bias"].sizes


@pytest.mark.parametrize("name", ["gcn", "gin", "sage"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_classifiers_of_unequal_graphs_meet_the_oracle(name, kind):
    pytest.importorskip("torch_geometric", reason="torch_geometric is not installed (pip install natgrad[models])")
    model, args, y = graph_classifier(name)
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind=kind, structure="dense")
    metric.update(args, y)
    if kind == "exact":
        expected = layer_oracle.gauss_newton(model, nn.CrossEntropyLoss(), args, y)
    else:
        expected = layer_oracle.empirical(model, nn.CrossEntropyLoss(), args, y, len(y))
    assert metric.seen == len(y)
    assert layer_oracle.relative(metric.dense(), expected) < 1e-9


@pytest.mark.parametrize("name", ["gcn", "gin", "sage"])
def test_classifiers_of_unequal_graphs_train_below_adamw(name):
    pytest.importorskip("torch_geometric", reason="torch_geometric is not installed (pip install natgrad[models])")

    def run(make):
        model, args, y = graph_classifier(name)
        opt, criterion = make(model)
        for _ in range(40):
            opt.zero_grad()
            loss = criterion(model(*args), y)
            loss.backward()
            opt.step()
        return float(criterion(model(*args), y).detach())

    def adamw(lr):
        return lambda model: (torch.optim.AdamW(model.parameters(), lr), nn.CrossEntropyLoss())

    def natural(model):
        criterion = nn.CrossEntropyLoss()
        return ng.NaturalGradient(ng.Fisher(model, criterion)), criterion

    assert run(natural) < min(run(adamw(lr)) for lr in (1e-3, 3e-3, 1e-2))
