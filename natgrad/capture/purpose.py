"""What the backward pass that runs now is for.

Hooks on an output fire in every backward pass through it: also in those that take the gradient of the inputs, as
attacks, saliency maps and gradient penalties do. Only a pass that brings gradients to parameters is training.
"""

from __future__ import annotations

from collections.abc import Container

import torch

from natgrad.capture.tape import refuse_opaque

ACCUMULATED = "accumulated"  # into ``.grad`` of parameters
RETURNED = "returned"  # by ``torch.autograd.grad``, to somebody who may write them to ``.grad``


def purpose_of_pass(parameters: Container[int]) -> str | None:
    """Return what becomes of the gradients of parameters behind a tensor; None where the pass does not make any.

    To be called in a hook on that tensor. `parameters`: their ids.

    Raises:
        CaptureError: the pass enters a region that cannot be seen into.
    """
    root = torch._C._current_autograd_node()
    todo, entered = [root], {root}
    while todo:
        node = todo.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in parameters:
            continue
        try:  # torch does not list the node that a pass begins at
            if node is not root and not torch._C._will_engine_execute_node(node):
                continue
        except RuntimeError:  # what torch says of a leaf that torch.autograd.grad was asked for
            return RETURNED
        if variable is not None:
            return ACCUMULATED
        refuse_opaque(node.name())
        found = {n for n, _ in node.next_functions if n is not None} - entered
        entered |= found
        todo += found
    return None
