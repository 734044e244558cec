"""Negative sampling as a module: a stand-in in plain torch, with the interface of the compiled one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nlpkernels import functional

__all__ = ["NegativeSampling"]


class NegativeSampling(torch.nn.Module):
    """The loss of word2vec (Mikolov et al. 2013): a target against words drawn by their frequency.

    Shape: h [B, E], targets int32 or int64 [B]; output a scalar, or [B] with reduction="none".
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
        self.register_buffer("cumulative", (shares.cumsum(0) / shares.sum()).to(torch.float32), persistent=False)
        self.cumulative: Tensor

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.searchsorted(self.cumulative, torch.rand(shape), right=True, out_int32=True)

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        """The loss of each example, reduced."""
        targets = targets.to(torch.int32)[:, None]
        shape = (1 if self.shared else len(targets), self.negatives)
        drawn = self.draw(shape).clamp_(max=len(self.weight) - 1).expand(len(targets), -1).contiguous()
        while (same := drawn == targets).any():
            drawn[same] = self.draw((int(same.sum()),))
        rows = functional.embedding(torch.cat([targets, drawn], 1), self.weight, sparse=self.sparse)
        scores = (rows @ h.unsqueeze(2)).squeeze(2)
        loss = -logsigmoid(scores[:, 0]) - logsigmoid(-scores[:, 1:]).sum(1)
        return {"mean": torch.mean, "sum": torch.sum, "none": torch.Tensor.clone}[self.reduction](loss)
