"""What `kdcmae prepare` makes of a video: settings and the published presets."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kdcmae_fast.data.media import MIN_SECONDS
from kdcmae_fast.data.prepare.grids import parse_grid

LAYOUTS = {"shards": ("flac", "npy"), "cav_mae": ("wav", "flac")}  # and their kinds of sound
MAX_FRAMES = 100  # two digits in the name of a shard's member
INPUTS_PER_UNIT = (16, 512)  # smallest and largest automatic unit
UNITS = 32  # wanted of a small dataset, so that many processes have work


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """How an input becomes a clip. Two runs with the same settings and inputs give the same bytes.

    layout: shards or cav_mae. num_frames: JPEG files of a clip, at most (grids fps and stride) or
    exactly (grids seconds and ends). grid: `grids.parse_grid`. img_size: short side, pixels. crop:
    center (square) or none. quality: of the JPEG files, 1 to 95. seconds: longest clip.
    min_seconds: of sound; less is skipped. cut: first window of a long video, or all, one after
    another. channel: first, or mean of all. sound: flac or npy in shards, wav or flac in cav_mae
    ("": the first of them). keep_silent: clips of digital silence are kept. clips_per_shard: inputs
    of a unit, 0: by their number. order: shuffled (by a hash of the ids) or given.
    """

    layout: str = "shards"
    num_frames: int = 10
    grid: str = "seconds"
    img_size: int = 224
    crop: str = "center"
    quality: int = 75
    seconds: float = 10.0
    min_seconds: float = MIN_SECONDS
    cut: str = "first"
    channel: str = "first"
    sound: str = ""
    keep_silent: bool = False
    clips_per_shard: int = 0
    order: str = "shuffled"

    def __post_init__(self) -> None:
        _require_one_of("layout", self.layout, tuple(LAYOUTS))
        if not self.sound:
            object.__setattr__(self, "sound", LAYOUTS[self.layout][0])
        _require_one_of("sound", self.sound, LAYOUTS[self.layout])
        _require_one_of("crop", self.crop, ("center", "none"))
        _require_one_of("cut", self.cut, ("first", "all"))
        _require_one_of("channel", self.channel, ("first", "mean"))
        _require_one_of("order", self.order, ("shuffled", "given"))
        if parse_grid(self.grid)[1] and self.layout == "cav_mae":
            raise ValueError(
                f"--layout cav_mae needs as many frames of every clip: --grid {self.grid} must be "
                f"seconds or ends (or --layout shards)"
            )
        for name, low, high in (
            ("num_frames", 1, MAX_FRAMES),
            ("img_size", 1, 8192),
            ("quality", 1, 95),
            ("min_seconds", MIN_SECONDS, math.inf),
            ("seconds", self.min_seconds, 3600),
            ("clips_per_shard", 0, 1_000_000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {value} must be between {low} and {high}")

    def unit_size(self, num_inputs: int) -> int:
        """Inputs of a shard, or of whatever else is made as a whole."""
        if self.clips_per_shard:
            return self.clips_per_shard
        low, high = INPUTS_PER_UNIT
        return min(high, max(low, math.ceil(num_inputs / UNITS)))

    def as_dict(self) -> dict[str, Any]:
        """Field -> value, for JSON."""
        return dataclasses.asdict(self)


# Values of PrepareSettings that differ from its defaults. xkd keeps the 8 frames a second and the
# uncropped 112 pixels that its 4 s views are cut from, videomae every 4th frame for its views of 16
# and some pixels around the 224 that are cropped.
PRESETS: dict[str, dict[str, Any]] = {
    "cav_mae": {},
    "cav_mae_sync": {"num_frames": 16, "grid": "ends"},
    "xkd": {
        "num_frames": 80,
        "grid": "fps:8",
        "img_size": 112,
        "crop": "none",
        "quality": 95,
        "channel": "mean",
    },
    "videomae": {
        "num_frames": 80,
        "grid": "stride:4",
        "img_size": 256,
        "crop": "none",
        "quality": 90,
    },
}


def make_settings(preset: str, **changes: Any) -> PrepareSettings:
    """The settings of a preset, with those of `changes` that are not None instead."""
    _require_one_of("preset", preset, tuple(PRESETS))
    given = {name: value for name, value in changes.items() if value is not None}
    return PrepareSettings(**{**PRESETS[preset], **given})


def _require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"--{name} {value} must be {' or '.join(choices)}")
