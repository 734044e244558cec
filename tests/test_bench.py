"""The benchmark harness: what is wrong gets no time, what was measured is what is reported."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is no part of the installed package

from bench import __main__ as cli
from bench import gpu_report, machine, measure, providers, report
from bench.machine import Floor
from bench.problems import Case, PoolProblem, Problem, Results, make_problem
from bench.providers import OURS, Prepared
from bench.workloads import STEP_MODES, WORKLOADS, Workload

pytestmark = pytest.mark.usefixtures("restored_threads")

SMALL = Workload("small", "recurrent", "sequence", "", ("lstm",), T=3, B=2, I=4, H=5)
BAG = Workload("small bag", "bag", "bag", "", ("mean",), B=3, V=40, D=4, L=5, draw="uniform", padding=True)
Tamper = Callable[[Results], Results]
EFFORT = measure.Effort(seconds=0, sample=0, rounds=3)
FLOOR = Floor(1e9, ((1 << 20, 1e9), (1 << 30, 1e8)))


def case_of(workload: Workload, mode: str = "inference") -> Case:
    return Case(workload, workload.cells[0], mode, torch.float32, "cpu", 1)


def rows_of(case: Case, **others: providers.Provider) -> dict[str, measure.Row]:
    """The rows of some providers next to torch.nn's, which plays nlpkernels' part too."""
    table = {OURS: providers.torch_eager, "torch": providers.torch_eager, **others}
    rows = measure.measure(case, make_problem(case), list(table), EFFORT, FLOOR, table)
    return {row.provider: row for row in rows}


def tampered(tamper: Tamper) -> providers.Provider:
    """A provider that computes the right thing, then spoils it."""

    def provider(problem: Problem, case: Case) -> Prepared:
        right = providers.torch_eager(problem, case)
        return dataclasses.replace(right, results=lambda value: tamper(right.results(value)))

    return provider


def one_row_off(right: Results) -> Results:
    spoilt = right["y"].clone()
    spoilt[1, 0] += 0.01
    return {**right, "y": spoilt}


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (one_row_off, "off by"),
        (lambda right: {**right, "h": right["h"] * math.nan}, "not finite"),
        (lambda right: {**right, "y": right["y"][:-1]}, "shape"),
        (lambda right: {"y": right["y"]}, "in place of"),
    ],
    ids=["one row off", "nan", "shape", "missing"],
)
def test_wrong_result_has_no_time(tamper: Tamper, said: str) -> None:
    rows = rows_of(case_of(SMALL), liar=tampered(tamper))
    assert rows["liar"].status.startswith("wrong: ")
    assert said in rows["liar"].status
    assert math.isnan(rows["liar"].median_s) and math.isnan(rows["liar"].ratio)
    assert rows["torch"].status == "ok" and rows["torch"].median_s > 0


def test_wrong_gradient_is_caught() -> None:
    name = "grad weight_hh_l0"
    rows = rows_of(case_of(SMALL, "train"), liar=tampered(lambda right: {**right, name: right[name] * 1.01}))
    assert rows["liar"].status.startswith("wrong: off by")


def test_change_of_a_row_that_no_index_touched_is_caught() -> None:
    problem = PoolProblem(case_of(BAG, "train"))
    stranger = next(row for row in range(BAG.V) if row not in problem.touched)
    for rows, right in ((problem.rows, torch.zeros(BAG.V, BAG.D)), (problem.rows_after, problem.table.clone())):
        right[problem.touched] += 1
        wrong = right.clone()
        wrong[stranger] += 1
        assert torch.equal(rows(right), right[problem.touched])
        with pytest.raises(measure.WrongResult, match="no index touched"):
            rows(wrong)


@pytest.mark.parametrize("name", list(providers.WEIGHTS))
@pytest.mark.parametrize("kind", ["sequence", "packed", "cell"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_other_weights(cell: str, kind: str, name: str) -> None:
    """Each computes the layer with the weights that it says, on inputs of float32, or says that it doesn't."""
    if name in providers.PACKAGES:
        pytest.importorskip(providers.PACKAGES[name])
    work = dataclasses.replace(
        SMALL, kind="cell" if kind == "cell" else "sequence", ragged=kind == "packed", H=32, I=16
    )
    row = rows_of(Case(work, cell, "inference", torch.float32, "cpu", 1), **{name: providers.PROVIDERS[name]})[name]
    has_none = {"torch-int8": cell == "rnn" and kind != "cell", "onnxruntime-int8": cell != "lstm" and kind != "cell"}
    if has_none.get(name):
        assert row.status == f"unsupported: does not quantise {cell.upper()}"
        return
    assert row.status == "ok"
    least, most = {torch.float32: (0, 1e-5), torch.bfloat16: (1e-4, 0.02), torch.int8: (1e-4, 0.1)}[
        providers.WEIGHTS[name]
    ]
    assert least <= row.error_vs_fp64 < most


def test_other_weights_are_for_inference() -> None:
    for name in providers.WEIGHTS:
        assert [providers.concerned(name, "cell", mode) for mode in ("inference", "train")] == [True, False]
        assert not providers.concerned(name, "bag", "inference")


def test_absent_and_broken_providers_are_named() -> None:
    def absent(problem: Problem, case: Case) -> Prepared:
        providers.load("a_package_that_nobody_has")
        raise AssertionError

    def broken(problem: Problem, case: Case) -> Prepared:
        raise RuntimeError("cannot open /some/folder/of/mine/model.onnx\nand more")

    rows = rows_of(case_of(SMALL), absent=absent, broken=broken)
    assert rows["absent"].status == "missing: a_package_that_nobody_has is not installed"
    assert rows["broken"].status == "failed: RuntimeError: cannot open model.onnx"
    assert rows["torch"].status == "ok"


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # what torch's Adagrad makes is sparse
@pytest.mark.parametrize(
    "workload", [w for w in WORKLOADS if w.subject != "scaling"], ids=lambda w: f"{w.kind} {w.name}"
)
def test_torch_passes_on_every_workload(workload: Workload) -> None:
    """Also says that each one's data, reference, work and traffic can be made."""
    small = dataclasses.replace(workload.shrunk(), H=min(workload.H, 6), I=min(workload.I, 7), V=min(workload.V, 50))
    for mode in workload.modes:
        row = rows_of(case_of(small, mode))["torch"]
        assert row.status == "ok"
        assert row.error_vs_fp64 < 1e-5
        assert row.flops > 0 and row.bytes > 0
        assert row.rounds == 3
        assert row.share_of_floor == pytest.approx(FLOOR.seconds(row.flops, row.bytes) / row.median_s)


def test_commit_is_marked_by_changes_but_not_by_results(tmp_path: Path) -> None:
    if not shutil.which("git"):
        pytest.skip("git is not installed")

    def git(*args: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=tmp_path, check=True)

    def write(name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / name).open("a") as file:
            file.write("more\n")

    for name in ("kernel.cpp", "docs/speed.png"):
        write(name)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    clean = machine.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", clean)
    for name in ("docs/speed.png", "docs/new.png", "bench/results/run.csv"):
        write(name)
        assert machine.commit(tmp_path) == clean
    write("kernel.cpp")
    assert machine.commit(tmp_path) == f"{clean}-dirty"


def test_quantiles() -> None:
    assert measure.quantiles([5, 1, 4, 2, 3, 6]) == pytest.approx((2.0, 3.5, 5.0))
    assert measure.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_providers_take_turns() -> None:
    seconds = {"slow": 0.4, "fast": 0.1}
    taken: list[str] = []

    def clock(call: Callable[[], str], times: int) -> float:
        name = call()
        taken.append(name)
        return seconds[name]

    effort = measure.Effort(seconds=0, sample=0.2, rounds=3, most=3)
    calls = {name: (lambda name=name: name) for name in seconds}
    samples, times = measure.take_turns(calls, effort, clock, settled=False)
    assert samples == {"slow": [0.4] * 3, "fast": [0.1] * 3}
    assert times == {"slow": 1, "fast": 2}  # as many calls as fill a sample
    rounds = taken[2:]  # after one estimate each
    assert all({rounds[i], rounds[i + 1]} == set(seconds) for i in range(0, len(rounds), 2))


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_batches_take_turns(mode: str) -> None:
    """A result is checked with the first batch, whose result is known; what is timed goes over all of them in turn."""
    called: list[tuple[object, ...]] = []
    made: list[Prepared] = []

    def watched(problem: Problem, case: Case) -> Prepared:
        prepared = providers.torch_eager(problem, case)

        def call(*batch: object) -> object:
            called.append(batch)
            return prepared.call(*batch)

        made.append(dataclasses.replace(prepared, call=call))
        return made[0]

    case = case_of(BAG, mode)
    table = {OURS: providers.torch_eager, "watched": watched}
    effort = measure.Effort(seconds=0, sample=0, rounds=3, most=3)
    rows = measure.measure(case, make_problem(case), list(table), effort, FLOOR, table)
    assert [row.status for row in rows] == ["ok", "ok"]
    batches = made[0].batches
    number = [next(i for i, (ids,) in enumerate(batches) if ids is given) for (given,) in called]
    assert number[:2] == [0, 0]  # whether it is right, and how much memory it takes
    assert number[2:] == list(range(len(number) - 2))
    assert len(number) > 4
    turns = made[0].in_turn()
    called.clear()
    for _ in range(len(batches) + 1):
        turns()
    assert called[0][0] is called[-1][0] is batches[0][0]
    assert len({ids.data_ptr() for (ids,) in called}) == len(batches)


@pytest.mark.parametrize("layout", ["ragged", "padding"])
def test_batches_are_the_same_work(layout: str) -> None:
    """Each has other rows, in bags of the same lengths; what is padded is what is ragged."""
    work = dataclasses.replace(BAG, padding=layout == "padding", ragged=layout == "ragged")
    first, *others = PoolProblem(case_of(work)).batches
    lengths = (first.matrix != 0).sum(1)
    for batch in others:
        assert not torch.equal(batch.flat, first.flat)
        assert torch.equal((batch.matrix != 0).sum(1).sort().values, lengths.sort().values)
        assert torch.equal(batch.matrix[batch.matrix != 0], batch.flat)
        assert torch.equal((batch.matrix != 0).sum(1), batch.offsets.diff(append=torch.tensor([len(batch.flat)])))


@pytest.fixture
def made_up() -> list[measure.Row]:
    """Rows of three cases: a win, a loss, and one where nlpkernels is wrong."""
    rows = []
    for name, ours, torchs in (("winner", 1.0, 2.0), ("loser", 3.0, 1.5), ("wrong one", math.nan, 1.0)):
        case = case_of(dataclasses.replace(SMALL, name=name))
        for provider, median in ((OURS, ours), ("torch", torchs), ("compile", torchs * 4), ("fbgemm", math.nan)):
            row = measure.blank_row(case, provider, "ok" if median > 0 else "missing: not here")
            row.median_s, row.q20_s, row.q80_s = median, median * 0.99, median * 1.01
            row.ratio, row.ratio_q20, row.ratio_q80 = median / ours, median / ours * 0.9, median / ours * 1.1
            row.share_of_floor, row.flops, row.gflops = 0.5, 10**9, 1 / median
            rows.append(row)
    return rows


def test_csv_round_trip(tmp_path: Path, made_up: list[measure.Row]) -> None:
    measure.append_rows(tmp_path / "run.csv", made_up[:5])
    measure.append_rows(tmp_path / "run.csv", made_up[5:])
    frame = report.read([tmp_path / "run.csv"])
    assert len(frame) == len(made_up)
    for row, (_, read) in zip(made_up, frame.iterrows(), strict=True):
        for name, value in dataclasses.asdict(row).items():
            same = (
                value == pytest.approx(read[name], rel=1e-5, nan_ok=True)
                if isinstance(value, float)
                else value == read[name]
            )
            assert same, name


def test_report_shows_losses_first(tmp_path: Path, made_up: list[measure.Row], capsys: pytest.CaptureFixture) -> None:
    measure.append_rows(tmp_path / "run.csv", made_up)
    (tmp_path / "docs").mkdir()
    docs = tmp_path / "docs"
    files = {"overview": tmp_path / "README.md", "frozen": docs / "frozen.md", "tables": docs / "performance.md"}
    for name, path in files.items():
        path.write_text(f"before\n<!-- bench {name}: begin -->\nold\n<!-- bench {name}: end -->\nafter\n")
    with files["overview"].open("a") as readme:  # has that, too
        readme.write("<!-- bench frozen: begin -->\n<!-- bench frozen: end -->\nafter\n")
    assert report.report([tmp_path / "run.csv"], tmp_path, tmp_path) == 0
    said = capsys.readouterr().out
    for name, path in files.items():
        content = path.read_text()
        part = content[
            content.index("begin -->\n") + len("begin -->\n") : content.index("<!-- bench " + name + ": end")
        ]
        assert part in said
        assert content.startswith("before\n") and content.endswith("\nafter\n") and "\nold\n" not in content
    tables = files["tables"].read_text()
    rows = tables[tables.index("<details>") :]
    lines = [line for line in rows.splitlines() if line.startswith("| ") and "LSTM" in line]
    assert [line.split(",")[0] for line in lines] == ["| wrong one", "| loser", "| winner"]
    assert "**0.50×** (0.45–0.55)" in lines[1]
    assert "2.00× (1.80–2.20) | 50% | 8.00× torch.compile" in lines[2]
    assert "FBGEMM (missing: not here; 3 cases)" in rows
    assert "| LSTM | torch.nn | 1.00 (0.50) |" in tables  # of 0.5 and 2; what is wrong does not count
    assert "| LSTM | inference | 1.00 (**0.50**) | 1.00 (**0.50**) |" in files["overview"].read_text()
    (picture,) = tmp_path.glob("recurrent-*-float32.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert f"(../bench/results/{picture.name})" in tables


def test_several_kinds_of_machine(tmp_path: Path, made_up: list[measure.Row], capsys: pytest.CaptureFixture) -> None:
    """Each has a page of its own, the newest first, and two columns of the overview."""
    for number, name in enumerate(("old chip", "new chip")):
        kind = [dataclasses.replace(row, cpu=name, date=f"2026-0{number + 1}-01") for row in made_up]
        measure.append_rows(tmp_path / f"{number}.csv", kind)
    assert report.report([tmp_path / "0.csv", tmp_path / "1.csv"], tmp_path, None) == 0
    said = capsys.readouterr().out
    head = said.splitlines()[0]
    assert 0 < head.index("new chip") < head.index("old chip")
    assert said.count("\n## ") == 2
    assert said.count("| wrong one,") == 2
    assert len(list(tmp_path.glob("recurrent-*.png"))) == 2


def test_frozen_overview(tmp_path: Path, made_up: list[measure.Row]) -> None:
    """Deployed programs alone; each of the two cases against the fastest peer with weights of its kind."""
    seconds = {"nlpkernels": 4.0, "nlpkernels-frozen-int8": 2.0, "torch": 8.0, "compile": 6.0, "torch-int8": 1.0}
    some = next(row for row in made_up if row.status == "ok")
    rows = [
        dataclasses.replace(some, subject="deployed", workload=name, provider=provider, median_s=factor * taken)
        for name, factor in (("one", 1.0), ("two", 3.0))
        for provider, taken in seconds.items()
    ]
    measure.append_rows(tmp_path / "run.csv", [*rows, dataclasses.replace(rows[1], subject="recurrent")])
    last = report.frozen_overview(report.read([tmp_path / "run.csv"])).splitlines()[-1]
    assert last.endswith("| int8 | 2.00 (2.00) | 4.00 (4.00) | 3.00 (3.00) | 0.50 (**0.50**) |")


def test_summary_against_the_best_peer(tmp_path: Path, made_up: list[measure.Row]) -> None:
    """In each row the fastest peer counts, whichever that is; and every row counts once."""
    next(row for row in made_up if row.provider == "compile").ratio = 0.25  # the winner loses to this one
    made_up.append(dataclasses.replace(made_up[1], subject="overhead", workload="tiny", ratio=4.0))
    measure.append_rows(tmp_path / "run.csv", made_up)
    lines = report.summary(report.read([tmp_path / "run.csv"])).splitlines()
    assert [line for line in lines if line.startswith(("| LSTM | inf", "| next", "| **all"))] == [
        "| LSTM | inference | 2 | 0.35 | 0.25 torch.compile | 2 |",  # of 0.25 and 0.5
        "| next to no work | inference | 1 | 4.00 | 4.00 torch.nn | 0 |",
        "| **all** |  | 3 | 0.79 | 0.25 torch.compile | 2 |",
    ]


def test_other_weights_are_reported_apart(tmp_path: Path, made_up: list[measure.Row]) -> None:
    """Whoever is fast with frozen layers, or with weights of eight bits, is no peer of nlpkernels."""
    path = tmp_path / "run.csv"
    measure.append_rows(path, made_up)
    before = report.summary(report.read([path]))
    assert report.of_other_weights(report.read([path])) == ""
    others = [dataclasses.replace(made_up[1], provider=name, error_vs_fp64=0.02) for name in providers.WEIGHTS]
    measure.append_rows(path, [dataclasses.replace(row, median_s=5e-6, ratio=0.01) for row in others])
    frame = report.read([path])
    assert report.summary(frame) == before
    assert "0.01×" not in report.markdown_table(frame)
    *_, line = report.of_other_weights(frame).splitlines()
    assert line.startswith("| winner, LSTM | 1 | 1 s | 2 s | 8 s | 5 µs (2e-02) |")
    assert report.of_other_weights(frame) in report.pages(frame, {})


def test_modes_of_older_runs_are_reported(
    tmp_path: Path, made_up: list[measure.Row], capsys: pytest.CaptureFixture
) -> None:
    for row in made_up:
        row.mode = "forgotten"
    measure.append_rows(tmp_path / "run.csv", made_up)
    assert report.report([tmp_path / "run.csv"], tmp_path, None) == 0
    tables = capsys.readouterr().out
    assert "| layer | against | forgotten |" in tables
    assert "| LSTM | forgotten | 2 | 1.00 | 0.50 torch.nn | 1 |" in tables


def test_rows_without_peers_are_reported(tmp_path: Path, made_up: list[measure.Row]) -> None:
    measure.append_rows(tmp_path / "run.csv", (row for row in made_up if row.provider == OURS))
    assert report.report([tmp_path / "run.csv"], tmp_path, None) == 0


@pytest.mark.parametrize(("slowdown", "status"), [(1.0, 0), (1.05, 0), (1.5, 1), (0.5, 0)])
def test_compare(
    tmp_path: Path, made_up: list[measure.Row], capsys: pytest.CaptureFixture, slowdown: float, status: int
) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    measure.append_rows(old, made_up)
    changed = [dataclasses.replace(row) for row in made_up]
    for row in changed[:1]:
        row.median_s, row.q20_s, row.q80_s = row.median_s * slowdown, row.q20_s * slowdown, row.q80_s * slowdown
    measure.append_rows(new, changed)
    assert report.compare(old, new, 1.1) == status
    said = capsys.readouterr().out
    assert f"{int(slowdown > 1)} slower, {status} of them by more than 1.1×; {int(slowdown < 1)} faster" in said


def test_compare_notices_what_broke(tmp_path: Path, made_up: list[measure.Row]) -> None:
    measure.append_rows(tmp_path / "old.csv", made_up)
    made_up[0].status = "wrong: off by 1"
    measure.append_rows(tmp_path / "new.csv", made_up)
    assert report.compare(tmp_path / "old.csv", tmp_path / "new.csv", 1.1) == 1


QUICK = ["overhead", "--quick", "--threads", "1", "--peers", "torch", "--workload", "tiny bag*", "--mode", "inference"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "run.csv"
    assert cli.main([*QUICK, "--out", str(target)]) == 0
    frame = report.read([target])
    assert list(frame.provider) == [OURS, "torch"]
    assert set(frame.status) == {"ok"}
    assert cli.main(["compare", str(target), str(target)]) == 0
    assert cli.main([*QUICK, "--out", str(target)]) == 2  # one CSV holds one run


def test_interrupt_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, measured = tmp_path / "run.csv", cli.measured

    def once(case: Case, *others: object) -> object:
        if target.exists():
            raise KeyboardInterrupt
        return measured(case, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(cli, "measured", once)
    assert cli.main([*QUICK[:-1], "inference,train", "--out", str(target)]) == 130
    assert set(report.read([target])["mode"]) == {"inference"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recurrent", "--cell", "lstn"], "Did you mean 'lstm'"),
        (["bag", "--workload", "Glove"], "Did you mean 'GloVe'"),
        (["bag", "--peers", "torch,tensorflow"], "unknown peer 'tensorflow'"),
        (["cells", "--mode", "sparse-sgd"], "nothing to run"),
        (["cells", "--threads", "99999"], "more than this machine's"),
        (["cells", "--graph"], "needs --device cuda"),
        (["report", "nowhere.csv"], "there is no nowhere.csv"),
    ],
)
def test_clear_messages(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.machine, "free_memory", lambda device: 1)
    plan = cli.plan(cli.parser().parse_args(["cells", "--quick", "--peers", "torch"]))
    rows, _ = cli.measured(case_of(SMALL), None, plan)
    assert [row.status.split(",")[0] for row in rows] == ["skipped: needs about 0.0 GiB"] * 2


def test_every_provider_can_be_drawn() -> None:
    assert set(report.STYLE) == set(providers.PROVIDERS)


def test_gpu_report_wants_evidence(tmp_path: Path) -> None:
    """A tool that ends well without having done its work has not passed."""
    steps = gpu_report.Report(tmp_path)
    for i, (code, passes) in enumerate((("print('SUMMARY: 0 errors')", True), ("pass", False), ("exit(9)", False))):
        process = steps.start(f"{i}.log", [sys.executable, "-c", code])
        assert steps.finish(code, process, f"{i}.log", 60, "SUMMARY: 0 ") == passes
    assert steps.failed
    assert "ended without 'SUMMARY: 0 '" in " ".join(steps.lines)
    assert "exit 9" in " ".join(steps.lines)


def test_gpu_report_stops_what_takes_too_long(tmp_path: Path) -> None:
    steps = gpu_report.Report(tmp_path)
    process = steps.start("log", [sys.executable, "-c", "import time; time.sleep(600)"])
    assert not steps.finish("sleep", process, "log", 0)
    assert "stopped after" in " ".join(steps.lines)


def test_gpu_report_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails does not stop the others; what is written are few files, with what each step has said."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *test_optim*) echo broken; exit 1;; *pytest*) echo "1 passed";; *) echo done;; esac\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(gpu_report.sys, "executable", str(python))
    monkeypatch.setattr(gpu_report, "TOOLS", ())
    assert gpu_report.run(tmp_path / "out", 60) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.md", "log.txt"}
    summary, log = ((tmp_path / "out" / name).read_text() for name in ("summary.md", "log.txt"))
    assert "**tests, optim**: exit 1" in summary
    assert summary.count(": passed") == summary.count("- **") - 1 - summary.count("not done")
    assert "**benchmark**: passed" in summary
    assert "a step failed" in summary
    assert "==== tests, optim: exit 1\nbroken\n" in log


def test_gpu_report_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it runs on a GPU runs on the CPU, small; what it makes of the rows is a table with a line for each kind."""
    gpu_report.smoke("cpu")
    assert {case.mode for case in gpu_report.cases()} == {"inference", "train", *STEP_MODES}
    update = dataclasses.replace(BAG, modes=("update",))
    small = [case_of(work, mode) for work, mode in ((SMALL, "inference"), (SMALL, "train"), (update, "update"))]
    small.append(dataclasses.replace(small[0], dtype=torch.bfloat16))
    monkeypatch.setattr(gpu_report, "cases", lambda: small)
    monkeypatch.setattr(machine, "floor", lambda *_: Floor(1e9, ((1, 1e9),)))
    gpu_report.benchmark(tmp_path / "gpu.csv", 60)
    text = "\n".join(gpu_report.speeds(tmp_path / "gpu.csv"))
    for line in (
        "| lstm | float32 | inference | 1 |",
        "| lstm | float32 | train | 1 |",
        "| mean | float32 | update | 1 |",
        "| lstm | bfloat16 | inference | 1 |",
    ):
        assert line in text
    in_one_kernel = text[text.index("One kernel for all steps") : text.index("## Bags")]
    assert in_one_kernel.count("lstm inference bfloat16") == 1
    assert "Wrong or failed: 0" in text


@pytest.mark.parametrize("model", ["cbow", "skip-gram"])
def test_word_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    for library in ("gensim", "sklearn"):
        pytest.importorskip(library)
    import pandas as pd

    from bench import word_vectors

    case = word_vectors.Case("zipf", 300, model, 8, 1, 3000)
    monkeypatch.setattr(word_vectors, "cases", lambda *_: [case, dataclasses.replace(case, size=-1)])
    target = tmp_path / "words.csv"
    assert cli.main(["word-vectors", "--rounds", "3", "--out", str(target)]) == 0
    rows = pd.read_csv(target)
    assert list(rows["provider"]) == [OURS, "gensim, in memory", "gensim, from a file", OURS]
    good, bad = rows[:3], rows.iloc[3]
    assert (good["status"] == "ok").all()
    assert (good["words"] == 3000).all()
    assert (good["V"] == 300).all()
    assert (good["rounds"] == 3).all()
    assert (good["words_per_s"] > 0).all()
    assert good["ratio"][0] == 1
    assert bad["status"].startswith("failed: ")
    assert cli.main(["word-vectors", "--rounds", "3", "--out", str(target)]) == 2  # one CSV holds one run
    assert cli.main(["word-vectors", "--rounds", "0"]) == 2
    assert cli.main(["word-vectors", "--threads", "0"]) == 2
