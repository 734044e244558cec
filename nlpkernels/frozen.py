"""Recurrent layers and cells that only run: weights packed once, in float32, bfloat16 or int8.

`nlpkernels.freeze` makes them of layers that there are. They are called as the layers were.

Weights of bfloat16 and int8 lie packed in two buffers for each layer and direction, in an order that is the same on
every machine, so that a pickle, a copy or shared memory holds them once. A state_dict holds them plain: of
`weight_ih_l0` and its kin the matrix in int8 or bfloat16, of int8 with the scale of each row as `weight_ih_l0_scale`,
and the biases in float32. Rows of x and h are rounded likewise before they are multiplied: see csrc/cpu/narrow.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from nlpkernels import _ops, reference
from nlpkernels._giving_way import exports_to_onnx, in_graph, is_torchs, leaves
from nlpkernels.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell, _Cell, _Layers

__all__ = ["FrozenGRU", "FrozenGRUCell", "FrozenLSTM", "FrozenLSTMCell", "FrozenRNN", "FrozenRNNCell"]

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
"""What weights may be frozen in."""
MOST = 65_536
"""Inputs and hidden units that kernels of bfloat16 and int8 take: sums of 32 bits have room for so many products."""

# Names of plain weights, before the suffix of a layer and direction, and of the buffers that hold them packed.
_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
_PACKED = ("packed", "factors")


class _Frozen(nn.Module):
    """What frozen layers and cells share: their weights, and how they are saved."""

    frozen_dtype: torch.dtype
    """What the weights are frozen in; of torch.float32 they may have any dtype."""
    _cell: str
    _sizes: tuple[int, int, int]
    """I, H and P."""
    _number_of_packed: int
    bias: bool
    hidden_size: int
    input_size: int
    num_layers: int
    proj_size: int
    bidirectional: bool

    def _names(self) -> Iterator[tuple[str, int, int]]:
        """For each layer and direction the suffix of its weights' names, its inputs, and features of h."""
        if isinstance(self, _Cell):
            yield "", self.input_size, self.hidden_size
            return
        assert isinstance(self, _Layers)
        directions = 2 if self.bidirectional else 1
        features = self.proj_size or self.hidden_size
        for layer in range(self.num_layers):
            for direction in ("", "_reverse")[:directions]:
                yield f"_l{layer}{direction}", features * directions if layer else self.input_size, features

    def train(self, mode: bool = True) -> Any:
        """Nothing: a frozen layer has nothing that training would change."""
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frozen={str(self.frozen_dtype).removeprefix('torch.')}"

    def _refuse_to_train(self, *values: Any) -> None:
        if torch.is_grad_enabled() and any(v.requires_grad for v in leaves(*values) if isinstance(v, Tensor)):
            raise RuntimeError(
                f"{type(self).__name__}: a frozen layer only runs: expected inputs and states that require no gradient "
                "(detach() them, or run under torch.no_grad()), or nlpkernels.revert(model) to train it"
            )

    def _left_to_torch(self, input: Any, hx: Any, **options: Any) -> Any:
        """Of weights that only our kernels multiply: a node of a graph, and an error in the place of torch's own way.

        See `_giving_way.py`. None where the call is ours.
        """
        if self.frozen_dtype == torch.float32:
            return None
        data = input.data if isinstance(input, PackedSequence) else input
        if is_torchs(data, *leaves(hx), *options.values()):
            if (node := in_graph(self, input, hx, **options)) is not None:
                return node
            raise NotImplementedError(
                f"{type(self).__name__}: torch has no layers with weights of {self.frozen_dtype}, and this call is "
                "left to torch's own function, as one with a subclass of Tensor, or under torch.jit.trace or "
                "torch.onnx.export: expected a layer frozen as torch.float32, or nlpkernels.revert(model)"
            )
        if isinstance(data, Tensor) and data.dtype not in reference.DTYPES:
            raise ValueError(
                f"{type(self).__name__}: expected input of dtype float32, float64, bfloat16 or float16, "
                f"got {data.dtype}"
            )
        return None

    def _packed(self) -> list[Tensor]:
        """Packed weights and factors of each layer and direction, in turns: the first buffers."""
        buffers: list[Any] = list(self._buffers.values())
        return buffers[: self._number_of_packed]

    # --- Plain weights, and back ---

    def _freeze(self, dtype: torch.dtype) -> None:
        """Have what were parameters as buffers of that dtype."""
        self.frozen_dtype = dtype
        self._cell = "lstm" if isinstance(self, (LSTM, LSTMCell)) else "gru"
        if isinstance(self, (RNN, RNNCell)):
            self._cell = f"rnn_{self.nonlinearity}"
        features: int = getattr(self, "proj_size", 0) or self.hidden_size
        self._sizes = (self.input_size, self.hidden_size, features)
        plain = {name: value.detach() for name, value in self._plain_parameters().items()}
        made: dict[str, Tensor | None] = dict(plain)
        if dtype != torch.float32:
            made = {}
            for suffix, _, _ in self._names():
                made |= zip((f"{kind}{suffix}" for kind in _PACKED), self._pack(suffix, plain), strict=True)
            self._number_of_packed = len(made)
        elif isinstance(self, _Cell):  # which has None where it has no bias
            made |= {name: None for name in _KINDS[2:4] if name not in plain}
        for name in self._own_names():
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        others = {name: self._buffers.pop(name) for name in list(self._buffers)}  # a user's
        for name, value in made.items():
            self.register_buffer(name, value, persistent=dtype == torch.float32)
        self._buffers |= others
        self.training = False
        if isinstance(self, _Layers):
            self._init_flat_weights()

    def _thaw(self) -> None:
        """Have parameters again, in the place of buffers."""
        plain = self._float_parameters()
        for name in [*self._own_names(), *(f"{kind}{s}" for s, _, _ in self._names() for kind in _PACKED)]:
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        for name in ("frozen_dtype", "_cell", "_sizes", "_number_of_packed"):
            self.__dict__.pop(name, None)
        others = dict(self._parameters)  # a user's
        self._parameters.clear()
        for name, value in plain.items():
            self.register_parameter(name, nn.Parameter(value))
        if isinstance(self, _Layers):
            self._init_flat_weights()
        else:
            for name in _KINDS[2:4]:
                if name not in plain:
                    self.register_parameter(name, None)
        self._parameters |= others

    def _own_names(self) -> list[str]:
        return [f"{kind}{suffix}" for suffix, _, _ in self._names() for kind in _KINDS]

    def _plain_parameters(self) -> dict[str, Tensor]:
        found = ((name, getattr(self, name, None)) for name in self._own_names())
        return {name: value for name, value in found if isinstance(value, Tensor)}

    def _pack(self, suffix: str, plain: dict[str, Tensor]) -> list[Tensor]:
        """Packed weights and factors of a direction, of weights that are plain, or floating and to be rounded."""
        matrices: list[Tensor | None] = []
        scales: list[Tensor] = []
        for kind in _KINDS[:2] + _KINDS[4:]:
            matrix = plain.get(f"{kind}{suffix}")
            scale = plain.get(f"{kind}{suffix}_scale")
            if matrix is None:
                matrices.append(None)
            elif self.frozen_dtype == torch.bfloat16:
                matrices.append(matrix.to(torch.bfloat16))
            elif scale is None:
                matrix, scale = reference.quantise(matrix)
                matrices.append(matrix)
                scales.append(scale)
            else:
                matrices.append(matrix.to(torch.int8))
                scales.append(scale.float())
        w_ih, w_hh, w_hr = matrices
        assert w_ih is not None and w_hh is not None
        zeros = torch.zeros(w_ih.shape[0], device=w_ih.device)
        b_ih, b_hh = (plain.get(f"{kind}{suffix}", zeros).float() for kind in _KINDS[2:4])
        weights = reference.FrozenWeights(w_ih, w_hh, w_hr, tuple(scales), b_ih, b_hh)
        return reference.pack_frozen(weights, self._cell)

    def _unpack(self, suffix: str, inputs: int, features: int) -> dict[str, Tensor]:
        """The plain weights of a direction, by the names that they have in a state_dict."""
        packed, factors = self._buffers[f"packed{suffix}"], self._buffers[f"factors{suffix}"]
        assert packed is not None and factors is not None
        found = reference.unpack_frozen(packed, factors, self._cell, inputs, self.hidden_size, features)
        matrices = {"weight_ih": found.w_ih, "weight_hh": found.w_hh}
        if found.w_hr is not None:
            matrices["weight_hr"] = found.w_hr
        plain = {f"{kind}{suffix}": matrix for kind, matrix in matrices.items()}
        plain |= {f"{kind}{suffix}_scale": s for kind, s in zip(matrices, found.scales, strict=False)}
        if self.bias:
            plain |= {f"bias_ih{suffix}": found.b_ih, f"bias_hh{suffix}": found.b_hh}
        return plain

    def _float_parameters(self) -> dict[str, Tensor]:
        """The weights as a layer of torch.nn has them: exactly those of float32, and dequantised else."""
        if self.frozen_dtype == torch.float32:
            return self._plain_parameters()
        found = {}
        for suffix, inputs, features in self._names():
            plain = self._unpack(suffix, inputs, features)
            for kind in _KINDS:
                if (value := plain.get(f"{kind}{suffix}")) is not None:
                    scale = plain.get(f"{kind}{suffix}_scale")
                    found[f"{kind}{suffix}"] = value.float() if scale is None else value * scale.unsqueeze(1)
        return found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.frozen_dtype != torch.float32:
            for where in self._names():
                destination |= {prefix + name: value for name, value in self._unpack(*where).items()}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Plain weights as they were saved, or those of a layer that has not been frozen, which are rounded."""
        if self.frozen_dtype == torch.float32:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        strange: list[str] = []  # to torch, which sees what a user has put here beside the weights
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, strange, error_msgs)
        expected: dict[str, Tensor] = {}
        for where in self._names():
            expected |= self._unpack(*where)
        unexpected_keys += [key for key in strange if key.removeprefix(prefix) not in expected]
        given: dict[str, Tensor] = {}
        for name, value in expected.items():
            if (key := prefix + name) not in state_dict:
                continue
            if not isinstance(new := state_dict[key], Tensor):
                error_msgs.append(
                    f'While copying the parameter named "{key}", expected torch.Tensor or Tensor-like object from '
                    f"checkpoint but received {type(new)}"
                )
            elif new.shape != value.shape:
                error_msgs.append(
                    f"size mismatch for {key}: copying a param with shape {new.shape} from checkpoint, the shape in "
                    f"current model is {value.shape}."
                )
            else:
                given[name] = new
        for name in expected:
            # A matrix that is to be rounded has no scale yet.
            matrix = given.get(name.removesuffix("_scale"))
            is_needed = not name.endswith("_scale") or matrix is None or not matrix.is_floating_point()
            if strict and is_needed and prefix + name not in state_dict:
                missing_keys.append(prefix + name)
        assigns = local_metadata.get("assign_to_params_buffers", False)
        for suffix, _, _ in self._names():
            names = [name for name in expected if name.removesuffix("_scale").endswith(suffix)]
            if not any(name in given for name in names):
                continue
            plain = {name: given.get(name, expected[name]) for name in names}
            for name in names:
                if name.endswith("_scale") and plain[name.removesuffix("_scale")].is_floating_point():
                    del plain[name]
            for kind, value in zip(_PACKED, self._pack(suffix, plain), strict=True):
                if assigns:
                    self._buffers[f"{kind}{suffix}"] = value
                else:
                    buffer = self._buffers[f"{kind}{suffix}"]
                    assert buffer is not None
                    buffer.copy_(value)


class _FrozenLayers(_Frozen, _Layers):
    """What frozen layers share."""

    def flatten_parameters(self) -> None:
        """Nothing: there are no parameters."""

    def _weights_of_call(self) -> list[Tensor]:
        if self.frozen_dtype == torch.float32:
            return [value for name in self._flat_weights_names if (value := self._buffers[name]) is not None]
        return self._packed()

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        return_state_sequence: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """Run all layers, as the layer did that this one was."""
        has_c = self._cell == "lstm"
        if lengths is None and mask is None and not return_state_sequence:
            given = hx if has_c or hx is None else (hx,)
            directions = 2 if self.bidirectional else 1
            if self.frozen_dtype is torch.float32:
                weights = self._weights_of_call()
                found = _ops.recurrent_layers(
                    input, given, weights, self._cell, self.num_layers, directions, self.batch_first, True
                )
            else:
                found = _ops.frozen_layers(
                    input, given, self._packed(), self._cell, directions, self.batch_first, False, self._sizes
                )
            if found is not None:
                return found[0], (found[1], found[2]) if has_c else found[1]
        self._refuse_to_train(input.data if isinstance(input, PackedSequence) else input, hx)
        options = {"lengths": lengths, "return_state_sequence": return_state_sequence, "mask": mask}
        if (node := self._left_to_torch(input, hx, **options)) is not None:
            return node
        return self._run(input, hx, lengths, return_state_sequence, mask)

    def _check_x(self, x: Tensor, weight: Tensor, is_packed: bool) -> None:
        is_narrow = self.frozen_dtype != torch.float32
        super()._check_x(x, x if is_narrow and x.is_floating_point() else weight, is_packed)

    def _run_layers(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        weights: list[Tensor],
        batch_sizes: Tensor | None,
        return_state_sequence: bool,
    ) -> Any:
        directions, transposed = 2 if self.bidirectional else 1, self.batch_first and batch_sizes is None
        if self.frozen_dtype != torch.float32:
            return _run_frozen(
                x, states, weights, self._cell, directions, transposed, batch_sizes, return_state_sequence
            )
        is_left = _ops.is_left_to_torch(x) or exports_to_onnx()
        if return_state_sequence or _ops.autocast_dtype(x.device.type) is not None or is_left:
            return super()._run_layers(x, states, weights, batch_sizes, return_state_sequence)
        per_layer, y, finals = len(weights) // self.num_layers, x.transpose(0, 1) if transposed else x, []
        for layer in range(self.num_layers):
            own = [state[layer * directions : (layer + 1) * directions] for state in states]
            y, *final = _ops.recurrent_frozen(
                y, batch_sizes, own[0], own[1] if len(own) > 1 else None,
                weights[layer * per_layer : (layer + 1) * per_layer], self._cell,
            )  # fmt: skip
            finals.append(final)
        h_n, c_n = (torch.cat(of) for of in zip(*finals, strict=True))
        y = y.transpose(0, 1) if transposed else y
        return (y, h_n, c_n) if len(states) > 1 else (y, h_n)


def _run_frozen(
    x: Tensor,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    cell: str,
    directions: int,
    transposed: bool,
    batch_sizes: Tensor | None,
    return_state_sequence: bool,
) -> tuple[Tensor, ...]:
    """Output and final states, or those of every step, as `functional.lstm` returns them; in x's dtype."""
    dtype = x.dtype
    y = (x.transpose(0, 1) if transposed else x).float()
    h0, c0 = states[0].float(), states[1].float() if len(states) > 1 else None
    if not return_state_sequence:
        y, h, c, _ = _ops.frozen(y, batch_sizes, h0, c0, weights, cell, directions, False)
    else:
        hs, cs = [], []
        for first in range(0, h0.shape[0], directions):
            own = slice(first, first + directions)
            y, _, _, c = _ops.frozen(
                y, batch_sizes, h0[own], None if c0 is None else c0[own], weights[2 * first : 2 * (first + directions)],
                cell, directions, True,
            )  # fmt: skip
            hs.append(y.unflatten(-1, (directions, -1)).movedim(-2, 0))
            cs.append(c.unflatten(1, y.shape[:-1]) if c0 is not None else c)
        h, c = torch.cat(hs), torch.cat(cs)
        if transposed:
            h, c = h.transpose(1, 2), c.transpose(1, 2) if c0 is not None else c
    y = y.transpose(0, 1) if transposed else y
    found = (y, h) if c0 is None else (y, h, c)
    return tuple(value.to(dtype) for value in found)


class FrozenRNN(_FrozenLayers, RNN):
    """An `RNN` that only runs; made by `nlpkernels.freeze`."""


class FrozenLSTM(_FrozenLayers, LSTM):
    """An `LSTM` that only runs; made by `nlpkernels.freeze`."""


class FrozenGRU(_FrozenLayers, GRU):
    """A `GRU` that only runs; made by `nlpkernels.freeze`."""


class _FrozenCell(_Frozen, _Cell):
    """What frozen cells share."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Take one step, as the cell did that this one was."""
        has_c = self._cell == "lstm"
        given = hx if has_c or hx is None else (hx,)
        found = None
        if self.frozen_dtype is not torch.float32:
            found = _ops.frozen_layers(input, given, self._packed(), self._cell, 1, False, True, self._sizes)
        elif not torch.is_grad_enabled() and len(weights := self._weights_of_call()) != 3:
            found = _ops.recurrent_step(input, given, weights, self._cell)
        if found is not None:
            return tuple(found) if has_c else found[0]
        self._refuse_to_train(input, hx)
        if (node := self._left_to_torch(input, hx)) is not None:
            return node
        return self._step(self._cell, input, hx)

    def _weights_of_call(self) -> list[Tensor]:
        if self.frozen_dtype == torch.float32:
            own = self._buffers
            return [value for name in _KINDS[:4] if (value := own.get(name)) is not None]
        return self._packed()

    def _one_step(
        self, x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor], cell: str
    ) -> tuple[Tensor, ...]:
        if self.frozen_dtype == torch.float32:
            return super()._one_step(x, h0, c0, weights, cell)
        states = (h0.unsqueeze(0),) if c0 is None else (h0.unsqueeze(0), c0.unsqueeze(0))
        h, _, *c = _run_frozen(x, states, weights, cell, 1, False, None, False)
        return (h, *(state.squeeze(0) for state in c))


class FrozenRNNCell(_FrozenCell, RNNCell):
    """An `RNNCell` that only runs; made by `nlpkernels.freeze`."""


class FrozenGRUCell(_FrozenCell, GRUCell):
    """A `GRUCell` that only runs; made by `nlpkernels.freeze`."""


class FrozenLSTMCell(_FrozenCell, LSTMCell):
    """An `LSTMCell` that only runs; made by `nlpkernels.freeze`."""
