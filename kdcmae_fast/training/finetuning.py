"""Fine-tuning as a task of the engine: a pretrained encoder, a new head, labels."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist

from kdcmae_fast.data import ClipDataset, FrontEnd, RawBatch, label_vectors, open_dataset
from kdcmae_fast.data.classes import LabelledClips, classes_of_data
from kdcmae_fast.evaluation.class_evaluation import Evaluation, evaluate_classifier, num_evaluated
from kdcmae_fast.evaluation.classification import SHORT, headline, open_eval_clips
from kdcmae_fast.evaluation.classifier_record import ClassifierRecord, read_record
from kdcmae_fast.evaluation.weight_average import average_weights, epoch_folders
from kdcmae_fast.finetune_config import FinetuneConfig, FinetuneRunConfig
from kdcmae_fast.models import build_model, from_pretrained
from kdcmae_fast.training.distributed import World
from kdcmae_fast.training.layers import is_trunk, layer_scale, unread_parameters
from kdcmae_fast.training.schedule import RunLength
from kdcmae_fast.training.start_model import check_head
from kdcmae_fast.training.weights import full_weights, start_weights

logger = logging.getLogger(__name__)


class LabelledBatch(NamedTuple):
    """B clips with their targets.

    fbank, frames: as in `Batch`, for CAV-MAE Sync (B, n, ...), n frames of each clip. targets:
    (B, C) float32.
    """

    fbank: Tensor
    frames: Tensor
    targets: Tensor


class ClassLoss(NamedTuple):
    """The loss of a batch, a scalar on the device."""

    total: Tensor

    def named(self) -> dict[str, Tensor]:
        """For the logs."""
        return {"total": self.total}


class LabelledFrontEnd:
    """`FrontEnd`, and targets that are mixed with the weights the clips are mixed with."""

    def __init__(self, config: FinetuneRunConfig, num_classes: int) -> None:
        self.front_end = FrontEnd(config.data, config.model)
        self.smoothing = config.finetune.label_smoothing
        self.num_classes = num_classes
        self.pairs_frames = config.pairs_frames

    def __call__(self, raw: RawBatch, device: torch.device) -> LabelledBatch:
        """Copies `raw` to `device` and returns its batch there."""
        mixed = None if raw.augment is None else raw.augment.mixed
        classes = raw.labels[:, None] if raw.classes is None else raw.classes
        targets = label_vectors(classes, self.num_classes, self.smoothing, mixed)
        batch = self.front_end(raw, device)
        fbank, frames = batch.fbank, batch.frames
        if self.pairs_frames:  # rows of one clip side by side
            fbank, frames = (x.unflatten(0, (len(classes), -1)) for x in (fbank, frames))
        return LabelledBatch(fbank, frames, targets.to(device, non_blocking=True))


class Finetuning:
    """A classifier on a pretrained encoder."""

    command = "finetune"

    def __init__(self, config: FinetuneRunConfig) -> None:
        self.config = config
        self.classes = classes_of_data(config.data)
        self._check_head()
        self.eval_clips: ClipDataset | None = None
        if config.data.evaluates:
            self.eval_clips = open_eval_clips(config, config.model)
            num_evaluated(self.eval_clips, config.data)
        else:
            logger.warning("data.eval_path='': nothing is evaluated during this run")
        self.evaluated: dict[str, Any] | None = None  # after the last step

    def check(self, length: RunLength) -> None:
        """ValueError where the epochs to average are not all there."""
        average, epochs = self.config.train.average, length.epoch(length.total_steps - 1) + 1
        if average is not None and average[1] > epochs:
            raise ValueError(f"train.average={list(average)}: the run has {epochs} epochs")

    def open_clips(self) -> ClipDataset:
        """The clips to train on; one without a label counts as bad."""
        seed = self.config.train.seed
        return LabelledClips(open_dataset(self.config.data, self.config.model, seed=seed))

    def initial_model(self, *, resumed: bool) -> Any:
        """Encoder from train.init_from, every weight of it; the head is new. Else all is."""
        torch.manual_seed(self.config.train.seed)
        model = self.empty_model()
        if not resumed:
            start_weights(model, self.config.train.init_from)
        unread = unread_parameters(model, self.config.finetune.mode)
        for name, parameter in model.named_parameters():
            frozen = self.config.finetune.freeze_trunk and is_trunk(name)
            parameter.requires_grad_(not frozen and name not in unread)
        return model

    def empty_model(self) -> Any:
        """Freshly initialised."""
        config = self.config
        sizes = {**vars(config.model), "num_classes": len(self.classes.mids)}
        return build_model(config.name, config.preset, **sizes)

    def connect(self, model: Any, world: World) -> None:
        """The ranks share gradients alone."""

    def lr_scale(self, name: str) -> float:
        """head_lr for the head, layer_decay for the depth of everything else."""
        return layer_scale(name, self.config.model, self.config.finetune)

    def front_end(self) -> LabelledFrontEnd:
        """Filterbank, augmentation, targets."""
        return LabelledFrontEnd(self.config, len(self.classes.mids))

    def forward(self, engine: Any, batch: LabelledBatch) -> ClassLoss:
        """The loss of a batch."""
        logits = self.logits(engine, batch.fbank, batch.frames)
        return ClassLoss(class_loss(logits, batch.targets, self.config.finetune))

    def logits(self, model: Any, fbank: Tensor, frames: Tensor) -> Tensor:
        """What `model`, or an engine of it, says of a batch in the mode that is trained."""
        if self.config.pairs_frames:  # its head takes what it takes
            return model(fbank=fbank, frames=frames)
        return model(fbank=fbank, frames=frames, mode=self.config.finetune.mode)

    @property
    def watches_epochs(self) -> bool:
        """Whether `end_epoch` has anything to do."""
        train = self.config.train
        return self.eval_clips is not None or train.keep_epochs or train.average is not None

    def end_epoch(self, run: Any, epoch: int) -> Mapping[str, float]:
        """Evaluate, and write the epoch's model folder if it is kept."""
        if self.config.train.keeps(epoch):
            weights = full_weights(run.engine, on_main=run.world.is_main)
            if run.world.is_main:
                folder = run.output / "epochs" / str(epoch)
                self.empty_model().save_pretrained(folder, state_dict={**run.untrained, **weights})
                self.record().write(folder)
        if self.eval_clips is None:
            return {}
        self.evaluated = self._evaluate(run.engine, run.world)
        return {
            f"eval/{name}": self.evaluated[name]
            for name in SHORT
            if name != "chance" and self.evaluated.get(name) is not None
        }

    def finish(self, run: Any) -> Mapping[str, Any]:
        """The last evaluation, and the average of the epochs' weights with its evaluation."""
        figures: dict[str, Any] = {"class_names": list(self.classes.names)}
        if run.world.is_main:
            self.record().write(run.output / "model")
        if self.eval_clips is not None:
            if self.evaluated is None:  # killed between the last checkpoint and here
                self.evaluated = self._evaluate(run.engine, run.world)
            figures = {**figures, "headline": headline(self.evaluated), **self.evaluated}
        if self.config.train.average is not None:
            figures["average"] = self._average(run, *self.config.train.average)
        figures["eval_bad_clips"] = figures.pop("bad_clips", [])
        return figures

    def record(self) -> ClassifierRecord:
        """What classifier.json says."""
        finetune = self.config.finetune
        return ClassifierRecord(finetune.mode, finetune.loss, self.classes)

    def _average(self, run: Any, first: int, last: int) -> dict[str, Any]:
        folder = run.output / "average"
        if run.world.is_main:
            average_weights(epoch_folders(run.output, first, last), folder)
        dist.barrier()
        figures: dict[str, Any] = {"epochs": [first, last], "model": folder.name}
        if self.eval_clips is not None:
            model = from_pretrained(folder).to(run.world.device).eval()
            found = self._evaluate(model, run.world)
            figures |= {name: found[name] for name in (*SHORT, "num_clips") if name in found}
        return figures

    def _evaluate(self, model: Any, world: World) -> dict[str, Any]:
        config = self.config
        assert self.eval_clips is not None  # whoever calls has looked
        model.eval()
        found = evaluate_classifier(
            lambda fbank, frames: self.logits(model, fbank, frames),
            Evaluation(
                dataset=self.eval_clips,
                data=config.data,
                model=config.model,
                loss=config.finetune.loss,
                num_classes=len(self.classes.mids),
                device=world.device,
                pairs_frames=config.pairs_frames,
                rank=world.rank,
                world_size=world.size,
            ),
        )
        model.train()
        return found

    def _check_head(self) -> None:
        """ValueError where the run starts from a model with another head."""
        folder = self.config.train.init_from
        if folder and Path(folder).is_dir():
            check_head(folder, read_record(folder), self.classes)


def class_loss(logits: Tensor, targets: Tensor, finetune: FinetuneConfig) -> Tensor:
    """Logits (B, C) against targets (B, C) in fp32, a scalar: mean over clips, bce also classes."""
    if finetune.loss == "bce":
        return F.binary_cross_entropy_with_logits(logits.float(), targets)
    return F.cross_entropy(logits.float(), targets)
