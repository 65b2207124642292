"""Ordinary steps never wait for the device: no operation reads a value back to the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import Scaled, batches, classifier, distance, finite, natural, train, weights

import natgrad as ng
import natgrad.optim.skips

READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "allclose")


class Counter(TorchDispatchMode):
    """Counts the operations that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


def reads_of_ordinary_steps(opt: ng.NaturalGradient, model: torch.nn.Module, data: Any) -> tuple[int, list[str]]:
    ordinary, reads = 0, []
    for x, y in data:
        opt.zero_grad()
        due = opt.refresh_due
        with Counter() as counter:
            opt.metric.criterion(model(x), y).backward()
            opt.step()
        if not due:
            ordinary += 1
            reads += counter.reads
    return ordinary, reads


RULES: dict[str, Any] = {
    "default": lambda: None,
    "fixed": lambda: ng.FixedStep(momentum=0.9),
    "trust region": ng.KLTrustRegion,
    "grafted": ng.Grafted,
}


@pytest.mark.parametrize("structure", ["kfac", "dense", "diagonal"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("host", [True, False])
def test_ordinary_steps_read_nothing_back(
    rule: str, structure: str, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not host:  # as on a device whose memory the host cannot read
        monkeypatch.setattr(natgrad.optim.skips, "free_to_read", lambda t: False)
    model = Scaled()
    metric = ng.Fisher(model, torch.nn.CrossEntropyLoss(), structure=structure)
    opt = ng.NaturalGradient(metric, step=RULES[rule](), average=0.9, weight_decay=0.1)
    ordinary, reads = reads_of_ordinary_steps(opt, model, batches(60))
    assert ordinary > 40
    assert reads == []


def test_the_counter_sees_reads() -> None:
    with Counter() as counter:
        float(torch.ones(()))
        bool(torch.ones(()) > 0)
    assert len(counter.reads) == 2


def test_on_a_device_bad_steps_are_masked_and_counted_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natgrad.optim.skips, "free_to_read", lambda t: False)
    monkeypatch.setattr(natgrad.optim.skips, "PATIENCE", 3)
    model = classifier()
    opt = natural(model)
    bad = 0
    with pytest.warns(UserWarning, match="NaN or Inf: the step is skipped"):  # noqa: PT031
        for i, (x, y) in enumerate(batches(140)):
            before = weights(model)
            if i % 7 == 3:
                x, bad = x * float("nan"), bad + 1
            train(model, opt, [(x, y)])
            assert (distance(weights(model), before) == 0) == (i % 7 == 3)
    while not opt.refresh_due:
        train(model, opt, batches(1))
    train(model, opt, batches(1))
    assert opt.info["skipped"] == bad == 20
    assert finite(model)
