"""Which clips a step sees: the same for any number of workers and ranks, and after a resume."""

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import dataloader

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import Clip, ClipError, RawBatch, TooManyBadClips, make_loader, open_dataset
from kdcmae_fast.data.loader import MAX_SUBSTITUTES, DatasetLost, StepOrder, WorkerLost


class Numbered:
    """Clip i has i + 1000 samples of value i; those in `bad` cannot be read."""

    def __init__(self, num_clips: int, bad: frozenset[int] = frozenset()) -> None:
        self.num_clips = num_clips
        self.bad = bad

    def __len__(self) -> int:
        return self.num_clips

    def video_id(self, index: int) -> str:
        return f"clip{index}"

    def read(self, index: int, epoch: int) -> Clip:
        if index in self.bad:
            raise ClipError(self.video_id(index), "made bad")
        waveform = torch.full((1000 + index,), float(index))
        frame = torch.full((3, 4, 4), epoch, dtype=torch.uint8)
        return Clip(self.video_id(index), index, waveform, frame, index % 5)


def batches(dataset, n: int, *, workers: int = 0, **options) -> list[RawBatch]:
    settings = {"seed": 0, "micro_batch_size": 4} | options
    loader = make_loader(dataset, data=DataConfig(num_workers=workers), **settings)
    return list(islice(loader, n))


def ids(raw: list[RawBatch]) -> list[list[int]]:
    return [batch.sample_ids.tolist() for batch in raw]


def test_content_of_a_batch():
    batch = batches(Numbered(30), 1)[0]
    assert batch.waveforms.shape == (4, int(batch.lengths.max()))
    for row in range(4):
        index, length = int(batch.sample_ids[row]), int(batch.lengths[row])
        assert length == 1000 + index and batch.labels[row] == index % 5
        assert (batch.waveforms[row, :length] == index).all()
        assert not batch.waveforms[row, length:].any()
    assert batch.bad == () and batch.frames.dtype == torch.uint8


def test_epochs_take_every_clip_once_and_drop_the_rest():
    seen = ids(batches(Numbered(30), 14))
    for epoch in (seen[:7], seen[7:]):
        flat = [i for batch in epoch for i in batch]
        assert len(set(flat)) == 28
    assert seen[:7] != seen[7:]
    frames = [int(b.frames[0, 0, 0, 0]) for b in batches(Numbered(30), 14)]
    assert frames == [0] * 7 + [1] * 7
    assert make_loader(
        Numbered(30), data=DataConfig(num_workers=0), seed=0, micro_batch_size=4
    ).steps_per_epoch == 7  # fmt: skip


def test_other_seeds_other_orders():
    assert ids(batches(Numbered(30), 7)) != ids(batches(Numbered(30), 7, seed=1))


@pytest.mark.parametrize("bad", [frozenset(), frozenset({3, 7, 8, 20})])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one_process(bad, world):
    dataset = Numbered(30, bad)
    whole = batches(dataset, 15)
    parts = [
        batches(dataset, 15, micro_batch_size=4 // world, rank=r, world_size=world)
        for r in range(world)
    ]
    joined = [sum(rows, []) for rows in zip(*map(ids, parts), strict=True)]
    assert joined == ids(whole)
    reported = [sum((part[step].bad for part in parts), ()) for step in range(15)]
    assert reported == [batch.bad for batch in whole]


@pytest.mark.parametrize("start", [1, 5, 7, 9, 16])
def test_resume_goes_on_in_the_middle_of_an_epoch(start):
    dataset = Numbered(30, frozenset({2, 11}))
    resumed = batches(dataset, 4, start_sample=start * 4)
    assert ids(resumed) == ids(batches(dataset, start + 4))[start:]
    other_world = batches(
        dataset, 4, start_sample=start * 4, micro_batch_size=2, rank=1, world_size=2
    )
    assert ids(other_world) == [batch[2:] for batch in ids(resumed)]


def test_two_workers_give_what_none_give():
    data = DataConfig(num_clips=40)
    dataset = open_dataset(data, ModelConfig(audio_length=64, img_size=32), seed=5)
    alone = batches(dataset, 12)
    for ours, expected in zip(batches(dataset, 12, workers=2), alone, strict=True):
        for a, b in zip(ours[:5], expected[:5], strict=True):
            assert torch.equal(a, b)


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    batches(Numbered(30), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_clips_are_replaced_and_named():
    dataset = Numbered(40, frozenset({0, 10, 20, 30}))
    raw = batches(dataset, 10)
    for batch in raw:
        row = batch.sample_ids.tolist()
        assert len(set(row)) == 4 and not set(row) & dataset.bad
    reported = {bad for batch in raw for bad in batch.bad}
    assert {bad.video_id for bad in reported} == {"clip0", "clip10", "clip20", "clip30"}
    assert {bad.reason for bad in reported} == {"made bad"}
    good = [i for batch in raw for i in batch.sample_ids.tolist()]
    assert set(good) == set(range(40)) - dataset.bad  # every good clip is still seen


def test_two_good_clips_of_four_in_batches_of_two():
    dataset = Numbered(4, frozenset({0, 1}))
    for seed in range(8):
        for batch in batches(dataset, 6, seed=seed, micro_batch_size=2):
            assert set(batch.sample_ids.tolist()) <= {2, 3}


def test_substitutes_are_never_in_the_same_step():
    order = StepOrder(num_clips=23, global_size=5, seed=0)
    for place in range(20):
        others = list(order.substitutes(place))
        step = place // 5
        assert len(others) == len(set(others)) == 18
        assert all(other // 5 != step for other in others)
        assert all(other % 5 == place % 5 for other in others[:3])


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_clip_is_a_one_line_error(workers):
    with pytest.raises(TooManyBadClips) as caught:
        batches(Numbered(200, frozenset(range(200))), 1, workers=workers)
    message = str(caught.value)
    assert f"{MAX_SUBSTITUTES + 1} tried of 200" in message and "made bad" in message
    assert "\n" not in message


class Vanishing(Numbered):
    """Its index is deleted, or its reader killed, before the first clip is read."""

    def __init__(self, fault: str) -> None:
        super().__init__(20)
        self.fault = fault

    def read(self, index: int, epoch: int) -> Clip:
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("shards/000001.jsonl: No such file or directory;\n run it again")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_is_gone_is_a_one_line_error(workers):
    with pytest.raises(DatasetLost) as caught:
        batches(Vanishing("deleted"), 1, workers=workers)
    expected = "shards/000001.jsonl: No such file or directory; run it again"
    assert str(caught.value) == expected


def test_a_worker_that_is_killed_is_named(monkeypatch):
    look = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.2,))  # seconds between looks at the workers
    with pytest.raises(WorkerLost, match=r"^a loader process has died \(.*data.num_workers sets"):
        batches(Vanishing("killed"), 1, workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 40}, r"30 clips .* takes 40 .*train_micro_batch_size_per_gpu to 30"),
        ({"micro_batch_size": 16, "world_size": 2}, "takes 32 .* to 15"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"start_sample": 6}, "start_sample=6 must be a multiple .* 4"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        batches(Numbered(30), 1, **options)


KILLED = """
import multiprocessing, time
from kdcmae_fast.config import DataConfig
from kdcmae_fast.data import SyntheticClips, make_loader

clips = SyntheticClips(50, seed=0, img_size=16, clip_seconds=0.5)
batches = iter(make_loader(clips, data=DataConfig(num_workers=2), seed=0, micro_batch_size=2))
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_when_the_training_process_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        workers = process.stdout.readline().split()
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, workers))
