"""A physics-informed network in PyTorch Lightning, with an unknown coefficient: k of −k u″ = f from measured u.

The metric makes its own gradient, so `training_step` returns `metric.training_loss(batch)` and no loss of its own.
With ``--manual`` the step is written out, as Lightning's manual optimization wants it.

python examples/lightning_pinn.py --out runs/lightning-pinn
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import natgrad as ng
from natgrad.operators import laplacian


class Rod(lightning.LightningModule):
    """u on [0, 1] and the coefficient k, which is 2."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        self.k = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        terms = {"equation": lambda u, x, f: self.k * laplacian(u, x) + f, "measured": lambda u, x, y: u(x) - y}
        self.metric = ng.GaussNewton(self.net, terms, params={"k": self.k})
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        loss = self.metric.training_loss(batch)
        self.losses.append(float(loss.detach()))
        if not self.automatic_optimization:
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ng.NaturalGradient(self.metric)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning-pinn"))
    parser.add_argument("--manual", action="store_true")
    args = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    x = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None]
    u = torch.sin(math.pi * x[:, 0])
    batch = {"equation": (x, 2 * math.pi**2 * u), "measured": (x[::4], u[::4, None])}
    loader = DataLoader([batch], batch_size=None)  # all points in every step

    module = Rod(args.manual)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=30, default_root_dir=args.out, **quiet)
    trainer.fit(module, loader)
    trainer.save_checkpoint(args.out / "half.ckpt")  # k is a parameter of the module, so it is part of it

    resumed = Rod(args.manual)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=60, default_root_dir=args.out, **quiet)
    trainer.fit(resumed, loader, ckpt_path=args.out / "half.ckpt", weights_only=True)
    print(json.dumps({"k": float(resumed.k.detach()), "loss": [module.losses[0], resumed.losses[-1]]}))


if __name__ == "__main__":
    main()
