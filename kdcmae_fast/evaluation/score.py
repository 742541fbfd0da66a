"""`kdcmae score`: a person's own videos, each for itself or every one with every other."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.config import DataConfig
from kdcmae_fast.data import BadClip, ClipError
from kdcmae_fast.data.clip import SAMPLE_RATE
from kdcmae_fast.data.media import MediaOptions
from kdcmae_fast.evaluation.clips import collate_frames, encode_frames, hears_frames
from kdcmae_fast.evaluation.own_video import read_video_clip
from kdcmae_fast.evaluation.ranking import Strategy, paired_frames
from kdcmae_fast.evaluation.reading import with_bar
from kdcmae_fast.evaluation.score_pairs import OwnPairs, find_own, pair_scores, used_own
from kdcmae_fast.evaluation.score_pictures import draw_pairs, draw_score
from kdcmae_fast.evaluation.scoring import score_clip
from kdcmae_fast.evaluation.source import (
    EvaluationSource,
    file_name,
    listed_bad,
    open_model,
    write_metrics,
)
from kdcmae_fast.figure import require_matplotlib
from kdcmae_fast.kernels import frame_similarity
from kdcmae_fast.messages import require_folder
from kdcmae_fast.models.cav_mae import CavMae

DEFAULT_SECONDS = 10.24  # of a file, for CAV-MAE Sync; others take the sound they were made for
SHOWN_FOLDERS = 3  # in metrics.json, of those that the files lie in


class VideoFeatures(NamedTuple):
    """One file. audio (T, D), or (D,) of the sound as a whole; video (T, D); not normalised.

    times: (T,) seconds of the frames from the stretch's start. seconds: of sound.
    """

    file: str
    audio: Tensor
    video: Tensor
    times: Tensor
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What is taken of each file.

    num_frames: T (None: data.num_frames). start, seconds: of the stretch in the file, as far as it
    goes (None: 10.24 s; a model that is no CAV-MAE Sync: as many as it hears at once).
    """

    num_frames: int | None = None
    start: float = 0.0
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames={self.num_frames} must be at least 1")
        if self.start < 0:
            raise ValueError(f"start={self.start:g} must be at least 0 seconds")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds:g} must be above 0")


def score_videos(
    source: EvaluationSource,
    videos: Sequence[str | os.PathLike[str]],
    *,
    against: Sequence[str | os.PathLike[str]] | None = None,
    stretch: Stretch | None = None,
    strategy: Strategy = "diagonal_mean",
    output: str | Path | None = None,
) -> dict[str, Any]:
    """How well sound and picture of video files fit; how far the sound is shifted, if it is.

    source: model, device, and the data settings for normalisation; its clips are not looked at.
    videos: each is scored for itself (`scoring.score_clip`). against: instead, the sound of every
        one of `videos` is compared with the picture of every one of these, by `strategy`. Where
        it is known which picture is a sound's own (`score_pairs.find_own`), metrics say how often
        it is the most similar one (`score_pairs.PairScores`).
    stretch: what is taken of each file (None: the defaults of `Stretch`).
    output: folder for pictures and metrics.json (None: writes nothing).

    Returns what metrics.json holds. Files that cannot be used are left out and named in its
    `bad_clips`; ValueError if none is left.
    """
    if output is not None:
        require_folder(output)
        require_matplotlib("the picture of the similarities")
    stretch = stretch or Stretch()
    model, data, _, described = open_model(source)
    rows, columns = ([os.fspath(name) for name in names] for names in (videos, against or ()))
    files = list(dict.fromkeys([*rows, *columns]))
    found, bad = read_videos(model, data, files, stretch, progress=source.progress)
    used = [found[name] for name in rows if name in found]
    others = [found[name] for name in columns if name in found]
    if not used or (against is not None and not others):
        first = f"; first: {bad[0].video_id}: {bad[0].reason}" if bad else ""
        raise ValueError(f"none of the videos could be used{first}")
    metrics = {
        "command": "score",
        **described,
        "clips_of": f"videos in {_folders([row.file for row in found.values()])}",
        "num_clips": len(found),
        "frames": {
            "num_frames": len(used[0].times),
            "start": stretch.start,
            "audio": "a segment around each frame" if hears_frames(model) else "one vector",
            "time_base": described["data"]["time_base"],
        },
    }
    if against is None:
        metrics |= _score_each(used, output)
    else:
        flags = ([name in found for name in names] for names in (rows, columns))
        own = used_own(find_own(rows, columns), *flags)
        metrics |= _score_pairs(used, others, own, strategy, output)
    metrics |= listed_bad(bad)
    write_metrics(metrics, output)
    return metrics


def read_videos(
    model: CavMae,
    data: DataConfig,
    files: Sequence[str],
    stretch: Stretch,
    *,
    progress: bool = False,
) -> tuple[dict[str, VideoFeatures], list[BadClip]]:
    """Features of each file by its name, and the files that cannot be used.

    progress: show a bar on stderr.
    """
    options = MediaOptions.of(data, model.config)
    whole = DEFAULT_SECONDS if hears_frames(model) else options.seconds
    found: dict[str, VideoFeatures] = {}
    bad = []
    for name in with_bar(files, len(files), lambda _: 1) if progress else files:
        try:
            clip = read_video_clip(
                name,
                options,
                num_frames=stretch.num_frames or data.num_frames,
                start=stretch.start,
                seconds=stretch.seconds or whole,
            )
        except ClipError as error:
            bad.append(BadClip(error.video_id, error.reason))
            continue
        with torch.inference_mode():
            batch = collate_frames([clip])
            audio, video = encode_frames(model, data, batch)
        seconds = len(clip.waveform) / SAMPLE_RATE
        times = batch.times[0]
        found[name] = VideoFeatures(name, audio[0].cpu(), video[0].cpu(), times, seconds)
    return found, bad


def _score_each(rows: Sequence[VideoFeatures], output: str | Path | None) -> dict[str, Any]:
    clips, pictures = [], []
    names = picture_names([row.file for row in rows])
    for row, name in zip(rows, names, strict=True):
        score = score_clip(row.audio, row.video, row.times)
        about = {"file": row.file, "seconds": row.seconds, "times": row.times.tolist()}
        clips.append({**about, **score.named()})
        if output is not None:
            draw_score(Path(output) / name, os.path.basename(row.file), score, row.times)
            pictures.append({"file": name, "title": f"sound and picture of {row.file}"})
    mean = sum(clip["similarity"] for clip in clips) / len(clips)
    metrics: dict[str, Any] = {"clips": clips, "headline": {"mean similarity": mean}}
    if "offset_seconds" in clips[0]:
        synced = sum(clip["offset_frames"] == 0 for clip in clips)
        metrics["headline"] |= {"files in sync": synced, "files": len(clips)}
    return metrics | ({"pictures": pictures} if pictures else {})


def _score_pairs(
    rows: Sequence[VideoFeatures],
    columns: Sequence[VideoFeatures],
    own: OwnPairs,
    strategy: Strategy,
    output: str | Path | None,
) -> dict[str, Any]:
    audio = torch.stack([row.audio for row in rows])
    video = torch.stack([column.video for column in columns])
    sounds, pictures, pooling = paired_frames(audio, video, strategy)
    matrix = frame_similarity(sounds, pictures, strategy=pooling)
    names = [row.file for row in rows], [column.file for column in columns]
    metrics: dict[str, Any] = {
        "against": {
            "sound_of": names[0],
            "picture_of": names[1],
            "strategy": strategy,
            "similarity": matrix.tolist(),
            "best": matrix.argmax(1).tolist(),
            "own": own.columns,
        }
    }
    if scores := pair_scores(matrix, own.columns):
        metrics |= {"headline": scores.headline(), "own_is": own.by, **scores.named()}
    if output is not None:
        draw_pairs(Path(output) / "against.png", matrix, *names)
        title = "sound of each row with the picture of each column"
        metrics["pictures"] = [{"file": "against.png", "title": title}]
    return metrics


def _folders(files: Sequence[str]) -> str:
    folders = list(dict.fromkeys(os.path.dirname(name) or "." for name in files))
    more = f" and {len(folders) - SHOWN_FOLDERS} more folders"
    return ", ".join(folders[:SHOWN_FOLDERS]) + (more if len(folders) > SHOWN_FOLDERS else "")


def picture_names(files: Sequence[str]) -> list[str]:
    """`NAME.png` for each file, a number before names that come twice."""
    names = [file_name(os.path.basename(file)) for file in files]
    return [
        f"{name}.png" if names.count(name) == 1 else f"{number:03d}_{name}.png"
        for number, name in enumerate(names)
    ]
