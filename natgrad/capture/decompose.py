"""Opaque ops, run again as the ops they are made of, so that each weight is seen by the op that uses it.

Called in place of the fused op while a tape is open, and equal to it to rounding: `multi_head_attention_forward`, the
recurrent ops behind nn.LSTM, nn.GRU and nn.RNN (layers, both directions, projections, packed sequences, dropout from
the same random stream), and their single cells.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# the same code, without the gate that hands the whole call to the mode
_attention = F.multi_head_attention_forward
multi_head_attention = types.FunctionType(
    _attention.__code__,
    {**_attention.__globals__, "has_torch_function": lambda *args: False},
    _attention.__name__,
    _attention.__defaults__,
)

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Sequence[Any]], State]  # (W_ih x + b_ih, state, [w_hh, b_hh?, w_hr?]) → state


def lstm_step(gates: Tensor, state: State, weights: Sequence[Any]) -> State:
    h, c = state
    w_hh, b_hh, w_hr = weights
    i, f, g, o = (gates + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else F.linear(h, w_hr)), c


def gru_step(gates: Tensor, state: State, weights: Sequence[Any]) -> State:
    (h,) = state
    w_hh, b_hh, _ = weights
    (xr, xz, xn), (hr, hz, hn) = gates.chunk(3, -1), F.linear(h, w_hh, b_hh).chunk(3, -1)
    z, n = (xz + hz).sigmoid(), (xn + (xr + hr).sigmoid() * hn).tanh()
    return (n + z * (h - n),)


def rnn_step(activation: Callable[[Tensor], Tensor]) -> Cell:
    def step(gates: Tensor, state: State, weights: Sequence[Any]) -> State:
        w_hh, b_hh, _ = weights
        return (activation(gates + F.linear(state[0], w_hh, b_hh)),)

    return step


def recurrent(step: Cell, states: int) -> Callable[..., tuple[Tensor, ...]]:
    """The op of one recurrent layer stack, with the two signatures of the fused one."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        packed = isinstance(args[3], (list, tuple))
        if packed:
            x, sizes, hx, params, biases, layers, dropout, train, both = args
            first = False
        else:
            x, hx, params, biases, layers, dropout, train, both, first = args
            x, sizes = (x.transpose(0, 1) if first else x), None
        starts = tuple(hx) if states > 1 else (hx,)  # each (layers · directions, batch, size)
        weights = grouped(params, biases, layers * (2 if both else 1))
        ends: list[State] = []
        for layer in range(layers):
            sides = []
            for side in range(2 if both else 1):
                k = layer * (2 if both else 1) + side
                out, end = direction(step, x, sizes, tuple(s[k] for s in starts), weights[k], reverse=side == 1)
                sides.append(out)
                ends.append(end)
            x = torch.cat(sides, -1) if both else sides[0]
            if dropout and train and layer < layers - 1:
                x = F.dropout(x, dropout, True)
        out = x.transpose(0, 1) if first else x
        return out, *(torch.stack([e[i] for e in ends]) for i in range(states))

    return run


def grouped(params: Sequence[Tensor], biases: bool, count: int) -> list[list[Any]]:
    """The flat list of weights → [w_ih, b_ih, w_hh, b_hh, w_hr] of each layer and direction, None where absent."""
    each = len(params) // count
    found = []
    for k in range(count):
        w = list(params[k * each : (k + 1) * each])
        b_ih, b_hh = (w[2], w[3]) if biases else (None, None)
        rest = w[4:] if biases else w[2:]
        found.append([w[0], b_ih, w[1], b_hh, rest[0] if rest else None])
    return found


def direction(
    step: Cell, x: Tensor, sizes: Tensor | None, start: State, weights: Sequence[Any], reverse: bool
) -> tuple[Tensor, State]:
    """One layer in one direction; x (time, batch, ·), or packed (rows, ·) with the batch size of each time step."""
    w_ih, b_ih, *rest = weights
    gates = F.linear(x, w_ih, b_ih)
    steps = list(gates.unbind(0) if sizes is None else gates.split(sizes.tolist()))
    times = range(len(steps) - 1, -1, -1) if reverse else range(len(steps))
    outs: list[Tensor] = [gates] * len(steps)
    state = tuple(s[: steps[times[0]].shape[0]] for s in start) if reverse else start
    finished: list[State] = []
    for t in times:
        rows, held = steps[t].shape[0], state[0].shape[0]
        if rows < held:  # sequences that end here keep their state
            finished.append(tuple(s[rows:] for s in state))
            state = tuple(s[:rows] for s in state)
        elif rows > held:  # sequences that end here start in reverse
            state = tuple(torch.cat([s, s0[held:rows]]) for s, s0 in zip(state, start))
        state = step(steps[t], state, rest)
        outs[t] = state[0]
    for late in reversed(finished):
        state = tuple(torch.cat([s, e]) for s, e in zip(state, late))
    return (torch.stack(outs) if sizes is None else torch.cat(outs)), state


def cell(step: Cell, states: int) -> Callable[..., Any]:
    def run(x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        state = step(F.linear(x, w_ih, b_ih), tuple(hx) if states > 1 else (hx,), (w_hh, b_hh, None))
        return state if states > 1 else state[0]

    return run


RECURRENT: dict[str, Callable[..., Any]] = {
    "lstm": recurrent(lstm_step, 2),
    "gru": recurrent(gru_step, 1),
    "rnn_tanh": recurrent(rnn_step(torch.tanh), 1),
    "rnn_relu": recurrent(rnn_step(torch.relu), 1),
    "lstm_cell": cell(lstm_step, 2),
    "gru_cell": cell(gru_step, 1),
    "rnn_tanh_cell": cell(rnn_step(torch.tanh), 1),
    "rnn_relu_cell": cell(rnn_step(torch.relu), 1),
}
REWRITES: dict[Any, Callable[..., Any]] = {  # by what an op is known as, see `natgrad.capture.ops.base.known_as`
    F.multi_head_attention_forward: multi_head_attention,
    **{getattr(torch, name): run for name, run in RECURRENT.items()},
    **{f"aten::{name}": run for name, run in RECURRENT.items()},
}
