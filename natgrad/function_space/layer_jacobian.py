"""The Jacobian of residuals, kept by linear layer as factors instead of entries.

A linear layer maps every component s of a forward Laplacian (and every call of it) with one weight, so a residual's
derivative with respect to the (out, in + 1) matrix of the layer is Σ_s g_s a_sᵀ: a_s the inputs, g_s the derivatives of
the residual with respect to the outputs (see `linear_tap`). One forward and one backward pass over all points
give the g and a of all layers. Then

    J v = Σ_s g_s·(V a_s),    Jᵀc = Σ_ns c_n g_ns a_nsᵀ,    (JJᵀ)_nm = Σ_st (g_ns·g_mt)(a_ns·a_mt)

are matrix products that never form J. Where a layer is so thin that its part of J has fewer entries than its factors,
that part is formed. A parameter θ outside of linear layers, as the unknown coefficient of an inverse problem, is given
to each point as θ + 0 with a zero of the point's own: its derivatives there are the parameter's columns, a = 1.

The same backward pass gives Σ_n c_n ∂r_n/∂θ, with random c_n, which the factors must give as well: a residual that
depends on weights by other ways than linear layers is found out at every linearisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from natgrad.function_space.jacobian import KEPT_BYTES, JacobianOperator, gram
from natgrad.function_space.linear_tap import LinearTap
from natgrad.function_space.residuals import CHUNK_BYTES, Residuals
from natgrad.metric.metric import Vector

BAND = 64  # rows of JJᵀ that are formed at once, so that their products stay in the cache
LayerName = tuple[str, str | None]  # of the weight and the bias
Part = tuple[Tensor, Tensor]  # g (n, S, out) and a (n, S, in + 1) of one term's n rows


class Unseen(Exception):
    """The residuals depend on parameters by other ways than linear layers."""


def layer_rows(residuals: Residuals, params: Vector, taken: Iterable[str]) -> tuple[Tensor, JacobianOperator] | None:
    """The stacked residuals (N,) and their Jacobian; None where the factors would not fit in memory.

    Args:
        params: the parameters that are not frozen.
        taken: the names of all parameters of the metric.

    Raises:
        Unseen: J is not made of the factors of linear layers.
        ValueError: a residual is not finite, or reads a parameter that is not the metric's (names the term).
    """
    layers = layer_names(params)
    loose = [n for n in params if not any(n in layer for layer in layers)]
    try:
        shapes = {name: traced_shapes(residuals, name, params, layers) for name in residuals.batch}
        free = sum(params[n].numel() for n in loose)
        count = sum(
            len(residuals.batch[n][0]) * (residuals.components[n] * size + free) for n, (_, size) in shapes.items()
        )
        if count * next(iter(params.values())).element_size() > KEPT_BYTES:
            return None
        terms = [TermRows(residuals, name, params, taken, layers, loose, shapes[name][0]) for name in residuals.batch]
    except RuntimeError as error:  # an input of a layer belongs to a transform inside the term and cannot leave it
        raise Unseen from error
    root = torch.cat([t.root for t in terms])
    residuals.check_finite(root)
    blocks = {layer: LayerBlock([t.parts[layer] for t in terms]) for layer in terms[0].parts}
    return root, LayerRows(blocks, params).rows(residuals.chunk)


def layer_names(params: Vector) -> list[LayerName]:
    """(weight, bias) of what may be a linear layer."""
    weights = [n for n, p in params.items() if p.ndim == 2 and n.endswith("weight")]
    return [(w, b if (b := w.removesuffix("weight") + "bias") in params else None) for w in weights]


def traced_shapes(
    residuals: Residuals, name: str, params: Vector, layers: list[LayerName]
) -> tuple[list[torch.Size], int]:
    """Shapes (S, out) of the outputs of every call of a layer at one point, and how many numbers its factors take."""
    with torch.no_grad(), LinearTap({id(params[layer[0]]): layer for layer in layers}, None) as tap:
        residuals.at_point(name, params, *(d[0] for d in residuals.batch[name]))
    fit = all(a.shape == (o[0], params[w].shape[1] + 1) for (w, _), a, o in zip(tap.layers, tap.inputs, tap.shapes))
    if not fit or any(len(o) != 2 for o in tap.shapes):  # a layer within a point has further axes
        raise Unseen
    return tap.shapes, sum(a.numel() + o.numel() for a, o in zip(tap.inputs, tap.shapes))


class TermRows:
    """The rows of one term: `root` (n,) and `parts` {layer: (g, a)}, scaled as the stacked residuals are.

    A parameter outside of layers is one with the name (parameter, None), a = 1.
    """

    def __init__(
        self,
        residuals: Residuals,
        name: str,
        params: Vector,
        taken: Iterable[str],
        layers: list[LayerName],
        loose: list[str],
        shapes: list[torch.Size],
    ) -> None:
        live = {n: p.detach().requires_grad_() for n, p in params.items()}
        ids = {id(live[layer[0]]): layer for layer in layers}
        called: list[LayerName] = []

        def residual(shifts: list[Tensor], *at: Tensor) -> tuple[Tensor, list[Tensor]]:
            own = dict(zip(loose, shifts[len(shapes) :]))
            with LinearTap(ids, shifts[: len(shapes)]) as tap:
                r = residuals.at_point(name, {n: p + own[n] if n in own else p for n, p in live.items()}, *at)
            called[:] = tap.layers
            return r, tap.inputs

        roots: list[Tensor] = []
        found: dict[LayerName, list[Part]] = {layer: [] for layer in [*layers, *((n, None) for n in loose)]}
        data, k, scales = residuals.batch[name], residuals.components[name], residuals.scales[name]
        generator = torch.Generator().manual_seed(0)
        for scale, *piece in zip(*(d.split(residuals.chunk or len(d)) for d in (scales, *data))):
            n = len(scale)
            shifts = [scale.new_zeros(n, *s).requires_grad_() for s in [*shapes, *(params[m].shape for m in loose)]]
            c = (1.0 + torch.randint(2, (n,), generator=generator)).to(scale)  # powers of 2: to divide by them is exact
            with torch.enable_grad():
                r, inputs = vmap(residual)(shifts, *piece)
                residuals.scope.read_by(f"term {name!r}", residuals.terms[name], r, live, taken, shifts)
                slopes = [backward(r[:, i] @ c, shifts, live, last=i == k - 1) for i in range(k)]
            roots.append((r.detach() * scale[:, None]).reshape(-1))
            factor = (scale / c).repeat_interleave(k)[:, None, None]
            for layer in layers:
                calls = [i for i, other in enumerate(called) if other == layer]
                g = [torch.stack([s[0][i] for s in slopes], dim=1).flatten(0, 1) for i in calls]  # (n k, S, out)
                a = [inputs[i].detach().repeat_interleave(k, dim=0) for i in calls]
                part = join(g, a, n * k, params[layer[0]])
                check_seen(part, layer, slopes)
                found[layer].append((part[0] * factor, part[1] if layer[1] else part[1][..., :-1]))
            for i, m in enumerate(loose, start=len(shapes)):
                own = torch.stack([s[0][i].reshape(n, -1) for s in slopes], dim=1).reshape(n * k, 1, -1)
                found[m, None].append((own * factor, own.new_ones(n * k, 1, 1)))
        self.root = torch.cat(roots)
        self.parts = {layer: whole(parts) for layer, parts in found.items()}


Slopes = tuple[list[Tensor], Vector]  # of a component summed over points: by the outputs of layers, by the parameters


def backward(r: Tensor, shifts: list[Tensor], live: Vector, last: bool) -> Slopes:
    leaves = [*shifts, *live.values()]
    found = torch.autograd.grad(r, leaves, retain_graph=not last, allow_unused=True, materialize_grads=True)
    return list(found[: len(shifts)]), dict(zip(live, found[len(shifts) :]))


def join(g: list[Tensor], a: list[Tensor], n: int, weight: Tensor) -> Part:
    """The calls of one layer as one, without components on which no residual depends."""
    if not g:
        return weight.new_zeros(n, 1, weight.shape[0]), weight.new_zeros(n, 1, weight.shape[1] + 1)
    left, right = torch.cat(g, dim=1), torch.cat(a, dim=1)
    active = [s for s in range(left.shape[1]) if bool(left[:, s].any()) and bool(right[:, s].any())]
    if len(active) < left.shape[1]:
        left, right = left[:, active or [0]], right[:, active or [0]]
    return left, right


def whole(parts: list[Part]) -> Part:
    """Pieces of a term as one; where they differ in active components, zeros fill up."""
    if len(parts) == 1:
        return parts[0]
    size = max(g.shape[1] for g, _ in parts)

    def filled(t: Tensor) -> Tensor:
        return torch.cat([t, t.new_zeros(len(t), size - t.shape[1], t.shape[2])], dim=1)

    return torch.cat([filled(g) for g, _ in parts]), torch.cat([filled(a) for _, a in parts])


def check_seen(part: Part, layer: LayerName, slopes: list[Slopes]) -> None:
    """Σ_n g aᵀ of every component is the derivative that autograd gives, to rounding.

    Raises:
        Unseen: it is not.
    """
    g, a = part
    tolerance = torch.finfo(g.dtype).eps ** 0.5
    for i, (_, true) in enumerate(slopes):
        gi, ai = g[i :: len(slopes)], a[i :: len(slopes)]
        seen = gi.flatten(0, 1).mT @ ai.flatten(0, 1)
        size = gi.norm() * ai.norm()  # of the sum without cancellation
        weight, bias = layer
        off = (seen[:, :-1] - true[weight]).norm()
        if bias is not None:
            off = off + (seen[:, -1] - true[bias]).norm()
        if bool(off > tolerance * size):  # what is not finite is somebody else's to report
            raise Unseen


class LayerBlock:
    """The columns of J that belong to one layer: (N, out · (in + 1)), without the + 1 where there is no bias."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.counts = [len(g) for g, _ in parts]
        self.sides = (parts[0][0].shape[2], parts[0][1].shape[2])  # out, in + 1
        self.matrix: Tensor | None = None
        numbers = sum(g.numel() + a.numel() for g, a in parts)
        if sum(self.counts) * parts[0][0].shape[2] * parts[0][1].shape[2] <= numbers:
            self.matrix = torch.cat([self.entries(g, a).flatten(1) for g, a in parts])

    @staticmethod
    def entries(g: Tensor, a: Tensor) -> Tensor:
        """(n, out, in + 1)"""
        return g.mT @ a

    def jvp(self, v: Tensor) -> Tensor:
        """(out, in + 1) → (N,)"""
        if self.matrix is not None:
            return self.matrix @ v.flatten()
        return torch.cat([((a.flatten(0, 1) @ v.mT).view_as(g) * g).sum((1, 2)) for g, a in self.parts])

    def vjp(self, c: Tensor) -> Tensor:
        """(N,) → (out, in + 1)"""
        g, a = self.parts[0]
        if self.matrix is not None:
            return (self.matrix.mT @ c).view(g.shape[2], a.shape[2])
        out = c.new_zeros(g.shape[2], a.shape[2])
        for (g, a), part in zip(self.parts, c.split(self.counts)):
            out.addmm_((g * part[:, None, None]).flatten(0, 1).mT, a.flatten(0, 1))
        return out

    def gram(self) -> Tensor:
        """JJᵀ of these columns, (N, N)."""
        if self.matrix is not None:
            return gram(self.matrix)
        n = sum(self.counts)
        out = self.parts[0][0].new_zeros(n, n)
        for start, g, a in bands(self.parts):  # what stands left of and on the diagonal
            rows, column = len(g), 0
            gs, as_ = g.transpose(0, 1).flatten(0, 1), a.transpose(0, 1).flatten(0, 1)  # (S rows, ·)
            for h, b in self.parts:
                width = min(len(h), start + rows - column)
                if width <= 0:
                    break
                products = ((gs @ h[:width, t].mT).mul_(as_ @ b[:width, t].mT) for t in range(h.shape[1]))
                sums = next(products)
                for other in products:
                    sums.add_(other)
                out[start : start + rows, column : column + width] = sums.view(-1, rows, width).sum(0)
                column += width
        return out.tril() + out.tril(-1).mT


def bands(parts: list[Part]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, g, a) of a few rows after the other."""
    start = 0
    for g, a in parts:
        for gs, as_ in zip(g.split(BAND), a.split(BAND)):
            yield start, gs, as_
            start += len(gs)


@dataclass
class LayerRows:
    """J of all layers, with columns in the order of the flattened parameters."""

    blocks: dict[LayerName, LayerBlock]
    params: Vector

    def matrices(self, v: Tensor) -> dict[LayerName, Tensor]:
        """A flat vector (P,) as the (out, in + 1) matrix of each layer."""
        parts = dict(zip(self.params, v.split([p.numel() for p in self.params.values()])))
        found = {}
        for weight, bias in self.blocks:
            w = parts[weight].reshape(self.blocks[weight, bias].sides[0], -1)
            found[weight, bias] = w if bias is None else torch.cat([w, parts[bias][:, None]], dim=1)
        return found

    def flat(self, matrices: dict[LayerName, Tensor]) -> Tensor:
        """(…, out, in + 1) of each layer as (…, P)."""
        parts: Vector = {}
        for (weight, bias), x in matrices.items():
            parts[weight] = (x if bias is None else x[..., :-1]).flatten(-2)
            if bias is not None:
                parts[bias] = x[..., -1]
        return torch.cat([parts[n] for n in self.params], dim=-1)

    def jvp(self, v: Tensor) -> Tensor:
        found = [self.blocks[layer].jvp(x) for layer, x in self.matrices(v).items()]
        return torch.stack(found).sum(0)

    def vjp(self, c: Tensor) -> Tensor:
        return self.flat({layer: block.vjp(c) for layer, block in self.blocks.items()})

    def gram(self) -> Tensor:
        return torch.stack([block.gram() for block in self.blocks.values()]).sum(0)

    def chunks(self, points: int | None) -> Iterator[Tensor]:
        size = sum(p.numel() for p in self.params.values())
        rows = points or max(1, CHUNK_BYTES // (8 * size))
        for term in range(len(next(iter(self.blocks.values())).parts)):
            parts = {layer: block.parts[term] for layer, block in self.blocks.items()}
            for i in range(0, len(next(iter(parts.values()))[0]), rows):
                entries = {n: LayerBlock.entries(g[i : i + rows], a[i : i + rows]) for n, (g, a) in parts.items()}
                yield self.flat(entries)

    def rows(self, points: int | None) -> JacobianOperator:
        count = sum(next(iter(self.blocks.values())).counts)
        like = next(iter(self.params.values()))
        size = sum(p.numel() for p in self.params.values())
        return JacobianOperator(count, size, lambda: self.chunks(points), self.jvp, self.vjp, like, self.gram)
