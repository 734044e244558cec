"""The protocol: a wrong result has no time; right ones are timed in turns, round by round, and compared within a round.

A machine drifts: clocks, neighbours, heat. Providers that take turns drift together, so a ratio is taken within each
round, and its median over rounds is what is reported, with the 20 and 80 % quantiles.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import machine
from .problems import Case, Problem, Results, WrongResult
from .providers import OURS, PROVIDERS, WEIGHTS, Missing, Prepared, Provider, Unsupported, concerned
from .workloads import draw_origin

# Far above rounding, far below a mistake, which is of the order of 1. The half types' bounds let torch.nn pass, whose
# gradients round at every step: off by 0.16 after 4000 steps of a GRU in bfloat16. How far off is in every row.
# torch lets cuDNN compute float32 in TF32, with a mantissa of 10 bits.
# Weights of int8 are off by at most 0.4 % of the largest in their row, and results of 0.07 have been seen.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 0.25,
    torch.float16: 0.05,
    torch.int8: 0.15,
}
TOLERANCE_TF32 = 1e-2


@dataclass(frozen=True)
class Effort:
    """How long to measure one case, all its providers together."""

    seconds: float = 0.5
    sample: float = 0.005  # calls are repeated until a sample takes this long
    rounds: int = 5  # at least, unless they take four times the seconds; then three
    most: int = 200


QUICK = Effort(seconds=0.05, sample=0.001, rounds=3, most=5)


@dataclass
class Row:
    """One provider on one case. NaN: not measured."""

    subject: str
    workload: str
    kind: str  # sequence, cell, bag or embedding
    cell: str
    mode: str
    shape: str
    T: int
    B: int
    I: int  # noqa: E741 (the letter of the equations)
    H: int
    layers: int
    directions: int
    ragged: bool
    V: int
    D: int
    L: int
    draw: str
    padding: bool
    dtype: str
    device: str
    threads: int
    clock: str  # wall, events (CUDA) or graph (replay of a CUDA graph)
    provider: str
    status: str = "ok"  # or: missing: why, unsupported: why, wrong: how far off, failed: why, skipped: why
    rounds: int = 0
    calls: int = 0  # in each sample
    median_s: float = float("nan")
    q20_s: float = float("nan")
    q80_s: float = float("nan")
    ratio: float = float("nan")  # this provider's time over nlpkernels': above 1, nlpkernels is faster
    ratio_q20: float = float("nan")
    ratio_q80: float = float("nan")
    flops: int = 0
    bytes: int = 0
    gflops: float = float("nan")
    gbs: float = float("nan")
    floor_gflops: float = float("nan")
    floor_gbs: float = float("nan")  # of copies of this row's size
    share_of_floor: float = float("nan")
    peak_bytes: float = float("nan")  # above the inputs, results included
    error_vs_fp64: float = float("nan")
    busy_elsewhere: float = float("nan")  # the share of all cores that other processes took while this was timed
    machine: str = ""
    cpu: str = ""
    gpu: str = ""
    isa: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20 % quantile, the median and the 80 % quantile."""
    low, middle, high = np.quantile(np.asarray(samples, np.float64), (0.2, 0.5, 0.8))
    return float(low), float(middle), float(high)


def explain(error: BaseException) -> str:
    """One line for a row: published, hence without this machine's folders."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    text = re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", text)
    text = text if isinstance(error, (Missing, Unsupported, WrongResult)) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 200 else text[:199] + "…"


def distance(results: Results, reference: Results) -> float:
    """The largest relative error of any result, in norm or in its worst element; raises where there is none to give."""
    if results.keys() != reference.keys():
        raise WrongResult(f"returned {', '.join(results)} in place of {', '.join(reference)}")
    worst = 0.0
    for name, right in reference.items():
        value = results[name].detach()
        if value.shape != right.shape:
            raise WrongResult(f"{name} has shape {tuple(value.shape)} in place of {tuple(right.shape)}")
        difference = value.to(right.device, torch.float64) - right
        if not bool(difference.isfinite().all()):
            raise WrongResult(f"{name} has values that are not finite")
        for size in (torch.linalg.vector_norm, _largest):
            worst = max(worst, float(size(difference)) / max(float(size(right)), 1e-30))
    return worst


def _largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().max() if x.numel() else x.new_zeros(())


def tolerance(case: Case, provider: str) -> float:
    if case.device == "cuda" and case.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return TOLERANCE_TF32
    return TOLERANCE[WEIGHTS.get(provider, case.dtype)]


def settle(most: float = 0.25) -> None:
    """Waits until no thread of this process is busy: a pool that spins after its work would slow the next provider."""
    end = time.perf_counter() + most
    while time.perf_counter() < end:
        busy = time.process_time()
        time.sleep(0.001)
        if time.process_time() - busy < 0.0003:
            return


class Neighbours:
    """What other processes took of this machine between its making and `share()`: on a busy one, times are noise."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        try:
            import psutil
        except ImportError:
            return float("nan"), 0.0, 0.0
        used = psutil.cpu_times()
        busy = sum(getattr(used, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        return busy, time.process_time(), time.perf_counter() * (psutil.cpu_count() or 1)

    def share(self) -> float:
        busy, own, capacity = (now - start for now, start in zip(self._now(), self.start, strict=True))
        return max(0.0, (busy - own) / capacity) if capacity > 0 else float("nan")


def wall_clock(call: Callable[[], Any], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def cuda_events(call: Callable[[], Any], times: int) -> float:
    """The GPU's own clock, from before the first call to after the last: launches that it waits for count."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


Clock = Callable[[Callable[[], Any], int], float]


def capture(prepared: Prepared) -> Prepared:
    """The same as a CUDA graph: one launch that replays all of a call's, with the first batch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            prepared.first()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = prepared.first()

    def replay() -> Any:
        graph.replay()
        return output

    return Prepared(replay, prepared.results)


def take_turns(
    calls: Mapping[str, Callable[[], Any]], effort: Effort, clock: Clock = wall_clock, settled: bool = True
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per call for each provider and round, and the calls in each sample. A round's order is random."""
    estimates = {name: clock(call, 1) for name, call in calls.items()}
    estimates |= {name: clock(calls[name], 1) for name, estimate in estimates.items() if estimate < 0.02}
    # Memory that was never touched before is slow where a virtual machine's host has to find it: with a gradient of
    # 150 MB it takes up to 8 steps until the same memory comes again.
    spent = sum(estimates.values())
    for _ in range(8):
        if spent < 4 * effort.seconds:
            spent += sum(clock(call, 1) for call in calls.values())
    times = {name: max(1, round(effort.sample / max(estimate, 1e-7))) for name, estimate in estimates.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, rng = list(calls), np.random.default_rng(0)
    begin, rounds = time.perf_counter(), 0

    def more() -> bool:
        spent = time.perf_counter() - begin
        if rounds >= effort.most:
            return False
        return rounds < 3 or spent < effort.seconds or (rounds < effort.rounds and spent < 4 * effort.seconds)

    gc.disable()
    try:
        while more():
            rng.shuffle(order)
            for name in order:
                if settled:
                    settle()
                if estimates[name] < 0.02:  # wakes its threads and brings its data back; long calls don't notice
                    clock(calls[name], 1)
                samples[name].append(clock(calls[name], times[name]))
            rounds += 1
    finally:
        gc.enable()
    return samples, times


def peak_memory(prepared: Prepared, device: str) -> float:
    """Bytes that a call takes above what stood before it, its results included (NaN where that can't be told)."""
    call = prepared.first if prepared.alone is None else prepared.alone()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    # Free memory goes back to the system, then Linux is asked for the high-water mark of what is resident.
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        result = call()
        after = _resident("VmHWM")
        del result
        return float(max(0, after - before))
    except (OSError, AttributeError):
        return float("nan")


def _resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", text)[1])  # type: ignore[index]


def blank_row(case: Case, provider: str, status: str = "ok") -> Row:
    """A row with all that is known before anything has run."""
    work = case.workload
    if work.draw:
        work = replace(work, draw=draw_origin(work))
    shape: dict[str, Any] = {
        field.name: getattr(work, field.name) for field in fields(work) if field.name in Row.__dataclass_fields__
    }
    return Row(
        **shape,
        workload=work.name,
        shape=work.shape,
        cell=case.cell,
        mode=case.mode,
        dtype=str(case.dtype).removeprefix("torch."),
        device=case.device,
        threads=case.threads,
        clock="graph" if case.graph else "events" if case.device == "cuda" else "wall",
        provider=provider,
        status=status,
        **machine.identity(),
    )


def check(prepared: Prepared, reference: Results, allowed: float, row: Row) -> None:
    """Calls once, notes in the row how far off that was, and raises if it was too far."""
    row.error_vs_fp64 = distance(prepared.results(prepared.first()), reference)
    if row.error_vs_fp64 > allowed:
        raise WrongResult(f"off by {row.error_vs_fp64:.1e}, {allowed:.0e} is allowed")


def measure(
    case: Case,
    problem: Problem,
    names: Iterable[str],
    effort: Effort = Effort(),
    floor: machine.Floor | str = "not measured",
    providers: Mapping[str, Provider] = PROVIDERS,
) -> list[Row]:
    """One row for each provider that this kind of layer concerns, whether it could be measured or not."""
    reference = problem.reference
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    rows = {name: blank_row(case, name) for name in names if concerned(name, case.workload.kind, case.mode)}
    ready: dict[str, Prepared] = {}
    gc.collect()
    mode = torch.inference_mode if not case.train else contextlib.nullcontext
    for name, row in rows.items():
        row.flops, row.bytes = problem.flops, problem.traffic
        try:
            prepared = providers[name](problem, case)
            with mode():
                check(prepared, reference, tolerance(case, name), row)
                row.peak_bytes = peak_memory(prepared, case.device)
                if case.graph:
                    prepared = capture(prepared)
                    check(prepared, reference, tolerance(case, name), row)
            ready[name] = prepared
        except (Missing, Unsupported, WrongResult) as error:
            row.status = f"{type(error).__name__.removesuffix('Result').lower()}: {explain(error)}"
        except Exception as error:  # a provider that breaks must not end the run, nor go unmentioned
            row.status = f"failed: {explain(error)}"
    neighbours = Neighbours()
    with mode():
        clock = cuda_events if case.device == "cuda" else wall_clock
        samples, times = take_turns(
            {name: prepared.in_turn() for name, prepared in ready.items()}, effort, clock, case.threads > 1
        )
    busy = neighbours.share()
    for name, taken in samples.items():
        row = rows[name]
        row.busy_elsewhere = busy
        row.rounds, row.calls = len(taken), times[name]
        row.q20_s, row.median_s, row.q80_s = quantiles(taken)
        row.gflops, row.gbs = row.flops / row.median_s / 1e9, row.bytes / row.median_s / 1e9
        if isinstance(floor, machine.Floor):
            row.floor_gflops, row.floor_gbs = floor.flops / 1e9, floor.bandwidth(row.bytes) / 1e9
            row.share_of_floor = floor.seconds(row.flops, row.bytes) / row.median_s
        if OURS in samples:
            within = [mine / ours for mine, ours in zip(taken, samples[OURS], strict=True)]
            row.ratio_q20, row.ratio, row.ratio_q80 = quantiles(within)
    return list(rows.values())


def append_rows(path: Path, rows: Iterable[Any], kind: type = Row) -> None:
    """Rows go to disk as soon as they are there: whoever interrupts a run keeps what is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)])
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(
                {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in asdict(row).items()}
            )
