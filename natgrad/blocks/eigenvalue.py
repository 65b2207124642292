"""ekfac: the eigenbases of the Kronecker factors with eigenvalues of their own.

Q_U, Q_V are the eigenvectors of U and V, S = (1/m) Σ_n (Q_Uᵀ G_n Q_V)², G_n the gradient of datum n summed over
positions and calls: the diagonal of the block in that basis (George et al. 2018, arXiv:1806.03884). When the basis
moves, Q → Q', S follows by squared overlaps, S' = (R_U∘R_U) S (R_V∘R_V)ᵀ with R = Q'ᵀ Q, which keeps the trace.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from natgrad.blocks.average import Average, Statistics
from natgrad.blocks.base import CHUNK, Job
from natgrad.blocks.kronecker import KroneckerBlock
from natgrad.capture.layers import LayerIO, sum_of_squared_gradients
from natgrad.linalg.block_diagonal import across
from natgrad.linalg.inverse import EigenInverse, Inverse, into_basis, out_of_basis, overlapped
from natgrad.linalg.kronecker import eigen_of, per


class EigenvalueBlock(KroneckerBlock):
    """S in the eigenbases of U and V."""

    structure = "ekfac"
    two_pass = True

    def shapes_of_statistics(self) -> dict[str, tuple[int, ...]]:
        bases = {f"Q_{side}": self._shape(side) for side in "UV"}
        return {**super().shapes_of_statistics(), **bases, "S": tuple(self.shapes[0])}

    def choose_basis(self, new: Statistics, added: bool, plain: bool) -> None:
        """Choose the basis of the second look: that of everything up to now, or the one in force if that may move."""
        if not new:
            return
        if added or not self.statistics:
            twin = EigenvalueBlock(self.layers, self.sharing, self.max_factor_dim, self.trains)
            factors = [{k: a for k, a in s.items() if k in ("U", "V", "U′", "V′")} for s in (self.statistics, new)]
            twin.statistics = self.merged([s for s in factors if s], plain)
            bases = [eigen_of(side)[1] for side in (twin.u, twin.v)]
        else:
            bases = [self.basis("Q_U"), self.basis("Q_V")]
        for key, q in zip(("Q_U", "Q_V"), bases):
            if q is not None:
                new[key] = Average({"": q}, {"": q.new_ones(())})

    def second_pass(
        self, new: Statistics, uses: Sequence[Sequence[LayerIO]], mass: Tensor | None, source: str, like: Tensor
    ) -> None:
        if not new:
            return
        average = Average()
        qu, qv = basis_of(new, "Q_U"), basis_of(new, "Q_V")
        average.add(like.new_zeros(self.shape), None, source)
        if uses[0]:
            most = max(1, CHUNK // max(1, self.dimension))
            average.add(sum_of_squared_gradients(uses[0], self.shape[0], most, (qu, qv)), None, source)
        average.weigh(mass, source)
        if "S" in new:
            new["S"].merge(average, plain=source in new["S"].sums)
        else:
            new["S"] = average

    def merged(self, parts: Sequence[Statistics], plain: bool) -> Statistics:
        bases = {k: a for k, a in parts[-1].items() if k in ("Q_U", "Q_V")}
        rest = [turned(p, bases) for p in parts]
        return {**super().merged(rest, plain), **bases}

    def commit(self, new: Statistics, decay: float | None, plain: bool) -> None:
        bases = {k: a for k, a in new.items() if k in ("Q_U", "Q_V")}
        old = self.statistics
        self.statistics = {k: a for k, a in old.items() if k not in ("Q_U", "Q_V")}
        super().commit({k: a for k, a in new.items() if k not in ("Q_U", "Q_V", "S")}, decay, plain)
        if decay is not None and old:  # the factors moved between the second look and now
            for key, side in (("Q_U", self.u), ("Q_V", self.v)):
                if (q := eigen_of(side)[1]) is not None:
                    bases[key] = Average({"": q}, {"": q.new_ones(())})
        if "S" in old:
            self.statistics["S"] = turned(old, bases)["S"]
        super().commit({"S": turned(new, bases)["S"]}, decay, plain)
        self.statistics.update(bases)
        self.version += 1

    def basis(self, key: str) -> Tensor | None:
        return basis_of(self.statistics, key)

    def _eigen(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.value("S"), self.basis("Q_U"), self.basis("Q_V")

    def flat(self, x: Tensor) -> Tensor:
        values, qu, qv = self.eigen()
        return out_of_basis(into_basis(x, qu, qv) * values, qu, qv)

    def factor_jobs(self, damping: float) -> list[Job]:
        return []  # the basis is found where the statistics are taken

    def relative_inverse(self, damping: float, results: Sequence[Tensor | None] | None = None) -> Inverse:
        values, qu, qv = self.eigen()
        mean = values.mean()
        return EigenInverse(1 / (values * per(mean) + damping), qu, qv)

    def newton_scale(self) -> Tensor:
        mean: Tensor = self.value("S").mean()
        return mean

    def diagonal(self) -> Tensor:
        values, qu, qv = self.eigen()
        return overlapped(values, qu, qv)

    def trace(self) -> Tensor:
        return self.value("S").sum()

    def sizes(self) -> str:
        groups, out, into = self.shape
        return super().sizes() + f" + {out}·{into}" + (f" × {groups}" if groups > 1 else "")


def basis_of(statistics: Statistics, key: str) -> Tensor | None:
    return statistics[key].sums[""] if key in statistics else None


def turned(statistics: Statistics, bases: Statistics) -> Statistics:
    """Statistics with S brought to other bases by squared overlaps."""
    overlaps = []
    for key in ("Q_U", "Q_V"):
        q, to = basis_of(statistics, key), basis_of(bases, key)
        overlaps.append(None if q is to or q is None or to is None else across(to, q))
    if all(r is None for r in overlaps):
        return statistics
    moved = statistics["S"].copy()
    moved.sums = {h: overlapped(s, *overlaps) for h, s in moved.sums.items()}
    return {**statistics, "S": moved}
