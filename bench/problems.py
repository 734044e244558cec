"""A workload made concrete: its data and parameters, what a right answer is, and how much work it takes.

Every provider gets the same tensors and returns the same named results, whichever way it runs.
"""

from __future__ import annotations

import functools
import io
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .workloads import DENSE_MODES, RNNS, SPARSE_MODES, Workload, draw_indices, draw_lengths

Results = dict[str, Tensor]
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
PADDING = 0  # the row of padding_idx
BATCHES = 64  # of indices, which take turns
RATE = 0.1  # of the optimizers in modes with whole steps
# With torch's eps the first step of Adam and Adagrad goes by a gradient's sign, which rounding decides where it is
# about 0. With this one every right result is near the others, for the same work.
EPS = 1e-4
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "update": torch.optim.SGD,
    "dense-sgd": torch.optim.SGD,
    "dense-adam": functools.partial(torch.optim.Adam, eps=EPS),
    "sparse-sgd": torch.optim.SGD,
    "sparse-adam": functools.partial(torch.optim.SparseAdam, eps=EPS),
    "sparse-adagrad": functools.partial(torch.optim.Adagrad, eps=EPS),
}
STATES = {"dense-adam": 2, "sparse-adam": 2, "sparse-adagrad": 1}  # tensors of the table's size that they keep


class WrongResult(Exception):
    """What a provider computed is not what the equations say."""


@dataclass(frozen=True)
class Case:
    """One thing to measure: a workload, and how it runs."""

    workload: Workload
    cell: str
    mode: str
    dtype: torch.dtype
    device: str
    threads: int
    graph: bool = False

    @property
    def train(self) -> bool:
        return self.mode != "inference"


@dataclass(frozen=True)
class Bound:
    """A module with its inputs: `call` is what is timed, `results` names what a call returned.

    A call is given one of the `batches`, where there are any. They take turns, as in training: of one batch over and
    over the rows would be in a cache and the branches known. Right results are known of the first one.
    """

    call: Callable[..., Any]
    results: Callable[[Any], Results]
    batches: Sequence[tuple[Any, ...]] = ((),)

    def first(self) -> Any:
        """What a call with the first batch returns."""
        return self.call(*self.batches[0])

    def in_turn(self) -> Callable[[], Any]:
        """A call that has the next batch each time, the first after the last."""
        if len(self.batches) == 1:
            return functools.partial(self.call, *self.batches[0])
        call, turns = self.call, itertools.cycle(self.batches)
        return lambda: call(*next(turns))


class Problem(ABC):
    """The data of a case. Threads do not matter here, so that one problem serves all thread counts."""

    def __init__(self, case: Case) -> None:
        self.workload, self.cell, self.mode, self.train = case.workload, case.cell, case.mode, case.train
        self.dtype, self.device = case.dtype, case.device
        self.rng = np.random.default_rng(0)
        self.generator = torch.Generator(self.device).manual_seed(0)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).mul_(scale).to(self.dtype)

    @functools.cached_property
    def reference(self) -> Results:
        """The results in float64, from torch.nn: computed once, with every thread that torch was left with."""
        with torch.inference_mode(not self.train):
            bound = self.bind(self.module(torch.nn, torch.float64))
            return {name: value.detach() for name, value in bound.results(bound.first()).items()}

    @abstractmethod
    def module(self, library: ModuleType, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """The layer of `library`, which speaks torch.nn's dialect, with this problem's parameters."""

    @abstractmethod
    def bind(self, module: torch.nn.Module, run: Callable[..., Any] | None = None) -> Bound:
        """`module` with this problem's inputs; `run` is what is called in its stead, such as its compiled form."""

    @abstractmethod
    def onnx(self) -> tuple[bytes, list[dict[str, np.ndarray]], list[str]]:
        """The model that torch.onnx makes of torch.nn's, with its inputs for each batch, and its outputs' names."""

    @abstractmethod
    def onnx_results(self, outputs: list[np.ndarray]) -> Results:
        """Names for what that model returned."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """Multiplications and additions that the equations ask for."""

    @property
    @abstractmethod
    def traffic(self) -> int:
        """Bytes that must be moved when each tensor that goes in or comes out is touched once: a lower bound."""

    @staticmethod
    @abstractmethod
    def memory(case: Case) -> int:
        """About how many bytes a run of the case takes, reference included."""


def export(model: torch.nn.Module, inputs: dict[str, Tensor], outputs: list[str]) -> bytes:
    """An ONNX model as bytes. The tracing exporter keeps a layer one node, which is what every runtime runs best."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"input_names": list(inputs), "output_names": outputs, "opset_version": 17}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), tuple(inputs.values()), buffer, dynamo=False, **options)
    return buffer.getvalue()


class _Flat(torch.nn.Module):
    """A recurrent layer whose inputs and outputs are plain padded tensors, for export."""

    def __init__(self, layer: torch.nn.Module, ragged: bool) -> None:
        super().__init__()
        self.layer, self.ragged = layer, ragged

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        if self.ragged:
            output, state = self.layer(pack_padded_sequence(x, others[0]))
            return (pad_packed_sequence(output)[0], *flat(state))
        state = None if not others else others[0] if len(others) == 1 else others
        return tuple(flat(self.layer(x, state)))


def flat(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, a PackedSequence counting as its data."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in flat(item)]


class SequenceProblem(Problem):
    """A recurrent layer over whole sequences, or one step of a cell."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        work = self.workload
        self.is_cell = work.kind == "cell"
        self.lengths = torch.full((work.B,), work.T)
        if work.ragged:
            self.lengths = torch.from_numpy(draw_lengths(work.B, work.T, self.rng))
        self.steps = int(self.lengths.sum())  # of all sequences together
        x = self.random(work.B, work.I) if self.is_cell else self.random(work.T, work.B, work.I)
        self.packed: PackedSequence | None = None
        self.padded = x
        if work.ragged:
            self.packed = pack_padded_sequence(x, self.lengths)
            x = self.packed.data
        self.x = x
        state = (work.B, work.H) if self.is_cell else (work.layers * work.directions, work.B, work.H)
        count = (2 if self.cell == "lstm" else 1) if self.is_cell or work.state else 0
        self.state = [self.random(*state, scale=0.5) for _ in range(count)]
        self.output_shape = state if self.is_cell else (*x.shape[:-1], work.directions * work.H)
        self.gradient = self.random(*self.output_shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            template = self._build(torch.nn)
        self.parameters = {name: value.detach() for name, value in template.to(self.dtype).state_dict().items()}

    def _build(self, library: ModuleType) -> torch.nn.Module:
        work = self.workload
        if self.is_cell:
            return getattr(library, self.cell.upper() + "Cell")(work.I, work.H, device=self.device)
        options = {"num_layers": work.layers, "bidirectional": work.directions == 2, "device": self.device}
        return getattr(library, self.cell.upper())(work.I, work.H, **options)

    def module(self, library: ModuleType, dtype: torch.dtype | None = None) -> torch.nn.Module:
        module = self._build(library).to(dtype or self.dtype)
        module.load_state_dict(self.parameters)
        return module.train(self.train).requires_grad_(self.train)

    def bind(self, module: torch.nn.Module, run: Callable[..., Any] | None = None) -> Bound:
        run = module if run is None else run  # a compiled module has a truth value of its own, and it raises
        dtype = next(module.parameters()).dtype

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_(self.train)

        x, state, gradient = leaf(self.x), [leaf(tensor) for tensor in self.state], self.gradient.to(dtype)
        initial = None if not state else state[0] if len(state) == 1 else tuple(state)
        leaves = {"grad x": x, **{f"grad state {i}": value for i, value in enumerate(state)}}
        leaves |= {f"grad {name}": value for name, value in module.named_parameters()}
        wanted = list(leaves.values())
        packed = self.packed

        def forward() -> Any:
            if packed is None:
                return run(x, initial)
            return run(PackedSequence(x, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices))

        def step() -> Any:
            output = forward()
            first = output if isinstance(output, Tensor) else output[0]
            first = first.data if packed is not None else first
            return output, torch.autograd.grad(first, wanted, gradient)

        def results(value: Any) -> Results:
            output, gradients = value if self.train else (value, ())
            return self._named(flat(output)) | dict(zip(leaves, gradients, strict=self.train))

        return Bound(step if self.train else forward, results)

    def _named(self, outputs: list[Tensor]) -> Results:
        names = ("h", "c") if self.is_cell else ("y", "h", "c")
        return dict(zip(names, outputs, strict=False))

    def onnx(self) -> tuple[bytes, list[dict[str, np.ndarray]], list[str]]:
        return self._onnx

    @functools.cached_property
    def _onnx(self) -> tuple[bytes, list[dict[str, np.ndarray]], list[str]]:
        inputs = {"x": self.padded}
        inputs |= {"lengths": self.lengths} if self.packed else {f"s{i}": value for i, value in enumerate(self.state)}
        count = (0 if self.is_cell else 1) + (2 if self.cell == "lstm" else 1)
        outputs = [f"o{i}" for i in range(count)]
        model = export(_Flat(self.module(torch.nn), self.packed is not None), inputs, outputs)
        return model, [{name: value.numpy() for name, value in inputs.items()}], outputs

    def onnx_results(self, outputs: list[np.ndarray]) -> Results:
        tensors = [torch.from_numpy(np.asarray(output)) for output in outputs]
        if self.packed is not None:
            tensors[0] = pack_padded_sequence(tensors[0], self.lengths).data
        return self._named(tensors)

    @property
    def flops(self) -> int:
        work, gates = self.workload, GATES[self.cell]
        inputs = work.I + (work.layers - 1) * work.directions * work.H
        per_step = 2 * gates * work.H * (inputs + work.layers * work.H) * work.directions
        return self.steps * per_step * (3 if self.train else 1)  # two products backward for each one forward

    @property
    def traffic(self) -> int:
        once = sum(value.nbytes for value in self.parameters.values()) + self.x.nbytes + self.gradient.nbytes
        once += 2 * sum(value.nbytes for value in self.state)
        return once * (3 if self.train else 1)  # read forward, read backward, and a gradient of each

    @staticmethod
    def memory(case: Case) -> int:
        work, gates = case.workload, GATES[case.cell]
        hidden = work.T * work.B * work.H * work.layers * work.directions
        parameters = (
            gates * work.H * (work.I + work.H * (1 + (work.layers - 1) * (1 + work.directions))) * work.directions
        )
        per_value = (gates + 4) if case.train else 3
        return 16 * (hidden * per_value + work.T * work.B * work.I + 3 * parameters)  # float64 and one more alive


class MeanOfEmbedding(torch.nn.Module):
    """What people write in place of EmbeddingBag: look every index up, then take the mean over what is no padding."""

    def __init__(self, embedding: torch.nn.Module, masked: bool) -> None:
        super().__init__()
        self.embedding, self.masked = embedding, masked

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embedding(x)
        if not self.masked:
            return rows.mean(1)
        return rows.sum(1) / (x != PADDING).sum(1, keepdim=True)


@dataclass(frozen=True)
class Batch:
    """The indices of some bags."""

    matrix: Tensor  # [B, L], short bags filled up with row 0
    flat: Tensor  # the same without the filling
    offsets: Tensor


class PoolProblem(Problem):
    """The mean of some rows of a table, for each bag: EmbeddingBag, or Embedding and a mean."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        work = self.workload
        self.masked = work.padding or work.ragged
        table = torch.empty(work.V, work.D, dtype=self.dtype, device=self.device)
        step = max(1, (1 << 24) // work.D)  # in blocks, or a table of gigabytes would need twice its room
        for start in range(0, work.V, step):
            rows = table[start : start + step]
            rows.copy_(self.random(*rows.shape))
        table[PADDING] = 0
        self.table = table
        # All batches have bags of the same lengths, in an order of their own: the same work.
        lengths = draw_lengths(work.B, work.L, self.rng) if self.masked else np.full(work.B, work.L)
        drawn = draw_indices(work, BATCHES * work.B * work.L, self.rng).reshape(BATCHES, work.B, work.L)
        self.batches = [self._batch(matrix, self.rng.permutation(lengths)) for matrix in drawn]
        self.flat = self.batches[0].flat
        self.gradient = self.random(work.B, work.D)
        # The reference needs the rows that are touched and no others: gigabytes of float64 otherwise.
        self.touched = torch.unique(torch.cat([self.flat, self.flat.new_zeros(1)]))

    def _batch(self, matrix: np.ndarray, lengths: np.ndarray) -> Batch:
        kept = np.arange(self.workload.L) < lengths[:, None]
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        arrays = (np.where(kept, matrix, PADDING), matrix[kept], offsets)
        return Batch(*(torch.from_numpy(array).to(self.device) for array in arrays))

    def module(self, library: ModuleType, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """With dtype given, a layer over the touched rows alone."""
        kind = library.Embedding if self.workload.kind == "embedding" else library.EmbeddingBag
        return self.layer(kind, self.table if dtype is None else self.table[self.touched].to(dtype))

    def layer(self, kind: Any, table: Tensor, sparse: bool | None = None) -> torch.nn.Module:
        """Where it is updated over a copy of the table; the mode says which gradients it has, unless told."""
        sparse = self.mode in ("update", *SPARSE_MODES) if sparse is None else sparse
        options: dict[str, Any] = {"freeze": not self.train, "sparse": sparse}
        table = table.clone() if self.mode in OPTIMIZERS else table
        idiom = kind.__name__ == "Embedding"
        if self.workload.padding or (idiom and self.masked):
            options["padding_idx"] = PADDING
        layer = kind.from_pretrained(table, **options) if idiom else kind.from_pretrained(table, mode="mean", **options)
        return (MeanOfEmbedding(layer, self.masked) if idiom else layer).train(self.train)

    def bind(
        self,
        module: torch.nn.Module,
        run: Callable[..., Any] | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    ) -> Bound:
        """In modes with a whole step, right is how the rows in use are after the first one, made by `optimizer`."""
        run = module if run is None else run  # a compiled module has a truth value of its own, and it raises
        weight = next(module.parameters())
        compact = weight.shape[0] != self.workload.V
        offsets = self.workload.ragged and not isinstance(module, MeanOfEmbedding)
        batches = [(batch.flat, batch.offsets) if offsets else (batch.matrix,) for batch in self.batches]
        if compact:
            batches = [(torch.searchsorted(self.touched, batches[0][0]), *batches[0][1:])]
        gradient = self.gradient.to(weight.dtype)

        def step(*inputs: Tensor) -> Any:
            output = run(*inputs)
            return output, torch.autograd.grad(output, weight, gradient)

        if self.mode in OPTIMIZERS:
            steps = (optimizer or OPTIMIZERS[self.mode])(module.parameters(), lr=RATE)

            def update(*inputs: Tensor) -> Any:
                steps.zero_grad()
                output = run(*inputs)
                output.backward(gradient)
                steps.step()
                return output

            def updated(output: Any) -> Results:
                steps.zero_grad()  # or the next call would take no memory for its own
                return {"y": output, "rows after": weight if compact else self.rows_after(weight)}

            return Bound(update, updated, batches)

        def results(value: Any) -> Results:
            if not self.train:
                return {"y": value}
            output, (found,) = value
            return {"y": output, "grad weight": found if compact else self.rows(found)}

        return Bound(step if self.train else run, results, batches)

    @torch.no_grad()
    def rows_after(self, table: Tensor) -> Tensor:
        """The touched rows of a table after a step, after making sure that all others are as they were."""
        rows = table[self.touched]
        table[self.touched] = self.table[self.touched]  # for a comparison that takes no memory
        if not torch.equal(table, self.table):
            raise WrongResult("the step changed rows that no index touched")
        table[self.touched] = rows
        return rows

    def rows(self, gradient: Tensor) -> Tensor:
        """The touched rows of a gradient, after making sure that all others are zero."""
        rows = gradient.index_select(0, self.touched)
        if int(gradient.count_nonzero()) != int(rows.count_nonzero()):
            raise WrongResult("the gradient is not zero in rows that no index touched")
        return rows

    def onnx(self) -> tuple[bytes, list[dict[str, np.ndarray]], list[str]]:
        return self._onnx

    @functools.cached_property
    def _onnx(self) -> tuple[bytes, list[dict[str, np.ndarray]], list[str]]:
        masked = self.masked

        class Model(torch.nn.Module):
            """The table is an input: a model file cannot hold more than two gigabytes."""

            def forward(self, table: Tensor, x: Tensor) -> Tensor:
                rows = torch.nn.functional.embedding(x, table)
                return rows.sum(1) / (x != PADDING).sum(1, keepdim=True) if masked else rows.mean(1)

        table = self.table.numpy()
        inputs = [{"table": table, "x": batch.matrix.numpy()} for batch in self.batches]
        return export(Model(), {"table": self.table, "x": self.batches[0].matrix}, ["y"]), inputs, ["y"]

    def onnx_results(self, outputs: list[np.ndarray]) -> Results:
        return {"y": torch.from_numpy(np.asarray(outputs[0]))}

    @property
    def flops(self) -> int:
        return len(self.flat) * self.workload.D * (2 if self.train else 1)

    @property
    def traffic(self) -> int:
        size, columns = self.table.element_size(), self.workload.D
        touched = len(self.touched) * columns * size
        forward = touched + self.flat.nbytes + self.gradient.nbytes
        if self.mode == "inference":
            return forward
        backward = self.flat.nbytes + self.gradient.nbytes
        states = STATES.get(self.mode, 0)
        if self.mode in DENSE_MODES:  # the gradient is filled and read, table and states read and written
            return forward + backward + (4 + 2 * states) * self.table.nbytes
        if self.mode in OPTIMIZERS:
            return forward + backward + (1 + 2 * states) * touched
        return forward + backward + self.table.nbytes

    @staticmethod
    def memory(case: Case) -> int:
        work, size = case.workload, case.dtype.itemsize
        table = work.V * work.D * size
        gathered = work.B * work.L * work.D * (size + 8)
        indices = 2 * BATCHES * work.B * work.L * 8
        tables, states = {"train": 3, "update": 5}.get(case.mode, 1), STATES.get(case.mode, 0)
        if case.mode in SPARSE_MODES:  # the problem's, and one with its states for each of three providers
            tables = 1 + 3 * (1 + states)
        if case.mode in DENSE_MODES:  # two providers, each with a gradient; and what Adam computes in between
            tables = 1 + 2 * (2 + states) + states
        return table * tables + 2 * gathered + indices + work.V * 16


def make_problem(case: Case) -> Problem:
    return problem_type(case)(case)


def problem_type(case: Case) -> type[Problem]:
    return SequenceProblem if case.cell in RNNS else PoolProblem
