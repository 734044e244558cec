"""What torch.nn has no argument for: lengths of a padded batch, and the states of every step and layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_recurrent import LAYERS, pair, states_for, tensors
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import nlpkernels
from nlpkernels import _ops


def one_by_one(theirs: nn.Module, x: Tensor, hx: Any, lengths: list[int]) -> list[Tensor]:
    """Output (padded with zeros) and final states of torch.nn, each sequence of x, [T, B, I], run by itself."""
    outputs, finals = [], []
    for b, length in enumerate(lengths):
        states = [state[:, b : b + 1] for state in tensors(hx)]
        if length > 0:
            output, *states = tensors(theirs(x[:length, b : b + 1], states if len(states) > 1 else states[0]))
            outputs.append(torch.cat([output, output.new_zeros(len(x) - length, *output.shape[1:])]))
        else:  # which torch.nn refuses
            features = (theirs.proj_size or theirs.hidden_size) * (2 if theirs.bidirectional else 1)
            outputs.append(x.new_zeros(len(x), 1, features))
        finals.append(states)
    return [torch.cat(outputs, 1), *(torch.cat(states, 1) for states in zip(*finals, strict=True))]


@pytest.mark.parametrize("batch_first", [False, True], ids=["steps_first", "batch_first"])
@pytest.mark.parametrize("kind", LAYERS)
def test_lengths(kind: str, batch_first: bool, device: str) -> None:
    """A padded, unsorted batch gives what its sequences give one by one, of length 0 too; gradients as well."""
    theirs, ours = pair(kind, 6, 5, 2, bidirectional=True, dtype=torch.float64, device=device)
    ours.batch_first = batch_first
    lengths = [3, 0, 7, 1, 5, 0, 7]
    x = torch.randn(8, 7, 6, dtype=torch.float64, device=device, requires_grad=True)
    hx = states_for(ours, (7,), torch.float64, device)
    expected = one_by_one(theirs, x, hx, lengths)
    weights = [torch.randn_like(tensor) for tensor in expected]
    gradients = torch.autograd.grad(
        sum((a * b).sum() for a, b in zip(expected, weights, strict=True)), [x, *theirs.parameters()]
    )
    for given in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32, device=device)):
        output, *states = tensors(ours(x.transpose(0, 1) if batch_first else x, hx, lengths=given))
        got = [output.transpose(0, 1) if batch_first else output, *states]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        loss = sum((a * b).sum() for a, b in zip(got, weights, strict=True))
        for a, b in zip(torch.autograd.grad(loss, [x, *ours.parameters()]), gradients, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm_projected", "gru"])
def test_padding_is_never_read(kind: str, device: str) -> None:
    _, ours = pair(kind, 6, 5, 2, bidirectional=True, device=device)
    x = torch.randn(4, 3, 6, device=device)
    clean = tensors(ours(x, lengths=[2, 4, 0]))
    x[2:, 0], x[:, 2] = torch.nan, torch.inf
    assert all(map(torch.equal, tensors(ours(x, lengths=[2, 4, 0])), clean))
    assert not clean[0][2:, 0].any()
    assert not clean[0][:, 2].any()
    empty = tensors(ours(x, lengths=[0, 0, 0]))
    assert not any(tensor.any() for tensor in empty)
    assert tensors(ours(x[:0], lengths=[0, 0, 0]))[0].shape == (0, 3, clean[0].shape[2])
    full = tensors(ours(clean[0].new_ones(4, 3, 6), lengths=[4, 4, 4]))
    assert all(map(torch.equal, full, tensors(ours(clean[0].new_ones(4, 3, 6)))))


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_of_an_empty_batch(kind: str, device: str) -> None:
    """No sequences have no lengths: the results are those of an empty batch without them, and so are the gradients."""
    _, ours = pair(kind, 6, 5, 2, bidirectional=True, device=device)
    x = torch.randn(4, 0, 6, device=device, requires_grad=True)
    expected = tensors(ours(x))
    for lengths in ([], (), torch.zeros(0, dtype=torch.long, device=device)):
        got = tensors(ours(x, lengths=lengths))
        assert [tensor.shape for tensor in got] == [tensor.shape for tensor in expected]
        assert tensors(ours(x, lengths=lengths, return_state_sequence=True))[1].shape[:3] == (4, 4, 0)
        dx, *gradients = torch.autograd.grad(sum(tensor.sum() for tensor in got), [x, *ours.parameters()])
        assert dx.shape == x.shape
        assert not any(gradient.any() for gradient in gradients)


def test_wrong_lengths(device: str) -> None:
    layer = nlpkernels.GRU(6, 5, device=device)
    x = torch.randn(4, 3, 6, device=device)
    for lengths, message in [
        ([1, 2], r"expected lengths to be 3 integers .* got shape \[2\]"),
        ([], r"got shape \[0\]"),
        ([[1, 2, 3]], r"got shape \[1, 3\]"),
        (torch.tensor([1.0, 2.0, 3.0]), "of torch.float32"),
        ([1, 5, 2], r"expected lengths from 0 to 4, the steps of input, got \[1, 5, 2\]"),
        ([1, -1, 2], r"got \[1, -1, 2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(x, lengths=lengths)
    with pytest.raises(ValueError, match="expected a 3D input, got an unbatched sequence"):
        layer(x[:, 0], lengths=[4])
    with pytest.raises(ValueError, match="got a PackedSequence"):
        layer(pack_padded_sequence(x, [4, 3, 2]), lengths=[4, 3, 2])


@pytest.mark.parametrize(
    ("lengths", "got"),
    [
        (5, "int 5"),
        ((n for n in (1, 2)), "generator <gen"),
        ("ab", "str 'ab'"),
        ([1, None], r"list \[1, None\]"),
        ({1: 2, 2: 1}, "dict {1: 2"),
        ([2**70, 1], r"list \[1180591620717411303424, 1\]"),
        ([[1], [2, 3]], r"list \[\[1\], \[2, 3\]\]"),
        ([[1, 2]], r"shape \[1, 2\]"),
        ([1.0, 2.0], "float32"),
        ([True, True], "bool"),
        (torch.tensor([1.0, 2.0]), "float32"),
        (torch.tensor(2), r"shape \[\]"),
    ],
    ids=str,
)
def test_lengths_that_are_no_integers(lengths: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"expected lengths to be 2 integers .* got .*{got}"):
        nlpkernels.GRU(3, 4)(torch.randn(4, 2, 3), lengths=lengths)


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit; of another's kernels where torch's own layers serve all that they can."""
    return torch.allclose(one, other) if one.device.type in _ops.LEFT_TO_TORCH else torch.equal(one, other)


def states_by_steps(theirs: nn.Module, x: Tensor, hx: Any) -> list[Tensor]:
    """The states after each step of each layer of torch.nn, [L, T, B, ...], from calls of one step. One direction."""
    kept = []
    for step in x:
        _, *states = tensors(theirs(step.unsqueeze(0), hx))
        hx = tuple(states) if len(states) > 1 else states[0]
        kept.append(states)
    return [torch.stack(states, 1) for states in zip(*kept, strict=True)]


@pytest.mark.parametrize("kind", LAYERS)
def test_state_sequence(kind: str, device: str) -> None:
    """The states of all steps and layers, and their gradients, are those of torch.nn called step by step."""
    theirs, ours = pair(kind, 6, 5, 3, dtype=torch.float64, device=device)
    x = torch.randn(4, 3, 6, dtype=torch.float64, device=device, requires_grad=True)
    hx = states_for(ours, (3,), torch.float64, device)
    expected = states_by_steps(theirs, x, hx)
    output, states = ours(x, hx, return_state_sequence=True)
    assert same(output, ours(x, hx)[0])
    wanted = [[x, *theirs.parameters()], [x, *ours.parameters()]]
    for got, true in zip(tensors(states), expected, strict=True):
        torch.testing.assert_close(got, true)
    losses = [sum(state.sin().sum() for state in given) for given in (expected, tensors(states))]
    gradients = [torch.autograd.grad(loss, inputs) for loss, inputs in zip(losses, wanted, strict=True)]
    for got, true in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, true)
    with torch.no_grad():
        for got, true in zip(tensors(ours(x, hx, return_state_sequence=True)[1]), expected, strict=True):
            torch.testing.assert_close(got, true)


@pytest.mark.parametrize("kind", ["rnn_relu", "lstm_projected", "gru"])
def test_state_sequence_in_every_layout(kind: str, device: str) -> None:
    """Steps and batch of the states lie as in the output; the last ones in each direction are the final states."""
    _, ours = pair(kind, 6, 5, 2, bidirectional=True, device=device)
    x = torch.randn(4, 3, 6, device=device)
    lengths = torch.tensor([2, 4, 3])
    _, *final = tensors(ours(x))
    _, *states = tensors(ours(x, return_state_sequence=True))
    _, *final_of_lengths = tensors(ours(x, lengths=lengths))
    _, *states_of_lengths = tensors(ours(x, lengths=lengths, return_state_sequence=True))
    for state, last, cut, cut_last in zip(states, final, states_of_lengths, final_of_lengths, strict=True):
        assert same(torch.stack([state[0, -1], state[1, 0]]), last[:2])
        assert same(cut[2, lengths - 1, torch.arange(3)], cut_last[2])
        assert same(cut[3, 0], cut_last[3])
        assert not cut[:, 2:, 0].any()
    one = tensors(ours(x[:, 0], return_state_sequence=True))
    packed = tensors(ours(pack_padded_sequence(x, lengths, enforce_sorted=False), return_state_sequence=True))
    ours.batch_first = True
    across = tensors(ours(x.transpose(0, 1), return_state_sequence=True))
    for i, state in enumerate(states):
        assert torch.equal(across[1 + i].transpose(1, 2), state)
        assert one[1 + i].shape == (4, 4, state.shape[-1])
        torch.testing.assert_close(one[1 + i], state[:, :, 0])
        assert packed[1 + i].shape == (4, 9, state.shape[-1])


def test_derivatives_of_the_state_sequence(device: str) -> None:
    _, layer = pair("lstm_projected", 2, 4, bidirectional=True, dtype=torch.float64, device=device)
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(layer(x, lengths=[2, 3], return_state_sequence=True)))

    assert torch.autograd.gradcheck(run, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x,))


def test_dropconnect(device: str) -> None:
    """Dropout on the recurrent weights (Wan et al. 2013), one mask for all steps, by parametrize."""
    _, layer = pair("lstm", 6, 5, 2, device=device)
    weight = layer.weight_hh_l0
    torch.nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", nn.Dropout(0.5))
    x = torch.randn(4, 3, 6, device=device)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer(x)[0].sum().backward()
    assert (layer.parametrizations.weight_hh_l0.original is weight) and not weight.grad.all()
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("given", [[5, 0, 2], torch.tensor([5, 0, 2])], ids=["list", "tensor"])
def test_lengths_under_a_default_device(given: Any) -> None:
    """Which is not that of a layer's input."""
    layer, x = nlpkernels.GRU(3, 4, batch_first=True), torch.randn(3, 5, 3)
    expected = layer(x, lengths=given)
    with torch.device("meta"):
        got = layer(x, lengths=given)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("way", ["compile", "export"])
def test_wrong_lengths_and_masks_are_refused_by_compiled_code(way: str) -> None:
    """When it runs: they are data. And right ones are taken."""
    gru, x = nlpkernels.GRU(4, 6).eval(), torch.randn(5, 2, 4)

    class Model(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.gru, self.name = gru, name

        def forward(self, x: Tensor, given: Tensor) -> Tensor:
            return self.gru(x, **{self.name: given})[0]

    full = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0], [0, 0]]).bool()
    gap = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 1], [0, 1]]).bool()
    cases = [
        ("lengths", torch.tensor([4, 3]), (torch.tensor([9, 2]), torch.tensor([-1, 2]))),
        ("mask", full, (gap,)),
    ]
    for name, right, wrong in cases:
        model = Model(name)
        if way == "compile":
            torch._dynamo.reset()
            compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        else:
            compiled = torch.export.export(model, (x, right)).module()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, right), model(x, right))
            for given in wrong:
                with pytest.raises(RuntimeError, match=r"expected (lengths from 0|mask to be true)"):
                    compiled(x, given)
