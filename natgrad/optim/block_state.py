"""What the default step rule keeps of each block, and what it holds from one refresh to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.base import Block
from natgrad.optim.step_arithmetic import dot
from natgrad.optim.step_rule import Options, one_value
from natgrad.optim.step_sizes import DirectionSizes

# s falls to at most this share of itself from one refresh to the next: the Fisher matrix of a classifier that is sure
# of all its labels vanishes, and one label that is wrong would then throw the weights off (docs/step.md)
SCALE_MEMORY = 0.97
AGREE = 0.5  # c̄ above which a block is on its way, so that its steps may grow with its weights


@dataclass
class BlockState:
    """What the rule remembers of one block, in the block's coordinates; all but the velocity are scalars."""

    velocity: Tensor  # v
    coherence: Tensor  # c̄
    age: Tensor  # τ
    size: Tensor | None = None  # r; None is 1, as for blocks without a matrix
    newton_scale: Tensor | None = None  # s
    # ⟨g, d⟩, ‖g‖, ‖d‖ at the last refresh: for `cosines`, not to continue from
    seen: tuple[Tensor, Tensor, Tensor] | None = None

    def rescale(self, block: Block) -> Tensor:
        """Return s for new statistics: from these, which all ranks have, and not from the inverse, which may be older.

        One that is not finite counts as 0, which sets no limit.
        """
        now = block.newton_scale().nan_to_num(0, 0)
        self.newton_scale = (
            now if self.newton_scale is None else torch.maximum(now, SCALE_MEMORY * self.newton_scale.to(now))
        )
        return self.newton_scale

    def measure(self, sizes: Sequence[Tensor]) -> None:
        """Let r follow rms(W) / W₀ of the block's matrices: up to the size that layers start with, and beyond while its
        steps agree. Weights that are zero count as of that size. Steps of a block that only wanders must not grow with
        it.
        """
        if not sizes:
            return
        now = torch.stack(list(sizes)).square().mean().sqrt().to(self.coherence)
        if self.size is None:
            self.size = torch.where(now > 0, now, torch.ones_like(now))
        else:
            grown = torch.where(self.coherence > AGREE, now, now.clamp(max=1))
            self.size = torch.maximum(self.size, grown)

    def state_dict(self) -> dict[str, Any]:
        kept = ("velocity", "coherence", "age", "size", "newton_scale")
        return {k: t for k in kept if (t := getattr(self, k)) is not None}


MadeFor = tuple[list[tuple[Block, int]], set[str]]  # blocks with versions of their statistics; names of gradients


@dataclass
class Plan:
    """What steps have in common until the metric changes or other parameters have gradients.

    Lists and tensors without a remark have one entry for each of `mine`.
    """

    made_for: MadeFor
    covered: set[str]  # parameters that blocks cover
    active: list[Block]  # blocks of all ranks that have a gradient
    owned: list[Block]  # blocks whose directions are found here
    mine: list[Block]  # those of them that have a gradient
    idle: list[Block]  # and those that had one earlier
    states: list[BlockState]
    likes: Mapping[str, Tensor]  # tensors of the shape of whole parameters
    missing: list[str]  # parameters of `mine` without a gradient
    matrices: list[tuple[str, int]]  # parameters that the weight decay is of, with their places in `active`
    sizes: DirectionSizes
    weights: Tensor  # r
    newton_scale: Tensor | None  # s; None where it is not known
    nat: Tensor | None  # `Metric.nat`
    decay: float  # how much of the weight decay is left in batches of so many labels


def shared_options(blocks: Sequence[Block], options: Mapping[str, Options]) -> list[Options]:
    """Return the options of each block's parameters, which must be one.

    Raises:
        ValueError: they lie in groups that differ.
    """
    found = []
    for block in blocks:
        mine = [options[n] for n in block.names if n in options]
        one = mine[0]
        if any(o is not one for o in mine):
            where = f"step for the block of {block.names}"
            one = Options(
                one_value({o.lr for o in mine}, f"lr in one {where}"),
                one_value({o.momentum for o in mine}, f"momentum in one {where}"),
                one_value({o.damping for o in mine}, f"damping in one {where}"),
                share=one_value({o.share for o in mine}, f"schedule in one {where}"),
            )
        found.append(one)
    return found


def look(states: Sequence[BlockState], grads: Sequence[Tensor], directions: Sequence[Tensor]) -> None:
    """Keep what `NormalisedStep.cosines` are made of."""
    sizes = zip(torch._foreach_norm(list(grads)), torch._foreach_norm(list(directions)))
    for s, g, d, (size_g, size_d) in zip(states, grads, directions, sizes):
        s.seen = (dot(g, d), size_g, size_d)
