"""Natural gradient in a loop of Accelerate: ``prepare`` takes it as any other optimizer.

python examples/accelerate_loop.py --out runs/accelerate
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad as ng


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    out = parser.parse_args().out
    set_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    criterion = nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 40)
    model, opt, loader, scheduler = accelerator.prepare(model, opt, DataLoader(data, 64, shuffle=True), scheduler)

    losses = []
    for epoch in range(4):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = criterion(model(x), y)
                accelerator.backward(loss)
                opt.step()
                scheduler.step()
                opt.zero_grad()
            losses.append(float(loss.detach()))
        if epoch == 1:
            accelerator.save_state(str(out / "half"))
    accelerator.load_state(str(out / "half"))  # back to the second epoch, metric and all
    print(json.dumps({"loss": [losses[0], losses[-1]]}))


if __name__ == "__main__":
    main()
