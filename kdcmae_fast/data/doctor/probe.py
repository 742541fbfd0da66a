"""One clip as a run would read it, and what its files are; in worker processes."""

import functools
import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdcmae_fast.data.clip import SAMPLE_RATE, ClipDataset, ClipError
from kdcmae_fast.data.fbank import num_fbank_frames
from kdcmae_fast.data.folder import VideoFolder
from kdcmae_fast.data.frontend import FrontEnd
from kdcmae_fast.data.manifest import ManifestClips
from kdcmae_fast.data.media import MediaError, decode_picture, require_file
from kdcmae_fast.data.shards import ShardClips
from kdcmae_fast.data.shards.layout import read_index, tar_path
from kdcmae_fast.data.sounds import SoundClips

CHUNK = 8  # clips a worker takes at a time
MOST_FRAMES = 100  # looked for beyond data.num_frames
SMALL = 16  # pixels; a picture is decoded whole, but not resized for nothing
MICROSECONDS = 1_000_000


class FbankSums(NamedTuple):
    """Of the values of a clip's fbank, as the model gets it but not normalised."""

    values: int
    total: float
    squares: float


class Properties(NamedTuple):
    """What the files of a clip are; None where that is not known.

    seconds, rate (Hz), channels: of the sound. size: width and height of a picture. frames:
    pictures in front of the first that is missing.
    """

    seconds: float | None = None
    rate: int | None = None
    channels: int | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None


class ClipFacts(NamedTuple):
    """What was found about one clip.

    reason: why a run would count it as bad, "" if it would not. peak, rms: of the sound, 1 is full
    scale. fbank: None for bad clips. sound: of its rows that are no padding.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    video_id: str
    reason: str
    properties: Properties
    peak: float = math.nan
    rms: float = math.nan
    label: int = -1
    fbank: FbankSums | None = None
    sound: FbankSums | None = None


class Probe:
    """Reads clips of `dataset` as epochs 0 .. epochs - 1 do. front_end: without normalisation."""

    def __init__(self, dataset: ClipDataset, front_end: FrontEnd, epochs: int = 1) -> None:
        self.dataset = dataset
        self.front_end = front_end
        self.epochs = epochs

    def __call__(self, index: int) -> ClipFacts:
        """Everything about clip `index`; RuntimeError for what no run survives."""
        try:
            return self._facts(index)
        except Exception as error:  # a run skips ClipError only; the rest ends it
            raise RuntimeError(f"clip {index}: {type(error).__name__}: {error}") from error

    def _facts(self, index: int) -> ClipFacts:
        name = self.dataset.video_id(index)
        properties, problem = _properties(self.dataset, index)
        try:
            clips = [self.dataset.read(index, epoch) for epoch in range(self.epochs)]
        except ClipError as error:
            return ClipFacts(index, name, error.reason, properties)
        if problem:  # another epoch would read the frame that this one did not
            return ClipFacts(index, name, " ".join(problem.split()), properties)
        sound = clips[0].waveform
        rows = self.front_end.fbank(sound[None])[0].double()
        return ClipFacts(
            index,
            name,
            "",
            properties,
            peak=float(sound.abs().max()),
            rms=float(sound.double().square().mean().sqrt()),
            label=clips[0].label,
            fbank=_sums(rows),
            sound=_sums(rows[: num_fbank_frames(len(sound))]),
        )


def _sums(values: torch.Tensor) -> FbankSums:
    return FbankSums(values.numel(), float(values.sum()), float(values.square().sum()))


def _properties(dataset: ClipDataset, index: int) -> tuple[Properties, str]:
    """Properties of a clip's files, and why a frame that some epoch takes cannot be used."""
    if isinstance(dataset, ManifestClips):
        return _manifest_properties(dataset, index)
    if isinstance(dataset, ShardClips):
        return _shard_properties(dataset, index)
    if isinstance(dataset, SoundClips):
        return _sound_properties(dataset.entries[index].wav), ""
    if isinstance(dataset, VideoFolder):
        return _video_properties(str(dataset.root / dataset.names[index])), ""
    return Properties(), ""


def _sound_properties(path: str) -> Properties:
    import soundfile

    try:
        require_file(path)
        about = soundfile.info(path)
    except (MediaError, soundfile.SoundFileError, RuntimeError):
        return Properties()  # reading the clip tells the same, in its own words
    return Properties(about.frames / about.samplerate, about.samplerate, about.channels)


def _manifest_properties(dataset: ManifestClips, index: int) -> tuple[Properties, str]:
    entry = dataset.entries[index]
    sound = _sound_properties(entry.wav)
    seconds = sound.seconds or 0.0
    count, folder = dataset.options.num_frames, entry.video_path
    problem = ""
    for k in reachable_frames(entry.times(seconds, count), seconds, dataset.options.seconds):
        path = f"{folder}/frame_{k}/{entry.video_id}.jpg"
        try:
            require_file(path)
            decode_picture(path, SMALL, path)
        except MediaError as error:
            problem = str(error)
            break
    size = _picture_size(f"{folder}/frame_0/{entry.video_id}.jpg")
    frames = _count_frames(folder, entry.video_id, count)
    return sound._replace(size=size, frames=frames), problem


def reachable_frames(times: NDArray[np.floating], seconds: float, window: float) -> list[int]:
    """Frames that some epoch can take of a sound of `seconds`, of which a clip uses `window`.

    times: of the frames, ascending. A window of a longer sound never starts at exactly 0, so the
    frame at 0 is only taken where the next one is too far away to be in every window.
    """
    if seconds <= window:
        return list(range(len(times)))
    from_start = ((times > 0) & (times <= window)).any()
    to_end = ((times >= seconds - window) & (times < seconds)).any()
    outside = ((times <= 0) & from_start) | ((times >= seconds) & to_end)
    return np.flatnonzero(~outside).tolist()


def _count_frames(folder: str, name: str, expected: int) -> int:
    """Pictures from frame_0 on without a gap."""
    limit = expected + MOST_FRAMES
    missing = (k for k in range(limit) if not os.path.isfile(f"{folder}/frame_{k}/{name}.jpg"))
    return next(missing, limit)


def _picture_size(file: str | io.BytesIO) -> tuple[int, int] | None:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _shard_properties(dataset: ShardClips, index: int) -> tuple[Properties, str]:
    ends = np.cumsum(dataset.shard_sizes)
    shard = int(np.searchsorted(ends, index, side="right"))
    place = index - (int(ends[shard]) - dataset.shard_sizes[shard])
    line = _shard_lines(dataset.root, dataset.names[shard])[place]
    seconds = line["num_samples"] / SAMPLE_RATE
    times = np.asarray(line["frame_times"], dtype=np.float32)
    pictures = [line["members"][name] for name in sorted(line["members"]) if name.endswith(".jpg")]
    size, problem = None, ""
    tar = tar_path(dataset.root, dataset.names[shard])
    with tar.open("rb") as file:
        for k in reachable_frames(times, seconds, dataset.options.seconds):
            start, length = pictures[k]
            file.seek(start)
            data = file.read(length)
            size = size or _picture_size(io.BytesIO(data))
            try:
                decode_picture(io.BytesIO(data), SMALL, f"{tar}, offset {start}")
            except MediaError as error:
                problem = problem or str(error)
    return Properties(seconds, SAMPLE_RATE, 1, size, len(times)), problem


@functools.lru_cache(maxsize=4)
def _shard_lines(root: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in read_index(root, name) if "members" in line]


def _video_properties(path: str) -> Properties:
    import av

    try:
        with av.open(path, options={"protocol_whitelist": "file"}, metadata_errors="ignore") as f:
            sounds, pictures = f.streams.audio, f.streams.video
            sound = sounds[0].codec_context if sounds else None
            picture = pictures[0].codec_context if pictures else None
            return Properties(
                seconds=f.duration / MICROSECONDS if f.duration else None,
                rate=sound.sample_rate if sound else None,
                channels=sound.channels if sound else None,
                size=(picture.width, picture.height) if picture else None,
            )
    except (av.FFmpegError, ValueError, OSError):
        return Properties()


_probe: Probe | None = None  # of a worker process


def _start_worker(probe: Probe) -> None:
    global _probe
    torch.set_num_threads(1)
    _probe = probe


def _probe_chunk(indexes: Sequence[int]) -> list[ClipFacts]:
    assert _probe is not None
    return [_probe(index) for index in indexes]


def probe_clips(
    probe: Probe, indexes: Sequence[int], workers: int, progress: Callable[[int], None]
) -> Iterator[ClipFacts]:
    """Facts of the clips, in order. workers: processes; 0 reads here. progress: told of each."""
    if not workers:
        for index in indexes:
            yield probe(index)
            progress(1)
        return
    chunks = [indexes[start : start + CHUNK] for start in range(0, len(indexes), CHUNK)]
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(
        workers, mp_context=get_context(method), initializer=_start_worker, initargs=(probe,)
    ) as pool:
        under_way: list[tuple[Sequence[int], Future[list[ClipFacts]]]] = []
        waiting = iter(chunks)
        try:
            for chunk in itertools.islice(waiting, 2 * workers):
                under_way.append((chunk, pool.submit(_probe_chunk, chunk)))
            while under_way:
                chunk, future = under_way[0]
                facts = future.result()
                under_way.pop(0)
                for more in itertools.islice(waiting, 1):
                    under_way.append((more, pool.submit(_probe_chunk, more)))
                yield from facts
                progress(len(facts))
        except BrokenProcessPool:
            names = [probe.dataset.video_id(i) for chunk, _ in under_way for i in chunk]
            raise RuntimeError(
                f"a reader died (out of memory, or a decoder crashed) at one of {len(names)} "
                f"clips from {names[0]} on; data.num_workers=0 shows which"
            ) from None
        finally:
            for _, future in under_way:
                future.cancel()
