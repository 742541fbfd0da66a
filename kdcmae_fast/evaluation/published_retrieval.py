"""Retrieval figures that others published, to stand beside one's own.

Source: the project page of CAV-MAE Sync (arXiv 2505.01237) as of 2025-06-18: recall in per cent,
zero-shot but for the first row, on about 1520 to 1545 clips of VGGSound's test set and on 5 clips
per class of AudioSet's evaluation set. The page does not name the aggregation of frames; its
README's example takes diagonal_mean.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# A file's name by which the released VGGSound list (309 classes, 5 clips each) is recognised.
VGGSOUND_LIST = "vgg_test_5_per_class_for_retrieval"
DIRECTIONS = ("audio_to_video", "video_to_audio")


class PublishedRecall(NamedTuple):
    """R@1, R@5, R@10 in per cent; None where only R@1 was given."""

    at_1: float
    at_5: float | None = None
    at_10: float | None = None


class PublishedRow(NamedTuple):
    """One model's figures on one data set."""

    model: str
    video_to_audio: PublishedRecall
    audio_to_video: PublishedRecall


def _row(model: str, to_audio: tuple[float, ...], to_video: tuple[float, ...]) -> PublishedRow:
    return PublishedRow(model, PublishedRecall(*to_audio), PublishedRecall(*to_video))


PUBLISHED = {
    "VGGSound": (
        _row("VAB-Encodec (fine-tuned)", (33.5, 63.3, 74.3), (34.9, 62.7, 73.1)),
        _row("CAV-MAE", (14.7, 35.3, 45.9), (8.3, 23.8, 32.4)),
        _row("CAV-MAE Scale+", (14.8, 34.2, 44.0), (12.8, 30.4, 40.3)),
        _row("LanguageBind", (10.3, 30.1, 39.7), (6.5, 22.7, 33.5)),
        _row("AVSiam", (19.0,), (20.4,)),
        _row("ImageBind", (21.6, 43.4, 52.9), (20.7, 43.2, 53.4)),
        _row("CAV-MAE Sync", (27.9, 51.7, 61.8), (23.2, 46.2, 58.1)),
    ),
    "AudioSet": (
        _row("VAB-Encodec (fine-tuned)", (39.5, 65.4, 74.6), (37.5, 64.0, 73.7)),
        _row("CAV-MAE", (16.1, 38.6, 49.3), (9.5, 22.6, 32.4)),
        _row("CAV-MAE Scale+", (18.8, 39.5, 50.1), (15.1, 34.0, 43.0)),
        _row("LanguageBind", (6.4, 20.2, 28.3), (4.4, 15.0, 22.5)),
        _row("AVSiam", (19.7,), (17.6,)),
        _row("ImageBind", (22.1, 43.2, 52.6), (20.8, 42.6, 51.6)),
        _row("CAV-MAE Sync", (35.2, 58.3, 67.6), (27.9, 52.4, 62.2)),
    ),
}


def published_table(metrics: Mapping[str, Any]) -> str:
    """The published figures as a table for a terminal, below one's own.

    metrics: of `retrieve`. Only the released VGGSound list makes its figures comparable.
    """
    same = Path(metrics["clips_of"]).name.startswith(VGGSOUND_LIST)
    lines = [_line("R@1 / R@5 / R@10 in per cent", "audio -> video", "video -> audio")]
    lines.append(_line("this model, these clips", *map(_own, (metrics[key] for key in DIRECTIONS))))
    for name, rows in PUBLISHED.items():
        comparable = same and name == "VGGSound"
        what = "this list as far as it could be had" if comparable else "other clips, no comparison"
        lines.append(f"published for {name} ({what}):")
        for row in rows:
            lines.append(
                _line(f"  {row.model}", *map(_cell, (row.audio_to_video, row.video_to_audio)))
            )
    lines.append("(the project page of arXiv 2505.01237)")
    return "\n".join(lines)


def _line(label: str, to_video: str, to_audio: str) -> str:
    return f"{label:30}{to_video:>20}{to_audio:>20}"


def _own(direction: Mapping[str, float]) -> str:
    return _cell(PublishedRecall(*(100 * direction[name] for name in ("R@1", "R@5", "R@10"))))


def _cell(recall: PublishedRecall) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in recall)
