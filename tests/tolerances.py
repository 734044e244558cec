"""How exact results must be: the one table, and the comparisons that read it.

Errors are relative in norm, |got - expected| / |expected| over a whole tensor, so that a few near-zero elements do not
decide. A NaN or an infinity never passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
# Where states are rounded to half a precision before a product reads them (CUDA, and bfloat16 on processors that
# multiply it; the CPU's other kernels keep them in float), a unit of a ReLU that is almost 0 may fall on the other side
# of it than in exact arithmetic, and its gradient with it. torch.nn's units do so too, but they are others. In a small
# layer one unit is a tenth of a gradient; that equations are right shows in float32 and float64.
FLOOR_OF_RELU = {torch.bfloat16: 0.3, torch.float16: 0.3}
rounding_devices = {"cuda", "cpu"} if _ops.INSTRUCTION_SET in _ops.OF_BFLOAT16 else {"cuda"}

# Relative error against float64, in place of the two above, for a handful of values, some of them in saturated gates:
# rounding has nothing to average over there, and torch.nn's own error is now and then nought. A result of less than
# FEW_SCALE of the largest of its call is what is left of larger terms, and is held to their size.
FEW = {torch.float64: 1e-12, torch.float32: 2e-4}
FEW_SCALE = 0.01

# Relative difference from torch.nn's result of the same dtype, of a call in which one value is 1e30, denormal or no
# number: exact arithmetic overflows elsewhere. Halves are rounded at other places than torch.nn's, and gates that are
# almost saturated leave differences of that.
BESIDE_TORCH = {**FEW, torch.bfloat16: 0.3, torch.float16: 0.05}

# Of frozen layers of bfloat16 or int8, in networks that somebody trained: this share of the words may be spoken in
# another way (weights of seven bits exceed it), and no decision may change, as no probability is this close to the
# threshold (int8 moves them by half of that).
WORDS_SPOKEN_ANOTHER_WAY = 0.005
CLEAR = 0.045


# Of frozen layers of bfloat16 and int8, relative difference in norm from reference.frozen, for each layer: where a
# state differs in its last bit, it may be rounded to the next step, 1 / 256 of a value of bfloat16. That is seldom: the
# second is kept in three of four calls.
FROZEN = {torch.bfloat16: 4e-3, torch.int8: 4e-3}
FROZEN_MOSTLY = 2e-6
# Of random inputs, of hundreds of steps too, so many times as much.
FROZEN_TIMES = 4
# And from the layer before it was frozen, of random weights.
FROZEN_DEQUANTISED = {torch.bfloat16: 0.02, torch.int8: 0.03}


def relative_error(got: Tensor, expected: Tensor, least_scale: float = 0.0) -> float:
    """|got - expected| / max(|expected|, least_scale), in float64; |got| where that is 0."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.numel() == 0:
        return 0.0
    difference = (got.detach().double() - expected.detach().double()).norm().item()
    scale = max(expected.detach().double().norm().item(), least_scale)
    return difference / scale if scale > 0 else difference


def assert_frozen_close(got: Tensor, expected: Tensor, dtype: torch.dtype, times: float, name: str) -> None:
    """A result of a layer with weights of that dtype, as close to that of reference.frozen as `FROZEN` wants.

    What is not finite has to be so in both; a tensor of next to nothing is held to the size of a small state.
    """
    assert got.dtype == expected.dtype, f"{name}: dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    largest = 0.4 * torch.finfo(got.dtype).max
    counts = expected.isfinite() & (expected.abs() < largest)
    assert bool((got.isfinite() | ~counts).all()), f"{name}: not finite"
    assert bool((~got.isfinite() | expected.isfinite() | (got.abs() >= largest)).all()), f"{name}: finite"
    allowed = times * max(FROZEN[dtype], 2 * torch.finfo(got.dtype).eps)
    error = relative_error(got.where(counts, 0), expected.where(counts, 0), 0.05 * max(1, int(counts.sum())) ** 0.5)
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


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


# Of random inputs, of which 100,000 are tried at a time, none may fail but for a fault. A value of an output, or of a
# gradient, may be off by this part of the largest in its result, or of FUZZED_SCALE of the largest in its call,
# incoming gradients too ...
FUZZED = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (0.03, 0.1),
    torch.float16: (0.004, 0.02),
}
FUZZED_SCALE = 0.1
# ... or, where that is not enough, this many times the largest error of so many computations in float64 whose every
# result is rounded to the dtype by chance. That tells how much an input makes of roundings: a handful of values after
# a hundred steps, layers that hand their outputs on rounded, 1 - y^2 where y is 1 but for its last bit.
FUZZED_TIMES_ROUNDED = 4
FUZZED_DRAWS = 8
# A unit of a ReLU that is nearer to its kink may fall on either side of it, in arithmetic of that dtype.
FUZZED_KINK = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def assert_each_close(
    got: Sequence[Tensor],
    exact: Sequence[Tensor],
    names: Sequence[str],
    outputs: int,
    incoming: float,
    has_special: bool,
    rounded: Callable[[], Sequence[Sequence[Tensor]]],
) -> None:
    """Results of one call, first so many outputs, then gradients, each as close to `exact` as `FUZZED` wants.

    `incoming` is the size of the gradients of the outputs; `rounded` computes `exact` with rounded arithmetic, so many
    times.

    NaN and infinities, if there are any, have to be where they are in `exact`. In a gradient it is left open which: by
    the order in which terms are put together, there is inf or inf - inf.
    """

    def largest(tensor: Tensor) -> float:
        if has_special:
            tensor = tensor.nan_to_num(0.0, 0.0, 0.0)
        return tensor.abs().max().item() if tensor.numel() > 0 else 0.0

    scales = [largest(expected.detach()) for expected in exact]
    least = FUZZED_SCALE * max([incoming, *scales])
    draws: Sequence[Sequence[Tensor]] | None = None
    for i, (one, expected, name, scale) in enumerate(zip(got, exact, names, scales, strict=True)):
        assert one.shape == expected.shape, f"{name}: shape {tuple(one.shape)}, expected {tuple(expected.shape)}"
        if one.numel() == 0:
            continue
        one, expected = one.detach(), expected.detach()
        dtype = one.dtype
        if scale > 1e-6 * torch.finfo(dtype).max:  # terms may be too large for the dtype, where their sum is not
            continue
        if has_special:
            one, expected = _without_specials(one, expected, name, is_any_infinite=i >= outputs)
        error = (one - expected).abs().max().item()
        allowed = FUZZED[dtype][i >= outputs] * max(scale, least) + torch.finfo(dtype).tiny
        if error > allowed:
            draws = rounded() if draws is None else draws
            errors = [largest((draw[i].detach() - expected).where(expected.isfinite(), 0)) for draw in draws]
            allowed = max(allowed, FUZZED_TIMES_ROUNDED * max(errors))
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"  # also fails for NaN


def assert_summed(
    got: Tensor, exact: Tensor, name: str, terms: float, is_exact: bool, rounds_often: bool = False
) -> None:
    """Sums of terms whose magnitudes add up to `terms` at most, in float32 or float64, rounded to their dtype once.

    `is_exact`: and no more than that. `rounds_often`: made of several results in that dtype.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    dtype = got.dtype
    got, exact = got.detach(), exact.detach()
    one, expected = _without_specials(got, exact, name)
    if is_exact:
        differs = one != expected.to(dtype)
        assert not bool(differs.any()), (
            f"{name}: {int(differs.sum())} of {got.numel()} values differ, by up to {(one - expected).abs().max():.2e}"
        )
        return
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    of_terms = torch.finfo(dtype if rounds_often else arithmetic).eps
    # Of many equal terms each addition may be off in the same direction; torch adds in float64 one by one.
    most_roundings = 10**4 if dtype == torch.float64 else 32
    allowed = 2 * torch.finfo(dtype).eps * expected.abs() + most_roundings * of_terms * terms
    error = (one - expected).abs() - allowed - torch.finfo(dtype).tiny
    assert bool((error <= 0).all()), f"{name}: error {error.max().item():.2e} more than allowed"


def _without_specials(got: Tensor, exact: Tensor, name: str, is_any_infinite: bool = False) -> tuple[Tensor, Tensor]:
    """Both without NaN and infinities, which have to be the same, but for what is too large for `got`'s dtype."""
    is_finite = exact.isfinite()
    too_large = is_finite & (exact.abs() > 0.4 * torch.finfo(got.dtype).max)
    differs = got.isfinite() if is_any_infinite else ~torch.isclose(got.double(), exact, equal_nan=True)
    wrong = torch.where(is_finite, ~got.isfinite() & ~too_large, differs)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} values, at {at} {got[at].item()}, expected {exact[at].item()}"
        )
    counts = is_finite & ~too_large
    return got.where(counts, 0), exact.where(counts, 0)
