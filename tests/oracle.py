"""Dense oracles by `torch.func` alone: nothing here imports natgrad.

Every function takes a model, a criterion and a list of batches (x, y), and gives a (P, P) matrix over the flattened
parameters that require grad, in the order of ``named_parameters``. "Several batches" means: all data together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

Batches = Sequence[tuple[Any, Any]]


def hessian(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Reverse over reverse: forward mode compiles a script that warns of its deprecation."""
    return jacrev(jacrev(f))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def flatten(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def as_function(model: nn.Module, output: Callable[[Any], Any] | None = None) -> tuple[Tensor, Callable[..., Any]]:
    """(θ, f) with f(θ, x) = output(model(x))."""
    params = trainable(model)
    sizes = [p.numel() for p in params.values()]

    def f(theta: Tensor, x: Any) -> Any:
        parts = theta.split(sizes)
        named = {n: part.reshape(p.shape) for (n, p), part in zip(params.items(), parts)}
        args = x if isinstance(x, tuple) else (x,)
        out = functional_call(model, named, args)
        return out if output is None else output(out)

    return flatten(params), f


def together(batches: Batches) -> tuple[Any, Any]:
    x = torch.cat([b[0] for b in batches])
    y = None if batches[0][1] is None else torch.cat([b[1] for b in batches])
    return x, y


def gauss_newton(model: nn.Module, criterion: nn.Module, batches: Batches, output: Any = None) -> Tensor:
    """Jᵀ H J of criterion(model(x), y), H the Hessian of the criterion in the model's output."""
    theta, f = as_function(model, output)
    x, y = together(batches)
    out = f(theta, x)
    jac = jacrev(f)(theta, x).reshape(out.numel(), -1)
    curvature = hessian(lambda z: criterion(z.view_as(out), y))(out.reshape(-1))
    return jac.mT @ curvature @ jac


def empirical(model: nn.Module, criterion: nn.Module, batches: Batches, output: Any = None) -> Tensor:
    """(1/m) Σ_n ∇ℓ_n ∇ℓ_nᵀ, ℓ_n the criterion on datum n alone; for "sum" without 1/m. Data lie along x's front."""
    theta, f = as_function(model, output)
    total, count = theta.new_zeros(len(theta), len(theta)), 0
    for x, y in batches:
        labels = y.reshape(len(x), -1, *y.shape[1:]) if len(y) != len(x) else y[:, None]  # (data, rows of a datum, …)
        for n in range(len(x)):
            g = jacrev(lambda t, n=n, x=x, y=labels: criterion(f(t, x[n : n + 1]), y[n]))(theta)
            g = torch.zeros_like(g) if bool(g.isnan().any()) else g  # nothing but ignored labels: 0/0
            total += torch.outer(g, g)
            count += 1
    return total / count if criterion.reduction == "mean" else total


def fisher(
    model: nn.Module,
    outer: Callable[[Any, int], Tensor],
    inputs: Sequence[Any],
    mass: float,
    output: Any = None,
) -> Tensor:
    """(1/mass) Σ_n J_nᵀ outer(f_n, n) J_n, outer(f_n, n) the Fisher matrix of datum n in its flattened output."""
    theta, f = as_function(model, output)

    def flat(t: Tensor, x: Tensor) -> Tensor:
        found = f(t, x)
        return torch.cat([o.reshape(-1) for o in found]) if isinstance(found, tuple) else found.reshape(-1)

    total, n = theta.new_zeros(len(theta), len(theta)), 0
    for batch in inputs:
        for i in range(len(batch)):
            jac = jacrev(flat)(theta, batch[i : i + 1])
            total += jac.mT @ outer(f(theta, batch[i : i + 1]), n) @ jac
            n += 1
    return total / mass


def expected_outer(log_prob: Callable[[Tensor], Tensor], f: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k ∇log p_k ∇log p_kᵀ at f (K,); log_prob takes (nodes, K), the k-th row of which belongs to node k."""
    scores = grad(lambda rows: log_prob(rows).sum())(f.expand(len(weights), -1))
    return (scores * weights[:, None]).mT @ scores


# quadratures: nodes y and weights w with E g(y) = Σ w g(y) ----------------------------------------------------


def hermite(loc: Tensor, scale: Tensor, count: int = 24) -> tuple[Tensor, Tensor]:
    """Normal(loc, scale)."""
    z, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(count))
    return loc + scale * z, w / math.sqrt(2 * math.pi)


def laguerre(rate: Tensor, count: int = 24) -> tuple[Tensor, Tensor]:
    """Exponential(rate)."""
    z, w = (torch.from_numpy(a) for a in np.polynomial.laguerre.laggauss(count))
    return z / rate, w


def trapezoid(count: int = 4001, reach: float = 40.0) -> tuple[Tensor, Tensor]:
    """The real line, for smooth integrands that vanish at both ends (there its error is exponentially small)."""
    t = torch.linspace(-reach, reach, count, dtype=torch.float64)
    return t, torch.full_like(t, 2 * reach / (count - 1))


# K-FAC factors with plain loops -------------------------------------------------------------------------------


def layer_jacobian(model: nn.Module, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(input of the layer, Jacobian of the model's output with respect to the layer's output).

    The Jacobian has the shape (*output, *layer output)."""
    seen: dict[str, Tensor] = {}

    def probe(offset: Tensor | None) -> Tensor:
        def add(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            seen["input"], seen["output"] = args[0].detach(), out.detach()
            return out if offset is None else out + offset

        handle = layer.register_forward_hook(add)
        try:
            return model(x)
        finally:
            handle.remove()

    probe(None)
    seen_input, zero = seen["input"], torch.zeros_like(seen["output"])
    return seen_input, jacrev(probe)(zero).detach()


def patches(x: Tensor, layer: nn.Module) -> Tensor:
    """Rows that a layer multiplies its matrix with: (N, T, groups, d_in), convolutions by loops over every position."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, 1, x.shape[-1])
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    ph, pw = layer.padding
    x = torch.nn.functional.pad(x, (pw, pw, ph, ph))
    n, c, height, width = x.shape
    oh, ow = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    per = c // layer.groups
    rows = x.new_zeros(n, oh * ow, layer.groups, per * kh * kw)
    for i in range(oh):
        for j in range(ow):
            for k in range(layer.groups):
                for ch in range(per):
                    for a in range(kh):
                        for b in range(kw):
                            value = x[:, k * per + ch, i * sh + a * dh, j * sw + b * dw]
                            rows[:, i * ow + j, k, (ch * kh + a) * kw + b] = value
    return rows


def kfac_factors(
    model: nn.Module,
    layer: nn.Module,
    criterion: nn.Module,
    batches: Batches,
    mass: float,
    sharing: str = "expand",
) -> tuple[Tensor, Tensor]:
    """(U, V), each (groups, d, d), with U = (1/mass) Σ_n Σ_t J_ntᵀ H_n J_nt and V the mean of a aᵀ.

    H_n is the Hessian of the summed criterion on datum n; "reduce" sums J over the positions t of a datum, and takes
    the mean of a over them. A bias is one more input that is 1."""
    summed = copy.deepcopy(criterion)
    summed.reduction = "sum"
    u: Any = None
    v: Any = None
    count = 0
    for x, y in batches:
        inputs, jac = layer_jacobian(model, layer, x)
        a = patches(inputs, layer)
        if layer.bias is not None:
            a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
        out = model(x).detach()
        groups = a.shape[2]
        for n in range(len(x)):
            h = hessian(lambda z, n=n, y=y, out=out: summed(z.view_as(out[n : n + 1]), y[n : n + 1]))(
                out[n].reshape(-1)
            )
            j = jac[n][(slice(None),) * (out.dim() - 1) + (n,)]  # (*output of n, *layer output of n)
            j = j.reshape(out[n].numel(), *jac.shape[out.dim() + 1 :])
            if isinstance(layer, nn.Linear):
                j = j.reshape(len(j), -1, 1, j.shape[-1])  # (output, T, 1, d_out)
            else:
                j = j.flatten(2).reshape(len(j), groups, -1, a.shape[1]).permute(0, 3, 1, 2)  # (output, T, groups, d)
            rows, jacobians = list(a[n]), [j[:, t] for t in range(j.shape[1])]
            if sharing == "reduce":
                rows, jacobians = [a[n].mean(0)], [j.sum(1)]
            for k in range(groups):
                for row, jt in zip(rows, jacobians):
                    if u is None:
                        u = a.new_zeros(groups, jt.shape[-1], jt.shape[-1])
                        v = a.new_zeros(groups, row.shape[-1], row.shape[-1])
                    u[k] += jt[:, k].mT @ h @ jt[:, k]
                    v[k] += torch.outer(row[k], row[k])
            count += len(rows)
    return u / mass, v / count


# comparing ----------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def blocks_of(model: nn.Module) -> list[list[int]]:
    """Positions of the parameters of each layer (weight and bias together) in the flattened parameters."""
    at, found = 0, {}
    for name, p in trainable(model).items():
        found.setdefault(name.rpartition(".")[0], []).extend(range(at, at + p.numel()))
        at += p.numel()
    return list(found.values())


def block_diagonal(matrix: Tensor, model: nn.Module) -> Tensor:
    out = torch.zeros_like(matrix)
    for where in blocks_of(model):
        index = torch.tensor(where)
        out[index[:, None], index] = matrix[index[:, None], index]
    return out


def mask(d: int, longest: int | None) -> Tensor:
    """Ones where two of d rows lie in one piece: the fewest pieces of at most `longest`, the last one the smallest."""
    longest = d if longest is None else longest
    count = next(k for k in range(1, d + 1) if k * longest >= d)
    rows = next(p for p in range(1, d + 1) if p * count >= d)
    piece = torch.tensor([i // rows for i in range(d)])
    return (piece[:, None] == piece).double()
