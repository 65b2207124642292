"""A Riemannian metric on the parameters of a model.

A metric g is a map ĝ from tangent vectors (directions in which to move the parameters) to covectors (what
``loss.backward()`` leaves in ``.grad``): ĝ(X)(Y) = g(X, Y). The gradient of f is grad f = ĝ⁻¹(df).

Vectors of both kinds are dictionaries ``{name: tensor shaped like the parameter}``. `flat` lowers the index
(tangent → covector), `sharp` raises it (covector → tangent), with damping: (ĝ + λI)⁻¹. Both take a stack of k vectors,
``{name: (k, *shape)}``, as well. The damping is a number, or ``{name pattern: number}`` (the first that matches);
gradients go through scalar tensors that require them.

A metric of your own
--------------------
Derive from `Metric`, call ``super().__init__(parameters)`` and write `flat` and `sharp`; every other verb
follows from these two (override the ones you can do faster). For `natgrad.NaturalGradient`, more methods
have defaults that may be replaced:

- `drive`, `advance` and `discard_pending`, for metrics that gather statistics while the model is trained;
- `default_step` names the step rule that serves the metric where the user names none;
- `observe` and `gradient`, for metrics that make their own gradient: ``opt.step(batch)`` calls
  ``observe(batch)``, which returns the loss, and then reads `gradient`; `direction` may then be computed in a
  better conditioned way than by ``sharp(gradient())``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.linalg.cholesky import damped_cholesky, ensure_fits
from natgrad.linalg.krylov import conjugate_gradient
from natgrad.metric.damping import Damping, Resolved, full, number_of, resolved
from natgrad.metric.protocols import OwnGradient, Trained, Vector
from natgrad.metric.stacks import all_with_all, each_with_each, one_by_one, plain_damping, stack_size

DENSE_PARAMETERS = 5000  # up to here O(P³) is quicker than iterating


class Metric(Trained, OwnGradient):
    """ĝ: TM → T*M over named parameters. See the module docstring for the protocol.

    Args:
        parameters: ``{name: parameter}``, in the order in which `dense` lays them out.

    Raises:
        ValueError: there is no parameter, or one that is complex or on the meta device.
    """

    positive_definite = False  # whether `sharp` is defined without damping
    takes_stacks = False  # whether its own `flat` and `sharp` do, and all forms of damping: else they are made to

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.takes_stacks:
            return
        own = vars(cls)
        for verb in own.keys() & {"flat", "sharp"}:
            setattr(cls, verb, one_by_one(own[verb]))
        for verb, place in {"sharp": 1, "logdet": 0, "sample": 0}.items():
            if verb in own:
                otherwise = Metric._dense_sharp if verb == "sharp" else getattr(Metric, verb)
                setattr(cls, verb, plain_damping(vars(cls)[verb], otherwise, place))

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters: dict[str, Tensor] = dict(parameters)
        if not self.parameters:
            raise ValueError(
                "the metric has no parameters: the model has none that requires grad, or `params` selects none"
            )
        for name, p in self.parameters.items():
            if p.is_complex():
                raise ValueError(
                    f"parameter {name!r} is complex ({p.dtype}); natgrad covers real parameters: hold Re and Im apart"
                )
            if p.is_meta:
                raise ValueError(
                    f"parameter {name!r} is on the meta device and has no values; materialise the model first "
                    f"(`to_empty`, then initialise)"
                )

    @property
    def names(self) -> list[str]:
        """Parameter names, in the order of `dense`."""
        return list(self.parameters)

    # the two verbs that make a metric ------------------------------------------------------------------

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        """ĝ v: tangent → covector, each entry shaped like its parameter."""
        raise NotImplementedError(f"{type(self).__name__} does not define flat")

    def sharp(self, df: Mapping[str, Tensor], damping: Any) -> Vector:
        """(ĝ + damping·I)⁻¹ df: covector → tangent, each entry shaped like its parameter.

        Raises:
            ValueError: the damping is not positive and finite, or `df` does not fit the parameters.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define sharp")

    # what follows from them ----------------------------------------------------------------------------

    def inner(self, u: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> Tensor:
        """g(u, v) = ⟨ĝ u, v⟩, a scalar tensor; of stacks of k and l vectors (k, l), of a stack and a vector (k,)."""
        v = self.check(v, "v")
        return all_with_all(self.flat(u), v, self.parameters)

    def norm(self, v: Mapping[str, Tensor]) -> Tensor:
        """√g(v, v), a scalar tensor, or (k,) of a stack; rounding below zero counts as zero."""
        v = self.check(v, "v")
        return each_with_each(self.flat(v), v, self.parameters).clamp(min=0).sqrt()

    def dense(self) -> Tensor:
        """ĝ as a (P, P) matrix over the flattened parameters in the order of `names`."""
        size = sum(p.numel() for p in self.parameters.values())
        like = next(iter(self.parameters.values()))
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        return torch.stack([self.vector_to_flat(self.flat(self.flat_to_vector(row))) for row in eye], dim=1)

    def diagonal(self) -> Vector:
        """The diagonal of ĝ, shaped like the parameters."""
        return self.flat_to_vector(self.dense().diagonal())

    def trace(self) -> Tensor:
        """tr ĝ, a scalar tensor."""
        return sum_of(d.sum() for d in self.diagonal().values())

    def logdet(self, damping: Any) -> Tensor:
        """log det(ĝ + damping·I), a scalar tensor.

        Raises:
            ValueError: the damping is not positive and finite, or ĝ + damping·I is not positive definite.
        """
        lower = self._damped_cholesky(damping)
        return 2 * lower.diagonal().log().sum()

    def sample(self, damping: Any, generator: torch.Generator | None = None) -> Vector:
        """One draw from N(0, (ĝ + damping·I)⁻¹), a tangent vector.

        Raises:
            ValueError: as `logdet`.
        """
        lower = self._damped_cholesky(damping)
        z = torch.randn(lower.shape[0], 1, dtype=lower.dtype, device=lower.device, generator=generator)
        return self.flat_to_vector(torch.linalg.solve_triangular(lower.mT, z, upper=True)[:, 0])

    def inverse_diagonal(self, damping: Any) -> Vector:
        """The diagonal of (ĝ + damping·I)⁻¹, shaped like the parameters: the variances of what `sample` draws.

        Raises:
            ValueError: as `logdet`.
        """
        return self.flat_to_vector(torch.cholesky_inverse(self._damped_cholesky(damping)).diagonal())

    def _dense_sharp(self, df: Mapping[str, Tensor], damping: Any) -> Vector:
        """`sharp` by the dense matrix, for every form of damping."""
        df = self.check(df, "df")
        lower = self._damped_cholesky(damping)
        rows = torch.cat([df[n].reshape(-1, p.numel()) for n, p in self.parameters.items()], -1)
        parts = torch.cholesky_solve(rows.mT, lower).mT.split([p.numel() for p in self.parameters.values()], dim=-1)
        return {n: x.reshape(df[n].shape) for n, x in zip(self.parameters, parts)}

    def _damped_cholesky(self, damping: Any) -> Tensor:
        size, like = sum(p.numel() for p in self.parameters.values()), next(iter(self.parameters.values()))
        ensure_fits(3 * size**2 * like.element_size(), f"the dense {size}×{size} metric", "a metric in blocks", like)
        given = self.dampings(damping)
        matrix = self.dense()
        matrix = (matrix + matrix.mT) / 2
        matrix = matrix + torch.diag_embed(self.vector_to_flat(full(given, self.parameters, matrix)))
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            smallest = float(torch.linalg.eigvalsh(matrix.detach())[0])
            said = f"{given:g}·I" if isinstance(given, float) else "the damping"
            raise ValueError(
                f"ĝ + {said} is not positive definite (smallest eigenvalue {smallest:.3g}); take a larger damping"
            )
        return lower

    def __mul__(self, factor: float) -> Metric:
        return Sum([(factor, self)])

    __rmul__ = __mul__

    def __add__(self, other: Metric) -> Metric:
        return Sum([(1.0, self), (1.0, other)])

    def stack(self, parts: Sequence[tuple[float, Metric]]) -> Metric | None:
        """Return Σ cᵢ ĝᵢ as one metric of this kind; None where there is none. This metric is the first part."""
        return None

    # vectors -------------------------------------------------------------------------------------------

    def check(self, v: Mapping[str, Tensor], what: str) -> Vector:
        """`v` as a dictionary in the order of `names`: a vector, or a stack of them.

        Raises:
            TypeError: `v` is not a mapping of names to tensors.
            ValueError: an entry is missing, left over or has the wrong shape.
        """
        if not isinstance(v, Mapping):
            raise TypeError(f"{what} must be a dict {{parameter name: tensor}}, got {type(v).__name__}")
        missing = [n for n in self.parameters if n not in v]
        extra = [n for n in v if n not in self.parameters]
        if missing or extra:
            said = [f"missing {missing}"] * bool(missing) + [f"unknown {extra}"] * bool(extra)
            raise ValueError(
                f"{what} does not fit the metric's parameters: {'; '.join(said)}. The names are {self.names}"
            )
        lead = () if (k := stack_size(v, self.parameters)) is None else (k,)
        for name, p in self.parameters.items():
            if not isinstance(v[name], Tensor) or v[name].shape != (*lead, *p.shape):
                got = tuple(v[name].shape) if isinstance(v[name], Tensor) else type(v[name]).__name__
                raise ValueError(f"{what}[{name!r}] must be a tensor of shape {tuple(p.shape)}, got {got}")
            if v[name].layout != torch.strided:
                raise ValueError(
                    f"{what}[{name!r}] is sparse; natgrad takes dense gradients: build the embedding with sparse=False"
                )
        return {n: v[n] for n in self.parameters}

    def check_damping(self, damping: Any) -> float:
        """`damping` as a float.

        Raises:
            ValueError: it is not positive and finite (zero is allowed where the metric is positive definite).
        """
        value = number_of(damping, self.positive_definite)
        return float(value.detach()) if isinstance(value, Tensor) else value

    def dampings(self, damping: Damping) -> Resolved:
        """`damping` as one number, or as one for each name; scalar tensors are left where gradients go through them.

        Raises:
            ValueError: as `check_damping`; or a pattern matches no name, or a name has no pattern.
        """
        return resolved(damping, self.parameters, self.positive_definite)

    def vector_to_flat(self, v: Mapping[str, Tensor]) -> Tensor:
        """{name: tensor} → (P,)"""
        return torch.cat([v[n].reshape(-1) for n in self.parameters])

    def flat_to_vector(self, flat: Tensor) -> Vector:
        """(P,) → {name: tensor}"""
        parts = flat.split([p.numel() for p in self.parameters.values()])
        return {n: part.reshape(p.shape) for (n, p), part in zip(self.parameters.items(), parts)}


class Sum(Metric):
    """Σ cᵢ ĝᵢ over metrics of the same parameters.

    Where every part makes its own gradient, so does the sum: `observe` gives each part the same batch, and the loss is
    Σ cᵢ lossᵢ.

    Args:
        parts: (cᵢ, metric) with cᵢ > 0.

    Raises:
        TypeError: a part is not a metric, or a factor not a number.
        ValueError: a factor is not positive, or the metrics have different parameters.
    """

    def __init__(self, parts: list[tuple[float, Metric]]) -> None:
        self.parts: list[tuple[float, Metric]] = []
        for c, m in parts:
            if not isinstance(m, Metric) or not isinstance(c, (int, float)):
                raise TypeError(
                    f"metrics add to metrics and are multiplied by numbers, got {type(c).__name__} times "
                    f"{type(m).__name__}"
                )
            if not 0 < c < float("inf"):
                raise ValueError(f"a metric is multiplied by a positive number, got {c}")
            self.parts += [(c * inner, part) for inner, part in m.parts] if isinstance(m, Sum) else [(float(c), m)]
        first = self.parts[0][1]
        for _, m in self.parts:
            if list(m.parameters) != list(first.parameters) or any(
                m.parameters[n] is not p for n, p in first.parameters.items()
            ):
                raise ValueError(
                    f"metrics add where they have the same parameters; {type(first).__name__} has {first.names}, "
                    f"{type(m).__name__} has {m.names}"
                )
        super().__init__(first.parameters)
        self.positive_definite = all(m.positive_definite for _, m in self.parts)
        self.default_step = first.default_step
        options = first.step_options.items()  # those of the first part, but for no damping where the others need it
        self.step_options = {k: v for k, v in options if k != "damping" or v or self.positive_definite}

    @property
    def copies_with_model(self) -> bool:  # type: ignore[override]
        return all(m.copies_with_model for _, m in self.parts)

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        return self._sum([m.flat(v) for _, m in self.parts])

    def sharp(self, df: Mapping[str, Tensor], damping: float) -> Vector:
        damping = self.check_damping(damping)
        df = self.check(df, "df")
        if (stacked := self._stacked()) is not None:
            return stacked.sharp(df, damping)
        g = self.vector_to_flat(df)
        if g.numel() <= DENSE_PARAMETERS:
            return self.flat_to_vector(torch.cholesky_solve(g[:, None], damped_cholesky(self.dense(), damping))[:, 0])
        solution, _ = conjugate_gradient(
            lambda v: self.vector_to_flat(self.flat(self.flat_to_vector(v))) + damping * v, g
        )
        return self.flat_to_vector(solution)

    def dense(self) -> Tensor:
        return torch.stack([c * m.dense() for c, m in self.parts]).sum(0)

    def diagonal(self) -> Vector:
        return self._sum([m.diagonal() for _, m in self.parts])

    def logdet(self, damping: float) -> Tensor:
        stacked = self._stacked()
        return super().logdet(damping) if stacked is None else stacked.logdet(damping)

    def sample(self, damping: float, generator: torch.Generator | None = None) -> Vector:
        stacked = self._stacked()
        return super().sample(damping, generator) if stacked is None else stacked.sample(damping, generator)

    @property
    def driver(self) -> Any:
        return next((m.driver for _, m in self.parts if m.driver is not None), None)

    def drive(self, driver: Any) -> None:
        for _, m in self.parts:
            m.drive(driver)

    def check_parameters(self) -> None:
        for _, m in self.parts:
            m.check_parameters()

    def advance(self, decay: float) -> bool:
        changed = [m.advance(decay) for _, m in self.parts]
        return any(changed)

    def divergence(self, increments: Mapping[str, Tensor]) -> Tensor | None:
        found = [(c, m.divergence(increments)) for c, m in self.parts]
        known = [c * d for c, d in found if d is not None]
        return torch.stack([d.double() for d in known]).sum() if len(known) == len(found) else None

    def discard_pending(self) -> None:
        for _, m in self.parts:
            m.discard_pending()

    def include(self, parameter: Tensor) -> str | None:
        """Take in a parameter that was frozen when the parts were made.

        Raises:
            ValueError: not every part knows it.
        """
        names = {m.include(parameter) for _, m in self.parts}
        if len(names) > 1:
            raise ValueError("a part of this sum does not know the parameter that is added: make the metrics anew")
        self.parameters = dict(self.parts[0][1].parameters)
        return names.pop()

    @property
    def observed_here(self) -> bool | None:
        parts = [m.observed_here for _, m in self.parts]
        return False if False in parts else None if None in parts else True

    def observe(self, batch: Any) -> Tensor:
        return torch.stack([c * m.observe(batch) for c, m in self.parts]).sum()

    def gradient(self) -> Vector:
        return self._sum([m.gradient() for _, m in self.parts])

    def direction(self, damping: float, prior: Mapping[str, Tensor] | None = None) -> Vector:
        stacked = self._stacked()
        return super().direction(damping, prior) if stacked is None else stacked.direction(damping, prior)

    def loss_at(self, increments: Mapping[str, Tensor]) -> float:
        return sum(c * m.loss_at(increments) for c, m in self.parts)

    def _sum(self, vectors: list[Vector]) -> Vector:
        return {n: torch.stack([c * v[n] for (c, _), v in zip(self.parts, vectors)]).sum(0) for n in self.parameters}

    def _stacked(self) -> Metric | None:
        """The sum as one metric with rows, where every part has rows."""
        return self.parts[0][1].stack(self.parts)


def named(params: nn.Module | Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
    """{name: parameter} of a module (those that require grad), a mapping, or an iterable (numbered)."""
    if isinstance(params, nn.Module):
        return {n: p for n, p in params.named_parameters() if p.requires_grad}
    if isinstance(params, Mapping):
        return dict(params)
    return {f"param{i}": p for i, p in enumerate(params)}


def sum_of(scalars: Iterable[Tensor]) -> Tensor:
    """Sum of scalar tensors without a leading integer zero."""
    return torch.stack(list(scalars)).sum()
