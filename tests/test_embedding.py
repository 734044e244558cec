"""Embedding and EmbeddingBag against torch.nn and against float64."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import FEW, FLOOR, assert_as_exact, assert_summed, relative_error
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import nlpkernels
from nlpkernels import _ops, functional

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def pair(name: str, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same table in torch.nn's module and in ours."""
    theirs, ours = getattr(nn, name)(*args, **options), getattr(nlpkernels, name)(*args, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def compare(theirs: nn.Module, ours: nn.Module, *args: Tensor | None) -> None:
    """Output and gradients of the table, and of per_sample_weights if given, against torch.nn and float64."""
    exact = copy.deepcopy(theirs).double()
    runs: list[list[Tensor]] = []
    cotangent = None
    for module in (ours, theirs, exact):
        dtype = module.weight.dtype
        given = [a.detach().to(dtype) if a is not None and a.is_floating_point() else a for a in args]
        wanted = [a.requires_grad_() for a in given if a is not None and a.is_floating_point()]
        output = module(*given)
        cotangent = torch.randn_like(output) if cotangent is None else cotangent
        grads = torch.autograd.grad(output, [module.weight, *wanted], cotangent.to(dtype))
        if module is ours and module.sparse and isinstance(module, nn.EmbeddingBag):
            assert grads[0].is_coalesced()
            rows = grads[0].indices()[0]
            assert torch.equal(rows, rows.unique())
        runs.append([output, *(g.to_dense() if g.is_sparse else g for g in grads)])
    assert_as_exact(*runs, names=["output", "gradient of weight", "gradient of per_sample_weights"][: len(runs[0])])


def apart(rows: int, columns: int, device: str) -> Tensor:
    """A table in float64 of which no two values of a column are nearer than a factor of 1.5: neither a finite step nor
    factors from 0.9 to 1.1 move a maximum."""
    sizes = torch.stack([torch.randperm(rows, device=device) for _ in range(columns)], 1).double().sub(rows / 2)
    signs = torch.randint(2, (rows, columns), device=device) * 2 - 1
    return signs * 1.5**sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 16, 50, 128, 300])
@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_modes(mode: str, columns: int, dtype: torch.dtype, device: str) -> None:
    theirs, ours = pair("EmbeddingBag", 40, columns, mode=mode, dtype=dtype, device=device)
    compare(theirs, ours, torch.randint(40, (9, 13), device=device))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("padding_idx", [None, 0, -3])
@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_offsets(mode: str, padding_idx: int | None, sparse: bool, index: torch.dtype, device: str) -> None:
    """Ragged bags, empty ones among them, at both ends too."""
    if mode == "max" and sparse:
        pytest.skip("torch refuses sparse gradients of max")
    ids = torch.randint(20, (37,), device=device, dtype=index)
    ids[::4] = 17
    offsets = torch.tensor([0, 0, 5, 5, 6, 20, 37], device=device, dtype=index)
    for include_last_offset in (False, True):
        options = {"padding_idx": padding_idx, "sparse": sparse, "include_last_offset": include_last_offset}
        compare(*pair("EmbeddingBag", 20, 44, mode=mode, device=device, **options), ids, offsets)


@pytest.mark.parametrize("mode", ["mean", "sum", "max", "lookup"])
def test_layouts_in_memory(mode: str, device: str) -> None:
    """Tables, indices, offsets, weights and gradients that are not contiguous: the same bits."""
    table, ids = torch.randn(20, 12, device=device), torch.randint(20, (7, 6), device=device)
    offsets, factors = torch.tensor([0, 4, 4, 30], device=device), torch.randn(42, device=device)

    def strided(tensor: Tensor) -> Tensor:
        """The same values, the first dimension last in memory and every other place left out."""
        last = tensor.movedim(0, -1)
        return torch.stack([last, torch.zeros_like(last)], -1)[..., 0].movedim(-1, 0)

    runs = []
    for lay in (Tensor.contiguous, strided):
        weight, scales = lay(table).requires_grad_(), lay(factors).requires_grad_()
        assert weight.is_contiguous() == (lay is not strided)
        if mode == "lookup":
            outputs = [functional.embedding(lay(ids), weight)]
        else:
            pool = partial(functional.embedding_bag, weight=weight, mode=mode)
            outputs = [pool(lay(ids)), pool(lay(ids.flatten()), offsets=lay(offsets))]
            if mode == "sum":
                outputs.append(pool(lay(ids.flatten()), offsets=lay(offsets), per_sample_weights=scales))
        cotangents = [lay(torch.linspace(-1, 1, o.numel(), device=device).reshape(o.shape)) for o in outputs]
        wanted = [weight, scales] if mode == "sum" else [weight]
        runs.append([*outputs, *torch.autograd.grad(outputs, wanted, cotangents)])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("mode", ["mean", "sum", "max", "lookup"])
@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (5, 0), (0, 0), (1, 1)])
def test_smallest_tables(rows: int, columns: int, mode: str, device: str) -> None:
    """No rows, with nothing looked up; no columns; and 1 x 1: shapes, and a gradient shaped like the table."""
    weight = torch.randn(rows, columns, device=device, requires_grad=True)
    ids = torch.zeros(3, 2 if rows else 0, dtype=torch.long, device=device)
    pool = functional.embedding if mode == "lookup" else partial(functional.embedding_bag, mode=mode)
    for sparse in (False, True) if mode != "max" else (False,):
        output = pool(ids, weight, sparse=sparse)
        assert output.shape == ((*ids.shape, columns) if mode == "lookup" else (3, columns))
        (gradient,) = torch.autograd.grad(output.sum(), weight)
        assert gradient.shape == weight.shape
        assert gradient.is_sparse == sparse
        if rows == columns == 1:
            torch.testing.assert_close(
                gradient.to_dense(), torch.full_like(weight, 3.0 if mode in ("mean", "max") else 6)
            )
    with pytest.raises(IndexError, match=f"is {rows}, expected a row"):
        pool(torch.full((1, 1), rows, device=device), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_halves_accumulate_in_float(mode: str, dtype: torch.dtype, device: str) -> None:
    """4096 ones, in a bag and as uses of one row: sums in half a precision would stop at 256 or 2048."""
    weight = torch.ones(3, 19, dtype=dtype, device=device, requires_grad=True)
    ids = torch.ones(1, 4096, dtype=torch.long, device=device)
    output = functional.embedding_bag(ids, weight, mode=mode)
    assert torch.equal(output, torch.full_like(output, 4096.0 if mode == "sum" else 1.0))
    for sparse in (False, True):
        output = functional.embedding_bag(ids.t(), weight, mode=mode, sparse=sparse)
        (gradient,) = torch.autograd.grad(output.sum(), weight)
        assert torch.equal(gradient.to_dense()[1], torch.full_like(weight[1], 4096.0))


@pytest.mark.parametrize("columns", [64, 300])
def test_long_sums_are_exact(columns: int) -> None:
    """Of 4096 rows, in a bag and as uses of one row: one by one they would be off by twice as much as allowed."""
    weight = torch.randn(4096, columns)
    ids = torch.arange(4096)
    output = functional.embedding_bag(ids.unsqueeze(0), weight, mode="sum")
    assert relative_error(output, weight.double().sum(0, keepdim=True)) <= FLOOR[torch.float32]
    table = torch.randn(3, columns, requires_grad=True)
    output = functional.embedding_bag(torch.ones(4096, 1, dtype=torch.long), table, mode="sum", sparse=True)
    (gradient,) = torch.autograd.grad(output, table, weight)
    assert relative_error(gradient.to_dense()[1], weight.double().sum(0)) <= FLOOR[torch.float32]


@pytest.mark.parametrize("columns", [1, 5, 8, 15, 16, 33, 65536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_to_nearest_even(dtype: torch.dtype, columns: int, device: str) -> None:
    """Sums of two numbers of any bits, infinite, NaN and subnormal ones among them: as float32's sum, rounded once."""
    bits = torch.randint(-(2**15), 2**15, (2, columns), device=device, dtype=torch.int16)
    bits[0, :] = torch.randperm(2**16, device=device)[:columns].sub(2**15).to(torch.int16)
    weight = bits.view(dtype)
    exact = (weight[0].float() + weight[1].float()).to(dtype)
    output = functional.embedding_bag(torch.tensor([[0, 1]], device=device), weight, mode="sum")[0]
    torch.testing.assert_close(output, exact, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_short_last_offset(mode: str, device: str) -> None:
    """What comes after the last bag is in none: it is not read, not checked, not renormalised."""
    weight = torch.randn(9, 4, device=device, requires_grad=True)
    ids, offsets = torch.tensor([1, 2, 3, 4, 5, 99], device=device), torch.tensor([0, 2, 5], device=device)
    runs = []
    for given in (ids, ids[:5]):
        output = functional.embedding_bag(given, weight, offsets, mode=mode, include_last_offset=True)
        runs.append([output, *torch.autograd.grad(output.square().sum(), weight)])
    assert all(map(torch.equal, *runs))
    table = weight.detach().clone()
    functional.embedding_bag(ids, table, offsets[:2], mode=mode, include_last_offset=True, max_norm=1e-3)
    changed = (table != weight).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 2]


def test_offsets_and_indices_may_differ_in_dtype(device: str) -> None:
    _, ours = pair("EmbeddingBag", 20, 12, device=device)
    ids, offsets = torch.randint(20, (9,), device=device), torch.tensor([0, 4], device=device)
    assert torch.equal(ours(ids.int(), offsets), ours(ids, offsets.int()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["matrix", "offsets"])
def test_per_sample_weights(layout: str, dtype: torch.dtype, device: str) -> None:
    theirs, ours = pair("EmbeddingBag", 20, 37, mode="sum", padding_idx=2, dtype=dtype, device=device)
    ids = torch.randint(20, (6, 5), device=device)
    factors = torch.randn(6, 5, device=device)
    if layout == "matrix":
        compare(theirs, ours, ids, None, factors)
    else:
        compare(theirs, ours, ids.reshape(-1), torch.tensor([0, 3, 3, 20], device=device), factors.reshape(-1))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("wanted", [(), ("weight",), ("factors",), ("weight", "factors")], ids=str)
def test_gradients_that_are_wanted(wanted: tuple[str, ...], sparse: bool, device: str) -> None:
    """Those of the table, of per_sample_weights, of both and of neither."""
    ids = torch.randint(9, (4, 6), device=device)
    shapes = {"weight": (9, 5), "factors": (4, 6)}
    given = {name: torch.randn(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
    runs = []
    for function in (functional.embedding_bag, nn.functional.embedding_bag):
        own = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in given.items()}
        output = function(
            ids, own["weight"], mode="sum", sparse=sparse, per_sample_weights=own["factors"], padding_idx=int(ids[0, 0])
        )
        assert output.requires_grad == bool(wanted)
        gradients = torch.autograd.grad(output.square().sum(), [own[name] for name in wanted]) if wanted else ()
        assert [g.is_sparse for g in gradients] == [sparse and name == "weight" for name in wanted]
        runs.append([output, *(g.to_dense() for g in gradients)])
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("layout", ["matrix", "offsets"])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_per_sample_weights_of_mean_and_max(mode: str, layout: str, device: str) -> None:
    """Against the definition, written with one bag after the other, padding left out, one bag empty."""
    weight = apart(8, 5, device).requires_grad_()
    ids = torch.tensor([1, 2, 3, 2, 4, 2, 7, 1, 2, 2, 2, 2], device=device)
    factors = (torch.rand(12, dtype=torch.float64, device=device) / 5 + 0.9).requires_grad_()
    starts = [0, 4, 8] if layout == "matrix" else [0, 3, 3]

    def defined(weight: Tensor, factors: Tensor) -> Tensor:
        bags = []
        for start, end in zip(starts, [*starts[1:], 12], strict=True):
            kept = [i for i in range(start, end) if ids[i] != 2]
            if not kept:
                bags.append(weight.new_zeros(5))
                continue
            rows = weight[ids[kept]] * factors[kept].unsqueeze(1)
            bags.append(rows.sum(0) / factors[kept].sum() if mode == "mean" else rows.amax(0))
        return torch.stack(bags)

    def ours(weight: Tensor, factors: Tensor) -> Tensor:
        if layout == "matrix":
            given, offsets, scales = ids.reshape(3, 4), None, factors.reshape(3, 4)
        else:
            given, offsets, scales = ids, torch.tensor(starts, device=device), factors
        return functional.embedding_bag(given, weight, offsets, mode=mode, per_sample_weights=scales, padding_idx=2)

    cotangent = torch.randn(3, 5, dtype=torch.float64, device=device)
    for function, expected in zip(
        (
            lambda: ours(weight, factors),
            lambda: torch.autograd.grad(ours(weight, factors), (weight, factors), cotangent),
        ),
        (defined(weight, factors), torch.autograd.grad(defined(weight, factors), (weight, factors), cotangent)),
        strict=True,
    ):
        torch.testing.assert_close(function(), expected)
    assert torch.autograd.gradgradcheck(ours, (weight, factors))


def test_a_weighted_mean_of_weights_that_cancel(device: str) -> None:
    """Where the weights add up to 0 the divisor is 1: the weighted sum."""
    weight = torch.randn(5, 3, device=device)
    ids, factors = torch.tensor([[1, 2]], device=device), torch.tensor([[2.0, -2.0]], device=device)
    output = functional.embedding_bag(ids, weight, mode="mean", per_sample_weights=factors)
    torch.testing.assert_close(output, 2 * (weight[1:2] - weight[2:3]))


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_scale_grad_by_freq(mode: str, sparse: bool, device: str) -> None:
    """Against Embedding and a reduction: torch's EmbeddingBag divides by the counts of other rows (seen in 2.13)."""
    options: dict[str, Any] = {"scale_grad_by_freq": True, "device": device}
    theirs = nn.Embedding(6, 5, **options)
    ours = nlpkernels.EmbeddingBag(6, 5, mode=mode, sparse=sparse, **options)
    ours.load_state_dict(theirs.state_dict())
    ids, cotangent = torch.randint(6, (8, 4), device=device), torch.randn(8, 5, device=device)
    (expected,) = torch.autograd.grad(getattr(torch, mode)(theirs(ids), 1), theirs.weight, cotangent)
    (got,) = torch.autograd.grad(ours(ids), ours.weight, cotangent)
    torch.testing.assert_close(got.to_dense(), expected)


def test_large_sorts(device: str) -> None:
    """More rows than one digit of the sort holds, and every row used many times."""
    theirs, ours = pair("EmbeddingBag", 5000, 3, device=device)
    compare(theirs, ours, torch.randint(5000, (300, 50), device=device))
    theirs, ours = pair("EmbeddingBag", 2, 70, device=device)
    compare(theirs, ours, torch.randint(2, (300, 50), device=device))


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_empty_input(mode: str, device: str) -> None:
    _, ours = pair("EmbeddingBag", 6, 5, mode=mode, padding_idx=3, device=device)
    nothing = torch.empty(0, dtype=torch.long, device=device)
    for args, bags in [
        ((torch.full((2, 4), 3, device=device),), 2),
        ((torch.empty(3, 0, dtype=torch.long, device=device),), 3),
        ((torch.empty(0, 4, dtype=torch.long, device=device),), 0),
        ((nothing, torch.tensor([0, 0], device=device)), 2),
        ((nothing, nothing), 0),
    ]:
        output = ours(*args)
        assert torch.equal(output, torch.zeros(bags, 5, device=device))
        (gradient,) = torch.autograd.grad(output.sum(), ours.weight)
        assert torch.equal(gradient, torch.zeros_like(ours.weight))


def test_ties_of_max_go_to_the_first(device: str) -> None:
    theirs, ours = pair("EmbeddingBag", 5, 3, mode="max", device=device)
    with torch.no_grad():
        for module in (theirs, ours):
            module.weight[3] = module.weight[1]
    ids = torch.tensor([[3, 1, 1], [1, 3, 1]], device=device)
    grads = [torch.autograd.grad(module(ids).sum(), module.weight)[0] for module in (theirs, ours)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("norm_type", [1.0, 1.5, 2, math.inf])
@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_max_norm(name: str, norm_type: float, device: str) -> None:
    """Rows in use, the padding's too, shrink in place, as autograd knows; the table stays a leaf."""
    theirs, ours = pair(name, 10, 4, max_norm=0.5, norm_type=norm_type, padding_idx=3, device=device)
    with torch.no_grad():
        for module in (theirs, ours):
            module.weight[3] = 7.0
    ids = torch.tensor([[1, 3, 1, 5], [1, 2, 2, 9]], device=device)
    before, version = ours.weight.detach().clone(), ours.weight._version
    for given in (ids, ids.int(), ids.t()):  # later calls change the table in place before the first one's backward
        torch.testing.assert_close(ours(given), theirs(given))
        torch.testing.assert_close(ours.weight, theirs.weight)
    assert ours.weight.is_leaf
    assert ours.weight._version > version
    used = torch.zeros(10, dtype=torch.bool, device=device)
    used[ids] = True
    assert torch.equal(ours.weight[~used], before[~used])
    assert (ours.weight[used].norm(norm_type, 1) <= 0.5001).all()
    grads = []
    for module in (ours, theirs):
        first, second = module(ids), module((ids + 3) % 10)
        grads.append(torch.autograd.grad(first.square().sum() + second.sum(), module.weight)[0])
    torch.testing.assert_close(*grads)

    squares = ours.weight.square().sum()  # which saved the table as it was
    with torch.no_grad():
        ours.weight.mul_(3)
    ours(ids)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"input": [1, 2, 11]}, IndexError),
        ({"input": [1, 2, -1]}, IndexError),
        ({"offsets": [0, 4]}, ValueError),
        ({"offsets": [0, 2, 1]}, ValueError),
        ({"offsets": [0.0]}, TypeError),
        ({"factors": torch.float64}, RuntimeError),
        ({"padding_idx": 10}, AssertionError),
    ],
    ids=str,
)
def test_a_wrong_call_renormalises_nothing(change: dict[str, Any], error: type[Exception], mode: str) -> None:
    weight = torch.randn(10, 4)
    before = weight.clone()
    with pytest.raises(error):
        functional.embedding_bag(
            torch.tensor(change.get("input", [1, 2, 3])),
            weight,
            torch.tensor(change.get("offsets", [0, 2])),
            max_norm=1e-3,
            mode=mode,
            per_sample_weights=torch.ones(3, dtype=change.get("factors", torch.float32)),
            padding_idx=change.get("padding_idx"),
        )
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_max_norm_compiles_and_exports(name: str, device: str) -> None:
    theirs, ours = pair(name, 10, 4, max_norm=0.5, device=device)
    ids = torch.randint(10, (2, 3), device=device)
    exported = torch.export.export(copy.deepcopy(ours), (ids,)).module()
    torch.testing.assert_close(exported(ids), copy.deepcopy(theirs)(ids))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), theirs(ids))
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_jagged_bags(device: str) -> None:
    theirs, ours = pair("EmbeddingBag", 10, 4, mode="sum", device=device)
    parts = [torch.randint(10, (n,), device=device) for n in (3, 1, 4)]
    ids = torch.nested.nested_tensor(parts, layout=torch.jagged)
    torch.testing.assert_close(ours(ids), theirs(ids))
    factors = torch.nested.nested_tensor_from_jagged(torch.rand(8, device=device), ids.offsets())
    torch.testing.assert_close(ours(ids, None, factors), theirs(ids, None, factors))
    starts, lengths = torch.tensor([0, 3, 5, 9], device=device), torch.tensor([2, 0, 3], device=device)
    with_holes = torch.nested.nested_tensor_from_jagged(torch.arange(1, 10, device=device), starts, lengths)
    expected = ours(torch.tensor([1, 2, 6, 7, 8], device=device), torch.tensor([0, 2, 2], device=device))
    assert torch.equal(ours(with_holes), expected)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_lookups(layout: torch.layout, device: str) -> None:
    """A nested tensor of rows, of the same ragged shape, with torch's gradient."""
    theirs, ours = pair("Embedding", 10, 4, padding_idx=2, device=device)
    parts = [torch.randint(10, (n,), device=device) for n in (3, 0, 4)]
    ids = torch.nested.nested_tensor(parts, layout=layout)
    for got, part in zip(ours(ids).unbind(), parts, strict=True):
        assert torch.equal(got, theirs(part))
    if layout == torch.jagged:
        assert ours(ids).shape == (*ids.shape, 4)
        cotangent = torch.randn(7, 4, device=device)
        grads = [torch.autograd.grad(m(ids).values(), m.weight, cotangent)[0] for m in (ours, theirs)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_lookups_in_tables_of_other_dtypes(dtype: torch.dtype, device: str) -> None:
    """As torch looks them up; pooling is for floating dtypes alone, in torch too."""
    table, ids = torch.randn(10, 4, device=device).to(dtype), torch.randint(10, (2, 3), device=device)
    got = functional.embedding(ids, table)
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.uint8), table[ids].view(torch.uint8))
    with pytest.raises(RuntimeError, match=r"weight|Float8"):
        functional.embedding_bag(ids, table)


@pytest.mark.parametrize("function", ["embedding", "embedding_bag"])
def test_tensor_subclasses_and_modes(function: str, device: str) -> None:
    """The function is seen by __torch_function__, and a subclass of a table gives one of its results."""

    class Named(Tensor):
        pass

    class Seen(TorchFunctionMode):
        def __torch_function__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(called)
            return called(*args, **(kwargs or {}))

    seen: list[Any] = []
    call = getattr(functional, function)
    table, ids = torch.randn(10, 4, device=device), torch.randint(10, (2, 3), device=device)
    got = call(ids, table.as_subclass(Named), padding_idx=-1)  # type: ignore[arg-type]
    assert type(got) is Named
    assert torch.equal(got.as_subclass(Tensor), call(ids, table, padding_idx=-1))
    with Seen():
        call(ids, table)
    assert call in seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0, 3)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 2}, {"padding_idx": -1, "sparse": True}, {"scale_grad_by_freq": True}], ids=str
)
def test_embedding(options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    theirs, ours = pair("Embedding", 6, 19, **options, dtype=dtype, device=device)
    ids = torch.randint(6, shape, device=device, dtype=torch.int32 if len(shape) == 2 else torch.int64)
    assert torch.equal(ours(ids), theirs(ids))
    if ids.dim() == 0 and ours.sparse:
        theirs = pair("Embedding", 6, 19, padding_idx=-1)[0].to(ours.weight)  # torch's sparse backward fails (2.13)
        theirs.load_state_dict(ours.state_dict())
    compare(theirs, ours, ids)


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_gradcheck(mode: str, device: str) -> None:
    weight = apart(6, 3, device).requires_grad_()
    ids = torch.tensor([1, 2, 5, 1, 0, 3], device=device)
    offsets = torch.tensor([0, 2, 2], device=device)

    def pool(weight: Tensor) -> Tensor:
        return functional.embedding_bag(ids, weight, offsets, mode=mode, padding_idx=0)

    assert torch.autograd.gradcheck(pool, (weight,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(pool, (weight,))
    if mode == "sum":
        factors = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)

        def weigh(weight: Tensor, factors: Tensor) -> Tensor:
            return functional.embedding_bag(ids, weight, offsets, mode=mode, per_sample_weights=factors)

        assert torch.autograd.gradcheck(weigh, (weight, factors), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(weigh, (weight, factors))


def test_gradcheck_embedding(device: str) -> None:
    weight = torch.randn(6, 3, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.tensor([[1, 2, 5], [1, 0, 3]], device=device)
    assert torch.autograd.gradcheck(lambda w: functional.embedding(ids, w), (weight,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda w: functional.embedding(ids, w).sin(), (weight,))


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_batched_gradients(name: str, device: str) -> None:
    """A vmap over backward alone: forward ran in plain eager mode."""
    theirs, ours = pair(name, 9, 5, dtype=torch.float64, device=device)
    ids = torch.randint(9, (4, 6), device=device)
    output = ours(ids)
    cotangents = torch.randn(3, *output.shape, dtype=output.dtype, device=device)
    (got,) = torch.autograd.grad(output, ours.weight, cotangents, is_grads_batched=True)
    expected = [torch.autograd.grad(theirs(ids), theirs.weight, c)[0] for c in cotangents]
    torch.testing.assert_close(got, torch.stack(expected))


def test_saved_tensors_pass_the_hooks(device: str) -> None:
    """What backward needs is saved through autograd: hooks see it, and it is gone after backward."""
    _, ours = pair("EmbeddingBag", 9, 5, mode="sum", device=device)
    ids, factors = torch.randint(9, (4, 6), device=device), torch.randn(4, 6, device=device, requires_grad=True)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        output = ours(ids, None, factors).sum()
    assert {ids.data_ptr(), factors.data_ptr(), ours.weight.data_ptr()} <= {t.data_ptr() for t in seen}
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 511, 512, 513])
@pytest.mark.parametrize("rows", [1, 2, 50, "in cache", "beyond"])
def test_lookups_copy_rows(columns: int, rows: int | str, device: str) -> None:
    """Of fewer and more bytes than are copied by the vector, in tables that are and are not taken to be in a cache."""
    if isinstance(rows, str):
        rows = (12 << 20) // (4 * columns) + (rows == "beyond")
    table = torch.randn(rows, columns, device=device)
    for count in (0, 1, 60):
        ids = torch.randint(rows, (count,), device=device)
        for dtype in (torch.float32, torch.bfloat16):
            embedding = nlpkernels.Embedding.from_pretrained(table.to(dtype))
            for index in (torch.int32, torch.int64):
                assert torch.equal(embedding(ids.to(index)), table.to(dtype)[ids])


@pytest.mark.parametrize("count", [0, 1, 65])
@pytest.mark.parametrize("rows", [1, 9, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_lookups(rows: int, count: int, dtype: torch.dtype, device: str) -> None:
    for padding_idx, by_freq in ((None, False), (0, False), (-1, True)):
        theirs, ours = pair(
            "Embedding", rows, 64, padding_idx=padding_idx, scale_grad_by_freq=by_freq, device=device, dtype=dtype
        )
        ids = torch.randint(rows, (count,), device=device)
        compare(theirs, ours, ids)
        if count:
            ids[count // 2] = rows
            with pytest.raises(IndexError, match=rf"flattened indices\[{count // 2}\] is {rows}"):
                ours(ids)


@pytest.mark.parametrize("options", [{"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_what_is_trained_under_every_transform(options: dict[str, Any]) -> None:
    """Where an op is taken apart, too; and second derivatives, in which torch scales by frequency once."""
    results = []
    for library in (nn, nlpkernels):
        table = library.Embedding(6, 3, **options)
        ids, weight = torch.tensor([1, 3, 3]), torch.arange(1.0, 19).reshape(6, 3)

        def cubes(w: Tensor, table: nn.Module = table, ids: Tensor = ids) -> Tensor:
            return torch.func.functional_call(table, {"weight": w}, (ids,)).pow(3).sum()

        def twice(w: Tensor, f: Any = cubes, v: Tensor = weight) -> Tensor:
            return torch.func.jvp(lambda u: torch.func.jvp(f, (u,), (v,))[1], (w,), (v,))[1]

        of = [torch.func.functionalize(torch.func.grad(cubes))(weight), torch.func.grad(cubes)(weight)]
        if not options.get("sparse"):
            of += [torch.func.grad(twice)(weight), torch.func.jacrev(torch.func.jacrev(cubes))(weight)]
            of += [torch.func.jacfwd(torch.func.jacrev(cubes))(weight)]
            leaf = weight.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(cubes(leaf), leaf, create_graph=True)
            of += torch.autograd.grad(gradient.sum(), leaf)
        results.append([tensor.to_dense() if tensor.is_sparse else tensor for tensor in of])
        assert of[0].is_sparse == bool(options.get("sparse"))
    for ours, theirs in zip(*results[::-1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("module", [
    nlpkernels.EmbeddingBag(30, 4, sparse=True),
    nlpkernels.Embedding(30, 4, sparse=True, scale_grad_by_freq=True),  # of which torch has no sparse gradient
], ids=["EmbeddingBag", "Embedding"])  # fmt: skip
def test_accumulated_gradients_stay_coalesced(module: nn.Module) -> None:
    """Without a copy, as long as they are what the layer gave."""
    for steps in (1, 2, 3):
        module.weight.grad = None
        expected = torch.zeros(30, 4)
        for _ in range(steps):
            ids = torch.randint(30, (5, 6))
            output = module(ids)
            gradient = torch.randn_like(output)
            expected += torch.autograd.grad(output, module.weight, gradient, retain_graph=True)[0].to_dense()
            output.backward(gradient)
        if steps == 1:
            assert module.weight.grad.is_coalesced()
        torch.testing.assert_close(module.weight.grad.to_dense(), expected)
        torch.testing.assert_close(module.weight.grad.coalesce().to_dense(), expected)
    # Of a gradient that a hook has changed nobody knows.
    module.weight.grad = None
    module.weight.register_hook(lambda g: torch.sparse_coo_tensor(
        g._indices().repeat(1, 2), g._values().repeat(2, 1), g.shape, check_invariants=False))  # fmt: skip
    module(ids).sum().backward()
    assert not module.weight.grad.is_coalesced()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [2**19 // 16 - 1, 2**19 // 16], ids=["small table", "larger table"])
@pytest.mark.parametrize("count", [0, 1, 127, 128, 129])
def test_lookups_of_a_few_rows_of_small_tables(count: int, rows: int, dtype: torch.dtype) -> None:
    """Which torch's own ops differentiate, up to 128 of a table below two megabytes (of float32)."""
    weight = nn.Parameter(torch.randn(rows, 16, dtype=dtype))
    ids = torch.randint(20, (count,))
    cotangent = torch.randn(count, 16, dtype=dtype, requires_grad=True)
    for padding in (None, 3):
        module = nlpkernels.Embedding.from_pretrained(weight, freeze=False, padding_idx=padding)
        got = torch.autograd.grad(module(ids), module.weight, cotangent, create_graph=True)[0]
        exact = weight.detach().double().requires_grad_()
        expected = torch.autograd.grad(nn.functional.embedding(ids, exact, padding), exact, cotangent.double())[0]
        most_uses, largest = (int(ids.bincount().max()), cotangent.abs().max().item()) if count else (0, 0.0)
        assert_summed(got, expected, "gradient of weight", most_uses * largest, is_exact=False)
        (second,) = torch.autograd.grad(got.sum(), cotangent)
        assert torch.equal(second, ids.ne(-1 if padding is None else padding).to(dtype).unsqueeze(1).expand_as(second))
    if count:
        with pytest.raises(IndexError, match=rf"embedding: flattened indices\[{count - 1}\] is {rows}, expected a row"):
            module(torch.cat([ids[1:], torch.tensor([rows])]))


def test_a_sparse_gradient_of_a_lookup_is_torchs() -> None:
    """The indices and the incoming gradient as they are: nothing sorted, nothing copied."""
    for dtype, index in ((torch.float32, torch.int64), (torch.bfloat16, torch.int32)):
        theirs, ours = pair("Embedding", 9, 4, padding_idx=2, sparse=True, dtype=dtype)
        ids = torch.tensor([[3, 3, 2], [8, 0, 3]], dtype=index)
        for call in (ours, lambda ids, ours=ours: nlpkernels.functional.embedding(ids, ours.weight, 2, sparse=True)):
            cotangent = torch.randn(2, 3, 4, dtype=dtype)
            got = torch.autograd.grad(call(ids), ours.weight, cotangent)[0]
            expected = torch.autograd.grad(theirs(ids), theirs.weight, cotangent)[0]
            assert torch.equal(got._indices(), expected._indices()) and torch.equal(got._values(), expected._values())
            with pytest.raises(IndexError, match=r"embedding: flattened indices\[1\] is 9, expected a row from 0 to 8"):
                call(torch.tensor([[0], [9]], dtype=index))
    ours = nlpkernels.Embedding(9, 4, max_norm=1.0, sparse=True)
    before = ours.weight.detach().clone()
    with pytest.raises(IndexError, match=r"flattened indices\[1\] is -1"):
        ours(torch.tensor([0, -1]))
    assert torch.equal(ours.weight, before)


def test_sparse_gradients_are_refused_a_second_derivative(device: str) -> None:
    ours = nlpkernels.EmbeddingBag(6, 3, sparse=True, device=device)
    output = ours(torch.tensor([[1, 2]], device=device))
    cotangent = torch.ones_like(output, requires_grad=True)
    (gradient,) = torch.autograd.grad(output, ours.weight, cotangent, create_graph=True)
    with pytest.raises(NotImplementedError, match="sparse=False"):
        gradient.coalesce().values().sum().backward()


@pytest.mark.parametrize("optimizer", ["SGD", "SparseAdam"])
def test_sparse_gradients_train(optimizer: str, device: str) -> None:
    theirs, ours = pair("EmbeddingBag", 30, 5, sparse=True, device=device)
    # Of a gradient near 0, Adam with a small eps would make a step of any size.
    options = {"lr": 0.1, **({"eps": 0.1} if optimizer == "SparseAdam" else {})}
    steps = [getattr(torch.optim, optimizer)(module.parameters(), **options) for module in (theirs, ours)]
    for _ in range(3):
        ids = torch.randint(30, (4, 6), device=device)
        for module, step in zip((theirs, ours), steps, strict=True):
            step.zero_grad()
            module(ids).sin().sum().backward()
            step.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_compiles_to_one_graph(name: str, device: str) -> None:
    theirs, ours = pair(name, 10, 4, padding_idx=1, device=device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for batch in (3, 5):
        ids = torch.randint(10, (batch, 4), device=device)
        torch.testing.assert_close(compiled(ids), theirs(ids))
        grads = [
            torch.autograd.grad(m(ids).sin().sum(), module.weight)[0]
            for m, module in ((compiled, ours), (theirs, theirs))
        ]
        torch.testing.assert_close(*grads)


def test_function_transforms(device: str) -> None:
    _, ours = pair("EmbeddingBag", 10, 4, device=device)
    ids = torch.randint(10, (5, 3, 4), device=device)
    torch.testing.assert_close(torch.func.vmap(ours)(ids), torch.stack([ours(one) for one in ids]))
    tables, offsets = torch.randn(3, 10, 4, device=device), torch.tensor([0, 2], device=device)
    got = torch.func.vmap(lambda w: functional.embedding_bag(ids[0, 0], w, offsets))(tables)
    torch.testing.assert_close(got, torch.stack([functional.embedding_bag(ids[0, 0], w, offsets) for w in tables]))
    got = torch.func.vmap(lambda w: functional.embedding(ids, w))(tables)
    torch.testing.assert_close(got, tables[:, ids])
    weight = ours.weight.detach()

    def loss(weight: Tensor) -> Tensor:
        return functional.embedding_bag(ids[0], weight).sin().sum()

    torch.testing.assert_close(torch.func.jacrev(loss)(weight), torch.func.jacfwd(loss)(weight))


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_bits_do_not_depend_on_threads(mode: str, sparse: bool, restored_threads: None) -> None:
    if mode == "max" and sparse:
        pytest.skip("torch refuses sparse gradients of max")
    ours = nlpkernels.EmbeddingBag(700, 64, mode=mode, sparse=sparse)
    ids = torch.randint(700, (300, 40))
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = ours(ids)
        runs.append((output, torch.autograd.grad(output.sin().sum(), ours.weight)[0].to_dense()))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("rows", [5_000, 3_000_000], ids=["short keys", "long keys"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_sparse_gradients_sorted_by_several_threads(rows: int, weighted: bool, restored_threads: None) -> None:
    """Ragged bags with padding, some empty, and enough uses that every thread sorts some: the same bits, and right."""
    ids = torch.randint(rows, (20_000,))
    ids[torch.rand(20_000) < 0.3] = 7
    ids[torch.rand(20_000) < 0.1] = 3
    offsets = torch.cat([torch.zeros(2, dtype=torch.long), torch.randint(20_000, (900,)).sort().values])
    factors = torch.rand(20_000) if weighted else None
    weight = torch.randn(rows, 2, requires_grad=True)
    grad, found = torch.randn(902, 2), []
    options = {"mode": "sum", "sparse": True, "per_sample_weights": factors, "padding_idx": 3}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = functional.embedding_bag(ids, weight, offsets, **options)
        found.append(torch.autograd.grad(output, weight, grad)[0])
    bags = torch.bucketize(torch.arange(20_000), offsets, right=True) - 1
    terms = grad.double()[bags] * (1.0 if factors is None else factors.double().unsqueeze(1))
    touched, place = ids[ids != 3].unique(return_inverse=True)
    expected = torch.zeros(len(touched), 2, dtype=torch.float64).index_add_(0, place, terms[ids != 3])
    for gradient in found:
        assert gradient.is_coalesced()
        assert torch.equal(gradient.indices()[0], touched)
        assert torch.equal(gradient.values(), found[0].values())
    assert relative_error(found[0].values(), expected) <= FEW[torch.float32]


def in_order(ids: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in use, and for each the sum of its terms: one after the other, 64 at a time, then of these sums."""
    rows, place = np.unique(ids.numpy(), return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(rows)))
    group = np.empty(len(place), np.int64)
    group[order] = (np.arange(len(place)) - starts[place[order]]) // 64
    sums = np.zeros((group.max(initial=0) + 1, len(rows), terms.shape[1]), np.float32)
    np.add.at(sums, (group, place), terms.numpy())
    return torch.from_numpy(rows), torch.from_numpy(np.add.accumulate(sums)[-1])


@pytest.mark.parametrize("uses", [1, 63, 64, 65, 300, 2_500, 20_000])
@pytest.mark.parametrize("rows", [5_000, 3_000_000], ids=["short keys", "long keys"])
@pytest.mark.parametrize("draw", ["words", "uniform"])
def test_gradients_are_summed_in_order(draw: str, rows: int, uses: int, restored_threads: None) -> None:
    """The same bits as sums in the order of the indices, whatever the rows, their number and that of the threads."""
    ids = torch.randint(rows, (uses,))
    if draw == "words":  # of which a few are most of a text
        ids = torch.exp(torch.rand(uses, dtype=torch.float64).square() * math.log(rows)).long().clamp_(max=rows - 1)
    weight, grad = torch.zeros(rows, 3, requires_grad=True), torch.randn(uses, 3)
    expected = in_order(ids, grad)
    for bags in (ids.unsqueeze(1), ids.int().unsqueeze(1), ids.reshape(1, uses)):
        terms = grad[: len(bags)]
        if len(bags) < uses:
            expected = in_order(ids, terms.expand(uses, 3))
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = functional.embedding_bag(bags, weight, mode="sum", sparse=True)
            (found,) = torch.autograd.grad(output, weight, terms)
            assert torch.equal(found.indices()[0], expected[0])
            assert torch.equal(found.values(), expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [113, 128, 129, 240, 256, 257, 320, 321, 700])
def test_bags_of_wide_rows(columns: int, dtype: torch.dtype) -> None:
    """Bags of 0 to 300 rows of which some are padding, about as many columns as are added in registers, and more: the
    same bits as sums in order, rounded once."""
    lengths = torch.tensor([0, 1, 3, 63, 64, 65, 130, 300, 2])
    bag = torch.arange(len(lengths)).repeat_interleave(lengths)
    ids, weight = torch.randint(50, (len(bag),)), torch.randn(50, columns).to(dtype)
    ids[bag == len(lengths) - 1] = 5
    output = functional.embedding_bag(ids, weight, lengths.cumsum(0) - lengths, mode="sum", padding_idx=5)
    kept = ids != 5
    if dtype == torch.float64:
        exact = weight.new_zeros(len(lengths), columns).index_add_(0, bag[kept], weight[ids[kept]])
        torch.testing.assert_close(output, exact)
        return
    expected = torch.zeros(len(lengths), columns)
    for i, length in enumerate(lengths.tolist()):
        start = int(lengths[:i].sum())
        for group in ids[start : start + length].split(64):  # of 64 positions, with what does not count
            used = group[group != 5]
            expected[i] += in_order(torch.zeros_like(used), weight[used].float())[1].sum(0)
    assert torch.equal(output, expected.to(dtype))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("columns", [5, 300, 7_000])
def test_large_gradients(columns: int, sparse: bool, restored_threads: None) -> None:
    """Of 14 MB, more than a cache is taken to hold: the same bits as sums in order, and zeros elsewhere."""
    count = 14_000_000 // (4 * columns)
    ids = torch.randperm(count)
    ids[:300:2] = 3
    ids = ids[: count if sparse else 2_000]
    weight, grad = torch.zeros(count, columns, requires_grad=True), torch.randn(len(ids), columns)
    rows, sums = in_order(ids, grad)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        if sparse:
            output = functional.embedding_bag(ids.unsqueeze(1), weight, mode="sum", sparse=True)
        else:
            output = functional.embedding(ids, weight)
        (found,) = torch.autograd.grad(output, weight, grad)
        if sparse:
            assert torch.equal(found.indices()[0], rows)
            assert torch.equal(found.values(), sums)
        else:
            assert torch.equal(found[rows], sums)
            assert found.count_nonzero() == sums.count_nonzero()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"padding_idx": -2},
    {"max_norm": 1.0, "norm_type": 1.0},
    {"scale_grad_by_freq": True},
    {"sparse": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_is_built_like_torchs(name: str, options: dict[str, Any]) -> None:
    """The same initial table, repr, attributes and reset; a state_dict goes both ways; a copy of any kind works."""
    modules = []
    for library in (nn, nlpkernels):
        torch.manual_seed(5)
        modules.append(getattr(library, name)(10, 4, **options))
    theirs, ours = modules
    assert repr(ours) == repr(theirs)
    assert torch.equal(ours.weight, theirs.weight)
    for module in modules:
        torch.nn.init.ones_(module.weight)
        torch.manual_seed(6)
        module.reset_parameters()
    assert torch.equal(ours.weight, theirs.weight)
    torch.nn.init.uniform_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    own = {k: v for k, v in vars(ours).items() if not k.startswith("_")}
    assert own == {k: v for k, v in vars(theirs).items() if not k.startswith("_")}

    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    ids = torch.randint(10, (2, 3))
    for twin in (
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
        torch.load(saved, weights_only=False),
    ):
        assert type(twin) is type(ours)
        assert twin.weight is not ours.weight
        assert torch.equal(twin(ids), ours(ids))


@pytest.mark.parametrize("options", [*OPTIONS, {"freeze": False}], ids=str)
@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_from_pretrained(name: str, options: dict[str, Any]) -> None:
    """The same table, not a copy of it, frozen unless said otherwise."""
    table, ids = torch.randn(7, 3), torch.randint(7, (2, 3))
    theirs, ours = (getattr(library, name).from_pretrained(table, **options) for library in (nn, nlpkernels))
    assert type(ours) is getattr(nlpkernels, name)
    assert repr(ours) == repr(theirs)
    assert (ours.sparse, ours.weight.requires_grad) == (theirs.sparse, theirs.weight.requires_grad)
    assert ours.weight.data_ptr() == table.data_ptr()
    expected = theirs(ids)
    torch.testing.assert_close(ours(ids), expected)


def test_given_tables() -> None:
    table = torch.randn(7, 3)
    for name in ("Embedding", "EmbeddingBag"):
        layer = getattr(nlpkernels, name)(7, 3, _weight=table)
        assert layer.weight.data_ptr() == table.data_ptr()
        assert layer.weight.requires_grad
        with pytest.raises(AssertionError, match="Shape of weight"):
            getattr(nlpkernels, name)(7, 4, _weight=table)
        with pytest.raises(AssertionError, match="2-dimensional"):
            getattr(nlpkernels, name).from_pretrained(table[0])
    assert not nlpkernels.Embedding(7, 3, _weight=table, _freeze=True).weight.requires_grad


@pytest.mark.parametrize("name", ["embedding", "embedding_bag", "Embedding", "EmbeddingBag"])
def test_signatures_are_torchs(name: str) -> None:
    theirs, ours = (nn.functional, functional) if name[0] == "e" else (nn, nlpkernels)
    pairs = [(getattr(theirs, name), getattr(ours, name))]
    if name[0] == "E":
        pairs.append((pairs[0][0].forward, pairs[0][1].forward))
    for a, b in pairs:
        a, b = inspect.signature(a), inspect.signature(b)
        assert [(p.name, p.default, p.kind) for p in a.parameters.values()] == [
            (p.name, p.default, p.kind) for p in b.parameters.values()
        ]


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_goes_to_another_dtype(name: str, dtype: torch.dtype, device: str) -> None:
    theirs, ours = pair(name, 10, 4, device=device)
    ids = torch.randint(10, (2, 3), device=device)
    for module in (theirs.to(dtype), ours.to(dtype)):
        assert module.weight.dtype == dtype
    torch.testing.assert_close(ours(ids), theirs(ids))
    assert getattr(nlpkernels, name)(10, 4, dtype=dtype, device="meta").weight.dtype == dtype


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_meta_device(name: str, max_norm: float | None) -> None:
    """Shapes without data; and no result where there are no indices to read for a table that has data."""
    theirs, ours = (getattr(library, name)(10, 4, max_norm=max_norm, device="meta") for library in (nn, nlpkernels))
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert ours(ids.to("meta")).shape == theirs(ids.to("meta")).shape
    assert ours(ids.to("meta")).is_meta
    if max_norm is None:
        assert ours(ids).is_meta
    with pytest.raises(RuntimeError, match="expected indices on cpu like weight, got meta"):
        getattr(nlpkernels, name)(10, 4)(ids.to("meta"))


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
@pytest.mark.parametrize("wrong", [-1, 10, 2**40])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_index_out_of_range(name: str, wrong: int, max_norm: float | None, device: str) -> None:
    """An IndexError that names the value and the range, with the table as it was."""
    ours = getattr(nlpkernels, name)(10, 4, max_norm=max_norm, device=device)
    before = ours.weight.detach().clone()
    ids = torch.zeros(3, 5, dtype=torch.long, device=device)
    ids[1, 3] = wrong
    with pytest.raises(IndexError, match=f"{wrong}.* 0 to 9"):
        ours(ids)
    assert torch.equal(ours.weight, before)


def test_index_is_named_with_its_position() -> None:
    ours = nlpkernels.EmbeddingBag(10, 4)
    with pytest.raises(IndexError, match=r"indices\[1\]\[2\] is 11, expected a row from 0 to 9 of a table of 10"):
        ours(torch.tensor([[0, 1, 2], [3, 4, 11]]))
    with pytest.raises(IndexError, match=r"indices\[4\] is -2"):
        ours(torch.tensor([0, 1, 2, 3, -2]), torch.tensor([0, 2]))
    with pytest.raises(IndexError, match=r"embedding_bag: indices\[1\]\[0\] is 11"):
        ours(torch.tensor([[0], [11]]))
    with pytest.raises(IndexError, match=r"flattened indices\[5\] is 10, expected a row from 0 to 9"):
        nlpkernels.Embedding(10, 4)(torch.tensor([[0, 1, 2], [3, 4, 10]]))


BAD_BAGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": torch.rand(2, 3)}, TypeError, "float32"),
    ({"input": torch.zeros(2, 3, dtype=torch.int16)}, TypeError, "int16"),
    ({"input": torch.zeros(2, 3, dtype=torch.bool)}, TypeError, "bool"),
    ({"input": torch.zeros(2, 3, 4, dtype=torch.long)}, ValueError, "1D or 2D"),
    ({"input": torch.zeros(4, dtype=torch.long)}, ValueError, "offsets"),
    ({"offsets": torch.tensor([0])}, ValueError, "2D"),
    ({"input": [[1, 2]]}, TypeError, "input .* got list"),
    ({"input": None}, TypeError, "input .* got NoneType"),
    ({"mode": "median"}, ValueError, "median"),
    ({"mode": None}, ValueError, "None"),
    ({"weight": torch.zeros(10, 4, dtype=torch.long)}, RuntimeError, "weight of a floating dtype .*, got Long"),
    ({"weight": torch.zeros(4)}, ValueError, "2D"),
    ({"padding_idx": 10}, AssertionError, "-10 to 9, got 10"),
    ({"padding_idx": -11}, AssertionError, "got -11"),
    ({"mode": "max", "sparse": True}, ValueError, "sparse"),
    ({"mode": "max", "scale_grad_by_freq": True}, ValueError, "frequency"),
    ({"mode": "sum", "per_sample_weights": torch.zeros(3, 2)}, ValueError, "same shape"),
    ({"mode": "sum", "per_sample_weights": torch.zeros(2, 3).double()}, RuntimeError, "dtype"),
    ({"mode": "sum", "per_sample_weights": torch.zeros(2, 3).long()}, RuntimeError, "dtype"),
    ({"mode": "sum", "per_sample_weights": torch.zeros(2, 3, device="meta")}, RuntimeError, "got meta"),
    ({"mode": "mean", "per_sample_weights": torch.zeros(2, 3).double()}, RuntimeError, "dtype"),
    ({"mode": "max", "per_sample_weights": torch.zeros(2, 3).half()}, RuntimeError, "dtype"),
]
BAD_OFFSETS: list[tuple[Any, bool, type[Exception], str]] = [
    (torch.tensor([1, 2]), False, ValueError, "offsets"),
    (torch.tensor([0, 3, 2]), False, ValueError, "offsets"),
    (torch.tensor([0, 7]), False, ValueError, "offsets"),
    (torch.tensor([0, -1]), False, ValueError, "offsets"),
    (torch.tensor([0, 2, 7]), True, ValueError, "offsets"),
    (torch.tensor([[0, 2]]), False, ValueError, "offsets"),
    (torch.tensor([0.0]), False, TypeError, "offsets"),
    (torch.tensor([0], dtype=torch.int16), False, TypeError, "offsets of dtype int32 or int64, got Short"),
    (torch.tensor(0), False, ValueError, "offsets"),
    (torch.tensor([], dtype=torch.long), True, ValueError, "offset"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_BAGS, ids=lambda v: str(v)[:30])
def test_bad_bags(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.embedding_bag(
            **{"input": torch.zeros(2, 3, dtype=torch.long), "weight": torch.zeros(10, 4), **change}
        )


@pytest.mark.parametrize(("offsets", "last", "error", "message"), BAD_OFFSETS, ids=lambda v: str(v)[:30])
def test_bad_offsets(offsets: Tensor, last: bool, error: type[Exception], message: str, device: str) -> None:
    ids, weight = torch.zeros(6, dtype=torch.long, device=device), torch.zeros(10, 4, device=device)
    if device == "cuda" and error is not ValueError and not _ops.USES_CUDA_KERNELS:
        pytest.skip("csrc/checks.h is for compiled kernels, and none of CUDA are in use")
    with pytest.raises(error, match=message):
        functional.embedding_bag(ids, weight, offsets.to(device), include_last_offset=last)


def test_ops_refuse_what_does_not_fit() -> None:
    """The ops themselves are safe: what their callers here never pass does not reach a kernel."""
    ops = torch.ops.nlpkernels
    weight, ids, grad = torch.zeros(10, 4), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4)
    none = torch.empty(0, dtype=torch.long)
    with pytest.raises(ValueError, match="lookup"):
        ops.embedding_bag(weight, ids, None, None, "lookup", -1, False, False, False)
    with pytest.raises(ValueError, match="grad of shape"):
        ops.embedding_bag_backward(grad[:1], 10, ids, None, None, none, "sum", -1, False, False)
    with pytest.raises(RuntimeError, match="aux of shape"):
        ops.embedding_bag_backward(grad, 10, ids, None, None, none, "mean", -1, False, False)
    with pytest.raises(IndexError, match="is 0"):
        ops.embedding_bag_backward(grad, 0, ids, None, None, none, "sum", -1, False, False)
    with pytest.raises(IndexError, match="is 12"):
        ops.embedding_bag_sparse_backward(grad, 10, ids + 12, None, None, none, "sum", -1, False, False)
    with pytest.raises(RuntimeError, match="h of shape"):
        ops.embedding_dot(grad[:, :2], weight, ids, None, -1, False, False)
