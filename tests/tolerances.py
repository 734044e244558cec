"""How exact results must be: the one table, and the comparisons that read it.

Errors are relative in norm, |got - expected| / |expected| over a whole tensor, so that a few near-zero elements do not
decide. A NaN or an infinity never passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nlpkernels import _ops

# The error against float64 arithmetic, root mean square over all results of a call (outputs, states, gradients), may be
# this many times that of torch.nn on the same input ...
TIMES_TORCH = 2.0
# ... and that of any one result, in which rounding may happen to add up, this many times ...
TIMES_TORCH_ONE = 4.0
# ... or this large, where torch.nn happens to be almost exact: a few units in the last place.
FLOOR = {
    torch.float64: 2e-15,
    torch.float32: 5e-7,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}
# The error of float32 whose products are of TF32, where that is allowed: operands of 11 bits.
TF32 = 2e-3
# Where states are rounded to half a precision before a product reads them (CUDA, and bfloat16 with AMX; the CPU's other
# kernels keep them in float), a unit of a ReLU that is almost 0 may fall on the other side of it than in exact
# arithmetic, and its gradient with it. torch.nn's units do so too, but they are others. In a small layer one unit is a
# tenth of a gradient; that equations are right shows in float32 and float64.
FLOOR_OF_RELU = {torch.bfloat16: 0.3, torch.float16: 0.3}
rounding_devices = {"cuda", "cpu"} if _ops.INSTRUCTION_SET == "amx" else {"cuda"}

# Relative error against float64, in place of the two above, for a handful of values, some of them in saturated gates:
# rounding has nothing to average over there, and torch.nn's own error is now and then nought. A result of less than
# FEW_SCALE of the largest of its call is what is left of larger terms, and is held to their size.
FEW = {torch.float64: 1e-12, torch.float32: 2e-4}
FEW_SCALE = 0.01

# Relative difference from torch.nn's result of the same dtype, of a call in which one value is 1e30, denormal or no
# number: exact arithmetic overflows elsewhere. Halves are rounded at other places than torch.nn's, and gates that are
# almost saturated leave differences of that.
BESIDE_TORCH = {**FEW, torch.bfloat16: 0.3, torch.float16: 0.05}


def relative_error(got: Tensor, expected: Tensor, least_scale: float = 0.0) -> float:
    """|got - expected| / max(|expected|, least_scale), in float64; |got| where that is 0."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.numel() == 0:
        return 0.0
    difference = (got.detach().double() - expected.detach().double()).norm().item()
    scale = max(expected.detach().double().norm().item(), least_scale)
    return difference / scale if scale > 0 else difference


def assert_as_exact(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor], names: Sequence[str], relu: bool = False
) -> None:
    """`ours` are as close to `exact` (float64) as the table wants, given how close torch's results are."""
    floor = FLOOR[ours[0].dtype]
    if relu and ours[0].device.type in rounding_devices:
        floor = FLOOR_OF_RELU.get(ours[0].dtype, floor)
    squares, torch_squares = 0.0, 0.0
    for got, torch_got, expected, name in zip(ours, theirs, exact, names, strict=True):
        assert got.dtype == torch_got.dtype, f"{name}: dtype {got.dtype}, torch has {torch_got.dtype}"
        error, torch_error = relative_error(got, expected), relative_error(torch_got, expected)
        allowed = max(TIMES_TORCH_ONE * torch_error, floor)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"  # also fails for NaN
        squares, torch_squares = squares + error**2, torch_squares + torch_error**2
    error, torch_error = (squares / len(ours)) ** 0.5, (torch_squares / len(ours)) ** 0.5
    allowed = max(TIMES_TORCH * torch_error, floor)
    assert error <= allowed, f"all results: error {error:.2e}, allowed {allowed:.2e}"


def assert_few_close(got: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """A handful of values, as close to `exact` as `FEW` wants."""
    least_scale = FEW_SCALE * max(expected.detach().double().norm().item() for expected in exact)
    for i, (one, expected) in enumerate(zip(got, exact, strict=True)):
        error = relative_error(one, expected, least_scale)
        assert error <= FEW[one.dtype], f"result {i}: error {error:.2e}, allowed {FEW[one.dtype]:.2e}"
