"""Fixtures: devices, fresh random numbers, poisoned memory."""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tolerances
import torch

import nlpkernels  # noqa: F401 (the schemas, before --emulated-cuda registers kernels)

CONFORMANCE = pytest.StashKey[Counter[str]]()

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA_HEADERS = """
cuda_runtime.h ATen/cuda/CUDAContextLight.h ATen/cuda/cub.h c10/cuda/CUDAException.h c10/cuda/CUDAFunctions.h
c10/cuda/CUDAGraphsC10Utils.h c10/cuda/CUDAGuard.h c10/cuda/CUDAStream.h
"""
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
OF_CPU_KERNELS = (
    "test_bits_depend_on_neither",
    "test_bits_of_few_sequences",
    "test_bits_in_a_ragged_batch",
    "test_bits_of_a_step",
    "test_other_instruction_sets",
    "test_instruction_set",
    "test_long_sums_are_exact",
    "test_sums_are_of_what_is_there",
    "test_gradients_are_summed_in_order",
    "test_bags_of_wide_rows",
    "test_large_gradients",
    "test_kept_from_step_to_step",
    "test_memory_goes_with_the_table",
)

# ninja may be installed beside a Python whose environment is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ.setdefault("NLPKERNELS_CUDA_CHECK", "now")  # tests of errors expect them at once
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or poisoned memory, below, makes torch's products warn
# Tests compare float32 with exact arithmetic; that TF32 follows its flag has its own.
torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulated-cuda", action="store_true", help="compile csrc/cuda for the CPU, in place of csrc/cpu")
    parser.addoption("--emulated-tiles", action="store_true", help="bfloat16 by csrc/cpu/tiles.h, tiles in software")
    parser.addoption("--thorough", action="store_true", help="second derivatives of every one of torch's own cases")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("emulated_cuda"):
        load_emulated_cuda()
    if config.getoption("emulated_tiles"):
        load_emulated_tiles()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("emulated_cuda"):
        for item in items:
            if item.name.startswith(OF_CPU_KERNELS):
                item.add_marker(
                    pytest.mark.skip(reason="promised of the kernels of csrc/cpu alone, which --emulated-cuda replaces")
                )


ROOT = Path(__file__).resolve().parent.parent


def load_emulated(name: str, sources: list[Path], headers: str = "", flags: tuple[str, ...] = ()) -> None:
    """The ops of some sources are theirs from now on, compiled after tests/{name}.h, with empty headers beside it."""
    from torch.utils import cpp_extension

    tolerances.rounding_devices.add("cpu")
    last = shlex.split(os.environ.get("NLPKERNELS_CXXFLAGS", ""))  # as in setup.py
    build = ROOT / "build" / f"{name.replace('_', '-')}-torch-{torch.__version__}{'-flags' if last else ''}"
    (build / "include").mkdir(parents=True, exist_ok=True)
    for header in headers.split():
        (build / "include" / header).parent.mkdir(parents=True, exist_ok=True)
        if not (build / "include" / header).exists():  # or all would be compiled anew each time
            (build / "include" / header).touch()
    wrapped = []
    for source in sorted(sources):
        wrapped.append(build / f"{source.stem}.cpp")
        lines = f'#include "{ROOT}/tests/{name}.h"\n#include "{source}"\n'
        if not wrapped[-1].exists() or wrapped[-1].read_text() != lines:
            wrapped[-1].write_text(lines)
    preloaded = os.environ.pop("LD_PRELOAD", None)  # a sanitiser's, with which no compiler need run
    cpp_extension.load(
        name,
        [str(source) for source in wrapped],
        extra_include_paths=[str(build / "include")],
        extra_cflags=["-std=c++20", "-O1", "-g0", *WARNINGS, *flags, *last],
        extra_ldflags=last,
        build_directory=str(build),
        is_python_module=False,
    )
    if preloaded is not None:
        os.environ["LD_PRELOAD"] = preloaded


def load_emulated_cuda() -> None:
    """The kernels of csrc/cuda take CPU tensors from now on: see emulated_cuda.h."""
    load_emulated("emulated_cuda", list((ROOT / "csrc" / "cuda").glob("*.cu")), CUDA_HEADERS)


def load_emulated_tiles() -> None:
    """Recurrent layers of bfloat16 are those of processors with AMX from now on: see emulated_tiles.h."""
    instructions = [f"-mavx512{name}" for name in ("f", "bw", "vl", "dq", "bf16")] + ["-mfma", "-mf16c", "-fopenmp"]
    names = ["-D__AMX_BF16__", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", "-fvisibility=hidden"]
    quiet = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # of GCC's own AVX-512 header
    load_emulated("emulated_tiles", [ROOT / "csrc/cpu/recurrent.cpp"], flags=("-O2", *instructions, *names, *quiet))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Every test that takes it runs once for each kind of device."""
    return str(request.param)


@pytest.fixture(autouse=True)
def fresh_random_numbers(request: pytest.FixtureRequest) -> None:
    """New inputs in each run; the seed is shown when a test fails."""
    seed = torch.seed()
    request.node.add_report_section("setup", "seed", f"torch.manual_seed({seed})")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that torch.empty hands out, to kernels too, is full of NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def without_cudnn() -> Iterator[None]:
    """For second derivatives, which it has not: it serves torch.nn's layers, and ours while our kernels are off."""
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        yield


@pytest.fixture
def doubles() -> Iterator[None]:
    """Everything is float64, unless it says otherwise: rounding is far below what assert_close allows."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """For a test that changes the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def count_conformance(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Counts a case of torch's own that ours passed."""
    counts = request.config.stash.setdefault(CONFORMANCE, Counter())

    def count(kind: str) -> None:
        counts[kind] += 1

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How many of torch's own cases were run."""
    counts = config.stash.get(CONFORMANCE, None)
    if counts:
        of = ", ".join(f"{number} of {kind}" for kind, number in counts.items())
        terminalreporter.write_line(f"conformance with torch.nn: {sum(counts.values())} cases passed ({of})")
