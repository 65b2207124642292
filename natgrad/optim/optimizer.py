"""NaturalGradient: a `torch.optim.Optimizer` that descends along ĝ⁻¹df.

The metric gives the geometry, the step rule the length; this class decides when the metric is refreshed, skips steps
that are not finite, and holds the one line that writes parameters.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.compile import go_on_in_python
from natgrad.distributed.ddp import warn_alone
from natgrad.distributed.strategy import Strategy
from natgrad.metric.copies import refuse_pickle
from natgrad.metric.interrupts import uninterrupted
from natgrad.metric.metric import Metric, Vector
from natgrad.metric.seal import sealed
from natgrad.optim import skips
from natgrad.optim.copies import deep_copy_of
from natgrad.optim.groups import FULL_LR, check_keys, check_options, options_in_force, split_groups, taken_in
from natgrad.optim.mistakes import MISSES, check_driver, loss_of_closure, own_gradient, say_no_gradient, say_stale
from natgrad.optim.registry import rule_of
from natgrad.optim.saved import check_groups, checked, kept_on_failure, loaded
from natgrad.optim.skips import Skips, all_finite
from natgrad.optim.step_rule import Options, ScaledStep, StepContext, StepRule
from natgrad.optim.trials import Trial, value_of
from natgrad.optim.weight_average import WeightAverage

GAP_GROWTH = 1.0  # gaps between refreshes are this share of the steps taken, up to `refresh`
AVERAGE_LIMIT = 0.85  # largest decay of the moving average of the statistics
TORCH_STATES = "torch.distributed.checkpoint.state_dict"  # the module of get_state_dict
KEPT_APART = "kept apart"  # a key of `Optimizer.state`, where there is nothing else


class NaturalGradient(torch.optim.Optimizer):
    """θ ← θ − η ĝ⁻¹df, with the metric's own step rule, damping and momentum unless they are given.

    The loop is that of any optimizer: ``zero_grad``, forward, ``backward``, ``step``. For a `Fisher` metric the
    statistics are taken on the forward passes that fall due, with no further call.

    Args:
        metric: the metric to descend by; it knows the parameters.
        lr, momentum, damping: None takes the step rule's defaults; ``opt.info`` says what the damping means there.
        weight_decay: decoupled, θ ← (1 − η·weight_decay) θ. 0 switches it off, None takes the step rule's default.
        step: a step rule; None takes the metric's own.
        refresh: the largest number of steps between refreshes of the metric; None takes the step rule's, mostly 20.
        groups: parameter groups with options of their own, ``{"params": names or patterns, "lr": …}`` each; parameters
            that none names form the first group.
        maximize: climb instead of descend.
        average: decay of an exponential average of the weights, to evaluate by inside ``with opt.averaged():``; None
            keeps none.

    Raises:
        TypeError: `metric` is no `Metric`, or an option no number.
        ValueError: an option out of range, or a group that names no parameter or has an unknown key.
    """

    def __init__(
        self,
        metric: Metric,
        lr: float | None = None,
        momentum: float | None = None,
        damping: float | None = None,
        weight_decay: float | None = None,
        step: StepRule | None = None,
        refresh: int | None = None,
        groups: Iterable[Mapping[str, Any]] = (),
        maximize: bool = False,
        average: float | None = None,
    ) -> None:
        if not isinstance(metric, Metric):
            raise TypeError(
                f"NaturalGradient takes a metric first, got {type(metric).__name__}; for instance "
                "ng.Fisher(model, criterion), or ng.Euclidean(model) for plain gradient descent"
            )
        if refresh is not None and (not isinstance(refresh, int) or refresh < 1):
            raise ValueError(f"refresh must be a whole number of at least 1, got {refresh!r}")
        self.metric = metric
        self.steps = self.refreshes = self._next_refresh = 0
        self._misses = 0  # refreshes in a row that fell due and brought nothing
        self.refreshed = False
        self.rule = rule_of(metric, step)
        self.strategy = self.rule.strategy = metric.strategy or Strategy()
        self.refresh = self.rule.refresh if refresh is None else refresh
        defaults = {
            "lr": self.rule.lr if lr is None else lr,
            "momentum": self.rule.momentum if momentum is None else momentum,
            "damping": self.rule.damping if damping is None else damping,
            "weight_decay": self.rule.weight_decay if weight_decay is None else weight_decay,
            "maximize": maximize,
        }
        self._average = None if average is None else WeightAverage(average)
        self._showing_average = False
        self._name_of: dict[Tensor, str] = {p: n for n, p in metric.parameters.items()}
        super().__init__(split_groups(metric.parameters, groups), defaults)
        self.state[KEPT_APART] = {}  # type: ignore[index]  # else get_state_dict takes a step to have a state
        self._skips = Skips()
        self._idle = False  # whether it was said that a step had no gradient
        self._spent, self._started = 0.0, time.perf_counter()
        if type(metric).observe is not Metric.observe:
            warn_alone(type(metric).__name__)
        metric.drive(self)
        metric.expect(self.refresh_due)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters: thawed ones of the metric's model, or foreign ones, which are trained without curvature.

        Raises:
            TypeError: an option that is no number.
            ValueError: an option out of range, or a key that is none.
        """
        check_keys(param_group)  # before anything is taken over
        values = {**self.defaults, **param_group}
        check_options(values, self.metric.positive_definite)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault(FULL_LR, float(group["lr"]))  # schedules overwrite lr
        if 0 < group[FULL_LR] < self.rule.least_lr:
            warnings.warn(
                f"lr={group[FULL_LR]:g} is far below what {type(self.rule).__name__} can use (default "
                f"{self.rule.lr:g}): it is a share of the weights' own size, not AdamW's rate, and training takes that "
                "much longer. Leave it out",
                stacklevel=4,
            )
        for i, p in enumerate(group["params"]):
            if p not in self._name_of:
                name = taken_in(self.metric, p, self.param_groups)
                self._name_of[p] = name or f"group{len(self.param_groups) - 1}.{i}"
                self._next_refresh = 0  # the metric knows nothing of it yet
        if self._average is not None:
            self._average.include(self._held(group["params"]))

    @property
    def schedule(self) -> dict[str, Any]:
        """What ranks must agree on for their steps to be the same, and their refreshes at the same ones."""
        options = ("lr", "momentum", "damping", "weight_decay", "maximize")
        return {
            "rule": type(self.rule).__name__,
            "refresh": self.refresh,
            "steps": self.steps,
            "next refresh": self._next_refresh,
            **{f"{o} of group {i}": float(g[o]) for i, g in enumerate(self.param_groups) for o in options},
        }

    @property
    def refresh_due(self) -> bool:
        """Whether the forward passes before the next step are to refresh the metric."""
        return self.steps >= self._next_refresh

    @torch.no_grad()
    def step(self, arg: Any = None, *, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Ctrl-C during it is held back until it is complete.

        Args:
            arg: None where ``loss.backward()`` was called; a callable is a closure that returns the loss after calling
                ``backward``; anything else is a batch for a metric that makes its own gradient.
            closure: the same as a callable `arg`, for trainers that pass it by name.

        Raises:
            TypeError: a batch for a metric that takes its gradient from ``loss.backward()``.
            ValueError: a schedule has put an option out of range.
            RuntimeError: no forward pass was seen that the metric could be taken from, a metric that makes its own
                gradient has observed no batch, or the averaged weights are in place.
            FloatingPointError: the gradient was not finite for many steps in a row.
        """
        go_on_in_python()  # the state of a step does not fit a graph
        if self._showing_average:
            raise RuntimeError("step() inside `with opt.averaged():` would train the average; leave the block first")
        check_driver(self.metric, self)
        arg = arg if closure is None else closure
        loss: Any = None
        if callable(arg):
            loss = loss_of_closure(arg, self._name_of, self.metric)
        began = time.perf_counter()
        if arg is not None and not callable(arg):
            loss = self.metric.observe(arg)
            df = self.metric.gradient()
        else:
            found = {n: p.grad for p, n in self._name_of.items() if p.grad is not None and p.requires_grad}
            df = own_gradient(self.metric, dict(self.strategy.shards_of(found)))
        if df:
            with uninterrupted():
                self._step(df, arg if callable(arg) else None, loss)
        else:
            self._idle = say_no_gradient(self.metric, callable(arg), self._idle or self.steps > 0)
        self._spent += time.perf_counter() - began
        return loss

    def _step(self, df: Vector, closure: Callable[[], Any] | None = None, loss: Any = None) -> None:
        options = self._options()
        df = {n: -g if options[n].maximize else g for n, g in df.items()}
        for n, g in df.items():
            if g.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {n!r} is sparse; natgrad takes dense ones: build the embedding with sparse=False"
                )
        fine = all_finite(df)
        if self.refresh_due or self.strategy.sharded:  # ranks are about to meet: if one skips, so do all
            fine = self.metric.agree(fine)
        skipped = self._skips.count(fine, self.refresh_due)
        if skipped:
            self.metric.discard_pending()
            self.refreshed = False
            return
        self._advance()
        on_host = skips.free_to_read(fine)  # known to be fine by now; elsewhere a bad step is masked on the device
        if not on_host:
            df = {n: torch.where(fine, g, torch.zeros_like(g)) for n, g in df.items()}
        first = next(iter(options.values()))
        self.rule.info = {"damping": first.damping, "step_length": first.lr}  # where the rule says nothing else
        trial = Trial(closure, self._held(self._name_of)) if closure is not None and self.rule.verifies else None
        context = StepContext(options, self.refreshed, None if trial is None else value_of(loss), trial)
        self._apply(self.rule.update(self.metric, df, context), None if on_host else fine)
        if self._average is not None:
            self._average.follow(self._held(self._name_of))
        self.metric.expect(self.refresh_due)

    def _apply(self, increments: Mapping[str, Tensor | ScaledStep], fine: Tensor | None) -> None:
        """Decay the weights and add their increments. `fine`: where it is not known on the host, 0 for a bad step."""
        held = self._held(self._name_of)
        decayed: list[Tensor] = []
        kept: list[float] = []
        moved: dict[float, tuple[list[Tensor], list[Tensor]]] = {}  # parameters and their ways, by length
        for group in self.param_groups:
            decay = 0.0 if self.rule.decays else float(group["lr"]) * float(group["weight_decay"])
            for parameter in group["params"]:
                delta = increments.get(name := self._name_of[parameter])
                if delta is None or not parameter.requires_grad:  # a rule's momentum may outlast freezing
                    continue
                p = held[name]
                way, length = delta if isinstance(delta, ScaledStep) else (delta, 1.0)
                if fine is not None:
                    way = torch.where(fine, way, torch.zeros_like(way))
                    if decay:
                        one = p.new_ones(())
                        p.mul_(torch.where(fine, one - decay, one))
                elif decay:
                    decayed.append(p)
                    kept.append(1 - decay)
                parameters, ways = moved.setdefault(length, ([], []))
                parameters.append(p)
                ways.append(way)
        if decayed:
            torch._foreach_mul_(decayed, kept)
        for length, (parameters, ways) in moved.items():
            torch._foreach_add_(parameters, ways, alpha=length)

    def _advance(self) -> None:
        """Fold pending statistics into the moving average and set the date of the next refresh."""
        # a plain mean at first, so that no start value lingers; then an exponential average
        decay = min(AVERAGE_LIMIT, 1 - 1 / (self.refreshes + 1))
        if due := self.refresh_due:
            self.metric.check_parameters()
        self.refreshed = self.metric.advance(decay)
        if self.refreshed:
            self.refreshes += 1
            self._misses = 0
        elif due and self.metric.needs_refresh:
            if not self.refreshes:
                raise RuntimeError(self.metric.why_no_statistics)
            self._misses += 1
            if self._misses == MISSES:
                say_stale(self.metric.why_no_statistics)
        self.steps += 1
        if due:
            self._next_refresh = self.steps - 1 + max(1, min(self.refresh, int(self.steps * GAP_GROWTH)))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and drop statistics of a backward pass that no step followed."""
        super().zero_grad(set_to_none)
        self.metric.discard_pending()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights stand in the model inside the block, the trained ones after it.

        Buffers are those of training; batch normalisation layers want theirs recomputed on some data
        (``torch.optim.swa_utils.update_bn``).

        Raises:
            ValueError: the optimizer keeps no average.
        """
        if self._average is None:
            raise ValueError("this optimizer keeps no average; construct it with average=0.98, for instance")
        trained = {n: p.detach().clone() for n, p in self._held(self._name_of).items()}
        self._showing_average = True
        try:
            self._write(self._average.values)
            yield
        finally:
            self._write(trained)
            self._showing_average = False

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        with uninterrupted():
            for n, p in self._held(self._name_of).items():
                p.copy_(values[n])

    def _held(self, parameters: Iterable[Tensor]) -> dict[str, Tensor]:
        """What this rank holds of parameters, by name: all of them, or shards."""
        return dict(self.strategy.shards_of({self._name_of[p]: p for p in parameters}))

    def _options(self) -> dict[str, Options]:
        return options_in_force(self.param_groups, self._name_of, self.metric.positive_definite)

    @property
    def info(self) -> dict[str, Any]:
        """What the last step did, read from the device now.

        ``damping`` and its meaning, ``step_length``, ``at_newton_step`` (the share of blocks whose Newton step was
        shorter than that) and ``predicted_nats`` (how far the step was to move the predictions, before the bound on
        that) as the step rule knows them;
        ``refreshed``; ``refreshes``, ``steps`` and ``skipped`` so far; ``share_of_time`` spent inside `step` since the
        optimizer was made. Of a `Fisher` metric ``data_seen`` at refreshes.
        """
        elapsed = time.perf_counter() - self._started
        return {
            "damping_meaning": self.rule.damping_meaning,
            **{k: float(v) if isinstance(v, Tensor) else v for k, v in self.rule.info.items()},
            **self.metric.info,
            "refreshed": self.refreshed,
            "refreshes": self.refreshes,
            "steps": self.steps,
            "skipped": self._skips.total,
            "share_of_time": self._spent / elapsed if elapsed else 0.0,
        }

    def cosines(self) -> dict[str, float]:
        """{block: cos(direction, gradient)} of the last step, or with the default step rule of the last one that
        refreshed the metric. Near 1 everywhere, the natural gradient is the plain one.
        """
        return {n: float(c) for n, c in self.rule.cosines().items()}

    # copies and state ----------------------------------------------------------------------------------

    __deepcopy__ = deep_copy_of
    __reduce__ = refuse_pickle

    def state_dict(self) -> dict[str, Any]:
        """Options, counters, the step rule's state and the metric's; loads with ``weights_only=True``.

        Of a sharded model the state is that of one process, in plain tensors, on every rank, and taking it is a call
        that all ranks make together.

        Raises:
            TypeError: torch's ``get_state_dict`` asks, which would keep the options alone.
        """
        if sys._getframe(1).f_globals.get("__name__") == TORCH_STATES:
            raise TypeError(
                "get_state_dict and get_optimizer_state_dict know states by parameter alone, and would leave out the "
                "metric. Use natgrad.checkpoint.save and load, or natgrad.checkpoint.Saved(opt) with dcp.save"
            )
        state = super().state_dict()
        state["state"] = {}
        average = self._average
        state["natgrad"] = {
            "steps": self.steps,
            "refreshes": self.refreshes,
            "next_refresh": self._next_refresh,
            "skipped": self._skips.total,
            "average": average and {"steps": average.steps, "values": self.strategy.whole(average.values)},
            "rule": type(self.rule).__name__,
            "rule_state": self.rule.state_dict(),
            "metric": self.metric.state_dict(),
        }
        return sealed(copy.deepcopy(state))  # a state is its own: training goes on

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit.

        Raises:
            ValueError: it is damaged, no state of this optimizer, or belongs to another model, metric or step rule;
                nothing has changed then.
        """
        state, mine = checked(state_dict, self.param_groups, self.rule, self._name_of, self._average is not None)
        check_groups(state["param_groups"], self.metric.positive_definite)
        rule, take_over = loaded(self.rule, mine["rule_state"]), self.metric.prepared(mine["metric"])
        values = {} if mine["average"] is None else self.strategy.shard(copy.deepcopy(mine["average"]["values"]))
        with uninterrupted():
            with kept_on_failure(self, "state", "param_groups"):
                # tensors of ours keep their own dtype, torch would cast them to the parameter's: not in `state`, then
                super().load_state_dict({"state": {KEPT_APART: {}}, "param_groups": state["param_groups"]})
                take_over()
            self.metric.discard_pending()
            vars(self.rule).update(rule)
            if self._average is not None:
                self._average.steps, self._average.values = mine["average"]["steps"], dict(values)
            self.steps, self.refreshes = mine["steps"], mine["refreshes"]
            self._next_refresh, self._skips.total = mine["next_refresh"], mine["skipped"]
            self.metric.expect(self.refresh_due)
