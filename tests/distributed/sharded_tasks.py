"""What the ranks of a sharded model do in the tests, and the same on one process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import natgrad as ng
from tests.distributed.tasks import BATCH, MODELS, Result, criterion_of, data, labels, shard


class Attention(nn.Module):
    """Slices of one parameter in several blocks, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(7, 4), nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.table((x.abs() * 3).long().clamp(max=6))).mean(1))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), *[m for _ in range(8) for m in (nn.Tanh(), nn.Linear(32, 32))])


class Recomputed(nn.Module):
    """Activation checkpointing around sharded layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda t: self.second(self.first(t).tanh()).tanh(), x, use_reentrant=False)
        return self.head(h)


def mixing() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


SHARDED_MODELS = {**MODELS, "mixing": mixing, "recomputed": Recomputed, "attention": Attention, "wide": wide}


def sharded(
    net: nn.Module, size: int, each: bool, hybrid: bool, half: bool, reshard: bool | None, columns: bool
) -> nn.Module:
    shape, names = ((2, size // 2), ("copies", "shards")) if hybrid else ((size,), ("shards",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    if half:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if columns:
        options["shard_placement_fn"] = lambda p: Shard(p.dim() - 1 if p.shape[-1] % size == 0 else 0)
    if each:
        for layer in layers_of(net):
            fully_shard(layer, **options)
    return fully_shard(net, **options)


def layers_of(net: nn.Module) -> list[nn.Module]:
    """The layers to shard one by one: a transformer layer is one."""
    out: list[nn.Module] = []
    for layer in net.children():
        out += [layer] if isinstance(layer, (nn.Linear, nn.Conv2d, nn.TransformerEncoderLayer)) else layers_of(layer)
    return out


def train_sharded(
    rank: int,
    size: int,
    model: str = "mlp",
    criterion: str = "cross-entropy",
    each: bool = True,
    hybrid: bool = False,
    half: bool = False,
    reshard: bool | None = None,
    columns: bool = False,
    functional: bool = False,
    clip: float | None = None,
    frozen: Sequence[str] = (),
    micro: int = 1,
    bad: tuple[int, ...] = (),
    sizes: Sequence[int] | None = None,
    steps: int = 20,
    dtype: torch.dtype = torch.float64,
    options: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
    start: int = 0,
    look: bool = True,
) -> Result:
    """Train; with `size` 1 on one process with the whole batch. `bad`: steps at which the last rank's data are NaN."""
    torch.manual_seed(0)
    net: Any = SHARDED_MODELS[model]().to(dtype)
    loss_of = criterion_of(criterion).to(dtype)
    if state is not None:
        net.load_state_dict(state["net"])
    for n, p in net.named_parameters():
        p.requires_grad_(n not in frozen)
    if size > 1:
        sharded(net, size, each, hybrid, half, reshard, columns)
    metric = ng.Fisher(net, loss_of, **{"kind": "exact", **(options or {})})
    opt = ng.NaturalGradient(metric, **{"refresh": 4, **(optimizer or {})})
    if state is not None:
        opt.load_state_dict(state["opt"])
    sizes = sizes or [BATCH // size] * size
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(start, start + steps):
            x, y = data(step)
            x, y = x.to(dtype), labels(loss_of, y)
            mine = shard(BATCH, sizes, rank) if size > 1 else slice(None)
            x, y = x[mine], y[mine]
            if step in bad and rank == size - 1:
                x = x * float("nan")
            opt.zero_grad()
            parts = list(zip(x.chunk(micro), y.chunk(micro)))
            for i, (a, b) in enumerate(parts):
                if size > 1:
                    net.set_requires_gradient_sync(i == len(parts) - 1)
                out = net(a)
                out = out.to(dtype) if half else out
                loss = (nn.functional.cross_entropy(out, b) if functional else loss_of(out, b)) / micro
                loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            opt.step()
            losses.append(float(loss.detach()))
    saved = opt.state_dict()
    with metric.whole():
        dense = metric.dense().numpy() if look else None
    whole = {n: (p.full_tensor() if size > 1 else p).detach().clone() for n, p in net.named_parameters()}
    return {
        "parameters": {n: p.numpy() for n, p in whole.items()},
        "metric": dense,
        "seen": metric.seen,
        "info": {k: v for k, v in opt.info.items() if k != "share_of_time"},
        "losses": losses,
        "state": {"net": whole, "opt": saved},
        "bytes": held_bytes(opt),
        "messages": {} if metric.strategy.size == 1 else dict(metric.strategy.ranks.messages),
    }


def held_bytes(opt: Any) -> tuple[int, dict[str, int]]:
    """Bytes of the tensors that this rank keeps of the curvature, and of each block that it keeps something of."""
    found = {}
    for block in opt.metric.blocks:
        tensors = [s for a in block.statistics.values() for s in a.sums.values()]
        state = opt.rule._blocks.get(str(block.layers[0].key))
        if state is not None:
            tensors += [state.velocity]
            tensors += [t for t in vars(block.last_inverse).values() if isinstance(t, Tensor)]
        if tensors:
            found[str(block.layers[0].key)] = sum(t.numel() * t.element_size() for t in tensors)
    return sum(found.values()), found
