"""convert and revert on models of other people, with random weights; skipped where their libraries are missing.

`pip install stanza transformers` beside the package brings them; neither needs torchvision or torchaudio.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import nlpkernels

Case = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def tagger() -> Case:
    """The highway LSTM under stanza's taggers and parsers: packed sequences, both directions."""
    hlstm = pytest.importorskip("stanza.models.common.hlstm")
    model = hlstm.HighwayLSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True, highway_func=torch.tanh)
    x = torch.randn(4, 7, 6)
    return model, lambda model: model(x, [7, 5, 5, 2])[0].data


def recogniser() -> Case:
    """The prediction network of Parakeet's RNN transducer, of transformers."""
    parakeet = pytest.importorskip("transformers.models.parakeet.modeling_parakeet")
    sizes = SimpleNamespace(vocab_size=20, decoder_hidden_size=8, num_decoder_layers=2, blank_token_id=0)
    model = parakeet.ParakeetRNNTDecoder(sizes)
    ids = torch.randint(20, (3, 6))
    return model, lambda model: model(ids)


def codec() -> Case:
    """Encodec's encoder, of transformers: convolutions with weight norm around an LSTM."""
    transformers = pytest.importorskip("transformers")
    config = transformers.EncodecConfig(
        num_filters=4, hidden_size=16, codebook_size=8, codebook_dim=16, upsampling_ratios=[4, 2]
    )
    model = transformers.EncodecModel(config).encoder
    x = torch.randn(2, 1, 64)
    return model, lambda model: model(x)


@pytest.mark.parametrize("make", [tagger, recogniser, codec])
def test_round_trip(make: Callable[[], Case]) -> None:
    model, run = make()

    def results() -> list[Tensor]:
        output = run(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [output, *torch.autograd.grad(output.sin().sum(), parameters, materialize_grads=True)]

    expected, text = results(), repr(model)
    swaps = nlpkernels.convert(model)
    assert swaps.swapped
    torch.testing.assert_close(results(), expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(run(compiled), expected[0], atol=1e-5, rtol=1e-4)
    assert set(nlpkernels.revert(model).swapped) == set(swaps.swapped)
    assert repr(model) == text
    torch.testing.assert_close(results(), expected, rtol=0, atol=0)
