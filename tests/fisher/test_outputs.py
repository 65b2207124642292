"""What models return: nests, losses inside the model, several heads, dense prediction, language models."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import natgrad as ng
from tests.layer_oracle import empirical, gauss_newton, relative
from tests.op_cases import Act

EXACT = 1e-9


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Returning(nn.Module):
    """A classifier that returns its logits in a nest, and the loss where it is given labels."""

    def __init__(self, nest):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.nest = nest

    def forward(self, x, labels=None):
        logits = self.head(self.body(x).tanh())
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self.nest(logits, loss)


NESTS = {
    "tuple": (lambda z, loss: (z, loss), lambda out: out[0]),
    "dict": (lambda z, loss: {"logits": z, "loss": loss}, lambda out: out["logits"]),
    "dataclass": (lambda z, loss: Output(z, loss), lambda out: out.logits),
}


@pytest.mark.parametrize("nest", NESTS)
def test_loss_inside_the_model(nest):
    make, pick = NESTS[nest]
    model, loss = Returning(make).double(), nn.CrossEntropyLoss()
    x, y = data(6, 4), torch.randint(0, 3, (6,))
    expected = gauss_newton(model, loss, {"x": x}, y, pick)
    found = ng.Fisher(model, loss, kind="exact", structure="dense", output=pick, targets=lambda kw: kw["labels"])
    found.update({"x": x, "labels": y})
    assert relative(found.dense(), expected) < EXACT

    driven = ng.Fisher(model, loss, kind="exact", structure="dense", output=pick, targets=lambda kw: kw["labels"])
    ng.NaturalGradient(driven)
    out = model(x=x, labels=y)
    inside = out[1] if nest == "tuple" else out["loss"] if nest == "dict" else out.loss
    inside.backward()
    driven.advance(0.0)
    assert relative(driven.dense(), expected) < EXACT


def test_an_output_that_cannot_be_taken_asks_for_output():
    make, _ = NESTS["dict"]
    model = Returning(make).double()
    with pytest.raises(ValueError, match="output="):
        ng.Fisher(model, nn.CrossEntropyLoss()).update(data(6, 4))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        h = self.body(x).tanh()
        return {"class": self.a(h), "size": self.b(h)}


def two_heads():
    x = data(5, 4)
    y = {"class": torch.tensor([0, 1, -100, 2, 1]), "size": data(5, 2)}
    criteria = {"class": nn.CrossEntropyLoss(), "size": nn.MSELoss()}
    model = TwoHeads().double()
    expected = sum(gauss_newton(model, criteria[k], x, y[k], lambda out, k=k: out[k]) for k in criteria)
    return model, criteria, x, y, expected


def test_several_heads_add_up():
    model, criteria, x, y, expected = two_heads()
    found = ng.Fisher(model, criteria, kind="exact", structure="dense")
    found.update(x, y)
    assert relative(found.dense(), expected) < EXACT
    # each head has its own mass: the split is uneven for one and even for the other
    parts = ng.Fisher(model, criteria, kind="exact", structure="dense")
    parts.update(x[:3], {k: v[:3] for k, v in y.items()})
    parts.update(x[3:], {k: v[3:] for k, v in y.items()})
    assert relative(parts.dense(), expected) < EXACT


def test_several_heads_in_the_training_loop():
    model, criteria, x, y, expected = two_heads()
    found = ng.Fisher(model, criteria, kind="exact", structure="dense")
    ng.NaturalGradient(found)
    out = model(x)
    sum(criteria[k](out[k], y[k]) for k in criteria).backward()
    found.advance(0.0)
    assert relative(found.dense(), expected) < EXACT


def test_several_heads_empirical():
    model, criteria, x, y, _ = two_heads()
    y["class"] = torch.tensor([0, 1, 1, 2, 1])
    found = ng.Fisher(model, criteria, kind="empirical", structure="dense")
    found.update(x, y)

    class Sum(nn.Module):
        reduction = "mean"

        def forward(self, z, t):
            return criteria["class"](z[:, :3], t[:, 0].long()) + criteria["size"](z[:, 3:], t[:, 1:])

    joint = Act(lambda m, x: torch.cat([*m.inner(x).values()], 1), inner=model)
    labels = torch.cat([y["class"][:, None].double(), y["size"]], 1)
    assert relative(found.dense(), empirical(joint, Sum(), x, labels, 5)) < EXACT


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_several_heads_in_other_structures(structure):
    model, criteria, x, y, expected = two_heads()
    found = ng.Fisher(model, criteria, kind="exact", structure=structure)
    found.update(x, y)
    if structure != "kfac":
        assert torch.isclose(found.trace(), expected.trace())
    n = sum(t.numel() for t in model.body.parameters())
    # one head alone reaches each head's layer
    alone = ng.Fisher(model, {"class": criteria["class"]}, kind="exact", structure=structure)
    alone.update(x, {"class": y["class"]})
    head = slice(n, n + 15)
    assert relative(found.dense()[head, head], alone.dense()[head, head]) < EXACT


def test_heads_are_checked():
    model, _, x, y, _ = two_heads()
    with pytest.raises(ValueError, match="reduction"):
        ng.Fisher(model, {"class": nn.CrossEntropyLoss(), "size": nn.MSELoss(reduction="sum")})
    same = nn.MSELoss()
    with pytest.raises(ValueError, match="module of its own"):
        ng.Fisher(model, {"class": same, "size": same})
    with pytest.raises(ValueError, match="keys of the criteria"):
        ng.Fisher(model, {"klass": nn.CrossEntropyLoss()}).update(x, y)


def test_dense_prediction():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1)).double()
    x, y, loss = data(3, 2, 3, 3), torch.randint(0, 3, (3, 3, 3)), nn.CrossEntropyLoss(ignore_index=1)
    expected = gauss_newton(model, loss, x, y)
    found = ng.Fisher(model, loss, kind="exact", structure="dense")
    found.update(x, y)
    assert relative(found.dense(), expected) < EXACT


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(6, 4), nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=torch.float64)
        h = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        return self.norm(self.layer(h, src_mask=mask, is_causal=True)) @ self.embed.weight.T


def test_language_model_with_shifted_labels_and_padding():
    model = Language().double()
    ids = torch.randint(1, 6, (3, 5))
    ids[0, 3:] = 0
    loss = nn.CrossEntropyLoss(ignore_index=0)

    def output(z):
        return z[:, :-1].flatten(0, 1)

    y = ids[:, 1:].flatten()
    expected = gauss_newton(model, loss, ids, y, output)
    found = ng.Fisher(model, loss, kind="exact", structure="dense", output=output)
    found.update(ids, y)
    assert all(not row.why for row in found.coverage())
    assert relative(found.dense(), expected) < EXACT
    # the criterion in the loop sees the shifted output itself: nothing to tell the metric
    driven = ng.Fisher(model, loss, kind="exact", structure="dense")
    ng.NaturalGradient(driven)
    loss(output(model(ids)), y).backward()
    driven.advance(0.0)
    assert relative(driven.dense(), expected) < EXACT


def test_exact_with_many_outputs_is_refused_beyond_its_cost(monkeypatch):
    monkeypatch.setattr("natgrad.fisher.pseudo_gradients.MAX_PASSES", 50)
    model = nn.Linear(3, 60).double()
    with pytest.raises(ValueError, match="sampled"):
        ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact").update(data(4, 3), torch.randint(0, 60, (4,)))


def test_curvature_batch():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, loss = data(8, 6, 4), Act(lambda m, z: z.mean(1))
    model = nn.Sequential(model, loss)
    exact = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure="kfac")
    exact.update(x)
    part = ng.Fisher(model, nn.CrossEntropyLoss(), samples=100, max_positions=20)
    for _ in range(3):
        part.update(x)
    assert relative(part.dense(), exact.dense()) < 0.3
    assert "at most 20 rows" in str(part.coverage())
    for wrong in ({"max_positions": 0}, {"kind": "exact", "max_positions": 5}):
        with pytest.raises(ValueError, match="max_positions"):
            ng.Fisher(model, nn.CrossEntropyLoss(), **wrong)


def test_structure_by_pattern_and_the_coverage_table():
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    structure = {"0.*": "ekfac", "1.*": "diagonal", "*": "input"}
    found = ng.Fisher(model, nn.CrossEntropyLoss(), structure=structure)
    found.update(data(6, 4))
    rows = {row.parameter: row for row in found.coverage()}
    assert [rows[n].block for n in ("0.weight", "1.weight", "2.bias")] == ["ekfac", "diagonal", "input"]
    assert [rows[n].op for n in ("0.weight", "1.weight", "2.bias")] == ["linear", "layer_norm", "linear"]
    assert rows["0.weight"].sizes == "5² ⊗ 5² + 5·5"
    table = str(found.coverage())
    for title in ("parameter", "shape", "op", "block", "sizes", "memory", "why"):
        assert title in table
