"""What every op owes the dispatcher, how the libraries are picked, and the reference that stands in for kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

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


def backward_samples(device: str) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of the ops that are first derivatives, from their forward samples."""
    samples: dict[str, list[tuple[Any, ...]]] = {
        "recurrent_backward": [],
        "recurrent_states_backward": [],
        "embedding_bag_backward": [],
        "embedding_bag_sparse_backward": [],
        "embedding_bag_per_sample_backward": [],
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
            samples["embedding_bag_per_sample_backward"].append((grad, table, ids, offsets, padding, last))
    return samples


ALL_OPS = [
    "recurrent",
    "recurrent_backward",
    "recurrent_states_backward",
    "embedding_bag",
    "embedding_bag_backward",
    "embedding_bag_sparse_backward",
    "embedding_bag_per_sample_backward",
]
WITH_KERNELS = [name for name in ALL_OPS if name != "recurrent_states_backward"]  # which always runs reference.py


def samples_of(name: str, device: str) -> list[tuple[Any, ...]]:
    if name == "recurrent":
        return recurrent_samples(device)
    return bag_samples(device) if name == "embedding_bag" else backward_samples(device)[name]


def test_every_op_is_listed() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("nlpkernels::")
    }
    assert registered == {*ALL_OPS, "embedding_bag_update"}  # which changes its arguments: see test_optim.py


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


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_instruction_set_can_be_forced() -> None:
    done = run("from nlpkernels import _ops; print(_ops.INSTRUCTION_SET)", NLPKERNELS_CPU="default")
    assert done.stdout.strip() == "default"
    done = run("import nlpkernels", NLPKERNELS_CPU="sse9")
    assert done.returncode != 0
    assert "NLPKERNELS_CPU is 'sse9', expected one of default" in done.stderr


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
        "revert", "optim",
    }  # fmt: skip
