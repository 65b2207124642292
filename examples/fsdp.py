"""Train a sharded classifier of digits on several processes: ``torchrun --nproc-per-node 2 examples/fsdp.py``.

The loop is that of one process. Every layer is sharded with ``fully_shard``, then the root; the metric is made last.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import natgrad as ng

EPOCHS = 4
BATCH = 128  # over all ranks


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train()
    # metric and optimizer hold each other, and the group: what still does when Python ends may abort the process
    gc.collect()
    dist.destroy_process_group()


def train() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    seen, test = TensorDataset(x[:1500], y[:1500]), (x[1500:], y[1500:])

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    criterion = nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion))

    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(seen)  # every rank has as many batches
    loader = DataLoader(seen, batch_size=BATCH // dist.get_world_size(), sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            opt.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            opt.step()
        with torch.no_grad():  # a forward pass gathers parameters, so all ranks make it
            right = (model(test[0]).argmax(1) == test[1]).float().mean()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {right:.1%}")
    state = opt.state_dict()  # of all ranks together, whole on each
    if dist.get_rank() == 0:
        print(f"sent: {opt.info['sent_bytes']} bytes in {opt.info['steps']} steps, {opt.info['refreshes']} refreshes")
        print(f"the state holds {len(state['natgrad']['rule_state']['blocks'])} blocks")


if __name__ == "__main__":
    main()
