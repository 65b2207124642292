"""Blocks: the curvature of one layer (or of several together) in one structure.

With G_n the gradient matrix of datum n (d_out, d_in), the block of the Fisher matrix is (1/m) Σ_n vec(G_n) vec(G_n)ᵀ
over all cotangents drawn. The structures keep

- dense      all of it, over one layer or several (`DenseBlock`);
- diagonal   its diagonal, (1/m) Σ_n G_n∘G_n (`DiagonalBlock`);
- kfac, ekfac, input: products of two small matrices, see `natgrad.blocks.kronecker`.

A block works in its own *coordinates*, a tensor with any leading dimensions; `pack` and `unpack` convert from and to
named tensors. Statistics, damping and inverse are three things: damping is never written into the statistics, and an
`Inverse` is factorised once and applied many times.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.average import Average, Statistics
from natgrad.capture.layers import Layer, LayerIO, summed_gradients
from natgrad.capture.parameters import ParameterSlice
from natgrad.linalg import kronecker
from natgrad.linalg.inverse import Inverse
from natgrad.linalg.kronecker import FactorisationError, negligible
from natgrad.metric.damping import Number, Resolved, full, same, together

VALUE = "value of "  # begins the keys under which statistics are kept as they are computed with
CHUNK = 2**24  # numbers held at once where per-datum gradients are formed
MAX_FAILURES = 5  # factorisations of a block that may fail in a row


@dataclass
class Job:
    """One expensive part of an inverse that another rank may do."""

    cost: float  # multiplications
    like: Tensor  # of the shape, dtype and device of the result
    system: Callable[[], tuple[Tensor, float]]  # gives (M, a), where the result is (M + aI)⁻¹
    relative: bool = True  # whether a follows from the damping alone, so that several can be found at once

    def compute(self) -> Tensor:
        return kronecker.damped_inverse(*self.system())


class Block:
    """The protocol of a structure. Subclasses name their statistics and define the verbs in coordinates.

    ``damping`` is absolute and exact: (curvature + damping·I), or a tensor of the coordinates' shape with a number for
    each, the same for all entries of a parameter. Gradients go through it.
    """

    structure: str
    joins = False  # whether one block is over all layers of this structure; `extend` takes in one more
    needs_data = True  # whether statistics need the rows of each datum apart
    reduces = False  # whether that is for means and sums over the positions of a datum alone

    def __init__(
        self, layers: Sequence[Layer], sharing: str = "expand", max_factor_dim: int | None = None, trains: bool = False
    ) -> None:
        self.sharing, self.max_factor_dim, self.trains = sharing, max_factor_dim, trains  # Kronecker structures ask
        self.key = str(layers[0].key)  # what the block is known by, whatever grows
        self.take(layers)
        self.statistics: Statistics = {}
        self.version = 0  # rises whenever the statistics change
        self.owner: int | None = None  # the rank that alone keeps the statistics, where the model is sharded
        self.is_remote = False  # the statistics are there, at the owner
        self._cache: dict[str, tuple[int, Any]] = {}
        self._inverse: tuple[int, Number, Inverse] | None = None
        self.last_inverse: Inverse | None = None  # the last good `relative_inverse`
        self._last_made: tuple[int, float] = (-1, 0.0)  # (version, damping) that it belongs to
        self.failures = 0  # factorisations in a row that failed

    def extend(self, layer: Layer) -> None:
        """Take in a layer first used now; over the data seen before, its gradient was zero."""
        raise NotImplementedError(f"{type(self).__name__} does not define extend")

    def take(self, layers: Sequence[Layer]) -> None:
        """Be over these layers."""
        self.layers = list(layers)
        self.shapes = [layer.matrix_shape for layer in layers]  # (groups, d_out, d_in)
        self.shape = self.shapes[0]  # of the coordinates
        self.dimension = sum(shape.numel() for shape in self.shapes)
        self.pieces: list[ParameterSlice] = [p for layer in layers for p in layer.pieces]
        self.names = list(dict.fromkeys(p.name for p in self.pieces))  # of its parameters
        self._in_views = len(self.layers) == 1 and not any(p.ranges for p in self.pieces)  # its coordinates are

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics, as they are computed with."""
        return next(s.dtype for a in self.statistics.values() for s in a.sums.values())

    @property
    def known(self) -> bool:
        """Whether there are statistics, here or at the owner."""
        return bool(self.statistics) or self.is_remote

    # statistics

    def observe(self, uses: Sequence[Sequence[LayerIO]], mass: Tensor | None, source: str, like: Tensor) -> Statistics:
        """Statistics of one set of cotangents; ``uses[i]`` are the calls of layer i, none where it was not used.

        `like`: a tensor of the dtype and device of the statistics.
        """
        raise NotImplementedError

    # structures whose statistics need a basis that depends on the other statistics look at the data twice

    two_pass = False

    def choose_basis(self, new: Statistics, added: bool, plain: bool) -> None:
        """Between the two looks. `added`: what is new will be added to the statistics as they are now."""

    def second_pass(
        self, new: Statistics, uses: Sequence[Sequence[LayerIO]], mass: Tensor | None, source: str, like: Tensor
    ) -> None:
        """The second look at one set of cotangents."""

    def merged(self, parts: Sequence[Statistics], plain: bool) -> Statistics:
        """Statistics of several batches together; sources with a mass are weighed by it."""
        if len(parts) == 1:
            return parts[0]
        out: Statistics = {}
        for part in parts:
            for key, average in part.items():
                out.setdefault(key, Average()).merge(average, plain and not self.is_mean(key))
        return out

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
        """Whether a statistic does not scale with the loss, whatever its reduction."""
        return False

    def is_symmetric(self, key: str) -> bool:
        """Whether a statistic is a stack of symmetric matrices, or of blocks along their diagonals."""
        return False

    def backdate(self, new: Statistics, masses: Mapping[str, Tensor]) -> None:
        """Over the data seen before this block was first used, its gradient was zero."""
        for key, average in new.items():
            for source, mass in masses.items():
                if source in average.masses and not self.is_mean(key):
                    average.masses[source] = average.masses[source] + mass.to(average.masses[source])

    def forget(self) -> None:
        """Let go of what was computed from the statistics."""
        self._cache, self._inverse, self.last_inverse = {}, None, None
        self.version += 1

    def release(self) -> None:
        """Let go of the values of the statistics, which are their size again."""
        self._cache = {k: v for k, v in self._cache.items() if not k.startswith(VALUE)}

    def value(self, key: str) -> Tensor:
        return self.cached(VALUE + key, lambda: self.statistics[key].value())

    def cached(self, key: str, compute: Any) -> Any:
        """`compute()`, kept until the statistics change."""
        version, value = self._cache.get(key, (-1, None))
        if version != self.version:
            value = compute()
            self._cache[key] = (self.version, value)
        return value

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow parameters that were moved or cast."""
        moved = [average.move(device, dtype) for average in self.statistics.values()]
        if any(moved):
            self._cache = {}
            self.version += 1

    # coordinates

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.layers[0].pack(tensors)

    def matrices(self, x: Tensor) -> list[Tensor]:
        """Return coordinates as the matrix (…, groups, d_out, d_in) of each layer, without a copy."""
        return [x]

    def unpack(self, x: Tensor, into: Mapping[str, Tensor]) -> None:
        for layer, m in zip(self.layers, self.matrices(x)):
            layer.unpack(m, into)

    def named(self, x: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Coordinates → {name: tensor shaped like the parameter}: views where one layer holds the whole parameter."""
        if self._in_views:
            return self.layers[0].views(self.matrices(x)[0])
        out = {n: torch.zeros_like(parameters[n]) for n in self.names}
        self.unpack(x, out)
        return out

    # verbs

    def flat(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def inverse(self, damping: Number) -> Inverse:
        raise NotImplementedError

    def kept_inverse(self, damping: Number) -> Inverse:
        """`inverse`, kept for as long as neither the statistics nor the damping change."""
        held = self._inverse
        if held is not None and held[0] == self.version and same(held[1], damping):
            return held[2]
        made = self.inverse(damping)
        if not (isinstance(damping, Tensor) and damping.requires_grad):  # whose graph is to go
            self._inverse = (self.version, damping, made)
        return made

    def damping_of(self, damping: Resolved, parameters: Mapping[str, Tensor]) -> Number:
        """Return the damping of this block: one number, or one for each coordinate."""
        if not isinstance(damping, dict):
            return damping
        mine = {n: damping[n] for n in self.names}
        one = together(mine.values(), mine)
        if not isinstance(one, dict):
            return one
        held = {n: parameters[n] for n in self.names}
        return self.pack(full(mine, held, torch.empty((), dtype=self.dtype, device=held[self.names[0]].device)))

    def relative_inverse(self, damping: float, results: Sequence[Tensor | None] | None = None) -> Inverse:
        """The inverse with damping relative to the mean eigenvalue; a structure may split it between its factors.

        `results`: of the `factor_jobs`, where they have been done elsewhere; None for one that is to be done here.
        """
        return self.inverse(self.relative_to_mean(damping))

    def is_stale(self, damping: float) -> bool:
        """Whether the last inverse is of other statistics or another damping."""
        return self.last_inverse is None or self._last_made != (self.version, damping)

    def good_inverse(self, damping: float, make: Callable[[], Inverse] | None = None) -> Inverse:
        """Return `relative_inverse` for the present statistics, or the last good one where it cannot be had.

        Args:
            make: gives it, where the work is shared.

        Raises:
            FactorisationError: it failed several times in a row, or there is no earlier one.
        """
        if self.is_stale(damping):
            try:
                self.last_inverse, self.failures = self.relative_inverse(damping) if make is None else make(), 0
            except FactorisationError as error:
                self.failures += 1
                if self.last_inverse is None or self.failures >= MAX_FAILURES:
                    raise FactorisationError(
                        f"block of {self.names}: {error} ({self.failures} times in a row)"
                    ) from error
                if self.failures == 1:
                    warnings.warn(
                        f"block of {self.names}: {error}; the last good factor is kept. Repeats are counted in "
                        "opt.info['kept_factors']",
                        stacklevel=2,
                    )
            self._last_made = (self.version, damping)
        assert self.last_inverse is not None
        return self.last_inverse

    def factor_jobs(self, damping: float) -> list[Job]:
        """The expensive parts of `relative_inverse`; none where it is cheap."""
        return []

    def newton_scale(self) -> Tensor:
        """How many times the inverse of the curvature, scale and all, `relative_inverse` is, damping aside: a scalar, 1
        unless that inverts factors divided by their mean eigenvalues. 0 where the curvature is, which has no inverse.
        """
        trace = self.trace()
        return (trace > 0).to(trace)

    def sides(self) -> list[tuple[int, ...]]:
        """Shapes of the statistics, known before there are any; of (…, p, d) with p > 1 each piece is inverted."""
        raise NotImplementedError

    def shapes_of_statistics(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each statistic that the block may have, by its key."""
        raise NotImplementedError

    def relative_to_mean(self, damping: float) -> float:
        mean = float(self.trace()) / self.dimension
        return damping * mean if mean > negligible(self.dtype) else 1.0

    def diagonal(self) -> Tensor:
        raise NotImplementedError

    def logdet(self, damping: Number) -> Tensor:
        raise NotImplementedError

    def sample(self, z: Tensor, damping: Number) -> Tensor:
        """(curvature + damping·I)^{-1/2} z, by any root."""
        raise NotImplementedError

    def inverse_diagonal(self, damping: Number) -> Tensor:
        """The diagonal of (curvature + damping·I)⁻¹, in coordinates."""
        raise NotImplementedError

    def eigenvalues(self) -> Tensor:
        """(dimension,), in no order."""
        raise NotImplementedError

    def trace(self) -> Tensor:
        return self.diagonal().sum()

    def sizes(self) -> str:
        """Sizes of what is stored, for the coverage table."""
        raise NotImplementedError

    def memory(self) -> int:
        """Bytes of the statistics."""
        return sum(s.numel() * s.element_size() for a in self.statistics.values() for s in a.sums.values())


class JointBlock(Block):
    """Blocks whose coordinates are one flat vector over all their layers."""

    def take(self, layers: Sequence[Layer]) -> None:
        super().take(layers)
        self.widths = [s.numel() for s in self.shapes]
        self.shape = torch.Size((self.dimension,))

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([layer.pack(tensors).flatten(-3) for layer in self.layers], dim=-1)

    def matrices(self, x: Tensor) -> list[Tensor]:
        parts = zip(x.split(self.widths, dim=-1), self.shapes)
        return [part.reshape(*x.shape[:-1], *shape) for part, shape in parts]

    def per_datum(self, uses: Sequence[Sequence[LayerIO]], like: Tensor) -> Iterator[Tensor]:
        """Chunks (data, P) of per-datum gradients."""
        data = next((u.data for calls in uses for u in calls), 0)
        if data == 0:  # no layer was used: the gradient is zero
            yield like.new_zeros(1, self.dimension)
        step = max(1, CHUNK // max(1, self.dimension))
        for start in range(0, data, step):
            length = min(step, data - start)
            parts = []
            for calls, shape in zip(uses, self.shapes):
                if not calls:
                    parts.append(like.new_zeros(length, shape.numel()))
                    continue
                parts.append(summed_gradients(calls, shape[0], start, length).flatten(1))
            yield parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
