"""Energies of variational problems (Deep Ritz), E(u) = ∫ F(u, ∇u, x) dx by quadrature.

The metric is the second derivative of E in function space, pulled back: with z = (u, ∇u) at a point,

    ĝ = Σ_n w_n (∂z_n/∂θ)ᵀ F_zz (∂z_n/∂θ),      dE = Σ_n w_n (∂z_n/∂θ)ᵀ F_z.

For F = ½|∇u|² + h(u) − f u this is ∫ ∇v·∇w + h″(u) v w (Müller & Zeinhofer 2023, https://arxiv.org/abs/2302.13163,
section 3). F_zz is taken by automatic differentiation and its negative eigenvalues, which a non-convex h can give,
count as zero. Parameters that F computes with itself, as an unknown coefficient, are further entries of z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, vjp, vmap

from natgrad.function_space.jacobian import KEPT_BYTES, JacobianOperator
from natgrad.function_space.jacobian_metric import JacobianMetric
from natgrad.function_space.operators import value_and_gradient
from natgrad.function_space.residuals import CHUNK_BYTES, Batch, check_batch
from natgrad.function_space.reverse_mode import Mending, pushforward
from natgrad.function_space.scope import Params, Scope
from natgrad.metric.metric import Vector

Density = Callable[..., Tensor]


class Energy(JacobianMetric):
    """The second variation of Σ_terms Σ_n w_n F(u, ∇u, x_n, *data_n) as a metric, and that sum as the loss.

    Args:
        model: the network; called with one point of shape (d,).
        densities: ``{name: F}``, ``F(u, du, x, *data) → ()`` at ONE point: u the network's value, () for one output,
            else (outputs,); du its gradient, (d,) for one output, else (d, outputs).
        solver: "auto" | "dense" | "kernel" | "cg".
        chunk: points differentiated at once; None bounds the memory by itself.
        params: what densities compute with beside the model, ``{name: module or parameter}``. All of it is trained.
            The parameters that a density reads itself must be few: fields belong to the model, as further outputs.

    A batch is ``{term: (points, quadrature weights, *data)}``.

    Example::

        metric = Energy(net, {"interior": lambda u, du, x, f: 0.5 * du @ du + 0.25 * u**4 - f * u})
        energy = NaturalGradient(metric).step({"interior": (x, w, f)})

    Raises:
        TypeError, ValueError: densities that are not callables, no such solver; at `observe`, a batch that does not
            fit, a density that is not a scalar, does not depend on the network, reads parameters that are not the
            metric's or too many, or is not finite.
    """

    scope: Scope

    def __init__(
        self,
        model: nn.Module,
        densities: Mapping[str, Density],
        solver: str = "auto",
        chunk: int | None = None,
        params: Params | None = None,
    ) -> None:
        super().__init__(Scope(model, params), solver)
        if not isinstance(densities, Mapping) or not densities or not all(callable(f) for f in densities.values()):
            raise TypeError(
                "densities must be a dict {name: F} of callables F(u, du, x, *data) → energy density at one point"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is a number of points, at least 1, got {chunk}")
        self.model, self.chunk = model, chunk
        self.densities = {n: Mending(density) for n, density in densities.items()}
        self.batch: dict[str, tuple[Tensor, ...]] = {}
        self._roots: dict[str, Tensor] = {}  # (points, m, m) roots of w F_zz, by term
        self._slopes: dict[str, Tensor] = {}  # (points, m): w F_z
        self._direct: dict[str, list[str]] = {}  # parameters that a density reads itself, by term

    def observe(self, batch: Batch) -> Tensor:
        """Linearise at the current parameters; returns the energy."""
        self._take_point()
        self.batch = check_batch(batch, list(self.densities), next(iter(self.point.values())))
        read = set()
        for name, (x, *rest) in self.batch.items():
            if not rest or rest[0].shape != (len(x),):
                raise ValueError(
                    f"the batch of term {name!r} must be (points, quadrature weights, *data) with weights of "
                    f"shape ({len(x)},)"
                )
            read |= self._check_density(name)
        self.scope.check_entries(read)
        with torch.no_grad():
            energy = [self._second_order(name) for name in self.batch]
        self.rows = JacobianOperator(
            sum(r.shape[0] * r.shape[1] for r in self._roots.values()),
            sum(p.numel() for p in self.point.values()),
            self._chunks,
            self._jvp,
            self._vjp,
            energy[0],
        )
        self.loss = torch.stack(energy).sum()
        return self.loss

    def gradient(self) -> Vector:
        self.linearised()
        return self.tangent(self.columns(self._pull(self._slopes)))

    def loss_at(self, increments: Mapping[str, Tensor]) -> float:
        at = self.moved(increments)
        with torch.no_grad():
            return float(sum((self.batch[n][1] * self._density(n, self._fields(n, at))).sum() for n in self.densities))

    def _values_at(self, params: Vector) -> Tensor:
        """√(w F_zz) z, with the root of the linearisation."""
        return torch.cat([(self._roots[n] @ self._fields(n, params)[:, :, None]).reshape(-1) for n in self.densities])

    # per term --------------------------------------------------------------------------------------------

    def _at_point(self, name: str, params: Vector, x: Tensor) -> Tensor:
        """z = (u, ∇u, parameters that the density reads) flattened, (m,) with m = outputs·(1 + d) + …."""
        value, slope = self.scope.call(params, value_and_gradient, lambda y: self.model(y), x)
        return torch.cat([value.reshape(-1), slope.reshape(-1), *(params[n].reshape(-1) for n in self._direct[name])])

    def _fields(self, name: str, params: Vector) -> Tensor:
        """(points, m)"""
        return vmap(lambda x: self._at_point(name, params, x))(self.batch[name][0])

    def _check_density(self, name: str) -> set[str]:
        """Find the parameters that the density reads itself; return those that the term depends on."""
        x, _, *data = (d[0] for d in self.batch[name])
        live, what = self.scope.live(), f"density {name!r}"
        self._direct[name] = []
        with torch.enable_grad():
            z = self._at_point(name, live, x)
            through = self.scope.read_by(f"the model in {what}", self.model, z, live, self.parameters)
            density = self._density_of(name, live, z.detach(), x, *data)
            direct = self.scope.read_by(what, self.densities[name], density, live, self.parameters)
        self._direct[name] = [n for n in self.point if n in direct]
        size = len(z) + sum(self.point[n].numel() for n in self._direct[name])
        if self._direct[name] and len(self.batch[name][0]) * size**2 * z.element_size() > KEPT_BYTES:
            raise ValueError(
                f"density {name!r} reads {size - len(z)} parameters itself ({', '.join(self._direct[name][:3])}, …), "
                f"and its second variation would take {size}×{size} numbers at each point; make the field that they "
                "belong to an output of the model"
            )
        return through | direct

    def _density_at(self, name: str, z: Tensor, x: Tensor, *data: Tensor) -> Tensor:
        """F at one point, with the parameters that it reads itself in z."""
        like = {n: self.point[n] for n in self._direct[name]}
        sizes = [p.numel() for p in like.values()]
        fields, *own = z.split([len(z) - sum(sizes), *sizes])
        values = {n: v.reshape(p.shape) for (n, p), v in zip(like.items(), own)}
        return self._density_of(name, values, fields, x, *data)

    def _density_of(self, name: str, values: Vector, z: Tensor, x: Tensor, *data: Tensor) -> Tensor:
        outputs = len(z) // (1 + len(x))
        u, du = (z[0], z[1:]) if outputs == 1 else (z[:outputs], z[outputs:].reshape(len(x), outputs))
        density = self.scope.call(values, self.densities[name], u, du, x, *data)
        if not isinstance(density, Tensor) or density.numel() != 1:
            got = tuple(density.shape) if isinstance(density, Tensor) else type(density).__name__
            raise ValueError(
                f"density {name!r} must return a scalar tensor at one point, got {got}; u has shape {tuple(u.shape)}, "
                f"du {tuple(du.shape)}"
            )
        return density.reshape(())

    def _density(self, name: str, z: Tensor) -> Tensor:
        x, _, *data = self.batch[name]
        return vmap(lambda z, x, *data: self._density_at(name, z, x, *data))(z, x, *data)

    def _second_order(self, name: str) -> Tensor:
        """The energy of a term; leaves its roots and slopes."""
        x, w, *data = self.batch[name]
        z = self._fields(name, self.point)
        density = self._density(name, z)
        if not bool(torch.isfinite(density).all()):
            bad = (~torch.isfinite(density)).nonzero()[:, 0]
            raise ValueError(
                f"density {name!r} is not finite at {len(bad)} of {len(x)} points: point {int(bad[0])} at "
                f"{x[bad[0]].tolist()}"
            )

        def at(z: Tensor, x: Tensor, *data: Tensor) -> Tensor:
            return self._density_at(name, z, x, *data)

        slope, curvature = vmap(grad(at))(z, x, *data), vmap(hessian(at))(z, x, *data)
        if not bool(slope.any()) and not bool(curvature.any()):
            raise ValueError(
                f"density {name!r} does not depend on u or du: it has no gradient with respect to the network"
            )
        values, vectors = torch.linalg.eigh(curvature * w[:, None, None])
        self._roots[name] = values.clamp(min=0).sqrt()[:, :, None] * vectors.mT  # (points, m, m), RᵀR = w F_zz
        self._slopes[name] = w[:, None] * slope
        return (w * density).sum()

    # rows ------------------------------------------------------------------------------------------------

    def _chunks(self) -> Iterator[Tensor]:
        size = sum(p.numel() for p in self.point.values())
        for name, root in self._roots.items():
            x, m = self.batch[name][0], root.shape[1]
            points = self.chunk or max(1, CHUNK_BYTES // (8 * m * size))
            for start in range(0, len(x), points):
                part = vmap(jacrev(partial(self._at_point, name)), (None, 0))(self.point, x[start : start + points])
                jac = torch.cat([part[n].reshape(*part[n].shape[:2], -1) for n in self.point], dim=2)  # (points, m, P)
                yield (root[start : start + points] @ jac).reshape(-1, size)

    def _jvp(self, v: Tensor) -> Tensor:
        tangent = self.split(v)
        moved = {n: pushforward(partial(self._fields, n), self.point, tangent) for n in self.densities}
        return torch.cat([(self._roots[n] @ dz[:, :, None]).reshape(-1) for n, dz in moved.items()])

    def _vjp(self, c: Tensor) -> Tensor:
        parts = c.split([r.shape[0] * r.shape[1] for r in self._roots.values()])
        pulled = {
            n: (r.mT @ part.reshape(*r.shape[:2], 1))[:, :, 0] for (n, r), part in zip(self._roots.items(), parts)
        }
        return self.columns(self._pull(pulled))

    def _pull(self, covectors: Mapping[str, Tensor]) -> Vector:
        """Σ_terms (∂z/∂θ)ᵀ of (points, m) covectors."""
        parts = [vjp(lambda p, n=n: self._fields(n, p), self.point)[1](c)[0] for n, c in covectors.items()]
        return {n: torch.stack([p[n] for p in parts]).sum(0) for n in self.point}
