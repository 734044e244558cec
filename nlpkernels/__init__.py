"""Recurrent and embedding layers for PyTorch from compiled kernels: names, parameters and results of torch.nn."""

from nlpkernels import _versions

_versions.check()

from nlpkernels import functional, optim  # noqa: E402
from nlpkernels.convert import convert, freeze, revert  # noqa: E402
from nlpkernels.embedding import Embedding, EmbeddingBag  # noqa: E402
from nlpkernels.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell  # noqa: E402
from nlpkernels.sampling import NegativeSampling  # noqa: E402

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Embedding",
    "EmbeddingBag",
    "GRUCell",
    "LSTMCell",
    "NegativeSampling",
    "RNNCell",
    "convert",
    "freeze",
    "functional",
    "optim",
    "revert",
]
