"""`MaskPlan`: one permutation of the tokens per sample, from which every mask of a step is read."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def len_keep(num_tokens: int, mask_ratio: float) -> int:
    """Tokens a view keeps: floor(num_tokens * (1 - mask_ratio)), as MAE (arXiv 2111.06377) counts.

    The floor is that of the decimal number written: 640 tokens at 0.9 keep 64, where the plain
    float product 63.999... would keep 63.
    """
    return floor_exact(num_tokens * (1.0 - mask_ratio))


def floor_exact(value: float) -> int:
    """Floor that forgives the rounding of a float product; for values below a million."""
    return int(value + 1e-6)


class MaskPlan(NamedTuple):
    """Complementary masks of one modality: view k keeps the ranks [k*len_keep, (k+1)*len_keep).

    token_of_rank: (B, L) int16, the shuffle; `rank_of_token`: (B, L) int16, its inverse.
    len_keep: visible tokens of a view; num_views: K; num_tokens: L. K * len_keep <= L, so the views
    are disjoint (KDC-MAE, arXiv 2411.12270). Views are numbered from 0.
    """

    token_of_rank: Tensor
    rank_of_token: Tensor
    len_keep: int
    num_views: int
    num_tokens: int

    def ids_keep(self, view: int) -> Tensor:
        """(B, len_keep) int64: the tokens view `view` keeps, in the order of its latents."""
        start = self._start(view)
        return self.token_of_rank[:, start : start + self.len_keep].long()

    def ids_masked(self, view: int) -> Tensor:
        """(B, L - len_keep) int64: the tokens view `view` lacks, by rank from its window on."""
        start = self._start(view)
        after, before = (
            self.token_of_rank[:, start + self.len_keep :],
            self.token_of_rank[:, :start],
        )
        return torch.cat([after, before], dim=1).long()

    def ids_restore(self, view: int) -> Tensor:
        """(B, L) int64: for each token its place in cat([ids_keep, ids_masked]) of this view."""
        return self._places(view).long()

    def mask(self, view: int) -> Tensor:
        """(B, L) float32: 1 for a removed token, 0 for a kept one."""
        return (self._places(view) >= self.len_keep).float()

    def to(self, device: torch.device | str) -> "MaskPlan":
        """The same plan with its tensors on `device`."""
        return self._replace(
            token_of_rank=self.token_of_rank.to(device), rank_of_token=self.rank_of_token.to(device)
        )

    @staticmethod
    def cat(plans: Sequence["MaskPlan"]) -> "MaskPlan":
        """One plan whose batch is that of all `plans`, in order; their three sizes must be equal.

        K one-view plans give the view-major rows k*B + b of K independent (overlapping) views.
        """
        if not plans:
            raise ValueError("plans is empty: MaskPlan.cat needs at least one plan")
        sizes = sorted({tuple(plan[2:]) for plan in plans})
        if len(sizes) > 1:
            raise ValueError(f"plans differ in (len_keep, num_views, num_tokens): {sizes}")
        return MaskPlan(
            torch.cat([plan.token_of_rank for plan in plans]),
            torch.cat([plan.rank_of_token for plan in plans]),
            *plans[0][2:],
        )

    def _places(self, view: int) -> Tensor:
        """`ids_restore` as int16: (rank - start) modulo L, without an integer division."""
        places = self.rank_of_token - self._start(view)
        places += (places >> 15) & self.num_tokens  # the sign bits: L where negative, else 0
        return places

    def _start(self, view: int) -> int:
        if not 0 <= view < self.num_views:
            raise ValueError(f"view={view} is not in 0..{self.num_views - 1}")
        return view * self.len_keep
