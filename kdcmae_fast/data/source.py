"""`open_dataset`: the dataset that a run's settings name."""

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data.clip import ClipDataset
from kdcmae_fast.data.events import EventClips
from kdcmae_fast.data.folder import VideoFolder
from kdcmae_fast.data.manifest import ManifestClips
from kdcmae_fast.data.media import MediaOptions
from kdcmae_fast.data.shards import ShardClips
from kdcmae_fast.data.sounds import SoundClips
from kdcmae_fast.data.synthetic import HELDOUT_CLIPS, HELDOUT_START, SyntheticClips
from kdcmae_fast.messages import require_packages

PACKAGES = {  # what reads the files of a source; all of the extra `data`
    "manifest": ("soundfile", "PIL"),
    "shards": ("soundfile", "PIL"),
    "folder": ("av", "PIL"),
    "sounds": ("soundfile",),
}
ROW_SECONDS = 0.01  # of one fbank row


def open_dataset(
    data: DataConfig, model: ModelConfig, *, seed: int, split: str = "train"
) -> ClipDataset:
    """The clips of `data`, in the model's sizes.

    split: "train", or "heldout" (synthetic clips only: 1000 that are never trained on).

    Errors: ValueError for settings that do not go together or a list that is none;
    ModuleNotFoundError where a package that reads these files is not installed.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    heldout = split == "heldout"
    if data.source == "synthetic":
        seconds = model.audio_length * ROW_SECONDS
        if data.clip_seconds is not None and data.clip_seconds < seconds:
            raise ValueError(
                f"data.clip_seconds={data.clip_seconds}: shorter than the {seconds:g} s of sound "
                f"that the model takes (audio_length={model.audio_length} rows of 10 ms)"
            )
        clips = EventClips if data.events else SyntheticClips
        return clips(
            HELDOUT_CLIPS if heldout else data.num_clips,
            seed=seed,
            img_size=model.img_size,
            clip_seconds=data.clip_seconds or seconds,
            num_frames=data.num_frames,
            first=HELDOUT_START if heldout else 0,
        )
    if heldout:
        raise ValueError(
            f"split='heldout' is for synthetic clips, not for source={data.source!r}: "
            f"give another list or folder as data.path"
        )
    options = MediaOptions.of(data, model)
    # Here, or every clip would count as damaged.
    require_packages(f"data.source={data.source}", *PACKAGES.get(data.source, ()))
    if data.source == "manifest":
        return ManifestClips(data.path, data.label_csv, options, seed=seed)
    if data.source == "shards":
        window = data.shuffle_window
        return ShardClips(data.path, data.label_csv, options, seed=seed, window=window)
    if data.source == "folder":
        return VideoFolder(data.path, options, seed=seed)
    if data.source == "sounds":
        return SoundClips(data.path, data.label_csv, options, seed=seed)
    raise ValueError(
        f"source={data.source!r} must be synthetic, manifest, shards, folder or sounds"
    )
