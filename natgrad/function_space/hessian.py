"""The Hessian of a loss as a metric, and its spectrum.

Products ĝ v = ∂(df·v)/∂θ by double backpropagation (Pearlmutter 1994), O(P) each. An indefinite Hessian is a
pseudo-Riemannian metric: `flat`, `inner` and the spectrum are as always; `sharp`, `logdet` and `sample` ask that ĝ
+ λI is positive definite, or take in place of ĝ = V diag(γ) Vᵀ

- "absolute": V diag(|γ|) Vᵀ (saddle-free Newton: Dauphin et al. 2014, https://arxiv.org/abs/1406.2572, algorithm 1);
- "shift": ĝ − min(0, γ_min) I, so that with damping the smallest eigenvalue is λ (Nocedal & Wright 2006, section 3.4).

The spectral density is by stochastic Lanczos quadrature (Ghorbani, Krishnan & Xiao 2019,
https://arxiv.org/abs/1901.10159, algorithm 1), with full reorthogonalisation.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.function_space.reverse_mode import plain_attention
from natgrad.linalg.cholesky import damped_cholesky, ensure_fits
from natgrad.linalg.krylov import conjugate_gradient
from natgrad.linalg.lanczos import ASKED, SPARE, Product, lanczos, largest, tridiagonal
from natgrad.metric.metric import DENSE_PARAMETERS, Metric, Vector, named

INDEFINITE = ("refuse", "absolute", "shift")
KRYLOV = 500  # the most products for |ĝ| of more parameters than can be dense (Dauphin et al. 2014, section 6)
TOLERANCE = 1e-8  # of iterative solves, relative


class Eigenpairs(tuple[Tensor, list[Vector]]):
    """What `Hessian.top` finds: a pair (values, vectors).

    Attributes:
        residuals: ‖ĝv − γv‖ of each; an eigenvalue lies within that of γ.
        multiplicities: how often each value occurs among the k, to √ε of the largest. The last one may go on beyond.
    """

    residuals: Tensor
    multiplicities: Tensor

    def __new__(cls, values: Tensor, vectors: list[Vector], residuals: Tensor) -> Eigenpairs:
        out = super().__new__(cls, (values, vectors))
        near = torch.finfo(values.dtype).eps ** 0.5 * values.abs().max()
        out.residuals = residuals
        out.multiplicities = ((values[:, None] - values).abs() <= near).sum(1)
        return out


class Density(tuple[Tensor, Tensor]):
    """What `Hessian.spectrum` finds: a pair (nodes, weights).

    Attributes:
        errors: of Σ weights up to each node, one standard error over the probes; NaN for one probe.
        residuals: an eigenvalue lies within that of each node. Nodes with larger ones stand for many eigenvalues.
    """

    errors: Tensor
    residuals: Tensor

    def __new__(cls, runs: list[tuple[Tensor, Tensor, Tensor]]) -> Density:
        """From the nodes, weights (that sum to 1) and residuals of each probe."""
        nodes, residuals = torch.cat([r[0] for r in runs]), torch.cat([r[2] for r in runs])
        owner = torch.cat([torch.full_like(r[0], i, dtype=torch.long) for i, r in enumerate(runs)])
        order = nodes.argsort()
        each = torch.cat([r[1] for r in runs])[order]
        total = squares = torch.zeros_like(each)
        for i in range(len(runs)):
            below = torch.where(owner[order] == i, each, 0).cumsum(0)
            total, squares = total + below, squares + below.square()
        n = len(runs)
        out = super().__new__(cls, (nodes[order], each / n))
        spread = (squares - total.square() / n).clamp(min=0) / (n - 1) if n > 1 else torch.full_like(each, torch.nan)
        out.errors, out.residuals = (spread / n).sqrt(), residuals[order]
        return out


class Hessian(Metric):
    """∂²loss/∂θ² at the current parameters.

    Args:
        loss_fn: ``loss_fn() → scalar``, which reads the parameters where they are (as a closure over a model does), or
            ``loss_fn(batch) → scalar`` for use with ``opt.step(batch)``.
        params: a module, ``{name: parameter}`` or an iterable of parameters. One that is frozen later counts as
            constant: its rows and columns are zero, and the spectrum is that of the others.
        indefinite: what `sharp`, `logdet`, `sample` and the Newton steps take for negative eigenvalues: "refuse",
            "absolute" or "shift", see above.

    Attention is computed without fused kernels, which have no second derivative.

    Example::

        hessian = Hessian(lambda: criterion(model(x), y), model)
        values, vectors = hessian.top(5)

    Raises:
        TypeError: loss_fn is not callable, or takes more than a batch.
        ValueError: `indefinite` is none of the above; at the first product, a loss that is not a scalar, is not finite
            or does not depend on the parameters.
    """

    default_step = "fixed"
    step_options: Mapping[str, float] = {"lr": 1.0, "damping": 1e-3}

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        params: nn.Module | Mapping[str, Tensor] | Iterable[Tensor],
        indefinite: str = "refuse",
    ) -> None:
        super().__init__(named(params))
        if indefinite not in INDEFINITE:
            raise ValueError(f"indefinite must be one of {', '.join(map(repr, INDEFINITE))}, got {indefinite!r}")
        self.indefinite = indefinite
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a callable that returns the loss, got {type(loss_fn).__name__}")
        required = [
            p
            for p in inspect.signature(loss_fn).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if len(required) > 1:
            raise TypeError(
                "loss_fn takes nothing (it reads the parameters where they are) or one batch, got a function of "
                f"{[p.name for p in required]}"
            )
        self.loss_fn, self._takes_batch = loss_fn, bool(required)
        self._batch: tuple[Any, ...] = ()
        self._df: Vector = {}

    # products ------------------------------------------------------------------------------------------

    def _loss(self) -> Tensor:
        if self._takes_batch and not self._batch:
            raise RuntimeError(
                "this Hessian's loss_fn takes a batch and has seen none: call observe(batch), or opt.step(batch), first"
            )
        with torch.enable_grad(), plain_attention():
            loss = self.loss_fn(*self._batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, got {got}")
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on the parameters: loss_fn must compute it anew, and not under no_grad"
            )
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"the loss is {float(loss.detach())}: its Hessian is not defined")
        with torch.enable_grad():
            return loss.reshape(())

    def live(self) -> Vector:
        """The parameters that are not frozen.

        Raises:
            ValueError: all are.
        """
        found = {n: p for n, p in self.parameters.items() if p.requires_grad}
        if not found:
            raise ValueError("every parameter of this Hessian is frozen: none requires grad")
        return found

    def product(self) -> Product:
        """v ↦ ĝv on flat vectors of the live parameters, the gradient's graph built once and shared by all products."""
        params = list(self.live().values())
        with torch.enable_grad():
            grads = torch.autograd.grad(self._loss(), params, create_graph=True, allow_unused=True)
        if all(g is None for g in grads):
            raise ValueError("the loss does not depend on the parameters")
        used = [(g, i) for i, g in enumerate(grads) if g is not None and g.requires_grad]

        def apply(v: Tensor) -> Tensor:
            if not used:  # a loss linear in the parameters
                return torch.zeros_like(v)
            parts = v.split([p.numel() for p in params])
            out = torch.autograd.grad(
                [g for g, _ in used],
                params,
                [parts[i].reshape(params[i].shape) for _, i in used],
                retain_graph=True,
                allow_unused=True,
            )
            return torch.cat(
                [torch.zeros_like(p).reshape(-1) if h is None else h.reshape(-1) for h, p in zip(out, params)]
            )

        return apply

    def _join(self, v: Mapping[str, Tensor]) -> Tensor:
        """The live entries of a vector, flat."""
        return torch.cat([v[n].reshape(-1) for n in self.live()])

    def _part(self, flat: Tensor, rest: Mapping[str, Tensor] | None = None) -> Vector:
        """A flat vector of the live parameters as a vector, zero (or `rest`) at frozen ones."""
        live = self.live()
        parts = dict(zip(live, flat.split([p.numel() for p in live.values()])))
        constant = rest or {n: torch.zeros_like(p) for n, p in self.parameters.items() if n not in live}
        return {n: parts[n].reshape(p.shape) if n in live else constant[n] for n, p in self.parameters.items()}

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        return self._part(self.product()(self._join(self.check(v, "v"))))

    def sharp(self, df: Mapping[str, Tensor], damping: float) -> Vector:
        """(ĝ + λI)⁻¹ df, with what `indefinite` says in place of ĝ.

        Up to 5000 parameters by a dense factor. Beyond: "refuse" and "shift" by conjugate gradients, "absolute" in the
        Krylov space of df.

        Raises:
            ValueError: ĝ + λI is not positive definite and `indefinite` is "refuse".
        """
        damping = self.check_damping(damping)
        df = self.check(df, "df")
        if sum(p.numel() for p in self.parameters.values()) <= DENSE_PARAMETERS:
            g = self.vector_to_flat(df)
            return self.flat_to_vector(torch.cholesky_solve(g[:, None], self._damped_cholesky(damping))[:, 0])
        apply, g = self.product(), self._join(df)
        if self.indefinite == "absolute":
            solution = self._absolute(apply, g, damping)
        else:
            more = damping + (self._negative(apply, g) if self.indefinite == "shift" else 0.0)
            solution, _ = conjugate_gradient(lambda v: apply(v) + more * v, g, tolerance=TOLERANCE)
            damping = more
        return self._part(solution, {n: g / damping for n, g in df.items()})

    def _negative(self, apply: Product, like: Tensor) -> float:
        """max(0, −γ_min), from above by its residual."""
        values, _, residuals = largest(lambda v: -apply(v), self._probes(1 + SPARE, like, 0), 1, signed=True)
        return max(0.0, float(values[0] + residuals[0]))

    @staticmethod
    def _absolute(apply: Product, g: Tensor, damping: float) -> Tensor:
        """(|ĝ| + λI)⁻¹ g ≈ ‖g‖ Q (|T| + λI)⁻¹ e₁ of the Krylov space of g; exact where that is invariant."""
        if not bool(g.any()):
            return g
        steps = min(KRYLOV, len(g))
        ensure_fits(steps * g.numel() * g.element_size(), f"a Krylov space of {steps} vectors", 'indefinite="shift"', g)

        def step(diagonal: Tensor, off: Tensor) -> tuple[Tensor, float]:
            """In coordinates of the basis, and the part that the last vectors have in it."""
            values, y = torch.linalg.eigh(tridiagonal(diagonal, off))
            inside = y @ (y[0] / (values.abs() + damping))
            return inside, float(inside[-ASKED:].norm() / inside.norm())

        diagonal, off, basis = lanczos(apply, g, steps, lambda d, o: step(d, o)[1] <= TOLERANCE)
        inside, left = step(diagonal, off)
        if float(off[-1]) > 0 and left > TOLERANCE:
            warnings.warn(
                f"{steps} products are too few for (|ĝ| + {damping:g}·I)⁻¹: the last {ASKED} carry {left:.0e} of the "
                "step; a larger damping needs fewer",
                stacklevel=3,
            )
        return g.norm() * (basis @ inside)

    def _damped_cholesky(self, damping: float) -> Tensor:
        if self.indefinite == "refuse":
            return super()._damped_cholesky(damping)
        damping = self.check_damping(damping)
        values, vectors = torch.linalg.eigh(self.dense())
        values = values.abs() if self.indefinite == "absolute" else values - values[0].clamp(max=0)
        return damped_cholesky((vectors * values) @ vectors.mT, damping)

    def dense(self) -> Tensor:
        like = next(iter(self.parameters.values()))
        size = sum(p.numel() for p in self.parameters.values())
        ensure_fits(
            size**2 * like.element_size(),
            f"the dense {size}×{size} Hessian",
            "flat(v) for products, or top(k) and spectrum() for eigenvalues",
            like,
        )
        apply = self.product()
        live = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in self.parameters.values()]).to(like.device)
        out = like.new_zeros(size, size)
        part = torch.stack([apply(e) for e in torch.eye(int(live.sum()), dtype=like.dtype, device=like.device)])
        out[live.nonzero(), live.nonzero().mT] = (part + part.mT) / 2
        return out

    # spectrum ------------------------------------------------------------------------------------------

    def top(self, k: int, steps: int | None = None, seed: int = 0) -> Eigenpairs:
        """The k eigenvalues largest in magnitude, in decreasing magnitude, and their eigenvectors.

        By block Lanczos, which finds an eigenvalue as often as it occurs. It goes on until all residuals are at most √ε
        of the largest eigenvalue, and warns where that takes more steps than there are.

        Args:
            k: how many.
            steps: the most times that the products of a block of k + 2 vectors are taken; None is 300.
            seed: of the random start.

        Returns:
            A pair (values (k,), eigenvectors), with the attributes `residuals` (k,) and `multiplicities` (k,).

        Raises:
            ValueError: k is not between 1 and the number of parameters that are not frozen.
        """
        like = torch.cat([p.detach().reshape(-1) for p in self.live().values()])
        if not 1 <= k <= len(like):
            raise ValueError(f"k must be between 1 and the {len(like)} parameters, got {k}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        start = self._probes(min(k + SPARE, len(like)), like, seed)
        values, vectors, residuals = largest(self.product(), start, k, steps)
        return Eigenpairs(values, [self._part(v) for v in vectors.mT], residuals)

    def spectrum(self, steps: int = 50, probes: int = 4, seed: int = 0) -> Density:
        """Nodes and weights of the spectral density: Σ weights · h(nodes) ≈ tr h(ĝ)/P.

        Each has shape (probes·steps,), sorted by node. The pair has the attributes `errors`, the standard error of the
        share of eigenvalues up to each node, and `residuals`, within which of a node there is an eigenvalue.
        """
        if steps < 1 or probes < 1:
            raise ValueError(f"steps and probes must be at least 1, got {steps} and {probes}")
        apply, runs = self.product(), []
        like = torch.cat([p.detach().reshape(-1) for p in self.live().values()])
        for i in range(probes):
            diagonal, off, _ = lanczos(apply, self._probes(1, like, seed + i)[:, 0], min(steps, len(like)))
            values, vectors = torch.linalg.eigh(tridiagonal(diagonal, off))
            runs.append((values, vectors[0].square(), (off[-1] * vectors[-1]).abs()))
        return Density(runs)

    @staticmethod
    def _probes(count: int, like: Tensor, seed: int) -> Tensor:
        """Standard normal vectors, (P, count)."""
        generator = torch.Generator(device=like.device).manual_seed(seed)
        return torch.randn(count, len(like), dtype=like.dtype, device=like.device, generator=generator).mT

    # what the optimizer asks for -----------------------------------------------------------------------

    def observe(self, batch: Any) -> Tensor:
        """The loss on a batch, its gradient, and from now on its Hessian."""
        self._batch = (batch,) if self._takes_batch else ()
        loss, live = self._loss(), self.live()
        grads = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
        found = dict(zip(live, grads))
        self._df = {n: torch.zeros_like(p) if (g := found.get(n)) is None else g for n, p in self.parameters.items()}
        return loss.detach()

    def gradient(self) -> Vector:
        if not self._df:
            raise RuntimeError("Hessian has seen no batch yet: call observe(batch), or opt.step(batch), first")
        return self._df
