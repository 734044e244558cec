"""RNN, LSTM, GRU and their cells against torch.nn and against float64."""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from rounding import STEP, keep_from_kinks, rounding
from tolerances import assert_as_exact, relative_error
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import nlpkernels
from nlpkernels import _ops, functional

LAYERS = ["rnn_tanh", "rnn_relu", "lstm", "lstm_projected", "gru"]
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNNCell", {}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
}
# T, B, I, H: around the sizes of tiles, panels and vectors, and across them; large enough for errors to be typical
SHAPES = [(1, 40, 1, 40), (3, 12, 5, 7), (5, 13, 16, 16), (7, 3, 33, 17), (4, 67, 40, 50), (9, 1, 130, 70)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def pair(kind: str, *sizes: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same layer, with the same parameters, of torch.nn and of ours."""
    if kind == "rnn_relu":
        options["nonlinearity"] = "relu"
    if kind == "lstm_projected":
        options["proj_size"] = (sizes[1] + 1) // 2
    name = kind.split("_")[0].upper()
    theirs, ours = getattr(nn, name)(*sizes, **options), getattr(nlpkernels, name)(*sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a layer's result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in tensors(part)]


def states_for(layer: nn.Module, batch: tuple[int, ...], dtype: torch.dtype, device: str) -> Any:
    """Random initial states: a tensor, or for the LSTM two."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(rows, *batch, layer.proj_size or layer.hidden_size, dtype=dtype, device=device)
    return (h, torch.randn(rows, *batch, layer.hidden_size, dtype=dtype, device=device)) if layer.mode == "LSTM" else h


def packed(x: Tensor, lengths: Sequence[int] | None) -> Any:
    """x as a PackedSequence, if there are lengths; one that says how to sort, if they are not sorted."""
    if lengths is None:
        return x
    return pack_padded_sequence(x, lengths, enforce_sorted=lengths == sorted(lengths, reverse=True))


def outputs_and_gradients(
    layer: nn.Module, x: Tensor, hx: Any, weigh: Callable[[Tensor], Tensor], lengths: Sequence[int] | None = None
) -> list[Tensor]:
    """Results of the layer, then the gradients of x, hx and all parameters, in one list."""
    x = x.detach().clone().requires_grad_()
    hx = None if hx is None else [state.detach().clone().requires_grad_() for state in tensors(hx)]
    states = hx if hx is None or layer.mode == "LSTM" else hx[0]
    results = tensors(layer(packed(x, lengths), states))
    inputs = [x, *(hx or []), *layer.parameters()]
    return results + list(torch.autograd.grad(sum(weigh(result).sum() for result in results), inputs))


def compare(
    theirs: nn.Module, ours: nn.Module, x: Tensor, hx: Any, dtype: torch.dtype, lengths: Sequence[int] | None = None
) -> None:
    """Outputs, states and all gradients in `dtype`, against torch.nn and float64; of x packed, if there are lengths."""
    exact = copy.deepcopy(theirs.to(dtype)).double()
    layers = [ours.to(dtype), theirs, exact]
    x = x.to(dtype)
    hx = None if hx is None else [state.to(dtype) for state in tensors(hx)]
    relu = getattr(ours, "nonlinearity", "") == "relu"
    if relu:
        run = partial(exact, packed(x.double(), lengths), None if hx is None else hx[0].double())
        keep_from_kinks(run, rounding(dtype, x.device.type), theirs, ours, exact)
    cotangents: list[Tensor] = []
    runs = []
    for layer in layers:
        turn = itertools.count()

        def weigh(result: Tensor, turn: Iterator[int] = turn) -> Tensor:
            # The same random cotangents for all three, made in the first call.
            if (i := next(turn)) == len(cotangents):
                cotangents.append(torch.randn_like(result))
            return result * cotangents[i].to(result.dtype)

        wanted = next(layer.parameters()).dtype
        states = None if hx is None else [state.to(wanted) for state in hx]
        runs.append(outputs_and_gradients(layer, x.to(wanted), states, weigh, lengths))
    assert_as_exact(*runs, names=[f"result {i}" for i in range(len(runs[0]))], relu=relu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("kind", LAYERS)
def test_matches_torch(kind: str, bidirectional: bool, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    steps, batch, inputs, hidden = shape
    bias = hidden != 7
    theirs, ours = pair(kind, inputs, hidden, bidirectional=bidirectional, bias=bias, device=device)
    x = torch.randn(steps, batch, inputs, device=device)
    compare(theirs, ours, x, states_for(theirs, (batch,), torch.float32, device), dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in LAYERS] + [(kind, torch.bfloat16) for kind in LAYERS if kind != "rnn_relu"],
    ids=str,
)
@pytest.mark.parametrize("size", [(20, 96, 24, 33), (3, 5, 300, 264)], ids=str)
def test_matches_torch_on_larger_sizes(kind: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Several pieces of the batch, several blocks of steps, several blocks of k.

    A ReLU of the second layer reads what the first one's results were rounded to, in any kernel: near 0 that decides.
    """
    steps, batch, inputs, hidden = size
    theirs, ours = pair(kind, inputs, hidden, 2, bidirectional=True, device=device)
    compare(theirs, ours, torch.randn(steps, batch, inputs, device=device), None, dtype)


@pytest.mark.parametrize("batch", [1, 2, 12, 13, 65])
@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 255, 256, 257])
@pytest.mark.parametrize("kind", ["lstm", "lstm_projected", "gru"])
def test_bfloat16_around_pairs_and_chains(kind: str, k: int, batch: int, device: str) -> None:
    """Of k inputs, of k units, and of k rows that weights' gradients are sums of; several steps of few sequences, for
    errors to be typical."""
    few = 8 if batch < 12 else 1
    for steps in {few, few + 2, max(few, -(-k // batch))}:
        for inputs, hidden in ((k, 40), (40, k)) if k > 2 else ((k, 40), (40, k + 30)):
            theirs, ours = pair(kind, inputs, hidden, device=device)
            x = torch.randn(steps, batch, inputs, device=device)
            compare(theirs, ours, x, states_for(theirs, (batch,), torch.float32, device), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 2), (2, 15), (17, 32), (31, 33), (64, 16), (33, 48)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_sums_are_of_what_is_there(kind: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Kernels that read more than there is, to fill a tile, drop it: a NaN in one sequence is in no other, nor is an
    infinite weight in another unit, and what the batch is makes no difference."""
    _, ours = pair(kind, *sizes, bidirectional=True)
    ours.to(dtype)
    for steps in (1, 3):
        for batch in (2, 16, 17, 33):
            x = torch.randn(steps, batch, sizes[0], dtype=dtype)
            broken = x.clone()
            broken[:, batch // 2] = float("nan")
            others = [b for b in range(batch) if b != batch // 2]
            runs = []
            for given in (x, broken):
                leaf = given.clone().requires_grad_()
                output, _ = ours(leaf)
                (gradient,) = torch.autograd.grad(output.sum(), leaf)
                runs.append((output[:, others], gradient[:, others]))
            assert runs[0][0].isfinite().all() and runs[0][1].isfinite().all()
            assert all(map(torch.equal, *runs))
    if kind != "lstm_projected":  # a projection mixes units
        with torch.no_grad():
            ours.weight_ih_l0[0] = float("nan")
        output, _ = ours(torch.randn(1, 5, sizes[0], dtype=dtype))
        assert output[:, :, 0].isnan().all() and output[:, :, 1:].isfinite().all()


@pytest.mark.skipif(_ops.INSTRUCTION_SET != "amx", reason="this machine multiplies no tiles")
def test_tiles_are_left_to_torch(restored_threads: None) -> None:
    """torch's own products use them too, in the same threads."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        a, b = torch.randn(2, 300, 300).bfloat16()
        expected = a @ b
        layer = nlpkernels.LSTM(40, 50).bfloat16()
        for _ in range(3):
            layer(torch.randn(5, 3, 40).bfloat16())
            assert torch.equal(a @ b, expected)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("layout", ["batch_first", "unbatched", "strided", "expanded", "no_batch_first_view"])
def test_layouts_of_the_input(kind: str, layout: str, device: str) -> None:
    theirs, ours = pair(kind, 24, 40, 2, batch_first=layout == "batch_first", bidirectional=True, device=device)
    batch: tuple[int, ...] = (3,)
    x = torch.randn(4, 3, 24, device=device)
    if layout == "batch_first":
        x = torch.randn(3, 4, 24, device=device)
    elif layout == "unbatched":
        x, batch = x[:, 0], ()
    elif layout == "strided":
        x = torch.randn(8, 3, 48, device=device)[::2, :, ::2]
    elif layout == "expanded":
        x = torch.randn(1, 3, 24, device=device).expand(4, 3, 24)
    elif layout == "no_batch_first_view":
        x = torch.randn(3, 4, 24, device=device).transpose(0, 1)
    hx = states_for(theirs, batch, torch.float32, device)
    for states in (None, hx):
        for got, expected in zip(tensors(ours(x, states)), tensors(theirs(x, states)), strict=True):
            torch.testing.assert_close(got, expected)
    compare(theirs, ours, x, hx, torch.float32)


@pytest.mark.parametrize("lengths", [[7, 5, 5, 2, 1], [2, 7, 1, 5, 5]], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences(kind: str, lengths: list[int], device: str) -> None:
    theirs, ours = pair(kind, 24, 40, 2, bidirectional=True, device=device)
    x = torch.randn(7, 5, 24, device=device)
    hx = states_for(theirs, (5,), torch.float32, device)
    given = packed(x, lengths)
    assert torch.equal(ours(given, hx)[0].batch_sizes, given.batch_sizes)
    compare(theirs, ours, x, hx, torch.float32, lengths)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_draws_torchs_masks(kind: str, device: str) -> None:
    theirs, ours = pair(kind, 6, 40, 3, dropout=0.4, device=device)  # of which some unit of a ReLU is not 0
    x = torch.randn(4, 3, 6, device=device)
    torch.manual_seed(3)
    expected = theirs(x)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(ours(x)[0], expected)
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0])
    assert not torch.equal(ours(x)[0], expected)


@pytest.mark.usefixtures("without_cudnn")
@pytest.mark.parametrize("kind", LAYERS)
def test_gradcheck(kind: str, device: str) -> None:
    """First derivatives by both modes, and second ones, of outputs and states in everything."""
    theirs, layer = pair(kind, 2, 4, bidirectional=True, dtype=torch.float64, device=device)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    states = states_for(layer, (2,), torch.float64, device)
    keep_from_kinks(lambda: theirs(x, states), STEP, theirs, layer)
    hx = [state.requires_grad_() for state in tensors(states)]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states = rest[: len(hx)]
        parameters = dict(zip(names, rest[len(hx) :], strict=True))
        return tuple(
            tensors(torch.func.functional_call(layer, parameters, (x, states if len(states) > 1 else states[0])))
        )

    inputs = (x, *hx, *layer.parameters())
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.usefixtures("without_cudnn")
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_packed_sequences_can_be_differentiated(kind: str, device: str) -> None:
    theirs, layer = pair(kind, 2, 4, bidirectional=True, dtype=torch.float64, device=device)
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def run(x: Tensor, layer: nn.Module = layer) -> tuple[Tensor, ...]:
        return tuple(tensors(layer(pack_padded_sequence(x, torch.tensor([3, 2])))))

    keep_from_kinks(lambda: run(x, theirs), STEP, theirs, layer)
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


@pytest.mark.parametrize("kind", LAYERS)
def test_function_transforms(kind: str, device: str) -> None:
    theirs, ours = (layer.double() for layer in pair(kind, 2, 4, device=device))
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device)

    def loss(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x)[0].sin().sum()

    expected = torch.autograd.functional.hessian(loss(theirs), x)
    torch.testing.assert_close(torch.func.hessian(loss(ours))(x), expected)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(loss(ours)))(x), expected)
    _, tangent = torch.func.jvp(loss(ours), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.func.grad(loss(ours))(x).sum())

    many = torch.randn(5, 3, 2, 2, dtype=torch.float64, device=device)
    torch.testing.assert_close(torch.func.vmap(loss(ours))(many), torch.stack([loss(theirs)(one) for one in many]))
    per_sample = torch.func.vmap(torch.func.grad(loss(ours)))(many)
    torch.testing.assert_close(per_sample, torch.stack([torch.func.grad(loss(ours))(one) for one in many]))


def test_tanh_and_sigmoid_are_exact_to_a_few_units() -> None:
    """The kernels' own elementary functions, seen through layers whose pre-activation is their input."""
    finite = torch.cat([torch.linspace(-12, 12, 200001), torch.logspace(-30, 2, 10001)])
    x = torch.cat([finite, torch.tensor([float("inf"), -float("inf"), float("nan")])])
    n, one, zero = len(x), torch.ones(1, 1), torch.zeros(1, 1)
    h0 = torch.zeros(1, n, 1)
    tanh, *_ = torch.ops.nlpkernels.recurrent(x.reshape(1, n, 1), None, h0, None, [one, zero], "rnn_tanh", False, None)
    *_, kept = torch.ops.nlpkernels.recurrent(
        x.reshape(1, n, 1), None, h0, h0, [one.expand(4, 1), zero.expand(4, 1)], "lstm", True, None
    )
    for got, exact in ((tanh.reshape(n), x.double().tanh()), (kept[0, :, 0, 0], x.double().sigmoid())):
        error = (got.double() - exact).abs()[: len(finite)] / exact.abs()[: len(finite)]
        assert error.max() < 3 * torch.finfo(torch.float32).eps
        assert torch.equal(got[-3:].double().nan_to_num(7), exact[-3:].nan_to_num(7))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_neither_batch_nor_threads(kind: str, dtype: torch.dtype, restored_threads: None) -> None:
    _, ours = pair(kind, 24, 40, bidirectional=True)
    ours.to(dtype)
    x = torch.randn(50, 70, 24, dtype=dtype)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(outputs_and_gradients(ours, x, None, Tensor.sin))
    for other in runs[1:]:
        assert all(map(torch.equal, other, runs[0]))
    for sequences in (slice(0, 1), slice(3, 5), slice(10, 23)):
        assert torch.equal(ours(x[:, sequences])[0], runs[0][0][:, sequences])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_bits_of_few_sequences(
    kind: str, bidirectional: bool, steps: int, dtype: torch.dtype, restored_threads: None
) -> None:
    """Too few sequences for the threads: then it is hidden units that they share, and they wait for each other."""
    _, ours = pair(kind, 100, 200, bidirectional=bidirectional)
    ours.to(dtype).recurrent_dropout = 0.5
    x = torch.randn(steps, 5, 100, dtype=dtype)
    lengths = torch.randint(1, steps + 1, (5,))
    runs = []
    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        torch.manual_seed(steps)  # of the mask
        runs.append(outputs_and_gradients(ours, x, None, Tensor.sin))
        with torch.no_grad():
            runs[-1] += tensors(ours(x, lengths=lengths))
    for other in runs[1:]:
        assert all(map(torch.equal, other, runs[0]))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bits_in_a_ragged_batch(kind: str, dtype: torch.dtype) -> None:
    """Those of each sequence alone; of one step too, which goes a way of its own."""
    _, ours = pair(kind, 13, 43, bidirectional=True)
    ours.to(dtype)
    lengths = [1, 6, 1, 2, 1, 0, 1, 3, 1]
    x = torch.randn(6, len(lengths), 13, dtype=dtype)
    hx = states_for(ours, (len(lengths),), dtype, "cpu")
    together = tensors(ours(x, hx, lengths=lengths))
    for b, length in enumerate(lengths):
        own = hx[:, b : b + 1] if isinstance(hx, Tensor) else tuple(state[:, b : b + 1] for state in hx)
        output, *states = tensors(ours(x[:length, b : b + 1], own))
        assert torch.equal(output, together[0][:length, b : b + 1])
        assert all(torch.equal(state, all_[:, b : b + 1]) for state, all_ in zip(states, together[1:], strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_to_do(kind: str, device: str) -> None:
    """No steps leave the states as they are; no sequences give empty results; gradients follow."""
    _, ours = pair(kind, 6, 5, device=device)
    hx = states_for(ours, (3,), torch.float32, device)
    output, *states = tensors(ours(torch.empty(0, 3, 6, device=device), hx))
    assert output.shape[:2] == (0, 3)
    assert all(map(torch.equal, states, tensors(hx)))
    for steps in (4, 1):  # one step goes another way
        x = torch.empty(steps, 0, 6, device=device, requires_grad=True)
        ours.zero_grad()
        ours(x)[0].sum().backward()
        assert all(not parameter.grad.any() for parameter in ours.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_only_wanted_gradients(kind: str, device: str) -> None:
    theirs, ours = pair(kind, 6, 5, 2, device=device, dtype=torch.float64)
    x = torch.randn(4, 3, 6, device=device, dtype=torch.float64)
    for name in ("weight_hh_l1", "weight_ih_l0"):
        grads = []
        for layer in (theirs, ours):
            layer.requires_grad_(False)
            layer.get_parameter(name).requires_grad_()
            layer(x)[0].sin().sum().backward()
            grads.append(layer.get_parameter(name).grad)
            assert all(p.grad is None for n, p in layer.named_parameters() if not p.requires_grad)
            layer.zero_grad()
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(), (1,), (9,)], ids=["unbatched", "one", "nine"])
def test_cells_match_torch(kind: str, dtype: torch.dtype, batch: tuple[int, ...], device: str) -> None:
    name, own = CELLS[kind]
    theirs = getattr(nn, name)(60, 50, **own, device=device, dtype=dtype)
    ours = getattr(nlpkernels, name)(60, 50, **own, device=device, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(*batch, 60, device=device, dtype=dtype)
    states = [torch.randn(*batch, 50, device=device, dtype=dtype) for _ in range(2 if kind == "lstm" else 1)]
    for given in (None, states):
        if kind == "rnn_relu":
            run = partial(exact, *(t.double() for t in (x, *(given or []))))
            keep_from_kinks(run, rounding(dtype, device), theirs, ours, exact)
        runs = []
        for cell in (ours, theirs, exact):
            inputs = [t.detach().to(cell.weight_ih.dtype).requires_grad_() for t in (x, *(given or []))]
            hx = None if given is None else (tuple(inputs[1:]) if kind == "lstm" else inputs[1])
            output = tensors(cell(inputs[0], hx))
            wanted = [*inputs, *cell.parameters()]
            runs.append(output + list(torch.autograd.grad(sum(o.sum() for o in output), wanted)))
        assert_as_exact(*runs, names=[f"result {i}" for i in range(len(runs[0]))])


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("missing", [["bias_ih"], ["bias_hh"], ["bias_ih", "bias_hh"]], ids=" and ".join)
def test_cells_without_a_bias(kind: str, missing: list[str], device: str) -> None:
    """One that is None counts as zeros, as in torch.nn."""
    name, own = CELLS[kind]
    theirs = getattr(nn, name)(6, 5, **own, device=device, dtype=torch.float64)
    ours = getattr(nlpkernels, name)(6, 5, **own, device=device, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    for batch in ((), (3,)):
        x, runs = torch.randn(*batch, 6, device=device, dtype=torch.float64), []
        for cell in (theirs, ours):
            for bias in missing:
                setattr(cell, bias, None)
            output = tensors(cell(x))
            runs.append(output + list(torch.autograd.grad(sum(o.sin().sum() for o in output), list(cell.parameters()))))
        torch.testing.assert_close(runs[1], runs[0])


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_step(kind: str, dtype: torch.dtype) -> None:
    """Those of each sequence alone, however many rows make up a tile, or a block of tiles."""
    name, own = CELLS[kind]
    cell = getattr(nlpkernels, name)(165, 50, **own, dtype=dtype)
    x = torch.randn(90, 165, dtype=dtype)
    alone = [torch.cat(outputs) for outputs in zip(*(tensors(cell(row)) for row in x.split(1)), strict=True)]
    for batch in (*range(2, 16), 90):
        together = tensors(cell(x[:batch]))
        assert all(torch.equal(got, expected[:batch]) for got, expected in zip(together, alone, strict=True)), batch


def make(name: str, library: Any, *args: Any, **options: Any) -> nn.Module:
    torch.manual_seed(5)
    return getattr(library, name)(*args, **options)


CONSTRUCTIONS = [
    ("RNN", (4, 5), {}),
    ("RNN", (4, 5, 2, "relu", False, True, 0.5, True), {}),
    ("LSTM", (4, 5, 2, False, True, 0.5, True, 3), {}),
    ("LSTM", (4, 5), {"dtype": torch.float64}),
    ("GRU", (4, 5, 2, False, True, 0.5, True), {}),
    ("RNNCell", (4, 5, True, "relu"), {}),
    ("LSTMCell", (4, 5, False), {}),
    ("GRUCell", (4, 5), {}),
]


@pytest.mark.parametrize(("name", "args", "options"), CONSTRUCTIONS, ids=str)
def test_is_built_like_torchs(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Positional arguments, initial values, names, repr, state_dict both ways, pickle, deepcopy, dtype and device."""
    theirs, ours = make(name, nn, *args, **options), make(name, nlpkernels, *args, **options)
    assert repr(ours) == repr(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    theirs.reset_parameters()
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())

    ours.eval()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    x = torch.randn(3, 4, dtype=ours.weight_ih.dtype if "Cell" in name else ours.weight_ih_l0.dtype)
    with torch.no_grad():
        expected = tensors(ours(x))
        for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), torch.load(file, weights_only=False)):
            assert all(map(torch.equal, tensors(twin(x)), expected))
        assert tensors(ours.double()(x.double()))[0].dtype == torch.float64
    assert next(ours.to("meta").parameters()).is_meta


REFUSED_SINCE_2_11 = pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.10 takes it")


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize(
    "args",
    [
        {"hidden_size": 0},
        {"input_size": -1},
        {"num_layers": 0},
        {"num_layers": -1},
        {"dropout": 2},
        pytest.param({"bias": 1}, marks=REFUSED_SINCE_2_11),
        pytest.param({"batch_first": None}, marks=REFUSED_SINCE_2_11),
        {"hidden_size": 2.0},
        {"nonlinearity": "sigmoid"},
        {"proj_size": 5},
    ],
    ids=str,
)
def test_constructor_refuses_what_torchs_refuses(name: str, args: dict[str, Any]) -> None:
    complete = {"input_size": 3, "hidden_size": 5, **args}
    with pytest.raises(Exception) as expected:  # noqa: PT011 -- whatever torch raises
        getattr(nn, name)(**complete)
    with pytest.raises(expected.type) as got:
        getattr(nlpkernels, name)(**complete)
    if not {"proj_size", "nonlinearity"} & set(args):  # of which ours has words of its own
        assert str(got.value) == str(expected.value)


def bad_calls(device: str) -> list[tuple[str, Any, Any]]:
    """What is wrong, input, hx for a 2-layer layer of 4 features and 5 units."""
    ok = torch.randn(3, 2, 4, device=device)
    return [
        ("4-D", torch.randn(3, 2, 4, 1, device=device), None),
        ("features", torch.randn(3, 2, 5, device=device), None),
        ("dtype", ok.double(), None),
        ("batch of hx", ok, torch.randn(2, 3, 5, device=device)),
        ("layers of hx", ok, torch.randn(1, 2, 5, device=device)),
        ("dimensions of hx", ok, torch.randn(2, 5, device=device)),
        ("hx for unbatched input", ok[:, 0], torch.randn(2, 1, 5, device=device)),
    ]


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru"])
def test_bad_input_raises_torchs_errors(kind: str, device: str) -> None:
    theirs, ours = pair(kind, 4, 5, 2, device=device)
    for what, x, hx in bad_calls(device):
        states = (hx, hx) if kind == "lstm" and hx is not None else hx
        with pytest.raises((ValueError, RuntimeError)) as expected:
            theirs(x, states)
        with pytest.raises(expected.type) as got:
            ours(x, states)
        assert len(str(got.value)) > 20, what


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_hx_of_another_kind_of_layer_is_refused(name: str) -> None:
    x, h = (torch.randn(2, 4), torch.randn(2, 5)) if "Cell" in name else (torch.randn(3, 2, 4), torch.randn(1, 2, 5))
    for hx in [h, (h, h, h)] if "LSTM" in name else [(h, h)]:
        with pytest.raises(RuntimeError, match=rf"{name}: expected hx to be (one tensor|two tensors, \(h, c\)), got"):
            getattr(nlpkernels, name)(4, 5)(x, hx)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_hx_of_other_things_is_refused(name: str) -> None:
    x = torch.randn(2, 4) if "Cell" in name else torch.randn(3, 2, 4)
    h = torch.randn(2, 5) if "Cell" in name else torch.randn(1, 2, 5)
    others: list[tuple[Any, str]] = [(5, "int"), ("ab", "str"), ([1.0], "list"), ((None, None), "tuple of ")]
    if "LSTM" in name:
        others += [((h, None), "tuple of Tensor and NoneType"), ([[1.0], h], "list of list and Tensor")]
    for hx, got in others:
        with pytest.raises(RuntimeError, match=f"{name}: expected hx to be .*, got {got}"):
            getattr(nlpkernels, name)(4, 5)(x, hx)


def test_functions_refuse_what_does_not_fit() -> None:
    x, h, weights = torch.randn(3, 2, 4), torch.randn(1, 2, 5), [torch.randn(15, 4), torch.randn(15, 5)]
    functional.gru(x, h, weights, False, 1, 0.0, False, False)
    with pytest.raises(TypeError, match=r"gru: expected params to be tensors, got NoneType in params\[1\]"):
        functional.gru(x, h, [weights[0], None], False, 1, 0.0, False, False)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="gru: expected hx to be a tensor, got NoneType"):
        functional.gru(x, None, weights, False, 1, 0.0, False, False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="lstm: expected cx to be a tensor, got NoneType"):
        functional.lstm(x, (h, None), weights, False, 1, 0.0, False, False)  # type: ignore[arg-type]
    for p in (float("nan"), -1, 2, "a", None):
        with pytest.raises(ValueError, match=f"gru: expected dropout to be a number from 0 to 1, got {p!r}"):
            functional.gru(x, h, weights, False, 1, p, True, False)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"gru: expected recurrent_dropout to be a number from 0 to 1, got {p!r}"):
            functional.gru(x, h, weights, False, 1, 0.0, True, False, recurrent_dropout=p)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CELLS)
def test_cells_without_units(kind: str) -> None:
    """As torch.nn's: nothing comes out, and the input's gradient is zeros."""
    name, own = CELLS[kind]
    ours, theirs = (getattr(library, name)(3, 0, **own) for library in (nlpkernels, nn))
    h = torch.zeros(2, 0)
    for hx in (None, (h, h) if name == "LSTMCell" else h):
        runs = []
        for cell in (ours, theirs):
            x = torch.randn(2, 3, requires_grad=True)
            states = tensors(cell(x, hx))
            sum(state.sum() for state in states).backward()
            runs.append([*(state.shape for state in states), x.grad.tolist()])
        assert runs[0] == runs[1]


def test_ops_refuse_what_does_not_fit(device: str) -> None:
    """The op itself is safe: shapes, dtypes, devices and batch sizes that do not fit never reach a kernel."""
    if device == "cuda" and not _ops.USES_CUDA_KERNELS:
        pytest.skip("csrc/checks.h is for compiled kernels, and none of CUDA are in use")
    op = torch.ops.nlpkernels.recurrent
    shapes = (3, 2, 4), (1, 2, 5), (5, 4), (5, 5), (4,), (5,)
    x, h0, w_ih, w_hh, short, bias = (torch.randn(shape, device=device) for shape in shapes)
    sizes = torch.tensor([2, 1])
    good = dict(x=x, batch_sizes=None, h0=h0, c0=None, weights=[w_ih, w_hh], cell="rnn_tanh", keep=False, h_mask=None)
    op(**good)
    for change, message in [
        ({"x": x[0, 0]}, "x of shape"),
        ({"x": x.int()}, "floating"),
        ({"h0": h0[0]}, "h0 of shape"),
        ({"h0": h0.double()}, "h0 of dtype"),
        ({"h0": h0.new_zeros(1, 3, 5)}, "batch of 2"),
        ({"weights": [w_ih]}, "2 to 5 weights"),
        ({"weights": [w_ih, w_hh.t()[:4]]}, "weight_hh of shape"),
        ({"weights": [w_ih, w_hh.half()]}, "dtype"),
        ({"weights": [w_ih, w_hh, short, bias]}, "bias_ih of shape"),
        ({"c0": h0}, "c0 is for the LSTM"),
        ({"cell": "lstm"}, "shape"),
        ({"h_mask": h0[0]}, r"h_mask of shape \[1, 2, 5\], got \[2, 5\]"),
        ({"h_mask": h0[:, :1]}, "h_mask of shape"),
        ({"h_mask": h0.bool()}, "h_mask of dtype Float like x, got Bool"),
        ({"cell": "elman"}, "expected cell"),
        ({"x": x[0], "batch_sizes": sizes.int()}, "batch_sizes"),
        ({"x": x[0], "batch_sizes": sizes}, "sum of batch_sizes"),
        ({"x": x.reshape(6, 4), "batch_sizes": torch.tensor([1, 2, 3])}, r"batch_sizes\[1\]"),
        ({"x": x.reshape(6, 4), "batch_sizes": torch.tensor([7, -1])}, r"batch_sizes\[0\]"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            op(**{**good, **change})


def test_cells_refuse_bad_input(device: str) -> None:
    for name in ("RNNCell", "LSTMCell", "GRUCell"):
        theirs, ours = getattr(nn, name)(4, 5, device=device), getattr(nlpkernels, name)(4, 5, device=device)
        good = torch.randn(2, 5, device=device)
        for x, h in [
            (torch.randn(1, 2, 4, device=device), None),
            (torch.randn(2, 3, device=device), None),
            (torch.randn(2, 4, device=device), good[None]),
            (torch.randn(2, 4, device=device), torch.randn(3, 5, device=device)),
            (torch.randn(2, 4, device=device), torch.randn(2, 4, device=device)),
        ]:
            hx = h if h is None or name != "LSTMCell" else (h, good)
            with pytest.raises((ValueError, RuntimeError)) as expected:
                theirs(x, hx)
            with pytest.raises(expected.type):
                ours(x, hx)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_replaced_weights_that_do_not_fit_are_refused(name: str, device: str) -> None:
    ours = getattr(nlpkernels, name)(4, 5, bias=False, device=device)
    x, h = torch.randn(3, 4, device=device), torch.zeros(3, 5, device=device)
    if "Cell" not in name:
        x, h = x[None], h[None]
    suffix = "" if "Cell" in name else "_l0"
    for which in ("weight_ih", "weight_hh"):
        good = getattr(ours, which + suffix)
        for bad in (None, good[0], good[:, :3], good[:3]):
            setattr(ours, which + suffix, None if bad is None else nn.Parameter(bad))
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                ours(x, (h, h) if "LSTM" in name else h)
        setattr(ours, which + suffix, good)
    ours(x, (h, h) if "LSTM" in name else h)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_tensors_without_data_beside_some_with_it_are_refused(name: str) -> None:
    """They would be read as memory is found."""
    ours = getattr(nlpkernels, name)(4, 5)
    x, h = torch.randn(3, 4), torch.zeros(3, 5)
    if "Cell" not in name:
        x, h = x[None], h[None]
    hx, hx_meta = ((h, h), (h, h.to("meta"))) if "LSTM" in name else (h, h.to("meta"))
    with pytest.raises(RuntimeError, match="recurrent: expected x on cpu like the weights, got meta"):
        ours(x.to("meta"), hx)
    with pytest.raises(RuntimeError, match=r"recurrent: expected [hc]0 on cpu like x, got meta"):
        ours(x, hx_meta)
    for weight in list(ours._parameters):
        good = getattr(ours, weight)
        setattr(ours, weight, nn.Parameter(good.to("meta")))
        with pytest.raises(RuntimeError, match="recurrent: expected weights on cpu like x, got meta"):
            ours(x, hx)
        setattr(ours, weight, good)
    ours(x, hx)


def test_the_way_to_the_kernels_takes_only_what_fits() -> None:
    """What a module hands over when its attributes have been changed: Python's way then says what is wrong."""
    layer, cell = nlpkernels.LSTM(4, 5), nlpkernels.LSTMCell(4, 5)
    x, h = torch.randn(3, 2, 4), torch.zeros(1, 2, 5)
    weights = list(layer.parameters())
    for states in ((), (h,), (h, h, h)):
        if states:
            assert _ops.recurrent_layers(x, states, weights, "lstm", 1, 1, False) is None
        assert _ops.recurrent_step(x[0], tuple(h[0] for h in states), list(cell.parameters()), "lstm") is None
    for layers in (0, -1):
        assert _ops.recurrent_layers(x, None, weights, "lstm", layers, 1, False) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*LAYERS, *(f"{kind}_cell" for kind in CELLS)])
def test_autocast(kind: str, dtype: torch.dtype, device: str) -> None:
    """Under autocast everything is cast, as torch does, and the result is that of a layer in the dtype; gradients keep
    the parameters' dtype."""
    if kind.endswith("_cell"):
        name, own = CELLS[kind.removesuffix("_cell")]
        ours = getattr(nlpkernels, name)(24, 40, **own, device=device)
        x = torch.randn(3, 24, device=device, requires_grad=True)
    else:
        _, ours = pair(kind, 24, 40, 2, bidirectional=True, device=device)
        x = torch.randn(4, 3, 24, device=device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        got = tensors(ours(x))
    assert {tensor.dtype for tensor in got} == {dtype}
    expected = tensors(copy.deepcopy(ours).to(dtype)(x.detach().to(dtype)))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    sum(tensor.float().sin().sum() for tensor in got).backward()
    exact = torch.autograd.grad(sum(tensor.sin().sum() for tensor in tensors(ours(x))), [x, *ours.parameters()])
    for tensor, want in zip([x, *ours.parameters()], exact, strict=True):
        assert tensor.grad.dtype == torch.float32
        if "relu" not in kind:  # of which a unit near 0 may be on the other side of it in the dtype
            assert relative_error(tensor.grad, want) < 0.1


@pytest.mark.skipif(_ops.INSTRUCTION_SET != "avx512bf16", reason="for a processor that multiplies vectors, not tiles")
def test_tiles_in_software(request: pytest.FixtureRequest) -> None:
    """Where there is no AMX, its kernels with the instructions in software: all tests of bfloat16 here and beside."""
    if request.config.getoption("emulated_tiles") or request.config.getoption("emulated_cuda"):
        pytest.skip("other kernels are at work already")
    here = os.path.dirname(__file__)
    files = [f"{here}/test_{name}.py" for name in ("recurrent", "recurrent_dropout", "special_values")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--emulated-tiles", "-k", "bfloat16"]
    run = subprocess.run(command + files, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


OTHERS = [name for name in _ops.INSTRUCTION_SETS if name != _ops.INSTRUCTION_SET]


@pytest.mark.parametrize("instructions", OTHERS)
def test_other_instruction_sets(instructions: str) -> None:
    """The comparison with torch.nn again, with each of the other libraries that this machine can run."""
    if os.environ.get("NLPKERNELS_CPU"):
        pytest.skip("an instruction set is forced already")
    if _ops.INSTRUCTION_SETS.index(instructions) > _ops.INSTRUCTION_SETS.index(_ops.INSTRUCTION_SET):
        pytest.skip(f"this machine has no {instructions}")
    tests = "test_matches_torch or test_modes or test_packed or test_cells_match or test_bits"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", f"({tests}) and not cuda", "--no-header"]
    files = [os.path.join(os.path.dirname(__file__), name) for name in ("test_recurrent.py", "test_embedding.py")]
    run = subprocess.run(
        command + files, env={**os.environ, "NLPKERNELS_CPU": instructions}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
