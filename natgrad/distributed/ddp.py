"""What wraps a model: wrappers that are refused, and DistributedDataParallel, whose ways are respected."""

from __future__ import annotations

import copy
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
SWITCH = "wrap it as torch.nn.parallel.DistributedDataParallel(model) instead"


def wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel wrapper around a model, or inside what wraps it further."""
    return next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)


def check_structures(structures: Mapping[str, str]) -> None:
    """Raise a ValueError for a structure that several ranks cannot share, given {name: structure}."""
    for name, structure in structures.items():
        if structure == "ekfac":
            raise ValueError(
                f"the structure of {name!r} is 'ekfac', which is not supported on several ranks: they would need one "
                "eigenbasis before the first look at their data. Use structure='kfac'"
            )


def check_rule(rule: Any, sharded: bool) -> None:
    """Raise a ValueError for a step rule whose steps would differ between ranks."""
    if not rule.on_ranks:
        raise ValueError(
            f"{type(rule).__name__} measures the loss on the data of one rank, so that ranks would take different "
            "steps; it is not supported on several ranks. Leave step= out, for the metric's own rule"
        )
    if sharded and not rule.on_shards:
        raise ValueError(
            f"{type(rule).__name__} works on whole parameters, and the model is sharded by fully_shard; leave "
            "step= out, for the metric's own rule, or wrap the model in DistributedDataParallel"
        )


def warn_alone(metric: str) -> None:
    """Warn where there are several processes and the metric makes its own gradient, which ranks do not share."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"there are {dist.get_world_size()} processes, and {metric} makes its own gradient, which they do not "
            "share: give every rank the same batches, or their parameters drift apart",
            stacklevel=4,
        )


def check_join(model: nn.Module) -> None:
    """Raise a RuntimeError inside DistributedDataParallel's ``join``, where some ranks have stopped stepping."""
    wrapper = wrapper_of(model)
    if wrapper is not None and wrapper._join_config.enable:
        raise RuntimeError(
            "training inside DistributedDataParallel's join() is not supported: a rank without data would not meet "
            "the others at a refresh. Give every rank the same number of batches, as DistributedSampler does"
        )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A metric's own backward pass leaves the first one of DistributedDataParallel(static_graph=True) to the loss.

    The wrapper reduces gradients at the end of the first backward pass that goes through its output, whose it may be
    (`_DDPSink` in torch/nn/parallel/distributed.py); the gradients of the loss would then be left as they are.
    """
    wrapper = wrapper_of(model)
    if wrapper is None or not wrapper.static_graph:
        yield
        return
    before = wrapper._static_graph_delay_allreduce_enqueued
    wrapper._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        wrapper._static_graph_delay_allreduce_enqueued = before


@contextmanager
def kept_attributes(module: nn.Module) -> Iterator[None]:
    """What modules note of a forward pass (a hidden state, a loss of their own) is as before afterwards: attributes,
    and what is in those that are tensors, lists, dictionaries, sets or deques.
    """
    attributes = [(m, dict(vars(m))) for m in module.modules()]
    own = [v for _, held in attributes for k, v in held.items() if k not in OF_EVERY_MODULE]
    containers = [(v, copy.copy(v)) for v in own if type(v) in (list, dict, set, deque)]
    tensors = [(v, v._version, v.clone()) for v in own if isinstance(v, Tensor) and not v.requires_grad]
    try:
        yield
    finally:
        for m, held in attributes:
            for k in vars(m).keys() - held.keys():
                del vars(m)[k]
            vars(m).update(held)
        for now, before in containers:
            now.clear()
            now.extend(before) if isinstance(now, (list, deque)) else now.update(before)
        for t, version, value in tensors:
            if t._version != version:
                t.copy_(value)


def check_wrappers(model: nn.Module) -> None:
    """Raise a ValueError for what shares a model out in a way that is not followed."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what was never imported wraps nothing, and is slow to import
    for path, module in model.named_modules():
        where = f"module {path!r}" if path else "the model"
        if isinstance(module, nn.DataParallel):
            raise ValueError(f"{where} is wrapped in DataParallel, whose threads the metric cannot follow; {SWITCH}")
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"{where} is wrapped in FullyShardedDataParallel (FSDP1), which is not supported; shard it with "
                "fully_shard (FSDP2), or " + SWITCH
            )
