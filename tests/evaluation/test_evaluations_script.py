"""benchmarks/evaluations.py: its commands are what the parsers take, its videos are the clips."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from torch.nn.functional import avg_pool2d

from kdcmae_fast.cli import build_parser
from kdcmae_fast.config import DataConfig
from kdcmae_fast.data import open_dataset
from kdcmae_fast.data.media import MediaOptions
from kdcmae_fast.evaluation.own_video import read_video_clip

pytest.importorskip("av")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evaluations.py"
NUM_VIDEOS = 3


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluations", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_evaluation_of_pretrained_models_is_run_as_its_parser_takes_it(script):
    commands = {command for command, *_ in script.EVALUATIONS.values()}
    assert commands == {"retrieve", "probe", "inpaint", "localize", "score"}
    for command, *words in script.EVALUATIONS.values():
        given = ["--checkpoint", "m", *words, "--output", "o"]
        build_parser(command).parse_intermixed_args(given)  # exits where it does not


def test_videos_hold_the_held_out_clips(script, model, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "NUM_VIDEOS", NUM_VIDEOS)
    paths = script.write_videos(model_folder, tmp_path / "videos")
    assert len(set(paths)) == NUM_VIDEOS
    clips = open_dataset(DataConfig(), model.config, seed=0, split="heldout")
    options = MediaOptions.of(DataConfig(), model.config)
    for index, path in enumerate(paths):
        assert path.stem == clips.video_id(index)
        found = read_video_clip(path, options, num_frames=4, seconds=options.seconds)
        clip = clips.read_frames(index, 4)
        sound = clip.waveform[: len(found.waveform)]
        assert len(found.waveform) == pytest.approx(len(clip.waveform), abs=1024)
        error = (found.waveform[: len(sound)] - sound).square().mean() / sound.square().mean()
        assert error < 0.01
        # A frame is shown until the next one comes, so it may be that much older.
        np.testing.assert_array_less(clip.times - found.times, 1 / script.FRAMES_PER_SECOND + 1e-3)
        # Colour is kept at half of 32 pixels, so finer than 4 x 4 there is not much to compare.
        own, other = (clips.frames(i, found.times.tolist()) for i in (index, index + 1))
        shown, own, other = (avg_pool2d(x.float(), 4) for x in (found.frames, own, other))
        assert (shown - own).abs().mean() < 5 < 20 < (shown - other).abs().mean()


def test_a_run_on_other_clips_is_named(script, monkeypatch):
    class Opened:
        dataset = ()
        data = DataConfig(source="folder", path="x")

    monkeypatch.setattr(script, "open_source", lambda source: Opened)
    with pytest.raises(SystemExit, match="runs/x was trained on folder, not on synthetic clips"):
        script.write_videos(Path("runs/x"), Path("videos"))
