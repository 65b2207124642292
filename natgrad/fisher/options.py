"""What a user says of a metric, checked and brought to one form: options, patterns, parameters and arguments."""

from __future__ import annotations

import fnmatch
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.linalg.tree import describe

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # attribute names that wrappers add to parameter names


def choose(what: str, value: Any, known: Iterable[str]) -> None:
    """Raise a ValueError unless `value` is one of `known`."""
    if value not in (known := tuple(known)):
        raise ValueError(f"unknown {what} {value!r}; there are {', '.join(repr(k) for k in known)}")


def check_curvature_batch(kind: str, max_positions: int | None) -> None:
    """Raise a ValueError for an option out of range."""
    if max_positions is not None and (not isinstance(max_positions, int) or max_positions < 1):
        raise ValueError(f"max_positions must be a whole number of at least 1 or None, got {max_positions!r}")
    if kind != "sampled" and max_positions is not None:
        raise ValueError(f"kind={kind!r} uses all the data; max_positions belongs to kind='sampled'")


def check_max_factor_dim(max_factor_dim: Any) -> None:
    """Raise a ValueError unless it is a whole number of at least 1, or None."""
    if max_factor_dim is not None and (
        not isinstance(max_factor_dim, int) or isinstance(max_factor_dim, bool) or max_factor_dim < 1
    ):
        raise ValueError(
            "max_factor_dim must be a whole number of at least 1 (the longest block kept of a Kronecker factor), None, "
            f"or {{name pattern: either}}, got {max_factor_dim!r}"
        )


def check_modules(root: nn.Module) -> None:
    """Raise a ValueError for modules that no metric can follow; warn of those whose ops it cannot see."""
    if isinstance(root, torch.jit.ScriptModule):
        raise ValueError(
            "the model is TorchScript, which hides its ops and takes no hooks with keywords; give the nn.Module that "
            "it was made from"
        )
    hidden = [path for path, module in root.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    for path in hidden:
        inside = any(path.startswith(outer + ".") for outer in hidden)
        if not inside and any(p.requires_grad for p in root.get_submodule(path).parameters()):
            warnings.warn(
                f"module {path!r} is TorchScript, which hides its ops: its parameters have no curvature, and "
                "optimizers train them by an Adam-like rule. Use the nn.Module that it was made from",
                stacklevel=3,
            )
    for path, module in root.named_modules():
        if ".quantized" in type(module).__module__:
            raise ValueError(
                f"module {path!r} ({type(module).__name__}) is quantised: its weights are packed integers without "
                "gradients. Take the metric of the model before it is converted"
            )
        if getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(
                f"module {path!r} is an {type(module).__name__} with sparse=True, which leaves sparse gradients; "
                "natgrad takes dense ones: build it with sparse=False"
            )


def by_pattern(
    what: str, given: str | Mapping[str, str], known: tuple[str, ...], default: str, names: Iterable[str]
) -> Callable[[str], str]:
    """Name → option, from one option or from {pattern: option}.

    Raises:
        TypeError: `given` is neither.
        ValueError: an option that does not exist, or a pattern that matches no name.
    """
    if not isinstance(given, (str, Mapping)):
        raise TypeError(f"{what} takes one of {known} or {{name pattern: {what}}}, got {describe(given)}")
    return rules_of(what, given, default, lambda value: choose(what, value, known), names)


def max_factor_dim_by_pattern(
    given: int | Mapping[str, int | None] | None, names: Iterable[str]
) -> Callable[[str], int | None]:
    """Name → the longest block kept of a Kronecker side, None for no limit.

    Raises:
        ValueError: it is no number of rows, or a pattern matches no name.
    """
    return rules_of("max_factor_dim", given, None, check_max_factor_dim, names)


def rules_of(
    what: str, given: Any, default: Any, check: Callable[[Any], None], names: Iterable[str]
) -> Callable[[str], Any]:
    """Name → the value of the first pattern that matches it; `check` raises for a value that is none."""
    names = list(names)
    if not isinstance(given, Mapping):
        given = {"*": given}
    rules = dict(given) if "*" in given else {**given, "*": default}
    for pattern, value in rules.items():
        check(value)
        if not any(fnmatch.fnmatchcase(n, pattern) for n in names):
            raise ValueError(f"{what}: no trainable parameter matches {pattern!r}; there are {names}")
    return lambda name: next(v for pattern, v in rules.items() if fnmatch.fnmatchcase(name, pattern))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and ``torch.compile``."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def chosen_parameters(module: nn.Module, params: str | Iterable[str] | None) -> dict[str, Tensor]:
    """Trainable parameters by clean name, those that match `params`."""
    every = {".".join(s for s in n.split(".") if s not in WRAPPERS): p for n, p in module.named_parameters()}
    trainable = {n: p for n, p in every.items() if p.requires_grad}
    if params is None:
        return dict(trainable)
    patterns = [params] if isinstance(params, str) else list(params)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(n, pattern) for n in trainable):
            raise ValueError(f"params: no trainable parameter matches {pattern!r}; there are {list(trainable)}")
    return {n: p for n, p in trainable.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)}


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of `update` → (args, kwargs) of the model."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def picks_by_output(targets: Callable[..., Any]) -> bool:
    """Whether a `targets=` callable takes what `output=` has picked as a second argument."""
    try:
        parameters = inspect.signature(targets).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return False
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters) == 2


def received(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What `targets=` is given: the only argument, the keyword arguments alone, or both."""
    if len(args) == 1 and not kwargs:
        return args[0]
    return kwargs if not args else (args, kwargs)
