"""One training run under a budget of CPU seconds: the clock, the looks at the held-out data and what a line records.

The clock is the CPU time of one thread; wall time is taken over the same sections. Drawing batches and evaluation are
not counted, nor are the first steps of an optimizer in this process, which load libraries and compile: they are taken
beforehand on a throwaway model and reported as ``warmup_seconds``.
"""

from __future__ import annotations

import math
import platform
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng
from benchmarks.rivals import Hyper, Rival, cosine_with_warmup
from benchmarks.workloads import Batch, Workload

EXTENSION = 4 / 3  # of the budget, for optimizers without a horizon where the time to a target is sought
PATIENCE = 20  # steps in a row with a loss that is not finite before a run counts as diverged
WALL_LIMIT = 1.2  # wall over CPU seconds; beyond it the machine was busy and the run is marked
WARMUP_STEPS = 3
Curve = list[list[Any]]  # [steps, CPU seconds, metric or None] a look

_warm: set[tuple[str, str]] = set()


def environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
    }


class Training:
    """A model and its optimizers, one step at a time.

    Attributes:
        passes: forward-backwards so far, those of closures and those of natgrad's refreshes (which draw labels and
            backpropagate once more); None where steps are not made of them.
    """

    def __init__(self, workload: Workload, rival: Rival, hyper: Hyper, seed: int) -> None:
        torch.manual_seed(seed)
        self.workload = workload
        self.model = workload.model()
        self.optimizers = rival.build(self.model, workload, hyper)
        self.rates = [[g["lr"] for g in opt.param_groups] for opt in self.optimizers]
        self.calls = 0

    def set_rate(self, factor: float) -> None:
        for opt, before in zip(self.optimizers, self.rates):
            for group, lr in zip(opt.param_groups, before):
                group["lr"] = lr * factor

    def step(self, batch: Batch) -> float:
        def closure() -> Tensor:
            self.calls += 1
            for opt in self.optimizers:
                opt.zero_grad()
            loss = self.workload.loss(self.model, *batch)
            loss.backward()
            return loss

        first = self.optimizers[0]
        if isinstance(first, ng.NaturalGradient):
            return float(self.workload.natgrad_step(first, closure, batch).detach())
        if isinstance(first, torch.optim.LBFGS):
            return float(first.step(closure).detach())
        loss = closure()
        for opt in self.optimizers:
            opt.step()
        return float(loss.detach())

    @property
    def passes(self) -> int | None:
        first = self.optimizers[0]
        if isinstance(first, ng.NaturalGradient):
            return self.calls + first.refreshes if self.calls else None
        return self.calls

    def look(self, what: Callable[[nn.Module], float]) -> float:
        """A metric; optimizers that train other weights than they evaluate by are asked for the latter."""
        modes = [opt for opt in self.optimizers if hasattr(opt, "eval")]
        for opt in modes:
            opt.eval()
        value = what(self.model)
        for opt in modes:
            opt.train()
        return value


def warm_up(workload: Workload, rival: Rival, hyper: Hyper) -> float:
    """Take the first steps of this process off the clock; CPU seconds they took."""
    if (workload.name, rival.name) in _warm:
        return 0.0
    start = time.process_time()
    training = Training(workload, rival, hyper, 0)
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(WARMUP_STEPS):
            training.step(workload.draw(generator))
    except (ArithmeticError, RuntimeError):
        pass  # the run itself meets it again and records it
    _warm.add((workload.name, rival.name))
    return time.process_time() - start


def gap(spent: float, budget: float) -> float:
    """CPU seconds to the next look: geometric early, so that a quick arrival is resolved."""
    return min(max(0.08 * spent, budget / 400), budget / 40)


def run(
    workload: Workload, rival: Rival, hyper: Hyper, seed: int, budget: float, extended: bool = False
) -> dict[str, Any]:
    """One training run; the entries of its line but for the target's."""
    warmup = warm_up(workload, rival, hyper)
    training = Training(workload, rival, hyper, seed)
    generator = torch.Generator().manual_seed(seed)
    end = budget * EXTENSION if extended and not rival.scheduled else budget
    spent, wall, steps, next_look, bad = 0.0, 0.0, 0, 0.0, 0
    curve: Curve = []
    passes: list[int | None] = []
    failure = None
    while spent < end and bad < PATIENCE and failure is None:
        batch = workload.draw(generator)
        start, wall_start = time.process_time(), time.perf_counter()
        if rival.scheduled:
            training.set_rate(cosine_with_warmup(spent / budget))
        try:
            loss = training.step(batch)
        except (ArithmeticError, RuntimeError) as error:  # a factorisation that fails is a failure of the optimizer
            failure, loss = f"{type(error).__name__}: {str(error)[:200]}", math.nan
        spent += time.process_time() - start
        wall += time.perf_counter() - wall_start
        steps += 1
        bad = 0 if math.isfinite(loss) else bad + 1
        if spent >= next_look or spent >= end or failure is not None:
            curve.append([steps, spent, finite(training.look(workload.held_out))])
            passes.append(training.passes)
            next_look = spent + gap(spent, budget)
    diverged = bad > 0
    known = [m for _, _, m in curve if m is not None]
    return {
        "steps": steps,
        "cpu_seconds": round(spent, 4),
        "wall_seconds": round(wall, 4),
        "warmup_seconds": round(warmup, 4),
        "marked": wall > WALL_LIMIT * spent,
        "final_metric": None if diverged else curve[-1][2],
        "best_metric": min(known, default=None),
        "final_train": None if diverged else finite(training.look(workload.training)),
        "diverged": diverged,
        "failure": failure,
        "passes": passes[-1],
        "state_bytes": state_bytes(training),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in training.model.parameters()),
        "budget": budget,
        "environment": environment(),
        "curve": [[n, short(t), m if m is None else short(m)] for n, t, m in curve],
        "curve_passes": passes,
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def arrival(line: dict[str, Any], target: float | None) -> dict[str, Any]:
    """When a run first looked no worse than the target: entries of its line, None for never."""
    looks = zip(line["curve"], line["curve_passes"])
    hit = next(((c, p) for c, p in looks if target is not None and c[2] is not None and c[2] <= target), None)
    return {
        "target": target,
        "steps_to_target": None if hit is None else hit[0][0],
        "cpu_to_target": None if hit is None else hit[0][1],
        "passes_to_target": None if hit is None else hit[1],
    }


# what an optimizer keeps ------------------------------------------------------------------------------------


def state_bytes(training: Training) -> int:
    """Bytes of every tensor that the optimizers hold, whether their ``state_dict`` lists it or not.

    Inverses, statistics, momenta and averages count; parameters, gradients, buffers and data of the workload do not.
    """
    workload = training.workload
    not_state: list[Any] = [workload.train, workload.valid, getattr(workload, "batches", ())]
    for tensor in [*training.model.parameters(), *training.model.buffers()]:
        not_state += [tensor.data] if tensor.grad is None else [tensor.data, tensor.grad]
    seen = {storage(t) for t in tensors(not_state, set())}
    held = {storage(t): t.untyped_storage().nbytes() for t in tensors([o.__dict__ for o in training.optimizers], set())}
    return sum(size for key, size in held.items() if key not in seen)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


OPAQUE = (str, bytes, int, float, complex, type, types.ModuleType, nn.Module, torch.Generator, type(None))


def tensors(tree: Any, visited: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached through containers, attributes and closures."""
    todo: list[Any] = [tree]
    keep = []  # so that no id is used twice
    while todo:
        item = todo.pop()
        if isinstance(item, OPAQUE) or id(item) in visited:
            continue
        visited.add(id(item))
        keep.append(item)
        if isinstance(item, Tensor):
            if item.layout == torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(item):
                yield item
            continue
        todo += parts(item)


def parts(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return list(item.values())
    if isinstance(item, (list, tuple, set, frozenset)):
        return list(item)
    if isinstance(item, types.MethodType):
        return [item.__self__]
    if isinstance(item, types.FunctionType):
        return [c.cell_contents for c in item.__closure__ or () if not empty(c)]
    slots = [getattr(item, n, None) for k in type(item).__mro__ for n in _slots(k)]
    return [*slots, *vars(item).values()] if hasattr(item, "__dict__") else slots


def _slots(kind: type) -> Iterable[str]:
    slots = kind.__dict__.get("__slots__", ())
    return [slots] if isinstance(slots, str) else [n for n in slots if n not in ("__dict__", "__weakref__")]


def empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
