"""Maps that know nothing of the sound, to be scored beside every model's.

The binarisation takes half of the picture whatever a map says, so that a disc in the middle already
scores well: a figure means something only above these. S pixels a side.
"""

import numpy as np
from numpy.typing import NDArray

from kdcmae_fast.evaluation.localization_scores import SIZE, Map

DISC, SQUARE, WHOLE, RANDOM = "centred disc", "centred square", "whole picture", "random"
WRONG_SOUND, OPPOSITE = "another clip's sound", "cosine, turned round"
RANDOM_GRID = 7  # cells a side of the random map


def centred_disc(size: int = SIZE) -> Map:
    """Minus the distance to the middle of the picture."""
    x, y = _places(size)
    return -np.sqrt(x**2 + y**2).astype(np.float32)


def centred_square(size: int = SIZE) -> Map:
    """Minus the larger of the distances to the middle across and down."""
    x, y = _places(size)
    return -np.maximum(np.abs(x), np.abs(y)).astype(np.float32)


def random_map(index: int, size: int = SIZE) -> Map:
    """Noise of 7 x 7 cells, bilinear between them; the same for a clip in every run."""
    noise = np.random.default_rng((7, index)).random((RANDOM_GRID, RANDOM_GRID))
    weights = _interpolation(RANDOM_GRID, size)
    return (weights @ noise @ weights.T).astype(np.float32)


def shape_controls(index: int, size: int = SIZE) -> dict[str, Map]:
    """The control maps of clip `index` that need neither picture nor model, by name."""
    return {
        DISC: centred_disc(size),
        SQUARE: centred_square(size),
        WHOLE: np.ones((size, size), dtype=np.float32),
        RANDOM: random_map(index, size),
    }


def _places(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    line = np.arange(size) - (size - 1) / 2
    return np.broadcast_to(line, (size, size)), np.broadcast_to(line[:, None], (size, size))


def _interpolation(cells: int, size: int) -> NDArray[np.float64]:
    """(size, cells) weights of bilinear interpolation with aligned corners."""
    places = np.linspace(0, cells - 1, size)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(cells)))
