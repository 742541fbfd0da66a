"""`Batch`: what the data pipeline hands to a model."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One step's rows on the device, ready for a model. B rows, each a frame and its sound.

    fbank: (B, T, F) log-mel filterbank, normalised; T frames of 10 ms, F mel bins.
    frames: (B, 3, H, W), uint8, or floats already normalised; without pictures (B, 3, 0, 0).
    sample_ids: (B,) int64, the masks are drawn from it: each clip's index in its dataset, or with
        segments (CAV-MAE Sync) index * frames of a clip + number of the frame.

    A model of one modality does not read the other's tensor, which may then be None, too.
    """

    fbank: Tensor
    frames: Tensor
    sample_ids: Tensor
