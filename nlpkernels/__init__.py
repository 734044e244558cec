"""Recurrent and embedding layers for PyTorch from compiled kernels: the same names, parameters and results as torch.nn."""

from nlpkernels import functional
from nlpkernels.convert import convert, revert
from nlpkernels.embedding import Embedding, EmbeddingBag
from nlpkernels.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Embedding",
    "EmbeddingBag",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "convert",
    "functional",
    "revert",
]
