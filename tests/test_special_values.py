"""NaN, infinities, denormals and 1e30: where torch's results have them ours have them, and nowhere else.

And in places that must not be read (padding, steps after a sequence's end, rows of a table that are not in use, indices
after the last bag) they leave no trace.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import BESIDE_TORCH, FLOOR_OF_RELU, relative_error
from torch import Tensor, nn

import nlpkernels
from nlpkernels import functional

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")
SPECIAL = {"nan": NAN, "inf": INF, "-inf": -INF, "1e30": 1e30, "-1e30": -1e30, "denormal": 1e-40, "-0": -0.0}


def has(dtype: torch.dtype, value: float) -> bool:
    """Whether a dtype has a value: float16 ends long before 1e30."""
    return not abs(value) < INF or abs(value) <= torch.finfo(dtype).max


CASES = [
    pytest.param(d, v, id=f"{str(d).split('.')[1]}-{name}") for d in DTYPES for name, v in SPECIAL.items() if has(d, v)
]

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "projection": ("LSTM", {"proj_size": 3}),
    "gru": ("GRU", {}),
}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNNCell", {}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
}


def assert_like_torch(
    ours: list[Tensor], theirs: list[Tensor], names: list[str], either: bool = False, allowed: float | None = None
) -> None:
    """NaN where torch has NaN, infinity where it has infinity, and all else close. `either` takes one for the other."""
    kinds = {"NaN": torch.isnan, "inf": torch.isposinf, "-inf": torch.isneginf}
    if either:
        kinds = {"NaN or inf": lambda t: ~t.isfinite()}
    for got, expected, name in zip(ours, theirs, names, strict=True):
        assert got.dtype == expected.dtype
        for kind, has_kind in kinds.items():
            ours_has, torch_has = has_kind(got), has_kind(expected)
            assert torch.equal(ours_has, torch_has), (
                f"{name}: {kind} in {int(ours_has.sum())} places, torch has it in {int(torch_has.sum())} of "
                f"{got.numel()}, and {int((ours_has & torch_has).sum())} are the same"
            )
        finite = expected.isfinite()
        error = relative_error(got.where(finite, 0), expected.where(finite, 0))
        limit = BESIDE_TORCH[got.dtype] if allowed is None else allowed
        assert error <= limit, f"{name}: {error:.2e} from torch, allowed {limit:.2e}"


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results for tensor in flat(part)]


def run_layer(
    module: nn.Module, inputs: list[Tensor], grads: list[Tensor], call: Callable[..., Any]
) -> tuple[list[Tensor], list[str]]:
    """Results and all gradients of a module, given those of its results, in the module's dtype."""
    dtype = next(module.parameters()).dtype
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    results = flat(call(module, *inputs))
    parameters = dict(module.named_parameters())
    given = torch.autograd.grad(
        results, [*inputs, *parameters.values()], [g.to(dtype) for g in grads], allow_unused=True
    )
    names = [f"result {i}" for i in range(len(results))] + [f"d input {i}" for i in range(len(inputs))]
    return [*results, *(g for g in given if g is not None)], [*names, *(f"d {name}" for name in parameters)]


def compare(
    name: str, options: dict[str, Any], inputs: list[Tensor], call: Callable[..., Any], value: float, dtype: torch.dtype
) -> None:
    """A module of ours beside torch's, with a value in each of its tensors in turn."""
    size = (4, 5)
    ours = getattr(nlpkernels, name)(*size, **options).to(dtype)
    theirs = getattr(nn, name)(*size, **options).to(dtype)
    with torch.no_grad():
        results = flat(call(theirs, *(t.to(dtype) for t in inputs)))
    grads = [torch.randn(r.shape).to(dtype) for r in results]
    parameters = [p.detach().clone() for p in ours.parameters()]
    groups = {"input": inputs, "parameter": parameters, "gradient": grads}
    relu = options.get("nonlinearity") == "relu"
    for group, tensors in groups.items():
        # Without bounds, powers of a large weight overflow, in an order of one's own.
        for i in range(len(tensors) if not (relu and group == "parameter" and 1 < abs(value) < INF) else 0):
            # Halves are rounded to 0, now and then, at other places than torch's, and what is infinite times 0 is no
            # number: one in a hundred of these comparisons fails for that. One that fails has two more draws.
            for draws_left in (2, 1, 0) if dtype in FLOOR_OF_RELU else (0,):
                try:
                    compare_one(ours, theirs, groups, group, i, call, value, relu)
                    break
                except AssertionError as error:
                    if draws_left == 0:
                        raise AssertionError(f"{value} in {group} {i}: {error}") from None


def compare_one(
    ours: nn.Module,
    theirs: nn.Module,
    groups: dict[str, list[Tensor]],
    group: str,
    i: int,
    call: Callable[..., Any],
    value: float,
    relu: bool,
) -> None:
    """With a value somewhere in the i-th tensor of a group, and fresh numbers in it."""
    dtype = next(ours.parameters()).dtype
    changed = [t.to(dtype).clone() for t in groups[group]]
    changed[i] = torch.randn(changed[i].shape).to(dtype)
    flat_view = changed[i].view(-1)
    flat_view[torch.randint(flat_view.numel(), (1,))] = value
    own = {**groups, group: changed}
    runs = []
    for module in (ours, theirs):
        with torch.no_grad():
            for parameter, new in zip(module.parameters(), own["parameter"], strict=True):
                parameter.copy_(new)
        run, names = run_layer(module, [t.to(dtype) for t in own["input"]], own["gradient"], call)
        runs.append(run)
    # torch's GRU has dh - dh z for dh (1 - z), no number where dh is infinite; in halves there is none either where
    # torch rounds a gate to 1, and 1 - o to 0. A unit of a ReLU that is almost 0 is, in halves, on either side of it:
    # then 0 stands for any gradient, and NaN for an infinite one.
    rounds = dtype in FLOOR_OF_RELU
    flips = relu and rounds
    either = flips or (group == "gradient" and (rounds or type(ours).__name__.startswith("GRU")))
    assert_like_torch(*runs, names, either, INF if flips else None)


@pytest.mark.parametrize(("dtype", "value"), CASES)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: str, dtype: torch.dtype, value: float) -> None:
    name, own = LAYERS[layer]
    options = {**own, "bidirectional": True}
    has_c = name == "LSTM"
    inputs = [torch.randn(3, 2, 4), torch.randn(2, 2, own.get("proj_size", 5))]
    if has_c:
        inputs.append(torch.randn(2, 2, 5))

    def call(module: nn.Module, x: Tensor, *states: Tensor) -> Any:
        return module(x, states if has_c else states[0])

    compare(name, options, inputs, call, value, dtype)


@pytest.mark.parametrize(("dtype", "value"), CASES)
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: str, dtype: torch.dtype, value: float) -> None:
    name, options = CELLS[cell]
    has_c = name == "LSTMCell"

    def call(module: nn.Module, x: Tensor, *states: Tensor) -> Any:
        return module(x, states if has_c else states[0])

    compare(name, options, [torch.randn(3, 4), *(torch.randn(3, 5) for _ in range(1 + has_c))], call, value,
            dtype)  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), CASES)
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted", "lookup"])
def test_tables(mode: str, dtype: torch.dtype, value: float) -> None:
    """A value in a row in use, in a factor, and in the gradient that comes in."""
    columns = 19
    ids = torch.randint(2, 10, (4, 6))
    ids[1, 2], ids[3] = 1, torch.tensor([0, 0, 2, 3, 4, 0])  # 0 is the padding

    def run(function: Any, table: Tensor, factors: Tensor, grad: Tensor) -> list[Tensor]:
        table, factors = table.detach().requires_grad_(), factors.detach().requires_grad_()
        if mode == "lookup":
            out = function.embedding(ids, table, padding_idx=0)
            return [out, *torch.autograd.grad(out, table, grad.unsqueeze(1).expand_as(out))]
        pooling = "sum" if mode == "weighted" else mode
        weights = factors if mode == "weighted" else None
        out = function.embedding_bag(ids, table, mode=pooling, padding_idx=0, per_sample_weights=weights)
        wanted = [table, factors] if mode == "weighted" else [table]
        return [out, *torch.autograd.grad(out, wanted, grad)]

    for place in range(3):
        given = [torch.randn(10, columns), torch.rand(4, 6), torch.randn(4, columns)]
        given[place][1, 2] = value
        given = [t.to(dtype) for t in given]
        ours, theirs = run(functional, *given), run(nn.functional, *given)
        assert_like_torch(ours, theirs, ["out", "d table", "d factors"][: len(ours)])


# --- Places that must not be read ------------------------------------------------------------------------------------

LEAKS = [pytest.param(d, v, id=f"{str(d).split('.')[1]}-{v}") for d in DTYPES for v in (NAN, INF, 1e30) if has(d, v)]


@pytest.mark.parametrize(("dtype", "value"), LEAKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_steps_after_the_end(layer: str, dtype: torch.dtype, value: float) -> None:
    """Padding after a sequence's length, in input and in the gradient of output: the same bits as with zeros."""
    name, own = LAYERS[layer]
    module = getattr(nlpkernels, name)(4, 5, num_layers=2, bidirectional=True, **own).to(dtype)
    lengths, steps, batch = torch.tensor([3, 6, 0, 1, 5]), 6, 5
    is_padding = (torch.arange(steps).unsqueeze(1) >= lengths).unsqueeze(-1)
    x = torch.randn(steps, batch, 4, dtype=torch.float32).to(dtype)
    grad = torch.randn(steps, batch, 2 * own.get("proj_size", 5)).to(dtype)
    for sequence in (False, True):
        runs = []
        for padding in (0.0, value):
            padded = x.masked_fill(is_padding, padding).requires_grad_()
            output, state = module(padded, lengths=lengths, return_state_sequence=sequence)
            given = torch.autograd.grad(output, [padded, *module.parameters()], grad.masked_fill(is_padding, padding))
            runs.append([*flat([output, state]), *given])
        for zeros, other in zip(*runs, strict=True):
            assert other.isfinite().all()
            assert torch.equal(zeros, other)
        assert not runs[1][-len(list(module.parameters())) - 1].masked_select(is_padding).any()


@pytest.mark.parametrize(("dtype", "value"), LEAKS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_rows_that_are_in_no_bag(mode: str, weighted: bool, dtype: torch.dtype, value: float) -> None:
    """A padding row, rows not in use, factors of both, and what comes after the last bag: wrong indices too."""
    columns, padding = 19, 3
    ids = torch.tensor([1, 3, 2, 2, 3, 3, 999, -5, 1])  # the last three in no bag
    offsets = torch.tensor([0, 4, 4, 6])
    outside = torch.tensor([False, True, False, False, True, True, True, True, True])
    table, factors = torch.randn(10, columns).to(dtype), (torch.rand(9) + 0.5).to(dtype)
    unused = torch.ones(10, 1, dtype=torch.bool)
    unused[1:3] = False
    grad = torch.randn(3, columns).to(dtype)
    runs = []
    for filling in (1.0, value):
        own = table.masked_fill(unused, filling).requires_grad_()
        own_factors = factors.masked_fill(outside, filling).requires_grad_()
        out = functional.embedding_bag(
            ids, own, offsets, mode=mode, include_last_offset=True, padding_idx=padding,
            per_sample_weights=own_factors if weighted else None,
        )  # fmt: skip
        runs.append([out, *torch.autograd.grad(out, [own, own_factors] if weighted else [own], grad)])
    for one, other in zip(*runs, strict=True):
        assert other.isfinite().all()
        assert torch.equal(one, other)
    assert not runs[1][1].masked_select(unused).any()
    if weighted:
        assert not runs[1][2].masked_select(outside).any()


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
@pytest.mark.parametrize(("mode", "weighted"), [*itertools.product(["sum", "mean", "max"], [False, True])])
def test_padding_of_bags_of_one_length(mode: str, weighted: bool, value: float) -> None:
    ids = torch.tensor([[1, 0, 2], [0, 0, 0], [4, 4, 0]])
    runs = []
    for filling in (1.0, value):
        table, factors = torch.arange(15.0).reshape(5, 3), torch.arange(1.0, 10.0).reshape(3, 3)
        table[0], factors[ids == 0] = filling, filling
        table.requires_grad_(), factors.requires_grad_()
        out = functional.embedding_bag(
            ids, table, mode=mode, padding_idx=0, per_sample_weights=factors if weighted else None
        )
        runs.append([out, *torch.autograd.grad(out.sum(), [table, factors] if weighted else [table])])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_padding_of_a_lookup_gets_no_gradient() -> None:
    """Embedding reads its padding row, NaN or not, and never trains it, whatever gradient comes in."""
    table = torch.randn(5, 3)
    table[0] = NAN
    table.requires_grad_()
    out = functional.embedding(torch.tensor([1, 0, 2]), table, padding_idx=0)
    assert out[1].isnan().all()
    grad = torch.ones(3, 3)
    grad[1] = NAN
    (given,) = torch.autograd.grad(out, table, grad)
    assert given.isfinite().all()
    assert given.sum(1).tolist() == [0, 3, 3, 0, 0]


@pytest.mark.parametrize("name", ["SGD", "RowWiseAdagrad", "Adagrad", "SparseAdam"])
def test_optimizers_touch_rows_in_use_alone(name: str) -> None:
    """NaN in other rows of a table stays where it is, and a NaN in a gradient reaches its own row alone."""
    bag = nlpkernels.EmbeddingBag(6, 4, mode="sum", padding_idx=5)
    with torch.no_grad():
        bag.weight[3:] = NAN
    optimizer = getattr(nlpkernels.optim, name)(bag.parameters(), lr=0.1)
    grad = torch.ones(2, 4)
    grad[1] = NAN
    bag(torch.tensor([[0, 1, 5], [2, 5, 5]])).backward(grad)
    optimizer.step()
    assert bag.weight.isnan().all(1).tolist() == [False, False, True, True, True, True]
    assert bag.weight[:2].isfinite().all()
