"""What rounding does to results: rounded arithmetic, and ReLUs kept away from the kink, where it decides a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tolerances import rounding_devices
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

STEP = 1e-4  # many times what gradcheck's finite steps change in what a ReLU of these tests reads
ROUNDING = 1e-6  # many times what float32 does,
ROUNDING_OF_STATES = {torch.bfloat16: 1.5e-3, torch.float16: 2e-4}  # and states that are rounded to these


def rounding(dtype: torch.dtype, device: str) -> float:
    """How far from a kink the rounding of a layer in that dtype decides nothing."""
    return ROUNDING_OF_STATES.get(dtype, ROUNDING) if device in rounding_devices else ROUNDING


class NearestKink(TorchDispatchMode):
    """Sees how near to 0 any number comes that a ReLU of torch's reads; 0 itself is what zeros give, in any dtype."""

    distance = math.inf

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.relu.default:
            self.distance = min([self.distance, *args[0][args[0] != 0].abs().flatten().tolist()])
        return op(*args, **(kwargs or {}))


def keep_from_kinks(run: Callable[[], Any], distance: float, theirs: nn.Module, *others: nn.Module) -> None:
    """Draws the parameters of a layer of torch's, which `others` get too, anew while `run` comes nearer to a kink.

    At most a hundred times: of many units one is always near enough for rounded states, and matters little.
    """
    for _ in range(100):
        with NearestKink() as nearest, torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
            run()
        if nearest.distance >= distance:
            return
        theirs.reset_parameters()
        for other in others:
            other.load_state_dict(theirs.state_dict())


class Rounded(TorchDispatchMode):
    """Rounds what any op computes in float64 to another dtype, up or down by chance, on average right.

    So it shows how far arithmetic in that dtype, whose every result is kept in it, may be from exact arithmetic.
    """

    def __init__(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        self.dtype, self.generator = dtype, generator

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self.round, op(*args, **(kwargs or {})))

    def round(self, result: Tensor) -> Tensor:
        if result.dtype != torch.float64:
            return result
        between = result.to(self.dtype) != result
        if bool(between.any()):  # but a view of rounded values, which would get another version
            last_place = torch.ldexp(
                torch.full_like(result, torch.finfo(self.dtype).eps / 2), torch.frexp(result).exponent
            )
            chance = torch.rand(result.shape, dtype=result.dtype, generator=self.generator) - 0.5
            rounded = (result + chance * last_place).to(self.dtype).to(result.dtype)
            result.copy_(rounded.where(between & rounded.isfinite(), result))
        return result
