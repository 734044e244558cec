"""convert and revert on models of other people, with random weights; skipped where their libraries are missing.

The extra `test` has stanza and tft-torch; `pip install transformers` beside the package brings the third, which is
large. None of them needs torchvision, torchaudio or lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import nlpkernels

pytestmark = pytest.mark.usefixtures("doubles")  # these tests are not about arithmetic

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


def forecaster() -> Case:
    """The Temporal Fusion Transformer of tft-torch: one LSTM reads the past, another goes on from its states."""
    tft = pytest.importorskip("tft_torch.tft")
    omegaconf = pytest.importorskip("omegaconf")
    inputs = {
        "num_historical_numeric": 2, "num_historical_categorical": 1, "historical_categorical_cardinalities": [4],
        "num_static_numeric": 2, "num_static_categorical": 1, "static_categorical_cardinalities": [3],
        "num_future_numeric": 1, "num_future_categorical": 1, "future_categorical_cardinalities": [4],
    }  # fmt: skip
    sizes = {"dropout": 0.0, "state_size": 8, "lstm_layers": 2, "attention_heads": 2, "output_quantiles": [0.1, 0.9]}
    config = {"data_props": inputs, "task_type": "regression", "target_window_start": None, "model": sizes}
    model = tft.TemporalFusionTransformer(omegaconf.OmegaConf.create(config))
    batch = {
        "historical_ts_numeric": torch.randn(3, 9, 2),
        "historical_ts_categorical": torch.randint(4, (3, 9, 1)),
        "static_feats_numeric": torch.randn(3, 2),
        "static_feats_categorical": torch.randint(3, (3, 1)),
        "future_ts_numeric": torch.randn(3, 4, 1),
        "future_ts_categorical": torch.randint(4, (3, 4, 1)),
    }
    return model, lambda model: model(batch)["predicted_quantiles"]


@pytest.mark.parametrize("make", [tagger, recogniser, codec, forecaster])
def test_round_trip(make: Callable[[], Case]) -> None:
    model, run = make()

    def results(model: nn.Module) -> list[Tensor]:
        output = run(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [output, *torch.autograd.grad(output.sin().sum(), parameters, materialize_grads=True)]

    expected, text = results(model), repr(model)
    swaps = nlpkernels.convert(model)
    assert swaps.swapped
    torch.testing.assert_close(results(model), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(results(compiled), expected)
    assert set(nlpkernels.revert(model).swapped) == set(swaps.swapped)
    assert repr(model) == text
    torch.testing.assert_close(results(model), expected, rtol=0, atol=0)
