"""Blocks that are products of two small matrices.

- kfac    U ⊗ V with U = (1/m) Σ g gᵀ and V = mean a aᵀ over rows (`KroneckerBlock`; Martens & Grosse 2015,
          arXiv:1503.05671). "expand" takes every position as a row of its own; "reduce" first sums g and averages a
          over the positions of a datum (Eschenhagen et al. 2023, arXiv:2311.00636, eqs. 21 and 22). U carries the
          scale of the loss; V is a mean.
- ekfac   their eigenbases with eigenvalues of their own: `natgrad.blocks.eigenvalue`.
- input   c·I ⊗ V, c the mean of the diagonal of U (`InputBlock`): the input factor alone, at the trace of K-FAC
          (FOOF, Benzing 2022, arXiv:2201.12250).

A side longer than `max_factor_dim` is kept as equal blocks along its diagonal of at most that many rows
(`natgrad.linalg.block_diagonal`). Where no limit is given it is `TRAINING_FACTOR_DIM` while an optimizer drives the
metric, as inverses cost the third power of their side, and none otherwise; but a side longer than `FULL_FACTOR_DIM` is
kept as its diagonal. So is the input side of a table, which is exact: the rows are unit vectors.

A layer used in its layout and in the transposed one (tied embedding and head) is the sum of two products,
U₁⊗V₁ + U₂⊗V₂; it is kept as one with the same trace, (tr V₁·U₁ + tr V₂·U₂) ⊗ (tr U₁·V₁ + tr U₂·V₂) / Σ tr U_i tr V_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from natgrad.blocks.average import Average, Statistics
from natgrad.blocks.base import VALUE, Block, Job
from natgrad.capture.layers import Layer, LayerIO
from natgrad.capture.rows import Rows, count, of_data, second_moment, thinned
from natgrad.linalg.block_diagonal import (
    both_times,
    diagonal_of,
    is_diagonal,
    pieces_of,
    rows_of_pieces,
    trace_of,
)
from natgrad.linalg.columns import Columns
from natgrad.linalg.inverse import EigenInverse, Inverse, KroneckerInverse, into_basis, out_of_basis, overlapped
from natgrad.linalg.kronecker import eigen_of, relative_inverse, relative_system
from natgrad.metric.damping import Number

FEWEST_DATA = 8  # data among which the rows of a factor are drawn, where `max_positions` limits them
FULL_FACTOR_DIM = 4096  # a Kronecker side longer than this is kept as its diagonal, where no `max_factor_dim` is given
TRAINING_FACTOR_DIM = 250  # longest block kept of a side while an optimizer drives, likewise


class KroneckerBlock(Block):
    """U ⊗ V of one layer, a pair for each group. Coordinates: (…, groups, d_out, d_in)."""

    structure = "kfac"
    inputs_alone = False  # whether U is kept as its diagonal, for its mean

    def __init__(
        self, layers: Sequence[Layer], sharing: str = "expand", max_factor_dim: int | None = None, trains: bool = False
    ) -> None:
        super().__init__(layers, sharing, max_factor_dim, trains)
        (self.layer,) = self.layers
        # how many columns, the last ones, are biases beside a weight
        self.own_columns = len(self.layer.biases) if self.layer.weight is not None else 0
        self.needs_data = sharing == "reduce" or self.two_pass
        self.reduces = sharing == "reduce" and not self.two_pass
        self.max_rows: int | None = None  # rows of one call that enter a factor; the rest is scaled up
        self.generator = torch.Generator().manual_seed(0)  # which rows; the metric puts its own here, to be saved
        _, out, into = self.shape
        exactly_diagonal = self.layer.one_hot and not self.layer.swapped and sharing == "expand"
        # rows p of the pieces that each side is kept in
        self.kept = (
            1 if self.inputs_alone else kept_rows(out, max_factor_dim, trains),
            1 if exactly_diagonal else kept_rows(into, max_factor_dim, trains),
        )

    # U′, V′: the second product of a layer that is used in the transposed layout too

    def observe(self, uses: Sequence[Sequence[LayerIO]], mass: Tensor | None, source: str, like: Tensor) -> Statistics:
        new: Statistics = {}
        if not uses[0] and not self.statistics:
            return new  # nothing is known of its inputs yet
        for use in uses[0]:
            u, v = ("V′", "U′") if use.swapped else ("U", "V")
            gradients, inputs, scale = self._rows(use)
            moment = second_moment(gradients, self.kept[use.swapped])
            self._add(new.setdefault(u, Average()), moment if scale == 1 else moment * scale, None, source, use)
            if use.first and inputs is not None:
                total = second_moment(inputs, self.kept[not use.swapped])
                self._add(new.setdefault(v, Average()), total, count(inputs), "", use)
        # a product that this batch does not use has zero gradient there
        for key in {"U"} | {k for k in self.statistics if k == "V′"}:
            if key not in new:
                new[key] = Average({source: like.new_zeros(self._shape(key))}, {source: like.new_ones(())})
        for key, average in new.items():
            if not self.is_mean(key):
                average.weigh(mass, source)
        return new

    def _add(self, average: Average, total: Tensor, mass: Tensor | None, source: str, use: LayerIO) -> None:
        if use.region is None:
            average.add(total, mass, source)
        else:
            average.add_part(total, mass, source, use.region, self.shape[0])

    def _shape(self, key: str) -> tuple[int, ...]:
        groups, out, into = self.shape
        side = int(key[0] == "V")
        return groups, self.kept[side], (out, into)[side]

    @property
    def cut_in_training(self) -> bool:
        """Whether a side is in pieces that would be whole if no optimizer drove."""
        return self.trains and self.max_factor_dim is None and any(1 < p < d for _, p, d in self.sides())

    def sides(self) -> list[tuple[int, ...]]:
        return [self._shape("U"), self._shape("V")]

    def shapes_of_statistics(self) -> dict[str, tuple[int, ...]]:
        return {key: self._shape(key) for key in ("U", "V", "U′", "V′")}

    def _rows(self, use: LayerIO) -> tuple[Rows, Rows | None, float]:
        """Gradients, inputs where they are not counted yet, and how many rows each gradient row stands for."""
        if self.sharing == "reduce":
            return use.summed_gradients(), use.mean_inputs() if use.first else None, 1.0
        data, positions = use.gradients.shape[:2]
        rows = data * positions
        if self.max_rows is None or rows <= self.max_rows:
            return use.gradients, use.inputs if use.first else None, 1.0
        chosen = torch.randperm(data, generator=self.generator)[: max(FEWEST_DATA, -(-self.max_rows // positions))]
        chosen = chosen.to(use.gradients.device)
        keep = torch.randperm(len(chosen) * positions, generator=self.generator)[: self.max_rows].to(chosen.device)
        inputs = None
        if use.first:  # patches are unfolded for the chosen data alone
            inputs = use.make_inputs(chosen) if use.by_datum else of_data(use.inputs, chosen)
            inputs = thinned(inputs, keep)
        return thinned(use.gradients[chosen], keep), inputs, rows / len(keep)

    def is_mean(self, key: str) -> bool:
        return key in ("V", "U′", "Q_U", "Q_V")

    def is_symmetric(self, key: str) -> bool:
        return key[0] in "UV" and self.kept[key[0] == "V"] > 1

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """U (groups, d_out, d_out) and V (groups, d_in, d_in), or (groups, p, d) in pieces of p rows."""
        found: tuple[Tensor, Tensor] = self.cached(VALUE + "sides", self._sides)
        return found

    @property
    def u(self) -> Tensor:
        return self.factors[0]

    @property
    def v(self) -> Tensor:
        return self.factors[1]

    def _sides(self) -> tuple[Tensor, Tensor]:
        pairs = [
            (self.value(u), self.value(v))
            for u, v in (("U", "V"), ("U′", "V′"))
            if u in self.statistics and v in self.statistics
        ]
        if len(pairs) == 1:
            return pairs[0]
        (u1, v1), (u2, v2) = pairs
        share1, share2 = trace_of(u1) * trace_of(v1), trace_of(u2) * trace_of(v2)
        total = share1 + share2
        per = torch.where(total > 0, 1 / total, torch.zeros_like(total))
        u = beside(trace_of(v1)) * u1 + beside(trace_of(v2)) * u2
        v = beside(per * trace_of(u1)) * v1 + beside(per * trace_of(u2)) * v2
        return u, v

    def eigen(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Eigenvalues (groups, d_out, d_in) and eigenvectors of both sides, None for the axes."""
        found: tuple[Tensor, Tensor | None, Tensor | None] = self.cached("eigen", self._eigen)
        return found

    def _eigen(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        (lu, qu), (lv, qv) = map(eigen_of, self.factors)
        return lu[..., :, None] * lv[..., None, :], qu, qv

    def flat(self, x: Tensor) -> Tensor:
        u, v = self.factors
        return both_times(u, x, v)

    def inverse(self, damping: Number) -> EigenInverse | Columns:
        values, qu, qv = self.eigen()
        if qv is None or not isinstance(damping, Tensor) or damping.dim() == 0:
            return EigenInverse(1 / (values + damping), qu, qv)
        return Columns.of(values, qu, qv, damping[:, 0])  # all rows alike: a parameter is whole columns

    def relative_inverse(self, damping: float, results: Sequence[Tensor | None] | None = None) -> Inverse:
        u, v = self.factors
        of_u = 0 if results is None or is_diagonal(u) else len(pieces_of(u))
        done = list(results or ())
        return KroneckerInverse(
            relative_inverse(u, damping, done[:of_u]), relative_inverse(v, damping, done[of_u:], self.own_columns)
        )

    def factor_jobs(self, damping: float) -> list[Job]:
        return [
            Job(
                len(m) * m.shape[-1] ** 3,
                m,
                partial(relative_system, side, i, damping, own),
            )
            for side, own in zip(self.factors, (0, self.own_columns))
            if not is_diagonal(side)
            for i, m in enumerate(pieces_of(side))
        ]

    def bias_scale(self) -> Tensor:
        """Return the second moment of a bias's input over the mean of the others, 1 at most, a scalar."""
        found: Tensor = self.cached("bias scale", self._bias_scale)
        return found

    def _bias_scale(self) -> Tensor:
        diagonal, width = diagonal_of(self.v), self.shape[2] - self.own_columns
        inputs, biases = diagonal[..., :width].mean(), diagonal[..., width:].mean()
        return torch.where((inputs > 0) & (biases > 0), biases / inputs, 1.0).clamp(max=1)

    def newton_scale(self) -> Tensor:
        u, v = self.factors
        return diagonal_of(u).mean() * diagonal_of(v).mean()

    def diagonal(self) -> Tensor:
        u, v = map(diagonal_of, self.factors)
        return u[..., :, None] * v[..., None, :]

    def trace(self) -> Tensor:
        u, v = map(trace_of, self.factors)
        return (u * v).sum()

    def logdet(self, damping: Number) -> Tensor:
        made = self.inverse(damping)
        return -(made.logdet() if isinstance(made, Columns) else made.scale.log().sum())

    def sample(self, z: Tensor, damping: Number) -> Tensor:
        made = self.inverse(damping)
        if isinstance(made, Columns):
            return made.root(z)
        return out_of_basis(into_basis(z, made.qu, made.qv) * made.scale.sqrt(), made.qu, made.qv)

    def inverse_diagonal(self, damping: Number) -> Tensor:
        made = self.inverse(damping)
        return made.diagonal() if isinstance(made, Columns) else overlapped(made.scale, made.qu, made.qv)

    def eigenvalues(self) -> Tensor:
        return self.eigen()[0].flatten()

    def sizes(self) -> str:
        groups, out, into = self.shape
        sides = " ⊗ ".join(size_text(p, d) for p, d in zip(self.kept, (out, into)))
        return sides + (f" × {groups}" if groups > 1 else "")


class InputBlock(KroneckerBlock):
    """c·I ⊗ V."""

    structure = "input"
    inputs_alone = True

    def _sides(self) -> tuple[Tensor, Tensor]:
        u, v = super()._sides()
        return u.mean(-1, keepdim=True).expand_as(u), v


def kept_rows(d: int, max_factor_dim: int | None, trains: bool = False) -> int:
    """Rows of the pieces that a side of length d is kept in: d for the whole matrix, 1 for its diagonal.

    >>> [kept_rows(d, None, trains=True) for d in (250, 785, 5000)], kept_rows(785, None)
    ([250, 197, 1], 785)
    """
    if max_factor_dim is not None:
        return rows_of_pieces(d, max_factor_dim)
    if d > FULL_FACTOR_DIM:
        return 1
    return rows_of_pieces(d, TRAINING_FACTOR_DIM if trains else FULL_FACTOR_DIM)


def size_text(p: int, d: int) -> str:
    """What a side takes.

    >>> size_text(9, 9), size_text(1, 9), size_text(3, 9), size_text(4, 9)
    ('9²', 'diag 9', '3·3²', '(2·4² + 1²)')
    """
    if d == 1:
        return "1"
    if p == 1:
        return f"diag {d}"
    pieces, rest = divmod(d, p)
    equal = f"{pieces}·{p}²" if pieces > 1 else f"{p}²"
    return f"({equal} + {rest}²)" if rest else equal


def beside(share: Tensor) -> Tensor:
    """(groups,) beside (groups, ·, ·)"""
    return share[:, None, None]
