"""The geometry of quantum states: stochastic reconfiguration as natural gradient.

For ψ(s; θ) with O(s) = ∂ log ψ(s)/∂θ and expectations over |ψ|²,

    ĝ = Re Cov(O*, O),      dE = 2 Re Cov(O*, E_loc),

the Fubini–Study metric on real parameters and the gradient of the energy E = ⟨E_loc⟩ (Sorella 1998; Stokes et al.
2020, https://arxiv.org/abs/1909.02108). Rows √w (O − ⟨O⟩), real and imaginary parts stacked, give ĝ = JᵀJ and dE =
Jᵀc with c = 2√w (E_loc − E); the kernel form of the solve then costs O(N²P) (minSR: Chen & Heyl 2024,
https://arxiv.org/abs/2302.01941).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from natgrad.function_space.jacobian import JacobianOperator
from natgrad.function_space.jacobian_metric import JacobianMetric
from natgrad.function_space.reverse_mode import Mending
from natgrad.function_space.scope import Params, Scope
from natgrad.metric.metric import Vector


class QuantumGeometry(JacobianMetric):
    """Re Cov(O*, O) of a wave function with real parameters and real or complex log ψ.

    Args:
        log_psi: module that maps one state, shape (sites,) or whatever the states are, to log ψ, shape () or (1,).
        solver: "auto" | "dense" | "kernel" | "cg".
        chunk: states differentiated at once; None takes all.
        params: what log ψ computes with beside its own parameters, ``{name: module or parameter}``.

    A batch is ``{"states": (N, …), "weights": (N,), "local_energy": (N,)}``. Samples of |ψ|² need no weights; for a sum
    over all states the weights are |ψ|². Weights are normalised to sum to 1. `observe` returns the energy.

    Raises:
        TypeError, ValueError: at `observe`, a batch that does not fit or is not finite, log ψ that is not a scalar or
            does not depend on the parameters.
    """

    default_step = "trust region"

    scope: Scope

    def __init__(
        self, log_psi: nn.Module, solver: str = "auto", chunk: int | None = None, params: Params | None = None
    ) -> None:
        super().__init__(Scope(log_psi, params), solver)
        self.model, self.chunk = log_psi, chunk
        self.sampling_variance: Tensor | None = None  # of the energy of the last batch
        self._sampled: tuple[Tensor, Tensor] | None = None  # states and weights of the last batch

    def observe(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Linearise at the current parameters; returns the energy Σ w Re E_loc."""
        states, weights, local = self._check(batch)
        self._take_point()
        jacobian = self._derivatives(states)  # (N, 1 or 2, P): real (and imaginary) parts
        root = weights.sqrt()
        mean = torch.einsum("n,ncp->cp", weights, jacobian)
        energy = (weights * local).sum()
        self.sampling_variance = self._sampling_variance(states, weights, local - energy, "weights" not in batch)
        centred = local - energy
        parts = torch.stack([centred.real, centred.imag] if centred.is_complex() else [centred], dim=1)  # (N, 1 or 2)
        covector = parts.new_zeros(len(states), jacobian.shape[1])
        shared = min(parts.shape[1], jacobian.shape[1])  # the imaginary energy meets the imaginary part of O alone
        covector[:, :shared] = parts[:, :shared]
        rows = (root[:, None, None] * (jacobian - mean)).reshape(-1, jacobian.shape[2])
        self.rows = JacobianOperator.of(rows)
        self.root = (2 * root[:, None] * covector).reshape(-1)
        self.loss = energy.real if energy.is_complex() else energy
        self._sampled = (states, weights)
        return self.loss

    def _sampling_variance(self, states: Tensor, weights: Tensor, centred: Tensor, plain: bool) -> Tensor:
        """Σ w² (E_loc − E)² / (1 − Σ w²), that of a weighted mean over independent draws; 0 for the states of the last
        batch, whose energies differ by the parameters alone, as in a sum over all states. The first batch is drawn if
        it has no weights.
        """
        last = None if self._sampled is None else self._sampled[0]
        drawn = plain if last is None else last.shape != states.shape or not torch.equal(last, states)
        square = (weights.square() * centred.real.square()).sum()
        return square / (1 - weights.square().sum()).clamp(min=1 / len(weights)) if drawn else torch.zeros_like(square)

    def divergence(self, increments: Mapping[str, Tensor]) -> Tensor | None:
        """−½ log F, F = |⟨ψ|ψ'⟩|² / ⟨ψ|ψ⟩⟨ψ'|ψ'⟩ the fidelity of the states before and after, in the mean over |ψ|²."""
        if self._sampled is None:
            return None
        states, weights = self._sampled
        with torch.no_grad():
            before, after = (
                vmap(lambda s, at=at: self.scope.call(at, self.model, s).reshape(()), chunk_size=self.chunk)(states)
                for at in (self.point, self.moved(increments))
            )
            change = after - before
            change = change - change.real.max()  # a factor of ψ' drops out
            overlap = (weights * change.exp()).sum().abs().square()
            return -0.5 * (overlap / (weights * (2 * change.real).exp()).sum()).log()

    def _derivatives(self, states: Tensor) -> Tensor:
        at = Mending(self.model)  # wave functions of fermions are determinants

        def at_state(params: Vector, s: Tensor) -> Tensor:
            out = self.scope.call(params, at, s)
            if not isinstance(out, Tensor) or out.numel() != 1:
                got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(
                    f"log_psi must return a scalar for one state, got {got} for a state of shape {tuple(s.shape)}"
                )
            out = out.reshape(())
            return torch.stack([out.real, out.imag]) if out.is_complex() else out[None]

        live = self.scope.live()
        try:
            with torch.enable_grad():
                found = at_state(live, states[0])
        except RuntimeError as error:
            if states.is_floating_point():
                raise
            raise TypeError(
                f"log_psi does not take {states.dtype} states; cast them with .to({next(iter(live.values())).dtype})"
            ) from error
        if not (read := self.scope.read_by("log_psi", self.model.forward, found, live, self.parameters)):
            raise ValueError("log_psi does not depend on its parameters")
        self.scope.check_entries(read)
        with torch.no_grad():
            part = vmap(jacrev(at_state), (None, 0), chunk_size=self.chunk)(self.point, states)
        return torch.cat([part[n].reshape(*part[n].shape[:2], -1) for n in self.point], dim=2)

    def _check(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(batch, Mapping) or not {"states", "local_energy"} <= set(batch) <= {
            "states",
            "weights",
            "local_energy",
        }:
            got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise TypeError(
                f'a batch is {{"states": (N, …), "local_energy": (N,), "weights": (N,)}}, weights optional, got {got}'
            )
        states, local, like = batch["states"], batch["local_energy"], next(iter(self.parameters.values()))
        weights = batch.get(
            "weights", torch.full((len(states),), 1 / len(states), dtype=like.dtype, device=like.device)
        )
        for name, t in (("local_energy", local), ("weights", weights)):
            if t.shape != (len(states),):
                raise ValueError(f"{name} must have shape ({len(states)},), one entry a state, got {tuple(t.shape)}")
            if not bool(torch.isfinite(t).all()):
                bad = (~torch.isfinite(t)).nonzero()[:, 0]
                raise ValueError(
                    f"{name} is not finite at {len(bad)} of {len(states)} states, the first is state {int(bad[0])}"
                )
        if bool((weights < 0).any()) or not float(weights.sum()) > 0:
            raise ValueError("weights must be non-negative with a positive sum: probabilities |ψ|² of the states")
        dtype = like.dtype.to_complex() if local.is_complex() else like.dtype
        return states, (weights / weights.sum()).to(like.dtype), local.detach().to(dtype)
