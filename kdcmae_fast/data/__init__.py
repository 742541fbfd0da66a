"""Clips from synthetic scenes, manifests, shards and folders of videos, as batches for a model."""

from kdcmae_fast.data.augment import label_vectors
from kdcmae_fast.data.bad import BadClip, BadClips, TooManyBadClips
from kdcmae_fast.data.clip import Clip, ClipDataset, ClipError, ClipFrames
from kdcmae_fast.data.fbank import kaldi_fbank, remove_mean
from kdcmae_fast.data.frontend import FrontEnd, RawBatch
from kdcmae_fast.data.loader import Loader, make_loader
from kdcmae_fast.data.source import open_dataset
from kdcmae_fast.data.synthetic import SyntheticClips

__all__ = [
    "BadClip",
    "BadClips",
    "Clip",
    "ClipDataset",
    "ClipError",
    "ClipFrames",
    "FrontEnd",
    "Loader",
    "RawBatch",
    "SyntheticClips",
    "TooManyBadClips",
    "kaldi_fbank",
    "label_vectors",
    "make_loader",
    "open_dataset",
    "remove_mean",
]
