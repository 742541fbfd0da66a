"""The decoder: visible tokens back among mask tokens, blocks, one head per modality.

N = K*B rows, L = L_audio + L_video tokens, D' decoder width.
"""

import math

import torch
from torch import Tensor, nn

from kdcmae_fast.batch import Batch
from kdcmae_fast.config import ModelConfig
from kdcmae_fast.kernels import MaskPlan, assemble_decoder_input, masked_head_reconstruction_loss

from .blocks import Block, run_block
from .lean import operand_dtype
from .masking import audio_grid, video_grid
from .outputs import Plans
from .positions import sincos_positions
from .rows import Filler, kept_tokens, masked_tokens, take_tokens


class ReconstructionHead(nn.Linear):
    """Patches of one modality from decoder tokens, or what they are off by, without the patches.

    The loss is computed here, in the weight's own module: an engine that shards parameters has
    this one whole only then.
    """

    def __init__(self, dim: int, values: int, config: ModelConfig, *, normalised: bool) -> None:
        """values: of a patch. normalised: uint8 pixels are normalised as `config` says."""
        super().__init__(dim, values)
        self.patch_size, self.norm_pix = config.patch_size, config.norm_pix_loss
        self.pixel_mean = config.pixel_mean if normalised else None
        self.pixel_std = config.pixel_std if normalised else None

    def forward(
        self, x: Tensor, pixels: Tensor | None = None, plan: MaskPlan | None = None
    ) -> Tensor:
        """(N, M, D') -> (N, M, P); with pixels and their plan the loss of each row, (N,)."""
        if pixels is None or plan is None:
            return super().forward(x)
        dtype = operand_dtype(x, self.weight)
        return masked_head_reconstruction_loss(
            x.to(dtype),
            self.weight.to(dtype),
            self.bias,
            pixels,
            plan,
            patch_size=self.patch_size,
            norm_pix=self.norm_pix,
            reduction="none",
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
        )


class Decoder(nn.Module):
    """Predicts patches from the joint latents (CAV-MAE, arXiv 2210.07839)."""

    audio_pos_embed: Tensor
    video_pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, pixels = config.decoder_embed_dim, config.patch_size**2
        self.restore = config.restore
        self.masked_only = config.decoder_masked_only
        self.mask_token_table = config.mask_token_table
        self.recompute = config.activation_checkpointing
        self.num_audio = math.prod(audio_grid(config))
        self.embed = nn.Linear(config.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.audio_modality = nn.Parameter(torch.empty(1, 1, dim))
        self.video_modality = nn.Parameter(torch.empty(1, 1, dim))
        for name, grid in (("audio", audio_grid(config)), ("video", video_grid(config))):
            table = sincos_positions(dim, grid).to(self.mask_token.dtype)[None]
            self.register_buffer(f"{name}_pos_embed", table)
        self.blocks = nn.ModuleList(
            Block(dim, config.decoder_num_heads, config.mlp_ratio, config.attention_impl)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.audio_head = ReconstructionHead(dim, pixels, config, normalised=False)
        self.video_head = ReconstructionHead(dim, 3 * pixels, config, normalised=True)
        for parameter in (self.mask_token, self.audio_modality, self.video_modality):
            nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        latent: Tensor,
        plans: Plans,
        masked_only: bool = True,
        batch: Batch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Joint latents (N, keep_audio + keep_video, D) -> audio and video predictions.

        masked_only: (N, L - keep, P) in `ids_masked` order, what the loss reads; else (N, L, P).
        batch: whose rows are the plans' rows; returns the reconstruction loss of each row and
            modality instead, (N,) and (N,), and never holds the predictions.
        """
        audio_plan, video_plan = plans["audio"], plans["video"]
        positions = self._positions()
        x = assemble_decoder_input(
            self.embed(latent),
            (audio_plan, video_plan),
            self.mask_token.flatten(),
            positions,
            restore=self.restore,
        )
        filler = self._filler(positions, plans) if self.mask_token_table else None
        wanted, split = None, self.num_audio
        if masked_only:
            audio_ids = masked_tokens(audio_plan)
            wanted = torch.cat([audio_ids, masked_tokens(video_plan) + split], dim=1)
            split = audio_ids.shape[1]
        for index, block in enumerate(self.blocks):
            last = self.masked_only and index == len(self.blocks) - 1
            first = filler if index == 0 else None
            x = run_block(block, x, wanted if last else None, first, recompute=self.recompute)
            wanted = None if last else wanted
        if wanted is not None:
            x = take_tokens(x, wanted)
        x = self.norm(x)
        audio, video = x[:, :split], x[:, split:]
        if batch is None:
            return self.audio_head(audio), self.video_head(video)
        return (
            self.audio_head(audio, batch.fbank, audio_plan),
            self.video_head(video, batch.frames, video_plan),
        )

    def _filler(self, positions: Tensor, plans: Plans) -> Filler:
        """The mask token at every place, and where the visible tokens are."""
        released = self.restore == "released"
        audio, video = (kept_tokens(plans[name], released) for name in ("audio", "video"))
        places = torch.cat([audio, video + self.num_audio], dim=1)
        return Filler(self.mask_token.flatten() + positions, places)

    def _positions(self) -> Tensor:
        """(L, D') table: position and modality vector of every decoder token."""
        audio = self.audio_pos_embed + self.audio_modality
        return torch.cat([audio, self.video_pos_embed + self.video_modality], dim=1)[0]
