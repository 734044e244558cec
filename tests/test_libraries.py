"""convert and revert on models of other people, and other people's tools on converted layers.

Weights are random. Skipped where a library is missing: the extra `test` has all but transformers, which is large;
`pip install transformers` beside the package brings it. None of them needs torchvision, torchaudio or lightning.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import nlpkernels

doubles = pytest.mark.usefixtures("doubles")  # for tests that are not about arithmetic

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


@doubles
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


# --- torch.onnx.export, run by ONNX Runtime --------------------------------------------------------------------------


class Model(nn.Module):
    """A layer whose outputs are one flat tuple, and states an input where they are asked for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        hx = states if len(states) > 1 else states[0] if states else None
        output = self.layer(x) if hx is None else self.layer(x, hx)
        return tuple(leaf for leaf in pytree.tree_leaves(output))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: nn.RNN(4, 5, 2, bidirectional=True),
    "rnn_relu": lambda: nn.RNN(4, 5, nonlinearity="relu", bidirectional=True, batch_first=True),
    "lstm": lambda: nn.LSTM(4, 5, 2, bidirectional=True, dropout=0.5),
    "lstm_batch_first": lambda: nn.LSTM(4, 5, batch_first=True),
    "lstm_without_biases": lambda: nn.LSTM(4, 5, bias=False),
    "gru": lambda: nn.GRU(4, 5, 2, bidirectional=True),
    "rnn_cell": lambda: nn.RNNCell(4, 5),
    "lstm_cell": lambda: nn.LSTMCell(4, 5),
    "gru_cell": lambda: nn.GRUCell(4, 5),
    "embedding": lambda: nn.Embedding(9, 4, padding_idx=0),
    "bag_sum": lambda: nn.EmbeddingBag(9, 4, mode="sum"),
    "bag_mean": lambda: nn.EmbeddingBag(9, 4, mode="mean"),
    "bag_max": lambda: nn.EmbeddingBag(9, 4, mode="max"),
}


def arguments(kind: str, model: Model, with_states: bool, steps: int, batch: int) -> tuple[Tensor, ...]:
    if kind.startswith(("embedding", "bag")):
        return (torch.randint(9, (batch, steps)),)
    if kind.endswith("cell"):
        x = torch.randn(batch, 4)
        _, *states = (None, *model(x))
    else:
        x = torch.randn(batch, steps, 4) if model.layer.batch_first else torch.randn(steps, batch, 4)
        _, *states = model(x)
    return (x, *(torch.randn_like(state) for state in states)) if with_states else (x,)


@pytest.mark.parametrize("with_states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_onnx_export(kind: str, dynamo: bool, with_states: bool) -> None:
    """Run with another batch and, of layers, another length, which torch.nn's with dynamo=True do not take."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Model(LAYERS[kind]()).eval()
    is_layer = kind.startswith(("rnn", "lstm", "gru")) and not kind.endswith("cell")
    if with_states and kind.startswith(("embedding", "bag")):
        pytest.skip("it has no states")
    example, other = (arguments(kind, model, with_states, *sizes) for sizes in ((6, 3), (9, 4)))
    expected = model(*other)
    assert nlpkernels.convert(model).swapped
    dynamic: list[dict[int, Any]] = [
        {axis: f"{axis}_of_{i}" for axis in range(one.dim()) if one.shape[axis] != another.shape[axis]}
        for i, (one, another) in enumerate(zip(example, other, strict=True))
    ]
    assert len(dynamic[0]) == (2 if is_layer or not kind.endswith("cell") else 1)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters, which are deprecated, and of what they are made of
        if dynamo:
            x, *states = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in dynamic)
            given = (x, tuple(states)) if states else (x,)
            torch.onnx.export(model, example, dynamo=True, verbose=False, dynamic_shapes=given).save(file)
        else:
            names = [f"input_{i}" for i in range(len(example))]
            axes = dict(zip(names, dynamic, strict=True))
            torch.onnx.export(model, example, file, dynamo=False, input_names=names, dynamic_axes=axes)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    fed = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), other, strict=True)}
    got = [torch.from_numpy(array) for array in session.run(None, fed)]
    torch.testing.assert_close(got, list(expected), rtol=1e-4, atol=1e-5)


# --- Other tools -----------------------------------------------------------------------------------------------------


def test_quantised_embedding() -> None:
    """torchao's weights of eight bits, which are a subclass of Tensor."""
    quantization = pytest.importorskip("torchao.quantization")
    whole = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 8))
    ours = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 8))
    ours.load_state_dict(whole.state_dict())
    nlpkernels.convert(ours)
    for model in (whole, ours):
        quantization.quantize_(
            model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Embedding)
        )
    assert type(ours[0].weight) is not nn.Parameter
    ids = torch.randint(64, (3, 5))
    torch.testing.assert_close(ours(ids), whole(ids), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["embedding", "bag_sum", "gru_cell", "lstm_batch_first"])
def test_per_sample_gradients_of_opacus(kind: str) -> None:
    """torch.nn's LSTM has none, for Opacus wants its own DPLSTM in its place; nor has ours."""
    grad_sample = pytest.importorskip("opacus.grad_sample")

    def gradients(model: nn.Module) -> list[Tensor]:
        wrapped = grad_sample.GradSampleModule(model, batch_first=True, loss_reduction="sum")
        wrapped(x)[0].sin().sum().backward()
        return [parameter.grad_sample for parameter in model.parameters()]

    theirs, ours = Model(LAYERS[kind]()), Model(LAYERS[kind]())
    ours.load_state_dict(theirs.state_dict())
    nlpkernels.convert(ours)
    (x,) = arguments(kind, theirs, False, 6, 3)
    if kind.startswith("lstm"):
        for model in (theirs, ours):
            with pytest.raises(TypeError):
                gradients(model)
        return
    parameters = list(theirs.parameters())
    samples = [torch.autograd.grad(theirs(x[i : i + 1])[0].sin().sum(), parameters) for i in range(len(x))]
    torch.testing.assert_close(gradients(ours), [torch.stack(parts) for parts in zip(*samples, strict=True)])


def test_opacus_fixes_a_model_before_it_is_converted() -> None:
    validators = pytest.importorskip("opacus.validators")
    model = nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 5, batch_first=True))
    assert validators.ModuleValidator.validate(model)
    model = validators.ModuleValidator.fix(model)
    assert not validators.ModuleValidator.validate(model)
    assert set(nlpkernels.convert(model).swapped) == {"0"}
    model(torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("trajectories", ["steps", "whole", "cut"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_modules_of_torchrl(kind: str, trajectories: str) -> None:
    """One step, whole trajectories, and such as begin anew in the middle, which are cut up and padded."""
    modules = pytest.importorskip("torchrl.modules")
    tensordict = pytest.importorskip("tensordict")
    states = ["h", "c"] if kind == "LSTM" else ["h"]
    make = modules.LSTMModule if kind == "LSTM" else modules.GRUModule
    module = make(
        input_size=4, hidden_size=5, num_layers=2, in_keys=["x", *states],
        out_keys=["y", *(("next", state) for state in states)], default_recurrent_mode=trajectories != "steps",
    )  # fmt: skip
    size = (3,) if trajectories == "steps" else (3, 6)
    data = tensordict.TensorDict(
        {"x": torch.randn(*size, 4), "is_init": torch.zeros(*size, 1, dtype=torch.bool)}
        | {state: torch.randn(*size, 2, 5) for state in states},
        size,
    )
    if trajectories == "cut":
        data["is_init"][1, 3] = data["is_init"][2, 2] = data["is_init"][2, 4] = True
    runs = []
    for convert in (False, True):
        if convert:
            assert nlpkernels.convert(module).swapped
        output = module(data.clone())
        results = [output["y"], *(output["next", state] for state in states)]
        loss = sum(result.sin().sum() for result in results)
        runs.append([*results, *torch.autograd.grad(loss, list(module.parameters()))])
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)
