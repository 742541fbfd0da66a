"""The fine-tuning model of CAV-MAE (arXiv 2210.07839): encoder, mean over tokens, linear head."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kdcmae_fast.config import ModelConfig

from .encoder import Encoder
from .init import init_weights
from .objectives import pool
from .pretrained import PretrainedModel

Mode = Literal["multimodal", "audio", "video", "missing_video", "missing_audio"]

# Per mode: the modalities it reads, and the shared-block passes whose mean the head sees.
_PASSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "multimodal": (("audio", "video"), ("joint",)),
    "audio": (("audio",), ("audio",)),
    "video": (("video",), ("video",)),
    "missing_video": (("audio",), ("joint", "audio")),
    "missing_audio": (("video",), ("joint", "video")),
}


class ClassifierHead(nn.Module):
    """LayerNorm and a linear layer on pooled features."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, C)."""
        return self.linear(self.norm(x.to(self.norm.weight.dtype)))


class CavMaeClassifier(PretrainedModel):
    """CAV-MAE's encoder without masking, and a head; position tables are trained.

    config: sizes; its decoder, masking and objective fields are not used.
    """

    def __init__(
        self, config: ModelConfig, *, num_classes: int, name: str = "cav_mae_classifier"
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        if config.cls_token or config.num_registers:
            raise ValueError(
                f"cls_token={config.cls_token}, num_registers={config.num_registers}: this head "
                "averages patch tokens; cav_mae_sync_classifier reads CLS tokens"
            )
        self.config = config
        self.name = name
        self.num_classes = num_classes
        self.encoder = Encoder(config, trainable_positions=True)
        self.head = ClassifierHead(config.embed_dim, num_classes)
        init_weights(self)

    def forward(
        self, fbank: Tensor | None = None, frames: Tensor | None = None, mode: Mode = "multimodal"
    ) -> Tensor:
        """Logits (B, C) of clips fbank (B, T, F) and frames (B, 3, H, W).

        frames (B, N, 3, H, W), N of each clip: logits (B, N, C), of every frame with the whole
        sound, whose stream runs once. In a mode that reads no video they stay (B, C).

        multimodal: both, joint norms. audio, video: one modality, its own norms.
        missing_video, missing_audio: for a model trained on both, where only the other modality is
        given: mean of the joint-norm and the own-norm pass.
        A modality that the mode does not read may be None and is not looked at.
        """
        if mode not in _PASSES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(get_args(Mode))}")
        reads, streams = _PASSES[mode]
        given = {"audio": fbank, "video": frames}
        missing = [{"audio": "fbank", "video": "frames"}[m] for m in reads if given[m] is None]
        if missing:
            raise ValueError(f"mode={mode!r} needs {' and '.join(missing)}, got None")
        clips = [pixels.shape[0] for m in reads if (pixels := given[m]) is not None]
        if clips[0] != clips[-1]:
            raise ValueError(f"frames has {clips[-1]} clips, fbank has {clips[0]}")
        count = 0  # frames of each clip, 0 where there is no such axis
        if frames is not None and frames.ndim == 5 and "video" in reads:
            count = frames.shape[1]
            if count == 0:
                raise ValueError("frames has 0 frames of each clip; give at least 1")
            given["video"] = frames.flatten(0, 1)
        tokens = [getattr(self.encoder, m)(given[m]) for m in reads]
        if count and "audio" in reads:
            tokens[0] = tokens[0].repeat_interleave(count, dim=0)
        x = torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0]
        passes = self.encoder.shared(dict.fromkeys(streams, x))
        pooled = torch.stack([pool(x) for x in passes.values()]).mean(dim=0)
        logits = self.head(pooled)
        return logits.unflatten(0, (-1, count)) if count else logits
