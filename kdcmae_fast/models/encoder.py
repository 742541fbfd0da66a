"""The encoder: one stream per modality, then blocks that both modalities share.

N rows (views and clips), L tokens, D width. The shared blocks take up to three passes with the
same attention and MLP (CAV-MAE, arXiv 2210.07839): `joint` over audio and video tokens together,
`audio` and `video` over one modality, each pass with its own norms. CLS tokens and registers
(CAV-MAE Sync, arXiv 2505.01237) take part in their modality's blocks, never in the joint pass.
A model of one modality has its stream and that pass alone.
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


def shared_passes(config: ModelConfig) -> tuple[str, ...]:
    """The passes that the model's shared blocks have norms for."""
    return STREAMS if config.modalities == "both" else config.modality_names


class ExtraTokens(nn.Module):
    """A CLS token before and R register tokens behind the patches of one modality.

    Learned, the same in every row, without position or modality (CAV-MAE Sync, arXiv 2505.01237).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cls: nn.Parameter | None = None
        self.registers: nn.Parameter | None = None
        if config.cls_token:
            self.cls = nn.Parameter(torch.empty(1, 1, config.embed_dim))
            nn.init.normal_(self.cls, std=0.02)
        if config.num_registers:
            self.registers = nn.Parameter(torch.empty(config.num_registers, config.embed_dim))
            nn.init.normal_(self.registers, std=config.register_std)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) -> (N, 1 + L + R, D)."""
        cls, registers = (
            () if t is None else (t.to(x.dtype).expand(x.shape[0], -1, -1),)
            for t in (self.cls, self.registers)
        )
        return torch.cat([*cls, x, *registers], dim=1)


class ModalityStream(nn.Module):
    """Patch embedding and the blocks private to one modality."""

    def __init__(self, patch_embed: PatchEmbed, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = config.activation_checkpointing
        self.patch_embed = patch_embed
        self.tokens = ExtraTokens(config) if config.cls_token or config.num_registers else None
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.modality_depth))

    def forward(self, pixels: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """Pixels of B clips -> (K*B, keep, D); without a plan all tokens, (B, L, D).

        With the model's extra tokens: CLS before the patches, registers after them.
        """
        x = self.patch_embed(pixels, plan)
        if self.tokens is not None:
            x = self.tokens(x)
        for block in self.blocks:
            x = run_block(block, x, recompute=self.recompute)
        return x


class NoStream(nn.Module):
    """In place of the stream that a model of the other modality alone does not have."""

    def __init__(self, modality: str) -> None:
        super().__init__()
        self.modality = modality

    def forward(self, pixels: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """Raises ValueError."""
        other = "audio" if self.modality == "video" else "video"
        raise ValueError(f"this model has no {self.modality} (model.modalities={other})")


class SharedStack(nn.Module):
    """The shared blocks, perhaps blocks for InfoNCE alone, and the final norm of each pass."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.packed = config.packed_shared
        self.recompute = config.activation_checkpointing
        self.blocks = nn.ModuleList(
            SharedBlock(
                config.embed_dim,
                config.num_heads,
                config.mlp_ratio,
                shared_passes(config),
                config.attention_impl,
            )
            for _ in range(config.shared_depth)
        )
        depth = config.contrast_head_depth
        self.heads = nn.ModuleDict(
            {
                stream: nn.Sequential(*(_block(config) for _ in range(depth)))
                for stream in config.modality_names
                if depth
            }
        )
        self.norm = nn.ModuleDict(
            {stream: nn.LayerNorm(config.embed_dim) for stream in shared_passes(config)}
        )

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
        for stream, head in self.heads.items():
            if stream in outputs:
                outputs[stream] = run_block(head, outputs[stream], recompute=self.recompute)
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
        self.num_cls = int(config.cls_token)
        self.num_registers = config.num_registers
        self.keep_registers = config.keep_registers
        self.modalities = config.modality_names
        self.audio: ModalityStream | NoStream = NoStream("audio")
        self.video: ModalityStream | NoStream = NoStream("video")
        if "audio" in self.modalities:
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
        if "video" in self.modalities:
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
        """Masked encoding of B clips under K views; only the passes named in `streams`.

        The tensor of a modality that the model does not have is not read.
        """
        tokens = {}
        if "audio" in self.modalities:
            tokens["audio"] = self.audio(fbank, plans["audio"])
        if "video" in self.modalities:
            tokens["video"] = self.video(frames, plans["video"])
        return self._latents(self.shared(self._passes(tokens, streams), self.chain))

    def encode(
        self, fbank: Tensor | None, frames: Tensor | None, chain: str = "composed"
    ) -> Latents:
        """Unmasked single-modality passes of what is given; chain: as in `SharedStack`."""
        streams = {}
        if fbank is not None:
            streams["audio"] = self.audio(fbank)
        if frames is not None:
            streams["video"] = self.video(frames)
        return self._latents(self.shared(self._passes(streams, tuple(streams)), chain))

    def patches(self, tokens: Tensor) -> Tensor:
        """What `ModalityStream` returns, without CLS and registers."""
        return tokens[:, self.num_cls : tokens.shape[1] - self.num_registers]

    def alone(self, tokens: Tensor) -> Tensor:
        """One modality through the shared blocks under the joint norms, CLS included."""
        kept = tokens[:, : tokens.shape[1] - self.num_registers]
        return self.shared({"joint": kept}, self.chain)["joint"]

    def _passes(self, tokens: dict[str, Tensor], streams: tuple[str, ...]) -> dict[str, Tensor]:
        """Inputs of the shared blocks: CLS and patches; `joint` is of the patches alone."""
        passes = {}
        if "joint" in streams:
            passes["joint"] = torch.cat([self.patches(x) for x in tokens.values()], dim=1)
        dropped = 0 if self.keep_registers else self.num_registers
        for stream, x in tokens.items():
            if stream in streams:
                passes[stream] = x[:, : x.shape[1] - dropped]
        return passes

    def _latents(self, outputs: dict[str, Tensor]) -> Latents:
        cls, patches = {}, {}
        kept = self.num_registers if self.keep_registers else 0
        for stream, x in outputs.items():
            if stream == "joint":
                continue
            patches[stream] = x[:, self.num_cls : x.shape[1] - kept]
            cls[f"{stream}_cls"] = x[:, 0] if self.num_cls else None
        return Latents(**(dict.fromkeys(STREAMS) | outputs | patches | cls))


def _block(config: ModelConfig) -> Block:
    return Block(config.embed_dim, config.num_heads, config.mlp_ratio, config.attention_impl)
