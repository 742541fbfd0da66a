"""Patches of one modality to tokens: projection, position and modality vector in one pass."""

import math

import torch
from torch import Tensor, nn

from kdcmae_fast.kernels import MaskPlan, embed_visible_patches

from .positions import sincos_positions


class PatchEmbed(nn.Module):
    """Embeds the visible patches of K views, or all patches.

    in_channels: 1 for fbanks, 3 for frames. grid: patches (rows, columns).
    trainable_positions: the table is a parameter (fine-tuning) instead of a buffer.
    pixel_mean, pixel_std: normalisation of uint8 pixels, per channel.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        in_channels: int,
        grid: tuple[int, int],
        patch_size: int,
        embed_dim: int,
        trainable_positions: bool = False,
        pixel_mean: tuple[float, ...] | None = None,
        pixel_std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.num_patches = grid[0] * grid[1]
        self.patch_size = patch_size
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.input_shape = self._input_shape(in_channels, grid, patch_size)
        self.weight = nn.Parameter(torch.empty(embed_dim, in_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(embed_dim))
        self.modality = nn.Parameter(torch.empty(1, 1, embed_dim))
        positions = sincos_positions(embed_dim, grid).to(self.weight.dtype)[None]
        if trainable_positions:
            self.pos_embed = nn.Parameter(positions)
        else:
            self.register_buffer("pos_embed", positions)
        self.reset_parameters()

    @staticmethod
    def _input_shape(channels: int, grid: tuple[int, int], patch: int) -> tuple[int, ...]:
        rows, columns = grid[0] * patch, grid[1] * patch
        return (columns, rows) if channels == 1 else (channels, rows, columns)  # fbank: (T, F)

    def reset_parameters(self) -> None:
        """Xavier uniform on the projection as a matrix; bias as torch's convolution has it."""
        nn.init.xavier_uniform_(self.weight.data.view(self.weight.shape[0], -1))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.normal_(self.modality, std=0.02)

    def forward(self, pixels: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, T, F) or (B, C, H, W) to tokens (K*B, keep, D); all L tokens without a plan."""
        if tuple(pixels.shape[1:]) != self.input_shape:
            kind = "fbank" if len(self.input_shape) == 2 else "frames"
            raise ValueError(
                f"{kind} must have the shape (B, {', '.join(map(str, self.input_shape))}) "
                f"of this model, got {tuple(pixels.shape)}"
            )
        if plan is None:
            plan = whole_plan(pixels.shape[0], self.num_patches, pixels.device)
        # The modality vector is the same for every token, so it rides in the bias.
        return embed_visible_patches(
            pixels,
            self.weight,
            self.bias + self.modality.flatten(),
            self.pos_embed,
            plan,
            patch_size=self.patch_size,
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
        )


def whole_plan(batch: int, num_tokens: int, device: torch.device) -> MaskPlan:
    """A plan that keeps every token in its own order."""
    order = torch.arange(num_tokens, dtype=torch.int16, device=device).repeat(batch, 1)
    return MaskPlan(order, order, len_keep=num_tokens, num_views=1, num_tokens=num_tokens)
