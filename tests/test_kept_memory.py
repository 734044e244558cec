"""Memory of large gradients, kept from step to step: whatever was written to it, the next gradient is right."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nlpkernels

MIB = 1 << 20
KEPT = MIB // 4  # values of float32 from which on memory is kept


def table_of(values: int, columns: int = 64) -> nlpkernels.EmbeddingBag:
    return nlpkernels.EmbeddingBag(values // columns, columns, mode="sum")


def gradient_of(table: nn.Module, ids: Tensor) -> Tensor:
    """The gradient of a step, which no other step has."""
    table.zero_grad(set_to_none=True)
    table(ids).sum().backward()
    return table.weight.grad


def expected(table: nn.Module, ids: Tensor, steps: int = 1) -> Tensor:
    uses = torch.bincount(ids.flatten(), minlength=table.weight.shape[0])
    return steps * uses.unsqueeze(1).expand(table.weight.shape).to(table.weight.dtype)


@pytest.mark.parametrize("values", [KEPT - 64, KEPT, KEPT + 64, 2 * KEPT - 64, 2 * KEPT, 2 * KEPT + 64, 12 * KEPT + 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_kept_from_step_to_step(values: int, dtype: torch.dtype, threads: int, restored_threads: None) -> None:
    """Also after others have written all over a gradient, in ways of which torch knows and does not know."""
    torch.set_num_threads(threads)
    table = table_of(values).to(dtype)
    places = set()
    for spoil in (None, Tensor.zero_, lambda g: g.fill_(float("nan")), lambda g: g.data.fill_(float("inf"))):
        ids = torch.randint(table.weight.shape[0], (7, 3))
        gradient = gradient_of(table, ids)
        assert torch.equal(gradient, expected(table, ids))
        places.add(gradient.data_ptr())
        if spoil is not None:
            spoil(gradient)
        del gradient
    if table.weight.nbytes >= MIB:
        assert len(places) == 1


def test_without_uses() -> None:
    table = table_of(2 * KEPT)
    gradient_of(table, torch.arange(6).reshape(2, 3)).fill_(7)
    assert not gradient_of(table, torch.zeros(3, 0, dtype=torch.long)).any()


def test_gradients_that_add_up() -> None:
    table = table_of(2 * KEPT)
    ids = torch.randint(table.weight.shape[0], (5, 4))
    for steps in (1, 2, 3):
        table.zero_grad(set_to_none=False)
        for _ in range(steps):
            table(ids).sum().backward()
        assert torch.equal(table.weight.grad, expected(table, ids, steps))
        nn.utils.clip_grad_value_(table.parameters(), 0.5)


def test_gradients_of_several_steps_and_tables() -> None:
    tables = [table_of(2 * KEPT), table_of(2 * KEPT), table_of(3 * KEPT)]
    batches = [torch.randint(table.weight.shape[0], (5, 4)) for table in tables]
    for _ in range(2):
        alive = [(gradient_of(t, ids), t, ids) for _ in range(3) for t, ids in zip(tables, batches, strict=True)]
        assert len({gradient.data_ptr() for gradient, _, _ in alive}) == len(alive)
        for gradient, table, ids in alive:
            assert torch.equal(gradient, expected(table, ids))
        del alive, gradient


def test_gradient_that_outlives_its_table() -> None:
    table, other = table_of(2 * KEPT), table_of(2 * KEPT)
    ids = torch.arange(6).reshape(2, 3)
    gradient = gradient_of(table, ids)
    right = expected(table, ids)
    del table
    gc.collect()
    assert torch.equal(gradient_of(other, ids), right)
    assert torch.equal(gradient, right)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitiser keeps memory for a while")
def test_memory_goes_with_the_table() -> None:
    size = 128 * MIB
    table: nn.Module | None = table_of(size // 4)
    ids = torch.randint(table.weight.shape[0], (500, 4))
    table.weight.data.fill_(1)
    for _ in range(3):
        gradient_of(table, ids)
    with_gradient = resident()
    table.zero_grad(set_to_none=True)
    assert resident() > with_gradient - size // 2, "it is kept"
    for _ in range(3):
        gradient_of(table, ids)
    assert resident() < with_gradient + size // 2, "and used again"
    before = resident()
    table = None
    gc.collect()
    assert resident() < before - 3 * size // 2, "the table and its gradient"


def test_threads() -> None:
    """Tables of one size in several threads, and one table in several."""
    shared = table_of(2 * KEPT)
    wrong = []

    def train(table: nlpkernels.EmbeddingBag, run: Callable[[Tensor], Tensor]) -> None:
        for _ in range(30):
            ids = torch.randint(table.weight.shape[0], (6, 5))
            if not torch.equal(run(ids), expected(table, ids)):
                wrong.append(ids)

    def of_shared(ids: Tensor) -> Tensor:
        return torch.autograd.grad(shared(ids).sum(), shared.weight)[0]

    def start(i: int) -> threading.Thread:
        own = table_of(2 * KEPT)
        arguments = (shared, of_shared) if i % 2 else (own, lambda ids: gradient_of(own, ids))
        thread = threading.Thread(target=train, args=arguments)
        thread.start()
        return thread

    for thread in [start(i) for i in range(6)]:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_op() -> None:
    """Whatever its arguments are."""
    keep = torch.ops.nlpkernels._keep_memory
    for arguments in [(0, False), (0, True), (0, False), (2 * MIB, False), (1 << 62, True), (1 << 62, False)]:
        keep(*arguments)
    with pytest.raises(ValueError, match="expected bytes >= 0, got -1"):
        keep(-1, True)
    table = table_of(2 * KEPT)
    ids = torch.arange(6).reshape(2, 3)
    for _ in range(3):
        assert torch.equal(gradient_of(table, ids), expected(table, ids))
        keep(table.weight.nbytes, False)  # as if it had gone


def test_a_table_that_changes_its_size() -> None:
    """Memory of another size is given back, and of the new one kept."""
    table = table_of(2 * KEPT)
    ids = torch.arange(6).reshape(2, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        table.to(dtype)
        for _ in range(3):
            assert torch.equal(gradient_of(table, ids), expected(table, ids))
    table.weight.data = torch.ones(10, 4)
    assert torch.equal(gradient_of(table, ids), expected(table, ids))


def test_gradients_are_ordinary_tensors() -> None:
    table = table_of(2 * KEPT)
    ids = torch.arange(6).reshape(2, 3)
    gradient = gradient_of(table, ids)
    before = gradient.clone()
    shape = gradient.shape
    gradient.resize_(2 * shape[0], shape[1])
    assert torch.equal(gradient[: shape[0]], before)
    gradient.untyped_storage().resize_(0)
    assert torch.equal(gradient_of(table, ids), before)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        table.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(gradient_of(table, ids), before.bfloat16())


def test_hooks_of_users_go_first() -> None:
    """A table has room for one kind of hook after accumulation: memory is not kept then, and all is right."""
    table = table_of(2 * KEPT)
    ids = torch.arange(6).reshape(2, 3)
    seen = []
    gradient_of(table, ids)
    handle = table.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.sum().item()))
    for _ in range(2):
        assert torch.equal(gradient_of(table, ids), expected(table, ids))
    handle.remove()
    assert torch.equal(gradient_of(table, ids), expected(table, ids))
    assert seen == [6 * 64.0] * 2


@pytest.mark.parametrize("rows", [2**18 - 1, 2**18, 2**18 + 1, 5 * 2**16 - 1, 5 * 2**16, 5 * 2**16 + 1])
def test_kept_memory_is_cleared_to_its_end(rows: int, restored_threads: None) -> None:
    """In pieces of 256 KB: of 1 MB, from which on it is kept, and of five of them, with one value more and less."""
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        bag = nlpkernels.EmbeddingBag(rows, 1, mode="sum")
        for step in range(3):
            first = step * rows // 3
            ids = torch.cat([torch.arange(first, first + 200), torch.tensor([rows - 1 - step])]).unsqueeze(1)
            bag.weight.grad = None
            bag(ids).sum().backward()
            expected = torch.bincount(ids.flatten(), minlength=rows).float().unsqueeze(1)
            assert torch.equal(bag.weight.grad, expected)
