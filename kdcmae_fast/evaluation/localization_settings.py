"""What `localize` is asked to do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from kdcmae_fast.evaluation.localization_maps import fusion_weights
from kdcmae_fast.evaluation.localization_scores import Truth

MapKind = Literal["attribution", "cosine"]


@dataclass(frozen=True, kw_only=True)
class LocalizationSettings:
    """What `localize` draws and scores.

    map: "attribution" (the cosine is scored too) or "cosine" alone, which is quick; pictures show
        it and fusion starts from it. references: other clips' frames, and as many blurred copies
        of its own, that an attribution starts from, at least 2.
    annotations: vggss.json or a folder of Flickr-SoundNet XML files (None: the boxes of the
        synthetic clips). ids: CSV whose first column names the clips to keep. frames, sounds:
        folders with <id>.jpg and <id>.wav of the annotated clips (None: the clips of data.*, whose
        frames must then show the whole picture). allow_missing: leave annotated clips out that are
        not there. truth: how boxes make a map (None: what belongs to the annotations).
    fusion: "ezvsl", "avl-flickr", "avl-vggss" or "alpha" (None: no fusion), with alpha, and the
        priors: "colour", "tokens" or .npz files of maps by clip name.
    pictures, videos: how many clips to draw. save_maps: write maps.npz, of all clips.
    """

    map: MapKind = "attribution"
    references: int = 64
    annotations: str | None = None
    ids: str | None = None
    frames: str | None = None
    sounds: str | None = None
    allow_missing: bool = False
    truth: Truth | None = None
    fusion: str | None = None
    alpha: float = 0.4
    priors: Sequence[str] = field(default=())
    pictures: int = 8
    videos: int = 0
    save_maps: bool = False

    def __post_init__(self) -> None:
        if self.map not in get_args(MapKind):
            raise ValueError(f"map={self.map!r} must be one of {', '.join(get_args(MapKind))}")
        if self.references < 2:
            raise ValueError(f"references={self.references} must be at least 2")
        if min(self.pictures, self.videos) < 0:
            raise ValueError(f"pictures={self.pictures} and videos={self.videos} must be 0 or more")
        if self.annotations is None and (self.ids or self.frames or self.sounds):
            raise ValueError("--ids, --frames and --sounds go with --annotations; give its path")
        if (self.frames is None) != (self.sounds is None):
            raise ValueError("--frames and --sounds go together: give both folders, or neither")
        if self.fusion is None:
            if self.priors:
                raise ValueError("--prior needs a rule: give --fuse")
            return
        count = len(fusion_weights(self.fusion, self.alpha)) - 1
        if len(self.priors) != count:
            raise ValueError(
                f"fusion={self.fusion} takes {count} prior maps, got {len(self.priors)}: give "
                f"--prior {count} times (colour, tokens or an .npz file)"
            )

    @property
    def main(self) -> str:
        """The name of the map that the headline and the pictures are about."""
        return f"fused ({self.fusion})" if self.fusion else self.map
