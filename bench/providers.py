"""Who is measured. Each provider turns a problem into a call, the way that suits it best, or says why it can't."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .problems import Bound, Case, PoolProblem, Problem, Results
from .workloads import DENSE_MODES, SPARSE_MODES

OURS = "nlpkernels"


class Missing(Exception):
    """The provider isn't installed, or can't be loaded."""


class Unsupported(Exception):
    """The provider is there, but doesn't do this case."""


@dataclass(frozen=True)
class Prepared(Bound):
    """A provider ready to run. `alone` gives a call that finds nothing kept from an earlier one, to measure memory."""

    alone: Callable[[], Callable[[], Any]] | None = None


Provider = Callable[[Problem, Case], Prepared]


def load(name: str) -> ModuleType:
    """An optional package, or Missing with the reason."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Missing(f"{error.name or name} is not installed") from error
    except Exception as error:  # a package built for another torch fails in ways of its own
        raise Missing(f"{name} does not import ({type(error).__name__}: {error})") from error


def _prepared(bound: Bound) -> Prepared:
    return Prepared(bound.call, bound.results, bound.batches)


def nlpkernels(problem: Problem, case: Case) -> Prepared:
    if case.mode == "update":
        assert isinstance(problem, PoolProblem)
        library = load("nlpkernels")
        return _prepared(problem.bind(problem.module(library), optimizer=library.optim.SGD))
    return _prepared(problem.bind(problem.module(load("nlpkernels"))))


def torch_eager(problem: Problem, case: Case) -> Prepared:
    return _prepared(problem.bind(problem.module(torch.nn)))


def dense(problem: Problem, case: Case) -> Prepared:
    """A training step with SGD whose gradient is dense, which is what torch's layers give unless told otherwise."""
    assert isinstance(problem, PoolProblem)
    return _prepared(problem.bind(problem.layer(torch.nn.EmbeddingBag, problem.table, sparse=False)))


def _compiled(problem: Problem, module: torch.nn.Module) -> Prepared:
    load("torch._inductor")
    torch._dynamo.reset()  # each model starts afresh: past ones would count against the limit of recompilations
    return _prepared(problem.bind(module, torch.compile(module)))


@functools.cache
def _traces(layer: str) -> bool:
    """Whether Dynamo makes a graph of a recurrent layer, asked of a tiny one. Where it doesn't, it runs torch.nn's."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compile(getattr(torch.nn, layer)(2, 2), backend=backend)(torch.zeros(1, 1, 2))
    return bool(graphs)


def torch_compile(problem: Problem, case: Case) -> Prepared:
    layer = case.cell.upper()
    if case.workload.kind == "sequence" and not _traces(layer):
        raise Unsupported(f"Dynamo does not trace into torch.nn.{layer}: it would run torch.nn again")
    return _compiled(problem, problem.module(torch.nn))


def _idiom(problem: Problem) -> torch.nn.Module:
    assert isinstance(problem, PoolProblem)
    return problem.layer(torch.nn.Embedding, problem.table)


def idiom(problem: Problem, case: Case) -> Prepared:
    return _prepared(problem.bind(_idiom(problem)))


def idiom_compile(problem: Problem, case: Case) -> Prepared:
    return _compiled(problem, _idiom(problem))


def _check_runtime(case: Case) -> None:
    """What holds for both inference runtimes."""
    if case.train:
        raise Unsupported("inference only")
    if case.device != "cpu":
        raise Unsupported("measured on CPU only")
    if case.dtype != torch.float32:
        raise Unsupported("measured in float32 only")


def frozen(problem: Problem, case: Case, dtype: torch.dtype) -> Prepared:
    """torch.nn's layer, frozen by nlpkernels with weights of that dtype."""
    load("nlpkernels.frozen")
    _check_runtime(case)
    layer = problem.module(torch.nn)
    model = torch.nn.Sequential(copy.deepcopy(layer))
    load("nlpkernels").freeze(model, dtype=dtype)
    return _prepared(problem.bind(layer, model[0]))


def torch_int8(problem: Problem, case: Case) -> Prepared:
    """torch.nn's layer with weights of eight bits, as torch makes it, for inputs that are rounded as they come."""
    quantization = load("torch.ao.quantization")
    _check_runtime(case)
    layer = problem.module(torch.nn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchao is to replace it
        model = quantization.quantize_dynamic(torch.nn.Sequential(layer))
    if type(model[0]) is type(layer):
        raise Unsupported(f"does not quantise {type(layer).__name__}")
    return _prepared(problem.bind(layer, model[0]))


def _of_eight_bits(model: bytes) -> bytes:
    """The ONNX model with weights of eight bits, as ONNX Runtime makes it, for inputs that are rounded as they come."""
    onnx, quantization = load("onnx"), load("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantization.quantize_dynamic(onnx.load_from_string(model), path, weight_type=quantization.QuantType.QInt8)
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        if layers := kinds & {"GRU", "RNN", "LSTM"}:
            raise Unsupported(f"does not quantise {', '.join(layers)}")
        return path.read_bytes()


def onnxruntime(problem: Problem, case: Case, eight_bits: bool = False) -> Prepared:
    runtime = load("onnxruntime")
    _check_runtime(case)
    model, batches, outputs = problem.onnx()
    if eight_bits:
        model = _of_eight_bits(model)

    def session(arena: bool) -> Any:
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = arena
        # Its threads spin while a call lasts, and stop with it: else they would take the next provider's cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def bound_to(made: Any, batch: dict[str, np.ndarray]) -> Any:
        binding = made.io_binding()
        for name, value in batch.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in outputs:
            binding.bind_output(name)
        return binding

    def alone() -> Callable[[], Any]:
        made = session(arena=False)  # the arena is faster, but keeps what a call took, and so would hide it
        binding = bound_to(made, batches[0])
        made.run_with_iobinding(binding)
        return lambda: made.run_with_iobinding(binding)

    made = session(arena=True)

    def call(binding: Any) -> Any:
        made.run_with_iobinding(binding)
        return binding

    def results(binding: Any) -> Results:
        return problem.onnx_results(binding.copy_outputs_to_cpu())

    return Prepared(call, results, [(bound_to(made, batch),) for batch in batches], alone)


def openvino(problem: Problem, case: Case) -> Prepared:
    runtime = load("openvino")
    _check_runtime(case)
    model, batches, outputs = problem.onnx()
    core = runtime.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": case.threads,
        "INFERENCE_PRECISION_HINT": "f32",  # it would take bfloat16 where the processor has it: not the same work
        "ENABLE_CPU_PINNING": False,  # pinned threads would not make way for the other providers'
    }
    compiled = core.compile_model(core.read_model(io.BytesIO(model)), "CPU", settings)
    request = compiled.create_infer_request()

    def tensors(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return {name: runtime.Tensor(np.ascontiguousarray(value), shared_memory=True) for name, value in batch.items()}

    def call(batch: dict[str, Any]) -> Any:
        for name, value in batch.items():
            request.set_tensor(name, value)
        return request.infer(share_outputs=True)

    def alone() -> Callable[[], Any]:
        compiled.release_memory()
        return lambda: call(given[0])

    def results(_: Any) -> Results:
        return problem.onnx_results([request.get_tensor(name).data for name in outputs])

    given = [tensors(batch) for batch in batches]
    return Prepared(call, results, [(batch,) for batch in given], alone)


def fbgemm(problem: Problem, case: Case) -> Prepared:
    """FBGEMM's pooled embeddings on CPU: the inference operator, and the one with a dense gradient."""
    load("fbgemm_gpu")
    training = load("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    inference = load("fbgemm_gpu.split_table_batched_embeddings_ops_inference")
    common = load("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    configs = load("fbgemm_gpu.split_embedding_configs")
    assert isinstance(problem, PoolProblem)
    if case.device != "cpu":
        raise Unsupported("its CPU wheel is measured on CPU only")
    if case.dtype != torch.float32:
        raise Unsupported("measured in float32 only")
    if case.mode == "update":
        raise Unsupported(
            "measured with a dense gradient only: its sparse path updates the table and returns no gradient"
        )
    rows, columns = problem.table.shape
    if columns % 4:
        raise Unsupported("needs a width that is a multiple of 4")
    batches = [(b.flat, torch.cat([b.offsets, b.offsets.new_tensor([len(b.flat)])])) for b in problem.batches]
    if case.mode == "inference":
        kind, place = configs.SparseType.FP32, common.EmbeddingLocation.HOST
        layer = inference.IntNBitTableBatchedEmbeddingBagsCodegen(
            [("", rows, columns, kind, place)],
            pooling_mode=common.PoolingMode.MEAN,
            output_dtype=kind,
            device="cpu",
            weight_lists=[(problem.table.view(torch.uint8).reshape(rows, -1), None)],
        )
        batches = [(indices.int(), ends.int()) for indices, ends in batches]  # it has no other kernel
        return Prepared(layer, lambda output: {"y": output.float()}, batches)
    table = training.DenseTableBatchedEmbeddingBagsCodegen(
        [(rows, columns)], pooling_mode=common.PoolingMode.MEAN, use_cpu=True
    )
    with torch.no_grad():
        table.weights.copy_(problem.table.flatten())

    def step(indices: Tensor, ends: Tensor) -> Any:
        output = table(indices, ends)
        return output, torch.autograd.grad(output, table.weights, problem.gradient)

    def results(value: Any) -> Results:
        return {"y": value[0], "grad weight": problem.rows(value[1][0].view(rows, columns))}

    return Prepared(step, results, batches)


PROVIDERS: dict[str, Provider] = {
    OURS: nlpkernels,
    "torch": torch_eager,
    "dense": dense,
    "compile": torch_compile,
    "idiom": idiom,
    "idiom-compile": idiom_compile,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "fbgemm": fbgemm,
    "nlpkernels-frozen": functools.partial(frozen, dtype=torch.float32),
    "nlpkernels-frozen-bfloat16": functools.partial(frozen, dtype=torch.bfloat16),
    "nlpkernels-frozen-int8": functools.partial(frozen, dtype=torch.int8),
    "torch-int8": torch_int8,
    "onnxruntime-int8": functools.partial(onnxruntime, eight_bits=True),
}
# nlpkernels' frozen layers, and those of others with weights of eight bits: of which dtype these are, whatever that of
# the inputs is. Reports show them apart, for neither is a peer: one is ours, the other does other work.
WEIGHTS = {
    "nlpkernels-frozen": torch.float32,
    "nlpkernels-frozen-bfloat16": torch.bfloat16,
    "nlpkernels-frozen-int8": torch.int8,
    "torch-int8": torch.int8,
    "onnxruntime-int8": torch.int8,
}
PACKAGES = {OURS: "nlpkernels", "onnxruntime": "onnxruntime", "openvino": "openvino", "fbgemm": "fbgemm_gpu"}
PACKAGES |= {name: "nlpkernels.frozen" for name in WEIGHTS if name.startswith(OURS)}
PACKAGES |= {"onnxruntime-int8": "onnxruntime"}
BAG_ONLY = ("idiom", "idiom-compile", "fbgemm")  # an Embedding and a mean: as a subject of its own, that is `torch`

# Who makes a whole step with an optimizer; `dense` does nothing else.
STEPS = {
    "update": (OURS, "torch", "dense", "fbgemm"),
    **dict.fromkeys(DENSE_MODES, (OURS, "torch")),
    **dict.fromkeys(SPARSE_MODES, (OURS, "torch", "idiom")),
}


def concerned(name: str, kind: str, mode: str) -> bool:
    """Whether a provider has anything to do with a kind of layer in a mode."""
    if name in WEIGHTS:
        return mode == "inference" and kind in ("sequence", "cell")
    meant = name in STEPS[mode] if mode in STEPS else name != "dense"
    return meant and (kind == "bag" or name not in BAG_ONLY)


def availability(names: tuple[str, ...]) -> dict[str, str]:
    """For each provider an empty string, or why it is missing: said before a run begins."""
    reasons = {}
    for name in names:
        try:
            if name in PACKAGES:
                load(PACKAGES[name])
            reasons[name] = ""
        except Missing as error:
            reasons[name] = str(error)
    return reasons
