"""Random programs: a second generator of models, independent of the chains of `tests.fuzz`.

A program runs on nodes of graphs, on (time, data, features), on (data, time, features) or on (data, features). Its
rows are gathered, routed, sliced, put in other orders and pooled; it has scalars, gates at zero, stacks of experts,
loss rows in any order and losses given as functions. `try_program` compares the metric with oracles by plain autograd,
permutes and splits the data, copies and resumes the optimizer, and takes steps.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.capture.tape import CaptureError
from tests import layer_oracle

EXACT = 1e-8
CLASSES = 3

# the only reasons for which a program may be refused
REFUSALS = {
    "used by covered and uncovered ops": r"in a way that no op rule covers",
    "two matrix forms": r"two matrix forms that share no block",
    "overlapping slices": r"share no block",
    "nothing tells data from positions": r"no layer tells which",
}


@dataclass
class Batch:
    """Data of one kind of input. `args`: what the model takes; `sizes`: of graphs."""

    kind: str
    args: tuple[Any, ...]
    count: int
    sizes: list[int] = field(default_factory=list)

    def take(self, chosen: list[int]) -> Batch:
        """The data of these numbers, in this order."""
        if self.kind == "graph":
            x, owner, edges, _ = self.args
            nodes = torch.cat([(owner == n).nonzero().squeeze(1) for n in chosen])
            where = torch.full((len(owner),), -1)
            where[nodes] = torch.arange(len(nodes))
            numbers = torch.full((self.count,), -1)
            numbers[torch.tensor(chosen)] = torch.arange(len(chosen))
            kept = edges[:, torch.isin(owner[edges[0]], torch.tensor(chosen))]
            sizes = [self.sizes[n] for n in chosen]
            return Batch("graph", (x[nodes], numbers[owner[nodes]], where[kept], len(chosen)), len(chosen), sizes)
        (x,) = self.args
        return Batch(self.kind, (x[:, chosen] if self.kind == "time" else x[chosen],), len(chosen))


def draw_batch(r: random.Random, kind: str, width: int) -> Batch:
    count, steps = r.randint(2, 5), r.randint(2, 5)
    if kind == "graph":
        sizes = [r.randint(0, 4) for _ in range(count)]
        sizes[r.randrange(count)] += 1
        owner = torch.repeat_interleave(torch.arange(count), torch.tensor(sizes))
        pairs = [
            (i, j) for i in range(len(owner)) for j in range(len(owner)) if owner[i] == owner[j] and r.random() < 0.4
        ]
        edges = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
        return Batch("graph", (torch.randn(len(owner), width).double(), owner, edges, count), count, sizes)
    shape = {"time": (steps, count, width), "seq": (count, steps, width), "vector": (count, width)}[kind]
    return Batch(kind, (torch.randn(shape).double(),), count)


# ops: of (module, rows (…, d), the batch's other arguments) → rows (…, d′) -------------------------------------

Run = Callable[[Any, Tensor, tuple[Any, ...]], Tensor]


class Op(nn.Module):
    def __init__(self, run: Run, **parts: Any) -> None:
        super().__init__()
        self.run = run
        for key, part in parts.items():
            setattr(self, key, part)

    def forward(self, h: Tensor, rest: tuple[Any, ...]) -> Tensor:
        return self.run(self, h, rest)


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def zero() -> nn.Parameter:
    return nn.Parameter(torch.zeros(()))


def flat_rows(m: Any, h: Tensor, _: Any) -> Tensor:
    return m.l(h.reshape(-1, h.shape[-1])).reshape(*h.shape[:-1], -1)


def in_halves(m: Any, h: Tensor, _: Any) -> Tensor:
    cut = len(h) // 3
    return torch.cat([m.l(h[:cut]), m.l(h[cut:])])


def routed(m: Any, h: Tensor, _: Any) -> Tensor:
    """Each row to the expert that its first entry names; an expert may have none."""
    rows = h.reshape(-1, h.shape[-1])
    chosen = (rows[:, 0].detach() > 0.3).long() + (rows[:, 0].detach() > 1.2).long()
    out = rows.new_zeros(len(rows), m.w.shape[-1])
    for k in range(len(m.w)):
        i = (chosen == k).nonzero().squeeze(1)
        out = out.index_add(0, i, rows[i] @ m.w[k] + m.b[k])
    return out.reshape(*h.shape[:-1], -1)


def routed_modules(m: Any, h: Tensor, _: Any) -> Tensor:
    rows = h.reshape(-1, h.shape[-1])
    out = rows.new_zeros(len(rows), m.e[0].out_features)
    for k, expert in enumerate(m.e):
        i = ((rows[:, 0].detach() > 0) == bool(k)).nonzero().squeeze(1)
        out[i] = expert(rows[i])
    return out.reshape(*h.shape[:-1], -1)


def scattered(m: Any, h: Tensor, _: Any) -> Tensor:
    """Through a layer in another order of rows, and back."""
    order = torch.arange(len(h)).flip(0)
    return m.l(h[order])[order] * m.s


def mean_over_data(m: Any, h: Tensor, rest: Any) -> Tensor:
    return h + m.g * h.mean(rest[-1], keepdim=True)


ANY: dict[str, Callable[[int], Op]] = {
    "linear": lambda d: Op(lambda m, h, _: m.l(h), l=nn.Linear(d, 3)),
    "linear tanh": lambda d: Op(lambda m, h, _: m.l(h).tanh(), l=nn.Linear(d, 4)),
    "functional slice": lambda d: Op(lambda m, h, _: F.linear(h, m.w[1:4], m.b[1:4]), w=p(6, d), b=p(6)),
    "two slices": lambda d: Op(
        lambda m, h, _: F.linear(h, m.w[:2]).repeat_interleave(2, -1) * F.linear(h, m.w[2:]), w=p(6, d)
    ),
    "matmul": lambda d: Op(lambda m, h, _: h @ m.w, w=p(d, 3)),
    "scalar": lambda d: Op(lambda m, h, _: h * m.s, s=nn.Parameter(torch.tensor(1.3))),
    "temperature": lambda d: Op(lambda m, h, _: h * m.s.exp(), s=p()),
    "scale": lambda d: Op(lambda m, h, _: h * m.s + m.o, s=p(d), o=p(d)),
    "gate at zero": lambda d: Op(lambda m, h, _: h + m.g * m.l(h).tanh(), g=zero(), l=nn.Linear(d, d)),
    "gated mean": lambda d: Op(mean_over_data, g=p(1)),
    "gated mean at zero": lambda d: Op(mean_over_data, g=zero()),
    "norm": lambda d: Op(lambda m, h, _: m.n(h), n=nn.LayerNorm(d)),
    "prelu": lambda d: Op(lambda m, h, _: m.a(h), a=nn.PReLU()),
    "flat rows": lambda d: Op(flat_rows, l=nn.Linear(d, 3)),
    "in halves": lambda d: Op(in_halves, l=nn.Linear(d, 3)),
    "routed stack": lambda d: Op(routed, w=p(3, d, 3), b=p(3, 3)),
    "routed modules": lambda d: Op(routed_modules, e=nn.ModuleList([nn.Linear(d, 3), nn.Linear(d, 3)])),
    "other order": lambda d: Op(scattered, l=nn.Linear(d, d), s=p()),
    "twice": lambda d: Op(lambda m, h, _: m.l(m.l(h).tanh()), l=nn.Linear(d, d)),
    "pieces": lambda d: Op(lambda m, h, _: torch.cat([m.l(h[..., :1]), h[..., 1:]], -1), l=nn.Linear(1, 2)),
    "einsum": lambda d: Op(lambda m, h, _: torch.einsum("...i,oi->...o", h, m.w), w=p(3, d)),
    "tied and turned": lambda d: Op(lambda m, h, _: F.linear(F.linear(h, m.w).tanh(), m.w.T), w=p(2, d)),
}


def messages(m: Any, h: Tensor, rest: Any) -> Tensor:
    _, edges, _, _ = rest
    return h + torch.zeros_like(h).index_add(0, edges[1], m.l(h[edges[0]]).tanh())


def edge_gates(m: Any, h: Tensor, rest: Any) -> Tensor:
    _, edges, _, _ = rest
    gate = m.l(torch.cat([h[edges[0]], h[edges[1]]], -1)).sigmoid()
    return torch.zeros_like(h).index_add(0, edges[1], gate * h[edges[0]]) + h


GRAPH: dict[str, Callable[[int], Op]] = {
    "messages": lambda d: Op(messages, l=nn.Linear(d, d)),
    "edge gates": lambda d: Op(edge_gates, l=nn.Linear(2 * d, 1)),
}


def over_time(make: Callable[[int, bool], nn.Module], pick: Callable[[Any], Tensor]) -> Callable[[bool], Any]:
    return lambda first: lambda d: Op(lambda m, h, _: pick(m.r(h)), r=make(d, not first))


RECURRENT = {
    "gru": over_time(lambda d, batch: nn.GRU(d, 3, batch_first=batch), lambda o: o[0]),
    "lstm both ways": over_time(lambda d, batch: nn.LSTM(d, 2, batch_first=batch, bidirectional=True), lambda o: o[0]),
}


def attention(first: bool) -> Callable[[int], Op]:
    return lambda d: Op(
        lambda m, h, _: m.a(h, h, h, need_weights=False)[0], a=nn.MultiheadAttention(d, 1, batch_first=not first)
    )


def convolved(first: bool) -> Callable[[int], Op]:
    def run(m: Any, h: Tensor, _: Any) -> Tensor:
        h = h.transpose(0, 1) if first else h
        h = m.c(h.transpose(1, 2)).transpose(1, 2)
        return h.transpose(0, 1) if first else h

    return lambda d: Op(run, c=nn.Conv1d(d, 3, 3, padding=1))


def running_sum(first: bool) -> Callable[[int], Op]:
    return lambda d: Op(lambda m, h, _: m.l(h.cumsum(0 if first else 1)), l=nn.Linear(d, 3))


def sequence_ops(first: bool) -> dict[str, Callable[[int], Op]]:
    return {
        **{name: make(first) for name, make in RECURRENT.items()},
        "attention": attention(first),
        "conv": convolved(first),
        "running sum": running_sum(first),
    }


OVER_TIME = {"gru", "lstm both ways", "attention", "conv", "running sum"}


def ops_for(kind: str) -> dict[str, Callable[[int], Op]]:
    return {**ANY, **({} if kind == "vector" else GRAPH if kind == "graph" else sequence_ops(kind == "time"))}


# programs ----------------------------------------------------------------------------------------------


class Program(nn.Module):
    """Ops, a head before or after the rows are pooled, and an order of loss rows."""

    def __init__(self, kind: str, ops: list[Op], width: int, end: str, early: bool) -> None:
        super().__init__()
        self.kind, self.end, self.early = kind, end, early
        self.ops, self.head = nn.ModuleList(ops), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        axis = 1 if self.kind == "time" else 0
        h = x
        for op in self.ops:
            h = op(h, (*rest, axis))
        if self.early:
            return self.finish(self.head(h), rest)
        return self.head(self.finish(h, rest))

    def finish(self, h: Tensor, rest: tuple[Any, ...]) -> Tensor:
        if self.kind == "graph":
            owner, _, count = rest
            return h.new_zeros(count, h.shape[-1]).index_add(0, owner, h)
        if self.kind == "vector":
            return h
        if self.end == "rows":
            return h.flatten(0, 1)
        if self.end == "turned rows":
            return h.transpose(0, 1).flatten(0, 1)
        time = 0 if self.kind == "time" else 1
        return h.select(time, -1) if self.end == "last" else h.mean(time)


@dataclass
class Case:
    name: str
    model: Program
    batch: Batch
    labels: Tensor
    criterion: Any
    kind: str
    sharing: str
    functional: bool

    def rows(self, n: int, count: int | None = None) -> Tensor:
        """Which loss rows belong to datum n."""
        count = count or self.batch.count
        number = torch.arange(len(self.labels) * count // self.batch.count)
        inner = (self.batch.kind, self.model.end) in (("time", "rows"), ("seq", "turned rows"))
        return number.reshape(-1, count)[:, n] if inner else number.reshape(count, -1)[n]


def numbers(o: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return o, F.one_hot(y, CLASSES).double() * 2 - 0.5


CRITERIA: dict[str, Callable[[str], nn.Module]] = {
    "classes": lambda r: nn.CrossEntropyLoss(reduction=r),
    "classes as a function": lambda r: ng.Loss(lambda o, y: F.cross_entropy(o, y, reduction="none"), r),
    "huber": lambda r: ng.Loss(lambda o, y: F.huber_loss(*numbers(o, y), reduction="none"), r),
    "squares": lambda r: ng.Loss(lambda o, y: F.mse_loss(*numbers(o, y), reduction=r), r),
}


def draw_case(seed: int) -> Case:
    r = random.Random(seed)
    torch.manual_seed(seed)
    kind, width = r.choice(["graph", "graph", "time", "time", "seq", "vector"]), r.randint(2, 3)
    batch = draw_batch(r, kind, width)
    table = ops_for(kind)
    names, ops, axis = [], [], 1 if kind == "time" else 0
    h = batch.args[0]
    for _ in range(r.randint(1, 4)):
        name = r.choice(sorted(table))
        op = table[name](h.shape[-1]).double()
        h = op(h, (*batch.args[1:], axis))
        names.append(name)
        ops.append(op)
    end = r.choice(["last", "mean", "rows", "turned rows"])
    if kind == "time" and not set(names[1:]) & OVER_TIME and not set(names[:1]) & (OVER_TIME - {"running sum"}):
        end = "mean"  # nothing says that the first dimension is time: it is data, by the contract
    if kind == "seq" and {"gated mean", "gated mean at zero"} & set(names):
        end = "mean"  # it looks like time: the first dimension mixes and the second does not
    model = Program(kind, ops, h.shape[-1], end, r.random() < 0.5).double()
    labels = torch.randint(CLASSES, (len(model(*batch.args)),))
    loss, reduction = r.choice(sorted(CRITERIA)), r.choice(["mean", "sum"])
    return Case(
        f"{seed}: {kind} {names} {end} {loss} {reduction}",
        model,
        batch,
        labels,
        CRITERIA[loss](reduction),
        r.choice(["exact", "empirical", "sampled"]),
        r.choice(["expand", "reduce"]),
        loss == "classes" and r.random() < 0.5,
    )


# oracles -----------------------------------------------------------------------------------------------


def gauss_newton(case: Case) -> Tensor:
    return layer_oracle.gauss_newton(case.model, case.criterion, case.batch.args, case.labels)


def empirical(case: Case) -> Tensor:
    rows = [case.rows(n) for n in range(case.batch.count)]
    return layer_oracle.empirical_of(case.model, case.criterion, case.model(*case.batch.args), case.labels, rows)


# what is tried -----------------------------------------------------------------------------------------


def metric_of(case: Case, structure: str, model: nn.Module | None = None, seed: int = 0) -> ng.Fisher:
    return ng.Fisher(
        model or case.model, case.criterion, kind=case.kind, structure=structure, sharing=case.sharing, seed=seed
    )


def updated(case: Case, structure: str, batches: list[tuple[Batch, Tensor]]) -> Tensor:
    metric = metric_of(case, structure)
    for batch, labels in batches:
        metric.update(batch.args, labels)
    return metric.dense()


def off(found: Tensor, expected: Tensor) -> float:
    size = float(expected.norm())
    return float((found - expected).norm()) / size if size > 1e-12 else float(found.norm())


def matrices(case: Case) -> str | None:
    """The metric beside the oracle, on data in order and in another; exact and empirical."""
    expected = gauss_newton(case) if case.kind == "exact" else empirical(case)
    whole = [(case.batch, case.labels)]
    for structure in ("dense", "block", "diagonal"):
        found = updated(case, structure, whole)
        kept = (
            expected
            if structure == "dense"
            else expected * (found != 0)
            if structure == "block"
            else expected.diag().diag()
        )
        if structure == "block" and found.trace() > 0 and abs(float(found.trace() / expected.trace()) - 1) > EXACT:
            return "the trace of block is off"
        if (error := off(found, kept)) > EXACT:
            return f"{structure} is off by {error:.1e}"
    trace = float(expected.trace())
    if trace > 1e-12 and abs(float(updated(case, "ekfac", whole).trace()) / trace - 1) > EXACT:
        return "the trace of ekfac is off"
    order = list(range(case.batch.count))[::-1]
    labels = case.labels.clone()
    for new, old in enumerate(order):
        labels[case.rows(new)] = case.labels[case.rows(old)]
    turned = [(case.batch.take(order), labels)]
    # the reduced rows of a datum are those of one call: halves cut through graphs, and an expert has some of a datum
    by_call = case.sharing == "reduce" and any(n in case.name for n in ("in halves", "routed"))
    for structure in ("dense",) if by_call else ("dense", "kfac"):
        if (error := off(updated(case, structure, turned), updated(case, structure, whole))) > EXACT:
            return f"{structure} moves by {error:.1e} with the order of data"
    return None


def halves(case: Case) -> list[tuple[Batch, Tensor]]:
    cut = case.batch.count // 2
    parts = [list(range(cut)), list(range(cut, case.batch.count))]
    if min(cut, case.batch.take(parts[0]).args[0].shape[0], case.batch.take(parts[1]).args[0].shape[0]) < 2:
        return []  # of one row nothing tells what its dimensions are; an empty batch is refused
    found = []
    for chosen in parts:
        labels = case.labels.new_zeros(len(case.labels) * len(chosen) // case.batch.count)
        for new, old in enumerate(chosen):
            labels[case.rows(new, len(chosen))] = case.labels[case.rows(old)]
        found.append((case.batch.take(chosen), labels))
    return found


def split(case: Case) -> str | None:
    """Two halves one after the other are the whole, where data do not mix."""
    if "gated mean" in case.name:
        return None
    parts = halves(case)
    if (
        parts
        and (error := off(updated(case, "dense", parts), updated(case, "dense", [(case.batch, case.labels)]))) > EXACT
    ):
        return f"two halves are off by {error:.1e}"
    return None


def loss_of(case: Case, model: nn.Module) -> Tensor:
    out = model(*case.batch.args)
    if case.functional and case.kind != "empirical":
        return F.cross_entropy(out, case.labels, reduction=case.criterion.reduction)
    return case.criterion(out, case.labels)


def steps(case: Case, structure: str, count: int = 3) -> str | None:
    """Gradients are those of the model without a metric, bit for bit; parameters stay finite; a copy and a resumed run
    go on alike.
    """
    model, twin = case.model, copy.deepcopy(case.model)
    opt = ng.NaturalGradient(metric_of(case, structure, model), refresh=2)

    def step(model: nn.Module, opt: Any) -> None:
        opt.zero_grad()
        loss_of(case, model).backward()
        opt.step()

    for _ in range(count):
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        loss_of(case, twin).backward()
        opt.zero_grad()
        loss_of(case, model).backward()
        for (name, q), plain in zip(model.named_parameters(), twin.parameters()):
            same = q.grad is plain.grad is None or (
                q.grad is not None and plain.grad is not None and q.grad.equal(plain.grad)
            )
            if not same:
                return f"the gradient of {name} is another"
        opt.step()
        if not all(bool(torch.isfinite(q).all()) for q in model.parameters()):
            return "parameters are not finite"
    twin, other = copy.deepcopy((model, opt))
    resumed = copy.deepcopy(case.model)
    again = ng.NaturalGradient(metric_of(case, structure, resumed), refresh=2)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(2):
        step(model, opt)
        step(resumed, again)
        step(twin, other)
    for name, run in (("resumed run", resumed), ("copy", twin)):
        if not all(a.equal(b) for a, b in zip(model.parameters(), run.parameters())):
            return f"a {name} goes another way"
    return None


def try_program(seed: int) -> tuple[Case, str, str]:
    """The case, its structure, and "met", a reason of `REFUSALS`, or "wrong: …"."""
    case = draw_case(seed)
    structure = random.Random(seed).choice(["kfac", "ekfac", "diagonal", "block", "dense"])
    return case, structure, verdict(case, structure)


def verdict(case: Case, structure: str) -> str:
    tasks: list[Callable[[], str | None]] = [lambda: steps(case, structure)]
    if case.kind != "sampled":
        tasks = [lambda: matrices(case), lambda: split(case), *tasks]
    try:
        for task in tasks:
            if (said := task()) is not None:
                return f"wrong: {said}"
    except (CaptureError, ValueError) as error:
        reason = next((name for name, said in REFUSALS.items() if re.search(said, str(error))), None)
        return reason or f"wrong: a refusal that is not listed: {error}"
    except Exception as error:  # a crash is what is looked for
        return f"wrong: {type(error).__name__}: {error}"
    return "met"
