"""Random inputs of all layers, functions, optimizers and raw ops, in all their options, against float64.

    python tests/test_fuzz.py --minutes 10          # as many as that takes; or --cases 20000. `make fuzz ARGS=...`
    python tests/test_fuzz.py --seed S --case K     # one of them

A case is a dict of plain values, drawn by a generator of its own from the seed and its number. `check(family, case)`
runs it; a failure prints that call, made smaller first. What is right comes from torch's own functions in float64, or
from `nlpkernels.reference` in float64 where torch has nothing of the kind. Tables and gradients are mostly multiples of
1/8, whose sums are exact: they are compared bit for bit.

Cases run in worker processes. One that dies or hangs is reported like any other, and the next worker goes on after it.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rounding import NearestKink, Rounded
from tolerances import (
    FROZEN_TIMES,
    FUZZED_DRAWS,
    FUZZED_KINK,
    assert_each_close,
    assert_frozen_close,
    assert_summed,
    rounding_devices,
)
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map

import nlpkernels as K
from nlpkernels import _ops, functional, reference

Case = dict[str, Any]
DTYPES = {"float32": 8, "float64": 5, "bfloat16": 3, "float16": 2}  # and how often
ops = torch.ops.nlpkernels

# --- Drawing ---------------------------------------------------------------------------------------------------------

# Sizes at which the kernels of csrc/cpu change their ways, by the names that stand there: vectors and panels of them,
# kTileRows, kGroup, kFewKeys, kMaxRows, max_block, kChain, kMinBlockRows, most_m, small_k, block_n, kWhole, kAhead,
# kTogether, kDigit, kShare. Products of sizes reach kMinStepWork, kMinWork, kGrain, kGateBytes and others.
UNITS = (8, 16, 24, 32, 48, 64, 96, 128, 192)
FEATURES = (8, 16, 32, 64, 128, 192, 256, 512, 528)
BATCHES = (4, 8, 12, 16, 24, 64, 96, 128)
STEPS = (4, 8, 16, 32, 64, 128)
ROWS = (4, 8, 16, 32, 64, 128, 512, 1024, 2048, 4096, 65536, 1 << 20)
COLUMNS = (8, 16, 32, 48, 64, 128, 256, 320, 384)
LENGTHS = (8, 16, 24, 32, 64, 128, 192)
USES = (16, 24, 32, 64, 128, 256, 1024, 2048, 4096, 8192, 12288, 16384)
WORK = {"small": 2e4, "middling": 1e6, "large": 3e7}  # multiply-adds, or values


def near(rng: random.Random, thresholds: Sequence[int], least: int = 0) -> int:
    """A size: a small one, or a threshold, or one beside it."""
    if rng.random() < 0.65:
        return max(least, rng.choice((0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 9, 11)))
    return max(least, rng.choice(thresholds) + rng.choice((-1, 0, 1)))


def fit(rng: random.Random, case: Case, names: Sequence[str], work: Callable[[Case], float]) -> None:
    """Makes sizes smaller until the case takes no longer than most should; a few may take long."""
    most = WORK[rng.choices(list(WORK), (90, 9, 1))[0]]
    while work(case) > most:
        name = rng.choice([name for name in names if case[name] > 1])
        case[name] = rng.choice((1, 2, 3, case[name] // 2)) if case[name] > 3 else case[name] - 1


def common(rng: random.Random) -> Case:
    """What every case has."""
    return {
        "data": rng.getrandbits(31),
        "dtype": rng.choices(list(DTYPES), list(DTYPES.values()))[0],
        "threads": rng.choices((1, 2, 3, 4, 5), (60, 20, 8, 6, 6))[0],
    }


def often(rng: random.Random, usual: Any, *others: Any, share: float = 0.7) -> Any:
    return usual if rng.random() < share else rng.choice(others)


def draw_recurrent(rng: random.Random) -> Case:
    """What layers, cells and raw ops have in common."""
    case = common(rng) | {
        "cell": rng.choice(("lstm", "lstm", "gru", "rnn_tanh", "rnn_relu")),
        "steps": near(rng, STEPS),
        "batch": near(rng, BATCHES),
        "inputs": near(rng, FEATURES, 1),
        "hidden": near(rng, UNITS, 1),
        "proj": 0,
        "layers": 1,
        "directions": rng.choice((1, 1, 2)),
        "bias": rng.random() < 0.8,
        "scale": often(rng, 0.7, 0.2, 2.0),  # of weights
        "layout": draw_layout(rng),
        "special": often(rng, "", "nan", "inf", "-inf", "huge", "denormal", share=0.9),
        "place": rng.choice("xhcwg"),  # where those stand: input, states, weights, gradients
    }
    if case["cell"] == "lstm" and rng.random() < 0.25:
        case["proj"] = rng.randint(1, max(1, case["hidden"] - 1))
    return case


def fit_recurrent(rng: random.Random, case: Case) -> None:
    def work(c: Case) -> float:
        gates = reference.CELLS[c["cell"]].gates
        rows = max(1, c["steps"]) * max(1, c["batch"])
        weights = gates * c["hidden"] * (c["inputs"] + c["layers"] * c["directions"] * c["hidden"])
        return rows * weights * c["directions"] + 2000 * c["steps"] * c["layers"] * c["directions"]

    fit(rng, case, ("steps", "batch", "inputs", "hidden"), work)
    case["proj"] = min(case["proj"], case["hidden"] - 1)
    if case["steps"] > 8 or case["cell"] == "rnn_relu":  # or errors and values would grow from step to step
        case["scale"] = min(case["scale"], 0.7)
    if case["special"] and "gets" in case:  # torch leaves out what has no gradient, where zeros times NaN are NaN
        case["gets"] = "yhc"


def draw_layout(rng: random.Random) -> str:
    return often(rng, "contiguous", "gaps", "transposed", "offset", "expanded", share=0.75)


def draw_layers(rng: random.Random) -> Case:
    case = draw_recurrent(rng) | {
        "layers": rng.choices((1, 2, 3), (75, 20, 5))[0],
        "batch_first": rng.random() < 0.4,
        "form": rng.choices(("padded", "unbatched", "packed", "unsorted", "lengths"), (50, 10, 10, 10, 20))[0],
        "states": rng.random() < 0.6,
        "sequence": rng.random() < 0.12,
        "function": rng.random() < 0.3,
        "dropout": often(rng, 0.0, 0.5),  # not in training
        "needs": often(rng, "xhcw", "", "x", "h", "c", "w", "1", "xh", "xw", "hc", share=0.5),
        "gets": often(rng, "yhc", "y", "h", "c", "hc", share=0.5),
        "again": rng.random() < 0.15,  # with another number of threads, for the same bits
    }
    fit_recurrent(rng, case)
    return case


def draw_cells(rng: random.Random) -> Case:
    case = draw_recurrent(rng) | {
        "steps": 1, "directions": 1, "proj": 0, "states": rng.random() < 0.7, "form": often(rng, "padded", "unbatched"),
        "needs": often(rng, "xhcw", "", "x", "h", "c", "w", "1", share=0.5), "gets": often(rng, "hc", "h", "c"),
    }  # fmt: skip
    fit_recurrent(rng, case)
    return case


def draw_frozen(rng: random.Random) -> Case:
    case = draw_layers(rng) | {
        "weights": rng.choice(("float32", "bfloat16", "bfloat16", "int8", "int8")),
        "is_cell": rng.random() < 0.2,
        "mask": rng.random() < 0.3,  # in the place of lengths
        "copied": often(rng, "", "pickle", "state_dict", "plain state_dict", "deepcopy"),
        "alone": rng.random() < 0.2,  # a sequence by itself, for the same bits
        "place": rng.choice("xhcw"),
        "function": False, "needs": "", "gets": "y",
    }  # fmt: skip
    if case["is_cell"]:
        case |= {"layers": 1, "directions": 1, "proj": 0, "sequence": False, "form": often(rng, "padded", "unbatched")}
    return case


def draw_raw_recurrent(rng: random.Random) -> Case:
    case = draw_recurrent(rng) | {
        "form": rng.choice(("padded", "packed", "step")),
        "mask": rng.random() < 0.7,
        "gets": often(rng, "yhc", "y", "h", "c", "", share=0.5),
        "need_dx": rng.random() < 0.8,
        "need_dweights": rng.random() < 0.8,
    }
    fit_recurrent(rng, case)
    return case


def draw_table(rng: random.Random) -> Case:
    """What bags, lookups, optimizers and raw ops have in common."""
    return common(rng) | {
        "rows": near(rng, ROWS, 1),
        "columns": near(rng, COLUMNS),
        "uses": near(rng, USES) if rng.random() < 0.5 else rng.randint(0, 40),
        "bags": near(rng, BATCHES),
        "length": near(rng, LENGTHS),
        "form": often(rng, "2d", "offsets", share=0.5),
        "mode": rng.choice(("sum", "mean", "max", "lookup")),
        "ids": often(rng, "int64", "int32"),
        "offsets": often(rng, "int64", "int32"),
        "spread": rng.choice(("even", "zipf", "few", "one", "distinct")),
        "padding": often(rng, "none", "first", "last", "middle", "negative", share=0.5),
        "share_of_padding": rng.choice((0.0, 0.5, 0.9, 0.99, 1.0)),
        "include_last": rng.random() < 0.3,
        "tail": rng.choice((0, 0, 0, 1, 5)),  # indices after the last offset
        "weighted": rng.random() < 0.25,
        "freq": rng.random() < 0.2,
        "values": often(rng, "eighths", "normal"),
        "layout": draw_layout(rng),
        "special": often(rng, "", "nan", "inf", "-inf", "huge", "denormal", share=0.9),
        "place": rng.choice("wg"),
    }


def fit_table(rng: random.Random, case: Case) -> None:
    if (rare := rng.random()) < 0.008:  # a gradient as large as kKeptBytes or kCached
        values = rng.choice((1, 1, 1, 1, 1, 12)) * 2**20 // getattr(torch, case["dtype"]).itemsize
        case["columns"] = rng.choice((16, 64, 100))
        case["rows"] = values // case["columns"] + rng.choice((-1, 0, 1))
        case["bags"], case["length"] = min(case["bags"], 9), min(case["length"], 9)
        return
    if rare < 0.01:  # keys of the sort that take 31 bits, 32 or 33
        bits = rng.choice((18, 19, 20))
        case["rows"], case["uses"] = (2**b + rng.choice((-1, 0, 1)) for b in (bits, rng.choice((31, 32)) - bits))
        case["columns"], case["weighted"], case["form"], case["mode"] = 1, True, "offsets", "sum"
        return
    if case["rows"] > 5000 and rng.random() < 0.8:
        case["rows"] = rng.randint(1, 3000)

    def work(c: Case) -> float:
        uses = c["uses"] if c["form"] == "offsets" else c["bags"] * c["length"]
        return max(1, c["columns"]) * (uses + c["rows"] + c["bags"])

    fit(rng, case, ("rows", "columns", "uses", "bags", "length"), work)


def draw_bags(rng: random.Random) -> Case:
    case = draw_table(rng) | {
        "max_norm": often(rng, 0.0, 0.5, 2.0, share=0.9),
        "norm_type": often(rng, 2.0, 1.0, math.inf),
        "sparse": rng.random() < 0.3,
        "function": rng.random() < 0.3,
        "needs": often(rng, "wf", "w", "f", "", share=0.6),
        "again": rng.random() < 0.15,
    }
    fit_table(rng, case)
    if case["max_norm"]:  # torch has no norm of nothing
        case["columns"] = max(1, case["columns"])
    return case


def draw_optimizers(rng: random.Random) -> Case:
    case = draw_table(rng) | {
        "rule": rng.choice(("SGD", "Adagrad", "RowWiseAdagrad", "SparseAdam")),
        "passes": rng.choice((1, 2, 3, 4)),
        "calls": rng.choice((1, 1, 2, 3)),
        "lr": rng.choice((0.5, 0.01)),
        "values": "eighths", "special": "", "freq": False, "weighted": False,
    }  # fmt: skip
    fit_table(rng, case)
    case["columns"] = max(1, case["columns"])
    if case["dtype"] in ("bfloat16", "float16") and case["rule"] != "SGD":
        case["calls"] = (
            1  # several gradients are rounded each, and what is left of a sum of nought is divided by itself
        )
    return case


def draw_raw_bags(rng: random.Random) -> Case:
    case = draw_table(rng) | {"rule": rng.choice(("sgd", "adagrad", "rowwise_adagrad", "adam")), "special": ""}
    fit_table(rng, case)
    return case


def draw_dots(rng: random.Random) -> Case:
    case = draw_table(rng) | {
        "mode": "sum", "form": "2d", "padding": "none", "weighted": False, "freq": False, "special": "",
        "sparse": rng.random() < 0.3, "needs": often(rng, "hw", "h", "w", "", share=0.7), "again": rng.random() < 0.15,
    }  # fmt: skip
    fit_table(rng, case)
    case["form"] = "2d"
    return case


# --- Data ------------------------------------------------------------------------------------------------------------

SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 1e30}


class Data:
    """Tensors of a case, from its own generator."""

    def __init__(self, case: SimpleNamespace) -> None:
        self.case = case
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.rng = random.Random(case.data)
        self.generator = torch.Generator().manual_seed(case.data)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).clamp(-4, 4).to(self.dtype)

    def eighths(self, *shape: int) -> Tensor:
        return torch.randint(-16, 17, shape, generator=self.generator).div(8).to(self.dtype)

    def values(self, *shape: int) -> Tensor:
        return self.eighths(*shape) if self.case.values == "eighths" else self.normal(*shape)

    def special(self, tensor: Tensor, place: str) -> Tensor:
        """The same, with the case's special value in a few places if they are its places."""
        special = self.case.special
        if special and place == self.case.place and tensor.numel() > 0:
            if special == "denormal":
                return tensor * 2.0 ** {torch.float64: -1064, torch.float16: -18}.get(self.dtype, -138)
            flat = tensor.view(-1)
            for _ in range(self.rng.choice((1, 1, 3))):
                flat[self.rng.randrange(flat.numel())] = SPECIAL[special]
        return tensor

    def expand(self, tensor: Tensor) -> Tensor:
        """Its first part in place of all, if that is the layout."""
        if self.case.layout == "expanded" and tensor.dim() > 0 and tensor.size(0) > 1:
            return tensor[:1].expand_as(tensor).contiguous()
        return tensor

    def lay(self, tensor: Tensor) -> Tensor:
        """The same values in the case's layout, with NaN between them."""
        layout = self.case.layout
        if layout == "expanded" and tensor.dim() > 0 and tensor.size(0) > 1:
            return tensor[:1].expand_as(tensor)
        if layout == "transposed" and tensor.dim() >= 2:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        nothing = math.nan if tensor.is_floating_point() else 10**6
        if layout == "gaps" and tensor.dim() >= 1:
            room = tensor.new_full((*tensor.shape[:-1], 2 * tensor.size(-1)), nothing)
            room[..., ::2] = tensor
            return room[..., ::2]
        if layout == "offset":
            room = tensor.new_full((tensor.numel() + 2,), nothing)
            room[1:-1] = tensor.reshape(-1)
            return room[1:-1].view(tensor.shape)
        return tensor.clone()


def leaf(tensor: Tensor, wants: bool) -> Tensor:
    return tensor.detach().requires_grad_(wants)


def exact(tensor: Tensor, wants: bool = False) -> Tensor:
    return tensor.detach().double().clone().requires_grad_(wants)


def gradients(outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the outputs that have any with respect to inputs, zeros where there are none."""
    have = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    if not have or not inputs:
        return [torch.zeros_like(i) for i in inputs]
    found = torch.autograd.grad([o for o, _ in have], inputs, [g for _, g in have], allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


def assert_same_bits(ours: Sequence[Tensor], again: Sequence[Tensor], names: Sequence[str]) -> None:
    for one, other, name in zip(ours, again, names, strict=False):
        one, other = (t.to_dense() if t.is_sparse else t for t in (one, other))
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), f"{name}: other bits with other threads"


# --- Recurrent layers and cells --------------------------------------------------------------------------------------


class Recurrent:
    """Tensors of a recurrent case: ours in its dtype and layout, and theirs, the same values in float64."""

    def __init__(self, c: SimpleNamespace, batch: int, x_shape: tuple[int, ...], state_lead: tuple[int, ...]) -> None:
        self.c, self.data = c, Data(c)
        data = self.data
        # Products of huge numbers are too large for the dtype, where the exact ones are not, unless gates bound states;
        # and of halves, which are few, two now and then cancel, with what is beside them lost.
        is_bounded = c.cell != "rnn_relu" and c.proj == 0 and c.dtype not in ("float16", "bfloat16")
        if c.special == "huge" and not (is_bounded or c.dtype == "float64"):
            c.special = ""
        facts = reference.CELLS[c.cell]
        self.has_c = facts.has_c
        self.features = c.proj or c.hidden
        x = data.expand(data.special(data.normal(*x_shape), "x"))
        h = data.expand(data.special(data.normal(*state_lead, self.features), "h"))
        cell_state = data.expand(data.special(data.normal(*state_lead, c.hidden), "c"))
        weights = []
        for place in range(c.layers * c.directions):
            inputs = c.inputs if place < c.directions else c.directions * self.features
            shapes = [(facts.gates * c.hidden, inputs), (facts.gates * c.hidden, self.features)]
            shapes += [(facts.gates * c.hidden,)] * 2 * c.bias + [(self.features, c.hidden)] * (c.proj > 0)
            weights += [data.normal(*s, scale=c.scale / math.sqrt(s[-1] if len(s) > 1 else 1)) for s in shapes]
        if c.cell == "rnn_relu":  # states that grow from step to step multiply what they are rounded by
            weights = [w / max(1.0, largest(w) * math.sqrt(w.shape[-1]) / 0.9) if w.dim() == 2 else w for w in weights]
        one = data.rng.randrange(len(weights))
        weights[one] = data.special(weights[one], "w")
        needs = getattr(c, "needs", "xhcw")
        wants = [n in needs for n in "xhc"] + ["w" in needs or ("1" in needs and i == one) for i in range(len(weights))]
        values = [x, h, cell_state, *weights]
        if c.layout == "expanded":  # but weights, which expanded would all be equal
            ours = [*(data.lay(v) for v in values[:3]), *(v.clone() for v in weights)]
        else:
            ours = [data.lay(v) for v in values]
        self.ours = [leaf(t, w) for t, w in zip(ours, wants, strict=True)]
        self.theirs = [exact(t, w) for t, w in zip(values, wants, strict=True)]
        self.wants = wants
        self.incoming = 1.0

    def grad(self, *shape: int) -> Tensor:
        """A gradient of an output."""
        grad = self.data.expand(self.data.special(self.data.normal(*shape), "g"))
        self.incoming = max(self.incoming, largest(grad))
        return grad

    def states(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        if not getattr(self.c, "states", True):
            return None
        return tuple(tensors[1:3]) if self.has_c else (tensors[1],)

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those whose gradients are wanted and that are used."""
        used = [True, getattr(self.c, "states", True), self.has_c and getattr(self.c, "states", True)]
        used += [True] * (len(tensors) - 3)
        return [t for t, u, w in zip(tensors, used, self.wants, strict=True) if u and w]

    def compare(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], run: Callable[[], Sequence[Tensor]], outputs: int
    ) -> None:
        """Of ReLU only the outputs, if a unit is so near to its kink that rounding decides whether it has a gradient.

        `run` is the exact computation, of `theirs`.
        """
        c = self.c
        dtype = self.data.dtype
        if c.cell == "rnn_relu" and dtype != torch.float64:
            with NearestKink() as nearest:
                run()
            is_rounded = dtype != torch.float32 and (c.layers > 1 or "cpu" in rounding_devices)
            if nearest.distance < FUZZED_KINK[dtype if is_rounded else torch.float32] or c.special:
                ours, theirs = ours[:outputs], theirs[:outputs]
        if c.special == "huge" and dtype != torch.float64:
            # A gradient's terms may be too large for the dtype, as torch's are, where the exact gradient is not.
            ours, theirs = ours[:outputs], theirs[:outputs]
        names = [f"output {i}" if i < outputs else f"gradient {i - outputs}" for i in range(len(ours))]

        def rounded() -> list[Sequence[Tensor]]:
            with Rounded(dtype, torch.Generator().manual_seed(c.data)):
                return [run()[: len(theirs)] for _ in range(FUZZED_DRAWS)]

        assert_each_close(ours, theirs, names, outputs, self.incoming, bool(c.special), rounded)


def by_reference(
    c: SimpleNamespace, x: Tensor, sizes: Tensor | None, states: tuple[Tensor, ...], weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y, final states, and states of all steps, [L D, T, B, H] or [L D, N, H], of all layers, from float64 tensors."""
    finals, sequences = [], []
    per_layer = len(weights) // c.layers
    for layer in range(c.layers):
        own = slice(layer * c.directions, (layer + 1) * c.directions)
        h, cs = states[0][own], states[1][own] if len(states) > 1 else None
        own_weights = list(weights[layer * per_layer : (layer + 1) * per_layer])
        x, h_n, c_n, kept = reference.recurrent(x, sizes, h, cs, own_weights, c.cell, cs is not None, None)
        finals.append((h_n, c_n)[: len(states)])
        of_h = x.unflatten(-1, (c.directions, -1)).movedim(-2, 0)
        of_c = [] if cs is None else [reference.cell_states(kept).reshape(*of_h.shape[:-1], c.hidden)]
        sequences.append((of_h, *of_c))
    return x, [torch.cat(f) for f in zip(*finals, strict=True)], [torch.cat(s) for s in zip(*sequences, strict=True)]


def check_layers(c: SimpleNamespace) -> None:
    if c.form == "unbatched":
        c.batch = 1
    if c.form in ("packed", "unsorted"):
        c.steps, c.batch = max(1, c.steps), max(1, c.batch)
    unbatched, first = c.form == "unbatched", c.batch_first and c.form != "unbatched"
    shape = (c.batch, c.steps) if first else (c.steps, c.batch)
    lead = (c.layers * c.directions,) if unbatched else (c.layers * c.directions, c.batch)
    r = Recurrent(c, c.batch, (c.steps, c.inputs) if unbatched else (*shape, c.inputs), lead)
    lengths = None
    if c.form in ("packed", "unsorted", "lengths"):
        least = 0 if c.form == "lengths" else 1
        lengths = torch.tensor([r.data.rng.randint(least, c.steps) for _ in range(c.batch)], dtype=torch.long)
        if c.form == "packed":
            lengths = lengths.sort(descending=True).values
    order = rows = sizes = None
    if lengths is not None:
        ordered, order = lengths.sort(descending=True, stable=True)
        if c.form == "unsorted":  # among equals torch has its own order
            order = pack_padded_sequence(torch.zeros(c.steps, c.batch), lengths, enforce_sorted=False).sorted_indices
        step = torch.arange(c.steps).unsqueeze(1)
        real = step < ordered
        sizes, rows = real.sum(1), (order * c.steps + step if first else step * c.batch + order)[real]
        if c.form == "lengths" and c.layout != "expanded" and c.steps * c.batch > 0:  # what stands there is not read
            hole = torch.ones(c.steps * c.batch, dtype=torch.bool)
            hole[rows] = False
            with torch.no_grad():
                r.ours[0][hole.view(shape)] = math.nan
                r.theirs[0][hole.view(shape)] = 0.0

    def theirs() -> tuple[list[Tensor], list[Tensor]]:
        """Results to compare, and the same with holes left out, through which gradients go."""
        x, *_ = r.theirs
        weights = r.theirs[3:]
        if unbatched:
            x = x.unsqueeze(1)
        states = r.states(r.theirs)
        if states is None:
            zeros = x.new_zeros(c.layers * c.directions, c.batch, r.features)
            states = (zeros, zeros.new_zeros(*zeros.shape[:2], c.hidden))[: 1 + r.has_c]
        elif unbatched:
            states = tuple(s.unsqueeze(1) for s in states)
        if sizes is None:
            data = x.transpose(0, 1) if first else x
        else:
            data = x.reshape(-1, c.inputs)[rows]
            states = tuple(s[:, order] for s in states)
        if c.sequence or c.steps == 0 or (sizes is not None and (c.batch == 0 or bool((sizes[:1] < c.batch).any()))):
            y, finals, sequences = by_reference(c, data, sizes, states, weights)
        else:
            function = getattr(torch, c.cell)
            rest = (list(weights), c.bias, c.layers, 0.0, False, c.directions == 2)
            hx = states if r.has_c else states[0]
            y, *finals = function(data, hx, *rest, False) if sizes is None else function(data, sizes, hx, *rest)
            sequences = []
        # Each as ours comes out.
        wide = [y, *(sequences if c.sequence else finals)]
        if sizes is None:
            if first:
                wide = [wide[0].transpose(0, 1), *(s.transpose(1, 2) if c.sequence else s for s in wide[1:])]
            if unbatched:
                wide = [wide[0].squeeze(1), *(s.squeeze(2 if c.sequence else 1) for s in wide[1:])]
            return wide, wide
        if not c.sequence:
            wide[1:] = [s[:, order.argsort()] for s in wide[1:]]
        if c.form != "lengths":
            return wide, wide
        full = [unpacked(w) if i == 0 or c.sequence else w for i, w in enumerate(wide)]
        return full, wide

    def unpacked(data: Tensor, hole: float = 0.0) -> Tensor:
        room = data.new_full((*data.shape[:-2], c.steps * c.batch, data.size(-1)), hole)
        return room.index_copy(-2, rows, data).reshape(*data.shape[:-2], *shape, data.size(-1))

    def packed(grad: Tensor) -> Tensor:
        return grad.flatten(-3, -2)[..., rows, :]

    results, _ = theirs()
    chosen = [i for i, name in enumerate("yhc"[: len(results)]) if name in c.gets] or [0]
    grads = [r.grad(*results[i].shape) for i in chosen]
    laid = [r.data.lay(g) for g in grads]
    narrow_grads = [g.double() for g in grads]
    if c.form == "lengths":
        holed = [i == 0 or c.sequence for i in chosen]
        narrow_grads = [packed(g) if h else g for g, h in zip(narrow_grads, holed, strict=True)]
        if c.layout != "expanded":  # nor what comes back from there
            laid = [
                r.data.lay(unpacked(packed(g), math.nan)) if h else lay
                for g, lay, h in zip(grads, laid, holed, strict=True)
            ]

    def exact_results() -> list[Tensor]:
        results, narrow = theirs()
        if not c.needs:
            return results
        return results + gradients([narrow[i] for i in chosen], narrow_grads, r.inputs(r.theirs))

    def ours() -> list[Tensor]:
        x, weights = r.ours[0], r.ours[3:]
        states = r.states(r.ours)
        hx = None if states is None else states if r.has_c else states[0]
        options: Any = {"return_state_sequence": True} if c.sequence else {}
        if c.form == "lengths":
            options["lengths"] = lengths
        if c.function and c.form == "padded" and hx is not None:
            rest = (weights, c.bias, c.layers, c.dropout, False, c.directions == 2, c.batch_first)
            y, *finals = getattr(functional, c.cell)(x, hx, *rest, **options)
            return [y, *finals]
        kind = {"lstm": K.LSTM, "gru": K.GRU}.get(c.cell, K.RNN)
        if kind is K.RNN:
            options_of_layer: Any = {"nonlinearity": c.cell[4:]}
        else:
            options_of_layer = {"proj_size": c.proj}
        dropout = c.dropout if c.layers > 1 else 0.0
        layer = kind(
            c.inputs, c.hidden, c.layers, bias=c.bias, batch_first=c.batch_first, dropout=dropout,
            bidirectional=c.directions == 2, device="meta", dtype=r.data.dtype, recurrent_dropout=c.dropout,
            **options_of_layer,
        )  # fmt: skip
        layer.train(not c.dropout)
        for name, weight in zip(layer._flat_weights_names, weights, strict=True):
            layer._parameters[name] = weight
        if c.form in ("packed", "unsorted"):
            x = pack_padded_sequence(x, lengths, c.batch_first, enforce_sorted=c.form == "packed")
        y, finals = layer(x, hx, **options)
        return [y.data if c.form in ("packed", "unsorted") else y, *(finals if r.has_c else (finals,))]

    def run_ours() -> list[Tensor]:
        if not c.needs:
            with torch.no_grad():
                return ours()
        got = ours()
        return got + gradients([got[i] for i in chosen], laid, r.inputs(r.ours))

    got = run_ours()
    r.compare(got, exact_results(), exact_results, len(results))
    if c.again:
        torch.set_num_threads(c.threads % 4 + 1)
        # The gradient of cell states between the steps is torch's own arithmetic, which promises no bits.
        promised = len(results) if c.sequence and r.has_c else len(got)
        assert_same_bits(got[:promised], run_ours()[:promised], [f"result {i}" for i in range(promised)])


def check_cells(c: SimpleNamespace) -> None:
    lead = () if c.form == "unbatched" else (c.batch,)
    r = Recurrent(c, c.batch, (*lead, c.inputs), lead)

    def theirs() -> list[Tensor]:
        x, h, cell_state, *weights = r.theirs
        if not c.states:
            h, cell_state = torch.zeros_like(h), torch.zeros_like(cell_state)
        x, h, cell_state = (t.view(-1, t.size(-1)) if not lead else t for t in (x, h, cell_state))
        if not c.bias:
            weights = [*weights, None, None]
        result = getattr(torch, f"{c.cell}_cell")(x, (h, cell_state) if r.has_c else h, *weights)
        return [t if lead else t.squeeze(0) for t in (result if r.has_c else (result,))]

    kind = {"lstm": K.LSTMCell, "gru": K.GRUCell}.get(c.cell, K.RNNCell)
    options: Any = {"nonlinearity": c.cell[4:]} if kind is K.RNNCell else {}
    cell = kind(c.inputs, c.hidden, c.bias, device="meta", dtype=r.data.dtype, **options)
    for name, weight in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), r.ours[3:], strict=False):
        cell._parameters[name] = weight
    states = r.states(r.ours)
    with torch.set_grad_enabled(bool(c.needs)):
        got = cell(r.ours[0], None if states is None else states if r.has_c else states[0])
    got = list(got) if r.has_c else [got]
    results = theirs()
    chosen = [i for i, name in enumerate("hc"[: len(results)]) if name in c.gets] or [0]
    grads = [r.grad(*results[i].shape) for i in chosen]
    if c.needs:
        got += gradients([got[i] for i in chosen], [r.data.lay(g) for g in grads], r.inputs(r.ours))

    def exact_results() -> list[Tensor]:
        results = theirs()
        if not c.needs:
            return results
        return results + gradients([results[i] for i in chosen], [g.double() for g in grads], r.inputs(r.theirs))

    r.compare(got, exact_results(), exact_results, len(results))


def check_frozen(c: SimpleNamespace) -> None:
    """Weights of float32 stay in the dtype of the case, for the bits of the layer as it was."""
    if c.form == "unbatched":
        c.batch = 1
    if c.form in ("packed", "unsorted"):
        c.steps, c.batch = max(1, c.steps), max(1, c.batch)
    unbatched, first = c.form == "unbatched", c.batch_first and c.form != "unbatched" and not c.is_cell
    lead = () if c.is_cell else (c.layers * c.directions,)
    lead = lead if unbatched else (*lead, c.batch)
    shape = (c.batch, c.steps) if first else (c.steps, c.batch)
    shape = () if c.is_cell else (c.steps,) if unbatched else shape
    r = Recurrent(c, c.batch, (*shape, c.inputs) if not c.is_cell else (*lead, c.inputs), lead)
    x, weights, dtype = r.ours[0], r.ours[3:], getattr(torch, c.weights)
    states = r.states(r.ours)
    hx = None if states is None else states if r.has_c else states[0]

    is_rnn = c.cell.startswith("rnn")
    options: Any = {"nonlinearity": c.cell[4:]} if is_rnn else {"proj_size": c.proj} if c.proj else {}
    name = ("RNN" if is_rnn else c.cell.upper()) + "Cell" * c.is_cell
    if not c.is_cell:
        options |= {"num_layers": c.layers, "batch_first": c.batch_first, "bidirectional": c.directions == 2}
        options["dropout"] = c.dropout if c.layers > 1 else 0.0
    kind = getattr(K if c.data % 2 else torch.nn, name)
    layer = kind(c.inputs, c.hidden, bias=c.bias, device="meta", dtype=r.data.dtype, **options)
    for own, weight in zip(list(layer._parameters), weights, strict=not c.is_cell):
        layer._parameters[own] = torch.nn.Parameter(weight, requires_grad=False)
    layer.eval()
    before = copy.deepcopy(layer)
    K.convert(before)
    assert K.freeze(layer, dtype).swapped, "it is left alone"

    call: Any = {"return_state_sequence": True} if c.sequence else {}
    if c.form in ("packed", "unsorted", "lengths"):
        least = 0 if c.form == "lengths" else 1
        lengths = torch.tensor([r.data.rng.randint(least, c.steps) for _ in range(c.batch)], dtype=torch.long)
        lengths = lengths.sort(descending=True).values if c.form == "packed" else lengths
        real = torch.arange(c.steps) < lengths.unsqueeze(1)
        real = real if first else real.T
        if c.form != "lengths":
            x = pack_padded_sequence(x, lengths, c.batch_first, enforce_sorted=c.form == "packed")
        else:
            if c.layout != "expanded":
                x = x.masked_fill(~real.unsqueeze(-1), math.nan)  # which is not read
            call |= {"mask": real} if c.mask else {"lengths": lengths}

    def run(layer: torch.nn.Module, x: Any = x, hx: Any = hx) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(layer(x, hx, **call)) if isinstance(leaf, Tensor)]

    got = run(layer)
    if dtype == torch.float32:
        assert_same_bits(got, run(before), [f"result {i}" for i in range(len(got))])
    else:
        kernels = _ops.frozen, _ops.frozen_layers
        _ops.frozen, _ops.frozen_layers = reference.frozen, lambda *args: None
        try:
            expected = run(layer)
        finally:
            _ops.frozen, _ops.frozen_layers = kernels
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            if one.is_floating_point():
                assert_frozen_close(one, other, dtype, c.layers * FROZEN_TIMES, f"result {i}")
            else:
                assert torch.equal(one, other), f"result {i}"
    names = [f"result {i}" for i in range(len(got))]
    if c.copied:
        if c.copied == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        elif c.copied == "deepcopy":
            other = copy.deepcopy(layer)
        else:
            other = copy.deepcopy(before)
            for parameter in other.parameters():
                torch.nn.init.ones_(parameter)
            K.freeze(other, dtype)
            other.load_state_dict((layer if c.copied == "state_dict" else before).state_dict())
        assert_same_bits(got, run(other), names)
    if c.alone and c.form == "padded" and c.batch > 0:
        one = r.data.rng.randrange(c.batch)
        at = 0 if c.is_cell else 1

        def part(value: Any, at: int) -> Any:
            return tree_map(lambda t: None if t is None else t.narrow(at, one, 1), value)

        own = run(layer, part(x, 0 if first or c.is_cell else 1), part(hx, at))
        batch_of_y = 0 if first or c.is_cell else 1
        batch_of_states = at + (c.sequence and not first)
        theirs = [part(got[0], batch_of_y), *(part(state, batch_of_states) for state in got[1:])]
        assert_same_bits(own, theirs, names)
    if c.again:
        torch.set_num_threads(c.threads % 4 + 1)
        assert_same_bits(got, run(layer), names)


def check_raw_recurrent(c: SimpleNamespace) -> None:
    lead = (c.directions, c.batch)
    sizes = None
    if c.form == "packed":
        rng = random.Random(c.data)
        sizes = torch.tensor(sorted((rng.randint(0, c.batch) for _ in range(c.steps)), reverse=True), dtype=torch.long)
        shape: tuple[int, ...] = (int(sizes.sum()),)
    else:
        shape = (c.batch,) if c.form == "step" else (c.steps, c.batch)
    r = Recurrent(c, c.batch, (*shape, c.inputs), lead)
    mask = None
    if c.mask:
        mask = r.data.expand(torch.randint(0, 3, (*lead, r.features), generator=r.data.generator).to(r.data.dtype))

    def theirs() -> tuple[Tensor, ...]:
        x, h, cell_state, *weights = r.theirs
        cs = cell_state if r.has_c else None
        return reference.recurrent(x, sizes, h, cs, weights, c.cell, True, None if mask is None else mask.double())

    results = theirs()
    x, h, cell_state, *weights = (t.detach() for t in r.ours)
    cs = cell_state if r.has_c else None
    laid_mask = None if mask is None else r.data.lay(mask)
    kept = ops.recurrent(x, sizes, h, cs, weights, c.cell, True, laid_mask)
    other = ops.recurrent(x, sizes, h, cs, weights, c.cell, False, laid_mask)
    assert_same_bits(kept[:3], other[:3], ("y", "h_n", "c_n"))
    grads = [r.grad(*t.shape) if n in c.gets else None for n, t in zip("yhc", results[:3], strict=True)]
    if not r.has_c:
        grads[2] = None
    got = ops.recurrent_backward(
        *(None if g is None else r.data.lay(g) for g in grads), x, sizes, h, cs,
        weights, c.cell, kept[0], kept[3], c.need_dx, c.need_dweights, laid_mask,
    )  # fmt: skip

    def exact_results() -> list[Tensor]:
        results = theirs()
        have = [(o, g.double()) for o, g in zip(results[:3], grads, strict=True) if g is not None]
        dx, dh, *rest = gradients([o for o, _ in have], [g for _, g in have], r.inputs(r.theirs))
        empty = torch.zeros(0, dtype=torch.float64)
        dc = [rest.pop(0)] if r.has_c else [empty]
        dweights = rest if c.need_dweights else [empty] * len(rest)
        return [*results, dx if c.need_dx else empty, dh, *dc, *dweights]

    r.compare([*kept, *got[:3], *got[3]], exact_results(), exact_results, 4)


# --- Tables ----------------------------------------------------------------------------------------------------------


class Table:
    """A table, indices, bags and gradients of a case."""

    def __init__(self, c: SimpleNamespace) -> None:
        self.c, self.data = c, Data(c)
        data, rng = self.data, self.data.rng
        if c.special == "huge" and c.dtype == "float16":
            c.special = ""
        if c.mode == "lookup":
            c.form, c.weighted = "2d", False
        if c.mode == "max":
            c.freq = c.sparse = False
        n = c.bags * c.length if c.form == "2d" else c.uses
        self.padding = {"none": None, "first": 0, "last": c.rows - 1, "middle": c.rows // 2, "negative": -1}[c.padding]
        self.padding_row = -1 if self.padding is None else self.padding % c.rows
        flat = self.draw_ids(n)
        if self.padding is not None and c.share_of_padding > 0:
            flat[torch.rand(n, generator=data.generator) < c.share_of_padding] = self.padding_row
            if n > 0 and c.share_of_padding == 0.99:
                flat[rng.randrange(n)] = rng.randrange(c.rows)
        self.flat = flat
        self.bags, self.inside, self.offsets = c.bags, n, None  # inside: indices that are in a bag
        self.starts = torch.arange(c.bags) * c.length
        if c.form == "offsets":
            starts = [0, *sorted(rng.randint(0, n) for _ in range(c.bags - 1))][: c.bags]
            if c.include_last:
                starts.append(max(starts[-1], n - c.tail) if c.bags else 0)
            self.offsets = torch.tensor(starts, dtype=torch.long)
            self.starts = self.offsets[: c.bags]
            self.inside = starts[-1] if c.include_last else n if c.bags else 0
        self.used = flat[: self.inside]
        self.counted = self.used[self.used != self.padding_row]
        lengths = torch.diff(self.starts, append=torch.tensor([self.inside]))
        self.longest = max([1, *lengths.tolist()]) if self.bags else 1
        self.weight = data.expand(data.special(data.values(c.rows, c.columns), "w"))
        # What must not be read, or not counted.
        max_norm = getattr(c, "max_norm", 0)
        if c.layout != "expanded" and rng.random() < 0.5 and not (c.special or max_norm):
            unread = torch.ones(c.rows, dtype=torch.bool)
            unread[self.used if c.mode == "lookup" else self.counted] = False
            self.weight[unread] = math.nan
        self.factors = None
        if c.weighted:
            self.factors = torch.tensor([0.5, 1, 2, 0.25, -1, 0])[
                torch.randint(0, 4 if c.mode == "mean" else 6, (n,), generator=data.generator)
            ].to(data.dtype)

    def draw_ids(self, n: int) -> Tensor:
        rows, generator = self.c.rows, self.data.generator
        if self.c.spread == "distinct" and n <= rows <= 10**5:
            return torch.randperm(rows, generator=generator)[:n]
        if self.c.spread == "zipf":
            return (rows ** torch.rand(n, generator=generator)).long().clamp(max=rows) - 1
        most = {"few": min(3, rows), "one": 1}.get(self.c.spread, rows)
        ids = torch.randint(0, most, (n,), generator=generator)
        return rows - 1 - ids if self.data.rng.random() < 0.3 else ids

    def indices(self) -> Tensor:
        ids = self.flat.to(getattr(torch, self.c.ids))
        if self.c.form == "2d":
            ids = ids.view(self.c.bags, self.c.length)
        return self.data.lay(ids) if self.c.layout != "expanded" else ids.clone()

    def laid_offsets(self) -> Tensor | None:
        return None if self.offsets is None else self.offsets.to(getattr(torch, self.c.offsets))

    def like_indices(self, flat: Tensor | None) -> Tensor | None:
        if flat is None or self.c.form == "offsets":
            return flat
        return flat.view(self.c.bags, self.c.length)

    @property
    def is_exact(self) -> bool:
        """Whether all sums are."""
        c = self.c
        return (
            c.values == "eighths"
            and c.special in ("", "denormal", "nan", "inf", "-inf")
            and not (c.mode == "mean" or c.freq or getattr(c, "max_norm", 0))
        )

    def uses_of_rows(self) -> int:
        return int(torch.bincount(self.counted).max()) if self.counted.numel() else 1

    def theirs(self, weight: Tensor, factors: Tensor | None) -> Tensor:
        """Pooled rows in float64, by torch."""
        c, nn = self.c, torch.nn.functional
        if c.mode == "lookup":
            return nn.embedding(self.flat, weight, self.padding)
        padding = None if self.padding is None else self.padding_row
        if factors is None or c.mode == "sum":
            used = None if factors is None else factors[: self.inside]
            return nn.embedding_bag(
                self.used, weight, self.starts, mode=c.mode, per_sample_weights=used, padding_idx=padding
            )
        used = factors[: self.inside]
        is_padding = self.used == self.padding_row
        if c.mode == "mean":
            total = nn.embedding_bag(self.used, weight, self.starts, mode="sum", per_sample_weights=used,
                                     padding_idx=padding)  # fmt: skip
            counted = used.masked_fill(is_padding, 0).unsqueeze(1)
            divisor = nn.embedding_bag(torch.arange(self.inside), counted, self.starts, mode="sum")
            return total / divisor.masked_fill(divisor == 0, 1)
        kept = (~is_padding).nonzero().squeeze(1)
        rows = weight[self.used[kept]] * used[kept].unsqueeze(1)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        place = torch.full_like(self.used, len(kept)).index_copy(0, kept, torch.arange(len(kept)))
        return nn.embedding_bag(place, rows, self.starts, mode="max", padding_idx=len(kept))

    def grad(self) -> Tensor:
        lead = self.flat.numel() if self.c.mode == "lookup" else self.bags
        return self.data.expand(self.data.special(self.data.values(lead, self.c.columns), "g"))

    def by_frequency(self, gradient: Tensor) -> Tensor:
        if not self.c.freq:
            return gradient
        return gradient / torch.bincount(self.counted, minlength=self.c.rows).clamp(min=1).unsqueeze(1)


def largest(*tensors: Tensor | None) -> float:
    """The product of the largest finite values."""
    product = 1.0
    for tensor in tensors:
        if tensor is not None and tensor.numel() > 0:
            product *= float(tensor.detach().double().nan_to_num(0, 0, 0).abs().max())
    return product


def check_bags(c: SimpleNamespace) -> None:
    t = Table(c)
    grad = t.grad()
    weight_values = t.weight
    if c.max_norm:
        weight_values = weight_values.clone()
        renormed = t.used if c.include_last else t.flat
        torch.embedding_renorm_(weight_values, renormed, c.max_norm, c.norm_type)
    their_weight = exact(weight_values, "w" in c.needs)
    wants_factors = t.factors is not None and "f" in c.needs
    their_factors = None if t.factors is None else exact(t.factors, wants_factors)
    out = t.theirs(their_weight, their_factors)
    their_inputs = [x for x in (their_weight, their_factors) if x is not None and x.requires_grad]
    expected = gradients([out], [grad.double()], their_inputs)
    if "w" in c.needs:
        expected[0] = t.by_frequency(expected[0])

    lay = t.data.lay if not c.max_norm else Tensor.clone
    grad_laid = t.data.lay(grad)
    if c.mode == "lookup":
        grad_laid = grad_laid.view(c.bags, c.length, c.columns) if grad_laid.is_contiguous() else grad.view(
            c.bags, c.length, c.columns
        )  # fmt: skip
    ids, offsets = t.indices(), t.laid_offsets()

    def ours() -> list[Tensor]:
        weight = leaf(lay(t.weight), "w" in c.needs)
        factors = None
        if t.factors is not None:
            factors = leaf(t.data.lay(t.like_indices(t.factors)) if c.layout != "expanded"
                           else t.like_indices(t.factors).clone(), wants_factors)  # fmt: skip
        max_norm = c.max_norm or None
        if c.mode == "lookup":
            if c.function:
                got = functional.embedding(ids, weight, t.padding, max_norm, c.norm_type, c.freq, c.sparse)
            else:
                layer = K.Embedding(1, 1, device="meta")
                layer.padding_idx, layer.max_norm, layer.norm_type = t.padding, max_norm, c.norm_type
                layer.scale_grad_by_freq, layer.sparse = c.freq, c.sparse
                layer._parameters["weight"] = weight
                got = layer(ids)
        elif c.function:
            got = functional.embedding_bag(
                ids, weight, offsets, max_norm, c.norm_type, c.freq, c.mode, c.sparse, factors, c.include_last,
                t.padding,
            )  # fmt: skip
        else:
            layer = K.EmbeddingBag(1, 1, device="meta")
            layer.padding_idx, layer.max_norm, layer.norm_type = t.padding, max_norm, c.norm_type
            layer.scale_grad_by_freq, layer.sparse, layer.mode = c.freq, c.sparse, c.mode
            layer.include_last_offset = c.include_last
            layer._parameters["weight"] = weight
            got = layer(ids, offsets, factors)
        if c.max_norm:
            assert torch.equal(weight.nan_to_num(7.0), weight_values.nan_to_num(7.0)), "the table after max_norm"
        inputs = [x for x in (weight, factors) if x is not None and x.requires_grad]
        return [got, *gradients([got], [grad_laid], inputs)]

    with torch.set_grad_enabled(bool(c.needs)):
        got = ours()
    if c.again:
        torch.set_num_threads(c.threads % 4 + 1)
        with torch.set_grad_enabled(bool(c.needs)):
            assert_same_bits(got, ours(), ("output", "gradient 0", "gradient 1")[: len(got)])
    got[0] = got[0].reshape(out.shape)
    rounds_often = t.factors is not None and c.mode != "sum"  # made of several calls
    assert_summed(got[0], out, "output", t.longest * largest(t.weight, t.factors), t.is_exact, rounds_often)
    for i, (one, other) in enumerate(zip(got[1:], expected, strict=True)):
        name = "gradient of weight" if i == 0 and "w" in c.needs else "gradient of per_sample_weights"
        if one.is_sparse:
            assert one.is_coalesced() or c.mode == "lookup", f"{name}: not coalesced"
            if not one.is_coalesced():  # torch's own, of which nothing has been summed yet
                one = exact(one).coalesce().to(one.dtype)
            rows = one.indices()[0]
            assert torch.equal(rows, t.counted.unique()), f"{name}: rows {rows.tolist()[:20]}"
            one = one.to_dense()
        if name == "gradient of weight":
            terms = t.uses_of_rows() * largest(grad, t.factors)
        else:
            terms = max(1, c.columns) * largest(grad, t.weight)
            other = other.view(one.shape)
        assert_summed(one, other, name, terms, t.is_exact, rounds_often)


def check_optimizers(c: SimpleNamespace) -> None:
    c.layout = "contiguous"
    if c.mode == "max":
        c.mode = "sum"
    if c.mode == "lookup":
        c.form = "2d"
    half = c.dtype in ("bfloat16", "float16")
    # A sum that is 0 but for rounding would make a whole step, unless eps is larger.
    eps = 0.1 if half or c.mode == "mean" else 1e-8
    t = Table(c)
    t.weight.nan_to_num_(0.5)
    weight = torch.nn.Parameter(t.weight.clone())
    theirs = torch.nn.Parameter(exact(t.weight))
    options: Any = {"lr": c.lr}
    if c.rule in ("Adagrad", "RowWiseAdagrad"):
        options |= {"eps": eps, "lr_decay": t.data.rng.choice((0, 0.1))}
        options["initial_accumulator_value"] = t.data.rng.choice((0, 0.5))
    if c.rule == "SparseAdam":
        options |= {"eps": eps, "betas": t.data.rng.choice(((0.9, 0.999), (0.5, 0.9)))}
    optimizer = getattr(K.optim, c.rule)([weight], **options)
    if c.rule == "RowWiseAdagrad":
        torch_optimizer = None
        total = torch.full((c.rows,), float(options["initial_accumulator_value"]), dtype=torch.float64)
    else:
        torch_optimizer = getattr(torch.optim, c.rule)([theirs], **options)
    tables = [t]
    for _ in range(c.calls - 1):  # other indices for the same table
        c_other = SimpleNamespace(**vars(c) | {"data": t.data.rng.getrandbits(31)})
        tables.append(Table(c_other))
    largest_terms = 0.0
    for step in range(c.passes):
        losses, dense, terms = [], torch.zeros_like(theirs), torch.zeros_like(theirs)
        touched = []
        for table in tables:
            grad = table.grad()
            ids, offsets = table.indices(), table.laid_offsets()
            if c.mode == "lookup":
                out = functional.embedding(ids, weight, table.padding).view(-1, c.columns)
            else:
                out = functional.embedding_bag(
                    ids, weight, offsets, mode=c.mode, include_last_offset=c.include_last, padding_idx=table.padding
                )
            losses.append((out.double() * grad.double()).sum() if half else (out * grad).sum())
            dense += gradients([table.theirs(theirs, None)], [grad.double()], [theirs])[0]
            terms += gradients([table.theirs(theirs, None)], [grad.double().abs()], [theirs])[0]
            touched.append(table.counted)
        largest_terms = max(largest_terms, largest(terms))
        torch.stack(losses).sum().backward()
        rows = torch.cat(touched).unique()
        g = dense.detach()[rows]
        if torch_optimizer is not None:
            theirs.grad = torch.sparse_coo_tensor(
                rows.unsqueeze(0), g, theirs.shape, is_coalesced=True, check_invariants=False
            )
            torch_optimizer.step()
        else:
            total[rows] += g.square().mean(1)
            rate = c.lr / (1 + step * options["lr_decay"])
            with torch.no_grad():
                theirs[rows] -= rate * g / (total[rows].sqrt() + options["eps"]).unsqueeze(1)
        optimizer.step()
        optimizer.zero_grad()
    unit = torch.finfo(t.data.dtype).eps
    change = float((theirs - exact(t.weight)).detach().abs().max()) if theirs.numel() else 0.0
    allowed = c.passes * unit * (largest(t.weight) + change) + (1e-11 if c.dtype == "float64" else 2e-5) * (
        c.lr + change
    )
    if half:
        allowed += 2 * unit * c.passes * change
    error = float((weight.detach().double() - theirs.detach()).abs().max()) if theirs.numel() else 0.0
    assert error <= allowed, f"table: error {error:.2e}, allowed {allowed:.2e}"
    for name in optimizer.states:
        if not optimizer.state[weight]:
            continue
        got = optimizer.state[weight][name].double()
        expected = total if torch_optimizer is None else torch_optimizer.state[theirs][name]
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        error = float((got - expected).abs().max()) if expected.numel() else 0.0
        allowed = (1e-12 if c.dtype == "float64" else (4 * unit if half else 1e-5)) * scale
        # A gradient that is the small rest of large terms, or the square of it.
        of_gradient = 8 * unit * largest_terms
        allowed += of_gradient if name == "exp_avg" else of_gradient * (2 * math.sqrt(scale) + of_gradient)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check_raw_bags(c: SimpleNamespace) -> None:
    t = Table(c)
    if c.mode != "sum":
        t.factors = None
    ids, offsets = t.indices(), t.laid_offsets()
    if c.mode == "lookup":
        ids = ids.reshape(-1, 1)
        t.bags = ids.size(0)
    weight = t.data.lay(t.weight)
    factors = None if t.factors is None else t.like_indices(t.factors)
    wide = None if factors is None else factors.double()
    padding, bags = t.padding_row, (c.include_last if c.form == "offsets" else False)
    got, aux = ops.embedding_bag(weight, ids, offsets, factors, c.mode, padding, bags, c.freq, False)
    out, their_aux = reference.embedding_bag(
        t.weight.double(), ids, offsets, wide, c.mode, padding, bags, c.freq, False
    )
    assert_summed(got, out, "output", t.longest * largest(t.weight, t.factors), t.is_exact)
    assert c.columns == 0 or torch.equal(aux, their_aux), "aux"
    grad = t.grad() if c.mode != "lookup" else t.data.values(ids.size(0), c.columns)
    rest = (c.rows, ids, offsets, factors, aux, c.mode, padding, bags, c.freq)
    their_rest = (c.rows, ids, offsets, wide, aux, c.mode, padding, bags, c.freq)
    laid = t.data.lay(grad) if c.layout != "expanded" else grad
    dense = reference.embedding_bag_backward(grad.double(), *their_rest)
    terms = t.uses_of_rows() * largest(grad, t.factors)
    assert_summed(ops.embedding_bag_backward(laid, *rest), dense, "dense gradient", terms, t.is_exact)
    rows, values = ops.embedding_bag_sparse_backward(laid, *rest)
    assert torch.equal(rows, t.counted.unique()), "rows of the sparse gradient"
    assert_summed(values, dense[rows], "sparse gradient", terms, t.is_exact)
    if c.mode == "sum":
        d = ops.embedding_dot(laid, weight, ids, offsets, padding, bags, False)
        expected = reference.embedding_dot(grad.double(), t.weight.double(), ids, offsets, padding, bags, False)
        assert_summed(d, expected, "products", max(1, c.columns) * largest(grad, t.weight), t.is_exact)
    # A step of an optimizer.
    states_dtype = torch.float64 if c.dtype == "float64" else torch.float32
    number = {"sgd": 0, "adam": 2}.get(c.rule, 1)
    shape = (c.rows,) if c.rule == "rowwise_adagrad" else (c.rows, c.columns)
    if c.columns == 0:
        return
    states = [t.data.eighths(*shape).abs().to(states_dtype) for _ in range(number)]
    their_states = [s.double().clone() for s in states]
    settings = {"sgd": [0.5], "adam": [0.5, 0.1, 0.9, 0.99]}.get(c.rule, [0.5, 0.1])
    table, their_table = t.weight.clone(), exact(t.weight)
    pair, their_pair = ([*s, None, None][:2] for s in (states, their_states))
    ops.embedding_bag_update(laid, table, *pair, *rest[1:], c.rule, settings)
    reference.embedding_bag_update(grad.double(), their_table, *their_pair, *their_rest[1:], c.rule, settings)
    change = largest(their_table - t.weight.double())
    of_rounding = 16 * (1 + terms)
    assert_summed(table, their_table, "table", of_rounding + largest(t.weight) + change, False)
    for i, (one, other) in enumerate(zip(states, their_states, strict=True)):
        assert_summed(one, other, f"state {i}", of_rounding**2 + largest(other), False)


def check_dots(c: SimpleNamespace) -> None:
    t = Table(c)
    ids, flat = t.indices(), t.flat
    h, grad = t.data.expand(t.data.values(c.bags, c.columns)), t.data.expand(t.data.values(c.bags, c.length))
    laid = [leaf(t.data.lay(v), name in c.needs) for name, v in (("h", h), ("w", t.weight))]
    laid_grad = t.data.lay(grad)

    def run() -> list[Tensor]:
        scores = functional.embedding_dot(*laid, ids, sparse=c.sparse)
        wanted = [v for v in laid if v.requires_grad]
        return [scores, *gradients([scores], [laid_grad], wanted)]

    scores, *grads = run()
    bag = torch.arange(c.bags).repeat_interleave(c.length)
    rows, vectors, factors = t.weight.double()[flat], h.double()[bag], grad.double().reshape(-1, 1)
    of_h = torch.zeros(c.bags, c.columns, dtype=torch.float64).index_add(0, bag, factors * rows)
    of_weight = torch.zeros(c.rows, c.columns, dtype=torch.float64).index_add(0, flat, factors * vectors)
    exact_scores = (rows * vectors).sum(1).reshape(c.bags, c.length)
    assert_summed(scores, exact_scores, "scores", max(1, c.columns) * largest(h, t.weight), t.is_exact)
    if "h" in c.needs:
        got = grads.pop(0)
        assert_summed(got, of_h, "gradient of h", max(1, c.length) * largest(grad, t.weight), t.is_exact)
    if "w" in c.needs:
        if grads[0].is_sparse:
            assert torch.equal(grads[0].indices()[0], flat.unique()), "rows of the sparse gradient"
        got = grads[0].to_dense() if grads[0].is_sparse else grads[0]
        assert_summed(got, of_weight, "gradient of weight", t.uses_of_rows() * largest(grad, h), t.is_exact)
    if c.again:
        torch.set_num_threads(c.threads % 4 + 1)
        again = run()
        torch.set_num_threads(c.threads)
        assert_same_bits(run(), again, ("scores", "gradient", "gradient"))


# --- Running ---------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[float, Callable[[random.Random], Case], Callable[[SimpleNamespace], None]]] = {
    "layers": (30, draw_layers, check_layers),
    "cells": (10, draw_cells, check_cells),
    "frozen": (15, draw_frozen, check_frozen),
    "raw_recurrent": (15, draw_raw_recurrent, check_raw_recurrent),
    "bags": (25, draw_bags, check_bags),
    "optimizers": (8, draw_optimizers, check_optimizers),
    "raw_bags": (12, draw_raw_bags, check_raw_bags),
    "dots": (6, draw_dots, check_dots),
}


def draw(seed: int, number: int, families: Sequence[str] = tuple(FAMILIES)) -> tuple[str, Case]:
    """A case by its number in the run of that seed."""
    rng = random.Random(f"{seed} {number}")
    family = rng.choices(families, [FAMILIES[name][0] for name in families])[0]
    return family, FAMILIES[family][1](rng)


def check(family: str, case: Case) -> None:
    """Run a case; raise an AssertionError, or whatever else went wrong."""
    threads = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        FAMILIES[family][2](SimpleNamespace(**case))
    finally:
        torch.set_num_threads(threads)


SIMPLER: Case = {
    "threads": 1, "layers": 1, "directions": 1, "proj": 0, "bias": False, "layout": "contiguous", "special": "",
    "batch_first": False, "form": "padded", "states": True, "sequence": False, "function": False, "dropout": 0.0,
    "needs": "", "gets": "y", "again": False, "mask": False, "freq": False, "weighted": False, "padding": "none",
    "include_last": False, "tail": 0, "max_norm": 0.0, "norm_type": 2.0, "sparse": False, "ids": "int64",
    "offsets": "int64", "spread": "one", "values": "eighths", "dtype": "float32", "calls": 1, "passes": 1, "scale": 0.7,
    "copied": "", "alone": False, "is_cell": False,
}  # fmt: skip
SIZES = ("steps", "batch", "inputs", "hidden", "rows", "columns", "uses", "bags", "length")


def made_smaller(family: str, case: Case, fails: Callable[[str, Case], bool], seconds: float) -> Case:
    """A simpler case that fails as well."""
    until = time.monotonic() + seconds
    changed = True
    while changed:
        changed = False
        options: list[Case] = [{k: v} for k, v in SIMPLER.items() if k in case and case[k] != v]
        if family in ("bags", "optimizers", "raw_bags"):
            options = [{"form": "2d"} if option == {"form": "padded"} else option for option in options]
        for name in SIZES:
            if case.get(name, 0) > 1:
                options += [{name: n} for n in (1, case[name] // 2, case[name] - 1)]
        for option in options:
            if time.monotonic() > until:
                return case
            smaller = case | option
            if smaller != case and smaller.get("proj", 0) < smaller.get("hidden", 1) and fails(family, smaller):
                case, changed = smaller, True
    return case


def has_failed(family: str, case: Case) -> str:
    """What is wrong with a case, or nothing."""
    try:
        check(family, case)
    except Exception:
        return traceback.format_exc()
    return ""


def describe(seed: int, number: int, family: str, case: Case, what: str) -> str:
    return (
        f"\n# seed {seed}, case {number}: {what.rstrip().splitlines()[-1]}\n"
        "import sys; sys.path.insert(0, 'tests')\n"
        f"import test_fuzz; test_fuzz.check({family!r}, {case})\n"
        f"# or: python tests/test_fuzz.py --seed {seed} --case {number}\n"
    )


def work(args: argparse.Namespace) -> None:
    """A worker: runs every args.jobs-th case, and keeps the number of the current one in a file."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is full of NaN, as conftest.py has it
    until = time.monotonic() + args.seconds
    number = args.start
    at = os.open(args.at, os.O_WRONLY)
    failures = 0
    while number < args.cases and time.monotonic() < until and failures < args.failures:
        os.pwrite(at, b"%20d" % number, 0)
        family, case = draw(args.seed, number, args.families)
        if what := has_failed(family, case):
            failures += 1
            case = made_smaller(family, case, lambda f, c: bool(has_failed(f, c)), 5.0)
            smaller = has_failed(family, case) or what
            print(smaller, describe(args.seed, number, family, case, smaller), sep="", flush=True)
        number += args.jobs
    os.pwrite(at, b"%20d%20d" % (number, failures), 0)


class Worker:
    """A worker process and what has become of it."""

    def __init__(self, args: argparse.Namespace, start: int, until: float) -> None:
        self.file = tempfile.NamedTemporaryFile()  # noqa: SIM115 (both live as long as the worker)
        self.file.write(b"%20d" % start)
        self.file.flush()
        self.start, self.last, self.since = start, start, time.monotonic()
        self.error = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-W", "ignore", __file__, "--work", "--at", self.file.name, "--start", str(start)]
        for name in ("seed", "cases", "jobs", "failures"):
            command += [f"--{name}", str(getattr(args, name))]
        command += ["--seconds", str(max(0.0, until - time.monotonic())), "--families", *args.families]
        # Threads that wait leave the core to those of the other workers.
        self.process = subprocess.Popen(command, stderr=self.error, env={"OMP_WAIT_POLICY": "passive", **os.environ})

    def numbers(self) -> tuple[int, int]:
        """The current case, or the first that was not run, and how many have failed, once it has ended."""
        text = Path(self.file.name).read_bytes().decode()
        return int(text[:20]), int(text[20:] or 0)

    def is_stuck(self, seconds: float) -> bool:
        number, _ = self.numbers()
        if number != self.last:
            self.last, self.since = number, time.monotonic()
        return time.monotonic() - self.since > seconds


def run(args: argparse.Namespace) -> int:
    """Runs cases in args.jobs processes; returns how many failed."""
    started = time.monotonic()
    until = started + args.seconds
    print(f"fuzzing with seed {args.seed}", flush=True)
    workers = [Worker(args, job, until) for job in range(min(args.jobs, args.cases))]
    tried, failures = 0, 0
    while workers:
        time.sleep(0.05)
        for worker in list(workers):
            ended = worker.process.poll() is not None
            stuck = not ended and worker.is_stuck(args.patience)
            if not ended and not stuck:
                continue
            if stuck:
                worker.process.kill()
                worker.process.wait()
            number, failed = worker.numbers()
            tried += (number - worker.start) // args.jobs
            failures += failed
            workers.remove(worker)
            worker.error.seek(0)
            said = worker.error.read()
            if worker.process.returncode == 0:
                sys.stderr.write(said)
                continue
            failures, tried = failures + 1, tried + 1
            code = worker.process.returncode
            what = f"took more than {args.patience:g} s" if stuck else f"ended the process: {code}"
            print(said[-6000:], describe(args.seed, number, *draw(args.seed, number, args.families), what), sep="",
                  flush=True)  # fmt: skip
            if failures < args.failures and number + args.jobs < args.cases and time.monotonic() < until:
                workers.append(Worker(args, number + args.jobs, until))
    seconds = time.monotonic() - started
    print(f"{tried:,} inputs in {seconds:.0f} s ({tried / seconds:.0f} a second), seed {args.seed}: {failures} failed",
          flush=True)  # fmt: skip
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="how long (2)")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=int, help="how many inputs, however long it takes")
    parser.add_argument("--seed", type=int, help="of a run to repeat")
    parser.add_argument("--case", type=int, help="only this one, in this process")
    parser.add_argument("--families", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES), help="only of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--failures", type=int, default=10, help="how many to find before it stops")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds that one input may take")
    # Of a worker: that it is one, the file to tell its case's number in, and the first case.
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--at", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(10**9)
    if args.seconds is None:
        args.seconds = 60 * args.minutes if args.minutes else math.inf if args.cases else 120.0
    if args.cases is None:
        args.cases = 10**12
    if args.work:
        work(args)
    elif args.case is not None:
        family, case = draw(args.seed, args.case, args.families)
        print(describe(args.seed, args.case, family, case, "this input"), flush=True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        check(family, case)
        print("passed")
    else:
        sys.exit(run(args) > 0)


@pytest.mark.skipif("config.getoption('emulated_cuda')", reason="its workers run the kernels of csrc/cpu")
def test_fuzz(capsys: pytest.CaptureFixture[str]) -> None:
    """Two minutes of new inputs, or as many seconds as NLPKERNELS_FUZZ_SECONDS says."""
    seconds = os.environ.get("NLPKERNELS_FUZZ_SECONDS", "120")
    result = subprocess.run(
        [sys.executable, __file__, "--seconds", seconds], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with capsys.disabled():
        print(f"\n{result.stdout.splitlines()[-1]}" if result.stdout else "")
    assert result.returncode == 0, result.stdout


if __name__ == "__main__":
    main()
