"""The layers as functions, with the signatures of `torch.lstm` and its kin and of `torch.nn.functional`.

Shapes: T steps, B sequences, I input features, H hidden units, P features of h (proj_size if there is one, else H),
D directions (2 if bidirectional, else 1), L layers, N rows of packed data; V rows and E columns of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from nlpkernels import _ops, reference
from nlpkernels._giving_way import is_complex, is_torchs, refuse, refuse_nested

__all__ = ["embedding", "embedding_bag", "embedding_dot", "gru", "lstm", "rnn_relu", "rnn_tanh"]


def _layers(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    return_state_sequence: bool,
    recurrent_dropout: float,
) -> Any:
    """Output and final states: (y, h_n, c_n) of an LSTM, else (y, h_n)."""
    directions = 2 if bidirectional else 1
    _check_probability(cell, "dropout", dropout)
    _check_probability(cell, "recurrent_dropout", recurrent_dropout)
    draws = train and recurrent_dropout > 0
    is_in_onnx = batch_sizes is None and len(params) == num_layers * directions * (4 if has_biases else 2)
    has_onnx = is_in_onnx and not (return_state_sequence or draws)
    if is_torchs(input, batch_sizes, h0, c0, *params, has_onnx=has_onnx) or is_complex(input):
        refuse(cell, return_state_sequence=return_state_sequence, recurrent_dropout=draws)
        hx = h0 if c0 is None else (h0, c0)
        rest = (params, has_biases, num_layers, dropout, train, bidirectional)
        function = getattr(torch, cell)
        if batch_sizes is None:
            return function(input, hx, *rest, batch_first)
        return function(input, batch_sizes, hx, *rest)
    refuse_nested(cell, input)
    if num_layers < 1:
        raise ValueError(f"{cell}: expected num_layers of 1 or more, got {num_layers}")
    per_layer = len(params) // num_layers
    allowed = (2, 3) if not has_biases else (4, 5)
    if len(params) != per_layer * num_layers or per_layer // directions not in allowed or per_layer % directions:
        raise ValueError(
            f"{cell}: expected {allowed[0]} or, with a projection, {allowed[1]} parameters for each of {num_layers} "
            f"layers and {directions} directions with has_biases={has_biases}, got {len(params)} in all"
        )
    for name, state in (("hx", h0), ("cx", c0)):
        if not isinstance(state, Tensor) and (name == "hx" or cell == "lstm"):
            raise TypeError(f"{cell}: expected {name} to be a tensor, got {type(state).__name__}")
        if state is not None and (state.dim() != 3 or state.shape[0] != num_layers * directions):
            raise ValueError(
                f"{cell}: expected {name} of shape [{num_layers * directions}, batch, features], "
                f"got {list(state.shape)}"
            )
    if _ops.is_left_to_torch(input) and input.numel() > 0 and not (return_state_sequence or draws):
        check_shapes(cell, params, input.shape[-1], has_biases, num_layers, directions)
        states = (h0,) if c0 is None else (h0, c0)
        wants_derivative = torch.is_grad_enabled() and any(t.requires_grad for t in (input, *states, *params))
        # cuDNN goes back only where it was told to train; without dropout that is the same.
        dropout, train = dropout if train else 0.0, train or wants_derivative
        rest = (list(params), has_biases, num_layers, dropout, train, bidirectional)
        return _by_torch(getattr(torch, cell), input, states, rest, batch_first, batch_sizes)
    transposed = batch_first and batch_sizes is None
    x = input.transpose(0, 1) if transposed else input
    h_ns, c_ns = [], []
    for layer in range(num_layers):
        if layer > 0 and train and dropout > 0:
            x = torch.dropout(x, dropout, True)
        own = slice(layer * directions, (layer + 1) * directions)
        weights = list(params[layer * per_layer : (layer + 1) * per_layer])
        h_mask = None
        if draws:
            h_mask = torch.dropout(torch.ones_like(h0[own]), recurrent_dropout, True)
        try:
            x, h_n, c_n, c = _ops.recurrent(
                x, batch_sizes, h0[own], None if c0 is None else c0[own], weights, cell, return_state_sequence, h_mask
            )
        except TypeError:
            _refuse_others(cell, params)
            raise
        if return_state_sequence:  # a layer's output is its h: [T, B, D P] -> [D, T, B, P]
            h_n, c_n = x.unflatten(-1, (directions, -1)).movedim(-2, 0), c_n if c is None else c
            if transposed:
                h_n, c_n = h_n.transpose(1, 2), c_n if c is None else c_n.transpose(1, 2)
        h_ns.append(h_n)
        c_ns.append(c_n)
    y = x.transpose(0, 1) if transposed else x
    h_n = h_ns[0] if num_layers == 1 else torch.cat(h_ns)
    if c0 is None:
        return y, h_n
    return y, h_n, c_ns[0] if num_layers == 1 else torch.cat(c_ns)


def _check_probability(function: str, name: str, p: float) -> None:
    try:
        fits = 0 <= p <= 1  # not of NaN
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"{function}: expected {name} to be a number from 0 to 1, got {p!r}")


def _refuse_others(function: str, params: Sequence[Tensor]) -> None:
    """Say which of the parameters is not a tensor, if one is not. After an error: it takes time that a call has not."""
    for i, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(f"{function}: expected params to be tensors, got {type(param).__name__} in params[{i}]")


def _by_torch(
    function: Callable[..., tuple[Tensor, ...]],
    input: Tensor,
    states: tuple[Tensor, ...],
    rest: tuple[Any, ...],
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """What torch's own function gives, which wants every step and every sequence to be there."""
    batch = states[0].shape[1] if batch_sizes is None else int(batch_sizes[0])
    running = tuple(state[:, :batch].contiguous() for state in states)
    hx = running if len(running) > 1 else running[0]
    if batch_sizes is None:
        y, *final = function(input, hx, *rest, batch_first)
    else:
        y, *final = function(input, batch_sizes[batch_sizes > 0], hx, *rest)
        final = [torch.cat([state, initial[:, batch:]], 1) for state, initial in zip(final, states, strict=True)]
    return y, *final


def check_shapes(
    cell: str, params: Sequence[Tensor], inputs: int, has_biases: bool, num_layers: int = 1, directions: int = 1
) -> None:
    """Refuse parameters that do not fit one another, or that many inputs, before torch's own functions see them."""
    rows = params[1].shape[0] if len(params) > 1 else 0
    hidden = rows // reference.CELLS[cell].gates
    per_direction = len(params) // (num_layers * directions)
    projected = per_direction % 2 == 1
    features = params[per_direction - 1].shape[0] if projected else hidden
    expected: list[tuple[int, ...]] = []
    for place in range(num_layers * directions):
        expected += [(rows, inputs if place < directions else directions * features), (rows, features)]
        expected += [(rows,)] * 2 * has_biases + [(features, hidden)] * projected
    got = [tuple(param.shape) for param in params]
    if got != expected:
        raise RuntimeError(f"{cell}: expected parameters of shapes {expected}, got {got}")


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    return_state_sequence: bool = False,
    recurrent_dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the layers of an LSTM over a sequence: `torch.lstm`.

    The equations are those of `torch.nn.LSTM` (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000,
    no peepholes; projection as in Sak et al. 2014).

    Args:
        input: [T, B, I], [B, T, I] if batch_first, or packed data [N, I] with batch_sizes.
        hx: (h_0, c_0), [L D, B, P] and [L D, B, H].
        params: for each layer and direction weight_ih [4 H, I or D P], weight_hh [4 H, P], then bias_ih, bias_hh [4 H]
            if has_biases, then weight_hr [P, H] if there is a projection.
        has_biases: whether params hold biases.
        num_layers: L.
        dropout: probability with which an output of all but the last layer is zeroed, if train.
        train: whether to apply dropout.
        bidirectional: whether there are two directions; their outputs are concatenated.
        batch_first: whether input and output have the batch in front.
        batch_sizes: of a PackedSequence, int64 [T] on the CPU.
        return_state_sequence: whether to return, in the place of h_n and c_n, the states after every step of every
            layer (haste's name for it): [L D, T, B, P] and [L D, T, B, H], with steps and batch laid out as in output.
        recurrent_dropout: probability with which a feature of h_{t-1} is zeroed where W_hh multiplies it, if train:
            one mask for all steps, drawn for each layer, direction and sequence (Gal & Ghahramani 2016; Keras' name).

    Returns:
        output [T, B, D P] (or as the input is laid out), h_n and c_n like hx, all in input's dtype: float32, float64,
        or bfloat16 and float16, for which arithmetic and states inside the loop are float32. Complex input is left to
        torch.

    Raises:
        TypeError: one of hx or params is not a tensor.
        ValueError: the number of params or of layers or a state's shape does not fit, a probability is none, or input
            is nested.
        RuntimeError: a weight's shape, dtype or device does not fit.
        NotImplementedError: what torch.lstm has not is wanted of a call that is left to it: see `_giving_way.py`.
    """
    result: tuple[Tensor, Tensor, Tensor] = _layers(
        "lstm", input, hx[0], hx[1], params, has_biases, num_layers, dropout, train, bidirectional, batch_first,
        batch_sizes, return_state_sequence, recurrent_dropout,
    )  # fmt: skip
    return result


def gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    return_state_sequence: bool = False,
    recurrent_dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run the layers of a GRU over a sequence: `torch.gru`.

    The equations are those of `torch.nn.GRU` (Cho et al. 2014, with the reset gate applied after the matrix product).
    Arguments as for `lstm`, with hx a tensor [L D, B, H] and weights of 3 H rows; returns output and h_n.
    """
    result: tuple[Tensor, Tensor] = _layers(
        "gru", input, hx, None, params, has_biases, num_layers, dropout, train, bidirectional, batch_first,
        batch_sizes, return_state_sequence, recurrent_dropout,
    )  # fmt: skip
    return result


def rnn_tanh(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    return_state_sequence: bool = False,
    recurrent_dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run the layers of an Elman RNN (Elman 1990) with tanh over a sequence: `torch.rnn_tanh`.

    Arguments as for `lstm`, with hx a tensor [L D, B, H] and weights of H rows; returns output and h_n.
    """
    result: tuple[Tensor, Tensor] = _layers(
        "rnn_tanh", input, hx, None, params, has_biases, num_layers, dropout, train, bidirectional, batch_first,
        batch_sizes, return_state_sequence, recurrent_dropout,
    )  # fmt: skip
    return result


def rnn_relu(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    return_state_sequence: bool = False,
    recurrent_dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run the layers of an Elman RNN with max(x, 0) in the place of tanh: `torch.rnn_relu`; see `rnn_tanh`."""
    result: tuple[Tensor, Tensor] = _layers(
        "rnn_relu", input, hx, None, params, has_biases, num_layers, dropout, train, bidirectional, batch_first,
        batch_sizes, return_state_sequence, recurrent_dropout,
    )  # fmt: skip
    return result


def _renormalise(max_norm: float, norm_type: float, weight: Tensor, ids: Tensor, *bags: Any) -> None:
    """Scale the rows in use down to max_norm, in place, for a call of `_ops.embedding_bag` with the other arguments."""
    with torch.no_grad():
        _ops.embedding_bag(weight, ids, *bags)  # raises what there is to raise before the table changes
        offsets, *_, include_last_offset, _, _ = bags
        if include_last_offset and not torch.compiler.is_compiling():
            ids = ids[: int(offsets[-1])]
        torch.embedding_renorm_(weight.detach(), ids.contiguous(), max_norm, norm_type)


def _check_ids(function: str, ids: Tensor, name: str = "input (the indices)") -> None:
    dtype = getattr(ids, "dtype", None)
    if dtype is not torch.int64 and dtype is not torch.int32:
        got = dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{function}: expected {name} of dtype int32 or int64, got {got}")


def _check_table(function: str, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"{function}: weight has to be a 2D Tensor, but got Tensor of dimension {weight.dim()}")


def _wrap_padding(function: str, padding_idx: int | None, rows: int) -> int:
    """padding_idx as a row, negative ones counted from the end; -1 for None."""
    if padding_idx is None:
        return -1
    if not -rows <= padding_idx < rows:
        raise AssertionError(
            f"{function}: padding_idx must be within num_embeddings: expected {-rows} to {rows - 1}, got {padding_idx}"
        )
    return padding_idx % rows


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look rows of a table up: `torch.nn.functional.embedding`.

    Args:
        input: indices, int32 or int64, any shape, nested too.
        weight: the table, [V, E]. One of another dtype than float32, float64, bfloat16 and float16 is left to torch.
        padding_idx: a row that gets no gradient; negative counts from the end.
        max_norm: rows in use with a larger norm are scaled down to it first, in place.
        norm_type: p of that p-norm.
        scale_grad_by_freq: divide a row's gradient by the number of its uses.
        sparse: return weight's gradient as a sparse tensor, torch's own: each index with its incoming gradient, as they
            are. With scale_grad_by_freq, which torch refuses, it is coalesced.

    Returns:
        Rows, [*input.shape, E].

    Raises:
        AssertionError: padding_idx is not a row of weight.
        IndexError: an index is not a row of weight; it is named with its position. An error leaves weight as it was.
        TypeError: input is not int32 or int64.
        ValueError: weight is not 2-D.
    """
    options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if is_torchs(input, weight):
        return torch.nn.functional.embedding(input, weight, *options)
    if has_torch_function_variadic(input, weight):  # a mode, or jagged indices
        if not getattr(input, "is_nested", False):
            return handle_torch_function(embedding, (input, weight), input, weight, *options)
        rows = embedding(input.values(), weight, *options)
        offsets, lengths, ragged = input.offsets(), input.lengths(), input._ragged_idx  # type: ignore[attr-defined]
        return torch.nested.nested_tensor_from_jagged(rows, offsets, lengths, ragged)
    _check_ids("embedding", input)
    _check_table("embedding", weight)
    padding = _wrap_padding("embedding", padding_idx, weight.shape[0])
    is_left = weight.dtype not in reference.DTYPES or input.is_nested
    if not (is_left or sparse) and _ops.is_left_to_torch(weight) and input.device == weight.device:
        is_left = _ops.optimizer_of(weight) is None
        reference.refuse_wrong_indices("embedding", input, weight.shape[0])
    is_torchs_to_differentiate = sparse and not scale_grad_by_freq and _ops.has_torchs_sparse_gradient(input, weight)
    if is_torchs_to_differentiate and not is_left:
        if max_norm is None and (found := _ops.lookup(input, weight, padding_idx, False, True)) is not None:
            return found
        reference.refuse_wrong_indices("embedding", input, weight.shape[0])
        is_left = input.device == weight.device
    if is_left:
        return torch.nn.functional.embedding(input, weight, *options)
    bags = (None, None, "lookup", padding, False, scale_grad_by_freq, sparse)
    if max_norm is not None:
        _renormalise(max_norm, norm_type, weight, input, *bags)
    return _ops.embedding_bag(weight, input, *bags)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Pool rows of a table bag by bag, never storing the rows: `torch.nn.functional.embedding_bag`.

    Args:
        input: indices, int32 or int64: [B, L], a bag per row; or [N], with offsets; or a jagged nested tensor.
        weight: the table, [V, E].
        offsets: where each bag of a 1-D input begins, [B], starting with 0 and never decreasing; with
            include_last_offset [B + 1], the last one being where the last bag ends: what is after it is in no bag.
        max_norm: rows in use with a larger norm are scaled down to it first, in place.
        norm_type: p of that p-norm.
        scale_grad_by_freq: divide a row's gradient by the number of its uses (not for "max").
        mode: "mean", "sum" or "max".
        sparse: return weight's gradient as a coalesced sparse tensor (not for "max").
        per_sample_weights: a factor w for each index, shaped like input. Beyond torch, which takes it for "sum" only:
            "mean" is then the weighted mean, sum(w row) / sum(w), the divisor being 1 where sum(w) is 0, and "max" is
            the maximum of w row, for which the rows are stored one by one.
        include_last_offset: see offsets.
        padding_idx: indices that are in no bag, and do not count in a mean; negative counts from the end.

    Returns:
        [B, E]; zeros for an empty bag.

    Raises:
        AssertionError: padding_idx is not a row of weight.
        IndexError: an index is not a row of weight; it is named with its position. An error leaves weight as it was.
        RuntimeError: the dtype of weight or per_sample_weights, or a device, does not fit.
        TypeError: input or offsets are not int32 or int64.
        ValueError: a shape, an offset or mode does not fit.
    """
    tensors = (input, weight, offsets, per_sample_weights)
    options = (
        max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding_idx
    )  # fmt: skip
    if is_torchs(*tensors):
        return torch.nn.functional.embedding_bag(input, weight, offsets, *options)
    if has_torch_function_variadic(*tensors):  # a mode, or jagged indices
        return handle_torch_function(embedding_bag, tensors, input, weight, offsets, *options)
    _check_ids("embedding_bag", input)
    _check_table("embedding_bag", weight)
    if per_sample_weights is not None and input.size() != per_sample_weights.size():
        raise ValueError(
            f"embedding_bag: If per_sample_weights ({per_sample_weights.shape}) is not None, "
            f"then it must have the same shape as the input ({input.shape})"
        )
    if mode not in ("sum", "mean", "max"):
        raise ValueError(f"mode has to be one of sum, mean or max, got {mode!r}")
    if mode == "max" and scale_grad_by_freq:
        raise ValueError("max mode does not support scaling the gradient by the frequency")
    if mode == "max" and sparse:
        raise ValueError("max mode does not support sparse weights")
    if input.is_nested:  # jagged: its own offsets are those of the bags, the last one included
        if per_sample_weights is not None and not per_sample_weights.is_nested:
            raise ValueError("If input is nested, then per_sample_weights must be nested if specified")
        input = input.contiguous()  # without holes
        offsets, include_last_offset = input.offsets(), True  # type: ignore[attr-defined]
        input = input.values()
        per_sample_weights = None if per_sample_weights is None else per_sample_weights.contiguous().values()
    elif input.dim() == 2:
        if offsets is not None:
            raise ValueError(
                "if input is 2D, then offsets has to be None, as input is treated is a mini-batch of fixed length "
                f"sequences. However, found offsets of type {type(offsets)}"
            )
        include_last_offset = False
    elif input.dim() == 1:
        if offsets is None:
            raise ValueError("offsets has to be a 1D Tensor but got None")
        if offsets.dim() != 1:
            raise ValueError(f"offsets has to be a 1D Tensor, got {offsets.dim()}D")
    else:
        raise ValueError(f"input has to be 1D or 2D Tensor, but got Tensor of dimension {input.dim()}")
    padding = _wrap_padding("embedding_bag", padding_idx, weight.shape[0])
    if per_sample_weights is not None and per_sample_weights.dtype != weight.dtype:
        raise RuntimeError(
            f"embedding_bag: expected per_sample_weights of dtype {weight.dtype} like weight, "
            f"got {per_sample_weights.dtype}"
        )
    if max_norm is not None:
        weighable = mode if per_sample_weights is None else "sum"
        bags = (offsets, per_sample_weights, weighable, padding, include_last_offset, False, False)
        _renormalise(max_norm, norm_type, weight, input, *bags)
    if per_sample_weights is not None and mode != "sum":
        for name, tensor in (("input", input), ("per_sample_weights", per_sample_weights)):
            reference.refuse_shrunk("embedding_bag", name, tensor)
        position = torch.arange(input.numel(), device=input.device).reshape(input.shape)
        if mode == "max":
            # In no bag: their rows may hold anything, and those past the last bag need not be rows at all.
            outside = input == padding
            if offsets is not None and (include_last_offset or offsets.numel() == 0):
                past = position >= (offsets[-1] if offsets.numel() > 0 else 0)
                outside, input = outside | past, input.masked_fill(past, 0)
            ids = input.reshape(-1)
            rows = _ops.embedding_bag(weight, ids, None, None, "lookup", padding, False, False, False)
            rows = rows.masked_fill(outside.reshape(-1, 1), 0) * per_sample_weights.reshape(-1, 1)
            # Each index is a row of its own, and those outside one more, in which nothing stands.
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
            position = position.masked_fill(outside, input.numel())
            return _ops.embedding_bag(
                rows, position, offsets, None, "max", input.numel(), include_last_offset, False, False
            )
        counted = per_sample_weights.masked_fill(input == padding, 0).reshape(-1, 1)
        divisor = _ops.embedding_bag(counted, position, offsets, None, "sum", -1, include_last_offset, False, False)
        pooled = _ops.embedding_bag(
            weight, input, offsets, per_sample_weights, "sum", padding, include_last_offset, scale_grad_by_freq, sparse
        )
        return pooled / divisor.masked_fill(divisor == 0, 1)
    return _ops.embedding_bag(
        weight, input, offsets, per_sample_weights, mode, padding, include_last_offset, scale_grad_by_freq, sparse
    )


def embedding_dot(h: Tensor, weight: Tensor, indices: Tensor, *, sparse: bool = False) -> Tensor:
    """Multiply each of h with some rows of a table, never storing the rows: the scores of a sampled loss.

        scores[b, k] = h[b] . weight[indices[b, k]]

    Args:
        h: vectors, [B, E].
        weight: the table, [V, E], in h's dtype: float32, float64, bfloat16 or float16. Autocast brings h to its dtype.
        indices: int32 or int64, [B, K].
        sparse: return weight's gradient as a coalesced sparse tensor.

    Returns:
        [B, K] in weight's dtype; sums are in float32 for bfloat16 and float16.

    Raises:
        IndexError: an index is not a row of weight; it is named with its position.
        RuntimeError: h's shape, dtype or device does not fit.
        TypeError: indices are not int32 or int64.
        ValueError: weight or indices are not 2-D, or a tensor is not dense.
    """
    if is_torchs(h, weight, indices) or is_complex(weight):
        rows = torch.nn.functional.embedding(indices, weight, sparse=sparse)
        return torch.matmul(rows, h.unsqueeze(2)).squeeze(2)
    if has_torch_function_variadic(h, weight, indices):  # a mode
        return handle_torch_function(embedding_dot, (h, weight, indices), h, weight, indices, sparse=sparse)
    for name, tensor in (("h", h), ("weight", weight), ("indices", indices)):
        if isinstance(tensor, Tensor) and (tensor.is_nested or tensor.layout != torch.strided):
            got = "one that is nested" if tensor.is_nested else tensor.layout
            raise ValueError(f"embedding_dot: expected {name} to be a dense tensor, got {got}")
    _check_ids("embedding_dot", indices, "indices")
    _check_table("embedding_dot", weight)
    if indices.dim() != 2:
        raise ValueError(f"embedding_dot: expected indices of shape [B, K], got {list(indices.shape)}")
    return _ops.embedding_dot(h, weight, indices, sparse)
