"""What functions of the user compute with: parameters of a model, of further modules and loose ones, at other values.

The residual of an inverse problem reads more than the network: an unknown coefficient, a second network for a source.
`Scope.call` runs a function with given tensors in the place of parameters. Modules hold them meanwhile, as under
`torch.func.functional_call` (which leaves a module that is registered twice with the wrong tensor: torch 2.13);
whatever reaches a parameter by another way, as a closure does, gets them from a `TorchFunctionMode`. So it makes no
difference by which name a function calls a network.

`Scope.read_by` asks the graph of a result which parameters it depends on, and refuses what can not be replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from natgrad.metric.metric import Vector

Params = nn.Module | Tensor | Mapping[str, nn.Module | Tensor] | Iterable[nn.Module | Tensor]
BY_VALUE = {
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__bool__,
}


class Substitution(TorchFunctionMode):
    """Every torch function gets `values` in the place of the tensors with these ids, {id: (name, value)}."""

    def __init__(self, values: Mapping[int, tuple[str, Tensor]]) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BY_VALUE and id(args[0]) in self.values:
            raise TypeError(
                f"parameter {self.values[id(args[0])][0]!r} is read as a plain number ({func.__name__}), which hides "
                "it from derivatives: compute with the tensor, or detach() it first where it is meant to be constant"
            )
        return func(*map(self._swapped, args), **{k: self._swapped(v) for k, v in (kwargs or {}).items()})

    def _swapped(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.values[id(a)][1] if id(a) in self.values else a
        return type(a)(map(self._swapped, a)) if type(a) in (list, tuple) else a


class Scope:
    """A model and what else is read beside it.

    Args:
        model: its parameters have their own names.
        params: ``{name: module or parameter}``; the parameters of a module are called ``name.weight`` and so on. One
            module or parameter, or several without names, are called param0, param1, ….

    Attributes:
        everything: {name: parameter}, frozen ones too.

    Raises:
        TypeError: an entry is neither a module nor a tensor.
        ValueError: an entry holds no parameters, is computed from others or does not require grad, or a name is taken.
    """

    def __init__(self, model: nn.Module, params: Params | None = None) -> None:
        self.model = model
        self.entries = entries_of(params)
        modules = {"": model, **{n: e for n, e in self.entries.items() if isinstance(e, nn.Module)}}
        self.modules = nn.ModuleList(modules.values())
        self.everything: dict[str, Tensor] = {}
        seen: set[int] = set()
        for entry, module in modules.items():
            for name, p in module.named_parameters():
                if id(p) not in seen and (p.is_floating_point() or p.is_complex()):
                    self._take(f"{entry}.{name}" if entry else name, p)
                seen.add(id(p))
        for name, loose in self.entries.items():
            if isinstance(loose, Tensor) and id(loose) not in seen:
                self._take(name, loose)
                seen.add(id(loose))

    def _take(self, name: str, p: Tensor) -> None:
        if name in self.everything:
            raise ValueError(f"params: {name!r} is the name of another parameter already; give it another one")
        self.everything[name] = p

    def trainable(self) -> dict[str, Tensor]:
        """{name: parameter} of those that require grad now."""
        return {n: p for n, p in self.everything.items() if p.requires_grad}

    def name_of(self, parameter: Tensor) -> str | None:
        return next((n for n, p in self.everything.items() if p is parameter), None)

    def call(self, values: Vector, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args) with `values` in the place of the parameters of these names."""
        replaced = {id(self.everything[n]): (n, v) for n, v in values.items()}
        with self._held(replaced), Substitution(replaced | {id(v): (n, v) for n, v in values.items()}):
            return function(*args)

    @contextmanager
    def _held(self, replaced: Mapping[int, tuple[str, Tensor]]) -> Iterator[None]:
        """Modules hold the replaced tensors."""
        slots = [
            (m._parameters, key, p)
            for m in self.modules.modules()
            if not isinstance(m, torch.jit.ScriptModule)
            for key, p in m._parameters.items()
            if id(p) in replaced
        ]
        try:
            for held, key, p in slots:
                held[key] = replaced[id(p)][1]  # type: ignore[assignment]
            yield
        finally:
            for held, key, p in slots:
                held[key] = p

    # which parameters a function reads -----------------------------------------------------------------

    def live(self) -> Vector:
        """Every parameter as a leaf of its own, to run a function with and ask `read_by` for."""
        return {n: p.detach().requires_grad_() for n, p in self.everything.items()}

    def read_by(
        self,
        what: str,
        function: Callable[..., Any],
        result: Tensor,
        live: Vector,
        taken: Iterable[str],
        added: Iterable[Tensor] = (),
    ) -> set[str]:
        """Names of the parameters on which a result depends, computed by `call` with `live`.

        Args:
            what: the function in words.
            taken: names of the parameters of the metric.
            added: further leaves that `result` was computed with.

        Raises:
            ValueError: it depends on a tensor that requires grad and is none of them, or on a parameter by a way
                that cannot be followed.
        """
        ids = {id(v): n for n, v in live.items()}
        past = {id(p): n for n, p in self.everything.items()}  # leaves of those who went past `live`
        skipped, read = {id(t) for t in added}, set()
        for leaf in leaves_of(result):
            if id(leaf) in skipped:
                continue
            name = ids.get(id(leaf)) or past.get(id(leaf))
            if name is None:
                raise ValueError(
                    f"{what} reads {name_in(function, leaf) or 'a tensor'} of shape {tuple(leaf.shape)}, which "
                    "requires grad and is no parameter of the metric, so that it would stay as it is: give it, or the "
                    'module it belongs to, by params={"name": …}, or detach() it where it is meant to be constant'
                )
            if name not in taken and self.everything[name].requires_grad:
                raise ValueError(
                    f"{what} reads {name!r}, which requires grad but was frozen when the metric was made: thaw it by "
                    'opt.add_param_group({"params": [parameter]}), or make the metric anew'
                )
            if id(leaf) in past:
                raise ValueError(
                    f"{what} reads parameter {name!r} by a way that cannot be followed: a tensor was computed from it "
                    "outside, TorchScript holds it, or a torch.autograd.Function gets it straight from a closure. "
                    "Compute inside what is made of parameters, and reach them through a module, the model or one of "
                    "params="
                )
            read.add(name)
        return read

    def check_entries(self, read: set[str]) -> None:
        """Raise a ValueError that names an entry of `params` which nothing reads."""
        for entry, e in self.entries.items():
            held = [e] if isinstance(e, Tensor) else list(e.parameters())
            if not any(self.everything[n] is p for n in read for p in held):
                raise ValueError(
                    f"nothing depends on {entry!r} of params: a term has to compute with it, and not under no_grad or "
                    "after detach()"
                )


def entries_of(params: Params | None) -> dict[str, nn.Module | Tensor]:
    """{name: module or parameter}, checked; see `Scope`."""
    if params is None:
        return {}
    if isinstance(params, (Mapping, nn.ParameterDict, nn.ModuleDict)):
        found: dict[str, Any] = dict(params.items())
    else:
        several = [params] if isinstance(params, (nn.Module, Tensor)) or not isinstance(params, Iterable) else params
        found = {f"param{i}": e for i, e in enumerate(several)}
    for name, e in found.items():
        if not isinstance(name, str) or not isinstance(e, (nn.Module, Tensor)):
            raise TypeError(
                'params takes {"name": module or parameter} for what terms read beside the model, got '
                f"{name!r}: {type(e).__name__}"
            )
        if isinstance(e, nn.Module):
            if next(e.parameters(), None) is None:
                raise ValueError(f"params: the module {name!r} has no parameters")
        elif not e.is_leaf:
            raise ValueError(f"params: {name!r} is computed from other tensors; give the leaf that it is made of")
        elif not e.is_floating_point() or not (e.requires_grad or isinstance(e, nn.Parameter)):
            raise ValueError(
                f"params: {name!r} is a tensor of {e.dtype} that does not require grad; make it a torch.nn.Parameter"
            )
    return found


def leaves_of(result: Tensor) -> list[Tensor]:
    """The leaves that require grad in the graph of a tensor."""
    if result.grad_fn is None:
        return [result] if result.requires_grad else []
    seen, waiting, found = {result.grad_fn}, [result.grad_fn], []
    while waiting:
        node = waiting.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        fresh = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= fresh
        waiting += fresh
    return found


def name_in(function: Callable[..., Any], leaf: Tensor) -> str:
    """How a function written in Python calls a tensor, for messages; "" where that is not found."""
    try:
        seen = inspect.getclosurevars(inspect.unwrap(function))
    except (TypeError, ValueError):
        return ""
    for name, held in {**seen.globals, **seen.nonlocals}.items():
        if held is leaf:
            return repr(name)
        if isinstance(held, nn.Module):
            for inner, p in held.named_parameters():
                if p is leaf:
                    return repr(f"{name}.{inner}")
    return ""
