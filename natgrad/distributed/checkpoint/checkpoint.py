"""Checkpoints of many processes, through torch.distributed.checkpoint.

    checkpoint.save({"model": model, "opt": opt, "step": step}, folder / f"step-{step}")

    if (newest := checkpoint.latest(folder)) is not None:
        step = checkpoint.load({"model": model, "opt": opt}, newest)["step"]

All ranks call these together. Each tensor is written once, by one of the ranks that hold it, and read by all, so that a
checkpoint fits any number of ranks and any wrapper. What is no tensor is kept as JSON in one (`packing`), so
that loading runs no code. Random streams are kept for every rank; a rank that the saved run did not have gets a stream
that follows from rank 0's.

With ``dcp.save`` and ``dcp.load`` themselves, give them `Saved(opt)` and, for loading, `Planner()`: an optimizer that
has not stepped does not know its blocks, so what there is to load has to come from the checkpoint.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from natgrad.distributed.checkpoint.files import METADATA, Reader, Writer
from natgrad.distributed.checkpoint.packing import Pieces, pack, unpack
from natgrad.distributed.checkpoint.stateful import Planner, Saved, empty_pieces
from natgrad.state.interrupts import uninterrupted

PLAIN = "plain"  # the entry that holds the plain values
NAMED = 5  # differences that one message lists


def save(state: Mapping[str, Any], path: str | os.PathLike[str], process_group: Any = None) -> None:
    """Write a checkpoint folder at `path`; it appears when it is complete. Collective.

    Args:
        state: models, optimizers, metrics, schedulers, and plain values (tensors, numbers, strings, lists,
            dictionaries) by name. Plain values are those of the first rank that writes: give every rank the same.
        process_group: the ranks that save together; None takes all.

    Raises:
        FileExistsError: there is something at `path`.
        TypeError: a value cannot be kept without pickle.
        ValueError: a name has a dot, or is "plain".
        OSError: it cannot be written.
    """
    write(held(state), Writer(path), process_group)


def async_save(state: Mapping[str, Any], path: str | os.PathLike[str], process_group: Any = None) -> Future[Any]:
    """As `save`, in the background: the state is copied before this returns. Collective.

    A second call waits for the first. The messages go through a process group of their own.

    Returns:
        a future; ``result()`` waits, and raises what went wrong. LayerCall it before ``destroy_process_group()``.
    """
    group = background(process_group)
    last, group.last = group.last, None
    if last is not None:
        last.result()
    group.last = group.executor.submit(write, copied(held(state)), Writer(path), group.group)
    return group.last


def load(targets: Mapping[str, Any], path: str | os.PathLike[str], process_group: Any = None) -> dict[str, Any]:
    """Read a checkpoint into models, optimizers and the like. Collective.

    Everything is read and compared first: where a file is missing or cut short, or the checkpoint is of another model
    or optimizer, on whatever rank, every rank raises and no target has changed.

    Returns:
        the plain values that `save` was given.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it was never finished.
        ValueError: it is damaged, or of something else; the message names what is missing or differs.
    """
    models = {k: m for k, m in targets.items() if isinstance(m, nn.Module)}
    others = {k: v if isinstance(v, Saved) else Saved(v) for k, v in targets.items() if k not in models}
    found: dict[str, Any] = {}
    reader = Reader(path)

    def prepare() -> None:
        metadata = reader.read_metadata()
        for key, model in models.items():
            found[key] = model_template(key, model, metadata)
        if PLAIN in keys_of(metadata):
            found[PLAIN] = Pieces()
        found.update({key: Pieces(empty_pieces(key, metadata)) for key in others})

    together(prepare, process_group)
    with quiet():
        together(lambda: _read(found, reader, process_group), process_group)
    states: dict[str, Any] = {}
    together(lambda: states.update({k: s.unpacked(found[k]) for k, s in others.items()}), process_group)
    before = {k: copy.deepcopy(s.what.state_dict()) for k, s in others.items()}
    with uninterrupted():
        try:
            for key, s in others.items():
                together(lambda s=s, key=key: s.what.load_state_dict(states[key]), process_group)  # type: ignore[misc]
        except BaseException:
            for key, s in others.items():
                s.what.load_state_dict(before[key])
            raise
        for key, model in models.items():  # names, shapes and checksums have been compared
            set_model_state_dict(model, found[key])
    return unpack(found[PLAIN]) if PLAIN in found else {}


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The whole checkpoint in a folder whose name ends in the highest number (``step-120``); None if there is none.

    One that was damaged later is passed over with a warning.
    """
    numbered = [(p, re.search(r"(\d+)$", p.name)) for p in Path(folder).glob("*") if (p / METADATA).is_file()]
    for _, path in sorted(((int(m.group(1)), p) for p, m in numbered if m), reverse=True):
        try:
            Reader(path).read_metadata()
        except (ValueError, FileNotFoundError) as error:
            warnings.warn(f"{error}; taking the one before", stacklevel=2)
            continue
        return path
    return None


# pieces ----------------------------------------------------------------------------------------------------


def held(state: Mapping[str, Any]) -> dict[str, Any]:
    """What torch.distributed.checkpoint is given: tensors under names."""
    found: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for key, value in state.items():
        if "." in key or key == PLAIN:
            raise ValueError(f"{key!r} cannot be a name in a checkpoint; take one without a dot, and not {PLAIN!r}")
        if isinstance(value, nn.Module):
            found[key] = get_model_state_dict(value)
        elif isinstance(value, Saved):
            found[key] = value.state_dict()
        elif hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            found[key] = Saved(value).state_dict()
        else:
            plain[key] = value
    return {**found, PLAIN: pack(plain)} if plain else found


def write(state: dict[str, Any], writer: Writer, process_group: Any) -> None:
    """Have every rank write its part; one process goes the same way alone.

    Raises:
        OSError: a rank could not write.
    """
    if dist.is_available() and dist.is_initialized():
        try:
            dcp.save(state, storage_writer=writer, process_group=process_group)
        except dcp.CheckpointException as error:
            rank, (cause, _) = next(iter(sorted(error.failures.items())))
            raise OSError(f"the checkpoint {writer.target} could not be written on rank {rank}: {cause}") from cause
        return
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(state, writer.storage_meta(), True)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    results = writer.write_data(plan, planner)
    results.wait()
    writer.finish(metadata, [results.value()])


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """With the tensors of models copied; those of `Saved` are copies already."""
    return {
        k: v if isinstance(v, Pieces) else {n: t.detach().clone() if isinstance(t, Tensor) else t for n, t in v.items()}
        for k, v in state.items()
    }


def keys_of(metadata: Metadata) -> set[str]:
    return {name.partition(".")[0] for name in metadata.state_dict_metadata}


def model_template(key: str, model: nn.Module, metadata: Metadata) -> dict[str, Any]:
    """Tensors like those of a model to read into.

    Raises:
        ValueError: the checkpoint's model has other names or shapes.
    """
    mine = get_model_state_dict(model)
    theirs = {
        name.partition(".")[2]: about
        for name, about in metadata.state_dict_metadata.items()
        if name.partition(".")[0] == key
    }
    if not theirs:
        raise ValueError(f"the checkpoint has no {key!r}; it has {sorted(keys_of(metadata))}")
    said = [f"{n} is missing in the checkpoint" for n in mine if n not in theirs]
    said += [f"{n} is in the checkpoint alone" for n in theirs if n not in mine]
    for n, t in mine.items():
        about = theirs.get(n)
        if isinstance(t, Tensor) and isinstance(about, TensorStorageMetadata) and about.size != t.shape:
            said.append(f"{n} has shape {tuple(t.shape)} here and {tuple(about.size)} in the checkpoint")
    if said:
        more = f"; and {len(said) - NAMED} more" if len(said) > NAMED else ""
        raise ValueError(f"the checkpoint's {key!r} is another model: " + "; ".join(said[:NAMED]) + more)
    return {n: torch.empty_like(t) if isinstance(t, Tensor) else t for n, t in mine.items()}


def _read(found: dict[str, Any], reader: Reader, process_group: Any) -> None:
    try:
        dcp.load(found, storage_reader=reader, planner=Planner(), process_group=process_group)
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        raise ValueError(f"the checkpoint {reader.path} cannot be read on rank {rank}: {cause}") from cause


def together(act: Callable[[], None], process_group: Any) -> None:
    """Do something that may fail on some ranks; if it does, all raise the error of the first that it failed on."""
    mine: Exception | None = None
    try:
        act()
    except Exception as error:
        mine = error
    if not (dist.is_available() and dist.is_initialized()):
        if mine is not None:
            raise mine
        return
    said: Sequence[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(said, None if mine is None else (type(mine).__name__, str(mine)), process_group)
    if mine is not None:
        raise mine
    for rank, what in enumerate(said):
        if what is not None:
            kind = {"FileNotFoundError": FileNotFoundError, "ValueError": ValueError}.get(what[0], RuntimeError)
            raise kind(f"rank {rank} could not load: {what[1]}")


class Background:
    """The process group that one set of ranks saves through in the background, and the last save."""

    def __init__(self, parent: Any) -> None:
        self.group = None
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.last: Future[Any] | None = None
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_process_group_ranks(parent)
            self.group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


_backgrounds: dict[Any, Background] = {}


def background(process_group: Any) -> Background:
    parent = process_group
    if parent is None and dist.is_available() and dist.is_initialized():
        parent = dist.group.WORLD
    if parent not in _backgrounds:
        _backgrounds[parent] = Background(parent)
    return _backgrounds[parent]


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warning that one process saves alone, which is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        yield
