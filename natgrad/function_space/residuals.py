"""The residuals of a physics-informed loss, as one stacked vector r(θ) with its derivatives.

loss = Σ_terms ½ mean over points of weight · ‖r‖². With rows scaled by √(weight / points) the loss is ½ rᵀr, df =
Jᵀr and the Gauss–Newton metric is JᵀJ. A weight is held fixed within a step and has no derivative. Rows are laid out by
term, then point, then component; columns by parameter, flattened. Jacobians come from reverse mode at each point,
mapped over chunks of points so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

from natgrad.function_space.reverse_mode import Mending, pushforward
from natgrad.function_space.scope import Scope
from natgrad.function_space.weights import Weight, Weights
from natgrad.metric.metric import Vector

Term = Callable[..., Tensor]
Batch = Mapping[str, Any]
CHUNK_BYTES = 2**26  # of Jacobian rows formed by one call of vmap; larger chunks leave the cache and are not faster


class Residuals:
    """The stacked residuals of `terms` on one batch.

    Args:
        scope: the model, which maps one point, shape (d,), to the network's value there, and what terms read beside it.
        terms: ``{name: f}`` with ``f(u, x, *data) → ()`` or ``(k,)``.
        weights: of the terms, read when a batch is bound.
        chunk: points to a call of vmap; None takes as many as 64 MB of Jacobian rows hold.

    Raises:
        TypeError, ValueError: a term is not callable, or a weight is negative or names no term.
    """

    def __init__(
        self, scope: Scope, terms: Mapping[str, Term], weights: Mapping[str, Weight] | None, chunk: int | None
    ) -> None:
        if not isinstance(terms, Mapping) or not terms or not all(callable(t) for t in terms.values()):
            raise TypeError(
                "terms must be a dict {name: f} of callables f(u, x, *data) → residual at one point, for instance "
                '{"interior": pde, "boundary": bc}'
            )
        self.weights = Weights(list(terms), weights)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is a number of points, at least 1, got {chunk}")
        self.scope, self.model, self.chunk = scope, scope.model, chunk
        self.terms = {n: Mending(term) for n, term in terms.items()}
        self.batch: dict[str, tuple[Tensor, ...]] = {}
        self.components: dict[str, int] = {}  # residuals at a point, by term
        self.scales: dict[str, Tensor] = {}  # √(weight / points) of each point, by term
        self._checked: Any = None  # what was known of batch and parameters when the terms were checked

    # binding a batch -----------------------------------------------------------------------------------

    def bind(self, batch: Batch, params: Vector, taken: Iterable[str], again: bool = False) -> None:
        """Take ``{term: points}`` or ``{term: (points, *data)}``, all with points along the first axis.

        Args:
            taken: names of the parameters of the metric; `params` are those that are not frozen.
            again: check the terms even where batch and parameters are of the kind that was checked last.

        Raises:
            TypeError, ValueError: the batch does not fit the terms or the parameters; a term returns something that is
                not a residual; a residual does not depend on the parameters, or on others than the metric's; a weight
                does not fit.
        """
        self.batch = check_batch(batch, list(self.terms), next(iter(params.values())))
        known = (set(params), {n: [(d.shape[1:], d.dtype) for d in data] for n, data in self.batch.items()})
        if again or known != self._checked:
            read = [self._check_term(name, data, taken) for name, data in self.batch.items()]
            self.scope.check_entries(set().union(*read))
            self._checked = known
        for name, data in self.batch.items():
            weight = self.weights.at(name, data, lambda name=name: self._unweighted(name, params))  # type: ignore[misc]
            self.scales[name] = (weight / len(data[0])).sqrt()

    def _unweighted(self, name: str, params: Vector) -> Tensor:
        with torch.no_grad():
            r = self.of_term(name, params)
        self.check_finite_term(name, r)
        return r

    def _check_term(self, name: str, data: tuple[Tensor, ...], taken: Iterable[str]) -> set[str]:
        live = self.scope.live()
        with torch.enable_grad():
            r = self.scope.call(live, self.terms[name], self.field, *(d[0] for d in data))
        if not isinstance(r, Tensor) or not r.is_floating_point():
            got = f"{type(r).__name__}" if not isinstance(r, Tensor) else f"a tensor of {r.dtype}"
            raise TypeError(
                f"term {name!r} must return the residual at one point as a real floating-point tensor, got {got}"
            )
        if r.ndim > 1:
            raise ValueError(
                f"term {name!r} returned shape {tuple(r.shape)}; at ONE point a residual has shape () or "
                "(components,). "
                f"The point it got has shape {tuple(data[0].shape[1:])}, each further entry "
                f"{[tuple(d.shape[1:]) for d in data[1:]]}"
            )
        read = self.scope.read_by(f"term {name!r}", self.terms[name], r, live, taken)
        if not read:
            raise ValueError(
                f"the residual of term {name!r} does not depend on the parameters: it must call u or compute with "
                "parameters, and not under no_grad or after detach()"
            )
        self.components[name] = r.numel()
        return read

    @property
    def rows(self) -> int:
        """N, the length of the stacked residual."""
        return sum(len(d[0]) * self.components[n] for n, d in self.batch.items())

    def field(self, y: Tensor) -> Tensor:
        """u, the network as a function of one point, at the parameters in force."""
        return self.model(y)

    def at_point(self, name: str, params: Vector, *at: Tensor) -> Tensor:
        """The residual of a term at one point, before weighting, (k,)."""
        return self.scope.call(params, self.terms[name], self.field, *at).reshape(-1)

    # values and derivatives ----------------------------------------------------------------------------

    def of_term(self, name: str, params: Vector) -> Tensor:
        """The residuals of a term before weighting, (points, k)."""
        return vmap(lambda *at: self.at_point(name, params, *at))(*self.batch[name])

    def values(self, params: Vector) -> Tensor:
        """r(θ), shape (N,)."""
        return torch.cat([(self.of_term(n, params) * self.scales[n][:, None]).reshape(-1) for n in self.batch])

    def loss(self, params: Vector) -> Tensor:
        """½ rᵀr."""
        r = self.values(params)
        return 0.5 * (r @ r)

    def jacobian(self, params: Vector) -> Iterator[Tensor]:
        """J in chunks of rows, each (rows, P)."""
        size = sum(p.numel() for p in params.values())
        for name, data in self.batch.items():
            k = self.components[name]

            at_point = partial(self.at_point, name)
            if k == 1:
                derivative = vmap(grad(lambda p, *at, f=at_point: f(p, *at)[0]), (None, *(0,) * len(data)))
            else:
                derivative = vmap(jacrev(at_point), (None, *(0,) * len(data)))
            points = self.chunk or max(1, CHUNK_BYTES // (8 * k * size))
            for start in range(0, len(data[0]), points):
                part = derivative(params, *(d[start : start + points] for d in data))
                scale = self.scales[name][start : start + points].repeat_interleave(k)
                yield torch.cat([part[m].reshape(len(scale), -1) for m in params], dim=1).mul_(scale[:, None])

    def jvp(self, params: Vector, v: Vector) -> Tensor:
        """J v, shape (N,)."""
        return pushforward(self.values, params, v)

    def vjp(self, params: Vector, c: Tensor) -> Vector:
        """Jᵀ c."""
        return vjp(self.values, params)[1](c)[0]

    def check_finite(self, r: Tensor) -> None:
        """Name the term and the points of residuals that are not finite.

        Raises:
            ValueError: there are some.
        """
        if bool(torch.isfinite(r).all()):
            return
        sizes = [len(data[0]) * self.components[name] for name, data in self.batch.items()]
        for name, part in zip(self.batch, r.split(sizes)):
            self.check_finite_term(name, part.reshape(len(self.batch[name][0]), -1))

    def check_finite_term(self, name: str, r: Tensor) -> None:
        """The same for the residuals of one term, (points, k)."""
        x = self.batch[name][0]
        bad = (~torch.isfinite(r)).any(1).nonzero()[:, 0]
        if len(bad):
            shown = ", ".join(f"{int(i)} at {[round(float(c), 6) for c in x[i].reshape(-1)]}" for i in bad[:3])
            raise ValueError(
                f"term {name!r}: the residual is not finite at {len(bad)} of {len(x)} points: point "
                f"{shown}{' …' if len(bad) > 3 else ''}"
            )


def check_batch(batch: Batch, terms: list[str], like: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """``{term: (points, *data)}`` in the order of the terms.

    Raises:
        TypeError, ValueError: something is missing, left over, empty, of another length, an integer, or of another
            dtype than the parameters.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is a dict {{term: points}} or {{term: (points, *data)}} for the terms {terms}, got "
            f"{type(batch).__name__}"
        )
    missing, extra = [n for n in terms if n not in batch], [n for n in batch if n not in terms]
    if missing or extra:
        raise ValueError(f"the batch does not fit the terms {terms}: missing {missing}, unknown {extra}")
    out = {}
    for name in terms:
        data = (batch[name],) if isinstance(batch[name], Tensor) else tuple(batch[name])
        if not data or not all(isinstance(d, Tensor) and d.ndim >= 1 for d in data):
            raise TypeError(
                f"the batch of term {name!r} must hold tensors with points along the first axis, got "
                f"{[type(d).__name__ for d in data]}"
            )
        if not data[0].is_floating_point():
            raise TypeError(
                f"the points of term {name!r} are {data[0].dtype}; points are differentiated, so they must be "
                f"floating point: cast with .to({like.dtype})"
            )
        for d in data:
            if d.is_floating_point() and d.dtype != like.dtype:
                raise TypeError(
                    f"the batch of term {name!r} holds {d.dtype} but the parameters are {like.dtype}; cast one of them"
                )
            if d.device != like.device:
                raise ValueError(f"the batch of term {name!r} is on {d.device} but the parameters are on {like.device}")
        if len({len(d) for d in data}) != 1 or len(data[0]) == 0:
            raise ValueError(
                f"the batch of term {name!r} must hold the same positive number of points everywhere, got "
                f"{[len(d) for d in data]}"
            )
        out[name] = data
    return out
