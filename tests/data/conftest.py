"""Media made on the spot for the tests of the data pipeline."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

VIDEO_FPS = 10


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    """Writes a video: frame i is a grey of level 20 i, its left half at most 40 darker; a tone."""

    def make(
        path: Path,
        *,
        seconds: float = 3.0,
        rate: int = 44_100,
        layout: str = "stereo",
        sound: str | None = "tone",
        picture: bool = True,
        size: tuple[int, int] = (96, 64),
        options: dict[str, str] | None = None,
    ) -> Path:
        import av

        with av.open(str(path), "w", options=options or {}) as out:
            if picture:
                video = out.add_stream("mpeg4", rate=VIDEO_FPS)
                video.width, video.height = size
                video.pix_fmt = "yuv420p"
                video.codec_context.gop_size = 12
                video.bit_rate = 800_000
            if sound is not None:
                audio = out.add_stream("aac", rate=rate, layout=layout)
            if picture:
                for i in range(round(seconds * VIDEO_FPS)):
                    pixels = np.full((size[1], size[0], 3), min(255, 20 + 7 * i), dtype=np.uint8)
                    pixels[:, : size[0] // 2] //= 2
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    frame.pts, frame.time_base = i, Fraction(1, VIDEO_FPS)
                    out.mux(video.encode(frame))
                out.mux(video.encode(None))
            if sound is not None:
                time = np.arange(round(seconds * rate)) / rate
                wave = 0.3 * np.sin(2 * np.pi * (300 + 200 * time) * time) * (sound == "tone")
                channels = len(av.AudioLayout(layout).channels)
                samples = np.stack([wave * (1 if c == 0 else 0.5) for c in range(channels)])
                block = audio.codec_context.frame_size or 1024
                for start in range(0, samples.shape[1], block):
                    piece = np.ascontiguousarray(samples[:, start : start + block], np.float32)
                    frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
                    frame.sample_rate, frame.pts = rate, start
                    frame.time_base = Fraction(1, rate)
                    out.mux(audio.encode(frame))
                out.mux(audio.encode(None))
        return path

    return make


@pytest.fixture
def real_like_sound() -> Callable[..., np.ndarray]:
    """Speech-like sound: gliding harmonics in syllables over coloured noise; (n,) float32."""

    def make(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        time = np.arange(round(seconds * rate)) / rate
        pitch = 120 + 40 * np.sin(2 * np.pi * 0.7 * time)
        phase = 2 * np.pi * np.cumsum(pitch) / rate
        voice = sum(np.sin(k * phase) / k for k in range(1, 25) if k * 160 < rate / 2)
        syllables = np.clip(np.sin(2 * np.pi * 2.5 * time), 0, 1)
        noise = np.cumsum(rng.standard_normal(len(time))) * 1e-3
        noise -= np.convolve(noise, np.ones(201) / 201, mode="same")
        wave = 0.1 * voice * syllables + noise + 1e-3 * rng.standard_normal(len(time))
        return wave.astype(np.float32)

    return make
