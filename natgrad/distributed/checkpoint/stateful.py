"""The state of one object as torch.distributed.checkpoint takes it, and the planner that reads it back.

Tensors alone (`packing`), the same on every rank but for the random streams, which stand under the rank's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from natgrad.distributed.checkpoint.packing import ABOUT, Pieces, pack, unpack
from natgrad.state.seal import SEAL, sealed, unsealed

STREAM = "stream"  # stream.{rank}.{which}: the state of a random generator of that rank


class Saved:
    """A `Stateful` of torch.distributed.checkpoint around an optimizer, a metric, a scheduler or any other object with
    ``state_dict`` and ``load_state_dict``.

    Its state is a flat dictionary of tensors, copied when it is asked for: training may go on while it is written.
    """

    def __init__(self, what: Any) -> None:
        if not (hasattr(what, "state_dict") and hasattr(what, "load_state_dict")):
            raise TypeError(f"Saved takes an object with state_dict and load_state_dict, got {type(what).__name__}")
        self.what = what

    @property
    def metric(self) -> Any:
        return getattr(self.what, "metric", self.what)

    @property
    def rank(self) -> int:
        return getattr(getattr(self.metric, "strategy", None), "rank", 0)  # other optimizers have no metric

    def state_dict(self) -> Pieces:
        state, streams = without_streams(self.what.state_dict())
        pieces = pack(state)
        pieces.update({f"{STREAM}.{self.rank}.{which}": s.clone() for which, s in streams.items()})
        return pieces

    def load_state_dict(self, pieces: Mapping[str, Tensor]) -> None:
        """Take over a state.

        Raises:
            ValueError: it belongs to something else, or was read without `Planner`.
        """
        self.what.load_state_dict(self.unpacked(pieces))

    def unpacked(self, pieces: Mapping[str, Tensor]) -> Any:
        """The state that ``what.load_state_dict`` takes, with the random streams of this rank."""
        try:
            state = unpack({n: t for n, t in pieces.items() if not n.startswith(STREAM + ".")}, self._placed)
        except ValueError as error:
            raise ValueError(f"{error}. Load with planner=natgrad.checkpoint.Planner()") from error
        streams: dict[int, dict[str, Tensor]] = {}
        for name, t in pieces.items():
            if name.startswith(STREAM + "."):
                _, rank, which = name.split(".", 2)
                streams.setdefault(int(rank), {})[which] = t
        return with_streams(state, streams, self.rank)

    def _placed(self, path: tuple[str, ...], whole: Tensor) -> Tensor:
        """A tensor that was sharded like a parameter, sharded again as that parameter is here."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        parameters = getattr(self.metric, "parameters", {})
        for name in reversed(path):
            p = parameters.get(name) if isinstance(parameters, Mapping) else None
            if isinstance(p, DTensor) and p.shape == whole.shape:
                return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements)
        return whole


def without_streams(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """The state of an optimizer or a metric as it is on every rank, sealed, and the random streams that differ."""
    metric = metric_state(state)
    if not metric:
        return state, {}
    about = json.dumps({**json.loads(metric["about"]), "rank": 0})
    return with_metric(state, {**metric, "about": about, "generators": {}}), metric["generators"]


def with_streams(state: Any, streams: Mapping[int, dict[str, Tensor]], rank: int) -> Any:
    """The inverse, for a rank. One that has no stream of its own gets rank 0's, marked as rank 0's."""
    metric = metric_state(state)
    if metric:
        whose = rank if rank in streams else 0
        metric = unsealed(metric, "the metric's state")
        about = json.dumps({**json.loads(metric["about"]), "rank": whose})
        rest = state if "natgrad" not in state else unsealed(state, "the optimizer's state")
        state = with_metric(rest, {**metric, "about": about, "generators": streams.get(whose, {})})
    return state


def with_metric(state: Any, metric: dict[str, Any]) -> Any:
    """Return the state of an optimizer, or of the metric itself, with another state of the metric; sealed anew."""
    metric = sealed({k: v for k, v in metric.items() if k != SEAL})
    if "natgrad" not in state:
        return metric
    rest = {k: v for k, v in state.items() if k != SEAL}
    return sealed({**rest, "natgrad": {**rest["natgrad"], "metric": metric}})


def metric_state(state: Any) -> dict[str, Any] | None:
    """The part of a state that is of a Fisher metric, None where there is none."""
    own = state.get("natgrad", {}).get("metric") if isinstance(state, dict) and "natgrad" in state else state
    return own if isinstance(own, dict) and "about" in own and "tensors" in own else None


class Planner(dcp.DefaultLoadPlanner):
    """Reads what the checkpoint has of every `Saved`, and unpickles nothing that could run code."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        for key, value in state_dict.items():
            if isinstance(value, Pieces):
                value.clear()
                value.update(empty_pieces(key, metadata))
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        loaded = torch.load(value, weights_only=True)
        path = self.mappings[read_item.dest_index.fqn]
        held: Any = self.original_state_dict
        for part in path[:-1]:
            held = held[part]
        held[path[-1]] = loaded


def empty_pieces(key: str, metadata: Metadata) -> dict[str, Tensor]:
    """Tensors to read the pieces under `key` into.

    Raises:
        ValueError: the checkpoint has no such entry, or one that was saved otherwise.
    """
    found = {}
    for name, about in metadata.state_dict_metadata.items():
        top, _, rest = name.partition(".")
        if top == key and isinstance(about, TensorStorageMetadata):
            found[rest] = torch.empty(about.size, dtype=about.properties.dtype)
    if ABOUT not in found:
        there = sorted({name.partition(".")[0] for name in metadata.state_dict_metadata})
        raise ValueError(
            f"the checkpoint has no {key!r} that natgrad.checkpoint saved; it has {there}. Save it as "
            "natgrad.checkpoint.save does, or as Saved(…)"
        )
    return found
