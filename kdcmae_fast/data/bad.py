"""Bad clips: counted, named, and too many of them stop the run."""

from collections.abc import Iterable
from typing import NamedTuple

# With fewer clips tried than this, the share is taken of this many (or of the whole dataset if it
# is smaller), so that one bad clip among the first few does not stop a run.
SHARE_BASE = 500


class BadClip(NamedTuple):
    """A clip that was left out, and why (one line)."""

    video_id: str
    reason: str


class TooManyBadClips(RuntimeError):
    """The share of bad clips passed the limit, or no readable clip was found for a slot."""


class BadClips:
    """The bad clips of a run, each once, in the order first met.

    num_clips: size of the dataset. max_share: limit of `check`, 0 to 1.
    Ranks merge theirs by passing the lists of all ranks to `add` in rank order.
    """

    def __init__(self, num_clips: int, max_share: float) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_bad_share={max_share} must be between 0 and 1")
        self.num_clips = num_clips
        self.max_share = max_share
        self._reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, clips: Iterable[BadClip]) -> list[BadClip]:
        """Adds clips; returns those that were new."""
        new = []
        for clip in clips:
            if clip.video_id not in self._reasons:
                self._reasons[clip.video_id] = clip.reason
                new.append(BadClip(*clip))
        return new

    def rows(self) -> list[BadClip]:
        """All bad clips, in the order first met."""
        return [BadClip(video_id, reason) for video_id, reason in self._reasons.items()]

    def check(self, samples_seen: int) -> None:
        """Raises TooManyBadClips when bad > max_share * max(tried, min(num_clips, 500)).

        samples_seen: samples consumed so far by all ranks, over all epochs. Tried are these and the
        bad ones, at most all clips.
        """
        tried = min(self.num_clips, samples_seen + len(self))
        base = max(tried, min(self.num_clips, SHARE_BASE))
        if len(self) <= self.max_share * base:
            return
        examples = "; ".join(f"{clip.video_id}: {clip.reason}" for clip in self.rows()[:3])
        raise TooManyBadClips(
            f"{len(self)} bad clips among {tried} tried of {self.num_clips}, more than "
            f"data.max_bad_share={self.max_share:g} allows ({self.max_share * base:g}); "
            f"repair or remove them, or raise the limit. First: {examples}"
        )
