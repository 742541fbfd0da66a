"""Resident memory while clips are streamed from shards: the training process and its workers."""

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

IMG_SIZE, AUDIO_LENGTH = 32, 64  # small clips: what could leak is counted per clip, not per byte
PER_SHARD = 500
WINDOW = 2000
FRAMES = 10
BATCH = 25


class Point(NamedTuple):
    """Clips streamed so far and resident MB then, of this process and of its workers."""

    clips: int
    main_mb: float
    workers_mb: float


def write_clips(root: Path, count: int) -> None:
    """Shards of `count` clips of 0.7 s, each with its own sound."""
    from PIL import Image

    from kdcmae_fast.data.shards import PreparedClip, finish_dataset, write_shard

    data = io.BytesIO()
    Image.new("RGB", (IMG_SIZE, IMG_SIZE), (90, 120, 40)).save(data, "JPEG")

    def clip(number: int) -> PreparedClip:
        noise = np.random.default_rng(number).standard_normal(11_200).astype(np.float32)
        times = [0.07 * k for k in range(FRAMES)]
        name = f"clip {number}.mp4"
        return PreparedClip(name, name, 0.0, 0.7, [data.getvalue()] * FRAMES, times, 0.1 * noise)

    shards = -(-count // PER_SHARD)
    for shard in range(shards):
        first = shard * PER_SHARD
        numbers = range(first, min(first + PER_SHARD, count))
        write_shard(root, shard, map(clip, numbers), first=first, sound="npy")
    finish_dataset(root, shards, {})


def stream(root: Path, count: int, every: int, workers: int = 2) -> Iterator[Point]:
    """A point each `every` clips of `count`, filterbank included."""
    from kdcmae_fast.config import DataConfig, ModelConfig
    from kdcmae_fast.data import FrontEnd, make_loader, open_dataset

    model = ModelConfig(audio_length=AUDIO_LENGTH, img_size=IMG_SIZE)
    data = DataConfig(
        source="shards", path=str(root), num_workers=workers, shuffle_window=WINDOW, noise=True
    )
    dataset, front_end = open_dataset(data, model, seed=0), FrontEnd(data, model)
    loader = make_loader(dataset, data=data, seed=0, micro_batch_size=BATCH)
    for done, raw in enumerate(islice(loader, count // BATCH), 1):
        front_end(raw)
        if done * BATCH % every == 0:
            yield _point(done * BATCH)


def _point(clips: int) -> Point:
    process = psutil.Process()
    resident = [p.memory_info().rss / 1e6 for p in (process, *process.children(recursive=True))]
    return Point(clips, round(resident[0], 1), round(sum(resident[1:]), 1))
