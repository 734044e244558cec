"""A recurrent layer as an op of ONNX, for torch.onnx.export(dynamo=True).

torch.nn's layers are unrolled there, for one length only; ONNX's own take any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Name, and the order of gates in ONNX, as places in torch's.
_OPS = {
    "rnn_tanh": ("RNN", (0,)),
    "rnn_relu": ("RNN", (0,)),
    "lstm": ("LSTM", (0, 3, 1, 2)),
    "gru": ("GRU", (1, 0, 2)),
}


def recurrent(
    x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor], cell: str
) -> tuple[Tensor, Tensor, Tensor, None]:
    """`_ops.recurrent`, of layers without a projection."""
    name, order = _OPS[cell]
    steps, batch, _ = x.shape
    directions, hidden = h0.shape[0], weights[1].shape[1]
    per_direction = len(weights) // directions

    def stacked(place: int) -> Tensor:
        """[D, G H, ...], the weights at this place of each direction."""
        of_directions = [weight.chunk(len(order)) for weight in weights[place::per_direction]]
        return torch.stack([torch.cat([gates[gate] for gate in order]) for gates in of_directions])

    attributes: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if directions == 2 else "forward",
    }
    if cell == "gru":
        attributes["linear_before_reset"] = 1
    if cell == "rnn_relu":
        attributes["activations"] = ["Relu"] * directions
    biases = torch.cat([stacked(2), stacked(3)], 1) if per_direction == 4 else None
    states = (h0,) if c0 is None else (h0, c0)
    final_shape = (directions, batch, hidden)
    y, *final = torch.onnx.ops.symbolic_multi_out(
        name,
        (x, stacked(0), stacked(1), biases, None, *states),
        attributes,
        dtypes=[x.dtype] * (1 + len(states)),
        shapes=[(steps, directions, batch, hidden), *[final_shape] * len(states)],
    )
    return y.transpose(1, 2).flatten(2), final[0], x.new_empty(0) if c0 is None else final[1], None
