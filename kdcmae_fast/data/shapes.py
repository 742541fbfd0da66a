"""The shapes of the synthetic clips and the drawing of one onto a picture."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Shape(NamedTuple):
    """A shape of radius 1 around the origin, y downwards.

    distance: (x, y) -> signed distance to the outline (about; negative inside).
    extent: x0, y0, x1, y1 of its bounding box.
    pattern: (x, y) -> -1..1, where its surface is inked (positive); x and y in periods.
    ink: grey level of the ink, 0 black to 1 white.
    """

    name: str
    distance: Callable[[Array, Array], Array]
    extent: tuple[float, float, float, float]
    pattern: Callable[[Array, Array], Array]
    ink: float


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85


def _triangle(x: Array, y: Array) -> Array:
    """Upright, apex at y = -1, base at y = 0.8."""
    return np.maximum(0.87 * np.abs(x) - 0.48 * y - 0.48, y - 0.8)


def _ring(x: Array, y: Array) -> Array:
    radius = np.hypot(x, y)
    return np.maximum(radius - 1, 0.44 - radius)


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1, y - 0.3), np.maximum(x - 0.3, y - 1))


def _bar(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x) - 1, np.abs(y) - 0.33)


def _crescent(x: Array, y: Array) -> Array:
    """A disc with a smaller one bitten out of its right side."""
    outside: Array = np.hypot(x, y) - 1
    return np.maximum(outside, 0.85 - np.hypot(x - 0.65, y))


def _hourglass(x: Array, y: Array) -> Array:
    """Two triangles that touch with their tips."""
    return np.maximum(0.8 * np.abs(x) - 0.6 * np.abs(y) - 0.1, np.abs(y) - 1)


def _wave(turns: Array) -> Array:
    return np.sin(2 * np.pi * turns).astype(np.float32)


SHAPES: tuple[Shape, ...] = (
    Shape("circle", _circle, (-1, -1, 1, 1), lambda x, y: np.minimum(_wave(x), _wave(y)), 1.0),
    Shape("square", _square, (-0.85, -0.85, 0.85, 0.85), lambda x, y: _wave(x) * _wave(y), 0.0),
    Shape("triangle", _triangle, (-0.994, -1, 0.994, 0.8), lambda x, y: _wave(y + 0 * x), 1.0),
    Shape("ring", _ring, (-1, -1, 1, 1), lambda x, y: np.maximum(_wave(x), _wave(y)), 0.0),
    Shape("cross", _cross, (-1, -1, 1, 1), lambda x, y: _wave(x + 0 * y), 0.0),
    Shape("bar", _bar, (-1, -0.33, 1, 0.33), lambda x, y: np.maximum(_wave(x), _wave(y)), 1.0),
    Shape("crescent", _crescent, (-1, -1, 0.539, 1), lambda x, y: _wave(x - y), 0.5),
    Shape("hourglass", _hourglass, (-0.875, -1, 0.875, 1), lambda x, y: 0 * (x + y) - 1, 0.0),
)
PERIODS = 8  # of a pattern, across the picture
OPACITY = 0.8  # of the ink


def draw(
    canvas: Array,
    shape: Shape,
    center: tuple[float, float],
    radius: float,
    color: Array,
    *,
    patterned: bool = False,
) -> None:
    """Paint a shape onto `canvas` (H, W, 3) of 0..1, with smoothed edges.

    center: x, y, and radius: in pixels, pixel centres at half-integers. color: (3,).
    patterned: with the shape's surface pattern, else plain.
    """
    columns, x = _pixels(center[0], radius, canvas.shape[1])
    rows, y = _pixels(center[1], radius, canvas.shape[0])
    cover = np.clip(0.5 - radius * shape.distance(x[None], y[:, None]), 0, 1)[..., None]
    region = canvas[rows, columns]
    if patterned:
        scale = np.float32(PERIODS * radius / canvas.shape[1])
        bands = np.clip(0.5 + 2 * shape.pattern(x[None] * scale, y[:, None] * scale), 0, 1)
        color = color + OPACITY * bands[..., None] * (np.float32(shape.ink) - color)
    region += cover * (color - region)


def _pixels(middle: float, radius: float, size: int) -> tuple[slice, Array]:
    """The pixels of one axis that a shape may touch, and their places in the shape's units."""
    first, last = (min(max(int(middle + s * (radius + 2)), 0), size) for s in (-1, 1))
    places = (np.arange(first, last, dtype=np.float32) + np.float32(0.5 - middle)) / radius
    return slice(first, last), places.astype(np.float32)


def pixel_box(
    shape: Shape, center: tuple[float, float], radius: float, size: int
) -> tuple[float, float, float, float]:
    """Bounding box x0, y0, x1, y1 in pixels of a drawn shape, cut at the picture's edges."""
    ends = zip(center * 2, shape.extent, strict=True)
    x0, y0, x1, y1 = (min(max(c + radius * e, 0.0), float(size)) for c, e in ends)
    return x0, y0, x1, y1
