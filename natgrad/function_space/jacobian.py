"""The linear map J of a metric ĝ = JᵀJ: products, and chunks of rows for what needs entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

KEPT_BYTES = 2**29  # a Jacobian up to this size is kept for products; a larger one is passed over in chunks


@dataclass
class JacobianOperator:
    """The linear map J: products and, for solvers that need entries, chunks of rows.

    Attributes:
        count: N.
        parameters: P.
        chunks: yields (n, P) tensors, together J.
        jvp: (P,) → (N,)
        vjp: (N,) → (P,)
        like: a tensor with the dtype and device of everything.
        gram: JJᵀ, (N, N); given where neither it nor products need J in memory.
    """

    count: int
    parameters: int
    chunks: Callable[[], Iterator[Tensor]]
    jvp: Callable[[Tensor], Tensor]
    vjp: Callable[[Tensor], Tensor]
    like: Tensor
    gram: Callable[[], Tensor] | None = None

    @staticmethod
    def of(matrix: Tensor) -> JacobianOperator:
        """The rows of a matrix (N, P) that is already there."""
        n, p = matrix.shape
        return JacobianOperator(n, p, lambda: iter([matrix]), matrix.mv, matrix.mT.mv, matrix, lambda: gram(matrix))

    def matrix(self) -> Tensor:
        """J as one tensor (N, P)."""
        parts = list(self.chunks())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def product(self) -> Tensor:
        """JJᵀ, (N, N)."""
        return gram(self.matrix()) if self.gram is None else self.gram()

    def kept(self) -> JacobianOperator:
        """The same rows with J in memory where it is small, which makes products many times quicker."""
        if self.gram is not None:
            return self
        small = self.count * self.parameters * self.like.element_size() <= KEPT_BYTES
        return JacobianOperator.of(self.matrix()) if small else self

    @staticmethod
    def stack(parts: list[tuple[float, JacobianOperator]]) -> JacobianOperator:
        """Rows of Σ cᵢ JᵢᵀJᵢ: each Jᵢ scaled by √cᵢ, one above the other."""
        roots = [(math.sqrt(c), r) for c, r in parts]
        counts = [r.count for _, r in roots]

        def vjp(c: Tensor) -> Tensor:
            return torch.stack([s * r.vjp(part) for (s, r), part in zip(roots, c.split(counts))]).sum(0)

        return JacobianOperator(
            sum(counts),
            roots[0][1].parameters,
            lambda: (s * chunk for s, r in roots for chunk in r.chunks()),
            lambda v: torch.cat([s * r.jvp(v) for s, r in roots]),
            vjp,
            roots[0][1].like,
        )


def gram(jacobian: Tensor, blocks: int = 8) -> Tensor:
    """JJᵀ, formed below the diagonal only: about half of the work."""
    n = jacobian.shape[0]
    out, step = jacobian.new_zeros(n, n), -(-n // blocks)
    for i in range(0, n, step):
        out[i : i + step, : i + step] = jacobian[i : i + step] @ jacobian[: i + step].mT
    return out.tril() + out.tril(-1).mT


def gathered(chunks: Iterator[Tensor], rows: int) -> Iterator[Tensor]:
    """The same rows in chunks of at least `rows`, so that a QR step is worth its while."""
    waiting: list[Tensor] = []
    for chunk in chunks:
        waiting.append(chunk)
        if sum(len(w) for w in waiting) >= rows:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)
