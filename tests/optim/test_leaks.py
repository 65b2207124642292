"""A thousand steps leave as many tensors as two hundred, without the garbage collector's help."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training_cases import Scaled, batches, classifier, natural

import natgrad as ng


def alive() -> tuple[int, int]:
    """Tensors and their bytes."""
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return len(found), sum(t.numel() * t.element_size() for t in found)


@pytest.mark.parametrize(
    ("loop", "rule"),
    [
        ("module", None),
        ("functional", None),
        ("abandoned", None),
        ("module", ng.FixedStep),
        ("module", ng.KLTrustRegion),
        ("module", ng.Grafted),
    ],
)
def test_a_thousand_steps_leak_nothing(loop: str, rule: Any) -> None:
    model = Scaled() if rule is None else classifier()
    opt = natural(model, kind="sampled", step=None if rule is None else rule(), average=0.9)
    (x, y), (x2, y2) = batches(2)

    def step() -> None:
        opt.zero_grad()
        if loop == "abandoned":
            opt.metric.criterion(model(x2), y2)  # a forward pass that nobody backpropagates
        out = model(x)
        loss = F.cross_entropy(out, y) if loop == "functional" else opt.metric.criterion(out, y)
        loss.backward()
        opt.step()

    counts = []
    gc.collect()
    gc.disable()
    try:
        for i in range(1000):
            step()
            if i in (199, 599, 999):  # all of them ordinary steps
                counts.append(alive())
    finally:
        gc.enable()
    assert counts[0] == counts[1] == counts[2]


def test_nothing_outlives_the_optimizer() -> None:
    gc.collect()
    before = alive()[0]
    model = classifier()
    opt = natural(model)
    for x, y in batches(5):
        opt.zero_grad()
        opt.metric.criterion(model(x), y).backward()
        opt.step()
    del model, opt, x, y
    gc.collect()
    assert alive()[0] <= before
