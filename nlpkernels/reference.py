"""The equations in plain torch, differentiable to any order and on any device.

They are the tests' oracle, the source of second derivatives, what runs where there is no kernel, and the place to read
what the kernels compute. Each function stands for the op of its name (`csrc/library.cpp` says what the
arguments are) and returns the same outputs. The gate equations are those of `torch.nn.RNN`, `torch.nn.LSTM` and
`torch.nn.GRU`; `cell_step` is the only place in Python where they stand.

Letters in shapes: T steps, B sequences, N rows of data, I input features, H hidden units, P features of h,
D directions, G gates, S saved values per unit; V rows and E columns of a table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.utils._python_dispatch import _disable_current_modes


class Cell(NamedTuple):
    """Constants of a cell: gates in its weights, values per hidden unit in the workspace, whether it has a state c."""

    gates: int
    saved: int
    has_c: bool


# What kernels take.
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

CELLS = {
    "rnn_tanh": Cell(gates=1, saved=0, has_c=False),
    "rnn_relu": Cell(gates=1, saved=0, has_c=False),
    "lstm": Cell(gates=4, saved=5, has_c=True),
    "gru": Cell(gates=3, saved=4, has_c=False),
}


# --- Recurrent layers ------------------------------------------------------------------------------------------------


def facts_of(cell: str) -> Cell:
    """The constants of the cell of that name."""
    if cell not in CELLS:
        raise ValueError(f"recurrent: expected cell {', '.join(map(repr, CELLS))}, got {cell!r}")
    return CELLS[cell]


def cell_step(cell: str, from_x: Tensor, from_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One step of a cell.

    Args:
        cell: a key of `CELLS`.
        from_x: W_ih x_t + b_ih, [B, G H].
        from_h: W_hh h_{t-1} + b_hh, [B, G H]; h_{t-1} may be under a mask here.
        h: h_{t-1}, [B, P].
        c: c_{t-1}, [B, H], of the LSTM; passed through for the others.

    Returns:
        h_t (before a projection), c_t, and the values that backward needs, each [B, H].
    """
    if cell == "rnn_tanh":
        return torch.tanh(from_x + from_h), c, []
    if cell == "rnn_relu":
        return torch.relu(from_x + from_h), c, []
    if cell == "lstm":
        a_i, a_f, a_g, a_o = (from_x + from_h).chunk(4, dim=-1)
        i, f, g, o = torch.sigmoid(a_i), torch.sigmoid(a_f), torch.tanh(a_g), torch.sigmoid(a_o)
        c = f * c + i * g
        return o * torch.tanh(c), c, [i, f, g, o, c]
    if cell == "gru":
        x_r, x_z, x_n = from_x.chunk(3, dim=-1)
        h_r, h_z, h_n = from_h.chunk(3, dim=-1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return n + z * (h - n), c, [r, z, n, h_n]
    raise ValueError(f"recurrent: there is no step of a cell {cell!r}")


def cell_states(workspace: Tensor) -> Tensor:
    """Return c after each step of an LSTM, [D, N, H], from its workspace, [D, N, S, H]: the last value saved."""
    return workspace[:, :, -1]


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp`, which is declared to return more than it does."""
    outputs, pull, *_ = torch.func.vjp(function, *primals)
    return outputs, pull


def _transforms_allowed() -> AbstractContextManager[None]:
    """For transforms in a kernel that is called inside of a mode's `__torch_dispatch__`, where torch excludes them."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("FuncTorchGradWrapper", "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    guard: Any = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    return guard  # type: ignore[no-any-return]


def _arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _readable(tensor: Tensor) -> Tensor | None:
    """What is under torch.func's wrappers, if it has values to look at; of what is traced, kernels look when they run.

    A fake has none, and in a graph there is no place for an error.
    """
    if torch.compiler.is_compiling():
        return None
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and not is_legacy_batchedtensor(tensor)
    return tensor if is_plain and tensor.device.type != "meta" else None


def _unseen_by_modes() -> AbstractContextManager[object]:
    """For checks of values, which are no part of what a mode traces or counts."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() > 0 else nullcontext()


def refuse_shrunk(op: str, name: str, given: Tensor) -> None:
    """Raise if a storage has been made smaller than its tensor, which torch's own functions do not notice."""
    tensor = _readable(given)
    if tensor is None or tensor.numel() == 0:
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if tensor.untyped_storage().nbytes() < needed:
        raise RuntimeError(
            f"{op}: expected {name} with memory for all of its values, got a storage of "
            f"{tensor.untyped_storage().nbytes()} bytes"
        )


def _refuse_strange(op: str, tensors: dict[str, Tensor | None], dtype: torch.dtype) -> None:
    """Raise unless all these tensors are dense and of that dtype, which is one that kernels take."""
    if dtype not in DTYPES:
        raise RuntimeError(f"{op}: expected a floating dtype (float32, float64, bfloat16 or float16), got {dtype}")
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != dtype or tensor.layout != torch.strided):
            raise RuntimeError(
                f"{op}: expected {name} to be a dense tensor of dtype {dtype}, got {tensor.layout} of {tensor.dtype}"
            )
        if tensor is not None:
            refuse_shrunk(op, name, tensor)


def _check_recurrent(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    h_mask: Tensor | None,
) -> None:
    """What csrc/checks.h checks for the kernels."""
    facts = facts_of(cell)
    tensors = {"x": x, "h0": h0, "c0": c0, "h_mask": h_mask} | {f"weights[{i}]": w for i, w in enumerate(weights)}
    _refuse_strange("recurrent", tensors, x.dtype)
    if h0.dim() != 3 or h0.shape[0] not in (1, 2):
        raise RuntimeError(
            f"recurrent: expected h0 of shape [1 or 2 directions, batch, features], got {list(h0.shape)}"
        )
    directions, batch, features = h0.shape
    per_direction = len(weights) // directions
    if len(weights) != per_direction * directions or per_direction not in ((2, 3, 4, 5) if facts.has_c else (2, 4)):
        raise RuntimeError(
            f"recurrent: expected 2 or 4 weights for each of {directions} directions, of an LSTM with a projection one "
            f"more, got {len(weights)}"
        )
    if x.dim() not in ((2, 3) if batch_sizes is None else (2,)):
        raise RuntimeError(f"recurrent: expected x of shape [steps, batch, features], [batch, features] or, packed, "
                           f"[rows, features], got {list(x.shape)}")  # fmt: skip
    rows = weights[0].shape[0] if weights[0].dim() else 0
    hidden = rows // facts.gates
    if (c0 is not None) != facts.has_c or hidden == 0:
        raise RuntimeError(
            f"recurrent: expected weights of at least one hidden unit, and c0 for an LSTM only, got weight_ih of shape "
            f"{list(weights[0].shape)} and {'no c0' if c0 is None else 'c0'} for {cell!r}"
        )
    shapes: dict[str, tuple[int, ...]] = {"c0": (directions, batch, hidden), "h_mask": (directions, batch, features)}
    for d in range(directions):
        own = [(hidden * facts.gates, x.shape[-1]), (hidden * facts.gates, features)]
        own += [(hidden * facts.gates,)] * (2 if per_direction > 3 else 0)  # type: ignore[list-item]
        own += [(features, hidden)] * (per_direction % 2)
        shapes |= {f"weights[{d * per_direction + i}]": shape for i, shape in enumerate(own)}
    if per_direction % 2 == 0:
        shapes["h0"] = (directions, batch, hidden)
    if batch_sizes is None:
        shapes["x"] = (*x.shape[:-2], batch, x.shape[-1])
    else:
        if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
            raise RuntimeError(
                f"recurrent: expected batch_sizes to be a 1-D int64 tensor on the CPU, got {batch_sizes.dim()}-D "
                f"{batch_sizes.dtype} on {batch_sizes.device}"
            )
        sizes = batch_sizes.tolist()
        if any(not 0 <= size <= limit for limit, size in zip([batch, *sizes], sizes, strict=False)):
            raise RuntimeError(
                f"recurrent: expected batch_sizes of 0 or more that never increase, from {batch} on (the batch of h0), "
                f"got {sizes}"
            )
        shapes["x"] = (sum(sizes), x.shape[-1])
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(f"recurrent: expected {name} of shape {list(shape)}, got {list(tensor.shape)}")


def recurrent(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    keep: bool,
    h_mask: Tensor | None,
    rounded: Callable[[Tensor], Tensor] = lambda rows: rows,
    rounded_h: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer: y [T, B, D P] or as x has it, h_n [D, B, P], c_n [D, B, H] or [0], workspace [D, N, S, H] or [0].

    What weights multiply is rounded first: rows of h by `rounded_h`, and by `rounded` those of x, and of h where it is
    projected.
    """
    _check_recurrent(x, batch_sizes, h0, c0, weights, cell, h_mask)
    facts, dtype = facts_of(cell), x.dtype
    directions, batch, _ = h0.shape
    per_direction = len(weights) // directions
    if batch_sizes is None:
        sizes = [batch] * (x.shape[0] if x.dim() == 3 else 1)
    else:
        sizes = [int(size) for size in batch_sizes.tolist()]
    # Data in [N, I]; the rows of step t are first[t] up to first[t] + sizes[t].
    first = [0, *itertools.accumulate(sizes)]
    wide = _arithmetic_dtype(dtype)
    rows = x.reshape(-1, x.shape[-1]).to(wide)

    ys, h_ns, c_ns, kept = [], [], [], []
    for d in range(directions):
        w_ih, w_hh, *rest = (weight.to(wide) for weight in weights[d * per_direction : (d + 1) * per_direction])
        w_hr = rest.pop() if per_direction % 2 else None
        b_ih, b_hh = rest or (None, None)
        hidden = w_ih.shape[0] // facts.gates
        from_x = torch.nn.functional.linear(rounded(rows), w_ih, b_ih)
        h = h0[d].to(wide)
        c = c0[d].to(wide) if c0 is not None else h
        outputs: list[Tensor] = [h[:0]] * len(sizes)
        saved_rows: list[Tensor] = [h.new_empty(0, facts.saved, hidden)] * len(sizes)
        for t in range(len(sizes)) if d == 0 else reversed(range(len(sizes))):
            size = sizes[t]
            h_step, c_step = h[:size], c[:size]
            h_factor = h_step if h_mask is None else h_step * h_mask[d, :size].to(wide)
            from_h = torch.nn.functional.linear(rounded_h(h_factor), w_hh, b_hh)
            h_step, c_step, saved = cell_step(cell, from_x[first[t] : first[t] + size], from_h, h_step, c_step)
            if w_hr is not None:
                h_step = torch.nn.functional.linear(rounded(h_step), w_hr)
            outputs[t] = h_step
            if keep and saved:
                saved_rows[t] = torch.stack(saved, dim=1)
            h = torch.cat([h_step, h[size:]]) if size < batch else h_step
            c = torch.cat([c_step, c[size:]]) if size < batch else c_step
        ys.append(torch.cat([h[:0], *outputs]))
        kept.append(
            torch.cat([h.new_empty(0, facts.saved, hidden), *saved_rows])
            if facts.saved
            else h.new_empty(rows.shape[0], 0, hidden)
        )
        h_ns.append(h)
        c_ns.append(c)
    y = torch.cat(ys, dim=-1).to(dtype)
    return (
        y.reshape(*x.shape[:-1], y.shape[-1]),
        torch.stack(h_ns).to(dtype),
        torch.stack(c_ns).to(dtype) if facts.has_c else x.new_empty(0),
        torch.stack(kept).to(dtype) if keep else x.new_empty(0),
    )


def recurrent_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    y: Tensor,
    workspace: Tensor,
    need_dx: bool,
    need_dweights: bool,
    h_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of `recurrent`; y and workspace, being functions of the other arguments, are computed anew."""
    gradients = (dy, dh_n, dc_n, None)
    return _recurrent_gradients(gradients, x, batch_sizes, h0, c0, weights, cell, need_dx, need_dweights, h_mask)


def recurrent_states_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dworkspace: Tensor,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    cell: str,
    need_dx: bool,
    need_dweights: bool,
    h_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The same, given a gradient of the workspace too."""
    gradients = (dy, dh_n, dc_n, dworkspace)
    return _recurrent_gradients(gradients, x, batch_sizes, h0, c0, weights, cell, need_dx, need_dweights, h_mask)


def _recurrent_gradients(
    gradients: tuple[Tensor | None, ...],
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    need_dx: bool,
    need_dweights: bool,
    h_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of `recurrent`, given those of its outputs, None for zeros."""

    def outputs(x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor]) -> tuple[Tensor, ...]:
        return recurrent(x, batch_sizes, h0, c0, weights, cell, gradients[3] is not None, h_mask)

    with _transforms_allowed():
        if c0 is not None:
            values, pull = vjp(outputs, x, h0, c0, weights)
        else:
            values, pull = vjp(lambda x, h0, weights: outputs(x, h0, None, weights), x, h0, weights)
        dx, dh0, *dc0, dweights = pull(
            tuple(torch.zeros_like(v) if g is None else g for g, v in zip(gradients, values, strict=True))
        )
    return (
        dx if need_dx else x.new_empty(0),
        dh0,
        dc0[0] if dc0 else x.new_empty(0),
        list(dweights) if need_dweights else [x.new_empty(0) for _ in weights],
    )


# --- Frozen layers ---------------------------------------------------------------------------------------------------

# By the dtype in which packed weights are stored: how many make a word of 32 bits.
_VALUES_OF_WORD = {torch.uint8: 4, torch.int16: 2}
_PANEL = 16


def recurrent_frozen(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor | None, weights: list[Tensor], cell: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The first outputs of `recurrent`."""
    return recurrent(x, batch_sizes, h0, c0, weights, cell, False, None)[:3]


class FrozenWeights(NamedTuple):
    """One direction of a frozen layer: matrices of int8 or bfloat16, of int8 with a scale for each row, and biases."""

    w_ih: Tensor
    w_hh: Tensor
    w_hr: Tensor | None
    scales: tuple[Tensor, ...]
    """[G H] of W_ih, [G H] of W_hh and, if there is a projection, [P] of W_hr, float32; none of bfloat16."""
    b_ih: Tensor
    """[G H], float32; where both biases only ever add up, b_hh is in it, and zeros in its place."""
    b_hh: Tensor


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as int8, -127 to 127, and the scale of each row, float32: its largest magnitude over 127."""
    scale = weight.float().abs().amax(1) / 127 if weight.shape[1] else weight.new_zeros(weight.shape[0]).float()
    steps = weight.float() / torch.where(scale > 0, scale, 1).unsqueeze(1)
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def round_as(dtype: torch.dtype, rows: Tensor, digits: int = 1) -> Tensor:
    """Rows as weights of a dtype multiply them: bfloat16, or whole multiples of a row's largest magnitude over 127.

    Of two digits it is over 127 * 128: a state's.
    """
    most_steps = 127 if digits == 1 else 127 * 128
    if dtype == torch.bfloat16:
        return rows.bfloat16().to(rows.dtype)
    if rows.shape[-1] == 0:
        return rows
    most = rows.abs().amax(-1, keepdim=True)
    rounded = (rows * (most_steps / most)).round() * (most / most_steps)
    return torch.where(most < 1e-30, 0, torch.where(most.isfinite(), rounded, torch.nan))


def pack_frozen(weights: FrozenWeights, cell: str) -> list[Tensor]:
    """Packed weights and their factors, [*], as the op `frozen` takes them: see csrc/cpu/narrow.h."""
    gates = facts_of(cell).gates
    matrices = [(weights.w_ih, gates), (weights.w_hh, gates)]
    if weights.w_hr is not None:
        matrices.append((weights.w_hr, 1))
    packed = torch.cat([_pack_matrix(_as_stored(matrix), gates) for matrix, gates in matrices])
    hidden = weights.w_ih.shape[0] // gates
    b_ih, b_hh = weights.b_ih.view(gates, hidden), weights.b_hh.view(gates, hidden)
    slots = torch.cat([b_ih[:2] + b_hh[:2], b_hh[2:], b_ih[2:]]) if cell == "gru" else b_ih + b_hh
    factors = [_pack_vectors(slots)]
    factors += [_pack_vectors(scale.view(g, -1)) for scale, (_, g) in zip(weights.scales, matrices, strict=False)]
    return [packed, torch.cat(factors).view(torch.int32)]


def unpack_frozen(packed: Tensor, factors: Tensor, cell: str, inputs: int, hidden: int, features: int) -> FrozenWeights:
    """What `pack_frozen` was given, for x of `inputs` features, H units and P features of h."""
    facts, values = facts_of(cell), _VALUES_OF_WORD[packed.dtype]
    gates, slots = facts.gates, 4 if cell == "gru" else facts.gates
    shapes = [(gates, hidden, inputs), (gates, hidden, features)]
    if features != hidden:
        shapes.append((1, features, hidden))
    sizes = [g * _padded(units, _PANEL) * _padded(k, values) for g, units, k in shapes]
    if packed.numel() != sum(sizes):
        raise RuntimeError(f"frozen: expected {sum(sizes)} packed weights, got {packed.numel()}")
    matrices = [
        _as_plain(_unpack_matrix(part, *shape)) for part, shape in zip(packed.split(sizes), shapes, strict=True)
    ]
    rows = [(slots, hidden), *((g, units) for g, units, _ in shapes if values == 4)]
    parts = factors.view(torch.float32).split([g * _padded(units, _PANEL) for g, units in rows])
    bias, *scales = (_unpack_vectors(part, *shape) for part, shape in zip(parts, rows, strict=True))
    b_ih, b_hh = bias, torch.zeros_like(bias)
    if cell == "gru":
        b_ih, b_hh = torch.cat([bias[:2], bias[3:]]), torch.cat([b_hh[:2], bias[2:3]])
    w_hr = matrices[2] if features != hidden else None
    flat = tuple(scale.reshape(-1) for scale in scales)
    return FrozenWeights(matrices[0], matrices[1], w_hr, flat, b_ih.reshape(-1), b_hh.reshape(-1))


def dequantise(weights: FrozenWeights) -> list[Tensor]:
    """The weights of `recurrent` in float32: W_ih, W_hh, b_ih, b_hh and, if there is one, W_hr."""
    matrices = [m.float() for m in (weights.w_ih, weights.w_hh, weights.w_hr) if m is not None]
    if weights.scales:
        matrices = [m * scale.unsqueeze(1) for m, scale in zip(matrices, weights.scales, strict=True)]
    return [*matrices[:2], weights.b_ih, weights.b_hh, *matrices[2:]]


def frozen(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    directions: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All layers, of int8 or bfloat16: y, h_n [L D, B, P], c_n [L D, B, H] or [0], c of all steps or [0]."""
    _check_frozen(x, h0, c0, weights, cell, directions, keep)
    hidden = h0.shape[2] if c0 is None else c0.shape[2]
    dtype = torch.int8 if weights[0].dtype == torch.uint8 else torch.bfloat16
    h_ns, c_ns, c = [], [], x.new_empty(0)
    for first in range(0, h0.shape[0], directions):
        own = slice(first, first + directions)
        plain = []
        for packed, factors in zip(weights[2 * first :: 2][:directions], weights[2 * first + 1 :: 2], strict=False):
            plain += dequantise(unpack_frozen(packed, factors, cell, x.shape[-1], hidden, h0.shape[2]))
        x, h_n, c_n, workspace = recurrent(
            x, batch_sizes, h0[own], None if c0 is None else c0[own], plain, cell, keep, None,
            lambda rows: round_as(dtype, rows), lambda rows: round_as(dtype, rows, 2),
        )  # fmt: skip
        h_ns.append(h_n)
        c_ns.append(c_n)
        if keep and c0 is not None:
            c = workspace[:, :, 4].contiguous()
    return x, torch.cat(h_ns), torch.cat(c_ns) if c0 is not None else x.new_empty(0), c


def _check_frozen(
    x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor], cell: str, directions: int, keep: bool
) -> None:
    """What csrc/cpu/frozen.cpp checks for its kernels."""
    if directions not in (1, 2):
        raise ValueError(f"frozen: expected 1 or 2 directions, got {directions}")
    if h0.dim() != 3 or h0.shape[0] == 0 or h0.shape[0] % directions:
        raise RuntimeError(
            f"frozen: expected h0 of shape [layers * {directions}, batch, features], got {list(h0.shape)}"
        )
    if (c0 is not None) != facts_of(cell).has_c or (c0 is not None and (c0.dim() != 3 or c0.shape[0] != h0.shape[0])):
        raise RuntimeError("frozen: expected c0 of as many layers as h0 for an LSTM, and else none")
    if len(weights) != 2 * h0.shape[0]:
        raise RuntimeError(
            f"frozen: expected packed weights and their factors for each of {h0.shape[0]} layers and directions, got "
            f"{len(weights)} tensors"
        )
    if keep and h0.shape[0] != directions:
        raise ValueError(f"frozen: expected one layer where all states are kept, got {h0.shape[0] // directions}")
    packed, factors = {w.dtype for w in weights[::2]}, {w.dtype for w in weights[1::2]}
    if len(packed) > 1 or not packed <= _VALUES_OF_WORD.keys() or factors != {torch.int32}:
        raise RuntimeError(
            "frozen: expected packed weights of one dtype, uint8 (int8) or int16 (bfloat16), and factors of int32, got "
            f"{', '.join(map(str, packed))} and {', '.join(map(str, factors))}"
        )
    if any(w.dim() != 1 or w.layout != torch.strided for w in weights):
        raise RuntimeError("frozen: expected packed weights and factors to be plain vectors")
    if x.dtype != torch.float32:
        raise RuntimeError(f"frozen: expected x of dtype float32, got {x.dtype}")
    for i, weight in enumerate(weights):
        refuse_shrunk("frozen", f"weights[{i}]", weight)


def _padded(count: int, whole: int) -> int:
    return -(-count // whole) * whole


def _as_stored(matrix: Tensor) -> Tensor:
    """Int8 with 128 added, as uint8; bfloat16 as the integers of its bits, which no .half() changes."""
    return (matrix.to(torch.int16) + 128).to(torch.uint8) if matrix.dtype == torch.int8 else matrix.view(torch.int16)


def _as_plain(stored: Tensor) -> Tensor:
    if stored.dtype == torch.uint8:
        return (stored.to(torch.int16) - 128).to(torch.int8)
    return stored.contiguous().view(torch.bfloat16)


def _of_group(gates: int) -> int:
    return max(1, 8 // gates)


def _pack_matrix(stored: Tensor, gates: int) -> Tensor:
    """[G H, K] -> groups of panels, one after the other, each [word of k, panel, gate, 16, value of word]."""
    values, (rows, k) = _VALUES_OF_WORD[stored.dtype], stored.shape
    units = rows // gates
    full = stored.new_zeros(gates, _padded(units, _PANEL), _padded(k, values))
    full[:, :units, :k] = stored.view(gates, units, k)
    panels = full.view(gates, -1, _PANEL, full.shape[2] // values, values).permute(1, 3, 0, 2, 4)
    return torch.cat([group.transpose(0, 1).reshape(-1) for group in panels.split(_of_group(gates))])


def _unpack_matrix(packed: Tensor, gates: int, units: int, k: int) -> Tensor:
    values = _VALUES_OF_WORD[packed.dtype]
    words, panels = _padded(k, values) // values, _padded(units, _PANEL) // _PANEL
    sizes = [min(_of_group(gates), panels - first) for first in range(0, panels, _of_group(gates))]
    groups = packed.split([size * words * gates * _PANEL * values for size in sizes])
    whole = torch.cat(
        [g.view(words, size, gates, _PANEL, values).transpose(0, 1) for g, size in zip(groups, sizes, strict=True)]
    )
    return whole.permute(2, 0, 3, 1, 4).reshape(gates, panels * _PANEL, -1)[:, :units, :k].reshape(gates * units, k)


def _pack_vectors(rows: Tensor) -> Tensor:
    """[S, H] -> [panel, S, 16]."""
    full = rows.new_zeros(rows.shape[0], _padded(rows.shape[1], _PANEL))
    full[:, : rows.shape[1]] = rows
    return full.view(rows.shape[0], -1, _PANEL).transpose(0, 1).reshape(-1)


def _unpack_vectors(packed: Tensor, count: int, units: int) -> Tensor:
    return packed.view(-1, count, _PANEL).transpose(0, 1).reshape(count, -1)[:, :units]


# --- Embedding bags --------------------------------------------------------------------------------------------------


class _Uses(NamedTuple):
    """The uses of rows: row and bag of each, the number of bags, and which uses count.

    Those that do not are in one more bag, behind the others, of which nothing is returned. They are not left out, for
    how many there are is data, and what torch.compile traces has sizes that it knows.
    """

    row: Tensor
    bag: Tensor
    bags: int
    counts: Tensor

    def rows_of(self, table: Tensor) -> Tensor:
        """Row of a table for each use, in the dtype of arithmetic; zeros, whatever there is, for one out of count."""
        # Unlike table[row] this refuses negative rows, which no check may have seen: see `_readable`.
        rows = table.index_select(0, self.row).to(_arithmetic_dtype(table.dtype))
        return rows.masked_fill(~self.counts.unsqueeze(-1), 0)

    def of_bag(self, values: Tensor) -> Tensor:
        """Row of what each bag has, for each use; zeros for one out of count."""
        return torch.cat([values, values.new_zeros(1, *values.shape[1:])]).index_select(0, self.bag)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the uses' values in each bag."""
        sums = values.new_zeros(self.bags + 1, *values.shape[1:]).index_add(0, self.bag, values)
        # Not as a view: torch cannot make one of symbolic sizes a tangent.
        return sums.index_select(0, torch.arange(self.bags, device=sums.device))


def refuse_wrong_indices(op: str, indices: Tensor, rows: int) -> None:
    """Raise an IndexError if one of the indices of an op or function is not a row of a table of so many."""
    readable = _readable(indices)
    if readable is None:
        return
    with _unseen_by_modes():
        flat = readable.reshape(-1)
        wrong = (flat < 0) | (flat >= rows)
        if not wrong.any():  # on CUDA this waits for the device, and saves it from an assertion that would end it
            return
        first = int(wrong.nonzero()[0])
        value = int(flat[first])
    # A lookup's may have had any shape.
    what, place = ("flattened indices", f"[{first}]") if op == "embedding" else ("indices", f"[{first}]")
    if op != "embedding" and readable.dim() == 2:
        place = f"[{first // readable.shape[1]}][{first % readable.shape[1]}]"
    raise IndexError(f"{op}: {what}{place} is {value}, expected a row from 0 to {rows - 1} of a table of {rows}")


def _check_bags(
    like: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mode: str,
    **others: Tensor,
) -> None:
    """What csrc/checks.h checks for the kernels; `like` is the table or its gradient."""
    if mode not in ("sum", "mean", "max", "lookup"):
        raise ValueError(f"embedding_bag: expected mode 'sum', 'mean', 'max' or 'lookup', got {mode!r}")
    _refuse_strange("embedding_bag", {"weight": like, "per_sample_weights": per_sample_weights, **others}, like.dtype)
    for name, integers in (("indices", indices), ("offsets", offsets)):
        if integers is not None and (
            integers.dtype not in (torch.int32, torch.int64) or integers.layout != torch.strided
        ):
            raise TypeError(
                f"embedding_bag: expected {name} of dtype int32 or int64, got {integers.layout} of {integers.dtype}"
            )
        if integers is not None:
            refuse_shrunk("embedding_bag", name, integers)
    if like.dim() != 2:
        raise ValueError(f"embedding_bag: expected 2-D weight, got {list(like.shape)}")
    if offsets is None and indices.dim() != 2:
        raise ValueError(f"embedding_bag: expected 2-D indices without offsets, got {list(indices.shape)}")
    if offsets is not None and (indices.dim() != 1 or offsets.dim() != 1):
        raise ValueError(
            f"embedding_bag: expected 1-D indices and 1-D offsets, got {list(indices.shape)} and {list(offsets.shape)}"
        )
    if mode == "lookup" and (offsets is not None or indices.shape[1] != 1):
        raise ValueError(f"embedding_bag: expected indices of shape [rows, 1] with 'lookup', got {list(indices.shape)}")
    if per_sample_weights is not None and mode != "sum":
        raise ValueError("embedding_bag: per_sample_weights go with mode 'sum' only")
    if per_sample_weights is not None and per_sample_weights.shape != indices.shape:
        raise RuntimeError(
            f"embedding_bag: expected per_sample_weights of shape {list(indices.shape)}, "
            f"got {list(per_sample_weights.shape)}"
        )


def _check_bags_backward(grad: Tensor, num_embeddings: int, bags: int, aux: Tensor, mode: str) -> None:
    if num_embeddings < 0:
        raise ValueError(f"embedding_bag: expected num_embeddings of 0 or more, got {num_embeddings}")
    if grad.shape[0] != bags:
        raise ValueError(f"embedding_bag: expected grad of shape [{bags}, columns], got {list(grad.shape)}")
    expected = {"mean": (bags,), "max": tuple(grad.shape)}.get(mode, tuple(aux.shape))
    if aux.shape != expected:
        raise RuntimeError(f"embedding_bag: expected aux of shape {list(expected)}, got {list(aux.shape)}")


def _uses(
    indices: Tensor, offsets: Tensor | None, rows: int, padding_idx: int, include_last_offset: bool, mode: str = "sum"
) -> _Uses:
    refuse_wrong_indices("embedding" if mode == "lookup" else "embedding_bag", indices, rows)
    row = indices.reshape(-1).long()
    position = torch.arange(row.shape[0], device=row.device)
    counts = torch.ones_like(row, dtype=torch.bool)
    if offsets is None:
        bags = indices.shape[0]
        bag = position // max(indices.shape[1], 1)
    else:
        bags = offsets.shape[0] - int(include_last_offset)
        _refuse_wrong_offsets(offsets, bags, row.shape[0])
        bag = torch.bucketize(position, offsets.long(), right=True) - 1
        counts = bag < bags if bags > 0 else ~counts
    if padding_idx >= 0:
        counts = counts & (row != padding_idx)
    return _Uses(row, torch.where(counts, bag, bags), bags, counts)


def _refuse_wrong_offsets(offsets: Tensor, bags: int, length: int) -> None:
    """Raise unless these divide so many indices into bags; what is behind the last one may be more than `bags`."""
    readable = _readable(offsets)
    if bags >= 0 and readable is None:
        return
    with _unseen_by_modes():
        starts = [] if readable is None else readable.tolist()
    if bags < 0 or (bags and (starts != sorted(starts) or starts[0] != 0 or starts[-1] > length)):
        raise ValueError(
            f"embedding_bag: expected offsets that start at 0, never decrease and end within {length} "
            f"indices, got {starts}"
        )


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mode: str,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    sparse: bool,
    trains: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pooled rows [B, E], and what backward needs: rows per bag for "mean", winning positions [B, E] for "max".

    With `trains` its derivative is what the settings of backward say, and not that of the values.
    """
    _check_bags(weight, indices, offsets, per_sample_weights, mode)
    uses = _uses(indices, offsets, weight.shape[0], -1 if mode == "lookup" else padding_idx, include_last_offset, mode)
    if trains and mode != "max":
        values = torch.embedding(weight, uses.row, padding_idx, scale_grad_by_freq, sparse).to(
            _arithmetic_dtype(weight.dtype)
        )
    else:
        values = uses.rows_of(weight)  # [uses, E]
    if per_sample_weights is not None:
        values = values * per_sample_weights.reshape(-1, 1).to(values.dtype)
    if mode == "max":
        shape = (uses.bags + 1, weight.shape[1])
        if values.numel() == 0:
            return weight.new_zeros(uses.bags, shape[1]), uses.row.new_full((uses.bags, shape[1]), -1)
        place = uses.bag.unsqueeze(-1).expand_as(values)
        best = values.new_full(shape, -torch.inf).scatter_reduce(0, place, values.detach(), "amax")
        # The first use that reaches the maximum wins, as in torch.
        nowhere = indices.numel()
        position = torch.arange(nowhere, device=values.device).unsqueeze(-1)
        candidates = torch.where(values.detach() == best[uses.bag], position, nowhere)
        winner = uses.row.new_full(shape, nowhere).scatter_reduce(0, place, candidates, "amin")[:-1]
        row = uses.row[winner.clamp(max=nowhere - 1)]
        return torch.where(winner < nowhere, weight.gather(0, row), 0), torch.where(winner < nowhere, winner, -1)
    out = uses.sum(values)
    aux = uses.row.new_empty(0)
    if mode == "mean":
        aux = uses.sum(torch.ones_like(uses.row))
        out = out / aux.clamp(min=1).unsqueeze(-1)
    return out.to(weight.dtype), aux


def embedding_bag_backward(
    grad: Tensor,
    num_embeddings: int,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    aux: Tensor,
    mode: str,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
) -> Tensor:
    """Dense gradient of weight, [V, E]."""
    if aux.dtype != torch.int64 or aux.layout != torch.strided:
        raise TypeError(f"embedding_bag: expected aux of dtype int64, got {aux.layout} of {aux.dtype}")
    refuse_shrunk("embedding_bag", "aux", aux)
    _check_bags(grad, indices, offsets, per_sample_weights, mode)
    uses = _uses(indices, offsets, num_embeddings, padding_idx, include_last_offset, mode)
    _check_bags_backward(grad, num_embeddings, uses.bags, aux, mode)
    terms = uses.of_bag(grad.to(_arithmetic_dtype(grad.dtype)))  # [uses, E]
    if mode == "mean":
        terms = terms / uses.of_bag(aux).clamp(min=1).unsqueeze(-1)
    if mode == "max":
        terms = terms * (uses.of_bag(aux) == torch.arange(len(terms), device=aux.device).unsqueeze(-1))
    if per_sample_weights is not None:
        terms = terms * per_sample_weights.reshape(-1, 1).to(terms.dtype)
    if scale_grad_by_freq:
        uses_of = uses.row.new_zeros(num_embeddings).index_add(0, uses.row, uses.counts.long())
        terms = terms / uses_of[uses.row].clamp(min=1).unsqueeze(-1)
    terms = terms.masked_fill(~uses.counts.unsqueeze(-1), 0)
    return terms.new_zeros(num_embeddings, grad.shape[1]).index_add(0, uses.row, terms).to(grad.dtype)


def embedding_bag_sparse_backward(
    grad: Tensor,
    num_embeddings: int,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    aux: Tensor,
    mode: str,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
) -> tuple[Tensor, Tensor]:
    """The same as sorted rows [R] and their values [R, E]."""
    dense = embedding_bag_backward(
        grad, num_embeddings, indices, offsets, per_sample_weights, aux, mode, padding_idx, include_last_offset,
        scale_grad_by_freq,
    )  # fmt: skip
    uses = _uses(indices, offsets, num_embeddings, padding_idx, include_last_offset)
    rows = uses.row[uses.counts].unique()
    return rows, dense[rows]


def _check_update(
    weight: Tensor, grad: Tensor, first: Tensor | None, second: Tensor | None, rule: str, settings: list[float]
) -> None:
    op = "embedding_bag_update"
    if rule not in ("sgd", "rowwise_adagrad", "adagrad", "adam"):
        raise ValueError(f"{op}: expected rule 'sgd', 'rowwise_adagrad', 'adagrad' or 'adam', got {rule!r}")
    _refuse_strange(op, {"weight": weight, "grad": grad}, weight.dtype)
    if weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(f"{op}: expected contiguous 2-D weight, got {list(weight.shape)}, strides {weight.stride()}")
    if grad.dim() != 2 or grad.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: expected grad of shape [bags, {weight.shape[1]}], got {list(grad.shape)}")
    wanted = {"sgd": 1, "adam": 4}.get(rule, 2)
    if len(settings) != wanted or any(map(math.isnan, settings)):
        raise ValueError(f"{op}: expected {wanted} settings, none of them NaN, got {settings}")
    shape = weight.shape[:1] if rule == "rowwise_adagrad" else weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for name, state, needed in (("first", first, rule != "sgd"), ("second", second, rule == "adam")):
        if (state is not None) != needed:
            raise ValueError(f"{op}: {name} is {'needed' if needed else 'not wanted'} by this rule")
        if state is None:
            continue
        _refuse_strange(op, {name: state}, dtype)
        if state.shape != shape or state.device != weight.device or not state.is_contiguous():
            raise RuntimeError(
                f"{op}: expected contiguous {name} of shape {list(shape)} on {weight.device}, got {list(state.shape)}, "
                f"strides {state.stride()}, on {state.device}"
            )


def embedding_bag_update(
    grad: Tensor,
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    aux: Tensor,
    pooling: str,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    rule: str,
    settings: list[float],
) -> None:
    """A step of an optimizer for the rows in use, in place; `csrc/library.cpp` says what each rule does."""
    _check_update(weight, grad, first, second, rule, settings)
    rows, g = embedding_bag_sparse_backward(
        grad, weight.shape[0], indices, offsets, per_sample_weights, aux, pooling, padding_idx, include_last_offset,
        scale_grad_by_freq,
    )  # fmt: skip
    g = g.to(_arithmetic_dtype(g.dtype))
    rate, eps, beta1, beta2 = (*settings, 0.0, 0.0, 0.0)[:4]
    if rule == "sgd":
        change = rate * g
    elif rule == "rowwise_adagrad" and first is not None:
        first[rows] += g.square().mean(1)
        change = rate * g / (first[rows].sqrt() + eps).unsqueeze(1)
    elif rule == "adagrad" and first is not None:
        first[rows] += g.square()
        change = rate * g / (first[rows].sqrt() + eps)
    elif rule == "adam" and first is not None and second is not None:
        first[rows] += (g - first[rows]) * (1 - beta1)
        second[rows] += (g.square() - second[rows]) * (1 - beta2)
        change = rate * first[rows] / (second[rows].sqrt() + eps)
    else:
        raise ValueError(f"embedding_bag_update: there is no rule {rule!r}")
    weight[rows] = (weight[rows].to(g.dtype) - change).to(weight.dtype)


def embedding_dot(
    h: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    padding_idx: int,
    include_last_offset: bool,
    sparse: bool,
) -> Tensor:
    """h[bag] . weight[index] for each index of a bag, shaped like indices; 0 for padding_idx and in no bag."""
    _check_bags(weight, indices, offsets, None, "sum", grad=h)
    uses = _uses(indices, offsets, weight.shape[0], padding_idx, include_last_offset)
    if tuple(h.shape) != (uses.bags, weight.shape[1]):
        raise RuntimeError(f"embedding_dot: expected h of shape {[uses.bags, weight.shape[1]]}, got {list(h.shape)}")
    terms = uses.of_bag(h.to(_arithmetic_dtype(h.dtype))) * uses.rows_of(weight)
    return terms.sum(-1).reshape(indices.shape).to(weight.dtype)


# --- Negative samples ------------------------------------------------------------------------------------------------

PLACES = 2**53
"""On a line of so many places (all that float64 holds) a row has as many as it is probable."""


def line_of(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The line on which rows are drawn in proportion to weights [V]: `cumulative` and `guide` of `draw_negatives`."""
    shares = weights.double().cumsum(0)
    cumulative = (shares / shares[-1] * PLACES).long()
    parts = 1 << (len(weights) - 1).bit_length()
    starts = torch.arange(parts, device=weights.device) * (PLACES // parts)
    return cumulative, torch.searchsorted(cumulative, starts, right=True)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right, as of an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def draw_negatives(seed: Tensor, cumulative: Tensor, guide: Tensor, targets: Tensor, number: int) -> Tensor:
    """Rows [B, number], none of them its target; `csrc/cpu/negatives.h` says how."""
    place_of_number = torch.arange(len(targets) * number, device=targets.device).view(len(targets), number)
    x = seed + (place_of_number + 1) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shifted(x, 31)
    if not bool(((targets >= -1) & (targets < len(cumulative))).all()):
        raise IndexError(f"draw_negatives: expected targets from 0 to {len(cumulative) - 1}, or -1")
    begins = torch.cat([cumulative.new_zeros(1), cumulative])
    begin = begins[targets.clamp(min=0)]
    width = torch.where(targets >= 0, begins[targets + 1] - begin, 0)
    left = begins[-1] - width
    if number > 0 and bool((left <= 0).any()):
        raise ValueError("draw_negatives: no row but the target has a probability")
    place = (_shifted(x, 11).double() / PLACES * left.unsqueeze(1).double()).long()
    begin = torch.where(targets >= 0, begin, PLACES)
    place = place + torch.where(place >= begin.unsqueeze(1), width.unsqueeze(1), 0)
    return torch.searchsorted(cumulative, place, right=True).clamp(max=len(cumulative) - 1)
