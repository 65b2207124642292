"""Where a Hugging Face model computes its own loss: which logits and labels that loss is of.

Such a model is called with its labels and returns its loss, so a `Fisher` metric cannot see the criterion being called.
Each entry says in its place what the loss inside the model is a cross-entropy of:

    metric = ng.Fisher(model, nn.CrossEntropyLoss(), **huggingface.CAUSAL_LM)

Positions with the label −100 are left out, as `nn.CrossEntropyLoss` does and as the models do. So are the virtual
tokens that prompt tuning puts before the text, as in the loss of peft. Nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

Readout = Mapping[str, Callable[..., Any]]
LEFT_OUT = -100  # the label of a position that no loss counts


def next_token_logits(output: Any) -> Tensor:
    """(N, T, V) → (N (T − 1), V): the last position has no next token."""
    return output["logits"][:, :-1].flatten(0, 1)


def next_token_labels(inputs: Any, logits: Tensor) -> Tensor | None:
    """(N, T) → (N (T − 1),): the first token is predicted from nothing, or from virtual tokens before it."""
    labels = labels_of(inputs)
    if labels is None:
        return None
    virtual = len(logits) // len(labels) + 1 - labels.shape[1]  # before the text: with logits, without labels
    return F.pad(labels, (max(0, virtual), 0), value=LEFT_OUT)[:, 1:].flatten()


def token_logits(output: Any) -> Tensor:
    """(N, T, V) → (N T, V)"""
    return output["logits"].flatten(0, 1)


def token_labels(inputs: Any) -> Tensor | None:
    """(N, T) → (N T,)"""
    labels = labels_of(inputs)
    return None if labels is None else labels.flatten()


def logits(output: Any) -> Tensor:
    return output["logits"]


def labels_of(inputs: Any) -> Tensor | None:
    """The labels that the model was called with, or None.

    Raises:
        TypeError: it was called with positional arguments.
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(
            "the model was called with positional arguments, so its labels cannot be told apart; call it with keywords "
            "(model(**batch)), as Trainer does, or give `targets=` yourself"
        )
    return inputs.get("labels")


CAUSAL_LM: Readout = {"output": next_token_logits, "targets": next_token_labels}
"""``…ForCausalLM``, ``GPT2LMHeadModel``: position t predicts token t + 1."""

TOKENS: Readout = {"output": token_logits, "targets": token_labels}
"""``…ForMaskedLM``, ``…ForTokenClassification``: each position predicts its own label."""

CLASSIFICATION: Readout = {"output": logits, "targets": labels_of}
"""``…ForSequenceClassification`` with one label of several classes, ``…ForImageClassification``."""
