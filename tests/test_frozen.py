"""nlpkernels.freeze: layers and cells that only run, with weights of float32, bfloat16 or int8 that are packed once.

Of float32 they give the bits of converted layers. Of bfloat16 and int8 they are compared with `reference.frozen`, by
the same layer with that in the place of the kernel. That trained networks stand it is in test_frozen_networks.py.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import os
import pickle
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ops import HARMLESS, bits, error_of, strange_values
from test_threads import LIMIT, run_python
from tolerances import FROZEN, FROZEN_DEQUANTISED, FROZEN_MOSTLY, assert_frozen_close, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import nlpkernels
from nlpkernels import _ops, frozen, reference

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
NARROW = DTYPES[1:]
pytestmark = pytest.mark.skipif("config.getoption('emulated_cuda')", reason="these are the kernels of csrc/cpu")
without_sanitisers = pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="sanitisers are at work")
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "lstm with projection": ("LSTM", {"proj_size": 4}),
    "gru": ("GRU", {}),
}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNNCell", {}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
}

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
by_narrow = pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype)[6:])
by_layer = pytest.mark.parametrize("kind", LAYERS)
by_cell = pytest.mark.parametrize("kind", CELLS)


def layer_of(kind: str, inputs: int = 7, hidden: int = 9, library: Any = nn, **options: Any) -> Any:
    name, own = LAYERS[kind]
    return getattr(library, name)(inputs, hidden, **own, **options)


def cell_of(kind: str, inputs: int = 7, hidden: int = 9, library: Any = nn, **options: Any) -> Any:
    name, own = CELLS[kind]
    return getattr(library, name)(inputs, hidden, **own, **options)


def frozen_copy(module: nn.Module, dtype: torch.dtype) -> Any:
    copied = copy.deepcopy(module)
    swaps = nlpkernels.freeze(copied, dtype)
    assert swaps.swapped and not swaps.left
    return copied


def converted(module: nn.Module) -> Any:
    copied = copy.deepcopy(module)
    nlpkernels.convert(copied)
    return copied


def states_of(layer: Any, batch: int | None, dtype: torch.dtype = torch.float32) -> Any:
    """Random states of a layer or a cell; without a batch if there is none."""
    if isinstance(layer, nn.RNNCellBase):
        lead: tuple[int, ...] = () if batch is None else (batch,)
        features = layer.hidden_size
        has_c = isinstance(layer, nn.LSTMCell)
    else:
        rows = layer.num_layers * (2 if layer.bidirectional else 1)
        lead = (rows,) if batch is None else (rows, batch)
        features, has_c = layer.proj_size or layer.hidden_size, layer.mode == "LSTM"
    h = torch.randn(*lead, features, dtype=dtype)
    return (h, torch.randn(*lead, layer.hidden_size, dtype=dtype)) if has_c else h


@contextmanager
def by_reference() -> Iterator[None]:
    """Frozen layers run reference.py in the place of the kernel."""
    before = _ops.frozen, _ops.frozen_layers
    _ops.frozen, _ops.frozen_layers = reference.frozen, lambda *args: None  # type: ignore[assignment]
    try:
        yield
    finally:
        _ops.frozen, _ops.frozen_layers = before


def assert_same_bits(got: Any, expected: Any) -> None:
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), (one - other).abs().max()
            assert torch.equal(one.isnan(), other.isnan())
        else:
            assert one == other


def assert_close(got: Any, expected: Any, dtype: torch.dtype, times: float = 1.0) -> None:
    """Results of a frozen layer, by the table, as close as its weights' dtype and their own dtype let them be."""
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if not isinstance(one, Tensor):
            assert one == other
            continue
        if one.dtype == torch.int64:  # sizes and orders of a PackedSequence
            assert torch.equal(one, other)
        else:
            assert_frozen_close(one, other, dtype, times, "result")


# --- What it takes ---------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Recurrent layers of every kind among other things, one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True, proj_size=3)
        self.more = nn.ModuleDict({"gru": nn.GRU(6, 4, batch_first=True), "rnn": nn.RNN(4, 4, batch_first=True)})
        self.again = self.more["rnn"]
        self.cells = nn.ModuleList([nn.LSTMCell(4, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 6, nonlinearity="relu")])
        self.output = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.more["gru"](self.lstm(self.embedding(ids))[0])[0]
        x = self.again(self.more["rnn"](x)[0])[0].mean(1)
        h, _ = self.cells[0](x)
        return self.output(self.cells[2](self.cells[1](h)))


@by_dtype
@pytest.mark.parametrize("library", [nn, nlpkernels], ids=["torch.nn", "ours"])
@torch.no_grad()
def test_a_model(dtype: torch.dtype, library: Any) -> None:
    model, ids = Tagger(), torch.randint(20, (3, 7))
    if library is nlpkernels:
        nlpkernels.convert(model)
    expected = converted(model)(ids)
    calls: list[str] = []
    model.lstm.register_forward_hook(lambda *_: calls.append("lstm"))
    modules, others = list(model.modules()), list(model.embedding.parameters()) + list(model.output.parameters())
    swaps = nlpkernels.freeze(model, dtype)
    names = {"lstm", "more.gru", "more.rnn", "cells.0", "cells.1", "cells.2"}
    assert set(swaps.swapped) == names and not swaps.left
    assert "lstm: now nlpkernels.frozen.FrozenLSTM" in str(swaps)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True)) and model.again is model.more["rnn"]
    assert all(a is b for a, b in zip(model.parameters(), others, strict=True))
    assert f"frozen={str(dtype)[6:]}" in repr(model.lstm) and "proj_size=3" in repr(model.lstm)
    got = model(ids)
    if dtype == torch.float32:
        assert torch.equal(got, expected)
    else:
        assert 0 < relative_error(got, expected) < FROZEN_DEQUANTISED[dtype]
    assert calls == ["lstm"]


def test_all_of_the_options() -> None:
    """Layers, directions, biases, batch_first: values and shapes, of every kind and dtype."""
    for kind in LAYERS:
        for dtype in DTYPES:
            for layers, bidirectional, bias, first in (
                (1, True, False, False),
                (3, True, True, True),
                (2, False, False, True),
            ):
                layer = layer_of(kind, num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=first)
                mine, x = frozen_copy(layer, dtype), torch.randn(3, 4, 7)
                hx = states_of(layer, 3 if first else 4)
                if dtype == torch.float32:
                    assert_same_bits(mine(x, hx), converted(layer)(x, hx))
                else:
                    got = mine(x, hx)
                    with by_reference():
                        assert_close(got, mine(x, hx), dtype, layers)


def test_predicate_subclasses_and_what_makes_weights_anew() -> None:
    class Special(nn.LSTM):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(nn.LSTM(3, 3), "weight_hh_l0")
    model = nn.ModuleDict(
        {
            "a": nn.GRU(3, 3), "b": nn.GRU(3, 3), "special": Special(3, 3), "normed": normed,
            "pruned": prune.l1_unstructured(nn.GRU(3, 3), "weight_ih_l0", 0.5),
            "parametrized": parametrize.register_parametrization(nn.GRUCell(3, 3), "weight_hh", nn.Dropout(0.5)),
            "none": nn.GRUCell(3, 0),
        }
    )  # fmt: skip
    x = torch.randn(4, 2, 3)
    for dtype in DTYPES:
        swaps = nlpkernels.freeze(model, dtype, lambda name, module: name not in "ab")
        expected = {"special", "normed", "pruned", "parametrized", *(["none"] if dtype != torch.float32 else [])}
        assert set(swaps.left) == expected
        assert type(model["a"]) is nn.GRU and type(model["special"]) is Special and type(model["normed"]) is nn.LSTM
        for name in ("a", "special", "normed", "pruned"):
            model[name](x)[0].sum().backward()
        model["parametrized"](x[0]), model["none"](x[0])
        nlpkernels.revert(model)
    assert "Special" in swaps.left["special"] and "weight_norm" in swaps.left["normed"]
    swaps = nlpkernels.freeze(model, torch.int8, lambda name, module: name != "b")
    assert set(swaps.swapped) == {"a"} and type(model["a"]) is nlpkernels.frozen.FrozenGRU
    assert type(model["b"]) is nn.GRU


def test_wrong_dtype_changes_nothing() -> None:
    model = Tagger()
    before = {name: type(module) for name, module in model.named_modules()}
    for dtype in (torch.float16, torch.uint8, torch.float64, "int8", None):
        with pytest.raises(ValueError, match=r"expected dtype to be torch.float32, torch.bfloat16 or torch.int8, got"):
            nlpkernels.freeze(model, dtype)  # type: ignore[arg-type]
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_an_error_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(2, 1, 3)
    monkeypatch.setattr(reference, "pack_frozen", lambda *args: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        nlpkernels.freeze(layer, torch.int8)
    assert type(layer) is nn.LSTM and len(list(layer.parameters())) == 4
    layer(x)[0].sum().backward()


@by_dtype
@torch.no_grad()
def test_twice(dtype: torch.dtype) -> None:
    """The second time changes nothing, and says so."""
    model, ids = Tagger(), torch.randint(20, (3, 7))
    nlpkernels.freeze(model, dtype)
    expected = model(ids)
    for other in DTYPES:
        swaps = nlpkernels.freeze(model, other)
        assert not swaps.swapped and len(swaps.left) == 6
        assert swaps.left["cells.1"] == f"frozen as {dtype} already, revert it before"
        assert torch.equal(model(ids), expected)
    assert set(nlpkernels.convert(model).swapped) == {"embedding"} and not nlpkernels.convert(model).left


# --- Calls, in all their forms ---------------------------------------------------------------------------------------

Call = Callable[[Any, bool], Any]


def forms(layer: Any) -> dict[str, Callable[[Any], Any]]:
    """Calls of a layer like this one in every form, on data that are the same at each."""
    first, steps, batch = layer.batch_first, 4, 5
    x = torch.randn(batch, steps, 7) if first else torch.randn(steps, batch, 7)
    hx, hx1 = states_of(layer, batch), states_of(layer, None)
    lengths = torch.tensor([3, 4, 1, 2, 4])
    falling = lengths.sort(descending=True).values
    real = torch.arange(steps) < lengths.unsqueeze(1)
    mask = real if first else real.T
    packed = pack_padded_sequence(x, falling, batch_first=first)
    unsorted = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
    with_empty = torch.tensor([3, 0, 4, 0, 2])
    strided = torch.randn(*x.shape[:-1], 14)[..., ::2]
    return {
        "plain": lambda f: f(x),
        "states": lambda f: f(x, hx),
        "strides": lambda f: f(strided, hx),
        "unbatched": lambda f: f(torch.ones(4, 7)),
        "unbatched with states": lambda f: f(torch.ones(4, 7), hx1),
        "one step": lambda f: f(x[:, :1] if first else x[:1], hx),
        "one sequence": lambda f: f(x[:1] if first else x[:, :1]),
        "packed": lambda f: f(packed, hx),
        "unsorted": lambda f: f(unsorted, hx),
        "unsorted from zeros": lambda f: f(unsorted),
        "lengths": lambda f: f(x, hx, lengths=lengths),
        "list of lengths": lambda f: f(x, lengths=lengths.tolist()),
        "array of lengths": lambda f: f(x, lengths=lengths.numpy()),
        "some without steps": lambda f: f(x, hx, lengths=with_empty),
        "mask": lambda f: f(x, hx, mask=mask),
        "all states": lambda f: f(x, hx, return_state_sequence=True),
        "all states of some": lambda f: f(x, lengths=with_empty, return_state_sequence=True),
        "all states of packed": lambda f: f(unsorted, hx, return_state_sequence=True),
        "all states unbatched": lambda f: f(torch.ones(4, 7), hx1, return_state_sequence=True),
        "no steps": lambda f: f(x[:, :0] if first else x[:0], hx),
        "no sequences": lambda f: f(x[:0] if first else x[:, :0]),
    }


@by_layer
@by_dtype
@pytest.mark.parametrize("first", [False, True], ids=["", "batch_first"])
def test_forms(kind: str, dtype: torch.dtype, first: bool) -> None:
    layer = layer_of(kind, num_layers=1 + first, bidirectional=not first, batch_first=first)
    mine, other = frozen_copy(layer, dtype), converted(layer)
    for name, call in forms(layer).items():
        got = call(mine)
        if dtype == torch.float32:
            assert_same_bits(got, call(other))
        else:
            with by_reference():
                expected = call(mine)
            try:
                assert_close(got, expected, dtype, 2)
            except AssertionError as error:
                raise AssertionError(name) from error
            assert [leaf.shape for leaf in tree_leaves(got) if isinstance(leaf, Tensor)] == [
                leaf.shape for leaf in tree_leaves(call(other)) if isinstance(leaf, Tensor)
            ]


@by_cell
@by_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind: str, dtype: torch.dtype, bias: bool) -> None:
    cell = cell_of(kind, bias=bias)
    mine, other = frozen_copy(cell, dtype), converted(cell)
    for batch in (None, 0, 1, 2, 5, 9):
        x = torch.randn(7) if batch is None else torch.randn(batch, 7)
        for hx in (None, states_of(cell, batch)):
            got = mine(x, hx)
            if dtype == torch.float32:
                assert_same_bits(got, other(x, hx))
            else:
                with by_reference():
                    assert_close(got, mine(x, hx), dtype)


@by_dtype
def test_a_cell_is_a_layer_of_one_step(dtype: torch.dtype) -> None:
    for kind in CELLS:
        layer, cell = layer_of(kind, 7, 33), cell_of(kind, 7, 33)
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
        x, hx = torch.randn(3, 7), states_of(cell, 3)
        layer, cell = frozen_copy(layer, dtype), frozen_copy(cell, dtype)
        _, of_layer = layer(x.unsqueeze(0), tree_map(lambda h: h.unsqueeze(0), hx))
        of_cell = cell(x, hx)
        for one, other in zip(tree_leaves(of_cell), tree_leaves(of_layer), strict=True):
            torch.testing.assert_close(one, other.squeeze(0), rtol=1e-5, atol=1e-6)
            assert dtype == torch.float32 or torch.equal(one, other.squeeze(0))


@by_narrow
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Inputs and outputs may have any dtype: values are those of float32, rounded once."""
    for module in (layer_of("lstm", num_layers=2), layer_of("gru"), cell_of("lstm"), cell_of("rnn_tanh")):
        mine = frozen_copy(module, dtype)
        for other in (torch.float64, torch.bfloat16, torch.float16):
            x = torch.randn(*((3, 2, 7) if isinstance(module, nn.RNNBase) else (2, 7))).to(other)
            hx = states_of(module, 2, other)
            wide = mine(x.float(), tree_map(Tensor.float, hx))
            assert_same_bits(mine(x, hx), tree_map(lambda t: t.to(other), wide))  # noqa: B023
            assert {leaf.dtype for leaf in tree_leaves(mine(x))} == {other}
        for strange in (torch.int64, torch.complex64, torch.bool):
            with pytest.raises(ValueError, match="expected input of dtype float32, float64, bfloat16 or float16, got"):
                mine(x.to(strange))


def test_layers_of_other_dtypes() -> None:
    """Frozen as float32 their weights stay as they are; as int8 or bfloat16 they are rounded from there."""
    for other in (torch.float64, torch.bfloat16, torch.float16):
        for module in (layer_of("lstm", dtype=other), cell_of("gru", dtype=other)):
            x = torch.randn(*((3, 2, 7) if isinstance(module, nn.RNNBase) else (2, 7))).to(other)
            assert_same_bits(frozen_copy(module, torch.float32)(x), converted(module)(x))
            for dtype in NARROW:
                assert_same_bits(frozen_copy(module, dtype)(x), frozen_copy(copy.deepcopy(module).float(), dtype)(x))


@by_dtype
def test_autocast(dtype: torch.dtype) -> None:
    """Of float32 as the converted layer; the others have a precision of their own, and give what they are given."""
    for module in (layer_of("lstm", num_layers=2, bidirectional=True), layer_of("gru"), cell_of("lstm")):
        mine, x = frozen_copy(module, dtype), torch.randn(*((3, 2, 7) if isinstance(module, nn.RNNBase) else (2, 7)))
        with torch.autocast("cpu", torch.bfloat16):
            got, of_half = mine(x), mine(x.bfloat16())
            expected = converted(module)(x)
        assert_same_bits(got, expected if dtype == torch.float32 else mine(x))
        assert tree_leaves(of_half)[0].dtype == torch.bfloat16


def test_wrong_calls_raise_what_layers_raise() -> None:
    for dtype in DTYPES:
        layer = nn.LSTM(3, 4)
        mine, other = frozen_copy(layer, dtype), converted(layer)
        calls = [
            lambda f: f(torch.randn(2, 1, 5)),
            lambda f: f(torch.randn(2)),
            lambda f: f(torch.randn(2, 1, 3), torch.randn(1, 1, 4)),
            lambda f: f(torch.randn(2, 1, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))),
            lambda f: f(torch.randn(2, 1, 3), lengths=[3]),
            lambda f: f(torch.randn(2, 3), lengths=[3]),
            lambda f: f(torch.randn(2, 1, 3), lengths=[1], mask=torch.ones(2, 1, dtype=torch.bool)),
        ]
        for call in calls:
            with pytest.raises((RuntimeError, ValueError)) as expected:
                call(other)
            with pytest.raises(type(expected.value)) as got:
                call(mine)
            assert str(got.value).replace("FrozenLSTM", "LSTM") == str(expected.value)


# --- Values of bfloat16 and int8 -------------------------------------------------------------------------------------


@by_layer
@by_narrow
@pytest.mark.parametrize("hidden", [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 127, 128, 129])
def test_sizes(kind: str, dtype: torch.dtype, hidden: int) -> None:
    """Around vectors, panels and groups of them; of inputs around words; of sequences around tiles of rows."""
    options = {"proj_size": hidden // 2} if "projection" in kind and hidden > 1 else {}
    kind = kind.removesuffix(" with projection")
    for inputs in (1, 3, 4, 5):
        layer = layer_of(kind, inputs, hidden, bidirectional=inputs == 3, **options)
        mine, batch = frozen_copy(layer, dtype), random.randint(1, 9)
        x = torch.randn(random.choice((1, 2, 4)), batch, inputs)
        hx = states_of(layer, batch)
        got = mine(x, hx)
        with by_reference():
            assert_close(got, mine(x, hx), dtype)


@by_narrow
def test_rounding_is_that_of_the_reference(dtype: torch.dtype) -> None:
    """But for ties and what is next to them: most calls of one layer agree to the last bits of float32."""
    errors = []
    for kind in LAYERS:
        for hidden in (5, 16, 33, 48, 127):
            layer = layer_of(kind, random.choice((1, 3, 5, 16)), hidden)
            mine, x = frozen_copy(layer, dtype), torch.randn(random.choice((1, 3, 8)), 3, layer.input_size)
            with by_reference():
                expected = mine(x)[0]
            errors.append(relative_error(mine(x)[0], expected))
    assert sorted(errors)[3 * len(errors) // 4] < FROZEN_MOSTLY, sorted(errors)


@by_narrow
@pytest.mark.parametrize(("hidden", "batch", "steps"), [(16, 1, 300), (17, 3, 130), (600, 1, 129), (600, 5, 60)])
def test_blocks_of_steps(dtype: torch.dtype, hidden: int, batch: int, steps: int) -> None:
    """A step more or less changes no bit of what comes before it, wherever a block ends; and all is right."""
    layer = frozen_copy(layer_of("gru", 5, hidden), dtype)
    x = torch.randn(steps, batch, 5)
    y, _ = layer(x)
    for fewer in (steps - 1, 128 // batch + 1, 128 // batch, 128 // batch - 1):
        assert torch.equal(layer(x[:fewer])[0], y[:fewer])
    with by_reference():
        assert_close(y[-20:], layer(x)[0][-20:], dtype, 3)


def test_widest_rows() -> None:
    """Sums of int8 have room for as many products as there may be; of more, layers are left alone."""
    for sign in (1, -1):
        layer = nn.RNN(frozen.MOST, 3, nonlinearity="relu", bias=False)
        with torch.no_grad():
            layer.weight_ih_l0.fill_(1.0)[1].neg_()
            layer.weight_ih_l0[2, ::2] = -1.0
        x = torch.full((1, 1, frozen.MOST), float(sign))
        y = frozen_copy(layer, torch.int8)(x)[0]
        expected = torch.tensor([frozen.MOST * sign, -frozen.MOST * sign, 0.0]).relu()
        torch.testing.assert_close(y[0, 0], expected, rtol=1e-6, atol=0)
    for wide in (nn.RNN(frozen.MOST + 1, 1), nn.RNNCell(frozen.MOST + 1, 1)):
        for dtype in NARROW:
            swaps = nlpkernels.freeze(wide, dtype)
            assert not swaps.swapped and "more than 65,536 inputs or hidden units" in swaps.left[""]


def test_oracle_is_what_weights_say() -> None:
    """reference.frozen rounds to the weights of quantise() and no others, and is close to the layer that was frozen."""
    for dtype in NARROW:
        for kind in LAYERS:
            layer = layer_of(kind, 40, 64, bidirectional=True)
            mine, x = frozen_copy(layer, dtype), torch.randn(7, 3, 40)
            with by_reference():
                error = relative_error(mine(x)[0], layer(x)[0].detach())
            assert error < FROZEN_DEQUANTISED[dtype], (kind, error)
            for name, value in mine.state_dict().items():
                if name.endswith("_scale"):
                    weight = getattr(layer, name.removesuffix("_scale")).detach()
                    torch.testing.assert_close(value, weight.abs().amax(1) / 127)
                    stored = mine.state_dict()[name.removesuffix("_scale")]
                    assert stored.dtype == torch.int8 and int(stored.abs().max()) == 127
                    assert bool(((stored * value.unsqueeze(1) - weight).abs() <= 0.501 * value.unsqueeze(1)).all())


@by_layer
@by_dtype
def test_bits_depend_on_neither_batch_nor_threads(kind: str, dtype: torch.dtype, restored_threads: None) -> None:
    """Sequences alone and together, ragged too; one thread or several, that cut units where sequences are few."""
    hidden = 200 if dtype != torch.float32 else 96
    layer = layer_of(kind, 33, hidden, num_layers=2, bidirectional=True)
    mine = frozen_copy(layer, dtype)
    x, lengths = torch.randn(9, 7, 33), torch.tensor([9, 9, 7, 5, 4, 4, 2])
    hx = states_of(layer, 7)
    torch.set_num_threads(1)
    y, final = mine(x, hx)
    ragged, ragged_final = mine(x, hx, lengths=lengths)
    alone = [mine(x[:, i : i + 1], tree_map(lambda h: h[:, i : i + 1].contiguous(), hx)) for i in range(7)]  # noqa: B023
    for i in range(7):
        assert_same_bits(alone[i], tree_map(lambda t: t[:, i : i + 1], (y, final)))  # noqa: B023
        own = mine(x[: lengths[i], i : i + 1], tree_map(lambda h: h[:, i : i + 1], hx))  # noqa: B023
        assert_same_bits(own, (ragged[: lengths[i], i : i + 1], tree_map(lambda t: t[:, i : i + 1], ragged_final)))  # noqa: B023
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_same_bits(mine(x, hx), (y, final))
        assert_same_bits(mine(x, hx, lengths=lengths), (ragged, ragged_final))
        assert_same_bits(mine(x[:, :1], tree_map(lambda h: h[:, :1], hx)), alone[0])
        if dtype == torch.float32:
            assert_same_bits(mine(x, hx), converted(layer)(x, hx))


BITS = """
import hashlib, sys
from torch.utils._pytree import tree_leaves
for layer, x in torch.load({file!r}, weights_only=False):
    for leaf in tree_leaves(layer(x)):
        print(leaf.double().norm().item(), hashlib.sha256(leaf.contiguous().numpy()).hexdigest())
"""


def test_bits_of_other_instruction_sets(tmp_path: Path) -> None:
    """Sums of int8 are exact: whatever multiplies them, the bits are the same, but for the default's functions.

    Weights and inputs come from here: torch draws others with other instructions.
    """
    if os.environ.get("NLPKERNELS_CPU"):
        pytest.skip("an instruction set is forced already")
    cases = []
    for kind in LAYERS:
        for inputs, hidden, batch in ((5, 9, 1), (64, 128, 5), (33, 50, 3)):
            layer, x = layer_of(kind, inputs, hidden, num_layers=2, bidirectional=True), torch.randn(6, batch, inputs)
            cases += [(frozen_copy(layer, dtype), x) for dtype in NARROW]
    torch.save(cases, tmp_path / "cases")
    best = _ops.INSTRUCTION_SETS.index(_ops.INSTRUCTION_SET)
    usable = [n for n in _ops.INSTRUCTION_SETS[: best + 1] if _ops._library(f"_cpu_{n}") and n not in _ops.OF_BFLOAT16]
    ways: dict[str, dict[str, str]] = {name: {"NLPKERNELS_CPU": name} for name in usable}
    if "avx2" in usable:  # which multiplies int8 by one instruction where there is one, unless it is forced
        ways["as on a machine with AVX2"] = {"ATEN_CPU_CAPABILITY": "avx2"}
    expected = [(layer.frozen_dtype, leaf) for layer, x in cases for leaf in tree_leaves(layer(x))]
    hashes = [hashlib.sha256(leaf.contiguous().numpy()).hexdigest() for _, leaf in expected]
    for way, environment in ways.items():
        found = run_python(BITS.format(file=str(tmp_path / "cases")), **environment).splitlines()
        for line, (dtype, leaf), own_bits in zip(found, expected, hashes, strict=True):
            norm, other_bits = line.split()
            assert float(norm) == pytest.approx(leaf.double().norm().item(), rel=20 * FROZEN[dtype]), way
            if way != "default" and _ops.INSTRUCTION_SET != "default" and dtype == torch.int8:
                assert other_bits == own_bits, way
    if len(usable) < 3:
        pytest.skip(f"libraries here: {', '.join(usable)}")


# --- Training is refused ---------------------------------------------------------------------------------------------


@by_dtype
def test_gradients_are_refused(dtype: torch.dtype) -> None:
    for module in (layer_of("lstm", num_layers=2), layer_of("gru"), cell_of("lstm"), cell_of("rnn_relu")):
        mine = frozen_copy(module, dtype)
        assert not list(mine.parameters())
        x = torch.randn(*((3, 2, 7) if isinstance(module, nn.RNNBase) else (2, 7)))
        hx = states_of(module, 2)
        expected = mine(x, hx)
        assert not any(leaf.requires_grad for leaf in tree_leaves(expected))
        wants = x.clone().requires_grad_()
        calls: list[Callable[[], Any]] = [
            lambda: mine(wants, hx),  # noqa: B023
            lambda: mine(wants),  # noqa: B023
            lambda: mine(x, tree_map(lambda h: h.clone().requires_grad_(), hx)),  # noqa: B023
        ]
        if isinstance(hx, tuple):
            calls.append(lambda: mine(x, (hx[0], hx[1].clone().requires_grad_())))  # noqa: B023
        if isinstance(module, nn.RNNBase):
            calls += [
                lambda: mine(wants, lengths=[3, 2]),  # noqa: B023
                lambda: mine(wants, return_state_sequence=True),  # noqa: B023
                lambda: mine(pack_padded_sequence(wants, [3, 2])),  # noqa: B023
            ]
        for call in calls:
            with pytest.raises(
                RuntimeError, match=r"a frozen layer only runs: expected inputs and states that require"
            ):
                call()
            with torch.no_grad():
                call()
            with torch.inference_mode():
                call()
        with torch.no_grad():
            assert_same_bits(mine(wants, hx), expected)
        assert_same_bits(mine(wants.detach(), hx), expected)


@by_dtype
def test_train_changes_nothing(dtype: torch.dtype) -> None:
    layer = layer_of("gru", num_layers=2, dropout=0.5, library=nlpkernels, recurrent_dropout=0.5)
    model = nn.Sequential(frozen_copy(layer, dtype))
    x = torch.randn(4, 2, 7)
    expected = model(x)
    assert model.train() is model and model.training and not model[0].training
    assert model[0].train() is model[0] and model[0].eval() is model[0]
    assert_same_bits(model(x), expected)
    assert dtype != torch.float32 or torch.equal(layer.eval()(x)[0], expected[0])


def test_raw_ops_have_no_derivative() -> None:
    for name, args in samples():
        op = getattr(torch.ops.nlpkernels, name)
        x = args[0].clone().requires_grad_()
        y, *_ = op(x, *args[1:])
        with pytest.raises(NotImplementedError, match="a frozen layer only runs"):
            y.sum().backward()
        if name == "frozen":
            with pytest.raises(NotImplementedError, match="expected no tangents"):
                torch.func.jvp(lambda x: op(x, *args[1:])[0], (args[0],), (args[0],))  # noqa: B023


# --- Saved and loaded ------------------------------------------------------------------------------------------------


def modules_of_all_kinds() -> list[Any]:
    layers = [layer_of(kind, num_layers=2, bidirectional=True, bias=kind != "lstm") for kind in LAYERS]
    return layers + [cell_of(kind, bias=kind != "gru") for kind in CELLS]


def input_of(module: Any) -> Tensor:
    return torch.randn(*((3, 2, 7) if isinstance(module, nn.RNNBase) else (2, 7)))


@by_dtype
def test_state_dict(dtype: torch.dtype) -> None:
    for module in modules_of_all_kinds():
        mine, x = frozen_copy(module, dtype), input_of(module)
        state = mine.state_dict()
        weights = {name for name in module.state_dict() if name.startswith("weight")}
        scales = {f"{name}_scale" for name in weights} if dtype == torch.int8 else set()
        assert set(state) == {*module.state_dict(), *scales}
        assert {state[name].dtype for name in weights} == {dtype}
        assert all(value.dtype == torch.float32 for name, value in state.items() if name not in weights)
        assert all(
            value.shape == module.state_dict()[name].shape for name, value in state.items() if name not in scales
        )
        fresh = copy.deepcopy(module)
        for parameter in fresh.parameters():
            nn.init.normal_(parameter)
        for assign in (False, True):
            other = frozen_copy(fresh, dtype)
            assert not torch.equal(tree_leaves(other(x))[0], tree_leaves(mine(x))[0])
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            assert str(other.load_state_dict(loaded, assign=assign)) == "<All keys matched successfully>"
            assert_same_bits(other(x), mine(x))
            again = other.state_dict()
            assert all(torch.equal(again[name], value) for name, value in state.items()) and len(again) == len(state)
        # And that of the layer before it was frozen, which is rounded as freeze does.
        other = frozen_copy(fresh, dtype)
        assert str(other.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
        assert_same_bits(other(x), mine(x))


@by_dtype
@torch.no_grad()
def test_state_dict_of_a_model(dtype: torch.dtype) -> None:
    model, fresh, ids = Tagger(), Tagger(), torch.randint(20, (3, 7))
    nlpkernels.freeze(model, dtype), nlpkernels.freeze(fresh, dtype)
    state = model.state_dict(prefix="some.")
    assert "some.lstm.weight_hr_l1_reverse" in state and "some.more.gru.bias_ih_l0" in state
    assert not any("packed" in name or "factors" in name for name in state)
    fresh.load_state_dict({name.removeprefix("some."): value for name, value in state.items()})
    assert_same_bits(fresh(ids), model(ids))


@by_dtype
def test_errors_of_load_state_dict(dtype: torch.dtype) -> None:
    mine = nn.ModuleDict({"a": frozen_copy(nn.GRU(3, 4, 2), dtype)})
    state, x = mine.state_dict(), torch.randn(5, 2, 3)
    before = mine["a"](x)
    missing = {name: value for name, value in state.items() if name != "a.weight_hh_l1"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "a.weight_hh_l1"\. *$'):
        mine.load_state_dict(missing)
    for name in ("a.weight_hh_l2", "a.packed_l0", "a.weight_ih_l0.more"):
        with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{name}"\. *$'):
            mine.load_state_dict({**state, name: torch.zeros(3)})
        assert mine.load_state_dict({**state, name: torch.zeros(3)}, strict=False).unexpected_keys == [name]
    wrong = {**state, "a.weight_ih_l0": torch.zeros(5, 3), "a.bias_hh_l1": torch.zeros(3)}
    with pytest.raises(RuntimeError) as error:
        mine.load_state_dict(wrong)
    for name, got, expected in (("weight_ih_l0", [5, 3], [12, 3]), ("bias_hh_l1", [3], [12])):
        assert (
            f"size mismatch for a.{name}: copying a param with shape torch.Size({got}) from checkpoint, "
            f"the shape in current model is torch.Size({expected})."
        ) in str(error.value)
    with pytest.raises(RuntimeError, match=r'"a.weight_ih_l0", expected torch.Tensor or Tensor-like object'):
        mine.load_state_dict({**state, "a.weight_ih_l0": 3})
    assert_same_bits(mine["a"](x), before)
    if dtype == torch.int8:
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "a.weight_ih_l0_scale"'):
            mine.load_state_dict({n: v for n, v in state.items() if n != "a.weight_ih_l0_scale"})
    # Some of it, in place of those that are there.
    other = frozen_copy(nn.ModuleDict({"a": nn.GRU(3, 4, 2)}), dtype)
    part = {name: value for name, value in other.state_dict().items() if name.endswith(("_l1", "_l1_scale"))}
    result = mine.load_state_dict(part, strict=False)
    assert all("_l0" in name for name in result.missing_keys) and not result.unexpected_keys
    got = mine.state_dict()
    assert all(torch.equal(got[name], value) for name, value in part.items())
    assert all(torch.equal(got[name], state[name]) for name in got if "_l0" in name)


@by_dtype
def test_what_users_put_beside_the_weights(dtype: torch.dtype) -> None:
    """Buffers, parameters and hooks of their own stay, and are saved and loaded."""
    layer = nn.GRU(3, 4)
    layer.register_buffer("mine", torch.ones(2))
    layer.register_parameter("extra", nn.Parameter(torch.ones(3)))
    x, expected = torch.randn(5, 2, 3), layer.extra
    frozen_layer = frozen_copy(layer, dtype)
    got = frozen_layer(x)
    state = frozen_layer.state_dict()
    assert {"mine", "extra"} < set(state) and [n for n, _ in frozen_layer.named_parameters()] == ["extra"]
    state["mine"] = state["mine"] * 3
    frozen_layer.load_state_dict(state)
    assert frozen_layer.mine.tolist() == [3, 3]
    assert_same_bits(frozen_layer(x), got)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "extra", "mine"'):
        frozen_layer.load_state_dict({n: v for n, v in state.items() if n not in ("mine", "extra")})
    nlpkernels.revert(frozen_layer)
    assert [n for n, _ in frozen_layer.named_parameters()] == [
        "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "extra",
    ]  # fmt: skip
    assert torch.equal(frozen_layer.extra, expected) and [n for n, _ in frozen_layer.named_buffers()] == ["mine"]


@by_dtype
def test_copies_and_moves(dtype: torch.dtype) -> None:
    for module in modules_of_all_kinds():
        mine, x = frozen_copy(module, dtype), input_of(module)
        expected = mine(x)
        file = io.BytesIO()
        torch.save(mine, file)
        file.seek(0)
        copies = [
            copy.deepcopy(mine),
            copy.copy(mine),
            pickle.loads(pickle.dumps(mine)),
            torch.load(file, weights_only=False),
            copy.deepcopy(mine).share_memory(),
            copy.deepcopy(mine).to("cpu"),
            copy.deepcopy(mine).requires_grad_(False),
            copy.deepcopy(mine).cpu(),
        ]
        if dtype != torch.float32:
            copies += [copy.deepcopy(mine).half(), copy.deepcopy(mine).double(), copy.deepcopy(mine).to(torch.bfloat16)]
        for other in copies:
            assert_same_bits(other(x), expected)
            assert type(other) is type(mine) and set(other.state_dict()) == set(mine.state_dict())
        if dtype == torch.float32:
            assert_same_bits(copy.deepcopy(mine).double()(x.double()), converted(module).double()(x.double()))
        names = {name for name, _ in mine.named_buffers()}
        if dtype == torch.float32:
            assert names == {name for name, _ in module.named_parameters()}
        else:
            assert len(names) == 2 * len(
                {name.split("_", 2)[2] if "_l" in name else "" for name in module.state_dict()}
            )


def test_meta_layers_are_loaded() -> None:
    for dtype in DTYPES:
        layer, x = nn.LSTM(6, 5, 2, bidirectional=True, proj_size=3), torch.randn(4, 2, 6)
        with torch.device("meta"):
            empty = nn.LSTM(6, 5, 2, bidirectional=True, proj_size=3)
            nlpkernels.freeze(empty, dtype)
        y, (h, c) = empty(x.to("meta"))
        assert y.shape == (4, 2, 6) and h.shape == (4, 2, 3) and c.shape == (4, 2, 5) and y.device.type == "meta"
        mine = frozen_copy(layer, dtype)
        empty.load_state_dict(mine.state_dict(), assign=True)
        assert_same_bits(empty(x), mine(x))


# --- Weights that change, of float32, whose packed copies are kept ---------------------------------------------------


def changes(layer: nn.LSTM) -> dict[str, Callable[[], Any]]:
    """What one may do to weights of a frozen layer."""

    def by_optimizer_of(parameter: Tensor) -> None:
        parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD([parameter], lr=0.1).step()

    def set_data() -> None:
        layer.weight_hh_l0.data = torch.randn(24, 6)

    return {
        "in place": lambda: layer.weight_hh_l0.mul_(0.5),
        "a part of a bias": lambda: layer.bias_ih_l0[2:5].add_(0.5),
        "copy": lambda: layer.weight_ih_l0.copy_(torch.randn(24, 5)),
        "out": lambda: torch.mul(layer.weight_hh_l0, 2, out=layer.weight_hh_l0),
        "a view": lambda: layer.weight_hh_l0.view(-1)[:30].zero_(),
        "replaced": lambda: setattr(layer, "weight_hh_l0", torch.randn(24, 6)),
        "loaded": lambda: layer.load_state_dict(nn.LSTM(5, 6).state_dict()),
        "assigned": lambda: layer.load_state_dict(nn.LSTM(5, 6).state_dict(), assign=True),
        "data": set_data,
        "an optimizer": lambda: by_optimizer_of(layer.weight_hh_l0),
        "shared": layer.share_memory,
        "twice": lambda: layer.double().float(),
    }


def test_changed_weights_are_seen() -> None:
    layer = nlpkernels.LSTM(5, 6)
    held = list(layer.parameters())
    nlpkernels.freeze(layer)
    x = torch.randn(4, 2, 5)

    def check(what: str) -> Tensor:
        fresh = nlpkernels.LSTM(5, 6)
        fresh.load_state_dict(layer.state_dict())
        with torch.no_grad():
            assert torch.equal(layer(x)[0], fresh(x)[0]), what
        return layer(x)[0]

    last = check("frozen")
    with torch.no_grad():
        held[0].mul_(2)  # by who still has the parameters
    for what, change in [("parameters", lambda: None), *changes(layer).items(), *changes(layer).items()]:
        change()
        now = check(what)
        assert what in ("shared", "twice") or not torch.equal(now, last), what
        last = now


@pytest.mark.parametrize("how", ["layers", "data", "buffers"])
def test_no_weights_of_before(how: str) -> None:
    """New weights may lie where others lay that are gone, with the same count of changes."""
    x, layer = torch.randn(3, 2, 60), frozen_copy(nn.GRU(60, 50), torch.float32)
    addresses = set()
    for _ in range(40):
        if how == "layers":
            layer = frozen_copy(nn.GRU(60, 50), torch.float32)
        elif how == "data":
            layer.weight_hh_l0.data = torch.randn(150, 50)
        else:
            layer.weight_hh_l0 = torch.randn(150, 50)
        addresses.add(layer.weight_hh_l0.data_ptr())
        fresh = nlpkernels.GRU(60, 50)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x)[0], fresh(x)[0].detach())
    assert len(addresses) < 40  # or this would show nothing


@without_sanitisers
def test_packed_copies_do_not_pile_up() -> None:
    """Of weights that change there is one, and none of those that are gone once another layer is packed."""
    run_python(
        """
        from torch import nn

        def megabytes():
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * 4096 >> 20

        layer, x = nn.GRU(1000, 1000), torch.randn(2, 1, 1000)
        nlpkernels.freeze(layer)
        for _ in range(3):
            layer.weight_hh_l0.mul_(1), layer(x)
        before = megabytes()
        for _ in range(20):
            layer.weight_hh_l0.mul_(1), layer(x)
        assert megabytes() < before + 150, megabytes() - before  # for 23 a copy
        for _ in range(20):
            layer = nn.GRU(1000, 1000)
            nlpkernels.freeze(layer), layer(x)
        assert megabytes() < before + 250, megabytes() - before
        """
    )


def test_functional_call() -> None:
    layer, x = nn.GRU(5, 6, 2), torch.randn(4, 2, 5)
    other = nlpkernels.GRU(5, 6, 2)
    mine = frozen_copy(layer, torch.float32)
    own = mine(x)[0]
    got = torch.func.functional_call(mine, dict(other.state_dict()), (x,))[0]
    with torch.no_grad():
        assert torch.equal(got, other(x)[0])
    assert torch.equal(mine(x)[0], own)
    stacked = {name: torch.stack([value, other.state_dict()[name]]) for name, value in mine.state_dict().items()}
    both = torch.vmap(lambda weights: torch.func.functional_call(mine, weights, (x,))[0])(stacked)
    torch.testing.assert_close(both, torch.stack([own, got]))


# --- And back --------------------------------------------------------------------------------------------------------


@by_dtype
def test_revert(dtype: torch.dtype) -> None:
    for module in modules_of_all_kinds():
        mine, x = frozen_copy(module, dtype), input_of(module)
        got = mine(x)
        assert list(nlpkernels.revert(mine).swapped) == [""]
        assert type(mine) is type(module) and not list(mine.buffers()) and not mine._non_persistent_buffers_set
        assert [n for n, _ in mine.named_parameters()] == [n for n, _ in module.named_parameters()]
        assert repr(mine) == repr(module)
        for name, parameter in mine.named_parameters():
            assert parameter.requires_grad and parameter.dtype == torch.float32
            if dtype == torch.float32:
                assert torch.equal(parameter, getattr(module, name))
            elif "bias" in name:
                continue  # of which some have been added up
            else:
                assert 0 < relative_error(parameter, getattr(module, name)) < 0.01
        output = tree_leaves(mine(x))
        error = relative_error(output[0], tree_leaves(got)[0])
        assert error < (1e-6 if dtype == torch.float32 else FROZEN_DEQUANTISED[dtype]), error
        mine.train()
        mine(x.requires_grad_())  # which is refused no longer
        sum(leaf.sum() for leaf in tree_leaves(mine(x))).backward()
        assert all(parameter.grad is not None for parameter in mine.parameters())
        # What has been rounded once is frozen to the same again.
        if dtype != torch.float32:
            again = frozen_copy(mine, dtype)
            assert relative_error(tree_leaves(again(x.detach()))[0], tree_leaves(got)[0]) < FROZEN[dtype]


def test_revert_of_recurrent_dropout() -> None:
    layer = nlpkernels.GRU(3, 4, recurrent_dropout=0.5)
    nlpkernels.freeze(layer)
    assert "recurrent_dropout" in str(nlpkernels.revert(layer)) and type(layer) is frozen.FrozenGRU
    layer.recurrent_dropout = 0.0
    assert nlpkernels.revert(layer).swapped


# --- Compiled, exported, on many threads -----------------------------------------------------------------------------


@by_dtype
def test_compile(dtype: torch.dtype) -> None:
    for module in (layer_of("lstm with projection", num_layers=2, bidirectional=True), layer_of("gru"), cell_of("lstm"),
                   cell_of("rnn_tanh")):  # fmt: skip
        torch.compiler.reset()
        mine = frozen_copy(module, dtype)
        compiled = torch.compile(mine, fullgraph=True, dynamic=True, backend="aot_eager")
        for steps, batch in ((3, 2), (5, 4)):
            x = torch.randn(*((steps, batch, 7) if isinstance(module, nn.RNNBase) else (batch, 7)))
            assert_same_bits(compiled(x), mine(x))
            hx = states_of(module, batch)
            assert_same_bits(compiled(x, hx), mine(x, hx))


@without_sanitisers
@by_dtype
def test_compiled_by_inductor(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    mine, x = frozen_copy(layer_of("gru", batch_first=True), dtype), torch.randn(3, 4, 7)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(lambda x: mine(x)[0].tanh(), fullgraph=True)(x), mine(x)[0].tanh())


@by_dtype
def test_export(dtype: torch.dtype) -> None:
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    for strict in (False, True):
        mine = frozen_copy(layer_of("lstm", num_layers=2, bidirectional=True), dtype)
        program = torch.export.export(
            mine, (torch.randn(4, 3, 7),), dynamic_shapes=({0: steps, 1: batch},), strict=strict
        )
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        for x in (torch.randn(4, 3, 7), torch.randn(9, 2, 7)):
            assert_same_bits(program.module()(x), mine(x))
            assert_same_bits(loaded.module()(x), mine(x))


def test_what_is_left_to_torch() -> None:
    """Of float32 as ever; there are no such layers of bfloat16 and int8."""
    x = torch.randn(4, 2, 7)

    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(function, types, args, kwargs or {})

    for dtype in DTYPES:
        for module in (layer_of("lstm"), cell_of("gru"), cell_of("rnn_tanh", bias=False)):
            mine = frozen_copy(module, dtype)
            given = x if isinstance(module, nn.RNNBase) else x[0]
            graph = torch.fx.symbolic_trace(nn.Sequential(mine))
            assert_same_bits(graph(given), mine(given))
            assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
            if dtype == torch.float32:
                torch.testing.assert_close(torch.jit.trace(mine, given)(given), mine(given))
                torch.testing.assert_close(tree_leaves(mine(given.as_subclass(Own)))[0].as_subclass(Tensor),
                                           tree_leaves(mine(given))[0])  # fmt: skip
            else:
                for call in (lambda: torch.jit.trace(mine, given), lambda: mine(given.as_subclass(Own))):  # noqa: B023
                    with pytest.raises(NotImplementedError, match=f"torch has no layers with weights of {dtype}"):
                        call()


@without_sanitisers
@pytest.mark.filterwarnings("ignore")
def test_onnx() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = torch.randn(4, 2, 7)
    mine = frozen_copy(layer_of("gru", num_layers=2, bidirectional=True), torch.float32)
    file = io.BytesIO()
    torch.onnx.export(mine, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    assert b"GRU" in file.getvalue()  # the op, of which there is one for any length
    (y, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), mine(x)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match=r"torch has no layers|No ONNX function found for .*frozen"):
        torch.onnx.export(frozen_copy(layer_of("gru"), torch.int8), (x,), io.BytesIO(), dynamo=True, verbose=False)


@by_dtype
def test_many_threads(dtype: torch.dtype, restored_threads: None) -> None:
    """They may be the first to pack the same weights, while others change theirs and layers come and go."""
    layer = frozen_copy(nn.LSTM(64, 96, 2), dtype)
    x = torch.randn(10, 3, 64)
    expected = copy.deepcopy(layer)(x)[0]
    failures: list[BaseException] = []
    start = threading.Barrier(8)

    def call(i: int) -> None:
        try:
            start.wait()
            for turn in range(6):
                torch.set_num_threads(1 + (i + turn) % 3)
                assert torch.equal(layer(x)[0], expected)
                own = frozen_copy(nn.GRU(5, 6), dtype)
                own(x[..., :5])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "a call hangs"
    if failures:
        raise failures[0]


@without_sanitisers
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS limits memory on Linux")
@by_dtype
def test_memory_runs_out(dtype: torch.dtype) -> None:
    """An error, also where it is a thread of a parallel region that asked; the next call is as ever."""
    run_python(
        f"""
        import resource
        torch.set_num_threads(2)
        made = [(torch.nn.LSTM(256, 256, 2, bidirectional=True, proj_size=64), torch.randn(40, 128, 256)),
                (torch.nn.GRU(512, 512), torch.randn(200, 1, 512))]
        for layer, _ in made:
            nlpkernels.freeze(layer, {dtype})
        expected = [layer(x)[0] for layer, x in made]
        with open("/proc/self/statm") as statm:
            now = int(statm.read().split()[0]) * resource.getpagesize()
        failures = 0
        for megabytes in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48):
            resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20), resource.RLIM_INFINITY))
            for layer, x in made:
                try:
                    layer(x)
                except (MemoryError, RuntimeError):
                    failures += 1
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert failures > 0
        assert all(torch.equal(layer(x)[0], right) for (layer, x), right in zip(made, expected))
        """
    )


@without_sanitisers
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@by_dtype
def test_fork(dtype: torch.dtype) -> None:
    run_python(
        f"""
        import signal
        torch.set_num_threads(2)
        layer, x = torch.nn.LSTM(128, 200), torch.randn(20, 2, 128)
        nlpkernels.freeze(layer, {dtype})
        before = layer(x)[0]
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            same = torch.equal(layer(x)[0], before)
            other = torch.nn.LSTM(128, 200)
            nlpkernels.freeze(other, {dtype})
            other(x)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        """
    )


def test_inference_mode() -> None:
    """Weights may have been made in it; of such torch counts no changes."""
    x = torch.randn(4, 2, 5)
    for dtype in DTYPES:
        with torch.inference_mode():
            layer = frozen_copy(nn.LSTM(5, 6), dtype)
            first = layer(x)[0]
            if dtype == torch.float32:
                layer.weight_hh_l0.mul_(2)
                assert not torch.equal(layer(x)[0], first)
        layer(x)
        other = frozen_copy(nn.LSTM(5, 6), dtype)
        with torch.inference_mode():
            expected = other(x)[0]
        assert torch.equal(other(x)[0], expected)


# --- Special values --------------------------------------------------------------------------------------------------


@by_layer
@by_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_specials_stay_in_their_sequence(kind: str, dtype: torch.dtype, value: float) -> None:
    layer = layer_of(kind, 7, 20, num_layers=2, bidirectional=True)
    mine = frozen_copy(layer, dtype)
    x, hx = torch.randn(5, 6, 7), states_of(layer, 6)
    y, final = mine(x, hx)
    for place in ("x", "h", "c") if layer.mode == "LSTM" else ("x", "h"):
        special_x, special_hx = x.clone(), tree_map(Tensor.clone, hx)
        state = special_hx[0 if place == "h" else 1] if isinstance(special_hx, tuple) else special_hx
        (special_x[2] if place == "x" else state[0])[3, 1] = value
        got, got_final = mine(special_x, special_hx)

        def but_for_3(results: Any) -> Any:
            return tree_map(lambda t: t[:, [0, 1, 2, 4, 5]], results)

        assert_same_bits(but_for_3((got, got_final)), but_for_3((y, final)))
        with by_reference():
            expected, _ = mine(special_x, special_hx)
        if dtype != torch.float32:
            assert torch.equal(got.isnan(), expected.isnan())
        if value != value:
            assert bool(got[:, 3].isnan().any()), place


@by_narrow
def test_special_weights(dtype: torch.dtype) -> None:
    """NaN and infinities in a row of weights make its unit NaN; rows of zeros are zeros."""
    for value in (float("nan"), float("inf")):
        layer = nn.RNN(4, 20)
        with torch.no_grad():
            layer.weight_ih_l0[3, 2] = value
        y, _ = frozen_copy(layer, dtype)(torch.ones(1, 2, 4))
        assert not bool(y[..., 3].abs().lt(0.999).any())  # NaN, or saturated
        assert bool(y[..., :3].isfinite().all()) and bool(y[..., 4:].isfinite().all())
    layer = nn.LSTM(4, 20, proj_size=5)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    mine = frozen_copy(layer, dtype)
    assert not bool(mine(torch.randn(3, 2, 4))[0].any())
    nlpkernels.revert(mine)
    assert not any(bool(parameter.any()) for parameter in mine.parameters())


@by_narrow
def test_zeros_denormals_and_huge_values(dtype: torch.dtype) -> None:
    for kind in LAYERS:
        layer = layer_of(kind, 7, 20, bidirectional=True)
        mine = frozen_copy(layer, dtype)
        for size in (0.0, 1e-40, 1e-30, 1e-20, 1e10, 1e30):
            x, hx = torch.randn(3, 4, 7), states_of(layer, 4)
            x[1, 2] = (x[1, 2].clamp(-1, 1) * size).nan_to_num()
            got = mine(x, hx)
            with by_reference():
                expected = mine(x, hx)
            if kind == "rnn_relu" and size >= 1e10:
                for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
                    assert torch.equal(one.isnan(), other.isnan())
                    torch.testing.assert_close(one, other, rtol=0.02, atol=1e-3 * size, equal_nan=True)
            else:
                assert_close(got, expected, dtype, 3)
        tiny = (torch.randn(3, 4, 7) * 1e-42, tree_map(lambda h: h * 1e-42, states_of(layer, 4)))
        zero = tree_map(torch.zeros_like, tiny)
        torch.testing.assert_close(mine(*tiny), mine(*zero), rtol=0, atol=1e-20)
    tiny_weights = nn.GRU(4, 5)
    with torch.no_grad():
        for parameter in tiny_weights.parameters():
            parameter.mul_(1e-40)
    assert bool(frozen_copy(tiny_weights, dtype)(torch.randn(3, 2, 4))[0].abs().max() < 1e-30)


def test_ahead_of_time(tmp_path: Path) -> None:
    """AOTInductor, with a batch and a length that are not those of the export."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.LSTM(8, 4, bidirectional=True, batch_first=True) for _ in DTYPES)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)[0]
            return x

    model = Model().eval()
    for layer, dtype in zip(model.layers, DTYPES, strict=True):
        nlpkernels.freeze(layer, dtype)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("steps", min=1, max=512)}
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(3, 7, 8),), dynamic_shapes={"x": sizes})
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for shape in ((3, 7, 8), (1, 1, 8), (5, 20, 8)):
            x = torch.randn(shape)
            assert torch.equal(loaded(x), model(x))


# --- The ops ---------------------------------------------------------------------------------------------------------


def samples() -> list[tuple[str, tuple[Any, ...]]]:
    """Calls of both ops: each cell, packed and not, of one step, with a projection, of several layers."""
    found: list[tuple[str, tuple[Any, ...]]] = []
    for kind in LAYERS:
        layer = layer_of(kind, 5, 6, num_layers=2, bidirectional=True)
        hx = states_of(layer, 3)
        h0, c0 = hx if isinstance(hx, tuple) else (hx, None)
        cell = "rnn_relu" if kind == "rnn_relu" else {"RNN_TANH": "rnn_tanh"}.get(layer.mode, layer.mode.lower())
        inputs = [
            (torch.randn(4, 3, 5), None),
            (torch.randn(7, 5), torch.tensor([3, 2, 1, 1])),
            (torch.randn(3, 5), None),
        ]
        for x, sizes in inputs:
            one = (h0[:2], None if c0 is None else c0[:2])
            plain = [getattr(layer, name).detach() for name in layer._flat_weights_names if "_l0" in name]
            found.append(("recurrent_frozen", (x, sizes, *one, plain, cell)))
            for dtype in NARROW:
                packed = frozen_copy(layer, dtype)._packed()
                found.append(("frozen", (x, sizes, h0, c0, packed, cell, 2, False)))
                found.append(("frozen", (x, sizes, *one, packed[:4], cell, 2, True)))
    return found


def test_ops_agree_with_the_reference() -> None:
    for name, args in samples():
        got, expected = getattr(torch.ops.nlpkernels, name)(*args), getattr(reference, name)(*args)
        for one, other in zip(got, expected, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-3, atol=6e-3 if name == "frozen" else 1e-5)


def test_opcheck() -> None:
    torch.use_deterministic_algorithms(False)  # poison would be the same in both calls
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for name, args in samples()[::5]:
        torch.library.opcheck(getattr(torch.ops.nlpkernels, name).default, args, test_utils=tests)


def test_hostile_calls() -> None:
    """Each raises, and none ends the process or changes what it was given."""
    op = torch.ops.nlpkernels.frozen
    layer = nn.LSTM(5, 6, bidirectional=True, proj_size=4)
    x, (h0, c0) = torch.randn(4, 3, 5), states_of(layer, 3)
    for dtype in NARROW:
        mine = frozen_copy(layer, dtype)
        weights = mine._packed()
        good = dict(x=x, batch_sizes=None, h0=h0, c0=c0, weights=weights, cell="lstm", directions=2, keep=True)
        op(*good.values())
        huge = torch.empty(1).expand(2**40, 3, 5)
        packed, factors = weights[:2]

        def of(place: int, tensor: Any, weights: list[Tensor] = weights) -> dict[str, Any]:
            return {"weights": [*weights[:place], tensor, *weights[place + 1 :]]}

        changed: list[dict[str, Any]] = [
            {"c0": None}, {"c0": c0[:1]}, {"c0": c0[..., :3]}, {"c0": c0[0]}, {"c0": c0.double()}, {"c0": c0[:, :2]},
            {"c0": c0.new_zeros(2, 3, 0)}, {"c0": torch.empty(1).expand(2, 3, 2**40)},
            {"h0": h0[:1]}, {"h0": h0[0]}, {"h0": h0[:0]}, {"h0": h0.half()}, {"h0": h0.repeat(1, 1, 5)},
            {"h0": h0[:, :2]}, {"h0": h0.new_zeros(2, 3, 0)}, {"h0": torch.cat([h0, h0]), "c0": torch.cat([c0, c0])},
            {"h0": torch.empty(1).expand(2, 3, 2**40)}, {"h0": torch.empty(1).expand(2**40, 3, 4)},
            {"x": x.double()}, {"x": x.bfloat16()}, {"x": x.long()}, {"x": x[..., :3]}, {"x": x[0, 0]}, {"x": x[None]},
            {"x": huge}, {"x": torch.empty(1).expand(4, 3, 2**50)}, {"x": x.to("meta")}, {"x": x.to_sparse()},
            {"x": x[..., :0]}, {"x": None}, {"h0": None},
            {"batch_sizes": torch.tensor([3, 3, 3, 3])}, {"x": x[0], "batch_sizes": torch.tensor([4])},
            {"x": x[0], "batch_sizes": torch.tensor([1, 2])}, {"x": x[0], "batch_sizes": torch.tensor([2, -1, 2])},
            {"x": x[0], "batch_sizes": torch.tensor([2, 2])}, {"x": x[0], "batch_sizes": torch.tensor([2**62] * 4)},
            {"x": x[0], "batch_sizes": torch.tensor([2.0, 1.0])},
            {"directions": 0}, {"directions": 3}, {"directions": -1}, {"directions": 2**62}, {"directions": 1},
            {"cell": "gru"}, {"cell": "rnn_tanh"}, {"cell": "lstm\0"}, {"cell": ""},
            {"weights": []}, {"weights": weights[:2]}, {"weights": [*weights, *weights]}, {"weights": weights[::-1]},
            {"weights": weights[:3]},
        ]  # fmt: skip
        for place, tensor in enumerate(weights):
            changed += [
                of(place, tensor[:-1]), of(place, torch.cat([tensor, tensor[:1]])), of(place, tensor.view(1, -1)),
                of(place, tensor.repeat_interleave(2)[::2]), of(place, tensor.float()), of(place, tensor.long()),
                of(place, tensor.to("meta")), of(place, tensor[:0]), of(place, tensor[:1].expand(len(tensor))),
                of(place, torch.empty(1, dtype=tensor.dtype).expand(2**50)), of(place, shrunk(tensor)),
            ]  # fmt: skip
        other = torch.int16 if packed.dtype == torch.uint8 else torch.uint8
        changed += [of(2, weights[2].to(other)), of(0, packed.to(torch.int8)), of(0, factors), of(1, packed)]
        changed += [{"h0": shrunk(h0)}, {"x": shrunk(x)}, {"c0": shrunk(c0)}]
        before = [t.clone() for t in (x, h0, c0, *weights)]
        for change in changed:
            _, error = error_of(lambda: op(*{**good, **change}.values()))  # noqa: B023
            assert error is not None, f"accepted {list(change)}: {[describe(v) for v in change.values()]}"
        assert all(map(torch.equal, before, (x, h0, c0, *weights)))
        two = frozen_copy(nn.LSTM(5, 6, 2, bidirectional=True), dtype)
        h2, c2 = states_of(two, 3)
        with pytest.raises(ValueError, match="expected one layer where all states are kept, got 2"):
            op(x, None, h2, c2, two._packed(), "lstm", 2, True)
        gru = frozen_copy(nn.GRU(5, 6), dtype)
        with pytest.raises(RuntimeError, match="no c0"):
            op(x, None, torch.zeros(1, 3, 6), torch.zeros(1, 3, 6), gru._packed(), "gru", 1, False)
        # As many words of int8 as 4 features have: it reads what is there.
        error_of(lambda: op(*{**good, "h0": h0[..., :2]}.values()))  # noqa: B023
        # Strides are all the same to it.
        for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), torch.randn(4, 3, 10)[..., ::2]):
            rest = (None, h0, c0, weights, "lstm", 2, True)
            assert_same_bits(op(strided, *rest), op(strided.clone(memory_format=torch.contiguous_format), *rest))


@pytest.mark.filterwarnings("ignore")  # of torch, about the tensors that are made here
def test_strange_arguments() -> None:
    """Whatever one argument is, both ops raise and leave all tensors as they were, or it is a call like any other."""
    torch.use_deterministic_algorithms(False)  # or memory of any size would be filled with NaN
    raised = returned = 0
    for name, args in samples()[::9]:
        op = getattr(torch.ops.nlpkernels, name)
        for place, argument in enumerate(op.default._schema.arguments):
            for what, make in strange_values(args[place], str(argument.type)).items():
                try:
                    changed = (*args[:place], make(), *args[place + 1 :])
                except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError, OverflowError):
                    continue  # torch has no such tensor
                if "derivative" in what:
                    continue
                before = bits(changed)
                result, error = error_of(lambda: op(*changed))  # noqa: B023
                raised, returned = raised + (error is not None), returned + (error is None)
                assert all(map(torch.equal, before, bits(changed))), f"{name}, {argument.name}: {what}: {error!r}"
                is_weight = argument.name == "weights" and name == "frozen"  # which has to be contiguous
                if HARMLESS in what and not is_weight:
                    assert error is None, f"{name}, {argument.name}: {what}: {error!r}"
                    for one, other in zip(result, op(*args), strict=True):
                        torch.testing.assert_close(one, other)
    assert raised > 500 and returned > 50


def shrunk(tensor: Tensor) -> Tensor:
    copied = tensor.clone()
    copied.untyped_storage().resize_(0)
    return copied


def describe(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)[:200]


def test_hostile_calls_of_recurrent_frozen() -> None:
    op = torch.ops.nlpkernels.recurrent_frozen
    layer = nn.LSTM(5, 6)
    weights = [parameter.detach() for parameter in layer.parameters()]
    x, h = torch.randn(4, 3, 5), torch.zeros(1, 3, 6)
    op(x, None, h, h, weights, "lstm")
    for change in (
        (x, None, h, None, weights, "lstm"), (x, None, h, h, weights[:3], "lstm"), (x, None, h, h, weights, "gru"),
        (x.double(), None, h, h, weights, "lstm"), (x[..., :4], None, h, h, weights, "lstm"),
        (x, None, h[..., :5], h, weights, "lstm"), (x, torch.tensor([9]), h, h, weights, "lstm"),
        (x, None, h, h, [weights[0], shrunk(weights[1]), *weights[2:]], "lstm"), (x, None, h, h, [], "lstm"),
        (x, None, h, h, [weights[0].double(), *weights[1:]], "lstm"), (x, None, h, h, weights[::-1], "lstm"),
        (x.to("meta"), None, h, h, weights, "lstm"), (x, None, h, h.expand(2, 3, 6), weights, "lstm"),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
            op(*change)


# --- Memory ----------------------------------------------------------------------------------------------------------


@by_layer
def test_memory(kind: str) -> None:
    for hidden in (128, 200):
        layer = layer_of(kind, hidden, hidden, num_layers=2)
        of_floats = sum(parameter.nbytes for parameter in layer.parameters())
        for dtype, share in ((torch.bfloat16, 0.55), (torch.int8, 0.3)):
            mine = frozen_copy(layer, dtype)
            assert sum(buffer.nbytes for buffer in mine.buffers()) <= share * of_floats
        frozen_float = frozen_copy(layer, torch.float32)
        assert sum(buffer.nbytes for buffer in frozen_float.buffers()) == of_floats


@by_dtype
def test_operations_are_counted(dtype: torch.dtype) -> None:
    for kind in LAYERS:
        layer = layer_of(kind, num_layers=2, bidirectional=True)
        x, counts = torch.randn(4, 3, 7), []
        for module in (converted(layer), frozen_copy(layer, dtype)):
            with FlopCounterMode(display=False) as counter:
                module(x)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


def test_parameters_are_let_go() -> None:
    for dtype in NARROW:
        layer = nn.LSTM(5, 6, 2)
        gone = [weakref.ref(parameter) for parameter in layer.parameters()]
        nlpkernels.freeze(layer, dtype)
        layer(torch.randn(3, 2, 5))
        gc.collect()
        assert not any(reference() is not None for reference in gone)
