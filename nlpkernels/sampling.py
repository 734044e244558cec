"""A loss over a large vocabulary that looks at the target and at a few words drawn by chance: negative sampling."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import _disable_current_modes

from nlpkernels import _ops, functional, reference
from nlpkernels._giving_way import in_graph

__all__ = ["NegativeSampling"]


class NegativeSampling(torch.nn.Module):
    """The loss of word2vec: equation 4 of Mikolov et al. 2013 (arXiv 1310.4546).

    A vector h is to have a high score with its target's row w of the table, and low ones with rows that are drawn for
    it, its negatives n:

        loss = -log sigmoid(h . w) - sum over n of log sigmoid(-h . n)

    A row is drawn in proportion to counts ** power, and never is the target itself. The numbers come from torch's
    generator: torch.manual_seed repeats them, on any number of threads.

    By default each target gets negatives of its own. With `shared` all targets of a call have the same ones, so that
    their scores are a matrix product (Ji et al. 2016, arXiv 1604.04661), though the targets' rows are stored; where one
    of them is a target, that target goes without. Draw more of them then, some tens: each call has no others.

    The table can be trained with `nlpkernels.optim`, like those of Embedding and EmbeddingBag.

    Args:
        num_embeddings: V, the rows of the table.
        embedding_dim: E, its columns.
        counts: how often each row occurs, [V]; rows of 0 are never drawn.
        negatives: how many rows are drawn for each target, or, if shared, for all of them.
        power: of the counts.
        shared: whether all targets of a call share their negatives.
        reduction: "mean" or "sum" over the targets, or "none".
        sparse: whether the table's gradient is a sparse tensor.
        device: of the table.
        dtype: of the table.

    Attributes:
        weight: the table, [V, E]; zeros at first, as in word2vec.

    Shape: h [B, E]; targets [B], int32 or int64; loss a number, or [B] without reduction. The mean of no targets is
    NaN, as of torch's losses.

    Raises:
        IndexError: a target is not a row of the table.
        RuntimeError: h's shape, dtype or device does not fit.
        TypeError: targets are not int32 or int64.
        ValueError: an argument does not fit, or fewer than two rows could be drawn.

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
        if not isinstance(negatives, int) or negatives < 0:
            raise ValueError(f"NegativeSampling: expected negatives to be 0 or more, got {negatives!r}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"NegativeSampling: expected reduction 'mean', 'sum' or 'none', got {reduction!r}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.negatives, self.power, self.shared = negatives, power, shared
        self.reduction, self.sparse = reduction, sparse
        self.weight = torch.nn.Parameter(torch.zeros(num_embeddings, embedding_dim, device=device, dtype=dtype))
        with _disable_current_modes(), torch.device("cpu"):  # whatever the table is made as
            self._line = self._line_of(counts)

    def _line_of(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`draw_negatives`' cumulative and guide.

        No buffers: they are made of the counts, so no part of the state_dict, and neither `half()` nor `to_empty()` may
        touch them.
        """
        if isinstance(counts, Tensor) and (counts.is_meta or isinstance(counts, FakeTensor)):
            raise ValueError("NegativeSampling: expected counts with data, got a meta or fake tensor")
        counts = torch.as_tensor(counts).detach().cpu().double()
        if counts.shape != (self.num_embeddings,):
            raise ValueError(
                f"NegativeSampling: expected counts of shape [{self.num_embeddings}], got {list(counts.shape)}"
            )
        weights = torch.where(counts > 0, counts**self.power, 0.0)
        if not bool(((counts >= 0) & weights.isfinite()).all()):
            raise ValueError("NegativeSampling: expected counts of 0 or more, of which a power is finite")
        if self.num_embeddings == 0:
            return torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        cumulative, guide = reference.line_of(weights)
        if self.negatives > 0 and int((cumulative.diff(prepend=cumulative.new_zeros(1)) > 0).sum()) < 2:
            raise ValueError(
                "NegativeSampling: expected two rows or more from which to draw, with a count, and a part of 2^-53 or "
                "more of all counts ** power"
            )
        return cumulative, guide

    def reset_parameters(self) -> None:
        """Set the table to zeros."""
        torch.nn.init.zeros_(self.weight)

    def draw(self, targets: Tensor) -> Tensor:
        """Negatives for targets [B]: int64 [B, negatives], or, if they are shared, [negatives]."""
        seed = torch.randint(torch.iinfo(torch.int64).max, (), device=targets.device)
        cumulative, guide = (part.to(targets.device) for part in self._line)
        if self.shared:
            none = targets.new_full((1,), -1, dtype=torch.int64)
            return _ops.draw_negatives(seed, cumulative, guide, none, self.negatives)[0]
        return _ops.draw_negatives(seed, cumulative, guide, targets.long(), self.negatives)

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        """The loss of h [B, E] for targets [B]."""
        if not (type(h) is Tensor is type(targets)) and (node := in_graph(self, h, targets)) is not None:
            return node  # type: ignore[return-value]
        dtype = getattr(targets, "dtype", None)
        if dtype not in (torch.int32, torch.int64):
            got = dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise TypeError(f"NegativeSampling: expected targets of dtype int32 or int64, got {got}")
        if targets.dim() != 1:
            raise ValueError(f"NegativeSampling: expected targets of shape [B], got {list(targets.shape)}")
        if h.dim() != 2 or h.shape[0] != targets.shape[0] or h.shape[1] != self.embedding_dim:
            raise RuntimeError(
                f"NegativeSampling: expected h of shape {[targets.shape[0], self.embedding_dim]}, got {list(h.shape)}"
            )
        if h.dtype != self.weight.dtype and _ops.autocast_dtype(h.device.type) is None:
            raise RuntimeError(f"NegativeSampling: expected h of dtype {self.weight.dtype} like weight, got {h.dtype}")
        targets = targets.long()
        own, negatives = targets.unsqueeze(1), self.draw(targets)
        if self.shared:
            rows = functional.embedding(torch.cat([targets, negatives]), self.weight, sparse=self.sparse)
            of_targets, of_negatives = rows.split([len(targets), self.negatives])
            h = h.to(rows.dtype)
            negative = (h @ of_negatives.t()).masked_fill(own == negatives, -torch.inf)
            losses = -logsigmoid((h * of_targets).sum(1)) - logsigmoid(-negative).sum(1)
        else:
            indices = torch.cat([own, negatives], dim=1)
            scores = functional.embedding_dot(h, self.weight, indices, sparse=self.sparse)
            signs = scores.new_full((1 + self.negatives,), -1)
            signs[0] = 1
            losses = -logsigmoid(scores * signs).sum(1)
        return losses if self.reduction == "none" else losses.mean() if self.reduction == "mean" else losses.sum()

    def extra_repr(self) -> str:
        """What print(module) says of it."""
        shared = ", shared=True" if self.shared else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, negatives={self.negatives}, power={self.power}{shared}"
