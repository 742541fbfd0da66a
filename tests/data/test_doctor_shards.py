"""kdcmae doctor on shards: damage named by shard and offset, unsafe archives refused."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data.doctor import Check, examine
from kdcmae_fast.data.doctor.archives import read_archive
from kdcmae_fast.data.doctor.probe import reachable_frames
from kdcmae_fast.data.shards import PreparedClip, Skipped, finish_dataset, write_shard
from kdcmae_fast.data.shards.layout import BLOCK, index_path, tar_path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("soundfile")

MODEL = ModelConfig(audio_length=96, img_size=32)  # clips of 0.975 s


def clip(number: int, labels: tuple[str, ...] = ("a",)) -> PreparedClip:
    data = io.BytesIO()
    Image.new("RGB", (40, 32), (30 * number, 0, 0)).save(data, "JPEG")
    sound = 0.1 * np.random.default_rng(number).standard_normal(16_000)
    return PreparedClip(
        id=f"clip{number}",
        source=f"videos/{number}.mp4",
        start=0.0,
        seconds=1.0,
        frames=[data.getvalue()] * 2,
        frame_times=[0.0, 0.5],
        waveform=sound.astype(np.float32),
        labels=labels,
    )


@pytest.fixture
def root(tmp_path):
    """Two shards of three clips, and one input that was left out."""
    for shard in range(2):
        left_out = Skipped("no", "no.mp4", "no_audio_stream", "no audio")
        inputs = [clip(3 * shard + i, ("ab"[i % 2],)) for i in range(3)] + [left_out] * shard
        write_shard(tmp_path, shard, inputs, first=3 * shard)
    finish_dataset(tmp_path, 2, {})
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,a,First\n1,b,Second\n")
    return tmp_path


def diagnose(root: Path, samples=None, **settings):
    values = {"num_workers": 0, "num_frames": 2, "dataset_mean": -0.9, "dataset_std": 3.5}
    return examine(str(root), DataConfig(**(values | settings)), MODEL, samples=samples)


def problems(root: Path, **settings) -> dict[str, Check]:
    checks = diagnose(root, **settings).checks
    return {check.name: check for check in checks if check.result != "ok"}


def members(root: Path, shard: str, row: int) -> dict[str, list[int]]:
    return json.loads(index_path(root, shard).read_text().splitlines()[row])["members"]


def overwrite(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def test_good_shards(root):
    diagnosis = diagnose(root)
    assert {c.name: c.detail for c in diagnosis.checks if c.result != "ok"} == {}
    assert diagnosis.would_start and diagnosis.num_clips == 6
    by_name = {check.name: check for check in diagnosis.checks}
    assert by_name["shards"].detail == "whole: 24 members of 2 shards"
    assert by_name["frames"].detail == "2 frames: 6 clips"
    assert by_name["sample rates"].detail == "16000 Hz: 6"
    assert diagnosis.histogram == {"a": 4, "b": 2}
    assert all(fact.properties.size == (40, 32) for fact in diagnosis.facts)


def test_a_damaged_member_is_a_bad_clip_with_shard_and_offset(root):
    sound, picture = members(root, "000000", 1)["flac"], members(root, "000001", 2)["01.jpg"]
    overwrite(tar_path(root, "000000"), sound[0], bytes(sound[1]))
    overwrite(tar_path(root, "000001"), picture[0], bytes(picture[1]))
    found = problems(root, max_bad_share=0.4)
    assert found.keys() == {"bad clips", "damaged"} and found["bad clips"].result == "warning"
    assert f"000000.tar, offset {sound[0]}: cannot decode the sound" in found["damaged"].examples[0]
    assert f"000001.tar, offset {picture[0]}: cannot decode" in found["damaged"].examples[1]
    assert not diagnose(root, max_bad_share=0.3).would_start


def test_a_damaged_header_is_named_with_its_offset(root):
    place = members(root, "000001", 1)["00.jpg"][0] - BLOCK
    overwrite(tar_path(root, "000001"), place, b"\xff" * BLOCK)
    found = problems(root)
    assert found["shards"].result == "error"
    assert f"000001.tar, offset {place}: damaged header" in found["shards"].examples[0]
    assert any("the tar has not" in example for example in found["shards"].examples)
    assert not diagnose(root).would_start


def test_an_index_of_another_tar(root):
    lines = index_path(root, "000000").read_text().splitlines()
    row = json.loads(lines[1])
    start, size = row["members"]["flac"]
    row["members"]["flac"] = [start + BLOCK, size]
    del row["members"]["01.jpg"]
    row["members"]["02.jpg"] = [7, 7]
    lines[1] = json.dumps(row)
    index_path(root, "000000").write_text("\n".join(lines) + "\n")
    report = read_archive(tar_path(root, "000000"), root)
    assert not report.unsafe and len(report.damaged) == 3
    text = "\n".join(report.damaged)
    assert f"offset {start + BLOCK}: the index has 000000001.flac there with {size} bytes" in text
    assert "offset 7: the index has 000000001.02.jpg, the tar has not" in text
    assert "'000000001.01.jpg' is not in the index" in text


def test_a_truncated_shard_does_not_open(root):
    path = tar_path(root, "000001")
    path.write_bytes(path.read_bytes()[:4000])
    found = problems(root)
    assert "truncated or replaced" in found["opens"].detail and found["opens"].result == "error"
    assert "000001.tar" in found["shards"].examples[0]


@pytest.mark.parametrize("damage", ["line", "gone", "unfinished"])
def test_a_damaged_index_does_not_pass(root, damage):
    if damage == "line":
        index_path(root, "000001").write_text('{"key":')
    elif damage == "gone":
        index_path(root, "000001").unlink()
    else:
        (root / "dataset.json").unlink()
    diagnosis = diagnose(root)
    assert not diagnosis.would_start
    assert any(
        "kdcmae prepare" in c.detail + c.advice for c in diagnosis.checks if c.result != "ok"
    )


def test_an_index_line_that_no_run_survives(root):
    lines = index_path(root, "000001").read_text().splitlines()
    row = json.loads(lines[2])
    del row["frame_times"]
    lines[2] = json.dumps(row)
    index_path(root, "000001").write_text("\n".join(lines) + "\n")
    bad = problems(root)["bad clips"]
    assert bad.result == "error" and bad.detail == "clip 3: KeyError: 'frame_times'"


def add(tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    tar.addfile(info)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_unsafe_members_are_refused_and_named(tmp_path, form):
    with tarfile.open(tmp_path / "web.tar", "w", format=form) as tar:
        add(tar, "0001.json")
        add(tar, "0001.jpg", tarfile.SYMTYPE, "/etc/passwd")
        add(tar, "0002.jpg", tarfile.LNKTYPE, "0001.json")
        add(tar, "/etc/cron.d/x")
        add(tar, "a/../../x")
        add(tar, "C:\\x")
        add(tar, "..\\x")
        add(tar, "pipe", tarfile.FIFOTYPE)
        add(tar, "a..b/..c.jpg")
        add(tar, "é" * 60 + "/" + "n" * 90)  # longer than a plain header holds
    diagnosis = examine(str(tmp_path), DataConfig(), MODEL)
    assert not diagnosis.would_start
    checks = {check.name: check for check in diagnosis.checks}
    assert checks["shards"].result == "ok" and "kdcmae prepare" in checks["opens"].advice
    unsafe = checks["archive names"]
    assert (unsafe.result, unsafe.count) == ("error", 7)
    assert "web.tar, offset 512: '0001.jpg' is a link to '/etc/passwd'" in unsafe.examples[0]
    for example, reason in zip(
        unsafe.examples[1:],
        (
            "is a link to '0001.json'",
            "absolute",
            "leads out",
            "absolute",
            "leads out",
            "plain file",
        ),
        strict=True,
    ):
        assert reason in example


def test_links_in_a_prepared_shard_are_an_error(root):
    path = tar_path(root, "000000")
    with tarfile.open(path, "a") as tar:
        add(tar, "../../evil", tarfile.SYMTYPE, "/")
    content = json.loads((root / "dataset.json").read_text())
    content["shards"][0]["bytes"] = path.stat().st_size
    (root / "dataset.json").write_text(json.dumps(content))
    found = problems(root)
    assert found["archive names"].result == "error" and found["shards"].result == "error"
    assert "'../../evil' is not in the index" in found["shards"].examples[0]


def test_labels_of_shards_that_the_csv_lacks_are_bad_clips(root):
    (root / "labels.csv").write_text("index,mid,display_name\n0,a,First\n")
    found = problems(root, max_bad_share=0.5)
    assert found["labels"].result == "warning" and found["labels"].count == 2
    assert found["unknown label"].count == 2 and found["bad clips"].result == "warning"
    assert not diagnose(root, max_bad_share=0.1).would_start


def test_shards_bring_their_own_frames_and_may_lack_labels(root):
    short = dataclasses.replace(clip(7), frames=clip(7).frames[:1], frame_times=[0.0])
    inputs = [clip(6, ()), short]
    write_shard(root, 2, inputs, first=7)
    finish_dataset(root, 3, {})
    found = problems(root, num_frames=16)
    assert found.keys() == {"no label", "frames"}
    assert found["no label"].examples == ["clip6"]
    assert found["frames"].detail == "1 frames: 1 clips, 2 frames: 7 clips"
    assert found["frames"].advice == "prepare these clips again with 2 frames"


def test_a_sample_of_shards(root, monkeypatch):
    monkeypatch.setattr("kdcmae_fast.data.doctor.diagnosis.SAMPLED_SHARDS", 1)
    checks = {check.name: check.detail for check in diagnose(root, samples=3).checks}
    assert checks["shards"] == "whole: 12 members of 1 shards (of 2)"


def test_frames_that_a_window_can_take():
    def of(times, seconds, window=1.0):
        return reachable_frames(np.asarray(times, dtype=float), seconds, window)

    assert of([0.0, 0.5], 0.9) == of([0.0, 0.5], 1.0) == [0, 1]
    assert of([0.0, 0.5], 1.1) == [1]
    assert of([0.0, 1.5], 2.0) == [0, 1]  # a window from 0.1 on has no frame: the nearest is 0
    assert of([0.0], 5.0) == [0]
    assert of([0.2, 1.8, 2.0], 2.0) == [0, 1]
