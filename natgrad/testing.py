"""A check for op rules of your own, for your own tests.

@natgrad.capture.ops.op_rule(my_op)
def rule(own, out, x, weight): ...

def test_my_op():
    natgrad.testing.check_op_rule(SmallModelWithMyOp(), torch.randn(5, 3))
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.fisher.fisher import Fisher

TOLERANCE = 1e-8  # relative, in float64: rounding leaves 1e-12 and less of a small model, a wrong rule much more


def check_op_rule(model: nn.Module, *inputs: Any) -> None:
    """Compare what op rules make of a small model with plain automatic differentiation of each of its outputs.

    A copy of the model is taken in float64. Under the loss ‖f‖² its exact metric has to be 2JᵀJ, and its empirical one
    the sum of the outer products of its data's gradients 2Jₙᵀfₙ, in structures that keep the matrix, its diagonal or
    its trace.

    Args:
        model: returns one tensor, whose first dimension counts the data.
        inputs: its arguments; floating tensors are taken in float64.

    Raises:
        AssertionError: a parameter has no op rule, or its entries are wrong; the message names it.
    """
    model = copy.deepcopy(model).double()
    args = tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs)
    out = model(*args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(f, parameters, retain_graph=True, materialize_grads=True) for f in out.flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    by_datum = (2 * out.detach().flatten()[:, None] * jacobian).unflatten(0, (len(out), -1)).sum(1)
    expected = {"exact": 2 * jacobian.mT @ jacobian, "empirical": by_datum.mT @ by_datum}
    for kind, matrix in expected.items():
        for structure in ("dense", "diagonal", "ekfac"):
            metric = Fisher(model, nn.MSELoss(reduction="sum"), kind=kind, structure=structure)
            metric.update(args, torch.zeros_like(out))
            if bare := [f"{row.parameter!r}: {row.why}" for row in metric.coverage() if row.why]:
                raise AssertionError(f"no op rule follows {'; '.join(bare)}")
            _compare(metric, matrix, structure, f"kind={kind!r}, structure={structure!r}")


def _compare(metric: Fisher, matrix: Tensor, structure: str, where: str) -> None:
    found = {"dense": metric.dense, "diagonal": lambda: metric.vector_to_flat(metric.diagonal())[:, None]}
    right = {"dense": matrix, "diagonal": matrix.diagonal()[:, None]}
    if structure in found:
        sizes = [p.numel() for p in metric.parameters.values()]
        pairs = zip(metric.names, found[structure]().split(sizes), right[structure].split(sizes))
        errors = {name: float((a - b).norm() / matrix.norm()) for name, a, b in pairs}
        name = max(errors, key=lambda n: errors[n])
        if not errors[name] < TOLERANCE:
            raise AssertionError(f"the curvature of {name!r} is off by {errors[name]:.1e} of the whole ({where})")
    error = float((metric.trace() - matrix.trace()).abs() / matrix.trace())
    if not error < TOLERANCE:
        raise AssertionError(f"the trace is off by {error:.1e} ({where})")
