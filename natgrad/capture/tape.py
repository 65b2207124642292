"""Which parameter was used by which op on what: the calls of one forward pass.

While a `Tape` is open, a `TorchFunctionMode` sees every torch function that runs. Ops that `natgrad.capture.ops` has a
rule for and whose weight or bias is a parameter of interest are noted: the detached input, and the *gradient edge* of
the output, which later serves as an input of ``torch.autograd.grad``; in-place changes after the op do not move it.

A coverage walk from the loss's side back through the graph, jumping over the noted ops, finds the uses that no rule
has seen: it is how a parameter used by other means is found instead of silently missed.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from natgrad.capture.compile import eager, go_on_in_python
from natgrad.capture.decompose import REWRITES
from natgrad.capture.ops import IN_PLACE, RULES, OpUse, Picked, known_as, op_name
from natgrad.capture.ops.elementwise import elements
from natgrad.capture.parameters import ParameterSlice, find, slice_of, weight_slice
from natgrad.capture.picked import node_behind, picked_slice
from natgrad.capture.views import LinearForm, kept_input
from natgrad.linalg.tree import leaves_of
from natgrad.metric.interrupts import uninterrupted

Edge = tuple[Any, int]  # (autograd node, number of its output): comparable, unlike GradientEdge


class CaptureError(RuntimeError):
    """A parameter is used in a way that the metric cannot follow; the message names it."""


@dataclass
class LayerCall:
    """One use of one layer's parameters: out = op(x; weight, bias)."""

    op: str
    weight: ParameterSlice | None
    bias: ParameterSlice | None
    view: LinearForm
    x: Tensor
    out: Edge
    kept: dict[str, Any] = field(init=False, default_factory=dict)  # what passes over one draw have in common


@dataclass
class Uncaptured:
    """A use of a parameter that no op rule has seen."""

    name: str
    used_by: str  # the graph node that used it


@dataclass(eq=False)
class Tape:
    """The calls of one forward pass of the root module."""

    names: Mapping[int, str]  # id of parameter → name
    calls: list[LayerCall] = field(default_factory=list)
    behind: dict[Edge, list[Edge]] = field(default_factory=dict)  # noted output → what lies behind its op
    instead: dict[Edge, Edge] = field(default_factory=dict)  # noted output → what was picked for it, a use otherwise
    inputs: set[Edge] = field(default_factory=set)
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of the tensor inputs, without features
    picked: dict[Any, Picked] = field(default_factory=dict)  # autograd node → the parameter it gathers from
    outputs: dict[Edge, tuple[int, ...]] = field(default_factory=dict)  # of the forward pass: their shapes
    number: int = field(default_factory=itertools.count().__next__)  # of the forward pass
    drawn: bool = False
    differentiated: bool = False  # the forward pass took a derivative
    waiting: Any = None  # what was drawn where the criterion was called, until its loss is backpropagated
    at_output: Any = None  # (output, (args, kwargs)) of the forward pass, for a draw at the output
    _stack: ExitStack | None = None

    def open(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start noting calls."""
        tensors = leaves_of((args, kwargs))
        self.inputs = {e for t in tensors if (e := edge_of(t)) is not None}
        # of numbers the last dimension counts features
        self.shapes = [tuple(t.shape[: max(1, t.dim() - t.is_floating_point())]) for t in tensors if not t.is_nested]
        with uninterrupted():
            self._stack = ExitStack()
            self._stack.enter_context(eager())  # a compiled model runs eagerly while it is watched
            self._stack.enter_context(_Watch(self))

    def close(self) -> None:
        """Stop noting calls; harmless when not open."""
        with uninterrupted():
            stack, self._stack = self._stack, None
            if stack is not None:
                stack.close()

    def returned(self, leaves: Iterable[Tensor]) -> None:
        """Be told what the forward pass returned."""
        self.outputs = {e: tuple(t.shape) for t in leaves if (e := edge_of(t)) is not None}

    def note(self, func: Any, parsed: OpUse, out: Tensor, before: Sequence[Edge] = ()) -> None:
        """Keep a call if its weight or bias is a parameter of interest. `before`: edges of overwritten arguments."""
        check_selective_checkpointing()
        edge, picked = edge_of(out), self.picked_behind(parsed.weight)
        if edge is None or (parsed.needs_rows and picked is None and not parsed.view.leading(parsed.x)):
            return
        weight, view, x = None, parsed.view, parsed.x
        if picked is not None:
            weight, view, x = picked_slice(parsed, picked, self.names) or (weight, view, x)
        else:
            weight, view = weight_slice(parsed.weight, view, self.names) or (weight, view)
        bias, offset = slice_of(parsed.bias, self.names), None
        if view.region is not None or view.routes is not None or bias is None:
            bias, offset = None, offset_of(parsed, out, self.names)  # no column of one matrix
        claimed = [t for t, p in ((parsed.weight, weight), (parsed.bias, bias or offset)) if t is not None and p]
        if not any(t.requires_grad for t in claimed):
            return
        rest = [t for t in (parsed.x, parsed.weight, parsed.bias, *parsed.others) if isinstance(t, Tensor)]
        edges = [e for t in rest if not any(t is c for c in claimed) and (e := edge_of(t)) is not None]
        self.behind.setdefault(edge, []).extend([*edges, *before])
        if picked is not None and picked.otherwise is not None and picked.made is not None:
            made = edge_of(picked.made)
            assert made is not None
            self.instead[edge] = made
        name = op_name(func)
        if weight is not None or bias is not None:
            self.calls.append(LayerCall(name, weight, bias, view, kept_input(x.detach()), edge))
        if offset is not None:
            ones = torch.ones((), dtype=out.dtype, device=out.device).expand(out.shape)
            self.calls.append(LayerCall(name, *offset, ones, edge))

    def refuse_nested(self, func: Any, args: Sequence[Any]) -> None:
        """Raise a CaptureError where a parameter of interest is used on a nested tensor."""
        if (found := next((f for t in args if (f := find(t, self.names)) is not None), None)) is not None:
            raise CaptureError(
                f"parameter {found[0]!r} is used by {op_name(func)} on a nested tensor, whose rows have no dimension "
                "that counts data. Pad it before that layer (torch.nested.to_padded_tensor) and mask the padding "
                "after it, or leave the parameter out with `params=`"
            )

    def owns(self, t: Any) -> bool:
        """Whether a tensor is a parameter of interest, or a view or cast of one."""
        return find(t, self.names) is not None

    def owns_picked(self, t: Any) -> bool:
        """The same, or whether it was picked out of one: asked where an op has no other parameter."""
        return self.owns(t) or self.picked_behind(t) is not None

    def picked_behind(self, t: Any) -> Picked | None:
        """What a tensor, or what it is a view of, was picked from."""
        return self.picked.get(node_behind(t)) if self.picked and isinstance(t, Tensor) else None


def let_go(calls: Iterable[LayerCall]) -> None:
    """Forget what passes over one draw had in common."""
    for call in calls:
        call.kept.clear()


def coverage_walk(outputs: Sequence[Tensor], tapes: Sequence[Tape]) -> tuple[set[Edge], list[Uncaptured]]:
    """Walk back from `outputs`, jumping over noted ops.

    Raises:
        CaptureError: the graph holds a region that cannot be seen into (reentrant checkpointing, a compiled region).
    """
    behind = {e: b for tape in tapes for e, b in tape.behind.items()}
    while True:
        reached, missed = _walk(outputs, tapes, behind)
        twice = [e for tape in tapes for e, made in tape.instead.items() if e in behind and made in reached]
        if not twice:
            return reached, missed
        for e in twice:  # what was picked is used in other ways too: the picking is the use, for all of them
            del behind[e]


def _walk(
    outputs: Sequence[Tensor], tapes: Sequence[Tape], behind: Mapping[Edge, Sequence[Edge]]
) -> tuple[set[Edge], list[Uncaptured]]:
    names = {i: n for tape in tapes for i, n in tape.names.items()}
    reached: set[Edge] = set()
    missed: dict[str, Uncaptured] = {}
    # what made the input is none of ours, unless it is another watched pass: m(m(x))
    seen: set[Edge] = set(tapes[0].inputs) if len(tapes) == 1 else set()
    entered: set[Any] = set()
    todo = [(e, "the output itself") for t in outputs if (e := edge_of(t)) is not None]
    while todo:
        edge, user = todo.pop()
        if edge in seen or is_empty(edge):
            continue
        seen.add(edge)
        if edge in behind:
            reached.add(edge)
            todo += [(e, user) for e in behind[edge]]
            continue
        node = edge[0]
        if (name := names.get(id(getattr(node, "variable", None)))) is not None:
            missed.setdefault(name, Uncaptured(name, user))
        refuse_opaque(node.name())
        if node not in entered:
            entered.add(node)
            todo += [((n, i), node.name()) for n, i in node.next_functions if n is not None]
    return reached, list(missed.values())


def used_outside(tapes: Sequence[Tape]) -> list[Uncaptured]:
    """Return parameters of interest that the inputs of a forward pass were made of: they act there, too."""
    names = {i: n for tape in tapes for i, n in tape.names.items()}
    found: dict[str, Uncaptured] = {}
    entered: set[Any] = set()
    todo = [(node, "the input itself") for tape in tapes for node, _ in tape.inputs]
    while todo:
        node, user = todo.pop()
        if node in entered:
            continue
        entered.add(node)
        if (name := names.get(id(getattr(node, "variable", None)))) is not None:
            found.setdefault(name, Uncaptured(name, f"{user} before the model's forward pass"))
        todo += [(n, node.name()) for n, _ in node.next_functions if n is not None]
    return list(found.values())


def tapes_behind(outputs: Iterable[Tensor], tapes: Sequence[Tape]) -> Sequence[Tape]:
    """Those of the forward passes that `outputs` come from: others, as of a validation, are none of theirs.

    Where none is known to be, as inside of a forward pass, whose outputs are to come, it is the last one.
    """
    if len(tapes) == 1:
        return tapes
    left: dict[Edge, list[Tape]] = {}
    for tape in tapes:
        for edge in {*tape.outputs, *tape.behind}:
            left.setdefault(edge, []).append(tape)
    found: set[Tape] = set()
    todo = [e for t in outputs if (e := edge_of(t)) is not None]
    entered: set[Any] = set()
    while todo:
        node, number = todo.pop()
        found.update(left.pop((node, number), ()))
        if node not in entered:
            entered.add(node)
            todo += [e for e in node.next_functions if e[0] is not None]
    return [tape for tape in tapes if tape in found] or tapes[-1:]


def check_selective_checkpointing() -> None:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    if any(type(m).__name__ == "_CachingTorchDispatchMode" for m in modes):
        raise CaptureError(
            "the model uses selective activation checkpointing, whose regions can be backpropagated once only, and the "
            "metric needs a backward pass of its own; use checkpoint(…, use_reentrant=False) without context_fn"
        )


def refuse_opaque(node: str) -> None:
    if node.startswith("CheckpointFunction"):
        raise CaptureError(
            "the model uses reentrant activation checkpointing, which hides the graph inside it; "
            "use torch.utils.checkpoint.checkpoint(…, use_reentrant=False)"
        )
    if node.startswith("CompiledFunction"):
        raise CaptureError(
            "the model holds a compiled region that ran compiled while its calls were to be noted; "
            "compile the whole model (torch.compile(model)) and pass that to Fisher"
        )


class _Watch(TorchFunctionMode):
    """Hands every call of an op with a rule to the tape, and runs opaque ops as the ops they are made of."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        following = torch.is_grad_enabled() and not in_backward() and not in_transform()
        op = known_as(func)
        if following and (decomposed := REWRITES.get(op)) is not None:
            with self:
                return decomposed(*args, **kwargs)
        if func is torch.autograd.grad:
            self.tape.differentiated = True
        rule = RULES.get(op) if following else None
        if rule is None:
            return func(*args, **kwargs)
        before: list[Edge] = []
        if op in IN_PLACE and self.tape.owns_picked(args[1]):
            before = [e for e in [edge_of(args[0])] if e is not None]
            args, given = (args[0].detach().clone(), *args[1:]), args
        else:
            given = args
        result = func(*given, **kwargs)
        out = result[0] if isinstance(result, (tuple, list)) else result
        if isinstance(out, Tensor) and out.requires_grad and out.is_nested:
            self.tape.refuse_nested(func, (*args, *kwargs.values()))
        elif isinstance(out, Tensor) and out.requires_grad and out.numel():  # without entries it passes no gradient on
            parsed = rule(self.tape.owns, out, *args, **kwargs)
            if parsed is None and self.tape.picked:
                parsed = rule(self.tape.owns_picked, out, *args, **kwargs)
            if isinstance(parsed, Picked):
                parsed.made = out
                self.tape.picked[out.grad_fn] = parsed
                parsed = parsed.otherwise
            if parsed is not None:
                self.tape.note(func, parsed, out, before)
        return result


def offset_of(parsed: OpUse, out: Tensor, names: Mapping[int, str]) -> tuple[ParameterSlice, None, LinearForm] | None:
    """A bias that is no column of one matrix, as an offset: its piece, no bias, and its view."""
    if find(parsed.bias, names) is None:
        return None
    assert parsed.bias is not None
    held = weight_slice(parsed.bias, elements(parsed.bias, out.shape, parsed.bias_at), names)
    return None if held is None else (held[0], None, held[1])


def edge_of(t: Tensor) -> Edge | None:
    if not t.requires_grad:
        return None
    e = get_gradient_edge(t)
    return e.node, e.output_nr


def is_empty(e: Edge) -> bool:
    """Whether the tensor has no entries, and so passes no gradient on: a layer called on no rows."""
    node, number = e
    made = getattr(node, "_input_metadata", ())  # of the outputs in the forward pass
    return number < len(made) and not made[number].is_nested_tensor and 0 in made[number].shape


def as_gradient_edge(e: Edge) -> GradientEdge:
    return GradientEdge(*e)


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def in_transform() -> bool:
    """Inside torch.func (vmap, grad, functional_call under a transform) there is no graph of ours to follow."""
    return torch._C._functorch.maybe_current_level() is not None


class Hook:
    """A module hook that calls a bound method through a weak reference, and does nothing in copies and pickles.

    A hook that held its metric strongly would make models that cannot be copied, pickled or freed.
    """

    __name__ = "natgrad"  # torch.jit asks for it

    def __init__(self, method: Any = None, module: nn.Module | None = None) -> None:
        self.due = False  # whether the coming forward passes are to be watched
        self._method = weakref.WeakMethod(method) if method is not None else (lambda: None)
        self._module = weakref.ref(module) if module is not None else (lambda: None)

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if torch.compiler.is_compiling():
            if not self.due:  # compiled code guards on it
                return
            go_on_in_python()
        method = self._method()
        if method is None or self._module() is not module:
            return
        with uninterrupted() if self.due else nullcontext():  # ordinary steps leave the handler of signals alone
            method(*args)

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()
