"""Recurrent (variational) dropout: one mask of h_{t-1} for all steps, where W_hh multiplies it."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from rounding import STEP, keep_from_kinks, rounding
from test_recurrent import DTYPES, LAYERS, pair, states_for, tensors
from tolerances import assert_as_exact
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import nlpkernels
from nlpkernels import _ops, functional

P = 0.3
OPS = torch.ops.nlpkernels


def with_dropout(kind: str, *sizes: int, p: float = P, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A layer of torch.nn, and ours with the same parameters and recurrent dropout."""
    theirs, _ = pair(kind, *sizes, **options)
    ours = copy.deepcopy(theirs)
    nlpkernels.convert(ours)
    ours.recurrent_dropout = p
    return theirs, ours


def masks_of(layer: nn.Module, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """What the layer draws, [D, B, P] for each of its layers; it must be given the same seed, and no other dropout."""
    features, directions = layer.proj_size or layer.hidden_size, 2 if layer.bidirectional else 1
    ones = torch.ones(directions, batch, features, dtype=dtype, device=device)
    return [torch.dropout(ones, layer.recurrent_dropout, True) for _ in range(layer.num_layers)]


def one_by_one(theirs: nn.Module, masks: list[Tensor], x: Tensor, hx: Any, lengths: list[int]) -> list[Tensor]:
    """torch.nn's output (zeros after a sequence's end) and final states, each sequence by itself.

    W_hh (m h) = (W_hh diag(m)) h: for one sequence, the mask can be put into the weights.
    """
    outputs, finals = [], []
    for b, length in enumerate(lengths):
        weights = dict(theirs.named_parameters())
        for layer, mask in enumerate(masks):
            for d, ending in enumerate(["", "_reverse"][: len(mask)]):
                name = f"weight_hh_l{layer}{ending}"
                weights[name] = weights[name] * mask[d, b].to(x.dtype)
        states = tuple(state[:, b : b + 1] for state in tensors(hx))
        given = (x[:length, b : b + 1], states if len(states) > 1 else states[0])
        output, *final = tensors(torch.func.functional_call(theirs, weights, given))
        outputs.append(torch.cat([output, output.new_zeros(len(x) - length, *output.shape[1:])]))
        finals.append(final)
    return [torch.cat(outputs, 1), *(torch.cat(states, 1) for states in zip(*finals, strict=True))]


def with_gradients(outputs: list[Tensor], cotangents: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    loss = sum(
        (output * cotangent.to(output.dtype)).sum() for output, cotangent in zip(outputs, cotangents, strict=True)
    )
    return outputs + list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("given", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_masked_weights(kind: str, given: str, bidirectional: bool, dtype: torch.dtype, device: str) -> None:
    """Outputs, states and all gradients are those of torch.nn, each sequence with its own masked weights."""
    steps, batch = 6, 5
    layers = 1 if kind == "rnn_relu" else 2  # rounding of one layer's output may turn a ReLU of the next on or off
    theirs, ours = with_dropout(kind, 19, 37, layers, bidirectional=bidirectional, device=device, dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    lengths = [steps] * batch if given == "padded" else [2, 6, 1, 4, 4]
    x = torch.randn(steps, batch, 19, dtype=dtype, device=device)
    hx = tensors(states_for(ours, (batch,), dtype, device))
    seed = torch.initial_seed() % 2**32
    torch.manual_seed(seed)
    masks = masks_of(ours, batch, dtype, device)
    values = torch.cat([mask.flatten() for mask in masks]).unique()
    assert torch.equal(values, torch.tensor([0, 1 / (1 - P)], dtype=dtype, device=device))

    # Masks are of the sequences as they are packed, the longest first.
    order = torch.tensor(lengths).argsort(descending=True, stable=True)
    if given == "packed":
        order = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False).sorted_indices
    masks = [mask[:, order.argsort()] for mask in masks]
    relu = kind == "rnn_relu"
    if relu:
        wide = [x.double(), hx[0].double()]
        run = partial(one_by_one, exact, masks, *wide, lengths)
        keep_from_kinks(run, rounding(dtype, device), theirs, ours, exact)

    runs, cotangents = [], []
    for layer in (ours, theirs, exact):
        wanted = next(layer.parameters()).dtype
        leaves = [tensor.detach().to(wanted).requires_grad_() for tensor in (x, *hx)]
        states = tuple(leaves[1:]) if len(hx) > 1 else leaves[1]
        if layer is not ours:
            got = one_by_one(layer, masks, leaves[0], states, lengths)
        elif given == "packed":
            packed = pack_padded_sequence(leaves[0], torch.tensor(lengths), enforce_sorted=False)
            torch.manual_seed(seed)
            output, final = ours(packed, states)
            got = [torch.nn.utils.rnn.pad_packed_sequence(output)[0], *tensors(final)]
        else:
            torch.manual_seed(seed)
            options = {"lengths": lengths} if given == "lengths" else {}
            got = tensors(ours(leaves[0], states, **options))
        if not cotangents:
            cotangents = [torch.randn_like(tensor) for tensor in got]
        runs.append(with_gradients(got, cotangents, [*leaves, *layer.parameters()]))
    assert_as_exact(*runs, names=[f"result {i}" for i in range(len(runs[0]))], relu=relu)


@pytest.mark.parametrize("kind", LAYERS)
def test_derivatives(kind: str, device: str) -> None:
    """First derivatives by both modes, and second ones, under a mask that stays the same."""
    theirs, layer = with_dropout(kind, 2, 4, 2, bidirectional=True, dtype=torch.float64, device=device)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    seed = torch.initial_seed() % 2**32
    if kind == "rnn_relu":
        torch.manual_seed(seed)
        masks = masks_of(layer, 2, torch.float64, device)
        swapped = [mask.flip(1) for mask in masks]  # as the sequences of lengths 2 and 3 are packed
        hx = torch.zeros(4, 2, 4, dtype=torch.float64, device=device)
        keep_from_kinks(
            lambda: (one_by_one(theirs, masks, x, hx, [3, 3]), one_by_one(theirs, swapped, x, hx, [2, 3])),
            STEP, theirs, layer,
        )  # fmt: skip

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return tuple(tensors(torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))))

    def run_packed(x: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return tuple(tensors(layer(x, lengths=[2, 3], return_state_sequence=True)))

    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(run_packed, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run_packed, (x,))


@pytest.mark.parametrize("kind", LAYERS)
def test_function_transforms(kind: str, device: str) -> None:
    _, layer = with_dropout(kind, 2, 30, dtype=torch.float64, device=device)  # of which some unit of a ReLU is not 0
    many = torch.randn(5, 3, 1, 2, dtype=torch.float64, device=device)

    def run(x: Tensor) -> Tensor:
        return layer(x)[0].sin().sum()

    for transformed in (run, torch.func.grad(run)):
        same = torch.func.vmap(transformed, randomness="same")
        seed = torch.initial_seed() % 2**32
        torch.manual_seed(seed)
        got = same(many)
        for one, result in zip(many, got, strict=True):
            torch.manual_seed(seed)
            torch.testing.assert_close(result, transformed(one))
    repeated = many[:1].expand(64, -1, -1, -1)
    different = torch.func.vmap(run, randomness="different")(repeated)
    assert len(different.unique()) > 1
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(run)(many)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(50, 70, 24, 40), (12, 1, 64, 200), (1, 3, 64, 200)], ids=str)
def test_bits_depend_on_neither_batch_nor_threads(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, restored_threads: None
) -> None:
    steps, batch, inputs, hidden = shape
    _, layer = pair(kind, inputs, hidden, bidirectional=batch > 1, dtype=dtype)
    directions = 2 if batch > 1 else 1
    weights = [weight.detach().requires_grad_() for weight in layer._flat_weights]
    features = layer.proj_size or layer.hidden_size
    x, h0 = torch.randn(steps, batch, inputs, dtype=dtype), torch.randn(directions, batch, features, dtype=dtype)
    c0 = torch.randn(directions, batch, hidden, dtype=dtype) if layer.mode == "LSTM" else None
    h_mask = torch.dropout(torch.ones_like(h0), P, True)
    cell = layer.mode.lower()
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, h_n, *_ = OPS.recurrent(x, None, h0, c0, weights, cell, True, h_mask)
        runs.append([y, h_n, *torch.autograd.grad(y.sin().sum() + h_n.sum(), weights)])
    for other in runs[1:]:
        assert all(map(torch.equal, other, runs[0]))
    for own in (slice(0, 1), slice(1, 3), slice(10, 23)):
        some_c0 = None if c0 is None else c0[:, own]
        y = OPS.recurrent(x[:, own], None, h0[:, own], some_c0, weights, cell, True, h_mask[:, own])[0]
        assert torch.equal(y, runs[0][0][:, own])


@pytest.mark.parametrize("kind", LAYERS)
def test_only_in_training_and_only_if_wanted(kind: str, device: str) -> None:
    """None in eval mode; of probability 0 nothing is drawn; of probability 1 nothing of h passes W_hh."""
    theirs, ours = with_dropout(kind, 6, 30, 2, bidirectional=True, device=device)
    x = torch.randn(4, 3, 6, device=device)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.eval()
    torch.testing.assert_close(tensors(ours(x)), tensors(theirs(x)))
    ours.train()
    ours.recurrent_dropout = 0.0
    state = torch.get_rng_state()
    torch.testing.assert_close(tensors(ours(x)), tensors(theirs(x)))
    assert torch.equal(torch.get_rng_state(), state)
    ours.recurrent_dropout = 1.0
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "weight_hh" in name:
                parameter.zero_()
    torch.testing.assert_close(tensors(ours(x)), tensors(theirs(x)))


def test_beside_dropout_between_the_layers(device: str) -> None:
    _, ours = with_dropout("lstm", 6, 5, 2, dropout=0.5, device=device)
    x = torch.randn(4, 3, 6, device=device)
    torch.manual_seed(1)
    ones = torch.ones(1, 3, 5, device=device)
    first = torch.dropout(ones, P, True)
    between = torch.dropout(torch.ones(4, 3, 5, device=device), 0.5, True)
    second = torch.dropout(ones, P, True)
    zeros = torch.zeros(1, 3, 5, device=device)
    weights = list(ours._flat_weights)
    y, *_ = OPS.recurrent(x, None, zeros, zeros, weights[:4], "lstm", False, first)
    y, *_ = OPS.recurrent(y * between, None, zeros, zeros, weights[4:], "lstm", False, second)
    torch.manual_seed(1)
    torch.testing.assert_close(ours(x)[0], y)
    torch.manual_seed(1)
    arguments = (x, (zeros.expand(2, -1, -1), zeros.expand(2, -1, -1)), weights, True, 2, 0.5)
    torch.testing.assert_close(functional.lstm(*arguments, True, False, recurrent_dropout=P)[0], y)
    plain = functional.lstm(*arguments, False, False)[0]
    torch.testing.assert_close(functional.lstm(*arguments, False, False, recurrent_dropout=P)[0], plain)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_attribute(name: str) -> None:
    """It is shown and kept if it is there, absent it is 0, and torch.nn is not given a layer that has it."""
    layer = getattr(nlpkernels, name)(4, 5, bidirectional=True, recurrent_dropout=0.25)
    assert repr(layer) == f"{name}(4, 5, bidirectional=True, recurrent_dropout=0.25)"
    assert pickle.loads(pickle.dumps(layer)).recurrent_dropout == 0.25
    swaps = nlpkernels.revert(layer)
    assert not swaps.swapped
    assert "torch.nn has no recurrent_dropout" in str(swaps)
    layer.recurrent_dropout = 0.0
    assert nlpkernels.revert(layer).swapped

    plain = getattr(nn, name)(4, 5)
    nlpkernels.convert(plain)
    assert plain.recurrent_dropout == 0
    assert "recurrent_dropout" not in repr(plain)
    state = vars(getattr(nlpkernels, name)(4, 5)).copy()
    del state["recurrent_dropout"]  # as one was pickled before there was such an argument
    old = getattr(nlpkernels, name).__new__(getattr(nlpkernels, name))
    old.__setstate__(state)
    assert old(torch.randn(3, 2, 4))[0].shape == (3, 2, 5)
    for wrong in (-0.1, 1.5, "0.5", True, None, float("nan")):
        with pytest.raises(ValueError, match=r"recurrent_dropout should be a number in range \[0, 1\], .* got"):
            getattr(nlpkernels, name)(4, 5, recurrent_dropout=wrong)


def test_mask_has_no_gradient(device: str) -> None:
    weights = [torch.randn(15, size, device=device) for size in (4, 5)]
    x, h0 = torch.randn(3, 2, 4, device=device), torch.randn(1, 2, 5, device=device)
    mask = torch.ones(1, 2, 5, device=device, requires_grad=True)
    for run in (OPS.recurrent, _ops.recurrent):  # compiled code's way, and eager code's
        with pytest.raises(NotImplementedError, match="h_mask has no gradient"):
            run(x, None, h0, None, weights, "gru", run is OPS.recurrent, mask)[0].sum().backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_around_the_layer(kind: str, device: str) -> None:
    """Checkpointing draws the same masks again; compiled code and autocast have masks of their own."""
    _, layer = with_dropout(kind, 6, 5, 2, bidirectional=True, device=device)
    x = torch.randn(4, 3, 6, device=device, requires_grad=True)
    torch.manual_seed(1)
    expected = torch.autograd.grad(layer(x)[0].sin().sum(), [x, *layer.parameters()])
    torch.manual_seed(1)
    loss = checkpoint(layer, x, use_reentrant=False)[0].sin().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, [x, *layer.parameters()]), expected)

    torch.manual_seed(1)
    with torch.autocast(device, dtype=torch.bfloat16):
        low = layer(x)[0]
    torch.manual_seed(1)
    assert torch.equal(low, copy.deepcopy(layer).to(torch.bfloat16)(x.detach().bfloat16())[0])
    low.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.manual_seed(1)
    got = torch.autograd.grad(compiled(x)[0].sin().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(got, expected)
    torch._dynamo.reset()
