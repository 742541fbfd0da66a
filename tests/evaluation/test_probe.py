"""`kdcmae probe`: which clips it takes, what it writes, what it refuses."""

import json

import numpy as np
import pytest
import soundfile
import torch

from kdcmae_fast.cli import main
from kdcmae_fast.data import FrontEnd
from kdcmae_fast.evaluation import (
    EvaluationSource,
    extract_features,
    load_features,
    probe,
    retrieve,
)
from kdcmae_fast.evaluation.folds import Fold
from kdcmae_fast.evaluation.probe_clips import (
    EachOnce,
    Part,
    ProbeClips,
    check_probe,
    probe_clips,
)
from kdcmae_fast.evaluation.source import open_source
from kdcmae_fast.models.cav_mae import CavMae

WORDS = ("low", "middle", "high")


def tone(path, pitch: float, seed: int, *, rate: int = 8000, seconds: float = 0.3) -> None:
    rng = np.random.default_rng(seed)
    times = np.arange(int(rate * seconds)) / rate
    sound = np.sin(2 * np.pi * pitch * (1 + 0.1 * rng.normal()) * times) * rng.uniform(0.1, 0.6)
    soundfile.write(path, sound + 0.001 * rng.normal(size=len(times)), rate)


def write_list(path, rows) -> str:
    path.write_text(json.dumps({"data": rows}))
    return str(path)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Tones of three classes: train.json, test.json, fold1 and fold2 of both, labels.csv."""
    folder = tmp_path_factory.mktemp("sounds")
    rows = []
    for number in range(45):
        word = WORDS[number % 3]
        path = folder / f"{word}_{number}.wav"
        tone(path, 200.0 * 3 ** (number % 3), number)
        rows.append({"video_id": path.stem, "wav": str(path), "labels": word})
    write_list(folder / "train.json", rows[:30])
    write_list(folder / "test.json", rows[30:])
    write_list(folder / "fold1_train.json", rows[:30])
    write_list(folder / "fold1_test.json", rows[30:])
    write_list(folder / "fold2_train.json", rows[15:])
    write_list(folder / "fold2_test.json", rows[:15])
    (folder / "labels.csv").write_text(
        "index,mid,display_name\n" + "".join(f"{k + 4},{w},{w} tone\n" for k, w in enumerate(WORDS))
    )
    return folder


@pytest.fixture(scope="module")
def sound_model(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    make_model(modalities="audio").save_pretrained(folder)
    return folder


@pytest.fixture
def of_sounds(sounds, sound_model):
    """of_sounds(path="train.json", **fields) -> an EvaluationSource of them."""

    def make(path: str = "train.json", *, labels: bool = True, **fields):
        settings = ["data.source=sounds", f"data.path={sounds / path}", "data.num_workers=0"]
        if labels:
            settings.append(f"data.label_csv={sounds / 'labels.csv'}")
        fields = {"checkpoint": str(sound_model), "overrides": tuple(settings), **fields}
        return EvaluationSource(**fields)

    return make


def error_of(*arguments, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        probe(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sound_alone_on_two_lists(of_sounds, sounds, tmp_path):
    metrics = probe(of_sounds(), test_path=str(sounds / "test.json"), output=tmp_path)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert list(written)[0] == "command" and written["command"] == "probe"
    assert written == json.loads(json.dumps(metrics))
    assert metrics["modality"] == "audio" and metrics["num_features"] == 16
    assert metrics["class_names"] == ["low tone", "middle tone", "high tone"]
    assert np.sum(metrics["confusion"]) == 15
    assert metrics["accuracy"] > 0.8 and metrics["chance"] == pytest.approx(1 / 3)
    assert metrics["clips_of"].endswith("train.json")
    assert metrics["tested_on"].endswith("test.json")
    (row,) = metrics["folds"]
    assert (row["train_clips"], row["test_clips"], row["validation_clips"]) == (30, 15, 6)


def test_lists_of_folds_encode_every_clip_once(of_sounds, sounds, monkeypatch):
    encoded = []
    from kdcmae_fast.evaluation import probing as module

    def counted(model, dataset, data, **options):
        encoded.append(len(dataset))
        return extract_features(model, dataset, data, **options)

    monkeypatch.setattr(module, "extract_features", counted)
    test = str(sounds / "fold{fold}_test.json")
    metrics = probe(of_sounds("fold{fold}_train.json"), test_path=test, folds=2, classifier="knn")
    assert encoded == [45]
    assert [row["train_clips"] for row in metrics["folds"]] == [30, 30]
    assert np.sum(metrics["confusion"]) == 30
    first = probe(of_sounds(), test_path=str(sounds / "test.json"), classifier="knn")
    assert first["folds"][0] == metrics["folds"][0]
    text = error_of(of_sounds("fold{fold}_train.json"), test_path=test, folds=5)
    assert "--folds 5: there are 2 lists" in text


def test_drawn_folds_of_a_folder_need_labels(of_sounds):
    metrics = probe(of_sounds(), folds=3, classifier="svm")
    assert len(metrics["folds"]) == 3 and np.sum(metrics["confusion"]) == 30
    assert "has no label" in error_of(of_sounds(labels=False), folds=3)


def test_synthetic_clips_train_on_one_split_and_test_on_the_other(model_folder):
    source = EvaluationSource(
        checkpoint=str(model_folder), num_clips=40, overrides=("data.num_workers=0",)
    )
    found = {
        modality: probe(source, modality=modality, test_clips=24, classifier="svm")
        for modality in ("audio", "video", "both")
    }
    assert [m["num_features"] for m in found.values()] == [16, 16, 32]
    row = found["both"]["folds"][0]
    assert (row["train_clips"], row["test_clips"]) == (40, 24)
    assert found["both"]["tested_on"] == "synthetic, heldout"
    assert "disc" in found["both"]["class_names"] or len(found["both"]["class_names"]) == 8
    again = probe(source, test_clips=24, classifier="svm")
    assert again == found["both"]


def test_clips_that_cannot_be_read_are_left_out_of_their_part(of_sounds, sounds, tmp_path):
    rows = json.loads((sounds / "test.json").read_text())["data"]
    rows[4] = {**rows[4], "wav": str(tmp_path / "gone.wav")}
    path = write_list(tmp_path / "test.json", rows)
    source = of_sounds()
    source = EvaluationSource(
        checkpoint=source.checkpoint, overrides=(*source.overrides, "data.max_bad_share=0.1")
    )
    metrics = probe(source, test_path=path)
    assert [clip["video_id"] for clip in metrics["bad_clips"]] == [rows[4]["video_id"]]
    assert (metrics["folds"][0]["train_clips"], metrics["folds"][0]["test_clips"]) == (30, 14)
    honest = probe(of_sounds(), test_path=str(sounds / "test.json"))
    assert metrics["folds"][0]["validation_curve"] == honest["folds"][0]["validation_curve"]


def test_clips_whose_features_are_not_numbers_are_named(
    of_sounds, sounds, model_folder, tmp_path, monkeypatch, capsys
):
    """By `probe` and `retrieve`, which stop, and by `features`, which writes them."""
    encode = CavMae.encode

    def broken(self, *given, **named):
        found = encode(self, *given, **named)
        found.audio[2] = float("nan")
        return found

    monkeypatch.setattr(CavMae, "encode", broken)
    source = EvaluationSource(
        checkpoint=str(model_folder), num_clips=20, batch_size=20, device="cpu"
    )
    told = "features of 1 of 20 clips are not finite, the first is synthetic_heldout_000002;"
    with pytest.raises(ValueError, match=told):
        retrieve(source)
    with pytest.raises(ValueError, match="the first is synthetic_heldout_000002;"):
        probe(source, folds=2)
    command = ["features", "--checkpoint", str(model_folder), "--device", "cpu"]
    command += ["--num-clips", "20", "--output", str(tmp_path / "x.npz")]
    assert main(command) == 0
    assert "of 1 clips are not finite, the first is synthetic" in capsys.readouterr().err


def test_folds_that_cannot_be_are_found_before_a_clip_is_read(
    of_sounds, sounds, model_folder, monkeypatch
):
    def no_clip(*_):
        raise AssertionError("a clip was read")

    monkeypatch.setattr(EachOnce, "read", no_clip)
    rows = json.loads((sounds / "train.json").read_text())["data"]
    write_list(sounds / "low.json", [row for row in rows if row["labels"] != "high"])
    with pytest.raises(ValueError, match="class 'high tone' is tested, but has no training clip"):
        probe(of_sounds("low.json"), test_path=str(sounds / "test.json"))
    with pytest.raises(ValueError, match="fold 1 of 2: class "):
        probe(of_sounds(num_clips=4), folds=2)
    with pytest.raises(ValueError, match="--folds 50: there are 5 clips"):
        probe(EvaluationSource(checkpoint=str(model_folder), num_clips=5, device="cpu"), folds=50)


@pytest.mark.parametrize(("labels", "name"), [(["/m/a", "/m/b"], "/m/b"), ([0, 1], "square")])
def test_class_ids_of_shards_and_numbers_of_lists_are_both_checked(of_sounds, labels, name):
    class Listed:
        def __len__(self):
            return 12

        def video_id(self, index):
            return str(index)

        def label_sets(self):
            return ((label,) for label in labels * 6)

    opened = open_source(EvaluationSource(checkpoint=of_sounds().checkpoint), needs=())
    clips = EachOnce([Part(Listed(), 12, "list")])
    found = ProbeClips(opened, clips, None, 3, "list", "list")
    check_probe(found, 0)
    only_even = [Fold(np.array([0, 2, 4]), np.array([1, 3]))]
    with pytest.raises(ValueError, match=f"class '{name}' is tested, but has no training clip"):
        check_probe(found._replace(folds=only_even), 0)


def test_the_same_clip_in_two_lists_is_one(of_sounds):
    opened = open_source(of_sounds(), needs=())
    part = Part(opened.dataset, 5, "a list")
    clips = EachOnce([part, part._replace(num_clips=7)])
    assert len(clips) == 7 and clips.numbers[1].tolist() == list(range(7))
    assert clips.read(6, 0).index == 6 and clips.video_id(6) == opened.dataset.video_id(6)


def test_what_cannot_be_probed_is_refused_before_work(of_sounds, sounds, model_folder, tmp_path):
    test = str(sounds / "test.json")
    assert "--test-path is missing" in error_of(of_sounds())
    assert "no pictures" in error_of(of_sounds(), test_path=test, modality="both")
    assert "both trained and tested on" in error_of(
        of_sounds(), test_path=str(sounds / "train.json")
    )
    assert "--test-path and --folds" in error_of(of_sounds(), test_path=test, folds=3)
    assert "needs {fold} too" in error_of(of_sounds("fold{fold}_train.json"), test_path=test)
    synthetic = EvaluationSource(checkpoint=str(model_folder), split="train")
    assert "--split" in error_of(synthetic)
    one = json.loads((sounds / "train.json").read_text())["data"][:4]
    path = write_list(tmp_path / "one.json", one)
    text = error_of(EvaluationSource(checkpoint=of_sounds().checkpoint, overrides=(
        "data.source=sounds", f"data.path={path}", f"data.label_csv={sounds / 'labels.csv'}",
    )), test_path=test)  # fmt: skip
    assert "class 'middle tone' has one training clip" in text
    twice = write_list(tmp_path / "twice.json", [one[0], one[0]])
    assert "is listed twice" in error_of(of_sounds(), test_path=twice)
    other = write_list(tmp_path / "other.json", [{**one[0], "labels": "high"}])
    assert "has other labels in another list" in error_of(of_sounds(), test_path=other)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"not opened")
    videos = ("data.source=folder", f"data.path={tmp_path / 'videos'}")
    folder = EvaluationSource(checkpoint=str(model_folder), overrides=videos)
    assert "the videos of a folder have no labels" in error_of(folder, folds=2)
    several = write_list(tmp_path / "several.json", [{**one[0], "labels": "high,low"}])
    assert "has 2 labels" in error_of(of_sounds(), test_path=several)


def test_a_model_of_both_is_probed_on_sounds_alone(of_sounds, sounds, model_folder):
    source = of_sounds(checkpoint=str(model_folder))
    metrics = probe(source, test_path=str(sounds / "test.json"))
    assert metrics["modality"] == "audio" and metrics["accuracy"] > 0.5


def test_features_of_sound_alone(sounds, sound_model, model_folder, tmp_path, capsys):
    """Of a model without pictures and of one with, those that a probe takes."""
    data = ["data.source=sounds", f"data.path={sounds / 'test.json'}", "data.num_workers=0"]
    for number, folder in enumerate((sound_model, model_folder)):
        path = tmp_path / f"{number}.npz"
        command = ["features", "--checkpoint", str(folder), "--device", "cpu", *data]
        assert main([*command, "--output", str(path)]) == 0
        opened = open_source(
            EvaluationSource(checkpoint=str(folder), overrides=data, device="cpu"), needs=()
        )
        clip = opened.dataset.read(4, 0)
        fbank = FrontEnd(opened.data, opened.model.config).fbank(clip.waveform[None])
        found = load_features(path)
        torch.testing.assert_close(found.audio[4:5], opened.model.encode(fbank=fbank).audio)
        assert len(found.audio) == 15 and found.video.shape == (15, 0)
        assert main([*command, "--output", str(path), "--frames"]) == 1
    assert "features of frames need them" in capsys.readouterr().err


def test_what_needs_pictures_refuses_a_model_of_sound(sounds, sound_model, capsys):
    """One line, no traceback: the retrieval of a model that has no video."""
    settings = ["data.source=sounds", f"data.path={sounds / 'test.json'}", "data.num_workers=0"]
    code = main(["retrieve", "--checkpoint", str(sound_model), *settings])
    assert code == 1
    assert "this needs video, and the model has none" in capsys.readouterr().err
    assert main(["probe", "--checkpoint", str(sound_model), "--modality", "video", "--num-clips",
                 "40", "--test-clips", "10"]) == 1  # fmt: skip
    assert "this needs video" in capsys.readouterr().err


def test_the_command_prints_a_table(of_sounds, sounds, sound_model, tmp_path, capsys):
    settings = list(of_sounds().overrides)
    arguments = ["--checkpoint", str(sound_model), "--test-path", str(sounds / "test.json")]
    code = main(["probe", *arguments, "--classifier", "knn", "--output", str(tmp_path), *settings])
    out = capsys.readouterr().out
    assert code == 0 and "knn on audio features" in out and "times chance (1 of 3" in out
    assert json.loads((tmp_path / "metrics.json").read_text())["classifier"] == "knn"


def test_folds_follow_the_clips_that_could_be_read(of_sounds, sounds):
    found = probe_clips(of_sounds(), test_path=str(sounds / "test.json"))
    numbers = np.array([0, 2, 3, 31, 33])  # what was read
    (fold,) = found.usable(numbers, np.zeros(5, dtype=np.int64), 0)
    assert fold.train.tolist() == [0, 1, 2] and fold.test.tolist() == [3, 4]
