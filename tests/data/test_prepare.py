"""`kdcmae prepare` from end to end: a zoo of good and bad videos, both layouts, kills, shares."""

import csv
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcmae_fast.cli import main
from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import make_loader, open_dataset

pytest.importorskip("av")
pytest.importorskip("soundfile")

MODEL = ModelConfig(audio_length=96, img_size=32)
SMALL = ["--img-size", "32", "--workers", "2"]


def prepare(*arguments: object) -> int:
    return main(["prepare", *map(str, arguments)])


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a dataset but the one with the times of the run."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "metrics.json")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def variable_rate(path: Path) -> None:
    """2 s whose frames are 0.05 s apart at first and 0.25 s later; as bright as they are late."""
    import av

    stamps = [*range(0, 1000, 50), *range(1000, 2000, 250)]
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("mpeg4", rate=20), out.add_stream("aac", rate=16_000)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        for stamp in stamps:
            pixels = np.full((64, 64, 3), 20 + stamp // 10, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        tone = 0.3 * np.sin(np.arange(32_000) * 0.2).astype(np.float32)
        for start in range(0, 32_000, 1024):
            frame = av.AudioFrame.from_ndarray(
                tone[None, start : start + 1024], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))


def turn(path: Path) -> None:
    """Write a quarter turn into the display matrix of an mp4's first track."""
    content = bytearray(path.read_bytes())
    track = content.index(b"tkhd") + 4 + 40
    content[track : track + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30
    )
    path.write_bytes(content)


def make_zoo(folder: Path, make_video) -> dict[str, str]:
    """Videos of all kinds in `folder`; returns id -> expected reason, "" for a clip."""
    (folder / "sub").mkdir(parents=True)
    make_video(folder / "plain.mp4", seconds=2.0)
    make_video(folder / "telephone.mp4", seconds=1.0, rate=8000, layout="mono")
    make_video(folder / "sub" / "studio.mkv", seconds=1.0, rate=48_000)
    make_video(folder / "cinema.mp4", seconds=1.0, rate=48_000, layout="5.1")
    make_video(folder / "half.mp4", seconds=0.5)
    make_video(folder / "old.avi", seconds=1.0)
    make_video(folder / "sub" / "ünï cödé 名前.mp4", seconds=1.0)
    shutil.copy(folder / "plain.mp4", folder / "-rf; touch x $(id).mp4")
    turn(make_video(folder / "turned.mp4", seconds=1.0, size=(64, 64)))
    variable_rate(folder / "variable.mp4")
    make_video(folder / "mute.mp4", seconds=1.0, sound=None)
    make_video(folder / "blind.mp4", seconds=1.0, picture=False)
    make_video(folder / "short.mp4", seconds=0.2)
    make_video(folder / "still.mp4", seconds=1.0, sound="silence")
    (folder / "nothing.mp4").write_bytes(b"")
    (folder / "words.mp4").write_text("this is no video\n" * 100)
    whole = make_video(folder / "cut.mp4", seconds=2.0).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    whole = make_video(folder / "cut2.mp4", options={"movflags": "faststart"}).read_bytes()
    (folder / "cut2.mp4").write_bytes(whole[: len(whole) // 2])
    shutil.copy(folder / "plain.mp4", folder / "plain.mov")
    (folder / "notes.txt").write_text("ignored")
    bad = {
        "mute": "no_audio_stream",
        "blind": "no_video_stream",
        "short": "too_short",
        "still": "silent",
        "nothing": "empty_file",
        "words": "damaged",
        "cut": "damaged",
        "cut2": "damaged",
    }
    good = ["plain", "telephone", "cinema", "half", "old", "turned", "variable"]
    names = ["sub/studio", "sub/ünï cödé 名前", "-rf; touch x $(id)"]
    return {**dict.fromkeys(good + names, ""), **bad}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, make_video) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("zoo") / "videos"
    return folder, make_zoo(folder, make_video)


def some_videos(folder: Path, make_video, count: int) -> Path:
    """`count` videos, ten of them different, and one that is damaged."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:03d}.mp4"
        if number < 10:
            make_video(path, seconds=0.6 + 0.1 * number)
        else:
            shutil.copy(folder / f"{number % 10:03d}.mp4", path)
    (folder / "000.mp4").write_bytes(b"damaged")
    return folder


def check_zoo_report(root: Path, expected: dict[str, str]) -> None:
    """Every input is accounted for, under the right reason."""
    report = json.loads((root / "report.json").read_text())
    with (root / "skipped.csv").open(newline="", encoding="utf-8") as file:
        skipped = [(row["id"], row["reason"]) for row in csv.DictReader(file)]
    bad = [(name, reason) for name, reason in expected.items() if reason]
    assert sorted(skipped) == sorted([*bad, ("plain", "duplicate_id")])
    assert report["inputs"] == len(expected) + 1 == report["clips"] + len(skipped)
    assert sum(report["skipped"].values()) == len(skipped)
    assert report["ignored_files"] == {".txt": 1}
    assert json.loads((root / "metrics.json").read_text())["clips"] == report["clips"]


def take_batches(data: DataConfig, count: int = 3) -> set[str]:
    """Ids of the clips in a few batches, each of sane shape."""
    clips = open_dataset(data, MODEL, seed=0)
    loader = make_loader(clips, data=data, seed=0, micro_batch_size=4)
    seen: set[str] = set()
    for batch in islice(loader, count):
        assert batch.frames.shape == (4, 3, 32, 32)
        seen |= {clips.video_id(int(index) % len(clips)) for index in batch.sample_ids}
    return seen


def test_zoo_to_shards_to_batches_and_again(zoo, tmp_path, capsys):
    folder, expected = zoo
    root = tmp_path / "out"
    assert prepare(folder, "--output", root, *SMALL) == 0
    out = capsys.readouterr().out
    assert f"inputs   {len(expected) + 1:>8}" in out and "no_audio_stream" in out
    check_zoo_report(root, expected)
    data = DataConfig(source="shards", path=str(root), num_workers=0)
    clips = open_dataset(data, MODEL, seed=0)
    ids = {clips.video_id(i) for i in range(len(clips))}
    assert ids == {name for name, reason in expected.items() if not reason}
    assert take_batches(data) <= ids

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert prepare(folder, "--output", root, *SMALL) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_zoo_to_the_cav_mae_layout_to_batches(zoo, tmp_path):
    folder, expected = zoo
    root = tmp_path / "out"
    layout = ["--layout", "cav_mae", "--preset", "cav_mae_sync"]
    assert prepare(folder, "--output", root, *layout, *SMALL) == 0
    check_zoo_report(root, expected)
    entries = json.loads((root / "train.json").read_text())["data"]
    times_of = {entry["video_id"]: entry["frame_times"] for entry in entries}
    assert len(entries) == sum(not reason for reason in expected.values())
    for entry in entries:
        times = entry.pop("frame_times")
        assert len(times) == 16 and times == sorted(times)
        assert set(entry) == {"video_id", "wav", "video_path", "labels"}
        assert all(isinstance(value, str) and value for value in entry.values())
        assert Path(entry["wav"]).is_absolute() and Path(entry["wav"]).is_file()
        assert "/" not in entry["video_id"] and not entry["video_id"].startswith("-")
        for k in range(16):
            assert Path(f"{entry['video_path']}/frame_{k}/{entry['video_id']}.jpg").is_file()
    assert "sub%2Fünï cödé 名前" in {entry["video_id"] for entry in entries}
    assert not list(root.rglob("*.partial")) and not Path("x").exists()
    data = DataConfig(
        source="manifest",
        path=str(root / "train.json"),
        label_csv=str(root / "labels.csv"),
        num_frames=16,
        num_workers=0,
    )
    assert take_batches(data)
    clips = open_dataset(data, MODEL, seed=0)
    clip = clips.read_frames(0)  # from the first to the last frame, as they were shown
    assert clip.times.tolist() == pytest.approx(times_of[clip.video_id], abs=1e-6)
    assert clip.times[-1] > 14.5 / 16 * len(clip.waveform) / 16_000

    again = tmp_path / "shards"  # the layout is itself a source
    manifest = root / "train.json"
    assert prepare(manifest, "--output", again, "--preset", "cav_mae_sync", *SMALL) == 0
    assert json.loads((again / "report.json").read_text())["clips"] == len(entries)
    assert take_batches(DataConfig(source="shards", path=str(again), num_workers=0))


def test_variable_rate_and_turned_frames_are_as_they_were_shown(zoo, tmp_path):
    folder, _ = zoo
    root = tmp_path / "out"
    files = [folder / "variable.mp4", folder / "turned.mp4"]
    assert prepare(*files, "--output", root, "--preset", "cav_mae_sync", *SMALL) == 0
    clips = open_dataset(DataConfig(source="shards", path=str(root)), MODEL, seed=0)
    index = {clips.video_id(i): i for i in range(2)}
    frames, times = (get(index["variable"]) for get in (clips.frames, clips.frame_times))
    stamps = [*range(0, 1000, 50), *range(1000, 2000, 250)]
    want = [stamps[k * (len(stamps) - 1) // 15] / 1000 for k in range(16)]
    assert times.tolist() == pytest.approx(want, abs=1e-3)
    assert frames.float().mean((1, 2, 3)).numpy() == pytest.approx(
        np.array([20 + 100 * time for time in want]), abs=4
    )
    pairs = clips.read_frames(index["variable"], 4, only=[3, 0])  # 0, 4, 8 and 12 of the 16
    assert pairs.times.tolist() == pytest.approx([want[12], want[0]], abs=1e-3)
    assert torch.equal(pairs.frames, frames[[12, 0]])
    turned = clips.frames(index["turned"])[0].float()
    assert turned[:, :14].mean() < 0.7 * turned[:, 18:].mean()  # the dark half is on top now


@pytest.mark.parametrize("layout", ["shards", "cav_mae"])
def test_killed_and_resumed_or_shared_out_the_bytes_are_the_same(tmp_path, make_video, layout):
    videos = some_videos(tmp_path / "videos", make_video, 40)
    common = ["--layout", layout, "--clips-per-shard", 4, "--img-size", 64]
    root = tmp_path / "out"
    assert prepare(videos, "--output", root, *common, "--workers", 1) == 0
    want = contents(root)
    root.rename(tmp_path / "whole")  # the manifest holds absolute paths

    command = [sys.executable, "-m", "kdcmae_fast.cli", "prepare", videos, "--output", root]
    done = root / ("shards" if layout == "shards" else "units")
    with subprocess.Popen([*map(str, [*command, *common])], stdout=subprocess.DEVNULL) as process:
        while not list(done.glob("*.jsonl")):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert len(list(done.glob("*.jsonl"))) < 10 and not (root / "report.json").exists()
    assert prepare(videos, "--output", root, *common, "--workers", 2) == 0
    assert contents(root) == want
    shutil.rmtree(root)

    for share in (1, 0):
        assert not (root / "report.json").exists()
        assert prepare(videos, "--output", root, *common, "--shard", f"{share}/2") == 0
    assert contents(root) == want


CRASHING = """
import os, signal, time
from kdcmae_fast.data.prepare import units

make_clip = units.make_clip

def fragile(item, settings):
    if item.id == "001":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item.id == "002":
        time.sleep(1000)
    return make_clip(item, settings)

units.make_clip = fragile
"""


def test_a_decoder_that_crashes_or_hangs_costs_one_clip(tmp_path, make_video):
    videos = some_videos(tmp_path / "videos", make_video, 8)
    (tmp_path / "sitecustomize.py").write_text(CRASHING)  # every process imports it at its start
    root = tmp_path / "out"
    command = [sys.executable, "-m", "kdcmae_fast.cli", "prepare", str(videos), "--timeout", "2"]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    result = subprocess.run(
        [*command, "--output", str(root), *SMALL],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    with (root / "skipped.csv").open(newline="") as file:
        rows = {row["id"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)}
    assert rows.pop("000")[0] == "damaged"
    assert rows == {
        "001": ("damaged", "decoder crashed (SIGSEGV)"),
        "002": ("damaged", "decoder did not finish within 2 s"),
    }
    assert json.loads((root / "report.json").read_text())["clips"] == 5


def test_changed_settings_and_inputs_are_refused_by_name(tmp_path, make_video, capsys):
    videos = some_videos(tmp_path / "videos", make_video, 2)
    root = tmp_path / "out"
    assert prepare(videos, "--output", root, *SMALL) == 0
    kept = contents(root)
    capsys.readouterr()
    assert prepare(videos, "--output", root, *SMALL, "--preset", "cav_mae_sync") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --num-frames is 16, but ") and "begun with 10" in error
    assert error.count("\n") == 1
    make_video(videos / "001.mp4", seconds=1.5)
    assert prepare(videos, "--output", root, *SMALL) == 1
    assert "the inputs are not those" in capsys.readouterr().err
    assert contents(root) == kept
    assert prepare(videos, "--output", videos, *SMALL) == 1
    assert "is not empty" in capsys.readouterr().err


def test_no_clip_is_an_error_and_so_is_no_input(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    assert prepare(tmp_path / "videos", "--output", tmp_path / "out") == 1
    assert "no videos there" in capsys.readouterr().err
    assert prepare(tmp_path / "nowhere", "--output", tmp_path / "out") == 1
    assert "nowhere: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    for _ in range(2):  # also when everything was tried before
        assert prepare(tmp_path / "videos", "--output", tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: no clip came of 1 inputs (1 empty_file)")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["inputs"] == 1


REAL_CLIPS = {"00W1lcxW-WU_40.000", "KlsG1EnBEjc_000361"}


@pytest.mark.slow
def test_acceptance_on_500_clips(tmp_path, make_video, capsys):
    """The zoo, the real clips of KDCMAE_CLIPS where it is set, 10 s videos up to 500 in all."""
    videos = tmp_path / "videos"
    expected = make_zoo(videos, make_video)
    if real := os.environ.get("KDCMAE_CLIPS"):
        for path in sorted(Path(real).glob("*.mp4")):
            shutil.copy(path, videos)
            expected[path.stem] = ""
    different = [
        make_video(tmp_path / f"{n}.mp4", seconds=10.0 - 0.5 * n, size=(320, 240)) for n in range(8)
    ]
    for number in range(500 - 1 - len(expected)):  # 1: the double
        name = f"clip {number:03d} é"
        shutil.copy(different[number % 8], videos / f"{name}.mp4")
        expected[name] = ""

    def command(output: Path) -> list[str]:
        module = [sys.executable, "-m", "kdcmae_fast.cli", "prepare"]
        return [*module, str(videos), "--output", str(output)]

    whole = tmp_path / "whole"
    assert subprocess.run(command(whole)).returncode == 0
    check_zoo_report(whole, expected)
    metrics = json.loads((whole / "metrics.json").read_text())
    if real:
        assert set(expected) >= REAL_CLIPS

    killed = tmp_path / "killed"
    for _ in range(3):
        before = len(list(killed.glob("shards/*.jsonl")))
        with subprocess.Popen(command(killed), stdout=subprocess.DEVNULL) as process:
            while len(list(killed.glob("shards/*.jsonl"))) < before + 3:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
    assert not (killed / "report.json").exists()
    assert subprocess.run(command(killed), stdout=subprocess.DEVNULL).returncode == 0
    assert contents(killed) == contents(whole)
    again = subprocess.run(command(killed), capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.startswith("nothing to do")

    data = DataConfig(source="shards", path=str(whole), num_workers=0)
    assert take_batches(data, count=20)
    with capsys.disabled():
        run = metrics["last_run"]
        rate = metrics["inputs"] / run["seconds"]
        print(f"\n{metrics} {rate:.1f} inputs a second", flush=True)
