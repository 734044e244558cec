"""Negative sampling as a module: a stand-in in plain torch, with the interface of the compiled one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nlpkernels import functional

__all__ = ["NegativeSampling"]

_PLACES = 1 << 20


class NegativeSampling(torch.nn.Module):
    """The loss of word2vec (Mikolov et al. 2013): a target against words drawn by their frequency.

    Shape: h [B, E], targets int32 or int64 [B]; output a scalar, or [B] with reduction="none".

    Example:
        >>> import torch
        >>> from nlpkernels import NegativeSampling
        >>> loss = NegativeSampling(4, 3, counts=torch.tensor([8, 4, 2, 1]), negatives=2)
        >>> loss(torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0]))  # log 2 for each of three scores that are 0
        tensor(2.0794, grad_fn=<MeanBackward0>)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        counts: Tensor,
        negatives: int = 5,
        power: float = 0.75,
        *,
        shared: bool = False,
        reduction: str = "mean",
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.negatives, self.shared, self.reduction, self.sparse = negatives, shared, reduction, sparse
        self.weight = torch.nn.Parameter(torch.zeros(num_embeddings, embedding_dim, device=device, dtype=dtype))
        shares = counts.to(torch.float64) ** power
        # A place in this table for each draw: a word has as many as its share asks for.
        ends = (shares.cumsum(0) / shares.sum() * _PLACES).round().to(torch.int64)
        places = torch.arange(num_embeddings, dtype=torch.int32).repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))
        self.register_buffer("places", places.to(device), persistent=False)
        self.places: Tensor

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        return self.places[torch.randint(_PLACES, shape)]

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        """The loss of each example, reduced."""
        targets = targets.to(torch.int32)[:, None]
        shape = (1 if self.shared else len(targets), self.negatives)
        drawn = self.draw(shape).expand(len(targets), -1).contiguous()
        while (same := drawn == targets).any():
            drawn[same] = self.draw((int(same.sum()),))
        rows = functional.embedding(torch.cat([targets, drawn], 1), self.weight, sparse=self.sparse)
        scores = (rows * h.unsqueeze(1)).sum(2)
        loss = -logsigmoid(scores[:, 0]) - logsigmoid(-scores[:, 1:]).sum(1)
        return {"mean": torch.mean, "sum": torch.sum, "none": torch.Tensor.clone}[self.reduction](loss)
