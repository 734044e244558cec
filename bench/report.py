"""What the rows say: tables over all kinds of machines, with the losses first, plots, and what changed between runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.console import Console
from rich.table import Table

from .measure import Row
from .providers import OURS, PROVIDERS, WEIGHTS
from .workloads import STEP_MODES

CASE = ["subject", "workload", "kind", "cell", "mode", "shape", "dtype", "device", "clock", "threads"]
KIND = ["cpu", "gpu", "isa", "device", "dtype", "clock"]  # what one table, or one set of plots, is about
BUSY = 0.05  # beyond this share of the machine, others disturb
MODES = {
    "inference": "inference",
    "train": "training step",
    "sparse": "training step, sparse gradient",  # of older runs: a gradient that nobody reads
    "update": "training step with SGD",
    "dense-sgd": "dense gradient and torch's SGD",
    "dense-adam": "dense gradient and torch's Adam",
    "sparse-sgd": "sparse gradient and torch's SGD",
    "sparse-adam": "sparse gradient and torch's SparseAdam",
    "sparse-adagrad": "sparse gradient and torch's Adagrad",
}
OVERVIEW = {"inference", "train", "update", "dense-sgd", "sparse-sgd"}  # what a page has room for
# Each summarised on its own: of whole layers, not of what is too little work to tell, nor of grids around one point.
SUMMARISED = {
    "RNN": ("recurrent", "rnn"),
    "GRU": ("recurrent", "gru"),
    "LSTM": ("recurrent", "lstm"),
    "cells": ("cells", ""),
    "EmbeddingBag": ("bag", "mean"),
    "Embedding + mean": ("embedding", "mean"),
    "deployed programs": ("deployed", ""),
}
# And what is left: with these, each row of a machine counts once.
ALL_ROWS = {**SUMMARISED, "next to no work": ("overhead", ""), "a grid of LSTMs": ("scaling", "")}
FLOOR_HOLDS = 1.1  # a share of the floor beyond this says that the floor was measured too low, noise aside
STYLE = {  # colours that stay apart for colour-blind eyes; the peer that everybody has is black
    OURS: ("#d55e00", "D"),
    "torch": ("#000000", "o"),
    "compile": ("#0072b2", "s"),
    "idiom": ("#cc79a7", "^"),
    "idiom-compile": ("#56b4e9", "v"),
    "onnxruntime": ("#009e73", "P"),
    "openvino": ("#8a6bbd", "X"),
    "fbgemm": ("#b8860b", "*"),
    "dense": ("#7f7f7f", "h"),
    "nlpkernels-frozen": ("#d55e00", "d"),
    "nlpkernels-frozen-bfloat16": ("#d55e00", "<"),
    "nlpkernels-frozen-int8": ("#d55e00", ">"),
    "torch-int8": ("#000000", "."),
    "onnxruntime-int8": ("#009e73", "p"),
}
LABEL = {
    "torch": "torch.nn",
    "compile": "torch.compile",
    "idiom": "Embedding + mean",
    "idiom-compile": "Embedding + mean, compiled",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "fbgemm": "FBGEMM",
    "dense": "torch.nn, dense gradient",
    "nlpkernels-frozen": "frozen",
    "nlpkernels-frozen-bfloat16": "frozen, bfloat16",
    "nlpkernels-frozen-int8": "frozen, int8",
    "torch-int8": "torch.ao, int8",
    "onnxruntime-int8": "ONNX Runtime, int8",
}


def read(paths: Iterable[Path]) -> pd.DataFrame:
    """The rows of some runs in one frame; empty text stays text."""
    frames = []
    text = [name for name, field in Row.__dataclass_fields__.items() if field.type == "str"]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
        frame = pd.read_csv(path, dtype=dict.fromkeys(text, str))
        absent = set(Row.__dataclass_fields__) - set(frame.columns)
        if absent:
            raise FileNotFoundError(
                f"{path} is no CSV of this version's benchmarks: it lacks {', '.join(sorted(absent))}"
            )
        frame[text] = frame[text].fillna("")
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _of(frame: pd.DataFrame, provider: str) -> Any:
    rows = frame[frame.provider == provider]
    return rows.iloc[-1] if len(rows) else None


def _ok(row: Any) -> bool:
    return row is not None and row.status == "ok"


def _modes(frame: pd.DataFrame) -> list[str]:
    """The modes of some rows in the order of MODES, then those of older runs that it does not know any more."""
    found = dict.fromkeys(frame["mode"])
    return [mode for mode in MODES if mode in found] + [mode for mode in found if mode not in MODES]


def _peers(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that tell how long a peer takes beside nlpkernels."""
    return frame[~frame.provider.isin([OURS, *WEIGHTS]) & (frame.status == "ok") & frame.ratio.notna()]


def _table(rows: Iterable[Sequence[str]]) -> str:
    """Markdown, with the first row as head."""
    head, *others = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *others))


def times(ratio: float) -> str:
    """A ratio with as many digits as anyone would read."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


def layer(kind: str, cell: str) -> str:
    """What a user would call it."""
    names = {"bag": "EmbeddingBag", "embedding": "Embedding + mean", "cell": f"{cell.upper()}Cell"}
    return names.get(kind, cell.upper())


def _against_torch(case: pd.DataFrame) -> tuple[float, str]:
    """The ratio to torch.nn to sort by, and how a table shows it. What is broken sorts before any loss."""
    ours, torch = _of(case, OURS), _of(case, "torch")
    if not _ok(ours):
        return -1.0, f"**{'not measured' if ours is None else ours.status}**"
    if not _ok(torch):
        return math.inf, "–" if torch is None else f"torch.nn {torch.status}"
    spread = f"({torch.ratio_q20:.2f}–{torch.ratio_q80:.2f})"
    return torch.ratio, f"**{times(torch.ratio)}** {spread}" if torch.ratio < 1 else f"{times(torch.ratio)} {spread}"


def _best_other(case: pd.DataFrame) -> str:
    """The fastest of all the other peers."""
    others = case[~case.provider.isin([OURS, "torch", *WEIGHTS]) & (case.status == "ok") & case.ratio.notna()]
    if not len(others):
        return "–"
    best = others.loc[others.ratio.idxmin()]
    text = f"{times(best.ratio)} {LABEL.get(best.provider, best.provider)}"
    return f"**{text}**" if best.ratio < 1 else text


def markdown_table(frame: pd.DataFrame) -> str:
    """One line for each workload and mode, the worst first."""
    threads = sorted(frame.threads.unique())
    cpu = (frame.device == "cpu").all()
    columns = [f"vs torch.nn, {n} thread{'s' if n > 1 else ''}" for n in threads] if cpu else ["vs torch.nn"]
    head = ["workload", "mode", "shape", *columns, "of the floor", "best other peer"]
    lines = []
    for key, group in frame.groupby(["subject", "workload", "kind", "cell", "mode", "shape"], sort=False):
        _, workload, kind, cell, mode, shape = key
        cells, worst = [], math.inf
        for count in threads:
            case = group[group.threads == count]
            ratio, text = _against_torch(case) if len(case) else (math.inf, "")
            worst = min(worst, ratio)
            cells.append(text)
        most = group[group.threads == group.threads.max()]
        ours = _of(most, OURS)
        share = f"{ours.share_of_floor:.0%}" if ours is not None and 0 < ours.share_of_floor <= FLOOR_HOLDS else "–"
        lines.append((worst, [f"{workload}, {layer(kind, cell)}", mode, shape, *cells, share, _best_other(most)]))
    lines.sort(key=lambda line: line[0])
    return _table([head, *(line for _, line in lines)])


def against_each(frame: pd.DataFrame) -> str:
    """One line for each layer and peer: the geometric mean over its cases, and the worst of them."""
    good = _peers(frame)
    modes = _modes(good)
    rows = [["layer", "against", *(MODES.get(mode, mode) for mode in modes)]]
    for provider in PROVIDERS:
        for name, (subject, cell) in SUMMARISED.items():
            cases = good[(good.provider == provider) & (good.subject == subject) & good.cell.str.startswith(cell)]
            if len(cases):
                ratios = [cases.ratio[cases["mode"] == mode] for mode in modes]
                means = [f"{_mean(r):.2f} ({r.min():.2f})" if len(r) else "" for r in ratios]
                rows.append([name, LABEL.get(provider, provider), *means])
    return _table(rows)


def against_best(frame: pd.DataFrame) -> str:
    """One line for each layer and mode, and one for all: how they stand against the fastest peer of each case."""
    best = _fastest(_peers(frame))
    rows = [["layer", "mode", "rows", "geometric mean", "worst", "below 1"]]
    for name, (subject, cell) in ALL_ROWS.items():
        cases = best[(best.subject == subject) & best.cell.str.startswith(cell)]
        for mode in _modes(cases):
            rows.append([name, MODES.get(mode, mode), *_standing(cases[cases["mode"] == mode])])
    if len(best):
        rows.append(["**all**", "", *_standing(best)])
    return _table(rows)


def _standing(cases: pd.DataFrame) -> list[str]:
    worst = cases.loc[cases.ratio.idxmin()]
    loser = f"{worst.ratio:.2f} {LABEL.get(worst.provider, worst.provider)}"
    return [str(len(cases)), f"{_mean(cases.ratio):.2f}", loser, str((cases.ratio < 1).sum())]


def _mean(ratios: pd.Series) -> float:
    return float(np.exp(np.log(ratios).mean()))


def kind_name(row: pd.Series) -> str:
    """What a row's kind of machine is called."""
    cpu = row.cpu.replace("(R)", "").replace(" Processor", "")
    chip = row.gpu if row.device == "cuda" else ", ".join([cpu, *row.isa.split()[-1:]])
    return f"{chip}, {row['dtype']}" + (", CUDA graph replay" if row.clock == "graph" else "")


def overview(frame: pd.DataFrame) -> str:
    """One line for each layer and mode of OVERVIEW: against torch.nn and the fastest peer, on each kind of machine.

    The last line counts all rows.
    """
    good = _peers(frame[frame["dtype"] == "float32"])
    kinds = list(good.groupby(KIND, sort=False))
    newest = set(kinds[0][1]["mode"]) if kinds else set()  # older runs had others
    head = ["layer", "mode"]
    for _, rows in kinds:
        head += [f"{kind_name(rows.iloc[-1])}: torch.nn", "fastest peer"]
    lines = []
    for name, (subject, cell) in SUMMARISED.items():
        cases = good[(good.subject == subject) & good.cell.str.startswith(cell)]
        for mode in _modes(cases[cases["mode"].isin(newest & OVERVIEW)]):
            line = [name, MODES.get(mode, mode)]
            for _, rows in kinds:
                own = rows[(rows.subject == subject) & rows.cell.str.startswith(cell) & (rows["mode"] == mode)]
                line += [_mean_and_worst(own[own.provider == "torch"]), _mean_and_worst(_fastest(own))]
            lines.append(line)
    last = ["**all**", "rows below 1"]
    for _, rows in kinds:
        for peers in (rows[rows.provider == "torch"], _fastest(rows)):
            last.append(f"{(peers.ratio < 1).sum()} of {len(peers)}")
    return _table([head, *lines, last]) + "\n"


def _mean_and_worst(peers: pd.DataFrame) -> str:
    return _mean_and_least(peers.ratio)


def _mean_and_least(ratios: pd.Series) -> str:
    if not len(ratios):
        return ""
    worst = f"{ratios.min():.2f}"
    return f"{_mean(ratios):.2f} ({f'**{worst}**' if ratios.min() < 1 else worst})"


def frozen_overview(frame: pd.DataFrame) -> str:
    """For each dtype of frozen weights how many times as fast deployed programs are as with others, by machine."""
    good = frame[(frame.subject == "deployed") & (frame.status == "ok")]
    lines = [["machine", "weights", "nlpkernels, not frozen", "torch.nn", "fastest float32 peer", "fastest int8 peer"]]
    for _, rows in good.groupby(KIND, sort=False):
        seconds = rows.pivot_table(index=CASE, columns="provider", values="median_s")
        others = [name for name in seconds if not name.startswith(OURS)]
        eight = [name for name in others if name in WEIGHTS]
        whole = [name for name in others if name not in WEIGHTS]
        against = [seconds[OURS], seconds["torch"], seconds[whole].min(axis=1), seconds[eight].min(axis=1)]
        for name in (name for name in WEIGHTS if name in seconds and name.startswith(OURS)):
            ratios = [_mean_and_least((peer / seconds[name]).dropna()) for peer in against]
            lines.append([kind_name(rows.iloc[-1]), str(WEIGHTS[name]).removeprefix("torch."), *ratios])
    return _table(lines) + "\n"


def _fastest(peers: pd.DataFrame) -> pd.DataFrame:
    """Of each case the row of the fastest peer."""
    return peers.loc[peers.groupby(CASE).ratio.idxmin()]


def summary(group: pd.DataFrame) -> str:
    """How each layer stands against each peer, and against the fastest of them, on one kind of machine."""
    return "\n\n".join([
        against_each(group),
        "Against the fastest peer of each row, whichever that is. A row is a workload with one number of threads; "
        "in those that are below 1 that peer is faster than nlpkernels:",
        against_best(group),
    ])  # fmt: skip


def rows_of(group: pd.DataFrame) -> str:
    """All rows of one kind of machine, and what a reader must know to judge them."""
    group = group[group.subject != "scaling"] if (group.subject != "scaling").any() else group
    won, lost, median = _tally(group)
    parts = [
        f"Faster than torch.nn in {won} cases, slower in {lost}; the median ratio is {median}.",
        markdown_table(group),
    ]
    if (busy := group.busy_elsewhere.median()) > BUSY:
        parts.append(f"**Not to be relied on**: other processes took {busy:.0%} of this machine meanwhile.")
    if notes := _absences(group):
        parts.append("Not measured: " + "; ".join(notes) + ".")
    return "\n\n".join(parts)


def of_other_weights(group: pd.DataFrame) -> str:
    """What a call takes with frozen layers and with weights of eight bits, beside the others; empty without such."""
    good = group[(group.status == "ok") & (group["mode"] == "inference")]
    names = [name for name in PROVIDERS if name in set(good.provider)]
    rows = [["workload", "threads", *(LABEL.get(name, name) for name in names)]]
    for _, case in good.groupby(CASE, sort=False):
        if case.provider.isin(WEIGHTS).any():
            last = case.iloc[-1]
            cells = [_taken(_of(case, name)) for name in names]
            rows.append([f"{last.workload}, {layer(last.kind, last.cell)}", str(last.threads), *cells])
    if len(rows) == 1:
        return ""
    return (
        "What a call takes with frozen layers, and with weights of eight bits, beside all others. In parentheses the "
        "error against float64:\n\n" + _table(rows)
    )


def _taken(row: Any) -> str:
    if row is None:
        return ""
    return duration(row.median_s) + (f" ({row.error_vs_fp64:.0e})" if row.provider in WEIGHTS else "")


def pages(frame: pd.DataFrame, plots: dict[tuple[Any, ...], list[str]]) -> str:
    """For each kind of machine its summary, its plots, by their addresses, and, folded up, its rows."""
    parts = []
    for kind, group in frame.groupby(KIND, sort=False):
        last = group.iloc[-1]
        parts += [
            f"## {kind_name(last)}",
            f"{last.machine}; {last.isa}; {last.versions}; commit {last.commit}, {last.date[:10]}.",
            summary(group),
            of_other_weights(group),
            *(f"![{Path(plot).stem}]({plot})" for plot in plots.get(kind, [])),
            "<details>\n<summary>All rows, the losses first</summary>",
            rows_of(group),
            "</details>",
        ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _tally(frame: pd.DataFrame) -> tuple[int, int, str]:
    torch = frame[(frame.provider == "torch") & (frame.status == "ok") & frame.ratio.notna()]
    median = times(float(torch.ratio.median())) if len(torch) else "not known"
    return int((torch.ratio >= 1).sum()), int((torch.ratio < 1).sum()), median


def _absences(frame: pd.DataFrame) -> list[str]:
    """Who was not measured and why, so that nobody is dropped in silence."""
    notes = []
    for provider in PROVIDERS:
        rows = frame[(frame.provider == provider) & (frame.status != "ok")]
        for status, group in rows.groupby("status", sort=False):
            where = f"{len(group)} case{'s' if len(group) > 1 else ''}"
            notes.append(f"{LABEL.get(provider, provider)} ({status}; {where})")
    return notes


def _log_axis(axis: Any, low: float, high: float) -> None:
    """Ticks that are read as factors: 1/2, 1, 2, 4."""
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    step = 1 + len(powers) // 11
    axis.set_major_locator(FixedLocator([2.0**p for p in powers if p % step == 0]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}"))
    axis.set_minor_locator(NullLocator())


def _legend(
    figure: Figure, names: Sequence[str], extra: Sequence[Line2D] = (), line: Literal["-", "none"] = "none"
) -> None:
    handles = [
        Line2D([], [], color=STYLE[name][0], marker=STYLE[name][1], linestyle=line, label=LABEL.get(name, name))
        for name in names
    ]
    figure.legend(handles=[*handles, *extra], loc="outside lower center", ncols=4, frameon=False)


def _title(frame: pd.DataFrame, what: str) -> str:
    last = frame.iloc[-1]
    where = f"{last.device.upper()}, {last['dtype']}" + (f", {last.threads} thread" if last.device == "cpu" else "")
    plural = "s" if last.device == "cpu" and last.threads > 1 else ""
    graph = ", CUDA graphs" if last.clock == "graph" else ""
    chip = last.gpu if last.device == "cuda" else last.cpu
    busy = "; NOT TO BE RELIED ON: others used this machine too" if frame.busy_elsewhere.median() > BUSY else ""
    return f"{what}: {where}{plural}{graph}\n{chip}, {last.date[:10]}, {last.commit}{busy}"


def plot_ratios(frame: pd.DataFrame) -> Figure | None:
    """For each workload how much longer each peer takes, with its spread; one panel for each mode.

    Whole steps with an optimizer are left to the tables.
    """
    work = ["subject", "workload", "kind", "cell"]
    good = _peers(frame)
    good = good[~good["mode"].isin(STEP_MODES)]
    if not len(good):
        return None
    modes = _modes(good)
    names = [name for name in PROVIDERS if (good.provider == name).any()]
    torch = good[good.provider == "torch"].groupby(work).ratio.median()
    keys = list(dict.fromkeys(good[work].itertuples(index=False, name=None)))
    subjects = list(dict.fromkeys(key[0] for key in keys))
    keys.sort(key=lambda key: (subjects.index(key[0]), torch.get(key, math.inf)))
    place, position, marks = {}, 0.0, []
    for index, key in enumerate(keys):
        if index == 0 or key[0] != keys[index - 1][0]:
            position += 1.2  # room for the subject's name
            marks.append((position - 1.0, key[0]))
        place[key] = position
        position += 1
    height = 1.6 + 0.235 * position
    figure = Figure(figsize=(3.2 + 3.6 * len(modes), height), layout="constrained")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    low, high = min(0.5, good.ratio_q20.min() * 0.9), max(2.0, good.ratio_q80.max() * 1.1)
    for panel, mode in zip(panels, modes, strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xlim(low, high)
        _log_axis(panel.xaxis, low, high)
        panel.axvspan(low, 1, color="#d55e00", alpha=0.07, linewidth=0)
        panel.axvline(1, color="#d55e00", linewidth=1)
        panel.grid(axis="x", color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
        for line in place.values():
            panel.axhline(line, color="0.93", linewidth=0.6, zorder=0)
        for name in reversed(names):  # torch.nn is drawn last, on top
            rows = good[(good.provider == name) & (good["mode"] == mode)]
            where = [place[key] for key in rows[work].itertuples(index=False, name=None)]
            middle = rows.ratio.to_numpy()
            spread = [np.maximum(0, middle - rows.ratio_q20), np.maximum(0, rows.ratio_q80 - middle)]
            colour, marker = STYLE[name]
            panel.errorbar(
                middle,
                where,
                xerr=spread,
                fmt=marker,
                color=colour,
                markersize=5,
                elinewidth=1.1,
                alpha=0.9,
                linewidth=0,
            )
        panel.set_title(MODES.get(mode, mode), fontsize=10)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        one = math.log(1 / low) / math.log(high / low)
        panel.set_xlabel("← slower   nlpkernels   faster →", fontsize=9, x=one)
    panels[0].set_yticks(list(place.values()), [f"{key[1]}, {layer(*key[2:])}" for key in keys])
    panels[0].set_ylim(position - 0.3, -0.4)
    for line, subject in marks:
        panels[0].text(
            -0.02,
            line,
            subject,
            transform=panels[0].get_yaxis_transform(),
            weight="bold",
            ha="right",
            va="center",
            fontsize=10,
        )
    figure.suptitle(_title(frame, "A peer's time over that of nlpkernels"), fontsize=11)
    _legend(figure, names)
    return figure


def plot_scaling(frame: pd.DataFrame) -> Figure | None:
    """Rates over T, B and H against the floor: where a kernel starts to pay, and how much is left."""
    good = frame[(frame.subject == "scaling") & (frame.status == "ok")]
    axes = [axis for axis in "TBH" if good.workload.str.match(f"scaling {axis}").any()]
    modes = _modes(good)
    if not axes:
        return None
    names = [name for name in PROVIDERS if name not in WEIGHTS and (good.provider == name).any()]
    figure = Figure(figsize=(1.2 + 3.5 * len(axes), 1.5 + 2.7 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(axes), squeeze=False, sharey="row", sharex="col")
    for line, mode in zip(panels, modes, strict=True):
        for panel, axis in zip(line, axes, strict=True):
            rows = good[(good["mode"] == mode) & good.workload.str.match(f"scaling {axis}")]
            _draw_scaling(panel, rows, axis, names)
            if mode == modes[-1]:
                panel.set_xlabel({"T": "T, steps", "B": "B, sequences", "H": "H, hidden units"}[axis])
        line[0].set_ylabel(f"{MODES.get(mode, mode)}, GFLOP/s")
    figure.suptitle(_title(good, "Scaling of the LSTM"), fontsize=11)
    dashes = Line2D([], [], color="0.3", linestyle="--", label="floor: this machine's best")
    _legend(figure, names, [dashes], line="-")
    return figure


def _draw_scaling(panel: Axes, rows: pd.DataFrame, axis: str, names: Sequence[str]) -> None:
    for name in names:
        line = rows[rows.provider == name].sort_values(axis)
        colour, marker = STYLE[name]
        panel.fill_between(
            line[axis],
            line.flops / line.q80_s / 1e9,
            line.flops / line.q20_s / 1e9,
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
        width = 2.0 if name == OURS else 1.2
        panel.plot(line[axis], line.gflops, color=colour, marker=marker, markersize=4.5, linewidth=width, label=name)
    best = (rows.gflops / rows.share_of_floor).groupby(rows[axis]).median()  # the floor at each row's size
    panel.plot(best.index, best.to_numpy(), color="0.3", linestyle="--", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    values = sorted(rows[axis].unique())
    panel.xaxis.set_major_locator(FixedLocator([value for value in values if math.log2(value) % 1 == 0]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(color="0.92", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def report(paths: Sequence[Path], folder: Path, root: Path | None) -> int:
    """Draws plots into `folder`, and prints an overview and the tables of each kind of machine.

    With `root`, the project's, they also go into README.md and pages of docs, between their marks.
    """
    frame = read(paths).drop_duplicates([*KIND, *CASE, "provider"], keep="last")
    frame = frame.sort_values("date", ascending=False, kind="stable")  # the newest kind first
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    plots: dict[tuple[Any, ...], list[str]] = {}
    for kind, group in frame.groupby(KIND, sort=False):
        most = group[group.threads == group.threads.max()]
        tag = re.sub(r"[^a-z0-9]+", "-", kind_name(most.iloc[-1]).lower()).strip("-")
        scaling, pooled = most.subject == "scaling", most.cell == "mean"
        figures = {
            "recurrent": plot_ratios(most[~scaling & ~pooled]),
            "embedding": plot_ratios(most[~scaling & pooled]),
            "scaling": plot_scaling(most[scaling]),
        }
        for name, figure in figures.items():
            if figure is not None:
                written.append(folder / f"{name}-{tag}.png")
                figure.savefig(written[-1], dpi=110)
                plots.setdefault(kind, []).append(f"../bench/results/{written[-1].name}")
    parts = {"overview": overview(frame), "frozen": frozen_overview(frame), "tables": pages(frame, plots)}
    print("\n".join(parts.values()))
    places = (
        ("overview", "README.md"),
        ("frozen", "README.md"),
        ("frozen", "docs/frozen.md"),
        ("tables", "docs/performance.md"),
    )
    for name, place in places if root is not None else ():
        path = root / place
        content = path.read_text(encoding="utf-8")
        begin, end = f"<!-- bench {name}: begin -->", f"<!-- bench {name}: end -->"
        if begin not in content or end not in content:
            raise FileNotFoundError(f"{path} has no lines '{begin}' and '{end}' to put the {name} between")
        between = f"{begin}\n{parts[name]}{end}"
        content = re.sub(f"{begin}.*{end}", lambda _, text=between: text, content, flags=re.DOTALL)
        path.write_text(content, encoding="utf-8")
        written.append(path)
    Console(stderr=True, highlight=False, markup=False).print("wrote " + ", ".join(map(str, written)), soft_wrap=True)
    return 0


def compare(old: Path, new: Path, factor: float, provider: str = OURS) -> int:
    """Lists what changed by more than the spread; 1 when something got slower by more than `factor`, or broke."""
    before, after = read([old]), read([new])
    console = Console(highlight=False, markup=False)
    if set(before.machine) != set(after.machine):
        console.print(f"different machines: {'; '.join(set(before.machine) ^ set(after.machine))}", style="yellow")
    keys = [*CASE, "provider"]
    both = before.merge(after, on=keys, suffixes=("_old", "_new"))
    both = both[both.provider == provider]
    if not len(both):
        raise FileNotFoundError(f"{old} and {new} have no case of {provider} in common")
    both["change"] = both.median_s_new / both.median_s_old
    fine_before, fine_after = both.status_old == "ok", both.status_new == "ok"
    broke = both[fine_before & ~fine_after & ~both.status_new.str.startswith("unsupported")]
    slower = both[fine_before & fine_after & (both.q20_s_new > both.q80_s_old)].sort_values("change", ascending=False)
    faster = both[fine_before & fine_after & (both.q80_s_new < both.q20_s_old)].sort_values("change")
    regressions = slower[slower.change > factor]
    table = Table("", "case", "threads", "old", "new", "new / old", title=f"{provider}: {old.name} → {new.name}")
    for _, row in broke.iterrows():
        table.add_row(
            "broke", _case_name(row), str(row.threads), duration(row.median_s_old), row.status_new, "", style="red"
        )
    for word, rows in (("slower", slower), ("faster", faster)):
        for _, row in rows.iterrows():
            bad = word == "slower" and row.change > factor
            numbers = (duration(row.median_s_old), duration(row.median_s_new), f"{row.change:.2f}")
            style = "red" if bad else "green" if word == "faster" else None
            table.add_row(word.upper() if bad else word, _case_name(row), str(row.threads), *numbers, style=style)
    if table.row_count:
        (console if console.is_terminal else Console(width=160, highlight=False, markup=False)).print(table)
    same = int((fine_before & fine_after).sum()) - len(slower) - len(faster)
    gone = len(
        before[before.provider == provider]
        .merge(after, on=keys, how="left", indicator=True)
        .query("_merge == 'left_only'")
    )
    console.print(
        f"{len(slower)} slower, {len(regressions)} of them by more than {factor:g}×; {len(faster)} faster; "
        f"{same} within the spread; {len(broke)} broke; {gone} are not in the new run",
        soft_wrap=True,
    )
    return 1 if len(regressions) or len(broke) else 0


def _case_name(row: pd.Series) -> str:
    where = "" if row.device == "cpu" and row["dtype"] == "float32" else f", {row.device} {row['dtype']}"
    return f"{row.workload}, {row.cell} {row['mode']}{where}" + (", graph" if row.clock == "graph" else "")


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
