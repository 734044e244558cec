"""Swap the layers of an existing model for ours and back, in place.

A swap changes a module's class and nothing else: the module, its parameters, buffers, hooks and attributes stay the
same objects, so optimizers, tied weights and references from elsewhere keep working.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from nlpkernels import frozen
from nlpkernels.embedding import Embedding, EmbeddingBag
from nlpkernels.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["Swaps", "convert", "freeze", "revert"]

_PAIRS: list[tuple[type[nn.Module], type[nn.Module]]] = [
    (ours._torchs, ours) for ours in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell, Embedding, EmbeddingBag)
]

_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    ours: getattr(frozen, f"Frozen{ours.__name__}") for ours in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
}


_OURS = frozenset([*(ours for _, ours in _PAIRS), *_FROZEN.values()])


@dataclass
class Swaps:
    """What `convert`, `freeze` or `revert` did: `str()` of it is a list to read."""

    swapped: dict[str, str] = field(default_factory=dict)
    """Names of the modules that were swapped, with their new class."""
    left: dict[str, str] = field(default_factory=dict)
    """Layers that were left alone, with the reason: subclasses, which may do things of their own, those that are frozen
    already, and on the way back layers with recurrent dropout, which torch.nn has not."""

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: now {new}" for name, new in self.swapped.items()]
        lines += [f"{name or '(the model)'}: left alone, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "no layer to swap"


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _swap(
    model: nn.Module,
    classes: dict[type[nn.Module], type[nn.Module]],
    predicate: Callable[[str, nn.Module], bool] | None,
    swap: Callable[[nn.Module, type[nn.Module]], None],
    obstacle: Callable[[nn.Module, type[nn.Module]], str | None],
) -> Swaps:
    done = Swaps()
    for name, module in model.named_modules():
        new = classes.get(type(module))
        if new is None:
            why = f"a subclass: {_qualified_name(type(module))}"
            if parametrize.is_parametrized(module):
                why = "parametrized, remove_parametrizations before and register them after"
            if type(module) in _FROZEN.values() and any(new in _FROZEN.values() for new in classes.values()):
                done.left[name] = f"frozen as {module.frozen_dtype} already, revert it before"
            elif isinstance(module, tuple(classes)) and type(module) not in _OURS:
                done.left[name] = why
        elif predicate is not None and not predicate(name, module):
            continue
        elif (why_not := obstacle(module, new)) is not None:
            done.left[name] = why_not
        else:
            swap(module, new)
            done.swapped[name] = _qualified_name(new)
    return done


def _change_class(module: nn.Module, new: type[nn.Module]) -> None:
    if isinstance(module, frozen._Frozen):
        module._thaw()
    module.__class__ = new


def convert(model: nn.Module, predicate: Callable[[str, nn.Module], bool] | None = None) -> Swaps:
    """Swap torch.nn's recurrent and embedding layers in `model` for nlpkernels', in place.

    Args:
        model: any module, also a layer itself.
        predicate: called with a layer's name and the layer; it is left as it is where this returns False.

    Returns:
        What was swapped, and which subclasses of torch.nn's layers were left alone.

    Example:
        >>> from torch import nn
        >>> import nlpkernels
        >>> model = nn.Sequential(nn.EmbeddingBag(100, 8), nn.Linear(8, 2))
        >>> print(nlpkernels.convert(model))
        0: now nlpkernels.embedding.EmbeddingBag
    """
    return _swap(model, dict(_PAIRS), predicate, _change_class, lambda module, new: None)


def freeze(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    predicate: Callable[[str, nn.Module], bool] | None = None,
) -> Swaps:
    """Swap recurrent layers and cells in `model`, torch.nn's and ours, for such as only run, in place.

    Their weights are packed once, not in every call, and have no gradient: an input that requires one is refused, and
    train() changes nothing. They are called as before, and take and give what they did. Of torch.bfloat16 and
    torch.int8, x and h are rounded like the weights, row by row, just before they are multiplied; sums, states and
    biases are float32, and inputs and outputs are what they were.

    Args:
        model: any module, also a layer itself.
        dtype: of the weights. torch.float32 leaves them as they are, whatever their dtype, and results keep their bits;
            torch.bfloat16 takes half of the memory; torch.int8 a quarter, with a scale for each row. On the CPU.
        predicate: called with a layer's name and the layer; it is left as it is where this returns False.

    Returns:
        What was swapped, and which layers were left alone: subclasses, as `convert` does, those whose weights something
        makes anew in each call, and those that are frozen already.

    Raises:
        ValueError: dtype is another one.

    `revert` gives layers of torch.nn back, with the weights as they were frozen: exactly those of before for
    torch.float32. A state_dict holds plain weights, and may be loaded on another kind of machine.

    Example:
        >>> import torch
        >>> import nlpkernels
        >>> model = torch.nn.LSTM(40, 64)
        >>> print(nlpkernels.freeze(model, torch.int8))
        (the model): now nlpkernels.frozen.FrozenLSTM
        >>> model(torch.randn(5, 1, 40))[0].shape
        torch.Size([5, 1, 64])
    """
    if dtype not in frozen.DTYPES:
        raise ValueError(f"freeze: expected dtype to be torch.float32, torch.bfloat16 or torch.int8, got {dtype}")
    pairs = {layer: new for ours, new in _FROZEN.items() for layer in (ours, ours._torchs)}  # type: ignore[attr-defined]

    def swap(module: nn.Module, new: type[nn.Module]) -> None:
        before = type(module)
        module.__class__ = new
        try:
            module._freeze(dtype)  # type: ignore[operator]
        except BaseException:  # of memory that ran out, say: nothing has changed yet
            module.__class__ = before
            raise

    def obstacle(module: Any, new: type[nn.Module]) -> str | None:
        names = [name for name in module.__dict__ if name.startswith(("weight_", "bias_"))]
        if any(isinstance(module.__dict__[name], torch.Tensor) for name in names):
            return f"something makes its {names[0]} anew (weight_norm, pruning?), remove that before"
        if dtype == torch.float32:
            return None
        if module.hidden_size == 0:
            return f"no hidden units to freeze as {dtype}"
        directions = 2 if getattr(module, "bidirectional", False) else 1
        if max(module.input_size, directions * module.hidden_size) > frozen.MOST:
            return f"more than {frozen.MOST:,} inputs or hidden units, for which there is no kernel of {dtype}"
        return None

    return _swap(model, pairs, predicate, swap, obstacle)


def revert(model: nn.Module, predicate: Callable[[str, nn.Module], bool] | None = None) -> Swaps:
    """Swap nlpkernels' layers in `model` for torch.nn's, in place: the inverse of `convert`, same arguments.

    A layer with recurrent dropout is left alone and reported, as torch.nn's would train without. One that was frozen
    gets parameters again: with the values that it had, of torch.float32, and else with those that it was frozen to.
    """
    theirs = {ours: theirs for theirs, ours in _PAIRS}
    theirs |= {new: ours._torchs for ours, new in _FROZEN.items()}  # type: ignore[attr-defined]

    def obstacle(module: nn.Module, new: type[nn.Module]) -> str | None:
        has_dropout = getattr(module, "recurrent_dropout", 0) != 0
        return "torch.nn has no recurrent_dropout, set it to 0 before" if has_dropout else None

    return _swap(model, theirs, predicate, _change_class, obstacle)
