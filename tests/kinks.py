"""Keeps ReLU layers away from the kink, where a rounding would decide whether a unit has a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDING = 1e-6  # many times what float32 changes in what a ReLU of these tests reads
STEP = 1e-4  # and many times what gradcheck's finite steps do


class NearestKink(TorchDispatchMode):
    """Sees how near to 0 any number comes that a ReLU of torch's reads."""

    distance = math.inf

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.relu.default and args[0].numel():
            self.distance = min(self.distance, args[0].abs().min().item())
        return op(*args, **(kwargs or {}))


def keep_from_kinks(run: Callable[[], Any], distance: float, theirs: nn.Module, *others: nn.Module) -> None:
    """Draws the parameters of a layer of torch's, which `others` get too, anew while `run` comes nearer to a kink."""
    while True:
        with NearestKink() as nearest, torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
            run()
        if nearest.distance >= distance:
            return
        theirs.reset_parameters()
        for other in others:
            other.load_state_dict(theirs.state_dict())
