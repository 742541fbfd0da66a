"""The fine-tuning model of CAV-MAE Sync (arXiv 2505.01237): attention over a clip's frames."""

import torch
from torch import Tensor, nn

from kdcmae_fast.config import ModelConfig

from .blocks import Block
from .encoder import Encoder
from .init import init_weights
from .objectives import pool
from .pretrained import PretrainedModel


class FrameAggregator(nn.Module):
    """A learned token attends to the vectors of a clip's frames and becomes logits.

    The frames carry no position: their order does not matter.
    """

    def __init__(self, dim: int, num_classes: int, config: ModelConfig) -> None:
        super().__init__()
        if dim % config.classifier_heads:
            raise ValueError(
                f"classifier_heads={config.classifier_heads}: expected a divisor of the width {dim}"
            )
        self.token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.Sequential(
            *(
                Block(dim, config.classifier_heads, config.mlp_ratio, config.attention_impl)
                for _ in range(config.classifier_depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.normal_(self.token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, C)."""
        token = self.token.to(x.dtype).expand(x.shape[0], -1, -1)
        x = self.blocks(torch.cat([token, x], dim=1))[:, 0]
        return self.linear(self.norm(x.to(self.norm.weight.dtype)))


class CavMaeSyncClassifier(PretrainedModel):
    """CAV-MAE Sync's encoder without masking, and a head over a clip's T frames.

    config.classifier_input: what a frame is to the head. multimodal: both CLS tokens side by side
    (means over the patches where there are none), taken before the shared blocks, which it then
    has no use for. audio, video: the mean over one modality's tokens behind the shared blocks
    under the joint norms. Position tables are trained; the decoder, masking and objective fields
    of `config` are not used.
    """

    def __init__(
        self, config: ModelConfig, *, num_classes: int, name: str = "cav_mae_sync_classifier"
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        self.config = config
        self.name = name
        self.num_classes = num_classes
        self.encoder = Encoder(config, trainable_positions=True)
        width = config.embed_dim * (2 if config.classifier_input == "multimodal" else 1)
        self.aggregator = FrameAggregator(width, num_classes, config)
        init_weights(self)

    def forward(self, fbank: Tensor | None = None, frames: Tensor | None = None) -> Tensor:
        """Logits (B, C) of clips fbank (B, T, audio_length, F) and frames (B, T, 3, H, W).

        T is free. The modality that `classifier_input` leaves out may be None.
        """
        used = self.config.classifier_input
        clips: dict[str, Tensor] = {}
        if used in ("multimodal", "audio"):
            clips["audio"] = self._given("fbank", fbank, 4, "(B, T, audio_length, F)")
        if used in ("multimodal", "video"):
            clips["video"] = self._given("frames", frames, 5, "(B, T, 3, H, W)")
        shapes = {modality: tuple(pixels.shape[:2]) for modality, pixels in clips.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"fbank and frames differ in clips and frames per clip (B, T): {shapes}"
            )
        vectors = [
            self._vector(getattr(self.encoder, modality)(pixels.flatten(0, 1)))
            for modality, pixels in clips.items()
        ]
        return self.aggregator(torch.cat(vectors, dim=-1).unflatten(0, next(iter(shapes.values()))))

    def _given(self, name: str, pixels: Tensor | None, ndim: int, shape: str) -> Tensor:
        if pixels is None:
            raise ValueError(
                f"classifier_input={self.config.classifier_input!r} needs {name}, got None"
            )
        if pixels.ndim != ndim:
            raise ValueError(f"{name} must be {shape}, got {tuple(pixels.shape)}")
        if pixels.shape[1] == 0:
            raise ValueError(f"{name} has 0 frames of each clip; give at least 1")
        return pixels

    def _vector(self, tokens: Tensor) -> Tensor:
        """Tokens of one modality's private blocks -> one vector per frame, (B*T, D)."""
        if self.config.classifier_input != "multimodal":
            return pool(self.encoder.alone(tokens))
        return tokens[:, 0] if self.config.cls_token else pool(self.encoder.patches(tokens))
