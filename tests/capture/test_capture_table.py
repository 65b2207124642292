"""The situations of the capture table: each gives the metric of the plain model, or is refused by name."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

import natgrad as ng
from natgrad.capture.tape import CaptureError
from tests.layer_oracle import gauss_newton, relative
from tests.op_cases import Act

EXACT = 1e-9


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def batch(n=6):
    return data(n, 4), torch.randint(0, 3, (n,))


def driven(model, loss=None, **options):
    """A metric that an optimizer drives, so that it watches ordinary forward passes."""
    metric = ng.Fisher(model, loss or nn.CrossEntropyLoss(), **{"kind": "exact", "structure": "dense", **options})
    return metric, ng.NaturalGradient(metric)


def after_one_backward(model, loss, x, y, run=None):
    """The dense metric after one ordinary forward and backward pass, and the gradients left by it."""
    metric, _ = driven(model, loss)
    (run or (lambda: loss(model(x), y)))().backward()
    assert metric.advance(0.0)
    return metric.dense(), {n: p.grad for n, p in model.named_parameters()}


def mlp(act=None):
    return nn.Sequential(nn.Linear(4, 5), act or nn.Tanh(), nn.Linear(5, 3)).double()


MODELS = {
    "plain": mlp,
    "in-place relu": lambda: mlp(nn.ReLU(inplace=True)),
    "a layer called twice": lambda: Act(
        lambda m, x: m.b(m.a(m.a(x).tanh()).tanh()), a=nn.Linear(4, 4), b=nn.Linear(4, 3)
    ).double(),
    "siamese": lambda: Act(lambda m, x: m.b(m.a(x) * m.a(x.sin())), a=nn.Linear(4, 5), b=nn.Linear(5, 3)).double(),
    "slices": lambda: Act(
        lambda m, x: F.linear(F.linear(x, m.w.weight[:4], m.w.bias[:4]).tanh(), m.w.weight[4:], m.w.bias[4:]),
        w=nn.Linear(4, 7),
    ).double(),
    "functional": lambda: Act(
        lambda m, x: F.linear(F.linear(x, m.a.weight).tanh(), m.b.weight, m.b.bias),
        a=nn.Linear(4, 5, bias=False),
        b=nn.Linear(5, 3),
    ).double(),
    "transposed weight": lambda: Act(
        lambda m, x: (x @ m.a.weight.T + m.a.bias).tanh() @ m.b.weight.T,
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 3, bias=False),
    ).double(),
    "tied": lambda: Act(
        lambda m, x: m.b(F.linear(F.linear(x, m.a.weight).tanh(), m.a.weight.T)),
        a=nn.Linear(4, 5, bias=False),
        b=nn.Linear(4, 3),
    ).double(),
    "attention": lambda: Act(
        lambda m, x: m.b(m.a(x[:, None], x[:, None], x[:, None])[0][:, 0]),
        a=nn.MultiheadAttention(4, 2, batch_first=True),
        b=nn.Linear(4, 3),
    ).double(),
    "checkpointed": lambda: Act(
        lambda m, x: m.b(checkpoint.checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=False)),
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 3),
    ).double(),
    "lstm": lambda: Act(
        lambda m, x: m.b(m.a(x.view(len(x), 2, 2))[0][:, -1]), a=nn.LSTM(2, 2, batch_first=True), b=nn.Linear(2, 3)
    ).double(),
}


@pytest.mark.parametrize("name", MODELS)
def test_metric_and_gradients_of_an_ordinary_pass(name):
    model, loss = MODELS[name](), nn.CrossEntropyLoss()
    x, y = batch()
    plain = copy.deepcopy(model)
    loss(plain(x), y).backward()
    found, grads = after_one_backward(model, loss, x, y)
    assert relative(found, gauss_newton(plain, loss, x, y)) < EXACT
    for n, p in plain.named_parameters():
        if name in ("attention", "lstm"):  # decomposed: equal to rounding
            assert torch.allclose(grads[n], p.grad, atol=1e-12)
        else:
            assert torch.equal(grads[n], p.grad)


def test_random_state_is_untouched():
    model, loss = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double(), nn.CrossEntropyLoss()
    x, y = batch()
    torch.manual_seed(1)
    loss(model(x), y)
    plain = torch.rand(3)
    metric, _ = driven(model, loss, kind="sampled")
    torch.manual_seed(1)
    loss(model(x), y).backward()
    assert torch.equal(torch.rand(3), plain)
    assert metric.advance(0.0)


@pytest.mark.filterwarnings("ignore:the metric is the curvature of CrossEntropyLoss")
def test_accumulation_is_one_big_batch():
    model, loss = mlp(), nn.CrossEntropyLoss(reduction="sum")
    x, y = batch()
    metric, _ = driven(model, loss)
    for part in (slice(0, 2), slice(2, 6)):
        loss(model(x[part]), y[part]).backward()
    metric.advance(0.0)
    assert relative(metric.dense(), gauss_newton(model, loss, x, y)) < EXACT


@pytest.mark.filterwarnings("ignore:the metric is the curvature of CrossEntropyLoss")
def test_create_graph_and_loss_scaling():
    model, loss = mlp(), nn.CrossEntropyLoss()
    x, y = batch()
    metric, _ = driven(model, loss)
    grads = torch.autograd.grad(1024 * loss(model(x), y), list(model.parameters()), create_graph=True)
    assert all(g.requires_grad for g in grads)
    metric.advance(0.0)
    assert relative(metric.dense(), gauss_newton(model, loss, x, y)) < EXACT


def test_autocast():
    model, loss = mlp().float(), nn.CrossEntropyLoss()
    x, y = batch()
    metric, _ = driven(model, loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(model(x.float()), y)
    value.backward()
    metric.advance(0.0)
    expected = gauss_newton(copy.deepcopy(model).double(), loss, x, y)
    assert metric.dense().dtype == torch.float32
    assert relative(metric.dense().double(), expected) < 0.05


def test_selective_checkpointing():
    keep = [torch.ops.aten.addmm.default]

    def run(m, x):
        policy = checkpoint.create_selective_checkpoint_contexts
        return m.b(
            checkpoint.checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=False, context_fn=lambda: policy(keep))
        )

    model, loss = Act(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3)).double(), nn.CrossEntropyLoss()
    x, y = batch()
    driven_metric = driven(model, loss)
    with pytest.raises(CaptureError, match="selective"):
        loss(model(x), y).backward()
    assert driven_metric[0].seen == 0


def test_reentrant_checkpointing_is_refused():
    model = Act(
        lambda m, x: m.b(checkpoint.checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=True)),
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 3),
    ).double()
    x, y = batch()
    x.requires_grad_()
    metric, _ = driven(model)
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        metric.criterion(model(x), y)
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        ng.Fisher(model, nn.CrossEntropyLoss()).update(x, y)


def test_a_derivative_in_the_forward_pass_is_refused():
    def run(m, x):
        x = x.requires_grad_()
        u = m.b(m.a(x).tanh())
        return torch.autograd.grad(u.sum(), x, create_graph=True)[0] + u

    model = Act(run, a=nn.Linear(4, 5), b=nn.Linear(5, 1)).double()
    with pytest.raises(CaptureError, match="GaussNewton"):
        ng.Fisher(model, nn.MSELoss()).update(data(3, 4), data(3, 4))


def test_foreign_functional_call_is_no_use_of_the_parameters():
    model, loss = mlp(), nn.CrossEntropyLoss()
    x, y = batch()
    other = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    metric, _ = driven(model, loss)
    loss(torch.func.functional_call(model, other, (x,)), y).backward()
    assert not metric.advance(0.0)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_model():
    model, loss = mlp(), nn.CrossEntropyLoss()
    x, y = batch()
    compiled = torch.compile(model, backend="eager")
    metric, _ = driven(compiled, loss)
    loss(compiled(x), y).backward()
    assert metric.advance(0.0)
    assert metric.names == [n for n, _ in model.named_parameters()]
    assert relative(metric.dense(), gauss_newton(model, loss, x, y)) < EXACT


@pytest.mark.usefixtures("fresh_compiler")
def test_capture_attached_after_compile():
    model, loss = mlp(), nn.CrossEntropyLoss()
    x, y = batch()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    metric, _ = driven(compiled, loss)
    loss(compiled(x), y).backward()
    assert metric.advance(0.0)
    assert relative(metric.dense(), gauss_newton(model, loss, x, y)) < EXACT


@pytest.mark.filterwarnings("ignore:the metric is the curvature of CrossEntropyLoss")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("called", [False, True])
def test_a_raw_model_whose_compiled_form_is_trained_is_no_silent_miss(called):
    """What is compiled before the metric is attached to the raw model has no hooks in it; compiled later, it has."""
    model, loss = mlp(), nn.CrossEntropyLoss()
    x, y = batch()
    compiled = torch.compile(model, backend="eager")
    if called:
        compiled(x)
    metric, opt = driven(model, loss)
    loss(compiled(x), y).backward()
    if called:
        with pytest.raises(RuntimeError, match="compiled model to Fisher"):
            opt.step()
    else:
        assert metric.advance(0.0)
        assert relative(metric.dense(), gauss_newton(model, loss, x, y)) < EXACT


def test_copies_and_pickles_are_inert():
    model, loss = mlp(), nn.CrossEntropyLoss()
    metric, _ = driven(model, loss)
    x, y = batch()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss(twin(x), y).backward()
    assert not metric.advance(0.0)


@pytest.mark.filterwarnings("ignore:the metric is the curvature of CrossEntropyLoss")
def test_an_exception_in_forward_leaves_nothing_open():
    class Failing(nn.Module):
        fail = True

        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            out = self.a(x)
            if self.fail:
                raise KeyError("no")
            return out

    model, loss = Failing().double(), nn.CrossEntropyLoss()
    x, y = batch()
    metric, _ = driven(model, loss)
    with pytest.raises(KeyError):
        model(x)
    assert torch.overrides._get_current_function_mode_stack() == []
    model.fail = False
    loss(model(x), y).backward()
    metric.advance(0.0)
    assert relative(metric.dense(), gauss_newton(model, loss, x, y)) < EXACT


def test_the_model_on_its_own_output():
    model, loss = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), nn.MSELoss()
    x, y = data(5, 3), data(5, 3)
    twice = Act(lambda m, x: m.m(m.m(x)), m=model)
    expected = gauss_newton(twice, loss, x, y)
    metric, _ = driven(model, loss)
    loss(model(model(x)), y).backward()
    metric.advance(0.0)
    assert relative(metric.dense(), expected) < EXACT


@pytest.mark.filterwarnings("ignore:the metric is the curvature of CrossEntropyLoss")
def test_a_user_hook_that_rewrites_the_output():
    model, loss = mlp(), nn.CrossEntropyLoss()
    x, y = batch()
    metric, _ = driven(model, loss)
    model.register_forward_hook(lambda m, args, out: 3 * out)
    expected = gauss_newton(model, loss, x, y)
    loss(model(x), y).backward()
    metric.advance(0.0)
    assert relative(metric.dense(), expected) < EXACT
    metric.discard_pending()
    F.cross_entropy(model(x), y).backward()
    metric.advance(0.0)
    assert relative(metric.dense(), expected) < EXACT


def test_a_forward_that_is_never_backpropagated_is_dropped():
    model, loss = mlp(), nn.CrossEntropyLoss()
    metric, _ = driven(model, loss)
    x, y = batch()
    loss(model(x), y)
    assert not metric.advance(0.0)


def test_a_skipped_step_discards_its_statistics():
    model, loss = mlp(), nn.CrossEntropyLoss()
    metric, opt = driven(model, loss)
    x, y = batch()
    (loss(model(x), y) * float("inf")).backward()
    with pytest.warns(UserWarning, match="NaN or Inf"):
        opt.step()
    assert metric.seen == 0
    opt.zero_grad()
    loss(model(x), y).backward()
    opt.step()
    assert metric.seen == len(x)


def test_no_graph_outlives_its_backward_pass():
    model, loss = mlp(), nn.CrossEntropyLoss()
    _metric, opt = driven(model, loss)
    x, y = batch()
    gc.collect()
    gc.disable()
    try:
        out = model(x)
        node = weakref.ref(out)
        loss(out, y).backward()
        opt.step()
        del out
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("wrong", ["complex", "meta", "sparse", "quantised", "driven"])
def test_bad_input(wrong):
    x, y = batch()
    if wrong == "complex":
        with pytest.raises(ValueError, match="complex"):
            ng.Fisher(nn.Linear(4, 3, dtype=torch.complex64), nn.MSELoss())
    elif wrong == "meta":
        with pytest.raises(ValueError, match="meta"):
            ng.Fisher(nn.Linear(4, 3, device="meta"), nn.MSELoss())
    elif wrong == "sparse":
        with pytest.raises(ValueError, match="'0' is an Embedding with sparse=True"):
            ng.Fisher(nn.Sequential(nn.Embedding(4, 3, sparse=True)), nn.MSELoss())
        weight = nn.Parameter(torch.randn(4, 3))
        model = Act(lambda m, x: F.embedding(x, m.w, sparse=True), w=weight)
        metric = ng.Fisher(model, nn.MSELoss())
        opt = ng.NaturalGradient(metric)
        F.mse_loss(model(torch.tensor([1, 2])), torch.zeros(2, 3)).backward()
        with pytest.raises(ValueError, match="sparse=False"):
            opt.step()
    elif wrong == "quantised":

        class Packed(nn.Module):
            pass

        Packed.__module__ = "torch.ao.nn.quantized.modules.linear"
        with pytest.raises(ValueError, match="quantised"):
            ng.Fisher(nn.Sequential(nn.Linear(4, 3), Packed()), nn.MSELoss())
    else:
        model = mlp()
        metric, _ = driven(model)
        with pytest.raises(RuntimeError, match="driven by an optimizer"):
            metric.update(x, y)


def test_batch_norm_in_training_mode_warns_once_and_moves_nothing():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x, y = batch()
    before = {n: b.clone() for n, b in model.named_buffers()}
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), structure="ekfac")
    with pytest.warns(UserWarning, match="mixes the data"):
        metric.update(x, y)
    metric.update(x, y)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all(not row.why for row in metric.coverage())


def test_batch_norm_in_training_mode_exact():
    model, loss = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double(), nn.CrossEntropyLoss()
    x, y = batch()
    metric = ng.Fisher(model, loss, kind="exact", structure="dense")
    metric.update(x, y)
    assert relative(metric.dense(), gauss_newton(model, loss, x, y)) < EXACT
