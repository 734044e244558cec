"""What this machine is, and what it could reach at best: every row of a run carries both."""

from __future__ import annotations

import ctypes
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ("bench/results", "docs/*.png")  # what a run writes is no change of what it measures
VERSIONS = ("nlpkernels", "torch", "onnxruntime", "openvino", "fbgemm-gpu-cpu", "wordfreq")
COPY_SIZES = (1 << 16, 1 << 20, 1 << 24, 1 << 28)  # bytes on both sides: what fits L1, L2, L3, and what fits none


def cores() -> int:
    """Physical cores that this process may use: more threads than that share units and gain nothing here."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import psutil
    except ImportError:
        return allowed
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def free_memory(device: str) -> int:
    """Bytes that can still be had on the device (0: unknown)."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        import psutil
    except ImportError:
        return 0
    return int(psutil.virtual_memory().available)


def version(package: str) -> str:
    """The installed version of a package, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(torch.__version__) if package == "torch" else ""


@functools.cache
def cpu_name() -> str:
    """The processor's own name, never the host's: results are published. With AMD's generation, which it may hide."""
    facts = Path("/proc/cpuinfo")
    found = dict(re.findall(r"^(.+?)\s*:\s*(.+)$", facts.read_text(), re.MULTILINE)) if facts.exists() else {}
    name = found.get("model name", "").strip() or platform.processor() or platform.machine()
    generation = {"25": " (Zen 3 or 4)", "26": " (Zen 5)"}.get(found.get("cpu family", ""), "")
    return name + (generation if "AMD" in name else "")


def commit(root: Path = ROOT) -> str:
    """The checked-out commit, marked when the working tree differs from it in more than what runs leave behind."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        differs = git("status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in RESULTS))
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if differs else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def instruction_sets() -> str:
    """What torch's kernels and ours were built for, as picked at run time on this processor."""
    text = f"torch {torch.backends.cpu.get_cpu_capability()}"
    try:
        from nlpkernels import _ops

        return f"{text}, nlpkernels {_ops.INSTRUCTION_SET}"
    except Exception:  # that it does not import is said elsewhere, for every row
        return text


@functools.cache
def identity() -> dict[str, str]:
    """The columns that say where, with what and when a row was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    versions = {package: version(package) for package in VERSIONS}
    versions["python"] = platform.python_version()
    if gpu:
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return {
        "machine": f"{cores()} cores, {cpu_name()}" + (f", {gpu}" if gpu else ""),
        "cpu": cpu_name(),
        "gpu": gpu,
        "isa": instruction_sets(),
        "versions": " ".join(f"{name}={value}" for name, value in versions.items() if value),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


@dataclass(frozen=True)
class Floor:
    """The best rates of a device: multiply-adds (FLOP/s), and copies (bytes/s) by the size of what is copied."""

    flops: float
    copy: tuple[tuple[int, float], ...]

    def bandwidth(self, size: int) -> float:
        """The copy rate at the smallest measured size that holds `size` bytes: what fits a cache runs at its speed."""
        return next((rate for limit, rate in self.copy if size <= limit), self.copy[-1][1])

    def seconds(self, flops: float, size: int) -> float:
        """No implementation can be faster than this: the slower of doing the arithmetic and moving the data once."""
        return max(flops / self.flops, size / self.bandwidth(size))


@functools.cache
def _library() -> ctypes.CDLL | str:
    """floor.cpp built for this processor, or the reason why that failed."""
    source = Path(__file__).with_name("floor.cpp")
    reason = "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "floor.so"
        base = ["c++", "-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        for native in (["-march=native"], ["-mcpu=native"], []):
            try:
                subprocess.run([*base, *native, str(source), "-o", str(target)], capture_output=True, check=True)
            except OSError:
                return "no C++ compiler (c++) was found"
            except subprocess.CalledProcessError as error:
                reason = error.stderr.decode(errors="replace").strip().splitlines()[-1]
                continue
            library = ctypes.CDLL(str(target))
            library.fma_rate.restype = library.tile_rate.restype = library.copy_rate.restype = ctypes.c_double
            library.fma_rate.argtypes = library.tile_rate.argtypes = [ctypes.c_int, ctypes.c_double]
            library.copy_rate.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_double]
            return library
    return reason


def cpu_floor(dtype: torch.dtype, threads: int, seconds: float = 0.3) -> Floor | str:
    """The floor of `threads` cores, or the reason why it could not be measured.

    For every dtype the rate is that of float32, in which kernels compute, but for bfloat16 where there are tiles of it.
    """
    library = _library()
    if isinstance(library, str):
        return library
    # What fits a cache is copied faster by one thread than by several, which must be woken first.
    counts = {1, threads}
    rates = tuple((size, max(float(library.copy_rate(n, size, seconds)) for n in counts)) for size in COPY_SIZES)
    flops = library.fma_rate(threads, seconds)
    if dtype == torch.bfloat16:
        flops = max(flops, library.tile_rate(threads, seconds))
    return Floor(float(flops), rates)


def _copy(target: torch.Tensor, source: torch.Tensor, times: int) -> None:
    for _ in range(times):
        target.copy_(source)


def cuda_floor(dtype: torch.dtype, repeats: int = 20) -> Floor:
    """The floor of the current GPU: a large matmul in this dtype, and copies.

    float32 means TF32 wherever torch lets cuDNN use it, or cuDNN could beat this bound.
    """

    def best_seconds(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        return best

    side = 8192 if dtype in (torch.bfloat16, torch.float16) else 4096
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        a = torch.randn(side, side, dtype=dtype, device="cuda")
        product = torch.empty_like(a)
        flops = 2 * side**3 / best_seconds(lambda: torch.matmul(a, a, out=product))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    rates = []
    for size in (1 << 24, 1 << 30):
        source = torch.randint(0, 127, (size // 2,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copies = max(1, (1 << 28) // size)  # several in one sample, or a launch would be timed and not a copy
        seconds = best_seconds(partial(_copy, target, source, copies))
        rates.append((size, size * copies / seconds))
    return Floor(flops, tuple(rates))


@functools.cache
def floor(device: str, dtype: torch.dtype, threads: int) -> Floor | str:
    """The floor for a case."""
    return cuda_floor(dtype) if device == "cuda" else cpu_floor(dtype, threads)
