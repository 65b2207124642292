"""What training throws at an optimizer: none of it corrupts parameters or state."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import batches, classifier, distance, finite, natural, same, train, weights

import natgrad as ng
from natgrad.linalg.kronecker import damped_inverse, safe_eigh
from natgrad.state import files

RULES: dict[str, Any] = {
    "default": lambda: None,
    "fixed": lambda: ng.FixedStep(lr=0.1, damping=0.1),
    "trust region": ng.KLTrustRegion,
    "grafted": lambda: ng.Grafted(lr=0.01),
}
each_rule = pytest.mark.parametrize("rule", RULES)


def state_is_finite(opt: ng.NaturalGradient) -> bool:
    def tensors(tree: Any) -> Iterator[Tensor]:
        if isinstance(tree, Tensor):
            yield tree
        elif isinstance(tree, dict):
            for v in tree.values():
                yield from tensors(v)

    return all(bool(torch.isfinite(t).all()) for t in tensors(opt.state_dict()) if t.is_floating_point())


# bad numbers ---------------------------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("where", ["inputs", "loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_batch_every_seventh_step(rule: str, where: str, value: float) -> None:
    model = classifier()
    opt = natural(model, step=RULES[rule](), average=0.9)
    criterion = opt.metric.criterion
    bad, losses = 0, []
    with pytest.warns(UserWarning, match="the gradient holds NaN or Inf: the step is skipped") as caught:  # noqa: PT031
        for i, (x, y) in enumerate(batches(84)):
            wrong = i % 7 == 0
            bad += wrong
            before = weights(model)
            if wrong and where == "inputs":
                x = x.clone()
                x[0, 0] = value
            opt.zero_grad()
            loss = criterion(model(x), y)
            (loss * value if wrong and where == "loss" else loss).backward()
            if wrong and where == "gradient":
                model[2].weight.grad[0, 0] = value
            opt.step()
            assert (distance(weights(model), before) == 0) == wrong
            losses.append(float(loss.detach()))
    assert len(caught) == 1
    assert opt.info["skipped"] == bad == 12
    assert opt.steps == 72
    assert state_is_finite(opt)
    assert sum(x for x in losses[-7:] if math.isfinite(x)) < 0.7 * sum(x for x in losses[:7] if math.isfinite(x))


def test_bad_steps_that_do_not_end_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natgrad.optim.skips.PATIENCE", 4)
    model = classifier()
    opt = natural(model)
    before = weights(model)
    with (
        pytest.warns(UserWarning, match="step is skipped"),
        pytest.raises(
            FloatingPointError, match="NaN or Inf for 4 steps in a row; lower lr or look for the first batch"
        ),
    ):
        train(model, opt, [(x * math.nan, y) for x, y in batches(4)])
    assert distance(weights(model), before) == 0


@each_rule
def test_statistics_that_overflow_are_dropped_though_the_gradient_is_fine(rule: str) -> None:
    """Inputs of 1e22 have squares beyond float32; a tanh that saturates leaves the gradient finite."""
    model = classifier(torch.float32)
    opt = natural(model, step=RULES[rule]())
    data = list(batches(12, dtype=torch.float32))
    train(model, opt, data[:6])
    while not opt.refresh_due:
        train(model, opt, data[:1])
    before = opt.metric.dense()
    x, y = data[6]
    with pytest.warns(UserWarning, match="statistics of a batch hold NaN or Inf and are dropped"):
        train(model, opt, [(x * 1e22, y)])
    assert torch.equal(before, opt.metric.dense())
    assert opt.info["dropped_statistics"] == 1
    train(model, opt, data[7:])
    assert finite(model)
    assert state_is_finite(opt)


@each_rule
def test_statistics_that_overflow_on_the_very_first_batch(rule: str) -> None:
    model = classifier(torch.float32)
    opt = natural(model, step=RULES[rule]())
    data = list(batches(30, dtype=torch.float32))
    x, y = data[0]
    with pytest.warns(UserWarning, match="statistics of a batch hold NaN or Inf and are dropped"):
        train(model, opt, [(x * 1e22, y)])
    train(model, opt, data[1:])
    assert opt.refreshes > 3
    assert finite(model)


# degenerate curvature --------------------------------------------------------------------------------------------


@each_rule
def test_a_dead_layer(rule: str) -> None:
    """Every unit of a ReLU layer is off: gradients and statistics behind it are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    opt = natural(model, step=RULES[rule](), weight_decay=0.0)  # decay reaches dead units too
    before = weights(model)
    train(model, opt, batches(30))
    assert finite(model)
    assert torch.equal(before["0.weight"], model[0].weight)
    assert not torch.equal(before["2.bias"], model[2].bias)
    assert state_is_finite(opt)


@each_rule
def test_duplicated_inputs(rule: str) -> None:
    """Factors of rank one."""
    model = classifier()
    opt = natural(model, step=RULES[rule]())
    losses = train(model, opt, [(x[:1].expand(16, 4), y[:1].expand(16)) for x, y in list(batches(1)) * 30])
    assert finite(model)
    assert losses[-1] < losses[0]


@each_rule
def test_labels_of_one_class(rule: str) -> None:
    model = classifier()
    opt = natural(model, step=RULES[rule](), kind="sampled")
    losses = train(model, opt, [(x, torch.zeros_like(y)) for x, y in batches(150)])
    assert finite(model)
    assert losses[-1] < 0.2 * losses[0]
    assert state_is_finite(opt)


@each_rule
def test_a_rate_a_hundred_times_too_large(rule: str) -> None:
    made = RULES[rule]()
    model = classifier(torch.float32)
    opt = natural(model, step=made)
    for group in opt.param_groups:
        group["lr"] *= 100
        group["weight_decay"] = 0.0  # lr · weight_decay of 1 or more is refused
    train(model, opt, batches(200, dtype=torch.float32))
    assert finite(model)
    assert state_is_finite(opt)


def test_half_precision_overflow_without_a_scaler() -> None:
    model = classifier(torch.float32)
    opt = natural(model)
    with pytest.warns(UserWarning, match="step is skipped"):  # noqa: PT031
        for i, (x, y) in enumerate(batches(40, dtype=torch.float32)):
            before = weights(model)
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = opt.metric.criterion(model(x) * (1e6 if i % 3 == 0 else 1), y)
            loss.backward()
            opt.step()
            assert (distance(weights(model), before) == 0) == (i % 3 == 0)
    assert finite(model)
    assert state_is_finite(opt)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_factors_are_inverted(scale: float) -> None:
    m = torch.diag(torch.tensor([1.0, 0.0, 1e-9], dtype=torch.float32)) * scale
    found = damped_inverse(m, 0.01 * scale)
    torch.testing.assert_close(found.diagonal() * scale, torch.tensor([1 / 1.01, 100.0, 100.0]), rtol=1e-3, atol=0)


def test_an_indefinite_factor_is_inverted_by_the_last_rung() -> None:
    m = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)  # eigenvalues 3 and −1
    found = damped_inverse(m, 0.5)
    values = torch.linalg.eigvalsh(found)
    torch.testing.assert_close(values, torch.tensor([1 / 3.5, 2.0], dtype=torch.float64))


def test_the_ladder_of_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh
    m = torch.eye(3)

    def fails_in_float32(a: Tensor) -> Any:
        if a.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(a)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    with pytest.warns(
        UserWarning, match=r"eigh of a \(3, 3\) factor did not converge in torch.float32; taken in float64"
    ):
        values, _ = safe_eigh(m)
    assert torch.equal(values, torch.ones(3))


def test_a_factor_that_fails_keeps_the_last_good_one_and_errs_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from natgrad.linalg.kronecker import FactorisationError

    def fail(*_: Any) -> Any:
        raise FactorisationError("eigh of a (3, 3) factor does not converge")

    model = classifier()
    opt = natural(model, refresh=1)
    train(model, opt, batches(10))
    monkeypatch.setattr(type(opt.metric.blocks[0]), "relative_inverse", fail)
    with pytest.warns(UserWarning, match="last good factor is kept") as caught:
        train(model, opt, batches(4))
    assert len(caught) == 2  # one a block
    assert opt.info["kept_factors"] == 8
    before = weights(model)
    with pytest.raises(FactorisationError, match=r"block of \['0.weight', '0.bias'\]: .* \(5 times in a row\)"):
        train(model, opt, batches(1))
    assert distance(weights(model), before) == 0


# Ctrl-C --------------------------------------------------------------------------------------------------------


class CtrlC(TorchDispatchMode):
    """Sends SIGINT before the k-th operation."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.left = k

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [0, 3, 13])
def test_ctrl_c_anywhere_in_a_step_leaves_a_whole_step_or_none(steps: int) -> None:
    """Interrupted at each of its operations, a step is complete or has not begun; then training goes on as usual."""
    data = list(batches(20))
    model = classifier()
    opt = natural(model, average=0.9, weight_decay=0.1)
    train(model, opt, data[:steps])
    start, start_state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    train(model, opt, data[steps : steps + 1])
    after, after_state = weights(model), copy.deepcopy(opt.state_dict())
    k, interrupted = -1, True
    while interrupted:
        k += 2
        model.load_state_dict(start)
        opt.load_state_dict(copy.deepcopy(start_state))
        x, y = data[steps]
        opt.zero_grad()
        opt.metric.criterion(model(x), y).backward()
        begun = copy.deepcopy(opt.state_dict())
        try:
            with CtrlC(k):
                opt.step()
            interrupted = False
        except KeyboardInterrupt:
            pass
        whole = distance(weights(model), after) == 0 and same(opt.state_dict(), after_state)
        none = distance(weights(model), start) == 0 and same(opt.state_dict(), begun)
        assert whole or none
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert k > 30


def test_ctrl_c_while_a_state_is_loaded_or_weights_are_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier()
    opt = natural(model, average=0.9)
    train(model, opt, batches(5))
    state = copy.deepcopy(opt.state_dict())
    train(model, opt, batches(5))
    other = classifier()
    fresh = natural(other, average=0.9)
    begun, outcomes = copy.deepcopy(fresh.state_dict()), set()
    for k in range(1, 1000):
        try:
            with CtrlC(k):
                fresh.load_state_dict(state)
        except KeyboardInterrupt:
            found = fresh.state_dict()
            outcomes.add("none" if same(found, begun) else "changed")
        else:
            break
    assert outcomes == {"none"}  # all that computes only reads
    fresh.load_state_dict(begun)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patched.setattr(fresh.metric, "discard_pending", lambda: signal.raise_signal(signal.SIGINT))
        fresh.load_state_dict(state)
    assert same(fresh.state_dict(), state)
    trained = weights(model)
    for k in range(1, 12):
        with pytest.raises(KeyboardInterrupt), CtrlC(k), opt.averaged():
            pass
        assert distance(weights(model), trained) == 0


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_ctrl_c_in_the_middle_of_a_save_keeps_the_old_file(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier()
    opt = natural(model)
    train(model, opt, batches(2))
    path = tmp_path / "metric.safetensors"
    opt.metric.save(path)
    before = path.read_bytes()
    train(model, opt, batches(2))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patched.setattr(files.os, moment, interrupted)
        opt.metric.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metric.safetensors"]


def test_ctrl_c_is_left_alone_in_other_threads_and_under_other_handlers() -> None:
    import threading

    from natgrad.state.interrupts import uninterrupted

    with uninterrupted():
        inside = signal.getsignal(signal.SIGINT)
    assert inside is not signal.default_int_handler
    seen: list[Any] = []

    def in_thread() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert heard == []
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
