"""The sound of every video with the picture of every other: which is whose own, and is it found."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.evaluation.ranking import (
    RECALL_AT,
    DirectionScores,
    PairCounts,
    chance_level,
    summarise,
)

SAME_FILE, SAME_PLACE = "the same file", "the same place in the lists"


class OwnPairs(NamedTuple):
    """Which picture is a sound's own. By: what makes it so, None where nothing does.

    columns: for each row its column, None of a sound whose picture is not among the columns.
    """

    columns: list[int | None]
    by: str | None


class PairScores(NamedTuple):
    """How sounds with their own pictures compare with all other pairs.

    own, other: mean similarity of the two kinds; other is None without any. Sounds look for their
    pictures among all columns, pictures for their sounds among all rows; equally similar ones
    share the middle of their ranks. chance: R@1 of a random order, each way.
    """

    num_pairs: int
    own: float
    other: float | None
    audio_to_video: DirectionScores
    video_to_audio: DirectionScores
    chance: tuple[float, float]

    def named(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        ways = (self.audio_to_video, self.video_to_audio)
        rows = [
            way.named() | {"R@1 of chance": x} for way, x in zip(ways, self.chance, strict=True)
        ]
        return {
            "num_pairs": self.num_pairs,
            "similarity_of_own_pairs": self.own,
            "similarity_of_other_pairs": self.other,
            "audio_to_video": rows[0],
            "video_to_audio": rows[1],
        }

    def headline(self) -> dict[str, float]:
        """The figures that a table of several runs shows.

        Not the similarities themselves: a better model's are not higher, but further apart.
        """
        there, back = self.chance
        chance = {"R@1 of chance": there}
        if there != back:
            chance = {"R@1 of chance audio->video": there, "R@1 of chance video->audio": back}
        apart = {} if self.other is None else {"similarity, own - other": self.own - self.other}
        return {
            "R@1 audio->video": self.audio_to_video.recall[1],
            "R@1 video->audio": self.video_to_audio.recall[1],
            **chance,
            "median rank audio->video": self.audio_to_video.median_rank,
            "median rank video->audio": self.video_to_audio.median_rank,
            **apart,
        }


def find_own(rows: Sequence[str], columns: Sequence[str]) -> OwnPairs:
    """Which of the files `columns` shows the own picture of each file of `rows`.

    The same file, where the lists share any; else, of lists that are equally long, the one at the
    same place.
    """
    heard, seen = ([os.path.realpath(name) for name in names] for names in (rows, columns))
    if set(heard) & set(seen):
        place = {name: column for column, name in reversed(list(enumerate(seen)))}
        return OwnPairs([place.get(name) for name in heard], SAME_FILE)
    if len(rows) == len(columns):
        return OwnPairs(list(range(len(rows))), SAME_PLACE)
    return OwnPairs([None] * len(rows), None)


def used_own(own: OwnPairs, rows: Sequence[bool], columns: Sequence[bool]) -> OwnPairs:
    """The same after rows and columns that are not used (False) are taken away."""
    number = [sum(columns[:column]) if used else None for column, used in enumerate(columns)]
    kept = [column for column, used in zip(own.columns, rows, strict=True) if used]
    places = [None if column is None else number[column] for column in kept]
    return OwnPairs(places, own.by)


def pair_scores(matrix: Tensor, own: Sequence[int | None]) -> PairScores | None:
    """How the pairs [i, own[i]] of similarities (R, C) compare with the others.

    None when no row has an own column. ValueError for similarities that are not finite.
    """
    if not bool(matrix.isfinite().all()):
        raise ValueError("similarities are not finite; check the checkpoint")
    rows = [row for row, column in enumerate(own) if column is not None]
    columns = [column for column in own if column is not None]
    if not rows:
        return None
    values = matrix[rows, columns].double()
    is_other = torch.ones(matrix.shape, dtype=torch.bool)
    is_other[rows, columns] = False
    others = matrix[is_other].double()
    return PairScores(
        num_pairs=len(rows),
        own=float(values.mean()),
        other=float(others.mean()) if len(others) else None,
        audio_to_video=_direction(matrix[rows], columns),
        video_to_audio=_direction(matrix[:, columns].t(), rows),
        chance=(chance_level(matrix.shape[1])["R@1"], chance_level(matrix.shape[0])["R@1"]),
    )


def _direction(similarity: Tensor, own: Sequence[int]) -> DirectionScores:
    """Queries (Q, G) looking for their own place in the gallery."""
    values = similarity.gather(1, torch.tensor(own)[:, None])
    counts = PairCounts((similarity > values).sum(1), (similarity == values).sum(1))
    gallery = similarity.shape[1]
    return summarise(counts, "average", tuple(k for k in RECALL_AT if k == 1 or k < gallery))
