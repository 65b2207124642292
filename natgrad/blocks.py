"""Blocks: the curvature of one layer (or of several together) in one structure.

With G_n the gradient matrix of datum n (d_out, d_in), the block of the Fisher matrix is (1/m) Σ_n vec(G_n) vec(G_n)ᵀ
over all cotangents drawn. The structures keep

- dense      all of it, over one layer or several (`DenseBlock`);
- diagonal   its diagonal, (1/m) Σ_n G_n∘G_n (`DiagonalBlock`);
- kfac       U ⊗ V with U = (1/m) Σ g gᵀ and V = mean a aᵀ over rows (`KroneckerBlock`). "expand" takes every position
             as a row of its own; "reduce" first sums g and averages a over the positions of a datum (Eschenhagen et
             al. 2023, arXiv:2311.00636, eqs. 21 and 22). U carries the scale of the loss; V is a mean.

A block works in its own *coordinates*, a tensor with any leading dimensions; `pack` and `unpack` convert from and to
named tensors. Statistics, damping and inverse are three things: damping is never written into the statistics, and an
`Inverse` is factorised once and applied many times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from natgrad.capture import Piece
from natgrad.kronecker import damped_inverse, factored_inverses, kron_apply, mean_eigenvalue, safe_eigh
from natgrad.ops import View

CHUNK = 2**24  # numbers held at once where per-datum gradients are formed


@dataclass
class Layer:
    """A weight and its biases, or one of them, as a stack of matrices (groups, d_out, d_in) with a column for each
    bias.
    """

    op: str
    view: View
    weight: Piece | None
    biases: list[Piece]
    shapes: Mapping[str, torch.Size]

    @property
    def pieces(self) -> list[Piece]:
        return [p for p in (self.weight, *self.biases) if p is not None]

    @property
    def names(self) -> set[str]:
        return {p.name for p in self.pieces}

    @property
    def key(self) -> Piece:
        return self.pieces[0]

    @property
    def matrix_shape(self) -> torch.Size:
        """(groups, d_out, d_in)"""
        return self.pack({n: torch.empty(s, device="meta") for n, s in self.shapes.items()}).shape

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """{name: (…, *shape)} → (…, groups, d_out, d_in)"""
        columns = [self.view.bias(self._slice(b, tensors)) for b in self.biases]
        if self.weight is not None:
            columns.insert(0, self.view.matrix(self._slice(self.weight, tensors)))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def unpack(self, m: Tensor, into: Mapping[str, Tensor]) -> None:
        """(…, groups, d_out, d_in) → written into {name: (…, *shape)}"""
        width = m.shape[-1] - len(self.biases)
        if self.weight is not None:
            target = self._slice(self.weight, into)
            target.copy_(self.view.weight(m[..., :width]).reshape(target.shape))
        for i, b in enumerate(self.biases):
            target = self._slice(b, into)
            target.copy_(m[..., width + i].reshape(target.shape))

    def views(self, m: Tensor) -> dict[str, Tensor]:
        """(…, groups, d_out, d_in) → {name: (…, *shape)} without a copy where the layout allows it."""
        m = m.reshape(*m.shape[: m.dim() - 3], *self.matrix_shape) if m.shape[-3:] != self.matrix_shape else m
        width = m.shape[-1] - len(self.biases)
        out = {} if self.weight is None else {self.weight.name: self.view.weight(m[..., :width])}
        for i, b in enumerate(self.biases):
            out[b.name] = m[..., width + i].reshape(*m.shape[:-3], -1)
        return {n: t.reshape(*t.shape[: m.dim() - 3], *self.shapes[n]) for n, t in out.items()}

    def _slice(self, piece: Piece, tensors: Mapping[str, Tensor]) -> Tensor:
        return piece.of(tensors, tensors[piece.name].dim() - len(self.shapes[piece.name]))


@dataclass
class Use:
    """One call of a layer in canonical form, with the gradient of one cotangent."""

    a: Tensor  # (data, positions, groups, d_in), bias columns included
    g: Tensor  # (data, positions, groups, d_out)

    def gradients(self) -> Tensor:
        """Per-datum gradients (data, groups, d_out, d_in)."""
        if self.a.shape[1] == 1:
            return self.g[:, 0, :, :, None] * self.a[:, 0, :, None, :]
        return torch.einsum("npgo,npgi->ngoi", self.g, self.a)

    def narrow(self, start: int, length: int) -> Use:
        return Use(self.a.narrow(0, start, length), self.g.narrow(0, start, length))


@dataclass
class Average:
    """Σ_h S_h / M_h: sums of statistics over their masses, one pair for each source of terms h (one a criterion)."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    masses: dict[str, Tensor] = field(default_factory=dict)

    def add(self, total: Tensor, mass: Tensor | None, source: str = "") -> None:
        """`mass` None: a plain sum, which is never divided."""
        if source not in self.sums:
            self.sums[source] = total
            self.masses[source] = total.new_ones(()) if mass is None else mass.to(total)
            return
        self.sums[source] = self.sums[source] + total
        if mass is not None:
            self.masses[source] = self.masses[source] + mass.to(total)

    def merge(self, other: Average, plain: bool) -> None:
        for source, total in other.sums.items():
            self.add(total, None if plain else other.masses[source], source)

    def value(self) -> Tensor:
        parts = [torch.where(self.masses[h] > 0, s / self.masses[h], torch.zeros_like(s)) for h, s in self.sums.items()]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def fold(self, new: Average, decay: float) -> None:
        """value ← decay·value + (1 − decay)·new value."""
        fresh = new.value()
        mixed = fresh if not self.sums or decay == 0 else torch.lerp(self.value(), fresh, 1 - decay)
        self.sums, self.masses = {"": mixed}, {"": mixed.new_ones(())}


Statistics = dict[str, Average]


class Inverse:
    """A factorised (curvature + damping)⁻¹."""

    def apply(self, x: Tensor) -> Tensor:
        """Coordinates (…, *shape) of a covector → coordinates of a tangent vector."""
        raise NotImplementedError


class Block:
    """The protocol of a structure. Subclasses name their statistics and define the verbs in coordinates.

    ``damping`` is absolute and exact: (curvature + damping·I).
    """

    structure: str
    needs_data = True  # whether statistics need the rows of each datum apart

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        self.statistics: Statistics = {}
        self.version = 0  # rises whenever the statistics change
        self._cache: dict[str, tuple[int, Any]] = {}
        self._inverse: tuple[int, float, Inverse] | None = None

    @property
    def pieces(self) -> list[Piece]:
        return [p for layer in self.layers for p in layer.pieces]

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics."""
        return next(s.dtype for a in self.statistics.values() for s in a.sums.values())

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(p.name for p in self.pieces))

    # statistics

    def observe(self, uses: Sequence[Sequence[Use]], mass: Tensor | None, source: str, first: bool) -> Statistics:
        """Statistics of one set of cotangents; ``uses[i]`` are the calls of layer i. `first`: the inputs are not yet
        counted.
        """
        raise NotImplementedError

    def unused(self, mass: Tensor | None, source: str) -> Statistics:
        """Statistics of data that do not use the block: zero. Nothing where none were taken before."""
        new: Statistics = {}
        for key, average in self.statistics.items():
            if not self.is_mean(key):
                zero = torch.zeros_like(next(iter(average.sums.values())))
                new[key] = Average({source: zero}, {source: zero.new_ones(()) if mass is None else mass.to(zero)})
        return new

    def commit(self, new: Statistics, decay: float | None, plain: bool) -> None:
        """Add statistics to the average (`decay` None) or fold them into a moving one."""
        for key, average in new.items():
            mine = self.statistics.setdefault(key, Average())
            if decay is None:
                mine.merge(average, plain and not self.is_mean(key))
            else:
                mine.fold(average, decay)
        self.version += 1

    def is_mean(self, key: str) -> bool:
        """Whether a statistic is a mean over rows whatever the reduction of the loss."""
        return False

    def value(self, key: str) -> Tensor:
        return self.cached("value " + key, lambda: self.statistics[key].value())

    def cached(self, key: str, compute: Any) -> Any:
        """`compute()`, kept until the statistics change."""
        version, value = self._cache.get(key, (-1, None))
        if version != self.version:
            value = compute()
            self._cache[key] = (self.version, value)
        return value

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow parameters that were moved or cast."""
        for average in self.statistics.values():
            for held in (average.sums, average.masses):
                for source, t in held.items():
                    if t.device != device or t.dtype != dtype:
                        held[source] = t.to(device, dtype)
                        self._cache = {}
                        self.version += 1

    # coordinates

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def unpack(self, x: Tensor, into: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def named(self, x: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Coordinates → {name: tensor shaped like the parameter}: views where one layer holds the whole parameter."""
        if len(self.layers) == 1 and all(p.rows is None for p in self.pieces):
            return self.layers[0].views(x)
        out = {n: torch.zeros_like(parameters[n]) for n in self.names}
        self.unpack(x, out)
        return out

    # verbs

    def flat(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def inverse(self, damping: float) -> Inverse:
        raise NotImplementedError

    def kept_inverse(self, damping: float) -> Inverse:
        """`inverse`, kept for as long as neither the statistics nor the damping change."""
        if self._inverse is None or self._inverse[:2] != (self.version, damping):
            self._inverse = (self.version, damping, self.inverse(damping))
        return self._inverse[2]

    def relative_inverse(self, damping: float) -> Inverse:
        """The inverse with damping relative to the mean eigenvalue; a structure may split it between its factors."""
        mean = float(self.trace()) / self.dimension
        return self.inverse(damping * mean if mean > 0 else 1.0)

    def diagonal(self) -> Tensor:
        raise NotImplementedError

    def logdet(self, damping: float) -> Tensor:
        raise NotImplementedError

    def sample(self, z: Tensor, damping: float) -> Tensor:
        """(curvature + damping·I)^{-1/2} z, by any root."""
        raise NotImplementedError

    def trace(self) -> Tensor:
        return self.diagonal().sum()

    @property
    def dimension(self) -> int:
        raise NotImplementedError

    def sizes(self) -> str:
        """Sizes of what is stored, for the coverage table."""
        raise NotImplementedError

    def memory(self) -> int:
        """Bytes of the statistics."""
        return sum(s.numel() * s.element_size() for a in self.statistics.values() for s in a.sums.values())


class JointBlock(Block):
    """Blocks whose coordinates are one flat vector over all their layers."""

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([layer.pack(tensors).flatten(-3) for layer in self.layers], dim=-1)

    def unpack(self, x: Tensor, into: Mapping[str, Tensor]) -> None:
        for layer, part, shape in zip(self.layers, x.split(self.widths, dim=-1), self.shapes):
            layer.unpack(part.reshape(*x.shape[:-1], *shape), into)

    @property
    def shapes(self) -> list[torch.Size]:
        return self.cached("shapes", lambda: [layer.matrix_shape for layer in self.layers])

    @property
    def widths(self) -> list[int]:
        return [s.numel() for s in self.shapes]

    @property
    def dimension(self) -> int:
        return sum(self.widths)

    def per_datum(self, uses: Sequence[Sequence[Use]]) -> Any:
        """Chunks (data, P) of per-datum gradients."""
        first = next(u for calls in uses for u in calls)
        data = first.a.shape[0]
        step = max(1, CHUNK // max(1, self.dimension))
        for start in range(0, data, step):
            length = min(step, data - start)
            parts = []
            for calls, width in zip(uses, self.widths):
                if not calls:
                    parts.append(first.g.new_zeros(length, width))
                    continue
                total = calls[0].narrow(start, length).gradients()
                for use in calls[1:]:
                    total = total + use.narrow(start, length).gradients()
                parts.append(total.flatten(1))
            yield parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class DenseBlock(JointBlock):
    """The full matrix of one layer or of several."""

    structure = "dense"

    def observe(self, uses: Sequence[Sequence[Use]], mass: Tensor | None, source: str, first: bool) -> Statistics:
        if not any(uses):
            return self.unused(mass, source)
        average = Average()
        for rows in self.per_datum(uses):
            average.add(rows.mT @ rows, None, source)
        average.masses[source] = average.masses[source] if mass is None else mass.to(average.sums[source])
        return {"matrix": average}

    def extend(self, layer: Layer) -> None:
        """Take in a layer first used now; over the data seen before, its gradient was zero."""
        before = self.dimension
        self.layers.append(layer)
        self.version += 1
        grow = self.dimension - before
        for average in self.statistics.values():
            average.sums = {h: torch.nn.functional.pad(s, (0, grow, 0, grow)) for h, s in average.sums.items()}

    @property
    def matrix(self) -> Tensor:
        return self.value("matrix")

    def flat(self, x: Tensor) -> Tensor:
        return x @ self.matrix

    def inverse(self, damping: float) -> Inverse:
        return DenseInverse(damped_inverse(self.matrix, damping))

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal()

    def logdet(self, damping: float) -> Tensor:
        return (self.eigen()[0] + damping).log().sum()

    def sample(self, z: Tensor, damping: float) -> Tensor:
        values, vectors = self.eigen()
        return (z @ vectors * (values + damping).rsqrt()) @ vectors.mT

    def eigen(self) -> tuple[Tensor, Tensor]:
        return self.cached("eigen", lambda: safe_eigh(self.matrix))

    def sizes(self) -> str:
        return f"{self.dimension}²"


class DiagonalBlock(JointBlock):
    """The diagonal alone."""

    structure = "diagonal"

    def observe(self, uses: Sequence[Sequence[Use]], mass: Tensor | None, source: str, first: bool) -> Statistics:
        if not any(uses):
            return self.unused(mass, source)
        average = Average()
        for rows in self.per_datum(uses):
            average.add(rows.square().sum(0), None, source)
        average.masses[source] = average.masses[source] if mass is None else mass.to(average.sums[source])
        return {"diagonal": average}

    def flat(self, x: Tensor) -> Tensor:
        return x * self.diagonal()

    def inverse(self, damping: float) -> Inverse:
        return DiagonalInverse(1 / (self.diagonal() + damping))

    def diagonal(self) -> Tensor:
        return self.value("diagonal")

    def logdet(self, damping: float) -> Tensor:
        return (self.diagonal() + damping).log().sum()

    def sample(self, z: Tensor, damping: float) -> Tensor:
        return z * (self.diagonal() + damping).rsqrt()

    def sizes(self) -> str:
        return f"{self.dimension}"


class KroneckerBlock(Block):
    """U ⊗ V of one layer, a pair for each group. Coordinates: (…, groups, d_out, d_in)."""

    structure = "kfac"

    def __init__(self, layers: Sequence[Layer], sharing: str = "expand") -> None:
        super().__init__(layers)
        (self.layer,) = self.layers
        self.sharing = sharing
        self.needs_data = sharing == "reduce"

    def observe(self, uses: Sequence[Sequence[Use]], mass: Tensor | None, source: str, first: bool) -> Statistics:
        if not uses[0]:
            return self.unused(mass, source)
        u, v = Average(), Average()
        for use in uses[0]:
            a, g = use.a, use.g
            if self.sharing == "reduce":
                a, g = a.mean(1, keepdim=True), g.sum(1, keepdim=True)
            u.add(second_moment(g), None, source)
            if first:
                rows = a.new_tensor(float(a.shape[0] * a.shape[1]))
                v.add(second_moment(a), rows)
        if mass is not None:
            u.masses[source] = mass.to(u.sums[source])
        return {"U": u, "V": v} if first else {"U": u}

    def is_mean(self, key: str) -> bool:
        return key == "V"

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.layer.pack(tensors)

    def unpack(self, x: Tensor, into: Mapping[str, Tensor]) -> None:
        self.layer.unpack(x, into)

    @property
    def matrix_shape(self) -> torch.Size:
        """(groups, d_out, d_in)"""
        return self.layer.matrix_shape

    @property
    def u(self) -> Tensor:
        """(groups, d_out, d_out)"""
        return self.value("U")

    @property
    def v(self) -> Tensor:
        """(groups, d_in, d_in)"""
        return self.value("V")

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues u_i v_j (groups, d_out, d_in) and eigenvectors of both factors."""
        return self.cached("eigen", self._eigen)

    def _eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        (lu, qu), (lv, qv) = safe_eigh(self.u), safe_eigh(self.v)
        return lu[..., :, None] * lv[..., None, :], qu, qv

    def flat(self, x: Tensor) -> Tensor:
        return kron_apply(self.u, x, self.v)

    def inverse(self, damping: float) -> Inverse:
        values, qu, qv = self.eigen()
        return EigenInverse(1 / (values + damping), qu, qv)

    def relative_inverse(self, damping: float) -> Inverse:
        return KroneckerInverse(*factored_inverses(self.u, self.v, damping))

    def diagonal(self) -> Tensor:
        return self.u.diagonal(dim1=-2, dim2=-1)[..., :, None] * self.v.diagonal(dim1=-2, dim2=-1)[..., None, :]

    def trace(self) -> Tensor:
        out, into = self.u.shape[-1], self.v.shape[-1]
        return (mean_eigenvalue(self.u) * out * mean_eigenvalue(self.v) * into).sum()

    def logdet(self, damping: float) -> Tensor:
        return (self.eigen()[0] + damping).log().sum()

    def sample(self, z: Tensor, damping: float) -> Tensor:
        values, qu, qv = self.eigen()
        return qu @ ((qu.mT @ z @ qv) * (values + damping).rsqrt()) @ qv.mT

    @property
    def dimension(self) -> int:
        return self.u.shape[0] * self.u.shape[-1] * self.v.shape[-1]

    def sizes(self) -> str:
        groups = self.u.shape[0]
        return f"{self.u.shape[-1]}² ⊗ {self.v.shape[-1]}²" + (f" × {groups}" if groups > 1 else "")


def second_moment(rows: Tensor) -> Tensor:
    """(data, positions, groups, d) → Σ r rᵀ (groups, d, d)"""
    stacked = rows.permute(2, 0, 1, 3).reshape(rows.shape[2], -1, rows.shape[3])
    return stacked.mT @ stacked


@dataclass
class DenseInverse(Inverse):
    matrix: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.matrix


@dataclass
class DiagonalInverse(Inverse):
    scale: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale


@dataclass
class EigenInverse(Inverse):
    """Q_U [ (Q_Uᵀ X Q_V) ∘ scale ] Q_Vᵀ"""

    scale: Tensor
    qu: Tensor
    qv: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return self.qu @ ((self.qu.mT @ x @ self.qv) * self.scale) @ self.qv.mT


@dataclass
class KroneckerInverse(Inverse):
    u: Tensor
    v: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return kron_apply(self.u, x, self.v)
