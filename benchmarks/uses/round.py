"""Weights of a small transformer at 3 bits: how far its predictions move.

    python -m benchmarks.uses.round                     # tiny Shakespeare, three seeds
    python -m benchmarks.uses.round --shared            # one block that is called twice
    python -m benchmarks.uses.round --part first --seeds 10 11 --dampings 1e-5 1e-4 1e-3 1e-2

Shown is KL(original ‖ rounded) in nats per character on held-out text. All matrices but the embeddings are rounded,
each row to 2³ levels between its least and largest entry. Rivals are rounding to nearest, and rounding along the inputs
alone (V, as GPTQ does), which is natgrad's with structure="input"; natgrad's feeds errors on along the outputs too. The
default damping was chosen by the third command, which trains and measures on the first half of the text; the others
take the second half.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from benchmarks.workloads import DATA
from natgrad.uses import rounding

WIDTH, HEADS, CONTEXT, LAYERS, BATCH, LEVELS = 64, 4, 64, 2, 32, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.before(x)).view(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # (n, heads, t, d)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, -1)
        x = x + self.out(h)
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, shared: bool) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(1 if shared else LAYERS)])
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.letters(x) + self.places(torch.arange(x.shape[1]))
        for i in range(LAYERS):
            h = self.blocks[i % len(self.blocks)](h)
        return self.head(self.last(h)).transpose(1, 2)  # (data, classes, positions)


def text(part: str) -> tuple[Tensor, Tensor, int]:
    """Characters to train on and held out, and how many there are."""
    path = DATA / "tinyshakespeare.txt"
    if not path.is_file():
        raise SystemExit(f"{path} is not there: name the folder that holds it with NATGRAD_DATA")
    raw = path.read_text(encoding="utf-8")
    letters = {c: i for i, c in enumerate(sorted(set(raw)))}
    coded = torch.tensor([letters[c] for c in raw])
    coded = coded.chunk(2)[0 if part == "first" else 1]
    cut = int(0.9 * len(coded))
    return coded[:cut], coded[cut:], len(letters)


def batch(coded: Tensor, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    start = torch.randint(len(coded) - CONTEXT - 1, (count, 1), generator=g)
    rows = coded[start + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def grids(model: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Least entry and spacing of each row."""
    found = {}
    for n, p in model.named_parameters():
        if n in names:
            low, high = p.detach().amin(1, keepdim=True), p.detach().amax(1, keepdim=True)
            found[n] = low, (high - low) / (LEVELS - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--part", default="second", choices=["first", "second"])
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--dampings", nargs="+", type=float, help="over the mean eigenvalue of a block")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, held, vocabulary = text(args.part)
    found: dict[str, list[float]] = {}
    for seed in args.seeds:
        torch.manual_seed(seed)
        g = torch.Generator().manual_seed(seed)
        model = Transformer(vocabulary, args.shared)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
        for _ in range(args.steps):
            x, y = batch(train, BATCH, g)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        model.eval()
        x, y = batch(held, 256, g)
        with torch.no_grad():
            original = model(x).log_softmax(1)
        print(f"seed {seed}: {float(F.nll_loss(original, y)):.3f} nats per character, whole", flush=True)
        names = [n for n, p in model.named_parameters() if p.dim() == 2 and "letters" not in n and "places" not in n]
        lattice = grids(model, names)

        def quantiser(name: str, w: Tensor, lattice=lattice) -> Tensor:
            low, step = lattice[name]
            return low + ((w - low) / step).round().clamp(0, LEVELS - 1) * step

        @torch.no_grad()
        def moved(theta: dict[str, Tensor], model=model, x=x, original=original) -> float:
            twin = copy.deepcopy(model)
            twin.load_state_dict(theta, strict=False)
            return float((original.exp() * (original - twin(x).log_softmax(1))).sum(1).mean())

        rows = {"to nearest": moved({n: quantiser(n, dict(model.named_parameters())[n].detach()) for n in names})}
        data = [batch(train, BATCH, g) for _ in range(32)]
        for structure, said in (("input", "along the inputs"), ("kfac", "natgrad.round_weights")):
            metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="sampled", structure=structure)
            metric.fit(data, progress=False)
            for relative in args.dampings or [None]:
                start = time.process_time()
                if relative is None:
                    theta = ng.round_weights(metric, quantiser, names)
                else:
                    rounding.DAMPING = relative
                    theta = ng.round_weights(metric, quantiser, names)
                seconds = time.process_time() - start
                rows[said + ("" if relative is None else f" at {relative:g}")] = moved(theta)
            print(f"  {said}: {seconds:.1f} s", flush=True)
        for name, value in rows.items():
            found.setdefault(name, []).append(value)
    for name, each in found.items():
        shown = " ".join(f"{v:.4f}" for v in each)
        print(f"{name:32s} {sum(each) / len(each):.4f}   {shown}")
    if not args.dampings:
        ratios = [a / b for a, b in zip(found["natgrad.round_weights"], found["along the inputs"])]
        print("natgrad over the inputs alone: " + " ".join(f"{r:.2f}" for r in ratios))


if __name__ == "__main__":
    main()
