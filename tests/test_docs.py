"""The examples in docstrings, in the README and in docs run, and users' code that calls us passes mypy --strict."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nlpkernels

PROGRAM = """
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import nlpkernels
from nlpkernels import GRU, LSTM, RNN, Embedding, EmbeddingBag, GRUCell, LSTMCell, RNNCell


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding(20, 6, padding_idx=0)
        self.lstm = LSTM(6, 5, 2, batch_first=True, bidirectional=True, dropout=0.1, dtype=torch.float32, device="cpu")
        self.cells = nn.ModuleList([RNNCell(10, 4), GRUCell(10, 4), LSTMCell(10, 4)])

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor
        y, (h_n, c_n) = self.lstm(self.embedding(ids), lengths=lengths)
        return y


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    print(nlpkernels.convert(model, lambda name, layer: name != "head"))
    print(nlpkernels.revert(model).swapped["lstm"])
    output, h_n = GRU(6, 5, recurrent_dropout=0.3).forward(x, None, return_state_sequence=True)
    packed, h_n = RNN(6, 5, nonlinearity="relu").forward(pack_padded_sequence(x, [2, 1]))
    assert isinstance(packed, PackedSequence)
    y, h, c = nlpkernels.functional.lstm(x, (h_n, h_n), [x, x], False, 1, 0.0, False, False, recurrent_dropout=0.3)
    weight: Tensor = LSTM(6, 5).get_parameter("weight_ih_l0")
    return EmbeddingBag(20, 4, mode="sum").forward(torch.zeros(2, 3, dtype=torch.long)), weight + y + h + c
"""


@pytest.mark.parametrize("name", sorted(m.name for m in pkgutil.iter_modules(nlpkernels.__path__) if m.name[0] != "_"))
def test_examples_run(name: str) -> None:
    done = doctest.testmod(importlib.import_module(f"nlpkernels.{name}"), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert done.failed == 0


ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(page for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if ">>> " in page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_pages_run(page: Path) -> None:
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if ">>> " in block]
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, page.stem, str(page), 0)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_links_of_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_one_hot_times_a_matrix_is_a_lookup() -> None:
    embedding = nlpkernels.Embedding(50, 7)
    linear = nn.Linear(50, 7, bias=False)
    linear.weight.data.copy_(embedding.weight.data.t())
    ids, g = torch.randint(50, (4, 6)), torch.randn(4, 6, 7)
    looked_up, multiplied = embedding(ids), linear(nn.functional.one_hot(ids, 50).float())
    assert torch.equal(looked_up, multiplied)
    looked_up.backward(g)
    multiplied.backward(g)
    torch.testing.assert_close(embedding.weight.grad, linear.weight.grad.t())


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_counts_times_a_matrix_are_a_bag(mode: str) -> None:
    texts = [torch.randint(50, (length,)) for length in (3, 1, 9, 40)]
    lengths = torch.tensor([len(text) for text in texts])
    bag = nlpkernels.EmbeddingBag(50, 7, mode=mode)
    linear = nn.Linear(50, 7, bias=False)
    linear.weight.data.copy_(bag.weight.data.t())
    counts = torch.stack([torch.bincount(text, minlength=50) for text in texts]).float()
    pooled = bag(torch.cat(texts), offsets=lengths.cumsum(0) - lengths)
    multiplied = linear(counts) / (lengths[:, None] if mode == "mean" else 1)
    torch.testing.assert_close(pooled, multiplied)
    g = torch.randn_like(pooled)
    pooled.backward(g)
    multiplied.backward(g)
    torch.testing.assert_close(bag.weight.grad, linear.weight.grad.t())


def test_every_layer_has_an_example() -> None:
    for name in nlpkernels.__all__:
        if name not in ("functional", "optim", "revert"):
            assert ">>> " in (getattr(nlpkernels, name).__doc__ or ""), name


def test_users_code_passes_mypy_strict(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(nlpkernels.__file__).parent.parent
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--cache-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(program)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
