"""Rounding weights to a grid: each rounding error is made good by the entries that are still to be rounded.

For a layer with curvature A = U ⊗ V and error E = W − Ŵ the loss rises by

    ½ ⟨E, U E V⟩ = ½ Σ_ij D_U,i D_V,j (L_Uᵀ E L_V)²_ij,    U = L_U D_U L_Uᵀ,    V = L_V D_V L_Vᵀ,

L unit upper triangular. (L_Uᵀ E L_V)_ij is E_ij and a sum F_ij over errors above and to the left. So
Ŵ_ij = Q(W_ij + F_ij) makes each square as small as the grid allows, in turn. With U = I that is GPTQ (Frantar et al.
2022, arXiv:2210.17323), with both YAQA (Tseng et al. 2025, arXiv:2505.22988). Entries with the same i + j do not feed
each other and are rounded together. A block that is kept as a matrix is rounded entry by entry the same way, and a
diagonal one feeds nothing.

Damping is factored: √λ is split between U and V by their mean eigenvalues (Martens & Grosse 2015, arXiv:1503.05671,
§6.3).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.base import Block
from natgrad.blocks.dense import LayerBlock
from natgrad.blocks.kronecker import KroneckerBlock
from natgrad.blocks.sums import copied
from natgrad.fisher.frozen import FrozenMetric, Source, frozen
from natgrad.linalg.block_diagonal import dense_of, is_diagonal, trace_of
from natgrad.linalg.tree import describe
from natgrad.uses.arguments import Point, say_bare, values

Quantiser = Callable[[str, Tensor], Tensor]
DAMPING = 1e-3  # of the mean eigenvalue of a block: 3 % for each factor; benchmarks/uses/round.py, third command


def round_weights(
    metric: Source,
    quantiser: Quantiser,
    names: str | Iterable[str] | None = None,
    damping: float | None = None,
    theta: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the parameters with those that are named on a grid, {name: tensor}. The model is left as it was.

    Args:
        metric: an `ng.Fisher`, or the path of its file.
        quantiser: called as ``quantiser(name, weight)`` with the whole parameter, returns the nearest point of its
            grid. The grid must be fixed: scales are found before, and not from the weight of the call. A parameter
            that comes back as it went in is not rounded, and takes up errors of its layer: let biases do so.
        names: names or patterns of the parameters to round; None takes all. Others stay as they are.
        damping: λ, absolute; None takes `DAMPING` of the mean eigenvalue of each block.
        theta: θ, {name: tensor}; None takes the present values of the parameters.

    Raises:
        RuntimeError: the metric has seen no data.
        ValueError: the quantiser changes shape or dtype, gives NaN or Inf, or has no fixed grid; or an argument does
            not fit.
        TypeError, FileNotFoundError: the metric is none, or the quantiser is not callable.
    """
    if not callable(quantiser):
        raise TypeError(f"quantiser must be callable as quantiser(name, weight), got {describe(quantiser)}")
    held = frozen(metric, "round_weights")
    chosen = chosen_names(held, names)
    damping = None if damping is None else held.check_damping(damping)
    theta = values(metric, theta, held, "round_weights")
    if any(n in chosen for n in held.bare):
        say_bare(held, "it is rounded entry by entry")
    found = dict(theta)
    with torch.no_grad():
        for block in held.ready:
            if mine := [n for n in block.names if n in chosen]:
                round_block(copied(block, held.shapes, torch.float64), held, quantiser, mine, damping, found)
        covered = {n: torch.zeros(held.shapes[n], dtype=torch.bool, device=held.device) for n in held.names}
        for block in held.ready:
            block.unpack(torch.ones(block.shape, dtype=torch.bool, device=held.device), covered)
        for n in chosen:
            once = quantised(quantiser, n, found[n])  # what no block holds is rounded here
            found[n] = torch.where(covered[n].to(once.device), found[n], once)
            again = quantised(quantiser, n, found[n])
            if not torch.allclose(again, found[n], rtol=4 * torch.finfo(again.dtype).eps, atol=0):
                raise ValueError(
                    f"the quantiser moves {n!r} when it is asked again, so that its grid is not fixed: compute scales "
                    "from the weights as they are before, and use the same in every call"
                )
    return found


def chosen_names(metric: FrozenMetric, names: Any) -> list[str]:
    patterns = ["*"] if names is None else [names] if isinstance(names, str) else list(names)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(n, pattern) for n in metric.names):
            raise ValueError(f"names: no parameter matches {pattern!r}; there are {metric.names}")
    return [n for n in metric.names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def quantised(quantiser: Quantiser, name: str, weight: Tensor) -> Tensor:
    """Return what the quantiser gives, checked."""
    found = quantiser(name, weight.clone())
    if not isinstance(found, Tensor) or found.shape != weight.shape or found.dtype != weight.dtype:
        raise ValueError(
            f"the quantiser must return a tensor of shape {tuple(weight.shape)} and {weight.dtype} for {name!r}, got "
            f"{describe(found)}"
        )
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"the quantiser gave NaN or Inf for {name!r}")
    return found.detach().to(weight.device)


def round_block(
    block: Block, metric: FrozenMetric, quantiser: Quantiser, names: list[str], damping: float | None, into: Point
) -> None:
    """Round the parameters `names` of a block, in `into`."""
    mine = {n: into[n] for n in block.names}
    weight = block.pack({n: t.to(metric.device, torch.float64) for n, t in mine.items()})
    free = block.pack({n: torch.full(t.shape, n in names, device=metric.device) for n, t in mine.items()})
    shape = block.shape if isinstance(block, KroneckerBlock) else torch.Size((1, 1, block.dimension))
    left, right = triangles(block, damping)
    w, free = weight.reshape(shape), free.reshape(shape)
    rows, columns = (torch.arange(n, device=w.device) * (side is not None) for n, side in zip(shape[1:], (left, right)))
    order = rows[:, None] + columns
    now, fed = w.clone(), torch.zeros_like(w)  # Ŵ, and E L_V as far as it is known
    for k in range(int(order.max()) + 1):
        i, j = (order == k).nonzero(as_tuple=True)
        back = fed[:, i, j] if left is None else (left[:, :, i] * fed[:, :, j]).sum(1)  # F, (groups, entries)
        now[:, i, j] += torch.where(free[:, i, j], back, 0.0)
        asked = {n: t.to(metric.device, torch.float64) for n, t in into.items() if n in mine}
        block.unpack(now.reshape(weight.shape), asked)
        on_grid = {n: t.double() for n, t in asked.items()}
        for n in names:
            on_grid[n] = quantised(quantiser, n, asked[n].to(into[n])).to(metric.device, torch.float64)
        grid = block.pack(on_grid).reshape(shape)
        now[:, i, j] = torch.where(free[:, i, j], grid[:, i, j], w[:, i, j])
        error = (w - now)[:, i, j]
        if right is None:
            fed[:, i, j] += error
        else:
            fed.index_add_(1, i, error[..., None] * right[:, j])
    out = {n: t.to(metric.device, torch.float64, copy=True) for n, t in mine.items()}
    block.unpack(now.reshape(weight.shape), out)
    into.update({n: out[n].to(into[n]) for n in names})


def triangles(block: Block, damping: float | None) -> tuple[Tensor | None, Tensor | None]:
    """Return L_U and L_V of a damped block, (groups, d, d); None for the identity."""
    if isinstance(block, KroneckerBlock):
        sizes = [trace_of(side).mean() / side.shape[-1] for side in block.factors]
        if not all(float(t) > 0 for t in sizes):
            return None, None
        root = DAMPING**0.5 if damping is None else float(damping / (sizes[0] * sizes[1])) ** 0.5
        left, right = (None if is_diagonal(m) else unit(dense_of(m), root * t) for m, t in zip(block.factors, sizes))
        return left, right
    if isinstance(block, LayerBlock):
        mean = block.trace() / block.dimension
        if damping is None and not float(mean) > 0:
            return None, None
        return None, unit(block.matrix[None], DAMPING * mean if damping is None else damping)
    return None, None


def unit(m: Tensor, damping: Tensor | float) -> Tensor:
    """Return L, unit upper triangular, of M + damping·I = L D Lᵀ, a stack (groups, d, d).

    Raises:
        ValueError: the damped matrix is not positive definite.
    """
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    lower, info = torch.linalg.cholesky_ex((m + damping * eye).flip(-1, -2))
    if bool(info.any()):
        raise ValueError(f"a factor damped by {float(damping):.3g} is not positive definite; take a larger damping")
    upper = lower.flip(-1, -2)
    return upper / upper.diagonal(dim1=-2, dim2=-1)[..., None, :]
