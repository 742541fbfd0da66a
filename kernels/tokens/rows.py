"""Index arithmetic of mask plans: which token, and which row of a flattened tensor, goes where.

Views are stacked view-major: row k*B + b. Index tensors here are (K, B, n) int64, 8 bytes per token
moved, made where they are used and never expanded to the width of the data.
"""

import torch
from torch import Tensor

from ..common import check_mask_plan
from ..masking import MaskPlan


def visible_tokens(token_of_rank: Tensor, len_keep: int, num_views: int) -> Tensor:
    """(K, B, keep): tokens each view keeps, in rank order, from `token_of_rank` (B, L)."""
    kept = token_of_rank[:, : num_views * len_keep].long()
    return kept.reshape(kept.shape[0], num_views, len_keep).transpose(0, 1).contiguous()


def masked_tokens(token_of_rank: Tensor, len_keep: int, num_views: int) -> Tensor:
    """(K, B, L - keep): tokens each view lacks, in the order of `MaskPlan.ids_masked`."""
    num_tokens = token_of_rank.shape[1]
    device = token_of_rank.device
    after_window = (torch.arange(num_views, device=device) + 1) * len_keep
    behind = torch.arange(num_tokens - len_keep, device=device)
    ranks = (after_window.unsqueeze(1) + behind) % num_tokens
    return token_of_rank[:, ranks].long().transpose(0, 1).contiguous()


def rows_of_samples(tokens: Tensor, num_tokens: int) -> Tensor:
    """(K*B*n,): rows of these tokens (K, B, n) in a (B, L, D) tensor flattened to (B*L, D)."""
    samples = torch.arange(tokens.shape[1], device=tokens.device)
    return (tokens + (samples * num_tokens).unsqueeze(1)).flatten()


def rows_of_views(tokens: Tensor, num_tokens: int) -> Tensor:
    """(K*B*n,): rows of these tokens (K, B, n) in a (K*B, L, D) tensor flattened to (K*B*L, D)."""
    num_views, batch, _ = tokens.shape
    rows = torch.arange(num_views * batch, device=tokens.device) * num_tokens
    return (tokens + rows.view(num_views, batch, 1)).flatten()


def place_rows(values: Tensor, rows: Tensor, zero_rows: Tensor, num_rows: int) -> Tensor:
    """(num_rows, D): `values` at `rows`, zeros at `zero_rows`; together they name each row once.

    Every element is written once and there is nothing to add up, so no atomics and no zero fill
    of the whole.
    """
    out = torch.empty(num_rows, values.shape[1], dtype=values.dtype, device=values.device)
    return out.index_copy_(0, rows, values).index_fill_(0, zero_rows, 0)


def sum_by_token(values: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """(L, D): for each token the sum of its rows of `values` (K*B*n, D); tokens (K, B, n).

    In a fixed order and without a dense (B, L, D) in between. Large batches are summed in parts:
    thousands of rows one after the other would cost a digit in float32.
    """
    batch = tokens.shape[1]
    parts = min(16, batch // 64 + 1)
    part = torch.arange(batch, device=tokens.device) % parts
    places = tokens + (part * num_tokens).unsqueeze(1)
    sums = torch.ops.aten.embedding_dense_backward(
        values, places.flatten(), parts * num_tokens, -1, False
    )
    return sums.view(parts, num_tokens, -1).sum(0)


def check_plan(name: str, plan: MaskPlan, batch: int, tokens: int, device: torch.device) -> None:
    """Raise unless `plan` is a MaskPlan of this batch and token count on `device`."""
    check_mask_plan(name, plan, batch, tokens)
    if plan.token_of_rank.device != device:
        raise ValueError(
            f"{name} is on {plan.token_of_rank.device}, the tensors on {device}; move it with .to()"
        )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors on {device}")
