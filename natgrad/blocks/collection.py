"""The layers found in a model, and the blocks that hold their curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from natgrad.blocks.base import Block
from natgrad.blocks.kronecker import KroneckerBlock
from natgrad.blocks.structures import STRUCTURES
from natgrad.capture.layers import Layers
from natgrad.capture.tape import LayerCall, Uncaptured

TRAINING_ROWS = 1024  # rows of a call that enter a factor while an optimizer drives a sampled metric: at least these,
# or as many as the larger side has, so that the moving average of a few refreshes has full rank


@dataclass
class BlockCollection:
    """The layers of a model and their blocks.

    ``structure_of``, ``sharing_of`` and ``max_factor_dim_of`` map a parameter name to its structure, its weight sharing
    and the longest block that is kept of a Kronecker side, None for no limit.
    """

    parameters: dict[str, Tensor]
    structure_of: Callable[[str], str]
    sharing_of: Callable[[str], str]
    max_factor_dim_of: Callable[[str], int | None]
    sampled: bool  # whether gradients are of drawn labels, so that some rows stand for all
    rows: torch.Generator  # which rows of a call enter a factor
    max_positions: int | None = None  # rows of a call that enter a factor
    trains: bool = False  # an optimizer drives the metric
    blocks: list[Block] = field(default_factory=list)
    uncovered: dict[str, Uncaptured] = field(default_factory=dict)  # parameters that no op rule covers

    def __post_init__(self) -> None:
        self.layers = Layers({n: p.shape for n, p in self.parameters.items()})

    def learn(self, calls: Sequence[LayerCall]) -> list[LayerCall]:
        """Make blocks of layers that are used for the first time; return the calls, each of one layer."""
        fresh, calls = self.layers.learn(calls)
        for layer in fresh:
            name = layer.key.name
            structure = STRUCTURES[self.structure_of(name)]
            if (joint := next((b for b in self.blocks if structure.joins and type(b) is structure), None)) is not None:
                joint.extend(layer)
                continue
            block = structure([layer], self.sharing_of(name), self.max_factor_dim_of(name), self.trains)
            self.set_up(block)
            self.blocks.append(block)
        return calls

    def forget_layer_of(self, name: str) -> None:
        """A parameter was thawed: let its layer be found anew, together with it."""
        owner = name.rpartition(".")[0]
        gone = [b for b in self.blocks if any(n.rpartition(".")[0] == owner for n in b.names)]
        self.blocks = [b for b in self.blocks if b not in gone]
        for block in gone:
            for layer in block.layers:
                del self.layers.found[layer.key]

    def set_up(self, block: Block) -> None:
        """Say how many rows of one call may enter a factor, drawn by what."""
        if not isinstance(block, KroneckerBlock):
            return
        block.generator = self.rows
        block.max_rows = self.max_positions
        if self.trains and self.sampled and self.max_positions is None:
            block.max_rows = max(TRAINING_ROWS, *block.shape[1:])

    def train(self) -> None:
        """An optimizer takes over: what a refresh costs counts from now on."""
        self.trains = True
        for block in self.blocks:
            self.set_up(block)

    def take(self, parameters: dict[str, Tensor]) -> None:
        """Learn of parameters that were frozen before."""
        self.layers.shapes = {n: p.shape for n, p in parameters.items()}

    def restore(self, blocks: Sequence[Block]) -> None:
        """Take over the blocks of a state."""
        self.blocks = list(blocks)
        self.layers.found = {layer.key: layer for block in blocks for layer in block.layers}
        for block in blocks:
            self.set_up(block)


def statistics_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Return float64 where a parameter is, else float32: half-precision statistics lose the small eigenvalues."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
