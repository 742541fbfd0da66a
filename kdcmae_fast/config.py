"""The settings of a run: frozen dataclasses, one per owner, and the model presets.

DeepSpeed's JSON owns batch size, gradient accumulation, precision, clipping and ZeRO; nothing here
repeats it. `config_file.py` fills these classes from a recipe (YAML) and `key=value` overrides.
A comment after a field says its unit and what it does; `kdcmae settings` prints them.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

MULTI_RATIO = (0.6, 0.9)  # between which `multi_ratio_masking` draws, CAV-MAE Sync's code
AttentionImpl = Literal["auto", "sdpa", "cpp", "blocked", "flash_attn", "xformers", "torch"]
STRICT = {"extra": "forbid", "strict": True}  # pydantic: unknown keys and wrong types are errors


def _require(condition: bool, message: str) -> None:
    """ValueError with `message`, which starts with a field's name and value."""
    if not condition:
        raise ValueError(message)


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value > 0, f"{name}={value}: expected a value above 0")


def _require_range(config: object, low: float, high: float, *names: str) -> None:
    """None passes, nan never does."""
    for name in names:
        value = getattr(config, name)
        _require(
            value is None or low <= value <= high,
            f"{name}={value}: expected a value "
            + (f"of at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"),
        )


def _require_multiple(config: object, name: str, factor: int, reason: str) -> None:
    value = getattr(config, name)
    _require(value % factor == 0, f"{name}={value}: expected a multiple of {reason}")


def _require_betas(betas: tuple[float, float]) -> None:
    _require(all(0 <= b < 1 for b in betas), f"betas={list(betas)}: expected two values in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Self-distillation between the views (KDC-MAE); `on="off"` without it."""

    __pydantic_config__: ClassVar[Any] = STRICT

    on: Literal["off", "joint", "joint+modality"] = "off"
    distribution: Literal["softmax", "shift", "batch_shift"] = "softmax"
    divergence: Literal["kl", "kl_12", "js"] = "kl"
    temperature: float = 1.0  # of the softmax
    stop_gradient: bool = False  # kl_12 only: no gradient into the first view

    def __post_init__(self) -> None:
        _require_positive(self, "temperature")
        _require(
            not self.stop_gradient or self.divergence == "kl_12",
            f"stop_gradient=True: needs divergence=kl_12, here it is {self.divergence}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes, masking and objective of CAV-MAE, KDC-MAE and CAV-MAE Sync. Defaults: CAV-MAE base."""

    __pydantic_config__: ClassVar[Any] = STRICT

    # Inputs
    # One alone: no parameters, no losses of the other, no InfoNCE; "joint" is then its own tokens.
    modalities: Literal["both", "audio", "video"] = "both"
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
    cls_token: bool = False  # one global token per modality, what InfoNCE compares
    num_registers: int = 0  # R, register tokens per modality
    register_std: float = 1.0  # of their initial values; 1 as published, 0.02 as the other tokens
    keep_registers: bool = False  # also in the single-modality passes of the shared blocks
    contrast_head_depth: int = 0  # blocks per modality between those passes and InfoNCE
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
    multi_ratio_masking: bool = False  # a ratio of 0.6 to 0.9 per step and modality
    mask_seed: int = 0
    restore: Literal["corrected", "released"] = "corrected"  # released: view 1's for every view
    # Objective
    norm_pix_loss: bool = True  # per-patch normalised reconstruction target
    mae_loss_weight: float = 1.0
    contrast_loss_weight: float = 0.01
    temperature: float = 0.05  # of InfoNCE
    symmetric: bool = False  # InfoNCE in both directions; False: audio for each video
    negatives: Literal["global", "local"] = "global"  # all ranks' clips, or this rank's
    global_local: bool = False  # InfoNCE also of the patch tokens' mean, half and half
    frames_per_clip: int = 1  # rows of a batch that are frames of one clip, side by side
    within_clip: Literal["masked", "negatives", "positives"] = "masked"  # a clip's other frames
    distill: DistillConfig = field(default_factory=DistillConfig)
    kd_loss_weight: float = 10.0  # of the batch mean
    loss_weighting: Literal["fixed", "uncertainty"] = "fixed"
    # Classifier of CAV-MAE Sync
    classifier_input: Literal["multimodal", "audio", "video"] = "multimodal"
    classifier_depth: int = 2  # blocks over a clip's frames
    classifier_heads: int = 12
    # Execution: numerically the same results
    packed_shared: bool = True  # shared block once over joint | audio | video rows
    decoder_masked_only: bool = True  # last decoder block: only rows that the loss reads
    mask_token_table: bool = False  # first decoder block: mask tokens projected once per position
    shared_chain: Literal["composed", "released"] = "composed"  # differ for shared_depth > 1
    activation_checkpointing: bool = False  # recompute blocks in backward to save memory
    attention_impl: AttentionImpl = "auto"

    def __post_init__(self) -> None:
        """ValueError, one line that names the field, for sizes no model can have."""
        inf = float("inf")
        sizes = ("audio_length", "num_mel_bins", "img_size")
        widths = (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads"))
        _require_positive(self, *sizes, "patch_size", *sum(widths, ()), "mlp_ratio", "temperature")
        _require_positive(self, "classifier_heads")
        _require_range(
            self, 1, inf, "num_views", "shared_depth", "frames_per_clip", "classifier_depth"
        )
        _require_range(self, 0, inf, "modality_depth", "decoder_depth", "contrast_head_depth")
        _require_range(self, 0, inf, "num_registers", "register_std")
        weights = ("mae_loss_weight", "contrast_loss_weight", "kd_loss_weight")
        _require_range(self, 0, inf, *weights)
        _require_range(self, 0, 1, "mask_ratio", "audio_mask_ratio", "video_mask_ratio")
        for name in sizes:
            _require_multiple(self, name, self.patch_size, f"patch_size={self.patch_size}")
        for width, heads in widths:
            _require_multiple(self, width, getattr(self, heads), f"{heads}={getattr(self, heads)}")
            _require_multiple(self, width, 4, "4 (sine-cosine positions over two axes)")
        self._require_tokens()
        self._require_views()

    @property
    def modality_names(self) -> tuple[str, ...]:
        """The modalities that the model has: "audio", "video" or both, in this order."""
        return ("audio", "video") if self.modalities == "both" else (self.modalities,)

    def _require_tokens(self) -> None:
        _require(
            self.cls_token or not self.global_local,
            "global_local=True: compares the CLS tokens too, and cls_token is False",
        )
        _require(
            self.num_registers > 0 or not self.keep_registers,
            "keep_registers=True: there are none, num_registers=0",
        )
        _require(
            self.modalities == "both" or not (self.cls_token or self.num_registers),
            f"modalities={self.modalities}: CLS and registers (CAV-MAE Sync) need both",
        )
        for name in ("audio_mask_ratio", "video_mask_ratio"):
            value = getattr(self, name)
            _require(
                value is None or not self.multi_ratio_masking,
                f"{name}={value}: multi_ratio_masking=True draws the ratio anew in every step",
            )

    def _require_views(self) -> None:
        """Every view keeps a token; complementary views fit side by side; distilling needs two."""
        patch = self.patch_size
        tokens = {
            "audio": (self.num_mel_bins // patch) * (self.audio_length // patch),
            "video": (self.img_size // patch) ** 2,
        }
        for modality in self.modality_names:
            num_tokens, name = tokens[modality], f"{modality}_mask_ratio"
            ratio = getattr(self, name)
            name, ratio = ("mask_ratio", self.mask_ratio) if ratio is None else (name, ratio)
            least, most = MULTI_RATIO if self.multi_ratio_masking else (ratio, ratio)
            keep = int(num_tokens * (1 - most) + 1e-6)
            _require(keep >= 1, f"{name}={most}: leaves none of {num_tokens} {modality} tokens")
            keep = int(num_tokens * (1 - least) + 1e-6)
            _require(
                self.views == "independent" or self.num_views * keep <= num_tokens,
                f"num_views={self.num_views}: {self.num_views} complementary views of {keep} "
                f"{modality} tokens do not fit into {num_tokens}; raise {name}={least}",
            )
        _require(
            self.distill.on == "off" or self.num_views > 1,
            f"num_views={self.num_views}: distill.on={self.distill.on} needs two views or more",
        )


PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "modality_depth": 3, "num_heads": 3,
             "decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4},
    "small": {"embed_dim": 384, "modality_depth": 11, "num_heads": 6,
              "decoder_embed_dim": 256, "decoder_depth": 4, "decoder_num_heads": 8},
    "base": {"embed_dim": 768, "modality_depth": 11, "num_heads": 12,
             "decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16},
    "large": {"embed_dim": 1024, "modality_depth": 23, "num_heads": 16,
              "decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16,
              "classifier_heads": 16},
}  # fmt: skip

# What makes a system out of the shared model, under every preset.
SYSTEMS: dict[str, dict[str, object]] = {
    "cav_mae": {},
    "kdc_mae": {"num_views": 2, "distill": DistillConfig(on="joint")},
    "cav_mae_sync": {"audio_length": 416, "cls_token": True, "num_registers": 8,
                     "contrast_loss_weight": 0.1},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from and how they become a batch."""

    __pydantic_config__: ClassVar[Any] = STRICT

    source: Literal["synthetic", "manifest", "shards", "folder", "sounds"] = "synthetic"
    # manifest: JSON file; shards: what `kdcmae prepare` made; folder: of videos; sounds: a JSON
    # file or a folder of sound files, without pictures (model.modalities=audio)
    path: str = ""
    label_csv: str = ""  # manifest, shards, sounds: index,mid,display_name
    shuffle_window: int = 16384  # shards: clips shuffled together, so that reading stays local
    num_clips: int = 2000  # synthetic: size of the training set
    clip_seconds: float | None = None  # synthetic: length; None: model.audio_length rows
    events: bool = False  # synthetic: another object sounds every 0.3 to 0.8 s
    num_frames: int = 10  # frames per clip to choose from
    # cav_mae_sync. compatible: as published, frame i of T around row i * 1024 / T of the sound.
    time_base: Literal["true", "compatible"] = "true"  # true: around the time it is shown at
    dataset_mean: float = -5.081  # fbank normalisation (AudioSet), natural-log units
    dataset_std: float = 4.4849
    channel: Literal["first", "mean"] = "first"  # of multi-channel audio
    reject_silence: bool = True  # a clip of digital silence counts as bad
    max_bad_share: float = 0.05  # of the clips tried; past it the run stops
    num_workers: int = 2  # loader processes per rank
    # Balanced: drawn with replacement, rare labels as often as common ones.
    sampling: Literal["uniform", "balanced"] = "uniform"
    # Augmentation; how is in data/augment.py
    mixup: float = 0.0  # share of clips mixed with another
    freq_mask: int = 0  # mel bins, widest masked band
    time_mask: int = 0  # rows of 10 ms, widest masked stretch
    noise: bool = False  # noise and a circular roll in time, after normalisation

    def __post_init__(self) -> None:
        _require_positive(self, "num_clips", "num_frames", "dataset_std", "shuffle_window")
        _require_range(self, 0.4, float("inf"), "clip_seconds")
        _require_range(self, 0, 1, "max_bad_share", "mixup")
        _require_range(self, 0, float("inf"), "num_workers", "freq_mask", "time_mask")
        _require(
            self.source == "synthetic" or self.path != "",
            f"path='': data.source={self.source} needs data.path",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    __pydantic_config__: ClassVar[Any] = STRICT

    name: Literal["adam", "adamw", "lamb", "apex_fused_lamb"] = "adamw"
    lr: float = 2e-4  # peak
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    schedule: Literal["constant", "cosine", "halving"] = "cosine"
    warmup: float = 0.05  # share of all steps, linear
    final_lr: float = 0.1  # cosine: last rate as a share of the peak
    halving_start: int = 10  # halving: first epoch at half the rate, from 0
    halving_every: int = 5  # epochs

    def __post_init__(self) -> None:
        _require_positive(self, "lr", "eps", "halving_every")
        _require_range(self, 0, float("inf"), "weight_decay", "halving_start")
        _require_range(self, 0, 1, "warmup", "final_lr")
        _require_betas(self.betas)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of a run, logging, checkpoints."""

    __pydantic_config__: ClassVar[Any] = STRICT

    steps: int | None = None  # optimizer steps; exactly one of steps and epochs
    epochs: int | None = None
    seed: int = 0
    init_from: str = ""  # published checkpoint or model folder to start from
    contrast_over: Literal["micro_batch", "step"] = "micro_batch"  # whose clips InfoNCE compares
    log_every: int = 10  # steps; the only steps on which the host waits for the device
    checkpoint_every: int = 500  # steps; 0: only at the end
    keep_checkpoints: int = 2  # newest complete ones kept
    wandb: bool = False  # also log to Weights & Biases (must be installed)

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "epochs", "log_every", "keep_checkpoints")
        _require_range(self, 0, float("inf"), "seed", "checkpoint_every")
        _require(
            self.steps is None or self.epochs is None,
            f"steps={self.steps}: epochs={self.epochs} is set too; set one of them to null",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole pretraining run."""

    __pydantic_config__: ClassVar[Any] = STRICT

    name: str = "kdc_mae"  # system: cav_mae, kdc_mae, cav_mae_sync
    preset: str = "base"  # tiny, small, base, large
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name, known in (("name", SYSTEMS), ("preset", PRESETS)):
            value = getattr(self, name)
            _require(value in known, f"{name}={value}: expected one of {', '.join(known)}")
        _require(
            self.train.contrast_over == "micro_batch" or self.model.contrast_loss_weight > 0,
            "train.contrast_over=step: there is no contrastive term (model.contrast_loss_weight=0)",
        )
        one = self.model.modalities
        _require(
            self.train.contrast_over == "micro_batch" or one == "both",
            f"train.contrast_over=step: there is no contrastive term (model.modalities={one})",
        )
        self._require_frames()

    def _require_frames(self) -> None:
        frames, stored = self.model.frames_per_clip, self.data.num_frames
        if not self.pairs_frames:
            _require(
                frames == 1,
                f"model.frames_per_clip={frames}: only cav_mae_sync takes several frames of a "
                f"clip, here name={self.name}",
            )
            return
        _require(
            frames <= stored,
            f"model.frames_per_clip={frames}: a clip has data.num_frames={stored} frames",
        )
        rows = self.model.audio_length
        _require(rows % 16 == 0, f"model.audio_length={rows}: expected a multiple of 16 rows")
        _require(
            self.data.time_base == "true" or rows <= 1024,
            f"model.audio_length={rows}: longer than the 1024 rows that "
            "data.time_base=compatible cuts segments from",
        )

    @property
    def pairs_frames(self) -> bool:
        """Whether every frame is paired with the sound around it (CAV-MAE Sync)."""
        return self.name == "cav_mae_sync"
