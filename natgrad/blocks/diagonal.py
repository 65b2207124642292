"""The diagonal of the curvature of one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from natgrad.blocks.average import Average, Statistics
from natgrad.blocks.base import CHUNK, JointBlock
from natgrad.capture.layers import LayerIO, sum_of_squared_gradients
from natgrad.linalg.inverse import DiagonalInverse, Inverse
from natgrad.metric.damping import Number


class DiagonalBlock(JointBlock):
    """The diagonal alone."""

    structure = "diagonal"

    def observe(self, uses: Sequence[Sequence[LayerIO]], mass: Tensor | None, source: str, like: Tensor) -> Statistics:
        average = Average()
        most = max(1, CHUNK // max(1, self.dimension))
        squares = [
            sum_of_squared_gradients(calls, shape[0], most).flatten() if calls else like.new_zeros(shape.numel())
            for calls, shape in zip(uses, self.shapes)
        ]
        average.add(torch.cat(squares), None, source)
        average.weigh(mass, source)
        return {"diagonal": average}

    def flat(self, x: Tensor) -> Tensor:
        return x * self.diagonal()

    def sides(self) -> list[tuple[int, ...]]:
        return [(self.dimension,)]

    def shapes_of_statistics(self) -> dict[str, tuple[int, ...]]:
        return {"diagonal": (self.dimension,)}

    def inverse(self, damping: Number) -> Inverse:
        return DiagonalInverse(1 / (self.diagonal() + damping))

    def diagonal(self) -> Tensor:
        return self.value("diagonal")

    def logdet(self, damping: Number) -> Tensor:
        return (self.diagonal() + damping).log().sum()

    def sample(self, z: Tensor, damping: Number) -> Tensor:
        return z * (self.diagonal() + damping).rsqrt()

    def inverse_diagonal(self, damping: Number) -> Tensor:
        return 1 / (self.diagonal() + damping)

    def eigenvalues(self) -> Tensor:
        return self.diagonal()

    def sizes(self) -> str:
        return f"{self.dimension}"
