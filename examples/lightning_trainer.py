"""Natural gradient in PyTorch Lightning: `configure_optimizers` returns it, nothing else changes.

python examples/lightning_trainer.py --out runs/lightning
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad as ng


class Digits(lightning.LightningModule):
    """A classifier of 8 × 8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.criterion = nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = self.criterion(self.model(x), y)  # the criterion *module*: the metric sees what the loss sees
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ng.NaturalGradient(ng.Fisher(self.model, self.criterion))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    out = parser.parse_args().out
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    loader = DataLoader(data, batch_size=128, shuffle=True)

    module = Digits()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=2, default_root_dir=out, **quiet)
    trainer.fit(module, loader)
    trainer.save_checkpoint(out / "half.ckpt")  # the optimizer's state, metric included, is part of it

    resumed = Digits()
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=4, default_root_dir=out, **quiet)
    trainer.fit(resumed, loader, ckpt_path=out / "half.ckpt", weights_only=True)
    print(json.dumps({"loss": [module.losses[0], resumed.losses[-1]]}))


if __name__ == "__main__":
    main()
