"""convert and revert: the same module, the same parameters, another class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nlpkernels

LAYERS = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "Embedding", "EmbeddingBag"]


class Tagger(nn.Module):
    """Embeddings, a stack of recurrent layers, and a layer that is used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
        self.more = nn.ModuleDict({"gru": nn.GRU(10, 4, batch_first=True), "rnn": nn.RNN(4, 4, batch_first=True)})
        self.again = self.more["rnn"]
        self.bag = nn.EmbeddingBag(20, 4, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.more["gru"](self.lstm(self.embedding(ids))[0])[0]
        return self.again(self.more["rnn"](x)[0])[0].mean(1) + self.bag(ids)


def test_round_trip(device: str) -> None:
    model = Tagger().to(device)
    ids = torch.randint(20, (3, 7), device=device)
    modules, parameters = list(model.modules()), list(model.parameters())
    calls: list[str] = []
    model.lstm.register_forward_hook(lambda *_: calls.append("lstm"))
    expected = model(ids)
    state, text = {k: v.clone() for k, v in model.state_dict().items()}, repr(model)

    swaps = nlpkernels.convert(model)
    assert set(swaps.swapped) == {"embedding", "lstm", "more.gru", "more.rnn", "bag"}
    assert type(model.lstm) is nlpkernels.LSTM
    assert type(model.again) is nlpkernels.RNN
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(ids), expected)
    assert not nlpkernels.convert(model).swapped

    assert set(nlpkernels.revert(model).swapped) == set(swaps.swapped)
    assert type(model.lstm) is nn.LSTM
    assert repr(model) == text
    assert torch.equal(model(ids), expected)
    assert calls == ["lstm"] * 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_optimizer_keeps_working(device: str) -> None:
    models = [Tagger().to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    # Of a gradient near 0, Adam with a small eps would make a step of any size.
    optimizers = [torch.optim.Adam(model.parameters(), eps=0.1) for model in models]
    for step in range(4):
        if step == 2:
            nlpkernels.convert(models[1])
        ids = torch.randint(20, (3, 7), device=device)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(ids).sin().sum().backward()
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_itself(name: str) -> None:
    layer = getattr(nn, name)(4, 3)
    nlpkernels.convert(layer)
    assert type(layer) is getattr(nlpkernels, name)
    built = getattr(nlpkernels, name)(4, 3)
    nlpkernels.revert(built)
    assert type(built) is getattr(nn, name)
    x = torch.randint(4, (2, 2)) if "Embedding" in name else torch.randn(2, 4)
    built(x), layer(x)


def test_predicate_and_subclasses() -> None:
    class Special(nn.LSTM):
        def forward(self, *args: object) -> None:  # type: ignore[override]
            return None

    model = nn.ModuleDict({"a": nn.GRU(3, 3), "b": nn.GRU(3, 3), "c": Special(3, 3)})
    swaps = nlpkernels.convert(model, lambda name, module: name != "b" and isinstance(module, nn.GRU))
    assert type(model["a"]) is nlpkernels.GRU
    assert type(model["b"]) is nn.GRU
    assert type(model["c"]) is Special
    assert "a: now nlpkernels.recurrent.GRU" in str(swaps)
    assert "c: left alone" in str(swaps)
    assert "Special" in str(swaps)
    assert str(nlpkernels.convert(nn.Linear(2, 2))) == "no layer to swap"
