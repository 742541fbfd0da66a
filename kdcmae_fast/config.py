"""The settings of a run: frozen dataclasses, one per owner, and the model presets.

DeepSpeed's JSON owns batch size, gradient accumulation, precision, clipping and ZeRO; nothing here
repeats it. `config_file.py` fills these classes from a recipe (YAML) and `key=value` overrides.
A comment after a field says its unit and what it does; `kdcmae settings` prints them.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Self-distillation between the views (KDC-MAE); `on="off"` without it."""

    on: Literal["off", "joint", "joint+modality"] = "off"
    distribution: Literal["softmax", "shift", "batch_shift"] = "softmax"
    divergence: Literal["kl", "kl_12", "js"] = "kl"
    temperature: float = 1.0  # of the softmax
    stop_gradient: bool = False  # kl_12 only: no gradient into the first view


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes, masking and objective of CAV-MAE and KDC-MAE. Defaults: CAV-MAE base."""

    # Inputs
    audio_length: int = 1024  # T, fbank frames of 10 ms
    num_mel_bins: int = 128  # F
    img_size: int = 224  # pixels, square
    patch_size: int = 16  # audio: bins and frames; video: pixels
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # for uint8 frames, of 0..1
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    # Encoder
    embed_dim: int = 768
    modality_depth: int = 11  # blocks private to each modality
    shared_depth: int = 1  # blocks both modalities go through
    num_heads: int = 12
    mlp_ratio: float = 4.0
    # Decoder
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    # Masking
    num_views: int = 1  # K; K * len_keep <= L
    views: Literal["complementary", "independent"] = "complementary"
    mask_ratio: float = 0.75  # share of tokens removed
    audio_mask_ratio: float | None = None  # None: mask_ratio
    video_mask_ratio: float | None = None
    audio_mask_mode: Literal["unstructured", "time", "freq", "tf"] = "unstructured"
    mask_seed: int = 0
    restore: Literal["corrected", "released"] = "corrected"  # released: view 1's for every view
    # Objective
    norm_pix_loss: bool = True  # per-patch normalised reconstruction target
    mae_loss_weight: float = 1.0
    contrast_loss_weight: float = 0.01
    temperature: float = 0.05  # of InfoNCE
    symmetric: bool = False  # InfoNCE in both directions; False: audio for each video
    negatives: Literal["global", "local"] = "global"  # all ranks' clips, or this rank's
    distill: DistillConfig = field(default_factory=DistillConfig)
    kd_loss_weight: float = 10.0  # of the batch mean
    loss_weighting: Literal["fixed", "uncertainty"] = "fixed"
    # Execution: numerically the same results
    packed_shared: bool = True  # shared block once over joint | audio | video rows
    shared_chain: Literal["composed", "released"] = "composed"  # differ for shared_depth > 1
    activation_checkpointing: bool = False  # recompute blocks in backward to save memory
    attention_impl: Literal["auto", "sdpa", "flash_attn", "xformers", "torch"] = "auto"


PRESETS: dict[str, dict[str, int]] = {
    "tiny": dict(embed_dim=192, modality_depth=3, num_heads=3,
                 decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4),
    "small": dict(embed_dim=384, modality_depth=11, num_heads=6,
                  decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8),
    "base": dict(embed_dim=768, modality_depth=11, num_heads=12,
                 decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16),
    "large": dict(embed_dim=1024, modality_depth=23, num_heads=16,
                  decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16),
}  # fmt: skip

SYSTEMS: dict[str, dict[str, object]] = {
    "cav_mae": {},
    "kdc_mae": dict(num_views=2, distill=DistillConfig(on="joint")),
}  # what makes a system out of the shared model, under every preset


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from and how they become a batch."""

    source: Literal["synthetic", "manifest", "folder"] = "synthetic"
    path: str = ""  # manifest: JSON file; folder: the folder of videos
    label_csv: str = ""  # manifest: index,mid,display_name
    num_clips: int = 2000  # synthetic: size of the training set
    num_frames: int = 10  # frames per clip to choose one from
    dataset_mean: float = -5.081  # fbank normalisation (AudioSet), natural-log units
    dataset_std: float = 4.4849
    channel: Literal["first", "mean"] = "first"  # of multi-channel audio
    reject_silence: bool = True  # a clip of digital silence counts as bad
    max_bad_share: float = 0.05  # of the clips tried; past it the run stops
    num_workers: int = 2  # loader processes per rank


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw", "lamb", "apex_fused_lamb"] = "adamw"
    lr: float = 2e-4  # peak
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    schedule: Literal["constant", "cosine", "halving"] = "cosine"
    warmup: float = 0.05  # share of all steps, linear
    final_lr: float = 0.1  # cosine: last rate as a share of the peak
    halving_start: int = 10  # halving: first epoch at half the rate
    halving_every: int = 5  # epochs


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of a run, logging, checkpoints."""

    steps: int | None = None  # optimizer steps; exactly one of steps and epochs
    epochs: int | None = None
    seed: int = 0
    init_from: str = ""  # published checkpoint or model folder to start from
    log_every: int = 10  # steps; the only steps on which the host waits for the device
    checkpoint_every: int = 500  # steps; 0: only at the end
    keep_checkpoints: int = 2  # newest complete ones kept
    wandb: bool = False  # also log to Weights & Biases (must be installed)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole pretraining run."""

    name: str = "kdc_mae"  # system: cav_mae, kdc_mae
    preset: str = "base"  # tiny, small, base, large
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
