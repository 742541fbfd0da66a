"""Written videos, decoded with PyAV: pictures, their times, the sound, what cannot be written."""

import numpy as np
import pytest

from kdcmae_fast.data.synthetic import SyntheticClips
from kdcmae_fast.evaluation.video_file import write_video

av = pytest.importorskip("av")

TIMES = np.arange(0, 1.28, 0.04)


@pytest.fixture(scope="module")
def clip():
    """Pictures (32, 64, 64, 3) and sound (20480,) of a clip."""
    clips = SyntheticClips(1, seed=0, img_size=64, clip_seconds=1.28)
    pictures = clips.frames(0, TIMES.tolist()).permute(0, 2, 3, 1).numpy()
    return pictures, clips.waveform(0).numpy()


@pytest.fixture(scope="module")
def path(clip, tmp_path_factory):
    pictures, sound = clip
    return write_video(tmp_path_factory.mktemp("made") / "new" / "a.mp4", pictures, TIMES, sound)


def test_pictures_and_their_times_come_back(path, clip):
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx(TIMES, abs=1e-3)
    found = np.stack([frame.to_ndarray(format="rgb24") for frame in frames]).astype(float)
    assert np.abs(found - clip[0]).mean() < 8  # of 255; the clip's own noise is hard to code
    brightness = found.mean((1, 2, 3)) - clip[0].mean((1, 2, 3))
    assert np.abs(brightness).max() < 2  # full range stays full range


def test_sound_comes_back_from_its_first_sample_on(path, clip):
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        assert (stream.rate, stream.channels) == (16_000, 1)
        found = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    sound = clip[1]
    assert abs(len(found) - len(sound)) < 1024
    error = (found[: len(sound)] - sound).reshape(-1, 256)
    rms = np.sqrt((error**2).mean(1) / (sound**2).mean())
    assert rms[:8].max() < 0.06 and rms.mean() < 0.02


def test_the_same_again_is_the_same_file(tmp_path):
    clips = SyntheticClips(4, seed=0, img_size=64, clip_seconds=1.28)
    for index in range(4):
        pictures = clips.frames(index, TIMES.tolist()).permute(0, 2, 3, 1).numpy()
        sound = clips.waveform(index).numpy()
        files = {
            write_video(tmp_path / f"{index}_{again}.mp4", pictures, TIMES, sound).read_bytes()
            for again in range(6)
        }
        assert len(files) == 1


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one picture"),
        (np.zeros((1, 8, 9, 3), np.uint8), "pictures of 9 x 8: both must be even"),
    ],
)
def test_what_cannot_be_written_is_named(pictures, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", pictures, np.zeros(len(pictures)), np.zeros(10, np.float32))
