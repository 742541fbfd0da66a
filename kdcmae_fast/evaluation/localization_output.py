"""What `localize` writes: overlay pictures, videos, maps as arrays, and its table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcmae_fast.data import ClipDataset, ClipError, SyntheticClips
from kdcmae_fast.data.clip import ClipFrames
from kdcmae_fast.evaluation.localization_clips import Located, sound_vectors
from kdcmae_fast.evaluation.localization_controls import WRONG_SOUND
from kdcmae_fast.evaluation.localization_maps import (
    References,
    attribution_maps,
    cosine_maps,
    min_max,
    upsample,
)
from kdcmae_fast.evaluation.localization_scores import MapScores
from kdcmae_fast.evaluation.localization_settings import LocalizationSettings
from kdcmae_fast.evaluation.localization_truth import BoxTruth, clip_name
from kdcmae_fast.evaluation.overlays import Panel, draw_overlay, write_overlay_video
from kdcmae_fast.evaluation.source import Opened, file_name
from kdcmae_fast.models.masking import video_grid

VIDEO_RATE = 12.5  # frames in a second of the synthetic clips, which have any number
SHOWN = 320  # pixels a side of the frames in pictures
COLUMNS = {
    "mean_ciou": "cIoU",
    "ap50": "AP50",
    "auc": "AUC",
    "size_aware_iou": "size-aware",
    "pointing": "pointing",
}


class PriorMaps:
    """Maps that need no sound, from an .npz file with one array (h, w) per clip name."""

    def __init__(self, path: str, maps: Mapping[str, NDArray[np.float32]]) -> None:
        self.path = path
        self.maps = maps

    def of(self, clips: Sequence[ClipFrames]) -> Tensor:
        """(B, h, w) of these clips; ValueError naming one without a map."""
        found = []
        for clip in clips:
            name = clip_name(clip.video_id)
            if name not in self.maps:
                raise ValueError(f"--prior {self.path}: there is no map of {name}")
            found.append(torch.from_numpy(self.maps[name]))
        if len({tuple(m.shape) for m in found}) > 1:
            raise ValueError(f"--prior {self.path}: the maps differ in size")
        return torch.stack(found)


def read_prior(path: str) -> PriorMaps:
    """A file of maps, as `numpy.savez(path, **{clip name: (h, w) array})` writes it."""
    try:
        with np.load(path, allow_pickle=False) as found:
            maps = {clip_name(k): np.asarray(v, dtype=np.float32) for k, v in found.items()}
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--prior {path} is not there; give colour, tokens or an .npz file of maps"
        ) from None
    except (ValueError, BadZipFile, AttributeError, OSError) as error:
        raise ValueError(f"--prior {path} is no .npz file of maps: {error}") from None
    bad = next((name for name, m in maps.items() if m.ndim != 2), None)
    if bad is not None:
        raise ValueError(f"--prior {path}: the map of {bad} must be (h, w), is {maps[bad].shape}")
    return PriorMaps(path, maps)


class LocalizationWriter:
    """Draws the first clips as they are scored, and writes the rest at the end."""

    def __init__(
        self,
        opened: Opened,
        dataset: ClipDataset,
        truth: BoxTruth,
        settings: LocalizationSettings,
        references: References,
        output: str | Path | None,
    ) -> None:
        self.opened, self.dataset, self.truth = opened, dataset, truth
        self.settings, self.references = settings, references
        self.output = None if output is None else Path(output)
        self.pictures: list[dict[str, str]] = []
        self.videos: list[dict[str, str]] = []
        self.maps: dict[str, NDArray[np.float32]] = {}

    def add(
        self,
        batch: Located,
        maps: Mapping[str, Mapping[str, Tensor]],
        scores: Sequence[Mapping[str, MapScores]],
    ) -> None:
        """Draw what is still wanted of a batch; scores: of each clip, by the map's name."""
        if self.output is None:
            return
        own, other = maps["maps"][self.settings.main], maps["controls"][WRONG_SOUND]
        shown = {
            name: min_max(upsample(m.float(), SHOWN)).cpu().numpy()
            for name, m in ((self.settings.main, own), (WRONG_SOUND, other))
        }
        for row, clip in enumerate(batch.clips):
            if self.settings.save_maps:
                self.maps[clip_name(clip.video_id)] = own[row].float().cpu().numpy()
            if len(self.pictures) < self.settings.pictures:
                heats = {name: values[row] for name, values in shown.items()}
                self._draw(clip, heats, scores[row])
            if len(self.videos) < self.settings.videos:
                self._film(clip)

    def finish(self, clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Write what needs all clips; the lists of pictures and videos for metrics.json."""
        if self.output is not None:
            _write_iou_lists(self.output / "viz", clips, self.settings)
            if self.settings.save_maps:
                np.savez(self.output / "maps.npz", **self.maps)  # type: ignore[arg-type]
        return {"pictures": self.pictures, "videos": self.videos}

    def _draw(
        self,
        clip: ClipFrames,
        heats: Mapping[str, NDArray[np.float32]],
        scores: Mapping[str, MapScores],
    ) -> None:
        assert self.output is not None
        name = f"{len(self.pictures):03d}_{file_name(clip_name(clip.video_id))}.png"
        ciou = scores[next(iter(heats))].ciou
        title = f"{clip.video_id}: cIoU {ciou:.2f}"
        panels = [
            Panel(label, heat, f"cIoU {scores[label].ciou:.2f}") for label, heat in heats.items()
        ]
        frame = _shown(clip.frames[0])
        boxes = self._boxes(clip.index, float(clip.times[0]))
        draw_overlay(self.output / name, title, frame, boxes, panels)
        self.pictures.append({"file": name, "title": title})

    def _film(self, clip: ClipFrames) -> None:
        """All frames of a clip, each with the map of its moment."""
        assert self.output is not None
        count = None
        if isinstance(self.dataset, SyntheticClips):
            count = max(2, round(self.dataset.clip_seconds * VIDEO_RATE))
        try:
            film = self.dataset.read_frames(clip.index, count)
        except ClipError:
            return  # its one frame could be read; the report of bad clips is about those
        heats = min_max(self._film_maps(film).flatten(0, 1)[None])[0]  # one scale for the clip
        heats = heats.unflatten(0, (len(film.times), -1)).cpu().numpy()
        name = f"{len(self.videos):03d}_{file_name(clip_name(clip.video_id))}.mp4"
        write_overlay_video(
            self.output / name,
            np.stack([_shown(frame) for frame in film.frames]),
            heats,
            [self._boxes(clip.index, float(time)) for time in film.times],
            film.times,
            film.waveform.numpy(),
        )
        self.videos.append({"file": name, "title": f"{clip.video_id}, {self.settings.map}"})

    @torch.no_grad()
    def _film_maps(self, film: ClipFrames) -> Tensor:
        """(T, SHOWN, SHOWN), not scaled."""
        model = self.opened.model
        frames = film.frames.to(self.opened.device)
        sounds = sound_vectors(model, self.opened.data, [film])[0]
        if self.settings.map == "cosine":
            tokens = model.encode(frames=frames).video_tokens
            assert tokens is not None  # frames were given
            return upsample(cosine_maps(sounds, tokens, video_grid(model.config)), SHOWN)
        indices = torch.full((len(frames),), film.index)
        maps = attribution_maps(model, frames, sounds[None], self.references, indices=indices)
        return upsample(maps[0], SHOWN)

    def _boxes(self, index: int, time: float) -> list[tuple[float, float, float, float]]:
        clip = self.truth.boxes(index, time)
        return [tuple(float(v) for v in box) for box in clip.pixels(SHOWN)]  # type: ignore[misc]


def localization_table(metrics: Mapping[str, Any]) -> str:
    """Scores and controls of `localize` as a table for a terminal."""
    width = max(len(name) for kind in ("maps", "controls") for name in metrics[kind]) + 2
    width = max(width, len("best half of the picture") + 2)
    lines = [" " * width + "".join(f"{label:>12}" for label in COLUMNS.values())]
    for kind, heading in (("maps", ""), ("controls", "controls")):
        lines += [f"-- {heading}:"] if heading else []
        lines += [f"{name:{width}}" + _cells(row) for name, row in metrics[kind].items()]
    lines.append(f"{'best half of the picture':{width}}" + _cells(metrics["best_half_of_picture"]))
    gain = metrics["above_centred_disc"]
    side = "above" if gain["mean_ciou"] > 0 else "BELOW"
    lines.append(
        f"{metrics['map']}: cIoU {abs(gain['mean_ciou']):.3f} {side} the centred disc, standard "
        f"error {gain['standard_error'] or 0:.3f} ({metrics['num_clips']} clips: "
        f"{metrics['clips_of']}; boxes: {metrics['annotations']})"
    )
    return "\n".join(lines)


def _cells(row: Mapping[str, float]) -> str:
    return "".join(f"{row[key]:>12.3f}" if key in row else f"{'':>12}" for key in COLUMNS)


def _write_iou_lists(
    folder: Path, clips: Sequence[Mapping[str, Any]], settings: LocalizationSettings
) -> None:
    """iou_test_av.txt and, of a fused map, iou_test_av_obj.txt, as the published tests write them:
    "index,cIoU" of each clip, ascending."""
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {"av": settings.map}
    if settings.fusion:
        names["av_obj_detr" if len(settings.priors) > 1 else "av_obj"] = (
            f"fused ({settings.fusion})"
        )
    for label, name in names.items():
        rows = sorted((clip["ciou"][name], place) for place, clip in enumerate(clips))
        text = "".join(f"{place},{value}\n" for value, place in rows)
        (folder / f"iou_test_{label}.txt").write_text(text, encoding="utf-8")


def _shown(frame: Tensor) -> NDArray[np.uint8]:
    """(3, S, S) uint8 -> (SHOWN, SHOWN, 3)."""
    from PIL import Image

    picture = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())
    return np.asarray(picture.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC))
