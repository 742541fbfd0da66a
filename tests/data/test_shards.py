"""Shards: what is written is what is read, by us and by WebDataset; damage is named."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import ClipError, make_loader, open_dataset
from kdcmae_fast.data.loader import StepOrder
from kdcmae_fast.data.shards import PreparedClip, Skipped, finish_dataset, write_shard
from kdcmae_fast.data.shards.layout import index_path, tar_path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("soundfile")

MODEL = ModelConfig(audio_length=96, img_size=32)  # clips of 0.975 s
CSV = "index,mid,display_name\n0,/m/a,First\n1,/m/b,Second\n"


def jpeg(level: int, size: int = 32) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (size, size), (level, level, level)).save(data, "JPEG")
    return data.getvalue()


def prepared(number: int, seconds: float = 2.0, frames: int = 4) -> PreparedClip:
    """Clip `number`: frame k is grey 10 * number + 40 * k; its sound is a tone of its own."""
    time = np.arange(round(seconds * 16_000)) / 16_000
    return PreparedClip(
        id=f"clip ü/{number}.mp4",
        source=f"videos/clip ü/{number}.mp4",
        start=0.0,
        seconds=seconds,
        frames=[jpeg((10 * number + 40 * k) % 256) for k in range(frames)],
        frame_times=[k * seconds / frames for k in range(frames)],
        waveform=(0.5 * np.sin(2 * np.pi * (200 + 50 * number) * time)).astype(np.float32),
        labels=("/m/b",) if number % 2 else ("/m/a", "/m/b"),
    )


def write(root: Path, sizes: tuple[int, ...], sound: str = "flac", **clip) -> Path:
    """A dataset whose shard s holds sizes[s] clips, and one skipped input in front of them."""
    first = number = 0
    for shard, size in enumerate(sizes):
        inputs = [Skipped(f"bad{shard}", "bad.mp4", "no_audio_stream", "no audio\nstream")]
        inputs += [prepared(number + i, **clip) for i in range(size)]
        write_shard(root, shard, inputs, first=first, sound=sound)
        number, first = number + size, first + len(inputs)
    finish_dataset(root, len(sizes), {"preset": "test"})
    return root


def opened(root: Path, **settings):
    data = DataConfig(source="shards", path=str(root), **settings)
    return open_dataset(data, MODEL, seed=0)


@pytest.mark.parametrize("sound, error", [("flac", 2.0**-15), ("npy", 2.0**-11)])
def test_what_was_written_is_read(tmp_path, sound, error):
    (tmp_path / "labels.csv").write_text(CSV)
    clips = opened(write(tmp_path, (3, 2), sound))
    assert len(clips) == 5
    for number in range(5):
        want = prepared(number)
        assert clips.video_id(number) == want.id
        got = clips.waveform(number).numpy()
        assert np.abs(got - want.waveform).max() <= error
        assert clips.frame_times(number).tolist() == pytest.approx(list(want.frame_times))
        frames = clips.frames(number)
        assert frames.shape == (4, 3, 32, 32) and frames.dtype == torch.uint8
        for k, frame in enumerate(frames):
            assert abs(int(frame.float().mean()) - (10 * number + 40 * k) % 256) <= 2
        clip = clips.read(number, epoch=0)
        assert clip.index == number and clip.label == number % 2
        # The window is 0.975 s of 2 s, and the frame was shown within it.
        assert len(clip.waveform) == pytest.approx(0.975 * 16_000, abs=2)
        shown = int(clip.frame.float().mean().round()) - 10 * number
        assert min(abs(shown - 40 * k) for k in range(4)) <= 2


def test_another_epoch_is_another_window_and_the_same_epoch_is_the_same(tmp_path):
    clips = opened(write(tmp_path, (2,)))
    first, again, other = clips.read(0, 0), clips.read(0, 0), clips.read(0, 1)
    assert torch.equal(first.waveform, again.waveform) and torch.equal(first.frame, again.frame)
    assert not torch.equal(first.waveform, other.waveform)
    assert first.label == -1  # no labels.csv


def test_the_same_bytes_every_time_and_an_index_that_points_at_the_members(tmp_path):
    one, two = write(tmp_path / "one", (3,)), write(tmp_path / "two", (3,))
    for path in (tar_path, index_path):
        assert path(one, "000000").read_bytes() == path(two, "000000").read_bytes()
    tar = tar_path(one, "000000").read_bytes()
    lines = [json.loads(line) for line in index_path(one, "000000").read_text().splitlines()]
    assert lines[0]["skipped"] == "no_audio_stream" and lines[0]["detail"] == "no audio stream"
    with tarfile.open(tar_path(one, "000000")) as archive:
        for line in lines[1:]:
            for name, (start, size) in line["members"].items():
                want = archive.extractfile(f"{line['key']}.{name}").read()
                assert tar[start : start + size] == want
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in archive} == {(0, 0, "", 0o644)}


@pytest.mark.filterwarnings("ignore")  # of the other library
def test_webdataset_reads_it(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    write(tmp_path, (3,))
    samples = list(webdataset.WebDataset(str(tar_path(tmp_path, "000000")), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000001", "000000002", "000000003"]
    about = json.loads(samples[1]["json"])
    assert about["id"] == prepared(1).id and about["num_samples"] == 32_000
    assert samples[2]["03.jpg"] == prepared(2).frames[3]


def test_order_keeps_to_few_shards_and_takes_every_clip_once():
    sizes = (100,) * 20
    order = StepOrder(2000, 8, seed=1, shard_sizes=sizes, window=300)
    epochs = [order.epoch_order(epoch) for epoch in (0, 1)]
    for clips in epochs:
        assert sorted(clips.tolist()) == list(range(2000))
        for start in range(0, 2000, 300):
            assert len({int(c) // 100 for c in clips[start : start + 300]}) <= 4
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0], order.epoch_order(0))
    first = epochs[0][:300] // 100
    assert (first[1:] != first[:-1]).float().mean() > 0.5  # shuffled, not one shard after another


def read_steps(root: Path, ranks: int, first: int, steps: int, batch: int = 6) -> list[list[int]]:
    """Sample ids of each step, all ranks together."""
    seen = [[] for _ in range(steps)]
    for rank in range(ranks):
        loader = make_loader(
            opened(root),
            data=DataConfig(num_workers=0, shuffle_window=8),
            seed=3,
            micro_batch_size=batch // ranks,
            rank=rank,
            world_size=ranks,
            start_sample=first * batch,
        )
        for step, raw in enumerate(islice(loader, steps)):
            assert len(raw.sample_ids) == batch // ranks
            seen[step] += raw.sample_ids.tolist()
    return seen


def test_any_number_of_ranks_and_a_resume_see_the_same_clips(tmp_path):
    """23 clips, which neither 1, 2, 3 ranks nor the batch of 6 divides."""
    root = write(tmp_path, (7, 9, 7), seconds=0.6, frames=1)
    want = read_steps(root, 1, 0, 9)
    assert [sorted(ids) for ids in read_steps(root, 2, 0, 9)] == [sorted(ids) for ids in want]
    assert read_steps(root, 3, 0, 9) == want
    assert read_steps(root, 3, 2, 7) == want[2:]  # in the middle of the first epoch
    assert len({i for ids in want[:3] for i in ids}) == 18


def test_workers_read_shards(tmp_path):
    root = write(tmp_path, (5, 5), seconds=0.6, frames=1)
    batches = []
    for workers in (0, 2):
        loader = make_loader(
            opened(root), data=DataConfig(num_workers=workers), seed=0, micro_batch_size=4
        )
        batches.append([raw.sample_ids.tolist() for raw in islice(loader, 3)])
    assert batches[0] == batches[1]


def test_a_copy_for_another_process_opens_its_own_files(tmp_path):
    clips = opened(write(tmp_path, (2,)))
    clips.read(0, 0)
    copy = pickle.loads(pickle.dumps(clips))
    assert not copy._files and copy.read(1, 0).video_id == clips.video_id(1)


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("kdcmae_fast.data.shards.reader.OPEN_FILES", 3)
    clips = opened(write(tmp_path, (1,) * 8, seconds=0.6, frames=1))
    for index in [*range(8), 0, 7]:
        clips.read(index, 0)
        assert len(clips._files) <= 3
    descriptors = list(clips._files.values())
    del clips
    for descriptor in descriptors:
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_a_damaged_member_is_a_bad_clip_with_shard_and_offset(tmp_path):
    clips = opened(write(tmp_path, (3,)))
    line = json.loads(index_path(tmp_path, "000000").read_text().splitlines()[2])
    start, size = line["members"]["flac"]
    with tar_path(tmp_path, "000000").open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    with pytest.raises(ClipError, match=rf"000000\.tar, offset {start}: cannot decode the sound"):
        clips.read(1, 0)
    assert clips.read(0, 0).video_id != clips.read(2, 0).video_id


@pytest.mark.parametrize("damage", ["truncated", "missing", "index", "version", "foreign"])
def test_a_damaged_dataset_is_refused_by_name(tmp_path, damage):
    write(tmp_path, (2, 2))
    tar, index = tar_path(tmp_path, "000001"), index_path(tmp_path, "000001")
    expected = {
        "truncated": r"000001\.tar: \d+ bytes, dataset.json says \d+: truncated",
        "missing": r"000001\.tar: No such file",
        "index": r"000001\.jsonl, line 2: damaged index",
        "version": r"dataset\.json: version 99",
        "foreign": r"'\.\./\.\./etc/passwd' is not the name of a shard",
    }[damage]
    if damage == "truncated":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "missing":
        tar.unlink()
    elif damage == "index":
        index.write_text("\n".join([index.read_text().splitlines()[0], '{"key": 1']))
    else:
        path = tmp_path / "dataset.json"
        content = json.loads(path.read_text())
        if damage == "version":
            content["version"] = 99
        else:
            content["shards"][0]["name"] = "../../etc/passwd"
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=expected):
        opened(tmp_path).read(3, 0)


def test_an_unfinished_folder_says_so(tmp_path):
    write_shard(tmp_path, 0, [prepared(0)], first=0)
    with pytest.raises(ValueError, match=r"dataset\.json: No such file.*kdcmae prepare"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"000001\.jsonl: this shard is not complete"):
        finish_dataset(tmp_path, 2, {})


def test_an_error_while_writing_leaves_no_file(tmp_path):
    def inputs():
        yield prepared(0)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_shard(tmp_path, 0, inputs(), first=0)
    assert list((tmp_path / "shards").iterdir()) == []


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_shards import prepared, write_shard

def slowly():
    for number in range(1000):
        yield prepared(number, seconds=0.6)
        print(number, flush=True)
        time.sleep(0.01)

write_shard(Path(sys.argv[1]), 0, slowly(), first=0)
"""


def test_a_killed_writer_leaves_no_shard(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "0"
        process.send_signal(signal.SIGKILL)
    left = [path.name for path in (tmp_path / "shards").iterdir()]
    assert left in ([], ["000000.tar.partial"])
    write_shard(tmp_path, 0, [prepared(0)], first=0)  # the next writer takes its place
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "000000.jsonl",
        "000000.tar",
    ]
