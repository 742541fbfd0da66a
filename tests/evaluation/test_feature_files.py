"""Features as files and in the cache: what comes back, what is refused, what misses."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from kdcmae_fast.cli import main
from kdcmae_fast.data import BadClip, ClipError
from kdcmae_fast.evaluation import (
    ClipFeatures,
    extract_frame_features,
    load_features,
    save_features,
)
from kdcmae_fast.evaluation.feature_cache import (
    FrameSettings,
    feature_key,
    find_features,
    read_cached,
    write_cached,
)
from kdcmae_fast.evaluation.source import EvaluationSource, open_source

FORMS = ("x.npz", "x.parquet", "folder")


def some_features(frames: int | None = None, count: int = 5) -> ClipFeatures:
    shape = (count, 7) if frames is None else (count, frames, 7)
    return ClipFeatures(
        video_ids=tuple(f"cl\u00eep {number}/\u2603.mp4" for number in range(count)),
        sample_ids=torch.arange(count) * 3,
        labels=torch.arange(count) - 1,
        audio=torch.randn(shape),
        video=torch.randn(shape),
        bad=(BadClip("lost.mp4", "the file ends early"),),
        times=None if frames is None else torch.rand(count, frames, dtype=torch.float64),
    )


def assert_same(found: ClipFeatures, expected: ClipFeatures) -> None:
    assert found.video_ids == expected.video_ids
    for name in ("sample_ids", "labels", "audio", "video", "times"):
        ours, wanted = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (wanted is None)
        if ours is not None:
            assert ours.dtype == wanted.dtype
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frames", [None, 3])
def test_there_and_back(form, frames, tmp_path):
    if form.endswith("parquet"):
        pytest.importorskip("pyarrow")
    features = some_features(frames)
    path = save_features(some_features(2), tmp_path / form)  # to be replaced, its times too
    assert save_features(features, path) == path
    found = load_features(path)
    assert_same(found, features)
    found.audio.add_(1)  # a tensor like any other
    assert_same(load_features(path), features)


@pytest.mark.parametrize("form", FORMS)
def test_one_modality_alone(form, tmp_path):
    if form.endswith("parquet"):
        pytest.importorskip("pyarrow")
    features = some_features()._replace(video=torch.empty(5, 0))
    path = save_features(some_features(2), tmp_path / form)  # whose pictures must go
    assert_same(load_features(save_features(features, path)), features)


def test_one_vector_of_sound_and_many_frames(tmp_path):
    features = some_features(3)._replace(audio=torch.randn(5, 7))
    for form in FORMS:
        assert_same(load_features(save_features(features, tmp_path / form)), features)


def test_other_tools_read_them(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    features = some_features(3)
    save_features(features, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["audio"], features.audio.numpy())
    save_features(features, tmp_path / "x.parquet")
    row = parquet.read_table(tmp_path / "x.parquet").slice(2, 1).to_pylist()[0]
    assert row["video_ids"] == features.video_ids[2]
    np.testing.assert_array_equal(np.array(row["video"], np.float32), features.video[2].numpy())


def test_what_holds_no_features_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.npz does not exist"):
        load_features(tmp_path / "no.npz")
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "text.parquet").write_text("text")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", **{k: np.array([None]) for k in ("video_ids", "audio")})
    arrays = {"video_ids": np.array(["a"]), "labels": np.zeros(1, int), "audio": np.zeros((2, 3))}
    arrays |= {"sample_ids": np.zeros(1, int), "video": np.zeros((1, 3))}
    np.savez(tmp_path / "sizes.npz", **arrays)
    del arrays["audio"], arrays["video"]
    np.savez(tmp_path / "neither.npz", **arrays)
    (tmp_path / "empty").mkdir()
    for name in (
        "text.npz",
        "text.parquet",
        "other.npz",
        "pickle.npz",
        "empty",
        "sizes.npz",
        "neither.npz",
    ):
        with pytest.raises(ValueError, match=rf"{name} holds no features"):
            load_features(tmp_path / name)


@pytest.mark.parametrize("frames", [None, 3])
def test_cached_features_come_back_with_the_clips_left_out(frames, tmp_path):
    features = some_features(frames)
    write_cached(features, tmp_path / "x", "key")
    found = read_cached(tmp_path / "x", "key")
    assert_same(found, features)
    assert found.bad == features.bad


def test_a_damaged_file_is_not_believed(tmp_path):
    write_cached(some_features(), tmp_path / "x", "key")
    whole = (tmp_path / "x").read_bytes()
    for name, data in (
        ("short", whole[:-10]),
        ("flipped", whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:]),
        ("text", b"text"),
        ("empty", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError):
            read_cached(tmp_path / name, "key")
    with pytest.raises(ValueError, match="it holds something else"):
        read_cached(tmp_path / "x", "another key")


@pytest.fixture
def source(model_folder, tmp_path):
    """A model folder of this test's own."""
    shutil.copytree(model_folder, tmp_path / "model")
    return EvaluationSource(checkpoint=str(tmp_path / "model"), num_clips=5, device="cpu")


def test_a_hit_extracts_nothing_and_damage_is_repaired(source, tmp_path, monkeypatch):
    folder = tmp_path / "features"
    opened = open_source(source)
    first = find_features(source, opened, folder=folder)
    (path,) = folder.iterdir()
    assert first.note == f"features kept in {path}"

    def no_clip(*_):
        raise AssertionError("a clip was read")

    with monkeypatch.context() as patch:
        patch.setattr(type(opened.dataset), "read", no_clip)
        again = find_features(source, opened, folder=folder)
    assert again.note == f"features read from {path}"
    assert_same(again.features, first.features)
    del again
    path.write_bytes(path.read_bytes()[:-4])
    repaired = find_features(source, opened, folder=folder)
    assert repaired.note.startswith(f"{path} is damaged (")
    assert_same(repaired.features, first.features)
    assert find_features(source, opened, folder=folder).note == f"features read from {path}"
    assert list(folder.iterdir()) == [path]


def test_whatever_features_depend_on_changes_the_key(source, make_model, tmp_path):
    def key(frames=None, **change):
        changed = dataclasses.replace(source, **change)
        return feature_key(changed, open_source(changed), frames)

    original = key()
    assert original == key()
    assert key(overrides=("data.num_workers=0",), batch_size=3) == original
    others = [
        key(num_clips=4),
        key(split="train"),
        key(overrides=("data.dataset_mean=-4",)),
        key(overrides=("train.seed=3",)),
        key(FrameSettings(4)),
        key(FrameSettings(5)),
        key(FrameSettings(5), overrides=("data.time_base=compatible",)),
    ]
    model = make_model()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    model.save_pretrained(tmp_path / "model")
    others.append(key())
    assert len({original, *others}) == len(others) + 1


def test_the_list_s_content_is_in_the_key(source, tmp_path):
    path = tmp_path / "clips.json"
    entry = {"video_id": "a", "wav": "a.wav", "video_path": "frames"}

    def key(*entries):
        path.write_text(json.dumps({"data": list(entries)}))
        overrides = ("data.source=manifest", f"data.path={path}")
        changed = dataclasses.replace(source, overrides=overrides, num_clips=1)
        return feature_key(changed, open_source(changed), None)

    assert key(entry) == key(entry)
    assert key(entry) != key({**entry, "wav": "b.wav"})

    videos = tmp_path / "videos"
    videos.mkdir()
    overrides = ("data.source=folder", f"data.path={videos}")
    changed = dataclasses.replace(source, overrides=overrides, num_clips=1)
    keys = set()
    for content in ("one", "other"):
        (videos / "a.mp4").write_text(content)
        keys.add(feature_key(changed, open_source(changed), None))
    assert len(keys) == 2


def test_the_sounds_are_in_the_key(source, tmp_path):
    path, folder = tmp_path / "sounds.json", tmp_path / "sounds"
    folder.mkdir()
    keys = set()
    for content in ("a", "another"):
        path.write_text(json.dumps({"data": [{"video_id": "a", "wav": f"{content}.wav"}]}))
        (folder / "a.wav").write_text(content)
        for found in (path, folder):
            overrides = ("data.source=sounds", f"data.path={found}")
            changed = dataclasses.replace(source, overrides=overrides, num_clips=1)
            keys.add(feature_key(changed, open_source(changed, needs=("audio",)), None))
    assert len(keys) == 4


def test_clips_that_were_left_out_when_features_were_kept_are_told(source, tmp_path, monkeypatch):
    opened = open_source(dataclasses.replace(source, overrides=("data.max_bad_share=0.5",)))
    read = type(opened.dataset).read

    def broken(self, index, epoch):
        if index == 1:
            raise ClipError("clip", "the file ends early")
        return read(self, index, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(type(opened.dataset), "read", broken)
        find_features(source, opened, folder=tmp_path / "kept")
    again = find_features(source, opened, folder=tmp_path / "kept")
    assert "(1 of the clips were left out then; remove it to try them again)" in again.note
    assert [clip.video_id for clip in again.features.bad] == ["clip"]


@pytest.mark.parametrize("output", ["x.npz", "folder"])
def test_the_command_writes_what_was_extracted(source, output, tmp_path, capsys):
    common = ["--checkpoint", source.checkpoint, "--device", "cpu", "--num-clips", "5"]
    path = tmp_path / output
    assert main(["features", *common, "--num-frames", "3", "--output", str(path)]) == 0
    assert "audio (5, 16), video (5, 3, 16), times (5, 3)" in capsys.readouterr().out
    opened = open_source(source)
    assert_same(
        load_features(path),
        extract_frame_features(
            opened.model, opened.dataset, opened.data, num_clips=5, num_frames=3
        ),
    )
    if output == "folder":
        metrics = json.loads((path / "metrics.json").read_text())
        assert (metrics["command"], metrics["num_clips"]) == ("features", 5)
    (tmp_path / "taken.npz").mkdir()
    assert main(["features", *common, "--output", str(tmp_path / "taken.npz")]) == 1
    assert "taken.npz is a folder" in capsys.readouterr().err


def test_too_many_frames_are_an_error_before_long(source, tmp_path, capsys):
    common = ["--checkpoint", source.checkpoint, "--output", str(tmp_path / "x.npz")]
    assert main(["features", *common, "--num-frames", "0"]) == 1
    assert "'0' is not a whole number above 0" in capsys.readouterr().err
