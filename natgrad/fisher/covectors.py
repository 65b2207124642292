"""Gradients of each datum of a batch, as the layers saw them: covectors held as pairs, never as full matrices.

The gradient of datum n with respect to a layer's matrix is Σ_p g_np a_npᵀ over its positions, g the gradient of the
layer's output and a its input. Kept are g and a, of the size of the activations. From them come

    ⟨df_n, t_k⟩ = Σ_p g_npᵀ T_k a_np                                        (`Covectors.against`),
    ⟨df_nc, (ĝ + λ)⁻¹ df_nd⟩ = Σ_ij s_ij ĝ_nci ĝ_ndi â²_nj                    (`forms`),

the second where a layer saw a datum once: ĝ = Q_Uᵀ g and â = Q_Vᵀ a in the eigenbases of its block and s_ij the
eigenvalues of its inverse (Grosse et al. 2023, arXiv:2308.03296, §2.3 and 3.1). Elsewhere the gradients of a few data
at a time are formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.base import CHUNK, Block
from natgrad.capture.layers import Layer, LayerIO, summed_gradients
from natgrad.capture.parameters import ParameterSlice
from natgrad.capture.rows import OneHot, Rows, project
from natgrad.capture.tape import CaptureError
from natgrad.fisher.fisher import Fisher
from natgrad.linalg.block_diagonal import left_times
from natgrad.linalg.inverse import DiagonalInverse, EigenInverse, Inverse
from natgrad.metric.damping import Damping, Resolved, full


@dataclass
class Covectors:
    """Covectors of `count` data, one each, as the rows of every layer that is used."""

    metric: Fisher
    layers: list[Layer]
    uses: list[list[LayerIO]]  # of each layer
    count: int

    def dense(self, start: int = 0, length: int | None = None) -> dict[str, Tensor]:
        """A range of them as a stack ``{name: (length, *shape)}``."""
        length = self.count - start if length is None else length
        parameters = self.metric.parameters
        out = {n: torch.zeros(length, *p.shape, dtype=p.dtype, device=p.device) for n, p in parameters.items()}
        for layer, uses in zip(self.layers, self.uses):
            layer.unpack(summed_gradients(uses, layer.matrix_shape[0], start, length), out)
        return out

    def against(self, tangents: Mapping[str, Tensor]) -> Tensor:
        """⟨df_n, t_k⟩ with a stack of k tangent vectors, (k, data)."""
        k = len(next(iter(tangents.values())))
        like = next(iter(self.metric.parameters.values()))
        out = torch.zeros(k, self.count, dtype=like.dtype, device=like.device)
        for layer, uses in zip(self.layers, self.uses):
            t = layer.pack(tangents)
            if all(plain(use) for use in uses):
                out += torch.stack([paired(use, t.to(use.gradients.dtype)) for use in uses]).sum(0).to(out.dtype)
                continue
            most, flat = max(1, CHUNK // t[0].numel()), t.flatten(1)
            for start in range(0, self.count, most):
                length = min(most, self.count - start)
                g = summed_gradients(uses, layer.matrix_shape[0], start, length).flatten(1)
                out[:, start : start + length] += (flat.to(g.dtype) @ g.mT).to(out.dtype)
        return out


def plain(use: LayerIO) -> bool:
    """Whether a datum's gradient is taken from its rows without forming it: one row, or rows that pick columns."""
    rows = use.table is None and use.region is None and not use.swapped
    return rows and (use.gradients.shape[1] == 1 or isinstance(use.inputs, OneHot))


def paired(use: LayerIO, t: Tensor) -> Tensor:
    """Σ_p g_npᵀ T_k a_np, (k, data)."""
    a, g = use.inputs, use.gradients  # (data, positions, groups, ·)
    if not isinstance(a, OneHot):
        turned = torch.einsum("ngi,kgoi->kngo", a[:, 0], t)
        return torch.einsum("kngo,ngo->kn", turned, g[:, 0])
    found = [torch.einsum("onpb,npb,npo->n", one[0][:, a.index], a.scale, g[:, :, 0]) for one in t]
    return torch.stack(found)


# quadratic forms in the inverse ---------------------------------------------------------------------------


def forms(
    metric: Fisher,
    passes: Sequence[Covectors],
    damping: Damping,
    diagonal: bool = False,
    identity: Mapping[ParameterSlice, LayerIO] | None = None,
) -> Tensor:
    """⟨df_nc, (ĝ + λ)⁻¹ df_nd⟩ of each datum, (data, passes, passes); with `diagonal` those of c = d, (data, passes).

    Args:
        passes: covectors of the same data, one set for each c.
        identity: layers at the model's output, whose gradient in pass c is the c-th unit vector, and their inputs.
    """
    identity = identity or {}
    given = metric.dampings(damping)
    total: Tensor | None = None
    for found in by_block(metric, passes, identity, given, diagonal):
        total = found if total is None else total + found
    if total is None:
        raise CaptureError("none of the metric's parameters was used")
    return total


def by_block(
    metric: Fisher,
    passes: Sequence[Covectors],
    identity: Mapping[ParameterSlice, LayerIO],
    given: Resolved,
    diagonal: bool,
) -> Iterator[Tensor]:
    """The part of each block, and of what lies in none."""
    uses = [{layer.key: u for layer, u in zip(p.layers, p.uses)} for p in passes]
    layers = {layer.key: layer for p in passes for layer in p.layers}
    count = passes[0].count if passes else next(iter(identity.values())).data
    inside: set[ParameterSlice] = set()
    for block in metric._ready():
        keys = [layer.key for layer in block.layers]
        inside |= set(keys)
        inverse = block.kept_inverse(block.damping_of(given, metric.parameters))
        if len(keys) == 1 and keys[0] in identity:
            yield unit_form(inverse, block, identity[keys[0]], diagonal)
        elif any(k in u for u in uses for k in keys):
            mine = [[u.get(k, []) for k in keys] for u in uses]
            quick = quick_form(inverse, block, mine, diagonal)
            yield slow_form(inverse, block, mine, count, diagonal) if quick is None else quick
    for key in layers.keys() - inside:  # the metric is zero there
        layer = layers[key]
        like = next(u[key][0].gradients for u in uses if key in u)
        scale = layer.pack({n: 1 / d for n, d in full(given, metric.parameters, like).items() if n in layer.names})
        mine = [[u.get(key, [])] for u in uses]
        yield slow_form(DiagonalInverse(scale), LayerOnly(layer), mine, count, diagonal)


class LayerOnly:
    """A layer in place of a block, where there is none."""

    def __init__(self, layer: Layer) -> None:
        self.layers, self.shapes, self.shape = [layer], [layer.matrix_shape], layer.matrix_shape


def eigen_form(inverse: Inverse, block: Any) -> EigenInverse | None:
    """The inverse as eigenvalues (groups, d_out, d_in) in bases of the sides, where it is that."""
    if isinstance(inverse, EigenInverse):
        return inverse
    if isinstance(inverse, DiagonalInverse) and len(block.layers) == 1:
        return EigenInverse(inverse.scale.reshape(block.shapes[0]), None, None)
    return None


def quick_form(
    inverse: Inverse, block: Any, passes: Sequence[Sequence[list[LayerIO]]], diagonal: bool
) -> Tensor | None:
    """The form of a layer that saw each datum once; None where it is not so simple."""
    eigen = eigen_form(inverse, block)
    single = [p[0][0] for p in passes if len(p) == 1 and len(p[0]) == 1 and plain(p[0][0]) and p[0][0].one_row]
    if eigen is None or len(single) != len(passes):
        return None
    a = dense_rows(single[0].inputs, eigen.qv)  # (data, groups, d_in)
    g = torch.stack([dense_rows(use.gradients, eigen.qu) for use in single])  # (passes, data, groups, d_out)
    weight = torch.einsum("goi,ngi->ngo", eigen.scale, a.square())
    if diagonal:
        return torch.einsum("cngo,ngo->nc", g.square(), weight)
    return torch.einsum("cngo,dngo,ngo->ncd", g, g, weight)


def dense_rows(some: Rows, basis: Tensor | None) -> Tensor:
    """Rows of data with one position in a basis, (data, groups, d)."""
    turned = project(some, basis)
    return (turned.dense() if isinstance(turned, OneHot) else turned)[:, 0]


def unit_form(inverse: Inverse, block: Block, use: LayerIO, diagonal: bool) -> Tensor:
    """The form of a layer at the output: pass c has the gradient e_c, (data, d_out, d_out) or (data, d_out)."""
    eigen = eigen_form(inverse, block)
    if eigen is None:
        outputs = block.shapes[0][1]
        eye = torch.eye(outputs, dtype=block.dtype, device=use.gradients.device)
        passes = [
            [[LayerIO(e.expand(use.data, 1, 1, outputs), use.make_inputs, by_datum=use.by_datum)]] for e in eye.unbind()
        ]
        return slow_form(inverse, block, passes, use.data, diagonal)
    weight = dense_rows(use.inputs, eigen.qv)[:, 0].square() @ eigen.scale[0].mT  # (data, d_out)
    if diagonal:
        return weight if eigen.qu is None else left_times(eigen.qu[0].square(), weight.mT).mT
    if eigen.qu is None:
        return torch.diag_embed(weight)
    return left_times(eigen.qu[0], left_times(eigen.qu[0], torch.diag_embed(weight)).mT)


def slow_form(
    inverse: Inverse, block: Any, passes: Sequence[Sequence[list[LayerIO]]], data: int, diagonal: bool
) -> Tensor:
    """The form from the gradients of a few data at a time. `passes`: of each, the uses of each layer of the block."""
    width = sum(s.numel() for s in block.shapes)
    like = next(use.gradients for uses in passes for u in uses for use in u)
    most, found = max(1, CHUNK // (width * len(passes))), []
    for start in range(0, data, most):
        length = min(most, data - start)
        x = like.new_zeros(length, len(passes), width)
        for c, uses in enumerate(passes):
            at = 0
            for u, s in zip(uses, block.shapes):
                if u:
                    x[:, c, at : at + s.numel()] = summed_gradients(u, s[0], start, length).flatten(1)
                at += s.numel()
        y = inverse.apply(x.reshape(*x.shape[:2], *block.shape)).reshape(x.shape)
        found.append((x * y).sum(-1) if diagonal else x @ y.mT)
    return torch.cat(found)
