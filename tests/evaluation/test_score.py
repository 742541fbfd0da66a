"""`kdcmae score`: real encoded files, a model whose answer is known, bad files, pairs."""

import json
import math
import os
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch

from kdcmae_fast.cli import main
from kdcmae_fast.config import DataConfig
from kdcmae_fast.data.clip import ClipError
from kdcmae_fast.data.fbank import kaldi_fbank
from kdcmae_fast.data.media import MediaOptions
from kdcmae_fast.evaluation import score as score_module
from kdcmae_fast.evaluation.own_video import read_video_clip
from kdcmae_fast.evaluation.score import Stretch, picture_names, score_videos
from kdcmae_fast.evaluation.scoring import offset_sentence, score_clip
from kdcmae_fast.evaluation.source import EvaluationSource
from kdcmae_fast.models.cav_mae_sync import CavMaeSync
from kdcmae_fast.models.outputs import Features

pytest.importorskip("av")

FPS = 20
RATE = 44_100
SECONDS = 10.0
QUIET, LOUD = -50.0, -4.0  # dB of the sound at level 0 and 1
DARK, BRIGHT = 30.0, 220.0  # grey of the picture


def level(times, seed: int = 0):
    """0 to 1, another value every half second; defined before and after the clip too."""
    values = np.random.default_rng(seed).permutation(np.linspace(0, 1, 40))
    return values[np.floor((np.asarray(times) + 5) / 0.5).astype(int) % 40]


def write_video(path, *, lead: float = 0.0, seed: int = 0, sound=True, picture=True):
    """Brightness follows `level`, loudness too but `lead` seconds earlier."""
    import av

    with av.open(str(path), "w") as out:
        if picture:
            video = out.add_stream("mpeg4", rate=FPS)
            video.width = video.height = 48
            video.pix_fmt, video.bit_rate = "yuv420p", 400_000
        if sound:
            audio = out.add_stream("aac", rate=RATE, layout="mono")
        for i in range(round(SECONDS * FPS) if picture else 0):
            grey = DARK + (BRIGHT - DARK) * level(i / FPS, seed)
            frame = av.VideoFrame.from_ndarray(np.full((48, 48, 3), grey, np.uint8), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            out.mux(video.encode(frame))
        if picture:
            out.mux(video.encode(None))
        if sound:
            time = np.arange(round(SECONDS * RATE)) / RATE
            noise = np.random.default_rng(1).uniform(-1, 1, len(time))
            wave = noise * 10 ** ((QUIET + (LOUD - QUIET) * level(time + lead, seed)) / 20)
            for start in range(0, len(wave), 1024):
                piece = wave[None, start : start + 1024].astype(np.float32)
                frame = av.AudioFrame.from_ndarray(piece, "fltp", "mono")
                frame.sample_rate, frame.pts = RATE, start
                frame.time_base = Fraction(1, RATE)
                out.mux(audio.encode(frame))
            out.mux(audio.encode(None))
    return path


class Meter(CavMaeSync):
    """Features that are the loudness of a segment, or the brightness of a frame, on one scale."""

    def encode(self, fbank=None, frames=None):
        if fbank is not None:
            decibel = 10 * fbank.mean((1, 2)) / math.log(10) + self.loud_offset
            found = (decibel - QUIET) / (LOUD - QUIET)
        else:
            found = (frames.float().mean((1, 2, 3)) - DARK) / (BRIGHT - DARK)
        places = torch.linspace(0, 1, 24)
        features = torch.exp(-(((found[:, None] - places) / 0.08) ** 2))
        return Features(features, None, None, None) if fbank is not None else Features(
            None, features, None, None
        )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Videos by the number of seconds by which their sound leads."""
    folder = tmp_path_factory.mktemp("videos")
    return {lead: str(write_video(folder / f"lead{lead}.mp4", lead=lead)) for lead in (-1, 0, 1)}


@pytest.fixture
def meter(make_model, monkeypatch, files):
    """`score_videos` with the model that measures; 0.24 s of sound around each frame."""
    config = make_model("cav_mae_sync", audio_length=16).config
    model = Meter(config).eval()
    data = DataConfig(dataset_mean=0.0, dataset_std=1.0, num_frames=20)
    model.loud_offset = 0.0
    clip = read_video_clip(files[0], options(model), num_frames=20, seconds=SECONDS)
    # The filterbank's loudest quarter of a second is that of the highest level in the clip.
    rows = kaldi_fbank(clip.waveform[None], num_mel_bins=config.num_mel_bins)[0]
    loudest = 10 * float(rows.unfold(0, 16, 1).mean((1, 2)).max()) / math.log(10)
    highest = level(np.arange(0, SECONDS, 0.5)).max()
    model.loud_offset = QUIET + (LOUD - QUIET) * highest - loudest
    described = {"checkpoint": "meter", "data": {"time_base": "true"}}
    monkeypatch.setattr(score_module, "open_model", lambda source: (model, data, 0, described))
    return EvaluationSource(checkpoint="meter")


def options(model) -> MediaOptions:
    return MediaOptions.of(DataConfig(), model.config)


@pytest.mark.parametrize("lead", [-1, 0, 1])
def test_a_shift_of_one_second_is_found(meter, files, lead, tmp_path):
    metrics = score_videos(meter, [files[lead]], output=tmp_path)
    (clip,) = metrics["clips"]
    assert clip["offset_seconds"] == pytest.approx(lead, abs=0.05)
    assert clip["offset_is_clear"]
    said = {-1: "lags behind the picture by about 1.0 s", 0: "in sync",
            1: "sound leads the picture by about 1.0 s"}[lead]  # fmt: skip
    assert said in clip["says"]
    assert clip["offset_similarity"] > 0.8
    assert clip["similarity"] == pytest.approx(np.mean(clip["frames"]))
    assert np.shape(clip["matrix"]) == (20, 20)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert [(tmp_path / picture["file"]).stat().st_size > 5000 for picture in metrics["pictures"]]


def test_against_finds_each_file_s_own_sound(meter, files, tmp_path):
    other = str(write_video(tmp_path / "other.mp4", seed=5))
    metrics = score_videos(meter, [files[0], other], against=[other, files[0]], output=tmp_path)
    pairs = metrics["against"]
    assert pairs["best"] == [1, 0]
    assert (pairs["sound_of"], pairs["picture_of"]) == ([files[0], other], [other, files[0]])
    matrix = np.array(pairs["similarity"])
    assert matrix[0, 1] > 0.8 > matrix[0, 0] + 0.2
    alone = score_videos(meter, [other])["clips"][0]["similarity"]
    assert matrix[1, 0] == pytest.approx(alone, abs=1e-5)
    assert pairs["own"] == [1, 0] and metrics["own_is"] == "the same file"
    own, others = (matrix[0, 1] + matrix[1, 0]) / 2, (matrix[0, 0] + matrix[1, 1]) / 2
    assert metrics["similarity_of_own_pairs"] == pytest.approx(own)
    assert metrics["headline"]["similarity, own - other"] == pytest.approx(own - others)
    assert metrics["headline"]["R@1 audio->video"] == metrics["headline"]["R@1 video->audio"] == 1
    assert (metrics["num_clips"], metrics["headline"]["R@1 of chance"]) == (2, 0.5)
    assert metrics["clips_of"] == f"videos in {os.path.dirname(files[0])}, {tmp_path}"
    assert (tmp_path / "against.png").stat().st_size > 3000


def test_a_file_left_out_does_not_shift_whose_own_is_which(meter, files, tmp_path):
    copies = [shutil.copy(files[lead], tmp_path / f"{lead}.mp4") for lead in (0, 1)]
    other, again = (str(write_video(tmp_path / f"{n}.mp4", seed=5)) for n in ("other", "again"))
    sounds = [files[0], str(tmp_path / "gone.mp4"), other, files[1]]
    metrics = score_videos(meter, sounds, against=[copies[0], again, again, copies[1]])
    assert metrics["against"]["own"] == [0, 2, 3]
    assert metrics["own_is"] == "the same place in the lists"
    assert metrics["num_pairs"] == 3 and len(metrics["bad_clips"]) == 1
    uneven = score_videos(meter, [files[0], other], against=[again])
    assert uneven["against"]["own"] == [None, None] and "headline" not in uneven


def test_frames_are_shown_at_their_own_times(files, make_model):
    clip = read_video_clip(
        files[0], options(make_model("cav_mae_sync")), num_frames=13, start=2.0, seconds=6.5
    )
    middles = (np.arange(13) + 0.5) / 13 * 6.5
    shown = np.floor((2.0 + middles + 1e-6) * FPS) / FPS - 2.0  # the frame on show then
    np.testing.assert_allclose(clip.times, shown, atol=1e-3)
    grey = clip.frames.float().mean((1, 2, 3)).numpy()
    wanted = DARK + (BRIGHT - DARK) * level(2.0 + shown + 1e-3)
    np.testing.assert_allclose(grey, wanted, atol=6)
    assert len(clip.waveform) == pytest.approx(6.5 * 16_000, abs=32)


def test_bad_files_are_named_and_the_others_go_on(meter, files, tmp_path, capsys):
    text = tmp_path / "notes.mp4"
    text.write_text("no video")
    sound_only = write_video(tmp_path / "sound.m4a", picture=False)
    silent = write_video(tmp_path / "mute.mp4", sound=False)
    given = [str(text), str(sound_only), files[0], str(silent), str(tmp_path / "gone.mp4")]
    code = main(["score", "--checkpoint", "meter", *given, "--output", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert code == 1
    assert "in sync" in out and files[0] in out
    for name, reason in ((text, "cannot decode"), (sound_only, "no video stream"),
                         (silent, "no audio stream"), (given[-1], "No such file")):  # fmt: skip
        assert any(str(name) in line and reason in line for line in err.splitlines())
    assert err.splitlines()[-1] == "error: 4 of 5 files could not be used (named above)"
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [clip["file"] for clip in metrics["clips"]] == [files[0]]
    assert len(metrics["bad_clips"]) == 4
    with pytest.raises(ValueError, match="none of the videos could be used; first: .*notes.mp4"):
        score_videos(meter, [str(text)])


def test_a_model_that_hears_clips_whole_gives_no_offset(make_model, files, tmp_path, capsys):
    model = make_model("kdc_mae")
    model.save_pretrained(tmp_path / "model")
    arguments = ["--checkpoint", str(tmp_path / "model"), "--device", "cpu", "--num-frames", "7"]
    assert main(["score", files[0], *arguments, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "only a CAV-MAE Sync model can tell" in out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (clip,) = metrics["clips"]
    assert "offset_seconds" not in clip and len(clip["frames"]) == 7
    assert clip["seconds"] == pytest.approx(0.655, abs=0.02)  # what 64 rows are made of
    assert (tmp_path / "out" / metrics["pictures"][0]["file"]).is_file()
    assert main(["score", files[0], files[1], "--against", files[0], *arguments]) == 0
    out = capsys.readouterr().out
    assert "best: 1, lead0.mp4" in out and "own pairs: 1, of the same file" in out


def test_scores_equal_cosines_one_by_one():
    audio, video = torch.randn(6, 5), torch.randn(6, 5)
    score = score_clip(audio, video, torch.arange(6) * 0.5)
    cosine = torch.nn.functional.cosine_similarity
    for i in range(6):
        for j in range(6):
            assert score.matrix[i, j] == pytest.approx(float(cosine(audio[i], video[j], 0)))
    assert score.similarity == pytest.approx(float(cosine(audio, video, 1).mean()))
    assert score.other_moments == pytest.approx(
        float((score.matrix.sum() - score.matrix.diagonal().sum()) / 30), abs=1e-6
    )
    whole = score_clip(audio[0], video, torch.arange(6))
    torch.testing.assert_close(whole.frames, cosine(audio[:1], video, 1))


def test_what_has_nothing_in_common_has_no_clear_offset():
    clear = sum(
        score_clip(torch.randn(16, 8), torch.randn(16, 8), torch.arange(16)).is_clear
        for _ in range(200)
    )
    assert clear <= 20
    flat = score_clip(torch.ones(4, 3), torch.ones(4, 3), torch.arange(4))
    assert offset_sentence(flat) == "no clear offset (fits best: in sync)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 0}, "num_frames=0 must be at least 1"),
        ({"start": -1.0}, "start=-1 must be at least 0"),
        ({"seconds": 0.0}, "seconds=0 must be above 0"),
        ({"seconds": math.nan}, "seconds=nan"),
    ],
)
def test_bad_stretches_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Stretch(**change)


def test_a_stretch_behind_the_end_is_named(files, make_model):
    with pytest.raises(ClipError, match=r"10.00 s long: nothing from 60 s on"):
        read_video_clip(
            files[0], options(make_model("cav_mae_sync")), num_frames=3, start=60.0, seconds=5.0
        )


def test_pictures_have_names_of_their_own():
    names = picture_names(["a/x.mp4", "b/x.mp4", "y.mp4"])
    assert names == ["000_x.mp4.png", "001_x.mp4.png", "y.mp4.png"]
