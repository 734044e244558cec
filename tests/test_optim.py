"""Optimizers in backward against torch.optim's on the coalesced sparse gradient."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FEW, FLOOR, relative_error
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import nlpkernels
from nlpkernels import _ops, optim

V, E = 50, 19
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {},
    "Adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-6},
    "RowWiseAdagrad": {"initial_accumulator_value": 0.2, "eps": 1e-6},
    "SparseAdam": {"betas": (0.8, 0.95), "eps": 0.1},  # or the rounding of a gradient near 0 is divided by its size
}


class RowWiseAdagrad(torch.optim.Optimizer):
    """The definition, in plain torch: one sum of mean squares a row."""

    def __init__(self, params: Any, lr: float, initial_accumulator_value: float, eps: float) -> None:
        super().__init__(params, {"lr": lr, "start": initial_accumulator_value, "eps": eps})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                total = self.state[p].setdefault("sum", torch.full_like(p[:, 0], group["start"]))
                g = p.grad.to_dense()
                total += g.square().mean(1)
                p.data -= group["lr"] * g / (total.sqrt() + group["eps"]).unsqueeze(1)


def make(name: str, device: str, dtype: torch.dtype = torch.float32, mode: str = "mean", **options: Any) -> Any:
    """The same table in a layer of torch's with the unfused optimizer, and in one of ours with the fused one."""
    dense = mode == "max" or name == "RowWiseAdagrad"
    theirs = nn.EmbeddingBag(V, E, mode=mode, sparse=not dense, device=device, dtype=dtype, **options)
    ours = nlpkernels.EmbeddingBag(V, E, mode=mode, device=device, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    settings = {"lr": 0.1, **SETTINGS[name]}
    unfused = RowWiseAdagrad if name == "RowWiseAdagrad" else getattr(torch.optim, name)
    return theirs, unfused(theirs.parameters(), **settings), ours, getattr(optim, name)(ours.parameters(), **settings)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, *batch: Any, cotangent: Tensor) -> None:
    optimizer.zero_grad()
    module(*batch).backward(cotangent)
    if module.weight.grad is not None and type(module.weight.grad) is Tensor and module.weight.grad.is_sparse:
        module.weight.grad = module.weight.grad.coalesce()
    optimizer.step()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_unfused_optimizer(name: str, dtype: torch.dtype, device: str) -> None:
    """Rows that occur several times, rows that never do, padding, a learning rate that a scheduler changes."""
    theirs, unfused, ours, fused = make(name, device, dtype, padding_idx=3)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (unfused, fused)]
    for _ in range(5):
        ids, cotangent = torch.randint(V // 2, (6, 7), device=device), torch.randn(6, E, device=device, dtype=dtype)
        before = ours.weight.detach().clone()
        train(theirs, unfused, ids, cotangent=cotangent)
        train(ours, fused, ids, cotangent=cotangent)
        for scheduler in schedulers:
            scheduler.step()
        torch.testing.assert_close(ours.weight, theirs.weight)
        assert not torch.equal(ours.weight, before)
        assert torch.equal(ours.weight[V // 2 :], before[V // 2 :])
        assert torch.equal(ours.weight[3], before[3])
    assert fused.param_groups[0]["lr"] == 0.1 * 0.25


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_modes_and_offsets(mode: str, device: str) -> None:
    theirs, unfused, ours, fused = make("Adagrad", device, mode=mode)
    ids, offsets = torch.randint(V, (30,), device=device), torch.tensor([0, 0, 11, 30], device=device)
    for _ in range(2):
        cotangent = torch.randn(4, E, device=device)
        train(theirs, unfused, ids, offsets, cotangent=cotangent)
        train(ours, fused, ids.int(), offsets, cotangent=cotangent)
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("name", SETTINGS)
def test_uses_of_one_backward_pass_are_summed(name: str, device: str) -> None:
    """A table used twice in a graph, as Embedding with per_sample_weights too, gets one update."""
    theirs, unfused, ours, fused = make(name, device, mode="sum")
    a, b = (torch.randint(V, (4, 5), device=device) for _ in range(2))
    for module, optimizer in ((theirs, unfused), (ours, fused)):
        functional = nn.functional if module is theirs else nlpkernels.functional
        sparse = theirs.sparse
        looked_up = functional.embedding(b, module.weight, sparse=sparse and module is theirs)
        (module(a).square().sum() + looked_up.pow(3).sum()).backward()
        if sparse and module is theirs:
            module.weight.grad = module.weight.grad.coalesce()
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_per_sample_weights_have_their_gradient(device: str) -> None:
    theirs, unfused, ours, fused = make("SGD", device, torch.float64, mode="sum")
    ids, factors = torch.randint(V, (4, 5), device=device), torch.rand(4, 5, dtype=torch.float64, device=device)
    gradients = []
    for module, optimizer in ((theirs, unfused), (ours, fused)):
        own = factors.clone().requires_grad_()
        module(ids, None, own).square().sum().backward()
        optimizer.step()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Adagrad", "SparseAdam"])
def test_half_tables_have_float32_states(name: str, dtype: torch.dtype, device: str) -> None:
    _, _, ours, fused = make(name, device, dtype)
    exact = nlpkernels.EmbeddingBag(V, E, _weight=ours.weight.detach().float().clone())
    reference = getattr(optim, name)(exact.parameters(), lr=0.1, **SETTINGS[name])
    ids = torch.randint(V, (6, 7), device=device)
    ours(ids).float().sum().backward()
    exact(ids).sum().backward()
    assert relative_error(ours.weight, exact.weight) <= FLOOR[dtype]
    twin = nlpkernels.EmbeddingBag(V, E, dtype=dtype, device=device)
    loaded = getattr(optim, name)(twin.parameters())
    loaded.load_state_dict(fused.state_dict())
    for a, b, c in zip(*(o.state_dict()["state"][0].values() for o in (fused, loaded, reference)), strict=True):
        assert a.dtype == b.dtype == c.dtype == torch.float32
        assert torch.equal(a, b)
        assert relative_error(a, c) <= FLOOR[torch.float32]


@pytest.mark.parametrize("name", SETTINGS)
def test_goes_on_from_a_state_dict(name: str, device: str) -> None:
    """Saved, loaded into a new optimizer, trained on: bit for bit as without the break."""
    _, _, ours, fused = make(name, device)
    batches = [torch.randint(V, (6, 7), device=device) for _ in range(4)]
    for ids in batches[:2]:
        ours(ids).square().sum().backward()
    twin = copy.deepcopy(ours)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    other = getattr(optim, name)(twin.parameters())
    other.load_state_dict(torch.load(file))
    for ids in batches[2:]:
        for module in (ours, twin):
            module(ids).square().sum().backward()
    assert torch.equal(ours.weight, twin.weight)


@pytest.mark.parametrize("name", ["Adagrad", "SparseAdam"])
def test_goes_on_from_the_unfused_state(name: str, device: str) -> None:
    theirs, unfused, ours, fused = make(name, device)
    ids, cotangent = torch.randint(V, (6, 7), device=device), torch.randn(6, E, device=device)
    train(theirs, unfused, ids, cotangent=cotangent)
    ours.load_state_dict(theirs.state_dict())
    fused.load_state_dict(unfused.state_dict())
    for module, optimizer in ((theirs, unfused), (ours, fused)):
        train(module, optimizer, ids, cotangent=cotangent)
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("name", SETTINGS)
def test_bits_do_not_depend_on_threads(name: str, restored_threads: None) -> None:
    table, ids, runs = torch.randn(700, 64), torch.randint(700, (300, 40)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        bag = nlpkernels.EmbeddingBag.from_pretrained(table.clone(), freeze=False)
        optimizer = getattr(optim, name)(bag.parameters(), lr=0.1)
        bag(ids).square().sum().backward()
        runs.append([bag.weight.detach(), *optimizer.state_dict()["state"].get(0, {}).values()])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_refuses_torch_func(device: str) -> None:
    _, _, bag, _ = make("SGD", device)
    with refusing("cannot be used in torch.func"):
        torch.func.vmap(bag)(torch.randint(V, (3, 6, 7), device=device))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", SETTINGS)
def test_goes_on_from_a_copy(name: str, how: Any, device: str) -> None:
    """The optimizer itself, with its table, copied or unpickled in the midst of training."""
    _, _, ours, fused = make(name, device)
    batches = [torch.randint(V, (6, 7), device=device) for _ in range(2)]
    ours(batches[0]).square().sum().backward()
    twin, other = how((ours, fused))
    before = twin.weight.detach().clone()
    for module, optimizer in ((ours, fused), (twin, other)):
        module(batches[1]).square().sum().backward()
        optimizer.step()
    assert torch.equal(ours.weight, twin.weight)
    assert not torch.equal(twin.weight, before)


@pytest.mark.parametrize("to", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Adagrad", "RowWiseAdagrad", "SparseAdam"])
def test_state_goes_to_a_table_of_another_dtype(name: str, to: torch.dtype, device: str) -> None:
    """As the states of a table of that dtype are: float64 for float64, else float32, so that nothing is lost."""
    _, _, ours, fused = make(name, device, mode="sum")
    ids = torch.randint(V, (6, 7), device=device)
    # Gradients that no rounding touches: the two tables' steps are the same.
    cotangents = torch.randint(1, 9, (2, 6, E), device=device) / 8
    ours(ids).backward(cotangents[0])
    with torch.no_grad():
        ours.weight.copy_(ours.weight.to(to))
    twin = nlpkernels.EmbeddingBag(V, E, mode="sum", _weight=ours.weight.detach().to(to, copy=True))
    other = getattr(optim, name)(twin.parameters())
    other.load_state_dict(fused.state_dict())
    wide = torch.float64 if to == torch.float64 else torch.float32
    for key in fused.states:
        state = other.state[twin.weight][key]
        assert state.dtype == wide
        assert torch.equal(state, fused.state[ours.weight][key].to(wide))
    for module in (ours, twin):
        module(ids).backward(cotangents[1].to(module.weight.dtype))
    assert other.state[twin.weight]["step"] == 2
    assert relative_error(twin.weight, ours.weight) <= max(FLOOR[to], FLOOR[torch.float32])


def test_settings_that_a_scheduler_changes(device: str) -> None:
    """OneCycleLR moves the learning rate and, of Adam, beta1 at every step."""
    theirs, unfused, ours, fused = make("SparseAdam", device)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=6) for o in (unfused, fused)]
    seen = set()
    for _ in range(5):
        ids, cotangent = torch.randint(V, (6, 7), device=device), torch.randn(6, E, device=device)
        train(theirs, unfused, ids, cotangent=cotangent)
        train(ours, fused, ids, cotangent=cotangent)
        for scheduler in schedulers:
            scheduler.step()
        seen.add((fused.param_groups[0]["lr"], fused.param_groups[0]["betas"]))
        torch.testing.assert_close(ours.weight, theirs.weight)
    assert len(seen) == 5


@pytest.mark.parametrize("name", SETTINGS)
def test_empty_batches(name: str, device: str) -> None:
    """They change no row, and count as a step where the unfused optimizer's do."""
    theirs, unfused, ours, fused = make(name, device, mode="sum", padding_idx=3)
    nothing = torch.empty(0, dtype=torch.long, device=device)
    before = ours.weight.detach().clone()
    for batch in (
        (nothing.reshape(0, 4),),
        (nothing.reshape(2, 0),),
        (nothing, torch.zeros(2, dtype=torch.long, device=device)),
        (torch.full((2, 4), 3, device=device),),
    ):
        bags = ours(*batch).shape[0]
        train(ours, fused, *batch, cotangent=torch.ones(bags, E, device=device))
        if len(batch) == 1 and batch[0].shape[1] == 0:  # torch refuses that one (2.13)
            batch = (nothing, torch.zeros(2, dtype=torch.long, device=device))
        train(theirs, unfused, *batch, cotangent=torch.ones(bags, E, device=device))
        assert torch.equal(ours.weight, before)
    if name in ("Adagrad", "SparseAdam"):
        assert fused.state[ours.weight]["step"] == unfused.state[theirs.weight]["step"] == 4
    ids, cotangent = torch.randint(V, (6, 7), device=device), torch.randn(6, E, device=device)
    train(theirs, unfused, ids, cotangent=cotangent)
    train(ours, fused, ids, cotangent=cotangent)
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_only_what_backward_accumulates_is_applied(device: str) -> None:
    """As a gradient would be added to table.grad: not for other inputs, not of a frozen table."""
    _, _, bag, _ = make("SGD", device, mode="sum")
    ids, factors = torch.randint(V, (4, 5), device=device), torch.rand(4, 5, device=device, requires_grad=True)
    before = bag.weight.detach().clone()
    torch.autograd.grad(bag(ids, None, factors).sum(), factors)
    bag(ids, None, factors).sum().backward(inputs=[factors])
    with refusing("expected backward"):
        torch.autograd.grad(bag(ids, None, factors).sum(), bag.weight)
    frozen_later = bag(ids, None, factors).sum()
    bag.weight.requires_grad_(False)
    assert not bag(ids).requires_grad
    bag(ids, None, factors).sum().backward()
    frozen_later.backward()
    assert torch.equal(bag.weight, before)
    bag.weight.requires_grad_(True)
    bag(ids, None, factors).sum().backward(inputs=[bag.weight])
    assert not torch.equal(bag.weight, before)


@pytest.mark.parametrize("name", ["Adagrad", "SparseAdam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_are_counted_whatever_the_default_dtype(name: str, dtype: torch.dtype) -> None:
    """In bfloat16 a count ends at 256, in float16 at 2048."""
    table = nn.Parameter(torch.ones(4, 2))
    optimizer = getattr(optim, name)([table], lr=0.01)
    torch.set_default_dtype(dtype)
    try:
        nlpkernels.functional.embedding(torch.tensor([1]), table).sum().backward()
        optimizer.state[table]["step"].fill_(4098)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        nlpkernels.functional.embedding(torch.tensor([1]), table).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[table]["step"] == 4099
    saved["state"][0]["step"] = 4099  # a number, as torch's SparseAdam has it
    with torch.device("meta"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[table]["step"] == 4099


def test_hooks_of_load_state_dict() -> None:
    """The first ones change, or unwrap, what is loaded; the last ones see it, and may change it."""
    table = nn.Parameter(torch.ones(4, 2))
    optimizer = optim.SparseAdam([table], lr=0.01)
    nlpkernels.functional.embedding(torch.tensor([1]), table).sum().backward()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(lambda _, wrapped: wrapped["inner"])
    last = optimizer.register_load_state_dict_post_hook(lambda self: self.state[table]["exp_avg"].zero_())
    optimizer.load_state_dict({"inner": saved})
    assert not bool(optimizer.state[table]["exp_avg"].any())
    last.remove()
    optimizer.load_state_dict({"inner": saved})
    assert torch.equal(optimizer.state[table]["exp_avg"], saved["state"][0]["exp_avg"])
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


class Refuses(TorchDispatchMode):
    """A mode in which no update is to be seen."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "embedding_bag_update" in str(op):
            raise AssertionError("a mode has seen an update")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SETTINGS)
def test_modes_cannot_split_a_pass(name: str) -> None:
    tables = [nn.Parameter(torch.ones(4, 2)) for _ in range(2)]
    lookup, ids = nlpkernels.functional.embedding, torch.tensor([1])
    optimizers = [getattr(optim, name)([table], lr=0.1) for table in tables]
    with Refuses():
        (lookup(ids, tables[0]) * lookup(ids, tables[1])).sum().backward()
    assert all(bool((table[1] != 1).all()) for table in tables)
    for optimizer in optimizers:
        optimizer.zero_grad()
    before = [table.detach().clone() for table in tables]
    with torch.autograd.graph.allow_mutation_on_saved_tensors(), refusing("allow_mutation_on_saved_tensors"):
        (lookup(ids, tables[0]) * lookup(ids, tables[1])).sum().backward()
    assert all(map(torch.equal, tables, before))


@pytest.mark.parametrize("name", SETTINGS)
def test_tables_are_swapped(name: str) -> None:
    """torch may put a table's new contents into the old tensor: it is still the one that is trained."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = nlpkernels.Embedding(4, 2)
        table = module.weight
        optimizer = getattr(optim, name)([table], lr=0.1)
        for change in (module.double, lambda: module.load_state_dict({"weight": torch.ones(4, 2).double()})):
            module(torch.tensor([1])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            change()
            assert module.weight is table
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    module(torch.tensor([1])).sum().backward()
    assert table.dtype == torch.float64
    assert bool((table[1] < 1).all()) and bool((table[0] == 1).all())


def test_a_table_lives_as_long_as_its_optimizer() -> None:
    """So that no other tensor takes its place in memory, and is taken for it."""
    table = nn.Parameter(torch.ones(4, 2))
    optimizer = optim.SGD([table], lr=0.1)
    optimizer.param_groups.clear()
    there, key = weakref.ref(table), id(table)
    del table
    assert there() is not None
    assert key in _ops.UPDATED_IN_BACKWARD
    del optimizer
    gc.collect()
    assert there() is None
    assert key not in _ops.UPDATED_IN_BACKWARD


@pytest.mark.parametrize(
    "group",
    [
        {"params": [torch.zeros(2, 2).to_sparse_csr()]},
        {"params": [torch.nested.nested_tensor([torch.zeros(2, 2)])]},
        {"params": [torch.zeros(2, 2)], "momentum": torch.ones(2)},
        {"params": [torch.zeros(2)]},
    ],
    ids=["csr", "nested", "momentum", "one dimension"],
)
def test_a_group_that_fails_is_not_there(group: dict[str, Any]) -> None:
    table = nn.Parameter(torch.ones(4, 2))
    optimizer = optim.SGD([table], lr=0.1)
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer._tables) == 1
    optimizer.step()


def test_a_table_is_swapped_beside_a_loss_that_is_kept() -> None:
    bag = nlpkernels.EmbeddingBag(4, 2)
    optimizer = optim.SGD(bag.parameters(), lr=0.1)
    kept = bag(torch.tensor([[1]])).sum()
    kept.backward()
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        bag.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert bag.weight.dtype == torch.float64
    assert kept.numel() == 1


def test_states_are_shared() -> None:
    table = nn.Parameter(torch.ones(4, 2))
    optimizer = optim.Adagrad([table], lr=0.01)
    nlpkernels.functional.embedding(torch.tensor([1]), table).sum().backward()
    optimizer.share_memory()
    assert all(tensor.is_shared() for tensor in optimizer.state[table].values())


def refusing(message: str) -> Any:
    return pytest.raises(RuntimeError, match=message)


def test_refuses_what_cannot_work(device: str) -> None:
    _, _, bag, optimizer = make("SGD", device)
    ids = torch.randint(V, (6, 7), device=device)
    output = bag(ids).sum()
    output.backward(retain_graph=True)
    after = bag.weight.detach().clone()
    with refusing("second backward pass"):
        output.backward()
    with refusing("no gradient"):
        nn.utils.clip_grad_norm_(bag.parameters(), 1.0)
    with refusing("no gradient"):
        torch.optim.SGD(bag.parameters(), lr=1.0).step()
    scaler = torch.amp.GradScaler(device, init_scale=1.0)
    scaler.scale(torch.zeros((), device=device))
    with refusing("no gradient"):
        scaler.step(optimizer)
    with refusing("differentiated"):
        torch.autograd.grad(bag(ids).sum(), bag.weight, create_graph=True)
    pooled = bag(ids)
    with refusing("outside of it"), torch.no_grad():
        pooled.grad_fn(torch.ones_like(pooled))
    with refusing("closure"):
        optimizer.step(lambda: 0.0)
    assert torch.equal(bag.weight, after)
    optimizer.zero_grad()
    assert bag.weight.grad is None

    with refusing("another way"):
        (bag(ids).sum() + bag.weight.sum()).backward()
        optimizer.step()
    assert torch.equal(bag.weight, after)


def test_refuses_the_gradient_of_a_compiled_layer(device: str) -> None:
    """The compiled graph makes a gradient like any other, which step() refuses."""
    _, _, bag, optimizer = make("SGD", device)
    before = bag.weight.detach().clone()
    torch.compile(bag, backend="aot_eager")(torch.randint(V, (6, 7), device=device)).sum().backward()
    with refusing("in eager mode"):
        optimizer.step()
    assert torch.equal(bag.weight, before)


def test_a_failed_backward_pass_applies_nothing(device: str) -> None:
    _, _, bag, _ = make("Adagrad", device)
    before, ids = bag.weight.detach().clone(), torch.randint(V, (6, 7), device=device)

    x = torch.zeros(6, E, device=device, requires_grad=True)
    with pytest.raises(ArithmeticError):  # what was made last runs first: the bag, then the failure
        (Fails.apply(x) + bag(ids)).sum().backward()
    with pytest.raises(IndexError):
        bag(ids + V)
    assert torch.equal(bag.weight, before)
    bag(ids).sum().backward()
    once = make("Adagrad", device)[2:]
    once[0].load_state_dict({"weight": before})
    once[0](ids).sum().backward()
    assert torch.equal(bag.weight, once[0].weight)


class Fails(torch.autograd.Function):
    """The identity, without a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise ArithmeticError


def leaf(device: str = "cpu") -> Tensor:
    return torch.ones((), device=device, requires_grad=True)


def around(inner: Callable[[], None], x: Tensor | None = None) -> Tensor:
    """What calls `inner`, which goes backward itself, when it is gone through backward."""

    def hook(_: Tensor) -> None:
        with torch.enable_grad():
            inner()

    middle = (leaf() if x is None else x) * 1
    middle.register_hook(hook)
    return middle


def nested_hooks(module: nn.Module, ids: Tensor) -> None:
    """Passes in a pass: two beside each other, one of them with a third one in it."""

    def innermost() -> None:
        module(ids[2]).square().sum().backward()

    def first() -> None:
        (module(ids[0]).sum() + around(innermost)).backward()

    def second() -> None:
        module(ids[1]).square().sum().backward()

    (around(first) + around(second) + module(ids[3]).square().sum()).backward()


def only_in_a_hook(module: nn.Module, ids: Tensor) -> None:
    around(lambda: module(ids[0]).square().sum().backward()).backward()


def made_before(module: nn.Module, ids: Tensor) -> None:
    """The graph of the inner pass is older than the outer pass."""
    inner = module(ids[0]).square().sum()
    (around(inner.backward) + module(ids[1]).square().sum()).backward()


def within_grad(module: nn.Module, ids: Tensor) -> None:
    x = leaf()
    torch.autograd.grad(around(lambda: module(ids[0]).square().sum().backward(), x), x)


def reentrant_checkpoints(module: nn.Module, ids: Tensor) -> None:
    def run(ids: Tensor, scale: Tensor) -> Tensor:
        return module(ids).square() * scale

    def within(ids: Tensor, scale: Tensor) -> Tensor:
        return checkpoint(run, ids, scale * 2, use_reentrant=True)

    scale = leaf()
    first = checkpoint(run, ids[0], scale, use_reentrant=True)
    second = checkpoint(within, ids[1], first.mean(), use_reentrant=True)
    (first.sum() + second.sum() + module(ids[2]).sum()).backward()


def other_checkpoints(module: nn.Module, ids: Tensor) -> None:
    (checkpoint(module, ids[0], use_reentrant=False).square().sum() + module(ids[1]).sum()).backward()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "passes",
    [nested_hooks, only_in_a_hook, made_before, within_grad, reentrant_checkpoints, other_checkpoints],
    ids=lambda f: f.__name__,
)
def test_passes_within_a_pass_make_one_update(name: str, passes: Any) -> None:
    theirs, unfused, ours, fused = make(name, "cpu", torch.float64)
    for _ in range(2):
        ids = torch.randint(V, (4, 6, 7))
        for module, optimizer in ((theirs, unfused), (ours, fused)):
            optimizer.zero_grad()
            passes(module, ids)
            if module is theirs and theirs.sparse:
                theirs.weight.grad = theirs.weight.grad.coalesce()
            optimizer.step()
        torch.testing.assert_close(ours.weight, theirs.weight)
    assert all(state["step"] == 2 for state in fused.state.values())


def random_pass(depth: int = 0) -> dict[str, Any]:
    """Uses of three tables, some in checkpoints, and passes that hooks make; inner passes may fail."""
    terms: list[tuple[Any, ...]] = []
    for _ in range(int(torch.randint(1, 4, ()))):
        kind = float(torch.rand(()))
        if kind < 0.35 and depth < 4:
            terms.append(("hook", random_pass(depth + 1)))
        else:
            ids = torch.randint(V // 4, (2, int(torch.randint(1, 5, ()))))
            how = "reentrant" if kind < 0.5 else "checkpoint" if kind < 0.6 else "use"
            terms.append((how, int(torch.randint(3, ())), ids))
    return {"terms": terms, "fails": depth > 0 and float(torch.rand(())) < 0.15}


def go(plan: dict[str, Any], modules: nn.ModuleList, skips_failures: bool) -> None:
    """Make a pass. torch's optimizers would take what a failing one has left, so theirs skip it."""
    if plan["fails"] and skips_failures:
        return
    x = leaf()
    total = (Fails.apply(x) if plan["fails"] else x) * torch.zeros((), dtype=torch.float64)  # made first: it runs last
    for how, *what in plan["terms"]:
        if how == "hook":

            def inner(plan: dict[str, Any] = what[0]) -> None:
                try:
                    go(plan, modules, skips_failures)
                except ArithmeticError:
                    assert plan["fails"]

            total = total + around(inner, x)
        elif how == "use":
            total = total + modules[what[0]](what[1]).square().sum()
        else:

            def run(ids: Tensor, scale: Tensor, module: nn.Module = modules[what[0]]) -> Tensor:
                return module(ids).square() * scale

            total = total + checkpoint(run, what[1], x * 2, use_reentrant=how == "reentrant").sum()
    total.backward()


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_random_passes(name: str) -> None:
    """Two optimizers, one of them with two tables; each makes one update of each outermost pass."""
    for _ in range(40):
        both = []
        for make_layer, package in ((nlpkernels.EmbeddingBag, optim), (nn.EmbeddingBag, torch.optim)):
            options = {} if package is optim else {"sparse": True}
            bags = nn.ModuleList(make_layer(V, 3, mode="sum", dtype=torch.float64, **options) for _ in range(3))
            groups = [[bags[0].weight, bags[1].weight], [bags[2].weight]]
            both.append((bags, [getattr(package, name)(group, lr=0.1, **SETTINGS[name]) for group in groups]))
        both[1][0].load_state_dict(both[0][0].state_dict())
        for _ in range(2):
            plan = random_pass()
            for skips_failures, (bags, optimizers) in enumerate(both):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                go(plan, bags, bool(skips_failures))
                for bag in bags if skips_failures else ():
                    bag.weight.grad = None if bag.weight.grad is None else bag.weight.grad.coalesce()
                for optimizer in optimizers:
                    optimizer.step()
            for ours, theirs in zip(*(bags.parameters() for bags, _ in both), strict=True):
                torch.testing.assert_close(ours, theirs, msg=lambda text, plan=plan: f"{text}\n{plan}")


def test_a_hundred_passes_within_each_other() -> None:
    """torch takes another thread for those from the sixtieth on."""
    theirs, unfused, ours, fused = make("SGD", "cpu", torch.float64)
    ids = torch.randint(V, (100, 6, 7))

    def run(module: nn.Module, depth: int) -> None:
        rest = around(lambda: run(module, depth + 1)) if depth < 99 else leaf()
        (module(ids[depth]).sum() + rest).backward()

    for module, optimizer in ((theirs, unfused), (ours, fused)):
        run(module, 0)
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("name", SETTINGS)
def test_failed_passes_within_a_pass(name: str) -> None:
    """What fails is dropped, with all that is in it; what goes on is applied, and nothing of the former."""
    theirs, unfused, ours, fused = make(name, "cpu", torch.float64)
    before, ids = ours.weight.detach().clone(), torch.randint(V, (4, 6, 7))

    def fails() -> None:  # what was made last runs first: the bag, then the failure
        (Fails.apply(leaf()) + ours(ids[0]).sum()).backward()

    def caught() -> None:
        with pytest.raises(ArithmeticError):
            fails()

    def succeeds() -> None:
        ours(ids[1]).sum().backward()

    with pytest.raises(ArithmeticError):
        (Fails.apply(leaf()) + around(succeeds) + ours(ids[2]).sum()).backward()
    with pytest.raises(ArithmeticError):
        (around(fails) + ours(ids[2]).sum()).backward()
    with pytest.raises(ArithmeticError):
        (Fails.apply(leaf()) + around(caught)).backward()
    assert torch.equal(ours.weight, before)
    assert not fused.state_dict()["state"]
    (around(caught) + ours(ids[3]).square().sum()).backward()
    (theirs(ids[3]).square().sum()).backward()
    if theirs.sparse:
        theirs.weight.grad = theirs.weight.grad.coalesce()
    unfused.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_interrupts_are_not_swallowed() -> None:
    """A signal's handler may raise wherever Python code begins, and a destructor would pass that over."""
    table = nlpkernels.Embedding(8, 2)
    optimizer = optim.SGD([table.weight], lr=1.0)
    interrupted = 0

    def trace(frame: Any, event: str, _: object) -> None:
        nonlocal interrupted
        if event == "call" and frame.f_code.co_filename == optim.__file__ and frame.f_code.co_name == place:
            interrupted += 1
            raise KeyboardInterrupt

    for place in ("collect", "add", "end", "_apply", "__del__"):
        interrupted, before = 0, table.weight.detach().clone()
        loss = table(torch.tensor([1])).sum()
        sys.settrace(trace)
        try:
            loss.backward()
        except KeyboardInterrupt:
            assert interrupted and torch.equal(table.weight, before), place
        else:
            assert not interrupted, place
        finally:
            sys.settrace(None)
    table(torch.tensor([1])).sum().backward()  # as if nothing had been
    assert not torch.equal(table.weight, before)
    del optimizer


def test_failed_passes_leave_no_memory() -> None:
    _, _, bag, _ = make("SGD", "cpu")
    ids = torch.randint(V, (6, 7))
    for run in (bag, lambda ids: checkpoint(lambda i, _: bag(i), ids, leaf(), use_reentrant=True)):
        cotangent = torch.ones(6, E)
        seen = weakref.ref(cotangent)
        with pytest.raises(ArithmeticError):
            torch.autograd.backward([Fails.apply(leaf()), run(ids)], [None, cotangent])
        del cotangent
        gc.collect()
        assert seen() is None
        assert all(one() is None for one in optim._passes.values())


def run_all(*works: Callable[[], None]) -> None:
    """At once, in threads, within a minute; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "no end in a minute"
    for error in errors:
        raise error


@pytest.mark.parametrize("shared", [True, False], ids=["one optimizer", "an optimizer each"])
def test_threads_lose_nothing(shared: bool) -> None:
    """Whole numbers, which no order of sums rounds; both tables in one pass, some passes nested, some failing."""
    tables = [nn.Parameter(torch.zeros(4, 64)) for _ in range(2)]
    groups = [tables] if shared else [[table] for table in tables]
    optimizers = [optim.SGD(group, lr=1.0) for group in groups]

    def work(k: int) -> None:
        ids, x = torch.full((5, 20), k), torch.randn(64, 64)
        linear = nn.Linear(64, 64)

        def loss() -> Tensor:
            order = tables if k % 2 else tables[::-1]
            looked_up = [nlpkernels.functional.embedding_bag(ids, table, mode="sum").sum() for table in order]
            return linear(linear(x)).sum() + looked_up[0] + looked_up[1]

        for turn in range(30):
            if turn % 5 == 1:
                with pytest.raises(ArithmeticError):
                    (Fails.apply(leaf()) + loss()).backward()
            elif turn % 5 == 2:
                around(lambda: loss().backward()).backward()
            else:
                loss().backward()

    run_all(*(lambda k=k: work(k) for k in range(4)))
    for table in tables:
        assert (-table.detach()).eq(24 * 100).all(), -table.detach()[:, 0]
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("name", ["Adagrad", "RowWiseAdagrad", "SparseAdam"])
def test_states_of_threads(name: str) -> None:
    """Threads that train other rows of one table: as those rows alone are trained, but that Adam counts all steps."""
    _, _, ours, fused = make(name, "cpu", torch.float64, mode="sum")
    _, _, alone, single = make(name, "cpu", torch.float64, mode="sum")
    alone.load_state_dict(ours.state_dict())
    for optimizer in (fused, single):
        optimizer.param_groups[0] |= {"betas": (0.0, 0.0)} if name == "SparseAdam" else {"lr_decay": 0}
    ids = torch.randint(V // 3, (3, 20, 6, 7)) * 3 + torch.arange(3).view(3, 1, 1, 1)

    def work(k: int, module: nn.Module) -> None:
        for own in ids[k]:
            module(own).square().sum().backward()

    run_all(*(lambda k=k: work(k, ours) for k in range(3)))
    for k in range(3):
        work(k, alone)
    assert fused.state[ours.weight]["step"] == 60
    torch.testing.assert_close(ours.weight, alone.weight)


FORK = """
import os, threading, torch, nlpkernels
bag = nlpkernels.EmbeddingBag(9, 4, mode="sum")
optimizer = nlpkernels.optim.SGD(bag.parameters(), lr=1.0)
torch.nn.init.zeros_(bag.weight)
held = threading.Event()
def hold():
    with nlpkernels.optim._lock, optimizer._lock:
        held.set()
        threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
if os.fork() == 0:
    torch.set_num_threads(1)
    bag(torch.tensor([[1, 2]])).sum().backward()
    print("sum", bag.weight.sum().item(), flush=True)
else:
    os.wait()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_in_the_midst_of_an_update() -> None:
    """The locks of a thread that is not in the child are not waited for there."""
    root = str(Path(nlpkernels.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout == "sum -8.0\n", done.stderr


def other_gradient(bags: Any, optimizer: Any, ids: Tensor) -> None:
    bags[1].weight.grad = torch.ones(V, E)


def another_dtype(bags: Any, optimizer: Any, ids: Tensor) -> None:
    bags[1].double()


def another_state(bags: Any, optimizer: Any, ids: Tensor) -> None:
    optimizer.state[bags[1].weight] = {
        "step": torch.tensor(0.0), "exp_avg": torch.zeros(1, E), "exp_avg_sq": torch.zeros(V, E),
    }  # fmt: skip


def other_ids(bags: Any, optimizer: Any, ids: Tensor) -> None:
    ids += V


def no_rate(bags: Any, optimizer: Any, ids: Tensor) -> None:
    optimizer.param_groups[1]["lr"] = None


@pytest.mark.parametrize("change", [other_gradient, another_dtype, another_state, other_ids, no_rate])
@pytest.mark.parametrize("separate", [True, False], ids=["an optimizer each", "one optimizer"])
def test_all_tables_are_updated_or_none(change: Any, separate: bool) -> None:
    """What is wrong with the second table is found before the first one changes, here at the end of backward."""
    bags = nn.ModuleList([nlpkernels.EmbeddingBag(V, E) for _ in range(2)])
    if separate:
        optimizers = [optim.SparseAdam(bag.parameters(), lr=0.1) for bag in bags]
        second = optimizers[1]
        second.param_groups.append(second.param_groups[0])  # where `no_rate` looks
    else:
        second = optim.SparseAdam([{"params": bag.parameters()} for bag in bags], lr=0.1)
        optimizers = [second]
    ids = torch.randint(V, (2, 6, 7))
    middle = leaf() * 1  # made first: it runs when both bags have been gone through
    middle.register_hook(lambda _: change(bags, second, ids[1]))
    before = [bag.weight.detach().clone() for bag in bags]
    loss = middle + bags[1](ids[1]).sum() + bags[0](ids[0]).sum()
    with pytest.raises((RuntimeError, TypeError)):
        loss.backward()
    for bag, was in zip(bags, before, strict=True):
        torch.testing.assert_close(bag.weight.detach().to(was.dtype), was, rtol=0, atol=0)
    assert not optimizers[0].state.get(bags[0].weight)


def fewer_rows(table: Tensor, state: Any) -> None:
    table.data = table.data[:3].clone()


def more_rows(table: Tensor, state: Any) -> None:
    table.data = table.data.repeat(2, 1)


def shrunk_table(table: Tensor, state: Any) -> None:
    table.untyped_storage().resize_(16)


def negated_table(table: Tensor, state: Any) -> None:
    table.data = torch._neg_view(table.data)


def strided_table(table: Tensor, state: Any) -> None:
    table.data = table.data.t().contiguous().t()


def shrunk_state(table: Tensor, state: Any) -> None:
    state["exp_avg"].untyped_storage().resize_(16)


def negated_state(table: Tensor, state: Any) -> None:
    state["exp_avg_sq"] = torch._neg_view(state["exp_avg_sq"])


def overlapping_states(table: Tensor, state: Any) -> None:
    state["exp_avg"] = state["exp_avg_sq"]


def state_in_the_table(table: Tensor, state: Any) -> None:
    state["exp_avg"] = table.detach()


FAULTS = {
    fewer_rows: "it had 50 rows",
    more_rows: "it had 50 rows",
    shrunk_table: "weight with memory for all",
    negated_table: "weight to be no negated",
    strided_table: "contiguous weight",
    shrunk_state: "first with memory for all",
    negated_state: "second to be no negated",
    overlapping_states: "first and second in memory of their own",
    state_in_the_table: "weight and first in memory of their own",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_second_table_leaves_the_first(fault: Any) -> None:
    """What only the kernel would find is looked for before the first table changes, too."""
    bags = [nlpkernels.EmbeddingBag(V, E) for _ in range(2)]
    optimizer = optim.SparseAdam([bag.weight for bag in bags], lr=0.1)
    ids = torch.randint(V, (6, 7))
    (bags[0](ids) + bags[1](ids)).sum().backward()
    loss = bags[1](ids).sum() + bags[0](ids).sum()
    before = copy.deepcopy([bags[0].weight.detach(), optimizer.state[bags[0].weight]])
    fault(bags[1].weight, optimizer.state[bags[1].weight])
    with pytest.raises((RuntimeError, ValueError), match=FAULTS[fault]):
        loss.backward()
    torch.testing.assert_close([bags[0].weight.detach(), optimizer.state[bags[0].weight]], before, rtol=0, atol=0)


def test_a_table_of_inference_mode_leaves_the_others() -> None:
    bags = [nlpkernels.EmbeddingBag(V, E)]
    with torch.inference_mode():
        bags.append(nlpkernels.EmbeddingBag(V, E))
    optimizer = optim.SGD([bag.weight for bag in bags], lr=0.1)
    before = [bag.weight.detach().clone() for bag in bags]
    ids = torch.randint(V, (6, 7))
    with refusing("no tensor of torch.inference_mode"):
        (bags[1](ids) + bags[0](ids)).sum().backward()
    assert all(torch.equal(bag.weight, was) for bag, was in zip(bags, before, strict=True))
    del optimizer


def states_of_inference_mode(optimizer: Any, state: dict[str, Any]) -> None:
    with torch.inference_mode():
        state.update({name: value.clone() for name, value in state.items()})


def loaded_in_inference_mode(optimizer: Any, state: dict[str, Any]) -> None:
    with torch.inference_mode():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def step_as_a_number(optimizer: Any, state: dict[str, Any]) -> None:
    state["step"] = 1  # as torch.optim.SparseAdam has it


@pytest.mark.parametrize("change", [states_of_inference_mode, loaded_in_inference_mode, step_as_a_number])
def test_states_that_cannot_be_changed_are_copied(change: Any) -> None:
    bags = [nlpkernels.EmbeddingBag(V, E)]
    bags.append(copy.deepcopy(bags[0]))
    optimizers = [optim.SparseAdam(bag.parameters(), lr=0.1) for bag in bags]
    for step in range(3):
        ids = torch.randint(V, (6, 7))
        for bag in bags:
            bag(ids).square().sum().backward()
        if step == 0:
            change(optimizers[1], optimizers[1].state[bags[1].weight])
    assert torch.equal(bags[0].weight, bags[1].weight)
    assert optimizers[1].state[bags[1].weight]["step"] == 3


@pytest.mark.parametrize("sparse", [False, True])
def test_takes_over_from_gradients(sparse: bool) -> None:
    """A table with a graph that was made before it had an optimizer."""
    table = nlpkernels.Embedding(10, 4, sparse=sparse)
    ids = torch.tensor([[1, 2]])
    alive = table(ids).sum()
    before = table.weight.detach().clone()
    optimizer = nlpkernels.optim.SGD(table.parameters(), lr=0.5)
    table(ids).sum().backward()
    optimizer.step()
    assert torch.equal(table.weight[1:3], before[1:3] - 0.5)
    assert alive.requires_grad


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (V, E)], ids=str)
def test_refuses_a_gradient_from_elsewhere(shape: tuple[int, int]) -> None:
    """Also beside the placeholder, of a table of any shape, and also with a graph of its own."""
    bag = nlpkernels.EmbeddingBag(*shape)
    optimizer = optim.SGD(bag.parameters(), lr=1.0)
    bag(torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    optimizer.step()
    before = bag.weight.detach().clone()
    for options in ({}, {"create_graph": True}):
        with refusing("in another way"):
            bag.weight.sum().backward(**options)
    with refusing("in another way"):
        (bag.weight.sum() + bag(torch.zeros(1, 1, dtype=torch.long)).sum()).backward()
    assert torch.equal(bag.weight, before)
    optimizer.zero_grad()
    bag.weight.sum().backward()
    with refusing("in another way"):
        optimizer.step()
    assert torch.equal(bag.weight, before)


@pytest.mark.parametrize("name", SETTINGS)
def test_tables_without_columns(name: str) -> None:
    table = nn.Parameter(torch.zeros(3, 0))
    optimizer = getattr(optim, name)([table], lr=1.0)
    nlpkernels.functional.embedding_bag(torch.tensor([[0, 1]]), table).sum().backward()
    optimizer.step()
    for state in optimizer.state.values():
        assert state["step"] == 1
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("name", ["SGD", "SparseAdam"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_replaced_table_is_noticed(name: str, count: int) -> None:
    """By step(), where nothing else has the old one."""
    model = nn.Sequential(*(nlpkernels.EmbeddingBag(V, E) for _ in range(count)))
    optimizer = getattr(optim, name)(model.parameters(), lr=0.1)
    ids = torch.randint(V, (6, 7))
    optimizer.step()
    for used in (model[0], model[-1], model[0]):  # a table without a use is no mistake
        optimizer.zero_grad()
        used(ids).sum().backward()
        optimizer.step()
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    model[0](ids).sum().backward()
    optimizer.step()
    model.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    model[0](ids).sum().backward()
    for _ in range(2):
        with refusing("it was replaced"):
            optimizer.step()
    optimizer = getattr(optim, name)(model.parameters(), lr=0.1)
    model.zero_grad()
    model[0](ids).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, state["0.weight"])


def test_refuses_hooks() -> None:
    """They would wait for a gradient for ever. Once removed they do not matter."""
    _, _, bag, _ = make("SGD", "cpu")
    before, ids = bag.weight.detach().clone(), torch.randint(V, (6, 7))
    calls: list[Any] = []
    accumulator = bag.weight.view_as(bag.weight).grad_fn.next_functions[0][0]
    for register in (bag.weight.register_hook, bag.weight.register_post_accumulate_grad_hook):
        handle = register(calls.append)
        with refusing("has a hook"):
            bag(ids).sum().backward()
        handle.remove()
    accumulator.register_hook(lambda *given: calls.append(given))  # as DistributedDataParallel's
    with refusing("waits for the gradient of a table"):
        bag(ids).sum().backward()
    assert torch.equal(bag.weight, before)
    assert not calls
    del accumulator
    bag(ids).sum().backward()
    assert not torch.equal(bag.weight, before)


def test_the_placeholder() -> None:
    """It can be shown, copied, pickled, zeroed; everything else says what it is."""
    _, _, bag, optimizer = make("SparseAdam", "cpu")
    bag(torch.randint(V, (6, 7))).sum().backward()
    for stand_in in (bag.weight.grad, copy.deepcopy(bag.weight.grad), pickle.loads(pickle.dumps(bag.weight.grad))):
        for shown in (repr(stand_in), str(stand_in), f"{stand_in}"):
            assert shown == f"<applied in backward by nlpkernels.optim: torch.float32 of shape [{V}, {E}] on cpu>"
        for use in (
            lambda g: g + 1, lambda g: g.norm(), lambda g: g.mul_(2), lambda g: g.sum().item(), torch.isfinite,
            lambda g: torch.zeros(V, E).copy_(g),
        ):  # fmt: skip
            with refusing("this table has no gradient"):
                use(stand_in)
    bag.zero_grad(set_to_none=False)
    optimizer.zero_grad(set_to_none=False)
    assert bag.weight.grad is None


@pytest.mark.parametrize("name", SETTINGS)
def test_models_move_after_an_update(name: str) -> None:
    """And go on, with their states, as a new optimizer with the same states."""
    _, _, ours, fused = make(name, "cpu", mode="sum")
    ids = torch.randint(V, (6, 7))
    cotangents = torch.randint(1, 9, (2, 6, E)) / 8
    ours(ids).backward(cotangents[0])
    ours.cpu()
    ours.share_memory()
    ours.to(torch.float32)
    ours.double()
    assert (ours.weight.grad.dtype, ours.weight.grad.shape) == (torch.float64, (V, E))
    twin = nlpkernels.EmbeddingBag(V, E, mode="sum", _weight=ours.weight.detach().clone())
    other = getattr(optim, name)(twin.parameters())
    other.load_state_dict(fused.state_dict())
    for module in (ours, twin):
        module(ids).backward(cotangents[1].double())
    fused.step()
    assert torch.equal(ours.weight, twin.weight)
    for state in fused.state.values():
        assert all(state[key].dtype == torch.float64 for key in fused.states)
    ours.to("meta")
    assert ours.weight.grad.device.type == "meta"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_models_are_copied_after_an_update(how: Any) -> None:
    _, _, ours, fused = make("SparseAdam", "cpu")
    ids = torch.randint(V, (6, 7))
    ours(ids).sum().backward()
    twin = how(ours)
    assert torch.equal(twin.weight, ours.weight)
    assert twin.weight.grad is None
    ours(ids).sum().backward()
    fused.step()
    assert not torch.equal(twin.weight, ours.weight)


def test_refuses_the_gradient_of_a_compiled_layer_after_an_update() -> None:
    _, _, bag, optimizer = make("SGD", "cpu")
    ids = torch.randint(V, (6, 7))
    bag(ids).sum().backward()
    before = bag.weight.detach().clone()
    with refusing("another way|in eager mode"):
        torch.compile(bag, backend="aot_eager")(ids).sum().backward()
        optimizer.step()
    assert torch.equal(bag.weight, before)


def test_bad_arguments() -> None:
    bag = nlpkernels.EmbeddingBag(V, E)
    with pytest.raises(ValueError, match="lr"):
        optim.SGD(bag.parameters(), lr=-1.0)
    with pytest.raises(ValueError, match="expected process_group to be a group"):
        optim.SGD(bag.parameters(), process_group=True)
    with pytest.raises(ValueError, match="betas"):
        optim.SparseAdam(bag.parameters(), betas=(0.9, 1.0))
    for betas in ([0.9], (0.9, 0.99, 0.999)):
        with pytest.raises(ValueError, match="as betas two"):
            optim.SparseAdam(bag.parameters(), betas=betas)
    with pytest.raises(ValueError, match=r"\[rows, columns\]"):
        optim.SGD([nn.Parameter(torch.zeros(3))])
    first = optim.SGD(bag.parameters())
    with pytest.raises(ValueError, match="trained by SGD already"):
        optim.Adagrad(bag.parameters())
    del first  # an optimizer that is gone has let its tables go
    optim.Adagrad(bag.parameters())


@pytest.mark.parametrize(
    ("name", "unfused", "message"),
    [
        ("SGD", lambda p: torch.optim.SGD(p, momentum=0.9), "no momentum in backward, got 0.9"),
        ("SGD", lambda p: torch.optim.SGD(p, weight_decay=0.1), "no weight_decay in backward, got 0.1"),
        ("Adagrad", lambda p: torch.optim.Adagrad(p, maximize=True), "no maximize"),
        ("RowWiseAdagrad", torch.optim.Adagrad, rf"state 'sum' of shape \[{V}\], got \[{V}, {E}\]"),
        ("SparseAdam", torch.optim.Adagrad, "state 'exp_avg' of shape .* got none"),
    ],
    ids=["momentum", "weight_decay", "maximize", "shape", "name"],
)
def test_refuses_another_state(name: str, unfused: Any, message: str) -> None:
    """A state_dict, or a group, that asks for what is not there; everything stays as it was."""
    _, _, bag, optimizer = make(name, "cpu")
    bag(torch.randint(V, (6, 7))).sum().backward()
    other = unfused([nn.Parameter(torch.zeros(V, E))])
    other.param_groups[0]["params"][0].grad = torch.ones(V, E)
    other.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())
    torch.testing.assert_close(optimizer.state_dict(), before, atol=0, rtol=0)
    if "no " in message:
        table = nn.Parameter(torch.zeros(V, E))
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({**other.param_groups[0], "params": [table]})
        assert len(optimizer.param_groups) == 1


UPDATE = torch.ops.nlpkernels.embedding_bag_update


# A rule of the op: how many states it has, and settings.
RULES: dict[str, tuple[int, list[float]]] = {
    "sgd": (0, [0.1]),
    "rowwise_adagrad": (1, [0.1, 1e-3]),
    "adagrad": (1, [0.1, 1e-3]),
    "adam": (2, [0.1, 1e-3, 0.9, 0.99]),
}


def tables(rule: str, columns: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """A table and its states."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (V,) if rule == "rowwise_adagrad" else (V, columns)
    states = [torch.rand(shape, device=device, dtype=wide) for _ in range(RULES[rule][0])]
    return [torch.rand(V, columns, device=device).to(dtype), *states]


def update(function: Any, grad: Tensor, tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    """What the op, or what stands in for it, makes of copies of a table and its states."""
    own = [t.clone() for t in tensors]
    weight, first, second, *_ = (*own, None, None)
    function(grad, weight, first, second, *rest)
    return own


@pytest.mark.parametrize("rule", RULES)
def test_op(rule: str, device: str) -> None:
    """opcheck; and the kernel does what the reference does."""
    tensors, settings = tables(rule, E, torch.float32, device), RULES[rule][1]
    ids, grad = torch.randint(V, (4, 5), device=device), torch.randn(4, E, device=device)
    rest = (ids, None, None, torch.empty(0, dtype=torch.long, device=device), "sum", 2, False, True, rule, settings)
    runs = [update(f, grad, tensors, *rest) for f in (UPDATE, nlpkernels.reference.embedding_bag_update)]
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)
    torch.use_deterministic_algorithms(False)
    weight, first, second, *_ = (*tensors, None, None)
    torch.library.opcheck(UPDATE.default, (grad, weight, first, second, *rest))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 16, 19, 300, 520])
@pytest.mark.parametrize("rule", RULES)
def test_rows_used_often(rule: str, columns: int, dtype: torch.dtype, device: str) -> None:
    """Rows with hundreds of uses between rows with few, in every mode, against the reference in float64."""
    tensors, settings = tables(rule, columns, dtype, device), RULES[rule][1]
    ids = torch.randint(V, (340,), device=device)
    ids[torch.randperm(340, device=device)[:230]] = 7
    ids[5:70] = 6
    offsets = torch.tensor([0, 0, 11, 200, 340], device=device)
    factors = torch.rand(340, device=device).to(dtype)
    for mode, by_freq in (("mean", False), ("sum", True), ("max", False)):
        out, aux = torch.ops.nlpkernels.embedding_bag(tensors[0], ids, offsets, None, mode, 3, False, by_freq, False)
        grad = torch.randn_like(out)
        exact, given = ([g if g is None else g.double() for g in group] for group in ((grad, *tensors), (factors,)))
        rest = (aux, mode, 3, False, by_freq, rule, settings)
        per_sample = (factors, given[0]) if mode == "sum" else (None, None)
        got = update(UPDATE, grad, tensors, ids, offsets, per_sample[0], *rest)
        expected = update(
            nlpkernels.reference.embedding_bag_update, exact[0], exact[1:], ids, offsets, per_sample[1], *rest
        )
        untouched = torch.ones(V, dtype=torch.bool, device=device)
        untouched[ids] = False
        untouched[3] = True
        for before, a, b in zip(tensors, got, expected, strict=True):
            assert a.dtype == before.dtype
            assert torch.equal(a[untouched], before[untouched])
            # A hot row's sum is most of the norm, and its rounding adds up.
            allowed = {**FLOOR, **FEW}[a.dtype]
            assert relative_error(a, b) <= allowed, f"{mode}: error {relative_error(a, b):.2e}, allowed {allowed:.2e}"
        again = update(UPDATE, grad, tensors, ids, offsets, per_sample[0], *rest)
        assert all(map(torch.equal, got, again))


def test_tables_that_are_not_aligned(device: str) -> None:
    """Vectors of 16 bytes only where all that a row touches begins there."""
    memory = [torch.rand(V * 16 + 1, device=device) for _ in range(3)]
    ids, grad = torch.randint(V, (9, 5), device=device), torch.randn(9, 16, device=device)
    rest = (ids, None, None, torch.empty(0, dtype=torch.long, device=device), "sum", -1, False, False, "adam")
    settings = RULES["adam"][1]
    aligned = [m[:-1].view(V, 16).clone() for m in memory]
    expected = update(UPDATE, grad, aligned, *rest, settings)
    for shifted in range(3):
        own = [a.clone() for a in aligned]
        own[shifted] = memory[shifted][1:].view(V, 16).copy_(aligned[shifted])
        weight, first, second = own
        UPDATE(grad, weight, first, second, *rest, settings)
        assert all(map(torch.equal, own, expected))


def test_op_refuses_what_does_not_fit() -> None:
    """And leaves everything as it was."""
    weight, state, ids, grad = (
        torch.zeros(V, E),
        torch.zeros(V, E),
        torch.zeros(4, 5, dtype=torch.long),
        torch.ones(4, E),
    )
    none = torch.empty(0, dtype=torch.long)
    good: dict[str, Any] = {
        "grad": grad, "weight": weight, "first": state, "second": None, "indices": ids, "offsets": None,
        "per_sample_weights": None, "aux": none, "pooling": "sum", "padding_idx": -1, "include_last_offset": False,
        "scale_grad_by_freq": False, "rule": "adagrad", "settings": [0.1, 0.1],
    }  # fmt: skip
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"indices": ids + V}, f"is {V}, expected a row from 0 to {V - 1}"),
        ({"grad": grad[:, 1:]}, "grad of shape"),
        ({"grad": grad.double()}, "dtype"),
        ({"weight": torch.zeros(E, V).t()}, "contiguous"),
        ({"first": None}, "first is needed"),
        ({"first": state[1:]}, "first of shape"),
        ({"first": state.double()}, "dtype"),
        ({"second": state}, "second is not wanted"),
        ({"settings": [0.1]}, "2 settings"),
        ({"rule": "lamb"}, "lamb"),
    ]
    for change, message in wrong:
        with pytest.raises((ValueError, RuntimeError, TypeError, IndexError), match=message):
            UPDATE(**{**good, **change})
    assert not weight.any()
    assert not state.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["state"][0].pop("step"), "'step', the number of steps, got None"),
        (lambda saved: saved["state"][0].update(step="two"), "'step', the number of steps, got two"),
        (lambda saved: saved["state"][0].update(step=torch.ones(2)), "'step', the number of steps"),
        (lambda saved: saved["state"][0].update(step=math.nan), "'step', the number of steps, got nan"),
        (lambda saved: saved["state"][0].pop("exp_avg_sq"), "'exp_avg_sq' of shape .* got none"),
        (lambda saved: saved["state"][0].update(exp_avg=0.5), "'exp_avg' of shape .* got 0.5"),
        (lambda saved: saved["param_groups"][0].pop("eps"), "groups with eps"),
        (lambda saved: saved["param_groups"][0].update(lr=None), "expected numbers"),
        (lambda saved: saved["param_groups"][0].update(betas=[0.9]), "expected numbers, as betas two"),
        (lambda saved: saved["param_groups"][0].update(eps=math.nan), "expected numbers"),
        (lambda saved: saved["param_groups"][0].update(params=[0, 1]), "size of optimizer's group"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change: Any, message: str) -> None:
    _, _, bag, optimizer = make("SparseAdam", "cpu")
    ids = torch.randint(V, (6, 7))
    bag(ids).sum().backward()
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    change(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.state_dict(), before, atol=0, rtol=0)
    bag(ids).sum().backward()
    assert optimizer.state[bag.weight]["step"] == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": torch.tensor(0.1)}),
        ("Adagrad", {"lr": torch.tensor(0.1), "lr_decay": 1, "initial_accumulator_value": 1}),
        ("SparseAdam", {"lr": torch.tensor(0.1), "betas": [0.8, 0.95], "eps": 1}),
    ],
    ids=["SGD", "Adagrad", "SparseAdam"],
)
def test_options_of_other_types(name: str, options: dict[str, Any]) -> None:
    """Lists, as settings from a file are, tensors and integers: as torch.optim's of the same name takes them."""
    theirs, ours = nn.EmbeddingBag(V, E, sparse=True), nlpkernels.EmbeddingBag(V, E)
    ours.load_state_dict(theirs.state_dict())
    unfused = getattr(torch.optim, name)(theirs.parameters(), **options)
    fused = getattr(optim, name)(ours.named_parameters(), **options)
    for _ in range(2):  # the second time into what has been loaded
        fused.load_state_dict(copy.deepcopy(fused.state_dict()))
        ids, cotangent = torch.randint(V, (6, 7)), torch.randn(6, E)
        train(theirs, unfused, ids, cotangent=cotangent)
        train(ours, fused, ids, cotangent=cotangent)
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_hooks_run_around_a_step() -> None:
    _, _, ours, fused = make("SGD", "cpu")
    calls = []
    hooks = [
        fused.register_step_pre_hook(lambda *_: calls.append("before")),
        fused.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after all")),
    ]
    ours(torch.tensor([[1, 2]])).sum().backward()
    fused.step()
    with pytest.raises(RuntimeError, match="closure"):
        fused.step(lambda: 0.0)
    for hook in hooks:
        hook.remove()
    fused.step()
    assert calls == ["before", "after", "after all", "before"]


def test_compiled_autograd_is_refused() -> None:
    """It never says when a pass has ended: updates would be lost."""
    bag = nlpkernels.EmbeddingBag(7, 3)
    optimizer = nlpkernels.optim.SGD(bag.parameters(), lr=0.1)
    before = bag.weight.detach().clone()
    pooled = bag(torch.randint(7, (2, 3))).sum()
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    with (
        compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(RuntimeError, match="compiled autograd"),
    ):
        pooled.backward()
    assert torch.equal(bag.weight, before)
    del optimizer


def test_states_for_a_checkpoint() -> None:
    """torch.distributed.checkpoint has an optimizer make its states by a step with gradients of zeros."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    ids = torch.tensor([[1, 2, 2]])
    model = torch.nn.Sequential(nlpkernels.EmbeddingBag(10, 4))
    before = model[0].weight.detach().clone()
    optimizer = nlpkernels.optim.Adagrad(model.parameters(), lr=0.1)
    get_state_dict(model, optimizer)
    assert torch.equal(model[0].weight, before)
    model(ids).sum().backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    other = torch.nn.Sequential(nlpkernels.EmbeddingBag(10, 4))
    again = nlpkernels.optim.Adagrad(other.parameters(), lr=0.1)
    set_state_dict(other, again, model_state_dict=weights, optim_state_dict=states)
    for one, step in ((model, optimizer), (other, again)):
        one(ids).square().sum().backward()
        step.step()
    assert torch.equal(model[0].weight, other[0].weight)


def test_a_constructor_that_fails_takes_nothing() -> None:
    bag = nlpkernels.EmbeddingBag(10, 4)
    groups = [{"params": [bag.weight]}, {"params": [torch.nn.Parameter(torch.zeros(3))]}]
    with pytest.raises(ValueError, match="expected contiguous tables") as kept:
        nlpkernels.optim.SGD(groups, lr=0.1)
    bag(torch.tensor([[1]])).sum().backward()
    assert bag.weight.grad is not None
    assert bag.weight.grad.sum() == 4
    bag.weight.grad = None
    nlpkernels.optim.SGD(bag.parameters(), lr=0.1)
    del kept


def test_a_group_that_is_gone() -> None:
    bags = [nlpkernels.EmbeddingBag(10, 4), nlpkernels.EmbeddingBag(10, 4)]
    optimizer = nlpkernels.optim.SGD([{"params": [bag.weight]} for bag in bags], lr=0.1)
    del optimizer.param_groups[1]
    with pytest.raises(RuntimeError, match="in none of param_groups"):
        bags[1](torch.tensor([[1]])).sum().backward()


@pytest.mark.parametrize("name", ["momentum", "weight_decay", "maximize", "lr"])
def test_groups_changed_for_the_worse(name: str) -> None:
    """Settings that cannot be had, put into a group after all, and a NaN: no table of the pass changes."""
    bags = [nlpkernels.EmbeddingBag(5, 3) for _ in range(3)]
    optimizer = nlpkernels.optim.SGD([{"params": [bag.weight]} for bag in bags], lr=0.1)
    before = [bag.weight.detach().clone() for bag in bags]
    total = sum(bag(torch.tensor([[1, 2]])).sum() for bag in bags)
    optimizer.param_groups[1][name] = math.nan if name == "lr" else 0.5
    with pytest.raises(ValueError, match="NaN" if name == "lr" else name):
        total.backward()
    for bag, weight in zip(bags, before, strict=True):
        assert torch.equal(bag.weight, weight)


def test_states_of_another_optimizer() -> None:
    bag = nlpkernels.EmbeddingBag(5, 3)
    saved = torch.optim.SGD(bag.parameters(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match="betas"):
        nlpkernels.optim.SparseAdam(bag.parameters()).load_state_dict(saved)
