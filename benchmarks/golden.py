"""Whether a change left every step as it was, bit for bit: ``python benchmarks/golden.py REVISION``.

Six small nets are trained for 30 steps with each of three structures, and three of them on two processes, by
DistributedDataParallel and by ``fully_shard``. That is done at the revision (in a worktree of git, thrown away after)
and here, on the same machine, and the weights are compared. Only public names are used, so that it holds across moves.
The exit code is 1 where weights differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
STEPS, STRUCTURES, PROCESSES, PORT = 30, ("kfac", "ekfac", "dense"), 2, 29517
Batch = tuple[Tensor, Tensor]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.mix, self.out = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return self.out((h + self.mix(h, h, h, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(x).mean(1))))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 9), nn.LayerNorm(9), nn.Linear(9, 1)
        self.scale = nn.Parameter(torch.ones(9))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))) * self.scale)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )


def classes(*shape: int) -> Callable[[torch.Generator], Batch]:
    return lambda g: (torch.randn(16, *shape, generator=g), torch.randint(3, (16,), generator=g))


def letters(g: torch.Generator) -> Batch:
    return torch.randint(11, (16, 5), generator=g), torch.randint(11, (16,), generator=g)


def curve(g: torch.Generator) -> Batch:
    x = torch.randn(16, 4, generator=g)
    return x, x.prod(1, keepdim=True)


NETS: dict[str, tuple[Callable[[], nn.Module], nn.Module, Callable[[torch.Generator], Batch]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)), nn.CrossEntropyLoss(), classes(4)),
    "convnet": (convnet, nn.CrossEntropyLoss(), classes(1, 8, 8)),
    "attention": (Attention, nn.CrossEntropyLoss(), classes(5, 4)),
    "lstm": (Recurrent, nn.CrossEntropyLoss(), classes(5, 4)),
    "tied": (Tied, nn.CrossEntropyLoss(), letters),
    "scaled": (Scaled, nn.MSELoss(), curve),
}
ON_RANKS = ("mlp", "convnet", "scaled")


def trained(name: str, structure: str, how: str = "", rank: int = 0) -> dict[str, Tensor]:
    """The weights after `STEPS`; `how`: "ddp" or "fsdp" on several processes."""
    import natgrad as ng

    build, criterion, draw = NETS[name]
    torch.manual_seed(0)
    model = build()
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, structure=structure))
    generator = torch.Generator().manual_seed(1 + rank)
    for _ in range(STEPS):
        x, y = draw(generator)
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
    return {n: (p.full_tensor() if how == "fsdp" else p).detach().clone() for n, p in model.named_parameters()}


def on_rank(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(PORT))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    found = {f"{n}, {how}": trained(n, "kfac", how, rank) for n in ON_RANKS for how in ("ddp", "fsdp")}
    if rank == 0:
        torch.save(found, Path(folder) / "ranks.pt")
    dist.destroy_process_group()


def write(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save({f"{n}, {s}": trained(n, s) for n in NETS for s in STRUCTURES}, folder / "one.pt")
    torch.multiprocessing.spawn(on_rank, (str(folder),), PROCESSES)


def weights_of(root: Path) -> dict[str, dict[str, Tensor]]:
    """Train with the natgrad that lies in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--write", folder]
        subprocess.run(command, cwd=root, env=environment, check=True)
        found: dict[str, dict[str, Tensor]] = {}
        for part in ("one.pt", "ranks.pt"):
            found.update(torch.load(Path(folder) / part, weights_only=True))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="HEAD")
    parser.add_argument("--write", type=Path, help="train, and write the weights into this folder")
    args = parser.parse_args()
    if args.write is not None:
        write(args.write)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "natgrad"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", there, args.revision], cwd=ROOT, check=True)
        try:
            before = weights_of(there)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", there], cwd=ROOT, check=True)
    now = weights_of(ROOT)
    different = 0
    for run, weights in before.items():
        apart = max(float((now[run][n] - w).abs().max()) for n, w in weights.items())
        same = all(torch.equal(now[run][n], w) for n, w in weights.items())
        different += not same
        print(f"{run:20s} {'the same' if same else f'differ by up to {apart:.1e}'}")
    print(f"{len(before) - different} of {len(before)} runs are the same, bit for bit, as at {args.revision}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
