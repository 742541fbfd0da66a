"""Balanced sampling: how often clips come, and that the order is still a function of the seed."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import Clip, make_loader, open_dataset
from kdcmae_fast.data.order import StepOrder
from kdcmae_fast.data.sampling import label_weights, read_weights, sampling_weights
from kdcmae_fast.data.shards import PreparedClip, finish_dataset, write_shard

LABELS = [("common",)] * 80 + [("rare",)] * 16 + [("rare", "common")] * 3 + [()]  # 100 clips


class Labelled:
    """100 clips with LABELS; a frame's level is the epoch it was read as, modulo 251."""

    label_sets = staticmethod(lambda: iter(LABELS))

    def __len__(self) -> int:
        return len(LABELS)

    def video_id(self, index: int) -> str:
        return str(index)

    def read(self, index: int, epoch: int) -> Clip:
        frame = torch.full((3, 2, 2), epoch % 251, dtype=torch.uint8)
        return Clip(str(index), index, torch.zeros(500), frame, 0)


def steps(n: int, **options) -> list[list[int]]:
    settings = {"seed": 2, "micro_batch_size": 12} | options
    data = DataConfig(num_workers=0, sampling="balanced")
    loader = make_loader(Labelled(), data=data, **settings)
    assert loader.steps_per_epoch == 100 // 12
    return [raw.sample_ids.tolist() for raw in islice(loader, n)]


def test_weights_are_the_published_formula():
    weights = label_weights(LABELS)
    common, rare = 1000 / 83.01, 1000 / 19.01
    assert weights.tolist() == pytest.approx(
        [common] * 80 + [rare] * 16 + [common + rare] * 3 + [0.0]
    )
    assert np.array_equal(sampling_weights(Labelled()), weights)


def test_clips_come_as_often_as_their_weight_says():
    weights = label_weights(LABELS)
    order = StepOrder(100, 12, seed=0, weights=weights)
    drawn = np.concatenate([order.epoch_order(epoch).numpy() for epoch in range(2000)])
    found = np.bincount(drawn, minlength=100)
    expected = 200_000 * weights / weights.sum()
    assert found[99] == 0
    chi_square = ((found - expected)[:99] ** 2 / expected[:99]).sum()
    assert chi_square < 98 + 5 * (2 * 98) ** 0.5
    labels = Counter(label for clip in drawn for label in LABELS[clip])
    assert labels["rare"] == pytest.approx(labels["common"], rel=0.2)


def test_order_is_a_function_of_seed_and_epoch():
    order = StepOrder(100, 12, seed=0, weights=label_weights(LABELS))
    assert torch.equal(order.epoch_order(3), order.epoch_order(3))
    assert not torch.equal(order.epoch_order(3), order.epoch_order(4))
    other = StepOrder(100, 12, seed=1, weights=label_weights(LABELS))
    assert not torch.equal(order.epoch_order(3), other.epoch_order(3))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_and_resume(world):
    whole = steps(20)
    parts = [
        steps(15, micro_batch_size=12 // world, rank=rank, world_size=world, start_sample=60)
        for rank in range(world)
    ]
    assert [sum(ids, []) for ids in zip(*parts, strict=True)] == whole[5:]


def test_a_clip_that_comes_twice_in_an_epoch_is_read_anew():
    loader = make_loader(
        Labelled(),
        data=DataConfig(num_workers=0, sampling="balanced"),
        seed=0,
        micro_batch_size=10,
    )
    seen: dict[int, list[int]] = {}
    for raw in islice(loader, 10):
        for index, frame in zip(raw.sample_ids.tolist(), raw.frames, strict=True):
            seen.setdefault(index, []).append(int(frame[0, 0, 0]))
    assert max(map(len, seen.values())) > 2
    assert all(len(set(epochs)) == len(epochs) for epochs in seen.values())


def test_shards_stay_together():
    """Each window of 300 of 2000 draws lies in few of 20 shards, in every epoch another order."""
    weights = np.random.default_rng(0).random(2000) + 0.1
    order = StepOrder(2000, 8, seed=1, shard_sizes=(100,) * 20, window=300, weights=weights)
    plain = StepOrder(2000, 8, seed=1, weights=weights)
    for epoch in range(3):
        clips = order.epoch_order(epoch)
        # The same draws, in another order.
        assert sorted(clips.tolist()) == sorted(plain.epoch_order(epoch).tolist())
        for start in range(0, 2000, 300):
            window = clips[start : start + 300] // 100
            assert len(set(window.tolist())) <= 6
            assert (window[1:] != window[:-1]).float().mean() > 0.4
    assert order.epoch_order(0)[0] // 100 != order.epoch_order(1)[0] // 100


def test_partners_come_from_shards_that_are_being_read():
    order = StepOrder(2000, 8, seed=1, shard_sizes=(100,) * 20, window=300)
    clips, rng = order.epoch_order(0), np.random.default_rng(0)
    partners = {order.partner(clips, 450, rng) for _ in range(1500)}
    near = set((clips[300:600] // 100).tolist())
    assert {partner // 100 for partner in partners} == near and len(partners) > 250


def test_the_weight_file_of_a_list_is_used(tmp_path):
    file = tmp_path / "train_weight.csv"
    file.write_text("".join(f"{number}\n" for number in range(100)))
    clips = Labelled()
    clips.weight_file = file
    assert sampling_weights(clips).tolist() == list(range(100))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n", "2 weights for 3 clips"),
        ("1\n2\nx\n", "line 3: 'x' is not a weight"),
        ("1\n-2\n3\n", "line 2: '-2'"),
        ("1\ninf\n3\n", "line 2: 'inf'"),
    ],
)
def test_damaged_weight_files(tmp_path, text, message):
    (tmp_path / "weights.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "weights.csv", 3)


def test_without_labels(tmp_path):
    clips = Labelled()
    clips.label_sets = lambda: iter([()] * 100)
    with pytest.raises(ValueError, match="no clip has a label; set data.label_csv"):
        sampling_weights(clips)
    with pytest.raises(ValueError, match="needs labels, and list has none"):
        sampling_weights([1, 2])


def test_labels_of_shards_and_of_a_list(tmp_path):
    """All labels of a clip count, and reach the batch."""
    image, soundfile = pytest.importorskip("PIL.Image"), pytest.importorskip("soundfile")
    labels = [("/m/a",), ("/m/a", "/m/b"), ("/m/b",), ("/m/a",)]
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/a,A\n1,/m/b,B\n")
    (tmp_path / "frame_0").mkdir()
    image.new("RGB", (32, 32)).save(tmp_path / "frame_0" / "c.jpg")
    sound = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "c.wav", sound, 16_000)
    entries = [
        {"video_id": "c", "wav": str(tmp_path / "c.wav"), "video_path": str(tmp_path),
         "labels": ", ".join(mids)}
        for mids in labels
    ]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps({"data": entries}))
    jpeg = (tmp_path / "frame_0" / "c.jpg").read_bytes()
    clips = [PreparedClip(str(i), "", 0.0, 1.0, [jpeg], [0.5], sound, labels[i]) for i in range(4)]
    write_shard(tmp_path, 0, clips[:3], first=0)
    write_shard(tmp_path, 1, clips[3:], first=3)
    finish_dataset(tmp_path, 2, {})
    model = ModelConfig(audio_length=96, img_size=32)
    for source, path in (("shards", tmp_path), ("manifest", tmp_path / "train.json")):
        data = DataConfig(
            source=source, path=str(path), label_csv=str(tmp_path / "labels.csv"), num_frames=1,
            num_workers=0, sampling="balanced",
        )  # fmt: skip
        dataset = open_dataset(data, model, seed=0)
        assert sampling_weights(dataset).tolist() == label_weights(labels).tolist()
        raw = next(iter(make_loader(dataset, data=data, seed=0, micro_batch_size=4)))
        for index, label, classes in zip(raw.sample_ids, raw.labels, raw.classes, strict=True):
            want = [{"/m/a": 0, "/m/b": 1}[mid] for mid in labels[int(index)]]
            assert label == want[0] and [c for c in classes.tolist() if c >= 0] == want
        dataset.weight_file.write_text("0\n0\n1\n0\n")
        raw = next(iter(make_loader(dataset, data=data, seed=0, micro_batch_size=4)))
        assert raw.sample_ids.tolist() == [2] * 4
    assert {f.name for f in tmp_path.glob("*_weight.csv")} == {
        "train_weight.csv",
        "dataset_weight.csv",
    }
