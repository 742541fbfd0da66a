"""Pixels of any grid as patches: layout, gathering single patches, channel normalisation.

Three layouts of pixels, told apart by their number of axes:
    audio  (B, T, F)         grid (F/pF, T/pT), token = f * (T/pT) + t (frequency-major)
    image  (B, C, H, W)      grid (H/pH, W/pW), row-major
    video  (B, C, T, H, W)   grid (T/pT, H/pH, W/pW), row-major
Three orders of the P values of a patch:
    memory   as the pixels lie in memory: (pT, pF), (C, pH, pW), (C, pT, pH, pW)
    conv     as a convolution's weight has them: (1, pF, pT), (C, pH, pW), (C, pT, pH, pW)
    target   as reconstruction heads predict them: (pF, pT), (pH, pW, C), (pT, pH, pW, C)
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import check_ndim, check_shape

PatchSize = int | Sequence[int]

_LAYOUTS = {3: "(B, T, F)", 4: "(B, C, H, W)", 5: "(B, C, T, H, W)"}


class PatchLayout(NamedTuple):
    """How pixels of one shape are cut; `grid` and `patch` in token order (audio: freq, time)."""

    grid: tuple[int, ...]
    patch: tuple[int, ...]
    channels: int
    audio: bool

    @property
    def num_tokens(self) -> int:
        """L, patches per sample."""
        return math.prod(self.grid)

    @property
    def num_values(self) -> int:
        """P, values per patch."""
        return self.channels * math.prod(self.patch)

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """The axes of a patch in memory order."""
        return self.patch[::-1] if self.audio else (self.channels, *self.patch)

    @property
    def memory_to_target(self) -> tuple[int, ...]:
        """Permutation of `memory_shape` that gives the target order."""
        return (1, 0) if self.audio else (*range(1, 1 + len(self.patch)), 0)


def patch_layout(pixels: Tensor, patch_size: PatchSize) -> PatchLayout:
    """Layout of `pixels` cut into patches of `patch_size`; ValueError if they do not divide."""
    check_ndim("pixels", pixels, tuple(_LAYOUTS), " or ".join(_LAYOUTS.values()))
    audio = pixels.dim() == 3
    sides = tuple(pixels.shape[1:][::-1] if audio else pixels.shape[2:])
    patch: tuple[Any, ...] = (patch_size,) * len(sides)
    if isinstance(patch_size, Sequence):
        patch = tuple(patch_size)
    axes = {3: "(F, T)", 4: "(H, W)", 5: "(T, H, W)"}[pixels.dim()]
    whole = all(isinstance(extent, (Integral, torch.SymInt)) for extent in patch)
    if len(patch) != len(sides) or not whole or min(patch) < 1:
        raise ValueError(
            f"patch_size must be a positive int or one per axis of {axes}, got {patch_size!r}"
        )
    if any(side % extent for side, extent in zip(sides, patch, strict=True)):
        raise ValueError(
            f"patch_size {patch} does not divide {axes} = {sides} of the pixels; pad or crop them"
        )
    grid = tuple(side // extent for side, extent in zip(sides, patch, strict=True))
    return PatchLayout(grid, patch, 1 if audio else pixels.shape[1], audio)


def patch_grid(pixels: Tensor, patch_size: PatchSize) -> tuple[int, ...]:
    """Patches per axis in token order: (freq, time), (row, col) or (time, row, col).

    pixels: (B, T, F), (B, C, H, W) or (B, C, T, H, W). patch_size: an int for all axes, or one per
    grid axis: (pF, pT), (pH, pW), (pT, pH, pW). Errors: ValueError unless it divides every axis.
    """
    return patch_layout(pixels, patch_size).grid


def patchify(pixels: Tensor, patch_size: PatchSize) -> Tensor:
    """All patches, (B, L, P) in target order (channel fastest; audio: mel offset, time offset).

    pixels, patch_size, errors: as `patch_grid`. Same dtype as the pixels.
    """
    layout = patch_layout(pixels, patch_size)
    blocks = _blocks(pixels, layout)
    order = [2 + axis for axis in layout.memory_to_target]
    return blocks.permute(0, 1, *order).reshape(
        pixels.shape[0], layout.num_tokens, layout.num_values
    )


def unpatchify(patches: Tensor, pixel_shape: Sequence[int], patch_size: PatchSize) -> Tensor:
    """The inverse of `patchify`: (B, L, P) -> pixels of shape (B, *pixel_shape).

    pixel_shape: (T, F), (C, H, W) or (C, T, H, W). Errors: ValueError if the sizes do not agree.
    """
    check_ndim("patches", patches, 3, "(B, L, P)")
    batch = patches.shape[0]
    layout = patch_layout(patches.new_empty(0, *pixel_shape), patch_size)
    check_shape("patches", patches, (batch, layout.num_tokens, layout.num_values), "(B, L, P)")
    if layout.audio:
        split = patches.view(batch, *layout.grid, *layout.patch)
        return split.permute(0, 2, 4, 1, 3).reshape(batch, *pixel_shape)
    axes = len(layout.grid)
    split = patches.reshape(batch, *layout.grid, *layout.patch, layout.channels)
    order = [1 + axis + side for axis in range(axes) for side in (0, axes)]
    return split.permute(0, 1 + 2 * axes, *order).reshape(batch, *pixel_shape)


def _blocks(pixels: Tensor, layout: PatchLayout) -> Tensor:
    """(B, L, *memory_shape), copied for lack of a view."""
    batch = pixels.shape[0]
    if layout.audio:
        (freq, time), (p_freq, p_time) = layout.grid, layout.patch
        split = pixels.reshape(batch, time, p_time, freq, p_freq)
        return split.permute(0, 3, 1, 2, 4).reshape(batch, layout.num_tokens, *layout.memory_shape)
    sides = [n for pair in zip(layout.grid, layout.patch, strict=True) for n in pair]
    split = pixels.reshape(batch, layout.channels, *sides)
    grid_axes = range(2, split.dim(), 2)
    patch_axes = range(3, split.dim(), 2)
    return split.permute(0, *grid_axes, 1, *patch_axes).reshape(
        batch, layout.num_tokens, *layout.memory_shape
    )


def gather_patches(pixels: Tensor, tokens: Tensor, patch_size: PatchSize) -> Tensor:
    """The patches of the given tokens only, in memory order and in the dtype of the pixels.

    pixels: as `patch_grid`; others than contiguous are copied once. tokens: (..., B, n) integers,
    row b of sample b. Returns (..., B, n, P).

    Runs of pF (audio) or pW pixels are contiguous, so this is one `index_select` of such runs.
    """
    layout = patch_layout(pixels, patch_size)
    *outer, (run, column) = _coordinates(tokens.long(), layout)
    # first: number of the first run of each patch; offsets: its other runs, relative to that one.
    first = torch.arange(pixels.shape[0], device=pixels.device).unsqueeze(1)
    offsets = torch.zeros(1, dtype=torch.int64, device=pixels.device)
    for size, (extent, coordinate) in zip(pixels.shape[1:-1], outer, strict=True):
        first = first * size + coordinate * extent
        within = torch.arange(extent, device=pixels.device)
        offsets = (offsets.unsqueeze(1) * size + within).flatten()
    runs_per_line = pixels.shape[-1] // run
    first, offsets = first * runs_per_line + column, offsets * runs_per_line
    rows = (first.unsqueeze(-1) + offsets).flatten()
    runs = pixels.reshape(pixels.numel() // run, run).index_select(0, rows)
    return runs.view(*tokens.shape, layout.num_values)


def _coordinates(tokens: Tensor, layout: PatchLayout) -> list[tuple[int, Tensor]]:
    """(patch extent, grid coordinate) of every axis of a sample, in memory order."""
    pairs: list[tuple[int, Tensor]] = []
    for count, extent in zip(layout.grid[::-1], layout.patch[::-1], strict=True):
        pairs.append((extent, tokens % count))
        tokens = tokens // count
    if layout.audio:  # tokens count (freq, time), memory (time, freq)
        return pairs
    return [(layout.channels, torch.zeros_like(tokens)), *pairs[::-1]]


def pixel_statistics(
    pixels: Tensor,
    layout: PatchLayout,
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """Check `pixel_mean` and `pixel_std`; as (C,) tensors for uint8 pixels, None for floats."""
    if (mean is None) != (std is None):
        raise ValueError("pixel_mean and pixel_std go together: give both or neither")
    channels = layout.channels
    for name, values in (("pixel_mean", mean), ("pixel_std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values, pixels have {channels} channels")
    if pixels.dtype != torch.uint8:
        return None
    mean = (0.0,) * channels if mean is None else mean
    std = (1.0,) * channels if std is None else std
    return _constants(mean, pixels, dtype), _constants(std, pixels, dtype)


def _constants(values: Sequence[float] | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().to(like.device, dtype)
    # One fill per channel: copying a list to a GPU would stop the host and break graph capture.
    return torch.stack([like.new_full((), value, dtype=dtype) for value in values])


def normalize_pixels(
    values: Tensor, mean: Tensor, std: Tensor, *, channel_fastest: bool = False
) -> Tensor:
    """((values / 255) - mean) / std per channel, in the dtype of `mean`.

    values: (..., P) uint8, or already of that dtype and then overwritten. mean, std: (C,);
    C is the slowest axis of P, or the fastest.
    """
    repeats = values.shape[-1] // mean.shape[0]
    if channel_fastest:
        mean, std = mean.repeat(repeats), std.repeat(repeats)
    else:
        mean, std = mean.repeat_interleave(repeats), std.repeat_interleave(repeats)
    scaled = values.to(mean.dtype).mul_(1 / (255 * std))
    return scaled.sub_(mean / std)
