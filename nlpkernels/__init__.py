"""Recurrent and embedding layers for PyTorch from compiled kernels: names, parameters and results of torch.nn."""

from nlpkernels import functional, optim
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
    "optim",
    "revert",
]
