"""torch's own inputs and error inputs for its layers (`module_db`, in every torch wheel), all of them, run on ours.

The end of a test run prints how many there were.
"""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from rounding import STEP, keep_from_kinks
from tolerances import assert_few_close
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import nlpkernels

db = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)
setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)  # which the import forbids, to other tests too

NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "Embedding"]  # it has none for EmbeddingBag
ENTRIES = {info.module_cls.__name__: info for info in db.module_db if info.module_cls.__module__.startswith("torch.nn")}

# Where our errors differ on purpose from torch's, found by (layer, torch's message): our type and message.
DELIBERATE = {
    ("Embedding", "index out of range in self"): (IndexError, r"15.*expected a row from 0 to 9"),
    ("Embedding", "scalar type"): (
        TypeError,
        r"expected input \(the indices\) of dtype int32 or int64, got torch.float32",
    ),
}


def inputs(name: str, device: str, dtype: torch.dtype, training: bool) -> list[Any]:
    options = {"with_packed_sequence": True} if name in ("RNN", "GRU") else {}
    make = ENTRIES[name].module_inputs_func
    return list(make(ENTRIES[name], device=device, dtype=dtype, requires_grad=True, training=training, **options))


def built(name: str, case: Any, device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    made = case.constructor_input
    theirs = getattr(nn, name)(*made.args, **made.kwargs, device=device, dtype=dtype)
    ours = getattr(nlpkernels, name)(*made.args, **made.kwargs, device=device, dtype=dtype)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    if getattr(theirs, "nonlinearity", "") == "relu":
        keep_from_kinks(lambda: theirs(*case.forward_input.args, **case.forward_input.kwargs), STEP, theirs, ours)
    return theirs, ours


def floating(tree: Any) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def results(layer: nn.Module, case: Any) -> list[Tensor]:
    """All outputs, then the gradients of all inputs and parameters, in the dtype of the layer."""
    dtype = next(layer.parameters()).dtype
    given = (case.forward_input.args, case.forward_input.kwargs)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, given)
    outputs = floating(layer(*args, **kwargs))
    loss = sum(output.square().sum() for output in outputs)
    return outputs + list(torch.autograd.grad(loss, [*floating((args, kwargs)), *layer.parameters()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_inputs(name: str, dtype: torch.dtype, device: str, count_conformance: Any) -> None:
    """The same outputs and gradients, in training and not, also after pickling and copying; the same repr."""
    for training in (True, False):
        for case in inputs(name, device, dtype, training):
            theirs, ours = (layer.train(training) for layer in built(name, case, device, dtype))
            exact = results(theirs.double(), case)
            for layer in (ours, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
                assert_few_close(results(layer, case), exact)
            count_conformance("inputs")


@pytest.mark.usefixtures("without_cudnn")
@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name: str, device: str, count_conformance: Any, pytestconfig: pytest.Config) -> None:
    """gradcheck for all; forward mode and second derivatives, which take minutes, for a random few or --thorough."""
    cases = inputs(name, device, torch.float64, True)
    few = range(len(cases)) if pytestconfig.getoption("--thorough") else torch.randperm(len(cases))[:2].tolist()
    for i, case in enumerate(cases):
        _, ours = built(name, case, device, torch.float64)
        leaves, spec = pytree.tree_flatten((case.forward_input.args, case.forward_input.kwargs))
        names = [n for n, _ in ours.named_parameters()]
        places = [j for j, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

        def run(*values: Tensor, case: Any = (ours, leaves, spec, names, places)) -> tuple[Tensor, ...]:
            layer, leaves, spec, names, places = case
            leaves = list(leaves)
            for place, value in zip(places, values, strict=False):
                leaves[place] = value
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            parameters = dict(zip(names, values[len(places) :], strict=True))
            return tuple(floating(torch.func.functional_call(layer, parameters, args, kwargs)))

        values = (*(leaves[place].detach().requires_grad_() for place in places), *ours.parameters())
        assert torch.autograd.gradcheck(run, values, fast_mode=True, check_forward_ad=i in few)
        count_conformance("gradients")
        if i in few:
            assert torch.autograd.gradgradcheck(run, values, fast_mode=True)
            count_conformance("second derivatives")


@pytest.mark.parametrize("name", NAMES)
def test_error_inputs(name: str, device: str, count_conformance: Any) -> None:
    """The same type of error with the same message, but for the differences that are deliberate."""
    make = ENTRIES[name].module_error_inputs_func
    if make is None:  # of embeddings, before 2.11
        pytest.skip(f"torch {torch.__version__} has none for {name}")
    for dtype in (torch.float32, torch.float64):
        for case in make(ENTRIES[name], device=device, dtype=dtype, requires_grad=False, training=True):
            made, given = case.module_error_input.constructor_input, case.module_error_input.forward_input
            expected, message = case.error_type, case.error_regex
            for (layer, part), ours in DELIBERATE.items():
                if layer == name and part in message:
                    expected, message = ours
            options = {"device": device, "dtype": dtype, **made.kwargs}
            if case.error_on == db.ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(expected, match=message):
                    getattr(nlpkernels, name)(*made.args, **options)
            else:
                layer = getattr(nlpkernels, name)(*made.args, **options)
                with pytest.raises(expected, match=message) as error:
                    layer(*given.args, **given.kwargs)
                assert type(error.value) is expected
                assert re.search(message, str(error.value))
            count_conformance("errors")


@pytest.mark.parametrize("function", ["embedding", "embedding_bag"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_function_inputs(function: str, dtype: torch.dtype, device: str, count_conformance: Any) -> None:
    """`op_db`, torch's inputs of functions, which has those of embedding_bag."""
    ops = pytest.importorskip("torch.testing._internal.common_methods_invocations", exc_type=ImportError)
    theirs, ours = getattr(nn.functional, function), getattr(nlpkernels.functional, function)
    entry = next(op for op in ops.op_db if op.name == f"nn.functional.{function}")
    for sample in entry.sample_inputs(device, dtype, requires_grad=True):
        weight, (ids, *rest) = sample.input, sample.args
        runs = []
        for run in (theirs, ours):
            table = weight.detach().clone().requires_grad_()
            output = run(ids, table, *rest, **sample.kwargs)
            wanted = [table, *floating(sample.kwargs)]
            wanted = [tensor for tensor in wanted if tensor.requires_grad]
            runs.append([output, *torch.autograd.grad(output.sin().sum(), wanted), table])
        expected, got = ([tensor.to_dense() for tensor in run] for run in runs)
        assert_few_close(got, expected)
        count_conformance("function inputs")
