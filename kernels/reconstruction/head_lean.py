"""The head and its loss in blocks of plain torch: what `impl="torch"` runs.

A block is some samples of one view. Its predictions and targets are formed, used and dropped, in
backward once more; sums over blocks run in a fixed order, in float32 at least.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import without_autocast
from ..tokens.patches import patch_layout
from ..tokens.rows import masked_tokens
from .lean import LossPlan, patch_statistics, raw_targets

BLOCK_ELEMENTS = 2**22  # predictions alive at once: 16 MiB in float32


def static_plan(
    pixels: Tensor,
    dtype: torch.dtype,
    len_keep: int,
    num_views: int,
    patch: list[int],
    norm_pix: bool,
    masked_only: bool,
) -> LossPlan:
    """The arguments of the ops as a LossPlan."""
    layout = patch_layout(pixels, tuple(patch))
    return LossPlan(layout, len_keep, num_views, norm_pix, masked_only, dtype)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32 (float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # products of 16-bit operands are exact in float32


class HeadBlocks:
    """The samples of a batch in blocks, and what the head makes of each.

    x (K*B, L or masked, D'), weight (P, D'), bias (P,), pixels and their mean and std (C,).
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pixels: Tensor,
        statistics: tuple[Tensor | None, Tensor | None],
        token_of_rank: Tensor,
        plan: LossPlan,
    ) -> None:
        self.x, self.weight, self.pixels = x, weight, pixels
        self.bias = None if bias is None else bias.to(weight.dtype)
        self.statistics, self.plan = statistics, plan
        self.tokens = masked_tokens(token_of_rank, plan.len_keep, plan.num_views)

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """(view, samples) of every block."""
        _, batch, masked = self.tokens.shape
        step = max(1, BLOCK_ELEMENTS // (masked * self.plan.layout.num_values))
        for view in range(self.plan.num_views):
            for start in range(0, batch, step):
                yield view, slice(start, min(start + step, batch))

    def rows(self, view: int, samples: slice) -> slice:
        """The rows of x, and of everything (K*B, ...), that are this block."""
        first = view * self.tokens.shape[1]
        return slice(first + samples.start, first + samples.stop)

    def head_inputs(self, view: int, samples: slice) -> Tensor:
        """(n*masked, D'): the rows of x that predict masked patches."""
        own = self.x[self.rows(view, samples)]
        if not self.plan.masked_only:
            sample = torch.arange(own.shape[0], device=own.device).unsqueeze(1)
            own = own[sample, self.tokens[view, samples]]
        return own.reshape(-1, own.shape[2])

    def targets(
        self, view: int, samples: slice, known: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Targets (n*masked, P), and the mean and 1 / deviation of their patches (n*masked, 1)."""
        tokens = self.tokens[view : view + 1, samples]
        target = raw_targets(self.pixels[samples], tokens, self.plan, *self.statistics)
        if not self.plan.norm_pix:
            return target, target[:, :0], target[:, :0]
        if known is None:
            mean, rstd = patch_statistics(target)
        else:
            mean, rstd = known
            target.sub_(mean)
        return target.mul_(rstd), mean, rstd

    def errors(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Predictions minus targets, (n*masked, P); overwrites the targets."""
        with without_autocast(inputs.device):
            pred = F.linear(inputs, self.weight, self.bias)
        return torch.sub(pred, target, out=target)


def loss(blocks: HeadBlocks) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (K*B,); means and 1 / deviations of the masked patches (K*B*masked, 1) or (.., 0)."""
    losses, means, rstds = [], [], []
    for block in blocks:
        target, mean, rstd = blocks.targets(*block)
        error = blocks.errors(blocks.head_inputs(*block), target)
        losses.append(_block_loss(error, blocks))
        means.append(mean)
        rstds.append(rstd)
    if not losses:
        none = blocks.x.new_empty(0, int(blocks.plan.norm_pix), dtype=blocks.plan.dtype)
        return none[:, 0], none, none.clone()
    return torch.cat(losses), torch.cat(means), torch.cat(rstds)


def loss_backward(
    row_weight: Tensor, blocks: HeadBlocks, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias of the sum over rows of row_weight / 2 * squared errors."""
    sums = _Gradients(blocks)
    masked = blocks.tokens.shape[2]
    for block in blocks:
        rows = blocks.rows(*block)
        patches = slice(rows.start * masked, rows.stop * masked)
        target, _, _ = blocks.targets(*block, (mean[patches], rstd[patches]))
        inputs = blocks.head_inputs(*block)
        error = blocks.errors(inputs, target).view(-1, masked, target.shape[1])
        error.mul_(row_weight[rows].view(-1, 1, 1))
        sums.add(*block, inputs, error.flatten(0, 1))
    return sums.dx, sums.dweight, sums.dbias


def loss_and_gradients(blocks: HeadBlocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`loss` and, from the same predictions, `loss_backward` with every weight 1."""
    sums = _Gradients(blocks)
    losses = [blocks.x.new_empty(0, dtype=blocks.plan.dtype)]
    for block in blocks:
        target, _, _ = blocks.targets(*block)
        inputs = blocks.head_inputs(*block)
        error = blocks.errors(inputs, target)
        sums.add(*block, inputs, error)
        losses.append(_block_loss(error, blocks))  # overwrites the errors
    return torch.cat(losses), sums.dx, sums.dweight, sums.dbias


def _block_loss(error: Tensor, blocks: HeadBlocks) -> Tensor:
    masked, values = blocks.tokens.shape[2], error.shape[1]
    return error.square_().view(-1, masked * values).mean(1)


class _Gradients:
    """dx in the dtype of x, dweight and dbias in float32 at least, block after block."""

    def __init__(self, blocks: HeadBlocks) -> None:
        self.blocks = blocks
        x, weight = blocks.x, blocks.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.dweight = weight.new_zeros(weight.shape, dtype=wide)
        self.dbias = weight.new_zeros(weight.shape[0], dtype=wide)

    def add(self, view: int, samples: slice, inputs: Tensor, error: Tensor) -> None:
        """error: the gradient by the block's predictions (n*masked, P)."""
        blocks = self.blocks
        self.dbias += error.sum(0)
        error = error.to(inputs.dtype)
        with without_autocast(error.device):
            self.dweight += wide_product(error.t(), inputs)
            dinputs = error @ blocks.weight
        own = self.dx[blocks.rows(view, samples)]
        dinputs = dinputs.view(own.shape[0], -1, own.shape[2])
        if blocks.plan.masked_only:
            own.copy_(dinputs)
        else:
            sample = torch.arange(own.shape[0], device=own.device).unsqueeze(1)
            own.zero_()[sample, blocks.tokens[view, samples]] = dinputs
