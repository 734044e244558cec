"""Embedding and EmbeddingBag as modules: torch.nn's, with the lookups and the pooling done by our kernels.

Construction, parameters, initialisation, `from_pretrained`, state_dict and repr are torch.nn's own, by inheritance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlpkernels import _ops, functional
from nlpkernels._giving_way import in_graph

__all__ = ["Embedding", "EmbeddingBag"]


class Embedding(torch.nn.Embedding):
    """A table of vectors, looked up by index: `torch.nn.Embedding`, with the same arguments.

    Shape: input int32 or int64 of any shape; output [*input.shape, embedding_dim] in weight's dtype.

    An index that is not a row raises an IndexError that names it; for other errors see `functional.embedding`.

    Example:
        >>> import torch
        >>> from nlpkernels import Embedding
        >>> embedding = Embedding(10, 3, padding_idx=0)
        >>> embedding(torch.tensor([[1, 2, 0], [4, 0, 0]])).shape
        torch.Size([2, 3, 3])
    """

    _torchs = torch.nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Look up `functional.embedding(input, self.weight, ...)`."""
        if type(input) is not Tensor:
            if (node := in_graph(self, input)) is not None:
                return node  # type: ignore[return-value]
        elif self.max_norm is None:
            rows = _ops.lookup(input, self.weight, self.padding_idx, self.scale_grad_by_freq, self.sparse)
            if rows is not None:
                return rows
        return functional.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )


class EmbeddingBag(torch.nn.EmbeddingBag):
    """Means, sums or maxima of bags of vectors: `torch.nn.EmbeddingBag`, with the same arguments.

    Shape: input [B, L], or [N] with offsets [B] (or [B + 1] with include_last_offset), int32 or int64; output
    [B, embedding_dim] in weight's dtype, zeros for an empty bag. Indices equal to padding_idx are in no bag.

    per_sample_weights are taken with all modes: "mean" is then the weighted mean, "max" the maximum of weighted rows.
    Sparse gradients come out coalesced; an optimizer of `nlpkernels.optim` needs no gradient at all. An index that is
    not a row raises an IndexError that names it and its position; for other errors see `functional.embedding_bag`.

    Example:
        >>> import torch
        >>> from nlpkernels import EmbeddingBag
        >>> bag = EmbeddingBag(10, 3, mode="mean", padding_idx=0)
        >>> bag(torch.tensor([[1, 2, 0], [4, 0, 0]])).shape
        torch.Size([2, 3])
    """

    _torchs = torch.nn.EmbeddingBag

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pool `functional.embedding_bag(input, self.weight, offsets, ...)`."""
        if type(input) is not Tensor and (node := in_graph(self, input, offsets, per_sample_weights)) is not None:
            return node  # type: ignore[return-value]
        return functional.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
