"""kdcmae doctor on manifests and folders: each finding fires, and stays quiet on good data."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import (
    BadClips,
    ClipError,
    FrontEnd,
    TooManyBadClips,
    make_loader,
    open_dataset,
)
from kdcmae_fast.data.bad import BadClip
from kdcmae_fast.data.doctor import Diagnosis, examine
from kdcmae_fast.data.doctor.diagnosis import choose, write_diagnosis

soundfile = pytest.importorskip("soundfile")
Image = pytest.importorskip("PIL.Image")

MODEL = ModelConfig(audio_length=96, img_size=32)  # clips of 0.975 s
CSV = "index,mid,display_name\n0,a,First\n1,b,Second\n"
FRAMES = 3


class Tree:
    """A manifest of good clips that a test spoils; `rows` is what its list holds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: list[dict[str, str]] = []
        (root / "labels.csv").write_text(CSV)

    def add(self, name: str, *, rate=16_000, seconds=1.0, channels=1, level=0.1, frames=FRAMES,
            size=(48, 40), labels="a") -> None:  # fmt: skip
        rng = np.random.default_rng(len(self.rows))
        sound = level * rng.standard_normal((round(seconds * rate), channels))
        soundfile.write(self.wav(name), sound.clip(-1, 1), rate)
        for k in range(frames):
            self.frame(name, k).parent.mkdir(exist_ok=True)
            Image.new("RGB", size, (60 * k, 0, 0)).save(self.frame(name, k))
        self.rows.append({"video_id": name, "wav": str(self.wav(name)),
                          "video_path": str(self.root), "labels": labels})  # fmt: skip

    def wav(self, name: str) -> Path:
        return self.root / f"{name}.wav"

    def frame(self, name: str, k: int) -> Path:
        return self.root / f"frame_{k}" / f"{name}.jpg"

    def data(self, **settings) -> DataConfig:
        path = self.root / "list.json"
        path.write_text(json.dumps({"data": self.rows}))
        # The levels of the noise above: what good clips are normalised with.
        values = {"num_frames": FRAMES, "label_csv": str(self.root / "labels.csv"),
                  "num_workers": 0, "dataset_mean": -0.9, "dataset_std": 3.5}  # fmt: skip
        return DataConfig(source="manifest", path=str(path), **(values | settings))

    def examine(self, *, samples=None, epochs=1, against=None, **settings) -> Diagnosis:
        data = self.data(**settings)
        return examine(data.path, data, MODEL, samples=samples, epochs=epochs, against=against)


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    for number in range(4):
        tree.add(f"clip{number}", labels="ab"[number % 2])
    return tree


def found(diagnosis: Diagnosis) -> dict[str, tuple[str, int]]:
    """Result and count of each finding that is not ok."""
    return {c.name: (c.result, c.count) for c in diagnosis.checks if c.result != "ok"}


def check(diagnosis: Diagnosis, name: str):
    return next(c for c in diagnosis.checks if c.name == name)


def test_good_data_is_ok_in_everything(tree):
    diagnosis = tree.examine()
    assert found(diagnosis) == {} and diagnosis.would_start
    assert {c.name for c in diagnosis.checks} == {
        "opens", "list", "duplicate ids", "duplicate files", "labels", "classes", "bad clips",
        "frames", "pictures", "sample rates", "channels", "durations", "levels", "normalisation",
    }  # fmt: skip
    assert diagnosis.num_clips == len(diagnosis.facts) == 4


def test_every_kind_of_bad_clip_is_named(tree):
    for name in ("gone", "empty", "noise", "cut", "mute", "brief"):
        tree.add(name, level=0.0 if name == "mute" else 0.1, seconds=0.2 if name == "brief" else 1)
    tree.wav("gone").unlink()
    tree.wav("empty").write_bytes(b"")
    tree.wav("noise").write_bytes(b"this is no sound" * 100)
    tree.frame("cut", 1).write_bytes(tree.frame("cut", 1).read_bytes()[:200])
    diagnosis = tree.examine(max_bad_share=0.6)
    problems = found(diagnosis)
    assert problems.pop("bad clips") == ("warning", 6)
    assert problems.pop("durations")[0] == "warning"
    assert problems == {
        "missing file": ("warning", 1),
        "empty file": ("warning", 1),
        "damaged": ("warning", 2),
        "digital silence": ("warning", 1),
        "too short": ("warning", 1),
    }
    assert check(diagnosis, "missing file").examples[0].startswith("gone: ")
    assert diagnosis.would_start
    assert not tree.examine(max_bad_share=0.59).would_start


def test_bad_clips_are_those_a_long_run_finds(tree):
    """A frame that is missing is met by some epoch only; silence and the like by all."""
    for number in range(4):
        tree.add(f"more{number}")
    tree.add("as long as its window", seconds=0.975)
    tree.frame("clip1", 2).unlink()
    tree.frame("as long as its window", 0).write_bytes(b"")
    tree.frame("more2", 0).unlink()  # windows start after it
    tree.wav("more3").write_bytes(b"x" * 99)
    data = tree.data()
    dataset, run = open_dataset(data, MODEL, seed=0), BadClips(9, 1.0)
    for epoch in range(25):
        for index in range(9):
            try:
                dataset.read(index, epoch)
            except ClipError as error:
                run.add([BadClip(error.video_id, error.reason)])
    facts = tree.examine().facts
    assert {f.video_id for f in facts if f.reason} == {row.video_id for row in run.rows()}
    assert len(run) == 3


def test_frames_of_a_list_with_times_are_those_it_names(tree):
    for row in tree.rows:
        row["frame_times"] = [0.0, 0.9]  # the third of data.num_frames is not read
    tree.frame("clip1", 2).unlink()
    tree.frame("clip2", 1).unlink()
    assert [fact.video_id for fact in tree.examine().facts if fact.reason] == ["clip2"]


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_would_start_agrees_with_the_loader_of_a_run(tree, bad):
    """data.max_bad_share=0.2 of 10 clips: 2 bad ones pass, 3 do not."""
    for number in range(6):
        tree.add(f"more{number}")
    for number in range(bad):
        tree.wav(f"more{number}").unlink()
    data = tree.data(max_bad_share=0.2)
    dataset = open_dataset(data, MODEL, seed=0)
    run, seen, stopped = BadClips(len(dataset), data.max_bad_share), 0, False
    loader = make_loader(dataset, data=data, seed=0, micro_batch_size=2)
    for raw, _ in zip(loader, range(3 * loader.steps_per_epoch), strict=False):
        seen += 2
        run.add(raw.bad)
        try:
            run.check(seen)
        except TooManyBadClips:
            stopped = True
    assert tree.examine(max_bad_share=0.2).would_start == (not stopped) == (bad < 3)


def test_a_sample_says_how_sure_it_is(tree):
    for number in range(16):
        tree.add(f"more{number}", frames=1)
    diagnosis = tree.examine(samples=10, num_frames=1)
    assert len(diagnosis.facts) == 10 and diagnosis.num_clips == 20
    assert "of all 20: 0.0% to" in check(diagnosis, "bad clips").detail
    indexes = [fact.index for fact in diagnosis.facts]
    assert indexes == choose(20, 10) and indexes == sorted(set(indexes))
    assert choose(5, 10) == choose(5, None) == range(5)


def test_ten_frames_and_sixteen(tree):
    for row in list(tree.rows):
        for k in range(FRAMES, 5):
            tree.frame(row["video_id"], k).parent.mkdir(exist_ok=True)
            Image.new("RGB", (48, 40)).save(tree.frame(row["video_id"], k))
    frames = check(tree.examine(), "frames")
    assert (frames.result, frames.count) == ("warning", 4)
    assert frames.advice == "set data.num_frames=5 (it is 3)"
    too_many = tree.examine(num_frames=6)
    assert not too_many.would_start and check(too_many, "bad clips").count == 4
    assert check(too_many, "frames").advice == "set data.num_frames=5 (it is 6)"
    tree.frame("clip2", 4).unlink()
    some = check(tree.examine(num_frames=5, max_bad_share=0.5), "frames")
    assert (some.count, some.examples) == (1, ["clip2: 4 frames"])
    assert some.advice == "prepare these clips again with 5 frames"


def test_sizes_rates_channels_lengths_and_levels(tree):
    tree.add("small", size=(30, 60))
    tree.add("slow", rate=8_000)
    tree.add("stereo", rate=44_100, channels=2)
    tree.add("long", seconds=2.5)
    tree.add("short", seconds=0.45)
    tree.add("faint", level=3e-4)
    diagnosis = tree.examine()
    problems = found(diagnosis)
    problems.pop("normalisation")  # of the faint one
    assert problems == {
        "pictures": ("warning", 1),
        "sample rates": ("warning", 2),
        "durations": ("warning", 1),
        "levels": ("warning", 1),
    }
    assert diagnosis.would_start
    assert check(diagnosis, "pictures").examples == ["small: 30 x 60"]
    assert "resamples them to 16000 Hz" in check(diagnosis, "sample rates").advice
    assert check(diagnosis, "sample rates").examples == ["slow: 8000 Hz", "stereo: 44100 Hz"]
    assert check(diagnosis, "channels").detail == "1: 9, 2: 1; data.channel=first takes the first"
    assert check(diagnosis, "durations").examples == ["short: 0.45 s"]
    assert "0.45 to 2.50 s" in check(diagnosis, "durations").detail
    assert check(diagnosis, "levels").examples[0].startswith("faint: -7")


def test_silence_that_a_run_keeps(tree):
    tree.add("mute", level=0.0)
    levels = check(tree.examine(reject_silence=False), "levels")
    assert (levels.result, levels.count) == ("warning", 1)
    assert "1 of them silent" in levels.detail and "reject_silence=true" in levels.advice


def test_duplicates(tree):
    tree.rows += [tree.rows[1], {**tree.rows[2], "video_id": "another name"}]
    problems = found(tree.examine())
    assert problems["duplicate ids"] == ("warning", 1)
    assert problems["duplicate files"] == ("warning", 2)


def test_labels_against_the_csv(tree):
    tree.rows[0]["labels"] = "a,zzz"
    diagnosis = tree.examine()
    assert found(diagnosis)["labels"] == ("warning", 1) and diagnosis.would_start
    tree.rows[1]["labels"] = "yyy"
    diagnosis = tree.examine()
    assert found(diagnosis)["labels"] == ("error", 1) and not diagnosis.would_start
    assert check(diagnosis, "labels").examples == ["clip1: yyy"]
    assert found(diagnosis)["opens"][0] == "error"  # the run's own message
    assert "label 'yyy' is not in the label CSV" in check(diagnosis, "opens").detail
    assert not diagnosis.facts
    without = tree.examine(label_csv="")
    assert without.would_start and check(without, "labels").result == "ok"


def test_classes_and_their_numbers(tree):
    (tree.root / "labels.csv").write_text(CSV + "5,c,Third\n5,d,Fourth\n")
    diagnosis = tree.examine()
    assert found(diagnosis) == {"classes": ("warning", 2), "class numbers": ("warning", 3)}
    assert check(diagnosis, "classes").examples == ["c", "d"]
    assert diagnosis.histogram == {"a": 2, "b": 2, "c": 0, "d": 0}
    (tree.root / "labels.csv").write_text("nonsense\n1\n")
    assert found(tree.examine())["labels"][0] == "error"


def test_rows_that_a_run_refuses(tree):
    tree.rows += [{"video_id": "x"}, {**tree.rows[0], "wav": "<PATH>/x.wav"}, "text"]
    diagnosis = tree.examine()
    assert found(diagnosis)["list"] == ("error", 3) and not diagnosis.would_start
    assert check(diagnosis, "list").examples == [
        "entry 4: wav, video_path, labels must be text",
        "entry 5: wav still has the placeholder <PATH>",
        "entry 6: not an object",
    ]
    (tree.root / "list.json").write_text("{")
    data = DataConfig(source="manifest", path=str(tree.root / "list.json"))
    assert not examine(data.path, data, MODEL).would_start


def test_overlap_of_two_lists(tree):
    (tree.root / "other").mkdir()
    other = Tree(tree.root / "other")
    other.add("clip2")
    other.add("fresh")
    other.rows.append({**tree.rows[3], "video_id": "renamed"})
    against = other.data().path
    overlap = check(tree.examine(against=against), "overlap")
    assert (overlap.result, overlap.count) == ("warning", 1)
    assert overlap.examples == ["clip2", str(tree.wav("clip3"))]
    other.rows = other.rows[1:2]
    other.data()
    assert check(tree.examine(against=against), "overlap").result == "ok"


def test_normalisation_is_what_the_front_end_gives(tree):
    data = tree.data()
    dataset = open_dataset(data, MODEL, seed=0)
    plain = FrontEnd(DataConfig(dataset_mean=0.0, dataset_std=1.0), MODEL)
    values = torch.cat([plain.fbank(dataset.read(i, 0).waveform[None]) for i in range(4)]).double()
    diagnosis = tree.examine(dataset_mean=0.0, dataset_std=1.0)
    measured = diagnosis.metrics()
    assert measured["fbank_mean"] == pytest.approx(float(values.mean()), abs=1e-9)
    assert measured["fbank_std"] == pytest.approx(float(values.std(correction=0)), abs=1e-9)
    finding = check(diagnosis, "normalisation")
    assert finding.result == "warning"
    mean, std = measured["fbank_mean"], measured["fbank_std"]
    assert f"data.dataset_mean={mean:.4f} data.dataset_std={std:.4f}" in finding.advice
    # The stated tolerance: a quarter of the configured deviation, a fifth of it either way.
    for factor, result in ((1.19, "ok"), (1.26, "warning"), (0.85, "ok"), (0.83, "warning")):
        again = tree.examine(dataset_mean=mean, dataset_std=std * factor)
        assert check(again, "normalisation").result == result, factor
    for shift, result in ((0.24, "ok"), (0.26, "warning")):
        again = tree.examine(dataset_mean=mean + shift * std, dataset_std=std)
        assert check(again, "normalisation").result == result, shift


def test_normalisation_counts_the_padding_and_says_what_it_does(tree):
    """Clips of 98 rows in a model of 144: 0s are in the figures, and named beside them."""
    model, data = dataclasses.replace(MODEL, audio_length=144), tree.data()
    front_end = FrontEnd(DataConfig(dataset_mean=0.0, dataset_std=1.0), model)
    dataset = open_dataset(data, model, seed=0)
    sounds = [dataset.read(index, 0).waveform for index in range(len(dataset))]
    rows = torch.cat([front_end.fbank(sound[None])[0] for sound in sounds]).double()
    own = rows[(rows != 0).any(dim=1)]
    assert len(own) == 98 * 4
    (mean, std), (alone, spread) = ((x.mean(), x.std(correction=0)) for x in (rows, own))
    finding = check(examine(data.path, data, model), "normalisation")
    assert f"mean {mean:.4f}, std {std:.4f} with the padding" in finding.detail
    assert f"({alone:.4f}, {spread:.4f} without)" in finding.detail


def test_worker_processes_find_the_same(tree):
    tree.wav("clip1").unlink()
    alone, together = tree.examine(), tree.examine(num_workers=1)
    assert str(alone.facts) == str(together.facts)  # nan is in it
    assert alone.checks == together.checks


def test_reading_more_epochs_sees_more_windows(tree):
    """The sound is silent but for its first fifth: only some windows are."""
    sound = np.zeros(16_000 * 5, dtype=np.float32)
    sound[:16_000] = 0.1
    sound[:16_000:2] = -0.1
    tree.add("half")
    soundfile.write(tree.wav("half"), sound, 16_000)
    counts = {e: check(tree.examine(epochs=e), "bad clips").count for e in (1, 8)}
    assert counts[8] == 1 >= counts[1]


def test_folder_of_videos(tmp_path, make_video):
    make_video(tmp_path / "a.mp4", seconds=1.2)
    make_video(tmp_path / "b ü.mp4", seconds=1.2, rate=48_000, layout="mono")
    make_video(tmp_path / "silent film.mp4", seconds=1.2, sound=None)
    make_video(tmp_path / "song.mp4", seconds=1.2, picture=False)
    (tmp_path / "empty.mp4").touch()
    data = DataConfig(num_workers=0, max_bad_share=0.7)
    diagnosis = examine(str(tmp_path), data, MODEL, samples=None)
    problems = found(diagnosis)
    assert problems["bad clips"] == ("warning", 3) and diagnosis.would_start
    assert {"no audio stream", "no video stream", "empty file"} <= problems.keys()
    assert problems["sample rates"][1] == 3  # of the bad one too
    assert "frames" not in {c.name for c in diagnosis.checks}


def test_files_it_writes(tree, tmp_path):
    pytest.importorskip("matplotlib")
    tree.wav("clip1").unlink()
    diagnosis = tree.examine()
    names = write_diagnosis(diagnosis, tmp_path / "out", plots=True)
    assert names == ["doctor.json", "metrics.json", "durations.png", "levels.png", "classes.png"]
    for name in names[2:]:
        with Image.open(tmp_path / "out" / name) as image:
            assert image.size[0] > 300
    report = json.loads((tmp_path / "out" / "doctor.json").read_text())
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["bad_share"] == 0.25 and metrics["would_start"] is False
    assert [clip["video_id"] for clip in report["bad_clips"]] == ["clip1"]
    assert report["clips_of_each_class"] == {"a": 2, "b": 2}
    assert "No such file" in report["bad_clips"][0]["reason"]
