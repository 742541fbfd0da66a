"""How well a clip's sound and picture fit, moment by moment: similarities and the offset."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.evaluation.offset import best_offset

CLEAR = 0.9  # prominence of about 1 in 10 clips whose sound and picture have nothing in common
TINY = 1e-12  # spread of a matrix all of whose rows are the same, rounding aside


class ClipScore(NamedTuple):
    """Similarity of one clip's sound and picture.

    similarity: mean over the frames of the cosine of each with its own sound. frames: (T,) those
    cosines. The rest is None of a model that hears the clip as a whole:
    matrix: (T, T), entry [i, j] of the sound around frame i with frame j. other_moments: mean of
    those off the diagonal, what `similarity` would be if sound and picture had nothing to do with
    each other but the clip. spacing: seconds between frames. offset: in frames, k > 0: the sound
    leads. offset_similarity: mean of that diagonal. prominence: the same in standard deviations of
    the matrix, after what whole rows and columns have in common is taken off.
    """

    similarity: float
    frames: Tensor
    matrix: Tensor | None = None
    other_moments: float | None = None
    spacing: float | None = None
    offset: int | None = None
    offset_similarity: float | None = None
    prominence: float | None = None

    @property
    def offset_seconds(self) -> float | None:
        """The offset in seconds; None where there is none."""
        if self.offset is None or self.spacing is None:
            return None
        return self.offset * self.spacing

    @property
    def is_clear(self) -> bool:
        """Whether the best offset stands out of the others more than chance would have it."""
        return self.prominence is not None and self.prominence >= CLEAR

    def named(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        named = {"similarity": self.similarity, "frames": self.frames.tolist()}
        if self.matrix is None:
            return named
        return {
            **named,
            "other_moments": self.other_moments,
            "offset_frames": self.offset,
            "offset_seconds": self.offset_seconds,
            "offset_similarity": self.offset_similarity,
            "offset_is_clear": self.is_clear,
            "says": offset_sentence(self),
            "matrix": self.matrix.tolist(),
        }


def score_clip(audio: Tensor, video: Tensor, times: Tensor) -> ClipScore:
    """Scores of one clip.

    audio: (T, D) of the segment around each frame, or (D,) of the clip as a whole. video: (T, D) of
    the frames. times: (T,) seconds of the frames. Not necessarily normalised.
    """
    pictures = torch.nn.functional.normalize(video.double(), dim=1)
    sounds = torch.nn.functional.normalize(audio.double(), dim=-1)
    if audio.ndim == 1:
        frames = pictures @ sounds
        return ClipScore(float(frames.mean()), frames.float())
    matrix = sounds @ pictures.t()
    frames = matrix.diagonal()
    found = best_offset(matrix)
    best = found.means[len(found.means) // 2 + found.offset]
    own = matrix - matrix.mean(0) - matrix.mean(1, keepdim=True) + matrix.mean()
    spread = own.std(correction=0)
    count = matrix.numel() - len(frames)
    return ClipScore(
        similarity=float(frames.mean()),
        frames=frames.float(),
        matrix=matrix.float(),
        other_moments=float(matrix.sum() - frames.sum()) / count if count else None,
        spacing=frame_spacing(times),
        offset=found.offset,
        offset_similarity=float(best),
        prominence=float(own.diagonal(found.offset).mean() / spread) if spread > TINY else 0.0,
    )


def frame_spacing(times: Tensor) -> float:
    """Median seconds from one frame to the next; 0 of a single frame."""
    return float(times.double().diff().median()) if len(times) > 1 else 0.0


def offset_sentence(score: ClipScore) -> str:
    """What the offset means, for a person."""
    assert score.offset_seconds is not None and score.offset_similarity is not None
    how = "leads" if score.offset_seconds > 0 else "lags behind"
    shift = f"sound {how} the picture by about {abs(score.offset_seconds):.1f} s"
    fits = f"similarity {score.offset_similarity:.3f} there, {score.similarity:.3f} as it is"
    if not score.is_clear:
        best = "in sync" if score.offset == 0 else f"{shift}, {fits}"
        return f"no clear offset (fits best: {best})"
    if score.offset == 0:
        return f"in sync, as far as frames {score.spacing:.2f} s apart can tell"
    return f"{shift} ({fits})"
