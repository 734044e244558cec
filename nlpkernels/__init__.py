"""Recurrent and embedding layers for PyTorch from compiled kernels: names, parameters and results of torch.nn."""

from nlpkernels import functional, optim
from nlpkernels.convert import convert, revert
from nlpkernels.embedding import Embedding, EmbeddingBag
from nlpkernels.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from nlpkernels.sampling import NegativeSampling

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
    "functional",
    "optim",
    "revert",
]
