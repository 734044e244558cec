from collections.abc import Sequence

from torch import Tensor

compiler: str
cuda_archs: str

def has_avx512bf16() -> bool: ...
def has_amx() -> bool: ...
def has_tangent(tensors: list[Tensor]) -> bool: ...
def recurrent(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    h_mask: Tensor | None,
) -> list[Tensor]: ...
def recurrent_step(
    x: Tensor, states: Sequence[Tensor] | None, weights: list[Tensor], cell: str
) -> list[Tensor] | None: ...
def recurrent_layers(
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: list[Tensor],
    cell: str,
    layers: int,
    directions: int,
    batch_first: bool,
    is_frozen: bool,
) -> list[Tensor] | None: ...
def frozen_layers(
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: list[Tensor],
    cell: str,
    directions: int,
    batch_first: bool,
    is_cell: bool,
    inputs: int,
    hidden: int,
    features: int,
) -> list[Tensor] | None: ...
def lookup(
    input: Tensor, table: Tensor, padding_idx: int | None, scale_grad_by_freq: bool, sparse: bool
) -> Tensor | None: ...
def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mode: str,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    sparse: bool,
    updated: bool,
) -> Tensor: ...
def embedding_dot(h: Tensor, weight: Tensor, indices: Tensor, sparse: bool, updated: bool) -> Tensor: ...
def embedding_bag_update(
    grad: Tensor,
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    aux: Tensor,
    mode: str,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    rule: str,
    settings: list[float],
) -> None: ...
def check_update(
    grad: Tensor,
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    aux: Tensor,
    mode: str,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    rule: str,
    settings: list[float],
) -> None: ...
