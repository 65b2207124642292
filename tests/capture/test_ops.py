"""Every op × structure × kind × criterion against a dense oracle in float64."""

from __future__ import annotations

import pytest
import torch

import natgrad as ng
from natgrad.capture import ops
from natgrad.capture.ops import elementwise
from natgrad.testing import check_op_rule
from tests.layer_oracle import block_mask, empirical, gauss_newton, relative
from tests.op_cases import CASES, Case, N, criteria

TOLERANCE = 1e-9


def build(case: Case, seed: int = 0) -> tuple[torch.nn.Module, object]:
    torch.manual_seed(seed)
    return case.model().double(), case.x()


def metric(model, x, y, criterion, **options):
    found = ng.Fisher(model, criterion, **options)
    found.update(x, y)
    return found


@pytest.mark.parametrize("criterion", list(criteria()))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_exact_kind_is_the_gauss_newton_matrix(case, criterion):
    model, x = build(case)
    loss, y = criteria()[criterion]
    expected = gauss_newton(model, loss, x, y)
    assert relative(metric(model, x, y, loss, kind="exact", structure="dense").dense(), expected) < TOLERANCE
    found = metric(model, x, y, loss, kind="exact", structure="block")
    assert all(row.why == "" for row in found.coverage()), str(found.coverage())
    blocks = expected * block_mask(model, case.groups)
    assert relative(found.dense(), blocks) < TOLERANCE
    diagonal = metric(model, x, y, loss, kind="exact", structure="diagonal")
    assert relative(diagonal.dense().diagonal(), expected.diagonal()) < TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_empirical_kind(case):
    model, x = build(case)
    loss, y = criteria()["cross-entropy"]
    expected = empirical(model, loss, x, y, N)
    assert relative(metric(model, x, y, loss, kind="empirical", structure="dense").dense(), expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_ekfac_is_nearer_than_kfac(case, kind):
    model, x = build(case)
    loss, y = criteria()["cross-entropy"]
    expected = metric(model, x, y, loss, kind=kind, structure="block").dense()
    kfac = metric(model, x, y, loss, kind=kind, structure="kfac").dense()
    ekfac = metric(model, x, y, loss, kind=kind, structure="ekfac")
    far, near = relative(kfac, expected), relative(ekfac.dense(), expected)
    assert near < far or far < TOLERANCE
    # the diagonal in its own basis is exact: so is the trace
    assert torch.isclose(ekfac.trace(), expected.trace(), rtol=1e-9)


@pytest.mark.parametrize("structure", ["dense", "kfac"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_sampled_kind_tends_to_exact(case, structure):
    model, x = build(case)
    loss, y = criteria()["cross-entropy"]
    expected = metric(model, x, y, loss, kind="exact", structure=structure).dense()
    few = metric(model, x, y, loss, structure=structure, samples=100).dense()
    assert relative(few, expected) < 0.4


@pytest.mark.parametrize("structure", ["dense", "block", "diagonal", "kfac", "ekfac", "input"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_verbs_are_those_of_the_dense_matrix(case, structure):
    model, x = build(case)
    loss, y = criteria()["cross-entropy"]
    found = metric(model, x, y, loss, kind="exact", structure=structure)
    dense = found.dense()
    damped = dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype)
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(len(dense), dtype=dense.dtype, generator=generator)
    vector = found.flat_to_vector(v)
    assert relative(found.vector_to_flat(found.flat(vector)), dense @ v) < TOLERANCE
    assert relative(found.vector_to_flat(found.sharp(vector, 0.1)), torch.linalg.solve(damped, v)) < 1e-8
    assert torch.isclose(found.logdet(0.1), torch.logdet(damped), rtol=1e-9)
    assert torch.isclose(found.trace(), dense.trace(), rtol=1e-9)
    assert relative(found.vector_to_flat(found.diagonal()), dense.diagonal()) < TOLERANCE


class Blended(torch.nn.Module):
    """A scale inside an op that natgrad has no rule for."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        self.w = torch.nn.Parameter(torch.randn(4))

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(torch.addcmul(h, self.w, h))


def test_a_rule_of_ones_own_is_one_function():
    def addcmul(own, out, input, tensor1, tensor2):
        use = elementwise.scaled(tensor1, tensor2, out)
        use.others = (input, tensor2)
        return use

    torch.manual_seed(0)
    model, x, y = Blended().double(), torch.randn(6, 3).double(), torch.randint(0, 2, (6,))
    loss = torch.nn.CrossEntropyLoss()
    without = metric(model, x, y, loss, kind="exact", structure="dense").coverage()["w"]
    assert "no op rule" in without.why
    with pytest.raises(AssertionError, match="no op rule follows 'w'"):
        check_op_rule(model, x)
    ops.op_rule(torch.addcmul)(addcmul)
    try:
        check_op_rule(model, x)
        found = metric(model, x, y, loss, kind="exact", structure="dense")
        assert found.coverage()["w"].op == "addcmul"
        assert relative(found.dense(), gauss_newton(model, loss, x, y)) < TOLERANCE
        with pytest.raises(ValueError, match="addcmul has a rule already, addcmul"):
            ops.op_rule(torch.addcmul)(addcmul)
    finally:
        del ops.RULES[torch.addcmul]


@pytest.mark.parametrize(
    ("slip", "said"), [("input", "curvature of 'w'"), ("graph", "no op rule follows 'a.weight': unused")]
)
def test_a_wrong_rule_is_found_and_named(slip, said):
    def addcmul(own, out, input, tensor1, tensor2):
        use = elementwise.scaled(tensor1, 2 * tensor2 if slip == "input" else tensor2, out)
        use.others = (input, tensor2) if slip == "input" else ()
        return use

    torch.manual_seed(0)
    ops.op_rule(torch.addcmul)(addcmul)
    try:
        with pytest.raises(AssertionError, match=said):
            check_op_rule(Blended(), torch.randn(6, 3))
    finally:
        del ops.RULES[torch.addcmul]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_built_in_rules_pass_the_check_that_is_for_those_of_ones_own(case):
    model, x = build(case)
    check_op_rule(model, *(x if isinstance(x, tuple) else (x,)))
