"""What every op owes the dispatcher, how the libraries are picked, and the reference that stands in for kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import nlpkernels
from nlpkernels import _ops, reference

OPS = torch.ops.nlpkernels


def wants_grad(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


def recurrent_samples(device: str) -> list[tuple[Any, ...]]:
    """Arguments of `recurrent`: each cell, packed and not, with and without biases, projection, workspace and mask."""
    samples = []
    for cell, facts in reference.CELLS.items():
        for directions in (1, 2):
            gates = facts.gates * 5
            weights = [wants_grad(*s, device=device) for s in ((gates, 3), (gates, 5), (gates,), (gates,))] * directions
            h0 = wants_grad(directions, 2, 5, device=device)
            c0 = wants_grad(directions, 2, 5, device=device) if facts.has_c else None
            x = wants_grad(4, 2, 3, device=device)
            packed = wants_grad(5, 3, device=device), torch.tensor([2, 2, 1])
            samples.append((x, None, h0, c0, weights, cell, True, None))
            samples.append((*packed, h0, c0, weights, cell, True, None))
            bare = [w for w in weights if w.dim() == 2]
            samples.append((x, None, h0.detach(), None if c0 is None else c0.detach(), bare, cell, False, None))
            h_mask = torch.randint(3, (directions, 2, 5), device=device).to(x.dtype)
            samples.append((x, None, h0, c0, weights, cell, True, h_mask))
            samples.append((*packed, h0, c0, bare, cell, True, h_mask))
    projected = [wants_grad(*s, device=device) for s in ((20, 3), (20, 2), (20,), (20,), (2, 5))]
    states = wants_grad(1, 2, 2, device=device), wants_grad(1, 2, 5, device=device)
    x = wants_grad(4, 2, 3, device=device)
    samples.append((x, None, *states, projected, "lstm", True, None))
    samples.append((x, None, *states, projected, "lstm", True, torch.randn_like(states[0])))
    return samples


def bag_samples(device: str) -> list[tuple[Any, ...]]:
    """Arguments of `embedding_bag`."""
    table = wants_grad(10, 4, device=device)
    ids = torch.tensor([[1, 2, 3], [1, 0, 9]], device=device)
    offsets = torch.tensor([0, 2, 2, 6], device=device)
    factors = wants_grad(2, 3, device=device)
    samples: list[tuple[Any, ...]] = []
    for mode in ("sum", "mean", "max"):
        samples.append((table, ids, None, None, mode, 0, False, False, False))
        samples.append((table, ids.reshape(-1), offsets, None, mode, -1, True, False, False))
    samples.append((table, ids.reshape(-1).int(), offsets.int(), None, "sum", -1, False, True, False))
    samples.append((table, ids, None, factors, "sum", 1, False, False, False))
    samples.append((table, ids.reshape(-1, 1), None, None, "lookup", 1, False, False, False))
    return samples


def draw_samples(device: str) -> list[tuple[Any, ...]]:
    cumulative, guide = reference.line_of(torch.tensor([3.0, 0, 5, 1e-3, 8, 2, 0], device=device))
    targets, seed = torch.tensor([0, 4, 1, -1, 6], device=device), torch.tensor(7, device=device)
    return [(seed, cumulative, guide, targets, number) for number in (0, 1, 5)]


def backward_samples(device: str) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of the ops that are first derivatives, or made of the same, from their forward samples."""
    samples: dict[str, list[tuple[Any, ...]]] = {
        "recurrent_backward": [],
        "recurrent_states_backward": [],
        "embedding_bag_backward": [],
        "embedding_bag_sparse_backward": [],
        "embedding_dot": [],
    }
    for i, args in enumerate(recurrent_samples(device)):
        *inputs, keep, h_mask = args
        if keep:
            with torch.no_grad():
                y, h_n, c_n, workspace = OPS.recurrent(*args)
            dc_n = torch.randn_like(c_n).requires_grad_() if args[3] is not None else None
            dy, dh_n = torch.randn_like(y).requires_grad_(), (None if i % 2 else torch.randn_like(h_n).requires_grad_())
            samples["recurrent_backward"].append((dy, dh_n, dc_n, *inputs, y, workspace, i % 3 != 0, True, h_mask))
            if args[3] is not None:
                dworkspace = torch.randn_like(workspace).requires_grad_()
                samples["recurrent_states_backward"].append(
                    (dy, None, dc_n, dworkspace, *inputs, True, i % 3 != 0, h_mask)
                )
    for table, ids, offsets, factors, mode, padding, last, by_freq, _ in bag_samples(device):
        with torch.no_grad():
            output, aux = OPS.embedding_bag(table, ids, offsets, factors, mode, padding, last, by_freq, False)
        grad = torch.randn_like(output).requires_grad_()
        args = (grad, 10, ids, offsets, factors, aux, mode, padding, last, by_freq)
        samples["embedding_bag_backward"].append(args)
        samples["embedding_bag_sparse_backward"].append((grad.detach(), *args[1:4], None, *args[5:]))
        if mode == "sum":
            samples["embedding_dot"].append((grad, table, ids, offsets, padding, last, False))
    return samples


ALL_OPS = [
    "recurrent",
    "recurrent_backward",
    "recurrent_states_backward",
    "embedding_bag",
    "embedding_bag_backward",
    "embedding_bag_sparse_backward",
    "embedding_dot",
    "draw_negatives",
]
WITH_KERNELS = [name for name in ALL_OPS if name != "recurrent_states_backward"]  # which always runs reference.py


def samples_of(name: str, device: str) -> list[tuple[Any, ...]]:
    if name == "recurrent":
        return recurrent_samples(device)
    if name == "draw_negatives":
        return draw_samples(device)
    return bag_samples(device) if name == "embedding_bag" else backward_samples(device)[name]


def test_every_op_is_listed() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("nlpkernels::")
    }
    # The first changes its arguments: see test_optim.py. The last two are what ops of these names call for bfloat16.
    others = {"embedding_bag_update", "_keep_memory", "_recurrent_bfloat16", "_recurrent_bfloat16_backward"}
    of_frozen_layers = {"recurrent_frozen", "frozen"}  # see test_frozen.py
    assert registered == {*ALL_OPS, *others, *of_frozen_layers}


@pytest.mark.skipif(_ops.INSTRUCTION_SET not in _ops.OF_BFLOAT16, reason="this machine does not multiply bfloat16")
def test_ops_of_bfloat16_take_nothing_else() -> None:
    for name in ("recurrent", "recurrent_backward"):
        op = getattr(OPS, f"_{name.replace('recurrent', 'recurrent_bfloat16')}").default
        for sample in samples_of(name, "cpu")[:2]:
            with pytest.raises(RuntimeError, match="not implemented for 'Float'"):
                op(*sample)
            halves = torch.utils._pytree.tree_map_only(
                Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, sample
            )
            results = torch.utils._pytree.tree_leaves((op(*halves), getattr(OPS, name)(*halves)))
            half = len(results) // 2
            assert all(map(torch.equal, results[:half], results[half:]))


# The modes of opcheck cannot look into the torch.func of reference.py.
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_opcheck(name: str, device: str) -> None:
    """Schema, registrations, fake kernels, and derivatives under AOTAutograd with dynamic shapes."""
    # It compares two calls bit for bit, with memory that differs; poison would be the same for both.
    torch.use_deterministic_algorithms(False)
    op = getattr(OPS, name).default
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for args in samples_of(name, device):
        if "backward" in name:  # of which torch.compile takes no further derivative, so there is none to trace
            torch.library.opcheck(op, args, test_utils=tests[:-1])
            args = tree_map_only(Tensor, Tensor.detach, args)
        torch.library.opcheck(op, args, test_utils=tests)


def test_fake_kernel_of_states_backward(device: str) -> None:
    for args in samples_of("recurrent_states_backward", device):
        real = OPS.recurrent_states_backward(*args)
        with FakeTensorMode() as mode:
            fake = OPS.recurrent_states_backward(*tree_map_only(Tensor, mode.from_tensor, args))
        for a, b in zip(tree_leaves(fake), tree_leaves(real), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("name", ALL_OPS)
@pytest.mark.usefixtures("doubles")
def test_reference_agrees(name: str, device: str) -> None:
    """reference.py gives what the kernels give: all outputs, their shapes and dtypes, the workspace too."""
    for args in samples_of(name, device):
        with torch.no_grad():
            got, expected = getattr(OPS, name)(*args), getattr(reference, name)(*args)
        for a, b in zip(*(tree_leaves(r) for r in (got, expected)), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


def test_forgotten_workspace_is_made_again() -> None:
    """An op called without keep still has its derivatives."""
    for x, batch_sizes, h0, c0, weights, cell, _, h_mask in recurrent_samples("cpu"):
        grads = []
        for keep in (True, False):
            y = OPS.recurrent(x, batch_sizes, h0, c0, weights, cell, keep, h_mask)[0]
            grads.append(torch.autograd.grad(y.sin().sum(), [x, *weights[:2]]))
        assert all(map(torch.equal, *grads))


def of_some(name: str, args: tuple[Any, ...], places: list[int]) -> Callable[..., list[Tensor]]:
    """The differentiable outputs of a function with an op's arguments, given it and the flat arguments at `places`."""
    values, spec = tree_flatten(args)

    def outputs(function: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
        given = dict(zip(places, tensors, strict=True))
        results = tree_leaves(function(*tree_unflatten([given.get(i, v) for i, v in enumerate(values)], spec)))
        if name == "recurrent" and args[3] is None:
            del results[3]  # a workspace without cell states, which only backward reads, has no derivative
        return [result for result in results if result.is_floating_point() and result.numel() > 0]

    return outputs


@pytest.mark.parametrize(
    "name", [name for name in WITH_KERNELS if name not in ("embedding_bag_sparse_backward", "draw_negatives")]
)
@pytest.mark.usefixtures("doubles")
def test_forward_mode_of_ops(name: str) -> None:
    """Called by themselves, with duals or under torch.func.jvp, they carry tangents along as reference.py does."""
    op = getattr(OPS, name)
    for sample in samples_of(name, "cpu")[::4]:
        args = tree_map_only(Tensor, Tensor.detach, sample)
        # What backward saved is a function of the other arguments, and h_mask is constant.
        constant = {"recurrent": args[-1:], "recurrent_backward": (*args[9:11], args[-1])}.get(name, ())
        values = tree_leaves(args)
        places = [
            i
            for i, value in enumerate(values)
            if isinstance(value, Tensor) and value.is_floating_point() and not any(value is c for c in constant)
        ]
        outputs = of_some(name, args, places)
        start = tuple(values[i] for i in places)
        along = tuple(map(torch.randn_like, start))
        _, expected = torch.func.jvp(partial(outputs, getattr(reference, name)), start, along)
        _, got = torch.func.jvp(partial(outputs, op), start, along)
        torch.testing.assert_close(got, expected)
        with fwAD.dual_level():
            duals = outputs(op, *map(fwAD.make_dual, start, along))
            torch.testing.assert_close([fwAD.unpack_dual(d).tangent for d in duals], expected)


# --- Hostile calls ---------------------------------------------------------------------------------------------------

UPDATE = "embedding_bag_update"
HARMLESS = "harmless"  # in the name of a change after which the call gives what it gave


def update_samples() -> list[tuple[Any, ...]]:
    """Arguments of `embedding_bag_update`, one call for each rule."""
    samples = []
    ids, none = torch.tensor([[1, 2, 3], [1, 0, 9]]), torch.empty(0, dtype=torch.long)
    for rule, shapes, settings in (
        ("sgd", [], [0.1]),
        ("rowwise_adagrad", [(10,)], [0.1, 1e-3]),
        ("adagrad", [(10, 4)], [0.1, 1e-3]),
        ("adam", [(10, 4)] * 2, [0.1, 1e-3, 0.9, 0.99]),
    ):
        first, second, *_ = (*(torch.rand(shape) for shape in shapes), None, None)
        factors = torch.rand(2, 3) if rule == "adam" else None
        tensors = (torch.randn(2, 4), torch.randn(10, 4), first, second, ids, None, factors, none)
        samples.append((*tensors, "sum", 0, False, True, rule, settings))
    return samples


def plain_samples(name: str) -> list[tuple[Any, ...]]:
    """Some valid calls of an op, of tensors that require no gradient."""
    if name == UPDATE:
        return update_samples()
    samples = samples_of(name, "cpu")
    few = 1 if name == "recurrent_states_backward" else 4  # reference.py takes its time
    kept = [*samples[: -1 : max(1, len(samples) // few)], samples[-1]]
    return [tree_map_only(Tensor, Tensor.detach, args) for args in kept]


def without_storage(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def strange_tensors(tensor: Tensor) -> dict[str, Any]:
    """What a caller may pass in the place of a tensor: name -> how it is made, as some cannot be made of every one."""
    shape, dims = tensor.shape, tensor.dim()
    one = tensor.new_ones(())
    strange: dict[str, Any] = {
        f"{HARMLESS} strides": lambda: tensor.new_empty_strided(shape, [s * 2 for s in tensor.stride()]).copy_(tensor),
        f"{HARMLESS} reversed strides": lambda: (
            tensor.permute(*range(dims)[::-1]).contiguous().permute(*range(dims)[::-1])
        ),
        f"{HARMLESS} negated view": lambda: torch._neg_view(-tensor),
        "expanded": lambda: one.expand(shape),
        "overlapping": lambda: tensor.flatten().repeat(2).as_strided(shape, [1] * dims),
        "meta": lambda: tensor.to("meta"),
        "sparse": tensor.to_sparse,
        "sparse rows": tensor.to_sparse_csr,
        "mkldnn": tensor.to_mkldnn,
        "quantized": lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
        "nested": lambda: torch.nested.nested_tensor([tensor, tensor]),
        "zeros that are not there": lambda: torch._efficientzerotensor(shape, dtype=tensor.dtype),
        "scalar": lambda: one,
        "flat": lambda: tensor.reshape(-1),
        "one more": lambda: tensor.unsqueeze(0),
        "empty": lambda: tensor.new_empty(0),
        "empty rows": lambda: tensor[:0],
        "empty columns": lambda: tensor[..., :0],
        "short": lambda: tensor[:-1],
        "narrow": lambda: tensor[..., :-1],
        "long": lambda: torch.cat([tensor, tensor[:1]]),
        "wide": lambda: torch.cat([tensor, tensor[..., :1]], -1),
        "huge": lambda: one.expand(2**50, *shape[1:]),
        "huge and empty": lambda: tensor.new_empty(2**40, 2**21, 0),
        "huge and empty rows": lambda: tensor.new_empty(*shape[:-1], 0)[:0].expand(0, *[2**20] * (dims - 1)),
        "wide rows": lambda: one.expand(*shape[:-1], 2**50),
        "none": lambda: None,
        "a string": lambda: "sum",
        "a number": lambda: 1,
        "a list": lambda: [tensor],
        "its storage is gone": lambda: without_storage(tensor),
        "derivative": lambda: tensor.clone().requires_grad_(),
        "inference": lambda: inference_copy(tensor),
    }
    for dtype in (torch.float16, torch.float64, torch.complex64, torch.int32, torch.int8, torch.bool):
        strange[str(dtype)] = lambda dtype=dtype: tensor.to(dtype)
    strange["float8"] = lambda: tensor.float().to(torch.float8_e4m3fn)
    fills = (float("nan"), float("inf"), -1e30) if tensor.is_floating_point() else (-1, 1, 2**31 - 1, -(2**63), 2**40)
    for fill in fills:
        strange[f"full of {fill}"] = lambda fill=fill: torch.full_like(tensor, fill)
    if not tensor.is_floating_point():
        strange["backwards"] = lambda: tensor.flip(0)
        strange["one too many"] = lambda: tensor + 1
    return strange


def inference_copy(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def strange_values(value: Any, kind: str) -> dict[str, Any]:
    """The same of any argument, by the type that its schema says."""
    numbers = (-(2**63), -5, -1, 0, 1, 2**31, 2**40, 2**62, 2**62 + 2**24, 2**63 - 1, 2**64, 1.5, "1", None)
    strings = ("", "SUM", "sum", "mean", "max", "lookup", "lstm", "gru\0", "rnn_relu", "x" * 1000, "adam", 1, None)
    floats: tuple[Any, ...] = ([], [float("nan")] * 4, [float("nan"), 1.0], [1.0], [1.0] * 5, [float("inf")] * 2, None)
    if isinstance(value, Tensor):
        return strange_tensors(value)
    if kind == "List[Tensor]":
        strange: dict[str, Any] = {
            "no list": lambda: None,
            "empty list": list,
            "shorter": lambda: value[:-1],
            "longer": lambda: [*value, value[-1]],
            "twice": lambda: [*value, *value],
            "one": lambda: value[:1],
            "backwards": lambda: value[::-1],
        }
        for i, own in enumerate(value):
            for name, make in strange_tensors(own).items():
                strange[f"[{i}] {name}"] = lambda i=i, make=make: [*value[:i], make(), *value[i + 1 :]]
        return strange
    choices: dict[str, tuple[Any, ...]] = {
        "int": numbers, "bool": (not value, None, "x", 2**70), "str": strings, "List[float]": floats,
        "Optional[Tensor]": (torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([2, 1]), torch.ones(10, 4), 1, "x"),
    }  # fmt: skip
    return {str(choice)[:20]: lambda choice=choice: choice for choice in choices.get(kind, numbers)}


def hostile_calls(name: str) -> Iterator[tuple[str, tuple[Any, ...], tuple[Any, ...]]]:
    """Valid calls of an op in which one argument has been changed: what was, the valid call and the changed one."""
    arguments = getattr(OPS, name).default._schema.arguments
    for sample, args in enumerate(plain_samples(name)):
        for place, argument in enumerate(arguments):
            for what, make in strange_values(args[place], str(argument.type)).items():
                try:
                    changed = make()
                except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError, OverflowError):
                    continue  # torch has no such tensor
                yield (
                    f"call {sample}, {argument.name}: {what}",
                    args,
                    (*args[:place], changed, *args[place + 1 :]),
                )


def bits(args: Any) -> list[Tensor]:
    """The bytes of all tensors of a call that have some to be compared."""
    leaves = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
    few = [t for t in leaves if not (t.is_meta or t.is_quantized or t.is_nested) and t.numel() < 2**20]
    there = [t.detach() for t in few if t.numel() > 0 and t.untyped_storage().nbytes() > 0]
    return [t.resolve_neg().reshape(-1).clone().view(torch.uint8) for t in there]


def error_of(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What a call returns, and the error that it raises, of the kinds that a caller may expect.

    A MemoryError is that of sizes that are in order, but too large for any machine.
    """
    try:
        return call(), None
    except (ValueError, RuntimeError, TypeError, IndexError, MemoryError) as error:
        return None, error


@pytest.mark.filterwarnings("ignore")  # of torch, about the tensors that are made here
@pytest.mark.parametrize("name", [*ALL_OPS, UPDATE])
def test_hostile_calls(name: str) -> None:
    """Whatever one argument is, an op raises and leaves all tensors as they were, or it is a call like any other."""
    torch.use_deterministic_algorithms(False)  # or memory of any size would be filled with NaN
    op, counts = getattr(OPS, name), Counter[str]()
    for what, args, changed in hostile_calls(name):
        if name == UPDATE:  # each call on tables of its own
            changed = tuple(
                a.clone() if isinstance(a, Tensor) and a is b and 1 <= i <= 3 else a
                for i, (a, b) in enumerate(zip(changed, args, strict=True))
            )
        before = bits(changed)
        result, error = error_of(lambda changed=changed: op(*changed))
        counts["raised" if error else "returned"] += 1
        if error or name != UPDATE:
            after = bits(changed)
            assert all(map(torch.equal, before, after)), f"{what}: changed a tensor, and raised {error!r}"
        if HARMLESS in what and not (name == UPDATE and ("contiguous" in str(error) or "negated" in str(error))):
            assert error is None, f"{what}: {error!r}"
            if name != UPDATE:
                for a, b in zip(tree_leaves(result), tree_leaves(op(*args)), strict=True):
                    torch.testing.assert_close(a, b, msg=lambda text, what=what: f"{what}: {text}")
    assert counts["raised"] > 100
    assert counts["returned"] > 10


def update(weight: Tensor, **changes: Any) -> None:
    """A step of SGD at a rate of 5 for row 1 of a table [V, 2]."""
    arguments: dict[str, Any] = dict(
        grad=torch.ones(1, 2), first=None, second=None, indices=torch.tensor([[1]]), offsets=None,
        per_sample_weights=None, aux=torch.empty(0, dtype=torch.long), pooling="sum", padding_idx=-1,
        include_last_offset=False, scale_grad_by_freq=False, rule="sgd", settings=[5.0],
    )  # fmt: skip
    OPS.embedding_bag_update(**{**arguments, "weight": weight, **changes})


def test_update_is_seen_by_autograd() -> None:
    """A tensor that was saved for backward and then updated is found out; the states' versions go up as well."""
    weight = torch.ones(4, 2, requires_grad=True)
    y = (weight * weight).sum()
    update(weight.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    table, first, second = (torch.ones(4, 2) for _ in range(3))
    update(table, first=first, second=second, rule="adam", settings=[0.1, 1e-3, 0.9, 0.99])
    assert [t._version for t in (table, first, second)] == [1, 1, 1]
    with torch.inference_mode():
        table = torch.ones(4, 2)
        update(table)
    assert table[1].tolist() == [-4, -4]
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        update(table)
    assert table[1].tolist() == [-4, -4]


@pytest.mark.parametrize("argument", ["weight", "grad", "first", "per_sample_weights"])
def test_update_has_no_derivative(argument: str) -> None:
    good = {"weight": torch.ones(4, 2), "grad": torch.ones(1, 2), "per_sample_weights": torch.ones(1, 1)}
    good |= {"first": torch.ones(4, 2)}
    own = {**good, argument: good[argument].requires_grad_()}
    before = own["weight"].detach().clone()
    with pytest.raises(NotImplementedError, match=f"no derivative: expected {argument} that requires no gradient"):
        update(**own, rule="adagrad", settings=[0.1, 1e-3])
    assert torch.equal(own["weight"], before)
    with torch.no_grad():
        update(**own, rule="adagrad", settings=[0.1, 1e-3])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="expected weight"):
        update(torch.autograd.forward_ad.make_dual(torch.ones(4, 2), torch.ones(4, 2)))


def test_update_wants_memory_of_its_own() -> None:
    memory = torch.ones(20)
    table, rule = memory[:8].view(4, 2), {"rule": "adagrad", "settings": [0.1, 1e-3]}
    for change, message in [
        ({"first": memory[7:15].view(4, 2), **rule}, "expected weight and first in memory of their own"),
        ({"grad": memory[6:8].view(1, 2)}, "expected weight and grad in"),
        ({"grad": memory[16:18].view(1, 2), "first": memory[10:18].view(4, 2), **rule}, "expected first and grad in"),
        ({"per_sample_weights": memory[:1].view(1, 1)}, "expected weight and per_sample_weights in"),
    ]:
        with pytest.raises(ValueError, match=message):
            update(table, **change)
    assert bool((memory == 1).all())
    update(table, first=memory[8:16].view(4, 2), grad=memory[16:18].view(1, 2), **rule)  # side by side
    # A lazy copy shares memory only until one of the two changes.
    table = torch.ones(4, 2)
    grad = torch._lazy_clone(table)[:1]
    update(table, grad=grad)
    assert table[1].tolist() == [-4, -4]
    assert grad.tolist() == [[1, 1]]


def test_update_of_views_with_a_sign() -> None:
    """A gradient may be a negated view, as those of complex numbers are; torch's fallback would crash for a table."""
    table = torch.ones(4, 2)
    update(table, grad=torch._neg_view(torch.ones(1, 2)))
    assert table[1].tolist() == [6, 6]
    with pytest.raises(RuntimeError, match="expected weight to be no negated"):
        update(torch._neg_view(torch.ones(4, 2)))


def test_rows_and_columns_do_not_wrap() -> None:
    """2^62 rows times the bytes of a row are few again, if nobody looks."""
    grad, ids, none = torch.ones(1, 1), torch.tensor([[2**40]]), torch.empty(0, dtype=torch.long)
    for name in ("embedding_bag_backward", "embedding_bag_sparse_backward"):
        for rows in (2**62 + 2**24, 2**62, 2**63 - 1):
            with pytest.raises(ValueError, match="num_embeddings and columns whose product is less than"):
                getattr(OPS, name)(grad, rows, ids, None, None, none, "sum", -1, False, False)
        with pytest.raises(ValueError, match="num_embeddings of 0 or more, got -1"):
            getattr(OPS, name)(grad, -1, ids, None, None, none, "sum", -1, False, False)


def test_sizes_of_layers_do_not_wrap() -> None:
    """Tensors without elements take up no memory, whatever their sizes are."""
    for x, h0, weights in [
        (torch.empty(2**32, 2**31, 0), torch.empty(1, 2**31, 0), [torch.empty(4, 0), torch.empty(4, 0)]),
        (torch.empty(0, 0, 0), torch.empty(1, 0, 0), [torch.empty(2**60, 0), torch.empty(2**60, 0)]),
    ]:
        hidden = weights[0].shape[0] // 4
        c0, projection = torch.empty(1, 1, 1).expand(1, h0.shape[1], hidden), torch.empty(0, hidden)
        with pytest.raises(ValueError, match=r"expected .* whose product is less than 2\^54, got"):
            OPS.recurrent(x, None, h0, c0, [*weights, projection], "lstm", True, None)
    x, h0, sizes = torch.empty(0, 3), torch.empty(1).expand(1, 2**60, 5), torch.tensor([2**60] * 16)
    weights = [torch.empty(5, 3), torch.empty(5, 5)]
    with pytest.raises(RuntimeError, match="sum of batch_sizes"):
        OPS.recurrent(x, sizes, h0, None, weights, "rnn_tanh", False, None)


@pytest.mark.parametrize("name", [*ALL_OPS, UPDATE])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_none_is_no_tensor(name: str, device: str) -> None:
    args = [a.to("meta") if isinstance(a, Tensor) and device == "meta" else a for a in plain_samples(name)[0]]
    for i, argument in enumerate(getattr(OPS, name).default._schema.arguments):
        if str(argument.type) == "Tensor":
            named = "weight" if argument.name == "grad" else argument.name  # whose dtype kernels name so
            with pytest.raises(
                (TypeError, ValueError, RuntimeError),
                match=rf"(embedding|recurrent|draw).*: .*({argument.name}|{named})",
            ):
                getattr(OPS, name)(*args[:i], None, *args[i + 1 :])


def test_storages_that_shrank() -> None:
    """torch.clone would crash for such an index."""
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    offsets.untyped_storage().resize_(4)
    ids, table = torch.tensor([1, 2, 3]), torch.ones(4, 2)
    with pytest.raises(RuntimeError, match="expected offsets with memory for all of its values, got a storage of 4"):
        OPS.embedding_bag(table, ids, offsets, None, "sum", -1, False, False, False)
    table.untyped_storage().resize_(24)
    with pytest.raises(RuntimeError, match="expected weight with memory"):
        OPS.embedding_bag(table, ids[None], None, None, "sum", -1, False, False, False)


def test_tensors_without_data_are_refused() -> None:
    """In every op, beside floating tensors that have data; all without data is what layers on the meta device are."""
    for name in [*ALL_OPS, UPDATE]:
        arguments = getattr(OPS, name).default._schema.arguments
        for args in plain_samples(name):
            if name != "embedding_bag_sparse_backward":  # how many rows there are is in the data
                getattr(OPS, name)(*tree_map_only(Tensor, to_meta, args))
            floating = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_floating_point()]
            for i, argument in enumerate(arguments):
                if isinstance(args[i], Tensor) and any(t is not args[i] for t in floating):
                    with pytest.raises(RuntimeError, match=f"{name}: expected .* on cpu like .*, got meta"):
                        getattr(OPS, name)(*args[:i], args[i].to("meta"), *args[i + 1 :])
                    if args[i].is_floating_point():
                        others = tree_map_only(Tensor, to_meta, args)
                        with pytest.raises(RuntimeError, match=f"on cpu like {argument.name}, got meta"):
                            getattr(OPS, name)(*others[:i], args[i], *others[i + 1 :])


def to_meta(tensor: Tensor) -> Tensor:
    """Sizes of batches are read, and stay."""
    return tensor.to("meta") if tensor.is_floating_point() else tensor


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_instruction_set_can_be_forced() -> None:
    done = run("from nlpkernels import _ops; print(_ops.INSTRUCTION_SET)", NLPKERNELS_CPU="default")
    assert done.stdout.strip() == "default"
    done = run("import nlpkernels", NLPKERNELS_CPU="sse9")
    assert done.returncode != 0
    assert "NLPKERNELS_CPU is 'sse9', expected one of default" in done.stderr


def test_switch_of_cuda_is_checked() -> None:
    done = run("import nlpkernels", NLPKERNELS_CUDA="yes")
    assert done.returncode != 0
    assert "NLPKERNELS_CUDA is 'yes', expected 0, 1 or nothing" in done.stderr


def test_instruction_set_follows_torch() -> None:
    done = run(
        "from nlpkernels import _ops; print(_ops.INSTRUCTION_SET)", ATEN_CPU_CAPABILITY="default", NLPKERNELS_CPU=""
    )
    assert done.stdout.strip() == "default"


def test_report() -> None:
    done = subprocess.run([sys.executable, "-m", "nlpkernels"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for fact in ("nlpkernels", torch.__version__, _ops.INSTRUCTION_SET, "CUDA", "threads"):
        assert fact in done.stdout


def test_public_names() -> None:
    assert set(nlpkernels.__all__) == {
        "RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "Embedding", "EmbeddingBag", "functional", "convert",
        "revert", "freeze", "optim", "NegativeSampling",
    }  # fmt: skip


def test_second_derivatives_read_no_memory_that_is_gone() -> None:
    ids, table = torch.randint(100, (50, 4)), torch.randn(100, 8, requires_grad=True)
    pooled = nlpkernels.functional.embedding_bag(ids, table, mode="sum")
    (gradient,) = torch.autograd.grad(pooled.square().sum(), table, create_graph=True)
    ids.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory for all of its values"):
        gradient.square().sum().backward()


def test_derivatives_of_states_read_no_memory_that_is_gone() -> None:
    x, h = torch.randn(4, 5, 30), torch.zeros(1, 5, 5)
    x.untyped_storage().resize_(8)
    weights = [torch.randn(20, 30), torch.randn(20, 5)]
    with pytest.raises(RuntimeError, match="expected x with memory"):
        torch.ops.nlpkernels.recurrent_states_backward(
            None, None, None, torch.randn(1, 20, 5, 5), x, None, h, h, weights, "lstm", True, True, None
        )


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("gone", ["input", "per_sample_weights"])
def test_weighted_bags_read_no_memory_that_is_gone(mode: str, gone: str) -> None:
    ids, factors = torch.randint(100, (50, 4)), torch.rand(50, 4)
    (ids if gone == "input" else factors).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"expected {gone} with memory"):
        nlpkernels.functional.embedding_bag(ids, torch.randn(100, 8), mode=mode, per_sample_weights=factors)
