"""CUDA: without a GPU what shapes, registrations and traces tell; with one what only a stream and a graph can show.

That the kernels compute what they should is for the other files: with a GPU, or with --emulated-cuda.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_ops import ALL_OPS, OPS, WITH_KERNELS, samples_of
from test_recurrent import CELLS, LAYERS, pair, states_for, tensors
from tolerances import FLOOR, TF32, relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves, tree_map_only

import nlpkernels
from nlpkernels import _ops

KINDS = ["RNN", "LSTM", "GRU"]
needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA makes no tensor of it")
needs_kernels = pytest.mark.skipif(not _ops.USES_CUDA_KERNELS, reason="the CUDA kernels are not in use")


# --- Without a GPU ----------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("name", sorted({*WITH_KERNELS, "embedding_bag_update"} - {"draw_negatives"}))  # reference.py's
def test_every_op_has_its_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nlpkernels::{name}", "CUDA")


@needs_cuda_torch
@pytest.mark.parametrize("name", ALL_OPS)
def test_fake_kernels_give_what_kernels_give(name: str) -> None:
    """Shapes, strides and dtypes of tensors on CUDA that have no data, against real ones on the CPU."""
    for args in samples_of(name, "cpu"):
        with torch.no_grad():
            real = getattr(OPS, name)(*args)
        with FakeTensorMode(shape_env=ShapeEnv()):

            def on_cuda(tensor: Tensor, args: tuple[Any, ...] = args) -> Tensor:
                device = "cpu" if name.startswith("recurrent") and tensor.dtype == torch.long else "cuda"
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

            fake = getattr(OPS, name)(*tree_map_only(Tensor, on_cuda, args))
        for a, b in zip(tree_leaves(fake), tree_leaves(real), strict=True):
            assert (a.device.type, a.dtype, a.dim()) == ("cuda", b.dtype, b.dim())
            if "sparse" not in name:  # how many rows are touched is in the data
                assert (a.shape, a.stride()) == (b.shape, b.stride())


@needs_cuda_torch
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_fake_layers(kind: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"bidirectional": True, "batch_first": True, "dtype": dtype}
    real = getattr(torch.nn, kind)(6, 5, 2, **options)(torch.randn(3, 4, 6, dtype=dtype))
    with FakeTensorMode(), torch.no_grad():
        layer = getattr(nlpkernels, kind)(6, 5, 2, device="cuda", **options)
        for a, b in zip(
            tree_leaves(layer(torch.randn(3, 4, 6, device="cuda", dtype=dtype))), tree_leaves(real), strict=True
        ):
            assert (a.device.type, a.dtype, a.shape) == ("cuda", b.dtype, b.shape)
        with pytest.raises(RuntimeError, match="Expected 6, got 7"):
            layer(torch.randn(3, 4, 7, device="cuda", dtype=dtype))


@needs_cuda_torch
def test_fake_bags() -> None:
    with FakeTensorMode(), torch.no_grad():
        ids = torch.randint(10, (3, 4), device="cuda")
        for mode in ("sum", "mean", "max"):
            pooled = nlpkernels.EmbeddingBag(10, 4, mode=mode, device="cuda")(ids)
            assert (pooled.device.type, pooled.shape) == ("cuda", (3, 4))
        with pytest.raises(TypeError, match="int32 or int64"):
            nlpkernels.EmbeddingBag(10, 4, device="cuda")(ids.short())


@needs_cuda_torch
@pytest.mark.parametrize("kind", KINDS)
def test_traces_to_one_op_a_layer(kind: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        layer = getattr(nlpkernels, kind)(6, 5, 2, bidirectional=True, device="cuda")
        traced = make_fx(lambda x: layer(x)[0])(torch.randn(4, 3, 6, device="cuda"))
    assert sum(node.target is OPS.recurrent.default for node in traced.graph.nodes) == 2


# --- Left to torch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is treated as CUDA is while our kernels are off; a recurrent op of ours would fail."""

    def refuse(*args: Any) -> None:
        raise AssertionError("an op of ours is called")

    monkeypatch.setattr(_ops, "LEFT_TO_TORCH", frozenset({"cpu"}))
    monkeypatch.setattr(_ops, "_C", SimpleNamespace(embedding_bag=_ops._C.embedding_bag))
    monkeypatch.setattr(_ops, "recurrent", refuse)


@pytest.mark.usefixtures("left_to_torch")
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("given", ["padded", "unbatched", "packed", "lengths"])
@pytest.mark.parametrize("kind", LAYERS)
def test_torchs_layers_serve(kind: str, given: str, training: bool) -> None:
    """Everything that torch.nn takes, and lengths, of sequences without a step too; gradients in eval mode."""
    theirs, ours = (layer.train(training) for layer in pair(kind, 6, 5, 2, bidirectional=True, batch_first=True))
    x, lengths = torch.randn(4, 7, 6), torch.tensor([3, 5, 2, 5])
    hx = states_for(ours, () if given == "unbatched" else (4,), torch.float32, "cpu")
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    x = {"packed": packed, "unbatched": x[0]}.get(given, x)
    if given != "lengths":
        expected, results = theirs(x, hx), ours(x, hx)
        if given == "packed":
            assert all(map(torch.equal, results[0][1:], expected[0][1:]))
    else:
        expected, results = theirs(packed, hx), ours(x, hx, lengths=lengths)
        unpacked = nn.utils.rnn.pad_packed_sequence(expected[0], batch_first=True, total_length=7)[0]
        expected = (unpacked, expected[1])
        lengths[2] = 0
        without, *final = tensors(ours(x, hx, lengths=lengths))
        assert all(torch.equal(state[:, 2], initial[:, 2]) for state, initial in zip(final, tensors(hx), strict=True))
        torch.testing.assert_close(without[[0, 1, 3]], unpacked[[0, 1, 3]])
        assert not without[2].any()
    for one, other in zip(tensors(results), tensors(expected), strict=True):
        torch.testing.assert_close(one, other)
    gradients = [
        torch.autograd.grad(sum(tensor.sin().sum() for tensor in tensors(found)), list(layer.parameters()))
        for layer, found in ((theirs, expected), (ours, results))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("left_to_torch")
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "unbiased"])
@pytest.mark.parametrize("kind", CELLS)
def test_torchs_cells_serve(kind: str, bias: bool) -> None:
    name, own = CELLS[kind]
    theirs, ours = (getattr(library, name)(6, 5, bias, **own) for library in (nn, nlpkernels))
    ours.load_state_dict(theirs.state_dict())
    for shape in ((4, 6), (6,)):
        x, h = torch.randn(shape), torch.randn(*shape[:-1], 5)
        for hx in (None, (h, h.sin()) if kind == "lstm" else h):
            for one, other in zip(tensors(ours(x, hx)), tensors(theirs(x, hx)), strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("left_to_torch")
@pytest.mark.parametrize("name", [*KINDS, "RNNCell", "LSTMCell", "GRUCell"])
def test_torchs_layers_get_no_parameters_that_do_not_fit(name: str) -> None:
    ours, suffix = getattr(nlpkernels, name)(4, 5), "" if "Cell" in name else "_l0"
    for which in ("weight_ih", "weight_hh", "bias_ih"):
        good = getattr(ours, which + suffix)
        for bad in (good[:3], good[None], good[..., :3]):
            setattr(ours, which + suffix, nn.Parameter(bad))
            with pytest.raises(RuntimeError, match="expected parameters of shapes"):
                ours(torch.randn(3, 4))
        setattr(ours, which + suffix, good)
    ours(torch.randn(3, 4))


def test_what_torchs_layers_cannot_do_is_done(left_to_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No steps, states of all steps, one mask for all steps, transforms: by ops of ours."""
    monkeypatch.undo()
    monkeypatch.setattr(_ops, "LEFT_TO_TORCH", frozenset({"cpu"}))
    layer = nlpkernels.GRU(6, 5, recurrent_dropout=0.5)
    h0, x = torch.randn(1, 3, 5), torch.randn(4, 3, 6)
    assert torch.equal(layer(x[:0], h0)[1], h0)
    assert torch.equal(layer(x, h0, lengths=[0, 0, 0])[1], h0)
    assert layer(x, return_state_sequence=True)[1].shape == (1, 4, 3, 5)
    monkeypatch.setattr(torch, "gru", None)
    layer(x)
    rows = torch.func.vmap(lambda one: layer.eval()(one)[0], 1, 1)(x)
    monkeypatch.undo()
    torch.testing.assert_close(rows, layer(x)[0])


def test_torchs_lookup_is_told_of_wrong_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "LEFT_TO_TORCH", frozenset({"cpu"}))
    monkeypatch.setattr(_ops, "embedding_bag", None)
    table = nlpkernels.Embedding(10, 4, padding_idx=1)
    ids = torch.tensor([[1, 2], [3, 1]])
    assert torch.equal(table(ids), table.weight[ids])
    (gradient,) = torch.autograd.grad(table(ids).sum(), table.weight)
    assert gradient.any(1).nonzero().squeeze(1).tolist() == [2, 3]
    with pytest.raises(IndexError, match=r"flattened indices\[2\] is 10, expected a row from 0 to 9"):
        table(torch.tensor([[1, 2], [10, 1]]))


# --- The check of indices ---------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> str:
    """The device whose tensors csrc/cuda serves."""
    if request.config.getoption("emulated_cuda"):
        return "cpu"
    if not (torch.cuda.is_available() and _ops.USES_CUDA_KERNELS):
        pytest.skip("no CUDA kernels")
    return "cuda"


def test_wrong_indices_may_be_raised_later(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They add nothing, and the next call raises."""
    device = kernels
    monkeypatch.setenv("NLPKERNELS_CUDA_CHECK", "later")
    ours = nlpkernels.EmbeddingBag(10, 4, mode="sum", device=device)
    right, wrong = torch.tensor([[1, 2]], device=device), torch.tensor([[1, 2, 99]], device=device)
    expected = ours(right)
    assert torch.equal(ours(wrong), expected)
    if device == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(IndexError, match=r"indices\[0\]\[2\] is 99, expected a row from 0 to 9"):
        ours(right)
    assert torch.equal(ours(right), expected)
    monkeypatch.setenv("NLPKERNELS_CUDA_CHECK", "never")
    with pytest.raises(ValueError, match="'never', expected now or later"):
        ours(right)


def test_an_update_with_a_wrong_index_changes_nothing(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in the rows whose indices are right, although nobody has been told yet."""
    device = kernels
    monkeypatch.setenv("NLPKERNELS_CUDA_CHECK", "later")
    ids, offsets = torch.arange(200, device=device) % 10, torch.tensor([0, 120], device=device)
    wrong_ids, wrong_offsets = ids.clone(), torch.tensor([1, 120], device=device)
    wrong_ids[133] = 10
    for rule, states in (("sgd", 0), ("rowwise_adagrad", 1), ("adagrad", 1), ("adam", 2)):
        weight = torch.rand(10, 4, device=device)
        shape = (10,) if rule == "rowwise_adagrad" else (10, 4)
        first, second = (torch.rand(shape, device=device) if i < states else None for i in range(2))
        settings = [0.1, 0.1, 0.9, 0.9][: {"sgd": 1, "adam": 4}.get(rule, 2)]
        before = [t.clone() for t in (weight, first, second) if t is not None]
        none = torch.empty(0, dtype=torch.long, device=device)

        def update(
            ids: Tensor,
            offsets: Tensor,
            weight: Tensor = weight,
            first: Any = first,
            second: Any = second,
            none: Tensor = none,
            rule: str = rule,
            settings: list[float] = settings,
        ) -> None:
            grad = torch.ones(2, 4, device=device)
            OPS.embedding_bag_update(
                grad, weight, first, second, ids, offsets, None, none, "sum", -1, False, False, rule, settings
            )
            if device == "cuda":
                torch.cuda.synchronize()  # fmt: skip

        for wrong, message in (
            ((wrong_ids, offsets), r"indices\[133\] is 10"),
            ((ids, wrong_offsets), r"offsets\[0\]"),
        ):
            update(*wrong)
            with pytest.raises((IndexError, ValueError), match=message):
                update(ids, offsets)
            after = [t for t in (weight, first, second) if t is not None]
            assert all(map(torch.equal, after, before))
        update(ids, offsets)
        assert not torch.equal(weight, before[0])


# --- One kernel for all steps -----------------------------------------------------------------------------------------


PERSISTENT = "NLPKERNELS_CUDA_PERSISTENT"
# T, B, I, H: one chunk of columns and several, of the warps' turns too; columns that are not whole 16 bytes; several
# blocks, groups of sequences; and on a device of few multiprocessors several tiles of rows, several passes.
SEQUENCES = [(3, 5, 4, 7, 132), (4, 67, 1, 40, 132), (3, 3, 8, 264, 132), (3, 5, 4, 40, 6), (3, 130, 4, 24, 8)]
HALVES = [torch.bfloat16, torch.float16]
SEQUENCES_OF_KINDS = [
    *itertools.product(("rnn_tanh", "rnn_relu", "lstm", "gru"), SEQUENCES, HALVES),
    *itertools.product(("rnn_tanh",), [(2, 2, 3, 1100, 132)], HALVES),  # a matter of the product alone
    # TF32, against float32: not of a ReLU, of which some units would be on the other side of 0.
    *itertools.product(("rnn_tanh", "lstm", "gru"), [SEQUENCES[i] for i in (0, 2, 4)], [torch.float32]),
]


@pytest.mark.parametrize(("kind", "shape", "dtype"), SEQUENCES_OF_KINDS, ids=str)
def test_one_kernel_gives_what_steps_give(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole batches, and packed ones under a mask: results, and, by gradients, what is kept for them.

    Not a ReLU's gradients: a unit that is almost 0 has one or not by how it was rounded.
    """
    steps, batch, inputs, hidden, multiprocessors = shape
    monkeypatch.setenv("EMULATED_CUDA_MULTIPROCESSORS", str(multiprocessors))
    tolerance = TF32 if dtype == torch.float32 else FLOOR[dtype]
    _, layer = pair(kind, inputs, hidden, bidirectional=True)
    _, masking = pair(kind, inputs, hidden, bidirectional=True)
    masking.recurrent_dropout = 0.3
    x = torch.randn(steps, batch, inputs, dtype=dtype, device=kernels)
    lengths = torch.randint(1, steps + 1, (batch,))
    lengths[0] = steps
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    for module, given in ((layer, x), (masking, packed)):
        module.to(kernels, dtype)
        hx, seed = states_for(module, (batch,), dtype, kernels), torch.randint(1000, ()).item()
        found = []
        for when in ("never", "always"):
            monkeypatch.setenv(PERSISTENT, when)
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", when == "always")
            torch.manual_seed(seed)
            results = tensors(module(given, hx))
            found.append(results)
            if kind != "rnn_relu":
                total = sum(result.float().square().sum() for result in results)
                found[-1] = [*results, *torch.autograd.grad(total, list(module.parameters()))]
        for one, expected in zip(found[1], found[0], strict=True):
            assert one.dtype == expected.dtype
            assert relative_error(one, expected) <= tolerance  # of sums over k in another order, then rounded


@pytest.mark.parametrize(("kind", "shape", "dtype"), SEQUENCES_OF_KINDS, ids=str)
def test_one_kernel_goes_back_as_steps_do(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the same results of forward: of whole batches, and of packed ones, where sequences may have no step."""
    steps, batch, inputs, hidden, multiprocessors = shape
    monkeypatch.setenv("EMULATED_CUDA_MULTIPROCESSORS", str(multiprocessors))
    gates, has_c = {"lstm": 4, "gru": 3}.get(kind, 1), kind == "lstm"

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=dtype, device=kernels)

    weights = [
        random(gates * hidden, *columns) / hidden**0.5 for _ in range(2) for columns in ((inputs,), (hidden,), (), ())
    ]
    sizes = torch.randint(batch + 1, (steps,)).sort(descending=True).values
    sizes[0].clamp_(min=1)
    for batch_sizes, masked, given, needed in (
        (None, False, "y h c", (True, True)),
        (None, True, "y", (False, False)),
        (sizes, False, "h c", (False, True)),
        (sizes, True, "y h c", (True, True)),
    ):
        x = random(steps, batch, inputs) if batch_sizes is None else random(int(batch_sizes.sum()), inputs)
        h0, dh_n = random(2, batch, hidden), random(2, batch, hidden) if "h" in given else None
        c0, dc_n = (random(2, batch, hidden) if has_c and part in given + "0" else None for part in "0c")
        h_mask = torch.rand(2, batch, hidden, device=kernels).to(dtype) if masked else None
        arguments = (x, batch_sizes, h0, c0, weights, kind)
        monkeypatch.setenv(PERSISTENT, "never")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        y, _, _, workspace = OPS.recurrent(*arguments, True, h_mask)
        dy = torch.randn_like(y) if "y" in given else None
        found = []
        for when in ("never", "always"):
            monkeypatch.setenv(PERSISTENT, when)
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", when == "always")
            found.append(OPS.recurrent_backward(dy, dh_n, dc_n, *arguments, y, workspace, *needed, h_mask))
        for one, expected in zip(tree_leaves(found[1]), tree_leaves(found[0]), strict=True):
            assert one.dtype == expected.dtype
            assert relative_error(one, expected) <= (TF32 if dtype == torch.float32 else FLOOR[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_gives_a_sequence_the_same_bits_in_any_batch(
    kind: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And on any device, back to its first state; products of x have one term here, for they are not its own."""
    monkeypatch.setenv(PERSISTENT, "always")
    layer = getattr(nlpkernels, kind)(1, 300, bidirectional=True, dtype=torch.bfloat16, device=kernels)
    x = torch.randn(3, 40, 1, dtype=torch.bfloat16, device=kernels)
    hx = states_for(layer, (40,), torch.bfloat16, kernels)

    def run(some: slice) -> list[Tensor]:
        states = [state[:, some].clone().requires_grad_() for state in tensors(hx)]
        y = layer(x[:, some], states if kind == "LSTM" else states[0])[0]
        return [y, *torch.autograd.grad(y.float().square().sum(), states)]

    expected = run(slice(None))
    for some, multiprocessors in ((slice(0, 1), 132), (slice(30, 40), 132), (slice(7, 8), 70)):
        monkeypatch.setenv("EMULATED_CUDA_MULTIPROCESSORS", str(multiprocessors))
        for one, of_all in zip(run(some), expected, strict=True):
            assert torch.equal(one, of_all[:, some])


def test_one_kernel_is_where_it_fits_and_where_it_is_wanted(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16, device=kernels)
    projected = nlpkernels.LSTM(4, 6, proj_size=5, dtype=torch.bfloat16, device=kernels)
    wide = nlpkernels.LSTM(4, 6, device=kernels)
    with torch.no_grad():
        for when in ("never", "fits"):
            monkeypatch.setenv(PERSISTENT, when)
            for module, given in ((projected, x), (wide, x.float())):
                module(given)
        monkeypatch.setenv(PERSISTENT, "always")
        for module, given in ((projected, x), (wide, x.float())):
            with pytest.raises(RuntimeError, match="PERSISTENT is always, but no kernel for 6 hidden units, 3 seq"):
                module(given)
        large = nlpkernels.LSTM(4, 4096 if kernels == "cuda" else 400, dtype=torch.bfloat16, device=kernels)
        monkeypatch.setenv("EMULATED_CUDA_MULTIPROCESSORS", "1")
        with pytest.raises(RuntimeError, match="3 sequences and 1 directions of BFloat16 fits on this device"):
            large(x)
    monkeypatch.setenv(PERSISTENT, "fits")
    y = large(x)[0]
    y.sum().backward(retain_graph=True)
    assert y.isfinite().all() and large.weight_hh_l0.grad.isfinite().all()
    monkeypatch.setenv(PERSISTENT, "always")
    with pytest.raises(RuntimeError, match="recurrent_backward: NLPKERNELS_CUDA_PERSISTENT is always, but no kernel"):
        y.sum().backward()
    monkeypatch.setenv(PERSISTENT, "often")
    with pytest.raises(ValueError, match="'often', expected never, fits or always"):
        wide(x.float())


# --- On a GPU ---------------------------------------------------------------------------------------------------------


def training_steps(dtype: torch.dtype) -> dict[str, Callable[[], list[Tensor]]]:
    """Results and gradients of each layer, as functions of nothing, on inputs that stay."""
    steps: dict[str, Callable[[], list[Tensor]]] = {}
    x = torch.randn(20, 9, 48, device="cuda", dtype=dtype, requires_grad=True)
    for kind in KINDS:
        layer = getattr(nlpkernels, kind)(48, 72, 2, bidirectional=True, device="cuda", dtype=dtype)

        def recurrent(layer: torch.nn.Module = layer) -> list[Tensor]:
            y = layer(x)[0]
            return [y.detach(), *torch.autograd.grad(y.float().square().mean(), [x, *layer.parameters()])]

        steps[kind] = recurrent
    ids = torch.randint(500, (300, 40), device="cuda")
    for mode in ("mean", "max"):
        bag = nlpkernels.EmbeddingBag(500, 100, mode=mode, device="cuda", dtype=dtype)

        def pool(bag: torch.nn.Module = bag) -> list[Tensor]:
            pooled = bag(ids)
            return [pooled.detach(), *torch.autograd.grad(pooled.float().square().mean(), list(bag.parameters()))]

        steps[mode] = pool
    table, states = torch.randn(500, 100, device="cuda").to(dtype), torch.rand(2, 500, 100, device="cuda")
    grad, none = torch.randn(300, 100, device="cuda").to(dtype), torch.empty(0, dtype=torch.long, device="cuda")
    for rule, given, settings in (
        ("rowwise_adagrad", [states[0, :, 0].contiguous()], [0.1, 0.1]),
        ("adam", [*states], [0.1, 0.1, 0.9, 0.9]),
    ):

        def update(rule: str = rule, given: list[Tensor] = given, settings: list[float] = settings) -> list[Tensor]:
            own = [tensor.clone() for tensor in (table, *given)]
            weight, first, second, *_ = (*own, None)
            rest = (ids, None, None, none, "sum", -1, False, False, rule, settings)
            OPS.embedding_bag_update(grad, weight, first, second, *rest)
            return own

        steps[rule] = update
    return steps


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], list[Tensor]]]:
    torch.use_deterministic_algorithms(False)  # poisoned memory is a kernel more for each tensor
    monkeypatch.setenv("NLPKERNELS_CUDA_CHECK", "later")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return training_steps(request.param)


def bits(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])


@pytest.mark.skipif(not (torch.cuda.is_available() and _ops.USES_CUDA_KERNELS), reason="no GPU, or not its kernels")
class TestOnGpu:
    def test_repeats_are_bit_identical(self, steps: dict[str, Callable[[], list[Tensor]]]) -> None:
        for name, step in steps.items():
            first = bits(step())
            differs = torch.zeros((), dtype=torch.bool, device="cuda")
            for _ in range(1000):
                differs |= (bits(step()) != first).any()
            assert not differs, name

    def test_two_streams_at_once(self, steps: dict[str, Callable[[], list[Tensor]]]) -> None:
        expected = {name: bits(step()) for name, step in steps.items()}
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        results: list[tuple[str, Tensor]] = []
        for _ in range(20):
            for name, step in steps.items():
                for stream in streams:
                    with torch.cuda.stream(stream):
                        results.append((name, bits(step())))
        torch.cuda.synchronize()
        for name, result in results:
            assert torch.equal(result, expected[name]), name

    def test_no_step_waits_for_the_device(self, steps: dict[str, Callable[[], list[Tensor]]]) -> None:
        for step in steps.values():
            step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_can_be_captured(self, steps: dict[str, Callable[[], list[Tensor]]]) -> None:
        for name, step in steps.items():
            side = torch.cuda.Stream()
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                expected = bits(step())
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                results = step()
            for result in results:
                result.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(bits(results), expected), name

    def test_tf32_follows_the_flag_of_torchs_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = nlpkernels.LSTM(256, 256, device="cuda")
        x = torch.randn(10, 64, 256, device="cuda")
        with torch.no_grad():
            exact = nlpkernels.LSTM(256, 256, device="cuda", dtype=torch.float64)
            exact.load_state_dict(layer.state_dict())
            expected, errors = exact(x.double())[0], []
            for allowed in (False, True):
                monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
                errors.append(((layer(x)[0].double() - expected).norm() / expected.norm()).item())
        assert errors[0] < 2e-6 < errors[1] < TF32

    def test_long_rows_and_large_tables(self) -> None:
        """More than 2^31 elements in a table, and in what is pooled."""
        rows, columns = 2**25, 72
        if torch.cuda.mem_get_info()[0] < 20 * 2**30:
            pytest.skip("not enough memory")
        weight = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
        weight.copy_(torch.arange(rows, device="cuda").remainder(251)[:, None].expand(rows, columns))
        ids = torch.tensor([[rows - 1, 1], [rows - 2, 3]], device="cuda")
        pooled = nlpkernels.functional.embedding_bag(ids, weight, mode="mean")
        expected = weight[ids].float().mean(1).bfloat16()
        assert torch.equal(pooled, expected)
        before, ones = weight[ids.reshape(-1)], torch.ones(2, columns, device="cuda", dtype=torch.bfloat16)
        none = torch.empty(0, dtype=torch.long, device="cuda")
        rest = (ids, None, None, none, "sum", -1, False, False, "sgd", [1.0])
        OPS.embedding_bag_update(ones, weight, None, None, *rest)
        assert torch.equal(weight[ids.reshape(-1)], before - 1)
