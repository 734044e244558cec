"""Words per second of examples/word_vectors.py and of gensim, on the same text with the same number of threads.

A round is an epoch over a piece of text by each in turn. gensim takes text in two ways, sentences in memory or a file;
both are here, for which is the faster depends on the machine. That both learn equally well is for the example to show.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from . import machine
from .measure import Neighbours, append_rows, explain, quantiles, settle
from .providers import OURS
from .workloads import word_probabilities

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "word_vectors.py"
WINDOW, NEGATIVES, SAMPLE, RATE = 5, 5, 1e-3, 0.025  # gensim's, and word2vec's
LINE = 200  # words in a line of a made text: a review has as many


@dataclass(frozen=True)
class Case:
    """One training. `text`: reviews, or zipf: words drawn by their frequencies, as many different ones as asked for."""

    text: str
    vocabulary: int
    model: str
    size: int
    threads: int
    words: int  # of text in a round


@dataclass
class Row:
    """One provider on one case. NaN: not measured."""

    text: str
    model: str
    V: int
    D: int
    threads: int
    words: int
    provider: str
    status: str = "ok"  # or: failed: why
    rounds: int = 0
    words_per_s: float = float("nan")
    q20_words_per_s: float = float("nan")
    q80_words_per_s: float = float("nan")
    ratio: float = float("nan")  # nlpkernels' speed over this provider's: above 1, nlpkernels is faster
    ratio_q20: float = float("nan")
    ratio_q80: float = float("nan")
    busy_elsewhere: float = float("nan")
    machine: str = ""
    cpu: str = ""
    gpu: str = ""
    isa: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""


def load_example() -> ModuleType:
    """The example as a module; raises an ImportError where it lacks something."""
    spec = importlib.util.spec_from_file_location("word_vectors", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def cases(threads: Sequence[int], quick: bool) -> list[Case]:
    """Both models, two widths of vectors, and a table that the cache holds beside one that it does not."""
    share = 50 if quick else 1
    return [
        Case(text, vocabulary, model, size, count, words // share)
        for text, vocabulary in (("reviews", 0), ("zipf", 400_000 // share))
        for model, words in (("cbow", 1_000_000), ("skip-gram", 250_000))
        for size in (100, 300)
        for count in threads
    ]


def read_text(example: ModuleType, case: Case) -> tuple[Any, list[list[str]]]:
    """The whole text's vocabulary, and the lines of a round."""
    if case.text == "reviews":
        lines = example.read_reviews()
        vocabulary = example.find_vocabulary(lines, 5)
        order = np.random.default_rng(0).permutation(len(lines))  # good and bad ones alike
        ends = np.cumsum([len(lines[number]) for number in order])
        return vocabulary, [lines[number] for number in order[: int(np.searchsorted(ends, case.words)) + 1]]
    shares, _ = word_probabilities(case.vocabulary)
    names = np.array([f"w{number}" for number in range(case.vocabulary)], dtype=object)
    vocabulary = example.Vocabulary(names.tolist(), torch.tensor([0, *np.ceil(1e9 * shares).astype(np.int64).tolist()]))
    drawn = np.random.default_rng(0).choice(case.vocabulary, case.words, p=shares)
    return vocabulary, [names[drawn[start : start + LINE]].tolist() for start in range(0, case.words, LINE)]


def ours(example: ModuleType, case: Case, vocabulary: Any, lines: list[list[str]]) -> Callable[[], None]:
    corpus = example.encode(lines, vocabulary, WINDOW, SAMPLE)
    batch = example.fitting_batch(case.model, corpus, WINDOW, RATE)
    model = example.Model(case.model, vocabulary.counts, case.size, NEGATIVES)
    optimizer = example.make_optimizer(model, RATE, WINDOW)

    def epoch() -> None:
        batches = example.draw_batches(corpus, case.model, WINDOW, batch)
        _, loss = example.train_epoch(model, optimizer, batches, lambda words: 1.0)
        if not np.isfinite(loss):
            raise ArithmeticError("the loss is not finite")

    return epoch


def gensims(case: Case, vocabulary: Any, lines: list[list[str]], text: str | None) -> Callable[[], None]:
    """One epoch of gensim's, on the lines in memory or on the file that holds them."""
    from gensim.models import Word2Vec

    trainer = Word2Vec(
        vector_size=case.size,
        window=WINDOW,
        negative=NEGATIVES,
        sample=SAMPLE,
        min_count=1,
        sg=int(case.model == "skip-gram"),
        workers=case.threads,
    )
    trainer.build_vocab_from_freq(dict(zip(vocabulary.words, vocabulary.counts[1:].tolist(), strict=True)))
    source: dict[str, Any] = {"corpus_file": text} if text else {"corpus_iterable": lines}
    total = sum(map(len, lines))

    def epoch() -> None:
        trainer.train(
            **source, total_examples=len(lines), total_words=total, epochs=1, start_alpha=RATE, end_alpha=RATE
        )

    return epoch


@contextlib.contextmanager
def as_file(lines: list[list[str]]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text("".join(f"{' '.join(line)}\n" for line in lines), encoding="utf-8")
        yield os.fspath(path)


def take_turns(epochs: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each provider in each round; what comes before the first, to warm up, has no time."""
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(rounds + 1):
        for name, epoch in epochs.items() if number % 2 else reversed(epochs.items()):
            settle()
            start = time.perf_counter()
            epoch()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(example: ModuleType, case: Case, rounds: int) -> list[Row]:
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    vocabulary, lines = read_text(example, case)
    known = set(vocabulary.words)
    words = sum(word in known for word in chain.from_iterable(lines))
    with as_file(lines) as text:
        epochs = {
            OURS: ours(example, case, vocabulary, lines),
            "gensim, in memory": gensims(case, vocabulary, lines, None),
            "gensim, from a file": gensims(case, vocabulary, lines, text),
        }
        neighbours = Neighbours()
        seconds = take_turns(epochs, rounds)
        busy = neighbours.share()
    rows = []
    for name, taken in seconds.items():
        row = blank_row(case, name)
        row.V, row.words, row.rounds, row.busy_elsewhere = len(vocabulary.words), words, len(taken), busy
        row.q20_words_per_s, row.words_per_s, row.q80_words_per_s = quantiles([words / each for each in taken])
        within = [theirs / mine for theirs, mine in zip(taken, seconds[OURS], strict=True)]
        row.ratio_q20, row.ratio, row.ratio_q80 = quantiles(within)
        rows.append(row)
    return rows


def blank_row(case: Case, provider: str, status: str = "ok") -> Row:
    shape = (case.text, case.model, case.vocabulary, case.size, case.threads, case.words)
    return Row(*shape, provider, status, **machine.identity())


def run(threads: Sequence[int], rounds: int, quick: bool, output: Path, show: Callable[[str], None]) -> int:
    """Measures all cases, a row each to the CSV as soon as it is there; returns the exit status."""
    example = load_example()
    bad = 0
    try:
        for case in cases(threads, quick):
            label = f"{case.text}, {case.model}, {case.size} wide, {case.threads} thr"
            try:
                rows = measure(example, case, rounds)
            except Exception as error:  # this case is lost, the run is not
                rows, bad = [blank_row(case, OURS, f"failed: {explain(error)}")], bad + 1
            append_rows(output, rows, Row)
            for row in rows:
                rate = (
                    f"{row.words_per_s:,.0f} words/s, ratio {row.ratio:.2f} ({row.ratio_q20:.2f}–{row.ratio_q80:.2f})"
                )
                show(f"{label}: {row.provider} {rate if row.status == 'ok' else row.status}")
    except KeyboardInterrupt:
        show(f"stopped: what is done is in {output}")
        return 130
    show(f"rows in {output}" + (f"; failed: {bad}" if bad else ""))
    return 0
