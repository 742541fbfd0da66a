"""Augmentation: the published sequence clip by clip gives what the batched one does."""

from itertools import islice

import numpy as np
import pytest
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import Clip, ClipError, FrontEnd, RawBatch, kaldi_fbank, make_loader
from kdcmae_fast.data import augment as augmentation
from kdcmae_fast.data.augment import Mixed, draws_of, keyed_noise, label_vectors, mask_bands
from kdcmae_fast.data.clip import keyed_rng
from kdcmae_fast.data.loader import collate

MODEL = ModelConfig(audio_length=64, num_mel_bins=32)
ALL = {"mixup": 0.5, "freq_mask": 12, "time_mask": 24, "noise": True}


class Sounds:
    """Clip i is noise of its own, 4000 + 600 i samples, with a frame all of level 5 i."""

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
        noise = np.random.default_rng(index).standard_normal(4000 + 600 * index)
        waveform = torch.from_numpy(noise * 0.1 + 0.05).float()
        frame = torch.full((3, 4, 4), 5 * index, dtype=torch.uint8)
        return Clip(self.video_id(index), index, waveform, frame, index, (index, index + 1))


def batches(n: int, data: DataConfig, dataset=None, **options) -> list[RawBatch]:
    settings = {"seed": 0, "micro_batch_size": 8} | options
    return list(islice(make_loader(dataset or Sounds(16), data=data, **settings), n))


def config(**changes) -> DataConfig:
    return DataConfig(**{"num_workers": 0, "dataset_mean": -4.0, "dataset_std": 3.0, **changes})


def one_by_one(raw: RawBatch, data: DataConfig, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The published order of operations for one clip; fbank (T, F) and frame."""
    clips, augment = Sounds(16), raw.augment
    own = clips.read(int(raw.sample_ids[row]), 0)
    waveform, frame = own.waveform - own.waveform.mean(), own.frame.float()
    place = augment.mixed.rows.tolist().index(row) if row in augment.mixed.rows else None
    if place is not None:
        share = float(augment.mixed.weights[place])
        other = clips.read(int(augment.mixed.classes[place, 0]), 0)
        second = other.waveform - other.waveform.mean()
        second = torch.nn.functional.pad(second, (0, max(0, len(waveform) - len(second))))
        waveform = share * waveform + (1 - share) * second[: len(waveform)]
        waveform = waveform - waveform.mean()
        frame = (share * frame + (1 - share) * other.frame.float()).round()
    fbank = kaldi_fbank(waveform[None], num_mel_bins=32)[0]
    fbank = torch.nn.functional.pad(fbank, (0, 0, 0, max(0, 64 - len(fbank))))[:64].clone()
    u = augment.draws[row].tolist()
    width, start = int(u[0] * 12), int(u[1] * (32 - u[0] * 12))
    fbank[:, start : start + width] = 0
    width, start = int(u[2] * 24), int(u[3] * (64 - u[2] * 24))
    fbank[start : start + width] = 0
    fbank = (fbank - data.dataset_mean) / data.dataset_std
    fbank = fbank + keyed_noise(augment.keys[row : row + 1], 64 * 32).view(64, 32) * u[4] / 10
    return torch.roll(fbank, int(u[5] * 128) - 64, 0), frame.to(torch.uint8)


def test_the_published_sequence_clip_by_clip():
    data = config(**ALL)
    seen = set()
    for raw in batches(4, data):
        batch = FrontEnd(data, MODEL)(raw)
        assert batch.frames.dtype == torch.uint8 and batch.fbank.shape == (8, 64, 32)
        for row in range(8):
            fbank, frame = one_by_one(raw, data, row)
            torch.testing.assert_close(batch.fbank[row], fbank, atol=2e-4, rtol=1e-4)
            assert torch.equal(batch.frames[row], frame)
        seen.add(len(raw.augment.mixed.rows))
    assert seen - {0, 8}


def test_a_partner_brings_its_own_sound_frame_and_labels():
    mixed = [raw.augment.mixed for raw in batches(6, config(mixup=1.0))]
    for other in mixed:
        assert other.rows.tolist() == list(range(8))
        for row in range(8):
            index = int(other.classes[row, 0])
            assert other.classes[row].tolist() == [index, index + 1]
            assert other.lengths[row] == 4000 + 600 * index
            assert (other.frames[row] == 5 * index).all()
    assert len({int(i) for other in mixed for i in other.classes[:, 0]}) > 12


def per_clip(raw: list[RawBatch], data: DataConfig) -> dict[tuple[int, int], torch.Tensor]:
    """(step, sample id) -> what FrontEnd made of it."""
    front_end, found = FrontEnd(data, MODEL), {}
    for step, one in enumerate(raw):
        batch = front_end(one)
        for row, index in enumerate(one.sample_ids.tolist()):
            found[step, index] = torch.cat([batch.fbank[row].flatten(), batch.frames[row, 0, 0]])
    return found


def test_ranks_workers_and_resume_change_nothing():
    data = config(**ALL)
    whole = per_clip(batches(5, data), data)
    ranks = {}
    for rank in range(2):
        ranks |= per_clip(batches(5, data, micro_batch_size=4, rank=rank, world_size=2), data)
    resumed = per_clip(batches(2, data, start_sample=24), data)
    workers = per_clip(batches(5, config(**ALL, num_workers=1)), data)
    assert whole.keys() == ranks.keys()
    for key, value in whole.items():
        torch.testing.assert_close(ranks[key], value, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(workers[key], value, atol=0, rtol=0)
    for (step, index), value in resumed.items():
        torch.testing.assert_close(whole[step + 3, index], value, atol=1e-5, rtol=1e-5)


def test_another_epoch_and_another_seed_draw_anew():
    data = config(**ALL)
    draws = torch.cat([raw.augment.draws for raw in batches(4, data)])
    assert len(torch.unique(draws[:, 0])) == 32  # two epochs of 16 clips
    other = torch.cat([raw.augment.draws for raw in batches(4, data, seed=1)])
    assert not torch.equal(draws, other)


def test_switching_one_on_leaves_the_draws_of_the_others():
    one, other = (draws_of(keyed_rng(0, 4, 3, 7), config(**s)) for s in (ALL, {"noise": True}))
    assert np.array_equal(one.values, other.values) and one.key == other.key


def test_share_and_weights_of_mix_up():
    drawn = [draws_of(keyed_rng(0, 4, 0, i), config(mixup=0.3)).weight for i in range(4000)]
    weights = np.array([weight for weight in drawn if weight < 1])
    assert len(weights) == pytest.approx(1200, abs=120)
    assert weights.mean() == pytest.approx(0.5, abs=0.015)  # Beta(10, 10): variance 1 / 84
    assert weights.var() == pytest.approx(1 / 84, rel=0.15)


def test_masks_stay_inside_and_reach_everywhere():
    """Everywhere but the last place, as follows from the published cutting to whole numbers."""
    draws = torch.rand(4000, augmentation.NUM_DRAWS)
    bins = mask_bands(torch.ones(4000, 10, 8), draws, freq_mask=3, time_mask=0) == 0
    rows = mask_bands(torch.ones(4000, 10, 8), draws, freq_mask=0, time_mask=10) == 0
    assert (bins == bins[:, :1]).all() and (rows == rows[:, :, :1]).all()
    for inside, widest in ((bins[:, 0], 2), (rows[:, :, 0], 9)):
        assert set(inside.sum(1).tolist()) == set(range(widest + 1))
        assert inside[:, :-1].any(0).all() and not inside[:, -1].any()
        edges = (inside[:, 1:] != inside[:, :-1]).sum(1)
        assert edges.max() <= 2  # one stretch


def test_masks_are_put_on_before_the_normalisation():
    data = config(freq_mask=32)
    raw = batches(1, data)[0]
    fbank = FrontEnd(data, MODEL)(raw).fbank
    u = raw.augment.draws
    for row in range(8):
        start = int(u[row, 1] * (32 - u[row, 0] * 32))
        if int(u[row, 0] * 32) > 0:
            assert fbank[row, :, start].tolist() == pytest.approx([4 / 3] * 64)


def test_noise_is_uniform_and_its_numbers_are_fixed():
    noise = keyed_noise(torch.tensor([1, 2, -5], dtype=torch.int32), 100_000)
    assert noise.min() >= 0 and noise.max() < 1
    assert noise.mean(1).tolist() == pytest.approx([0.5] * 3, abs=5e-3)
    assert noise.var(1).tolist() == pytest.approx([1 / 12] * 3, rel=2e-2)
    between = torch.corrcoef(noise) - torch.eye(3)
    assert between.abs().max() < 0.02
    for lag in (1, 2, 128):
        pair = torch.stack([noise[0, lag:], noise[0, :-lag]])
        assert torch.corrcoef(pair)[0, 1].abs() < 0.02
    for number in (0, 1, 99_999):  # in Python's own integers
        word = (number * 0x9E3779B9 ^ (-5 % 2**32)) % 2**32
        word = (word ^ word >> 16) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        assert noise[2, number].item() == ((word ^ word >> 16) >> 8) / 2**24


def test_label_vectors():
    classes = torch.tensor([[0, 2], [1, -1], [3, -1]])
    mixed = Mixed(
        rows=torch.tensor([2]), weights=torch.tensor([0.25]), waveforms=torch.zeros(1, 8),
        lengths=torch.tensor([8]), frames=torch.zeros(1, 3, 2, 2), classes=torch.tensor([[1, 3]]),
    )  # fmt: skip
    low, high = 0.1 / 4, 0.9
    expected = [
        [high, low, high, low],
        [low, high, low, low],
        [low, low + 0.75 * 0.9, low, low + 0.25 * 0.9 + 0.75 * 0.9],
    ]
    torch.testing.assert_close(label_vectors(classes, 4, 0.1, mixed), torch.tensor(expected))
    plain = label_vectors(classes, 4)
    assert plain.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert not label_vectors(torch.tensor([[-1]]), 4).any()


def test_nothing_happens_by_default_or_in_evaluation():
    assert batches(1, config())[0].augment is None
    data = config(**ALL)
    raw = collate([Sounds(16).read(index, 0) for index in range(4)])
    plain = FrontEnd(config(), MODEL)(raw)
    assert torch.equal(FrontEnd(data, MODEL)(raw).fbank, plain.fbank)


def test_bad_partners_are_replaced_and_named():
    dataset = Sounds(16, bad=frozenset({3, 11}))
    raw = batches(8, config(mixup=1.0), dataset)
    assert {bad.video_id for one in raw for bad in one.bad} == {"clip3", "clip11"}
    partners = {int(i) for one in raw for i in one.augment.mixed.classes[:, 0]}
    assert partners and not partners & dataset.bad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freq_mask": 33}, "freq_mask=33 must be at most 32"),
        ({"time_mask": 65}, "time_mask=65 must be at most 64"),
    ],
)
def test_masks_wider_than_the_filterbank(changes, message):
    with pytest.raises(ValueError, match=message):
        FrontEnd(config(**changes), MODEL)
    with pytest.raises(ValueError, match="mixup=1.5"):
        config(mixup=1.5)
    with pytest.raises(ValueError, match="smoothing=1"):
        label_vectors(torch.tensor([[0]]), 4, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu():
    data = config(**ALL)
    for raw in batches(3, data):
        here, there = FrontEnd(data, MODEL)(raw), FrontEnd(data, MODEL)(raw, "cuda")
        torch.testing.assert_close(there.fbank.cpu(), here.fbank, atol=1e-3, rtol=1e-3)
        assert (there.frames.cpu().int() - here.frames.int()).abs().max() <= 1
