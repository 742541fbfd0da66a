"""The settings of a fine-tuning run: those of `config.py`, and what only fine-tuning has.

`config_file.py` fills these classes as it fills a pretraining run's.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from kdcmae_fast.config import (
    PRESETS,
    STRICT,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    _require,
    _require_positive,
)

CLASSIFIERS = ("cav_mae_classifier", "cav_mae_sync_classifier")
READS = {"multimodal": ("audio", "video"), "audio": ("audio",), "video": ("video",)}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What is learned, from which modalities, and how fast each part of the model learns."""

    __pydantic_config__: ClassVar[Any] = STRICT

    mode: Literal["multimodal", "audio", "video"] = "multimodal"  # what the model is given
    loss: Literal["bce", "cross_entropy"] = "cross_entropy"  # bce: any number of labels a clip
    label_smoothing: float = 0.0  # e: targets are e / classes, and 1 - e at the labels
    head_lr: float = 1.0  # rate of the head as a multiple of optim.lr
    layer_decay: float = 1.0  # rate of each layer as a share of that of the layer above it
    freeze_trunk: bool = False  # train the head alone

    def __post_init__(self) -> None:
        _require_positive(self, "head_lr", "layer_decay")
        _require(self.layer_decay <= 1, f"layer_decay={self.layer_decay}: expected at most 1")
        _require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing={self.label_smoothing}: expected a value of at least 0, below 1",
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig(DataConfig):
    """The clips to train on, as in pretraining, and those to evaluate on."""

    __pydantic_config__: ClassVar[Any] = STRICT

    eval_path: str = ""  # what data.path is, for evaluation; synthetic clips: held-out ones
    eval_clips: int | None = None  # how many, from the first on; null: all
    eval_frames: int | None = None  # frames of a clip to average over; null: data.num_frames
    eval_batch_size: int = 16  # clips per process in a forward pass

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "eval_clips", "eval_frames", "eval_batch_size")

    @property
    def evaluates(self) -> bool:
        """Whether there are clips to evaluate on."""
        return self.source == "synthetic" or self.eval_path != ""


@dataclass(frozen=True, kw_only=True)
class FinetuneTrainConfig(TrainConfig):
    """Length of a run, logging, checkpoints, and what is done with the weights of each epoch."""

    __pydantic_config__: ClassVar[Any] = STRICT

    keep_epochs: bool = False  # a model folder for every epoch, RUN/epochs/<epoch, from 1>
    average: tuple[int, int] | None = None  # epochs (from 1), first and last, whose mean to take

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average is not None:
            first, last = self.average
            _require(
                1 <= first <= last,
                f"average={list(self.average)}: expected two epochs, the first from 1 on",
            )
            _require(
                self.epochs is None or last <= self.epochs,
                f"average={list(self.average)}: the run has {self.epochs} epochs",
            )

    def keeps(self, epoch: int) -> bool:
        """Whether the weights after `epoch` (from 1) are written."""
        averaged = self.average is not None and self.average[0] <= epoch <= self.average[1]
        return self.keep_epochs or averaged


@dataclass(frozen=True, kw_only=True)
class FinetuneRunConfig:
    """A whole fine-tuning run."""

    __pydantic_config__: ClassVar[Any] = STRICT

    name: str = "cav_mae_classifier"  # CAV-MAE's and KDC-MAE's; cav_mae_sync_classifier: Sync's
    preset: str = "base"  # tiny, small, base, large
    model: ModelConfig = field(default_factory=ModelConfig)
    data: FinetuneDataConfig = field(default_factory=FinetuneDataConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)

    def __post_init__(self) -> None:
        for name, known in (("name", CLASSIFIERS), ("preset", tuple(PRESETS))):
            value = getattr(self, name)
            _require(value in known, f"{name}={value}: expected one of {', '.join(known)}")
        _require(
            self.data.source != "folder",
            "data.source=folder: a folder of videos has no labels; use shards or a manifest",
        )
        _require(
            self.data.source != "sounds",
            "data.source=sounds: a classifier is built on sound and pictures, in every mode; "
            "`kdcmae probe` classifies sounds alone",
        )
        _require(
            self.data.source != "manifest" or self.data.label_csv != "",
            "data.label_csv='': the classes are named there; data.source=manifest needs it",
        )
        for name in ("freq_mask", "time_mask"):
            rows = getattr(self.model, "num_mel_bins" if name == "freq_mask" else "audio_length")
            value = getattr(self.data, name)
            _require(value <= rows, f"data.{name}={value}: the filterbank has {rows}")
        given, mode = self.model.classifier_input, self.finetune.mode
        _require(
            not self.pairs_frames or given == mode,
            f"model.classifier_input={given}: finetune.mode={mode} needs a head for that; set both",
        )

    @property
    def pairs_frames(self) -> bool:
        """Whether every frame is paired with the sound around it (CAV-MAE Sync)."""
        return self.name == "cav_mae_sync_classifier"
