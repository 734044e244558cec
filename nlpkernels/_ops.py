"""Loads the compiled libraries and gives the ops their behaviour: fake kernels, derivatives, vmap, autocast.

csrc holds schemas (`library.cpp` says what each argument is) and kernels. Here stands what is better said in Python:

- A device without kernels of its own runs `reference.py`; on CUDA, torch's own layers go first where they can do it.
- Derivatives are those of an `autograd.Function`, because only that knows forward mode and torch.func as well. It is
  called by the dispatcher, so that an op has all its derivatives whoever calls it: eager code, compiled code, the
  backward pass of either. The ops of a layer's forward pass do not come here in eager mode, unless they are
  transformed: csrc/autograd.h calls them in a fifth of the time.
- First derivatives are ops. Their own derivatives, and forward mode, come from differentiating `reference.py`.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from nlpkernels import _C, _onnx, reference  # _C registers the schemas
from nlpkernels._giving_way import exports_to_onnx

# --- Libraries -------------------------------------------------------------------------------------------------------

INSTRUCTION_SETS = ("default", "avx2", "avx512", "avx512bf16", "amx")  # each needs those before it
OF_BFLOAT16 = ("avx512bf16", "amx")
"""Those whose libraries have recurrent layers of bfloat16 alone, and are loaded beside that of avx512."""


def _library(name: str) -> Path | None:
    folder = Path(__file__).parent
    return next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"{name}{suffix}").exists()), None)


def _pick_instruction_set() -> tuple[str, str]:
    """The instruction set whose library is loaded, and why."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and _C.has_avx512bf16():
        # Tiles are a process's to ask for: the system makes room for them in what it saves of a thread.
        capability = "AMX" if _C.has_amx() else "AVX512BF16"
    best = capability.lower() if capability.lower() in INSTRUCTION_SETS else "default"
    built = [name for name in INSTRUCTION_SETS if _library(f"_cpu_{name}")]
    usable = [name for name in built if INSTRUCTION_SETS.index(name) <= INSTRUCTION_SETS.index(best)]
    forced = os.environ.get("NLPKERNELS_CPU")
    if forced:
        if forced not in usable:
            raise ImportError(
                f"NLPKERNELS_CPU is {forced!r}, expected one of {', '.join(usable)}: "
                f"built are {', '.join(built)}, and this machine has {capability}"
            )
        return forced, f"NLPKERNELS_CPU={forced}"
    if not usable:
        raise ImportError("nlpkernels has no compiled library for this machine: build it with pip install .")
    return usable[-1], f"this machine has {capability}"


INSTRUCTION_SET, INSTRUCTION_SET_REASON = _pick_instruction_set()
torch.ops.load_library(_library(f"_cpu_{INSTRUCTION_SET}"))
if INSTRUCTION_SET in OF_BFLOAT16:
    torch.ops.load_library(_library("_cpu_avx512"))
# Not by default: these kernels compile, and their code agrees with the CPU's when it is run there, but they have not
# yet run on a GPU. Without them torch's own layers serve CUDA tensors where they can, and reference.py the rest; with
# NLPKERNELS_CUDA=0 reference.py serves all.
CUDA_ARCHS: str = _C.cuda_archs
if os.environ.get("NLPKERNELS_CUDA", "") not in ("", "0", "1"):
    raise ImportError(f"NLPKERNELS_CUDA is {os.environ['NLPKERNELS_CUDA']!r}, expected 0, 1 or nothing")
USES_CUDA_KERNELS = bool(CUDA_ARCHS) and os.environ.get("NLPKERNELS_CUDA") == "1"
if USES_CUDA_KERNELS:
    torch.ops.load_library(_library("_cuda"))
LEFT_TO_TORCH: frozenset[str] = frozenset(
    () if USES_CUDA_KERNELS or os.environ.get("NLPKERNELS_CUDA") == "0" or not torch.cuda._is_compiled() else ("cuda",)
)
"""The types of device whose tensors torch's own layers serve."""
COMPILER: str = _C.compiler

_ops = torch.ops.nlpkernels
_behaviour = torch.library.Library("nlpkernels", "FRAGMENT")


def _of_tensors(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of an op, given tensors wherever it expects them: the dispatcher takes None for any of them."""
    schema = getattr(_ops, name).default._schema
    needed = [(i, a.name) for i, a in enumerate(schema.arguments) if str(a.type) == "Tensor"]

    def checked(*args: Any) -> Any:
        for i, argument in needed:
            if args[i] is None:
                raise TypeError(f"{name}: expected {argument} to be a tensor, got None")
        return kernel(*args)

    return checked


for _name in (
    "recurrent",
    "recurrent_backward",
    "recurrent_states_backward",
    "recurrent_frozen",
    "frozen",
    "embedding_bag",
    "embedding_bag_backward",
    "embedding_bag_sparse_backward",
    "embedding_dot",
    "embedding_bag_update",
    "draw_negatives",
):
    _behaviour.impl(_name, _of_tensors(_name, getattr(reference, _name)), "CompositeExplicitAutograd")

# --- Fake kernels: shapes and dtypes without data --------------------------------------------------------------------


def _fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Registers the fake kernel of an op. Tensors without data are refused beside such as have data.

    A result would be memory as it is found, and an argument that an op changes would stay as it was. Integers may have
    data: sizes of batches do.
    """
    arguments = [argument.name for argument in getattr(_ops, name).default._schema.arguments]

    def check(given: dict[str, Any]) -> None:
        tensors = [
            (argument, tensor)
            for argument, value in given.items()
            for tensor in (value if isinstance(value, list | tuple) else (value,))
            if isinstance(tensor, Tensor)
        ]
        with_data = [(a, t) for a, t in tensors if t.is_floating_point() and t.device.type != "meta"]
        without = [(a, t) for a, t in tensors if t.device.type == "meta"]
        if with_data and without:
            argument, tensor = without[0]
            like, other = next((pair for pair in with_data if pair[0] in ("x", "weight", "weights")), with_data[0])
            like = "the weights" if like == "weights" else like
            raise RuntimeError(f"{name}: expected {argument} on {other.device} like {like}, got {tensor.device}")

    def register(kernel: Callable[..., Any]) -> None:
        def checked(*args: Any) -> Any:
            check(dict(zip(arguments, args, strict=True)))
            return kernel(*args)

        torch.library.register_fake(f"nlpkernels::{name}", _of_tensors(name, checked))

    return register


@_fake("recurrent")
def _(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    keep: bool,
    h_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    facts = reference.facts_of(cell)
    directions, _, features = h0.shape
    rows = x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]
    workspace = (directions, rows, facts.saved, weights[0].shape[0] // facts.gates) if keep else (0,)
    return (
        x.new_empty(*x.shape[:-1], directions * features),
        x.new_empty(h0.shape),
        x.new_empty(c0.shape if c0 is not None else (0,)),
        x.new_empty(workspace),
    )


@_fake("recurrent_backward")
def _(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    y: Tensor,
    workspace: Tensor,
    need_dx: bool,
    need_dweights: bool,
    h_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(h0.shape),
        x.new_empty(c0.shape if c0 is not None else (0,)),
        [x.new_empty(weight.shape if need_dweights else (0,)) for weight in weights],
    )


@_fake("recurrent_states_backward")
def _(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dworkspace: Tensor,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    cell: str,
    need_dx: bool,
    need_dweights: bool,
    h_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(h0.shape),
        x.new_empty(c0.shape),
        [x.new_empty(weight.shape if need_dweights else (0,)) for weight in weights],
    )


@_fake("recurrent_frozen")
def _(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor | None, weights: list[Tensor], cell: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(*x.shape[:-1], h0.shape[0] * h0.shape[2]),
        x.new_empty(h0.shape),
        x.new_empty(c0.shape if c0 is not None else (0,)),
    )


@_fake("frozen")
def _(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    directions: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]
    return (
        x.new_empty(*x.shape[:-1], directions * h0.shape[2]),
        x.new_empty(h0.shape),
        x.new_empty(c0.shape if c0 is not None else (0,)),
        x.new_empty((directions, rows, c0.shape[2]) if keep and c0 is not None else (0,)),
    )


def _number_of_bags(indices: Tensor, offsets: Tensor | None, include_last_offset: bool) -> int:
    return indices.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)


@_fake("embedding_bag")
def _(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mode: str,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    shape = (_number_of_bags(indices, offsets, include_last_offset), weight.shape[1])
    aux = {"mean": shape[:1], "max": shape}.get(mode, (0,))
    return weight.new_empty(shape), weight.new_empty(aux, dtype=torch.long)


@_fake("embedding_bag_backward")
def _(grad: Tensor, num_embeddings: int, *others: Any) -> Tensor:
    return grad.new_empty(num_embeddings, grad.shape[1])


@_fake("embedding_bag_sparse_backward")
def _(grad: Tensor, num_embeddings: int, *others: Any) -> tuple[Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    return grad.new_empty(rows, dtype=torch.long), grad.new_empty(rows, grad.shape[1])


@_fake("embedding_dot")
def _(
    h: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    padding_idx: int,
    include_last_offset: bool,
    sparse: bool,
) -> Tensor:
    expected = (_number_of_bags(indices, offsets, include_last_offset), weight.shape[1])
    if h.dim() != 2 or h.shape[0] != expected[0] or h.shape[1] != expected[1]:
        raise RuntimeError(f"embedding_dot: expected h of shape {list(expected)}, got {list(h.shape)}")
    if h.dtype != weight.dtype:
        raise RuntimeError(f"embedding_dot: expected h of dtype {weight.dtype} like weight, got {h.dtype}")
    return weight.new_empty(indices.shape)


@_fake("draw_negatives")
def _(seed: Tensor, cumulative: Tensor, guide: Tensor, targets: Tensor, number: int) -> Tensor:
    for name, tensor in (("seed", seed), ("cumulative", cumulative), ("guide", guide)):
        if tensor.device != targets.device:
            raise RuntimeError(f"draw_negatives: expected {name} on {targets.device} like targets, got {tensor.device}")
    return targets.new_empty(targets.shape[0], number)


@_fake("embedding_bag_update")
def _(*args: Any) -> None:
    pass


# --- Operations for torch.utils.flop_counter: two for each entry of a matrix and each row that it multiplies ----------
# As in torch, lookups and bags have none, nor has what is done element by element. All get shapes in place of tensors.

_Shape = Sequence[int]


def _matrices(weights: Sequence[_Shape], h0: _Shape) -> tuple[int, int]:
    """How many entries the matrices of a layer's weights have: those that multiply x, and the others."""
    per_direction = len(weights) // h0[0]
    entries = [prod(weight) if len(weight) == 2 else 0 for weight in weights]
    of_x = sum(entries[::per_direction])
    return of_x, sum(entries) - of_x


@register_flop_formula(_ops.recurrent)
def _(x: _Shape, batch_sizes: object, h0: _Shape, c0: object, weights: Sequence[_Shape], *_: Any, **__: Any) -> int:
    return 2 * prod(x[:-1]) * sum(_matrices(weights, h0))


@register_flop_formula(_ops.recurrent_frozen)
def _(x: _Shape, batch_sizes: object, h0: _Shape, c0: object, weights: Sequence[_Shape], *_: Any, **__: Any) -> int:
    return 2 * prod(x[:-1]) * sum(_matrices(weights, h0))


@register_flop_formula(_ops.frozen)
def _(
    x: _Shape,
    batch_sizes: object,
    h0: _Shape,
    c0: _Shape | None,
    weights: object,
    cell: str,
    directions: int,
    *_: Any,
    **__: Any,
) -> int:
    features, hidden = h0[2], h0[2] if c0 is None else c0[2]
    inputs = [x[-1]] + [directions * features] * (h0[0] // directions - 1)
    entries = [reference.facts_of(cell).gates * hidden * (i + features) for i in inputs]
    of_projections = h0[0] * features * hidden if features != hidden else 0
    return 2 * prod(x[:-1]) * (directions * sum(entries) + of_projections)


@register_flop_formula(_ops.recurrent_backward)
def _(
    dy: object,
    dh_n: object,
    dc_n: object,
    x: _Shape,
    batch_sizes: object,
    h0: _Shape,
    c0: object,
    weights: Sequence[_Shape],
    cell: str,
    y: object,
    workspace: object,
    need_dx: bool,
    need_dweights: bool,
    *_: Any,
    **__: Any,
) -> int:
    of_x, of_h = _matrices(weights, h0)
    return 2 * prod(x[:-1]) * (of_x * (need_dx + need_dweights) + of_h * (1 + need_dweights))


@register_flop_formula(_ops.recurrent_states_backward)
def _(
    dy: object,
    dh_n: object,
    dc_n: object,
    dworkspace: object,
    x: _Shape,
    batch_sizes: object,
    h0: _Shape,
    c0: object,
    weights: Sequence[_Shape],
    *_: Any,
    **__: Any,
) -> int:
    return 2 * prod(x[:-1]) * 3 * sum(_matrices(weights, h0))  # forward once more, and every gradient


# --- Derivatives -----------------------------------------------------------------------------------------------------


def _is_differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _as_function_of(
    function: Callable[..., Any], args: Sequence[Any], wanted: Sequence[bool]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """`function`, a function of flat `args` with flat outputs, as one of only those arguments that are wanted."""
    positions = [i for i, want in enumerate(wanted) if want]

    def of_wanted(*values: Tensor) -> tuple[Tensor, ...]:
        flat = list(args)
        for position, value in zip(positions, values, strict=True):
            flat[position] = value
        # An integer output has no derivative; zeros keep its place.
        return tuple(o if _is_differentiable(o) else torch.zeros((), device=o.device) for o in function(*flat))

    return of_wanted, [args[position] for position in positions]


def _pull_back(
    function: Callable[..., Any], args: Sequence[Any], wanted: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `function` for the wanted of its flat `args`, given those of its outputs."""
    of_wanted, values = _as_function_of(function, args, wanted)
    outputs, pull = reference.vjp(of_wanted, *values)
    given = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, cotangents, strict=True))
    gradients = iter(pull(given))
    return [next(gradients) if want else None for want in wanted]


def _push_forward(
    function: Callable[..., Any], args: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Tangents of `function`'s outputs, by reverse mode alone: the gradient of v -> J^T v is J."""
    of_wanted, values = _as_function_of(function, args, [tangent is not None for tangent in tangents])
    outputs, pull = reference.vjp(of_wanted, *values)
    _, push = reference.vjp(lambda *v: pull(v), *map(torch.zeros_like, outputs))
    return tuple(push(tuple(tangent for tangent in tangents if tangent is not None)))


class _Flat:
    """Arguments or results of an op with its one list, if any, spliced in, as autograd.Function wants them."""

    def __init__(self, types: Sequence[Any]) -> None:
        self.length = len(types)
        self.list_at = next((i for i, kind in enumerate(types) if str(kind) == "List[Tensor]"), None)

    def flatten(self, values: Sequence[Any]) -> tuple[Any, ...]:
        if self.list_at is None:
            return tuple(values)
        return (*values[: self.list_at], *values[self.list_at], *values[self.list_at + 1 :])

    def unflatten(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        if self.list_at is None:
            return tuple(flat)
        end = len(flat) - (self.length - self.list_at - 1)
        return (*flat[: self.list_at], list(flat[self.list_at : end]), *flat[end:])


def _unseen_by_dynamo(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that is not compiled where compiled code breaks off, as all Python is that it calls from there on."""
    unseen = _disable_dynamo(kernel)  # whose first call takes the second in which all of Dynamo is imported

    def call(*args: Any) -> Any:
        return unseen(*args) if "torch._dynamo" in sys.modules else kernel(*args)

    return call


def _differentiable(
    name: str,
    save: Callable[..., None],
    backward: Callable[..., Any],
    constant_outputs: Callable[[tuple[Any, ...]], tuple[int, ...]] = lambda inputs: (),
    in_torch: Callable[..., Any] | None = None,
    has_forward_mode: bool = True,
) -> Callable[..., Any]:
    """Registers the derivatives of an op, and returns it.

    `in_torch` is the op with all its derivatives in plain torch, its namesake in `reference.py` unless that differs.

    `save(ctx, inputs, output)` and `backward(ctx, *gradients)` are written for the op's own signature; gradients of
    outputs that were not used are None. `constant_outputs(inputs)` are the outputs without a derivative. Forward mode
    and vmap (one call per example) need nothing more.
    """
    op = getattr(_ops, name).default
    inputs_of = _Flat([argument.type for argument in op._schema.arguments])
    outputs_of = _Flat([result.type for result in op._schema.returns])
    has_one_output = outputs_of.length == 1

    def call_kernel(*args: Any) -> Any:
        if torch.is_inference_mode_enabled():  # which is below autograd by itself
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def call_flat(function: Callable[..., Any], flat: Sequence[Any]) -> Any:
        result = function(*inputs_of.unflatten(flat))
        return result if has_one_output else outputs_of.flatten(result)

    def call_reference(*flat: Any) -> Any:
        result = call_flat(getattr(reference, name), flat)
        return (result,) if has_one_output else result

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*flat: Any) -> Any:
            return call_flat(call_kernel, flat)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            args = inputs_of.unflatten(inputs)
            outputs = (output,) if has_one_output else output
            ctx.set_materialize_grads(False)
            ctx.constant_outputs = constant_outputs(args)
            ctx.mark_non_differentiable(*(outputs[i] for i in ctx.constant_outputs))
            save(ctx, args, output if has_one_output else outputs_of.unflatten(output))
            ctx.save_for_forward(*(value for value in inputs if isinstance(value, Tensor)))
            ctx.inputs = [None if isinstance(value, Tensor) else (value,) for value in inputs]

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            flat_needs = ctx.needs_input_grad
            ctx.needs_input_grad = inputs_of.unflatten(flat_needs)
            try:
                return inputs_of.flatten(backward(ctx, *outputs_of.unflatten(gradients)))
            finally:
                ctx.needs_input_grad = flat_needs

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            if not has_forward_mode:
                raise NotImplementedError(f"{name}: it rounds what it is given: expected no tangents")
            tensors = iter(ctx.saved_tensors)
            inputs = [next(tensors) if value is None else value[0] for value in ctx.inputs]
            pushed = _push_forward(call_reference, inputs, tangents)
            return (
                pushed[0]
                if has_one_output
                else tuple(None if i in ctx.constant_outputs else tangent for i, tangent in enumerate(pushed))
            )

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
            examples = [
                Function.apply(
                    *(
                        value.select(dim, i) if dim is not None and isinstance(value, Tensor) else value
                        for value, dim in zip(flat, in_dims, strict=True)
                    )
                )
                for i in range(info.batch_size)
            ]
            if has_one_output:
                return torch.stack(examples), 0
            return tuple(map(torch.stack, zip(*examples, strict=True))), (0,) * len(examples[0])

    # apply() binds its arguments to forward's signature: known once, it need not be found out at every call.
    Function.forward.__signature__ = inspect.signature(Function.forward)  # type: ignore[attr-defined]

    def apply(*args: Any) -> Any:
        if _functions_fail():
            return (in_torch or getattr(reference, name))(*args)
        result = Function.apply(*inputs_of.flatten(args))
        return result if has_one_output else outputs_of.unflatten(result)

    def differentiate(*args: Any) -> Any:
        flat = inputs_of.flatten(args)
        tensors = [value for value in flat if isinstance(value, Tensor)]
        wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        # Tangents are asked of the tensors: compiled code, and backward through a graph that was made before forward
        # mode began, say nowhere else that they have some.
        return apply(*args) if wants_grad or _C.has_tangent(tensors) else call_kernel(*args)

    _behaviour.impl(op, _unseen_by_dynamo(differentiate), "Autograd")
    # Where all transforms of torch.func begin:
    _behaviour.impl(op, _unseen_by_dynamo(apply), "FuncTorchDynamicLayerFrontMode")
    return op  # type: ignore[no-any-return]


def _is_forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def _functions_fail() -> bool:
    """Whether a transform of torch.func is at work that does not take an autograd.Function, or takes it wrong.

    Of forward mode by forward mode the second derivative is nought then, whatever the Function's jvp says.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    kinds = torch._C._functorch.TransformType
    levels = [level.key() for level in retrieve_all_functorch_interpreters()]
    return levels.count(kinds.Jvp) > 1 or kinds.Functionalize in levels


def _is_transformed() -> bool:
    """Whether forward mode or a transform of torch.func is at work."""
    return _is_forward_mode() or torch._C._are_functorch_transforms_active()


def _differentiable_by_reference(name: str) -> Callable[..., Any]:
    """An op whose derivative is that of its namesake in `reference.py`: the first derivatives themselves."""
    op = getattr(_ops, name).default
    inputs_of = _Flat([argument.type for argument in op._schema.arguments])
    outputs_of = _Flat([result.type for result in op._schema.returns])
    names = [argument.name for argument in op._schema.arguments]
    by_freq_at = names.index("scale_grad_by_freq") if "scale_grad_by_freq" in names else None

    def call_reference(*flat: Any) -> Any:
        result = getattr(reference, name)(*inputs_of.unflatten(flat))
        return (result,) if outputs_of.length == 1 else outputs_of.flatten(result)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        flat = inputs_of.flatten(inputs)
        ctx.save_for_backward(*(value for value in flat if isinstance(value, Tensor)))
        ctx.constants = [None if isinstance(value, Tensor) else (value,) for value in flat]

    def backward(ctx: Any, *gradients: Any) -> Any:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if value is None else value[0] for value in ctx.constants]
        needs = [
            need and _is_differentiable(v)
            for need, v in zip(inputs_of.flatten(ctx.needs_input_grad), inputs, strict=True)
        ]
        cotangents = outputs_of.flatten(gradients)
        pulled = _pull_back(call_reference, inputs, needs, cotangents)
        if needs[0] and by_freq_at is not None and inputs[by_freq_at]:
            # As in torch: scaling by frequency is part of the gradient, not of the forward pass that this one goes to.
            unscaled = [*inputs[:by_freq_at], False, *inputs[by_freq_at + 1 :]]
            pulled[0] = _pull_back(call_reference, unscaled, [True] + [False] * (len(inputs) - 1), cotangents)[0]
        results = inputs_of.unflatten(pulled)
        return results if len(results) > 1 else results[0]

    return _differentiable(name, save, backward)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse_to_train(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError("frozen: a frozen layer only runs: expected no input that requires a gradient")


recurrent_frozen = _differentiable("recurrent_frozen", _save_nothing, _refuse_to_train)
"""One layer whose packed weights are kept, `reference.recurrent_frozen`."""
frozen = _differentiable("frozen", _save_nothing, _refuse_to_train, has_forward_mode=False)
"""All layers with packed weights, `reference.frozen`."""


_recurrent_backward = _differentiable_by_reference("recurrent_backward")
_recurrent_states_backward = _differentiable_by_reference("recurrent_states_backward")
_embedding_bag_backward = _differentiable_by_reference("embedding_bag_backward")


def _save_recurrent(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, batch_sizes, h0, c0, weights, ctx.cell, _, h_mask = inputs
    y, _, _, workspace = output
    ctx.save_for_backward(x, batch_sizes, h0, c0, h_mask, y, workspace, *weights)


def _backward_recurrent(
    ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dworkspace: Tensor | None
) -> tuple[Any, ...]:
    if ctx.needs_input_grad[7]:
        raise NotImplementedError("recurrent: h_mask has no gradient: expected one that requires none")
    x, batch_sizes, h0, c0, h_mask, y, workspace, *weights = ctx.saved_tensors
    need_dx, need_dweights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4])
    was_kept = workspace.dim() == 4
    if was_kept and dworkspace is not None:  # of the cell states of all steps, which recurrent_backward does not take
        dx, dh0, dc0, dweights = _recurrent_states_backward(
            dy, dh_n, dc_n, dworkspace, x, batch_sizes, h0, c0, weights, ctx.cell, need_dx, need_dweights, h_mask
        )
    else:
        if not was_kept:
            y, *_, workspace = _ops.recurrent(
                x.detach(), batch_sizes, h0.detach(), _detach(c0), [w.detach() for w in weights], ctx.cell, True, h_mask
            )
        dx, dh0, dc0, dweights = _recurrent_backward(
            dy, dh_n, dc_n if c0 is not None else None, x, batch_sizes, h0, c0, weights, ctx.cell, y.detach(),
            workspace.detach(), need_dx, need_dweights, h_mask,
        )  # fmt: skip
    return (
        dx if need_dx else None,
        None,
        dh0,
        dc0 if c0 is not None else None,
        list(dweights) if need_dweights else [None] * len(weights),
        None,
        None,
        None,
    )


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _save_embedding_bag(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, indices, offsets, per_sample_weights, *ctx.settings = inputs
    ctx.num_embeddings = weight.shape[0]
    # The table itself only where it is needed, so that it may be changed in place (max_norm) before backward.
    needs_weight = per_sample_weights is not None and per_sample_weights.requires_grad
    ctx.save_for_backward(weight if needs_weight else None, indices, offsets, per_sample_weights, output[1])


def _gradient_of_table(sparse: bool, grad: Tensor, num_embeddings: int, *others: Any) -> Tensor:
    """What `embedding_bag_backward` gives, or the same as a sparse tensor."""
    if not sparse:
        return _embedding_bag_backward(grad, num_embeddings, *others)  # type: ignore[no-any-return]
    rows, values = _embedding_bag_sparse_backward(grad, num_embeddings, *others)
    # What torch.sparse_coo_tensor calls; that warns in torch 2.11, whatever it is told to check.
    return torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default(  # type: ignore[no-any-return]
        1, 1, (num_embeddings, grad.shape[1]), rows.unsqueeze(0), values, dtype=values.dtype,
        layout=torch.sparse_coo, device=values.device, is_coalesced=True,
    )  # fmt: skip


def _backward_embedding_bag(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    weight, indices, offsets, per_sample_weights, aux = ctx.saved_tensors
    mode, padding_idx, include_last_offset, scale_grad_by_freq, sparse = ctx.settings
    dweight = dfactors = None
    if ctx.needs_input_grad[0]:
        dweight = _gradient_of_table(
            sparse, grad, ctx.num_embeddings, indices, offsets, per_sample_weights, aux, mode, padding_idx,
            include_last_offset, scale_grad_by_freq,
        )  # fmt: skip
    if ctx.needs_input_grad[3]:
        dfactors = _embedding_dot(grad, weight, indices, offsets, padding_idx, include_last_offset, False)
    return dweight, None, None, dfactors, None, None, None, None, None


def _save_embedding_dot(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, weight, indices, offsets, *ctx.settings = inputs
    ctx.num_embeddings = weight.shape[0]
    # The table only for the gradient of h; its number of rows is all that its own takes.
    ctx.save_for_backward(h, weight if h.requires_grad else None, indices, offsets)


def _backward_embedding_dot(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    """Gradients of bags, in which the scores' gradients stand for per_sample_weights."""
    if grad is None:
        return (None,) * 7
    h, weight, indices, offsets = ctx.saved_tensors
    padding_idx, include_last_offset, sparse = ctx.settings
    dh = dweight = None
    if ctx.needs_input_grad[0]:
        dh = _embedding_bag(weight, indices, offsets, grad, "sum", padding_idx, include_last_offset, False, sparse)[0]
    if ctx.needs_input_grad[1]:
        aux = indices.new_empty(0, dtype=torch.long)
        dweight = _gradient_of_table(
            sparse, h, ctx.num_embeddings, indices, offsets, grad, aux, "sum", padding_idx, include_last_offset, False
        )
    return dh, dweight, None, None, None, None, None


def _refuse_backward(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError("a sparse gradient of an embedding cannot be differentiated again: use sparse=False")


_embedding_bag_sparse_backward = _differentiable(
    "embedding_bag_sparse_backward", _save_nothing, _refuse_backward, lambda inputs: (0,)
)
_recurrent = _differentiable(
    "recurrent", _save_recurrent, _backward_recurrent, lambda inputs: (2, 3) if inputs[3] is None else ()
)
_embedding_bag = _differentiable(
    "embedding_bag",
    _save_embedding_bag,
    _backward_embedding_bag,
    lambda inputs: (1,),
    partial(reference.embedding_bag, trains=True),
)
_embedding_dot = _differentiable("embedding_dot", _save_embedding_dot, _backward_embedding_dot)

# --- Tables that are updated in backward -----------------------------------------------------------------------------

# Which optimizer of optim.py has which table, by the table's id: the optimizer keeps the table. (A reference to the
# table, weak as it were, would keep torch from swapping the table's contents for others.)
UPDATED_IN_BACKWARD: dict[int, weakref.ref[Any]] = {}


def update_in_backward(table: Tensor, optimizer: Any) -> None:
    """From now on `optimizer_of(table)` is this one, as long as it lives, and so has the table to."""
    key = id(table)

    def forget(reference: Any) -> None:
        if UPDATED_IN_BACKWARD.get(key) is reference:
            del UPDATED_IN_BACKWARD[key]

    UPDATED_IN_BACKWARD[key] = weakref.ref(optimizer, forget)


def leave_to_backward(table: Tensor, optimizer: Any) -> None:
    """From now on `optimizer_of(table)` is not this one."""
    if optimizer_of(table) is optimizer:
        del UPDATED_IN_BACKWARD[id(table)]


def optimizer_of(table: Tensor) -> Any:
    """The optimizer that updates a table in backward, or None."""
    found = UPDATED_IN_BACKWARD.get(id(table))
    return None if found is None else found()


# --- What the rest of the package calls ------------------------------------------------------------------------------


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast wants on a type of device; None where it is off, and where there is no such thing."""
    if not torch._C._is_any_autocast_enabled():
        return None
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def recurrent(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    return_cell_states: bool = False,
    h_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One layer: y, h_n and c_n of `reference.recurrent`, with derivatives, and c of all steps, [D, T, B, H].

    c of all steps is None unless return_cell_states and the cell has one. Autocast casts all but float64, as in torch.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, h0, *weights = (_autocast(tensor, dtype) for tensor in (x, h0, *weights))
        c0 = None if c0 is None else _autocast(c0, dtype)
        h_mask = None if h_mask is None else _autocast(h_mask, dtype)
    wants_c = return_cell_states and c0 is not None
    if not (wants_c or torch.compiler.is_compiling() or _is_transformed()):
        y, h_n, c_n = _C.recurrent(x, batch_sizes, h0, c0, weights, cell, h_mask)
        return y, h_n, c_n, None
    if exports_to_onnx():
        return _onnx.recurrent(x, h0, c0, weights, cell)
    keep = wants_c or (
        torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, h0, c0, *weights))
    )
    y, h_n, c_n, workspace = _recurrent(x, batch_sizes, h0, c0, weights, cell, keep, h_mask)
    if not wants_c:
        return y, h_n, c_n, None
    c = reference.cell_states(workspace)
    return y, h_n, c_n, c.reshape(c.shape[0], *x.shape[:-1], c.shape[-1])


def _is_plain(x: Tensor) -> bool:
    """Whether a call may go to C++ at once: no torch.compile, autocast or transform."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or _is_transformed()
        or (LEFT_TO_TORCH and x.device.type in LEFT_TO_TORCH)
    )


def is_left_to_torch(tensor: Tensor) -> bool:
    """Whether torch's own layers are to serve a tensor; torch.compile, torch.func and fakes are for our ops."""
    return (
        bool(LEFT_TO_TORCH)
        and tensor.device.type in LEFT_TO_TORCH
        and not (torch.compiler.is_compiling() or _is_transformed() or isinstance(tensor, FakeTensor))
    )


def has_torchs_sparse_gradient(input: Tensor, weight: Tensor) -> bool:
    """Whether a lookup's sparse gradient may be torch's own, in eager calls, which nothing can make faster.

    Of a single index, of none and of a table without columns torch's fails.
    """
    is_eager = not (torch.compiler.is_compiling() or _is_transformed())
    return is_eager and input.dim() > 0 and input.numel() * weight.shape[1] > 0 and optimizer_of(weight) is None


def recurrent_step(x: Tensor, states: Sequence[Tensor] | None, weights: list[Tensor], cell: str) -> list[Tensor] | None:
    """One step of x [B, I] from states (h,) or (h, c), [B, H], to such; None where `recurrent` has to take it.

    That is so of tensors that are not plain, too, and of what are no tensors or none that fit. In Python the way to the
    kernel takes longer than a small step.
    """
    return _C.recurrent_step(x, states, weights, cell) if _is_plain(x) else None


def recurrent_layers(
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: list[Tensor],
    cell: str,
    num_layers: int,
    directions: int,
    batch_first: bool,
    is_frozen: bool = False,
) -> list[Tensor] | None:
    """Output, h_n and, for an LSTM, c_n of all layers; None where they are to be run one by one, or do not fit.

    That is so of tensors that are not plain, too, and of frozen layers given what requires a gradient.
    """
    if not _is_plain(x):
        return None
    return _C.recurrent_layers(x, states, weights, cell, num_layers, directions, batch_first, is_frozen)


def frozen_layers(
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: list[Tensor],
    cell: str,
    directions: int,
    batch_first: bool,
    is_cell: bool,
    sizes: tuple[int, int, int],
) -> list[Tensor] | None:
    """Output, h_n and, for an LSTM, c_n of all layers, or a cell's new states; None where `frozen` has to take it.

    That is so of tensors that are not plain, of other dtypes than float32, and of what does not fit. `sizes` are I, H
    and P.
    """
    if not _is_plain(x):
        return None
    return _C.frozen_layers(x, states, weights, cell, directions, batch_first, is_cell, *sizes)


def lookup(
    input: Tensor, weight: Tensor, padding_idx: int | None, scale_grad_by_freq: bool, sparse: bool
) -> Tensor | None:
    """Rows of a table, [*input.shape, E]; None where `functional.embedding` has to take it.

    That is so of tensors that are not plain, too, and of what are no tensors or none that fit. In Python the way to the
    kernel takes longer than a small lookup.
    """
    if UPDATED_IN_BACKWARD or torch.compiler.is_compiling() or _is_transformed():
        return None
    if LEFT_TO_TORCH and weight.device.type in LEFT_TO_TORCH:
        return None
    return _C.lookup(input, weight, padding_idx, scale_grad_by_freq, sparse)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mode: str,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    """Pooled rows of a table: the first output of `reference.embedding_bag`, with derivatives.

    Indices of mode "lookup" may have any shape, [*]; their rows come as [*, E].
    """
    settings = (mode, padding_idx, include_last_offset, scale_grad_by_freq)
    if not torch.compiler.is_compiling():
        updated = bool(UPDATED_IN_BACKWARD) and optimizer_of(weight) is not None
        if not _is_transformed():
            return _C.embedding_bag(weight, indices, offsets, per_sample_weights, *settings, sparse, updated)
        if updated:
            raise RuntimeError("a table that is updated in backward (nlpkernels.optim) cannot be used in torch.func")
    flat = indices.reshape(-1, 1) if mode == "lookup" else indices
    rows: Tensor = _embedding_bag(weight, flat, offsets, per_sample_weights, *settings, sparse)[0]
    return rows.reshape(*indices.shape, rows.shape[1]) if mode == "lookup" else rows


def embedding_dot(h: Tensor, weight: Tensor, indices: Tensor, sparse: bool) -> Tensor:
    """Scores of h [B, E] and rows of a table, [B, K] as indices: `reference.embedding_dot`, with derivatives.

    Autocast brings h to the table's dtype: the table is not to be copied.
    """
    if autocast_dtype(h.device.type) is not None and h.is_floating_point():
        h = h.to(weight.dtype)
    if not torch.compiler.is_compiling():
        updated = bool(UPDATED_IN_BACKWARD) and optimizer_of(weight) is not None
        if not _is_transformed():
            return _C.embedding_dot(h, weight, indices, sparse, updated)
        if updated:
            raise RuntimeError("a table that is updated in backward (nlpkernels.optim) cannot be used in torch.func")
    return _embedding_dot(h, weight, indices, None, -1, False, sparse)  # type: ignore[no-any-return]


def draw_negatives(seed: Tensor, cumulative: Tensor, guide: Tensor, targets: Tensor, number: int) -> Tensor:
    """`reference.draw_negatives`: rows [B, number], none of them its target."""
    return _ops.draw_negatives(seed, cumulative, guide, targets, number)  # type: ignore[no-any-return]
