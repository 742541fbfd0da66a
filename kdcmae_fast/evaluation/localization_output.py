"""What `localize` writes: overlay pictures, videos, maps as arrays, and its table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcmae_fast.data import ClipDataset, ClipError, SyntheticClips
from kdcmae_fast.data.clip import ClipFrames
from kdcmae_fast.evaluation.attribution import References, attribution_maps
from kdcmae_fast.evaluation.localization_clips import Located, sound_vectors
from kdcmae_fast.evaluation.localization_controls import WRONG_SOUND
from kdcmae_fast.evaluation.localization_maps import (
    cosine_maps,
    min_max,
    upsample,
)
from kdcmae_fast.evaluation.localization_scores import MapScores
from kdcmae_fast.evaluation.localization_settings import LocalizationSettings
from kdcmae_fast.evaluation.localization_truth import BoxTruth, clip_name
from kdcmae_fast.evaluation.overlays import Panel, draw_overlay, write_overlay_video
from kdcmae_fast.evaluation.processes import ALONE, Processes
from kdcmae_fast.evaluation.source import Opened, file_name
from kdcmae_fast.models.masking import video_grid

VIDEO_RATE = 12.5  # frames in a second of the synthetic clips, which have any number
SHOWN = 320  # pixels a side of the frames in pictures
KEPT = ("maps", "frames", "own", "other")  # by a process that does not write
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
        # Not NumPy's own words: of a file with pickles they advise to load those.
        raise ValueError(
            f"--prior {path} is no .npz file of maps ({type(error).__name__}); "
            "numpy.savez(path, **{clip name: (h, w) array}) writes one"
        ) from None
    bad = next((name for name, m in maps.items() if m.ndim != 2), None)
    if bad is not None:
        raise ValueError(f"--prior {path}: the map of {bad} must be (h, w), is {maps[bad].shape}")
    return PriorMaps(path, maps)


class ScoredClip(NamedTuple):
    """What is known of a clip once its maps are scored.

    row: of metrics.json. seconds: when the frame is shown. maps, controls: scores by the map's
    name. best: cIoU that no map can exceed.
    """

    row: dict[str, Any]
    seconds: float
    maps: dict[str, MapScores]
    controls: dict[str, MapScores]
    best: float


class LocalizationWriter:
    """Draws the first clips as they are scored, and writes the rest at the end.

    Of several processes the first one writes all files; the others keep what it needs of theirs.
    """

    def __init__(
        self,
        opened: Opened,
        dataset: ClipDataset,
        truth: BoxTruth,
        settings: LocalizationSettings,
        references: References,
        output: str | Path | None,
        processes: Processes = ALONE,
    ) -> None:
        self.opened, self.dataset, self.truth = opened, dataset, truth
        self.settings, self.references = settings, references
        self.output = None if output is None else Path(output)
        self.processes = processes
        self.num_clips = 0  # of this process
        self.kept: dict[str, list[Tensor]] = {name: [] for name in KEPT}
        self.pictures: list[dict[str, str]] = []
        self.videos: list[dict[str, str]] = []
        self.maps: dict[str, NDArray[np.float32]] = {}

    def add(
        self,
        batch: Located,
        maps: Mapping[str, Mapping[str, Tensor]],
        scored: Sequence[ScoredClip],
    ) -> None:
        """Draw what is still wanted of a batch, or keep it for the process that draws."""
        if self.output is None:
            return
        main = self.settings.main
        own, other = (m.float().cpu() for m in (maps["maps"][main], maps["controls"][WRONG_SOUND]))
        frames = torch.stack([clip.frames[0] for clip in batch.clips])
        if not self.processes.is_main:
            drawn = slice(max(0, self.settings.pictures - self.num_clips))
            saved = slice(None if self.settings.save_maps else 0)
            pieces = own[saved], frames[drawn], own[drawn], other[drawn]
            for name, piece in zip(KEPT, pieces, strict=True):
                if len(piece):  # an empty one would keep its whole batch in memory
                    self.kept[name].append(piece)
        else:
            for row, clip in enumerate(scored):
                if self.settings.save_maps:
                    self.maps[clip_name(clip.row["clip"])] = own[row].numpy()
                if len(self.pictures) < self.settings.pictures:
                    self._draw(clip, frames[row], own[row], other[row])
                if len(self.videos) < self.settings.videos:
                    self._film(clip)
        self.num_clips += len(scored)

    def finish(self, scored: Sequence[ScoredClip]) -> dict[str, Any]:
        """Write what needs all clips; the lists of pictures and videos for metrics.json.

        scored: the clips of all processes, in order.
        """
        if self.output is not None:
            self._take_over(scored)
            if self.processes.is_main:
                rows = [clip.row for clip in scored]
                _write_iou_lists(self.output / "viz", rows, self.settings)
                if self.settings.save_maps:
                    np.savez(self.output / "maps.npz", **self.maps)  # type: ignore[arg-type]
        return {"pictures": self.pictures, "videos": self.videos}

    def _take_over(self, scored: Sequence[ScoredClip]) -> None:
        """On the first process: draw, film and add what the others kept of their clips."""
        counts = self.processes.gather_lists([self.num_clips])
        before = sum(counts[: self.processes.rank])
        wanted = max(0, self.settings.pictures - before)
        gathered = []
        for name, pieces in self.kept.items():
            rows = torch.cat(pieces) if pieces else torch.empty(0)
            gathered.append(self.processes.gather_rows(rows if name == "maps" else rows[:wanted]))
        if not self.processes.is_main:
            return
        maps, *drawn = (rows for rows in gathered if rows is not None)
        theirs = scored[self.num_clips :]
        for clip, own in zip(theirs, maps, strict=False):  # there are none unless to be saved
            self.maps[clip_name(clip.row["clip"])] = own.numpy()
        for clip, frame, own, other in zip(theirs, *drawn, strict=False):
            self._draw(clip, frame, own, other)
        for clip in theirs:
            if len(self.videos) < self.settings.videos:
                self._film(clip)

    def _draw(self, clip: ScoredClip, frame: Tensor, own: Tensor, other: Tensor) -> None:
        """frame: (3, S, S) uint8. own, other: (h, w)."""
        assert self.output is not None
        video_id = clip.row["clip"]
        name = f"{len(self.pictures):03d}_{file_name(clip_name(video_id))}.png"
        panels = []
        for label, values in ((self.settings.main, own), (WRONG_SOUND, other)):
            heat = min_max(upsample(values[None], SHOWN))[0].numpy()
            ciou = (clip.maps | clip.controls)[label].ciou
            panels.append(Panel(label, heat, f"cIoU {ciou:.2f}"))
        title = f"{video_id}: cIoU {clip.maps[self.settings.main].ciou:.2f}"
        boxes = self._boxes(clip.row["index"], clip.seconds)
        draw_overlay(self.output / name, title, _shown(frame), boxes, panels)
        self.pictures.append({"file": name, "title": title})

    def _film(self, clip: ScoredClip) -> None:
        """All frames of a clip, each with the map of its moment."""
        assert self.output is not None
        index, video_id = clip.row["index"], clip.row["clip"]
        count = None
        if isinstance(self.dataset, SyntheticClips):
            count = max(2, round(self.dataset.clip_seconds * VIDEO_RATE))
        try:
            film = self.dataset.read_frames(index, count)
        except ClipError:
            return  # its one frame could be read; the report of bad clips is about those
        heats = min_max(self._film_maps(film).flatten(0, 1)[None])[0]  # one scale for the clip
        heats = heats.unflatten(0, (len(film.times), -1)).cpu().numpy()
        name = f"{len(self.videos):03d}_{file_name(clip_name(video_id))}.mp4"
        write_overlay_video(
            self.output / name,
            np.stack([_shown(frame) for frame in film.frames]),
            heats,
            [self._boxes(index, float(time)) for time in film.times],
            film.times,
            film.waveform.numpy(),
        )
        self.videos.append({"file": name, "title": f"{video_id}, {self.settings.map}"})

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
