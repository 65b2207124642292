"""Which ranks there are, from what wraps a model."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from natgrad.distributed.data_parallel import DataParallel
from natgrad.distributed.ddp import check_wrappers, wrapper_of
from natgrad.distributed.fsdp import mesh_ranks
from natgrad.distributed.fully_shard import FullySharded
from natgrad.distributed.ranks import Ranks
from natgrad.distributed.strategy import Strategy

EXCHANGES = ("auto", "inverses", "directions")


def strategy_of(model: nn.Module, process_group: Any, device: torch.device, exchange: str) -> Strategy:
    """Return how the ranks that `model` is trained on share a metric.

    They are those of its DistributedDataParallel wrapper, or of the mesh that it is sharded over.

    Raises:
        ValueError: an unknown `exchange`, or a wrapper that is not supported (the message says what to use instead).
        RuntimeError: several processes were started, or a group was given, but no process group is initialised.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"unknown exchange {exchange!r}; there are {', '.join(map(repr, EXCHANGES))}")
    check_wrappers(model)
    sharded = mesh_ranks(model)
    if not (dist.is_available() and dist.is_initialized()):
        if wrapper_of(model) is not None:
            raise RuntimeError(
                "the model is wrapped in DistributedDataParallel, but no process group is initialised any more. Make "
                "the metric before destroy_process_group(), or give Fisher the model inside the wrapper, model.module"
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        launched = dist.is_available() and dist.is_torchelastic_launched()
        if process_group is not None or (launched and started > 1):
            why = "a process_group was given" if process_group is not None else f"torchrun started {started} processes"
            raise RuntimeError(
                f"{why}, but no process group is initialised: each process would train a model of its own. Call "
                "torch.distributed.init_process_group() first and wrap the model in DistributedDataParallel"
            )
        return Strategy()
    if sharded is not None:
        if process_group is not None:
            raise ValueError("process_group= is for models that are not sharded; those have the ranks of their mesh")
        if exchange != "auto":
            raise ValueError(
                f"exchange={exchange!r} is for models that every rank holds whole; of a sharded model the owner of a "
                "block sends its direction, always. Leave exchange= out"
            )
        return FullySharded(Ranks(sharded, device))
    parent = process_group if process_group is not None else getattr(wrapper_of(model), "process_group", None)
    if parent is None:
        if dist.get_world_size() > 1:
            warnings.warn(
                f"there are {dist.get_world_size()} processes, but the model is not wrapped in "
                "DistributedDataParallel, so each has a metric of its own data alone. Give Fisher the wrapped model, "
                "or process_group= where gradients are averaged by hand",
                stacklevel=4,
            )
        return Strategy()
    return DataParallel(Ranks(parent, device), exchange) if dist.get_world_size(parent) > 1 else Strategy()
