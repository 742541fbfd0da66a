"""The same clips as files of the published layout and as shards, made on the spot."""

import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SECONDS, RATE = 10, 16_000
STORED = (340, 256)  # pixels, width and height of a frame of the published layout
IMG_SIZE = 224
QUALITY = 75  # of JPEG files, in both layouts as both are prepared by default
PER_SHARD = 128


def make_clips(root: Path, count: int) -> None:
    """root/files: 16-bit wav, JPEG and train.json; root/flac, root/npy: shards, frames prepared."""
    from kdcmae_fast.data.shards import PreparedClip, finish_dataset, write_shard

    files, entries, clips = root / "files", [], []
    for number in range(count):
        name = f"clip_{number:05d}"
        waveform, picture = sound(number), image(number)
        _write_files(files, name, waveform, picture)
        entries.append({"video_id": name, "wav": str(files / f"{name}.wav"),
                        "video_path": str(files), "labels": "/m/a"})  # fmt: skip
        clips.append(
            PreparedClip(
                id=name,
                source=name,
                start=0.0,
                seconds=SECONDS,
                frames=[_prepared(picture)],
                frame_times=[SECONDS / 2],
                waveform=waveform,
                labels=("/m/a",),
            )  # fmt: skip
        )
    (root / "train.json").write_text(json.dumps({"data": entries}))
    shards = [clips[first : first + PER_SHARD] for first in range(0, count, PER_SHARD)]
    for kind in ("flac", "npy"):
        for number, shard in enumerate(shards):
            write_shard(root / kind, number, shard, first=number * PER_SHARD, sound=kind)
        finish_dataset(root / kind, len(shards), {})


def sound(number: int) -> NDArray[np.float32]:
    """Gliding harmonics in syllables over noise, in steps of 16-bit sound."""
    rng = np.random.default_rng(number)
    time = np.arange(SECONDS * RATE) / RATE
    phase = 2 * np.pi * np.cumsum(120 + number % 50 + 40 * np.sin(2 * np.pi * 0.7 * time)) / RATE
    voice = sum(np.sin(k * phase) / k for k in range(1, 12))
    wave = 0.1 * voice * np.clip(np.sin(5 * np.pi * time), 0, 1)
    wave += 3e-3 * rng.standard_normal(len(time))
    return (np.round(wave * 2**15) / 2**15).astype(np.float32)


def image(number: int):
    """A smooth coloured picture with some grain, STORED pixels."""
    from PIL import Image

    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(STORED, Image.Resampling.BICUBIC))
    grain = rng.integers(-3, 4, smooth.shape)
    return Image.fromarray((smooth.astype(np.int16) + grain).clip(0, 255).astype(np.uint8))


def _write_files(files: Path, name: str, waveform: NDArray[np.float32], picture) -> None:
    import soundfile

    (files / "frame_0").mkdir(parents=True, exist_ok=True)
    soundfile.write(files / f"{name}.wav", waveform, RATE, subtype="PCM_16")
    picture.save(files / "frame_0" / f"{name}.jpg", quality=QUALITY)


def _prepared(picture) -> bytes:
    """The picture's IMG_SIZE square as a JPEG file, as it lies in a shard."""
    from PIL import Image

    from kdcmae_fast.data.media import fit_picture

    square = fit_picture(np.asarray(picture), IMG_SIZE).permute(1, 2, 0).numpy()
    data = io.BytesIO()
    Image.fromarray(square).save(data, "JPEG", quality=QUALITY)
    return data.getvalue()
