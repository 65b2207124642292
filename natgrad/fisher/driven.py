"""A Fisher metric while a model is trained along it: what the hooks on the forward passes and the optimizer ask.

The statistics of a forward pass wait until its loss is backpropagated, and are folded into moving averages by the next
step that refreshes the metric. On several ranks all fold the sums of all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.blocks.base import Block
from natgrad.blocks.batch_statistics import BatchStatistics, each_output_once, go_on, merge
from natgrad.blocks.collection import BlockCollection, statistics_dtype
from natgrad.capture.purpose import RETURNED
from natgrad.capture.tape import Tape
from natgrad.distributed.ddp import check_rule, undisturbed
from natgrad.distributed.fsdp import kept_open, sharded_modules
from natgrad.fisher.block_metric import BlockMetric
from natgrad.fisher.estimator import Estimator
from natgrad.fisher.forward import check_output
from natgrad.fisher.hooks import Called, CriterionHooks, is_unwatched
from natgrad.fisher.likelihoods.base import TERMS, CriterionLikelihood
from natgrad.fisher.likelihoods.multi_head import MultiHead
from natgrad.fisher.moved import KeptBatches
from natgrad.fisher.options import chosen_parameters, picks_by_output, received


class DrivenMetric(BlockMetric):
    """The part of `natgrad.Fisher` that an optimizer drives."""

    default_step = "normalised"
    _where: list[tuple[torch.device, torch.dtype]] = []  # noqa: RUF012 -- of the parameters; replaced, never changed
    _looked = False
    _folded = False  # whether statistics have changed since the last step
    _missed = False  # whether a refresh that fell due had no statistics, as the steps moved to another thread
    _kept: KeptBatches | None = None  # the batches of the coming step, where the step rule verifies on them
    _said_bare = False  # whether it was said that no parameter has curvature

    model: nn.Module
    module: nn.Module  # without wrappers
    kind: str
    samples: int
    likelihood: CriterionLikelihood
    collection: BlockCollection
    estimator: Estimator
    nats: Tensor | None  # (Σ m u, Σ m) of `CriterionLikelihood.nats` at the last refresh
    dropped: int  # batches whose statistics were not finite
    _driver: Any  # the optimizer, if one drives
    _pending: list[BatchStatistics]  # whose gradients are in ``.grad``
    _returned: list[BatchStatistics]  # whose gradients torch.autograd.grad has returned
    _masses: dict[str, Tensor]  # of the loss terms counted, by head
    _watcher: CriterionHooks
    _output: Callable[[Any], Any] | None
    _targets: Callable[..., Any] | None

    @property
    def blocks(self) -> list[Block]:
        """The blocks found so far, each over one layer or several."""
        return self.collection.blocks

    @property
    def _plain(self) -> bool:
        """Whether sums are never divided."""
        return self.likelihood.reduction == "sum"

    def _commit(self, draws: list[BatchStatistics], decay: float | None) -> bool:
        """Add what was drawn to the statistics, on all ranks together; whether there was anything."""
        draw = self.strategy.merge(
            self.collection, merge(self.blocks, draws, self._plain), self._described, self._plain
        )
        if draw is None or (self.strategy.size > 1 and not self._usable_everywhere(draw)):
            return False
        for block in draw.remote_blocks:
            block.is_remote = True
            block.version += 1
        self._folded = True
        for block, new in draw.statistics:
            if decay is None and not block.statistics:
                block.backdate(new, self._masses)
            block.commit(new, decay, self._plain)
        for source, mass in draw.masses.items():
            self._masses[source] = self._masses.get(source, 0) + mass
        self.seen += draw.data
        if decay is not None and draw.nats is not None:
            self.nats = draw.nats
        if decay is not None:
            self.labels = draw.labels
        return True

    def mass_of(self, source: str = "") -> float:
        """Return what the loss over the data seen divides a source of its terms by, 1 for a sum."""
        mass = self._masses.get((TERMS if self.kind == "empirical" else "") + source)
        return 1.0 if self._plain or mass is None else float(mass)

    def _described(self) -> dict[str, Any]:
        """What must be the same on every rank."""
        found = {
            "parameter": {n: [list(p.shape), str(p.dtype)] for n, p in self.parameters.items()},
            "criterion": f"{self.likelihood.name}, reduction {self.likelihood.reduction}",
            "kind": self.kind,
            "samples": self.samples,
            "structure": {n: self.collection.structure_of(n) for n in self.parameters},
            "sharing": {n: self.collection.sharing_of(n) for n in self.parameters},
            "max_factor_dim": {n: self.collection.max_factor_dim_of(n) for n in self.parameters},
            "max_positions": self.collection.max_positions,
        }
        return found if self._driver is None else {**found, "optimizer": self._driver.schedule}

    # what the watcher asks -----------------------------------------------------------------------------

    def wants_statistics(self) -> bool:
        if (
            self._pending
            and not self.strategy.holds_gradients
            and all(p.grad is None for p in self.parameters.values())
        ):
            # a step that did not take place (GradScaler skipped it), then cleared by model.zero_grad()
            self.discard_pending()
        return self._driver is not None and (self._driver.refresh_due or self._missed)

    @property
    def _criteria(self) -> Mapping[str, nn.Module]:
        raise NotImplementedError

    def parameter_names(self) -> Mapping[int, str]:
        return self.strategy.parameter_names(self.parameters)

    def draw_at_criterion(self, called: Called, tapes: list[Tape]) -> BatchStatistics | None:
        if isinstance(self.likelihood, MultiHead):
            split = {k: self.likelihood.heads[k].split(*args, **kwargs) for k, (args, kwargs) in called.items()}
            output, targets = ({k: s[i] for k, s in split.items()} for i in range(2))
        else:
            args, kwargs = called[""]
            output, targets = self.likelihood.split(*args, **kwargs)
        return self._draw_training(output, targets, tapes)

    def draw_at_output(self, output: Any, given: tuple[Any, Any], tapes: list[Tape]) -> BatchStatistics | None:
        picked = self.output_of(output)
        targets = self.targets_of(given, picked)
        check_output(self.likelihood, picked, targets)
        return self._draw_training(picked, targets, tapes)

    def output_of(self, result: Any) -> Any:
        """What `output=` makes of what the model returned."""
        return result if self._output is None else self._output(result)

    def targets_of(self, given: tuple[Any, Any], picked: Any) -> Any:
        """What `targets=` makes of what the model was given, and of the output that was picked if it asks for it."""
        if self._targets is None:
            return None
        inputs = received(*given)
        return self._targets(inputs, picked) if picks_by_output(self._targets) else self._targets(inputs)

    def _draw_training(self, output: Any, targets: Any, tapes: list[Tape]) -> BatchStatistics | None:
        try:
            with undisturbed(self.model), kept_open(self.model):
                return self.estimator.draw(output, targets, tapes, per_datum=False)
        except RuntimeError:
            self.check_parameters()  # which may say why
            raise

    def look_at_gradient(self, output: Any, g: Tensor) -> None:
        """Warn where the gradient at the output cannot be the criterion's, at the first batch.

        Later on the criterion's may be small beside other terms on the output.
        """
        if self._looked or self._output is not None or not isinstance(output, Tensor) or g.shape != output.shape:
            return
        self._looked = True
        if bool(torch.isfinite(g).all()) and (why := self.likelihood.disagrees(output, g)) is not None:
            warnings.warn(
                f"the metric is the curvature of {self.likelihood.name}, but another loss seems to be backpropagated: "
                f"{why}. Give ng.Fisher the criterion that you train with, and `output=` where the loop reshapes the "
                "output first. Terms that are added to the loss are no part of the metric",
                stacklevel=2,
            )

    def lacks_labels(self) -> bool:
        """Whether labels are needed that only a call of the criterion gives."""
        return self._targets is None and self.estimator.why_targets() is not None

    def count(self, draw: BatchStatistics, purpose: str) -> None:
        """Take in a draw whose loss is backpropagated, perhaps not for the first time."""
        self._returned = [d for d in self._returned if d is not draw]
        if purpose == RETURNED:
            self._returned.append(draw)
            return
        go_on(draw.streams)
        self._pending.append(draw)

    # what an optimizer asks ----------------------------------------------------------------------------

    def include(self, parameter: Tensor) -> str | None:
        if self._driver is not None:
            self._watcher.expect(True)  # the metric knows nothing of it yet, so a refresh is due
        for name, p in chosen_parameters(self.module, None).items():
            if p is parameter:
                self.parameters[name] = p
                order = {n: i for i, n in enumerate(chosen_parameters(self.module, None))}
                ordered = sorted(self.parameters.items(), key=lambda item: order.get(item[0], len(order)))
                self.parameters.clear()  # in place: the blocks' collection holds this dictionary too
                self.parameters.update(ordered)
                self.collection.take(self.parameters)
                self.collection.forget_layer_of(name)
                self.strategy.take(self.module, self.parameters)
                return name
        return None

    def drive(self, driver: Any) -> None:
        """Let an optimizer decide when statistics are taken: ``driver.refresh_due`` is read at every forward pass."""
        now = {id(p) for p in self.module.parameters()}
        if (
            not self.strategy.sharded
            and sharded_modules(self.module)
            and any(id(p) not in now for p in self.parameters.values())
        ):
            raise RuntimeError(
                "the model was sharded after the metric was made, which holds the parameters from before; call "
                "fully_shard first, then make the metric"
            )
        if self._driver is not None and self._driver.steps:
            warnings.warn(
                "this metric is driven by another NaturalGradient already, which can no longer step: the new one goes "
                "on with its statistics. Where both are to train, give each a metric of its own; options for some of "
                "the parameters go into groups=",
                stacklevel=3,
            )
        self._driver = driver
        if self._kept is not None:
            self._kept.remove()
        self._kept = KeptBatches(self, self.model, self._criteria) if driver.rule.verifies else None
        if self.strategy.size > 1:
            check_rule(driver.rule, self.strategy.sharded)
            self.strategy.check_same(self._described())
            self.strategy.refresh = driver.refresh
        self.collection.train()

    @property
    def driver(self) -> Any:
        return self._driver

    def check_parameters(self) -> None:
        if self.strategy.sharded:
            return  # what the model holds are shards, or what they were put together to
        here = {id(p) for p in self.module.parameters()}
        gone = [n for n, p in self.parameters.items() if id(p) not in here]
        if gone:
            raise RuntimeError(
                f"{len(gone)} of {len(self.parameters)} parameters were replaced in the model after the metric was "
                f"made, {gone[0]!r} the first: by load_state_dict(…, assign=True), a new parameter or module in its "
                "place, or tying. Neither metric nor optimizer know the new ones; make both after that"
            )
        grown = [n for n, p in self.parameters.items() if p.shape != self.collection.layers.shapes[n]]
        if grown:
            raise RuntimeError(
                f"parameter {grown[0]!r} has shape {tuple(self.parameters[grown[0]].shape)}, and had "
                f"{tuple(self.collection.layers.shapes[grown[0]])} when the metric was made; make metric and optimizer "
                "after the change"
            )

    @property
    def why_no_statistics(self) -> str:
        return self.estimator.unusable or super().why_no_statistics

    def without_curvature(self) -> set[str]:
        return set(self.parameters).difference(*(b.names for b in self.blocks if b.known))

    def expect(self, due: bool) -> None:
        self.strategy.at_step(self._driver.steps)
        if self._kept is not None:
            self._kept.forget()
        if self._folded:
            self._folded = False
            for block in self.blocks:
                block.release()
        self._watcher.expect(due or self._missed)

    @property
    def needs_refresh(self) -> bool:
        return not self.dropped  # statistics that were dropped will come again

    def advance(self, decay: float) -> bool:
        """Fold what was backpropagated since the last call into the moving average; whether there was any."""
        moved = self._watcher.train_here()
        # gradients that were returned made the step only if no others did: else they were looked at
        draws = self._pending or self._returned
        for draw in draws:
            go_on(draw.streams)
        draws = each_output_once(draws, self._plain)
        self._pending, self._returned = [], []
        self._watcher.forget()
        if self.strategy.size == 1:
            self._missed = not draws and (self._missed or (moved and self._driver.refresh_due))
        if (where := [(p.device, p.dtype) for p in self.parameters.values()]) != self._where or draws:
            self._where, dtype = where, statistics_dtype(self.parameters.values())
            for block in self.blocks:
                block.move(self.parameters[block.names[0]].device, dtype)
        if self.strategy.size > 1:  # ranks meet where all know that they do; what comes late is not waited for
            return self._folds(bool(self._driver.refresh_due) and self._commit(draws, decay))
        draws = [d for d in draws if self._usable(d)]
        return self._folds(bool(draws) and self._commit(draws, decay))

    def _folds(self, folded: bool) -> bool:
        """Say once where a refresh has found no curvature at all; returns what it is given."""
        if folded and not self._said_bare and self.collection.uncovered and not any(b.known for b in self.blocks):
            self._said_bare = True
            used = [f"{n!r} (reached through {use.used_by})" for n, use in self.collection.uncovered.items()]
            more = f" and {len(used) - 2} more" if len(used) > 2 else ""
            warnings.warn(
                f"no parameter has curvature: no op rule covers the use of {', '.join(used[:2])}{more}, so an "
                "Adam-like rule trains the whole model. natgrad sees the ops of torch, torch.nn.functional and "
                "torch.ops.aten. For an op of your own write a rule, natgrad.capture.ops.op_rule; in place of "
                "TorchScript use the nn.Module that it was made from",
                stacklevel=8,
            )
        return folded

    def agree(self, fine: Tensor) -> Tensor:
        return self.strategy.all_fine(self.model, fine)

    def _usable_everywhere(self, draw: BatchStatistics) -> bool:
        """Whether the statistics that ranks hold after sharing them are finite on all."""
        here = self._usable(draw)
        if not self.strategy.sharded:
            return here  # all hold the same
        everywhere = self.strategy.everywhere(here)
        self.dropped += here and not everywhere
        return everywhere

    def _usable(self, draw: BatchStatistics) -> bool:
        """Whether its statistics are finite; if not, the earlier ones stay in force, and it is said once and
        counted.
        """
        if draw.finite:
            return True
        if not self.dropped:
            warnings.warn(
                "the statistics of a batch hold NaN or Inf and are dropped; the metric stays as it was. Repeats are "
                "counted in opt.info['dropped_statistics']",
                stacklevel=2,
            )
        self.dropped += 1
        return False

    @property
    def info(self) -> dict[str, Any]:
        return {
            "dropped_statistics": self.dropped,
            "data_seen": self.seen,
            **self.strategy.info,
        }

    @property
    def trainer(self) -> int:
        """The thread that trains."""
        return self._watcher.trainer

    @property
    def picks_output(self) -> bool:
        """Whether `output=` was given."""
        return self._output is not None

    def divergence(self, increments: Mapping[str, Tensor]) -> Tensor | None:
        return None if self._kept is None else self._kept.divergence(increments)

    def discard_pending(self) -> None:
        """Drop what was backpropagated but not stepped on, with the random numbers that it took; a forward pass whose
        loss is to come keeps its place.
        """
        if is_unwatched():
            return  # a step rule calls a closure at other parameters
        if self._kept is not None:
            self._kept.forget()
        self._watcher.train_here()
        if self._pending:
            self.estimator.rewind(self._pending[0].start)
        self._pending, self._returned = [], []

    @property
    def gradient_scale(self) -> float | None:
        """Data-parallel ranks take the mean of their gradients, of losses that are sums over data too. The empirical
        kind has the size of the gradients squared and not that of the curvature.
        """
        if self.kind == "empirical":
            return None
        return 1 / self.strategy.size if self._plain else 1.0

    @property
    def nat(self) -> Tensor | None:
        if self.nats is None or self.gradient_scale is None:
            return None
        total, mass = self.nats.unbind()
        return torch.where(mass > 0, self.gradient_scale * total if self._plain else total / mass, torch.nan)
