"""The encoder: one stream per modality, then blocks that both modalities share.

N rows (views and clips), L tokens, D width. The shared blocks take up to three passes with the
same attention and MLP (CAV-MAE, arXiv 2210.07839): `joint` over audio and video tokens together,
`audio` and `video` over one modality, each pass with its own norms.
"""

import torch
from torch import Tensor, nn

from kdcmae_fast.config import ModelConfig
from kdcmae_fast.kernels import MaskPlan

from .blocks import Block, Segment, SharedBlock, run_block
from .masking import audio_grid, video_grid
from .outputs import Latents, Plans
from .patch_embed import PatchEmbed

STREAMS = ("joint", "audio", "video")


class ModalityStream(nn.Module):
    """Patch embedding and the blocks private to one modality."""

    def __init__(self, patch_embed: PatchEmbed, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = config.activation_checkpointing
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.num_heads, config.mlp_ratio, config.attention_impl)
            for _ in range(config.modality_depth)
        )

    def forward(self, pixels: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """Pixels of B clips -> (K*B, keep, D); without a plan all tokens, (B, L, D)."""
        x = self.patch_embed(pixels, plan)
        for block in self.blocks:
            x = run_block(block, x, recompute=self.recompute)
        return x


class SharedStack(nn.Module):
    """The shared blocks and the final norm of each pass."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.packed = config.packed_shared
        self.recompute = config.activation_checkpointing
        self.blocks = nn.ModuleList(
            SharedBlock(
                config.embed_dim,
                config.num_heads,
                config.mlp_ratio,
                STREAMS,
                config.attention_impl,
            )
            for _ in range(config.shared_depth)
        )
        self.norm = nn.ModuleDict({stream: nn.LayerNorm(config.embed_dim) for stream in STREAMS})

    def forward(self, passes: dict[str, Tensor], chain: str = "composed") -> dict[str, Tensor]:
        """Named passes {stream: (N, L, D)} -> the same names, normalised.

        chain="released": in the single-modality passes every block restarts from the pass's
        input, so that only the last block acts, as the published pretraining code does.
        """
        start = 0
        if chain == "released":
            start = len(self.blocks) - 1
            passes = {
                s: self._run({s: x}, 0, start)[s] if s == "joint" else x for s, x in passes.items()
            }
        groups = [passes] if self.packed else [{stream: x} for stream, x in passes.items()]
        outputs: dict[str, Tensor] = {}
        for group in groups:
            outputs |= self._run(group, start)
        return {stream: self.norm[stream](x) for stream, x in outputs.items()}

    def _run(
        self, passes: dict[str, Tensor], start: int, stop: int | None = None
    ) -> dict[str, Tensor]:
        segments = tuple(Segment(name, *x.shape[:2]) for name, x in passes.items())
        rows = [x.flatten(0, 1) for x in passes.values()]
        packed = torch.cat(rows) if len(rows) > 1 else rows[0]
        for block in self.blocks[start:stop]:
            packed = run_block(block, packed, segments, recompute=self.recompute)
        parts = packed.split([s.rows * s.length for s in segments])
        return {
            s.norm: part.view(s.rows, s.length, part.shape[1])
            for part, s in zip(parts, segments, strict=True)
        }


class Encoder(nn.Module):
    """Both streams and the shared stack.

    trainable_positions: position tables are parameters (fine-tuning).
    """

    def __init__(self, config: ModelConfig, *, trainable_positions: bool = False) -> None:
        super().__init__()
        self.chain = config.shared_chain
        self.audio = ModalityStream(
            PatchEmbed(
                in_channels=1,
                grid=audio_grid(config),
                patch_size=config.patch_size,
                embed_dim=config.embed_dim,
                trainable_positions=trainable_positions,
            ),
            config,
        )
        self.video = ModalityStream(
            PatchEmbed(
                in_channels=3,
                grid=video_grid(config),
                patch_size=config.patch_size,
                embed_dim=config.embed_dim,
                trainable_positions=trainable_positions,
                pixel_mean=config.pixel_mean,
                pixel_std=config.pixel_std,
            ),
            config,
        )
        self.shared = SharedStack(config)

    def forward(
        self, fbank: Tensor, frames: Tensor, plans: Plans, streams: tuple[str, ...] = STREAMS
    ) -> Latents:
        """Masked encoding of B clips under K views; only the passes named in `streams`."""
        audio = self.audio(fbank, plans["audio"])
        video = self.video(frames, plans["video"])
        inputs = {"audio": audio, "video": video}
        if "joint" in streams:
            inputs["joint"] = torch.cat([audio, video], dim=1)
        passes = {stream: inputs[stream] for stream in STREAMS if stream in streams}
        outputs = self.shared(passes, self.chain)
        return Latents(*(outputs.get(stream) for stream in STREAMS))

    def encode(self, fbank: Tensor | None, frames: Tensor | None) -> Latents:
        """Unmasked single-modality passes of what is given; shared blocks always composed."""
        passes = {}
        if fbank is not None:
            passes["audio"] = self.audio(fbank)
        if frames is not None:
            passes["video"] = self.video(frames)
        outputs = self.shared(passes)
        return Latents(*(outputs.get(stream) for stream in STREAMS))
