"""Parameters that act outside of the model's forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from tests import layer_oracle

IDS, Y = torch.tensor([0, 1, 2, 3, 4, 1]), torch.tensor([1, 2, 3, 4, 0, 1])


class Net(nn.Module):
    """Takes what its table gives, and may use the table again as its head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.tied = nn.Embedding(5, 3), nn.Linear(3, 3), tied
        self.head = nn.Linear(3, 5)

    def forward(self, e: Tensor) -> Tensor:
        h = self.layer(e).tanh()
        return h @ self.embed.weight.T if self.tied else self.head(h)


@pytest.mark.parametrize("structure", ["dense", "kfac"])
def test_a_table_used_before_the_model_and_tied_inside_is_refused_in_training(structure: str) -> None:
    model, criterion = Net(tied=True).double(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind="exact", structure=structure))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ng.CaptureError, match=r"embed.weight.*EmbeddingBackward0 before the model's forward pass"):
        criterion(model(model.embed(IDS)), Y).backward()
    assert opt.steps == 0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_it_is_trained_when_it_is_left_out() -> None:
    model, criterion = Net(tied=True).double(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, params=["layer.*", "head.*"], kind="exact"))
    criterion(model(model.embed(IDS)), Y).backward()
    opt.step()
    assert opt.steps == 1


def test_a_table_used_before_the_model_alone_is_named_and_trained() -> None:
    model, criterion = Net(tied=False).double(), nn.CrossEntropyLoss()
    metric = ng.Fisher(model, criterion, kind="exact", structure="dense")
    opt = ng.NaturalGradient(metric)
    params = [*model.layer.parameters(), *model.head.parameters()]
    out = model(model.embed(IDS))
    jac = layer_oracle.jacobian(out, params)
    h = torch.autograd.functional.hessian(
        lambda z: nn.functional.cross_entropy(z.view_as(out), Y), out.detach().flatten()
    )
    before = model.embed.weight.detach().clone()
    criterion(model(model.embed(IDS)), Y).backward()
    opt.step()
    assert "before the model's forward pass" in metric.coverage()["embed.weight"].why
    assert not torch.equal(model.embed.weight, before)
    kept = torch.arange(15, metric.dense().shape[0])  # the table comes first
    assert torch.allclose(metric.dense()[kept][:, kept], jac.mT @ h @ jac, rtol=1e-9, atol=1e-14)


def test_update_takes_its_inputs_as_data() -> None:
    model = Net(tied=True).double()
    metric, same = (ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure="dense") for _ in range(2))
    metric.update(model.embed(IDS), Y)
    same.update(model.embed(IDS).detach(), Y)
    assert torch.equal(metric.dense(), same.dense())


def test_an_input_made_by_another_model_is_none_of_the_metrics() -> None:
    """As the second net of a chain, or a discriminator on generated data."""
    first, model, criterion = nn.Linear(2, 3).double(), Net(tied=True).double(), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind="exact"))
    criterion(model(first(torch.randn(6, 2).double())), Y).backward()
    opt.step()
    assert opt.steps == 1
