"""What the default step rule keeps of each block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.base import Block
from natgrad.linalg.inverse import Inverse
from natgrad.linalg.kronecker import FactorisationError
from natgrad.optim.step_arithmetic import dot
from natgrad.optim.step_rule import Options, one_value

MAX_FAILURES = 5  # factorisations of a block that may fail in a row
# s falls to at most this share of itself from one refresh to the next: the Fisher matrix of a classifier that is sure
# of all its labels vanishes, and one label that is wrong would then throw the weights off (docs/step.md)
SCALE_MEMORY = 0.97


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
    inverse: Inverse | None = None
    inverse_of: tuple[int, float] = (-1, 0.0)  # (version of the statistics, damping) that `inverse` belongs to
    failures: int = 0  # factorisations in a row that failed

    def rescale(self, block: Block) -> Tensor:
        """Return s for new statistics: from these, which all ranks have, and not from the inverse, which may be older.

        One that is not finite counts as 0, which sets no limit.
        """
        now = block.newton_scale().nan_to_num(0, 0)
        self.newton_scale = (
            now if self.newton_scale is None else torch.maximum(now, SCALE_MEMORY * self.newton_scale.to(now))
        )
        return self.newton_scale

    def is_stale(self, block: Block, damping: float) -> bool:
        return self.inverse is None or self.inverse_of != (block.version, damping)

    def state_dict(self) -> dict[str, Any]:
        """Without the inverse, which the statistics give again."""
        kept = ("velocity", "coherence", "age", "size", "newton_scale")
        return {k: t for k in kept if (t := getattr(self, k)) is not None}

    def refresh(self, block: Block, damping: float, make: Callable[[], Inverse] | None = None) -> Inverse:
        """The inverse for the block's present statistics; the last good one where it cannot be had.

        `make`: gives it, where ranks share the work.

        Raises:
            FactorisationError: it failed several times in a row, or there is no earlier one.
        """
        if self.is_stale(block, damping):
            try:
                self.inverse, self.failures = block.relative_inverse(damping) if make is None else make(), 0
            except FactorisationError as error:
                self.failures += 1
                if self.inverse is None or self.failures >= MAX_FAILURES:
                    raise FactorisationError(
                        f"block of {block.names}: {error} ({self.failures} times in a row)"
                    ) from error
                if self.failures == 1:
                    warnings.warn(
                        f"block of {block.names}: {error}; the last good factor is kept. Repeats are counted in "
                        "opt.info['kept_factors']",
                        stacklevel=2,
                    )
            self.inverse_of = (block.version, damping)
        assert self.inverse is not None
        return self.inverse


def packed_gradient(block: Block, df: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """The gradient in the block's coordinates and dtype; zero for parameters that have none, or that are frozen."""
    held = {n: df[n] if n in df else torch.zeros_like(parameters[n]) for n in block.names}
    return block.pack(held).to(block.dtype)


def shared_options(block: Block, options: Mapping[str, Options]) -> Options:
    """The options of a block's parameters, which must be one.

    Raises:
        ValueError: they lie in groups that differ.
    """
    mine = [options[n] for n in block.names if n in options]
    if all(o is mine[0] for o in mine):
        return mine[0]
    where = f"step for the block of {block.names}"
    return Options(
        one_value({o.lr for o in mine}, f"lr in one {where}"),
        one_value({o.momentum for o in mine}, f"momentum in one {where}"),
        one_value({o.damping for o in mine}, f"damping in one {where}"),
        share=one_value({o.share for o in mine}, f"schedule in one {where}"),
    )


def look(states: Sequence[BlockState], grads: Sequence[Tensor], directions: Sequence[Tensor]) -> None:
    """Keep what `NormalisedStep.cosines` are made of."""
    sizes = zip(torch._foreach_norm(list(grads)), torch._foreach_norm(list(directions)))
    for s, g, d, (size_g, size_d) in zip(states, grads, directions, sizes):
        s.seen = (dot(g, d), size_g, size_d)
