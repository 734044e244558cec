"""Optimizers whose step is part of backward: for tables too large to have a gradient.

    optimizer = nlpkernels.optim.SparseAdam(embedding.parameters(), lr=1e-3)
    others = torch.optim.Adam(rest_of_the_model, lr=1e-3)

    loss.backward()        # ends with the table's rows in use updated; the others have their gradients
    others.step()
    optimizer.step()       # does nothing but look for mistakes, and lets learning-rate schedulers count

No gradient of the table is ever made: what a step costs depends on the indices of the batch, not on the table's size.
The uses of a row in one backward pass, in one call of a layer or in several, are summed first; the update is that of
torch.optim's optimizer of the same name on the coalesced sparse gradient. The idea, and the name of the row-wise
Adagrad, are those of FBGEMM's table-batched embeddings and of torchrec's `apply_optimizer_in_backward`.

An optimizer is one of torch's: `param_groups`, where the learning rate may be changed between steps, also by a
scheduler of torch.optim.lr_scheduler; `state_dict`, which is the unfused optimizer's. The layers are nlpkernels'
Embedding and EmbeddingBag, or the functions under them; the tables' states are float32, or float64 for such a table.

On CUDA, with the kernels in use, an update waits for nothing. A wrong index then holds the whole update of its table
back, on the device, and is raised when NLPKERNELS_CUDA_CHECK says. A CUDA graph repeats an update with the learning
rate and the bias correction that it was captured with.

A table is trained where backward would add to its gradient: not when frozen, nor by `backward(inputs=others)`.

**Backward passes.** A pass's uses are applied together when it has come through. What a pass inside another finds, a
hook's or a reentrant checkpoint's, belongs to the outermost one and makes one update with that one's. (Not where 60
and more are nested, when torch takes another thread: such a pass updates by itself.) A pass that fails leaves its
tables as they were, all of them, unless memory runs out, or Ctrl-C comes, between two tables' updates, or indices were
changed where torch does not notice, as through numpy. Any number of threads may be in backward at once: updates of a
table come one after the other and none is lost. A forward pass that reads the table meanwhile may see some rows before
an update and others after it. Where the gradient of a layer's other input reads the table (that of per_sample_weights,
or of `embedding_dot`'s h), an update between its forward and its backward pass is an error, as of any tensor that was
saved for backward and changed.

**Several processes.** With `process_group`, one table is trained by all processes of that group, each of which has a
copy. `step()` then makes the update, and not backward: the processes gather their rows and the gradients of these,
average them, as DistributedDataParallel does, and all make the same update, that of one process with the whole batch.
Uses are kept from backward until then, those of several passes are summed, and `zero_grad()` drops them. Every process
has to call `step()`, also one without a use of the table, and to construct the optimizer, where all get the tables of
the group's first process. If one finds a mistake, all raise a RuntimeError and no table changes.
DistributedDataParallel has to leave the table out, or it would reduce a gradient of the table's size:

    optimizer = nlpkernels.optim.SGD(bag.parameters(), lr=0.1, process_group=torch.distributed.group.WORLD)
    bag.requires_grad_(False)
    model = DistributedDataParallel(model)     # takes what requires a gradient at this moment
    bag.requires_grad_(True)

FSDP2 has to be told as well: `fully_shard(model, ignored_params=set(bag.parameters()))`; a table in shards, a DTensor,
is refused. Where torch.distributed runs with several processes and process_group is None, backward raises a
RuntimeError before a table changes; `process_group=False` says that each process trains tables of its own.

**What cannot work** raises a RuntimeError, with the table as it was: a second backward pass through one graph,
derivatives of the gradient, `torch.autograd.grad` of a table, one that also gets a gradient in another way, hooks on
the table, indices that are changed in place before the end of backward, allow_mutation_on_saved_tensors. `step()`
raises where a table was replaced, as by load_state_dict(assign=True) or fully_shard, so that nothing but the optimizer
has it any more. Momentum, weight
decay and "maximize" are not there, and a group or a state_dict that asks for them is refused with a ValueError.

In the place of the gradient, `table.grad`, stands an object that raises when it is used, so that clipping by global
norm, `torch.amp.GradScaler` and other optimizers, which would not find the table's part, do not go on without it. The
scaler, which only multiplies the loss until then, finds out at its first unscale_() or step(), after one update; a
compiled layer's gradient is refused by step(). It can be printed, copied, set to zero and moved along with its model.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks as _after_steps
from torch.optim.optimizer import _global_optimizer_pre_hooks as _before_steps
from torch.utils._python_dispatch import _disable_current_modes

from nlpkernels import _C, _ops

__all__ = ["SGD", "Adagrad", "RowWiseAdagrad", "SparseAdam"]

# --- What stands in the place of a gradient --------------------------------------------------------------------------


class _Applied(Tensor):
    """A shape, dtype and device without data: whoever wants a gradient's values is told that there is none."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Applied:  # type: ignore[override]
        aten = torch.ops.aten
        if func in (aten.zero_.default, aten.detach.default):
            return args[0]  # type: ignore[no-any-return]
        if func in (aten._to_copy.default, aten.empty_like.default, aten.clone.default):
            like, options = args[0], kwargs or {}
            return _stand_in(like.shape, options.get("dtype") or like.dtype, options.get("device") or like.device)
        raise RuntimeError(
            "this table has no gradient: its optimizer (nlpkernels.optim) applies it in backward. Clipping, "
            "GradScaler, other optimizers and gradients that come in another way cannot take part: leave the table out "
            "of them, or train it with sparse=True and torch.optim; zero_grad() removes this placeholder"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<applied in backward by nlpkernels.optim: {self.dtype} of shape {list(self.shape)} on {self.device}>"

    def __deepcopy__(self, memo: Any) -> _Applied:
        return _stand_in(self.shape, self.dtype, self.device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _stand_in, (self.shape, self.dtype, self.device)

    def share_memory_(self) -> _Applied:
        return self


def _stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> _Applied:
    stand_in: _Applied = Tensor._make_wrapper_subclass(_Applied, shape, dtype=dtype, device=device)
    return stand_in


# --- Backward passes -------------------------------------------------------------------------------------------------

_Use = tuple[Any, ...]  # the gradient of a layer's output and what `embedding_bag_update` takes after the states
# A use as backward found it: with the number of rows that the table had in the forward pass, and versions of tensors.
_Found = tuple[_Use, int, list[int]]
_Uses = dict[int, tuple[Tensor, list[_Found]]]  # of each table, by its id (torch's hash of a tensor is slow)

_queue_callback = torch.autograd.Variable._execution_engine.queue_callback


class _Pass:
    """The uses of tables in a backward pass. The engine alone holds it, so that it goes when its pass goes."""

    def __init__(self, task: int) -> None:
        self.task = task
        self.uses: dict[_InBackward, _Uses] = {}
        self.come_through: _ComeThrough | None = None

    def add(self, optimizer: _InBackward, table: Tensor, uses: list[_Found]) -> None:
        tables = self.uses.setdefault(optimizer, {})
        found = tables.get(id(table))
        if found is None:
            tables[id(table)] = table, uses
        else:
            found[1].extend(uses)

    def end(self) -> None:
        """What the engine calls when the pass has come through."""
        _passes.pop(self.task, None)
        if torch._C._current_autograd_node() is None:
            _apply(self.uses, sorted(self.uses, key=id))
        else:  # in a node of another pass, which can still fail
            self.come_through = _ComeThrough(self.uses)


class _ComeThrough:
    """The uses of a pass that has come through within another. It goes with it, where the other one goes on.

    What a signal's handler raises while this is at work, Python has no place for: it is reported and passed over. So
    no other pass has a destructor.
    """

    def __init__(self, uses: dict[_InBackward, _Uses]) -> None:
        self.uses = uses

    def __del__(self) -> None:
        if torch._C._current_graph_task_id() < 0:
            _apply(self.uses, sorted(self.uses, key=id))
            return
        with _lock:
            outer = _current_pass()
            for optimizer, tables in self.uses.items():
                for table, uses in tables.values():
                    outer.add(optimizer, table, uses)


_lock = threading.RLock()  # of _passes and what is in them
_passes: dict[int, weakref.ref[_Pass]] = {}  # by the number of the engine's task, which no other pass gets


def _current_pass() -> _Pass:
    task = torch._C._current_graph_task_id()
    reference = _passes.get(task)
    found = None if reference is None else reference()
    if found is None:
        for failed in [number for number, one in list(_passes.items()) if one() is None]:
            _passes.pop(failed, None)
        found = _Pass(task)
        _queue_callback(found.end)
        _passes[task] = weakref.ref(found)
    return found


def collect(table: Tensor, rows: int, *use: Any) -> None:
    """Take note of a use of a table, which had so many rows.

    csrc/autograd.h calls it from within backward, with all that a gradient is of.
    """
    optimizer: _InBackward | None = _ops.optimizer_of(table)
    if optimizer is None:
        raise RuntimeError("the optimizer (nlpkernels.optim) that was to update a table in backward is gone")
    if table._backward_hooks or table._post_accumulate_grad_hooks:
        raise RuntimeError(
            f"{type(optimizer).__name__}: the table of shape {list(table.shape)} has a hook (register_hook, "
            "register_post_accumulate_grad_hook) that waits for its gradient: updated in backward, it has none"
        )
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled_autograd is not None and compiled_autograd.in_compiled_autograd_region:
        raise RuntimeError(
            f"{type(optimizer).__name__}: compiled autograd runs this backward pass, whose end it does not tell of, "
            "when the table is to be updated"
        )
    if getattr(torch.autograd.graph, "_allow_mutation_on_saved_tensors_enabled", False):
        raise RuntimeError(
            f"{type(optimizer).__name__}: a table that is updated in backward does not go with "
            "torch.autograd.graph.allow_mutation_on_saved_tensors(), which is not told of the update"
        )
    optimizer._refuse_other_gradient(table)
    with _lock:
        _current_pass().add(optimizer, table, [(use, rows, _versions(use))])


def _versions(use: _Use) -> list[int]:
    return [tensor._version for tensor in use[:5] if tensor is not None]


def _apply(uses: dict[_InBackward, _Uses], unlocked: list[_InBackward]) -> None:
    if unlocked:  # always in the same order, or two threads could wait for each other
        with unlocked[0]._lock:
            return _apply(uses, unlocked[1:])
    updates = [update for optimizer, tables in uses.items() for update in optimizer._prepare(tables)]
    _make(updates)


def _make(updates: list[Callable[[], None]]) -> None:
    """Change tables. Modes that look at ops see nothing of it: one that raised would leave some tables as they were."""
    sees = torch._C._len_torch_dispatch_stack() > 0
    with _disable_current_modes() if sees else contextlib.nullcontext():
        for update in updates:
            update()


def _forget_locks() -> None:
    """After a fork: the threads that held them are not here."""
    global _lock
    _lock = threading.RLock()
    for reference in _ops.UPDATED_IN_BACKWARD.values():
        optimizer = reference()
        if optimizer is not None:
            optimizer._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)

# --- Optimizers ------------------------------------------------------------------------------------------------------


def _dtype_of_states(table: Tensor) -> torch.dtype:
    return torch.float64 if table.dtype == torch.float64 else torch.float32


@torch.inference_mode(False)
def _copy(tensor: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """A copy that may be changed in place, also outside of inference mode."""
    return tensor.detach().to(device, dtype, copy=True)


@torch.inference_mode(False)
def _number_of_steps(number: Any) -> Tensor:
    """As a state, whatever torch's default dtype and device are."""
    return torch.tensor(float(number), dtype=torch.float32, device="cpu")


def _references(tables: list[Tensor]) -> list[int]:
    return [sys.getrefcount(table) for table in tables]


_REFERENCES_OF_A_LIST = _references([torch.nn.Parameter(torch.empty(0))])[0]


def _coalesce(table: Tensor, uses: list[_Use]) -> tuple[Tensor, Tensor]:
    """Rows [R] in use, sorted and each once for each use, and their gradients [R, E]."""
    parts = [torch.ops.nlpkernels.embedding_bag_sparse_backward(use[0], table.shape[0], *use[1:]) for use in uses]
    if len(parts) == 1:
        return parts[0]  # type: ignore[no-any-return]
    rows, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return rows, values


def _as_lookup(rows: Tensor, values: Tensor) -> _Use:
    """Rows and their gradients as a use: of a lookup of these rows."""
    return values, rows.unsqueeze(1), None, None, rows.new_empty(0), "lookup", -1, False, False


def _gather(
    table: Tensor, part: tuple[Tensor, Tensor] | None, sizes: list[int], process_group: Any
) -> tuple[Tensor, Tensor]:
    """The rows of all processes, sizes[rank] from each, one after the other, and their gradients over their number."""
    width = table.shape[1] * table.element_size()
    own = torch.zeros(max(sizes), 8 + width, dtype=torch.uint8, device=table.device)
    if part is not None:
        rows, values = part
        own[: len(rows), :8] = rows.unsqueeze(1).view(torch.uint8)
        own[: len(rows), 8:] = (values / len(sizes)).view(torch.uint8)
    everyone = [torch.empty_like(own) for _ in sizes]
    if max(sizes) > 0:
        dist.all_gather(everyone, own, process_group)
    used = torch.cat([each[:size] for each, size in zip(everyone, sizes, strict=True)])
    rows = used[:, :8].contiguous().view(torch.int64).squeeze(1)
    return rows, used[:, 8:].contiguous().view(table.dtype)


class _InBackward(torch.optim.Optimizer):
    """What all of them share. A subclass says its rule, its states' names, and what settings the rule takes."""

    rule: str
    states: tuple[str, ...] = ()

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], process_group: Any) -> None:
        for name, value in defaults.items():
            least_excluded = 1.0 if name == "betas" else math.inf
            if not all(0 <= float(v) < least_excluded for v in (value if name == "betas" else (value,))):
                raise ValueError(f"{type(self).__name__}: expected {name} of 0 or more, betas below 1, got {value}")
        is_group = dist.is_available() and isinstance(process_group, dist.ProcessGroup)
        if not (is_group or process_group is None or process_group is False):
            raise ValueError(
                f"{type(self).__name__}: expected process_group to be a group of torch.distributed that this process "
                f"belongs to, False or None, got {process_group!r}"
            )
        self._start(process_group)
        try:
            super().__init__(params, defaults)
        except BaseException:  # nobody has this optimizer, though an exception's traceback may
            for group in getattr(self, "param_groups", ()):
                for table in group["params"]:
                    _ops.leave_to_backward(table, self)
            raise

    def _start(self, process_group: Any) -> None:
        self.process_group = process_group
        self._lock = threading.RLock()  # of tables, their states, and what is below
        self._tables: dict[int, Tensor] = {}  # all that it has taken over, by id
        self._stand_ins: dict[int, _Applied] = {}  # by id of table
        self._updated: set[int] = set()  # ids of tables with an update since the last step()
        self._kept: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}  # for step(): rows and values of each pass

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take over more tables; with a process_group, its first process's."""
        super().add_param_group(param_group)
        try:
            self._refuse_settings(self.param_groups[-1])
            self._refuse_values(self.param_groups[-1])
            self._take_over(self.param_groups[-1]["params"])
            if self.process_group:
                first = dist.get_global_rank(self.process_group, 0)
                for table in self.param_groups[-1]["params"]:
                    dist.broadcast(table.detach(), first, self.process_group)
        except BaseException:
            for table in self.param_groups.pop()["params"]:
                _ops.leave_to_backward(table, self)
                self._tables.pop(id(table), None)
            raise

    def _take_over(self, tables: list[Tensor]) -> None:
        for table in tables:
            if type(table) not in (Tensor, torch.nn.Parameter):
                raise ValueError(
                    f"{type(self).__name__}: expected tables that are tensors of torch's own, got a "
                    f"{type(table).__name__}: keep a table out of shards (fully_shard's ignored_params) and out of "
                    "what else replaces parameters"
                )
            if table.layout != torch.strided or table.is_nested:
                got = "a nested one" if table.is_nested else table.layout
                raise ValueError(f"{type(self).__name__}: expected dense tables, got {got}")
            if table.dim() != 2 or not table.is_floating_point() or not table.is_contiguous():
                raise ValueError(
                    f"{type(self).__name__}: expected contiguous tables of shape [rows, columns] and a floating "
                    f"dtype, got {table.dtype} of shape {list(table.shape)}, strides {table.stride()}"
                )
            other = _ops.optimizer_of(table)
            if other is not None and other is not self:
                raise ValueError(f"{type(self).__name__}: a table is trained by {type(other).__name__} already")
        for table in tables:
            self._tables[id(table)] = table
            _ops.update_in_backward(table, self)

    def _refuse_settings(self, group: dict[str, Any]) -> None:
        for name in ("momentum", "weight_decay", "maximize", "amsgrad"):
            if group.get(name):
                raise ValueError(f"{type(self).__name__}: there is no {name} in backward, got {group[name]}")

    def _refuse_values(self, group: dict[str, Any]) -> None:
        """Raise where the rule's settings are not what it can reckon with."""
        try:
            fits = not any(map(math.isnan, self._settings(group, 1)))
        except (TypeError, ValueError, RuntimeError, ArithmeticError):
            fits = False
        if not fits:
            got = {name: value for name, value in group.items() if name in self.defaults}
            raise ValueError(f"{type(self).__name__}: expected numbers, as betas two below 1, got {got}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_lock"):  # a copy's, or an unpickled optimizer's; a process group cannot be copied
            self._start(None)
        for group in self.param_groups:
            self._take_over(group["params"])

    def _settings(self, group: dict[str, Any], step: int) -> list[float]:
        """The settings that `embedding_bag_update` takes for this rule."""
        return [float(group["lr"]), float(group["eps"])]

    def _shape_of_states(self, table: Tensor) -> torch.Size:
        return table.shape[:1] if self.rule == "rowwise_adagrad" else table.shape

    def _state_of(self, table: Tensor, group: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """A table's state, and whether it is yet to be kept: where there is none that fits to where the table is."""
        if not self.states:
            return {}, False
        kept: dict[str, Any] | None = self.state.get(table)
        shape, dtype, device = self._shape_of_states(table), _dtype_of_states(table), table.device
        if not kept:
            initial = float(group.get("initial_accumulator_value", 0))
            states = {name: torch.full(shape, initial, dtype=dtype, device=device) for name in self.states}
            return {"step": _number_of_steps(0), **states}, True
        state = kept
        for name in self.states:
            found = kept[name]
            if found.shape != shape:
                raise RuntimeError(
                    f"{type(self).__name__}: expected a state {name!r} of shape {list(shape)}, got {list(found.shape)}"
                )
            if found.dtype != dtype or found.device != device or found.is_inference():
                state = {**state, name: _copy(found, dtype, device)}
        step = kept["step"]  # of torch's SparseAdam it is a number
        if not isinstance(step, Tensor) or step.is_inference() or step.requires_grad:
            state = {**state, "step": _number_of_steps(step)}
        return state, state is not kept

    def _prepare(self, tables: _Uses) -> list[Callable[[], None]]:
        """The updates of a pass, or what keeps them for step(). All that can fail does so here, before the first."""
        if self.process_group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"{type(self).__name__}: {dist.get_world_size()} processes train here. For a table that they train "
                "together say process_group=torch.distributed.group.WORLD, or another group (step() then makes the "
                "same update in all); for tables of this process alone say process_group=False"
            )
        groups = {id(table): group for group in self.param_groups for table in group["params"]}
        for group in self.param_groups:
            self._refuse_settings(group)
        prepared: list[Callable[[], None]] = []
        for table, uses_of_table in tables.values():
            if id(table) not in groups:
                raise RuntimeError(
                    f"{type(self).__name__}: the table of shape {list(table.shape)} is in none of param_groups any "
                    "more, but was not given to another optimizer"
                )
            self._refuse_other_gradient(table)
            for found in uses_of_table:
                self._refuse_changes(table, *found)
            uses = [use for use, *_ in uses_of_table]
            if self.process_group:
                prepared.append(functools.partial(self._keep, table, *_coalesce(table, uses)))
            else:
                use = uses[0] if len(uses) == 1 else _as_lookup(*_coalesce(table, uses))
                prepared.append(self._prepare_update(table, groups[id(table)], use))
        return prepared

    def _prepare_update(self, table: Tensor, group: dict[str, Any], use: _Use) -> Callable[[], None]:
        state, is_new = self._state_of(table, group)
        step = int(state["step"]) + 1 if state else 1
        settings = self._settings(group, step)
        if any(map(math.isnan, settings)):
            raise ValueError(f"{type(self).__name__}: expected numbers in param_groups, got NaN among {settings}")
        first, second, *_ = (*(state[name] for name in self.states), None, None)
        arguments = (use[0], table, first, second, *use[1:], self.rule, settings)
        if table.numel() == 0:  # the mean of no columns is NaN
            return functools.partial(self._finish, table, state, is_new, step)
        _C.check_update(*arguments)
        return functools.partial(self._update, table, state, is_new, step, arguments)

    def _update(
        self, table: Tensor, state: dict[str, Any], is_new: bool, step: int, arguments: tuple[Any, ...]
    ) -> None:
        _C.embedding_bag_update(*arguments)
        self._finish(table, state, is_new, step)

    def _finish(self, table: Tensor, state: dict[str, Any], is_new: bool, step: int) -> None:
        if state:
            state["step"].fill_(step)
            if is_new:
                self.state[table] = state
        self._updated.add(id(table))
        self._mark(table)

    def _keep(self, table: Tensor, rows: Tensor, values: Tensor) -> None:
        self._kept.setdefault(table, []).append((rows, values))
        self._mark(table)

    def _mark(self, table: Tensor) -> None:
        """Put the stand-in where a gradient would be."""
        if table.grad is not None:
            return
        found = self._stand_ins.get(id(table))
        try:
            table.grad = found
        except RuntimeError:  # it is what the table was, of another dtype, device or shape
            found = None
        if found is None:
            table.grad = self._stand_ins[id(table)] = _stand_in(table.shape, table.dtype, table.device)

    def _refuse_changes(self, table: Tensor, use: _Use, rows: int, versions: list[int]) -> None:
        if _versions(use) != versions:
            raise RuntimeError(
                f"{type(self).__name__}: indices, or a gradient, of the table of shape {list(table.shape)} were "
                "changed in place before the end of backward, where they are applied"
            )
        if table.shape[0] != rows:
            raise RuntimeError(
                f"{type(self).__name__}: the table of shape {list(table.shape)} was changed between forward and its "
                f"update: it had {rows} rows"
            )
        self._refuse_changed_table(table, use[0])

    def _refuse_changed_table(self, table: Tensor, grad: Tensor) -> None:
        if grad.dtype != table.dtype or grad.device != table.device or grad.shape[1] != table.shape[1]:
            raise RuntimeError(
                f"{type(self).__name__}: the table, {table.dtype} of shape {list(table.shape)} on {table.device}, was "
                f"changed between forward and its update, whose gradient is {grad.dtype} of {grad.shape[1]} columns on "
                f"{grad.device}"
            )

    def _take_zeros(self, table: Tensor, group: dict[str, Any]) -> None:
        """Of a gradient of zeros in step(): by that torch.distributed.checkpoint has an optimizer make its states."""
        grad = table.grad
        if grad is None or isinstance(grad, _Applied) or grad.layout != torch.strided or bool(grad.any()):
            return
        state, is_new = self._state_of(table, group)
        if is_new:
            self.state[table] = state
        table.grad = None

    def _refuse_other_gradient(self, table: Tensor) -> None:
        if table.grad is not None and not isinstance(table.grad, _Applied):
            raise RuntimeError(
                f"{type(self).__name__}: the table of shape {list(table.shape)} has got a gradient in another way than "
                "through nlpkernels' Embedding or EmbeddingBag in eager mode: it cannot be applied in backward"
            )

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Check that all there was to apply has been applied in backward; with a process_group, apply it."""
        if any((_before_steps, _after_steps, self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks)):
            self._step_with_hooks(closure)
        else:
            self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch would record every step for its profiler

    def _step(self, closure: Any) -> None:
        if closure is not None:
            raise RuntimeError(f"{type(self).__name__}: a closure would be called after the update, made in backward")
        if self.process_group:
            with self._lock:
                self._step_together()
        else:
            self._check_tables()
        self._updated.clear()

    _step_with_hooks = torch.optim.Optimizer.profile_hook_step(_step)

    def _check_tables(self) -> None:
        for group in self.param_groups:
            tables = group["params"]
            references = [] if self._updated.issuperset(map(id, tables)) else _references(tables)
            for table in tables:
                self._take_zeros(table, group)
                self._refuse_other_gradient(table)
            for table, count in zip(tables, references, strict=False):
                used = id(table) in self._updated or table in self._kept
                own = _REFERENCES_OF_A_LIST + (id(table) in self._tables) + (table in self.state)
                if not used and count <= own:
                    raise RuntimeError(
                        f"{type(self).__name__}: nothing but this optimizer has the table of shape "
                        f"{list(table.shape)} any more: it was replaced, as by load_state_dict(assign=True) or "
                        "fully_shard, and what replaces it is not trained. Make the optimizer after that"
                    )

    def _step_together(self) -> None:
        """The same update in all processes of the group; all of them raise if one cannot."""
        groups = [(table, group) for group in self.param_groups for table in group["params"]]
        own: list[tuple[Tensor, Tensor] | None] = []
        uses: list[_Use | None] = []
        updates: list[Callable[[], None]] = []

        def tell() -> tuple[list[Any], list[int | None]]:
            """What has to be the same in all processes, and the number of rows of each table that are in use here."""
            tables: list[Any] = []
            self._check_tables()
            for table, group in groups:
                parts = self._kept.get(table)
                for _, values in parts or ():
                    self._refuse_changed_table(table, values)
                own.append(None if parts is None else _coalesce(table, [_as_lookup(*part) for part in parts]))
                settings = self._settings(group, int(self.state.get(table, {}).get("step", 0)) + 1)
                tables.append((self.rule, tuple(table.shape), str(table.dtype), settings))
            return tables, [None if part is None else len(part[0]) for part in own]

        def prepare() -> None:
            for (table, group), use in zip(groups, uses, strict=True):
                if use is not None:
                    updates.append(self._prepare_update(table, group, use))

        told = self._agree(tell)
        expected, _ = told[dist.get_rank(self.process_group)]
        for rank, (tables, _) in enumerate(told):
            if tables != expected:
                raise RuntimeError(
                    f"{type(self).__name__}: no table is updated, for rank {rank} has others, or other settings, than "
                    f"this process: {tables}, expected {expected}"
                )
        for (table, _), part, *sizes in zip(groups, own, *(sizes for _, sizes in told), strict=True):
            is_used = any(size is not None for size in sizes)
            together = _gather(table, part, [size or 0 for size in sizes], self.process_group) if is_used else None
            uses.append(None if together is None else _as_lookup(*together))
        self._agree(prepare)
        self._kept.clear()
        _make(updates)

    def _agree(self, prepare: Callable[[], Any]) -> list[Any]:
        """What `prepare` gives in each process of the group. If it raises in one of them, all raise."""
        error: Exception | None = None
        own = None
        try:
            own = prepare()
        except Exception as caught:  # whatever it is, the others must not wait for this process
            error = caught
        answers: list[Any] = [None] * dist.get_world_size(self.process_group)
        dist.all_gather_object(answers, (None if error is None else str(error), own), self.process_group)
        if error is not None:
            raise error
        for rank, (message, _) in enumerate(answers):
            if message is not None:
                raise RuntimeError(f"{type(self).__name__}: no table is updated, for in rank {rank}: {message}")
        return [answer for _, answer in answers]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove what stands in the place of gradients; with a process_group, also what step() was to apply."""
        self._kept.clear()
        for group in self.param_groups:
            for table in group["params"]:
                table.grad = None

    def _loaded(self, table: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        """A table's state from the saved one, on the table's device and in the dtype of states."""
        if not (self.states and saved):
            return {}
        expected, dtype = self._shape_of_states(table), _dtype_of_states(table)
        step = saved.get("step")
        try:
            fits = 0 <= float(step) < math.inf  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError):
            fits = False
        if not fits:
            raise ValueError(f"{type(self).__name__}: expected a state 'step', the number of steps, got {step}")
        state: dict[str, Any] = {"step": _number_of_steps(step)}
        for name in self.states:
            value = saved.get(name)
            if not isinstance(value, Tensor) or value.shape != expected:
                got = list(value.shape) if isinstance(value, Tensor) else "none" if value is None else repr(value)
                raise ValueError(
                    f"{type(self).__name__}: expected a state {name!r} of shape {list(expected)}, got {got}"
                )
            state[name] = _copy(value, dtype, table.device).contiguous()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict`, this optimizer's or its unfused namesake's. After an error all is as it was."""
        before, after = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        state_dict = state_dict.copy()
        for hook in before.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved = [state_dict["state"].get(key, {}) for group in state_dict["param_groups"] for key in group["params"]]
        tables = [table for group in self.param_groups for table in group["params"]]
        for group in state_dict["param_groups"]:
            self._refuse_settings(group)
        loaded = [self._loaded(*pair) for pair in zip(tables, saved, strict=False)]
        for group in state_dict["param_groups"]:
            # (torch adds "differentiable" to the defaults when it loads.)
            missing = sorted(set(self.defaults) - set(group) - {"differentiable"})
            if missing:
                raise ValueError(f"{type(self).__name__}: expected a state_dict of groups with {', '.join(missing)}")
            self._refuse_values(group)
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()  # which have been called
        self._optimizer_load_state_dict_post_hooks = OrderedDict()  # and are yet to be called
        try:
            super().load_state_dict(state_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks = before
            self._optimizer_load_state_dict_post_hooks = after
        for table, state in zip(tables, loaded, strict=True):
            if state:  # torch's has been cast to the table's dtype
                self.state[table].update(state)
        for last in after.values():
            last(self)

    def share_memory(self) -> None:
        """Put the states into memory that processes share, as torch's Adagrad has it."""
        for state in self.state.values():
            for tensor in state.values():
                tensor.share_memory_()


class SGD(_InBackward):
    """Stochastic gradient descent without momentum, in backward: `torch.optim.SGD(params, lr)`.

    Args:
        params: tables [V, E], or groups of them.
        lr: the learning rate.
        process_group: a group of torch.distributed whose processes train the tables together, in step(); False where
            each of several processes trains tables of its own; None where there is one process.

    Raises:
        ValueError: a table's shape, dtype, layout or type does not fit, another optimizer has it, lr is negative, or
            process_group is something else.

    Example:
        >>> import torch, nlpkernels
        >>> bag = nlpkernels.EmbeddingBag(10, 3)
        >>> optimizer = nlpkernels.optim.SGD(bag.parameters(), lr=0.5)
        >>> before = bag.weight.detach().clone()
        >>> bag(torch.tensor([[1, 1, 2, 2]])).sum().backward()
        >>> (before - bag.weight.detach())[:4, 0]
        tensor([0.0000, 0.2500, 0.2500, 0.0000])
    """

    rule = "sgd"

    def __init__(self, params: Iterable[Any], lr: float | Tensor = 1e-3, *, process_group: Any = None) -> None:
        super().__init__(params, {"lr": lr}, process_group)

    def _settings(self, group: dict[str, Any], step: int) -> list[float]:
        return [float(group["lr"])]


class Adagrad(_InBackward):
    """Adagrad (Duchi et al., 2011) in backward: `torch.optim.Adagrad`, with a state "sum" [V, E]; see `SGD`."""

    rule, states = "adagrad", ("sum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        *,
        process_group: Any = None,
    ) -> None:
        defaults = {"lr": lr, "lr_decay": lr_decay, "initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(params, defaults, process_group)

    def _settings(self, group: dict[str, Any], step: int) -> list[float]:
        return [float(group["lr"]) / (1 + (step - 1) * float(group["lr_decay"])), float(group["eps"])]


class RowWiseAdagrad(Adagrad):
    """Adagrad with one number a row, "sum" [V], of the mean squares of its gradients: FBGEMM's row-wise Adagrad."""

    rule = "rowwise_adagrad"


class SparseAdam(_InBackward):
    """Adam (Kingma & Ba, 2015) for the rows in use alone, in backward: `torch.optim.SparseAdam`, "lazy" Adam.

    States "exp_avg", "exp_avg_sq" [V, E]; rows that are not in use keep theirs. Bias correction counts all steps.
    """

    rule, states = "adam", ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, process_group)

    def _settings(self, group: dict[str, Any], step: int) -> list[float]:
        beta1, beta2 = map(float, group["betas"])
        rate = float(group["lr"]) * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return [rate, float(group["eps"]), beta1, beta2]
