"""RNN, LSTM, GRU and their cells as modules, with the parameters of torch.nn and the time loop in our kernels.

The layers derive from `torch.nn.RNNBase`, not from `torch.nn.LSTM` and its kin, on which torch.compile gives up; the
cells derive from torch.nn's.
Parameters are read from the module's attributes at each call, so whatever replaces an attribute (weight_norm,
parametrize, functional_call) is seen.

Shapes: T steps, B sequences, I = input_size, H = hidden_size, P = proj_size if there is one, else H, D directions,
L layers.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from nlpkernels import _ops, functional
from nlpkernels._giving_way import in_graph, is_complex, is_torchs, leaves, refuse, refuse_nested

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


def _states_of(name: str, hx: Tensor | tuple[Tensor, Tensor] | None, count: int) -> tuple[Tensor, ...] | None:
    """Hx of a layer or a cell of that name as a tuple: (h,) if `count` is 1, (h, c) if it is 2, or None."""
    if hx is None:
        return None
    if isinstance(hx, Tensor):
        states: tuple[Tensor, ...] = (hx,)
    else:
        states = tuple(hx) if isinstance(hx, (tuple, Iterable)) else ()
    fits = len(states) == count and (count == 1) == isinstance(hx, Tensor)
    if not fits or not (isinstance(states[0], Tensor) and isinstance(states[-1], Tensor)):
        expected = "one tensor" if count == 1 else "two tensors, (h, c)"
        got = "one tensor" if isinstance(hx, Tensor) else f"{type(hx).__name__} of {len(states)}"
        if fits:
            got = f"{type(hx).__name__} of {' and '.join(type(state).__name__ for state in states)}"
        raise RuntimeError(f"{name}: expected hx to be {expected}, got {got}")
    return states


def _parameters_of(module: torch.nn.Module, names: Iterable[str]) -> list[Tensor]:
    """The parameters of these names that a module has, or whatever has replaced them.

    Its dictionary of them is asked first: an attribute of a module takes 20 times as long.
    """
    own = module._parameters
    found = [own[name] if name in own else getattr(module, name) for name in names]
    return [parameter for parameter in found if parameter is not None]


class _Layers(RNNBase):
    """What RNN, LSTM and GRU share: checks, states, and input in all its forms."""

    _torchs: ClassVar[type[nn.Module]]
    """The layer of torch.nn that this one is in the place of."""

    _has_own_checks: ClassVar[bool] = False
    """Whether a subclass has its own check_forward_args, which is then called where torch.nn's layers call theirs."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        torchs = (RNNBase.check_forward_args, nn.LSTM.check_forward_args)
        cls._has_own_checks = cls.check_forward_args not in torchs

    recurrent_dropout: float = 0.0
    """Of the class, for layers that were made without one: by torch.nn, or before there was such an argument."""

    def _set_recurrent_dropout(self, p: float) -> None:
        if not isinstance(p, numbers.Real) or isinstance(p, bool) or not 0 <= p <= 1:
            raise ValueError(
                "recurrent_dropout should be a number in range [0, 1], the probability of an element being zeroed, "
                f"got {p!r}"
            )
        self.recurrent_dropout = float(p)

    def extra_repr(self) -> str:
        dropout = f", recurrent_dropout={self.recurrent_dropout}" if self.recurrent_dropout != 0 else ""
        return super().extra_repr() + dropout

    def flatten_parameters(self) -> None:
        """Nothing, for our kernels need no flat copy of the parameters; cuDNN does, where it serves a layer."""
        if any(isinstance(weight, Tensor) and _ops.is_left_to_torch(weight) for weight in self._flat_weights):
            super().flatten_parameters()

    def _weights_of_call(self) -> list[Tensor]:
        return _parameters_of(self, self._flat_weights_names)

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, Tensor] | None,
        lengths: Tensor | Sequence[int] | None,
        return_state_sequence: bool,
        mask: Tensor | None,
    ) -> Any:
        """What a call returns: output and final states, or those of all steps."""
        has_c = self.mode == "LSTM"
        weights = self._weights_of_call()
        is_whole = len(weights) == len(self._flat_weights_names)
        draws = self.training and (self.dropout or self.recurrent_dropout)
        is_padded = lengths is not None or mask is not None
        is_plain = not (is_padded or return_state_sequence or draws or self._has_own_checks)
        if isinstance(input, Tensor) and is_whole and is_plain:
            directions = 2 if self.bidirectional else 1
            given: Any = hx if has_c or hx is None else (hx,)
            results = _ops.recurrent_layers(
                input, given, weights, self.mode.lower(), self.num_layers, directions, self.batch_first
            )
            if results is not None:
                return results[0], (results[1], results[2]) if has_c else results[1]
        data = input.data if isinstance(input, PackedSequence) else input
        beyond = {
            "lengths": lengths is not None,
            "mask": mask is not None,
            "return_state_sequence": return_state_sequence,
            "recurrent_dropout": self.training and self.recurrent_dropout > 0,
        }
        has_onnx = isinstance(input, Tensor) and not (self.proj_size or any(beyond.values()))
        if is_torchs(data, lengths, mask, *leaves(hx), *weights, has_onnx=has_onnx) or is_complex(data):
            node = in_graph(self, input, hx, lengths=lengths, return_state_sequence=return_state_sequence, mask=mask)
            if node is not None:
                return node
            refuse(type(self).__name__, **beyond)
            return self._torchs.forward(self, input, hx)
        refuse_nested(type(self).__name__, data)
        states = _states_of(type(self).__name__, hx, 2 if has_c else 1)
        packed = input if isinstance(input, PackedSequence) else None
        x = input if isinstance(input, Tensor) else input.data
        name, batch_dim = type(self).__name__, 0 if self.batch_first else 1
        is_batched = True
        if packed is None:
            if x.dim() not in (2, 3):
                raise ValueError(f"{name}: Expected input to be 2D or 3D, got {x.dim()}D instead")
            is_batched = x.dim() == 3
            self._check_dimensions(x.dim(), states)
            if not is_batched:
                x = x.unsqueeze(batch_dim)
                states = None if states is None else tuple(state.unsqueeze(1) for state in states)
        if is_padded and (packed is not None or not is_batched):
            what = "a PackedSequence, which has its own" if packed is not None else "an unbatched sequence"
            raise ValueError(f"{name}: lengths are for padded batches, expected a 3D input, got {what}")
        if mask is not None:
            if lengths is not None:
                raise ValueError(f"{name}: expected lengths or a mask, got both")
            lengths = _lengths_of(mask, x, self.batch_first)
        self._check_x(x, weights[0], packed is not None)
        if packed is None:
            batch = x.size(batch_dim)
        elif packed.sorted_indices is not None:
            batch = packed.sorted_indices.size(0)
        elif states is not None and torch.compiler.is_compiling():  # which cannot compare sizes with data
            batch = states[0].size(1)
        else:
            batch = int(packed.batch_sizes[0])
        states = self._checked_states(x, batch, states)
        if self._has_own_checks and not (has_c and packed is not None):  # of which torch.nn's LSTM has none checked
            given = states if has_c else states[0]
            self.check_forward_args(x, given, None if packed is None else packed.batch_sizes)

        padding = None if lengths is None else _Padding.of(lengths, x, self.batch_first)
        batch_sizes = order = inverse = None
        if padding is not None:
            x, batch_sizes, order, inverse = padding.pack(x), padding.batch_sizes, padding.order, padding.inverse
        elif packed is not None:
            batch_sizes, order, inverse = packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        if order is not None:
            states = tuple(state.index_select(1, order) for state in states)

        output, *final = self._run_layers(x, states, weights, batch_sizes, return_state_sequence)

        if padding is not None:
            output = padding.unpack(output)
        if return_state_sequence:
            if padding is not None:
                final = [padding.unpack(state) for state in final]
        elif inverse is not None:
            final = [state.index_select(1, inverse) for state in final]
        if packed is not None:
            output = PackedSequence(output, batch_sizes, order, inverse)
        elif not is_batched:
            output = output.squeeze(batch_dim)
            final = [state.squeeze(batch_dim + 1 if return_state_sequence else 1) for state in final]
        return output, tuple(final) if has_c else final[0]

    def _run_layers(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        weights: list[Tensor],
        batch_sizes: Tensor | None,
        return_state_sequence: bool,
    ) -> Any:
        """Output and final states of all layers, or their states at every step: see `functional.lstm`."""
        return getattr(functional, self.mode.lower())(
            x,
            states if self.mode == "LSTM" else states[0],
            weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            batch_sizes=batch_sizes,
            return_state_sequence=return_state_sequence,
            recurrent_dropout=self.recurrent_dropout,
        )

    def _check_dimensions(self, expected: int, states: tuple[Tensor, ...] | None) -> None:
        if states is None or all(state.dim() == expected for state in states):
            return
        names, got = "hx", f"{states[0].dim()}-D tensor"
        if self.mode == "LSTM":
            names, got = "hx and cx", f"({', '.join(f'{state.dim()}-D' for state in states)}) tensors"
        raise RuntimeError(
            f"For {'' if expected == 3 else 'un'}batched {expected}-D input, {names} should also be {expected}-D "
            f"but got {got}"
        )

    def _check_x(self, x: Tensor, weight: Tensor, is_packed: bool) -> None:
        if x.dtype != weight.dtype and _ops.autocast_dtype(x.device.type) is None:
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        if is_packed and x.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {x.dim()}")
        if x.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.size(-1)}"
            )

    def _checked_states(self, x: Tensor, batch: int, states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        expected = [(rows, batch, self.proj_size or self.hidden_size)]
        if self.mode == "LSTM":
            expected.append((rows, batch, self.hidden_size))
        if states is None:
            return tuple(x.new_zeros(size) for size in expected)
        for i, (state, size) in enumerate(zip(states, expected, strict=True)):
            if state.shape != size:
                name = f"hidden[{i}]" if self.mode == "LSTM" else "hidden"
                raise RuntimeError(f"Expected {name} size {size}, got {list(state.shape)}")
        return states


def _lengths_of(mask: Tensor, x: Tensor, batch_first: bool) -> Tensor:
    """How many steps of each sequence a mask, [T, B], or [B, T] if batch_first, says are real."""
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(
            f"expected mask to be bool of shape {list(x.shape[:2])}, one for each step, "
            f"got shape {list(mask.shape)} of {mask.dtype}"
        )
    step = 1 if batch_first else 0
    has_gap = (mask.int().diff(dim=step) > 0).any()
    _refuse(has_gap, "expected mask to be true for the first steps of each sequence, got steps after a gap")
    return mask.sum(step)


def _refuse(is_wrong: Tensor, message: str) -> None:
    """Raise a ValueError if so; in compiled code, which asks when it runs, a RuntimeError."""
    if torch.compiler.is_compiling():
        torch._assert_async(~is_wrong, message)
    elif bool(is_wrong):
        raise ValueError(message)


class _Padding(NamedTuple):
    """Where the real rows of a padded batch are, and their order when packed: step by step, longest sequence first."""

    rows: Tensor
    """[N], places in the T B rows of the padded batch, in packed order."""
    batch_sizes: Tensor
    """[T], how many sequences have a step t."""
    order: Tensor
    """[B], longest first."""
    inverse: Tensor
    shape: tuple[int, int]
    """(T, B), or (B, T) if batch_first."""

    @staticmethod
    def of(lengths: Tensor | Sequence[int], x: Tensor, batch_first: bool) -> _Padding:
        """The padding of x, [T, B, I] or [B, T, I], by the lengths, [B]."""
        steps, batch = (x.size(1), x.size(0)) if batch_first else (x.size(0), x.size(1))
        if not isinstance(lengths, Tensor):
            given = lengths
            try:  # (of no numbers torch makes floats)
                lengths = torch.as_tensor(given, dtype=None if len(given) > 0 else torch.long, device="cpu")
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(
                    f"expected lengths to be {batch} integers (int32 or int64), one for each sequence, as a list or a "
                    f"tensor, got {type(given).__name__} {given!r:.80}"
                ) from None
        if lengths.dim() != 1 or lengths.size(0) != batch or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"expected lengths to be {batch} integers (int32 or int64), one for each sequence, "
                f"got shape {list(lengths.shape)} of {lengths.dtype}"
            )
        lengths = lengths.cpu().long()
        is_wrong = ((lengths < 0) | (lengths > steps)).any()
        if torch.compiler.is_compiling():
            message = "expected lengths from 0 to the steps of input"
        else:
            message = f"expected lengths from 0 to {steps}, the steps of input, got {lengths.tolist()}"
        _refuse(is_wrong, message)
        ordered, order = lengths.sort(descending=True, stable=True)
        step = torch.arange(steps, device=lengths.device).unsqueeze(1)  # [T, 1]
        is_real = step < ordered  # [T, B]
        rows = (order * steps + step) if batch_first else (step * batch + order)
        return _Padding(
            rows[is_real].to(x.device),
            is_real.sum(1),
            order.to(x.device),
            order.argsort().to(x.device),
            (x.size(0), x.size(1)),
        )

    def pack(self, x: Tensor) -> Tensor:
        """[T, B, I] or [B, T, I] -> [N, I]."""
        return x.reshape(-1, x.size(-1)).index_select(0, self.rows)

    def unpack(self, data: Tensor) -> Tensor:
        """[..., N, F] -> [..., T, B, F] or [..., B, T, F], zeros where there is padding."""
        lead, features = data.shape[:-2], data.size(-1)
        padded = data.new_zeros(*lead, self.shape[0] * self.shape[1], features)
        return padded.index_copy(-2, self.rows, data).reshape(*lead, *self.shape, features)


class _OneState(_Layers):
    """RNN and GRU, whose only state is h."""

    @staticmethod
    def _refuse_projection(proj_size: int) -> None:
        if proj_size != 0:
            raise ValueError(f"proj_size argument is only supported for LSTM, not RNN or GRU; got {proj_size}")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        return_state_sequence: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run all layers; see the class."""
        result: tuple[Tensor | PackedSequence, Tensor] = self._run(input, hx, lengths, return_state_sequence, mask)
        return result


class RNN(_OneState):
    """Elman RNN of one or more layers (Elman 1990): `torch.nn.RNN`, with the same arguments and parameters.

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or max(x, 0) in the place of tanh

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L.
        nonlinearity: "tanh" or "relu".
        bias: whether there are biases.
        batch_first: whether input and output are [B, T, ...] rather than [T, B, ...].
        dropout: probability of dropout on the outputs of all but the last layer, in training.
        bidirectional: whether a second direction runs from the end to the beginning.
        proj_size: for the LSTM only, here it must be 0; it has torch.nn's place in the order.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16 (with float32 arithmetic).
        recurrent_dropout: by keyword, of all layers (Keras' name): probability of variational dropout, in training.
            One mask of h_{t-1} for all steps, drawn in each call for each layer, direction and sequence, where W_hh
            multiplies h_{t-1} and nowhere else (Gal & Ghahramani 2016); what is left is scaled by 1 / (1 - p).

    Call:
        `layer(input, hx=None)` as in torch.nn, and by keyword, for all layers:

        lengths (the argument of `torch.nn.utils.rnn.pack_padded_sequence`): how many steps of each sequence of a padded
        batch are real, [B] integers from 0 to T, in any order, a list or a tensor on any device. Padding is not read
        and costs nothing; output is zero there, the reverse direction starts at each sequence's own end, and h_n holds
        the states at the ends; a sequence of length 0 keeps its initial states. The lengths are read by the CPU. Under
        torch.compile give a tensor (each new list is compiled anew) and fullgraph=True (or the graph breaks there).

        mask: the lengths in another form, that in which TorchRL has them: bool, [T, B], or [B, T] if batch_first, true
        for the steps that are real, which come before the others.

        return_state_sequence (haste's name): return in the place of the final states those after every step of every
        layer, [L D, T, B, H], with steps and batch laid out as in output ([L D, N, H] for a PackedSequence).

    Shape:
        input [T, B, I], [T, I] for one sequence, or a PackedSequence; hx [L D, B, H] or [L D, H], zeros if None.
        Returns output [T, B, D H] (or like input) and h_n like hx. With T = 0, h_n is hx.

    Raises:
        ValueError: input has a wrong number of dimensions or a dtype other than the parameters'; lengths do not fit;
            recurrent_dropout is not between 0 and 1.
        RuntimeError: a size does not fit.
        NotImplementedError: what torch.nn has not is wanted of a call that is left to it: see `_giving_way.py`.

    Dropout on the recurrent weights in the place of h (DropConnect, Wan et al. 2013; AWD-LSTM's weight drop) is
    `torch.nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", torch.nn.Dropout(0.5))`.

    Example:
        >>> import torch
        >>> from nlpkernels import RNN
        >>> output, h_n = RNN(10, 20, num_layers=2)(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> rnn = RNN(10, 20, num_layers=2, batch_first=True)
        >>> output, h_n = rnn(torch.randn(3, 5, 10), lengths=[2, 5, 0])
        >>> bool(output[0, 2:].any())
        False
        >>> output, h = rnn(torch.randn(3, 5, 10), return_state_sequence=True)
        >>> h.shape
        torch.Size([2, 3, 5, 20])
    """

    _torchs = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
    ) -> None:
        self._refuse_projection(proj_size)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self._set_recurrent_dropout(recurrent_dropout)


class GRU(_OneState):
    """Gated recurrent unit of one or more layers (Cho et al. 2014): `torch.nn.GRU`, same arguments and parameters.

        r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n_t = tanh(W_in x_t + b_in + r_t (W_hn h_{t-1} + b_hn))
        h_t = (1 - z_t) n_t + z_t h_{t-1}

    Arguments (but for nonlinearity), those of a call, shapes and errors are those of `RNN`.

    Example:
        >>> import torch
        >>> from nlpkernels import GRU
        >>> output, h_n = GRU(10, 20, bidirectional=True)(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    _torchs = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
    ) -> None:
        self._refuse_projection(proj_size)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self._set_recurrent_dropout(recurrent_dropout)


class LSTM(_Layers):
    """Long short-term memory of one or more layers: `torch.nn.LSTM`, with the same arguments and parameters.

        i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f_t c_{t-1} + i_t g_t
        h_t = o_t tanh(c_t), and W_hr h_t in its place if there is a projection

    (Hochreiter & Schmidhuber 1997, Gers et al. 2000; projection: Sak et al. 2014.)

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L.
        bias: whether there are biases.
        batch_first: whether input and output are [B, T, ...] rather than [T, B, ...].
        dropout: probability of dropout on the outputs of all but the last layer, in training.
        bidirectional: whether a second direction runs from the end to the beginning.
        proj_size: P, if larger than 0; smaller than H.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16 (with float32 arithmetic and c).
        recurrent_dropout: by keyword: see `RNN`. Of P features with a projection.

    Call:
        `layer(input, hx=None, *, lengths=None, return_state_sequence=False, mask=None)`: see `RNN`. The state sequences
        are (h [L D, T, B, P], c [L D, T, B, H]). A gradient of c between the steps comes from plain torch operations,
        step by step, and is slow; gradients of h and of the final c are not.

    Shape:
        input [T, B, I], [T, I] for one sequence, or a PackedSequence; hx = (h_0 [L D, B, P], c_0 [L D, B, H]) or
        without the B, zeros if None. Returns output [T, B, D P] (or like input) and (h_n, c_n) like hx.

    Raises:
        ValueError: input has a wrong number of dimensions or a dtype other than the parameters'; lengths do not fit.
        RuntimeError: a size does not fit, or hx is not a pair.
        NotImplementedError: see `RNN`.

    Example:
        >>> import torch
        >>> from nlpkernels import LSTM
        >>> output, (h_n, c_n) = LSTM(10, 20, num_layers=2)(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
    """

    _torchs = nn.LSTM
    # What torch.nn's layers have beside forward, which RNNBase has not.
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self._set_recurrent_dropout(recurrent_dropout)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        return_state_sequence: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run all layers; see the class."""
        result: tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]
        result = self._run(input, hx, lengths, return_state_sequence, mask)
        return result


class _Cell(RNNCellBase):
    """What the cells share. A cell is a layer of one step."""

    _torchs: ClassVar[type[nn.Module]]
    """The cell of torch.nn that this one is in the place of."""

    def _weights_of_call(self) -> list[Tensor]:
        return _parameters_of(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

    def _one_step(
        self, x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor], cell: str
    ) -> tuple[Tensor, ...]:
        """(h_1,) or (h_1, c_1) of x [B, I] from [B, H]."""
        h, _, c, _ = _ops.recurrent(x, None, h0.unsqueeze(0), None if c0 is None else c0.unsqueeze(0), weights, cell)
        return (h,) if c0 is None else (h, c.squeeze(0))

    def _step(self, cell: str, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None) -> Any:
        """What a call returns: new states, h or (h, c)."""
        weights = self._weights_of_call()
        if len(weights) == 3:  # as in torch.nn, a bias that is None beside one that is not counts as zeros
            weights.insert(2 if self.bias_ih is None else 3, torch.zeros_like(weights[2]))
        given: Any = hx if cell == "lstm" or hx is None else (hx,)
        if (stepped := _ops.recurrent_step(input, given, weights, cell)) is not None:
            return tuple(stepped) if cell == "lstm" else stepped[0]
        if is_torchs(input, *leaves(hx), *weights) or is_complex(input):
            node = in_graph(self, input, hx)
            return self._torchs.forward(self, input, hx) if node is None else node
        refuse_nested(type(self).__name__, input)
        states = _states_of(type(self).__name__, hx, 2 if cell == "lstm" else 1)
        dim, shape = input.dim(), (*input.shape[:-1], self.hidden_size)
        if states is None:
            zeros = input.new_zeros(shape)
            states = (zeros, zeros) if cell == "lstm" else (zeros,)
        fits = 1 <= dim <= 2 and input.size(-1) == self.input_size
        for state in states:
            fits = fits and state.shape == shape
        if not fits:
            self._refuse(cell, input, states)
        if dim == 1:
            input, states = input.unsqueeze(0), tuple(state.unsqueeze(0) for state in states)
        h0, c0 = states[0], states[1] if cell == "lstm" else None
        if _ops.is_left_to_torch(input) or self.hidden_size == 0:
            functional.check_shapes(cell, weights, self.input_size, len(weights) == 4)
            stepped = getattr(torch, f"{cell}_cell")(input, h0 if c0 is None else states, *weights)
            final = (stepped,) if c0 is None else stepped
        else:
            final = self._one_step(input, h0, c0, weights, cell)
        if dim == 1:
            final = tuple(state.squeeze(0) for state in final)
        return final if cell == "lstm" else final[0]

    def _refuse(self, cell: str, input: Tensor, states: tuple[Tensor, ...]) -> None:
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for i, state in enumerate(states):
            if state.dim() not in (1, 2):
                what = f"hx[{i}]" if cell == "lstm" else "hidden"
                raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
        if input.size(-1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(-1)} expected {self.input_size}")
        batch = input.shape[:-1]
        for i, state in enumerate(states):
            if state.shape[:-1] != batch:
                expected, got = ((*sizes, "none")[0] for sizes in (batch, state.shape[:-1]))
                raise RuntimeError(f"Input batch size {expected} doesn't match hidden{i} batch size {got}")
            if state.size(-1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{i} has inconsistent hidden_size: got {state.size(-1)}, expected {self.hidden_size}"
                )


class RNNCell(_Cell, nn.RNNCell):
    r"""One step of an Elman RNN: `torch.nn.RNNCell`, with the same arguments and parameters.

    Shape: input [B, I] or [I]; hx [B, H] or [H], zeros if None. Returns h' like hx. Equation and dtypes: see `RNN`.

    Raises:
        ValueError: input or hx has a wrong number of dimensions.
        RuntimeError: a size does not fit, or nonlinearity is neither "tanh" nor "relu".

    Example:
        >>> import torch
        >>> from nlpkernels import RNNCell
        >>> RNNCell(10, 20)(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    _torchs = nn.RNNCell

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; see the class."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        h: Tensor = self._step(f"rnn_{self.nonlinearity}", input, hx)
        return h


class GRUCell(_Cell, nn.GRUCell):
    """One step of a GRU: `torch.nn.GRUCell`, with the same arguments and parameters.

    Shape: input [B, I] or [I]; hx [B, H] or [H], zeros if None. Returns h' like hx. Equations and dtypes: see `GRU`.

    Raises:
        ValueError: input or hx has a wrong number of dimensions.
        RuntimeError: a size does not fit.

    Example:
        >>> import torch
        >>> from nlpkernels import GRUCell
        >>> GRUCell(10, 20)(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    _torchs = nn.GRUCell

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; see the class."""
        h: Tensor = self._step("gru", input, hx)
        return h


class LSTMCell(_Cell, nn.LSTMCell):
    """One step of an LSTM: `torch.nn.LSTMCell`, with the same arguments and parameters.

    Shape: input [B, I] or [I]; hx = (h [B, H] or [H], c alike), zeros if None. Returns (h', c') like hx. Equations and
    dtypes: see `LSTM`.

    Raises:
        ValueError: input or hx has a wrong number of dimensions.
        RuntimeError: a size does not fit.

    Example:
        >>> import torch
        >>> from nlpkernels import LSTMCell
        >>> h, c = LSTMCell(10, 20)(torch.randn(3, 10))
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    _torchs = nn.LSTMCell

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Take one step; see the class."""
        states: tuple[Tensor, Tensor] = self._step("lstm", input, hx)
        return states
