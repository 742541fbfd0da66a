"""The token streams of CAV-MAE / KDC-MAE base, two complementary views of each sample."""

import published_ops as published
import torch
from torch import Tensor

from kdcmae_fast import kernels

VIEWS = 2
PATCH = 16
FULL = {"audio": (64, (8, 64), 768), "image": (64, (14, 14), 768)}  # samples, grid, width
TOY = {"audio": (8, (8, 16), 192), "image": (8, (6, 6), 192)}


class Stream:
    """Shapes, masks and pixels of one modality; the decoder is two thirds as wide."""

    def __init__(self, name: str, full: bool, device: str) -> None:
        self.name, self.device = name, device
        self.batch, self.grid, self.dim = (FULL if full else TOY)[name]
        self.decoder_dim = self.dim * 2 // 3
        self.tokens = self.grid[0] * self.grid[1]
        self.keep = self.tokens // 4
        self.channels = 1 if name == "audio" else 3
        self.values = self.channels * PATCH * PATCH
        self.ids = torch.arange(self.batch, device=device)
        self.noise = torch.rand(self.batch, self.tokens, device=device)
        self.plan = kernels.complementary_masks(self.ids, self.grid, 0.75, noise=self.noise)
        self.views = published.complementary_masks(self.noise, self.keep, VIEWS)

    @property
    def shape(self) -> str:
        return f"B={self.batch} L={self.tokens}"

    def pixels(self) -> Tensor:
        """(B, T, F) audio or (B, 3, H, W) images, as the ops take them."""
        height, width = (axis * PATCH for axis in self.grid)
        if self.name == "audio":
            return torch.randn(self.batch, width, height, device=self.device)
        return torch.randn(self.batch, 3, height, width, device=self.device)

    def images(self, pixels: Tensor) -> Tensor:
        """The same as (B, C, H, W), as the published code makes it."""
        return pixels.unsqueeze(1).transpose(2, 3) if self.name == "audio" else pixels
