"""Blocks of several metrics over the same layers: copies, other structures of them, and sums.

A sum Σ cᵢ ĝᵢ is a block of the same structure again:

- dense, block, diagonal, input: exactly, as the structure is closed under sums;
- kfac: the Kronecker product nearest to Σ cᵢ Uᵢ⊗Vᵢ in the Frobenius norm. Rearranged, the sum is the matrix
  Σ cᵢ vec(Uᵢ) vec(Vᵢ)ᵀ, whose first singular pair is (vec U, vec V) (Van Loan & Pitsianis 1993, "Approximation with
  Kronecker products", §2). U and V are sums of the Uᵢ and Vᵢ with weights that are not negative, so they are positive
  semi-definite;
- ekfac: the eigenbases of these U and V, with the diagonal of the sum in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from natgrad.blocks.average import Average
from natgrad.blocks.base import Block, JointBlock
from natgrad.blocks.dense import LayerBlock
from natgrad.blocks.eigenvalue import EigenvalueBlock
from natgrad.blocks.kronecker import KroneckerBlock
from natgrad.blocks.structures import block_from_json, block_to_json
from natgrad.linalg.block_diagonal import across, diagonal_of, side_of, spans
from natgrad.linalg.inverse import overlapped
from natgrad.linalg.kronecker import eigen_of

Shapes = Mapping[str, torch.Size]
Parts = Sequence[tuple[float, Block]]


def copied(block: Block, shapes: Shapes, dtype: torch.dtype | None = None) -> Block:
    """Return a block with statistics of its own. `shapes`: of the parameters; `dtype`: of the statistics."""
    twin = block_from_json(block_to_json(block), shapes)
    for key, average in block.statistics.items():
        sums, masses = ({h: t.detach().clone() for h, t in of.items()} for of in (average.sums, average.masses))
        twin.statistics[key] = Average(sums, masses)
    twin.move(device_of(twin), dtype or block.dtype)
    return twin


def device_of(block: Block) -> torch.device:
    """Return where the statistics of a block are."""
    return next(s.device for a in block.statistics.values() for s in a.sums.values())


def restructured(block: Block, structure: str, shapes: Shapes) -> list[Block]:
    """Return what another structure keeps of a block: any block's "diagonal"; "input" of all but diagonals, layer by
    layer; "kfac" of ekfac.

    Raises:
        ValueError: the block does not hold what the structure keeps.
    """
    if block.structure == structure:
        return [block]
    if structure == "diagonal":
        return [filled(block, structure, shapes, {"diagonal": block.diagonal().flatten()})]
    if isinstance(block, KroneckerBlock) and structure == "input":
        return [filled(block, structure, shapes, {"U": diagonal_of(block.u)[..., None, :], "V": block.v})]
    if isinstance(block, LayerBlock) and structure == "input":
        return inputs_of(block, shapes)
    if isinstance(block, EigenvalueBlock) and structure == "kfac":
        return [filled(block, structure, shapes, {"U": block.u, "V": block.v})]
    raise ValueError(
        f"the block of {block.names} has structure {block.structure!r}, which does not hold what {structure!r} keeps; "
        f"take structure=None, which uses what the metrics hold, or 'diagonal', or metrics with structure={structure!r}"
    )


def inputs_of(block: LayerBlock, shapes: Shapes) -> list[Block]:
    """Return I ⊗ V of each layer of a block that is kept as a matrix, V the mean of the matrices of its outputs."""
    found: list[Block] = []
    said, start = block_to_json(block), 0
    for layer, (groups, out, into) in zip(said["layers"], block.shapes):
        size = groups * out * into
        m = block.matrix[start : start + size, start : start + size].reshape(groups, out, into, groups, out, into)
        v = m.diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=2).mean(-1).movedim(-1, 0)  # (groups, d_in, d_in)
        twin = block_from_json({**said, "structure": "input", "layers": [layer]}, shapes)
        assert isinstance(twin, KroneckerBlock)
        pieces = [v[..., a:b, a:b] for a, b in spans(twin.kept[1], into)]
        held = {"U": v.new_ones(groups, 1, out), "V": side_of(pieces)}
        twin.statistics = {k: Average({"": t}, {"": t.new_ones(())}) for k, t in held.items()}
        found.append(twin)
        start += size
    return found


def nearest_sum(parts: Parts, shapes: Shapes) -> Block:
    """Return Σ cᵢ ĝᵢ as one block; for kfac and ekfac the nearest that there is, see above.

    Args:
        parts: (cᵢ, block), over the same layers in one structure.
        shapes: of the parameters.
    """
    first = parts[0][1]
    if len(parts) == 1:
        return scaled(parts[0][0], first, shapes)
    if isinstance(first, KroneckerBlock):
        kron = [(c, b) for c, b in parts if isinstance(b, KroneckerBlock)]
        u, v = nearest_product([c for c, _ in kron], [b.u for _, b in kron], [b.v for _, b in kron])
        held = {"U": diagonal_of(u)[..., None, :] if first.inputs_alone else u, "V": v}
        if isinstance(first, EigenvalueBlock):
            held.update(diagonal_in_basis(parts, u, v))
        return filled(first, first.structure, shapes, held)
    if isinstance(first, LayerBlock):
        return filled(first, first.structure, shapes, {"matrix": sum_of([(c, b.value("matrix")) for c, b in parts])})
    return filled(first, first.structure, shapes, {"diagonal": sum_of([(c, b.value("diagonal")) for c, b in parts])})


def scaled(c: float, block: Block, shapes: Shapes) -> Block:
    """Return c ĝ."""
    twin = copied(block, shapes)
    for key, average in twin.statistics.items():
        if not twin.is_mean(key):
            average.sums = {h: c * s for h, s in average.sums.items()}
    return twin


def nearest_product(cs: Sequence[float], us: Sequence[Tensor], vs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (U, V) of the nearest product to Σ cᵢ Uᵢ⊗Vᵢ, group by group. Sides are as they are kept."""
    of_u, of_v = (torch.stack([m.flatten(1) for m in side], dim=-1) for side in (us, vs))  # (groups, entries, k)
    qu, ru = torch.linalg.qr(of_u * of_u.new_tensor(cs))
    qv, rv = torch.linalg.qr(of_v)
    left, s, right = torch.linalg.svd(ru @ rv.mT)
    size = s[..., :1].sqrt()
    u = (qu @ left[..., :1])[..., 0] * size
    v = (qv @ right.mT[..., :1])[..., 0] * size
    u, v = u.reshape(us[0].shape), v.reshape(vs[0].shape)
    sign = torch.where(diagonal_of(u).sum(-1) < 0, -1.0, 1.0).to(u)[..., None, None]
    return sign * u, sign * v


def diagonal_in_basis(parts: Parts, u: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Return the eigenbases of U and V, and the diagonal of a sum of ekfac blocks in them."""
    bases = {"Q_U": eigen_of(u)[1], "Q_V": eigen_of(v)[1]}
    total = []
    for c, block in parts:
        assert isinstance(block, EigenvalueBlock)
        old = [block.basis(key) for key in bases]
        turns = [None if new is None or q is None else across(new, q) for new, q in zip(bases.values(), old)]
        total.append((c, overlapped(block.value("S"), *turns)))
    return {"S": sum_of(total), **{key: q for key, q in bases.items() if q is not None}}


def filled(block: Block, structure: str, shapes: Shapes, held: Mapping[str, Tensor]) -> Block:
    """Return a block over the same layers with these statistics."""
    twin = block_from_json({**block_to_json(block), "structure": structure}, shapes)
    for key, value in held.items():
        twin.statistics[key] = Average({"": value.contiguous()}, {"": value.new_ones(())})
    return twin


def sum_of(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    return torch.stack([c * t for c, t in parts]).sum(0)


def differences(first: Block, other: Block) -> list[str]:
    """Say in what two blocks over the same parameters differ, so that they have no sum."""
    said = []
    if first.structure != other.structure:
        said.append(f"structure {first.structure!r} and {other.structure!r}")
    if isinstance(first, JointBlock) != isinstance(other, JointBlock) or first.shapes != other.shapes:
        said.append(f"matrices {[tuple(s) for s in first.shapes]} and {[tuple(s) for s in other.shapes]}")
    said += [
        f"{a.op} uses {list(map(str, a.pieces))}, {b.op} uses {list(map(str, b.pieces))}"
        for a, b in zip(first.layers, other.layers)
        if a.pieces != b.pieces or a.layout != b.layout
    ]
    if not said and first.sides() != other.sides():
        said.append(f"sides {first.sides()} and {other.sides()} (max_factor_dim=)")
    return said
