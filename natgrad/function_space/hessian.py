"""The Hessian of a loss as a metric, and its spectrum by Lanczos.

Products ĝ v = ∂(df·v)/∂θ by double backpropagation (Pearlmutter 1994), O(P) each. An indefinite Hessian is a
pseudo-Riemannian metric: `flat`, `inner` and the spectrum are as always; `sharp`, `logdet` and `sample` ask that ĝ
+ λI is positive definite. The spectral density is by stochastic Lanczos quadrature (Ghorbani, Krishnan & Xiao 2019,
https://arxiv.org/abs/1901.10159, algorithm 1), with full reorthogonalisation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.function_space.conjugate_gradient import conjugate_gradient
from natgrad.linalg.cholesky import ensure_fits
from natgrad.metric.metric import DENSE_PARAMETERS, Metric, Vector, named

Product = Callable[[Tensor], Tensor]


class Hessian(Metric):
    """∂²loss/∂θ² at the current parameters.

    Args:
        loss_fn: ``loss_fn() → scalar``, which reads the parameters where they are (as a closure over a model does), or
            ``loss_fn(batch) → scalar`` for use with ``opt.step(batch)``.
        params: a module, ``{name: parameter}`` or an iterable of parameters.

    Example::

        hessian = Hessian(lambda: criterion(model(x), y), model)
        values, vectors = hessian.top(5)

    Raises:
        TypeError: loss_fn is not callable, or takes more than a batch.
        ValueError: at the first product, a loss that is not a scalar, is not finite or does not depend on the
            parameters.
    """

    default_step = "fixed"
    step_options: Mapping[str, float] = {"lr": 1.0, "damping": 1e-3}

    def __init__(
        self, loss_fn: Callable[..., Tensor], params: nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
    ) -> None:
        super().__init__(named(params))
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
        with torch.enable_grad():
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

    def product(self) -> Product:
        """v ↦ ĝv on flat vectors (P,), the gradient's graph built once and shared by all products."""
        sizes = [p.numel() for p in self.parameters.values()]
        params = [p for p in self.parameters.values() if p.requires_grad]  # no rows and columns for frozen ones
        with torch.enable_grad():
            grads = torch.autograd.grad(self._loss(), params, create_graph=True, allow_unused=True)
        if all(g is None for g in grads):
            raise ValueError("the loss does not depend on the parameters")
        used = [(g, p) for g, p in zip(grads, params) if g is not None and g.requires_grad]

        def apply(v: Tensor) -> Tensor:
            if not used:  # a loss linear in the parameters
                return torch.zeros_like(v)
            parts = dict(zip(self.parameters.values(), v.split(sizes)))
            out = torch.autograd.grad(
                [g for g, _ in used],
                params,
                [parts[p].reshape(p.shape) for _, p in used],
                retain_graph=True,
                allow_unused=True,
            )
            found = dict(zip(params, out))
            rows = [found.get(p) for p in self.parameters.values()]
            return torch.cat([v.new_zeros(n) if h is None else h.reshape(-1) for h, n in zip(rows, sizes)])

        return apply

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        return self.flat_to_vector(self.product()(self.vector_to_flat(self.check(v, "v"))))

    def sharp(self, df: Mapping[str, Tensor], damping: float) -> Vector:
        """(ĝ + λI)⁻¹ df, by Cholesky up to 5000 parameters, else by conjugate gradients.

        Raises:
            ValueError: ĝ + λI is not positive definite.
        """
        damping = self.check_damping(damping)
        g = self.vector_to_flat(self.check(df, "df"))
        if g.numel() <= DENSE_PARAMETERS:
            return self.flat_to_vector(torch.cholesky_solve(g[:, None], self._damped_cholesky(damping))[:, 0])
        apply = self.product()
        solution, _ = conjugate_gradient(lambda v: apply(v) + damping * v, g, tolerance=1e-8)
        return self.flat_to_vector(solution)

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
        out = torch.stack([apply(e) for e in torch.eye(size, dtype=like.dtype, device=like.device)])
        return (out + out.mT) / 2

    # spectrum ------------------------------------------------------------------------------------------

    def top(self, k: int, steps: int | None = None, seed: int = 0) -> tuple[Tensor, list[Vector]]:
        """The k eigenvalues largest in magnitude, in decreasing magnitude, and their eigenvectors, by Lanczos.

        Args:
            steps: Lanczos steps; None takes max(4k, 50), at most P.
        """
        size = sum(p.numel() for p in self.parameters.values())
        if not 1 <= k <= size:
            raise ValueError(f"k must be between 1 and the {size} parameters, got {k}")
        steps = min(size, max(4 * k, 50) if steps is None else max(steps, k))
        diagonal, off, basis = lanczos(self.product(), self._probe(size, seed), steps)
        values, vectors = torch.linalg.eigh(tridiagonal(diagonal, off))
        order = values.abs().argsort(descending=True)[:k]
        return values[order], [self.flat_to_vector(basis @ vectors[:, i]) for i in order]

    def spectrum(self, steps: int = 50, probes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Nodes and weights of the spectral density: Σ weights · h(nodes) ≈ tr h(ĝ)/P.

        Each has shape (probes·steps,), sorted by node.
        """
        size = sum(p.numel() for p in self.parameters.values())
        if steps < 1 or probes < 1:
            raise ValueError(f"steps and probes must be at least 1, got {steps} and {probes}")
        apply, nodes, weights = self.product(), [], []
        for i in range(probes):
            diagonal, off, _ = lanczos(apply, self._probe(size, seed + i), min(steps, size))
            values, vectors = torch.linalg.eigh(tridiagonal(diagonal, off))
            nodes.append(values)
            weights.append(vectors[0].square() / probes)
        order = torch.cat(nodes).argsort()
        return torch.cat(nodes)[order], torch.cat(weights)[order]

    def _probe(self, size: int, seed: int) -> Tensor:
        like = next(iter(self.parameters.values()))
        generator = torch.Generator(device=like.device).manual_seed(seed)
        return torch.randn(size, dtype=like.dtype, device=like.device, generator=generator)

    # what the optimizer asks for -----------------------------------------------------------------------

    def observe(self, batch: Any) -> Tensor:
        """The loss on a batch, its gradient, and from now on its Hessian."""
        self._batch = (batch,) if self._takes_batch else ()
        loss = self._loss()
        live = {n: p for n, p in self.parameters.items() if p.requires_grad}
        grads = dict(zip(live, torch.autograd.grad(loss, list(live.values()), allow_unused=True)))
        self._df = {n: torch.zeros_like(p) if grads.get(n) is None else grads[n] for n, p in self.parameters.items()}
        return loss.detach()

    def gradient(self) -> Vector:
        if not self._df:
            raise RuntimeError("Hessian has seen no batch yet: call observe(batch), or opt.step(batch), first")
        return self._df


def lanczos(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal (k,), off-diagonal (k − 1,) and orthonormal basis (P, k) of a symmetric map on a Krylov space.

    k < steps where the space is invariant.
    """
    q = start / start.norm()
    basis, diagonal, off = [q], [], []
    scale = 0.0
    for _ in range(steps):
        w = product(basis[-1])
        diagonal.append(basis[-1] @ w)
        q = torch.stack(basis, dim=1)
        for _ in range(2):  # twice is enough (Parlett 1998, section 6.9)
            w = w - q @ (q.mT @ w)
        beta = w.norm()
        scale = max(scale, float(diagonal[-1].abs()), float(beta))
        if float(beta) <= 100 * torch.finfo(w.dtype).eps * scale or len(diagonal) == steps:
            break
        off.append(beta)
        basis.append(w / beta)
    return (
        torch.stack(diagonal),
        torch.stack(off) if off else diagonal[0].new_zeros(0),
        torch.stack(basis, dim=1),
    )


def tridiagonal(diagonal: Tensor, off: Tensor) -> Tensor:
    """The symmetric tridiagonal matrix."""
    return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
