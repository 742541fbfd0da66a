"""What inpainting hides: at random, in spans that a person names, or a whole modality."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.config import ModelConfig
from kdcmae_fast.data.clip import FRAME_SHIFT, SAMPLE_RATE
from kdcmae_fast.data.fbank import mel_edges
from kdcmae_fast.kernels import MaskPlan, complementary_masks
from kdcmae_fast.models.masking import MODALITIES, audio_grid, video_grid
from kdcmae_fast.models.outputs import Plans

Span = tuple[float, float]
Box = tuple[float, float, float, float]
Spans = dict[str, list[tuple[float, ...]]]


@dataclass(frozen=True, kw_only=True)
class Hiding:
    """What to hide of every clip. Of each modality one thing: all of it, spans, or random patches.

    hide: "audio" or "video", all of it.
    seconds, hz: spans (from, to) of the sound; both: where they meet. boxes: (x0, y0, x1, y1) of
        the picture, shares of its sides from the left top corner. A patch is hidden if any part of
        it is in a span.
    mask_ratio: share of the patches hidden at random (None: what the model was trained with). With
        `hide` or spans, the modality they do not name is whole unless this is given.
    audio_mask: how patches of the sound are drawn: unstructured, time, freq, tf or block (None: as
        in training). video_mask: unstructured or block (None: unstructured).
    views: complementary masks drawn per clip. seed: of the masks.
    """

    hide: str | None = None
    mask_ratio: float | None = None
    audio_mask: str | None = None
    video_mask: str | None = None
    seconds: Sequence[Span] = ()
    hz: Sequence[Span] = ()
    boxes: Sequence[Box] = ()
    views: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hide not in (None, *MODALITIES):
            raise ValueError(f"hide={self.hide!r} must be audio or video")
        if self.mask_ratio is not None and not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} must be in 0..1")
        if self.views < 1:
            raise ValueError(f"views={self.views} must be at least 1")
        for modality in MODALITIES:
            self._check_one_thing(modality)
        if self.views > 1 and (self.hide or any(map(self.spans, MODALITIES))):
            raise ValueError(
                f"views={self.views}: several views are drawn at random; with hide or spans there "
                "is one"
            )

    def spans(self, modality: str) -> bool:
        """Are there spans of this modality?"""
        return bool(self.seconds or self.hz) if modality == "audio" else bool(self.boxes)

    def mode(self, modality: str) -> str | None:
        """How its patches are to be drawn at random, if that was said."""
        return self.audio_mask if modality == "audio" else self.video_mask

    def _check_one_thing(self, modality: str) -> None:
        ways = {
            f"hide={modality}": self.hide == modality,
            "seconds or hz" if modality == "audio" else "boxes": self.spans(modality),
            f"{modality}_mask={self.mode(modality)}": self.mode(modality) is not None,
        }
        given = [way for way, is_given in ways.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both say what of the {modality} is hidden")


class Hidden(NamedTuple):
    """What `hide_patches` hid of one modality: `patches` of `of` per view, and how.

    how: "all", "nothing", "spans" or the mode of a random draw. spans: where, after rounding to
    whole patches: {"seconds": [...], "hz": [...]} or {"boxes": [...]}.
    """

    how: str
    patches: int
    of: int
    spans: Spans

    def __str__(self) -> str:
        if self.how in ("all", "nothing"):
            return self.how
        where = "; ".join(
            {"seconds": "{:.2f} to {:.2f} s", "hz": "{:.0f} to {:.0f} Hz"}.get(
                axis, "box {:.2f},{:.2f},{:.2f},{:.2f}"
            ).format(*span)
            for axis, spans in self.spans.items()
            for span in spans
        )
        return f"{self.patches} of {self.of} patches ({where or self.how})"


def hide_patches(
    hiding: Hiding, config: ModelConfig, sample_ids: Tensor
) -> tuple[Plans, dict[str, Hidden]]:
    """The masks of clips `sample_ids` (B,), and what they hide of each modality.

    The masks of a clip depend on it and on `hiding.seed`, not on the batch or the device.
    Errors: ValueError for spans outside the clip, and for masks that hide nothing or everything.
    """
    found = [_hide(hiding, config, modality, sample_ids) for modality in MODALITIES]
    plans = {name: plan for name, (plan, _) in zip(MODALITIES, found, strict=True)}
    hidden = {name: told for name, (_, told) in zip(MODALITIES, found, strict=True)}
    if not any(told.patches for told in hidden.values()):
        raise ValueError(
            f"mask_ratio={hiding.mask_ratio} hides nothing; raise it, or name a span or a modality"
        )
    if all(told.patches == told.of for told in hidden.values()):
        raise ValueError(
            "no patch of sound or picture is left to start from; lower mask_ratio or hide less"
        )
    return plans, hidden


def _hide(
    hiding: Hiding, config: ModelConfig, modality: str, sample_ids: Tensor
) -> tuple[MaskPlan, Hidden]:
    grid = audio_grid(config) if modality == "audio" else video_grid(config)
    tokens = math.prod(grid)
    if hiding.hide == modality:
        return _fixed_plan(torch.ones(grid), sample_ids), Hidden("all", tokens, tokens, {})
    if hiding.spans(modality):
        find = _audio_spans if modality == "audio" else _boxes
        inside, spans = find(hiding, config)
        plan = _fixed_plan(inside, sample_ids)
        return plan, Hidden("spans", tokens - plan.len_keep, tokens, spans)
    mode = hiding.mode(modality)
    named_otherwise = hiding.hide is not None or any(map(hiding.spans, MODALITIES))
    if named_otherwise and hiding.mask_ratio is None and mode is None:
        return _fixed_plan(torch.zeros(grid), sample_ids), Hidden("nothing", 0, tokens, {})
    ratio, trained_mode = config.audio_mask_ratio, config.audio_mask_mode
    if modality == "video":
        ratio, trained_mode = config.video_mask_ratio, "unstructured"
    ratio = config.mask_ratio if ratio is None else ratio
    mode = mode or trained_mode
    plan = complementary_masks(
        sample_ids,
        grid,
        ratio if hiding.mask_ratio is None else hiding.mask_ratio,
        num_views=hiding.views,
        mode=mode,
        seed=hiding.seed,
        stream=MODALITIES.index(modality),
    )
    return plan, Hidden(mode, tokens - plan.len_keep, tokens, {})


def _fixed_plan(hidden: Tensor, sample_ids: Tensor) -> MaskPlan:
    """One view of every clip that hides the patches where `hidden` (rows, columns) is not 0."""
    order = hidden.flatten().bool().to(torch.uint8).argsort(stable=True)
    both = (order, order.argsort())
    first, second = (
        x.to(torch.int16).to(sample_ids.device).repeat(len(sample_ids), 1) for x in both
    )
    keep = int((hidden == 0).sum())
    return MaskPlan(first, second, len_keep=keep, num_views=1, num_tokens=hidden.numel())


def _audio_spans(hiding: Hiding, config: ModelConfig) -> tuple[Tensor, Spans]:
    """(frequency, time) patches inside the spans, and the spans as they came out."""
    rows, columns = audio_grid(config)
    patch = config.patch_size
    times = [column * patch * FRAME_SHIFT / SAMPLE_RATE for column in range(columns + 1)]
    bands = mel_edges(config.num_mel_bins)[::patch]
    spans: Spans = {}
    inside_time, inside_band = torch.ones(columns), torch.ones(rows)
    if hiding.seconds:
        inside_time, spans["seconds"] = _along(hiding.seconds, times, "seconds", "s of sound")
    if hiding.hz:
        inside_band, spans["hz"] = _along(hiding.hz, bands, "hz", "Hz")
    return inside_band[:, None] * inside_time[None], spans


def _boxes(hiding: Hiding, config: ModelConfig) -> tuple[Tensor, Spans]:
    """(rows, columns) patches inside the boxes, and the boxes as they came out."""
    grid = video_grid(config)
    edges = [[line / size for line in range(size + 1)] for size in grid]
    inside = torch.zeros(grid)
    rounded: list[tuple[float, ...]] = []
    for box in hiding.boxes:
        if len(box) != 4:
            raise ValueError(f"box {box} must be x0, y0, x1, y1")
        (down, ((top, bottom),)), (across, ((left, right),)) = (
            _along([span], lines, "boxes", "of the picture's side")
            for span, lines in zip(((box[1], box[3]), (box[0], box[2])), edges, strict=True)
        )
        inside = torch.maximum(inside, down[:, None] * across[None])
        rounded.append((left, top, right, bottom))
    return inside, {"boxes": rounded}


def _along(
    spans: Sequence[Span], edges: Sequence[float], name: str, unit: str
) -> tuple[Tensor, list[tuple[float, ...]]]:
    """Which of the intervals between `edges` a span reaches into, and the spans rounded to them."""
    inside = torch.zeros(len(edges) - 1)
    rounded: list[tuple[float, ...]] = []
    slack = 1e-6 * (edges[-1] - edges[0])
    for low, high in spans:
        if not edges[0] - slack <= low < high <= edges[-1] + slack:
            raise ValueError(
                f"{name}: the span {low:g} to {high:g} is not within the clip, which has "
                f"{edges[0]:g} to {edges[-1]:g} {unit}"
            )
        first = max(i for i in range(len(edges) - 1) if i == 0 or edges[i] <= low + slack)
        last = min(i for i in range(1, len(edges)) if edges[i] >= high - slack)
        inside[first:last] = 1
        rounded.append((edges[first], edges[last]))
    return inside, rounded
