"""What a run trains: the engine's loop, checkpoints and logs are the same for every task."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import distributed as dist

from kdcmae_fast.config import RunConfig
from kdcmae_fast.config_file import AnyRunConfig
from kdcmae_fast.data import ClipDataset, FrontEnd, RawBatch, open_dataset
from kdcmae_fast.data.pairs import check_stored_frames
from kdcmae_fast.models import build_model
from kdcmae_fast.training.distributed import World
from kdcmae_fast.training.schedule import RunLength
from kdcmae_fast.training.weights import initial_model


class Task(Protocol):
    """One kind of run. command: its name in metrics.json."""

    command: str

    @property
    def config(self) -> AnyRunConfig: ...

    def check(self, length: RunLength) -> None:
        """ValueError for what cannot work in a run of this length; before anything is written."""
        ...

    def open_clips(self) -> ClipDataset:
        """The clips to train on."""
        ...

    def initial_model(self, *, resumed: bool) -> Any:
        """The model at step 0, equal on every rank; a resumed run loads its weights later."""
        ...

    def empty_model(self) -> Any:
        """A model of the same shape, to write weights with."""
        ...

    def connect(self, model: Any, world: World) -> None:
        """Tell the model about the other ranks."""
        ...

    def lr_scale(self, name: str) -> float:
        """A parameter's rate as a multiple of optim.lr's schedule."""
        ...

    def front_end(self) -> Callable[[RawBatch, torch.device], Any]:
        """From what the loader gives to what `forward` takes, on the device."""
        ...

    @property
    def forward(self) -> Callable[[Any, Any], Any] | None:
        """(engine, batch) -> losses; None: see `step.train_step`."""
        ...

    @property
    def watches_epochs(self) -> bool:
        """Whether `end_epoch` has anything to do."""
        ...

    def end_epoch(self, run: Any, epoch: int) -> Mapping[str, float]:
        """Called on all ranks after each epoch (from 1) and after the last step.

        Returns figures for the record of that step.
        """
        ...

    def finish(self, run: Any) -> Mapping[str, Any]:
        """Called on all ranks when model/ is written: more figures for metrics.json."""
        ...


class Pretraining:
    """Masked reconstruction, InfoNCE and distillation."""

    command = "pretrain"
    forward = None
    watches_epochs = False

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def check(self, length: RunLength) -> None:
        """Any length will do."""

    def open_clips(self) -> ClipDataset:
        """The clips of `config.data`; for frames with the sound around them enough of each."""
        data = self.config.data
        clips = open_dataset(data, self.config.model, seed=self.config.train.seed)
        if self.config.pairs_frames:
            check_stored_frames(clips, data.num_frames)
        return clips

    def initial_model(self, *, resumed: bool) -> Any:
        """See `weights.initial_model`."""
        return initial_model(self.config, resumed=resumed)

    def empty_model(self) -> Any:
        """Freshly initialised."""
        return build_model(self.config.name, self.config.preset, **vars(self.config.model))

    def connect(self, model: Any, world: World) -> None:
        """InfoNCE over all ranks, if the model wants it."""
        if self.config.model.negatives == "global" and world.size > 1:
            model.contrast_group = dist.group.WORLD

    def lr_scale(self, name: str) -> float:
        """Everything learns alike."""
        return 1.0

    def front_end(self) -> FrontEnd:
        """Filterbank and augmentation."""
        return FrontEnd(self.config.data, self.config.model)

    def end_epoch(self, run: Any, epoch: int) -> Mapping[str, float]:
        """Nothing."""
        return {}

    def finish(self, run: Any) -> Mapping[str, Any]:
        """Nothing."""
        return {}
