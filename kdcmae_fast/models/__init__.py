"""Audio-visual masked autoencoders: `build_model`, `from_pretrained` and their values."""

from kdcmae_fast.batch import Batch

from .build import build_model, from_pretrained
from .outputs import Features, Latents, Losses, Reconstruction

__all__ = [
    "Batch",
    "Features",
    "Latents",
    "Losses",
    "Reconstruction",
    "build_model",
    "from_pretrained",
]
