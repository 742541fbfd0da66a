"""The decoder: visible tokens back among mask tokens, blocks, one head per modality.

N = K*B rows, L = L_audio + L_video tokens, D' decoder width. A modality that the model does not
have (`modalities`) has no tokens, no parameters and no patches.
"""

import itertools
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

    audio_modality: nn.Parameter
    video_modality: nn.Parameter
    audio_head: ReconstructionHead
    video_head: ReconstructionHead
    audio_pos_embed: Tensor
    video_pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, pixels = config.decoder_embed_dim, config.patch_size**2
        self.restore = config.restore
        self.masked_only = config.decoder_masked_only
        self.mask_token_table = config.mask_token_table
        self.recompute = config.activation_checkpointing
        grids = {"audio": audio_grid(config), "video": video_grid(config)}
        self.grids = {name: grids[name] for name in config.modality_names}
        self.embed = nn.Linear(config.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        for name in self.grids:
            self.register_parameter(f"{name}_modality", nn.Parameter(torch.empty(1, 1, dim)))
        for name, grid in self.grids.items():
            table = sincos_positions(dim, grid).to(self.mask_token.dtype)[None]
            self.register_buffer(f"{name}_pos_embed", table)
        self.blocks = nn.ModuleList(
            Block(dim, config.decoder_num_heads, config.mlp_ratio, config.attention_impl)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.patch_values = {"audio": pixels, "video": 3 * pixels}
        for name in self.grids:
            normalised = name == "video"
            head = ReconstructionHead(dim, self.patch_values[name], config, normalised=normalised)
            setattr(self, f"{name}_head", head)
        modality_vectors = (getattr(self, f"{name}_modality") for name in self.grids)
        for parameter in (self.mask_token, *modality_vectors):
            nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        latent: Tensor,
        plans: Plans,
        masked_only: bool = True,
        batch: Batch | None = None,
    ) -> tuple[Tensor, ...]:
        """Joint latents (N, keep_audio + keep_video, D) -> audio and video predictions.

        A modality that the model does not have: (N, 0, P).

        masked_only: (N, L - keep, P) in `ids_masked` order, what the loss reads; else (N, L, P).
        batch: whose rows are the plans' rows; returns the reconstruction loss of each row and
            modality that the model has instead, (N,) each, and never holds the predictions.
        """
        own_plans = tuple(plans[name] for name in self.grids)
        positions = self._positions()
        x = assemble_decoder_input(
            self.embed(latent),
            own_plans,
            self.mask_token.flatten(),
            positions,
            restore=self.restore,
        )
        filler = self._filler(positions, plans) if self.mask_token_table else None
        wanted, sizes = None, [math.prod(grid) for grid in self.grids.values()]
        if masked_only:
            ids = self._placed([masked_tokens(plan) for plan in own_plans])
            wanted, sizes = torch.cat(ids, dim=1), [part.shape[1] for part in ids]
        for index, block in enumerate(self.blocks):
            last = self.masked_only and index == len(self.blocks) - 1
            first = filler if index == 0 else None
            x = run_block(block, x, wanted if last else None, first, recompute=self.recompute)
            wanted = None if last else wanted
        if wanted is not None:
            x = take_tokens(x, wanted)
        parts = dict(zip(self.grids, self.norm(x).split(sizes, dim=1), strict=True))
        heads = {name: getattr(self, f"{name}_head") for name in self.grids}
        if batch is None:
            predicted = {name: heads[name](part) for name, part in parts.items()}
            return tuple(
                predicted.get(name, x.new_empty(x.shape[0], 0, values))
                for name, values in self.patch_values.items()
            )
        pixels = {"audio": batch.fbank, "video": batch.frames}
        return tuple(heads[name](part, pixels[name], plans[name]) for name, part in parts.items())

    def _placed(self, ids: list[Tensor]) -> list[Tensor]:
        """Token numbers within each modality -> among the tokens of all of them."""
        starts = [0, *itertools.accumulate(math.prod(grid) for grid in self.grids.values())]
        return [part + start if start else part for part, start in zip(ids, starts, strict=False)]

    def _filler(self, positions: Tensor, plans: Plans) -> Filler:
        """The mask token at every place, and where the visible tokens are."""
        released = self.restore == "released"
        places = self._placed([kept_tokens(plans[name], released) for name in self.grids])
        return Filler(self.mask_token.flatten() + positions, torch.cat(places, dim=1))

    def _positions(self) -> Tensor:
        """(L, D') table: position and modality vector of every decoder token."""
        tables = [
            getattr(self, f"{name}_pos_embed") + getattr(self, f"{name}_modality")
            for name in self.grids
        ]
        return torch.cat(tables, dim=1)[0]
