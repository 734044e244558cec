"""Swap the layers of an existing model for ours and back, in place.

A swap changes a module's class and nothing else: the module, its parameters, buffers, hooks and attributes stay the
same objects, so optimizers, tied weights and references from elsewhere keep working.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize

from nlpkernels.embedding import Embedding, EmbeddingBag
from nlpkernels.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell, _Layers

__all__ = ["Swaps", "convert", "revert"]

_PAIRS: list[tuple[type[nn.Module], type[nn.Module]]] = [
    (ours._torchs, ours) for ours in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell, Embedding, EmbeddingBag)
]


@dataclass
class Swaps:
    """What `convert` or `revert` did: `str()` of it is a list to read."""

    swapped: dict[str, str] = field(default_factory=dict)
    """Names of the modules that were swapped, with their new class."""
    left: dict[str, str] = field(default_factory=dict)
    """Layers that were left alone, with the reason: subclasses, which may do things of their own, and on the way back
    layers with recurrent dropout, which torch.nn has not."""

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
) -> Swaps:
    done = Swaps()
    for name, module in model.named_modules():
        new = classes.get(type(module))
        if new is None:
            why = f"a subclass: {_qualified_name(type(module))}"
            if parametrize.is_parametrized(module):
                why = "parametrized, remove_parametrizations before and register them after"
            if isinstance(module, tuple(classes)) and type(module) not in classes.values():
                done.left[name] = why
        elif predicate is not None and not predicate(name, module):
            continue
        elif not issubclass(new, _Layers) and getattr(module, "recurrent_dropout", 0) != 0:
            done.left[name] = "torch.nn has no recurrent_dropout, set it to 0 before"
        else:
            module.__class__ = new
            done.swapped[name] = _qualified_name(new)
    return done


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
    return _swap(model, dict(_PAIRS), predicate)


def revert(model: nn.Module, predicate: Callable[[str, nn.Module], bool] | None = None) -> Swaps:
    """Swap nlpkernels' layers in `model` for torch.nn's, in place: the inverse of `convert`, same arguments.

    A layer with recurrent dropout is left alone and reported, as torch.nn's would train without.
    """
    return _swap(model, {ours: theirs for theirs, ours in _PAIRS}, predicate)
