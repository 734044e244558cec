"""When a call is torch's: our layers and functions then do what torch.nn's do, by torch's own functions.

That is so where our kernels cannot see through what they are given: a subclass of Tensor that has its own way with
torch's functions (DTensor, quantised tensors, ExpandedWeight, a user's) or a proxy of torch.fx, as an input, a state or
a parameter; and under torch.jit.trace and torch.onnx.export, which know torch's ops alone (but see `_onnx.py`). Complex
numbers, of which our kernels know nothing, are torch's too.
torch.compile, torch.export, fake tensors and the transforms of torch.func know ours too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Proxy, Tracer
from torch.nested._internal.nested_tensor import NestedTensor

__all__ = ["exports_to_onnx", "in_graph", "is_complex", "is_torchs", "leaves", "refuse", "refuse_nested"]

_PLAIN = frozenset({Tensor, nn.Parameter, type(None), list})  # (lengths may be a list)
# Our ops know the first two; of jagged tensors the embeddings see through to what is inside.
_SEEN_THROUGH = (FakeTensor, FunctionalTensor, NestedTensor)
_NO_FUNCTION = torch._C._disabled_torch_function_impl
_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl


def is_torchs(*values: object, has_onnx: bool = False) -> bool:
    """Whether a call with these inputs, states and parameters is torch's; `has_onnx` if `_onnx.py` has it."""
    if torch.compiler.is_compiling():
        if not has_onnx and exports_to_onnx():
            return True
    elif torch._C._is_tracing():
        return True
    elif _PLAIN.issuperset(map(type, values)):
        return False
    return any(_has_its_own_way(type(value)) for value in values)


def is_complex(input: object) -> bool:
    """Whether an input of a recurrent layer is complex, which makes the call torch's."""
    return isinstance(input, Tensor) and input.is_complex()


def exports_to_onnx() -> bool:
    """Whether torch.onnx.export is at work, with dynamo=True: the other exporter goes by torch.jit.trace."""
    return torch.compiler.is_compiling() and torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def _has_its_own_way(kind: type) -> bool:
    if kind in _PLAIN or issubclass(kind, _SEEN_THROUGH):
        return False
    function = getattr(kind, "__torch_function__", _NO_FUNCTION)
    dispatch = getattr(kind, "__torch_dispatch__", _NO_DISPATCH)
    return function is not _NO_FUNCTION or dispatch is not _NO_DISPATCH


def in_graph(layer: nn.Module, *args: Any, **kwargs: Any) -> Proxy | None:
    """A call of a layer as a node of the graph that torch.fx is tracing, which torch.nn's layers are; None elsewhere.

    None of the layer that is traced itself, too: it is no part of that graph; nor is one that is called with proxies by
    what changes a graph.
    """
    given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    for value in leaves(*args, *given.values()):
        if isinstance(value, Proxy) and isinstance(value.tracer, Tracer):
            path = value.tracer.path_of_module(layer)
            while args[-1] is None:
                args = args[:-1]
            return value.tracer.create_proxy("call_module", path, args, given) if path else None
    return None


def leaves(*values: Any) -> list[Any]:
    """Values, with what is in tuples (packed sequences are such) and lists in their place."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, tuple | list):
            flat += value
        else:
            flat.append(value)
    return flat


def refuse(function: str, **wanted: bool) -> None:
    """Raise if a call that is torch's wants what torch has not."""
    for name, is_wanted in wanted.items():
        if is_wanted:
            raise NotImplementedError(
                f"{function}: torch has no {name}, and this call is left to torch's own function, as one with a "
                f"subclass of Tensor, a proxy of torch.fx or complex numbers, or under torch.jit.trace or "
                f"torch.onnx.export: expected no {name}"
            )


def refuse_nested(function: str, input: object) -> None:
    """Raise if an input of a recurrent layer is nested, which torch's layers do not take either."""
    if isinstance(input, Tensor) and input.is_nested:
        raise ValueError(
            f"{function}: expected no nested tensor: a layer takes a PackedSequence or, with batch_first, a padded "
            "batch, torch.nested.to_padded_tensor(input, 0.0), and lengths=input.offsets().diff()"
        )
