"""The Fisher metric of a model under a criterion.

F(θ) = E_x E_{y∼p(y|x;θ)} [∇log p ∇log pᵀ] = ∇²_θ' KL(p_θ ‖ p_θ') at θ' = θ, the expectation over x replaced by a mean
over data (Amari 1998, Neural Computation 10(2), §2; Martens 2020, arXiv:1412.1193, §5). For cross-entropy, squared,
BCE and Poisson losses "exact" and "dense" is the generalised Gauss–Newton matrix of ``criterion(model(x), y)``
(Schraudolph 2002).

A forward pass that is watched goes: `capture` notes the calls → where the criterion is called (or, if it is not, where
the output is backpropagated) `passes` gives cotangents → one backward pass each gives the gradient at every call →
blocks take their statistics → these count once the loss is backpropagated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.blocks.batch_statistics import BatchStatistics, go_on, merge
from natgrad.blocks.collection import BlockCollection, statistics_dtype
from natgrad.blocks.structures import STRUCTURES
from natgrad.capture.tape import CaptureError
from natgrad.distributed.ddp import check_structures
from natgrad.distributed.setup import strategy_of
from natgrad.fisher import state as metric_file
from natgrad.fisher.coverage import Coverage, coverage_of
from natgrad.fisher.driven import DrivenMetric
from natgrad.fisher.estimator import Estimator
from natgrad.fisher.forward import check_finite, check_output, isolated, traced_forward, usable
from natgrad.fisher.hooks import CriterionHooks
from natgrad.fisher.likelihoods.multi_head import MultiHead, Weight
from natgrad.fisher.likelihoods.registry import likelihood_of
from natgrad.fisher.options import (
    arguments,
    by_pattern,
    check_curvature_batch,
    check_modules,
    choose,
    chosen_parameters,
    max_factor_dim_by_pattern,
    unwrapped,
)
from natgrad.linalg.tree import describe
from natgrad.metric.copies import refuse_pickle
from natgrad.metric.interrupts import uninterrupted
from natgrad.metric.progress import counted

KINDS = ("exact", "sampled", "empirical")
SHARINGS = ("expand", "reduce")
ROWS = "rows"  # the generator that draws the rows of a factor, beside those of the labels by device


class Fisher(DrivenMetric):
    """The Fisher metric of `model` under `criterion`.

    Args:
        model: the model that is trained; wrapped by DistributedDataParallel or ``torch.compile``, sharded by
            ``fully_shard``, or none of these.
        criterion: the loss module it is trained with (see `natgrad.fisher.likelihoods`), or a `Likelihood`; for several
            heads a dictionary ``{output key: criterion}``, whose sum is the loss. `Loss` makes a criterion of any loss.
        kind: "exact" (expectation over y in closed form), "sampled" (y drawn from the model), or "empirical" (observed
            labels; one outer product a datum).
        structure: "dense", "block", "diagonal", "kfac", "ekfac" or "input" (the input factor alone), or
            ``{name pattern: structure}`` (first match; else "kfac").
        sharing: "expand" or "reduce", what K-FAC makes of a layer's positions, or ``{name pattern: sharing}``.
        samples: labels drawn for each datum with kind "sampled".
        params: names or patterns of the parameters to take; None takes all that require grad.
        weights: of several heads, ``{output key: weight}``, where the loss is the sum of weight times criterion: a
            number, or a callable that is asked at every refresh. A head without one has weight 1.
        output: callable from what the model returns to what the criterion takes, where that is not the same.
        targets: callable from what the model receives (its only argument, or ``(args, kwargs)``) to the labels; one
            of two arguments is given what `output` has picked, too.
        seed: of the labels drawn; the global random state is never touched.
        max_positions: rows (data × positions) of a call that enter each Kronecker factor, at random, standing for all
            ("sampled" only); a refresh then costs at most that many outer products a layer. None takes all rows in
            `update`, and 1024, or as many as the layer's larger side has, while an optimizer drives the metric.
        max_factor_dim: a side of a Kronecker factor that is longer than this is kept as equal blocks along its diagonal
            of at most this many rows, which are inverted one by one; 1 keeps the diagonal alone. None is 250 for blocks
            first seen while an optimizer drives the metric and keeps sides whole otherwise, and of one longer than 4096
            (a vocabulary) the diagonal. Or ``{name pattern: either}``.
        process_group: the data-parallel ranks; None takes those of the DistributedDataParallel wrapper. Making the
            metric, `update` and `fit` are then calls that all ranks make together, each with data of its own.
        exchange: what ranks send each other of the inverses: "inverses" (each computed by one rank, applied by every
            rank), "directions" (computed and applied by one rank), or "auto", the one with fewer bytes. Of a sharded
            model it is always a direction, from the owner of the block.

    Raises:
        TypeError: there is no metric for the criterion.
        ValueError: an option that does not exist (the message lists those that do), or a model without a trainable
            parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Mapping[str, nn.Module],
        *,
        kind: str = "sampled",
        structure: str | Mapping[str, str] = "kfac",
        sharing: str | Mapping[str, str] = "expand",
        samples: int = 1,
        params: str | Iterable[str] | None = None,
        weights: Mapping[str, Weight] | None = None,
        output: Callable[[Any], Any] | None = None,
        targets: Callable[..., Any] | None = None,
        seed: int = 0,
        max_positions: int | None = None,
        max_factor_dim: int | Mapping[str, int | None] | None = None,
        process_group: Any = None,
        exchange: str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Fisher takes a torch.nn.Module as the model, got {describe(model)}")
        choose("kind", kind, KINDS)
        if weights is not None and not isinstance(criterion, Mapping):
            raise ValueError("weights= are those of several heads; give criterion={output key: criterion} with them")
        self.likelihood = MultiHead(criterion, weights) if isinstance(criterion, Mapping) else likelihood_of(criterion)
        check_curvature_batch(kind, max_positions)
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples must be a whole number of at least 1, got {samples!r}")
        for what, given in (("output", output), ("targets", targets)):
            if given is not None and not callable(given):
                raise TypeError(f"{what}= takes a callable that picks it out, got {describe(given)}")
        self.criterion: Any = criterion  # a module, or one a head
        self.model, self.kind = model, kind
        self.module = unwrapped(model)
        check_modules(self.module)
        device = next(iter(model.parameters()), torch.empty(0)).device
        # before names are read: it has shards in place
        self.strategy = strategy_of(model, process_group, device, exchange)
        super().__init__(chosen_parameters(self.module, params))
        self.strategy.take(model, self.parameters)
        self.structure, self.sharing, self.samples = structure, sharing, samples
        self._output, self._targets = output, targets
        seed = self.strategy.seed(seed)
        self.collection = BlockCollection(
            self.parameters,
            by_pattern("structure", structure, tuple(STRUCTURES), "kfac", self.parameters),
            by_pattern("sharing", sharing, SHARINGS, "expand", self.parameters),
            max_factor_dim_by_pattern(max_factor_dim, self.parameters),
            kind == "sampled",
            torch.Generator().manual_seed(seed),
            max_positions,
        )
        self.estimator = Estimator(self.module, self.likelihood, kind, samples, seed, self.collection, self.strategy)
        if self.strategy.size > 1:
            check_structures({n: self.collection.structure_of(n) for n in self.parameters})
        self.nats: Tensor | None = None  # (Σ m u, Σ m) of `CriterionLikelihood.nats` at the last refresh
        self.seen = 0  # data counted so far
        self.dropped = 0  # draws whose statistics were not finite
        self._driver: Any = None
        self._pending: list[BatchStatistics] = []
        self._returned: list[BatchStatistics] = []
        self._masses: dict[str, Tensor] = {}  # of the loss terms added by `update`, by head
        self._watcher = CriterionHooks(self, model, self._criteria)

    copies_with_model = True

    @property
    def _criteria(self) -> Mapping[str, nn.Module]:
        return self.criterion if isinstance(self.criterion, Mapping) else {"": self.criterion}

    def __deepcopy__(self, memo: dict[int, Any]) -> Fisher:
        """Return a metric of the copied model, with statistics of its own, that no optimizer drives.

        A criterion that is not part of the model is shared, as training loops go on calling the one they know.
        """
        if self.strategy.size > 1:
            raise TypeError(
                "a metric that ranks share cannot be copied: its process group cannot. Make another one and load this "
                "one's state_dict()"
            )
        memo[id(self)] = twin = object.__new__(type(self))
        copy.deepcopy(self.model, memo)
        for criterion in self._criteria.values():
            memo.setdefault(id(criterion), criterion)
        held = {k: v for k, v in vars(self).items() if k not in ("_watcher", "_driver")}
        vars(twin).update(copy.deepcopy(held, memo), _driver=None)
        twin._watcher = CriterionHooks(twin, twin.model, twin._criteria)
        return twin

    __reduce__ = refuse_pickle

    # adding data ---------------------------------------------------------------------------------------

    def update(self, inputs: Any, targets: Any = None) -> None:
        """Add one batch. `inputs`: a tensor, or a tuple or dict of arguments of the model.

        Leaves buffers, random state, train/eval mode and ``.grad`` as they were.

        Raises:
            RuntimeError: an optimizer drives this metric.
            ValueError: the criterion cannot take the output, or labels are needed and missing.
            CaptureError: a parameter is used in a way the metric cannot follow.
        """
        self._commit([self._new_draw(inputs, targets)], decay=None)

    def _new_draw(self, inputs: Any, targets: Any) -> BatchStatistics:
        if self._driver is not None:
            raise RuntimeError(
                "this metric is driven by an optimizer, which adds the batches that are trained on; calling "
                "update() as well would "
                "count them twice. Make a second metric: ng.Fisher(model, criterion)"
            )
        args, kwargs = arguments(inputs)
        with isolated(self.module, self.parameters.values()):
            result, tape = traced_forward(self.module, self.parameter_names(), args, kwargs)
            output = self.output_of(result)
            targets = self.targets_of((args, kwargs), output) if targets is None else targets
            check_output(self.likelihood, output, targets)
            self.estimator.warn_of_batch_norm()
            if not self.strategy.everywhere(usable(self.likelihood.outputs(output))):
                raise ValueError(
                    "the model's output holds NaN or Inf for this batch, so there is no distribution to take the "
                    "metric of; nothing was added. Look at the inputs and the parameters"
                )
            batch = self.estimator.draw(output, targets, [tape], per_datum=True)
        if batch is None:
            raise CaptureError(
                "the output does not depend on any parameter of the metric: it is detached, or the model was run under "
                "no_grad or ignores its parameters"
            )
        check_finite(batch)
        go_on(batch.streams)
        return batch

    def fit(self, loader: Iterable[Any], progress: bool = True) -> Fisher:
        """Add every batch of a loader: ``inputs`` or ``(inputs, targets)`` each. Returns the metric.

        Args:
            loader: any iterable of batches.
            progress: count the batches on standard error, where that is a terminal.

        Raises:
            ValueError: the loader is empty.

        Ranks meet once, after their last batches, so that their loaders may differ in length.
        """
        count = 0
        mine = BatchStatistics([], 0)
        for batch in counted(loader, "metric", progress):
            inputs, targets = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
            if self.strategy.size == 1:
                self.update(inputs, targets)
            else:
                mine = merge(self.blocks, [mine, self._new_draw(inputs, targets)], self._plain)
            count += 1
        if self.strategy.size > 1 and self._commit([mine], decay=None):
            return self
        if count == 0:
            raise ValueError("the loader is empty: the metric is a mean over data and needs at least one batch")
        return self

    def reset(self) -> None:
        """Forget all statistics."""
        for block in self.blocks:
            block.statistics, block.is_remote = {}, False
            block.version += 1
        self.discard_pending()
        self.seen, self._masses, self.nats, self.labels = 0, {}, None, 0

    def precondition_(self, damping: float) -> None:
        """Turn every ``.grad`` into (ĝ + damping·I)⁻¹ grad in place, for any other optimizer to step with.

        Raises:
            ValueError: the damping is not positive and finite, or no gradient is there.
            RuntimeError: the model is sharded.
        """
        if self.strategy.sharded:
            raise RuntimeError(
                "precondition_ is not supported on a model that is sharded by fully_shard; train it with "
                "ng.NaturalGradient(metric), or wrap the model in DistributedDataParallel"
            )
        grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        if not grads:
            raise ValueError("no parameter has a gradient; call loss.backward() before precondition_")
        full = {n: grads.get(n, torch.zeros_like(p)) for n, p in self.parameters.items()}
        for n, v in self.sharp(full, damping).items():
            if n in grads:
                grads[n].copy_(v)

    # seeing and keeping --------------------------------------------------------------------------------

    def coverage(self) -> Coverage:
        """One row for each parameter: its op, block, sizes and memory, or why it has none. ``str()`` prints a table."""
        return coverage_of(self.parameters, self.collection, self.seen)

    def state_dict(self) -> dict[str, Any]:
        """Statistics and what they belong to: tensors, strings and numbers only.

        Of a sharded model it is whole on every rank, and taking it is a call that all ranks make together.
        """
        with self.whole():
            return self._state()

    def _state(self) -> dict[str, Any]:
        generators = {str(d): g for d, g in self.estimator.generators.items()}
        return metric_file.state_of(self._about(), self.blocks, {**generators, ROWS: self.collection.rows})

    def _about(self) -> dict[str, Any]:
        """What a state says of the metric."""
        return {
            "format": metric_file.FORMAT,
            "parameters": {n: list(p.shape) for n, p in self.parameters.items()},
            "kind": self.kind,
            "criterion": self.likelihood.name,
            "reduction": self.likelihood.reduction,
            "structure": {n: self.collection.structure_of(n) for n in self.parameters},
            "sharing": {n: self.collection.sharing_of(n) for n in self.parameters},
            "max_factor_dim": {n: self.collection.max_factor_dim_of(n) for n in self.parameters},
            "seen": self.seen,
            "rank": self.strategy.rank,
            "masses": {source: float(mass) for source, mass in self._masses.items()},
            "nats": None if self.nats is None else self.nats.tolist(),
            "labels": self.labels,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over statistics.

        Raises:
            ValueError: they are damaged, or of another model or kind of metric; nothing has changed.
        """
        take_over = self.prepared(state)
        with uninterrupted():
            take_over()

    def prepared(self, state: Mapping[str, Any]) -> Callable[[], None]:
        shapes = {n: p.shape for n, p in self.parameters.items()}
        found = metric_file.restored(state, self._about(), shapes, self._like().device)
        said, nats = found.said, found.said["nats"]
        like = torch.zeros((), dtype=statistics_dtype(self.parameters.values()), device=self._like().device)
        taken = {
            "seen": said["seen"],
            "labels": said["labels"],
            "nats": None if nats is None else like.new_tensor(nats),
            "_masses": {source: like.new_tensor(mass) for source, mass in said["masses"].items()},
            "_where": [],  # the blocks may be of another dtype
            "_pending": [],
            "_returned": [],
        }
        streams = {which: self._stream(which, saved, said["rank"]) for which, saved in found.generators.items()}
        rows = streams.pop(ROWS, self.collection.rows)

        def take_over() -> None:  # nothing in here fails
            self.collection.rows = rows
            self.collection.restore(found.blocks)
            vars(self).update(taken)
            # a device that had not drawn yet starts from its seed again
            self.estimator.generators = {torch.device(which): g for which, g in streams.items()}
            self.share_out()

        return take_over

    def _stream(self, which: str, saved: Any, rank: int) -> torch.Generator:
        """Return a random stream from its state, for the rows or of a device. `rank`: whose it was."""
        try:
            generator = torch.Generator("cpu" if which == ROWS else which)
            generator.set_state(saved.cpu())
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"the random stream {which!r} in the metric's state is none: {error}") from error
        if self.strategy.rank != rank:
            # another rank's stream: one of our own follows from it, so that no two ranks draw the same labels
            start = int(torch.randint(2**31, (), generator=generator, device=generator.device))
            generator.manual_seed(self.strategy.seed(start))
        return generator

    def save(self, path: Any) -> None:
        """Write the statistics to a safetensors file, beside it first and then renamed. Of a sharded model rank 0 does.

        Raises:
            OSError: the file cannot be written.
        """
        if not self.strategy.sharded:
            metric_file.save(self._state(), path)
            return
        error: BaseException | None = None
        with self.whole():
            if self.strategy.rank == 0:
                try:
                    metric_file.save(self._state(), path)
                except BaseException as raised:  # whatever it is, the other ranks wait to hear of it
                    error = raised
            written = self.strategy.everywhere(error is None)
        if error is not None:
            raise error
        if not written:
            raise OSError(f"rank 0 could not write the metric to {path}; it says why")

    def load(self, path: Any) -> None:
        """Read statistics that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut short, no metric file, or of another model. The metric stays as it was.
        """
        self.load_state_dict(metric_file.load(path))
