"""Kronecker curvature damped column by column: weights by one number, biases by another.

With eigenvectors Q_U, Q_V and eigenvalues S of the curvature, and D = diag(c) over the columns of X,

    (curvature + I ⊗ D) = (Q_U ⊗ I) · diag_i(Q_V diag(S_i) Q_Vᵀ + D) · (Q_U ⊗ I)ᵀ,

a matrix of the inputs for each eigenvector i of the outputs. Where Q_V is the axes themselves it is a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.linalg.block_diagonal import left_times, pieces_of, spans, transposed
from natgrad.linalg.cholesky import ensure_fits
from natgrad.linalg.inverse import Inverse


@dataclass
class Columns(Inverse):
    """The matrices (groups, d_out, w, w) of each piece of the inputs, as their Cholesky factors."""

    qu: Tensor | None
    lower: list[Tensor]

    @classmethod
    def of(cls, values: Tensor, qu: Tensor | None, qv: Tensor, columns: Tensor) -> Columns:
        """`values` (groups, d_out, d_in), `columns` (groups, d_in).

        Raises:
            MemoryError: the matrices do not fit.
            ValueError: one of them is not positive definite.
        """
        pieces = list(zip(pieces_of(qv), spans(*qv.shape[-2:])))
        groups, out, _ = values.shape
        ensure_fits(
            3 * groups * out * sum((b - a) ** 2 for _, (a, b) in pieces) * values.element_size(),
            f"a layer of {out} outputs whose weight and bias have different damping",
            "one pattern for both, or structure='diagonal'",
            values,
        )
        found = []
        for q, (start, stop) in pieces:
            m = (q[:, None] * values[..., None, start:stop]) @ q[:, None].mT  # (groups, d_out, w, w)
            lower, info = torch.linalg.cholesky_ex(m + torch.diag_embed(columns[:, None, start:stop]))
            if bool(info.any()):
                raise ValueError("the damped block is not positive definite; take a larger damping")
            found.append(lower)
        return cls(qu, found)

    def apply(self, x: Tensor) -> Tensor:
        x = x if self.qu is None else left_times(transposed(self.qu), x)
        parts = x.split([m.shape[-1] for m in self.lower], dim=-1)
        x = torch.cat([torch.cholesky_solve(p[..., None], m)[..., 0] for p, m in zip(parts, self.lower)], dim=-1)
        return x if self.qu is None else left_times(self.qu, x)

    def root(self, z: Tensor) -> Tensor:
        """(…)^{-1/2} z"""
        parts = z.split([m.shape[-1] for m in self.lower], dim=-1)
        found = [
            torch.linalg.solve_triangular(m.mT, p[..., None], upper=True)[..., 0] for p, m in zip(parts, self.lower)
        ]
        x = torch.cat(found, dim=-1)
        return x if self.qu is None else left_times(self.qu, x)

    def logdet(self) -> Tensor:
        return -2 * torch.stack([m.diagonal(dim1=-2, dim2=-1).log().sum() for m in self.lower]).sum()

    def diagonal(self) -> Tensor:
        """Diagonal of the inverse, (groups, d_out, d_in)."""
        d = torch.cat([torch.cholesky_inverse(m).diagonal(dim1=-2, dim2=-1) for m in self.lower], dim=-1)
        return d if self.qu is None else left_times(self.qu.square(), d)
