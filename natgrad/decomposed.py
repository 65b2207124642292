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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from natgrad.products import product

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
    if step is lstm_step and sizes is None and is_plain(x, start, weights):
        given = (x.flip(0) if reverse else x, *start, w_ih, b_ih, rest[0], rest[1])
        both, _, _ = lstm_layer(*given)
        out, last = both[:-1], both[-1]
        return (out.flip(0) if reverse else out), (out[-1], last)
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


# one LSTM layer in few ops: the recursion and its derivative by hand ----------------------------------------------


def is_plain(x: Tensor, start: State, weights: Sequence[Any]) -> bool:
    """Whether `lstm_layer` can stand in: where the fused op cannot be differentiated twice either, and the weights are
    parameters themselves.
    """
    w_hr, held = weights[-1], [w for w in weights if w is not None]
    return (
        w_hr is None
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and all(w.is_leaf for w in held)
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, *start, *held))
        and x.numel() > 0
    )


def lstm_layer(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, b_ih: Tensor | None, w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x (time, batch, ·) → outputs and, last, the final cell state (time + 1, batch, d); the sum of both products with
    the biases (time, batch, 4 d), at which the gradients of both are the same; the states before each step
    (time, batch, d).
    """
    if has_torch_function_unary(x):  # one mode after the other, each of which may watch for another metric
        found: tuple[Tensor, Tensor, Tensor] = handle_torch_function(
            lstm_layer, (x,), x, h0, c0, w_ih, b_ih, w_hh, b_hh
        )
        return found
    trail: list[Tensor] = []
    gates = _Recurrence.apply(F.linear(x, w_ih, b_ih), w_hh, b_hh, trail)
    out = _Scan.apply(gates, h0, c0, w_hh.detach(), trail)
    return out, gates, trail[0]


def tanh_(x: Tensor) -> Tensor:
    """2 σ(2x) − 1, which is faster than PyTorch's tanh on the CPU."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class _Recurrence(torch.autograd.Function):
    """Adds b_hh, and gives w_hh and b_hh their gradients: apart from the scan, as a metric's own pass needs none."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, w_hh: Tensor, b_hh: Tensor | None, trail: list[Tensor]) -> Tensor:
        ctx.trail = trail
        return gates.clone() if b_hh is None else gates + b_hh

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        flat = d.flatten(0, 1)
        w = product(flat.mT, ctx.trail[0].flatten(0, 1)) if ctx.needs_input_grad[1] else None
        return d, w, flat.sum(0) if ctx.needs_input_grad[2] else None, None


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, h0: Tensor, c0: Tensor, w: Tensor, trail: list[Tensor]) -> Tensor:
        steps, d = len(gates), h0.shape[-1]
        acts = gates.clone()
        states = gates.new_empty(steps + 1, *h0.shape)
        cells = torch.empty_like(states)
        states[0], cells[0] = h0, c0
        sizes = torch.empty_like(cells[1:])  # tanh c
        h, c, size, turned = states.unbind(0), cells.unbind(0), sizes.unbind(0), w.mT
        first, both, last = (acts.narrow(-1, *part).unbind(0) for part in ((2 * d, d), (0, 2 * d), (3 * d, d)))
        for t, a in enumerate(acts.unbind(0)):
            a.addmm_(h[t], turned)
            g, (i, f), o = tanh_(first[t]), both[t].sigmoid_().chunk(2, -1), last[t].sigmoid_()
            torch.mul(f, c[t], out=c[t + 1]).addcmul_(i, g)
            torch.mul(tanh_(size[t].copy_(c[t + 1])), o, out=h[t + 1])
        ctx.held = acts, cells, sizes, w
        trail.append(states[:-1])
        return torch.cat([states[1:], cells[-1:]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        acts, cells, size, w = ctx.held
        i, f, g, o = acts.chunk(4, -1)
        # ∂c and ∂h times these are the gradients at the gates
        along = acts - acts.square()
        along_i, along_f, along_g, along_o = along.chunk(4, -1)
        along_i.mul_(g)
        along_f.mul_(cells[:-1])
        torch.mul(i, 1 - g.square(), out=along_g)
        along_o.mul_(size)
        through = (1 - size.square()).mul_(o)
        found = torch.empty_like(acts)
        parts = (*acts.shape[:2], 4, o.shape[-1])
        from_c, at_c = along.view(parts)[:, :, :3].unbind(0), found.view(parts)[:, :, :3].unbind(0)
        from_h, at_h = along_o.unbind(0), found.narrow(-1, 3 * o.shape[-1], o.shape[-1]).unbind(0)
        given, gates, forget, through = grad.unbind(0), found.unbind(0), f.unbind(0), through.unbind(0)
        dh, dc = given[-2], given[-1]
        for t in range(len(gates) - 1, -1, -1):
            dc = torch.addcmul(dc, dh, through[t])
            torch.mul(dc.unsqueeze(1), from_c[t], out=at_c[t])
            torch.mul(dh, from_h[t], out=at_h[t])
            dc = dc * forget[t]
            dh = torch.addmm(given[t - 1], gates[t], w) if t else gates[t] @ w
        return found, dh, dc, None, None


def cell(step: Cell, states: int) -> Callable[..., Any]:
    def run(x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        state = step(F.linear(x, w_ih, b_ih), tuple(hx) if states > 1 else (hx,), (w_hh, b_hh, None))
        return state if states > 1 else state[0]

    return run


REWRITES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention,
    torch.lstm: recurrent(lstm_step, 2),
    torch.gru: recurrent(gru_step, 1),
    torch.rnn_tanh: recurrent(rnn_step(torch.tanh), 1),
    torch.rnn_relu: recurrent(rnn_step(torch.relu), 1),
    torch.lstm_cell: cell(lstm_step, 2),
    torch.gru_cell: cell(gru_step, 1),
    torch.rnn_tanh_cell: cell(rnn_step(torch.tanh), 1),
    torch.rnn_relu_cell: cell(rnn_step(torch.relu), 1),
}
