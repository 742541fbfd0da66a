"""A tiny model and a few clips for the evaluation tests."""

from pathlib import Path

import pytest
import torch

from kdcmae_fast.config import DataConfig
from kdcmae_fast.data import Clip, ClipError, ClipFrames, open_dataset
from kdcmae_fast.models import build_model

SIZES = {
    "img_size": 32,
    "audio_length": 64,
    "num_mel_bins": 32,
    "embed_dim": 16,
    "modality_depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "mask_ratio": 0.5,
}


class WithBadClips:
    """A dataset some of whose clips cannot be read."""

    def __init__(self, dataset, bad: tuple[int, ...]) -> None:
        self.dataset = dataset
        self.bad = bad

    def __len__(self) -> int:
        return len(self.dataset)

    def video_id(self, index: int) -> str:
        return self.dataset.video_id(index)

    def read(self, index: int, epoch: int) -> Clip:
        if index in self.bad:
            raise ClipError(self.video_id(index), "the file ends early")
        return self.dataset.read(index, epoch)

    def read_frames(self, index: int, num_frames: int | None = None, **which) -> ClipFrames:
        if index in self.bad:
            raise ClipError(self.video_id(index), "the file ends early")
        return self.dataset.read_frames(index, num_frames, **which)


@pytest.fixture(scope="session")
def make_model():
    """build(name, **overrides) -> a tiny model, the same every time."""

    def build(name: str = "kdc_mae", **overrides):
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        model = build_model(name, "tiny", **{**SIZES, **overrides})
        torch.random.set_rng_state(state)
        return model

    return build


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory) -> Path:
    """The model on disk, in a run folder without a config.json."""
    folder = tmp_path_factory.mktemp("run") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def data() -> DataConfig:
    return DataConfig(num_clips=20, num_workers=2)


@pytest.fixture
def clips(data, model):
    """Held-out clips; clips(bad=(1, 4)) makes two of them unreadable."""

    def make(bad: tuple[int, ...] = ()):
        return WithBadClips(open_dataset(data, model.config, seed=0, split="heldout"), bad)

    return make
