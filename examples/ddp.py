"""Train a classifier of digits on several processes: ``torchrun --nproc-per-node 2 examples/ddp.py``.

The loop is that of one process; the wrapper and the sampler are DistributedDataParallel's own. With
``--checkpoint DIR`` it saves every few steps and goes on from the last checkpoint there, so that under
``torchrun --max-restarts`` a rank that dies costs a few steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import natgrad as ng
from natgrad import checkpoint

EPOCHS = 4
BATCH = 128  # over all ranks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, help="folder of checkpoints, to continue from and to save to")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    args = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = TensorDataset(x[:1500], y[:1500]), (x[1500:], y[1500:])

    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    criterion = nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion))

    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(train)  # every rank has as many batches
    loader = DataLoader(train, batch_size=BATCH // dist.get_world_size(), sampler=sampler)

    step = 0
    if args.checkpoint is not None and (newest := checkpoint.latest(args.checkpoint)) is not None:
        step = checkpoint.load({"model": model, "opt": opt}, newest)["step"]
        if dist.get_rank() == 0:
            print(f"going on from {newest}")
    for epoch in range(step // len(loader), EPOCHS):
        sampler.set_epoch(epoch)
        done = step % len(loader)  # batches of this epoch that the checkpoint has seen
        for number, (inputs, targets) in enumerate(loader):
            if number < done:
                continue
            opt.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            opt.step()
            step += 1
            if args.checkpoint is not None and step % args.every == 0:
                checkpoint.save({"model": model, "opt": opt, "step": step}, args.checkpoint / f"step-{step}")
        if dist.get_rank() == 0:
            with torch.no_grad():
                right = (model.module(test[0]).argmax(1) == test[1]).float().mean()
            print(f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {right:.1%}")
    if dist.get_rank() == 0:
        print(f"sent: {opt.info['sent_bytes']} bytes in {opt.info['steps']} steps, {opt.info['refreshes']} refreshes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
