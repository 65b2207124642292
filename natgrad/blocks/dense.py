"""The full matrix of one layer, or of several together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from natgrad.blocks.average import Average, Statistics
from natgrad.blocks.base import Job, JointBlock
from natgrad.capture.layers import Layer, LayerIO
from natgrad.linalg.inverse import DenseInverse, Inverse
from natgrad.linalg.kronecker import damped_inverse, safe_eigh
from natgrad.metric.damping import Number


class LayerBlock(JointBlock):
    """The full matrix of one layer."""

    structure = "block"

    def observe(self, uses: Sequence[Sequence[LayerIO]], mass: Tensor | None, source: str, like: Tensor) -> Statistics:
        average = Average()
        for rows in self.per_datum(uses, like):
            average.add(rows.mT @ rows, None, source)
        average.weigh(mass, source)
        return {"matrix": average}

    def is_symmetric(self, key: str) -> bool:
        return True

    def sides(self) -> list[tuple[int, ...]]:
        return [(self.dimension, self.dimension)]

    def shapes_of_statistics(self) -> dict[str, tuple[int, ...]]:
        return {"matrix": (self.dimension, self.dimension)}

    @property
    def matrix(self) -> Tensor:
        return self.value("matrix")

    def flat(self, x: Tensor) -> Tensor:
        return x @ self.matrix

    def inverse(self, damping: Number) -> DenseInverse:
        if isinstance(damping, Tensor) and damping.dim():
            return DenseInverse(torch.cholesky_inverse(self._lower(damping)))
        return DenseInverse(damped_inverse(self.matrix, damping))

    def _lower(self, damping: Tensor) -> Tensor:
        """The Cholesky factor of the matrix and a diagonal (P,)."""
        lower, info = torch.linalg.cholesky_ex(self.matrix + torch.diag_embed(damping))
        if int(info):
            raise ValueError(f"the damped block of {self.names} is not positive definite; take a larger damping")
        return lower

    def relative_inverse(self, damping: float, results: Sequence[Tensor | None] | None = None) -> Inverse:
        (done,) = [None] if results is None else results
        return super().relative_inverse(damping) if done is None else DenseInverse(done)

    def factor_jobs(self, damping: float) -> list[Job]:
        m = self.matrix
        return [Job(len(m) ** 3, m, lambda: (m, self.relative_to_mean(damping)), relative=False)]

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal()

    def logdet(self, damping: Number) -> Tensor:
        if isinstance(damping, Tensor) and damping.dim():
            return 2 * self._lower(damping).diagonal().log().sum()
        return (self.eigen()[0] + damping).log().sum()

    def sample(self, z: Tensor, damping: Number) -> Tensor:
        if isinstance(damping, Tensor) and damping.dim():
            return torch.linalg.solve_triangular(self._lower(damping).mT, z.unsqueeze(-1), upper=True).squeeze(-1)
        values, vectors = self.eigen()
        return (z @ vectors * (values + damping).rsqrt()) @ vectors.mT

    def inverse_diagonal(self, damping: Number) -> Tensor:
        return self.inverse(damping).matrix.diagonal()

    def eigenvalues(self) -> Tensor:
        return self.eigen()[0]

    def eigen(self) -> tuple[Tensor, Tensor]:
        return self.cached("eigen", lambda: safe_eigh(self.matrix))

    def sizes(self) -> str:
        return f"{self.dimension}²"


class DenseBlock(LayerBlock):
    """The full matrix of all layers together."""

    structure = "dense"
    joins = True

    def merged(self, parts: Sequence[Statistics], plain: bool) -> Statistics:
        grown = []
        for part in parts:  # batches from before a layer was first used
            average = part["matrix"].copy()
            average.sums = {h: grow_to(s, self.dimension) for h, s in average.sums.items()}
            grown.append({"matrix": average})
        return super().merged(grown, plain)

    def extend(self, layer: Layer) -> None:
        self.take([*self.layers, layer])
        self.version += 1
        for average in self.statistics.values():
            average.sums = {h: grow_to(s, self.dimension) for h, s in average.sums.items()}


def grow_to(matrix: Tensor, size: int) -> Tensor:
    """Zero rows and columns for coordinates that came later."""
    grow = size - matrix.shape[-1]
    return matrix if grow == 0 else torch.nn.functional.pad(matrix, (0, grow, 0, grow))
