"""What ``fully_shard`` (FSDP2) makes of a model.

During a forward pass it puts unsharded parameters, plain tensors, in the place of the DTensors. `LiveNames` knows them
by the object that fully_shard keeps for each parameter (`FSDPParam` in torch).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

REPLACE = "wrap the model in DistributedDataParallel, or shard it with fully_shard over data-parallel ranks alone"


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that fully_shard was called on, the root first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what was never imported shards nothing, and is slow to import
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def kept_parameters(model: nn.Module) -> Iterator[Any]:
    """What fully_shard keeps of each parameter."""
    seen: set[int] = set()
    for module in sharded_modules(model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            if id(group) not in seen:
                seen.add(id(group))
                yield from group.fsdp_params


def mesh_ranks(model: nn.Module) -> list[int] | None:
    """Global ranks that a model is sharded over; None where fully_shard has no part in it.

    Raises:
        ValueError: something in the model is shared out in a way that is not supported; the message says what to do.
    """
    modules = sharded_modules(model)
    for module in modules:
        module.reshard()  # after a forward pass without a backward one the root holds unsharded parameters
    mesh: Tensor | None = None
    named: Iterable[tuple[str, Any]] = model.named_parameters()
    for name, p in named:
        sharded = hasattr(p, "device_mesh")
        if sharded and not modules:
            raise ValueError(
                f"parameter {name!r} is a DTensor without fully_shard (tensor parallel), which is not supported; "
                + REPLACE
            )
        if modules and not sharded:
            raise ValueError(
                f"parameter {name!r} is not sharded, and others are, so nothing averages its gradient over the ranks; "
                "call fully_shard on the root module as well, without ignored_params"
            )
        mesh = p.device_mesh.mesh if sharded and mesh is None else mesh
    for kept in kept_parameters(model):
        if kept.is_dtensor:
            raise ValueError(
                f"parameter {kept._module_info.param_name!r} of a {type(kept._module_info.module).__name__} is tensor "
                f"parallel (a DTensor before fully_shard), which is not supported; {REPLACE}"
            )
        if kept.offload_to_cpu:
            raise ValueError("fully_shard(offload_policy=CPUOffloadPolicy()) is not supported; leave it out")
    return None if mesh is None else sorted(mesh.flatten().tolist())


@contextmanager
def kept_open(model: nn.Module) -> Iterator[None]:
    """A metric's own backward passes leave parameters unsharded that were so before: the loss's pass counts on it."""
    groups = [g for m in sharded_modules(model) for g in m._get_fsdp_state()._fsdp_param_groups if g.is_unsharded]
    before = [g.reshard_after_backward for g in groups]
    for g in groups:
        g.reshard_after_backward = False
    try:
        yield
    finally:
        for g, value in zip(groups, before):
            g.reshard_after_backward = value


class LiveNames(Mapping[int, str]):
    """{id of an unsharded parameter: name}: those that the forward pass works with.

    fully_shard makes them when a module runs for the first time and keeps them, so the list is complete from the second
    forward pass on, and looked through again until it is.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        names = {id(p): n for n, p in parameters.items()}
        self._waiting = [(k, n) for k in kept_parameters(model) if (n := names.get(id(k.sharded_param))) is not None]
        self._found: dict[int, str] = {}
        self._kept: list[Any] = []

    def _look(self) -> dict[int, str]:
        left = []
        for kept, name in self._waiting:
            live = getattr(kept, "_unsharded_param", None)
            if live is None:
                left.append((kept, name))
            else:
                self._found[id(live)] = name
                self._kept.append(kept)
        self._waiting = left
        return self._found

    def __getitem__(self, key: int) -> str:
        return (self._look() if self._waiting else self._found)[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._look())

    def __len__(self) -> int:
        return len(self._look())

    @property
    def hold_gradients(self) -> bool:
        """Whether gradients wait here for the last of several backward passes (`set_requires_gradient_sync`)."""
        return any(k.unsharded_accumulated_grad is not None or k._unsharded_param.grad is not None for k in self._kept)

    def by_name(self) -> dict[str, Tensor]:
        self._look()
        return {self._found[id(k._unsharded_param)]: k._unsharded_param for k in self._kept}
