"""The frames of a clip as JPEG files, with the times at which they are shown."""

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcmae_fast.data.media import MediaError, Window, require_length
from kdcmae_fast.data.prepare.grids import choose_frames
from kdcmae_fast.data.prepare.settings import PrepareSettings
from kdcmae_fast.data.video import stated_seconds

SEEK_MARGINS = (0.0, 2.0, 10.0, 1e9)  # seconds; the last is the whole file
EARLY = 1e-6  # seconds; a frame at the very start of the window counts


class Shown(NamedTuple):
    """Frames of the window in the order shown: time stamps, times in seconds from its start, and
    where the last one ends."""

    stamps: list[int]
    times: NDArray[np.float64]
    end: float


def read_pictures(
    container: Any, stream: Any, window: Window, origin: float, settings: PrepareSettings
) -> tuple[list[bytes], list[float]]:
    """JPEG files and their times, seconds from the window's start; MediaError if one is damaged.

    container: just opened. origin: its first time, seconds.
    """
    packets = _packets(container, stream, window, origin)
    shown = _shown_by_packets(packets, stream, window, origin)
    pictures = _decode_chosen(packets, stream, shown, None, settings) if shown else None
    if pictures is None:
        # Time stamps of packets are missing, or not those of frames: count what is decoded.
        stamps = _stamps_by_frames(packets, stream)
        shown = _shown(dict.fromkeys(stamps), stream, window, origin)
        pictures = _decode_chosen(packets, stream, shown, stamps, settings) if shown else None
    if shown is None or pictures is None:
        raise MediaError("video frames are missing: truncated or damaged")
    if stated := stated_seconds(stream):
        require_length(shown.end, min(window.seconds, stated - window.start), "video")
    return pictures


def picture_bytes(pixels: NDArray[np.uint8], settings: PrepareSettings) -> bytes:
    """(H, W, 3) RGB -> JPEG: short side to img_size (bilinear), cropped as the settings say."""
    from PIL import Image

    height, width = pixels.shape[:2]
    size, short = settings.img_size, min(height, width)
    image = Image.fromarray(pixels)
    if short != size:
        scaled = max(1, size * width // short), max(1, size * height // short)
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    if settings.crop == "center" and image.size != (size, size):
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=settings.quality)
    return data.getvalue()


def _packets(container: Any, stream: Any, window: Window, origin: float) -> list[Any]:
    """Packets that the window's frames are made of: from the key frame before it to its end."""
    start, end = origin + window.start, origin + window.start + window.seconds
    packets: list[Any] = []
    for margin in SEEK_MARGINS:
        # Times in a program stream are guessed after a seek, and wrong.
        seek = window.start > 0 and container.format.name != "mpeg"
        if seek:
            container.seek(int(max(start - margin, origin) / stream.time_base), stream=stream)
        packets = list(_packets_until(container, stream, end))
        keys = [
            number
            for number, packet in enumerate(packets)
            if packet.is_keyframe and (_seconds(packet) or 0.0) <= start + EARLY
        ]
        if keys or not seek:
            return packets[keys[-1] if keys else 0 :]
    return packets


def _packets_until(container: Any, stream: Any, end: float) -> Iterator[Any]:
    for packet in container.demux(stream):
        if packet.size:
            if packet.dts is not None and float(packet.dts * packet.time_base) >= end:
                return
            yield packet


def _seconds(packet: Any) -> float | None:
    stamp = packet.dts if packet.pts is None else packet.pts
    return None if stamp is None else float(stamp * packet.time_base)


def _shown_by_packets(
    packets: Sequence[Any], stream: Any, window: Window, origin: float
) -> Shown | None:
    """The window's frames as the container lists them; None if it gives them no times."""
    if any(packet.pts is None for packet in packets):
        return None
    # An edit list hides packets that only serve to decode later ones.
    spans = {packet.pts: packet.duration for packet in packets if not packet.is_discard}
    return _shown(spans, stream, window, origin)


def _stamps_by_frames(packets: Sequence[Any], stream: Any) -> list[int]:
    """Time stamps of the frames in the order they are decoded, which is the order shown.

    Containers without presentation times give frames those of other frames; sorted they are right.
    """
    stamps = [(frame.pts, frame.dts) for frame in _frames(packets, stream)]
    for kind in zip(*stamps, strict=True):
        if None not in kind and len(set(kind)) == len(kind):
            return sorted(kind)
    return []


def _shown(spans: dict[int, Any], stream: Any, window: Window, origin: float) -> Shown | None:
    unit = float(stream.time_base)
    stamps = sorted(spans)
    times = np.asarray(stamps, dtype=np.float64) * unit - origin - window.start
    inside = (times >= -EARLY) & (times < window.seconds - EARLY)
    if not inside.any():
        return None
    kept = [stamp for stamp, keep in zip(stamps, inside, strict=True) if keep]
    last = max((spans[kept[-1]] or 0) * unit, 1 / _rate(stream))
    times = np.maximum(times[inside], 0.0)
    return Shown(kept, times, float(times[-1]) + last)


def _decode_chosen(
    packets: Sequence[Any],
    stream: Any,
    shown: Shown,
    stamps: Sequence[int] | None,
    settings: PrepareSettings,
) -> tuple[list[bytes], list[float]] | None:
    """The chosen frames, encoded; None if one of them does not come out of the decoder.

    stamps: of all frames in the order decoded; None: frames have their own, and None comes back
    when these do not ascend.
    """
    from av.video.reformatter import VideoReformatter

    convert = VideoReformatter()  # one for all, it is slow to make
    chosen = choose_frames(
        settings.grid, settings.num_frames, shown.times, _rate(stream), settings.seconds
    )
    wanted = {shown.stamps[index] for index in chosen}
    found: dict[int, bytes] = {}
    last = None
    for number, frame in enumerate(_frames(packets, stream)):
        stamp = frame.pts if stamps is None else stamps[number]
        if stamp is None or (last is not None and stamp <= last):
            return None
        last = stamp
        if stamp in wanted and not frame.is_corrupt:
            pixels = convert.reformat(frame, format="rgb24").to_ndarray()
            upright = np.rot90(pixels, round(frame.rotation / 90) % 4)
            found[stamp] = picture_bytes(np.ascontiguousarray(upright), settings)
            if len(found) == len(wanted):
                kept = [found[shown.stamps[index]] for index in chosen]
                return kept, shown.times[chosen].tolist()
    return None


def _frames(packets: Sequence[Any], stream: Any) -> Iterator[Any]:
    """Everything that decodes, in the order shown; what does not is left out."""
    import av

    codec = stream.codec_context
    codec.flush_buffers()
    for packet in [*packets, None]:
        try:
            yield from codec.decode(packet)
        except av.error.EOFError:
            return
        except av.error.InvalidDataError:
            continue


def _rate(stream: Any) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)
