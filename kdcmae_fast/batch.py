"""`Batch`: what the data pipeline hands to a model."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One step's clips on the device, ready for a model. B clips.

    fbank: (B, T, F) log-mel filterbank, normalised; T frames of 10 ms, F mel bins.
    frames: (B, 3, H, W), uint8, or floats already normalised; without pictures (B, 3, 0, 0).
    sample_ids: (B,) int64, each clip's index in its dataset; the masks are drawn from it.

    A model of one modality does not read the other's tensor, which may then be None, too.
    """

    fbank: Tensor
    frames: Tensor
    sample_ids: Tensor
