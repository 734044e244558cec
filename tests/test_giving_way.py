"""Calls that are torch's: with subclasses of Tensor and proxies of torch.fx, and under torch.jit.trace.

There our layers do what torch.nn's do: the same functions are seen, with the same results. What stays ours while others
look on is here too: operations counted, and methods that torch.nn's layers have.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import nlpkernels
from nlpkernels import functional

RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {"num_layers": 2}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu", "bidirectional": True, "bias": False}),
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "lstm_projected": ("LSTM", {"proj_size": 3, "batch_first": True}),
    "gru": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_cell": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm_cell": ("LSTMCell", {}),
    "gru_cell": ("GRUCell", {"bias": False}),
}
KINDS = {**RECURRENT, **CELLS}
FORMS = [(kind, form) for kind in RECURRENT for form in ("batch", "states", "packed", "unbatched")]
FORMS += [(kind, form) for kind in CELLS for form in ("batch", "states", "unbatched")]
BAGS = ["sum", "mean", "max"]


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """The same layer of torch.nn and of ours."""
    name, options = KINDS[kind]
    theirs = getattr(nn, name)(4, 5, **options)
    ours = getattr(nlpkernels, name)(4, 5, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def bags(mode: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    theirs = nn.Embedding(9, 4, **options) if mode == "embedding" else nn.EmbeddingBag(9, 4, mode=mode, **options)
    ours = nlpkernels.Embedding(9, 4) if mode == "embedding" else nlpkernels.EmbeddingBag(9, 4, mode=mode)
    for name, value in vars(theirs).items():
        setattr(ours, name, value)
    return theirs, ours


def arguments(kind: str, form: str, steps: int = 6, batch: int = 3) -> tuple[Any, ...]:
    """Input, and states where the form has them."""
    theirs, _ = pair(kind)
    if kind in CELLS:
        x = torch.randn(4) if form == "unbatched" else torch.randn(batch, 4)
        states = theirs(x)
    else:
        sizes = (batch, steps) if theirs.batch_first else (steps, batch)
        x = torch.randn(steps, 4) if form == "unbatched" else torch.randn(*sizes, 4)
        if form == "packed":
            lengths = [max(steps - 2 * i, 1) for i in range(batch)][::-1]
            x = pack_padded_sequence(x, lengths, batch_first=theirs.batch_first, enforce_sorted=False)
        _, states = theirs(x)
    return (x,) if form == "batch" else (x, pytree.tree_map(torch.randn_like, states))


def tensors(results: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


class Tagged(Tensor):
    """Stays what it is, and keeps a list of the functions that see it, but for reads of attributes."""

    seen: list[Any] = []  # noqa: RUF012 -- of the class

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ != "__get__":
            cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    Tagged.seen = []


def tagged(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.as_subclass(Tagged), value)


def same_for_subclass(theirs: nn.Module, ours: nn.Module, args: tuple[Any, ...]) -> None:
    runs = []
    for layer in (theirs, ours):
        Tagged.seen = []
        outputs = layer(*args)
        runs.append((outputs, Tagged.seen))
    (expected, seen_theirs), (got, seen_ours) = runs
    assert seen_theirs
    assert seen_ours == seen_theirs
    assert type(got) is type(expected)
    assert len(tensors(got)) == len(tensors(expected))
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert type(one) is type(other)
        assert torch.equal(one.as_subclass(Tensor), other.as_subclass(Tensor))


@pytest.mark.parametrize("place", ["input", "states", "one state", "parameters", "one parameter"])
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_subclasses(kind: str, form: str, place: str) -> None:
    theirs, ours = pair(kind)
    x, *states = arguments(kind, form)
    if place.endswith(("state", "states")) and not states:
        pytest.skip("it has no states")
    if place == "input":
        x = PackedSequence(tagged(x.data), *x[1:]) if isinstance(x, PackedSequence) else tagged(x)
    elif place == "states":
        states = tagged(states)
    elif place == "one state":
        states = [(states[0][0], tagged(states[0][1])) if isinstance(states[0], tuple) else tagged(states[0])]
    else:
        names = [name for name, _ in theirs.named_parameters()]
        for name in names if place == "parameters" else names[1:2]:
            parameter = nn.Parameter(tagged(getattr(theirs, name).detach()))
            for layer in (theirs, ours):
                setattr(layer, name, parameter)
    same_for_subclass(theirs, ours, (x, *states))


@pytest.mark.parametrize("place", ["input", "table", "offsets", "per_sample_weights"])
@pytest.mark.parametrize("mode", ["embedding", *BAGS])
def test_subclasses_of_embeddings(mode: str, place: str) -> None:
    theirs, ours = bags(mode, padding_idx=2)
    ids = torch.randint(9, (6,))
    args: dict[str, Any] = {"input": ids}
    if mode != "embedding":
        args["offsets"] = torch.tensor([0, 2, 5])
    if mode == "sum":
        args["per_sample_weights"] = torch.rand(6)
    if place == "table":
        theirs.weight = ours.weight = nn.Parameter(tagged(theirs.weight.detach()))
    elif place in args:
        args[place] = tagged(args[place])
    else:
        pytest.skip("it has none")
    same_for_subclass(theirs, ours, tuple(args.values()))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_subclasses_in_functions(cell: str, packed: bool, place: int) -> None:
    """Theirs is torch.lstm and the like."""
    name = {"rnn_tanh": "RNN", "rnn_relu": "RNN"}.get(cell, cell.upper())
    params = [p.detach() for p in getattr(nn, name)(4, 5, 2, bidirectional=True).parameters()]
    x = pack_padded_sequence(torch.randn(6, 3, 4), torch.tensor([6, 3, 1])) if packed else torch.randn(6, 3, 4)
    h = torch.randn(4, 3, 5)
    given = [x.data if packed else x, (h, torch.randn(4, 3, 5)) if cell == "lstm" else h, params]
    given[place] = tagged(given[place])
    options = (True, 2, 0.0, False, True)
    runs = []
    for library in (torch, functional):
        Tagged.seen = []
        call = getattr(library, cell)
        if not packed:
            outputs = call(*given, *options, False)
        elif library is torch:
            outputs = call(given[0], x.batch_sizes, *given[1:], *options)
        else:
            outputs = call(*given, *options, batch_sizes=x.batch_sizes)
        runs.append((outputs, Tagged.seen))
    (expected, seen_theirs), (got, seen_ours) = runs
    assert seen_ours == seen_theirs == [getattr(torch, cell)]
    for one, other in zip(got, expected, strict=True):
        assert type(one) is type(other) is Tagged
        assert torch.equal(one.as_subclass(Tensor), other.as_subclass(Tensor))


@pytest.mark.parametrize("option", ["lengths", "mask", "return_state_sequence", "recurrent_dropout"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_what_torch_has_not_is_refused(name: str, option: str) -> None:
    x = tagged(torch.randn(6, 3, 4))
    options = {
        "lengths": {"lengths": [6, 2, 1]},
        "mask": {"mask": torch.ones(6, 3, dtype=torch.bool)},
        "return_state_sequence": {"return_state_sequence": True},
    }.get(option, {})
    layer = getattr(nlpkernels, name)(4, 5, recurrent_dropout=0.5 if option == "recurrent_dropout" else 0.0)
    with pytest.raises(NotImplementedError, match=f"{name}: torch has no {option}"):
        layer(x, **options)
    assert type(layer.eval()(x)[0]) is Tagged
    if option in ("return_state_sequence", "recurrent_dropout"):
        cell = "rnn_tanh" if name == "RNN" else name.lower()
        h = torch.zeros(1, 3, 5)
        args = (x, (h, h) if name == "LSTM" else h, list(layer.parameters()), True, 1, 0.0, True, False)
        wanted = {option: True if option == "return_state_sequence" else 0.5}
        with pytest.raises(NotImplementedError, match=f"{cell}: torch has no {option}"):
            getattr(functional, cell)(*args, **wanted)
    bag = nlpkernels.EmbeddingBag(9, 4)
    with pytest.raises(NotImplementedError, match="per_sample_weights"):
        bag(tagged(torch.zeros(2, 3, dtype=torch.long)), per_sample_weights=torch.ones(2, 3))


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_complex_numbers(kind: str, form: str) -> None:
    """Of recurrent layers: torch's own, gradients too, and its error where it has none, which is for relu."""
    args = pytree.tree_map_only(Tensor, lambda t: t.cfloat() if t.is_floating_point() else t, arguments(kind, form))
    runs: list[Any] = []
    for layer in pair(kind):
        layer.to(torch.complex64)
        try:
            outputs = tensors(layer(*args))
        except NotImplementedError as error:
            runs.append([str(error)])
        else:
            loss = sum(output.abs().sum() for output in outputs)
            runs.append([*outputs, *torch.autograd.grad(loss, list(layer.parameters()))])
    for got, expected in zip(*runs, strict=True):
        assert torch.equal(got, expected) if isinstance(expected, Tensor) else got == expected


def test_complex_numbers_in_functions() -> None:
    layer, x = nlpkernels.GRU(4, 5, dtype=torch.complex64), torch.randn(6, 3, 4, dtype=torch.complex64)
    h, options = x.new_zeros(1, 3, 5), (True, 1, 0.0, False, False, False)
    got, expected = (library.gru(x, h, list(layer.parameters()), *options) for library in (functional, torch))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="GRU: torch has no lengths"):
        layer(x, lengths=[6, 2, 1])
    with pytest.raises(RuntimeError, match="floating dtype"):
        torch.ops.nlpkernels.recurrent(x, None, h, None, list(layer.parameters()), "gru", False, None)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_integers_are_refused(name: str) -> None:
    layer = getattr(nlpkernels, name)(4, 5)
    for x in (torch.ones(6, 3, 4, dtype=torch.long), torch.ones(3, 4, dtype=torch.int32)):
        with pytest.raises((RuntimeError, ValueError)):
            layer(x)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_nested_input_is_refused(name: str, layout: torch.layout) -> None:
    """torch.nn's layers do not take it either; what the message says instead is right."""
    sequences = [torch.randn(3, 4), torch.randn(5, 4)]
    nested = torch.nested.nested_tensor(sequences, layout=layout)
    is_cell = "Cell" in name
    layer = getattr(nlpkernels, name)(4, 5, **({} if is_cell else {"batch_first": True}))
    with pytest.raises(ValueError, match=f"{name}: expected no nested tensor"):
        layer(nested)
    if not is_cell and layout == torch.jagged:
        padded = torch.nested.to_padded_tensor(nested, 0.0)
        output, _ = layer(padded, lengths=nested.offsets().diff())
        for sequence, own in zip(sequences, output, strict=True):
            torch.testing.assert_close(own[: len(sequence)], layer(sequence)[0])


@pytest.mark.parametrize("form", ["batch", "unbatched", "packed"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_check_forward_args_of_a_subclass(name: str, form: str) -> None:
    """It is called where torch.nn's layers call it, with the same arguments, and what it raises is raised."""
    x, runs = torch.randn(6, 4) if form == "unbatched" else torch.randn(6, 3, 4), []
    given = pack_padded_sequence(x, [6, 2, 1]) if form == "packed" else x
    for library in (nn, nlpkernels):
        seen: list[Any] = []

        class Checked(getattr(library, name)):  # type: ignore[misc]
            def check_forward_args(self, *args: Any) -> None:
                seen.append(args)  # noqa: B023 -- of this round
                super().check_forward_args(*args)

        Checked(4, 5)(given)
        runs.append(seen)
    assert len(runs[1]) == len(runs[0])
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)
    if form != "packed":
        assert len(runs[1]) == 1

    class Refuses(getattr(nlpkernels, name)):  # type: ignore[misc]
        def check_forward_args(self, *args: Any) -> None:
            raise RuntimeError("not today")

    with pytest.raises(RuntimeError, match="not today"):
        Refuses(4, 5)(x)


def test_a_mere_name_is_no_dispatch() -> None:
    """A subclass of Parameter has torch's functions as they are: our kernels serve it."""

    class Marked(nn.Parameter):
        pass

    layer = nlpkernels.GRU(4, 5)
    layer.weight_hh_l0 = Marked(layer.weight_hh_l0.detach())
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(6, 3, 4))
    assert set(counter.get_flop_counts()["Global"]) == {torch.ops.nlpkernels.recurrent}


# --- torch.jit.trace and torch.fx ------------------------------------------------------------------------------------


class Packing(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(x, lengths, batch_first=self.layer.batch_first)
        output, states = self.layer(packed)
        return output.data, states


def traced(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """With torch's own check of the trace, whose warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and sizes are turned into numbers
        warnings.simplefilter("error", torch.jit.TracerWarning) if not isinstance(module, Packing) else None
        warnings.filterwarnings("ignore", "Converting a tensor to a Python", torch.jit.TracerWarning)
        return torch.jit.trace(module, args)


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_jit_trace(kind: str, form: str) -> None:
    """With its checker; then with other sizes."""
    theirs, ours = pair(kind)
    if form == "packed":
        theirs, ours = Packing(theirs), Packing(ours)
        args = [
            (arguments(kind, "batch", steps)[0], torch.tensor(lengths))
            for steps, lengths in ((6, [6, 3, 1]), (7, [7, 7, 2]))
        ]
    else:
        args = [arguments(kind, form, steps, batch) for steps, batch in ((6, 3), (9, 3), (2, 8))]
    trace = traced(ours, args[0])
    for given in args:
        torch.testing.assert_close(tensors(trace(*given)), tensors(theirs(*given)))
        torch.testing.assert_close(tensors(ours(*given)), tensors(theirs(*given)))


@pytest.mark.parametrize("mode", ["embedding", *BAGS])
def test_jit_trace_of_embeddings(mode: str) -> None:
    theirs, ours = bags(mode, padding_idx=2)
    trace = traced(ours, (torch.randint(9, (2, 3)),))
    for size in ((3, 2), (5, 7), (1, 1)):
        ids = torch.randint(9, size)
        torch.testing.assert_close(trace(ids), theirs(ids))
    if mode != "embedding":
        factors = (torch.rand(6),) if mode == "sum" else ()
        trace = traced(ours, (torch.randint(9, (6,)), torch.tensor([0, 4]), *factors))
        args = (torch.randint(9, (6,)), torch.tensor([0, 1, 3]), *factors)
        torch.testing.assert_close(trace(*args), theirs(*args))


def test_trace_of_what_torch_has_not() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nlpkernels.GRU(4, 5)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.layer(x, lengths=lengths)[0]

    with pytest.raises(NotImplementedError, match="GRU: torch has no lengths"):
        traced(Ragged(), (torch.randn(6, 3, 4), torch.tensor([6, 1, 2])))


class Model(nn.Module):
    """Embeddings, layers, one from the states of the other, and cells."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.bag = nn.Embedding(9, 4), nn.EmbeddingBag(9, 4)
        self.encoder, self.decoder = nn.LSTM(4, 5, batch_first=True), nn.LSTM(5, 5, batch_first=True)
        self.layers = nn.ModuleList([nn.GRU(5, 4, bidirectional=True), nn.RNN(8, 4)])
        self.cells = nn.ModuleList([nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)])

    def forward(self, ids: Tensor) -> Tensor:
        y, states = self.encoder(self.embedding(ids))
        y, _ = self.decoder(y, states)
        for layer in self.layers:
            y = layer(y)[0]
        h, c = self.cells[0](y[:, 0], (self.bag(ids), self.bag(ids)))
        return self.cells[2](self.cells[1](c, h))


def test_symbolic_trace() -> None:
    """The graph is that of torch.nn's layers, and its nodes call ours."""
    model = Model()
    ids = torch.randint(9, (4, 4))
    expected = model(ids)
    theirs = torch.fx.symbolic_trace(model)
    nlpkernels.convert(model)
    ours = torch.fx.symbolic_trace(model)
    assert str(ours.graph) == str(theirs.graph)
    assert sum(node.op == "call_module" for node in ours.graph.nodes) == 10
    assert type(ours.encoder) is nlpkernels.LSTM
    torch.testing.assert_close(ours(ids), expected)
    for graph in (theirs, ours):
        ShapeProp(graph).propagate(ids)
    metas = [
        pytree.tree_map(str, [node.meta.get("tensor_meta") for node in graph.graph.nodes]) for graph in (theirs, ours)
    ]
    assert metas[0] == metas[1]


def test_symbolic_trace_of_options() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nlpkernels.LSTM(4, 5, recurrent_dropout=0.5)

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            return self.layer(x, lengths=lengths, return_state_sequence=True)

    model = Ragged().eval()
    args = torch.randn(6, 3, 4), torch.tensor([6, 1, 2])
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(*args), model(*args))


def test_proxies_of_what_changes_a_graph() -> None:
    """There torch.nn's layers are no nodes either: their functions are."""
    graphs = []
    for layer in bags("embedding"):
        graph = torch.fx.symbolic_trace(nn.Identity()).graph
        (given, output) = graph.nodes
        with graph.inserting_before(output):
            proxy = torch.fx.Proxy(given, torch.fx.proxy.GraphAppendingTracer(graph))
            output.args = (layer(proxy).node,)
        graphs.append([node.target for node in graph.nodes])
        assert torch.nn.functional.embedding in graphs[-1]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("mode", ["embedding", *BAGS])
def test_symbolic_trace_of_an_embedding_itself(mode: str) -> None:
    theirs, ours = bags(mode)
    ids = torch.randint(9, (2, 3))
    if mode == "embedding":
        graphs = [torch.fx.symbolic_trace(layer) for layer in (theirs, ours)]
        assert len(graphs[0].graph.nodes) == len(graphs[1].graph.nodes)
        torch.testing.assert_close(graphs[1](ids), theirs(ids))
    else:  # torch.nn's asks for the dimensions of its input first
        for layer in (theirs, ours):
            graph = torch.fx.symbolic_trace(layer, concrete_args={"offsets": None, "per_sample_weights": None})
            torch.testing.assert_close(graph(ids), theirs(ids))


# --- Others that look on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Embedding", "RNN", "GRU"])
def test_per_sample_gradients(name: str) -> None:
    """torch.nn's own LSTM has none of these on the CPU (torch 2.13)."""
    options = {} if name == "Embedding" else {"batch_first": True, "num_layers": 2}
    theirs, ours = (getattr(library, name)(9, 5, **options) for library in (nn, nlpkernels))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randint(9, (3, 4)) if name == "Embedding" else torch.randn(3, 4, 9)
    for layer in (theirs, ours):
        output = tensors(call_for_per_sample_grads(layer, batch_size=3)(x))[0]
        output.sin().sum().backward()
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad_sample, expected.grad_sample)
        del got.grad_sample
    before = tensors(theirs(x))
    torch.testing.assert_close(tensors(ours(x)), before)


def count(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("form", ["states", "packed"])
@pytest.mark.parametrize("kind", ["rnn", "rnn_relu", "gru", "rnn_cell", "lstm_cell", "gru_cell"])
def test_operations_are_counted(kind: str, form: str) -> None:
    """As torch counts those of its own layers, where these consist of products. (Its LSTM on the CPU counts none.)"""
    theirs, ours = pair(kind)
    if kind in CELLS and form == "packed":
        pytest.skip("cells take no packed sequences")
    x, hx = arguments(kind, form)
    for tensor in tensors((x, hx)):
        if tensor.is_floating_point():
            tensor.requires_grad_()
    counts = []
    for layer in (theirs, ours):
        forward = count(lambda layer=layer: layer(x, hx))
        loss = sum(output.sum() for output in tensors(layer(x, hx)) if output.requires_grad)
        counts.append((forward, count(loss.backward)))
    assert counts[0][0] > 0
    assert counts[1] == counts[0]


@pytest.mark.parametrize("projected", [False, True])
def test_operations_of_an_lstm_are_counted(projected: bool) -> None:
    steps, batch, inputs, hidden, features = 6, 3, 4, 5, 3 if projected else 5
    layer = nlpkernels.LSTM(inputs, hidden, proj_size=3 if projected else 0, bidirectional=True)
    x = torch.randn(steps, batch, inputs)
    of_x = 4 * hidden * inputs
    of_h = 4 * hidden * features + (hidden * features if projected else 0)
    once = 2 * steps * batch * 2  # two directions
    assert count(lambda: layer(x)) == once * (of_x + of_h)
    outputs = layer(x)[0].sum()
    assert count(outputs.backward) == once * (of_x + 2 * of_h)  # no gradient of x
    outputs = layer(x.requires_grad_())[0].sum()
    assert count(outputs.backward) == once * 2 * (of_x + of_h)
    _, (_, c) = layer(x, return_state_sequence=True)
    assert count(c.sum().backward) == once * 3 * (of_x + of_h)
    bag = nlpkernels.EmbeddingBag(9, 4)
    assert count(lambda: bag(torch.zeros(2, 3, dtype=torch.long)).sum().backward()) == 0


def test_gradients_of_all_states_while_others_look_on() -> None:
    """Inside of a mode's __torch_dispatch__ torch excludes what its transforms, and so those gradients, are made of."""
    layer = nlpkernels.LSTM(4, 5)
    x = torch.randn(6, 3, 4, requires_grad=True)
    _, (h, c) = layer(x, return_state_sequence=True)
    loss = h.sin().sum() + c.sin().sum()
    expected = torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True)
    with FlopCounterMode(display=False):
        got = torch.autograd.grad(loss, [x, *layer.parameters()])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", list(RECURRENT))
def test_methods_of_layers(kind: str) -> None:
    """All that torch.nn's layers have, with the same results."""
    theirs, ours = pair(kind)
    missing = {name for name in dir(theirs) if not hasattr(ours, name)}
    assert not missing
    x, hx = arguments(kind, "states")
    order = torch.tensor([2, 0, 1])
    results = []
    for layer in (theirs, ours):
        h = hx[0] if isinstance(hx, tuple) else hx
        sizes = layer.get_expected_hidden_size(x, None)
        layer.check_input(x, None)
        layer.check_hidden_size(h, sizes)
        layer.check_forward_args(x, hx, None)
        with pytest.raises(RuntimeError, match="Expected hidden") as error:
            layer.check_forward_args(x[:, :1] if not layer.batch_first else x[:1], hx, None)
        cell = layer.get_expected_cell_size(x, None) if "lstm" in kind else None
        results.append((sizes, cell, str(error.value), tensors(layer.permute_hidden(hx, order))))
    assert results[0][:3] == results[1][:3]
    torch.testing.assert_close(results[1][3], results[0][3], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell", "Embedding", "EmbeddingBag"])
def test_instances(name: str) -> None:
    """Of torch.nn's classes, but for RNN, LSTM and GRU, on which torch.compile breaks the graph."""
    assert isinstance(getattr(nlpkernels, name)(4, 5), getattr(nn, name))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_mask(name: str, batch_first: bool) -> None:
    """Another form of lengths."""
    layer = getattr(nlpkernels, name)(4, 5, 2, batch_first=batch_first, bidirectional=True)
    lengths = torch.tensor([4, 0, 7])
    mask = torch.arange(7) < lengths.unsqueeze(1)  # [B, T]
    x = torch.randn(3, 7, 4)
    if not batch_first:
        mask, x = mask.t(), x.transpose(0, 1)
    for options in ({}, {"return_state_sequence": True}):
        expected = tensors(layer(x, lengths=lengths, **options))
        torch.testing.assert_close(tensors(layer(x, mask=mask, **options)), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="got both"):
        layer(x, mask=mask, lengths=lengths)
    with pytest.raises(ValueError, match=r"expected mask to be bool of shape"):
        layer(x, mask=mask.t())
    with pytest.raises(ValueError, match=r"expected mask to be bool of shape"):
        layer(x, mask=mask.int())
    with pytest.raises(ValueError, match=r"got steps after a gap"):
        layer(x, mask=mask.flip(1 if batch_first else 0))


# --- Tensor parallelism ----------------------------------------------------------------------------------------------


def worker() -> None:
    """A table in two halves, of rows or of columns, gives what it gives in one piece."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    torch.manual_seed(0)
    ids = torch.randint(8, (5,))
    for style in (RowwiseParallel, ColwiseParallel):
        whole, layer = nn.Embedding(8, 4), nlpkernels.Embedding(8, 4)
        layer.load_state_dict(whole.state_dict())
        parallel = parallelize_module(layer, mesh, style(input_layouts=Replicate(), output_layouts=Replicate()))
        assert isinstance(parallel.weight, DTensor)
        torch.testing.assert_close(parallel(ids), whole(ids), rtol=0, atol=0)
        whole(ids).sin().sum().backward()
        parallel(ids).sin().sum().backward()
        torch.testing.assert_close(parallel.weight.grad.full_tensor(), whole.weight.grad)
        compiled = torch.compile(nn.Sequential(parallel), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids), whole(ids), rtol=0, atol=0)
    if torch.distributed.get_rank() == 0:
        print("agrees")
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as in test_distributed.py


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("processes", [1, 2])
def test_tensor_parallel_embedding(processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
    root = str(Path(nlpkernels.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agrees" in done.stdout


if __name__ == "__main__":
    worker()
