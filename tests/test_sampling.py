"""Scores of sampled rows, and the loss on them, against plain torch and float64."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from test_optim import SETTINGS, RowWiseAdagrad
from tolerances import assert_as_exact
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import logsigmoid
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

import nlpkernels
from nlpkernels import NegativeSampling, functional, reference
from nlpkernels.functional import embedding_dot

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COUNTS = torch.tensor([50, 0, 7, 20, 1, 0, 3, 9, 400, 0])


def plain_dot(h: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    return (weight[indices.long()] * h.unsqueeze(1)).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 100, 300])
def test_dot_matches_torch(columns: int, dtype: torch.dtype, device: str) -> None:
    # Of numbers that are not negative no sum is small but for rounding.
    table = torch.rand(30, columns, device=device, dtype=dtype)
    for bags, number in ((1, 1), (5, 6), (3, 40), (200, 2)):
        for index in (torch.int32, torch.int64):
            h = torch.rand(bags, columns, device=device, dtype=dtype)
            ids = torch.randint(30, (bags, number), device=device, dtype=index)
            cotangent = torch.rand(bags, number, device=device, dtype=dtype)
            for sparse in (False, True):
                runs = []
                for dot, to in ((partial(embedding_dot, sparse=sparse), dtype), (plain_dot, dtype), (plain_dot, None)):
                    leaves = [t.detach().to(to or torch.float64).requires_grad_() for t in (h, table)]
                    scores = dot(*leaves, ids)
                    grads = torch.autograd.grad(scores, leaves, cotangent.to(scores.dtype))
                    runs.append([scores, *(g.to_dense() if g.is_sparse else g for g in grads)])
                assert_as_exact(*runs, names=["scores", "gradient of h", "gradient of weight"])


@pytest.mark.parametrize(("bags", "number", "columns"), [(0, 3, 4), (3, 0, 4), (3, 2, 0), (0, 0, 0)])
def test_dot_of_nothing(bags: int, number: int, columns: int, device: str) -> None:
    h = torch.randn(bags, columns, device=device, requires_grad=True)
    weight = torch.randn(5, columns, device=device, requires_grad=True)
    ids = torch.zeros(bags, number, dtype=torch.long, device=device)
    scores = embedding_dot(h, weight, ids)
    assert torch.equal(scores, torch.zeros(bags, number, device=device))
    scores.sum().backward()
    assert torch.equal(h.grad, weight[:1].detach().expand(bags, columns) * number)
    assert torch.equal(weight.grad.sum(0), h.detach().sum(0) * number)


@pytest.mark.usefixtures("doubles")
def test_dot_derivatives(device: str) -> None:
    """Of every order, in every mode, and for each example."""
    h, weight = (torch.randn(n, 5, device=device, requires_grad=True) for n in (3, 7))
    ids = torch.randint(7, (3, 4), device=device)
    function = partial(embedding_dot, indices=ids)
    torch.autograd.gradcheck(function, (h, weight), check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, (h, weight), check_batched_grad=True)
    many = torch.randn(2, 3, 5, device=device)
    each = torch.vmap(lambda h: torch.func.grad(lambda h: embedding_dot(h, weight, ids).tanh().sum())(h))(many)
    expected = torch.stack([
        torch.autograd.grad(plain_dot(g, weight, ids).tanh().sum(), g)[0] for g in many.clone().requires_grad_()
    ])  # fmt: skip
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(
        torch.func.hessian(lambda w: embedding_dot(h, w, ids).pow(3).sum())(weight),
        torch.func.hessian(lambda w: plain_dot(h, w, ids).pow(3).sum())(weight),
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_dot_compiles(sparse: bool) -> None:
    ids = torch.randint(7, (3, 4))
    results = []
    start = [torch.randn(n, 5) for n in (3, 7)]
    for dot in (embedding_dot, torch.compile(embedding_dot, fullgraph=True, backend="aot_eager")):
        h, weight = (t.clone().requires_grad_() for t in start)
        scores = dot(h, weight, ids, sparse=sparse)
        scores.square().sum().backward()
        assert weight.grad.is_sparse == sparse
        results.append([scores.detach(), h.grad, weight.grad.to_dense()])
    torch.testing.assert_close(*results)


def test_dot_under_autocast() -> None:
    """h comes to the table's dtype, and the table is left alone."""
    h, weight, ids = torch.randn(3, 5), torch.randn(7, 5, requires_grad=True), torch.randint(7, (3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        scores = embedding_dot(h.bfloat16(), weight, ids)
    assert torch.equal(scores, embedding_dot(h.bfloat16().float(), weight, ids))
    assert torch.equal(embedding_dot(h, weight, ids, sparse=True), embedding_dot(h, weight, ids))


def test_bits_depend_on_neither_batch_nor_threads(restored_threads: None) -> None:
    h, weight, ids = torch.randn(3000, 37), torch.randn(50, 37), torch.randint(50, (3000, 6))
    torch.set_num_threads(1)
    expected = embedding_dot(h, weight, ids)
    assert torch.equal(embedding_dot(h[7:9], weight, ids[7:9, 2:3]), expected[7:9, 2:3])
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(embedding_dot(h, weight, ids), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.tensor([[0, 7]])}, IndexError, r"indices\[0\]\[1\] is 7, expected a row from 0 to 6"),
        ({"indices": torch.tensor([[-1, 0]])}, IndexError, "is -1"),
        ({"indices": torch.tensor([[0.0]])}, TypeError, "expected indices of dtype int32 or int64, got torch.float32"),
        ({"indices": [[0]]}, TypeError, "got list"),
        ({"indices": torch.tensor([0])}, ValueError, r"expected indices of shape \[B, K\], got \[1\]"),
        ({"h": torch.zeros(1, 4)}, RuntimeError, r"expected h of shape \[1, 5\], got \[1, 4\]"),
        ({"h": torch.zeros(2, 5)}, RuntimeError, "expected h of shape"),
        ({"h": torch.zeros(1, 5).double()}, RuntimeError, "expected h"),
        ({"weight": torch.zeros(5)}, ValueError, "weight has to be a 2D"),
        ({"h": torch.zeros(1, 5).to_sparse()}, ValueError, "expected h to be a dense tensor, got torch.sparse_coo"),
        (
            {
                "h": torch.zeros(2, 5, device="meta"),
                "weight": torch.zeros(7, 5, device="meta"),
                "indices": torch.zeros(1, 2, dtype=torch.long, device="meta"),
            },
            RuntimeError,
            "expected h of shape",
        ),
    ],
)
def test_dot_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"h": torch.zeros(1, 5), "weight": torch.zeros(7, 5), "indices": torch.tensor([[0, 6]])}
    with pytest.raises(error, match=message):
        embedding_dot(**{**good, **change})


class Tagged(Tensor):
    """A subclass that sees which functions of torch's it goes through."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs)


def test_dot_gives_way_to_subclasses() -> None:
    h, weight, ids = torch.randn(3, 5), torch.randn(7, 5), torch.randint(7, (3, 4))
    scores = embedding_dot(h.as_subclass(Tagged), weight, ids)
    assert type(scores) is Tagged
    assert "matmul" in Tagged.seen
    torch.testing.assert_close(scores.as_subclass(Tensor), embedding_dot(h, weight, ids))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_table_is_updated_in_backward(name: str, dtype: torch.dtype) -> None:
    """As torch's optimizer does it with the sparse gradient, a use by a lookup included; h has its gradient."""
    start, settings = torch.randn(20, 9, dtype=dtype), {"lr": 0.1, **SETTINGS[name]}
    unfused = RowWiseAdagrad if name == "RowWiseAdagrad" else getattr(torch.optim, name)
    tables = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [unfused(tables[:1], **settings), getattr(nlpkernels.optim, name)(tables[1:], **settings)]
    for _ in range(3):
        h, cotangent = torch.randn(6, 9, dtype=dtype), torch.randn(6, 4, dtype=dtype)
        ids, others, grads = torch.randint(12, (6, 4)), torch.randint(20, (3,)), []
        for table, optimizer in zip(tables, optimizers, strict=True):
            optimizer.zero_grad()
            own = h.clone().requires_grad_()
            is_sparse = table is tables[0] and name != "RowWiseAdagrad"
            scores = embedding_dot(own, table, ids, sparse=is_sparse)
            rows = functional.embedding(others, table, sparse=is_sparse)
            ((scores * cotangent).sum() + rows.square().sum()).backward()
            if is_sparse:
                table.grad = table.grad.coalesce()
            optimizer.step()
            grads.append(own.grad)
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(*tables)
    assert not torch.equal(tables[1], start)


def test_updated_table_refuses_a_second_pass() -> None:
    table = nn.Parameter(torch.randn(5, 3))
    optimizer = nlpkernels.optim.SGD([table], lr=0.1)
    scores = embedding_dot(torch.randn(2, 3), table, torch.randint(5, (2, 4)))
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(scores.sum(), table, create_graph=True)
    scores.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        scores.sum().backward()
    optimizer.step()


# --- Negative sampling -----------------------------------------------------------------------------------------------


def loss_by_hand(h: Tensor, weight: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Equation 4 of Mikolov et al. 2013, for each target; the negatives of a target, but for itself."""
    positive = logsigmoid((h * weight[targets]).sum(1))
    scores = (weight[negatives] * h.unsqueeze(1)).sum(-1)
    return -positive - (logsigmoid(-scores) * (negatives != targets.unsqueeze(1))).sum(1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_loss_is_that_of_the_paper(dtype: torch.dtype, shared: bool, reduction: str) -> None:
    loss = NegativeSampling(10, 6, COUNTS, negatives=7, shared=shared, reduction=reduction, dtype=dtype)
    nn.init.normal_(loss.weight)
    start, targets = torch.randn(8, 6, dtype=dtype), torch.randint(10, (8,))
    h = start.clone().requires_grad_()
    torch.manual_seed(3)
    got = loss(h, targets.int())
    torch.manual_seed(3)
    negatives = loss.draw(targets)
    assert negatives.shape == ((7,) if shared else (8, 7))
    exact = [t.detach().double().requires_grad_() for t in (start, loss.weight)]
    each = loss_by_hand(*exact, targets, negatives.expand(8, 7))
    expected = each if reduction == "none" else getattr(each, reduction)()
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got.double(), expected, **close)
    cotangent = torch.randn_like(expected)
    grads = torch.autograd.grad(got, [h, loss.weight], cotangent.to(dtype))
    torch.testing.assert_close(
        [g.double() for g in grads], list(torch.autograd.grad(expected, exact, cotangent)), **close
    )


def chi_squared(drawn: Tensor, probabilities: Tensor) -> float:
    """Of rows that were drawn, as a number that is about normal (Wilson and Hilferty, 1931)."""
    possible = probabilities > 0
    found = torch.bincount(drawn.flatten(), minlength=len(probabilities)).double()
    assert not bool(found[~possible].any()), "a row that has no probability was drawn"
    expected = probabilities[possible] / probabilities.sum() * drawn.numel()
    degrees = int(possible.sum()) - 1
    statistic = ((found[possible] - expected) ** 2 / expected).sum().item()
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


@pytest.mark.parametrize("power", [0.75, 1.0, 0.0])
@pytest.mark.parametrize("vocabulary", [2, 3, 10, 64, 65, 1000])
def test_negatives_are_distributed_as_they_should(vocabulary: int, power: float) -> None:
    """Of each target the others, in proportion; in the order of frequency and in none."""
    torch.manual_seed(11)
    counts = torch.randint(1, 100, (vocabulary,)).double().pow(2)
    if vocabulary > 3:
        counts[torch.randperm(vocabulary)[: vocabulary // 5]] = 0
    for order in (torch.arange(vocabulary), counts.argsort(descending=True)):
        loss = NegativeSampling(vocabulary, 1, counts[order], negatives=50, power=power)
        weights = torch.where(counts[order] > 0, counts[order] ** power, 0)
        for target in {0, vocabulary - 1, int(weights.argmax()), vocabulary // 2}:
            drawn = loss.draw(torch.full((4000,), target))
            assert not bool((drawn == target).any())
            others = weights.clone()
            others[target] = 0
            assert vocabulary == 2 or chi_squared(drawn, others) < 5
        shared = NegativeSampling(vocabulary, 1, counts[order], negatives=100_000, power=power, shared=True)
        assert chi_squared(shared.draw(torch.zeros(1, dtype=torch.long)), weights) < 5


def test_neighbouring_draws_are_independent() -> None:
    """Of a target and of the next, and of one call and the next."""
    torch.manual_seed(5)
    loss = NegativeSampling(4, 1, torch.tensor([1, 2, 3, 4]), negatives=3, power=1.0)
    weights = torch.tensor([0, 2, 3, 4.0], dtype=torch.float64)
    first, second = (loss.draw(torch.zeros(30_000, dtype=torch.long)) for _ in range(2))
    pairs = torch.outer(weights, weights).flatten()
    for a, b in ((first[:, 0], first[:, 1]), (first[:-1, 2], first[1:, 0]), (first[:, 0], second[:, 0])):
        assert chi_squared(a * 4 + b, pairs) < 5


def test_a_seed_repeats_the_draws(restored_threads: None) -> None:
    loss = NegativeSampling(1000, 1, torch.arange(1000), negatives=5)
    targets = torch.randint(1000, (5000,))
    draws = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(4)
        draws.append(loss.draw(targets))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(loss.draw(targets), draws[0])


def test_rows_that_are_next_to_impossible() -> None:
    """A target that has nearly all of the line leaves the rest to the others."""
    loss = NegativeSampling(3, 1, torch.tensor([10**15, 1, 3]), power=1.0, negatives=2000)
    drawn = loss.draw(torch.zeros(10, dtype=torch.long))
    assert chi_squared(drawn, torch.tensor([0, 1, 3.0], dtype=torch.float64)) < 6
    assert bool((loss.draw(torch.tensor([1, 2])) == 0).all())


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_trains_in_backward(name: str) -> None:
    """Both tables of a word2vec, by nlpkernels.optim and by sparse gradients: the same."""
    ids, targets = torch.randint(20, (4, 16, 3)), torch.randint(20, (4, 16))
    settings = {"lr": 0.1, **SETTINGS[name]}
    unfused = RowWiseAdagrad if name == "RowWiseAdagrad" else getattr(torch.optim, name)
    results: list[list[Tensor]] = []
    for fused in (True, False):
        torch.manual_seed(0)
        sparse = not fused and name != "RowWiseAdagrad"
        bag = nlpkernels.EmbeddingBag(20, 8, sparse=sparse)
        loss = NegativeSampling(20, 8, torch.arange(1, 21), sparse=sparse)
        tables = [bag.weight, loss.weight]
        optimizer = (getattr(nlpkernels.optim, name) if fused else unfused)(tables, **settings)
        losses = []
        for step in range(4):
            optimizer.zero_grad()
            value = loss(bag(ids[step]), targets[step])
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        results.append([*losses, *(t.detach() for t in tables)])
    torch.testing.assert_close(*results)
    assert torch.isclose(results[0][0], torch.tensor(6 * math.log(2)))  # the table was zeros


def test_loss_is_a_module_like_others(tmp_path: Any) -> None:
    loss = NegativeSampling(10, 6, COUNTS, negatives=3)
    assert list(loss.state_dict()) == ["weight"]
    nn.init.normal_(loss.weight)
    targets, h = torch.randint(10, (4,)), torch.randn(4, 6)
    torch.save(loss, tmp_path / "loss.pt")
    same = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(tmp_path / "loss.pt", weights_only=False)]
    values = []
    for module in (loss, *same):
        torch.manual_seed(1)
        values.append(module(h, targets))
    assert all(torch.equal(v, values[0]) for v in values)
    half = copy.deepcopy(loss).half()
    assert all(map(torch.equal, half._line, loss._line))  # .half() changes no probability
    assert half(h.half(), targets).dtype == torch.float16
    assert repr(loss) == "NegativeSampling(10, 6, negatives=3, power=0.75)"
    assert loss(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)).isnan()
    loss.reset_parameters()
    assert not bool(loss.weight.any())


def test_loss_compiles() -> None:
    loss = NegativeSampling(10, 6, COUNTS, negatives=3)
    nn.init.normal_(loss.weight)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    h = torch.randn(4, 6, requires_grad=True)
    compiled(h, torch.randint(10, (4,))).backward()
    assert h.grad.shape == (4, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.ones(4)}, r"expected counts of shape \[5\], got \[4\]"),
        ({"counts": torch.tensor([1, 0, 0, 0, 0])}, "two rows or more"),
        ({"counts": torch.zeros(5)}, "two rows or more"),
        ({"counts": torch.tensor([1, 1, 1, 1, -1])}, "counts of 0 or more"),
        ({"counts": torch.tensor([1, 1, 1, 1, math.nan])}, "counts of 0 or more"),
        ({"counts": torch.full((5,), 1e30), "power": 20.0}, "a power is finite"),
        ({"negatives": -1}, "negatives to be 0 or more, got -1"),
        ({"negatives": 2.5}, "negatives to be 0 or more, got 2.5"),
        ({"counts": [], "num_embeddings": 0}, None),
        ({"counts": torch.ones(5, device="meta")}, "counts with data"),
        ({"reduction": "max"}, "reduction 'mean', 'sum' or 'none', got 'max'"),
    ],
)
def test_loss_refuses_settings(change: dict[str, Any], message: str | None) -> None:
    if message is None:
        NegativeSampling(**{"embedding_dim": 2, **change})
        return
    with pytest.raises(ValueError, match=message):
        NegativeSampling(**{"num_embeddings": 5, "embedding_dim": 2, "counts": torch.ones(5), **change})


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.tensor([0, 5]), IndexError, "is 5, expected a row from 0 to 4"),
        (torch.tensor([0, -1]), IndexError, "is -1"),
        (torch.tensor([0.0, 1]), TypeError, "targets of dtype int32 or int64, got torch.float32"),
        (torch.tensor([[0, 1]]), ValueError, r"targets of shape \[B\]"),
        ([0, 1], TypeError, "targets of dtype int32 or int64, got list"),
    ],
)
def test_loss_refuses_targets(targets: Tensor, error: type[Exception], message: str, shared: bool) -> None:
    loss = NegativeSampling(5, 3, torch.ones(5), shared=shared)
    with pytest.raises(error, match=message):
        loss(torch.zeros(2, 3), targets)


def test_h_that_does_not_fit() -> None:
    for shared in (False, True):
        with pytest.raises(RuntimeError, match=r"h of shape \[1, 3\], got \[2, 3\]"):
            NegativeSampling(5, 3, torch.ones(5), shared=shared)(torch.zeros(2, 3), torch.tensor([0]))


def test_updates_between_forward_and_backward() -> None:
    """Do no harm where h needs no gradient: the table's own does not read it."""
    i, h = torch.tensor([[0, 1], [2, 3]]), torch.randn(2, 3)
    table = nn.Parameter(torch.randn(7, 3))
    before = table.detach().clone()
    optimizer = nlpkernels.optim.SGD([table], lr=0.1)
    losses = [embedding_dot(h, table, i).sum() for _ in range(2)]
    for loss in losses:
        loss.backward()
    optimizer.step()
    expected = before.index_add(0, i.flatten(), -0.2 * h.repeat_interleave(2, 0))
    torch.testing.assert_close(table.detach(), expected)
    wanted = h.clone().requires_grad_()  # its gradient does
    losses = [embedding_dot(wanted, table, i).sum() for _ in range(2)]
    losses[0].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[1].backward()


def test_made_on_meta_and_filled_afterwards() -> None:
    counts = [50, 1, 1, 1, 1]
    with torch.device("meta"):
        loss = NegativeSampling(5, 3, counts)
    with FakeTensorMode():
        NegativeSampling(5, 3, counts)
    assert loss.draw(torch.tensor([0, 1], device="meta")).is_meta
    loss.to_empty(device="cpu").load_state_dict(NegativeSampling(5, 3, counts).state_dict())
    expected = NegativeSampling(5, 3, torch.tensor(counts))
    draws = []
    for module in (loss, expected, copy.deepcopy(loss).double(), AveragedModel(loss, use_buffers=True).module):
        torch.manual_seed(2)
        draws.append(module.draw(torch.tensor([0, 1, 0])))
    assert all(torch.equal(d, draws[0]) for d in draws)


def test_loss_is_a_node_of_fx() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = NegativeSampling(5, 3, torch.ones(5))

        def forward(self, h: Tensor, targets: Tensor) -> Tensor:
            return 2 * self.loss(h, targets)

    traced = torch.fx.symbolic_trace(Model())
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["loss"]
    h, targets = torch.randn(2, 3), torch.tensor([0, 4])
    torch.testing.assert_close(traced(h, targets), torch.tensor(12 * math.log(2)))


def test_modes_see_the_function() -> None:
    class Sees(TorchFunctionMode):
        seen: ClassVar[list[Any]] = []

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(function)
            return function(*args, **(kwargs or {}))

    with Sees():
        embedding_dot(torch.zeros(1, 3), torch.zeros(5, 3), torch.zeros(1, 2, dtype=torch.long))
    assert embedding_dot in Sees.seen


def test_shared_negatives_of_a_sparse_table_compile() -> None:
    loss = NegativeSampling(10, 6, COUNTS, shared=True, sparse=True)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(4, 6), torch.randint(10, (4,))).backward()
    assert loss.weight.grad.is_sparse


def test_lines_end_where_they_should() -> None:
    """Rows of a line: whatever the weights, a number of the line belongs to one of them, and guide begins no later."""
    for count in (1, 2, 3, 4, 5, 127, 128, 129, 1000):
        weights = torch.rand(count) * (torch.rand(count) < 0.7)
        weights[count // 2] = 1
        cumulative, guide = reference.line_of(weights)
        assert int(cumulative[-1]) == reference.PLACES
        assert len(guide) >= count > len(guide) // 2
        assert bool((guide < count).all())
        assert bool((guide.diff() >= 0).all())


@pytest.mark.parametrize(
    "line",
    [[5, 3], [-(2**63), 2**53], [2**63 - 1, 2**53], [0, 2**53 + 1], [2**53, 2**53], [0, 0], [-5, -1]],
    ids=str,
)
def test_lines_that_are_none_are_refused(line: list[int]) -> None:
    """Places that fall, are negative, past the end, or all the target's."""
    seed, targets = torch.tensor(1), torch.tensor([0])
    guide = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="no row but target 0 has a probability, or cumulative does not rise"):
        torch.ops.nlpkernels.draw_negatives(seed, torch.tensor(line), guide, targets, 3)
    with pytest.raises(IndexError, match=r"targets\[0\] is 2, expected a row from 0 to 1"):
        torch.ops.nlpkernels.draw_negatives(seed, torch.tensor([0, 2**53]), guide, torch.tensor([2]), 3)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64])
def test_h_of_another_dtype_is_refused(shared: bool, dtype: torch.dtype) -> None:
    module = nlpkernels.NegativeSampling(5, 4, torch.ones(5), negatives=2, shared=shared)
    with pytest.raises(RuntimeError, match=r"expected h of dtype torch.float32 like weight, got torch\."):
        module(torch.ones(2, 4, dtype=dtype), torch.tensor([0, 1]))
