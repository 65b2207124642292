"""Who computes what and what ranks send each other; here on one process, where all is at hand and nothing is sent.

A metric, its optimizer and its step rule ask one object: `Strategy` on one process, `DataParallel` where every rank
holds the model, `FullySharded` where ranks hold shards of it. A gradient goes

    to_owners → directions → totals → from_owners

and each of these is the identity here, but for `directions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from natgrad.blocks.base import Block
from natgrad.blocks.batch_statistics import BatchStatistics
from natgrad.blocks.batching import Preconditioning, Products
from natgrad.blocks.collection import BlockCollection


class Strategy:
    """One process."""

    rank, size = 0, 1
    sharded = False  # whether ranks hold shards of the parameters
    most = 1  # data that a rank has, where all ranks make every backward pass together
    uneven = False  # whether ranks whose every backward pass is collective have unlike numbers of data
    holds_gradients = False  # whether gradients wait outside the parameters for the last of several backward passes
    refresh = 1  # steps between refreshes, once an optimizer drives the metric

    def __init__(self) -> None:
        self._products = Products()

    def take(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Learn of the parameters of the metric; called again when there are new ones."""

    @property
    def info(self) -> dict[str, Any]:
        """For ``opt.info``."""
        return {}

    # forward passes ------------------------------------------------------------------------------------

    def seed(self, seed: int) -> int:
        """Return the seed of this rank's random streams."""
        return seed

    def parameter_names(self, parameters: Mapping[str, Tensor]) -> Mapping[int, str]:
        """Return {id: name} of the parameters as forward passes see them."""
        return {id(p): n for n, p in parameters.items()}

    def live(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the parameters as forward passes see them."""
        return parameters

    def meet(self, fine: bool, data: int) -> bool:
        """Return whether all ranks take statistics of a forward pass with so many data."""
        return fine

    # statistics ----------------------------------------------------------------------------------------

    def at_step(self, step: int) -> None:
        """Be told which step comes, for messages."""

    def check_same(self, said: Mapping[str, Any]) -> None:
        """Raise a RuntimeError on every rank if what they say is not the same."""

    def merge(
        self, collection: BlockCollection, batch: BatchStatistics, said: Callable[[], Mapping[str, Any]], plain: bool
    ) -> BatchStatistics | None:
        """Return the statistics of all ranks' data from those of this rank's; None if no rank has any.

        Args:
            collection: whose blocks they are of; it learns of layers that only other ranks have used.
            batch: one entry a block; may be empty.
            said: gives what must be the same on all ranks.
            plain: sums are never divided.
        """
        return batch

    def all_fine(self, model: nn.Module, fine: Tensor) -> Tensor:
        """Return whether a step is fine on every rank."""
        return fine

    def everywhere(self, fine: bool) -> bool:
        """Return whether something is so on all ranks that hold shards; elsewhere each rank goes by itself."""
        return fine

    # steps ---------------------------------------------------------------------------------------------

    def shards_of(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what this rank holds of parameters or gradients."""
        return tensors

    def numel(self, name: str, local: Tensor) -> int:
        """Return how many numbers a parameter has, given what this rank holds of it."""
        return local.numel()

    def sum_over_shards(self, squares: Tensor, names: Sequence[str]) -> Tensor:
        """Return sums over whole parameters from those over this rank's shards, an entry a name."""
        return squares

    def owned(self, blocks: Sequence[Block]) -> list[Block]:
        """Return the blocks whose directions this rank finds."""
        return list(blocks)

    def to_owners(self, df: Mapping[str, Tensor], blocks: Sequence[Block]) -> Mapping[str, Tensor]:
        """Return whole gradients of the blocks that this rank owns, from what ranks hold."""
        return df

    def likes(self, parameters: Mapping[str, Tensor], blocks: Sequence[Block]) -> Mapping[str, Tensor]:
        """Return tensors of the shape of whole parameters, for blocks that this rank owns."""
        return parameters

    def directions(self, todo: Sequence[Preconditioning]) -> list[Tensor]:
        """Return d of each block that has a gradient. Inverses that are missing are made."""
        return self._products.directions(todo)

    def totals(
        self, blocks: Sequence[Block], scalars: Tensor, by_block: Tensor | None, failures: int
    ) -> tuple[Tensor, Tensor, int]:
        """Return sums over ranks.

        Args:
            blocks: of all ranks.
            scalars: to be summed.
            by_block: a number for each block that this rank owns, None for none; comes back for all blocks.
            failures: factorisations that failed here.

        Raises:
            FactorisationError: on every rank, if one of them had no inverse to apply in `directions`.
        """
        assert by_block is not None
        return scalars, by_block, failures

    def from_owners(self, moved: Mapping[str, Tensor], blocks: Sequence[Block]) -> dict[str, Tensor]:
        """Return what this rank holds of the increments, from their owners' whole ones. `blocks`: of all ranks."""
        return dict(moved)

    def summed(self, numbers: Tensor) -> Tensor:
        """Return few numbers, each summed over the ranks. Collective."""
        return numbers

    # states --------------------------------------------------------------------------------------------

    def union(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of all ranks' dictionaries, on every rank."""
        return dict(held)

    def whole(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors {parameter name: tensor} on every rank from what ranks hold."""
        return dict(local)

    def shard(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what this rank holds of whole tensors {parameter name: tensor}."""
        return dict(whole)
