"""Dense matrices by plain autograd, an output at a time: nothing here imports natgrad.

All are (P, P) over the flattened parameters that require grad, in the order of ``named_parameters``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def same(out: Any) -> Any:
    return out


def call(model: nn.Module, x: Any) -> Any:
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def parameters(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def flat(grads: Any, params: list[Tensor]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, params)])


def jacobian(out: Tensor, params: list[Tensor]) -> Tensor:
    """(outputs, P)"""
    rows = [flat(torch.autograd.grad(o, params, retain_graph=True, allow_unused=True), params) for o in out.reshape(-1)]
    return torch.stack(rows)


def gauss_newton(model: nn.Module, criterion: Any, x: Any, y: Any, pick: Callable[[Any], Any] = same) -> Tensor:
    """Jᵀ H J, H the Hessian of the criterion in what `pick` takes out of the model's output."""
    out = pick(call(model, x))
    outs = out if isinstance(out, tuple) else (out,)
    params = parameters(model)
    jac = torch.cat([jacobian(o, params) for o in outs])
    z = torch.cat([o.detach().reshape(-1) for o in outs])

    def loss(z: Tensor) -> Tensor:
        parts = tuple(p.view_as(o) for p, o in zip(z.split([o.numel() for o in outs]), outs))
        if len(parts) == 2:
            return criterion(parts[0], y, parts[1])
        return criterion(parts[0], y)

    return jac.T @ torch.autograd.functional.hessian(loss, z) @ jac


def empirical(
    model: nn.Module, criterion: nn.Module, x: Any, y: Any, data: int, pick: Callable[[Any], Any] = same
) -> Tensor:
    """`empirical_of` the rows of one forward pass, which lie datum by datum."""
    out = pick(call(model, x))
    each = out.shape[0] // data
    return empirical_of(model, criterion, out, y, [slice(n * each, (n + 1) * each) for n in range(data)])


def empirical_of(model: nn.Module, criterion: Any, out: Tensor, y: Any, rows: Sequence[Any]) -> Tensor:
    """(1/m) Σ_n ∇ℓ_n ∇ℓ_nᵀ, ℓ_n the criterion on rows[n]; without 1/m for "sum"."""
    params = parameters(model)
    grads = [
        flat(torch.autograd.grad(criterion(out[r], y[r]), params, retain_graph=True, allow_unused=True), params)
        for r in rows
    ]
    total = torch.stack(grads).T @ torch.stack(grads)
    return total / len(rows) if criterion.reduction == "mean" else total


def block_mask(model: nn.Module, groups: dict[str, Any]) -> Tensor:
    """True within a group: parameters of one module, unless `groups` names another group for them."""
    labels = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            label = groups.get(name, name.rpartition(".")[0] or name)
            labels += [label] * p.numel()
    ids = {label: i for i, label in enumerate(dict.fromkeys(map(str, labels)))}
    where = torch.tensor([ids[str(label)] for label in labels])
    return where[:, None] == where[None, :]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
