"""Gradients of tables and updates in backward at every size at which the sort of uses changes its way.

Gradients are small whole numbers, so that sums are exact in any order and results are compared as they are.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nlpkernels

ops = torch.ops.nlpkernels
NONE = torch.empty(0, dtype=torch.long)
COLUMNS = 3

# Uses: none, one, two; around the fewest that are counted (64), a digit's counters (2,048 and a quarter of the uses),
# what a thread takes at least (4,096), and twice that.
USES = [0, 1, 2, 3, 7, 8, 9, 62, 63, 64, 65, 66, 127, 128, 129, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193]
# Rows: around powers of two that are bits, digits of 11 bits, keys of 32 bits and, with a few thousand uses, of 64.
ROWS = [
    1,
    2,
    3,
    4,
    5,
    15,
    16,
    17,
    2**11 - 1,
    2**11,
    2**11 + 1,
    2**20,
    2**20 + 1,
    2**22 + 1,
    2**26,
    2**31 - 1,
    2**31,
    2**33,
]
DENSE_ROWS = 2**16  # more would take long


def draw_ids(kind: str, uses: int, rows: int) -> Tensor:
    """Ids of `uses` uses: of any rows, of the first ones mostly, of one, of the last ones."""
    if kind == "any":
        return torch.randint(rows, (uses,))
    if kind == "first":
        return torch.where(torch.rand(uses) < 0.9, torch.randint(min(rows, 8), (uses,)), torch.randint(rows, (uses,)))
    if kind == "one":
        return torch.randint(rows, (1,)).expand(uses).clone()
    return rows - 1 - torch.randint(min(rows, 5), (uses,))


def hide(ids: Tensor, padding: int, kept: int) -> Tensor:
    """The padding in the place of all but `kept` of the ids."""
    hidden = torch.full_like(ids, padding)
    places = torch.randperm(len(ids))[:kept]
    hidden[places] = ids[places]
    return hidden


def expected_rows(
    ids: Tensor, grad: Tensor, bag: Tensor, factors: Tensor | None, padding: int
) -> tuple[Tensor, Tensor]:
    """Rows in use and the sums of their gradients, without a kernel of ours."""
    counts = ids != padding
    terms = grad[bag] if factors is None else grad[bag] * factors.unsqueeze(1)
    rows, place = ids[counts].unique(return_inverse=True)
    return rows, torch.zeros(len(rows), COLUMNS).index_add(0, place, terms[counts])


def check(ids: Tensor, rows: int, padding: int, weighted: bool) -> None:
    """The sparse gradient, the dense one and an update, for bags of one to four ids, some of them empty."""
    lengths = torch.randint(0, 5, (len(ids) + 1,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    offsets = offsets[offsets <= len(ids)]
    bag = torch.bucketize(torch.arange(len(ids)), offsets, right=True) - 1
    grad = torch.randint(-4, 5, (len(offsets), COLUMNS)).float()
    factors = torch.randint(-2, 3, (len(ids),)).float() if weighted else None
    rest = (ids, offsets, factors, NONE, "sum", padding, False, False)

    want_rows, want = expected_rows(ids, grad, bag, factors, padding)
    got_rows, got = ops.embedding_bag_sparse_backward(grad, rows, *rest)
    assert torch.equal(got_rows, want_rows)
    assert torch.equal(got, want)
    if rows > DENSE_ROWS:
        return
    dense = ops.embedding_bag_backward(grad, rows, *rest)
    assert torch.equal(dense[want_rows], want)
    assert torch.count_nonzero(dense) == torch.count_nonzero(want)
    table = torch.zeros(rows, COLUMNS)
    ops.embedding_bag_update(grad, table, None, None, *rest, "sgd", [1.0])
    assert torch.equal(table, -dense)


@pytest.mark.parametrize("uses", USES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_uses_and_rows(uses: int, dtype: torch.dtype, restored_threads: None) -> None:
    for rows in ROWS:
        if dtype == torch.int32 and rows > 2**31:
            continue
        torch.set_num_threads(1 + torch.randint(5, (1,)).item())
        kind = ("any", "first", "one", "last")[torch.randint(4, (1,)).item()]
        check(draw_ids(kind, uses, rows).to(dtype), rows, -1, weighted=bool(torch.rand(()) < 0.5))


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 63, 64, 65])
@pytest.mark.parametrize("uses", [64, 65, 4096, 8192, 20000])
def test_padding_is_most_of_all(uses: int, kept: int, restored_threads: None) -> None:
    for rows in ROWS:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            padding = int(torch.randint(rows, (1,)))
            ids = hide(draw_ids("any", uses, rows), padding, min(kept, uses))
            check(ids, rows, padding, weighted=threads == 2)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["any", "first", "one", "last"])
def test_many_uses(kind: str, threads: int, restored_threads: None) -> None:
    torch.set_num_threads(threads)
    for rows in ROWS:
        check(draw_ids(kind, 30_000, rows), rows, 0 if threads % 2 else -1, weighted=threads == 3)


@pytest.mark.parametrize("uses", [2**11 - 1, 2**11, 2**11 + 1])
@pytest.mark.parametrize("rows", [2**20 - 1, 2**20, 2**20 + 1])
def test_keys_of_31_and_32_bits(rows: int, uses: int) -> None:
    """A key has the bits of a row and those of a position or bag: up to 31 of them fit the narrow one."""
    check(draw_ids("last", uses, rows), rows, -1, weighted=True)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("sparse", [False, True])
def test_an_ordinary_text_of_padding(mode: str, sparse: bool) -> None:
    """One short text, padded to 64 ids."""
    if mode == "max" and sparse:
        pytest.skip("torch refuses sparse gradients of max")
    ids = torch.zeros(1, 64, dtype=torch.long)
    ids[0, 0], ids[0, 1] = 7, 19999
    bag = nlpkernels.EmbeddingBag(20000, 64, mode=mode, padding_idx=0, sparse=sparse)
    theirs = torch.nn.EmbeddingBag(20000, 64, mode=mode, padding_idx=0, sparse=sparse, _weight=bag.weight.detach())
    for layer in (bag, theirs):
        layer(ids).square().sum().backward()
    assert bag.weight.grad is not None and theirs.weight.grad is not None
    torch.testing.assert_close(bag.weight.grad.to_dense(), theirs.weight.grad.to_dense())
