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

What cannot work raises a RuntimeError, with the table as it was: a second backward pass through one graph, derivatives
of the gradient, `torch.autograd.grad` of a table, one that also gets a gradient in another way. Momentum, weight decay
and "maximize" are not there, and a group or a state_dict that asks for them is refused with a ValueError.

In the place of the gradient, `table.grad`, stands an object that raises when it is used, so that clipping by global
norm, `torch.amp.GradScaler` and other optimizers, which would not find the table's part, do not go on without it. The
scaler, which only multiplies the loss until then, finds out at its first unscale_() or step(), after one update; a
compiled layer's gradient is refused by step().
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks as _after_steps
from torch.optim.optimizer import _global_optimizer_pre_hooks as _before_steps

from nlpkernels import _C, _ops

__all__ = ["SGD", "Adagrad", "RowWiseAdagrad", "SparseAdam"]


class _Applied(Tensor):
    """What stands where a gradient would be: whoever uses it is told that there is none."""

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "this table has no gradient: its optimizer (nlpkernels.optim) has applied it in backward. Clipping, "
            "GradScaler and other optimizers cannot take part: leave the table out of them, or train it with "
            "sparse=True and torch.optim; zero_grad() removes this placeholder"
        )


@functools.lru_cache(maxsize=256)
def _stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> _Applied:
    return torch.zeros((), dtype=dtype, device=device).expand(shape).as_subclass(_Applied)


def _dtype_of_states(table: Tensor) -> torch.dtype:
    return torch.float64 if table.dtype == torch.float64 else torch.float32


class _InBackward(torch.optim.Optimizer):
    """What all of them share. A subclass says its rule, its states' names, and what settings the rule takes."""

    rule: str
    states: tuple[str, ...] = ()

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        for name, value in defaults.items():
            values = value if isinstance(value, tuple) else (value,)
            least_excluded = 1.0 if name == "betas" else math.inf
            if not all(0 <= float(v) < least_excluded for v in values):
                raise ValueError(f"{type(self).__name__}: expected {name} of 0 or more, betas below 1, got {value}")
        self._task: int | None = None
        self._pending: dict[Tensor, list[tuple[Any, ...]]] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take over more tables."""
        super().add_param_group(param_group)
        try:
            self._refuse_settings(self.param_groups[-1])
            self._take_over(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    def _take_over(self, tables: list[Tensor]) -> None:
        for table in tables:
            if table.dim() != 2 or not table.is_floating_point() or not table.is_contiguous():
                raise ValueError(
                    f"{type(self).__name__}: expected contiguous tables of shape [rows, columns] and a floating "
                    f"dtype, got {table.dtype} of shape {list(table.shape)}, strides {table.stride()}"
                )
            other = _ops.optimizer_of(table)
            if other is not None and other is not self:
                raise ValueError(f"{type(self).__name__}: a table is trained by {type(other).__name__} already")
        for table in tables:
            _ops.UPDATED_IN_BACKWARD[table] = weakref.ref(self)

    def _refuse_settings(self, group: dict[str, Any]) -> None:
        for name in ("momentum", "weight_decay", "maximize", "amsgrad"):
            if group.get(name):
                raise ValueError(f"{type(self).__name__}: there is no {name} in backward, got {group[name]}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._task, self._pending = None, {}
        for group in self.param_groups:  # a copy's tables, or an unpickled optimizer's
            self._take_over(group["params"])

    def _settings(self, group: dict[str, Any], step: int) -> list[float]:
        """The settings that `embedding_bag_update` takes for this rule."""
        return [float(group["lr"]), float(group["eps"])]

    def _shape_of_states(self, table: Tensor) -> torch.Size:
        return table.shape[:1] if self.rule == "rowwise_adagrad" else table.shape

    def _state_of(self, table: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[table]
        if not state and self.states:
            shape = self._shape_of_states(table)
            initial = float(group.get("initial_accumulator_value", 0))
            state["step"] = torch.tensor(0.0)
            dtype = _dtype_of_states(table)
            state |= {name: torch.full(shape, initial, dtype=dtype, device=table.device) for name in self.states}
        return state

    def collect(self, table: Tensor, *use: Any) -> None:
        """Take note of a use of a table, from within backward; at the end of backward all are applied."""
        if table.grad is not None and not isinstance(table.grad, _Applied):
            self._refuse_other_gradient(table)
        task = torch._C._current_graph_task_id()
        if task != self._task:  # what a pass that failed has left is dropped
            self._task, self._pending = task, {}
            torch.autograd.Variable._execution_engine.queue_callback(self._apply)
        self._pending.setdefault(table, []).append(use)

    def _apply(self) -> None:
        pending, self._pending, self._task = self._pending, {}, None
        for table in pending:
            if table.grad is not None and not isinstance(table.grad, _Applied):
                self._refuse_other_gradient(table)
        groups = {table: group for group in self.param_groups for table in group["params"]}
        for table, uses in pending.items():
            group = groups[table]
            state = self._state_of(table, group)
            step = int(state.get("step", 0)) + 1
            first, second, *_ = (*(state[name] for name in self.states), None, None)
            use = uses[0] if len(uses) == 1 else self._merge(table, uses)
            rest: tuple[Any, ...] = (*use[1:], self.rule, self._settings(group, step))
            _C.embedding_bag_update(use[0], table, first, second, *rest)
            if state:
                state["step"] += 1
            if table.grad is None:
                table.grad = _stand_in(table.shape, table.dtype, table.device)

    @staticmethod
    def _merge(table: Tensor, uses: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Several uses as one: a lookup of their coalesced gradients' rows."""
        parts = [torch.ops.nlpkernels.embedding_bag_sparse_backward(u[0], table.shape[0], *u[1:]) for u in uses]
        rows, values = (torch.cat(part) for part in zip(*parts, strict=True))
        return values, rows.unsqueeze(1), None, None, rows.new_empty(0), "lookup", -1, False, False

    def _refuse_other_gradient(self, table: Tensor) -> NoReturn:
        raise RuntimeError(
            f"{type(self).__name__}: the table of shape {list(table.shape)} has got a gradient in another way than "
            "through nlpkernels' Embedding or EmbeddingBag in eager mode: it cannot be applied in backward"
        )

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Check that all there was to apply has been applied in backward."""
        if any((_before_steps, _after_steps, self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks)):
            self._step_with_hooks(closure)
        else:
            self._check_gradients(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch would record every step for its profiler

    def _check_gradients(self, closure: Any) -> None:
        if closure is not None:
            raise RuntimeError(f"{type(self).__name__}: a closure would be called after the update, made in backward")
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None and not isinstance(table.grad, _Applied):
                    self._refuse_other_gradient(table)

    _step_with_hooks = torch.optim.Optimizer.profile_hook_step(_check_gradients)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove what stands in the place of gradients."""
        for group in self.param_groups:
            for table in group["params"]:
                table.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict`, this optimizer's or its unfused namesake's."""
        saved = [state_dict["state"].get(key, {}) for group in state_dict["param_groups"] for key in group["params"]]
        tables = [table for group in self.param_groups for table in group["params"]]
        for group in state_dict["param_groups"]:
            self._refuse_settings(group)
        for table, values in zip(tables, saved, strict=False):
            for name in self.states if values else ():
                expected, got = self._shape_of_states(table), values[name].shape if name in values else None
                if got != expected:
                    raise ValueError(
                        f"{type(self).__name__}: expected a state {name!r} of shape {list(expected)}, "
                        f"got {'none' if got is None else list(got)}"
                    )
        super().load_state_dict(state_dict)
        for table, values in zip(tables, saved, strict=True):
            for name in self.states if values else ():  # torch has cast them to the table's dtype
                self.state[table]["step"] = torch.tensor(float(values["step"]))
                dtype = _dtype_of_states(table)
                self.state[table][name] = values[name].detach().to(table.device, dtype, copy=True).contiguous()


class SGD(_InBackward):
    """Stochastic gradient descent without momentum, in backward: `torch.optim.SGD(params, lr)`.

    Args:
        params: tables [V, E], or groups of them.
        lr: the learning rate.

    Raises:
        ValueError: a table's shape, dtype or layout does not fit, another optimizer has it, or lr is negative.

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

    def __init__(self, params: Iterable[Any], lr: float | Tensor = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

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
    ) -> None:
        defaults = {"lr": lr, "lr_decay": lr_decay, "initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(params, defaults)

    def _settings(self, group: dict[str, Any], step: int) -> list[float]:
        return [float(group["lr"]) / (1 + (step - 1) * group["lr_decay"]), float(group["eps"])]


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
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def _settings(self, group: dict[str, Any], step: int) -> list[float]:
        beta1, beta2 = group["betas"]
        rate = float(group["lr"]) * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return [rate, float(group["eps"]), beta1, beta2]
