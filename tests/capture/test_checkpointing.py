"""Activation checkpointing: the non-reentrant kind works, the reentrant kind is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from training_cases import batches, classifier, distance, natural, train, weights

import natgrad as ng
from natgrad.capture.tape import CaptureError


class Checkpointed(nn.Module):
    """A first layer and a body of which the activations are recomputed; `everything`: the first layer too."""

    def __init__(self, everything: bool = False, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.body = nn.Linear(4, 4).double(), classifier()
        self.how, self.everything = how, everything

    def forward(self, x: Tensor) -> Tensor:
        if not self.how:
            return self.body(self.first(x))
        if self.everything:
            return checkpoint(lambda x: self.body(self.first(x)), x, **self.how)
        return checkpoint(self.body, self.first(x), **self.how)


def selective(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("everything", [False, True])
def test_recomputed_activations_give_the_same_training(everything: bool) -> None:
    plain, model = Checkpointed(), Checkpointed(everything, use_reentrant=False)
    one, two = natural(plain), natural(model)
    train(plain, one, batches(15))
    train(model, two, batches(15))
    assert one.metric.info["data_seen"] == two.metric.info["data_seen"]
    assert distance(weights(plain), weights(model)) < 1e-12


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("functional", [False, True])
def test_the_reentrant_kind_is_refused_by_name(everything: bool, functional: bool) -> None:
    model = Checkpointed(everything, use_reentrant=True)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()))
    ((x, y),) = batches(1)
    with pytest.raises(CaptureError, match=r"reentrant activation checkpointing.*use_reentrant=False"):  # noqa: PT012
        out = model(x.requires_grad_())
        loss = F.cross_entropy(out, y) if functional else opt.metric.criterion(out, y)
        loss.backward()


def test_the_selective_kind_allows_one_backward_and_is_refused_by_name() -> None:
    model = Checkpointed(use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(selective))
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()))
    with pytest.raises(CaptureError, match=r"selective activation checkpointing.*without context_fn"):
        train(model, opt, batches(1))
