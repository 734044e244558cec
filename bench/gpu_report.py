"""Everything about the CUDA kernels that needs a GPU, in one go: `make gpu-report`, or `python -m bench.gpu_report`.

Builds in place with the interpreter that runs it, downloads nothing, and then: the tests on the GPU, a process for each
file (test_cuda.py has the thousand repeats, the two streams and the graphs), and beside them compute-sanitizer
(memcheck, racecheck, synccheck) over a short run; the benchmark against torch.nn until the time is up. A step that
fails does not stop the others. Writes three files to --out, each as soon as there is something to write: summary.md,
log.txt (what each step has printed) and gpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import machine
from .measure import Effort, append_rows, blank_row, explain, measure
from .problems import Case, Problem, make_problem, problem_type
from .providers import OURS, PROVIDERS, Prepared, Unsupported
from .workloads import BAGS, Workload

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CELLS = ("lstm", "gru", "rnn")
NEEDS = ("numpy", "setuptools")  # and pytest, without which all but the tests is done
# Those that run kernels and need nothing else. The others' tests of a GPU are of what stands around the kernels.
TESTS = ("cuda", "recurrent", "recurrent_dropout", "lengths_and_states", "embedding", "optim", "ops", "convert")
TOOLS = ("memcheck", "racecheck", "synccheck")
# Seconds. What they should take on 16 cores, by what their parts take on another machine: the build 60 to 100 (the two
# files of csrc/cuda have a core each, and nobody waits for the others); the checks 60 to 140, seventeen processes side
# by side that share the GPU by turns (alone: the thousand repeats 15, a file of tests 10 to 40, a tool 30 to 90). The
# benchmark has what is left of the 460 in all, 200 or so and a minute and a half at least: a case takes one or two.
LIMITS = {"build": 200, "checks": 150, "facts": 60}
LONGEST_LOG = 300_000  # characters of a step's, from its end
# The first of the ports on which each tool and what it watches find each other; they run at the same time.
PORTS = {tool: 49152 + 100 * i for i, tool in enumerate(TOOLS)}
SLOWER = 0.95
# One kernel for all steps, against one a step; and the tests that run with it, too.
PERSISTENT, SWITCH = "persistent", "NLPKERNELS_CUDA_PERSISTENT"
PERSISTENT_TESTS = ("recurrent", "recurrent_dropout", "lengths_and_states")


def cases() -> list[Case]:
    """The grid in an order drawn once for all, so that any beginning of it is a fair sample."""
    grid = list(itertools.product(DTYPES, CELLS, (1, 2), (1, 2), (1, 8, 32, 128, 256), (64, 128, 256, 512, 1024, 2048)))
    random.Random(0).shuffle(grid)
    layers = []
    for dtype, cell, directions, count, batch, hidden in grid:
        sizes = {"T": 64, "B": batch, "I": hidden, "H": hidden, "layers": count, "directions": directions}
        work = Workload("gpu grid", "recurrent", "sequence", "a grid", (cell,), **sizes)  # type: ignore[arg-type]
        layers += [Case(work, cell, mode, dtype, "cuda", 1) for mode in work.modes]
    large = Workload(
        "gpu bags", "bag", "bag", "a grid", ("mean",), ("inference", "train", "update", "sparse-sgd"),
        V=2_000_000, D=256, B=16_384, L=64, draw="uniform",
    )  # fmt: skip
    bags = [
        Case(work, "mean", mode, dtype, "cuda", 1)
        for work in (large, *BAGS)
        for mode in work.modes
        for dtype in (torch.float32, torch.bfloat16)
    ]
    random.Random(1).shuffle(bags)
    # A bag after every eight layers, from the first on.
    turns = [layers[i * 8 : i * 8 + 8] for i in range(len(layers) // 8 + 1)]
    return [
        case for bag, turn in itertools.zip_longest(([b] for b in bags), turns, fillvalue=[]) for case in (*bag, *turn)
    ]


@contextmanager
def switched(when: str) -> Iterator[None]:
    """With NLPKERNELS_CUDA_PERSISTENT set."""
    before = os.environ.get(SWITCH, "never")
    os.environ[SWITCH] = when
    try:
        yield
    finally:
        os.environ[SWITCH] = before


def persistent(problem: Problem, case: Case) -> Prepared:
    """Ours with one kernel for all steps of a pass, in training of both; or Unsupported where one does not fit."""
    prepared = PROVIDERS[OURS](problem, case)

    def call(*batch: Any) -> Any:
        with switched("always"):
            return prepared.call(*batch)

    always = replace(prepared, call=call)
    try:
        always.first()
    except RuntimeError as error:
        if SWITCH not in str(error):
            raise
        raise Unsupported("does not fit on this device") from error
    return always


def benchmark(output: Path, seconds: float) -> None:
    """Rows of as many cases as fit."""
    end = time.monotonic() + seconds
    effort = Effort(seconds=0.1, sample=0.002, rounds=5, most=30)
    everything = cases()
    for done, case in enumerate(everything):
        if time.monotonic() > end:
            print(f"{done} of {len(everything)} cases in {seconds:.0f} s")
            return
        names = [OURS, "torch"]
        if case.workload.kind == "sequence":
            names.append(PERSISTENT)
        try:
            if 0 < 0.5 * machine.free_memory(case.device) < problem_type(case).memory(case):
                continue
            floor = machine.floor(case.device, case.dtype, 1)
            rows = measure(case, make_problem(case), names, effort, floor, {**PROVIDERS, PERSISTENT: persistent})
        except Exception as error:  # this case is lost, the run is not
            rows = [blank_row(case, name, f"failed: {explain(error)}") for name in names]
        append_rows(output, rows)
        torch.cuda.empty_cache()
    print(f"all {len(everything)} cases")


def smoke(device: str) -> None:
    """Each kernel once or so, forward and backward, for compute-sanitizer."""
    import nlpkernels

    for dtype in (torch.float64, *DTYPES):
        options = {"device": device, "dtype": dtype}
        for name, more in (("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("GRU", {}), ("LSTM", {"proj_size": 9}),
                           ("LSTM", {})):  # fmt: skip
            layer = getattr(nlpkernels, name)(20, 37, bidirectional=True, **more, **options)
            x = torch.randn(5, 3, 20, requires_grad=True, **options)
            for when in ("never", "fits") if dtype in DTYPES else ("never",):
                packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 1]))
                with switched(when):
                    (layer(x)[0].square().sum() + layer(packed)[0].data.square().sum()).backward()
        for columns, mode, index in itertools.product((32, 37), ("sum", "mean", "max"), (torch.int32, torch.int64)):
            bag = nlpkernels.EmbeddingBag(50, columns, mode=mode, padding_idx=3, **options)
            ids, offsets = torch.randint(50, (90,), device=device, dtype=index), torch.tensor([0, 7, 7, 40])
            factors = torch.randn(90, requires_grad=True, **options) if mode == "sum" else None
            bag(ids, offsets.to(device, index), factors).square().sum().backward()
        sparse = nlpkernels.Embedding(50, 33, sparse=True, **options)
        sparse(torch.randint(50, (40,), device=device)).square().sum().backward()
        for name, mode, columns in itertools.product(nlpkernels.optim.__all__, ("mean", "max"), (32, 37)):
            bag = nlpkernels.EmbeddingBag(50, columns, mode=mode, **options)
            optimizer = getattr(nlpkernels.optim, name)(bag.parameters())
            bag(torch.randint(50, (8, 90), device=device).clamp_(max=40)).square().sum().backward()
            optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()


def sanitizer_command(program: str, tool: str) -> list[str]:
    """compute-sanitizer over `smoke`, with the kernels of this project alone."""
    options = {
        "--tool": tool,
        "--kernel-name": "kernel_substring=nlpkernels",
        "--error-exitcode": "9",
        "--launch-timeout": str(LIMITS["checks"]),  # of finding what it watches, which imports torch first
        "--port": str(PORTS[tool]),
    }
    if tool == "memcheck":
        # Of what torch asks the driver some is refused, and that is no mistake; beyond a tensor stands nothing.
        options |= {"--report-api-errors": "no", "--padding": "1024"}
    return [program, *itertools.chain(*options.items()), sys.executable, "-m", "bench.gpu_report", "--smoke"]


def test_runs() -> Iterator[tuple[str, tuple[str, ...], str, dict[str, str]]]:
    """Of each run of tests what it is, its files, which of their tests are meant, and what its environment has more.

    A kernel that waits in vain ends all that its process still has to do on the GPU, so those that wait are by
    themselves.
    """
    for name in TESTS:
        yield name, (name,), "cuda and not one_kernel", {}
    yield "cuda, one kernel against steps", ("cuda",), "one_kernel", {}
    yield "cuda, one kernel", ("cuda",), "TestOnGpu", {SWITCH: "fits"}
    for name in PERSISTENT_TESTS:
        yield f"{name}, one kernel", (name,), "cuda", {SWITCH: "fits"}
    yield "our kernels off", ("recurrent", "lengths_and_states", "embedding"), "cuda", {"NLPKERNELS_CUDA": ""}


def toolkit() -> str:
    """Where CUDA's compiler is: in CUDA_HOME, or else where the shell would find it."""
    given = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = None if Path(given, "bin", "nvcc").exists() else shutil.which("nvcc")
    return str(Path(found).resolve().parent.parent) if found else given


def tail(path: Path, lines: int = 3) -> str:
    return "\n".join(path.read_text(errors="replace").strip().splitlines()[-lines:]) if path.exists() else ""


class Report:
    """Steps as processes of their own, and what came of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log.txt").unlink(missing_ok=True)
        self.logs = tempfile.TemporaryDirectory(prefix="gpu_report")
        self.lines: list[str] = []
        self.failed = False
        self.environment = {
            **os.environ,
            "NLPKERNELS_CUDA": "1",
            "FORCE_CUDA": "1",
            "CUDA_HOME": toolkit(),
            SWITCH: "never",
            "PYTHONUNBUFFERED": "1",
        }

    def say(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        self.lines += lines
        (self.folder / "summary.md").write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def log(self, name: str) -> Path:
        return Path(self.logs.name, name)

    def lack(self, what: str, why: str) -> None:
        self.failed = True
        self.say(f"- **{what}**: not done: {why}")

    def start(self, log: str, command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        with self.log(log).open("ab") as file:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # to be stopped with its children
            )

    def finish(self, what: str, process: subprocess.Popen[bytes], log: str, seconds: float, evidence: str = "") -> bool:
        """Waits for a step. It has passed if it says so and its log has the evidence: some tools end well early."""
        try:
            status = f"exit {code}" if (code := process.wait(max(1.0, seconds))) else "passed"
            if status == "passed" and evidence not in self.log(log).read_text(errors="replace"):
                status = f"ended without '{evidence}'"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped after {seconds:.0f} s"
        self.failed |= status != "passed"
        self.say(f"- **{what}**: {status}", "  " + tail(self.log(log), 1)[:300])
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            text = self.log(log).read_text(errors="replace")[-LONGEST_LOG:]
            file.write(f"==== {what}: {status}\n{text}\n")
        return status == "passed"


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def speeds(path: Path) -> list[str]:
    """Geometric means of torch.nn's time over ours, and each loss."""
    rows = list(rows_of(path))
    ratios: dict[tuple[str, str, str], list[float]] = {}
    losses, bad, in_one_kernel = [], [], []
    for row in rows:
        if row["provider"] == PERSISTENT and row["status"].startswith("unsupported"):
            continue
        if row["status"] != "ok":
            bad.append(
                f"- {row['provider']}: {row['cell']} {row['mode']} {row['dtype']} {row['shape']}: {row['status']}"
            )
        elif row["provider"] == PERSISTENT and row["ratio"] not in ("", "nan"):
            ratio = 1 / float(row["ratio"])
            in_one_kernel.append((ratio, f"- {ratio:.2f}: {row['cell']} {row['mode']} {row['dtype']} {row['shape']}"))
        elif row["provider"] == "torch" and row["ratio"] not in ("", "nan"):
            ratio = float(row["ratio"])
            ratios.setdefault((row["cell"], row["dtype"], row["mode"]), []).append(ratio)
            if ratio < SLOWER:
                losses.append((ratio, f"- {ratio:.2f}: {row['cell']} {row['mode']} {row['dtype']} {row['shape']}"))
    table = ["| layer | dtype | mode | cases | geometric mean | worst | best |", "|---|---|---|---|---|---|---|"]
    for (cell, dtype, mode), found in sorted(ratios.items()):
        mean = statistics.geometric_mean(found)
        table.append(f"| {cell} | {dtype} | {mode} | {len(found)} | {mean:.2f} | {min(found):.2f} | {max(found):.2f} |")
    copies = ["| bag | dtype | mode | GB/s | of a copy's |", "|---|---|---|---|---|"]
    for row in rows:
        if row["kind"] == "bag" and row["provider"] == OURS and row["status"] == "ok":
            share = float(row["gbs"]) / float(row["floor_gbs"])
            copies.append(f"| {row['shape']} | {row['dtype']} | {row['mode']} | {row['gbs']} | {share:.0%} |")
    return [
        "", "## Speed: torch.nn's time over ours", "", *table, "", f"Slower than {SLOWER}: {len(losses)}", "",
        *(line for _, line in sorted(losses)), "",
        "## One kernel for all steps: the time of a kernel a step over its own, where it fits", "",
        *(line for _, line in sorted(in_one_kernel)), "", "## Bags", "", *copies, "",
        f"Wrong or failed: {len(bad)}", "", *bad,
    ]  # fmt: skip


def run(folder: Path, seconds: float) -> int:
    """All steps within `seconds`; returns the exit status."""
    begin = time.monotonic()
    report = Report(folder)
    report.say(f"# {machine.identity()['machine']}")
    report.say(f"{machine.identity()['versions']}, commit {machine.identity()['commit'] or 'unknown'}")
    python = sys.executable
    isa = torch.backends.cpu.get_cpu_capability().lower()
    isa = isa if isa in ("avx2", "avx512") else "default"

    build = report.start("build.log", [python, "setup.py", "build_ext", "--inplace"], NLPKERNELS_BUILD_CPU=isa)
    report.finish("build", build, "build.log", LIMITS["build"])
    facts = report.start("facts.log", [python, "-m", "nlpkernels"])
    imports = report.finish("import", facts, "facts.log", LIMITS["facts"])
    report.say("```", tail(report.log("facts.log"), 20), "```")
    if imports:
        side = time.monotonic()
        checks: dict[str, tuple[str, subprocess.Popen[bytes], str]] = {}
        few_threads = {"OMP_NUM_THREADS": "1"}  # or each of them would take all cores for itself
        if machine.version("pytest"):
            for i, (what, names, meant, environment) in enumerate(test_runs()):
                log, files = f"tests_{i}.log", [f"tests/test_{name}.py" for name in names]
                process = report.start(
                    log, [python, "-m", "pytest", "-q", "-k", meant, *files], **environment, **few_threads
                )
                checks[f"tests, {what}"] = log, process, " passed"
        else:
            report.lack("tests", f"{python} lacks pytest")
        cuda = Path(toolkit())
        places = [os.environ.get("PATH", ""), str(cuda / "bin"), str(cuda / "compute-sanitizer")]
        sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
        if sanitizer:
            for tool in TOOLS:
                # Without a cache of memory each tensor is an allocation, beyond whose ends nothing may be touched.
                log, command = f"{tool}.log", sanitizer_command(sanitizer, tool)
                process = report.start(log, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **few_threads)
                checks[f"compute-sanitizer, {tool}"] = log, process, "SUMMARY: 0 "
        else:
            report.lack("compute-sanitizer", "not found")
        for what, (log, process, evidence) in checks.items():
            report.finish(what, process, log, LIMITS["checks"] - (time.monotonic() - side), evidence)

        left = seconds - (time.monotonic() - begin) - 10
        command = [python, "-m", "bench.gpu_report", "--out", str(folder.resolve()), "--only-bench", f"{left:.0f}"]
        report.finish("benchmark", report.start("bench.log", command), "bench.log", left + 8)
        report.say(*speeds(folder / "gpu.csv"))
    report.say(f"{time.monotonic() - begin:.0f} s in all; {'a step failed' if report.failed else 'every step passed'}")
    return int(report.failed)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="the folder to write to")
    parser.add_argument("--seconds", type=float, default=460, help="for everything together")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only-bench", type=float, metavar="SECONDS", help="the benchmark alone, for that long")
    options = parser.parse_args()
    if options.smoke:
        smoke("cuda")
        return 0
    if not torch.cuda.is_available():
        sys.exit(f"gpu_report: torch {torch.__version__} finds no CUDA device on this machine")
    if missing := [name for name in NEEDS if not machine.version(name)]:
        sys.exit(f"gpu_report: {sys.executable} lacks {', '.join(missing)}")
    if options.only_bench is not None:
        benchmark(options.out / "gpu.csv", options.only_bench)
        return 0
    return run(options.out, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
