"""Kronecker factors of PDE residuals, through the Taylor coefficients of the differential operator.

Under the forward Laplacian a linear layer maps S = d + 2 components (value, first derivatives, Laplacian) with one
weight, as it maps positions in weight sharing. With a_s the inputs (a one for the bias beside the value) and g_s
the derivatives of the residual with respect to the outputs, the residual's derivative is Σ_s g_s a_sᵀ, and the
expand approximation of its second moment is

    B ⊗ A,    A = Σ_{n,s} a aᵀ / (N S),    B = Σ_{n,s} g gᵀ / N

(Dangel, Müller & Zeinhofer 2024, https://arxiv.org/abs/2405.15603, section 3). Components that the residual does
not depend on are left out of A and S, so one component on a linear network is exact. Blocks of terms add: X ↦ Σ_t
B_t X A_t on the (out, in + 1) matrix of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from natgrad.jet import Jet
from natgrad.metric import Vector
from natgrad.residuals import Residuals, Term

UNSEEN = (
    "Kronecker blocks cannot see how the residual of term {!r} depends on {}: they cover linear layers under "
    'natgrad.operators.laplacian and derivatives; take solver="kernel" or "cg" for other layers or derivatives'
)
AGREEMENT = 1e-6  # of Σ g aᵀ with the residual's derivative, relative


class LinearTap(TorchFunctionMode):
    """Notes the input of every linear layer and adds a shift to its output, in the order of use."""

    def __init__(self, names: dict[int, tuple[str, str | None]], shifts: list[Tensor] | None) -> None:
        super().__init__()
        self.names, self.shifts = names, shifts  # id of a weight → names of weight and bias
        self.layers: list[tuple[str, str | None]] = []
        self.inputs: list[Tensor] = []
        self.shapes: list[torch.Size] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.linear or id(args[1]) not in self.names:
            return out
        jet = isinstance(args[0], Jet)
        data, result = (args[0].data, out.data) if jet else (args[0][None], out[None])
        one = torch.zeros_like(data[:, :1])
        one = torch.cat([torch.ones_like(one[:1]), one[1:]])
        self.layers.append(self.names[id(args[1])])
        self.inputs.append(torch.cat([data, one], dim=1))  # (S, in + 1)
        self.shapes.append(result.shape)
        if self.shifts is not None:
            result = result + self.shifts[len(self.layers) - 1]
        return args[0].like(result) if jet else result[0]


class TermFactors:
    """(A, B) of every linear layer for one term, ``{(weight, bias): (A, B)}``."""

    def __init__(self, residuals: Residuals, name: str, params: Vector) -> None:
        data, term = residuals.batch[name], residuals.terms[name]
        weights = {n for n, p in params.items() if p.ndim == 2}
        names = {
            id(params[w]): (w, b if (b := w.removesuffix("weight") + "bias") in params else None)
            for w in weights
            if w.endswith("weight")
        }

        def trace(shifts: list[Tensor] | None, *at: Tensor) -> tuple[Tensor, LinearTap]:
            tap = LinearTap(names, shifts)

            def u(x: Tensor) -> Any:
                with tap:
                    return residuals.field(params)(x)

            return term(u, *at).reshape(-1), tap

        tap = trace(None, *(d[0] for d in data))[1]
        self.layers = tap.layers
        zeros = [params[next(iter(params))].new_zeros(s) for s in tap.shapes]

        def residual(shifts: list[Tensor], *at: Tensor) -> tuple[Tensor, list[Tensor]]:
            r, tap = trace(shifts, *at)
            return r, tap.inputs

        try:
            g, a = vmap(jacrev(residual, has_aux=True), (None, *(0,) * len(data)))(
                zeros, *data
            )  # g (N, k, S, out), a (N, S, in + 1)
        except RuntimeError as error:  # an input of a layer belongs to a transform inside the term and cannot leave it
            raise ValueError(UNSEEN.format(name, list(params))) from error
        self._check_seen(
            name, residuals, params, term, [t[:1] for t in g], [t[:1] for t in a], tuple(d[:1] for d in data)
        )
        weight, n = residuals.weights[name], len(data[0])
        self.factors: dict[tuple[str, str | None], tuple[Tensor, Tensor]] = {}
        for layer in dict.fromkeys(self.layers):
            calls = [i for i, other in enumerate(self.layers) if other == layer]
            active = [
                (g[i].reshape(n, -1, *g[i].shape[2:])[:, :, s], a[i][:, s])
                for i in calls
                for s in range(a[i].shape[1])
                if bool(g[i][:, :, s].any())
            ]
            if not active:
                continue
            left = torch.stack([torch.einsum("nko,nkp->op", gs, gs) for gs, _ in active]).sum(0) * (weight / n)
            right = torch.stack([a_s.mT @ a_s for _, a_s in active]).sum(0) / (n * len(active))
            self.factors[layer] = (right, left)

    def _check_seen(
        self,
        name: str,
        residuals: Residuals,
        params: Vector,
        term: Term,
        g: list[Tensor],
        a: list[Tensor],
        at: tuple[Tensor, ...],
    ) -> None:
        """Σ g aᵀ at one point is the residual's derivative there, unless one went round the operators.

        Raises:
            ValueError: it is not.
        """
        seen = {n: torch.zeros_like(p) for n, p in params.items()}
        for layer, gi, ai in zip(self.layers, g, a):
            block = torch.einsum("so,si->oi", gi[0, 0], ai[0])
            weight, bias = layer
            seen[weight] = seen[weight] + block[:, :-1]
            if bias is not None:
                seen[bias] = seen[bias] + block[:, -1]
        true = jacrev(lambda p: term(residuals.field(p), *(d[0] for d in at)).reshape(-1)[0])(params)
        off = [n for n in params if float((seen[n] - true[n]).norm()) > AGREEMENT * float(true[n].norm()) + 1e-300]
        if off:
            raise ValueError(UNSEEN.format(name, off))
