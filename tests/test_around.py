"""The layers under what people put around them: parametrisations, functional_call, hooks, compile, export, vmap."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from test_recurrent import pair, tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import nlpkernels
from nlpkernels.functional import embedding, embedding_bag

pytestmark = pytest.mark.usefixtures("doubles")  # these tests are not about arithmetic

KINDS = ["rnn_tanh", "lstm_projected", "gru"]


def results(layer: nn.Module, x: Tensor, call: Callable[..., Any] | None = None) -> list[Tensor]:
    """All outputs, then the gradients of x and of all parameters; of call in the place of the layer."""
    outputs = tensors((call or layer)(x))
    return outputs + list(torch.autograd.grad(sum(o.sin().sum() for o in outputs), [x, *layer.parameters()]))


def same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    for got, expected in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(got, expected)


def an_input(device: str) -> Tensor:
    return torch.randn(4, 3, 6, device=device, requires_grad=True)


def weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer, "weight_hh_l0")


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer, "weight_hh_l0")


def spectral_norm(layer: nn.Module) -> None:
    torch.manual_seed(2)
    parametrizations.spectral_norm(layer.eval(), "weight_hh_l0")


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight_ih_l0", amount=0.5)


def tied(layer: nn.Module) -> None:
    layer.weight_hh_l1 = layer.weight_hh_l0


def reassigned(layer: nn.Module) -> None:
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)


@pytest.mark.parametrize("change", [weight_norm, old_weight_norm, spectral_norm, pruned, tied, reassigned])
@pytest.mark.parametrize("kind", KINDS)
def test_changed_weights(kind: str, change: Callable[[nn.Module], None], device: str) -> None:
    """Whatever stands in a weight's place is read at every call, also after a copy and a conversion."""
    x = an_input(device)
    theirs, ours = pair(kind, 6, 5, 2, device=device)
    change(theirs), change(ours)
    # torch.nn keeps a flat list of its own, which some of these leave stale: the oracle is given the weights outright.
    oracle, _ = pair(kind, 6, 5, 2, device=device)

    def expected() -> list[Tensor]:
        theirs(x.detach())  # for the hooks that make its weights
        weights = {name: getattr(theirs, name) for name, _ in oracle.named_parameters()}
        outputs = tensors(torch.func.functional_call(oracle, weights, (x,)))
        loss = sum(o.sin().sum() for o in outputs)
        return outputs + list(torch.autograd.grad(loss, [x, *theirs.parameters()]))

    for got, want in zip(results(ours, x), expected(), strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.mul_(1.5), parameter.mul_(1.5)
    for got, want in zip(results(ours, x), expected(), strict=True):
        torch.testing.assert_close(got, want)
    if change in (weight_norm, spectral_norm):  # their class is a subclass made at run time
        swaps = nlpkernels.revert(ours)
        assert not swaps.swapped
        assert "left alone, parametrized" in str(swaps)
        parametrize.remove_parametrizations(ours, "weight_hh_l0")
        assert nlpkernels.revert(ours).swapped
    elif change in (tied, reassigned):  # the others leave a tensor with a history, which torch does not copy
        torch.testing.assert_close(tensors(copy.deepcopy(ours)(x)), tensors(ours(x)), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_with_other_parameters(kind: str, device: str) -> None:
    theirs, ours = pair(kind, 6, 5, 2, device=device)
    x = an_input(device)
    other = {name: torch.randn_like(value) for name, value in ours.named_parameters()}
    for got, expected in zip(
        *(tensors(torch.func.functional_call(layer, other, (x,))) for layer in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(got, expected)
    same(ours, theirs, x)

    stacked, _ = torch.func.stack_module_state([pair(kind, 6, 5, 2, device=device)[1] for _ in range(3)])

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ours, parameters, (x,))[0]

    ensemble = torch.func.vmap(call, (0, None))(stacked, x.detach())
    for i in range(3):
        one = torch.func.functional_call(theirs, {name: value[i] for name, value in stacked.items()}, (x.detach(),))[0]
        torch.testing.assert_close(ensemble[i], one)


@pytest.mark.parametrize("kind", KINDS)
def test_fake_and_meta_tensors(kind: str, device: str) -> None:
    theirs, ours = pair(kind, 6, 5, 2, bidirectional=True, device=device)
    shapes = [tensor.shape for tensor in tensors(theirs(an_input(device)))]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert [t.shape for t in tensors(ours(torch.empty(4, 3, 6, device=device)))] == shapes
    assert [t.shape for t in tensors(ours.to("meta")(torch.empty(4, 3, 6, device="meta")))] == shapes
    ours.to_empty(device=device).load_state_dict(theirs.state_dict())
    same(ours, theirs, an_input(device))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensors", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint(kind: str, use_reentrant: bool, device: str) -> None:
    """What is computed again has the masks of the first time."""
    theirs, ours = pair(kind, 6, 5, 2, dropout=0.3, bidirectional=True, device=device)
    x = an_input(device)
    runs = []
    for layer, call in ((theirs, theirs), (ours, lambda x: checkpoint(ours, x, use_reentrant=use_reentrant))):
        x.grad = None
        torch.manual_seed(1)
        y = call(x)[0]
        y.sin().sum().backward()  # which is all that a reentrant checkpoint has
        runs.append([y, x.grad, *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(runs[1], runs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_replicas_and_memory(kind: str, device: str) -> None:
    theirs, ours = pair(kind, 6, 5, 2, dropout=0.3, device=device)
    ours.flatten_parameters()
    if device == "cpu":
        ours.share_memory()
        assert all(parameter.is_shared() for parameter in ours.parameters())
    x = an_input(device)
    calls: list[str] = []
    ours.register_forward_pre_hook(lambda *_: calls.append("before"))
    ours.register_forward_hook(lambda *_: calls.append("after"))
    ours.register_full_backward_hook(lambda *_: calls.append("backward"))
    ours.weight_hh_l0.register_hook(lambda grad: calls.append("gradient"))
    ours(x)[0].sum().backward()
    assert sorted(calls) == ["after", "backward", "before", "gradient"]

    # What nn.DataParallel makes of a module: a copy whose parameters are plain tensors, set as attributes.
    replica = theirs.eval(), ours.eval()._replicate_for_data_parallel()
    for name, parameter in ours.named_parameters():
        setattr(replica[1], name, parameter.clone())
    torch.testing.assert_close(tensors(replica[1](x)), tensors(theirs(x)))


# --- torch.compile and torch.export ----------------------------------------------------------------------------------


@pytest.fixture
def one_graph() -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    """Compiles a layer to one graph, which must do for all later calls."""
    torch._dynamo.reset()

    def compiled(layer: nn.Module) -> Callable[..., Any]:
        function = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        stances = iter(["default"])

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.compiler.set_stance(next(stances, "fail_on_recompile")):
                return function(*args, **kwargs)

        return call

    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_all_sizes(kind: str, training: bool, one_graph: Any, device: str) -> None:
    theirs, ours = pair(kind, 6, 5, 2, bidirectional=True, device=device)
    compiled = one_graph(ours)
    for steps, batch in [(4, 3), (9, 3), (9, 8), (2, 5), (30, 7)]:
        x = torch.randn(steps, batch, 6, device=device, requires_grad=training)
        with torch.set_grad_enabled(training):
            got = results(ours, x, compiled) if training else tensors(compiled(x))
            expected = results(theirs, x) if training else tensors(theirs(x))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("given", ["sorted", "unsorted", "states"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_packed_sequences(kind: str, given: str, one_graph: Any, device: str) -> None:
    theirs, ours = pair(kind, 6, 5, 2, bidirectional=True, device=device)
    compiled = one_graph(ours)
    for lengths in ([8, 3, 2, 2, 2, 1, 1], [7, 7, 4], [9, 4, 4, 3, 2], [6, 5]):
        x = torch.randn(lengths[0], len(lengths), 6, device=device)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=given != "unsorted")
        data = packed.data.detach().requires_grad_()
        packed = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        hx = None
        if given == "states":
            hx = tuple(torch.randn_like(state) for state in tensors(theirs(packed))[1:])
            hx = hx if len(hx) > 1 else hx[0]
        runs = []
        for layer in (compiled, theirs):
            outputs = tensors(layer(packed, hx))
            loss = sum(output.sin().sum() for output in outputs)
            parameters = (theirs if layer is theirs else ours).parameters()
            runs.append(outputs + list(torch.autograd.grad(loss, [data, *parameters])))
        torch.testing.assert_close(runs[0], runs[1])


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_lengths_and_states(kind: str, one_graph: Any, device: str) -> None:
    """How many rows are real is data, which torch.compile traces with fullgraph=True; without, it breaks the graph."""
    _, ours = pair(kind, 6, 5, 2, bidirectional=True, device=device)
    in_one = one_graph(ours)
    in_parts = torch.compile(ours, dynamic=True, backend="aot_eager")
    for lengths in ([5, 3, 2], [0, 4, 7], [9, 4, 0, 3, 2]):
        x = torch.randn(10, len(lengths), 6, device=device, requires_grad=True)
        runs = []
        for layer in (ours, in_one, in_parts):
            outputs = tensors(layer(x, lengths=torch.tensor(lengths), return_state_sequence=True))
            loss = sum(output.sin().sum() for output in outputs)
            runs.append(outputs + list(torch.autograd.grad(loss, [x, *ours.parameters()])))
        torch.testing.assert_close(runs[1], runs[0])
        torch.testing.assert_close(runs[2], runs[0])


def test_compiled_by_inductor(device: str) -> None:
    """The default backend, once, around layers of all kinds."""
    model = nn.Sequential(nlpkernels.EmbeddingBag(10, 6), nn.Tanh())
    theirs, ours = pair("lstm", 6, 5, device=device)
    model.to(device)
    ids = torch.randint(10, (4 * 3, 5), device=device)

    def run(layer: nn.Module) -> Tensor:
        return layer(model(ids).reshape(4, 3, 6))[0].sin().sum()

    torch._dynamo.reset()
    expected = torch.autograd.grad(run(theirs), [*theirs.parameters(), *model.parameters()])
    got = torch.autograd.grad(torch.compile(run, fullgraph=True)(ours), [*ours.parameters(), *model.parameters()])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_export_with_dynamic_batch_and_length(kind: str, device: str) -> None:
    theirs, ours = pair(kind, 6, 5, 2, bidirectional=True, device=device)
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    program = torch.export.export(ours, (torch.randn(4, 3, 6, device=device),), dynamic_shapes=({0: steps, 1: batch},))
    calls = [node for node in program.graph.nodes if "nlpkernels.recurrent" in str(node.target)]
    assert len(calls) == 2  # one for each layer, none for a step
    for steps, batch in [(7, 2), (2, 9)]:
        x = torch.randn(steps, batch, 6, device=device)
        torch.testing.assert_close(tensors(program.module()(x)), tensors(theirs(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_export_with_lengths(kind: str, device: str) -> None:
    _, ours = pair(kind, 6, 5, 2, bidirectional=True, device=device)
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    example = (torch.randn(4, 3, 6, device=device),), {"lengths": torch.tensor([4, 2, 0])}
    shapes = {"input": {0: steps, 1: batch}, "lengths": {0: batch}}
    program = torch.export.export(ours, *example, dynamic_shapes=shapes)
    for lengths in (torch.tensor([3, 7]), torch.tensor([0, 5, 1, 7, 7])):
        x = torch.randn(7, len(lengths), 6, device=device)
        torch.testing.assert_close(tensors(program.module()(x, lengths=lengths)), tensors(ours(x, lengths=lengths)))


def check_traced(theirs: nn.Module, ours: nn.Module, make: Callable[[int], Tensor], one_graph: Any) -> None:
    """One graph and one program for all batch sizes, fake and meta tensors; `make` makes an input of a batch size."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(ours, (make(3),), dynamic_shapes=({0: batch},))
    compiled = one_graph(ours)
    for size in (4, 9, 2):
        x = make(size)
        expected = tensors(theirs(x))
        torch.testing.assert_close(tensors(program.module()(x)), expected)
        got = tensors(compiled(x))
        torch.testing.assert_close(got, expected)
        gradients = [
            torch.autograd.grad(sum(output.sin().sum() for output in outputs), list(layer.parameters()))
            for layer, outputs in ((ours, got), (theirs, expected))
        ]
        torch.testing.assert_close(*gradients)
    shapes = [tensor.shape for tensor in expected]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert [tensor.shape for tensor in tensors(ours(mode.from_tensor(x)))] == shapes
    assert [tensor.shape for tensor in tensors(ours.to("meta")(x.to("meta")))] == shapes


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_traced_cells(name: str, one_graph: Any, device: str) -> None:
    theirs, ours = (getattr(library, name)(6, 5, device=device) for library in (nn, nlpkernels))
    ours.load_state_dict(theirs.state_dict())
    check_traced(theirs, ours, lambda size: torch.randn(size, 6, device=device), one_graph)


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_traced_embeddings(name: str, one_graph: Any, device: str) -> None:
    theirs, ours = (getattr(library, name)(10, 6, device=device) for library in (nn, nlpkernels))
    ours.load_state_dict(theirs.state_dict())
    check_traced(theirs, ours, lambda size: torch.randint(10, (size, 7), device=device), one_graph)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_function_transforms_of_cells(name: str, device: str) -> None:
    theirs, ours = (getattr(library, name)(4, 3, device=device) for library in (nn, nlpkernels))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, device=device)

    def loss(cell: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: sum(state.sin().sum() for state in tensors(cell(x)))

    expected = torch.autograd.functional.hessian(loss(theirs), x)
    torch.testing.assert_close(torch.func.hessian(loss(ours))(x), expected)
    _, tangent = torch.func.jvp(loss(ours), (x,), (x,))
    torch.testing.assert_close(tangent, (torch.func.grad(loss(theirs))(x) * x).sum())
    many = torch.randn(5, 2, 4, device=device)
    per_sample = torch.func.vmap(torch.func.grad(loss(ours)))(many)
    torch.testing.assert_close(per_sample, torch.stack([torch.func.grad(loss(theirs))(one) for one in many]))


# --- Transforms together with torch.compile, torch.export and graphs that are there before ---------------------------

Function = Callable[[Tensor], Tensor]
TRACED = ["embedding", "max", "LSTMCell", "GRU"]  # which takes its time
TRANSFORMED = [*TRACED, "mean", "RNNCell", "GRUCell", "LSTM"]


def to_transform(kind: str) -> tuple[Function, Function, Tensor]:
    """What torch.nn computes and what we do, as functions of one tensor, and such a tensor."""
    torch._dynamo.reset()
    if hasattr(nn, kind):
        sizes = (3, 4) if kind.endswith("Cell") else (3, 4, 2)
        theirs, ours = getattr(nn, kind)(*sizes), getattr(nlpkernels, kind)(*sizes)
        ours.load_state_dict(theirs.state_dict())
        theirs.requires_grad_(False), ours.requires_grad_(False)
        x = torch.randn(2, 3) if kind.endswith("Cell") else torch.randn(5, 2, 3)
        return lambda x: tensors(theirs(x))[-1], lambda x: tensors(ours(x))[-1], x
    ids, table = torch.tensor([[1, 2, 2], [3, 0, 4]]), torch.randn(5, 3)
    if kind == "embedding":
        return (*(lambda w, f=f: f(ids, w, padding_idx=2) for f in (nn.functional.embedding, embedding)), table)
    # torch's bags have no forward mode. No row is padding in the oracle, but the second bag's first.
    pool = {"mean": lambda rows: rows.mean(0), "max": lambda rows: rows.amax(0)}[kind]
    return (
        lambda w: torch.stack([pool(w[ids[0]]), pool(w[ids[1, 1:]])]),
        lambda w: embedding_bag(ids, w, mode=kind, padding_idx=3),
        table,
    )


def tangent(function: Function) -> Function:
    return lambda x: torch.func.jvp(function, (x,), (x.cos(),))[1]


def dual(function: Function, x: Tensor, along: Tensor | None = None) -> Tensor:
    with fwAD.dual_level():
        result = fwAD.unpack_dual(function(fwAD.make_dual(x, x.cos() if along is None else along))).tangent
    assert result is not None
    return result


def loss(function: Function) -> Function:
    return lambda x: function(x).sin().sum()


def by_hand(function: Function) -> Function:
    """torch.vmap, which torch.nn's recurrent layers do not take."""
    return lambda xs: torch.stack([function(x) for x in xs])


def two(x: Tensor) -> Tensor:
    return torch.stack([x, x.cos()])


TRANSFORMS: dict[str, Callable[..., Function]] = {  # of a function, and of what maps one over examples
    "jvp": lambda f, each: tangent(f),
    "jacfwd": lambda f, each: torch.func.jacfwd(f),
    "grad": lambda f, each: torch.func.grad(loss(f)),
    "hessian": lambda f, each: torch.func.hessian(loss(f)),
    "vmap": lambda f, each: lambda x: each(f)(two(x)),
    "grad_of_each": lambda f, each: lambda x: each(torch.func.grad(loss(f)))(two(x)),
    "grad_of_vmap": lambda f, each: torch.func.grad(lambda x: each(f)(two(x)).sin().sum()),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", TRACED)
def test_transforms_in_compiled_code(kind: str, transform: str, backend: str) -> None:
    theirs, ours, x = to_transform(kind)
    of = TRANSFORMS[transform]
    compiled = torch.compile(of(ours, torch.vmap), backend=backend, fullgraph=transform != "hessian")
    torch.testing.assert_close(compiled(x), of(theirs, by_hand)(x))


def test_examples_in_compiled_code() -> None:
    """Indices in a batch, as for the gradients of single examples."""
    ids, table = torch.tensor([[1, 2, 2], [3, 0, 4]]), torch.randn(5, 3)

    def each(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.vmap(torch.func.grad(lambda w, i: function(i, w, padding_idx=2).sin().sum()), (None, 0))

    expected = each(nn.functional.embedding)(table, ids)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        got = torch.compile(each(embedding), backend=backend, fullgraph=True)(table, ids)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_forward_mode_goes_through_compiled_code(kind: str) -> None:
    theirs, ours, x = to_transform(kind)
    expected = dual(theirs, x)
    torch.testing.assert_close(dual(torch.compile(ours, backend="aot_eager"), x), expected)
    torch.testing.assert_close(tangent(torch.compile(ours, backend="aot_eager"))(x), expected)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", TRANSFORMED)
def test_forward_mode_over_backward_of_a_graph(kind: str, create_graph: bool) -> None:
    """The graph was made before there was anything to carry along: backward is linear in what it is given."""
    theirs, ours, x = to_transform(kind)
    results = []
    for function in (theirs, ours):
        given = x.clone().requires_grad_()
        y = function(given)
        pull = partial(torch.autograd.grad, y, given, retain_graph=True, create_graph=create_graph)
        c, along = torch.ones_like(y), y.detach().cos()
        results.append([
            pull(along)[0],
            dual(lambda c, pull=pull: pull(c)[0], c, along),
            torch.func.jvp(lambda c, pull=pull: pull(c)[0], (c,), (along,))[1],
            torch.func.grad(lambda c, y=y, x=given: torch.autograd.grad(y, x, c, create_graph=True)[0].sin().sum())(c),
        ])  # fmt: skip
    assert results[1][0].abs().max() > 0
    torch.testing.assert_close(results[1], results[0])


IS_2_10 = torch.__version__ < (2, 11)
EXPORTED_SINCE_2_11 = pytest.mark.skipif(IS_2_10, reason="torch 2.10 exports no forward mode, of torch.nn neither")


@pytest.mark.parametrize("transform", [pytest.param("jvp", marks=EXPORTED_SINCE_2_11), "vmap"])
@pytest.mark.parametrize("kind", ["embedding", "GRUCell"])
def test_export_of_transforms(kind: str, transform: str) -> None:
    theirs, ours, x = to_transform(kind)

    class Transformed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return TRANSFORMS[transform](ours, torch.vmap)(x)

    program = torch.export.export(Transformed(), (x,), strict=False)
    torch.testing.assert_close(program.module()(x), TRANSFORMS[transform](theirs, by_hand)(x))
    torch.testing.assert_close(tangent(ours)(x), tangent(theirs)(x))  # forward mode is what it was


@pytest.mark.parametrize("kind", TRACED)
def test_traced_forward_mode(kind: str) -> None:
    """By make_fx, with any kind of tensor, for torch.func.functionalize and torch.func.linearize."""
    theirs, ours, x = to_transform(kind)
    expected = tangent(theirs)(x)
    for mode in ("real", "fake", "symbolic"):
        if mode == "symbolic" and kind == "embedding" and IS_2_10:
            continue  # which ends in an assertion of torch's own
        graph = make_fx(tangent(ours), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        torch.testing.assert_close(graph(x), expected)
    torch.testing.assert_close(make_fx(torch.func.functionalize(tangent(ours)))(x)(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, about its own graph
        torch.testing.assert_close(torch.func.linearize(ours, x)[1](x.cos()), expected)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_traced_indices_are_checked_when_they_run(mode: str) -> None:
    table = torch.randn(5, 3)
    traced = make_fx(lambda w, i: tangent(lambda w: embedding(i, w))(w), tracing_mode=mode)(table, torch.tensor([1, 2]))
    torch.testing.assert_close(traced(table, torch.tensor([4, 0])), table[[4, 0]].cos())
    for wrong in (-1, 5):
        with pytest.raises(IndexError):
            traced(table, torch.tensor([1, wrong]))
        with pytest.raises(IndexError, match=rf"indices\[1\] is {wrong}, expected a row from 0 to 4"):
            make_fx(tangent(lambda w, wrong=wrong: embedding(torch.tensor([1, wrong]), w)))(table)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_traced_weighted_bags(mode: str) -> None:
    torch._dynamo.reset()
    layer, ids, factors = nlpkernels.EmbeddingBag(7, 5, mode=mode), torch.randint(7, (3, 4)), torch.rand(3, 4)
    expected = layer(ids, per_sample_weights=factors)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, per_sample_weights=factors), expected)
    program = torch.export.export(layer, (ids,), {"per_sample_weights": factors}, strict=True)
    torch.testing.assert_close(program.module()(ids, per_sample_weights=factors), expected)


@pytest.mark.usefixtures("without_cudnn")
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_penalty(kind: str, device: str) -> None:
    """A loss on the norm of the input's gradient (Gulrajani et al. 2017), in training and in eval mode."""
    theirs, ours = pair(kind, 6, 5, 2, bidirectional=True, device=device)
    x = an_input(device)
    runs = []
    for layer in (ours.eval(), theirs.train()):
        (dx,) = torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)
        penalty = (dx.norm(2, dim=-1) - 1).square().sum()
        runs.append(torch.autograd.grad(penalty, [x, *layer.parameters()], allow_unused=True))
    for got, expected in zip(*runs, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected)


def small(layer: nn.Module) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer of ours, torch.nn's with the same parameters, and an input for both, float64."""
    theirs = copy.deepcopy(layer)
    nlpkernels.revert(theirs)
    return layer, theirs, torch.randn((2, 3) if isinstance(layer, nn.RNNCellBase) else (4, 2, 3))


RECURRENT = [
    nlpkernels.RNN,
    nlpkernels.LSTM,
    nlpkernels.GRU,
    nlpkernels.RNNCell,
    nlpkernels.LSTMCell,
    nlpkernels.GRUCell,
]


def first_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("kind", RECURRENT)
def test_autocast_leaves_float64(kind: type[nn.Module], doubles: None) -> None:
    ours, theirs, x = small(kind(3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = first_of(ours(x)), first_of(theirs(x))
    assert got.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", RECURRENT)
def test_forward_mode_of_forward_mode(kind: type[nn.Module], doubles: None) -> None:
    """torch.func takes the second derivative of any autograd.Function for nought here."""
    ours, theirs, x = small(kind(3, 4))

    def along(layer: nn.Module) -> Tensor:
        def slope(x: Tensor) -> Tensor:
            return torch.func.jvp(lambda x: first_of(layer(x)), (x,), (torch.ones_like(x),))[1]

        return torch.func.jvp(slope, (x,), (torch.ones_like(x),))[1]

    got = along(ours)
    assert got.abs().max() > 0
    torch.testing.assert_close(got, along(theirs))
    torch.testing.assert_close(
        torch.func.jacfwd(torch.func.jacfwd(lambda x: first_of(ours(x)).sum()))(x),
        torch.func.jacrev(torch.func.jacrev(lambda x: first_of(ours(x)).sum()))(x),
    )


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_gradients_of_many_outputs_at_once(kind: type[nn.Module], create_graph: bool, doubles: None) -> None:
    ours, theirs, x = small(kind(3, 4))
    x.requires_grad_()
    gradients = []
    for layer in (ours, theirs):
        y = first_of(layer(x))
        torch.manual_seed(1)
        inputs = (x, *layer.parameters())
        gradients.append(
            torch.autograd.grad(y, inputs, torch.randn(5, *y.shape), is_grads_batched=True, create_graph=create_graph)
        )
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(lambda x: first_of(ours(x)), x, vectorize=True),
        torch.autograd.functional.jacobian(lambda x: first_of(ours(x)), x),
    )


@pytest.mark.parametrize("kind", RECURRENT)
def test_inputs_made_in_inference_mode(kind: type[nn.Module], doubles: None) -> None:
    ours, theirs, x = small(kind(3, 4))
    with torch.inference_mode():
        features = x.clone()
    first_of(ours(features)).square().sum().backward()
    first_of(theirs(x)).square().sum().backward()
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_weighted_maxima_of_no_bags() -> None:
    """Indices that are in no bag, of rows that hold NaN."""
    factors = torch.ones(1, requires_grad=True)
    ids, table, no_offsets = torch.tensor([0]), torch.full((1, 2), torch.nan), torch.empty(0, dtype=torch.long)
    pooled = nlpkernels.functional.embedding_bag(ids, table, no_offsets, mode="max", per_sample_weights=factors)
    assert pooled.shape == (0, 2)
    pooled.sum().backward()
    assert factors.grad is not None
    assert factors.grad.tolist() == [0]


def test_states_of_cells_are_detached_in_place(doubles: None) -> None:
    """As truncated backpropagation does."""
    for cell in (nlpkernels.LSTMCell(3, 4), torch.nn.LSTMCell(3, 4)):
        h, c = cell(torch.randn(2, 3), (torch.randn(2, 4), torch.randn(2, 4)))
        h.detach_()
        c.detach_()
        assert not (h.requires_grad or c.requires_grad)


def test_steps_of_no_sequences() -> None:
    """As many as there may be: they take up nothing."""
    for layer in (nlpkernels.LSTM(3, 4), nlpkernels.GRU(3, 4, bidirectional=True)):
        output, _ = layer(torch.empty(2**33, 0, 3))
        assert output.shape[:2] == (2**33, 0)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_batches_of_gradients_of_all_states(kind: str, doubles: None) -> None:
    layer, x = getattr(nlpkernels, kind)(3, 4), torch.randn(4, 2, 3, requires_grad=True)
    output, states = layer(x, return_state_sequence=True)
    for result in (output, *(states if isinstance(states, tuple) else (states,))):
        cotangents = torch.randn(3, *result.shape)
        (together,) = torch.autograd.grad(result, x, cotangents, is_grads_batched=True, create_graph=True)
        alone = torch.stack([torch.autograd.grad(result, x, one, create_graph=True)[0] for one in cotangents])
        torch.testing.assert_close(together, alone)
        second = [torch.autograd.grad(g.square().sum(), x, retain_graph=True)[0] for g in (together, alone)]
        torch.testing.assert_close(*second)
