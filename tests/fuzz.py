"""Random models: each meets the dense oracle or raises a refusal from a fixed list.

    python -m tests.fuzz --examples 2000

A model is a chain of ops on a vector (N, d), a sequence (N, T, d) or an image (N, C, H, W), with layers used again,
tied and transposed weights and parametrizations, under a criterion, a reduction and a kind. As many models again come
from `tests.programs`, which also take steps, are copied and resumed.
"""

from __future__ import annotations

import argparse
import collections
import copy
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import natgrad as ng
from natgrad.capture.tape import CaptureError
from tests.layer_oracle import empirical, gauss_newton, relative
from tests.programs import REFUSALS as PROGRAM_REFUSALS
from tests.programs import try_program

EXACT = 1e-8

# the only reasons for which a model may be refused
REFUSALS = {
    "used by covered and uncovered ops": r"in a way that no op rule covers",
    "two matrix forms": r"two matrix forms that share no block",
    "overlapping slices": r"share no block",
}


class Step(nn.Module):
    """One op of a chain; `run` is a function of (module, x, the chain so far)."""

    def __init__(self, name: str, run: Callable[[Any, Tensor, list[Step]], Tensor], **parts: Any) -> None:
        super().__init__()
        self.name, self.run = name, run
        for key, part in parts.items():
            setattr(self, key, part)

    def forward(self, x: Tensor, before: list[Step]) -> Tensor:
        return self.run(self, x, before)


class Chain(nn.Module):
    def __init__(self, steps: list[Step], out: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.head = nn.LazyLinear(out)

    def forward(self, x: Tensor) -> Tensor:
        for i, step in enumerate(self.steps):
            x = step(x, list(self.steps[:i]))
        return self.head(x.flatten(1))


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def module(name: str, layer: nn.Module) -> Step:
    return Step(name, lambda m, x, _: m.layer(x), layer=layer)


def last_linear(before: list[Step], width: int) -> Step | None:
    """The last plain linear step with inputs of this width."""
    fits = [s for s in before if s.name == "linear" and s.layer.in_features == width]
    return fits[-1] if fits else None


def again(m: Any, x: Tensor, before: list[Step]) -> Tensor:
    step = last_linear(before, x.shape[-1])
    return x if step is None else step.layer(x.tanh())


def transposed(m: Any, x: Tensor, before: list[Step]) -> Tensor:
    fits = [s for s in before if s.name == "linear" and s.layer.out_features == x.shape[-1]]
    return F.linear(x, fits[-1].layer.weight.T) if fits else x


def penalised(m: Any, x: Tensor, before: list[Step]) -> Tensor:
    return F.linear(x, m.w) * m.w.norm()


def summed(m: Any, x: Tensor, before: list[Step]) -> Tensor:
    return F.linear(x, m.w) + m.w.sum()


def two_forms(m: Any, x: Tensor, before: list[Step]) -> Tensor:
    return F.linear(x, m.w) * (x.flatten(1)[:, :3] @ m.w[:, :1]).reshape(len(x), *[1] * (x.dim() - 1))


def experts(m: Any, x: Tensor, before: list[Step]) -> Tensor:
    """Each row through one of three matrices, of which some may get no row."""
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_zeros(len(rows), 3)
    for e in range(3):
        mine = torch.arange(e, len(rows), 3)
        out = out.index_add(0, mine, rows[mine] @ m.w[e] + m.b[e])
    return out.reshape(*x.shape[:-1], 3)


def picked(m: Any, x: Tensor, before: list[Step]) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    ids = torch.arange(len(rows)) % 3
    return (torch.bmm(rows[:, None], m.w[ids])[:, 0] + m.b[ids]).reshape(*x.shape[:-1], 3)


Build = Callable[[int], Step]

ANY: dict[str, Build] = {  # on the last dimension
    "linear": lambda d: module("linear", nn.Linear(d, 3)),
    "linear wide": lambda d: module("linear", nn.Linear(d, 4, bias=False)),
    "tanh": lambda d: module("tanh", nn.Tanh()),
    "relu in place": lambda d: Step("relu", lambda m, x, _: F.relu(x * 1.0, inplace=True)),
    "layer norm": lambda d: module("layer norm", nn.LayerNorm(d)),
    "rms norm": lambda d: module("rms norm", nn.RMSNorm(d)),
    "scale": lambda d: Step("scale", lambda m, x, _: x * m.s, s=p(d)),
    "offset": lambda d: Step("offset", lambda m, x, _: x + m.s, s=p(d)),
    "scalar": lambda d: Step("scalar", lambda m, x, _: m.s * x, s=p()),
    "matmul": lambda d: Step("matmul", lambda m, x, _: x @ m.w, w=p(d, 3)),
    "einsum": lambda d: Step("einsum", lambda m, x, _: torch.einsum("...i,oi->...o", x, m.w), w=p(3, d)),
    "functional rows": lambda d: Step("rows", lambda m, x, _: F.linear(x, m.w[:3]) * F.linear(x, m.w[3:]), w=p(6, d)),
    "bilinear": lambda d: module2("bilinear", nn.Bilinear(d, d, 3)),
    "prelu": lambda d: module("prelu", nn.PReLU()),
    "again": lambda d: Step("again", again),
    "transposed": lambda d: Step("transposed", transposed),
    "penalised": lambda d: Step("penalised", penalised, w=p(3, d)),
    "summed": lambda d: Step("summed", summed, w=p(3, d)),
    "two forms": lambda d: Step("two forms", two_forms, w=p(3, d)),
    "experts": lambda d: Step("experts", experts, w=p(3, d, 3), b=p(3, 3)),
    "picked": lambda d: Step("picked", picked, w=p(3, d, 3), b=p(3, 3)),
    "weight norm": lambda d: module("weight norm", parametrizations.weight_norm(nn.Linear(d, 3))),
    "merged lora": lambda d: Step(
        "lora", lambda m, x, _: F.linear(x, m.w + m.a @ m.b), w=p(3, d), a=p(3, 1), b=p(1, d)
    ),
    "lora": lambda d: Step("lora", lambda m, x, _: F.linear(x, m.w) + x @ m.a @ m.b, w=p(3, d), a=p(d, 1), b=p(1, 3)),
    "residual": lambda d: Step(
        "residual", lambda m, x, _: x + m.b(m.a(x).tanh()), a=nn.Linear(d, 2), b=nn.Linear(2, d)
    ),
}


def module2(name: str, layer: nn.Module) -> Step:
    return Step(name, lambda m, x, _: m.layer(x, x.sin()), layer=layer)


def channels_first(layer: nn.Module) -> Step:
    return Step("conv1d", lambda m, x, _: m.layer(x.transpose(1, 2)).transpose(1, 2), layer=layer)


def attention(d: int) -> Step:
    return Step("attention", lambda m, x, _: m.a(x, x, x)[0], a=nn.MultiheadAttention(d, 1, batch_first=True))


def recurrent(kind: type[nn.Module], **options: Any) -> Build:
    return lambda d: Step("recurrent", lambda m, x, _: m.r(x)[0], r=kind(d, 2, batch_first=True, **options))


SEQUENCE: dict[str, Build] = {
    "attention": attention,
    "encoder": lambda d: module("encoder", nn.TransformerEncoderLayer(d, 1, 3, dropout=0.0, batch_first=True)),
    "lstm": recurrent(nn.LSTM),
    "gru both ways": recurrent(nn.GRU, bidirectional=True),
    "conv1d": lambda d: channels_first(nn.Conv1d(d, 3, 3, padding=1)),
    "depthwise": lambda d: channels_first(nn.Conv1d(d, d, 3, padding=2, dilation=2, groups=d)),
    "transposed conv": lambda d: channels_first(nn.ConvTranspose1d(d, 2, 2, stride=2)),
    "token": lambda d: Step("token", lambda m, x, _: torch.cat([m.s.expand(len(x), -1, -1), x], 1), s=p(1, 1, d)),
    "positions": lambda d: Step("positions", lambda m, x, _: x + m.s[:, : x.shape[1]], s=p(1, 24, d)),
    "mix positions": lambda d: Step("mix", lambda m, x, _: m.w @ x[:, :2], w=p(2, 2)),
}

IMAGE: dict[str, Build] = {  # on the channels
    "conv": lambda c: module("conv", nn.Conv2d(c, 3, 2)),
    "conv padded": lambda c: module("conv", nn.Conv2d(c, 2, 3, padding=1, stride=2, bias=False)),
    "conv 1x1": lambda c: module("conv", nn.Conv2d(c, 3, 1)),
    "conv grouped": lambda c: module("conv", nn.Conv2d(c, 2 * c, 2, groups=c, padding="same")),
    "conv transposed": lambda c: module("conv", nn.ConvTranspose2d(c, 2, 2, stride=1, padding=1, dilation=2)),
    "group norm": lambda c: module("norm", nn.GroupNorm(1, c)),
    "instance norm": lambda c: module("norm", nn.InstanceNorm2d(c, affine=True)),
    "batch norm": lambda c: module("norm", nn.BatchNorm2d(c)),
    "scale": lambda c: Step("scale", lambda m, x, _: x * m.s, s=p(c, 1, 1)),
    "tanh": lambda c: module("tanh", nn.Tanh()),
    "prelu": lambda c: module("prelu", nn.PReLU(c)),
    "residual": lambda c: Step("residual", lambda m, x, _: x + m.a(x).tanh(), a=nn.Conv2d(c, c, 3, padding=1)),
}

INPUTS: dict[str, tuple[tuple[int, ...], dict[str, Build]]] = {
    "vector": ((3,), ANY),
    "sequence": ((3, 2), {**ANY, **SEQUENCE}),
    "tokens": ((3, 2), {**ANY, **SEQUENCE}),
    "image": ((2, 4, 4), IMAGE),
}

CRITERIA: dict[str, Callable[[str, Tensor], tuple[nn.Module, Tensor]]] = {
    "cross-entropy": lambda r, z: (nn.CrossEntropyLoss(reduction=r), torch.randint(0, z.shape[1], z.shape[:1])),
    "smoothed": lambda r, z: (
        nn.CrossEntropyLoss(torch.rand(z.shape[1]).double() + 0.5, reduction=r, label_smoothing=0.2),
        torch.randint(0, z.shape[1], z.shape[:1]),
    ),
    "squared": lambda r, z: (nn.MSELoss(reduction=r), torch.randn_like(z)),
    "bce": lambda r, z: (nn.BCEWithLogitsLoss(reduction=r), torch.rand_like(z).round()),
    "poisson": lambda r, z: (nn.PoissonNLLLoss(reduction=r), torch.ones_like(z)),
}


@dataclass(frozen=True)
class Spec:
    """What hypothesis draws and shrinks."""

    seed: int
    data: int
    shape: str
    ops: tuple[str, ...]
    criterion: str
    reduction: str
    kind: str
    sharing: str


@st.composite
def specs(draw: Any) -> Spec:
    shape = draw(st.sampled_from(sorted(INPUTS)))
    ops = draw(st.lists(st.sampled_from(sorted(INPUTS[shape][1])), min_size=1, max_size=4))
    return Spec(
        draw(st.integers(0, 999)),
        draw(st.integers(1, 3)),
        shape,
        tuple(ops),
        draw(st.sampled_from(sorted(CRITERIA))),
        draw(st.sampled_from(["mean", "sum"])),
        draw(st.sampled_from(["exact", "empirical"])),
        draw(st.sampled_from(["expand", "reduce"])),
    )


def build(spec: Spec) -> tuple[nn.Module, Tensor]:
    """The model in float64, and its input."""
    torch.manual_seed(spec.seed)
    shape, table = INPUTS[spec.shape]
    x = torch.randn(spec.data, *shape, dtype=torch.float64)
    steps: list[Step] = []
    if spec.shape == "tokens":
        x = torch.randint(0, 4, (spec.data, shape[0]))
        steps.append(module("embedding", nn.Embedding(4, shape[1], padding_idx=0)).double())
    channel = 1 if spec.shape == "image" else -1
    for op in spec.ops:
        h = x
        for i, step in enumerate(steps):
            h = step.eval()(h, steps[:i])
        step = table[op](h.shape[channel]).double().eval()
        try:
            step.train()(h, steps)
        except (RuntimeError, ValueError):  # torch cannot run it here: a kernel larger than what is left of an image
            continue
        steps.append(step)
    model = Chain(steps, 2).double().eval()
    model(x)  # gives the head its width
    return model.train(), x


def try_one(spec: Spec) -> str:
    """ "met", a reason of `REFUSALS`, or "wrong: …"."""
    model, x = build(spec)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    loss, y = CRITERIA[spec.criterion](spec.reduction, model(x).detach())
    exact = spec.kind == "exact"
    expected = gauss_newton(model, loss, x, y) if exact else empirical(model, loss, x, y, spec.data)
    found = {}
    try:
        for structure in ("dense", "ekfac", "kfac"):
            metric = ng.Fisher(model, loss, kind=spec.kind, structure=structure, sharing=spec.sharing)
            metric.update(x, y)
            found[structure] = metric
    except CaptureError as error:
        reason = next((name for name, said in REFUSALS.items() if re.search(said, str(error))), None)
        return reason or f"wrong: a refusal that is not listed: {error}"
    if float(expected.norm()) < 1e-12:
        return "met" if float(found["dense"].dense().norm()) < 1e-10 else "wrong: not zero"
    error = relative(found["dense"].dense(), expected)
    if not error < EXACT:
        return f"wrong: dense is off by {error:.1e}"
    trace = float(found["ekfac"].trace() / expected.trace() - 1)
    if not abs(trace) < EXACT:
        return f"wrong: the trace of ekfac is off by {trace:.1e}"
    if not bool(torch.isfinite(found["kfac"].dense()).all()):
        return "wrong: kfac is not finite"
    return try_steps(model, loss, x, y, spec, expected)


def try_steps(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, spec: Spec, expected: Tensor) -> str:
    """ "met" where the first step of a fixed length is that of the oracle, and the default rule steps too."""
    damping, structure = 1e-2, ("kfac", "ekfac", "block", "diagonal", "dense")[spec.seed % 5]
    twin = copy.deepcopy(model)
    # as long as the weights are, to be read off them: where the gradient is rounding, the step is lost beside them
    loss(twin(x), y).backward()
    weights, grads = zip(*((p.detach(), p.grad) for p in twin.parameters()))
    sizes = [torch.cat([t.flatten() for t in ts if t is not None]).norm() for ts in (weights, grads)]
    lr = 2.0 ** min(36, max(0, round(float((damping * sizes[0] / sizes[1]).log2())))) if sizes[1] > 0 else 1.0
    twin.zero_grad()
    metric = ng.Fisher(twin, loss, kind=spec.kind, structure="dense")
    opt = ng.NaturalGradient(metric, step=ng.FixedStep(lr=lr, damping=damping))
    loss(twin(x), y).backward()
    parameters = dict(twin.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    df = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters.values()])
    opt.step()
    bare = metric.without_curvature()  # uses that no rule covers follow Adam
    keep = torch.cat([torch.full((p.numel(),), n not in bare and p.grad is not None) for n, p in parameters.items()])
    moved = torch.cat([(before[n] - p.detach()).flatten() / lr for n, p in parameters.items()])[keep]
    system = expected[keep][:, keep] + damping * torch.eye(int(keep.sum()), dtype=expected.dtype)
    step = torch.linalg.solve(system, df[keep])
    if len(moved) and not relative(moved, step) < EXACT:
        return f"wrong: the step is off by {relative(moved, step):.1e}"
    twin = copy.deepcopy(model)
    opt = ng.NaturalGradient(ng.Fisher(twin, loss, kind=spec.kind, structure=structure, sharing=spec.sharing))
    for _ in range(2):
        opt.zero_grad()
        loss(twin(x), y).backward()
        opt.step()
    fine = all(bool(torch.isfinite(p).all()) for p in twin.parameters())
    return "met" if fine else f"wrong: training by {structure} is not finite"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[tuple[Spec, str]] = []

    @settings(
        max_examples=options.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def run(spec: Spec) -> None:
        said = try_one(spec)
        counts[said.partition(":")[0]] += 1
        if said.startswith("wrong"):
            wrong.append((spec, said))

    start = time.perf_counter()
    run()
    total = sum(counts.values())
    print(f"{total} models in {time.perf_counter() - start:.0f} s")
    for name in ("met", *REFUSALS, "wrong"):
        print(f"{counts[name]:6d}  {counts[name] / total:6.1%}  {name}")
    for spec, said in wrong[:10]:
        print(said, spec)
    failed = programs(options.examples, options.seed)
    raise SystemExit(1 if failed or wrong or counts["met"] < 0.85 * total else 0)


def programs(examples: int, seed: int) -> bool:
    """Try random programs and print what came out, by kind and structure; whether that is too little."""
    start, wrong = time.perf_counter(), []
    counts: collections.Counter[str] = collections.Counter()
    by_case: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for i in range(examples):
        case, structure, said = try_program(examples * seed + i)
        said, _, what = said.partition(":")
        counts[said] += 1
        by_case[f"{case.kind} {structure}"][said] += 1
        if said == "wrong":
            wrong.append(f"{what} [{case.kind} {case.sharing} {structure}] {case.name}")
    print(f"{examples} programs in {time.perf_counter() - start:.0f} s")
    for name in ("met", *PROGRAM_REFUSALS, "wrong"):
        print(f"{counts[name]:6d}  {counts[name] / examples:6.1%}  {name}")
    shares = {name: found["met"] / found.total() for name, found in sorted(by_case.items())}
    print("met, by kind and structure: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    for said in wrong[:10]:
        print(said)
    return bool(wrong) or min(shares.values()) < 0.85


if __name__ == "__main__":
    main()
